"""Pooling: what it computes, and averages of the largest of Gaussian signals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import compared
from scipy.special import ndtr

from gradflow import activations, builders
from gradflow.blocks import (
    Activate,
    AveragePool,
    Chain,
    Convolution,
    Dense,
    Gated,
    GlobalMean,
    Linear,
    MaxPool,
    Residual,
    Upsample,
)
from gradflow.comparison import Status
from gradflow.errors import InputError, NoTheory
from gradflow.gaussian import _largest
from gradflow.kernels import Kernel
from gradflow.theory import mean_field

ROUNDING = 1e-5 if jnp.zeros(()).dtype == jnp.float32 else 1e-11
KINDS = {
    "next to each other": ((6,), {"size": 2}, "VALID", 2),
    "overlapping": ((7, 6), {"size": 3, "stride": 2, "padding": "zeros"}, "SAME", 2),
    "PyTorch's padding": ((6,), {"size": 3, "stride": 2, "padding": 1}, [(1, 1)], 2),
    "unequal": ((4, 6), {"size": (2, 3)}, "VALID", (2, 3)),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def no_product(*_, **__):
    raise AssertionError("has no random matrix")


@kinds
def test_they_are_the_windows_of_jax(kind, key):
    shape, given, padding, strides = kind
    images = jax.random.normal(key, (2, *shape, 3))
    x = builders.as_sites(images)

    def windows(start, function):
        sizes, steps = (
            (1, *(n if isinstance(n, tuple) else (n,) * len(shape)), 1)
            for n in (given["size"], strides)
        )
        pads = padding if isinstance(padding, str) else [(0, 0), *padding, (0, 0)]
        out = jax.lax.reduce_window(images, start, function, sizes, steps, pads)
        return builders.as_sites(out), np.prod(sizes)

    total, elements = windows(0.0, jax.lax.add)
    found = AveragePool(shape, **given).apply(x, no_product, key)
    np.testing.assert_allclose(found, total / elements, rtol=ROUNDING, atol=ROUNDING)
    largest, _ = windows(-np.inf, jax.lax.max)
    block = MaxPool(shape, **given, activation="tanh")
    np.testing.assert_allclose(
        block.apply(x, no_product, key), jnp.tanh(largest), rtol=ROUNDING, atol=ROUNDING
    )
    assert len(largest) * block.pool_factor == len(x)


@kinds
def test_moments_of_means_are_those_of_their_units(kind, key):
    """Brute force, of given signals."""
    shape, given, *_ = kind
    block = AveragePool(shape, **given)
    signal = 0.5 + jax.random.normal(key, (2 * int(np.prod(shape)), 7))
    gram = mean_field.input_gram(signal)
    merged = block.apply(signal, no_product, key)
    found = block.kernel(Kernel(gram, signal.mean(axis=1), gram))
    for values in (found.covariance, found.tangent):
        expected = mean_field.input_gram(merged)
        np.testing.assert_allclose(values, expected, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(found.mean, merged.mean(axis=1), rtol=ROUNDING, atol=ROUNDING)
    assert found.gaussian
    whole = AveragePool(shape, shape).kernel(Kernel.of(gram, tangent=gram))
    np.testing.assert_allclose(
        whole.covariance, GlobalMean(shape).kernel(Kernel.of(gram)).covariance, rtol=ROUNDING
    )


def test_upsampling_is_that_of_the_nearest(key):
    images = jax.random.normal(key, (2, 2, 3, 4))
    block = Upsample((2, 3), (2, 1))
    out = block.apply(builders.as_sites(images), no_product, key)
    np.testing.assert_array_equal(out, builders.as_sites(jnp.repeat(images, 2, axis=1)))
    x = builders.as_sites(images)
    gram = mean_field.input_gram(x)
    found = block.kernel(Kernel(gram, x.mean(axis=1), gram))
    expected = mean_field.input_gram(out)
    for values in (found.covariance, found.tangent):
        np.testing.assert_allclose(values, expected, rtol=ROUNDING, atol=ROUNDING)
    assert len(out) * block.pool_factor == len(x)


def excitation(shape, units):
    """Squeeze-and-excitation of a signal: a gate of its mean over positions."""
    squeeze = (GlobalMean(shape), Linear(units // 2), Dense(activations.relu, units, 2.0))
    one = (1,) * len(shape)
    spread = (Activate(activations.logistic), Upsample(one, shape))
    return Gated(Chain(()), Chain((*squeeze, *spread)))


def covariance(sites, seed=0):
    root = np.random.default_rng(seed).normal(size=(sites, 2 * sites))
    return root @ root.T / (2 * sites) + 0.2


def test_the_larger_of_two_in_closed_form():
    """Clark 1961: E max = a φ(0), E max² = (σ₁² + σ₂²)/2 of mean 0, a² = σ₁² + σ₂² - 2 cov.

    Of two windows: beside 10⁶ draws in NumPy; null: the closed form. Standard errors of the means
    of products are about 1.5e-3 and 1e-3; five of them.
    """
    k, s = covariance(4), covariance(4, 1)
    members = np.array([[0, 1], [2, 3], [1, -1]])
    second, mean, moved = _largest.averages(
        activations.linear, jnp.asarray(k), jnp.asarray(s), members
    )
    a2 = k[0, 0] + k[1, 1] - 2 * k[0, 1]
    np.testing.assert_allclose(mean[0], np.sqrt(a2 / (2 * np.pi)), rtol=10 * ROUNDING)
    np.testing.assert_allclose(second[0, 0], (k[0, 0] + k[1, 1]) / 2, rtol=10 * ROUNDING)
    np.testing.assert_allclose([second[2, 2], moved[2, 2], mean[2]], [k[1, 1], s[1, 1], 0])
    z = np.random.default_rng(1).multivariate_normal(np.zeros(4), k, 1_000_000)
    drawn = np.maximum(z[:, 0], z[:, 1]), np.maximum(z[:, 2], z[:, 3])
    np.testing.assert_allclose(np.mean(drawn[0] * drawn[1]), second[0, 1], atol=7.5e-3)
    chosen = np.argmax(z[:, :2], 1), 2 + np.argmax(z[:, 2:], 1)
    np.testing.assert_allclose(np.mean(s[chosen]), moved[0, 1], atol=5e-3)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("size", "mean", "variance"),
    [(4, 1.0293753730039641, 0.4917152368747322), (9, 1.4850131622092370, 0.3573533264)],
)
def test_the_largest_of_independent_ones(size, mean, variance):
    """Order statistics of a normal sample (Teichroew 1956, Ann. Math. Statist. 27, 410)."""
    members = np.arange(2 * size).reshape(2, size)
    second, means, moved = _largest.averages(
        activations.linear, jnp.eye(2 * size), jnp.eye(2 * size), members
    )
    np.testing.assert_allclose(means, mean, rtol=1e-3)
    np.testing.assert_allclose(jnp.diagonal(second), mean**2 + variance, rtol=1e-3)
    np.testing.assert_allclose(second[0, 1], mean**2, rtol=1e-3)
    np.testing.assert_allclose(moved, np.eye(2), atol=1e-3)


@pytest.mark.medium
def test_points_and_the_closed_form_agree():
    """Windows of two, to what is said of the points; also at the edge."""
    k, s = covariance(6), covariance(6, 1)
    members = np.array([[0, 1], [2, 3], [4, 5], [1, 2], [3, -1]])
    given = (activations.linear, jnp.asarray(k), jnp.asarray(s))
    exact = _largest.averages(*given, members)
    there = members >= 0
    points = _largest._over_points(*given, (np.where(there, members, 3), there))
    for one, other in zip(exact, points, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3 * np.trace(k) / 6)


@pytest.mark.medium
def test_the_largest_relu_is_that_of_a_window_with_zero():
    """max(φ(x), φ(y)) = max(x, y, 0), of independent x and y, by the trapezoid rule in NumPy."""
    second, mean, _ = _largest.averages(activations.relu, jnp.eye(2), None, np.array([[0, 1]]))
    # P(max > t) = 1 - Φ(t)²: E = ∫_0^∞ (1 - Φ²) dt, E max² = 2 ∫_0^∞ t (1 - Φ²) dt.
    t = np.linspace(0, 12, 200_001)
    tail = 1 - ndtr(t) ** 2
    np.testing.assert_allclose(mean[0], np.trapezoid(tail, t), rtol=1e-3)
    np.testing.assert_allclose(second[0, 0], np.trapezoid(2 * t * tail, t), rtol=1e-3)


NETWORKS = {
    "average": lambda: builders.stack(
        2,
        [
            Convolution(activations.linear, (8,), 3, "zeros", 200),
            Chain((Activate(activations.tanh), AveragePool((8,)), Linear(200, 1.5, 0.2))),
            Chain((AveragePool((4,), 3, 2, "zeros"), Activate(activations.tanh), Linear(200))),
            Convolution(activations.tanh, (2,), 2, units=100),
        ],
    ),
    "squeeze and excitation": lambda: builders.stack(
        2,
        [
            Convolution(activations.linear, (4,), 3, "zeros", 200),
            (
                Residual(
                    Chain(
                        (
                            Convolution(activations.relu, (4,), 3, "zeros", 200, 1.2),
                            excitation((4,), 200),
                            Linear(200, 2.0),
                        )
                    )
                ),
                2,
            ),
            Chain((Upsample((4,)), Convolution(activations.relu, (8,), 3, "zeros", 100))),
        ],
        "relu",
    ),
    "largest": lambda: builders.stack(
        2,
        [
            Convolution(activations.linear, (8,), 3, "circular", 200),
            Chain((MaxPool((8,)), Linear(200))),
            Chain((MaxPool((4,), 3, 1, "zeros", "relu"), Linear(200, 1.2))),
            Chain((MaxPool((4,), 2, None, "valid", "tanh"), Linear(100))),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_theory_meets_simulation(make):
    """300 networks; null and false alarms (1 %) as in the law tests."""
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    found = compared(make(), x, key=3, networks=300)
    assert not found.count(Status.DIFFERS), found.agreement
    assert np.isfinite(found.by_statistic["log_gradient_norm"].z).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxPool((2,), 2, 2, 2), r"padding is 2; it makes a window of size 2 of nothing"),
        (lambda: AveragePool((2,), 3), "size is 3; it is one whole number"),
        (lambda: Upsample((2, 2), (2,)), r"factor is \(2,\); it is one whole number, or one for"),
        (
            lambda: Gated(Chain(()), Chain((GlobalMean((2,)), Linear(100)))),
            "a gated layer's value makes one site of 1, and its gate of 2",
        ),
        (
            lambda: Chain((Activate(), MaxPool())).kernel(Kernel.of(jnp.eye(6))),
            "MaxPool gets a signal that is not Gaussian over units",
        ),
        (
            lambda: MaxPool((64, 64), 3).kernel(Kernel.of(jnp.eye(64 * 64))),
            "max pooling is over 441 windows of 9 signals",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises((InputError, NoTheory), match=message):
        make()
