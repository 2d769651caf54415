"""Abstract values: what is known of an intermediate of a program at infinite width.

`Known` are the same numbers in every network. `Weights` are parameters, or what moves and scales
them. A `Signal` is random: some of its axes are units, in each of which the same happens with
numbers of its own, all others are sites; its `Sum` says what a unit is at all sites. `Unknown` ends
the theory, with the reason.
"""

import dataclasses
import itertools
import math
import weakref
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from gradflow.inspection._theory.sums import Field, NoRule, Sum, identity

__all__ = ["KNOWN", "Flattened", "Groups", "Known", "Law", "Noise", "Recorded", "Signal"]
__all__ += ["Unknown", "Value", "Weights"]


@dataclasses.dataclass(frozen=True)
class Law:
    """The law of a leaf's entries, which are independent.

    Attributes
    ----------
    mean, variance
        Of an entry.
    standard_error
        Of ``variance``; 0 where it is exact.
    gaussian
        Whether entries are known to be Gaussian.
    values
        The leaf itself where it is the same in all networks; else None.
    """

    mean: float
    variance: float
    standard_error: float = 0.0
    gaussian: bool = False
    values: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Known:
    """The same array, or key, in every network; ``literal`` if it is written in the program."""

    value: Any
    literal: bool = False


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A value of which nothing is known, and why."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of independent entries, or what moves and scales them.

    Attributes
    ----------
    shape
        Its shape; along axes that are not in ``varying`` the entries are the same.
    varying
        Axes along which entries are independent.
    mean, variance
        Of an entry.
    error
        The relative standard error of ``variance``; 0 where it is exact.
    gaussian
        Whether entries are known to be Gaussian.
    tie
        Its `Leaf`, and what was done to it: products with one ``tie`` have the same weights.
    """

    shape: tuple[int, ...]
    varying: frozenset[int]
    mean: float
    variance: float
    error: float
    gaussian: bool
    tie: tuple[Any, ...]

    def scaled(self, factor: float) -> "Weights":
        """The weights times a number."""
        return dataclasses.replace(
            self, mean=self.mean * factor, variance=self.variance * factor**2
        )


@dataclasses.dataclass(frozen=True)
class Signal:
    """A random array: axes of units, in which the same happens, and sites in the order of the rest.

    Attributes
    ----------
    shape
        Its shape.
    units
        Axes that are units, ascending.
    sum
        A unit at all sites.
    """

    shape: tuple[int, ...]
    units: tuple[int, ...]
    sum: Sum

    @property
    def site_axes(self) -> tuple[int, ...]:
        """Axes that are sites."""
        return tuple(i for i in range(len(self.shape)) if i not in self.units)

    @property
    def site_shape(self) -> tuple[int, ...]:
        """Lengths of the axes that are sites."""
        return tuple(self.shape[i] for i in self.site_axes)

    @property
    def width(self) -> int:
        """The number of units."""
        return math.prod(self.shape[i] for i in self.units)

    def beside(self, array: np.ndarray) -> "Sum":
        """A known array of its shape as a sum: numbers for each site, or a field of their moments.

        Numbers that differ between units, as inputs do, are to theory a unit's at random.
        """
        if array.ndim == 0:
            return Sum(np.broadcast_to(array, (self.sum.sites,)).astype(float), {})
        moved = np.moveaxis(array, self.units, range(-len(self.units), 0))
        rows = moved.reshape(self.sum.sites, -1).astype(float)
        if (rows == rows[:, :1]).all():
            return Sum(rows[:, 0], {})
        mean, key = rows.mean(axis=1), (rows.shape, rows.tobytes())
        field = _of_numbers.get(key)
        if field is None:
            apart = rows - mean[:, None]
            field = Field(apart @ apart.T / rows.shape[1], gaussian=False, tie=KNOWN)
            _of_numbers[key] = field
        return Sum(mean, {field: identity(len(rows))})


# The fields of known numbers, by these, as long as a sum has them.
_of_numbers: weakref.WeakValueDictionary[Any, Field] = weakref.WeakValueDictionary()
# The tie of such a field.
KNOWN = ("known",)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Signals side by side along an axis of units, each with a law of its own.

    Attributes
    ----------
    shape
        Its shape.
    axis
        The axis of units.
    parts
        In order along it; alike in shape but for this axis.
    """

    shape: tuple[int, ...]
    axis: int
    parts: tuple[Signal, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """Where parts begin and end along the axis: one more than there are parts."""
        return (0, *itertools.accumulate(part.shape[self.axis] for part in self.parts))


@dataclasses.dataclass(frozen=True)
class Flattened:
    """A signal of which some neighbouring axes, of sites and of units, have become one.

    Attributes
    ----------
    shape
        Its shape.
    axis
        The axis that was several.
    signal
        As it was: axes from ``axis`` on, as many as it has more, are those.
    """

    shape: tuple[int, ...]
    axis: int
    signal: Signal


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random numbers that are drawn anew for each network and are no parameters; or a key.

    Attributes
    ----------
    shape
        Its shape; along axes that are not in ``varying`` they are the same.
    varying
        Axes along which they are independent.
    values
        Equally likely values of each; None of a key.
    tie
        The draw that it comes from.
    chance
        Of numbers that are 0 or 1 how likely a 1 is, exactly, where that is known.
    normal
        Of Gaussian numbers their mean and standard deviation.
    """

    shape: tuple[int, ...]
    varying: frozenset[int]
    values: np.ndarray | None
    tie: int
    chance: float | None = None
    normal: tuple[float, float] | None = None

    @property
    def weights(self) -> Weights:
        """The same as `Weights`: mean and variance of independent entries."""
        if self.values is None:
            raise NoRule("a random key")
        mean, variance = float(self.values.mean()), float(self.values.var())
        if self.chance is not None:
            mean, variance = self.chance, self.chance * (1 - self.chance)
        if self.normal is not None:
            mean, variance = self.normal[0], self.normal[1] ** 2
        law = mean, variance, 0.0, self.normal is not None
        return Weights(self.shape, self.varying, *law, ("noise", self.tie))


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A value that is known as a stretch of the program on random arrays.

    Attributes
    ----------
    shape
        Its shape.
    axes
        Of each axis what it is made of, ``(label, length)`` each.
    step
        Its last step.
    sources
        Of each random array that it is made of what it is: a `Signal`, or a product of two.
    plain
        What theory has for it otherwise.
    """

    shape: tuple[int, ...]
    axes: tuple[tuple[tuple[Any, int], ...], ...]
    step: Any
    sources: Mapping[Any, Any]
    plain: "Value"

    @property
    def of_scores(self) -> bool:
        """Whether it is made of a product of two signals."""
        return not all(isinstance(source, Signal) for source in self.sources.values())


Value: TypeAlias = Known | Weights | Signal | Groups | Flattened | Noise | Recorded | Unknown
