"""What may be trained, on which data, recorded when: or one sentence that says what is wrong."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradflow._arguments import as_numbers, as_real
from gradflow._checks import check_count, check_scale, check_sequence, shown
from gradflow.errors import InputError
from gradflow.networks import Network, check_network
from gradflow.training.records import Data

__all__ = ["check_singular_values", "checked_data", "checked_laws", "checked_networks"]
__all__ += ["checked_optimiser", "checked_rates", "pair", "record_steps"]


def checked_networks(networks: Any) -> tuple[Network, ...]:
    """Return one network or several as a tuple."""
    laws = (
        (networks,)
        if isinstance(networks, Network)
        else check_sequence("networks", networks, "a Network, or several")
    )
    for law in laws:
        check_network(law)
    return laws


def checked_rates(learning_rate: Any) -> np.ndarray:
    """Return one learning rate or several as an array of float64."""
    rates = np.atleast_1d(np.asarray(as_real("learning_rate", learning_rate, float), np.float64))
    if rates.ndim != 1:
        raise InputError(f"learning_rate has shape {rates.shape}; it is one number or several")
    check_scale("learning_rate", rates, positive=True)
    return rates


def checked_optimiser(optimiser: Any, clip: Any) -> None:
    """Raise `InputError` unless these are what optax calls optimisers and transformations."""
    words = "optimiser is {}; it is a function from a learning rate to an optax optimiser, as {}"
    if not callable(optimiser):
        raise InputError(words.format(shown(optimiser), "optax.adam"))
    made = optimiser(0.1)
    if not hasattr(made, "init") or not hasattr(made, "update"):
        raise InputError(words.format(f"one to {shown(made)}", "optax.adam"))
    if clip is not None and not hasattr(clip, "update"):
        raise InputError(
            f"clip is {shown(clip)}; it is an optax transformation, as "
            "optax.clip_by_global_norm(1.0)"
        )


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return data as (inputs, labels)."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InputError(f"{name} is {shown(value)}; it is a pair (inputs, labels)")
    return value[0], value[1]


def checked_laws(laws: tuple[Network, ...]) -> tuple[Network, ...]:
    """Return networks that one program trains."""
    if not laws:
        raise InputError("networks is empty; it takes at least one")
    kinds = [jax.tree.structure(law.as_arrays(jnp.float32)) for law in laws]
    for law, kind in zip(laws, kinds, strict=True):
        if kind != kinds[0]:  # type: ignore[operator]
            raise InputError(
                f"networks {laws[0].name!r} and {law.name!r} differ in more than numbers (widths, "
                "depth, activation, blocks, biases); train them in calls of their own"
            )
    blocks = [block for stage in laws[0].stages for block in stage.block.nested]
    if any(block.rescales_weights for block in blocks):
        raise InputError(
            "a UnitVariance block says how LSUV starts weights, and is no layer to train; train a "
            "network without it, with the σ_w of simulation.propagation.lsuv"
        )
    return laws


def check_singular_values(count: int, network: Network) -> int:
    """Return how many singular values of an input's Jacobian to record, if it has as many."""
    positions = math.prod(stage.block.pool_factor for stage in network.stages)
    most = min(positions * network.input_width, network.widths[-1])
    if check_count("singular_values", count, 0) > most:
        raise InputError(
            f"singular_values is {count}; the Jacobian of {network.widths[-1]} outputs by "
            f"{positions * network.input_width} inputs has {most}"
        )
    if count and any(stage.block.mixes_inputs for stage in network.stages):
        raise InputError(
            f"singular_values is {count}, which are of one input's Jacobian, and under BatchNorm a "
            "signal depends on the whole batch; use 0"
        )
    return count


def checked_data(whose: str, inputs: ArrayLike, labels: ArrayLike, network: Network) -> Data:
    """Return samples that fit the network; ``whose`` they are goes before their name."""
    found, classes = np.asarray(as_numbers(f"{whose}inputs", inputs)), np.asarray(labels)
    positions = math.prod(stage.block.pool_factor for stage in network.stages)
    width, units = network.input_width, network.widths[-1]
    if found.ndim != 2 or not len(found) or found.shape[1] != positions * width:
        of_positions = f" ({positions} positions of {width})" if positions > 1 else ""
        raise InputError(
            f"{whose}inputs has shape {found.shape}; it is (samples, {positions * width})"
            f"{of_positions} for this network, with at least one sample"
        )
    if not np.all(np.isfinite(found)):
        bad = np.argwhere(~np.isfinite(found))[0]
        raise InputError(
            f"{whose}inputs[{bad[0]}, {bad[1]}] is {found[tuple(bad)]}; every value must be a "
            "finite number"
        )
    if classes.shape != found.shape[:1] or not np.issubdtype(classes.dtype, np.integer):
        raise InputError(
            f"{whose}labels is of {classes.dtype} and shape {classes.shape}; it is a whole number "
            f"for each of {len(found)} samples"
        )
    outside = classes[(classes < 0) | (classes >= units)]
    if outside.size:
        raise InputError(
            f"{whose}labels has {outside[0]}; the network's last layer has {units} units, so that "
            f"labels are from 0 to {units - 1}"
        )
    if positions > 1:
        found = found.reshape(len(found), positions, width)
    return Data(jnp.asarray(found), jnp.asarray(classes, jnp.int32))


# Of a run's time, the share that recording takes, where the steps to record are not given; and how
# many of them there are then.
_SHARE = 0.12
_FEWEST, _MOST = 3, 25


def record_steps(record: Sequence[int] | None, begin: int, steps: int, cost: float) -> np.ndarray:
    """Return the steps to record, after those that were taken; one costs ``cost`` steps."""
    if record is None:
        count = min(max(int(_SHARE * steps / cost), _FEWEST), _MOST)
        known = np.unique(np.round(np.geomspace(1, steps + 1, count)).astype(np.int32) - 1)
        return known[known >= begin]
    asked = check_sequence("record", record, "the steps to record")
    times = np.unique([check_count("record", step, 0) for step in asked]).astype(np.int32)
    if not times.size or times[0] < begin or times[-1] != steps:
        raise InputError(
            f"record is {record!r}; it is some of the steps {begin} to {steps}, the last among them"
        )
    return times
