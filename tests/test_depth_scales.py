"""Depth scales read off networks: right on theory's own curves, and honest about their errors."""

import math

import numpy as np
import pytest
import scipy.stats
import xarray

from gradflow import builders, ensembles
from gradflow.studies import _execution, _study_file
from gradflow.studies._depth_scales import Curve, decay_rate, gradient_rate
from gradflow.theory import float64
from gradflow.theory._depth_scales import DEPTH_SCALES

# Of tanh at σ_b² = 0.05: σ_w², whether c* is 1, ξ_c, and a depth that shows it.
KNOWN = [
    (1.0, True, 3.626976, 60),
    (1.551020, True, 20.19875, 300),
    (1.734694, True, 176.61, 1500),
    (2.836735, False, 9.688479, 200),
]
# Of two inputs that are nearly alike, so that the approach to c* is soon exponential.
ALIKE = np.array([[1.0, 1.0], [1.2, 0.8]])
EPSILON = float(np.finfo(float).eps)


def curve(values, error=0.0):
    """A curve that is measured to be what theory says."""
    values = np.asarray(values, float)
    return Curve(values, np.full_like(values, error), values, np.zeros_like(values), EPSILON)


@pytest.fixture(scope="module")
def curves():
    """Theory's, by σ_w², of twice the depth."""
    found = {}
    for sigma_w2, _, _, depth in KNOWN:
        weights = ensembles.fan_in(math.sqrt(sigma_w2))
        network = builders.mlp([2, *[4] * (2 * depth)], "tanh", weights, sigma_b=math.sqrt(0.05))
        found[sigma_w2] = float64.predict(network, ALIKE).values
    return found


@pytest.mark.medium
@pytest.mark.parametrize(("sigma_w2", "ordered", "xi_c", "depth"), KNOWN)
def test_theory_s_own_curves_have_the_known_depth_scales(curves, sigma_w2, ordered, xi_c, depth):
    """Of correlations, and in the ordered phase of gradients, where the two are one (χ_c = χ₁)."""
    values = curves[sigma_w2]
    correlation, limit = values["correlation"][:depth], values["correlation"][-1]
    rate = decay_rate(curve(correlation), xi_c, 1.0 if ordered else limit, known=ordered, log=False)
    # Where the top's value stands for c*, it is off by up to a fifth of the last distance.
    assert 1 / rate.value == pytest.approx(xi_c, rel=5e-3 if ordered else 0.025)
    assert (rate.z, rate.shift) == (0, 0)
    gradient = gradient_rate(curve(values["log_gradient_variance"]))
    if ordered:
        assert 1 / gradient.value == pytest.approx(xi_c, rel=1e-5)
    else:
        assert gradient.value < 0


def test_lengths_have_their_scale_to_a_fixed_point_that_is_known_or_not():
    layers = np.arange(30)
    to_one = np.log1p(0.5 * np.exp(-layers / 3))
    rate = decay_rate(curve(to_one, 1e-4), 3.0, 1.0, known=False, log=True)
    assert 1 / rate.value == pytest.approx(3, rel=0.01)
    assert (rate.first, rate.last) == (10, 19)  # five times 2e-4 is 1e-3
    # q* = 0, far below the smallest float: its logarithm is a line.
    rate = decay_rate(curve(-50.0 * layers, 0.1), 1 / 50, 0.0, known=True, log=True)
    assert rate.value == 50
    assert rate.error == pytest.approx(math.hypot(0.1, 0.1) / 14)


@pytest.mark.parametrize(
    ("values", "xi", "why"),
    [
        (np.exp(-np.arange(30) / 0.2), 0.2, "it is gone after a layer"),
        (0.01 * np.exp(-np.arange(30) / 5), 5.0, "it is noise from the first layer on"),
        (np.exp(-np.arange(30) / 100), 100.0, "the top is far from the fixed point"),
        (np.exp(-np.arange(30) / 5), math.inf, "theory has no scale"),
        (np.exp(-np.arange(30) / 5), math.nan, "theory has no fixed point"),
    ],
)
def test_there_is_none_where_it_cannot_be_measured(values, xi, why):
    rate = decay_rate(curve(values, 0.01), xi, 0.0, known=False, log=False)
    assert all(np.isnan(rate)), why
    easy = decay_rate(curve(np.exp(-np.arange(30) / 5), 0.01), 5.0, 0.0, known=False, log=False)
    assert 1 / easy.value == pytest.approx(5, rel=0.1)


def test_a_mean_that_a_few_networks_make_has_no_rate():
    """Of log-normal squares with a variance of 4, 1000 of them: their mean's error means little."""
    relative = math.sqrt(math.expm1(4)) / math.sqrt(1000)
    assert np.isnan(gradient_rate(curve(np.zeros(20), relative), 1000).value)
    assert gradient_rate(curve(np.zeros(20), 0.01), 1000).value == 0
    assert gradient_rate(curve(np.zeros(20), relative)).value == 0  # a mean of logarithms


STUDY = """
[network]
activation = "tanh"
width = 200
depth = 24
sigma_b2 = 0.05
[[axes]]
sigma_w2 = [0.8, 1.2, 4.0]
[[axes]]
seed = { from = 1, to = 40, points = 40 }
[inputs]
batch = 2
correlation = 0.5
[sampling]
networks = 50
[statistics]
measure = ["q", "correlation", "gradient_variance"]
"""


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """Forty studies of the same three laws, each of 50 networks."""
    folder = tmp_path_factory.mktemp("repeated")
    written = _execution.run(_study_file.parse(STUDY), folder / "study").results
    return xarray.load_dataset(written)


@pytest.mark.parametrize("scale", DEPTH_SCALES)
@pytest.mark.slow
def test_standard_errors_are_those_of_repeated_studies(repeated, scale):
    """Forty estimates of each rate scatter as their standard errors say, or by less.

    Null: their sample variance over the mean squared error is χ²/39 of 39 degrees of freedom, that
    of gradients; of lengths and correlations it is no larger. Beyond the quantiles 1e-4 on either
    side (upper alone): a false alarm in 1e-3 of all.
    """
    rates, errors = repeated[f"rate_{scale}"], repeated[f"rate_{scale}_standard_error"]
    ratio = (rates.var("seed", ddof=1) / (errors**2).mean("seed")).to_numpy()
    complete = np.isfinite(rates).sum("seed").to_numpy() == 40
    assert complete.sum() >= {"grad": 3, "c": 2, "q": 1}[scale]
    low, high = (scipy.stats.chi2.ppf(p, 39) / 39 for p in (1e-4, 1 - 1e-4))
    assert np.all(ratio[complete] < high), ratio
    if scale == "grad":
        assert np.all(ratio > low), ratio


@pytest.mark.medium
def test_measured_rates_are_theory_s_and_not_another_point_s(repeated):
    """Null: the mean of forty rates is theory's, within its error and 2 % for the width of 200.

    Four standard errors: a false alarm in 6e-5 of each comparison.
    """
    compared = 0
    for scale in DEPTH_SCALES:
        rate = repeated[f"rate_{scale}"]
        mean, error = rate.mean("seed"), rate.std("seed", ddof=1) / math.sqrt(40)
        predicted = repeated[f"rate_{scale}_theory"].isel(seed=0)
        allowed = 4 * error + 0.02 * abs(predicted)
        known = np.isfinite(rate).all("seed")
        assert bool((abs(mean - predicted) < allowed).where(known, True).all()), scale
        compared += int(known.sum())
        if scale == "grad":  # and not another point's
            assert bool((abs(mean - predicted.roll(sigma_w2=1)) > allowed).all())
    assert compared >= 6


@pytest.mark.medium
def test_what_has_no_fixed_points_has_no_depth_scales(tmp_path):
    """Normalised networks and shallow ones; the others beside them do."""
    text = """
    [[axes]]
    depth = [5, 9]
    [[axes]]
    norm = ["none", "layer"]
    [network]
    activation = "relu"
    width = 100
    sigma_w2 = 1.0
    [sampling]
    networks = 50
    [statistics]
    measure = ["gradient_variance"]
    """
    written = _execution.run(_study_file.parse(text), tmp_path / "study").results
    found = xarray.load_dataset(written)
    assert np.isfinite(found.rate_grad).to_numpy().tolist() == [[False, False], [True, False]]
    assert float(found.xi_grad_theory[1, 0]) == pytest.approx(1 / math.log(2))
    unasked = text + "\n[theory]\ndepth_scales = false"
    written = _execution.run(_study_file.parse(unasked), tmp_path / "study").results
    assert "rate_grad" not in xarray.load_dataset(written)
    other = text.replace('"none", "layer"', '"none"').replace("[5, 9]", "[5]")
    written = _execution.run(_study_file.parse(other), tmp_path / "shallow").results
    assert "rate_grad" not in xarray.load_dataset(written)
