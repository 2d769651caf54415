"""Files that are written whole or not at all, or piece by piece; folders that can be written to."""

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xarray

from gradflow.errors import InputError

__all__ = ["complete", "writable_folder", "write_netcdf_slabs"]


def writable_folder(folder: Path, name: str = "out") -> Path:
    """Make the folder and try it, before anything is computed that could be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"{name} is {str(folder)!r}, which cannot be written to ({reason}); it is a folder, "
            "new or not, that can be"
        ) from error
    return folder


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Write beside the file and then put it in place, so that no half of one is ever seen."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


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
