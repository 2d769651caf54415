"""What rules make of values: pieces of sums, fields of products with fresh weights."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gradflow.inspection._theory import forcing
from gradflow.inspection._theory.nodes import (
    Node,
    add,
    constant,
    multiply,
    number,
    of_function,
    variable,
)
from gradflow.inspection._theory.sums import (
    Field,
    Leaf,
    Map,
    NoRule,
    Part,
    Piece,
    Product,
    Sum,
    apart,
    identity,
    selection,
)
from gradflow.inspection._theory.values import Known, Signal, Value, Weights

__all__ = ["as_field", "check_sites", "fresh", "lifted", "made_by", "patches", "piece_of"]
__all__ += ["weights_of_zero"]

# Second moments are kept of all pairs of sites.
MOST_SITES = 4096


def piece_of(function: Callable[..., Any], sums: Sequence[Sum], literal: Sequence[bool]) -> Sum:
    """A function of sums as a piece of its own."""
    variables: list[Sum] = []
    numbers: list[np.ndarray] = []
    children = [
        constant(float(s.constant[0])) if known else lifted(s, variables, numbers)
        for s, known in zip(sums, literal, strict=True)
    ]
    piece = Piece(of_function(function, *children), tuple(variables), tuple(numbers))
    return Sum.of(piece, sums[0].sites)


def lifted(sum_: Sum, variables: list[Sum], numbers: list[np.ndarray]) -> Node:
    """A sum as a function of sums of fields, which are added to the variables."""
    base, a, b = sum_.affine
    if not base.parts:
        numbers.append(sum_.constant)
        return number(len(numbers) - 1)
    gathered = {
        part: _selected(map_) for part, map_ in base.parts.items() if isinstance(part, Piece)
    }
    pieces = [part for part in base.parts if isinstance(part, Piece)]
    if not pieces or any(gathered[part] is None for part in pieces):
        if not any(base is v for v in variables):
            variables.append(base)
        node = variable(next(i for i, v in enumerate(variables) if v is base))
    else:
        node = _of_pieces(base, pieces, gathered, variables, numbers)
    node = node if a == 1 else of_function(multiply, constant(a), node)
    return node if b == 0 else of_function(add, node, constant(b))


def _of_pieces(
    base: Sum,
    pieces: Sequence[Piece],
    gathered: Mapping[Any, tuple[np.ndarray, np.ndarray] | None],
    variables: list[Sum],
    numbers: list[np.ndarray],
) -> Node:
    """A sum of pieces, each at one site, and of fields, as a function of sums of fields."""
    terms = []
    fields: dict[Part, Any] = {p: m for p, m in base.parts.items() if isinstance(p, Field)}
    if fields:
        terms.append(lifted(Sum(base.constant, fields), variables, numbers))
    elif base.constant.any():
        numbers.append(base.constant)
        terms.append(number(len(numbers) - 1))
    for piece in pieces:
        found = gathered[piece]
        assert found is not None
        coefficient, sites = found
        below = [lifted(_taken(v, sites), variables, numbers) for v in piece.variables]
        node = piece.node.placed(below, len(numbers))
        numbers.extend(x[sites] for x in piece.numbers)
        if (coefficient != 1).any():
            numbers.append(coefficient)
            node = of_function(multiply, number(len(numbers) - 1), node)
        terms.append(node)
    return functools.reduce(lambda x, y: of_function(add, x, y), terms)


def _selected(map_: Map) -> tuple[np.ndarray, np.ndarray] | None:
    """The factor and the site of a map that takes each of its rows from one site; else None."""
    map_ = map_.copy()
    map_.eliminate_zeros()
    count = np.diff(map_.indptr)
    if (count > 1).any():
        return None
    rows = np.flatnonzero(count)
    factors, sites = np.zeros(len(count)), np.zeros(len(count), int)
    factors[rows], sites[rows] = map_.data, map_.indices
    if map_.shape[0] == map_.shape[1] and (sites == np.arange(len(count)))[rows].all():
        sites = np.arange(len(count))
    return factors, sites


def _taken(sum_: Sum, sites: np.ndarray) -> Sum:
    """A sum at some sites, the same object for the same sites."""
    copies = sum_.__dict__.setdefault("of_sites", {})
    key = sites.tobytes()
    if key not in copies:
        base, a, b = sum_.affine
        made = sum_.taken(sites)
        if base is not sum_ and made is not sum_:
            made = Sum(made.constant, made.parts, (_taken(base, sites), a, b))
        copies[key] = made
    return copies[key]


def as_field(weights: Weights, units: tuple[int, ...]) -> Sum:
    """Weights as a sum over sites: independent for each unit, common to sites unless they vary."""
    shape = weights.shape
    if any(shape[i] > 1 and i not in weights.varying for i in units):
        raise NoRule("parameters are shared by units")
    site_shape = tuple(n for i, n in enumerate(shape) if i not in units)
    axes = [i for i in range(len(shape)) if i not in units]
    sites = math.prod(site_shape)
    check_sites(sites)
    marks = np.zeros(site_shape, int)
    for place, i in enumerate(axes):
        if i in weights.varying:
            marks = marks * shape[i] + np.indices(site_shape)[place]
    same = marks.reshape(-1, 1) == marks.reshape(1, -1)
    constant_ = np.full(sites, weights.mean)
    if not weights.variance:
        return Sum(constant_, {})
    leaf = weights.tie[0]
    known = leaf.fields if isinstance(leaf, Leaf) else {}
    key = weights.tie, units, site_shape
    if any(tie != weights.tie and not apart(tie, weights.tie) for tie, *_ in known):
        raise NoRule("a parameter is used in two ways")
    if key not in known:
        # A bias is a small part of what it is added to; a mask is not.
        gaussian = leaf != "noise" or weights.gaussian
        known[key] = Field(weights.variance * same, gaussian=gaussian, tie=weights.tie)
    return Sum(constant_, {known[key]: identity(sites)})


def weights_of_zero(values: Sequence[Value]) -> Sequence[Value]:
    """The operands of a product with a signal, of which weights that begin at 0 have variance 0."""
    if any(isinstance(value, Weights) for value in values):
        return values
    return [
        Weights(v.value.shape, frozenset(range(v.value.ndim)), 0.0, 0.0, 0.0, True, (Leaf(),))
        if isinstance(v, Known) and not v.value.any()
        else v
        for v in values
    ]


def patches(signal: Signal, over: Sequence[int]) -> tuple[Any, ...]:
    """For each place along some axes of sites the map from all sites to those at that place."""
    index = np.arange(signal.sum.sites).reshape(signal.site_shape)
    axes = [signal.site_axes.index(i) for i in over]
    check_sites(index.size)
    rows = np.moveaxis(index, axes, range(len(axes)))
    rows = rows.reshape(math.prod(rows.shape[: len(axes)]), -1)
    return tuple(selection(row, index.size) for row in rows)


def fresh(
    signal: Signal, maps: tuple[Any, ...], weights: Weights, units: int, size: int
) -> Product:
    """The product of weights with a signal at these places of its patches."""
    check_sites(signal.sum.sites)
    second = forcing.second_moments(signal.sum)
    gram = signal.width * sum(map_ @ second @ map_.T for map_ in maps)
    return Product(
        signal.sum, maps, signal.width, units, weights.variance, weights.error, gram, size
    )


def made_by(product: Product, weights: Weights) -> Sum:
    """The sum that a product makes: a field."""
    field = Field(product.variance * product.gram, product=product, tie=weights.tie)
    return Sum.of(field, len(product.gram))


def check_sites(sites: int) -> None:
    if sites > MOST_SITES:
        raise NoRule(f"{sites} sites, more than {MOST_SITES}, whose pairs would have to be kept")
