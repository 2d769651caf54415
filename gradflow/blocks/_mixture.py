"""Signals whose units are of several kinds, side by side: the law of a concatenation."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from gradflow.activations import Activation
from gradflow.errors import NoTheory
from gradflow.kernels import Gaussian, Kernel, Shifted, UnitDistribution

__all__ = ["Mixture"]


class Mixture(UnitDistribution):
    """The law of a unit that is of one of several kinds, each of which has its own kernel.

    A tangent's second moments differ from kind to kind too, and so are a memory of it: those of
    all, and those of each.

    Attributes
    ----------
    parts
        The kernels of the kinds, at scale 1.
    shares
        The share of units that are of each kind; of sum 1.
    """

    parts: tuple[Kernel, ...]
    shares: tuple[float, ...] = eqx.field(static=True)

    @classmethod
    def kernel(cls, kernels: Sequence[Kernel], shares: Sequence[float]) -> Kernel:
        """The kernel of all units, where a share of them has each of these kernels."""
        parts: list[tuple[Kernel, float]] = []
        plain = [kernel.plain() for kernel in kernels]
        for kernel, share in zip(plain, shares, strict=True):
            law = kernel.distribution
            if isinstance(law, Mixture):
                parts += [(p, share * s) for p, s in zip(law.parts, law.shares, strict=True)]
            else:
                parts.append((kernel.renewed(), share))

        def mean(moments: Sequence[Array]) -> Array:
            return jnp.asarray(sum(s * m for s, m in zip(shares, moments, strict=True)))

        tangents = [kernel.tangent for kernel in plain if kernel.tangent is not None]
        return Kernel.of(
            mean([kernel.covariance for kernel in plain]),
            mean([kernel.mean for kernel in plain]),
            tangent=mean(tangents) if len(tangents) == len(plain) else None,
            distribution=cls(tuple(p for p, _ in parts), tuple(s for _, s in parts)),
        )

    def mapped(self, kernel: Kernel, function: Callable[[Kernel], Kernel]) -> Kernel:
        """The kernel after a function of each unit by itself; ``kernel`` is before it.

        Raises
        ------
        NoTheory
            If a tangent is known of all units together alone.
        """
        if kernel.tangent is not None and any(part.tangent is None for part in self.parts):
            raise NoTheory(
                "a concatenation is handed on from one layer to the next, where sites mix; the "
                "theory of its gradients is known within one block: put the layers into one Chain"
            )
        return Mixture.kernel([function(part) for part in self.parts], self.shares)

    def through(self, kernel: Kernel, activation: Activation) -> Kernel:
        """The kernel of φ(z)."""
        return self.mapped(kernel, lambda part: part.through(activation))

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "Mixture":
        """The law of the signals times a factor."""
        return self._of_parts(lambda part: part.scaled(factor).plain())

    def at_scale(self, factor: Float[Array, " sites"]) -> "Mixture":
        """The law of signals in other units."""

        def in_units(part: Kernel) -> Kernel:
            pairs = jnp.outer(factor, factor)
            law = part.distribution.at_scale(factor)
            return Kernel.of(
                part.covariance * pairs, part.mean * factor, tangent=part.tangent, distribution=law
            )

        return self._of_parts(in_units)

    def less(self, mean: Float[Array, " sites"]) -> "Mixture":
        """The law of the signals less the mean of all."""

        def moved(part: Kernel) -> Kernel:
            centred, law = part.centred(mean), part.distribution
            law = Shifted.at(-mean) if isinstance(law, Gaussian) else law.less(mean)
            return Kernel.of(
                centred.covariance, centred.mean, tangent=part.tangent, distribution=law
            )

        return self._of_parts(moved)

    def initial_carry(self, kernel: Kernel) -> "Mixture":
        """The law of a kernel's signals, which are a concatenation of as many kinds.

        Raises
        ------
        NoTheory
            If they are not.
        """
        law = kernel.distribution
        if not isinstance(law, Mixture) or law.shares != self.shares:
            raise NoTheory(
                "a repeated block ends in a concatenation, and gets a signal that is none, or "
                "another; put a Linear or Convolution behind the concatenation"
            )
        return law

    @property
    def has_memory(self) -> bool:
        """Whether it has a memory of a tangent: yes, of each kind's."""
        return True

    @property
    def memory(self) -> Any:
        """The tangents of all kinds, or None where there are none."""
        tangents = tuple(part.tangents for part in self.parts)
        return None if any(tangent is None for tangent, _ in tangents) else tangents

    def with_memory(self, memory: Any) -> "Mixture":
        """The law with these tangents."""
        each = ((None, None),) * len(self.parts) if memory is None else memory
        parts = zip(self.parts, each, strict=True)
        return Mixture(tuple(part.with_tangents(own) for part, own in parts), self.shares)

    def memory_of_independent(self, tangent: Float[Array, " sites"]) -> Any:
        """The tangents of all kinds, where they are alike."""
        return tuple(
            (tangent, part.distribution.memory_of_independent(tangent)) for part in self.parts
        )

    def _of_parts(self, function: Callable[[Kernel], Kernel]) -> "Mixture":
        return Mixture(tuple(function(part).renewed() for part in self.parts), self.shares)
