"""Rules for averages over several jointly Gaussian variables, many averages at once.

One variable by panels that end at the function's kinks, two by the same, nested; up to four by a
tensor of Gauss-Hermite rules, whose error is the difference of two orders; more, and what a rule
does not resolve, by randomised quasi-Monte Carlo: Sobol points with Owen's scrambling, antithetic,
the error that of the replicates' mean.

References: Owen 1997, Ann. Statist. 25, 1541 (scrambled nets); Caflisch, Morokoff & Owen 1997,
J. Comput. Finance 1, 27 (the variables in order of their eigenvalues).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow._closed_forms import gram_determinant
from gradflow.errors import InputError
from gradflow.gaussian._points import normal_points
from gradflow.gaussian._quadrature import PAIR_STEPS, Z_MAX, panel_ends, panels, smallest_variance
from gradflow.inspection._theory.pieces import Function, switches

__all__ = ["Integrand", "Product", "Value", "average", "sampled_sites"]

_ORDERS = {2: (32, 24), 3: (32, 24), 4: (18, 14)}  # of a tensor rule, and of the one beside it
_LINE_NODES, _PAIR_NODES = (20, 14), (14, 10)  # in a panel
# A tensor rule's relative error up to which no dearer rule is tried, by the number of variables.
_ENOUGH = {2: 1e-10, 3: 1e-6, 4: 1e-6}
_REPLICATES, _LOG2_POINTS = 8, 13  # of quasi-Monte Carlo; each point is used with its negative
_WORK = 1 << 34  # multiplications for a replicate, all sites at once
_MEMORY = 1 << 25  # numbers at once
_FAR = 1e6  # out of sight, in units of a standard deviation
_GRID, _BISECTIONS = 401, 60  # where kinks are looked for

# A product of functions of one set of variables: each with the places of its variables, and of its
# known numbers. An integrand is several such products, averaged in one pass.
Product = tuple[tuple[Function, tuple[int, ...], tuple[int, ...]], ...]
Integrand = tuple[Product, ...]


Value = tuple[np.ndarray, np.ndarray]  # averages, and bounds on their errors


def average(
    integrand: Integrand, covariance: np.ndarray, mean: np.ndarray, known: np.ndarray
) -> Value:
    """Averages of an integrand's products, (rows, products), by the rule that serves."""
    variables = covariance.shape[-1]
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    if (variance < 0).any() or not np.isfinite(covariance).all():
        raise InputError(
            f"covariance has a variance of {variance.min():g}; variances are finite and >= 0"
        )
    with jax.enable_x64(True):
        if variables == 1:
            kinks = _kinks(integrand, 0, mean, variance, known)
            rows = mean[:, 0], variance[:, 0], known, kinks
            numbers = 100 * sum(_LINE_NODES) * (1 + len(integrand))
            run = functools.partial(_line, integrand)
            return _with_error(_in_chunks(run, numbers, *rows))[:2]
        if variables > max(_ORDERS):
            return _sampled(integrand, covariance, mean, known)
        value, error, size = _tensor(integrand, covariance, mean, known)
        bad = (error > _ENOUGH[variables] * size).any(axis=1)
        if bad.any():
            rest = covariance[bad], mean[bad], known[bad]
            other = _nested(integrand, *rest) if variables == 2 else _sampled(integrand, *rest)
            better = other[1] < error[bad]
            value[bad] = np.where(better, other[0], value[bad])
            error[bad] = np.where(better, other[1], error[bad])
        return value, error


def _values(integrand: Integrand, z: Array, known: Array) -> Array:
    """The products, (products, points), at points z of shape (variables, points)."""

    def one(z: Array) -> Array:
        return jnp.stack(
            [
                functools.reduce(
                    jnp.multiply,
                    (
                        jnp.asarray(f([z[i] for i in at], [known[i] for i in numbers]), float)
                        for f, at, numbers in parts
                    ),
                )
                for parts in integrand
            ]
        )

    return jax.vmap(one, -1, -1)(z)


def _in_chunks(function: Callable[..., Any], numbers: int, *arrays: np.ndarray) -> list[np.ndarray]:
    """A compiled function over rows, so many numbers each, as many rows at once as memory allows.

    Rows are padded to a power of 2, so that few shapes are compiled.
    """
    rows = len(arrays[0])
    most = 1 << max(0, int(math.log2(max(_MEMORY // max(numbers, 1), 1))))
    size = min(most, 1 << max(rows - 1, 0).bit_length())
    found: list[Any] = []
    for start in range(0, rows, size):
        part = [x[start : start + size] for x in arrays]
        padded = [np.concatenate([x, x[-1:].repeat(size - len(x), axis=0)]) for x in part]
        out = function(*padded)
        found.append([np.asarray(x)[: len(part[0])] for x in out])
    return [np.concatenate(x) for x in zip(*found, strict=True)]


def _factor(covariance: np.ndarray) -> np.ndarray:
    """L with L Lᵀ = covariance, its columns in order of size; singular ones have columns of 0."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.where(values > 1e-15 * values[..., -1:], values, 0)
    return (vectors * np.sqrt(np.maximum(values, 0))[..., None, :])[..., ::-1]


def _tensor(
    integrand: Integrand, covariance: np.ndarray, mean: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    variables = covariance.shape[-1]
    orders = _ORDERS[variables]
    numbers = orders[0] ** variables * (variables + len(integrand))
    run = functools.partial(_hermite, integrand, orders)
    return _with_error(_in_chunks(run, numbers, _factor(covariance), mean, known))


def _with_error(found: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, error and mean absolute value, from both orders' averages and the last."""
    value, other, size = found
    return value, np.abs(value - other) + 8 * np.finfo(np.float64).eps * size, size


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hermite(
    integrand: Integrand, orders: tuple[int, int], factor: Array, mean: Array, known: Array
) -> tuple[Array, Array, Array]:
    """Averages in both orders, and mean absolute values, (rows, products)."""
    variables = factor.shape[-1]
    rules = [_hermite_rule(order, variables) for order in orders]

    def one(factor: Array, mean: Array, known: Array) -> tuple[Array, Array, Array]:
        return _both(integrand, [(mean[:, None] + factor @ z, w) for z, w in rules], known)

    return jax.vmap(one)(factor, mean, known)


def _hermite_rule(order: int, variables: int) -> tuple[Array, Array]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    weights = weights / math.sqrt(2 * math.pi)
    grid = np.meshgrid(*[nodes] * variables, indexing="ij")
    weight = functools.reduce(np.multiply.outer, [weights] * variables)
    return jnp.asarray(np.stack(grid).reshape(variables, -1)), jnp.asarray(weight.reshape(-1))


def _both(
    integrand: Integrand, rules: list[tuple[Array, Array]], known: Array
) -> tuple[Array, Array, Array]:
    """Averages by two rules of points and weights, and the first one's of absolute values."""
    points = jnp.concatenate([x for x, _ in rules], axis=-1)
    values = _values(integrand, points, known)
    (_, first), (_, second) = rules
    fine, coarse = values[:, : first.size], values[:, first.size :]
    return fine @ first, coarse @ second, jnp.abs(fine) @ first


def _kinks(
    integrand: Integrand, variable: int, mean: np.ndarray, variance: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """Where an integrand is not smooth in one of its variables, (rows, points); NaN for none."""
    deviation = np.sqrt(variance[:, variable])
    # Features are of order 1 in x, or follow the density.
    steps = np.linspace(-Z_MAX, Z_MAX, _GRID)
    scales = np.concatenate([[0.0], *(s * 2.0 ** np.arange(-3, 11, 0.5) for s in (-1, 1))])
    grid = mean[:, variable, None] + deviation[:, None] * steps
    grid = np.sort(np.concatenate([grid, np.broadcast_to(scales, (len(grid), scales.size))], 1))
    found: list[np.ndarray] = []
    for f, numbers in _switches_of(integrand, variable):
        values = np.asarray(_on_lines(f, numbers, grid, known))
        signs = np.sign(values)
        row, place = np.nonzero(signs[:, :-1] * signs[:, 1:] < 0)
        low, high = grid[row, place], grid[row, place + 1]
        roots = _root(f, numbers, low, high, known[row]) if row.size else low
        zero = signs == 0
        ends = zero & ~np.pad(zero[:, :-2] & zero[:, 2:], ((0, 0), (1, 1)))
        at, where = np.nonzero(ends)
        row, roots = np.concatenate([row, at]), np.concatenate([roots, grid[at, where]])
        order = np.argsort(row, kind="stable")
        row, roots = row[order], roots[order]
        count = np.bincount(row, minlength=len(grid))
        own = np.full((len(grid), count.max(initial=0)), np.nan)
        own[row, np.arange(row.size) - (np.cumsum(count) - count)[row]] = roots
        found.append(own)
    return np.concatenate([*found, np.zeros((len(grid), 0))], axis=1)


def _switches_of(integrand: Integrand, variable: int) -> list[tuple[Function, tuple[int, ...]]]:
    """Functions of one variable alone whose zeros are kinks, with the places of known numbers."""
    found: dict[Any, None] = {}
    for parts in integrand:
        for f, at, numbers in parts:
            own = dict(zip(f.variables, at, strict=True))
            for variables, switch in switches(f):
                if [own[v] for v in variables] == [variable]:
                    found[switch, numbers] = None
    return list(found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _on_lines(f: Function, numbers: tuple[int, ...], x: Array, known: Array) -> Array:
    """Its values at (rows, points), with known numbers (rows, all)."""

    def one(x: Array, known: Array) -> Array:
        return jnp.asarray(f([x], [known[i] for i in numbers]), float)

    return jax.vmap(jax.vmap(one, (0, None)))(x, known)


def _root(
    f: Function, numbers: tuple[int, ...], low: np.ndarray, high: np.ndarray, known: np.ndarray
) -> np.ndarray:
    padding = (1 << (len(low) - 1).bit_length()) - len(low)
    ends = [np.pad(x, (0, padding), mode="edge")[:, None] for x in (low, high)]
    known = np.pad(known, ((0, padding), (0, 0)), mode="edge")
    return np.asarray(_bisected(f, numbers, *ends, known))[: len(low), 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bisected(
    f: Function, numbers: tuple[int, ...], low: Array, high: Array, known: Array
) -> Array:
    rising = _on_lines(f, numbers, high, known) > 0

    def halved(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        above = (_on_lines(f, numbers, middle, known) > 0) == rising
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, _BISECTIONS, halved, (low, high))
    return high


def _rule(edges: Array, order: int, steps: np.ndarray) -> tuple[Array, Array]:
    """Nodes and weights of a standard normal variable, panels ending at edges and steps."""
    inside = jnp.clip(jnp.where(jnp.isnan(edges), 0.0, edges), steps[0], steps[-1])
    z, width = panels(jnp.sort(jnp.concatenate([jnp.asarray(steps), inside])), order)
    return z, width * jnp.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


@functools.partial(jax.jit, static_argnums=0)
def _line(
    integrand: Integrand, mean: Array, variance: Array, known: Array, kinks: Array
) -> tuple[Array, Array, Array]:
    """One variable: averages in both orders, and mean absolute values, (rows, products)."""
    scales, steps = jnp.asarray(panel_ends(())), np.arange(-Z_MAX, Z_MAX + 1.0)

    def one(mean: Array, variance: Array, known: Array, kinks: Array) -> tuple[Array, ...]:
        deviation = jnp.sqrt(jnp.maximum(variance, smallest_variance(variance)))
        edges = (jnp.concatenate([scales, kinks]) - mean) / deviation
        rules = [_rule(edges, order, steps) for order in _LINE_NODES]
        return _both(integrand, [((mean + deviation * z)[None], w) for z, w in rules], known)

    return jax.vmap(one)(mean, variance, known, kinks)  # type: ignore[return-value]


def _nested(
    integrand: Integrand, covariance: np.ndarray, mean: np.ndarray, known: np.ndarray
) -> Value:
    """Two variables: the inner average over the one of smaller variance, given the other."""
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    kinks = [_kinks(integrand, i, mean, variance, known) for i in range(2)]
    value, error = np.zeros((2, len(covariance), len(integrand)))
    for outer in range(2):
        mine = (variance[:, 0] >= variance[:, 1]) == (outer == 0)
        if mine.any():
            both = [outer, 1 - outer]
            run = functools.partial(_one_of_two, tuple(_swapped(integrand, outer)))
            numbers = (50 * sum(_PAIR_NODES)) ** 2 * (1 + len(integrand))
            value[mine], error[mine], _ = _with_error(_in_chunks(
                run, numbers, mean[mine][:, both], covariance[mine][:, both][:, :, both],
                known[mine], kinks[outer][mine], kinks[1 - outer][mine],
            ))  # fmt: skip
    return value, error


def _swapped(integrand: Integrand, outer: int) -> Any:
    """The integrand of two variables whose first is the outer one."""
    for parts in integrand:
        yield tuple((f, tuple(i ^ outer for i in at), numbers) for f, at, numbers in parts)


@functools.partial(jax.jit, static_argnums=0)
def _one_of_two(
    integrand: Integrand,
    mean: Array,
    covariance: Array,
    known: Array,
    outer_kinks: Array,
    inner_kinks: Array,
) -> tuple[Array, Array, Array]:
    """Two variables: averages in both orders, and mean absolute values, (rows, products)."""

    def one(*row: Array) -> tuple[Array, Array, Array]:
        (fine, size), (coarse, _) = (_over_pair(integrand, order, *row) for order in _PAIR_NODES)
        return fine, coarse, size

    return jax.vmap(one)(mean, covariance, known, outer_kinks, inner_kinks)


def _over_pair(
    integrand: Integrand,
    order: int,
    mean: Array,
    covariance: Array,
    known: Array,
    outer_kinks: Array,
    inner_kinks: Array,
) -> tuple[Array, Array]:
    """As `gaussian`'s averages over a pair: panels end around where the inner mean meets a kink."""
    scales = jnp.asarray(panel_ends(()))
    larger, smaller, k = covariance[0, 0], covariance[1, 1], covariance[0, 1]
    smallest = smallest_variance(k)
    larger = jnp.maximum(larger, smallest)
    root, limit = jnp.sqrt(larger), jnp.sqrt(smaller / larger)
    slope = jnp.clip(k / larger, -limit, limit)
    deviation = jnp.sqrt(gram_determinant(larger, smaller, k) / larger)
    own = jnp.concatenate([scales, inner_kinks])

    def given(x: Array) -> Array:
        centre = mean[1] + slope * x
        z, weight = _rule((own - centre) / jnp.maximum(deviation, smallest), order, PAIR_STEPS)
        y = centre + deviation * z
        both = jnp.stack([jnp.broadcast_to(mean[0] + x, y.shape), y])
        values = _values(integrand, both, known)
        return jnp.stack([values @ weight, jnp.abs(values) @ weight])

    steep = jnp.where(jnp.abs(slope * root) < smallest, smallest, slope * root)
    meets = jnp.append(inner_kinks, 0.0)
    crossing = jnp.clip((meets - mean[1]) / steep, -_FAR, _FAR)
    spread = jnp.minimum(deviation / jnp.abs(steep), _FAR)
    around = (crossing[:, None] + spread * PAIR_STEPS[None, :]).reshape(-1)
    edges = (jnp.concatenate([scales, outer_kinks]) - mean[0]) / root
    z, weight = _rule(jnp.concatenate([edges, around]), order, PAIR_STEPS)
    value, size = jnp.tensordot(weight, jax.vmap(given)(root * z), 1)
    return value, size


def _of_replicates(values: list[np.ndarray]) -> Value:
    each = np.stack(values)
    return each.mean(axis=0), each.std(axis=0, ddof=1) / math.sqrt(len(each))


def _sampled(
    integrand: Integrand, covariance: np.ndarray, mean: np.ndarray, known: np.ndarray
) -> Value:
    variables = covariance.shape[-1]
    factor = _factor(covariance)
    numbers = (2 << _LOG2_POINTS) * (variables + len(integrand))
    values = []
    for replicate in range(_REPLICATES):
        z = normal_points(variables, replicate, 1 << _LOG2_POINTS).T
        run = functools.partial(_points, integrand, z)
        values.append(_in_chunks(run, numbers, factor, mean, known)[0])
    return _of_replicates(values)


@functools.partial(jax.jit, static_argnums=0)
def _points(
    integrand: Integrand, z: Array, factor: Array, mean: Array, known: Array
) -> tuple[Array]:
    def one(factor: Array, mean: Array, known: Array) -> Array:
        return jnp.mean(_values(integrand, mean[:, None] + factor @ z, known), axis=-1)

    return (jax.vmap(one)(factor, mean, known),)


def sampled_sites(
    left: Product, right: Product, covariance: np.ndarray, means: np.ndarray, known: np.ndarray
) -> Value:
    """E[left_a right_b] over all pairs of sites.

    Covariance is (m, m, sites, sites), of m fields, means (m, sites), known (sites, n).
    """
    m, sites = means.shape
    joint = np.moveaxis(covariance, 1, 2).reshape(m * sites, m * sites)
    factor = _factor(joint)
    # What is singular needs no points of its own.
    rank = max(1, int(np.sum(factor.any(axis=0))))
    factor = factor[:, :rank].reshape(m, sites, rank)
    # Fewer points where there are so many sites that each costs much.
    work = _WORK // (m * sites * rank)
    points = 1 << int(np.clip(work.bit_length(), 8, _LOG2_POINTS))
    values = []
    with jax.enable_x64(True):
        for replicate in range(_REPLICATES):
            z = normal_points(rank, replicate, points)
            values.append(np.asarray(_site_points(left, right, z, factor, means, known)))
    return _of_replicates(values)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _site_points(
    left: Product, right: Product, z: Array, factor: Array, means: Array, known: Array
) -> Array:
    """The averages over points z, (points, rank); factor is (m, sites, rank)."""
    fields = means[..., None] + jnp.einsum("mar,pr->map", factor, z)

    def side(parts: Product) -> Array:
        return jax.vmap(lambda z, k: _values((parts,), z, k)[0], (1, 0))(fields, known)

    return side(left) @ side(right).T / z.shape[0]
