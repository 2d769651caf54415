"""The theory's state: signals of any size, and sums of paths that share a part."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations, builders, comparison, gaussian
from gradflow.blocks import (
    AbstractBlock,
    Activate,
    BatchNorm,
    Chain,
    Convolution,
    Dense,
    Dropout,
    Gated,
    LayerNorm,
    Linear,
    Maxout,
    Residual,
)
from gradflow.comparison import Status
from gradflow.errors import InputError
from gradflow.kernels import Kernel
from gradflow.theory import float64, mean_field

HE = 2**0.5
INPUTS = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)


def predict(layers, phi, inputs=INPUTS):
    network = builders.stack(inputs.shape[1], layers, phi)
    found = float64.predict(network, inputs)
    return {key: np.asarray(value) for key, value in found.values.items()}


class TestAnyScale:
    """Logarithms from start to end, forward and backward: no floor, no overflow."""

    # (φ, what φ² and φ'² are at 0 relative to x² and 1)
    AT_ZERO = (
        ("linear", 1.0),
        ("tanh", 1.0),
        ("gelu", 1 / 4),
        ("selu", 1.0507009873554805**2 * (1 + 1.6732632423543772**2) / 2),
    )

    @pytest.mark.parametrize(("phi", "square"), AT_ZERO)
    def test_small_signals_meet_a_linear_activation(self, phi, square):
        """Far below its scale φ is linear on each side, and each layer multiplies by σ_w² a²."""
        found = predict([(Dense(activations.get(phi), 64, 1e-3), 60)], phi)
        step = math.log(1e-6 * square)
        np.testing.assert_allclose(np.diff(found["log_q"])[9:], step, rtol=1e-12)
        np.testing.assert_allclose(np.log(found["chi"][9:-1]), step, rtol=1e-12)
        np.testing.assert_allclose(np.diff(found["log_gradient_variance"])[9:], -step, rtol=1e-12)
        # ∂C/∂W goes with both: it is the same in all layers (Glorot & Bengio 2010, eq. 14).
        np.testing.assert_allclose(np.diff(found["log_weight_gradient_variance"])[9:], 0, atol=1e-9)
        if phi not in ("relu", "selu"):  # slopes that differ make inputs more alike
            np.testing.assert_allclose(np.diff(found["correlation"])[9:], 0, atol=1e-12)

    @pytest.mark.parametrize("phi", ["linear", "gelu", "softplus"])
    def test_large_signals_meet_a_linear_activation(self, phi):
        found = predict([(Dense(activations.get(phi), 64, 1e3), 60)], phi)
        step = math.log(1e6 * (1 if phi == "linear" else 1 / 2))
        assert found["log_q"][-1] > 700, "above the largest float"
        np.testing.assert_allclose(np.diff(found["log_q"])[9:], step, rtol=1e-12)
        np.testing.assert_allclose(np.log(found["chi"][9:-1]), step, rtol=1e-12)
        assert np.isfinite(found["correlation"]).all()
        assert np.isfinite(found["log_weight_gradient_variance"]).all()

    def test_a_square_is_no_line(self):
        """φ = x² has q' = 3 σ_w² q² and χ = 4 σ_w² q, exactly, at any q."""
        square = activations.custom(lambda x: x**2, name="square")
        for sigma_w in (0.1, 1.0):
            found = predict([(Dense(square, 64, sigma_w), 9)], square, INPUTS[:1])
            log_q, w2 = found["log_q"], math.log(sigma_w**2)
            assert abs(log_q[-1]) > 300
            np.testing.assert_allclose(log_q[1:], math.log(3) + w2 + 2 * log_q[:-1], rtol=1e-12)
            log_chi = -np.diff(found["log_gradient_variance"])
            np.testing.assert_allclose(log_chi, math.log(4) + w2 + log_q[:-1], rtol=1e-12)

    @pytest.mark.parametrize("sigma_w", [1e-300, 1e300])
    def test_scales_whose_squares_are_no_float(self, sigma_w):
        log_w2 = 2 * math.log(sigma_w)
        found = predict([(Dense(activations.logistic, 64, sigma_w), 3)], "logistic")
        share = 1 / 4 if sigma_w < 1 else 1 / 2  # E[σ²] at 0, and far out
        np.testing.assert_allclose(found["log_q"][1:], log_w2 + math.log(share), rtol=1e-12)
        if sigma_w < 1:
            log_chi = -np.diff(found["log_gradient_variance"])
            np.testing.assert_allclose(log_chi, log_w2 - math.log(16), rtol=1e-12)
        else:  # ∫ σ'² dx / √(2πq) = 1/(6 √(2πq))
            by_q = -math.log(6) - (math.log(2 * math.pi) + found["log_q"][1]) / 2
            log_chi = -np.diff(found["log_gradient_variance"])[1]
            np.testing.assert_allclose(log_chi, log_w2 + by_q, rtol=1e-12)

    def test_in_float32(self):
        network = builders.stack(64, [(Dense(activations.tanh, 64, 0.1), 80)], "tanh")
        gram = mean_field.input_gram(INPUTS).astype(jnp.float32)
        found = jax.jit(mean_field.predict)(network, gram)
        assert found["log_q"].dtype == jnp.float32
        np.testing.assert_allclose(np.diff(found["log_q"])[9:], math.log(0.01), rtol=1e-4)
        np.testing.assert_allclose(np.diff(found["correlation"])[9:], 0, atol=1e-5)

    def test_a_sine_has_no_size_far_out(self):
        """sin oscillates: E[φ'²] is 1/2 there, but no power of q tells it; better none than wrong.

        Within the range it is what it is.
        """
        wide, beyond = (
            predict([(Dense(activations.sin, 64, sigma_w), 3)], "sin", INPUTS[:1])
            for sigma_w in (1e4, 1e30)
        )
        np.testing.assert_allclose(wide["log_q"][1:], math.log(1e8 / 2), rtol=1e-9)
        np.testing.assert_allclose(beyond["log_q"][1:], math.log(1e60 / 2), rtol=1e-9)
        assert np.isnan(beyond["log_gradient_variance"][0])

    @pytest.mark.medium
    def test_norms_and_blank_inputs(self):
        """A norm sets any signal to size 1; an input of zeros stays, and harms no other."""
        inputs = np.stack([INPUTS[0], 0 * INPUTS[0]])
        layers = [(Dense(activations.tanh, 64, 1e-3), 20), LayerNorm(), Linear(64)]
        found, alone = predict(layers, "tanh", inputs), predict(layers, "tanh", inputs[:1])
        np.testing.assert_allclose(alone["log_q"][-2:], 0, atol=1e-9)
        assert np.isfinite(alone["log_gradient_variance"]).all()
        # The mean over inputs, of which one is 0.
        np.testing.assert_allclose(found["log_q"], alone["log_q"] - math.log(2), atol=1e-9)
        assert np.isneginf(predict(layers, "tanh", inputs[1:])["log_activation_variance"]).all()

    @pytest.mark.usefixtures("x64_only")
    def test_moments_of_the_least_variances(self):
        for q in (1e-48, 1e-150, 1e-290):
            moments = gaussian.moments(activations.tanh, jnp.asarray(q))
            assert float(moments.phi2) == pytest.approx(q, rel=1e-14)
            assert float(moments.dphi2) == pytest.approx(1, rel=1e-14)
            k = gaussian.kernel(activations.softsign, q * jnp.array([[1, 0.5], [0.5, 2]]))
            np.testing.assert_allclose(k / q, [[1, 0.5], [0.5, 2]], rtol=1e-12)


class TestPathsThatShareAPart:
    """z + f(z) where f(z) holds z itself: coefficients add, not second moments."""

    @pytest.mark.parametrize(("beta", "inner"), [(0.2, 3), (-0.5, 1)])
    def test_residual_in_residual(self, beta, inner):
        """Of ReLU with He's weights, f doubles nothing: k' = k (1 + 2β + β² (1 + β²)^inner)."""
        branch = Chain((Residual(Dense(activations.relu, 64, HE), beta),) * inner)
        found = predict([Linear(64), (Residual(branch, beta), 5)], "relu", INPUTS[:1])
        step = math.log(1 + 2 * beta + beta**2 * (1 + beta**2) ** inner)
        np.testing.assert_allclose(np.diff(found["log_q"]), step, rtol=1e-9)
        np.testing.assert_allclose(np.diff(found["log_gradient_variance"]), -step, rtol=1e-9)

    def test_a_signal_and_its_multiple(self):
        gram = Kernel.of(jnp.array([[1.0, 0.5], [0.5, 2.0]]), jnp.array([0.3, -0.2]))
        gram = gram.with_tangents((jnp.ones(2), None))
        total = gram.plus(gram.scaled(2.0).plus(gram.scaled(-1.5)))
        for found, one in zip(
            (total.covariance, total.mean, total.tangent),
            (gram.covariance, gram.mean, gram.tangent),
            strict=True,
        ):
            factor = 1.5 if one is gram.mean else 1.5**2
            np.testing.assert_allclose(found, factor * one, rtol=1e-6)

    # Paths of other shapes, simulated. 500 networks of width 200, on which theory and simulation
    # may differ in no value that the width does not explain; 1 % false alarms for each network.
    SHAPES = {
        "three deep": [Residual(Residual(Residual(Dense(units=200), 0.5), 0.5), 0.5)],
        "means": [Residual(Chain((Residual(Chain((Linear(200), Activate(activations.relu)))),)))],
        "dropout": [Residual(Chain((Residual(Dense(units=200)), Dropout(0.8))), 0.5)],
        "norm": [Residual(Chain((LayerNorm(), Residual(Dense(units=200), 0.3))), 0.5)],
        "dense connections": [
            Residual(Chain((Residual(Dense(units=200)), Residual(Dense(units=200), -0.5))), 0.7)
        ],
        "maxout": [Residual(Chain((Residual(Linear(200)), Maxout(Linear(200)))))],
    }

    @pytest.mark.medium
    @pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.slow if n != "norm" else ()) for n in SHAPES]
    )
    def test_against_simulation(self, name):
        block = Chain((*self.SHAPES[name], Linear(200)))
        network = builders.stack(64, [Linear(200), (block, 3)], "tanh")
        found = comparison.compare(network, INPUTS, key=4, networks=500)
        assert found.count(Status.DIFFERS) == 0, found.agreement

    @pytest.mark.slow
    def test_images_against_simulation(self):
        convolution = Convolution(activations.tanh, (8,), 3, units=100)
        block = Residual(Residual(convolution, 0.5), 0.5)
        first = dataclasses.replace(convolution, activation=activations.linear)
        layers = [first, (block, 3)]
        inputs = np.random.default_rng(1).standard_normal((16, 5)).astype(np.float32)
        found = comparison.compare(builders.stack(5, layers, "tanh"), inputs, networks=300)
        assert found.count(Status.DIFFERS) == 0, found.agreement

    @pytest.mark.parametrize(
        "block",
        [
            Residual(Chain((Residual(Linear(64)), Activate(activations.tanh)))),
            Residual(Chain((Residual(Linear(64)), BatchNorm()))),
            Residual(Gated(Residual(Linear(64)), Linear(64))),
            Gated(Residual(Linear(64)), Residual(Linear(64))),
        ],
    )
    def test_what_correlates_otherwise_is_refused(self, block):
        with pytest.raises(InputError, match="correlate"):
            predict([Linear(64), block], "tanh", np.eye(4, 64))

    def test_moments_made_by_hand_may_depend_on_anything(self):
        class Doubled(AbstractBlock):
            def apply(self, signal, multiply, key):  # noqa: ARG002
                return 2 * signal

            def kernel(self, gram, multiply=None):  # noqa: ARG002
                return dataclasses.replace(gram, covariance=4 * gram.covariance)

            @property
            def homogeneous(self):
                return True

        unsafe = Residual(Chain((Linear(64), Doubled())))
        by_hand = Residual(Chain((Residual(Linear(64)), Doubled())))
        predict([Linear(64), Doubled(), (Chain((Doubled(), Linear(64))), 2)], "tanh")
        for block in (unsafe, by_hand):
            with pytest.raises(InputError, match="correlate"):
                predict([Linear(64), block], "tanh")
