"""Averages over a unit's batch after BatchNorm, and second moments of tangents after it.

A unit's pre-activations z ~ N(0, K) over a batch of B inputs become ẑ = √B v, v = x/r, where
x = G z with G = I - 11ᵀ/B is z without its mean over the batch, and r = |x|. A tangent u becomes
J u, J = (√B/r) (G - v vᵀ), and φ'(ẑ) J u after an activation. For tangents of second moments S,
independent of z, and with Σ = G K G and S' = G S G, the wanted averages are

    E[φ(ẑ_a) φ(ẑ_b)]    and    T[S]_ab = E[φ'(ẑ_a) φ'(ẑ_b) (J S Jᵀ)_ab].

*Homogeneous φ*, φ(c x) = c φ(x): powers of r come out, and 1/r^{2p} = ∫ s^{p-1} e^{-s r²} ds/Γ(p)
makes every average one over Gaussian x of the covariance A = Σ (I + 2sΣ)⁻¹, of which there are
det(I + 2sΣ)^{-1/2} (Yang et al. 2019, arXiv:1902.08129, appendix). By Gaussian integration by parts

    E[φφᵀ] = B ∫ k(A) dP(s),        dP(s) = det(I + 2sΣ)^{-1/2} ds,
    T[S]   = B ∫ { S' ∘ E[φ'φ'ᵀ] + ∂k[P] + (s²/2) tr(S'A) k } dP(s),
    P      = s² A S' A - s (S'A + A S'),

where k(A) = E[φ(x_a) φ(x_b)] and ∂k[P] is its derivative in the direction P. This is exact for any
batch of at least 4 inputs; with fewer, E[1/r²], and so the mean squared gradient, is infinite.

*Any φ, exchangeable batch*: Σ = λ G (all inputs of equal length, all pairs of equal correlation).
Then v is uniform on a sphere and independent of r, E[1/r²] = 1/(λ (B - 3)), and the averages are
those over two coordinates of a point on a sphere, by Gauss-Legendre panels.

*Any φ, any batch*: that of the exchangeable batch with the same trace, and the difference of both
averages over fixed draws of x, antithetic, 2^15 or more: to about 1 % of how far the batch is from
exchangeable, in every layer, where the batch has not yet been mixed.

*With ε*, ẑ = x/√(r²/B + ε): B ε adds to r², and e^{-sBε} to dP(s), in the integrals for homogeneous
φ. For any other φ that has no integral here.

Arrays are (sites, sites) with sites = B.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, ScalarLike

from gradflow import gaussian
from gradflow._arguments import from_seed
from gradflow.activations import Activation
from gradflow.errors import InputError, NoTheory
from gradflow.gaussian._quadrature import dot, panels

__all__ = ["SMALLEST", "averages", "centred", "sphere_averages"]

# Fewer inputs have no finite mean squared gradient.
SMALLEST = 4
# Steps of the integral over log s, whose trapezoid rule converges exponentially.
_STEP = 0.3
# Antithetic pairs drawn for a batch that is not exchangeable: at least so many, and numbers in all.
_DRAWS, _DRAWN_NUMBERS = 1 << 14, 1 << 20
_NODES = 16  # in a panel
_Z_MAX = 12.0

Square = Float[Array, "sites sites"]


def centred(k: Square) -> Square:
    """G k G: second moments of signals less their mean over the batch."""
    k = k - jnp.mean(k, axis=0, keepdims=True)
    return k - jnp.mean(k, axis=1, keepdims=True)


def averages(
    activation: Activation,
    covariance: Square,
    tangent: Square | None,
    gain: ScalarLike = 1.0,
    epsilon: ScalarLike | None = None,
) -> tuple[Square, Float[Array, " sites"], Square | None]:
    """E[φ(γẑ_a) φ(γẑ_b)], E[φ(γẑ_a)] and T[S], the second moments of tangents; see the module.

    Parameters
    ----------
    activation
        φ.
    covariance
        K, before BatchNorm.
    tangent
        S, before BatchNorm; without it T[S] is None.
    gain
        γ.
    epsilon
        ε, in the units of K; none without it.

    Raises
    ------
    InputError
        If the batch is smaller than 4.
    NoTheory
        If there is an ε, and φ is not homogeneous.
    """
    batch = covariance.shape[0]
    if batch < SMALLEST:
        raise InputError(
            f"the batch has {batch} inputs; BatchNorm has a finite mean squared gradient from "
            f"{SMALLEST} inputs on"
        )
    gain = jnp.asarray(gain, covariance.dtype)
    sigma = centred(covariance)
    moved = None if tangent is None else centred(tangent)
    if activation.homogeneous:
        own = jnp.zeros((), gain.dtype) if epsilon is None else jnp.asarray(epsilon, gain.dtype)
        second, mean, slopes = _homogeneous(activation, sigma, moved, batch * own)
        return gain**2 * second, gain * mean, None if slopes is None else gain**2 * slopes
    if epsilon is not None:
        raise NoTheory(
            f"activation {activation.name!r} acts on a signal that BatchNorm has normalised with "
            "an epsilon; the theory of these is of homogeneous activations (relu, leaky_relu, "
            "linear), and of all without epsilon"
        )
    none = jnp.zeros_like(sigma) if moved is None else moved
    one = centred(jnp.eye(batch, dtype=sigma.dtype))
    scale, size = (jnp.trace(x) / (batch - 1) for x in (sigma, none))
    alike = jnp.max(jnp.abs(sigma - scale * one)) <= jnp.finfo(sigma.dtype).eps ** 0.5 * scale

    def difference() -> tuple[Array, Array, Array]:
        own, other = (
            _drawn(activation, *both, gain) for both in ((sigma, none), (scale * one, size * one))
        )
        return jax.tree.map(jnp.subtract, own, other)

    def nothing() -> tuple[Array, Array, Array]:
        return jnp.zeros_like(sigma), jnp.zeros_like(sigma[0]), jnp.zeros_like(sigma)

    exact = _exchangeable(activation, scale, size, batch, gain)
    second, mean, slopes = jax.tree.map(jnp.add, exact, jax.lax.cond(alike, nothing, difference))
    return second, mean, None if moved is None else slopes


def _homogeneous(
    activation: Activation, sigma: Square, moved: Square | None, more: Array
) -> tuple[Square, Array, Square | None]:
    """Averages, with ``more`` added to r²."""
    batch, dtype = sigma.shape[0], sigma.dtype
    one = jnp.eye(batch, dtype=dtype)
    trace = jnp.trace(sigma)
    # With a mean over the batch of its own, which is taken out again, nothing is singular.
    scale = trace / (batch - 1)
    whole = sigma + scale / batch
    at_one = gaussian.moment(activation, "phi", jnp.ones((), dtype))
    tangent = jnp.zeros_like(sigma) if moved is None else moved

    def add(total: tuple[Array, Array, Array], node: Array) -> tuple[tuple, None]:
        s, weight = node[0] / (trace + more), node[1] / (trace + more)
        factor = jax.scipy.linalg.cho_factor(one + 2 * s * whole, lower=True)
        a = centred(jax.scipy.linalg.cho_solve(factor, whole))
        a = (a + a.T) / 2
        log_root = jnp.sum(jnp.log(jnp.diagonal(factor[0]))) - jnp.log1p(2 * s * scale) / 2
        share = weight * jnp.exp(-log_root - s * more)
        mean = at_one * jnp.sqrt(jnp.maximum(jnp.diagonal(a), 0) / (math.pi * s))
        if moved is None:
            terms = gaussian.kernel(activation, a), mean, jnp.zeros_like(a)
        else:
            right = dot(tangent, a)
            along = s**2 * dot(a, right) - s * (right + right.T)
            k, by_k = jax.jvp(lambda a: gaussian.kernel(activation, a), (a,), (along,))
            slopes = gaussian.derivative_kernel(activation, a)
            terms = k, mean, tangent * slopes + by_k + s**2 / 2 * jnp.trace(right) * k
        return jax.tree.map(lambda t, term: t + share * term, total, terms), None

    zero = (jnp.zeros_like(sigma), jnp.zeros_like(sigma[0]), jnp.zeros_like(sigma))
    nodes = jnp.asarray(_radial_nodes(batch), dtype)
    (second, mean, slopes), _ = jax.lax.scan(add, zero, nodes)
    return batch * second, math.sqrt(batch) * mean, None if moved is None else batch * slopes


def _radial_nodes(batch: int) -> np.ndarray:
    """Nodes y = s (tr Σ + Bε) and weights of ∫ dy, (nodes, 2).

    They are y = exp(u - e^{-u}) at equal steps of u.
    """
    # Beyond the largest y, y (1 + 2y/m)^{-m/2} is below rounding; m is the rank of Σ, which may be
    # less than batch - 1.
    rank = min(batch - 1, 8)
    upper = np.arange(0, 200, 0.5)
    tail = upper - rank / 2 * np.log1p(2 * np.exp(upper) / rank)
    u = np.arange(-4.6, upper[np.argmax(tail < -38)], _STEP)
    y = np.exp(u - np.exp(-u))
    return np.stack([y, _STEP * y * (1 + np.exp(-u))], axis=1)


def _exchangeable(
    activation: Activation, scale: Array, size: Array, batch: int, gain: Array
) -> tuple[Square, Array, Square]:
    """Return the averages for Σ = ``scale`` G and S' = ``size`` G."""
    one = jnp.eye(batch, dtype=scale.dtype)
    m = sphere_averages(activation, batch, gain, scale.dtype)
    slopes = size / scale * batch / (batch - 3) * gain**2

    def matrix(own: Array, other: Array) -> Array:
        return own * one + other * (1 - one)

    return (
        matrix(m["own"], m["other"]),
        m["mean"] * jnp.ones_like(one[0]),
        slopes * matrix(m["own_slope"], m["other_slope"]),
    )


def sphere_averages(
    activation: Activation, batch: int, gain: ScalarLike = 1.0, dtype: DTypeLike | None = None
) -> dict[str, Float[Array, ""]]:
    """Averages over an exchangeable batch that BatchNorm has normalised.

    Parameters
    ----------
    activation
        φ.
    batch
        B, the inputs in a batch, at least `SMALLEST`.
    gain
        γ.
    dtype
        The float type; JAX's default without it.

    Returns
    -------
    dict
        ``mean`` E[φ(γẑ_a)]; ``own`` and ``other``, E[φ(γẑ_a) φ(γẑ_b)] with a = b and a ≠ b;
        ``own_slope`` and ``other_slope``, E[φ'(γẑ_a) φ'(γẑ_b) (G - v vᵀ)_ab].
    """
    dtype = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
    m, rho = batch - 1, -1 / (batch - 1)
    root = math.sqrt(m)
    across = math.sqrt(1 - rho**2)
    steps = np.unique(np.concatenate([np.arange(-_Z_MAX, _Z_MAX + 1), [-0.5, -0.25, 0.25, 0.5]]))
    kinks = jnp.asarray(activation.kinks, dtype) / gain
    beside = jnp.sqrt(jnp.maximum(m - kinks**2, 0))

    # A first coordinate ẑ_a = √m sin α, and a second, ẑ_b = ρ ẑ_a + √(1-ρ²) √m cos α sin β.
    ends = [jnp.asarray(steps, dtype), kinks]
    # Where the second one can no longer reach a kink, averages over it have roots.
    steps_near = np.concatenate([[0.0], 10.0 ** -np.arange(0.5, 6, 0.5)])
    near = jnp.asarray(np.concatenate([steps_near, -steps_near]), dtype)
    for sign in (1, -1):
        ends.append(jnp.ravel((rho * kinks + sign * across * beside)[:, None] + near[None]))
    alpha, weight = _panels(jnp.arcsin(jnp.clip(jnp.concatenate(ends) / root, -1, 1)))
    weight = weight * jnp.cos(alpha) ** (m - 2)
    own = root * jnp.sin(alpha)
    width = across * root * jnp.cos(alpha)[:, None]
    passing = (kinks[None] - rho * own[:, None]) / jnp.maximum(width, jnp.finfo(dtype).tiny)
    regular = jnp.broadcast_to(jnp.asarray(steps / root, dtype)[None], (own.size, steps.size))
    sines = jnp.clip(jnp.concatenate([regular, passing], axis=1), -1, 1)
    beta, inner = _panels(jnp.arcsin(sines))
    inner = inner * jnp.cos(beta) ** (m - 3)
    other = rho * own[:, None] + width * jnp.sin(beta)

    weight = weight / jnp.sum(weight)
    inner = inner / jnp.sum(inner, axis=1, keepdims=True)
    value, slope = activation(gain * own), activation.derivative(gain * own)

    def over_other(f: Array) -> Array:
        return jnp.sum(inner * f, axis=1)

    slope_other = activation.derivative(gain * other)
    cross = over_other(slope_other * (-1 - own[:, None] * other)) / batch
    return {
        "mean": jnp.sum(weight * value),
        "own": jnp.sum(weight * value**2),
        "other": jnp.sum(weight * value * over_other(activation(gain * other))),
        "own_slope": jnp.sum(weight * slope**2 * (batch - 1 - own**2)) / batch,
        "other_slope": jnp.sum(weight * slope * cross),
    }


def _panels(edges: Array) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights between edges, in any order, along the last axis."""
    return panels(jnp.sort(jax.lax.stop_gradient(edges), axis=-1), _NODES)


def _drawn(
    activation: Activation, sigma: Square, moved: Square, gain: Array
) -> tuple[Square, Array, Square]:
    batch, dtype = sigma.shape[0], sigma.dtype
    scale = jnp.trace(sigma) / (batch - 1)
    # A mean over the batch that is taken out again, and a little for inputs that are equal.
    small = jnp.finfo(dtype).eps ** 0.75 * jnp.eye(batch, dtype=dtype)
    factor = jnp.linalg.cholesky(sigma + scale * (1 / batch + small))
    count = max(_DRAWS, _DRAWN_NUMBERS // batch)
    draws = jax.random.normal(from_seed(0), (count, batch), dtype)
    # Their second moments are made exactly the identity.
    own_factor = jnp.linalg.cholesky(dot(draws.T, draws) / count)
    draws = jax.scipy.linalg.solve_triangular(own_factor, draws.T, lower=True).T
    half = dot(draws, factor.T)
    half -= jnp.mean(half, axis=1, keepdims=True)
    x = jnp.concatenate([half, -half])
    v = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    # Of 1/r², whose tails are heavy, its average over r given v, for m = B - 1: vᵀ Σ⁻¹ v/(m - 2).
    whitened = jax.scipy.linalg.solve_triangular(factor, v.T, lower=True)
    inverse_square = jnp.sum(whitened**2, axis=0)[:, None] / (batch - 3)
    z = gain * math.sqrt(batch) * v
    value, slope = activation(z), activation.derivative(z)
    turned = dot(v, moved)
    along = jnp.sum(turned * v, axis=1, keepdims=True)

    def mean_of(left: Array, right: Array) -> Array:
        return dot(left.T, right) / left.shape[0]

    weighted = batch * gain**2 * slope * inverse_square
    crossed = mean_of(weighted * v, slope * turned)
    slopes = moved * mean_of(weighted, slope) - crossed - crossed.T
    slopes += mean_of(weighted * along * v, slope * v)
    return mean_of(value, value), jnp.mean(value, axis=0), slopes
