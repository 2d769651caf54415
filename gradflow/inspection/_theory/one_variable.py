"""Averages of one function of Gaussian signals at all pairs of sites: quadrature, or series."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow import _programs, gaussian
from gradflow._unit_distributions import Shifted
from gradflow.activations import Activation
from gradflow.gaussian import _pairs
from gradflow.kernels import Gaussian, Kernel

__all__ = ["by_parts_holds", "by_series", "in_range", "through"]

# Terms of Hermite series of pairs, and what they may leave out, relative.
_TERMS, _LEFT_OUT = 256, 1e-14


@functools.lru_cache(maxsize=1 << 10)
def by_parts_holds(phi: Activation) -> bool:
    """Whether integration by parts holds for a function, seen about one mean."""
    about, q = 0.3, 0.5

    def both(x: Any) -> Any:
        y = about + x
        return jnp.stack([x * phi(y) / q, phi.derivative(y), jnp.abs(phi.derivative(y))])

    kinks = tuple(kink - about for kink in phi.kinks)
    with jax.enable_x64(True):
        one, two, size = map(float, gaussian.expectation(both, jnp.asarray(q), kinks=kinks))
    return abs(one - two) < 1e-6 * (abs(one) + size)


def in_range(k: np.ndarray) -> bool:
    """Whether second moments are where averages are integrated."""
    q, (low, high) = np.diagonal(k), gaussian.log_limits(np.dtype(np.float64))
    return bool((q >= np.exp(low)).all() and (q <= np.exp(high)).all())


@_programs.program("phi", seconds=0.1)
def through(phi: Activation, k: Any, shift: Any) -> tuple[Any, Any, Any]:
    """E[φφ], E[φ] and E[φ'φ'] of Gaussian signals of this covariance about their means."""
    law: Any = Gaussian() if shift is None else Shifted.at(shift)
    second = k if shift is None else k + jnp.outer(shift, shift)
    z = Kernel.of(second, shift, tangent=jnp.ones_like(k), distribution=law)
    h = z.through(phi).plain()
    return h.covariance, h.mean, h.tangent


def by_series(phi: Activation, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E[φφ], E[φ] and E[φ'φ'] by Mehler's series where it has converged, else pair by pair.

    Σ_k a_k(s) a_k(t) c^k and Σ_k k a_k(s) a_k(t) c^{k-1}/√(q_s q_t); what is left out is bounded by
    what of E[φ²] and E[φ'²] the terms do not have.
    """
    q = np.diagonal(k)
    root = np.sqrt(q)
    a, second, first, slope = map(np.asarray, _series(phi, q))
    order = np.arange(_TERMS)
    b = a[:, 1:] * np.sqrt(order[1:]) / root[:, None]
    c = np.clip(k / np.outer(root, root), -1, 1)
    own = np.eye(len(q), dtype=bool)
    found = []
    for derivative, (coefficients, total) in enumerate(((a, second), (b, slope))):
        left = np.sqrt(np.maximum(total - (coefficients**2).sum(1), 0) + 4e-16 * total)
        out = _power_series(coefficients, c)
        bound = np.outer(left, left) * np.abs(c) ** coefficients.shape[1]
        size = np.sqrt(np.outer(total, total))
        rest = np.argwhere(np.triu(~own & (bound > _LEFT_OUT * size)))
        if len(rest):
            i, j = rest.T
            pad = np.resize(np.arange(len(rest)), 1 << int(len(rest) - 1).bit_length())
            i, j = i[pad], j[pad]
            pairs = _pairs._averages(phi, derivative, q[i], q[j], k[i, j])
            out[i, j] = out[j, i] = np.asarray(pairs)
        out[own] = total
        found.append(out)
    return found[0], first, found[1]


def _power_series(coefficients: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Σ_k a_k(s) a_k(t) c_st^k by Horner's rule."""
    out = np.zeros_like(c)
    for row in coefficients.T[::-1]:
        out = out * c + np.outer(row, row)
    return out


@_programs.program("phi", seconds=0.1)
def _series(phi: Activation, q: Any) -> tuple[Any, Any, Any, Any]:
    """Hermite coefficients of φ(√q z), (sites, terms), and E[φ²], E[φ], E[φ'²]."""
    a = jax.vmap(lambda v: gaussian.hermite_coefficients(phi, v, _TERMS))(q)
    m = gaussian.some_moments(phi, ("phi2", "phi", "dphi2"), q)
    return a, m["phi2"], m["phi"], m["dphi2"]
