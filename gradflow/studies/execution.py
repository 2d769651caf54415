"""A study is run: theory of its points, then round after round of networks, until it is finished.

Every process of `jax.distributed` calls `run`. The first one has the store, and tells the others
what to draw; all of them draw each chunk together, and each averages what its own devices drew and
works out the theory of some points.
Hosts that do not know of each other run a share each, in folders of their own.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gradflow._differences import differences
from gradflow.errors import InputError
from gradflow.estimation import Estimate
from gradflow.simulation import monte_carlo
from gradflow.simulation.monte_carlo import Laws
from gradflow.statistics import Statistic
from gradflow.studies import plan, results, spectra
from gradflow.studies.description import Study
from gradflow.studies.found import Found, combined
from gradflow.studies.plan import ALL, Group, Segment, Share, Work
from gradflow.studies.point import keys
from gradflow.studies.sealed import sentences
from gradflow.studies.store import THEORY_BLOCK, Store, theory_places, works_of

__all__ = ["Outcome", "Progress", "Step", "run"]

# Of fewer networks no point has met its target: their spread is too often too small by chance. With
# so many, 95 % intervals cover 94 to 95 % though what was found decided when to stop; with rounds
# of 5 and no such rule 92 %, of 2 as few as 90 % (normal values, 20 000 times).
_FEWEST = 30
# Chunks at a time: one is drawn while another's values are averaged. And programs that are compiled
# at a time, which uses a core each, while the group before draws.
_WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Step:
    """How far a study is.

    Attributes
    ----------
    what
        ``"theory"`` of points, or ``"networks"``.
    done, total
        How many of them, in this round.
    largest_z, of
        The largest |z| in the last chunk of networks, and the statistic that has it; 0 and empty
        where it is not known.
    """

    what: str
    done: int
    total: int
    largest_z: float = 0.0
    of: str = ""


Progress = Callable[[Step], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes
    ----------
    finished
        Whether nothing is left to do.
    networks
        How many are in the store, in all.
    rounds
        How many rounds they were drawn in.
    results
        The labelled file, if the study is finished and this is the first process.
    """

    finished: bool
    networks: int
    rounds: int
    results: Path | None


# Of a group in a round: whether theory is, and from which chunk to which networks are to be drawn.
_Left = tuple[bool, list[tuple[int, int]]]


class _Stopped(Exception):
    """Somebody asked to stop, and a chunk is finished."""


def run(
    study: Study,
    folder: Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    share: Share = ALL,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Run a study, or what is left of it, into a folder.

    Parameters
    ----------
    study
        What is to be done.
    folder
        Its store; new, or that of the same study.
    devices
        Who draws the networks; all of JAX's devices without it.
    share
        Which part of them, and of the points' theory; `merging.merge` puts the parts together.
    progress
        Called after each chunk, and for each block of theory.
    stop
        Applied after each chunk whether to stop there.

    Raises
    ------
    InputError
        If the points' fields do not go together, memory does not suffice, a study with targets is
        to be shared, or the store cannot be had or written to.
    """
    # Those of a process side by side, so that it draws a stretch of each chunk.
    devices = tuple(sorted(devices or jax.devices(), key=lambda device: device.process_index))
    report = progress or (lambda _: None)
    asked = stop or (lambda: False)
    leads = jax.process_index() == 0
    found = plan.groups(study)
    first = plan.make(study, found, devices=devices, share=share)
    plan.check_memory(study, first)
    results.check(study)
    with sentences(folder), ExitStack() as stack:
        store: Store | None = None

        def open_store() -> bytes:
            nonlocal store
            store = stack.enter_context(Store.opened(folder, study, share))
            return b""

        _from_first(open_store)
        finished = False
        while not finished:
            works, number, left = _next_round(study, found, store, devices, share)
            if not works:
                finished = True
            else:
                try:
                    _round(study, found, store, (number, works, left), devices, report, asked)
                except _Stopped:
                    break
        if store is None or not leads:
            return Outcome(finished, 0, 0, None)
        written = results.write(study, found, store) if finished else None
        drawn = sum(store.networks().values())
        return Outcome(finished, drawn, store.rounds, written)


# What the first process knows, and all must.


def _from_first(function: Callable[[], bytes]) -> bytes:
    """Return what the function returns in the first process, or raise its `InputError`, in all."""
    if jax.process_count() == 1:
        return function()
    answer = b""
    if jax.process_index() == 0:
        try:
            answer = b"+" + function()
        except InputError as error:
            answer = b"-" + str(error).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
    padded = np.frombuffer(answer.ljust(length, b"\0"), np.uint8)[:length]
    answer = np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes()
    if answer[:1] == b"-":
        raise InputError(answer[1:].decode())
    return answer[1:]


def _next_round(
    study: Study,
    found: Sequence[Group],
    store: Store | None,
    devices: Sequence[jax.Device],
    share: Share,
) -> tuple[tuple[Work, ...], int, list[_Left]]:
    """Return a round's works, its number, and what is left of each group."""

    def unfinished() -> int | None:
        """Return the first round of which something is not there, for whatever reason."""
        assert store is not None
        rounds = range(store.rounds)
        return next((n for n in rounds if any(any(left) for left in store.left(n))), None)

    def ask() -> bytes:
        """Return what points have and shall have, or nothing where a round is not finished."""
        assert store is not None
        if unfinished() is not None:
            return b""
        names = np.concatenate([group.names for group in found]).tolist()
        done = store.networks()
        wanted = _wanted(study, found, done, store)
        table = [[done.get(name, 0), wanted[name]] for name in names]
        return np.array(table, np.int64).tobytes()

    asked = _from_first(ask)
    if asked:
        names = np.concatenate([group.names for group in found]).tolist()
        done, wanted = np.frombuffer(asked, np.int64).reshape(-1, 2).T.tolist()
        # By all processes: they agree on what memory there is.
        have, shall = (dict(zip(names, counts, strict=True)) for counts in (done, wanted))
        works = plan.make(study, found, have, shall, devices, share).works
        if not works:
            return (), -1, []
        _from_first(lambda: _begin(store, works))

    def read() -> bytes:
        assert store is not None
        number = unfinished()
        assert number is not None, "a round that was just begun has all of it left"
        header = json.dumps([number, store.left(number)])
        return header.encode() + b"\n" + store.round_file(number)

    header, _, content = _from_first(read).partition(b"\n")
    number, left = json.loads(header)
    return works_of(content), number, [(theory, list(map(tuple, those))) for theory, those in left]


def _begin(store: Store | None, works: Sequence[Work]) -> bytes:
    assert store is not None
    store.begin(works)
    return b""


def _wanted(
    study: Study, found: Sequence[Group], done: dict[int, int], store: Store
) -> dict[int, int]:
    """Return how many networks points shall have: with a target, after another round."""
    if not study.sampling.target:
        return {
            name: count
            for group in found
            for name, count in zip(group.names.tolist(), group.networks.tolist(), strict=True)
        }
    each, most = study.sampling.networks, study.sampling.most
    return {
        name: done.get(name, 0) if met else min(done.get(name, 0) + each, most)
        for group in found
        for name, met in _met(study, group, store).items()
    }


def _met(study: Study, group: Group, store: Store) -> dict[int, bool]:
    """Return whether each point of a group has the standard errors that are asked for."""
    total = results.of_group(group, store)
    if total is None:
        return dict.fromkeys(group.names.tolist(), False)
    met = total.estimates.count.max(axis=(1, 2)) >= _FEWEST
    for place, statistic in enumerate(study.statistics):
        if statistic.name in study.sampling.target:
            estimate = results.one(total, place)
            error = estimate.log_standard_error if statistic.log else estimate.standard_error
            # A statistic that no network has at a layer, as χ at the top, is not waited for.
            worst = np.where(estimate.count > 0, error, -np.inf).max(axis=1)
            met &= worst <= study.sampling.target[statistic.name]
    return dict(zip(group.names.tolist(), met.tolist(), strict=True))


# One round.


def _round(
    study: Study,
    found: Sequence[Group],
    store: Store | None,
    what: tuple[int, tuple[Work, ...], list[_Left]],
    devices: Sequence[jax.Device],
    report: Progress,
    stop: Callable[[], bool],
) -> None:
    number, works, left = what
    group_of = {name: group for group in found for name in group.names.tolist()}
    drawings = {
        place: _Drawing(study, group_of[int(work.names[0])], work, devices)
        for place, work in enumerate(works)
    }
    total = sum(work.networks for work in works)
    points = sum(int(np.count_nonzero(work.theory)) for work in works)
    before = told = 0
    for place, (drawing, (theory, chunks)) in enumerate(
        zip(_compiled_ahead(drawings, left), left, strict=True)
    ):
        work = drawing.work
        for done, new in _theory(drawing, store, (number, place)) if theory else ():
            told += done
            if not new:
                continue
            report(Step("theory", told, points))
            _stop_if_asked(stop)
        for chunk, done, values, seconds in drawing.run(chunks):
            step = Step("networks", before + done, total)
            kept = _put_together(drawing.kept(chunk, values))
            if store is not None:
                assert kept is not None
                store.add(number, place, chunk, kept)
                store.log(round=number, group=place, chunk=chunk, seconds=round(seconds, 3))
                largest, of = _largest_z(drawing, store, (number, place), chunk, kept)
                step = dataclasses.replace(step, largest_z=largest, of=of)
            report(step)
            _stop_if_asked(stop)
        before += work.networks


def _stop_if_asked(stop: Callable[[], bool]) -> None:
    """Stop all processes if the first one is asked to."""
    if _from_first(lambda: b"stop" if stop() else b""):
        raise _Stopped


def _put_together(mine: Found | None) -> Found | None:
    """Return what all processes kept of a chunk, in the first of them."""
    if jax.process_count() == 1:
        return mine
    content = b"" if mine is None else mine.packed()
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.frombuffer(content.ljust(int(lengths.max()), b"\0"), np.uint8)
    parts = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    if jax.process_index() > 0:
        return None
    sent = zip(parts, lengths.tolist(), strict=True)
    return combined(Found.unpacked(part[:length].tobytes()) for part, length in sent if length)


def _compiled_ahead(drawings: dict[int, "_Drawing"], left: Sequence[_Left]) -> Iterator["_Drawing"]:
    """Take out what is drawn of each group, compiled; the next is compiled while it is drawn.

    The programs, and so the results, are those that they are without.
    """

    def compile_one(number: int) -> None:
        """Compile the program of a group's networks, or those of its theory."""
        place, is_theory = divmod(number, 2)
        theory, chunks = left[place]
        if jax.process_count() > 1:  # which compile in step
            return
        if is_theory and theory:
            drawings[place].compile_theory()
        elif not is_theory and chunks:
            drawings[place].compile()

    for done, _ in monte_carlo.in_order(compile_one, 2 * len(left), 1, _WORKERS):
        if done % 2 == 0:
            yield drawings.pop(done // 2 - 1)


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """One group of points, and what is drawn of it."""

    study: Study
    group: Group
    work: Work
    devices: Sequence[jax.Device]

    @property
    def measured(self) -> tuple[Statistic, ...]:
        return (*self.study.statistics, monte_carlo.OVERFLOWED, monte_carlo.VANISHED)

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        """The points' places in the group, in the order of the work."""
        order = np.argsort(self.group.names)
        return order[np.searchsorted(self.group.names, self.work.names, sorter=order)]

    @property
    def _numbers(self) -> np.ndarray:
        """The points' numbers in the study."""
        return np.asarray(self.group.numbers[self._rows])

    def points(self, places: Sequence[int] | range) -> list[Any]:
        """Return the points at places of the work."""
        return [self.study.point(int(self._numbers[place])) for place in places]

    @property
    def _x64(self) -> bool:
        return self.study.sampling.dtype == "float64"

    @property
    def _size(self) -> int:
        """How many networks a call draws: a chunk, in whole blocks."""
        together = self.work.block * len(self.devices)
        return -(-self.work.chunk // together) * together

    def compile(self) -> None:
        """Compile what draws the networks, before `run` needs it."""
        self._program  # noqa: B018  (a property that is kept)

    def compile_theory(self) -> None:
        """Compile the theory of the points that are drawn for the first time, if there are any."""
        for point in self.points(np.flatnonzero(self.work.theory)[:1].tolist()):
            results.compile_theory(self.study, point)

    @functools.cached_property
    def _program(self) -> Callable[[Laws, np.ndarray, np.ndarray], dict[str, np.ndarray]]:
        work = self.work
        with jax.enable_x64(self._x64):
            return monte_carlo.compiled(
                self._laws(0),
                self._size,
                tuple(self.devices),
                work.seconds,
                measured=self.measured,
                sampler=work.sampler,
                keep=(work.keep, work.checkpoint),
                block=work.block,
                everywhere=False,
                spectrum=self.study.spectrum is not None,
            )

    @functools.cached_property
    def _own(self) -> np.ndarray:
        """Which networks of a chunk this process draws: a stretch of them."""
        return monte_carlo.own_networks(self._size, self.devices)

    def run(
        self, chunks: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, dict[str, np.ndarray], float]]:
        """Yield each chunk of some ranges: its number, networks done, values, and seconds.

        The values are those of this process's own networks.
        """
        work, size = self.work, self._size
        if not chunks:
            return
        program = self._program

        def call(chunk: int) -> dict[str, np.ndarray]:
            which, numbers = np.zeros((2, size), np.int32)
            segments = list(work.segments(chunk))
            filled = 0
            for segment in segments:
                stretch = slice(filled, filled + segment.count)
                which[stretch] = segment.place - segments[0].place
                numbers[stretch] = work.share.numbers(segment.first, segment.count)
                filled += segment.count
            with jax.enable_x64(self._x64):
                values = program(self._laws(segments[0].place), which, numbers)
            mine = np.searchsorted(self._own, filled)
            return {name: value[:mine] for name, value in values.items()}

        workers = 1 if jax.process_count() > 1 else _WORKERS
        begun = time.perf_counter()
        for first, last in chunks:
            start, end = first * work.chunk, min(last * work.chunk, work.networks)
            drawn = monte_carlo.in_order(
                lambda done, start=start: call((start + done) // work.chunk),
                end - start,
                work.chunk,
                workers,
            )
            for done, values in drawn:
                now = time.perf_counter()
                yield (start + done - 1) // work.chunk, start + done, values, now - begun
                begun = now

    def _laws(self, first: int) -> Laws:
        """Return the laws of as many points as a chunk may have, from a place on."""
        last = len(self.work.names) - 1
        points = self.points([min(first + n, last) for n in range(self.work.window)])
        dtype = np.dtype(self.study.sampling.dtype)
        unnamed = [dataclasses.replace(point.network(), name="") for point in points]
        network = jax.tree.map(lambda *leaves: np.array(leaves, dtype), *unnamed)
        inputs = np.stack([point.inputs().astype(dtype) for point in points])
        words = np.array([point.key_words for point in points], np.uint32)
        return Laws(network, inputs, keys(words))

    def _own_segments(self, chunk: int) -> list[Segment]:
        """Return what this process draws of a chunk."""
        first, last = int(self._own[0]), int(self._own[-1]) + 1
        found, begin = [], 0
        for segment in self.work.segments(chunk):
            end = begin + segment.count
            count = min(end, last) - max(begin, first)
            if count > 0:
                begun = segment.first + max(first - begin, 0)
                found.append(Segment(segment.place, begun, count))
            begin = end
        return found

    def kept(self, chunk: int, values: dict[str, np.ndarray]) -> Found | None:
        """Return what is kept of this process's values of a chunk; None if it drew nothing."""
        segments = self._own_segments(chunk)
        if not segments:
            return None
        statistics = self.study.statistics
        table = np.stack([values[s.key] for s in statistics], axis=1)
        logs = np.array([s.log for s in statistics])
        starts = np.cumsum([0, *(segment.count for segment in segments)])
        failures = np.stack([values[s.key] != 0 for s in self.measured[len(statistics) :]], axis=1)
        estimates, failed = [], []
        for first, last, count in _runs([segment.count for segment in segments]):
            rows = slice(starts[first], starts[last])
            # Points of as many networks each at once: (networks, points, statistics, layers).
            each = table[rows].reshape(last - first, count, *table.shape[1:]).swapaxes(0, 1)
            estimates.append(_estimate(each, logs))
            counted = failures[rows].reshape(last - first, count, *failures.shape[1:])
            failed.append(np.count_nonzero(counted, axis=1))
        point = np.repeat(np.arange(len(segments)), np.diff(starts))
        names = self.work.names[[segment.place for segment in segments]]
        return Found(
            names=names,
            estimates=jax.tree.map(lambda *parts: np.concatenate(parts), *estimates),
            failures=np.concatenate(failed),
            histograms={
                name: _binned(values[s.key], point, self.study.histograms[name])
                for s in statistics
                for name in [s.name]
                if name in self.study.histograms
            },
            spectra={}
            if self.study.spectrum is None
            else spectra.counted(
                values[monte_carlo.LOG_SINGULAR_VALUES], point, self.study.spectrum
            ),
        )


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first, last, count) of stretches of equal counts."""
    first = 0
    for place in range(1, len(counts) + 1):
        if place == len(counts) or counts[place] != counts[first]:
            yield first, place, counts[first]
            first = place


def _estimate(values: np.ndarray, logs: np.ndarray) -> Estimate:
    """Return the estimate of values of shape (networks, points, statistics, layers)."""
    plain, logarithmic = (
        Estimate.of(values[:, :, w], log=k) for w, k in ((~logs, False), (logs, True))
    )

    def together(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        joined = np.empty((len(a), len(logs), *a.shape[2:]), np.result_type(a, b))
        joined[:, ~logs], joined[:, logs] = a, b
        return joined

    return jax.tree.map(together, plain, logarithmic)


def _binned(values: np.ndarray, point: np.ndarray, bins: Any) -> np.ndarray:
    """Return how many networks are below, in and above the bins: (points, layers, bins + 2)."""
    counts = np.zeros((point[-1] + 1, values.shape[1], bins.bins + 2), np.int64)
    place = np.searchsorted(bins.edges, values.astype(np.float64), side="right")
    # The last edge belongs to the last bin; what is not a number is in none.
    place[values == bins.stop] = bins.bins
    rows, layers = np.nonzero(~np.isnan(values))
    np.add.at(counts, (point[rows], layers, place[rows, layers]), 1)
    return counts


# Theory.


def _theory(
    drawing: _Drawing, store: Store | None, place: tuple[int, int]
) -> Iterator[tuple[int, bool]]:
    """Work out what theory says of the points that a round is the first to draw.

    Of a share, those that fall to it; each process does some. Yields how many are done each time,
    and whether they were not before.
    """

    def knows(block: int) -> bytes:
        assert store is not None
        return b"there" if store.has_theory((*place, block)) else b""

    for block in range(-(-len(drawing.work.names) // THEORY_BLOCK)):
        places = theory_places(drawing.work, block).tolist()
        if not places:
            continue
        if _from_first(lambda: knows(block)):  # noqa: B023
            yield len(places), False
            continue
        begun = time.perf_counter()
        found = _shared_theory(drawing, places)
        if store is not None:
            store.add_theory((*place, block), found)
            seconds = round(time.perf_counter() - begun, 3)
            store.log(round=place[0], group=place[1], theory=block, seconds=seconds)
        yield len(places), True


def _shared_theory(drawing: _Drawing, places: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the theory of points, of which each process works out every so manieth."""
    processes = jax.process_count()
    # As many for each, so that what they send has one shape.
    mine = [places[n % len(places)] for n in range(-(-len(places) // processes) * processes)]
    block = results.theory(drawing.study, drawing.points(mine[jax.process_index() :: processes]))
    if processes == 1:
        return block
    # In bytes: JAX would send numbers of 64 bits as ones of 32.
    sent = {name: np.ascontiguousarray(array).view(np.uint8) for name, array in block.items()}
    had = multihost_utils.process_allgather(sent)
    return {
        name: np.asarray(had[name])
        .view(array.dtype)
        .swapaxes(0, 1)
        .reshape(-1, *array.shape[1:])[: len(places)]
        for name, array in block.items()
    }


def _largest_z(
    drawing: _Drawing, store: Store, place: tuple[int, int], chunk: int, kept: Found
) -> tuple[float, str]:
    """Return the largest |z| of a chunk's points, and the statistic that has it."""
    first = next(drawing.work.segments(chunk)).place
    block = (*place, first // THEORY_BLOCK)
    if not store.has_theory(block):
        return 0.0, ""
    theory = store.theory_block(block)
    _, here, there = np.intersect1d(kept.names, theory["names"], return_indices=True)
    if not len(here):
        return 0.0, ""
    largest = {}
    for number, statistic in enumerate(drawing.study.statistics):
        estimate = jax.tree.map(lambda leaf: leaf[here, number], kept.estimates)  # noqa: B023
        _, _, z = differences(
            statistic,
            theory["predicted"][there, number],
            estimate,
            estimate.count * drawing.group.units,
            drawing.study.sampling.dtype,
        )
        largest[statistic.name] = float(np.max(np.abs(z), where=np.isfinite(z), initial=0.0))
    of = max(largest, key=lambda name: largest[name])
    return largest[of], of
