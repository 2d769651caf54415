"""Averages over units of sums: what a product with weights, or a mean over units, asks of them.

Of one Gaussian variable by gradflow's own averages (`gradflow.gaussian`), in float64 whatever the
model's type. Pieces that are products of independent ones factorise.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gradflow import activations, gaussian
from gradflow.inspection._theory import one_variable, sampling
from gradflow.inspection._theory.activations import activation_of
from gradflow.inspection._theory.expectations import SiteAverages
from gradflow.inspection._theory.nodes import Node
from gradflow.inspection._theory.over_sites import Normalised
from gradflow.inspection._theory.sums import (
    Field,
    NoRule,
    Part,
    Piece,
    Sum,
    factors,
    independent,
    node_factors,
    up,
)

__all__ = ["Term", "average", "covariance", "joint", "mean", "normalised", "pulled"]
__all__ += ["second_moments", "terms", "together", "together_at"]

# Pairs of sites of a function of more variables, at more sites, take longer than draws of units.
_FEW, _MANY = 2, 150


class Term(NamedTuple):
    """A part of a sum (``slot`` None), or its derivative by one of its variables.

    A field is its own variable.
    """

    part: Part
    slot: int | None


def mean(sum_: Sum) -> np.ndarray:
    """E of a unit at each site, (sites,)."""
    try:
        return _mean(sum_)
    except NoRule as reason:
        return _moments(sum_, reason)[0]


def _mean(sum_: Sum) -> np.ndarray:
    out = sum_.constant.astype(float)
    for part, map_ in sum_.parts.items():
        if isinstance(part, Piece):
            out = out + map_ @ average(Term(part, None))
    return out


def second_moments(sum_: Sum) -> np.ndarray:
    """E of the products of a unit at all pairs of sites, (sites, sites)."""
    known = sum_.__dict__.get("second")
    if known is None:
        try:
            known = _products(sum_, sum_)
        except NoRule as reason:
            known = _moments(sum_, reason)[1]
        sum_.__dict__["second"] = known
    return known


def _moments(sum_: Sum, reason: NoRule) -> tuple[np.ndarray, np.ndarray]:
    """Mean and second moments by drawing units; raises why there is no rule where it cannot be."""
    known = sum_.__dict__.get("moments")
    if known is None:
        try:
            known = sampling.moments(sum_, joint)
        except NoRule:
            raise reason from None
        sum_.__dict__["moments"] = known
    return known


def pulled(sum_: Sum, gradient: np.ndarray, reason: NoRule) -> dict[Field, np.ndarray]:
    """Second moments of the gradient by each field from those by a sum, by drawing units.

    Raises
    ------
    NoRule
        Why there is no rule, where units cannot be drawn.
    """
    try:
        return sampling.pulled(sum_, gradient, joint)
    except NoRule:
        raise reason from None


def joint(one: Field, other: Field) -> np.ndarray | None:
    """The covariance of two fields; None where they are independent."""
    if one is other:
        return one.covariance
    return _tied(one, other) if other in one.tied else None


def _products(one: Sum, other: Sum) -> np.ndarray:
    """E of the products of a unit of one sum with that of another, (sites, sites)."""
    out = np.zeros((one.sites, other.sites))
    if one.constant.any() or other.constant.any():
        c, d = one.constant, other.constant
        out += np.outer(mean(one), d) + np.outer(c, mean(other)) - np.outer(c, d)
    others = list(other.parts.items())
    for i, (p, left) in enumerate(one.parts.items()):
        for q, right in others[: i + 1] if one is other else others:
            found = together(Term(p, None), Term(q, None))
            if found is not None:
                both = up(left, found, right)
                out += both + both.T if one is other and p is not q else both
    return out


def covariance(one: Sum, other: Sum) -> np.ndarray:
    """The covariance of two sums of fields, (sites, sites)."""
    out = np.zeros((one.sites, other.sites))
    for field, left in one.parts.items():
        assert isinstance(field, Field)
        if field in other.parts:
            out += up(left, field.covariance, other.parts[field])
        for tied in field.tied & other.fields:
            out += up(left, _tied(field, tied), other.parts[tied])
    return out


def _tied(one: Field, other: Field) -> np.ndarray:
    """The covariance of what the same weights make of two signals: variance · fan_in · E[h g]."""
    if one.origin is not None and other.origin is not None:
        whole = _tied(one.origin.field, other.origin.field)
        many = len(one.covariance) // len(whole)
        return whole if many == 1 else np.kron(whole, np.eye(many))
    p, q = one.product, other.product
    assert p is not None
    assert q is not None
    if p.source is not None and q.source is not None and len(p.maps) == len(q.maps):
        second = _products(p.source, q.source)
        maps = zip(p.maps, q.maps, strict=True)
        return p.variance * p.fan_in * sum(left @ second @ right.T for left, right in maps)
    if p.rows is not None and q.rows is not None:
        return p.variance * p.rows @ q.rows.T
    if any(x.rows is not None and not x.rows.any() for x in (p, q)):  # a state that begins at 0
        return np.zeros((len(one.covariance), len(other.covariance)))
    raise NoRule("weights are used for a random signal and for a known one")


def terms(sum_: Sum) -> list[tuple[Term, Any, Sum]]:
    """The derivatives of a sum by its parts' variables: each a term, the part's map, a variable."""
    found: list[tuple[Term, Any, Sum]] = []
    for part, map_ in sum_.parts.items():
        if isinstance(part, Field):
            found.append((Term(part, 0), map_, Sum.of(part, len(part.covariance))))
        elif not _mixes_sites(part):
            places = [i for i, v in enumerate(part.variables) if v.gaussian]
            found += [(Term(part, i), map_, part.variables[i]) for i in places]
    return found


def _mixes_sites(piece: Piece) -> bool:
    """Whether it is a function of a variable that is not Gaussian, but for one that it is times."""
    others = {i for i, v in enumerate(piece.variables) if not v.gaussian}
    masks = {f.slots[0] for f in factors(piece) if _multiple(f) is not None}
    return not others <= masks


def multiples(sum_: Sum) -> list[tuple[Term, Any, Sum]]:
    """Derivatives by variables that are not Gaussian, which parts of a sum are times.

    Raises
    ------
    NoRule
        If such a variable is not independent of all else in the sum.
    """
    found: list[tuple[Term, Any, Sum]] = []
    for part, map_ in sum_.parts.items():
        if isinstance(part, Field) or _mixes_sites(part):
            continue
        for i, v in enumerate(part.variables):
            if v.gaussian or not any(f.leads_down for f in v.fields):
                continue
            rest = [other.fields for other in sum_.parts if other is not part]
            rest += [u.fields for j, u in enumerate(part.variables) if j != i]
            if not all(independent(v.fields, fields) for fields in rest):
                raise NoRule("a signal beside a multiple of a function of it")
            found.append((Term(part, i), map_, v))
    return found


def normalised(sum_: Sum) -> list[tuple[Normalised, Any]]:
    """The parts of a sum that mix sites, with their maps.

    Raises
    ------
    NoRule
        If one of them is not known, or is not independent of the other parts.
    """
    found = []
    for part, map_ in sum_.parts.items():
        if isinstance(part, Piece) and _mixes_sites(part):
            rest = [other.fields for other in sum_.parts if other is not part]
            own = _factor(factors(part)[0])
            if not isinstance(own, Normalised) or len(factors(part)) > 1:
                raise NoRule("a product with a signal that BatchNorm has normalised")
            if not all(independent(part.fields, fields) for fields in rest):
                raise NoRule("a signal beside what BatchNorm makes of it")
            found.append((own, map_))
    return found


def average(term: Term) -> np.ndarray:
    """E of a term, (sites,)."""
    part, slot = term
    if isinstance(part, Field):
        return np.full(len(part.covariance), 0.0 if slot is None else 1.0)
    if slot is None and part.square_of is not None:
        return np.diagonal(second_moments(part.square_of))
    out: Any = 1.0
    for one in factors(part):
        out = out * _factor(one).average(one.own(slot))
    return np.broadcast_to(out, (part.variables[0].sites,))


def together(one: Term, other: Term) -> np.ndarray | None:
    """E[one_s other_t], (sites, sites) of both; None where it is 0."""
    p, q = one.part, other.part
    if isinstance(p, Field) and isinstance(q, Field) and one.slot is None and other.slot is None:
        return joint(p, q)
    if isinstance(p, Field) and one.slot is None:
        return _by_parts(p, other)
    if isinstance(q, Field) and other.slot is None:
        by_parts = _by_parts(q, one)
        return None if by_parts is None else by_parts.T
    if isinstance(p, Field) or isinstance(q, Field) or independent(p.fields, q.fields):
        return np.outer(average(one), average(other))
    if p is q:
        out: Any = 1.0
        for factor in factors(p):
            own = factor.own(one.slot), factor.own(other.slot)
            out = out * _factor(factor).pair(*own)
        return np.broadcast_to(out, (p.variables[0].sites,) * 2)
    return _across(p, one.slot, q, other.slot)


def together_at(one: Term, other: Term, rows: np.ndarray, cols: np.ndarray) -> np.ndarray | None:
    """E[one_s other_t] for pairs of sites (s, t), (pairs,); None where it is 0.

    Without all others where these are many.
    """
    p, q = one.part, other.part
    if one.slot is None or other.slot is None:
        joint = together(one, other)
        return None if joint is None else joint[rows, cols]
    if isinstance(p, Field) or isinstance(q, Field) or independent(p.fields, q.fields):
        return average(one)[rows] * average(other)[cols]
    if p is not q:
        return _across(p, one.slot, q, other.slot)[rows, cols]
    out = np.ones(len(rows))
    for factor in factors(p):
        own = factor.own(one.slot), factor.own(other.slot)
        out = out * _factor(factor).pair_at(*own, rows, cols)
    return out


def _across(p: Piece, one: int | None, q: Piece, other: int | None) -> np.ndarray:
    """E[p_s q_t], or of their derivatives, of pieces that have fields in common."""
    variables: list[Sum] = []
    places = []
    for piece in (p, q):
        own = []
        for v in piece.variables:
            if not v.gaussian:
                raise NoRule("a function of a signal that is not Gaussian over units")
            if not any(v is u for u in variables):
                variables.append(v)
            own.append(next(i for i, u in enumerate(variables) if u is v))
        places.append(own)
    if len({v.sites for v in variables}) > 1:
        raise NoRule("two signals of different sites, of which one is a function of the other")
    at_sites = _at_sites(variables, (*p.numbers, *q.numbers))
    start = len(variables)
    middle = start + len(p.numbers)
    functions = []
    for piece, own, slot, numbers in (
        (p, places[0], one, slice(start, middle)),
        (q, places[1], other, slice(middle, None)),
    ):
        f = _of_scalars(piece, own, numbers)
        functions.append(at_sites.read(f if slot is None else jax.grad(f, own[slot])))
    return at_sites.second(*functions)[0]


def _by_parts(field: Field, other: Term) -> np.ndarray | None:
    """E[f_s p_t] = Σ_i Cov(f_s, v_i_t) E[∂_i p_t], of a field and a function of variables v."""
    piece = other.part
    if isinstance(piece, Field):
        return None
    if independent(field.fields, piece.fields):
        return None
    if other.slot is not None:
        raise NoRule("a signal and the slope of a function of it")
    own = Sum.of(field, len(field.covariance))
    out = np.zeros((own.sites, piece.variables[0].sites))
    if not _regular(piece):
        raise NoRule("a signal beside a function of it that jumps")
    for i, v in enumerate(piece.variables):
        if not v.gaussian:
            raise NoRule("a function of a signal that is not Gaussian")
        if not independent(field.fields, v.fields):
            out += covariance(own, v) * average(Term(piece, i))
    return out


# Averages of one factor --------------------------------------------------------------------------


def _factor(piece: Piece) -> "_Averages | Normalised":
    """The averages of a piece that is no product of independent ones."""
    known = piece.__dict__.get("averages")
    if known is None:
        known = piece.__dict__["averages"] = _averages(piece)
    return known


def _averages(piece: Piece) -> "_Averages | Normalised":
    if not piece.variables:
        return _OfNumbers(piece)
    if "custom" in _kinds(piece.node):
        raise NoRule("a function of which the derivative is not that of its definition")
    alone = _multiple(piece)
    if alone is not None:
        return _OfSum(*alone)
    if any(not v.gaussian for v in piece.variables):
        return Normalised(piece, lambda x: covariance(x, x))
    uniform = all(not np.ptp(numbers) for numbers in piece.numbers)
    if len(piece.variables) == 1 and uniform:
        return _OfOne(piece)
    return _OfSeveral(piece)


@functools.lru_cache(maxsize=1 << 12)
def _kinds(node: Node) -> frozenset[str]:
    """What of a function integration by parts does not hold for: its jumps, a derivative given."""
    name = getattr(getattr(node.value, "equation", None), "primitive", "")
    own = {"custom"} if name.startswith("custom_") or name == "stop_gradient" else set()
    own |= {"jumps"} if name in ("ceil", "floor", "round", "sign") else set()
    return frozenset(own).union(*map(_kinds, node.children))


def _regular(piece: Piece) -> bool:
    """Whether integration by parts holds for it."""
    if _kinds(piece.node):
        return False
    averages = [_factor(one) for one in factors(piece)]
    return all(one.regular for one in averages if isinstance(one, _OfOne))


class _Averages:
    """Averages of a function of Gaussian variables; ``slot`` None is the function itself."""

    def average(self, slot: int | None) -> np.ndarray:
        """E of the function or of a derivative, (sites,)."""
        raise NotImplementedError

    def pair(self, one: int | None, other: int | None) -> np.ndarray:
        """E at pairs of sites, (sites, sites)."""
        raise NotImplementedError

    def pair_at(
        self, one: int | None, other: int | None, rows: np.ndarray, cols: np.ndarray
    ) -> np.ndarray:
        """E at some pairs of sites, (pairs,)."""
        return self.pair(one, other)[rows, cols]


class _OfNumbers(_Averages):
    """A function of known numbers."""

    def __init__(self, piece: Piece) -> None:
        with jax.enable_x64(True):
            self.value = np.asarray(piece.node.evaluate((), piece.numbers), np.float64)

    def average(self, slot: int | None) -> np.ndarray:
        return self.value if slot is None else 0 * self.value

    def pair(self, one: int | None, other: int | None) -> np.ndarray:
        return np.outer(self.average(one), self.average(other))


class _OfOne(_Averages):
    """A function of one variable, Gaussian about its means."""

    def __init__(self, piece: Piece) -> None:
        (z,) = piece.variables
        numbers = tuple(float(x[0]) for x in piece.numbers)
        self.phi = activation_of(piece.node, numbers)
        self.mean = z.constant if z.constant.any() else None
        self.k = covariance(z, z)

    @functools.cached_property
    def regular(self) -> bool:
        """Whether E[x φ(m + x)] = q E[φ'(m + x)], as where φ has no jumps."""
        if self.phi.kernel is not None or self.phi in activations.ALL:
            return True
        return one_variable.by_parts_holds(self.phi)

    @functools.cached_property
    def values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """E[φφ], E[φ], E[φ'φ']."""
        if self.phi.name == "linear":
            m = np.zeros(len(self.k)) if self.mean is None else self.mean
            return self.k + np.outer(m, m), m, np.ones_like(self.k)
        with jax.enable_x64(True):
            series = self.mean is None and self.phi.kernel is None and one_variable.in_range(self.k)
            if series and self.regular:
                return one_variable.by_series(self.phi, self.k)
            made = one_variable.through(self.phi, self.k, self.mean)
            return tuple(map(np.asarray, made))  # type: ignore[return-value]

    def average(self, slot: int | None) -> np.ndarray:
        """E[φ] or E[φ'], (sites,)."""
        return self.values[1] if slot is None else self._moment("dphi")

    def pair_at(
        self, one: int | None, other: int | None, rows: np.ndarray, cols: np.ndarray
    ) -> np.ndarray:
        """E[φφ] or E[φ'φ'] at some pairs: of a site with itself without all others."""
        if (one, other) != (0, 0) or (rows != cols).any():
            return super().pair_at(one, other, rows, cols)
        return self._moment("dphi2")[rows]

    def _moment(self, name: str) -> np.ndarray:
        """A moment at each site, (sites,)."""
        with jax.enable_x64(True):
            q = np.diagonal(self.k)
            if self.mean is None:
                return np.asarray(gaussian.moment(self.phi, name, q))
            shifts: Any = self.mean[:, None]
            law: tuple[Any, ...] = shifts, np.ones_like(shifts), q
            return np.asarray(gaussian.shifted_moment(self.phi, name, *law))

    def pair(self, one: int | None, other: int | None) -> np.ndarray:
        """E[φφ] or E[φ'φ'], (sites, sites)."""
        if (one is None) != (other is None):
            raise NoRule("a signal and its slope")
        return self.values[0] if one is None else self.values[2]


class _OfSeveral(_Averages):
    """A function of several variables, or of one and of numbers of each site."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.at_sites = _at_sites(piece.variables, piece.numbers)
        self.read: dict[int | None, Any] = {}

    def function(self, slot: int | None) -> Any:
        """The function, or its derivative by a variable, as the averages take it."""
        if slot not in self.read:
            many = len(self.piece.variables)
            f = _of_scalars(self.piece, range(many), slice(many, None))
            self.read[slot] = self.at_sites.read(f if slot is None else jax.grad(f, slot))
        return self.read[slot]

    def average(self, slot: int | None) -> np.ndarray:
        return self.at_sites.mean(self.function(slot))[0]

    def pair(self, one: int | None, other: int | None) -> np.ndarray:
        sites = self.piece.variables[0].sites
        if len(self.piece.variables) > _FEW and sites > _MANY:
            raise NoRule(f"a function of {len(self.piece.variables)} signals at {sites} sites")
        return self.at_sites.second(self.function(one), self.function(other))[0]

    def pair_at(
        self, one: int | None, other: int | None, rows: np.ndarray, cols: np.ndarray
    ) -> np.ndarray:
        left, right = self.function(one), self.function(other)
        return self.at_sites.second_at(left, right, rows, cols)


class _OfSum(_Averages):
    """A sum of whatever law, times a number."""

    def __init__(self, sum_: Sum, factor: float) -> None:
        self.sum, self.factor = sum_, factor

    def average(self, slot: int | None) -> np.ndarray:
        return self.factor * (mean(self.sum) if slot is None else np.ones(self.sum.sites))

    def pair(self, one: int | None, other: int | None) -> np.ndarray:
        if one is None and other is None:
            return self.factor**2 * second_moments(self.sum)
        return np.outer(self.average(one), self.average(other))


def _multiple(piece: Piece) -> tuple[Sum, float] | None:
    """The variable and the factor of a piece that is one variable times a number; else None."""
    nodes = node_factors(piece.node)
    places = [node.value for node in nodes if node.kind == "variable"]
    if len(places) != 1 or any(node.kind not in ("variable", "constant") for node in nodes):
        return None
    factor = math.prod(node.value for node in nodes if node.kind == "constant")
    return piece.variables[places[0]], float(factor)


def _at_sites(variables: Sequence[Sum], numbers: Sequence[np.ndarray]) -> SiteAverages:
    """Averages of functions of Gaussian variables."""
    k = np.array([[covariance(u, v) for v in variables] for u in variables])
    return SiteAverages(k, np.array([v.constant for v in variables]), numbers)


def _of_scalars(piece: Piece, places: Sequence[int], numbers: slice) -> Callable[..., Any]:
    """The piece as a function of scalars, its variables at these places, its numbers at those."""

    def f(*scalars: Any) -> Any:
        return piece.node.evaluate([scalars[i] for i in places], scalars[numbers])

    return f
