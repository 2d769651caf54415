"""Jacobians, and the singular values of products that no float could hold."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from gradflow import builders
from gradflow.errors import InputError
from gradflow.simulation import _lanczos, jacobians, singular_values

# What is asked of float64; what is measured is below 1e-11.
PROMISED = 1e-8


@pytest.mark.parametrize("name", ["gaussian", "orthogonal", "tanh", "relu", "narrowing"])
def test_log_singular_values_are_those_of_200_digits(name, load_reference):
    """Products of 40 matrices, whose singular values range over e^80, computed with mpmath."""
    (row,) = [row for row in load_reference("jacobian_products") if row["name"] == name]
    expected = np.array([-math.inf if v is None else v for v in row["log_singular_values"]])
    for dtype in (np.float64, np.float32) if jax.config.jax_enable_x64 else (np.float32,):
        # The table is of float32 matrices.
        factors = [jnp.asarray(np.array(f, np.float32), dtype) for f in row["factors"]]
        found = singular_values.log_singular_values(factors)
        assert found.log.dtype == dtype
        alive = np.isfinite(expected)
        assert int(found.zeros) == (~alive).sum()
        np.testing.assert_array_equal(np.isneginf(found.log), ~alive)
        tolerance = PROMISED if dtype == np.float64 else 1e-5
        np.testing.assert_allclose(found.log[alive], expected[alive], atol=tolerance, rtol=1e-6)
        assert float(found.cosine) < 1e-12


def test_jit_and_vmap_agree_with_one_at_a_time():
    factors = jax.random.normal(jax.random.key(0), (3, 20, 7, 7))
    together = jax.jit(jax.vmap(singular_values.log_singular_values))(factors).log
    one = jnp.stack([singular_values.log_singular_values(each).log for each in factors])
    listed = jnp.stack([singular_values.log_singular_values(list(each)).log for each in factors])
    np.testing.assert_allclose(together, one, atol=1e-9 if jax.config.jax_enable_x64 else 1e-3)
    np.testing.assert_allclose(listed, one, atol=1e-6)


def test_a_single_matrix_has_the_singular_values_of_its_svd():
    for shape in ((6, 6), (4, 9), (9, 4), (1, 5), (1, 1)):
        a = np.random.default_rng(0).normal(size=shape)
        found = singular_values.log_singular_values([jnp.asarray(a)])
        np.testing.assert_allclose(found.log, np.log(np.linalg.svd(a)[1]), atol=1e-5)
    same = singular_values.log_singular_values([jnp.eye(5)])
    np.testing.assert_allclose(same.log, np.zeros(5), atol=1e-6)
    none = singular_values.log_singular_values([jnp.zeros((3, 3)), jnp.eye(3)])
    assert int(none.zeros) == 3


@pytest.mark.slow
def test_lyapunov_exponents_of_gaussian_products():
    """(1/L) log s_i -> (ψ((n - i + 1)/2) + log(2/n))/2, entries of variance 1/n (Newman 1986).

    40 products of 2000 matrices of width 8. Null: means within 4.5 standard errors of the limit, to
    2/L for what the first factors add; false alarms below 1e-4.
    """
    n, depth, count = 8, 2000, 40

    def product(key):
        factors = jax.random.normal(key, (depth, n, n)) / math.sqrt(n)
        return singular_values.log_singular_values(factors).log / depth

    found = np.asarray(jax.lax.map(product, jax.random.split(jax.random.key(1), count)))
    i = np.arange(1, n + 1)
    expected = (scipy.special.digamma((n - i + 1) / 2) + math.log(2 / n)) / 2
    error = found.std(axis=0, ddof=1) / math.sqrt(count)
    assert (np.abs(found.mean(axis=0) - expected) < 4.5 * error + 2 / depth).all()


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([], "factors is empty"),
        ([np.ones(3)], "each is (rows, columns)"),
        ([np.ones((3, 3)), np.ones((2, 4))], "a matrix (2, 4) after one (3, 3)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors, message):
    with pytest.raises(InputError) as error:
        singular_values.log_singular_values(factors)
    assert message in str(error.value)


def network_and_inputs(width=60, depth=4, weights="glorot"):
    network = builders.mlp([width] * (depth + 1), "tanh", weights)
    return network, jax.random.normal(jax.random.key(5), (1, width), jnp.float32)


@pytest.mark.parametrize("weights", ["glorot", "standard"])
@pytest.mark.parametrize(("above", "trailing"), [(4, 0), (1, 2)])
def test_extremes_are_those_of_the_product_multiplied_out(weights, above, trailing):
    network, x = network_and_inputs(weights=weights)
    key = jax.random.key(3)
    found = singular_values.extreme_singular_values(
        network, x, key, leading=5, trailing=trailing, sampler="dense", above=above
    )
    product = np.eye(60)
    for factor in jacobians.layer_jacobians(network, x[0], key)[:above]:
        product = np.asarray(factor, np.float64) @ product
    exact = np.log(np.linalg.svd(product)[1])
    assert found.converged
    # The tolerance asked for is 1e-3, of estimated errors.
    np.testing.assert_allclose(found.log_largest, exact[:5], atol=2e-3)
    np.testing.assert_allclose(found.log_smallest, exact[::-1][:trailing], atol=2e-3)


def test_what_is_below_rounding_is_not_called_converged():
    """Of a product of four layers the smallest is some 1e-8 times the largest."""
    network, x = network_and_inputs()
    found = singular_values.extreme_singular_values(
        network, x, jax.random.key(3), leading=1, trailing=1, sampler="dense"
    )
    assert not found.converged
    assert found.error_largest[0] < 1e-3 < found.error_smallest[0]


@pytest.mark.medium
def test_extremes_of_a_stretch_and_of_layers_held_apart(monkeypatch):
    network, x = network_and_inputs()
    ask = functools.partial(
        singular_values.extreme_singular_values,
        *(network, x, jax.random.key(3)),
        leading=2,
        sampler="matrix_free",
        below=1,
        above=3,
    )
    together = ask()
    monkeypatch.setattr(_lanczos, "_WORTH_HOLDING_APART", 0)
    apart = ask()
    assert together.sampler == "matrix_free"
    assert together.converged
    np.testing.assert_allclose(together.log_largest, apart.log_largest, atol=2e-3)


@pytest.mark.medium
def test_the_largest_of_one_wide_gaussian_layer_is_at_the_edge():
    """Width 3000: s² is 4 - 1.2·2^(4/3) n^(-2/3) ± 1.3·2^(4/3) n^(-2/3) (Johnstone 2001)."""
    network = builders.mlp([3000, 3000], "linear", "lecun")
    found = singular_values.extreme_singular_values(
        network, jnp.ones((1, 3000)), jax.random.key(1), leading=1
    )
    unit = 2 ** (4 / 3) * 3000 ** (-2 / 3)
    # Six standard deviations of Tracy & Widom's law.
    assert abs(np.exp(2 * found.log_largest[0]) - (4 - 1.2 * unit)) < 6 * 1.3 * unit


@pytest.mark.slow
def test_too_few_steps_are_said():
    network, x = network_and_inputs()
    found = singular_values.extreme_singular_values(
        network, x, jax.random.key(3), leading=10, most_steps=12
    )
    assert not found.converged
    assert found.steps == 12
    assert found.error_largest.max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leading": -1}, "leading is -1"),
        ({"leading": 0}, "leading and trailing are 0"),
        ({"tolerance": 0.0}, "tolerance is 0.0; it is a finite number above 0"),
        ({"memory_budget": 1000}, r"need .* GiB and .* GiB are free"),
        ({"above": 9}, "above is 9"),
    ],
)
def test_extremes_of_what_is_not_there_are_refused(options, message):
    network, x = network_and_inputs()
    with pytest.raises(InputError, match=message):
        singular_values.extreme_singular_values(network, x, jax.random.key(0), **options)
