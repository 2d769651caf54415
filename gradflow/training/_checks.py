"""Checks of the arguments of `train`: an error says in one sentence what is wrong."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradflow import networks as nets
from gradflow._arguments import as_key, as_numbers, as_real
from gradflow._checks import check_count, check_instance, check_scale, check_sequence, shown
from gradflow._labels import checked
from gradflow.errors import InputError
from gradflow.networks import Network, check_network
from gradflow.training._loop import Settings, Shared, State
from gradflow.training._records import Data, Recording

# The paper monitors so many inputs (Glorot & Bengio 2010, section 3).
_MONITORED = 300


def checked_networks(networks: Any, biases: bool) -> tuple[Network, ...]:
    """One network or several that one program trains, all with biases if ``biases``."""
    laws = (
        (networks,)
        if isinstance(networks, Network)
        else check_sequence("networks", networks, "a Network, or several")
    )
    for law in laws:
        check_network(law)
    if biases:
        laws = tuple(map(nets.with_biases, laws))
    _check_alike(laws)
    blocks = [block for stage in laws[0].stages for block in stage.block.nested]
    if any(block.rescales_weights for block in blocks):
        raise InputError(
            "a UnitVariance block says how LSUV starts weights, and is no layer to train; train a "
            "network without it, with the σ_w of simulation.propagation.lsuv"
        )
    return laws


def checked_rates(learning_rate: Any) -> np.ndarray:
    """One learning rate or several as an array of float64."""
    rates = np.atleast_1d(np.asarray(as_real("learning_rate", learning_rate, float), np.float64))
    if rates.ndim != 1:
        raise InputError(f"learning_rate has shape {rates.shape}; it is one number or several")
    check_scale("learning_rate", rates, positive=True)
    return rates


def _check_optimiser(optimiser: Any, clip: Any) -> None:
    """Check that these make an optax optimiser, and are an optax transformation or None."""
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


def _check_alike(laws: tuple[Network, ...]) -> None:
    """Check that networks differ in numbers alone."""
    if not laws:
        raise InputError("networks is empty; it takes at least one")
    kinds = [jax.tree.structure(law.as_arrays(jnp.float32)) for law in laws]
    for law, kind in zip(laws, kinds, strict=True):
        if kind != kinds[0]:  # type: ignore[operator]
            raise InputError(
                f"networks {laws[0].name!r} and {law.name!r} differ in more than numbers (widths, "
                "depth, activation, blocks, biases); train them in calls of their own"
            )


def _checked_singular_values(count: int, network: Network) -> int:
    """The number of singular values to record, if an input's Jacobian has as many."""
    positions = network.positions
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


def checked_shared(
    network: Network, key: Any, data: tuple[Any, Any], monitor: Any, validation: Any
) -> Shared:
    """The key, the data to train on, and those to measure on: some of the former without them."""
    train = _checked_samples("", data[0], data[1], network)
    if monitor is None:
        samples = len(train.labels)
        chosen = np.arange(min(_MONITORED, samples)) * samples // min(_MONITORED, samples)
        measured = Data(train.inputs[chosen], train.labels[chosen])
    else:
        measured = _checked_pair("monitor", monitor, network)
    held_out = None if validation is None else _checked_pair("validation", validation, network)
    return Shared(as_key(key), train, measured, held_out)


def _checked_pair(name: str, value: Any, network: Network) -> Data:
    """A pair (inputs, labels) as samples that fit the network."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InputError(f"{name} is {shown(value)}; it is a pair (inputs, labels)")
    return _checked_samples(f"{name}'s ", value[0], value[1], network)


def checked_settings(
    optimiser: Any, clip: Any, batch: int, record: Recording, shared: Shared
) -> Settings:
    """The static arguments of training, before networks are grouped."""
    _check_optimiser(optimiser, clip)
    samples, batch = len(shared.data.labels), check_count("batch", batch)
    if batch > samples:
        raise InputError(f"batch is {batch}, and there are {samples} samples; use at most as many")
    wanted = tuple(s for s in record.wanted if s.sites <= len(shared.monitor.labels))
    return Settings(optimiser, clip, batch, wanted, record.histograms, record.singular_values)


def _checked_samples(whose: str, inputs: ArrayLike, labels: ArrayLike, network: Network) -> Data:
    """Samples that fit the network; in messages ``whose`` stands before their name."""
    x, classes = np.asarray(as_numbers(f"{whose}inputs", inputs)), np.asarray(labels)
    positions = network.positions
    width, units = network.input_width, network.widths[-1]
    if x.ndim != 2 or not len(x) or x.shape[1] != positions * width:
        of_positions = f" ({positions} positions of {width})" if positions > 1 else ""
        raise InputError(
            f"{whose}inputs has shape {x.shape}; it is (samples, {positions * width})"
            f"{of_positions} for this network, with at least one sample"
        )
    if not np.all(np.isfinite(x)):
        bad = np.argwhere(~np.isfinite(x))[0]
        raise InputError(
            f"{whose}inputs[{bad[0]}, {bad[1]}] is {x[tuple(bad)]}; every value must be a "
            "finite number"
        )
    if classes.shape != x.shape[:1] or not np.issubdtype(classes.dtype, np.integer):
        raise InputError(
            f"{whose}labels is of {classes.dtype} and shape {classes.shape}; it is a whole number "
            f"for each of {len(x)} samples"
        )
    outside = classes[(classes < 0) | (classes >= units)]
    if outside.size:
        raise InputError(
            f"{whose}labels has {outside[0]}; the network's last layer has {units} units, so that "
            f"labels are from 0 to {units - 1}"
        )
    if positions > 1:
        x = x.reshape(len(x), positions, width)
    return Data(jnp.asarray(x), jnp.asarray(classes, jnp.int32))


# Where the steps to record are not given: recording's share of a run's time, and the least and the
# largest number of steps.
_SHARE = 0.12
_FEWEST, _MOST = 3, 25


def checked_steps(
    record: Sequence[int] | None, state: State | None, steps: int, batch: int, shared: Shared
) -> np.ndarray:
    """The steps to record, from those of the state to the last one."""
    if state is not None:
        check_instance("state", state, State, "the state of a Training with keep_state=True")
    begin = 0 if state is None else int(state.step[0])
    if record is None:
        validated = 0 if shared.validation is None else len(shared.validation.labels)
        # In steps, about the time that recording everything once takes; measured on a CPU.
        cost = 10 + (2.2 * len(shared.monitor.labels) + 0.5 * validated) / batch
        count = min(max(int(_SHARE * steps / cost), _FEWEST), _MOST)
        times = np.unique(np.round(np.geomspace(1, steps + 1, count)).astype(np.int32) - 1)
        return times[times >= begin]
    listed = check_sequence("record", record, "the steps to record")
    times = np.unique([check_count("record", step, 0) for step in listed]).astype(np.int32)
    if not times.size or times[0] < begin or times[-1] != steps:
        raise InputError(
            f"record is {record!r}; it is some of the steps {begin} to {steps}, the last among them"
        )
    return times


def checked_recording(record: Recording | None, network: Network) -> Recording:
    """What to record of this network; the default where nothing is given."""
    record = Recording() if record is None else record
    check_instance("record", record, Recording, "a training.Recording")
    return dataclasses.replace(
        record,
        wanted=checked(record.wanted),
        histograms=check_count("histograms", record.histograms, 0),
        singular_values=_checked_singular_values(record.singular_values, network),
    )
