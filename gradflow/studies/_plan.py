"""The plan of a study: its programs, the chunks in which its networks are drawn, and the cost.

Points whose networks differ in numbers alone are drawn by one compiled program. In each round a
program has a task: its networks in a line, those of the first point before those of the second. A
chunk is a stretch of that line, drawn by one call of the program: large enough to be worth a file
and small enough to be lost. Whatever decides the last bit of a chunk's results is in the plan and
is kept with it (above all how many networks one vmap has), so that a study that was interrupted
and resumed has the same arithmetic as one that never was.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import _end_to_end, _memory, _samplers
from gradflow.studies._point import varies_as_number
from gradflow.studies._study import Study

__all__ = ["WHOLE", "Plan", "Program", "Share", "Task", "first_round", "make"]
__all__ += ["programs", "result_parts", "row_bytes"]

# Programs that a study has at most, each of which takes seconds to compile.
_MOST_PROGRAMS = 10_000
# Seconds that a chunk takes, about.
_CHUNK_SECONDS = 2.0
# How many cores an accelerator is worth: by its memory's speed, as none has been measured.
_CORES = 300
# The most values that a chunk returns to each process.
_CHUNK_VALUES = 1 << 23
# Bytes of the scales and inputs of the points that one call is given, unless a single point has
# more, and how many points those are at most.
_POINTS_BYTES, _MOST_POINTS_A_CALL = 1 << 26, 1 << 12
# Bytes of results that are assembled at a time, about.
_PART_BYTES = 1 << 25
# Seconds to trace and compile a program and its theory, where others are at the same time; to trace
# and compile an activation's fixed points; and of the host, for a point.
_COMPILE_SECONDS, _FIXED_POINT_SECONDS, _POINT_SECONDS = 3.0, 3.0, 2e-3
# Seconds on one core, measured: of a statistic, for a unit; of theory, for a layer of one input and
# for each pair of inputs more, without a closed form; and the same of its first order in 1/width.
_STATISTIC_SECONDS = 0.6e-9
_THEORY_SECONDS, _THEORY_SECONDS_A_PAIR = 3.5e-5, 1e-3
_SHIFT_SECONDS, _SHIFT_SECONDS_A_PAIR = 5.5e-5, 1e-2
# Of the theory of a spectrum, for a point.
_SPECTRUM_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Program:
    """The points whose networks one compiled program draws.

    Attributes
    ----------
    network
        That of the first of them.
    sites
        How many inputs each has.
    numbers, names
        The points in the study's order, and their names, uint64; each name is there once.
    networks
        How many networks each point is to have; with a target, in a round. If a name is twice in a
        study, the larger count.
    sampler, reason
        How the networks are drawn, and why so.
    spectrum
        Whether their Jacobians' singular values are measured.
    statistics
        How many statistics are measured.
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
        """Units of all inputs in each layer of a network, shape (layers,)."""
        return np.array(self.network.sites(self.sites)) * np.array(self.network.widths[1:])

    @functools.cached_property
    def seconds(self) -> float:
        """Estimated time of one network on one core."""
        walk = _samplers.seconds(self.sampler, self.network, self.sites)
        walk += _STATISTIC_SECONDS * self.statistics * float(self.units.sum())
        return walk + (_end_to_end.seconds(self.network) if self.spectrum else 0.0)


class Share(NamedTuple):
    """One host's part of a study: of every point, each ``parts``-th network from ``part`` on.

    A share numbers its own networks 0, 1, …, so that it grows with the study.
    """

    part: int
    parts: int

    def size(self, networks: int) -> int:
        """Count the share's networks among a point's first ``networks``."""
        return len(range(self.part, networks, self.parts))

    def numbers(self, own: np.ndarray) -> np.ndarray:
        """Return the numbers, among all of a point, of the share's own networks; int32."""
        return (own * self.parts + self.part).astype(np.int32)

    def __str__(self) -> str:
        return f"{self.part + 1}/{self.parts}"


WHOLE = Share(0, 1)


@dataclasses.dataclass(frozen=True)
class Task:
    """The networks that a round draws with one program: a line of them, cut into chunks.

    Attributes
    ----------
    names, first, count, theory
        By point: its name, its first network's number, how many networks, and whether its theory is
        worked out in this round and share; arrays of one shape.
    chunk_size
        Networks in a chunk; the last one may have fewer.
    points_a_call
        The most points that one chunk has networks of.
    block, keep, checkpoint
        As in `simulation._memory.Plan`.
    seconds
        Estimated time of all of it on one core, which decides how it is compiled.
    sampler
        How networks are drawn.
    share
        The part of the study that it belongs to; ``first`` and ``count`` are of that part's own
        networks.
    """

    names: np.ndarray
    first: np.ndarray
    count: np.ndarray
    theory: np.ndarray
    chunk_size: int
    points_a_call: int
    block: int
    keep: bool
    checkpoint: bool
    seconds: float
    sampler: str
    share: Share = WHOLE

    @property
    def networks(self) -> int:
        """Networks in all."""
        return int(self.count.sum())

    @property
    def chunks(self) -> int:
        """Chunks in all."""
        return -(-self.networks // self.chunk_size)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Where in the line chunks ``first`` to ``last`` begin and end."""
        return first * self.chunk_size, min((last + 1) * self.chunk_size, self.networks)

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows of a stretch's points, and by point its first network and how many."""
        ends = np.cumsum(self.count)
        begins = ends - self.count
        rows = np.arange(
            np.searchsorted(ends, start, side="right"), np.searchsorted(begins, stop, side="left")
        )
        low, high = np.maximum(begins[rows], start), np.minimum(ends[rows], stop)
        return rows, self.first[rows] + low - begins[rows], high - low

    def points_in(self, first: int, last: int) -> np.ndarray:
        """Names of the points that chunks ``first`` to ``last`` have networks of."""
        return self.names[self.stretch(*self.span(first, last))[0]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tasks of a round, and the time and memory that the study takes.

    Attributes
    ----------
    programs
        All of the study.
    tasks
        Of this round, one for each program that has something to draw.
    chunk_bytes, available
        The most memory that simulating takes at a time, and the memory that is free or allowed.
    seconds
        Estimated time in all, with all the cores or devices there are.
    output_bytes
        The size of the results.
    """

    programs: tuple[Program, ...]
    tasks: tuple[Task, ...]
    chunk_bytes: int
    available: int
    seconds: float
    output_bytes: int

    @property
    def networks(self) -> int:
        """Networks in all; with a target, of the first round."""
        return sum(task.networks for task in self.tasks)


def programs(study: Study) -> tuple[Program, ...]:
    """Return the programs that draw a study's networks, in the order of their first points.

    Raises
    ------
    InputError
        If the fields of a point do not go together, or there are too many programs.
    """
    of_structure: dict[tuple, list[tuple[int, int]]] = {}
    networks: dict[int, int] = {}
    for number, point in enumerate(study.points()):
        is_new = point.name not in networks
        networks[point.name] = max(point.networks, networks.get(point.name, 0))
        if is_new:
            of_structure.setdefault(point.structure, []).append((number, point.name))
        if len(of_structure) > _MOST_PROGRAMS:
            raise InputError(
                f"axes have networks of more than {_MOST_PROGRAMS} structures, each of which takes "
                "a program; use fewer widths, depths, activations or weights"
            )
    # Settings of different structures may still mean networks of one program.
    members: dict[tuple, list[tuple[int, int]]] = {}
    first: dict[tuple, Network] = {}
    for points in of_structure.values():
        point = study.point(points[0][0])
        network = point.network().unnamed()
        key = (jax.tree.structure(network), point.sites, network.input_width)
        first.setdefault(key, network)
        members.setdefault(key, []).extend(points)
    listed, measured = [], study.spectrum is not None
    for key, unordered in members.items():
        network, sites, points = first[key], key[1], sorted(unordered)
        sampler, reason = "dense", "singular values take all weights"
        if not measured:
            sampler, reason = _samplers.choose(study.sampling.sampler, network, sites)
        numbers = np.array([number for number, _ in points], np.int64)
        names = np.array([name for _, name in points], np.uint64)
        count = np.array([networks[name] for _, name in points], np.int64)
        statistics = len(study.statistics)
        listed.append(
            Program(network, sites, numbers, names, count, sampler, reason, measured, statistics)
        )
    return tuple(listed)


def first_round(study: Study, devices: Sequence[jax.Device] = (), share: Share = WHOLE) -> Plan:
    """Return the plan of a study's first round, or of a share of it, as `make` does.

    Raises
    ------
    InputError
        As `programs` and `make` do, and if the results do not fit into memory.
    """
    plan = make(study, programs(study), devices=devices, share=share)
    _check_results_fit(study, plan)
    return plan


def make(
    study: Study,
    programs: Sequence[Program],
    done: dict[int, int] | None = None,
    wanted: dict[int, int] | None = None,
    devices: Sequence[jax.Device] = (),
    share: Share = WHOLE,
) -> Plan:
    """Return the plan of a round.

    Parameters
    ----------
    study, programs
        The study and its `programs`.
    done
        The share's networks that points have already, by name; none without it.
    wanted
        Networks that points are to have, by name; without it as the study says, or a round.
    devices
        Those that draw the networks; all of JAX's devices without it.
    share
        The part of the networks that is drawn here.

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
    tasks, used, free, seconds = [], 0, 0, _POINT_SECONDS * len(study)
    if study.depth_scales:
        activations = {program.network.activation for program in programs}
        seconds += _FIXED_POINT_SECONDS * len(activations)
    cores = len(devices)
    for program in programs:
        names = program.names.tolist()
        first = np.array([done.get(name, 0) for name in names], np.int64)
        goal = program.networks.tolist()
        if wanted is not None:
            goal = [wanted.get(name, 0) for name in names]
        count = np.maximum(np.array([share.size(n) for n in goal], np.int64) - first, 0)
        drawn = count > 0
        if not drawn.any():
            continue
        # Where a point has fewer networks than there are shares, some shares draw none of it: its
        # theory falls to a share that does.
        ours = program.numbers % np.minimum(share.parts, np.maximum(goal, 1)) == share.part
        theory = (first == 0) & ours
        points = (program.names[drawn], first[drawn], count[drawn], theory[drawn])
        task, memory = _task(study, program, points, devices)
        tasks.append(dataclasses.replace(task, share=share))
        cores = max(memory.workers, len(devices))
        used, free = max(used, memory.bytes_needed), memory.bytes_available
        seconds += _COMPILE_SECONDS + task.seconds / cores
        seconds += np.count_nonzero(task.theory) * _theory_seconds(study, program) / cores
    output = sum(len(p.names) * row_bytes(study, p.network.depth) for p in programs)
    return Plan(tuple(programs), tuple(tasks), used, free, seconds, output)


def result_parts(study: Study, depth: int) -> tuple[str, list[Study]]:
    """Return the axis that a large study's results are cut along, and the parts.

    The results of the parts are assembled one by one. The axis is the longest one of a number that
    does not decide which program draws a point. If there is none, or the results are small, its
    name is empty and the only part is the study itself.
    """
    numbers = [
        (len(axis), -index)
        for index, axis in enumerate(study.axes)
        for field, values in list(axis.values.items())[: len(axis.values) == 1]
        # Integers that fit into a file are kept as they are, in all parts alike.
        if (field == "seed" or varies_as_number(field)) and max(values) < 1 << 31
    ]
    size = len(study) * row_bytes(study, depth)
    if size <= _PART_BYTES or not numbers:
        return "", [study]
    length, index = max(numbers)
    index = -index
    step = max(1, _PART_BYTES * length // size)
    parts = [study.part(index, n, min(n + step, length)) for n in range(0, length, step)]
    return study.axes[index].name, parts


def row_bytes(study: Study, depth: int) -> int:
    """Bytes that the results have of one point: five numbers, theory, z; histograms."""
    bins = sum(histogram.bins + 2 for histogram in study.histograms.values())
    spectrum = 0 if study.spectrum is None else 4 * (study.spectrum.bins + 7)
    return 8 * (depth * (11 * len(study.statistics) + 2 + bins) + spectrum)


def _theory_seconds(study: Study, program: Program) -> float:
    pairs = program.sites * (program.sites - 1) / 2
    each = _THEORY_SECONDS * program.sites + _THEORY_SECONDS_A_PAIR * pairs
    if study.finite_width:
        each += _SHIFT_SECONDS * program.sites + _SHIFT_SECONDS_A_PAIR * pairs
    return each * program.network.depth + _SPECTRUM_SECONDS * program.spectrum


def _task(
    study: Study,
    program: Program,
    points: tuple[np.ndarray, ...],
    devices: Sequence[jax.Device],
) -> tuple[Task, _memory.Plan]:
    names, first, count, theory = points
    total, itemsize = int(count.sum()), np.dtype(study.sampling.dtype).itemsize
    budget = study.sampling.memory_gib
    memory = _memory.plan(
        program.network,
        program.sites,
        program.sampler,
        total,
        budget=None if budget is None else int(budget * 2**30),
        itemsize=itemsize,
        devices=devices,
        more=_end_to_end.bytes_needed(program.network, itemsize) if program.spectrum else 0,
    )
    values = program.network.depth * (len(study.statistics) + 2)
    values += program.network.input_width * program.spectrum
    point_bytes = itemsize * program.sites * program.network.input_width
    # A point may have a single network in a chunk, which then has as many points as networks.
    per_point = max(1, int(count.min()))
    accelerated = devices[0].platform != "cpu"
    speed = len(devices) * (_CORES if accelerated else 1)
    most = min(
        _CHUNK_SECONDS * speed / program.seconds,
        _CHUNK_VALUES * len({device.process_index for device in devices}) / values,
        per_point * max(1, min(_POINTS_BYTES // point_bytes, _MOST_POINTS_A_CALL) - 1),
    )
    # Accelerators have memory for more networks at once than a chunk is to have.
    block = max(1, min(memory.block, int(most) // len(devices))) if accelerated else memory.block
    together = block * len(devices)
    blocks = -(-total // together)
    calls = max(math.ceil(blocks / max(1, most // together)), min(blocks, memory.workers))
    chunk = together * math.ceil(blocks / calls)
    task = Task(
        names=names,
        first=first,
        count=count,
        theory=theory,
        chunk_size=chunk,
        points_a_call=min(len(names), chunk // per_point + 2),
        block=block,
        keep=memory.keep,
        checkpoint=memory.checkpoint,
        seconds=total * program.seconds,
        sampler=program.sampler,
    )
    return task, memory


def _check_results_fit(study: Study, plan: Plan) -> None:
    """Raise `InputError` if a part of the results does not fit into memory when it is assembled."""
    free = _memory.available() if study.sampling.memory_gib is None else plan.available
    depth = max(program.network.depth for program in plan.programs)
    points = max(map(len, result_parts(study, depth)[1]))
    needed = plan.output_bytes * points // len(study)
    if 2 * needed > free:
        raise InputError(
            f"the results of {points} points take {needed / 2**30:.3g} GiB, and "
            f"twice that does not fit into the {free / 2**30:.3g} GiB that are free; use fewer "
            "points, layers, statistics or bins"
        )
