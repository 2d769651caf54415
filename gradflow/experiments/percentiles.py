"""Figures 3, 4 and 10 of Glorot & Bengio 2010: which layers saturate first, and how many units.

Of activations between -1 and 1, the 98th percentile says whether units saturate, and the standard
deviation whether all do.
"""

from pathlib import Path
from typing import Any

import numpy as np
import xarray

from gradflow import statistics, training
from gradflow.data import Dataset
from gradflow.experiments import base, kinds
from gradflow.experiments.base import Experiment, Progress, Table
from gradflow.figures import percentiles_in_training

__all__ = ["EXPERIMENT", "run"]

_KINDS = ("tanh", "softsign", "tanh N")
_RECORDS = 40
# Of histograms, from -1 to 1.
_BINS = 50
# A layer saturates once its 98th percentile comes to this.
_SATURATED = 0.95


def run(
    *,
    data: Dataset | str = "shapeset",
    images: int = kinds.IMAGES,
    width: int = 200,
    depth: int = 5,
    steps: int = 10_000,
    batch: int = 10,
    learning_rate: float = 0.03,
    networks: int = 4,
    seed: int = 0,
    save: Path | None = None,
    progress: Progress | None = None,
) -> xarray.Dataset:
    """Show which layers of tanh and softsign saturate in training: figures 3, 4 and 10 of 2010.

    Parameters
    ----------
    data
        A dataset or its name; its values are scaled to -1 to 1.
    images
        How many images of Shapeset to draw, training, validation and test set together.
    width, depth
        Units a hidden layer, and hidden layers.
    steps, batch, learning_rate
        Of gradient descent.
    networks
        How many random networks of each kind.
    seed
        Of everything that is random.
    save
        A folder for what it takes to go on after an interruption; not saved without it.
    progress
        Called with (kind, updates done, updates in all).

    Returns
    -------
    xarray.Dataset
        ``activation_percentile_98``, ``activation_variance`` and ``saturation``, over (network,
        seed, step, layer); ``activation_histogram`` at the end, over (network, seed, layer, bin).
    """
    parts = kinds.divided(data, images, seed)
    found = base.train_each(
        kinds.laws(_KINDS, parts, width, depth),
        parts,
        networks=networks,
        seed=seed,
        save=save,
        progress=progress,
        steps=steps,
        batch=batch,
        learning_rates=[learning_rate],
        record=base.recorded_steps(steps, _RECORDS),
        wanted=(
            training.activation_percentile_98,
            statistics.activation_variance,
            statistics.saturation,
        ),
        histograms=_BINS,
    )
    histogram = found.activation_histogram.isel(step=-1, drop=True)
    found = found.drop_vars(["activation_histogram", "activation_low", "activation_high"])
    found["activation_histogram"] = histogram
    found["bin"] = (np.arange(_BINS) + 0.5) * (2 / _BINS) - 1
    return found


def _saturated(dataset: xarray.Dataset) -> xarray.DataArray:
    """Return the first recorded step at which a hidden layer saturates, or NaN.

    That is, its 98th percentile comes to 0.95, on average over networks.
    """
    top = dataset.activation_percentile_98.sel(layer=slice(1, dataset.sizes["layer"] - 1))
    mean = top.mean("seed")
    return mean.step.where(mean >= _SATURATED).min("step")


def table(dataset: xarray.Dataset) -> Table:
    """Return percentile and standard deviation of each hidden layer at the start and at the end."""
    rows = []
    when = _saturated(dataset)
    hidden = when.layer.values
    for name in dataset.network.values:
        for layer in hidden:
            one = dataset.sel(network=name, layer=layer).mean("seed")
            row: dict[str, Any] = {"network": str(name), "layer": int(layer)}
            for place, at in (("start", one.isel(step=0)), ("end", one.isel(step=-1))):
                row[f"98th percentile, {place}"] = float(at.activation_percentile_98)
                row[f"s.d., {place}"] = float(np.sqrt(at.activation_variance))
            row["saturates, at step"] = float(when.sel(network=name, layer=layer))
            rows.append(row)
    return Table(
        f"{len(hidden)} {base.recipe(dataset)}, learning rate {float(dataset.learning_rate[0]):g}",
        rows,
        (
            f"saturates when the 98th percentile comes to {_SATURATED:g}",
            "N         normalised initialisation; without it, U[±1/√n]",
        ),
    )


def findings(dataset: xarray.Dataset) -> list[str]:
    """Return in which order layers saturate, and how far apart they are at the end."""
    found = []
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
        found.append(
            f"{name}: {first}; at the end 98th percentiles are from {float(end.min()):.2f} "
            f"(layer {int(end.idxmin())}) to {float(end.max()):.2f} (layer {int(end.idxmax())})"
        )
    return found


EXPERIMENT = Experiment("percentiles", run, table, findings, percentiles_in_training)
