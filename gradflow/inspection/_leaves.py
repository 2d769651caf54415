"""The leaves of a model's parameters: sizes of weights, and of gradients relative to them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradflow.estimation import Estimate

__all__ = ["Leaves", "relative_theory"]


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The leaves of the parameters, in the order of their use; every array is of shape (leaves,).

    Attributes
    ----------
    names
        Their paths, as ``"['params']['Dense_0']['kernel']"``.
    sizes
        How many elements each has.
    log_weight, log_gradient
        log ‖W‖ and log ‖∂C/∂W‖, over the root of the number of elements: means over networks.
    log_relative, log_relative_error
        log ‖∂C/∂W‖/‖W‖, and its standard error over networks; NaN of weights that are 0.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    log_weight: np.ndarray
    log_gradient: np.ndarray
    log_relative: np.ndarray
    log_relative_error: np.ndarray

    @classmethod
    def of(
        cls, measured: Mapping[str, Mapping[str, np.ndarray]], sizes: Mapping[str, int]
    ) -> "Leaves":
        """The leaves from log mean squares of weights and of gradients, (networks,), by path."""
        weight, gradient = (
            np.array([np.asarray(one[name], np.float64) / 2 for one in measured.values()]).T
            for name in ("log_mean_square", "log_gradient_mean_square")
        )
        with np.errstate(invalid="ignore"):  # of weights without gradients, both are -inf
            relative = gradient - weight
        relative = Estimate.of(np.where(np.isfinite(weight), relative, np.nan))
        return cls(
            names=tuple(measured),
            sizes=np.array([sizes[name] for name in measured], float),
            log_weight=_mean(weight),
            log_gradient=_mean(gradient),
            log_relative=relative.value,
            log_relative_error=relative.standard_error,
        )

    def at(self, paths: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log ‖W‖, log ‖∂C/∂W‖/‖W‖ and its error of these leaves; NaN where one is named twice."""
        index = {name: i for i, name in enumerate(self.names)}
        known = [index[p] if p in index and paths.count(p) == 1 else None for p in paths]

        def chosen(values: np.ndarray) -> np.ndarray:
            return np.array([math.nan if i is None else values[i] for i in known])

        values = (self.log_weight, self.log_relative, self.log_relative_error)
        return chosen(values[0]), chosen(values[1]), chosen(values[2])


def relative_theory(theory: Mapping[str, Any], log_weight: np.ndarray) -> np.ndarray:
    """Log ‖∂C/∂W‖/‖W‖ of each layer by theory, of weights of this size."""
    variance = theory.get("log_weight_gradient_variance")
    return np.full_like(log_weight, np.nan) if variance is None else variance / 2 - log_weight


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over networks; -inf of what is 0 in all."""
    return np.asarray(values, np.float64).mean(axis=0)
