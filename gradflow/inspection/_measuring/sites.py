"""Whose sites do not mix: values of which each entry along one axis comes of one site alone.

It is seen by sending NaN through the first site, and through the last: every path that a gradient
takes carries it, and a value whose NaN stay at that entry of one axis has nothing of other sites.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.inspection._measuring.segments import is_float
from gradflow.inspection._measuring.walk import Walk

__all__ = ["site_axes"]


def site_axes(walk: Walk, arguments: Mapping[int, Any]) -> dict[int, int]:
    """Of each value that segments hand on, and whose sites do not mix, the axis of the sites.

    Sites are the entries of axis 0 of all inputs; without such an axis, or with inputs that are
    integers and have no NaN, no value's sites are known not to mix.
    """
    inputs = [arguments[i] for i in walk.program.arguments["inputs"]]
    counts = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in inputs}
    if len(counts) != 1 or min(counts) < 2 or not all(map(is_float, inputs)):
        return {}
    (sites,) = counts
    found: list[dict[int, set[int]]] = []
    for site in (0, sites - 1):
        poisoned = {
            i: jnp.asarray(arguments[i]).at[site].set(jnp.nan)
            for i in walk.program.arguments["inputs"]
        }
        values = walk.up({**arguments, **poisoned}).values
        found.append(
            {i: _axes(values[i][0], site, sites) for i in walk.differentiable & set(values)}
        )
    both = {i: first & found[1].get(i, set()) for i, first in found[0].items()}
    return {i: min(axes) for i, axes in both.items() if axes}


def _axes(value: jax.Array | np.ndarray, site: int, sites: int) -> set[int]:
    """The axes of a value along which NaN are at one site, and nowhere else."""
    nan = np.isnan(np.asarray(value, np.float64))
    axes = set()
    for axis, size in enumerate(nan.shape):
        if size == sites:
            where = np.asarray(nan.any(tuple(i for i in range(nan.ndim) if i != axis)))
            if where[site] and where.sum() == 1:
                axes.add(axis)
    return axes
