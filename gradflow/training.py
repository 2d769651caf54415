"""Training: the weights of random networks as parameters.

`initial_weights` are those of the network that `simulation.propagation.propagate` draws with the
dense sampler from the same key; `outputs` is the network with any such weights, an ordinary
function to differentiate. What is measured of trained weights is what `propagate` measures when it
is given them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow.ensembles import Distribution
from gradflow.networks import Network, Stage
from gradflow.simulation import matrices, questions
from gradflow.simulation.propagation import scan_blocks
from gradflow.simulation.questions import LayerKey, LayerWeights

__all__ = ["Weights", "initial_weights", "outputs"]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# By stage, each array with an axis of layers in front, unless the stage's layers share theirs.
Weights = tuple[LayerWeights, ...]


def initial_weights(network: Network, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Weights:
    """Draw the weights and biases of one random network, as the dense sampler does.

    Biases are parameters where the network has them, and `networks.with_biases` gives it some that
    start at 0.

    Returns
    -------
    tuple
        For each stage, its matrices W, (layers, n_out, n_in), σ_w/√n_in and all, and its biases,
        (layers, 1, n_out); without the axis of layers where they share their weights.
    """
    keys = jax.random.split(key, network.depth + 1)[1:]
    sites = 2 * math.prod(stage.block.merges for stage in network.stages)
    found, first = [], 0
    for stage, n_in in zip(network.stages, network.stage_widths[:-1], strict=True):
        draw = functools.partial(_drawn, stage, jnp.zeros((sites, n_in), dtype))
        of_stage = keys[first : first + stage.repeats]
        # One layer after another, so that a deep stage takes no longer to compile.
        found.append(draw(of_stage[0]) if stage.tied else jax.lax.map(draw, of_stage))
        first += stage.repeats
        sites //= stage.block.merges
    return tuple(found)


def _drawn(stage: Stage, signal: Array, key: Array) -> LayerWeights:
    """Return what a block draws, by applying it once to a signal of this shape."""
    drawn: list[Array] = []
    biases: list[Array] = []

    def multiply(
        key: PRNGKeyArray,
        x: Array,
        *,
        sigma_w: Any,
        width: int,
        distribution: Distribution,
        seen: Array | None = None,
    ) -> Array:
        del seen
        entries = matrices.drawn(key, (width, x.shape[1]), distribution, x.dtype).weights
        drawn.append(jnp.asarray(sigma_w, x.dtype) / x.shape[1] ** 0.5 * entries)
        return jnp.zeros((x.shape[0], width), x.dtype)

    def bias(draw: Callable[[], Array]) -> Array:
        biases.append(draw())
        return biases[-1]

    multiply.bias = bias  # type: ignore[attr-defined]
    stage.block.apply(signal, multiply, key)
    return LayerWeights(tuple(drawn), tuple(biases))


def outputs(
    network: Network,
    weights: Weights,
    inputs: Float[Array, "sites n_in"],
    key: PRNGKeyArray | None = None,
) -> Float[Array, "sites_out n_out"]:
    """Return z^L of the network with these weights: with softmax, its logits.

    A pure function: jit it, vmap it, differentiate it.

    Parameters
    ----------
    network
        Its structure; the scales of its law have no say.
    weights
        Those of `initial_weights`, or trained.
    inputs
        Shape (sites, n_0).
    key
        For what is random and no parameter: masks of dropout, the inputs of a recurrent network.
        With the key of `propagate` they are the same as there.
    """
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, network.depth + 1)[1:]
    signal, first = inputs, 0
    for stage, given in zip(network.stages, weights, strict=True):
        of_stage = questions.stage_keys(stage, keys[first : first + stage.repeats])
        step = functools.partial(_layer, stage, given if stage.tied else None)
        each = None if stage.tied else given
        signal, _ = scan_blocks(step, signal, (of_stage, each))
        first += stage.repeats
    return signal


def _layer(
    stage: Stage,
    shared: LayerWeights | None,
    signal: Array,
    parts: tuple[LayerKey, LayerWeights | None],
) -> tuple[Array, None]:
    key, own = parts
    given = shared if own is None else own
    assert given is not None
    remaining = iter(given.matrices)

    def answer(_: PRNGKeyArray, x: Array, **law: Any) -> Array:
        del law
        return _matmul(x, next(remaining).T)

    key = key._replace(given=LayerWeights((), given.biases))
    return questions.blockwise(stage.block, key, signal, answer), None
