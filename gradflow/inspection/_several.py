"""Averages of a piece of several Gaussian variables, and of its derivatives."""

import functools
from typing import Any

import jax
import numpy as np

from gradflow.inspection import _forcing
from gradflow.inspection._expectations import SiteAverages
from gradflow.inspection._values import Piece

__all__ = ["OfSeveral"]


class OfSeveral:
    """A function of several sums of fields, or of one and of numbers for each site.

    ``slot`` is None for the function itself, else the variable that it is differentiated by.
    """

    def __init__(self, piece: Piece) -> None:
        variables = piece.variables
        covariance = np.array([[_forcing.covariance(u, v) for v in variables] for u in variables])
        means = np.array([v.constant for v in variables])
        self._node, self._many = piece.node, len(variables)
        self._averages = SiteAverages(covariance, means, piece.numbers)

    @functools.cache  # noqa: B019 - lives as long as its piece
    def _function(self, slot: int | None) -> Any:
        def f(*scalars: Any) -> Any:
            return self._node.evaluate(scalars[: self._many], scalars[self._many :])

        return self._averages.read(f if slot is None else jax.grad(f, slot))

    def average(self, slot: int | None) -> np.ndarray:
        """E of the function or of a derivative, (sites,)."""
        return self._averages.mean(self._function(slot))[0]

    def pair(self, one: int | None, other: int | None) -> np.ndarray:
        """E at pairs of sites, (sites, sites)."""
        return self._averages.second(self._function(one), self._function(other))[0]
