"""Composites of elementwise functions as activations: recognised, or with their kinks."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow import activations
from gradflow._programs import Float64Program
from gradflow.activations import Activation
from gradflow.inspection._theory.nodes import Node, constant
from gradflow.inspection._theory.sums import NoRule, absolute

__all__ = ["activation_of"]

# Points at which functions are compared, and the relative difference of what is the same.
_PROBES = np.concatenate([-(2.0 ** np.arange(-9, 4.1, 0.37)), 2.0 ** np.arange(-9, 4.1, 0.41)])
_SAME = 1e-12
# Of functions whose constants a model in float32 has rounded.
_ROUNDED = 1e-6
# Where kinks are searched, between neighbours of which there is one at most.
_HALF = np.concatenate([np.arange(1, 2048) / 64, 2.0 ** np.arange(5, 13, 0.125)])
_GRID = np.concatenate([-_HALF[::-1], [0.0], _HALF])
# Not smooth where its arguments are equal, where its argument is 0, and where it switches.
_EQUAL = frozenset({"max", "min", "gt", "ge", "lt", "le", "eq", "ne"})
_AT_ZERO = frozenset({"abs", "sign"})
# Steps, at whole numbers and this more; how many there may be, where they are looked for.
_STEPS = {"floor": 0.0, "ceil": 0.0, "round": 0.5}
_MOST_STEPS, _REACH = 512, 16.0


@functools.lru_cache(maxsize=1 << 12)
def activation_of(node: Node, numbers: tuple[float, ...] = ()) -> Activation:
    """A function of one variable as an activation, one of gradflow's where it is the same.

    Those have closed forms and derivatives without loss of digits.
    """

    def function(x: Any) -> Any:
        x = jnp.asarray(x)
        return jnp.broadcast_to(node.evaluate((x,), numbers), x.shape)

    with jax.enable_x64(True):
        ((values, slopes),) = _at_probes(function)
        tolerance = _ROUNDED if _in_float32(node) else _SAME
        for phi, others in _known():
            if _same(values, others[0], tolerance) and _same(slopes, others[1], tolerance):
                return phi
        if (linear := _piecewise_linear(values, slopes)) is not None:
            return linear
        return Activation("composite", function, kinks=_kinks(node, numbers))


_Function = Callable[[Any], Any]


def _at_probes(*functions: _Function) -> list[tuple[np.ndarray, np.ndarray]]:
    """The values and slopes of functions at the probes, as one program."""
    return list(Float64Program(_with_slopes, (_PROBES,), 0.01, functions=functions)(_PROBES))


def _with_slopes(x: Array, functions: tuple[_Function, ...]) -> list[tuple[Array, Array]]:
    return [jax.jvp(function, (x,), (jnp.ones_like(x),)) for function in functions]


@functools.cache
def _known() -> tuple[tuple[Activation, tuple[np.ndarray, np.ndarray]], ...]:
    found = _at_probes(*(phi.function for phi in activations.ALL))
    return tuple(zip(activations.ALL, found, strict=True))


def _same(values: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    return np.allclose(values, other, rtol=tolerance, atol=tolerance * 1e-3)


def _in_float32(node: Node) -> bool:
    """Whether all constants are numbers of float32."""
    if node.kind == "constant":
        return float(np.float32(node.value)) == node.value
    return all(map(_in_float32, node.children))


def _piecewise_linear(values: np.ndarray, slopes: np.ndarray) -> Activation | None:
    """A function a x for x > 0 and b x for x < 0."""
    above = _PROBES > 0
    a, b = float(slopes[above][0]), float(slopes[~above][0])
    if not np.array_equal(slopes, np.where(above, a, b)) or not np.isfinite([a, b]).all():
        return None
    if not np.allclose(values, slopes * _PROBES, rtol=4e-16, atol=0) or not a:
        return None
    phi = activations.leaky_relu(b / a)
    return phi if a == 1 else phi.scaled(a, 1.0, f"{a:g} {phi.name}")


def _kinks(node: Node, numbers: tuple[float, ...]) -> tuple[float, ...]:
    """Points where the function, or a derivative, is not smooth."""
    found: set[float] = set()
    seen: set[Node] = set()

    def visit(one: Node) -> None:
        if one in seen:
            return
        seen.add(one)
        for child in one.children:
            visit(child)
        name = getattr(getattr(one.value, "equation", None), "primitive", "")
        children = one.children
        if name in _EQUAL:
            found.update(_roots(numbers, children[0], children[1]))
        elif name in _AT_ZERO or one.value is absolute:
            found.update(_roots(numbers, children[0], constant(0.0)))
        elif name in _STEPS:
            found.update(_steps(numbers, children[0], _STEPS[name]))
        elif name == "clamp":
            for end in (children[0], children[2]):
                found.update(_roots(numbers, children[1], end))

    visit(node)
    return tuple(sorted(found))


def _steps(numbers: tuple[float, ...], one: Node, offset: float) -> list[float]:
    """Points x, up to 16, at which a function passes a step."""
    near = _GRID[np.abs(_GRID) <= _REACH]
    values = np.asarray(one.evaluate((jnp.asarray(near),), numbers), float)
    steps = np.arange(math.floor(values.min() - offset), values.max() - offset + 1) + offset
    if len(steps) > _MOST_STEPS:
        raise NoRule(f"a function of {len(steps)} steps, more than {_MOST_STEPS}")
    return [x for step in steps for x in _roots(numbers, one, constant(float(step)))]


def _roots(numbers: tuple[float, ...], one: Node, other: Node) -> list[float]:
    """Points x at which two functions are equal."""

    def difference(x: np.ndarray) -> np.ndarray:
        a, b = (
            np.asarray(node.evaluate((jnp.asarray(x),), numbers), float) for node in (one, other)
        )
        return np.broadcast_to(a - b, x.shape)

    x = _GRID
    sign = np.sign(difference(x))
    found = list(x[(sign == 0) & (np.roll(sign, 1) != 0)])
    low, high = x[:-1], x[1:]
    (at,) = np.nonzero(sign[:-1] * sign[1:] < 0)
    low, high, start = low[at], high[at], sign[at]
    for _ in range(60 if at.size else 0):
        middle = (low + high) / 2
        below = np.sign(difference(middle)) == start
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return [float(root) for root in [*found, *high]]
