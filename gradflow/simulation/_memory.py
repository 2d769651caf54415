"""How much memory there is, how much a simulation takes, and how to cut it to fit.

Counted is a bound on the large arrays: the signals that the forward pass keeps for the
backward pass (all, or those entering every √L-th layer), a layer's working copies, and, for the
dense sampler, the weights of one layer, where they are not drawn a tile at a time.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gradflow._checks import check_instance, check_number, check_sequence
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import _matrices, _passes

__all__ = ["Plan", "available", "bytes_per_network", "checked_devices", "plan"]

# Copies of a layer's (sites, width) signals that are alive at once while it is linearised.
_WORKING_COPIES = 12
# Copies of one layer's weights while they are drawn: random bits, normals, scaled weights.
_DRAWING_COPIES = 3
# Arrays of a layer's size in a kept linearisation.
_LINEARISATION = 6
# The most that is spent on keeping linearisations; beyond, drawing again is faster than fetching.
_KEEP_BYTES = 1 << 28
# Floats that one step of the walk touches, for one block of networks: as many as stay in a cache.
_CACHED_FLOATS = 1 << 15
_MOST_IN_A_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """How networks are grouped: ``block`` of them in one vmap, ``workers`` programs at a time.

    ``keep`` and ``checkpoint`` are those of `propagation.propagate`.
    """

    block: int
    workers: int
    keep: bool
    checkpoint: bool
    bytes_needed: int
    bytes_available: int


def available(device: jax.Device | None = None) -> int:
    """Return the free memory of the device, in bytes."""
    device = device or jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free = min(free, int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, limit - used)
    return free


def bytes_per_network(
    network: Network,
    sites: int,
    sampler: str,
    *,
    keep: bool = False,
    checkpoint: bool = False,
    itemsize: int = 4,
) -> int:
    """Return a bound on the memory that one network takes while it is simulated, in bytes."""
    widths = network.widths
    layers = network.shapes
    shapes = [shape for layer in layers for shape in layer]
    widest = max(*widths, *(sum(n for n, _ in layer) for layer in layers))
    widest = max(widest, *(m for _, m in shapes), 1)
    working = (_WORKING_COPIES * widest + 4 * sites) * sites
    if sampler == "dense":
        redrawn = network.iid_gaussian and itemsize == 4 and jax.default_backend() == "cpu"
        weights = max((n * m for n, m in shapes), default=0)
        # Where entries are drawn a tile at a time, a tile has at least two rows of them.
        most = max(_matrices.LARGE_TILE, 2 * widest) if redrawn else weights
        working += _DRAWING_COPIES * min(weights, most)
    signals, remembered = network.input_width, 0
    for stage, (below, width) in zip(
        network.stages, itertools.pairwise(network.stage_widths), strict=True
    ):
        if stage.tied:
            # Each matrix itself or all its products; for the backward pass, those of each step.
            each = stage.block.shapes(below)
            products = 2 * stage.repeats * sites
            for n, m in each:
                remembered += 2 * n * m if sampler == "dense" else 2 * products * (n + m)
                remembered += stage.repeats * sites * (n + sites)
        cut = checkpoint and not stage.tied
        kept = sum(_passes.checkpoints(stage.repeats)) if cut else stage.repeats
        signals += width * kept
    return itemsize * (working + remembered + sites * signals * (1 + _LINEARISATION * keep))


def checked_devices(devices: Any) -> tuple[jax.Device, ...]:
    """Return JAX's devices as a tuple, or raise `InputError`: there is at least one."""
    several = check_sequence("devices", devices, "some of jax.devices()")
    if not several:
        raise InputError("devices is empty; it takes at least one")
    for device in several:
        check_instance("a device", device, jax.Device, "one of jax.devices()")
    return several


def plan(
    network: Network,
    sites: int,
    sampler: str,
    networks: int,
    *,
    budget: int | None = None,
    itemsize: int = 4,
    devices: Sequence[jax.Device] = (),
    more: int = 0,
) -> Plan:
    """Choose how many networks run at once on each device, and what the forward pass keeps.

    ``more`` is the number of bytes that a network takes beside its passes, as for its spectrum.

    Raises
    ------
    InputError
        If not even one network fits; the message says how much it needs.
    """
    if budget is not None:
        check_number("memory_budget", budget, positive=True)
    devices = devices or jax.devices()
    here = [device for device in devices if device.process_index == jax.process_index()]
    on_cpu = devices[0].platform == "cpu"
    # The devices that a CPU is divided into share its memory and its cores.
    sharing = len(here) if on_cpu else 1
    free = available(here[0]) // sharing if budget is None else budget
    if len(here) < len(devices):
        # All processes must run one program: one that fits where memory is least; in MiB, as int32.
        free = int(np.min(multihost_utils.process_allgather(np.int32(free >> 20)))) << 20
    bytes_for = functools.partial(bytes_per_network, network, sites, sampler, itemsize=itemsize)
    # A program gets its share of the free memory; the rest is for the process around it.
    checkpoint = bytes_for() > free // 2 and bytes_for(checkpoint=True) < bytes_for()
    small, large = bytes_for(checkpoint=checkpoint) + more, bytes_for(keep=True) + more
    if small > free:
        less = "a smaller width or depth, or fewer inputs"
        if sampler == "dense" and network.rotation_invariant and not more:
            less += ", or sampler 'matrix_free'"
        raise InputError(
            f"one network of widths {_short(network.widths)} with {sites} inputs needs "
            f"{small / 2**30:.3g} GiB with sampler {sampler!r} and {free / 2**30:.3g} GiB are "
            f"free; use {less}"
        )
    # One program uses its cores poorly on small arrays, so that several run side by side; an
    # accelerator runs one and has the next one queued. Several processes must agree on an order.
    workers = max(1, min(os.cpu_count() or 1, 8) // sharing) if on_cpu else 2
    if len(here) < len(devices):
        workers = 1
    if sampler == "dense" and on_cpu:
        block = 1
    elif on_cpu:
        block = max(1, min(_MOST_IN_A_BLOCK, _CACHED_FLOATS // (sites * max(network.widths))))
    else:
        block = -(-networks // len(devices))
    workers = max(1, min(workers, free // (2 * small), -(-networks // (block * len(devices)))))
    block = max(1, min(block, networks, free // (2 * small * workers)))
    # Weights are drawn again faster than fetched from memory; directions and products are not.
    keep = (
        not checkpoint and sampler != "dense" and large * block * workers < min(_KEEP_BYTES, free)
    )
    needed = (large if keep else small) * block * workers
    return Plan(int(block), int(workers), keep, checkpoint, needed, free)


def _short(widths: tuple[int, ...]) -> str:
    shown = "-".join(map(str, widths[:4]))
    return shown if len(widths) <= 4 else f"{shown}-… ({len(widths) - 1} layers)"
