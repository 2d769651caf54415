"""Layers one after another: loops over them, and runs of those with equally many sites."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["joined", "map_layers", "scan_layers"]

# Layers whose quadratures, of about 100 kB each for every average, are in memory together.
_LAYERS_AT_ONCE = 1000


def map_layers(f: Callable[[Any], Any], layers: Any) -> Any:
    """F of every layer: at once or, where their quadratures would fill memory, in turn."""
    few = len(jax.tree.leaves(layers)[0]) <= _LAYERS_AT_ONCE
    return jax.vmap(f)(layers) if few else jax.lax.map(f, layers)


def joined(limits: Sequence[Any]) -> list[Any]:
    """Concatenate the arrays of layers that follow each other with equally many sites.

    ``limits`` are pytrees whose leaves have the shape (layers, sites, …).
    """
    runs = itertools.groupby(limits, lambda limit: jax.tree.leaves(limit)[0].shape[1])
    return [jax.tree.map(lambda *v: jnp.concatenate(v), *run) for _, run in runs]


def scan_layers(step: Callable, carry: Any, xs: Any, length: int, reverse: bool = False) -> Any:
    """`jax.lax.scan`, but a single step may change the carry's structure."""
    if length != 1:
        return jax.lax.scan(step, carry, xs, length=length, reverse=reverse)
    carry, y = step(carry, jax.tree.map(lambda leaf: leaf[0], xs))
    return carry, jax.tree.map(lambda leaf: leaf[None], y)
