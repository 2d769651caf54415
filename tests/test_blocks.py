"""Blocks: what each computes, how they nest, and reference table 8."""

import importlib
import inspect
import pkgutil
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations, blocks, builders, ensembles, networks
from gradflow.blocks import (
    AbstractBlock,
    Activate,
    Chain,
    Dense,
    Dropout,
    Gated,
    LayerNorm,
    Linear,
    Maxout,
    Residual,
    RMSNorm,
    UnitVariance,
)
from gradflow.errors import InputError
from gradflow.kernels import Kernel
from gradflow.simulation import jacobians
from gradflow.simulation.propagation import propagate
from gradflow.theory import architectures, fixed_points, mean_field
from gradflow.theory._backward import log_gain
from gradflow.theory.fixed_points import Status

# Table 8 has 36 digits; what float64 leaves of them after 100 layers.
TABLE = 1e-10
predict = jax.jit(mean_field.predict)
walk = jax.jit(propagate, static_argnames="sampler")


def rows_of(load_reference, kind):
    rows = [r for r in load_reference("t8_residual_norm_dropout") if kind in r["inputs"].values()]
    assert rows
    for row in rows:
        given = {
            k: float(Fraction(v))
            for k, v in row["inputs"].items()
            if k[:2] in ("sw", "sb", "al", "ke")
        }
        yield activations.get(row["inputs"].get("activation", "relu")), given, row["values"]


@pytest.mark.usefixtures("x64_only")
class TestTable8:
    """Residual growth, and χ of layers with a normalisation."""

    @pytest.mark.parametrize("form", ["preact", "YS_reduced", "YS_full", "preLN_residual"])
    def test_residual_growth(self, load_reference, form):
        for phi, given, values in rows_of(load_reference, form):
            w, b = given["sw2"] ** 0.5, given["sb2"] ** 0.5
            branch = {
                "preact": Dense(phi, 1, w, b),
                "YS_reduced": Chain((Linear(1, w, b), Activate(phi))),
                "YS_full": Chain((Linear(1, w, b), Dense(phi, 1))),
                "preLN_residual": Chain((LayerNorm(), Dense(phi, 1, w, b))),
            }[form]
            alpha = given.get("alpha") or given["alpha2"] ** 0.5
            found = architectures.walk(Residual(branch, alpha), 1.0, 100)
            for count, truth in values["after_l_blocks"].items():
                last = int(count) - 1
                q = float(truth.get("p", truth["q"]))  # p: of the stream, where q is inside
                assert float(found.q[last]) == pytest.approx(q, rel=TABLE)
                gain = float(found.log_gradient_gain[last])
                if "grad_gain" in truth:
                    assert np.exp(gain) == pytest.approx(float(truth["grad_gain"]), rel=TABLE)
                else:
                    assert gain == pytest.approx(float(truth["log_grad_gain"]), rel=TABLE)
                if "p" in truth:
                    before = float(found.q[last - 1]) if last else 1.0
                    inner = given["sw2"] * before + given["sb2"]
                    assert inner == pytest.approx(float(truth["q"]), rel=TABLE)

    @pytest.mark.parametrize("kind", ["LN_preact", "LN_postact", "RMS_postact", "postLN_residual"])
    def test_chi_of_normalised_layers(self, load_reference, kind):
        for phi, given, values in rows_of(load_reference, kind):
            w, b = given["sw2"] ** 0.5, given["sb2"] ** 0.5
            linear = Linear(1, w, b)
            block = {
                "LN_preact": Chain((LayerNorm(), Activate(phi), linear)),
                "LN_postact": Chain((Activate(phi), LayerNorm(), linear)),
                "RMS_postact": Chain((Activate(phi), RMSNorm(), linear)),
                "postLN_residual": Chain((Residual(Dense(phi, 1, w, b)), LayerNorm())),
            }[kind]
            q = float(values["q_before_norm_or_preact"])
            after = 1.0 if kind == "postLN_residual" else q
            found = architectures.walk(block, after, 4)
            np.testing.assert_allclose(found.chi, float(values["chi_per_layer"]), rtol=TABLE)
            np.testing.assert_allclose(found.q, after, rtol=TABLE)

    @pytest.mark.slow
    def test_dropout(self, load_reference):
        for phi, given, values in rows_of(load_reference, "dropout"):
            found = architectures.dropout(
                phi, given["sw2"], given["sb2"], keep_rate=given["keep_prob"]
            )
            for name, key in (
                ("q_star", "q_star"),
                ("c_star", "c_star"),
                ("chi_c", "chi_c"),
                ("xi_c", "xi_c"),
                ("chi1", "chi1_forward_backward"),
                ("c_of_one", "C_at_1"),
                ("trainable_depth", "six_xi_c"),
            ):
                assert float(getattr(found, name)) == pytest.approx(float(values[key]), rel=TABLE)

    @pytest.mark.medium
    def test_critical_dropout_of_relu(self, load_reference):
        for _, given, values in rows_of(load_reference, "dropout_relu_critical"):
            sigma_w2 = architectures.critical_dropout("relu", given["keep_prob"])
            assert float(sigma_w2) == pytest.approx(float(values["sw2"]), rel=TABLE)
            found = architectures.dropout("relu", sigma_w2, keep_rate=given["keep_prob"])
            assert found.status == Status.NEUTRAL
            for name, key in (("c_star",) * 2, ("chi_c",) * 2, ("xi_c",) * 2):
                assert float(getattr(found, name)) == pytest.approx(float(values[key]), rel=TABLE)
            assert float(found.trainable_depth) == pytest.approx(
                float(values["six_xi_c"]), rel=TABLE
            )


@pytest.mark.slow
@pytest.mark.usefixtures("x64_only")
def test_dropout_over_a_grid_and_its_derivative():
    keep = np.array([0.5, 0.9, 1.0])
    found = architectures.dropout("tanh", 1.5, 0.05, keep_rate=keep)
    plain = fixed_points.analyse(activations.tanh, 1.5, 0.05)
    assert found.c_star.shape == (3,)
    assert float(found.c_star[2]) == pytest.approx(float(plain.c_star))
    assert (np.diff(found.c_star) > 0).all()

    def c_star(sigma_w2):
        return architectures.dropout("tanh", sigma_w2, 0.05, keep_rate=0.9).c_star

    step = 1e-4
    finite = (c_star(1.5 + step) - c_star(1.5 - step)) / (2 * step)
    assert float(jax.grad(c_star)(1.5)) == pytest.approx(float(finite), rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64_only")
def test_dropout_networks_settle_where_the_fixed_point_is():
    """50 layers, two inputs: the walk of the kernel, against the fixed-point equation."""
    network = builders.mlp(
        [2, *[9] * 50], "tanh", ensembles.fan_in(1.5**0.5), sigma_b=0.2, keep_rate=0.9
    )
    found = predict(network, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
    fixed = architectures.dropout("tanh", 1.5, 0.04, keep_rate=0.9)
    assert float(found["correlation"][-1]) == pytest.approx(float(fixed.c_star), rel=1e-4)
    assert float(found["chi"][-2]) == pytest.approx(float(fixed.chi1), rel=1e-4)


NETWORKS = {
    "mlp, layer norm, dropout": lambda w: builders.mlp(
        [9, 30, 30, 20], "relu", w, norm="layer", keep_rate=0.8, sigma_b=0.1
    ),
    "mlp, rms norm after φ": lambda w: builders.mlp(
        [9, 30, 30, 20], "tanh", w, norm="rms", norm_position="post"
    ),
    "residual": lambda w: builders.residual(9, 30, 3, "relu", w, scale="depth"),
    "pre-norm residual of two layers": lambda w: builders.residual(
        9, 30, 3, "gelu", w, layers=2, hidden=50, weights_first=True, norm="layer", keep_rate=0.9
    ),
    "post-norm residual": lambda w: builders.residual(
        9, 30, 3, "tanh", w, sigma_b=0.2, norm="rms", norm_position="post"
    ),
}


@pytest.mark.medium
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_jacobian_is_the_derivative_of_the_blocks(make, key):
    """Pushed and pulled through the hooks on `multiply`, against `jax.jvp` of the whole network."""
    network = make("glorot")
    sites = 2
    x, v = jax.random.normal(key, (2, sites, 9))
    keys = jax.random.split(key, network.depth + 1)[1:]

    def whole(x):
        number = 0
        for stage in network.stages:
            for _ in range(stage.repeats):
                x = stage.block.apply(x, dense_product, keys[number])
                number += 1
        return x

    jacobian = jacobians.draw(network, x, key, sampler="dense")
    expected = jax.jvp(whole, (x,), (v,))[1]
    found = jacobian.times(v[None])
    tolerance = 1e-10 if x.dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(
        found.direction[0] * jnp.exp(found.log_norm[0]), expected, rtol=tolerance, atol=tolerance
    )
    u = jax.random.normal(jax.random.fold_in(key, 1), expected.shape)
    pulled = jacobian.transpose_times(u[None])
    product = jnp.sum(pulled.direction[0] * v) * jnp.exp(pulled.log_norm[0])
    np.testing.assert_allclose(product, jnp.sum(u * expected), rtol=1e3 * tolerance)


def dense_product(key, x, *, sigma_w, width, distribution):
    from gradflow.simulation import _matrices

    weights = _matrices.drawn(key, (width, x.shape[1]), distribution, x.dtype).weights
    return jnp.matmul(x * (sigma_w / x.shape[1] ** 0.5), weights.T)


@pytest.mark.slow
def test_a_residual_network_that_doubles_leaves_no_float(key):
    """ReLU, unscaled: q and mean squared gradients double in each of 1500 blocks, to 2^1500.

    At width 128 the logarithm of one network grows by 2.5 % less, from a simulation in NumPy that
    is no part of this test; a tolerance of 6 % is far from what an error would make of it.
    """
    network = builders.residual(8, 128, 1500, "relu", "he")
    assert network.homogeneous
    found = walk(network, jnp.ones((1, 8)), key, sampler="matrix_free")
    predicted = predict(builders.residual(8, 32, 100, "relu", "he"), jnp.ones((1, 1)))
    np.testing.assert_allclose(np.diff(predicted["log_q"]), np.log(2), rtol=1e-4)
    for name in ("log_q", "log_gradient_variance"):
        assert np.isfinite(found[name]).all()
    assert abs(found["log_q"][-1] / 1500 / np.log(2) - 1) < 0.06
    assert abs(found["log_gradient_variance"][0] / 1500 / np.log(2) - 1) < 0.06


def test_norms_do_not_see_the_scale_of_their_input(key):
    x = jax.random.normal(key, (3, 20)) + 1
    for block in (LayerNorm(2.0), RMSNorm(2.0)):
        out = block.apply(x, dense_product, key)
        np.testing.assert_allclose(out, block.apply(1e3 * x, dense_product, key), rtol=1e-5)
        np.testing.assert_allclose(jnp.mean(out**2, axis=1), 4, rtol=1e-5)
        assert (block.apply(jnp.zeros((1, 4)), dense_product, key) == 0).all()
        assert not block.homogeneous
    np.testing.assert_allclose(
        jnp.mean(LayerNorm().apply(x, dense_product, key), axis=1), 0, atol=1e-6
    )


def test_unit_variance_is_of_the_whole_batch_and_a_constant_to_gradients(key):
    x = jax.random.normal(key, (3, 20)) * jnp.array([[1.0], [2.0], [3.0]]) + 1
    block, scale = UnitVariance(), 1 / jnp.std(x)
    out, pull = jax.vjp(lambda x: block.apply(x, dense_product, key), x)
    np.testing.assert_allclose(out, scale * x, rtol=1e-5)
    np.testing.assert_allclose(pull(x)[0], scale * x, rtol=1e-5)
    np.testing.assert_allclose(block.apply(1e25 * x, dense_product, key), out, rtol=1e-4, atol=1e-6)
    assert (block.apply(jnp.ones((2, 4)), dense_product, key) == 0).all()


@pytest.mark.medium
def test_maxout_of_two_gaussians(key):
    """Clark 1961: of correlation 0 and variance q, the maximum has mean √(q/π) and square q."""
    kernel = Kernel.of(jnp.array([[1.0, 0.5], [0.5, 2.0]]))
    found = Maxout(Linear(9, 1.5**0.5)).kernel(kernel)
    q = jnp.array([1.5, 3.0])
    np.testing.assert_allclose(found.mean, jnp.sqrt(q / np.pi), rtol=1e-6)
    np.testing.assert_allclose(jnp.diagonal(found.covariance), q, rtol=1e-6)
    # Null: the kernel; 4·10^6 pairs, whose mean product has a standard error of about 1e-3.
    root = jnp.linalg.cholesky(1.5 * kernel.covariance)
    u = jnp.max(jnp.einsum("ab,bkn->akn", root, jax.random.normal(key, (2, 2, 4_000_000))), axis=1)
    np.testing.assert_allclose(jnp.mean(u[0] * u[1]), found.covariance[0, 1], atol=6e-3)


@pytest.mark.medium
def test_a_gate_that_is_always_open_is_no_gate():
    """f(h)·g(h) with g = bias of 1 in law: second moments of f, and its gradient."""
    kernel = Kernel.of(jnp.array([[1.0, 0.5], [0.5, 2.0]]))
    found = Gated(Linear(9, 1.3), Linear(9, 0.0, 1.0)).kernel(kernel)
    np.testing.assert_allclose(found.covariance, 1.69 * kernel.covariance, rtol=1e-6)
    gain = jnp.exp(log_gain(Gated(Linear(9, 1.3), Linear(9, 0.0, 1.0)), kernel))
    np.testing.assert_allclose(gain, 1.69, rtol=1e-6)


def test_dropout_keeps_means_and_meets_the_same_mask_again(key):
    x = jnp.ones((2, 20_000))
    out = Dropout(0.7).apply(x, dense_product, key)
    assert (out == Dropout(0.7).apply(x, dense_product, key)).all()
    # Null: 20000 units kept with probability 0.7; 5 standard deviations of their share are 0.016.
    np.testing.assert_allclose(jnp.mean(out, axis=1), 1, atol=0.016 / 0.7)
    assert not (out[0] == out[1]).all()


def test_standardised_weights_do_not_pass_a_mean_on(key):
    weights = ensembles.standardised.draw(key, (5, 40), jnp.zeros(0).dtype)
    np.testing.assert_allclose(weights.sum(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose((weights**2).mean(axis=1), 1, rtol=1e-5)
    network = builders.mlp([4, 30, 30, 30], "relu", ensembles.fan_in(1.0, "standardised"))
    q = predict(network, jnp.ones((1, 1)))["q"]
    np.testing.assert_allclose(q, (0.5 * (1 - 1 / np.pi)) ** np.arange(3), rtol=1e-5)  # Var ReLU


@pytest.mark.slow
def test_a_zero_branch_is_the_identity(key):
    network = builders.residual(8, 20, 5, "tanh", scale="zero")
    found = walk(network, jnp.ones((1, 8)), key)
    np.testing.assert_allclose(found["chi"][:-1], 1, rtol=1e-5)
    np.testing.assert_allclose(predict(network, jnp.ones((1, 1)))["chi"][:-1], 1)


def test_a_skip_has_a_scale_of_its_own(key):
    """λ x + α f(x): k' = λ² k + α² σ_w² k, χ = λ² + α² σ_w²."""
    block = Residual(Linear(6, 1.5), 0.5, skip_scale=2.0)
    kernel = Kernel.of(jnp.array([[1.0, 0.5], [0.5, 2.0]]))
    gain = 4 + 0.25 * 2.25
    np.testing.assert_allclose(block.kernel(kernel).covariance, gain * kernel.covariance, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(log_gain(block, kernel)), gain, rtol=1e-6)
    x = jax.random.normal(key, (2, 6))
    plain, skipped = (
        Residual(Linear(6), 1.0, scale).apply(x, dense_product, key) for scale in (None, -3.0)
    )
    np.testing.assert_allclose(skipped, plain - 4 * x, rtol=1e-5, atol=1e-5)
    # A branch that carries the stream itself: 3 x + (x + f)/2 has 3.5² of x, and not 3² + 0.5².
    nested = Residual(Residual(Linear(6)), 0.5, skip_scale=3.0)
    found = nested.kernel(kernel).covariance
    np.testing.assert_allclose(found, (3.5**2 + 0.25) * kernel.covariance, rtol=1e-6)


def test_moments_of_sums_have_the_products_of_means():
    """x + f with E x = 1 and E f = 2: E (x + f)² = E x² + E f² + 2·1·2."""
    one, other = (
        Kernel.of(jnp.full((1, 1), k), jnp.full(1, m)) for k, m in ((3.0, 1.0), (5.0, 2.0))
    )
    total = one.plus(other)
    np.testing.assert_allclose(total.covariance, 12.0)
    np.testing.assert_allclose(total.mean, 3.0)


def test_networks_tell_their_shapes():
    network = builders.residual(9, 30, 3, "gelu", layers=2, hidden=50, weights_first=True)
    assert network.widths == (9, 30, 30, 30, 30)
    assert network.shapes[0] == ((30, 9),)
    assert network.shapes[1] == ((50, 30), (50, 50), (30, 50))
    assert networks.divide_widths(network, 10).shapes[1] == ((5, 3), (5, 5), (3, 5))
    assert builders.stack(4, [Linear(6), (Dense(units=6), 2)]).widths == (4, 6, 6, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: builders.mlp([4, 4], norm="batchh"), "unknown norm 'batchh'"),
        (
            lambda: builders.mlp([4, 4, 4], norm="layer", norm_position="mid"),
            "unknown norm_position 'mid'",
        ),
        (
            lambda: builders.mlp([4, 4, 4], keep_rate=0.0),
            "keep_rate is 0.0; a probability to keep is above",
        ),
        (lambda: builders.residual(4, 4, 2, scale="half"), "unknown scale 'half'"),
        (lambda: builders.residual(4, 4, 2, scale=-1.0), "scale is -1.0"),
        (lambda: builders.residual(4, 4, 0), "depth is 0"),
        (
            lambda: builders.stack(4, [Residual(Dense(units=5))]),
            "a residual branch takes 4 units and hands on 5",
        ),
        (lambda: builders.stack(4, [(Dense(units=5), 2)]), "repeated 2 times, takes 4 units"),
        (lambda: builders.stack(4, []), "blocks is empty"),
        (lambda: Residual(LayerNorm()), "a residual branch has no random matrix"),
        (lambda: Gated(gate=Activate()), "the gate of a gated layer has no random matrix"),
        (
            lambda: builders.stack(4, [Gated(Linear(5), Linear(6))]),
            "a gated layer's value has 5 units and its gate 6",
        ),
        (
            lambda: mean_field.predict(
                builders.stack(4, [Chain((Activate(), Dropout(), Dense(units=4)))]),
                jnp.ones((1, 1)),
            ),
            "'tanh' acts on a signal that is not Gaussian over units",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_all_has_every_block_of_every_file():
    """So that neither a name in ``__all__`` nor a file's line in the package can be forgotten."""
    names = [f.name for f in pkgutil.iter_modules(blocks.__path__) if not f.name.startswith("_")]
    classes = {
        value
        for name in names
        for value in vars(importlib.import_module(f"gradflow.blocks.{name}")).values()
        if inspect.isclass(value) and issubclass(value, AbstractBlock)
    }
    assert set(blocks.ALL) == {block for block in classes if not inspect.isabstract(block)}


def test_every_block_can_be_made_without_arguments():
    assert len(blocks.ALL) >= 8
    for block in blocks.ALL:
        made = block()
        width = made.width_in or 100
        assert len(made.shapes(width)) == made.n_weights
        assert made.width_after(width) == width
