"""Table 1 and figure 11 of Glorot & Bengio 2010: five kinds of deep networks, ranked.

The paper has 5 hidden layers of 1000 units and endless images. The ranking shows at width 200.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from gradflow.data import Dataset
from gradflow.experiments import base, kinds
from gradflow.experiments.base import Experiment, Progress, Table
from gradflow.figures import error_curves

__all__ = ["EXPERIMENT", "PAPER", "run"]

# The paper's test errors on Shapeset-3×2, in per cent.
PAPER = {"softsign": 16.27, "softsign N": 16.06, "tanh": 27.15, "tanh N": 15.60, "sigmoid": 82.61}
_RECORDS = 20
_MONITORED = 2000


def run(
    *,
    data: Dataset | str = "shapeset",
    images: int = kinds.IMAGES,
    width: int = 200,
    depth: int = 5,
    steps: int = 10_000,
    batch: int = 10,
    learning_rates: Sequence[float] = (0.03, 0.1),
    networks: int = 4,
    seed: int = 0,
    save: Path | None = None,
    progress: Progress | None = None,
) -> xarray.Dataset:
    """Rank five kinds of networks by test error on Shapeset: table 1 and figure 11 of 2010.

    Parameters
    ----------
    data
        A dataset or its name; its values are scaled to -1 to 1.
    images
        How many images of Shapeset to draw, training, validation and test set together.
    width, depth
        Units a hidden layer, and hidden layers.
    steps, batch
        Of gradient descent.
    learning_rates
        Those to try; each kind has the one that is best on validation data.
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
        Loss and error of the test set, over (network, seed, step); the learning rate of each
        network, and ``paper``, the paper's error in per cent.
    """
    parts = kinds.divided(data, images, seed)
    found = base.train_each(
        kinds.laws(tuple(kinds.KINDS), parts, width, depth),
        parts,
        networks=networks,
        seed=seed,
        monitored=_MONITORED,
        save=save,
        progress=progress,
        steps=steps,
        batch=batch,
        learning_rates=learning_rates,
        record=base.recorded_steps(steps, _RECORDS),
        wanted=(),
    )
    found["paper"] = ("network", [PAPER[name] for name in found.network.values])
    found.paper.attrs["long_name"] = "test error on Shapeset in the paper, %"
    return found


def table(dataset: xarray.Dataset) -> Table:
    """Return each kind's test error beside the paper's, the best first."""
    end = 100 * dataset.error.isel(step=-1)
    rows = []
    for name in dataset.network.values[np.argsort(end.mean("seed").values)]:
        one = end.sel(network=name)
        row: dict[str, Any] = {"network": str(name)}
        row |= {"error, %": float(one.mean()), "least": float(one.min()), "most": float(one.max())}
        row["paper's error, %"] = float(dataset.paper.sel(network=name))
        row["learning rate"] = float(dataset.learning_rate.sel(network=name))
        row["diverged"] = int((dataset.diverged.sel(network=name) >= 0).sum())
        rows.append(row)
    return Table(
        f"{dataset.sizes['layer'] - 1} {base.recipe(dataset)}",
        rows,
        (
            f"error     of {dataset.attrs['monitored']} images of the test set: mean, least, most",
            "N         normalised initialisation; without it, U[±1/√n]",
        ),
    )


def findings(dataset: xarray.Dataset) -> list[str]:
    """Return the ranking beside the paper's, and which differences are clear."""
    end = dataset.error.isel(step=-1)
    mean = end.mean("seed")
    error = end.std("seed", ddof=1) / np.sqrt(end.sizes["seed"])
    ours = [str(name) for name in mean.network.values[np.argsort(mean.values)]]
    paper = [str(name) for name in mean.network.values[np.argsort(dataset.paper.values)]]
    same = "the same as" if ours == paper else "not the same as"
    found = [
        f"from the least error to the most: {', '.join(ours)}; {same} the paper's: "
        f"{', '.join(paper)}"
    ]
    for better, worse in zip(ours, ours[1:], strict=False):
        difference = float(mean.sel(network=worse) - mean.sel(network=better))
        spread = float(np.hypot(error.sel(network=worse), error.sel(network=better)))
        found.append(
            f"{worse} errs {100 * difference:.1f} ± {100 * spread:.1f} points more than {better} "
            "(standard error over networks)"
        )
    guessing = 100 * float(dataset.error.isel(step=0).mean())
    worst = 100 * float(mean.sel(network=ours[-1]))
    if worst > 0.9 * guessing:
        found.append(
            f"{ours[-1]} has learnt next to nothing: {worst:.1f} % (before training all are at "
            f"{guessing:.1f} % on average)"
        )
    return found


EXPERIMENT = Experiment("table-1", run, table, findings, error_curves)
