"""Weights and biases as people write them: names, gains, frameworks' layers, laws with a mean."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from gradflow import _schema, activations, builders, comparison, ensembles, gaussian, networks
from gradflow.blocks import Dense, Linear, Maxout
from gradflow.comparison import Status
from gradflow.errors import InputError, NoTheory
from gradflow.simulation import jacobians, propagation
from gradflow.theory import mean_field
from gradflow.training import _parameters

FANS = (100, 50)

# Text, and the mean and standard deviation of a weight of 100 inputs and 50 units.
WRITTEN = {
    "normal(0.02)": (0, 0.02),
    "0.01": (0, 0.01),
    "1e-3": (0, 0.001),
    "normal(0.1, 0.2)": (0.1, 0.2),
    "uniform(-0.05,0.05)": (0, 0.05 / 3**0.5),
    "Uniform( 0, 1 )": (0.5, 12**-0.5),
    "truncated(0.02)": (0, 0.02 * stats.truncnorm(-2, 2).std()),
    "constant(-.1)": (-0.1, 0),
    "zeros": (0, 0),
    "glorot*5/3": (0, 5 / 3 * (2 / 150) ** 0.5),
    "xavier*5/3": (0, 5 / 3 * (2 / 150) ** 0.5),
    "he*sqrt(2)": (0, (2 * 2 / 100) ** 0.5),
    "sqrt(2)*orthogonal": (0, (2 / 100) ** 0.5),
    "he/2": (0, (2 / 100) ** 0.5 / 2),
    "fan_in(sqrt(1.5)):uniform*0.7": (0, 0.7 * (1.5 / 100) ** 0.5),
    "torch": (0, (1 / 300) ** 0.5),
    "keras": (0, (2 / 150) ** 0.5),
    "kaiming_uniform": (0, (2 / 100) ** 0.5),
    "randn": (0, 1),
}


def law(ensemble):
    """What decides the weights: the distribution, and by fans the mean and the variance; biases."""
    fans = ((3, 5), FANS)
    return (
        ensemble.distribution,
        [pytest.approx(ensemble.variance(*f), rel=1e-15) for f in fans],
        [ensemble.mu_w(*f) for f in fans],
        ensemble.bias,
        [law(e) for e in ensemble.recurrent or ()],
    )


@pytest.mark.parametrize("text", WRITTEN)
def test_weights_are_read_as_written(text):
    ensemble = ensembles.get(text)
    mean, deviation = WRITTEN[text]
    assert math.sqrt(ensemble.variance(*FANS)) == pytest.approx(deviation, rel=1e-12)
    assert (ensemble.mu_w(*FANS) or 0) / FANS[0] == pytest.approx(mean, rel=1e-12)


def test_a_name_in_results_is_read_as_the_same_law():
    gains = ["", "*5/3", "*sqrt(2)", "*0.7", f"*{math.pi}", "*1/7*3"]
    names = [f"{e.name}{gain}" for e, gain in itertools.product(ensembles.ALL, gains)]
    names += [*WRITTEN, *(f"he:{d}*1.1" for d in ensembles.DISTRIBUTIONS)]
    for text in names:
        ensemble = ensembles.get(text)
        assert law(ensembles.get(ensemble.name)) == law(ensemble), text
    for sigma_w in (1.5**0.5, 0.1, 1 / 3, 1.7159, math.e):
        named = ensembles.fan_in(sigma_w, "uniform")
        assert law(ensembles.get(named.name)) == law(named)
        gained = ensembles.he.with_gain(sigma_w).drawn_from("orthogonal").with_gain(2.2)
        assert law(ensembles.get(gained.name)) == law(gained)
    assert ensembles.fan_in(1.5**0.5).name == "fan_in(sqrt(1.5))"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("normal", r"unknown weights 'normal' .did you mean 'normal\(…\)'"),
        ("normal(1,2,3)", r"weights is 'normal\(1,2,3\)'; normal takes 1 or 2 numbers"),
        ("uniform(0.05)", "uniform takes 2 numbers"),
        ("uniform(1,0)", r"weights are uniform\(1,0\); the first number is below the second"),
        ("he**2", r"weights is 'he\*\*2'; it is the name of an ensemble, with numbers, gains"),
        ("he*-1", "gain is -1.0; it is a finite number above 0"),
        ("normal(-1)", r"the standard deviation in normal\(-1\) is -1.0"),
        ("5/0", "weights is '5/0'; it is the name of an ensemble"),
        ("he:unif", "unknown distribution 'unif' .did you mean 'uniform'"),
        ("__import__('os')", "unknown weights"),
        ("1e999", "weights is '1e999'; it is the name"),
        ("sqrt(-1)", "weights is"),
    ],
)
def test_other_text_is_refused_in_a_sentence(text, message):
    with pytest.raises(InputError, match=message):
        ensembles.get(text)


@pytest.mark.medium
def test_initialisers_with_a_mean_are_about_it_or_of_no_known_law():
    constant = ensembles.get(jax.nn.initializers.constant(0.1))
    assert constant.variance(*FANS) == 0
    assert constant.mu_w(*FANS) == pytest.approx(10)
    # 8 million entries of standard deviation 0.29: 5 standard errors are 5e-4 of a mean of 1/2.
    rand = ensembles.get(jax.nn.initializers.uniform(1.0))
    assert rand.mu_w(*FANS) == pytest.approx(50, rel=1e-3)
    assert rand.variance(*FANS) == pytest.approx(1 / 12, rel=2e-3)
    drawn = np.asarray(rand.sample(jax.random.key(0), (50, 100)))
    direct = jax.nn.initializers.uniform(1.0)(jax.random.key(0), (100, 50), jnp.float32).T
    np.testing.assert_allclose(drawn, direct, atol=1e-6)

    def nearly_identity(key, shape, dtype=jnp.float32):
        return jnp.eye(*shape, dtype=dtype) + 0.1 * jax.random.normal(key, shape, dtype)

    assert ensembles.get(nearly_identity).distribution.structured
    assert not ensembles.get(jax.nn.initializers.he_normal()).distribution.structured


def test_layers_may_have_an_ensemble_each():
    several = builders.mlp([9, 8, 8, 8], "relu", ["he", "he*2", 0.01])
    assert several.name == "relu, he, he*2, normal(0.01)"
    assert several.stages == builders.mlp([9, 8, 8, 8], "relu", "he,he*2,normal(0.01)").stages
    scales = [s.block.sigma_w for s in several.stages]
    assert scales == pytest.approx([2**0.5, 8**0.5, 0.01 * 8**0.5])
    assert len(builders.mlp([9, *[8] * 5], "relu", "he,he,he,he,uniform(0,1)").stages) == 3
    with pytest.raises(InputError, match="weights are 2 ensembles, and there are 3 layers"):
        builders.mlp([9, 8, 8, 8], "relu", "he,normal(0, 1)")


def test_the_layers_of_frameworks():
    """PyTorch's documentation of Linear, Conv1d and RNN; that of Keras' Dense and SimpleRNN."""
    first, second = (s.block for s in builders.mlp([30, 20, 10], "tanh", "torch").stages)
    for block, fan_in in ((first, 30), (second, 20)):
        assert block.sigma_b == pytest.approx((1 / (3 * fan_in)) ** 0.5)
        assert block.sigma_w == pytest.approx(3**-0.5)
        assert block.distribution is block.bias_distribution is ensembles.uniform
    wide = builders.mlp([30, 2000], "tanh", "torch")
    (matrix,), (bias,) = _parameters.initial_weights(wide, 0)[0]
    for values in (matrix, bias):
        assert 0.99 * 30**-0.5 < np.abs(values).max() <= 30**-0.5 * (1 + 1e-6)

    convolution = builders.convolutional((8,), [3, 16], "relu", "torch").stages[0].block
    assert convolution.sigma_b == pytest.approx((1 / (3 * 9)) ** 0.5)

    on_input, step = (s.block for s in builders.recurrent(7, 20, 3, "tanh", "torch").stages)
    assert on_input.sigma_w == pytest.approx((7 / (3 * 20)) ** 0.5)  # U[±1/√20]
    assert on_input.sigma_b is None
    assert step.sigma_w == pytest.approx(3**-0.5)
    assert step.sigma_b == pytest.approx((2 / (3 * 20)) ** 0.5)  # of two biases

    on_input, step = (s.block for s in builders.recurrent(7, 20, 3, "tanh", "keras").stages)
    assert on_input.sigma_w == pytest.approx((7 * 2 / 27) ** 0.5)
    assert (step.sigma_w, step.distribution) == (1, ensembles.orthogonal)
    keras = builders.mlp([30, 20], "tanh", "keras").stages[0].block
    assert keras.sigma_b is keras.mu_b is None
    assert builders.mlp([30, 20], "tanh", "torch", sigma_b=0).stages[0].block.sigma_b is None


def test_biases_are_numbers_or_those_of_a_framework():
    constant = builders.mlp([9, 8], "relu", "he", bias=0.1).stages[0].block
    assert (constant.mu_b, constant.sigma_b) == (0.1, None)
    about = builders.mlp([9, 8], "relu", "he", bias=-1, sigma_b=0.2).stages[0].block
    assert (about.mu_b, about.sigma_b) == (-1, 0.2)
    torch = builders.mlp([9, 8], "relu", "he", bias="torch").stages[0].block
    assert torch.sigma_b == pytest.approx(27**-0.5)
    described = {"width": 8, "depth": 2, "activation": "relu", "weights": "he", "bias": 0.1}
    assert _schema.network(described).stages == builders.mlp([8] * 3, "relu", "he", bias=0.1).stages
    with pytest.raises(InputError, match="unknown bias 'toch' .did you mean 'torch'"):
        builders.mlp([9, 8], bias="toch")
    with pytest.raises(InputError, match="bias is 'torch' and sigma_b 0.1; give one of them"):
        builders.mlp([9, 8], bias="torch", sigma_b=0.1)
    with pytest.raises(InputError, match="bias is nan; it is a finite number"):
        builders.mlp([9, 8], bias=math.nan)
    with pytest.raises(InputError, match="bias is 0.1; the biases of scale 'fixup' start at 0"):
        builders.residual(9, 8, 2, scale="fixup", bias=0.1)


def shifted(function, values, deviation):
    """E[f(s + σ Z)] over values s of equal chances, by SciPy; for a kink at 0."""

    def at(s):
        def integrand(x):
            return function(x) * stats.norm.pdf(x, s, deviation)

        ends = [s - 12 * deviation, *[0] * (abs(s) < 12 * deviation), s + 12 * deviation]
        return sum(
            integrate.quad(integrand, a, b, epsabs=1e-13)[0] for a, b in itertools.pairwise(ends)
        )

    return np.mean([at(s) for s in values])


@pytest.mark.medium
@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_averages_about_a_mean_are_scipys(name):
    phi = activations.get(name)
    with jax.enable_x64(True):
        shifts, variance = jnp.array([0.7, -2.0]), jnp.array(0.3)
        chances = jnp.array([0.5, 0.5])

        def of(function):
            return shifted(lambda x: float(function(jnp.asarray(x))), [0.7, -2.0], 0.3**0.5)

        found = {
            n: float(gaussian.shifted_moment(phi, n, shifts, chances, variance))
            for n in ("phi", "phi2", "dphi2", "variance")
        }
        assert found["phi"] == pytest.approx(of(phi), rel=1e-10)
        assert found["phi2"] == pytest.approx(of(lambda x: phi(x) ** 2), rel=1e-10)
        assert found["dphi2"] == pytest.approx(of(lambda x: phi.derivative(x) ** 2), rel=1e-10)
        assert found["variance"] == pytest.approx(found["phi2"] - found["phi"] ** 2, rel=1e-9)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("k", [[0.5, 0.3, 0.2], [0.3, 0.5, -0.2], [0.4, 0.4, 0.4]])
def test_pairs_about_means_of_their_own_are_a_sum_over_a_grid(order, k):
    """E[f(u) f(v)] of ReLU, by SciPy's average over u given v's closed form."""
    q_u, q_v, cov = k
    m_u, m_v = 0.4, -0.2
    phi = activations.get("relu")

    def inner(mean, sd):  # E[f(y)], y ~ N(mean, sd²)
        if sd == 0:
            return max(mean, 0) if order == 0 else float(mean > 0)
        z = mean / sd
        value = mean * stats.norm.cdf(z) + sd * stats.norm.pdf(z)
        return value if order == 0 else stats.norm.cdf(z)

    def integrand(x):
        outer = max(m_u + x, 0) if order == 0 else float(m_u + x > 0)
        rest = math.sqrt(max(q_v - cov**2 / q_u, 0))
        return outer * inner(m_v + cov / q_u * x, rest) * stats.norm.pdf(x, 0, q_u**0.5)

    ends = [-m_u, 0.2, 9 * q_u**0.5]
    expected = sum(
        integrate.quad(integrand, a, b, epsabs=1e-12)[0] for a, b in itertools.pairwise(ends)
    )
    with jax.enable_x64(True):
        both = jnp.array([[m_u], [m_v]])
        matrix = jnp.array([[q_u, cov], [cov, q_v]])
        found = gaussian.shifted_kernel(phi, order, both, jnp.ones_like(both), matrix)
    assert float(found[0, 1]) == pytest.approx(expected, rel=1e-7)


def predicted(network, gram, mean=None):
    with jax.enable_x64(True):
        return jax.jit(lambda g: mean_field.predict(network, g, mean))(jnp.asarray(gram))


@pytest.mark.medium
def test_a_constant_bias_is_that_of_a_shifted_activation():
    """W φ(z) + b with z about b: as z of mean 0 and φ(x + b), whose averages are another path's."""
    phi, b = activations.get("tanh"), 0.4
    moved = activations.Activation("moved", lambda x: jnp.tanh(x + b))
    gram = np.array([[1.0, 0.3], [0.3, 0.8]])
    found = predicted(builders.mlp([9, 50, 50, 50], phi, "lecun", bias=b), gram)
    other = predicted(builders.mlp([9, 50, 50, 50], moved, "lecun"), gram)
    for key in ("chi", "activation_mean", "log_activation_variance", "log_gradient_variance"):
        np.testing.assert_allclose(found.values[key], other.values[key], rtol=1e-8, err_msg=key)
    np.testing.assert_allclose(found["preactivation_mean"], b, rtol=1e-12)
    q = np.exp(other.values["log_q"]) + b**2
    np.testing.assert_allclose(np.exp(found.values["log_q"]), q, rtol=1e-8)


@pytest.mark.medium
def test_maxout_and_batch_norm_are_without_a_bias_that_all_have():
    """max(u + b, v + b) = max(u, v) + b; and a batch's mean takes b away."""
    gram = 0.3 * np.ones((4, 4)) + 0.7 * np.eye(4)
    for bias in (None, 0.5):
        stack = builders.stack(9, [Maxout(Linear(20, mu_b=bias))], "linear")
        mean = np.asarray(predicted(stack, gram)["preactivation_mean"])
        assert mean[0] == pytest.approx(math.pi**-0.5 + (bias or 0), rel=1e-9)
    plain, biased = (
        predicted(builders.mlp([9, 20, 20], "relu", "he", norm="batch", bias=b), gram)
        for b in (None, 0.5)
    )
    np.testing.assert_allclose(
        biased["log_gradient_variance"], plain["log_gradient_variance"], rtol=1e-9
    )


@pytest.mark.medium
def test_weights_with_a_mean_are_those_of_numpy_in_every_pass():
    """Constant weights: the network is one function, whose Jacobian is a product of matrices."""
    network = builders.mlp([5, 4, 3], "relu", "constant(0.1)", bias=0.2)
    x = jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(1, 5)), jnp.float32))
    key = jax.random.key(0)
    signals_of = jax.jit(propagation.signals, static_argnames="sampler")
    z1 = 0.1 * x.sum() + 0.2
    z2 = 0.1 * 4 * z1 + 0.2
    for sampler in ("dense", "matrix_free"):
        signals = signals_of(network, x, key, sampler=sampler)
        np.testing.assert_allclose(signals.preactivation[0].ravel(), z1, rtol=1e-5)
        np.testing.assert_allclose(signals.preactivation[1].ravel(), z2, rtol=1e-5)
    out = jax.jit(
        lambda x: jacobians.draw(network, x, key, sampler="dense", tangents=5).times(
            jnp.eye(5)[:, None]
        )
    )(x)
    columns = np.exp(out.log_norm) * np.asarray(out.direction)[:, 0].T
    product = np.full((3, 4), 0.1) @ np.full((4, 5), 0.1)
    np.testing.assert_allclose(columns, product, rtol=1e-5)
    weights = _parameters.initial_weights(network, 0)
    np.testing.assert_allclose(weights[0].matrices[0], 0.1, rtol=1e-6)
    given = signals_of(network, x, key, weights=weights)
    np.testing.assert_allclose(given.preactivation[1].ravel(), z2, rtol=1e-5)


def compared(network, sites=2, networks=300, **options):
    x = np.random.default_rng(1).uniform(-1, 2, size=(sites, network.input_width))
    return comparison.compare(network, x.astype(np.float32), key=0, networks=networks, **options)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("weights", "options"),
    [pytest.param("he", {"bias": 0.3}, marks=pytest.mark.slow), ("torch", {})],
)
def test_theory_of_biases_meets_simulation(weights, options):
    """No value differs but by the width: a false alarm in 1 % of runs, and the key is fixed."""
    found = compared(builders.mlp([40, 60, 60, 60], "relu", weights, **options))
    assert found.count(Status.DIFFERS) == 0
    assert found.count(Status.AGREES) > 15


@pytest.mark.medium
@pytest.mark.parametrize(
    "weights",
    [
        "uniform(0,1)",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("constant(0.1)", "normal(0.017,0.067)")
        ),
    ],
)
def test_theory_of_weights_with_a_mean_meets_simulation(weights):
    """Wide enough for what is left of the width's effect to be below a standard error.

    The mean square of the gradient, q and χ, some 15 values of 300 networks each, within 4 standard
    errors: a false alarm in 1e-3 of runs, with a fixed key. Without the gain of the mean over units
    χ of uniform weights would be 100 times too small.
    """
    network = builders.mlp([60, 320, 320, 320, 40], "relu", weights)
    found = compared(network, explain=False)
    for key in ("log_q", "log_gradient_variance", "chi", "preactivation_mean"):
        one = found[key]
        if weights.startswith("constant") and key != "log_gradient_variance":
            # The same in all networks but for rounding, and χ at the top.
            near = slice(2) if key == "chi" else slice(4)
            np.testing.assert_allclose(one.theory[near], one.measured[near], rtol=1e-4)
        else:
            assert np.abs(one.z[:3]).max() < 4, key
    # E log ‖δ‖² is not the logarithm of the mean: for constant weights E log ξ² = -1.2704.
    if weights.startswith("constant"):
        shift = 2 * found["log_gradient_norm"].theory - found.theory["log_gradient_variance"]
        np.testing.assert_allclose(shift[:3] - math.log(320), -1.2704, atol=1e-3)


@pytest.mark.medium
def test_units_that_are_all_below_zero_are_dead_for_good():
    """Constant weights and inputs of a negative sum: ReLU has no output and no slope."""
    network = builders.mlp([6, 5, 5, 5], "relu", "constant(0.1)")
    result = predicted(network, np.eye(1), np.array([-0.5]))
    np.testing.assert_allclose(result["log_q"], [2 * math.log(0.3), -math.inf, -math.inf])
    np.testing.assert_allclose(result["log_gradient_norm"][:2], -math.inf)


@pytest.mark.medium
def test_a_mean_that_is_another_number_in_each_network_is_not_predicted():
    """tanh of signals about 0: E[h] = 0, and W h has the mean μ_w mean(h), of any sign."""
    network = builders.mlp([10, 50, 50, 50], "tanh", "normal(0.1,0.1)")
    result = predicted(network, np.eye(2))
    assert np.isfinite(result["log_q"][0])
    assert np.isnan(result["log_q"][1:]).all()
    assert np.isnan(result["log_gradient_norm"]).all()
    residual = builders.residual(10, 50, 2, "relu", "uniform(0,1)")
    with pytest.raises(NoTheory, match="of dense layers alone"):
        mean_field.predict(residual, np.eye(2))


@pytest.mark.medium
def test_a_zero_read_out_has_no_gradient_below_it():
    found = compared(builders.mlp([20, 30, 30, 5], "tanh", "glorot", last="zero"), networks=20)
    assert found.verdict.kind == "dead"
    assert "the weights of layer 3 are 0: no gradient below it at step 0" in found.verdict.sentence
    assert found.count(Status.DIFFERS) == 0
    assert "nan" not in found.verdict.sentence


@pytest.mark.medium
def test_identity_recurrences_are_measured_and_the_reason_is_said():
    def scaled_identity(_, shape, dtype=jnp.float32):
        return 0.98 * jnp.eye(*shape, dtype=dtype)

    for weights in (scaled_identity, "identity*0.98"):
        network = builders.recurrent(10, 20, 5, "relu", weights, sigma_u=0.1)
        with pytest.raises(NoTheory, match="no theory knows the products"):
            mean_field.predict(network, np.eye(2))
    found = compared(network, networks=20)
    assert "no theory: weights are 'identity_matrix'" in found.agreement
    assert np.isfinite(found["log_gradient_norm"].measured).all()
    # Linear units: J = 0.98^t I, whatever is drawn.
    linear = compared(builders.recurrent(10, 20, 5, "linear", weights), networks=5)
    factor = linear["log_gradient_norm"].measured
    np.testing.assert_allclose(np.diff(factor), -math.log(0.98), rtol=1e-3)


def test_lsuv_is_of_weights_of_mean_zero():
    with pytest.raises(InputError, match="LSUV starts from weights of mean 0"):
        networks.unit_variance(builders.mlp([5, 4, 3], "relu", "uniform(0,1)"))


def test_a_block_says_what_it_has():
    assert not builders.mlp([5, 4], bias=0.1).centred
    assert not builders.mlp([5, 4], weights="torch").centred
    assert builders.mlp([5, 4], weights="he", sigma_b=0.1).centred
    assert not Dense(mu_b=0.1).homogeneous
    assert Dense(activations.get("relu"), mu_w=0.1).homogeneous
