"""The two samplers have one law: of everything, jointly, where finite-width effects are large."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import smallest_p_value

from gradflow import builders, ensembles, statistics
from gradflow.errors import InputError
from gradflow.simulation import _samplers, monte_carlo, propagation

# Two-sample Kolmogorov-Smirnov tests with 20 000 networks a side. Null: one law. The false-alarm
# rate is for all the tests of one case together (Bonferroni), at fixed keys.
NETWORKS = 20_000
FALSE_ALARM_RATE = 0.01
WANTED = (
    *(statistics.q, statistics.activation_mean, statistics.correlation),
    *(statistics.log_gradient_norm, statistics.weight_gradient_variance),
)
# Widths of a dozen: the relative spread between networks is of order one.
# Each shape of matrix that is another program, once: wider, narrower, as wide.
SQUARE = (12,) * 7
RECTANGULAR = (5, 12, 8, 8)

CASES = [
    ("tanh", 1, SQUARE, "gaussian"),
    pytest.param("relu", 3, RECTANGULAR, "gaussian", marks=pytest.mark.slow),
    pytest.param("tanh", 2, RECTANGULAR, "orthogonal", marks=pytest.mark.slow),
    pytest.param("relu", 1, SQUARE, "gaussian", marks=pytest.mark.slow),
    pytest.param("tanh", 3, RECTANGULAR, "gaussian", marks=pytest.mark.slow),
    pytest.param("logistic", 3, SQUARE, "gaussian", marks=pytest.mark.slow),
    pytest.param("selu", 3, SQUARE, "gaussian", marks=pytest.mark.slow),
    pytest.param("sin", 1, RECTANGULAR, "gaussian", marks=pytest.mark.slow),
    pytest.param("linear", 3, RECTANGULAR, "gaussian", marks=pytest.mark.slow),
    pytest.param("relu", 3, (3, 4, 4, 3, 5), "orthogonal", marks=pytest.mark.slow),
    pytest.param("erf", 1, SQUARE, "orthogonal", marks=pytest.mark.slow),
]


def features(network, inputs, sampler, key):
    """Per-network values of everything at every layer, shape (networks, features)."""
    result = monte_carlo.simulate(
        network,
        inputs,
        key=key,
        networks=NETWORKS,
        sampler=sampler,
        wanted=WANTED,
        keep_samples=True,
    )
    return np.concatenate(list(result.samples.values()), axis=1)


def inputs_of(sites, width):
    return jax.random.normal(jax.random.key(7), (sites, width), jnp.float32)


@pytest.mark.medium
@pytest.mark.parametrize(("activation", "sites", "widths", "weights"), CASES)
def test_dense_and_matrix_free_have_the_same_joint_law(activation, sites, widths, weights):
    network = builders.mlp(widths, activation, ensembles.fan_in(1.5, weights), sigma_b=0.3)
    x = inputs_of(sites, widths[0])
    drawn = features(network, x, "dense", key=3)
    free = features(network, x, "matrix_free", key=4)
    assert smallest_p_value(drawn, free) > FALSE_ALARM_RATE


def forgetful(key, x, tap, *, sigma_w, width, distribution):
    """Wrong: the pull-back draws new weights, and forgets what the way up has seen of them."""
    del distribution
    up, down = jax.random.split(key)
    return sigma_w / x.shape[1] ** 0.5 * forgetful_product(width, up, down, x, tap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def forgetful_product(width, up, down, x, tap):
    del down, tap
    return x @ jax.random.normal(up, (width, x.shape[1]), x.dtype).T


def forgetful_backward(width, residual, delta):
    down, x = residual
    weights = jax.random.normal(down, (width, x.shape[1]), x.dtype)
    return None, None, delta @ weights, (delta @ delta.T) * (x @ x.T)


forgetful_product.defvjp(
    lambda width, up, down, x, tap: (forgetful_product(width, up, down, x, tap), (down, x)),
    forgetful_backward,
)


@pytest.mark.medium
def test_the_law_test_finds_a_sampler_that_forgets(monkeypatch):
    monkeypatch.setitem(_samplers.SAMPLERS, "forgetful", forgetful)
    network = builders.mlp(SQUARE, "tanh", ensembles.fan_in(1.7))
    x = inputs_of(1, SQUARE[0])
    drawn = features(network, x, "dense", key=1)
    wrong = features(network, x, "forgetful", key=2)
    # The negative control must be found beyond any doubt.
    assert smallest_p_value(drawn, wrong) < 1e-6


@pytest.mark.parametrize(("sites", "sigma_w"), [(1, 1.3), (3, 1.3), (3, 0.0), (3, 1e-30)])
def test_taps_sum_to_the_squared_norm_of_the_weight_gradient(sites, sigma_w):
    """That is Δᵀx whatever the weights are: also of weights that start at 0."""
    x, delta = inputs_of(sites, 5), inputs_of(sites, 7)
    law = {"sigma_w": sigma_w, "width": 7, "distribution": ensembles.gaussian}
    truth = np.sum((np.asarray(delta).T @ np.asarray(x)) ** 2)
    for sampler in _samplers.SAMPLERS.values():
        out, pull = jax.vjp(
            functools.partial(sampler, jax.random.key(0), **law),
            x,
            jnp.zeros((sites, sites), x.dtype),
        )
        below, tap = pull(delta)
        np.testing.assert_allclose(tap.sum(), truth, rtol=1e-5)
        assert (jnp.abs(out).max() > 0) == (jnp.abs(below).max() > 0) == (sigma_w > 0)


def test_dense_pulls_back_through_the_weights_it_drew():
    x, delta = inputs_of(2, 5), inputs_of(2, 7)
    multiply = functools.partial(
        _samplers.dense,
        jax.random.key(3),
        sigma_w=1.0,
        width=7,
        distribution=ensembles.uniform,
    )
    tap = jnp.zeros((2, 2), x.dtype)
    weights = multiply(jnp.eye(5, dtype=x.dtype), jnp.zeros((5, 5), x.dtype)).T
    # The identity's fan-in is x's, so that the same weights are drawn.
    out, pull = jax.vjp(multiply, x, tap)
    np.testing.assert_allclose(out, x @ weights.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull(delta)[0], delta @ weights, rtol=1e-5, atol=1e-6)


def test_matrix_free_answers_are_those_of_one_matrix():
    """Δ·(W x) computed on the way up equals (Δ W)·x on the way down, for the same W."""
    x, delta = inputs_of(3, 11), inputs_of(3, 6)
    multiply = functools.partial(
        _samplers.matrix_free,
        jax.random.key(3),
        sigma_w=1.0,
        width=6,
        distribution=ensembles.gaussian,
    )
    out, pull = jax.vjp(multiply, x, jnp.zeros((3, 3), x.dtype))
    np.testing.assert_allclose(delta @ out.T, pull(delta)[0] @ x.T, rtol=1e-4, atol=1e-5)


def test_repeated_inputs_get_one_answer():
    x = jnp.concatenate([inputs_of(1, 8)] * 2)
    out = _samplers.matrix_free(
        jax.random.key(0),
        x,
        jnp.zeros((2, 2), x.dtype),
        sigma_w=1.0,
        width=5,
        distribution=ensembles.gaussian,
    )
    np.testing.assert_allclose(out[0], out[1], rtol=1e-6)


def test_matrix_free_refuses_weights_that_are_not_gaussian():
    network = builders.mlp((4, 4), "tanh", "standard")
    with pytest.raises(InputError, match="'matrix_free' cannot draw 'uniform'"):
        _samplers.choose("matrix_free", network)
    with pytest.raises(InputError, match="'matrix_free' cannot draw 'uniform'"):
        propagation.propagate(network, jnp.ones((1, 4)), jax.random.key(0), sampler="matrix_free")
    assert _samplers.choose("auto", network)[0] == "dense"
    assert _samplers.choose("auto", builders.mlp((4, 4)))[0] == "matrix_free"


def test_many_inputs_are_faster_with_weights():
    network = builders.mlp([512] * 4)
    for sites, expected in [(1, "matrix_free"), (16, "matrix_free"), (256, "dense")]:
        chosen, why = _samplers.choose("auto", network, sites)
        assert chosen == expected
        assert "of the operations" in why
    orthogonal = builders.mlp([512] * 4, "tanh", ensembles.glorot.drawn_from("orthogonal"))
    assert _samplers.choose("auto", orthogonal, 256)[0] == "matrix_free"
    x = jax.random.normal(jax.random.key(0), (40, 64))
    result = monte_carlo.simulate(builders.mlp([64, 64]), x, networks=2)
    assert (result.sampler, result.reason) == _samplers.choose("auto", builders.mlp([64, 64]), 40)
    assert result.sampler == "dense"


def test_an_unknown_sampler_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'matrix_free'"):
        _samplers.choose("matrixfree", builders.mlp((4, 4)))
