"""What may be trained, on which data, recorded when: or one sentence that says what is wrong."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradflow.blocks import BatchNorm, UnitVariance
from gradflow.errors import InputError, check_count
from gradflow.networks import Network
from gradflow.training.records import Data

__all__ = ["check_singular_values", "checked_data", "checked_laws", "record_steps"]


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
    if _has(laws[0], UnitVariance):
        raise InputError(
            "a UnitVariance block says how LSUV starts weights, and is no layer to train; train a "
            "network without it, with the σ_w of simulation.propagation.lsuv"
        )
    return laws


def _has(network: Network, kind: type) -> bool:
    """Whether there is such a block, wherever it is nested."""
    blocks = jax.tree.leaves(network.stages, is_leaf=lambda block: isinstance(block, kind))
    return any(isinstance(block, kind) for block in blocks)


def check_singular_values(count: int, network: Network) -> int:
    """Return how many singular values of an input's Jacobian to record, if it has as many."""
    positions = math.prod(stage.block.merges for stage in network.stages)
    most = min(positions * network.input_width, network.widths[-1])
    if check_count("singular_values", count, 0) > most:
        raise InputError(
            f"singular_values is {count}; the Jacobian of {network.widths[-1]} outputs by "
            f"{positions * network.input_width} inputs has {most}"
        )
    if count and _has(network, BatchNorm):
        raise InputError(
            f"singular_values is {count}, which are of one input's Jacobian, and under BatchNorm a "
            "signal depends on the whole batch; use 0"
        )
    return count


def checked_data(whose: str, inputs: ArrayLike, labels: ArrayLike, network: Network) -> Data:
    """Return samples that fit the network; ``whose`` they are goes before their name."""
    found, classes = np.asarray(inputs), np.asarray(labels)
    positions = math.prod(stage.block.merges for stage in network.stages)
    width, units = network.input_width, network.widths[-1]
    if found.ndim != 2 or not len(found) or found.shape[1] != positions * width:
        of_positions = f" ({positions} positions of {width})" if positions > 1 else ""
        raise InputError(
            f"{whose}inputs has shape {found.shape}; it is (samples, {positions * width})"
            f"{of_positions} for this network, with at least one sample"
        )
    if not np.issubdtype(found.dtype, np.floating):
        found = found.astype(np.float32)
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
    times = np.unique([check_count("record", step, 0) for step in record]).astype(np.int32)
    if not times.size or times[0] < begin or times[-1] != steps:
        raise InputError(
            f"record is {record!r}; it is some of the steps {begin} to {steps}, the last among them"
        )
    return times
