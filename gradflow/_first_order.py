"""Networks of finite width, as statistics read them: to first order in 1/n, all layers at once.

`theory.finite_width.first_order` computes these quantities and derives them; the readings in
`statistics` are functions of them. Signals here are those of the network times exp(-log_scale).
Given the layer below, a layer's pre-activations are Gaussian with covariance Σ over inputs, which
differs between networks by O(1/√n); its diagonal is the *conditional variance* v of each input.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow._layers import BackwardLimit

__all__ = ["Averages", "FiniteLayers", "FirstOrder", "Fluctuation", "GradientFluctuation"]
__all__ += ["FUNCTIONS", "PairFluctuation", "PAIR_FUNCTIONS", "SECOND_DERIVATIVES"]
__all__ += ["Series", "diagonal", "outer"]

# Functions of a pre-activation x that are averaged, alone and in pairs; shifted is φ(x) - φ(0).
FUNCTIONS = ("shifted", "shifted2", "phi2", "dphi2", "dphi", "x_dphi", "saturated")
# φ'' with its delta functions, times powers of x
SECOND_DERIVATIVES = ("ddphi", "x_ddphi", "x2_ddphi")
PAIR_FUNCTIONS = (*FUNCTIONS, "phi", "phi3", *SECOND_DERIVATIVES)


class Fluctuation(NamedTuple):
    """First order in 1/n of a quantity of each input: what the width does to it.

    ``shift`` is added to its mean over networks, (layers, sites); ``covariance`` is that between
    networks, (layers, sites, sites).
    """

    shift: Float[Array, "layers sites"]
    covariance: Float[Array, "layers sites sites"]


class Series(eqx.Module):
    """An average over pre-activations of variance q, E[f], and its two derivatives by q.

    Each of shape (layers, sites), at every layer's and input's q.
    """

    value: Float[Array, "layers sites"]
    first: Float[Array, "layers sites"]
    second: Float[Array, "layers sites"]

    @classmethod
    def of(cls, f: Callable[[Array], Array], q: Float[Array, "layers sites"]) -> "Series":
        """Differentiate a function of q."""
        derivatives = (f, jax.grad(f), jax.grad(jax.grad(f)))
        return cls(*(jax.vmap(jax.vmap(g))(q) for g in derivatives))

    @classmethod
    def of_powers(
        cls, powers: Float[Array, "3 layers sites"], q: Float[Array, "layers sites"]
    ) -> "Series":
        """Differentiate the density, and not f: ``powers`` are E[f], E[f x²] and E[f x⁴]."""
        value, second, fourth = powers
        first = (second / q - value) / (2 * q)
        return cls(value, first, (fourth / q**2 - 6 * second / q + 3 * value) / (4 * q**2))

    def less_square_of(self, mean: "Series") -> "Series":
        """The variance, where this is the second moment and ``mean`` the mean."""
        return Series(
            self.value - mean.value**2,
            self.first - 2 * mean.value * mean.first,
            self.second - 2 * (mean.first**2 + mean.value * mean.second),
        )

    def shift(self, v: Fluctuation) -> Float[Array, "layers sites"]:
        """The shift of its mean over networks, by the shift and the variance of v."""
        return self.first * v.shift + self.second * diagonal(v.covariance) / 2


class Averages(eqx.Module):
    """Averages over the pre-activations of every layer, at infinite width.

    Attributes
    ----------
    phi2, dphi2, mean, variance, saturation
        Of φ², φ'², φ - φ(0) and its variance, and of the saturated units.
    alone
        Shape (layers, sites, functions, functions), E[f(z_a) g(z_a)] of `FUNCTIONS`.
    pairs
        Shape (layers, pairs, pair_functions, pair_functions), E[f(z_a) g(z_b)] of
        `PAIR_FUNCTIONS` for the inputs a < b; None for one input, or where pairs are too many.
    """

    phi2: Series
    dphi2: Series
    mean: Series
    variance: Series
    saturation: Series
    alone: Float[Array, "layers sites functions functions"]
    pairs: Float[Array, "layers pairs pair_functions pair_functions"] | None

    def own(self, first: str, second: str) -> Float[Array, "layers sites"]:
        """E[f(z_a) g(z_a)] of two of `FUNCTIONS`."""
        return self.alone[..., FUNCTIONS.index(first), FUNCTIONS.index(second)]

    def pair(self, first: str, second: str) -> Float[Array, "layers pairs"]:
        """E[f(z_a) g(z_b)] of two of `PAIR_FUNCTIONS`, for the pairs a < b."""
        assert self.pairs is not None
        return self.pairs[..., PAIR_FUNCTIONS.index(first), PAIR_FUNCTIONS.index(second)]

    def product(self, first: str, second: str) -> Float[Array, "layers sites sites"]:
        """E[f(z_a) g(z_b)] of two of `FUNCTIONS`; NaN for a ≠ b where ``pairs`` is None."""
        own = self.own(first, second)
        sites = own.shape[1]
        parts = [own, jnp.full_like(own[:, :1], jnp.nan)]
        column = np.full((sites, sites), sites)
        np.fill_diagonal(column, np.arange(sites))
        if self.pairs is not None:
            parts += [self.pair(first, second), self.pair(second, first)]
            a, b = np.triu_indices(sites, 1)
            column[a, b] = sites + 1 + np.arange(a.size)
            column[b, a] = sites + 1 + a.size + np.arange(a.size)
        return jnp.concatenate(parts, axis=1)[:, column]


class FiniteLayers(eqx.Module):
    """All layers of a network: scales and widths, and limits and averages at infinite width.

    Attributes
    ----------
    sigma_w2, sigma_b2
        Shape (layers, sites): σ_w² and σ_b² between rescaled signals.
    width
        Shape (layers, 1): n_l.
    covariance
        Shape (layers, sites, sites): second moments of the pre-activations.
    log_scale
        Shape (layers, sites): the network's own signals are exp(log_scale) times these.
    backward
        The limit of the gradients.
    averages
        Over pre-activations of this covariance.
    """

    sigma_w2: Float[Array, "layers sites"]
    sigma_b2: Float[Array, "layers sites"]
    width: Float[Array, "layers 1"]
    covariance: Float[Array, "layers sites sites"]
    log_scale: Float[Array, "layers sites"]
    backward: BackwardLimit
    averages: Averages

    @property
    def q(self) -> Float[Array, "layers sites"]:
        """The pre-activations' second moments."""
        return diagonal(self.covariance)


class GradientFluctuation(NamedTuple):
    """First order in 1/n of log ‖∂C/∂z‖², apart from what the top gradient δ^L itself adds.

    ``shift`` is of the logarithm of the mean, (layers, sites); ``covariance`` is the logarithm's,
    (layers, sites, sites). ``by_v`` is the derivative by v^l, (layers, sites), ``overlap`` the mean
    square of the cosine between two inputs' gradients, (layers, sites, sites). ``chi_shift`` and
    ``chi_covariance`` are those of χ, as shares of it, at all layers but the top one.
    """

    shift: Float[Array, "layers sites"]
    covariance: Float[Array, "layers sites sites"]
    by_v: Float[Array, "layers sites"]
    overlap: Float[Array, "layers sites sites"]
    chi_shift: Float[Array, "layers_below sites"]
    chi_covariance: Float[Array, "layers_below sites sites"]


class PairFluctuation(NamedTuple):
    """First order in 1/n of v_a, v_b and Σ_ab of the pairs of inputs a < b.

    ``moments`` are their limits and ``shift`` what is added to their means, (layers, pairs, 3);
    ``covariance`` is that between networks, (layers, pairs, 3, 3).
    """

    moments: Float[Array, "layers pairs 3"]
    shift: Float[Array, "layers pairs 3"]
    covariance: Float[Array, "layers pairs 3 3"]


class FirstOrder(NamedTuple):
    """What statistics' corrections are functions of: networks of finite width, all layers at once.

    Attributes
    ----------
    layers
        Widths, limits and averages at infinite width.
    v
        The conditional variance of each input: its shift and covariance.
    gradient
        The gradient's squared norm.
    pairs
        The moments of each pair of inputs; None for one input, or where there are too many pairs.
    """

    layers: FiniteLayers
    v: Fluctuation
    gradient: GradientFluctuation
    pairs: PairFluctuation | None

    def mean_over_units(self, average: Series, function: str) -> Fluctuation:
        """A layer's mean over units of one of `FUNCTIONS`, whose ``average`` is its limit."""
        product = self.layers.averages.product(function, function)
        over_units = (product - outer(average.value, average.value)) / self.layers.width[:, :, None]
        along_v = outer(average.first, average.first) * self.v.covariance
        return Fluctuation(average.shift(self.v), over_units + along_v)


def diagonal(x: Float[Array, "layers sites sites"]) -> Float[Array, "layers sites"]:
    """The diagonal of every layer's matrix."""
    return jnp.diagonal(x, axis1=1, axis2=2)


def outer(
    x: Float[Array, "layers sites"], y: Float[Array, "layers sites"]
) -> Float[Array, "layers sites sites"]:
    """The outer product of every layer's vectors."""
    return x[:, :, None] * y[:, None, :]
