"""Where signals settle: the fixed points of the length and correlation maps, and depth scales.

The second moment q^l of the pre-activations follows the length map V(q) = σ_w² E[φ²] + σ_b², and
the correlation of two inputs, at a fixed length, the correlation map
C(c) = (σ_w² E[φ(u) φ(v)] + σ_b²)/q. Near a fixed point both approach exponentially, and squared
gradients change by χ₁ a layer (Poole et al. 2016, arXiv:1606.05340; Schoenholz et al. 2017,
arXiv:1611.01232):

    χ∥ = V'(q*),            ξ_q = -1/log χ∥
    χ₁ = σ_w² E[φ'²],       ξ_∇ = -1/log χ₁      (< 0: gradients grow on the way down)
    χ_c = C'(c*),           ξ_c = -1/log χ_c

How it is computed. E[φ²] and E[φ'²] are analytic functions of log q in a strip of half-width π/2,
whatever φ is, so a table at 16 Chebyshev nodes for each factor of 2 in q has all their digits. The
table does not depend on σ_w and σ_b: a grid of a million points shares one. All roots between
q = 2^-60 and 2^40 are found on it. The correlation map is a power series in c with coefficients
>= 0, those of φ in Hermite polynomials, so it has at most one fixed point in [0, 1) besides c = 1:
one where χ₁ > 1, none elsewhere (Poole et al. 2016). Derivatives follow from the implicit function
theorem, to any order.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from gradflow import activations, gaussian
from gradflow.activations import Activation
from gradflow.arguments import as_numbers
from gradflow.errors import InputError, check_scale, unknown_name

__all__ = ["Analysis", "LengthFixedPoints", "Stability", "Status", "analyse", "correlation"]
__all__ += ["depth_scale", "length", "representable_depth", "trainable_depth"]

_Pytree = TypeVar("_Pytree")

# Panels of one factor of 2 in q, with Chebyshev nodes.
_LOWEST, _HIGHEST, _ORDER = -60, 40, 16
# As many positive fixed points are looked for, and extrema of V(q)/q - 1 that may hold two.
_ROOTS, _EXTREMA = 4, 2
# Roots are looked for between points this many to a factor of 2 in q. At GELU's half-stable point
# V(q)/q - 1 has a root, a minimum of -2e-6 and a maximum of 0 within a quarter of that.
_SCAN = 8


class Stability(enum.IntEnum):
    """What a fixed point of the length map does to what is near it."""

    ABSENT = 0
    STABLE = 1
    UNSTABLE = 2
    MARGINAL = 3  # χ∥ = 1, and attracts: slower than exponentially
    MARGINAL_UNSTABLE = 4  # χ∥ = 1, and repels
    HALF_STABLE = 5  # χ∥ = 1, attracts from one side and repels to the other


class Status(enum.IntEnum):
    """Where the length goes from a given start."""

    CONVERGES = 0
    ALGEBRAIC = 1  # to a fixed point with χ∥ = 1, slower than exponentially
    COLLAPSES = 2  # to q* = 0, exponentially
    COLLAPSES_ALGEBRAICALLY = 3
    DIVERGES = 4
    NEUTRAL = 5  # every q is a fixed point: it stays where it is
    OSCILLATES = 6  # about an unstable fixed point with χ∥ < -1
    OUT_OF_RANGE = 7  # to a q* > 0 below 2^-60, or beyond 2^40


class LengthFixedPoints(NamedTuple):
    """All fixed points of the length map; the last axis counts them, from the smallest.

    Places without a fixed point have stability ``ABSENT`` and are NaN.
    """

    q_star: Float[Array, "*grid points"]
    chi1: Float[Array, "*grid points"]  # σ_w² E[φ'²]
    chi_par: Float[Array, "*grid points"]  # χ∥ = V'(q*)
    xi_q: Float[Array, "*grid points"]  # in layers
    xi_grad: Float[Array, "*grid points"]  # in layers; < 0 where gradients explode
    stability: Int[Array, "*grid points"]  # a `Stability`


class Analysis(NamedTuple):
    """Where a signal settles, and how fast; NaN where it does not.

    Where an approach is algebraic, not exponential, its ξ is infinite and after l layers
    |q - q*| → amplitude · l^-exponent; and so 1 - c for two inputs. NaN elsewhere, and where no
    power of l describes it (hard_tanh at q* = 0: 1/log l).
    """

    status: Int[Array, "*grid"]  # a `Status`
    q_star: Float[Array, "*grid"]
    chi1: Float[Array, "*grid"]
    chi_par: Float[Array, "*grid"]
    c_star: Float[Array, "*grid"]
    chi_c: Float[Array, "*grid"]
    xi_q: Float[Array, "*grid"]  # ξ in layers
    xi_c: Float[Array, "*grid"]
    xi_grad: Float[Array, "*grid"]
    q_exponent: Float[Array, "*grid"]
    q_amplitude: Float[Array, "*grid"]
    c_exponent: Float[Array, "*grid"]
    c_amplitude: Float[Array, "*grid"]
    q_error: Float[Array, "*grid"]  # estimated, of q_star, absolute
    c_error: Float[Array, "*grid"]  # estimated, of c_star, absolute


def trainable_depth(xi: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return 6 |ξ|, the depth up to which networks were found to train, for ξ_c and for ξ_∇.

    Source: Schoenholz et al. 2017 (arXiv:1611.01232), section 5: a rule of thumb, not a law.
    """
    return 6 * jnp.abs(jnp.asarray(as_numbers("xi", xi, float)))


def representable_depth(
    chi: Float[ArrayLike, "..."], dtype: str = "float32"
) -> Float[Array, "..."]:
    """Return the depth at which a gradient leaves a float's range.

    A gradient of size 1 at the top has the size χ^{l/2} after l layers: below the smallest normal
    number where χ < 1, above the largest where χ > 1. A squared norm does so at half the depth.

    Parameters
    ----------
    chi
        χ₁, the factor of the mean squared gradient, > 0.
    dtype
        A float type's name: float16, bfloat16, float32, float64.

    Returns
    -------
    Array
        In layers, not rounded; inf at χ = 1, to rounding.

    Raises
    ------
    InputError
        If ``dtype`` is no float type.
    """
    try:
        limits = jnp.finfo(dtype)
    except (TypeError, ValueError):
        raise unknown_name("dtype", dtype, ("bfloat16", "float16", "float32", "float64")) from None
    check_scale("chi", chi)
    log = jnp.log(jnp.asarray(chi))
    limit = jnp.where(log < 0, math.log(float(limits.tiny)), math.log(float(limits.max)))
    critical = jnp.abs(log) <= _noise(log.dtype)
    return jnp.where(critical, jnp.inf, 2 * limit / jnp.where(critical, 1, log))


def depth_scale(chi: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return -1/log|χ| in layers: > 0 for decay, < 0 for growth, +inf at |χ| = 1 to rounding."""
    log = jnp.log(jnp.abs(chi))
    critical = jnp.abs(log) <= _noise(log.dtype)
    return jnp.where(critical, jnp.inf, -1 / jnp.where(critical, 1, log))


# The length map -----------------------------------------------------------------------------------


def length(
    activation: Activation, sigma_w2: ArrayLike, sigma_b2: ArrayLike = 0.0
) -> LengthFixedPoints:
    """Return all fixed points q* of the length map, with their stability.

    Parameters
    ----------
    activation
        φ; static under jit.
    sigma_w2, sigma_b2
        σ_w² (times 1/fan_in, the weights' variance) and σ_b², >= 0, of shapes that broadcast.

    Returns
    -------
    LengthFixedPoints
        Of the shape that they broadcast to, and one axis more. Fixed points beyond [2^-60, 2^40],
        other than 0, are not found. Where every q is one (ReLU at σ_w² = 2, σ_b² = 0) none is
        listed; `analyse` says so.

    Raises
    ------
    InputError
        If σ_w² or σ_b² is negative or not finite (seen outside jit only); if φ has no Gaussian
        moments.
    """
    activation = activations.get(activation)
    gaussian.check(activation)
    sigma_w2, sigma_b2 = _as_scales(sigma_w2, sigma_b2)
    return _length(activation, sigma_w2, sigma_b2)


def _as_scales(sigma_w2: ArrayLike, sigma_b2: ArrayLike) -> tuple[Array, Array]:
    """Return both as floats of one shape."""
    for name, value in (("sigma_w2", sigma_w2), ("sigma_b2", sigma_b2)):
        check_scale(name, value)
    try:
        sigma_w2, sigma_b2 = jnp.broadcast_arrays(jnp.asarray(sigma_w2), jnp.asarray(sigma_b2))
    except ValueError as error:
        raise InputError(
            f"sigma_w2 has shape {jnp.shape(sigma_w2)} and sigma_b2 {jnp.shape(sigma_b2)}; they "
            "are of shapes that broadcast to one"
        ) from error
    if not sigma_w2.size:
        raise InputError("sigma_w2 or sigma_b2 is empty; each is one number or more")
    dtype = jnp.promote_types(jnp.result_type(sigma_w2, sigma_b2), jnp.result_type(0.0))
    return sigma_w2.astype(dtype), sigma_b2.astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def _length(activation: Activation, sigma_w2: Array, sigma_b2: Array) -> LengthFixedPoints:
    table = Table.of(activation, sigma_w2.dtype)

    def one(sigma_w2: Array, sigma_b2: Array) -> LengthFixedPoints:
        found = _length_at(activation, table, sigma_w2, sigma_b2)
        present = found.stability != Stability.ABSENT
        q, chi1, chi_par, xi_q, xi_grad = (
            jnp.where(present, value, jnp.nan)
            for value in (
                found.q_star,
                found.chi1,
                found.chi_par,
                depth_scale(found.chi_par),
                depth_scale(found.chi1),
            )
        )
        order = jnp.argsort(~present, stable=True)
        return jax.tree.map(
            lambda leaf: leaf[order],
            LengthFixedPoints(q, chi1, chi_par, xi_q, xi_grad, found.stability),
        )

    return over_grid(one, sigma_w2, sigma_b2)


def over_grid(function: Callable[..., _Pytree], *grids: Array) -> _Pytree:
    """Apply a function of scalars at every point of grids of one shape."""
    shape = grids[0].shape
    out = jax.vmap(function)(*(grid.reshape(-1) for grid in grids))
    return jax.tree.map(lambda leaf: leaf.reshape(shape + leaf.shape[1:]), out)


def analyse(
    activation: Activation,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    *,
    start: ArrayLike = 1.0,
) -> Analysis:
    """Return where a signal of second moment ``start`` settles, and on which depth scales.

    Parameters
    ----------
    activation
        φ; static under jit.
    sigma_w2, sigma_b2
        σ_w² and σ_b², >= 0, of shapes that broadcast.
    start
        q of the first layer, > 0.

    Returns
    -------
    Analysis
        Of the shape that they broadcast to. Where the status is ``DIVERGES``, ``OSCILLATES`` or
        ``OUT_OF_RANGE``, all else is NaN. At q* = 0 of an activation that is not homogeneous,
        correlations are kept as they are: c* is NaN. A status is for length maps that increase, as
        all here but that of cos do; where a map decreases, that of the only fixed point.

    Raises
    ------
    InputError
        If σ_w² or σ_b² is negative, or ``start`` not above 0, or one not finite (seen outside jit
        only); if φ has no Gaussian moments.
    """
    activation = activations.get(activation)
    check_scale("start", start, positive=True)
    gaussian.check(activation)
    sigma_w2, sigma_b2 = _as_scales(sigma_w2, sigma_b2)
    start = jnp.asarray(start, sigma_w2.dtype)
    return _analyse(activation, *jnp.broadcast_arrays(sigma_w2, sigma_b2, start))


@functools.partial(jax.jit, static_argnums=0)
def _analyse(activation: Activation, sigma_w2: Array, sigma_b2: Array, start: Array) -> Analysis:
    table = Table.of(activation, sigma_w2.dtype)
    length = over_grid(functools.partial(_settled, activation, table), sigma_w2, sigma_b2, start)
    status, q, chi1, chi_par = length
    nowhere = unsettled(status)
    vanished = (q == 0) & ~nowhere
    usable = jnp.where(nowhere | vanished, 1, q)
    c_star, chi_c = _correlation(activation, usable, sigma_w2, sigma_b2, chi1)
    kept = vanished | (status == Status.NEUTRAL)
    c_star = jnp.where(kept, 1.0 if activation.homogeneous else jnp.nan, c_star)
    chi_c = jnp.where(kept, 1, chi_c)
    scales = (depth_scale(chi_par), depth_scale(chi_c), depth_scale(chi1))
    approaches = (
        *_approach_of_length(activation, table, status, q, sigma_w2),
        *_approach_of_correlation(activation, usable, sigma_w2, chi_c, vanished),
    )
    found = (q, chi1, chi_par, c_star, chi_c, *scales, *approaches)
    errors = _errors(table, Analysis(status, *found, q_error=q, c_error=q))
    values = (jnp.where(nowhere, jnp.nan, value) for value in (*found, *errors))
    return Analysis(status, *values)


def unsettled(status: Int[Array, "*grid"]) -> Array:
    """Return where a `Status` names no fixed point."""
    return (
        (status == Status.DIVERGES)
        | (status == Status.OSCILLATES)
        | (status == Status.OUT_OF_RANGE)
    )


class Table(NamedTuple):
    """E[φ²]/q, E[φ'²] and d/dq E[φ²] as Chebyshev series in log₂ q, and what they are at q = 0."""

    coefficients: Float[Array, "panels order 3"]
    at_zero: Float[Array, " 2"]  # E[φ²] and E[φ'²]
    error: Float[Array, " panels"]  # estimated, of E[φ²], relative

    @classmethod
    def of(cls, activation: Activation, dtype: jnp.dtype) -> "Table":
        angles = (np.arange(_ORDER) + 0.5) * np.pi / _ORDER
        middles = np.arange(_LOWEST, _HIGHEST) + 0.5
        q = jnp.asarray(2.0 ** (middles[:, None] + np.cos(angles) / 2), dtype)
        m = gaussian.some_moments(activation, ("phi2", "dphi2", "x_phi_dphi"), q)
        values = jnp.stack([m["phi2"] / q, m["dphi2"], m["x_phi_dphi"] / q], axis=-1)
        to_series = np.cos(np.arange(_ORDER)[:, None] * angles) * (2 / _ORDER)
        to_series[0] /= 2
        coefficients = jnp.einsum(
            "kj,pjm->pkm", jnp.asarray(to_series, dtype), values, precision="highest"
        )
        # Not by quadrature: here 0 is to be 0, and 1 to be 1. The slope is that on either side.
        beside = jnp.asarray([-1e-30, 1e-30], dtype)
        slopes = activation.derivative(beside)
        square, error = gaussian.expectation_with_error(
            lambda x: activation(x) ** 2, q[:, _ORDER // 2], kinks=activation.kinks
        )
        exact = "phi2" in activation.moments
        return cls(
            coefficients,
            jnp.stack([activation(jnp.zeros((), dtype)) ** 2, jnp.mean(slopes**2)]),
            jnp.zeros_like(error) if exact else error / square,
        )

    def at(self, q: Float[Array, ""]) -> tuple[Array, Array, Array]:
        """Return E[φ²]/q, E[φ'²] and d/dq E[φ²]; q beyond the table counts as its end."""
        log = jnp.clip(jnp.log2(q), _LOWEST, _HIGHEST)
        panel = jnp.clip(jnp.floor(jax.lax.stop_gradient(log)), _LOWEST, _HIGHEST - 1)
        series = self.coefficients[(panel - _LOWEST).astype(int)]
        x = 2 * (log - panel) - 1
        # Clenshaw's recurrence
        b1 = b2 = jnp.zeros(3, series.dtype)
        for k in range(_ORDER - 1, 0, -1):
            b1, b2 = series[k] + 2 * x * b1 - b2, b1
        value = series[0] + x * b1 - b2
        return value[0], value[1], value[2]


def slopes(
    activation: Activation, table: Table, q: Float[Array, " points"]
) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
    """Return E[φ'²] and d/dq E[φ²], in closed form where there is one.

    A series in log q has an absolute error of rounding, and those of sin and cos fall off like
    exp(-2q).
    """
    _, dphi2, slope = jax.vmap(table.at)(q)
    closed = activation.moments
    if "dphi2" in closed:
        dphi2 = gaussian.moment(activation, "dphi2", q)
    if "x_phi_dphi" in closed:
        slope = gaussian.moment(activation, "x_phi_dphi", q) / q
    return dphi2, slope


def _approach_of_length(
    activation: Activation, table: Table, status: Array, q: Array, sigma_w2: Array
) -> tuple[Array, Array]:
    """Return p and A of |q - q*| → A l^-p, where χ∥ = 1."""
    # V(q) = q + V''(q*) (q - q*)²/2; the table has its slope.
    curvature = sigma_w2 * over_grid(
        jax.grad(lambda q: table.at(q)[2]), jnp.where(status == Status.ALGEBRAIC, q, 1)
    )
    # V(q) = q - b q^{3/2} - a q² about 0, from the derivatives of φ on either side of it.
    beside = jnp.asarray([1e-30, -1e-30], q.dtype)
    first, second = activation.derivative(beside), activation.second_derivative(beside)
    third = jax.jvp(activation.second_derivative, (beside,), (jnp.ones_like(beside),))[1]
    sides = first * second * jnp.asarray([1.0, -1.0], q.dtype)
    b = -sigma_w2 * jnp.sum(sides) * math.sqrt(2 / math.pi)
    bent = jnp.abs(jnp.sum(sides)) > 1e-6 * jnp.sum(first**2)
    a = -1.5 * sigma_w2 * jnp.sum(second**2 / 4 + first * third / 3)

    at_zero = status == Status.COLLAPSES_ALGEBRAICALLY
    amplitude = jnp.select(
        [at_zero & bent, at_zero & (a > 0), status == Status.ALGEBRAIC],
        [4 / jnp.where(bent, b, 1) ** 2, 1 / jnp.where(a > 0, a, 1), 2 / jnp.abs(curvature)],
        jnp.nan,
    )
    amplitude = jnp.where(jnp.isinf(amplitude), jnp.nan, amplitude)
    exponent = jnp.where(at_zero & bent, 2, 1)
    return jnp.where(jnp.isnan(amplitude), jnp.nan, exponent), amplitude


def _excess(table: Table, q: Array, sigma_w2: Array, sigma_b2: Array) -> tuple[Array, Array]:
    """Return V(q)/q - 1, and its derivative by log q."""
    ratio, _, slope = table.at(q)
    return sigma_w2 * ratio + sigma_b2 / q - 1, sigma_w2 * (slope - ratio) - sigma_b2 / q


class _Lengths(NamedTuple):
    """All fixed points of one length map: q* = 0 in the first place, whether it is one or not."""

    q_star: Float[Array, " points"]
    chi1: Float[Array, " points"]
    chi_par: Float[Array, " points"]
    stability: Int[Array, " points"]
    neutral: Array  # whether every q is a fixed point


def _length_at(activation: Activation, table: Table, sigma_w2: Array, sigma_b2: Array) -> _Lengths:
    held = jax.lax.stop_gradient((table, sigma_w2, sigma_b2))
    roots = sign_changes(lambda t: _excess(held[0], jnp.exp(t), *held[1:]), sigma_w2.dtype)
    place = jnp.where(roots.before == 0, 1, jnp.exp(roots.place))
    q_star = jax.vmap(lambda q: implicit(_length_equation, (table, sigma_w2, sigma_b2), q))(place)
    dphi2, slope = slopes(activation, table, q_star)
    at_zero = sigma_w2 * table.at_zero[1]
    chi_par = sigma_w2 * slope

    stable = jnp.select(
        [roots.before == 0, roots.before == roots.after, (roots.before > 0) & (chi_par > -1)],
        [Stability.ABSENT, Stability.HALF_STABLE, Stability.STABLE],
        Stability.UNSTABLE,
    )
    zero_stable = jnp.select(
        [
            roots.neutral | (sigma_b2 != 0) | (table.at_zero[0] != 0),
            jnp.abs(at_zero - 1) <= _noise(at_zero.dtype),
            at_zero < 1,
        ],
        [
            Stability.ABSENT,
            jnp.where(roots.first < 0, Stability.MARGINAL, Stability.MARGINAL_UNSTABLE),
            Stability.STABLE,
        ],
        Stability.UNSTABLE,
    )
    return _Lengths(
        jnp.append(0, q_star),
        jnp.append(at_zero, sigma_w2 * dphi2),
        jnp.append(at_zero, chi_par),
        jnp.append(zero_stable, stable).astype(jnp.int8),
        roots.neutral,
    )


def _length_equation(theta: tuple[Table, Array, Array], q: Array) -> Array:
    table, sigma_w2, sigma_b2 = theta
    return sigma_w2 * q * table.at(q)[0] + sigma_b2 - q


def _noise(dtype: jnp.dtype) -> float:
    """Return what counts as rounding in a number of order 1."""
    return 64 * float(jnp.finfo(dtype).eps)


class Roots(NamedTuple):
    """Where a function of t changes sign, ascending, and its signs before and after; 0 if unused.

    Where the signs are equal, it touches 0.
    """

    place: Float[Array, " roots"]
    before: Float[Array, " roots"]
    after: Float[Array, " roots"]
    first: Float[Array, ""]  # its sign at the low end
    neutral: Array  # whether it is 0 nearly everywhere


def sign_changes(function: Callable[[Array], tuple[Array, Array]], dtype: jnp.dtype) -> Roots:
    """Find all roots of a function of t = log q that returns its value and its slope.

    Between neighbours of equal sign, an extremum towards 0 is looked at too: it may touch 0, or
    cross it twice.
    """
    count = _SCAN * (_HIGHEST - _LOWEST) + 1
    points = jnp.asarray(np.linspace(_LOWEST, _HIGHEST, count) * math.log(2), dtype)
    value, slope = jax.vmap(function)(points)
    noise = _noise(dtype)
    raw = jnp.where(value < -noise, -1.0, jnp.where(value <= noise, 0.0, 1.0)).astype(dtype)
    raw = jnp.where(jnp.isnan(value), 1, raw)  # what overflowed is large
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
    height = jax.vmap(function)(flat)[0] * around
    touches, crosses = ((place >= 0) & h for h in (jnp.abs(height) <= noise, height < -noise))
    lows = [low, jnp.where(touches, flat, start), jnp.where(crosses, flat, points[-1])]
    highs = [high, flat, end]
    befores = [before, jnp.where(touches | crosses, around, 0), jnp.where(crosses, -around, 0)]
    afters = [after, jnp.where(touches, around, jnp.where(crosses, -around, 0))]
    afters += [jnp.where(crosses, around, 0)]
    low, high, before, after = (jnp.concatenate(x) for x in (lows, highs, befores, afters))

    order = jnp.argsort(jnp.where(before == 0, points[-1] + 1, low))[:_ROOTS]
    low, high, before, after = (x[order] for x in (low, high, before, after))
    root = jax.vmap(functools.partial(_newton, function))(low, high, before).x
    return Roots(root, before, after, first, jnp.mean(raw == 0) > 0.9)


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
    slope: Float[Array, ""]  # at the x before this one
    step: Float[Array, ""]
    iterations: Int[Array, ""]


def _newton(
    function: Callable[[Array], tuple[Array, Array]],
    low: Array,
    high: Array,
    sign: Array,
    start: Array | None = None,
) -> _Bracket:
    """Find a sign change of a function, which returns its slope too, from ``sign`` at the low end.

    Newton's method, from the middle or from ``start``; where that leaves the bracket, or slows
    down, bisection.
    """
    eps = 2 * jnp.finfo(low.dtype).eps
    rounding = eps**0.6

    def busy(state: _Bracket) -> Array:
        moving = jnp.abs(state.step) > eps * jnp.maximum(jnp.abs(state.x), 1)
        return moving & (state.low < state.high) & (state.iterations < 100)

    def improve(state: _Bracket) -> _Bracket:
        x = state.x
        value, slope = function(x)
        right = jnp.sign(value) == sign
        low, high = jnp.where(right, x, state.low), jnp.where(right, state.high, x)
        new = x - value / jnp.where(slope == 0, 1, slope)
        slow = jnp.abs(new - x) > jnp.abs(state.step) / 2
        # Steps that small, and no longer smaller, are rounding errors: this one is the last.
        arrived = slow & (jnp.abs(state.step) < rounding * jnp.maximum(jnp.abs(x), 1))
        arrived &= (jnp.abs(new - x) <= jnp.abs(state.step)) & (slope != 0)
        usable = (new > low) & (new < high) & (slope != 0) & ~slow
        last = jnp.where(value == 0, x, jnp.clip(new, low, high))
        done = arrived | (jnp.abs(value) <= eps)
        new = jnp.where(done, last, jnp.where(usable, new, (low + high) / 2))
        step = jnp.where(done, 0, new - x)
        return _Bracket(low, high, new, slope, step, state.iterations + 1)

    first = (low + high) / 2 if start is None else start
    bracket = _Bracket(low, high, first, jnp.zeros_like(low), high - low, jnp.zeros((), int))
    return jax.lax.while_loop(busy, improve, bracket)


def implicit(equation: Callable[[Any, Array], Array], theta: Any, root: Array) -> Array:
    """Return a root x of equation(θ, x) = 0, with its derivatives by θ."""
    return jax.lax.custom_root(
        functools.partial(equation, theta),
        root,
        solve=lambda _, guess: guess,
        tangent_solve=lambda linear, y: y / linear(jnp.ones_like(y)),
    )


def _settled(
    activation: Activation, table: Table, sigma_w2: Array, sigma_b2: Array, start: Array
) -> tuple[Array, ...]:
    """Return the status, q*, χ₁ and χ∥ of the length that starts at ``start``."""
    found = _length_at(activation, table, sigma_w2, sigma_b2)
    present = (found.stability != Stability.ABSENT).at[0].set(True)
    excess = _excess(table, start, sigma_w2, sigma_b2)[0]
    up = jnp.where(present & (found.q_star >= start), found.q_star, jnp.inf)
    down = jnp.where(present & (found.q_star <= start), found.q_star, -1)
    index = jnp.where(excess > 0, jnp.argmin(up), jnp.argmax(down))
    # A start at a fixed point, to rounding, stays there.
    away = jnp.where(present, jnp.abs(found.q_star - start), jnp.inf)
    stays = (jnp.abs(excess) <= _noise(start.dtype)) & (jnp.min(away) < 1e-3 * start)
    index = jnp.where(stays, jnp.argmin(away), index)
    diverges = (excess > 0) & jnp.all(jnp.isinf(up)) & ~stays
    stability, chi_par = found.stability[index], found.chi_par[index]
    slow = (stability == Stability.MARGINAL) | (stability == Stability.HALF_STABLE)
    # Lengths that no longer grow at the end of the table, V' < 1, settle beyond it.
    growth = sigma_w2 * table.at(jnp.asarray(2.0**_HIGHEST, start.dtype))[2]
    beyond = diverges & (growth < 1 - _noise(start.dtype))
    beyond |= (index == 0) & (stability == Stability.ABSENT) & ~diverges
    status = jnp.select(
        [found.neutral, beyond, diverges, chi_par < -1, (index == 0) & slow, index == 0, slow],
        [
            Status.NEUTRAL,
            Status.OUT_OF_RANGE,
            Status.DIVERGES,
            Status.OSCILLATES,
            Status.COLLAPSES_ALGEBRAICALLY,
            Status.COLLAPSES,
            Status.ALGEBRAIC,
        ],
        Status.CONVERGES,
    )
    q = jnp.where(found.neutral, start, found.q_star[index])
    chi1 = jnp.where(found.neutral, 1, found.chi1[index])
    return status.astype(jnp.int8), q, chi1, jnp.where(found.neutral, 1, chi_par)


# The correlation map ------------------------------------------------------------------------------

_TERMS = 512
# Derivatives of c* and χ_c come from the series alone, and are NaN where terms left out matter by
# more than this.
_LOST = 1e-7


def correlation(
    activation: Activation, q: ArrayLike, sigma_w2: ArrayLike, sigma_b2: ArrayLike = 0.0
) -> tuple[Float[Array, "*grid"], Float[Array, "*grid"]]:
    """Return the stable fixed point c* >= 0 of the correlation map at length q, and χ_c = C'(c*).

    Parameters
    ----------
    activation
        φ; static under jit.
    q
        The length, > 0, kept by the length map: σ_w² E[φ²] + σ_b² = q.
    sigma_w2, sigma_b2
        σ_w² and σ_b², >= 0; all of shapes that broadcast.

    Returns
    -------
    c_star, chi_c
        c* = 1 and χ_c = χ₁ where χ₁ <= 1. Their derivatives are NaN at a few places where those are
        not known: φ with kinks, and 1 - c* below 0.02 or so.

    Raises
    ------
    InputError
        If an argument is negative or not finite (seen outside jit only); if φ has no Gaussian
        moments.
    """
    check_scale("q", q)
    gaussian.check(activation)
    sigma_w2, sigma_b2 = _as_scales(sigma_w2, sigma_b2)
    q, sigma_w2, sigma_b2 = jnp.broadcast_arrays(jnp.asarray(q, sigma_w2.dtype), sigma_w2, sigma_b2)
    chi1 = sigma_w2 * gaussian.moment(activation, "dphi2", q)
    return _correlation(activation, q, sigma_w2, sigma_b2, chi1)


@functools.partial(jax.jit, static_argnums=0)
def _correlation(
    activation: Activation, q: Array, sigma_w2: Array, sigma_b2: Array, chi1: Array
) -> tuple[Array, Array]:
    chaotic = chi1 > 1
    weight = jnp.where(chaotic, sigma_w2 / q, 1)

    c_star, chi_c, slope = _series_fixed_points(activation, q, weight, sigma_b2 / q, chaotic)
    # What the terms left out would add to χ₁, each times c^(k-1), bounds their part here.
    left_out = jnp.maximum(chi1 - slope, 0) * c_star**_TERMS
    tolerance = 50 * float(jnp.finfo(q.dtype).eps)
    insufficient = chaotic & (left_out > tolerance * jnp.maximum(chi1 - 1, tolerance))
    better = _by_quadrature(
        activation,
        *jax.lax.stop_gradient((insufficient, c_star, chi_c, q, weight, sigma_b2 / q)),
    )
    # The series still has the derivative, unless it has lost that too.
    lost = chaotic & (left_out > _LOST * (chi1 - 1))
    c_star, chi_c = (
        _without_derivative(lost, jnp.where(insufficient, x + jax.lax.stop_gradient(y - x), x))
        for x, y in zip((c_star, chi_c), better, strict=True)
    )
    return jnp.where(chaotic, c_star, 1), jnp.where(chaotic, chi_c, chi1)


def correlation_curvature(
    activation: Activation, q: Float[Array, "*grid"], sigma_w2: Float[Array, "*grid"]
) -> tuple[float, Float[Array, "*grid"]]:
    """Return p and a of C(1 - δ) = 1 - χ₁ δ + a δ^p: p is 3/2 where φ' jumps, 2 elsewhere.

    The last term is that of `criticality`'s opening lines, whatever χ₁ is.
    """
    if not activation.slope_jumps:
        return 2.0, sigma_w2 * q * gaussian.moment(activation, "ddphi2", q) / 2
    jumps = sum(
        jump**2 * jnp.exp(-(kink**2) / (2 * q)) for kink, jump in activation.slope_jumps
    ) / jnp.sqrt(2 * math.pi * q)
    return 1.5, 2 / 3 * sigma_w2 * jnp.sqrt(q / math.pi) * jumps


def _approach_of_correlation(
    activation: Activation, q: Array, sigma_w2: Array, chi_c: Array, kept: Array
) -> tuple[Array, Array]:
    """Return p and A of 1 - c → A l^-p, where χ_c = 1."""
    slow = jnp.abs(chi_c - 1) <= _noise(q.dtype)
    if activation.homogeneous:
        # Correlations do not know the scale: as if σ_w were critical.
        sigma_w2 = jnp.where(kept, 1 / gaussian.moment(activation, "dphi2", q), sigma_w2)
    else:
        slow &= ~kept

    def found() -> tuple[Array, Array]:
        power, a = correlation_curvature(activation, q, sigma_w2)
        amplitude = (1 / (a * (power - 1))) ** (1 / (power - 1))
        usable = slow & jnp.isfinite(amplitude)
        exponent = jnp.where(usable, 1 / (power - 1), jnp.nan)
        return exponent, jnp.where(usable, amplitude, jnp.nan)

    blank = jnp.full_like(q, jnp.nan)
    # Few points are critical, most often none.
    return jax.lax.cond(jnp.any(slow), found, lambda: (blank, blank))


def _errors(table: Table, found: Analysis) -> tuple[Array, Array]:
    """Return estimated errors of q* and c*: that of E[φ²], times how they respond to it."""
    q = found.q_star
    panel = jnp.clip(jnp.floor(jnp.log2(jnp.where(q > 0, q, 1))), _LOWEST, _HIGHEST - 1)
    moment = table.error[(panel - _LOWEST).astype(int)] + 16 * jnp.finfo(q.dtype).eps

    def response(chi: Array, amplitude: Array, scale: Array) -> Array:
        away = jnp.abs(1 - chi)
        linear = moment * scale / jnp.where(away > 0, away, 1)
        # Where the maps touch, the square root: (q - q*)² = A error.
        return jnp.where(jnp.isnan(amplitude), linear, jnp.sqrt(moment * scale * amplitude))

    fixed = (q == 0) | (found.status == Status.NEUTRAL)
    of_q = jnp.where(fixed, 0, response(found.chi_par, found.q_amplitude, q))
    blank = jnp.full_like(q, jnp.nan)
    relative = of_q / jnp.where(q > 0, q, 1)
    of_c = response(found.chi_c, blank, 1 + relative / moment)
    of_c = jnp.where(jnp.isnan(found.c_star), jnp.nan, jnp.where(found.c_star == 1, 0, of_c))
    return jax.lax.stop_gradient((of_q, of_c))


@jax.custom_jvp
def _without_derivative(where: Array, x: Array) -> Array:
    """Return x, whose derivative is NaN at some places."""
    del where
    return x


@_without_derivative.defjvp
def _without_derivative_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    (where, x), (_, x_dot) = primals, tangents
    return x, x_dot * jnp.where(where, jnp.nan, 1)


def _series_fixed_points(
    activation: Activation, q: Array, weight: Array, bias: Array, chaotic: Array
) -> tuple[Array, Array, Array]:
    """Return the c* < 1 of C(c) = weight Σ a_k² c^k + bias, C'(c*), and C'(1), from ``_TERMS``.

    Where there is one, in the chaotic phase; elsewhere C'(1) alone means something.
    """
    # Terms first, points last: one step along a series is one pass over neighbours in memory.
    coefficients = jax.vmap(
        lambda q: gaussian.hermite_coefficients(activation, q, _TERMS), out_axes=-1
    )(q.reshape(-1))
    powers = coefficients**2 * weight.reshape(1, -1)
    found = jax.vmap(_series_fixed_point, in_axes=(-1, 0, 0))(
        powers, bias.reshape(-1), chaotic.reshape(-1)
    )
    return jax.tree.map(lambda leaf: leaf.reshape(q.shape), found)


def _series_fixed_point(
    power: Float[Array, " terms"], bias: Float[Array, ""], chaotic: Bool[Array, ""]
) -> tuple[Array, Array, Array]:
    held = jax.lax.stop_gradient(power)
    left_out = jnp.maximum(1 - jax.lax.stop_gradient(bias) - jnp.sum(held), 0)

    # S_j = Σ_{k>j} power_k, summed from the small end, which includes what is left out.
    _, beyond = jax.lax.scan(
        lambda tail, term: (tail + term, tail + term), left_out, held[1:], reverse=True, unroll=16
    )

    def excess(c: Array) -> tuple[Array, Array]:
        """(1 - C(c))/(1 - c) - 1 = Σ_j c^j S_j - 1, and its slope: 1 is divided out as a root.

        It is convex and increasing.
        """
        return _polynomial(beyond, c, offset=-1.0)

    zero = jnp.zeros_like(bias)
    one = jnp.ones_like(bias)
    # All points of a grid iterate until the last one is done: none without need.
    needed = chaotic & (beyond[0] - 1 <= -_noise(bias.dtype))
    # A convex function: from the right, Newton's method never oversteps.
    found = _newton(excess, zero, jnp.where(needed, one, zero), sign=-one, start=one).x
    found = jnp.where(needed, found, zero)

    def equation(theta: tuple[Array, Array], c: Array) -> Array:
        power, bias = theta
        return _polynomial(power, c, offset=bias)[0] - c

    c_star = implicit(equation, (power, bias), found)
    slopes = power[1:] * jnp.arange(1, _TERMS, dtype=bias.dtype)
    return c_star, _polynomial(slopes, c_star)[0], jnp.sum(slopes)


def _polynomial(
    coefficients: Array, x: Array, offset: ArrayLike = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return offset + Σ_k coefficients_k x^k, and its derivative by x."""

    def horner(total: tuple[Array, Array], coefficient: Array) -> tuple[tuple[Array, Array], None]:
        value, slope = total
        return (value * x + coefficient, slope * x + value), None

    start = (jnp.zeros_like(x), jnp.zeros_like(x))
    (value, slope), _ = jax.lax.scan(horner, start, coefficients, reverse=True, unroll=16)
    return value + offset, slope


def _by_quadrature(activation: Activation, *grids: Array) -> tuple[Array, Array]:
    """Solve for c* in two dimensions, at the few places that need it.

    Takes where that is, and c*, C'(c*), q, σ_w²/q and σ_b²/q; returns c* and C'(c*).
    """
    # What φ closes over, if that is traced, must be an argument of a function with its own rules.
    program = jax.make_jaxpr(activation.function)(jnp.zeros((), grids[1].dtype))
    traced = [isinstance(c, jax.core.Tracer) for c in program.consts]
    parameters = tuple(c for c, is_traced in zip(program.consts, traced, strict=True) if is_traced)

    def with_parameters(parameters: Sequence[Array]) -> Activation:
        if not parameters:
            return activation
        given = iter(parameters)
        consts = [
            next(given) if is_traced else c
            for c, is_traced in zip(program.consts, traced, strict=True)
        ]

        def function(x: Array) -> Array:
            return jax.core.eval_jaxpr(program.jaxpr, consts, x)[0]

        return dataclasses.replace(activation, function=jnp.vectorize(function))

    @jax.custom_batching.custom_vmap
    def everywhere(grids: tuple[Array, ...], parameters: Sequence[Array]) -> tuple[Array, Array]:
        solve = functools.partial(_correlation_by_quadrature, with_parameters(parameters))
        flat = tuple(grid.reshape(-1) for grid in grids)
        # One after another: a batch of conditions would compute both sides of each.
        c, chi_c = jax.lax.cond(
            jnp.any(flat[0]), lambda: jax.lax.map(solve, flat), lambda: (flat[1], flat[2])
        )
        return c.reshape(grids[1].shape), chi_c.reshape(grids[1].shape)

    @everywhere.def_vmap
    def _everywhere_batched(axis_size, in_batched, grids, parameters):  # type: ignore[no-untyped-def]
        grids, parameters = (
            tuple(
                x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
                for x, batched in zip(side, flags, strict=True)
            )
            for side, flags in zip((grids, parameters), in_batched, strict=True)
        )
        if any(in_batched[1]):
            return jax.lax.map(lambda both: everywhere(*both), (grids, parameters)), (True, True)
        return everywhere(grids, tuple(p[0] for p in parameters)), (True, True)

    return everywhere(grids, tuple(jax.lax.stop_gradient(p) for p in parameters))


def _correlation_by_quadrature(
    activation: Activation, place: tuple[Array, ...]
) -> tuple[Array, Array]:
    needed, c, chi_c, q, weight, bias = place

    def solved() -> tuple[Array, Array]:
        def excess(c: Array) -> tuple[Array, Array]:
            value, slope = gaussian.equal_pair(activation, q, c)
            return weight * value + bias - c, weight * q * slope - 1

        # The series' c is a little too large; at 1 itself there is always a root.
        start = jnp.where(c < 1, c, c / 2)
        found = _newton(excess, jnp.zeros_like(c), c, sign=jnp.ones_like(c), start=start)
        return found.x, found.slope + 1

    return jax.lax.cond(needed, solved, lambda: (c, chi_c))
