"""A model of any JAX library as two pure functions: what adapters make and the rest reads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

__all__ = ["Model"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as a law of its weights and a function of them.

    Attributes
    ----------
    name
        What its users call it, as ``"ResNet"``.
    init
        A function of a key to ``(parameters, state)``: the leaves that training changes, and all
        others (batch statistics, counters). None where there is no law, only ``given`` weights.
    apply
        A pure function ``(parameters, state, key, *inputs) -> outputs``, traceable, in the mode of
        training: BatchNorm by the batch, dropout drawn from ``key``. Outputs are arrays.
    given
        The weights at hand, ``(parameters, state)``, where the model holds them; else None.
    traceable
        Whether ``init`` can be mapped over keys; if not it is called key by key.
    mode
        What was chosen for the user, to be said: ``"train=True"``; empty where nothing was.
    """

    name: str
    init: Callable[[PRNGKeyArray], tuple[PyTree, PyTree]] | None
    apply: Callable[..., Any]
    given: tuple[PyTree, PyTree] | None = None
    traceable: bool = True
    mode: str = ""

    def draw(self, keys: Array) -> tuple[PyTree, PyTree]:
        """Parameters and state of many networks: every leaf has a leading axis of networks."""
        if self.init is None:
            raise ValueError(f"{self.name} has no law of its weights")
        if self.traceable:
            return jax.vmap(self.init)(keys)
        drawn = [self.init(key) for key in keys]
        return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *drawn)
