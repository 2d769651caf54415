"""Depth scales: the number of layers over which a factor χ a layer amounts to e or 1/e."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow._roots import rounding

__all__ = ["DEPTH_SCALES", "depth_scale", "depth_scale_near_1"]

# The suffix of names in results, as `xi_grad`, and the quantity whose depth scale it is.
DEPTH_SCALES = {"grad": "gradients", "q": "lengths", "c": "correlations"}


def depth_scale(chi: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return -1/log|χ| in layers: > 0 for decay, < 0 for growth, +inf at |χ| = 1 to rounding."""
    # The logarithm of 0 has no derivative, and a `where` around it does not hide that.
    lost = chi == 0
    log = jnp.log(jnp.where(lost, 2, jnp.abs(chi)))
    critical = jnp.abs(log) <= rounding(log.dtype)
    scale = jnp.where(critical, jnp.inf, -1 / jnp.where(critical, 1, log))
    return jnp.where(lost, 0, scale)


def depth_scale_near_1(chi: Array, excess: Array) -> Array:
    """Return `depth_scale` of χ, from ``excess`` = χ - 1 where that has more digits."""
    close = jnp.abs(excess) < 0.5
    log = jnp.log1p(jnp.where(close, excess, 1))
    critical = jnp.abs(log) <= rounding(log.dtype)
    near = jnp.where(critical, jnp.inf, -1 / jnp.where(critical, 1, log))
    return jnp.where(close, near, depth_scale(jnp.where(close, 2, chi)))
