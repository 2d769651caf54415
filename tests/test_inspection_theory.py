"""The theory of a program that is read, beside `theory.mean_field` of the network it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations, blocks
from gradflow.inspection._laws import Law
from gradflow.inspection._layers import layers
from gradflow.inspection._reading import read
from gradflow.inspection._walk import predict
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


@pytest.mark.parametrize("block", blocks.ALL, ids=lambda block: block.__name__)
def test_theory_of_a_program_with_a_block(block):
    sigma_b = 0.3
    network = Network(
        (
            Stage(blocks.Linear(_WIDTH, 1.2, sigma_b)),
            Stage(block()),
            Stage(blocks.Dense("linear", _WIDTH, 1.1, sigma_b)),
        ),
        20,
        activations.tanh,
    )
    x = _inputs()
    theory, found = _read(network, x, sigma_b**2)
    if theory.ends:
        pytest.fail(theory.ends)
    expected = float64.predict(network, x)
    assert _largest(theory, expected, [0, len(found) - 1], [0, 2], _KEYS) < 1e-9
