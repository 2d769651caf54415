"""The weights of a random network as parameters, and the network as a function of them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from gradflow._arguments import as_key
from gradflow._inputs import as_inputs
from gradflow._norms import unit_rows
from gradflow.errors import InputError
from gradflow.networks import Network, Stage, check_network
from gradflow.simulation import _linearisation, _matrices
from gradflow.simulation._layers import (
    LayerKey,
    LayerWeights,
    check_weights,
    layer_keys,
    scan_blocks,
)

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# By stage, each array with an axis of layers in front, unless the stage's layers share theirs.
Weights = tuple[LayerWeights, ...]

# Stages of no more layers are trained as so many arrays: a loop over slices of one takes a third
# more time, and compiles in a time that does not grow with them.
_FEW_LAYERS = 16


def initial_weights(
    network: Network, key: PRNGKeyArray | int, dtype: DTypeLike = jnp.float32
) -> Weights:
    """Draw the weights and biases of one random network, as the dense sampler does.

    Biases are parameters where the network has them, and `networks.with_biases` gives it some that
    start at 0.

    Returns
    -------
    tuple
        For each stage, its matrices W, (layers, n_out, n_in), σ_w/√n_in and all, and its biases,
        (layers, 1, n_out); without the axis of layers where they share their weights.
    """
    check_network(network)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype is {dtype!r}; it is a float type")
    keys = jax.random.split(as_key(key), network.depth + 1)[1:]
    sites = 2 * network.positions
    weights, first = [], 0
    for stage, n_in in zip(network.stages, network.stage_widths[:-1], strict=True):
        draw = functools.partial(_drawn, stage, jnp.zeros((sites, n_in), dtype))
        of_stage = keys[first : first + stage.repeats]
        # One layer after another, so that a deep stage takes no longer to compile.
        weights.append(draw(of_stage[0]) if stage.tied else jax.lax.map(draw, of_stage))
        first += stage.repeats
        sites = int(sites // stage.block.pool_factor)
    return tuple(weights)


def _drawn(stage: Stage, signal: Array, key: Array) -> LayerWeights:
    """The weights that a block draws when it is applied to a signal of this shape."""
    specs, biases = _linearisation.weight_specs(stage.block, LayerKey(key), signal)

    def weights(spec: _linearisation.WeightSpec) -> Array:
        entries = _matrices.drawn(spec.key, spec.shape, spec.distribution, spec.dtype).weights
        drawn = jnp.asarray(spec.sigma_w, spec.dtype) / spec.shape[1] ** 0.5 * entries
        return drawn if spec.mu_w is None else drawn + jnp.asarray(spec.mu_w) / spec.shape[1]

    return LayerWeights(tuple(map(weights, specs)), biases)


def outputs(
    network: Network,
    weights: Weights,
    inputs: Float[Array, "sites n_in"],
    key: PRNGKeyArray | int | None = None,
) -> Float[Array, "sites_out n_out"]:
    """The pre-activations z^L of the network with these weights; before softmax, its logits.

    A pure function: jit it, vmap it, differentiate it.

    Parameters
    ----------
    network
        The structure; the scales of its weights' laws are not used.
    weights
        Of `initial_weights`, or trained.
    inputs
        Shape (sites, n_0).
    key
        Of random numbers other than weights: masks of dropout, the inputs of a recurrent network.
        They are those that `propagate` draws from the same key.

    Returns
    -------
    Array
        Shape (sites after pooling, n_L).

    Raises
    ------
    InputError
        If weights or inputs do not fit the network.
    """
    inputs = as_inputs(inputs, network)
    check_weights(network, weights)
    return _walk(network, weights, inputs, key, lambda _: None)[0]


def finite_layers(
    network: Network, weights: Weights, inputs: Float[Array, "sites n_in"], key: PRNGKeyArray
) -> Bool[Array, " layers"]:
    """Whether the pre-activations of `outputs` are finite, at each layer."""
    _, finite = _walk(network, weights, inputs, key, lambda signal: jnp.all(jnp.isfinite(signal)))
    return jnp.concatenate(finite)


def _walk(
    network: Network,
    weights: Weights,
    inputs: Array,
    key: PRNGKeyArray | int | None,
    measure: Callable,
) -> tuple[Array, list[Any]]:
    """The pre-activations z^L, and by stage ``measure`` of each layer's signal."""
    key = as_key(0 if key is None else key)
    keys = jax.random.split(key, network.depth + 1)[1:]
    signal, measured = inputs, []
    for (stage, of_stage), own in zip(layer_keys(network, keys), weights, strict=True):
        step = functools.partial(_layer, stage, own if stage.tied else None, measure)
        signal, of_layers = scan_blocks(step, signal, (of_stage, None if stage.tied else own))
        measured.append(of_layers)
    return signal, measured


def _layer(
    stage: Stage,
    shared: LayerWeights | None,
    measure: Callable,
    signal: Array,
    parts: tuple[LayerKey, LayerWeights | None],
) -> tuple[Array, Any]:
    key, own = parts
    weights = shared if own is None else own
    assert weights is not None
    remaining = iter(weights.matrices)

    def product(_: PRNGKeyArray, x: Array, **law: Any) -> Array:
        del law
        return _matmul(x, next(remaining).T)

    key = key._replace(weights=LayerWeights((), weights.biases))
    signal = _linearisation.apply_block(stage.block, key, signal, product)
    return signal, measure(signal)


def log_norms(network: Network, weights: Weights) -> Float[Array, " layers"]:
    """The logarithm of ‖W‖_F of each layer, all of its matrices together, without biases."""
    norms, dtype = [], jax.tree.leaves(weights)[0].dtype
    for stage, own in zip(network.stages, weights, strict=True):
        rows = [m[None] if stage.tied else m for m in own.matrices]
        logs = [unit_rows(m.reshape(len(m), -1))[1] for m in rows]
        none = jnp.full(stage.repeats, -jnp.inf, dtype)
        log = jax.nn.logsumexp(2 * jnp.stack(logs), axis=0) / 2 if logs else none
        norms.append(jnp.broadcast_to(log, (stage.repeats,)))
    return jnp.concatenate(norms)


def _few(stage: Stage) -> bool:
    return not stage.tied and stage.repeats <= _FEW_LAYERS


def lean(network: Network) -> Network:
    """The same network, with each stage of few layers as so many stages of one layer."""
    each = [
        stage.repeats * [Stage(stage.block)] if _few(stage) else [stage] for stage in network.stages
    ]
    return dataclasses.replace(network, stages=tuple(itertools.chain.from_iterable(each)))


def apart(network: Network, weights: Weights) -> Weights:
    """The weights of a network as those of its `lean` one."""
    lean_weights: list[LayerWeights] = []
    for stage, own in zip(network.stages, weights, strict=True):
        for layer in range(stage.repeats) if _few(stage) else [slice(None)]:
            at = slice(layer, layer + 1) if isinstance(layer, int) else layer
            lean_weights.append(own if stage.tied else jax.tree.map(lambda m, at=at: m[at], own))
    return tuple(lean_weights)


def together(network: Network, weights: Weights) -> Weights:
    """The weights of a `lean` network as those of the network that it was made from."""
    rest = iter(weights)
    return tuple(
        jax.tree.map(lambda *m: jnp.concatenate(m), *itertools.islice(rest, stage.repeats))
        if _few(stage)
        else next(rest)
        for stage in network.stages
    )


def as_tensors(network: Network, weights: Weights) -> list[LayerWeights]:
    """The weights in the usual layout: for each layer, matrices (n_in, n_out), biases (n_out,).

    An optax transformation that works by tensors or by units (output columns) expects this layout.
    """
    layers: list[LayerWeights] = []
    for stage, own in zip(network.stages, weights, strict=True):
        if stage.tied:
            own = jax.tree.map(lambda m: m[None], own)
        for layer in range(1 if stage.tied else stage.repeats):
            layers.append(
                LayerWeights(
                    tuple(m[layer].T for m in own.matrices),
                    tuple(b[layer, 0] for b in own.biases),
                )
            )
    return layers


def from_tensors(network: Network, layers: list[LayerWeights]) -> Weights:
    """The weights that `as_tensors` gave these layers for."""
    rest = iter(layers)
    weights = []
    for stage in network.stages:
        each = [
            LayerWeights(tuple(m.T for m in one.matrices), tuple(b[None] for b in one.biases))
            for one in itertools.islice(rest, 1 if stage.tied else stage.repeats)
        ]
        weights.append(each[0] if stage.tied else jax.tree.map(lambda *m: jnp.stack(m), *each))
    return tuple(weights)
