"""Averages over an attention layer's heads that are integrals: those of two tokens.

What is averaged is that of `gradflow.blocks._heads`, without positions, at infinite key width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow import activations, gaussian
from gradflow.blocks._heads import Averages, Moments

__all__ = ["of_two_tokens"]

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


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
    return Averages(covariance, tangent, jnp.zeros_like(covariance))
