"""The store of a study: a folder that holds what is finished, whatever happens to the process.

    study.toml          the study file, as it was given
    store.json          the same text, the share, versions that networks were drawn with, and the
                        checksums of rounds and results; store-copy.json is the same again
    rounds/, chunks/, theory/
                        the networks that were drawn, measurements, and theory: see `_rounds`
    results.nc          all of it, labelled, when the study is finished
    log.jsonl           when each chunk was finished, and how long it took; nothing depends on it
    lock                held by the process that writes

Whoever reads a store checks all of it first. A damaged file is reported with the command that makes
it again. store.json and the rounds' files, without which no other can be read, are there twice.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gradflow
from gradflow._arguments import PRNG
from gradflow.errors import InputError
from gradflow.studies import _sealed, _study_file
from gradflow.studies._measurements import Measurements
from gradflow.studies._plan import WHOLE, Share, Task
from gradflow.studies._rounds import FOLDERS, Rounds, TheoryChunk, round_name, undisturbed
from gradflow.studies._sealed import WRITING, Damage, explained
from gradflow.studies._study import Study, differences

__all__ = ["Store"]

_FORMAT = 4
_HEADERS = ("store.json", "store-copy.json")
# What there may be before store.json.
_BEFORE_HEADER = {"lock", "study.toml", *FOLDERS}


class Store:
    """The folder of one study; an empty store without a folder until it is `locked`.

    Attributes
    ----------
    folder, study, share
        The folder, its study and the share of it.
    rounds
        The rounds that were begun, with what is finished of each.
    drawn_with
        Versions and machines that the networks were drawn with.
    """

    RESULTS = "results.nc"

    def __init__(self, folder: Path, study: Study, share: Share = WHOLE) -> None:
        self.folder, self.study, self.share = folder, study, share
        self.rounds = Rounds(folder, study, share)
        self.drawn_with: list[dict[str, Any]] = []
        # The checksum of the results, if they are those of the study.
        self._results: str | None = None

    # Opening.

    @contextlib.contextmanager
    def locked(self) -> Iterator["Store"]:
        """Make the folder, or resume the study in it, and let no other process write to it.

        Files that are damaged or of another study are removed: they are left to be made again.

        Raises
        ------
        InputError
            If the folder cannot be written to, another process writes to it, it holds something
            else or another share, store.json or a round is gone with its copy, or the study has
            changed by more than new points and more networks.
        """
        with contextlib.ExitStack() as stack:
            with explained(self.folder):
                self._check_study_or_nothing()
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = self._lock_file()
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise InputError(
                        f"out is {str(self.folder)!r}, where another process writes its study; "
                        "wait for it, stop it, or give another folder"
                    ) from error
                self._prepare()
            yield self

    def _check_study_or_nothing(self) -> None:
        folder = self.folder
        if not folder.is_dir() or any(os.path.lexists(folder / name) for name in _HEADERS):
            return
        unknown = {path.name for path in folder.iterdir()} - _BEFORE_HEADER
        # A study that was interrupted at once may have left an unfinished file alone.
        if not all(name.startswith(WRITING) for name in unknown):
            raise InputError(
                f"out is {str(folder)!r}, which holds something that is no study; give a new "
                "folder, or one that a study was begun in"
            )

    def _lock_file(self) -> int:
        path = self.folder / "lock"
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            _sealed.discard(path)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

    def _prepare(self) -> None:
        for name in ("", *FOLDERS):
            (self.folder / name).mkdir(exist_ok=True)
            for unfinished in (self.folder / name).glob(f"{WRITING}*"):
                _sealed.discard(unfinished)
        header = self._header_that_fits()
        if header is not None:
            self._take(header)
            self._check_change(_study_file.parse(header["text"]), Share(*header["share"]))
            if header["text"] != self.study.text:
                self._set_results(None)
        self.rounds.rewrite()
        log = self.folder / "log.jsonl"
        if os.path.lexists(log) and not stat.S_ISREG(log.lstat().st_mode):
            _sealed.discard(log)
        self.rounds.scan(remove=True)
        # A study may be resumed on another machine, whose results differ in their last bits.
        now = _drawn_with()
        self.drawn_with += [now] if now not in self.drawn_with else []
        self._write_header()
        self.rounds.finish_merging()

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
            store: Store = undisturbed(folder, lambda: cls._checked(folder))
        except OSError as error:
            raise InputError(
                f"folder is {str(folder)!r}, which cannot be read "
                f"({(error.strerror or str(error)).lower()})"
            ) from error
        return store

    @classmethod
    def _checked(cls, folder: Path) -> "Store":
        first, copy = (_header(folder / name) for name in _HEADERS)
        header = first or copy
        if header is None:
            raise _header_is_gone(folder)
        study = _study_file.parse(header["text"], allow_imports=None)
        store = cls(folder, study, Share(*header["share"]))
        rounds = store.rounds
        for name, content in zip(_HEADERS, (first, copy), strict=True):
            if content is None:
                raise rounds.damage(folder / name, "is damaged or missing", "writes it again")
        if first != copy:
            raise rounds.damage(
                folder / _HEADERS[0],
                f"differs from {_HEADERS[1]}, as one that was changed or is of another study",
                "resumes the study with the one that fits",
            )
        store._take(header)
        text = hashlib.sha256(header["text"].encode()).hexdigest()
        if _sealed.digest(folder / "study.toml") != text:
            raise Damage(
                folder / "study.toml",
                "is not the file that the study was last run with, or is missing",
                f"`gradflow study FILE --out {folder}` with that file writes it again",
            )
        for number in range(len(rounds)):
            for copied in (False, True):
                if rounds.read(number, copied) is None:
                    raise rounds.damage(
                        folder / round_name(number, copied),
                        "is damaged, missing or of another study",
                        "writes it again from its copy",
                    )
        rounds.scan()
        rounds.check()
        if store._results and _sealed.digest(folder / cls.RESULTS) != store._results:
            raise rounds.damage(
                folder / cls.RESULTS,
                "is missing, damaged or of another study",
                "assembles the results again",
            )
        return store

    @classmethod
    @contextlib.contextmanager
    def merged(cls, folder: Path, shares: Sequence["Store"]) -> Iterator["Store"]:
        """Make one store of all shares of a study, which is there when the context is left.

        Raises
        ------
        InputError
            If the folder holds something, or cannot be written to.
        """
        with explained(folder):
            if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
                raise InputError(
                    f"out is {str(folder)!r}, which holds something; give a new folder"
                )
            beside = _sealed.beside(folder)
            shutil.rmtree(beside, ignore_errors=True)
            try:
                for name in FOLDERS:
                    (beside / name).mkdir(parents=True)
                whole = cls(beside, shares[0].study)
                for share in shares:
                    whole._take_in(share)
                whole.rounds.scan()
                whole._write_header()
                yield whole
                if folder.exists():
                    folder.rmdir()
                beside.replace(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    def _take_in(self, share: "Store") -> None:
        self.rounds.take_in(share.rounds)
        self.drawn_with += [d for d in share.drawn_with if d not in self.drawn_with]
        log = share.folder / "log.jsonl"
        if log.is_file() and not log.is_symlink():
            with open(self.folder / "log.jsonl", "ab") as together:
                together.write(log.read_bytes())

    # store.json.

    @property
    def results(self) -> Path | None:
        """The labelled file, if the study is finished."""
        return self.folder / self.RESULTS if self._results else None

    def _set_results(self, checksum: str | None) -> None:
        self._results = checksum
        self.rounds.complete = checksum is not None

    def _take(self, header: Mapping[str, Any]) -> None:
        self.drawn_with = list(header["drawn_with"])
        self.rounds.checksums = list(header["rounds"])
        self._set_results(header["results"])

    def _header_that_fits(self) -> dict[str, Any] | None:
        """Return the content of store.json or its copy, whichever fits the rounds; None of none.

        Raises
        ------
        Damage
            If there are rounds or chunks that neither fits.
        """
        headers = [header for name in _HEADERS if (header := _header(self.folder / name))]
        gone = []
        fitting = []
        for header in headers:
            self.rounds.checksums = header["rounds"]
            missing = [n for n in range(len(self.rounds)) if self.rounds.whole(n) is None]
            gone += missing[:1]
            fitting += [header] if not missing else []
        self.rounds.checksums = []
        if fitting:
            return max(fitting, key=lambda header: len(header["rounds"]))  # the first of them
        if gone:
            raise Damage(
                self.folder / round_name(gone[0]),
                "and its copy are damaged, missing or of another study",
                "the chunks cannot be read without it: give another --out",
            )
        if any(any((self.folder / name).iterdir()) for name in FOLDERS):
            raise _header_is_gone(self.folder)
        return None

    def _write_header(self) -> None:
        header = {"format": _FORMAT, "text": self.study.text, "share": self.share}
        header |= {"drawn_with": self.drawn_with, "rounds": self.rounds.checksums}
        content = _with_checksum(header | {"results": self._results})
        for name in _HEADERS:
            _sealed.write(self.folder / name, content)
        _sealed.write(self.folder / "study.toml", self.study.text.encode())

    def _check_change(self, old: Study, share: Share) -> None:
        if share != self.share:
            raise InputError(
                f"share is {self.share}, and {str(self.folder)!r} holds share {share}; give "
                f"--share {share}, or another folder"
            )
        new = self.study
        if old.text == new.text:
            return
        changed = differences(old.fixed(), new.fixed())
        if not changed:
            lost = {point.name for point in old.points()} - {point.name for point in new.points()}
            if lost:
                changed = differences(
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

    # Writing.

    def begin(self, tasks: Sequence[Task]) -> None:
        """Begin a round; results of fewer networks or points are no longer those of the study."""
        with explained(self.folder):
            self.rounds.append(tasks)
            self._set_results(None)
            self._write_header()
            (self.folder / self.RESULTS).unlink(missing_ok=True)

    def add(
        self, number: int, task: int, chunk: int, measurements: Measurements, seconds: float
    ) -> None:
        """Write a chunk of a round's task; ``seconds`` is the time it took, for the log."""
        with explained(self.folder):
            self.rounds.add(number, task, chunk, measurements)
            self._log(round=number, task=task, chunk=chunk, seconds=round(seconds, 3))

    def add_theory(
        self, chunk: TheoryChunk, arrays: Mapping[str, np.ndarray], seconds: float
    ) -> None:
        """Write a chunk of theory; ``seconds`` is the time it took, for the log."""
        with explained(self.folder):
            self.rounds.add_theory(chunk, arrays)
            taken = round(seconds, 3)
            self._log(round=chunk.round, task=chunk.task, theory=chunk.number, seconds=taken)

    def _log(self, **entry: Any) -> None:
        line = json.dumps({"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entry})
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        file = os.open(self.folder / "log.jsonl", flags, 0o644)
        try:
            os.write(file, f"{line}\n".encode())
        finally:
            os.close(file)

    def publish(self, write: Callable[[Path], None]) -> Path:
        """Write the results, by ``write``, whole or not at all; their path."""
        path = self.folder / self.RESULTS
        with explained(self.folder):
            beside = _sealed.beside(path)
            try:
                write(beside)
                self._set_results(_sealed.digest(beside))
                _sealed.put(beside, path)
            finally:
                beside.unlink(missing_ok=True)
            self._write_header()
        return path


def _with_checksum(header: Mapping[str, Any]) -> bytes:
    plain = json.dumps(header, indent=1, sort_keys=True)
    checksum = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps({**header, "checksum": checksum}, indent=1, sort_keys=True).encode()


def _header(path: Path) -> dict[str, Any] | None:
    """Return the content of a store.json; None if it is missing or damaged.

    Raises
    ------
    InputError
        If it is of another version of gradflow.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        header = json.loads(content)
        plain = {name: value for name, value in header.items() if name != "checksum"}
        whole = content == _with_checksum(plain)
        version = header["format"]
    except (ValueError, AttributeError, KeyError, RecursionError):
        return None
    if version != _FORMAT and (whole or "checksum" not in header):
        raise InputError(
            f"{str(path.parent)!r} has format {version}, which this version of gradflow does not "
            f"know; it knows {_FORMAT}"
        )
    return plain if whole else None


def _header_is_gone(folder: Path) -> Damage:
    return Damage(
        folder / _HEADERS[0],
        "and its copy are damaged or missing",
        "rounds and chunks cannot be read without them: give another --out",
    )


def _drawn_with() -> dict[str, Any]:
    """Versions and devices that decide the last bit of a result, beside the plan."""
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


def _fewer_networks(old: Study, new: Study) -> list[str]:
    """Return, as 'path was …', the points that a study asks fewer networks of than before."""
    if all(axis.networks is None for study in (old, new) for axis in study.axes):
        name = "most" if old.sampling.target else "networks"
        was, now = (getattr(study.sampling, name) for study in (old, new))
        return [f"sampling.{name} was {was}, is {now}"] if now < was else []
    wanted: dict[int, int] = {}
    for point in new.points():
        wanted[point.name] = max(point.networks, wanted.get(point.name, 0))
    fewer = [p for p in old.points() if wanted.get(p.name, p.networks) < p.networks]
    if not fewer:
        return []
    point = fewer[0]
    fields = [name for axis in old.axes for name in axis.values if name in point.settings]
    where = ", ".join(f"{name} = {point.settings[name]!r}" for name in fields)
    listed = [f"networks at {where} was {point.networks}, is {wanted[point.name]}"]
    return listed + ([f"{len(fewer) - 1} more points have fewer"] if len(fewer) > 1 else [])
