"""Flax linen: a module, a bound one, or a module with its variables.

The collection ``params`` is what trains; all others are the state, and what a call makes of them is
dropped.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray, PyTree

from gradflow.inspection._adapters import _calls
from gradflow.inspection._reading.model import Model


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:
    """The model of an `nn.Module`; None for anything else."""
    module, variables = model, None
    if isinstance(model, tuple) and len(model) == 2:
        module, variables = model
        if inspect.ismethod(variables):  # (module.init, module.apply) or (variables, module.apply)
            module, variables = variables.__self__, module
    if not _calls.comes_from(module, "flax.linen"):
        return None
    if module.scope is not None:
        module, variables = module.unbind()
    named, mode = _calls.in_training(module.__call__, kwargs)

    def split(variables: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
        others = {name: value for name, value in variables.items() if name != "params"}
        return variables.get("params", {}), others

    def init(key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        given, by_name = _calls.bound(module.__call__, (), inputs, key, kwargs=named)
        return split(module.init(_rngs(key), *given, **by_name))

    def apply(parameters: PyTree, state: PyTree, key: PRNGKeyArray, *values: Any) -> Any:
        variables = {"params": parameters, **state}
        given, by_name = _calls.bound(module.__call__, (), values, key, kwargs=named)
        outputs, _ = module.apply(variables, *given, rngs=_rngs(key), mutable=[*state], **by_name)
        return outputs

    given = None
    if isinstance(variables, Mapping):
        given = split(variables if "params" in variables else {"params": variables})
    # Who hands over variables asks about these.
    law = init if given is None else None
    return Model(type(module).__name__, law, apply, given, mode=mode)


def _rngs(key: PRNGKeyArray) -> dict[str, PRNGKeyArray]:
    """Keys by the names that modules ask for; Flax gives ``params``'s where there is no other."""
    return dict(zip(("params", "dropout"), jax.random.split(key), strict=True))
