"""The study file: a base network and axes over it, read from TOML and checked.

    title = "Tanh: order and chaos"

    [network]                  # the options of `schema`; of another kind those of its builder
    activation = "tanh"
    width = 1000
    depth = 50

    [[axes]]                   # each is one dimension of the grid: their product is the study
    sigma_w2 = { from = 0.5, to = 4.0, points = 41 }
    [[axes]]                   # several fields of one axis go together, value by value
    sigma_b2 = [0.0, 0.05]

    [inputs]                   # the arguments of `data.inputs`; a point's networks have the same
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

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradflow import _entries, _imports, _input_rows, _schema, statistics
from gradflow._entries import Check, OneOf, Whole, path_of, shown
from gradflow._schema import NONE, Option
from gradflow.errors import InputError
from gradflow.statistics import Statistic
from gradflow.studies._study import MOST_NETWORKS, Axis, HistogramRange, Sampling, Study

__all__ = ["load", "parse"]

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
# A key has 32 bits where JAX has no 64-bit integers, and numbers of networks are int32.
_SEED, _NETWORKS = Whole(2**32 - 1, 0), Whole(MOST_NETWORKS)
_COUNTED = (
    Option("seed", "Seed of everything that is random.", int, False, _SEED, 0),
    Option("networks", "How many networks a point has.", int, False, _NETWORKS, None),
)


def load(path: Path, *, allow_imports: bool = False) -> Study:
    """Read the study that a file describes.

    Parameters
    ----------
    path
        Of the file.
    allow_imports
        Whether an activation may be a ``module:function``, which is then imported, and so run.

    Raises
    ------
    InputError
        If it cannot be read, or is no study file; see `parse`.
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
    return parse(text, allow_imports=allow_imports)


def parse(text: str, *, allow_imports: bool | None = False) -> Study:
    """Read the study that a file's text describes.

    Parameters
    ----------
    text
        Of the file.
    allow_imports
        Whether an activation may be a ``module:function``, which is then imported, and so run.
        With None it may, and is not looked for: its networks cannot be drawn.

    Raises
    ------
    InputError
        If the text is not TOML or an entry is wrong; the sentence begins with the entry's path.
    """
    with _imports.allowed(allow_imports):
        return _parsed(text)


def _parsed(text: str) -> Study:
    file = _read_toml(text)
    _entries.check_known("", file, _TABLES)
    title = _entries.text("title", file.get("title", ""))
    question = _entries.text("question", file.get("question", ""))
    network = _read_options("network", file, _schema.options())
    inputs = _read_options("inputs", file, _schema.input_options())
    axes = _axes(file.get("axes", []))
    sampling = _sampling(_entries.table("sampling", file), axes)
    base = {"seed": sampling.seed, **network, **inputs}
    given = _paths(network, inputs, axes)
    _check_network(given, base, axes)
    if "seed" in given and "seed" in file.get("sampling", {}):
        raise InputError(f"{given['seed']} also stands at sampling.seed; it has one place")
    _check_inputs(given, base, axes)
    least, most = _rows(base, axes)
    measured = _measured(_entries.table("statistics", file), sampling, least)
    if len(axes) and math.prod(map(len, axes)) > _MOST_POINTS:
        raise InputError(
            f"axes have {math.prod(map(len, axes))} points in all; a study has at most "
            f"{_MOST_POINTS}"
        )
    flags = dict.fromkeys(("finite_width", "depth_scales"), _entries.flag)
    theory = _entries.check_entries("theory", _entries.table("theory", file), flags)
    spectrum = None
    if "spectrum" in file:
        spectrum = _bins("spectrum", _entries.table("spectrum", file))
        _check_spectrum(spectrum, given, base, axes, sampling)
    return Study(
        text=text,
        title=title,
        question=question,
        base=base,
        axes=axes,
        statistics=measured,
        histograms=_histograms(_entries.table("histograms", file), measured),
        spectrum=spectrum,
        sampling=sampling,
        finite_width=theory.get("finite_width", most == 1),
        depth_scales=theory.get("depth_scales", True),
    )


_TABLES = (
    *("title", "question", "network", "axes", "inputs", "sampling", "statistics"),
    *("histograms", "spectrum", "theory"),
)
# A study file says these itself, though the builders have a default. Of each, one is given.
_SAID = (("activation",), ("weights", "sigma_w", "sigma_w2"))


def _read_toml(text: str) -> dict[str, Any]:
    if _DEEP_KEY.search(text):  # of which tomllib makes gigabytes
        raise InputError(
            f"the study file has a key of more than {_MOST_PARTS} parts with dots between; its "
            "tables are one deep"
        )
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the study file is not TOML: {reason}") from error


def _read_options(
    table: str, file: Mapping[str, Any], options: Mapping[str, Option]
) -> dict[str, Any]:
    """The options of a table of the file, each checked."""
    checks = {name: option.check for name, option in options.items()}
    return _entries.check_entries(table, _entries.table(table, file), checks)


def _paths(
    network: Mapping[str, Any], inputs: Mapping[str, Any], axes: Sequence[Axis]
) -> dict[str, str]:
    """Where each field stands in the file; a field has one place."""
    given = {field: f"network.{field}" for field in network}
    given |= {field: f"inputs.{field}" for field in inputs}
    for number, axis in enumerate(axes):
        for field in axis.values:
            path = f"axes[{number}].{field}"
            if field in given:
                raise InputError(f"{path} also stands at {given[field]}; it has one place")
            given[field] = path
    return given


def _check_network(given: Mapping[str, str], base: Mapping[str, Any], axes: Sequence[Axis]) -> None:
    """Raise `InputError` if the network's fields do not go together, or one is missing."""
    options = _schema.options()
    network = {field: path for field, path in given.items() if field in options}
    kinds = _values_of("kind", base, axes) or ["mlp"]
    _schema.check_together(network, kinds)
    unsaid = [ways for ways in _SAID if not any(way in given for way in ways)]
    for ways in (*unsaid, _schema.missing(network, kinds)):
        if ways:
            others = f"; give one of {', '.join(ways)}" if len(ways) > 1 else "; give it"
            raise InputError(f"network.{ways[0]} is missing{others}, there or along an axis")


def _check_inputs(given: Mapping[str, str], base: Mapping[str, Any], axes: Sequence[Axis]) -> None:
    """Raise `InputError` if there are no such inputs somewhere."""
    if "input" in given and "data" in given:
        raise InputError(f"{given['input']} takes the place of {given['data']}; give one of them")
    kinds = _kinds_of_inputs(base, axes)
    if "correlation" in given and not set(kinds) & set(_input_rows.CORRELATED):
        raise InputError(
            f"{given['correlation']} does not go with inputs of kind {kinds[0]!r}, which have "
            f"their own; it is of {', '.join(_input_rows.CORRELATED)}"
        )
    _, most = _rows(base, axes)
    least = min(_values_of("correlation", base, axes) or [0.0])
    if "correlation" in given and most == 1:
        raise InputError(f"{given['correlation']} is between inputs, and inputs.batch is 1")
    if least * (most - 1) < -1:
        raise InputError(
            f"{given['correlation']} is {least} somewhere; of {most} inputs it is at least "
            f"{-1 / (most - 1):.6g}"
        )


def _rows(base: Mapping[str, Any], axes: Sequence[Axis]) -> list[int]:
    """The least and the largest number of inputs, or of all inputs' tokens."""
    several = _values_of("batch", base, axes) or [1]
    tokens = _values_of("tokens", base, axes) or [1]
    return [end(several) * end(tokens) for end in (min, max)]


def _kinds_of_inputs(base: Mapping[str, Any], axes: Sequence[Axis]) -> list[str]:
    """The kinds of the inputs that there are somewhere."""
    kinds = [_input_rows.kind_of(name, None) for name in _values_of("input", base, axes)]
    kinds += [_input_rows.kind_of(None, name) for name in _values_of("data", base, axes)]
    return kinds or ["cosines"]


def _axis_options() -> dict[str, Option]:
    """What an axis may go over: every option but a list, the seed, and how many networks."""
    options = [*_schema.options().values(), *_schema.input_options().values(), *_COUNTED]
    return {option.name: option for option in options if option.value_type is not list}


def _axes(tables: object) -> tuple[Axis, ...]:
    if not isinstance(tables, list):
        raise InputError(f"axes is {shown(tables)}; it is a list of tables, each [[axes]]")
    return tuple(_axis(f"axes[{number}]", table) for number, table in enumerate(tables))


def _axis(path: str, table: object) -> Axis:
    if not isinstance(table, Mapping) or not table:
        raise InputError(f"{path} is {shown(table)}; it is a table with at least one field")
    options = _axis_options()
    _entries.check_known(path, table, options)
    values = {
        field: _values(f"{path}.{field}", options[field], given) for field, given in table.items()
    }
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


def _values(path: str, option: Option, given: object) -> tuple:
    if isinstance(given, Mapping):
        return _range(path, option, given)
    if not isinstance(given, list) or not given:
        raise InputError(
            f"{path} is {shown(given)}; it is a list of values, or a range "
            "{ from = 1, to = 2, points = 3 }"
        )
    if len(given) > _MOST_POINTS:
        raise InputError(f"{path} has {len(given)} values; it has at most {_MOST_POINTS}")
    return tuple(option.check(f"{path}[{number}]", value) for number, value in enumerate(given))


def _range(path: str, option: Option, given: Mapping[str, Any]) -> tuple:
    if option.value_type not in (int, float):
        raise InputError(
            f"{path} is a range, and {option.name} is no number; give a list of values"
        )
    _entries.check_known(path, given, ("from", "to", "points", "spacing"))
    for needed in ("from", "to", "points"):
        if needed not in given:
            raise InputError(f"{path}.{needed} is missing; a range has from, to and points")
    start, stop = (option.check(f"{path}.{end}", given[end]) for end in ("from", "to"))
    for end, value in (("from", start), ("to", stop)):
        if isinstance(value, str):
            raise InputError(f"{path}.{end} is {value!r}; the ends of a range are numbers")
    points = Whole(_MOST_POINTS, 2)(f"{path}.points", given["points"])
    spacing = OneOf("spacing", ("linear", "geometric"))(
        f"{path}.spacing", given.get("spacing", "linear")
    )
    if spacing == "geometric" and not (start > 0 and stop > 0):
        raise InputError(f"{path}.from is {start} and to is {stop}; a geometric range is above 0")
    make = np.geomspace if spacing == "geometric" else np.linspace
    values = tuple(float(f"{value:.{_DECIMALS}g}") for value in make(start, stop, points))
    if option.value_type is int:
        return tuple(round(value) for value in values)
    return values


def _values_of(field: str, base: Mapping[str, Any], axes: Sequence[Axis]) -> list:
    """Every value that a field has anywhere in the study."""
    along = [axis.values[field] for axis in axes if field in axis.values]
    return list(along[0]) if along else [base[field]] if field in base else []


def _sampling(table: Mapping[str, Any], axes: Sequence[Axis]) -> Sampling:
    checks: dict[str, Check] = {
        "networks": _NETWORKS,
        "round": Whole(MOST_NETWORKS, 2),
        "most": Whole(MOST_NETWORKS, 2),
        "target": _target,
        "seed": _SEED,
        "dtype": OneOf("dtype", ("float32", "float64")),
        "sampler": OneOf("sampler", ("auto", "dense", "matrix_free")),
        "memory_gib": _entries.positive,
    }
    entries = _entries.check_entries("sampling", table, checks)
    target = entries.get("target", {})
    for field in ("round", "most"):
        if field in entries and not target:
            raise InputError(f"sampling.{field} goes with a target; give sampling.target")
    counts = {"sampling.networks": entries["networks"]} if "networks" in entries else {}
    for number, axis in enumerate(axes):
        if axis.networks is not None:
            counts[f"axes[{number}].networks"] = max(axis.networks)
    paths = list(counts)
    if target and paths:
        raise InputError(f"{paths[0]} takes the place of sampling.target; give one of them")
    if len(paths) > 1:
        raise InputError(f"{paths[1]} also stands at {paths[0]}; it has one place")
    if not target and not paths:
        raise InputError(
            "sampling.networks is missing; give it, there or along an axis, or a target standard "
            "error"
        )
    networks = entries.get("round", 100) if target else counts[paths[0]]
    most = entries.get("most", 100 * networks) if target else networks
    if most < networks:
        raise InputError(f"sampling.most is {most}; it is at least the round, {networks}")
    return Sampling(
        networks=networks,
        most=min(most, MOST_NETWORKS),
        target=target,
        seed=entries.get("seed", 0),
        dtype=entries.get("dtype", "float32"),
        sampler=entries.get("sampler", "auto"),
        memory_gib=entries.get("memory_gib"),
    )


_STATISTICS = {statistic.name: statistic for statistic in statistics.ALL}


def _target(path: str, value: object) -> dict[str, float]:
    if not isinstance(value, Mapping) or not value:
        raise InputError(
            f"{path} is {shown(value)}; it is standard errors by statistic, as {{ q = 0.01 }}"
        )
    for name in value:
        _statistic(path_of(path, name), name)
    return {name: _entries.positive(path_of(path, name), error) for name, error in value.items()}


def _statistic(path: str, name: object) -> Statistic:
    return _STATISTICS[OneOf("statistic", tuple(_STATISTICS))(path, name)]


def _measured(table: Mapping[str, Any], sampling: Sampling, batch: int) -> tuple[Statistic, ...]:
    """The statistics that are measured: without a list, all that so many inputs allow."""
    _entries.check_known("statistics", table, ("measure",))
    names = table.get("measure", [s.name for s in statistics.ALL if s.sites <= batch])
    if not isinstance(names, list) or not names:
        raise InputError(f"statistics.measure is {shown(names)}; it is a list of statistics")
    measured = [_statistic(f"statistics.measure[{n}]", name) for n, name in enumerate(names)]
    for number, statistic in enumerate(measured):
        if statistic in measured[:number]:
            raise InputError(f"statistics.measure[{number}] is {statistic.name!r} again; once")
        if statistic.sites > batch:
            raise InputError(
                f"statistics.measure[{number}] is {statistic.name!r}, which takes "
                f"{statistic.sites} inputs; inputs.batch is {batch}"
            )
    for name in sampling.target:
        if _STATISTICS[name] not in measured:
            raise InputError(f"sampling.target.{name} is of a statistic that is not measured")
    return tuple(measured)


def _histograms(
    table: Mapping[str, Any], measured: Sequence[Statistic]
) -> dict[str, HistogramRange]:
    ranges = {}
    for name, given in table.items():
        path = path_of("histograms", name)
        if _statistic(path, name) not in measured:
            raise InputError(f"{path} is of a statistic that is not measured")
        if not isinstance(given, Mapping):
            raise InputError(f"{path} is {shown(given)}; it is {{ from = 0, to = 1, bins = 50 }}")
        ranges[name] = _bins(path, given)
    return ranges


def _bins(path: str, given: Mapping[str, Any]) -> HistogramRange:
    _entries.check_known(path, given, ("from", "to", "bins"))
    for needed in ("from", "to", "bins"):
        if needed not in given:
            raise InputError(f"{path}.{needed} is missing; a histogram has from, to and bins")
    start, stop = (_entries.finite(f"{path}.{end}", given[end]) for end in ("from", "to"))
    bins = Whole(_MOST_BINS)(f"{path}.bins", given["bins"])
    if not 0 < (stop - start) / bins < math.inf:
        raise InputError(f"{path}.to is {stop}; it is above {path}.from, {start}")
    return HistogramRange(start, stop, bins)


def _check_spectrum(
    spectrum: HistogramRange,
    given: Mapping[str, str],
    base: Mapping[str, Any],
    axes: Sequence[Axis],
    sampling: Sampling,
) -> None:
    """Raise `InputError` if some network has no J whose spectrum is measured."""

    def values(field: str) -> list:
        return _values_of(field, base, axes)

    if spectrum.start < 0:
        raise InputError(f"spectrum.from is {spectrum.start}; singular values are 0 or more")
    for field, allowed in (("kind", "mlp"), ("norm", NONE), ("batch", 1)):
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
    if not below and "widths" not in given:
        own = map(_input_rows.natural_width, _kinds_of_inputs(base, axes))
        below = {width for width in own if width is not None}
        there = given.get("data", given.get("input"))
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
