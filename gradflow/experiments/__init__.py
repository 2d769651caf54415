"""Experiments on training: the paper's, and those of what came after it.

Each is a module of this package that has an `EXPERIMENT`; `recipe` says what one is. To add one,
write such a module: `ALL` and the command line find it.
"""

import importlib
import pkgutil

from gradflow._checks import unknown_name
from gradflow.experiments._recipe import Experiment, Recipe

__all__ = ["ALL", "Experiment", "Recipe", "get"]

_MODULES = [
    importlib.import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
]
ALL: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in _MODULES
    if hasattr(module, "EXPERIMENT")
}


def get(name: str) -> Experiment:
    """The experiment of this name.

    Raises
    ------
    InputError
        If there is none.
    """
    if name not in ALL:
        raise unknown_name("experiment", name, ALL)
    return ALL[name]
