"""Normalisation of signals: of each input's over the units, or of the whole batch's at once."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow._norms import unit_rows
from gradflow.blocks.base import AbstractBlock, Multiply
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["LayerNorm", "RMSNorm", "UnitVariance"]


class RMSNorm(AbstractBlock):
    """γ z / √((1/n) Σ_i z_i²), for each input (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    At infinite width γ z/√q, and χ = γ²/q; the part of a gradient along z, which it removes, is
    1/n of it. There is no ε: a signal of zeros stays, and any other comes out at length γ√n.
    """

    gain: ScalarLike = 1.0

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites n"]:
        """Return the signals at root mean square γ."""
        return _at_root_mean_square(self.gain, signal)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return γ² k_ab/√(k_aa k_bb)."""
        return _at_unit_variance(self.gain, kernel)

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: no, the result has always the same length."""
        return False


class LayerNorm(AbstractBlock):
    """γ (z - m)/s, m and s² mean and variance of z over units, for each input.

    (Ba, Kiros & Hinton 2016, arXiv:1607.06450, eq. 3.) At infinite width χ = γ²/Var z. After a
    random matrix the mean is 0 and it is `RMSNorm`; after an activation it is not. There is no ε: a
    signal of zero variance becomes 0.
    """

    gain: ScalarLike = 1.0

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites n"]:
        """Return the signals at mean 0 and standard deviation γ."""
        return _at_root_mean_square(self.gain, signal - jnp.mean(signal, axis=1, keepdims=True))

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return γ² Cov(z_a, z_b)/√(Var z_a Var z_b)."""
        return _at_unit_variance(self.gain, kernel.centred())

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: no, the result has always the same length."""
        return False


class UnitVariance(AbstractBlock):
    """z/s, s² the variance of z over all units and inputs: weights as LSUV starts them.

    (Mishkin & Matas 2016, arXiv:1511.06422, algorithm 1.) Behind a layer's product it has the
    effect of dividing the layer's weights by s, once: s is one number for each random network, and
    a constant to gradients, so that χ = 1/s². `simulation.propagation.lsuv` returns the scales.
    A signal without variance becomes 0.
    """

    def apply(
        self,
        signal: Float[Array, "batch n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "batch n"]:
        """Return the signals at variance 1."""
        _, log = unit_rows((signal - jnp.mean(signal)).reshape(1, -1))
        inverse = jnp.where(jnp.isneginf(log), 0, math.sqrt(signal.size) * jnp.exp(-log))
        return jax.lax.stop_gradient(inverse)[:, None] * signal

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Divide all second moments by the variance over the batch."""
        kernel = kernel.common()
        variance = jnp.mean(jnp.diagonal(kernel.covariance)) - jnp.mean(kernel.mean) ** 2
        return kernel.normalised(variance)

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: no, the result has always the same variance."""
        return False

    @property
    def rescales_weights(self) -> bool:
        """Whether it stands for the scale of weights before it: yes."""
        return True

    @property
    def mixes_inputs(self) -> bool:
        """Whether it mixes inputs: yes, there is one scale for the whole batch."""
        return True


def _at_root_mean_square(gain: ScalarLike, signal: Array) -> Array:
    rows, _ = unit_rows(signal)
    return jnp.asarray(gain, signal.dtype) * math.sqrt(signal.shape[1]) * rows


def _at_unit_variance(gain: ScalarLike, kernel: Kernel) -> Kernel:
    # Of a batch-normalised signal this leaves the moments alone: its law scales as a whole only.
    return kernel.normalised(jnp.diagonal(kernel.covariance)).scaled(gain)
