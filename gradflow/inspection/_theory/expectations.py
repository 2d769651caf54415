"""Averages of functions of several jointly Gaussian variables, each with a bound on its error.

What factorises is factorised (`_pieces`); the rest is averaged by a rule for its number of
variables (`_cubature`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.errors import InputError
from gradflow.inspection._theory.cubature import Product, Value, average, sampled_sites
from gradflow.inspection._theory.pieces import Function, Term, expanded, functions

__all__ = ["SiteAverages", "expectation", "independent"]

# More pairs of two variables each are averaged together, by sampling, and not one by one.
_MANY_PAIRS = 64


def expectation(
    f: Callable[..., Any],
    covariance: Any,
    mean: Any = None,
    known: Sequence[Any] = (),
) -> tuple[Any, Any]:
    """E[f(z_1, …, z_d)], z ~ N(mean, covariance), and a bound on its error.

    Parameters
    ----------
    f
        In JAX, of d scalars and, behind them, a scalar for each of ``known``; a scalar, or a tuple
        of scalars, which are averaged in one pass. A derivative is that of ``jax.grad``.
    covariance
        Shape (..., d, d), positive semidefinite, singular or not.
    mean
        Shape (..., d); 0 without it.
    known
        Arrays of shape (...), numbers that differ from one average to the next.

    Returns
    -------
    value, error
        float64, of shape (...), each; tuples where f makes a tuple. Errors are absolute.

    Raises
    ------
    InputError
        If the covariance is not square, has another number of variables than the mean, or a
        variance that is negative.
    """
    covariance = np.asarray(covariance, np.float64)
    variables = covariance.shape[-1] if covariance.ndim > 1 else 0
    if covariance.ndim < 2 or covariance.shape[-2] != variables:
        raise InputError(f"covariance has the shape {covariance.shape}; it is (..., d, d)")
    batch = covariance.shape[:-2]
    mean = np.zeros((*batch, variables)) if mean is None else np.asarray(mean, np.float64)
    if mean.shape[-1:] != (variables,):
        raise InputError(f"mean has the shape {mean.shape}; it is (..., {variables})")
    read, several = functions(f, variables, len(known))
    places = tuple(range(variables)), tuple(range(len(known)))
    integrand = tuple(((g, *places),) for g in read)
    value, error = average(
        integrand,
        covariance.reshape(-1, variables, variables),
        np.broadcast_to(mean, (*batch, variables)).reshape(-1, variables),
        _rows(known, batch),
    )
    value, error = (x.reshape(*batch, len(read)) for x in (value, error))
    if several:
        return tuple(np.moveaxis(value, -1, 0)), tuple(np.moveaxis(error, -1, 0))
    return value[..., 0], error[..., 0]


def independent(*covariances: Any) -> np.ndarray:
    """The covariance of independent fields, each of shape (sites, sites): (k, k, sites, sites)."""
    whole = np.zeros((len(covariances), len(covariances), *np.shape(covariances[0])))
    for i, covariance in enumerate(covariances):
        whole[i, i] = covariance
    return whole


def _rows(known: Sequence[Any], batch: tuple[int, ...]) -> np.ndarray:
    """Known numbers as (rows, numbers)."""
    if not known:
        return np.zeros((math.prod(batch), 0))
    arrays = [np.broadcast_to(np.asarray(x, np.float64), batch).reshape(-1) for x in known]
    return np.stack(arrays, axis=1)


_Pieces = tuple[Function, ...]


class SiteAverages:
    """Averages over units of functions of Gaussian fields z¹ … z^k at sites, and of their products.

    What a function adds or multiplies of independent fields is averaged apart, so that products of
    gates with signals are exact.

    Parameters
    ----------
    covariance
        Shape (k, k, sites, sites), [i, j, a, b] that of z^i_a and z^j_b; see `independent`.
    means
        Shape (k, sites); 0 without it.
    known
        Numbers that functions take behind the fields: arrays of shape (sites,).
    """

    def __init__(self, covariance: Any, means: Any = None, known: Sequence[Any] = ()) -> None:
        self.covariance = np.asarray(covariance, np.float64)
        k, sites = self.covariance.shape[1:3]
        self.means = np.zeros((k, sites)) if means is None else np.asarray(means, np.float64)
        self.known = _rows(known, (sites,))
        self.seconds: dict[Any, Value] = {}
        groups = list(range(k))
        for i, j in np.argwhere(np.any(self.covariance != 0, axis=(2, 3))):
            groups = [groups[i] if g == groups[j] else g for g in groups]
        self.groups = tuple(groups)

    def read(self, f: Callable[..., Any]) -> tuple[Term, ...]:
        """A function of scalars z_1, …, z_k, known_1, …, in JAX, as these averages take it.

        A derivative is that of ``jax.grad``.
        """
        ((read,), _) = functions(f, len(self.means), self.known.shape[1])
        return tuple(expanded(read, self.groups))

    def mean(self, terms: Sequence[Term]) -> Value:
        """E[h_a], and its error, (sites,)."""
        return _sum(_times(self.own((piece,)) for piece in term.values()) for term in terms)

    def second(self, left: Sequence[Term], right: Sequence[Term]) -> Value:
        """E[h_a g_b], and its error, (sites, sites)."""
        return _sum(self.of_products(a, b) for a in left for b in right)

    def second_at(
        self, left: Sequence[Term], right: Sequence[Term], rows: np.ndarray, cols: np.ndarray
    ) -> np.ndarray:
        """E[h_a g_b] of some pairs of sites (a, b), (pairs,)."""
        apart = rows != cols
        if apart.sum() > _MANY_PAIRS * len(self.known):
            return self.second(left, right)[0][rows, cols]

        def joint(one: _Pieces, other: _Pieces) -> Value:
            if not one or not other:
                value, error = self.own(one or other)
                place = rows if one else cols
                return value[place], error[place]
            value, error = (x[rows] for x in self.own((*one, *other)))
            if apart.any():
                fields = _fields((*one, *other))
                of_pairs = self.pairs(one, other, fields, rows[apart], cols[apart])
                value[apart], error[apart] = of_pairs
            return value, error

        return _sum(self.of_products(a, b, joint) for a in left for b in right)[0]

    def of_products(
        self, left: Term, right: Term, joint: Callable[[_Pieces, _Pieces], Value] | None = None
    ) -> Value:
        """E[left_a right_b], products of what depends on fields in common."""
        found: list[tuple[frozenset[int], _Pieces, _Pieces]] = []
        for side, term in enumerate((left, right)):
            for own, piece in term.items():
                groups = own
                sides: list[_Pieces] = [(), ()]
                sides[side] = (piece,)
                for other in [f for f in found if f[0] & groups]:
                    found.remove(other)
                    groups |= other[0]
                    sides = [sides[0] + other[1], sides[1] + other[2]]
                found.append((groups, sides[0], sides[1]))
        return _times((joint or self.joint)(a, b) for _, a, b in found)

    def own(self, pieces: _Pieces) -> Value:
        """E[Π pieces] at each site, (sites,)."""
        fields = _fields(pieces)
        if not fields:
            values = [self.constant(piece) for piece in pieces]
            return np.prod(values, axis=0), np.zeros(len(self.known))
        own = np.diagonal(self.covariance[np.ix_(fields, fields)], axis1=2, axis2=3)
        value, error = average(
            (self.parts(pieces, fields),),
            np.moveaxis(own, -1, 0),
            self.means[fields].T,
            self.known,
        )
        return value[:, 0], error[:, 0]

    def constant(self, piece: Function) -> np.ndarray:
        """A piece of known numbers alone, (sites,)."""
        with jax.enable_x64(True):
            value = jax.vmap(lambda k: jnp.asarray(piece((), k), float))(self.known)
        return np.asarray(value)

    def parts(self, pieces: _Pieces, fields: list[int], *, side: int | None = None) -> Product:
        """The product of pieces of these fields: at one site, or at one of a pair."""
        n = self.known.shape[1]
        scale, shift = (1, 0) if side is None else (2, side)
        known = tuple(range(shift * n, (shift + 1) * n))
        return tuple(
            (p, tuple(scale * fields.index(v) + shift for v in p.variables), known) for p in pieces
        )

    def joint(self, left: _Pieces, right: _Pieces) -> Value:
        """E[Π left at a · Π right at b], (sites, sites)."""
        if not left or not right:
            shape, axis = self.covariance.shape[2:], -1 if left else -2
            value, error = (np.expand_dims(x, axis) for x in self.own(left or right))
            return np.broadcast_to(value, shape), np.broadcast_to(error, shape)
        if (left, right) not in self.seconds:
            value, error = self.seconds[left, right] = self.computed(left, right)
            self.seconds.setdefault((right, left), (value.T, error.T))
        return self.seconds[left, right]

    def computed(self, left: _Pieces, right: _Pieces) -> Value:
        """The same, by one rule for each site with itself, and one for pairs."""
        fields, sites = _fields((*left, *right)), len(self.known)
        if len(fields) > 2 or (len(fields) == 2 and sites * (sites - 1) > 2 * _MANY_PAIRS):
            return sampled_sites(
                self.parts(left, fields), self.parts(right, fields),
                self.covariance[np.ix_(fields, fields)], self.means[fields], self.known,
            )  # fmt: skip
        value, error = np.zeros((2, sites, sites))
        each = np.arange(sites)
        value[each, each], error[each, each] = self.own((*left, *right))
        symmetric = left == right
        everywhere = ~np.eye(sites, dtype=bool)
        a, b = np.nonzero(np.triu(everywhere) if symmetric else everywhere)
        if a.size:
            value[a, b], error[a, b] = of_pairs = self.pairs(left, right, fields, a, b)
            if symmetric:
                value[b, a], error[b, a] = of_pairs
        return value, error

    def pairs(
        self, left: _Pieces, right: _Pieces, fields: list[int], a: np.ndarray, b: np.ndarray
    ) -> Value:
        """E[Π left at a · Π right at b] for pairs of sites, (pairs,)."""
        m, sides = len(fields), np.stack([a, b])
        covariance = np.zeros((a.size, m, 2, m, 2))
        for i, j in np.ndindex(m, m):
            own = self.covariance[fields[i], fields[j]]
            covariance[:, i, :, j, :] = np.moveaxis(own[sides[:, None], sides[None]], -1, 0)
        value, error = average(
            ((*self.parts(left, fields, side=0), *self.parts(right, fields, side=1)),),
            covariance.reshape(-1, 2 * m, 2 * m),
            np.moveaxis(self.means[fields][:, sides], -1, 0).reshape(-1, 2 * m),
            np.concatenate([self.known[a], self.known[b]], axis=1),
        )
        return value[:, 0], error[:, 0]


def _fields(pieces: _Pieces) -> list[int]:
    return sorted(set().union(*(piece.variables for piece in pieces)))


def _sum(parts: Iterable[Value]) -> Value:
    values, errors = zip(*parts, strict=True)
    return sum(values), sum(errors)


def _times(parts: Iterable[Value]) -> Value:
    """The product of independent averages, with its error."""

    def times(left: Value, right: Value) -> Value:
        (v, e), (w, f) = left, right
        return v * w, np.abs(v) * f + np.abs(w) * e + e * f

    return functools.reduce(times, parts)
