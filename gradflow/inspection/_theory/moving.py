"""Rules for what moves elements, leaves some out, repeats them or puts arrays side by side.

What a primitive does to elements is seen by giving it arrays of their numbers.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from scipy import sparse

from gradflow.inspection._reading.program import Equation
from gradflow.inspection._theory.building import as_field
from gradflow.inspection._theory.sums import (
    Field,
    NoRule,
    Origin,
    Piece,
    Product,
    Sum,
    identity,
    selection,
)
from gradflow.inspection._theory.values import (
    Flattened,
    Groups,
    Known,
    Noise,
    Signal,
    Value,
    Weights,
)

__all__ = ["concatenate", "gather", "moved", "of_units", "split", "stack", "units_as_sites"]
__all__ += ["unstack"]

Move = Callable[[np.ndarray], np.ndarray]


def moved(equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]) -> Value:
    """A primitive that moves elements of its first operand; others are known."""
    value, *others = values
    fill = 0.0
    if equation.primitive == "pad":
        if not isinstance(others[0], Known):
            raise NoRule("what is put around an array is random")
        fill, others = float(others[0].value), []
    known = [_known(other) for other in others]
    if equation.primitive == "reshape" and isinstance(value, Flattened):
        value = value.signal
    if isinstance(value, Signal) and equation.primitive == "reshape":
        value = _divided(value, shapes[0])
        found = _flattening(value, shapes[0])
        if found is not None:
            axis, opened = found
            signal = rearranged(value, lambda array: array.reshape(opened), opened)
            assert isinstance(signal, Signal)
            repeated = _repeated_units(signal, range(axis, axis + len(opened) - len(shapes[0]) + 1))
            if repeated is None:
                return Flattened(shapes[0], axis, signal)
            value = repeated
    return rearranged(value, functools.partial(move, equation, known), shapes[0], fill)


def _known(value: Value) -> np.ndarray:
    if not isinstance(value, Known):
        raise NoRule("places that are random")
    return value.value


def move(equation: Equation, others: Sequence[np.ndarray], array: np.ndarray) -> np.ndarray:
    """A primitive that moves elements, on an array of numbers of elements; 0 is put around them."""
    params = equation.params
    match equation.primitive:
        case "transpose":
            return np.transpose(array, params["permutation"])
        case "reshape":
            return array.reshape(params["new_sizes"])
        case "rev":
            return np.flip(array, params["dimensions"])
        case "squeeze":
            return np.squeeze(array, tuple(params["dimensions"]))
        case "expand_dims":
            return np.expand_dims(array, tuple(params["dimensions"]))
        case "broadcast_in_dim":
            shape = [1] * len(params["shape"])
            for axis, length in zip(params["broadcast_dimensions"], array.shape, strict=True):
                shape[axis] = length
            return np.broadcast_to(array.reshape(shape), params["shape"])
        case "slice":
            steps = params["strides"] or (1,) * array.ndim
            ends = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
            return array[tuple(slice(*each) for each in ends)]
        case "pad":
            zero = np.zeros((), array.dtype)
            return np.asarray(jax.lax.pad(array, zero, params["padding_config"]))
        case _:
            with jax.enable_x64(True):
                return np.asarray(equation.evaluate(array, *others)[0])


def rearranged(value: Value, move: Move, shape: tuple[int, ...], fill: float = 0.0) -> Value:
    """A value whose elements are moved as those of an array of numbers from 1 on; 0 is filled."""
    if isinstance(value, Weights):
        return _moved_weights(value, move)
    if isinstance(value, Noise):
        if value.values is None:
            return dataclasses.replace(value, shape=shape, varying=frozenset())
        as_weights = _moved_weights(value.weights, move)
        return dataclasses.replace(value, shape=as_weights.shape, varying=as_weights.varying)
    if not isinstance(value, Signal):
        raise NoRule("elements of signals side by side are moved")
    unit = move(_numbered(value.shape, value.units))
    site = move(_numbered(value.shape, value.site_axes))
    filled = unit == 0
    if filled.any() and value.width > 1 and len(np.unique(unit)) != value.width + 1:
        raise NoRule("units are put around others")
    units = tuple(i for i in range(unit.ndim) if _varies(unit, i))
    if any(_varies(site, i) for i in units):
        raise NoRule("units and sites are mixed")
    kept = _units_kept(unit, units) if units else np.unique(unit[unit > 0])
    if not units and all(shape[i] == 1 for i in value.units if i < len(shape)):
        units = tuple(i for i in value.units if i < len(shape))
    first = tuple(0 if i in units else slice(None) for i in range(site.ndim))
    sum_ = value.sum
    count = np.unique(kept, return_counts=True)[1]
    if np.ptp(count):
        raise NoRule("some units are repeated")
    if len(kept) != value.width or count[0] > 1:
        sum_ = of_units(sum_, ("units", kept.tobytes()), len(kept) / value.width)
    sites = site[first].reshape(-1) - 1
    sum_ = sum_.taken(sites)
    if fill and (sites < 0).any():
        sum_ = sum_.shifted(np.where(sites < 0, fill, 0.0))
    return Signal(shape, units, sum_)


def _units_kept(unit: np.ndarray, units: tuple[int, ...]) -> np.ndarray:
    """The numbers of units, in order, at a site where they are not filled."""
    rows = np.moveaxis(unit, units, range(-len(units), 0))
    rows = rows.reshape(-1, math.prod(unit.shape[i] for i in units))
    return rows[np.argmax((rows > 0).all(axis=1))]


def _numbered(shape: tuple[int, ...], axes: Sequence[int]) -> np.ndarray:
    """For each element its number along these axes, from 1 on."""
    lengths = [shape[i] if i in axes else 1 for i in range(len(shape))]
    numbers = np.arange(1, math.prod(lengths) + 1).reshape(lengths)
    return np.ascontiguousarray(np.broadcast_to(numbers, shape))


def _varies(numbers: np.ndarray, axis: int) -> bool:
    """Whether numbers differ along an axis, those that are filled in aside."""
    if numbers.shape[axis] < 2:
        return False
    low = np.where(numbers > 0, numbers, np.iinfo(numbers.dtype).max).min(axis=axis)
    return bool((numbers.max(axis=axis) > low).any())


def _divided(value: Signal, shape: tuple[int, ...]) -> Signal:
    """A signal with axes of units divided where a reshape to this shape divides them."""
    ends = [set(itertools.accumulate(lengths, operator.mul)) for lengths in (value.shape, shape)]
    cuts = sorted(ends[0] | ends[1] | {1})
    if 0 in cuts or ends[0] >= ends[1] or any(b % a for a, b in itertools.pairwise(cuts)):
        return value
    new: list[int] = []
    units: list[int] = []
    inside = 1
    for axis, length in enumerate(value.shape):
        parts = [c for c in cuts if inside < c <= inside * length]
        lengths = [b // a for a, b in itertools.pairwise([inside, *parts])] or [length]
        if len(lengths) > 1 and axis not in value.units:
            return value
        units += [len(new) + i for i in range(len(lengths))] if axis in value.units else []
        new += lengths
        inside *= length
    return Signal(tuple(new), tuple(units), value.sum)


def _flattening(value: Signal, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]] | None:
    """The axis that a reshape makes of sites and units, and the shape with these axes for it."""
    old, new = (list(itertools.accumulate(x, operator.mul)) for x in (value.shape, shape))
    # Axes of which those of both shapes are made.
    ends = sorted({1, *old, *new})
    if ends[0] == 0 or any(b % a for a, b in itertools.pairwise(ends)):
        return None
    found, start = None, 1
    for axis, stop in enumerate(new):
        made_of = [(a, b) for a, b in itertools.pairwise(ends) if start <= a and b <= stop]
        kinds = {next(i for i, end in enumerate(old) if end > a) in value.units for a, _ in made_of}
        if len(kinds) == 2:
            if found is not None:
                return None
            found = axis, (*shape[:axis], *(b // a for a, b in made_of), *shape[axis + 1 :])
        start = stop
    return found


def _repeated_units(value: Signal, merged: Sequence[int]) -> Signal | None:
    """The signal with sites that become units among them, where all of these are the same."""
    new = [i for i in merged if i not in value.units and value.shape[i] > 1]
    many = math.prod(value.shape[i] for i in new)
    index = np.arange(value.sum.sites).reshape(value.site_shape)
    places = [value.site_axes.index(i) for i in new]
    rows = np.moveaxis(index, places, range(len(places))).reshape(many, -1)
    first, *others = (value.sum.taken(row) for row in rows)
    for other in others:
        differ = [abs(map_ - other.parts[part]).max() if part in other.parts else 1.0
                  for part, map_ in first.parts.items()]  # fmt: skip
        if (
            any(differ)
            or len(other.parts) != len(differ)
            or (other.constant != first.constant).any()
        ):
            return None
    units = tuple(sorted((*value.units, *new)))
    key = "repeated", tuple(units.index(i) for i in new), many
    return Signal(value.shape, units, of_units(first, key, float(many)))


def _moved_weights(value: Weights, move: Move) -> Weights:
    before = _numbered(value.shape, sorted(value.varying))
    after = move(before)
    if (after == 0).any():
        raise NoRule("numbers are put around parameters")
    varying = frozenset(i for i in range(after.ndim) if _varies(after, i))
    different = np.unique(after)
    if math.prod(after.shape[i] for i in varying) != len(different):
        raise NoRule("parameters are repeated")
    tie = value.tie
    if len(different) != before.max(initial=0):
        tie = (*tie, different.tobytes())
    return dataclasses.replace(value, shape=after.shape, varying=varying, tie=tie)


# Some of the units -------------------------------------------------------------------------------


def of_units(sum_: Sum, key: Any, share: float) -> Sum:
    """Some of the units of a sum, independent of all others: the same for the same key."""
    copies = sum_.__dict__.setdefault("copies", {})
    if key not in copies:
        parts = {_part_of_units(part, key, share): map_ for part, map_ in sum_.parts.items()}
        base, a, b = sum_.affine
        affine = None if base is sum_ else (of_units(base, key, share), a, b)
        copies[key] = Sum(sum_.constant, parts, affine)
    return copies[key]


def _part_of_units(part: Any, key: Any, share: float) -> Any:
    copies = part.__dict__.setdefault("copies", {})
    if key not in copies:
        if isinstance(part, Field):
            origin = Origin(part, share, (identity(len(part.covariance)),))
            copies[key] = Field(
                part.covariance, gaussian=part.gaussian, tie=(*part.tie, key), origin=origin
            )
        else:
            variables = tuple(of_units(v, key, share) for v in part.variables)
            copies[key] = Piece(part.node, variables, part.numbers)
    return copies[key]


def units_as_sites(signal: Signal, kept: Sequence[int]) -> Signal:
    """The same signal with some of its axes of units among the sites, independent of each other."""
    new = [i for i in signal.units if i not in kept]
    many = math.prod(signal.shape[i] for i in new)
    if many == 1:
        return Signal(signal.shape, tuple(kept), signal.sum)
    sum_ = _apart(signal.sum, ("sites", tuple(new), many), many)
    # They are in the order (old sites, new sites).
    old = _numbered(signal.shape, signal.site_axes) - 1
    number = (old * many + _numbered(signal.shape, new) - 1)[
        tuple(0 if i in kept else slice(None) for i in range(len(signal.shape)))
    ].reshape(-1)
    return Signal(signal.shape, tuple(kept), sum_.taken(number))


def _apart(sum_: Sum, key: Any, many: int) -> Sum:
    copies = sum_.__dict__.setdefault("copies", {})
    if key not in copies:
        parts = {
            _part_apart(part, key, many): sparse.csr_array(
                sparse.kron(map_, sparse.eye_array(many))
            )
            for part, map_ in sum_.parts.items()
        }
        base, a, b = sum_.affine
        affine = None if base is sum_ else (_apart(base, key, many), a, b)
        copies[key] = Sum(np.repeat(sum_.constant, many), parts, affine)
    return copies[key]


def _part_apart(part: Any, key: Any, many: int) -> Any:
    copies = part.__dict__.setdefault("copies", {})
    if key not in copies:
        if isinstance(part, Field):
            sites = len(part.covariance)
            maps = tuple(
                selection(np.where(np.arange(sites * many) % many == m,
                                   np.arange(sites * many) // many, -1), sites)
                for m in range(many)
            )  # fmt: skip
            copies[key] = Field(
                np.kron(part.covariance, np.eye(many)),
                gaussian=part.gaussian,
                tie=(*part.tie, key),
                origin=Origin(part, 1 / many, maps),
            )
        else:
            variables = tuple(_apart(v, key, many) for v in part.variables)
            numbers = tuple(np.repeat(x, many) for x in part.numbers)
            copies[key] = Piece(part.node, variables, numbers)
    return copies[key]


# Several arrays ----------------------------------------------------------------------------------


def split(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> list[Value]:
    """Parts of an array along an axis."""
    axis = equation.params["axis"]
    ends = (0, *itertools.accumulate(shape[axis] for shape in shapes))
    out = []
    for (start, stop), shape in zip(itertools.pairwise(ends), shapes, strict=True):
        where = (slice(None),) * axis + (slice(start, stop),)
        out.append(rearranged(values[0], functools.partial(_at, where), shape))
    return out


def unstack(
    equation: Equation,
    values: Sequence[Value],
    shapes: Sequence[tuple[int, ...]],
) -> list[Value]:
    """The arrays along an axis of an array."""
    before = (slice(None),) * equation.params.get("axis", 0)
    moves = (functools.partial(_at, (*before, i)) for i in range(len(shapes)))
    return [rearranged(values[0], m, s) for m, s in zip(moves, shapes, strict=True)]


def _at(where: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
    return array[where]


def stack(
    equation: Equation,
    values: Sequence[Value],
    shapes: Sequence[tuple[int, ...]],
) -> Value:
    """Arrays side by side along a new axis: JAX's own primitive has one, a loop's is the first."""
    axis = equation.params.get("axis", 0)
    of_steps = [_with_axis(value, axis) for value in values]
    along = dataclasses.replace(equation, params={"dimension": axis})
    return concatenate(along, of_steps, shapes)


def _with_axis(value: Value, axis: int) -> Value:
    if isinstance(value, Known):
        return Known(np.expand_dims(value.value, axis))
    if isinstance(value, (Signal, Weights, Noise)):
        shape = (*value.shape[:axis], 1, *value.shape[axis:])
        return rearranged(value, functools.partial(np.expand_dims, axis=axis), shape)
    raise NoRule("signals side by side are stacked")


def concatenate(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
    """Arrays side by side: over sites a sum of all, over units groups with laws of their own."""
    axis, shape = equation.params["dimension"], shapes[0]
    if all(isinstance(value, Noise) for value in values):
        return dataclasses.replace(values[0], shape=shape)  # type: ignore[arg-type]
    parts: list[Value] = []
    for value in values:
        parts += value.parts if isinstance(value, Groups) and value.axis == axis else (value,)
    like = next((v for v in parts if isinstance(v, Signal)), None)
    if like is None:
        raise NoRule("parameters side by side")
    signals = [_like(part, like, axis) for part in parts]
    if axis in like.units or (like.width == 1 and any(axis in s.units for s in signals)):
        return Groups(shape, axis, tuple(signals))
    place, total = like.site_axes.index(axis), None
    lengths = [n for i, n in enumerate(shape) if i not in like.units]
    start = 0
    for signal in signals:
        own = np.full(lengths, -1)
        stop = start + signal.shape[axis]
        own[(slice(None),) * place + (slice(start, stop),)] = np.arange(signal.sum.sites).reshape(
            signal.site_shape
        )
        there = signal.sum.mapped(selection(own.reshape(-1), signal.sum.sites))
        total = there if total is None else total.plus(there)
        start = stop
    assert total is not None
    return Signal(shape, like.units, total)


def _like(value: Value, like: Signal, axis: int) -> Signal:
    """A part as a signal with the units of another."""
    if isinstance(value, Signal):
        if value.units != like.units:
            raise NoRule("signals whose units are along different axes are put side by side")
        return value
    if axis in like.units:
        raise NoRule("numbers and random units are put side by side")
    if isinstance(value, Weights):
        return Signal(value.shape, like.units, as_field(value, like.units))
    if not isinstance(value, Known):
        raise NoRule("what is put side by side is not known")
    shape = value.value.shape
    sites = math.prod(n for i, n in enumerate(shape) if i not in like.units)
    empty = Signal(shape, like.units, Sum(np.zeros(sites), {}))
    return Signal(shape, like.units, empty.beside(value.value))


def gather(equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]) -> Value:
    """Rows of a table, or elements of a signal, at known places."""
    table, places = values[:2]
    if not isinstance(table, Weights):
        return moved(equation, values, shapes)
    indices = _known(places)
    numbers = _numbered(table.shape, range(len(table.shape)))
    taken = move(equation, [indices], numbers)
    units = equation.params["dimension_numbers"].offset_dims
    if table.mean:
        raise NoRule("weights have a mean that is not 0")
    width = math.prod(taken.shape[i] for i in units)
    rows = np.moveaxis(taken, units, range(-len(units), 0)).reshape(-1, width)[:, 0]
    same = (rows[:, None] == rows[None, :]).astype(float)
    product = Product(None, (), 1, width, table.variance, table.error, same, math.prod(table.shape))
    field = Field(table.variance * same, gaussian=table.gaussian, product=product, tie=table.tie)
    return Signal(shapes[0], tuple(units), Sum.of(field, len(rows)))
