"""BatchNorm: normalisation of each unit's signal over the batch, or over an input's positions."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow import activations
from gradflow.activations import Activation
from gradflow.blocks._mixture import Mixture
from gradflow.blocks._norm import AbstractNorm
from gradflow.blocks._positions import count_inputs, count_positions, lengths
from gradflow.blocks.base import Multiply
from gradflow.errors import InputError, NoTheory
from gradflow.gaussian import _batch
from gradflow.kernels import Kernel, Shifted, UnitDistribution, Unknown, multiply_kernel

__all__ = ["BatchNorm", "InstanceNorm"]


class _BatchNormalised(UnitDistribution):
    """The law of γ ẑ, of a signal z that is Gaussian and has this covariance; ε in its units."""

    covariance: Float[Array, "sites sites"]
    tangent: Float[Array, "sites sites"] | None
    gain: ScalarLike
    epsilon: ScalarLike | None

    def through(self, kernel: Kernel, activation: Activation) -> Kernel:  # noqa: ARG002
        """Return the kernel of φ(γ ẑ)."""
        averages = _batch.averages(
            activation, self.covariance, self.tangent, self.gain, self.epsilon
        )
        return Kernel(*averages, Unknown())

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> UnitDistribution:
        """Return the law of a multiple."""
        if jnp.ndim(factor):
            return Unknown()
        return dataclasses.replace(self, gain=factor * self.gain)


class _OverSites(AbstractNorm):
    """γ (z - m)/√(s² + ε), m and s² of each unit by itself, over sites."""

    def _batch_kernel(self, kernel: Kernel) -> Kernel:
        if isinstance(kernel.distribution, Mixture):  # of each kind of unit by itself
            out = kernel.distribution.mapped(kernel, self._batch_kernel)
            return out.as_function_of(kernel, distribution=out.distribution)
        kernel = kernel.common()
        law, known = kernel.distribution, kernel.covariance
        name = type(self).__name__
        if isinstance(law, Shifted):
            # A unit's mean that all sites have goes away with that over them.
            apart = law.shifts - jnp.mean(law.shifts, axis=0, keepdims=True)
            alike = jnp.max(jnp.abs(apart)) <= 1e-6 * jnp.max(jnp.abs(law.shifts))
            known = jnp.where(alike, law.gaussian_part(known), jnp.nan)
        elif not kernel.gaussian:
            raise NoTheory(
                f"{name} gets a signal that is not Gaussian over units; the theory needs it "
                "before the activation, after a random matrix"
            )
        epsilon = None
        if self.epsilon is not None:
            epsilon = jnp.asarray(self.epsilon * jnp.exp(-2 * kernel.log_scale[0]))
            epsilon = jnp.where(jnp.isfinite(epsilon), epsilon, jnp.nan)
        law = _BatchNormalised(known, kernel.tangent, self.gain, epsilon)
        through = law.through(kernel, activations.linear)
        out = kernel.derived(through.covariance, through.mean, through.tangent, law)
        return out.relative_to(kernel)


class BatchNorm(_OverSites):
    """γ (z - m)/√(s² + ε), m and s² mean and variance of each unit's z over the batch, all inputs.

    (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1, in training.) The batch is all inputs that
    go through the network together. The gradient explodes with depth: at a batch of B,
    χ = (B - 2)/(B - 3) without an activation, and π/(π - 1) for ReLU and B → ∞ (Yang et al. 2019,
    arXiv:1902.08129). The theory is of a signal that is Gaussian over units (`gaussian._batch`);
    with an ``epsilon``, of homogeneous activations. Without it a unit that is the same for all
    inputs becomes 0.
    """

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
        return self._normalised((signal - jnp.mean(signal, axis=0, keepdims=True)).T).T

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return the kernel of γ ẑ.

        Raises
        ------
        NoTheory
            If the signal is not Gaussian over units.
        InputError
            If the batch has fewer than 4 inputs.
        """
        return self._batch_kernel(kernel)

    @property
    def mixes_inputs(self) -> bool:
        """Whether it mixes inputs: yes, an input's signal depends on the whole batch."""
        return True


class InstanceNorm(_OverSites):
    """γ (z - m)/√(s² + ε), m and s² of each unit's z over the positions of each input by itself.

    (Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.) Positions are those of ``shape``, as for
    `Convolution`. It is `BatchNorm` of a batch that is an input's positions, and the theory that of
    one input: of several, each divided by a random number of its own, none is known.
    """

    shape: tuple[int, ...] = eqx.field(static=True, default=(6,), converter=lengths)

    def __check_init__(self) -> None:
        if count_positions(self.shape) < 2:
            raise InputError(
                f"shape is {self.shape}, and InstanceNorm makes 0 of a single position; it has 2 "
                "or more"
            )

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites n"]:
        """Return every unit at mean 0 and standard deviation γ over each input's positions."""
        inputs = count_inputs(len(signal), self.shape)
        by_unit = signal.reshape(inputs, -1, signal.shape[1]).swapaxes(1, 2)
        rows = by_unit.reshape(-1, by_unit.shape[2])
        rows = self._normalised(rows - jnp.mean(rows, axis=1, keepdims=True))
        return rows.reshape(by_unit.shape).swapaxes(1, 2).reshape(signal.shape)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return the kernel of γ ẑ.

        Raises
        ------
        NoTheory
            If there are several inputs, or the signal is not Gaussian over units.
        InputError
            If an input has fewer than 4 positions.
        """
        inputs = count_inputs(len(kernel.mean), self.shape)
        if inputs > 1:
            raise NoTheory(
                f"InstanceNorm gets {inputs} inputs, each divided by a deviation of its own; the "
                "theory is of one input"
            )
        return self._batch_kernel(kernel)

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: yes, all positions of an input."""
        return True
