"""Roots of a function of one variable: all of them over a range, and one within a bracket.

Every solver in gradflow for one real unknown is here: `sign_changes` brackets, `newton` polishes,
`bisect` needs no slope, `implicit` differentiates.

A `Valued` function returns its value, its slope and its size, the sum of the absolute values of the
terms that the value is a sum of: a value within rounding of its size counts as 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Roots", "Valued", "bisect", "implicit", "newton", "rounding", "sign_changes"]

# A function's value, slope and size.
Valued: TypeAlias = tuple[Array, Array, Array]

# The largest number of roots, and of extrema that may hold two more.
_ROOTS, _EXTREMA = 4, 2


def rounding(dtype: jnp.dtype) -> float:
    """Return the relative error of a number after a few dozen roundings."""
    return 64 * float(jnp.finfo(dtype).eps)


class Roots(NamedTuple):
    """Roots of a function, ascending, and its signs before and after each; signs 0 if unused.

    Where the signs are equal, it touches 0.
    """

    x: Float[Array, " roots"]
    before: Float[Array, " roots"]
    after: Float[Array, " roots"]
    first: Float[Array, ""]  # its sign at the low end
    last: Float[Array, ""]  # and at the high end
    neutral: Array  # whether it is 0 nearly everywhere


def sign_changes(function: Callable[[Array], Valued], points: Float[Array, " points"]) -> Roots:
    """Find the roots of a function, up to four, between points that are in ascending order.

    Between neighbours of equal sign, an extremum towards 0 is looked at too: it may touch 0, or
    cross it twice.
    """
    dtype = points.dtype
    value, slope, size = jax.vmap(function)(points)
    noise = rounding(dtype)
    raw = jnp.where(value < -noise * size, -1.0, jnp.where(value <= noise * size, 0.0, 1.0))
    raw = jnp.where(jnp.isnan(value), 1, raw).astype(dtype)  # an overflow counts as large
    first = raw[jnp.argmax(raw != 0)]
    sign = jnp.where(raw == 0, first, raw)

    crossing = _first_indices(sign[:-1] * sign[1:] < 0, _ROOTS)
    left, right = points[:-1], points[1:]
    low, high, before, after = (
        jnp.where(crossing < 0, jnp.asarray(unused, dtype), values[crossing])
        for values, unused in (
            (left, points[-1]),
            (right, points[-1]),
            (sign[:-1], 0),
            (sign[1:], 0),
        )
    )
    # An extremum in between touches 0, or is beyond it and has a root on either side.
    inside = (raw[:-1] * raw[1:] > 0) & (raw[:-1] * slope[:-1] < 0) & (raw[1:] * slope[1:] > 0)
    index = _first_indices(inside, _EXTREMA)
    start, end, around = left[index], right[index], raw[:-1][index]
    steps = int(jnp.finfo(dtype).nmant)
    begin_rising = jnp.sign(slope[:-1][index])
    bracket = bisect(
        lambda x: jnp.sign(jax.vmap(function)(x)[1]) != begin_rising, start, end, steps=steps
    )
    flat = (bracket[0] + bracket[1]) / 2
    height, _, size = jax.vmap(function)(flat)
    height *= around
    small = noise * size
    touches, crosses = ((index >= 0) & h for h in (jnp.abs(height) <= small, height < -small))
    lows = [low, jnp.where(touches, flat, start), jnp.where(crosses, flat, points[-1])]
    highs = [high, flat, end]
    befores = [before, jnp.where(touches | crosses, around, 0), jnp.where(crosses, -around, 0)]
    afters = [after, jnp.where(touches, around, jnp.where(crosses, -around, 0))]
    afters += [jnp.where(crosses, around, 0)]
    low, high, before, after = (jnp.concatenate(x) for x in (lows, highs, befores, afters))

    order = jnp.argsort(jnp.where(before == 0, points[-1] + 1, low))[:_ROOTS]
    low, high, before, after = (x[order] for x in (low, high, before, after))
    root = jax.vmap(functools.partial(newton, function))(low, high, before)
    return Roots(root, before, after, first, sign[-1], jnp.mean(raw == 0) > 0.9)


def _first_indices(mask: Array, count: int) -> Int[Array, " count"]:
    """Return the first indices where a mask holds, -1 where there are no more."""
    index, last, indices = jnp.arange(mask.size), jnp.asarray(-1), []
    for _ in range(count):
        later = mask & (index > last)
        exists = jnp.any(later)
        last = jnp.where(exists, jnp.argmax(later), mask.size)
        indices.append(jnp.where(exists, last, -1))
    return jnp.stack(indices)


def bisect(
    beyond: Callable[[Float[Array, "*n"]], Bool[Array, "*n"]],
    low: Float[Array, "*n"],
    high: Float[Array, "*n"],
    *,
    steps: int,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Halve a bracket of the change from ``beyond`` false to true, ``steps`` times; elementwise.

    Where the condition changes more than once, that of one of the changes; where it is true or
    false throughout, the lower or the upper end.
    """

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        past = beyond(middle)
        return jnp.where(past, ends[0], middle), jnp.where(past, middle, ends[1])

    return jax.lax.fori_loop(0, steps, halve, (low, high))


class _Bracket(NamedTuple):
    low: Float[Array, ""]
    high: Float[Array, ""]
    x: Float[Array, ""]
    step: Float[Array, ""]
    iterations: Int[Array, ""]


def newton(
    function: Callable[[Array], Valued],
    low: Array,
    high: Array,
    sign: Array,
    start: Array | None = None,
) -> Array:
    """Return the root of a function in a bracket, whose sign at the low end is ``sign``.

    Newton's method, from the middle or from ``start``; where that leaves the bracket, or slows
    down, bisection.
    """
    eps = 2 * jnp.finfo(low.dtype).eps
    small = eps**0.6

    def busy(state: _Bracket) -> Array:
        moving = jnp.abs(state.step) > eps * jnp.maximum(jnp.abs(state.x), 1)
        return moving & (state.low < state.high) & (state.iterations < 100)

    def improve(state: _Bracket) -> _Bracket:
        x = state.x
        value, slope, size = function(x)
        right = jnp.sign(value) == sign
        low, high = jnp.where(right, x, state.low), jnp.where(right, state.high, x)
        new = x - value / jnp.where(slope == 0, 1, slope)
        slow = jnp.abs(new - x) > jnp.abs(state.step) / 2
        # Steps that small, and no longer smaller, are rounding errors: this one is the last.
        arrived = slow & (jnp.abs(state.step) < small * jnp.maximum(jnp.abs(x), 1))
        arrived &= (jnp.abs(new - x) <= jnp.abs(state.step)) & (slope != 0)
        usable = (new > low) & (new < high) & (slope != 0) & ~slow
        last = jnp.where(value == 0, x, jnp.clip(new, low, high))
        done = arrived | (jnp.abs(value) <= eps * size)
        new = jnp.where(done, last, jnp.where(usable, new, (low + high) / 2))
        step = jnp.where(done, 0, new - x)
        return _Bracket(low, high, new, step, state.iterations + 1)

    first = (low + high) / 2 if start is None else start
    bracket = _Bracket(low, high, first, high - low, jnp.zeros((), int))
    return jax.lax.while_loop(busy, improve, bracket).x


def implicit(equation: Callable[[Any, Array], Array], theta: Any, root: Array) -> Array:
    """Return a root x of equation(θ, x) = 0 as it is, but with its derivatives by θ."""
    return jax.lax.custom_root(
        functools.partial(equation, theta),
        root,
        solve=lambda _, guess: guess,
        tangent_solve=lambda linear, y: y / linear(jnp.ones_like(y)),
    )
