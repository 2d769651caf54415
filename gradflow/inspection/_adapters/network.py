"""Gradflow's own networks: their random matrices and biases as parameters, drawn in training."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from gradflow._inputs import as_inputs
from gradflow.inspection._reading.model import Model
from gradflow.networks import Network


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:  # noqa: ARG001
    """The model of a `Network`; None for anything else."""
    if not isinstance(model, Network):
        return None
    from gradflow.training import initial_weights, outputs  # noqa: PLC0415

    dtype = as_inputs(inputs[0], model).dtype

    def init(key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        return initial_weights(model, key, dtype), ()

    def apply(parameters: PyTree, state: PyTree, key: PRNGKeyArray, values: Any) -> Any:  # noqa: ARG001
        return outputs(model, parameters, jnp.asarray(values, dtype), key)

    return Model("Network", init, apply)
