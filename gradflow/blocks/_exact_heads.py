"""Averages over an attention layer's heads that are integrals: of two tokens, and of tokens alike.

What is averaged is that of `gradflow.blocks._heads`, without positions, at infinite key width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gradflow import activations, gaussian
from gradflow.blocks._heads import Averages, Moments
from gradflow.gaussian._softmax import rows_are_known, softmax_rows

__all__ = ["are_alike", "of_tokens_alike", "of_two_tokens"]

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
# Between second moments of tokens that are alike, relative, in units of their dtype's epsilon.
_ROUNDING = 1 << 10


def of_two_tokens(moments: Moments, tangents: Moments | None, seen: np.ndarray) -> Averages:
    """The averages for two tokens: a token that sees both has A = (1 ± tanh(u/2))/2.

    Its u is the difference of its two scores, Cov(u_a, u_c) = Q_ac w, w that of the differences of
    keys.
    """
    sites = len(moments.values)
    free = np.tile(seen.all(axis=1), sites // 2)
    # Of a token that sees one: t = ±1. Else t has mean 0.
    t = np.tile(np.where(seen.all(axis=1), 0, np.where(seen[:, 0], 1, -1)), sites // 2)
    signs = np.array([1.0, -1.0])

    def blocks(k: Array, left: np.ndarray, right: np.ndarray) -> Array:
        """For each pair of sites Σ_bd left_b k_bd right_d, over the tokens of their inputs."""
        by_input = k.reshape(sites // 2, 2, sites // 2, 2)
        sums = _einsum("ibjd,b,d->ij", by_input, left.astype(k.dtype), right.astype(k.dtype))
        return jnp.repeat(jnp.repeat(sums, 2, axis=0), 2, axis=1)

    def differences(k: Array) -> Array:
        return blocks(k, signs, signs)

    both_free = free[:, None] & free[None]
    half = moments.queries * differences(moments.keys) / 4  # the covariance of u/2
    half = jnp.where(both_free, half, jnp.eye(sites, dtype=half.dtype))
    tanh = activations.tanh
    products = jnp.where(both_free, gaussian.kernel(tanh, half), np.outer(t, t))

    def averaged(k: Array) -> Array:
        """E[A k Aᵀ]."""
        ones = np.ones(2)
        one_sided = blocks(k, signs, ones) * t[:, None] + blocks(k, ones, signs) * t[None]
        return (blocks(k, ones, ones) + one_sided + products * differences(k)) / 4

    covariance, tangent = averaged(moments.values), None
    if tangents is not None:
        slopes = jnp.where(both_free, gaussian.derivative_kernel(tanh, half), 0) / 16
        by_query = tangents.queries * differences(moments.keys)
        by_key = moments.queries * differences(tangents.keys)
        path = slopes * differences(moments.values) * (by_query + by_key)
        tangent = averaged(tangents.values) + path
    nothing = jnp.zeros_like(covariance)
    return Averages(covariance, tangent, nothing, jnp.full_like(nothing, jnp.nan))


def _by_input(k: Float[Array, "sites sites"], tokens: int) -> Float[Array, "inputs t inputs t"]:
    return k.reshape(-1, tokens, k.shape[0] // tokens, tokens)


def _own(k: Float[Array, "sites sites"], tokens: int) -> tuple[Array, Array]:
    """Of each input the mean diagonal element, and the mean of the others."""
    blocks = _einsum("itiu->itu", _by_input(k, tokens))
    trace = jnp.trace(blocks, axis1=1, axis2=2)
    rest = jnp.sum(blocks, axis=(1, 2)) - trace
    return trace / tokens, rest / (tokens * (tokens - 1))


def _of_own(
    diagonal: Float[Array, " inputs"], rest: Float[Array, " inputs"], tokens: int, across: Array
) -> Float[Array, "sites sites"]:
    """Second moments of these within inputs, and between inputs of the mean of ``across``."""
    inputs = len(diagonal)
    own = jnp.eye(tokens, dtype=across.dtype)[None]
    within = diagonal[:, None, None] * own + rest[:, None, None] * (1 - own)
    between = jnp.mean(_by_input(across, tokens), axis=(1, 3))[:, None, :, None]
    same = jnp.eye(inputs, dtype=bool)[:, None, :, None]
    every = jnp.where(same, within[:, :, None, :], between)
    return every.reshape(inputs * tokens, inputs * tokens)


def _score_law(moments: Moments, tokens: int) -> tuple[Array, Array, Array]:
    """The variance of scores about a row's mean, and 1 less the correlation of two rows.

    The third result is whether averages are known for them: elsewhere both are 0.
    """
    q, between = _own(moments.queries, tokens)
    k, other = _own(moments.keys, tokens)
    variance = q * jnp.maximum(k - other, 0)
    apart = jnp.clip(1 - between / jnp.where(q > 0, q, 1), 0, tokens / (tokens - 1))
    known = rows_are_known(variance, apart)
    return jnp.where(known, variance, 0), jnp.where(known, apart, 0), known


def are_alike(moments: Moments, tokens: int) -> Bool[Array, ""]:
    """Whether tokens of an input are exchangeable, and uncorrelated with those of other inputs.

    But for what all tokens of an input have in common.
    """
    alike = jnp.all(_score_law(moments, tokens)[2])
    for k in moments:
        expected = _of_own(*_own(k, tokens), tokens, k)
        rounding = _ROUNDING * float(jnp.finfo(k.dtype).eps)
        alike &= jnp.max(jnp.abs(k - expected)) <= rounding * jnp.max(jnp.abs(k))
    return alike


def of_tokens_alike(moments: Moments, tangents: Moments | None, tokens: int) -> Averages:
    """The averages where tokens `are_alike`, of which tangents need not be."""
    variance, apart, _ = _score_law(moments, tokens)
    rows = softmax_rows(tokens, variance, apart)

    def averaged(k: Array) -> Array:
        """E[A k Aᵀ]: of an input's tokens, by the sums of k over equal and over unequal ones."""
        equal, unequal = _own(k, tokens)
        s = equal - unequal
        return _of_own(unequal + s * rows.P, unequal + s * rows.C, tokens, k)

    covariance, tangent = averaged(moments.values), None
    if tangents is not None:
        nothing = jnp.zeros_like(covariance)
        apart_in = [jnp.subtract(*_own(k, tokens)) for k in (*moments[1:], tangents.keys)]
        keys, values, moved = apart_in
        # tr[J K̇], J = I - 11ᵀ/T, is (T - 1)(K̇_d - K̇_o); E[M_c M_a] is R J/(T - 1).
        queries = _of_own(keys * values * rows.R, keys * values * rows.R_cross, tokens, nothing)
        by_key = _of_own(moved * values * rows.R, moved * values * rows.R_cross, tokens, nothing)
        path = tangents.queries * queries + moments.queries * by_key
        tangent = averaged(tangents.values) + path
    nothing = jnp.zeros_like(covariance)
    return Averages(covariance, tangent, nothing, jnp.full_like(nothing, jnp.nan))
