"""Averages of functions of several Gaussian variables against closed forms and other theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from gradflow.errors import InputError
from gradflow.inspection._theory.expectations import SiteAverages, expectation, independent
from gradflow.inspection._theory.pieces import expanded, functions

COVARIANCE = np.array([[2.0, 0.7], [0.7, 1.0]])


def arc_cosine(k):
    """E[relu(u) relu(v)] (Cho & Saul 2009, eq. 6)."""
    root = np.sqrt(k[0, 0] * k[1, 1])
    angle = np.arccos(k[0, 1] / root)
    return root * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)


def relus(u, v):
    return jax.nn.relu(u) * jax.nn.relu(v)


def erfs(u, v):
    return jax.scipy.special.erf(u) * jax.scipy.special.erf(v)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda u, v: u**2 * v**2, 2.0 + 2 * 0.7**2),  # Isserlis
        (relus, arc_cosine(COVARIANCE)),
        (erfs, 2 / np.pi * np.arcsin(2 * 0.7 / np.sqrt(5 * 3))),  # Williams 1997
        (lambda u, v: jnp.exp(u) * v, 0.7 * np.exp(1)),
    ],
)
def test_pairs_have_their_closed_forms(f, expected):
    value, error = expectation(f, COVARIANCE)
    assert abs(value - expected) <= max(error, 1e-14)
    assert error < 1e-12


def test_one_variable_with_kinks_that_nobody_named():
    """E[min(max(z, -1), 0.3)²], z ~ N(0.2, q), from the normal's moments over three intervals."""
    q = np.array([0.01, 1.0, 900.0])
    value, error = expectation(
        lambda z: jnp.clip(z, -1.0, 0.3) ** 2, q[:, None, None], np.full((3, 1), 0.2)
    )
    for i in range(3):
        law = norm(0.2, np.sqrt(q[i]))
        inside = law.expect(np.square, lb=-1, ub=0.3, epsabs=1e-14, points=[0.2])
        assert value[i] == pytest.approx(inside + law.cdf(-1) + 0.09 * law.sf(0.3), rel=1e-10)
    assert (error < 1e-10).all()


def test_a_singular_covariance_and_numbers_that_differ_between_averages():
    both = np.broadcast_to(np.ones((2, 2)), (2, 2, 2))
    value, _ = expectation(lambda u, v, s: s * relus(u, v), both, known=[np.array([1.0, 3.0])])
    np.testing.assert_allclose(value, [0.5, 1.5], rtol=1e-12)


def test_many_variables_are_sampled_within_the_stated_error():
    """Six variables of rank three: each of 12 averages is within 5 of its standard errors.

    Null: errors of 8 replicates are Student's with 7 degrees of freedom; P(|t| > 5) = 0.0016 each,
    a false alarm in 0.02 of all keys. The seeds are fixed.
    """
    rng = np.random.default_rng(0)
    a = rng.normal(size=(12, 6, 3)) / 2
    c = a @ np.swapaxes(a, 1, 2)
    value, error = expectation(lambda *z: z[0] ** 2 * z[5] ** 2, c)
    exact = c[:, 0, 0] * c[:, 5, 5] + 2 * c[:, 0, 5] ** 2
    assert (abs(value - exact) < 5 * error).all()
    assert (error < 0.01 * exact).all()


def test_gates_are_products_of_averages_of_one_variable():
    def cell(f, c, i, g):
        return jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)

    (read,), _ = functions(cell, 4)
    terms = expanded(read, range(4))
    assert [sorted(map(sorted, term)) for term in terms] == [[[0], [1]], [[2], [3]]]
    # What is correlated is not taken apart.
    terms = expanded(read, (0, 0, 1, 2))
    assert [sorted(map(sorted, term)) for term in terms] == [[[0]], [[1], [2]]]


def test_second_moments_of_a_gated_sum_are_those_of_its_parts():
    k = np.array([[1.0, 0.5], [0.5, 2.0]])

    def cell(f, c, i, g):
        return jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)

    averages = SiteAverages(independent(k, k, k, k))
    read = averages.read(cell)
    second, error = averages.second(read, read)

    def pair(phi):
        return expectation(lambda u, v: phi(u) * phi(v), k)[0]

    gate = pair(jax.nn.sigmoid)
    assert second[0, 1] == pytest.approx(gate * 0.5 + gate * pair(jnp.tanh), rel=1e-11)
    assert averages.mean(read)[0] == pytest.approx(np.zeros(2), abs=1e-13)
    assert (error < 1e-10).all()


def test_a_square_of_a_sum_keeps_its_cross_terms():
    """(u + v)², u and v independent: E = q_u + q_v; E of its square is 3 (q_u + q_v)²."""
    k = np.full((1, 1), 2.0)
    averages = SiteAverages(independent(k, 3 * k))
    read = averages.read(lambda u, v: (u + v) ** 2)
    assert averages.mean(read)[0] == pytest.approx(8.0, rel=1e-12)
    assert averages.second(read, read)[0] == pytest.approx(192.0, rel=1e-12)


@pytest.mark.parametrize(
    ("covariance", "mean", "message"),
    [
        (np.ones(3), None, r"covariance has the shape \(3,\)"),
        (np.eye(2), np.ones(3), r"mean has the shape \(3,\)"),
        (-np.eye(1), None, "variance of -1"),
        (np.full((1, 1), np.nan), None, "variances are finite"),
    ],
)
def test_what_is_no_covariance_is_refused(covariance, mean, message):
    with pytest.raises(InputError, match=message):
        expectation(lambda *z: z[0], covariance, mean)
