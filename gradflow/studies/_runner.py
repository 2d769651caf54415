"""Running one task: its chunks are drawn and averaged, and the theory of its points is computed.

All processes of `jax.distributed` draw each chunk together. Each averages the networks that its own
devices drew, and computes the theory of some of the points.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from gradflow._differences import differences
from gradflow.errors import NoTheory
from gradflow.simulation import _programs
from gradflow.simulation._programs import RandomNetworks
from gradflow.statistics import Statistic
from gradflow.studies import _spectra
from gradflow.studies._averages import Averages
from gradflow.studies._measurements import Measurements
from gradflow.studies._plan import Program, Task
from gradflow.studies._point import Family, Point, keys
from gradflow.studies._study import HistogramRange, Study
from gradflow.theory._programs import PreparedNetworks

__all__ = ["SPECTRUM", "THEORY", "WORKERS", "Chunk", "TaskRunner"]

# Chunks at a time: one is drawn while another's values are averaged. And programs that are compiled
# at a time, each of which uses a core, while the one before draws.
WORKERS = 2
# The names of theory's arrays; and the prefix of the names of `_spectra.theory`'s.
THEORY, SPECTRUM = ("predicted", "shift", "deviation"), "spectrum/"


class Chunk(NamedTuple):
    """A chunk of networks that was drawn.

    Attributes
    ----------
    number
        Its number in the task.
    done
        Networks of the task up to its end.
    measurements
        Of the networks that this process drew of it; None if there are none.
    seconds
        The time since the chunk before.
    """

    number: int
    done: int
    measurements: Measurements | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class TaskRunner:
    """A task with its study, its program and the devices that draw it."""

    study: Study
    program: Program
    task: Task
    devices: Sequence[jax.Device]

    @property
    def _measured(self) -> tuple[Statistic, ...]:
        return (*self.study.statistics, _programs.OVERFLOWED, _programs.VANISHED)

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        """The points' numbers in the study, in the order of the task."""
        names = self.program.names
        order = np.argsort(names)
        rows = order[np.searchsorted(names, self.task.names, sorter=order)]
        return np.asarray(self.program.numbers[rows])

    def points(self, rows: Sequence[int] | np.ndarray) -> list[Point]:
        """Return the points in rows of the task."""
        return [self.study.point(int(self._numbers[row])) for row in rows]

    @functools.cached_property
    def _family(self) -> Family:
        return Family(*self.points([0]))

    @property
    def _x64(self) -> bool:
        return self.study.sampling.dtype == "float64"

    @property
    def _size(self) -> int:
        """Networks that a call draws: a chunk, in whole blocks."""
        together = self.task.block * len(self.devices)
        return -(-self.task.chunk_size // together) * together

    def compile(self) -> None:
        """Compile the program that draws the networks, before `run` needs it."""
        self._compiled  # noqa: B018  (a property that is kept)

    def compile_theory(self) -> None:
        """Compile the theory of the points that are drawn for the first time, if there are any."""
        if self.task.theory.any() and self._theory:
            self._theory.compile()

    @functools.cached_property
    def _theory(self) -> PreparedNetworks | None:
        """The theory of the points that are drawn for the first time; None if none knows them."""
        rows = np.flatnonzero(self.task.theory)
        (point,) = self.points(rows[:1])
        try:
            return PreparedNetworks(
                point.network(), point.inputs(), len(rows), finite_width=self.study.finite_width
            )
        except NoTheory:
            return None

    @functools.cached_property
    def _compiled(self) -> Callable[[RandomNetworks, np.ndarray, np.ndarray], tuple[Array, ...]]:
        task = self.task
        with jax.enable_x64(self._x64):
            return _programs.compiled(
                self._networks(0),
                self._size,
                tuple(self.devices),
                task.seconds,
                measured=self._measured,
                sampler=task.sampler,
                keep=(task.keep, task.checkpoint),
                block=task.block,
                spectrum=self.study.spectrum is not None,
            )

    @functools.cached_property
    def _own(self) -> np.ndarray:
        """The networks of a call that this process draws: a stretch of them."""
        return _programs.own_networks(self._size, self.devices)

    def run(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Chunk]:
        """Draw the chunks of some ranges, each [first, end), one after the other."""
        if not ranges:
            return
        self.compile()
        task = self.task
        workers = 1 if jax.process_count() > 1 else WORKERS
        begun = time.perf_counter()
        for first, end in ranges:
            start, stop = task.span(first, end - 1)
            drawn = _programs.in_order(
                lambda done, start=start: self._draw((start + done) // task.chunk_size),
                stop - start,
                task.chunk_size,
                workers,
            )
            for done, measurements in drawn:
                now = time.perf_counter()
                chunk = (start + done - 1) // task.chunk_size
                yield Chunk(chunk, start + done, measurements, now - begun)
                begun = now

    def _draw(self, chunk: int) -> Measurements | None:
        """Draw a chunk and average the networks that this process's devices drew of it."""
        rows, first, count = self.task.stretch(*self.task.span(chunk, chunk))
        networks = int(count.sum())
        which, numbers = np.zeros((2, self._size), np.int32)
        which[:networks] = np.repeat(rows - rows[0], count)
        own = [np.arange(n, n + k) for n, k in zip(first, count, strict=True)]
        numbers[:networks] = self.task.share.numbers(np.concatenate(own))
        with jax.enable_x64(self._x64):
            values, *log_singular_values = self._compiled(
                self._networks(int(rows[0])), which, numbers
            )
        return self.measurements(chunk, values, *log_singular_values)

    def _networks(self, row: int) -> RandomNetworks:
        """Return the networks of the points from a row of the task on, as many as a call takes."""
        last = len(self.task.names) - 1
        points = self.points([min(row + n, last) for n in range(self.task.points_a_call)])
        dtype = np.dtype(self.study.sampling.dtype)
        network, inputs = self._family(points)
        network, inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), (network, inputs))
        words = np.array([point.key_words for point in points], np.uint32)
        return RandomNetworks(network, inputs, keys(words))

    @functools.cached_property
    def _averages(self) -> Averages:
        logs = [statistic.log for statistic in self.study.statistics]
        depth = self.program.network.depth
        return Averages.of(logs, self.task.count, self.task.points_a_call, depth)

    def measurements(
        self, chunk: int, values: Array, log_singular_values: Array | None = None
    ) -> Measurements | None:
        """The averages of this process's networks of a chunk; None if it has none.

        Parameters
        ----------
        chunk
            Its number.
        values
            Shape (statistics and then failures, networks, layers), on the devices.
        log_singular_values
            Shape (networks, k), on the devices.
        """
        start, stop = self.task.span(chunk, chunk)
        start, stop = start + int(self._own[0]), min(start + int(self._own[-1]) + 1, stop)
        if start >= stop:
            return None
        rows, _, count = self.task.stretch(start, stop)
        estimates, failures = self._averages(values, count)
        point = np.repeat(np.arange(len(rows)), count)
        bins, histograms, spectra = self.study.spectrum, {}, {}
        if self.study.histograms:
            on_host = _programs.own_part(values, 1)[:, : len(point)]
            for statistic, own in zip(self.study.statistics, on_host, strict=False):
                if statistic.name in self.study.histograms:
                    wanted = self.study.histograms[statistic.name]
                    histograms[statistic.name] = _binned(own, point, wanted)
        if bins is not None and log_singular_values is not None:
            own = _programs.own_part(log_singular_values, 0)[: len(point)]
            spectra = _spectra.counted(own, point, bins)
        return Measurements(self.task.names[rows], estimates, failures, histograms, spectra)

    def theory(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The theory of the points in rows of the task, in float64.

        Returns
        -------
        dict
            ``names``; ``predicted``, ``shift`` and ``deviation``, shape (points, statistics,
            layers), in the unit that each statistic is kept in. ``shift`` is the effect of the
            width, to first order in 1/width, and ``deviation`` the standard deviation over networks
            that the width makes, of a logarithm as a share of the mean; NaN where there is no
            theory, or the study does not ask for it. And, if singular values are measured, the
            arrays of `_spectra.theory`, each with an axis of points.
        """
        points, theory = self.points(rows), self._theory
        names = np.array([point.name for point in points], np.uint64)
        if theory is None:
            shape = len(points), len(self.study.statistics), self.program.network.depth
            return {"names": names} | {name: np.full(shape, np.nan) for name in THEORY}
        parts = [points[n : n + theory.together] for n in range(0, len(points), theory.together)]
        theory.compile()
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            found = list(pool.map(functools.partial(self._theory_of, theory), parts))
        return {"names": names} | {k: np.concatenate([f[k] for f in found]) for k in found[0]}

    def _theory_of(
        self, theory: PreparedNetworks, points: Sequence[Point]
    ) -> dict[str, np.ndarray]:
        """`theory` of as many points as are worked out together."""
        networks, inputs = self._family(points)
        prediction, _, corrections = theory(networks, inputs)
        each = [prediction.values]
        each += [corrections.shift, corrections.standard_deviation] if corrections else []
        keys = [statistic.key for statistic in self.study.statistics]
        shape = len(THEORY), len(points), len(keys), networks.depth
        values = np.full(shape, np.nan)
        for row, by_key in zip(values, each, strict=False):
            row[:] = np.stack([by_key[key] for key in keys], axis=1)
        arrays: dict[str, np.ndarray] = dict(zip(THEORY, values, strict=True))
        if self.study.spectrum is not None:
            log_q = np.asarray(prediction.values["log_q"])
            spectra = [
                _spectra.theory(point.network(), own, self.study.spectrum)
                for point, own in zip(points, log_q, strict=True)
            ]
            arrays |= {f"{SPECTRUM}{k}": np.stack([one[k] for one in spectra]) for k in spectra[0]}
        return arrays

    def largest_z(
        self, measurements: Measurements, predicted: Mapping[str, np.ndarray]
    ) -> tuple[float, str]:
        """Return the largest |z| of points and its statistic; 0 if there is no theory of them."""
        _, rows, theory_rows = np.intersect1d(
            measurements.names, predicted["names"], return_indices=True
        )
        if not len(rows):
            return 0.0, ""
        largest = {}
        for index, statistic in enumerate(self.study.statistics):
            estimate = jax.tree.map(lambda leaf: leaf[rows], measurements.statistic(index))
            _, _, z = differences(
                statistic,
                predicted["predicted"][theory_rows, index],
                estimate,
                estimate.count * self.program.units,
                self.study.sampling.dtype,
            )
            largest[statistic.name] = float(np.max(np.abs(z), where=np.isfinite(z), initial=0.0))
        name = max(largest, key=lambda name: largest[name])
        return largest[name], name


def _binned(values: np.ndarray, point: np.ndarray, bins: HistogramRange) -> np.ndarray:
    """Networks below, in and above the bins, shape (points, layers, bins + 2)."""
    counts = np.zeros((point[-1] + 1, values.shape[1], bins.bins + 2), np.int64)
    column = np.searchsorted(bins.edges, values.astype(np.float64), side="right")
    # The last edge belongs to the last bin; what is not a number is in none.
    column[values == bins.stop] = bins.bins
    rows, layers = np.nonzero(~np.isnan(values))
    np.add.at(counts, (point[rows], layers, column[rows, layers]), 1)
    return counts
