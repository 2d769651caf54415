"""Normalisations of groups and of positions, and their ε: values of their own, and what they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from gradflow import activations, builders
from gradflow._norms import normalised_rows
from gradflow.blocks import (
    Activate,
    BatchNorm,
    Chain,
    Dense,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Linear,
    Residual,
    RMSNorm,
)
from gradflow.errors import InputError, NoTheory
from gradflow.gaussian import _batch
from gradflow.kernels import Kernel
from gradflow.theory import mean_field
from gradflow.theory._backward import log_gain

ROUNDING = 1e-5 if jnp.zeros(()).dtype == jnp.float32 else 1e-11


def no_product(*_, **__):
    raise AssertionError("has no random matrix")


@pytest.mark.parametrize("epsilon", [None, 1e-5, 0.7])
def test_they_are_the_formulas(epsilon, key):
    """NumPy, in float64, of 2 inputs of 6 positions and 8 units."""
    signal = np.array(0.5 + jax.random.normal(key, (12, 8)), np.float64)
    added = epsilon or 0.0

    def normalised(x, axes, about=True):
        x = x - x.mean(axes, keepdims=True) * about
        return 1.5 * x / np.sqrt((x**2).mean(axes, keepdims=True) + added)

    grouped = normalised(signal.reshape(2, 6, 4, 2), (1, 3)).reshape(12, 8)
    expected = {
        RMSNorm(1.5, epsilon): normalised(signal, 1, about=False),
        LayerNorm(1.5, epsilon): normalised(signal, 1),
        BatchNorm(1.5, epsilon): normalised(signal, 0),
        GroupNorm(1.5, epsilon, groups=4, shape=(2, 3)): grouped,
        InstanceNorm(1.5, epsilon, (3, 2)): normalised(signal.reshape(2, 6, 8), 1).reshape(12, 8),
    }
    for block, values in expected.items():
        found = block.apply(jnp.asarray(signal), no_product, key)
        np.testing.assert_allclose(found, values, rtol=10 * ROUNDING, atol=10 * ROUNDING)


def test_an_epsilon_at_the_ends_of_the_float_range():
    """A signal of zeros has a derivative, 1/√ε; one of 1e30 does not overflow, 1e-30 is not 0."""
    slope = jax.jvp(lambda x: normalised_rows(x, 0.25), (jnp.zeros((1, 3)),), (jnp.ones((1, 3)),))
    np.testing.assert_allclose(slope[1], 2.0, rtol=ROUNDING)
    x = jnp.array([[3.0, -4.0]])
    large, small = (normalised_rows(scale * x, 1e-5) for scale in (1e30, 1e-30))
    np.testing.assert_allclose(large, x / 12.5**0.5, rtol=ROUNDING)
    np.testing.assert_allclose(small / 1e-30, x / 1e-5**0.5, rtol=ROUNDING)
    assert (normalised_rows(jnp.zeros((2, 3)), 0.0) == 0).all()


@pytest.mark.parametrize("block", [LayerNorm, RMSNorm, GroupNorm])
def test_second_moments_and_gradients_are_divided_by_q_and_epsilon(block):
    k = np.array([[1.0, 0.5], [0.5, 2.0]])
    found = block(1.5, 0.3).kernel(Kernel.of(jnp.asarray(k)))
    root = np.sqrt(np.diagonal(k) + 0.3)
    np.testing.assert_allclose(found.covariance, 2.25 * k / np.outer(root, root), rtol=ROUNDING)
    assert found.gaussian
    gain = jnp.exp(log_gain(block(1.5, 0.3), Kernel.of(jnp.asarray(k))))
    np.testing.assert_allclose(gain, 2.25 / root**2, rtol=ROUNDING)


@pytest.mark.parametrize("log", [-200.0, 0.0, 200.0])
def test_an_epsilon_beside_signals_that_no_float_holds(log):
    """z of q = e^{2 log}: z/√(q + ε), where q or ε is all there is."""
    kernel = Kernel.of(jnp.ones((1, 1)), log_scale=jnp.array([log]), tangent=jnp.ones(1))
    found = RMSNorm(epsilon=0.25).kernel(kernel)
    size = max(2 * log, np.log(0.25)) if log else np.log(1.25)
    total = jnp.log(found.covariance[0, 0]) + 2 * found.log_scale[0]
    np.testing.assert_allclose(total, 2 * log - size, rtol=1e-5)
    total = jnp.log(found.tangent[0]) + 2 * found.log_tangent_scale[0]
    np.testing.assert_allclose(total, -size, rtol=1e-5)
    # Nothing at all: a tangent meets 1/ε.
    nothing = RMSNorm(epsilon=0.25).kernel(Kernel.of(jnp.zeros((1, 1)), tangent=jnp.ones(1)))
    np.testing.assert_allclose(nothing.tangent * jnp.exp(2 * nothing.log_tangent_scale), 4.0)
    assert nothing.covariance[0, 0] == 0


def test_groups_are_about_the_mean_over_positions():
    """Means 1 and 3 over the positions, second moments 2 and 10: variance (1 + 1)/2 + 1 = 2."""
    kernel = Kernel.of(jnp.array([[2.0, 3.0], [3.0, 10.0]]), jnp.array([1.0, 3.0]))
    found = GroupNorm(shape=(2,)).kernel(kernel)
    np.testing.assert_allclose(found.mean, np.array([-1, 1]) / 2**0.5, rtol=ROUNDING)
    # E(z-2)² = 2 - 4 + 4 and 10 - 12 + 4, E(z-2)(z'-2) = 3 - 2 - 6 + 4.
    np.testing.assert_allclose(found.covariance, np.array([[2, -1], [-1, 2]]) / 2, rtol=ROUNDING)


@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize(("batch", "epsilon"), [(4, 0.4), (7, 0.02), (7, 3.0)])
def test_batch_norm_with_epsilon_by_an_integral_over_lengths(batch, epsilon):
    """Exchangeable, without an activation: r²/λ is χ² of B - 1 degrees, by SciPy's quadrature."""
    size, gain, degrees = 1.7, 1.3, batch - 1

    def mean(f):
        density = scipy.stats.chi2(degrees).pdf
        return scipy.integrate.quad(lambda x: f(size * x) * density(x), 0, np.inf, epsabs=1e-13)[0]

    def total(r2):
        return r2 + batch * epsilon

    centred = np.eye(batch) - 1 / batch
    second, average, slopes = _batch.averages(
        activations.linear, jnp.asarray(size * centred + 0.3), jnp.eye(batch), gain, epsilon
    )
    expected = batch * gain**2 * mean(lambda r2: r2 / total(r2)) / degrees
    np.testing.assert_allclose(second, expected * centred, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(average, 0, atol=1e-12)
    # tr (G - v vᵀ r²/ρ²)², ρ² = r² + B ε.
    expected = (
        batch
        * gain**2
        * mean(lambda r2: (degrees - 2 * r2 / total(r2) + (r2 / total(r2)) ** 2) / total(r2))
    )
    np.testing.assert_allclose(slopes, expected / degrees * centred, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64_only")
def test_batch_norm_of_relu_with_a_small_epsilon_is_that_without():
    k = jnp.eye(5) + 0.3
    none, small = (
        _batch.averages(activations.relu, k, jnp.eye(5), 1.0, epsilon) for epsilon in (None, 1e-12)
    )
    for one, other in zip(none, small, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


def test_instance_norm_is_a_batch_norm_of_positions():
    kernel = Kernel.of(jnp.eye(6) + 0.2, tangent=jnp.eye(6))
    layer = (Activate(activations.relu), Linear(9))
    found, expected = (
        Chain((norm, *layer)).kernel(kernel) for norm in (InstanceNorm(), BatchNorm())
    )
    np.testing.assert_array_equal(found.covariance, expected.covariance)
    np.testing.assert_array_equal(found.tangent, expected.tangent)
    assert not InstanceNorm().mixes_inputs


def test_deep_layers_forget_an_epsilon_that_is_small_beside_them():
    """LayerNorm, then W of σ_w² = 2: q = 2 q/(q + ε) settles at 2 - ε, and χ there is 1 - ε/2."""
    network = builders.stack(1, [(Chain((LayerNorm(epsilon=0.5), Linear(1, 2**0.5))), 60)])
    found = mean_field.predict(network, jnp.ones((1, 1)))
    np.testing.assert_allclose(found["q"][-1], 1.5, rtol=1e-5)
    np.testing.assert_allclose(found["chi"][-2], 2 / 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerNorm(epsilon=-1e-5), "epsilon is -1e-05; it is a finite number, 0 or more"),
        (lambda: GroupNorm(groups=0), "groups is 0; it is a whole number of at least 1"),
        (
            lambda: builders.stack(9, [Chain((GroupNorm(groups=4), Linear(9)))]),
            "groups is 4, and the signal has 9 units; it divides their number",
        ),
        (lambda: InstanceNorm(shape=(1,)), "InstanceNorm makes 0 of a single position"),
        (
            lambda: InstanceNorm().kernel(Kernel.of(jnp.eye(12))),
            "InstanceNorm gets 2 inputs",
        ),
        (
            lambda: Chain((BatchNorm(epsilon=0.1), Dense())).kernel(Kernel.of(jnp.eye(5))),
            "activation 'tanh' acts on a signal that BatchNorm has normalised with an epsilon",
        ),
        (
            lambda: Residual(Chain((Activate(), InstanceNorm(), Linear()))).kernel(
                Kernel.of(jnp.eye(6))
            ),
            "InstanceNorm gets a signal that is not Gaussian",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises((InputError, NoTheory), match=message):
        make()
