"""Singular values of the end-to-end Jacobian in a study: counted, and beside theory.

J = D^L W^L … D^1 W^1 (`gradflow.theory.spectrum`), of the same networks as all other statistics, by
`simulation.singular_values.end_to_end`. Each network's singular values are counted in bins, and the
counts and their squares are summed over networks, so that files do not grow with the number of
networks. The standard error is that between networks: the singular values of one network repel each
other and are not independent. Zeros, which units without slope make, are counted apart; all other
singular values are above 0, and those below rounding are in the bin that begins at 0.

Theory is that of infinite width and of one q in all layers. Where q, by theory, is anywhere more
than 1 % from its mean over layers, and the law of φ' depends on it, there is no theory (NaN).
Gaussian networks differ from theory by O(1/n), and their largest singular value by O(n^(-2/3)). A
network has as many zeros as the layer with most units without slope, O(n^(-1/2)) more than theory's
atom at 0, and as many fewer in the bin beside it.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow import _bins
from gradflow._programs import Float64Program
from gradflow.activations import Activation
from gradflow.networks import Network
from gradflow.studies._study import HistogramRange
from gradflow.theory import _spectral_shares, spectrum

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
# Relative rounding of a network's averaged values, in units of the dtype's epsilon, a layer.
_ROUNDING = 4
# Relative distance from an edge within which rounding decides on which side an atom is measured.
_AT_EDGE = 1e-4
# Seconds that the theory of a point runs, about: less than it takes to compile it well.
_SECONDS = 0.5

# Values of points by name, with their dimensions beyond that of points.
_Labelled = dict[str, tuple[tuple[str, ...], np.ndarray]]


def counted(logs: np.ndarray, point: np.ndarray, bins: HistogramRange) -> dict[str, np.ndarray]:
    """Return the sums over networks, by point, that files have of their singular values.

    Parameters
    ----------
    logs
        Natural logarithms, shape (networks, k); a network with a NaN is left out.
    point
        The index of each network's point, from 0 on, ascending; shape (networks,).
    bins
        The bins.

    Returns
    -------
    dict
        ``networks``, their number, shape (points,); ``counts`` and ``squares``, of the singular
        values that are 0, below, in and above the bins, (points, bins + 3); ``sums``,
        ``sums_of_squares`` and ``known``, how many networks they are over, (points, 3): of
        the mean of s², of the variance of s² over that mean squared, and of the largest s.
    """
    points = int(point[-1]) + 1
    known = ~np.isnan(logs).any(axis=1)
    logs, point = logs[known].astype(np.float64), point[known]
    counts = _bins.counts_in_bins(logs, bins.edges)
    with np.errstate(over="ignore", under="ignore"):
        s = np.exp(logs)
    with np.errstate(all="ignore"):
        mean = np.mean(s**2, axis=1)
        spread = np.mean((s**2 / mean[:, None] - 1) ** 2, axis=1)
    values = np.stack([mean, spread, s.max(axis=1)], axis=1)
    finite = np.isfinite(values)
    values = np.where(finite, values, 0)

    def total(terms: np.ndarray) -> np.ndarray:
        sums = np.zeros((points, *terms.shape[1:]), terms.dtype)
        np.add.at(sums, point, terms)
        return sums

    return {
        "networks": total(np.ones(len(s), np.int64)),
        "counts": total(counts),
        "squares": total(counts**2),
        "sums": total(values),
        "sums_of_squares": total(values**2),
        "known": total(finite.astype(np.int64)),
    }


def theory(network: Network, log_q: np.ndarray, bins: HistogramRange) -> dict[str, np.ndarray]:
    """Return theory's shares and moments of a network, in float64; NaN where there is none.

    Parameters
    ----------
    network
        Fully connected, of one width and without normalisation: others are refused by `parse`.
    log_q
        log q^l at every layer, by theory.
    bins
        The bins.

    Returns
    -------
    dict
        ``shares``, shape (bins + 3,): of all singular values those that are 0, below, in and above
        the bins; ``at_edge``, (bins,): 1 where a bin has an atom at an edge; ``values``, (3,): the
        expected values of the three that `counted` sums.
    """
    block: Any = network.stages[-1].block
    q = _one_q(network.activation, log_q)
    # Independent entries of any law have one limit; rows that sum to 0 are not independent.
    if block.distribution.centred or not network.centred or not 0 < q < np.inf:
        return unknown(bins)
    arguments = (q, float(block.sigma_w) ** 2, bins.edges)
    how = {"depth": network.depth, "orthogonal": block.distribution.haar}
    program = Float64Program(_theory, arguments, _SECONDS, activation=network.activation, **how)
    return dict(zip(unknown(bins), program(*arguments), strict=True))


def unknown(bins: HistogramRange) -> dict[str, np.ndarray]:
    """Return the arrays of `theory` where there is none."""
    return {
        "shares": np.full(bins.bins + 3, np.nan),
        "at_edge": np.zeros(bins.bins),
        "values": np.full(3, np.nan),
    }


def _one_q(activation: Activation, log_q: np.ndarray) -> float:
    """Return the q of all layers, NaN if they differ; 1 where φ' does not depend on it."""
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
    parts = _spectral_shares.shares(law, *layers, edges=edges)
    shares = jnp.concatenate(
        [jnp.stack([parts.zero, parts.below]), parts.inside, parts.above[None]]
    )
    ends = spectrum.support(law, *layers)
    atoms = jnp.sqrt(jnp.where(ends.masses > 0, ends.atoms, 0))
    near = jnp.abs(atoms[None, :] - edges[:, None]) <= _AT_EDGE * edges[:, None]
    near = jnp.any(near & (atoms > 0)[None, :], axis=1)
    largest = jnp.fmax(jnp.sqrt(ends.upper), jnp.max(atoms))
    values = jnp.stack([*spectrum.mean_and_variance(law, *layers), largest])
    return shares, (near[1:] | near[:-1]).astype(shares.dtype), values


def labelled(
    sums: Mapping[str, np.ndarray],
    laws: Mapping[str, np.ndarray],
    bins: HistogramRange,
    depth: int,
    dtype: str,
) -> _Labelled:
    """Return the variables of the results by name, each with its dimensions beyond the points.

    Parameters
    ----------
    sums, laws
        The arrays of `counted`, and of `theory` with an axis of points in front.
    bins
        The bins.
    depth, dtype
        The number of layers, and the float type that networks are drawn in.
    """
    networks, counts = sums["networks"], sums["counts"]
    every = counts.sum(axis=1)[:, None]  # singular values, of all networks
    mean, error = _bins.mean_and_error(counts, sums["squares"], networks[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        k = every / networks[:, None]
        share, error = mean / k, error / k
        # No share is known to better than one singular value of all of them.
        z = (share - laws["shares"]) / np.maximum(error, 1 / every)
    inside, width = slice(2, -1), (bins.stop - bins.start) / bins.bins
    # An atom at an edge is not compared: rounding decides in which bin it is counted.
    bin_z = np.where(laws["at_edge"] == 1, np.nan, z[:, inside])
    density, density_error, theory = (
        part[:, inside] / width for part in (share, error, laws["shares"])
    )
    results: _Labelled = {"singular_value_networks": ((), networks.astype(float))}
    results |= _compared("singular_value_density", (BIN,), density, density_error, theory, bin_z)
    for column, name in (
        (0, "zero_singular_values"),
        (1, "singular_values_below"),
        (-1, "singular_values_above"),
    ):
        results |= _compared(name, (), *[p[:, column] for p in (share, error, laws["shares"], z)])
    values, errors = _bins.mean_and_error(sums["sums"], sums["sums_of_squares"], sums["known"])
    expected = laws["values"]
    rounding = _ROUNDING * depth * float(np.finfo(dtype).eps) * (1 + np.abs(expected))
    z = (values - expected) / np.hypot(errors, rounding)
    # The largest has no z: in every network it is below theory's edge by a share of n^(-2/3).
    z[:, 2] = np.nan
    for column, name in enumerate((*COMPARED[2:], "largest_singular_value")):
        results |= _compared(name, (), *[p[:, column] for p in (values, errors, expected, z)])
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
