"""Measurements of networks of some points: estimates that can be merged, and their files.

Files have them as arrays by name, in NumPy's npz format.
"""

import dataclasses
import io
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from gradflow import estimation
from gradflow.estimation import Estimate

__all__ = ["Measurements", "merged", "packed", "unpacked"]

_FIELDS = ("count", "excluded", "mean", "squares", "log_unit")


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return a file's content with these arrays, the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpacked(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a `packed` content."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Estimates over networks of some points; every array has a leading axis of points.

    Attributes
    ----------
    names
        The points' names, uint64, each once.
    estimates
        Arrays of shape (points, statistics, layers).
    failures
        Shape (points, 2, layers): in how many networks the signal overflowed, and vanished.
    histograms
        By statistic, shape (points, layers, bins + 2): networks below, in and above the bins.
    spectra
        The sums over networks that `_spectra.counted` makes of their singular values; empty if
        those are not measured.
    """

    names: np.ndarray
    estimates: Estimate
    failures: np.ndarray
    histograms: Mapping[str, np.ndarray]
    spectra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, as files have them."""
        arrays = {field: getattr(self.estimates, field) for field in _FIELDS}
        arrays |= {f"histogram/{name}": counts for name, counts in self.histograms.items()}
        arrays |= {f"spectrum/{name}": sums for name, sums in self.spectra.items()}
        return arrays | {"names": self.names, "failures": self.failures}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Measurements":
        """Return the inverse of `arrays`."""

        def below(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

        return cls(
            names=arrays["names"],
            estimates=Estimate(**{field: arrays[field] for field in _FIELDS}),
            failures=arrays["failures"],
            histograms=below("histogram/"),
            spectra=below("spectrum/"),
        )

    def packed(self) -> bytes:
        """Return a file's content with all of it."""
        return packed(self.arrays())

    @classmethod
    def unpacked(cls, content: bytes) -> "Measurements":
        """Return the inverse of `packed`."""
        return cls.of(unpacked(content))

    @property
    def nbytes(self) -> int:
        """Bytes in memory, and in a file."""
        return sum(array.nbytes for array in self.arrays().values())

    def statistic(self, index: int) -> Estimate:
        """Return the estimate of one of the statistics, arrays of shape (points, layers)."""
        return jax.tree.map(lambda leaf: leaf[:, index], self.estimates)


def merged(parts: Iterable[Measurements], names: np.ndarray | None = None) -> Measurements | None:
    """Merge measurements of networks of one depth, in their order; None if there are none.

    With ``names``, the result has these points, in this order; points that are in no part have a
    count of 0.
    """
    total: dict[str, np.ndarray] = {}
    row_of: dict[int, int] = {}
    for part in parts:
        arrays = part.arrays()
        if not total:
            known = part.names[:0] if names is None else names
            total = {key: _zeros(array, len(known)) for key, array in arrays.items()}
            total["names"] = known
            row_of = {name: row for row, name in enumerate(known.tolist())}
        listed = part.names.tolist()
        new = [name for name in listed if name not in row_of]
        if new and names is None:
            row_of |= {name: len(row_of) + n for n, name in enumerate(new)}
            total = {
                key: np.concatenate([array, _zeros(array, len(new))])
                for key, array in total.items()
            }
            total["names"][len(row_of) - len(new) :] = new
        source = np.array([n for n, name in enumerate(listed) if name in row_of], int)
        target = np.array([row_of[listed[n]] for n in source], int)
        both = estimation.merge(
            [
                Estimate(**{field: values[field][rows] for field in _FIELDS})
                for values, rows in ((total, target), (arrays, source))
            ]
        )
        for field in _FIELDS:
            total[field][target] = getattr(both, field)
        for key in total:
            if key not in (*_FIELDS, "names"):
                total[key][target] += arrays[key][source]
    return Measurements.of(total) if total else None


def _zeros(like: np.ndarray, rows: int) -> np.ndarray:
    return np.zeros((rows, *like.shape[1:]), like.dtype)
