"""The joint distribution over units of one unit's signals at all sites, beyond second moments."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, ScalarLike

from gradflow import ensembles, gaussian
from gradflow.activations import Activation
from gradflow.ensembles import Distribution
from gradflow.errors import NoTheory

__all__ = ["Gaussian", "Shifted", "UnitDistribution", "Unknown"]

# A `kernels.Kernel`, which is made of these and imports them.
_Kernel = Any


def _rules() -> dict[Distribution, tuple[np.ndarray, np.ndarray]]:
    """Values and chances of biases that are not Gaussian, at unit variance, by their law.

    Gauss-Legendre's, on both sides of a kink of the density.
    """
    x, weight = np.polynomial.legendre.leggauss(12)
    half = (x + 1) / 2
    triangular = np.concatenate([-half, half]), np.tile((1 - half) * weight / 2, 2)
    return {
        ensembles.uniform: (3**0.5 * x, weight / 2),
        ensembles.triangular: (6**0.5 * triangular[0], triangular[1]),
    }


_RULES = _rules()


class UnitDistribution(eqx.Module):
    """The joint distribution of a unit's signals at all sites, beyond their second moments.

    The methods that are not abstract are those of signals whose tangents are independent of them.
    """

    @abc.abstractmethod
    def through(self, kernel: _Kernel, activation: Activation) -> _Kernel:
        """The kernel of φ(z)."""

    @abc.abstractmethod
    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "UnitDistribution":
        """The distribution of the signals times a factor, a scalar or one for each site."""

    def initial_carry(self, kernel: _Kernel) -> "UnitDistribution":  # noqa: ARG002
        """The distribution of a kernel's signals as the carry of a loop that ends in this kind."""
        return Unknown()

    def at_scale(self, factor: Float[Array, " sites"]) -> "UnitDistribution":  # noqa: ARG002
        """The distribution where signals are given in other units, as a kernel's scale changes."""
        return self

    def less(self, mean: Float[Array, " sites"]) -> "UnitDistribution":  # noqa: ARG002
        """The distribution of the signals less these numbers, their means over units or 0."""
        return self

    def plus(self, other: "UnitDistribution") -> "UnitDistribution":  # noqa: ARG002
        """The distribution of the sum with signals that are independent or proportional."""
        return Unknown()

    @property
    def has_memory(self) -> bool:
        """Whether it describes a tangent by more than second moments."""
        return False

    @property
    def memory(self) -> Any:
        """Its description of a tangent beyond second moments: arrays, sites first; or None."""
        return None

    def with_memory(self, memory: Any) -> "UnitDistribution":  # noqa: ARG002
        """The same distribution with this `memory` of a tangent."""
        return self

    def memory_of_independent(self, tangent: Float[Array, " sites"]) -> Any:  # noqa: ARG002
        """The `memory` of a tangent of these second moments, independent of the signals."""
        return None


class Gaussian(UnitDistribution):
    """Jointly Gaussian of mean 0, as a product with a random matrix is."""

    def through(self, kernel: _Kernel, activation: Activation) -> _Kernel:
        """The kernel of φ(z): E[φ(z_a) φ(z_b)] and E[φ(z_a)]; tangents are multiplied by φ'(z)."""
        k, tangent = kernel.covariance, kernel.tangent
        if tangent is not None and tangent.ndim == 2:
            tangent = gaussian.derivative_kernel(activation, k) * tangent
        elif tangent is not None:
            tangent = gaussian.moment(activation, "dphi2", jnp.diagonal(k)) * tangent
        mean = gaussian.moment(activation, "phi", jnp.diagonal(k))
        return kernel.derived(gaussian.kernel(activation, k), mean, tangent, Unknown())

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "Gaussian":  # noqa: ARG002
        """A Gaussian distribution."""
        return self

    def initial_carry(self, kernel: _Kernel) -> UnitDistribution:
        """Gaussian if the kernel's signals are, else unknown."""
        return self if kernel.gaussian else Unknown()

    def plus(self, other: UnitDistribution) -> UnitDistribution:
        """Gaussian too, or about the other's means."""
        return other if isinstance(other, Gaussian | Shifted) else Unknown()


class Shifted(UnitDistribution):
    """Jointly Gaussian about means that a unit draws: s + u, u ~ N(0, k), s one of some values.

    A unit has one of them for all sites. Of several independent such s, as the biases of layers
    that are added, the sum is taken as Gaussian: beside W h, each is a share of 1/width of a
    signal's variance.

    Attributes
    ----------
    shifts, chances
        The values of s, and their probabilities, for each site.
    """

    shifts: Float[Array, "sites values"]
    chances: Float[Array, "sites values"]

    @classmethod
    def of_biases(
        cls,
        like: Float[Array, " sites"],
        sigma_b: ScalarLike | None,
        mu_b: ScalarLike | None,
        distribution: Distribution,
    ) -> "Shifted":
        """Biases of this deviation, mean and law, that the sites share; ``like`` has their shape.

        Raises
        ------
        NoTheory
            If the law is neither uniform nor triangular, and there is a deviation.
        """
        values, chances = np.zeros(1), np.ones(1)
        if sigma_b is not None:
            if distribution not in _RULES:
                raise NoTheory(
                    f"biases are {distribution.name!r}; the theory is of gaussian, uniform and "
                    "triangular ones"
                )
            values, chances = _RULES[distribution]
        ones = jnp.ones((len(like), 1), like.dtype)
        shifts = jnp.asarray(values[None], ones.dtype) * (1.0 if sigma_b is None else sigma_b)
        shifts = jnp.asarray(shifts + (0.0 if mu_b is None else mu_b))
        return cls(shifts * ones, jnp.asarray(chances[None], ones.dtype) * ones)

    @classmethod
    def at(cls, mean: Float[Array, " sites"]) -> "Shifted":
        """Gaussian signals about one mean."""
        return cls(mean[..., None], jnp.ones_like(mean[..., None]))

    @property
    def mean(self) -> Float[Array, " sites"]:
        """E[s]."""
        return jnp.sum(self.chances * self.shifts, axis=-1)

    def gaussian_part(self, covariance: Float[Array, "sites sites"]) -> Array:
        """The covariance of u, from the second moments of s + u."""
        spread = jnp.einsum(
            "ak,bk->ab", self.chances * self.shifts, self.shifts, precision="highest"
        )
        rest = covariance - spread
        return rest.at[jnp.diag_indices(len(rest))].set(jnp.maximum(jnp.diagonal(rest), 0))

    def with_values(self, count: int) -> "Shifted":
        """The distribution with so many values of s: these, or all at the mean."""
        if count == self.shifts.shape[-1]:
            return self
        mean = jnp.broadcast_to(self.mean[..., None], (*self.mean.shape, count))
        return Shifted(mean, jnp.full_like(mean, 1 / count))

    def through(self, kernel: _Kernel, activation: Activation) -> _Kernel:
        """The kernel of φ(z)."""
        law = (self.shifts, self.chances)
        k, tangent = self.gaussian_part(kernel.covariance), kernel.tangent
        if tangent is not None and tangent.ndim == 2:
            tangent = gaussian.shifted_kernel(activation, 1, *law, k) * tangent
        elif tangent is not None:
            own = jnp.diagonal(k)
            tangent = gaussian.shifted_moment(activation, "dphi2", *law, own) * tangent
        mean = gaussian.shifted_moment(activation, "phi", *law, jnp.diagonal(k))
        covariance = gaussian.shifted_kernel(activation, 0, *law, k)
        return kernel.derived(covariance, mean, tangent, Unknown())

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "Shifted":
        """The same about the means times the factor."""
        each = factor * jnp.ones_like(self.shifts[..., 0])
        return Shifted(self.shifts * each[..., None], self.chances)

    def at_scale(self, factor: Float[Array, " sites"]) -> "Shifted":
        """The same in other units."""
        return self.scaled(factor)

    def less(self, mean: Float[Array, " sites"]) -> "Shifted":
        """The same about other means."""
        return Shifted(self.shifts - mean[:, None], self.chances)

    def initial_carry(self, kernel: _Kernel) -> UnitDistribution:
        """The same kind with as many values."""
        law, count = kernel.distribution, self.shifts.shape[-1]
        if isinstance(law, Gaussian):
            return Shifted.at(jnp.zeros_like(kernel.mean)).with_values(count)
        return law.with_values(count) if isinstance(law, Shifted) else Unknown()

    def plus(self, other: UnitDistribution) -> UnitDistribution:
        """Gaussian about the sums of the means."""
        if isinstance(other, Gaussian):
            return self
        if not isinstance(other, Shifted):
            return Unknown()
        few, many = sorted((self, other), key=lambda law: law.shifts.shape[-1])
        if few.shifts.shape[-1] > 1:
            few, many = few.with_values(1), many.with_values(1)
        return Shifted(many.shifts + few.shifts, many.chances)


class Unknown(UnitDistribution):
    """Any other: second moments give those of products, normalised signals and sums, not of φ."""

    def through(self, kernel: _Kernel, activation: Activation) -> _Kernel:  # noqa: ARG002
        """Refuse.

        Raises
        ------
        NoTheory
            Always.
        """
        raise NoTheory(
            f"activation {activation.name!r} acts on a signal that is not Gaussian over units; the "
            "theory needs a random matrix (Linear, Dense) between two activations, and between a "
            "Dropout and an activation"
        )

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "Unknown":  # noqa: ARG002
        """An unknown distribution."""
        return self
