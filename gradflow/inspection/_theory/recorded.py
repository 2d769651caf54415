"""Values that are known as a stretch of the program on random arrays: its equations are kept.

What is made of attention's scores, or of queries and keys that positions turn, is no elementwise
function of Gaussian units. It is recorded, step by step, and run on draws where it is needed.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from gradflow.inspection._reading.layers import ELEMENTWISE
from gradflow.inspection._reading.program import Equation
from gradflow.inspection._theory.sums import NoRule
from gradflow.inspection._theory.values import Recorded

__all__ = ["LINEAR", "UNITS", "Axes", "Step", "axes_after", "axis_label", "in_float64"]
__all__ += ["replaced", "step_of"]

# Of each axis of an array what it is made of, (label, length) each, in order; none of length 1.
Axes: TypeAlias = tuple[tuple[tuple[Any, int], ...], ...]
# The label of units; other labels are tuples.
UNITS = "units"
_CASTS = frozenset({"convert_element_type", "copy", "copy_p", "reduce_precision"})
# Linear in random operands, where not more than one of the factors is random.
LINEAR = _CASTS | frozenset({
    "add", "add_any", "broadcast_in_dim", "complex", "concatenate", "div", "expand_dims", "imag",
    "mul", "neg", "real", "reshape", "rev", "slice", "split", "squeeze", "stack", "sub",
    "transpose", "unstack",
})  # fmt: skip
_REDUCTIONS = frozenset({"reduce_max", "reduce_min", "reduce_sum"})
_ALONG_UNITS = frozenset({"concatenate", "slice", "split", "stack", "unstack", "rev"})


def _as_float64(x: Any) -> Any:
    """Real numbers as float64; others as they are."""
    x = jnp.asarray(x)
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def in_float64(equation: Equation, *arguments: Any) -> list[Any]:
    """An equation's outputs, in JAX, in float64 whatever the model's own type."""
    arrays = [_as_float64(x) for x in arguments]
    name = equation.primitive
    if name in ELEMENTWISE:
        arrays = jnp.broadcast_arrays(*arrays)
    if name in _CASTS:
        kind = equation.params.get("new_dtype", jnp.float64)
        return [arrays[0].astype(jnp.float64 if jnp.issubdtype(kind, jnp.floating) else kind)]
    return list(equation.evaluate(*arrays))


class Step:
    """A step of a recorded stretch: a random array, a known one, or an equation's output."""

    def __init__(
        self,
        equation: Equation | None = None,
        below: Sequence["Step"] = (),
        place: int = 0,
        *,
        known: np.ndarray | None = None,
    ) -> None:
        self.equation, self.below, self.place, self.known = equation, tuple(below), place, known

    @functools.cached_property
    def leaves(self) -> tuple["Step", ...]:
        """The random arrays that it is made of, in order."""
        if self.equation is None:
            return () if self.known is not None else (self,)
        return tuple(dict.fromkeys(itertools.chain(*(step.leaves for step in self.below))))

    def key(self, names: Mapping["Step", int]) -> Any:
        """What it computes of random arrays of these numbers; equal ones compute the same."""
        if self.known is not None:
            return self.known.dtype.str, self.known.shape, self.known.tobytes()
        if self.equation is None:
            return names[self]
        below = tuple(step.key(names) for step in self.below)
        return *self.equation.signature, self.place, below

    def evaluate(self, arrays: Mapping["Step", Any]) -> Any:
        """Its value for random arrays, in float64; traceable."""
        done: dict[Any, Any] = dict(arrays)

        def of(step: Step) -> Any:
            if step not in done:
                if step.equation is None:
                    done[step] = jnp.asarray(step.known)
                else:
                    made = in_float64(step.equation, *map(of, step.below))
                    done[step] = made[step.place]
            return done[step]

        return of(self)


def axis_label(axes: tuple[tuple[Any, int], ...]) -> Any:
    """What an axis is made of: units, or sites of one kind; None of length 1."""
    labels = {label if label == UNITS else label[0] for label, _ in axes}
    if len(labels) > 1:
        raise NoRule("an axis of units and sites, or of sites of several kinds")
    return next(iter(labels), None)


def axes_after(
    equation: Equation, values: Sequence[Any], shapes: Sequence[tuple[int, ...]]
) -> list[Axes]:
    """What the axes of an equation's outputs are made of; raises `NoRule` where they are mixed."""
    name, params = equation.primitive, equation.params
    several = [value for value in values if isinstance(value, Recorded)]
    axes: Axes = several[0].axes
    if name in ELEMENTWISE or name in ("complex", "imag", "real"):
        return [_met([value.axes for value in several])] * len(shapes)
    if name in _REDUCTIONS:
        gone = params["axes"]
        if any(axis_label(axes[i]) not in ("left", "right", None) for i in gone):
            raise NoRule("over heads, or over inputs")
        return [tuple(a for i, a in enumerate(axes) if i not in gone)]
    if name == "transpose":
        return [tuple(axes[i] for i in params["permutation"])]
    if name == "broadcast_in_dim":
        out: list[Any] = [()] * len(shapes[0])
        for own, to in zip(axes, params["broadcast_dimensions"], strict=True):
            out[to] = own
        for i, length in enumerate(shapes[0]):
            if math.prod(n for _, n in out[i]) != length:
                if several[0].of_scores:
                    raise NoRule("weights of attention are repeated")
                out[i] = ((UNITS, length),)  # as keys are that several heads have
        return [tuple(out)]
    if name in ("reshape", "squeeze", "expand_dims"):
        return [_regrouped(axes, shapes[0])]
    if name in _ALONG_UNITS:
        return [_resized(name, params, [v.axes for v in several], shape) for shape in shapes]
    raise NoRule("of scores, or of units that positions turn")


def _met(several: Sequence[Axes]) -> Axes:
    """The axes of arrays that meet element by element, of which some may have length 1."""
    out = []
    for each in zip(*several, strict=True):
        found = set(filter(None, each))
        if len(found) > 1:
            raise NoRule("arrays of different axes meet")
        out.append(next(iter(found), ()))
    return tuple(out)


def _regrouped(axes: Axes, shape: tuple[int, ...]) -> Axes:
    """The axes of an array after a reshape: neighbouring units are divided, sites never are."""
    pending = [list(atom) for own in axes for atom in own]
    out = []
    for length in shape:
        taken: list[tuple[Any, int]] = []
        left = length
        while left > 1:
            if not pending:
                raise NoRule("axes are mixed")
            label, there = pending[0]
            if left % there == 0:
                taken.append((label, there))
                pending.pop(0)
                left //= there
            elif label == UNITS and there % left == 0:
                taken.append((label, left))
                pending[0][1] = there // left
                left = 1
            else:
                raise NoRule("sites are divided")
        out.append(tuple(taken))
    return tuple(out)


def _resized(
    name: str, params: Mapping[str, Any], several: Sequence[Axes], shape: tuple[int, ...]
) -> Axes:
    """The axes after something is done along axes of units."""
    axes = several[0]
    if name in ("stack", "unstack"):
        axis = params.get("axis", 0)
        if name == "unstack":
            gone, axes = axes[axis], (*axes[:axis], *axes[axis + 1 :])
            if axis_label(gone) not in (UNITS, None):
                raise NoRule("sites are taken apart")
            return axes
        new = ((UNITS, shape[axis]),) if shape[axis] > 1 else ()
        return (*axes[:axis], new, *axes[axis:])
    out = []
    for i, length in enumerate(shape):
        before = {math.prod(n for _, n in own[i]) for own in several}
        changed = name == "concatenate" and i == params["dimension"] or before != {length}
        reversed_ = name == "rev" and i in params["dimensions"]
        if not changed and not reversed_:
            out.append(axes[i])
            continue
        if any(axis_label(own[i]) not in (UNITS, None) for own in several):
            raise NoRule("some of the sites")
        out.append(((UNITS, length),) if length > 1 else ())
    return tuple(out)


def replaced(value: Any) -> Any:
    """A value as theory has it otherwise, where it is recorded beside that."""
    return value.plain if isinstance(value, Recorded) else value


def step_of(value: Any) -> Step:
    """The step of a value that is recorded or known."""
    if isinstance(value, Recorded):
        return value.step
    return Step(known=np.asarray(value.value))
