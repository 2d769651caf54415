"""Many networks at once: a grid of laws, learning rates and seeds, trained in chunks.

A chunk's networks go through the programs of `loop` together, from one recorded step to the next,
and no further than some seconds at a time, so that progress shows. On a CPU several chunks are
trained side by side; an accelerator trains one, as wide as its memory allows.
"""

import concurrent.futures
import functools
import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from gradflow import _compilation
from gradflow import networks as nets
from gradflow._arguments import as_key
from gradflow._checks import check_count, check_instance, check_number, check_progress
from gradflow._labels import checked
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import _memory, _programs
from gradflow.simulation.monte_carlo import Progress
from gradflow.statistics import Statistic
from gradflow.training import loop, records
from gradflow.training._checks import (
    check_singular_values,
    checked_data,
    checked_laws,
    checked_networks,
    checked_optimiser,
    checked_rates,
    pair,
    record_steps,
)
from gradflow.training._saved import Saved, identity
from gradflow.training.loop import Each, Given, Job, State
from gradflow.training.records import RECORDED, Data
from gradflow.training.result import Training

__all__ = ["train"]

# What the paper monitors (Glorot & Bengio 2010, section 3).
_MONITORED = 300
# Copies of a network's weights while it is trained: themselves, their start, gradients, updates,
# two of an optimiser, and two while they are measured.
_COPIES = 8
# On a CPU a few networks in one vmap take a tenth to a third less time than one after another,
# while what they read and write at a step stays in a core's cache or, with larger batches, is used
# often; of very large batches one matrix product is enough for a core. Networks in a block at most,
# weights in it for each input of a batch, and the largest batch: measured at depths 5 and 10,
# widths 32 to 300 and batches of 10, 64 and 256.
_IN_A_BLOCK, _WEIGHTS_AN_INPUT, _LARGE_BATCH = 4, 10_000, 128
_FLOPS_A_SECOND = 1e10  # of one core, with small matrices
# How long a chunk of networks takes at least, where there are enough, so that calls cost little;
# and a call at most, so that progress shows.
_CHUNK_SECONDS, _CALL_SECONDS = 2.0, 1.0
_MEASURE_SECONDS = 0.01  # about, of one network
# Between two times that a chunk is saved, at least; and the share of the time that it may take.
_SAVE_SECONDS, _SAVE_SHARE = 10.0, 0.05


def train(
    networks: Network | Sequence[Network],
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    steps: int = 1000,
    batch: int = 10,
    learning_rate: float | Sequence[float] = 0.1,
    seeds: int = 1,
    key: PRNGKeyArray | int = 0,
    optimiser: Callable[[Any], optax.GradientTransformation] = optax.sgd,
    clip: optax.GradientTransformation | None = None,
    record: Sequence[int] | None = None,
    monitor: tuple[ArrayLike, ArrayLike] | None = None,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    wanted: Sequence[Statistic] = RECORDED,
    histograms: int = 0,
    singular_values: int = 0,
    biases: bool = True,
    keep_state: bool = False,
    state: State | None = None,
    block: int | None = None,
    memory_budget: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> Training:
    """Train networks × learning rates × seeds, each by itself, in one compiled program.

    Parameters
    ----------
    networks
        One law or several that differ in numbers alone (σ_w, σ_b, branch scales), as
        ``[mlp(widths, "tanh", fan_in(s)) for s in …]``; the last layer's units are the classes.
    inputs
        Shape (samples, features): the features are n_0, or for convolutions n_0 of each position.
        Their dtype is that of training.
    labels
        Shape (samples,): whole numbers from 0.
    steps, batch
        How many updates, in all, each of so many inputs.
    learning_rate
        One or several: what ``optimiser`` is called with.
    seeds
        How many random networks at each point of the grid.
    key
        A JAX key, or an integer seed.
    optimiser
        From a learning rate, which is traced, to an optax optimiser: ``optax.adam``, or for a
        schedule ``lambda rate: optax.sgd(optax.cosine_decay_schedule(rate, 1000))``. It is given
        arrays of weights with an axis of layers in front, one layer each in stages of at most 16.
        Where it draws random numbers, as `optax.add_noise` does, each network draws its own.
    clip
        What is done to a gradient before the optimiser gets it, as `optax.adaptive_grad_clip`. It
        is given one matrix (n_in, n_out) and one vector of biases for each layer.
    record
        The steps to record; without it 0, ``steps`` and some between, ever further apart: as many,
        up to 25, as take an eighth of the time of training by a rough estimate, and at least one.
    monitor
        (inputs, labels) that everything is measured on; 300 of the data without it.
    validation
        (inputs, labels) that the best learning rate is chosen by.
    wanted
        The statistics to record.
    histograms
        Record the distribution of activations at each layer in so many bins.
    singular_values
        Record so many of the largest singular values of ∂z^L/∂x at the first monitored input.
    biases
        Whether layers without biases get some that start at 0 (as the paper's do).
    keep_state
        Also return the networks as they are after the last step.
    state
        Go on from this one, of the same call with fewer ``steps``; record what comes after those.
    block
        How many networks one vmap holds; chosen from the device and its free memory without it: on
        a CPU a few, and blocks are trained one after the other on each of its cores.
    memory_budget
        Bytes to stay within on each device; its free memory without it.
    devices
        Who shares the networks; all of this process's devices without it.
    save
        A folder to keep the run in while it goes on, by its identity: if it is interrupted or
        killed, a call like it, in any process, goes on from where it was saved last; and if it has
        ended, returns what was found. See `Training.saved`.
    progress
        Called with (updates done, updates in all), of all networks together; the first call, with
        0, comes before compilation.

    Raises
    ------
    InputError
        If data do not fit the network or are not finite, a label is no class, a learning rate is
        not above 0, the batch is larger than the data, or a number is not a whole one of at least
        1. A network that diverges raises nothing; see `Training.diverged`.
    """
    laws = checked_networks(networks)
    laws = checked_laws(tuple(map(nets.with_biases, laws)) if biases else laws)
    steps, seeds = check_count("steps", steps), check_count("seeds", seeds)
    rates = checked_rates(learning_rate)
    data = checked_data("", inputs, labels, laws[0])
    samples, batch = len(data.labels), check_count("batch", batch)
    if batch > samples:
        raise InputError(f"batch is {batch}, and there are {samples} samples; use at most as many")
    chosen = np.arange(min(_MONITORED, samples)) * samples // min(_MONITORED, samples)
    seen = (
        Data(data.inputs[chosen], data.labels[chosen])
        if monitor is None
        else checked_data("monitor's ", *pair("monitor", monitor), laws[0])
    )
    held_out = (
        None
        if validation is None
        else checked_data("validation's ", *pair("validation", validation), laws[0])
    )
    dtype = data.inputs.dtype
    if state is not None:
        check_instance("state", state, State, "the state of a Training with keep_state=True")
    begin = 0 if state is None else int(state.step[0])
    times = record_steps(record, begin, steps, _record_cost(batch, seen, held_out))
    key = as_key(key)
    bins = check_count("histograms", histograms, 0)
    leading = check_singular_values(singular_values, laws[0])
    devices = _memory.checked_devices(jax.local_devices() if devices is None else devices)
    check_progress(progress)
    if memory_budget is not None:
        check_number("memory_budget", memory_budget, positive=True)
    checked_optimiser(optimiser, clip)

    points = itertools.product(range(len(laws)), range(len(rates)), range(seeds))
    grid = np.array(list(points))
    arrays = [law.as_arrays(dtype) for law in laws]
    each = Each(
        jax.tree.map(lambda *leaves: np.stack(leaves)[grid[:, 0]], *arrays),
        rates.astype(dtype)[grid[:, 1]],
        grid[:, 2].astype(np.int32),
    )
    wanted = tuple(s for s in checked(wanted) if s.sites <= len(seen.labels))

    count = len(grid)
    weights = sum(n * m for layer in laws[0].shapes for n, m in layer)
    seconds = 6 * weights * batch * (steps - begin) / _FLOPS_A_SECOND  # of one network
    looked_at = [records.sites(one.inputs).shape[0] for one in (seen, held_out) if one is not None]
    plan = _plan(
        laws[0],
        max(looked_at),
        batch,
        count,
        seconds,
        block,
        memory_budget,
        dtype.itemsize,
        devices,
    )
    begun = time.perf_counter()
    if progress:
        progress(0, count * (steps - begin))
    mesh = Mesh(np.array(devices), (loop.NETWORKS,))
    job = Job(optimiser, clip, batch, wanted, bins, leading, plan.block, mesh)
    run = _Run(each, Given(key, data, seen, held_out), job, plan, state, times)
    if save is not None:
        run = run.saved_in(save)
    programs = _Programs(run, count * seconds)
    compiled = time.perf_counter()
    parts = _in_chunks(programs, begin, progress)
    finished = time.perf_counter()

    # The last chunk is padded with networks that nobody asked for.
    values, last = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
    shape = (len(laws), len(rates), seeds)
    return Training(
        values={k: v.reshape(*shape, *v.shape[1:]) for k, v in values.items()},
        steps=times,
        first_nonfinite=last.first_nonfinite.reshape(shape),
        nonfinite_layer=last.nonfinite_layer.reshape(shape),
        networks=laws,
        learning_rates=rates,
        monitor=np.asarray(seen.inputs),
        state=last if keep_state else None,
        saved=None if run.saved is None else run.saved.folder,
        seeds=seeds,
        batch=batch,
        samples=samples,
        seconds=finished - compiled,
        compile_seconds=compiled - begun,
    )


def _record_cost(batch: int, seen: Data, validation: Data | None) -> float:
    """Return how many steps take as long as recording everything once; measured on a CPU."""
    held_out = 0 if validation is None else len(validation.labels)
    return 10 + (2.2 * len(seen.labels) + 0.5 * held_out) / batch


class _Plan(NamedTuple):
    """How many networks are in one vmap and in one call, and how many calls run at a time."""

    block: int
    chunk: int
    workers: int


def _plan(
    network: Network,
    sites: int,
    batch: int,
    count: int,
    seconds: float,
    block: int | None,
    budget: int | None,
    itemsize: int,
    devices: tuple[jax.Device, ...],
) -> _Plan:
    """Return how ``count`` networks are grouped, each of which takes so many seconds."""
    on_cpu = devices[0].platform == "cpu"
    # The devices that a CPU is divided into share its memory and its cores.
    sharing = len(devices) if on_cpu else 1
    free = _memory.available(devices[0]) // sharing if budget is None else budget
    weights = sum(n * m for layer in network.shapes for n, m in layer) + sum(network.widths)
    needed = _COPIES * weights * itemsize
    needed += _memory.bytes_per_network(network, sites, "dense", itemsize=itemsize)
    if needed > free:
        raise InputError(
            f"one network of {weights} weights, monitored on {sites} inputs, needs "
            f"{needed / 2**30:.3g} GiB in training and {free / 2**30:.3g} GiB are free; use a "
            "smaller network, or fewer monitored inputs"
        )
    fitting = max(1, free // (2 * needed))
    cores = max(1, min(os.cpu_count() or 1, 8) // sharing) if on_cpu else 1
    on_each = -(-count // len(devices))
    if block is None:
        fast = _WEIGHTS_AN_INPUT * batch // weights if batch <= _LARGE_BATCH else 1
        few = min(_IN_A_BLOCK, fast, -(-on_each // cores))
        block = max(1, min(few, fitting)) if on_cpu else min(on_each, fitting)
    block = min(check_count("block", block), on_each)
    workers = max(1, min(cores, fitting // block, -(-on_each // block)))
    # Blocks one after the other in a call: the networks' weights are all held.
    blocks = min(-(-on_each // (workers * block)), max(1, fitting // (workers * block)))
    blocks = max(1, min(blocks, math.ceil(_CHUNK_SECONDS / (seconds * block))))
    return _Plan(int(block), int(block * blocks * len(devices)), int(workers))


class _Run(NamedTuple):
    """What is to be done."""

    each: Each
    given: Given
    job: Job
    plan: _Plan
    state: State | None  # to go on from
    times: np.ndarray  # of the recorded steps
    saved: Saved | None = None

    @property
    def networks(self) -> int:
        """How many there are."""
        return len(self.each.number)

    def saved_in(self, folder: str | Path) -> "_Run":
        """Return it as it was begun, if it was, with the networks grouped as they were then."""
        alone = self._replace(
            job=self.job._replace(block=1, mesh=Mesh(jax.local_devices()[:1], (loop.NETWORKS,))),
            plan=_Plan(1, 1, 1),
        )
        texts = [program.as_text() for program in alone.lowered()]
        values = _without_keys((self.each, self.given, self.state, self.times))
        saved = Saved(folder, identity(texts, values))
        plan = _Plan(*saved.plan(self.plan))
        return self._replace(job=self.job._replace(block=plan.block), plan=plan, saved=saved)

    def on_all(self, value: Any) -> Any:
        """Return what all devices have."""
        place = functools.partial(_programs.on_devices, self.job.mesh, PartitionSpec())
        return jax.tree.map(place, value)

    def part(self, tree: Any, first: int) -> Any:
        """Return a chunk's part of what there is of each network, padded with the last one."""
        at = np.minimum(np.arange(first, first + self.plan.chunk), self.networks - 1)
        return self.on_each(jax.tree.map(lambda leaf: leaf[at], tree))

    def on_each(self, tree: Any) -> Any:
        """Return what there is of each network, shared among the devices."""
        place = functools.partial(_programs.on_devices, self.job.mesh, PartitionSpec(loop.NETWORKS))
        return jax.tree.map(place, tree)

    def lowered(self) -> list[jax.stages.Lowered]:
        """Return the programs: to start networks, to take steps, and to record."""
        each, given = self.part(self.each, 0), self.on_all(self.given)
        step = self.on_all(np.zeros((), np.int32))
        begin = loop.begin.lower(each, given, job=self.job)
        state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=NamedSharding(self.job.mesh, PartitionSpec(loop.NETWORKS)),
            ),
            begin.out_info,
        )
        return [
            begin,
            loop.advance.lower(each, state, given, step, step, job=self.job),
            loop.measure.lower(each, state, given, step, job=self.job),
        ]


def _with_keys(tree: Any, like: Any) -> Any:
    """Return a tree with JAX's keys where another has them and this one has their data."""

    def wrapped(leaf: jax.Array, known: jax.Array) -> jax.Array:
        if jnp.issubdtype(known.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(known))
        return leaf

    return jax.tree.map(wrapped, tree, like)


def _without_keys(tree: Any) -> Any:
    """Return the tree on the host, with the data of JAX's keys in their place."""

    def known(leaf: Any) -> np.ndarray:
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(known, tree)


class _Programs:
    """The compiled programs of a run, and what they are called with."""

    def __init__(self, run: _Run, seconds: float) -> None:
        """Compile them, for a run of so many seconds on one core."""
        self.run, self.given = run, run.on_all(run.given)
        lowered = run.lowered()
        times = (0.1, seconds, _MEASURE_SECONDS * len(run.times) * run.networks)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            self._begin, self._advance, self._measure = pool.map(
                lambda one, time: one.compile(_compilation.options(time)), lowered, times
            )

    def along(self, first: int, begin: int, stopped: threading.Event) -> Iterator[tuple[int, Any]]:
        """Train a chunk; after each call yield how many steps it took, at last what was found."""
        run = self.run
        each = run.part(run.each, first)
        state, found = self._begun(each, first)
        step, at_once = int(np.asarray(state.step)[0]), 1
        yield step - begin, None
        saved = time.perf_counter()
        pause = _SAVE_SECONDS
        for time_ in run.times[len(found) :]:
            while step < time_:
                stop = min(int(time_), step + at_once)
                begun = time.perf_counter()
                state = self._advance(each, state, self.given, self._step(step), self._step(stop))
                jax.block_until_ready(state.step)
                ended = time.perf_counter()
                taken, step = stop - step, stop
                at_once = max(1, min(int(_CALL_SECONDS * taken / (ended - begun)), 8 * at_once))
                stopping = stopped.is_set()
                if stopping or ended > saved + pause:
                    self._save(first, state, found)
                    saved = time.perf_counter()
                    pause = max(_SAVE_SECONDS, (saved - ended) / _SAVE_SHARE)
                yield taken, None
                if stopping:
                    return
            found.append(jax.device_get(self._measure(each, state, self.given, self._step(step))))
        self._save(first, state, found)
        yield 0, (_stacked(found), _without_keys(state))

    def _begun(self, each: Each, first: int) -> tuple[State, list[dict[str, Any]]]:
        """Return a chunk's state and what was recorded, as it is saved or at its beginning."""
        fresh = self._begin(each, self.given)
        known = self.run.saved.read(first) if self.run.saved else None
        if known is not None:
            leaves, records = known
            state = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
            steps = next(iter(records.values())).shape[1] if records else 0
            found = [{name: v[:, n] for name, v in records.items()} for n in range(steps)]
            return _with_keys(self.run.on_each(state), fresh), found
        if self.run.state is not None:
            return _with_keys(self.run.part(self.run.state, first), fresh), []
        return fresh, []

    def _save(self, first: int, state: State, found: list[dict[str, Any]]) -> None:
        if self.run.saved:
            records = _stacked(found) if found else {}
            self.run.saved.write(first, jax.tree.leaves(_without_keys(state)), records)

    def _step(self, number: int) -> jax.Array:
        return self.run.on_all(np.asarray(number, np.int32))


def _stacked(found: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return what was recorded at each step, with an axis of steps behind that of networks."""
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *found)


def _in_chunks(programs: _Programs, begin: int, progress: Progress | None) -> list[Any]:
    """Train all chunks, several at a time; return what was found of each, in order."""
    plan, count = programs.run.plan, programs.run.networks
    done, total = 0, count * int(programs.run.times[-1] - begin)
    news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def train_chunk(first: int) -> Any:
        size = min(plan.chunk, count - first)
        try:
            for taken, found in programs.along(first, begin, stopped):
                news.put(taken * size)
                if found is not None:
                    return found
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
