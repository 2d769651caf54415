"""Weights as parameters: those of the dense sampler, and measured by the same walk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import ensembles, networks, training
from gradflow.blocks import GRU, Chain, Convolution, Dense, Flatten, Linear, Maxout
from gradflow.simulation import propagation

ORTHOGONAL = ensembles.fan_in(1.1, "orthogonal")
CASES = {
    "mlp": networks.mlp((6, 10, 10, 10, 4), "tanh", ensembles.fan_in(1.4), sigma_b=0.5),
    "homogeneous": networks.mlp((6, 9, 9, 9, 4), "relu", "he"),
    "uniform": networks.mlp((6, 9, 9, 4), "logistic", "standard", sigma_b=0.1),
    "dropout": networks.mlp((6, 9, 9, 9, 4), "tanh", "glorot", keep=0.7),
    "residual": networks.residual(6, 9, 4, "relu", "he", norm="layer", layers=2, sigma_b=0.2),
    "batch": networks.mlp((6, 9, 9, 9, 4), "relu", "he", norm="batch"),
    "two matrices": networks.stack(6, [Linear(9), (Maxout(Linear(9, sigma_b=0.3)), 3)]),
    "recurrent": networks.recurrent(6, 9, 5, "tanh", ensembles.fan_in(0.9), sigma_b=0.3),
    "gru": networks.stack(
        6, [Linear(9), networks.Stage(GRU(9, sigma_b=0.2), 4, tied=True)], "tanh"
    ),
}
# Products are of scaled entries here, and scaled products there; float32, through few layers.
ROUNDING = 2e-5


def inputs_of(network, sites=4):
    return jax.random.normal(jax.random.key(3), (sites, network.input_width), jnp.float32)


def assert_same(found, expected, tolerance=ROUNDING):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_given_weights_give_the_statistics_of_the_network_they_were_drawn_for(name):
    network, key = CASES[name], jax.random.key(5)
    x = inputs_of(network)
    weights = training.initial_weights(network, key)
    drawn = propagation.propagate(network, x, key)
    assert_same(propagation.propagate(network, x, key, weights=weights), drawn)


@pytest.mark.parametrize("delta", [False, True])
def test_filters_are_parameters_too(delta):
    blocks = [Linear(3), (Convolution(shape=(4,), units=3, delta=delta, sigma_b=0.2), 3)]
    network = networks.stack(2, [*blocks, Chain((Flatten((4,)), Dense(units=5)))])
    key, x = jax.random.key(5), jax.random.normal(jax.random.key(1), (8, 2), jnp.float32)
    weights = training.initial_weights(network, key)
    assert weights[1].matrices[0].shape == ((3, 3, 3) if delta else (3, 3, 9))
    drawn = propagation.propagate(network, x, key)
    assert_same(propagation.propagate(network, x, key, weights=weights), drawn)
    assert training.outputs(network, weights, x, key).shape == (2, 5)


def test_checkpoints_and_kept_linearisations_know_given_weights():
    network, key = CASES["mlp"], jax.random.key(5)
    deep = networks.mlp((6, *[8] * 12), "tanh", "glorot", sigma_b=0.2)
    x, weights = inputs_of(network), training.initial_weights(deep, key)
    expected = propagation.propagate(deep, x, key, weights=weights)
    for how in ({"checkpoint": True}, {"keep": True}):
        assert_same(propagation.propagate(deep, x, key, weights=weights, **how), expected)


def test_other_weights_give_other_statistics():
    # The negative control of the tests above.
    network, key = CASES["mlp"], jax.random.key(5)
    x = inputs_of(network)
    other = training.initial_weights(network, jax.random.key(6))
    drawn = propagation.propagate(network, x, key)
    found = propagation.propagate(network, x, key, weights=other)
    assert not np.allclose(found["log_q"], drawn["log_q"], rtol=0.01)


def test_weights_have_the_variance_of_their_ensemble():
    network = networks.mlp((200, 300, 300, 300), "tanh", "he", sigma_b=0.5)
    weights = training.initial_weights(network, jax.random.key(0))
    # 90 000 entries: the relative s.e. of a variance is √(2/90000) = 0.5 %; five of them.
    for matrix in (*weights[0].matrices[0], *weights[1].matrices[0]):
        assert np.var(matrix) * matrix.shape[1] == pytest.approx(2, rel=0.025)
    # 900 biases: √(1/1800) of their standard deviation is 2.4 %.
    biases = jnp.concatenate([stage.biases[0].ravel() for stage in weights])
    assert np.std(biases) == pytest.approx(0.5, rel=0.12)


def cross_entropy(logits, labels):
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(labels)), labels])


def test_gradients_are_those_of_a_plain_network():
    network = CASES["mlp"]
    weights = training.initial_weights(network, jax.random.key(5))
    x, labels = inputs_of(network), jnp.array([0, 3, 1, 1])

    def plain(parameters):
        h = x
        for layer, (w, b) in enumerate(parameters):
            z = h @ w.T + b
            h = jnp.tanh(z)
            last = layer == len(parameters) - 1
        assert last
        return cross_entropy(z, labels)

    flat = [(w, b) for s in weights for w, b in zip(s.matrices[0], s.biases[0], strict=True)]
    assert [w.shape for w, _ in flat] == [(10, 6), (10, 10), (10, 10), (4, 10)]
    expected = jax.grad(plain)(flat)

    def ours(weights):
        return cross_entropy(training.outputs(network, weights, x), labels)

    value, found = jax.value_and_grad(ours)(weights)
    assert value == pytest.approx(float(plain(flat)), rel=1e-5)
    of_layers = [(w, b) for s in found for w, b in zip(s.matrices[0], s.biases[0], strict=True)]
    for (w, b), (w_plain, b_plain) in zip(of_layers, expected, strict=True):
        np.testing.assert_allclose(w, w_plain, 1e-4, 1e-6)
        np.testing.assert_allclose(b, b_plain, 1e-4, 1e-6)

    # And the walk's are the same: of each site's own cost, C being their mean.
    def at_the_top(logits):
        return jax.nn.softmax(logits) - jax.nn.one_hot(labels, 4, dtype=logits.dtype)

    measured = propagation.propagate(
        network, x, jax.random.key(0), weights=weights, cotangent=at_the_top
    )
    square = [float(jnp.mean(w**2)) for w, _ in expected]
    np.testing.assert_allclose(np.exp(measured["log_weight_gradient_variance"]), square, 1e-4)


@pytest.mark.parametrize("name", ["recurrent", "gru", "residual", "dropout"])
def test_outputs_are_what_the_walk_sees_at_the_top(name):
    network, key = CASES[name], jax.random.key(5)
    x, weights = inputs_of(network), training.initial_weights(network, key)
    seen = []
    propagation.propagate(
        network, x, key, weights=weights, cotangent=lambda z: seen.append(z) or jnp.ones_like(z)
    )
    np.testing.assert_allclose(
        training.outputs(network, weights, x, key), seen[0], ROUNDING, ROUNDING
    )


def test_biases_that_start_at_zero_change_no_statistic_and_are_parameters():
    network = networks.with_biases(networks.mlp((6, 9, 9, 4), "tanh", "glorot"))
    weights = training.initial_weights(network, jax.random.key(1))
    assert [s.biases[0].shape for s in weights] == [(1, 1, 9), (1, 1, 9), (1, 1, 4)]
    assert not any(np.any(np.asarray(s.biases[0])) for s in weights)
    assert networks.with_biases(CASES["mlp"]) == CASES["mlp"]
