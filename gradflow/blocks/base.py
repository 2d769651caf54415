"""The definition of a block: one step up the network, defined once and read twice."""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow.activations import Activation
from gradflow.ensembles import Distribution, gaussian
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["AbstractBlock", "AbstractComposite", "add_bias", "each_step"]

Multiply = Callable[..., Any]


def each_step(key: PRNGKeyArray, multiply: Multiply) -> PRNGKeyArray:
    """Return the key for numbers that are drawn anew at every time step, as masks and inputs.

    Layers that share their weights are applied with one key, and with a ``multiply`` whose ``step``
    is the number of the layer; the key is folded with it. Other layers use the key itself.
    """
    step = getattr(multiply, "step", None)
    return key if step is None else jax.random.fold_in(key, step)


def add_bias(
    key: PRNGKeyArray,
    signal: Float[Array, "sites n"],
    multiply: Multiply,
    sigma_b: ScalarLike | None,
    mu_b: ScalarLike | None = None,
    distribution: Distribution = gaussian,
) -> Float[Array, "sites n"]:
    """Return z + b, b of mean μ_b and variance σ_b², shared by the sites; z where both are None.

    A ``multiply`` that holds a network's parameters has a method ``bias``, which takes the function
    that draws b and returns the b that is used.
    """
    if sigma_b is None and mu_b is None:
        return signal

    def draw() -> Array:
        shape, dtype = (1, signal.shape[1]), signal.dtype
        mean = jnp.asarray(0.0 if mu_b is None else mu_b, dtype)
        if sigma_b is None:
            return jnp.broadcast_to(mean, shape)
        drawn = jnp.asarray(sigma_b, dtype) * distribution.draw(key, shape, dtype)
        return drawn if mu_b is None else mean + drawn

    bias = getattr(multiply, "bias", None)
    return signal + (draw() if bias is None else bias(draw))


class AbstractBlock(eqx.Module):
    """One step up the network, z^{l-1} -> z^l.

    Properties and methods that are not abstract are right for a block without random matrices that
    acts on every site by itself and keeps the number of units; another one overrides them.
    """

    @abc.abstractmethod
    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites_out n_out"]:
        """Return the next signal in one random network.

        ``multiply(key, x, sigma_w=…, width=…, distribution=…)`` is x Wᵀ, where W has shape
        (width, n_in), mean 0 and variance σ_w²/n_in; with ``mu_w=…``, the mean μ_w/n_in. The
        sampler that runs the block supplies it.
        All other randomness comes from the key, and is the same when the block is applied again:
        biases from the key itself, by `add_bias`, and what is no parameter from `each_step` of it.
        Where W is a part of a larger matrix whose other entries are zero, ``full_input=…`` is what
        the larger matrix multiplies: the gradient ∂C/∂W that is reported is δ full_inputᵀ.
        """

    @abc.abstractmethod
    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Map the kernel of the block's signal to that of its output, at infinite width.

        ``multiply(kernel, sigma_w=…, width=…, distribution=…)`` is the kernel of x Wᵀ.
        """

    @property
    @abc.abstractmethod
    def homogeneous(self) -> bool:
        """Whether block(a·z) = a·block(z) for every a > 0."""

    def homogeneous_if(self, activations: Callable[[Activation], bool]) -> bool:  # noqa: ARG002
        """Whether it is `homogeneous` if those activations are for which this is true."""
        return self.homogeneous

    @property
    def parts(self) -> tuple["AbstractBlock", ...]:
        """The blocks among its fields, in their order."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        each = itertools.chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in values)
        return tuple(part for part in each if isinstance(part, AbstractBlock))

    @property
    def nested(self) -> tuple["AbstractBlock", ...]:
        """The block itself, then its parts and theirs, at any depth."""
        return (self, *(block for part in self.parts for block in part.nested))

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """The laws of its random matrices, in the order in which it multiplies by them."""
        return ()

    @property
    def n_weights(self) -> int:
        """The number of random matrices that one application of the block multiplies by."""
        return len(self.distributions)

    @property
    def is_layer(self) -> bool:
        """Whether its output is a product with its only random matrix, a layer of weights."""
        return False

    @property
    def rescales_weights(self) -> bool:
        """Whether it stands for a scale that the weights before it start with, as in LSUV.

        Such a block is no layer to train, and the weights' scale is not that of their law.
        """
        return False

    @property
    def mixes_inputs(self) -> bool:
        """Whether an input's signal depends on other inputs, as under BatchNorm."""
        return False

    @property
    def mixes_sites(self) -> bool:
        """Whether a site's signal depends on other sites: on other inputs, or other positions."""
        return self.mixes_inputs

    @property
    def pool_factor(self) -> int | Fraction:
        """The number of sites that it makes one of, as a mean over an input's positions does.

        Below 1 where it makes several of one, as a transposed convolution does.
        """
        return 1

    @property
    def width_in(self) -> int | None:
        """The only number of units that it takes, where its weights do not say it; else None."""
        return None

    def width_after(self, n_in: int) -> int:
        """Return the number of units that it hands on when it gets ``n_in``.

        Raises
        ------
        InputError
            If it cannot take that number.
        """
        return n_in

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:  # noqa: ARG002
        """Return the shapes (n_out, n_in) of its random matrices, in their order."""
        return ()

    def divide_widths(self, factor: int | Fraction) -> "AbstractBlock":  # noqa: ARG002
        """Return the block with its widths divided by ``factor``, and its scales kept."""
        return self


class AbstractComposite(AbstractBlock):
    """A block made of others, its ``parts``, which are applied in their order."""

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """The laws of its parts' random matrices, in order."""
        return tuple(law for part in self.parts for law in part.distributions)

    @property
    def mixes_inputs(self) -> bool:
        """Whether one of its parts mixes inputs."""
        return any(part.mixes_inputs for part in self.parts)

    @property
    def mixes_sites(self) -> bool:
        """Whether one of its parts mixes sites."""
        return any(part.mixes_sites for part in self.parts)

    @property
    def pool_factor(self) -> int | Fraction:
        """The number of sites that its parts together make one of."""
        return math.prod(part.pool_factor for part in self.parts)

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shapes of its parts' random matrices, in order."""
        shapes: list[tuple[int, int]] = []
        for part in self.parts:
            shapes += part.shapes(n_in)
            n_in = part.width_after(n_in)
        return tuple(shapes)
