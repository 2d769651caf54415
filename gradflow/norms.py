"""Norms that neither overflow nor underflow, as logarithms, at the price of a plain norm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["unit_rows"]

# Sums of squares between these have lost nothing to the ends of float32's range.
_SMALL, _LARGE = 1e-24, 1e30


@jax.custom_jvp
def unit_rows(
    x: Float[Array, "rows n"],
) -> tuple[Float[Array, "rows n"], Float[Array, " rows"]]:
    """Return each row at length 1, and the natural logarithm of the length it had.

    A row of zeros stays, and its logarithm is -inf; a row that is not finite becomes NaN. Any other
    is right from the smallest normal float to the largest, where a sum of squares is not.
    """
    first, second, log = _scales(x)
    return x * first * second, log


@unit_rows.defjvp
def _unit_rows_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    (x,), (x_dot,) = primals, tangents
    rows, log = unit_rows(x)
    half = jnp.exp(-jnp.where(jnp.isfinite(log), log, 0) / 2)[:, None]
    relative = x_dot * half * half
    log_dot = jnp.sum(rows * relative, axis=1)
    return (rows, log), (relative - rows * log_dot[:, None], log_dot)


@jax.custom_batching.custom_vmap
def _scales(x: Array) -> tuple[Array, Array, Array]:
    """Return two factors, (rows, 1) each, that make rows unit rows, and the logs of lengths."""
    squares = jnp.sum(x**2, axis=1, keepdims=True)
    # One pass over x suffices for nearly all; the branch is taken for all rows or for none.
    return jax.lax.cond(
        jnp.all((squares > _SMALL) & (squares < _LARGE)), _plain, _careful, x, squares
    )


@_scales.def_vmap
def _scales_of_batches(axis_size, in_batched, x):  # type: ignore[no-untyped-def]
    # Rows of a batch are rows: a cond must not become a select, which would run both branches.
    del in_batched
    scales = _scales(x.reshape(-1, x.shape[-1]))
    return tuple(s.reshape(axis_size, x.shape[1], *s.shape[1:]) for s in scales), (True,) * 3


def _plain(x: Array, squares: Array) -> tuple[Array, Array, Array]:
    del x
    return 1 / jnp.sqrt(squares), jnp.ones_like(squares), jnp.log(squares[:, 0]) / 2


def _careful(x: Array, squares: Array) -> tuple[Array, Array, Array]:
    """Scale by the largest entry before squaring."""
    del squares
    peak = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    zero = peak == 0
    # In two halves: the reciprocal of the largest floats is flushed to 0.
    half = 1 / jnp.sqrt(jnp.where(zero, 1, peak))
    length = jnp.linalg.norm(x * half * half, axis=1, keepdims=True)
    log = jnp.where(zero, -jnp.inf, jnp.log(length) - 2 * jnp.log(half))
    return half, half / jnp.where(zero, 1, length), log[:, 0]
