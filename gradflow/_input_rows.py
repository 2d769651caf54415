"""Batches of inputs: which kinds there are, how they are made or read, and what they are in words.

`data.inputs` makes a batch of them. Nothing here is random twice: the numbers of `normal`, `sphere`
and `coordinates` come from the raw bits of a generator with a fixed seed, row by row, so that a
batch begins with the inputs of a smaller one.
"""

import csv
import functools
import hashlib
import io
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradflow._checks import unknown_name
from gradflow._entries import clipped, text
from gradflow.errors import InputError

__all__ = ["CORRELATED", "FILES", "IMAGES", "IMAGE_SHAPES", "KINDS", "NONE"]
__all__ += ["check_source", "content", "counted"]
__all__ += ["described", "digest", "is_file", "kind_of", "made", "most", "natural_width", "numbers"]
__all__ += ["read", "scaled", "sites"]

# What files of inputs end with.
FILES = (".npz", ".npy", ".csv")
# Images that gradflow has at hand: how many, and the pixels of each.
IMAGES = {"digits": (1797, 64), "mnist": (5000, 784)}
IMAGE_SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1)}
# What `input` may be, and what these are in words.
KINDS = {
    "cosines": "cosines, of the correlation that is asked for",
    "normal": "vectors of independent N(0, 1) components",
    "sphere": "random directions",
    "one-hot": "one-hot vectors",
    "tokens": "one-hot vectors of tokens that are drawn",
    "coordinates": "points that are uniform in [-1, 1]^d",
    "digits": "standardised images of handwritten digits",
    "mnist": "standardised images of MNIST",
}
# Kinds whose inputs may be asked to be correlated.
CORRELATED = ("cosines", "normal", "sphere")
# The text of files for no data.
NONE = "none"
# Components of `coordinates` where nothing says how many.
_COORDINATES = 2


def check_source(path: str, value: object) -> str:
    """Check what `data` may be in a file or a command: images by name, or a file by its ending."""
    name = text(path, value)
    if name not in (*IMAGES, NONE) and Path(name).suffix.lower() not in FILES:
        names = [*IMAGES, f"a path that ends in {', '.join(FILES)}"]
        raise InputError(f"{path}: {unknown_name('data', clipped(name), names)}")
    return name


def kind_of(input: str | None, data: str | None) -> str:
    """The kind of inputs that two options mean together: one of `KINDS`, or a file's path.

    Raises
    ------
    InputError
        If both are given, or one is unknown.
    """
    if data is None or data == NONE:
        if input is not None and input not in KINDS:
            raise unknown_name("input", input, KINDS)
        return input or "cosines"
    if input is not None:
        raise InputError(f"data is {data!r} and input is {input!r}; give one of them")
    return check_source("data", data)


def is_file(data: str | None) -> bool:
    """Whether `data` is a file's path, not a name of images."""
    return data is not None and data not in (*KINDS, NONE)


def natural_width(kind: str) -> int | None:
    """The number of components that inputs of a kind have of themselves, if it is fixed."""
    if kind in IMAGES:
        return IMAGES[kind][1]
    if kind in KINDS:
        return _COORDINATES if kind == "coordinates" else None
    return read(kind).shape[1]


def most(kind: str, width: int) -> int | None:
    """How many inputs of a kind there are, None for any number."""
    if kind in IMAGES:
        return IMAGES[kind][0]
    if kind in KINDS:
        return width if kind in ("cosines", "one-hot") else None
    return len(read(kind))


def counted(kind: str, width: int) -> str:
    """What there are `most` of."""
    if kind in IMAGES:
        return {"digits": "digit images", "mnist": "images of MNIST"}[kind]
    return f"{kind} of width {width}" if kind in KINDS else f"inputs in {kind!r}"


def described(kind: str, rows: np.ndarray) -> str:
    """A batch in words: how many, of what, and what matters of them at infinite width."""
    what = KINDS.get(kind, f"the first of {kind}")
    count, width = rows.shape
    squares = np.mean(rows**2, axis=1)
    low, high = (f"{square:.4g}" for square in (squares.min(), squares.max()))
    sentence = f"{count} of width {width}, {what}; mean square {low}"
    return sentence if low == high else f"{sentence} to {high}"


def sites(kind: str, rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The rows as inputs of a convolutional network: their positions one after the other.

    Parameters
    ----------
    kind, rows
        A batch.
    shape
        Of an input's positions, then channels; () of inputs that are vectors.

    Raises
    ------
    InputError
        If the inputs are images of another shape.
    """
    if not shape:
        return rows
    own = IMAGE_SHAPES.get(kind, tuple(shape))
    if own != tuple(shape):
        raise InputError(
            f"shape is {list(shape[:-1])} with {shape[-1]} channels, and images of {kind} have "
            f"{list(own[:-1])} with one"
        )
    return rows.reshape(-1, shape[-1])


# Made.


def made(kind: str, batch: int, width: int, correlation: float | None) -> np.ndarray:
    """A batch of a kind that is made; all but `one-hot` and `coordinates` have unit mean square.

    With a correlation, of each two inputs: those of `cosines` and `sphere` have it exactly, those
    of `normal` in the mean.
    """
    if kind == "one-hot":
        return np.eye(batch, width)
    if kind == "tokens":
        return np.eye(width)[(_uniform(batch) * width).astype(int)]
    if kind == "coordinates":
        return 2 * _uniform(batch, width) - 1
    if kind == "cosines":
        order = np.roll(np.arange(width), -1)[:batch, None]
        rows = np.cos(np.pi * order * (np.arange(width) + 0.5) / width)
        rows *= np.sqrt(np.where(order > 0, 2, 1))
    else:
        from scipy.special import ndtri  # noqa: PLC0415  (seldom needed)

        rows = ndtri(_uniform(batch, width))
    if correlation is None:
        return rows
    if kind == "sphere":
        rows = math.sqrt(width) * np.linalg.qr(rows.T)[0].T
    # The symmetric root of the matrix of correlations, whose eigenvalues are two.
    alike, apart = np.sqrt(max(1 + (batch - 1) * correlation, 0)), np.sqrt(1 - correlation)
    return np.asarray((apart * np.eye(batch) + (alike - apart) / batch) @ rows)


def _uniform(*shape: int) -> np.ndarray:
    """Numbers that are uniform in (0, 1): the upper 53 of each 64 bits."""
    bits = np.random.PCG64(0).random_raw(math.prod(shape)).reshape(shape)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def scaled(rows: np.ndarray, mean_square: float) -> np.ndarray:
    """The rows, each with this mean square.

    Raises
    ------
    InputError
        If a row has nothing but zeros.
    """
    square = (rows**2).mean(axis=1, keepdims=True)
    if not square.all():
        raise InputError(
            f"mean_square is {mean_square!r}, and input {int(square.argmin())} has nothing but "
            "zeros; leave it out"
        )
    return rows * np.sqrt(mean_square / square)


# Read.


class _Stamp(NamedTuple):
    """A file, and what tells its content from another one's."""

    path: str
    size: int
    changed: int


def _stamp(path: str) -> _Stamp:
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:
        raise _unreadable("data", path, error) from error
    return _Stamp(path, found.st_size, found.st_mtime_ns)


def read(path: str) -> np.ndarray:
    """The inputs in a file, shape (inputs, components), in float64.

    An .npy file is the array, of shape (inputs, …); an .npz file has it as ``inputs``, or has one
    array alone; a .csv file has an input in every line, and may begin with a line of names.

    Raises
    ------
    InputError
        If the file cannot be read, or is not of numbers, all of them finite.
    """
    return _read(_stamp(path))[0]


def digest(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return _read(_stamp(path))[1]


@functools.lru_cache(maxsize=4)
def _read(stamp: _Stamp) -> tuple[np.ndarray, str]:
    path = stamp.path
    bytes_ = content("data", path)
    suffix = Path(path).suffix.lower()
    values = _csv(path, bytes_) if suffix == ".csv" else _numpy(path, bytes_, suffix)
    rows = numbers(f"data {path!r}", values).astype(np.float64)
    if rows.ndim < 2 or 0 in rows.shape:
        raise InputError(
            f"data is {path!r}, of shape {rows.shape}; it is (inputs, components), at least one of "
            "each"
        )
    rows = rows.reshape(len(rows), -1)
    if count := np.count_nonzero(bad := ~np.isfinite(rows)):
        row, column = divmod(int(bad.argmax()), rows.shape[1])
        raise InputError(
            f"data is {path!r}, of which {count} of {rows.size} numbers are not finite, the first "
            f"in row {row + 1}, column {column + 1}"
        )
    rows.setflags(write=False)
    return rows, hashlib.sha256(bytes_).hexdigest()


def _numpy(path: str, bytes_: bytes, suffix: str) -> Any:
    try:
        file = np.load(io.BytesIO(bytes_), allow_pickle=False)
        if isinstance(file, np.ndarray):
            if suffix == ".npy":
                return file
            raise ValueError
        names = list(file.files)
        name = names[0] if len(names) == 1 else "inputs"
        if name in names:
            return file[name]
    except Exception as error:  # there is hardly one that a damaged file cannot cause
        raise InputError(
            f"data is {path!r}, which is not an {suffix} file of plain numbers, or is damaged"
        ) from error
    raise InputError(
        f"data is {path!r}, which has no array 'inputs' and has {', '.join(names) or 'none'}"
    )


def _csv(path: str, bytes_: bytes) -> np.ndarray:
    try:
        found = enumerate(csv.reader(io.StringIO(bytes_.decode("utf-8-sig"), newline="")), 1)
        lines = [(number, line) for number, line in found if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data is {path!r}, which is not text with commas between") from error
    rows: list[list[float]] = []
    for number, line in lines:
        try:
            rows.append([float(cell) for cell in line])
        except ValueError as error:
            if line is lines[0][1]:  # names
                continue
            raise InputError(
                f"data is {path!r}, whose line {number} has what is not a number"
            ) from error
        if len(line) != (first := len(lines[0][1])):
            raise InputError(
                f"data is {path!r}, whose line {number} has {len(line)} columns, and the first "
                f"{first}"
            )
    return np.array(rows, np.float64)


def content(name: str, path: str | PathLike[str]) -> bytes:
    """The bytes of a file, of which ``name`` is the argument.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise _unreadable(name, path, error) from error


def _unreadable(name: str, path: object, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or "it is not a path"
    return InputError(f"{name} is {str(path)!r}, which cannot be read: {reason}")


def numbers(name: str, values: Any) -> np.ndarray:
    """An array of real numbers.

    Raises
    ------
    InputError
        If the values are something else.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not an array of numbers, with rows of one length") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} has dtype {array.dtype}; it holds real numbers")
    return array
