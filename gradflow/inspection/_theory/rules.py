"""The rules of the theory: what each primitive makes of abstract values, in one table.

A rule takes an `Equation`, the values of its inputs, of which at least one is no `Known`, and the
shapes of its outputs; it returns the value of its output, or a list for several. Where it has no
answer it raises `NoRule` with the reason. To add a rule, write one function here or in a module
that is imported below, and one line in `RULES`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.inspection._reading.layers import ELEMENTWISE, SHAPES
from gradflow.inspection._reading.program import Equation, Program, definition, on_host, read
from gradflow.inspection._theory import attention, compound, forcing, moving, windows
from gradflow.inspection._theory.building import (
    as_field,
    check_sites,
    fresh,
    lifted,
    made_by,
    patches,
    piece_of,
    weights_of_zero,
)
from gradflow.inspection._theory.nodes import multiply
from gradflow.inspection._theory.recorded import in_float64
from gradflow.inspection._theory.sums import NoRule, Product, Sum, absolute, selection
from gradflow.inspection._theory.values import KNOWN, Known, Signal, Unknown, Value, Weights

__all__ = ["RULES", "apply", "lifted"]

Rule: TypeAlias = Callable[[Equation, Sequence[Value], Sequence[tuple[int, ...]]], Any]


def apply(
    equation: Equation,
    values: Sequence[Value],
    shapes: Sequence[tuple[int, ...]],
    *,
    recorded: bool = True,
) -> list[Value]:
    """The values of an equation's outputs, `Unknown` where there is no rule or it has no answer.

    ``recorded`` False leaves out what is only recorded (`attention`).
    """
    for value in values:
        if isinstance(value, Unknown):
            return [value] * len(shapes)

    def ends(reason: object) -> list[Value]:
        where = equation.path or "the model"
        return [Unknown(f"theory ends at {where}: {reason}")] * len(shapes)

    try:
        several = attention.through(apply, equation, values, shapes) if recorded else None
        several = several or compound.through(apply, equation, values, shapes)
        if several is not None:
            return several
        if all(isinstance(value, Known) for value in values):
            out: Any = _evaluated(equation, [v.value for v in values if isinstance(v, Known)])
            return [Known(array) for array in out]
        rule = RULES.get(equation.primitive)
        if rule is None:
            return ends(f"no rule for `{equation.primitive}`")
        made = rule(equation, values, shapes)
    except NoRule as reason:
        return ends(f"`{equation.primitive}`, {reason}")
    except Exception as fault:  # noqa: BLE001 (a fault of a rule; measurement goes on)
        return ends(f"`{equation.primitive}`, whose rule fails: {type(fault).__name__}, {fault}")
    return made if isinstance(made, list) else [made]


# Elementwise functions ---------------------------------------------------------------------------


class _Function:
    """The elementwise function of an equation, in float64 whatever the model's own type."""

    def __init__(self, equation: Equation) -> None:
        self.equation, self.signature = equation, equation.signature

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Function) and self.signature == other.signature

    def __hash__(self) -> int:
        return hash(self.signature)

    def __call__(self, *arguments: Any) -> Any:
        """Its value for arrays, or numbers, in JAX."""
        return in_float64(self.equation, *arguments)[0]


def _evaluated(equation: Equation, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of an equation for known arrays, real numbers in float64."""
    with jax.enable_x64(True):
        if equation.primitive in ELEMENTWISE and equation.inner is None:
            return [np.asarray(_Function(equation)(*arrays))]
        if equation.inner is not None:
            values = [Known(on_host(x)) for x in arrays]
            return [v.value for v in _inner(equation, values) if isinstance(v, Known)]
        return [on_host(out) for out in in_float64(equation, *arrays)]


def _inner(equation: Equation, values: Sequence[Value]) -> list[Value]:
    """The values of a function that has its own derivative, by its definition."""
    program = equation.inner
    if program is None:
        raise NoRule("its definition is not known")
    env: dict[int, Value] = {i: Known(np.asarray(v), True) for i, v in program.constants.items()}
    env.update(zip(program.arguments["inputs"], values, strict=True))
    for each in program.equations:
        shapes = [program.avals[i].shape for i in each.outputs]
        env.update(
            zip(each.outputs, apply(each, [env[i] for i in each.inputs], shapes), strict=True)
        )
    return [env[i] for i in program.outputs]


class _OfOneShape(_Function):
    """An elementwise function that has one shape, and a derivative of its own, on any shape."""

    def __call__(self, *arguments: Any) -> Any:
        equation = self.equation
        assert equation.inner is not None
        aval = equation.inner.avals[equation.inner.outputs[0]]
        arrays = jnp.broadcast_arrays(*map(jnp.asarray, arguments))
        size, many = math.prod(aval.shape), arrays[0].size
        rows = [
            jnp.pad(x.reshape(-1), (0, -many % size)).reshape(-1, *aval.shape).astype(aval.dtype)
            for x in arrays
        ]
        made = jax.vmap(lambda *x: equation.evaluate(*x)[0])(*rows)
        return made.reshape(-1)[:many].reshape(arrays[0].shape).astype(arrays[0].dtype)


class _ByText:
    """An equation, equal to those that compute the same thing."""

    def __init__(self, equation: Equation) -> None:
        self.equation, self.signature = equation, equation.signature

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByText) and self.signature == other.signature

    def __hash__(self) -> int:
        return hash(self.signature)


@functools.lru_cache(maxsize=256)
def _derivative_is_its_own(one: _ByText) -> bool:
    """Whether a function's own derivative is that of its definition, on draws of its arguments."""
    equation = one.equation
    inner = equation.inner
    if inner is None:
        return False
    numbers = inner.arguments["inputs"]
    avals = [inner.avals[i] for i in numbers]
    if not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals):
        return True  # random bits, masks
    rng = np.random.default_rng(0)

    def defined(*x: Any) -> Any:
        values = inner.run(dict(zip(numbers, x, strict=True)))
        return [values[i] for i in inner.outputs]

    def slopes(f: Callable[..., Any]) -> list[np.ndarray]:
        out, pull = jax.vjp(f, *given)
        return [np.asarray(x, float) for x in pull([jnp.ones_like(y) for y in out])]

    with jax.enable_x64(True):  # a program may be of float64
        given = [jnp.asarray(rng.standard_normal(aval.shape), aval.dtype) for aval in avals]
        pairs = zip(slopes(lambda *x: list(equation.evaluate(*x))), slopes(defined), strict=True)
    return all(np.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in pairs)


@functools.lru_cache(maxsize=256)
def _is_elementwise(one: _ByText) -> bool:
    """Whether a function of one shape, and its own derivative, treat each element alone."""
    inner = one.equation.inner
    if inner is None or len(inner.outputs) != 1:
        return False
    avals = [inner.avals[i] for i in (*inner.arguments["inputs"], *inner.outputs)]
    shape = avals[0].shape
    alone = all(e.primitive in ELEMENTWISE and e.inner is None for e in inner.equations)
    if not alone or any(a.shape != shape or a.dtype != avals[0].dtype for a in avals):
        return False
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        given = [jnp.asarray(rng.standard_normal(shape), avals[0].dtype) for _ in avals[1:]]
        _, pull = jax.vjp(lambda *x: one.equation.evaluate(*x)[0], *given)
        slopes = pull(jnp.ones(shape, avals[0].dtype))
        cotangent = jnp.asarray(rng.standard_normal(shape), avals[0].dtype)
        pairs = zip(pull(cotangent), slopes, strict=True)
        return all(np.allclose(x, cotangent * slope, rtol=1e-4) for x, slope in pairs)


def _unit_rows(x: Any) -> tuple[Any, Any]:
    square = jnp.sum(jnp.square(x), axis=1, keepdims=True)
    return x * jax.lax.rsqrt(square), jnp.log(square[:, 0]) / 2


# What gradflow's own functions are, less the care that they take of the ends of a float's range.
_PLAIN = {"unit_rows": _unit_rows}


@functools.lru_cache(maxsize=256)
def _plain(one: _ByText) -> Program | None:
    """A function of gradflow's own without its care; None of all others."""
    equation = one.equation
    plain = _PLAIN.get(equation.calls[-1] if equation.calls else "")
    if plain is None or equation.inner is None:
        return None
    avals = [equation.inner.avals[i] for i in equation.inner.arguments["inputs"]]
    with jax.enable_x64(True):
        given = [
            jnp.asarray(np.random.default_rng(0).standard_normal(a.shape), a.dtype) for a in avals
        ]
        pairs = zip(equation.evaluate(*given), plain(*given), strict=True)
        if not all(a.shape == b.shape and np.allclose(a, b, rtol=1e-5) for a, b in pairs):
            return None
        return read(lambda inputs: plain(*inputs), inputs=given)


def custom(equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]) -> Any:  # noqa: ARG001
    """A function with its own derivative, by its definition."""
    plain = _plain(_ByText(equation))
    if plain is not None:
        return _inner(dataclasses.replace(equation, inner=plain), values)
    if not _derivative_is_its_own(_ByText(equation)):
        if not _is_elementwise(_ByText(equation)):
            raise NoRule("of which the derivative is not that of its definition")
        return elementwise(equation, values, shapes)
    return _inner(equation, values)


def elementwise(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
    """Functions of each element: linear ones of sums, others as new pieces."""
    name = equation.primitive
    if not any(isinstance(value, Signal) for value in values):
        return _of_weights(equation, values)
    values = [spread(value, shapes[0]) for value in values]
    signals = [value for value in values if isinstance(value, Signal)]
    like = signals[0]
    if any(value.units != like.units or value.shape != like.shape for value in signals):
        raise NoRule("signals whose units are along different axes meet")
    sums = [_aligned(value, like) for value in values]
    if len({f for s in sums for f in s.fields if f.tie is KNOWN}) > 1:
        raise NoRule("several arrays of numbers that differ between units meet random signals")
    literal = [isinstance(v, Known) and v.literal and v.value.size == 1 for v in values]
    made = _linear(name, sums, literal)
    if made is None:
        own = _Function if equation.inner is None else _OfOneShape
        made = piece_of(own(equation) if name != "mul" else multiply, sums, literal)
        square = name == "square" or (name == "integer_pow" and equation.params["y"] == 2)
        if square or (name == "mul" and sums[0] is sums[1]):
            for part in made.parts:
                part.square_of = sums[0]  # type: ignore[union-attr]
    if not made.parts:
        shape = [1 if i in like.units else n for i, n in enumerate(like.shape)]
        return Known(np.broadcast_to(made.constant.reshape(shape), shapes[0]))
    return Signal(like.shape, like.units, made)


def spread(value: Value, shape: tuple[int, ...]) -> Value:
    """A value repeated along axes of length 1, to this shape; scalars stay."""
    if isinstance(value, Unknown) or isinstance(value, Known) and not value.value.ndim:
        return value
    if isinstance(value, Known):
        return Known(np.broadcast_to(value.value, shape), value.literal)
    if value.shape in (shape, ()):
        return value
    if isinstance(value, Weights):
        return dataclasses.replace(value, shape=shape)
    if not isinstance(value, Signal):
        raise NoRule("a value is not known")
    if any(value.shape[i] != shape[i] for i in value.units):
        raise NoRule("one unit meets many")
    index = np.arange(value.sum.sites).reshape(
        [1 if i in value.units else n for i, n in enumerate(value.shape)]
    )
    to = np.broadcast_to(index, [1 if i in value.units else n for i, n in enumerate(shape)])
    return Signal(shape, value.units, value.sum.taken(to.reshape(-1)))


def _linear(name: str, sums: Sequence[Sum], literal: Sequence[bool]) -> Sum | None:
    """The sum that a linear function makes of sums; None if it is not linear."""
    if name in ("convert_element_type", "copy", "copy_p", "reduce_precision"):
        return sums[0]
    if name == "neg":
        return sums[0].scaled(np.array(-1.0), literal=True)
    if name == "select_n" and len(sums) == 3 and not sums[0].parts:
        chosen = sums[0].constant != 0
        no, yes = (s.scaled(by) for s, by in zip(sums[1:], (~chosen, chosen), strict=True))
        # What is not chosen may be infinite.
        made = no.plus(yes)
        return Sum(np.where(chosen, sums[2].constant, sums[1].constant), made.parts)
    if name in ("max", "min"):
        return _larger(name, *sums)
    if name not in ("add", "add_any", "sub", "mul", "div"):
        return None
    one, two = sums
    if name in ("add", "add_any", "sub"):
        sign = -1.0 if name == "sub" else 1.0
        if literal[1]:
            return one.shifted(sign * two.constant, literal=True)
        two = two if sign == 1 else two.scaled(np.array(-1.0), literal=True)
        return two.shifted(one.constant, literal=True) if literal[0] else one.plus(two)
    if name == "mul" and not one.parts:
        one, two, literal = two, one, literal[::-1]
    if two.parts:
        return None
    return one.scaled(two.constant if name == "mul" else 1 / two.constant, literal=literal[1])


def _larger(name: str, one: Sum, two: Sum) -> Sum | None:
    """The larger of two Gaussian signals, (u + v)/2 + |u - v|/2, or the smaller."""
    if one.affine[0] is two.affine[0] or set(one.parts) == set(two.parts):
        return None  # it is a function of one variable
    if not (one.parts and two.parts and one.gaussian and two.gaussian):
        return None
    half, other = np.array(0.5), two.scaled(np.array(-1.0), literal=True)
    apart = piece_of(absolute, [one.plus(other)], [False])
    return one.plus(two).scaled(half).plus(apart.scaled(half if name == "max" else -half))


def _aligned(value: Value, like: Signal) -> Sum:
    """A value as a sum over the sites of a signal, unit by unit."""
    if isinstance(value, Signal):
        return value.sum
    if isinstance(value, Known):
        return like.beside(value.value)
    if not isinstance(value, Weights):
        raise NoRule("a value is not known")
    return as_field(value, like.units)


def _of_weights(equation: Equation, values: Sequence[Value]) -> Value:
    """Elementwise functions of parameters that are described still: multiples of them."""
    name = equation.primitive
    weights = [value for value in values if isinstance(value, Weights)]
    known = [value for value in values if isinstance(value, Known)]
    if len(weights) == 1 and len(weights) + len(known) == len(values):
        one = weights[0]
        if name in ("convert_element_type", "copy", "copy_p", "reduce_precision"):
            return one
        if name == "neg":
            return one.scaled(-1.0)
        uniform = known and np.ptp(known[0].value) == 0
        if uniform and (name == "mul" or (name == "div" and isinstance(values[0], Weights))):
            factor = float(known[0].value.flat[0])
            return one.scaled(factor if name == "mul" else 1 / factor)
    raise NoRule("a function of parameters")


# Sums and products -------------------------------------------------------------------------------


def reduce_sum(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
    """Sums: over units n times an expectation, over sites linear."""
    value, axes = values[0], tuple(map(int, equation.params["axes"]))
    if not isinstance(value, Signal):
        raise NoRule("a sum of parameters")
    over = tuple(i for i in axes if i not in value.units)
    left = [n for i, n in enumerate(value.shape) if i not in value.units and i not in over]
    kept = np.arange(math.prod(left)).reshape(left)
    to = np.broadcast_to(
        np.expand_dims(kept, [value.site_axes.index(i) for i in over]), value.site_shape
    ).reshape(-1)
    out = value.sum
    if over:
        out = out.mapped(selection(to, kept.size).T.tocsr())
    if len(over) == len(axes):
        units = tuple(i - sum(j < i for j in over) for i in value.units)
        return Signal(shapes[0], units, out)
    times = math.prod(value.shape[i] for i in axes if i in value.units)
    mean = times * forcing.mean(out)
    remaining = [i for i in range(len(value.shape)) if i not in axes]
    shape = [1 if i in value.units else value.shape[i] for i in remaining]
    return Known(np.broadcast_to(mean.reshape(shape), shapes[0]))


def dot_general(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
    """Products with weights: new fields."""
    (sums, batches) = equation.params["dimension_numbers"]
    if any(len(batch) for batch in batches):
        raise NoRule("a product with weights of its own for each of a batch")
    values = weights_of_zero(values)
    place = [isinstance(value, Weights) for value in values]
    if sum(place) != 1:
        raise NoRule("a product of two signals" if not any(place) else "a product of parameters")
    weights, other = values[place.index(True)], values[place.index(False)]
    assert isinstance(weights, Weights)
    w_sum, h_sum = sums[place.index(True)], sums[place.index(False)]
    if any(n > 1 and i not in weights.varying for i, n in enumerate(weights.shape)):
        raise NoRule("weights are repeated")
    if weights.mean:
        raise NoRule("weights have a mean that is not 0")
    units = math.prod(n for i, n in enumerate(weights.shape) if i not in w_sum)
    if isinstance(other, Unknown):
        raise NoRule("what is multiplied is not known")
    shape = other.value.shape if isinstance(other, Known) else other.shape
    free = len(shape) - len(h_sum)
    rank = len(shapes[0])
    axes = tuple(range(free, rank)) if place[1] else tuple(range(rank - free))
    size = math.prod(weights.shape)
    if isinstance(other, Known):
        rows = np.moveaxis(np.asarray(other.value, float), h_sum, range(-len(h_sum), 0))
        rows = rows.reshape(math.prod(rows.shape[: rows.ndim - len(h_sum)]), -1)
        check_sites(len(rows))
        product = Product(
            None,
            (),
            rows.shape[1],
            units,
            weights.variance,
            weights.error,
            rows @ rows.T,
            size,
            rows,
        )
    else:
        assert isinstance(other, Signal)
        summed = [i for i in other.units if i in h_sum]
        if not summed and other.width > 1:
            return windows.over_sites(
                other, h_sum, weights, shapes[0], axes if place[1] else axes[: rank - free]
            )
        other = moving.units_as_sites(other, summed)
        maps = patches(other, [i for i in h_sum if i not in other.units])
        product = fresh(other, maps, weights, units, size)
    return Signal(shapes[0], axes, made_by(product, weights))


def cond(equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]) -> Any:  # noqa: ARG001
    """A branch that is known."""
    chosen, *operands = values
    if not isinstance(chosen, Known):
        raise NoRule("of which the branch is random")
    branches = equation.params["branches"]
    branch = branches[int(np.clip(chosen.value, 0, len(branches) - 1))]
    return _inner(dataclasses.replace(equation, inner=definition(branch)), operands)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys((*SHAPES, "dynamic_slice", "pad", "slice"), moving.moved),
    "cond": cond,
    "custom_jvp_call": custom,
    "custom_vjp_call": custom,
    "concatenate": moving.concatenate,
    "conv_general_dilated": windows.convolution,
    "cumsum": windows.cumulative_sum,
    "dot_general": dot_general,
    "gather": moving.gather,
    "reduce_max": windows.largest,
    "reduce_min": windows.largest,
    "reduce_sum": reduce_sum,
    "reduce_window_max": windows.window_largest,
    "reduce_window_min": windows.window_largest,
    "reduce_window_sum": windows.window_sum,
    "split": moving.split,
    "stack": moving.stack,
    "unstack": moving.unstack,
}
