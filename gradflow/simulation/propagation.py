"""One random network: its statistics at every layer, forward and backward.

The gradient starts at the top as δ^L ~ N(0, I), independent for each site: it is that of
C = u · z^L with a random u, so that nothing is assumed of a cost. For ∂C/∂W it is the mean over the
sites at the top. Where sites mix, all share one scale, forward and backward. Both passes are made
so that nothing leaves a float's range (`_passes`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow import statistics
from gradflow._arguments import as_key
from gradflow._checks import is_traced
from gradflow._inputs import as_inputs
from gradflow._labels import Values, checked
from gradflow.blocks import AbstractBlock
from gradflow.errors import InputError
from gradflow.networks import Network, unit_variance
from gradflow.simulation import _passes, _samplers
from gradflow.simulation._layers import LayerKey, LayerWeights, layer_keys, scan_blocks
from gradflow.simulation._samplers import SAMPLERS
from gradflow.statistics import Statistic

__all__ = ["Signals", "lsuv", "propagate", "signals"]


class Signals(NamedTuple):
    """Every unit's signals in one random network, for histograms: true ones are exp(log) times.

    Attributes
    ----------
    preactivation
        One array (layers, sites, width) for each stage.
    log_scale
        One array (layers, sites) for each stage, of the pre-activations.
    gradient
        ∂C/∂z, one array (layers, sites, width) for each stage; each row of unit norm.
    log_gradient_norm
        One array (layers, sites) for each stage.
    """

    preactivation: list[Array]
    log_scale: list[Array]
    gradient: list[Array]
    log_gradient_norm: list[Array]


def propagate(
    network: Network,
    inputs: Float[Array, "sites n_in"],
    key: PRNGKeyArray | int,
    *,
    sampler: str = "dense",
    weights: Sequence[LayerWeights] | None = None,
    cotangent: Callable[[Array], Array] | None = None,
    wanted: Sequence[Statistic] = statistics.ALL,
    keep: bool = False,
    checkpoint: bool = False,
) -> Values:
    """Draw one network and return its statistics at every layer.

    A pure function: jit it, vmap it over keys, inputs, or the network's σ_w and σ_b.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (sites, n_0): the batch, all of it sent through the same weights.
    key
        The network's key.
    sampler
        ``"dense"``, ``"matrix_free"`` or ``"auto"``; see `gradflow.simulation._samplers`.
    weights
        The network's weights and biases, of `training.initial_weights` or trained, where they are
        not to be drawn. The sampler is not used then; the key draws the rest, as masks of dropout.
    cotangent
        A function from z^L, (sites, n_L), to δ^L = ∂C/∂z^L of each site's own cost, of the same
        shape; δ^L ~ N(0, I) without it.
    wanted
        The statistics to measure; those that need more inputs than there are, are left out.
    keep
        Keep each layer's linearisation from the forward pass, instead of making it again in the
        backward pass: faster with ``matrix_free``, more memory, the same numbers.
    checkpoint
        Keep the signals before every √L-th layer only, and make the forward pass twice: the memory
        of 2√L layers' signals instead of L, a third more time, the same numbers. Without ``keep``.
        Stages that share their weights keep all signals either way, and no linearisation.

    Returns
    -------
    Values
        Each statistic by its key, shape (layers,), the same as `theory.mean_field.predict` returns;
        those that are carried as logarithms have their own name too, as ``q`` beside ``log_q``.
        ``chi`` is NaN at the top layer. Of weights that time steps share, the gradient at a layer
        is that step's contribution: ∂C/∂W is the sum over the steps. A signal that leaves the
        float's range makes its statistics infinite or NaN from that layer on.

    Raises
    ------
    InputError
        If the inputs do not fit the network or are not finite, the key or a statistic is none,
        the sampler cannot draw the weights, weights that are given are of other shapes, or
        the cotangent is.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    wanted = [s for s in checked(wanted) if s.sites <= inputs.shape[0]]
    if cotangent is not None and not callable(cotangent):
        raise InputError(f"cotangent is {cotangent!r}; it is a function from z^L to ∂C/∂z^L")
    kept = _passes.Keep(linearisations=keep, signals=not checkpoint)
    given = _passes.Given(weights, cotangent)
    return _passes.run(network, inputs, key, sampler, wanted, keep=kept, given=given).values


def signals(
    network: Network,
    inputs: Float[Array, "sites n_in"],
    key: PRNGKeyArray | int,
    *,
    sampler: str = "dense",
    weights: Sequence[LayerWeights] | None = None,
) -> Signals:
    """Draw the network that `propagate` draws from this key, and return its units' signals.

    Arguments and errors are those of `propagate`.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    given = _passes.Given(weights)
    passes = _passes.run(network, inputs, key, sampler, (), given=given, collect=True)
    z, log_scale = zip(*passes.forward, strict=True)
    gradient, log_norm = zip(*passes.backward, strict=True)
    return Signals(list(z), list(log_scale), list(gradient), list(log_norm))


def lsuv(
    network: Network,
    inputs: Float[Array, "sites n_in"],
    key: PRNGKeyArray | int,
    *,
    sampler: str = "dense",
) -> list[Float[Array, "layers weights"]]:
    """Return the σ_w that give each random matrix's product variance 1 over units and inputs.

    Layer-sequential unit variance: from the input up, each matrix of the network that `propagate`
    draws from this key is divided by the standard deviation of its product. The product is linear
    in the matrix, so that one division is exact for its batch; the algorithm's repetitions are for
    batches that differ. The law of networks that are so started is `networks.unit_variance`.

    Returns
    -------
    list
        One array (layers, weights) for each stage: σ_w by layer, and by random matrix in it. In a
        program that is traced it is infinite where the product has no variance.

    Raises
    ------
    InputError
        If a product has no variance, as that of a signal of zeros, and so no scale gives it any,
        if layers share their weights, or if convolutions have groups.

    References
    ----------
    Mishkin & Matas 2016, arXiv:1511.06422, algorithm 1.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    unit_variance(network)  # which refuses what has no such law
    blocks = (block for stage in network.stages for block in stage.block.nested)
    if any(block.n_weights and getattr(block, "groups", 1) != 1 for block in blocks):
        raise InputError(
            f"network is {network.name!r}, which has convolutions in groups; lsuv divides matrices "
            "that multiply a layer's whole signal: networks.unit_variance has the law of these"
        )
    multiply_by_one = SAMPLERS[_samplers.choose(sampler, network, len(inputs))[0]]
    tap = jnp.zeros((inputs.shape[0],) * 2, inputs.dtype)

    def layer(
        signal: Array, key: LayerKey, block: AbstractBlock
    ) -> tuple[Array, Float[Array, " weights"]]:
        scales: list[Array] = []

        def multiply(key: PRNGKeyArray, x: Array, *, sigma_w: Any, **law: Any) -> Array:
            del sigma_w
            out = multiply_by_one(key, x, tap, sigma_w=1.0, **law)
            scales.append(1 / jnp.std(out))
            return scales[-1] * out

        signal = block.apply(signal, multiply, key.key)
        return signal, jnp.stack(scales) if scales else jnp.zeros(0, signal.dtype)

    keys = jax.random.split(key, network.depth + 1)[1:]
    signal, scales, below = inputs, [], 0
    for stage, of_stage in layer_keys(network, keys):
        step = functools.partial(layer, block=stage.block)
        signal, of_layers = scan_blocks(step, signal, of_stage)
        _check_scales(of_layers, below)
        scales.append(of_layers)
        below += stage.repeats
    return scales


def _check_scales(scales: Float[Array, "layers weights"], below: int) -> None:
    """Raise `InputError` where a scale is infinite, of a stage with ``below`` layers below it."""
    infinite = not is_traced(scales) and np.isinf(scales)
    if np.any(infinite):
        layer, matrix = np.argwhere(infinite)[0]
        which = f" with its random matrix {matrix + 1}" if scales.shape[1] > 1 else ""
        raise InputError(
            f"the product of layer {below + layer + 1}{which} has no variance over units and "
            "inputs, and so no scale gives it variance 1; what enters it is 0 for these inputs, or "
            "it is one number alone"
        )
