"""Roots of a function of one variable: all of them over a range, and one within a bracket.

A function returns its value, its slope and its size, the sum of the absolute values of the terms
that the value is a sum of: what counts as 0 is a value of rounding errors of that.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["Roots", "Valued", "implicit", "newton", "rounding", "sign_changes"]

# A function's value, slope and size.
Valued: TypeAlias = tuple[Array, Array, Array]

# As many roots are looked for, and extrema that may hold two.
_ROOTS, _EXTREMA = 4, 2


def rounding(dtype: jnp.dtype) -> float:
    """Return what counts as rounding in a number of order 1."""
    return 64 * float(jnp.finfo(dtype).eps)


class Roots(NamedTuple):
    """Where a function changes sign, ascending, and its signs before and after; 0 if unused.

    Where the signs are equal, it touches 0.
    """

    place: Float[Array, " roots"]
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
    raw = jnp.where(jnp.isnan(value), 1, raw).astype(dtype)  # what overflowed is large
    first = raw[jnp.argmax(raw != 0)]
    sign = jnp.where(raw == 0, first, raw)

    crossing = _first_places(sign[:-1] * sign[1:] < 0, _ROOTS)
    left, right = points[:-1], points[1:]
    low, high, before, after = (
        jnp.where(crossing < 0, jnp.asarray(other, dtype), x[crossing])
        for x, other in ((left, points[-1]), (right, points[-1]), (sign[:-1], 0), (sign[1:], 0))
    )
    # An extremum in between touches 0, or is beyond it and has a root on either side.
    inside = (raw[:-1] * raw[1:] > 0) & (raw[:-1] * slope[:-1] < 0) & (raw[1:] * slope[1:] > 0)
    place = _first_places(inside, _EXTREMA)
    start, end, around = left[place], right[place], raw[:-1][place]
    flat = jax.vmap(functools.partial(_bisect, lambda t: function(t)[1]))(start, end)
    height, _, size = jax.vmap(function)(flat)
    height *= around
    small = noise * size
    touches, crosses = ((place >= 0) & h for h in (jnp.abs(height) <= small, height < -small))
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


def _first_places(mask: Array, count: int) -> Int[Array, " count"]:
    """Return the first places where a mask holds, -1 where there are no more."""
    index, last, places = jnp.arange(mask.size), jnp.asarray(-1), []
    for _ in range(count):
        later = mask & (index > last)
        found = jnp.any(later)
        last = jnp.where(found, jnp.argmax(later), mask.size)
        places.append(jnp.where(found, last, -1))
    return jnp.stack(places)


def _bisect(function: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Return a sign change of a function between two places."""
    sign = jnp.sign(function(low))

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        right = jnp.sign(function(middle)) == sign
        return jnp.where(right, middle, ends[0]), jnp.where(right, ends[1], middle)

    low, high = jax.lax.fori_loop(0, int(jnp.finfo(low.dtype).nmant), halve, (low, high))
    return (low + high) / 2


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
    """Return the sign change of a function between two places, from ``sign`` at the low end.

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
    """Return a root x of equation(θ, x) = 0, with its derivatives by θ."""
    return jax.lax.custom_root(
        functools.partial(equation, theta),
        root,
        solve=lambda _, guess: guess,
        tangent_solve=lambda linear, y: y / linear(jnp.ones_like(y)),
    )
