"""Training: weights are those of the dense sampler, measured by the same walk, and descend."""

import dataclasses
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from gradflow import builders, data, ensembles, networks, statistics, training
from gradflow.blocks import GRU, Chain, Convolution, Dense, Flatten, Linear, Maxout
from gradflow.errors import InputError
from gradflow.simulation import monte_carlo, propagation
from gradflow.training import Recording

ORTHOGONAL = ensembles.fan_in(1.1, "orthogonal")
CASES = {
    "mlp": builders.mlp((6, 10, 10, 10, 4), "tanh", ensembles.fan_in(1.4), sigma_b=0.5),
    "homogeneous": builders.mlp((6, 9, 9, 9, 4), "relu", "he"),
    "uniform": builders.mlp((6, 9, 9, 4), "logistic", "standard", sigma_b=0.1),
    "dropout": builders.mlp((6, 9, 9, 9, 4), "tanh", "glorot", keep_rate=0.7),
    "residual": builders.residual(6, 9, 4, "relu", "he", norm="layer", layers=2, sigma_b=0.2),
    "batch": builders.mlp((6, 9, 9, 9, 4), "relu", "he", norm="batch"),
    "two matrices": builders.stack(6, [Linear(9), (Maxout(Linear(9, sigma_b=0.3)), 3)]),
    "recurrent": builders.recurrent(6, 9, 5, "tanh", ensembles.fan_in(0.9), sigma_b=0.3),
    "gru": builders.stack(
        6, [Linear(9), networks.Stage(GRU(9, sigma_b=0.2), 4, tied=True)], "tanh"
    ),
}
# Those that stand for all: a chain, one that mixes inputs, one that shares its weights.
QUICK = {"mlp", "batch", "recurrent"}
# Products are of scaled entries here, and scaled products there; float32, through few layers.
ROUNDING = 2e-5
# Compiled as a whole: op by op, each takes a program of its own.
propagate = jax.jit(propagation.propagate, static_argnames=("checkpoint", "cotangent", "keep"))
initial_weights = jax.jit(training.initial_weights)
outputs = jax.jit(training.outputs)


def inputs_of(network, sites=4):
    x = np.random.default_rng(3).normal(size=(sites, network.input_width))
    return jnp.asarray(x, jnp.float32)


def assert_same(found, expected, tolerance=ROUNDING):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, tolerance, tolerance, err_msg=name)


@pytest.mark.medium
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_given_weights_give_the_statistics_of_the_network_they_were_drawn_for(name):
    network, key = CASES[name], jax.random.key(5)
    x = inputs_of(network)
    weights = initial_weights(network, key)
    drawn = propagate(network, x, key)
    assert_same(propagate(network, x, key, weights=weights), drawn)


@pytest.mark.parametrize("delta", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.medium
def test_filters_are_parameters_too(delta):
    blocks = [Linear(3), (Convolution(shape=(4,), units=3, delta=delta, sigma_b=0.2), 3)]
    network = builders.stack(2, [*blocks, Chain((Flatten((4,)), Dense(units=5)))])
    key, x = jax.random.key(5), inputs_of(network, 8)
    weights = initial_weights(network, key)
    assert weights[1].matrices[0].shape == ((3, 3, 3) if delta else (3, 3, 9))
    drawn = propagate(network, x, key)
    assert_same(propagate(network, x, key, weights=weights), drawn)
    assert outputs(network, weights, x, key).shape == (2, 5)


def test_checkpoints_and_kept_linearisations_know_given_weights():
    network, key = CASES["mlp"], jax.random.key(5)
    deep = builders.mlp((6, *[8] * 12), "tanh", "glorot", sigma_b=0.2)
    x, weights = inputs_of(network), initial_weights(deep, key)
    expected = propagate(deep, x, key, weights=weights)
    for how in ({"checkpoint": True}, {"keep": True}):
        assert_same(propagate(deep, x, key, weights=weights, **how), expected)


@pytest.mark.medium
def test_other_weights_give_other_statistics():
    # The negative control of the tests above.
    network, key = CASES["mlp"], jax.random.key(5)
    x = inputs_of(network)
    other = initial_weights(network, jax.random.key(6))
    drawn = propagate(network, x, key)
    found = propagate(network, x, key, weights=other)
    assert not np.allclose(found["log_q"], drawn["log_q"], rtol=0.01)


def test_weights_have_the_variance_of_their_ensemble():
    network = builders.mlp((200, 300, 300, 300), "tanh", "he", sigma_b=0.5)
    weights = initial_weights(network, jax.random.key(0))
    # 90 000 entries: the relative s.e. of a variance is √(2/90000) = 0.5 %; five of them.
    weights = in_numpy(weights)
    for matrix in (*weights[0].matrices[0], *weights[1].matrices[0]):
        assert np.var(matrix) * matrix.shape[1] == pytest.approx(2, rel=0.025)
    # 900 biases: √(1/1800) of their standard deviation is 2.4 %.
    biases = np.concatenate([np.ravel(stage.biases[0]) for stage in weights])
    assert np.std(biases) == pytest.approx(0.5, rel=0.12)


def in_numpy(weights):
    return jax.tree.map(np.asarray, weights)


def cross_entropy(logits, labels):
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(labels)), labels])


def test_gradients_are_those_of_a_plain_network():
    network = CASES["mlp"]
    weights = initial_weights(network, jax.random.key(5))
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
    expected = jax.jit(jax.grad(plain))(flat)

    def ours(weights):
        return cross_entropy(training.outputs(network, weights, x), labels)

    value, found = jax.jit(jax.value_and_grad(ours))(weights)
    assert value == pytest.approx(float(jax.jit(plain)(flat)), rel=1e-5)
    of_layers = [(w, b) for s in found for w, b in zip(s.matrices[0], s.biases[0], strict=True)]
    for (w, b), (w_plain, b_plain) in zip(of_layers, expected, strict=True):
        np.testing.assert_allclose(w, w_plain, 1e-4, 1e-6)
        np.testing.assert_allclose(b, b_plain, 1e-4, 1e-6)

    # And the walk's are the same: of each site's own cost, C being their mean.
    def at_the_top(logits):
        return jax.nn.softmax(logits) - jax.nn.one_hot(labels, 4, dtype=logits.dtype)

    measured = propagate(network, x, jax.random.key(0), weights=weights, cotangent=at_the_top)
    square = [np.mean(np.square(w)) for w, _ in expected]
    np.testing.assert_allclose(np.exp(measured["log_weight_gradient_variance"]), square, 1e-4)


@pytest.mark.medium
@pytest.mark.parametrize(
    "name",
    [
        "gru",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("recurrent", "residual", "dropout")
        ),
    ],
)
def test_outputs_are_what_the_walk_sees_at_the_top(name):
    network, key = CASES[name], jax.random.key(5)
    x, weights = inputs_of(network), initial_weights(network, key)

    @jax.jit
    def at_the_top(weights):
        seen = []
        propagation.propagate(
            network, x, key, weights=weights, cotangent=lambda z: seen.append(z) or jnp.ones_like(z)
        )
        return seen[0]

    ours = outputs(network, weights, x, key)
    np.testing.assert_allclose(ours, at_the_top(weights), ROUNDING, ROUNDING)


def test_biases_that_start_at_zero_change_no_statistic_and_are_parameters():
    network = networks.with_biases(builders.mlp((6, 9, 9, 4), "tanh", "glorot"))
    weights = initial_weights(network, jax.random.key(1))
    assert [s.biases[0].shape for s in weights] == [(1, 1, 9), (1, 1, 9), (1, 1, 4)]
    assert not any(np.any(np.asarray(s.biases[0])) for s in weights)
    assert networks.with_biases(CASES["mlp"]) == CASES["mlp"]


# Training, at first of a tiny network on all of the data at every step: plain gradient descent.
WIDTHS = (6, 8, 8, 3)
SAMPLES = 40
FEW = (statistics.q, statistics.log_gradient_norm, statistics.weight_gradient_variance)


def data_of(width=6, classes=3, samples=SAMPLES):
    keys = jax.random.split(jax.random.key(11))
    x = jax.random.normal(keys[0], (samples, width), jnp.float32)
    return np.asarray(x), np.asarray(jax.random.randint(keys[1], (samples,), 0, classes))


@pytest.fixture(scope="module")
def trained():
    network = builders.mlp(WIDTHS, "tanh", ensembles.fan_in(1.3))
    x, y = data_of()
    how = {"steps": 6, "batch": SAMPLES, "learning_rate": 0.5, "seeds": 3, "key": 4}
    result = training.train(
        network,
        x,
        y,
        record=Recording([0, 2, 6], histograms=12, singular_values=3),
        keep_state=True,
        **how,
    )
    return result, network, x, y


@pytest.mark.medium
def test_before_the_first_step_it_is_the_simulations_network(trained):
    result, network, x, _ = trained
    simulated = monte_carlo.simulate(
        networks.with_biases(network), x, key=4, networks=3, sampler="dense", keep_samples=True
    )
    forward = [s.key for s in statistics.ALL if not s.backward]
    for key in forward:
        np.testing.assert_allclose(
            result[key][0, 0, :, 0], simulated.samples[key], ROUNDING, ROUNDING, err_msg=key
        )


@pytest.mark.medium
def test_what_is_recorded_at_a_step_is_what_propagate_measures_of_its_weights(trained):
    result, network, x, y = trained
    network = networks.with_biases(network)
    with pytest.raises(InputError, match="weights were not kept"):
        dataclasses.replace(result, state=None).weights()

    def cotangent(z):
        return jax.nn.softmax(z) - jax.nn.one_hot(y, 3, dtype=z.dtype)

    for number in range(3):
        weights = result.weights(seed=number)
        key = jax.random.fold_in(jax.random.key(4), number)
        found = propagate(network, x, key, weights=weights, cotangent=cotangent)
        recorded = {key: result[key][0, 0, number, -1] for key in found}
        assert_same(recorded, found, 1e-4)


@pytest.mark.medium
def test_histograms_and_singular_values_are_those_of_the_weights_of_that_step(trained):
    result, network, x, _ = trained
    network, key = networks.with_biases(network), jax.random.fold_in(jax.random.key(4), 1)
    weights = result.weights(seed=1)
    signals = jax.jit(propagation.signals)(network, jnp.asarray(x), key, weights=weights)
    h = np.tanh(np.asarray(signals.preactivation[1][0]))
    expected, edges = np.histogram(h, 12, (-1, 1), density=True)
    # A value on an edge may fall to either side of it: two of 320 values are 0.04 of density.
    np.testing.assert_allclose(
        result["activation_histogram"][0, 0, 1, -1, 1], expected, atol=0.04 + 1e-5
    )
    assert result["activation_low"][0, 0, 1, -1, 1] == edges[0]
    assert result["activation_high"][0, 0, 1, -1, 1] == edges[-1]
    mass = result["activation_histogram"].sum(axis=-1) * (2 / 12)
    np.testing.assert_allclose(mass, 1, rtol=1e-5)

    def logits(x):
        return training.outputs(network, weights, x[None])[0]

    jacobian = np.asarray(jax.jit(jax.jacobian(logits))(x[0]), np.float64)
    expected = np.log(np.linalg.svd(jacobian, compute_uv=False))
    np.testing.assert_allclose(result["log_singular_values"][0, 0, 1, -1], expected, atol=1e-4)
    dataset = result.to_xarray()
    assert dataset.log_singular_values.dims[-2:] == ("step", "singular_value")
    assert dataset.activation_histogram.dims[-3:] == ("step", "layer", "bin")
    for name, variable in dataset.data_vars.items():
        assert "long_name" in variable.attrs or name.endswith("_theory"), name


def test_training_is_gradient_descent(trained):
    result, network, x, y = trained
    network = networks.with_biases(network)
    start = initial_weights(network, jax.random.fold_in(jax.random.key(4), 1))

    def cost(weights):
        return cross_entropy(training.outputs(network, weights, jnp.asarray(x)), y)

    cost_and_gradient = jax.jit(jax.value_and_grad(cost))
    weights = start
    for _ in range(6):
        gradient = cost_and_gradient(weights)[1]
        weights = jax.tree.map(
            lambda w, g: w - np.float32(0.5) * g, *map(in_numpy, (weights, gradient))
        )
    loss, gradient = cost_and_gradient(weights)
    assert result["loss"][0, 0, 1, -1] == pytest.approx(float(loss), rel=1e-4)

    def norms(weights):
        matrices = np.concatenate([s.matrices[0].reshape(len(s.matrices[0]), -1) for s in weights])
        return np.linalg.norm(matrices, axis=1)

    def padded(weights):  # to one size, zeros adding nothing to a norm
        return [
            s._replace(matrices=(np.pad(s.matrices[0], ((0, 0), (0, 5), (0, 5)))[:, :8, :8],))
            for s in weights
        ]

    start = in_numpy(start)
    moved = jax.tree.map(np.subtract, weights, start)
    np.testing.assert_allclose(
        result["movement"][0, 0, 1, -1], norms(padded(moved)) / norms(padded(start)), 1e-3
    )
    change = jax.tree.map(lambda g: 0.5 * g, in_numpy(gradient))
    np.testing.assert_allclose(
        result["update_ratio"][0, 0, 1, -1], norms(padded(change)) / norms(padded(weights)), 1e-3
    )
    assert not np.any(result["movement"][:, :, :, 0])


def test_the_98th_percentile_is_that(trained):
    result, network, x, _ = trained
    network = networks.with_biases(network)
    weights = initial_weights(network, jax.random.fold_in(jax.random.key(4), 2))
    h = np.tanh(outputs(network, weights, x))
    found = float(result["activation_percentile_98"][0, 0, 2, 0, -1])
    assert np.mean(h <= found + 1e-6) >= 0.98
    assert np.mean(h < found - 1e-6) < 0.98


def test_every_epoch_has_every_sample_once():
    # One layer from one-hot inputs: a step changes the column of its sample and no other.
    network, n = builders.mlp((9, 4), "linear", "lecun"), 9
    x, y = np.eye(n, dtype=np.float32), np.arange(n) % 4
    result = training.train(
        network,
        x,
        y,
        steps=2 * n,
        batch=1,
        biases=False,
        keep_state=True,
        record=Recording([18], wanted=()),
    )
    w = np.asarray(result.state.start[0].matrices[0])[0, 0]
    for _ in range(2):
        w = w - 0.1 * (scipy.special.softmax(w, axis=0) - np.eye(4)[:, y])
    found = np.asarray(result.state.weights[0].matrices[0])[0, 0]
    np.testing.assert_allclose(found, w, 1e-5, 1e-6)


@pytest.fixture(scope="module")
def grid():
    x, y = data_of()
    laws = [builders.mlp(WIDTHS, "tanh", ensembles.fan_in(s), sigma_b=0.1) for s in (0.5, 2.0)]
    how = {"steps": 20, "batch": 8, "seeds": 2, "record": Recording([0, 20], wanted=FEW)}
    result = training.train(laws, x, y, learning_rate=[0.1, 0.4], **how)
    return result, laws, x, y, how


@pytest.mark.medium
def test_a_point_of_a_grid_is_the_network_alone_however_they_are_grouped(grid):
    result, laws, x, y, how = grid
    assert result["loss"].shape == (2, 2, 2, 2)
    grouped = training.train(laws, x, y, learning_rate=[0.1, 0.4], block=3, **how)
    alone = training.train(laws[1], x, y, learning_rate=0.4, **how)
    for key, value in result.values.items():
        np.testing.assert_allclose(grouped[key], value, 1e-3, 1e-4, err_msg=key)
        np.testing.assert_allclose(alone[key][0, 0], value[1, 1], 1e-3, 1e-4, err_msg=key)
    assert not np.allclose(result["loss"][0, 0], result["loss"][1, 1], rtol=0.01)


@pytest.mark.medium
def test_results_have_names_and_theory_beside_them(grid):
    dataset = grid[0].to_xarray()
    assert dataset.q.dims == ("network", "learning_rate", "seed", "step", "layer")
    assert dataset.q_theory.dims == ("network", "layer")
    assert dataset.q.attrs["long_name"] == statistics.q.label
    # Width 8, 2 seeds × 2 rates (the same weights), step 0: theory to a factor of 3.
    ratio = dataset.q.isel(step=0).mean(("seed", "learning_rate")) / dataset.q_theory
    assert np.all((ratio > 1 / 3) & (ratio < 3))


@pytest.mark.medium
def test_training_goes_on_from_a_state_as_if_it_had_not_stopped():
    network, (x, y) = builders.mlp(WIDTHS, "relu", "he"), data_of()

    def optimiser(rate):
        return optax.adam(optax.exponential_decay(rate, 10, 0.5))

    how = {"batch": 7, "seeds": 2, "learning_rate": 0.01, "optimiser": optimiser}
    whole = training.train(network, x, y, steps=13, record=Recording([13], wanted=()), **how)
    half = training.train(
        network, x, y, steps=8, record=Recording([8], wanted=()), keep_state=True, **how
    )
    rest = training.train(
        network, x, y, steps=13, record=Recording([13], wanted=()), state=half.state, **how
    )
    for key, value in whole.values.items():
        np.testing.assert_allclose(rest[key], value, 1e-4, 1e-6, err_msg=key)


@pytest.mark.medium
def test_what_diverges_is_recorded_and_told_by_movement_and_loss_too():
    x, y = data_of()
    how = {"steps": 60, "batch": 8, "record": Recording([0, 30, 60], wanted=())}
    broken = training.train(
        builders.mlp((6, 20, 20, 3), "relu", "he"), x, y, learning_rate=[0.01, 1e4], **how
    )
    assert broken.first_nonfinite[0, 0, 0] == -1
    assert 0 < broken.first_nonfinite[0, 1, 0] < 30
    np.testing.assert_array_equal(broken.diverged[0, :, 0], [-1, 30])
    assert broken["error"][0, 1, 0, -1] == 1
    bounded = training.train(
        builders.mlp((6, 20, 20, 3), "tanh", "unscaled"), x, y, learning_rate=[0.01, 100.0], **how
    )
    assert np.all(bounded.first_nonfinite == -1)
    np.testing.assert_array_equal(bounded.diverged[0, :, 0], [-1, 30])


def stacked(*scales):
    return builders.stack(6, [Linear(3, scale) for scale in scales], "linear")


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        # Signals of 1e30, and then of 1e60.
        (stacked(1.0, 1e30, 1e30, 1.0), 3),
        # Signals are of 1e-25 to 1e15, gradients of 1e40 and more below layer 2.
        (stacked(1e-25, 1e-20, 1e30, 1e30), 2),
    ],
    ids=["on the way up", "on the way down"],
)
def test_the_layer_where_numbers_leave_the_floats_range_is_found(network, layer):
    x, y = data_of()
    x = x.astype(np.float32)
    result = training.train(
        network, x, y, steps=3, batch=SAMPLES, seeds=2, record=Recording([3], wanted=()), block=2
    )
    np.testing.assert_array_equal(result.nonfinite_layer[0, 0], layer)
    np.testing.assert_array_equal(result.first_nonfinite[0, 0], 0 if layer == 3 else 1)


CLIP = 0.02


@pytest.fixture(scope="module")
def clipped():
    network = builders.mlp(WIDTHS, "tanh", ensembles.fan_in(1.3))
    (x, y), (more, labels) = data_of(), data_of(samples=25)
    result = training.train(
        network,
        x,
        y,
        steps=3,
        batch=SAMPLES,
        learning_rate=[1e6, 0.5, 1e-6],
        seeds=2,
        clip=optax.adaptive_grad_clip(CLIP),
        validation=(more + 0.1, labels),
        record=Recording([0, 3], wanted=()),
        keep_state=True,
    )
    return result, networks.with_biases(network), x, y, (more + 0.1, labels)


@pytest.mark.medium
def test_a_clipped_gradient_is_what_optax_makes_of_it_layer_by_layer(clipped):
    result, network, x, y, _ = clipped
    weights = result.weights(learning_rate=1, seed=1)

    def cost(weights):
        return cross_entropy(training.outputs(network, weights, jnp.asarray(x)), y)

    def plain(weights):  # as one would hold them: (n_in, n_out)
        return [w.T for s in weights for w in s.matrices[0]]

    weights, found = in_numpy(weights), in_numpy(jax.jit(jax.grad(cost))(weights))
    expected = [np.log(np.linalg.norm(w)) for w in plain(found)]
    np.testing.assert_allclose(
        result["log_batch_gradient_norm"][0, 1, 1, -1], expected, rtol=1e-4, atol=1e-4
    )
    clip = optax.adaptive_grad_clip(CLIP)
    state = clip.init(plain(weights))
    small, _ = jax.jit(clip.update)(plain(found), state, plain(weights))
    expected = [np.log(np.linalg.norm(w)) for w in small]
    np.testing.assert_allclose(
        result["log_clipped_gradient_norm"][0, 1, 1, -1], expected, rtol=1e-4, atol=1e-4
    )
    assert np.all(np.asarray(expected) < result["log_batch_gradient_norm"][0, 1, 1, -1])


@pytest.mark.medium
def test_the_best_rate_is_that_of_the_least_validation_error(clipped):
    result, network, _, _, (more, labels) = clipped
    assert result["validation_error"].shape == (1, 3, 2, 2)
    logits = np.asarray(outputs(network, result.weights(0, 2, 1), more))
    error = np.mean(np.argmax(logits, axis=1) != labels)
    assert result["validation_error"][0, 2, 1, -1] == pytest.approx(error)
    loss = result["validation_loss"][0, 2, 1, -1]
    expected = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
    assert loss == pytest.approx(np.mean(expected), rel=1e-4)

    def best(errors, losses, first_nonfinite=None):
        values = {"validation_error": np.asarray(errors), "validation_loss": np.asarray(losses)}
        values = {name: value[None, :, :, None] for name, value in values.items()}
        none = np.full(values["validation_loss"].shape[:3], -1)
        gone = none if first_nonfinite is None else np.asarray(first_nonfinite)[None]
        return dataclasses.replace(result, values=values, first_nonfinite=gone).best_rate().item()

    rates = [[0.5, 0.1], [0.2, 0.2], [0.3, 0.3]]
    assert best(rates, np.ones((3, 2))) == 1
    assert best([[0.2, 0.2], *rates[1:]], [[1, 1], [2, 0.1], [1, 1]]) == 0
    assert best([[0.2, 0.2], *rates[1:]], [[1, 1], [1, 0.9], [1, 1]]) == 1
    assert best(rates, np.ones((3, 2)), [[-1, -1], [-1, 7], [-1, -1]]) in (0, 2)
    with pytest.raises(InputError, match="no best learning rate without validation data"):
        dataclasses.replace(result, values={}).best_rate()


@pytest.mark.medium
def test_the_spread_of_speeds_is_that_of_update_ratios(clipped):
    ratio = clipped[0]["update_ratio"][0, 1]
    expected = ratio.max(axis=-1) / ratio.min(axis=-1)
    np.testing.assert_allclose(clipped[0].speed_spread[0, 1], expected, rtol=1e-6)
    labelled = clipped[0].to_xarray().speed_spread
    assert labelled.dims == ("network", "learning_rate", "seed", "step")


@pytest.mark.medium
def test_a_schedule_is_one_of_steps():
    network, (x, y) = builders.mlp(WIDTHS, "tanh", "glorot"), data_of()
    result = training.train(
        network,
        x,
        y,
        steps=20,
        batch=8,
        optimiser=lambda rate: optax.sgd(optax.piecewise_constant_schedule(rate, {6: 0.0})),
        record=Recording([5, 6, 20], wanted=()),
    )
    ratio, movement = result["update_ratio"][0, 0, 0], result["movement"][0, 0, 0]
    assert np.all(ratio[0] > 0)
    assert not np.any(ratio[1:])
    assert np.all(movement[1] > 0)
    np.testing.assert_array_equal(movement[2], movement[1])


@pytest.mark.medium
def test_noise_in_gradients_is_each_networks_own_and_the_same_again():
    network, (x, y) = builders.mlp((6, 40, 3), "tanh", "glorot"), data_of()
    how = {
        "steps": 1,
        "batch": 8,
        "learning_rate": 1e-3,
        "seeds": 2,
        "record": Recording([1], wanted=()),
    }
    optimiser = training.with_noise(optax.sgd, 1e4)

    def noise(**other):
        result = training.train(network, x, y, optimiser=optimiser, keep_state=True, **how | other)
        state = in_numpy(result.state.weights), in_numpy(result.state.start)
        change = jax.tree.map(np.subtract, *state)
        return -1e3 * np.concatenate([s.matrices[0].reshape(2, -1) for s in change], 1)

    # 360 values of sd 100, of which the gradient is less than 0.01: the relative s.e. of their mean
    # square is √(2/360) = 0.075, that of their correlation √(1/360) = 0.053; five of each.
    first = noise()
    np.testing.assert_allclose(np.mean(np.square(first), axis=1), 1e4, rtol=5 * 0.075)
    assert abs(np.corrcoef(first)[0, 1]) < 5 * 0.053
    np.testing.assert_array_equal(noise(), first)
    assert abs(np.corrcoef(noise(key=1)[0], first[0])[0, 1]) < 5 * 0.053


def test_optimisers_and_clippings_have_names():
    weights = {"matrix": np.ones((3, 2)), "bias": np.ones(2)}
    gradient = {name: 10 * w for name, w in weights.items()}
    for name in training.OPTIMISERS:
        optimiser = training.optimiser(name)(0.1)
        state = jax.jit(optimiser.init)(weights)
        change, _ = jax.jit(optimiser.update)(gradient, state, weights)
        assert np.all(np.asarray(change["matrix"]) < 0), name

    def norms(text):
        clip = training.clipping(text)
        found, _ = jax.jit(clip.update)(gradient, clip.init(weights), weights)
        return [np.linalg.norm(found[name]) for name in ("matrix", "bias")]

    np.testing.assert_allclose(norms("value:1"), np.sqrt([6, 2]), rtol=1e-5)
    np.testing.assert_allclose(norms("norm:0.5"), [0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(norms("norm:100"), 10 * np.sqrt([6, 2]), rtol=1e-5)
    np.testing.assert_allclose(norms("global-norm:2"), 2 * np.sqrt([6 / 8, 2 / 8]), rtol=1e-5)
    np.testing.assert_allclose(norms("adaptive:0.01"), 0.01 * np.sqrt([6, 2]), rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("norms:1", "unknown clipping 'norms'.*did you mean 'norm'"),
        ("norm", "clip is 'norm'; it is a name and a threshold above 0 with a colon between"),
        ("norm:0", "as norm:1.0"),
        ("value:nan", "as value:1.0"),
    ],
)
def test_a_wrong_clipping_is_said_in_a_sentence(text, sentence):
    with pytest.raises(InputError, match=sentence):
        training.clipping(text)


# A run of several calls, in this process or in one that is killed.
RUN = """
import os, signal
import numpy as np
import optax
from gradflow import builders, training
from gradflow.training import Recording, _execution

HOW = {"steps": 30, "batch": 8, "learning_rate": [0.1, 0.2], "seeds": 2}
HOW |= {"record": Recording([0, *range(3, 30, 4), 30], wanted=())}
HOW |= {"optimiser": training.with_noise(optax.adam, 0.1)}

def run(save, after=None, stop=None, **other):
    seen = []
    def progress(done, total):
        seen.append(done)
        if after is not None and done > after:
            stop()
    x = np.sin(np.arange(240, dtype=np.float32)).reshape(40, 6)
    result = training.train(
        builders.mlp((6, 8, 8, 3), "tanh", "glorot"), x, np.arange(40) % 3, save=save,
        progress=progress, **HOW | other
    )
    return result, seen
"""
run = {}
exec(RUN, run)


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def uninterrupted():
    return run["run"](None)[0]


def assert_goes_on(folder, uninterrupted):
    """Assert that most of the first half was saved, and that the end is as it would have been."""
    steps = [np.load(file)["state/0"] for file in folder.glob("*/networks-*.npz")]
    assert 50 < np.concatenate(steps).sum() < 120
    result, seen = run["run"](folder)
    assert seen[1] > 0
    assert seen[-1] == 120
    for name, value in uninterrupted.values.items():
        np.testing.assert_array_equal(result[name], value, err_msg=name)


@pytest.mark.medium
def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        run["run"](tmp_path, 60, interrupt)
    assert_goes_on(tmp_path, uninterrupted)
    # And is at hand once it has ended; another one is kept apart, and nothing else is left.
    again, seen = run["run"](tmp_path)
    assert seen == [0, 60, 120]
    (folder,) = tmp_path.iterdir()
    assert again.saved == folder
    run["run"](tmp_path, steps=7, record=Recording([7], wanted=()))
    assert len(list(tmp_path.iterdir())) == 2
    (broken, *_) = folder.glob("*.npz")
    for path, content in ((broken, b"half a file"), (broken, b""), (folder / "plan.json", b"[1]")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path.name}', where a run was saved; remove .* to"):
            run["run"](tmp_path)


@pytest.mark.slow
def test_a_killed_process_loses_little(tmp_path, uninterrupted):
    program = f"{RUN}\n_execution._SAVE_SECONDS, _execution._SAVE_SHARE = 0.0, np.inf\n"
    program += f"run({str(tmp_path)!r}, 60, lambda: os.kill(os.getpid(), signal.SIGKILL))"
    x64 = str(int(jax.config.jax_enable_x64))
    killed = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"JAX_ENABLE_X64": x64}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert_goes_on(tmp_path, uninterrupted)


OTHERS = {
    "convolutional": (builders.convolutional((4,), [2, 3, 3], "relu", "he", dense=[3]), 8),
    "recurrent": (builders.recurrent(6, 3, 5, "tanh", "glorot", sigma_u=0.3), 6),
    "dropout, batch": (builders.mlp((6, 8, 8, 3), "relu", "he", norm="batch", keep_rate=0.8), 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_any_network_trains(name):
    network, width = OTHERS[name]
    x, y = data_of(width)
    result = training.train(network, x, y, steps=100, batch=8, learning_rate=0.05)
    loss = result["loss"][0, 0, 0]
    assert loss[-1] < loss[0]
    assert np.all(np.isfinite(result["movement"][..., -1, 0]))


def test_digits_are_learnt():
    from sklearn.datasets import load_digits

    network = builders.mlp((64, 30, 10), "tanh", "glorot")
    result = training.train(
        network,
        data.digits(),
        load_digits().target,
        steps=400,
        record=Recording([0, 400], wanted=()),
    )
    assert result["error"][0, 0, 0, 0] > 0.7  # ten classes
    assert result["error"][0, 0, 0, 1] < 0.15


BAD = {
    "labels has 3; the network's last layer has 3 units, so that labels are from 0 to 2": {
        "labels": np.full(SAMPLES, 3)
    },
    "labels is of float64 and shape": {"labels": np.zeros(SAMPLES)},
    "labels is of int64 and shape": {"labels": np.zeros(SAMPLES - 1, int)},
    r"inputs\[0, 0\] is nan; every value must be a finite number": {
        "inputs": np.full((SAMPLES, 6), np.nan)
    },
    r"inputs has shape \(40, 5\); it is \(samples, 6\) for this network": {
        "inputs": np.zeros((SAMPLES, 5))
    },
    "learning_rate is -0.1; it is a finite number above 0": {"learning_rate": [0.1, -0.1]},
    "learning_rate is 0.0; it is a finite number above 0": {"learning_rate": 0},
    "batch is 41, and there are 40 samples; use at most as many": {"batch": SAMPLES + 1},
    "steps is 0; it is a whole number of at least 1": {"steps": 0},
    r"record is \[11\]; it is some of the steps 0 to 10": {"record": Recording([11])},
    "needs .* GiB in training and .* are free": {"memory_budget": 100},
    "networks is empty": {"networks": []},
    "singular_values is 4; the Jacobian of 3 outputs by 6 inputs has 3": {
        "record": Recording(singular_values=4)
    },
    "singular_values is 1, .* under BatchNorm a signal depends on the whole batch": {
        "record": Recording(singular_values=1),
        "networks": builders.mlp(WIDTHS, "tanh", "he", norm="batch"),
    },
    "differ in more than numbers": {
        "networks": [builders.mlp(WIDTHS, phi, "he") for phi in ("tanh", "relu")]
    },
    "a UnitVariance block says how LSUV starts weights": {
        "networks": networks.unit_variance(builders.mlp(WIDTHS, "tanh", "he"))
    },
    "validation's labels has 5": {"validation": (np.zeros((1, 6)), np.full(1, 5))},
    r"monitor's inputs has shape \(1, 2\)": {
        "record": Recording(monitor=(np.zeros((1, 2)), np.zeros(1, int)))
    },
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_said_in_a_sentence(sentence):
    x, y = data_of()
    given = {"networks": builders.mlp(WIDTHS, "tanh", "he"), "inputs": x, "labels": y, "steps": 10}
    with pytest.raises(InputError, match=sentence):
        training.train(**(given | BAD[sentence]))
