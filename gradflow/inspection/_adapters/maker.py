"""A function or class that makes a model of any kind, from nothing, a key, or ``nnx.Rngs``.

Of a module that holds its weights, it is the law of these.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from gradflow._arguments import from_seed
from gradflow.errors import InputError
from gradflow.inspection import _adapters
from gradflow.inspection._adapters import _calls, torch
from gradflow.inspection._reading.model import Model


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:
    """The model that ``model()``, ``model(key)`` or ``model(rngs)`` is; None for anything else."""
    make = maker_of(model)
    if make is None:
        return None
    key = from_seed(0)
    name = functools.partial(model).func.__name__
    try:
        made = _of_shapes(make, model) or make(key)
    except Exception as error:  # whatever the maker raises
        raise _calls.failure(f"{name}()", None, error) from error
    found = _adapters.adapted(made, inputs, kwargs)
    if found is None:
        raise InputError(f"{name} makes an object of {type(made).__name__}; {_adapters.ALLOWED}")
    if _calls.comes_from(made, "torch.nn") and not _key_arguments(model):
        make = torch.seeded(model)
    elif found.init is not None or not _key_arguments(model):
        return found

    def init(key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        again = _adapters.adapted(make(key), inputs, kwargs)
        assert again is not None
        assert again.given is not None
        return again.given

    return Model(found.name, init, found.apply, None, _calls.traceable(init), found.mode)


def _of_shapes(make: Callable[[PRNGKeyArray], Any], model: Any) -> Any:
    """What a maker that takes a key makes, its weights not drawn: in many the drawing compiles.

    None where it needs the values of the key, or is not known to need none.
    """
    key = from_seed(0)
    arguments = [a.name for a in _key_arguments(model)]
    try:
        if arguments == ["rngs"]:
            from flax import nnx  # noqa: PLC0415

            return nnx.eval_shape(make, key)
        if not arguments:
            return None
        made = eqx.filter_eval_shape(make, key)
        if not isinstance(made, eqx.Module):
            return None
        shapes = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype) if shapes(x) else x, made)
    except Exception:  # noqa: BLE001 (it is made as it is, and fails or not)
        return None


def maker_of(model: Any) -> Callable[[PRNGKeyArray], Any] | None:
    """The model as a function of a key, if it can be called with no more than that."""
    if not (inspect.isroutine(model) or isinstance(model, type | functools.partial)):
        return None
    keys = _key_arguments(model)
    needed = [a for a in _arguments(model) if a.default is a.empty and a not in keys]
    if needed or len(keys) > 1:
        return None
    if not keys:
        return lambda _: model()
    argument = keys[0]

    def make(key: PRNGKeyArray) -> Any:
        value: Any = key
        if argument.name == "rngs":
            from flax import nnx  # noqa: PLC0415

            value = nnx.Rngs(key)
        if argument.kind is argument.POSITIONAL_ONLY:
            return model(value)
        return model(**{argument.name: value})

    return make


def _arguments(model: Any) -> list[inspect.Parameter]:
    """The named arguments of a function, or of a class."""
    if getattr(model, "__qualname__", "").startswith("make_with_state."):  # Equinox's
        model = next((c.cell_contents for c in model.__closure__ or ()), model)
    bound = functools.partial(model)  # of a partial function it is all one
    if isinstance(bound.func, type):  # its metaclass may hide what it takes
        kind: Any = bound.func
        bound = functools.partial(kind.__init__, None, *bound.args, **bound.keywords)
    arguments = _calls.parameters_of(bound).values()
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [a for a in arguments if a.kind not in rest]


def _key_arguments(model: Any) -> list[inspect.Parameter]:
    return [a for a in _arguments(model) if a.name in _calls.KEY_NAMES]
