"""Verdicts say what arrives: held against gradients that NumPy computes, network by network."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import blocks, builders, comparison, statistics, verdict
from gradflow._labels import BY_KEY
from gradflow.comparison import Status
from gradflow.predictions import Prediction
from gradflow.simulation import monte_carlo


def numpy_gradients(widths, variances, phi, slope, x, count):
    """Mean log ‖∂C/∂z^l‖ and log ‖∂C/∂W^l‖/‖W^l‖ over networks drawn by NumPy, and their errors."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(count):
        weights = [
            math.sqrt(v) * rng.standard_normal((n, m))
            for v, m, n in zip(variances, widths[:-1], widths[1:], strict=True)
        ]
        signals, h = [], [x]
        for w in weights:
            signals.append(w @ h[-1])
            h.append(phi(signals[-1]))
        delta = [rng.standard_normal(widths[-1])]
        for w, z in zip(weights[:0:-1], signals[-2::-1], strict=True):
            delta.insert(0, (w.T @ delta[0]) * slope(z))
        norms = [np.linalg.norm(d) for d in delta]
        relative = [
            d * np.linalg.norm(below) / np.linalg.norm(w)
            for d, below, w in zip(norms, h[:-1], weights, strict=True)
        ]
        rows.append([norms, relative])
    logs = np.log(rows)
    return logs.mean(axis=0), logs.std(axis=0, ddof=1) / math.sqrt(count)


SLOW = pytest.mark.slow
RELU = (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0)
TANH = (np.tanh, lambda z: 1 - np.tanh(z) ** 2)


def he(widths):
    return [2 / n for n in widths[:-1]]


def glorot(widths):
    return [2 / (n + m) for n, m in zip(widths[:-1], widths[1:], strict=True)]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("widths", "name", "phi", "weights", "rule", "kind"),
    [
        ((100, 60, 20, 5), "relu", RELU, "he", he, "critical"),
        ((3, 50, 50, 1), "tanh", TANH, "glorot", glorot, "critical"),
        pytest.param(
            (30, 60, 16, 60, 30), "relu", RELU, "he", he, "critical", marks=pytest.mark.slow
        ),
        pytest.param(
            (10, 20, 40, 80, 160),
            "relu",
            RELU,
            "glorot",
            glorot,
            "vanishing",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (160, 80, 40, 20, 10),
            "tanh",
            TANH,
            "glorot",
            glorot,
            "critical",
            marks=pytest.mark.slow,
        ),
        pytest.param((20, 30, 1), "relu", RELU, "he", he, "critical", marks=pytest.mark.slow),
    ],
)
def test_factors_are_those_of_norms_that_numpy_finds(widths, name, phi, weights, rule, kind):
    """Null: both draw one law. Eight z-scores at most in six cases, each beyond 5 by 6e-7."""
    network = builders.mlp(widths, name, weights)
    x = np.random.default_rng(0).standard_normal(widths[0]).astype(np.float32)
    found = comparison.compare(network, x[None], networks=400, explain=False).verdict
    (norms, relative), errors = numpy_gradients(widths, rule(widths), *phi, x, 400)
    top = verdict._hidden_layers(network) - 1  # numbered from 0
    pairs = [(found.factor, norms[0] - norms[top], top)]
    pairs.append((found.input_factor, relative[0] - relative[1], 1))
    if top < len(widths) - 2:
        pairs.append((found.output_factor, norms[top] - norms[-1], 1))
    else:
        assert math.isnan(found.output_factor)
    if top > 1:
        # Of mean squares and not of mean logs: they differ by half the logs' variance or so.
        spread = 400 * float((errors[1] ** 2).max())
        assert abs((top - 1) * math.log(found.weight_factor) - relative[1] + relative[top]) < (
            spread + 10 * errors.max()
        )
    for factor, change, steps in pairs[:1] + pairs[2:]:
        assert abs(steps * math.log(factor) - change) < 5 * math.sqrt(2) * 2 * errors[0].max()
    assert found.kind == kind
    assert found.sentence.startswith(f"{kind} ×{found.factor:.3g} a layer")


def test_the_output_layer_is_apart_where_its_law_is_another():
    assert verdict._hidden_layers(builders.mlp([50, 40, 40, 40, 3], "relu", "he")) == 4
    assert verdict._hidden_layers(builders.mlp([50, 40, 40, 40, 3], "tanh", "glorot")) == 3
    assert verdict._hidden_layers(builders.mlp([50, 40, 40, 40], "tanh", "lecun")) == 3
    assert verdict._hidden_layers(builders.mlp([50, 40, 3], "tanh", "glorot")) == 2
    mup = builders.mlp([50, 40, 40, 40, 3], "relu", "he", last="mup_output")
    assert verdict._hidden_layers(mup) == 3
    residual = blocks.Residual(blocks.Dense(units=40))
    head = builders.stack(50, [blocks.Linear(40), (residual, 5), blocks.Linear(3)], "tanh")
    assert verdict._hidden_layers(head) == 6


def of_values(network, theory, measured, *, sites=1, error=0.01, networks_=100, **changed):
    """Theory and a simulation with these log norms by layer and no other statistic."""
    key = statistics.log_gradient_norm.key
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((networks_, len(measured)))
    noise = (noise - noise.mean(0)) / noise.std(0, ddof=1) * error * math.sqrt(networks_)
    estimate = monte_carlo.Estimate.of(np.asarray(measured) + noise)
    zeros = np.zeros(len(measured), int)
    simulation = monte_carlo.Simulation(
        estimates={key: estimate},
        histograms={},
        samples={},
        overflowed=zeros,
        vanished=zeros,
        network=network,
        statistics=(BY_KEY[key],),
        sites=sites,
        networks=networks_,
        sampler="dense",
        reason="",
        dtype="float32",
        seconds=0.0,
        compile_seconds=0.0,
    )
    return Prediction({key: np.asarray(theory, float)}), dataclasses.replace(simulation, **changed)


NET = builders.mlp([20, *[20] * 5], "tanh", "lecun")
FLAT, FALLS = np.zeros(5), np.arange(5.0)  # layer 1 first


def test_theory_without_an_answer_leaves_the_word_to_what_was_measured():
    nothing = np.full(5, np.nan)
    for measured, kind in ((FALLS, "vanishing"), (-FALLS, "exploding"), (0.1 * FALLS, "critical")):
        found = verdict.judge(*of_values(NET, nothing, measured), math.nan)
        assert found.kind == kind
        assert found.sentence.startswith(f"{kind} ×")
        assert "theory has no answer" in found.sentence
    everywhere = {"overflowed": np.full(5, 100)}
    lost = verdict.judge(*of_values(NET, nothing, nothing, **everywhere), math.nan)
    assert (lost.kind, lost.factor) == ("undefined", pytest.approx(math.nan, nan_ok=True))
    # Far up theory has none; in these layers it has.
    up = verdict.judge(*of_values(NET, -FALLS, nothing, **everywhere), math.nan)
    assert up.kind == "exploding"


def test_what_the_width_makes_of_it_is_said():
    """Critical at infinite width, and e^-4 in the typical network: far beyond its error."""
    found = verdict.judge(*of_values(NET, FLAT, FALLS), 0.0)
    assert found.kind == "vanishing"
    assert "critical at infinite width" in found.sentence
    unsure = verdict.judge(*of_values(NET, FLAT, FALLS, error=1.0), 0.0)
    assert unsure.kind == "critical"


def test_a_network_that_goes_the_other_way_than_it_would_further_up_is_judged_by_itself():
    found = verdict.judge(*of_values(NET, 0.1 * FALLS, 0.1 * FALLS), 0.03)
    assert found.kind == "critical"
    assert "×1.02 a layer further up" in found.sentence
    assert verdict.judge(*of_values(NET, FALLS, FALLS), 0.03).kind == "vanishing"
    # ×0.7 a layer is none to keep, in however few layers.
    assert verdict.judge(*of_values(NET, 0.1 * FALLS, 0.1 * FALLS), -0.7).kind == "vanishing"


def test_norms_are_over_all_positions_of_an_input():
    """A mean over 16 positions gives each 1/16 of the gradient, and all of them 1/4."""
    network = builders.convolutional((4, 4), [1, 8, 8], "linear", "lecun", dense=[3])
    values = {"log_gradient_norm": np.array([-math.log(16), -math.log(16), 0.0])}
    norms = verdict._log_gradient_norms(network, values, sites=16)
    np.testing.assert_allclose(norms, [-math.log(4), -math.log(4), 0], atol=1e-12)


@pytest.mark.medium
@pytest.mark.parametrize(("n", "depth"), [(2, 10), pytest.param(4, 40, marks=pytest.mark.slow)])
def test_where_most_networks_are_dead_that_is_the_verdict(n, depth):
    """ReLU: 1 - (1 - 2^-n)^L of the networks, each drawn alone: beyond 5 s.d. by 6e-7."""
    network = builders.mlp([4, *[n] * depth, 1], "relu", "he")
    count = 500
    found = comparison.compare(network, np.ones((1, 4), np.float32), networks=count)
    share = 1 - (1 - 0.5**n) ** depth
    assert abs(found.verdict.dead - share) < 5 * math.sqrt(share * (1 - share) / count)
    assert found.verdict.kind == "dead"
    assert found.verdict.sentence.startswith("dead: ")
    assert "; in those that have one ×" in found.verdict.sentence
    assert "width does not explain it" not in found.agreement
    assert repr(found).startswith("dead: ")
    html = found._repr_html_()
    assert html.startswith("<p><b>dead: ")
    assert html.count("<tr>") == 1 + 3 * len(found.by_statistic)
    assert len(repr(found)) < 2000


@pytest.mark.slow
def test_wider_networks_tell_what_the_width_does_to_narrow_ones():
    """ReLU, 16 wide and 50 deep: log-normal, e^-4 at layer 1, and nothing of it is an error."""
    network = builders.mlp([4, *[16] * 50, 1], "relu", "he")
    found = comparison.compare(network, np.ones((1, 4), np.float32), networks=500)
    assert found.verdict.kind == "vanishing"
    assert "critical at infinite width" in found.verdict.sentence
    assert "width does not explain it" not in found.agreement
    assert found["log_gradient_norm"].status[0] == Status.FINITE_WIDTH


@pytest.mark.slow
@pytest.mark.parametrize(
    "phi", [jnp.exp, lambda z: z**9, lambda z: 1 / z], ids=["exp", "z9", "1/z"]
)
def test_activations_whose_moments_diverge_do_not_vanish(phi):
    x = np.random.default_rng(0).standard_normal((2, 20)).astype(np.float32)
    network = builders.mlp([20, *[30] * 4], phi, "lecun")
    found = comparison.compare(network, x, networks=50, explain=False)
    assert found.verdict.kind == "exploding"
    assert found.verdict.saturated_from is None
    assert "theory ×nan" not in found.verdict.sentence


@pytest.mark.slow
def test_what_is_rounding_is_no_difference():
    network = builders.mlp([8, *[20] * 3], "linear", "lecun")
    found = comparison.compare(network, np.ones((1, 8), np.float32), networks=50, explain=False)
    for contrast in found.by_statistic.values():
        relative = np.abs(contrast.relative_difference[np.isfinite(contrast.relative_difference)])
        assert not np.any((relative > 0) & (relative < 1e-7))
        assert not np.any((contrast.shift != 0) & (np.abs(contrast.shift) < 1e-13))
