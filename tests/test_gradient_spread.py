"""How far networks' gradients differ: the exact laws, first order, and simulation."""

import numpy as np
import pytest
import scipy.stats
import xarray

from gradflow import builders
from gradflow.estimation import Estimate
from gradflow.studies import _execution, _gradient_spread, _study_file
from gradflow.theory import float64
from gradflow.theory.finite_width import exact

SLOPES = {"linear": 2.0, "relu": 5.0}  # Hanin & Nica 2020


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (5, 10, 20, 15, 30)])
def test_theory_is_the_exact_law_of_the_gain_and_its_log_normal_limit(name, widths):
    """Of the layers that a gradient passes, down to each layer; beside what is to first order."""
    network = builders.mlp(widths, name, "he")
    corrections = float64.correct(network, np.ones((1, widths[0])))
    deviation = corrections.standard_deviation["log_gradient_norm"][None]
    log_norm = Estimate.of(np.random.default_rng(0).standard_normal((9, 1, network.depth)))
    found = _gradient_spread.spread(network, 1, log_norm, deviation)
    hidden = widths[1:]
    for layer in range(network.depth):
        downwards = hidden[layer:][::-1]
        variance = beta = 0.0
        if len(downwards) > 1:
            variance = exact.gain_moments(name, downwards).variance_of_log
            beta = exact.log_normal(name, downwards).variance
        assert found["gradient_spread_theory"][0, layer] == pytest.approx(float(variance), rel=1e-5)
        assert found["gradient_spread_first_order"][0, layer] == pytest.approx(
            float(beta), rel=1e-5, abs=1e-12
        )
        passed = found["depth_over_width"][0, layer]
        assert passed == pytest.approx(sum(1 / n for n in hidden[layer:-1]))
        assert beta == pytest.approx(SLOPES[name] * passed, rel=1e-5)


@pytest.mark.slow
def test_networks_differ_by_depth_over_width(tmp_path):
    """2000 networks of each of 6 laws, 7 layers below the top: within a false-alarm rate of 1e-3.

    Null: linear and ReLU networks have the exact law, and tanh's first order is right to a tenth at
    width 40. The logarithm is taken as normal; its excess kurtosis is 0.3 or less here.
    """
    text = """
    [network]
    depth = 8
    [[axes]]
    activation = ["linear", "relu", "tanh"]
    sigma_w2 = [1, 2, 1.76095]
    sigma_b2 = [0, 0, 0.05]
    mean_square = [1, 1, 0.295322]
    [[axes]]
    width = [20, 40]
    [sampling]
    networks = 2000
    [statistics]
    measure = ["log_gradient_norm"]
    """
    written = _execution.run(_study_file.parse(text), tmp_path / "study").results
    found = xarray.load_dataset(written).isel(layer=slice(None, -1))
    assert found.gradient_spread_z.shape == (3, 2, 7)
    limit = scipy.stats.norm.isf(1e-3 / (2 * found.gradient_spread_z.size))
    assert bool((abs(found.gradient_spread_z[:2]) < limit).all())
    off = found.gradient_spread - found.gradient_spread_theory
    slack = 0.1 * found.gradient_spread_theory
    allowed = limit * found.gradient_spread_standard_error
    assert bool((abs(off)[2] < (allowed + slack)[2]).all())
    # ReLU networks are not linear ones.
    assert bool(
        (abs(off)[0] + abs(found.gradient_spread[1] - found.gradient_spread[0]) > allowed[0]).all()
    )


def test_there_is_none_where_sites_mix():
    network = builders.mlp([4, 6, 6], "tanh", norm="batch")
    log_norm = Estimate.of(np.zeros((3, 1, 2)))
    assert _gradient_spread.spread(network, 4, log_norm, np.full((1, 2), np.nan)) == {}
