"""The store of a study: a folder that holds what is finished, whatever happens to the process.

    study.toml          the study file, as it was given
    store.json          the same text, whose share it is, what networks were drawn with, and the
                        checksums of rounds and results; store-copy.json is the same again
    rounds/0000.npz     which networks of which points a round draws, in which chunks, and how many
                        chunks the round before it had; rounds/0000-copy.npz is the same again
    chunks/…            what chunks found: estimates that can be merged
    theory/…            what theory says of points
    results.nc          all of it, labelled, when the study is finished
    log.jsonl           when what was done, and how long it took; nothing depends on it
    lock                held by the process that writes

A group's chunks are finished in order. Every `_FAN` of them are merged into one file, and so are
those, always the same ones and in the same order: there are few files, and each estimate has the
same bits whether or not the study was interrupted.

Everything that reads a store checks all of it. Chunks and theory are `sealed` for the one round
that they are of; those that are damaged, missing or of another study are as if they had never been
made, and are made again when the study goes on. What says how they are read is there twice.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gradflow.errors
from gradflow._arguments import PRNG
from gradflow.errors import InputError
from gradflow.studies import description, sealed
from gradflow.studies.description import Study
from gradflow.studies.found import Found, combined, npz, unpacked
from gradflow.studies.plan import ALL, Share, Work
from gradflow.studies.sealed import WRITING, Damage, sentences

__all__ = ["RESULTS", "THEORY_BLOCK", "Store", "theory_places", "works_of"]

RESULTS = "results.nc"
# Points whose theory is one file.
THEORY_BLOCK = 256

_FORMAT = 3
_FOLDERS = ("chunks", "theory", "rounds")
# What there may be before store.json.
_BEGUN = {"lock", "study.toml", *_FOLDERS}
# How many files are merged into one, unless that had more bytes than this.
_FAN = 32
_MERGED_BYTES = 1 << 26
_BY_POINT = ("names", "first", "count", "theory")
_CHUNK_NAME = re.compile(r"(\d{4,})-(\d{5,})-(\d{10,})-(\d{10,})\.npz", re.ASCII)
_THEORY_NAME = re.compile(r"(\d{4,})-(\d{5,})-(\d{6,})\.npz", re.ASCII)
# How often a store that is being written to is looked at again, and seconds between.
_LOOKS, _BETWEEN = 8, 0.25


# A block of theory: of which round, of which group, and its number.
Block = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of chunks ``first`` to ``last`` of a group in a round."""

    path: Path
    round: int
    group: int
    first: int
    last: int

    @property
    def place(self) -> str:
        """What its seal says it is of its round; not the round's number, which merging changes."""
        return f"chunks {self.group} {self.first} {self.last}"

    def within(self, other: "_File") -> bool:
        """Whether another file has these chunks, and more."""
        return self != other and other.first <= self.first and self.last <= other.last


@dataclasses.dataclass(frozen=True)
class _Round:
    """What a round's file says: what is drawn; of what study; its predecessor's finished chunks."""

    works: tuple[Work, ...]
    study: str
    before: list[int] | None


class Store:
    """The folder of one study, held by this process while it is open."""

    def __init__(self, folder: Path, study: Study, share: Share = ALL) -> None:
        self.folder, self.study, self.share = folder, study, share
        # Versions and machines that the networks were drawn with.
        self.drawn_with: list[dict[str, Any]] = []
        # The checksums of rounds, and that of the results if they are those of the study.
        self._rounds: list[str] = []
        self._results: str | None = None
        # What is whole: files of chunks by round and group, in order; blocks of theory.
        self._chunks: dict[tuple[int, int], list[_File]] = {}
        self._theory: set[Block] = set()
        # And what is not, by what making it again is called.
        self._bad: dict[Path, str] = {}
        self._known_rounds: dict[int, _Round] = {}

    # Opening.

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, study: Study, share: Share = ALL) -> Iterator["Store"]:
        """Make or go on with the store of a study, and let nobody else write to it meanwhile.

        Files that are damaged or of another study are removed, and what they had is `left` again.

        Raises
        ------
        InputError
            If the folder cannot be written to, another process writes to it, it holds something
            else or another share, what says how it is read is gone, or the study has changed by
            more than new points and more networks.
        """
        with contextlib.ExitStack() as stack:
            with sentences(folder):
                store = cls(folder, study, share)
                _check_study_or_nothing(folder)
                folder.mkdir(parents=True, exist_ok=True)
                lock = _lock(folder)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise InputError(
                        f"out is {str(folder)!r}, where another process writes its study; wait for "
                        "it, stop it, or give another folder"
                    ) from error
                store._prepare()
            yield store

    @classmethod
    @contextlib.contextmanager
    def put_together(cls, folder: Path, shares: Sequence["Store"]) -> Iterator["Store"]:
        """Make one store of all shares of a study, which is there when the context is left.

        Raises
        ------
        InputError
            If the folder holds something, or cannot be written to.
        """
        with sentences(folder):
            if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
                raise InputError(
                    f"out is {str(folder)!r}, which holds something; give a new folder"
                )
            beside = sealed.beside(folder)
            shutil.rmtree(beside, ignore_errors=True)
            try:
                for name in _FOLDERS:
                    (beside / name).mkdir(parents=True)
                whole = cls(beside, shares[0].study)
                for share in shares:
                    whole._take_in(share)
                whole._look(mend=False)
                whole._write_header()
                yield whole
                if folder.exists():
                    folder.rmdir()
                beside.replace(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    def _take_in(self, share: "Store") -> None:
        """Copy the rounds of a share behind those that are there."""
        before = len(self._rounds)
        for number, identity in enumerate(share._rounds):
            self._write_round(before + number, share._round_content(number))
            self._rounds.append(identity)
        for those in share._chunks.values():
            for file in those:
                name = _chunk_name(before + file.round, file.group, file.first, file.last)
                sealed.write(self.folder / name, file.path.read_bytes())
        for number, group, block in sorted(share._theory):
            path = share.folder / _theory_name(number, group, block)
            name = _theory_name(before + number, group, block)
            sealed.write(self.folder / name, path.read_bytes())
        self.drawn_with += [d for d in share.drawn_with if d not in self.drawn_with]
        log = share.folder / "log.jsonl"
        if log.is_file() and not log.is_symlink():
            with open(self.folder / "log.jsonl", "ab") as together:
                together.write(log.read_bytes())

    @classmethod
    def of(cls, folder: Path) -> "Store":
        """Return a folder's store, to read, with all that is in it checked.

        Raises
        ------
        InputError
            If it is none, or a file is damaged, missing or of another study.
        """
        try:
            if not any(os.path.lexists(folder / name) for name in (*_HEADERS, "rounds")):
                raise InputError(
                    f"folder is {str(folder)!r}, which holds no study; it is the --out of a "
                    "`gradflow study FILE`"
                )
            return _undisturbed(folder, lambda: cls._checked(folder))
        except OSError as error:
            raise InputError(
                f"folder is {str(folder)!r}, which cannot be read "
                f"({(error.strerror or str(error)).lower()})"
            ) from error

    @classmethod
    def _checked(cls, folder: Path) -> "Store":
        header, copy = (_header(folder / name) for name in _HEADERS)
        known = header or copy
        if known is None:
            raise _header_is_gone(folder)
        store = cls(folder, description.parse(known["text"]), Share(*known["share"]))
        for name, one in zip(_HEADERS, (header, copy), strict=True):
            if one is None:
                raise store._damage(folder / name, "is damaged or missing", "writes it again")
        if header != copy:
            raise store._damage(
                folder / _HEADERS[0],
                f"differs from {_HEADERS[1]}, as one that was changed or is of another study",
                "goes on with the one that fits",
            )
        store._take(known)
        text = hashlib.sha256(known["text"].encode()).hexdigest()
        if sealed.digest(folder / "study.toml") != text:
            raise Damage(
                folder / "study.toml",
                "is not the file that the study was last run with, or is missing",
                f"`gradflow study FILE --out {folder}` with that file writes it again",
            )
        for number in range(store.rounds):
            for copied in (False, True):
                if store._read_round(number, copied) is None:
                    raise store._damage(
                        folder / _round_name(number, copied),
                        "is damaged, missing or of another study",
                        "writes it again from its copy",
                    )
        store._look(mend=False)
        store._check_whole()
        return store

    def _damage(self, path: Path, reason: str, remedy: str) -> Damage:
        """Return what is wrong with a file that going on with the study will mend."""
        share = "" if self.share == ALL else f" --share {self.share}"
        command = f"gradflow study {self.folder / 'study.toml'} --out {self.folder}{share}"
        return Damage(path, reason, f"`{command}` {remedy}")

    def _check_whole(self) -> None:
        """Raise if something is not there that was, or is not what it was."""
        for path, remedy in self._bad.items():
            raise self._damage(path, "is damaged or of another study", remedy)
        for number in range(self.rounds):
            finished = self._chunks_of(number)
            for group, ranges in _gaps(self._chunks, number, finished).items():
                for first, last in ranges:
                    raise self._damage(
                        self.folder / _chunk_name(number, group, first, last - 1),
                        "is missing",
                        "draws it again",
                    )
            for place in self._theory_of_round(number, finished):
                if place not in self._theory:
                    raise self._damage(
                        self.folder / _theory_name(*place),
                        "is missing",
                        "works it out again",
                    )
        if self._results and sealed.digest(self.folder / RESULTS) != self._results:
            raise self._damage(
                self.folder / RESULTS,
                "is missing, damaged or of another study",
                "puts it together again",
            )

    @property
    def results(self) -> Path | None:
        """The labelled file, if the study was finished."""
        return self.folder / RESULTS if self._results else None

    def _take(self, known: Mapping[str, Any]) -> None:
        self.drawn_with, self._rounds = list(known["drawn_with"]), list(known["rounds"])
        self._results = known["results"]

    def _prepare(self) -> None:
        for name in ("", *_FOLDERS):
            (self.folder / name).mkdir(exist_ok=True)
            for left in (self.folder / name).glob(f"{WRITING}*"):
                sealed.discard(left)
        known = self._header_that_fits()
        if known is not None:
            self._take(known)
            self._check_change(description.parse(known["text"]), Share(*known["share"]))
            if known["text"] != self.study.text:
                self._results = None
        for number in range(self.rounds):
            self._write_round(number, self._round_content(number))
        log = self.folder / "log.jsonl"
        if os.path.lexists(log) and not stat.S_ISREG(log.lstat().st_mode):
            sealed.discard(log)
        self._look(mend=True)
        # All there was to the last bit: what a study goes on with may be another machine.
        now = _drawn_with()
        self.drawn_with += [now] if now not in self.drawn_with else []
        self._write_header()
        # What was to be merged when the process ended.
        for (number, group), those in list(self._chunks.items()):
            if not _gaps(self._chunks, number, {group: those[-1].last + 1})[group]:
                self._merge_all(number, group, those[-1].last)

    def _header_that_fits(self) -> dict[str, Any] | None:
        """Return what store.json or its copy says, whichever fits the rounds; None before it."""
        known = [_header(self.folder / name) for name in _HEADERS]
        fitting = []
        for one in known:
            if one is None:
                continue
            self._rounds = one["rounds"]
            if all(self._first_whole(number) is not None for number in range(self.rounds)):
                fitting.append(one)
        self._rounds = []
        if fitting:
            return max(fitting, key=lambda one: len(one["rounds"]))  # the first of them
        for one in known:
            if one is not None:
                self._rounds = one["rounds"]
                gone = next(n for n in range(self.rounds) if self._first_whole(n) is None)
                raise Damage(
                    self.folder / _round_name(gone),
                    "and its copy are damaged, missing or of another study",
                    "what is in chunks cannot be read without it: give another --out",
                )
        if any(any((self.folder / name).iterdir()) for name in _FOLDERS):
            raise _header_is_gone(self.folder)
        return None

    def _write_header(self) -> None:
        known = {"format": _FORMAT, "text": self.study.text, "share": self.share}
        known |= {"drawn_with": self.drawn_with, "rounds": self._rounds, "results": self._results}
        content = _with_checksum(known)
        for name in _HEADERS:
            sealed.write(self.folder / name, content)
        sealed.write(self.folder / "study.toml", self.study.text.encode())

    def _check_change(self, old: Study, share: Share) -> None:
        if share != self.share:
            raise InputError(
                f"share is {self.share}, and {str(self.folder)!r} holds share {share}; give "
                f"--share {share}, or another folder"
            )
        new = self.study
        if old.text == new.text:
            return
        changed = description.differences(old.fixed(), new.fixed())
        if not changed:
            lost = {point.name for point in old.points()} - {point.name for point in new.points()}
            if lost:
                changed = description.differences(
                    {"base": old.base, "axes": old.named_axes()},
                    {"base": new.base, "axes": new.named_axes()},
                )
                changed.append(f"{len(lost)} of {len(old)} points are gone")
        changed += _fewer_networks(old, new)
        if changed:
            raise InputError(
                f"the study is not the one that {str(self.folder)!r} was begun with: "
                f"{'; '.join(changed)}; only points and networks may be added, for anything else "
                "give another --out"
            )

    # Rounds.

    @property
    def rounds(self) -> int:
        """How many there are."""
        return len(self._rounds)

    def begin(self, works: Sequence[Work]) -> int:
        """Write down what the next round draws, and return its number.

        Results of fewer networks or points are no longer those of the study.
        """
        number, before = self.rounds, None
        if number:
            before = [self.finished(number - 1, g) for g in range(len(self.works(number - 1)))]
        arrays: dict[str, np.ndarray] = {}
        plain = []
        for group, work in enumerate(works):
            fields = {field.name: getattr(work, field.name) for field in dataclasses.fields(work)}
            for name in _BY_POINT:
                arrays[f"{group}/{name}"] = fields.pop(name)
            plain.append(fields)
        header = {"groups": plain, "study": _digest(self.study), "before": before}
        arrays["header"] = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
        content = sealed.sealed(npz(arrays), "round")
        self._write_round(number, content)
        self._rounds.append(hashlib.sha256(content).hexdigest())
        self._results = None
        self._write_header()
        (self.folder / RESULTS).unlink(missing_ok=True)
        return number

    def _write_round(self, number: int, content: bytes) -> None:
        for copied in (False, True):
            sealed.write(self.folder / _round_name(number, copied), content)

    def _read_round(self, number: int, copied: bool) -> bytes | None:
        """Return a round's file, or its copy, seal and all; None if it is not what it was."""
        path = self.folder / _round_name(number, copied)
        if not path.is_file():
            return None
        content = path.read_bytes()
        return content if hashlib.sha256(content).hexdigest() == self._rounds[number] else None

    def _first_whole(self, number: int) -> bytes | None:
        first = self._read_round(number, copied=False)
        return self._read_round(number, copied=True) if first is None else first

    def _round_content(self, number: int) -> bytes:
        content = self._first_whole(number)
        if content is None:
            raise Damage(
                self.folder / _round_name(number),
                "and its copy are damaged or missing",
                "what is in chunks cannot be read without it: give another --out",
            )
        return content

    def round_file(self, number: int) -> bytes:
        """Return the file of a round."""
        return self._round_content(number)

    def works(self, number: int) -> tuple[Work, ...]:
        """Return what a round draws."""
        return self._round(number).works

    def _round(self, number: int) -> _Round:
        if number not in self._known_rounds:
            while len(self._known_rounds) >= _ROUNDS_IN_MEMORY:
                del self._known_rounds[next(iter(self._known_rounds))]
            self._known_rounds[number] = _parsed(self._round_content(number))
        return self._known_rounds[number]

    def goes_on(self, number: int) -> bool:
        """Whether a round was begun with this study, and not with a smaller one."""
        return self._round(number).study == _digest(self.study)

    def _chunks_of(self, number: int) -> dict[int, int]:
        """Return how many chunks each group of a round had, as far as is known."""
        works = self.works(number)
        whole = {group: work.chunks for group, work in enumerate(works)}
        if number + 1 < self.rounds:
            before = self._round(number + 1).before
            # What another share begins with has none before it, and only finished ones are merged.
            return whole if before is None else dict(enumerate(before))
        if self._results:
            return whole
        return {
            group: max((file.last + 1 for file in self._chunks.get((number, group), ())), default=0)
            for group in range(len(works))
        }

    def left(self, number: int) -> list[tuple[bool, list[tuple[int, int]]]]:
        """Return of each group of a round whether theory is missing, and which chunks, in ranges.

        Of the last round, if it is this study's, all that it was to draw; of others what they had.
        """
        finished = self._chunks_of(number)
        if number + 1 == self.rounds and self.goes_on(number):
            finished = {group: work.chunks for group, work in enumerate(self.works(number))}
        places = self._theory_of_round(number, finished)
        theory = {place[1] for place in places if place not in self._theory}
        gaps = _gaps(self._chunks, number, finished)
        return [(group in theory, gaps[group]) for group in sorted(gaps)]

    def finished(self, number: int, group: int) -> int:
        """Return how many of a group's chunks are finished, from the first on without a gap."""
        end = 0
        for file in self._chunks.get((number, group), ()):
            if file.first != end:
                break
            end = file.last + 1
        return end

    def networks(self) -> dict[int, int]:
        """Return how many of its share's networks every point has, by its name."""
        by_share: dict[Share, dict[int, int]] = {}
        for number in range(self.rounds):
            for group, work in enumerate(self.works(number)):
                done = by_share.setdefault(work.share, {})
                drawn = min(self.finished(number, group) * work.chunk, work.networks)
                ends = np.cumsum(work.count)
                each = np.clip(drawn - (ends - work.count), 0, work.count)
                for name, first, count in zip(
                    work.names.tolist(), work.first.tolist(), each.tolist(), strict=True
                ):
                    if count:
                        done[name] = first + count
        # What is drawn after shares were merged goes on from all of them together.
        found = by_share.pop(self.share, {})
        merged = collections.Counter[int]()
        for part in by_share.values():
            merged.update(part)
        return dict(merged) | found

    # Chunks.

    def add(self, number: int, group: int, chunk: int, found: Found) -> None:
        """Keep what a chunk found, and merge what is to be merged."""
        with sentences(self.folder):
            self._keep(number, group, chunk, chunk, found)
            # If it was made again, what comes after it may be there.
            for last in range(chunk, self.finished(number, group)):
                self._merge_all(number, group, last)

    def _keep(self, number: int, group: int, first: int, last: int, found: Found) -> _File:
        file = _File(
            self.folder / _chunk_name(number, group, first, last), number, group, first, last
        )
        content = sealed.sealed(found.packed(), self._rounds[number], file.place)
        sealed.write(file.path, content)
        those = self._chunks.setdefault((number, group), [])
        those.append(file)
        those.sort(key=lambda one: (one.first, one.last))
        return file

    def _merge_all(self, number: int, group: int, chunk: int) -> None:
        size = _FAN
        while (chunk + 1) % size == 0 and self._merge(number, group, chunk, size):
            size *= _FAN

    def _merge(self, number: int, group: int, last: int, size: int) -> bool:
        """Merge the files of the last ``size`` chunks into one; whether they are one now."""
        those = self._chunks[number, group]
        here = [file for file in those if last - size < file.first and file.last <= last]
        if len(here) == 1:
            return True
        # Some of them were too large to be merged; or were not, by a merge that goes beyond them.
        if not here or len(here) > _FAN:
            return not here
        found = combined(map(self._read, here))
        if found is None or found.nbytes > _MERGED_BYTES:
            return False
        self._keep(number, group, here[0].first, last, found)
        for file in here:
            those.remove(file)
            file.path.unlink()
        return True

    def _read(self, file: _File) -> Found:
        content = sealed.read(file.path, self._rounds[file.round], file.place)
        if content is None:
            raise self._damage(file.path, "is missing or damaged", "draws it again")
        return Found.unpacked(content)

    def total(self, names: np.ndarray) -> Found | None:
        """Return all that is known of some points, in this order; None if there is nothing."""

        def read() -> Found | None:
            return combined(self._found(names), names)

        def look_again() -> None:
            self._look(mend=False)
            self._check_whole()

        return _undisturbed(self.folder, read, look_again)

    def _found(self, names: np.ndarray) -> Iterator[Found]:
        """Yield what is in the files that have networks of some points, in the order of merging."""
        for (number, group), those in sorted(self._chunks.items()):
            work = self.works(number)[group]
            for file in those:
                if np.isin(work.held(file.first, file.last), names).any():
                    yield self._read(file)

    def _look(self, *, mend: bool) -> None:
        """Look at all files of chunks and theory, and know those that are whole.

        To ``mend`` is to remove those that are not, and those that were merged already.
        """
        before, chunks, theory = self._chunks, collections.defaultdict(list), set()
        self._bad = {}
        for path in _files(self.folder / "chunks"):
            match = _CHUNK_NAME.fullmatch(path.name)
            if match and int(match[1]) < self.rounds:
                file = _File(path, *map(int, match.groups()))
                those = before.get((file.round, file.group), ())
                if file in those or self._is_whole(path, file.round, file.place):
                    chunks[file.round, file.group].append(file)
                else:
                    self._bad[path] = "draws it again"
        for key, those in chunks.items():
            merged = [file for file in those if any(file.within(other) for other in those)]
            chunks[key] = [file for file in those if file not in merged]
            for file in merged if mend else ():
                file.path.unlink()
        self._chunks = dict(chunks)
        for path in _files(self.folder / "theory"):
            match = _THEORY_NAME.fullmatch(path.name)
            if match and int(match[1]) < self.rounds:
                place = (int(match[1]), int(match[2]), int(match[3]))
                if place in self._theory or self._is_whole(path, place[0], _theory_place(place)):
                    theory.add(place)
                else:
                    self._bad[path] = "works it out again"
        self._theory = theory
        for path in self._bad if mend else ():
            sealed.discard(path)

    def _is_whole(self, path: Path, number: int, place: str) -> bool:
        return sealed.read(path, self._rounds[number], place) is not None

    # Theory.

    def _theory_of_round(self, number: int, finished: Mapping[int, int]) -> list[Block]:
        """Return the blocks of theory of a round's groups of which something is drawn."""
        return [
            (number, group, block)
            for group, work in enumerate(self.works(number))
            if finished[group]
            for block in np.unique(np.flatnonzero(work.theory) // THEORY_BLOCK).tolist()
        ]

    def has_theory(self, place: Block) -> bool:
        """Whether a block of theory is there."""
        return place in self._theory

    def add_theory(self, place: Block, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a block of theory: ``names``, and arrays of shape (points, statistics, layers)."""
        content = sealed.sealed(npz(arrays), self._rounds[place[0]], _theory_place(place))
        with sentences(self.folder):
            sealed.write(self.folder / _theory_name(*place), content)
        self._theory.add(place)

    def theory_block(self, place: Block) -> dict[str, np.ndarray]:
        """Return a block of theory."""
        path = self.folder / _theory_name(*place)
        content = sealed.read(path, self._rounds[place[0]], _theory_place(place))
        if content is None:
            raise self._damage(path, "is missing or damaged", "works it out again")
        return unpacked(content)

    def theory(self, names: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Yield the blocks of theory that have some points."""
        for place in sorted(self._theory):
            work = self.works(place[0])[place[1]]
            if np.isin(work.names[theory_places(work, place[2])], names).any():
                yield self.theory_block(place)

    # Files.

    def log(self, **what: Any) -> None:
        """Note what was done and when."""
        line = json.dumps({"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **what})
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with sentences(self.folder):
            file = os.open(self.folder / "log.jsonl", flags, 0o644)
            try:
                os.write(file, f"{line}\n".encode())
            finally:
                os.close(file)

    def publish(self, write: Callable[[Path], None]) -> Path:
        """Put the results in their place once ``write`` has made them, elsewhere."""
        path = self.folder / RESULTS
        with sentences(self.folder):
            beside = sealed.beside(path)
            try:
                write(beside)
                self._results = sealed.digest(beside)
                sealed.put(beside, path)
            finally:
                beside.unlink(missing_ok=True)
            self._write_header()
        return path


def theory_places(work: Work, block: int) -> np.ndarray:
    """Return the points of a work whose theory is in a block, by their places."""
    first = block * THEORY_BLOCK
    return first + np.flatnonzero(work.theory[first : first + THEORY_BLOCK])


def works_of(content: bytes) -> tuple[Work, ...]:
    """Return what a round's file says is drawn."""
    return _parsed(content).works


@functools.lru_cache(maxsize=1)
def _parsed(content: bytes) -> _Round:
    arrays = unpacked(content)
    header = json.loads(arrays["header"].tobytes())
    works = []
    for group, fields in enumerate(header["groups"]):
        by_point = {name: arrays[f"{group}/{name}"] for name in _BY_POINT}
        works.append(Work(**{**fields, **by_point, "share": Share(*fields["share"])}))
    return _Round(tuple(works), header["study"], header["before"])


def _gaps(
    chunks: Mapping[tuple[int, int], Sequence[_File]], number: int, finished: Mapping[int, int]
) -> dict[int, list[tuple[int, int]]]:
    """Return which of a round's first so many chunks are not there, by group."""
    found = {}
    for group, count in finished.items():
        gaps: list[tuple[int, int]] = []
        end = 0
        for file in chunks.get((number, group), ()):
            if file.first > end:
                gaps.append((end, min(file.first, count)))
            end = max(end, file.last + 1)
        if end < count:
            gaps.append((end, count))
        found[group] = gaps
    return found


def _check_study_or_nothing(folder: Path) -> None:
    if not folder.is_dir() or any(os.path.lexists(folder / name) for name in _HEADERS):
        return
    strange = {path.name for path in folder.iterdir()} - _BEGUN
    # The first thing that is written may be all there is of one.
    if not all(name.startswith(WRITING) for name in strange):
        raise InputError(
            f"out is {str(folder)!r}, which holds something that is no study; give a new folder, "
            "or one that a study was begun in"
        )


def _lock(folder: Path) -> int:
    path = folder / "lock"
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        sealed.discard(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _undisturbed(
    folder: Path, read: Callable[[], Any], again: Callable[[], None] = lambda: None
) -> Any:
    """Return what is read of a store, looked at again while another process writes to it."""
    for _ in range(_LOOKS):
        try:
            return read()
        except Damage:
            if not _is_written(folder):
                raise
            time.sleep(_BETWEEN)
            with contextlib.suppress(Damage):
                again()
    return read()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_written(folder: Path) -> bool:
    """Whether another process holds the store."""
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


_HEADERS = ("store.json", "store-copy.json")
# Those of points by the million are large.
_ROUNDS_IN_MEMORY = 4


def _with_checksum(known: Mapping[str, Any]) -> bytes:
    plain = json.dumps(known, indent=1, sort_keys=True)
    checksum = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps({**known, "checksum": checksum}, indent=1, sort_keys=True).encode()


def _header(path: Path) -> dict[str, Any] | None:
    """Return what a store.json says; None if it is missing or damaged.

    Raises
    ------
    InputError
        If it is of another version of gradflow.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        known = json.loads(content)
        plain = {name: value for name, value in known.items() if name != "checksum"}
        whole = content == _with_checksum(plain)
        version = known["format"]
    except (ValueError, AttributeError, KeyError, RecursionError):
        return None
    if version != _FORMAT and (whole or "checksum" not in known):
        raise InputError(
            f"{str(path.parent)!r} has format {version}, which this version of gradflow does not "
            f"know; it knows {_FORMAT}"
        )
    return plain if whole else None


def _header_is_gone(folder: Path) -> Damage:
    return Damage(
        folder / _HEADERS[0],
        "and its copy are damaged or missing",
        "what is in rounds and chunks cannot be read without them: give another --out",
    )


def _drawn_with() -> dict[str, Any]:
    """Return what the last bit of a result depends on, beside the plan."""
    device = jax.devices()[0]
    return {
        "gradflow": gradflow.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "random": PRNG,
        "python": platform.python_version(),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "processes": jax.process_count(),
    }


def _digest(study: Study) -> str:
    """Return what tells a study that asks for other networks."""
    return json.dumps(study.asked(), sort_keys=True)


def _fewer_networks(old: Study, new: Study) -> list[str]:
    """Return what a study asks fewer networks of than the one before, each as 'path was …'."""
    if all(axis.networks is None for study in (old, new) for axis in study.axes):
        name = "most" if old.sampling.target else "networks"
        was, now = (getattr(study.sampling, name) for study in (old, new))
        return [f"sampling.{name} was {was}, is {now}"] if now < was else []
    shall: dict[int, int] = {}
    for point in new.points():
        shall[point.name] = max(point.networks, shall.get(point.name, 0))
    fewer = [p for p in old.points() if shall.get(p.name, p.networks) < p.networks]
    found = []
    for point in fewer[:1]:
        fields = [name for axis in old.axes for name in axis.values if name in point.settings]
        where = ", ".join(f"{name} = {point.settings[name]!r}" for name in fields)
        found.append(f"networks at {where} was {point.networks}, is {shall[point.name]}")
    return found + ([f"{len(fewer) - 1} more points have fewer"] if len(fewer) > 1 else [])


def _chunk_name(number: int, group: int, first: int, last: int) -> str:
    return f"chunks/{number:04}-{group:05}-{first:010}-{last:010}.npz"


def _theory_name(number: int, group: int, block: int) -> str:
    return f"theory/{number:04}-{group:05}-{block:06}.npz"


def _theory_place(place: Block) -> str:
    return f"theory {place[1]} {place[2]}"


def _round_name(number: int, copied: bool = False) -> str:
    return f"rounds/{number:04}{'-copy' if copied else ''}.npz"
