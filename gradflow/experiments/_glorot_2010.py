"""The networks of Glorot & Bengio 2010 on Shapeset: five kinds, trained with one recipe.

Standard weights are U[±1/√n], 'N' are the paper's normalised ones.
"""

from typing import Any

from gradflow import builders
from gradflow.data import Split
from gradflow.experiments._recipe import Recipe
from gradflow.networks import Network

KINDS = {
    "sigmoid": ("logistic", "standard"),
    "tanh": ("tanh", "standard"),
    "tanh N": ("tanh", "normalized"),
    "softsign": ("softsign", "standard"),
    "softsign N": ("softsign", "normalized"),
}
# As many images as 10 000 updates of 10 see about three times.
RECIPE = Recipe(
    data="shapeset",
    images=50_000,
    width=200,
    depth=5,
    steps=10_000,
    batch=10,
    learning_rate=0.03,
)


def networks_and_data(
    recipe: Recipe, kinds: tuple[str, ...] = tuple(KINDS)
) -> tuple[dict[Any, Network], Split]:
    """The laws of networks of these kinds, by kind, and images scaled to between -1 and 1."""
    parts = recipe.split().rescaled(-1.0, 1.0)
    widths = recipe.widths(parts)
    return {name: builders.mlp(widths, *KINDS[name], name=name) for name in kinds}, parts
