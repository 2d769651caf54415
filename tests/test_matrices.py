"""Matrices that are decided only as far as they are asked have the law of drawn ones."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import smallest_p_value

from gradflow import ensembles
from gradflow._norms import unit_rows
from gradflow.errors import InputError
from gradflow.simulation import _matrices

# Two-sample tests with 20 000 matrices a side. Null: one law of all answers. The false-alarm rate
# is for all the tests of one case together (Bonferroni), at fixed keys.
MATRICES = 20_000
FALSE_ALARM_RATE = 0.01
LAWS = {"gaussian": ensembles.gaussian, "orthogonal": ensembles.orthogonal}
ROUNDING = 2e-5  # of float32, in sums of a dozen terms of order 1


def make(sampler, law, shape, key, places=None):
    if sampler == "drawn":
        return _matrices.drawn(key, shape, LAWS[law])
    return _matrices.deferred(key, shape, LAWS[law], places=places)


def interview(matrix, shape, *, forget=False):
    """All answers to questions of which each depends on the answers before it, as one vector.

    Together they are more than the matrix has rows or columns: everything is revealed.
    """
    n_out, n_in = shape
    blank, said = matrix, []
    x = jnp.stack([jnp.ones(n_in), jnp.arange(n_in)]).astype(jnp.float32)
    for _ in range(3):
        answer, matrix = (blank if forget else matrix).times(x)
        y = jnp.tanh(answer[:1]) + answer[1:] ** 2 / n_in
        back, transpose = (blank.T if forget else matrix.T).times(y)
        matrix = transpose.T
        x = jnp.concatenate([jnp.cos(back), x[:1] + back / n_out])
        said += [answer.ravel(), back.ravel()]
    return jnp.concatenate(said)


def answers(sampler, law, shape, seed, **options):
    keys = jax.random.split(jax.random.key(seed), MATRICES)
    one = lambda key: interview(make(sampler, law, shape, key), shape, **options)  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(one))(keys))[:, ::2]  # half of them: tests go as its square


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    "shape", [*(pytest.param(s, marks=pytest.mark.slow) for s in [(3, 3), (4, 2)]), (2, 4)]
)
def test_an_interview_has_the_law_of_that_with_a_drawn_matrix(law, shape):
    drawn, deferred = (answers(s, law, shape, i) for i, s in enumerate(("drawn", "deferred")))
    assert smallest_p_value(drawn, deferred) > FALSE_ALARM_RATE


@pytest.mark.parametrize("law", LAWS)
def test_the_law_test_finds_a_matrix_that_forgets(law):
    drawn = answers("drawn", law, (3, 3), 0)
    wrong = answers("deferred", law, (3, 3), 1, forget=True)
    assert smallest_p_value(drawn, wrong) < 1e-6


@pytest.mark.medium
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7), (1, 3), (3, 1), (1, 1)])
def test_answers_are_those_of_one_matrix_until_all_of_it_is_revealed(law, shape):
    n_out, n_in = shape
    matrix = make("deferred", law, shape, jax.random.key(1))
    x, y = jax.random.normal(jax.random.key(2), (2, n_in)), jnp.ones((1, n_out))
    first, matrix = matrix.times(x)
    back, transpose = matrix.T.times(y)
    np.testing.assert_allclose(first @ y.T, x @ back.T, atol=ROUNDING * n_in)
    weights, matrix = transpose.T.times(jnp.eye(n_in))  # (n_in, n_out), row by row
    np.testing.assert_allclose(x @ weights, first, atol=ROUNDING * n_in)
    np.testing.assert_allclose(y @ weights.T, back, atol=ROUNDING * n_out)
    again, matrix = matrix.T.times(jnp.eye(n_out))
    np.testing.assert_allclose(again, weights.T, atol=ROUNDING)
    if law == "orthogonal":
        small = weights @ weights.T if n_in <= n_out else weights.T @ weights
        np.testing.assert_allclose(small, max(shape) * np.eye(min(shape)), atol=1e-4)


def asked_and_asked_back(matrix, more=0):
    """Answers to three rounds of two questions and one back, which do not depend on answers.

    In an interview rounding would grow from round to round.
    """
    said = []
    for key in jax.random.split(jax.random.key(7), 3):
        answer, matrix = matrix.times(jax.random.normal(key, (2, 11), jnp.float32))
        back, transpose = matrix.T.times(jax.random.normal(key, (1, 12), jnp.float32))
        matrix = transpose.T.with_places(more)
        said += [answer.ravel(), back.ravel()]
    return jnp.concatenate(said)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_a_fixed_number_of_places_gives_the_same_answers(law):
    key, shape = jax.random.key(0), (12, 11)
    growing = asked_and_asked_back(make("deferred", law, shape, key))
    fixed = asked_and_asked_back(make("deferred", law, shape, key, places=(6, 3)))
    np.testing.assert_allclose(fixed, growing, atol=ROUNDING * 11)
    # More places where some are left, and, in the second, where all are used: on one side or both.
    more = make("deferred", law, shape, key, places=(3, 0)).with_places(3)
    np.testing.assert_allclose(asked_and_asked_back(more), growing, atol=ROUNDING * 11)
    few = make("deferred", law, shape, key, places=(2, 1))
    np.testing.assert_allclose(asked_and_asked_back(few, 2), growing, atol=ROUNDING * 11)


@pytest.mark.parametrize("law", LAWS)
def test_without_a_place_left_the_answer_is_an_error_or_nan(law):
    matrix = make("deferred", law, (4, 4), jax.random.key(0), places=(1, 1))
    places = {"gaussian": 1, "orthogonal": 2}[law]  # one store for both sides
    x = jnp.ones((3, 4), jnp.float32)
    with pytest.raises(InputError, match="places is .* made 3 products"):
        matrix.times(x)
    with pytest.raises(InputError, match="places is .* made 3 products"):
        jax.jit(lambda m: m.times(x)[0])(matrix)

    @jax.jit
    def ask(matrix):
        return matrix.times(x[:1])

    for _ in range(places):
        answer, matrix = ask(matrix)
        assert np.isfinite(answer).all()
    assert np.isnan(ask(matrix)[0]).all()


def test_other_laws_cannot_be_deferred():
    with pytest.raises(InputError, match="'matrix_free' cannot draw 'uniform' weights"):
        _matrices.deferred(jax.random.key(0), (3, 3), ensembles.uniform)


@pytest.mark.medium
def test_a_matrix_is_a_pytree_that_scans_and_vmaps():
    def ask(matrix, x):
        answer, matrix = matrix.times(x[None])
        return matrix, answer[0]

    xs = jax.random.normal(jax.random.key(0), (5, 4), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 3)
    several = eqx.filter_vmap(lambda key: make("deferred", "gaussian", (6, 4), key, (5, 0)))(keys)
    _, scanned = jax.vmap(lambda m: jax.lax.scan(ask, m, xs))(several)
    for key, found in zip(keys, scanned, strict=True):
        matrix, one = make("deferred", "gaussian", (6, 4), key, (5, 0)), []
        for x in xs:
            matrix, answer = ask(matrix, x)
            one.append(answer)
        np.testing.assert_allclose(found, jnp.stack(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]],
        [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
        [[1.0, 0.0, 0.0], [1.0, 1e-4, 0.0]],
        [[1e-30, 0.0, 0.0], [0.0, 1e30, 1e30]],
    ],
    ids=["repeated", "zero", "nearly parallel", "ill scaled"],
)
@pytest.mark.parametrize("known", [None, [[0.0, 0.6, 0.8], [0.0, 0.0, 0.0]]])
def test_orthonormal_rows_span_the_rows_and_are_orthonormal_or_zero(rows, known):
    x = jnp.asarray(rows, jnp.float32)
    known = None if known is None else jnp.asarray(known, jnp.float32)
    q = _matrices.orthonormal_rows(x, known)
    every = q if known is None else jnp.concatenate([q, known])
    gram = np.asarray(every @ every.T)
    np.testing.assert_allclose(gram, np.diag(np.diag(gram).round()), atol=1e-6)
    unit, _ = unit_rows(x)
    np.testing.assert_allclose(np.asarray(unit @ every.T) @ np.asarray(every), unit, atol=1e-6)


@pytest.mark.medium
@pytest.mark.parametrize("n", [4, 5, 6])
def test_rows_stay_orthonormal_while_the_space_fills_up(n):
    """Ten rows, four at a time, in fewer dimensions: as many are left as there are dimensions."""
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), 3)
        rows = jnp.zeros((12, n), jnp.float32)
        for place, count, key in zip((0, 2, 6), (2, 4, 4), keys, strict=True):
            x = jax.random.normal(key, (count, n), jnp.float32)
            rows = rows.at[place : place + count].set(_matrices.orthonormal_rows(x, rows))
        np.testing.assert_allclose(rows.T @ rows, np.eye(n), atol=1e-5)


def test_one_row_is_orthogonalised_like_several():
    known = _matrices.orthonormal_rows(jax.random.normal(jax.random.key(0), (3, 8)))
    x = jax.random.normal(jax.random.key(1), (2, 8))
    one = functools.partial(_matrices.orthonormal_rows, known=known)
    np.testing.assert_allclose(one(x[:1]), one(x)[:1], atol=1e-6)
