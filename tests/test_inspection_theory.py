"""The theory of a program that is read, beside `theory.mean_field` of the network it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gradflow import activations, blocks
from gradflow.inspection._reading.layers import layers
from gradflow.inspection._reading.program import read
from gradflow.inspection._theory.values import Law
from gradflow.inspection._theory.walk import predict
from gradflow.networks import Network, Stage
from gradflow.theory import float64

_SITES, _WIDTH = 6, 100


class _Recorded:
    """A ``multiply`` that notes the shapes and laws of the parameters that it is asked for."""

    def __init__(self):
        self.shapes, self.laws = [], []

    def __call__(self, key, x, *, sigma_w, width, distribution, full_input=None, mu_w=None):
        del key, distribution
        assert mu_w is None
        entering = x if full_input is None else full_input
        self.shapes.append((width, entering.shape[1]))
        self.laws.append(Law(0.0, float(sigma_w) ** 2 / x.shape[1], gaussian=True))
        return jnp.zeros((x.shape[0], width), x.dtype)

    def bias(self, draw):
        drawn = jnp.stack([draw()] * 1)[0]
        self.shapes.append(drawn.shape)
        self.laws.append(None)
        return drawn


class _Given:
    """A ``multiply`` by given parameters, in the order in which they are asked for."""

    def __init__(self, parameters):
        self.remaining = iter(parameters)

    def __call__(self, key, x, *, width, **law):
        del key, law, width
        return x @ next(self.remaining).T

    def bias(self, draw):
        del draw
        return next(self.remaining)


def _apply(network, multiply, x):
    key = jax.random.key(0)
    number = 0
    for stage in network.stages:
        for _ in range(stage.repeats):
            x = stage.block.apply(x, multiply, jax.random.fold_in(key, number))
            number += 1
    return x


def _read(network, x, sigma_b2=None):
    """The theory of a network from its jaxpr alone, and its layers."""
    recorded = _Recorded()
    _apply(network, recorded, jnp.asarray(x))
    parameters = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in recorded.shapes]
    with jax.enable_x64(True):
        program = read(
            lambda parameters, inputs: _apply(network, _Given(parameters), inputs),
            parameters=parameters,
            inputs=jnp.asarray(x, jnp.float64),
        )
    biases = Law(0.0, sigma_b2 or 0.0, gaussian=True)
    laws = [law or biases for law in recorded.laws]
    found = layers(program)
    numbers = program.arguments["parameters"]
    return predict(program, found, dict(zip(numbers, laws, strict=True)), [x]), found


def _inputs(n=20):
    return np.asarray(jax.random.normal(jax.random.key(1), (_SITES, n)), np.float64)


def _largest(theory, expected, layers_read, layers_known, keys=None):
    """The largest difference of statistics at layers of both."""
    worst = 0.0
    for key, values in theory.values.items():
        if key not in expected.values or (keys and key not in keys):
            continue
        own, known = values[layers_read], np.asarray(expected.values[key])[layers_known]
        np.testing.assert_array_equal(np.isnan(own), np.isnan(known), err_msg=key)
        worst = max(worst, float(np.nanmax(np.abs(own - known), initial=0.0)))
    return worst


# What is read at the first layer, before the block, and at the last, behind it.
_KEYS = {"log_q", "correlation", "log_gradient_variance", "log_weight_gradient_variance"}
# h' = σ(o) tanh(σ(f) c + σ(i) tanh(g)) at two inputs is an average over three gates and a cell, two
# Gaussian variables each, that does not factorise: it is sampled, to about 1e-4 of a logarithm. So
# is the product of the larger of two and of two others, of four variables, which the block has in
# closed form.
_SAMPLED = {"LSTM": 1e-3, "MaxPool": 1e-3}


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=pytest.mark.slow if block is blocks.LSTM else pytest.mark.medium)
        for block in blocks.ALL
    ],
    ids=lambda block: block.__name__,
)
def test_theory_of_a_program_with_a_block(block):
    sigma_b, name = 0.3, block.__name__
    n = block().width_in or _WIDTH
    network = Network(
        (
            Stage(blocks.Linear(n, 1.2, sigma_b)),
            Stage(block()),
            Stage(blocks.Dense("linear", _WIDTH, 1.1, sigma_b)),
        ),
        20,
        activations.tanh,
    )
    x = _inputs()
    theory, found = _read(network, x, sigma_b**2)
    assert theory.ends is None
    expected = float64.predict(network, x)
    worst = _largest(theory, expected, [0, len(found) - 1], [0, 2], _KEYS)
    assert worst < _SAMPLED.get(name, 1e-9)


def _normalised_over_the_batch(parameters, inputs):
    """Layers with BatchNorm as Flax writes it, and ReLU."""
    z = inputs @ parameters[0]
    for w in parameters[1:]:
        mean = z.mean(0, keepdims=True)
        variance = jnp.maximum(0, (z * z).mean(0, keepdims=True) - mean * mean)
        z = jax.nn.relu((z - mean) * jax.lax.rsqrt(variance + 1e-12)) @ w
    return z


@pytest.mark.medium
def test_batch_norm_that_is_written_out_is_that_of_the_block():
    x = np.asarray(jax.random.normal(jax.random.key(3), (8, 20)), np.float64)
    with jax.enable_x64(True):
        shapes = [(20, 100), (100, 100), (100, 100)]
        program = read(
            _normalised_over_the_batch,
            parameters=[jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes],
            inputs=jnp.asarray(x),
        )
    laws = {i: Law(0.0, 1 / program.avals[i].shape[0]) for i in program.arguments["parameters"]}
    theory = predict(program, layers(program), laws, [x])
    block = blocks.Chain((blocks.BatchNorm(), blocks.Dense("relu", 100)))
    network = Network((Stage(blocks.Linear(100)), Stage(block, 2)), 20, "relu")
    expected = float64.predict(network, x)
    assert theory.ends is None
    assert _largest(theory, expected, [0, 1, 2], [0, 1, 2], _KEYS) < 1e-9


def test_weights_and_their_transpose_end_the_theory():
    def autoencoder(parameters, inputs):
        return jnp.tanh(inputs @ parameters) @ parameters.T

    program = read(autoencoder, parameters=jnp.zeros((20, 100)), inputs=jnp.zeros((3, 20)))
    law = {program.arguments["parameters"][0]: Law(0.0, 0.05)}
    theory = predict(program, layers(program), law, [_inputs()[:3]])
    assert "two ways" in theory.ends
    assert np.isnan(theory.values["log_q"][1])
    assert np.isnan(theory.values["log_gradient_variance"]).all()


@pytest.mark.medium
def test_a_recurrent_layer_that_carries_nothing_beside_its_weights_is_one_of_fresh_weights():
    def recurrent(parameters, inputs):
        z = inputs @ parameters[0]
        for _ in range(3):
            z = jnp.tanh(z) @ parameters[1]
        return z

    shapes = [jnp.zeros((20, 100)), jnp.zeros((100, 100))]
    program = read(recurrent, parameters=shapes, inputs=jnp.zeros((3, 20)))
    numbers = program.arguments["parameters"]
    laws = {i: Law(0.0, 1.3 / n) for i, n in zip(numbers, (20, 100), strict=True)}
    theory = predict(program, layers(program), laws, [_inputs()[:3]])
    sigma = 1.3**0.5
    stages = Stage(blocks.Linear(100, sigma)), Stage(blocks.Dense("tanh", 100, sigma), 3, tied=True)
    expected = float64.predict(Network(stages, 20, "tanh"), _inputs()[:3])
    every = list(range(4))
    assert _largest(theory, expected, every, every, _KEYS) < 1e-9


@jax.custom_jvp
def _straight_through(x):
    return jnp.sign(x)


_straight_through.defjvp(lambda primals, tangents: (jnp.sign(primals[0]), 3 * tangents[0]))


@jax.custom_vjp
def _clipped(x):
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, g: (g / jnp.linalg.norm(g),))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("function", "slope"),
    [(_straight_through, 3.0), (lambda x: x + jax.lax.stop_gradient(jnp.sign(x) - x), 1.0)],
    ids=["custom_jvp", "stop_gradient"],
)
def test_a_derivative_that_is_given_is_that_of_gradients_alone(function, slope):
    theory = _of_plain(lambda p, x: function(x @ p[0]) @ p[2], _SHAPES[:3])
    np.testing.assert_allclose(theory.values["log_q"][1], np.log(1.3), rtol=1e-10)
    expected = 2 * np.log(slope) + np.log(1.3 / 100 * 10)
    found = np.exp(theory.values["log_gradient_variance"][0] - expected)
    np.testing.assert_allclose(found, 1, rtol=1e-9)


def test_a_derivative_that_is_no_function_of_elements_ends_the_theory():
    theory = _of_plain(lambda p, x: _clipped(x @ p[0]) @ p[2], _SHAPES[:3])
    assert "derivative" in theory.ends


@pytest.mark.medium
def test_a_function_that_jumps_is_not_integrated_by_parts():
    """E[(z + sign z)²] = q + 2√(2q/π) + 1, by draws: their own error is 1 % here, at most."""

    def network(p, x):
        z = x @ p[0]
        return (z + jnp.sign(z)) @ p[2]

    theory = _of_plain(network, _SHAPES[:3])
    q = 1.3 * (_inputs()[:3] ** 2).mean(1)
    expected = 1.3 * (q + 2 * np.sqrt(2 * q / np.pi) + 1).mean()
    np.testing.assert_allclose(np.exp(theory.values["log_q"][1]), expected, rtol=1e-2)


def _of_plain(function, shapes, zero=()):
    """The theory of a function of weights of variance 1.3/n, those of some numbers 0."""
    inputs = _inputs()[:3]
    shapes = [jnp.zeros(shape) for shape in shapes]
    program = read(function, parameters=shapes, inputs=jnp.asarray(inputs))
    laws = {
        number: Law(0.0, 0.0, values=np.zeros(w.shape)) if i in zero else Law(0.0, 1.3 / len(w))
        for i, (number, w) in enumerate(zip(program.arguments["parameters"], shapes, strict=True))
    }
    return predict(program, layers(program), laws, [inputs])


_SHAPES = [(20, 100), (100, 100), (100, 10), (1, 100)]


@pytest.mark.medium
def test_steps_are_averaged_between_their_jumps():
    theory = _of_plain(lambda p, x: jnp.round(x @ p[0]) @ p[1], _SHAPES[:2])
    q = 1.3 * (_inputs()[:3] ** 2).mean(1)
    ends = np.arange(-99, 100) + 0.5
    chances = np.diff(special.ndtr(ends / np.sqrt(q)[:, None]))
    second = (chances * np.arange(-98, 100) ** 2).sum(1)
    np.testing.assert_allclose(theory.values["log_q"][1], np.log(1.3 * second.mean()), rtol=1e-10)


@pytest.mark.parametrize(
    ("last", "zero", "gradients"),
    [
        (lambda p, _, h: jnp.tanh(h) @ p[2], 2, [0, 0, 1]),
        (lambda p, _, h: (jnp.tanh(h) * p[3]) @ p[2], 3, [0, 0, 1]),
        (lambda p, z, h: jnp.tanh(z + h * p[3]) @ p[2], 3, [1, 0, 1]),
        (lambda p, _, h: jnp.sign(h) @ p[2], None, [0, 0, 1]),
    ],
    ids=["weights", "scale", "residual", "sign"],
)
def test_gradients_of_0_are_known(last, zero, gradients):
    def network(p, inputs):
        z = inputs @ p[0]
        return last(p, z, jnp.tanh(z) @ p[1])

    theory = _of_plain(network, _SHAPES, (zero,))
    for key in ("log_gradient_variance", "log_gradient_norm"):
        np.testing.assert_array_equal(np.exp(theory.values[key]) > 0, gradients)
    assert "no gradient below" in theory.reasons[1]
    assert not theory.reasons[2]
