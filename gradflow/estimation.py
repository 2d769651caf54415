"""Estimates over networks: mean, standard deviation and standard error, mergeable.

Samples are networks, never units or layers of one network. A count, a mean and a sum of squared
deviations are kept in float64 on the host, and merged by the formulas of Chan, Golub & LeVeque
(1983). A statistic that is kept as a logarithm is averaged *as the quantity itself*, in units of
``exp(log_unit)``, so that squared gradients of order 1e-600 have a mean too.
"""

from collections.abc import Sequence

import equinox as eqx
import numpy as np

from gradflow._arguments import as_numbers
from gradflow._checks import check_sequence, is_number
from gradflow.errors import InputError

__all__ = ["Estimate", "Histogram", "merge"]

Values = np.ndarray


class Estimate(eqx.Module):
    """The mean of one statistic over networks and its standard error, at every layer.

    Attributes
    ----------
    count
        The number of networks with a finite value, shape (layers,).
    excluded
        The number of other networks: their value overflowed, or is the log of a dead network's 0.
    mean, squares
        Mean and sum of squared deviations, in units of exp(log_unit) and its square.
    log_unit
        Natural logarithm of the unit; 0 for statistics that are not kept as logarithms.
    """

    count: Values
    excluded: Values
    mean: Values
    squares: Values
    log_unit: Values

    @classmethod
    def of(cls, values: Values, *, log: bool = False) -> "Estimate":
        """The estimate from one value a network and layer.

        Parameters
        ----------
        values
            Shape (networks, layers).
        log
            Whether the values are natural logarithms of the quantity to average; -inf is 0.
        """
        values = np.asarray(as_numbers("values", values, np.float64), np.float64)
        usable = np.isfinite(values) | (log & np.isneginf(values))
        count = usable.sum(axis=0)
        log_unit = np.zeros(values.shape[1:])
        if log:
            top = np.max(values, axis=0, where=usable, initial=-np.inf)
            log_unit = np.where(np.isfinite(top), top, 0.0)
            values = np.exp(np.where(usable, values, -np.inf) - log_unit)
        values = np.where(usable, values, 0.0)
        mean = np.where(count > 0, values.sum(axis=0) / np.maximum(count, 1), np.nan)
        deviations = np.where(usable, values - np.where(count > 0, mean, 0.0), 0.0)
        return cls(
            count=count,
            excluded=len(values) - count,
            mean=mean,
            squares=(deviations**2).sum(axis=0),
            log_unit=log_unit,
        )

    @property
    def value(self) -> Values:
        """The mean over networks, in the statistic's own unit (0 or inf beyond float64's range)."""
        with np.errstate(over="ignore"):
            return self.mean * np.exp(self.log_unit)

    @property
    def log_value(self) -> Values:
        """The natural logarithm of the mean over networks; NaN where that is negative."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(self.mean) + self.log_unit

    @property
    def standard_deviation(self) -> Values:
        """The standard deviation over networks (n - 1 degrees of freedom); NaN for one network."""
        with np.errstate(over="ignore"):
            return self._relative_deviation() * np.exp(self.log_unit)

    @property
    def standard_error(self) -> Values:
        """The standard error of the mean over networks."""
        return self.standard_deviation / np.sqrt(np.maximum(self.count, 1))

    @property
    def log_standard_error(self) -> Values:
        """The standard error of ``log_value``, to first order: relative to the mean."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._relative_deviation() / np.sqrt(np.maximum(self.count, 1)) / self.mean

    def confidence_interval(self, level: float = 0.95) -> tuple[Values, Values]:
        """Student's confidence interval for the mean, (low, high), in the statistic's unit.

        Raises
        ------
        InputError
            If ``level`` is not between 0 and 1.
        """
        if not is_number(level) or not 0 < level < 1:
            raise InputError(f"level is {level!r}; it is a number between 0 and 1")
        from scipy.special import stdtrit  # noqa: PLC0415  (slow to import)

        reach = stdtrit(np.maximum(self.count - 1, 1), (1 + level) / 2)
        return self.value - reach * self.standard_error, self.value + reach * self.standard_error

    def _relative_deviation(self) -> Values:
        degrees = np.where(self.count > 1, self.count - 1, np.nan)
        return np.sqrt(self.squares / degrees)


def merge(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate from the networks of several, merged in their order.

    Raises
    ------
    InputError
        If ``estimates`` is empty.
    """
    estimates = check_sequence("estimates", estimates, "a sequence of Estimates")
    if not estimates:
        raise InputError("estimates is empty; it needs at least one to merge")
    merged = estimates[0]
    for other in estimates[1:]:
        merged = _merge(merged, other)
    return merged


def _merge(a: Estimate, b: Estimate) -> Estimate:
    both = np.maximum(a.log_unit, b.log_unit)
    log_unit = np.where(a.count == 0, b.log_unit, np.where(b.count == 0, a.log_unit, both))

    def rescaled(e: Estimate) -> tuple[np.ndarray, np.ndarray]:
        scale = np.exp(np.where(e.count > 0, e.log_unit - log_unit, 0.0))
        return np.where(e.count > 0, e.mean, 0.0) * scale, e.squares * scale**2

    (mean_a, squares_a), (mean_b, squares_b) = rescaled(a), rescaled(b)
    count = a.count + b.count
    share = b.count / np.maximum(count, 1)
    gap = mean_b - mean_a
    return Estimate(
        count=count,
        excluded=a.excluded + b.excluded,
        mean=np.where(count > 0, mean_a + gap * share, np.nan),
        squares=squares_a + squares_b + gap**2 * a.count * share,
        log_unit=log_unit,
    )


class Histogram(eqx.Module):
    """The distribution over units of a signal, at every layer, from a sample of networks.

    Attributes
    ----------
    edges
        Shape (layers, bins + 1), in units of exp(log_unit).
    density
        Shape (layers, bins): mean over networks of the normalised histogram, per exp(log_unit).
    standard_error
        Standard error of the density over networks; NaN for one network.
    log_unit
        Shape (layers,): natural logarithm of the unit.
    networks
        The number of networks.
    theory
        The density at infinite width, NaN where it is not known; None if it was not computed.
    """

    edges: Values
    density: Values
    standard_error: Values
    log_unit: Values
    networks: int = eqx.field(static=True)
    theory: Values | None = None
