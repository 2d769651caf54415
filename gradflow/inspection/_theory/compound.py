"""Rules for values that are several: groups of units, flattened signals, and random numbers.

What is done to units side by side is done to each group; a product with weights is a sum of the
products of each group with its own weights. What is done to a flattened signal is done to it as it
was. Random numbers of a key are known by equally likely values of each.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.inspection._reading.layers import ELEMENTWISE, SHAPES
from gradflow.inspection._reading.program import Equation
from gradflow.inspection._theory.moving import rearranged
from gradflow.inspection._theory.sums import NoRule, Sum
from gradflow.inspection._theory.values import (
    Flattened,
    Groups,
    Known,
    Noise,
    Signal,
    Unknown,
    Value,
)

__all__ = ["through"]

Shapes = Sequence[tuple[int, ...]]
Apply = Callable[[Equation, Sequence[Value], Shapes], list[Value]]

_BITS = 1 << 14  # equally likely values of a random number
_draws = itertools.count()
_BITWISE = frozenset({
    "and", "bitcast_convert_type", "or", "shift_left", "shift_right_logical", "xor",
})  # fmt: skip
_CASTS = ("convert_element_type", "copy", "copy_p", "reduce_precision")
_OF_KEYS = ("random_", "threefry2x32")


def through(
    apply: Apply, equation: Equation, values: Sequence[Value], shapes: Shapes
) -> list[Value] | None:
    """The values of an equation one of whose operands is several; None if none is."""
    if equation.primitive.startswith(_OF_KEYS):
        return [_drawn(equation, shape) for shape in shapes]
    if any(isinstance(value, Noise) for value in values):
        made = _noise(apply, equation, values, shapes)
        if made is not None:
            return made
    if equation.inner is not None:  # each of its own equations
        return None
    if any(isinstance(value, Groups) for value in values):
        return [_by_groups(apply, equation, values, shapes[0])]
    if any(isinstance(value, Flattened) for value in values) and equation.primitive != "reshape":
        return [_unflattened(apply, equation, values, shapes[0])]
    return None


def _only(values: list[Value]) -> Value:
    if isinstance(values[0], Unknown):
        raise NoRule(values[0].reason)
    return values[0]


# Groups of units ---------------------------------------------------------------------------------


def _by_groups(
    apply: Apply, equation: Equation, values: Sequence[Value], shape: tuple[int, ...]
) -> Value:
    name, params = equation.primitive, equation.params
    groups = next(v for v in values if isinstance(v, Groups))
    axis = groups.axis
    if name in ELEMENTWISE:
        if any(isinstance(v, Groups) and v.ends != groups.ends for v in values):
            raise NoRule("groups of units of different widths meet")
        parts = [
            _only(apply(
                equation, [_group(v, groups, n) for v in values],
                [(*shape[:axis], groups.parts[n].shape[axis], *shape[axis + 1 :])],
            ))
            for n in range(len(groups.parts))
        ]  # fmt: skip
        return _grouped(shape, axis, parts)
    if name == "dot_general":
        return _product(apply, equation, values, shape, groups)
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        if numbers.lhs_spec[1] != axis or params["feature_group_count"] != 1:
            raise NoRule("groups of units in groups of channels")
        return _added([
            _only(apply(
                equation, [part, _along(values[1], numbers.rhs_spec[1], *ends)], [shape]
            ))
            for part, ends in zip(groups.parts, itertools.pairwise(groups.ends), strict=True)
        ])  # fmt: skip
    if name == "reduce_sum" and axis in params["axes"]:
        return _added([_only(apply(equation, [part], [shape])) for part in groups.parts])
    if name in ("transpose", "reduce_sum", "reduce_window_sum", "reduce_window_max", "reduce_max"):
        return _each(apply, equation, groups, shape)
    if name in (*SHAPES, "slice", "pad"):
        return _each(apply, equation, groups, shape)
    raise NoRule("units of different laws side by side")


def _grouped(shape: tuple[int, ...], axis: int, parts: list[Value]) -> Value:
    if not all(isinstance(part, Signal) for part in parts):
        raise NoRule("some of the units side by side are random")
    return Groups(shape, axis, tuple(parts))  # type: ignore[arg-type]


def _group(value: Value, groups: Groups, number: int) -> Value:
    """What of a value meets one of the groups."""
    if isinstance(value, Groups):
        return value.parts[number]
    return _along(value, groups.axis, groups.ends[number], groups.ends[number + 1])


def _along(value: Value, axis: int, start: int, stop: int) -> Value:
    """A value between two places along an axis."""
    where = (slice(None),) * axis + (slice(start, stop),)
    if isinstance(value, Known):
        there = value.value.ndim > axis and value.value.shape[axis] > 1
        return Known(value.value[where], value.literal) if there else value
    if isinstance(value, Unknown) or not value.shape or value.shape[axis] == 1:
        return value
    shape = (*value.shape[:axis], stop - start, *value.shape[axis + 1 :])
    return rearranged(value, lambda array: array[where], shape)


def _added(parts: list[Value]) -> Value:
    """The sum of signals alike, or of known numbers."""
    if all(isinstance(part, Known) for part in parts):
        return Known(sum(part.value for part in parts if isinstance(part, Known)))
    signals = [part for part in parts if isinstance(part, Signal)]
    if len(signals) != len(parts) or len({(s.units, s.shape) for s in signals}) != 1:
        raise NoRule("units of different laws side by side")
    total: Sum = signals[0].sum
    for signal in signals[1:]:
        total = total.plus(signal.sum)
    return Signal(signals[0].shape, signals[0].units, total)


def _product(
    apply: Apply,
    equation: Equation,
    values: Sequence[Value],
    shape: tuple[int, ...],
    groups: Groups,
) -> Value:
    sums = equation.params["dimension_numbers"][0]
    place = next(n for n, v in enumerate(values) if isinstance(v, Groups))
    if groups.axis not in sums[place]:
        raise NoRule("units of different laws, which are not summed")
    other = sums[1 - place][list(sums[place]).index(groups.axis)]
    parts = []
    for part, ends in zip(groups.parts, itertools.pairwise(groups.ends), strict=True):
        weights = _along(values[1 - place], other, *ends)
        operands = (part, weights) if place == 0 else (weights, part)
        parts.append(_only(apply(equation, operands, [shape])))
    return _added(parts)


def _each(apply: Apply, equation: Equation, groups: Groups, shape: tuple[int, ...]) -> Value:
    """Something that is done to each group, and moves their axis as a whole."""
    length = groups.shape[groups.axis]
    marks = np.zeros(groups.shape, np.int64)
    marks += np.arange(length).reshape([-1 if i == groups.axis else 1 for i in range(marks.ndim)])
    if equation.primitive in SHAPES:
        after = np.asarray(equation.evaluate(marks.astype(np.int32))[0])
        axes = [i for i in range(after.ndim) if (np.diff(after, axis=i) != 0).any()]
    elif equation.primitive.startswith("reduce_") and "axes" in equation.params:
        axes = [groups.axis - sum(i < groups.axis for i in equation.params["axes"])]
    else:
        axes = [groups.axis]
    if len(axes) != 1 or shape[axes[0]] != length:
        raise NoRule("units of different laws side by side are divided")
    parts = []
    for part in groups.parts:
        width = part.shape[groups.axis]
        own = (*shape[: axes[0]], width, *shape[axes[0] + 1 :])
        params = dict(equation.params)
        for name, place in (("new_sizes", axes[0]), ("shape", axes[0]),
                            ("limit_indices", groups.axis)):  # fmt: skip
            if name in params:
                sizes = list(params[name])
                sizes[place] = width
                params[name] = tuple(sizes)
        parts.append(_only(apply(dataclasses.replace(equation, params=params), [part], [own])))
    return _grouped(shape, axes[0], parts)


# Flattened signals -------------------------------------------------------------------------------


def _unflattened(
    apply: Apply, equation: Equation, values: Sequence[Value], shape: tuple[int, ...]
) -> Value:
    name, params = equation.primitive, dict(equation.params)
    flat = next(v for v in values if isinstance(v, Flattened))
    axis, before = flat.axis, flat.signal.shape
    several = len(before) - len(flat.shape) + 1
    lengths = before[axis : axis + several]

    def opened(value: Value, at: int) -> Value:
        """A value with the axis as several again."""
        if isinstance(value, Flattened):
            if value.axis != axis or value.signal.shape != before:
                raise NoRule("signals that were flattened in different ways meet")
            return value.signal
        own = value.value.shape if isinstance(value, Known) else value.shape  # type: ignore[union-attr]
        if not own:
            return value
        into = lengths if own[at] > 1 else (1,) * several
        new = (*own[:at], *into, *own[at + 1 :])
        if isinstance(value, Known):
            return Known(value.value.reshape(new), value.literal)
        return rearranged(value, lambda array: array.reshape(new), new)

    def later(axes: Sequence[int], at: int) -> list[int]:
        return [
            j
            for i in axes
            for j in (range(at, at + several) if i == at else [i + (several - 1) * (i > at)])
        ]

    if name in ELEMENTWISE:
        out = _only(apply(equation, [opened(v, axis) for v in values], [before]))
        return Flattened(shape, axis, out) if isinstance(out, Signal) else out
    if name == "reduce_sum" and axis in params["axes"]:
        params["axes"] = tuple(later(params["axes"], axis))
        return _only(apply(dataclasses.replace(equation, params=params), [flat.signal], [shape]))
    if name == "dot_general":
        sums, batches = params["dimension_numbers"]
        place = next(n for n, v in enumerate(values) if isinstance(v, Flattened))
        if axis in sums[place] and not batches[0]:
            other = sums[1 - place][list(sums[place]).index(axis)]
            at = [axis, other] if place == 0 else [other, axis]
            new = tuple(tuple(later(s, a)) for s, a in zip(sums, at, strict=True))
            params["dimension_numbers"] = (new, batches)
            operands = [opened(v, a) for v, a in zip(values, at, strict=True)]
            return _only(apply(dataclasses.replace(equation, params=params), operands, [shape]))
    raise NoRule("a signal whose units and sites are one axis")


# Random numbers ----------------------------------------------------------------------------------


def _drawn(equation: Equation, shape: tuple[int, ...]) -> Noise:
    """Random bits, or a key."""
    if equation.primitive != "random_bits":
        return Noise(shape, frozenset(), None, next(_draws))
    width = equation.params["bit_width"]
    values = (np.arange(_BITS, dtype=np.uint64) * 2 + 1) << np.uint64(width - _BITS.bit_length())
    varying = frozenset(i for i, n in enumerate(shape) if n > 1)
    return Noise(shape, varying, values.astype(f"uint{width}"), next(_draws))


def _noise(
    apply: Apply, equation: Equation, values: Sequence[Value], shapes: Shapes
) -> list[Value] | None:
    """What becomes of random numbers; None where they are moved, as all elements are."""
    name = equation.primitive
    noises = [v for v in values if isinstance(v, Noise)]
    if all(v.values is None for v in noises) and name not in (*SHAPES, "slice", "unstack"):
        return [Noise(shape, frozenset(), None, noises[0].tie) for shape in shapes]
    if name not in ELEMENTWISE and name not in _BITWISE:
        return None
    if not all(isinstance(v, (Noise, Known)) for v in values):
        if name == "select_n" and isinstance(values[0], Noise):
            return _masked(apply, equation, values, shapes)
        return apply(equation, [v.weights if isinstance(v, Noise) else v for v in values], shapes)
    if len({v.tie for v in noises}) > 1:
        raise NoRule("random numbers of several draws meet")
    arguments = []
    for v in values:
        if isinstance(v, Noise):
            arguments.append(v.values)
        elif isinstance(v, Known) and (v.value.size == 1 or not np.ptp(v.value)):
            arguments.append(np.broadcast_to(v.value.reshape(-1)[0], (_BITS,)))
        else:
            raise NoRule("random numbers meet numbers that differ")
    dtypes = [v.values.dtype for v in noises if v.values is not None]
    with jax.enable_x64(True):  # bits may be of 64
        if name in _BITWISE or name == "select_n":
            made: Any = equation.evaluate(*_alike(name, arguments, dtypes[0]))[0]
        else:
            made = equation.evaluate(*jnp.broadcast_arrays(*(_common(arguments))))[0]
    array = np.asarray(made)
    if array.size and (array == array[0]).all():  # as behind a factor of 0
        return [Known(np.broadcast_to(array[0], shapes[0]))]
    chance = noises[0].chance if name == "convert_element_type" else _chance(name, arguments)
    normal = _normal(name, values, arguments)
    return [Noise(shapes[0], noises[0].varying, array, noises[0].tie, chance, normal)]


def _normal(name: str, values: Sequence[Value], arguments: list[Any]) -> tuple[float, float] | None:
    """Mean and standard deviation of erf⁻¹ of what is uniform, and of what is linear in it."""
    if name == "erf_inv":
        even = (np.arange(_BITS) + 0.5) / _BITS * 2 - 1
        uniform = np.abs(np.asarray(arguments[0], np.float64) - even).max() < 1e-5
        return (0.0, 0.5**0.5) if uniform else None
    laws = [v.normal if isinstance(v, Noise) else None for v in values]
    if laws[0] is not None and name in _CASTS:
        return laws[0]
    if len(laws) != 2 or laws.count(None) != 1:
        return None
    place = 0 if laws[1] is None else 1
    mean, deviation = laws[place]  # type: ignore[misc]
    other = float(arguments[1 - place][0])
    match name:
        case "mul":
            return mean * other, abs(deviation * other)
        case "div" if place == 0:
            return mean / other, abs(deviation / other)
        case "add":
            return mean + other, deviation
        case "sub":
            return (mean - other if place == 0 else other - mean), deviation
    return None


def _chance(name: str, arguments: list[Any]) -> float | None:
    """How likely a number that is uniform from 0 to 1 is below another, or above."""
    if name not in ("lt", "le", "gt", "ge"):
        return None
    one, two = (np.asarray(x, np.float64) for x in arguments)
    even = (np.arange(_BITS) + 0.5) / _BITS
    for x, bound, below in ((one, two, name[0] == "l"), (two, one, name[0] == "g")):
        if np.abs(x - even).max() < 1e-5 and not np.ptp(bound):
            chance = float(np.clip(bound[0], 0, 1))
            return chance if below else 1 - chance
    return None


def _alike(name: str, arguments: list[Any], dtype: Any) -> list[Any]:
    if name == "select_n":
        return [jnp.asarray(arguments[0]), *_common(arguments[1:])]
    return [jnp.asarray(np.asarray(x).astype(dtype)) for x in arguments]


def _common(arguments: list[Any]) -> list[Any]:
    """Arguments of one type: that of real numbers is the program's own."""
    arrays = [np.asarray(x) for x in arguments]
    kind = np.result_type(*arrays)
    if np.issubdtype(kind, np.floating):
        kind = np.dtype(np.float32)
    return [jnp.asarray(x.astype(kind)) for x in arrays]


def _masked(
    apply: Apply, equation: Equation, values: Sequence[Value], shapes: Shapes
) -> list[Value]:
    """A signal where a random mask lets it through, a number elsewhere."""
    mask, no, yes = values
    assert isinstance(mask, Noise)
    weights = mask.weights
    if isinstance(yes, Known) and not yes.value.any():
        weights = dataclasses.replace(weights, mean=1 - weights.mean, tie=(*weights.tie, "not"))
        yes = no
    elif not (isinstance(no, Known) and not no.value.any()):
        raise NoRule("a random choice between two signals")
    times = dataclasses.replace(equation, primitive="mul", params={})
    return apply(times, [yes, weights], shapes)
