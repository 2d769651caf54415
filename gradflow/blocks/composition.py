"""Blocks made of blocks: one after another, and a branch beside the signal itself."""

import dataclasses
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow._checks import check_instance, check_sequence
from gradflow.activations import Activation
from gradflow.blocks.base import AbstractBlock, AbstractComposite, Multiply
from gradflow.blocks.dense import Dense, Linear
from gradflow.errors import InputError
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["Chain", "Residual"]


class Chain(AbstractComposite):
    """Blocks one after another, as one block (one layer of the network); of none, the identity."""

    parts: tuple[AbstractBlock, ...] = (Linear(), Dense())

    def __check_init__(self) -> None:
        for part in check_sequence("parts", self.parts, "a tuple of blocks"):
            check_instance("an entry of parts", part, AbstractBlock, "a block, as Linear(100)")

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites_out n_out"]:
        """Return the signal after all parts, each with a key of its own."""
        for number, part in enumerate(self.parts):
            signal = part.apply(signal, multiply, jax.random.fold_in(key, number))
        return signal

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Map a kernel through all parts."""
        for part in self.parts:
            kernel = part.kernel(kernel, multiply)
        return kernel

    @property
    def homogeneous(self) -> bool:
        """Whether all parts are."""
        return all(part.homogeneous for part in self.parts)

    def homogeneous_if(self, activations: Callable[[Activation], bool]) -> bool:
        """Whether all parts are."""
        return all(part.homogeneous_if(activations) for part in self.parts)

    def width_after(self, n_in: int) -> int:
        """Return the number of units that the last part hands on."""
        for part in self.parts:
            n_in = part.width_after(n_in)
        return n_in

    def divide_widths(self, factor: int | Fraction) -> "Chain":
        """Return the chain with the widths of its blocks divided by ``factor``."""
        return Chain(tuple(part.divide_widths(factor) for part in self.parts))


class Residual(AbstractComposite):
    """z' = λ z + α f(z), with a branch f that keeps the number of units; α and λ are fixed.

    A branch with a random matrix is independent of z, so that second moments add,
    k' = λ² k + α² k_f + λ α (m m_fᵀ + m_f mᵀ) with means m over units, and χ = λ² + α² χ_f (Yang &
    Schoenholz 2017, arXiv:1712.08969). α = 0 is ReZero's and SkipInit's start (Bachlechner et al.
    2021, arXiv:2003.04887; De & Smith 2020, arXiv:2002.10444). ``skip_scale`` is λ, 1 without it;
    DeepNorm's is (2 depth)^(1/4) (Wang et al. 2022, arXiv:2203.00555).
    """

    branch: AbstractBlock = Dense()
    scale: ScalarLike = 1.0
    skip_scale: ScalarLike | None = None

    def __check_init__(self) -> None:
        check_instance("branch", self.branch, AbstractBlock, "a block, as Dense() or a Chain")
        if not self.branch.n_weights:
            raise InputError(
                "a residual branch has no random matrix; put a Linear or Dense block into it"
            )
        if self.branch.pool_factor != 1:
            raise InputError(
                f"a residual branch makes one site of {self.branch.pool_factor}; what is added to "
                "the signal has as many as the signal"
            )

    def apply(
        self, signal: Float[Array, "sites n"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n"]:
        """Return λ z + α f(z)."""
        branch = self.branch.apply(signal, multiply, key)
        if self.skip_scale is not None:
            signal = jnp.asarray(self.skip_scale, signal.dtype) * signal
        return signal + jnp.asarray(self.scale, signal.dtype) * branch

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return the second moments of the sum, with the part of the signal that f(z) carries.

        Raises
        ------
        InputError
            If signal and branch are correlated in a way that is not known, as z + φ(z + …).
        """
        skip = kernel if self.skip_scale is None else kernel.scaled(self.skip_scale)
        return skip.plus(self.branch.kernel(kernel, multiply).scaled(self.scale))

    @property
    def homogeneous(self) -> bool:
        """Whether the branch is."""
        return self.branch.homogeneous

    def homogeneous_if(self, activations: Callable[[Activation], bool]) -> bool:
        """Whether the branch is."""
        return self.branch.homogeneous_if(activations)

    def width_after(self, n_in: int) -> int:
        """Return ``n_in``: the output has as many units as the signal.

        Raises
        ------
        InputError
            If the branch hands on another number.
        """
        n_out = self.branch.width_after(n_in)
        if n_out != n_in:
            raise InputError(
                f"a residual branch takes {n_in} units and hands on {n_out}; what is added to the "
                "signal has as many units as the signal"
            )
        return n_in

    def divide_widths(self, factor: int | Fraction) -> "Residual":
        """Return the block with the branch's widths divided by ``factor``, α and λ kept."""
        return dataclasses.replace(self, branch=self.branch.divide_widths(factor))
