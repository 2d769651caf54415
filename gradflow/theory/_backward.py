"""The backward pass at infinite width: every layer's gradient, by the blocks' transposed maps.

A block maps the second moments of a tangent linearly; the transpose of that map, by automatic
differentiation, takes the gradient's second moments down: see `mean_field`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gradflow.blocks import AbstractBlock
from gradflow.kernels import Kernel, UnitDistribution, multiply_kernel
from gradflow.networks import Network
from gradflow.statistics import BackwardLimit
from gradflow.theory._loops import joined, map_layers, scan_layers

__all__ = ["backward_limits", "log_gain"]

_Share = Float[np.ndarray, " weights"]
# Of a tangent's second moments, and of its memory (`kernels.UnitDistribution.memory`), or None.
_Cotangent = tuple[Array, Any]


def backward_limits(
    network: Network, entering: Sequence[Kernel], leaving: Sequence[Kernel]
) -> list[BackwardLimit]:
    """The limit of the gradient at every layer, by runs of layers with equally many sites.

    Parameters
    ----------
    network
        The law of the network.
    entering, leaving
        For each stage, the kernels that enter its blocks, all in one, and the one that leaves it.
    """
    if network.mixes_sites:
        return _down_together(network, entering, len(leaving[-1].mean))
    if any(kernel.distribution.has_memory for kernel in leaving):
        return [_down_with_memory(network, entering, leaving)]
    return [_down(network, entering)]


def _down(network: Network, entering: Sequence[Kernel]) -> BackwardLimit:
    """The limit of the gradient at every layer, where sites do not mix.

    The product of the factors of all layers above.
    """
    log_chi, by_weights = [], []
    shares = _shares(network)
    for stage, stage_entering, share in zip(network.stages, entering, shares, strict=True):

        def pull(
            layer: Kernel, block: AbstractBlock = stage.block, share: _Share = share
        ) -> tuple[Array, Array]:
            return _gains(block, share, layer)

        factor, weight_gain = map_layers(pull, stage_entering)
        log_chi.append(factor)
        by_weights.append(weight_gain)
    ratio = _log_width_ratios(network, log_chi[0].dtype)
    # Layer l's gradient is layer l+1's times the factor of the block above, l+1.
    above = jnp.concatenate(log_chi)[1:] + ratio[1:, None]
    sites = above.shape[1]
    top = jnp.zeros((1, sites), above.dtype)  # δ^L ~ N(0, I)
    log_variance = jnp.concatenate([jnp.cumsum(above[::-1], axis=0)[::-1], top])
    # C is the mean over the inputs, whose gradients are independent: squares add, over sites².
    log_weight = jax.nn.logsumexp(log_variance + jnp.concatenate(by_weights), axis=1)
    # Of a gradient that is 0 already a layer has no factor.
    above = jnp.where(jnp.isneginf(log_variance[1:]), jnp.nan, above)
    return BackwardLimit(
        log_variance,
        jnp.concatenate([above, jnp.full_like(top, jnp.nan)]),
        log_weight - 2 * math.log(sites),
        jnp.asarray(np.array(network.widths[1:]), above.dtype),
    )


def _down_together(network: Network, entering: Sequence[Kernel], sites: int) -> list[BackwardLimit]:
    """The limit of the gradient at every layer where sites mix, by runs of equally many sites.

    The gradient's second moments over sites, Λ, go down as a matrix of trace 1, beside a
    logarithm. There are ``sites`` at the top.
    """
    dtype = entering[0].mean.dtype
    ratios = _log_width_ratios(network, dtype)
    carry = (jnp.eye(sites, dtype=dtype) / sites, jnp.asarray(math.log(sites), dtype))
    by_stage: list[tuple[Array, Array, Array]] = []
    widths = np.array(network.widths[1:])
    last = network.depth
    for stage, stage_entering, share in reversed(
        list(zip(network.stages, entering, _shares(network), strict=True))
    ):

        def step(
            carry: tuple[Array, Array],
            layer: tuple[Kernel, Array],
            block: AbstractBlock = stage.block,
            share: _Share = share,
        ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            (second, log), (kernel, ratio) = carry, layer
            below, log_factor, log_weight = _pull_back(block, share, kernel, second)
            size = jnp.trace(below)
            values = jnp.log(jnp.diagonal(second)) + log, log_weight + log
            return (below / size, log + log_factor + jnp.log(size) + ratio), values

        first = last - stage.repeats
        parts = (stage_entering, ratios[first:last])
        carry, values = scan_layers(step, carry, parts, length=stage.repeats, reverse=True)
        by_stage.insert(0, (*values, jnp.asarray(widths[first:last], dtype)))
        last = first
    runs: list[BackwardLimit] = []
    for every, log_weight, width in reversed(joined(by_stage)):
        top = jnp.full_like(every[:1], jnp.nan)
        if runs:  # the layer above has another number of sites: by means over them
            change = _log_mean(every[-1]) - _log_mean(runs[0].log_variance[0])
            top = jnp.broadcast_to(change, top.shape)
        ratio = jnp.concatenate([every[:-1] - every[1:], top])
        runs.insert(0, BackwardLimit(every, ratio, log_weight - 2 * math.log(sites), width))
    return runs


def _down_with_memory(
    network: Network, entering: Sequence[Kernel], leaving: Sequence[Kernel]
) -> BackwardLimit:
    """The limit of the gradient at every layer, where blocks remember more than second moments.

    The gradient goes down as the cotangent of a tangent's second moments and memory: at variance 1,
    beside a logarithm, for each site.
    """
    sites = len(leaving[-1].mean)
    one = jnp.ones(sites, leaving[-1].mean.dtype)
    ratios = _log_width_ratios(network, one.dtype)
    carry = ((one, None), jnp.zeros_like(one))  # δ^L ~ N(0, I)
    by_stage: list[tuple[Array, Array, Array]] = []
    last = network.depth
    for stage, stage_entering, left, share in reversed(
        list(zip(network.stages, entering, leaving, _shares(network), strict=True))
    ):

        def step(
            carry: tuple[_Cotangent, Array],
            layer: tuple[Kernel, Array],
            block: AbstractBlock = stage.block,
            share: _Share = share,
        ) -> tuple[tuple[_Cotangent, Array], tuple[Array, Array, Array]]:
            (above, log), (kernel, ratio) = carry, layer
            below, log_weight = _pull_back_with_memory(block, share, kernel, above)
            size = _variance(kernel, below)
            below = jax.tree.map(lambda x: jax.vmap(jnp.divide)(x, size), below)
            gained = jnp.log(size) + ratio
            return (below, log + gained), (log, gained, log_weight + log)

        gradient, log = carry
        carry = (_by_output(left, gradient), log)
        first = last - stage.repeats
        parts = (stage_entering, ratios[first:last])
        carry, values = scan_layers(step, carry, parts, length=stage.repeats, reverse=True)
        by_stage.insert(0, values)
        last = first
    log_variance, gained, log_weight = (jnp.concatenate(v) for v in zip(*by_stage, strict=True))
    return BackwardLimit(
        log_variance,
        jnp.concatenate([gained[1:], jnp.full_like(log_variance[:1], jnp.nan)]),
        jax.nn.logsumexp(log_weight, axis=1) - 2 * math.log(sites),
        jnp.asarray(np.array(network.widths[1:]), one.dtype),
    )


def _variance(kernel: Kernel, gradient: _Cotangent) -> Float[Array, " sites"]:
    """The mean square over units of a gradient: its product with a tangent of independent units."""
    plain, own = gradient
    if own is None:
        return plain
    _, pull = jax.vjp(kernel.distribution.memory_of_independent, jnp.ones_like(plain))
    return plain + pull(own)[0]


def _by_output(left: Kernel, gradient: _Cotangent) -> _Cotangent:
    """The gradient by the input of the stage above, as that by the output of the stage below."""
    plain, own = gradient
    if not left.distribution.has_memory:
        # The stage above takes it as a tangent that is independent of the signals.
        return (plain, None) if own is None else (jnp.ones_like(plain), None)
    if own is None:
        own = jax.tree.map(jnp.zeros_like, left.distribution.memory_of_independent(plain))
    return plain, own


def _log_mean(log: Float[Array, " sites"]) -> Float[Array, ""]:
    return jax.nn.logsumexp(log) - math.log(log.shape[0])


def _log_width_ratios(network: Network, dtype: DTypeLike) -> Array:
    widths = np.array(network.widths)
    return jnp.asarray(np.log(widths[1:] / widths[:-1]), dtype)


def _shares(network: Network) -> list[_Share]:
    """The share of each matrix's gradient in the mean square over all weights, for each stage.

    With g the variance of the gradient that a block gets from above, on n units, the squared norm
    of ∂C/∂W is fan_in · n · g times the cotangent of its tap; it is divided by how many weights
    the block has.
    """
    shares = []
    for stage, (below, above) in zip(
        network.stages, itertools.pairwise(network.stage_widths), strict=True
    ):
        shapes = stage.block.shapes(below)
        fan_ins = np.array([fan_in for _, fan_in in shapes], float)
        shares.append(above * fan_ins / sum(n * m for n, m in shapes) if shapes else fan_ins)
    return shares


def _gains(block: AbstractBlock, share: _Share, entering: Kernel) -> tuple[Array, Array]:
    """The logarithms of `_pull_back` of ones where sites do not mix, each site by itself.

    No average over pairs of sites is taken.
    """

    def alone(q: Array, mean: Array, log_scale: Array, law: UnitDistribution) -> tuple:
        law = jax.tree.map(lambda x: x[None], law)
        one = Kernel.of(q[None, None], mean[None], distribution=law, log_scale=log_scale[None])
        factor, log_factor, weights = _pull_back(block, share, one, jnp.ones_like(one.mean))
        return jnp.log(factor[0]) + log_factor, weights

    q = jnp.diagonal(entering.covariance)
    return jax.vmap(alone)(q, entering.mean, entering.log_scale, entering.distribution)


def _pull_back(
    block: AbstractBlock, share: _Share, entering: Kernel, above: Float[Array, "..."]
) -> tuple[Array, Array, Array]:
    """Take second moments of a gradient down one block; also the log of the variance of ∂C/∂W.

    The transpose of the block's map of a tangent's second moments, which have the same shape:
    (sites,), or (sites, sites) where sites mix. The second moments below are exp of the second
    result times the first.
    """
    taps = jnp.zeros(block.n_weights, above.dtype)
    zero = jnp.zeros(entering.mean.shape * above.ndim, above.dtype)

    def out(tangent: Array, taps: Array) -> tuple[Array, tuple[Array, Array]]:
        after, units = _tapped(block, entering.with_tangents((tangent, None)), taps)
        assert after.tangent is not None
        return after.tangent, (after.log_tangent_scale, units)

    _, pull, (scale, units) = jax.vjp(out, zero, taps, has_aux=True)
    largest = jnp.max(scale)
    rows = jnp.exp(scale - largest)
    below, by_weights = pull(above * (rows**2 if above.ndim == 1 else jnp.outer(rows, rows)))
    return below, 2 * largest, _log_weighted(share, by_weights, units[:, 0]) + 2 * largest


def _pull_back_with_memory(
    block: AbstractBlock, share: _Share, entering: Kernel, above: _Cotangent
) -> tuple[_Cotangent, Float[Array, " sites"]]:
    """As `_pull_back`, of a tangent's second moments and memory, for each site.

    There is no scale beside the first result.
    """
    plain = above[0]
    taps = jnp.zeros((block.n_weights, *plain.shape), plain.dtype)
    zero = jnp.zeros_like(plain)

    def out(tangents: _Cotangent, taps: Array) -> tuple[_Cotangent, Array]:
        after, units = _tapped(block, entering.with_tangents(tangents), taps)
        return after.plain().tangents, units

    _, pull, units = jax.vjp(
        out, (zero, entering.distribution.memory_of_independent(zero)), taps, has_aux=True
    )
    below, by_weights = pull(above)
    return below, _log_weighted(share, by_weights, units) * jnp.ones_like(plain)


def _tapped(
    block: AbstractBlock, entering: Kernel, taps: Array
) -> tuple[Kernel, Float[Array, "weights sites"]]:
    """The kernel after the block, whose weights' tangents are the taps, one after one.

    The second result are the taps' units, as logarithms: a tap of 1 stands for exp of twice them.
    """
    remaining, units = iter(taps), []
    together = entering.tangent is not None and entering.tangent.ndim == 2

    def multiply(kernel: Kernel, *, full_input: Kernel | None = None, **matrix: Any) -> Kernel:
        full_input = kernel if full_input is None else full_input
        if together:
            kernel, full_input = kernel.common(), full_input.common()
        out = multiply_kernel(kernel, tap=next(remaining), full_input=full_input, **matrix)
        unit = full_input.log_scale - out.log_tangent_scale
        # Sites that are together have one unit, and a block may have matrices of fewer of them.
        units.append(unit[:1] if together else unit)
        return out

    after = block.kernel(entering, multiply)
    nothing = jnp.zeros((0, len(entering.mean)), entering.mean.dtype)
    return after, jnp.stack(units) if units else nothing


def _log_weighted(
    share: _Share, by_weights: Float[Array, "weights ..."], units: Float[Array, "weights ..."]
) -> Array:
    """The log of the variance of ∂C/∂W over all matrices; NaN for a block without any.

    ``units`` are the logarithms of the taps' units, for each matrix or each of its sites.
    """
    if not len(by_weights):
        return jnp.full((), jnp.nan, by_weights.dtype)
    shares = jnp.asarray(share, by_weights.dtype)
    largest = jnp.max(units, axis=0, keepdims=True)
    parts = by_weights * jnp.exp(2 * (units - largest))
    return jnp.log(jnp.sum(jax.vmap(jnp.multiply)(shares, parts), axis=0)) + 2 * largest[0]


def log_gain(block: AbstractBlock, entering: Kernel) -> Float[Array, " sites"]:
    """The log of the factor of mean squared gradients of one block, (sites,), at equal widths."""
    return _gains(block, np.zeros(block.n_weights), entering)[0]
