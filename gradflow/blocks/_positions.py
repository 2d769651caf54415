"""Positions of an input, as sites: row by row, an input's one after the other; and windows of them.

Windows are where filters and pooling look: of ``size`` positions along each axis, ``dilation``
apart, every ``stride`` positions; where they are *spread*, the signal's positions are apart
themselves, with zeros between them (a transposed convolution).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gradflow._checks import check_count, unknown_name
from gradflow.errors import InputError
from gradflow.kernels import Gaussian, Kernel, Unknown

__all__ = ["PADDINGS", "Windows", "count_inputs", "count_positions", "lengths", "linear_in_sites"]
__all__ += ["pads", "per_axis"]

# What `padding` may be, beside numbers, and what that is.
PADDINGS = {
    "circular": "the other end of the axis",
    "zeros": "as many zeros as keep the length at stride 1",
    "valid": "nothing: windows are inside",
}


def lengths(lengths: Any) -> Any:
    """Lengths as a tuple, or the only one of them: for a field that is static."""
    if isinstance(lengths, Sequence):
        return tuple(lengths)
    return int(lengths) if isinstance(lengths, Integral) else lengths  # NumPy's, too


def count_positions(shape: object) -> int:
    """The number of positions.

    Raises
    ------
    InputError
        If the shape is no tuple of lengths.
    """
    if not isinstance(shape, tuple) or not shape:
        raise InputError(f"shape is {shape!r}; it is a tuple of lengths, one for each spatial axis")
    return math.prod(check_count("a length in shape", length) for length in shape)


def count_inputs(sites: int, shape: tuple[int, ...]) -> int:
    """The number of inputs whose positions these sites are.

    Raises
    ------
    InputError
        If it is no whole number.
    """
    positions = math.prod(shape)
    if sites % positions:
        raise InputError(
            f"the signal has {sites} sites, and shape is {shape}; sites are inputs times positions,"
            f" a multiple of {positions}"
        )
    return sites // positions


def per_axis(name: str, value: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A number for each spatial axis, of one or of several.

    Raises
    ------
    InputError
        If one is no whole number of at least 1, or there are not as many as axes.
    """
    each = value if isinstance(value, tuple) else (value,) * len(shape)
    each = tuple(check_count(name, n) for n in each)
    if len(each) != len(shape):
        raise InputError(
            f"{name} is {value!r}; it is one whole number, or one for each axis of shape {shape}"
        )
    return each


def linear_in_sites(
    kernel: Kernel, pairs: Callable[[Array], Array], mean: Array, *, gaussian: bool = True
) -> Kernel:
    """The kernel of sums over sites, by what they make of second moments, a tangent's too.

    Where ``gaussian``, the sums are of signals of the same unit, and Gaussian if these are.
    """
    tangent = None if kernel.tangent is None else pairs(kernel.tangent)
    law = Gaussian() if gaussian and kernel.gaussian else Unknown()
    return kernel.derived(pairs(kernel.covariance), mean, tangent, law)


def pads(padding: Any) -> Any:
    """A padding as a field that is static: a name, a number, or pairs of them for every axis."""
    if isinstance(padding, Sequence) and not isinstance(padding, str):
        return tuple(pads(each) for each in padding)
    return int(padding) if isinstance(padding, Integral) else padding


@dataclasses.dataclass(frozen=True)
class Windows:
    """The positions that each window covers, along all axes.

    Attributes
    ----------
    shape
        The lengths of an input's spatial axes.
    size, stride, dilation, spread
        Of windows: one number, or one for each axis.
    padding
        The signal beyond the edge: `PADDINGS`; or zeros, as many as a number says at both ends of
        every axis, or pairs (before, after) for each axis. Of a spread signal so many positions of
        the result are left out instead.
    """

    shape: tuple[int, ...]
    size: Any = 1
    padding: Any = "circular"
    stride: Any = 1
    dilation: Any = 1
    spread: Any = 1

    def __post_init__(self) -> None:
        count_positions(self.shape)
        if isinstance(self.padding, str) and self.padding not in PADDINGS:
            raise unknown_name("padding", self.padding, PADDINGS)
        for name in ("stride", "dilation", "spread"):
            self._each(name)
        fits = not isinstance(self.size, tuple) or len(self.size) == len(self.shape)
        lengths = zip(self.sizes, self._each("dilation"), self._room, strict=True) if fits else ()
        if not fits or any((n - 1) * d + 1 > room for n, d, room in lengths):
            raise InputError(
                f"size is {self.size!r}; it is one whole number, or one for each axis of shape "
                f"{self.shape}, of at least 1 and at most its length"
            )
        _ = self.out_shape

    def _each(self, name: str) -> tuple[int, ...]:
        """A number for each axis."""
        return per_axis(name, getattr(self, name), self.shape)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The windows' length along each axis."""
        return self._each("size")

    @property
    def elements(self) -> int:
        """The number of positions in a window."""
        return math.prod(self.sizes)

    @property
    def _room(self) -> tuple[int | float, ...]:
        """The most that a window may span along each axis."""
        if self.padding == "zeros":
            return (math.inf,) * len(self.shape)
        if isinstance(self.padding, str):
            # A transposed convolution has what it needs of zeros.
            open_ended = [self.padding == "valid" and t > 1 for t in self._each("spread")]
            return tuple(math.inf if o else n for n, o in zip(self.shape, open_ended, strict=True))
        return tuple(
            math.inf if t > 1 else n + sum(ends)
            for n, t, ends in zip(self.shape, self._each("spread"), self._ends, strict=True)
        )

    @property
    def _ends(self) -> tuple[tuple[int, int], ...]:
        """The numbers of zeros before and after each axis that the padding says."""
        padding = self.padding
        if isinstance(padding, int):
            padding = ((padding, padding),) * len(self.shape)
        pairs = isinstance(padding, tuple) and len(padding) == len(self.shape)
        if not pairs or any(not isinstance(p, tuple) or len(p) != 2 for p in padding):
            raise InputError(
                f"padding is {self.padding!r}; it is one of {', '.join(PADDINGS)}, a whole number, "
                f"or pairs of them, (before, after), for each axis of shape {self.shape}"
            )
        return tuple(
            (check_count("padding", low, 0), check_count("padding", high, 0))
            for low, high in padding
        )

    @functools.cached_property
    def _axes(self) -> tuple[tuple[int, int], ...]:
        """For each axis, how far before it windows begin, and how many there are."""
        numbers = (self.sizes, *(self._each(name) for name in ("dilation", "stride", "spread")))
        ends = ((0, 0),) * len(self.shape) if isinstance(self.padding, str) else self._ends
        return tuple(
            self._along(n, (size - 1) * d + 1, s, t, end)
            for n, size, d, s, t, end in zip(self.shape, *numbers, ends, strict=True)
        )

    def _along(
        self, n: int, span: int, stride: int, spread: int, ends: tuple[int, int]
    ) -> tuple[int, int]:
        keeps = self.padding in ("circular", "zeros")
        if spread > 1:
            # As `jax.lax.conv_transpose` has it, of n - 1 times `spread`, and one, positions.
            if keeps:
                before = span - 1 if spread > span - 1 else -(-(span + spread - 2) // 2)
                return before, n * spread
            if self.padding == "valid":
                return span - 1, n * spread + max(span - spread, 0)
            return span - 1 - ends[0], (n - 1) * spread + span - sum(ends)
        if keeps:
            count = -(-n // stride)
            if self.padding == "circular":
                return (span - 1) // 2, count
            return max((count - 1) * stride + span - n, 0) // 2, count
        return ends[0], (n + sum(ends) - span) // stride + 1

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The numbers of windows along each axis."""
        if any(before < 0 or count < 1 for before, count in self._axes):
            raise InputError(
                f"padding is {self.padding!r}; it leaves out more positions than a window of size "
                f"{self.size} at an axis of shape {self.shape} makes"
            )
        return tuple(count for _, count in self._axes)

    @property
    def trivial(self) -> bool:
        """Whether every window is the position itself."""
        still = all(n == 1 for name in ("stride", "spread") for n in self._each(name))
        return self.elements == 1 and still and self.out_shape == self.shape

    @property
    def pool_factor(self) -> int | Fraction:
        """The number of positions for each window."""
        factor = Fraction(math.prod(self.shape), math.prod(self.out_shape))
        return factor.numerator if factor.denominator == 1 else factor

    def gathered(self, x: Array, *first_axes: int, beyond: float = 0.0) -> Iterator[Array]:
        """Yield x at each position of all windows; spatial axes begin at each of the first axes.

        What is beyond the edge, unless it is circular, or between positions is ``beyond``.
        """
        circular = self.padding == "circular"
        numbers = tuple(self._each(name) for name in ("dilation", "stride", "spread"))
        filled = jnp.asarray(beyond, x.dtype)
        wide: list[tuple[int, int, int]] = [(0, 0, 0)] * x.ndim
        edges: list[tuple[int, int]] = [(0, 0)] * x.ndim
        for first in first_axes:
            for axis, ((before, count), n, size, d, s, t) in enumerate(
                zip(self._axes, self.shape, self.sizes, *numbers, strict=True)
            ):
                # Zeros after the last position too, so that a spread axis has whole periods.
                wide[first + axis] = (0, t - 1, t - 1)
                last = (count - 1) * s + (size - 1) * d + 1
                edges[first + axis] = (before, max(last - before - n * t, 0))
        if any(t > 1 for t in numbers[2]):
            x = jax.lax.pad(x, filled, wide)
        if circular:
            x = jnp.pad(x, edges, mode="wrap")
        else:
            x = jnp.pad(x, edges, constant_values=filled)
        for element in itertools.product(*map(range, self.sizes)):
            index = [slice(None)] * x.ndim
            for first in first_axes:
                for axis, (at, (_, count), d, s) in enumerate(
                    zip(element, self._axes, *numbers[:2], strict=True)
                ):
                    begin = at * d
                    index[first + axis] = slice(begin, begin + (count - 1) * s + 1, s)
            yield x[tuple(index)]
