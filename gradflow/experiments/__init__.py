"""Experiments on training: the paper's, and those of what came after it.

Each is a module with a function that trains, and says what it found in a table, in sentences and in
a figure; `base` says what one is. To add one, write such a module and name it in `ALL`.
"""

from gradflow._checks import unknown_name
from gradflow.experiments import (
    base,
    clipping,
    gradients,
    isometry,
    layers,
    league,
    methods,
    percentiles,
    saturation,
    table_1,
    trainability,
)

__all__ = ["ALL", "base", "get"]

_MODULES = (
    layers,
    saturation,
    percentiles,
    gradients,
    table_1,
    trainability,
    isometry,
    league,
    methods,
    clipping,
)
ALL = {module.EXPERIMENT.name: module.EXPERIMENT for module in _MODULES}


def get(name: str) -> base.Experiment:
    """Return the experiment of this name.

    Raises
    ------
    InputError
        If there is none.
    """
    if name not in ALL:
        raise unknown_name("experiment", name, ALL)
    return ALL[name]
