"""Cotangents at unit scale beside the logarithms of their scales, of any size in float32."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

__all__ = ["Scaled", "added", "log_norm", "normalised", "plus", "relative", "spread", "stacked"]


class Scaled(NamedTuple):
    """An array that means exp(high + low) · unit, the largest |unit| 1.

    Attributes
    ----------
    unit
        The array; with an ``axis`` of sites each site's largest is 1.
    high, low
        The logarithm as a sum of two floats, shape (sites,), or (1,) where one scale is for all. Of
        an array of zeros it is -inf.
    """

    unit: Array
    high: Array
    low: Array


def _along(log: Array, x: Array, axis: int | None) -> Array:
    """Logarithms, (sites,) or (1,), in a shape that multiplies ``x``."""
    if axis is None or log.shape[0] == 1:
        return log.reshape((1,) * x.ndim)
    return log.reshape(tuple(-1 if i == axis else 1 for i in range(x.ndim)))


def plus(high: Array, low: Array, term: Array) -> tuple[Array, Array]:
    """Add to a sum of two floats, with the rounding error carried along (Knuth's two-sum)."""
    term = low + term
    new = high + term
    part = new - high
    error = (high - (new - part)) + (term - part)
    return new, jnp.where(jnp.isfinite(new), error, 0)


def normalised(x: Array, high: Array, low: Array, axis: int | None) -> Scaled:
    """The array exp(high + low) · x at unit scale."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    others = tuple(i for i in range(x.ndim) if i != axis)
    peak = jnp.max(jnp.abs(wide), axis=others, keepdims=True, initial=0)
    scale = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    term = jnp.where(peak == 0, -jnp.inf, jnp.log(scale)).reshape(-1)
    # Each factor of the two roots is in range where the reciprocal of the scale may not be.
    root = jnp.sqrt(scale)
    return Scaled((wide / root / root).astype(x.dtype), *plus(high, low, term))


def relative(part: Scaled, axis: int | None) -> tuple[Array, Array, Array]:
    """The array at one scale for all sites, and that scale's logarithm."""
    largest = jnp.argmax(part.high)
    high, low = part.high[largest][None], part.low[largest][None]
    finite = jnp.where(jnp.isfinite(high), high, 0)
    factor = jnp.exp((part.high - finite) + (part.low - low))
    return _times(part.unit, _along(factor, part.unit, axis)), high, low


def _times(x: Array, factor: Array) -> Array:
    return (x.astype(jnp.promote_types(x.dtype, factor.dtype)) * factor).astype(x.dtype)


def added(parts: list[Scaled], axis: int | None) -> Scaled:
    """The sum of arrays, at the scale of the largest; the units may be of any size."""
    sites = 1 if axis is None else max(part.high.shape[0] for part in parts)
    parts = [_of_sites(part, sites) for part in parts]
    if len(parts) == 1:
        return normalised(*parts[0], axis)
    high, low = _largest(parts)
    total = functools.reduce(jnp.add, [_at(part, high, low, axis) for part in parts])
    return normalised(total, high, low, axis)


def stacked(parts: list[Scaled | None], axis: int | None) -> Scaled:
    """Arrays put together along a new axis 0, at the scale of the largest; None are zeros."""
    some = [part for part in parts if part is not None]
    sites = 1 if axis is None else max(part.high.shape[0] for part in some)
    high, low = _largest([_of_sites(part, sites) for part in some])
    inner = None if axis is None else axis - 1
    zeros = jnp.zeros_like(some[0].unit)
    arrays = [
        zeros if part is None else _at(_of_sites(part, sites), high, low, inner) for part in parts
    ]
    return normalised(jnp.stack(arrays), high, low, axis)


def spread(part: Scaled, axis: int | None) -> tuple[Array, Array]:
    """The logarithm's two floats in a shape that the array's broadcasts to."""
    return _along(part.high, part.unit, axis), _along(part.low, part.unit, axis)


def _of_sites(part: Scaled, sites: int) -> Scaled:
    return Scaled(part.unit, jnp.broadcast_to(part.high, sites), jnp.broadcast_to(part.low, sites))


def _largest(parts: list[Scaled]) -> tuple[Array, Array]:
    """The largest of several scales, for each site; 0 where all arrays are zeros."""
    high, low = parts[0].high, parts[0].low
    for part in parts[1:]:
        larger = part.high > high
        high, low = jnp.where(larger, part.high, high), jnp.where(larger, part.low, low)
    return jnp.where(high == -jnp.inf, 0, high), low


def _at(part: Scaled, high: Array, low: Array, axis: int | None) -> Array:
    """The array in units of exp(high + low)."""
    factor = jnp.exp((part.high - high) + (part.low - low))
    return _times(part.unit, _along(factor, part.unit, axis))


def log_norm(part: Scaled) -> tuple[Array, Array]:
    """The log of the Frobenius norm of an array of one scale, as a sum of two floats, (1,)."""
    wide = part.unit.astype(jnp.promote_types(part.unit.dtype, jnp.float32))
    return plus(part.high, part.low, jnp.log(jnp.sum(jnp.square(wide)))[None] / 2)
