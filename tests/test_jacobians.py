"""The Jacobian as an operator, on both samplers, and what is made of it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import smallest_p_value

from gradflow import builders, ensembles, training
from gradflow.errors import InputError
from gradflow.simulation import jacobians, partial_norms, propagation, singular_values

# Two-sample tests with 20 000 networks a side. Null: one law. The false-alarm rate is for all the
# tests of one case together (Bonferroni), at fixed keys.
NETWORKS = 20_000
FALSE_ALARM_RATE = 0.01
RECTANGULAR = (4, 6, 6, 6, 3)


def mlp(widths=RECTANGULAR, activation="tanh", weights="gaussian", sigma_b=0.2):
    return builders.mlp(widths, activation, ensembles.fan_in(1.3, weights), sigma_b=sigma_b)


def true(product):
    return product.direction * jnp.exp(product.log_norm)[:, None, None]


def multiplied(factors):
    product = factors[0]
    for factor in factors[1:]:
        product = factor @ product
    return product


@pytest.mark.medium
@pytest.mark.parametrize("activation", ["tanh", pytest.param("relu", marks=pytest.mark.slow)])
def test_layer_jacobians_are_those_of_the_network_that_is_propagated(activation):
    network = builders.mlp([5, 8, 8, 8, 3], activation, "he", sigma_b=0.1)
    key, x = jax.random.key(3), jnp.linspace(-1, 1, 5)
    factors = jacobians.layer_jacobians(network, x, key)
    assert [factor.shape for factor in factors] == [(8, 5), (8, 8), (8, 8), (3, 8)]
    drawn = propagation.signals(network, x[None], key)
    delta = np.exp(drawn.log_gradient_norm[-1][-1, 0]) * np.asarray(drawn.gradient[-1][-1, 0])
    for layer, stage in ((3, 1), (2, 1), (1, 0)):
        delta = np.asarray(factors[layer]).T @ delta
        place = (layer - 1) - (0 if stage == 0 else 1)
        norm = np.exp(drawn.log_gradient_norm[stage][place, 0])
        np.testing.assert_allclose(
            delta, norm * np.asarray(drawn.gradient[stage][place, 0]), rtol=2e-5, atol=1e-6
        )


@pytest.mark.medium
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_given_weights_have_the_jacobian_of_the_network_they_were_drawn_for(tied):
    tanh = ensembles.fan_in(1.3)
    recurrent = builders.recurrent(4, 5, 3, "tanh", tanh, sigma_b=0.2)
    network, key = recurrent if tied else mlp(), jax.random.key(1)
    x = jnp.linspace(-1, 1, 4, dtype=jnp.float32)[None]
    weights = training.initial_weights(network, key)
    drawn, given = (
        jax.jit(
            lambda weights: singular_values.of_jacobian(
                jacobians.draw(network, x, key, sampler="dense", weights=weights)
            )
        )(weights)
        for weights in (None, weights)
    )
    np.testing.assert_allclose(given.log, drawn.log, atol=1e-4)
    whole = jax.jacobian(lambda x: training.outputs(network, weights, x[None], key)[0])(x[0])
    expected = np.log(np.linalg.svd(np.asarray(whole, np.float64), compute_uv=False))
    np.testing.assert_allclose(given.log, expected, atol=1e-4)
    other = jax.tree.map(lambda w: 1.1 * w, weights)
    found = singular_values.of_jacobian(jacobians.draw(network, x, key, weights=other))
    assert not np.allclose(found.log, drawn.log, atol=1e-2)


@pytest.mark.medium
@pytest.mark.parametrize(("below", "above"), [(0, None), (0, 2), (1, 3), (3, 4), (2, 4)])
@pytest.mark.parametrize("apart", [False, True])
def test_products_are_those_of_the_layers_multiplied_out(below, above, apart):
    network, key = mlp(), jax.random.key(1)
    x = jnp.linspace(-1, 1, 4)
    whole = multiplied(jacobians.layer_jacobians(network, x, key)[below:above])
    m, n = whole.shape
    jacobian = jacobians.draw(
        network, x[None], key, sampler="dense", below=below, above=above, apart=apart
    )
    assert (jacobian.tangent_shape, jacobian.cotangent_shape) == ((1, n), (1, m))
    v, u = jax.random.normal(key, (2, 1, n)), jax.random.normal(key, (3, 1, m))
    forth = jacobian.times(v)
    np.testing.assert_allclose(true(forth)[:, 0], v[:, 0] @ whole.T, atol=1e-5)
    back = forth.jacobian.transpose_times(u)
    np.testing.assert_allclose(true(back)[:, 0], u[:, 0] @ whole, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(back.direction, axis=(1, 2)), 1, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_network_without_weights_is_one_linear_map(weights, apart):
    """u·(J v) = (Jᵀ u)·v for all v and u asked one after the other; sums go to sums."""
    x = jax.random.normal(jax.random.key(2), (2, 4), jnp.float32)
    jacobian = jacobians.draw(
        mlp(weights=weights),
        x,
        jax.random.key(0),
        sampler="matrix_free",
        tangents=6,
        cotangents=2,
        apart=apart,
    )
    vs, us, said, back = [], [], [], []
    for i in range(2):
        v = jax.random.normal(jax.random.key(10 + i), (2, 2, 4), jnp.float32)
        forth = jacobian.times(v)
        u = true(forth)[:1] ** 2 + 1
        pulled = forth.jacobian.transpose_times(u)
        jacobian = pulled.jacobian
        vs, us = [*vs, v], [*us, u]
        said, back = [*said, true(forth)], [*back, true(pulled)]
    vs, us, said, back = (
        np.concatenate(a).reshape(len(a) * len(a[0]), -1) for a in (vs, us, said, back)
    )
    np.testing.assert_allclose(us @ said.T, back @ vs.T, rtol=2e-4, atol=2e-4)
    total = jacobian.times(jnp.asarray(vs.sum(axis=0).reshape(1, 2, 4)))
    np.testing.assert_allclose(true(total).ravel(), said.sum(axis=0), rtol=2e-4, atol=2e-4)


def conversation(network, sampler, key):
    """Two gradients, then two tangents of which one follows from them, through one network."""
    jacobian = jacobians.draw(
        network, jnp.ones((1, 4)), key, sampler=sampler, tangents=2, cotangents=2
    )
    n = network.widths[-1]
    u = jnp.stack([jnp.ones(n), jnp.arange(n)]).astype(jnp.float32)[:, None]
    back = jacobian.transpose_times(u)
    v = jnp.stack([back.direction[0], jnp.ones((1, 4), jnp.float32)])
    forth = back.jacobian.times(v)
    return jnp.concatenate([true(back).ravel(), true(forth).ravel(), forth.log_norm])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "weights", "widths"),
    [
        ("tanh", "gaussian", RECTANGULAR),
        ("relu", "orthogonal", (4, 3, 3, 3)),
        ("relu", "gaussian", (4, 5, 5, 3)),
        ("tanh", "orthogonal", RECTANGULAR),
    ],
)
def test_gradients_and_tangents_have_the_joint_law_of_a_drawn_network(activation, weights, widths):
    network = mlp(widths, activation, weights)

    def sample(sampler, seed):
        keys = jax.random.split(jax.random.key(seed), NETWORKS)
        said = jax.jit(jax.vmap(lambda k: conversation(network, sampler, k)))(keys)
        # Orthogonal layers without a dead unit keep all lengths: that is an atom, up to rounding.
        return np.round(said, 5)

    drawn, free = sample("dense", 0), sample("matrix_free", 1)
    assert smallest_p_value(drawn, free) > FALSE_ALARM_RATE


def coefficients(network, sampler, key, steps):
    jacobian = jacobians.draw(
        network,
        jnp.ones((1, network.input_width)),
        key,
        sampler=sampler,
        tangents=steps + 1,
        cotangents=steps,
    )
    start = jax.random.normal(jax.random.fold_in(key, 1), (network.input_width,), jnp.float32)
    found = singular_values.bidiagonalise(jacobian, start, steps)
    return jnp.exp(found.log_unit) * jnp.concatenate([found.alpha, found.beta[:steps]])


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "steps"), [("gaussian", 3), ("orthogonal", 4)])
def test_golub_kahan_has_the_law_of_a_drawn_network(weights, steps):
    network = mlp((6, 6, 6, 6), "tanh", weights)

    def sample(sampler, seed):
        keys = jax.random.split(jax.random.key(seed), NETWORKS)
        return np.asarray(
            jax.jit(jax.vmap(lambda k: coefficients(network, sampler, k, steps)))(keys)
        )

    drawn, free = sample("dense", 2), sample("matrix_free", 3)
    assert smallest_p_value(drawn, free) > FALSE_ALARM_RATE


@pytest.mark.medium
@pytest.mark.parametrize("sampler", ["dense", "matrix_free"])
def test_golub_kahan_of_one_gaussian_layer_has_independent_chi_coefficients(sampler):
    """α_i ~ χ(m - i + 1), β_i ~ χ(n - i), independent, for m×n entries of variance 1 (Householder).

    Null: that. 20 000 networks, against as many draws of the exact law; false alarms below 1 %.
    """
    m, n, steps = 5, 4, 3
    network = builders.mlp((n, m), "linear", ensembles.fan_in(math.sqrt(n)))
    keys = jax.random.split(jax.random.key(4), NETWORKS)
    found = jax.jit(jax.vmap(lambda k: coefficients(network, sampler, k, steps)))(keys)
    degrees = [*(m - i for i in range(steps + 1)), *(n - 1 - i for i in range(steps))]
    exact = np.sqrt(np.random.default_rng(0).chisquare(degrees, (NETWORKS, len(degrees))))
    keep = [0, 1, 2, 4, 5, 6]  # α_4 of four columns is the last of all
    assert smallest_p_value(np.asarray(found)[:, keep], exact[:, keep]) > FALSE_ALARM_RATE


@pytest.mark.medium
def test_norms_are_exact_and_traces_within_their_errors():
    """Null: a mean of 4000 probes is within 4.5 of its errors; false alarms 1e-5 each."""
    network, key = mlp(), jax.random.key(5)
    x = jnp.linspace(-1, 1, 4)
    factors = jacobians.layer_jacobians(network, x, key)
    spectrum = singular_values.log_singular_values(factors)
    whole = np.asarray(multiplied(factors), np.float64)
    jacobian = jacobians.draw(network, x[None], key, sampler="dense", tangents=4, cotangents=0)
    np.testing.assert_allclose(
        jacobians.log_frobenius_norm(jacobian), np.log(np.linalg.norm(whole)), atol=1e-5
    )
    estimate = jacobians.log_traces(jacobian, jax.random.key(6), powers=3, probes=4000)
    for power in (1, 2, 3):
        exact = np.trace(np.linalg.matrix_power(whole @ whole.T, power))
        np.testing.assert_allclose(spectrum.log_trace(power), np.log(exact), atol=1e-5)
        found, error = (np.exp(value[power - 1]) for value in estimate)
        assert abs(found - exact) < 4.5 * error
        assert error < 0.1 * exact


@pytest.mark.slow
def test_partial_norms_of_all_pairs_of_layers():
    """Null: as above, for 10 pairs with 4000 probes each."""
    network, key = mlp(), jax.random.key(7)
    x = jnp.linspace(-1, 1, 4)
    factors = jacobians.layer_jacobians(network, x, key)
    exact = partial_norms.log_partial_norms(factors)
    estimate = partial_norms.sampled_partial_norms(
        network, x[None], key, probes=4000, sampler="dense"
    )
    for l in range(5):  # noqa: E741
        for m in range(5):
            if m < l:
                assert np.isnan(exact[l, m])
                assert np.isnan(estimate.log[l, m])
            elif m == l:
                assert exact[l, m] == estimate.log[l, m] == 0
            else:
                norm = np.sum(np.asarray(multiplied(factors[l:m])) ** 2) / network.widths[m]
                np.testing.assert_allclose(exact[l, m], np.log(norm), atol=1e-5)
                error = np.exp(estimate.log_standard_error[l, m])
                assert abs(np.exp(estimate.log[l, m]) - norm) < 4.5 * error + 1e-5 * norm


def test_partial_norms_without_weights_are_in_the_mean_what_theory_says():
    """E (1/n_m) ‖∂z^m/∂z^l‖² = (σ_w²/2)^(m-l) n_l/n_l, exactly, for ReLU without biases.

    Null: means over 4000 networks within 4.5 standard errors; false alarms below 1e-4 in all.
    """
    network = builders.mlp([20] * 5, "relu", ensembles.fan_in(1.2))
    keys = jax.random.split(jax.random.key(8), 4000)
    x = jnp.ones((1, 20))

    def one(key):
        return partial_norms.sampled_partial_norms(network, x, key, sampler="matrix_free").log

    values = np.exp(np.asarray(jax.jit(jax.vmap(one))(keys)))
    mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(len(values))
    gain = 1.2**2 / 2
    for l in range(1, 5):  # noqa: E741
        for m in range(l + 1, 5):
            assert abs(mean[l, m] - gain ** (m - l)) < 4.5 * error[l, m]
    # The input passes no activation.
    assert abs(mean[0, 1] - 1.2**2) < 4.5 * error[0, 1]


def test_norms_of_a_deep_network_are_right_where_no_float_holds_them():
    network = builders.mlp([40] * 401, "logistic", "glorot")
    jacobian = jacobians.draw(network, jnp.ones((1, 40)), jax.random.key(0))
    v = jnp.ones((1, 1, 40), jnp.float32)
    log_norm = jacobian.times(v).log_norm[0]
    # χ = 0.0557 a layer: the norm goes as its root, e^-1.444.
    assert -1.7 * 400 < log_norm < -1.3 * 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"below": 2, "above": 2}, "below is 2 and above is 2"),
        ({"above": 9}, "4, the network's depth"),
        ({"below": -1}, "below is -1"),
        ({"sampler": "dens"}, "did you mean 'dense'"),
        ({"tangents": -1}, "tangents is -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(InputError) as error:
        jacobians.draw(mlp(), jnp.ones((1, 4)), jax.random.key(0), **options)
    assert message in str(error.value)


@pytest.mark.medium
@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"inputs has shape \(1, 5\)"):
        jacobians.draw(mlp(), jnp.ones((1, 5)), jax.random.key(0))
    jacobian = jacobians.draw(mlp(), jnp.ones((1, 4)), jax.random.key(0))
    with pytest.raises(InputError, match=r"tangents has shape \(4,\); it is \(how many, 1 inputs"):
        jacobian.times(jnp.ones(4))
    with pytest.raises(InputError, match="cotangents has shape"):
        jacobian.transpose_times(jnp.ones((1, 1, 4)))
    with pytest.raises(InputError, match="places is 2"):
        jacobian.times(jnp.ones((5, 1, 4)))
