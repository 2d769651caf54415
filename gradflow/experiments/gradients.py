"""Figure 9 of Glorot & Bengio 2010: weight gradients of the layers drift apart, or stay together.

At the start they are alike in all layers, with standard weights (small alike) and with normalised
ones (equation 14; figure 8). What becomes of that in training is not theory.
"""

from pathlib import Path
from typing import Any

import numpy as np
import xarray

from gradflow import statistics
from gradflow.data import Dataset
from gradflow.experiments import base, kinds
from gradflow.experiments.base import Experiment, Progress, Table
from gradflow.figures import weight_gradients_in_training

__all__ = ["EXPERIMENT", "run"]

_KINDS = ("tanh", "tanh N")
_RECORDS = 40


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
    """Show weight gradients by layer in training, standard and normalised: figure 9 of 2010.

    Parameters
    ----------
    data
        A dataset or its name; its values are scaled to -1 to 1.
    images
        How many images of Shapeset to draw, training, validation and test set together.
    width, depth
        Units a hidden layer, and hidden layers, of tanh.
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
        ``weight_gradient_variance`` and its logarithm, of the mean cost of the monitored images,
        and gradients' norm, over (network, seed, step, layer).
    """
    parts = kinds.divided(data, images, seed)
    return base.train_each(
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
            statistics.q,
            statistics.weight_gradient_variance,
            statistics.log_gradient_norm,
            statistics.gradient_variance,
        ),
    )


def _spread(dataset: xarray.Dataset) -> xarray.DataArray:
    """Return the largest over the smallest s.d. of the hidden layers' weight gradients."""
    hidden = dataset.log_weight_gradient_variance.sel(layer=slice(2, dataset.sizes["layer"] - 1))
    return np.exp((hidden.max("layer") - hidden.min("layer")) / 2)


def table(dataset: xarray.Dataset) -> Table:
    """Return weight gradients of the first and the last, and their spread, along training."""
    rows = []
    hidden = dataset.sizes["layer"] - 1
    for name in dataset.network.values:
        one = dataset.sel(network=name)
        for step in (0, *one.step.values[[len(one.step) // 2, -1]]):
            at = one.sel(step=step)
            deviation = np.exp(at.log_weight_gradient_variance.mean("seed") / 2)
            row: dict[str, Any] = {"network": str(name), "step": int(step)}
            row |= {
                f"s.d. of ∂C/∂W, layer {k}": float(deviation.sel(layer=k))
                for k in range(1, hidden + 1)
            }
            row["largest over smallest, layers 2 to last"] = float(_spread(at).mean("seed"))
            row["error, %"] = 100 * float(at.error.mean())
            rows.append(row)
    return Table(
        f"{hidden} {base.recipe(dataset)}, learning rate {float(dataset.learning_rate[0]):g}",
        rows,
        (
            "s.d.      over a layer's weights, of the mean cost; geometric mean over networks",
            "N         normalised initialisation; without it, U[±1/√n]",
        ),
    )


def findings(dataset: xarray.Dataset) -> list[str]:
    """Return how far apart the layers' gradients are at the start, at most, and at the end."""
    found = []
    log = dataset.log_weight_gradient_variance
    hidden = log.sel(layer=slice(2, dataset.sizes["layer"] - 1))
    for name in dataset.network.values:
        spread = _spread(dataset.sel(network=name))
        most = spread.mean("seed")
        found.append(
            f"{name}: s.d. of weight gradients, largest over smallest of hidden layers 2 to last: "
            f"{float(spread.isel(step=0).mean()):.2g} at the start, at most "
            f"{float(most.max()):.2g} (step {int(most.idxmax())}), "
            f"{float(spread.isel(step=-1).mean()):.2g} ± {float(spread.isel(step=-1).std()):.1g} "
            "at the end (± s.d. over networks)"
        )
    first, second = (str(name) for name in dataset.network.values)
    start = hidden.isel(step=0).mean(("seed", "layer"))
    factor = float(np.exp((start.sel(network=second) - start.sel(network=first)) / 2))
    found.append(f"at the start {second}'s weight gradients are {factor:.2g} times {first}'s")
    apart = (_spread(dataset).isel(step=slice(1, None))).mean(("seed", "step"))
    wider = first if float(apart.sel(network=first)) > float(apart.sel(network=second)) else second
    found.append(
        f"along training the layers of {wider} are further apart: on average ×"
        f"{float(apart.max()):.2g} against ×{float(apart.min()):.2g}"
    )
    return found


EXPERIMENT = Experiment("gradients", run, table, findings, weight_gradients_in_training)
