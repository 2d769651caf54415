"""Pieces that mix a unit's sites: BatchNorm, however it is written, by its own theory.

A function of x_s and of v, x the signal less its mean over a batch and v = mean_s x_s², that
depends on x/√v alone is φ of the normalised signal: its averages, and the map of gradients' second
moments, are those of `gradflow.gaussian._batch`. That a program's v is this one is seen on draws of
the fields, and that ε is next to nothing on the function.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow import _programs
from gradflow.activations import Activation
from gradflow.gaussian import _batch
from gradflow.inspection._theory import large_batches
from gradflow.inspection._theory.activations import activation_of
from gradflow.inspection._theory.nodes import constant, multiply, of_function, variable
from gradflow.inspection._theory.sampling import of_draws
from gradflow.inspection._theory.sums import NoRule, Piece, Sum

__all__ = ["Normalised"]

_DRAWS, _SAME = 3, 1e-6
# A variance beside which no ε is seen, and what ε may change.
_LARGE, _MOST = 1e8, 1e-3


class Normalised:
    """A piece φ(x/√v) of a batch.

    Attributes
    ----------
    x
        The signal less its mean over the batch.
    phi
        φ.
    error
        The relative change that ε makes, about.
    """

    def __init__(self, piece: Piece, k: Any) -> None:
        """Read a piece; ``k`` is a function of its x to x's covariance.

        Raises
        ------
        NoRule
            If it is no such piece.
        """
        gaussian = [i for i, v in enumerate(piece.variables) if v.gaussian]
        others = [i for i in range(len(piece.variables)) if i not in gaussian]
        if len(gaussian) != 1 or len(others) != 1 or any(np.ptp(n) for n in piece.numbers):
            raise NoRule("a function of a signal that is not Gaussian over units")
        (i,), (j,) = gaussian, others
        self.x, self.k = piece.variables[i], np.asarray(k(piece.variables[i]))
        numbers = tuple(float(n[0]) for n in piece.numbers)

        def at(variance: float) -> Any:
            other = _at_mean_square(self.x, piece.variables[j], variance)
            places = [constant(other)] * 2
            places[i] = of_function(multiply, variable(0), constant(variance**0.5))
            return activation_of(piece.node.placed(places, 0), numbers)

        self.phi = at(_LARGE)
        far, less, near = map(
            _probed, (self.phi, at(_LARGE / 100), at(np.trace(self.k) / len(self.k)))
        )
        size = np.abs(far).max()
        if not np.abs(less - far).max() <= _SAME * size:
            raise NoRule("a function of several sites of a signal that is not BatchNorm")
        self.error = float(np.abs(near - far).max() / size)
        if not self.error < _MOST:
            raise NoRule("BatchNorm, of which ε is not small beside the variance")
        if len(self.k) < _batch.SMALLEST:
            raise NoRule(f"BatchNorm over fewer than {_batch.SMALLEST} sites")

    @property
    def large(self) -> bool:
        """Whether it is of many sites, and has the averages of these."""
        return self.phi.homogeneous and len(self.k) >= large_batches.LARGE

    @functools.cached_property
    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """E[φ_a φ_b] and E[φ_a]."""
        if self.large:
            return large_batches.averages(self.phi, self.k)
        with jax.enable_x64(True):
            second, mean = _values(self.phi, self.k)
        return np.asarray(second), np.asarray(mean)

    def average(self, slot: int | None) -> np.ndarray:
        """E[φ], (sites,)."""
        if slot is not None:
            raise NoRule("the slope of a signal that BatchNorm has normalised")
        return self.values[1]

    def pair(self, one: int | None, other: int | None) -> np.ndarray:
        """E[φ_a φ_b], (sites, sites)."""
        if one is not None or other is not None:
            raise NoRule("the slope of a signal that BatchNorm has normalised")
        return self.values[0]

    def pair_at(
        self, one: int | None, other: int | None, rows: np.ndarray, cols: np.ndarray
    ) -> np.ndarray:
        """E[φ_a φ_b] at some pairs of sites, (pairs,)."""
        return self.pair(one, other)[rows, cols]

    def pulled(self, gradient: np.ndarray) -> np.ndarray:
        """Second moments of the gradient by x from those by φ."""
        if self.large:
            return large_batches.pulled(self.phi, self.k, gradient)
        with jax.enable_x64(True):
            return np.asarray(_pulled(self.phi, self.k, gradient))


def _probed(phi: Activation) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(phi(np.array([-1.7, -0.6, 0.4, 1.3])))


def _at_mean_square(x: Sum, other: Sum, variance: float) -> float:
    """The value of another sum of the same fields where the mean square of x is this.

    Raises
    ------
    NoRule
        If it depends on more than that, or x has a mean over sites.
    """
    rng = np.random.default_rng(0)
    fields = sorted(x.fields | other.fields, key=lambda field: field.serial)
    draws = {f: rng.standard_normal((len(f.covariance), _DRAWS)) for f in fields}
    square = np.mean(of_draws(x, draws) ** 2, axis=0)
    draws = {f: d * np.sqrt(variance / square) for f, d in draws.items()}
    values, others = of_draws(x, draws), of_draws(other, draws)
    centred = np.abs(values.mean(axis=0)).max() <= _SAME * variance**0.5
    if not centred or not np.ptp(others) <= _SAME * np.abs(others).max():
        raise NoRule("a function of several sites of a signal that is not BatchNorm")
    return float(others.mean())


@_programs.program("phi", seconds=0.1)
def _values(phi: Activation, k: Any) -> tuple[Any, Any]:
    return _batch.averages(phi, k, None)[:2]


@_programs.program("phi", seconds=0.1)
def _pulled(phi: Activation, k: Any, gradient: Any) -> Any:
    """The transpose of the map of a tangent's second moments."""
    _, pull = jax.vjp(lambda s: _batch.averages(phi, k, s)[2], jnp.zeros_like(k))
    return pull(gradient)[0]
