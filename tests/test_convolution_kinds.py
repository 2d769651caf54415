"""Convolutions with stride, dilation and groups, and transposed ones, beside JAX's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import compared

from gradflow import activations, builders, ensembles, networks
from gradflow.blocks import Chain, Convolution, Flatten, GlobalMean, Linear, Patches, Residual
from gradflow.comparison import Status
from gradflow.errors import InputError, NoTheory
from gradflow.kernels import Kernel
from gradflow.simulation import _matrices, jacobians
from gradflow.simulation.propagation import lsuv, propagate
from gradflow.theory import architectures, mean_field
from gradflow.training import initial_weights, outputs

ROUNDING = 1e-5 if jnp.zeros(()).dtype == jnp.float32 else 1e-11
walk = jax.jit(propagate, static_argnames=("sampler", "keep", "checkpoint"))

# Shape, what the block has, and the padding of JAX's function for it.
KINDS = {
    "stride": ((7,), {"stride": 2, "padding": "zeros"}, "SAME"),
    "even": ((6, 8), {"size": 4, "stride": 2, "padding": "zeros"}, "SAME"),
    "stride beyond the size": ((8,), {"size": 1, "stride": 3, "padding": "zeros"}, "SAME"),
    "valid": ((7, 6), {"padding": "valid", "stride": (2, 1)}, "VALID"),
    "PyTorch's padding": ((6,), {"padding": 1, "stride": 2}, [(1, 1)]),
    "pairs": ((6,), {"padding": ((0, 2),)}, [(0, 2)]),
    "dilation": ((8,), {"dilation": 2, "padding": "zeros"}, "SAME"),
    "dilation and stride": ((9,), {"dilation": 3, "stride": 2, "padding": 3}, [(3, 3)]),
    "groups": ((5,), {"groups": 2, "padding": "zeros"}, "SAME"),
    "depthwise": ((4, 4), {"groups": "depthwise", "padding": "zeros", "stride": 2}, "SAME"),
    "transposed": ((4,), {"transposed": True, "stride": 2, "padding": "zeros"}, "SAME"),
    "transposed, short": (
        (3, 2),
        {"transposed": True, "size": 2, "stride": 3, "padding": "zeros"},
        "SAME",
    ),
    "transposed, valid": (
        (4,),
        {"transposed": True, "size": 4, "stride": 2, "padding": "valid"},
        "VALID",
    ),
    "transposed, PyTorch's": (
        (4,),
        {"transposed": True, "size": 4, "stride": 2, "padding": 1},
        [(2, 2)],
    ),
    "longer than the input": ((2,), {"size": 5, "padding": "zeros"}, "SAME"),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
CHANNELS, UNITS = 4, 8


def block_of(shape, given):
    return Convolution(activations.tanh, shape, units=UNITS, sigma_w=1.3, **{"size": 3} | given)


def dense_product(key, x, *, sigma_w, width, distribution, full_input=None):  # noqa: ARG001
    weights = _matrices.drawn(key, (width, x.shape[1]), distribution, x.dtype).weights
    return jnp.matmul(x * (sigma_w / x.shape[1] ** 0.5), weights.T)


def no_product(*_, **__):
    raise AssertionError("has no random matrix")


@kinds
def test_it_is_the_convolution_of_jax(kind, key):
    shape, given, padding = kind
    block = block_of(shape, given)
    strides, dilation = (
        n if isinstance(n, tuple) else (n,) * len(shape) for n in (block.stride, block.dilation)
    )
    images = jax.random.normal(key, (2, *shape, CHANNELS))
    out = block.apply(builders.as_sites(images), dense_product, key)
    (n_out, n_in), *_ = block.shapes(CHANNELS)
    weights = _matrices.drawn(key, (n_out, n_in), ensembles.gaussian, images.dtype).weights
    sizes = block.patches.sizes
    filters = 1.3 * weights.reshape(UNITS, *sizes, -1) / n_in**0.5
    filters = jnp.moveaxis(filters, 0, -1)
    space = "HW"[: len(shape)]
    layout = {"dimension_numbers": (f"N{space}C", f"{space}IO", f"N{space}C")}
    apart = (1,) * len(shape)
    if block.transposed:
        strides, apart = apart, strides
    if block.transposed and isinstance(padding, str):
        expected = jax.lax.conv_transpose(
            jnp.tanh(images), filters, apart, padding, precision="highest", **layout
        )
    else:
        expected = jax.lax.conv_general_dilated(
            jnp.tanh(images), filters, strides, padding, apart, dilation, precision="highest",
            feature_group_count=block._count_groups(CHANNELS), **layout,
        )  # fmt: skip
    assert expected.shape == (2, *block.patches.out_shape, UNITS)
    assert 2 * np.prod(shape) / block.pool_factor == len(out)
    np.testing.assert_allclose(out, builders.as_sites(expected), rtol=ROUNDING, atol=ROUNDING)


CIRCULAR = {
    "stride": ((6,), {"stride": 2}),
    "dilation": ((5, 5), {"dilation": 2, "stride": (1, 2)}),
    "transposed": ((3,), {"stride": 2, "spread": 2}),
}


@pytest.mark.parametrize("kind", [*KINDS.values(), *CIRCULAR.values()], ids=[*KINDS, *CIRCULAR])
def test_moments_of_patches_are_those_of_the_units_of_patches(kind, key):
    """Brute force: second moments and means over the units of patches of given signals."""
    shape, given, *_ = kind
    if kind in KINDS.values():
        block = block_of(shape, given).patches
    else:
        given = dict(given)
        if "spread" in given:
            given["stride"] = 1
        block = Patches(shape, 3, **given)
    signal = 0.5 + jax.random.normal(key, (2 * int(np.prod(shape)), 7))
    gram = mean_field.input_gram(signal)
    patches = block.apply(signal, no_product, key)
    found = block.kernel(Kernel(gram, signal.mean(axis=1), gram))
    expected = mean_field.input_gram(patches)
    for values in (found.covariance, found.tangent):
        np.testing.assert_allclose(values, expected, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(found.mean, patches.mean(axis=1), rtol=ROUNDING, atol=ROUNDING)


def test_circular_windows_go_around(key):
    """Every second place of a convolution with all; zeros between 3 positions are those of 6."""
    x = jax.random.normal(key, (6, 2))
    every, second = (Patches((6,), 3, stride=n).apply(x, no_product, key) for n in (1, 2))
    np.testing.assert_array_equal(second, every[::2])
    x = x[:3]
    between = jnp.stack([x, 0 * x], axis=1).reshape(6, 2)
    np.testing.assert_array_equal(
        Patches((3,), 3, spread=2).apply(x, no_product, key),
        jnp.roll(Patches((6,), 3).apply(between, no_product, key), 1, axis=0),
    )


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["dense", "matrix_free"])
def test_weight_gradients_are_those_of_the_filters(sampler, key):
    """∂C/∂W of one network by differentiating it by all its filters."""
    network = mixed_network(16)
    x = builders.as_sites(jax.random.normal(key, (2, 8, 2)))
    if sampler == "dense":
        weights = initial_weights(network, key, x.dtype)
        found = walk(network, x, key, sampler=sampler)
        top = jax.random.split(key, network.depth + 1)[0]

        def cost(weights):
            z = outputs(network, weights, x)
            return jnp.sum(jax.random.normal(top, z.shape, z.dtype) * z) / len(z)

        gradients = jax.grad(cost)(weights)
        for layer, of_layer in enumerate(gradients):
            squares = sum(jnp.sum(jnp.square(w)) for w in of_layer.matrices)
            count = sum(w.size for w in of_layer.matrices)
            np.testing.assert_allclose(
                found["log_weight_gradient_variance"][layer],
                jnp.log(squares / count),
                rtol=1e2 * ROUNDING,
            )
    # J v and Jᵀ u of one network: u · J v = Jᵀ u · v.
    v = jax.random.normal(key, x.shape)
    jacobian = jacobians.draw(network, x, key, sampler=sampler)
    u = jax.random.normal(key, jacobian.cotangent_shape)
    up = jacobian.times(v[None])
    down = up.jacobian.transpose_times(u[None])
    np.testing.assert_allclose(
        jnp.sum(u * up.direction[0]) * jnp.exp(up.log_norm[0]),
        jnp.sum(v * down.direction[0]) * jnp.exp(down.log_norm[0]),
        rtol=1e3 * ROUNDING,
    )


def mixed_network(width, activation="erf"):
    """Strided, in groups, depthwise and pointwise, transposed; on 8 positions."""
    phi = activations.get(activation)
    return builders.stack(
        2,
        [
            Convolution(activations.linear, (8,), 3, "zeros", width, 1.2, 0.1),
            Convolution(phi, (8,), 3, "zeros", width, 1.3, stride=2),
            Convolution(phi, (4,), 3, "circular", width, 1.4, 0.2, groups=2, dilation=1),
            Chain(
                (
                    Convolution(phi, (4,), 3, "zeros", width, 1.5, 0.3, groups="depthwise"),
                    Linear(width, 1.1),
                )
            ),
            Convolution(phi, (4,), 4, "zeros", width, 2.0, stride=2, transposed=True),
            Chain((GlobalMean((8,)), Linear(width // 2))),
        ],
        phi,
    )


NETWORKS = {
    "all kinds": lambda: mixed_network(200),
    "residual of depthwise and pointwise": lambda: builders.stack(
        2,
        [
            Convolution(activations.linear, (8,), 3, "zeros", 100),
            (
                Residual(
                    Chain(
                        (
                            Convolution(activations.linear, (8,), 3, "zeros", groups="depthwise"),
                            Linear(200, 1.2),
                            Convolution(activations.relu, (8,), 1, units=100, sigma_w=2**0.5),
                        )
                    )
                ),
                3,
            ),
            Chain((Flatten((8,)), Linear(50))),
        ],
        "relu",
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


def test_what_a_stride_does_to_second_moments_and_gradients():
    """Circular, linear, inputs alike everywhere: q is σ_w² q; a gradient's mean square, the same.

    Half of the positions have all of the gradient's squares; a transposed one has the reverse, and
    q is halved, as half of what a filter meets are zeros.
    """
    alike = jnp.ones((8, 1))
    linear = activations.linear
    strided = Convolution(linear, (8,), 2, stride=2, units=1)
    spread = Convolution(linear, (4,), 2, stride=2, units=1, transposed=True)
    network = builders.stack(1, [Convolution(linear, (8,), 1, units=1), strided, spread])
    found = mean_field.predict(network, mean_field.input_gram(alike))
    np.testing.assert_allclose(found["q"], [1, 1, 0.5], rtol=1e2 * ROUNDING)
    # ∂C/∂z of sites: 8 sites of variance 1 at the top; each of 4 below meets 2 of them by 1/2.
    np.testing.assert_allclose(found["log_gradient_variance"][:-1], [np.log(0.5), 0], atol=1e-5)
    assert network.positions == 2
    assert network.sites(8) == (8, 4, 8)


def test_shapes_of_grouped_filters():
    grouped = Convolution(units=32, size=3, shape=(8, 8), groups=4)
    assert grouped.shapes(16) == ((32, 9 * 4),)
    assert dataclasses.replace(grouped, groups="depthwise").shapes(16) == ((32, 9),)
    network = builders.stack(16, [grouped])
    assert networks.divide_widths(network, 4).widths == (16, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Convolution(groups=3), "groups is 3, and units 100; it divides their number"),
        (lambda: Convolution(groups="channel"), "groups is 'channel'; it is a whole number"),
        (
            lambda: builders.stack(6, [Convolution(groups=4)]),
            "a convolution of groups 4 takes 6 channels and hands on 100",
        ),
        (
            lambda: builders.stack(4, [Convolution(groups=4)]),
            "the signal has 4 channels, one for each; say 'depthwise'",
        ),
        (lambda: Convolution(stride=0), "stride is 0; it is a whole number of at least 1"),
        (lambda: Patches((4, 4), stride=(1,)), r"stride is \(1,\); it is one whole number, or one"),
        (lambda: Patches((4,), 3, padding=(1, 1)), r"padding is \(1, 1\); it is one of circular"),
        (lambda: Patches((4,), 3, padding=-1), "padding is -1; it is a whole number of at least 0"),
        (lambda: Patches((2,), 3, padding="valid"), "size is 3; it is one whole number"),
        (lambda: Patches((2,), 1, 1, spread=2), "padding is 1; it leaves out more positions"),
        (
            lambda: lsuv(builders.stack(4, [Convolution(groups=2)]), jnp.ones((3, 4)), 0),
            "has convolutions in groups; lsuv divides matrices",
        ),
        (lambda: Convolution(delta=True, stride=2), "delta is True; filters that are zero but"),
        (
            lambda: builders.stack(2, [(Convolution(shape=(4,), stride=2, units=2), 2)]),
            "repeated 2 times and makes one site of 2",
        ),
        (
            lambda: architectures.convolution_modes(Patches((6,), 3, stride=2)),
            "patches have a stride",
        ),
        (
            lambda: mean_field.predict(
                builders.stack(
                    2, [Chain((Convolution(groups="depthwise", units=2), Convolution()))]
                ),
                jnp.eye(3),
            ),
            "acts on a signal that is not Gaussian over units",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises((InputError, NoTheory), match=message):
        make()


def test_a_builder_has_strides_groups_and_norms():
    def make(**more):
        return builders.convolutional(
            (8, 8), [3, 16, 16, 32], "relu", "he", **{"padding": "zeros"} | more
        )

    strided = make(strides=[1, 2, 2], dense=[10])
    assert strided.sites(64) == (64, 16, 4, 1)
    assert strided.positions == 64
    pooled = make(strides=[1, 2, 1], downsample="max")
    first, second, third = (stage.block for stage in pooled.stages)
    assert [type(part).__name__ for part in second.parts] == ["MaxPool", "Convolution"]
    assert second.parts[0].activation == activations.relu
    assert third.shape == (4, 4)
    averaged = make(strides=[1, 2, 1], downsample="average").stages[1].block
    kinds = ["Activate", "AveragePool", "Convolution"]
    assert [type(part).__name__ for part in averaged.parts] == kinds
    grouped = make(groups=4).stages[1].block
    assert grouped.shapes(16) == ((16, 36),)
    assert grouped.sigma_w**2 == pytest.approx(2)
    apart = make(groups="depthwise").stages[2].block
    assert apart.shapes(16) == ((16, 9), (32, 16))
    assert isinstance(first, Convolution)
    assert first.groups == 1
    norm = make(norm="group", norm_groups=4, epsilon=1e-5).stages[1].block.parts[0]
    assert (norm.groups, norm.shape, norm.epsilon) == (4, (8, 8), 1e-5)
    assert make(padding="valid").sites(64) == (36, 16, 4)
    dense = builders.mlp([8, 8, 8], norm="group", norm_groups=2, epsilon=0.1).stages[1].block
    assert (dense.parts[0].groups, dense.parts[0].epsilon) == (2, 0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strides": [1, 2]}, r"strides is \(1, 2\); it has one for each of 1 convolutions"),
        ({"strides": [0]}, "a stride is 0; it is a whole number of at least 1"),
        ({"downsample": "mean"}, "unknown downsample 'mean'"),
        ({"norm": "groups"}, "unknown norm 'groups'"),
        ({"padding": "same"}, "unknown padding 'same'"),
        ({"norm": "group", "norm_groups": 0}, "norm_groups is 0; it is a whole number of at"),
        ({"norm": "layer", "epsilon": -1.0}, "epsilon is -1.0; it is a finite number, 0 or more"),
        ({"groups": "channel"}, "groups is 'channel'; it is a whole number of at least 1"),
    ],
)
def test_a_builder_refuses_in_one_sentence(given, message):
    channels = [2, 4] if "strides" in given else [2, 4, 4]
    with pytest.raises(InputError, match=message):
        builders.convolutional((4,), channels, **given)
