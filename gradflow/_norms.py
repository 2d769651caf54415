"""Norms that neither overflow nor underflow, as logarithms, at the price of a plain norm."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

__all__ = ["inverse_or_zero", "normalised_rows", "unit_rows"]

# Sums of squares between these have lost nothing to the ends of float32's range.
_SMALL, _LARGE = 1e-24, 1e30


@jax.custom_jvp
def unit_rows(
    x: Float[Array, "rows n"],
) -> tuple[Float[Array, "rows n"], Float[Array, " rows"]]:
    """Return each row at length 1, and the natural logarithm of the length it had.

    A row of zeros stays, and its logarithm is -inf; a row that is not finite becomes NaN. All other
    rows are right from the smallest normal float to the largest, where a plain sum of squares
    overflows or underflows.
    """
    squares, half = _squares(x)
    length = jnp.sqrt(squares)
    log = jnp.log(squares[:, 0]) / 2 - 2 * jnp.log(half[:, 0])
    return x * half * (half / jnp.where(squares == 0, 1, length)), log


@unit_rows.defjvp
def _unit_rows_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    (x,), (x_dot,) = primals, tangents
    rows, log = unit_rows(x)
    half = jnp.exp(-jnp.where(jnp.isfinite(log), log, 0) / 2)[:, None]
    relative = x_dot * half * half
    log_dot = jnp.sum(rows * relative, axis=1)
    return (rows, log), (relative - rows * log_dot[:, None], log_dot)


def normalised_rows(
    x: Float[Array, "rows n"], epsilon: ScalarLike | None = None
) -> Float[Array, "rows n"]:
    """Each row x divided by √((1/n) Σ x² + ε); without an ε a row of zeros stays."""
    rows, log = unit_rows(x)
    root = math.sqrt(x.shape[1])
    if epsilon is None:
        return root * rows
    size = jnp.hypot(jnp.exp(log - math.log(root)), jnp.sqrt(jnp.asarray(epsilon, x.dtype)))
    # In two halves: the reciprocal of the largest floats is flushed to 0.
    half = inverse_or_zero(jnp.sqrt(size))[:, None]
    return x * half * half


@jax.custom_batching.custom_vmap
def _squares(x: Array) -> tuple[Array, Array]:
    """Return Σ (s² x)² of each row, (rows, 1), and s, (rows, 1), which keeps it in range."""
    squares = jnp.sum(x**2, axis=1, keepdims=True)
    # One pass over x suffices for nearly all; the branch is taken for all rows or for none.
    plain = jnp.all((squares > _SMALL) & (squares < _LARGE))
    return jax.lax.cond(plain, _as_they_are, _careful, x, squares)


@_squares.def_vmap
def _squares_of_batches(axis_size, in_batched, x):  # type: ignore[no-untyped-def]
    # Rows of a batch are rows: a cond must not become a select, which would run both branches.
    del in_batched
    both = _squares(x.reshape(-1, x.shape[-1]))
    return tuple(v.reshape(axis_size, x.shape[1], 1) for v in both), (True,) * 2


def _as_they_are(x: Array, squares: Array) -> tuple[Array, Array]:
    del x
    return squares, jnp.ones_like(squares)


def _careful(x: Array, squares: Array) -> tuple[Array, Array]:
    """Scale by the largest entry before squaring."""
    del squares
    peak = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    # In two halves: the reciprocal of the largest floats is flushed to 0.
    half = 1 / jnp.sqrt(jnp.where(peak == 0, 1, peak))
    return jnp.sum((x * half * half) ** 2, axis=1, keepdims=True), half


def inverse_or_zero(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1/x, and 0 where x = 0: a signal without variance stays 0 when it is normalised."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
