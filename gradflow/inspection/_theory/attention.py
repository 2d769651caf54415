"""Rules for attention: products of two signals over units, and what is weighted by them.

A product of queries and keys over the units of a head is a score, of which heads have independent
ones. What the program makes of them, by masks and a softmax over tokens or by anything else, is
recorded (`recorded`), and weighs the values: E[A V Aᵀ] over heads. At infinite key width scores are
Gaussian, Cov(s_ab, s_cd) = Q_ac K_bd; where queries or keys are turned by their positions, or the
weights are no softmax, heads of the program's own key width are drawn (`drawn_heads`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gradflow.inspection._reading.program import Equation
from gradflow.inspection._theory import forcing
from gradflow.inspection._theory.building import check_sites
from gradflow.inspection._theory.drawn_heads import Drawn
from gradflow.inspection._theory.heads import (
    Lengths,
    Weighing,
    covariance_of,
    pulled,
    softmax_of,
)
from gradflow.inspection._theory.recorded import (
    LINEAR,
    UNITS,
    Step,
    axes_after,
    axis_label,
    replaced,
    step_of,
)
from gradflow.inspection._theory.sums import Field, Mixture, NoRule, Sum, independent, selection
from gradflow.inspection._theory.values import Known, Recorded, Signal, Unknown, Value

__all__ = ["through"]

Shapes = Sequence[tuple[int, ...]]
Apply = Callable[[Equation, Sequence[Value], Shapes], list[Value]]
Atoms = tuple[tuple[Any, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Scores:
    """A product of two signals over units.

    Attributes
    ----------
    equation
        The product.
    operands
        Its two, each recorded.
    axes
        Of each operand, by its axes, what they are in the scores.
    shape
        Of the scores.
    atoms
        What the scores' axes are made of, in order.
    """

    equation: Equation
    operands: tuple[Recorded, Recorded]
    axes: tuple[Mapping[int, Atoms], Mapping[int, Atoms]]
    shape: tuple[int, ...]
    atoms: Atoms


def through(
    apply: Apply, equation: Equation, values: Sequence[Value], shapes: Shapes
) -> list[Value] | None:
    """The values of an equation that attention has a part in; None of all others."""
    recorded = [value for value in values if isinstance(value, Recorded)]
    of_scores = [value for value in recorded if value.of_scores]
    if equation.primitive == "dot_general" and len(values) == 2:
        if of_scores:
            return [_weighted(equation, values, shapes[0])]
        if all(isinstance(value, (Signal, Recorded)) for value in values):
            return [_scores(equation, values, shapes[0])]
    if of_scores:
        if equation.primitive.startswith("custom_"):
            return None  # by its definition
        return _steps(equation, values, shapes, [Unknown("scores of attention")] * len(shapes))
    if recorded or _turns(equation, values):
        if equation.primitive.startswith("custom_"):
            return apply(equation, [replaced(value) for value in values], shapes)
        return _turned(apply, equation, values, shapes)
    return None


# Recording ---------------------------------------------------------------------------------------


def _turns(equation: Equation, values: Sequence[Value]) -> bool:
    """Whether a signal is multiplied by numbers that differ between units and between sites."""
    if equation.primitive == "complex":
        return all(isinstance(value, Signal) for value in values)
    if equation.primitive != "mul" or {type(v) for v in values} != {Signal, Known}:
        return False
    one, two = values
    signal, known = (one, two) if isinstance(one, Signal) else (two, one)
    assert isinstance(signal, Signal)
    assert isinstance(known, Known)
    array = known.value
    if array.ndim != len(signal.shape):
        return False
    varies = [array.shape[i] > 1 and np.ptp(array, axis=i).any() for i in range(array.ndim)]
    return any(varies[i] for i in signal.units) and any(varies[i] for i in signal.site_axes)


def _turned(
    apply: Apply, equation: Equation, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """The values of a step as theory has them otherwise, and recorded where it is linear."""
    plain = apply(equation, [replaced(value) for value in values], shapes, recorded=False)  # type: ignore[call-arg]
    random = [value for value in values if not isinstance(value, Known)]
    product = equation.primitive in ("mul", "div")
    if equation.primitive not in LINEAR or product and len(random) > 1:
        return plain
    if not all(isinstance(value, (Recorded, Signal, Known)) for value in values):
        return plain
    if equation.primitive == "div" and isinstance(values[0], Known):
        return plain
    try:
        return _steps(equation, [_recorded(value) for value in values], shapes, plain)
    except NoRule:
        return plain


def _recorded(value: Value) -> Recorded | Known:
    """A signal as recorded."""
    if isinstance(value, (Recorded, Known)):
        return value
    assert isinstance(value, Signal)
    # One random array for one signal, wherever it is used.
    known = value.sum.__dict__.setdefault("arrays", [])
    step = next((step for signal, step in known if signal is value), None)
    if step is None:
        step = Step()
        known.append((value, step))
    axes = tuple(
        ()
        if n == 1
        else ((UNITS, n),)
        if i in value.units
        else ((("site", value.site_axes.index(i)), n),)
        for i, n in enumerate(value.shape)
    )
    return Recorded(value.shape, axes, step, {step: value}, value)


def _steps(
    equation: Equation, values: Sequence[Value], shapes: Shapes, plain: Sequence[Value]
) -> list[Value]:
    """The values of an equation of which a step is kept."""
    recorded = [value for value in values if isinstance(value, Recorded)]
    if not all(isinstance(value, (Recorded, Known)) for value in values):
        raise NoRule("weights of attention meet other random numbers, as those of dropout")
    sources: dict[Step, Any] = {}
    for value in recorded:
        sources |= value.sources
    if recorded[0].of_scores and len(sources) > 1:
        raise NoRule("scores of two products meet")
    axes = axes_after(equation, values, shapes)
    below = [step_of(value) for value in values]
    return [
        Recorded(shape, own, Step(equation, below, place), sources, beside)
        for place, (shape, own, beside) in enumerate(zip(shapes, axes, plain, strict=True))
    ]


# Scores ------------------------------------------------------------------------------------------


def _scores(equation: Equation, values: Sequence[Value], shape: tuple[int, ...]) -> Recorded:
    """A product of two signals over units, with its sites and heads."""
    left, right = (_recorded(value) for value in values)
    assert isinstance(left, Recorded)
    assert isinstance(right, Recorded)
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    labels = [[axis_label(axes) for axes in value.axes] for value in (left, right)]
    for label, summed in zip(labels, (left_sum, right_sum), strict=True):
        if any(label[i] not in (UNITS, None) for i in summed):
            raise NoRule("a product of two signals over sites")
    if not independent(_fields(left), _fields(right)):
        raise NoRule("a product of two signals that are not independent")
    own: tuple[dict[int, Atoms], dict[int, Atoms]] = {}, {}
    axes: list[Atoms] = []
    for number, (i, j) in enumerate(zip(left_batch, right_batch, strict=True)):
        n, found = left.shape[i], {labels[0][i], labels[1][j]} - {None}
        if len(found) > 1 and UNITS in found:
            raise NoRule("a product in which units meet sites")
        atoms: Atoms = () if n == 1 else ((UNITS if UNITS in found else ("input", number), n),)
        own[0][i] = own[1][j] = atoms
        axes.append(atoms)
    for side, value, gone in ((0, left, {*left_sum, *left_batch}),
                              (1, right, {*right_sum, *right_batch})):  # fmt: skip
        for i, n in enumerate(value.shape):
            if i not in gone:
                to: Any = UNITS if labels[side][i] == UNITS else (("left", "right")[side], i)
                own[side][i] = () if n == 1 else ((to, n),)
                axes.append(own[side][i])
    flat = tuple(atom for each in axes for atom in each)
    scores = _Scores(equation, (left, right), own, shape, flat)
    step = Step()
    return Recorded(shape, tuple(axes), step, {step: scores}, Unknown("scores of attention"))


def _fields(value: Recorded) -> frozenset[Field]:
    return frozenset[Field]().union(*(signal.sum.fields for signal in value.sources.values()))


# Weighted values ---------------------------------------------------------------------------------


def _weighted(equation: Equation, values: Sequence[Value], shape: tuple[int, ...]) -> Signal:
    """Values, weighted by what is made of scores, and added up over sites."""
    sides = [isinstance(value, Recorded) and value.of_scores for value in values]
    if all(sides):
        raise NoRule("a product of weights of attention")
    place = sides.index(True)
    weights, other = values[place], replaced(values[1 - place])
    assert isinstance(weights, Recorded)
    if not isinstance(other, Signal):
        raise NoRule(other.reason if isinstance(other, Unknown) else "scores meet no signal")
    sums, batches = equation.params["dimension_numbers"]
    pairs: dict[int, int] = {}
    for each in (sums, batches):
        pairs |= dict(zip(each[place], each[1 - place], strict=True))
    free = [i for i in range(len(weights.shape)) if i not in pairs]
    free_other = [i for i in range(len(other.shape)) if i not in pairs.values()]
    summed = {axis_label(weights.axes[i]) for i in sums[place]} - {None}
    if not summed <= {"left", "right"} or len(summed) > 1:
        raise NoRule("weights of attention, summed over heads or inputs")
    if any(weights.axes[i] and (axis_label(weights.axes[i]) == UNITS) != (j in other.units)
           for i, j in pairs.items()):  # fmt: skip
        raise NoRule("heads meet sites")
    axes: list[tuple[Atoms, bool]] = []  # of the product: atoms, and whether they are units
    for i in batches[place]:
        axes.append((weights.axes[i], pairs[i] in other.units))
    rest = [(weights.axes[i], axis_label(weights.axes[i]) == UNITS) for i in free]
    rest_other: list[tuple[Atoms, bool]] = [((), i in other.units) for i in free_other]
    axes += [*rest, *rest_other] if place == 0 else [*rest_other, *rest]
    if any(other.shape[i] > 1 and i not in other.units for i in free_other):
        raise NoRule("values with sites of their own")
    of_values = {j: weights.axes[i] for i, j in pairs.items() if j not in other.units}
    units = tuple(i for i, (_, is_units) in enumerate(axes) if is_units)
    width = math.prod(shape[i] for i in units)
    mixture = _Heads(weights, other, of_values, summed == {"left"}, width)
    atoms = tuple(a for own, is_units in axes if not is_units for a in own)
    order = mixture.index(atoms)
    covariance = mixture.covariance[np.ix_(order, order)]
    field = Field(covariance, gaussian=False, mixture=_Ordered(mixture, order))
    return Signal(shape, units, Sum.of(field, len(covariance)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Ordered(Mixture):
    """Heads whose outputs are in another order."""

    heads: "_Heads"
    order: np.ndarray

    @property
    def sums(self) -> tuple[Sum, ...]:
        """What the outputs come from."""
        return self.heads.sums

    def down(self, gradient: np.ndarray) -> list[tuple[Sum, np.ndarray]]:
        """Second moments of the gradients at each of the sums."""
        own = np.zeros_like(gradient)
        own[np.ix_(self.order, self.order)] = gradient
        return self.heads.down(own)


class _Heads:
    """Values weighted by heads' scores: second moments of the outputs, and of gradients."""

    def __init__(
        self,
        weights: Recorded,
        values: Signal,
        of_values: Mapping[int, Atoms],
        keys_left: bool,
        width: int,
    ) -> None:
        ((leaf, scores),) = weights.sources.items()
        self.scores, self.values, self.width = scores, values, width
        asked, asking = ("left", "right") if keys_left else ("right", "left")
        self.sides = (1, 0) if keys_left else (0, 1)  # of queries and of keys
        kinds: dict[Any, list[tuple[Any, int]]] = {"input": [], asking: [], asked: [], UNITS: []}
        for atom in scores.atoms:
            kinds[axis_label((atom,))].append(atom)
        self.inputs, self.asking, self.asked = (
            tuple(kinds[kind]) for kind in ("input", asking, asked)
        )
        there = {atom for own in weights.axes for atom in own if atom[0] != UNITS}
        if there != {*self.inputs, *self.asking, *self.asked}:
            raise NoRule("weights of attention, added up over tokens")
        self.lengths = Lengths(*(_product(a) for a in (self.inputs, self.asking, self.asked)))
        check_sites(max(self.lengths.inputs * n for n in self.lengths[1:]))
        self.heads = _product(kinds[UNITS])
        layout = (*self.inputs, *self.asking, *self.asked)
        self.weigh = Weighing(
            weights, leaf, (scores.shape, scores.atoms), layout, self.heads, self.lengths
        )
        self.value_places = _places(values, of_values, (*self.inputs, *self.asked))
        self.second_values = _at(values.sum, self.value_places)

    def index(self, atoms: Atoms) -> np.ndarray:
        """For sites in the order of these atoms their numbers, by input and token that asks."""
        own = (*self.inputs, *self.asking)
        number = np.arange(_product(own)).reshape([n for _, n in own])
        return np.transpose(number, [own.index(atom) for atom in atoms]).reshape(-1)

    @functools.cached_property
    def signals(self) -> "tuple[Signal, Signal] | None":
        """Queries and keys, where they are signals; None where these are turned first."""
        found = []
        for side in self.sides:
            operand = self.scores.operands[side]
            if operand.step.equation is not None:
                return None
            found.append(operand.sources[operand.step])
        return found[0], found[1]

    @functools.cached_property
    def limit(self) -> "_Limit | None":
        """Averages at infinite key width, where scores are Gaussian and weights a softmax."""
        if self.signals is None or all(forcing.mean(s.sum).any() for s in self.signals):
            return None
        made = _Limit(self, *self.signals)
        return None if made.softmax is None else made

    @functools.cached_property
    def drawn(self) -> Drawn:
        """Averages over drawn queries and keys."""
        return Drawn(
            self.scores.equation, self.scores.operands, self.sides[0], self.weigh,
            self.second_values, self.width / self.heads,
        )  # fmt: skip

    @functools.cached_property
    def covariance(self) -> np.ndarray:
        """E[A V Aᵀ], by input and token that asks."""
        return (self.limit or self.drawn).covariance()

    @property
    def sums(self) -> tuple[Sum, ...]:
        """Queries, keys and values."""
        both = itertools.chain(*(o.sources.values() for o in self.scores.operands))
        return (*(signal.sum for signal in both), self.values.sum)

    def down(self, gradient: np.ndarray) -> list[tuple[Sum, np.ndarray]]:
        """Second moments of gradients at queries, keys and values, from those at the outputs."""
        below, of_values = (self.limit or self.drawn).down(gradient)
        share = self.width / self.values.width
        return [*below, (self.values.sum, share * _back(self.values, self.value_places, of_values))]


def _product(atoms: Sequence[tuple[Any, int]]) -> int:
    return math.prod(n for _, n in atoms)


def _places(signal: Signal, of_axes: Mapping[int, Atoms], order: Atoms) -> np.ndarray:
    """For sites by these atoms their numbers in a signal."""
    atoms = [atom for i in signal.site_axes for atom in of_axes.get(i, ())]
    if _product(atoms) != signal.sum.sites:
        raise NoRule("a signal with sites of its own meets scores")
    number = np.arange(signal.sum.sites).reshape([n for _, n in atoms])
    missing = [atom for atom in order if atom not in atoms]
    number = number.reshape(*number.shape, *(1 for _ in missing))
    number = np.transpose(number, [[*atoms, *missing].index(atom) for atom in order])
    return np.broadcast_to(number, [n for _, n in order]).reshape(-1)


def _at(sum_: Sum, places: np.ndarray) -> np.ndarray:
    return np.asarray(forcing.second_moments(sum_))[np.ix_(places, places)]


def _back(signal: Signal, places: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Second moments of a gradient by a signal's own sites."""
    map_ = selection(places, signal.sum.sites)
    return np.asarray(map_.T @ gradient @ map_)


# Averages over heads -----------------------------------------------------------------------------

_Below = tuple[list[tuple[Sum, np.ndarray]], np.ndarray]


class _Limit:
    """Averages over heads whose scores are Gaussian, of weights that are a softmax of them."""

    def __init__(self, heads: _Heads, queries: Signal, keys: Signal) -> None:
        self.heads, self.signals = heads, (queries, keys)
        scores, sides = heads.scores, heads.sides
        orders = (*heads.inputs, *heads.asking), (*heads.inputs, *heads.asked)
        self.places = [
            _places(signal, scores.axes[side], order)
            for signal, side, order in zip(self.signals, sides, orders, strict=True)
        ]
        summed = scores.equation.params["dimension_numbers"][0][sides[0]]
        self.key_width = math.prod(scores.operands[sides[0]].shape[i] for i in summed)
        q, k = (_at(s.sum, p) for s, p in zip(self.signals, self.places, strict=True))
        size = math.sqrt(self.key_width * np.diagonal(q).max() * np.diagonal(k).max())
        self.softmax = softmax_of(heads.weigh, size)
        if self.softmax is None:
            return
        self.slopes = self.key_width * np.outer(self.softmax.slopes, self.softmax.slopes)
        self.moments: Any = self.slopes * q, k, heads.second_values

    def covariance(self) -> np.ndarray:
        """E[A V Aᵀ]."""
        assert self.softmax is not None
        return covariance_of(self.moments, self.softmax, self.heads.lengths)

    def down(self, gradient: np.ndarray) -> _Below:
        """Second moments of gradients at queries and keys, and by the places of values."""
        assert self.softmax is not None
        heads, (queries, keys) = self.heads, self.signals
        below: Any = pulled(gradient, self.moments, self.softmax, heads.lengths)
        shares = [heads.width / signal.width for signal in self.signals]
        of_queries = _back(queries, self.places[0], self.slopes * below.queries)
        of_keys = _back(keys, self.places[1], below.keys)
        return [
            (queries.sum, shares[0] * of_queries),
            (keys.sum, shares[1] * of_keys),
        ], below.values
