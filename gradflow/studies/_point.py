"""A point of a study's grid: its settings, and the networks, the inputs and the key they mean."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PRNGKeyArray, PyTreeDef, UInt32

from gradflow import _schema, networks
from gradflow._arguments import PRNG
from gradflow._entries import Number, OneOf, Whole, scale, shown
from gradflow._schema import NONE, Option
from gradflow.errors import InputError
from gradflow.networks import Network

__all__ = ["DIGITS_IMAGES", "DIGITS_WIDTH", "INPUTS", "Family", "Point", "keys", "resolved"]
__all__ += ["varies_as_number"]

# Of scikit-learn's images of digits: how many there are, and the pixels of each.
DIGITS_IMAGES, DIGITS_WIDTH = 1797, 64
# Inputs that a family keeps: of few points where each has its own, of all where they share them.
_INPUTS_KEPT = 64


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the grid: one law of networks, with its inputs.

    Attributes
    ----------
    index
        Along every axis.
    settings
        The fields that decide it: the network's, the inputs' and the seed.
    networks
        How many it has; with a target, in a round.
    """

    index: tuple[int, ...]
    settings: Mapping[str, Any]
    networks: int

    @functools.cached_property
    def name(self) -> int:
        """A number of 64 bits that identifies the settings: the beginning of their SHA-256."""
        text = _ENCODER.encode(self.settings)
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
    def structure(self) -> tuple[tuple[str, Any], ...]:
        """The settings that decide which program draws the networks: not the numbers it takes."""
        structure = []
        for field, value in self.settings.items():
            if field == "seed":
                continue
            if _option(field).value_type is float and not isinstance(value, str):
                value = bool(value)
            elif field == "widths":
                value = tuple(value)
            structure.append((field, value))
        return tuple(structure)

    def network(self) -> Network:
        """Return the law of the point's networks.

        Where the settings have a σ_b of 0, the networks still have biases, of variance 0, so that
        points with other σ_b have the same program; but not homogeneous networks, whose signals
        are kept at length 1 and which biases would not let be.

        Raises
        ------
        InputError
            If the fields do not go together.
        """
        try:
            batch, width = self.settings["batch"], _input_width(self.settings)
            if self.settings.get("data", NONE) != NONE:
                if width < DIGITS_WIDTH:
                    self.inputs()  # of few pixels there may be nothing but zeros
            elif batch > width:
                raise InputError(
                    f"inputs.batch is {batch}, and the input's width {width}; there are at most as "
                    "many inputs as it has components"
                )
            options = _schema.options()
            described = {field: v for field, v in self.settings.items() if field in options}
            if "widths" not in described:
                described["input_width"] = width
            network = _schema.network(described)
        except InputError as error:
            raise InputError(f"the point {self.description}: {error}") from error
        biased = "sigma_b" in self.settings or "sigma_b2" in self.settings
        return networks.with_biases(network) if biased and not network.homogeneous else network

    def inputs(self) -> np.ndarray:
        """Return the inputs, shape (batch, n_0), in float64."""
        own = {field: value for field, value in self.settings.items() if field in INPUTS}
        return _inputs(_input_width(self.settings), **own)

    @property
    def description(self) -> str:
        """The settings in a line."""
        return ", ".join(f"{field} = {shown(value)}" for field, value in self.settings.items())


@jax.jit
def keys(words: UInt32[ArrayLike, "points 3"]) -> Key[Array, " points"]:
    """Return the keys of points from their `Point.key_words`."""

    def one(of: Array) -> PRNGKeyArray:
        key = jax.random.key(of[0], impl=PRNG)
        return jax.random.fold_in(jax.random.fold_in(key, of[1]), of[2])

    return jax.vmap(one)(jnp.asarray(words))


class Family:
    """The networks and inputs of points of one program, as arrays with an axis of points.

    Where each scale of a network is decided by one field, as in almost every grid, a network is
    made for each value of a field, and not for each point.
    """

    def __init__(self, first: Point) -> None:
        """Prepare for the points of this one's program."""
        self._first = first
        self._base, self._structure = _flat(first)
        # By field and value: the scales of the first network with that value; and by scale, the
        # field that decides it.
        self._scales: dict[tuple[str, float | str], list] = {}
        self._decided_by: dict[int, str] = {}
        self._inputs: dict[str, np.ndarray] = {}
        self._separate = True

    def __call__(self, points: Sequence[Point]) -> tuple[Network, np.ndarray]:
        """A network whose scales have shape (points,), and inputs, (points, batch, n_0); float64.

        Raises
        ------
        InputError
            If a point's fields do not go together.
        """
        scales = self._by_field(points) if self._separate else None
        if scales is None:
            self._separate = False
            scales = np.array([_flat(point)[0] for point in points], float).T
        inputs = np.stack([self._inputs_of(point) for point in points])
        return jax.tree.unflatten(self._structure, list(scales)), inputs

    def _by_field(self, points: Sequence[Point]) -> np.ndarray | None:
        """The scales, (scales, points); None where several fields decide one together."""
        scales = np.empty((len(self._base), len(points)))
        scales[:] = np.array(self._base, float)[:, None]
        for field, first in self._first.settings.items():
            if field == "seed" or field in INPUTS:
                continue
            column = [point.settings[field] for point in points]
            if all(value == first for value in column):
                continue
            for value in set(column):
                if not self._is_separate(field, value):
                    return None
            decided = [n for n, by in self._decided_by.items() if by == field]
            own = [[self._scales[field, value][n] for n in decided] for value in column]
            scales[decided] = np.array(own, float).T
        # What two fields decide together shows where both differ from the first point's.
        made, structure = _flat(points[-1])
        same = structure == self._structure and made == scales[:, -1].tolist()
        return scales if same else None

    def _is_separate(self, field: str, value: float | str) -> bool:
        """Whether a field's value changes no scale that another field decides."""
        if (field, value) not in self._scales:
            changed = dataclasses.replace(
                self._first, settings={**self._first.settings, field: value}
            )
            scales, structure = _flat(changed)
            if structure != self._structure:
                return False
            for n, (scale, base) in enumerate(zip(scales, self._base, strict=True)):
                if scale != base and self._decided_by.setdefault(n, field) != field:
                    return False
            self._scales[field, value] = scales
        return True

    def _inputs_of(self, point: Point) -> np.ndarray:
        own = str([(f, v) for f, v in point.settings.items() if f in _OF_INPUTS])
        if own not in self._inputs:
            if len(self._inputs) > _INPUTS_KEPT:
                self._inputs.clear()
            self._inputs[own] = point.inputs()
        return self._inputs[own]


def _flat(point: Point) -> tuple[list, PyTreeDef]:
    """The scales of a point's network, and its structure without a name."""
    return jax.tree.flatten(dataclasses.replace(point.network(), name=""))


_ENCODER = json.JSONEncoder(sort_keys=True)


def resolved(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a point, with no field that makes no difference to it."""
    settings = {**_DEFAULTS, **fields}
    idle = [field for field in settings if _schema.is_idle(field, settings)]
    if settings.get("data", NONE) != NONE:
        idle += ["mean_square", "correlation"]
    if settings["batch"] == 1:
        idle.append("correlation")
    return {field: value for field, value in settings.items() if field not in idle}


def _option(field: str) -> Option:
    return INPUTS[field] if field in INPUTS else _schema.options()[field]


def varies_as_number(field: str) -> bool:
    """Whether a field's values are numbers alone that vary within one compiled program."""
    option = _option(field)
    return option.value_type is float and not option.or_names


def _input_width(settings: Mapping[str, Any]) -> int:
    if "widths" in settings:
        return int(settings["widths"][0])
    own = settings["width"] if settings.get("data", NONE) == NONE else DIGITS_WIDTH
    return int(settings.get("input_width", own))


def _inputs(
    width: int,
    *,
    batch: Annotated[int, Whole(10_000)] = 1,
    mean_square: Annotated[float, scale] = 1.0,
    correlation: Annotated[float, Number("a number from -1 to 1", lambda v: -1 <= v <= 1)] = 0.0,
    data: Annotated[str, OneOf("data", ("digits",))] | None = None,
) -> np.ndarray:
    """A batch of inputs x_a with (1/n_0) x_a·x_b = mean_square · (correlation, or 1 where a = b).

    They are combinations of a discrete cosine transform's rows, which are orthogonal, not sparse,
    and but for the last have mean 0 over components. Images are `data.resized` to the width.

    Parameters
    ----------
    width
        n_0, the number of components.
    batch
        The number of inputs that go through each network.
    mean_square
        The mean square of an input's components.
    correlation
        The correlation of each two inputs.
    data
        Real inputs in the place of these: digits, scikit-learn's images.
    """
    if data not in (None, NONE):
        from gradflow import data as datasets  # noqa: PLC0415  (scikit-learn is slow to import)

        images = datasets.digits()
        if batch > len(images):
            raise InputError(f"inputs.batch is {batch}; there are {len(images)} digit images")
        return datasets.resized(np.asarray(images[:batch], np.float64), width)
    if batch > width:
        raise InputError(f"inputs.batch is {batch}; a width of {width} has at most {width} inputs")
    order = np.roll(np.arange(width), -1)[:batch, None]
    rows = np.cos(np.pi * order * (np.arange(width) + 0.5) / width)
    rows *= np.sqrt(np.where(order > 0, 2, 1))
    # The symmetric root of the matrix of correlations, whose eigenvalues are two.
    alike, apart = np.sqrt(max(1 + (batch - 1) * correlation, 0)), np.sqrt(1 - correlation)
    root = apart * np.eye(batch) + (alike - apart) / batch
    return np.asarray(np.sqrt(mean_square) * root @ rows)


# What stands in [inputs], by name.
INPUTS = {name: o for name, o in _schema.read_options(_inputs).items() if name != "width"}
# The fields that decide a point's inputs.
_OF_INPUTS = (*INPUTS, "width", "input_width", "widths")
# The fields that each point has, given or not: its name depends on them.
_DEFAULTS: dict[str, Any] = {"kind": "mlp", "norm": NONE, "batch": 1}
_DEFAULTS |= {"mean_square": 1.0, "correlation": 0.0}
