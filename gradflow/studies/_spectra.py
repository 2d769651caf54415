"""Singular values of the end-to-end Jacobian in a study: counted, and beside theory.

J = D^L W^L … D^1 W^1 (`gradflow.theory.spectrum`; `simulation.singular_values.end_to_end` of the
networks that everything else is measured of). Of each network the singular values are counted in
bins, and the counts and their squares added up over networks: what is kept does not grow with
them, and the standard error is that between networks, whose singular values keep their distance
from each other. Those that are 0, for want of units with a slope, are counted by themselves; all
others are above 0, and those below rounding are in the bin that begins at 0.

Theory is that of infinite width and of one q in all layers. Where q, by theory, is anywhere more
than 1 % from its mean over layers, and the law of φ' depends on it, theory is not offered, and NaN.
Gaussian networks differ from it by O(1/n), and their largest singular value by O(n^(-2/3)). Where
units without slope make zeros, there are those of the layer that has most of them, O(n^(-1/2)) more
than theory's atom; they are missing from the bin beside it.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow._compilation import Float64Program
from gradflow.activations import Activation
from gradflow.networks import Network
from gradflow.studies._study import HistogramRange
from gradflow.theory import spectrum

__all__ = ["BIN", "COMPARED", "counted", "labelled", "theory", "unknown"]

# The dimension of the results.
BIN = "singular_value_bin"
# What is compared with theory.
COMPARED = (
    "singular_value_density",
    "zero_singular_values",
    "mean_squared_singular_value",
    "squared_singular_value_relative_variance",
)
# By how much q may differ from its mean over layers, relative to it.
_SETTLED = 0.01
# Of a network's values that are averaged: relative rounding, in units of the dtype's epsilon, for
# each layer.
_ROUNDING = 4
# An atom of theory that is as near to an edge, relative to it, is on either side when measured.
_AT_EDGE = 1e-4
# Seconds that theory of a point runs for, or so: less than it takes to compile it well.
_SECONDS = 0.5

# Values of points by name, with their dimensions beyond that of points.
_Labelled = dict[str, tuple[tuple[str, ...], np.ndarray]]


def counted(logs: np.ndarray, point: np.ndarray, bins: HistogramRange) -> dict[str, np.ndarray]:
    """Return what is kept of networks' singular values; sums, so that it can be added up.

    Parameters
    ----------
    logs
        Natural logarithms, shape (networks, k); a network with a NaN is left out.
    point
        For each network which of the points it is of, from 0 on, ascending.
    bins
        The bins.

    Returns
    -------
    dict
        ``networks``, shape (points,); ``counts`` and ``squares`` of them, (points, bins + 3): those
        that are 0, those below, in and above the bins; ``sums``, ``sums_of_squares`` and ``known``,
        (points, 3): over networks, and over how many, the mean of s², the variance of s² over that
        squared, and the largest s.
    """
    points = int(point[-1]) + 1
    known = ~np.isnan(logs).any(axis=1)
    logs, point = logs[known].astype(np.float64), point[known]
    with np.errstate(over="ignore", under="ignore"):
        s = np.exp(logs)
    place = 1 + np.searchsorted(bins.edges, s, side="right")
    place[s == bins.stop] = 1 + bins.bins
    place[np.isneginf(logs)] = 0
    each = np.zeros((len(s), bins.bins + 3), np.int64)
    np.add.at(each, (np.arange(len(s))[:, None], place), 1)
    with np.errstate(all="ignore"):
        mean = np.mean(s**2, axis=1)
        spread = np.mean((s**2 / mean[:, None] - 1) ** 2, axis=1)
    values = np.stack([mean, spread, s.max(axis=1)], axis=1)
    finite = np.isfinite(values)
    values = np.where(finite, values, 0)

    def total(terms: np.ndarray) -> np.ndarray:
        found = np.zeros((points, *terms.shape[1:]), terms.dtype)
        np.add.at(found, point, terms)
        return found

    return {
        "networks": total(np.ones(len(s), np.int64)),
        "counts": total(each),
        "squares": total(each**2),
        "sums": total(values),
        "sums_of_squares": total(values**2),
        "known": total(finite.astype(np.int64)),
    }


def theory(network: Network, log_q: np.ndarray, bins: HistogramRange) -> dict[str, np.ndarray]:
    """Return what theory says of a network, in float64; NaN where it is not offered.

    Parameters
    ----------
    network
        Plain, as a study file with a spectrum has them.
    log_q
        log q^l at every layer, by theory.
    bins
        The bins.

    Returns
    -------
    dict
        ``shares``, shape (bins + 3,), of all singular values: 0, below, in and above the bins;
        ``at_edge``, (bins,): 1 where a bin has an atom at an edge; ``values``, (3,), as `counted`
        has their sums.
    """
    block: Any = network.stages[-1].block
    q = _one_q(network.activation, log_q)
    # Independent entries of any law have one limit; rows that sum to 0 are not independent.
    if block.distribution.centred or not 0 < q < np.inf:
        return unknown(bins)
    arguments = (q, float(block.sigma_w) ** 2, bins.edges)
    how = {"depth": network.depth, "orthogonal": block.distribution.haar}
    program = Float64Program.of(_theory, arguments, _SECONDS, activation=network.activation, **how)
    return dict(zip(unknown(bins), program(*arguments), strict=True))


def unknown(bins: HistogramRange) -> dict[str, np.ndarray]:
    """Return what `theory` does where it is not offered."""
    return {
        "shares": np.full(bins.bins + 3, np.nan),
        "at_edge": np.zeros(bins.bins),
        "values": np.full(3, np.nan),
    }


def _one_q(activation: Activation, log_q: np.ndarray) -> float:
    """Return the q of all layers, NaN if there is none; any where φ' does not depend on it."""
    if activation.homogeneous:
        return 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        q = np.exp(log_q)
        mean = float(q.mean())
        return mean if np.all(np.abs(q / mean - 1) <= _SETTLED) else np.nan


def _theory(
    q: Array, sigma_w2: Array, edges: Array, *, activation: Activation, depth: int, orthogonal: bool
) -> tuple[Array, Array, Array]:
    law = spectrum.slope_law(activation, q)
    layers = (sigma_w2, depth, "orthogonal" if orthogonal else "gaussian")
    found = spectrum.shares(law, *layers, edges=edges)
    shares = jnp.concatenate(
        [jnp.stack([found.zero, found.below]), found.inside, found.above[None]]
    )
    ends = spectrum.support(law, *layers)
    places = jnp.sqrt(jnp.where(ends.masses > 0, ends.atoms, 0))
    near = jnp.abs(places[None, :] - edges[:, None]) <= _AT_EDGE * edges[:, None]
    near = jnp.any(near & (places > 0)[None, :], axis=1)
    largest = jnp.fmax(jnp.sqrt(ends.upper), jnp.max(places))
    values = jnp.stack([*spectrum.mean_and_variance(law, *layers), largest])
    return shares, (near[1:] | near[:-1]).astype(shares.dtype), values


def labelled(
    found: Mapping[str, np.ndarray],
    laws: Mapping[str, np.ndarray],
    bins: HistogramRange,
    depth: int,
    dtype: str,
) -> _Labelled:
    """Return the results of points, each with its dimensions beyond that of points.

    Parameters
    ----------
    found, laws
        What `counted` and `theory` say, with an axis of points in front.
    bins
        The bins.
    depth, dtype
        Of the networks.
    """
    networks, counts = found["networks"], found["counts"]
    every = counts.sum(axis=1)[:, None]  # singular values, of all networks
    mean, error = _mean_and_error(counts, found["squares"], networks[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        k = every / networks[:, None]
        share, error = mean / k, error / k
        # One singular value more or less is the least that could have been seen.
        z = (share - laws["shares"]) / np.maximum(error, 1 / every)
    inside, width = slice(2, -1), (bins.stop - bins.start) / bins.bins
    # On which side of an edge rounding puts an atom is not compared.
    bin_z = np.where(laws["at_edge"] == 1, np.nan, z[:, inside])
    density, density_error, theory = (
        part[:, inside] / width for part in (share, error, laws["shares"])
    )
    results: _Labelled = {"singular_value_networks": ((), networks.astype(float))}
    results |= _compared("singular_value_density", (BIN,), density, density_error, theory, bin_z)
    for place, name in (
        (0, "zero_singular_values"),
        (1, "singular_values_below"),
        (-1, "singular_values_above"),
    ):
        results |= _compared(name, (), *[p[:, place] for p in (share, error, laws["shares"], z)])
    values, errors = _mean_and_error(found["sums"], found["sums_of_squares"], found["known"])
    expected = laws["values"]
    rounding = _ROUNDING * depth * float(np.finfo(dtype).eps) * (1 + np.abs(expected))
    z = (values - expected) / np.hypot(errors, rounding)
    # The largest is below theory's edge by n^(-2/3) of it in every network: no z.
    z[:, 2] = np.nan
    for place, name in enumerate((*COMPARED[2:], "largest_singular_value")):
        results |= _compared(name, (), *[p[:, place] for p in (values, errors, expected, z)])
    return results


def _compared(
    name: str,
    beyond: tuple[str, ...],
    value: np.ndarray,
    error: np.ndarray,
    expected: np.ndarray,
    z: np.ndarray,
) -> _Labelled:
    named = {"": value, "_standard_error": error, "_theory": expected, "_z": z}
    return {f"{name}{suffix}": (beyond, array) for suffix, array in named.items()}


def _mean_and_error(
    total: np.ndarray, squares: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a mean over networks and its standard error, NaN below two, from sums."""
    with np.errstate(all="ignore"):
        mean = total / count
        variance = np.maximum(squares - total * mean, 0) / np.where(count > 1, count - 1, np.nan)
        return mean, np.sqrt(variance / count)
