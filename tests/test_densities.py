"""Densities of units' signals are those of the networks that were simulated."""

import jax
import numpy as np
import pytest
import scipy.stats

from gradflow import blocks, builders, ensembles
from gradflow.simulation import monte_carlo
from gradflow.theory import float64

X = np.asarray(jax.random.normal(jax.random.key(2), (2, 40), np.float32)) * [[0.3], [2.0]]
FALSE_ALARMS = 1e-6  # of one call of `worst`
NETWORKS = 25


def simulated(activation, width=2000, **options):
    network = builders.mlp([40, *[width] * 3], activation, **options)
    simulation = monte_carlo.simulate(network, X, networks=NETWORKS, key=1, histograms=True)
    return float64.densities(network, X, simulation.histograms)


def worst(histogram, density):
    """The largest |t| over bins, and its limit if the density is right, by Bonferroni.

    Bins that are expected to hold 8 of a network's 4000 values or more, so that the mean over
    networks is as good as Gaussian.
    """
    enough = 4000 * density * np.diff(histogram.edges) >= 8
    t = (histogram.density - density)[enough] / histogram.standard_error[enough]
    return np.abs(t).max(), scipy.stats.t.isf(FALSE_ALARMS / (2 * t.size), NETWORKS - 1)


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param("tanh", marks=pytest.mark.medium),
        pytest.param("relu", marks=pytest.mark.slow),
    ],
)
def test_histograms_are_of_what_theory_says(activation):
    """Null: the theory's density. Width 2000: what is of order 1/width is below the errors."""
    histograms = simulated(activation, weights=ensembles.fan_in(1.8), sigma_b=0.2)
    assert set(histograms) == {"preactivation", "activation", "gradient"}
    for signal, histogram in histograms.items():
        found, limit = worst(histogram, histogram.theory)
        assert found < limit, signal
    # Power: a gradient below the top is not Gaussian, and this many networks show it.
    gradient = histograms["gradient"]
    middle = (gradient.edges[:, 1:] + gradient.edges[:, :-1]) / 2
    width = np.diff(gradient.edges)
    sd = np.sqrt((gradient.theory * width * middle**2).sum(axis=1, keepdims=True))
    found, limit = worst(gradient, scipy.stats.norm.pdf(middle / sd) / sd)
    assert found > limit


@pytest.mark.medium
def test_densities_integrate_to_one_and_an_atom_is_in_the_bin_that_begins_with_it():
    histograms = simulated("relu", width=300, weights="he")
    for signal, histogram in histograms.items():
        share = histogram.theory * np.diff(histogram.edges)
        np.testing.assert_allclose(share.sum(axis=1), 1, rtol=1e-3, err_msg=signal)
    dead = histograms["activation"]
    share = dead.theory * np.diff(dead.edges)
    (at_zero,) = np.flatnonzero(np.isclose(dead.edges[0], 0))
    assert (share[:, :at_zero] == 0).all()
    assert (share[:, at_zero] > 0.5).all()


@pytest.mark.medium
def test_where_a_gradient_does_not_go_through_one_activation_alone_it_is_not_said():
    network = builders.residual(20, 20, 3, "tanh")
    simulation = monte_carlo.simulate(network, X[:, :20], networks=3, histograms=True)
    found = float64.densities(network, X[:, :20], simulation.histograms)["gradient"].theory
    assert np.isnan(found[:-1]).all()
    assert np.isfinite(found[-1]).all()
    assert any(isinstance(s.block, blocks.Residual) for s in network.stages)
