"""The results of a study, labelled: every statistic over the axes and layers, theory beside it."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray

from gradflow import _files
from gradflow._differences import differences
from gradflow._labels import labelled, layers
from gradflow.errors import InputError
from gradflow.estimation import Estimate
from gradflow.figures.study import coordinates_at
from gradflow.networks import Network
from gradflow.studies import depth_scales, entries, gradient_spread, plan, spectra
from gradflow.studies.description import Axis, Study
from gradflow.studies.found import Found
from gradflow.studies.plan import Group
from gradflow.studies.point import Point
from gradflow.studies.store import RESULTS, Store
from gradflow.theory import float64
from gradflow.theory.fixed_points import DEPTH_SCALES

__all__ = [
    "FILE",
    "LARGE",
    "agreement",
    "assemble",
    "check",
    "compared",
    "compile_theory",
    "of_group",
]
__all__ += ["of_group", "one", "opened", "theory", "theory_of", "write"]

FILE = RESULTS
# What there is of each point's theory; and what comes before the names of `spectra.theory`.
_THEORY, _SPECTRUM = ("predicted", "shift", "deviation"), "spectrum/"
# A z beyond this is told of: 1 in 16 000 by chance.
LARGE = 4.0


def theory(study: Study, points: Sequence[Point]) -> dict[str, np.ndarray]:
    """Return what theory says of points of one structure, in float64.

    Returns
    -------
    dict
        ``names``; ``predicted``, ``shift`` and ``deviation``, shape (points, statistics, layers),
        in the unit that each statistic is kept in. ``shift`` is what the width does, to first order
        in 1/width, and ``deviation`` the standard deviation over networks that it makes, of a
        logarithm as a share of the mean; NaN where theory does not say, or is not asked. And, if
        singular values are measured, what `spectra.theory` says, each array with an axis of points.
    """
    keys = [statistic.key for statistic in study.statistics]

    def of(point: Point) -> dict[str, np.ndarray]:
        network, inputs = point.network(), point.inputs()
        found, corrections = float64.predict_and_correct(
            network, inputs, finite_width=study.finite_width
        )
        each = [found.values]
        each += [corrections.shift, corrections.standard_deviation] if corrections else []
        values = np.full((len(_THEORY), len(keys), network.depth), np.nan)
        values[: len(each)] = [[by_key[key] for key in keys] for by_key in each]
        those = dict(zip(_THEORY, values, strict=True))
        if study.spectrum is not None:
            law = spectra.theory(network, np.asarray(found.values["log_q"]), study.spectrum)
            those |= {f"{_SPECTRUM}{name}": value for name, value in law.items()}
        return those

    compile_theory(study, points[0])
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        found = list(pool.map(of, points))
    names = np.array([point.name for point in points], np.uint64)
    return {"names": names} | {key: np.stack([each[key] for each in found]) for key in found[0]}


def compile_theory(study: Study, point: Point) -> None:
    """Compile what `theory` takes for points of this one's structure, if it is not yet."""
    float64.compile_programs(point.network(), point.inputs(), finite_width=study.finite_width)


def of_group(group: Group, store: Store) -> Found | None:
    """Return all that is known of a group's points, in its order; None if there is nothing."""
    return store.total(group.names)


def theory_of(
    study: Study, group: Group, store: Store | None, like: Found
) -> dict[str, np.ndarray]:
    """Return what `theory` said of a group's points, in its order and of the shape of ``like``."""
    place = {name: row for row, name in enumerate(group.names.tolist())}
    found = {name: np.full(like.estimates.mean.shape, np.nan) for name in _THEORY}
    if study.spectrum is not None:
        for name, value in spectra.unknown(study.spectrum).items():
            found[f"{_SPECTRUM}{name}"] = np.tile(value, (len(place), 1))
    for block in store.theory(group.names) if store else ():
        rows = [n for n, name in enumerate(block["names"].tolist()) if name in place]
        there = [place[int(block["names"][n])] for n in rows]
        if rows:
            for name in found.keys() & block.keys():
                found[name][there] = block[name][rows]
    return found


def one(found: Found, place: int) -> Estimate:
    """Return the estimate of one of the statistics, shape (points, layers)."""
    return jax.tree.map(lambda leaf: leaf[:, place], found.estimates)


def assemble(study: Study, found: Sequence[Group], store: Store) -> xarray.Dataset:
    """Return everything, over the study's axes and layers; NaN where there is nothing."""
    depth = max(group.network.depth for group in found)
    return _assembled(study, found, store, depth, _attributes(study, found, store.drawn_with))


def check(study: Study) -> None:
    """Raise whatever would be raised of results at the end, before anything is drawn.

    What there is of no networks is put together at one point, and all axes are labelled.
    """
    point = dataclasses.replace(study, depth_scales=False)
    for axis in range(len(study.axes)):
        point = point.part(axis, 0, 1)
    found = plan.groups(point)
    depth = found[0].network.depth
    nothing = _assembled(point, found, None, depth, _attributes(study, found, []))
    for dataset in (nothing, xarray.Dataset(coords=_coordinates(study, depth))):
        dataset.to_netcdf(engine="scipy")


def _attributes(
    study: Study, found: Sequence[Group], drawn_with: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "title": study.title,
        "question": study.question,
        "study": study.text,
        "dtype": study.sampling.dtype,
        "points": len(study),
        "axes": " ".join(axis.name for axis in study.axes),
        "statistics": " ".join(statistic.name for statistic in study.statistics),
        "key": "network i of a point has fold_in(point.key, i): gradflow.studies.grid_point.Point",
        "drawn_with": json.dumps(drawn_with, sort_keys=True),
        "samplers": json.dumps(sorted({f"{group.sampler}: {group.reason}" for group in found})),
    }


def _assembled(
    study: Study, found: Sequence[Group], store: Store | None, depth: int, about: dict[str, Any]
) -> xarray.Dataset:
    """Return everything, with so many layers and these attributes; of no networks without a store.

    How many networks there are is counted, if the attributes do not say.
    """
    rows: dict[int, list[int]] = {}
    for number, point in enumerate(study.points()):
        rows.setdefault(point.name, []).append(number)
    grid, networks = _Grid(study, depth, rows), 0
    for group in found:
        total = (store and of_group(group, store)) or _nothing(study, group)
        _put_laws(grid, study, group)
        _put(grid, study, group, total, theory_of(study, group, store, total))
        each = total.estimates.count + total.estimates.excluded
        networks += int(each[:, 0, 0].sum())  # alike for all statistics and layers
    dataset = xarray.Dataset(grid.variables(), coords=_coordinates(study, depth))
    for statistic in study.statistics:
        for name in (statistic.name, f"{statistic.name}_theory"):
            dataset[name].attrs["long_name"] = statistic.label
    for name, label in gradient_spread.LABELS.items():
        if name in dataset:
            dataset[name].attrs["long_name"] = label
    about = {"networks": float(networks)} | about
    dataset = labelled(dataset).assign_attrs(about)
    return depth_scales.add(dataset, study) if study.depth_scales else dataset


def _coordinates(study: Study, depth: int) -> dict[str, Any]:
    """Return the values along all dimensions, by their names."""
    found: dict[str, Any] = {"layer": layers(depth)}
    for axis in study.axes:
        if len(axis.values) > 1:
            found[axis.name] = _labels(axis)
        for field, values in axis.values.items():
            found[entries.label(field)] = (axis.name, _coordinate(values))
    bins = {f"{name}_bin": histogram for name, histogram in study.histograms.items()}
    if study.spectrum is not None:
        bins[spectra.BIN] = study.spectrum
    for name, histogram in bins.items():
        found[name] = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    return found


def _nothing(study: Study, group: Group) -> Found:
    """Return what is found in no networks of a group's points."""
    points, depth = len(group.names), group.network.depth
    shape = (points, len(study.statistics), depth)
    counts = np.zeros(shape, np.int64)
    numbers = np.zeros(shape)
    bins = {name: histogram.bins + 2 for name, histogram in study.histograms.items()}
    return Found(
        names=group.names,
        estimates=Estimate(counts, counts, np.full(shape, np.nan), numbers, numbers),
        failures=np.zeros((points, 2, depth), np.int64),
        histograms={name: np.zeros((points, depth, n), np.int64) for name, n in bins.items()},
        spectra={}
        if study.spectrum is None
        else spectra.counted(np.full((points, 1), np.nan), np.arange(points), study.spectrum),
    )


def _coordinate(values: tuple) -> list | np.ndarray:
    """Return an axis's values; netCDF 3 has no integers of 64 bits, which seeds may need."""
    large = any(isinstance(value, int) and value >= 1 << 31 for value in values)
    return np.array(values, np.float64) if large else list(values)


def _labels(axis: Axis) -> list[str] | np.ndarray:
    """Return what tells an axis's places where several fields go together: names, or numbers."""
    rows = list(zip(*axis.values.values(), strict=True))
    if any(isinstance(value, str) for value in rows[0]):
        return [" ".join(map(str, row)) for row in rows]
    return np.arange(len(rows))


def write(study: Study, found: Sequence[Group], store: Store) -> Path:
    """Write the results into the store, as netCDF 3, and return the file.

    Of a large study in parts, of which one is in memory at a time; the axis that they are along is
    then the first in the file.
    """
    depth = max(group.network.depth for group in found)
    along, parts = plan.slabs(study, depth)
    if not along:
        dataset = assemble(study, found, store)
        return store.publish(lambda path: dataset.to_netcdf(path, engine="scipy"))
    about = _attributes(study, found, store.drawn_with)
    about["networks"] = float(sum(store.networks().values()))
    slabs = (
        _assembled(part, plan.groups(part), store, depth, about).transpose(along, ...)
        for part in parts
    )
    return store.publish(lambda path: _files.write_netcdf_slabs(slabs, along, path))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[xarray.Dataset]:
    """Open the results of a store that was checked.

    Raises
    ------
    InputError
        If they are gone since.
    """
    try:
        dataset = xarray.open_dataset(path, engine="scipy")
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be read any more ({(error.strerror or str(error)).lower()}); "
            "another process goes on with the study, or removed it"
        ) from error
    with dataset:
        yield dataset


def compared(dataset: xarray.Dataset) -> list[str]:
    """Return the names of what has a z: statistics, a spectrum's, and what is made of them."""
    made = (*(f"rate_{name}" for name in DEPTH_SCALES), gradient_spread.NAME)
    known = [n for n in made if f"{n}_z" in dataset and bool(np.isfinite(dataset[f"{n}_z"]).any())]
    return [
        *dataset.attrs["statistics"].split(),
        *known,
        *(name for name in spectra.COMPARED if name in dataset),
    ]


def agreement(dataset: xarray.Dataset, name: str) -> dict[str, Any]:
    """Return how measurement and theory of one of `compared` agree, over all that there is."""
    z = np.abs(dataset[f"{name}_z"].to_numpy())
    corrected = dataset.get(f"{name}_finite_width_z")
    known = np.full(1, np.nan) if corrected is None else np.abs(corrected.to_numpy())
    found: dict[str, Any] = {
        "statistic": name,
        "values": int(np.isfinite(z).sum()),
        "within": _within(z),
        "within_finite_width": _within(known),
        "known_finite_width": int(np.isfinite(known).sum()),
        "largest_z": math.nan,
        "measured": math.nan,
        "theory": math.nan,
        "where": {},
    }
    if not found["values"]:
        return found
    flat = np.unravel_index(np.nanargmax(z), z.shape)
    place = dict(zip(dataset[f"{name}_z"].dims, map(int, flat), strict=True))
    there = dataset.isel(place)
    return found | {
        "largest_z": float(z[flat]),
        "measured": float(there[name]),
        "theory": float(there[f"{name}_theory"]),
        "where": coordinates_at(dataset, place),
    }


def _within(z: np.ndarray) -> float:
    """Return the share of those that are known which are small."""
    known = z[np.isfinite(z)]
    return float(np.mean(known < LARGE)) if known.size else math.nan


@dataclasses.dataclass
class _Grid:
    """Arrays over a study's axes and what is beyond them, filled point by point."""

    study: Study
    depth: int
    rows: dict[int, list[int]]
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = dataclasses.field(default_factory=dict)

    def put(
        self, name: str, group: Group, values: np.ndarray, beyond: tuple[str, ...] = ("layer",)
    ) -> None:
        """Put values of a group's points, (points, layers, …) or others, in their places."""
        rest = values.shape[1:]
        if beyond[:1] == ("layer",):
            rest = (self.depth, *rest[1:])
        if name not in self.arrays:
            self.arrays[name] = (beyond, np.full((len(self.study), *rest), np.nan))
        array = self.arrays[name][1]
        for name_of, value in zip(group.names.tolist(), values, strict=True):
            for row in self.rows[name_of]:
                array[(row, slice(len(value))) if rest else row] = value

    def variables(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Return the arrays with their dimensions."""
        dims = tuple(axis.name for axis in self.study.axes)
        return {
            name: ((*dims, *beyond), array.reshape(*self.study.shape, *array.shape[1:]))
            for name, (beyond, array) in self.arrays.items()
        }


def _put(
    grid: _Grid, study: Study, group: Group, total: Found, laws: dict[str, np.ndarray]
) -> None:
    for place, statistic in enumerate(study.statistics):
        name, estimate = statistic.name, one(total, place)
        predicted, shift, deviation = (laws[kind][:, place] for kind in _THEORY)
        measured, error, z = differences(
            statistic,
            predicted,
            estimate,
            estimate.count * group.units,
            study.sampling.dtype,
        )
        grid.put(name, group, estimate.value)
        grid.put(f"{name}_standard_deviation", group, estimate.standard_deviation)
        grid.put(f"{name}_standard_error", group, estimate.standard_error)
        grid.put(f"{name}_networks", group, estimate.count)
        if statistic.log:
            grid.put(statistic.key, group, measured)
            grid.put(f"{statistic.key}_standard_error", group, error)
            grid.put(f"{statistic.key}_theory", group, predicted)
            with np.errstate(over="ignore"):
                grid.put(f"{name}_theory", group, np.exp(predicted))
        else:
            grid.put(f"{name}_theory", group, predicted)
        grid.put(f"{name}_z", group, z)
        if study.finite_width:
            corrected = differences(
                statistic,
                predicted + shift,
                estimate,
                estimate.count * group.units,
                study.sampling.dtype,
            )[2]
            grid.put(f"{name}_finite_width_shift", group, shift)
            grid.put(f"{name}_finite_width_z", group, corrected)
            with np.errstate(over="ignore"):
                unit = np.exp(predicted) if statistic.log else 1.0
                grid.put(f"{name}_standard_deviation_theory", group, unit * deviation)
        if name == "log_gradient_norm":
            spread = gradient_spread.spread(group.network, group.sites, estimate, deviation)
            for variable, values in spread.items():
                grid.put(variable, group, values)
        if name in total.histograms:
            counts = total.histograms[name]
            grid.put(f"{name}_histogram", group, counts[..., 1:-1], ("layer", f"{name}_bin"))
            grid.put(f"{name}_histogram_below", group, counts[..., 0])
            grid.put(f"{name}_histogram_above", group, counts[..., -1])
    grid.put("overflowed", group, total.failures[:, 0])
    grid.put("vanished", group, total.failures[:, 1])
    if study.spectrum is not None:
        law = {k.removeprefix(_SPECTRUM): v for k, v in laws.items() if k.startswith(_SPECTRUM)}
        depth, dtype = group.network.depth, study.sampling.dtype
        found = spectra.labelled(total.spectra, law, study.spectrum, depth, dtype)
        for name, (beyond, values) in found.items():
            grid.put(name, group, values, beyond)


def _put_laws(grid: _Grid, study: Study, group: Group) -> None:
    points = [study.point(int(number)) for number in group.numbers]
    variance = np.stack([_weight_variance(point.network()) for point in points])
    grid.put("weight_variance", group, variance)


def _weight_variance(network: Network) -> np.ndarray:
    """Return the variance of each layer's weights, the mean over its matrices' entries."""
    found = []
    widths = iter(network.shapes)
    for stage in network.stages:
        layers = jax.tree.leaves(stage.block, is_leaf=lambda b: hasattr(b, "sigma_w"))
        scales = np.array([b.sigma_w for b in layers if hasattr(b, "sigma_w")], float)
        for _ in range(stage.repeats):
            shapes = np.array(next(widths), float).reshape(-1, 2)
            entries = shapes.prod(axis=1)
            known = len(entries) == len(scales) > 0
            found.append(
                np.sum(entries * scales**2 / shapes[:, 1]) / entries.sum() if known else np.nan
            )
    return np.array(found)
