"""Remedies that leave the network as it is: optimisers, clipped gradients, and noise in them.

All train the same networks on the same batches, each at the learning rate that is best for it on
validation data. `league` has the remedies that change the network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xarray

from gradflow import builders, training
from gradflow._checks import unknown_name
from gradflow.data import Dataset
from gradflow.experiments import base, league
from gradflow.experiments.base import Experiment, Progress
from gradflow.figures import league as figure

__all__ = ["EXPERIMENT", "METHODS", "run"]

# Arguments of `training.train`. Gradients are clipped where they are longer than typical ones are.
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"optimiser": made} for name, made in training.OPTIMISERS.items()},
    **{
        f"sgd, clipped, {text}": {"clip": training.clipping(text)}
        for text in ("value:0.1", "norm:0.1", "global-norm:1", "adaptive:0.01")
    },
    "sgd, noise of variance 1e-4": {
        "optimiser": training.with_noise(training.OPTIMISERS["sgd"], 1e-4)
    },
}


def run(
    *,
    methods: Sequence[str] | None = None,
    data: Dataset | str = "digits",
    activation: str = "tanh",
    weights: str = "glorot",
    width: int = 50,
    depth: int = 50,
    steps: int = 300,
    batch: int = 32,
    learning_rates: Sequence[float] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    networks: int = 4,
    seed: int = 0,
    save: Path | None = None,
    progress: Progress | None = None,
) -> xarray.Dataset:
    """Rank optimisers, gradient clippings and noise by what they teach one deep network.

    Parameters
    ----------
    methods
        Names of `METHODS`; all of them without it.
    data
        A dataset or its name; standardised by pixel.
    activation, weights
        φ and the ensemble, by name.
    width, depth
        Units a hidden layer, and hidden layers.
    steps, batch
        Of each optimiser.
    learning_rates
        Those to try; each method has the one that is best on validation data.
    networks
        How many random networks; the same ones for each method.
    seed
        Of everything that is random.
    save
        A folder for what it takes to go on after an interruption; not saved without it.
    progress
        Called with (method, updates done, updates in all).

    Returns
    -------
    xarray.Dataset
        As of `league.run`; what is there called a network is a method.
    """
    parts = base.divided(data, seed).standardised()
    law = builders.mlp(base.shape(parts, width, depth), activation, weights)
    names = list(METHODS if methods is None else methods)
    for name in names:
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
    return base.train_each(
        dict.fromkeys(names, law),
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
        own=METHODS,
    )


EXPERIMENT = Experiment("methods", run, league.table, league.findings, figure)
