"""Attention's averages over random heads whose scores are Gaussian, by heads that are fixed.

A head's scores are s_ab with Cov(s_ab, s_cd) = Q_ac K_bd, Q and K the second moments of queries and
keys over all sites, and A its rows' softmax, within each input. What follows are averages of
functions of A over 2 to 8 thousand heads, drawn once and for all and with their mirror images, so
that they are smooth functions of the moments; `Averages.error` says how exact.

With M_a = diag(A_a) - A_a A_aᵀ, the derivative of row a by its scores, and B_X = A X,

    tr[M_a X M_c Y] = [A (X∘Y) Aᵀ - A (B_X∘B_Y)ᵀ - (B_X∘B_Y) Aᵀ + (B_X Aᵀ)∘(B_Y Aᵀ)]_ac.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["Moments", "average"]

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

# Numbers in an array of some heads' scores: heads are averaged by so many at a time.
_CHUNK = 1 << 19


class Moments(NamedTuple):
    """Second moments over sites of queries, keys and values; or of tangents of these."""

    queries: Float[Array, "sites sites"]
    keys: Float[Array, "sites sites"]
    values: Float[Array, "sites sites"]


def average(
    moments: Moments, tangents: Moments | None, seen: Bool[Array, "tokens tokens"]
) -> tuple[Float[Array, "sites sites"], Float[Array, "sites sites"] | None]:
    """E[A V Aᵀ] and, of a tangent, E[A V̇ Aᵀ] + Q̇_ac E tr[M_a K M_c V] + Q_ac E tr[M_a K̇ M_c V].

    ``seen`` says which tokens (columns) a token (row) looks at.
    """
    sites, dtype = len(moments.values), moments.values.dtype
    half = max(1, _CHUNK // sites**2 // 2)
    chunks = -(-_count(sites) // (2 * half))
    roots = root(moments.queries), root(moments.keys)

    def add(total: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        key = jax.random.fold_in(jax.random.key(0), number)
        # Draws of float32 do for both precisions, which then have the same heads.
        draws = jax.random.normal(key, (half, sites, sites), jnp.float32).astype(dtype)
        some = _of_heads(_weights(draws, *roots, seen), moments, tangents)
        return jax.tree.map(jnp.add, total, some), None

    nothing = jnp.zeros((sites, sites), dtype)
    start = nothing, nothing if tangents is not None else jnp.zeros((), dtype)
    numbers = jnp.arange(chunks)
    (covariance, tangent), _ = jax.lax.scan(jax.checkpoint(add), start, numbers)
    heads = 2 * half * chunks
    return _symmetric(covariance) / heads, None if tangents is None else _symmetric(tangent) / heads


def _count(sites: int) -> int:
    """The number of heads: more where each has few sites to average over."""
    return 2048 if sites > 32 else 4096 if sites > 8 else 8192


def _symmetric(k: Array) -> Array:
    return (k + k.T) / 2


def _weights(
    draws: Float[Array, "half sites sites"], queries: Array, keys: Array, seen: Array
) -> Float[Array, "heads inputs tokens tokens"]:
    """The attention weights of heads of these draws, and of these with a minus."""
    tokens = len(seen)
    by_input = keys.reshape(-1, tokens, len(keys))
    asked = _einsum("ab,hbc->hac", queries, draws)
    asked = asked.reshape(len(draws), -1, tokens, len(keys))
    scores = _einsum("hiac,ibc->hiab", asked, by_input)
    scores = jnp.concatenate([scores, -scores])
    return jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)


def _of_heads(
    weights: Float[Array, "heads inputs tokens tokens"], moments: Moments, tangents: Moments | None
) -> tuple[Array, Array]:
    """The sums over these heads of what `average` averages, with half of it transposed."""
    heads, inputs, tokens, _ = weights.shape
    sites = inputs * tokens

    def rows(x: Array) -> Array:
        """A X, (heads, sites, sites)."""
        by_input = x.reshape(inputs, tokens, sites)
        return _einsum("hiab,ibs->hias", weights, by_input).reshape(heads, sites, sites)

    def columns(y: Array) -> Array:
        """The sum over heads of Y Aᵀ."""
        y = y.reshape(heads, sites, inputs, tokens)
        return _einsum("hsjd,hjcd->sjc", y, weights).reshape(sites, sites)

    def each(y: Array) -> Array:
        """Y Aᵀ, (heads, sites, sites)."""
        y = y.reshape(heads, sites, inputs, tokens)
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
        return ends + jnp.sum(each(b) * both, axis=0)

    tangent = columns(rows(tangents.values))
    tangent += tangents.queries * _symmetric(moved(moments.keys))
    tangent += moments.queries * _symmetric(moved(tangents.keys))
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
