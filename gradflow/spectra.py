"""Singular values of the end-to-end Jacobian of networks that keep one q: theory and histogram.

J = D^L W^L … D^1 W^1, D^l = diag φ'(z^l): the law that `gradflow.theory.spectrum` has at infinite
width, beside the singular values of `gradflow.simulation.singular_values.end_to_end`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from jaxtyping import Array, ArrayLike

from gradflow import activations, builders, ensembles, gaussian
from gradflow._arguments import from_seed
from gradflow._bins import counts_in_bins, mean_and_error
from gradflow._checks import check_scale
from gradflow._programs import program
from gradflow.activations import Activation, ActivationLike
from gradflow.errors import InputError
from gradflow.simulation import singular_values
from gradflow.theory import fixed_points, spectral_density
from gradflow.theory import spectrum as theory
from gradflow.theory._jacobian_law import check as check_layers

__all__ = ["run"]

_BINS = 40
# The density is shown a little beyond the largest singular value, and the histogram further, for at
# finite width some are beyond it.
_DENSITY_TOP, _HISTOGRAM_TOP = 1.02, 1.1
# Of q: a bias variance that is negative by rounding alone.
_ROUNDING = 1e-9


def run(
    activation: ActivationLike,
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
    """Return the density of singular values s of J over a grid, and its moments, atoms and edges.

    Parameters
    ----------
    activation, sigma_w2, sigma_b2
        φ, σ_w² > 0 and σ_b² >= 0.
    q
        The variance of the pre-activations; the fixed point of the length without it. If it is
        given, networks have the σ_b² that keeps it.
    depth
        L, in layers.
    weights
        ``"gaussian"`` or ``"orthogonal"``.
    points
        Size of the grid, which is even from 0 to beyond the largest singular value.
    networks, width, seed
        Networks to simulate, 0 for none, their units in a layer, and the seed of their randomness.

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
        check_scale("q", q)
        law = _slope_law(activation, q)
        dataset, report, top = _theory(law, (sigma_w2, depth, weights), points)
        title = f"{activation.name}, {depth} {weights} layers: σ_w² = {sigma_w2:.6g}, q = {q:.6g}"
        dataset.attrs = {"title": title, "networks": networks, "width": width, "seed": seed}
        if networks:
            sigma_b = _sigma_b(activation, sigma_w2, q)
            network = builders.mlp(
                [width] * (depth + 1),
                activation,
                ensembles.fan_in(math.sqrt(sigma_w2), weights),
                sigma_b=sigma_b or None,
            )
            # Weights of both laws are isotropic: of the input its length alone matters.
            start = math.sqrt(max(q - sigma_b**2, 0.0) / sigma_w2)
            key, inputs = from_seed(seed), jnp.full((1, width), start)

            def one(number: Array) -> Array:
                key_of_one = jax.random.fold_in(key, number)
                return singular_values.end_to_end(network, inputs, key_of_one)

            logs = jax.jit(lambda: jax.lax.map(one, jnp.arange(networks)))()
            dataset = dataset.assign(_histogram(np.asarray(logs), _HISTOGRAM_TOP * top))
    of_arguments = {"activation": activation.name, "weights": weights}
    return dataset, of_arguments | {"sigma_w2": sigma_w2, "q": q, "depth": depth} | report


@program("activation")
def _slope_law(activation: Activation, q: ArrayLike) -> theory.SlopeLaw:
    return theory.slope_law(activation, q)


@program("depth", "weights")
def _numbers(law: theory.SlopeLaw, sigma_w2: ArrayLike, *, depth: int, weights: str) -> tuple:
    layers = sigma_w2, depth, weights
    return (
        theory.mean_and_variance(law, *layers),
        theory.support(law, *layers),
        [jnp.sum(law.weights * law.values**k) for k in (1, 2)],
        theory.mean_singular_value(law, *layers),
        theory.moments(law, *layers),
    )


def _theory(
    law: theory.SlopeLaw, layers: tuple[float, int, str], points: int
) -> tuple[xarray.Dataset, dict[str, Any], float]:
    """Return theory's density and atoms, its report, and the largest singular value."""
    sigma_w2, depth, weights = layers
    found = _numbers(law, sigma_w2, depth=depth, weights=weights)
    (mean, variance), ends, (second, fourth), mean_singular, moments = jax.tree.map(
        np.asarray, found
    )
    there = np.asarray(ends.masses) > 0
    atoms, masses = np.sqrt(np.asarray(ends.atoms))[there], np.asarray(ends.masses)[there]
    top = float(np.nanmax([math.sqrt(float(ends.upper)), *atoms, 1e-300]))
    s = np.linspace(0, _DENSITY_TOP * top, points + 1)[1:]
    density = spectral_density.density(law, *layers, at=s**2)
    dataset = xarray.Dataset(
        {
            "singular_value_density_theory": (
                "singular_value",
                np.asarray(density.of_singular_values),
            ),
            "singular_value_density_theory_error": ("singular_value", np.asarray(density.error)),
            "atom_mass": ("atom", masses),
        },
        coords={"singular_value": s, "atom": atoms},
    )
    report = {
        "chi1": sigma_w2 * float(second),
        "slope_second_moment": float(second),
        "slope_fourth_moment": float(fourth),
        "mean_squared_singular_value": float(mean),
        "squared_singular_value_variance": float(variance * mean**2),
        "squared_singular_value_relative_variance": float(variance),
        "mean_singular_value": float(mean_singular),
        "squared_singular_value_moments": moments.tolist(),
        "atoms": [
            {"squared_singular_value": float(a**2), "mass": float(m)}
            for a, m in zip(atoms, masses, strict=True)
        ],
        "squared_singular_value_lower_edge": float(ends.lower),
        "squared_singular_value_upper_edge": float(ends.upper),
        "singular_value_upper_edge": math.sqrt(float(ends.upper)),
    }
    return dataset, report, top


def _settled(activation: Activation, sigma_w2: float, sigma_b2: float) -> float:
    """Return the fixed point q* > 0 of the length."""
    analysis = fixed_points.analyse(activation, sigma_w2, sigma_b2)
    q = float(analysis.q_star)
    if not q > 0:
        status = fixed_points.Status(int(analysis.status)).name.lower().replace("_", " ")
        raise InputError(
            f"sigma_w2 is {sigma_w2!r} and sigma_b2 {sigma_b2!r}, with which the length of "
            f"activation {activation.name!r} {status}; give q, or scales with a fixed point q* > 0"
        )
    return q


def _sigma_b(activation: Activation, sigma_w2: float, q: float) -> float:
    """Return the σ_b with which networks keep q: q = σ_w² E φ(z)² + σ_b²."""
    sigma_b2 = q - sigma_w2 * float(gaussian.moment(activation, "phi2", jnp.asarray(q)))
    if sigma_b2 < -_ROUNDING * q:
        raise InputError(
            f"q is {q!r}, which networks with sigma_w2 {sigma_w2!r} do not keep: it would "
            f"need sigma_b2 = {sigma_b2:.3g}; leave q out, or do not simulate"
        )
    return math.sqrt(max(sigma_b2, 0.0))


def _histogram(logs: np.ndarray, top: float) -> dict[str, Any]:
    """Return the density of the networks' singular values but zeros, with its standard error."""
    edges = np.linspace(0, 1, _BINS + 1)
    # In units of the top, as singular values of deep networks may leave a float's range.
    inside = counts_in_bins(logs - math.log(top), edges)[:, 2:-1]
    mean, error = mean_and_error(inside.sum(axis=0), (inside**2).sum(axis=0), len(logs))
    unit = logs.shape[1] * top / _BINS
    return {
        "singular_value_density": ("singular_value_bin", mean / unit),
        "singular_value_density_standard_error": ("singular_value_bin", error / unit),
        "singular_value_bin": top * (edges[1:] + edges[:-1]) / 2,
    }
