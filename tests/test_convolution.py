"""Convolutions: what they compute, their theory, and that both samplers draw one law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import compared, smallest_p_value

from gradflow import activations, builders, ensembles, gaussian, networks, statistics
from gradflow.blocks import (
    BatchNorm,
    Chain,
    Convolution,
    Dense,
    Flatten,
    GlobalMean,
    LayerNorm,
    Linear,
    Patches,
    Residual,
)
from gradflow.comparison import Status
from gradflow.errors import InputError
from gradflow.kernels import Kernel
from gradflow.simulation import _matrices, jacobians, monte_carlo, partial_norms
from gradflow.simulation.propagation import propagate
from gradflow.theory import architectures, fixed_points, mean_field

FILTERS = {
    "1-D": ((5,), 3),
    "1-D, even": ((5,), 4),
    "1-D, as long as the input": ((3,), 3),
    "2-D": ((4, 3), 3),
    "2-D, unequal": ((3, 5), (2, 3)),
}
PADDINGS = ("circular", "zeros")
filters = pytest.mark.parametrize(("shape", "size"), FILTERS.values(), ids=FILTERS)
paddings = pytest.mark.parametrize("padding", PADDINGS)
# Of float32 where GRADFLOW_TEST_X64=0, and of float64 else; of sums of some hundred numbers.
ROUNDING = 1e-5 if jnp.zeros(()).dtype == jnp.float32 else 1e-11
predict = jax.jit(mean_field.predict)


def dense_product(key, x, *, sigma_w, width, distribution, full_input=None):  # noqa: ARG001
    weights = _matrices.drawn(key, (width, x.shape[1]), distribution, x.dtype).weights
    return jnp.matmul(x * (sigma_w / x.shape[1] ** 0.5), weights.T)


walk = jax.jit(propagate, static_argnames=("sampler", "keep", "checkpoint"))


def no_product(*_, **__):
    raise AssertionError("has no random matrix")


@filters
@paddings
def test_it_is_the_convolution_of_jax(shape, size, padding, key):
    """The same filters in `jax.lax.conv_general_dilated`, which has no circular padding."""
    inputs, channels, units = 2, 3, 4
    images = jax.random.normal(key, (inputs, *shape, channels))
    block = Convolution(activations.tanh, shape, size, padding, units, 1.3)
    out = block.apply(builders.as_sites(images), dense_product, key)

    sizes = block.patches.sizes
    matrix = _matrices.drawn(key, block.shapes(channels)[0], ensembles.gaussian, images.dtype)
    weights = 1.3 * matrix.weights / matrix.weights.shape[1] ** 0.5
    filters = jnp.moveaxis(weights.reshape(units, *sizes, channels), 0, -1)
    space = "HW"[: len(shape)]
    layout = (f"N{space}C", f"{space}IO", f"N{space}C")
    h, edges = jnp.tanh(images), "SAME"
    if padding == "circular":
        h = jnp.pad(h, [(0, 0), *(((n - 1) // 2, n // 2) for n in sizes), (0, 0)], mode="wrap")
        edges = "VALID"
    expected = jax.lax.conv_general_dilated(
        h, filters, (1,) * len(shape), edges, dimension_numbers=layout, precision="highest"
    )
    assert expected.shape == (inputs, *shape, units)
    np.testing.assert_allclose(out, builders.as_sites(expected), rtol=ROUNDING, atol=ROUNDING)


@filters
@paddings
def test_moments_of_patches_are_those_of_the_units_of_patches(shape, size, padding, key):
    """Brute force: second moments and means over the units of patches of given signals."""
    block = Patches(shape, size, padding)
    signal = 0.5 + jax.random.normal(key, (2 * int(np.prod(shape)), 7))
    gram = Kernel(mean_field.input_gram(signal), signal.mean(axis=1), mean_field.input_gram(signal))
    patches, found = block.apply(signal, no_product, key), block.kernel(gram)
    assert patches.shape[1] == block.width_after(7)
    expected = mean_field.input_gram(patches)
    np.testing.assert_allclose(found.covariance, expected, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(found.tangent, expected, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(found.mean, patches.mean(axis=1), rtol=ROUNDING, atol=ROUNDING)
    assert not found.gaussian


@pytest.mark.parametrize("block", [GlobalMean((2, 3)), Flatten((2, 3))], ids=["mean", "flatten"])
def test_moments_after_merging_positions(block, key):
    signal = 0.5 + jax.random.normal(key, (12, 7))
    gram = Kernel(mean_field.input_gram(signal), signal.mean(axis=1), mean_field.input_gram(signal))
    merged, found = block.apply(signal, no_product, key), block.kernel(gram)
    assert merged.shape == (2, block.width_after(7))
    for moments in (found.covariance, found.tangent):
        np.testing.assert_allclose(moments, mean_field.input_gram(merged), rtol=ROUNDING)
    np.testing.assert_allclose(found.mean, merged.mean(axis=1), rtol=ROUNDING)
    assert found.gaussian == isinstance(block, GlobalMean)


class TestMeanField:
    """Convolution is dense in the mean (Xiao et al. 2018)."""

    @pytest.mark.parametrize("delta", [False, True])
    def test_of_inputs_that_are_alike_everywhere(self, delta):
        """Every statistic but those of weights is a dense network's, at every layer."""
        alike = jnp.broadcast_to(jnp.array([[1.0, 0.4], [-0.5, 0.7]])[:, None], (2, 5, 2))
        convolutions = builders.convolutional(
            (5,), [2, 50, 50, 80], "erf", ensembles.fan_in(1.4), sigma_b=0.2, delta=delta
        )
        dense = builders.mlp([2, 50, 50, 80], "erf", ensembles.fan_in(1.4), sigma_b=0.2)
        found = predict(convolutions, mean_field.input_gram(builders.as_sites(alike)))
        expected = predict(dense, mean_field.input_gram(alike[:, 0]))
        for statistic in statistics.ALL:
            if statistic.name not in ("weight_gradient_variance", "correlation"):
                values = found[statistic.key], expected[statistic.key]
                np.testing.assert_allclose(*values, rtol=1e3 * ROUNDING, atol=1e3 * ROUNDING)

    @paddings
    def test_the_mean_over_positions(self, padding, key):
        """A linear network's mean q is a dense one's; with zeros the edge loses, and no more."""
        images = jax.random.normal(key, (1, 6, 3))
        network = builders.convolutional(
            (6,), [3, 9, 9, 9], "linear", ensembles.fan_in(1.0), padding=padding
        )
        gram = mean_field.input_gram(builders.as_sites(images))
        found = predict(network, gram)
        mean = float(jnp.mean(jnp.diagonal(gram)))
        if padding == "circular":
            np.testing.assert_allclose(found["q"], mean, rtol=1e2 * ROUNDING)
            np.testing.assert_allclose(found["chi"][:-1], 1, rtol=1e2 * ROUNDING)
        else:
            assert (np.diff(found["q"]) < 0).all()
            block = Convolution(activations.linear, (6,), 3, "zeros")
            once = jnp.diagonal(block.kernel(Kernel.of(jnp.eye(6))).covariance)
            np.testing.assert_allclose(once, [2 / 3, 1, 1, 1, 1, 2 / 3], rtol=ROUNDING)

    def test_chi(self):
        """σ_w² E[φ'²] at every q."""
        alike = 1.7 * jnp.ones((4, 1))
        network = builders.convolutional((4,), [1, 9, 9], "erf", ensembles.fan_in(1.3))
        found = predict(network, mean_field.input_gram(alike))
        chi = mean_field.chi(activations.erf, found["q"][0], 1.3**2)
        assert float(found["chi"][0]) == pytest.approx(float(chi), rel=1e2 * ROUNDING)

    def test_a_delta_acts_on_every_position_as_a_dense_layer(self):
        k = Kernel.of(jnp.array([[1.0, 0.3, 0.1], [0.3, 2.0, 0.5], [0.1, 0.5, 0.7]]))
        block = Convolution(activations.erf, sigma_w=1.3, sigma_b=0.2, delta=True)
        found, dense = (b.kernel(k) for b in (block, Dense(activations.erf, 100, 1.3, 0.2)))
        np.testing.assert_array_equal(found.covariance, dense.covariance)


@pytest.mark.parametrize(("shape", "size"), [((6,), 3), ((4, 5), (2, 3))])
@pytest.mark.medium
def test_every_fourier_mode_has_its_own_factor(shape, size):
    """A wave over pairs at one distance, about the chaotic fixed point: χ_c λ(f) in a layer.

    By the derivative of the kernel, against the filter's modes.
    """
    phi, sigma_w2, sigma_b2 = activations.erf, 2.5, 0.1
    block = Convolution(phi, shape, size, sigma_w=sigma_w2**0.5, sigma_b=sigma_b2**0.5)
    modes = architectures.convolution_modes(block.patches)
    assert modes.shape == shape
    fixed = fixed_points.analyse(phi, sigma_w2, sigma_b2)
    positions = int(np.prod(shape))
    q, c = float(fixed.q_star), float(fixed.c_star)
    settled = q * (c + (1 - c) * jnp.eye(positions))
    place = np.stack(np.unravel_index(np.arange(positions), shape), -1)
    apart = np.ravel_multi_index(((place + 1) % shape).T, shape)
    waves = np.arange(positions)

    @jax.jit
    def factor(frequency, second):
        phase = 2 * jnp.pi * (place @ (frequency / jnp.array(shape)))
        wave = jnp.stack([jnp.cos(phase), jnp.sin(phase)])

        def change(wave):
            small = jnp.zeros_like(settled).at[waves, second].set(wave)
            moved = jax.jvp(lambda k: block.kernel(Kernel.of(k)).covariance, (settled,), (small,))[
                1
            ]
            return moved[waves, second]

        return jnp.linalg.norm(jax.vmap(change)(wave)) / jnp.linalg.norm(wave)

    for frequency in ((0,) * len(shape), (1,) * len(shape), tuple(n // 2 for n in shape)):
        share = float(modes[frequency])
        found = float(factor(jnp.array(frequency), apart))
        assert found == pytest.approx(float(fixed.chi_c) * share, abs=1e3 * ROUNDING)
    assert float(modes[(0,) * len(shape)]) == pytest.approx(1)
    assert (modes <= 1 + ROUNDING).all()


def test_modes_are_those_of_circular_padding():
    assert architectures.convolution_modes(Patches((6,), 3))[3] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="padding is 'zeros'"):
        architectures.convolution_modes(Patches((6,), 3, "zeros"))


@pytest.mark.slow
def test_delta_orthogonal_filters_keep_lengths_exactly(key):
    """Linear, 10 layers, on either sampler, every position: and the gradient's length too."""
    shape, channels = (4, 3), [5, *[8] * 10]
    network = builders.convolutional(
        shape, channels, "linear", ensembles.fan_in(1.0, "orthogonal"), delta=True
    )
    x = builders.as_sites(jax.random.normal(key, (2, *shape, 5)))
    for sampler in ("dense", "matrix_free"):
        found = walk(network, x, key, sampler=sampler)
        expected = np.log(np.mean(np.square(x)))
        np.testing.assert_allclose(found["log_q"], expected, rtol=1e2 * ROUNDING)
        np.testing.assert_allclose(found["chi"][:-1], 1, rtol=1e2 * ROUNDING)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("pool", "delta"),
    [
        ("mean", False),
        *(
            pytest.param(pool, delta, marks=pytest.mark.slow)
            for pool, delta in [("mean", True), ("flatten", False), ("flatten", True)]
        ),
    ],
)
@paddings
def test_weight_gradients_are_those_of_the_filters(pool, delta, padding, key):
    """Of one network, ∂C/∂W by differentiating the whole network by its filters, zeros and all."""
    network = builders.convolutional(
        (3, 2), [2, 3, 4], "tanh", size=2, padding=padding, delta=delta, dense=[5], pool=pool
    )
    x = builders.as_sites(jax.random.normal(key, (2, 3, 2, 2)))
    found = walk(network, x, key, sampler="dense")
    keys = jax.random.split(key, network.depth + 1)
    blocks = [stage.block for stage in network.stages]

    def multiply(weights):
        def product(_, x, *, full_input=None, **__):
            x = x if full_input is None else full_input
            return jnp.matmul(x, weights.T, precision="highest")

        return product

    def filters():
        for block, layer_key, below in zip(blocks, keys[1:], network.widths, strict=False):
            (shape,) = block.shapes(below)
            if isinstance(block, Chain):
                layer_key, block = jax.random.fold_in(layer_key, 2), block.parts[-1]
            n_out, n_in = shape
            n_in = below if delta and isinstance(block, Convolution) else n_in
            drawn = _matrices.drawn(layer_key, (n_out, n_in), ensembles.gaussian, x.dtype).weights
            drawn *= block.sigma_w / n_in**0.5
            if n_in != shape[1]:
                whole = jnp.zeros((n_out, block.patches.elements, n_in), x.dtype)
                drawn = whole.at[:, 0].set(drawn).reshape(shape)  # 2 × 2: the first is the centre
            yield drawn

    def cost(weights):
        z = x
        for block, w in zip(blocks, weights, strict=True):
            z = block.apply(z, multiply(w), key)
        return jnp.sum(jax.random.normal(keys[0], z.shape, z.dtype) * z) / len(z)

    gradients = jax.grad(cost)([*filters()])
    expected = [jnp.log(jnp.mean(jnp.square(g))) for g in gradients]
    np.testing.assert_allclose(
        found["log_weight_gradient_variance"], jnp.stack(expected), rtol=1e2 * ROUNDING
    )


LAWS = {
    "circular": {"delta": False, "weights": "glorot"},
    "delta-orthogonal": {"delta": True, "weights": "glorot_orthogonal"},
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_both_samplers_have_one_law(law):
    """q, log gradient norms and weight gradients' norms of 6000 networks each, and their pairs.

    More sites (6) than channels (4): the matrices are asked all there is to ask. Null: one joint
    law. False alarms: 1e-3. Keys are fixed.
    """
    network = builders.convolutional((3,), [2, 4, 4, 4], "tanh", dense=[3], sigma_b=0.3, **law)
    x = builders.as_sites(jax.random.normal(jax.random.key(5), (2, 3, 2)))
    wanted = (
        *(statistics.q, statistics.log_gradient_norm),
        statistics.weight_gradient_variance,
    )

    def features(sampler, key):
        found = monte_carlo.simulate(
            network, x, key=key, networks=6000, sampler=sampler, wanted=wanted, keep_samples=True
        ).samples
        return np.concatenate([values[:, [0, 2, 3]] for values in found.values()], axis=1)

    a, b = features("dense", 1), features("matrix_free", 2)
    assert smallest_p_value(a, b) > 1e-3
    # A negative control: 2 % more weight.
    assert smallest_p_value(a, b + 0.04) < 1e-3


NETWORKS = {
    "pooled": lambda: builders.convolutional(
        (3,), [2, 100, 100, 100], "erf", "glorot", padding="zeros", dense=[100, 50], sigma_b=0.2
    ),
    "flattened ReLU": lambda: builders.convolutional(
        (2, 2), [2, 100, 100], "relu", "he", size=(2, 1), dense=[100], pool="flatten"
    ),
    # Wider: what a finite width does to correlations after the mean falls faster than 1/n here, and
    # so is not 4 times as large at n/4 (of 3000 networks with `glorot_orthogonal` of widths 25, 100
    # and 400: -0.0136(6), -0.0011(1) and 0.00006(4)).
    "delta-orthogonal": lambda: builders.convolutional(
        (3,),
        [2, 400, 400, 400],
        "erf",
        ensembles.fan_in(1.2, "orthogonal"),
        delta=True,
        dense=[400],
    ),
    "residual with BatchNorm over positions": lambda: builders.stack(
        2,
        [
            Convolution(activations.linear, (3,)),
            (Residual(Chain((BatchNorm(), Convolution(activations.relu, (3,))))), 2),
            Chain((GlobalMean((3,)), LayerNorm(), Linear(50))),
        ],
        "relu",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_theory_meets_simulation(make):
    """300 networks; null and false alarms (1 %) as in the law tests."""
    network = make()
    positions = 4 if "relu, he" in network.name else 3
    x = np.random.default_rng(0).normal(size=(2 * positions, 2)).astype(np.float32)
    found = compared(network, x, key=3, networks=300)
    assert not found.count(Status.DIFFERS), found.agreement
    chi = found.by_statistic["chi"].z
    assert np.isfinite(chi[:-1]).all()  # also where positions are merged
    assert np.isfinite(found.by_statistic["log_gradient_norm"].z).all()


@pytest.mark.medium
def test_zeros_at_every_position_are_kept_in_a_homogeneous_network(key):
    """One scale for all positions: an image with an empty row, ReLU, 40 layers of tiny weights."""
    weights = ensembles.fan_in(1e-4)
    network = builders.convolutional((6,), [1, *[8] * 40], "relu", weights, padding="zeros")
    assert network.homogeneous
    x = jnp.zeros((6, 1)).at[0].set(1.0)
    found = walk(network, x, key, sampler="dense")
    assert np.isfinite(found["log_q"]).all()
    assert found["log_q"][-1] < -600
    predicted = predict(network, mean_field.input_gram(x))
    assert np.isfinite(predicted["log_gradient_variance"]).all()


@pytest.mark.slow
def test_checkpoints_and_kept_linearisations_give_the_same_numbers(key):
    network = builders.convolutional((3,), [2, *[6] * 7], "tanh", dense=[5, 5])
    x = builders.as_sites(jax.random.normal(key, (2, 3, 2)))
    once = walk(network, x, key, sampler="matrix_free")
    for options in ({"keep": True}, {"checkpoint": True}):
        again = walk(network, x, key, sampler="matrix_free", **options)
        for name, values in once.items():
            np.testing.assert_allclose(again[name], values, rtol=1e2 * ROUNDING, err_msg=name)


@pytest.mark.medium
@pytest.mark.parametrize("sampler", ["dense", pytest.param("matrix_free", marks=pytest.mark.slow)])
def test_a_jacobian_of_convolutions_and_dense_layers(sampler, key):
    """J v and Jᵀ u of one network: u · J v = Jᵀ u · v, whose shapes differ."""
    network = builders.convolutional((3, 2), [2, 4], "tanh", size=2, dense=[5], sigma_b=0.1)
    x, v = jax.random.normal(key, (2, 12, 2))
    jacobian = jacobians.draw(network, x, key, sampler=sampler)
    assert (jacobian.tangent_shape, jacobian.cotangent_shape) == ((12, 2), (2, 5))
    u = jax.random.normal(key, (2, 5))
    up = jacobian.times(v[None])
    down = up.jacobian.transpose_times(u[None])
    np.testing.assert_allclose(
        jnp.sum(u * up.direction[0]) * jnp.exp(up.log_norm[0]),
        jnp.sum(v * down.direction[0]) * jnp.exp(down.log_norm[0]),
        rtol=1e3 * ROUNDING,
    )


def test_scales_are_those_of_fan_in_and_fan_out():
    """Of k elements and c channels: k c; of a delta, its centre's alone."""
    whole = builders.convolutional((8, 8), [3, 16, 32], "relu", "glorot", dense=[10])
    first, second, pooled = (stage.block for stage in whole.stages)
    assert first.shapes(3) == ((16, 27),)
    assert second.shapes(16) == ((32, 144),)
    assert second.sigma_w**2 == pytest.approx(144 * 2 / (144 + 288))
    assert pooled.shapes(32) == ((10, 32),)
    assert whole.widths == (3, 16, 32, 10)
    assert whole.sites(128) == (128, 128, 2)
    delta = builders.convolutional((8, 8), [3, 16, 32], "relu", "unscaled", delta=True)
    assert delta.stages[1].block.sigma_w == pytest.approx(16**0.5)
    flat = builders.convolutional((8, 8), [3, 16], dense=[10, 10, 10], pool="flatten")
    assert flat.shapes[1] == ((10, 64 * 16),)
    assert [stage.repeats for stage in flat.stages] == [1, 1, 2]
    assert networks.divide_widths(whole, 2).widths == (3, 8, 16, 5)


def test_images_become_sites(key):
    images = jax.random.normal(key, (2, 3, 4, 5))
    sites = builders.as_sites(images)
    assert sites.shape == (24, 5)
    np.testing.assert_array_equal(sites[12 + 4 * 2 + 1], images[1, 2, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Convolution(shape=()), r"shape is \(\); it is a tuple of lengths"),
        (lambda: Convolution(shape=(0, 3)), "a length in shape is 0; it is a whole number"),
        (lambda: Convolution(size=4), r"size is 4; it is one whole number, or one for each axis"),
        (lambda: Convolution(size=(3, 3)), r"size is \(3, 3\); it is one whole number"),
        (lambda: Patches(padding="same"), "unknown padding 'same'; it is one of circular, valid"),
        (
            lambda: Patches((3,)).apply(jnp.ones((4, 2)), no_product, jax.random.key(0)),
            r"the signal has 4 sites, and shape is \(3,\); .* a multiple of 3",
        ),
        (
            lambda: mean_field.predict(builders.convolutional((3,), [1, 2]), jnp.eye(4)),
            "the signal has 4 sites",
        ),
        (lambda: builders.convolutional((3,), [2]), r"channels is \(2,\); it has the input's"),
        (lambda: builders.convolutional((3,), [2, 0]), "a number of channels is 0"),
        (lambda: builders.convolutional((3,), [2, 2], dense=[0]), "a width in dense is 0"),
        (lambda: builders.convolutional((3,), [2, 2], pool="max"), "unknown pool 'max'"),
        (lambda: builders.as_sites(jnp.ones((4, 4))), r"images has shape \(4, 4\); it is"),
        (lambda: builders.stack(2, [(GlobalMean((2,)), 2)]), "repeated 2 times and makes one site"),
        (
            lambda: Residual(Chain((Linear(), GlobalMean((2,))))),
            "a residual branch makes one site of 2",
        ),
        (
            lambda: mean_field.predict(
                builders.stack(2, [Chain((Patches((3,), 3), Dense(units=4)))]), jnp.eye(3)
            ),
            "acts on a signal that is not Gaussian over units",
        ),
        (
            lambda: architectures.walk(Convolution(), 1.0, 3),
            "block has a BatchNorm, a UnitVariance or a convolution",
        ),
        (
            lambda: jacobians.layer_jacobians(
                builders.convolutional((3,), [1, 2]), jnp.ones(1), jax.random.key(0)
            ),
            "layer_jacobians is of one input alone",
        ),
        (
            lambda: partial_norms.sampled_partial_norms(
                builders.convolutional((3,), [1, 2], dense=[2]), jnp.ones((3, 1)), jax.random.key(0)
            ),
            "a layer of this network merges positions",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_tangent_meets_the_slopes_of_its_two_positions():
    """The pair of two positions: S_pq E[φ'(u_p) φ'(u_q)], averaged over the filter."""
    k, s = jnp.array([[1.0, 0.3], [0.3, 2.0]]), jnp.array([[1.0, 0.5], [0.5, 1.0]])
    gram = Kernel(k, jnp.zeros(2), s)
    found = Convolution(activations.erf, (2,), 2, sigma_w=1.3).kernel(gram).tangent
    each = 1.69 * gaussian.derivative_kernel(activations.erf, k) * s
    expected = (each + each[::-1, ::-1]) / 2
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)
