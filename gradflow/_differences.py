"""One statistic, theory beside measurement: differences, their z-scores and what explains them."""

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradflow import statistics
from gradflow._labels import BY_KEY
from gradflow.estimation import Estimate
from gradflow.predictions import Corrections, Prediction
from gradflow.simulation.monte_carlo import Simulation
from gradflow.statistics import Statistic

__all__ = [
    "Differences",
    "StatisticComparison",
    "Status",
    "at_layers",
    "compare_statistic",
]
__all__ += ["differences", "shrinks_with_the_width", "significance_threshold"]

# The chance that a comparison of correct theory with simulation shows any significant difference.
_FALSE_ALARM_RATE = 0.01
# A share of a value, below which its first order in 1/width is small.
_SMALL = 0.2
# Rounding of the simulation's float type that a measurement may carry, in units of its epsilon.
_ROUNDING = 8
# Rounding errors of differences of averages in float64, relative to the averages.
_ROUNDING_FLOAT64 = 1e-13


class Status(enum.IntEnum):
    """The outcome of one comparison; files hold the value."""

    NOT_COMPARED = -1
    AGREES = 0
    FINITE_WIDTH = 1
    DIFFERS = 2


class StatisticComparison(eqx.Module):
    """One statistic, theory beside measurement; every array of shape (layers,).

    ``theory``, ``measured`` and ``standard_error`` are natural logarithms (and the error that of
    the logarithm) where the statistic is carried as one; ``relative_difference`` is measured/theory
    - 1 either way, and NaN where the theory is below the standard error. ``shift`` is the
    difference that the network's width makes, by theory, to first order in 1/width, in the unit of
    ``theory``; NaN where theory does not say. ``deviation`` and ``theory_deviation`` are the
    standard deviations over networks in that unit.
    """

    theory: np.ndarray
    measured: np.ndarray
    standard_error: np.ndarray
    z: np.ndarray
    relative_difference: np.ndarray
    status: np.ndarray
    shift: np.ndarray
    deviation: np.ndarray
    theory_deviation: np.ndarray
    logarithmic: bool = eqx.field(static=True, default=False)

    def matches_correction(self, threshold: float) -> np.ndarray:
        """Whether the difference is ``shift``, the effect of the width by theory.

        Within its standard error or, where terms of order 1/width² matter, to a third of it.
        """
        with np.errstate(invalid="ignore"):  # both may be -inf, the logarithm of 0
            difference = self.measured - self.theory
            rest = np.abs(difference - self.shift)
        return (rest < threshold * self.standard_error) | (rest < np.abs(difference) / 3)

    def expands(self, threshold: float) -> bool:
        """Whether the width's first order is known and small wherever the difference is large."""
        large = np.abs(self.z) >= threshold
        with np.errstate(divide="ignore", invalid="ignore"):  # of what is 0, nothing is small
            size = np.abs(self.shift) / (1 if self.logarithmic else np.abs(self.theory))
        return bool(np.all(size[large] < _SMALL))


class Differences(NamedTuple):
    """Theory, measurement, its standard error and z-score, (layers,), of one statistic.

    All in the unit that the statistic is kept in: logarithms where it is carried as one.
    """

    theory: np.ndarray
    measured: np.ndarray
    standard_error: np.ndarray
    z: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """Measured less theory; NaN where both are infinite."""
        with np.errstate(invalid="ignore"):
            return self.measured - self.theory


def at_layers(key: str, theory: Prediction, simulation: Simulation) -> Differences:
    """The differences of a statistic, by key, at every layer; z is NaN where floats underflow."""
    predicted = np.asarray(theory.values[key], np.float64)
    network = simulation.network
    units = np.array(network.sites(simulation.sites)) * np.array(network.widths[1:])
    measured, error, z = differences(
        BY_KEY[key],
        predicted,
        simulation.estimates[key],
        simulation.networks * units,
        simulation.dtype,
    )
    z = np.where(_underflows(key, theory, simulation), np.nan, z)
    return Differences(predicted, measured, error, z)


def compare_statistic(
    statistic: Statistic,
    here: Differences,
    estimate: Estimate,
    dtype: str,
    corrections: Corrections | None,
    threshold: float,
) -> StatisticComparison:
    """A statistic's comparison; where a difference is significant, its status is `DIFFERS`.

    Parameters
    ----------
    statistic, here
        The statistic and its differences.
    estimate, corrections
        Its spread between networks, as measured and by theory, and the effect of the width.
    dtype
        That of the networks that were measured.
    threshold
        The z-score beyond which a difference is significant.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        difference = here.difference
        relative = (
            np.expm1(difference)
            if statistic.logarithmic
            # Of what is below its own standard error there is no relative difference.
            else np.where(
                np.abs(here.theory) > here.standard_error,
                difference / np.abs(here.theory),
                np.nan,
            )
        )
    # A difference below the rounding of the simulation's floats does not count as one.
    noise = _ROUNDING * float(jnp.finfo(dtype).eps)
    own_error = estimate.log_standard_error if statistic.log else estimate.standard_error
    shift = theory_deviation = np.full(len(here.z), np.nan)
    if corrections is not None:
        shift = _without_rounding(corrections.shift[statistic.key], here.theory)
        theory_deviation = np.asarray(corrections.standard_deviation[statistic.key])
    return StatisticComparison(
        theory=here.theory,
        measured=here.measured,
        standard_error=here.standard_error,
        z=here.z,
        relative_difference=np.where(np.abs(relative) < noise, 0.0, relative),
        status=np.where(np.abs(here.z) < threshold, Status.AGREES, Status.DIFFERS),
        logarithmic=statistic.logarithmic,
        shift=shift,
        deviation=own_error * np.sqrt(estimate.count),
        theory_deviation=theory_deviation,
    )


def _underflows(key: str, theory: Prediction, simulation: Simulation) -> np.ndarray:
    """Whether a value was measured of signals, or squares of them, below the floats' range."""
    network, statistic = simulation.network, BY_KEY[key]
    if network.homogeneous_beyond[0] or "log_q" not in theory.values:
        return np.zeros(network.depth, bool)
    log_q = np.asarray(theory.values["log_q"], np.float64)
    tiny = math.log(float(np.finfo(simulation.dtype).tiny))
    if statistic is statistics.weight_gradient_variance:  # of the squares of what enters a layer
        return np.append(False, log_q[:-1] < tiny)
    return (log_q / 2 < tiny) & (not statistic.backward)


def differences(
    statistic: Statistic, predicted: np.ndarray, estimate: Estimate, units: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The measured value, its standard error and z-score; logarithms where they are kept.

    Parameters
    ----------
    statistic
        The statistic, which says in which unit it is kept.
    predicted, estimate
        Theory in the unit that the statistic is kept in, and measurement, of one shape.
    units
        How many units there are in all networks: a fraction of them has a binomial error at least.
    dtype
        The simulation's, whose rounding a measurement may carry.
    """
    if statistic.log:
        measured, error = estimate.log_value, estimate.log_standard_error
    else:
        measured, error = estimate.value, estimate.standard_error
    if statistic.fraction:
        variance = np.clip(predicted * (1 - predicted), 0, None)
        error = np.maximum(error, np.sqrt(variance / np.maximum(units, 1)))
    epsilon = float(jnp.finfo(dtype).eps)
    # Of a logarithm, the rounding of what it is of, and its own.
    rounding = _ROUNDING * epsilon * (np.abs(predicted) + statistic.logarithmic)
    rounding += float(jnp.finfo(dtype).tiny)
    with np.errstate(invalid="ignore"):
        z = (measured - predicted) / np.hypot(error, rounding)
    # What has left the float's range is counted and said (the verdict), and not compared; nor are
    # the networks whose signals have not yet, which are the smaller ones.
    chosen = (estimate.excluded > 0) & (not statistic.backward)
    z = np.where(np.isfinite(measured) & ~chosen, z, np.nan)
    return measured, error, z


def _without_rounding(shift: ArrayLike, of: np.ndarray) -> np.ndarray:
    """A shift computed in float64; 0 where it is below the rounding of the value it is added to."""
    shift = np.asarray(shift)
    return np.where(np.abs(shift) < _ROUNDING_FLOAT64 * np.fmax(np.abs(of), 1.0), 0.0, shift)


def significance_threshold(networks: int, comparisons: int) -> float:
    """The z-score that 1 % of as many comparisons of correct theory exceed anywhere, by chance."""
    from scipy.special import stdtrit  # noqa: PLC0415  (slow to import)

    tail = _FALSE_ALARM_RATE / (2 * max(comparisons, 1))
    return float(-stdtrit(max(networks - 1, 1), tail))


def shrinks_with_the_width(
    at_widths: Sequence[tuple[np.ndarray, np.ndarray]], threshold: float
) -> np.ndarray:
    """Whether a difference d, with its error, at this width, a quarter and a half of it, goes to 0.

    As a/width its limit at infinite width is (4 d - d_quarter)/3, and as a/width + b/width² it is
    (8 d - 6 d_half + d_quarter)/3: one must vanish within its standard error or, where higher terms
    still show, to a third of d. And d must have grown beyond twice itself at a quarter, which an
    error that does not depend on the width does not.
    """
    difference, quarter = at_widths[0][0], at_widths[1][0]
    vanishes = np.zeros(difference.shape, bool)
    for shares in ((4, -1), (8, 1, -6))[: len(at_widths) - 1]:
        parts = list(zip(shares, at_widths, strict=False))
        with np.errstate(invalid="ignore"):  # of what has left the float's range
            limit = sum((share * d for share, (d, _) in parts), np.zeros(())) / 3
        error = np.sqrt(sum(((share * e) ** 2 for share, (_, e) in parts), np.zeros(()))) / 3
        vanishes |= (np.abs(limit) < threshold * error) | (np.abs(limit) < np.abs(difference) / 3)
    with np.errstate(invalid="ignore"):
        grew = quarter * np.sign(difference) > 2 * np.abs(difference)
    return vanishes & grew
