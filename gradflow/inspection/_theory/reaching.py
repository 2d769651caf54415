"""Where gradients are exactly 0: below a scale, or weights, that begin at 0, and below steps.

A gradient that theory does not have may be 0, or of order 1/width, through a mean over units. Which
of these is seen on the program itself.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.program import Equation, Program
from gradflow.inspection._theory.values import Known, Value

__all__ = ["Reach"]

# Functions that are constant almost everywhere.
_STEPS = frozenset({"ceil", "floor", "round", "sign", "stop_gradient"})
_PRODUCTS = frozenset({"conv_general_dilated", "dot_general", "mul"})


class Reach:
    """How far down a program gradients that are not exactly 0 may come.

    Parameters
    ----------
    program, values
        The program, and the abstract value of each of its numbers.
    """

    def __init__(self, program: Program, values: Mapping[int, Value]) -> None:
        self.program = program
        reached = set(program.outputs)
        # Equations whose gradients end at an input of theirs, and that input, from the top down.
        self.ends: list[tuple[Equation, int]] = []
        for equation in reversed(program.equations):
            if reached.isdisjoint(equation.outputs):
                continue
            for place, number in enumerate(equation.inputs):
                if _passes(program, values, equation, place):
                    reached.add(number)
                else:
                    self.ends.append((equation, number))
        self.reached = reached

    def why_none(self, layer: Layer) -> tuple[bool, str]:
        """Whether a gradient that theory does not have at a layer is 0, and a sentence on it."""
        if layer.product in self.reached:
            return False, "theory has no gradient through means over units alone"
        above = {layer.product}
        for equation in self.program.equations[layer.equation + 1 :]:
            if not above.isdisjoint(equation.inputs):
                above.update(equation.outputs)
        here = next((e for e, number in reversed(self.ends) if number in above), None)
        where = (here and here.path) or "the model"
        return True, f"no gradient below {where} at step 0: its factor there is 0"


def _passes(program: Program, values: Mapping[int, Value], equation: Equation, place: int) -> bool:
    """Whether the gradient at an input of an equation may be other than 0."""
    number, name = equation.inputs[place], equation.primitive
    if not jnp.issubdtype(program.avals[number].dtype, jnp.inexact) or name in _STEPS:
        return False
    if not any(jnp.issubdtype(program.avals[i].dtype, jnp.inexact) for i in equation.outputs):
        return False
    others = [values.get(i) for i in equation.inputs]
    if name in _PRODUCTS:
        return not _is_zero(others[1 - place])
    if name == "select_n" and isinstance(others[0], Known):
        return bool((others[0].value == place - 1).any())
    return True


def _is_zero(value: Value | None) -> bool:
    return isinstance(value, Known) and not value.value.any()
