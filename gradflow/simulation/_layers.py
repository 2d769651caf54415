"""The layers of a network, one after another: keys, weights that are given, the scan."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gradflow._checks import check_sequence
from gradflow.errors import InputError
from gradflow.networks import Network, Stage

__all__ = ["LayerKey", "LayerWeights", "check_weights", "layer_keys", "scan_blocks"]


class LayerWeights(NamedTuple):
    """The weights and biases of a layer, in the order of their use.

    Those of a stage have an axis of layers in front, unless its layers share them.
    """

    matrices: tuple[Float[Array, "*layers n_out n_in"], ...]  # W itself, σ_w/√n_in and all
    biases: tuple[Float[Array, "*layers 1 n_out"], ...]


class LayerKey(NamedTuple):
    """The key of a layer, with its time step if it is tied and its weights if they are given.

    Where weights are given, the key draws the rest: masks of dropout, inputs of a time step. Arrays
    may have an axis of layers in front.
    """

    key: Array
    step: Int[Array, "*layers"] | None = None
    weights: LayerWeights | None = None  # of a tied layer, the biases only


def layer_keys(
    network: Network, keys: Array, weights: Sequence[LayerWeights] | None = None
) -> list[tuple[Stage, LayerKey]]:
    """Pair each stage of a network with the keys of its layers, which have an axis of layers.

    Parameters
    ----------
    network
        The law of the network.
    keys
        Shape (layers,). A tied stage has the first of its keys at all of its steps.
    weights
        By stage, where they are given and not drawn.
    """
    by_stage: Sequence[LayerWeights | None] = weights or [None] * len(network.stages)
    pairs, first = [], 0
    for stage, given in zip(network.stages, by_stage, strict=True):
        pairs.append((stage, _of_stage(stage, keys[first : first + stage.repeats], given)))
        first += stage.repeats
    return pairs


def _of_stage(stage: Stage, keys: Array, weights: LayerWeights | None) -> LayerKey:
    if not stage.tied:
        return LayerKey(keys, weights=weights)

    def at_each_step(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (stage.repeats, *leaf.shape))

    biases = None
    if weights is not None:
        biases = LayerWeights((), jax.tree.map(at_each_step, weights.biases))
    return LayerKey(at_each_step(keys[0]), jnp.arange(stage.repeats), biases)


def check_weights(network: Network, weights: Any) -> None:
    """Raise `InputError` unless the weights, by stage, have the shapes of this network's."""
    by_stage = check_sequence(
        "weights", weights, "a network's weights by stage, as training.initial_weights draws them"
    )
    shapes, first = network.shapes, 0
    expected = []
    for stage in network.stages:
        layers = () if stage.tied else (stage.repeats,)
        expected.append([(*layers, *shape) for shape in shapes[first]])
        first += stage.repeats
    given = [[tuple(m.shape) for m in getattr(stage, "matrices", ())] for stage in by_stage]
    # A delta-orthogonal filter has one position of those that its declared matrix has.
    pairs = zip(itertools.chain(*given), itertools.chain(*expected), strict=False)
    fit = [len(stage) for stage in given] == [len(stage) for stage in expected] and all(
        one[:-1] == other[:-1] and one[-1] and other[-1] % one[-1] == 0 for one, other in pairs
    )
    if not fit:
        raise InputError(
            f"weights has matrices of shapes {given} by stage; for this network they are {expected}"
        )


def scan_blocks(step: Callable, carry: Any, xs: Any, reverse: bool = False) -> tuple[Any, Any]:
    """`jax.lax.scan`, but a single step may change the carry's shape, as a first layer does."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, xs, reverse=reverse)
    carry, y = step(carry, jax.tree.map(lambda leaf: leaf[0], xs))
    return carry, jax.tree.map(lambda leaf: leaf[None], y)
