"""Writing files whole or not at all, or slab by slab; folders that can be written to."""

import itertools
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gradflow.errors import InputError

if TYPE_CHECKING:
    import xarray


def writable_folder(folder: Path, name: str = "out") -> Path:
    """The folder, made if it is new, after a file was written in it for a test.

    Commands call this before they compute anything that could be lost.

    Raises
    ------
    InputError
        If the folder cannot be made or written to; ``name`` is the option's name.
    """
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
    """The path that writing to ``path`` will write to: a link is followed, and stays.

    Commands call this before they compute anything that could be lost.

    Raises
    ------
    InputError
        If ``path`` is no regular file (a folder, a device, a pipe), or cannot be written;
        ``name`` is the option's name.
    """
    target = Path(os.path.realpath(path))
    try:
        # The mode of the path and not of the target: what /dev/stdout points to may have no path.
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
    """A temporary file to write, which replaces ``path`` at the end, so that no half is ever seen.

    Raises
    ------
    InputError
        As `writable_file` does, or if writing fails.
    """
    target = writable_file(path, name)
    # The name ends alike, because its ending may be the file's format.
    beside = target.with_name(f".{os.getpid()}-{target.name[-40:]}")
    try:
        yield beside
        beside.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {_reason(error)}") from error
    finally:
        with suppress(OSError):  # the first error is the one to report
            beside.unlink(missing_ok=True)


def write_netcdf(dataset: "xarray.Dataset", path: Path) -> Path:
    """Write the dataset, whole or not at all.

    As netCDF 3, which every reader knows, and which takes a tenth of the time of netCDF 4 (HDF5).
    It has no integers of 64 bits: a seed that needs them is written as text.
    """
    large = {
        k: str(v) for k, v in dataset.attrs.items() if isinstance(v, int) and abs(v) >= 1 << 31
    }
    with complete(path) as beside:
        dataset.assign_attrs(large).to_netcdf(beside, engine="scipy")
    return path


def write_text(text: str, path: Path) -> Path:
    """Write text, whole or not at all."""
    with complete(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def write_netcdf_slabs(slabs: "Iterable[xarray.Dataset]", along: str, path: Path) -> None:
    """Write a dataset that is too large for memory, slab by slab along one dimension.

    The file is netCDF 3 and ``along`` its record dimension: records stand one after another at the
    end of the file, behind a header with their number.

    Parameters
    ----------
    slabs
        The dataset's slabs in order, at least one. They differ only in their values along the
        dimension, which is the first of every variable that has it, and have numbers only.
    along
        The dimension's name.
    path
        The file; an existing one is replaced.
    """

    def write(dataset: "xarray.Dataset") -> bytes:
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
