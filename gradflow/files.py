"""Files that are written whole or not at all, and folders that can be written to."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradflow.errors import InputError

__all__ = ["complete", "writable_folder"]


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
