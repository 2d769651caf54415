"""Normalisation of signals: of each input's over the units, or of the whole batch's at once.

Libraries divide by √(s² + ε), with ε = 1e-5 (PyTorch), 1e-6 (Flax) or 1e-3 (Keras): ``epsilon``.
Without it there is no ε, and signals are normalised whatever their size; a signal of zero variance
becomes 0. With it the factors below have q + ε for q.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow._checks import check_count
from gradflow._norms import unit_rows
from gradflow.blocks._norm import AbstractNorm
from gradflow.blocks._positions import count_inputs, count_positions, lengths
from gradflow.blocks.base import AbstractBlock, Multiply
from gradflow.errors import InputError
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm", "UnitVariance"]


class RMSNorm(AbstractNorm):
    """γ z / √((1/n) Σ_i z_i² + ε), for each input (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    At infinite width γ z/√q, and χ = γ²/q; the part of a gradient along z, which it removes, is
    1/n of it. Without ε any signal but zeros comes out at length γ√n.
    """

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites n"]:
        """Return the signals at root mean square γ."""
        return self._normalised(signal)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return γ² k_ab/√(k_aa k_bb)."""
        return self._normalised_kernel(kernel)


class LayerNorm(AbstractNorm):
    """γ (z - m)/√(s² + ε), m and s² mean and variance of z over units, for each input.

    (Ba, Kiros & Hinton 2016, arXiv:1607.06450, eq. 3.) At infinite width χ = γ²/Var z. After a
    random matrix the mean is 0 and it is `RMSNorm`; after an activation it is not.
    """

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites n"]:
        """Return the signals at mean 0 and standard deviation γ."""
        return self._normalised(signal - jnp.mean(signal, axis=1, keepdims=True))

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return γ² Cov(z_a, z_b)/√(Var z_a Var z_b)."""
        return self._normalised_kernel(kernel.centred())


class GroupNorm(AbstractNorm):
    """γ (z - m)/√(s² + ε), m and s² over the units of a group and an input's positions.

    (Wu & He 2018, arXiv:1803.08494, eqs. 1 and 2.) The units are in ``groups`` of equally many, and
    the positions are those of ``shape``, as for `Convolution`; one group is layer normalisation
    over positions and units together. Theory is the limit of many units in every group, where all
    groups have the mean and variance of all units: χ = γ²/Var z, the variance over positions too.
    """

    groups: int = eqx.field(static=True, default=1)
    shape: tuple[int, ...] = eqx.field(static=True, default=(1,), converter=lengths)

    def __check_init__(self) -> None:
        check_count("groups", self.groups)
        count_positions(self.shape)

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites n"]:
        """Return each group at mean 0 and standard deviation γ over units and positions."""
        inputs, units = count_inputs(len(signal), self.shape), signal.shape[1]
        self.width_after(units)
        grouped = signal.reshape(inputs, -1, self.groups, units // self.groups).swapaxes(1, 2)
        rows = grouped.reshape(inputs * self.groups, -1)
        rows = self._normalised(rows - jnp.mean(rows, axis=1, keepdims=True))
        return rows.reshape(grouped.shape).swapaxes(1, 2).reshape(signal.shape)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return γ² Cov/Var, with the mean and the variance over an input's positions too."""
        positions = math.prod(self.shape)
        if positions == 1:
            return self._normalised_kernel(kernel.centred())
        count_inputs(len(kernel.mean), self.shape)
        kernel = kernel.common()

        def over_positions(x: Array) -> Array:
            return jnp.repeat(jnp.mean(x.reshape(-1, positions), axis=1), positions)

        kernel = kernel.centred(over_positions(kernel.mean))
        variance = over_positions(jnp.diagonal(kernel.covariance))
        return kernel.normalised(variance, self.epsilon).scaled(self.gain)

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: those of an input, where there are several."""
        return math.prod(self.shape) > 1

    def width_after(self, n_in: int) -> int:
        """Return the number of units.

        Raises
        ------
        InputError
            If they are no multiple of the groups.
        """
        if n_in % self.groups:
            raise InputError(
                f"groups is {self.groups}, and the signal has {n_in} units; it divides their number"
            )
        return n_in


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
