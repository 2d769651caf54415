"""Paths side by side: concatenated, as in DenseNet and U-Net, and added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import compared

from gradflow import activations, builders
from gradflow.blocks import (
    Activate,
    AveragePool,
    BatchNorm,
    Chain,
    Concatenate,
    Convolution,
    Dense,
    LayerNorm,
    Linear,
    Residual,
    RMSNorm,
    Sum,
)
from gradflow.comparison import Status
from gradflow.errors import InputError, NoTheory
from gradflow.kernels import Kernel
from gradflow.theory import mean_field
from gradflow.theory._backward import log_gain

ROUNDING = 1e-5 if jnp.zeros(()).dtype == jnp.float32 else 1e-11
K = np.array([[1.0, 0.5], [0.5, 2.0]])
IDENTITY = Chain(())


def multiply(key, x, *, width, **law):  # noqa: ARG001
    return x @ jax.random.normal(key, (x.shape[1], width), x.dtype)


def test_what_they_compute(key):
    x = jax.random.normal(key, (3, 4))
    paths = (IDENTITY, Linear(2), Activate())
    f = Linear(2).apply(x, multiply, jax.random.fold_in(key, 1))
    found = Concatenate(paths, 4).apply(x, multiply, key)
    np.testing.assert_array_equal(found, jnp.concatenate([x, f, jnp.tanh(x)], axis=1))
    found = Sum((IDENTITY, Activate())).apply(x, multiply, key)
    np.testing.assert_array_equal(found, x + jnp.tanh(x))
    assert Concatenate(paths, 4).width_after(4) == 10
    assert Concatenate((Linear(2), Dense(units=3)), 4).shapes(4) == ((2, 4), (3, 4))
    assert Concatenate(paths, 4).divide_widths(2).width_after(2) == 5


def test_second_moments_are_in_the_shares_of_units():
    """[z; W z; φ(V z)] of 4, 6 and 10 units, then a product: by hand, and its gradient."""
    paths = (IDENTITY, Linear(6, 1.3), Chain((Linear(10, 0.8), Activate(activations.erf))))
    block = Concatenate(paths, 4)
    kernel = Kernel.of(jnp.asarray(K))
    last = paths[2].kernel(kernel).covariance
    expected = (4 * K + 6 * 1.69 * K + 10 * last) / 20
    found = block.kernel(kernel)
    np.testing.assert_allclose(found.covariance, expected, rtol=10 * ROUNDING)
    gains = [np.exp(log_gain(path, kernel)) for path in paths]
    after = np.exp(log_gain(Chain((block, Linear(9, 1.1))), kernel))
    np.testing.assert_allclose(
        after, 1.21 * (4 * gains[0] + 6 * gains[1] + 10 * gains[2]) / 20, rtol=10 * ROUNDING
    )


def test_an_activation_acts_on_each_kind_of_unit():
    """φ of units that have q of 1 and of 4 is no φ of units of 2.5."""
    block = Concatenate((IDENTITY, Linear(100, 2.0)))
    kernel = Kernel.of(jnp.asarray(K))
    found = Chain((block, Activate(activations.erf))).kernel(kernel)
    each = [Kernel.of(s * jnp.asarray(K)).through("erf").covariance for s in (1.0, 4.0)]
    np.testing.assert_allclose(found.covariance, (each[0] + each[1]) / 2, rtol=10 * ROUNDING)
    gain = np.exp(log_gain(Chain((block, Dense(activations.erf, 9))), kernel))
    by_hand = [
        s * np.exp(log_gain(Dense(activations.erf, 9), Kernel.of(s * jnp.asarray(K))))
        for s in (1.0, 4.0)
    ]
    np.testing.assert_allclose(gain, (by_hand[0] + by_hand[1]) / 2, rtol=10 * ROUNDING)


def test_normalisation_of_a_concatenation():
    """One length for all units; under LayerNorm the mean of φ's is a mean of all."""
    relu = Chain((Linear(100, 2.0), Activate(activations.relu)))
    kernel = Kernel.of(jnp.eye(1), tangent=jnp.ones(1))
    for norm in (RMSNorm(), LayerNorm()):
        block = Chain((Concatenate((Linear(100), relu)), norm))
        found = block.kernel(kernel)
        mean = 2 / (2 * np.pi) ** 0.5 / 2 if isinstance(norm, LayerNorm) else 0.0
        length = (1 + 4 / 2) / 2 - mean**2
        np.testing.assert_allclose(found.covariance, 1.0, rtol=10 * ROUNDING)
        np.testing.assert_allclose(found.tangent, (1 + 4 / 2) / 2 / length, rtol=10 * ROUNDING)
        with_relu = Chain((Concatenate((Linear(100), Linear(100, 2.0))), norm, Activate("relu")))
        np.testing.assert_allclose(with_relu.kernel(kernel).covariance, 0.5, rtol=10 * ROUNDING)


def test_paths_that_share_a_part_are_added_before_they_are_squared():
    kernel = Kernel.of(jnp.asarray(K))
    for block, gain in (
        (Sum((IDENTITY, IDENTITY)), 4.0),
        (Sum((Linear(4, 2.0), Linear(4, 3.0))), 13.0),
        (Sum((Residual(Linear(4)), Residual(Linear(4, 2.0)))), 4 + 1 + 4),
        (Sum((IDENTITY, Chain((RMSNorm(), Linear(4))))), None),
    ):
        found = block.kernel(kernel)
        if gain is None:
            root = np.sqrt(np.diagonal(K))
            expected = K + K / np.outer(root, root)
        else:
            expected = gain * K
            np.testing.assert_allclose(np.exp(log_gain(block, kernel)), gain, rtol=10 * ROUNDING)
        np.testing.assert_allclose(found.covariance, expected, rtol=10 * ROUNDING)


def test_gradients_of_a_linear_dense_net_by_hand():
    """x_{l+1} = [x_l; W x_l], of n_l units, with k new ones in each layer.

    Of top gradients N(0, I): each old unit has G_l = G_{l+1} + σ_w² (k/n_l) G'_{l+1}, for its own
    gradient above, and that of the k new ones; they are kept apart by kind.
    """
    sigma2, new, widths = 1.3**2, 20, [20, 40, 60, 80]
    grow = [Concatenate((IDENTITY, Linear(new, 1.3)), n) for n in widths[:-1]]
    network = builders.stack(20, grow, "linear")
    found = mean_field.predict(network, jnp.ones((1, 1)))
    kinds = np.ones(4)  # of 20 units each, at the top
    expected = [1.0]
    for units in widths[-2:0:-1]:
        kept, added = kinds[: units // new], kinds[units // new]
        kinds = kept + sigma2 * new / units * added
        expected.insert(0, kinds.mean())
    np.testing.assert_allclose(
        found["log_gradient_variance"], np.log(expected), rtol=1e2 * ROUNDING, atol=1e2 * ROUNDING
    )
    q = [1.0]
    for units in widths[:-1]:
        q.append((units * q[-1] + new * sigma2 * q[-1]) / (units + new))
    np.testing.assert_allclose(found["q"], q[1:], rtol=1e2 * ROUNDING)


def dense_net(width=60, growth=60, depth=4, norm=()):
    phi = Activate(activations.tanh)
    layers = [
        Concatenate((IDENTITY, Chain((*norm, phi, Linear(growth, 1.4, 0.2)))), width + n * growth)
        for n in range(depth)
    ]
    return builders.stack(40, [Linear(width), *layers, Chain((*norm, phi, Linear(60)))])


def u_net(width=100):
    relu = activations.relu

    def convolution(n, **more):
        return Convolution(relu, (n,), 3, "zeros", width, 2**0.5, 0.1, **more)

    inner = Chain((convolution(4), convolution(4)))
    middle = Chain((AveragePool((8,)), inner, convolution(4, stride=2, transposed=True)))
    whole = Chain((Concatenate((IDENTITY, middle), width), convolution(8)))
    first = Convolution(activations.linear, (8,), 3, "zeros", width)
    return builders.stack(40, [first, whole, convolution(8)], "relu")


NETWORKS = {
    "DenseNet": (dense_net, 2),
    "DenseNet with RMSNorm": (lambda: dense_net(norm=(RMSNorm(epsilon=0.1),)), 2),
    "U-Net": (u_net, 16),
    "Inception": (
        lambda: builders.stack(
            40,
            [
                Linear(100),
                (
                    Chain(
                        (
                            Concatenate((Dense(units=60), Chain((Dense(units=80), Dense())))),
                            BatchNorm(),
                            Dense(activations.relu, 100, 2**0.5),
                        )
                    ),
                    3,
                ),
            ],
        ),
        8,
    ),
    "sum of paths": (
        lambda: builders.stack(
            40,
            [
                Linear(100),
                (Sum((IDENTITY, Chain((Dense(), Dense())), Chain((LayerNorm(), Dense())))), 4),
                Dense(),
            ],
        ),
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "sites"), NETWORKS.values(), ids=NETWORKS)
def test_theory_meets_simulation(make, sites):
    """300 networks; null and false alarms (1 %) as in the law tests."""
    x = np.random.default_rng(0).normal(size=(sites, 40)).astype(np.float32)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    found = compared(make(), x, key=3, networks=300)
    assert not found.count(Status.DIFFERS), found.agreement
    assert np.isfinite(found.by_statistic["log_gradient_norm"].z).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Concatenate(()), "paths make one site of nothing; there is one at least"),
        (lambda: Sum((IDENTITY, AveragePool())), "paths make one site of 1, 2; there is one at"),
        (lambda: Sum((Linear(3), 4)), "an entry of parts is 4"),
        (
            lambda: builders.stack(3, [Sum((Linear(4), Linear(5)))]),
            "paths that are added hand on 4, 5 units",
        ),
        (
            lambda: builders.stack(3, [Concatenate((IDENTITY, Linear(5)), 4)]),
            "a Concatenate of units_in 4 gets 3 units",
        ),
        (lambda: Sum((IDENTITY, Activate())).kernel(Kernel.of(jnp.eye(2))), "which one is a func"),
        (
            lambda: mean_field.predict(
                builders.stack(
                    2,
                    [
                        Concatenate((IDENTITY, Convolution(units=2)), 2),
                        Convolution(units=2),
                    ],
                ),
                jnp.eye(3),
            ),
            "a concatenation is handed on from one layer to the next, where sites mix",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises((InputError, NoTheory), match=message):
        make()
