"""Equinox: a module that is called, with its weights, or such a module and its `eqx.nn.State`.

A model of one example is mapped over the batch, as its library's own programs do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree

from gradflow._arguments import from_seed
from gradflow.inspection._adapters import _calls
from gradflow.inspection._reading.model import Model


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:
    """The model of a module; None for anything else."""
    module, state = model, None
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[1], eqx.nn.State):
        module, state = model
    if not (isinstance(module, eqx.Module) and callable(module)):
        return None
    module = eqx.nn.inference_mode(module, value=False)
    if state is None and any(isinstance(m, eqx.nn.StateIndex) for m in _parts(module)):
        state = eqx.nn.State(module)
    named, mode = _calls.in_training(module.__call__, kwargs)
    parameters, others = eqx.partition(module, eqx.is_inexact_array)
    arrays, static = eqx.partition(others, eqx.is_array)
    axis = next(filter(None, (getattr(m, "axis_name", None) for m in _parts(module))), "batch")

    def one(module: Any, state: Any, key: PRNGKeyArray, *values: Any) -> Any:
        given, by_name = _calls.bound(module.__call__, (), values, key, state, named)
        outputs = module(*given, **by_name)
        kept = outputs[:-1] if _ends_with_state(outputs) else outputs
        return kept[0] if _ends_with_state(outputs) and len(kept) == 1 else kept

    def each(module: Any, state: Any, key: PRNGKeyArray, *values: Any) -> Any:
        keys = jax.random.split(key, len(jax.tree.leaves(values)[0]))
        in_axes = (None, 0, *(0 for _ in values))
        call = lambda state, key, *values: one(module, state, key, *values)  # noqa: E731
        return jax.vmap(call, in_axes, axis_name=axis)(state, keys, *values)

    call = _first_that_works(module, state, inputs, (each, one))

    def apply(parameters: PyTree, rest: PyTree, key: PRNGKeyArray, *values: Any) -> Any:
        arrays, state = rest
        return call(eqx.combine(parameters, arrays, static), state, key, *values)

    said = ["vmapped over the batch"] if call is each else []
    said += ["inference=False"] if any(hasattr(m, "inference") for m in _parts(module)) else []
    return Model(
        type(getattr(module, "__wrapped__", module)).__name__,
        None,
        apply,
        given=(parameters, (arrays, state)),
        mode=", ".join(filter(None, (*said, mode))),
    )


def _parts(module: eqx.Module) -> list[Any]:
    """A module and all modules in it."""
    found: list[Any] = []

    def note(node: Any) -> bool:
        if isinstance(node, eqx.Module):
            found.append(node)
        return False

    jax.tree.leaves(module, is_leaf=note)
    return found


def _ends_with_state(outputs: Any) -> bool:
    return isinstance(outputs, tuple) and bool(outputs) and isinstance(outputs[-1], eqx.nn.State)


def _first_that_works(
    module: eqx.Module, state: Any, inputs: Sequence[Any], calls: Sequence[Callable]
) -> Callable:
    """The first of the ways to call the module on these inputs that has a result."""
    failures = []
    for call in calls:
        try:
            eqx.filter_eval_shape(call, module, state, from_seed(0), *inputs)
        except Exception as error:  # whatever the module raises
            failures.append(error)
        else:
            return call
    raise _calls.failure(type(module).__name__, inputs, failures[0]) from failures[0]
