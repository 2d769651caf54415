"""Estimates over networks: exact where that is known, mergeable, honest about what is left out."""

import functools

import numpy as np
import pytest
import scipy.special
import scipy.stats
import xarray

from gradflow import _histograms, builders, estimation
from gradflow.errors import InputError
from gradflow.estimation import Estimate
from gradflow.simulation import monte_carlo
from gradflow.statistics import log_gradient_norm, q
from gradflow.studies import _execution, _study_file

# Merging reorders float64 sums.
REORDERED = 1e-12


def values(networks_=50, layers=4, seed=0):
    return np.random.default_rng(seed).normal(size=(networks_, layers)) + 3


def test_mean_and_standard_error_are_the_textbook_ones():
    v = values()
    found = Estimate.of(v)
    np.testing.assert_allclose(found.value, v.mean(axis=0), rtol=REORDERED)
    np.testing.assert_allclose(found.standard_deviation, v.std(axis=0, ddof=1), rtol=REORDERED)
    np.testing.assert_allclose(
        found.standard_error, v.std(axis=0, ddof=1) / np.sqrt(50), rtol=REORDERED
    )


@pytest.mark.parametrize("log", [False, True])
def test_merged_parts_are_the_whole(log):
    v = values() * 300  # as logarithms, spread over hundreds of orders of magnitude
    whole = Estimate.of(v, log=log)
    parts = estimation.merge([Estimate.of(p, log=log) for p in np.split(v, [7, 8, 30])])
    np.testing.assert_array_equal(parts.count, whole.count)
    if log:
        np.testing.assert_allclose(parts.log_value, whole.log_value, rtol=REORDERED)
        np.testing.assert_allclose(parts.log_standard_error, whole.log_standard_error, rtol=1e-9)
    else:
        np.testing.assert_allclose(parts.value, whole.value, rtol=REORDERED)
        np.testing.assert_allclose(parts.standard_error, whole.standard_error, rtol=1e-9)


def test_logarithms_average_the_quantity_and_not_its_logarithm():
    found = Estimate.of(np.log([[1.0], [3.0]]), log=True)
    assert found.value[0] == pytest.approx(2)
    assert found.standard_deviation[0] == pytest.approx(np.sqrt(2))


def test_quantities_beyond_float64_have_a_mean():
    found = Estimate.of(np.array([[-5000.0], [-5000.0 + np.log(3)]]), log=True)
    assert found.log_value[0] == pytest.approx(-5000 + np.log(2))
    assert found.value[0] == 0


def test_a_quantity_of_zero_counts_and_a_value_that_is_not_finite_does_not():
    log = Estimate.of(np.array([[-np.inf], [0.0], [np.nan], [np.inf]]), log=True)
    assert (log.count[0], log.excluded[0], log.value[0]) == (2, 2, 0.5)
    plain = Estimate.of(np.array([[-np.inf], [4.0]]))
    assert (plain.count[0], plain.excluded[0], plain.value[0]) == (1, 1, 4)


def test_a_part_with_nothing_in_it_changes_nothing():
    empty, full = Estimate.of(np.full((3, 1), np.nan)), Estimate.of(np.array([[1.0], [2.0]]))
    for order in ([empty, full], [full, empty]):
        merged = estimation.merge(order)
        assert (merged.value[0], merged.count[0], merged.excluded[0]) == (1.5, 2, 3)


def test_one_network_has_no_standard_error():
    assert np.isnan(Estimate.of(np.ones((1, 2))).standard_error).all()


def test_a_level_that_is_no_probability_is_refused():
    with pytest.raises(InputError, match=r"level is 95.0; it is a number between 0 and 1"):
        Estimate.of(values()).confidence_interval(95.0)


def test_histograms_hold_every_unit_and_integrate_to_one():
    rng = np.random.default_rng(0)
    signal = [rng.normal(size=(5, 2, 300)) for _ in range(3)]
    logs = [np.full((5, 2), s) for s in (0.0, -400.0, 900.0)]
    found = _histograms.histogram(signal, logs)
    area = (found.density * np.diff(found.edges)).sum(axis=1)
    np.testing.assert_allclose(area, 1)
    np.testing.assert_allclose(found.log_unit, [0, -400, 900])


# Coverage of 95 % intervals. Linear networks with Gaussian weights of width n and depth L have
# ‖J u‖² = Π χ²_n/n exactly (reference table 6a). Null: the interval covers with probability 0.95;
# 2000 repeats of 200 networks; [0.93, 0.97] is ±4.1 standard deviations, false-alarm rate 4e-5.
REPEATS, NETWORKS = 2000, 200
WIDTH, DEPTH = 64, 5


@pytest.fixture
def linear_samples(simulations_compiled_well):  # noqa: ARG001
    return draw_linear_samples()


@functools.cache
def draw_linear_samples():
    network = builders.mlp([WIDTH] * (DEPTH + 1), "linear", "lecun")
    x = np.ones((1, WIDTH), np.float32)
    found = monte_carlo.simulate(
        network,
        x,
        key=5,
        networks=REPEATS * NETWORKS,
        wanted=(q, log_gradient_norm),
        keep_samples=True,
    )
    return {name: v.reshape(REPEATS, NETWORKS, DEPTH) for name, v in found.samples.items()}


def coverage(samples, truth, layer, log, shift=0.0):
    intervals = [Estimate.of(s[:, [layer]], log=log).confidence_interval() for s in samples]
    low, high = np.array(intervals)[..., 0].T
    return np.mean((low <= truth + shift) & (truth + shift <= high))


@pytest.mark.medium
def test_intervals_for_the_forward_variance_cover_the_truth(linear_samples):
    assert 0.93 < coverage(linear_samples["log_q"], 1.0, DEPTH - 1, log=True) < 0.97


@pytest.mark.medium
def test_intervals_for_the_typical_gradient_cover_the_truth(linear_samples):
    # δ^1 is δ^L, whose squared norm is χ²_n, through L - 1 layers: half a sum of L log-χ² means.
    log_chi2 = scipy.special.digamma(WIDTH / 2) + np.log(2)
    truth = (DEPTH * log_chi2 - (DEPTH - 1) * np.log(WIDTH)) / 2
    samples = linear_samples["log_gradient_norm"]
    assert 0.93 < coverage(samples, truth, 0, log=False) < 0.97
    # Negative control: the infinite-width value is off by a fifth of one network's spread.
    assert coverage(samples, np.log(WIDTH) / 2, 0, log=False) < 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # shapes of 2000 points take a third of the time
def test_intervals_of_points_that_stop_at_a_target_cover_what_they_say(tmp_path):
    """Null: 95 % intervals cover the exact mean in 95 % of 2000 points of linear networks.

    By the binomial law, outside of 93 to 97 % by chance in fewer than 1 of 10 000 runs. Rounds of 5
    that could stop from the first on would cover 92 %.
    """
    text = """
        [network]
        activation = "linear"
        weights = "lecun"
        width = 100
        depth = 1
        [[axes]]
        seed = { from = 0, to = 1999, points = 2000 }
        [sampling]
        target = { q = 0.025 }
        round = 5
        [statistics]
        measure = ["q"]
        [theory]
        finite_width = false
    """
    outcome = _execution.run(_study_file.parse(text), tmp_path / "study")
    assert outcome.rounds > 8
    found = xarray.load_dataset(outcome.results).isel(layer=0)
    assert found.q_networks.min() == 30
    width = scipy.stats.t.ppf(0.975, found.q_networks - 1) * found.log_q_standard_error
    covered = float((np.abs(found.log_q - found.log_q_theory) < width).mean())
    assert 0.93 < covered < 0.97
