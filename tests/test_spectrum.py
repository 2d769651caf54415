"""Singular values of wide networks' Jacobians against 50-digit arithmetic, and simulation."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations
from gradflow.errors import InputError
from gradflow.theory import _spectral_shares, spectral_density, spectrum

SPECTRA = 1e-9  # the issue asks 1e-6
pytestmark = pytest.mark.usefixtures("x64_only")


def number(text):
    return float(Fraction(text))


def two_point_law(p):
    """The law with φ'² = 1 with probability p, and 0 else, as that of ReLU and hard_tanh."""
    return spectrum.SlopeLaw(jnp.asarray([0.0, 1.0]), jnp.asarray([1 - p, p]), 2)


def two_point(row):
    """The law of a row that gives p, and the σ_w² that makes it critical."""
    p = float(row["inputs"]["p"].split("= ")[-1])
    return two_point_law(p), 1 / p


def test_means_and_variances_are_those_of_the_table(load_reference):
    rows = [r for r in load_reference("t5_jacobian") if "activation" in r["inputs"]]
    assert len(rows) > 40
    for row in rows:
        given, expected = row["inputs"], row["values"]
        law = spectrum.slope_law(given["activation"], number(given["q"]))
        mean, variance = spectrum.mean_and_variance(
            law, number(given["sw2"]), given["L"], given["ensemble"]
        )
        np.testing.assert_allclose(mean, number(expected["mean_sq_sv"]), rtol=SPECTRA)
        np.testing.assert_allclose(
            variance, number(expected["var_over_mean2"]), rtol=SPECTRA, atol=1e-12
        )


@pytest.mark.slow
def test_moments_atoms_edges_and_densities_are_those_of_the_table(load_reference):
    rows = [r for r in load_reference("t5_jacobian") if "density" in r["values"]]
    assert len(rows) == 10
    for row in rows:
        law, sigma_w2 = two_point(row)
        layers = (sigma_w2, row["inputs"]["L"], row["inputs"]["ensemble"])
        expected = row["values"]
        np.testing.assert_allclose(
            spectrum.moments(law, *layers),
            [number(m) for m in expected["moments_m1_to_m6"]],
            rtol=SPECTRA,
        )
        found = spectrum.support(law, *layers)
        np.testing.assert_allclose(
            found.upper, number(expected["edge_lambda_max_continuous"]), rtol=SPECTRA
        )
        np.testing.assert_allclose(
            found.lower, number(expected["edge_lambda_min_continuous"]), rtol=SPECTRA, atol=1e-12
        )
        masses = {float(a): float(m) for a, m in zip(found.atoms, found.masses, strict=True) if m}
        assert len(masses) == len(expected["atoms"])
        for atom in expected["atoms"]:
            near = min(masses, key=lambda place: abs(place - number(atom["lambda"])))
            np.testing.assert_allclose(
                [near, masses[near]], [number(atom["lambda"]), number(atom["mass"])], rtol=SPECTRA
            )
        points = expected["density"].values()
        density = spectral_density.density(
            law, *layers, at=np.array([number(p["lambda"]) for p in points])
        )
        np.testing.assert_allclose(
            density.of_eigenvalues, [number(p["rho_lambda"]) for p in points], rtol=SPECTRA
        )
        np.testing.assert_allclose(
            density.of_singular_values, [number(p["rho_s"]) for p in points], rtol=SPECTRA
        )
        assert np.all(density.error < 1e-9)


def test_mean_singular_values_are_those_of_the_table(load_reference):
    rows = [r for r in load_reference("t5_jacobian") if "mean_sv" in r["values"]]
    assert len(rows) == 4
    for row in rows:
        law = spectrum.slope_law(row["inputs"]["network"], number(row["inputs"].get("q", "1")))
        found = spectrum.mean_singular_value(law, number(row["inputs"]["sw2"]))
        np.testing.assert_allclose(found, number(row["values"]["mean_sv"]), rtol=SPECTRA)


def test_one_gaussian_layer_of_relu_has_a_gap_above_its_zeros():
    """Marchenko-Pastur with ratio p = 1/2: edges (1 ± √p)²/p at σ_w² p = 1."""
    found = spectrum.support(spectrum.slope_law("relu", 1.0), 2.0, 1)
    edges = [(1 - math.sqrt(0.5)) ** 2 * 2, (1 + math.sqrt(0.5)) ** 2 * 2]
    np.testing.assert_allclose([found.lower, found.upper], edges, rtol=1e-12)


def test_an_orthogonal_linear_network_has_one_singular_value():
    law = spectrum.slope_law("linear", 1.0)
    found = spectrum.support(law, 1.5, 4, "orthogonal")
    np.testing.assert_allclose([found.atoms[1], found.masses[1]], [1.5**4, 1], rtol=1e-12)
    assert np.isnan(found.upper)
    np.testing.assert_allclose(
        spectrum.moments(law, 1.5, 4, "orthogonal", count=2), [1.5**4, 1.5**8]
    )


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "depth", "weights"),
    [
        pytest.param("tanh", 2, "gaussian", marks=pytest.mark.slow),
        ("gelu", 10, "gaussian"),
        ("tanh", 10, "orthogonal"),
        pytest.param("erf", 100, "gaussian", marks=pytest.mark.slow),
        pytest.param("selu", 10, "orthogonal", marks=pytest.mark.slow),
        pytest.param("sin", 100, "orthogonal", marks=pytest.mark.slow),
        pytest.param("leaky_relu", 10, "orthogonal", marks=pytest.mark.slow),
    ],
)
def test_the_density_has_the_moments(name, depth, weights):
    """The density and the moments are found in different ways."""
    law = spectrum.slope_law(name, 0.7)
    layers = (1.3, depth, weights)
    ends = spectrum.support(law, *layers)
    # λ = upper sin²(θ), θ evenly in its logarithm: for the edge's root, and the power at 0.
    t, weight = np.polynomial.legendre.leggauss(400)
    theta = math.pi / 2 * np.exp(-13 * math.log(10) * (1 - t) / 2)
    at = float(ends.upper) * np.sin(theta) ** 2
    weight = weight * float(ends.upper) * np.sin(2 * theta) * theta * 13 * math.log(10) / 2
    rho = spectral_density.density(law, *layers, at=at).of_eigenvalues
    atoms = [np.sum(ends.masses * ends.atoms**k) for k in (1, 2, 3)]
    found = [np.sum(weight * rho * at**k) for k in (1, 2, 3)]
    expected = spectrum.moments(law, *layers, count=3)
    np.testing.assert_allclose(np.add(found, atoms), expected, rtol=1e-9)
    np.testing.assert_allclose(
        np.sum(weight * rho * np.sqrt(at)) + np.sum(ends.masses * np.sqrt(ends.atoms)),
        spectrum.mean_singular_value(law, *layers),
        rtol=1e-4,  # small λ count more here
    )


@pytest.mark.medium
def test_shares_of_one_gaussian_layer_are_those_of_the_quarter_circle():
    """s in [0, 2] with density √(4 - s²)/π; all edges, also those beside the law."""
    edges = np.array([0.0, 0.3, 1.0, 1.9, 2.5, 3.0])
    found = _spectral_shares.shares(spectrum.slope_law("linear", 1.0), 1.0, 1, edges=edges)
    s = np.minimum(edges, 2)
    below = (s * np.sqrt(4 - s**2) / 2 + 2 * np.arcsin(s / 2)) / math.pi
    np.testing.assert_allclose(found.inside, np.diff(below), atol=1e-9)
    np.testing.assert_allclose([found.zero, found.below, found.above], 0, atol=1e-12)
    inner = _spectral_shares.shares(spectrum.slope_law("linear", 1.0), 1.0, 1, edges=edges[1:3])
    expected = [below[1], below[2] - below[1], 1 - below[2]]
    np.testing.assert_allclose([inner.below, *inner.inside, inner.above], expected, atol=1e-9)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "q", "sigma_w2", "depth", "weights"),
    [
        ("tanh", 0.4, 1.5, 5, "orthogonal"),
        ("hard_tanh", 0.25, 1.05, 4, "orthogonal"),  # atoms at 0 and at σ_w^4, and what is between
        pytest.param("relu", 1.0, 2.0, 3, "gaussian", marks=pytest.mark.slow),
    ],
)
def test_shares_have_the_moments_and_the_atoms(name, q, sigma_w2, depth, weights):
    """In so many bins that s² is nearly constant in each: E s² to a bin's width squared, 1/12."""
    law, layers = spectrum.slope_law(name, q), (sigma_w2, depth, weights)
    ends = spectrum.support(law, *layers)
    top = float(np.sqrt(np.nanmax([ends.upper, *ends.atoms])))
    edges = np.linspace(0, 1.01 * top, 401)
    found = _spectral_shares.shares(law, *layers, edges=edges)
    middle = (edges[1:] + edges[:-1]) / 2
    total = float(found.zero + found.below + found.inside.sum() + found.above)
    assert total == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found.zero, ends.masses[0], atol=1e-12)
    mean = spectrum.mean_and_variance(law, *layers)[0]
    np.testing.assert_allclose(np.sum(found.inside * middle**2), mean, rtol=3e-3)
    assert found.inside.min() > -1e-9
    coarse = _spectral_shares.shares(law, *layers, edges=edges[::100])
    np.testing.assert_allclose(
        coarse.inside, np.asarray(found.inside).reshape(4, 100).sum(axis=1), atol=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
def test_simulated_singular_values_follow_the_density(weights, key):
    """tanh, 3 layers, σ_w² = 2, q held at 0.6; 20 networks of width 400.

    Null: each tenth of the law of s holds a tenth of all singular values, to 0.004: four standard
    deviations of what 20 networks' mean was seen to spread by (0.0006), and 1/n effects (0.002).
    The false-alarm rate is 1e-4; a density off by 5 % in a tenth fails.
    """
    depth, n, q, sigma_w2 = 3, 400, 0.6, 2.0
    law = spectrum.slope_law("tanh", q)

    def singular_values(key):
        jacobian = jnp.eye(n)
        for layer in range(depth):
            one, two = jax.random.split(jax.random.fold_in(key, layer))
            w = jax.random.normal(one, (n, n)) / math.sqrt(n)
            if weights == "orthogonal":
                w = jax.random.orthogonal(one, n)
            slope = 1 - jnp.tanh(math.sqrt(q) * jax.random.normal(two, (n, 1))) ** 2
            jacobian = slope * math.sqrt(sigma_w2) * (w @ jacobian)
        return jnp.linalg.svd(jacobian, compute_uv=False)

    found = np.concatenate([singular_values(jax.random.fold_in(key, i)) for i in range(20)])
    top = math.sqrt(float(spectrum.support(law, sigma_w2, depth, weights).upper))
    s = top * np.geomspace(1e-12, 1, 2001)  # the density grows like a power towards s = 0
    middle = np.sqrt(s[1:] * s[:-1])
    rho = spectral_density.density(law, sigma_w2, depth, weights, at=middle**2).of_singular_values
    below = np.cumsum(np.asarray(rho) * np.diff(s))
    assert abs(below[-1] - 1) < 2e-3
    tenths = np.interp(np.linspace(0.1, 0.9, 9), below, s[1:])
    shares = np.searchsorted(np.sort(found), tenths) / found.size
    np.testing.assert_allclose(shares, np.linspace(0.1, 0.9, 9), atol=0.004)


def test_functions_compose_with_jit_vmap_and_grad():
    def upper(q):
        return spectrum.support(spectrum.slope_law(activations.tanh, q), 1.5, 5).upper

    found = jax.jit(jax.vmap(upper))(jnp.array([0.3, 0.6]))
    np.testing.assert_allclose(found, [upper(0.3), upper(0.6)], rtol=1e-10)
    by_w = jax.grad(lambda w: spectrum.mean_and_variance(spectrum.slope_law("tanh", 0.5), w, 3)[0])(
        1.5
    )
    mean = spectrum.mean_and_variance(spectrum.slope_law("tanh", 0.5), 1.5, 3)[0]
    np.testing.assert_allclose(by_w, 3 * mean / 1.5, rtol=1e-12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum.slope_law("tanh", 0.0), "q is 0.0"),
        (lambda: spectrum.slope_law("tanh", -1.0), "q is -1.0"),
        (lambda: spectrum.moments(two_point_law(0.5), -1.0, 2), "sigma_w2 is -1.0"),
        (lambda: spectrum.support(two_point_law(0.5), 1.0, 0), "depth is 0"),
        (lambda: spectrum.support(two_point_law(0.5), 1.0, 2, "haar"), "unknown weights"),
        (
            lambda: spectral_density.density(
                two_point_law(0.5), 1.0, 1, "orthogonal", at=np.array([1.0])
            ),
            "depth is 1 and weights are orthogonal",
        ),
        (
            lambda: spectral_density.density(two_point_law(0.5), 1.0, 2, at=np.array([-1.0])),
            "at is -1.0",
        ),
    ],
)
def test_bad_input_is_said(call, message):
    with pytest.raises(InputError, match=message):
        call()
