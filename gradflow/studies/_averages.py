"""Averages of a chunk's networks, worked out on the devices that drew them.

A device cuts its networks into pieces of one point each. Counts, means and squared deviations of a
piece are worked out in float64 where its values are; the host merges the pieces of each point. So a
device hands on five numbers for about a hundred networks, and no values. Of studies so small that
compiling takes longer, NumPy works out the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from gradflow import _compilation
from gradflow._programs import Program
from gradflow.estimation import Estimate

__all__ = ["Averages"]

# Networks of a piece at most: their values stay in a core's cache.
_MOST_IN_A_PIECE = 128
# Pieces that an accelerator works out side by side.
_SIDE_BY_SIDE = 256
# Values of all chunks that NumPy averages, at 12 ns each, while a program would be compiled.
_VALUES_ON_HOST = 1 << 26
# Seconds of one core for a value; and of all at least: so small a program is always compiled well.
_SECONDS, _LEAST_SECONDS = 3e-9, 0.3


class _Sums(NamedTuple):
    """What is known of a piece, or of several along a first axis: arrays (statistics, layers).

    Attributes
    ----------
    usable
        How many networks have a finite value, or a logarithm of -inf.
    mean, squares
        Of those, the mean and the sum of squared deviations, in units of exp(log_unit) and its
        square.
    log_unit
        The largest logarithm, -inf if there is none; 0 for statistics that are no logarithms.
    failures
        Networks with a failure, (failures, layers).
    """

    usable: Array | np.ndarray
    mean: Array | np.ndarray
    squares: Array | np.ndarray
    log_unit: Array | np.ndarray
    failures: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Averages:
    """The averages of chunks of networks of one program.

    Attributes
    ----------
    logs
        Whether each statistic is a logarithm.
    length
        Networks in a piece at most.
    points
        The most points that a chunk has.
    values
        How many values all chunks have.
    """

    logs: tuple[bool, ...]
    length: int
    points: int
    values: int

    @classmethod
    def of(cls, logs: Sequence[bool], counts: np.ndarray, points: int, depth: int) -> "Averages":
        """Those of points of so many networks: the largest are cut into equal pieces."""
        most = int(counts.max())
        length = -(-most // -(-most // _MOST_IN_A_PIECE))
        return cls(tuple(logs), length, points, len(logs) * int(counts.sum()) * depth)

    def __call__(self, values: Array, counts: np.ndarray) -> tuple[Estimate, np.ndarray]:
        """The estimates of points, (points, statistics, layers), and their failures.

        Parameters
        ----------
        values
            Shape (statistics and then failures, networks, layers), shared among devices along its
            second axis.
        counts
            The networks of each point, one point's behind another's, of those that this process's
            devices drew; what follows the last is left out.
        """
        parts = sorted(values.addressable_shards, key=lambda part: part.index[1].start or 0)
        row, on, table = _cut(counts, parts[0].data.shape[1], self.length)
        found = [self._sums_of(part.data, table[on == n]) for n, part in enumerate(parts)]
        sizes = [np.count_nonzero(on == n) for n in range(len(parts))]
        here = [
            jax.tree.map(lambda leaf, n=n: np.asarray(leaf)[:n], sums)
            for sums, n in zip(found, sizes, strict=True)
        ]
        return _merged(jax.tree.map(lambda *leaves: np.concatenate(leaves), *here), row, counts)

    def _sums_of(self, values: Array, pieces: np.ndarray) -> _Sums:
        """The sums of the pieces of one device, and then more; they need not be there yet."""
        (device,) = values.devices()
        networks = values.shape[1]
        constants: dict[str, Any] = {"logs": self.logs, "length": min(self.length, networks)}
        if self.values <= _VALUES_ON_HOST:
            return _of_pieces_on_host(np.asarray(values), pieces, **constants)
        together = 1 if device.platform == "cpu" else _SIDE_BY_SIDE
        constants["side_by_side"] = together
        most = networks // constants["length"] + 2 * min(self.points, networks)
        table = np.zeros((-(-most // together) * together, 2), np.int32)
        table[: len(pieces)] = pieces
        arguments = values, table, np.int32(-(-len(pieces) // together))
        seconds = max(_SECONDS * self.values, _LEAST_SECONDS)
        if device == jax.devices()[0]:
            with jax.enable_x64(True):
                return Program.of(_of_pieces, arguments, seconds, **constants)(*arguments)
        shapes = tuple((array.shape, array.dtype) for array in arguments)
        run = _compiled_for(device, shapes, seconds, tuple(constants.items()))
        return run(*jax.device_put(arguments, device))


@functools.lru_cache(maxsize=64)
def _compiled_for(
    device: jax.Device, shapes: tuple, seconds: float, constants: tuple[tuple[str, Any], ...]
) -> Callable:
    """The program for a device that is not JAX's first one, whose programs are not kept."""
    sharding = SingleDeviceSharding(device)
    specs = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    with jax.enable_x64(True):
        lowered = jax.jit(functools.partial(_of_pieces, **dict(constants))).lower(*specs)
        return lowered.compile(_compilation.options(seconds))


def _cut(
    counts: np.ndarray, networks: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a line of networks, so many a device, into pieces of one point and one device.

    By piece: its point, its device, and in a table with a row for each, the first of its networks
    on that device and how many it has.
    """
    ends = np.cumsum(counts)
    begins, length = ends - counts, min(length, networks)
    within = [np.arange(n, end, length) for n, end in zip(begins, ends, strict=True)]
    edges = np.unique(np.concatenate([np.arange(0, ends[-1], networks), ends, *within]))
    start, of_length = edges[:-1], np.diff(edges)
    row = np.asarray(np.searchsorted(ends, start, side="right"))
    return row, start // networks, np.stack([start % networks, of_length], axis=1)


def _merged(pieces: _Sums, row: np.ndarray, counts: np.ndarray) -> tuple[Estimate, np.ndarray]:
    """The estimates of points from their pieces, those of one point behind those of another."""
    first = np.searchsorted(row, np.arange(len(counts)))
    highest = np.maximum.reduceat(pieces.log_unit, first)
    log_unit = np.where(np.isfinite(highest), highest, 0.0)
    known = (pieces.usable > 0) & np.isfinite(pieces.log_unit)
    scale = np.exp(np.where(known, pieces.log_unit - log_unit[row], -np.inf))
    count = np.add.reduceat(pieces.usable, first, dtype=np.int64)
    means = pieces.mean * scale
    mean = np.add.reduceat(means * pieces.usable, first) / np.maximum(count, 1)
    squares = pieces.squares * scale**2 + pieces.usable * (means - mean[row]) ** 2
    estimate = Estimate(
        count=count,
        excluded=counts[:, None, None] - count,
        mean=np.where(count > 0, mean, np.nan),
        squares=np.add.reduceat(squares, first),
        log_unit=log_unit,
    )
    return estimate, np.add.reduceat(pieces.failures, first, dtype=np.int64)


def _of_pieces(
    values: Array,
    table: Array,
    groups: Array,
    *,
    logs: tuple[bool, ...],
    length: int,
    side_by_side: int,
) -> _Sums:
    """The sums of pieces with the starts and lengths in a table, of its first groups of rows."""
    networks = values.shape[1]

    def of(piece: Array) -> _Sums:
        begin = jnp.minimum(piece[0], networks - length)
        own = jax.lax.dynamic_slice_in_dim(values, begin, length, 1)
        at = begin + jnp.arange(length, dtype=begin.dtype)
        inside = (at >= piece[0]) & (at < piece[0] + piece[1])
        return _sums(jnp, own, inside[None, :, None], logs)

    each = jax.vmap(of)

    def add(group: Array, sums: _Sums) -> _Sums:
        begin = group * side_by_side
        found = each(jax.lax.dynamic_slice_in_dim(table, begin, side_by_side))
        return jax.tree.map(
            lambda all, some: jax.lax.dynamic_update_slice_in_dim(all, some, begin, 0), sums, found
        )

    shapes = jax.eval_shape(each, table)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, groups, add, empty)


def _of_pieces_on_host(
    values: np.ndarray, table: np.ndarray, *, logs: tuple[bool, ...], length: int
) -> _Sums:
    """The same by NumPy, of all pieces in a table."""
    at = np.minimum(table[:, :1] + np.arange(length), values.shape[1] - 1)
    inside = np.arange(length) < table[:, 1:]
    with np.errstate(all="ignore"):
        sums = _sums(np, values[:, at], inside[None, :, :, None], logs)
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), sums)


def _sums(xp: Any, own: Any, inside: Any, logs: tuple[bool, ...]) -> _Sums:
    """The sums over the last axis but one, of the networks that are inside; by NumPy or by JAX.

    Values are those of the statistics and then of the failures along the first axis, which stays.
    """
    of_each = []
    for is_log, value in zip(logs, own, strict=False):
        usable = (xp.isfinite(value) | (is_log & xp.isneginf(value))) & inside[0]
        x, top = value.astype(xp.float64), xp.zeros((*value.shape[:-2], 1, value.shape[-1]))
        if is_log:
            top = xp.max(xp.where(usable, x, -xp.inf), axis=-2, keepdims=True)
            x = xp.exp(x - xp.where(xp.isfinite(top), top, 0.0))
        count = xp.sum(usable, axis=-2, keepdims=True, dtype=xp.int32)
        mean = xp.sum(xp.where(usable, x, 0.0), axis=-2, keepdims=True) / xp.maximum(count, 1)
        squares = xp.sum(xp.where(usable, x - mean, 0.0) ** 2, axis=-2, keepdims=True)
        of_each.append([xp.squeeze(each, -2) for each in (count, mean, squares, top)])
    failures = xp.sum((own[len(logs) :] != 0) & inside, axis=-2, dtype=xp.int32)
    usable, mean, squares, log_unit = map(xp.stack, zip(*of_each, strict=True))
    return _Sums(usable, mean, squares, log_unit, failures)
