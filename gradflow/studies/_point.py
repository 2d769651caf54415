"""A point of a study's grid: its settings, and the networks, the inputs and the key they mean."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PRNGKeyArray, PyTreeDef, UInt32

from gradflow import _input_rows, _schema, networks
from gradflow import data as datasets
from gradflow._arguments import PRNG
from gradflow._entries import shown
from gradflow._schema import NONE, Option
from gradflow.errors import InputError
from gradflow.networks import Network

__all__ = ["Family", "Point", "keys", "resolved", "varies_as_number"]

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
        """A number of 64 bits that identifies the settings: the beginning of their SHA-256.

        A file of inputs is known by its content.
        """
        known = dict(self.settings)
        if _input_rows.is_file(known.get("data")):
            known["data"] = _input_rows.digest(known["data"])
        text = _ENCODER.encode(known)
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
            elif isinstance(value, list):
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
            width = _input_width(self.settings)
            if _kind(self.settings) != "cosines" or self.sites > width:
                self.inputs()  # there may be none
            options = _schema.options()
            described = {field: v for field, v in self.settings.items() if field in options}
            if "width" in described:
                described["input_width"] = width
            network = _schema.network(described)
        except InputError as error:
            raise InputError(f"the point {self.description}: {error}") from error
        biased = "sigma_b" in self.settings or "sigma_b2" in self.settings
        return networks.with_biases(network) if biased and not network.homogeneous else network

    def inputs(self) -> np.ndarray:
        """Return the inputs, shape (sites, n_0), in float64; a site is a position of an image."""
        options = _schema.input_options()
        own = {field: value for field, value in self.settings.items() if field in options}
        own["tokens"] = _schema.tokens(self.settings)
        rows = datasets.inputs(_input_width(self.settings), **own)
        _, shape = _schema.input_shape(self.settings)
        return _input_rows.sites(_kind(self.settings), rows, shape)

    @property
    def sites(self) -> int:
        """How many rows its inputs have."""
        _, shape = _schema.input_shape(self.settings)
        tokens = _schema.tokens(self.settings)
        return int(self.settings["batch"] * tokens * math.prod(shape[:-1]))

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
        self._of_inputs = frozenset(_schema.input_options())
        # By all fields that may decide them: not the numbers of a network.
        self._inputs: dict[str, np.ndarray] = {}
        self._numbers = {name for name, o in _schema.options().items() if o.value_type is float}
        self._numbers = (self._numbers | {"seed"}) - self._of_inputs
        self._separate = True

    def __call__(self, points: Sequence[Point]) -> tuple[Network, np.ndarray]:
        """Their `networks` and their inputs, (points, sites, n_0), float64."""
        inputs = np.stack([self._inputs_of(point) for point in points])
        return self.networks(points), inputs

    def networks(self, points: Sequence[Point]) -> Network:
        """A network whose scales have an axis of points, in float64.

        Raises
        ------
        InputError
            If a point's fields do not go together.
        """
        scales = self._by_field(points) if self._separate else None
        if scales is None:
            self._separate = False
            each = [_flat(point)[0] for point in points]
            scales = [np.array(column, float) for column in zip(*each, strict=True)]
        return jax.tree.unflatten(self._structure, scales)

    def _by_field(self, points: Sequence[Point]) -> list[np.ndarray] | None:
        """Every scale, with an axis of points; None where several fields decide one together."""
        fields = self._first.settings.keys()
        if any(point.settings.keys() != fields for point in points):
            return None
        columns = [[base] * len(points) for base in self._base]
        for field, first in self._first.settings.items():
            values = [point.settings[field] for point in points]
            decides = field != "seed" and field not in self._of_inputs
            if not decides or all(value == first for value in values):
                continue
            if any(isinstance(value, list) for value in values):
                return None
            if not all(self._is_separate(field, value) for value in set(values)):
                return None
            for n in [n for n, by in self._decided_by.items() if by == field]:
                columns[n] = [self._scales[field, value][n] for value in values]
        # What two fields decide together shows where both differ from the first point's.
        made, structure = _flat(points[-1])
        last = [column[-1] for column in columns]
        if structure != self._structure or not all(map(np.array_equal, made, last)):
            return None
        return [np.array(column, float) for column in columns]

    def _is_separate(self, field: str, value: float | str) -> bool:
        """Whether a field's value changes no scale that another field decides."""
        if (field, value) not in self._scales:
            settings = {**self._first.settings, field: value}
            scales, structure = _flat(dataclasses.replace(self._first, settings=settings))
            if structure != self._structure:
                return False
            for n, (scale, base) in enumerate(zip(scales, self._base, strict=True)):
                own = np.array_equal(scale, base)
                if not own and self._decided_by.setdefault(n, field) != field:
                    return False
            self._scales[field, value] = scales
        return True

    def _inputs_of(self, point: Point) -> np.ndarray:
        own = str([(f, v) for f, v in point.settings.items() if f not in self._numbers])
        if own not in self._inputs:
            if len(self._inputs) >= _INPUTS_KEPT:
                self._inputs.clear()
            self._inputs[own] = point.inputs()
        return self._inputs[own]


def _flat(point: Point) -> tuple[list, PyTreeDef]:
    """The scales of a point's network, and its structure."""
    return jax.tree.flatten(point.network().unnamed())


_ENCODER = json.JSONEncoder(sort_keys=True)


def resolved(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a point, with no field that makes no difference to it.

    Images are its ``data``, however they are asked for.
    """
    norm = _schema.default("norm", fields.get("kind", "mlp")) or NONE
    settings = {**_DEFAULTS, "norm": norm, **fields}
    kind = _kind(settings)
    if kind in _input_rows.IMAGES:
        settings.pop("input", None)
        settings["data"] = kind
    elif kind == "cosines":
        settings.pop("input", None)
        settings = {**_DEFAULTS_OF_COSINES, **settings}
    idle = [field for field in settings if _schema.is_idle(field, settings)]
    alone = settings["batch"] * _schema.tokens(settings) == 1
    if alone or kind not in _input_rows.CORRELATED:
        idle.append("correlation")
    return {field: value for field, value in settings.items() if field not in idle}


def _kind(settings: Mapping[str, Any]) -> str:
    return _input_rows.kind_of(settings.get("input"), settings.get("data"))


def _option(field: str) -> Option:
    inputs = _schema.input_options()
    return inputs[field] if field in inputs else _schema.options()[field]


def varies_as_number(field: str) -> bool:
    """Whether a field's values are numbers alone that vary within one compiled program."""
    option = _option(field)
    return option.value_type is float and not option.or_names


def _input_width(settings: Mapping[str, Any]) -> int:
    own, _ = _schema.input_shape(settings)
    return own or _input_rows.natural_width(_kind(settings)) or int(settings["width"])


# The fields that each point has, given or not: its name depends on them.
_DEFAULTS: dict[str, Any] = {"kind": "mlp", "batch": 1}
_DEFAULTS_OF_COSINES: dict[str, Any] = {"mean_square": 1.0, "correlation": 0.0}
