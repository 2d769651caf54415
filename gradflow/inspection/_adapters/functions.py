"""A pair of functions, ``init(key)`` and ``apply(parameters, *inputs)``, as many write them.

``init`` may take the inputs after the key, as Haiku's does, or their shape, as stax's does. Keys
and states go to the arguments that are named so. Parameters may stand in the place of ``init``.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray, PyTree

from gradflow.inspection._adapters import _calls
from gradflow.inspection._reading.model import Model


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:
    """The model of a pair; None for anything else."""
    if not (isinstance(model, tuple) and len(model) == 2 and callable(model[1])):
        return None
    first, function = model
    named, mode = _calls.in_training(function, kwargs)
    second = list(_calls.parameters_of(function))[1:2]
    stateful = bool(_calls.STATE_NAMES.intersection(second))

    def split(made: PyTree) -> tuple[PyTree, PyTree]:
        parameters, state = made if stateful else (made, None)
        parameters, others = _calls.trainable(parameters)
        return parameters, (others, state)

    def init(key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        return split(_made(first, key, inputs, kwargs))

    def apply(parameters: PyTree, state: PyTree, key: PRNGKeyArray, *values: Any) -> Any:
        others, own = state
        leading = [eqx.combine(parameters, others)]
        given, by_name = _calls.bound(function, leading, values, key, own, named)
        outputs = function(*given, **by_name)
        return outputs[0] if stateful else outputs

    name = getattr(function, "__name__", type(function).__name__)
    name = "model" if name.startswith("apply") else name
    if callable(first):
        return Model(name, init, apply, traceable=_calls.traceable(init), mode=mode)
    return Model(name, None, apply, given=split(first), mode=mode)


def _made(
    init: Callable, key: PRNGKeyArray, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> PyTree:
    """What ``init`` makes of a key, and of the inputs or their shape if it takes them."""
    arguments = list(_calls.parameters_of(init).values())
    if len(arguments) > 1 and arguments[1].name in ("input_shape", "shape"):
        shapes = [tuple(x.shape) for x in inputs]
        return init(key, shapes[0] if len(shapes) == 1 else shapes)[1]
    given = sum(a.kind is not a.VAR_POSITIONAL for a in arguments[:1])  # the key
    needed = [a for a in arguments[given:] if a.default is a.empty and a.kind is not a.VAR_KEYWORD]
    if not needed:
        return init(key)
    of_init, _ = _calls.in_training(init, kwargs)
    named = {n: v for n, v in of_init.items() if n in inspect.signature(init).parameters}
    if any(a.kind is a.VAR_KEYWORD for a in arguments):
        named = of_init
    return init(key, *inputs, **named)
