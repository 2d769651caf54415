"""Architectures: depth laws of residual, normalised and dropout networks, without a simulation.

`walk` follows one input through equal blocks of any kind: the growth of signals in residual
networks, and each block's factor of the gradient. `batch_norm_chi` and `dropout` are fixed points;
`convolution_modes` is the decay of differences between the positions of a convolution.

==========================  ======================================================================
form                        block
==========================  ======================================================================
z + α(W φ(z) + b)           ``Residual(Dense(φ, n, σ_w, σ_b), α)``
x + α(W φ(LN(x)) + b)       ``Residual(Chain((LayerNorm(), Dense(φ, n, σ_w, σ_b))), α)``
LN(x + α(W φ(x) + b))       ``Chain((Residual(Dense(φ, n, σ_w, σ_b), α), LayerNorm()))``
x + α φ(W x + b)            ``Residual(Chain((Linear(n, σ_w, σ_b), Activate(φ))), α)``
x + α(V φ(W x + b) + a)     ``Residual(Chain((Linear(m, σ_w, σ_b), Dense(φ, n, σ_v, σ_a))), α)``
W φ(LN(z)) + b              ``Chain((LayerNorm(), Activate(φ), Linear(n, σ_w, σ_b)))``
==========================  ======================================================================
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from gradflow import activations, gaussian
from gradflow._checks import check_count, check_scale, is_number, is_traced
from gradflow._roots import Valued, implicit, newton
from gradflow.activations import Activation, ActivationLike
from gradflow.blocks import AbstractBlock, Patches
from gradflow.errors import InputError
from gradflow.gaussian import _batch, _pairs
from gradflow.kernels import Kernel
from gradflow.theory import fixed_points
from gradflow.theory._backward import log_gain
from gradflow.theory._depth_scales import depth_scale
from gradflow.theory._loops import scan_layers
from gradflow.theory._moment_table import over_grid

__all__ = ["DropoutAnalysis", "batch_norm_chi", "convolution_modes", "critical_dropout"]
__all__ += ["dropout", "walk"]


class _Walk(NamedTuple):
    """One input's second moment and gradient factors, after 1 … depth equal blocks."""

    q: Float[Array, " blocks"]  # second moment after each block
    chi: Float[Array, " blocks"]  # by which each block multiplies mean squared gradients
    log_gradient_gain: Float[Array, " blocks"]  # of blocks 1 to l: log of the product of χ


def walk(block: AbstractBlock, q0: ArrayLike, depth: int) -> _Walk:
    """Return the second moment and the gradient's gain after 1 … ``depth`` equal blocks.

    A pure function: jit it, vmap it over the block's scales.

    Parameters
    ----------
    block
        Any that does not mix inputs; widths do not matter. Squared norms of gradients change by
        exp(``log_gradient_gain``) from the output of block l to the input of block 1 where all
        widths are equal.
    q0
        Second moment of the first block's input, >= 0.
    depth
        The number of blocks.

    Returns
    -------
    _Walk
        Each field of shape (depth,).

    Raises
    ------
    InputError
        If the block mixes inputs, or an argument is out of range.

    References
    ----------
    Yang & Schoenholz 2017, arXiv:1712.08969 (residual networks).
    """
    if block.mixes_sites:
        raise InputError(
            "block has a BatchNorm, a UnitVariance or a convolution, and one input alone has no "
            "batch and no positions; use batch_norm_chi, or mean_field.predict with the products "
            "of all sites"
        )
    check_scale("q0", q0)
    depth = check_count("depth", depth)
    begin = Kernel.of(jnp.asarray(q0, jnp.result_type(q0, 0.0))[None, None])
    ends = jax.eval_shape(block.kernel, begin).distribution
    if ends.has_memory:
        raise InputError(
            "block hands on an LSTM's state, whose gradient has no factor of one block; use "
            "mean_field.predict"
        )

    def step(state: Kernel, _: None) -> tuple[Kernel, tuple[Array, Array]]:
        after = block.kernel(state)
        after = after.as_carry(state.distribution if depth > 1 else after.distribution)
        q = after.covariance[0, 0] * jnp.exp(2 * after.log_scale[0])
        return after, (q, log_gain(block, state)[0])

    begin = begin.as_carry(ends if depth > 1 else begin.distribution)
    _, (q, log_chi) = scan_layers(step, begin, None, length=depth)
    return _Walk(q, jnp.exp(log_chi), jnp.cumsum(log_chi))


def batch_norm_chi(activation: ActivationLike, size: int | float) -> Float[Array, ""]:
    """Return χ of W φ(BatchNorm(z)) + b, deep in a network: it depends on φ and the batch alone.

    At the fixed point, where all inputs of the batch are alike,

        χ = B/(B - 3) · (s_own - s_other)/(k_own - k_other),

    with k = E[φ(ẑ_a) φ(ẑ_b)] and s = E[φ'(ẑ_a) φ'(ẑ_b) (G - v vᵀ)_ab] over an input and itself, and
    over two; E[φ'²]/Var φ for B → ∞. (B - 2)/(B - 3) without an activation, and π/(π - 1) for ReLU
    and B → ∞.

    Parameters
    ----------
    activation
        φ.
    size
        B, the inputs in a batch, a whole number of at least 4, or ``math.inf``.

    Returns
    -------
    Array
        A scalar, of JAX's default float type.

    Raises
    ------
    InputError
        If the batch is smaller than 4 (χ is infinite), or the activation is unknown.

    References
    ----------
    Yang et al. 2019, arXiv:1902.08129.
    """
    phi = activations.get(activation)
    if is_number(size) and size == math.inf:
        one = jnp.ones(())
        return gaussian.moment(phi, "dphi2", one) / gaussian.moment(phi, "variance", one)
    whole = is_number(size) and size == int(size)
    size = check_count("batch", int(size) if whole else size, _batch.SMALLEST)
    m = _batch.sphere_averages(phi, size)
    return size / (size - 3) * (m["own_slope"] - m["other_slope"]) / (m["own"] - m["other"])


def convolution_modes(patches: Patches) -> Float[Array, "*shape"]:
    """Return λ(f) = |(1/k) Σ_d exp(2πi f·d)|, by which a filter multiplies each Fourier mode.

    A circular convolution averages second moments over the filter's elements d. So where all
    positions have equal moments, a small change that is a wave over positions with the frequency f
    is multiplied, in each layer, by λ(f) and by a dense layer's factor: χ_c for pairs of positions
    or inputs, and χ for gradients. λ(0) is 1: a change that is equal at all positions decays as in
    a dense layer, with its ξ_c, and every other sooner, with a depth scale of
    -1/log(χ_c λ(f)) layers. A delta's filter, of one element, has λ = 1: nothing is lost.

    Parameters
    ----------
    patches
        Positions and the filter over them, as in a `blocks.Convolution`.

    Returns
    -------
    Array
        Of the patches' shape, by frequency, as `jax.numpy.fft.fftn` orders them.

    Raises
    ------
    InputError
        If the padding is not circular (zeros have no Fourier modes), or there is a stride.

    References
    ----------
    Xiao et al. 2018, arXiv:1806.05393, section 2.4.
    """
    if patches.padding != "circular":
        raise InputError(
            f"padding is {patches.padding!r}; Fourier modes are those of circular padding"
        )
    if patches.stride != 1 or patches.spread != 1:
        raise InputError(
            "patches have a stride; Fourier modes are those of filters at every position"
        )
    each = patches.dilation if isinstance(patches.dilation, tuple) else None
    steps = each or (patches.dilation,) * len(patches.shape)
    places = tuple(slice(0, n * d, d) for n, d in zip(patches.sizes, steps, strict=True))
    filter_ = jnp.zeros(patches.shape).at[places].set(1)
    return jnp.abs(jnp.fft.fftn(filter_)) / patches.elements


class DropoutAnalysis(NamedTuple):
    """The fixed point that a signal tends to under dropout; NaN where there is none."""

    status: Int[Array, "*grid"]  # of the length, a `fixed_points.Status`
    q_star: Float[Array, "*grid"]
    chi1: Float[Array, "*grid"]  # (σ_w²/p) E[φ'²]: of the gradient, which meets its input's mask
    c_star: Float[Array, "*grid"]
    chi_c: Float[Array, "*grid"]  # C'(c*) = σ_w² E[φ'(u) φ'(v)]
    xi_c: Float[Array, "*grid"]  # in layers
    trainable_depth: Float[Array, "*grid"]  # 6 ξ_c
    c_of_one: Float[Array, "*grid"]  # C(1) < 1: the correlation of equal inputs under two masks


def dropout(
    activation: ActivationLike,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    *,
    keep_rate: ArrayLike,
    start: ArrayLike = 1.0,
) -> DropoutAnalysis:
    """Return fixed points of lengths and correlations under dropout; units stay with probability p.

    q = (σ_w²/p) E[φ²] + σ_b²;  C(c) = (σ_w² E[φ(u) φ(v)] + σ_b²)/q*, masks being independent.

    Parameters
    ----------
    activation
        φ.
    sigma_w2, sigma_b2, keep_rate
        σ_w², σ_b² and p, 0 < p <= 1, of shapes that broadcast.
    start
        q of the first layer; where every q is a fixed point (`critical_dropout`), it is q*.

    Returns
    -------
    DropoutAnalysis
        Of the shape that the arguments broadcast to.

    Raises
    ------
    InputError
        If a number is out of range, or the activation is unknown.

    References
    ----------
    Schoenholz et al. 2017, arXiv:1611.01232, section 4; Pretorius et al. 2018, arXiv:1811.00293
    (ReLU).
    """
    phi, keep_rate = activations.get(activation), _checked(keep_rate)
    sigma_w2, sigma_b2 = jnp.asarray(sigma_w2), jnp.asarray(sigma_b2)
    # Lengths and gradients are those of a layer without dropout and weights of σ_w²/p.
    length = fixed_points.analyse(phi, sigma_w2 / keep_rate, sigma_b2, start=start)
    grid = jnp.broadcast_arrays(sigma_w2 * jnp.ones_like(length.q_star), sigma_b2, length.q_star)
    settled = jnp.isfinite(length.q_star) & (length.q_star > 0)
    w2, b2, q = (jnp.asarray(x, length.q_star.dtype) for x in grid)
    c, slope = over_grid(functools.partial(_correlation, phi), w2, b2, jnp.where(settled, q, 1))
    c_of_one = (w2 * gaussian.moment(phi, "phi2", jnp.where(settled, q, 1)) + b2) / q
    # Without dropout C(1) = 1, and the question is another one.
    known = settled & (jnp.broadcast_to(keep_rate, q.shape) < 1)
    c_star = jnp.where(known, c, jnp.where(settled, length.c_star, jnp.nan))
    chi_c = jnp.where(known, slope, jnp.where(settled, length.chi_c, jnp.nan))
    xi_c = depth_scale(chi_c)
    return DropoutAnalysis(
        length.status,
        length.q_star,
        length.chi1,
        c_star,
        chi_c,
        xi_c,
        fixed_points.trainable_depth(xi_c),
        jnp.where(settled, c_of_one, jnp.nan),
    )


def _correlation(phi: Activation, w2: Array, b2: Array, q: Array) -> tuple[Array, Array]:
    """Return the root of C(c) = c in [0, 1), where C(1) < 1, and C' there.

    C is a power series with positive coefficients, so convex, with C(0) >= 0: there is one root.
    """
    fixed_w2, fixed_b2, fixed_q = jax.lax.stop_gradient((w2, b2, q))

    def excess(c: Array) -> Valued:
        value, slope = _pairs.equal_pair(phi, fixed_q, c)
        return (fixed_w2 * value + fixed_b2) / fixed_q - c, fixed_w2 * slope - 1, jnp.ones_like(c)

    def equation(theta: tuple[Array, Array, Array], c: Array) -> Array:
        w2, b2, q = theta
        return (w2 * gaussian.kernel(phi, _pair(q, c))[0, 1] + b2) / q - c

    zero, one = jnp.zeros_like(q), jnp.ones_like(q)
    c = implicit(equation, (w2, b2, q), newton(excess, zero, one, sign=one))
    return c, w2 * gaussian.derivative_kernel(phi, _pair(q, c))[0, 1]


def _pair(q: Array, c: Array) -> Float[Array, "2 2"]:
    return q * jnp.stack([jnp.stack([jnp.ones_like(c), c]), jnp.stack([c, jnp.ones_like(c)])])


def critical_dropout(activation: ActivationLike, keep_rate: ArrayLike) -> Float[Array, "..."]:
    """Return the σ_w² at which q stays as it is under dropout, for a homogeneous φ: p/E[φ(Z)²].

    2p for ReLU (2/E[ε²] with a mask ε of E[ε²] = 1/p).

    Parameters
    ----------
    activation
        φ, positively homogeneous.
    keep_rate
        p, 0 < p <= 1, of any shape.

    Returns
    -------
    Array
        σ_w², of the shape of ``keep_rate``.

    Raises
    ------
    InputError
        If φ is not positively homogeneous, or ``keep_rate`` is out of range.

    References
    ----------
    Pretorius et al. 2018, arXiv:1811.00293.
    """
    phi = activations.get(activation)
    if not phi.homogeneous:
        raise InputError(
            f"activation is {phi.name!r}; every length is a fixed point only if φ(a x) = a φ(x)"
        )
    return _checked(keep_rate) / gaussian.moment(phi, "phi2", jnp.ones(()))


def _checked(keep_rate: ArrayLike) -> Array:
    check_scale("keep_rate", keep_rate, positive=True)
    if not is_traced(keep_rate) and np.any(np.asarray(keep_rate) > 1):
        raise InputError(f"keep_rate is {keep_rate}; a probability is at most 1")
    return jnp.asarray(keep_rate)
