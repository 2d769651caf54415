"""Remedies' league table: which deep networks learn at all, all with one data set and one budget.

Each has the learning rate that is best for it on validation data, of those that are tried.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from gradflow import activations, builders, ensembles
from gradflow._checks import unknown_name
from gradflow.blocks import Dense
from gradflow.data import Dataset
from gradflow.experiments import base
from gradflow.experiments.base import Experiment, Progress, Table
from gradflow.figures import league as figure
from gradflow.networks import Network, Stage

__all__ = ["CONTENDERS", "EXPERIMENT", "run"]

# The error of ten classes that a network has learnt something, or most, at.
_LEARNT, _GOOD = 0.5, 0.1

_Widths = tuple[int, ...]


def _mlp(activation: str, weights: Any, **options: Any) -> Callable[[_Widths], Network]:
    return lambda widths: builders.mlp(widths, activation, weights, **options)


def _residual(activation: str, weights: str, **options: Any) -> Callable[[_Widths], Network]:
    """Return what makes a residual network, with a layer that makes logits of its stream."""

    def of(widths: _Widths) -> Network:
        first, *hidden, classes = widths
        body = builders.residual(first, hidden[0], len(hidden) - 1, activation, weights, **options)
        top = Dense(activations.get(activation), classes)
        return dataclasses.replace(body, stages=(*body.stages, Stage(top)))

    return of


# From the widths, input and output among them, to a law.
CONTENDERS: dict[str, Callable[[_Widths], Network]] = {
    "logistic, N(0,1)": _mlp("logistic", "unscaled"),
    "logistic, Glorot": _mlp("logistic", "glorot"),
    "logistic, Glorot, BatchNorm": _mlp("logistic", "glorot", norm="batch"),
    "tanh, standard": _mlp("tanh", "standard"),
    "tanh, Glorot": _mlp("tanh", "glorot"),
    "tanh, orthogonal": _mlp("tanh", ensembles.fan_in(1.0, "orthogonal")),
    "tanh, Glorot, BatchNorm": _mlp("tanh", "glorot", norm="batch"),
    "ReLU, Glorot": _mlp("relu", "glorot"),
    "ReLU, He": _mlp("relu", "he"),
    "ReLU, He, BatchNorm": _mlp("relu", "he", norm="batch"),
    "ReLU, He, LayerNorm": _mlp("relu", "he", norm="layer"),
    "ELU, He": _mlp("elu", "he"),
    "SELU, LeCun": _mlp("selu", "lecun"),
    "GELU, He": _mlp("gelu", "he"),
    "SiLU, He": _mlp("silu", "he"),
    "Mish, He": _mlp("mish", "he"),
    "ReLU, He, residual": _residual("relu", "he"),
    "ReLU, He, residual/√L": _residual("relu", "he", scale="depth"),
    "ReLU, He, ReZero": _residual("relu", "he", scale="zero"),
    "ReLU, He, pre-LN residual": _residual("relu", "he", norm="layer"),
}


def run(
    *,
    contenders: Sequence[str] | None = None,
    data: Dataset | str = "digits",
    width: int = 50,
    depth: int = 50,
    steps: int = 300,
    batch: int = 32,
    learning_rates: Sequence[float] = (0.003, 0.01, 0.03, 0.1),
    networks: int = 4,
    seed: int = 0,
    save: Path | None = None,
    progress: Progress | None = None,
) -> xarray.Dataset:
    """Rank initialisations, activations, normalisations and paths by what deep networks learn.

    Parameters
    ----------
    contenders
        Names of `CONTENDERS`; all of them without it.
    data
        A dataset or its name; standardised by pixel.
    width, depth
        Units a hidden layer, and hidden layers.
    steps, batch
        Of gradient descent.
    learning_rates
        Those to try; each contender has the one that is best on validation data.
    networks
        How many random networks of each.
    seed
        Of everything that is random.
    save
        A folder for what it takes to go on after an interruption; not saved without it.
    progress
        Called with (contender, updates done, updates in all).

    Returns
    -------
    xarray.Dataset
        ``error``, ``loss`` and layers' ``movement``, over (network, seed, step, layer), each at the
        network's ``learning_rate``.
    """
    parts = base.divided(data, seed).standardised()
    widths = base.shape(parts, width, depth)
    names = list(CONTENDERS if contenders is None else contenders)
    for name in names:
        if name not in CONTENDERS:
            raise unknown_name("contender", name, CONTENDERS)
    return base.train_each(
        {name: CONTENDERS[name](widths) for name in names},
        parts,
        networks=networks,
        seed=seed,
        save=save,
        progress=progress,
        steps=steps,
        batch=batch,
        learning_rates=learning_rates,
        record=base.recorded_steps(steps, 3),
        wanted=(),
    )


def _ranked(dataset: xarray.Dataset) -> list[str]:
    mean = dataset.error.isel(step=-1).mean("seed")
    return [str(name) for name in mean.network.values[np.argsort(mean.values, kind="stable")]]


def table(dataset: xarray.Dataset) -> Table:
    """Return errors and the spread of layers' movement, the best network first."""
    rows = []
    for name in _ranked(dataset):
        one = dataset.sel(network=name)
        end = one.isel(step=-1)
        row: dict[str, Any] = {"network": name}
        for what, value in (
            ("error, %", end.error.mean()),
            ("least", end.error.min()),
            ("most", end.error.max()),
        ):
            row[what] = 100 * float(value)
        row["learning rate"] = float(one.learning_rate)
        moved = base.geometric_mean(end.movement)
        row["moved, least of layers"] = float(moved.min())
        row["moved, most"] = float(moved.max())
        row["diverged"] = int((one.diverged >= 0).sum())
        rows.append(row)
    return Table(
        f"{dataset.attrs['depth']} {base.recipe(dataset)}, best of "
        f"{len(np.atleast_1d(dataset.attrs['learning_rates']))} rates",
        rows,
        (
            f"error     of {dataset.attrs['monitored']} images of the test set: mean, least, most",
            "moved     ‖W - W₀‖/‖W₀‖ at the end, geometric mean over networks that are finite",
        ),
    )


def findings(dataset: xarray.Dataset) -> list[str]:
    """Return who learns, and who does not."""
    mean = dataset.error.isel(step=-1).mean("seed")
    found = []
    for sentence, low, high in (
        (f"learn the task (error below {100 * _GOOD:.0f} %)", -1.0, _GOOD),
        (f"learn some of it (below {100 * _LEARNT:.0f} %)", _GOOD, _LEARNT),
        ("do not learn it", _LEARNT, 2.0),
    ):
        those = [
            f"{name} ({100 * float(mean.sel(network=name)):.1f} %)"
            for name in _ranked(dataset)
            if low <= float(mean.sel(network=name)) < high
        ]
        found.append(f"{sentence}: {'; '.join(those) or 'none'}")
    return found


EXPERIMENT = Experiment("league", run, table, findings, figure)
