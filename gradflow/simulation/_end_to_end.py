"""The end-to-end Jacobian of one random network, multiplied out in one forward pass."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gradflow._arguments import as_key
from gradflow._inputs import as_inputs
from gradflow._norms import unit_rows
from gradflow.blocks import AbstractBlock
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import _linearisation
from gradflow.simulation._layers import LayerKey, layer_keys, scan_blocks
from gradflow.simulation._linearisation import MatrixSampler

__all__ = ["EndToEnd", "bytes_needed", "end_to_end", "seconds"]


class EndToEnd(NamedTuple):
    """J = D^L W^L … D^1 W^1 = ∂h^L/∂x of one random network, h^L = φ(z^L); its transpose is kept.

    Attributes
    ----------
    transposed
        Shape (n_0, n_L), at a Frobenius norm of 1; 0 where J is.
    log_scale
        Natural logarithm of ‖J‖_F, the scale that goes with it; -inf where J is 0.
    alive
        The fewest units of a layer, and of the input, of slope φ' other than 0: J's rank.
    """

    transposed: Float[Array, "n_in n_out"]
    log_scale: Float[Array, ""]
    alive: Int[Array, ""]


def end_to_end(
    network: Network, inputs: Float[Array, "sites n_0"], key: PRNGKeyArray | int
) -> EndToEnd:
    """Return the end-to-end Jacobian of the network that `propagation.propagate` draws densely.

    A pure function: jit it, vmap it. One walk up, with the input's n_0 directions beside the
    signal: each layer's weights are drawn, multiplied by and forgotten. Both signal (where that
    changes no slope) and Jacobian are kept at length 1, so that no depth leaves a float's range.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (1, n_0): one input.
    key
        The network's key.

    Raises
    ------
    InputError
        If there are several inputs.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    if inputs.shape[0] != 1:
        raise InputError(f"inputs has {inputs.shape[0]} rows; an end-to-end Jacobian is at one")
    sampler = MatrixSampler("dense", None)
    slope = network.activation.derivative

    def layer(
        state: tuple[Array, Array, Array, Array], key: LayerKey, block: AbstractBlock
    ) -> tuple[tuple[Array, Array, Array, Array], None]:
        signal, v, log, alive = state
        out, point, _, matrices = _linearisation.linearise(block, sampler, key, signal)
        v, _ = _linearisation.jvp(block, point, matrices, v)
        v, log = _together_at_length_one(v, log)
        if network.homogeneous:
            out = unit_rows(out)[0] * out.shape[1] ** 0.5
        return (out, v, log, jnp.minimum(alive, jnp.count_nonzero(slope(out)))), None

    n = network.input_width
    v, log = jnp.eye(n, dtype=inputs.dtype)[:, None], jnp.zeros((), inputs.dtype)
    state = (inputs, v, log, jnp.asarray(n))
    keys = jax.random.split(key, network.depth + 1)[1:]
    for stage, of_stage in layer_keys(network, keys):
        state, _ = scan_blocks(functools.partial(layer, block=stage.block), state, of_stage)
    signal, v, log, alive = state
    v, log = _together_at_length_one(v * slope(signal)[None], log)
    return EndToEnd(v[:, 0], log, alive)


def _together_at_length_one(v: Array, log: Array) -> tuple[Array, Array]:
    """Return vectors at one scale, their squares adding up to 1, and add it to a logarithm."""
    row, more = unit_rows(v.reshape(1, -1))
    return row.reshape(v.shape), log + more[0]


# Nanoseconds on one core of a CPU, measured: of an SVD, for n³; of a layer, for each entry of its
# weights, and for each of its multiplications with the product; and, where weights are orthogonal,
# for each in their QR factorisation.
_PER_CUBE, _PER_ENTRY, _PER_PRODUCT, _FACTORISED = 0.5, 5.0, 0.01, 0.1
# Arrays of n² numbers that are alive at once: weights while they are drawn, products, the SVD's.
_SQUARES = 10


def seconds(network: Network) -> float:
    """Estimate the seconds that the SVD of `end_to_end` takes beside both passes, on one CPU core.

    With the factorisations of both passes, which `samplers.seconds` leaves out: n³.
    """
    n = float(network.input_width)
    haar = any(law.haar for stage in network.stages for law in stage.block.distributions)
    entries = sum(math.prod(shape) for layer in network.shapes for shape in layer)
    each = _PER_ENTRY + (_PER_PRODUCT + 3 * _FACTORISED * haar) * n
    return 1e-9 * (_PER_CUBE * n**3 + each * entries)


def bytes_needed(network: Network, itemsize: int) -> int:
    """Return a bound on the bytes that `end_to_end` and its SVD take for one network."""
    return itemsize * _SQUARES * max(network.widths) ** 2
