"""Densities of single units' signals at infinite width, for histograms of a layer.

A pre-activation z of an input is N(0, q). A gradient is δ = φ'(z) g with g ~ N(0, s) independent of
z, as backward weights are as good as independent of forward ones (Schoenholz et al. 2017,
arXiv:1611.01232, section 4): a Gaussian of random scale, peaked at 0 where units saturate.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.special import ndtr, ndtri

from gradflow import gaussian
from gradflow._activation import known_slopes, known_values
from gradflow._programs import program
from gradflow.activations import Activation
from gradflow.blocks import Dense
from gradflow.estimation import Histogram, Values
from gradflow.networks import Network
from gradflow.statistics import BackwardLimit, ForwardLimit

__all__ = ["UnitLimits", "predicted"]

# Quantiles of z. A bin of φ(z) counts them, and is off by one of them at most; the density of a
# gradient is smooth in z.
_COUNTED, _AVERAGED = 1 << 16, 1 << 11


class UnitLimits(NamedTuple):
    """What the limits say of single units: arrays of shape (layers, sites), if not said otherwise.

    Attributes
    ----------
    gaussian
        Shape (layers,): whether pre-activations are Gaussian over units.
    deviation, log_scale
        The standard deviation of pre-activations is exp(log_scale) times the first.
    log_gradient
        The logarithm of the root mean square of gradients.
    """

    gaussian: Array | np.ndarray
    deviation: Array | np.ndarray
    log_scale: Array | np.ndarray
    log_gradient: Array | np.ndarray

    @classmethod
    def of(
        cls, forward: Sequence[ForwardLimit], backward: Sequence[BackwardLimit]
    ) -> "UnitLimits | None":
        """Those of `_limits.limits`; None if layers differ in their sites."""
        if len(forward) > 1:
            return None
        (signals,), (gradients,) = forward, backward
        deviation = jnp.sqrt(jnp.diagonal(signals.covariance, axis1=1, axis2=2))
        log_gradient = gradients.log_variance / 2
        return cls(signals.gaussian, deviation, signals.log_scale, log_gradient)


def predicted(
    network: Network,
    units: UnitLimits | None,
    histograms: Mapping[str, Histogram],
) -> dict[str, Histogram]:
    """Return the histograms with predicted densities, (layers, bins), as their ``theory``.

    Every input has its own q; a prediction is the mean density over inputs and over the bin. NaN at
    layers whose signals are not known to be Gaussian over units, and for gradients that do not
    reach z through one activation and one random matrix (`Dense`).

    Parameters
    ----------
    network
        The network that was simulated.
    units
        Its infinite-width limits.
    histograms
        Of ``preactivation``, ``activation`` and ``gradient``, as in a `Simulation`.
    """
    if units is None:
        return dict(histograms)
    known = np.asarray(units.gaussian)
    above = [s.block for s in network.stages for _ in range(s.repeats)][1:]
    through_one = known & np.array([*(type(block) is Dense for block in above), True])
    # Signals beyond a float's range: φ(z) is exp of this logarithm times what is computed.
    log_growth = np.asarray(_log_growth(network.activation, units.log_scale))
    phi, top = network.activation, len(known) - 1

    def shares(signal: str, layer: int, edges: Values, log_unit: float) -> Iterator[Values]:
        of_sites = *units[1:], log_growth
        for z, log_z, log_delta, log_h in zip(*(x[layer] for x in of_sites), strict=True):
            if signal == "preactivation":
                yield _of_gaussian(z * np.exp(log_z - log_unit), edges)
            elif signal == "activation":
                h = known_values(phi, z * _quantiles(_COUNTED))
                with np.errstate(over="ignore", invalid="ignore"):
                    yield np.histogram(h * np.exp(log_h - log_unit), edges)[0] / _COUNTED
            elif layer == top:
                yield _of_gaussian(np.exp(log_delta - log_unit), edges)
            else:
                slope = np.abs(known_slopes(phi, z * _quantiles(_AVERAGED)))
                root_mean_square = np.sqrt(np.mean(slope**2)) or 1.0
                scale = np.exp(log_delta - log_unit)
                yield _of_gaussian(scale * slope / root_mean_square, edges)

    with_theory = {}
    for signal, histogram in histograms.items():
        theory = np.full_like(histogram.density, np.nan)
        for layer in np.flatnonzero(through_one if signal == "gradient" else known).tolist():
            edges, log_unit = histogram.edges[layer], float(histogram.log_unit[layer])
            each = [*shares(signal, layer, edges, log_unit)]
            theory[layer] = np.mean(each, axis=0) / np.diff(edges)
        with_theory[signal] = dataclasses.replace(histogram, theory=theory)
    return with_theory


@program("activation")
def _log_growth(activation: Activation, log_scale: Array | np.ndarray) -> Array:
    return gaussian.growth(activation, jnp.asarray(log_scale))[0]


@functools.cache
def _quantiles(count: int) -> Values:
    """Return the standard normal's quantiles in the middle of ``count`` equal shares."""
    return ndtri((np.arange(count) + 0.5) / count)


def _of_gaussian(scale: Values | float, edges: Values) -> Values:
    """Return the fraction in each bin of a mixture of Gaussians of these standard deviations."""
    # A Gaussian without deviation is 0, and in the bin that begins there, as NumPy counts.
    with np.errstate(divide="ignore", invalid="ignore"):
        scale, edges = np.atleast_1d(scale), edges[:, None]
        below = np.where(scale > 0, ndtr(edges / scale), edges > 0)
    return np.diff(below.mean(axis=1))
