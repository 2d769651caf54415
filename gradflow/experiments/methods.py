"""Remedies that leave the network as it is: optimisers, clipped gradients, and noise in them.

All train the same networks on the same batches, each at the learning rate that is best for it on
validation data. `league` has the remedies that change the network.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import xarray

from gradflow import builders, training
from gradflow._checks import unknown_name
from gradflow.experiments import league
from gradflow.experiments._recipe import Experiment, Recipe
from gradflow.figures import league as figure
from gradflow.training import Recording

# Arguments of `training.train`. Gradients are clipped where they are longer than typical ones are.
_METHODS: dict[str, dict[str, Any]] = {
    **{name: {"optimiser": optimiser} for name, optimiser in training.OPTIMISERS.items()},
    **{
        f"sgd, clipped, {text}": {"clip": training.clipping(text)}
        for text in ("value:0.1", "norm:0.1", "global-norm:1", "adaptive:0.01")
    },
    "sgd, noise of variance 1e-4": {
        "optimiser": training.with_noise(training.OPTIMISERS["sgd"], 1e-4)
    },
}


def _train(
    recipe: Recipe,
    *,
    methods: Annotated[Sequence[str], "Optimisers, clippings and noise, by name."] = tuple(
        _METHODS
    ),
    activation: Annotated[str, "φ, by name."] = "tanh",
    weights: Annotated[str, "The weights' ensemble, by name."] = "glorot",
) -> xarray.Dataset:
    """Rank optimisers, gradient clippings and noise by what they teach one deep network.

    Data are standardised by pixel.

    Returns
    -------
    xarray.Dataset
        As of `league`, with methods along the axis ``network``.
    """
    parts = recipe.split().standardised()
    law = builders.mlp(recipe.widths(parts), activation, weights)
    for name in methods:
        if name not in _METHODS:
            raise unknown_name("method", name, _METHODS)
    record = Recording(recipe.even_steps(3), wanted=())
    return recipe.train(dict.fromkeys(methods, law), parts, record=record, own=_METHODS)


EXPERIMENT = Experiment(
    "methods",
    Recipe(
        width=50,
        depth=50,
        steps=300,
        batch=32,
        learning_rate=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    ),
    _train,
    league.EXPERIMENT.table,
    league.EXPERIMENT.findings,
    figure,
)
