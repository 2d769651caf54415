"""Averages over units by drawing some: of what no rule knows, as pooling behind BatchNorm.

A unit is a draw of the Gaussian fields that a sum is made of, at all sites at once; units are
independent at infinite width, so that their means are the averages, with a standard error. Draws
are matched: with each its negative, and their second moments are the fields' own to the last digit.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from gradflow.inspection._theory.nodes import Node
from gradflow.inspection._theory.sums import Field, Map, NoRule, Piece, Sum, identity

__all__ = ["Covariance", "fields_drawn", "moments", "of_draws", "pulled"]

# Multiplications that second moments of draws may take, and the fewest and most draws.
_WORK, _FEWEST, _MOST = 1 << 35, 1 << 9, 1 << 14
# The largest relative standard error of a mean square that is an answer, and the largest share of
# it that may come of one unit: where tails are so long, more draws would be larger.
_ERROR, _SHARE = 0.05, 0.02
# Elements that a function is evaluated for at once, few and many: it compiles for these sizes.
_BLOCKS = 1 << 12, 1 << 18
_JITTER = 1e-12
_OF_TOPS = 1 << 20  # the seed of gradients, which is none of a group of fields
# Maps of more entries than this share are multiplied as dense ones.
_DENSE = 0.05

Covariance = Callable[[Field, Field], np.ndarray | None]


def moments(sum_: Sum, covariance: Covariance) -> tuple[np.ndarray, np.ndarray]:
    """E of a unit at each site, and E of its products at all pairs of sites.

    Parameters
    ----------
    sum_
        What a unit is.
    covariance
        Of two fields, None where they are independent.

    Raises
    ------
    NoRule
        If a field is not Gaussian, there are too many sites, or a few units have most of the sum.
    """
    values = of_draws(sum_, fields_drawn(sum_, covariance))
    _check(np.square(values).sum(axis=0))
    return values.mean(axis=1), values @ values.T / values.shape[1]


def pulled(sum_: Sum, gradient: np.ndarray, covariance: Covariance) -> dict[Field, np.ndarray]:
    """Second moments of the gradient by each field, from those by the sum, (sites, sites).

    Raises
    ------
    NoRule
        As `moments`.
    """
    draws = fields_drawn(sum_, covariance)
    known: dict[Any, np.ndarray] = {}
    count = of_draws(sum_, draws, known).shape[1]
    at_top = _root(gradient) @ _matched(len(gradient), count, seed=_OF_TOPS)
    found: dict[Any, np.ndarray] = {}
    pending: list[tuple[int, Any]] = []

    def add(one: Sum, cotangent: np.ndarray) -> None:
        for part, map_ in one.parts.items():
            back = map_ if map_ is identity(map_.shape[1]) else sparse.csr_array(map_.T)
            below = _through(back, cotangent)
            if part in found:
                found[part] = found[part] + below
            else:
                found[part] = below
                heapq.heappush(pending, (-part.serial, part))

    add(sum_, at_top)
    while pending:
        _, part = heapq.heappop(pending)
        if isinstance(part, Field):
            continue
        variables = [known[v] for v in part.variables]
        for v, below in zip(part.variables, _pull(part, variables, found.pop(part)), strict=True):
            add(v, below)
    own = {field: found[field] for field in draws if field in found and field.leads_down}
    for cotangent in own.values():
        _check(np.square(cotangent).sum(axis=0))
    return {field: x @ x.T / count for field, x in own.items()}


def of_draws(
    sum_: Sum, draws: Mapping[Field, np.ndarray], known: dict[Any, np.ndarray] | None = None
) -> np.ndarray:
    """The values of a sum, (sites, draws), from those of its fields; ``known`` keeps all sums'."""
    known = {} if known is None else known
    if sum_ in known:
        return known[sum_]
    count = next(iter(draws.values())).shape[1]
    out = np.repeat(sum_.constant.astype(float)[:, None], count, axis=1)
    for part, map_ in sum_.parts.items():
        if isinstance(part, Field):
            value = draws[part]
        else:
            if part not in known:
                below = [of_draws(v, draws, known) for v in part.variables]
                known[part] = _evaluate(part, below)
            value = known[part]
        out += _through(map_, value)
    known[sum_] = out
    return out


def fields_drawn(
    sum_: Sum, covariance: Covariance, count: int | None = None
) -> dict[Field, np.ndarray]:
    """Draws of a sum's fields at all their sites, (sites, draws) each; so many, or enough."""
    fields = sorted(sum_.fields, key=lambda f: f.serial)
    if not fields or not all(f.gaussian for f in fields):
        raise NoRule("a function of a signal that is not Gaussian over units")
    joint = {(f, g): covariance(f, g) for i, f in enumerate(fields) for g in fields[: i + 1]}
    groups: list[list[Field]] = []
    for f in fields:
        others = [g for g in groups if any(joint[f, h] is not None for h in g)]
        met = sorted(itertools.chain(*others, [f]), key=lambda h: h.serial)
        groups = [g for g in groups if g not in others] + [met]
    sites = [sum(len(f.covariance) for f in group) for group in groups]
    enough = min(_MOST, _WORK // sum(n**2 for n in sites) // 2 * 2)
    if enough < _FEWEST:
        raise NoRule(f"a function of signals at {sum(sites)} sites together, too many to draw")
    rng, draws = np.random.default_rng(0), dict[Field, np.ndarray]()
    for place, (group, n) in enumerate(zip(groups, sites, strict=True)):
        if count is None:
            normal = _matched(n, enough, seed=place)
        else:
            normal = rng.standard_normal((n, count))
        draws |= _together(group, joint, normal)
    return {f: draws[f] for f in fields}


def _together(
    group: Sequence[Field], joint: Mapping[tuple[Field, Field], Any], normal: np.ndarray
) -> dict[Field, np.ndarray]:
    """Draws of fields that are not independent, from as many standard normal numbers."""
    ends = np.cumsum([0, *(len(f.covariance) for f in group)])
    whole = np.zeros((ends[-1], ends[-1]))
    for i, f in enumerate(group):
        for j, g in enumerate(group[: i + 1]):
            if joint[f, g] is not None:
                at = slice(*ends[i : i + 2]), slice(*ends[j : j + 2])
                whole[at] = joint[f, g]
                whole[at[::-1]] = joint[f, g].T
    return dict(zip(group, np.split(_root(whole) @ normal, ends[1:-1]), strict=True))


@functools.lru_cache(maxsize=4)
def _matched(sites: int, count: int, seed: int) -> np.ndarray:
    """Standard normal draws whose mean is exactly 0, and whose covariance exactly the identity.

    Where there are fewer than twice as many as sites it is the identity on average only.
    """
    half: Any = np.random.default_rng(seed).standard_normal((sites, count // 2))
    if count >= 2 * sites:
        half = np.linalg.solve(np.linalg.cholesky(half @ half.T / half.shape[1]), half)
    return np.concatenate([half, -half], axis=1)


def _root(matrix: np.ndarray) -> np.ndarray:
    """L with L Lᵀ this matrix of second moments."""
    size = np.abs(np.diagonal(matrix)).max(initial=0.0)
    try:
        return np.linalg.cholesky(matrix + _JITTER * size * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(np.maximum(values, 0))


def _through(map_: Map, values: np.ndarray) -> np.ndarray:
    """A map of sites of all draws."""
    if map_ is identity(map_.shape[1]):
        return values
    dense = map_.nnz > _DENSE * math.prod(map_.shape)
    return np.asarray((map_.toarray() if dense else map_) @ values)


def _check(squares: np.ndarray) -> None:
    """Raise `NoRule` where the mean of numbers of units is not known from so many of them."""
    mean = squares.mean()
    if not mean:
        return
    error = squares.std() / mean / len(squares) ** 0.5
    share = squares.max() / mean / len(squares)
    if not (error < _ERROR and share < _SHARE):
        raise NoRule("a function of a signal of which a few units have most of the sum")


# Functions in blocks -----------------------------------------------------------------------------


def _evaluate(piece: Piece, variables: Sequence[np.ndarray]) -> np.ndarray:
    arrays = [*variables, *(n[:, None] for n in piece.numbers)]
    return _in_blocks(_function(piece.node, len(variables)), arrays, 1)[0]


def _pull(piece: Piece, variables: Sequence[np.ndarray], cotangent: np.ndarray) -> list[np.ndarray]:
    """The gradient by each variable from that by a piece."""
    arrays = [cotangent, *variables, *(n[:, None] for n in piece.numbers)]
    return _in_blocks(_derivative(piece.node, len(variables)), arrays, len(variables))


def _in_blocks(function: Any, arrays: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Functions of the elements of arrays, (sites, draws) or (sites, 1)."""
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    flat = [np.broadcast_to(x, shape).reshape(-1) for x in arrays]
    size = flat[0].size
    out = [np.empty(size) for _ in range(count)]
    length = _BLOCKS[size > _BLOCKS[0]]
    with jax.enable_x64(True):
        for start in range(0, size, length):
            end = min(start + length, size)
            block = [np.resize(x[start:end], length) for x in flat]
            for whole, part in zip(out, function(*block), strict=True):
                whole[start:end] = np.asarray(part)[: end - start]
    return [x.reshape(shape) for x in out]


@functools.lru_cache(maxsize=256)
def _function(node: Node, variables: int) -> Any:
    def f(*arrays: Any) -> list[Any]:
        value = node.evaluate(arrays[:variables], arrays[variables:])
        return [jnp.broadcast_to(value, arrays[0].shape)]

    return jax.jit(f)


@functools.lru_cache(maxsize=256)
def _derivative(node: Node, variables: int) -> Any:
    def f(cotangent: Any, *arrays: Any) -> list[Any]:
        def of(*some: Any) -> Any:
            value = node.evaluate(some, arrays[variables:])
            return jnp.broadcast_to(value, cotangent.shape).astype(cotangent.dtype)

        return list(jax.vjp(of, *arrays[:variables])[1](cotangent))

    return jax.jit(f)
