"""Attention's averages over random heads whose scores are Gaussian, by heads that are fixed.

A head's scores are s_ab with Cov(s_ab, s_cd) = Q_ac K_bd, Q and K the second moments of queries and
keys over all sites, and A is what makes weights of them, within each input: their rows' softmax.
What follows are averages of functions of A over 2 to 8 thousand heads, drawn once and for all and
with their mirror images, so that they are smooth functions of the moments.

With M_a = diag(A_a) - A_a A_aᵀ, the derivative of row a by its scores, and B_X = A X,

    tr[M_a X M_c Y] = [A (X∘Y) Aᵀ - A (B_X∘B_Y)ᵀ - (B_X∘B_Y) Aᵀ + (B_X Aᵀ)∘(B_Y Aᵀ)]_ac.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Lengths", "Moments", "average", "pulled", "root"]

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

# Numbers in an array of some heads' scores: heads are averaged by so many at a time.
_CHUNK = 1 << 19


class Lengths(NamedTuple):
    """How many inputs there are, and of each the tokens that ask and those that are asked."""

    inputs: int
    queries: int
    keys: int


class Moments(NamedTuple):
    """Second moments over sites of queries, keys and values; or of tangents of these."""

    queries: Float[Array, "asking asking"]
    keys: Float[Array, "asked asked"]
    values: Float[Array, "asked asked"]


Weights = Callable[[Float[Array, "heads inputs queries keys"]], Array]


def average(
    moments: Moments,
    tangents: Moments | None,
    weights: Weights,
    lengths: Lengths,
    slopes: Float[Array, " asking"] | None = None,
) -> tuple[Float[Array, "asking asking"], Float[Array, "asking asking"] | None]:
    """E[A V Aᵀ] and, of a tangent, E[A V̇ Aᵀ] + Q̇_ac E tr[M_a K M_c V] + Q_ac E tr[M_a K̇ M_c V].

    ``weights`` makes A of scores, with the derivative M of each row times its ``slopes`` (1).
    """
    asking, asked = len(moments.queries), len(moments.keys)
    dtype = moments.values.dtype
    half = max(1, _CHUNK // (asking * asked) // 2)
    chunks = -(-_count(asking, lengths) // (2 * half))
    roots = root(moments.queries), root(moments.keys)

    def add(total: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        key = jax.random.fold_in(jax.random.key(0), number)
        # Draws of float32 do for both precisions, which then have the same heads.
        draws = jax.random.normal(key, (half, asking, asked), jnp.float32).astype(dtype)
        a = weights(_scores(draws, *roots, lengths))
        return jax.tree.map(jnp.add, total, _of_heads(a, moments, tangents, slopes)), None

    nothing = jnp.zeros((asking, asking), dtype)
    start = nothing, nothing if tangents is not None else jnp.zeros((), dtype)
    (covariance, tangent), _ = jax.lax.scan(jax.checkpoint(add), start, jnp.arange(chunks))
    heads = 2 * half * chunks
    return _symmetric(covariance) / heads, None if tangents is None else _symmetric(tangent) / heads


def pulled(
    gradient: Float[Array, "asking asking"],
    moments: Moments,
    weights: Weights,
    lengths: Lengths,
    slopes: Float[Array, " asking"] | None = None,
) -> Moments:
    """The transpose of the tangent's map: second moments of gradients, from those of outputs."""

    def tangent(tangents: Moments) -> Array:
        moved = average(moments, tangents, weights, lengths, slopes)[1]
        assert moved is not None
        return moved

    _, pull = jax.vjp(tangent, jax.tree.map(jnp.zeros_like, moments))
    return jax.tree.map(_symmetric, pull(gradient)[0])


def _count(sites: int, lengths: Lengths) -> int:
    """The number of heads: more where each has few sites, fewer where a head is much work."""
    work = sites * sites * max(lengths.queries, lengths.keys)
    if work > 1 << 22:
        return max(256, (1 << 33) // work)
    return 2048 if sites > 32 else 4096 if sites > 8 else 8192


def _symmetric(k: Array) -> Array:
    return (k + k.T) / 2


def _scores(
    draws: Float[Array, "half asking asked"], queries: Array, keys: Array, lengths: Lengths
) -> Float[Array, "heads inputs queries keys"]:
    """The scores of heads of these draws, and of these with a minus."""
    inputs, asking, asked = lengths
    by_input = keys.reshape(inputs, asked, len(keys))
    asked_for = _einsum("ab,hbc->hac", queries, draws)
    asked_for = asked_for.reshape(len(draws), inputs, asking, len(keys))
    scores = _einsum("hiac,ibc->hiab", asked_for, by_input)
    return jnp.concatenate([scores, -scores])


def _of_heads(
    weights: Float[Array, "heads inputs queries keys"],
    moments: Moments,
    tangents: Moments | None,
    slopes: Array | None,
) -> tuple[Array, Array]:
    """The sums over these heads of what `average` averages, with half of it transposed."""
    heads, inputs, asking, asked = weights.shape
    sites = inputs * asking

    def rows(x: Array) -> Array:
        """A X, (heads, sites that ask, columns)."""
        by_input = x.reshape(inputs, asked, -1)
        return _einsum("hiab,ibs->hias", weights, by_input).reshape(heads, sites, -1)

    def columns(y: Array) -> Array:
        """The sum over heads of Y Aᵀ."""
        y = y.reshape(heads, sites, inputs, asked)
        return _einsum("hsjd,hjcd->sjc", y, weights).reshape(sites, sites)

    def each(y: Array) -> Array:
        """Y Aᵀ, (heads, sites that ask, sites that ask)."""
        y = y.reshape(heads, sites, inputs, asked)
        return _einsum("hsjd,hjcd->hsjc", y, weights).reshape(heads, sites, sites)

    mixed = rows(moments.values)
    covariance = columns(mixed)
    if tangents is None:
        return covariance, jnp.zeros((), covariance.dtype)
    both = each(mixed)

    def moved(k: Array) -> Array:
        """The sum of tr[M_a K M_c V]."""
        b = rows(k)
        ends = columns(rows(k * moments.values) - 2 * b * mixed)
        out = _symmetric(ends + jnp.sum(each(b) * both, axis=0))
        return out if slopes is None else out * jnp.outer(slopes, slopes)

    tangent = columns(rows(tangents.values))
    tangent += tangents.queries * moved(moments.keys)
    tangent += moments.queries * moved(tangents.keys)
    return covariance, tangent


def root(covariance: Float[Array, "sites sites"]) -> Float[Array, "sites sites"]:
    """L with L Lᵀ the covariance, lower triangular; columns of no variance to rounding are 0.

    Written out, as LAPACK's factorisation fails where sites are alike.
    """
    sites = len(covariance)
    least = 8 * sites * float(jnp.finfo(covariance.dtype).eps)
    variance = jnp.diagonal(covariance)
    below = jnp.arange(sites)[:, None] >= jnp.arange(sites)[None]

    def column(rest: Array, number: Array) -> tuple[Array, Array]:
        pivot = rest[number, number]
        there = pivot > least * variance[number]
        safe = jnp.where(there, pivot, 1)
        one = jnp.where(there & below[:, number], rest[:, number] / jnp.sqrt(safe), 0)
        return rest - jnp.outer(one, one), one

    _, columns = jax.lax.scan(column, covariance, jnp.arange(sites))
    return columns.T
