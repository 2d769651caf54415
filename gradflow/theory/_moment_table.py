"""E[φ²]/q, E[φ'²] and d/dq E[φ²] of an activation at every length q, and their limits.

They are analytic functions of log q in a strip of half-width π/2, for every φ, so a table at 16
Chebyshev nodes for each factor of 2 in q has all their digits. It does not depend on σ_w and σ_b.

Near 0 and far out most activations are φ(x) = a± x, with a slope on either side. All three averages
then tend to (a₊² + a₋²)/2, and the table has their distance from it: V(q)/q - 1, whose roots are
the fixed points, can be much smaller than the terms that it is a difference of. (SiLU at σ_w² = 2,
σ_b² = 0.01 has q* = 68889 and χ∥ = 1 - 7e-8.) Beyond the table this distance is a power of q.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow import gaussian
from gradflow._programs import program
from gradflow._roots import rounding
from gradflow.activations import Activation

__all__ = [
    "Averages",
    "Limit",
    "Table",
    "averages_at",
    "in_parts",
    "over_grid",
    "seconds_over_grid",
]

_Pytree = TypeVar("_Pytree")

# Panels of one factor of 2 in q, with Chebyshev nodes; the first one that has a limit at infinity.
_LOWEST, _HIGHEST, _ORDER = -60, 64, 16
_UPPER = -_LOWEST
# Roots are bracketed between points, so many to a factor of 2 in q. At GELU's half-stable point
# V(q)/q - 1 has a root, a minimum of -2e-6 and a maximum of 0 within a quarter of that. Beyond
# 2^±64 everything is a power of q, and a point each 8 factors of 2 is enough.
_SCAN, _COARSE = 8, 8
# Points x at which slopes are taken, near 0 and far out; round ones might be periods of φ.
_NEAR = (2.13e-20, 3.71e-24, 1.37e-27, 1.91e-30)
_FAR = (1.137e8, 7.391e9, 5.113e11, 2.731e13)
# Points of a grid at once: each takes 80 kB.
_MOST_AT_ONCE = 4096
# The largest relative error of an average from which a limit is read.
_DIGITS = 1e-9
# The largest factor by which an average may grow within a panel.
_STEEPEST = 2.0**12
# Panels from one average to the next of those that a limit is read from: factors of 4 in q.
_APART = 2


class Limit(NamedTuple):
    """Limits of φ' and of averages as q goes to 0, or to infinity.

    ``above`` and ``below`` are the limits of φ'(x) for x > 0 and x < 0, NaN where there is none;
    the others are those of E[φ'²] and of d/dq E[φ²]: inf where it grows without limit, NaN where it
    has no limit, or none that the averages show.
    """

    above: Float[Array, ""]
    below: Float[Array, ""]
    dphi2: Float[Array, ""]
    gain: Float[Array, ""]

    @property
    def power(self) -> Float[Array, ""]:
        """(a₊² + a₋²)/2, or 0 where φ has no slopes there."""
        return jnp.nan_to_num((self.above**2 + self.below**2) / 2, nan=0.0)

    @property
    def bent(self) -> Array:
        """Whether the slopes on the two sides differ, so that correlations tend to 1."""
        size = jnp.abs(self.above) + jnp.abs(self.below)
        return jnp.abs(self.above - self.below) > rounding(size.dtype) * size


class Averages(NamedTuple):
    """E[φ²]/q, E[φ'²] and d/dq E[φ²] at one q: a limit, and how far each is from it."""

    limit: Float[Array, ""]
    ratio: Float[Array, ""]
    dphi2: Float[Array, ""]
    gain: Float[Array, ""]
    sizes: Float[
        Array, " 3"
    ]  # sums of the absolute terms of the three distances, for their rounding

    def excess(self, distance: Array, sigma_w2: Array) -> Array:
        """Return σ_w² times an average, less 1, from the average's distance from its limit."""
        return (sigma_w2 * self.limit - 1) + sigma_w2 * distance

    def excess_at_limit(self, sigma_w2: Array) -> Array:
        """Return |σ_w² · limit - 1|, a term of `excess`; 0 or nearly so where that is rounding."""
        straight = jnp.abs(sigma_w2 * self.limit - 1)
        noise = rounding(straight.dtype)
        return jnp.where(straight <= noise, straight / noise, straight)


class Table(NamedTuple):
    """The averages as Chebyshev series in log₂ q, less their limits, and the limits."""

    coefficients: Float[Array, "panels order 3"]
    limits: Float[Array, " panels"]  # the series are distances from them
    error: Float[Array, " panels"]  # estimated, of E[φ²]/q
    powers: Float[Array, "2 3"]  # of q, to which the distances are proportional beyond either end
    square_at_zero: Float[Array, ""]  # φ(0)²
    zero: Limit
    infinity: Limit

    @classmethod
    def of(cls, activation: Activation, dtype: jnp.dtype) -> "Table":
        """Return the table of an activation, computed once unless parameters of φ are traced."""
        known, name = _known.setdefault(activation, {}), jnp.dtype(dtype).name
        if name not in known:
            table = _computed(activation, name)
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(table)):
                return table
            known[name] = jax.tree.map(np.asarray, table)
        return jax.tree.map(jnp.asarray, known[name])

    @staticmethod
    def scan(dtype: jnp.dtype) -> Array:
        """Return log q at the points between which roots are bracketed, in the table and beyond."""
        reach = 120 if dtype == jnp.float32 else 1016
        inside = np.arange(_LOWEST * _SCAN, _HIGHEST * _SCAN + 1) / _SCAN
        low = np.arange(-reach, _LOWEST, _COARSE)
        high = np.arange(_HIGHEST + _COARSE, reach + 1, _COARSE)
        return jnp.asarray(np.concatenate([low, inside, high]) * np.log(2.0), dtype)

    def _panel(self, log: Array) -> Array:
        return jnp.clip(jnp.floor(jax.lax.stop_gradient(log)), _LOWEST, _HIGHEST - 1)

    @jax.jit  # it is traced once for all that a program asks of it
    def at(self, q: Float[Array, ""]) -> Averages:
        """Return the averages at a length."""
        log = jnp.log2(q)
        inside = jnp.clip(log, _LOWEST, _HIGHEST)
        panel = self._panel(inside)
        index = (panel - _LOWEST).astype(int)
        series = self.coefficients[index]
        x = 2 * (inside - panel) - 1
        # Clenshaw's recurrence
        b1 = b2 = jnp.zeros(3, series.dtype)
        for k in range(_ORDER - 1, 0, -1):
            b1, b2 = series[k] + 2 * x * b1 - b2, b1
        value = series[0] + x * b1 - b2
        power = jnp.where(log < _LOWEST, self.powers[0], self.powers[1])
        further = jnp.exp2(power * (log - inside))
        value *= further
        # The last terms are as large as those left out, which count as rounding errors.
        left_out = jnp.sum(jnp.abs(series[-2:]), axis=0) / rounding(series.dtype)
        sizes = (jnp.sum(jnp.abs(series), axis=0) + 4 * left_out) * further
        return Averages(self.limits[index], value[0], value[1], value[2], sizes)

    def error_at(self, q: Float[Array, ""]) -> Array:
        """Return the estimated error of E[φ²]/q."""
        log = jnp.log2(q)
        here = self.at(q)
        # Beyond the table the next term is smaller by √q, or 1/√q, at its end.
        beyond = jnp.where(log > _HIGHEST, 2.0 ** (-_HIGHEST / 2), 2.0 ** (_LOWEST / 2))
        inside = (log >= _LOWEST) & (log <= _HIGHEST)
        index = (self._panel(log) - _LOWEST).astype(int)
        eps = 16 * jnp.finfo(q.dtype).eps
        share = jnp.where(inside, eps, jnp.maximum(eps, beyond))
        return jnp.where(inside, self.error[index], 0) + share * here.sizes[0]


def over_grid(function: Callable[..., _Pytree], *grids: Array) -> _Pytree:
    """Apply a function of scalars at every point of grids of one shape."""
    return in_parts(jax.vmap(function), *grids)


def in_parts(function: Callable[..., _Pytree], *grids: Array) -> _Pytree:
    """Apply a function of arrays of one axis to grids of one shape, part after part."""
    shape, points = grids[0].shape, grids[0].size
    flat = [grid.reshape(-1) for grid in grids]
    if points <= _MOST_AT_ONCE:
        out = function(*flat)
    else:
        parts = -(-points // _MOST_AT_ONCE)
        each = -(-points // parts)
        padded = (jnp.pad(values, (0, parts * each - points), mode="edge") for values in flat)
        stacked = tuple(values.reshape(parts, each) for values in padded)
        of_parts = jax.lax.map(lambda part: function(*part), stacked)
        out = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:points], of_parts)
    return jax.tree.map(lambda leaf: leaf.reshape(shape + leaf.shape[1:]), out)


def seconds_over_grid(activation: Activation, grid: ArrayLike, *_: ArrayLike) -> float:  # noqa: ARG001
    """How long a function takes at every point of a grid, in seconds of one core."""
    return 6e-5 * np.size(grid)


def averages_at(activation: Activation, table: Table, q: Float[Array, ""]) -> Averages:
    """Return the averages at a length, in closed form where that has more digits than the table.

    A series in log q has an absolute error of rounding, and those of sin and cos fall off like
    exp(-2q).
    """
    near = table.at(q)
    closed = {
        "dphi2": lambda: gaussian.moment(activation, "dphi2", q),
        "x_phi_dphi": lambda: gaussian.moment(activation, "x_phi_dphi", q) / q,
    }
    dphi2, gain = (
        jnp.where(near.limit == 0, form(), value) if name in activation.moments else value
        for (name, form), value in zip(closed.items(), (near.dphi2, near.gain), strict=True)
    )
    return near._replace(dphi2=dphi2, gain=gain)


def _limit(slopes: Float[Array, "2 4"], averages: Float[Array, "4 3"], certain: Array) -> Limit:
    """Return the limit from φ' at four points on either side, and averages at four q.

    The last is the furthest; ``certain`` is whether the averages' quadrature resolves φ there.
    """
    noise = rounding(slopes.dtype)
    size = jnp.sqrt(jnp.max(jnp.abs(averages[:, 1])))
    size = jnp.where(jnp.isfinite(size), size, 0)
    away = jnp.max(jnp.abs(slopes - slopes[:, -1:]), axis=1)
    same = away <= noise * (jnp.abs(slopes[:, -1]) + size)
    above, below = jnp.where(same, slopes[:, -1], jnp.nan)
    straight = (above**2 + below**2) / 2
    limits = jnp.stack([_limit_of(averages[:, 1], certain), _limit_of(averages[:, 2], certain)])
    dphi2, gain = jnp.where(jnp.isnan(straight), limits, straight)
    return Limit(above, below, dphi2, gain)


def _limit_of(values: Float[Array, " 4"], certain: Array) -> Array:
    """Return the limit of a sequence from four values, inf or NaN as in `Limit`."""
    steps = jnp.diff(values)
    size = jnp.max(jnp.abs(values))
    digits = _DIGITS if values.dtype == jnp.float64 else 1e3 * _DIGITS
    still = jnp.max(jnp.abs(steps)) <= 10 * digits * size
    shrinking = jnp.all(jnp.abs(steps[1:]) <= 0.6 * jnp.abs(steps[:-1]))
    # Aitken's extrapolation of steps that shrink by a factor.
    bend = steps[2] - steps[1]
    limit = values[3] - steps[2] ** 2 / jnp.where(bend == 0, 1, bend)
    limit = jnp.where(jnp.abs(limit) < 1e-3 * jnp.abs(values[3]), 0, limit)
    overflow = ~jnp.isfinite(values[3])
    grows = overflow | (certain & jnp.all(steps > 0) & ~shrinking & ~still)
    return jnp.select(
        [grows, certain & shrinking, certain & still], [jnp.inf, limit, values[3]], jnp.nan
    )


_known: weakref.WeakKeyDictionary[Activation, dict[str, Table]] = weakref.WeakKeyDictionary()


@program("activation", "dtype")
def _computed(activation: Activation, dtype: str) -> Table:
    angles = (np.arange(_ORDER) + 0.5) * np.pi / _ORDER
    middles = np.arange(_LOWEST, _HIGHEST) + 0.5
    q = jnp.asarray(2.0 ** (middles[:, None] + np.cos(angles) / 2), dtype)
    middle = _ORDER // 2
    near, far = (
        jnp.stack([activation.derivative(sign * jnp.asarray(x, dtype)) for sign in (1, -1)])
        for x in (_NEAR, _FAR)
    )
    # The furthest slopes are as good as any to compare with, if there are none.
    lines = jnp.repeat(
        jnp.stack([near[:, -1], far[:, -1]]),
        np.array([_UPPER, _HIGHEST]),
        axis=0,
        total_repeat_length=len(q),
    )

    # One panel after another, each again going backward: all at once take 14 GB to differentiate.
    @jax.checkpoint
    def of_panel(panel: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        return _averages(activation, *panel)

    averages, errors = jax.lax.map(of_panel, (q, lines[:, 0], lines[:, 1]))
    raw, distances = averages[..., :3], averages[..., 3:]
    closed = ("phi2", "dphi2", "x_phi_dphi")
    for column, name in enumerate(closed):
        if name in activation.moments:
            exact = gaussian.moment(activation, name, q)
            raw = raw.at[..., column].set(exact if name == "dphi2" else exact / q)
            errors = errors.at[..., column].set(0)
    # An average that grows faster than any power is as good as infinite from there on.
    ratios = jnp.abs(raw[..., 0])
    growth = jnp.max(ratios, axis=1) / jnp.min(ratios, axis=1)
    lost = ~jnp.all(jnp.isfinite(raw), axis=(1, 2)) | (growth > _STEEPEST)
    lost = jnp.cumsum(lost & (jnp.arange(len(q)) >= _UPPER)) > 0
    raw = jnp.where(lost[:, None, None], jnp.nan, raw)

    digits = _DIGITS if q.dtype == jnp.float64 else 1e3 * _DIGITS
    certain = jnp.all(errors[:, middle, :3] <= digits * jnp.abs(raw[:, middle, :1]), axis=1)
    certain |= lost
    last = jnp.sum(jnp.cumsum(~certain[_UPPER:]) == 0) + _UPPER - 1
    zero, infinity = (
        _limit(slopes, raw[panels, middle], sure)
        for slopes, panels, sure in (
            (near, np.arange(3, -1, -1) * _APART, jnp.all(certain[: 3 * _APART + 1])),
            (far, last - np.arange(3, -1, -1) * _APART, last >= _UPPER + 3 * _APART),
        )
    )
    origin = activation(jnp.zeros((), dtype)) ** 2
    zero = zero._replace(gain=jnp.where(origin == 0, zero.gain, jnp.nan))
    # Where there is no limit, or it is 0, the averages themselves, in closed form if they are.
    straight = jnp.stack([jnp.where(origin == 0, zero.power, 0), infinity.power])
    limits = jnp.repeat(straight, np.array([_UPPER, _HIGHEST]), total_repeat_length=len(q))
    values = jnp.where(limits[:, None, None] > 0, distances, raw)
    error = jnp.where(limits > 0, errors[:, middle, 3], errors[:, middle, 0])

    to_series = np.cos(np.arange(_ORDER)[:, None] * angles) * (2 / _ORDER)
    to_series[0] /= 2
    coefficients = jnp.einsum(
        "kj,pjm->pkm", jnp.asarray(to_series, dtype), values, precision="highest"
    )
    # A series that has not converged shows it in its last coefficients.
    error += jnp.abs(coefficients[:, -2, 0]) + jnp.abs(coefficients[:, -1, 0])
    powers = jnp.stack([_power(values[0], values[1]), _power(values[-2], values[-1])])
    return Table(coefficients, limits, error, powers, origin, zero, infinity)


def _averages(
    activation: Activation, q: Float[Array, " order"], above: Array, below: Array
) -> tuple[Float[Array, "order 6"], Float[Array, "order 6"]]:
    """Return the three averages at each q, the same less those of a± x, and their errors."""
    nodes, weights = np.polynomial.legendre.leggauss(3)
    rule = list(zip(((1 + nodes) / 2).tolist(), (weights / 2).tolist(), strict=True))
    eps = 8 * jnp.finfo(q.dtype).eps

    def rows(x: Array) -> Array:
        value, slope = activation(x), activation.derivative(x)
        side = jnp.where(x < 0, below, above)
        line = side * x
        # Near 0 φ - a x = x² ∫ (1 - t) φ''(t x) dt, taken where it is the difference to rounding.
        bends = [(t, weight * activation.second_derivative(t * x)) for t, weight in rule]
        of_slope = sum((bend for _, bend in bends), jnp.zeros_like(x)) * x
        of_value = sum(((1 - t) * bend for t, bend in bends), jnp.zeros_like(x)) * x**2
        direct, direct_slope = value - line, slope - side
        same = jnp.abs(of_value - direct) <= eps * (jnp.abs(value) + jnp.abs(line))
        same_slope = jnp.abs(of_slope - direct_slope) <= eps * (jnp.abs(slope) + jnp.abs(side))
        near = jnp.abs(x) < 1
        off = jnp.where(near & same, of_value, direct)
        off_slope = jnp.where(near & same_slope, of_slope, direct_slope)
        return jnp.stack(
            [
                value**2,
                slope**2,
                x * value * slope,
                off * (value + line),
                off_slope * (slope + side),
                x * (off * slope + line * off_slope),
            ]
        )

    averages, errors = gaussian.expectation_with_error(rows, q, kinks=activation.kinks)
    unit = jnp.stack([q, jnp.ones_like(q), q, q, jnp.ones_like(q), q])
    return (averages / unit).T, (errors / unit).T


def _power(before: Float[Array, "order 3"], after: Float[Array, "order 3"]) -> Array:
    """Return the power of q that averages go as, from two panels a factor of 2 apart."""
    low, high = before[_ORDER // 2], after[_ORDER // 2]
    known = (low * high > 0) & jnp.isfinite(low) & jnp.isfinite(high)
    power = jnp.log2(jnp.where(known, high / jnp.where(known, low, 1), 1))
    # Most are multiples of 1/2, but for the next term.
    whole = jnp.round(2 * power) / 2
    return jax.lax.stop_gradient(jnp.where(jnp.abs(power - whole) < 1e-6, whole, power))
