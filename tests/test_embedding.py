"""Embeddings of tokens and of places: what they compute, and their theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import compared

from gradflow import activations, builders
from gradflow.blocks import Chain, Convolution, Embedding, LayerNorm, Linear
from gradflow.comparison import Status
from gradflow.errors import InputError
from gradflow.kernels import Kernel
from gradflow.theory import mean_field

ROUNDING = 1e-5 if jnp.zeros(()).dtype == jnp.float32 else 1e-11
IDS = np.array([[0, 2, 0], [2, 2, 1]])


def one_hot(ids, vocabulary):
    return builders.as_sites(jax.nn.one_hot(jnp.asarray(ids), vocabulary))


def test_rows_of_two_tables(key):
    """E[ids] + P, with the tables that unit vectors give."""
    tables = []

    def multiply(key, x, *, sigma_w, width, distribution):  # noqa: ARG001
        table = jax.random.normal(key, (x.shape[1], width)) * sigma_w / x.shape[1] ** 0.5
        tables.append(table)
        return x @ table

    block = Embedding(5, 4, 3, 2.0, 0.5)
    found = block.apply(one_hot(IDS, 4), multiply, key)
    rows, places = tables
    expected = rows[IDS] + places[None]
    np.testing.assert_allclose(found, expected.reshape(6, 5), rtol=ROUNDING, atol=ROUNDING)
    assert block.shapes(4) == ((5, 4), (5, 3))


def test_second_moments_are_of_equal_tokens_and_of_equal_places():
    """σ² where ids are equal, and σ_p² where places are."""
    block = Embedding(5, 4, 3, 2.0, 0.5)
    gram = mean_field.input_gram(one_hot(IDS, 4))
    found = block.kernel(Kernel.of(gram)).covariance
    ids, places = IDS.reshape(-1), np.tile(np.arange(3), 2)
    expected = 4.0 * (ids[:, None] == ids) + 0.25 * (places[:, None] == places)
    np.testing.assert_allclose(found, expected, rtol=10 * ROUNDING, atol=10 * ROUNDING)
    assert block.mixes_sites
    assert not Embedding().mixes_sites


@pytest.mark.slow
def test_theory_meets_simulation():
    """300 networks; null and false alarms (1 %) as in the law tests."""
    network = builders.stack(
        4,
        [
            Embedding(200, 4, 3, 1.0, 0.7),
            Chain((LayerNorm(epsilon=1e-2), Convolution(activations.linear, (3,), 2, units=200))),
            Convolution(activations.erf, (3,), 3, "zeros", 200, 1.4, 0.1),
            Linear(100),
        ],
        "erf",
    )
    found = compared(network, np.asarray(one_hot(IDS, 4), np.float32), key=3, networks=300)
    assert not found.count(Status.DIFFERS), found.agreement
    assert np.isfinite(found.by_statistic["log_gradient_norm"].z).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: builders.stack(5, [Embedding(vocabulary=4)]),
            "an Embedding of 4 tokens gets 5 units; its signal is one-hot",
        ),
        (lambda: Embedding(tokens=0), "tokens is 0; it is a whole number of at least 1"),
        (
            lambda: Embedding(5, 4, 3, 1.0, 1.0).kernel(Kernel.of(jnp.eye(4))),
            "the signal has 4 sites",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()
