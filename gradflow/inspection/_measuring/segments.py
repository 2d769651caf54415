"""A program cut at its layers: equal segments are one compiled program, forward and backward.

A segment is what a layer's pre-activation needs beyond the layers below. Its forward program takes
the values that enter and returns those that leave; its backward program takes the cotangents of
those that leave, at unit scale beside logarithms, and returns those of what enters. Programs are
kept by what they compute, up to names, so that 300 equal layers compile once. All run for many
networks at a time, by `jax.vmap`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow import _compilation
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.program import Equation, Program

__all__ = ["Segment", "Stretch", "cut", "is_float", "stretch"]

# Equations that a segment has at most: what compiles in about a second.
_MOST_EQUATIONS = 100
_LONG = 30.0  # seconds of a run that optimisations are worth
_QUICK = 1.0  # and that none is worth
_SECONDS_AN_ELEMENT, _SECONDS_A_TERM = 2e-9, 2e-10  # of an equation, and of a product


@dataclasses.dataclass(frozen=True)
class Segment:
    """Equations of a program, in order, and the numbers of the values that enter and leave.

    Attributes
    ----------
    equations, inputs, outputs
        Inputs are all values from outside but constants of one number.
    products, layers
        Places, in the list of layers, of those whose product is here; whose pre-activation is.
    """

    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    products: tuple[int, ...]
    layers: tuple[int, ...]


class _Step(NamedTuple):
    """An equation with the names of its inputs and outputs, and of where it begins to slice."""

    equation: Equation
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    start: int | None = None

    def evaluate(self, env: dict[int, Any], operands: list[Any]) -> tuple[Any, ...]:
        """Its outputs, where a slice begins at a value and not at a constant."""
        if self.start is None:
            return self.equation.evaluate(*operands)
        params, start = self.equation.params, env[self.start]
        sizes = np.subtract(params["limit_indices"], params["start_indices"])
        return (jax.lax.dynamic_slice(operands[0], list(start), sizes),)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Equations with names of their own: inputs are 0, 1, …; equal keys compute the same.

    Attributes
    ----------
    key
        Hashable: the primitives, their parameters, wiring and shapes. Constants of one number and
        where slices begin are not in it, so that layers that differ in these are one program.
    steps
        The equations.
    constants
        Those by name that are no inputs.
    names
        The name of each value of the program.
    """

    key: tuple[Any, ...]
    steps: tuple[_Step, ...]
    constants: dict[int, np.ndarray]
    names: dict[int, int]

    @functools.cached_property
    def packed(self) -> list[np.ndarray]:
        """The constants' numbers, one array for each dtype."""
        return [
            np.concatenate([self.constants[name].reshape(-1) for name in names])
            for names in self._by_dtype.values()
        ]

    @functools.cached_property
    def _by_dtype(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for name, constant in self.constants.items():
            found.setdefault(str(constant.dtype), []).append(name)
        return found

    def _unpacked(self, packed: Sequence[Any]) -> dict[int, Any]:
        env = {}
        for names, numbers in zip(self._by_dtype.values(), packed, strict=True):
            first = 0
            for name in names:
                size, shape = self.constants[name].size, self.constants[name].shape
                env[name] = numbers[first : first + size].reshape(shape)
                first += size
        return env

    def run(
        self,
        values: Sequence[Any],
        packed: Sequence[Any] | None = None,
        taps: dict[int, tuple[int, Any]] | None = None,
    ) -> dict[int, Any]:
        """Every value by its name; traceable.

        ``packed`` are the constants, its own without it. ``taps`` are arrays that are added to an
        operand, by the place of the equation: the place among its operands, and the array.
        """
        constants = self.constants if packed is None else self._unpacked(packed)
        env = {**constants, **dict(enumerate(values))}
        for place, step in enumerate(self.steps):
            operands = [env[i] for i in step.ins]
            if taps and place in taps:
                operand, tap = taps[place]
                operands[operand] += tap
            if ends_gradient(step.equation):
                operands = [jax.lax.stop_gradient(x) if is_float(x) else x for x in operands]
            env.update(zip(step.outs, step.evaluate(env, operands), strict=True))
        return env

    def sources(self, output: int, floats: frozenset[int]) -> tuple[set[int], set[int]]:
        """Names that a gradient at ``output`` reaches, among floats; and places of equations."""
        reached, places = {output}, set()
        for place in range(len(self.steps) - 1, -1, -1):
            step = self.steps[place]
            if not ends_gradient(step.equation) and not reached.isdisjoint(step.outs):
                places.add(place)
                reached.update(i for i in step.ins if i in floats)
        return reached, places


def ends_gradient(equation: Equation) -> bool:
    """Whether no gradient passes: a `while` loop, also in a branch, or where the user stops it."""
    if equation.primitive == "cond":
        return "while[" in equation.signature[1]
    return equation.primitive in ("while", "stop_gradient")


def work(program: Program) -> float:
    """Seconds of one core that evaluating a program takes for one network, roughly."""
    total = 0.0
    for equation in program.equations:
        size = sum(math.prod(program.avals[i].shape) for i in equation.outputs)
        terms = 0.0
        if equation.primitive in ("dot_general", "conv_general_dilated"):
            left, right = (math.prod(program.avals[i].shape) for i in equation.inputs)
            terms = (left * right * size) ** 0.5
        if equation.primitive == "conv_general_dilated":
            channels = equation.params["dimension_numbers"].out_spec[1]
            terms = right * size / max(1, program.avals[equation.outputs[0]].shape[channels])
        total += _SECONDS_AN_ELEMENT * size + _SECONDS_A_TERM * terms
    return total


def is_float(value: Any) -> bool:
    """Whether a value, or its shape, is of a float type."""
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def cut(program: Program, layers: Sequence[Layer]) -> list[Segment]:
    """The segments of a program, in an order of data flow: of each layer, and of each output.

    Each has what its layer needs and none before it has made, so that paths side by side are
    segments of their own, and each may have a scale of its own.
    """
    producers, consumers = program.producers(), program.consumers()
    taken: dict[int, int] = {}  # the segment of each equation
    groups: list[list[int]] = []
    for end in [*(layer.preactivation for layer in layers), *program.outputs]:
        for piece in _pieces(program, _needed(program, producers, end, taken)):
            taken.update(dict.fromkeys(piece, len(groups)))
            groups.append(piece)
    at_z = {layer.preactivation: place for place, layer in enumerate(layers)}
    at_product = {layer.product: place for place, layer in enumerate(layers)}
    kept = {*program.outputs, *at_z}
    segments = []
    for number, places in enumerate(groups):
        equations = tuple(program.equations[place] for place in places)
        made = [v for equation in equations for v in equation.outputs]
        inputs = dict.fromkeys(
            i
            for equation in equations
            for i in equation.inputs
            if i not in set(made) and not _is_inlined(program, i)
        )
        leaving = [
            v
            for v in made
            if v in kept or any(taken.get(p) not in (number, None) for p in consumers.get(v, []))
        ]
        segments.append(
            Segment(
                equations,
                tuple(inputs),
                tuple(leaving),
                tuple(at_product[v] for v in made if v in at_product),
                tuple(at_z[v] for v in made if v in at_z),
            )
        )
    return segments


def _needed(
    program: Program, producers: dict[int, int], value: int, taken: dict[int, int]
) -> list[int]:
    """Places of the equations that a value needs and no segment has."""
    found: set[int] = set()
    pending = [value]
    while pending:
        place = producers.get(pending.pop())
        if place is not None and place not in taken and place not in found:
            found.add(place)
            pending += program.equations[place].inputs
    return sorted(found)


def _pieces(program: Program, places: list[int]) -> Iterable[list[int]]:
    """Cut at what takes loops' arrays apart, and so that none is too long to compile."""
    piece: list[int] = []
    for place in places:
        alone = program.equations[place].primitive == "unstack"
        if piece and (alone or len(piece) == _MOST_EQUATIONS):
            yield piece
            piece = []
        piece.append(place)
        if alone:
            yield piece
            piece = []
    if piece:
        yield piece


def _is_inlined(program: Program, value: int) -> bool:
    constant = program.constants.get(value)
    return isinstance(constant, np.ndarray) and constant.size == 1


def stretch(program: Program, equations: Sequence[Equation], inputs: Sequence[int]) -> Stretch:
    """Equations with names of their own; constants that are no inputs become its own."""
    names = {value: name for name, value in enumerate(inputs)}
    constants: dict[int, np.ndarray] = {}
    steps: list[_Step] = []
    key: list[Any] = []
    free = len(inputs) + sum(len(e.inputs) + len(e.outputs) for e in equations)
    for equation in equations:
        for value in equation.inputs:
            if value not in names:
                constants[len(names)] = program.constants[value]
                names[value] = len(names)
        ins = tuple(names[i] for i in equation.inputs)
        for value in equation.outputs:
            names.setdefault(value, len(names))
        outs = tuple(names[i] for i in equation.outputs)
        signature, start = equation.signature, None
        if equation.primitive == "slice" and set(equation.params["strides"] or (1,)) == {1}:
            start = free + len(steps)
            constants[start] = np.asarray(equation.params["start_indices"], np.int32)
            signature = ("slice", program.avals[equation.outputs[0]].shape)
        steps.append(_Step(equation, ins, outs, start))
        key.append((signature, ins, outs))
    avals = tuple((program.avals[i].shape, str(program.avals[i].dtype)) for i in inputs)
    shapes = tuple((n, str(c.dtype), c.shape) for n, c in constants.items())
    return Stretch((tuple(key), avals, shapes), tuple(steps), constants, names)


_PROGRAMS: dict[Any, Callable] = {}
_MOST_PROGRAMS = 1000


def compiled(key: Any, function: Callable, in_axes: Any, out_axes: Any, seconds: float) -> Callable:
    """The function over networks, jitted; one that computes the same where there was one.

    ``seconds`` is how long all programs of its walk will run: how well they are to be compiled.
    """
    options = _compilation.options(seconds)
    if options and seconds < _LONG:
        # These programs are products, which are not compiled, and short elementwise loops: those
        # run as fast at level 1, and compile in three quarters of the time; at 0 in half of it.
        level = "0" if seconds < _QUICK else "1"
        options = {"xla_backend_optimization_level": level, **options}
    key = (key, str(in_axes), str(out_axes), str(options))
    if key not in _PROGRAMS:
        if len(_PROGRAMS) >= _MOST_PROGRAMS:
            _PROGRAMS.pop(next(iter(_PROGRAMS)))
        over_networks = jax.vmap(function, in_axes=in_axes, out_axes=out_axes)
        _PROGRAMS[key] = jax.jit(over_networks, compiler_options=options)
    return _PROGRAMS[key]


def rows(x: Array, units: Sequence[int]) -> Array:
    """A layer's array as (sites, units), in float32 at least."""
    others = [i for i in range(x.ndim) if i not in units]
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    moved = jnp.transpose(wide, [*others, *units])
    return moved.reshape(int(np.prod([x.shape[i] for i in others], dtype=int)), -1)
