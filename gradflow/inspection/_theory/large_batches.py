"""BatchNorm over many sites, as of images, with a homogeneous φ behind it.

The averages of `gradflow.gaussian._batch`, integrals over s of functions of A = Σ (I + 2sΣ)⁻¹, by a
Gauss rule of few nodes, which the eigenvalues of Σ tell: its weight is the density of all nodes of
`gradflow.gaussian._batch`, in the variable 1/(1 + 2sλ), λ the largest eigenvalue. A gradient goes
down by the transpose,

    B Σ_s { Λ ∘ E[φ'φ'ᵀ] + s² A M A - s (A M + M A) + (s²/2) ⟨Λ, k⟩ A },    M = ∂k*[Λ].

Reference: Golub & Welsch 1969, Math. Comp. 23, 221 (Gauss rules of a discrete weight).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from gradflow import _programs, gaussian
from gradflow.activations import Activation
from gradflow.gaussian import _batch

__all__ = ["LARGE", "averages", "pulled"]

# Batches from which on this is quicker.
LARGE = 192
# Nodes are added until the averages of functions of single eigenvalues are as close as this.
_CLOSE, _MOST_NODES = 1e-8, 24
# s tr Σ below which the difference of I and its inverse would lose digits.
_CANCELS = 0.05


class _Rule(NamedTuple):
    """Nodes s and u = 1/(1 + 2sλ), weights of ∫ dP(s), and all nodes' u with ∫ dP(s)/√s."""

    s: np.ndarray
    u: np.ndarray
    weights: np.ndarray
    every: np.ndarray
    roots: np.ndarray

    def root(self, values: np.ndarray) -> np.ndarray:
        """∫ √f dP(s)/√s of f from its values at the nodes, f/u being smooth, (nodes, several)."""
        if len(self.u) == len(self.every):
            return self.roots @ np.sqrt(values)
        smooth = _lagrange(self.u, self.every).T @ (values / self.u[:, None])
        return self.roots @ np.sqrt(self.every[:, None] * np.maximum(smooth, 0))


def averages(phi: Activation, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[φ_a φ_b] and E[φ_a] of a batch that BatchNorm has normalised, from its covariance."""
    sigma, batch = _centred(k), len(k)
    second, diagonals = np.zeros_like(sigma), []
    rule = _rule(sigma)
    for s, weight in zip(rule.s, rule.weights, strict=True):
        a = _shrunk(sigma, s)
        with jax.enable_x64(True):
            second += batch * weight * np.asarray(_kernel(phi, a))
        diagonals.append(np.maximum(a.diagonal(), 0))
    with jax.enable_x64(True):
        at_one = float(gaussian.moment(phi, "phi", jnp.ones(())))
    return second, at_one * math.sqrt(batch / math.pi) * rule.root(np.array(diagonals))


def pulled(phi: Activation, k: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Second moments of the gradient before BatchNorm, from those behind φ."""
    sigma, batch = _centred(k), len(k)
    total = np.zeros_like(sigma)
    rule = _rule(sigma)
    for s, weight in zip(rule.s, rule.weights, strict=True):
        a = _shrunk(sigma, s)
        with jax.enable_x64(True):
            product, own, by_kernel = map(np.asarray, _transposed(phi, a, gradient))
        right = by_kernel @ a
        below = own - s * (right + right.T) + s**2 * (a @ right + product / 2 * a)
        total += batch * weight * below
    return _centred(total)


def _centred(k: np.ndarray) -> np.ndarray:
    k = k - k.mean(axis=0, keepdims=True)
    return k - k.mean(axis=1, keepdims=True)


def _shrunk(sigma: np.ndarray, s: float) -> np.ndarray:
    """Σ (I + 2sΣ)⁻¹ = (I - (I + 2sΣ)⁻¹)/(2s)."""
    factor = 2 * s * sigma
    factor.flat[:: len(sigma) + 1] += 1
    factor, _ = linalg.lapack.dpotrf(factor, lower=1, overwrite_a=1)
    if s * np.trace(sigma) < _CANCELS:
        return _centred(linalg.lapack.dpotrs(factor, sigma, lower=1)[0])
    inverse, _ = linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
    inverse = np.tril(inverse)
    inverse = -(inverse + np.tril(inverse, -1).T)
    inverse.flat[:: len(sigma) + 1] += 1
    return _centred(inverse / (2 * s))


def _rule(sigma: np.ndarray) -> _Rule:
    batch, trace = len(sigma), float(np.trace(sigma))
    share = np.maximum(linalg.eigvalsh(sigma), 0) / trace
    y, weight = _batch._radial_nodes(batch).T
    density = weight / trace * np.exp(-np.log1p(2 * y[:, None] * share).sum(1) / 2)
    root = density / np.sqrt(y / trace)
    kept = root > 1e-17 * root.max()
    y, density, root = y[kept], density[kept], root[kept]
    largest = share.max()
    u = 1 / (1 + 2 * y * largest)
    # Functions of single eigenvalues, as A is.
    ratio = np.quantile(share / largest, np.linspace(0, 1, 33))

    def shrunk(u: np.ndarray) -> np.ndarray:
        return (u / (u + ratio[:, None] * (1 - u)) * ratio[:, None]).T

    exact = [
        density @ shrunk(u),
        density @ (shrunk(u) ** 2 / u[:, None]),
        root @ np.sqrt(shrunk(u)),
    ]
    every = _Rule(y / trace, u, density, u, root)
    for nodes in range(2, min(_MOST_NODES, len(u))):
        at, weights = _gauss(u, density, nodes)
        rule = _Rule((1 / at - 1) / (2 * largest * trace), at, weights, u, root)
        values = shrunk(at)
        own = [weights @ values, weights @ (values**2 / at[:, None]), rule.root(values)]
        off = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(own, exact, strict=True)]
        if max(off) < _CLOSE:
            return rule
    return every


def _gauss(x: np.ndarray, weight: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The Gauss rule of a discrete weight: Lanczos' tridiagonal matrix, and its eigenvalues."""
    total = weight.sum()
    vectors = [np.sqrt(weight / total)]
    diagonal, beside = [], []
    for n in range(nodes):
        new = x * vectors[-1]
        diagonal.append(float(new @ vectors[-1]))
        for _ in range(2):  # orthogonal to rounding
            for old in vectors:
                new = new - (new @ old) * old
        if n < nodes - 1:
            beside.append(float(np.linalg.norm(new)))
            vectors.append(new / beside[-1])
    at, rows = linalg.eigh_tridiagonal(diagonal, beside)
    return at, total * rows[0] ** 2


def _lagrange(at: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Lagrange's polynomials of some points, at others, (points, others)."""
    out = np.ones((len(at), len(x)))
    for i, j in np.ndindex(len(at), len(at)):
        if i != j:
            out[i] *= (x - at[j]) / (at[i] - at[j])
    return out


@_programs.program("phi", seconds=0.1)
def _kernel(phi: Activation, a: Any) -> Any:
    return gaussian.kernel(phi, a)


@_programs.program("phi", seconds=0.1)
def _transposed(phi: Activation, a: Any, gradient: Any) -> tuple[Any, Any, Any]:
    """⟨Λ, k⟩, Λ ∘ E[φ'φ'ᵀ] and ∂k*[Λ] at a covariance A."""
    k, pull = jax.vjp(functools.partial(gaussian.kernel, phi), a)
    (by_kernel,) = pull(gradient)
    own = gradient * gaussian.derivative_kernel(phi, a)
    return jnp.vdot(gradient, k), own, (by_kernel + by_kernel.T) / 2
