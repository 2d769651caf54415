"""The law of a leaf from the program that draws it: no draws, and no list of names.

An initialiser makes each entry of a leaf from random bits of its own, by the same elementwise
function g: `jax.nn.initializers` and what is written by hand do. The entry's law is that of g of
uniform bits, whose moments are sums over evenly spaced bits. Where g is Φ⁻¹ of them up to a scale
and a mean the law is Gaussian, and where it is linear uniform, and both are exact.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.inspection._reading.layers import ELEMENTWISE, SHAPES
from gradflow.inspection._reading.program import Equation, Program
from gradflow.inspection._theory.values import Law

__all__ = ["law_of"]

# Evenly spaced bits; of these what is further from the ends than a 64th tells the law's shape.
_POINTS = 1 << 18
_ENTRY_BY_ENTRY = ((ELEMENTWISE | SHAPES) - {"custom_jvp_call", "custom_vjp_call"}) | {
    "shift_right_logical",
    "shift_left",
    "bitcast_convert_type",
}
# Of float32 numbers, relative to their spread.
_ROUNDING = 2e-6


def law_of(program: Program, leaf: int) -> Law | None:
    """The law of a leaf that the program of ``init`` returns; None where bits do not tell it."""
    if leaf in program.constants:
        return Law(0.0, 0.0, values=np.asarray(program.constants[leaf], np.float64))
    steps = _steps(program, leaf)
    if steps is None:
        return None
    bits, equations = steps
    return _law(program, bits, equations, leaf)


def _steps(program: Program, leaf: int) -> tuple[int, list[Equation]] | None:
    """The random bits that a leaf is made of, and how, entry by entry; else None."""
    producers = program.producers()
    size = program.avals[leaf].size
    needed, bits = {leaf}, set()
    equations: list[Equation] = []
    for place in sorted(_ancestors(program, producers, leaf), reverse=True):
        equation = program.equations[place]
        if needed.isdisjoint(equation.outputs):
            continue
        if equation.primitive == "random_bits":
            bits.add(equation.outputs[0])
            continue
        variable = [i for i in equation.inputs if i not in program.constants]
        known = equation.primitive in _ENTRY_BY_ENTRY
        if not known or any(program.avals[i].size != size for i in (*variable, *equation.outputs)):
            return None
        needed.update(variable)
        equations.append(equation)
    constants = {i for e in equations for i in e.inputs if i in program.constants}
    if len(bits) != 1 or any(np.ptp(np.asarray(program.constants[i])) for i in constants):
        return None
    return bits.pop(), equations[::-1]


def _ancestors(program: Program, producers: dict[int, int], leaf: int) -> set[int]:
    """The places of what a leaf is made of, down to random bits."""
    found: set[int] = set()
    pending = [leaf]
    while pending:
        place = producers.get(pending.pop())
        if place is None or place in found:
            continue
        found.add(place)
        if program.equations[place].primitive != "random_bits":
            pending += program.equations[place].inputs
    return found


def _law(program: Program, bits: int, equations: Sequence[Equation], leaf: int) -> Law:
    dtype = program.avals[bits].dtype
    number = {bits: 0}
    key: list[tuple[Equation, Any, Any]] = []
    scalars: list[Any] = []
    for equation in equations:
        if equation.primitive in SHAPES:
            number[equation.outputs[0]] = number[equation.inputs[0]]
            continue
        operands = []
        for i in equation.inputs:
            if i in program.constants:
                operands.append(("constant", len(scalars)))
                scalars.append(np.asarray(program.constants[i]).reshape(-1)[0])
            else:
                operands.append(("value", number[i]))
        number[equation.outputs[0]] = len(key) + 1
        key.append((equation, equation.signature, tuple(operands)))
    text = tuple((signature, operands) for _, signature, operands in key)
    function = _functions.setdefault((text, number[leaf], str(dtype)), _function(key, number[leaf]))
    width = np.dtype(dtype).itemsize * 8
    at = ((np.arange(_POINTS) + 0.5) / _POINTS * 2.0**width).astype(dtype)
    return _moments(np.asarray(function(at, tuple(scalars)), np.float64))


# Functions of bits that were compiled, by what they compute.
_functions: dict[Any, Callable[..., Any]] = {}


def _function(key: Sequence[Any], result: int) -> Callable[..., Any]:
    """The function of bits and constants that the steps compute, compiled."""
    steps = [(equation, operands) for equation, _, operands in key]

    @functools.partial(jax.jit)
    def of_bits(bits: Any, scalars: Sequence[Any]) -> Any:
        values = [bits]
        for equation, operands in steps:
            arguments = [
                values[n] if kind == "value" else jnp.full(bits.shape, scalars[n])
                for kind, n in operands
            ]
            values.append(equation.evaluate(*arguments)[0])
        return values[result]

    return of_bits


def _moments(x: np.ndarray) -> Law:
    """Mean and variance of what evenly spaced bits give."""
    from scipy.special import ndtri  # noqa: PLC0415 - SciPy is slow to import

    u = (np.arange(_POINTS) + 0.5) / _POINTS
    inner = slice(_POINTS // 64, -_POINTS // 64)
    for quantiles, variance, gaussian in ((ndtri(u), 1.0, True), (u - 0.5, 1 / 12, False)):
        z, y = quantiles[inner], x[inner]
        slope = np.dot(y - y.mean(), z) / np.dot(z, z)  # z is of mean 0
        if np.abs(y - y.mean() - slope * z).max() < _ROUNDING * abs(slope):
            mean = 0.0 if abs(y.mean()) < _ROUNDING * abs(slope) else float(y.mean())
            return Law(mean, float(slope**2 * variance), gaussian=gaussian)
    mean, deviation = float(x.mean()), float(x.std())
    mean = 0.0 if abs(mean) < 1e-5 * deviation else mean
    return Law(mean, float(np.mean((x - mean) ** 2)))
