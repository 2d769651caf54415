"""Inputs of a network, converted and checked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow._arguments import all_finite, as_real
from gradflow._checks import is_traced
from gradflow.errors import InputError
from gradflow.networks import check_network

__all__ = ["as_inputs", "checked_inputs"]


def checked_inputs(inputs: Any, network: Any) -> Array | np.ndarray:
    """Return a batch of a network's inputs as an array of floats, shape (sites, n_0).

    Integers become float32, whatever their size; floats stay what they are.

    Raises
    ------
    InputError
        If the network is none, or inputs are not of this shape, not real or not finite.
    """
    check_network(network)
    array = as_real("inputs", inputs)
    if array.ndim != 2 or array.shape[1] != network.input_width:
        raise InputError(
            f"inputs has shape {array.shape}; it is (inputs, {network.input_width}) for this "
            "network"
        )
    positions = network.positions
    if len(array) % positions:
        raise InputError(
            f"inputs has {len(array)} rows; for this network each input is {positions} of them, "
            "its positions one after the other (builders.as_sites)"
        )
    return array


def as_inputs(inputs: Any, network: Any) -> Array:
    """Return `checked_inputs` as JAX holds them.

    Raises
    ------
    InputError
        As `checked_inputs`, or if they are beyond the range of JAX's float type, or below it.
    """
    array = checked_inputs(inputs, network)
    with np.errstate(over="ignore"):  # the next line looks for it
        converted = jnp.asarray(array) if is_traced(array) else jax.device_put(array)
    dtype = converted.dtype
    if not all_finite(converted):
        raise InputError(
            f"inputs has values beyond {dtype}'s range; turn JAX's x64 mode on, or scale them"
        )
    if is_traced(converted):
        return converted
    # Below its smallest normal number a float has few digits, and XLA takes it for 0.
    least = float(jnp.finfo(dtype).smallest_normal / jnp.finfo(dtype).eps)
    size = np.max(np.abs(np.asarray(array)), axis=None if network.mixes_sites else 1)
    faint = np.atleast_1d(size)[(size > 0) & (size < least)]
    if faint.size:
        raise InputError(
            f"inputs has one whose largest value is {faint.min():.3g}, of which {dtype} does not "
            f"hold all digits; it is 0 or at least {least:.1g}: scale it"
        )
    return converted
