"""Parameters as theory has them: laws of leaves, and what is moved or scaled of these."""

import dataclasses
from typing import Any

import numpy as np

__all__ = ["Law", "Leaf", "Weights", "apart"]


@dataclasses.dataclass(frozen=True)
class Law:
    """The law of a leaf's entries, which are independent.

    Attributes
    ----------
    mean, variance
        Of an entry.
    standard_error
        Of ``variance``; 0 where it is exact.
    gaussian
        Whether entries are known to be Gaussian.
    values
        The leaf itself where it is the same in all networks; else None.
    """

    mean: float
    variance: float
    standard_error: float = 0.0
    gaussian: bool = False
    values: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of independent entries, or what moves and scales them.

    Attributes
    ----------
    shape
        Its shape; along axes that are not in ``varying`` the entries are the same.
    varying
        Axes along which entries are independent.
    mean, variance
        Of an entry.
    error
        The relative standard error of ``variance``; 0 where it is exact.
    gaussian
        Whether entries are known to be Gaussian.
    tie
        Its `Leaf`, and what was done to it: products with one ``tie`` have the same weights.
    """

    shape: tuple[int, ...]
    varying: frozenset[int]
    mean: float
    variance: float
    error: float
    gaussian: bool
    tie: tuple[Any, ...]

    def scaled(self, factor: float) -> "Weights":
        """The weights times a number."""
        return dataclasses.replace(
            self, mean=self.mean * factor, variance=self.variance * factor**2
        )


class Leaf:
    """A leaf of the parameters, and the fields that it is as a bias, by how it is used."""

    def __init__(self) -> None:
        self.fields: dict[Any, Any] = {}


def apart(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two ways from a leaf to weights take different entries of it."""
    for a, b in zip(one[1:], other[1:], strict=False):
        if a != b:
            if isinstance(a, bytes) and isinstance(b, bytes):
                return not np.isin(np.frombuffer(a, np.int64), np.frombuffer(b, np.int64)).any()
            return isinstance(a, tuple) and isinstance(b, tuple) and a[0] == b[0]
    return False
