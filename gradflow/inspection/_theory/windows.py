"""Rules for convolutions, pooling and all else that adds or compares neighbouring sites."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradflow.inspection._reading.program import Equation
from gradflow.inspection._theory import forcing
from gradflow.inspection._theory.building import check_sites, made_by, piece_of, weights_of_zero
from gradflow.inspection._theory.gradients import MOST_ALIKE, Matrix, coupled, dense
from gradflow.inspection._theory.moving import units_as_sites
from gradflow.inspection._theory.sums import NoRule, Product, Sum, selection
from gradflow.inspection._theory.values import Known, Signal, Value, Weights

__all__ = ["OverSites", "convolution", "cumulative_sum", "largest", "over_sites"]
__all__ += ["window_largest", "window_sum"]

# A function of more sites than these has no average here.
_MOST_COMPARED = 64


def _places(
    length: int,
    window: int,
    stride: int,
    padding: tuple[int, int],
    base_dilation: int,
    window_dilation: int,
) -> np.ndarray:
    """For each place in a window, and each window, the element that is there, or -1."""
    dilated = (length - 1) * base_dilation + 1
    span = (window - 1) * window_dilation + 1
    windows = (dilated + sum(padding) - span) // stride + 1
    at = np.arange(window)[:, None] * window_dilation + np.arange(windows) * stride - padding[0]
    there = (at >= 0) & (at < dilated) & (at % base_dilation == 0)
    return np.where(there, at // base_dilation, -1)


def _windows(index: np.ndarray, axes: Sequence[int], places: Sequence[np.ndarray]) -> Iterator[Any]:
    """For each place in a window of several axes the numbers that are there, -1 for none."""
    for at in itertools.product(*(range(len(p)) for p in places)):
        taken = index
        for axis, place, i in zip(axes, places, at, strict=True):
            row = place[i]
            taken = np.take(taken, np.maximum(row, 0), axis=axis)
            shape = [1] * taken.ndim
            shape[axis] = len(row)
            taken = np.where((row < 0).reshape(shape), -1, taken)
        yield taken


def convolution(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
    """A product with weights of patches: K'[p, p'] = variance · units · Σ_o K[p + o, p' + o].

    Each group of a grouped convolution has its own units; of a depthwise one each output sums few
    terms, and is not Gaussian even at infinite width.
    """
    params = equation.params
    numbers = params["dimension_numbers"]
    signal, weights = weights_of_zero(values)
    if not isinstance(weights, Weights):
        raise NoRule("the kernel is no parameter")
    if params["batch_group_count"] != 1:
        raise NoRule("groups of a batch")
    if weights.mean:
        raise NoRule("weights have a mean that is not 0")
    if any(n > 1 and i not in weights.varying for i, n in enumerate(weights.shape)):
        raise NoRule("weights are repeated")
    batch, feature, *spatial = numbers.lhs_spec
    places = [
        _places(length, weights.shape[axis], *rest)
        for length, axis, *rest in zip(
            [_shape(signal)[i] for i in spatial], numbers.rhs_spec[2:], params["window_strides"],
            params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True,
        )
    ]  # fmt: skip
    groups = params["feature_group_count"]
    out_batch, out_feature, *out_spatial = numbers.out_spec
    # Sites in the order of the output's axes.
    order = [i for i in range(len(shapes[0])) if i != out_feature]
    units, fan_in = shapes[0][out_feature], _shape(signal)[feature] // groups
    size = math.prod(weights.shape)
    axes = [0, *range(1, 1 + len(spatial))]
    lengths = [_shape(signal)[i] for i in (batch, *spatial)]
    from_axes = [out_batch, *out_spatial]

    def arranged(taken: np.ndarray) -> np.ndarray:
        return np.transpose(taken, [from_axes.index(i) for i in order]).reshape(-1)

    index = np.arange(math.prod(lengths)).reshape(lengths)
    taken = [arranged(t) for t in _windows(index, axes[1:], places)]
    check_sites(len(taken[0]))
    if isinstance(signal, Known):
        if groups != 1:
            raise NoRule("groups of known inputs, each with numbers of its own")
        rows = np.moveaxis(np.asarray(signal.value, float), [batch, *spatial], axes)
        rows = np.append(rows.reshape(-1, rows.shape[-1]), np.zeros((1, rows.shape[-1])), axis=0)
        gram = sum(rows[t] @ rows[t].T for t in taken)
        product = Product(
            None, (), fan_in, units, weights.variance, weights.error, np.asarray(gram), size
        )
        return Signal(shapes[0], (out_feature,), made_by(product, weights))
    if not isinstance(signal, Signal) or feature not in signal.units:
        raise NoRule("channels that are no units")
    signal = units_as_sites(signal, (feature,))
    check_sites(signal.sum.sites)
    sites = np.arange(signal.sum.sites).reshape(signal.site_shape)
    sites = np.moveaxis(sites, [signal.site_axes.index(i) for i in (batch, *spatial)], axes)
    flat = np.append(sites.reshape(-1), -1)
    second = np.pad(forcing.second_moments(signal.sum), (0, 1))
    taken = [flat[t] for t in taken]
    gram = fan_in * sum(second[np.ix_(t, t)] for t in taken)
    product = Product(
        signal.sum, tuple(selection(t, signal.sum.sites) for t in taken), fan_in, units // groups,
        weights.variance, weights.error, np.asarray(gram), size // groups,
    )  # fmt: skip
    made = made_by(product, weights)
    if fan_in == 1:
        for part in made.parts:
            part.gaussian = False  # type: ignore[union-attr]
    return Signal(shapes[0], (out_feature,), made)


class OverSites(Product):
    """A product over an axis of sites: ``maps`` is one pair, from and to (others, axis)."""

    def down(self, gradient: Matrix) -> np.ndarray:
        below, above = self.maps
        others, axis = below.shape[0] // self.fan_in, self.fan_in
        moved = np.asarray(above @ dense(gradient) @ above.T)
        at = moved.reshape(others, len(moved) // others, others, -1)
        if any(coupled(at[i, :, i]) for i in range(others)):
            raise NoRule("a product over sites, at which gradients are correlated")
        same = np.einsum("imjm->ij", at)
        whole = np.kron(same, np.eye(axis))
        return np.asarray(self.variance * below.T @ whole @ below)


def over_sites(
    signal: Signal,
    summed: Sequence[int],
    weights: Weights,
    shape: tuple[int, ...],
    new: Sequence[int],
) -> Signal:
    """A product over axes of sites, the same for all units, as that of a mixer's tokens.

    Where many sites are summed, each output has K'[(i, m), (j, n)] = δ_mn variance Σ_p K[ip, jp].
    """
    index = np.arange(signal.sum.sites).reshape(signal.site_shape)
    over = [signal.site_axes.index(i) for i in summed]
    fan_in = math.prod(signal.shape[i] for i in summed)
    rows = np.moveaxis(index, over, range(index.ndim - len(over), index.ndim)).reshape(-1)
    below = selection(rows, signal.sum.sites)
    others = signal.sum.sites // fan_in
    many = math.prod(shape[i] for i in new)
    # The output's axes: those that are left in order, and the new ones.
    left = [i for i in range(len(signal.shape)) if i not in summed]
    place = [i for i in range(len(shape)) if i not in new]
    units = tuple(p for p, i in zip(place, left, strict=True) if i in signal.units)
    kept = [p for p in place if p not in units]
    sites = np.arange(others * many).reshape([shape[i] for i in (*kept, *new)])
    order = sorted(range(len(kept) + len(new)), key=[*kept, *new].__getitem__)
    to = np.transpose(sites, order).reshape(-1)
    above = selection(to, others * many).T.tocsr()
    check_sites(max(len(to), signal.sum.sites))
    second = below @ forcing.second_moments(signal.sum) @ below.T
    pairs = np.asarray(second).reshape(others, fan_in, others, fan_in)
    same = np.einsum("ipjp->ij", pairs)
    alike = np.einsum("ipiq,ipiq->i", pairs, pairs) / np.maximum(np.diagonal(same) ** 2, 1e-300)
    if alike.max(initial=0.0) > MOST_ALIKE:
        raise NoRule(
            f"a product over {fan_in} sites that are too much alike, or too few, for a limit"
        )
    gram = above.T @ np.kron(same, np.eye(many)) @ above
    product = OverSites(
        signal.sum, (below, above), fan_in, signal.width, weights.variance, weights.error,
        np.asarray(gram), math.prod(weights.shape),
    )  # fmt: skip
    return Signal(shape, units, made_by(product, weights))


def _shape(value: Value) -> tuple[int, ...]:
    if isinstance(value, Known):
        return value.value.shape
    if isinstance(value, Signal):
        return value.shape
    raise NoRule("what is convolved is not known")


def _of_window(equation: Equation, signal: Signal) -> tuple[Signal, list[np.ndarray]]:
    """The signal, and for each place in a window the sites that are there, -1 for none."""
    params = equation.params
    over = [i for i, n in enumerate(params["window_dimensions"]) if n > 1]
    moving = [
        i for i in range(len(signal.shape))
        if params["window_dimensions"][i] > 1 or params["window_strides"][i] > 1
        or tuple(params["padding"][i]) != (0, 0) or params["base_dilation"][i] > 1
    ]  # fmt: skip
    signal = units_as_sites(signal, [i for i in signal.units if i not in over])
    if any(i in signal.units for i in moving):
        raise NoRule("a window over units")
    places = [
        _places(
            signal.shape[i], params["window_dimensions"][i], params["window_strides"][i],
            tuple(params["padding"][i]), params["base_dilation"][i], params["window_dilation"][i],
        )
        for i in moving
    ]  # fmt: skip
    index = np.arange(signal.sum.sites).reshape(signal.site_shape)
    axes = [signal.site_axes.index(i) for i in moving]
    return signal, [t.reshape(-1) for t in _windows(index, axes, places)]


def window_sum(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
    """Sums over windows of sites."""
    if not isinstance(values[0], Signal):
        raise NoRule("a window of parameters")
    signal, taken = _of_window(equation, values[0])
    map_ = sum(selection(t, signal.sum.sites) for t in taken)
    return Signal(shapes[0], signal.units, signal.sum.mapped(map_))


def window_largest(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
    """The largest, or the smallest, of each window of sites: a function of several."""
    if not isinstance(values[0], Signal):
        raise NoRule("a window of parameters")
    signal, taken = _of_window(equation, values[0])
    stacked = np.stack(taken)
    # What is outside never counts: in its place another of the same window.
    inside = stacked.max(axis=0)
    if (inside < 0).any():
        raise NoRule("a window of nothing")
    sites = np.where(stacked < 0, inside, stacked)
    compare = _smaller if equation.primitive.endswith("min") else _larger
    return Signal(shapes[0], signal.units, _compared(signal.sum, sites, compare))


def largest(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
    """The largest, or the smallest, over axes of sites."""
    signal, axes = values[0], equation.params["axes"]
    if not isinstance(signal, Signal) or any(i in signal.units for i in axes):
        raise NoRule("over units")
    index = np.arange(signal.sum.sites).reshape(signal.site_shape)
    over = [signal.site_axes.index(i) for i in axes]
    sites = np.moveaxis(index, over, range(len(over)))
    sites = sites.reshape(math.prod(signal.shape[i] for i in axes), -1)
    compare = _smaller if equation.primitive.endswith("min") else _larger
    units = tuple(i - sum(j < i for j in axes) for i in signal.units)
    return Signal(shapes[0], units, _compared(signal.sum, sites, compare))


def _larger(*x: Any) -> Any:
    return functools.reduce(_maximum, x)


def _smaller(*x: Any) -> Any:
    return -functools.reduce(_maximum, [-each for each in x])


def _maximum(a: Any, b: Any) -> Any:
    return jnp.maximum(a, b)


def _compared(sum_: Sum, sites: np.ndarray, compare: Any) -> Sum:
    """A function of a sum at several sites, (several, sites)."""
    if len(sites) > _MOST_COMPARED:
        raise NoRule(f"the largest of {len(sites)} sites")
    return piece_of(compare, [sum_.taken(row) for row in sites], [False] * len(sites))


def cumulative_sum(
    equation: Equation, values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
    """Sums of all sites up to each along an axis."""
    signal, axis = values[0], equation.params["axis"]
    if not isinstance(signal, Signal) or axis in signal.units:
        raise NoRule("over units")
    index = np.arange(signal.sum.sites).reshape(signal.site_shape)
    place = signal.site_axes.index(axis)
    length = signal.shape[axis]
    total: Any = None
    for by in range(length):
        taken = np.roll(index, -by if equation.params["reverse"] else by, axis=place)
        where = [slice(None)] * index.ndim
        where[place] = slice(length - by, None) if equation.params["reverse"] else slice(0, by)
        taken[tuple(where)] = -1
        map_ = selection(taken.reshape(-1), signal.sum.sites)
        total = map_ if total is None else total + map_
    return Signal(shapes[0], signal.units, signal.sum.mapped(total))
