"""Comparisons: they agree where theory is right, and say so where it is not, and why."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import blocks, builders, comparison, ensembles, networks, statistics
from gradflow.comparison import Status
from gradflow.errors import InputError
from gradflow.simulation import monte_carlo
from gradflow.theory import float64, mean_field

X = np.asarray(jax.random.normal(jax.random.key(4), (2, 60), np.float32))

WIDTH, DEPTH, NETWORKS = 240, 5, 400


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", ensembles.ALL, ids=lambda e: e.name)
def test_theory_is_what_simulation_tends_to_for_every_ensemble(ensemble):
    # Orthogonal weights have the same mean-field theory, up to 1/width.
    network = builders.mlp([60, 120, 160, 160, 120], "tanh", ensemble)
    count = 60 if not network.iid_gaussian else NETWORKS
    found = comparison.compare(network, X, key=3, networks=count)
    assert not found.count(Status.DIFFERS), found.agreement


@pytest.mark.medium
def test_a_wrong_theory_is_found_and_not_called_finite_width():
    """Negative control: χ too large by a hundredth, at every layer."""
    network = builders.mlp([60, *[WIDTH] * DEPTH], "tanh", ensembles.fan_in(1.3))
    theory = float64.predict(network, X)
    simulation = monte_carlo.simulate(network, X, networks=8000, key=3)
    narrow = networks.divide_widths(network, 4)
    narrower = monte_carlo.simulate(narrow, X, networks=8000, key=4)
    wrong = dataclasses.replace(theory, values=theory.values | {"chi": theory.values["chi"] * 1.05})
    found = comparison.compare_results(
        wrong,
        simulation,
        narrower=[
            (
                narrower,
                dataclasses.replace(
                    wrong,
                    values=float64.predict(narrow, X).values | {"chi": wrong["chi"]},
                ),
            )
        ],
    )
    assert (found["chi"].status[:-1] == Status.DIFFERS).all()
    assert found["chi"].relative_difference[0] == pytest.approx(1 / 1.05 - 1, abs=0.01)
    assert "chi at layer" in found.agreement


@pytest.mark.medium
def test_finite_width_effects_are_told_from_errors():
    """Typical gradients of narrow, deep networks are below the mean by exp(-5 L/4n) (ReLU)."""
    network = builders.mlp([60, *[40] * 8], "relu", "he")
    found = comparison.compare(network, X, key=3, networks=4000)
    assert found["log_gradient_norm"].status[0] == Status.FINITE_WIDTH
    assert "finite-width effect" in found.agreement
    assert "are what theory says of this width" in found.agreement
    assert not found.narrower
    without = comparison.compare(network, X, key=3, networks=4000, explain=False)
    assert without["log_gradient_norm"].status[0] == Status.DIFFERS


@pytest.mark.medium
@pytest.mark.parametrize(
    ("activation", "weights", "kind"),
    [
        ("tanh", "standard", "vanishing"),
        ("tanh", "glorot", "critical"),
        ("tanh", "unscaled", "exploding"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("logistic", "glorot", "vanishing"),
                ("relu", "he", "critical"),
                ("relu", "glorot", "vanishing"),
                ("selu", "lecun", "exploding"),
            ]
        ),
    ],
)
def test_verdicts_follow_the_theory_and_not_a_threshold(activation, weights, kind):
    network = builders.mlp([60, *[100] * 12], activation, weights)
    found = comparison.compare(network, X, networks=20, explain=False)
    assert found.verdict.kind == kind
    assert found.verdict.factor == pytest.approx(found.verdict.factor_theory, rel=0.1)
    assert found.verdict.sentence.startswith(f"{kind} ×")


@pytest.mark.parametrize(
    ("widths", "weights", "kind"),
    [
        ([60, 90, 30, 10], "he", "critical"),  # χ is n_{l+1}/n_l, and norms stay
        ([60, 10, 30, 90], "he", "critical"),
        ([60, 40, 30, 40], "he", "critical"),
        ([60, 90, 30, 10], "lecun", "vanishing"),
        ([60, 10, 30, 90], "glorot", "vanishing"),
        ([60, 100, 100, 100, 100, 10], "he", "critical"),
    ],
)
@pytest.mark.slow
def test_verdicts_know_about_widths(widths, weights, kind):
    network = builders.mlp(widths, "relu", weights)
    found = comparison.compare(network, X, networks=20, explain=False)
    assert found.verdict.kind == kind


@pytest.mark.slow
def test_saturation_is_of_both_sides_and_names_its_layer():
    # Layer 1's q is 16 |x|²/n, where a third of logistic units are saturated; layer 2's is 180.
    saturated = builders.mlp([16, *[400] * 4], "logistic", "unscaled")
    found = comparison.compare(saturated, X[:, :16], networks=10, explain=False)
    assert found.verdict.saturated_from == 2
    assert "saturated from layer 2" in found.verdict.sentence
    rectified = builders.mlp([60, *[50] * 4], "relu", "he")
    assert comparison.compare(rectified, X, networks=10).verdict.saturated_from is None


def test_one_layer_has_no_factor_and_one_network_no_z_score():
    found = comparison.compare(builders.mlp([60, 20]), X, networks=1)
    assert "one layer has no gradient factor" in found.verdict.sentence
    assert found.count(Status.DIFFERS) == 0
    assert np.isnan(found["q"].standard_error).all()
    assert found.agreement == "nothing is compared: one network has no standard error"
    assert found.to_xarray().gradient_variance_theory.item() == 1


def test_theory_beside_a_simulation_is_float64_in_its_own_unit():
    """Not a float32 that overflows, or is 0, where the log does not."""
    theory = float64.predict(builders.mlp([60, *[50] * 60], "logistic", "glorot"), X)
    truth = np.exp(theory["log_gradient_variance"])
    assert theory["gradient_variance"].dtype == np.float64
    assert 0 < theory["gradient_variance"][0] < 1e-60
    np.testing.assert_allclose(theory["gradient_variance"], truth, rtol=1e-14)


def test_depths_that_differ_are_refused():
    theory = float64.predict(builders.mlp([60, 20, 20]), X)
    simulation = monte_carlo.simulate(builders.mlp([60, 20]), X, networks=2)
    with pytest.raises(InputError, match="theory has 2 layers and simulation has 1"):
        comparison.compare_results(theory, simulation)


@pytest.mark.medium
def test_results_are_labelled():
    found = comparison.compare(builders.mlp([60, 20, 20]), X, networks=5)
    dataset = found.to_xarray()
    assert "source" not in dataset.dims
    for statistic in statistics.ALL:
        assert {statistic.name, f"{statistic.name}_theory", f"{statistic.key}_theory"} <= set(
            dataset
        )
    np.testing.assert_allclose(dataset.q_theory, found.theory["q"])
    np.testing.assert_allclose(dataset.q, found.simulation["q"].value)
    assert dataset.q_z.dims == ("layer",)
    assert dataset.attrs["verdict"] == found.verdict.sentence


def test_blocks_are_all_constructible_without_arguments():
    for block in blocks.ALL:
        assert len(block().distributions) == block().n_weights


@pytest.mark.slow
def test_a_plain_initialiser_is_simulated_at_other_widths_too():
    """Widths of 4 and 2 are drawn inside a traced program, where their variance is measured."""

    def normal(key, shape, dtype):
        return 0.3 * jax.random.normal(key, shape, dtype)

    network = builders.mlp([60, 8, 8], "tanh", normal)
    x = jnp.asarray(X, jnp.float32)
    theory = float64.predict(network, X)
    simulation = monte_carlo.simulate(network, x, networks=20)
    # A theory that is wrong by a factor, so that the width must explain it, and cannot.
    wrong = dataclasses.replace(theory, values={**theory.values, "log_q": theory["log_q"] + 3})
    found = comparison.explain_differences(comparison.compare_results(wrong, simulation), X, key=1)
    assert found.narrower
    assert found.count(Status.DIFFERS)


def test_two_networks_cannot_tell():
    found = comparison.compare(builders.mlp([60, 20]), X, networks=2)
    assert found.agreement.startswith("2 networks cannot tell")
    assert "agree within" not in found.agreement


def test_a_statistic_of_ones_own_needs_no_prediction_and_has_labels():
    largest = statistics.Statistic(
        "largest", "largest |z|", measure=lambda sample: jnp.max(jnp.abs(sample.preactivation))
    )
    network = builders.mlp([60, 20])
    wanted = (*statistics.ALL, largest)
    simulation = monte_carlo.simulate(network, X, networks=3, wanted=wanted)
    dataset = simulation.to_xarray()
    assert dataset.largest.attrs["long_name"] == "largest |z|"
    np.testing.assert_array_equal(dataset.largest, simulation["largest"].value)
    found = comparison.compare_results(float64.predict(network, X), simulation)
    assert "largest" not in found.by_statistic
    assert "largest" in found.to_xarray()


def test_pixels_and_large_integers_are_what_they_are_as_floats():
    network = builders.mlp([60, 20])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 60))
    as_floats = mean_field.input_gram(pixels.astype(np.float64))
    for dtype in (np.uint8, np.int16, np.int64):
        found = mean_field.input_gram(pixels.astype(dtype))
        np.testing.assert_allclose(found, as_floats, rtol=1e-6)
    large = np.full((1, 60), 1 << 40)
    simulated = [
        monte_carlo.simulate(network, x, networks=2)["log_q"].log_value
        for x in (large, large.astype(np.float32))
    ]
    np.testing.assert_array_equal(*simulated)
