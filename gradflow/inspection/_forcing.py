"""Averages over units of sums: what a product with weights, or a mean over units, asks of them.

Of one Gaussian variable by gradflow's own averages (`gradflow.gaussian`), in float64 whatever the
model's type. Pieces that are products of independent ones factorise.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow import activations
from gradflow._unit_distributions import Shifted
from gradflow.activations import Activation
from gradflow.inspection._values import Field, Node, NoRule, Part, Piece, Sum
from gradflow.kernels import Gaussian, Kernel

__all__ = ["activation_of", "covariance", "mean", "second_moments"]

# Points at which functions are compared, and the relative difference of what is the same.
_PROBES = np.concatenate([-(2.0 ** np.arange(-9, 4.1, 0.37)), 2.0 ** np.arange(-9, 4.1, 0.41)])
_SAME = 1e-12


def mean(sum_: Sum) -> np.ndarray:
    """E of a unit at each site, (sites,)."""
    out = sum_.constant.astype(float)
    for part, map_ in sum_.parts.items():
        if isinstance(part, Piece):
            out = out + map_ @ _mean(part)
    return out


def second_moments(sum_: Sum) -> np.ndarray:
    """E of the products of a unit at all pairs of sites, (sites, sites)."""
    c = sum_.constant
    if c.any():
        m = mean(sum_)
        out = np.outer(m, c) + np.outer(c, m) - np.outer(c, c)
    else:
        out = np.zeros((sum_.sites, sum_.sites))
    for p, left in sum_.parts.items():
        for q, right in sum_.parts.items():
            joint = _joint(p, q)
            if joint is not None:
                out = out + left @ joint @ right.T
    return out


def covariance(one: Sum, other: Sum) -> np.ndarray:
    """The covariance of two sums of fields, (sites, sites)."""
    out = np.zeros((one.sites, other.sites))
    for field, left in one.parts.items():
        if field in other.parts:
            assert isinstance(field, Field)
            out = out + left @ field.covariance @ other.parts[field].T
    return out


def _mean(piece: Piece) -> np.ndarray:
    """E of a piece, (sites,)."""
    return _moments(piece)[1]


def _joint(p: Part, q: Part) -> np.ndarray | None:
    """E[p_s q_t] of two parts of a sum, (sites, sites); None where it is 0."""
    if isinstance(p, Field) and isinstance(q, Field):
        return p.covariance if p is q else None
    if p is q:
        assert isinstance(p, Piece)
        return _moments(p)[0]
    if p.fields.isdisjoint(q.fields):
        if isinstance(p, Field) or isinstance(q, Field):
            return None
        return np.outer(_mean(p), _mean(q))
    raise NoRule("two signals are added of which one is a function of the other")


def _moments(piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E[p_s p_t], E[p_s], and E[∂p_s ∂p_t] by its one variable."""
    known = piece.__dict__.get("moments")
    if known is None:
        known = piece.__dict__["moments"] = _of_one(piece)
    return known


def _of_one(piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if len(piece.variables) != 1 or not piece.variables[0].gaussian:
        raise NoRule("a function of several signals")
    if any(np.ptp(numbers) for numbers in piece.numbers):
        raise NoRule("a function of a signal and of numbers of each site")
    (z,) = piece.variables
    phi = activation_of(piece.node, tuple(float(numbers[0]) for numbers in piece.numbers))
    with jax.enable_x64(True):
        shift = z.constant if z.constant.any() else None
        made = _through(phi, covariance(z, z), shift)
        return tuple(map(np.asarray, made))  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnums=0)
def _through(phi: Activation, k: Any, shift: Any) -> tuple[Any, Any, Any]:
    """E[φφ], E[φ] and E[φ'φ'] of Gaussian signals of this covariance about their means."""
    law: Any = Gaussian() if shift is None else Shifted.at(shift)
    second = k if shift is None else k + jnp.outer(shift, shift)
    z = Kernel.of(second, shift, tangent=jnp.ones_like(k), distribution=law)
    h = z.through(phi).plain()
    return h.covariance, h.mean, h.tangent


@functools.lru_cache(maxsize=1 << 12)
def activation_of(node: Node, numbers: tuple[float, ...] = ()) -> Activation:
    """The function of one variable as an activation, one of gradflow's where it is the same."""

    def function(x: Any) -> Any:
        return node.evaluate((x,), numbers)

    with jax.enable_x64(True):
        values = np.asarray(function(jnp.asarray(_PROBES)))
        slopes = np.asarray(jax.jvp(function, (_PROBES,), (np.ones_like(_PROBES),))[1])
        for phi in activations.ALL:
            if _same(values, phi(_PROBES)) and _same(slopes, phi.derivative(_PROBES)):
                return phi
    return Activation("composite", function, kinks=())


def _same(values: np.ndarray, other: Any) -> bool:
    return np.allclose(values, np.asarray(other), rtol=_SAME, atol=_SAME)
