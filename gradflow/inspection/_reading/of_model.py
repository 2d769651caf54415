"""The program of a model, with its user's loss behind it if there is one."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from gradflow._checks import shown
from gradflow.errors import InputError
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import Program, read

__all__ = ["program_of", "top_sites"]


def program_of(
    model: Model,
    inputs: tuple[Any, ...],
    *,
    loss: Callable[..., Array] | None = None,
    targets: tuple[Any, ...] = (),
) -> Program:
    """Read a model: a program of its parameters, state, key and inputs, and of targets of a loss.

    Parameters
    ----------
    model
        The model.
    inputs
        Its arguments, pytrees of arrays or of their shapes.
    loss
        A function ``(outputs, *targets) -> scalar``; the program's output is then that scalar.
    targets
        Pytrees of arrays or of their shapes.

    Raises
    ------
    InputError
        If a loss is not one number.
    """
    parameters, state = model.given or _drawn(model)
    key = jax.random.key(0)
    if loss is None:
        return read(
            lambda p, s, k, x: model.apply(p, s, k, *x),
            parameters=parameters,
            state=state,
            key=key,
            inputs=inputs,
        )

    def cost(p: Any, s: Any, k: Any, x: Any, t: Any) -> Any:
        value = loss(model.apply(p, s, k, *x), *t)
        if not hasattr(value, "shape") or value.shape != ():
            raise InputError(f"loss returns {_described(value)}; it is one number, as a mean")
        return value

    return read(cost, parameters=parameters, state=state, key=key, inputs=inputs, targets=targets)


def _drawn(model: Model) -> tuple[Any, Any]:
    """The shapes of a model's parameters and state."""
    assert model.init is not None
    key = jax.random.key(0)
    return jax.eval_shape(model.init, key) if model.traceable else model.init(key)


def _described(value: Any) -> str:
    return f"an array of shape {value.shape}" if hasattr(value, "shape") else shown(value)


def top_sites(program: Program, layers: list[Layer]) -> int:
    """Sites at the top, over which the random cost is a mean: 1 of a user's own loss.

    They are all axes of the first output but its units: the last layer's, where the output has its
    shape, and else the last axis.
    """
    if "targets" in program.arguments:
        return 1
    shape, z = program.avals[program.outputs[0]].shape, layers[-1].preactivation
    units = layers[-1].units if program.avals[z].shape == shape else (len(shape) - 1,)
    sites = 1
    for axis, size in enumerate(shape):
        sites *= 1 if len(shape) > 1 and axis in units else size
    return sites
