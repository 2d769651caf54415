"""The rounds of a store: the networks that each of them draws, and the chunks that are finished.

    rounds/0000.npz     which networks of which points a round draws, in which chunks, and how many
                        chunks the round before it had; rounds/0000-copy.npz is the same again
    chunks/…            measurements of chunks of networks
    theory/…            theory of the points of a chunk of theory

The chunks of a task are finished in order. Every `_MERGED_FILES` of their files are merged into
one, and so are the merged files, always the same ones in the same order: files are few, and each
estimate has the same bits whether or not the study was interrupted.

Each of these files is sealed with the checksum of its round's file. Files that are damaged, missing
or of another study count as never made, and are made again when the study is resumed; of a round's
file, without which its chunks cannot be read, there is a copy.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradflow.studies import _sealed
from gradflow.studies._measurements import Measurements, merged, packed, unpacked
from gradflow.studies._plan import WHOLE, Share, Task
from gradflow.studies._sealed import Damage
from gradflow.studies._study import Study

__all__ = ["FOLDERS", "Left", "Rounds", "TheoryChunk", "round_name", "tasks_of", "theory_chunks"]
__all__ += ["undisturbed"]

FOLDERS = ("chunks", "theory", "rounds")

# Points whose theory is one file.
_THEORY_CHUNK = 256
# How many files are merged into one, unless that had more bytes than this.
_MERGED_FILES = 32
_MERGED_BYTES = 1 << 26
# Parsed rounds that are kept in memory: a round of a million points is large.
_ROUNDS_IN_MEMORY = 4
_BY_POINT = ("names", "first", "count", "theory")
_CHUNK_NAME = re.compile(r"(\d{4,})-(\d{5,})-(\d{10,})-(\d{10,})\.npz", re.ASCII)
_THEORY_NAME = re.compile(r"(\d{4,})-(\d{5,})-(\d{6,})\.npz", re.ASCII)
# How often a store that is being written to is read again, and seconds between.
_ATTEMPTS, _BETWEEN = 8, 0.25

# What is left of a task: whether theory is missing, and ranges of chunks, each [first, end).
Left = tuple[bool, list[tuple[int, int]]]


class TheoryChunk(NamedTuple):
    """A chunk of theory: that of up to 256 consecutive points of a task."""

    round: int
    task: int
    number: int

    @classmethod
    def of_row(cls, number: int, task: int, row: int) -> "TheoryChunk":
        """Return the chunk with the theory of the point in a row of a round's task."""
        return cls(number, task, row // _THEORY_CHUNK)

    @property
    def name(self) -> str:
        """The file's name in the store."""
        return f"theory/{self.round:04}-{self.task:05}-{self.number:06}.npz"

    @property
    def label(self) -> str:
        """The file's label within its round."""
        return f"theory {self.task} {self.number}"

    def rows(self, task: Task) -> np.ndarray:
        """Return the rows of its points in the task."""
        first = self.number * _THEORY_CHUNK
        return first + np.flatnonzero(task.theory[first : first + _THEORY_CHUNK])


def theory_chunks(number: int, index: int, task: Task) -> list[TheoryChunk]:
    """Return the chunks of theory of a round's task, in order; each has points."""
    occupied = np.unique(np.flatnonzero(task.theory) // _THEORY_CHUNK)
    return [TheoryChunk(number, index, chunk) for chunk in occupied.tolist()]


@dataclasses.dataclass(frozen=True)
class _ChunkFile:
    """A file with chunks ``first`` to ``last`` of a task."""

    folder: Path
    round: int
    task: int
    first: int
    last: int

    @property
    def path(self) -> Path:
        name = f"{self.round:04}-{self.task:05}-{self.first:010}-{self.last:010}.npz"
        return self.folder / "chunks" / name

    @property
    def label(self) -> str:
        """Its label within its round; without the round's number, which merging shares changes."""
        return f"chunks {self.task} {self.first} {self.last}"

    def within(self, other: "_ChunkFile") -> bool:
        """Whether another file has these chunks, and more."""
        return self != other and other.first <= self.first and self.last <= other.last


@dataclasses.dataclass(frozen=True)
class _Round:
    """The content of a round's file.

    Attributes
    ----------
    tasks
        Its tasks.
    study
        The fields of the study that it was begun with, as JSON.
    before
        Finished chunks of each task of the round before, at its beginning; None in the first one.
    """

    tasks: tuple[Task, ...]
    study: str
    before: list[int] | None


class Rounds:
    """The rounds in a store's folder; none until `checksums` are set and the files scanned.

    Attributes
    ----------
    checksums
        Of the rounds' files, in order.
    complete
        Whether all of the rounds was finished at some time.
    """

    def __init__(self, folder: Path, study: Study, share: Share) -> None:
        self.folder, self.share = folder, share
        self.checksums: list[str] = []
        self.complete = False
        # Decides which networks are drawn: a round of other fields is not to be completed.
        self._asked = json.dumps(study.identity(), sort_keys=True)
        # Whole files: of chunks by round and task, in order; of theory.
        self._files: dict[tuple[int, int], list[_ChunkFile]] = {}
        self._theory: set[TheoryChunk] = set()
        # Files that are not whole, and the verb for making them again.
        self._damaged: dict[Path, str] = {}
        self._parsed: dict[int, _Round] = {}

    def __len__(self) -> int:
        return len(self.checksums)

    def damage(self, path: Path, reason: str, remedy: str) -> Damage:
        """Return the error of a file that resuming the study mends."""
        share = "" if self.share == WHOLE else f" --share {self.share}"
        command = f"gradflow study {self.folder / 'study.toml'} --out {self.folder}{share}"
        return Damage(path, reason, f"`{command}` {remedy}")

    # Rounds' files.

    def append(self, tasks: Sequence[Task]) -> None:
        """Write the file of a new round."""
        number, before = len(self), None
        if number:
            before = [self._finished(number - 1, n) for n in range(len(self.tasks(number - 1)))]
        arrays: dict[str, np.ndarray] = {}
        plain = []
        for index, task in enumerate(tasks):
            fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
            for name in _BY_POINT:
                arrays[f"{index}/{name}"] = fields.pop(name)
            plain.append(fields)
        header = {"tasks": plain, "study": self._asked, "before": before}
        arrays["header"] = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
        content = _sealed.sealed(packed(arrays), "round")
        self._write(number, content)
        self.checksums.append(hashlib.sha256(content).hexdigest())
        self.complete = False

    def _write(self, number: int, content: bytes) -> None:
        for copied in (False, True):
            _sealed.write(self.folder / round_name(number, copied), content)

    def rewrite(self) -> None:
        """Write every round's file and its copy again, from whichever of them is whole."""
        for number in range(len(self)):
            self._write(number, self.content(number))

    def read(self, number: int, copied: bool) -> bytes | None:
        """Return a round's file, or its copy, with its seal; None if it is damaged or missing."""
        path = self.folder / round_name(number, copied)
        if not path.is_file():
            return None
        content = path.read_bytes()
        return content if hashlib.sha256(content).hexdigest() == self.checksums[number] else None

    def whole(self, number: int) -> bytes | None:
        """Return a round's file, or else its copy; None if both are damaged or missing."""
        first = self.read(number, copied=False)
        return self.read(number, copied=True) if first is None else first

    def content(self, number: int) -> bytes:
        """Return a round's file or its copy, or else `Damage`."""
        content = self.whole(number)
        if content is None:
            raise Damage(
                self.folder / round_name(number),
                "and its copy are damaged or missing",
                "the chunks cannot be read without it: give another --out",
            )
        return content

    def tasks(self, number: int) -> tuple[Task, ...]:
        """Return the tasks of a round."""
        return self._round(number).tasks

    def _round(self, number: int) -> _Round:
        if number not in self._parsed:
            while len(self._parsed) >= _ROUNDS_IN_MEMORY:
                del self._parsed[next(iter(self._parsed))]
            self._parsed[number] = _parsed(self.content(number))
        return self._parsed[number]

    # What is finished.

    def _chunks_of(self, number: int) -> dict[int, int]:
        """Return the number of chunks that each task of a round had, as far as is known."""
        tasks = self.tasks(number)
        planned = {index: task.chunks for index, task in enumerate(tasks)}
        if number + 1 < len(self):
            before = self._round(number + 1).before
            # The first round of a share says nothing, and only finished shares are merged.
            return planned if before is None else dict(enumerate(before))
        if self.complete:
            return planned
        return {
            index: max((file.last + 1 for file in self._files.get((number, index), ())), default=0)
            for index in range(len(tasks))
        }

    def left(self, number: int) -> list[Left]:
        """Return the theory and the chunks that are left of each task of a round.

        The last round, if it was begun with this study, is to have all of its chunks; others, and
        those of a smaller study, are to have the chunks that they had.
        """
        chunks = self._chunks_of(number)
        if number + 1 == len(self) and self._round(number).study == self._asked:
            chunks = {index: task.chunks for index, task in enumerate(self.tasks(number))}
        missing = {
            chunk.task
            for chunk in self._theory_of_round(number, chunks)
            if chunk not in self._theory
        }
        gaps = self._gaps(number, chunks)
        return [(index in missing, gaps[index]) for index in sorted(gaps)]

    def unfinished(self) -> int | None:
        """Return the number of the first round that has anything left; None if there is none."""
        return next((n for n in range(len(self)) if any(map(any, self.left(n)))), None)

    def _gaps(self, number: int, chunks: Mapping[int, int]) -> dict[int, list[tuple[int, int]]]:
        """Return the ranges of missing chunks by task, of the number of chunks that each has."""
        gaps_of = {}
        for index, count in chunks.items():
            gaps: list[tuple[int, int]] = []
            end = 0
            for file in self._files.get((number, index), ()):
                if file.first > end:
                    gaps.append((end, min(file.first, count)))
                end = max(end, file.last + 1)
            if end < count:
                gaps.append((end, count))
            gaps_of[index] = gaps
        return gaps_of

    def _theory_of_round(self, number: int, chunks: Mapping[int, int]) -> list[TheoryChunk]:
        """Return the chunks of theory of a round's tasks of which something is drawn."""
        return [
            chunk
            for index, task in enumerate(self.tasks(number))
            if chunks[index]
            for chunk in theory_chunks(number, index, task)
        ]

    def _finished(self, number: int, index: int) -> int:
        """Count a task's finished chunks, from the first on without a gap."""
        end = 0
        for file in self._files.get((number, index), ()):
            if file.first != end:
                break
            end = file.last + 1
        return end

    def networks(self) -> dict[int, int]:
        """Count the share's networks that are finished, of every point by its name."""
        by_share: dict[Share, dict[int, int]] = {}
        for number in range(len(self)):
            for index, task in enumerate(self.tasks(number)):
                done = by_share.setdefault(task.share, {})
                drawn = min(self._finished(number, index) * task.chunk_size, task.networks)
                ends = np.cumsum(task.count)
                each = np.clip(drawn - (ends - task.count), 0, task.count)
                for name, first, count in zip(
                    task.names.tolist(), task.first.tolist(), each.tolist(), strict=True
                ):
                    if count:
                        done[name] = first + count
        # After shares were merged, new networks are numbered after those of all shares together.
        own = by_share.pop(self.share, {})
        total = collections.Counter[int]()
        for part in by_share.values():
            total.update(part)
        return dict(total) | own

    # Chunks of networks.

    def add(self, number: int, index: int, chunk: int, measurements: Measurements) -> None:
        """Write the file of a chunk, and merge the files that are then due to be merged."""
        self._add_file(_ChunkFile(self.folder, number, index, chunk, chunk), measurements)
        # If the chunk was drawn again, later ones may be there.
        for last in range(chunk, self._finished(number, index)):
            self._merge_up_to(number, index, last)

    def _add_file(self, file: _ChunkFile, measurements: Measurements) -> None:
        content = _sealed.sealed(measurements.packed(), self.checksums[file.round], file.label)
        _sealed.write(file.path, content)
        files = self._files.setdefault((file.round, file.task), [])
        files.append(file)
        files.sort(key=lambda one: (one.first, one.last))

    def _merge_up_to(self, number: int, index: int, chunk: int) -> None:
        size = _MERGED_FILES
        while (chunk + 1) % size == 0 and self._merge(number, index, chunk, size):
            size *= _MERGED_FILES

    def _merge(self, number: int, index: int, last: int, size: int) -> bool:
        """Merge the files of the last ``size`` chunks into one; whether they are one now."""
        files = self._files[number, index]
        inside = [file for file in files if last - size < file.first and file.last <= last]
        if len(inside) == 1:
            return True
        # With none inside, a larger file has them all; with too many, some had been too large.
        if not inside or len(inside) > _MERGED_FILES:
            return not inside
        together = merged(map(self._read_file, inside))
        if together is None or together.nbytes > _MERGED_BYTES:
            return False
        self._add_file(_ChunkFile(self.folder, number, index, inside[0].first, last), together)
        for file in inside:
            files.remove(file)
            file.path.unlink()
        return True

    def finish_merging(self) -> None:
        """Merge the files that were due to be merged when the process ended."""
        for (number, index), files in list(self._files.items()):
            last = files[-1].last
            if not self._gaps(number, {index: last + 1})[index]:
                self._merge_up_to(number, index, last)

    def _read_file(self, file: _ChunkFile) -> Measurements:
        content = _sealed.read(file.path, self.checksums[file.round], file.label)
        if content is None:
            raise self.damage(file.path, "is missing or damaged", "draws it again")
        return Measurements.unpacked(content)

    def measurements(self, names: np.ndarray) -> Measurements | None:
        """Return all measurements of some points, in this order; None if there are none."""

        def parts() -> Iterator[Measurements]:
            for (number, index), files in sorted(self._files.items()):
                task = self.tasks(number)[index]
                for file in files:
                    if np.isin(task.points_in(file.first, file.last), names).any():
                        yield self._read_file(file)

        return undisturbed(self.folder, lambda: merged(parts(), names), self.scan)

    # Chunks of theory.

    def has_theory(self, chunk: TheoryChunk) -> bool:
        """Whether a chunk of theory is there."""
        return chunk in self._theory

    def add_theory(self, chunk: TheoryChunk, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a chunk of theory: ``names``, and arrays of shape (points, statistics, layers)."""
        content = _sealed.sealed(packed(arrays), self.checksums[chunk.round], chunk.label)
        _sealed.write(self.folder / chunk.name, content)
        self._theory.add(chunk)

    def theory_chunk(self, chunk: TheoryChunk) -> dict[str, np.ndarray]:
        """Return the arrays of a chunk of theory."""
        path = self.folder / chunk.name
        content = _sealed.read(path, self.checksums[chunk.round], chunk.label)
        if content is None:
            raise self.damage(path, "is missing or damaged", "works it out again")
        return unpacked(content)

    def theory(self, names: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Yield the chunks of theory that have some of the points."""
        for chunk in sorted(self._theory):
            task = self.tasks(chunk.round)[chunk.task]
            if np.isin(task.names[chunk.rows(task)], names).any():
                yield self.theory_chunk(chunk)

    # Checks.

    def scan(self, *, remove: bool = False) -> None:
        """Find all files of chunks and theory, and which of them are whole.

        With ``remove``, damaged files are removed, and so are files that were merged already.
        """
        before, by_task, theory = self._files, collections.defaultdict(list), set()
        self._damaged = {}
        for path, numbers in self._named("chunks", _CHUNK_NAME):
            file = _ChunkFile(self.folder, *numbers)
            known = before.get((file.round, file.task), ())
            if file in known or self._is_whole(path, file.round, file.label):
                by_task[file.round, file.task].append(file)
            else:
                self._damaged[path] = "draws it again"
        for key, files in by_task.items():
            inside = [file for file in files if any(file.within(other) for other in files)]
            by_task[key] = [file for file in files if file not in inside]
            for file in inside if remove else ():
                file.path.unlink()
        self._files = dict(by_task)
        for path, numbers in self._named("theory", _THEORY_NAME):
            chunk = TheoryChunk(*numbers)
            if chunk in self._theory or self._is_whole(path, chunk.round, chunk.label):
                theory.add(chunk)
            else:
                self._damaged[path] = "works it out again"
        self._theory = theory
        for path in self._damaged if remove else ():
            _sealed.discard(path)

    def _named(self, kind: str, pattern: re.Pattern[str]) -> Iterator[tuple[Path, list[int]]]:
        """Yield the files of a kind that are of some round, and the numbers in their names."""
        folder = self.folder / kind
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = pattern.fullmatch(path.name)
            if match and int(match[1]) < len(self):
                yield path, [int(number) for number in match.groups()]

    def _is_whole(self, path: Path, number: int, label: str) -> bool:
        return _sealed.read(path, self.checksums[number], label) is not None

    def check(self) -> None:
        """Raise `Damage` if a file of chunks or theory is damaged or missing."""
        for path, remedy in self._damaged.items():
            raise self.damage(path, "is damaged or of another study", remedy)
        for number in range(len(self)):
            chunks = self._chunks_of(number)
            for index, gaps in self._gaps(number, chunks).items():
                for first, end in gaps:
                    file = _ChunkFile(self.folder, number, index, first, end - 1)
                    raise self.damage(file.path, "is missing", "draws it again")
            for chunk in self._theory_of_round(number, chunks):
                if chunk not in self._theory:
                    path = self.folder / chunk.name
                    raise self.damage(path, "is missing", "works it out again")

    def take_in(self, other: "Rounds") -> None:
        """Copy the rounds of a share behind those that are there."""
        before = len(self)
        for number, checksum in enumerate(other.checksums):
            self._write(before + number, other.content(number))
            self.checksums.append(checksum)
        for files in other._files.values():
            for file in files:
                copy = dataclasses.replace(file, folder=self.folder, round=before + file.round)
                _sealed.write(copy.path, file.path.read_bytes())
        for chunk in sorted(other._theory):
            name = chunk._replace(round=before + chunk.round).name
            _sealed.write(self.folder / name, (other.folder / chunk.name).read_bytes())


def round_name(number: int, copied: bool = False) -> str:
    """Return the name of a round's file in the store, or of its copy."""
    return f"rounds/{number:04}{'-copy' if copied else ''}.npz"


def tasks_of(content: bytes) -> tuple[Task, ...]:
    """Return the tasks in a round's file."""
    return _parsed(content).tasks


@functools.lru_cache(maxsize=1)
def _parsed(content: bytes) -> _Round:
    arrays = unpacked(content)
    header = json.loads(arrays["header"].tobytes())
    tasks = []
    for index, fields in enumerate(header["tasks"]):
        by_point = {name: arrays[f"{index}/{name}"] for name in _BY_POINT}
        tasks.append(Task(**{**fields, **by_point, "share": Share(*fields["share"])}))
    return _Round(tuple(tasks), header["study"], header["before"])


def undisturbed(
    folder: Path, read: Callable[[], Any], again: Callable[[], None] = lambda: None
) -> Any:
    """Return the value of ``read``, after ``again`` once more while the store is written to."""
    for _ in range(_ATTEMPTS):
        try:
            return read()
        except Damage:
            if not _is_written(folder):
                raise
            time.sleep(_BETWEEN)
            with contextlib.suppress(Damage):
                again()
    return read()


def _is_written(folder: Path) -> bool:
    """Whether another process holds the store's lock."""
    try:
        lock = os.open(folder / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False
