"""Convolutions: sites are positions, and a layer is a gather followed by a random matrix.

Signals have shape (inputs · positions, channels): every position of every input is a site, an
input's positions one after the other, row by row. `builders.as_sites` makes them of images. The
signals that a filter covers at a position are put into one vector (`Patches`), so that its weights
are one random matrix, drawn by the samplers like any other.
"""

import functools
import itertools
import math
from collections.abc import Iterator

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow import activations, ensembles
from gradflow._checks import check_count, unknown_name
from gradflow.activations import Activation
from gradflow.blocks._positions import count_inputs, count_positions, lengths
from gradflow.blocks.base import AbstractBlock, Multiply
from gradflow.blocks.dense import AbstractLayer, Linear
from gradflow.ensembles import Distribution
from gradflow.errors import InputError
from gradflow.kernels import Gaussian, Kernel, Unknown, multiply_kernel

__all__ = ["Convolution", "Flatten", "GlobalMean", "Patches"]

# The signal beyond the edge, as `jax.numpy.pad` calls it.
_PADDINGS = {"circular": "wrap", "zeros": "constant"}


class Patches(AbstractBlock):
    """The signals that a filter covers at each position, as one vector.

    Filter element j stands for the position j - (size - 1)//2 further along (for an even size, as
    'SAME' in XLA and PyTorch), and the units of a patch are (elements, channels), channels fastest.
    ``padding`` is the signal beyond the edge: ``"circular"``, the other end, or ``"zeros"``. A
    random matrix times it is a convolution (a cross-correlation, as libraries have it), stride 1.

    Second moments over the units of a patch are the mean, over the filter's elements d, of those at
    positions that are d further along.
    """

    shape: tuple[int, ...] = eqx.field(static=True, default=(3,), converter=lengths)
    size: int | tuple[int, ...] = eqx.field(static=True, default=1, converter=lengths)
    padding: str = eqx.field(static=True, default="circular")

    def __check_init__(self) -> None:
        count_positions(self.shape)
        if self.padding not in _PADDINGS:
            raise unknown_name("padding", self.padding, _PADDINGS)
        fits = len(self.sizes) == len(self.shape)
        if not fits or any(not 1 <= n <= m for n, m in zip(self.sizes, self.shape, strict=True)):
            raise InputError(
                f"size is {self.size!r}; it is one whole number, or one for each axis of shape "
                f"{self.shape}, of at least 1 and at most its length"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The filter's length along each axis."""
        if isinstance(self.size, tuple):
            return tuple(check_count("size", n) for n in self.size)
        return (check_count("size", self.size),) * len(self.shape)

    @property
    def elements(self) -> int:
        """The number of positions that a filter covers."""
        return math.prod(self.sizes)

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites patch"]:
        """Return each position's neighbourhood, shape (inputs · positions, elements · channels)."""
        sites, channels = signal.shape
        by_position = signal.reshape(count_inputs(sites, self.shape), *self.shape, channels)
        gathered = jnp.stack([*self._shifted(by_position, 1)], axis=-2)
        return gathered.reshape(sites, self.elements * channels)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Map second moments to means over the filter's elements; no Gaussian law is known then."""
        if self.elements == 1:
            return kernel
        kernel = kernel.common()
        by_position = (count_inputs(len(kernel.mean), self.shape), *self.shape)

        def pairs(k: Array) -> Array:
            shifted = self._shifted(k.reshape(by_position + by_position), 1, 1 + len(by_position))
            return sum(shifted, jnp.zeros((), k.dtype)).reshape(k.shape) / self.elements

        shifted = self._shifted(kernel.mean.reshape(by_position), 1)
        mean = sum(shifted, jnp.zeros((), kernel.mean.dtype)).reshape(-1) / self.elements
        tangent = None if kernel.tangent is None else pairs(kernel.tangent)
        return kernel.derived(pairs(kernel.covariance), mean, tangent, Unknown())

    def _shifted(self, x: Array, *first_axes: int) -> Iterator[Array]:
        """Yield x shifted to each filter element; spatial axes begin at each of the first axes."""
        sizes = [1] * x.ndim
        for first in first_axes:
            sizes[first : first + len(self.sizes)] = self.sizes
        padded = jnp.pad(x, [((n - 1) // 2, n // 2) for n in sizes], mode=_PADDINGS[self.padding])
        for element in itertools.product(*map(range, self.sizes)):
            index = [slice(None)] * x.ndim
            for first in first_axes:
                for axis, (offset, length) in enumerate(zip(element, self.shape, strict=True)):
                    index[first + axis] = slice(offset, offset + length)
            yield padded[tuple(index)]

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: yes, it is linear."""
        return True

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: yes, a patch is of several positions."""
        return True

    def width_after(self, n_in: int) -> int:
        """Return the channels times the filter's elements."""
        return self.elements * n_in


class Convolution(AbstractLayer):
    """z' = W * φ(z) + b: activation, `Patches`, `Linear`, in one layer of ``units`` channels.

    Var W = σ_w²/(k c), k the filter's elements and c the channels it takes; biases are shared by
    positions. At infinite width the covariance of positions p and q is the mean over the filter,

        k'_pq = σ_w² (1/k) Σ_d E[φ(u_{p+d}) φ(v_{q+d})] + σ_b²

    (Xiao et al. 2018, arXiv:1806.05393, section 2). With circular padding its mean over positions,
    and what is alike at all of them, is a dense layer's, and so is χ = σ_w² E[φ'²]; with zeros the
    edge gets less.

    ``delta`` is a filter that is zero but for its centre, which has Var W = σ_w²/c: with orthogonal
    weights, and no fewer channels than it takes, the delta-orthogonal initialisation that keeps
    lengths (algorithm 1 there). Every position then has a dense layer's signal. ∂C/∂W is that of
    the whole filter all the same, of its zeros too.
    """

    activation: Activation = eqx.field(
        static=True, converter=activations.get, default=activations.tanh
    )
    shape: tuple[int, ...] = eqx.field(static=True, default=(3,), converter=lengths)
    size: int | tuple[int, ...] = eqx.field(static=True, default=3, converter=lengths)
    padding: str = eqx.field(static=True, default="circular")
    units: int = eqx.field(static=True, default=100)
    sigma_w: ScalarLike = 1.0
    sigma_b: ScalarLike | None = None
    distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)
    delta: bool = eqx.field(static=True, default=False)
    mu_w: ScalarLike | None = None
    mu_b: ScalarLike | None = None
    bias_distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)

    def __check_init__(self) -> None:
        _ = self.patches

    @property
    def patches(self) -> Patches:
        """The gathering of neighbourhoods that its filter multiplies."""
        return Patches(self.shape, self.size, self.padding)

    @property
    def linear(self) -> Linear:
        """The filters, as a matrix from patches, or from each position alone, to channels."""
        return self._as_linear()

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n_out"]:
        """Return W * φ(z) + b."""
        h = self.activation(signal)
        patches = self.patches.apply(h, multiply, key)
        if not self.delta:
            return self.linear.apply(patches, multiply, key)
        return self.linear.apply(h, _as_if_of(patches, multiply), key)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return σ_w² E[φ(u) φ(v)], averaged over the filter unless it is a delta, and σ_b²."""
        h = kernel.through(self.activation)
        patches = self.patches.kernel(h)
        if not self.delta:
            return self.linear.kernel(patches, multiply)
        return self.linear.kernel(h, _as_if_of(patches, multiply))

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: yes; of a delta, in its weights' gradient alone."""
        return True

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shape of W, (channels, elements · channels of the input)."""
        return self.linear.shapes(self.patches.width_after(n_in))


def _as_if_of(full_input: Array | Kernel, multiply: Multiply) -> Multiply:
    """Return a ``multiply`` by a part of a filter, whose gradient is that of the whole filter."""

    @functools.wraps(multiply)  # with its other attributes: a step, biases
    def multiply_part(*arguments: object, **law: object) -> object:
        return multiply(*arguments, **law, full_input=full_input)

    return multiply_part


class _OverPositions(AbstractBlock):
    """A block that makes one site of each input's positions."""

    shape: tuple[int, ...] = eqx.field(static=True, default=(1,), converter=lengths)

    def __check_init__(self) -> None:
        count_positions(self.shape)

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: yes, it is linear."""
        return True

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: yes, all positions of an input."""
        return True

    @property
    def pool_factor(self) -> int:
        """The number of positions."""
        return math.prod(self.shape)


class GlobalMean(_OverPositions):
    """The mean of each input's signals over its positions: (inputs · positions, c) to (inputs, c).

    Second moments are the mean over all pairs of positions: signals that are independent from
    position to position average out, and second moments go down with the number of positions.
    """

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "inputs n"]:
        """Return the means over positions."""
        inputs = count_inputs(signal.shape[0], self.shape)
        return jnp.mean(signal.reshape(inputs, -1, signal.shape[1]), axis=1)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return the means over pairs of positions."""
        inputs, kernel = count_inputs(len(kernel.mean), self.shape), kernel.common()

        def pairs(k: Array) -> Array:
            return jnp.mean(
                k.reshape(inputs, self.pool_factor, inputs, self.pool_factor), axis=(1, 3)
            )

        tangent = None if kernel.tangent is None else pairs(kernel.tangent)
        mean = jnp.mean(kernel.mean.reshape(inputs, -1), axis=1)
        law = Gaussian() if kernel.gaussian else Unknown()
        return kernel.derived(pairs(kernel.covariance), mean, tangent, law)


class Flatten(_OverPositions):
    """Each input's positions as one vector: (inputs · positions, c) to (inputs, positions · c).

    Second moments are the mean over positions of those of each with itself: correlations between
    positions do not enter a product with a random matrix.
    """

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "inputs n_out"]:
        """Return the positions of each input side by side."""
        return signal.reshape(count_inputs(signal.shape[0], self.shape), -1)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Map second moments to means over positions; no Gaussian law is known then."""
        if self.pool_factor == 1:
            return kernel
        inputs, kernel = count_inputs(len(kernel.mean), self.shape), kernel.common()

        def own(k: Array) -> Array:
            by_position = k.reshape(inputs, self.pool_factor, inputs, self.pool_factor)
            return jnp.mean(jnp.diagonal(by_position, axis1=1, axis2=3), axis=-1)

        tangent = None if kernel.tangent is None else own(kernel.tangent)
        mean = jnp.mean(kernel.mean.reshape(inputs, -1), axis=1)
        return kernel.derived(own(kernel.covariance), mean, tangent, Unknown())

    def width_after(self, n_in: int) -> int:
        """Return the channels times the positions."""
        return self.pool_factor * n_in
