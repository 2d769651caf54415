"""Gram: what is known, at infinite width, of the signals of one layer; the state of the theory.

Blocks map one `Gram` to the next. It holds second moments over units of the signals and of a
*tangent*, a small change of the signals in a generic direction. A block maps the tangent's second
moments linearly (a dense layer multiplies them by σ_w² E[φ'²]), and the transpose of that map takes
the gradient's second moments down: χ. So nothing backward is written for a block.
"""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from gradflow import activations, gaussian
from gradflow.activations import Activation
from gradflow.ensembles import Distribution
from gradflow.errors import InputError

__all__ = ["AbstractLaw", "Gaussian", "Gram", "Unknown", "inverse_or_zero", "multiply_gram"]


class AbstractLaw(eqx.Module):
    """The joint law of a unit's signals at all sites, beyond their second moments.

    What is not abstract here is answered for a law of signals whose tangents are independent of
    them, and that no loop carries.
    """

    @abc.abstractmethod
    def through(self, gram: "Gram", activation: Activation) -> "Gram":
        """Return what is known of φ(z)."""

    @abc.abstractmethod
    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "AbstractLaw":
        """Return the law of the signals times a factor, a scalar or one for each site."""

    def begun(self, gram: "Gram") -> "AbstractLaw":  # noqa: ARG002
        """Return the law of these signals as a loop carries it that ends in a law like this."""
        return Unknown()

    @property
    def remembers(self) -> bool:
        """Whether it knows more of a tangent than second moments."""
        return False

    @property
    def memory(self) -> Any:
        """What it knows of a tangent beyond second moments: arrays, sites first; or None."""
        return None

    def taking(self, memory: Any) -> "AbstractLaw":  # noqa: ARG002
        """Return it with this known of a tangent beyond second moments."""
        return self

    def independent(self, tangent: Float[Array, " sites"]) -> Any:  # noqa: ARG002
        """Return what it knows of a tangent that is independent of the signals."""
        return None


class Gaussian(AbstractLaw):
    """Jointly Gaussian of mean 0, as a product with a random matrix is."""

    def through(self, gram: "Gram", activation: Activation) -> "Gram":
        """Return E[φ(z_a) φ(z_b)] and E[φ(z_a)]; tangents are multiplied by φ'(z)."""
        k, tangent = gram.covariance, gram.tangent
        if tangent is not None and tangent.ndim == 2:
            tangent = gaussian.derivative_kernel(activation, k) * tangent
        elif tangent is not None:
            tangent = gaussian.moment(activation, "dphi2", jnp.diagonal(k)) * tangent
        mean = gaussian.moment(activation, "phi", jnp.diagonal(k))
        return Gram(gaussian.kernel(activation, k), mean, tangent, Unknown())

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "Gaussian":  # noqa: ARG002
        """Return a Gaussian law."""
        return self

    def begun(self, gram: "Gram") -> AbstractLaw:
        """Return the signals' law, if it is Gaussian."""
        return self if gram.gaussian else Unknown()


class Unknown(AbstractLaw):
    """Any other: second moments suffice to multiply, to normalise and to add, but not for a φ."""

    def through(self, gram: "Gram", activation: Activation) -> "Gram":  # noqa: ARG002
        """Refuse.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(
            f"activation {activation.name!r} acts on a signal that is not Gaussian over units; the "
            "theory needs a random matrix (Linear, Dense) between two activations, and between a "
            "Dropout and an activation"
        )

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "Unknown":  # noqa: ARG002
        """Return an unknown law."""
        return self


class Gram(eqx.Module):
    """Moments over the units of an infinitely wide layer.

    Attributes
    ----------
    covariance
        Shape (sites, sites): second moments E[z_a z_b]; the diagonal is each input's q.
    mean
        Shape (sites,): E[z_a]; 0 after a random matrix, E[φ] after an activation.
    tangent
        Second moments of a tangent u that is independent of the units' signals and of mean 0:
        shape (sites,), E[u_a²], where sites do not mix; (sites, sites), E[u_a u_b], where they do;
        None on a walk that needs no gradients.
    law
        What else is known of a unit's signals.
    """

    covariance: Float[Array, "sites sites"]
    mean: Float[Array, " sites"]
    tangent: Float[Array, "..."] | None = None
    law: AbstractLaw = Gaussian()

    @classmethod
    def of(
        cls, covariance: Float[Array, "sites sites"], mean: Float[Array, " sites"] | None = None
    ) -> "Gram":
        """Return what is known of signals with these moments, Gaussian to a φ that acts on them."""
        mean = jnp.zeros_like(jnp.diagonal(covariance)) if mean is None else mean
        return cls(covariance, mean)

    @property
    def tangents(self) -> tuple[Any, Any]:
        """All that is known of a tangent: second moments, and what the law remembers, or None."""
        return self.tangent, self.law.memory

    def with_tangents(self, tangents: tuple[Any, Any]) -> "Gram":
        """Return it with this known of a tangent."""
        tangent, memory = tangents
        return dataclasses.replace(self, tangent=tangent, law=self.law.taking(memory))

    @property
    def gaussian(self) -> bool:
        """Whether the signals are known to be Gaussian over units."""
        return isinstance(self.law, Gaussian)

    def through(self, activation: Activation) -> "Gram":
        """Return what is known of φ(z).

        Raises
        ------
        InputError
            If the signals' law is not known.
        """
        return self if activation == activations.linear else self.law.through(self, activation)

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "Gram":
        """Return what is known of the signals times a factor, a scalar or one for each site."""
        rows = jnp.asarray(factor * jnp.ones_like(self.mean))
        tangent = self.tangent
        if tangent is not None:
            tangent = tangent * (rows**2 if tangent.ndim == 1 else jnp.outer(rows, rows))
        return Gram(
            self.covariance * jnp.outer(rows, rows),
            self.mean * rows,
            tangent,
            self.law.scaled(factor),
        )

    def centred(self) -> "Gram":
        """Return what is known of z - E[z], the mean taken over units."""
        covariance = self.covariance - jnp.outer(self.mean, self.mean)
        return Gram(covariance, jnp.zeros_like(self.mean), self.tangent, self.law)

    def shifted(self, variance: ScalarLike) -> "Gram":
        """Return what is known of z + b, b ~ N(0, variance) for each unit, shared by the sites."""
        return dataclasses.replace(self, covariance=self.covariance + variance)

    def plus(self, other: "Gram") -> "Gram":
        """Return what is known of the sum with signals that are independent of these."""
        cross = jnp.outer(self.mean, other.mean)
        tangent = None
        if self.tangent is not None and other.tangent is not None:
            tangent = self.tangent + other.tangent
        law = Gaussian() if self.gaussian and other.gaussian else Unknown()
        covariance = self.covariance + other.covariance + cross + cross.T
        return Gram(covariance, self.mean + other.mean, tangent, law)

    def times(self, other: "Gram") -> "Gram":
        """Return what is known of the product, unit by unit, with signals independent of these."""
        tangent = None
        if self.tangent is not None and other.tangent is not None:

            def seen_by(tangent: Array, k: Array) -> Array:
                return tangent * (k if tangent.ndim == 2 else jnp.diagonal(k))

            # (u z)' = u' z + u z'; tangents have mean 0, so that the two do not correlate.
            tangent = seen_by(self.tangent, other.covariance)
            tangent = tangent + seen_by(other.tangent, self.covariance)
        return Gram(self.covariance * other.covariance, self.mean * other.mean, tangent, Unknown())

    def settled(self, ends: AbstractLaw) -> "Gram":
        """Return it with its law as a loop carries it that ends in the law ``ends``."""
        return dataclasses.replace(self, law=ends.begun(self))


def multiply_gram(
    gram: Gram,
    *,
    sigma_w: ScalarLike,
    distribution: Distribution,
    tap: Float[Array, "..."] | None = None,
    seen: Gram | None = None,
    **_: object,
) -> Gram:
    """Return what is known of W x: second moments σ_w² E[x_a x_b], and a Gaussian law.

    Weights whose rows sum to 0 see what differs from the mean over units alone.

    ``tap`` is a zero, or one for each site, to differentiate by: the second moment, times fan_in,
    of a small random change of W. A gradient of W x with second moments Λ then has the cotangent
    Σ_ab Λ_ab E[x_a x_b], the variance of a component of ∂C/∂W (Glorot & Bengio 2010, eqs. 3 and 7),
    as in a simulation (`simulation.samplers`). Where W is a part of a larger matrix, all of it gets
    ``seen``.
    """
    passed = gram.centred() if distribution.centred else gram
    scale = jnp.square(sigma_w)
    tangent = passed.tangent
    if tangent is not None:
        tangent = scale * tangent
        if tap is not None:
            # Whatever the weights' rows sum to, ∂C/∂W = δ xᵀ.
            k = (gram if seen is None else seen).covariance
            tangent = tangent + tap * (jnp.diagonal(k) if tangent.ndim == 1 else k)
    return Gram(scale * passed.covariance, jnp.zeros_like(gram.mean), tangent, Gaussian())


def inverse_or_zero(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return 1/x, and 0 where x = 0: a signal without variance stays 0 when it is normalised."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
