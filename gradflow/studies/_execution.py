"""Running a study: theory of its points and round after round of networks, until it is finished.

Every process of `jax.distributed` calls `run`. The store is opened by the first one alone, which
tells the others what to draw; all of them draw each chunk together.
Hosts that do not know of each other run a share of the study each, in folders of their own, and
`merge` makes one store of these.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from gradflow.errors import InputError
from gradflow.simulation import _programs
from gradflow.studies import _measurements, _plan, _results, _runner
from gradflow.studies._measurements import Measurements
from gradflow.studies._plan import WHOLE, Program, Share, Task
from gradflow.studies._rounds import Left, TheoryChunk, tasks_of, theory_chunks
from gradflow.studies._runner import TaskRunner
from gradflow.studies._sealed import explained
from gradflow.studies._store import Store
from gradflow.studies._study import Study, differences

__all__ = ["Outcome", "Progress", "merge", "run"]

# With fewer networks no point has met its target: their spread is too often too small by chance.
# With 30, 95 % intervals cover 94 to 95 % although the values decide when to stop; with rounds of 5
# and no such rule 92 %, with rounds of 2 only 90 % (normal values, 20 000 times).
_FEWEST = 30


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a round of a study is.

    Attributes
    ----------
    what
        ``"theory"`` of points, or ``"networks"``.
    done, total
        How many of them, in this round.
    largest_z, statistic
        The largest |z| in the last chunk of networks, and the statistic that has it; 0 and empty
        where it is not known.
    """

    what: str
    done: int
    total: int
    largest_z: float = 0.0
    statistic: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The state in which `run` leaves a study.

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
    """The run is to stop, and a chunk is finished."""


def run(
    study: Study,
    folder: Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    share: Share = WHOLE,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Run a study, or what is left of it, into a folder.

    Parameters
    ----------
    study
        The study, as `study_file.load` reads it from a file.
    folder
        The store; new, or that of the same study, which is then resumed.
    devices
        Those that draw the networks; all of JAX's devices without it.
    share
        The part of the networks, and of the points' theory, that is done here.
    progress
        Called after each chunk of theory and of networks.
    stop
        Called after each chunk; the run stops there if it is true.

    Raises
    ------
    InputError
        If the points' fields do not go together, memory does not suffice, a study with targets is
        to be shared, or the store cannot be had or written to.
    """
    # Those of a process side by side, so that it draws a stretch of each chunk.
    devices = tuple(sorted(devices or jax.devices(), key=lambda device: device.process_index))
    programs = _plan.first_round(study, devices, share).programs
    _results.check(study)
    store = Store(folder, study, share)
    current = _Run(
        study, programs, store, devices, progress or (lambda _: None), stop or (lambda: False)
    )
    with explained(folder), ExitStack() as stack:

        def open_store() -> bytes:
            stack.enter_context(store.locked())
            return b""

        _from_first(open_store)
        finished = False
        while not finished:
            following = current.next_round()
            if following is None:
                finished = True
            else:
                try:
                    current.draw(following)
                except _Stopped:
                    break
        if jax.process_index() > 0:
            return Outcome(finished, 0, 0, None)
        written = _results.write(store, programs) if finished else None
        drawn = sum(store.rounds.networks().values())
        return Outcome(finished, drawn, len(store.rounds), written)


# Between processes.


def _from_first(function: Callable[[], bytes]) -> bytes:
    """Return the function's value in the first process, or its `InputError`, in all processes."""
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


def _of_all(own: Measurements | None) -> Measurements | None:
    """Return the measurements of all processes merged, in the first of them; None in the others."""
    if jax.process_count() == 1:
        return own
    content = b"" if own is None else own.packed()
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.frombuffer(content.ljust(int(lengths.max()), b"\0"), np.uint8)
    parts = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    if jax.process_index() > 0:
        return None
    sent = zip(parts, lengths.tolist(), strict=True)
    return _measurements.merged(
        Measurements.unpacked(part[:length].tobytes()) for part, length in sent if length
    )


def _theory_by_all(runner: TaskRunner, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the theory of points in rows of a task, each p-th by one of p processes."""
    processes = jax.process_count()
    # Each computes the same number, some points twice, so that arrays of one shape are sent.
    own = np.resize(rows, -(-len(rows) // processes) * processes)[jax.process_index() :: processes]
    arrays = runner.theory(own)
    if processes == 1:
        return arrays
    # In bytes: JAX would send numbers of 64 bits as ones of 32.
    sent = {name: np.ascontiguousarray(array).view(np.uint8) for name, array in arrays.items()}
    received = multihost_utils.process_allgather(sent)
    return {
        name: np.asarray(received[name])
        .view(array.dtype)
        .swapaxes(0, 1)
        .reshape(-1, *array.shape[1:])[: len(rows)]
        for name, array in arrays.items()
    }


# Rounds.


class _Round(NamedTuple):
    """A round: its number, its tasks, and what is left of each."""

    number: int
    tasks: tuple[Task, ...]
    left: list[Left]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run of a study. Whatever touches the store is called by the first process, which opened it.

    ``report`` and ``stop`` are `run`'s ``progress`` and ``stop``.
    """

    study: Study
    programs: Sequence[Program]
    store: Store
    devices: Sequence[jax.Device]
    report: Callable[[Progress], None]
    stop: Callable[[], bool]

    def next_round(self) -> _Round | None:
        """Return the first round that is not finished, or a new one; None if none is needed."""
        rounds = self.store.rounds

        def networks() -> bytes:
            """Return each point's networks, finished and wanted; nothing within a round."""
            if rounds.unfinished() is not None:
                return b""
            done = rounds.networks()
            wanted = self._wanted(done)
            return np.array([[done.get(n, 0), wanted[n]] for n in names], np.int64).tobytes()

        names = np.concatenate([program.names for program in self.programs]).tolist()
        counts = _from_first(networks)
        if counts:
            pairs = np.frombuffer(counts, np.int64).reshape(-1, 2).T.tolist()
            done, wanted = (dict(zip(names, column, strict=True)) for column in pairs)
            # By all processes: they agree on how much memory there is.
            share = self.store.share
            plan = _plan.make(self.study, self.programs, done, wanted, self.devices, share)
            if not plan.tasks:
                return None
            _from_first(lambda: self._begin(plan.tasks))

        def unfinished() -> bytes:
            number = rounds.unfinished()
            assert number is not None, "of a round that was just begun everything is left"
            return (
                json.dumps([number, rounds.left(number)]).encode() + b"\n" + rounds.content(number)
            )

        header, _, content = _from_first(unfinished).partition(b"\n")
        number, left = json.loads(header)
        ranges = [(theory, [(first, end) for first, end in chunks]) for theory, chunks in left]
        return _Round(number, tasks_of(content), ranges)

    def _begin(self, tasks: Sequence[Task]) -> bytes:
        self.store.begin(tasks)
        return b""

    def _wanted(self, done: dict[int, int]) -> dict[int, int]:
        """Return the networks that each point is to have: with a target, after another round."""
        if not self.study.sampling.target:
            return {
                name: count
                for program in self.programs
                for name, count in zip(
                    program.names.tolist(), program.networks.tolist(), strict=True
                )
            }
        each, most = self.study.sampling.networks, self.study.sampling.most
        return {
            name: done.get(name, 0) if met else min(done.get(name, 0) + each, most)
            for program in self.programs
            for name, met in zip(program.names.tolist(), self._met(program), strict=True)
        }

    def _met(self, program: Program) -> list[bool]:
        """Whether each point of a program has the standard errors that the study asks for."""
        total = self.store.rounds.measurements(program.names)
        if total is None:
            return [False] * len(program.names)
        met = total.estimates.count.max(axis=(1, 2)) >= _FEWEST
        for index, statistic in enumerate(self.study.statistics):
            if statistic.name in self.study.sampling.target:
                estimate = total.statistic(index)
                error = estimate.log_standard_error if statistic.log else estimate.standard_error
                # A statistic that no network has at a layer, as χ at the top, is not waited for.
                worst = np.where(estimate.count > 0, error, -np.inf).max(axis=1)
                met &= worst <= self.study.sampling.target[statistic.name]
        return list(met.tolist())

    def draw(self, current: _Round) -> None:
        """Do what is left of a round.

        Raises
        ------
        _Stopped
            If ``stop`` is true in the first process.
        """
        tasks = current.tasks
        networks = sum(task.networks for task in tasks)
        points = sum(int(np.count_nonzero(task.theory)) for task in tasks)
        networks_before = points_done = 0
        runners = self._compiled_ahead(current)
        for index, (runner, (theory, ranges)) in enumerate(zip(runners, current.left, strict=True)):
            for done, is_new in self._theory(runner, current.number, index) if theory else ():
                points_done += done
                if is_new:
                    self.report(Progress("theory", points_done, points))
                    self._stop_if_requested()
            for chunk in runner.run(ranges):
                state = Progress("networks", networks_before + chunk.done, networks)
                total = _of_all(chunk.measurements)
                if total is not None:
                    self.store.add(current.number, index, chunk.number, total, chunk.seconds)
                    z, name = self._largest_z(runner, current.number, index, total)
                    state = dataclasses.replace(state, largest_z=z, statistic=name)
                self.report(state)
                self._stop_if_requested()
            networks_before += runner.task.networks

    def _stop_if_requested(self) -> None:
        """Stop all processes if ``stop`` is true in the first one."""
        if _from_first(lambda: b"stop" if self.stop() else b""):
            raise _Stopped

    def _compiled_ahead(self, current: _Round) -> Iterator[TaskRunner]:
        """Yield the tasks of a round, compiled; the next is compiled while one is drawn.

        Programs and results are the same as if each were compiled in turn.
        """
        of_name = {name: program for program in self.programs for name in program.names.tolist()}
        waiting = {
            index: TaskRunner(self.study, of_name[int(task.names[0])], task, self.devices)
            for index, task in enumerate(current.tasks)
        }

        def compile_one(number: int) -> None:
            """Compile the program of a task's networks, or those of its theory."""
            index, is_theory = divmod(number, 2)
            theory, ranges = current.left[index]
            if jax.process_count() > 1:  # which compile in step
                return
            if is_theory and theory:
                waiting[index].compile_theory()
            elif not is_theory and ranges:
                waiting[index].compile()

        programs = 2 * len(current.left)
        for done, _ in _programs.in_order(compile_one, programs, 1, _runner.WORKERS):
            if done % 2 == 0:
                yield waiting.pop(done // 2 - 1)

    def _theory(self, runner: TaskRunner, number: int, index: int) -> Iterator[tuple[int, bool]]:
        """Work out the theory of a task's points, chunk by chunk.

        Yields how many points each chunk has, and whether it was not there before.
        """
        for chunk in theory_chunks(number, index, runner.task):
            rows = chunk.rows(runner.task)
            if _from_first(lambda: b"there" if self.store.rounds.has_theory(chunk) else b""):  # noqa: B023
                yield len(rows), False
                continue
            begun = time.perf_counter()
            arrays = _theory_by_all(runner, rows)
            if jax.process_index() == 0:
                self.store.add_theory(chunk, arrays, time.perf_counter() - begun)
            yield len(rows), True

    def _largest_z(
        self, runner: TaskRunner, number: int, index: int, total: Measurements
    ) -> tuple[float, str]:
        """Return the largest |z| of a chunk's points, of which one chunk of theory is looked up."""
        first = int(np.flatnonzero(runner.task.names == total.names[0])[0])
        chunk = TheoryChunk.of_row(number, index, first)
        if not self.store.rounds.has_theory(chunk):
            return 0.0, ""
        return runner.largest_z(total, self.store.rounds.theory_chunk(chunk))


# Shares.


def merge(folders: Sequence[Path], out: Path) -> Path:
    """Make one store of all the shares of a study, in a new folder; the file of its results.

    Nothing is drawn or averaged again: a share's rounds become rounds of the whole, which can be
    resumed like any store when points or networks are added to the study.

    Parameters
    ----------
    folders
        The stores of the shares, each finished, in any order.
    out
        The folder of the whole: one that is not there yet, or is empty.

    Raises
    ------
    InputError
        If a folder holds no share, they are not of one study, one is missing, there twice or not
        finished, or ``out`` holds something or cannot be written to.
    """
    stores = [Store.of(folder) for folder in folders]
    _check_shares(stores)
    stores.sort(key=lambda store: store.share)
    programs = _plan.programs(stores[0].study)
    for store in stores:
        _check_finished(store, programs)
    with Store.merged(out, stores) as whole:
        _results.write(whole, programs)
    return out / _results.FILE


def _check_shares(stores: Sequence[Store]) -> None:
    first = stores[0]
    for store in stores:
        if store.share.parts == 1:
            raise InputError(
                f"folder {str(store.folder)!r} holds a whole study and no share of one; it takes "
                "the --out of `gradflow study FILE --share 1/2` and the like"
            )
        changed = differences(
            {**first.study.identity(), "shares": first.share.parts},
            {**store.study.identity(), "shares": store.share.parts},
        )
        if changed:
            raise InputError(
                f"folder {str(store.folder)!r} holds a share of another study than "
                f"{str(first.folder)!r}: {'; '.join(changed)}"
            )
    folder_of: dict[Share, Path] = {}
    for store in stores:
        if store.share in folder_of:
            raise InputError(
                f"folders {str(folder_of[store.share])!r} and {str(store.folder)!r} both hold "
                f"share {store.share}; each goes in once"
            )
        folder_of[store.share] = store.folder
    count = first.share.parts
    missing = [n + 1 for n in range(count) if Share(n, count) not in folder_of]
    if missing:
        raise InputError(
            f"of {count} shares {', '.join(map(str, missing))} "
            f"{'is' if len(missing) == 1 else 'are'} missing; give the folders of all"
        )


def _check_finished(store: Store, programs: Sequence[Program]) -> None:
    drawn, share = sum(store.rounds.networks().values()), store.share
    wanted = sum(share.size(n) for program in programs for n in program.networks.tolist())
    if drawn < wanted:
        raise InputError(
            f"folder {str(store.folder)!r} is not finished: it holds {drawn} of {wanted} networks; "
            f"`gradflow study {store.folder / 'study.toml'} --out {store.folder} --share {share}` "
            "resumes it"
        )
