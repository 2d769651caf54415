"""BatchNorm: normalisation of each unit's signal over the batch."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow import activations
from gradflow._norms import unit_rows
from gradflow.activations import Activation
from gradflow.blocks.base import AbstractBlock, Multiply
from gradflow.errors import InputError, NoTheory
from gradflow.gaussian import _batch
from gradflow.kernels import Kernel, Shifted, UnitDistribution, Unknown, multiply_kernel

__all__ = ["BatchNorm"]


class _BatchNormalised(UnitDistribution):
    """The law of γ ẑ, of a signal z that is Gaussian and has this covariance."""

    covariance: Float[Array, "sites sites"]
    tangent: Float[Array, "sites sites"] | None
    gain: ScalarLike

    def through(self, kernel: Kernel, activation: Activation) -> Kernel:  # noqa: ARG002
        """Return the kernel of φ(γ ẑ)."""
        averages = _batch.averages(activation, self.covariance, self.tangent, self.gain)
        return Kernel(*averages, Unknown())

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> UnitDistribution:
        """Return the law of a multiple."""
        if jnp.ndim(factor):
            return Unknown()
        return _BatchNormalised(self.covariance, self.tangent, factor * self.gain)


class BatchNorm(AbstractBlock):
    """γ (z - m)/s, m and s² mean and variance of each unit's z over the batch, all its inputs.

    (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1, in training, without ε.) The batch is all
    inputs that go through the network together. The gradient explodes with depth: at a batch of B,
    χ = (B - 2)/(B - 3) without an activation, and π/(π - 1) for ReLU and B → ∞ (Yang et al. 2019,
    arXiv:1902.08129). The theory is of a signal that is Gaussian over units (`gaussian._batch`). A
    unit that is the same for all inputs becomes 0.
    """

    gain: ScalarLike = 1.0

    def apply(
        self,
        signal: Float[Array, "batch n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "batch n"]:
        """Return every unit at mean 0 and standard deviation γ over the batch.

        Raises
        ------
        InputError
            If the batch is one input.
        """
        if signal.shape[0] < 2:
            raise InputError(
                "inputs has one input, and BatchNorm makes 0 of it; give it a batch, of 4 or more "
                "for the theory to have an answer"
            )
        rows, _ = unit_rows((signal - jnp.mean(signal, axis=0, keepdims=True)).T)
        return jnp.asarray(self.gain, signal.dtype) * math.sqrt(signal.shape[0]) * rows.T

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return the kernel of γ ẑ.

        Raises
        ------
        NoTheory
            If the signal is not Gaussian over units.
        InputError
            If the batch has fewer than 4 inputs.
        """
        kernel = kernel.common()
        law, known = kernel.distribution, kernel.covariance
        if isinstance(law, Shifted):
            # A unit's mean that all inputs have goes away with that over the batch.
            apart = law.shifts - jnp.mean(law.shifts, axis=0, keepdims=True)
            alike = jnp.max(jnp.abs(apart)) <= 1e-6 * jnp.max(jnp.abs(law.shifts))
            known = jnp.where(alike, law.gaussian_part(known), jnp.nan)
        elif not kernel.gaussian:
            raise NoTheory(
                "BatchNorm gets a signal that is not Gaussian over units; the theory needs it "
                "before the activation, after a random matrix"
            )
        law = _BatchNormalised(known, kernel.tangent, self.gain)
        through = law.through(kernel, activations.linear)
        out = kernel.derived(through.covariance, through.mean, through.tangent, law)
        return out.relative_to(kernel)

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: no, the result has always the same length."""
        return False

    @property
    def mixes_inputs(self) -> bool:
        """Whether it mixes inputs: yes, an input's signal depends on the whole batch."""
        return True
