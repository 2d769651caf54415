"""Figure 2 of Glorot & Bengio 2010: the top layer of a logistic network saturates, and escapes.

At the start the top hidden layer's activations, near 1/2, tell the output little of the input. The
output's biases learn the classes' frequencies at once, and the quickest way for the rest of the
output to do no harm is an activation of 0: the layer's saturated side, where little gradient goes.
"""

from typing import Any

import numpy as np
import xarray

from gradflow import builders, statistics
from gradflow.experiments import _wording
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import saturation_in_training
from gradflow.training import Recording

_RECORDS = 80
# An error of ten classes below which a network has learnt something.
_LEARNT = 0.5
# The mean activation below which logistic units are saturated: half of the least that the paper's
# figure shows for a hidden layer that is not saturated.
_SATURATED = 0.05


def _train(recipe: Recipe) -> xarray.Dataset:
    """Show the top layer of logistic networks saturate in training, and escape: figure 2 of 2010.

    Weights are U[±1/√n]; the data's values are scaled to between 0 and 1.

    Returns
    -------
    xarray.Dataset
        Activations' mean and variance, over (depth, seed, step, layer); loss and error, over
        (depth, seed, step); and ``steps_to_half``, over (depth, seed): the first recorded step
        with an error below 50 %, NaN where there is none.
    """
    parts = recipe.split().rescaled()
    networks = {
        depth: builders.mlp(recipe.widths(parts, depth), "logistic", "standard")
        for depth in recipe.depths or ()
    }
    wanted = (statistics.activation_mean, statistics.activation_variance, statistics.saturation)
    record = Recording(recipe.even_steps(_RECORDS), wanted=wanted)
    dataset = recipe.train(networks, parts, record=record, along="depth")
    first = dataset.step.where(dataset.error < _LEARNT).min("step")
    dataset["steps_to_half"] = first.assign_attrs(long_name="first step with an error below 50 %")
    return dataset


def _top(dataset: xarray.Dataset, depth: int) -> xarray.DataArray:
    """The mean activation of the top hidden layer."""
    return dataset.activation_mean.sel(depth=depth, layer=depth)


def _table(dataset: xarray.Dataset) -> Table:
    """The steps at which the top layer saturates and the network learns, by depth."""
    rows = []
    for depth in dataset.depth.values.tolist():
        one, top = dataset.sel(depth=depth), _top(dataset, depth)
        when = one.steps_to_half
        row: dict[str, Any] = {
            "hidden layers": depth,
            "top mean, at the start": float(top.isel(step=0).mean()),
            "top mean, least": float(top.min("step").mean()),
            "at step": float(top.idxmin("step").mean()),
        }
        for what, value in (("first", when.min()), ("last", when.max())):
            row[f"error < 50 % at step, {what}"] = float(value)
        row["networks, that get there"] = f"{int(np.isfinite(when).sum())} of {when.size}"
        row["error at the end, %"] = 100 * float(one.error.isel(step=-1).mean())
        rows.append(row)
    return Table(
        f"logistic, U[±1/√n], {_wording.sizes(dataset)}",
        rows,
        ("top mean  mean activation of the top hidden layer; its least, and when, on average",),
    )


def _findings(dataset: xarray.Dataset) -> list[str]:
    """Whether the top layer saturates, and whether it escapes, by depth."""
    sentences = []
    for depth in dataset.depth.values.tolist():
        one, top = dataset.sel(depth=depth), _top(dataset, depth)
        least = float(top.min("step").mean())
        at = top.idxmin("step")
        when = one.steps_to_half
        escaped = int(np.isfinite(when).sum())
        saturates = "saturates at 0" if least < _SATURATED else "does not saturate"
        sentence = (
            f"depth {depth}: the top hidden layer {saturates} (mean activation "
            f"{float(top.isel(step=0).mean()):.2f} at the start, {least:.2g} at step "
            f"{int(at.min())} to {int(at.max())}); "
        )
        if escaped:
            sentence += (
                f"{escaped} of {when.size} networks come below an error of 50 %, at step "
                f"{int(when.min())} to {int(when.max())}"
            )
        else:
            sentence += f"no network comes below an error of 50 % in {dataset.attrs['steps']} steps"
        sentences.append(sentence)
    return sentences


EXPERIMENT = Experiment(
    "saturation",
    Recipe(width=100, depths=(1, 2, 3, 4, 5, 6), steps=20_000, batch=10, learning_rate=1.0),
    _train,
    _table,
    _findings,
    saturation_in_training,
)
