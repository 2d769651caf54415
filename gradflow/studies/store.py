"""The store of a study: a folder that holds what is finished, whatever happens to the process.

    study.toml          the study file, as it was given
    store.json          what may not change, whose share it is, and what networks were drawn with
    rounds/0000.npz     which networks of which points a round draws, in which chunks
    chunks/…            what chunks found: estimates that can be merged
    theory/…            what theory says of points
    results.nc          all of it, labelled, when the study is finished
    log.jsonl           when what was done, and how long it took; nothing depends on it
    lock                held by the process that writes

Each file is written beside its place, brought to the disk and then renamed, so that it is there
whole or not at all. A group's chunks are finished in order. Every `_FAN` of them are merged into
one file, and so are those, always the same ones and in the same order: there are few files, and
each estimate has the same bits whether or not the study was interrupted.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import io
import json
import os
import platform
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gradflow.estimation
from gradflow.errors import InputError
from gradflow.estimation import Estimate
from gradflow.studies import description
from gradflow.studies.description import Study
from gradflow.studies.plan import ALL, Share, Work

__all__ = ["Found", "Store", "combined", "works_of"]

_FORMAT = 2
# How a file is called before it is in its place; what there is before store.json.
_WRITING = ".writing-"
_FOLDERS = ("chunks", "theory", "rounds")
_BEGUN = {"lock", "study.toml", *_FOLDERS}
# How many files are merged into one, unless that had more bytes than this.
_FAN = 32
_MERGED_BYTES = 1 << 26
_BY_POINT = ("names", "first", "count")
_FIELDS = ("count", "excluded", "mean", "squares", "log_unit")


@dataclasses.dataclass(frozen=True)
class Found:
    """What networks of some points did; every array has a leading axis of points.

    Attributes
    ----------
    names
        The points', uint64, each once.
    estimates
        Arrays of shape (points, statistics, layers).
    failures
        Shape (points, 2, layers): in how many networks the signal overflowed, and vanished.
    histograms
        By statistic, shape (points, layers, bins + 2): networks below, in and above the bins.
    spectra
        Sums over networks of what `spectra.counted` has of their singular values, if they are
        measured.
    """

    names: np.ndarray
    estimates: Estimate
    failures: np.ndarray
    histograms: Mapping[str, np.ndarray]
    spectra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all of it by name, as files have it."""
        found = {field: getattr(self.estimates, field) for field in _FIELDS}
        found |= {f"histogram/{name}": counts for name, counts in self.histograms.items()}
        found |= {f"spectrum/{name}": sums for name, sums in self.spectra.items()}
        return found | {"names": self.names, "failures": self.failures}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Found":
        """Return what such arrays hold."""

        def below(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

        return cls(
            names=arrays["names"],
            estimates=Estimate(**{field: arrays[field] for field in _FIELDS}),
            failures=arrays["failures"],
            histograms=below("histogram/"),
            spectra=below("spectrum/"),
        )

    @property
    def nbytes(self) -> int:
        """Its size in memory, and in a file."""
        return sum(array.nbytes for array in self.arrays().values())

    def packed(self) -> bytes:
        """Return it as a file's content."""
        return _npz(self.arrays())

    @classmethod
    def unpacked(cls, content: bytes) -> "Found":
        """Return what was `packed`."""
        with np.load(io.BytesIO(content)) as arrays:
            return cls.of(dict(arrays))


def combined(parts: Iterable[Found], names: np.ndarray | None = None) -> Found | None:
    """Return several of one depth merged in their order; None of none.

    With ``names`` only those of these points, in this order, and all of them: those that are in no
    part have a count of 0.
    """
    total: dict[str, np.ndarray] = {}
    place: dict[int, int] = {}
    for part in parts:
        arrays = part.arrays()
        if not total:
            known = part.names[:0] if names is None else names
            total = {key: _empty(array, len(known)) for key, array in arrays.items()}
            total["names"] = known
            place = {name: row for row, name in enumerate(known.tolist())}
        listed = part.names.tolist()
        new = [name for name in listed if name not in place]
        if new and names is None:
            place |= {name: len(place) + n for n, name in enumerate(new)}
            total = {
                key: np.concatenate([array, _empty(array, len(new))])
                for key, array in total.items()
            }
            total["names"][len(place) - len(new) :] = new
        here = np.array([n for n, name in enumerate(listed) if name in place], int)
        there = np.array([place[listed[n]] for n in here], int)
        merged = gradflow.estimation.merge(
            [
                Estimate(**{field: values[field][rows] for field in _FIELDS})
                for values, rows in ((total, there), (arrays, here))
            ]
        )
        for field in _FIELDS:
            total[field][there] = getattr(merged, field)
        for key in total:
            if key not in (*_FIELDS, "names"):
                total[key][there] += arrays[key][here]
    return Found.of(total) if total else None


def _empty(like: np.ndarray, rows: int) -> np.ndarray:
    return np.zeros((rows, *like.shape[1:]), like.dtype)


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of chunks ``first`` to ``last`` of a group in a round."""

    path: Path
    round: int
    group: int
    first: int
    last: int


class Store:
    """The folder of one study, held by this process while it is open."""

    def __init__(self, folder: Path, study: Study, share: Share = ALL) -> None:
        self.folder, self.study, self.share = folder, study, share

    # Opening.

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, study: Study, share: Share = ALL) -> Iterator["Store"]:
        """Make or go on with the store of a study, and let nobody else write to it meanwhile.

        Raises
        ------
        InputError
            If the folder cannot be written to, another process writes to it, it holds something
            else or another share, or the study has changed by more than new points and more
            networks.
        """
        with contextlib.ExitStack() as stack:
            with _sentences(folder):
                fresh = not (folder / "store.json").exists()
                # The first thing that is written may be all there is of one.
                strange = {p.name for p in folder.iterdir()} - _BEGUN if folder.is_dir() else set()
                if fresh and not all(name.startswith(_WRITING) for name in strange):
                    raise InputError(
                        f"out is {str(folder)!r}, which holds something that is no study; give a "
                        "new folder, or one that a study was begun in"
                    )
                folder.mkdir(parents=True, exist_ok=True)
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise InputError(
                        f"out is {str(folder)!r}, where another process writes its study; wait for "
                        "it, stop it, or give another folder"
                    ) from error
                store = cls(folder, study, share)
                store._prepare(fresh)
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
        with _sentences(folder):
            if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                raise InputError(
                    f"out is {str(folder)!r}, which holds something; give a new folder"
                )
            beside = folder.with_name(f"{_WRITING}{folder.name}")
            shutil.rmtree(beside, ignore_errors=True)
            try:
                for name in _FOLDERS:
                    (beside / name).mkdir(parents=True)
                whole = cls(beside, shares[0].study)
                for share in shares:
                    whole._take_in(share)
                yield whole
                if folder.exists():
                    folder.rmdir()
                beside.replace(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    def _take_in(self, share: "Store") -> None:
        """Copy the rounds of a share behind those that are there."""
        before = self.rounds
        for name in _FOLDERS:
            for path in sorted((share.folder / name).glob("*.npz")):
                number, rest = int(path.name[:4]), path.name[4:]
                self._write(f"{name}/{before + number:04}{rest}", path.read_bytes())
        known = self.drawn_with if before else []
        self._write_header([*known, *(d for d in share.drawn_with if d not in known)])
        log = share.folder / "log.jsonl"
        if log.exists():
            with open(self.folder / "log.jsonl", "ab") as file:
                file.write(log.read_bytes())

    @classmethod
    def of(cls, folder: Path) -> "Store":
        """Return a folder's store, to read.

        Raises
        ------
        InputError
            If it is none.
        """
        if not (folder / "store.json").is_file():
            raise InputError(
                f"folder is {str(folder)!r}, which holds no study; it is the --out of a "
                "`gradflow study FILE`"
            )
        store = cls(folder, description.load(folder / "study.toml"))
        store.share = Share(*store._header["share"])
        return store

    def _prepare(self, fresh: bool) -> None:
        for name in _FOLDERS:
            (self.folder / name).mkdir(exist_ok=True)
        for left in self.folder.rglob(f"{_WRITING}*"):
            left.unlink()
        # Merged files are there before what they were made of is gone.
        for file in self._files():
            if any(_within(file, other) for other in self._files()):
                file.path.unlink()
        before = [] if fresh else self.drawn_with
        if not fresh:
            self._check_change()
        # All there was to the last bit: what a study goes on with may be another machine.
        now = _drawn_with()
        drawn_with = before if now in before else [*before, now]
        self._write_header(drawn_with)
        # What was to be merged when the process ended.
        for file in self._files():
            if not any(o.first > file.last for o in self._files() if _alike(o, file)):
                self._merge_all(file.round, file.group, file.last)

    def _write_header(self, drawn_with: Sequence[Mapping[str, Any]]) -> None:
        known = {"format": _FORMAT, "fixed": self.study.fixed(), "drawn_with": drawn_with}
        known["share"] = self.share
        self._write("study.toml", self.study.text.encode())
        self._write("store.json", json.dumps(known, indent=1, sort_keys=True).encode())

    def _check_change(self) -> None:
        share = Share(*self._header["share"])
        if share != self.share:
            raise InputError(
                f"share is {self.share}, and {str(self.folder)!r} holds share {share}; give "
                f"--share {share}, or another folder"
            )
        old = description.load(self.folder / "study.toml")
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
        return len(list((self.folder / "rounds").glob("*.npz")))

    def begin(self, works: Sequence[Work]) -> int:
        """Write down what the next round draws, and return its number.

        Results of fewer networks or points are no longer those of the study.
        """
        (self.folder / "results.nc").unlink(missing_ok=True)
        number = self.rounds
        arrays: dict[str, np.ndarray] = {}
        plain = []
        for group, work in enumerate(works):
            fields = {field.name: getattr(work, field.name) for field in dataclasses.fields(work)}
            for name in _BY_POINT:
                arrays[f"{group}/{name}"] = fields.pop(name)
            plain.append(fields)
        header = {"groups": plain, "study": _digest(self.study)}
        arrays["header"] = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
        self._write(f"rounds/{number:04}.npz", _npz(arrays))
        return number

    def round_file(self, number: int) -> bytes:
        """Return the file of a round."""
        return (self.folder / "rounds" / f"{number:04}.npz").read_bytes()

    def works(self, number: int) -> tuple[Work, ...]:
        """Return what a round draws."""
        return works_of(self.round_file(number))

    def goes_on(self, number: int) -> bool:
        """Whether a round was begun with this study, and not with a smaller one."""
        return bool(_header(self.round_file(number))["study"] == _digest(self.study))

    def finished(self, number: int, group: int) -> int:
        """Return how many of a group's chunks are finished; they are the first ones."""
        ends = [f.last + 1 for f in self._files() if (f.round, f.group) == (number, group)]
        return max(ends, default=0)

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
        """Keep what a chunk found, the next one of its group, and merge what is to be merged."""
        with _sentences(self.folder):
            self._write(_chunk_name(number, group, chunk, chunk), found.packed())
            self._merge_all(number, group, chunk)

    def _merge_all(self, number: int, group: int, chunk: int) -> None:
        size = _FAN
        while (chunk + 1) % size == 0 and self._merge(number, group, chunk, size):
            size *= _FAN

    def _merge(self, number: int, group: int, last: int, size: int) -> bool:
        """Merge the files of the last ``size`` chunks into one; whether they are one now."""
        here = [
            file
            for file in self._files()
            if (file.round, file.group) == (number, group) and file.first > last - size
        ]
        if len(here) == 1:
            return True
        if len(here) > _FAN:  # some of them were too large to be merged
            return False
        found = combined(Found.of(_arrays(file.path)) for file in here)
        if found is None or found.nbytes > _MERGED_BYTES:
            return False
        self._write(_chunk_name(number, group, here[0].first, last), found.packed())
        for file in here:
            file.path.unlink()
        return True

    def found(self, names: np.ndarray) -> Iterator[Found]:
        """Yield what is in the files that have networks of some points, in the order of merging."""
        works = [self.works(number) for number in range(self.rounds)]
        for file in self._files():
            held = works[file.round][file.group].held(file.first, file.last)
            if np.isin(held, names).any():
                yield Found.of(_arrays(file.path))

    def _files(self) -> list[_File]:
        return [
            _File(path, *map(int, path.stem.split("-")))
            for path in sorted((self.folder / "chunks").glob("*.npz"))
        ]

    # Theory.

    def has_theory(self, name: str) -> bool:
        """Whether a block of theory is there."""
        return (self.folder / "theory" / f"{name}.npz").exists()

    def add_theory(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a block of theory: ``names``, and arrays of shape (points, statistics, layers)."""
        with _sentences(self.folder):
            self._write(f"theory/{name}.npz", _npz(arrays))

    def theory_block(self, name: str) -> dict[str, np.ndarray]:
        """Return a block of theory."""
        return _arrays(self.folder / "theory" / f"{name}.npz")

    def theory(self, names: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Yield the blocks of theory that have some points."""
        for path in sorted((self.folder / "theory").glob("*.npz")):
            if np.isin(_arrays(path, "names")["names"], names).any():
                yield _arrays(path)

    # Files.

    @property
    def drawn_with(self) -> list[dict[str, Any]]:
        """Versions and machines that the networks were drawn with."""
        return list(self._header["drawn_with"])

    @property
    def _header(self) -> dict[str, Any]:
        known: dict[str, Any] = json.loads((self.folder / "store.json").read_text("utf-8"))
        if known["format"] != _FORMAT:
            raise InputError(
                f"{str(self.folder)!r} has format {known['format']}, which this version of "
                f"gradflow does not know; it knows {_FORMAT}"
            )
        return known

    def log(self, **what: Any) -> None:
        """Note what was done and when."""
        line = json.dumps({"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **what})
        with (
            _sentences(self.folder),
            open(self.folder / "log.jsonl", "a", encoding="utf-8") as file,
        ):
            file.write(f"{line}\n")

    def publish(self, name: str, write: Callable[[Path], None]) -> Path:
        """Put a file in its place once ``write`` has made it, elsewhere."""
        with _sentences(self.folder):
            beside = self._beside(name)
            try:
                write(beside)
                self._put(beside, name)
            finally:
                beside.unlink(missing_ok=True)
        return self.folder / name

    def _beside(self, name: str) -> Path:
        path = self.folder / name
        return path.with_name(f"{_WRITING}{path.name}")

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        if path.exists() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return
        beside = self._beside(name)
        try:
            beside.write_bytes(content)
            self._put(beside, name)
        finally:
            beside.unlink(missing_ok=True)

    def _put(self, beside: Path, name: str) -> None:
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        path = self.folder / name
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@functools.lru_cache(maxsize=4)
def works_of(content: bytes) -> tuple[Work, ...]:
    """Return what a round's file says is drawn; asked for again for every group of a study."""
    plain = _header(content)["groups"]
    with np.load(io.BytesIO(content)) as arrays:
        return tuple(
            Work(
                share=Share(*fields.pop("share")),
                **fields,
                **{name: arrays[f"{group}/{name}"] for name in _BY_POINT},
            )
            for group, fields in enumerate(plain)
        )


def _header(content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content)) as arrays:
        return dict(json.loads(arrays["header"].tobytes()))


def _drawn_with() -> dict[str, Any]:
    """Return what the last bit of a result depends on, beside the plan."""
    device = jax.devices()[0]
    return {
        "gradflow": gradflow.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
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


def _within(file: _File, other: _File) -> bool:
    inside = other.first <= file.first and file.last <= other.last
    return _alike(file, other) and file != other and inside


def _alike(file: _File, other: _File) -> bool:
    return (file.round, file.group) == (other.round, other.group)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the arrays as a file, the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Return the arrays of a file, or some of them."""
    try:
        with np.load(path) as found:
            return {name: found[name] for name in names or found}
    except (EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{str(path)!r} is damaged ({' '.join(str(error).split())}); the study takes another "
            "folder"
        ) from error


@contextlib.contextmanager
def _sentences(folder: Path) -> Iterator[None]:
    """Say in a sentence what the disk refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"the disk of {str(folder)!r} is full ({error.strerror}); what is finished is "
                "kept, and the same command goes on from there when there is room"
            ) from error
        raise InputError(
            f"out is {str(folder)!r}, which cannot be written to "
            f"({(error.strerror or str(error)).lower()}); it is a folder, new or not, that can be"
        ) from error
