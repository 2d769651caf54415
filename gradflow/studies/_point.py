"""A point of a study's grid: its settings, and the networks, the inputs and the key they mean."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PRNGKeyArray, UInt32

from gradflow import builders, ensembles, networks
from gradflow._arguments import PRNG
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.studies.entries import MLP_ONLY, NO_NORM, NUMBERS, RESIDUAL_ONLY, shown

__all__ = ["DIGITS_IMAGES", "DIGITS_WIDTH", "Point", "keys", "resolved"]

# Of scikit-learn's images of digits: how many there are, and the pixels of each.
DIGITS_IMAGES, DIGITS_WIDTH = 1797, 64


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
            if field in NUMBERS and not isinstance(value, str):
                value = bool(value)
            elif field == "widths":
                value = tuple(value)
            if field != "seed":
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
            if "data" in self.settings:
                if width < DIGITS_WIDTH:
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
        return ", ".join(f"{field} = {shown(value)}" for field, value in self.settings.items())


@jax.jit
def keys(words: UInt32[ArrayLike, "points 3"]) -> Key[Array, " points"]:
    """Return the keys of points from their `Point.key_words`."""

    def one(of: Array) -> PRNGKeyArray:
        key = jax.random.key(of[0], impl=PRNG)
        return jax.random.fold_in(jax.random.fold_in(key, of[1]), of[2])

    return jax.vmap(one)(jnp.asarray(words))


_ENCODER = json.JSONEncoder(sort_keys=True)
# The values of fields that are not given.
_DEFAULTS: dict[str, Any] = {
    "kind": "mlp",
    "norm": NO_NORM,
    "batch": 1,
    "mean_square": 1.0,
    "correlation": 0.0,
}


def resolved(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a point from its fields, without those that have no effect on it."""
    settings = {**_DEFAULTS, **fields}
    idle: list[str] = list(MLP_ONLY if settings["kind"] == "residual" else RESIDUAL_ONLY)
    if settings["norm"] == NO_NORM:
        idle.append("norm_position")
    if "data" in settings:
        idle += ["mean_square", "correlation"]
    if settings["batch"] == 1:
        idle.append("correlation")
    return {field: value for field, value in settings.items() if field not in idle}


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
        "norm": None if settings["norm"] == NO_NORM else settings["norm"],
        "norm_position": given("norm_position", "pre"),
        "keep_rate": given("keep_rate"),
    }
    activation, n = settings["activation"], _input_width(settings)
    if settings["kind"] == "residual":
        own = {field: settings[field] for field in RESIDUAL_ONLY if field in settings}
        width, depth = settings["width"], settings["depth"]
        return builders.residual(n, width, depth, activation, ensemble, **common, **own)
    widths = given("widths") or [n, *[settings["width"]] * settings["depth"]]
    return builders.mlp(widths, activation, ensemble, last=given("last"), **common)


def _input_width(settings: Mapping[str, Any]) -> int:
    if "widths" in settings:
        return int(settings["widths"][0])
    own = DIGITS_WIDTH if "data" in settings else settings["width"]
    return int(settings.get("input_width", own))


def _inputs(settings: Mapping[str, Any], width: int) -> np.ndarray:
    """Return inputs x_a of (1/n_0) x_a·x_b = mean_square · (correlation, or 1 where a = b).

    They are combinations of a discrete cosine transform's rows, which are orthogonal, not sparse,
    and but for the last have mean 0 over components. Images are `data.resized` to the width.
    """
    batch = settings["batch"]
    if "data" in settings:
        from gradflow import data  # noqa: PLC0415  (scikit-learn is slow to import)

        images = data.digits()
        if batch > len(images):
            raise InputError(f"inputs.batch is {batch}; there are {len(images)} digit images")
        return data.resized(np.asarray(images[:batch], np.float64), width)
    if batch > width:
        raise InputError(f"inputs.batch is {batch}; a width of {width} has at most {width} inputs")
    correlation = settings.get("correlation", 0.0)
    order = np.roll(np.arange(width), -1)[:batch, None]
    rows = np.cos(np.pi * order * (np.arange(width) + 0.5) / width)
    rows *= np.sqrt(np.where(order > 0, 2, 1))
    # The symmetric root of the matrix of correlations, whose eigenvalues are two.
    alike, apart = np.sqrt(max(1 + (batch - 1) * correlation, 0)), np.sqrt(1 - correlation)
    root = apart * np.eye(batch) + (alike - apart) / batch
    return np.asarray(np.sqrt(settings["mean_square"]) * root @ rows)
