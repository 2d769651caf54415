"""Convolutions: sites are positions, and a layer is a gather followed by a random matrix.

Signals have shape (inputs · positions, channels): every position of every input is a site, an
input's positions one after the other, row by row. `builders.as_sites` makes them of images. The
signals that a filter covers at a position are put into one vector (`Patches`), so that its weights
are one random matrix, drawn by the samplers like any other.
"""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow import activations, ensembles
from gradflow._checks import check_count
from gradflow.activations import Activation
from gradflow.blocks._positions import (
    Windows,
    count_inputs,
    lengths,
    linear_in_sites,
    pads,
)
from gradflow.blocks.base import AbstractBlock, Multiply
from gradflow.blocks.dense import AbstractLayer, Linear
from gradflow.ensembles import Distribution
from gradflow.errors import InputError
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["Convolution", "Patches"]


class Patches(AbstractBlock):
    """The signals that a filter covers at each of its places, as one vector.

    At stride 1 filter element j stands for the position j - (size - 1)//2 further along (for an
    even size, as 'SAME' in XLA and PyTorch), and the units of a patch are (elements, channels),
    channels fastest. A random matrix times it is a convolution (a cross-correlation, as libraries
    have it). ``padding`` is the signal beyond the edge: ``"circular"``, the other end; ``"zeros"``,
    as many as keep the length at stride 1, and ⌈length/stride⌉ of it else ('SAME' in XLA);
    ``"valid"``, none, with filters inside alone; or so many zeros at each end, as PyTorch's number,
    or pairs of them for each axis. ``dilation`` is how far apart a filter's elements are, and
    ``stride`` its places. With ``spread``, the stride of a transposed convolution, positions
    are so far apart themselves, zeros between them, and ``padding`` is `jax.lax.conv_transpose`'s,
    or as a number PyTorch's.

    Second moments over the units of a patch are the mean, over the filter's elements d, of those at
    positions that are d further along; zeros count among them.
    """

    shape: tuple[int, ...] = eqx.field(static=True, default=(3,), converter=lengths)
    size: int | tuple[int, ...] = eqx.field(static=True, default=1, converter=lengths)
    padding: Any = eqx.field(static=True, default="circular", converter=pads)
    stride: int | tuple[int, ...] = eqx.field(static=True, default=1, converter=lengths)
    dilation: int | tuple[int, ...] = eqx.field(static=True, default=1, converter=lengths)
    spread: int | tuple[int, ...] = eqx.field(static=True, default=1, converter=lengths)

    def __check_init__(self) -> None:
        _ = self.windows

    @property
    def windows(self) -> Windows:
        """The positions that the filter covers at each place."""
        return Windows(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @property
    def sizes(self) -> tuple[int, ...]:
        """The filter's length along each axis."""
        return self.windows.sizes

    @property
    def elements(self) -> int:
        """The number of positions that a filter covers."""
        return self.windows.elements

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The number of places along each axis."""
        return self.windows.out_shape

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,  # noqa: ARG002
        key: PRNGKeyArray,  # noqa: ARG002
    ) -> Float[Array, "sites_out patch"]:
        """Return each place's neighbourhood, shape (inputs · places, elements · channels)."""
        sites, channels = signal.shape
        by_position = signal.reshape(count_inputs(sites, self.shape), *self.shape, channels)
        gathered = jnp.stack([*self.windows.gathered(by_position, 1)], axis=-2)
        return gathered.reshape(-1, self.elements * channels)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Map second moments to means over the filter's elements; no Gaussian law is known then."""
        if self.windows.trivial:
            return kernel
        kernel, places = kernel.common(), math.prod(self.out_shape)
        inputs = count_inputs(len(kernel.mean), self.shape)
        by_position, out = (inputs, *self.shape), inputs * places

        def mean_of(x: Array, *first_axes: int) -> Array:
            gathered = self.windows.gathered(x, *first_axes)
            return sum(gathered, jnp.zeros((), x.dtype)) / self.elements

        def pairs(k: Array) -> Array:
            k = k.reshape(by_position + by_position)
            return mean_of(k, 1, 1 + len(by_position)).reshape(out, out)

        mean = mean_of(kernel.mean.reshape(by_position), 1).reshape(out)
        return linear_in_sites(kernel, pairs, mean, gaussian=False)

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: yes, it is linear."""
        return True

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: yes, a patch is of several positions."""
        return True

    @property
    def pool_factor(self) -> int | Fraction:
        """The number of positions for each place."""
        return self.windows.pool_factor

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
    edge gets less. ``stride``, ``dilation`` and ``padding`` are those of `Patches`.

    ``transposed`` makes it the transposed convolution of that stride, which has ``stride``
    positions for each: a filter meets k/stride signals at a time and zeros elsewhere, so that
    second moments are 1/stride of a convolution's along each axis, in the mean over positions.

    ``groups`` are of equally many channels, each with filters for its own channels alone, c of them
    then. Theory is the limit of many channels in each. ``"depthwise"`` is one channel in each: a
    filter meets k numbers, and signals are not Gaussian at any width; second moments and gradients
    are the same, for the `Linear` or `Convolution` that follows without an activation between.

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
    padding: Any = eqx.field(static=True, default="circular", converter=pads)
    units: int = eqx.field(static=True, default=100)
    sigma_w: ScalarLike = 1.0
    sigma_b: ScalarLike | None = None
    distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)
    delta: bool = eqx.field(static=True, default=False)
    mu_w: ScalarLike | None = None
    mu_b: ScalarLike | None = None
    bias_distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)
    stride: int | tuple[int, ...] = eqx.field(static=True, default=1, converter=lengths)
    dilation: int | tuple[int, ...] = eqx.field(static=True, default=1, converter=lengths)
    groups: int | str = eqx.field(static=True, default=1)
    transposed: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        windows = self.patches.windows
        if isinstance(self.groups, str) and self.groups != "depthwise":
            raise InputError(
                f"groups is {self.groups!r}; it is a whole number of at least 1, or 'depthwise'"
            )
        if not isinstance(self.groups, str) and self.units % check_count("groups", self.groups):
            raise InputError(
                f"groups is {self.groups}, and units {self.units}; it divides their number"
            )
        centred = windows == Windows(self.shape, self.size, self.padding)
        if self.delta and not (centred and windows.out_shape == self.shape and self.groups == 1):
            raise InputError(
                "delta is True; filters that are zero but for their centre have stride, dilation "
                "and groups of 1, and circular padding or zeros"
            )

    @property
    def patches(self) -> Patches:
        """The gathering of neighbourhoods that its filter multiplies."""
        places = {"spread" if self.transposed else "stride": self.stride}
        return Patches(self.shape, self.size, self.padding, dilation=self.dilation, **places)

    @property
    def linear(self) -> Linear:
        """The filters, as a matrix from patches, or from each position alone, to channels."""
        return self._as_linear()

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites_out n_out"]:
        """Return W * φ(z) + b."""
        h = self.activation(signal)
        patches = self.patches.apply(h, multiply, key)
        if self.delta:
            return self.linear.apply(h, _as_if_of(patches, multiply), key)
        if self.groups != 1:
            multiply = _in_groups(self._count_groups(h.shape[1]), h.shape[1], multiply)
        return self.linear.apply(patches, multiply, key)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return σ_w² E[φ(u) φ(v)], averaged over the filter unless it is a delta, and σ_b²."""
        h = kernel.through(self.activation)
        patches = self.patches.kernel(h)
        if self.delta:
            return self.linear.kernel(h, _as_if_of(patches, multiply))
        out = self.linear.kernel(patches, multiply)
        return out.as_function_of(patches) if self.groups == "depthwise" else out

    def _count_groups(self, n_in: int) -> int:
        """The number of groups of so many channels.

        Raises
        ------
        InputError
            If these cannot be in such groups.
        """
        groups = n_in if isinstance(self.groups, str) else self.groups
        if n_in % groups or self.units % groups:
            raise InputError(
                f"a convolution of groups {self.groups!r} takes {n_in} channels and hands on "
                f"{self.units}; the number of groups divides both"
            )
        if groups == n_in > 1 and self.groups != "depthwise":
            raise InputError(
                f"groups is {groups}, and the signal has {n_in} channels, one for each; say "
                "'depthwise', as its theory is another one"
            )
        return groups

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: yes; of a delta, in its weights' gradient alone."""
        return True

    @property
    def pool_factor(self) -> int | Fraction:
        """The number of positions for each that it hands on."""
        return self.patches.pool_factor

    def width_after(self, n_in: int) -> int:
        """Return the number of channels.

        Raises
        ------
        InputError
            If those that it gets cannot be in its groups.
        """
        self._count_groups(n_in)
        return self.units

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shape of W, (channels, elements · channels of the input, in one group)."""
        return self.linear.shapes(self.patches.width_after(n_in // self._count_groups(n_in)))


def _in_groups(groups: int, channels: int, multiply: Multiply) -> Multiply:
    """Return a ``multiply`` of patches by filters that are for their own group of channels.

    The filters themselves are what it draws, as their products with unit vectors.
    """

    @functools.wraps(multiply)  # with its other attributes: a step, biases
    def multiply_groups(key: PRNGKeyArray, patches: Array, **law: Any) -> Array:
        sites, own = len(patches), channels // groups
        fan_in = patches.shape[1] // groups
        filters = multiply(key, jnp.eye(fan_in, dtype=patches.dtype), **law)
        out = jnp.einsum(
            "skgc,kcgu->sgu",
            patches.reshape(sites, -1, groups, own),
            filters.reshape(-1, own, groups, filters.shape[1] // groups),
            precision="highest",
        )
        return out.reshape(sites, -1)

    return multiply_groups


def _as_if_of(full_input: Array | Kernel, multiply: Multiply) -> Multiply:
    """Return a ``multiply`` by a part of a filter, whose gradient is that of the whole filter."""

    @functools.wraps(multiply)  # with its other attributes: a step, biases
    def multiply_part(*arguments: object, **law: object) -> object:
        return multiply(*arguments, **law, full_input=full_input)

    return multiply_part
