"""Layers of units: a product with a random matrix, an activation, and both as one layer."""

import abc
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow import activations, ensembles
from gradflow.activations import Activation
from gradflow.blocks.base import AbstractBlock, Multiply, add_bias
from gradflow.ensembles import Distribution
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["AbstractLayer", "Activate", "Dense", "Linear"]


class Activate(AbstractBlock):
    """h = φ(z): E[φ(u) φ(v)] of Gaussian u and v (Poole et al. 2016, arXiv:1606.05340, eq. 5)."""

    activation: Activation = eqx.field(
        static=True, converter=activations.get, default=activations.tanh
    )

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites n"]:
        """Return φ(z)."""
        return self.activation(signal)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Map second moments to E[φ(u) φ(v)]."""
        return kernel.through(self.activation)

    @property
    def homogeneous(self) -> bool:
        """Whether φ is positively homogeneous."""
        return self.activation.homogeneous

    def homogeneous_if(self, activations: Callable[[Activation], bool]) -> bool:
        """Whether φ is positively homogeneous, by the function given."""
        return activations(self.activation)


class Linear(AbstractBlock):
    """z = W h + b, with Var W = σ_w²/fan_in and b ~ N(μ_b, σ_b²) shared by the sites.

    ``sigma_b=None`` and ``mu_b=None`` are a layer without biases, also for a compiled program; with
    0.0 it has biases that start at 0, with ``mu_b`` alone they are all that number. Biases of
    another law have a ``bias_distribution``. With ``mu_w`` the mean of W is μ_w/fan_in: a mean over
    units is multiplied by μ_w, and is common to all units.
    """

    units: int = eqx.field(static=True, default=100)
    sigma_w: ScalarLike = 1.0
    sigma_b: ScalarLike | None = None
    distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)
    mu_w: ScalarLike | None = None
    mu_b: ScalarLike | None = None
    bias_distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)

    @property
    def _law(self) -> dict[str, Any]:
        """The law of W, as a ``multiply`` takes it."""
        mean = {} if self.mu_w is None else {"mu_w": self.mu_w}
        law = {"sigma_w": self.sigma_w, "width": self.units, "distribution": self.distribution}
        return law | mean

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n_out"]:
        """Return W h + b."""
        # Without biases the key serves the weights alone: splitting takes time to compile.
        weights_key, bias_key = (key, key) if self.sigma_b is None else jax.random.split(key)
        out = multiply(weights_key, signal, **self._law)
        biases = (self.sigma_b, self.mu_b, self.bias_distribution)
        return add_bias(bias_key, out, multiply, *biases)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return σ_w² E[h_a h_b] + σ_b² (Poole et al. 2016, eq. 3), about means where there are."""
        out = multiply(kernel, **self._law)
        return out.with_bias(self.sigma_b, self.mu_b, self.bias_distribution)

    @property
    def homogeneous(self) -> bool:
        """Whether there is no bias."""
        return self.sigma_b is None and self.mu_b is None

    @property
    def is_layer(self) -> bool:
        """Whether its output is a product with its only random matrix: always."""
        return True

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """The law of W."""
        return (self.distribution,)

    def width_after(self, n_in: int) -> int:  # noqa: ARG002
        """Return the number of units."""
        return self.units

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shape of W."""
        return ((self.units, n_in),)

    def divide_widths(self, factor: int | Fraction) -> "Linear":
        """Return the layer with its units divided by ``factor``, σ_w and σ_b kept."""
        return dataclasses.replace(self, units=self.units // factor)


class AbstractLayer(AbstractBlock):
    """A layer of units: an activation, then one random matrix, that of its ``linear``."""

    activation: eqx.AbstractVar[Activation]

    @property
    @abc.abstractmethod
    def linear(self) -> Linear:
        """The random matrix and the biases."""

    def _as_linear(self) -> Linear:
        """The fields that a `Linear` has, as one."""
        return Linear(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Linear)})

    @property
    def homogeneous(self) -> bool:
        """Whether φ is positively homogeneous and there is no bias."""
        return self.activation.homogeneous and self.linear.homogeneous

    def homogeneous_if(self, activations: Callable[[Activation], bool]) -> bool:
        """Whether φ is positively homogeneous, by the function given, and there is no bias."""
        return activations(self.activation) and self.linear.homogeneous

    @property
    def is_layer(self) -> bool:
        """Whether its output is a product with its only random matrix: always."""
        return True

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """The law of W."""
        return self.linear.distributions

    def width_after(self, n_in: int) -> int:
        """Return the number of units."""
        return self.linear.width_after(n_in)

    def divide_widths(self, factor: int | Fraction) -> "AbstractLayer":
        """Return the layer with its units divided by ``factor``, σ_w and σ_b kept."""
        fewer: dict[str, Any] = {"units": self.linear.units // factor}
        return dataclasses.replace(self, **fewer)


class Dense(AbstractLayer):
    """z' = W φ(z) + b: `Activate`, then `Linear`, in one layer.

    At infinite width k' = σ_w² E[φ(u) φ(v)] + σ_b² (Poole et al. 2016, arXiv:1606.05340, eqs. 3
    and 5), and χ = σ_w² E[φ'²] (Schoenholz et al. 2017, arXiv:1611.01232, eq. 7).
    """

    activation: Activation = eqx.field(
        static=True, converter=activations.get, default=activations.tanh
    )
    units: int = eqx.field(static=True, default=100)
    sigma_w: ScalarLike = 1.0
    sigma_b: ScalarLike | None = None
    distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)
    mu_w: ScalarLike | None = None
    mu_b: ScalarLike | None = None
    bias_distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)

    @property
    def linear(self) -> Linear:
        """The layer without its activation."""
        return self._as_linear()

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n_out"]:
        """Return W φ(z) + b."""
        return self.linear.apply(self.activation(signal), multiply, key)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return σ_w² E[φ(u) φ(v)] + σ_b²."""
        return self.linear.kernel(kernel.through(self.activation), multiply)

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shape of W."""
        return self.linear.shapes(n_in)
