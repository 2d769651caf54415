"""Criticality: the weights and biases at which squared gradients neither shrink nor grow, χ₁ = 1.

At a length q, χ₁ = 1 needs σ_w² = 1/E[φ'²], and q stays where it is if σ_b² = q - E[φ²]/E[φ'²].
So q parametrises the critical line, the 'edge of chaos' (Poole et al. 2016, arXiv:1606.05340;
Schoenholz et al. 2017, arXiv:1611.01232); given σ_b² or σ_w², the critical points are the roots in
q of one function.

On the line, correlations approach 1 only algebraically. With δ = 1 - c,

    C(c) = 1 - δ + a δ²       if φ' is continuous:   a = σ_w² q* E[φ''²]/2,  δ_l → 1/(a l)
    C(c) = 1 - δ + b δ^{3/2}  if φ' jumps:           δ_l → 4/(b l)²

with b = (2/3) σ_w² √(q*/π) Σ_k jump_k² p(k), p the density of N(0, q*): u and v lie on different
sides of a kink with probability p(k) E|u - v| = 2 p(k) √(q* δ/π). For ReLU b = 2√2/(3π) (Cho & Saul
2009).

Whether χ∥ = 1 too sets the class of an activation (Roberts, Yaida & Hanin 2022, 'The Principles of
Deep Learning Theory', ch. 5).
"""

import enum
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from gradflow import activations, gaussian
from gradflow._arguments import as_grids, as_numbers
from gradflow._checks import check_scale
from gradflow._programs import program
from gradflow._roots import Roots, Valued, implicit, rounding, sign_changes
from gradflow.activations import Activation, ActivationLike
from gradflow.errors import InputError
from gradflow.theory._correlations import correlation_curvature
from gradflow.theory._depth_scales import depth_scale
from gradflow.theory._moment_table import (
    Averages,
    Table,
    averages_at,
    over_grid,
    seconds_over_grid,
)
from gradflow.theory.fixed_points import Analysis, Status, analyse

if TYPE_CHECKING:
    import xarray

__all__ = ["CriticalPoints", "HalfStable", "Phase", "UniversalityClass", "critical_at_infinity"]
__all__ += ["critical_line", "critical_points", "half_stable_points", "phase", "phase_diagram"]
__all__ += ["universality_class"]


# A root that rounding may move by more than this fraction of q counts as absent.
_UNSEEN = 0.01
# A relative change of E[φ²]/q that is more than rounding.
_SEEN = 1e-12
# A length beyond all fixed points that a float can resolve.
_LARGE = 1e30


class CriticalPoints(NamedTuple):
    """Points with χ₁ = 1; the last axis counts them, from the smallest q*, NaN where there is none.

    ``q_star`` alone is NaN where every q is critical (ReLU). The approach of c to 1 at the point is
    1/(coefficient·l) for exponent 2, 4/(coefficient·l)² for exponent 3/2; NaN at q* = 0.
    """

    q_star: Float[Array, "*grid points"]
    sigma_w2: Float[Array, "*grid points"]
    sigma_b2: Float[Array, "*grid points"]
    chi_par: Float[Array, "*grid points"]  # χ∥ = V'(q*)
    xi_q: Float[Array, "*grid points"]  # in layers
    exponent: Float[Array, "*grid points"]
    coefficient: Float[Array, "*grid points"]


class HalfStable(NamedTuple):
    """Points with χ₁ = χ∥ = 1 at q* > 0, NaN where there is none."""

    q_star: Float[Array, " points"]
    sigma_w2: Float[Array, " points"]
    sigma_b2: Float[Array, " points"]


class Phase(enum.IntEnum):
    """The phases of a deep network."""

    ORDERED = 0  # χ₁ < 1: gradients vanish, c* = 1
    CRITICAL = 1  # χ₁ = 1
    CHAOTIC = 2  # χ₁ > 1: gradients explode, c* < 1
    DIVERGENT = 3  # q grows without limit, and gradients explode with it: χ₁ → a limit above 1
    UNKNOWN = 4  # q oscillates, leaves the float's range, or grows without a known limit of χ₁


class UniversalityClass(enum.Enum):
    """The behaviour of signals at criticality (Roberts, Yaida & Hanin 2022, ch. 5)."""

    SCALE_INVARIANT = "scale-invariant"  # every q is a fixed point
    K_STAR_ZERO = "K* = 0"  # q → 0 as 1/l
    HALF_STABLE = "half-stable"  # χ₁ = χ∥ = 1 at a q* > 0 that attracts from one side
    NONE = "none"  # χ₁ = χ∥ = 1 at no q


# The critical line --------------------------------------------------------------------------------


def critical_line(activation: ActivationLike, q: ArrayLike) -> CriticalPoints:
    """Return the critical point with q* = q, for each q > 0.

    Parameters
    ----------
    activation
        φ; static under jit.
    q
        > 0, of any shape.

    Returns
    -------
    CriticalPoints
        With one point for each q; NaN where it would need σ_b² < 0. σ_b² is a difference: its
        relative error is about ε q/σ_b².

    Raises
    ------
    InputError
        If a q is negative or not finite (seen outside jit only); if φ has no Gaussian moments.
    """
    activation = activations.get(activation)
    check_scale("q", q)
    gaussian.check(activation)
    return _line(activation, *as_grids(q=q))


@program("activation", seconds=seconds_over_grid)
def _line(activation: Activation, q: Array) -> CriticalPoints:
    q = q[..., None]
    m = gaussian.some_moments(activation, ("phi2", "dphi2", "x_phi_dphi"), q)
    sigma_w2 = 1 / m["dphi2"]
    sigma_b2 = q - m["phi2"] * sigma_w2
    # A homogeneous activation has 0 there, but for rounding.
    sigma_b2 = jnp.where(jnp.abs(sigma_b2) < 4 * jnp.finfo(q.dtype).eps * q, 0, sigma_b2)
    chi_par = sigma_w2 * m["x_phi_dphi"] / q
    return _points(activation, sigma_b2 >= 0, q, sigma_w2, sigma_b2, chi_par)


def _points(
    activation: Activation, present: Array, q: Array, sigma_w2: Array, sigma_b2: Array, par: Array
) -> CriticalPoints:
    """Critical points, NaN where they are not present."""
    curved = jnp.where(q > 0, q, 1)
    exponent, coefficient = correlation_curvature(activation, curved, sigma_w2)
    approach = present & (q > 0)
    return CriticalPoints(
        *(jnp.where(present, v, jnp.nan) for v in (q, sigma_w2, sigma_b2, par, depth_scale(par))),
        *(jnp.where(approach, v, jnp.nan) for v in (exponent, coefficient)),
    )


# Critical points for a given scale ----------------------------------------------------------------


def critical_points(
    activation: ActivationLike,
    *,
    sigma_b2: ArrayLike | None = None,
    sigma_w2: ArrayLike | None = None,
) -> CriticalPoints:
    """Return all critical points with the given σ_b², or the given σ_w².

    Parameters
    ----------
    activation
        φ; static under jit.
    sigma_b2, sigma_w2
        One of the two, of any shape. With σ_b² = 0, an activation with φ(0) = 0 has one at q* = 0,
        the end of the line.

    Returns
    -------
    CriticalPoints
        Those with a q*, and none where rounding would decide it (below 1e-13 or so, other than 0).
        Where every q is critical (ReLU, σ_b² = 0, σ_w² = 2) one point, whose q* is NaN. Where q
        grows without limit, `critical_at_infinity` has the σ_w² of χ₁ → 1.

    Raises
    ------
    InputError
        If not exactly one scale is given, or it is negative or not finite (seen outside jit only);
        if φ has no Gaussian moments.
    """
    activation = activations.get(activation)
    if (sigma_b2 is None) == (sigma_w2 is None):
        count = "none is" if sigma_b2 is None else "both are"
        raise InputError(f"of sigma_b2 and sigma_w2, {count} given; give one of them")
    given: dict[str, Any] = (
        {"sigma_b2": sigma_b2} if sigma_b2 is not None else {"sigma_w2": sigma_w2}
    )
    ((name, value),) = given.items()
    check_scale(name, value)
    gaussian.check(activation)
    return _critical_points(activation, name, *as_grids(**given))


@program("activation", "given")
def _critical_points(activation: Activation, given: str, value: Array) -> CriticalPoints:
    table = Table.of(activation, value.dtype)
    solve = _for_sigma_b2 if given == "sigma_b2" else _for_sigma_w2
    return over_grid(functools.partial(solve, activation, table), value)


def _for_sigma_b2(activation: Activation, table: Table, sigma_b2: Array) -> CriticalPoints:
    def surplus(theta: tuple[Table, Array], q: Array) -> tuple[Array, Array]:
        """(q - E[φ²]/E[φ'²] - σ_b²)/q."""
        table, sigma_b2 = theta
        near, bias = table.at(q), sigma_b2 / q
        slope = near.limit + near.dphi2
        size = (near.sizes[1] + near.sizes[0]) / slope + bias
        return (near.dphi2 - near.ratio) / slope - bias, size

    q, roots = _solve(surplus, (table, sigma_b2))
    sloping = table.zero.dphi2 > 0  # else no finite σ_w² is critical at 0
    origin = _Origin(
        present=(sigma_b2 == 0) & ((table.square_at_zero == 0) & sloping | roots.neutral),
        any_q=(sigma_b2 == 0) & roots.neutral,
        sigma_w2=1 / table.zero.dphi2,
    )
    return _assemble(activation, table, origin, q, roots, sigma_b2)


def _for_sigma_w2(activation: Activation, table: Table, sigma_w2: Array) -> CriticalPoints:
    def surplus(theta: tuple[Table, Array], q: Array) -> tuple[Array, Array]:
        """1 - σ_w² E[φ'²]."""
        table, sigma_w2 = theta
        near = table.at(q)
        size = near.excess_at_limit(sigma_w2) + sigma_w2 * near.sizes[1]
        return -near.excess(near.dphi2, sigma_w2), size

    q, roots = _solve(surplus, (table, sigma_w2))
    at_end = jnp.abs(sigma_w2 * table.zero.dphi2 - 1) < 8 * jnp.finfo(q.dtype).eps
    at_origin = table.square_at_zero == 0
    origin = _Origin(
        present=(at_end | roots.neutral) & at_origin,
        any_q=roots.neutral & at_origin,
        sigma_w2=sigma_w2,
    )
    return _assemble(activation, table, origin, q, roots, None)


class _Origin(NamedTuple):
    """The critical point at q* = 0, the end of the line, or that of every q."""

    present: Array
    any_q: Array  # whether it is that of every q
    sigma_w2: Array


def _solve(
    surplus: Callable[[Any, Array], tuple[Array, Array]], theta: tuple[Table, Array]
) -> tuple[Array, Roots]:
    """Return the roots q of surplus(θ, q), differentiable by θ.

    The surplus is a value and its size. Roots that rounding alone makes count as absent.
    """
    held = jax.lax.stop_gradient(theta)

    def valued(t: Array) -> Valued:
        value, slope, size = jax.jvp(
            lambda t: surplus(held, jnp.exp(t)), (t,), (jnp.ones_like(t),), has_aux=True
        )
        return value, slope, size

    dtype = theta[1].dtype
    roots = sign_changes(valued, Table.scan(dtype))
    _, slope, size = jax.vmap(valued)(roots.x)
    touching = roots.before == roots.after
    seen = touching | (rounding(dtype) * size < _UNSEEN * jnp.abs(slope))
    roots = roots._replace(before=jnp.where(seen, roots.before, 0))
    q = jnp.where(roots.before == 0, 1, jnp.exp(roots.x))
    return jax.vmap(lambda q: implicit(lambda t, q: surplus(t, q)[0], theta, q))(q), roots


def _assemble(
    activation: Activation,
    table: Table,
    origin: _Origin,
    q: Array,
    roots: Roots,
    sigma_b2: Array | None,
) -> CriticalPoints:
    """Critical points, that at the origin first, and absent ones last."""
    near = jax.vmap(functools.partial(averages_at, activation, table))(q)
    slope, gain = near.limit + near.dphi2, near.limit + near.gain
    biases = _bias(near, q) if sigma_b2 is None else jnp.full_like(q, sigma_b2)
    present = jnp.append(origin.present, (roots.before != 0) & ~roots.neutral & (biases >= 0))
    points = _points(
        activation,
        present,
        jnp.append(jnp.where(origin.any_q, 1.0, 0.0), q),
        jnp.append(origin.sigma_w2, 1 / slope),
        jnp.append(0, biases),
        jnp.append(1, gain / slope),
    )
    first = jnp.where(origin.any_q, jnp.nan, 0.0)
    points = points._replace(q_star=points.q_star.at[0].set(first))
    order = jnp.argsort(~present, stable=True)
    points = jax.tree.map(lambda leaf: leaf[order], points)
    return points._replace(q_star=jnp.where(jnp.sort(~present), jnp.nan, points.q_star))


def _bias(near: Averages, q: Array) -> Array:
    """Return q - E[φ²]/E[φ'²], the σ_b² of a critical point."""
    return q * (near.dphi2 - near.ratio) / (near.limit + near.dphi2)


# Where q grows without limit ----------------------------------------------------------------------


def critical_at_infinity(
    activation: ActivationLike, sigma_b2: ArrayLike = 0.0, *, start: ArrayLike | None = None
) -> Float[Array, "*grid"]:
    """Return the σ_w² at which the length grows without limit and χ₁ tends to 1.

    It is 2/(a₊² + a₋²), 2 for ReLU, where φ → a± x far out: V(q) - q then tends to a constant that
    decides whether lengths grow, and the critical points of finite q* end.

    Parameters
    ----------
    activation
        φ; static under jit.
    sigma_b2
        σ_b², >= 0, of any shape.
    start
        q of the first layer, > 0; by default, beyond all fixed points.

    Returns
    -------
    Array
        σ_w², of the shape that they broadcast to; NaN where lengths do not grow without limit
        there, or E[φ'²] has no limit.

    Raises
    ------
    InputError
        If an argument is out of range (seen outside jit only); if φ has no Gaussian moments.
    """
    activation = activations.get(activation)
    check_scale("sigma_b2", sigma_b2)
    if start is not None:
        check_scale("start", start, positive=True)
    gaussian.check(activation)
    begin = _LARGE if start is None else start
    return _critical_at_infinity(activation, *as_grids(sigma_b2=sigma_b2, start=begin))


@program("activation", seconds=seconds_over_grid)
def _critical_at_infinity(activation: Activation, sigma_b2: Array, start: Array) -> Array:
    slope = Table.of(activation, sigma_b2.dtype).infinity.dphi2
    usable = jnp.isfinite(slope) & (slope > 0)
    sigma_w2 = jnp.broadcast_to(1 / jnp.where(usable, slope, 1), sigma_b2.shape)
    status = analyse(activation, sigma_w2, sigma_b2, start=start).status
    return jnp.where(usable & (status == Status.DIVERGES), sigma_w2, jnp.nan)


def half_stable_points(activation: ActivationLike, dtype: str = "float") -> HalfStable:
    """Return the points with χ₁ = χ∥ = 1 at q* > 0, where E[φ φ''] = 0.

    There the length map touches the line V(q) = q: it attracts from one side, algebraically, and
    repels to the other (Roberts, Yaida & Hanin 2022, section 5.3.4).

    Parameters
    ----------
    activation
        φ; static under jit.
    dtype
        The float type, by name; ``"float"`` is JAX's default.

    Returns
    -------
    HalfStable
        Up to four points, from the smallest q*.

    Raises
    ------
    InputError
        If there is no such activation.
    """
    activation = activations.get(activation)
    return _half_stable_points(activation, jnp.dtype(dtype).name)


@program("activation", "dtype")
def _half_stable_points(activation: Activation, dtype: str) -> HalfStable:
    table = Table.of(activation, jnp.zeros((), dtype).dtype)

    def surplus(theta: tuple[Table, Array], q: Array) -> tuple[Array, Array]:
        """χ∥/χ₁ - 1."""
        near = theta[0].at(q)
        slope = near.limit + near.dphi2
        return (near.gain - near.dphi2) / slope, (near.sizes[2] + near.sizes[1]) / slope

    q, roots = _solve(surplus, (table, jnp.zeros((), dtype)))
    near = jax.vmap(table.at)(q)
    slope, sigma_b2 = near.limit + near.dphi2, _bias(near, q)
    present = (roots.before != 0) & ~roots.neutral & (sigma_b2 >= 0)
    order = jnp.argsort(~present, stable=True)
    return HalfStable(
        *(jnp.where(present, value, jnp.nan)[order] for value in (q, 1 / slope, sigma_b2))
    )


def universality_class(activation: ActivationLike) -> UniversalityClass:
    """Return the class of an activation at criticality, computed in float64.

    Parameters
    ----------
    activation
        φ.

    Returns
    -------
    UniversalityClass
        ``NONE`` where χ₁ = χ∥ = 1 at no q.

    Raises
    ------
    InputError
        If there is no such activation.

    References
    ----------
    Roberts, Yaida & Hanin 2022, 'The Principles of Deep Learning Theory', ch. 5.
    """
    activation = activations.get(activation)
    with jax.enable_x64(True):
        if activation.homogeneous:
            return UniversalityClass.SCALE_INVARIANT
        near = _near_zero(activation, *as_grids(q=[2.0**-10, 2.0**-4]))
        origin, slope, gain = map(np.asarray, near)
        # Where φ is linear up to its kinks (hard_tanh), q decreases visibly only near them.
        nearest = gain[0] if abs(gain[0] / slope - 1) > _SEEN else gain[1]
        if origin == 0 and slope > 0 and nearest < slope:  # q decreases, just above 0
            return UniversalityClass.K_STAR_ZERO
        if not np.all(np.isnan(half_stable_points(activation).q_star)):
            return UniversalityClass.HALF_STABLE
        return UniversalityClass.NONE


@program("activation")
def _near_zero(activation: Activation, q: Array) -> tuple[Array, Array, Array]:
    """Return E[φ²] and E[φ'²] at 0, and E[φ²]/q at each small q."""
    table = Table.of(activation, q.dtype)
    near = jax.vmap(table.at)(q)
    return table.square_at_zero, table.zero.dphi2, near.limit + near.ratio


@program()
def phase(analysis: Analysis) -> Int[Array, "*grid"]:
    """Return the `Phase` of each point of an analysis.

    Parameters
    ----------
    analysis
        Of `fixed_points.analyse`.

    Returns
    -------
    Array
        Of the analysis's shape, int8; ``CRITICAL`` where χ₁ is 1 to rounding.
    """
    return jnp.select(
        [
            jnp.isnan(analysis.chi1),
            jnp.abs(analysis.chi1 - 1) <= rounding(analysis.chi1.dtype),
            analysis.chi1 < 1,
            analysis.status == Status.DIVERGES,
        ],
        [Phase.UNKNOWN, Phase.CRITICAL, Phase.ORDERED, Phase.DIVERGENT],
        Phase.CHAOTIC,
    ).astype(jnp.int8)


_LABELS = {
    "phase": "phase of the network",
    "status": "where the length goes",
    "q_star": "q*, where the length settles",
    "chi1": "χ₁, factor of the mean squared gradient a layer",
    "chi_par": "χ∥, slope of the length map",
    "c_star": "c*, where correlations settle",
    "chi_c": "χ at c*, slope of the correlation map",
    "xi_q": "depth scale of the length ξ_q (layers)",
    "xi_c": "depth scale of correlations ξ_c (layers)",
    "xi_grad": "depth scale of gradients ξ_∇ (layers; < 0: they grow)",
    "critical_sigma_w": "σ_w of the critical line, χ₁ = 1",
    "critical_q_star": "q* on the critical line; inf where q grows without limit",
}


def phase_diagram(
    activation: ActivationLike,
    sigma_w: Float[ArrayLike, " columns"],
    sigma_b: Float[ArrayLike, " rows"],
    *,
    start: float = 1.0,
) -> "xarray.Dataset":
    """Return `fixed_points.analyse` over a grid of σ_w and σ_b, and the critical line.

    Parameters
    ----------
    activation
        φ.
    sigma_w, sigma_b
        Standard deviations (of the weights, times √fan_in), >= 0.
    start
        q of the first layer, > 0.

    Returns
    -------
    xarray.Dataset
        Over (sigma_b, sigma_w): ``phase`` (a `Phase`), ``status`` (a `fixed_points.Status`),
        ``q_star``, ``chi1``, ``c_star``, ``xi_c``, ``xi_grad`` and the other fields of
        `fixed_points.Analysis`; where q grows without limit ``chi1`` and ``xi_grad`` are limits.
        Over (sigma_b, point): ``critical_sigma_w`` and ``critical_q_star``, all critical points of
        that σ_b, NaN where there are fewer; q* is inf where χ₁ tends to 1 as q, from ``start``,
        grows without limit. Computed in float64 also where JAX's x64 is off.

    Raises
    ------
    InputError
        If an argument is negative or not finite, or no row of numbers; if φ has no Gaussian
        moments.
    """
    import xarray  # noqa: PLC0415  (slow to import)

    activation = activations.get(activation)
    axes = {
        name: np.asarray(as_numbers(name, values, float), float)
        for name, values in {"sigma_w": sigma_w, "sigma_b": sigma_b}.items()
    }
    for name, values in axes.items():
        check_scale(name, values)
        if values.ndim != 1 or not values.size:
            raise InputError(f"{name} has the shape {values.shape}; it is a row of numbers")
    with jax.enable_x64(True):
        columns, rows = (values**2 for values in axes.values())
        analysis = analyse(activation, columns[None, :], rows[:, None], start=start)
        line = critical_points(activation, sigma_b2=rows)
        ends = np.asarray(critical_at_infinity(activation, rows, start=start))[:, None]
        weights = np.concatenate([np.asarray(line.sigma_w2), ends], axis=1)
        lengths = np.where(np.isnan(ends), np.nan, np.inf)
        lengths = np.concatenate([np.asarray(line.q_star), lengths], axis=1)
        grid = {"phase": phase(analysis), **analysis._asdict()}
        dims = ("sigma_b", "sigma_w")
        dataset = xarray.Dataset(
            {name: (dims, np.asarray(value)) for name, value in grid.items()}
            | {
                "critical_sigma_w": (("sigma_b", "point"), np.sqrt(weights)),
                "critical_q_star": (("sigma_b", "point"), lengths),
            },
            coords=axes,
            attrs={"activation": activation.name, "start": start},
        )
    dataset.phase.attrs |= {member.name.lower(): int(member) for member in Phase}
    dataset.status.attrs |= {member.name.lower(): int(member) for member in Status}
    for name, label in _LABELS.items():
        dataset[name].attrs["long_name"] = label
    return dataset
