"""Positions of an input, as sites: row by row, an input's one after the other."""

import math
from collections.abc import Sequence
from numbers import Integral

from gradflow._checks import check_count
from gradflow.errors import InputError

__all__ = ["count_inputs", "count_positions", "lengths"]


def lengths(lengths: int | Sequence[int]) -> int | tuple[int, ...]:
    """Lengths as a tuple, or the only one of them: for a field that is static."""
    if isinstance(lengths, Sequence):
        return tuple(lengths)
    return int(lengths) if isinstance(lengths, Integral) else lengths  # NumPy's, too


def count_positions(shape: object) -> int:
    """The number of positions.

    Raises
    ------
    InputError
        If the shape is no tuple of lengths.
    """
    if not isinstance(shape, tuple) or not shape:
        raise InputError(f"shape is {shape!r}; it is a tuple of lengths, one for each spatial axis")
    return math.prod(check_count("a length in shape", length) for length in shape)


def count_inputs(sites: int, shape: tuple[int, ...]) -> int:
    """The number of inputs whose positions these sites are.

    Raises
    ------
    InputError
        If it is no whole number.
    """
    positions = math.prod(shape)
    if sites % positions:
        raise InputError(
            f"the signal has {sites} sites, and shape is {shape}; sites are inputs times positions,"
            f" a multiple of {positions}"
        )
    return sites // positions
