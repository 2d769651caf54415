"""The singular values of the end-to-end Jacobian: theory, and a histogram of real networks'."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow import activations, ensembles, gaussian
from gradflow._arguments import from_seed
from gradflow._checks import check_scale
from gradflow.activations import Activation
from gradflow.errors import InputError
from gradflow.theory import fixed_points, spectral_density
from gradflow.theory import spectrum as theory
from gradflow.theory._jacobian_law import check as check_layers

__all__ = ["run", "simulate"]

_BINS = 40
# Of the largest singular value: below it, a product of matrices in float64 holds rounding errors.
_ROUNDING = 1e-11


def run(
    activation: Activation,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    *,
    q: float | None = None,
    depth: int = 10,
    weights: str = "gaussian",
    points: int = 1000,
    networks: int = 0,
    width: int = 300,
    seed: int = 0,
) -> tuple[xarray.Dataset, dict[str, Any]]:
    """Return the density of s over a grid, and moments, atoms and edges by their field's names.

    Parameters
    ----------
    activation, sigma_w2, sigma_b2
        φ, σ_w² > 0 and σ_b² >= 0.
    q
        The variance of the pre-activations; the fixed point of the length without it. If it is
        given, σ_b² is what keeps it.
    depth
        L, in layers.
    weights
        ``"gaussian"`` or ``"orthogonal"``.
    points
        How many places, evenly from 0 to the largest singular value.
    networks, width, seed
        Networks to simulate, 0 for none, their units a layer, and the seed of what is random.

    Returns
    -------
    dataset
        ``singular_value_density_theory(singular_value)`` with its estimated ``_error``, without
        atoms; ``atom_mass(atom)``, at each atom's singular value; and of simulated networks, where
        there are any, ``singular_value_density(singular_value_bin)`` with its ``_standard_error``.
    report
        Moments, edges of the continuous part and atoms: numbers by name, for JSON.

    Raises
    ------
    InputError
        If an argument is out of range, or the length settles nowhere.
    """
    activation = activations.get(activation)
    with jax.enable_x64(True):
        check_scale("sigma_b2", sigma_b2)
        check_layers(sigma_w2, depth, weights)
        q = _settled(activation, sigma_w2, sigma_b2) if q is None else q
        law = theory.slope_law(activation, q)
        layers = (sigma_w2, depth, weights)
        mean, variance = (float(v) for v in theory.mean_and_variance(law, *layers))
        ends = theory.support(law, *layers)
        there = np.asarray(ends.masses) > 0
        atoms, masses = np.sqrt(np.asarray(ends.atoms))[there], np.asarray(ends.masses)[there]
        top = np.nanmax([math.sqrt(float(ends.upper)), *atoms, 1e-300])
        s = np.linspace(0, 1.02 * top, points + 1)[1:]
        found = spectral_density.density(law, *layers, at=s**2)
        moments = theory.moments(law, *layers).tolist()
        first, second = (float(jnp.sum(law.weights * law.values**k)) for k in (1, 2))
        mean_s = float(theory.mean_singular_value(law, *layers))
        dataset = xarray.Dataset(
            {
                "singular_value_density_theory": (
                    "singular_value",
                    np.asarray(found.of_singular_values),
                ),
                "singular_value_density_theory_error": ("singular_value", np.asarray(found.error)),
                "atom_mass": ("atom", masses),
            },
            coords={"singular_value": s, "atom": atoms},
            attrs={
                "title": f"{activation.name}, {depth} {weights} layers: σ_w² = {sigma_w2:.6g}, "
                f"q = {q:.6g}",
                "networks": networks,
                "width": width,
                "seed": seed,
            },
        )
        if networks:
            bias = q - sigma_w2 * float(gaussian.moment(activation, "phi2", jnp.asarray(q)))
            if bias < -1e-9 * q:
                raise InputError(
                    f"q is {q!r}, which networks with sigma_w2 {sigma_w2!r} do not keep: it would "
                    f"need sigma_b2 = {bias:.3g}; leave q out, or do not simulate"
                )
            values = simulate(
                activation,
                sigma_w2,
                max(bias, 0.0),
                q,
                depth=depth,
                weights=weights,
                width=width,
                networks=networks,
                key=from_seed(seed),
            )
            dataset = dataset.assign(_histogram(np.asarray(values), 1.1 * top))
    report = {
        "activation": activation.name,
        "weights": weights,
        "sigma_w2": sigma_w2,
        "q": q,
        "depth": depth,
        "chi1": sigma_w2 * first,
        "slope_second_moment": first,
        "slope_fourth_moment": second,
        "mean_squared_singular_value": mean,
        "squared_singular_value_variance": variance * mean**2,
        "squared_singular_value_relative_variance": variance,
        "mean_singular_value": mean_s,
        "squared_singular_value_moments": moments,
        "atoms": [
            {"squared_singular_value": float(a**2), "mass": float(m)}
            for a, m in zip(atoms, masses, strict=True)
        ],
        "squared_singular_value_lower_edge": float(ends.lower),
        "squared_singular_value_upper_edge": float(ends.upper),
        "singular_value_upper_edge": math.sqrt(float(ends.upper)),
    }
    return dataset, report


def _settled(activation: Activation, sigma_w2: float, sigma_b2: float) -> float:
    found = fixed_points.analyse(activation, sigma_w2, sigma_b2)
    q = float(found.q_star)
    if not q > 0:
        status = fixed_points.Status(int(found.status)).name.lower().replace("_", " ")
        raise InputError(
            f"sigma_w2 is {sigma_w2!r} and sigma_b2 {sigma_b2!r}, with which the length of "
            f"activation {activation.name!r} {status}; give q, or scales with a fixed point q* > 0"
        )
    return q


def simulate(
    activation: Activation,
    sigma_w2: float,
    sigma_b2: float,
    q: float,
    *,
    depth: int,
    weights: str,
    width: int,
    networks: int,
    key: PRNGKeyArray,
) -> Float[Array, "networks width"]:
    """Return all singular values of D^L W^L … D^1 W^1 of random networks, in descending order.

    The product is formed: those below 1e-11 of the largest are rounding errors.

    Parameters
    ----------
    activation, sigma_w2, sigma_b2
        φ and the scales.
    q
        The first layer's second moment, in the mean over networks.
    depth, weights, width, networks
        What kind of network, and how many.
    key
        Network i has ``fold_in(key, i)``.
    """
    draw = ensembles.DISTRIBUTIONS[weights].draw
    sigma_w, sigma_b = math.sqrt(sigma_w2 / width), math.sqrt(sigma_b2)
    start = math.sqrt(max(q - sigma_b2, 0.0) / sigma_w2)

    def one(index: Array) -> Array:
        of_input, of_layers = jax.random.split(jax.random.fold_in(key, index))
        direction = jax.random.normal(of_input, (width,))
        h = direction * start * math.sqrt(width) / jnp.linalg.norm(direction)

        def layer(
            state: tuple[Array, Array], key: PRNGKeyArray
        ) -> tuple[tuple[Array, Array], None]:
            h, jacobian = state
            of_weights, of_biases = jax.random.split(key)
            w = sigma_w * draw(of_weights, (width, width), h.dtype)
            multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
            z = multiply(w, h) + sigma_b * jax.random.normal(of_biases, (width,), h.dtype)
            slopes = activation.derivative(z)
            return (activation(z), slopes[:, None] * multiply(w, jacobian)), None

        keys = jax.random.split(of_layers, depth)
        (_, jacobian), _ = jax.lax.scan(layer, (h, jnp.eye(width, dtype=h.dtype)), keys)
        return jnp.linalg.svd(jacobian, compute_uv=False)

    return jax.lax.map(one, jnp.arange(networks))


def _histogram(values: np.ndarray, top: float) -> dict[str, Any]:
    """Return the density of each network's singular values but zeros, averaged, with its error."""
    edges = np.linspace(0, top, _BINS + 1)
    width = np.diff(edges)
    shares = np.stack(
        [
            np.histogram(row[row > _ROUNDING * values.max()], edges)[0] / row.size / width
            for row in values
        ]
    )
    error = shares.std(axis=0, ddof=1) if len(shares) > 1 else np.full(_BINS, np.nan)
    return {
        "singular_value_density": ("singular_value_bin", shares.mean(axis=0)),
        "singular_value_density_standard_error": (
            "singular_value_bin",
            error / math.sqrt(len(shares)),
        ),
        "singular_value_bin": (edges[1:] + edges[:-1]) / 2,
    }
