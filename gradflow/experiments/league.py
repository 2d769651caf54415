"""A league table of remedies: which deep networks learn at all, all on the same data and budget.

Each has the learning rate that is best for it on validation data, of those that are tried.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import xarray

from gradflow import activations, ensembles, remedies
from gradflow._checks import unknown_name
from gradflow.data import Split
from gradflow.ensembles import Ensemble
from gradflow.experiments import _wording
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import league as figure
from gradflow.networks import Network
from gradflow.remedies import Remedy, SickNetwork
from gradflow.training import Recording

# Errors of ten classes below which a network has learnt something, and most.
_LEARNT, _GOOD = 0.5, 0.1

# The networks that remedies are tried on: φ and weights.
_NETWORKS: dict[str, tuple[str, str | Ensemble]] = {
    "logistic, N(0,1)": ("logistic", "unscaled"),
    "logistic, Glorot": ("logistic", "glorot"),
    "tanh, standard": ("tanh", "standard"),
    "tanh, Glorot": ("tanh", "glorot"),
    "tanh, orthogonal": ("tanh", ensembles.fan_in(1.0, "orthogonal")),
    "ReLU, Glorot": ("relu", "glorot"),
    "ReLU, He": ("relu", "he"),
    "ELU, He": ("elu", "he"),
    "SELU, LeCun": ("selu", "lecun"),
    "GELU, He": ("gelu", "he"),
    "SiLU, He": ("silu", "he"),
    "Mish, He": ("mish", "he"),
}
_PRE_LN = Remedy(
    "pre-LN residual",
    "paths",
    lambda sick: sick.residual(norm="layer"),
    "an addition and a LayerNorm a layer",
    "without scaling, signals grow with every block",
    league=("ReLU, He",),
)
# By the contender's name, the name of its network, and the remedy if there is one.
_CONTENDERS: dict[str, tuple[str, Remedy | None]] = {name: (name, None) for name in _NETWORKS}
_CONTENDERS |= {
    f"{network}, {remedy.label or remedy.name}": (network, remedy)
    for remedy in (*remedies.ALL, _PRE_LN)
    for network in _NETWORKS
}
_DEFAULT = tuple(
    name
    for name, (network, remedy) in _CONTENDERS.items()
    if remedy is None or network in remedy.league
)


def _network(contender: str, recipe: Recipe, parts: Split) -> Network:
    """The network of this contender, with a layer that makes logits."""
    if contender not in _CONTENDERS:
        raise unknown_name("contender", contender, _CONTENDERS)
    base, remedy = _CONTENDERS[contender]
    activation, weights = _NETWORKS[base]
    widths = recipe.widths(parts)
    sick = SickNetwork(
        activations.get(activation),
        ensembles.get(weights),
        width=recipe.width,
        depth=len(widths) - 2,
        inputs=widths[0],
        classes=widths[-1],
    )
    network = sick.mlp() if remedy is None else remedy.make(sick)
    return sick.mlp() if network is None else network


def _train(
    recipe: Recipe,
    *,
    contenders: Annotated[
        Sequence[str], "A network, or a network and a remedy, as 'ReLU, He, ReZero'."
    ] = _DEFAULT,
) -> xarray.Dataset:
    """Rank initialisations, activations, normalisations and paths by what deep networks learn.

    Data are standardised by pixel.

    Returns
    -------
    xarray.Dataset
        ``error``, ``loss`` and layers' ``movement``, over (network, seed, step, layer), each at the
        network's ``learning_rate``.
    """
    parts = recipe.split().standardised()
    networks = {name: _network(name, recipe, parts) for name in contenders}
    return recipe.train(networks, parts, record=Recording(recipe.even_steps(3), wanted=()))


def _ranked(dataset: xarray.Dataset) -> list[str]:
    mean = dataset.error.isel(step=-1).mean("seed")
    return [str(name) for name in mean.network.values[np.argsort(mean.values, kind="stable")]]


def _table(dataset: xarray.Dataset) -> Table:
    """Errors and the spread of layers' movement, the best network first."""
    rows = []
    for name in _ranked(dataset):
        one = dataset.sel(network=name)
        end = one.isel(step=-1)
        row: dict[str, Any] = {"network": name}
        row |= _wording.error_columns(end.error)
        row["learning rate"] = float(one.learning_rate)
        moved = _wording.geometric_mean(end.movement)
        row["moved, least of layers"] = float(moved.min())
        row["moved, most"] = float(moved.max())
        row["diverged"] = int((one.diverged >= 0).sum())
        rows.append(row)
    return Table(
        f"{dataset.attrs['depth']} {_wording.sizes(dataset)}, best of "
        f"{len(np.atleast_1d(dataset.attrs['learning_rates']))} rates",
        rows,
        (
            f"error     of {dataset.attrs['monitored']} images of the test set: mean, least, most",
            "moved     ‖W - W₀‖/‖W₀‖ at the end, geometric mean over networks that are finite",
        ),
    )


def _findings(dataset: xarray.Dataset) -> list[str]:
    """The networks that learn the task, those that learn some of it, and the others."""
    mean = dataset.error.isel(step=-1).mean("seed")
    sentences = []
    for sentence, low, high in (
        (f"learn the task (error below {100 * _GOOD:.0f} %)", -1.0, _GOOD),
        (f"learn some of it (below {100 * _LEARNT:.0f} %)", _GOOD, _LEARNT),
        ("do not learn it", _LEARNT, 2.0),
    ):
        names = [
            f"{name} ({100 * float(mean.sel(network=name)):.1f} %)"
            for name in _ranked(dataset)
            if low <= float(mean.sel(network=name)) < high
        ]
        sentences.append(f"{sentence}: {'; '.join(names) or 'none'}")
    return sentences


EXPERIMENT = Experiment(
    "league",
    Recipe(width=50, depth=50, steps=300, batch=32, learning_rate=(0.003, 0.01, 0.03, 0.1)),
    _train,
    _table,
    _findings,
    figure,
)
