"""How a grid of networks is trained: grouped into chunks, saved along the way, and resumed.

A chunk's networks go through the programs of `_loop` together, from one recorded step to the next,
and for at most some seconds at a time, so that progress shows. On a CPU several chunks are trained
side by side; an accelerator trains one, as wide as its memory allows.
"""

import concurrent.futures
import functools
import math
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradflow import _compilation
from gradflow._checks import check_count, check_number
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import _memory, _programs
from gradflow.simulation.monte_carlo import Progress
from gradflow.training import _loop, _records
from gradflow.training._loop import PerNetwork, Settings, Shared, State
from gradflow.training._saved import Saved, identity

# Copies of a network's weights in training: the weights, their start, gradients, updates, two of an
# optimiser, and two while they are measured.
_COPIES = 8
# On a CPU a few networks in one vmap take a tenth to a third less time than one after another,
# while what they read and write at a step stays in a core's cache or, with larger batches, is used
# often; of very large batches one matrix product is enough for a core. Networks in a block at most,
# weights in it for each input of a batch, and the largest batch: measured at depths 5 and 10,
# widths 32 to 300 and batches of 10, 64 and 256.
_IN_A_BLOCK, _WEIGHTS_AN_INPUT, _LARGE_BATCH = 4, 10_000, 128
_FLOPS_A_SECOND = 1e10  # of one core, with small matrices
# The least time of a chunk of networks, where there are enough, so that calls cost little; and the
# longest of a call, so that progress shows.
_CHUNK_SECONDS, _CALL_SECONDS = 2.0, 1.0
_MEASURE_SECONDS = 0.01  # about, of one network
# The least time between two savings of a chunk; and the share of the time that saving may take.
_SAVE_SECONDS, _SAVE_SHARE = 10.0, 0.05


class Grid(NamedTuple):
    """The networks to train: every law at every learning rate from every seed."""

    laws: tuple[Network, ...]
    rates: np.ndarray
    seeds: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of laws, learning rates and seeds."""
        return len(self.laws), len(self.rates), self.seeds

    def per_network(self, dtype: Any) -> PerNetwork:
        """Arguments of each network, in the order of the flattened grid."""
        law, rate, number = np.indices(self.shape).reshape(3, -1)
        arrays = [one.as_arrays(dtype) for one in self.laws]
        return PerNetwork(
            jax.tree.map(lambda *leaves: np.stack(leaves)[law], *arrays),
            self.rates.astype(dtype)[rate],
            number.astype(np.int32),
        )


class Resources(NamedTuple):
    """Limits on how networks are grouped; those that are None are chosen from the device."""

    block: int | None  # networks in one vmap
    memory_budget: int | None  # bytes of each device
    devices: tuple[jax.Device, ...]

    @classmethod
    def checked(cls, block: Any, memory_budget: Any, devices: Any) -> "Resources":
        """Limits that can be kept."""
        if block is not None:
            check_count("block", block)
        if memory_budget is not None:
            check_number("memory_budget", memory_budget, positive=True)
        devices = jax.local_devices() if devices is None else devices
        return cls(block, memory_budget, _memory.checked_devices(devices))


class Trained(NamedTuple):
    """Records and last state of all networks, in the order of the flattened grid."""

    values: dict[str, np.ndarray]
    state: State
    saved: Path | None
    seconds: float
    compile_seconds: float


def train(
    grid: Grid,
    shared: Shared,
    settings: Settings,
    times: np.ndarray,
    state: State | None,
    resources: Resources,
    save: str | Path | None,
    progress: Progress | None,
) -> Trained:
    """Train a grid of networks from a state, or from their first step, recording at these times.

    ``settings`` are complete but for the grouping of networks, which is chosen here.
    """
    begin, count = 0 if state is None else int(state.step[0]), math.prod(grid.shape)
    steps = int(times[-1]) - begin
    seconds = 6 * _weights(grid.laws[0]) * settings.batch * steps / _FLOPS_A_SECOND  # of one
    plan = _plan(grid.laws[0], shared, settings.batch, count, seconds, resources)
    begun = time.perf_counter()
    if progress:
        progress(0, count * steps)
    mesh = Mesh(np.array(resources.devices), (_loop.NETWORKS,))
    settings = settings._replace(block=plan.block, mesh=mesh)
    per_network = grid.per_network(shared.data.inputs.dtype)
    run = _Run(per_network, shared, settings, plan, state, times)
    if save is not None:
        run = run.saved_in(save)
    programs = _Programs(run, count * seconds)
    compiled = time.perf_counter()
    parts = _in_chunks(programs, begin, progress)
    finished = time.perf_counter()
    # The last chunk is padded with copies of the last network.
    values, last = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
    folder = None if run.saved is None else run.saved.folder
    return Trained(values, last, folder, finished - compiled, compiled - begun)


def _weights(network: Network) -> int:
    return sum(n * m for layer in network.shapes for n, m in layer)


class _Plan(NamedTuple):
    """The numbers of networks in one vmap and in one call, and of calls that run at a time."""

    block: int
    chunk: int
    workers: int


def _plan(
    network: Network,
    shared: Shared,
    batch: int,
    count: int,
    seconds: float,
    resources: Resources,
) -> _Plan:
    """The grouping of ``count`` networks, each of which takes so many seconds."""
    devices, block = resources.devices, resources.block
    on_cpu = devices[0].platform == "cpu"
    # The devices that a CPU is divided into share its memory and its cores.
    sharing = len(devices) if on_cpu else 1
    free = resources.memory_budget or _memory.available(devices[0]) // sharing
    measured = [data for data in (shared.monitor, shared.validation) if data is not None]
    sites = max(_records.sites(data.inputs).shape[0] for data in measured)
    itemsize = shared.data.inputs.dtype.itemsize
    weights = _weights(network) + sum(network.widths)
    needed = _COPIES * weights * itemsize
    needed += _memory.bytes_per_network(network, sites, "dense", itemsize=itemsize)
    if needed > free:
        raise InputError(
            f"one network of {weights} weights, monitored on {sites} inputs, needs "
            f"{needed / 2**30:.3g} GiB in training and {free / 2**30:.3g} GiB are free; use a "
            "smaller network, or fewer monitored inputs"
        )
    fitting = int(max(1, free // (2 * needed)))
    cores = max(1, min(os.cpu_count() or 1, 8) // sharing) if on_cpu else 1
    on_each = -(-count // len(devices))
    if block is None:
        fast = _WEIGHTS_AN_INPUT * batch // weights if batch <= _LARGE_BATCH else 1
        few = min(_IN_A_BLOCK, fast, -(-on_each // cores))
        block = max(1, min(few, fitting)) if on_cpu else min(on_each, fitting)
    block = min(block, on_each)
    workers = max(1, min(cores, fitting // block, -(-on_each // block)))
    # Blocks one after the other in a call: the networks' weights are all held.
    blocks = min(-(-on_each // (workers * block)), max(1, fitting // (workers * block)))
    blocks = max(1, min(blocks, math.ceil(_CHUNK_SECONDS / (seconds * block))))
    return _Plan(block, block * blocks * len(devices), workers)


class _Run(NamedTuple):
    """A grid of networks to train, and how they are grouped."""

    per_network: PerNetwork
    shared: Shared
    settings: Settings
    plan: _Plan
    state: State | None  # to resume from
    times: np.ndarray  # of the recorded steps
    saved: Saved | None = None

    @property
    def networks(self) -> int:
        """The number of networks."""
        return len(self.per_network.number)

    @property
    def mesh(self) -> Mesh:
        """The devices that networks are divided among."""
        assert self.settings.mesh is not None
        return self.settings.mesh

    def saved_in(self, folder: str | Path) -> "_Run":
        """The same run saved in this folder, with networks grouped as when it was begun there."""
        mesh = Mesh(jax.local_devices()[:1], (_loop.NETWORKS,))
        settings = self.settings._replace(block=1, mesh=mesh)
        alone = self._replace(settings=settings, plan=_Plan(1, 1, 1))
        texts = [program.as_text() for program in alone.lowered()]
        values = _without_keys((self.per_network, self.shared, self.state, self.times))
        saved = Saved(folder, identity(texts, values))
        plan = _Plan(*saved.plan(self.plan))
        settings = self.settings._replace(block=plan.block)
        return self._replace(settings=settings, plan=plan, saved=saved)

    def on_all(self, value: Any) -> Any:
        """A value with a copy on every device."""
        put = functools.partial(_programs.on_devices, self.mesh, PartitionSpec())
        return jax.tree.map(put, value)

    def part(self, tree: Any, first: int) -> Any:
        """A chunk's part of a tree with an axis of networks, padded with the last network."""
        at = np.minimum(np.arange(first, first + self.plan.chunk), self.networks - 1)
        return self.on_each(jax.tree.map(lambda leaf: leaf[at], tree))

    def on_each(self, tree: Any) -> Any:
        """A tree with an axis of networks, divided among the devices."""
        spec = PartitionSpec(_loop.NETWORKS)
        put = functools.partial(_programs.on_devices, self.mesh, spec)
        return jax.tree.map(put, tree)

    def lowered(self) -> list[jax.stages.Lowered]:
        """The programs that start networks, take steps, and record."""
        each, shared = self.part(self.per_network, 0), self.on_all(self.shared)
        step = self.on_all(np.zeros((), np.int32))
        begin = _loop.begin.lower(each, shared, settings=self.settings)
        state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=NamedSharding(self.mesh, PartitionSpec(_loop.NETWORKS)),
            ),
            begin.out_info,
        )
        return [
            begin,
            _loop.advance.lower(each, state, shared, step, step, settings=self.settings),
            _loop.measure.lower(each, state, shared, step, settings=self.settings),
        ]


def _with_keys(tree: Any, like: Any) -> Any:
    """The tree with JAX's keys where ``like`` has keys and the tree has their data."""

    def wrapped(leaf: jax.Array, known: jax.Array) -> jax.Array:
        if jnp.issubdtype(known.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(known))
        return leaf

    return jax.tree.map(wrapped, tree, like)


def _without_keys(tree: Any) -> Any:
    """The tree on the host, with the data of JAX's keys in place of keys."""

    def known(leaf: Any) -> np.ndarray:
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(known, tree)


class _Programs:
    """The compiled programs of a run, with their arguments."""

    def __init__(self, run: _Run, seconds: float) -> None:
        """Compile the programs, for a run of so many seconds on one core."""
        self.run, self.shared = run, run.on_all(run.shared)
        lowered = run.lowered()
        times = (0.1, seconds, _MEASURE_SECONDS * len(run.times) * run.networks)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            self._begin, self._advance, self._measure = pool.map(
                lambda one, time: one.compile(_compilation.options(time)), lowered, times
            )

    def along(self, first: int, begin: int, stopped: threading.Event) -> Iterator[tuple[int, Any]]:
        """Train a chunk; yield the steps of each call and, at last, (records, last state)."""
        run = self.run
        each = run.part(run.per_network, first)
        state, records = self._begun(each, first)
        step, at_once = int(np.asarray(state.step)[0]), 1
        yield step - begin, None
        saved = time.perf_counter()
        pause = _SAVE_SECONDS
        for time_ in run.times[len(records) :]:
            while step < time_:
                stop = min(int(time_), step + at_once)
                begun = time.perf_counter()
                state = self._advance(each, state, self.shared, self._step(step), self._step(stop))
                jax.block_until_ready(state.step)
                ended = time.perf_counter()
                taken, step = stop - step, stop
                at_once = max(1, min(int(_CALL_SECONDS * taken / (ended - begun)), 8 * at_once))
                stopping = stopped.is_set()
                if stopping or ended > saved + pause:
                    self._save(first, state, records)
                    saved = time.perf_counter()
                    pause = max(_SAVE_SECONDS, (saved - ended) / _SAVE_SHARE)
                yield taken, None
                if stopping:
                    return
            records.append(
                jax.device_get(self._measure(each, state, self.shared, self._step(step)))
            )
        self._save(first, state, records)
        yield 0, (_stacked(records), _without_keys(state))

    def _begun(self, each: PerNetwork, first: int) -> tuple[State, list[dict[str, Any]]]:
        """A chunk's state and records, as they were saved or at the beginning."""
        fresh = self._begin(each, self.shared)
        saved = self.run.saved.read(first) if self.run.saved else None
        if saved is not None:
            leaves, values = saved
            state = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
            steps = next(iter(values.values())).shape[1] if values else 0
            records = [{name: v[:, n] for name, v in values.items()} for n in range(steps)]
            return _with_keys(self.run.on_each(state), fresh), records
        if self.run.state is not None:
            return _with_keys(self.run.part(self.run.state, first), fresh), []
        return fresh, []

    def _save(self, first: int, state: State, records: list[dict[str, Any]]) -> None:
        if self.run.saved:
            values = _stacked(records) if records else {}
            self.run.saved.write(first, jax.tree.leaves(_without_keys(state)), values)

    def _step(self, number: int) -> jax.Array:
        return self.run.on_all(np.asarray(number, np.int32))


def _stacked(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The records of several steps, with an axis of steps after that of networks."""
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *records)


def _in_chunks(programs: _Programs, begin: int, progress: Progress | None) -> list[Any]:
    """Train all chunks, several at a time; (records, last state) of each, in order."""
    plan, count = programs.run.plan, programs.run.networks
    done, total = 0, count * int(programs.run.times[-1] - begin)
    news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def train_chunk(first: int) -> Any:
        size = min(plan.chunk, count - first)
        try:
            for taken, result in programs.along(first, begin, stopped):
                news.put(taken * size)
                if result is not None:
                    return result
            return None
        finally:
            news.put(None)

    with concurrent.futures.ThreadPoolExecutor(plan.workers) as pool:
        running = [pool.submit(train_chunk, first) for first in range(0, count, plan.chunk)]
        try:
            left = len(running)
            while left:
                taken = news.get()
                left -= taken is None
                if taken and progress:
                    done += taken
                    progress(done, total)
            return [one.result() for one in running]
        finally:
            stopped.set()
            for one in running:
                one.cancel()
