"""Table 1 and figure 11 of Glorot & Bengio 2010: five kinds of deep networks, ranked.

The paper has 5 hidden layers of 1000 units and endless images. The ranking shows at width 200.
"""

import dataclasses
from typing import Any

import numpy as np
import xarray

from gradflow.experiments import _glorot_2010, _wording
from gradflow.experiments._glorot_2010 import networks_and_data
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import error_curves
from gradflow.training import Recording

# The paper's test errors on Shapeset-3×2, in per cent.
_PAPER = {"softsign": 16.27, "softsign N": 16.06, "tanh": 27.15, "tanh N": 15.60, "sigmoid": 82.61}
_RECORDS = 20
_MONITORED = 2000


def _train(recipe: Recipe) -> xarray.Dataset:
    """Rank five kinds of networks by test error on Shapeset: table 1 and figure 11 of 2010.

    Returns
    -------
    xarray.Dataset
        Loss and error of the test set, over (network, seed, step); the learning rate of each
        network, and ``paper``, the paper's error in per cent.
    """
    networks, parts = networks_and_data(recipe)
    record = Recording(recipe.even_steps(_RECORDS), wanted=())
    dataset = recipe.train(networks, parts, record=record, monitored=_MONITORED)
    dataset["paper"] = ("network", [_PAPER[name] for name in dataset.network.values])
    dataset.paper.attrs["long_name"] = "test error on Shapeset in the paper, %"
    return dataset


def _table(dataset: xarray.Dataset) -> Table:
    """Each kind's test error beside the paper's, the best first."""
    end = dataset.error.isel(step=-1)
    rows = []
    for name in dataset.network.values[np.argsort(end.mean("seed").values)]:
        row: dict[str, Any] = {"network": str(name)}
        row |= _wording.error_columns(end.sel(network=name))
        row["paper's error, %"] = float(dataset.paper.sel(network=name))
        row["learning rate"] = float(dataset.learning_rate.sel(network=name))
        row["diverged"] = int((dataset.diverged.sel(network=name) >= 0).sum())
        rows.append(row)
    return Table(
        f"{dataset.sizes['layer'] - 1} {_wording.sizes(dataset)}",
        rows,
        (
            f"error     of {dataset.attrs['monitored']} images of the test set: mean, least, most",
            "N         normalised initialisation; without it, U[±1/√n]",
        ),
    )


def _findings(dataset: xarray.Dataset) -> list[str]:
    """The ranking beside the paper's, and the differences with their standard errors."""
    end = dataset.error.isel(step=-1)
    mean = end.mean("seed")
    error = end.std("seed", ddof=1) / np.sqrt(end.sizes["seed"])
    ours = [str(name) for name in mean.network.values[np.argsort(mean.values)]]
    paper = [str(name) for name in mean.network.values[np.argsort(dataset.paper.values)]]
    same = "the same as" if ours == paper else "not the same as"
    sentences = [
        f"from the least error to the most: {', '.join(ours)}; {same} the paper's: "
        f"{', '.join(paper)}"
    ]
    for better, worse in zip(ours, ours[1:], strict=False):
        difference = float(mean.sel(network=worse) - mean.sel(network=better))
        spread = float(np.hypot(error.sel(network=worse), error.sel(network=better)))
        sentences.append(
            f"{worse} errs {100 * difference:.1f} ± {100 * spread:.1f} points more than {better} "
            "(standard error over networks)"
        )
    guessing = 100 * float(dataset.error.isel(step=0).mean())
    worst = 100 * float(mean.sel(network=ours[-1]))
    if worst > 0.9 * guessing:
        sentences.append(
            f"{ours[-1]} has learnt next to nothing: {worst:.1f} % (before training all are at "
            f"{guessing:.1f} % on average)"
        )
    return sentences


EXPERIMENT = Experiment(
    "table-1",
    dataclasses.replace(_glorot_2010.RECIPE, learning_rate=(0.03, 0.1)),
    _train,
    _table,
    _findings,
    error_curves,
)
