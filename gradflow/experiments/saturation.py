"""Figure 2 of Glorot & Bengio 2010: the top layer of a logistic network saturates, and escapes.

At the start the top hidden layer's activations, near 1/2, tell the output little of the input. The
output's biases learn the classes' frequencies at once, and the quickest way for the rest of the
output to do no harm is an activation of 0: the layer's saturated side, where little gradient goes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from gradflow import builders, statistics
from gradflow.data import Dataset
from gradflow.experiments import base
from gradflow.experiments.base import Experiment, Progress, Table
from gradflow.figures import saturation_in_training

__all__ = ["EXPERIMENT", "run"]

_RECORDS = 80
# An error that a network has learnt something at, of ten classes.
_LEARNT = 0.5
# A mean activation of logistic units that are saturated: half of what the paper's figure shows for
# a hidden layer that is not.
_SATURATED = 0.05


def run(
    *,
    data: Dataset | str = "digits",
    width: int = 100,
    depths: Sequence[int] = (1, 2, 3, 4, 5, 6),
    steps: int = 20_000,
    batch: int = 10,
    learning_rate: float = 1.0,
    networks: int = 4,
    seed: int = 0,
    save: Path | None = None,
    progress: Progress | None = None,
) -> xarray.Dataset:
    """Show the top layer of logistic networks saturate in training, and escape: figure 2 of 2010.

    Parameters
    ----------
    data
        A dataset or its name; its values are scaled to 0 to 1.
    width, depths
        Units a hidden layer, and how many hidden layers: weights are U[±1/√n].
    steps, batch, learning_rate
        Of gradient descent.
    networks
        How many random networks of each depth.
    seed
        Of everything that is random.
    save
        A folder for what it takes to go on after an interruption; not saved without it.
    progress
        Called with (depth, updates done, updates in all).

    Returns
    -------
    xarray.Dataset
        Activations' mean and variance, over (depth, seed, step, layer); loss and error, over
        (depth, seed, step); and ``steps_to_half``, over (depth, seed): the first recorded step
        with an error below 50 %, NaN where there is none.
    """
    parts = base.divided(data, seed).rescaled()
    found = base.train_each(
        {
            depth: builders.mlp(base.shape(parts, width, depth), "logistic", "standard")
            for depth in depths
        },
        parts,
        along="depth",
        networks=networks,
        seed=seed,
        save=save,
        progress=progress,
        steps=steps,
        batch=batch,
        learning_rates=[learning_rate],
        record=base.recorded_steps(steps, _RECORDS),
        wanted=(statistics.activation_mean, statistics.activation_variance, statistics.saturation),
    )
    learnt = found.error < _LEARNT
    first = found.step.where(learnt).min("step")
    found["steps_to_half"] = first.assign_attrs(long_name="first step with an error below 50 %")
    return found


def _top(dataset: xarray.Dataset, depth: int) -> xarray.DataArray:
    """Return the mean activation of the top hidden layer."""
    return dataset.activation_mean.sel(depth=depth, layer=depth)


def table(dataset: xarray.Dataset) -> Table:
    """Return, for each depth, when the top layer saturates and when the network learns."""
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
        f"logistic, U[±1/√n], {base.recipe(dataset)}",
        rows,
        ("top mean  mean activation of the top hidden layer; its least, and when, on average",),
    )


def findings(dataset: xarray.Dataset) -> list[str]:
    """Return, for each depth, whether the top layer saturates, and whether it escapes."""
    found = []
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
        found.append(sentence)
    return found


EXPERIMENT = Experiment("saturation", run, table, findings, saturation_in_training)
