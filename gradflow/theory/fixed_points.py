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

How it is computed. All averages come from one table (`_moment_table`), which does not depend on σ_w
and σ_b: a grid of a million points shares it. All roots within a float's range are found on it; the
correlation map's are in `_correlations`. Derivatives follow from the implicit function theorem, to
any order.
"""

import enum
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from gradflow import activations, gaussian
from gradflow._arguments import as_grids, as_numbers
from gradflow._checks import check_scale, unknown_name
from gradflow._programs import program
from gradflow._roots import implicit, rounding, sign_changes
from gradflow.activations import Activation, ActivationLike
from gradflow.theory._approach import approach_of_correlation, approach_of_length
from gradflow.theory._correlations import correlation_fixed_point
from gradflow.theory._depth_scales import depth_scale, depth_scale_near_1
from gradflow.theory._moment_table import (
    Table,
    averages_at,
    in_parts,
    over_grid,
    seconds_over_grid,
)

__all__ = ["LABELS", "Analysis", "LengthFixedPoints", "Stability", "Status", "analyse", "length"]
__all__ += ["length_and_analyses", "representable_depth", "trainable_depth"]


class Stability(enum.IntEnum):
    """How lengths near a fixed point of the length map move."""

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

    Entries beyond the last fixed point have stability ``ABSENT`` and are NaN.
    """

    q_star: Float[Array, "*grid points"]
    chi1: Float[Array, "*grid points"]  # σ_w² E[φ'²]
    chi_par: Float[Array, "*grid points"]  # χ∥ = V'(q*)
    xi_q: Float[Array, "*grid points"]  # in layers
    xi_grad: Float[Array, "*grid points"]  # in layers; < 0 where gradients explode
    stability: Int[Array, "*grid points"]  # a `Stability`
    q_error: Float[Array, "*grid points"]  # estimated, of q_star, absolute


class Analysis(NamedTuple):
    """The fixed point that a signal tends to, and how fast; NaN where there is none.

    Where the length grows without limit, ``chi1`` and ``chi_par`` are the limits of the factors of
    gradients and of the length: inf where they grow too, and NaN where they have none.

    Where an approach is algebraic, not exponential, its ξ is infinite and after l layers
    |q - q*| → amplitude · l^-exponent, and likewise 1 - c for two inputs. NaN elsewhere, and where
    the approach is no power of l (hard_tanh at q* = 0: 1/log l).
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


# The words for each field in tables, by its name.
LABELS = {
    "q_star": "q*",
    "status": "the length",
    "chi1": "χ₁ = σ_w² E φ'²",
    "chi_par": "χ∥, slope of the length map",
    "c_star": "c*, where correlations settle",
    "chi_c": "slope of the correlation map at c*",
    "xi_q": "ξ_q of the length (layers)",
    "xi_c": "ξ_c of correlations (layers)",
    "xi_grad": "ξ_∇ of gradients (layers)",
    "q_exponent": "|q - q*| → a/l^p: p",
    "q_amplitude": "|q - q*| → a/l^p: a",
    "c_exponent": "1 - c → a/l^p: p",
    "c_amplitude": "1 - c → a/l^p: a",
    "q_error": "estimated error of q*",
    "c_error": "estimated error of c*",
}


def trainable_depth(xi: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Return 6 |ξ|, the depth up to which networks train: a rule of thumb, not a law.

    Parameters
    ----------
    xi
        ξ_c or ξ_∇, in layers, of any shape.

    Returns
    -------
    Array
        In layers, of the shape of ``xi``.

    Raises
    ------
    InputError
        If ``xi`` is not of numbers.

    References
    ----------
    Schoenholz et al. 2017, arXiv:1611.01232, section 5.
    """
    return _six_times(*as_grids(xi=as_numbers("xi", xi, float)))


@program()
def _six_times(xi: Array) -> Array:
    return 6 * jnp.abs(xi)


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
    least, largest = math.log(float(limits.tiny)), math.log(float(limits.max))
    return _representable(as_grids(chi=chi)[0], least=least, largest=largest)


@program()
def _representable(chi: Array, least: ArrayLike, largest: ArrayLike) -> Array:
    log = jnp.log(chi)
    limit = jnp.where(log < 0, least, largest)
    critical = jnp.abs(log) <= rounding(log.dtype)
    return jnp.where(critical, jnp.inf, 2 * limit / jnp.where(critical, 1, log))


def length(
    activation: ActivationLike, sigma_w2: ArrayLike, sigma_b2: ArrayLike = 0.0
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
        Of the shape that they broadcast to, and one axis more: q* = 0, where it is a fixed point,
        and the four smallest others. Where every q is a fixed point (ReLU at σ_w² = 2, σ_b² = 0)
        none is listed, and `analyse` has the status ``NEUTRAL``.

    Raises
    ------
    InputError
        If σ_w² or σ_b² is negative or not finite (seen outside jit only); if φ has no Gaussian
        moments.
    """
    return _length(*_checked(activation, sigma_w2, sigma_b2))


def _checked(
    activation: ActivationLike, sigma_w2: ArrayLike, sigma_b2: ArrayLike, **starts: ArrayLike
) -> tuple[Any, ...]:
    """An activation, and the numbers beside it as floats of one shape."""
    activation = activations.get(activation)
    for name, value in starts.items():
        check_scale(name, value, positive=True)
    gaussian.check(activation)
    for name, value in (("sigma_w2", sigma_w2), ("sigma_b2", sigma_b2)):
        check_scale(name, value)
    return activation, *as_grids(sigma_w2=sigma_w2, sigma_b2=sigma_b2, **starts)


@program("activation", seconds=seconds_over_grid)
def _length(activation: Activation, sigma_w2: Array, sigma_b2: Array) -> LengthFixedPoints:
    table = Table.of(activation, sigma_w2.dtype)

    def one(sigma_w2: Array, sigma_b2: Array) -> LengthFixedPoints:
        return _present_first(_length_at(activation, table, sigma_w2, sigma_b2).points)

    return over_grid(one, sigma_w2, sigma_b2)


def _present_first(points: LengthFixedPoints) -> LengthFixedPoints:
    """The fixed points of one map, absent ones last and NaN."""
    present = points.stability != Stability.ABSENT
    order = jnp.argsort(~present, stable=True)
    fields = points._asdict()
    stability = fields.pop("stability")[order]
    sorted_fields = {
        name: jnp.where(present, values, jnp.nan)[order] for name, values in fields.items()
    }
    return LengthFixedPoints(**sorted_fields, stability=stability)


def length_and_analyses(
    activation: ActivationLike,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike,
    starts: ArrayLike,
) -> tuple[LengthFixedPoints, Analysis]:
    """`length` at one σ_w² and σ_b², and `analyse` from several starts: less work than each alone.

    Parameters
    ----------
    activation, sigma_w2, sigma_b2
        As for `length`, σ_w² and σ_b² two numbers.
    starts
        q of the first layer, > 0, shape (starts,).

    Raises
    ------
    InputError
        As `analyse` does.
    """
    phi, w2, b2, q = _checked(activation, sigma_w2, sigma_b2, starts=starts)
    return _length_and_analyses(phi, w2[0], b2[0], q)


@program("activation")
def _length_and_analyses(
    activation: Activation, sigma_w2: Array, sigma_b2: Array, starts: Float[Array, " starts"]
) -> tuple[LengthFixedPoints, Analysis]:
    table = Table.of(activation, sigma_w2.dtype)
    lengths = _length_at(activation, table, sigma_w2, sigma_b2)
    settled = jax.vmap(lambda start: _settled(table, lengths, sigma_w2, sigma_b2, start))(starts)
    scales = (jnp.broadcast_to(scale, starts.shape) for scale in (sigma_w2, sigma_b2))
    return _present_first(lengths.points), _analysis(activation, table, *settled, *scales)


def analyse(
    activation: ActivationLike,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    *,
    start: ArrayLike = 1.0,
) -> Analysis:
    """Return the fixed point that a signal of second moment ``start`` tends to, and depth scales.

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
        all other fields are NaN; where it is ``DIVERGES``, χ₁ and χ∥ are limits, and q* is NaN.
        Where the length vanishes, diverges or stays as it is, φ(x) = a± x: correlations tend to 1
        if the two slopes differ, and stay as they are (c* is NaN) if not. A length map that
        decreases, as that of cos does, has one fixed point, and the status is that of it.

    Raises
    ------
    InputError
        If σ_w² or σ_b² is negative, or ``start`` not above 0, or one not finite (seen outside jit
        only); if φ has no Gaussian moments.
    """
    return _analyse(*_checked(activation, sigma_w2, sigma_b2, start=start))


@program("activation", seconds=seconds_over_grid)
def _analyse(activation: Activation, sigma_w2: Array, sigma_b2: Array, start: Array) -> Analysis:
    table = Table.of(activation, sigma_w2.dtype)

    def one(sigma_w2: Array, sigma_b2: Array, start: Array) -> tuple:
        lengths = _length_at(activation, table, sigma_w2, sigma_b2)
        return _settled(table, lengths, sigma_w2, sigma_b2, start)

    def part(sigma_w2: Array, sigma_b2: Array, start: Array) -> Analysis:
        status, point, error = jax.vmap(one)(sigma_w2, sigma_b2, start)
        return _analysis(activation, table, status, point, error, sigma_w2, sigma_b2)

    return in_parts(part, sigma_w2, sigma_b2, start)


def _analysis(
    activation: Activation,
    table: Table,
    status: Array,
    point: LengthFixedPoints,
    moment_error: Array,
    sigma_w2: Array,
    sigma_b2: Array,
) -> Analysis:
    """The analysis of lengths whose fate `_settled` knows."""
    q = point.q_star
    diverges, neutral = status == Status.DIVERGES, status == Status.NEUTRAL
    collapses_algebraically = status == Status.COLLAPSES_ALGEBRAICALLY
    vanished = q == 0
    # φ is a± x: no length q* > 0 is distinguished.
    straight = vanished | diverges | neutral
    usable = jnp.where(jnp.isnan(q) | vanished, 1, q)
    c_star, chi_c = correlation_fixed_point(
        activation, usable, sigma_w2, sigma_b2, jnp.where(straight, 0, point.chi1)
    )
    # C(c) > c for c < 1 where the two slopes differ, and C(c) = c where they do not.
    bent = jnp.where(diverges, table.infinity.bent, table.zero.bent)
    bent &= ~collapses_algebraically  # the rest of φ decays no faster than the length
    power = jnp.where(diverges, table.infinity.power, 1)
    c_star = jnp.where(straight, jnp.where(bent, 1.0, jnp.nan), c_star)
    chi_c = jnp.where(straight, jnp.where(power > 0, 1, jnp.nan), chi_c)
    ordered = ~straight & (c_star == 1)
    q_exponent, q_amplitude = approach_of_length(
        activation,
        table,
        q,
        sigma_w2,
        at_zero=collapses_algebraically,
        elsewhere=status == Status.ALGEBRAIC,
    )
    c_exponent, c_amplitude = approach_of_correlation(
        activation,
        table,
        usable,
        sigma_w2,
        point.chi1,
        chi_c,
        diverges=diverges,
        near_zero=(status == Status.COLLAPSES) | neutral,
        unknown=collapses_algebraically,
    )
    values = {
        "q_star": q,
        "chi1": point.chi1,
        "chi_par": point.chi_par,
        "c_star": c_star,
        "chi_c": chi_c,
        "xi_q": point.xi_q,
        "xi_c": jnp.where(ordered, point.xi_grad, depth_scale(chi_c)),
        "xi_grad": point.xi_grad,
        "q_exponent": q_exponent,
        "q_amplitude": q_amplitude,
        "c_exponent": c_exponent,
        "c_amplitude": c_amplitude,
        "q_error": point.q_error,
        "c_error": _error_of_correlation(c_star, chi_c, point, moment_error),
    }
    unknown = (status == Status.OSCILLATES) | (status == Status.OUT_OF_RANGE)
    blanked = {name: jnp.where(unknown, jnp.nan, value) for name, value in values.items()}
    return Analysis(status=status, **blanked)


def _excess(table: Table, q: Array, sigma_w2: Array, sigma_b2: Array) -> tuple[Array, Array, Array]:
    """Return V(q)/q - 1, its derivative by log q, and the size of its terms."""
    near, bias = table.at(q), sigma_b2 / q
    return (
        near.excess(near.ratio, sigma_w2) + bias,
        sigma_w2 * (near.gain - near.ratio) - bias,
        near.excess_at_limit(sigma_w2) + sigma_w2 * near.sizes[0] + bias,
    )


class _Lengths(NamedTuple):
    """All fixed points of one length map, q* = 0 first; absent ones have a stability of ABSENT."""

    points: LengthFixedPoints
    moment_error: Float[Array, " points"]  # of E[φ²], relative
    neutral: Array  # whether every q is a fixed point


def _length_at(activation: Activation, table: Table, sigma_w2: Array, sigma_b2: Array) -> _Lengths:
    held = jax.lax.stop_gradient((table, sigma_w2, sigma_b2))
    dtype = sigma_w2.dtype
    roots = sign_changes(lambda t: _excess(held[0], jnp.exp(t), *held[1:]), Table.scan(dtype))
    root = jnp.where(roots.before == 0, 1, jnp.exp(roots.x))
    q_star = jax.vmap(lambda q: implicit(_length_equation, (table, sigma_w2, sigma_b2), q))(root)
    near = jax.vmap(functools.partial(averages_at, activation, table))(q_star)
    chi1, chi_par = (sigma_w2 * (near.limit + x) for x in (near.dphi2, near.gain))
    xi_grad, xi_q = (
        depth_scale_near_1(chi, near.excess(x, sigma_w2))
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


def _error_of_length(
    table: Table, q: Array, sigma_w2: Array, sigma_b2: Array
) -> tuple[Array, Array]:
    """Return an estimated error of q*, absolute, and that of E[φ²] there, relative.

    The error of V(q)/q, times the response of q* to it.
    """
    near, slope = jax.jvp(table.at, (q,), (jnp.ones_like(q),))
    eps = jnp.finfo(q.dtype).eps
    of_moment = table.error_at(q)
    straight = sigma_w2 * near.limit
    terms = jnp.abs(straight - 1) + sigma_w2 * near.sizes[0] + sigma_b2 / q
    # A limit that is a power of 2 multiplies σ_w² without rounding, and others do not.
    exact = jnp.frexp(near.limit)[0] == 0.5
    error = sigma_w2 * of_moment + 4 * eps * terms + jnp.where(exact, 0, eps * straight)
    away = jnp.abs(near.excess(near.gain, sigma_w2))
    bend = sigma_w2 * q * jnp.abs(slope.gain)
    # Where the maps touch, the square root: (q - q*)² V''/2 is the error.
    linear, root = (
        jnp.where(x > 0, y / jnp.where(x > 0, x, 1), jnp.inf)
        for x, y in ((away, error), (bend, 2 * error))
    )
    by_search = 4 * eps * jnp.maximum(jnp.abs(jnp.log(q)), 1)
    relative = jnp.minimum(linear, jnp.sqrt(root)) + by_search
    return relative * q, of_moment / jnp.abs(near.limit + near.ratio) + 16 * eps


def _settled(
    table: Table, lengths: _Lengths, sigma_w2: Array, sigma_b2: Array, start: Array
) -> tuple[Array, LengthFixedPoints, Array]:
    """Return the status, the fixed point, and E[φ²]'s error, of the length from ``start``."""
    points = lengths.points
    present = (points.stability != Stability.ABSENT).at[0].set(True)
    excess, _, size = _excess(table, start, sigma_w2, sigma_b2)
    up = jnp.where(present & (points.q_star >= start), points.q_star, jnp.inf)
    down = jnp.where(present & (points.q_star <= start), points.q_star, -1)
    rises = ~(excess <= 0)  # an overflow counts as large
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
        [lengths.neutral, beyond, diverges, at.chi_par < -1, (index == 0) & slow, index == 0, slow],
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
    unchanged = LengthFixedPoints(
        q_star=start,
        chi1=one,
        chi_par=one,
        xi_q=never,
        xi_grad=never,
        stability=at.stability,
        q_error=jnp.zeros_like(start),
    )
    at = jax.tree.map(lambda x, y: jnp.where(lengths.neutral, x, y), unchanged, at)
    chi1, chi_par = sigma_w2 * table.infinity.dphi2, sigma_w2 * table.infinity.gain
    divergent = LengthFixedPoints(
        q_star=jnp.full_like(start, jnp.nan),
        chi1=chi1,
        chi_par=chi_par,
        xi_q=depth_scale(chi_par),
        xi_grad=depth_scale(chi1),
        stability=at.stability,
        q_error=jnp.full_like(start, jnp.nan),
    )
    at = jax.tree.map(lambda x, y: jnp.where(status == Status.DIVERGES, x, y), divergent, at)
    return status.astype(jnp.int8), at, lengths.moment_error[index]


def _error_of_correlation(
    c_star: Array, chi_c: Array, length: LengthFixedPoints, moment_error: Array
) -> Array:
    """Return an estimated error of c*: that of C, by E[φ²] and q*, times the response of c*."""
    away = jnp.abs(1 - chi_c)
    of_map = moment_error + length.q_error / jnp.where(length.q_star > 0, length.q_star, 1)
    error = of_map / jnp.where(away > 0, away, 1)
    error = jnp.where(jnp.isnan(c_star), jnp.nan, jnp.where(c_star == 1, 0, error))
    return jax.lax.stop_gradient(error)
