"""Averages over the random heads of an attention layer, by heads that are drawn once and for all.

A head's scores are s_ab = q_a · k_b/√w, and A its rows' softmax, within each input. Queries and
keys are Gaussian with second moments Q and K over all sites: at infinite key width w scores are
Gaussian too, with Cov(s_ab, s_cd) = Q_ac K_bd. Heads are fixed, so that averages are smooth
functions of the moments, and come in pairs of scores s and -s. With U = A at s = 0 and
M_a = diag(A_a) - A_a A_aᵀ, the derivative of row a by its scores, A is near U + x, x_a = M_a s_a;
what heads make of x beside its known average is subtracted, times a regression coefficient (a
control variate). With B_X = A X,

    tr[M_a X M_c Y] = [A (X∘Y) Aᵀ - A (B_X∘B_Y)ᵀ - (B_X∘B_Y) Aᵀ + (B_X Aᵀ)∘(B_Y Aᵀ)]_ac.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["Averages", "Moments", "average", "average_of_given", "root", "softmax"]

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

# Numbers in an array of some heads' scores: heads are averaged by so many at a time.
_CHUNK = 1 << 16


class Moments(NamedTuple):
    """Second moments over sites of queries, keys and values; or of tangents of these."""

    queries: Float[Array, "sites sites"]
    keys: Float[Array, "sites sites"]
    values: Float[Array, "sites sites"]


class Averages(NamedTuple):
    """Averages over heads.

    Attributes
    ----------
    covariance
        E[A V Aᵀ].
    tangent
        E[A V̇ Aᵀ] + E[Q̇_ac tr[M_a K M_c V] + Q_ac tr[M_a K̇ M_c V]]; None without tangents.
    error
        The standard error of ``covariance``, had the heads been drawn anew.
    spread
        The standard deviation over heads of A V Aᵀ; NaN where averages are integrals.
    """

    covariance: Float[Array, "sites sites"]
    tangent: Float[Array, "sites sites"] | None
    error: Float[Array, "sites sites"]
    spread: Float[Array, "sites sites"]


class _Sums(NamedTuple):
    """Sums over pairs of heads, of y = A V Aᵀ less its value at s = 0 and of z = x V xᵀ."""

    y: Array
    z: Array
    yy: Array
    zz: Array
    yz: Array
    squares: Array  # of y of one head, not of the mean of a pair
    tangent: Array  # that of `Averages`, with half of its terms transposed
    z_tangent: Array  # x V̇ xᵀ


def softmax(scores: Float[Array, "... tokens"], offset: Float[Array, "... tokens"]) -> Array:
    """The weights of scores, with an ``offset`` that is -inf where nothing is seen."""
    return jax.nn.softmax(jnp.where(jnp.isneginf(offset), -jnp.inf, scores + offset), axis=-1)


def average_of_given(weights: Float[Array, "kinds inputs tokens tokens"], k: Array) -> Array:
    """The average of A k Aᵀ over kinds of heads that there are equally many of."""
    return jnp.mean(_each(_rows(weights, k), weights), axis=0)


def average(
    moments: Moments,
    tangents: Moments | None,
    offsets: Float[Array, "kinds *inputs tokens tokens"],
    width: int | None = None,
    turns: np.ndarray | None = None,
) -> Averages:
    """The averages over heads.

    Parameters
    ----------
    moments, tangents
        Of queries, keys and values, and of tangents of these.
    offsets
        What is added to scores, by kinds of heads that there are equally many of, of all inputs or
        of each; -inf for tokens that are not seen.
    width
        The width w of queries and keys; infinite without it.
    turns
        Shape (modes, tokens, tokens), without a ``width``: functions u of tokens' distance, by
        which Cov(s_ab, s_cd) is Q_ac K_bd Σ u(a-c) u(b-d), and as much Σ u(a-b) u(c-d).
    """
    sites, tokens = len(moments.values), offsets.shape[-1]
    kinds, inputs, dtype = len(offsets), sites // tokens, moments.values.dtype
    modes = 1 if turns is None else len(turns)
    repeats = -(-_CHUNK // (modes * sites * max(sites, width or 0)) // kinds)
    half = max(1, repeats) * kinds
    chunks = -(-_count(sites) // (2 * half))
    roots = root(moments.queries), root(moments.keys)
    offsets = jnp.broadcast_to(
        offsets[:, None] if offsets.ndim == 3 else offsets, (kinds, inputs, tokens, tokens)
    )
    start = softmax(jnp.zeros_like(offsets), offsets)
    base = _each(_rows(start, moments.values), start)
    each_turn = None
    if turns is not None:
        each_turn = jnp.tile(jnp.asarray(turns, base.dtype), (1, inputs, inputs))

    def add(total: _Sums, number: Array) -> tuple[_Sums, None]:
        key = jax.random.fold_in(jax.random.key(0), number)
        scores, own = _draw(key, half, roots, tokens, width, turns)
        kind = jnp.arange(half) % kinds
        parts = (scores, offsets[kind], start[kind], base[kind])
        some = _sums(parts, own, moments, tangents, each_turn)
        return jax.tree.map(jnp.add, total, some), None

    zeros = _Sums(*[jnp.zeros_like(base[0])] * len(_Sums._fields))
    sums, _ = jax.lax.scan(jax.checkpoint(add), zeros, jnp.arange(chunks))
    mean = _Sums(*((x + x.T) / (2 * half * chunks) for x in sums))

    def known(values: Array) -> Array:
        """The average of x V xᵀ."""
        queries, keys = (_modes(k, each_turn) for k in moments[:2])
        by_kind = _path(_moved(start, values), queries, keys)
        return jnp.mean((by_kind + by_kind.swapaxes(1, 2)) / 2, axis=0)

    variance, both = mean.zz - mean.z**2, mean.yz - mean.y * mean.z
    # Where V is alike for all tokens x V is 0, but for rounding.
    size = jnp.diagonal(known(jnp.eye(sites, dtype=dtype))) * jnp.diagonal(moments.values)
    varies = variance > float(jnp.finfo(dtype).eps) * jnp.outer(size, size)
    slope = jnp.where(varies, both / jnp.where(varies, variance, 1), 0)
    covariance = jnp.mean(base, axis=0) + mean.y - slope * (mean.z - known(moments.values))
    left = jnp.maximum(mean.yy - mean.y**2 - slope * both, 0)
    spread = jnp.sqrt(jnp.maximum(mean.squares - mean.y**2, 0))
    tangent = None
    if tangents is not None:
        tangent = mean.tangent - slope * (mean.z_tangent - known(tangents.values))
    return Averages(covariance, tangent, jnp.sqrt(left / (half * chunks)), spread)


def _count(sites: int) -> int:
    """The number of heads: more where each has few sites to average over."""
    if sites > 64:
        return max(256, (1 << 17) // sites)
    return 2048 if sites > 32 else 4096 if sites > 8 else 8192


def _draw(
    key: Array,
    heads: int,
    roots: tuple[Array, Array],
    tokens: int,
    width: int | None,
    turns: np.ndarray | None,
) -> tuple[Array, tuple[Array, Array] | None]:
    """The scores of heads, (heads, inputs, tokens, tokens).

    At a finite width, second moments over each head's units of queries and keys, too.
    """
    (queries, keys), sites = roots, len(roots[0])

    def normal(key: Array, *shape: int) -> Array:
        # Draws of float32 do for both precisions, which then have the same heads.
        return jax.random.normal(key, shape, jnp.float32).astype(queries.dtype)

    if width is not None:
        one, two = jax.random.split(key)
        q = _einsum("ab,hbw->haw", queries, normal(one, heads, sites, width)) / width**0.25
        k = _einsum("ab,hbw->haw", keys, normal(two, heads, sites, width)) / width**0.25
        by_input = (x.reshape(heads, -1, tokens, width) for x in (q, k))
        own_q, own_k = (_einsum("haw,hcw->hac", x, x) / width**0.5 for x in (q, k))
        return _einsum("hiaw,hibw->hiab", *by_input), (own_q, own_k)
    modes = 1 if turns is None else len(turns)
    asked = _einsum("ab,hmbc->hmac", queries, normal(key, heads, modes, sites, sites))
    asked = asked.reshape(heads, modes, -1, tokens, sites)
    scores = _einsum("hmiac,ibc->hmiab", asked, keys.reshape(-1, tokens, sites))
    if turns is None:
        return scores[:, 0], None
    return _einsum("hmiab,mab->hiab", scores, jnp.asarray(turns, scores.dtype)), None


def _sums(
    parts: tuple[Array, Array, Array, Array],
    own: tuple[Array, Array] | None,
    moments: Moments,
    tangents: Moments | None,
    turns: Float[Array, "modes sites sites"] | None,
) -> _Sums:
    """The sums over heads, each paired with that of opposite scores.

    The ``parts`` are their scores and offsets, and A and A V Aᵀ at scores of 0.
    """
    scores, offset, start, base = parts
    pair = [softmax(s, offset) for s in (scores, -scores)]
    x = start * (scores - jnp.sum(start * scores, axis=-1, keepdims=True))
    one, two = (_each(_rows(a, moments.values), a) - base for a in pair)
    y, squares = (one + two) / 2, (one**2 + two**2) / 2
    z = _each(_rows(x, moments.values), x)
    nothing = jnp.zeros_like(base)
    each = (y, z, y**2, z**2, y * z, squares, nothing, nothing)
    sums = _Sums(*(jnp.sum(term, axis=0) for term in each))
    if tangents is None:
        return sums
    queries, keys = own or (_modes(k, turns) for k in moments[:2])
    by_query = _modes(tangents.queries, turns), keys
    by_key = queries, _modes(tangents.keys, turns)

    def passed(a: Array) -> Array:
        moved = _moved(a, moments.values)
        value = _each(_rows(a, tangents.values), a)
        return jnp.sum(value + _path(moved, *by_query) + _path(moved, *by_key), axis=0)

    z_tangent = jnp.sum(_each(_rows(x, tangents.values), x), axis=0)
    return sums._replace(tangent=(passed(pair[0]) + passed(pair[1])) / 2, z_tangent=z_tangent)


def _modes(k: Array, turns: Array | None) -> Float[Array, "modes sites sites"]:
    return k[None] if turns is None else k[None] * turns


def _path(moved: Callable[[Array], Array], queries: Array, keys: Array) -> Array:
    """Σ Q_ac tr[M_a K M_c V] over modes, for each head; of one mode, Q and K may be each head's."""
    if len(queries) == 1 or len(keys) == 1:
        return queries * moved(keys)
    total, _ = jax.lax.scan(
        lambda total, one: (total + one[0][None] * moved(one[1][None]), None),
        queries[:1] * moved(keys[:1]),
        (queries[1:], keys[1:]),
    )
    return total


def _moved(
    weights: Float[Array, "heads inputs tokens tokens"], values: Array
) -> Callable[[Array], Array]:
    """The function from K, of all heads or each, to each head's tr[M_a K M_c V].

    It is right when its product with Q, symmetric or antisymmetric as K is, is made symmetric.
    """
    mixed = _rows(weights, values)
    both = _each(mixed, weights)

    def moved(k: Array) -> Array:
        b = _rows(weights, k)
        left = _rows(weights, k * values[None]) - 2 * b * mixed
        return _each(left, weights) + _each(b, weights) * both

    return moved


def _rows(weights: Float[Array, "heads inputs tokens tokens"], x: Array) -> Array:
    """A X, (heads, sites, sites), of one X for all heads or one for each."""
    heads, inputs, tokens, _ = weights.shape
    x = x.reshape(-1, inputs, tokens, inputs * tokens)
    if len(x) == 1:
        out = _einsum("hiab,ibs->hias", weights, x[0])
    else:
        out = _einsum("hiab,hibs->hias", weights, x)
    return out.reshape(heads, inputs * tokens, -1)


def _each(y: Array, weights: Float[Array, "heads inputs tokens tokens"]) -> Array:
    """Y Aᵀ, (heads, sites, sites)."""
    heads, inputs, tokens, _ = weights.shape
    out = _einsum("hsjd,hjcd->hsjc", y.reshape(heads, -1, inputs, tokens), weights)
    return out.reshape(y.shape)


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
