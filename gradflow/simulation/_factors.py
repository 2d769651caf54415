"""Matrices whose product is taken: Jacobians of layers, the first layer's first."""

import itertools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from gradflow._arguments import as_numbers
from gradflow._checks import check_sequence
from gradflow.errors import InputError

__all__ = ["checked_factors"]


def checked_factors(factors: Any) -> list[Array]:
    """Return matrices to be multiplied, the first factor first.

    Raises
    ------
    InputError
        If there is none, they are no matrices of real numbers, or shapes do not fit.
    """
    if not hasattr(factors, "shape"):
        what = "matrices, the first layer's first, as layer_jacobians returns them"
        factors = check_sequence("factors", factors, what)
    if (hasattr(factors, "shape") and not factors.shape) or not len(factors):
        raise InputError("factors is empty; it needs at least one matrix")
    matrices = [jnp.asarray(as_numbers("factors", factor)) for factor in factors]
    shapes = [factor.shape for factor in matrices]
    if any(len(shape) != 2 for shape in shapes):
        raise InputError(f"factors has shapes {shapes}; each is (rows, columns)")
    for below, above in itertools.pairwise(shapes):
        if above[1] != below[0]:
            raise InputError(
                f"factors has a matrix {above} after one {below}; each has as many columns as the "
                "one before has rows"
            )
    return matrices
