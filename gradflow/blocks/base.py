"""What a block is: one step up the network, defined once and read twice."""

import abc
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow.activations import Activation
from gradflow.ensembles import Distribution
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["AbstractBlock", "AbstractComposite", "add_bias", "each_step"]

Multiply = Callable[..., Any]


def each_step(key: PRNGKeyArray, multiply: Multiply) -> PRNGKeyArray:
    """Return the key for what is drawn anew at every time step, as masks and inputs are.

    Where layers share their weights they share the key that a block is applied with, and the
    ``multiply`` that they are given has a ``step``.
    """
    step = getattr(multiply, "step", None)
    return key if step is None else jax.random.fold_in(key, step)


def add_bias(
    key: PRNGKeyArray,
    signal: Float[Array, "sites n"],
    sigma_b: ScalarLike | None,
    multiply: Multiply,
) -> Float[Array, "sites n"]:
    """Return z + b with b ~ N(0, σ_b²), shared by the sites; z itself where there is no σ_b.

    A ``multiply`` that holds a network's parameters has a ``bias``, which is told how b is drawn
    and says what it is.
    """
    if sigma_b is None:
        return signal

    def draw() -> Array:
        normal = jax.random.normal(key, (1, signal.shape[1]), signal.dtype)
        return jnp.asarray(sigma_b, signal.dtype) * normal

    bias = getattr(multiply, "bias", None)
    return signal + (draw() if bias is None else bias(draw))


class AbstractBlock(eqx.Module):
    """One step up the network, z^{l-1} -> z^l.

    What is not abstract here is answered for a block that has no random matrix and acts on every
    site by itself.
    """

    @abc.abstractmethod
    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites_out n_out"]:
        """Return the next signal in one random network.

        ``multiply(key, x, sigma_w=…, width=…, distribution=…)`` is x Wᵀ, where W has shape
        (width, n_in), mean 0 and variance σ_w²/n_in; the sampler that runs the block supplies it.
        All other randomness comes from the key, and is the same when the block is applied again:
        biases from the key itself, by `add_bias`, and what is no parameter from `each_step` of it.
        Where W is a part of a larger matrix, the rest of which is zero, ``full_input=…`` is what
        all of it gets: its gradient is δ seenᵀ.
        """

    @abc.abstractmethod
    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return what is known after the block from what is known before it, at infinite width."""

    @property
    @abc.abstractmethod
    def homogeneous(self) -> bool:
        """Whether block(a·z) = a·block(z) for every a > 0."""

    def homogeneous_if(self, activations: Callable[[Activation], bool]) -> bool:  # noqa: ARG002
        """Whether it is `homogeneous`, if the activations are that this says yes to."""
        return self.homogeneous

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """The laws of its random matrices, in the order in which it multiplies by them."""
        return ()

    @property
    def n_weights(self) -> int:
        """How many random matrices one application of the block multiplies by."""
        return len(self.distributions)

    @property
    def mixes_sites(self) -> bool:
        """Whether a site's signal depends on those of other sites, as under BatchNorm."""
        return False

    @property
    def pool_factor(self) -> int:
        """How many sites it makes one of, as the positions of an input by a mean over them."""
        return 1

    def width_after(self, n_in: int) -> int:
        """Return how many units it hands on when it gets ``n_in``.

        Raises
        ------
        InputError
            If it cannot take as many.
        """
        return n_in

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:  # noqa: ARG002
        """Return its random matrices' shapes (n_out, n_in), in their order."""
        return ()

    def divide_widths(self, factor: int | Fraction) -> "AbstractBlock":  # noqa: ARG002
        """Return the block with its widths divided by ``factor``, and its scales kept."""
        return self


class AbstractComposite(AbstractBlock):
    """A block made of others, its ``parts``, which are applied in this order."""

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[AbstractBlock, ...]:
        """The blocks it is made of."""

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """Those of its parts."""
        return tuple(law for part in self.parts for law in part.distributions)

    @property
    def mixes_sites(self) -> bool:
        """Whether one of its parts does."""
        return any(part.mixes_sites for part in self.parts)

    @property
    def pool_factor(self) -> int:
        """How many sites its parts together make one of."""
        return math.prod(part.pool_factor for part in self.parts)

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return those of its parts."""
        found: list[tuple[int, int]] = []
        for part in self.parts:
            found += part.shapes(n_in)
            n_in = part.width_after(n_in)
        return tuple(found)
