"""Many random networks: drawn in chunks, measured on the device, averaged on the host.

Network number i has the key ``fold_in(key, i)``, so that a result depends on the seed and on how
many networks there are, and not on how they were cut into chunks or shared among devices. One
compiled program serves every chunk, and every network of the same structure whatever its σ_w and
σ_b. A chunk's networks are shared among the devices, of all processes where `jax.distributed` has
been initialised; nothing goes from one device to another but what each network measured.
"""

import collections
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from gradflow import _compilation, estimation, statistics
from gradflow._arguments import as_key
from gradflow._checks import check_count, check_progress
from gradflow._labels import Values, checked, key_of, labelled, layers
from gradflow.errors import InputError
from gradflow.estimation import Estimate, Histogram
from gradflow.networks import Network, as_inputs
from gradflow.simulation import _memory, _threefry, propagation, samplers, singular_values
from gradflow.statistics import Statistic

__all__ = ["LOG_SINGULAR_VALUES", "OVERFLOWED", "VANISHED", "Laws", "Progress", "Simulation"]
__all__ += ["compiled", "in_order", "of_one", "own_networks", "simulate"]

# Called as (networks done, networks in all); the first call, with 0, comes before compilation.
Progress = Callable[[int, int], None]

# What `compiled` calls those of the end-to-end Jacobian.
LOG_SINGULAR_VALUES = "log_singular_values"
# Networks are numbered by an int32, and the last chunk has more than are asked for.
_MOST_NETWORKS = 1 << 30
# How many values one call hands back, at most.
_CHUNK_VALUES = 1 << 24
# How many values a layer's histogram is made of, at most; and from how many networks.
_HISTOGRAM_VALUES = 1 << 18
_HISTOGRAM_NETWORKS = 64


class Simulation(eqx.Module):
    """What many random networks of one law did.

    Attributes
    ----------
    estimates
        Each statistic's `Estimate` by its key, every array of shape (layers,).
    histograms
        ``preactivation``, ``activation`` and ``gradient``, where they were asked for.
    samples
        Per-network values by key or name, shape (networks, layers), where they were asked for.
    overflowed, vanished
        Shape (layers,): in how many networks the signal going up was not finite, or nothing but
        zeros (a dead network, or an underflow).
    statistics
        What was measured.
    network, sites, networks, sampler, reason, dtype, seconds, compile_seconds
        What was simulated, how, and for how long: the walk itself, and compiling it.
    """

    estimates: dict[str, Estimate]
    histograms: dict[str, Histogram]
    samples: dict[str, np.ndarray] = eqx.field(converter=Values)
    overflowed: np.ndarray
    vanished: np.ndarray
    network: Network
    statistics: tuple[Statistic, ...] = eqx.field(static=True)
    sites: int = eqx.field(static=True)
    networks: int = eqx.field(static=True)
    sampler: str = eqx.field(static=True)
    reason: str = eqx.field(static=True)
    dtype: str = eqx.field(static=True)
    seconds: float = eqx.field(static=True)
    compile_seconds: float = eqx.field(static=True)

    def __getitem__(self, name: str) -> Estimate:
        """Return a statistic's estimate, by its name or its key."""
        return self.estimates[key_of(name, self.estimates)]

    def __repr__(self) -> str:
        """Return what was simulated in one line."""
        few = 8
        network, widths = self.network, "-".join(map(str, self.network.widths))
        if len(network.widths) > few:
            widths = f"{network.widths[0]}-{network.widths[1]}-…-{network.widths[-1]}"
        return (
            f"{self.networks} networks {network.name!r}, {widths}, {network.depth} layers, "
            f"{self.sites} {'input' if self.sites == 1 else 'inputs'}, {self.sampler} in "
            f"{self.dtype}: {', '.join(self.estimates)}"
        )

    def to_xarray(self) -> xarray.Dataset:
        """Return the labelled estimates: mean, standard deviation and error over networks."""
        found: dict[str, np.ndarray] = {}
        for statistic in self.statistics:
            name, key = statistic.name, statistic.key
            estimate = self.estimates[key]
            found[name] = estimate.value
            found[f"{name}_standard_deviation"] = estimate.standard_deviation
            found[f"{name}_standard_error"] = estimate.standard_error
            found[f"{name}_networks"] = estimate.count
            if statistic.log:
                found[key] = estimate.log_value
                found[f"{key}_standard_error"] = estimate.log_standard_error
        found |= {"overflowed": self.overflowed, "vanished": self.vanished}
        dataset = labelled(
            xarray.Dataset(
                {name: ("layer", value) for name, value in found.items()},
                coords={"layer": layers(self.network.depth)},
            ),
            self.statistics,
        )
        for name, histogram in self.histograms.items():
            bins, prefix = f"{name}_bin", f"{name}_histogram"
            dataset[f"{prefix}_edges"] = (("layer", f"{name}_edge"), histogram.edges)
            dataset[f"{prefix}_density"] = (("layer", bins), histogram.density)
            dataset[f"{prefix}_standard_error"] = (("layer", bins), histogram.standard_error)
            if histogram.theory is not None:
                dataset[f"{prefix}_theory"] = (("layer", bins), histogram.theory)
            dataset[f"{prefix}_log_unit"] = ("layer", histogram.log_unit)
        return dataset.assign_attrs(
            network=self.network.name,
            widths=list(self.network.widths),
            networks=self.networks,
            inputs=self.sites,
            sampler=self.sampler,
            sampler_reason=self.reason,
            dtype=self.dtype,
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
            jax=jax.__version__,
            device=jax.devices()[0].device_kind,
        )


def simulate(
    network: Network,
    inputs: ArrayLike,
    *,
    key: PRNGKeyArray | int = 0,
    networks: int = 1000,
    sampler: str = "auto",
    wanted: Sequence[Statistic] = statistics.ALL,
    histograms: bool = False,
    keep_samples: bool = False,
    block: int | None = None,
    memory_budget: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: Progress | None = None,
) -> Simulation:
    """Draw many networks, send the inputs up and gradients down, and average the statistics.

    Parameters
    ----------
    network
        The law of the networks.
    inputs
        Shape (sites, n_0), the same for every network; their dtype is the simulation's.
    key
        A JAX key, or an integer seed.
    networks
        How many to draw.
    sampler
        ``"dense"``, ``"matrix_free"``, or ``"auto"``: matrix_free where the law allows it and it
        is the faster one; the choice and the reason for it are in the result.
    wanted
        The statistics to measure.
    histograms
        Also return histograms of signals and gradients, from the first few of the networks.
    keep_samples
        Also return each network's own values.
    block
        How many networks one vmap holds; chosen from the device and its free memory without it.
    memory_budget
        Bytes to stay within on each device; its free memory without it.
    devices
        Who shares the networks; all of JAX's devices without it. Where they belong to several
        processes, every process calls this with the same arguments, and has the whole result.
    progress
        Called with (networks done, networks in all).

    Raises
    ------
    InputError
        If the inputs do not fit the network or are not finite, the sampler cannot draw its weights,
        a number is not a whole one of at least 1, there is no device, or not even one network fits
        into memory.
    """
    if check_count("networks", networks) > _MOST_NETWORKS:
        raise InputError(f"networks is {networks}; it is at most {_MOST_NETWORKS}")
    inputs = as_inputs(inputs, network)
    sites = inputs.shape[0]
    sampler, reason = samplers.choose(sampler, network, sites)
    key = as_key(key)
    devices = _memory.checked_devices(jax.devices() if devices is None else devices)
    check_progress(progress)
    itemsize = inputs.dtype.itemsize
    plan = _memory.plan(
        network,
        sites,
        sampler,
        networks,
        budget=memory_budget,
        itemsize=itemsize,
        devices=devices,
    )
    block = plan.block if block is None else check_count("block", block)
    wanted = tuple(s for s in checked(wanted) if s.sites <= sites)

    begun = time.perf_counter()
    if progress:
        progress(0, networks)
    chunk = _chunk_size(
        networks, block * len(devices), plan.workers, network.depth * (len(wanted) + 2)
    )
    law = of_one(network, inputs, key)
    run = compiled(
        law,
        chunk,
        devices,
        networks * samplers.seconds(sampler, network, sites),
        measured=(*wanted, OVERFLOWED, VANISHED),
        sampler=sampler,
        keep=(plan.keep, plan.checkpoint),
        block=block,
    )
    ready = time.perf_counter()
    of_the_law = np.zeros(chunk, np.int32)

    def call(first: int) -> dict[str, np.ndarray]:
        return run(law, of_the_law, np.arange(first, first + chunk, dtype=np.int32))

    parts: dict[str, list[Estimate]] = {s.key: [] for s in wanted}
    samples: dict[str, list[np.ndarray]] = {s.key: [] for s in wanted}
    overflowed, vanished = np.zeros((2, network.depth), np.int64)
    for done, values in in_order(call, networks, chunk, plan.workers):
        for statistic in wanted:
            value = values[statistic.key]
            parts[statistic.key].append(Estimate.of(value, log=statistic.log))
            if keep_samples:
                samples[statistic.key].append(value)
        overflowed += np.count_nonzero(values[OVERFLOWED.key], axis=0)
        vanished += np.count_nonzero(values[VANISHED.key], axis=0)
        if progress:
            progress(done, networks)
    finished = time.perf_counter()

    return Simulation(
        estimates={name: estimation.merge(part) for name, part in parts.items()},
        histograms=_histograms(network, inputs, key, sampler, networks) if histograms else {},
        samples={k: np.concatenate(s) for k, s in samples.items()} if keep_samples else {},
        overflowed=overflowed,
        vanished=vanished,
        network=network,
        statistics=wanted,
        sites=sites,
        networks=networks,
        sampler=sampler,
        reason=reason,
        dtype=str(inputs.dtype),
        seconds=finished - ready,
        compile_seconds=ready - begun,
    )


def _chunk_size(networks: int, block: int, workers: int, values: int) -> int:
    """Networks a call: whole blocks, evenly shared, several calls a worker so progress shows.

    No more than what a call hands back of them, ``values`` of each, has room for.
    """
    blocks = -(-networks // block)
    calls = min(blocks, workers * max(1, min(8, blocks // (2 * workers))))
    most = max(1, _CHUNK_VALUES // (block * values))
    return block * min(most, -(-blocks // calls))


# The axis of a mesh of devices.
_NETWORKS = "networks"


def on_devices(mesh: Mesh, spec: PartitionSpec, value: Array | np.ndarray) -> Array:
    """Return the array on a mesh, which may reach into other processes that have the same one."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        words = on_devices(mesh, spec, jax.random.key_data(value))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(value))
    known = np.asarray(value)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(known.shape, sharding, lambda part: known[part])


class Laws(eqx.Module):
    """Laws of random networks of one structure, with the inputs and the key of each.

    Attributes
    ----------
    network
        Its scales are arrays with a leading axis of laws (`Network.as_arrays`).
    inputs
        Shape (laws, sites, n_0).
    key
        Shape (laws,). Network i of a law has ``fold_in(key, i)``.
    """

    network: Network
    inputs: Array | np.ndarray
    key: Array


def of_one(network: Network, inputs: Array, key: PRNGKeyArray) -> Laws:
    """Return one law, as several are held."""
    law = Laws(network.as_arrays(inputs.dtype), inputs, key)
    return jax.tree.map(lambda leaf: leaf[None], law)


def compiled(
    laws: Laws,
    chunk: int,
    devices: tuple[jax.Device, ...],
    seconds: float,
    *,
    measured: tuple[Statistic, ...],
    sampler: str,
    keep: tuple[bool, bool],
    block: int,
    spectrum: bool = False,
    everywhere: bool = True,
) -> Callable[[Laws, np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """Return the function from laws and a chunk of networks to what those measured.

    It takes as many laws as these and of their structure, and for each of ``chunk`` networks which
    law it is of, and its number; both are int32. It returns each statistic by its key, shape
    (chunk, layers).

    Parameters
    ----------
    laws
        The structure, the dtype and how many laws one call knows.
    chunk
        How many networks a call draws; a multiple of the number of devices.
    devices
        Who shares them.
    seconds
        How long all calls will take, on one core.
    measured, sampler, keep, block
        What is measured, and how the walk is done: see `memory.Plan`.
    spectrum
        Whether `singular_values.end_to_end` of the same networks is returned too, shape (chunk, k),
        as `LOG_SINGULAR_VALUES`; with the sampler ``"dense"`` and one input.
    everywhere
        Whether every process has the values of all networks; else those of `own_networks` alone.
    """
    mesh = Mesh(np.array(devices), (_NETWORKS,))
    whole, each = PartitionSpec(), PartitionSpec(_NETWORKS)
    put = functools.partial(on_devices, mesh)

    def arguments(laws: Laws, which: np.ndarray, numbers: np.ndarray) -> tuple[Laws, Array, Array]:
        known = jax.tree.map(functools.partial(put, whole), laws)
        return known, put(each, which), put(each, numbers)

    nobody = np.zeros(chunk, np.int32)
    lowered = _run.lower(
        *arguments(laws, nobody, nobody),
        sampler=sampler,
        measured=measured,
        keep=keep,
        block=block,
        spectrum=spectrum,
        mesh=mesh,
    )
    program = lowered.compile(_compilation.options(seconds, computes_twice=True))

    def run(laws: Laws, which: np.ndarray, numbers: np.ndarray) -> dict[str, np.ndarray]:
        found = program(*arguments(laws, which, numbers))
        if mesh.is_multi_process and everywhere:
            found = multihost_utils.process_allgather(found, tiled=True)
        elif mesh.is_multi_process:
            found = [_own_part(array, axis) for axis, array in zip((1, 0), found, strict=False)]
        values, *logs = map(np.asarray, found)
        named = dict(zip((s.key for s in measured), values, strict=True))
        return named | dict(zip([LOG_SINGULAR_VALUES], logs, strict=False))

    return run


def own_networks(chunk: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Return which networks of a chunk the devices of this process draw, in ascending order."""
    mine = [device.process_index == jax.process_index() for device in devices]
    return np.flatnonzero(np.repeat(mine, chunk // len(devices)))


def _own_part(array: Array, axis: int) -> np.ndarray:
    """Return what is on this process's devices of an array that is shared along an axis."""
    parts = sorted(array.addressable_shards, key=lambda part: part.index[axis].start)
    return np.concatenate([part.data for part in parts], axis=axis)


_STATIC = ("sampler", "measured", "keep", "block", "spectrum", "mesh")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _run(
    laws: Laws,
    which: Array,
    numbers: Array,
    sampler: str,
    measured: tuple[Statistic, ...],
    keep: tuple[bool, bool],
    block: int,
    mesh: Mesh,
    spectrum: bool = False,
) -> tuple[Array, ...]:
    """One chunk: the statistics of these networks of these laws, (statistics, chunk, layers).

    And, if they are asked for, log singular values, (chunk, k).
    """

    def on_one_device(laws: Laws, which: Array, numbers: Array) -> tuple[Array, ...]:
        several = laws.inputs.shape[0] > 1

        def one(which: Array, number: Array) -> tuple[Array, ...]:
            law = jax.tree.map(lambda leaf: leaf[which if several else 0], laws)
            # Here, where the key is an argument: of a constant one, JAX 0.12 may compile without
            # end.
            key = jax.random.fold_in(_threefry.fused(law.key), number)
            found = propagation.propagate(
                law.network,
                law.inputs,
                key,
                sampler=sampler,
                wanted=measured,
                keep=keep[0],
                checkpoint=keep[1],
            )
            values = jnp.stack([found[s.key] for s in measured])
            if not spectrum:
                return (values,)
            return values, singular_values.end_to_end(law.network, law.inputs, key)

        values, *logs = (
            jax.vmap(one)(which, numbers)
            if len(numbers) == block
            else jax.lax.map(lambda pair: one(*pair), (which, numbers), batch_size=block)
        )
        return values.swapaxes(0, 1), *logs

    if mesh.size == 1:
        return on_one_device(laws, which, numbers)
    everywhere, each = PartitionSpec(), PartitionSpec(_NETWORKS)
    shared = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(everywhere, each, each),
        out_specs=(PartitionSpec(None, _NETWORKS), *[each] * spectrum),
        check_vma=False,
    )
    return shared(laws, which, numbers)


# What became of a layer's signal, measured like a statistic but never reported as one.
OVERFLOWED = Statistic(
    "overflowed",
    "signal is not finite",
    measure=lambda s: ~jnp.all(jnp.isfinite(s.preactivation)),
    predict=lambda _: jnp.zeros(()),
)
VANISHED = Statistic(
    "vanished",
    "signal is zero",
    measure=lambda s: jnp.all(s.preactivation == 0),
    predict=lambda _: jnp.zeros(()),
)


def in_order(call: Callable, networks: int, chunk: int, workers: int) -> Iterator[tuple[int, Any]]:
    """Run the chunks, several at a time, and hand on their values in order, on the host.

    ``call`` takes a chunk's first number; all that it returns has an axis of networks in front.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[tuple[int, Future]] = collections.deque()
        starts = iter(range(0, networks, chunk))
        try:
            while True:
                for first in starts:
                    waiting.append((first, pool.submit(call, first)))
                    if len(waiting) > workers:
                        break
                if not waiting:
                    return
                first, future = waiting.popleft()
                # The last chunk is padded with networks that nobody asked for.
                count = min(chunk, networks - first)
                yield first + count, jax.tree.map(lambda v, stop=count: v[:stop], future.result())
        finally:
            for _, future in waiting:
                future.cancel()


@functools.partial(jax.jit, static_argnames="sampler")
def _draw_signals(
    network: Network, inputs: Array, key: Array, numbers: Array, sampler: str
) -> propagation.Signals:
    """Every signal of networks number ``numbers``, each array with a leading axis of networks."""
    return jax.lax.map(
        lambda i: propagation.signals(network, inputs, jax.random.fold_in(key, i), sampler=sampler),
        numbers,
    )


def _histograms(
    network: Network, inputs: Array, key: Array, sampler: str, networks: int
) -> dict[str, Histogram]:
    """Histograms from the first networks: as many as give each layer enough values."""
    sites, widest = inputs.shape[0], max(network.widths)
    count = min(networks, _HISTOGRAM_NETWORKS, math.ceil(_HISTOGRAM_VALUES / (sites * widest)))

    numbers = network.as_arrays(inputs.dtype)
    drawn = jax.device_get(_draw_signals(numbers, inputs, key, jnp.arange(count), sampler))
    layers = [
        (stage, layer) for stage, z in enumerate(drawn.preactivation) for layer in range(z.shape[1])
    ]

    def every(stages: list[np.ndarray]) -> list[np.ndarray]:
        return [stages[stage][:, layer] for stage, layer in layers]

    z, log_scale = every(drawn.preactivation), every(drawn.log_scale)
    delta, log_norm = every(drawn.gradient), every(drawn.log_gradient_norm)
    # Signals have a scale beside them only where φ is linear for them.
    h = [np.asarray(network.activation(jnp.asarray(value))) for value in z]
    return {
        "preactivation": estimation.histogram(z, log_scale),
        "activation": estimation.histogram(h, log_scale),
        "gradient": estimation.histogram(delta, log_norm),
    }
