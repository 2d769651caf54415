"""BatchNorm: averages over a batch, reference table 8, and one network simulated."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations, builders, statistics
from gradflow.blocks import Activate, BatchNorm, Chain, Linear
from gradflow.errors import InputError
from gradflow.gaussian import _batch
from gradflow.simulation import jacobians, monte_carlo
from gradflow.simulation.propagation import propagate
from gradflow.theory import architectures, float64, mean_field

TABLE = 1e-10
predict = jax.jit(mean_field.predict)


def rows_of(load_reference, kind):
    return [
        (row["inputs"], float(row["values"]["chi_per_layer"]))
        for row in load_reference("t8_residual_norm_dropout")
        if row["inputs"].get("kind") == kind
    ]


def layer(activation, sigma_w=1.3, sigma_b=0.2):
    return Chain((BatchNorm(), Activate(activation), Linear(1, sigma_w, sigma_b)))


def walked_chi(activation, size, sigma_w=1.3):
    """χ of the lowest of three layers, whatever the batch was at first, at its fixed point."""
    found = predict(builders.stack(1, [(layer(activation, sigma_w), 3)]), jnp.eye(size) + 0.3)
    return float(found["chi"][0])


@pytest.mark.usefixtures("x64_only")
class TestTable8:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["linear", "relu"])
    def test_chi_of_finite_batches(self, load_reference, name):
        """By the integral for any batch, and by that over the sphere."""
        phi = activations.get(name)
        for given, chi in rows_of(load_reference, f"BN_{name}"):
            size = math.inf if given["B"] == "inf" else int(given["B"])
            assert float(architectures.batch_norm_chi(phi, size)) == pytest.approx(chi, rel=TABLE)
            if size <= 32:
                assert walked_chi(phi, size) == pytest.approx(chi, rel=TABLE)

    def test_chi_of_infinite_batches(self, load_reference):
        for given, chi in rows_of(load_reference, "BN_preact_Binf"):
            found = architectures.batch_norm_chi(activations.get(given["activation"]), math.inf)
            assert float(found) == pytest.approx(chi, rel=TABLE)
            assert Fraction(given["sw2"]) > 0  # on which it does not depend


@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize(
    "size",
    [pytest.param(5, marks=pytest.mark.medium), pytest.param(16, marks=pytest.mark.medium), 64],
)
def test_relu_in_closed_form(size):
    """The table's own formula, at other batches: P and k₁ of a pair of correlation -1/(B - 1)."""
    rho = -1 / (size - 1)
    p = 1 / 4 + math.asin(rho) / (2 * math.pi)
    k1 = (math.sqrt(1 - rho**2) + rho * (math.pi - math.acos(rho))) / (2 * math.pi)
    exact = (size / 2 - 1 + p + k1) / ((size - 3) * (1 / 2 - k1))
    found = architectures.batch_norm_chi(activations.relu, size)
    assert float(found) == pytest.approx(exact, rel=TABLE)
    if size < 64:
        assert walked_chi(activations.relu, size) == pytest.approx(exact, rel=TABLE)


@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize("name", ["tanh", "hard_tanh", "gelu"])
def test_large_batches_tend_to_the_infinite_one(name):
    """As 1/B: the gap to B = ∞, times B, is the same at 10³ and 10⁴ to 5 %."""
    phi = activations.get(name)
    limit = architectures.batch_norm_chi(phi, math.inf)
    gaps = [size * (architectures.batch_norm_chi(phi, size) - limit) for size in (1000, 10_000)]
    assert float(gaps[0]) == pytest.approx(float(gaps[1]), rel=0.05)


@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize("name", ["relu", "linear"])
def test_the_integral_for_any_batch_against_draws(name):
    """A batch of 6 with a random covariance; 2^15 draws of its units.

    Null: entries are averages of 32768 draws, half independent, of a relative spread below 3: 5
    standard errors of the largest are 0.08 of it. Dropping a term of T changes it by 0.2.
    """
    rng = np.random.default_rng(1)
    (k, s) = (a @ a.T / a.shape[1] for a in (rng.normal(size=(6, 9)), rng.normal(size=(6, 7))))
    phi = activations.get(name)
    second, mean, moved = _batch.averages(phi, jnp.asarray(k), jnp.asarray(s))
    factor = np.linalg.cholesky(k)
    x = rng.normal(size=(32_768, 6)) @ factor.T
    x -= x.mean(axis=1, keepdims=True)
    r = np.linalg.norm(x, axis=1)
    z = math.sqrt(6) * x / r[:, None]
    value, slope = np.asarray(phi(z)), np.asarray(phi.derivative(z))
    g = np.eye(6) - 1 / 6
    j = (
        math.sqrt(6)
        / r[:, None, None]
        * (g - np.einsum("ka,kb->kab", x, x) / r[:, None, None] ** 2)
    )
    j = slope[:, :, None] * j
    for found, drawn in (
        (second, value.T @ value / len(value)),
        (mean, value.mean(axis=0)),
        (moved, np.einsum("kac,cd,kbd->ab", j, s, j, optimize=True) / len(value)),
    ):
        np.testing.assert_allclose(found, drawn, atol=0.08 * max(1, np.abs(drawn).max()))


@pytest.mark.slow
@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize(("far", "error"), [(1.0, 0.01), (0.1, 0.001)])
def test_any_activation_in_any_batch(far, error):
    """ReLU as if nothing were known of it, against its integral: better the more alike inputs are.

    Null: of 2^18 draws (a batch of 8) averages are off by 0.2 % of what is not alike; the bounds
    are 5 times as large.
    """
    rng = np.random.default_rng(1)
    k, s = (
        (1 - far) * np.eye(8) + far * a @ a.T / a.shape[1]
        for a in (rng.normal(size=(8, 9)), rng.normal(size=(8, 7)))
    )
    unknown = dataclasses.replace(activations.relu, homogeneous=False)
    exact = _batch.averages(activations.relu, jnp.asarray(k), jnp.asarray(s))
    found = _batch.averages(unknown, jnp.asarray(k), jnp.asarray(s))
    for a, b in zip(exact, found, strict=True):
        np.testing.assert_allclose(a, b, atol=error * max(float(jnp.abs(a).max()), 1))


@pytest.mark.medium
def test_the_gradient_of_a_batch_is_that_of_autodiff(key):
    """The way down, layer by layer at one common scale, against `jax.vjp` of the whole network."""
    network = builders.mlp([7, 20, 20, 20], "tanh", "he", norm="batch")
    x = jax.random.normal(key, (5, 7))
    found = jax.jit(propagate, static_argnames="sampler")(network, x, key, sampler="dense")
    jacobian = jacobians.draw(network, x, key, sampler="dense", below=1)
    top = jax.random.normal(jax.random.split(key, network.depth + 1)[0], (5, 20))
    below = jacobian.transpose_times(top[None])
    rows = jnp.linalg.norm(below.direction[0], axis=1) * jnp.exp(below.log_norm[0])
    np.testing.assert_allclose(found["log_gradient_norm"][0], jnp.log(rows).mean(), rtol=1e-4)
    square = jnp.mean(rows**2) / 20
    np.testing.assert_allclose(found["log_gradient_variance"][0], jnp.log(square), atol=1e-4)


@pytest.mark.medium
def test_theory_meets_simulation():
    """ReLU, a batch of 8 real-valued inputs, 400 networks of width 400, 4 layers.

    Null: logarithms of q and of mean squared gradients differ from theory by 1/n terms, a tenth
    where the batch, 8, is 2 % of the width, and by 4.5 standard errors (1e-5 for each of 8 values).
    Without the batch's own backward operator χ would be 1/2 · 2 = 1 and the logarithm 0.
    """
    x = np.random.default_rng(3).normal(size=(8, 50))
    network = builders.mlp([50, *[400] * 4], "relu", "he", norm="batch")
    wanted = (statistics.q, statistics.gradient_variance)
    simulated = monte_carlo.simulate(network, x, networks=400, key=2, wanted=wanted)
    theory = float64.predict(network, x)
    assert theory["log_gradient_variance"][0] > 0.5
    for key, estimate in simulated.estimates.items():
        rest = np.abs(estimate.log_value - np.asarray(theory[key]))
        assert (rest < 0.1 + 4.5 * estimate.log_standard_error).all(), key


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: mean_field.predict(n, jnp.eye(3)), "the batch has 3 inputs"),
        (lambda n: monte_carlo.simulate(n, np.ones((1, 4))), "inputs has one input"),
        (
            lambda n: jacobians.layer_jacobians(n, jnp.ones(4), jax.random.key(0)),
            "of one input alone",
        ),
        (
            lambda _: mean_field.predict(
                builders.mlp([4, 4, 4], norm="batch", norm_position="post"), jnp.eye(4)
            ),
            "BatchNorm gets a signal that is not Gaussian",
        ),
        (lambda _: architectures.batch_norm_chi("relu", 3), "batch is 3"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(InputError, match=message):
        call(builders.mlp([4, 4, 4], "relu", norm="batch"))
