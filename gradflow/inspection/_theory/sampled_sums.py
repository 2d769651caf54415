"""Sums whose averages no rule has, by draws of the fields at all of their sites at once.

As of a residual network whose branches end in BatchNorm: max(0, max(0, x̂) + ŷ) of normalised x̂, ŷ,
each a function of a unit's signal at every site of the batch. Draws are antithetic, and their own
second moments are made exactly the field's where there are enough; the same on every run. A
gradient's second moments are those of cotangents drawn with it, which go down each draw.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from gradflow.inspection._theory.sums import Field, Map, NoRule, Piece, Sum

__all__ = ["mean", "second_moments", "spread"]

# Draws: between these, as many as make so many products of two of their sites.
_FEWEST, _MOST, _WORK = 1 << 10, 1 << 14, 1 << 33
# With fewer sites averages of what a batch normalises need not be finite.
_SITES = 16
_Values = dict[Any, np.ndarray]


def mean(sum_: Sum, why: NoRule) -> np.ndarray:
    """E of a unit at each site, (sites,); raises ``why`` where fields cannot be drawn."""
    return _evaluated(sum_, _draws(sum_, why), {}).mean(axis=0)


def second_moments(sum_: Sum, why: NoRule) -> np.ndarray:
    """E of the products of a unit at all pairs of sites; raises ``why`` as `mean`."""
    values = _evaluated(sum_, _draws(sum_, why), {})
    return values.T @ values / len(values)


def spread(sum_: Sum, gradient: np.ndarray, why: NoRule) -> dict[Field, np.ndarray]:
    """Second moments of the gradient at each field, from those at a sum; raises as `mean`."""
    draws, values = _draws(sum_, why), dict[Any, np.ndarray]()
    _evaluated(sum_, draws, values)
    many = len(next(iter(draws.values())))
    cotangent = _drawn(gradient, many, np.random.default_rng(len(draws)))
    found: _Values = {}
    _pulled(sum_, cotangent, values, found)
    return {field: g.T @ g / many for field, g in found.items() if field.leads_down}


def _draws(sum_: Sum, why: NoRule) -> dict[Field, np.ndarray]:
    """Values of each field that a sum is a function of, (draws, sites of the field)."""
    fields = sorted(sum_.fields, key=lambda field: field.serial)
    sites = [len(field.covariance) for field in fields]
    every = sum_.fields
    if not fields or min(sites) < _SITES or any(
        not field.gaussian or not field.tied.isdisjoint(every) for field in fields
    ):  # fmt: skip
        raise why
    many = int(np.clip(_WORK // max(sites) ** 2, _FEWEST, _MOST))
    return {
        field: _drawn(field.covariance, many, np.random.default_rng(place))
        for place, field in enumerate(fields)
    }


def _drawn(covariance: np.ndarray, many: int, rng: np.random.Generator) -> np.ndarray:
    """Antithetic draws of this covariance, (many, sites)."""
    sites = len(covariance)
    z = rng.standard_normal((many // 2, sites))
    if many >= 4 * sites:
        own = linalg.cholesky(z.T @ z / len(z), lower=True)
        z = linalg.solve_triangular(own, z.T, lower=True).T
    half = z @ _root(covariance).T
    return np.concatenate([half, -half])


def _root(covariance: np.ndarray) -> np.ndarray:
    """L with L Lᵀ = covariance, but for rounding."""
    covariance = (covariance + covariance.T) / 2
    size = float(np.trace(covariance)) / len(covariance)
    try:
        return linalg.cholesky(covariance + 1e-12 * size * np.eye(len(covariance)), lower=True)
    except linalg.LinAlgError:
        values, vectors = linalg.eigh(covariance)
        if values[0] < -1e-6 * values[-1]:
            raise NoRule("second moments that no signal has") from None
        return vectors * np.sqrt(np.maximum(values, 0))


def _evaluated(sum_: Sum, draws: Mapping[Field, np.ndarray], values: _Values) -> np.ndarray:
    """A sum's values, (draws, sites), and those of the pieces and sums that it is made of."""
    if sum_ in values:
        return values[sum_]
    total: Any = sum_.constant[None]
    for part, map_ in sum_.parts.items():
        if isinstance(part, Field):
            own = draws[part]
        elif part in values:
            own = values[part]
        else:
            below = [_evaluated(v, draws, values) for v in part.variables]
            with jax.enable_x64(True):
                made = part.node.evaluate(list(map(jnp.asarray, below)), part.numbers)
                own = values[part] = np.broadcast_to(np.asarray(made, np.float64), below[0].shape)
        total = total + _applied(map_, own)
    values[sum_] = total
    return total


def _pulled(sum_: Sum, cotangent: np.ndarray, values: _Values, found: _Values) -> None:
    """Add the gradient at each field, (draws, sites), to what is found."""
    for part, map_ in sum_.parts.items():
        own = _applied(map_, cotangent, turned=True)
        if isinstance(part, Field):
            found[part] = found[part] + own if part in found else own
            continue
        for variable, g in zip(part.variables, _slopes(part, own, values), strict=True):
            _pulled(variable, np.asarray(g), values, found)


def _slopes(piece: Piece, cotangent: np.ndarray, values: _Values) -> Any:
    """The gradient at each variable of a piece."""

    def function(*variables: Any) -> Any:
        made = piece.node.evaluate(variables, piece.numbers)
        return jnp.broadcast_to(made, cotangent.shape)

    with jax.enable_x64(True):
        _, pull = jax.vjp(function, *(jnp.asarray(values[v]) for v in piece.variables))
        return pull(jnp.asarray(cotangent))


def _applied(map_: Map, rows: np.ndarray, *, turned: bool = False) -> np.ndarray:
    """A map, or its transpose, of each row: means over all sites without their N² products."""
    many = map_.shape[0]
    if map_.shape[1] == many and map_.nnz == many**2 and many > 1:
        whole = map_.toarray()
        beside = whole[0, 1]
        own = whole.diagonal() - beside
        whole.flat[:: many + 1] = beside
        if (whole == beside).all():
            return rows * own + beside * rows.sum(axis=1, keepdims=True)
    return np.asarray(((map_.T if turned else map_) @ rows.T).T)
