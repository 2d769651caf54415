"""The results of a study, labelled: every statistic over the axes and layers, theory beside it."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray

from gradflow import _files, _input_rows
from gradflow._differences import differences
from gradflow._labels import labelled, layers
from gradflow.errors import InputError
from gradflow.estimation import Estimate
from gradflow.figures._study import coordinates_at
from gradflow.networks import Network
from gradflow.statistics import Statistic
from gradflow.studies import _depth_scales, _gradient_spread, _plan, _spectra
from gradflow.studies._measurements import Measurements
from gradflow.studies._plan import Program
from gradflow.studies._point import Family
from gradflow.studies._runner import SPECTRUM, THEORY
from gradflow.studies._store import Store
from gradflow.studies._study import Axis, Study, coordinate_name
from gradflow.theory._depth_scales import DEPTH_SCALES
from gradflow.theory._programs import why_unknown

__all__ = [
    "FILE",
    "LARGE",
    "agreement",
    "assemble",
    "check",
    "compared",
    "open_results",
    "theory_of",
]
__all__ += ["write"]

# The name of the file in a store.
FILE = Store.RESULTS
# Larger |z| are counted as disagreement: 1 in 16 000 by chance.
LARGE = 4.0


def theory_of(program: Program, store: Store, like: Measurements) -> dict[str, np.ndarray]:
    """Return the theory of a program's points, shaped like their measurements; NaN if unknown."""
    row_of = {name: row for row, name in enumerate(program.names.tolist())}
    arrays = {name: np.full(like.estimates.mean.shape, np.nan) for name in THEORY}
    bins = store.study.spectrum
    if bins is not None:
        for name, value in _spectra.unknown(bins).items():
            arrays[f"{SPECTRUM}{name}"] = np.tile(value, (len(row_of), 1))
    for chunk in store.rounds.theory(program.names):
        source = [n for n, name in enumerate(chunk["names"].tolist()) if name in row_of]
        target = [row_of[int(chunk["names"][n])] for n in source]
        if source:
            for name in arrays.keys() & chunk.keys():
                arrays[name][target] = chunk[name][source]
    return arrays


def assemble(store: Store) -> xarray.Dataset:
    """Return the results of a store, of a finished study or not; NaN where there is nothing yet.

    Returns
    -------
    xarray.Dataset
        Over the study's axes and ``layer``, for each statistic: ``<name>``, its
        ``_standard_deviation`` over networks, ``_standard_error``, number of ``_networks``,
        ``_theory``, ``_z``, and where the study asks for them ``_finite_width_shift``,
        ``_finite_width_z`` and ``_histogram``; ``weight_variance``; ``overflowed``, ``vanished``;
        depth scales (``rate_…``, ``xi_…``), ``gradient_spread`` and singular values. Its attributes
        have the study file and all versions.
    """
    programs = _plan.programs(store.study)
    return _assembled(store.study, programs, store, _attributes(store, programs))


def check(study: Study) -> None:
    """Raise whatever assembling the results would raise at the end, before anything is drawn.

    The results of no networks are assembled at one point, and all axes are labelled.
    """
    point = dataclasses.replace(study, depth_scales=False)
    for axis in range(len(study.axes)):
        point = point.part(axis, 0, 1)
    programs, empty = _plan.programs(point), Store(Path(), point)
    nothing = _assembled(point, programs, empty, _attributes(empty, programs))
    coordinates = _coordinates(study, programs[0].network.depth)
    for dataset in (nothing, xarray.Dataset(coords=coordinates)):
        dataset.to_netcdf(engine="scipy")


def write(store: Store, programs: Sequence[Program]) -> Path:
    """Write the results into the store, as netCDF 3; the file's path.

    The results of a large study are assembled in parts, one in memory at a time; the axis that the
    parts cut is then the first in the file.
    """
    study = store.study
    along, parts = _plan.result_parts(study, _depth(programs))
    attributes = _attributes(store, programs)
    if not along:
        dataset = _assembled(study, programs, store, attributes)
        return store.publish(lambda path: dataset.to_netcdf(path, engine="scipy"))
    attributes["networks"] = float(sum(store.rounds.networks().values()))
    depth = _depth(programs)
    slabs = (
        _assembled(part, _plan.programs(part), store, attributes, depth).transpose(along, ...)
        for part in parts
    )
    return store.publish(lambda path: _files.write_netcdf_slabs(slabs, along, path))


def _depth(programs: Sequence[Program]) -> int:
    return max(program.network.depth for program in programs)


def _attributes(store: Store, programs: Sequence[Program]) -> dict[str, Any]:
    study = store.study
    along = [axis.values["data"] for axis in study.axes if "data" in axis.values]
    sources = along[0] if along else (study.base.get("data"),)
    files = {name: _input_rows.digest(name) for name in sources if _input_rows.is_file(name)}
    return {
        "title": study.title,
        "question": study.question,
        "study": study.text,
        "dtype": study.sampling.dtype,
        "points": len(study),
        "axes": " ".join(axis.name for axis in study.axes),
        "statistics": " ".join(statistic.name for statistic in study.statistics),
        "key": "network i of a point has the key fold_in(point.key, i), where point is "
        "gradflow.studies.Study.point(number)",
        "drawn_with": json.dumps(store.drawn_with, sort_keys=True),
        "samplers": json.dumps(sorted({f"{p.sampler}: {p.reason}" for p in programs})),
        **({"data_sha256": json.dumps(files, sort_keys=True)} if files else {}),
    }


def _assembled(
    study: Study,
    programs: Sequence[Program],
    store: Store,
    attributes: Mapping[str, Any],
    depth: int = 0,
) -> xarray.Dataset:
    """Return the results that a store has of a study or of a part of it.

    They have ``depth`` layers, if that is given: the deepest networks may be in another part.
    Networks are counted if the attributes do not have their number.
    """
    rows: dict[int, list[int]] = {}
    for number, point in enumerate(study.points()):
        rows.setdefault(point.name, []).append(number)
    depth = depth or _depth(programs)
    table, networks = _Table(study, depth, rows), 0
    unknown: dict[str | None, None] = {}
    for program in programs:
        total = store.rounds.measurements(program.names) or _nothing(study, program)
        theory = theory_of(program, store, total)
        table.add(program, total, theory)
        if total.estimates.count.any() and not np.isfinite(theory["predicted"]).any():
            point = study.point(int(program.numbers[0]))
            unknown[why_unknown(program.network, point.inputs())] = None
        each = total.estimates.count + total.estimates.excluded
        networks += int(each[:, 0, 0].sum())  # alike for all statistics and layers
    dataset = xarray.Dataset(table.variables(), coords=_coordinates(study, depth))
    for statistic in study.statistics:
        for name in (statistic.name, f"{statistic.name}_theory"):
            dataset[name].attrs["long_name"] = statistic.label
    for name, label in _gradient_spread.LABELS.items():
        if name in dataset:
            dataset[name].attrs["long_name"] = label
    dataset = labelled(dataset).assign_attrs({"networks": float(networks)} | dict(attributes))
    if reasons := [reason for reason in unknown if reason]:
        dataset.attrs["no_theory"] = "; ".join(reasons)
    return _depth_scales.add(dataset, study) if study.depth_scales else dataset


def _coordinates(study: Study, depth: int) -> dict[str, Any]:
    """Return the values along all dimensions, by their names."""
    coordinates: dict[str, Any] = {"layer": layers(depth)}
    for axis in study.axes:
        if len(axis.values) > 1:
            coordinates[axis.name] = _labels(axis)
        for field, values in axis.values.items():
            coordinates[coordinate_name(field)] = (axis.name, _coordinate(values))
    bins = {f"{name}_bin": histogram for name, histogram in study.histograms.items()}
    if study.spectrum is not None:
        bins[_spectra.BIN] = study.spectrum
    for name, histogram in bins.items():
        coordinates[name] = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    return coordinates


def _nothing(study: Study, program: Program) -> Measurements:
    """Return the measurements of no networks of a program's points."""
    points, depth = len(program.names), program.network.depth
    shape = (points, len(study.statistics), depth)
    counts = np.zeros(shape, np.int64)
    numbers = np.zeros(shape)
    bins = {name: histogram.bins + 2 for name, histogram in study.histograms.items()}
    return Measurements(
        names=program.names,
        estimates=Estimate(counts, counts, np.full(shape, np.nan), numbers, numbers),
        failures=np.zeros((points, 2, depth), np.int64),
        histograms={name: np.zeros((points, depth, n), np.int64) for name, n in bins.items()},
        spectra={}
        if study.spectrum is None
        else _spectra.counted(np.full((points, 1), np.nan), np.arange(points), study.spectrum),
    )


def _coordinate(values: tuple) -> list | np.ndarray:
    """Return an axis's values; netCDF 3 has no integers of 64 bits, which seeds may need."""
    large = any(isinstance(value, int) and value >= 1 << 31 for value in values)
    return np.array(values, np.float64) if large else list(values)


def _labels(axis: Axis) -> list[str] | np.ndarray:
    """Return labels of an axis along which several fields vary: their values joined, or numbers."""
    rows = list(zip(*axis.values.values(), strict=True))
    if any(isinstance(value, str) for value in rows[0]):
        return [" ".join(map(str, row)) for row in rows]
    return np.arange(len(rows))


@contextlib.contextmanager
def open_results(path: Path) -> Iterator[xarray.Dataset]:
    """Open the results' file of a `Store`, which has checked it.

    Raises
    ------
    InputError
        If the file was removed or replaced since.
    """
    try:
        dataset = xarray.open_dataset(path, engine="scipy")
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be read any more ({(error.strerror or str(error)).lower()}); "
            "another process resumed the study, or removed it"
        ) from error
    with dataset:
        yield dataset


def compared(dataset: xarray.Dataset) -> list[str]:
    """Return the names of the variables that have a z: statistics, depth scales, a spectrum's."""
    derived = (*(f"rate_{name}" for name in DEPTH_SCALES), _gradient_spread.NAME)
    known = [
        n for n in derived if f"{n}_z" in dataset and bool(np.isfinite(dataset[f"{n}_z"]).any())
    ]
    return [
        *dataset.attrs["statistics"].split(),
        *known,
        *(name for name in _spectra.COMPARED if name in dataset),
    ]


def agreement(dataset: xarray.Dataset, name: str) -> dict[str, Any]:
    """Compare one of the `compared` variables with its theory, over all points and layers.

    Returns
    -------
    dict
        ``statistic``, its name; ``values``, how many have a z; ``within``, the share of these with
        |z| < `LARGE`; ``within_finite_width`` and ``known_finite_width``, the same with theory's
        first order in 1/width; ``largest_z``, with ``measured``, ``theory`` and ``where`` it is.
    """
    z = np.abs(dataset[f"{name}_z"].to_numpy())
    corrected = dataset.get(f"{name}_finite_width_z")
    corrected_z = np.full(1, np.nan) if corrected is None else np.abs(corrected.to_numpy())
    row: dict[str, Any] = {
        "statistic": name,
        "values": int(np.isfinite(z).sum()),
        "within": _within(z),
        "within_finite_width": _within(corrected_z),
        "known_finite_width": int(np.isfinite(corrected_z).sum()),
        "largest_z": math.nan,
        "measured": math.nan,
        "theory": math.nan,
        "where": {},
    }
    if not row["values"]:
        return row
    flat = np.unravel_index(np.nanargmax(z), z.shape)
    index = dict(zip(dataset[f"{name}_z"].dims, map(int, flat), strict=True))
    worst = dataset.isel(index)
    return row | {
        "largest_z": float(z[flat]),
        "measured": float(worst[name]),
        "theory": float(worst[f"{name}_theory"]),
        "where": coordinates_at(dataset, index),
    }


def _within(z: np.ndarray) -> float:
    """Return the share of the finite |z| that are below `LARGE`."""
    known = z[np.isfinite(z)]
    return float(np.mean(known < LARGE)) if known.size else math.nan


@dataclasses.dataclass
class _Table:
    """Arrays over a study's axes and further dimensions, filled program by program.

    Attributes
    ----------
    study, depth
        The study, or a part of it, and how many layers the arrays have.
    rows
        The numbers of the points of each name.
    arrays
        By variable, its further dimensions and its values, (points, …); NaN where there are none.
    """

    study: Study
    depth: int
    rows: dict[int, list[int]]
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = dataclasses.field(default_factory=dict)

    def variables(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Return the arrays with all their dimensions."""
        dims = tuple(axis.name for axis in self.study.axes)
        return {
            name: ((*dims, *beyond), array.reshape(*self.study.shape, *array.shape[1:]))
            for name, (beyond, array) in self.arrays.items()
        }

    def put(
        self, name: str, program: Program, values: np.ndarray, beyond: tuple[str, ...] = ("layer",)
    ) -> None:
        """Put a variable of a program's points in their rows; (points, layers, …) or others."""
        rest = values.shape[1:]
        if beyond[:1] == ("layer",):
            rest = (self.depth, *rest[1:])
        if name not in self.arrays:
            self.arrays[name] = (beyond, np.full((len(self.study), *rest), np.nan))
        array = self.arrays[name][1]
        for point_name, value in zip(program.names.tolist(), values, strict=True):
            for row in self.rows[point_name]:
                array[(row, slice(len(value))) if rest else row] = value

    def add(self, program: Program, total: Measurements, theory: Mapping[str, np.ndarray]) -> None:
        """Put everything that is known of a program's points."""
        points = [self.study.point(int(number)) for number in program.numbers]
        scaled = Family(points[0]).networks(points)
        self.put("weight_variance", program, _weight_variance(program.network, scaled))
        for index, statistic in enumerate(self.study.statistics):
            by_kind = {kind: theory[kind][:, index] for kind in THEORY}
            self._add_statistic(program, statistic, total.statistic(index), by_kind)
            name = statistic.name
            if name in total.histograms:
                counts = total.histograms[name]
                self.put(f"{name}_histogram", program, counts[..., 1:-1], ("layer", f"{name}_bin"))
                self.put(f"{name}_histogram_below", program, counts[..., 0])
                self.put(f"{name}_histogram_above", program, counts[..., -1])
        self.put("overflowed", program, total.failures[:, 0])
        self.put("vanished", program, total.failures[:, 1])
        if self.study.spectrum is not None:
            spectrum = {
                name.removeprefix(SPECTRUM): values
                for name, values in theory.items()
                if name.startswith(SPECTRUM)
            }
            depth, dtype = program.network.depth, self.study.sampling.dtype
            variables = _spectra.labelled(
                total.spectra, spectrum, self.study.spectrum, depth, dtype
            )
            for name, (beyond, values) in variables.items():
                self.put(name, program, values, beyond)

    def _add_statistic(
        self,
        program: Program,
        statistic: Statistic,
        estimate: Estimate,
        theory: Mapping[str, np.ndarray],
    ) -> None:
        name, dtype = statistic.name, self.study.sampling.dtype
        predicted, shift, deviation = (theory[kind] for kind in THEORY)
        samples = estimate.count * program.units
        measured, error, z = differences(statistic, predicted, estimate, samples, dtype)
        self.put(name, program, estimate.value)
        self.put(f"{name}_standard_deviation", program, estimate.standard_deviation)
        self.put(f"{name}_standard_error", program, estimate.standard_error)
        self.put(f"{name}_networks", program, estimate.count)
        if statistic.log:
            self.put(statistic.key, program, measured)
            self.put(f"{statistic.key}_standard_error", program, error)
            self.put(f"{statistic.key}_theory", program, predicted)
            with np.errstate(over="ignore"):
                self.put(f"{name}_theory", program, np.exp(predicted))
        else:
            self.put(f"{name}_theory", program, predicted)
        self.put(f"{name}_z", program, z)
        if self.study.finite_width:
            _, _, corrected = differences(statistic, predicted + shift, estimate, samples, dtype)
            self.put(f"{name}_finite_width_shift", program, shift)
            self.put(f"{name}_finite_width_z", program, corrected)
            with np.errstate(over="ignore"):
                unit = np.exp(predicted) if statistic.log else 1.0
                self.put(f"{name}_standard_deviation_theory", program, unit * deviation)
        if name == "log_gradient_norm":
            spread = _gradient_spread.spread(program.network, program.sites, estimate, deviation)
            for variable, values in spread.items():
                self.put(variable, program, values)


def _weight_variance(network: Network, scaled: Network) -> np.ndarray:
    """The variance of each layer's weights over all entries of its matrices, (points, layers).

    The second network is the first one with the scales of all points, along a first axis.
    """
    variances = []
    widths = iter(network.shapes)
    for stage in scaled.stages:
        layers = jax.tree.leaves(stage.block, is_leaf=lambda b: hasattr(b, "sigma_w"))
        scales = np.array([b.sigma_w for b in layers if hasattr(b, "sigma_w")])
        for _ in range(stage.repeats):
            shapes = np.array(next(widths), float).reshape(-1, 2)
            entries = shapes.prod(axis=1)
            known = len(entries) == len(scales) > 0
            each = entries / shapes[:, 1] / entries.sum() @ scales**2 if known else np.nan
            variances.append(np.broadcast_to(each, len(jax.tree.leaves(scaled)[0])))
    return np.stack(variances, axis=1)
