"""Gaussian averages of activations in closed form, where they take more than a line.

For x ~ N(0, q), or for (u, v) Gaussian with variances q_u, q_v and covariance k, written so that
nothing cancels for q from 0 to 1e4. `gradflow.activations` says which activation each is of.

References: Cho & Saul 2009 (arc-cosine kernels of ReLU); Williams 1997, "Computing with infinite
networks" (erf); Rahimi & Recht 2007 (sin, cos); Tsuchida et al. 2021 (GELU).
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf
from jaxtyping import Array, Float, ScalarLike

__all__ = ["Moment", "PairMoment", "Values", "angle", "cos2", "cos4", "cos_cos"]
__all__ += ["erf_derivative_kernel", "erf_kernel", "gelu_derivative_kernel", "gelu_dphi2"]
__all__ += ["gelu_kernel", "gelu_phi2", "gelu_x_phi_dphi", "gram_determinant", "hard_tanh_inside"]
__all__ += ["sin2", "sin2_cos2", "sin4", "sin_sin", "snake_kernel", "snake_mixed", "snake_phi4"]
__all__ += ["snake_phi2_dphi2", "snake_phi_ddphi"]

Values: TypeAlias = Float[Array, "..."] | Float[np.ndarray, "..."] | ScalarLike
Moment: TypeAlias = Callable[[Array], Array | float]
PairMoment: TypeAlias = Callable[[Array, Array, Array], Array | float]


def gram_determinant(q_u: Array, q_v: Array, k: Array) -> Array:
    """q_u q_v - k², never negative by rounding.

    Where q_u and q_v are alike it is a sum in which nothing cancels at q_u = q_v, and needs no
    root, so that it has all derivatives at 0 too. Elsewhere the sum's terms would be far larger
    than itself near |k| = √(q_u q_v), and it is a product.
    """
    size = jnp.abs(k)
    alike = (q_u <= 2 * q_v) & (q_v <= 2 * q_u)
    near = (q_u - size) * (q_v - size) + size * (q_u + q_v - 2 * size)
    summed = alike | (q_u <= 0) | (q_v <= 0)
    root = jnp.sqrt(jnp.where(summed, 1, q_u)) * jnp.sqrt(jnp.where(summed, 1, q_v))
    value = jnp.where(summed, near, (root - size) * (root + size))
    return jnp.where(value < 0, 0, value)  # jnp.maximum would halve the derivative at 0


def angle(q_u: Array, q_v: Array, k: Array) -> Array:
    """arccos(k/√(q_u q_v)) by arctan2: arccos loses half its digits near 0."""
    return jnp.arctan2(jnp.sqrt(gram_determinant(q_u, q_v, k)), k)


def sin2(q: Array) -> Array:
    """E sin²x."""
    return -jnp.expm1(-2 * q) / 2


def cos2(q: Array) -> Array:
    """E cos²x."""
    return (1 + jnp.exp(-2 * q)) / 2


def sin4(q: Array) -> Array:
    """E sin⁴x = (3 - 4e + e⁴)/8 with e = exp(-2q), factored."""
    e = jnp.exp(-2 * q)
    return jnp.expm1(-2 * q) ** 2 * (e**2 + 2 * e + 3) / 8


def cos4(q: Array) -> Array:
    """E cos⁴x."""
    return (3 + 4 * jnp.exp(-2 * q) + jnp.exp(-8 * q)) / 8


def sin2_cos2(q: Array) -> Array:
    """E sin²x cos²x."""
    return -jnp.expm1(-8 * q) / 8


def sin_sin(q_u: Array, q_v: Array, k: Array) -> Array:
    """E sin(u) sin(v) = exp(-(q_u + q_v)/2) sinh k, without cancellation and without overflow."""
    m = (q_u + q_v) / 2
    near_zero = jnp.exp(-m) * jnp.sinh(jnp.clip(k, -1, 1))
    return jnp.where(jnp.abs(k) < 1, near_zero, (jnp.exp(k - m) - jnp.exp(-k - m)) / 2)


def cos_cos(q_u: Array, q_v: Array, k: Array) -> Array:
    """E cos(u) cos(v) = exp(-(q_u + q_v)/2) cosh k."""
    m = (q_u + q_v) / 2
    return (jnp.exp(k - m) + jnp.exp(-k - m)) / 2


# snake is x + sin²x. With e = exp(-2q) = E cos 2x, E cos 4x = e⁴, E cos 6x = e⁹, E cos 8x = e¹⁶.


def _polynomial(power: int, *coefficients: tuple[int, float]) -> Moment:
    """A polynomial in e = exp(-2q) that (1 - e)^power divides, by pairs of exponent and factor."""
    whole = np.zeros(1 + max(n for n, _ in coefficients))
    for n, factor in coefficients:
        whole[n] = factor
    divisor = np.poly1d([-1, 1]) ** power
    quotient, _ = np.polydiv(whole[::-1], divisor.coeffs)

    def value(q: Array) -> Array:
        e, rest = jnp.exp(-2 * q), jnp.zeros_like(q)
        for factor in np.round(quotient * 128) / 128:  # exact, as all factors are such fractions
            rest = rest * e + factor
        return (-jnp.expm1(-2 * q)) ** power * rest

    return value


_sin8 = _polynomial(4, *((n, f / 128) for n, f in ((0, 35), (1, -56), (4, 28), (9, -8), (16, 1))))
_sin4_sin2_of_2x = _polynomial(
    3, *((n, f / 32) for n, f in ((0, 5), (1, -4), (4, -4), (9, 4), (16, -1)))
)


def snake_mixed(q: Array) -> Array:
    """E[x sin²x sin 2x]/q = e - e⁴."""
    return -jnp.exp(-2 * q) * jnp.expm1(-6 * q)


def snake_phi4(q: Array) -> Array:
    """E x⁴ + 6 E x² sin⁴x + E sin⁸x."""
    mixed = q * sin4(q) + 2 * q**2 * snake_mixed(q)
    return 3 * q**2 + 6 * mixed + _sin8(q)


def snake_phi_ddphi(q: Array) -> Array:
    """2 E sin²x cos 2x = e - (1 + e⁴)/2."""
    e = jnp.exp(-2 * q)
    return jnp.expm1(-2 * q) * (1 - e - e**2 - e**3) / 2


def snake_phi2_dphi2(q: Array) -> Array:
    """E (x + sin²x)² (1 + sin 2x)²."""
    e4 = jnp.exp(-8 * q)
    of_squares = q - q * jnp.expm1(-8 * q) / 2 + 8 * q**2 * e4  # E x² (1 + sin² 2x)
    return of_squares + 4 * q * snake_mixed(q) + sin4(q) + _sin4_sin2_of_2x(q)


def snake_kernel(q_u: Array, q_v: Array, k: Array) -> Array:
    """E uv + E sin²u sin²v."""
    apart = jnp.expm1(-2 * q_u) * jnp.expm1(-2 * q_v)
    return k + (apart + 2 * sin_sin(2 * q_u, 2 * q_v, 2 * k) ** 2) / 4


def erf_kernel(q_u: Array, q_v: Array, k: Array) -> Array:
    """E erf(u) erf(v); Williams 1997."""
    rest = 1 + 2 * (q_u + q_v) + 4 * gram_determinant(q_u, q_v, k)
    return 2 / math.pi * jnp.arctan2(2 * k, jnp.sqrt(rest))


def erf_derivative_kernel(q_u: Array, q_v: Array, k: Array) -> Array:
    return 4 / math.pi * jax.lax.rsqrt(1 + 2 * (q_u + q_v) + 4 * gram_determinant(q_u, q_v, k))


# GELU is x Φ(x). With h = Φ(u)Φ(v), integrating by parts twice,
#   E[uv h] = k E[h] + (q_u q_v + k²) E[h_uv] + k q_u E[h_uu] + k q_v E[h_vv],
# and E[h], E[h_uv], E[h_uu] are the orthant probability, the density and a derivative of it at 0
# of a Gaussian with covariance K + 1. D is its determinant.


def _gelu_terms(q_u: Array, q_v: Array, k: Array) -> tuple[Array, Array, Array, Array]:
    gram = gram_determinant(q_u, q_v, k)
    d = 1 + q_u + q_v + gram
    orthant = 1 / 4 + jnp.arctan2(k, jnp.sqrt(d)) / (2 * math.pi)
    r = 1 / (1 + q_u) + 1 / (1 + q_v)
    return orthant, d, r, gram + k**2 * r


def gelu_kernel(q_u: Array, q_v: Array, k: Array) -> Array:
    orthant, d, _, rest = _gelu_terms(q_u, q_v, k)
    return k * orthant + rest * jax.lax.rsqrt(d) / (2 * math.pi)


def gelu_derivative_kernel(q_u: Array, q_v: Array, k: Array) -> Array:
    orthant, d, r, rest = _gelu_terms(q_u, q_v, k)
    return orthant + k * jax.lax.rsqrt(d) / (2 * math.pi) * (2 * r - 1 + rest / d)


def gelu_phi2(q: Array) -> Array:
    d = jnp.sqrt(1 + 2 * q)
    return q / 4 + q / (2 * math.pi) * (jnp.arctan(q / d) + 2 * q / ((1 + q) * d))


def gelu_dphi2(q: Array) -> Array:
    d = jnp.sqrt(1 + 2 * q)
    return 1 / 4 + (jnp.arctan(q / d) + q / (1 + q) * (5 * q + 3) / d**2 / d) / (2 * math.pi)


def gelu_x_phi_dphi(q: Array) -> Array:
    d = jnp.sqrt(1 + 2 * q)
    rest = q / ((1 + q) * d) * (5 - 2 * q / (1 + q) - 2 * q / d**2)
    return q / 4 + q / (2 * math.pi) * (jnp.arctan(q / d) + rest)


def hard_tanh_inside(q: Array) -> Array:
    """P(|x| < 1). Below the floor on q it is 1 in float64, and its derivative would be 0·inf."""
    return erf(jax.lax.rsqrt(2 * jnp.maximum(q, 1 / 1800)))
