"""A model's program on its inputs, or one sentence on why there is none."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from gradflow._arguments import from_seed
from gradflow.errors import InputError
from gradflow.inspection._adapters import _calls
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import Program, read

__all__ = ["trace", "weight_shapes"]


def weight_shapes(model: Model, inputs: Sequence[Any]) -> tuple[PyTree, PyTree]:
    """The shapes and dtypes of a model's parameters and of its state.

    Raises
    ------
    InputError
        If ``init`` fails, or there is no parameter.
    """
    if model.given is not None:
        shapes = jax.eval_shape(lambda: model.given)
    else:
        assert model.init is not None
        key = from_seed(0)
        try:
            if model.traceable:
                shapes = jax.eval_shape(model.init, key)
            else:
                shapes = jax.eval_shape(lambda drawn: drawn, model.init(key))
        except Exception as error:  # whatever the model raises
            raise _calls.failure(model.name, inputs, error) from error
    if not jax.tree.leaves(shapes[0]):
        raise InputError(
            f"{model.name} has no parameters; it is a model with an array of floats that trains"
        )
    return shapes


def trace(model: Model, inputs: Sequence[Any]) -> Program:
    """The program of ``model.apply``: arguments parameters, state, key, inputs.

    Raises
    ------
    InputError
        If the model cannot be traced or applied to the inputs, has no parameters or no outputs, or
        if no output depends on the inputs.
    """
    parameters, state = weight_shapes(model, inputs)

    def apply(parameters: PyTree, state: PyTree, key: Any, inputs: Sequence[Any]) -> Any:
        return model.apply(parameters, state, key, *inputs)

    try:
        program = read(
            apply, parameters=parameters, state=state, key=from_seed(0), inputs=tuple(inputs)
        )
    except InputError:
        raise
    except Exception as error:  # whatever the model raises
        raise _calls.failure(model.name, inputs, error) from error
    if program.depends_on(program.arguments["inputs"]).isdisjoint(program.outputs):
        raise InputError(
            f"the outputs of {model.name} do not depend on inputs; it is a function of them"
        )
    return program
