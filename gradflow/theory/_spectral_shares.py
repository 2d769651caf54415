"""Fractions of all singular values in bins: integrals of their density, and atoms."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow._checks import check_scale
from gradflow.theory._jacobian_law import SlopeLaw, as_layers
from gradflow.theory.spectral_density import density
from gradflow.theory.spectrum import support

__all__ = ["Shares", "shares"]


class Shares(NamedTuple):
    """Fractions of all singular values s that are 0, below, in and above bins; their sum is 1.

    NaN where (*) was not solved.
    """

    zero: Float[Array, ""]  # the atom at 0, which is in no bin
    below: Float[Array, ""]
    inside: Float[Array, " bins"]  # with isolated atoms; the last bin has its upper edge
    above: Float[Array, ""]


# Nodes in a bin; pieces above the last bin, and the least ratio of the ends of a piece.
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
        As for `spectrum.mean_and_variance`.
    edges
        Shape (bins + 1,): values s >= 0, ascending; the last is above 0.

    Returns
    -------
    Shares
        ``inside`` of shape (bins,).

    Raises
    ------
    InputError
        If an argument is out of range.

    Notes
    -----
    The integral is taken from the upper end of the law down. The remainder is put into the bin at
    the lower end: most singular values of a deep network are so far below the largest that no
    density can be followed to them. In each bin s = a + (b - a) (1 - cos πt)/2, so that a square
    root in the density, as at the ends of the law, is smooth in t.

    One orthogonal layer has the law of σ_w |φ'|, and no density is offered (`density`): its shares
    are known where φ is straight, and NaN elsewhere.
    """
    layers = as_layers(law, sigma_w2, depth, weights)
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
        within = jnp.clip(cuts, lower, jnp.maximum(lower, upper))
        s, node_weights = _nodes(within)
        empty = node_weights == 0
        typical = jnp.exp(layers.depth * layers.log_sigma_w2)
        at = jnp.where(empty, typical, s**2)
        rho = density(law, sigma_w2, depth, weights, at=at).of_singular_values
        each = jnp.sum(jnp.where(empty, 0, rho * node_weights), axis=1)
    beyond = jnp.append(jnp.cumsum(each[::-1])[::-1], 0)[: edges.size]
    beyond = jnp.where(edges <= lower, rest, beyond)
    # An isolated atom is in the bin that begins with it or before it; one at the last edge, in it.
    atoms = jnp.sqrt(ends.atoms)
    after = atoms[None, :] >= edges[:, None]
    after = after.at[-1].set(atoms > edges[-1])
    beyond += jnp.sum(jnp.where(after & (atoms > 0)[None, :], ends.masses[None, :], 0), axis=1)
    return Shares(
        zero=ends.masses[0],
        below=1 - ends.masses[0] - beyond[0],
        inside=beyond[:-1] - beyond[1:],
        above=beyond[-1],
    )


def _nodes(cuts: Float[Array, " cuts"]) -> tuple[Array, Array]:
    """Return nodes s and weights of the integral over each piece between cuts, (pieces, nodes).

    Weights are 0 where a piece is empty, or s is 0.
    """
    t, weight = (jnp.asarray(v, cuts.dtype) for v in np.polynomial.legendre.leggauss(_NODES))
    low, width = cuts[:-1, None], jnp.diff(cuts)[:, None]
    angle = (math.pi * (1 + t) / 2)[None, :]
    s = low + width * (1 - jnp.cos(angle)) / 2
    weights = jnp.sin(angle) * weight[None, :] * width * math.pi / 4
    return s, jnp.where((width == 0) | (s == 0), 0, weights)
