"""What networks of some points did: estimates by point that are merged, and written as arrays."""

import dataclasses
import io
from collections.abc import Iterable, Mapping

import numpy as np

import gradflow.estimation
from gradflow.estimation import Estimate

__all__ = ["Found", "combined", "npz", "unpacked"]

_FIELDS = ("count", "excluded", "mean", "squares", "log_unit")


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the arrays as a file's content, the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpacked(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of such a content."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


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
        return npz(self.arrays())

    @classmethod
    def unpacked(cls, content: bytes) -> "Found":
        """Return what was `packed`."""
        return cls.of(unpacked(content))


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
