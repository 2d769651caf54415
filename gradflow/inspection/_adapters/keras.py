"""Keras 3 on JAX: a model or a layer, built or not.

The law of its weights is that of each variable's own initialiser. One that several layers share,
with its seed, gives them equal weights in Keras; here each draws its own.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray, PyTree

from gradflow.errors import InputError
from gradflow.inspection._adapters import _calls
from gradflow.inspection._reading.model import Model


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:
    """The model of a `keras.Layer`; None for anything else."""
    if not _calls.comes_from(model, "keras"):
        return None
    import keras  # noqa: PLC0415

    if keras.config.backend() != "jax":
        raise InputError(
            f"the backend of Keras is {keras.config.backend()}; it is JAX, with KERAS_BACKEND=jax "
            "in the environment before Keras is imported"
        )
    if not isinstance(model, keras.Layer):
        return None
    named, mode = _calls.in_training(model.call, kwargs)
    if not model.built:
        try:
            model(*inputs, **named)
        except Exception as error:  # whatever the model raises
            raise _calls.failure(model.name, inputs, error) from error
    weights, others = _by_path(model.trainable_variables), model.non_trainable_variables
    laws = _initialisers(model)
    held = [v.value for v in others]
    functional = any(kind.__name__ == "Functional" for kind in type(model).__mro__)

    def init(key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        keys = jax.random.split(key, len(weights))
        drawn = zip(weights.items(), keys, strict=True)
        return {path: _drawn(laws[id(v)], v, k) for (path, v), k in drawn}, held

    def apply(parameters: PyTree, state: PyTree, key: PRNGKeyArray, *values: Any) -> Any:
        rest = [
            jax.random.bits(jax.random.fold_in(key, i), v.shape, v.dtype) if _is_seed(v) else now
            for i, (v, now) in enumerate(zip(others, state, strict=True))
        ]
        own = [parameters[path] for path in weights]
        arguments = [list(values)] if functional and len(values) > 1 else values
        return model.stateless_call(own, rest, *arguments, **named)[0]

    known = all(id(v) in laws for v in weights.values())
    given = {path: v.value for path, v in weights.items()}, held
    return Model(model.name, init if known else None, apply, given, mode=mode)


def _is_seed(variable: Any) -> bool:
    return variable.path.endswith("seed_generator_state")


def _by_path(variables: Sequence[Any]) -> dict[str, Any]:
    """Variables by their paths; those of an equal path get a number."""
    found: dict[str, Any] = {}
    for variable in variables:
        same = sum(path.partition("#")[0] == variable.path for path in found)
        found[f"{variable.path}#{same + 1}" if same else variable.path] = variable
    return found


def _drawn(initialiser: Callable, variable: Any, key: PRNGKeyArray) -> jax.Array:
    """What an initialiser draws from a key, which takes the place of its seed."""
    if hasattr(initialiser, "seed"):
        initialiser = copy.copy(initialiser)
        initialiser.seed = key
    return jax.numpy.asarray(initialiser(variable.shape, dtype=variable.dtype))


def _initialisers(layer: Any) -> dict[int, Callable]:
    """The initialisers of a layer's variables, by their ids, where they can be made again.

    A variable forgets its initialiser when it is built, and remembers it in a stateless scope: the
    layer is made there again from its description, or each layer in it where it has none.
    """
    import keras  # noqa: PLC0415

    try:
        with keras.StatelessScope():
            again = type(layer).from_config(layer.get_config())
            if not again.built:
                again.build_from_config(layer.get_build_config())
            pairs = list(zip(layer.variables, again.variables, strict=True))
            found = {id(v): new._initializer for v, new in pairs}
            if any((v.name, v.shape) != (new.name, new.shape) for v, new in pairs):
                raise ValueError("the description of the layer makes another one")
    except Exception:  # whatever the layer raises
        parts = (_initialisers(part) for part in layer._layers)
        return {v: law for part in parts for v, law in part.items()}
    return found
