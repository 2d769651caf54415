"""Where signals settle: the fixed points of the length and correlation maps, and depth scales.

The second moment q^l of the pre-activations follows the length map V(q) = σ_w² E[φ²] + σ_b², and
the correlation of two inputs, at a fixed length, the correlation map
C(c) = (σ_w² E[φ(u) φ(v)] + σ_b²)/q. Near a fixed point both approach exponentially, and squared
gradients change by χ₁ a layer (Poole et al. 2016, arXiv:1606.05340; Schoenholz et al. 2017,
arXiv:1611.01232):

    χ∥ = V'(q*),            ξ_q = -1/log χ∥
    χ₁ = σ_w² E[φ'²],       ξ_∇ = -1/log χ₁      (< 0: gradients grow on the way down)
    χ_c = C'(c*),           ξ_c = -1/log χ_c

Where the length grows without limit there is no q*, and gradients still have a factor: χ₁ tends to
σ_w² lim E[φ'²] as q → ∞, which is finite wherever φ grows no faster than |x|, and then correlations
tend to those of a± x.

How it is computed. All averages come from one table (`moment_table`), which does not depend on σ_w
and σ_b: a grid of a million points shares it. All roots within a float's range are found on it. The
correlation map is a power series in c with coefficients >= 0, those of φ in Hermite polynomials, so
it has at most one fixed point in [0, 1) besides c = 1: one where χ₁ > 1, none elsewhere (Poole et
al. 2016). Derivatives follow from the implicit function theorem, to any order.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from gradflow import activations, gaussian
from gradflow._arguments import as_numbers
from gradflow._checks import check_scale, unknown_name
from gradflow.activations import Activation
from gradflow.errors import InputError
from gradflow.roots import Valued, implicit, newton, rounding, sign_changes
from gradflow.theory._moment_table import Averages, Limit, Table

__all__ = ["Analysis", "LengthFixedPoints", "Stability", "Status", "analyse", "correlation"]
__all__ += ["DEPTH_SCALES", "depth_scale", "length", "representable_depth", "trainable_depth"]

_Pytree = TypeVar("_Pytree")


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
    OUT_OF_RANGE = 7  # to a q* > 0 that is no normal number of the float type


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
    q_error: Float[Array, "*grid points"]  # estimated, of q_star, absolute


class Analysis(NamedTuple):
    """Where a signal settles, and how fast; NaN where it does not.

    Where the length grows without limit, ``chi1`` and ``chi_par`` are what the factors of gradients
    and of the length tend to: inf where they grow too, and NaN where they tend to nothing.

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


# By name in results, `rate_…` and `xi_…`: whose depth scale it is.
DEPTH_SCALES = {"grad": "gradients", "q": "lengths", "c": "correlations"}


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
    critical = jnp.abs(log) <= rounding(log.dtype)
    return jnp.where(critical, jnp.inf, 2 * limit / jnp.where(critical, 1, log))


def depth_scale(chi: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return -1/log|χ| in layers: > 0 for decay, < 0 for growth, +inf at |χ| = 1 to rounding."""
    # The logarithm of 0 has no derivative, and a `where` around it does not hide that.
    lost = chi == 0
    log = jnp.log(jnp.where(lost, 2, jnp.abs(chi)))
    critical = jnp.abs(log) <= rounding(log.dtype)
    scale = jnp.where(critical, jnp.inf, -1 / jnp.where(critical, 1, log))
    return jnp.where(lost, 0, scale)


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
        Of the shape that they broadcast to, and one axis more; the four smallest besides q* = 0.
        Where every q is one (ReLU at σ_w² = 2, σ_b² = 0) none is listed; `analyse` says so.

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
        found = _length_at(activation, table, sigma_w2, sigma_b2).points
        present = found.stability != Stability.ABSENT
        order = jnp.argsort(~present, stable=True)
        known = found._replace(stability=jnp.zeros_like(present))  # of these, all that is a number
        blanked = jax.tree.map(lambda leaf: jnp.where(present, leaf, jnp.nan), known)
        return jax.tree.map(lambda leaf: leaf[order], blanked._replace(stability=found.stability))

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
        Of the shape that they broadcast to. Where the status is ``OSCILLATES`` or ``OUT_OF_RANGE``,
        all else is NaN; where it is ``DIVERGES``, χ₁ and χ∥ are limits, and there is no q*. Where
        the length vanishes, diverges or is kept, φ is that of a± x: correlations tend to 1 if the
        two slopes differ, and are kept as they are (c* is NaN) if they do not. A status is for
        length maps that increase, as all here but that of cos do; where a map decreases, that of
        the only fixed point.

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
    status, found, moment_error = over_grid(
        functools.partial(_settled, activation, table), sigma_w2, sigma_b2, start
    )
    q = found.q_star
    diverges = status == Status.DIVERGES
    vanished = q == 0
    kept = vanished | diverges | (status == Status.NEUTRAL)
    usable = jnp.where(jnp.isnan(q) | vanished, 1, q)
    known = jnp.where(kept, 0, found.chi1)
    c_star, chi_c = _correlation(activation, usable, sigma_w2, sigma_b2, known)
    # φ is that of slopes on either side: C(c) > c for c < 1 where they differ, and c where not.
    bent = jnp.where(diverges, table.infinity.bent, table.zero.bent)
    bent &= status != Status.COLLAPSES_ALGEBRAICALLY  # what is left of the rest decays no faster
    power = jnp.where(diverges, table.infinity.power, 1)
    c_star = jnp.where(kept, jnp.where(bent, 1.0, jnp.nan), c_star)
    chi_c = jnp.where(kept, jnp.where(power > 0, 1, jnp.nan), chi_c)
    ordered = ~kept & (c_star == 1)
    xi_c = jnp.where(ordered, found.xi_grad, depth_scale(chi_c))
    approaches = (
        *_approach_of_length(activation, table, status, q, sigma_w2),
        *_approach_of_correlation(activation, table, usable, sigma_w2, found.chi1, chi_c, status),
    )
    c_error = _error_of_correlation(c_star, chi_c, found, moment_error)
    scales = (found.xi_q, xi_c, found.xi_grad)
    of_length = (q, found.chi1, found.chi_par, c_star, chi_c)
    values = (*of_length, *scales, *approaches, found.q_error, c_error)
    unknown = (status == Status.OSCILLATES) | (status == Status.OUT_OF_RANGE)
    return Analysis(status, *(jnp.where(unknown, jnp.nan, value) for value in values))


def _approach_of_length(
    activation: Activation, table: Table, status: Array, q: Array, sigma_w2: Array
) -> tuple[Array, Array]:
    """Return p and A of |q - q*| → A l^-p, where χ∥ = 1."""
    # V(q) = q + V''(q*) (q - q*)²/2; the table has its slope.
    curvature = sigma_w2 * over_grid(
        jax.grad(lambda q: table.at(q).gain), jnp.where(status == Status.ALGEBRAIC, q, 1)
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


def _excess(table: Table, q: Array, sigma_w2: Array, sigma_b2: Array) -> tuple[Array, Array, Array]:
    """Return V(q)/q - 1, its derivative by log q, and the size of its terms."""
    near, bias = table.at(q), sigma_b2 / q
    # What is critical to rounding counts as critical.
    straight = jnp.abs(sigma_w2 * near.limit - 1)
    noise = rounding(q.dtype)
    straight = jnp.where(straight <= noise, straight / noise, straight)
    size = straight + sigma_w2 * near.sizes[0] + bias
    return (
        near.excess(near.ratio, sigma_w2) + bias,
        sigma_w2 * (near.gain - near.ratio) - bias,
        size,
    )


class _Lengths(NamedTuple):
    """All fixed points of one length map: q* = 0 in the first place, whether it is one or not."""

    points: LengthFixedPoints
    moment_error: Float[Array, " points"]  # of E[φ²], relative
    neutral: Array  # whether every q is a fixed point


def averages_at(activation: Activation, table: Table, q: Float[Array, ""]) -> Averages:
    """Return the averages at a length, in closed form where it has digits that the table has not.

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


def _length_at(activation: Activation, table: Table, sigma_w2: Array, sigma_b2: Array) -> _Lengths:
    held = jax.lax.stop_gradient((table, sigma_w2, sigma_b2))
    dtype = sigma_w2.dtype
    roots = sign_changes(lambda t: _excess(held[0], jnp.exp(t), *held[1:]), Table.scan(dtype))
    place = jnp.where(roots.before == 0, 1, jnp.exp(roots.place))
    q_star = jax.vmap(lambda q: implicit(_length_equation, (table, sigma_w2, sigma_b2), q))(place)
    near = jax.vmap(functools.partial(averages_at, activation, table))(q_star)
    chi1, chi_par = (sigma_w2 * (near.limit + x) for x in (near.dphi2, near.gain))
    xi_grad, xi_q = (
        _scale_of(chi, near.excess(x, sigma_w2))
        for chi, x in ((chi1, near.dphi2), (chi_par, near.gain))
    )
    at_zero = sigma_w2 * table.zero.dphi2
    xi_zero = depth_scale(at_zero)

    stable = jnp.select(
        [roots.before == 0, roots.before == roots.after, (roots.before > 0) & (chi_par > -1)],
        [Stability.ABSENT, Stability.HALF_STABLE, Stability.STABLE],
        Stability.UNSTABLE,
    )
    zero_stable = jnp.select(
        [
            roots.neutral | (sigma_b2 != 0) | (table.square_at_zero != 0),
            jnp.abs(at_zero - 1) <= rounding(dtype),
            at_zero < 1,
        ],
        [
            Stability.ABSENT,
            jnp.where(roots.first < 0, Stability.MARGINAL, Stability.MARGINAL_UNSTABLE),
            Stability.STABLE,
        ],
        Stability.UNSTABLE,
    )
    error, moment_error = jax.vmap(
        lambda q: _error_of_length(*jax.lax.stop_gradient((table, q, sigma_w2, sigma_b2)))
    )(q_star)
    points = LengthFixedPoints(
        jnp.append(0, q_star),
        jnp.append(at_zero, chi1),
        jnp.append(at_zero, chi_par),
        jnp.append(xi_zero, xi_q),
        jnp.append(xi_zero, xi_grad),
        jnp.append(zero_stable, stable).astype(jnp.int8),
        jnp.append(0, error),
    )
    return _Lengths(points, jnp.append(0, moment_error), roots.neutral)


def _length_equation(theta: tuple[Table, Array, Array], q: Array) -> Array:
    table, sigma_w2, sigma_b2 = theta
    near = table.at(q)
    return q * near.excess(near.ratio, sigma_w2) + sigma_b2


def _scale_of(chi: Array, excess: Array) -> Array:
    """Return `depth_scale` of χ, from χ - 1 where that has more digits."""
    close = jnp.abs(excess) < 0.5
    log = jnp.log1p(jnp.where(close, excess, 1))
    critical = jnp.abs(log) <= rounding(log.dtype)
    near = jnp.where(critical, jnp.inf, -1 / jnp.where(critical, 1, log))
    return jnp.where(close, near, depth_scale(jnp.where(close, 2, chi)))


def _error_of_length(
    table: Table, q: Array, sigma_w2: Array, sigma_b2: Array
) -> tuple[Array, Array]:
    """Return an estimated error of q*, absolute, and that of E[φ²] there, relative.

    That of V(q)/q, times how q* responds to it.
    """
    near, eps = table.at(q), jnp.finfo(q.dtype).eps
    of_moment = table.error_at(q)
    straight = sigma_w2 * near.limit
    terms = jnp.abs(straight - 1) + sigma_w2 * near.sizes[0] + sigma_b2 / q
    # A limit that is a power of 2 multiplies σ_w² without rounding, and others do not.
    exact = jnp.frexp(near.limit)[0] == 0.5
    error = sigma_w2 * of_moment + 4 * eps * terms + jnp.where(exact, 0, eps * straight)
    away = jnp.abs(near.excess(near.gain, sigma_w2))
    bend = sigma_w2 * q * jnp.abs(jax.grad(lambda q: table.at(q).gain)(q))
    # Where the maps touch, the square root: (q - q*)² V''/2 is the error.
    linear, root = (
        jnp.where(x > 0, y / jnp.where(x > 0, x, 1), jnp.inf)
        for x, y in ((away, error), (bend, 2 * error))
    )
    by_search = 4 * eps * jnp.maximum(jnp.abs(jnp.log(q)), 1)
    relative = jnp.minimum(linear, jnp.sqrt(root)) + by_search
    return relative * q, of_moment / jnp.abs(near.limit + near.ratio) + 16 * eps


def _settled(
    activation: Activation, table: Table, sigma_w2: Array, sigma_b2: Array, start: Array
) -> tuple[Array, LengthFixedPoints, Array]:
    """Return the status, the fixed point, and E[φ²]'s error, of the length from ``start``."""
    found = _length_at(activation, table, sigma_w2, sigma_b2)
    points = found.points
    present = (points.stability != Stability.ABSENT).at[0].set(True)
    excess, _, size = _excess(table, start, sigma_w2, sigma_b2)
    up = jnp.where(present & (points.q_star >= start), points.q_star, jnp.inf)
    down = jnp.where(present & (points.q_star <= start), points.q_star, -1)
    rises = ~(excess <= 0)  # what overflowed is large
    index = jnp.where(rises, jnp.argmin(up), jnp.argmax(down))
    # A start at a fixed point, to rounding, stays there.
    noise = rounding(start.dtype)
    away = jnp.where(present, jnp.abs(points.q_star - start), jnp.inf)
    stays = (jnp.abs(excess) <= noise * size) & (jnp.min(away) < 1e-3 * start)
    index = jnp.where(stays, jnp.argmin(away), index)
    diverges = rises & jnp.all(jnp.isinf(up)) & ~stays
    at = jax.tree.map(lambda leaf: leaf[index], points)
    slow = (at.stability == Stability.MARGINAL) | (at.stability == Stability.HALF_STABLE)
    # Lengths that biases alone keep growing at the end of the float's range settle beyond it.
    end = jnp.exp(Table.scan(start.dtype)[-1])
    last = table.at(end)
    beyond = diverges & (last.excess(last.ratio, sigma_w2) < -noise)
    beyond |= (index == 0) & (at.stability == Stability.ABSENT) & ~diverges
    status = jnp.select(
        [found.neutral, beyond, diverges, at.chi_par < -1, (index == 0) & slow, index == 0, slow],
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
    one, never = jnp.ones_like(start), jnp.full_like(start, jnp.inf)
    kept = LengthFixedPoints(start, one, one, never, never, at.stability, jnp.zeros_like(start))
    at = jax.tree.map(lambda x, y: jnp.where(found.neutral, x, y), kept, at)
    chi1, chi_par = sigma_w2 * table.infinity.dphi2, sigma_w2 * table.infinity.gain
    gone = LengthFixedPoints(
        jnp.full_like(start, jnp.nan),
        chi1,
        chi_par,
        depth_scale(chi_par),
        depth_scale(chi1),
        at.stability,
        jnp.full_like(start, jnp.nan),
    )
    at = jax.tree.map(lambda x, y: jnp.where(status == Status.DIVERGES, x, y), gone, at)
    return status.astype(jnp.int8), at, found.moment_error[index]


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
    # Nearer to 1 than rounding, c* is 1 to rounding too, and the two roots cannot be told apart.
    chaotic = chi1 - 1 > rounding(q.dtype)
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
    activation: Activation,
    table: Table,
    q: Array,
    sigma_w2: Array,
    chi1: Array,
    chi_c: Array,
    status: Array,
) -> tuple[Array, Array]:
    """Return p and A of 1 - c → A l^-p, where χ_c = 1."""
    slow = jnp.abs(chi_c - 1) <= rounding(q.dtype)

    def of_sides(limit: Limit) -> Array:
        """4/b², b being that of a± x at a length that is kept, whatever it is."""
        power = jnp.where(limit.bent, limit.power, 1)
        b = math.sqrt(2) / (3 * math.pi) * (limit.above - limit.below) ** 2 / power
        return jnp.where(limit.bent, 4 / jnp.where(limit.bent, b, 1) ** 2, jnp.nan)

    def found() -> tuple[Array, Array]:
        power, a = correlation_curvature(activation, q, sigma_w2)
        amplitude = (1 / (a * (power - 1))) ** (1 / (power - 1))
        far = of_sides(table.infinity)
        critical = jnp.abs(chi1 - 1) <= rounding(q.dtype)
        # Biases add 1/l of δ a layer to what is lost, where q grows like l; the rest of φ may too.
        linear = jnp.where(activation.homogeneous, far / 4, jnp.nan)
        diverging = jnp.where(critical, linear, far)
        amplitude = jnp.select(
            [
                status == Status.DIVERGES,
                (status == Status.COLLAPSES) | (status == Status.NEUTRAL),
                status == Status.COLLAPSES_ALGEBRAICALLY,
            ],
            [diverging, jnp.broadcast_to(of_sides(table.zero), q.shape), jnp.nan],
            amplitude,
        )
        kept = (status == Status.DIVERGES) | (status == Status.COLLAPSES)
        kept |= status == Status.NEUTRAL
        usable = slow & jnp.isfinite(amplitude)
        exponent = jnp.where(usable, jnp.where(kept, 2, 1 / (power - 1)), jnp.nan)
        return exponent, jnp.where(usable, amplitude, jnp.nan)

    blank = jnp.full_like(q, jnp.nan)
    # Few points are critical, most often none.
    return jax.lax.cond(jnp.any(slow), found, lambda: (blank, blank))


def _error_of_correlation(
    c_star: Array, chi_c: Array, length: LengthFixedPoints, moment_error: Array
) -> Array:
    """Return an estimated error of c*: that of C, from E[φ²] and from q*, times how c* responds."""
    away = jnp.abs(1 - chi_c)
    of_map = moment_error + length.q_error / jnp.where(length.q_star > 0, length.q_star, 1)
    error = of_map / jnp.where(away > 0, away, 1)
    error = jnp.where(jnp.isnan(c_star), jnp.nan, jnp.where(c_star == 1, 0, error))
    return jax.lax.stop_gradient(error)


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

    def excess(c: Array) -> Valued:
        """(1 - C(c))/(1 - c) - 1 = Σ_j c^j S_j - 1, and its slope: 1 is divided out as a root.

        It is convex and increasing.
        """
        return *_polynomial(beyond, c, offset=-1.0), jnp.ones_like(c)

    zero = jnp.zeros_like(bias)
    one = jnp.ones_like(bias)
    # All points of a grid iterate until the last one is done: none without need.
    needed = chaotic & (beyond[0] - 1 <= -rounding(bias.dtype))
    # A convex function: from the right, Newton's method never oversteps.
    found = newton(excess, zero, jnp.where(needed, one, zero), sign=-one, start=one)
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
        def excess(c: Array) -> Valued:
            value, slope = gaussian.equal_pair(activation, q, c)
            return weight * value + bias - c, weight * q * slope - 1, jnp.ones_like(c)

        # The series' c is a little too large; at 1 itself there is always a root.
        start = jnp.where(c < 1, c, c / 2)
        c_star = newton(excess, jnp.zeros_like(c), c, sign=jnp.ones_like(c), start=start)
        return c_star, weight * q * gaussian.equal_pair(activation, q, c_star)[1]

    return jax.lax.cond(needed, solved, lambda: (c, chi_c))
