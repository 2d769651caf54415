"""Orthogonal against Gaussian weights: a Jacobian whose singular values stay together, or do not.

Both keep the *mean* of the squared singular values of the end-to-end Jacobian, and with it the size
of gradients. Of L Gaussian layers of width n they spread all the same: in the linear regime the
logarithm of the k-th largest tends to L times the Lyapunov exponent (Newman 1986)

    λ_k = ½ (log χ + log(2/n) + ψ((n - k + 1)/2)).

Orthogonal layers have all at √χ^L there, so that a deep network starts as a rotation of its inputs.
References: Saxe, McClelland & Ganguli 2014 (arXiv:1312.6120); Pennington, Schoenholz & Ganguli 2017
(arXiv:1711.04735); C. M. Newman 1986 (Communications in Mathematical Physics 103).
"""

import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import xarray

from gradflow import builders, ensembles, training
from gradflow._arguments import from_seed
from gradflow._checks import check_count
from gradflow.data import Split
from gradflow.experiments import _wording
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import isometry as figure
from gradflow.networks import Network
from gradflow.simulation import jacobians, singular_values
from gradflow.theory import mean_field
from gradflow.training import Recording

_LAWS = ("orthogonal", "gaussian")
_RECORDS = 25
# The goal of linear networks: so much of the way from guessing to the least loss of all.
_CLOSED = 0.9
_LINEAR_RATES = (0.01, 0.03, 0.1, 0.3)
# Images on which the loss of linear networks is measured at every step.
_MONITORED = 100
# Principal components of the inputs that linear networks get, whitened.
_DIRECTIONS = 32


def _train(
    recipe: Recipe,
    *,
    activation: Annotated[str, "φ, by name."] = "tanh",
    sigma_w2: Annotated[float, "Weights' variance times their fan-in."] = 1.05,
    sigma_b2: Annotated[float, "The biases' variance."] = 1e-5,
    linear_steps: Annotated[int, "Updates of linear networks, of several depths."] = 150,
) -> xarray.Dataset:
    """Compare orthogonal with Gaussian weights: deep tanh (Pennington 2017) and linear (Saxe 2014).

    Data are standardised by pixel, and whitened for linear networks, which have the recipe's
    several depths, each at its best learning rate.

    Returns
    -------
    xarray.Dataset
        ``error`` over (network, seed, step); ``log_singular_value`` of the hidden layers' Jacobian
        at the start, over (network, seed, k), and ``log_singular_value_theory``; for linear
        networks ``steps_to_close`` over (network, depth, seed), NaN where the gap is not closed,
        and ``linear_rate`` over (network, depth).
    """
    whole = recipe.split()
    parts = whole.standardised()
    widths = recipe.widths(parts)
    networks = {
        name: builders.mlp(
            widths,
            activation,
            ensembles.fan_in(sigma_w2**0.5, name),
            sigma_b=sigma_b2**0.5,
            name=name,
        )
        for name in _LAWS
    }
    record = Recording(recipe.even_steps(_RECORDS), wanted=())
    dataset = recipe.train(networks, parts, record=record)
    x = jnp.asarray(parts.train.inputs[0])
    keys = jax.vmap(functools.partial(jax.random.fold_in, from_seed(recipe.seed)))(
        jnp.arange(recipe.networks)
    )
    dataset["log_singular_value"] = (
        ("network", "seed", "k"),
        np.stack([_log_singular_values(network, x, keys) for network in networks.values()]),
        {"long_name": "natural logarithm of the k-th largest singular value of ∂z^L/∂z^1"},
    )
    dataset["log_singular_value_theory"] = (
        ("network", "k"),
        np.stack([_theory(network, x) for network in networks.values()]),
    )
    dataset["k"] = np.arange(1, dataset.sizes["k"] + 1)
    linear = _linear(recipe, whole, check_count("linear_steps", linear_steps))
    return dataset.merge(linear, combine_attrs="drop_conflicts").assign_attrs(
        activation=activation, sigma_w2=sigma_w2, sigma_b2=sigma_b2, depth=recipe.depth
    )


@functools.partial(jax.jit, static_argnums=0)
def _log_singular_values(network: Network, x: jax.Array, keys: jax.Array) -> jax.Array:
    """Logarithms of the singular values of the Jacobian of the hidden layers after the first."""

    def one(key: jax.Array) -> jax.Array:
        factors = jacobians.layer_jacobians(network, x, key)[1:-1]
        return singular_values.log_singular_values(factors).log

    return jax.lax.map(one, keys)


def _theory(network: Network, x: jax.Array) -> np.ndarray:
    """The limits of the singular values' logarithms, where units are nearly linear."""
    chi = mean_field.predict(network, mean_field.input_gram(x[None]))["chi"]
    width = network.widths[1]
    total = float(np.log(np.asarray(chi, np.float64)[:-2]).sum())
    if not network.iid_gaussian:
        return np.full(width, total / 2)
    k = np.arange(1, width + 1)
    layer = np.log(2 / width) + scipy.special.digamma((width - k + 1) / 2)
    return (total + (network.depth - 2) * layer) / 2


def _whitened(parts: Split) -> tuple[np.ndarray, np.ndarray]:
    """The training set's leading principal components, each of variance 1, and labels."""
    x = parts.train.inputs.astype(np.float64)
    left, _, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    components = min(_DIRECTIONS, np.linalg.matrix_rank(x - x.mean(axis=0)))
    return (left[:, :components] * len(x) ** 0.5).astype(np.float32), parts.train.labels


def _linear(recipe: Recipe, parts: Split, steps: int) -> xarray.Dataset:
    """The steps that deep linear networks take to close the gap, each at its best learning rate."""
    x, labels = _whitened(parts)
    depths = list(recipe.depths or ())
    losses = []
    for name in _LAWS:
        for depth in depths:
            widths = (x.shape[1], *[recipe.width] * depth, parts.train.classes)
            result = training.train(
                builders.mlp(widths, "linear", ensembles.fan_in(1.0, name)),
                x,
                labels,
                steps=steps,
                batch=recipe.batch,
                learning_rate=_LINEAR_RATES,
                seeds=recipe.networks,
                key=recipe.seed,
                record=Recording(range(steps + 1), (x[:_MONITORED], labels[:_MONITORED]), ()),
                save=recipe.save,
                progress=recipe.progress_of(f"linear, {name}, depth {depth}"),
            )
            losses.append(result["loss"][0])
    shape = (len(_LAWS), len(depths), *losses[0].shape)
    loss = np.stack(losses).reshape(shape)  # networks, depths, rates, seeds, steps
    least = float(np.nanmin(loss))
    goal = np.log(parts.train.classes) * (1 - _CLOSED) + least * _CLOSED
    below = loss <= goal
    first = np.where(below.any(axis=-1), below.argmax(axis=-1), np.inf)
    best = first.mean(axis=-1).argmin(axis=-1)
    taken = np.take_along_axis(first, best[..., None, None], axis=2)[:, :, 0]
    return xarray.Dataset(
        {
            "steps_to_close": (
                ("network", "depth", "seed"),
                np.where(np.isfinite(taken), taken, np.nan),
                {"long_name": "steps until 90 % of the loss that can go is gone"},
            ),
            "linear_rate": (("network", "depth"), np.array(_LINEAR_RATES)[best]),
        },
        coords={
            "network": list(_LAWS),
            "depth": depths,
            "seed": np.arange(recipe.networks),
        },
        attrs={"linear_steps": steps},
    )


def _median(dataset: xarray.Dataset) -> xarray.DataArray:
    """The median singular value, geometric mean over networks."""
    return np.exp(dataset.log_singular_value.median("k").mean("seed"))


def _table(dataset: xarray.Dataset) -> Table:
    """Error and singular values, and the steps of linear networks by depth."""
    rows = []
    log = dataset.log_singular_value
    for name in dataset.network.values:
        one = dataset.sel(network=name)
        row: dict[str, Any] = {"network": str(name)}
        row |= _wording.error_columns(one.error.isel(step=-1))
        spectrum = log.sel(network=name).mean("seed")
        for what, value in (("largest", spectrum[0]), ("least", spectrum[-1])):
            row[f"singular value, {what}"] = float(np.exp(value))
        row["singular value, median"] = float(_median(dataset).sel(network=name))
        for depth in dataset.depth.values:
            steps = one.steps_to_close.sel(depth=depth)
            row[f"linear, depth {depth}"] = float(steps.mean(skipna=False))
        rows.append(row)
    attrs = dataset.attrs
    return Table(
        f"{attrs['depth']} {_wording.sizes(dataset)}, {attrs['activation']}, σ_w² = "
        f"{attrs['sigma_w2']:g}",
        rows,
        (
            "singular  of the hidden layers' Jacobian at the start, typical network",
            f"linear    steps to close {100 * _CLOSED:.0f} % of the gap, at the best of "
            f"{len(_LINEAR_RATES)} rates; -: not all networks in {attrs['linear_steps']}",
        ),
    )


def _findings(dataset: xarray.Dataset) -> list[str]:
    """Errors and singular values of each kind, and the steps of linear networks."""
    end = dataset.error.isel(step=-1)
    median = _median(dataset)
    steps = dataset.attrs["steps"]
    sentences = [
        f"{name}: error {_wording.percent(end.sel(network=name))} after {steps} steps; "
        f"median singular value {float(median.sel(network=name)):.2g} at the start (theory "
        f"{float(np.exp(dataset.log_singular_value_theory.sel(network=name).median())):.2g})"
        for name in dataset.network.values
    ]
    for name in dataset.network.values:
        taken = dataset.steps_to_close.sel(network=name).mean("seed", skipna=False)
        closed = taken.dropna("depth")
        sentence = f"linear, {name}: "
        if closed.size:
            parts = [
                f"{float(closed.sel(depth=depth)):.3g} at depth {depth}"
                for depth in closed.depth.values
            ]
            sentence += f"{100 * _CLOSED:.0f} % of the gap is closed in {', '.join(parts)} steps"
        missing = [str(depth) for depth in taken.depth.values[np.isnan(taken.values)]]
        if missing:
            sentence += "; " if closed.size else ""
            sentence += (
                f"not by all networks in {dataset.attrs['linear_steps']} steps at depth "
                + ", ".join(missing)
            )
        sentences.append(sentence)
    return sentences


EXPERIMENT = Experiment(
    "isometry",
    Recipe(width=64, depth=100, depths=(2, 10, 50), steps=500, batch=64, learning_rate=0.01),
    _train,
    _table,
    _findings,
    figure,
)
