"""Averages of functions of several jointly Gaussian variables, each with a bound on its error.

What factorises is factorised (`_pieces`); the rest is averaged by a rule for its number of
variables (`_cubature`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.errors import InputError
from gradflow.inspection._cubature import Product, Value, average, sampled_sites
from gradflow.inspection._pieces import Function, Term, expanded, functions

__all__ = ["FieldMoments", "expectation", "field_moments", "independent"]

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


class FieldMoments(NamedTuple):
    """E[h_a] and E[h_a g_b] of functions h, g of fields, with bounds on their absolute errors.

    ``mean`` and its error have the shape (functions, ..., sites), ``second`` and its error
    (functions, functions, ..., sites, sites).
    """

    mean: np.ndarray
    second: np.ndarray
    mean_error: np.ndarray
    second_error: np.ndarray


def independent(*covariances: Any) -> np.ndarray:
    """The covariance of independent fields, each of shape (..., sites, sites): (k, k, ...)."""
    shape = np.broadcast_shapes(*(np.shape(c) for c in covariances))
    whole = np.zeros((len(covariances), len(covariances), *shape))
    for i, covariance in enumerate(covariances):
        whole[i, i] = covariance
    return whole


def field_moments(
    f: Callable[..., Any], covariance: Any, means: Any = None, known: Sequence[Any] = ()
) -> FieldMoments:
    """Mean and second moments over sites of h_a = f(z¹_a, …, z^k_a, known_a), z Gaussian.

    What f adds or multiplies of independent fields is averaged apart, so that products of gates
    with signals are exact. With ``jax.grad(f, i)`` for f: E[∂_i h_a ∂_i h_b].

    Parameters
    ----------
    f
        In JAX, of scalars to a scalar or to a tuple of scalars, as for `expectation`.
    covariance
        Shape (k, k, ..., sites, sites), [i, j, ..., a, b] that of z^i_a and z^j_b; see
        `independent`.
    means
        Shape (k, ..., sites); 0 without it.
    known
        Arrays of shape (..., sites).

    Raises
    ------
    InputError
        If a variance is negative or not finite, or there are more than 21201 variables.
    """
    covariance = np.asarray(covariance, np.float64)
    k, _, *batch, sites, _ = covariance.shape
    covariance = covariance.reshape(k, k, -1, sites, sites)
    rows = covariance.shape[2]
    means = np.zeros((k, *batch, sites)) if means is None else np.asarray(means, np.float64)
    read, _ = functions(f, k, len(known))
    over = _OverSites(
        covariance,
        np.broadcast_to(means, (k, *batch, sites)).reshape(k, rows, sites),
        _rows(known, (*batch, sites)).reshape(rows, sites, len(known)),
    )
    terms = [expanded(h, over.groups) for h in read]
    n = len(terms)
    mean = np.zeros((2, n, rows, sites))
    second = np.zeros((2, n, n, rows, sites, sites))
    for i, left in enumerate(terms):
        mean[:, i] = over.mean_of(left)
        for j, right in enumerate(terms[: i + 1]):
            second[:, i, j] = found = np.stack(over.second_of(left, right))
            second[:, j, i] = np.swapaxes(found, -1, -2)
    mean, second = mean.reshape(2, n, *batch, sites), second.reshape(2, n, n, *batch, sites, sites)
    return FieldMoments(mean[0], second[0], mean[1], second[1])


def _rows(known: Sequence[Any], batch: tuple[int, ...]) -> np.ndarray:
    """Known numbers as (rows, numbers)."""
    if not known:
        return np.zeros((math.prod(batch), 0))
    arrays = [np.broadcast_to(np.asarray(x, np.float64), batch).reshape(-1) for x in known]
    return np.stack(arrays, axis=1)


_Pieces = tuple[Function, ...]


class _OverSites:
    """Averages of pieces over fields: covariance (k, k, rows, sites, sites).

    Known numbers are (rows, sites, n).

    ``groups`` has for each field the number of the independent group that it is in.
    """

    def __init__(self, covariance: np.ndarray, means: np.ndarray, known: np.ndarray) -> None:
        self.covariance, self.means, self.known = covariance, means, known
        self.seconds: dict[Any, Value] = {}
        groups = list(range(len(means)))
        for i, j in np.argwhere(np.any(covariance != 0, axis=(2, 3, 4))):
            groups = [groups[i] if g == groups[j] else g for g in groups]
        self.groups = tuple(groups)

    def mean_of(self, terms: list[Term]) -> Value:
        """E[Σ_t Π pieces], (rows, sites)."""
        return _sum(_times(self.mean((piece,)) for piece in term.values()) for term in terms)

    def second_of(self, left: list[Term], right: list[Term]) -> Value:
        """E of two sums of products, at pairs of sites."""
        return _sum(self.of_products(a, b) for a in left for b in right)

    def of_products(self, left: Term, right: Term) -> Value:
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
        return _times(self.second(a, b) for _, a, b in found)

    def mean(self, pieces: _Pieces) -> Value:
        """E[Π pieces] at each site, (rows, sites)."""
        fields = _fields(pieces)
        rows, sites = self.known.shape[:2]
        if not fields:
            values = [self.constant(piece) for piece in pieces]
            return np.prod(values, axis=0), np.zeros((rows, sites))
        own = np.diagonal(self.covariance[np.ix_(fields, fields)], axis1=3, axis2=4)
        value, error = average(
            (self.parts(pieces, fields),),
            _flat(np.moveaxis(own, (0, 1), (-2, -1))),
            _flat(np.moveaxis(self.means[fields], 0, -1)),
            _flat(self.known),
        )
        return value.reshape(rows, sites), error.reshape(rows, sites)

    def constant(self, piece: Function) -> np.ndarray:
        """A piece of known numbers alone, (rows, sites)."""
        with jax.enable_x64(True):
            value = jax.vmap(lambda k: jnp.asarray(piece((), k), float))(_flat(self.known))
        return np.asarray(value).reshape(self.known.shape[:2])

    def parts(self, pieces: _Pieces, fields: list[int], *, side: int | None = None) -> Product:
        """The product of pieces of these fields: at one site, or at one of a pair."""
        n = self.known.shape[-1]
        scale, shift = (1, 0) if side is None else (2, side)
        known = tuple(range(shift * n, (shift + 1) * n))
        return tuple(
            (p, tuple(scale * fields.index(v) + shift for v in p.variables), known) for p in pieces
        )

    def second(self, left: _Pieces, right: _Pieces) -> Value:
        """E[Π left at a · Π right at b], (rows, sites, sites)."""
        if not left or not right:
            value, error = self.mean(left or right)
            shape, axis = self.covariance.shape[2:], -1 if left else -2
            return (
                np.broadcast_to(np.expand_dims(value, axis), shape),
                np.broadcast_to(np.expand_dims(error, axis), shape),
            )
        if (left, right) not in self.seconds:
            self.seconds[left, right] = self.computed(left, right)
            swapped = (np.swapaxes(x, -1, -2) for x in self.seconds[left, right])
            self.seconds.setdefault((right, left), tuple(swapped))  # type: ignore[arg-type]
        return self.seconds[left, right]

    def computed(self, left: _Pieces, right: _Pieces) -> Value:
        """The same, by one rule for each site with itself, and one for pairs."""
        fields = _fields((*left, *right))
        rows, sites = self.known.shape[:2]
        pairs = rows * sites * (sites - 1) // 2
        if len(fields) > 2 or (len(fields) == 2 and pairs > _MANY_PAIRS):
            return self.sampled(left, right, fields)
        value, error = np.zeros((2, rows, sites, sites))
        each = np.arange(sites)
        value[:, each, each], error[:, each, each] = self.mean((*left, *right))
        symmetric = left == right
        everywhere = ~np.eye(sites, dtype=bool)
        a, b = np.nonzero(np.triu(everywhere) if symmetric else everywhere)
        if a.size:
            value[:, a, b], error[:, a, b] = of_pairs = self.pairs(left, right, fields, a, b)
            if symmetric:
                value[:, b, a], error[:, b, a] = of_pairs
        return value, error

    def pairs(
        self, left: _Pieces, right: _Pieces, fields: list[int], a: np.ndarray, b: np.ndarray
    ) -> Value:
        """E[Π left at a · Π right at b] for pairs of sites, (rows, pairs)."""
        rows, m, sides = self.covariance.shape[2], len(fields), np.stack([a, b])
        covariance = np.zeros((rows, a.size, m, 2, m, 2))
        for i, j in np.ndindex(m, m):
            own = self.covariance[fields[i], fields[j]]
            covariance[:, :, i, :, j, :] = np.moveaxis(own[:, sides[:, None], sides[None]], -1, 1)
        mean = np.moveaxis(self.means[fields][:, :, sides], (0, 2), (2, 3))
        value, error = average(
            ((*self.parts(left, fields, side=0), *self.parts(right, fields, side=1)),),
            covariance.reshape(-1, 2 * m, 2 * m),
            mean.reshape(-1, 2 * m),
            _flat(np.concatenate([self.known[:, a], self.known[:, b]], axis=-1)),
        )
        return value.reshape(rows, -1), error.reshape(rows, -1)

    def sampled(self, left: _Pieces, right: _Pieces, fields: list[int]) -> Value:
        """The same for all sites at once, by quasi-Monte Carlo."""
        m, sites = len(fields), self.known.shape[1]
        both = np.moveaxis(self.covariance[np.ix_(fields, fields)], (0, 1), (1, 3))
        found = [
            sampled_sites(
                self.parts(left, fields), self.parts(right, fields),
                both[row].reshape(m * sites, m * sites), self.means[fields][:, row],
                self.known[row],
            )
            for row in range(len(both))
        ]  # fmt: skip
        return np.stack([value for value, _ in found]), np.stack([error for _, error in found])


def _fields(pieces: _Pieces) -> list[int]:
    return sorted(set().union(*(piece.variables for piece in pieces)))


def _flat(x: np.ndarray) -> np.ndarray:
    """Its first two axes, of rows and sites, as one."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _sum(parts: Iterable[Value]) -> Value:
    values, errors = zip(*parts, strict=True)
    return sum(values), sum(errors)


def _times(parts: Iterable[Value]) -> Value:
    """The product of independent averages, with its error."""

    def times(left: Value, right: Value) -> Value:
        (v, e), (w, f) = left, right
        return v * w, np.abs(v) * f + np.abs(w) * e + e * f

    return functools.reduce(times, parts)
