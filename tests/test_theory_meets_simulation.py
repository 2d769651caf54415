"""One law test for all: infinite-width theory, its 1/n corrections and fixed points, simulated.

Each activation is put at a fixed point of its length map, with two inputs at the fixed point of the
correlation, in the ordered phase, at the edge of chaos, and in the chaotic phase; where it has no
such fixed point (ReLU's length diverges in chaos), just at these slopes. That `fixed_points` finds
them is tested in `test_fixed_points`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from laws import SLOPES, compared, scales

from gradflow import activations, builders, comparison, ensembles, statistics
from gradflow.comparison import Status
from gradflow.simulation import monte_carlo
from gradflow.theory import float64, mean_field
from gradflow.theory.finite_width import first_order

WIDTH, DEPTH, NETWORKS, INPUTS = 300, 5, 2000, 60
QUICK = {("tanh", "chaotic")}
# Its χ∥ is 1.5 χ₁: lengths are repelled in these phases, and spreads that grow by 1.2 to 1.9 a
# layer are no 1/n at this width. Where its length settles is a test of its own.
REPELLED = {"squared_relu"}
pytestmark = pytest.mark.usefixtures("simulations_compiled_well")


def case(activation, phase):
    marks = () if (activation.name, phase) in QUICK else pytest.mark.slow
    return pytest.param(activation, phase, marks=marks, id=f"{activation.name}-{phase}")


@functools.partial(jax.jit, static_argnums=0)
def _mapped(activation, c, q, sigma_w2, sigma_b2):
    pair = q * (c + (1 - c) * jnp.eye(2))
    return mean_field.correlation_map(activation, pair, sigma_w2, sigma_b2)[0, 1] / q


def settled_correlation(activation, *scales):
    """c* < 1, or 0.5 where two inputs become equal, which would tell nothing of correlations."""
    with jax.enable_x64(True):

        def rises(c):
            return float(_mapped(activation, c, *scales)) - c

        top = 1 - 1e-6
        return scipy.optimize.brentq(rises, 0, top, xtol=1e-14) if rises(top) < 0 else 0.5


def inputs_with(q, c, sigma_w2, sigma_b2):
    """Return two inputs whose pre-activations in layer 1 have variance q and correlation c."""
    length, product = (q - sigma_b2) / sigma_w2, (q * c - sigma_b2) / sigma_w2
    basis = math.sqrt(INPUTS) * np.eye(INPUTS)[:2]
    cosine = product / length
    second = cosine * basis[0] + math.sqrt(max(1 - cosine**2, 0)) * basis[1]
    return math.sqrt(length) * np.stack([basis[0], second])


@pytest.mark.medium
@pytest.mark.parametrize(
    ("activation", "phase"),
    [case(a, phase) for a in activations.ALL for phase in SLOPES if a.name not in REPELLED],
)
def test_theory_meets_simulation(activation, phase):
    """Means and spreads over 2000 networks of width 300, every statistic at every layer.

    Null: means are those of infinite width plus the 1/n correction, the rest below a third of it;
    spreads are those of the correction, to 3 % of their size (1/n² terms: depth/width is 1.7 %).
    The standard error of a standard deviation is at most its 1/√networks, 2.2 %: excess kurtosis
    below 2, but for saturation where few units saturate. False alarms: 1 % of cases by the means,
    3e-6 of spreads by 4.7 standard errors.
    """
    q, sigma_w2, sigma_b2, settles = scales(activation, phase)
    c = settled_correlation(activation, q, sigma_w2, sigma_b2) if settles else 0.5
    x = inputs_with(q, c, sigma_w2, sigma_b2)
    network = builders.mlp(
        [INPUTS, *[WIDTH] * DEPTH],
        activation,
        ensembles.fan_in(math.sqrt(sigma_w2)),
        sigma_b=math.sqrt(sigma_b2),
    )
    found = compared(network, x, key=5, networks=NETWORKS)
    theory = found.theory
    if settles:
        np.testing.assert_allclose(theory["log_q"], math.log(q), atol=1e-8)
        np.testing.assert_allclose(theory["chi"][:-1], SLOPES[phase], rtol=1e-8)
        if c != 0.5:
            np.testing.assert_allclose(theory["correlation"], c, atol=1e-8)
    assert not found.count(Status.DIFFERS), found.agreement
    for key, contrast in found.by_statistic.items():
        measured, predicted = contrast.deviation, contrast.theory_deviation
        usable = np.isfinite(predicted) & np.isfinite(measured) & (measured > 0)
        if key == "saturation":
            usable &= theory[key] * WIDTH > 10
        else:
            assert usable[: DEPTH - 1].all(), key
        with np.errstate(divide="ignore", invalid="ignore"):
            off = np.abs(np.log(measured / predicted))[usable]
        assert (off < 4.7 / math.sqrt(NETWORKS) + 0.03).all(), (key, measured, predicted)


@pytest.mark.slow
def test_squared_relu_where_its_length_settles():
    """V(q) = 0.9 q² + 0.1 is q, of slope 0.2, at q = 1/9; null and false alarms as above."""
    q, sigma_w2, sigma_b2 = 1 / 9, 0.6, 0.1
    x = inputs_with(q, 0.95, sigma_w2, sigma_b2)
    weights = ensembles.fan_in(math.sqrt(sigma_w2))
    widths = [INPUTS, *[WIDTH] * DEPTH]
    network = builders.mlp(widths, "squared_relu", weights, sigma_b=math.sqrt(sigma_b2))
    found = compared(network, x, key=5, networks=NETWORKS)
    np.testing.assert_allclose(found.theory["log_q"], math.log(q), atol=1e-8)
    assert not found.count(Status.DIFFERS), found.agreement


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "sigma_w2", "sigma_b"),
    [("tanh", 3.0, 0.3), ("gelu", 1.0, 0.5), ("hard_tanh", 3.0, 0.0), ("selu", 1.5, 0.3)],
)
def test_corrections_term_by_term(activation, sigma_w2, sigma_b):
    """Two alike inputs, 40000 networks of width 100, 4 layers: what the corrections leave.

    Null: of means nothing but a tenth of the correction (1/n² terms) and 4.5 standard errors, of
    which a false alarm is one in 1e5; of spreads 2 % and 4.5 times 1/√networks. Fails without the
    tangent's overlap with its signal, the curvature of the correlation's map, or the part of
    gradients' cosines.
    """
    x = np.array(jax.random.normal(jax.random.key(4), (2, INPUTS)))
    x[1] = 0.8 * x[0] + 0.6 * x[1]
    network = builders.mlp(
        [INPUTS, *[100] * 4], activation, ensembles.fan_in(math.sqrt(sigma_w2)), sigma_b=sigma_b
    )
    simulated = monte_carlo.simulate(network, x, networks=40_000, key=7)
    found = comparison.compare_results(
        float64.predict(network, x),
        simulated,
        corrections=float64.correct(network, x),
    )
    for key, contrast in found.by_statistic.items():
        rest = np.abs(contrast.measured - contrast.theory - contrast.shift)
        allowed = 4.5 * contrast.standard_error + 0.1 * np.abs(contrast.shift) + 1e-6
        bad = rest[np.isfinite(contrast.z)] > allowed[np.isfinite(contrast.z)]
        assert not bad.any(), (key, rest / contrast.standard_error, contrast.shift)
        if key != "saturation":
            off = np.abs(np.log(contrast.deviation / contrast.theory_deviation))
            assert np.nanmax(off) < 0.02 + 4.5 / 200, (key, off)


@pytest.mark.slow
def test_what_is_left_shrinks_as_one_over_width_squared():
    """tanh, widths 25 and 100, 8 layers: the typical gradient, whose correction is largest.

    Null: the difference from infinite width, d, is the correction up to a sixth of it at width 25,
    where d is -30 %, and is four times as small at width 100. 20000 networks: the standard errors
    are 0.002 and 0.001, and 4.5 of them false-alarm once in 1e5. Without the correction it fails.
    """
    x = np.asarray(jax.random.normal(jax.random.key(4), (1, INPUTS)))
    left, before = [], []
    wanted = (statistics.log_gradient_norm,)
    for width in (25, 100):
        network = builders.mlp([INPUTS, *[width] * 8], "tanh", ensembles.fan_in(1.2), sigma_b=0.3)
        simulated = monte_carlo.simulate(network, x, networks=20_000, key=6, wanted=wanted)
        estimate = simulated.estimates["log_gradient_norm"]
        theory = float64.predict(network, x)["log_gradient_norm"]
        correction = float64.correct(network, x)
        before.append(estimate.value[0] - theory[0])
        left.append(before[-1] - correction.shift["log_gradient_norm"][0])
    assert before[0] < -0.25
    assert before[0] / before[1] == pytest.approx(4, rel=0.1)
    assert abs(left[0]) < 0.06
    assert abs(left[1]) < 0.06 / 16 + 4.5 * 0.001


def test_corrections_of_relu_are_the_exact_laws():
    """ReLU with He weights: (1 + 5/n)^steps, and log ‖δ‖² of Hanin & Nica 2018, to first order."""
    width, depth = 1000, 6
    network = builders.mlp([INPUTS, *[width] * depth], "relu", "he")
    x = np.ones((1, INPUTS))
    found = float64.correct(network, x)
    steps = np.arange(depth - 1, -1, -1)
    np.testing.assert_allclose(found.shift["log_gradient_variance"], 0, atol=1e-12)
    exact = np.sqrt((1 + 5 / width) ** steps * (1 + 2 / width) - 1)
    np.testing.assert_allclose(
        found.standard_deviation["log_gradient_variance"], exact, rtol=10 / width
    )
    exact = np.sqrt((1 + 5 / width) ** np.arange(depth) * (1 + 2 / width) - 1)
    np.testing.assert_allclose(found.standard_deviation["log_q"], exact, rtol=10 / width)
    shift = -(5 * steps / width + 2 / width) / 4
    np.testing.assert_allclose(found.shift["log_gradient_norm"], shift, atol=20 / width**2)


def test_corrections_are_refused_where_they_are_not_known():
    network = builders.mlp([INPUTS, 30, 30], "tanh", "standard")
    assert float64.correct(network, np.ones((1, INPUTS))) is None
    with pytest.raises(Exception, match="independent Gaussian weights"):
        first_order.correct(network, mean_field.input_gram(np.ones((1, INPUTS))))
