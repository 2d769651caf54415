"""Singular values of the end-to-end Jacobian of a wide network: moments, mean, edges.

J = D^L W^L … D^1 W^1, with D^l = diag φ'(z^l), at infinite width. The law of the squared singular
values λ = s² follows from that of one layer's φ'(z)², z ~ N(0, q), by the equation (*) of
`_jacobian_law` (Pennington, Schoenholz & Ganguli 2017, arXiv:1711.04735; 2018, arXiv:1802.09979).
Its density is in `spectral_density`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc
from jaxtyping import Array, ArrayLike, Float

from gradflow import activations, gaussian
from gradflow._checks import check_count, check_scale
from gradflow._roots import bisect
from gradflow.activations import Activation, ActivationLike
from gradflow.errors import InputError
from gradflow.theory._jacobian_law import Layers, SlopeLaw, as_layers, on_negative_axis

__all__ = ["SlopeLaw", "Support", "mean_and_variance", "mean_singular_value", "moments"]
__all__ += ["slope_law", "support"]


def slope_law(activation: ActivationLike, q: ArrayLike) -> SlopeLaw:
    """Return the law of φ'(z)², z ~ N(0, q).

    Parameters
    ----------
    activation
        φ, by name or as an `Activation`.
    q
        The variance of the pre-activations, > 0, a scalar.

    Returns
    -------
    SlopeLaw
        Atoms where φ is straight between its kinks, quadrature nodes elsewhere; of q's dtype.

    Raises
    ------
    InputError
        If q is not a finite number above 0 (seen outside jit only).
    """
    phi = activations.get(activation)
    check_scale("q", q)
    if not isinstance(q, jax.core.Tracer) and not np.all(np.asarray(q) > 0):
        raise InputError(f"q is {q!r}; it is a finite number above 0")
    q = jnp.asarray(q, jnp.result_type(q, 0.0))
    edges = np.array([-np.inf, *sorted(phi.kinks), np.inf])
    straight = [_slope_if_straight(phi, *ends) for ends in zip(edges[:-1], edges[1:], strict=True)]
    atoms: dict[float, Array] = {}
    for index, slope in enumerate(straight):
        if slope is not None:
            mass = _below(edges[index + 1], q) - _below(edges[index], q)
            if edges[index] > 0:  # the difference of upper tails keeps its digits
                mass = _below(-edges[index], q) - _below(-edges[index + 1], q)
            atoms[slope**2] = atoms.get(slope**2, jnp.zeros((), q.dtype)) + mass
    values = jnp.asarray(list(atoms), q.dtype)
    weights = jnp.stack([*atoms.values(), jnp.zeros((), q.dtype)])[:-1]
    if all(slope is not None for slope in straight):
        return SlopeLaw(values, weights, len(atoms))
    x, weight = gaussian.nodes(q, kinks=phi.kinks)
    curved = jnp.asarray([slope is None for slope in straight])
    piece = jnp.searchsorted(jnp.asarray(edges[1:-1], q.dtype), x)
    weight = jnp.where(curved[piece], weight, 0)
    # The weights of all pieces add up to 1, but for rounding.
    return SlopeLaw(
        jnp.concatenate([values, phi.derivative(x) ** 2]),
        jnp.concatenate([weights, weight]),
        len(atoms),
    )


def _slope_if_straight(phi: Activation, low: float, high: float) -> float | None:
    """Return φ' if it is constant between two kinks."""
    ends = np.array(
        [low if np.isfinite(low) else high - 20, high if np.isfinite(high) else low + 20]
    )
    if not np.isfinite(low) and not np.isfinite(high):
        ends = np.array([-20.0, 20.0])
    inside = ends[0] + (ends[1] - ends[0]) * np.linspace(0.02, 0.98, 13)
    with jax.ensure_compile_time_eval():
        slopes = phi.derivative(jnp.asarray(inside))
    if isinstance(slopes, jax.core.Tracer):
        return None
    values = np.asarray(slopes)
    return float(values[0]) if np.ptp(values) == 0 else None


def _below(x: float, q: Array) -> Array:
    """P(z < x), z ~ N(0, q)."""
    if np.isinf(x):
        return jnp.full_like(q, float(x > 0))
    return erfc(-x / jnp.sqrt(2 * q)) / 2


# Moments ------------------------------------------------------------------------------------------


def mean_and_variance(
    law: SlopeLaw, sigma_w2: ArrayLike, depth: int, weights: str = "gaussian"
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the mean of the squared singular values, and their variance over the mean squared.

    Parameters
    ----------
    law
        Of φ'²: `slope_law`.
    sigma_w2
        σ_w² > 0: weights of variance σ_w²/fan_in, or √σ_w² times an orthogonal matrix.
    depth
        L >= 1, in layers.
    weights
        ``"gaussian"`` or ``"orthogonal"``.

    Returns
    -------
    mean, relative_variance
        m₁ = (σ_w² E φ'²)^L, and L (E φ'⁴/(E φ'²)² - 1 + γ), γ = 1 for Gaussian weights, 0 for
        orthogonal ones.

    Raises
    ------
    InputError
        If an argument is out of range.

    References
    ----------
    Pennington, Schoenholz & Ganguli 2017, arXiv:1711.04735, eqs. 16-18.
    """
    layers = as_layers(law, sigma_w2, depth, weights)
    mu1, mu2 = _raw_moments(law, 2)
    mean = jnp.exp(layers.depth * (layers.log_sigma_w2 + jnp.log(mu1)))
    return mean, layers.depth * (mu2 / mu1**2 - 1 + layers.gaussian)


def _raw_moments(law: SlopeLaw, count: int) -> Float[Array, " count"]:
    powers = law.values[None, :] ** jnp.arange(1, count + 1, dtype=law.values.dtype)[:, None]
    return jnp.sum(powers * law.weights[None, :], axis=1)


def moments(
    law: SlopeLaw, sigma_w2: ArrayLike, depth: int, weights: str = "gaussian", *, count: int = 6
) -> Float[Array, " count"]:
    """Return the moments E λ, E λ², … of the squared singular values.

    Parameters
    ----------
    law, sigma_w2, depth, weights
        As for `mean_and_variance`.
    count
        The number of moments, >= 1.

    Returns
    -------
    Array
        Shape (count,).

    Raises
    ------
    InputError
        If an argument is out of range.

    Notes
    -----
    By Lagrange's formula from (*), with (z/μ₁) B(z) the inverse series of ψ,

        m_k = (σ_w² μ₁)^{Lk} [z^{k-1}] (B(z) (1 + z)^{1-γ})^{-Lk} (1 + z)^k/k,

    for a linear network with Gaussian weights the Fuss-Catalan numbers.
    """
    layers = as_layers(law, sigma_w2, depth, weights)
    count = check_count("count", count)
    mu = _raw_moments(law, count)
    # ψ(u) = z: with t = μ₁ u, z/t = Σ_j r_j t^j, r_j = μ_{j+1}/μ₁^{j+1}.
    ratio = mu / mu[0] ** jnp.arange(1, count + 1, dtype=mu.dtype)
    inverse = jnp.stack(
        [_power(ratio, -float(n))[n - 1] / n for n in range(1, count + 1)]
    )  # t = Σ_n inverse_n z^n
    log_scale = layers.depth * (layers.log_sigma_w2 + jnp.log(mu[0]))
    one_plus_z = jnp.zeros(count, mu.dtype).at[:2].set(1)
    # Each layer's factor first, which is near 1 where φ is nearly straight; then its powers.
    layer = _product(_power(inverse, -1.0), _power(one_plus_z, layers.gaussian - 1.0))
    moments = []
    for k in range(1, count + 1):
        power = _product(_power(layer, float(layers.depth * k)), _power(one_plus_z, float(k)))
        moments.append(jnp.exp(k * log_scale) * power[k - 1] / k)
    return jnp.stack(moments)


def _product(a: Float[Array, " n"], b: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return the product of two power series."""
    return jnp.stack([jnp.sum(a[: n + 1] * b[: n + 1][::-1]) for n in range(a.size)])


def _power(series: Float[Array, " n"], exponent: float) -> Float[Array, " n"]:
    """Return a power series, whose first coefficient is 1, to a power (Miller's recurrence)."""
    out = [jnp.ones((), series.dtype)]
    for n in range(1, series.size):
        total = sum((exponent * j - (n - j)) * series[j] * out[n - j] for j in range(1, n + 1))
        out.append(jnp.asarray(total / n))
    return jnp.stack(out)


def mean_singular_value(
    law: SlopeLaw, sigma_w2: ArrayLike, depth: int = 1, weights: str = "gaussian"
) -> Float[Array, ""]:
    """Return the mean E s of the singular values; not their root mean square √m₁.

    Glorot & Bengio 2010 report such means: about 0.8 a layer with their weights, 0.5 with the
    standard ones; 8/(3π) and 8/(3π√3) in the linear regime.

    Parameters
    ----------
    law, sigma_w2, depth, weights
        As for `mean_and_variance`.

    Returns
    -------
    Array
        A scalar.

    Raises
    ------
    InputError
        If an argument is out of range.

    Notes
    -----
    √λ = (1/π) ∫ λ/(λ + t) t^{-1/2} dt, whose average needs z on the negative axis alone, where (*)
    gives t for each s = -u. In log s the integrand is analytic and falls off exponentially.
    """
    return _mean_singular_value(as_layers(law, sigma_w2, depth, weights))


@jax.jit
def _mean_singular_value(layers: Layers) -> Array:
    dtype = layers.law.values.dtype
    middle = -jnp.log(jnp.sum(layers.law.values * layers.law.weights))
    step = 0.125
    log_s = middle + jnp.asarray(np.arange(-90, 90, step), dtype)
    log_t, slope, minus_z = jax.vmap(functools.partial(on_negative_axis, layers))(log_s)
    terms = minus_z * jnp.exp(log_t / 2) * -slope
    return jnp.sum(jnp.where(jnp.isfinite(terms), terms, 0)) * step / math.pi


# Support ------------------------------------------------------------------------------------------


class Support(NamedTuple):
    """Atoms and edges of the law of the squared singular values.

    Attributes
    ----------
    atoms, masses
        Values λ that a fraction of all squared singular values have exactly, and the fraction; both
        of shape (atoms,), with the mass 0 if unused. The first is λ = 0.
    lower, upper
        Edges of the continuous part; NaN if there is none.
    """

    atoms: Float[Array, " atoms"]
    masses: Float[Array, " atoms"]
    lower: Float[Array, ""]
    upper: Float[Array, ""]


def support(law: SlopeLaw, sigma_w2: ArrayLike, depth: int, weights: str = "gaussian") -> Support:
    """Return the atoms and the edges of the law of λ = s².

    Parameters
    ----------
    law, sigma_w2, depth, weights
        As for `mean_and_variance`.

    Returns
    -------
    Support
        λ, not s; edges are scalars.

    Raises
    ------
    InputError
        If an argument is out of range.

    Notes
    -----
    An atom of φ'² at a with mass m becomes, for orthogonal weights, one at (σ_w² a)^L with mass
    1 - L(1 - m), if that is positive (Bercovici & Voiculescu 1998); Gaussian weights keep the one
    at 0 alone. The edges are where dλ/du = 0 on the real axis.
    """
    layers = as_layers(law, sigma_w2, depth, weights)
    at, mass = law.values[: law.atoms], law.weights[: law.atoms]
    zero = jnp.sum(jnp.where(at == 0, mass, 0))
    isolated = jnp.maximum(1 - layers.depth * (1 - mass), 0) * (1 - layers.gaussian)
    isolated = jnp.where(at == 0, 0, isolated)
    values = jnp.exp(layers.depth * (layers.log_sigma_w2 + jnp.log(jnp.where(at == 0, 1, at))))
    atoms = jnp.append(0, jnp.where(isolated > 0, values, 0))
    masses = jnp.append(zero, isolated)
    lower, upper = _edges(layers)
    nothing = jnp.sum(masses) > 1 - 1e-12
    return Support(
        atoms, masses, jnp.where(nothing, jnp.nan, lower), jnp.where(nothing, jnp.nan, upper)
    )


# Points between two poles at which λ(u) is evaluated, finer towards both.
_FINE = np.concatenate([10.0 ** np.linspace(-14, math.log10(0.5), 600), [0.5]])
_WAY = np.unique(np.concatenate([_FINE, 1 - _FINE]))
_FAR = 60.0  # a distance in log u that is as good as infinite


def _edges(layers: Layers) -> tuple[Array, Array]:
    """Return the lower and the upper end of the continuous part.

    Outside the support, λ decreases with u (Silverstein & Choi 1995). So u runs up from 0, over the
    poles of isolated atoms, to the first turn of λ; and down from infinity likewise.
    """
    law = layers.law
    there = (law.weights > 0) & (law.values > 0)
    ends = []
    for direction, absent, extreme in ((1, 0.0, jnp.max), (-1, jnp.inf, jnp.min)):
        points, nodes = jnp.split(jnp.where(there, law.values, absent), [law.atoms])
        if nodes.size:
            points = jnp.append(points, extreme(nodes))
        continuous = jnp.arange(points.size) >= law.atoms
        ends.append(_end(layers, points, continuous, direction))
    return jnp.exp(ends[1]), jnp.exp(ends[0])


def _end(layers: Layers, points: Array, continuous: Array, direction: int) -> Array:
    """Return log λ where the continuous part ends, coming from u = 0 or (-1) from infinity."""
    order = jnp.argsort(points, descending=direction > 0)
    poles, continuous = -jnp.log(points[order]), continuous[order]
    start = poles[0] - direction * _FAR
    edge, done = jnp.asarray(-jnp.inf, points.dtype), jnp.asarray(False)
    for pole, of_continuous in zip(poles, continuous, strict=True):
        real_pole = jnp.isfinite(pole)
        stop = jnp.where(real_pole, pole, start + direction * _FAR)
        turn, turned = _first_turn(layers, start + jnp.asarray(_WAY, stop.dtype) * (stop - start))
        at_pole = layers.depth * (layers.log_sigma_w2 - stop)
        ends = turned | (of_continuous & real_pole)
        edge = jnp.where(ends & ~done, jnp.where(turned, turn, at_pole), edge)
        done |= ends
        start = stop
    return edge


def _first_turn(layers: Layers, log_u: Float[Array, " points"]) -> tuple[Array, Array]:
    """Return log λ at its first turn along points of u, and whether it turns.

    λ decreases up to the turn; -inf if it does so nowhere.
    """

    def inside(log_u: Array) -> Array:
        _, slope, real = _real_log_lambda(layers, log_u)
        return ~real | (slope >= 0)

    wrong = jax.vmap(inside)(log_u)
    at = jnp.argmax(wrong)
    steps = int(jnp.finfo(log_u.dtype).nmant) + 8
    low, _ = bisect(inside, log_u[jnp.maximum(at - 1, 0)], log_u[at], steps=steps)
    value = _real_log_lambda(layers, low)[0]
    return jnp.where(at == 0, -jnp.inf, value), wrong[at]


def _real_log_lambda(layers: Layers, log_u: Array) -> tuple[Array, Array, Array]:
    """Return log|λ(u)| for u > 0, its slope by log u, and whether λ > 0 on the principal sheet."""
    z, one_z, dz = layers.psi(jnp.exp(log_u))
    value = -layers.log_of_one_over(log_u, jnp.log(jnp.abs(z)), jnp.log(jnp.abs(one_z)))
    slope = -layers.slope(z, one_z, dz)
    n, g = layers.depth, layers.gaussian
    # Where z and 1 + z are negative, their logarithms have a phase of -π each.
    below_0, below_1 = (z < 0).astype(int), (one_z < 0).astype(int)
    phase = (n - 1) * (below_0 - below_1) + g * n * below_1
    return value, slope, phase == 0
