"""Averages that theory has by drawing units, against closed forms and against random networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow
from gradflow.inspection._theory import sampling
from gradflow.inspection._theory.nodes import of_function, variable
from gradflow.inspection._theory.sums import Field, NoRule, Piece, Sum

K = np.array([[1.0, 0.6, 0.1], [0.6, 2.0, -0.4], [0.1, -0.4, 0.5]])
TOP = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 0.7]])
DRAWS = 1 << 14


def function_of(f, *variables):
    piece = Piece(of_function(f, *map(variable, range(len(variables)))), variables, ())
    return Sum.of(piece, variables[0].sites)


def covariance(one, other):
    return one.covariance if one is other else None


def angles():
    root = np.sqrt(np.diagonal(K))
    return np.arccos(np.clip(K / np.outer(root, root), -1, 1)), np.outer(root, root)


def test_moments_of_a_rectified_field_are_those_of_cho_and_saul():
    """Null: the arc-cosine kernel. |z| < 5 at 9 numbers, of a fixed key."""
    z = Field(K, product=None)
    mean, second = sampling.moments(function_of(jax.nn.relu, Sum.of(z, 3)), covariance)
    angle, size = angles()
    exact = size * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    # The variance of φ_s φ_t is below E[z_s² z_t²] = q_s q_t + 2 k².
    error = np.sqrt((size**2 + 2 * K**2) / DRAWS)
    assert (np.abs(second - exact) < 5 * error).all()
    np.testing.assert_allclose(mean, np.sqrt(np.diagonal(K) / (2 * np.pi)), rtol=0.03)


def test_a_linear_function_has_its_moments_to_the_last_digit():
    """Draws are matched: their mean is 0 and their second moments are the field's."""
    z = Sum.of(Field(K), 3)
    mean, second = sampling.moments(function_of(lambda x: 3 * x, z).plus(z), covariance)
    np.testing.assert_allclose(mean, 0, atol=1e-13)
    np.testing.assert_allclose(second, 16 * K, rtol=1e-10)


def test_gradients_are_the_slope_s_second_moments_times_those_at_the_top(monkeypatch):
    """E[φ'_s φ'_t] = (π - angle)/2π of a rectifier; |z| < 5, of a fixed key."""
    monkeypatch.setattr(Field, "leads_down", True)
    z = Field(K)
    found = sampling.pulled(function_of(jax.nn.relu, Sum.of(z, 3)), TOP, covariance)[z]
    exact = TOP * (np.pi - angles()[0]) / (2 * np.pi)
    size = np.diagonal(TOP)
    error = np.sqrt((np.outer(size, size) + 2 * TOP**2) / DRAWS)
    assert (np.abs(found - exact) < 5 * error).all()


def test_tails_that_no_number_of_draws_averages_are_no_answer():
    """1/z has no second moment."""
    z = Field(K)
    with pytest.raises(NoRule, match="a few units"):
        sampling.moments(function_of(lambda x: 1 / x, Sum.of(z, 3)), covariance)


def normalised(h):
    axes = tuple(range(h.ndim - 1))
    centred = h - h.mean(axes, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)


def pooled_behind_batch_norm(p, x):
    """A sum of a pooled signal and one that BatchNorm has normalised, both behind BatchNorm."""
    h = jax.nn.relu(normalised(x @ p["a"]))
    h = h.reshape(8, 3, 2, -1).max(2)
    h = jax.nn.relu(h + normalised(h @ p["b"]))
    return h.mean(1) @ p["c"]


@pytest.mark.medium
def test_pooling_and_sums_behind_batch_norm_are_those_of_random_networks():
    """Null: the theory, with 5 % for what 64 units leave out (3 layers, 3/64) and for its draws.

    60 networks of one seed; |z| < 5 of nine numbers.
    """
    width = 64

    def init(key):
        a, b, c = jax.random.split(key, 3)
        return {
            "a": jax.random.normal(a, (5, width)),
            "b": jax.random.normal(b, (width, width)) / 8,
            "c": jax.random.normal(c, (width, width)) / 8,
        }

    x = jax.random.normal(jax.random.key(0), (8, 6, 5))
    found = gradflow.inspect(init, pooled_behind_batch_norm, x, networks=60, cure=False)
    for key in ("log_q", "log_gradient_variance", "log_weight_gradient_variance"):
        estimate, theory = found.estimates[key], found.theory.values[key]
        off = np.abs(estimate.log_value - theory)
        assert (off < 5 * estimate.log_standard_error + 0.05).all(), (key, off)


def classifier(p, x):
    return jax.nn.softmax(jax.nn.relu(x @ p["a"]) @ p["b"])


def cross_entropy(probabilities, labels):
    return -jnp.mean(jnp.log(probabilities[jnp.arange(4), labels]))


@pytest.mark.medium
@pytest.mark.parametrize("loss", [None, cross_entropy])
def test_gradients_come_down_through_a_softmax_and_a_loss(loss):
    """Null: the theory, with 5 % for its draws and 1/100 of the width. 100 networks of one seed.

    |z| < 5 of two layers' gradients by signals and by weights.
    """

    def init(key):
        a, b = jax.random.split(key)
        return {
            "a": 0.6 * jax.random.normal(a, (5, 100)),
            "b": 0.2 * jax.random.normal(b, (100, 7)),
        }

    found = gradflow.inspect(
        init,
        classifier,
        jax.random.normal(jax.random.key(0), (4, 5)),
        networks=100,
        loss=loss,
        targets=None if loss is None else np.array([3, 0, 0, 6]),
        cure=False,
    )
    for key in ("log_gradient_variance", "log_weight_gradient_variance"):
        estimate, theory = found.estimates[key], found.theory.values[key]
        off = np.abs(estimate.log_value - theory)
        assert (off < 5 * estimate.log_standard_error + 0.06).all(), (key, off)
    assert found.theory_ends == "theory reaches 2 of 2 layers"
