"""Singular values of the end-to-end Jacobian of a wide network, by free probability.

J = D^L W^L … D^1 W^1, with D^l = diag φ'(z^l). At infinite width the matrices are free of each
other, and the law of the eigenvalues λ = s² of J Jᵀ follows from that of one layer's φ'(z)²,
z ~ N(0, q) (Pennington, Schoenholz & Ganguli 2017, arXiv:1711.04735; 2018, arXiv:1802.09979). With

    ψ(u) = E[u d/(1 - u d)],   d = φ'(z)²,

of one layer, and γ = 1 for Gaussian, 0 for Haar-orthogonal weights, z = ψ(u) and

    1/λ = (u/σ_w²)^L ((1 + z)/z)^(L-1) (1 + z)^(-γL)                                          (*)

give z = λ G(λ) - 1, G the Stieltjes transform of the law of λ, whose density is -Im z/(π λ).

How it is solved. (*) in logarithms: no product of L factors is formed. On the negative real axis u
is real and unique. From there λ = |λ| e^{iθ} is turned, θ from π to 0, with Newton's method at each
step: u stays in the lower half-plane, where all logarithms are principal, and no step can end on
another sheet.

The law of d is a set of atoms where φ is straight (ReLU: 0 and 1), and quadrature nodes elsewhere.
"""

import functools
import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc
from jaxtyping import Array, ArrayLike, Float

from gradflow import activations, gaussian
from gradflow._checks import check_count, check_instance, check_scale, unknown_name
from gradflow.activations import Activation
from gradflow.errors import InputError

__all__ = ["WEIGHTS", "Density", "Shares", "SlopeLaw", "Support", "density", "mean_and_variance"]
__all__ += ["mean_singular_value", "moments", "shares", "slope_law", "support", "two_point_law"]

WEIGHTS = ("gaussian", "orthogonal")


class SlopeLaw(eqx.Module):
    """The law of d = φ'(z)², z ~ N(0, q): weighted points.

    Attributes
    ----------
    values, weights
        Shape (points,); the weights add up to 1.
    atoms
        So many of the points, the first, are atoms; the others are nodes of a continuous part.
    """

    values: Float[Array, " points"]
    weights: Float[Array, " points"]
    atoms: int = eqx.field(static=True)


def slope_law(activation: Activation | str, q: ArrayLike) -> SlopeLaw:
    """Return the law of φ'(z)², z ~ N(0, q).

    Parameters
    ----------
    activation
        φ, by name or as an `Activation`.
    q
        The variance of the pre-activations, > 0, a scalar.

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


def two_point_law(p: ArrayLike) -> SlopeLaw:
    """Return the law with φ'² = 1 with probability p, and 0 else: ReLU (p = 1/2), hard_tanh.

    Raises
    ------
    InputError
        If p is not in (0, 1] (seen outside jit only).
    """
    if not isinstance(p, jax.core.Tracer) and not 0 < float(np.asarray(p)) <= 1:
        raise InputError(f"p is {p!r}; it is a probability above 0")
    p = jnp.asarray(p, jnp.result_type(p, 0.0))
    return SlopeLaw(jnp.asarray([0.0, 1.0], p.dtype), jnp.stack([1 - p, p]), 2)


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
    found = np.asarray(slopes)
    return float(found[0]) if np.ptp(found) == 0 else None


def _below(x: float, q: Array) -> Array:
    """P(z < x), z ~ N(0, q)."""
    if np.isinf(x):
        return jnp.full_like(q, float(x > 0))
    return erfc(-x / jnp.sqrt(2 * q)) / 2


class _Layers(eqx.Module):
    """L layers of one law; all of (*) but λ."""

    law: SlopeLaw
    log_sigma_w2: Float[Array, ""]
    depth: int = eqx.field(static=True)
    gaussian: int = eqx.field(static=True)  # γ

    def log_of_one_over(self, log_u: Array, log_z: Array, log_1z: Array) -> Array:
        """Return the logarithm of (*)'s right side, from those of u, z and 1 + z."""
        each = log_u - self.log_sigma_w2
        return self.depth * (each - self.gaussian * log_1z) + (self.depth - 1) * (log_1z - log_z)

    def slope(self, z: Array, one_z: Array, dz: Array) -> Array:
        """Return the derivative of that by log u; dz is that of z."""
        each = 1 - self.gaussian * dz / one_z
        return self.depth * each + (self.depth - 1) * dz * (1 / one_z - 1 / z)

    def psi(self, u: Array) -> tuple[Array, Array, Array]:
        """Return z = ψ(u), 1 + z without its cancellation, and dz/dlog u."""

        def terms(value: Array, weight: Array) -> tuple[Array, Array, Array]:
            scaled = u * value
            pole = 1 / (1 - scaled)
            part = weight * pole
            return scaled * part, part, scaled * part * pole

        nodes = self.law.values, self.law.weights
        if jax.default_backend() != "cpu":
            z, one_z, dz = (jnp.sum(t) for t in terms(*nodes))
            return z, one_z, dz

        # One node after another, for all points at once: a CPU's vector units then work on points.
        def add(sums: tuple[Array, ...], node: tuple[Array, Array]) -> tuple[tuple, None]:
            return tuple(s + t for s, t in zip(sums, terms(*node), strict=True)), None

        (z, one_z, dz), _ = jax.lax.scan(add, (jnp.zeros_like(u),) * 3, nodes, unroll=4)
        return z, one_z, dz


def check(sigma_w2: ArrayLike, depth: int, weights: str) -> None:
    """Raise `InputError` if there is no spectrum of such layers."""
    check_scale("sigma_w2", sigma_w2)
    if not isinstance(sigma_w2, jax.core.Tracer) and not np.all(np.asarray(sigma_w2) > 0):
        raise InputError(f"sigma_w2 is {sigma_w2!r}; it is a finite number above 0")
    check_count("depth", depth)
    if weights not in WEIGHTS:
        raise unknown_name("weights", weights, WEIGHTS)


def _layers(law: SlopeLaw, sigma_w2: ArrayLike, depth: int, weights: str) -> _Layers:
    check_instance("law", law, SlopeLaw, "what slope_law returns")
    check(sigma_w2, depth, weights)
    log = jnp.log(jnp.asarray(sigma_w2, law.values.dtype))
    return _Layers(law, log, depth, int(weights == "gaussian"))


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
    layers = _layers(law, sigma_w2, depth, weights)
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
        How many, >= 1.

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
    layers = _layers(law, sigma_w2, depth, weights)
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
    found = []
    for k in range(1, count + 1):
        power = _product(_power(layer, float(layers.depth * k)), _power(one_plus_z, float(k)))
        found.append(jnp.exp(k * log_scale) * power[k - 1] / k)
    return jnp.stack(found)


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


# Support ------------------------------------------------------------------------------------------


class Support(NamedTuple):
    """Where the squared singular values are.

    Attributes
    ----------
    atoms, masses
        Values that a fraction of all singular values have exactly, and that fraction; shape
        (atoms,), the mass 0 where there is none. The first is λ = 0.
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
    layers = _layers(law, sigma_w2, depth, weights)
    at, mass = law.values[: law.atoms], law.weights[: law.atoms]
    zero = jnp.sum(jnp.where(at == 0, mass, 0))
    isolated = jnp.maximum(1 - layers.depth * (1 - mass), 0) * (1 - layers.gaussian)
    isolated = jnp.where(at == 0, 0, isolated)
    places = jnp.exp(layers.depth * (layers.log_sigma_w2 + jnp.log(jnp.where(at == 0, 1, at))))
    atoms = jnp.append(0, jnp.where(isolated > 0, places, 0))
    masses = jnp.append(zero, isolated)
    lower, upper = _edges(layers)
    nothing = jnp.sum(masses) > 1 - 1e-12
    return Support(
        atoms, masses, jnp.where(nothing, jnp.nan, lower), jnp.where(nothing, jnp.nan, upper)
    )


# Points between two poles where λ(u) is looked at, finer towards both.
_FINE = np.concatenate([10.0 ** np.linspace(-14, math.log10(0.5), 600), [0.5]])
_WAY = np.unique(np.concatenate([_FINE, 1 - _FINE]))
_FAR = 60.0  # of log u: as good as 0 and infinity


def _edges(layers: _Layers) -> tuple[Array, Array]:
    """Return the ends of the continuous part.

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


def _end(layers: _Layers, points: Array, continuous: Array, direction: int) -> Array:
    """Return log λ where the continuous part ends, coming from u = 0 or (-1) from infinity."""
    order = jnp.argsort(points, descending=direction > 0)
    poles, continuous = -jnp.log(points[order]), continuous[order]
    start = poles[0] - direction * _FAR
    edge, done = jnp.asarray(-jnp.inf, points.dtype), jnp.asarray(False)
    for place in range(points.size):
        real_pole = jnp.isfinite(poles[place])
        stop = jnp.where(real_pole, poles[place], start + direction * _FAR)
        turn, turned = _first_turn(layers, start + jnp.asarray(_WAY, stop.dtype) * (stop - start))
        at_pole = layers.depth * (layers.log_sigma_w2 - stop)
        ends = turned | (continuous[place] & real_pole)
        edge = jnp.where(ends & ~done, jnp.where(turned, turn, at_pole), edge)
        done |= ends
        start = stop
    return edge


def _first_turn(layers: _Layers, log_u: Float[Array, " points"]) -> tuple[Array, Array]:
    """Return log λ where it stops decreasing with u, along points; -inf if it never did."""

    def inside(log_u: Array) -> Array:
        _, slope, real = _real_log_lambda(layers, log_u)
        return ~real | (slope >= 0)

    wrong = jax.vmap(inside)(log_u)
    at = jnp.argmax(wrong)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        beyond = inside(middle)
        return jnp.where(beyond, ends[0], middle), jnp.where(beyond, middle, ends[1])

    ends = (log_u[jnp.maximum(at - 1, 0)], log_u[at])
    low, _ = jax.lax.fori_loop(0, int(jnp.finfo(log_u.dtype).nmant) + 8, halve, ends)
    value = _real_log_lambda(layers, low)[0]
    return jnp.where(at == 0, -jnp.inf, value), wrong[at]


def _real_log_lambda(layers: _Layers, log_u: Array) -> tuple[Array, Array, Array]:
    """Return log λ(u) for u > 0, its slope by log u, and whether it is λ > 0 on the right sheet."""
    z, one_z, dz = layers.psi(jnp.exp(log_u))
    value = -layers.log_of_one_over(log_u, jnp.log(jnp.abs(z)), jnp.log(jnp.abs(one_z)))
    slope = -layers.slope(z, one_z, dz)
    n, g = layers.depth, layers.gaussian
    # Where z and 1 + z are negative, their logarithms have a phase of -π each.
    below_0, below_1 = (z < 0).astype(int), (one_z < 0).astype(int)
    phase = (n - 1) * (below_0 - below_1) + g * n * below_1
    return value, slope, phase == 0


# The density --------------------------------------------------------------------------------------


class Density(NamedTuple):
    """The continuous part of the law, at given λ; atoms are `support`'s.

    Attributes
    ----------
    of_eigenvalues
        ρ(λ), of the squared singular values.
    of_singular_values
        ρ(s) = 2 s ρ(λ), at s = √λ.
    error
        Estimated relative error of either: how well (*) is solved, times how z responds.

    All are NaN where (*) was not solved: far down the lower tail (λ less than 1e-10 of the largest)
    of orthogonal networks whose φ' goes to 0, the nodes of its law are too far apart.
    """

    of_eigenvalues: Float[Array, "*points"]
    of_singular_values: Float[Array, "*points"]
    error: Float[Array, "*points"]


def density(
    law: SlopeLaw,
    sigma_w2: ArrayLike,
    depth: int,
    weights: str = "gaussian",
    *,
    at: Float[ArrayLike, "*points"],
) -> Density:
    """Return the density of the squared singular values λ, and of the singular values, at λ.

    Parameters
    ----------
    law, sigma_w2, depth, weights
        As for `mean_and_variance`.
    at
        Values λ > 0, of any shape; λ = s² for a singular value s.

    Raises
    ------
    InputError
        If an argument is out of range; for one layer with orthogonal weights, which has the law of
        σ_w² φ'² itself and needs no solving.
    """
    layers = _layers(law, sigma_w2, depth, weights)
    check_scale("at", at)
    if layers.depth == 1 and not layers.gaussian:
        raise InputError(
            "depth is 1 and weights are orthogonal: λ is σ_w² φ'(z)² then, whose law is "
            "slope_law's; ask for a depth of at least 2 or for gaussian weights"
        )
    at = jnp.asarray(at, law.values.dtype)
    rho, error = _density(layers, at)
    return Density(rho, 2 * jnp.sqrt(at) * rho, error)


_STEPS = 16  # of θ, from π to 0
_CORRECTIONS = 3  # of Newton's method at each
_FINAL = 30  # at most, at θ = 0
_SOLVED = 1e-6  # a residual beyond which there is no solution


@jax.jit
def _density(layers: _Layers, at: Array) -> tuple[Array, Array]:
    dtype = layers.law.values.dtype
    # Finer towards θ = 0, where the edges of the support are near.
    angles = math.pi * np.linspace(1, 0, _STEPS + 1) ** 1.5

    def newton(v: Array, log_lambda: Array) -> tuple[Array, Array, Array]:
        """Return log u one step on, kept in the lower half-plane, and its slope by log λ."""
        z, one_z, dz = layers.psi(jnp.exp(v))
        slope = layers.slope(z, one_z, dz)
        value = layers.log_of_one_over(v, jnp.log(z), jnp.log(one_z)) + log_lambda
        new = v - value / slope
        return jax.lax.complex(new.real, jnp.clip(new.imag, -math.pi, 0.0)), value / slope, slope

    on_the_axis = _on_the_negative_axis(layers, jnp.log(at.reshape(-1)))

    def one(log_size: Array, log_s: Array) -> tuple[Array, Array]:
        v = jax.lax.complex(log_s, jnp.asarray(-math.pi, dtype))
        slope = newton(v, jax.lax.complex(log_size, jnp.asarray(math.pi, dtype)))[2]

        def turn(state: tuple[Array, Array], angles: Array) -> tuple[tuple[Array, Array], None]:
            v, slope = state
            before, angle = angles
            v = v - 1j * (angle - before) / slope
            for _ in range(_CORRECTIONS):
                v, _, slope = newton(v, jax.lax.complex(log_size, angle))
            return (v, slope), None

        pairs = jnp.asarray(np.stack([angles[:-1], angles[1:]], axis=1), dtype)
        (v, _), _ = jax.lax.scan(turn, (v, slope), pairs)

        def busy(state: tuple[Array, Array, Array]) -> Array:
            _, change, count = state
            return (change > 4 * jnp.finfo(dtype).eps) & (count < _FINAL)

        def correct(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            v, _, count = state
            new = newton(v, log_size + 0j)[0]
            return new, jnp.abs(new - v), count + 1

        start = (v, jnp.ones((), dtype), jnp.zeros((), int))
        v, change, _ = jax.lax.while_loop(busy, correct, start)
        residual = jnp.abs(newton(v, log_size + 0j)[1]) + change
        z, _, dz = layers.psi(jnp.exp(v))
        height = jnp.maximum(-z.imag, 0)
        solved = residual < _SOLVED
        error = jnp.where(height > 0, jnp.abs(dz) * residual / jnp.where(height > 0, height, 1), 0)
        rho = jnp.where(solved, height / (math.pi * jnp.exp(log_size)), jnp.nan)
        return rho, jnp.where(solved, error, jnp.nan)

    rho, error = jax.vmap(one)(jnp.log(at.reshape(-1)), on_the_axis)
    return rho.reshape(at.shape), error.reshape(at.shape)


def _negative(layers: _Layers, log_s: Array) -> tuple[Array, Array, Array]:
    """Return log t at λ = -t, u = -s, its slope by log s, and -z, between 0 and 1."""
    z, one_z, dz = layers.psi(-jnp.exp(log_s))
    log_t = -layers.log_of_one_over(log_s, jnp.log(-z), jnp.log(one_z))
    return log_t, -layers.slope(z, one_z, dz), -z


def _on_the_negative_axis(layers: _Layers, log_t: Float[Array, " points"]) -> Array:
    """Return about log s there, which decreases as t increases: to some hundredths."""
    furthest = math.log(jnp.finfo(log_t.dtype).max) / 2.5
    log_s = jnp.linspace(-furthest, furthest, math.ceil(8 * furthest), dtype=log_t.dtype)
    found = jax.vmap(lambda x: _negative(layers, x)[0])(log_s)
    return jnp.interp(-log_t, -found, log_s)


# Shares of all singular values --------------------------------------------------------------------


class Shares(NamedTuple):
    """Which shares of all singular values s are 0, below, in and above bins; they add up to 1.

    NaN where the density was not found.
    """

    zero: Float[Array, ""]  # the atom at 0, which is in no bin
    below: Float[Array, ""]
    inside: Float[Array, " bins"]  # with isolated atoms; the last bin has its upper edge
    above: Float[Array, ""]


# Nodes of a bin; pieces that all above the last one is cut into, and how many times as large as the
# one before each is, at least.
_NODES, _PIECES, _RATIO = 12, 16, 2.0


def shares(
    law: SlopeLaw,
    sigma_w2: ArrayLike,
    depth: int,
    weights: str = "gaussian",
    *,
    edges: Float[ArrayLike, " edges"],
) -> Shares:
    """Return the shares of singular values between edges: the density's integrals, and atoms.

    Parameters
    ----------
    law, sigma_w2, depth, weights
        As for `mean_and_variance`.
    edges
        Shape (bins + 1,): values s >= 0, ascending; the last is above 0.

    Raises
    ------
    InputError
        If an argument is out of range.

    Notes
    -----
    The integral is taken from the upper end of the law down. What is left over at its lower end is
    that of the bin there: towards s = 0 most singular values of a deep network are further below
    the largest than any density can be followed to. In each bin s = a + (b - a) (1 - cos πt)/2, so
    that a root of the density, as at the ends of the law, is smooth in t.

    One orthogonal layer has the law of σ_w |φ'|, and no density is offered (`density`): its shares
    are known where φ is straight, and NaN elsewhere.
    """
    layers = _layers(law, sigma_w2, depth, weights)
    check_scale("edges", edges)
    edges = jnp.asarray(edges, law.values.dtype)
    ends = support(law, sigma_w2, depth, weights)
    rest = 1 - jnp.sum(ends.masses)
    rest = jnp.where(rest > 1e-12, rest, 0)
    lower, upper = (jnp.nan_to_num(jnp.sqrt(end)) for end in (ends.lower, ends.upper))
    ratio = jnp.maximum(_RATIO, (upper / edges[-1]) ** (1 / _PIECES))
    cuts = jnp.append(edges, edges[-1] * ratio ** jnp.arange(1, _PIECES + 1))
    if layers.depth == 1 and not layers.gaussian:
        each = jnp.where(rest > 0, jnp.nan, jnp.zeros(cuts.size - 1, cuts.dtype))
    else:
        each = _integrals(layers, jnp.clip(cuts, lower, jnp.maximum(lower, upper)))
    beyond = jnp.append(jnp.cumsum(each[::-1])[::-1], 0)[: edges.size]
    beyond = jnp.where(edges <= lower, rest, beyond)
    # An isolated atom is in the bin that begins with it or before it; one at the last edge, in it.
    places = jnp.sqrt(ends.atoms)
    after = places[None, :] >= edges[:, None]
    after = after.at[-1].set(places > edges[-1])
    beyond += jnp.sum(jnp.where(after & (places > 0)[None, :], ends.masses[None, :], 0), axis=1)
    return Shares(
        zero=ends.masses[0],
        below=1 - ends.masses[0] - beyond[0],
        inside=beyond[:-1] - beyond[1:],
        above=beyond[-1],
    )


def _integrals(layers: _Layers, cuts: Float[Array, " cuts"]) -> Float[Array, " pieces"]:
    """Return the integrals of the density of s between cuts, which are within the law's ends."""
    t, weight = (jnp.asarray(v, cuts.dtype) for v in np.polynomial.legendre.leggauss(_NODES))
    low, width = cuts[:-1, None], jnp.diff(cuts)[:, None]
    angle = (math.pi * (1 + t) / 2)[None, :]
    s = low + width * (1 - jnp.cos(angle)) / 2
    empty = (width == 0) | (s == 0)
    at = jnp.where(empty, jnp.exp(layers.depth * layers.log_sigma_w2), s**2)
    rho = 2 * jnp.sqrt(at) * _density(layers, at)[0]
    terms = rho * jnp.sin(angle) * weight[None, :] * width * math.pi / 4
    return jnp.sum(jnp.where(empty, 0, terms), axis=1)


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

    Raises
    ------
    InputError
        If an argument is out of range.

    Notes
    -----
    √λ = (1/π) ∫ λ/(λ + t) t^{-1/2} dt, whose average needs z on the negative axis alone, where (*)
    gives t for each s = -u. In log s the integrand is analytic and falls off exponentially.
    """
    return _mean_singular_value(_layers(law, sigma_w2, depth, weights))


@jax.jit
def _mean_singular_value(layers: _Layers) -> Array:
    dtype = layers.law.values.dtype
    middle = -jnp.log(jnp.sum(layers.law.values * layers.law.weights))
    step = 0.125
    log_s = middle + jnp.asarray(np.arange(-90, 90, step), dtype)
    log_t, slope, minus_z = jax.vmap(functools.partial(_negative, layers))(log_s)
    terms = minus_z * jnp.exp(log_t / 2) * -slope
    return jnp.sum(jnp.where(jnp.isfinite(terms), terms, 0)) * step / math.pi
