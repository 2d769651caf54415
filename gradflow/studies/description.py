"""The study file: a base network and axes over it, read from TOML and checked.

    title = "Tanh: order and chaos"

    [network]                  # what `networks.mlp` or, with kind = "residual", `residual` takes
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
their one input, whose weights are all drawn then: kind = "mlp" without norm, keep and last.

Nothing in a file is run. Every mistake is an `InputError` of one sentence that begins with the path
of the entry, as ``axes[0].sigma_w2[3]``. A point is known by its settings alone, so that its
networks are the same whatever other points there are.
"""

import dataclasses
import functools
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PRNGKeyArray, UInt32

from gradflow import activations, ensembles, networks, statistics
from gradflow.errors import InputError, unknown_name
from gradflow.networks import Network
from gradflow.statistics import Statistic

__all__ = ["Axis", "HistogramRange", "Point", "Sampling", "Study", "differences", "keys"]
__all__ += ["load", "parse"]

# Above what any file can mean, and far below what would fill the memory before it is refused.
_MOST_POINTS = 1_000_000
_MOST_NETWORKS = 2**31 - 1  # numbers of networks are int32
_MOST_UNITS = 10**9
_MOST_BINS = 10_000
_LARGEST_FILE = 1 << 24
# Significant digits of a value in a range: one that is in two ranges is then the same number.
_DECIMALS = 12

Check = Callable[[str, object], Any]


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
        return "_".join(self.values)

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
class Point:
    """One law of networks with its inputs: a place in the grid.

    Attributes
    ----------
    place
        Its index along every axis.
    settings
        All that decides it: the network's fields, the inputs' and the seed.
    networks
        How many it has; with a target, a round.
    """

    place: tuple[int, ...]
    settings: Mapping[str, Any]
    networks: int

    @functools.cached_property
    def name(self) -> int:
        """A number of 64 bits that is made from the settings."""
        text = json.dumps(self.settings, sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    @property
    def key_words(self) -> tuple[int, int, int]:
        """The seed, and two numbers of 32 bits from the name, which are folded into its key."""
        return self.settings["seed"], self.name >> 32, self.name & 0xFFFFFFFF

    @property
    def key(self) -> PRNGKeyArray:
        """The key of its networks: number i has ``fold_in(key, i)``."""
        return keys(np.array([self.key_words], np.uint32))[0]

    @property
    def structure(self) -> str:
        """What decides which program draws the point's networks: no number that may vary in it."""
        varies = {
            field: bool(value)
            for field, value in self.settings.items()
            if field in _NUMBERS and not isinstance(value, str)
        }
        return json.dumps({**self.settings, **varies, "seed": 0}, sort_keys=True)

    def network(self) -> Network:
        """Return the law of the point's networks.

        Where the settings have a σ_b of 0, biases of 0 are drawn all the same, so that those with
        others are of the same structure; but not where signals could not be kept at length 1 then.

        Raises
        ------
        InputError
            If the fields do not go together.
        """
        try:
            batch, width = self.settings["batch"], _input_width(self.settings)
            if "data" in self.settings:
                if width < _DIGITS_WIDTH:
                    self.inputs()  # of few pixels there may be nothing but zeros
            elif batch > width:
                raise InputError(
                    f"inputs.batch is {batch}, and the input's width {width}; there are at most as "
                    "many inputs as it has components"
                )
            network = _network(self.settings)
        except InputError as error:
            raise InputError(f"the point {self.description}: {error}") from error
        biased = "sigma_b" in self.settings or "sigma_b2" in self.settings
        return networks.with_biases(network) if biased and not network.homogeneous else network

    def inputs(self) -> np.ndarray:
        """Return the inputs, shape (batch, n_0), in float64."""
        return _inputs(self.settings, _input_width(self.settings))

    @property
    def description(self) -> str:
        """The settings in a line."""
        return ", ".join(f"{field} = {_shown(value)}" for field, value in self.settings.items())


@jax.jit
def keys(words: UInt32[ArrayLike, "points 3"]) -> Key[Array, " points"]:
    """Return the keys of points from their seeds and the two numbers that each name is."""

    def one(of: Array) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(of[0]), of[1]), of[2])

    return jax.vmap(one)(jnp.asarray(words))


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
        place = tuple(int(index) for index in np.unravel_index(number, self.shape))
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
        return Point(place, _resolved({**self.base, **varied}), count)

    def points(self) -> Iterator[Point]:
        """Yield all points in order."""
        return map(self.point, range(len(self)))

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
        f"{path} was {_shown(before.get(path, 'absent'))}, is {_shown(after.get(path, 'absent'))}"
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
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the study file is not TOML: {reason}") from error
    _known("", found, _TABLES)
    title = _text("title", found.get("title", ""))
    question = _text("question", found.get("question", ""))
    base = _fields("network", _table("network", found), NETWORK)
    inputs = _fields("inputs", _table("inputs", found), INPUTS)
    axes = _axes(found.get("axes", []))
    sampling = _sampling(_table("sampling", found), axes)
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
    if "data" in base | inputs and max(batches) > _DIGITS_IMAGES:
        raise InputError(f"inputs.batch is {max(batches)}; there are {_DIGITS_IMAGES} digit images")
    least = min(_values_of("correlation", everything, axes) or [0.0])
    if "correlation" in given and max(batches) == 1:
        raise InputError(f"{given['correlation']} is between inputs, and inputs.batch is 1")
    if least * (max(batches) - 1) < -1:
        raise InputError(
            f"{given['correlation']} is {least} somewhere; of {max(batches)} inputs it is at least "
            f"{-1 / (max(batches) - 1):.6g}"
        )
    measured = _measured(_table("statistics", found), sampling, min(batches))
    if len(axes) and math.prod(map(len, axes)) > _MOST_POINTS:
        raise InputError(
            f"axes have {math.prod(map(len, axes))} points in all; a study has at most "
            f"{_MOST_POINTS}"
        )
    theory = _table("theory", found)
    _known("theory", theory, ("finite_width", "depth_scales"))
    spectrum = None
    if "spectrum" in found:
        spectrum = _bins("spectrum", _table("spectrum", found))
        _plain(spectrum, given, everything, axes, sampling)
    return Study(
        text=text,
        title=title,
        question=question,
        base=everything,
        axes=axes,
        statistics=measured,
        histograms=_histograms(_table("histograms", found), measured),
        spectrum=spectrum,
        sampling=sampling,
        finite_width=_flag("theory.finite_width", theory.get("finite_width", max(batches) == 1)),
        depth_scales=_flag("theory.depth_scales", theory.get("depth_scales", True)),
    )


_TABLES = (
    *("title", "question", "network", "axes", "inputs", "sampling", "statistics"),
    *("histograms", "spectrum", "theory"),
)


def _under(path: str, key: str) -> str:
    shown = key if key.replace("-", "_").isidentifier() and key.isascii() else _shown(key)
    return f"{path}.{shown}" if path else shown


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _known(path: str, table: Mapping[str, Any], allowed: Iterable[str]) -> None:
    for key in table:
        if key not in allowed:
            where = f"{_under(path, key)}: "
            raise InputError(f"{where}{unknown_name('entry', _clipped(key), allowed)}")


def _clipped(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _table(name: str, found: Mapping[str, Any]) -> Mapping[str, Any]:
    table = found.get(name, {})
    if not isinstance(table, Mapping):
        raise InputError(f"{name} is {_shown(table)}; it is a table, [{name}]")
    return table


# Checks of one value: (path, value) -> what it means.


def _text(path: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{path} is {_shown(value)}; it is text in quotes")
    return value


def _flag(path: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{path} is {_shown(value)}; it is true or false")
    return value


def _count(most: int = _MOST_UNITS, least: int = 1) -> Check:
    def check(path: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(
                f"{path} is {_shown(value)}; it is a whole number from {least} to {most}"
            )
        return value

    return check


def _number(
    allowed: str, fits: Callable[[float], bool] = lambda _: True
) -> Callable[[str, object], float]:
    def check(path: str, value: object) -> float:
        wrong = InputError(f"{path} is {_shown(value)}; it is {allowed}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong
        try:
            number = float(value)
        except OverflowError as error:
            raise wrong from error
        if not math.isfinite(number) or not fits(number):
            raise wrong
        return number + 0.0  # -0.0 is 0.0

    return check


def _name(what: str, allowed: Iterable[str]) -> Check:
    names = tuple(allowed)

    def check(path: str, value: object) -> str:
        if not isinstance(value, str):
            raise InputError(f"{path} is {_shown(value)}; it is one of {', '.join(sorted(names))}")
        if value not in names:
            raise InputError(f"{path}: {unknown_name(what, _clipped(value), names)}")
        return value

    return check


def _looked_up(get: Callable[[str], object]) -> Check:
    def check(path: str, value: object) -> str:
        name = _text(path, value)
        try:
            get(name)
        except InputError as error:
            raise InputError(f"{path}: {_clipped(str(error), 400)}") from error
        return name

    return check


# Beyond these a float32 has no room for their squares.
_scale = _number("a number from 0 to 1e15", lambda v: 0 <= v <= 1e15)
_positive = _number("a number above 0, at most 1e15", lambda v: 0 < v <= 1e15)
_finite = _number("a finite number")
_share = _number("a number above 0, at most 1", lambda v: 0 < v <= 1)


def _branch_scale(path: str, value: object) -> float | str:
    if isinstance(value, str):
        return str(_name("scale", networks.SCALES)(path, value))
    return _scale(path, value)


def _widths(path: str, value: object) -> list[int]:
    if not isinstance(value, list) or not 2 <= len(value) <= 100_000:
        raise InputError(
            f"{path} is {_shown(value)}; it is the input's width and every layer's, as [784, 100]"
        )
    return [_count()(f"{path}[{place}]", width) for place, width in enumerate(value)]


_NO_NORM = "none"

# What stands in [network]: by field, what it may be.
NETWORK: dict[str, Check] = {
    "kind": _name("kind", ("mlp", "residual")),
    "activation": _looked_up(activations.get),
    "weights": _looked_up(ensembles.get),
    "sigma_w": _positive,
    "sigma_w2": _positive,
    "distribution": _name("distribution", ensembles.DISTRIBUTIONS),
    "last": _looked_up(ensembles.get),
    "sigma_b": _scale,
    "sigma_b2": _scale,
    "width": _count(),
    "depth": _count(100_000),
    "input_width": _count(),
    "widths": _widths,
    "norm": _name("norm", (*networks.NORMS, _NO_NORM)),
    "place": _name("place", ("pre", "post")),
    "keep": _share,
    "scale": _branch_scale,
    "layers": _count(100),
    "hidden": _count(),
    "weights_first": _flag,
}
_RESIDUAL_ONLY = ("scale", "layers", "hidden", "weights_first")
_MLP_ONLY = ("widths", "last")
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

# What stands in [inputs].
INPUTS: dict[str, Check] = {
    "batch": _count(10_000),
    "mean_square": _scale,
    "correlation": _number("a number from -1 to 1", lambda v: -1 <= v <= 1),
    "data": _name("data", ("digits",)),
}
# A key has 32 bits where JAX has no 64-bit integers.
_seed = _count(2**32 - 1, 0)
_networks = _count(_MOST_NETWORKS)
# What an axis may go over: all of these but a list.
_AXES: dict[str, Check] = {**NETWORK, **INPUTS, "seed": _seed, "networks": _networks}
del _AXES["widths"]
SCALES = ("sigma_w", "sigma_w2", "sigma_b", "sigma_b2", "mean_square", "correlation")
_NUMBERS = (*SCALES, "keep", "scale")
_COUNTS = ("width", "depth", "input_width", "hidden", "layers", "batch", "seed", "networks")


def _fields(path: str, table: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    _known(path, table, checks)
    return {key: checks[key](f"{path}.{key}", value) for key, value in table.items()}


def _axes(found: object) -> tuple[Axis, ...]:
    if not isinstance(found, list):
        raise InputError(f"axes is {_shown(found)}; it is a list of tables, each [[axes]]")
    return tuple(_axis(f"axes[{number}]", table) for number, table in enumerate(found))


def _axis(path: str, table: object) -> Axis:
    if not isinstance(table, Mapping) or not table:
        raise InputError(f"{path} is {_shown(table)}; it is a table with at least one field")
    _known(path, table, _AXES)
    values = {field: _values(f"{path}.{field}", field, given) for field, given in table.items()}
    lengths = {field: len(those) for field, those in values.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{field} {length}" for field, length in lengths.items())
        raise InputError(f"{path} has values of several lengths ({listed}); they go together")
    count = values.pop("networks", None)
    if not values:
        raise InputError(f"{path} has networks alone; give a field that they go together with")
    rows = list(zip(*values.values(), strict=True))
    if len(set(rows)) < len(rows):
        place = next(n for n, row in enumerate(rows) if row in rows[:n])
        raise InputError(f"{path} has {_shown(rows[place])} twice; its values differ")
    return Axis(values, count)


def _values(path: str, field: str, given: object) -> tuple:
    if isinstance(given, Mapping):
        return _range(path, field, given)
    if not isinstance(given, list) or not given:
        raise InputError(
            f"{path} is {_shown(given)}; it is a list of values, or a range "
            "{ from = 1, to = 2, points = 3 }"
        )
    if len(given) > _MOST_POINTS:
        raise InputError(f"{path} has {len(given)} values; it has at most {_MOST_POINTS}")
    return tuple(_AXES[field](f"{path}[{place}]", value) for place, value in enumerate(given))


def _range(path: str, field: str, given: Mapping[str, Any]) -> tuple:
    if field not in _NUMBERS + _COUNTS:
        raise InputError(f"{path} is a range, and {field} is no number; give a list of values")
    _known(path, given, ("from", "to", "points", "spacing"))
    for needed in ("from", "to", "points"):
        if needed not in given:
            raise InputError(f"{path}.{needed} is missing; a range has from, to and points")
    start, stop = (_AXES[field](f"{path}.{end}", given[end]) for end in ("from", "to"))
    for end, value in (("from", start), ("to", stop)):
        if isinstance(value, str):
            raise InputError(f"{path}.{end} is {value!r}; the ends of a range are numbers")
    points = _count(_MOST_POINTS, 2)(f"{path}.points", given["points"])
    spacing = _name("spacing", ("linear", "geometric"))(
        f"{path}.spacing", given.get("spacing", "linear")
    )
    if spacing == "geometric" and not (start > 0 and stop > 0):
        raise InputError(f"{path}.from is {start} and to is {stop}; a geometric range is above 0")
    make = np.geomspace if spacing == "geometric" else np.linspace
    values = tuple(float(f"{value:.{_DECIMALS}g}") for value in make(start, stop, points))
    if field in _COUNTS:
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
    for only, kind in ((_RESIDUAL_ONLY, "residual"), (_MLP_ONLY, "mlp")):
        for field in only:
            if field in given and kind not in kinds:
                raise InputError(f"{given[field]} is of networks of kind {kind!r}; leave it out")
    if "widths" in given and "residual" in kinds:
        raise InputError(
            f"{given['widths']} is of networks of kind 'mlp'; give width and depth instead"
        )
    if "place" in given and "norm" not in given:
        raise InputError(f"{given['place']} says where norm stands, and there is none; give norm")


def _sampling(table: Mapping[str, Any], axes: Sequence[Axis]) -> Sampling:
    checks: dict[str, Check] = {
        "networks": _networks,
        "round": _count(_MOST_NETWORKS, 2),
        "most": _count(_MOST_NETWORKS, 2),
        "target": _target,
        "seed": _seed,
        "dtype": _name("dtype", ("float32", "float64")),
        "sampler": _name("sampler", ("auto", "dense", "matrix_free")),
        "memory_gib": _positive,
    }
    found = _fields("sampling", table, checks)
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
        most=min(most, _MOST_NETWORKS),
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
            f"{path} is {_shown(value)}; it is standard errors by statistic, as {{ q = 0.01 }}"
        )
    for name in value:
        _statistic(_under(path, name), name)
    return {name: _positive(_under(path, name), error) for name, error in value.items()}


def _statistic(path: str, name: object) -> Statistic:
    return _STATISTICS[_name("statistic", _STATISTICS)(path, name)]


def _measured(table: Mapping[str, Any], sampling: Sampling, batch: int) -> tuple[Statistic, ...]:
    """Return what is measured: all that so many inputs allow, without a list."""
    _known("statistics", table, ("measure",))
    names = table.get("measure", [s.name for s in statistics.ALL if s.sites <= batch])
    if not isinstance(names, list) or not names:
        raise InputError(f"statistics.measure is {_shown(names)}; it is a list of statistics")
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
        path = _under("histograms", name)
        if _statistic(path, name) not in measured:
            raise InputError(f"{path} is of a statistic that is not measured")
        if not isinstance(given, Mapping):
            raise InputError(f"{path} is {_shown(given)}; it is {{ from = 0, to = 1, bins = 50 }}")
        found[name] = _bins(path, given)
    return found


def _bins(path: str, given: Mapping[str, Any]) -> HistogramRange:
    _known(path, given, ("from", "to", "bins"))
    for needed in ("from", "to", "bins"):
        if needed not in given:
            raise InputError(f"{path}.{needed} is missing; a histogram has from, to and bins")
    start, stop = (_finite(f"{path}.{end}", given[end]) for end in ("from", "to"))
    bins = _count(_MOST_BINS)(f"{path}.bins", given["bins"])
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
    for field, allowed in (("kind", "mlp"), ("norm", _NO_NORM), ("batch", 1)):
        others = [value for value in values(field) if value != allowed]
        if others:
            raise InputError(
                f"{given[field]} is {others[0]!r} somewhere; with [spectrum] it is {allowed!r}"
            )
    for field in ("keep", "last"):
        if field in given:
            raise InputError(f"{given[field]} does not go with [spectrum]; leave it out")
    widths = {n for value in values("widths") for n in value} or set(values("width"))
    below, there = set(values("input_width")), given.get("input_width")
    if "data" in given:
        below, there = {_DIGITS_WIDTH}, given["data"]
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


# What a field is where it is not given, and matters.
_DEFAULTS: dict[str, Any] = {
    "kind": "mlp",
    "norm": _NO_NORM,
    "batch": 1,
    "mean_square": 1.0,
    "correlation": 0.0,
}


def _resolved(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a point, with nothing that does not matter to it."""
    found = {**_DEFAULTS, **fields}
    idle: list[str] = list(_MLP_ONLY if found["kind"] == "residual" else _RESIDUAL_ONLY)
    if found["norm"] == _NO_NORM:
        idle.append("place")
    if "data" in found:
        idle += ["mean_square", "correlation"]
    if found["batch"] == 1:
        idle.append("correlation")
    return {field: value for field, value in found.items() if field not in idle}


def _network(settings: Mapping[str, Any]) -> Network:
    given = settings.get
    if "sigma_w2" in settings or "sigma_w" in settings:
        ensemble = ensembles.fan_in(settings.get("sigma_w") or math.sqrt(settings["sigma_w2"]))
    else:
        ensemble = ensembles.get(settings["weights"])
    if "distribution" in settings:
        ensemble = ensemble.drawn_from(settings["distribution"])
    sigma_b = math.sqrt(settings["sigma_b2"]) if "sigma_b2" in settings else given("sigma_b")
    common = {
        "sigma_b": sigma_b,
        "norm": None if settings["norm"] == _NO_NORM else settings["norm"],
        "place": given("place", "pre"),
        "keep": given("keep"),
    }
    activation, n = settings["activation"], _input_width(settings)
    if settings["kind"] == "residual":
        own = {field: settings[field] for field in _RESIDUAL_ONLY if field in settings}
        width, depth = settings["width"], settings["depth"]
        return networks.residual(n, width, depth, activation, ensemble, **common, **own)
    widths = given("widths") or [n, *[settings["width"]] * settings["depth"]]
    return networks.mlp(widths, activation, ensemble, last=given("last"), **common)


# Of scikit-learn's images of digits: how many there are, and the pixels of each.
_DIGITS_IMAGES, _DIGITS_WIDTH = 1797, 64


def _input_width(settings: Mapping[str, Any]) -> int:
    if "widths" in settings:
        return int(settings["widths"][0])
    own = _DIGITS_WIDTH if "data" in settings else settings["width"]
    return int(settings.get("input_width", own))


def _inputs(settings: Mapping[str, Any], width: int) -> np.ndarray:
    """Return inputs x_a of (1/n_0) x_a·x_b = mean_square · (correlation, or 1 where a = b).

    Made of the cosines of a discrete cosine transform: orthogonal, none sparse, and with a mean of
    0 over components but the last. Images are `data.resized` to the width.
    """
    batch = settings["batch"]
    if "data" in settings:
        from gradflow import data  # noqa: PLC0415  (scikit-learn is slow to import)

        images = data.digits()
        if batch > len(images):
            raise InputError(f"inputs.batch is {batch}; there are {len(images)} digit images")
        return data.resized(np.asarray(images[:batch], np.float64), width)
    if batch > width:
        raise InputError(
            f"inputs.batch is {batch}; of {width} components there are at most as many"
        )
    correlation = settings.get("correlation", 0.0)
    order = np.roll(np.arange(width), -1)[:batch, None]
    rows = np.cos(np.pi * order * (np.arange(width) + 0.5) / width)
    rows *= np.sqrt(np.where(order > 0, 2, 1))
    # The symmetric root of the matrix of correlations, whose eigenvalues are two.
    alike, apart = np.sqrt(max(1 + (batch - 1) * correlation, 0)), np.sqrt(1 - correlation)
    root = apart * np.eye(batch) + (alike - apart) / batch
    return np.asarray(np.sqrt(settings["mean_square"]) * root @ rows)
