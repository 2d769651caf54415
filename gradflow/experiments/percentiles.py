"""Figures 3, 4 and 10 of Glorot & Bengio 2010: which layers saturate first, and how many units.

Of activations between -1 and 1, the 98th percentile says whether units saturate, and the standard
deviation whether all do.
"""

from typing import Any

import numpy as np
import xarray

from gradflow import statistics, training
from gradflow.experiments import _glorot_2010, _wording
from gradflow.experiments._glorot_2010 import networks_and_data
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import percentiles_in_training
from gradflow.training import Recording

_KINDS = ("tanh", "softsign", "tanh N")
_RECORDS = 40
# Of histograms, from -1 to 1.
_BINS = 50
# A layer saturates once its 98th percentile comes to this.
_SATURATED = 0.95


def _train(recipe: Recipe) -> xarray.Dataset:
    """Show which layers of tanh and softsign saturate in training: figures 3, 4 and 10 of 2010.

    Returns
    -------
    xarray.Dataset
        ``activation_percentile_98``, ``activation_variance`` and ``saturation``, over (network,
        seed, step, layer); ``activation_histogram`` at the end, over (network, seed, layer, bin).
    """
    networks, parts = networks_and_data(recipe, _KINDS)
    wanted = (
        training.activation_percentile_98,
        statistics.activation_variance,
        statistics.saturation,
    )
    record = Recording(recipe.even_steps(_RECORDS), wanted=wanted, histograms=_BINS)
    dataset = recipe.train(networks, parts, record=record)
    histogram = dataset.activation_histogram.isel(step=-1, drop=True)
    dataset = dataset.drop_vars(["activation_histogram", "activation_low", "activation_high"])
    dataset["activation_histogram"] = histogram
    dataset["bin"] = (np.arange(_BINS) + 0.5) * (2 / _BINS) - 1
    return dataset


def _saturated(dataset: xarray.Dataset) -> xarray.DataArray:
    """The first recorded step at which a hidden layer saturates, or NaN.

    A layer saturates when its 98th percentile comes to 0.95, on average over networks.
    """
    top = dataset.activation_percentile_98.sel(layer=slice(1, dataset.sizes["layer"] - 1))
    mean = top.mean("seed")
    return mean.step.where(mean >= _SATURATED).min("step")


def _table(dataset: xarray.Dataset) -> Table:
    """Percentile and standard deviation of each hidden layer at the start and at the end."""
    rows = []
    when = _saturated(dataset)
    hidden = when.layer.values
    for name in dataset.network.values:
        for layer in hidden:
            one = dataset.sel(network=name, layer=layer).mean("seed")
            row: dict[str, Any] = {"network": str(name), "layer": int(layer)}
            for time, at in (("start", one.isel(step=0)), ("end", one.isel(step=-1))):
                row[f"98th percentile, {time}"] = float(at.activation_percentile_98)
                row[f"s.d., {time}"] = float(np.sqrt(at.activation_variance))
            row["saturates, at step"] = float(when.sel(network=name, layer=layer))
            rows.append(row)
    return Table(
        f"{len(hidden)} {_wording.sizes(dataset)}, learning rate "
        f"{float(dataset.learning_rate[0]):g}",
        rows,
        (
            f"saturates when the 98th percentile comes to {_SATURATED:g}",
            "N         normalised initialisation; without it, U[±1/√n]",
        ),
    )


def _findings(dataset: xarray.Dataset) -> list[str]:
    """The order in which layers saturate, and their percentiles at the end."""
    sentences = []
    when = _saturated(dataset)
    for name in dataset.network.values:
        one = when.sel(network=name)
        end = dataset.activation_percentile_98.sel(network=name).isel(step=-1).mean("seed")
        end = end.sel(layer=one.layer)
        there = one.layer.values[np.isfinite(one.values)]
        order = there[np.argsort(one.sel(layer=there).values, kind="stable")]
        if order.size:
            steps = ", ".join(f"{layer} (step {int(one.sel(layer=layer))})" for layer in order)
            first = f"layers saturate (98th percentile {_SATURATED:g}) in the order {steps}"
        else:
            first = f"no layer saturates (98th percentile {_SATURATED:g})"
        sentences.append(
            f"{name}: {first}; at the end 98th percentiles are from {float(end.min()):.2f} "
            f"(layer {int(end.idxmin())}) to {float(end.max()):.2f} (layer {int(end.idxmax())})"
        )
    return sentences


EXPERIMENT = Experiment(
    "percentiles",
    _glorot_2010.RECIPE,
    _train,
    _table,
    _findings,
    percentiles_in_training,
)
