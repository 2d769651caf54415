"""A study: a base network, the axes of a grid over it, and how networks are drawn and measured."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gradflow._entries import shown
from gradflow.statistics import Statistic
from gradflow.studies import _point
from gradflow.studies._point import Point

__all__ = [
    "MOST_NETWORKS",
    "Axis",
    "HistogramRange",
    "Sampling",
    "Study",
    "coordinate_name",
    "differences",
]


# Numbers of networks are int32.
MOST_NETWORKS = 2**31 - 1


def coordinate_name(field: str) -> str:
    """The name of a field in results, where ``correlation`` is a statistic."""
    return f"input_{field}" if field == "correlation" else field


@dataclasses.dataclass(frozen=True)
class Axis:
    """One dimension of the grid: fields that take these values together, each of one length.

    ``networks`` is how many the points at each value have, where the file says so here.
    """

    values: Mapping[str, tuple]
    networks: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What results call the dimension."""
        return "_".join(map(coordinate_name, self.values))

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def part(self, start: int, stop: int) -> "Axis":
        """The axis from one of its values to another."""
        values = {field: those[start:stop] for field, those in self.values.items()}
        return Axis(values, self.networks and self.networks[start:stop])


@dataclasses.dataclass(frozen=True)
class HistogramRange:
    """Bins of equal width from ``start`` to ``stop``, in the unit that the statistic is kept in."""

    start: float
    stop: float
    bins: int

    @property
    def edges(self) -> np.ndarray:
        """Shape (bins + 1,)."""
        return np.linspace(self.start, self.stop, self.bins + 1)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How many networks a point has, and how they are drawn.

    With ``target``, standard errors by statistic in the unit that it is kept in (of a logarithm,
    relative ones), a point has rounds of ``networks`` until it has at least 30 and each is met at
    every layer, and ``most`` networks at the most. Intervals of two standard errors are honest all
    the same: see `execution`. Where an axis has the networks, these are the most of them.
    """

    networks: int
    most: int
    target: Mapping[str, float]
    seed: int
    dtype: str
    sampler: str
    memory_gib: float | None


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes
    ----------
    text
        The file itself.
    title, question
        For tables and the report.
    base
        The fields that all points share, and their values.
    axes
        The dimensions of the grid.
    statistics
        What is measured.
    histograms
        Over networks, by statistic.
    spectrum
        Bins for all singular values of the end-to-end Jacobian, if those are measured.
    sampling
        How many networks, and how they are drawn.
    finite_width
        Whether theory also says what the width does, to first order in 1/width.
    depth_scales
        Whether results have ξ beside theory's, whose fixed points take seconds an activation.
    """

    text: str
    title: str
    question: str
    base: Mapping[str, Any]
    axes: tuple[Axis, ...]
    statistics: tuple[Statistic, ...]
    histograms: Mapping[str, HistogramRange]
    spectrum: HistogramRange | None
    sampling: Sampling
    finite_width: bool
    depth_scales: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of every axis."""
        return tuple(map(len, self.axes))

    def __len__(self) -> int:
        return math.prod(self.shape)

    def point(self, number: int) -> Point:
        """A point by its number, from 0 on; the last axis is the fastest."""
        return self._point(tuple(int(index) for index in np.unravel_index(number, self.shape)))

    def _point(self, index: tuple[int, ...]) -> Point:
        varied = {
            field: values[at]
            for axis, at in zip(self.axes, index, strict=True)
            for field, values in axis.values.items()
        }
        along = [
            axis.networks[at]
            for axis, at in zip(self.axes, index, strict=True)
            if axis.networks is not None
        ]
        count = along[0] if along else self.sampling.networks
        return Point(index, _point.resolved({**self.base, **varied}), count)

    def points(self) -> Iterator[Point]:
        """Yield all points in order."""
        return map(self._point, itertools.product(*map(range, self.shape)))

    def part(self, axis: int, start: int, stop: int) -> "Study":
        """The study of a part of one axis."""
        axes = list(self.axes)
        axes[axis] = axes[axis].part(start, stop)
        return dataclasses.replace(self, axes=tuple(axes))

    def identity(self) -> dict[str, Any]:
        """All that decides which networks are drawn and what is measured, by name."""
        return {
            "base": dict(self.base),
            "axes": self.named_axes(),
            "fixed": self.fixed(),
            "networks": self.sampling.networks,
            "most": self.sampling.most,
        }

    def named_axes(self) -> dict[str, Any]:
        """The fields of every axis, by its number."""
        return {
            str(number): {field: list(values) for field, values in axis.values.items()}
            | ({} if axis.networks is None else {"networks": list(axis.networks)})
            for number, axis in enumerate(self.axes)
        }

    def fixed(self) -> dict[str, Any]:
        """All that stays while a study grows: not its points, networks, title and question."""
        sampling = dataclasses.asdict(self.sampling)
        for free in (
            ("networks", "most", "memory_gib", "seed")
            if not self.sampling.target
            else (
                "most",
                "memory_gib",
                "seed",
            )
        ):
            del sampling[free]
        fixed: dict[str, Any] = {
            "statistics": {"measure": [s.name for s in self.statistics]},
            "histograms": {k: dataclasses.asdict(h) for k, h in self.histograms.items()},
            "sampling": sampling,
            "theory": {"finite_width": self.finite_width},
        }
        # Without a spectrum, as in the stores of studies before there was one.
        return fixed | ({"spectrum": dataclasses.asdict(self.spectrum)} if self.spectrum else {})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences of two nested mappings, each as 'path was …, is …'."""
    before, after = _flat(old), _flat(new)
    return [
        f"{path} was {shown(before.get(path, 'absent'))}, is {shown(after.get(path, 'absent'))}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path, "absent") != after.get(path, "absent")
    ]


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}.{key}" if above else key
        flat |= _flat(value, path) if isinstance(value, Mapping) else {path: value}
    return flat
