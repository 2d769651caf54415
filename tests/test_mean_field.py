"""Mean-field theory against high-precision depth profiles, and against what is known exactly."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations, blocks, builders, ensembles, gaussian, networks
from gradflow.errors import InputError
from gradflow.kernels import Kernel
from gradflow.theory import _limits, linear_regime, mean_field

# What the issue of the reference tables asks of float64.
TABLE = 1e-10
predict = jax.jit(mean_field.predict)


@pytest.mark.usefixtures("x64_only")
class TestTable11:
    """Reference table 11: layer-by-layer variance and mean squared Jacobian, with the transient."""

    def test_profiles(self, load_reference):
        checked = 0
        for row in load_reference("t11_depth_profiles"):
            sw2, sb2, q1 = (float(Fraction(row["inputs"][k])) for k in ("sw2", "sb2", "q1"))
            phi = activations.get(row["inputs"]["activation"])
            found = mean_field.profile(phi, jnp.asarray(q1), sw2, sb2, depth=50)
            for layer, truth in row["values"]["layers"].items():
                at = {name: float(v[int(layer) - 1]) for name, v in found.items()}
                for name, key in (
                    ("q", "q"),
                    ("activation_second_moment", "act_meansq"),
                    ("chi", "chi_l"),
                    ("log_jacobian_norm", "log_mean_sq_jac"),
                ):
                    assert at[name] == pytest.approx(float(truth[key]), rel=TABLE), (
                        row["id"],
                        name,
                    )
                # SELU's and odd activations' means are zero: absolutely so, at the scale of φ.
                scale = float(truth["act_meansq"]) ** 0.5
                mean = float(truth["act_mean"])
                assert at["activation_mean"] == pytest.approx(mean, rel=TABLE, abs=1e-15 * scale)
                checked += 1
        assert checked == 40

    @pytest.mark.slow
    def test_predict_walks_the_same_profile(self, load_reference):
        for row in load_reference("t11_depth_profiles"):
            sw2, q1 = (float(Fraction(row["inputs"][k])) for k in ("sw2", "q1"))
            phi = activations.get(row["inputs"]["activation"])
            network = builders.mlp([100] * 11, phi, ensembles.fan_in(sw2**0.5))
            found = mean_field.predict(network, jnp.array([[q1 / sw2]]))
            truth = row["values"]["layers"]["10"]
            assert float(found["q"][9]) == pytest.approx(float(truth["q"]), rel=TABLE)
            # Down from layer 10 to 1 the gradient passes χ^1 … χ^9.
            below = float(truth["log_mean_sq_jac"]) - np.log(float(truth["chi_l"]))
            assert float(found["log_gradient_variance"][0]) == pytest.approx(below, rel=TABLE)


@pytest.mark.parametrize("activation", ["linear", "relu", "tanh", "hard_tanh", "gelu", "logistic"])
def test_chi_is_derived_from_the_kernel(activation):
    """What a block does to a tangent's second moments is σ_w² E[φ'²]; of two inputs', E[φ'φ']."""
    phi = activations.get(activation)
    block = blocks.Dense(activation=phi, sigma_w=1.3, sigma_b=0.2)
    k = jnp.array([[0.7, 0.2], [0.2, 0.5]])
    alone, together = (
        block.kernel(dataclasses.replace(Kernel.of(k), tangent=jnp.ones(shape))).tangent
        for shape in ((2,), (2, 2))
    )
    slopes = gaussian.moment(phi, "dphi2", jnp.diagonal(k))
    np.testing.assert_allclose(alone, 1.3**2 * slopes, rtol=1e-6)
    np.testing.assert_allclose(together, 1.3**2 * gaussian.derivative_kernel(phi, k), rtol=1e-6)


def test_chi_of_a_tangent_is_the_derivative_of_the_correlation_map():
    """E[φ'²] against a finite difference of the two-input kernel, near coincidence."""
    phi, q, eps = activations.tanh, 0.8, 1e-3
    k = jnp.array([[q, q * (1 - eps)], [q * (1 - eps), q]])
    gap = gaussian.moment(phi, "phi2", jnp.asarray(q)) - gaussian.kernel(phi, k)[0, 1]
    expected = gaussian.moment(phi, "dphi2", jnp.asarray(q))
    np.testing.assert_allclose(gap / (q * eps), expected, rtol=5e-3)


def test_linear_networks_follow_the_linear_regime_for_any_widths():
    widths = [1024, 1000, 1000, 300, 9]
    gram = jnp.ones((1, 1))
    for weights in ("standard", "normalized", "lecun", "he", "he_fan_out"):
        found = mean_field.predict(builders.mlp(widths, "linear", weights), gram)
        paper = linear_regime.predict(widths, weights)
        for name, value in paper.values.items():
            np.testing.assert_allclose(found.values[name], value, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_relu_correlations_follow_the_published_kernel():
    """Ten layers of ReLU with He weights, x₁ = 2e₁, x₂ = (1,1,1,1): NNGP of Cho & Saul's kernel."""
    x = jnp.array([[2.0, 0, 0, 0], [1.0, 1, 1, 1]])
    network = builders.mlp([4, *[50] * 11], "relu", "he")
    # The reference kernel puts W x without the factor 2 first, and takes x·x' unscaled over 4.
    found = predict(network, mean_field.input_gram(x))
    np.testing.assert_allclose(found["correlation"][10], 1.7952934596 / 2, rtol=1e-6)


def test_everything_is_finite_at_depth_10_000():
    network = builders.mlp([100] * 10_001, "logistic", "glorot")
    found = predict(network, jnp.ones((1, 1)))
    assert np.isfinite(found.values["log_gradient_variance"]).all()
    assert found.values["log_gradient_variance"][0] < -28_000  # 0.0557^9999


@pytest.mark.slow
def test_predictions_vmap_and_differentiate_over_the_scales():
    def top_q(sigma_w):
        network = builders.mlp([20] * 6, "tanh", "lecun")
        stages = jax.tree.map(lambda _: sigma_w, network)
        return mean_field.predict(stages, jnp.ones((1, 1))).values["log_q"][-1]

    grid = jnp.linspace(1.0, 3.0, 5)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(top_q)))(grid)
    step = 1e-2
    finite = (jax.vmap(top_q)(grid + step) - jax.vmap(top_q)(grid - step)) / (2 * step)
    np.testing.assert_allclose(slopes, finite, rtol=5e-3)
    assert np.all(np.diff(values) > 0)


@pytest.mark.medium
@pytest.mark.parametrize("function", [mean_field.predict, predict])
def test_chi_is_missing_at_the_top_and_only_there(function):
    """In float32 too, where it was any number if the program was compiled."""
    found = function(builders.mlp([8] * 5).as_arrays(jnp.float32), jnp.ones((1, 1), jnp.float32))
    assert np.isnan(found["chi"]).tolist() == [False, False, False, True]


@pytest.mark.medium
def test_results_are_labelled():
    dataset = mean_field.predict(builders.mlp([8] * 5), jnp.eye(2)).to_xarray()
    assert dataset.sizes == {"layer": 4}
    np.testing.assert_allclose(np.log(dataset.q), dataset.log_q, rtol=1e-5)
    assert all(v.attrs["long_name"] for v in dataset.data_vars.values())


def test_predictions_at_other_widths_need_no_second_walk():
    network = builders.mlp([30, 40, 40, 10], "tanh", ensembles.fan_in(1.5), sigma_b=0.1)
    other = networks.divide_widths(network, 3)  # 13 and 3 units: the ratios change
    gram = jnp.array([[1.0, 0.3], [0.3, 0.8]])
    moved = _limits.at_widths(predict(network, gram), network, other)
    for name, value in predict(other, gram).values.items():
        np.testing.assert_allclose(moved.values[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: mean_field.length_map(activations.tanh, q, -1.0), "sigma_w2 is -1.0"),
        (lambda q: mean_field.length_map(activations.tanh, q, 1.0, -1.0), "sigma_b2 is -1.0"),
        (lambda q: mean_field.chi(activations.tanh, q, float("inf")), "sigma_w2 is inf"),
        (lambda q: mean_field.profile(activations.tanh, q, 1.0, depth=0), "depth is 0"),
        (lambda q: mean_field.profile(activations.tanh, -q, 1.0, depth=1), "q1 is -1.0"),
        (lambda q: mean_field.direction_gains(activations.tanh, q, 1.0, depth=0), "depth is 0"),
        (lambda q: mean_field.direction_gains(activations.tanh, 0 * q, 1.0, depth=1), "above 0"),
    ],
)
def test_scales_and_depths_that_cannot_be_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(jnp.asarray(1.0))


def test_sigma_w_is_traced_through_the_ensemble_and_the_network():
    def log_gradient(sigma_w):
        network = builders.mlp([100] * 4, "relu", ensembles.fan_in(sigma_w))
        values = mean_field.predict(network, jnp.ones((1, 1))).values["log_gradient_norm"]
        return values[0] - values[-1]

    value, slope = jax.jit(jax.value_and_grad(log_gradient))(1.3)
    # Two layers of ReLUs, each of which multiplies squared gradients by σ_w²/2.
    assert value == pytest.approx(math.log(1.3**2 / 2), rel=1e-5)
    assert slope == pytest.approx(2 / 1.3, rel=1e-5)
