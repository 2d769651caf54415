"""A study is run: theory of its points, then round after round of networks, until it is finished.

Every process of `jax.distributed` calls `run`. The first one has the store, and tells the others
what to draw; all of them draw each chunk together.
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

from gradflow import comparison
from gradflow.errors import InputError
from gradflow.estimation import Estimate
from gradflow.simulation import monte_carlo
from gradflow.simulation.monte_carlo import Laws
from gradflow.statistics import Statistic
from gradflow.studies import plan, results, spectra
from gradflow.studies.description import Study, keys
from gradflow.studies.plan import Group, Work
from gradflow.studies.store import Found, Store, works_of

__all__ = ["Outcome", "Progress", "Step", "run"]

# Points whose theory is one file.
_THEORY_BLOCK = 256
# Chunks at a time: one is drawn while another's values are averaged.
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


class _Stopped(Exception):
    """Somebody asked to stop, and a chunk is finished."""


def run(
    study: Study,
    folder: Path,
    *,
    devices: Sequence[jax.Device] | None = None,
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
    progress
        Called after each chunk, and for each block of theory.
    stop
        Asked after each chunk whether to stop there.

    Raises
    ------
    InputError
        If the points' fields do not go together, memory does not suffice, or the store cannot be
        had or written to.
    """
    devices = tuple(devices or jax.devices())
    report = progress or (lambda _: None)
    asked = stop or (lambda: False)
    leads = jax.process_index() == 0
    found = plan.groups(study)
    first = plan.make(study, found, devices=devices)
    plan.check_memory(study, first)
    with ExitStack() as stack:
        store: Store | None = None

        def open_store() -> bytes:
            nonlocal store
            store = stack.enter_context(Store.opened(folder, study))
            return b""

        _from_first(open_store)
        finished = False
        while not finished:
            works, number, starts = _next_round(study, found, store, devices)
            if not works:
                finished = True
            else:
                try:
                    _round(study, found, store, (number, works, starts), devices, report, asked)
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
    study: Study, found: Sequence[Group], store: Store | None, devices: Sequence[jax.Device]
) -> tuple[tuple[Work, ...], int, list[int]]:
    """Return what is to be drawn, the round's number, and each group's first chunk."""

    def ask() -> bytes:
        """Return what points have and shall have, or nothing where a round is not finished."""
        assert store is not None
        number = store.rounds - 1
        if number >= 0 and store.goes_on(number) and not _is_done(store, number):
            return b""
        names = np.concatenate([group.names for group in found]).tolist()
        done = store.networks()
        wanted = _wanted(study, found, done, store)
        table = [[done.get(name, 0), wanted.get(name, study.sampling.networks)] for name in names]
        return np.array(table, np.int64).tobytes()

    asked = _from_first(ask)
    if asked:
        names = np.concatenate([group.names for group in found]).tolist()
        done, wanted = np.frombuffer(asked, np.int64).reshape(-1, 2).T.tolist()
        # By all processes: they agree on what memory there is.
        have, shall = (dict(zip(names, counts, strict=True)) for counts in (done, wanted))
        works = plan.make(study, found, have, shall, devices).works
        if not works:
            return (), -1, []
        _from_first(lambda: _begin(store, works))

    def read() -> bytes:
        assert store is not None
        number = store.rounds - 1
        groups = range(len(store.works(number)))
        starts = [store.finished(number, group) for group in groups]
        header = json.dumps({"number": number, "starts": starts})
        return header.encode() + b"\n" + store.round_file(number)

    header, _, content = _from_first(read).partition(b"\n")
    return works_of(content), *json.loads(header).values()


def _begin(store: Store | None, works: Sequence[Work]) -> bytes:
    assert store is not None
    store.begin(works)
    return b""


def _is_done(store: Store, number: int) -> bool:
    works = enumerate(store.works(number))
    return all(store.finished(number, group) == work.chunks for group, work in works)


def _wanted(
    study: Study, found: Sequence[Group], done: dict[int, int], store: Store
) -> dict[int, int]:
    """Return how many networks points with a target shall have after another round."""
    if not study.sampling.target:
        return {}
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
    met = total.estimates.count.max(axis=(1, 2)) > 1
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
    what: tuple[int, tuple[Work, ...], list[int]],
    devices: Sequence[jax.Device],
    report: Progress,
    stop: Callable[[], bool],
) -> None:
    number, works, starts = what
    total = sum(work.networks for work in works)
    before = 0
    for place, (work, start) in enumerate(zip(works, starts, strict=True)):
        group = next(group for group in found if work.names[0] in group.names)
        drawing = _Drawing(study, group, work, devices)
        if store is not None:
            _theory(drawing, store, f"{number:04}-{place:05}", report, stop)
        for chunk, done, values, seconds in drawing.run(start):
            step = Step("networks", before + done, total)
            if store is not None:
                kept = drawing.kept(chunk, values)
                store.add(number, place, chunk, kept)
                store.log(round=number, group=place, chunk=chunk, seconds=round(seconds, 3))
                largest, of = _largest_z(drawing, store, f"{number:04}-{place:05}", chunk, kept)
                step = dataclasses.replace(step, largest_z=largest, of=of)
            report(step)
            if _from_first(lambda: b"stop" if stop() else b""):
                raise _Stopped
        before += work.networks


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
    def _numbers(self) -> np.ndarray:
        """The points' numbers in the study, in the order of the work."""
        order = np.argsort(self.group.names)
        places = np.searchsorted(self.group.names, self.work.names, sorter=order)
        return np.asarray(self.group.numbers[order[places]])

    def points(self, places: Sequence[int] | range) -> list[Any]:
        """Return the points at places of the work."""
        return [self.study.point(int(self._numbers[place])) for place in places]

    def run(self, start: int) -> Iterator[tuple[int, int, dict[str, np.ndarray], float]]:
        """Yield each chunk from ``start`` on: its number, networks done, values, and seconds."""
        work, study = self.work, self.study
        if start == work.chunks:
            return
        x64 = study.sampling.dtype == "float64"
        together = work.block * len(self.devices)
        size = -(-work.chunk // together) * together
        with jax.enable_x64(x64):
            program = monte_carlo.compiled(
                self._laws(0),
                size,
                tuple(self.devices),
                work.seconds,
                measured=self.measured,
                sampler=work.sampler,
                keep=(work.keep, work.checkpoint),
                block=work.block,
                spectrum=study.spectrum is not None,
            )
        offset = start * work.chunk

        def call(first: int) -> dict[str, np.ndarray]:
            chunk = (offset + first) // work.chunk
            which, numbers = np.zeros((2, size), np.int32)
            segments = list(work.segments(chunk))
            filled = 0
            for segment in segments:
                stretch = slice(filled, filled + segment.count)
                which[stretch] = segment.place - segments[0].place
                numbers[stretch] = np.arange(segment.first, segment.first + segment.count)
                filled += segment.count
            with jax.enable_x64(x64):
                return program(self._laws(segments[0].place), which, numbers)

        workers = 1 if jax.process_count() > 1 else _WORKERS
        left, begun = work.networks - offset, time.perf_counter()
        for done, values in monte_carlo.in_order(call, left, work.chunk, workers):
            now = time.perf_counter()
            yield (offset + done - 1) // work.chunk, offset + done, values, now - begun
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

    def kept(self, chunk: int, values: dict[str, np.ndarray]) -> Found:
        """Return what is kept of a chunk's values."""
        segments = list(self.work.segments(chunk))
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
    drawing: _Drawing, store: Store, prefix: str, report: Progress, stop: Callable[[], bool]
) -> None:
    """Work out what theory says of the points that a round is the first to draw."""
    fresh = drawing.work.first == 0
    blocks = range(0, len(fresh), _THEORY_BLOCK)
    for first in blocks:
        places = [n for n in range(first, min(first + _THEORY_BLOCK, len(fresh))) if fresh[n]]
        name = f"{prefix}-{first // _THEORY_BLOCK:06}"
        if places and not store.has_theory(name):
            begun = time.perf_counter()
            store.add_theory(name, results.theory(drawing.study, drawing.points(places)))
            store.log(theory=name, seconds=round(time.perf_counter() - begun, 3))
            report(Step("theory", min(first + _THEORY_BLOCK, len(fresh)), len(fresh)))
            if stop():
                raise _Stopped


def _largest_z(
    drawing: _Drawing, store: Store, prefix: str, chunk: int, kept: Found
) -> tuple[float, str]:
    """Return the largest |z| of a chunk's points, and the statistic that has it."""
    first = next(drawing.work.segments(chunk)).place
    name = f"{prefix}-{first // _THEORY_BLOCK:06}"
    if not store.has_theory(name):
        return 0.0, ""
    theory = store.theory_block(name)
    _, here, there = np.intersect1d(kept.names, theory["names"], return_indices=True)
    if not len(here):
        return 0.0, ""
    largest = {}
    for place, statistic in enumerate(drawing.study.statistics):
        estimate = jax.tree.map(lambda leaf: leaf[here, place], kept.estimates)  # noqa: B023
        _, _, z = comparison.differences(
            statistic,
            theory["predicted"][there, place],
            estimate,
            estimate.count * drawing.group.units,
            drawing.study.sampling.dtype,
        )
        largest[statistic.name] = float(np.max(np.abs(z), where=np.isfinite(z), initial=0.0))
    of = max(largest, key=lambda name: largest[name])
    return largest[of], of
