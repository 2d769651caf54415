"""The plan of a study: which programs it takes, in which chunks its networks are drawn, how long.

Points whose networks differ in numbers alone are one group, and have one compiled program. A group
draws its networks in a line, those of its first point before those of the second; a chunk is a
stretch of this line, what one call of the program draws. A chunk is large enough to be worth a file
and small enough to be lost. What a round of chunks depends on, the block of networks in a vmap
above all, is in the plan, so that a study that goes on has the same arithmetic as one that was
never interrupted.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import _memory, samplers, singular_values
from gradflow.studies.description import Study
from gradflow.studies.entries import SCALES

__all__ = ["ALL", "Group", "Plan", "Segment", "Share", "Work", "check_memory", "groups", "make"]
__all__ += ["row_bytes", "slabs"]

# Programs that a study has at most, each of which takes seconds to compile.
_MOST_PROGRAMS = 10_000
# Seconds that a chunk takes, or so.
_CHUNK_SECONDS = 2.0
# How many cores an accelerator is worth: by its memory's speed, as none has been measured.
_CORES = 300
# How many values a chunk hands back to each process, at most.
_CHUNK_VALUES = 1 << 23
# Points that one call knows, and bytes of their scales and inputs, unless one point has more.
_WINDOW_BYTES, _WINDOW_POINTS = 1 << 26, 1 << 12
# Bytes of results that are put together at a time, or so.
_SLAB_BYTES = 1 << 25
# Seconds to trace and compile a program and its theory, where others are at the same time; to trace
# and compile an activation's fixed points; and of the host, for a point.
_COMPILE_SECONDS, _FIXED_POINT_SECONDS, _POINT_SECONDS = 3.0, 3.0, 4e-3
# Seconds on one core, measured: of a statistic, for a unit; of theory, for a layer of one input and
# for each pair of inputs more, without a closed form.
_STATISTIC_SECONDS = 0.6e-9
_THEORY_SECONDS, _THEORY_SECONDS_A_PAIR = 1e-4, 1e-3
_SHIFT_SECONDS, _SHIFT_SECONDS_A_PAIR = 1e-4, 1e-2
# Of the theory of a spectrum, for a point.
_SPECTRUM_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Group:
    """Points of one structure.

    Attributes
    ----------
    network
        That of the first of them.
    sites
        How many inputs each has.
    numbers, names
        The points in the study's order, and their names, uint64; each name is there once.
    networks
        How many each shall have; with a target, a round. The most where a name is twice in a study.
    sampler, reason
        How their networks are drawn.
    spectrum
        Whether their Jacobians' singular values are measured.
    statistics
        How many are.
    """

    network: Network
    sites: int
    numbers: np.ndarray
    names: np.ndarray
    networks: np.ndarray
    sampler: str
    reason: str
    spectrum: bool = False
    statistics: int = 0

    @functools.cached_property
    def units(self) -> np.ndarray:
        """How many units of all inputs a network has, shape (layers,)."""
        return np.array(self.network.sites(self.sites)) * np.array(self.network.widths[1:])

    @functools.cached_property
    def seconds(self) -> float:
        """How long one network takes on one core, or so."""
        walk = samplers.seconds(self.sampler, self.network, self.sites)
        walk += _STATISTIC_SECONDS * self.statistics * float(self.units.sum())
        return walk + (singular_values.seconds(self.network) if self.spectrum else 0.0)


class Share(NamedTuple):
    """One host's part of a study: of every point, each ``parts``-th network from ``place`` on.

    A share numbers its own networks 0, 1, …, so that it grows with the study.
    """

    place: int
    parts: int

    def of(self, networks: int) -> int:
        """Return how many of the first so many networks are in it."""
        return len(range(self.place, networks, self.parts))

    def numbers(self, first: int, count: int) -> np.ndarray:
        """Return which networks of a point are the share's own from ``first`` on, int32."""
        return np.arange(first, first + count, dtype=np.int32) * self.parts + self.place

    def __str__(self) -> str:
        return f"{self.place + 1}/{self.parts}"


ALL = Share(0, 1)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Networks ``first`` to ``first + count`` of a point, given by its place in a `Work`."""

    place: int
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a round draws of one group.

    Attributes
    ----------
    names, first, count, theory
        By point: its name, its first network's number, how many, and whether it falls to this round
        and share to say what theory says of it; arrays of one shape.
    chunk, window
        Networks a chunk, and the most points that one has.
    block, keep, checkpoint
        As in `memory.Plan`.
    seconds
        How long all of it will take on one core, which decides how it is compiled.
    sampler
        How networks are drawn.
    share
        Whose part of the study it is; ``first`` and ``count`` are of its own networks.
    """

    names: np.ndarray
    first: np.ndarray
    count: np.ndarray
    theory: np.ndarray
    chunk: int
    window: int
    block: int
    keep: bool
    checkpoint: bool
    seconds: float
    sampler: str
    share: Share = ALL

    @property
    def networks(self) -> int:
        """In all."""
        return int(self.count.sum())

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.networks // self.chunk)

    def held(self, first: int, last: int) -> np.ndarray:
        """Return the names of the points that chunks ``first`` to ``last`` have networks of."""
        ends = np.cumsum(self.count)
        until = min((last + 1) * self.chunk, self.networks)
        start = np.searchsorted(ends, first * self.chunk, side="right")
        return self.names[start : np.searchsorted(ends, until) + 1]

    def segments(self, chunk: int) -> Iterator[Segment]:
        """Yield what a chunk draws, in order."""
        ends = np.cumsum(self.count)
        start = chunk * self.chunk
        stop = min(start + self.chunk, self.networks)
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            begin = int(ends[place] - self.count[place])
            until = min(int(ends[place]), stop)
            yield Segment(place, int(self.first[place]) + start - begin, until - start)
            start, place = until, place + 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done, before any of it is.

    Attributes
    ----------
    groups, works
        One of each for each structure.
    chunk_bytes, available
        The most memory that simulating takes at a time, and what is free or allowed.
    seconds
        How long it will take in all, or so, with all the cores or devices there are.
    output_bytes
        The size of the results.
    """

    groups: tuple[Group, ...]
    works: tuple[Work, ...]
    chunk_bytes: int
    available: int
    seconds: float
    output_bytes: int

    @property
    def networks(self) -> int:
        """In all; with a target, of the first round."""
        return sum(work.networks for work in self.works)


def groups(study: Study) -> tuple[Group, ...]:
    """Return the structures of a study's points.

    Raises
    ------
    InputError
        If the fields of a point do not go together, or there are too many structures.
    """
    of_structure: dict[tuple, list[tuple[int, int]]] = {}
    shall: dict[int, int] = {}
    for number, point in enumerate(study.points()):
        known_already = point.name in shall
        shall[point.name] = max(point.networks, shall.get(point.name, 0))
        if not known_already:
            of_structure.setdefault(point.structure, []).append((number, point.name))
        if len(of_structure) > _MOST_PROGRAMS:
            raise InputError(
                f"axes have networks of more than {_MOST_PROGRAMS} structures, each of which takes "
                "a program; use fewer widths, depths, activations or weights"
            )
    members: dict[tuple, list[tuple[int, int]]] = {}
    first: dict[tuple, Network] = {}
    for those in of_structure.values():
        point = study.point(those[0][0])
        network = dataclasses.replace(point.network(), name="")
        key = (jax.tree.structure(network), point.settings["batch"], network.input_width)
        first.setdefault(key, network)
        members.setdefault(key, []).extend(those)
    found, measured = [], study.spectrum is not None
    for key, unordered in members.items():
        network, sites, those = first[key], key[1], sorted(unordered)
        sampler, reason = "dense", "singular values take all weights"
        if not measured:
            sampler, reason = samplers.choose(study.sampling.sampler, network, sites)
        numbers = np.array([number for number, _ in those], np.int64)
        names = np.array([name for _, name in those], np.uint64)
        goal = np.array([shall[name] for _, name in those], np.int64)
        count = len(study.statistics)
        found.append(Group(network, sites, numbers, names, goal, sampler, reason, measured, count))
    return tuple(found)


def make(
    study: Study,
    found: Sequence[Group],
    done: dict[int, int] | None = None,
    wanted: dict[int, int] | None = None,
    devices: Sequence[jax.Device] = (),
    share: Share = ALL,
) -> Plan:
    """Return the plan of a round.

    Parameters
    ----------
    study, found
        The study and its `groups`.
    done
        The share's networks that points have already, by name; none without it.
    wanted
        Networks that points shall have, by name; without it what the study says, or a first round.
    devices
        Who draws them; all of JAX's devices without it.
    share
        Which part of them.

    Raises
    ------
    InputError
        If not even one network fits into memory, or a study with targets is to be shared.
    """
    if share.parts > 1 and study.sampling.target:
        raise InputError(
            f"share is {share}, and the study has a sampling.target, which asks all networks "
            "together; give sampling.networks, or leave share out"
        )
    devices = tuple(devices or jax.devices())
    done = done or {}
    works, used, free, seconds = [], 0, 0, _POINT_SECONDS * len(study)
    if study.depth_scales:
        activations = {group.network.activation for group in found}
        seconds += _FIXED_POINT_SECONDS * len(activations)
    cores = len(devices)
    for group in found:
        names = group.names.tolist()
        first = np.array([done.get(name, 0) for name in names], np.int64)
        goal = [wanted.get(n, 0) for n in names] if wanted is not None else group.networks.tolist()
        count = np.maximum(np.array([share.of(n) for n in goal], np.int64) - first, 0)
        rest = count > 0
        if not rest.any():
            continue
        # Of few networks there are not as many as shares.
        mine = group.numbers % np.minimum(share.parts, np.maximum(goal, 1)) == share.place
        theory = (first == 0) & mine
        points = (group.names[rest], first[rest], count[rest], theory[rest])
        work, plan = _work(study, group, points, devices)
        works.append(dataclasses.replace(work, share=share))
        cores = max(plan.workers, len(devices))
        used, free = max(used, plan.bytes_needed), plan.bytes_available
        seconds += _COMPILE_SECONDS + work.seconds / cores
        seconds += np.count_nonzero(work.theory) * _theory_seconds(study, group) / cores
    output = sum(len(group.names) * row_bytes(study, group.network.depth) for group in found)
    return Plan(tuple(found), tuple(works), used, free, seconds, output)


def slabs(study: Study, depth: int) -> tuple[str, list[Study]]:
    """Return the parts of a study whose results are put together one by one, and their axis.

    They are along the longest axis of one number that makes no point of another kind, if there is
    one; with an empty name, the study as it is.
    """
    numbers = [
        (len(axis), -place)
        for place, axis in enumerate(study.axes)
        for field, values in list(axis.values.items())[: len(axis.values) == 1]
        # Integers that fit into a file are kept as they are, in all parts alike.
        if field in (*SCALES, "seed") and max(values) < 1 << 31
    ]
    size = len(study) * row_bytes(study, depth)
    if size <= _SLAB_BYTES or not numbers:
        return "", [study]
    length, place = max(numbers)
    place = -place
    step = max(1, _SLAB_BYTES * length // size)
    parts = [study.part(place, n, min(n + step, length)) for n in range(0, length, step)]
    return study.axes[place].name, parts


def row_bytes(study: Study, depth: int) -> int:
    """Return the size of what is kept of one point: five numbers, theory, z; histograms."""
    bins = sum(histogram.bins + 2 for histogram in study.histograms.values())
    spectrum = 0 if study.spectrum is None else 4 * (study.spectrum.bins + 7)
    return 8 * (depth * (11 * len(study.statistics) + 2 + bins) + spectrum)


def _theory_seconds(study: Study, group: Group) -> float:
    pairs = group.sites * (group.sites - 1) / 2
    each = _THEORY_SECONDS * group.sites + _THEORY_SECONDS_A_PAIR * pairs
    if study.finite_width:
        each += _SHIFT_SECONDS * group.sites + _SHIFT_SECONDS_A_PAIR * pairs
    return each * group.network.depth + _SPECTRUM_SECONDS * group.spectrum


def _work(
    study: Study,
    group: Group,
    points: tuple[np.ndarray, ...],
    devices: Sequence[jax.Device],
) -> tuple[Work, _memory.Plan]:
    names, first, count, theory = points
    total, itemsize = int(count.sum()), np.dtype(study.sampling.dtype).itemsize
    budget = study.sampling.memory_gib
    plan = _memory.plan(
        group.network,
        group.sites,
        group.sampler,
        total,
        budget=None if budget is None else int(budget * 2**30),
        itemsize=itemsize,
        devices=devices,
        more=singular_values.bytes_needed(group.network, itemsize) if group.spectrum else 0,
    )
    values = group.network.depth * (len(study.statistics) + 2)
    values += group.network.input_width * group.spectrum
    # Of one point there may be as few as one network in a chunk, and so as many points as networks.
    each_point = itemsize * group.sites * group.network.input_width
    per_point = max(1, int(count.min()))
    accelerated = devices[0].platform != "cpu"
    speed = len(devices) * (_CORES if accelerated else 1)
    most = min(
        _CHUNK_SECONDS * speed / group.seconds,
        _CHUNK_VALUES * len({device.process_index for device in devices}) / values,
        per_point * max(1, min(_WINDOW_BYTES // each_point, _WINDOW_POINTS) - 1),
    )
    # Accelerators have memory for more networks at once than a chunk shall have.
    block = max(1, min(plan.block, int(most) // len(devices))) if accelerated else plan.block
    together = block * len(devices)
    blocks = -(-total // together)
    calls = max(math.ceil(blocks / max(1, most // together)), min(blocks, plan.workers))
    chunk = together * math.ceil(blocks / calls)
    work = Work(
        names=names,
        first=first,
        count=count,
        theory=theory,
        chunk=chunk,
        window=min(len(names), chunk // per_point + 2),
        block=block,
        keep=plan.keep,
        checkpoint=plan.checkpoint,
        seconds=total * group.seconds,
        sampler=group.sampler,
    )
    return work, plan


def check_memory(study: Study, plan: Plan) -> None:
    """Raise `InputError` if results do not fit into memory, where a part is put together."""
    free = _memory.available() if study.sampling.memory_gib is None else plan.available
    depth = max(group.network.depth for group in plan.groups)
    parts = slabs(study, depth)[1]
    needed = plan.output_bytes * max(map(len, parts)) // len(study)
    if 2 * needed > free:
        raise InputError(
            f"the results of {max(map(len, parts))} points take {needed / 2**30:.3g} GiB, and "
            f"twice that does not fit into the {free / 2**30:.3g} GiB that are free; use fewer "
            "points, layers, statistics or bins"
        )
