"""The networks of Glorot & Bengio 2010 on Shapeset: five kinds, trained with one recipe.

Standard weights are U[±1/√n], 'N' are the paper's normalised ones.
"""

from typing import Any

from gradflow import builders
from gradflow.data import Dataset, Split, shapes
from gradflow.experiments import base
from gradflow.networks import Network

__all__ = ["IMAGES", "KINDS", "divided", "laws"]

KINDS = {
    "sigmoid": ("logistic", "standard"),
    "tanh": ("tanh", "standard"),
    "tanh N": ("tanh", "normalized"),
    "softsign": ("softsign", "standard"),
    "softsign N": ("softsign", "normalized"),
}
# Of Shapeset: as many as 10 000 updates of 10 see about three times.
IMAGES = 50_000


def divided(data: Dataset | str, images: int, seed: int) -> Split:
    """Return a dataset, or so many images of Shapeset, in three parts, from -1 to 1."""
    found = shapes(images, seed) if isinstance(data, str) and data == "shapeset" else data
    return base.divided(found, seed).rescaled(-1.0, 1.0)


def laws(names: tuple[str, ...], parts: Split, width: int, depth: int) -> dict[Any, Network]:
    """Return the laws of networks of these names."""
    widths = base.shape(parts, width, depth)
    return {name: builders.mlp(widths, *KINDS[name], name=name) for name in names}
