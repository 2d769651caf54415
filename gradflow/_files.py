"""Files that are written whole or not at all, or piece by piece; folders that can be written to."""

import itertools
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xarray

from gradflow.errors import InputError

__all__ = ["complete", "writable_file", "writable_folder", "write_netcdf_slabs"]


def writable_folder(folder: Path, name: str = "out") -> Path:
    """Make the folder and try it, before anything is computed that could be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{name} is {str(folder)!r}, which cannot be written to ({_reason(error)}); it is a "
            "folder, new or not, that can be"
        ) from error
    return folder


def writable_file(path: Path, name: str = "out") -> Path:
    """Return where a file will be written, before anything is computed that could be lost.

    A link is followed: what it points to is written, and the link stays.

    Raises
    ------
    InputError
        If something is there that is no regular file (a folder, a device, a pipe), or nothing can
        be written there.
    """
    target = Path(os.path.realpath(path))
    try:
        # Of the path and not of the target: what /dev/stdout points to may have none.
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise _not_a_file(path, name, f"cannot be written ({_reason(error)})") from error
    if mode is not None and not (stat.S_ISREG(mode) and target.exists()):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise _not_a_file(path, name, f"is {kind}")
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        reason = f"cannot be written ({_reason(error)})"
        if not target.parent.exists():
            reason = f"is in a folder that is not there, {str(target.parent)!r}"
        raise _not_a_file(path, name, reason) from error
    return target


def _not_a_file(path: Path, name: str, reason: str) -> InputError:
    return InputError(
        f"{name} is {str(path)!r}, which {reason}; it is a regular file, or a new one's name in a "
        "folder that can be written to"
    )


@contextmanager
def complete(path: Path, name: str = "file") -> Iterator[Path]:
    """Write beside the file and then put it in place, so that no half of one is ever seen.

    Where that is, and what is refused: `writable_file`.
    """
    target = writable_file(path, name)
    # With the end of its name, which may say of which kind it is.
    beside = target.with_name(f".{os.getpid()}-{target.name[-40:]}")
    try:
        yield beside
        beside.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {_reason(error)}") from error
    finally:
        with suppress(OSError):  # what went wrong has been said
            beside.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def write_netcdf_slabs(slabs: Iterable[xarray.Dataset], along: str, path: Path) -> None:
    """Write a dataset that comes in slabs along a dimension, holding one of them at a time.

    As netCDF 3, of which ``along`` is the record dimension: its records stand one after another at
    the end of the file, behind a header that says how many there are.

    Parameters
    ----------
    slabs
        At least one, alike in all but the values along the dimension, which all that have it have
        as their first, and numbers alone.
    along
        Its name.
    path
        The file; one that is there is written over.
    """

    def write(dataset: xarray.Dataset) -> bytes:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
            beside = Path(folder) / "slab.nc"
            dataset.to_netcdf(beside, engine="scipy", unlimited_dims=[along])
            return beside.read_bytes()

    slabs = iter(slabs)
    first = next(slabs)
    start, records = len(write(first.isel({along: slice(0)}))), 0
    with open(path, "wb") as file:
        header = b""
        for slab in itertools.chain([first], slabs):
            content = write(slab)
            header = header or content[8:start]
            assert content[8:start] == header, "slabs of one dataset have one header"
            file.write(content if not records else content[start:])
            records += slab.sizes[along]
        file.seek(4)
        file.write(records.to_bytes(4, "big"))
