"""Draw the weights of many networks: each leaf is a segment of the program of ``init``.

Equal leaves are one compiled program, and what ``init`` computes beside its weights is left out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gradflow.inspection._measuring.segments import work
from gradflow.inspection._measuring.walk import Walk
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import read
from gradflow.simulation import _threefry

__all__ = ["drawing"]


def drawing(model: Model, networks: int) -> Callable[[Array], tuple[Any, Any]]:
    """The function of keys to parameters and state, as `Model.draw` is, and faster.

    ``networks`` is how many will be drawn, in all calls.
    """
    init = model.init
    if init is None or not model.traceable:
        return model.draw
    key = _threefry.fused(jax.random.key(0))
    structure = jax.tree.structure(jax.eval_shape(init, key))
    program = read(init, key=key)
    walk = Walk(program, (), (), seconds=networks * work(program))

    def draw(keys: Array) -> tuple[Any, Any]:
        values = walk.up({program.arguments["key"][0]: _threefry.fused(keys)}).values
        leaves = [
            values[i]
            if i not in program.constants
            else jnp.broadcast_to(values[i], (len(keys), *values[i].shape))
            for i in program.outputs
        ]
        return jax.tree.unflatten(structure, leaves)

    return draw
