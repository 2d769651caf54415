"""What an initialiser draws: the mean and the variance of its entries, measured."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from gradflow._arguments import from_seed
from gradflow.errors import InputError

__all__ = ["PROBE", "Measured", "measure", "probe"]

# The entries from which `from_initializer` measures a variance: its relative error is √(2/N) = 5e-4
# for Gaussian entries; and those, of small matrices, that show of which kind it is.
_MEASURED_ENTRIES, _PROBED_ENTRIES, PROBE = 8_000_000, 1 << 17, (12, 8)
# Standard errors by which a mean, or the means of an independent law's entries, are not 0 or alike.
_REACH = 5.0
# The share of a mean square below which a variance is a rounding error.
_NO_VARIANCE = 1e-12


class Measured(NamedTuple):
    """Of an initialiser's entries: their mean, mean square and variance."""

    mean: float
    square: float
    variance: float
    entries: int
    unlike: float  # how unlike their means are: in standard errors, of independent entries

    @property
    def centred(self) -> bool:
        """Whether the mean is 0."""
        return abs(self.mean) <= _REACH * math.sqrt(self.square / self.entries)

    @property
    def structured(self) -> bool:
        """Whether entries are not independent about one mean."""
        return not self.centred and self.unlike > _REACH


def probe(initializer: Callable[..., Array], name: str) -> Measured:
    """Measure small matrices, whose kind is that of all."""
    return measure(initializer, name, PROBE, _PROBED_ENTRIES)


def measure(
    initializer: Callable[..., Array],
    name: str,
    shape: tuple[int, int],
    entries: int = _MEASURED_ENTRIES,
) -> Measured:
    """Measure at least so many entries of matrices of shape (fan_in, fan_out)."""
    repeats = -(-entries // math.prod(shape))

    def add(total: Array, key: PRNGKeyArray) -> tuple[Array, tuple[Array, Array]]:
        weights = initializer(key, shape, jnp.float32)
        apart = weights - about
        return total + apart, (jnp.mean(apart), jnp.mean(apart**2))

    try:
        with jax.ensure_compile_time_eval():
            keys = jax.random.split(from_seed(0), repeats)
            about = jnp.mean(initializer(keys[0], shape, jnp.float32))
            sums, of_each = jax.lax.scan(add, jnp.zeros(shape), keys)
            # Here, where it is known also while a program that draws is traced.
            total, means, squares = (np.asarray(x, np.float64) for x in (sums, *of_each))
            start = float(about)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"initializer {name!r} cannot draw a {shape} matrix: {str(error).splitlines()[0]}"
        ) from error
    mean, shift = start + float(means.mean()), float(means.mean())
    variance = float(squares.mean()) - shift**2
    square = mean**2 + variance
    if variance <= _NO_VARIANCE * square:
        return Measured(mean, mean**2, 0.0, total.size * repeats, 0.0)
    # Σ (M_ij - m)² of the entries' means M, which is χ² of as many degrees of freedom.
    spread = float(np.sum((total / repeats - shift) ** 2)) * repeats / variance
    unlike = (spread - total.size) / math.sqrt(2 * total.size)
    return Measured(mean, square, variance, total.size * repeats, unlike)
