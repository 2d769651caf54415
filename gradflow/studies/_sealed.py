"""Files with a checksum of their content and of the round that they belong to.

Behind its content a sealed file has a SHA-256 of the content and of its label: the round and study
that it is of, and which part of them. A flipped bit, a missing end and a file of another study are
all noticed when it is read. A file is written under another name, flushed to the disk and then
renamed, so that it is there whole or not at all.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from gradflow.errors import InputError

__all__ = ["WRITING", "Damage", "beside", "digest", "discard", "explained", "put", "read", "sealed"]
__all__ += ["write"]

# How a file's name begins while it is written.
WRITING = ".writing-"
_SEAL = 32


class Damage(InputError):
    """A file of a store cannot be used: it is missing, not whole, or of another study."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{str(path)!r} {reason}; {remedy}")
        self.path = path


def sealed(content: bytes, *label: str) -> bytes:
    """Return the content with its seal behind it."""
    return content + _seal(content, label)


def _seal(content: bytes, label: tuple[str, ...]) -> bytes:
    return hashlib.sha256("\n".join(label).encode() + b"\0" + content).digest()


def read(path: Path, *label: str) -> bytes | None:
    """Return the content of a file that was `sealed` with this label; None if it was not."""
    if not path.is_file():  # nor a folder, a pipe, a link to nothing
        return None
    try:
        whole = path.read_bytes()
    except FileNotFoundError:  # its process has merged it into another
        return None
    content, seal = whole[:-_SEAL], whole[-_SEAL:]
    return content if seal == _seal(content, label) else None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; empty if it is no regular file."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beside(path: Path) -> Path:
    """Return the path under which a file is written before it is renamed to this one."""
    return path.with_name(f"{WRITING}{path.name}")


def write(path: Path, content: bytes) -> None:
    """Write a file with this content, whole or not at all, unless it has that content already."""
    if (
        path.is_file()
        and not path.is_symlink()
        and path.stat().st_size == len(content)
        and path.read_bytes() == content
    ):
        return
    written = beside(path)
    try:
        written.write_bytes(content)
        put(written, path)
    finally:
        written.unlink(missing_ok=True)


def put(written: Path, path: Path) -> None:
    """Flush a file to the disk and then rename it to its path."""
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    if path.is_dir() and not path.is_symlink():
        discard(path)
    written.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def discard(path: Path) -> None:
    """Remove a file or an empty folder; of a link, the link and not its target.

    Raises
    ------
    InputError
        If it is a folder that holds something.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    try:
        path.rmdir()
    except OSError as error:
        raise InputError(
            f"{str(path)!r} is a folder that holds something; a study writes a file there: move "
            "the folder away"
        ) from error


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into an `InputError` that names a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"the disk of {str(folder)!r} is full ({error.strerror}); what is finished is "
                "kept, and the same command resumes the study when there is room"
            ) from error
        if error.errno == errno.ENOENT:
            raise InputError(
                f"out is {str(folder)!r}, of which something was removed while it was written to; "
                "the same command resumes the study with what is left"
            ) from error
        raise InputError(
            f"out is {str(folder)!r}, which cannot be written to "
            f"({(error.strerror or str(error)).lower()}); it is a folder, new or not, that can be"
        ) from error
