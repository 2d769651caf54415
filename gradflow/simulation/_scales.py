"""Signals and gradients beside the logarithm of their scale, and in range."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gradflow._norms import unit_rows
from gradflow.networks import Network

__all__ = [
    "add",
    "at_length_one",
    "at_unit_scale",
    "for_sites",
    "free_sizes",
    "in_range",
    "log_root_mean_square",
]
__all__ += ["log_weight_norm"]

# For signals smaller than this, or larger than its inverse, an activation equals its limit to
# rounding: of GELU, x/2 (1 + 0.8 x).
_SIZES = {"float32": 1e-10, "float64": 1e-18}


def free_sizes(network: Network, dtype: DTypeLike) -> tuple[float, float]:
    """Logarithms of the sizes between which a network's signals are kept as they are.

    Smaller and larger signals are kept at these sizes, beside a logarithm.
    """
    small, large = network.homogeneous_beyond
    end = -math.log(_SIZES.get(jnp.dtype(dtype).name, 1e-10))
    return -end if small else -math.inf, end if large else math.inf


def in_range(
    signal: Array, log_scale: Array, free: tuple[float, float], mixes: bool
) -> tuple[Array, Array]:
    """Return a signal between the `free_sizes`, and the logarithm of its scale, (sites,).

    The signal that is meant, here and on return, is exp(log_scale) times the array.
    """
    if not any(map(math.isfinite, free)):
        return signal, log_scale
    root = (signal.size if mixes else signal.shape[1]) ** 0.5
    log = at_unit_scale(signal, mixes)[1] - math.log(root) + log_scale
    # Signals of zeros stay.
    beyond = jnp.where(jnp.isfinite(log), log - jnp.clip(log, *free), 0)
    return signal * jnp.exp(log_scale - beyond)[:, None], beyond


def at_unit_scale(delta: Array, mixes: bool) -> tuple[Array, Array]:
    """Signals at a scale of 1, and the logarithm, (sites,), of their divisor.

    Each site has its own scale; where sites mix there must be one for all of them.
    """
    if not mixes:
        return unit_rows(delta)
    unit, log = unit_rows(delta.reshape(1, -1))
    return unit.reshape(delta.shape), jnp.broadcast_to(log, delta.shape[:1])


def at_length_one(v: Float[Array, "k sites n"], log_norm: Array) -> tuple[Array, Array]:
    """Vectors at length 1 over sites and units; their lengths go into the logarithms, (k,)."""
    rows, more = unit_rows(v.reshape(len(v), -1))
    return rows.reshape(v.shape), log_norm + more


def for_sites(log: Float[Array, " others"], sites: int) -> Float[Array, " sites"]:
    """Logarithms of scales for ``sites`` sites; where their number changes, all share one scale."""
    return log if log.shape[0] == sites else jnp.broadcast_to(log[:1], (sites,))


def log_root_mean_square(log: Float[Array, " sites"]) -> Float[Array, ""]:
    """Return the logarithm of the root mean square over sites, from logarithms."""
    return (jax.nn.logsumexp(2 * log) - math.log(log.shape[0])) / 2


def add(total: tuple[Array, Array], term: Array) -> tuple[Array, Array]:
    """Add with the rounding error carried along (Knuth's two-sum): 10 000 logs lose nothing."""
    high, low = total
    term = low + term
    new = high + term
    part = new - high
    error = (high - (new - part)) + (term - part)
    return new, jnp.where(jnp.isfinite(new), error, 0)


def log_weight_norm(tap: Float[Array, "sites sites"], log_length: Float[Array, " sites"]) -> Array:
    """Log ‖Σ_a δ_a x_aᵀ‖_F from (δ_a·δ_b)(x_a·x_b) of unit rows and the logs of their lengths."""
    largest = jnp.max(log_length)
    finite = jnp.where(jnp.isfinite(largest), largest, 0)
    weight = jnp.exp(log_length - finite)
    square = jnp.sum(tap * jnp.outer(weight, weight))
    # Rounding can leave a sum of cancelling terms a hair below zero.
    return jnp.log(jnp.maximum(square, 0)) / 2 + finite
