"""How a model's functions are called: what their arguments are, by name; what failed, in words."""

import inspect
import re
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from gradflow._arguments import from_seed
from gradflow.errors import InputError

__all__ = [
    "KEY_NAMES",
    "bound",
    "comes_from",
    "failure",
    "in_training",
    "parameters_of",
    "traceable",
    "trainable",
    "with_axes",
]

KEY_NAMES = frozenset({"key", "rng", "rngs", "rng_key", "prng_key", "random_key"})
STATE_NAMES = frozenset({"state", "net_state", "model_state"})
_TRAINING = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "enable_dropout": True,
    "use_running_average": False,
}
# Names of axes of devices that one model asks for.
_MOST_AXES = 8
_LIBRARIES = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
_PACKAGE = Path(__file__).parents[2]
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.UnexpectedTracerError,
)


def comes_from(model: object, *packages: str) -> bool:
    """Whether an object's class, or one that it is derived from, is of one of the packages."""
    starts = tuple(f"{package}." for package in packages)
    if isinstance(model, type):
        return False
    return any(f"{kind.__module__}.".startswith(starts) for kind in type(model).__mro__)


def parameters_of(function: Callable) -> Mapping[str, inspect.Parameter]:
    """A function's arguments by name, but the ``self`` of a method; none where it hides them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def in_training(call: Callable, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The keyword arguments with those that say that the model trains, and the latter in words."""
    names = parameters_of(call)
    chosen = {n: value for n, value in _TRAINING.items() if n in names and n not in kwargs}
    return {**kwargs, **chosen}, ", ".join(f"{n}={value}" for n, value in chosen.items())


def bound(
    function: Callable,
    leading: Sequence[Any],
    inputs: Sequence[Any],
    key: PRNGKeyArray,
    state: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    rngs: Callable[[PRNGKeyArray], Any] = lambda key: key,
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call: keys and states where names say so, the inputs in their order.

    Inputs that would be too many take the place of keys. ``rngs`` makes of a key what an argument
    of that name is.

    Raises
    ------
    TypeError
        If the function takes fewer inputs, or needs more.
    """
    try:
        return _bound(function, leading, inputs, (key, rngs), state, kwargs)
    except TypeError as error:
        try:
            return _bound(function, leading, inputs, None, state, kwargs)
        except TypeError:
            raise error from None


def _bound(
    function: Callable,
    leading: Sequence[Any],
    inputs: Sequence[Any],
    keys: tuple[PRNGKeyArray, Callable[[PRNGKeyArray], Any]] | None,
    state: Any,
    kwargs: Mapping[str, Any] | None,
) -> tuple[list[Any], dict[str, Any]]:
    positional, named, rest = list(leading), dict(kwargs or {}), list(inputs)
    by_position = True
    for parameter in list(parameters_of(function).values())[len(positional) :]:
        name, kind = parameter.name, parameter.kind
        if kind is parameter.VAR_POSITIONAL:
            positional, rest = positional + rest, []
        if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in named:
            by_position = False
            continue
        if keys is not None and _is_key(parameter):
            key, rngs = keys
            value = rngs(key) if name.endswith("rngs") else key
        elif name in STATE_NAMES and state is not None:
            value = state
        elif rest and (kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty):
            value = rest.pop(0)
        else:
            by_position = False
            continue
        if by_position and kind is not parameter.KEYWORD_ONLY:
            positional.append(value)
        else:
            named[name] = value
    if rest:
        raise TypeError(f"it takes {len(inputs) - len(rest)} inputs, not {len(inputs)}")
    inspect.signature(function).bind(*positional, **named)
    return positional, named


def _is_key(parameter: inspect.Parameter) -> bool:
    """Whether an argument is a key: by its name, or by how the name of one that is needed ends."""
    ends = ("_key", "_rng", "_rngs")
    needed = parameter.default is parameter.empty
    return parameter.name in KEY_NAMES or (needed and parameter.name.endswith(ends))


def with_axes(apply: Callable) -> Callable:
    """A function in which each name of an axis that it asks for is one of a single device.

    Models that train on many devices average over these, as BatchNorm's ``axis_name`` says.
    """
    names: list[str] = []

    def bound_to_names(*arguments: Any) -> Any:
        for _ in range(_MOST_AXES):
            function = apply
            for name in names:
                function = jax.vmap(
                    function, in_axes=None, out_axes=None, axis_name=name, axis_size=1
                )
            try:
                return function(*arguments)
            except NameError as error:
                unbound = re.search(r"unbound axis name:? (\w+)", str(error))
                if unbound is None or unbound[1] in names:
                    raise
                names.append(unbound[1])
        return apply(*arguments)

    return bound_to_names


def traceable(init: Callable) -> bool:
    """Whether a function of a key needs no values of it; what fails otherwise fails when called."""
    try:
        jax.eval_shape(init, from_seed(0))
    except _UNTRACEABLE:
        return False
    except Exception:  # whatever the function raises
        return True
    return True


def trainable(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The arrays of floats of a tree, and all other leaves; `equinox.combine` puts them back."""
    numbers = (float, complex, np.ndarray, np.generic)
    arrays = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, numbers) else x, tree)
    return eqx.partition(arrays, eqx.is_inexact_array)


def failure(name: str, inputs: Sequence[Any] | None, error: Exception) -> InputError:
    """What went wrong in a model's own code, as one sentence with the line where it did.

    ``inputs`` is None where it was not called with them.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*_LIBRARIES, str(_PACKAGE), "<"))
    ]
    at = f" at {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    text = re.sub(r"\s*\(https?://\S*\)", "", str(error).strip().partition("\n")[0])
    reason = f"{type(error).__name__}{at}: {text.rstrip('.')}"
    if isinstance(error, _UNTRACEABLE):
        return InputError(
            f"{name} cannot be traced: {reason}; it is made of JAX operations that need no values"
        )
    if inputs is None:
        return InputError(f"{name} fails: {reason}; it makes a model")
    shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in jax.tree.leaves(inputs))
    return InputError(f"inputs is {shapes}; {name} cannot be applied to it: {reason}")
