"""Depth scales as measured: over how many layers gradients, lengths and correlations change by e.

At infinite width squared gradients change by χ₁ a layer on the way down, and a length q and a
correlation c approach q* and c* by χ∥ and χ_c a layer on the way up (Schoenholz et al. 2017,
arXiv:1611.01232). Here the rates 1/ξ = -log χ are read off networks of a study:

    1/ξ_∇ = (log g^L - log g^m)/(L - m)           g^l the mean squared gradient, m the middle layer
    1/ξ_x = (log |x^a - x*| - log |x^b - x*|)/(b - a)      x = q or c, a and b layers below the top

Two layers, and no fit through more. Layers of one network are not independent: gradients and, where
c* = 1, correlations are products of factors, one a layer, and of the logarithm of such a product
the ends say all there is to know about its slope. And the standard error of a difference of two
layers follows from those that a study keeps, while that of a fit would take all covariances.

The top gradient is N(0, I): its length is independent of the factors that multiply it going down,
so that the variance of the difference is that at m less that at the top. Going up, fluctuations
carry over with the factors χ∥ and χ_c > 0, and covariances between layers are not negative: leaving
them out of a difference makes its standard error too large and never too small.

For x* theory's number is taken only where it holds at any width: c* = 1 where χ₁ <= 1 (equal
inputs stay equal), and q* = 0. Elsewhere x^L stands for it, as measured. The layers a and b are
chosen by theory's curve x^l and the measured errors, and not by the measured values: b is the last
layer where |x - x*| is at least five standard errors, and five times the top layer's in theory; a
lies halfway between the first such layer and b, past the transient. The same estimate from theory's
curve stands beside the measured one, and the two are compared: both differ alike from the
asymptotic 1/ξ at finite depth. Where theory's own estimate is off by more than a fifth, depth or
precision does not suffice, and there is no estimate.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import xarray
from jaxtyping import Array

from gradflow._programs import Float64Program
from gradflow.activations import Activation
from gradflow.blocks import Dense
from gradflow.studies._point import Point
from gradflow.studies._study import Study
from gradflow.theory import fixed_points
from gradflow.theory._depth_scales import DEPTH_SCALES
from gradflow.theory.fixed_points import Analysis

__all__ = ["Curve", "Rate", "add", "decay_rate", "gradient_rate"]

# The least depth of networks whose depth scales are measured.
_LEAST_DEPTH = 8
# The fewest standard errors from 0 of a distance from the fixed point, and of a rate with a ξ.
_CLEAR, _KNOWN = 5.0, 4.0
# The fewest layers from a to b; and the largest relative error of theory's own estimate of 1/ξ.
_STRETCH, _BIAS = 1, 0.2
# Rounding of the simulation's float type that a measurement may carry, in units of its epsilon.
_ROUNDING = 8
# The largest skewness of a mean of squared gradients, if they are log-normal, whose standard error
# is trusted.
_SKEWNESS = 0.5
# Seconds that the fixed points of one point take on one core.
_SECONDS = 5e-4


@dataclasses.dataclass(frozen=True)
class Curve:
    """A statistic of one point by layer: measured, its standard error, and theory; (layers,).

    ``shift`` is the effect of the width on theory, to first order, or NaN; ``rounding`` is the
    float type's epsilon. Curves of q and of gradients are natural logarithms.
    """

    measured: np.ndarray
    error: np.ndarray
    theory: np.ndarray
    shift: np.ndarray
    rounding: float

    @property
    def noise(self) -> np.ndarray:
        """The standard error, with rounding errors added in quadrature."""
        rounding = _ROUNDING * self.rounding * (1 + np.abs(self.theory))
        return np.asarray(np.hypot(self.error, rounding))


class Rate(NamedTuple):
    """The rate 1/ξ, in 1/layers, with all fields NaN where it is not known."""

    value: float = math.nan
    error: float = math.nan  # standard error
    theory: float = math.nan  # the same estimate from theory's curve
    z: float = math.nan
    shift: float = math.nan  # the effect of the width on theory's, to first order
    shifted_z: float = math.nan
    first: float = math.nan  # the two layers that it is estimated from, numbered from 1
    last: float = math.nan


def gradient_rate(curve: Curve, networks: float | int = math.nan) -> Rate:
    """Return the rate at which squared gradients vanish going down the upper half of the layers.

    Parameters
    ----------
    curve
        The log of the mean squared gradient; or the mean of 2 log ‖∂C/∂z‖, whose slope is that of
        the typical network, lower by half the variance of the logarithm.
    networks
        The number of networks in the mean of squares; NaN where the logarithm is averaged.

    Returns
    -------
    Rate
        NaN where a few networks make up most of the mean of squares, whose standard error is then
        no use: where a mean of log-normal numbers of that spread has a skewness above 1/2.
    """
    top = len(curve.measured) - 1
    middle = top // 2
    steps = top - middle
    spread = curve.error[middle] * math.sqrt(networks)
    if (3 + spread**2) * spread > _SKEWNESS * math.sqrt(networks):
        return Rate()

    def of(values: np.ndarray) -> float:
        return float(values[top] - values[middle]) / steps

    own = math.sqrt(max(curve.error[middle] ** 2 - curve.error[top] ** 2, 0.0))
    rounding = curve.rounding * _ROUNDING * (1 + abs(curve.theory[middle]))
    value, theory, shifted = map(of, (curve.measured, curve.theory, curve.theory + curve.shift))
    z, shifted_z = ((value - x) * steps / math.hypot(own, rounding) for x in (theory, shifted))
    layers = (middle + 1.0, top + 1.0)
    return Rate(value, own / steps, theory, z, shifted - theory, shifted_z, *layers)


def decay_rate(curve: Curve, xi: float, limit: float, *, known: bool, log: bool) -> Rate:
    """Return the rate at which q or c approaches its fixed point.

    Parameters
    ----------
    curve
        log q, or c.
    xi
        Theory's ξ, in layers.
    limit
        Theory's fixed point, q* or c*.
    known
        Whether the fixed point holds at any width; otherwise the top layer's value stands for it.
    log
        Whether the curve is a logarithm.

    Returns
    -------
    Rate
        NaN where it cannot be measured: see the module's docstring.
    """
    if not 0 < xi < math.inf:
        return Rate()

    def distances(values: np.ndarray, to: float | None = limit if known else None) -> _Distance:
        return _Distance.of(values, curve.noise, to, log=log)

    predicted, measured = distances(curve.theory), distances(curve.measured)
    clear = predicted.own + predicted.limit < 1 / _CLEAR
    if not known:  # the top must be as many times nearer to x*
        away = distances(curve.theory, limit).log[-1]
        clear &= predicted.log > away + math.log(_CLEAR)
    stretch = _stretch(clear)
    if stretch is None:
        return Rate()
    a, b = stretch
    expected = predicted.slope(a, b)
    if not abs(expected * xi - 1) < _BIAS:
        return Rate()
    shifted = distances(curve.theory + curve.shift)
    z, shifted_z = (measured.z(other, a, b) for other in (predicted, shifted))
    value, error = measured.slope(a, b), measured.error(a, b)
    if np.any(measured.sign[[a, b]] != predicted.sign[[a, b]]):
        value, error = math.nan, math.nan
    shift = shifted.slope(a, b) - expected
    return Rate(value, error, expected, z, shift, shifted_z, a + 1.0, b + 1.0)


class _Distance(NamedTuple):
    """log |x^l - x*| by layer, the sign, and its standard errors from x^l and from x*."""

    log: np.ndarray
    sign: np.ndarray
    own: np.ndarray
    limit: np.ndarray

    @classmethod
    def of(
        cls, values: np.ndarray, noise: np.ndarray, limit: float | None, *, log: bool
    ) -> "_Distance":
        """Return distances from x*; of a curve of log x in units of the top's x, if x* > 0."""
        if log and limit == 0:  # and x may have left the float's range
            return cls(values, np.ones_like(values), noise, np.zeros_like(noise))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            x = np.exp(values - values[-1]) if log else values
            scale = x if log else 1.0
            unit = np.exp(values[-1]) if log else 1.0
            away = x - (x[-1] if limit is None else limit / unit)
            size = np.abs(away)
            from_limit = scale * noise[-1] / size if limit is None else np.zeros_like(noise)
            return cls(np.log(size), np.sign(away), scale * noise / size, from_limit)

    def slope(self, a: int, b: int) -> float:
        return float(self.log[a] - self.log[b]) / (b - a)

    def z(self, theory: "_Distance", a: int, b: int) -> float:
        """Return the z of the slope, computed from distances as fractions of theory's.

        Such fractions are normal if theory is right. The logarithm of a distance of about five
        standard errors is not: it has a long tail towards small distances.
        """
        at_a, at_b = (
            self.sign[n] * theory.sign[n] * np.exp(self.log[n] - theory.log[n]) for n in (a, b)
        )
        return float(at_a - at_b) / (b - a) / theory.error(a, b)

    def error(self, a: int, b: int) -> float:
        """Return the standard error of the slope, covariances between layers taken as above.

        x^L is in both distances, with opposite signs; its covariance with x^a adds, and is at most
        that of equal fluctuations.
        """
        of_limit = abs(self.limit[a] * self.sign[a] - self.limit[b] * self.sign[b])
        return float(np.hypot(self.own[a] + of_limit, self.own[b])) / (b - a)


def _stretch(clear: np.ndarray) -> tuple[int, int] | None:
    """Return the layers a and b: the upper half of the last run of layers that are clear."""
    layers = np.flatnonzero(clear)
    if not layers.size:
        return None
    b = int(layers[-1])
    noisy = np.flatnonzero(~clear[:b])
    first = int(noisy[-1]) + 1 if noisy.size else 0
    a = first + (b - first + 1) // 2
    return (a, b) if b - a >= _STRETCH else None


# Of a study ---------------------------------------------------------------------------------------


def add(dataset: xarray.Dataset, study: Study) -> xarray.Dataset:
    """Return a study's results with the depth scales of its points.

    Only fully connected networks of one width have them, without normalisation or dropout, and of
    eight layers or more. Over the axes, of each of ``grad``, ``q`` and ``c`` that the study
    measures: ``rate_…``, its ``_standard_error``, ``_theory`` (the same estimate from theory's
    curve), ``_z``, ``_finite_width_shift`` and ``_finite_width_z``, and the layers ``_first`` and
    ``_last``; in layers, ``xi_…`` and its ``_standard_error``, where the rate is four standard
    errors from 0, and ``xi_…_theory``, which is that of the fixed point. ξ_∇ < 0 is growth on the
    way down.

    Parameters
    ----------
    dataset
        The labelled results, without depth scales; they are added to it.
    study
        Its study.
    """
    uniform = {n: one for n, p in enumerate(study.points()) if (one := _Uniform.of(p))}
    gradients = next((n for n in ("gradient_variance", "log_gradient_norm") if n in dataset), "")
    sources = {"grad": gradients, "q": "q", "c": "correlation"}
    sources = {name: source for name, source in sources.items() if source in dataset}
    if not uniform or not sources:
        return dataset
    asymptotic = _asymptotic(uniform)
    axes = tuple(axis.name for axis in study.axes)
    for name, source in sources.items():
        curves = _Curves(dataset, source, len(study))
        table = np.full((len(study), len(_COLUMNS)), np.nan)
        for number, networks in uniform.items():
            known = asymptotic[number]
            rate = _rate_of(name, curves.of(number, networks.depth), known, curves.networks(number))
            table[number] = (*rate, *_length(rate), float(getattr(known, f"xi_{name}")))
        of = DEPTH_SCALES[name] + (
            ", of the typical network" if source == "log_gradient_norm" else ""
        )
        labels = {"rate": f"1/ξ of {of}, 1/layers", "xi": f"ξ of {of}, in layers"}
        for column, values in zip(_COLUMNS, table.T, strict=True):
            kind, _, suffix = column.partition("_")
            whole = "_".join(filter(None, (kind, name, suffix)))
            dataset[whole] = (axes, values.reshape(study.shape), {"long_name": labels[kind]})
    return dataset


_COLUMNS = (
    *("rate", "rate_standard_error", "rate_theory", "rate_z"),
    *("rate_finite_width_shift", "rate_finite_width_z", "rate_first", "rate_last"),
    *("xi", "xi_standard_error", "xi_theory"),
)


def _rate_of(name: str, curve: Curve, known: Analysis, networks: float) -> Rate:
    if name == "grad":
        return gradient_rate(curve, networks)
    if name == "q":
        q, xi = float(known.q_star), float(known.xi_q)
        return decay_rate(curve, xi, q, known=q == 0, log=True)
    c, xi = float(known.c_star), float(known.xi_c)
    return decay_rate(curve, xi, c, known=c == 1, log=False)


def _length(rate: Rate) -> tuple[float, float]:
    """Return ξ and its standard error, to first order; NaN where 1/ξ may as well be 0."""
    if not abs(rate.value) > _KNOWN * rate.error:
        return math.nan, math.nan
    return 1 / rate.value, rate.error / rate.value**2


class _Curves:
    """A statistic of all points, by layer."""

    def __init__(self, dataset: xarray.Dataset, name: str, points: int) -> None:
        def table(key: str) -> np.ndarray:
            missing = np.full((points, dataset.sizes["layer"]), np.nan)
            return dataset[key].to_numpy().reshape(missing.shape) if key in dataset else missing

        key = f"log_{name}" if f"log_{name}" in dataset else name
        # 2 log ‖∂C/∂z‖ is the logarithm of a square, too.
        unit = 2.0 if name == "log_gradient_norm" else 1.0
        keys = (key, f"{key}_standard_error", f"{key}_theory", f"{name}_finite_width_shift")
        self._tables = [unit * table(k) for k in keys]
        self._networks = table(f"{name}_networks")
        self._of_a_mean = name != "log_gradient_norm"
        self._rounding = float(np.finfo(dataset.attrs["dtype"]).eps)

    def of(self, number: int, depth: int) -> Curve:
        measured, error, theory, shift = (table[number, :depth] for table in self._tables)
        return Curve(measured, error, theory, shift, self._rounding)

    def networks(self, number: int) -> float:
        """Return the number of networks in a mean of squares; NaN where logarithms are averaged."""
        return float(self._networks[number, 0]) if self._of_a_mean else math.nan


class _Uniform(NamedTuple):
    """Fully connected networks of one width: the arguments of `fixed_points.analyse`, and depth."""

    activation: Activation
    sigma_w2: float
    sigma_b2: float
    start: float
    depth: int

    @classmethod
    def of(cls, point: Point) -> "_Uniform | None":
        """Return a point's networks, or None if they are of another kind or too shallow."""
        network = point.network()
        if network.depth < _LEAST_DEPTH or len(network.stages) != 2 or not network.centred:
            return None
        first, rest = (stage.block for stage in network.stages)
        if not (isinstance(first, Dense) and isinstance(rest, Dense)):
            return None
        start = _square(first.sigma_w) * float(np.mean(point.inputs() ** 2))
        return cls(
            rest.activation,
            _square(rest.sigma_w),
            _square(rest.sigma_b),
            start + _square(first.sigma_b),
            network.depth,
        )


def _square(scale: Any) -> float:
    return 0.0 if scale is None else float(scale) ** 2


def _asymptotic(points: Mapping[int, _Uniform]) -> dict[int, Analysis]:
    """Return the fixed point of each, in float64; one program for all of an activation."""
    numbers: dict[Activation, list[int]] = {}
    for number, point in points.items():
        numbers.setdefault(point.activation, []).append(number)
    arguments = [np.array([points[n][1:4] for n in group]).T for group in numbers.values()]
    programs = [
        Float64Program(_analysis(phi), tuple(columns), _SECONDS * len(columns[0]))
        for phi, columns in zip(numbers, arguments, strict=True)
    ]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        tables = list(pool.map(lambda program, columns: program(*columns), programs, arguments))
    return {
        number: Analysis(*(values[row] for values in table))
        for group, table in zip(numbers.values(), tables, strict=True)
        for row, number in enumerate(group)
    }


@functools.cache
def _analysis(activation: Activation) -> Callable[[Array, Array, Array], Analysis]:
    return lambda w2, b2, start: fixed_points.analyse(activation, w2, b2, start=start)
