"""Layers that take two products with their signal: gated units, and the larger of two."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow import activations
from gradflow._checks import check_instance
from gradflow.blocks.base import AbstractBlock, AbstractComposite, Multiply
from gradflow.blocks.composition import Chain
from gradflow.blocks.dense import Activate, Linear
from gradflow.ensembles import Distribution
from gradflow.errors import InputError
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["Gated", "Maxout"]

_absolute = activations.leaky_relu(-1.0)


class Gated(AbstractComposite):
    """f(h) g(h), unit by unit: a value and its gate, which both get the layer's signal.

    Without arguments it is the gated linear unit (W h) σ(V h) (Dauphin et al. 2017,
    arXiv:1612.08083, eq. 1); with a gate of ``Activate(activations.silu)``, SwiGLU (Shazeer 2020,
    arXiv:2002.05202). Two branches with random matrices are independent, so that second moments
    multiply, k' = k_f k_g, and a gradient passes through either, χ = χ_f k_g + k_f χ_g.

    The value may be the signal itself, ``Chain(())``, beside a gate with a random matrix at its
    end. So is squeeze-and-excitation (Hu, Shen & Sun 2018, arXiv:1709.01507, eqs. 2 to 4), a gate
    of the mean over positions: ``Chain((GlobalMean(shape), Linear(m), Dense(relu, n), Activate(
    logistic), Upsample(one, shape)))`` with a ``one`` of as many 1s as the shape has axes.
    """

    value: AbstractBlock = Linear()
    gate: AbstractBlock = Chain((Linear(), Activate(activations.logistic)))

    def __check_init__(self) -> None:
        for name in ("value", "gate"):
            check_instance(name, getattr(self, name), AbstractBlock, "a block, as Dense()")
        if not self.gate.n_weights:
            raise InputError(
                "the gate of a gated layer has no random matrix; put a Linear or Dense block into "
                "it"
            )
        sites = [part.pool_factor for part in self.parts]
        if sites[0] != sites[1]:
            raise InputError(
                f"a gated layer's value makes one site of {sites[0]}, and its gate of {sites[1]}; "
                "both hand on equally many sites"
            )

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n_out"]:
        """Return f(h) g(h)."""
        value, gate = (
            part.apply(signal, multiply, jax.random.fold_in(key, number))
            for number, part in enumerate(self.parts)
        )
        return value * gate

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return the products of the second moments of value and gate."""
        value = self.value.kernel(kernel, multiply)
        return value.times(self.gate.kernel(kernel, multiply))

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: no, the gate depends on the signal's length."""
        return False

    def width_after(self, n_in: int) -> int:
        """Return the number of units of value and gate.

        Raises
        ------
        InputError
            If these numbers differ.
        """
        value, gate = (part.width_after(n_in) for part in self.parts)
        if value != gate:
            raise InputError(
                f"a gated layer's value has {value} units and its gate {gate}; each unit has a gate"
            )
        return value

    @property
    def pool_factor(self) -> int | Fraction:
        """The number of sites that value and gate make one of."""
        return self.value.pool_factor

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shapes of the value's random matrices, then those of the gate."""
        return self.value.shapes(n_in) + self.gate.shapes(n_in)

    def divide_widths(self, factor: int | Fraction) -> "Gated":
        """Return the block with the widths of value and gate divided by ``factor``."""
        return Gated(*(part.divide_widths(factor) for part in self.parts))


class Maxout(AbstractBlock):
    """max(u, v) of two products u = W h + b and v = V h + a (Goodfellow et al. 2013, section 3).

    (arXiv:1302.4389.) At infinite width, u and v are independent and Gaussian, so that
    max(u, v) = (u + v)/2 + |u - v|/2 has independent halves: the second of mean √(k/π), and both of
    second moment k/2. Lengths and gradients are those of one of the two products, χ = σ_w².
    """

    linear: AbstractBlock = Linear()

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n_out"]:
        """Return max(u, v)."""
        one, other = jax.random.split(key)
        return jnp.maximum(
            self.linear.apply(signal, multiply, one), self.linear.apply(signal, multiply, other)
        )

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return the moments of the two halves' sum."""
        one, other = (self.linear.kernel(kernel, multiply) for _ in range(2))
        half = one.plus(other).scaled(0.5)  # (u + v)/2, and in law (u - v)/2
        return half.plus(half.centred().renewed().through(_absolute))

    @property
    def homogeneous(self) -> bool:
        """Whether there is no bias."""
        return self.linear.homogeneous

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """The laws of W and V."""
        return 2 * self.linear.distributions

    @property
    def mixes_inputs(self) -> bool:
        """Whether its products mix inputs, as those of `networks.unit_variance` do."""
        return self.linear.mixes_inputs

    @property
    def mixes_sites(self) -> bool:
        """Whether its products mix sites."""
        return self.linear.mixes_sites

    @property
    def pool_factor(self) -> int | Fraction:
        """The number of sites that its products make one of."""
        return self.linear.pool_factor

    def width_after(self, n_in: int) -> int:
        """Return the number of units."""
        return self.linear.width_after(n_in)

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shapes of W and V."""
        return 2 * self.linear.shapes(n_in)

    def divide_widths(self, factor: int | Fraction) -> "Maxout":
        """Return the layer with its units divided by ``factor``, σ_w and σ_b kept."""
        return dataclasses.replace(self, linear=self.linear.divide_widths(factor))
