"""Paths side by side: several blocks that all get one signal, concatenated or added.

The identity is a path, ``Chain(())``; so that nested paths make any graph without loops, as
DenseNet's and U-Net's.
"""

import functools
from collections.abc import Callable
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow._checks import check_count, check_instance, check_sequence
from gradflow.activations import Activation
from gradflow.blocks._mixture import Mixture
from gradflow.blocks.base import AbstractBlock, AbstractComposite, Multiply
from gradflow.blocks.dense import Dense, Linear
from gradflow.errors import InputError
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["Concatenate", "Sum"]


class _Paths(AbstractComposite):
    """Blocks that all get one signal."""

    parts: eqx.AbstractVar[tuple[AbstractBlock, ...]]

    def __check_init__(self) -> None:
        for part in check_sequence("parts", self.parts, "a tuple of blocks"):
            check_instance("an entry of parts", part, AbstractBlock, "a block, as Linear(100)")
        factors = {part.pool_factor for part in self.parts}
        if len(factors) != 1:
            each = ", ".join(str(part.pool_factor) for part in self.parts)
            raise InputError(
                f"paths make one site of {each or 'nothing'}; there is one at least, and all hand "
                "on equally many sites"
            )

    def _applied(self, signal: Array, multiply: Multiply, key: PRNGKeyArray) -> list[Array]:
        return [
            part.apply(signal, multiply, jax.random.fold_in(key, number))
            for number, part in enumerate(self.parts)
        ]

    @property
    def homogeneous(self) -> bool:
        """Whether all paths are."""
        return all(part.homogeneous for part in self.parts)

    def homogeneous_if(self, activations: Callable[[Activation], bool]) -> bool:
        """Whether all paths are."""
        return all(part.homogeneous_if(activations) for part in self.parts)

    @property
    def pool_factor(self) -> int | Fraction:
        """The number of sites that each path makes one of."""
        return self.parts[0].pool_factor

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shapes of all paths' random matrices, in order."""
        return tuple(shape for part in self.parts for shape in part.shapes(n_in))


class Sum(_Paths):
    """f(z) + g(z) + …: paths that are added, of equally many units.

    Second moments of paths with random matrices of their own add, with the products of means over
    units; what two paths share is added before it is squared (`kernels`). A path ends in a random
    matrix, or is the signal itself. `Residual` is the sum with the signal, with scales.
    """

    parts: tuple[AbstractBlock, ...] = (Linear(), Dense())

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites_out n_out"]:
        """Return the sum of all paths."""
        first, *more = self._applied(signal, multiply, key)
        return sum(more, first)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return the second moments of the sum.

        Raises
        ------
        NoTheory
            If two paths are correlated in a way that is not known, as z + φ(z).
        """
        return functools.reduce(Kernel.plus, [part.kernel(kernel, multiply) for part in self.parts])

    def width_after(self, n_in: int) -> int:
        """Return the number of units of every path.

        Raises
        ------
        InputError
            If these numbers differ.
        """
        widths = [part.width_after(n_in) for part in self.parts]
        if len(set(widths)) > 1:
            raise InputError(
                f"paths that are added hand on {', '.join(map(str, widths))} units; they are "
                "equally many"
            )
        return widths[0]

    def divide_widths(self, factor: int | Fraction) -> "Sum":
        """Return the block with the widths of its paths divided by ``factor``."""
        return Sum(tuple(part.divide_widths(factor) for part in self.parts))


class Concatenate(_Paths):
    """(f(z), g(z), …), the units of several paths side by side, as in DenseNet and U-Net.

    (Huang et al. 2017, arXiv:1608.06993; Ronneberger, Fischer & Brox 2015, arXiv:1505.04597.)
    ``(Chain(()), f)`` keeps the signal beside f's. Second moments are those of each path, in the
    shares of units that it has, whose number depends on ``units_in``, that of the signal. Behind
    it an activation, a `BatchNorm` or a product acts on each path's units by its own law.
    """

    parts: tuple[AbstractBlock, ...] = (Linear(50), Dense(units=50))
    units_in: int = eqx.field(static=True, default=100)

    def __check_init__(self) -> None:
        check_count("units_in", self.units_in)

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites_out n_out"]:
        """Return all paths' units side by side."""
        return jnp.concatenate(self._applied(signal, multiply, key), axis=1)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return the second moments over all units, and the law that they have."""
        kernels = [part.kernel(kernel, multiply) for part in self.parts]
        if len(kernels) == 1:
            return kernels[0]
        widths = [part.width_after(self.units_in) for part in self.parts]
        out = Mixture.kernel(kernels, [width / sum(widths) for width in widths])
        return out.as_function_of(*kernels, distribution=out.distribution)

    @property
    def width_in(self) -> int:
        """The number of units that it takes, ``units_in``."""
        return self.units_in

    def width_after(self, n_in: int) -> int:
        """Return the number of units of all paths together.

        Raises
        ------
        InputError
            If ``n_in`` is another number than ``units_in``.
        """
        if n_in != self.units_in:
            raise InputError(
                f"a Concatenate of units_in {self.units_in} gets {n_in} units; the share that "
                "each path has depends on their number"
            )
        return sum(part.width_after(n_in) for part in self.parts)

    def divide_widths(self, factor: int | Fraction) -> "Concatenate":
        """Return the block with all its widths, and the signal's, divided by ``factor``."""
        parts = tuple(part.divide_widths(factor) for part in self.parts)
        return Concatenate(parts, int(self.units_in // factor))
