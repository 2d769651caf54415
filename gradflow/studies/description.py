"""The study file: a base network and axes over it, read from TOML and checked.

    title = "Tanh: order and chaos"

    [network]                  # what `builders.mlp` or, with kind = "residual", `residual` takes
    activation = "tanh"
    width = 1000
    depth = 50

    [[axes]]                   # each is one dimension of the grid: their product is the study
    sigma_w2 = { from = 0.5, to = 4.0, points = 41 }
    [[axes]]                   # several fields of one axis go together, value by value
    sigma_b2 = [0.0, 0.05]

    [inputs]                   # the same for all networks of a point
    batch = 2
    correlation = 0.5

    [sampling]
    networks = 100             # a point; or target = { q = 0.01 }, round = 100, most = 10000
    seed = 0

    [spectrum]                 # also all singular values of J = D^L W^L … D^1 W^1, in bins
    from = 0
    to = 3
    bins = 60

How many networks may also stand along an axis, beside its fields: ``networks = [100, 50]``.

J is ∂h^L/∂x with h^L = φ(z^L), D^l = diag φ'(z^l): the end-to-end Jacobian that
`gradflow.theory.spectrum` has the law of. It is measured of plain networks of one width, that of
their one input, whose weights are all drawn then: kind = "mlp" without norm, keep_rate and last.

Nothing in a file is run. Every mistake is an `InputError` of one sentence that begins with the path
of the entry, as ``axes[0].sigma_w2[3]``. A point is known by its settings alone, so that its
networks are the same whatever other points there are.
"""

import dataclasses
import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradflow import statistics
from gradflow.errors import InputError
from gradflow.statistics import Statistic
from gradflow.studies import _point, entries
from gradflow.studies._point import Point
from gradflow.studies.entries import Check, shown, under

__all__ = ["Axis", "HistogramRange", "Sampling", "Study", "differences", "load", "parse"]

# Above what any file can mean, and far below what would fill the memory before it is refused.
_MOST_POINTS = 1_000_000
_MOST_BINS = 10_000
_LARGEST_FILE = 1 << 24
_MOST_PARTS = 100
_PART = r"""(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')"""
_DEEP_KEY = re.compile(
    rf"(?<![\w.-]){_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{{_MOST_PARTS},}}+", re.ASCII
)
# Significant digits of a value in a range: one that is in two ranges is then the same number.
_DECIMALS = 12


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
        return "_".join(map(entries.label, self.values))

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def part(self, start: int, stop: int) -> "Axis":
        """Return a stretch of it."""
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
        """Return a point by its number, from 0 on; the last axis is the fastest."""
        return self._point(tuple(int(index) for index in np.unravel_index(number, self.shape)))

    def _point(self, place: tuple[int, ...]) -> Point:
        varied = {
            field: values[index]
            for axis, index in zip(self.axes, place, strict=True)
            for field, values in axis.values.items()
        }
        along = [
            axis.networks[index]
            for axis, index in zip(self.axes, place, strict=True)
            if axis.networks is not None
        ]
        count = along[0] if along else self.sampling.networks
        return Point(place, _point.resolved({**self.base, **varied}), count)

    def points(self) -> Iterator[Point]:
        """Yield all points in order."""
        return map(self._point, itertools.product(*map(range, self.shape)))

    def part(self, axis: int, start: int, stop: int) -> "Study":
        """Return the study of a stretch of one axis."""
        axes = list(self.axes)
        axes[axis] = axes[axis].part(start, stop)
        return dataclasses.replace(self, axes=tuple(axes))

    def asked(self) -> dict[str, Any]:
        """Return all that decides which networks are drawn and what is measured, by its name."""
        return {
            "base": dict(self.base),
            "axes": self.named_axes(),
            "fixed": self.fixed(),
            "networks": self.sampling.networks,
            "most": self.sampling.most,
        }

    def named_axes(self) -> dict[str, Any]:
        """Return the fields of every axis, by its number."""
        return {
            str(number): {field: list(values) for field, values in axis.values.items()}
            | ({} if axis.networks is None else {"networks": list(axis.networks)})
            for number, axis in enumerate(self.axes)
        }

    def fixed(self) -> dict[str, Any]:
        """Return what may not change while a study grows: all but points, networks and words."""
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
        found: dict[str, Any] = {
            "statistics": {"measure": [s.name for s in self.statistics]},
            "histograms": {k: dataclasses.asdict(h) for k, h in self.histograms.items()},
            "sampling": sampling,
            "theory": {"finite_width": self.finite_width},
        }
        # Without it what it was before there were any.
        return found | ({"spectrum": dataclasses.asdict(self.spectrum)} if self.spectrum else {})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what differs between two nested mappings, each as 'path was …, is …'."""
    before, after = _flat(old), _flat(new)
    return [
        f"{path} was {shown(before.get(path, 'absent'))}, is {shown(after.get(path, 'absent'))}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path, "absent") != after.get(path, "absent")
    ]


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}.{key}" if above else key
        found |= _flat(value, path) if isinstance(value, Mapping) else {path: value}
    return found


def load(path: Path) -> Study:
    """Return the study of a file.

    Raises
    ------
    InputError
        If it cannot be read, or does not say what a study is.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InputError(
                f"file is {str(path)!r}, of more than {_LARGEST_FILE >> 20} MiB; a study file is "
                "a page of text"
            )
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(
            f"file is {str(path)!r}, which cannot be read ({(error.strerror or str(error)).lower()}"
            "); it is a study file in TOML"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"file is {str(path)!r}, which is not text in UTF-8") from error
    return parse(text)


def parse(text: str) -> Study:
    """Return the study that a file's text describes.

    Raises
    ------
    InputError
        If it does not; the sentence begins with the path of the wrong entry.
    """
    if _DEEP_KEY.search(text):  # of which tomllib makes gigabytes
        raise InputError(
            f"the study file has a key of more than {_MOST_PARTS} parts with dots between; its "
            "tables are one deep"
        )
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the study file is not TOML: {reason}") from error
    entries.known("", found, _TABLES)
    title = entries.text("title", found.get("title", ""))
    question = entries.text("question", found.get("question", ""))
    base = entries.fields("network", entries.table("network", found), entries.NETWORK)
    inputs = entries.fields("inputs", entries.table("inputs", found), entries.INPUTS)
    axes = _axes(found.get("axes", []))
    sampling = _sampling(entries.table("sampling", found), axes)
    given = {field: f"network.{field}" for field in base}
    given |= {field: f"inputs.{field}" for field in inputs}
    for number, axis in enumerate(axes):
        for field in axis.values:
            path = f"axes[{number}].{field}"
            if field in given:
                raise InputError(f"{path} also stands at {given[field]}; it has one place")
            given[field] = path
    _together(given, base, axes)
    if "seed" in given and "seed" in found.get("sampling", {}):
        raise InputError(f"{given['seed']} also stands at sampling.seed; it has one place")
    everything = {"seed": sampling.seed, **base, **inputs}
    batches = _values_of("batch", everything, axes) or [1]
    if "data" in base | inputs and max(batches) > _point.DIGITS_IMAGES:
        raise InputError(
            f"inputs.batch is {max(batches)}; there are {_point.DIGITS_IMAGES} digit images"
        )
    least = min(_values_of("correlation", everything, axes) or [0.0])
    if "correlation" in given and max(batches) == 1:
        raise InputError(f"{given['correlation']} is between inputs, and inputs.batch is 1")
    if least * (max(batches) - 1) < -1:
        raise InputError(
            f"{given['correlation']} is {least} somewhere; of {max(batches)} inputs it is at least "
            f"{-1 / (max(batches) - 1):.6g}"
        )
    measured = _measured(entries.table("statistics", found), sampling, min(batches))
    if len(axes) and math.prod(map(len, axes)) > _MOST_POINTS:
        raise InputError(
            f"axes have {math.prod(map(len, axes))} points in all; a study has at most "
            f"{_MOST_POINTS}"
        )
    flags = dict.fromkeys(("finite_width", "depth_scales"), entries.flag)
    theory = entries.fields("theory", entries.table("theory", found), flags)
    spectrum = None
    if "spectrum" in found:
        spectrum = _bins("spectrum", entries.table("spectrum", found))
        _plain(spectrum, given, everything, axes, sampling)
    return Study(
        text=text,
        title=title,
        question=question,
        base=everything,
        axes=axes,
        statistics=measured,
        histograms=_histograms(entries.table("histograms", found), measured),
        spectrum=spectrum,
        sampling=sampling,
        finite_width=theory.get("finite_width", max(batches) == 1),
        depth_scales=theory.get("depth_scales", True),
    )


_TABLES = (
    *("title", "question", "network", "axes", "inputs", "sampling", "statistics"),
    *("histograms", "spectrum", "theory"),
)


# Of each of these, one is given at most.
_ONE_OF = (
    ("weights", "sigma_w", "sigma_w2"),
    ("sigma_b", "sigma_b2"),
    ("width", "widths"),
    ("depth", "widths"),
    ("input_width", "widths"),
    ("data", "mean_square"),
    ("data", "correlation"),
)
# Of each of these, one is given at least.
_NEEDED = (
    ("activation",),
    ("weights", "sigma_w", "sigma_w2"),
    ("width", "widths"),
    ("depth", "widths"),
)


def _axes(found: object) -> tuple[Axis, ...]:
    if not isinstance(found, list):
        raise InputError(f"axes is {shown(found)}; it is a list of tables, each [[axes]]")
    return tuple(_axis(f"axes[{number}]", table) for number, table in enumerate(found))


def _axis(path: str, table: object) -> Axis:
    if not isinstance(table, Mapping) or not table:
        raise InputError(f"{path} is {shown(table)}; it is a table with at least one field")
    entries.known(path, table, entries.AXES)
    values = {field: _values(f"{path}.{field}", field, given) for field, given in table.items()}
    lengths = {field: len(those) for field, those in values.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{field} {length}" for field, length in lengths.items())
        raise InputError(f"{path} has values of several lengths ({listed}); they go together")
    count = values.pop("networks", None)
    if not values:
        raise InputError(f"{path} has networks alone; give a field that they go together with")
    rows = list(zip(*values.values(), strict=True))
    known = set()
    for row in rows:
        if row in known:
            raise InputError(f"{path} has {shown(row)} twice; its values differ")
        known.add(row)
    return Axis(values, count)


def _values(path: str, field: str, given: object) -> tuple:
    if isinstance(given, Mapping):
        return _range(path, field, given)
    if not isinstance(given, list) or not given:
        raise InputError(
            f"{path} is {shown(given)}; it is a list of values, or a range "
            "{ from = 1, to = 2, points = 3 }"
        )
    if len(given) > _MOST_POINTS:
        raise InputError(f"{path} has {len(given)} values; it has at most {_MOST_POINTS}")
    return tuple(
        entries.AXES[field](f"{path}[{place}]", value) for place, value in enumerate(given)
    )


def _range(path: str, field: str, given: Mapping[str, Any]) -> tuple:
    if field not in entries.NUMBERS + entries.COUNTS:
        raise InputError(f"{path} is a range, and {field} is no number; give a list of values")
    entries.known(path, given, ("from", "to", "points", "spacing"))
    for needed in ("from", "to", "points"):
        if needed not in given:
            raise InputError(f"{path}.{needed} is missing; a range has from, to and points")
    start, stop = (entries.AXES[field](f"{path}.{end}", given[end]) for end in ("from", "to"))
    for end, value in (("from", start), ("to", stop)):
        if isinstance(value, str):
            raise InputError(f"{path}.{end} is {value!r}; the ends of a range are numbers")
    points = entries.count(_MOST_POINTS, 2)(f"{path}.points", given["points"])
    spacing = entries.name("spacing", ("linear", "geometric"))(
        f"{path}.spacing", given.get("spacing", "linear")
    )
    if spacing == "geometric" and not (start > 0 and stop > 0):
        raise InputError(f"{path}.from is {start} and to is {stop}; a geometric range is above 0")
    make = np.geomspace if spacing == "geometric" else np.linspace
    values = tuple(float(f"{value:.{_DECIMALS}g}") for value in make(start, stop, points))
    if field in entries.COUNTS:
        return tuple(round(value) for value in values)
    return values


def _values_of(field: str, base: Mapping[str, Any], axes: Sequence[Axis]) -> list:
    """Return every value that a field has anywhere in the study."""
    along = [axis.values[field] for axis in axes if field in axis.values]
    return list(along[0]) if along else [base[field]] if field in base else []


def _together(given: Mapping[str, str], base: Mapping[str, Any], axes: Sequence[Axis]) -> None:
    for names in _ONE_OF:
        those = [given[name] for name in names if name in given]
        if len(those) > 1:
            raise InputError(f"{those[1]} takes the place of {those[0]}; give one of them")
    for needed in _NEEDED:
        if not any(name in given for name in needed):
            others = f"; give one of {', '.join(needed)}" if len(needed) > 1 else "; give it"
            raise InputError(f"network.{needed[0]} is missing{others}, there or along an axis")
    kinds = _values_of("kind", base, axes) or ["mlp"]
    for only, kind in ((entries.RESIDUAL_ONLY, "residual"), (entries.MLP_ONLY, "mlp")):
        for field in only:
            if field in given and kind not in kinds:
                raise InputError(f"{given[field]} is of networks of kind {kind!r}; leave it out")
    if "widths" in given and "residual" in kinds:
        raise InputError(
            f"{given['widths']} is of networks of kind 'mlp'; give width and depth instead"
        )
    if "norm_position" in given and "norm" not in given:
        raise InputError(
            f"{given['norm_position']} says where norm stands, and there is none; give norm"
        )


def _sampling(table: Mapping[str, Any], axes: Sequence[Axis]) -> Sampling:
    checks: dict[str, Check] = {
        "networks": entries.how_many,
        "round": entries.count(entries.MOST_NETWORKS, 2),
        "most": entries.count(entries.MOST_NETWORKS, 2),
        "target": _target,
        "seed": entries.seed,
        "dtype": entries.name("dtype", ("float32", "float64")),
        "sampler": entries.name("sampler", ("auto", "dense", "matrix_free")),
        "memory_gib": entries.positive,
    }
    found = entries.fields("sampling", table, checks)
    target = found.get("target", {})
    for field in ("round", "most"):
        if field in found and not target:
            raise InputError(f"sampling.{field} goes with a target; give sampling.target")
    counts = {"sampling.networks": found["networks"]} if "networks" in found else {}
    for number, axis in enumerate(axes):
        if axis.networks is not None:
            counts[f"axes[{number}].networks"] = max(axis.networks)
    places = list(counts)
    if target and places:
        raise InputError(f"{places[0]} takes the place of sampling.target; give one of them")
    if len(places) > 1:
        raise InputError(f"{places[1]} also stands at {places[0]}; it has one place")
    if not target and not places:
        raise InputError(
            "sampling.networks is missing; give it, there or along an axis, or a target standard "
            "error"
        )
    networks = found.get("round", 100) if target else counts[places[0]]
    most = found.get("most", 100 * networks) if target else networks
    if most < networks:
        raise InputError(f"sampling.most is {most}; it is at least the round, {networks}")
    return Sampling(
        networks=networks,
        most=min(most, entries.MOST_NETWORKS),
        target=target,
        seed=found.get("seed", 0),
        dtype=found.get("dtype", "float32"),
        sampler=found.get("sampler", "auto"),
        memory_gib=found.get("memory_gib"),
    )


_STATISTICS = {statistic.name: statistic for statistic in statistics.ALL}


def _target(path: str, value: object) -> dict[str, float]:
    if not isinstance(value, Mapping) or not value:
        raise InputError(
            f"{path} is {shown(value)}; it is standard errors by statistic, as {{ q = 0.01 }}"
        )
    for name in value:
        _statistic(under(path, name), name)
    return {name: entries.positive(under(path, name), error) for name, error in value.items()}


def _statistic(path: str, name: object) -> Statistic:
    return _STATISTICS[entries.name("statistic", _STATISTICS)(path, name)]


def _measured(table: Mapping[str, Any], sampling: Sampling, batch: int) -> tuple[Statistic, ...]:
    """Return what is measured: all that so many inputs allow, without a list."""
    entries.known("statistics", table, ("measure",))
    names = table.get("measure", [s.name for s in statistics.ALL if s.sites <= batch])
    if not isinstance(names, list) or not names:
        raise InputError(f"statistics.measure is {shown(names)}; it is a list of statistics")
    found = [_statistic(f"statistics.measure[{n}]", name) for n, name in enumerate(names)]
    for number, statistic in enumerate(found):
        if statistic in found[:number]:
            raise InputError(f"statistics.measure[{number}] is {statistic.name!r} again; once")
        if statistic.sites > batch:
            raise InputError(
                f"statistics.measure[{number}] is {statistic.name!r}, which takes "
                f"{statistic.sites} inputs; inputs.batch is {batch}"
            )
    for name in sampling.target:
        if _STATISTICS[name] not in found:
            raise InputError(f"sampling.target.{name} is of a statistic that is not measured")
    return tuple(found)


def _histograms(
    table: Mapping[str, Any], measured: Sequence[Statistic]
) -> dict[str, HistogramRange]:
    found = {}
    for name, given in table.items():
        path = under("histograms", name)
        if _statistic(path, name) not in measured:
            raise InputError(f"{path} is of a statistic that is not measured")
        if not isinstance(given, Mapping):
            raise InputError(f"{path} is {shown(given)}; it is {{ from = 0, to = 1, bins = 50 }}")
        found[name] = _bins(path, given)
    return found


def _bins(path: str, given: Mapping[str, Any]) -> HistogramRange:
    entries.known(path, given, ("from", "to", "bins"))
    for needed in ("from", "to", "bins"):
        if needed not in given:
            raise InputError(f"{path}.{needed} is missing; a histogram has from, to and bins")
    start, stop = (entries.finite(f"{path}.{end}", given[end]) for end in ("from", "to"))
    bins = entries.count(_MOST_BINS)(f"{path}.bins", given["bins"])
    if not 0 < (stop - start) / bins < math.inf:
        raise InputError(f"{path}.to is {stop}; it is above {path}.from, {start}")
    return HistogramRange(start, stop, bins)


def _plain(
    spectrum: HistogramRange,
    given: Mapping[str, str],
    base: Mapping[str, Any],
    axes: Sequence[Axis],
    sampling: Sampling,
) -> None:
    """Raise `InputError` if some network is none whose J there is a spectrum of."""

    def values(field: str) -> list:
        return _values_of(field, base, axes)

    if spectrum.start < 0:
        raise InputError(f"spectrum.from is {spectrum.start}; singular values are 0 or more")
    for field, allowed in (("kind", "mlp"), ("norm", entries.NO_NORM), ("batch", 1)):
        others = [value for value in values(field) if value != allowed]
        if others:
            raise InputError(
                f"{given[field]} is {others[0]!r} somewhere; with [spectrum] it is {allowed!r}"
            )
    for field in ("keep_rate", "last"):
        if field in given:
            raise InputError(f"{given[field]} does not go with [spectrum]; leave it out")
    widths = {n for value in values("widths") for n in value} or set(values("width"))
    below, there = set(values("input_width")), given.get("input_width")
    if "data" in given:
        below, there = {_point.DIGITS_WIDTH}, given["data"]
    if len(widths) > 1 and "widths" in given:
        raise InputError(
            f"{given['widths']} has several widths; with [spectrum] input and layers are as wide"
        )
    if below and (below != widths or len(widths) > 1):
        raise InputError(
            f"{there} makes inputs of width {min(below)}; with [spectrum] they are as wide as "
            "every layer"
        )
    if sampling.sampler == "matrix_free":
        raise InputError(
            "sampling.sampler is 'matrix_free'; [spectrum] takes all weights, which 'dense' draws"
        )
