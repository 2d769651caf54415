"""Sums of fields and of functions: what a unit of a signal is at all of its sites.

A `Sum` is a constant for each site, and parts, each behind a linear map of its sites. A part is a
`Field`, which a product with fresh weights makes (Gaussian over units, its second moments known),
or a `Piece`, an elementwise function of other sums. Parts are the same where they are one object:
so sums of paths that share a part are exact. Whatever is linear in sites (means over positions,
centring over a batch) changes the maps alone.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from gradflow.inspection._theory.nodes import Node, multiply, of_function, variable

__all__ = ["Factor", "Field", "Leaf", "Map", "Mixture", "NoRule", "Origin", "Part", "Piece"]
__all__ += ["Product", "Sum", "absolute", "apart", "factors", "identity", "independent"]
__all__ += ["down", "node_factors", "selection", "up"]

_serial = itertools.count()
# The share of entries other than 0 from which on a map is quicker as an array.
_DENSE = 0.1
Map: TypeAlias = sparse.csr_array


class NoRule(Exception):
    """Theory ends here: the message is why."""


class Leaf:
    """A leaf of the parameters, and the fields that it is as a bias, by how it is used."""

    def __init__(self) -> None:
        self.fields: dict[Any, Field] = {}


def apart(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two ways from a leaf to weights take different entries of it."""
    for a, b in zip(one[1:], other[1:], strict=False):
        if a != b:
            if isinstance(a, bytes) and isinstance(b, bytes):
                return not np.isin(np.frombuffer(a, np.int64), np.frombuffer(b, np.int64)).any()
            return isinstance(a, tuple) and isinstance(b, tuple) and a[0] == b[0]
    return False


class Field:
    """Gaussian over units, of mean 0: what a product with fresh weights, or a bias, adds to them.

    Attributes
    ----------
    covariance
        Shape (sites, sites).
    gaussian
        Whether it is Gaussian; if not, its second moments are all that is known.
    product
        The product that made it; None of a bias.
    tie
        As in `Weights`.
    origin
        Of a field that is some of another's units: which.
    mixture
        Of one that mixes other signals' sites by random weights: how.
    """

    def __init__(
        self,
        covariance: np.ndarray,
        *,
        gaussian: bool = True,
        product: "Product | None" = None,
        tie: tuple[Any, ...] = (),
        origin: "Origin | None" = None,
        mixture: "Mixture | None" = None,
    ) -> None:
        self.covariance, self.gaussian, self.product, self.tie = covariance, gaussian, product, tie
        self._tied: set[Field] = set()
        self.origin, self.mixture = origin, mixture
        self.serial = next(_serial)

    @property
    def tied(self) -> set["Field"]:
        """Others that products with the same weights made; of some units, those of others."""
        if self.origin is None:
            return self._tied
        copies = (field.__dict__.get("copies", {}) for field in self.origin.field.tied)
        return {each[self.tie[-1]] for each in copies if self.tie[-1] in each}

    def tie_to(self, other: "Field") -> None:
        """Note that another was made with the same weights."""
        self._tied.add(other)
        other._tied.add(self)

    @property
    def leads_down(self) -> bool:
        """Whether a gradient goes on from it: not from noise."""
        return any(x is not None for x in (self.product, self.origin, self.mixture))

    @property
    def fields(self) -> frozenset["Field"]:
        """The fields that it is a function of: itself."""
        return frozenset((self,))


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where a field of some units of another comes from, or of all, each several times.

    Attributes
    ----------
    field
        The other.
    share
        Which part of its units each of these sites has; how many times all.
    maps
        From sites of the other, for each set of units that are independent of all others.
    """

    field: Field
    share: float
    maps: tuple[Map, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A product of weights with a signal, or with numbers that are known.

    The second moments of what it makes are variance · Σ_o P_o K P_oᵀ + …, K those of its signal,
    with a map P_o of sites for each place of a patch: of a dense layer there is one, the identity.
    A gradient goes down by the transpose, variance · units · Σ_o P_oᵀ Λ P_o.

    Attributes
    ----------
    source
        The signal; None if it is known.
    maps
        P_o, (sites, sites of the source).
    fan_in
        Units of the source that are summed at each place.
    units
        Units that it makes.
    variance, error
        Of an entry of the weights, and its relative standard error.
    gram
        Σ_o P_o K P_oᵀ · fan_in: by sites, the sums over all that an entry of the product sums.
    weights
        How many different weights there are.
    rows
        Of a source that is known, (sites, fan_in): what each site sums.
    """

    source: "Sum | None"
    maps: tuple[Map, ...]
    fan_in: int
    units: int
    variance: float
    error: float
    gram: np.ndarray
    weights: int
    rows: np.ndarray | None = None

    def down(self, gradient: Any) -> Any:
        """Second moments over sites of the gradient at the source, from those at the product."""
        total = sum(map_.T @ gradient @ map_ for map_ in self.maps)
        return self.variance * self.units * total


class Mixture:
    """Where a field comes from that mixes other signals' sites by random weights, as attention."""

    @property
    def sums(self) -> "tuple[Sum, ...]":
        """What it comes from."""
        raise NotImplementedError

    def down(self, gradient: np.ndarray) -> "list[tuple[Sum, np.ndarray]]":
        """Second moments of the gradient at each of the sums, from those at the field."""
        raise NotImplementedError


def absolute(a: Any) -> Any:
    """The absolute value: one function for all nodes that take it."""
    return jnp.abs(a)


class Piece:
    """An elementwise function of sums: of each unit and each site alone.

    Attributes
    ----------
    node
        The function.
    variables
        Sums of fields; or, where sites mix behind a function (BatchNorm, pooling), of pieces.
    numbers
        Shape (sites,) each: what the function takes beside the variables.
    """

    def __init__(
        self, node: Node, variables: tuple["Sum", ...], numbers: tuple[np.ndarray, ...]
    ) -> None:
        self.node, self.variables, self.numbers = node, variables, numbers
        self.square_of: Sum | None = None  # whose square it is, if it is one
        self.serial = next(_serial)

    @functools.cached_property
    def fields(self) -> frozenset[Field]:
        """The fields that it is a function of."""
        return frozenset[Field]().union(*(sum_.fields for sum_ in self.variables))


class Factor(Piece):
    """A factor of a piece: a function of some of its variables, whose places are ``slots``."""

    slots: tuple[int, ...]

    def own(self, slot: int | None) -> int | None:
        """The place here of one of the piece's variables; None if it is none of these."""
        return self.slots.index(slot) if slot in self.slots else None


def factors(piece: Piece) -> tuple[Factor, ...]:
    """The factors of a piece that are functions of different fields, and one of numbers alone."""
    known = piece.__dict__.get("factors")
    if known is not None:
        return known
    groups: list[tuple[frozenset[Field], list[Node]]] = []
    constants = [node for node in node_factors(piece.node) if node.kind == "constant"]
    for node in node_factors(piece.node):
        if node in constants:
            continue
        fields = frozenset[Field]().union(*(piece.variables[i].fields for i in node.places))
        nodes = [node]
        for other in [g for g in groups if not independent(g[0], fields) or not (g[0] or fields)]:
            groups.remove(other)
            fields, nodes = fields | other[0], [*other[1], *nodes]
        groups.append((fields, nodes))
    made = []
    # What is written in the program stays beside a variable: 0.5 x (1 + tanh x) is one function.
    groups.sort(key=lambda group: not group[0])
    groups[0][1].extend(constants)
    for _, nodes in groups:
        slots = tuple(sorted(set[int]().union(*(node.places for node in nodes))))
        node = functools.reduce(lambda x, y: of_function(multiply, x, y), nodes)
        places = [
            variable(slots.index(i) if i in slots else 0) for i in range(len(piece.variables))
        ]
        one = Factor(
            node.placed(places, 0), tuple(piece.variables[i] for i in slots), piece.numbers
        )
        one.slots = slots
        made.append(one)
    piece.__dict__["factors"] = tuple(made)
    return tuple(made)


def node_factors(node: Node) -> list[Node]:
    """The nodes whose product it is."""
    if node.kind == "function" and node.value is multiply:
        return [factor for child in node.children for factor in node_factors(child)]
    return [node]


Part: TypeAlias = Field | Piece


def independent(one: frozenset[Field], other: frozenset[Field]) -> bool:
    """Whether functions of these fields are independent: no field, and no weights, in common."""
    return one.isdisjoint(other) and all(field.tied.isdisjoint(other) for field in one)


class Sum:
    """A unit at all sites: a constant, and parts behind linear maps of their sites.

    Attributes
    ----------
    constant
        Shape (sites,).
    parts
        Of each part the map (sites, sites of the part).
    affine
        ``(base, a, b)`` where it is a · base + b with numbers that are written in the program.
    """

    def __init__(
        self,
        constant: np.ndarray,
        parts: Mapping[Part, Map],
        affine: "tuple[Sum, float, float] | None" = None,
    ) -> None:
        self.constant, self.parts = constant, dict(parts)
        self.affine = affine or (self, 1.0, 0.0)

    @classmethod
    def of(cls, part: Part, sites: int) -> "Sum":
        """A part alone."""
        return cls(np.zeros(sites), {part: identity(sites)})

    @property
    def sites(self) -> int:
        """The number of sites."""
        return len(self.constant)

    @functools.cached_property
    def fields(self) -> frozenset[Field]:
        """The fields that it is a function of."""
        return frozenset[Field]().union(*(part.fields for part in self.parts))

    @property
    def gaussian(self) -> bool:
        """Whether it is Gaussian over units about the constant."""
        return all(isinstance(part, Field) and part.gaussian for part in self.parts)

    def plus(self, other: "Sum") -> "Sum":
        """The sum of both, exact where they share parts."""
        parts = dict(self.parts)
        for part, map_ in other.parts.items():
            parts[part] = parts[part] + map_ if part in parts else map_
        return Sum(self.constant + other.constant, parts)

    def shifted(self, by: np.ndarray, *, literal: bool = False) -> "Sum":
        """The sum and a number for each site."""
        base, a, b = self.affine
        affine = (base, a, b + float(by.flat[0])) if literal else None
        return Sum(self.constant + by, self.parts, affine)

    def scaled(self, by: np.ndarray, *, literal: bool = False) -> "Sum":
        """The sum times a number for each site."""
        by = np.broadcast_to(by, self.constant.shape)
        if not by.any():  # as behind a scale that begins at 0
            return Sum(np.zeros(self.sites), {})
        base, a, b = self.affine
        factor = float(by[0]) if literal and by.size else 1.0
        affine = (base, a * factor, b * factor) if literal else None
        rows = sparse.dia_array((by[None], [0]), shape=(by.size, by.size))
        parts = {part: sparse.csr_array(rows @ map_) for part, map_ in self.parts.items()}
        return Sum(self.constant * by, parts, affine)

    def mapped(self, map_: Map) -> "Sum":
        """Linear functions of its sites."""
        parts = {part: sparse.csr_array(map_ @ own) for part, own in self.parts.items()}
        # A sum over steps of which one step is taken is that step.
        parts = {part: own for part, own in parts.items() if own.count_nonzero()}
        return Sum(map_ @ self.constant, parts)

    def taken(self, sites: np.ndarray) -> "Sum":
        """The sum at these sites, in this order."""
        if len(sites) == self.sites and (sites == np.arange(self.sites)).all():
            return self
        return self.mapped(selection(sites, self.sites))


def up(left: Map, middle: np.ndarray, right: Map) -> np.ndarray:
    """L M Rᵀ, second moments behind maps from those before."""
    return _applied(right, _applied(left, middle).T).T


def down(left: Map, middle: Any, right: Map) -> Any:
    """Lᵀ M R, second moments of gradients before maps from those behind; sparse if M is."""
    if not isinstance(middle, np.ndarray):
        return left.T @ middle @ right
    return _applied(right, _applied(left, middle, turned=True).T, turned=True).T


def _applied(map_: Map, to: np.ndarray, *, turned: bool = False) -> np.ndarray:
    """A map, or its transpose, times a matrix; a map of most pairs of sites is no sparse one."""
    if map_ is identity(map_.shape[0]):
        return to
    if map_.nnz > _DENSE * map_.shape[0] * map_.shape[1]:
        map_ = map_.toarray()
    return np.asarray((map_.T if turned else map_) @ to)


@functools.lru_cache(maxsize=64)
def identity(sites: int) -> Map:
    """The map that changes nothing."""
    return sparse.csr_array(sparse.eye_array(sites))


def selection(sites: np.ndarray, of: int) -> Map:
    """The map to these of so many sites; 0 where one is -1."""
    there = np.flatnonzero(sites >= 0)
    ones = np.ones(len(there))
    return sparse.csr_array((ones, (there, sites[there])), shape=(len(sites), of))
