"""Positions that are merged, by windows or all of them, as one site; and one as several."""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow import activations
from gradflow.activations import Activation
from gradflow.blocks._positions import (
    Windows,
    count_inputs,
    count_positions,
    lengths,
    linear_in_sites,
    pads,
    per_axis,
)
from gradflow.blocks.base import AbstractBlock, Multiply
from gradflow.errors import InputError, NoTheory
from gradflow.gaussian import _largest
from gradflow.kernels import Kernel, Unknown, multiply_kernel

__all__ = ["AveragePool", "Flatten", "GlobalMean", "MaxPool", "Upsample"]


class _Pool(AbstractBlock):
    """A number for every window of positions; windows are next to each other without a stride."""

    shape: tuple[int, ...] = eqx.field(static=True, default=(6,), converter=lengths)
    size: int | tuple[int, ...] = eqx.field(static=True, default=2, converter=lengths)
    stride: int | tuple[int, ...] | None = eqx.field(static=True, default=None, converter=lengths)
    padding: Any = eqx.field(static=True, default="valid", converter=pads)

    def __check_init__(self) -> None:
        _ = self.windows

    @property
    def windows(self) -> Windows:
        """The positions of each window."""
        stride = self.size if self.stride is None else self.stride
        return Windows(self.shape, self.size, self.padding, stride)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The number of windows along each axis."""
        return self.windows.out_shape

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: yes, the positions of a window."""
        return True

    @property
    def pool_factor(self) -> int | Fraction:
        """The number of positions for each window."""
        return self.windows.pool_factor

    def _gathered(self, signal: Array, beyond: float) -> list[Array]:
        """The signals at each position of all windows, (inputs, *windows, n)."""
        inputs = count_inputs(len(signal), self.shape)
        by_position = signal.reshape(inputs, *self.shape, signal.shape[1])
        return list(self.windows.gathered(by_position, 1, beyond=beyond))


class AveragePool(_Pool):
    """The mean of each unit's signals over windows of positions.

    ``shape``, ``size``, ``stride`` and ``padding`` are as for `Patches`, but that windows are next
    to each other without a ``stride``; zeros beyond the edge count, as they do in libraries. Second
    moments are means over all pairs of positions in two windows.
    """

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites_out n"]:
        """Return the means over windows."""
        gathered = self._gathered(signal, 0.0)
        return sum(gathered[1:], gathered[0]).reshape(-1, signal.shape[1]) / len(gathered)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return the means over pairs of positions."""
        kernel = kernel.common()
        inputs = count_inputs(len(kernel.mean), self.shape)
        by_position, out = (inputs, *self.shape), inputs * math.prod(self.out_shape)

        def mean_of(x: Array, first_axis: int) -> Array:
            gathered = self.windows.gathered(x, first_axis)
            return sum(gathered, jnp.zeros((), x.dtype)) / self.windows.elements

        def pairs(k: Array) -> Array:
            k = mean_of(k.reshape(by_position + by_position), 1)
            return mean_of(k, 1 + len(by_position)).reshape(out, out)

        mean = mean_of(kernel.mean.reshape(by_position), 1).reshape(out)
        return linear_in_sites(kernel, pairs, mean)

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: yes, it is linear."""
        return True


class MaxPool(_Pool):
    """The largest of each unit's φ(z) over windows of positions.

    ``shape``, ``size``, ``stride`` and ``padding`` are as for `AveragePool`; what is beyond the
    edge is never the largest. The activation is the layer's, which comes first: without one it is
    the largest z. The theory is of Gaussian z, after a random matrix (`gaussian._largest`): closed
    for windows of two without an activation, and to about 3e-4 of the variance for all others.
    """

    activation: Activation = eqx.field(
        static=True, converter=activations.get, default=activations.linear
    )

    def __check_init__(self) -> None:
        if (self._members(1) < 0).all(axis=1).any():
            raise InputError(
                f"padding is {self.padding!r}; it makes a window of size {self.size} of nothing"
            )

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites_out n"]:
        """Return the largest φ(z) of each window."""
        gathered = self._gathered(self.activation(signal), -math.inf)
        return functools.reduce(jnp.maximum, gathered).reshape(-1, signal.shape[1])

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return the averages of the largest of jointly Gaussian signals.

        Raises
        ------
        NoTheory
            If the signal is not Gaussian over units, or there are too many windows.
        """
        if not kernel.gaussian:
            raise NoTheory(
                "MaxPool gets a signal that is not Gaussian over units; the theory needs it after "
                "a random matrix, with the activation in it, as MaxPool(activation='relu')"
            )
        z = kernel.common() if self.activation.homogeneous else kernel.plain()
        members = self._members(count_inputs(len(z.mean), self.shape))
        second, mean, tangent = _largest.averages(self.activation, z.covariance, z.tangent, members)
        return z.derived(second, mean, tangent, Unknown())

    def _members(self, inputs: int) -> np.ndarray:
        """The sites in each window, (windows, members), and -1 for what is beyond the edge."""
        with jax.ensure_compile_time_eval():
            sites = jnp.arange(inputs * math.prod(self.shape))[:, None]
            gathered = [np.asarray(x).reshape(-1) for x in self._gathered(sites, -1.0)]
        return np.stack(gathered, axis=1)

    @property
    def homogeneous(self) -> bool:
        """Whether φ is positively homogeneous."""
        return self.activation.homogeneous

    def homogeneous_if(self, activations: Callable[[Activation], bool]) -> bool:
        """Whether φ is positively homogeneous, by the function given."""
        return activations(self.activation)


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

        return linear_in_sites(kernel, pairs, jnp.mean(kernel.mean.reshape(inputs, -1), axis=1))


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

        mean = jnp.mean(kernel.mean.reshape(inputs, -1), axis=1)
        return linear_in_sites(kernel, own, mean, gaussian=False)

    def width_after(self, n_in: int) -> int:
        """Return the channels times the positions."""
        return self.pool_factor * n_in


class Upsample(AbstractBlock):
    """Each position's signals ``factor`` times along each axis, as the nearest neighbour's.

    Of a `GlobalMean`, ``Upsample((1, 1), (8, 8))`` hands on what all of 8 × 8 positions have in
    common. Signals of several sites are one and the same, and gradients add.
    """

    shape: tuple[int, ...] = eqx.field(static=True, default=(3,), converter=lengths)
    factor: int | tuple[int, ...] = eqx.field(static=True, default=2, converter=lengths)

    def __check_init__(self) -> None:
        count_positions(self.shape)
        _ = self._factors

    @property
    def _factors(self) -> tuple[int, ...]:
        return per_axis("factor", self.factor, self.shape)

    def _sites(self, sites: int) -> np.ndarray:
        """The site that each site after it is of."""
        taken = np.arange(sites).reshape(count_inputs(sites, self.shape), *self.shape)
        for axis, factor in enumerate(self._factors):
            taken = np.repeat(taken, factor, axis=1 + axis)
        return taken.reshape(-1)

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites_out n"]:
        """Return each position's signals several times."""
        return signal[self._sites(len(signal))]

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return the second moments of each position several times."""
        kernel = kernel.common()
        taken = self._sites(len(kernel.mean))

        def pairs(k: Array) -> Array:
            return k[taken][:, taken]

        return linear_in_sites(kernel, pairs, kernel.mean[taken])

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: yes, it is linear."""
        return True

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: yes, as a gradient adds over several."""
        return True

    @property
    def pool_factor(self) -> Fraction:
        """1 over the number of sites that each makes."""
        return Fraction(1, math.prod(self._factors))
