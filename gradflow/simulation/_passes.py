"""The forward and the backward pass through one random network.

The forward pass is a scan over each stage's equal blocks that keeps their inputs; the backward pass
is the reverse scan, which linearises one block at a time with `jax.vjp`. Where memory does not hold
every block's input, only those of every √L-th block are kept (checkpoints), and the forward pass
from one to the next is made again before the backward pass through it. Gradients of each input are
kept as a unit vector and the logarithm of its norm; signals likewise where the network is
positively homogeneous and the scale therefore free, or where they are so small or large that it is
so for them.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow._labels import Values
from gradflow._norms import unit_rows
from gradflow.blocks import AbstractBlock
from gradflow.errors import InputError
from gradflow.networks import Network, Stage
from gradflow.simulation import _linearisation, _samplers, _scales
from gradflow.simulation._layers import (
    LayerKey,
    LayerWeights,
    check_weights,
    layer_keys,
    scan_blocks,
)
from gradflow.simulation._linearisation import MatrixSampler, Point
from gradflow.simulation._matrices import Drawn, Matrix
from gradflow.simulation._samplers import SAMPLERS
from gradflow.statistics import BackwardSample, ForwardSample, Statistic

__all__ = ["Given", "Keep", "Passes", "checkpoints", "run"]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Keep(NamedTuple):
    """Whether the forward pass keeps linearisations and signals for the backward pass."""

    linearisations: bool = False
    signals: bool = True  # of every layer; else those at checkpoints


class Given(NamedTuple):
    """Weights and top gradients that are given and not drawn."""

    weights: Sequence[LayerWeights] | None = None  # by stage
    cotangent: Callable[[Array], Array] | None = None


class Passes(NamedTuple):
    """The statistics of both passes, and the signals of each stage where they are collected."""

    values: Values
    forward: list[Any]  # (signal, log_scale) of each stage, with an axis of layers
    backward: list[Any]  # (gradient, log_norm) of each stage, if it was made


_NOTHING_GIVEN, _SIGNALS = Given(), Keep()


def run(
    network: Network,
    inputs: Float[Array, "sites n_0"],
    key: PRNGKeyArray,
    sampler: str,
    wanted: Sequence[Statistic],
    *,
    keep: Keep = _SIGNALS,
    given: Given = _NOTHING_GIVEN,
    collect: bool = False,
) -> Passes:
    """Make both passes through the network that this key draws; the backward one if wanted."""
    if given.weights is not None:
        check_weights(network, given.weights)
    else:
        sampler = _samplers.choose(sampler, network, len(inputs))[0]
    forward = [s for s in wanted if not s.backward]
    backward = [s for s in wanted if s.backward]
    keys = jax.random.split(key, network.depth + 1)
    top_key, pieces = keys[0], _pieces(network, keys[1:], keep, given.weights)
    (signal, log_scale), stages = _forward(network, inputs, pieces, sampler, forward, keep, collect)
    delta = _top_gradient(signal, log_scale, top_key, given.cotangent)
    values = jnp.concatenate([stage.measured for stage in stages])
    collected: list[Any] = []
    if backward or collect:
        collected, logs = _backward(network, delta, stages, collect)
        rows = [
            jax.vmap(lambda s: _row([b.measure(s) for b in backward], inputs.dtype))(sample)
            for sample in _backward_samples(network, logs)
        ]
        values = jnp.concatenate([values, jnp.concatenate(rows)], axis=1)
    names = (s.key for s in (*forward, *backward))
    return Passes(
        Values(zip(names, values.T, strict=True)), [stage.signals for stage in stages], collected
    )


class _Piece(NamedTuple):
    """Equal layers of a stage, and their keys."""

    stage: Stage
    keys: LayerKey
    stretch: int  # layers from one checkpoint to the next; 1 without checkpoints
    weights: LayerWeights | None  # those that all steps share, where they are given


def _pieces(
    network: Network, keys: Array, keep: Keep, weights: Sequence[LayerWeights] | None
) -> list[_Piece]:
    """Cut a network's stages into pieces of whole stretches.

    A stage that is no whole number of stretches is cut in two. One that shares its weights has no
    checkpoints, for a second forward pass would take products with its matrices twice.
    """
    pieces = []
    given = [None] * len(network.stages) if weights is None else weights
    by_stage = layer_keys(network, keys, weights)
    for (stage, of_stage), shared in zip(by_stage, given, strict=True):
        if stage.tied:
            pieces.append(_Piece(stage, of_stage, 1, shared))
            continue
        _, stretch, rest = (0, 1, 0) if keep.signals else checkpoints(stage.repeats)
        cut = stage.repeats - rest
        below, above = (
            jax.tree.map(lambda leaf, part=part: leaf[part], of_stage)
            for part in (slice(cut), slice(cut, None))
        )
        pieces.append(_Piece(Stage(stage.block, cut), below, stretch, None))
        if rest:
            pieces.append(_Piece(Stage(stage.block, rest), above, 1, None))
    return pieces


def checkpoints(layers: int) -> tuple[int, int, int]:
    """How equal layers are cut at checkpoints: stretches, layers in each, layers left over."""
    stretch = math.isqrt(layers)
    return layers // stretch, stretch, layers % stretch


# The forward pass --------------------------------------------------------------------------------


class _Stage(NamedTuple):
    """A piece after the forward pass."""

    layer: "_OwnWeights | _SharedWeights"
    matrices: tuple[Matrix, ...]  # those that its layers share, which remember their products
    kept: Any  # for the backward pass, with an axis of layers; or `_Checkpoints`
    signals: Any
    measured: Float[Array, "layers statistics"]


def _forward(
    network: Network,
    inputs: Array,
    pieces: list[_Piece],
    sampler: str,
    wanted: Sequence[Statistic],
    keep: Keep,
    collect: bool,
) -> tuple[tuple[Array, Array], list[_Stage]]:
    """Return the signal at the top beside the logarithm of its scale, and each piece."""
    saturated_slope = network.activation.saturated_slope(network.saturation_threshold)

    def measure(signal: Array, log_scale: Array) -> Array:
        sample = ForwardSample(
            preactivation=signal,
            activation=network.activation(signal),
            slope=network.activation.derivative(signal),
            log_scale=log_scale,
            saturated_slope=saturated_slope,
        )
        return _row([s.measure(sample) for s in wanted], signal.dtype)

    mixes, free = network.mixes_sites, _scales.free_sizes(network, inputs.dtype)
    zero = jnp.zeros(inputs.shape[0], inputs.dtype)
    signal, log_scale = _scales.in_range(inputs, zero, free, mixes)
    stages = []
    for piece in pieces:
        layer = _layer(piece.stage, sampler, mixes, keep.linearisations)
        step = functools.partial(
            _forward_step,
            layer,
            rescale=network.homogeneous,
            free=free,
            mixes=mixes,
            collect=collect,
        )
        (signal, log_scale, matrices), (kept, signals, measured) = _through_stretches(
            functools.partial(step, measure=measure),
            functools.partial(step, measure=lambda *_: ()),
            (signal, log_scale, _shared_matrices(piece, sampler, signal)),
            piece.keys,
            piece.stretch,
        )
        stages.append(_Stage(layer, matrices, kept, signals, measured))
    return (signal, log_scale), stages


def _row(values: Sequence[Array], dtype: DTypeLike) -> Array:
    """One layer's statistics as one array: fewer arrays take less time to compile."""
    numbers = [jnp.asarray(v, dtype) for v in values]
    for number in numbers:
        if number.shape != ():
            raise InputError(
                f"a statistic measures an array of shape {number.shape} at a layer; it is one "
                "number, as a mean over units and inputs"
            )
    return jnp.stack(numbers) if numbers else jnp.zeros(0, dtype)


def _shared_matrices(piece: _Piece, sampler: str, signal: Array) -> tuple[Matrix, ...]:
    """Return the matrices that all steps of a tied stage share; none of any other stage."""
    if not piece.stage.tied:
        return ()
    if piece.weights is not None:
        return tuple(map(Drawn, piece.weights.matrices))
    places = piece.stage.repeats
    first = jax.tree.map(lambda leaf: leaf[0], piece.keys)
    return _linearisation.weight_matrices(
        piece.stage.block, MatrixSampler(sampler, (places, places)), first, signal
    )


def _through_stretches(
    step: Callable, again: Callable, state: Any, keys: LayerKey, stretch: int
) -> tuple[Any, tuple[Any, Any, Any]]:
    """Scan a piece in the forward pass; keep its blocks' inputs or linearisations, or checkpoints.

    ``again`` is the step without measuring, for the second forward pass.
    """
    if stretch == 1:
        return scan_blocks(step, state, keys)
    keys = jax.tree.map(lambda leaf: leaf.reshape(-1, stretch, *leaf.shape[1:]), keys)

    def through(state: Any, keys: LayerKey) -> tuple[Any, Any]:
        last, (_, _, measured) = jax.lax.scan(step, state, keys)
        return last, (state, measured)

    # A first layer, which changes the signal's shape, is a stage of its own.
    state, (entering, measured) = jax.lax.scan(through, state, keys)
    return state, (_Checkpoints(again, entering, keys), None, _joined(measured))


class _Checkpoints(NamedTuple):
    """The inputs of each stretch of a piece, and the step of its forward pass."""

    forward: Callable
    entering: Any
    keys: LayerKey  # (stretches, layers in each)

    def backward(self, step: Callable, carry: Any) -> tuple[Any, Any]:
        """Scan down: of each stretch a forward pass once more, then the backward pass."""

        def stretch(carry: Any, parts: tuple[Any, LayerKey]) -> tuple[Any, Any]:
            _, (kept, _, _) = jax.lax.scan(self.forward, *parts)
            return jax.lax.scan(step, carry, kept, reverse=True)

        parts = (self.entering, self.keys)
        carry, out = jax.lax.scan(stretch, carry, parts, reverse=True)
        return carry, _joined(out)


def _joined(stacked: Any) -> Any:
    """Make one axis of layers out of those of stretches and of layers in them."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacked)


def _forward_step(
    layer: "_OwnWeights | _SharedWeights",
    state: tuple[Array, Array, tuple[Matrix, ...]],
    key: LayerKey,
    *,
    measure: Callable,
    rescale: bool,
    free: tuple[float, float],
    mixes: bool,
    collect: bool,
) -> tuple[tuple[Array, Array, tuple[Matrix, ...]], tuple]:
    """One block of the forward pass; it keeps the block's pull-back, or its input."""
    signal, log_scale, matrices = state
    out, saved, matrices = layer.forward(matrices, key, signal)
    kept = (key, saved, log_scale)
    log_scale = _scales.for_sites(log_scale, out.shape[0])
    if rescale:
        rows, log_norm = _scales.at_unit_scale(out, mixes)
        root = (out.size if mixes else out.shape[1]) ** 0.5
        out, log_scale = root * rows, log_scale + log_norm - math.log(root)
    else:
        out, log_scale = _scales.in_range(out, log_scale, free, mixes)
    collected = (out, log_scale) if collect else None
    return (out, log_scale, matrices), (kept, collected, measure(out, log_scale))


# One layer, both ways ----------------------------------------------------------------------------


def _layer(stage: Stage, sampler: str, mixes: bool, keep: bool) -> "_OwnWeights | _SharedWeights":
    if stage.tied:
        return _SharedWeights(stage.block, mixes)
    return _OwnWeights(stage.block, SAMPLERS[sampler], mixes, keep)


class _OwnWeights(NamedTuple):
    """A layer with weights of its own, which the sampler draws."""

    block: AbstractBlock
    sampler: Callable[..., Array]
    mixes: bool
    keep: bool

    def forward(
        self, matrices: tuple, key: LayerKey, signal: Array
    ) -> tuple[Array, Any, tuple[Matrix, ...]]:
        """Return the next signal, the residuals for the backward pass, and the shared matrices."""
        out, pull = _pull_back(self.block, self.sampler, self.mixes, key, signal)
        return out, pull if self.keep else signal, matrices

    def backward(
        self, matrices: tuple, key: LayerKey, saved: Any, delta: Array
    ) -> tuple[Array, Array, tuple[Matrix, ...]]:
        """Return the gradient below, `_pull_back`'s array, and the shared matrices."""
        pull = saved
        if not callable(saved):
            pull = _pull_back(self.block, self.sampler, self.mixes, key, saved)[1]
        return *pull(delta), matrices


class _SharedWeights(NamedTuple):
    """A time step of a stage whose steps share their matrices, which remember every product."""

    block: AbstractBlock
    mixes: bool

    def forward(
        self, matrices: tuple[Matrix, ...], key: LayerKey, signal: Array
    ) -> tuple[Array, Any, tuple[Matrix, ...]]:
        """Return the next signal, the residuals for the backward pass, and the shared matrices."""
        after = _linearisation.forward(self.block, key, signal, matrices)
        grams = tuple(_matmul(x, x.T) for x in after.inputs)
        return after.out, (signal, after.point.products, grams), after.matrices

    def backward(
        self, matrices: tuple[Matrix, ...], key: LayerKey, saved: Any, delta: Array
    ) -> tuple[Array, Array, tuple[Matrix, ...]]:
        """Return the gradient below, `_pull_back`'s array of this step, and the matrices."""
        signal, products, grams = saved
        below, matrices, of_products = _linearisation.vjp(
            self.block, Point(key, signal, products), matrices, delta[None]
        )
        sites = 1 if self.mixes else len(signal)
        tap = jnp.zeros((sites, sites), signal.dtype)
        for gram, (of_product,) in zip(grams, of_products, strict=True):
            entries = _matmul(of_product, of_product.T) * gram
            tap += jnp.sum(entries) if self.mixes else entries
        return below[0], tap, matrices


def _pull_back(
    block: AbstractBlock,
    sampler: Callable[..., Array],
    mixes: bool,
    key: LayerKey,
    signal: Float[Array, "sites n_in"],
) -> tuple[Float[Array, "sites_out n_out"], Callable[[Array], tuple[Array, Array]]]:
    """Apply the block with the weights of this key, or those given with it; and its pull-back.

    The pull-back takes ∂C/∂z^l to ∂C/∂z^{l-1} and to the (sites, sites) array whose sum is the
    squared norm of the weight gradient, summed over the block's weights. Where sites mix it is that
    sum, (1, 1): no site has a scale of its own, and a block may have matrices of fewer sites.
    """
    pairs = (1, 1) if mixes else (signal.shape[0],) * 2

    def apply(signal: Array, taps: Array) -> Array:
        remaining = iter(taps)
        times = sampler if key.weights is None else _samplers.given(key.weights.matrices)

        def product(weights_key: PRNGKeyArray, x: Array, **law: Any) -> Array:
            tap = jnp.broadcast_to(next(remaining), (x.shape[0], x.shape[0]))
            return times(weights_key, x, tap, **law)

        return _linearisation.apply_block(block, key, signal, product)

    taps = jnp.zeros((block.n_weights, *pairs), signal.dtype)
    out, pull = jax.vjp(apply, signal, taps)
    return out, jax.tree_util.Partial(_summed_taps, pull)


def _summed_taps(pull: Callable, delta: Array) -> tuple[Array, Array]:
    below, taps = pull(delta)
    return below, taps.sum(axis=0)


# The backward pass -------------------------------------------------------------------------------


class _Logs(NamedTuple):
    """Gradient norms that the backward pass measures, of a block or, with an axis, of layers.

    Attributes
    ----------
    norm
        Shape (sites,): log ‖∂C/∂z^l‖.
    ratio
        Shape (sites,): log (‖∂C/∂z^l‖²/n_l) - log (‖∂C/∂z^{l+1}‖²/n_{l+1}), NaN at the top layer;
        of means over sites where layer l+1 has fewer. It is not taken as a difference: after many
        layers both are large.
    weight_norm
        log ‖∂C/∂W^l‖_F.
    """

    norm: Array
    ratio: Array
    weight_norm: Array


def _top_gradient(
    signal: Array, log_scale: Array, key: PRNGKeyArray, cotangent: Callable | None
) -> Float[Array, "sites n_L"]:
    """δ^L: standard normal, or the gradient that ``cotangent`` gives at z^L.

    Raises
    ------
    InputError
        If it has another shape than z^L.
    """
    if cotangent is None:
        return jax.random.normal(key, signal.shape, signal.dtype)
    top = signal * jnp.exp(log_scale)[:, None]
    delta = cotangent(top)
    if jnp.shape(delta) != top.shape:
        raise InputError(
            f"cotangent returns shape {jnp.shape(delta)}; it is that of z^L, {top.shape}"
        )
    return delta


def _backward(
    network: Network, delta: Array, stages: list[_Stage], collect: bool
) -> tuple[list[Any], list[_Logs]]:
    """Return the gradients of each piece if they are collected, and the norms of all of them."""
    sites = len(delta)
    delta, log_norm = _scales.at_unit_scale(delta, network.mixes_sites)
    carry = (delta, (log_norm, jnp.zeros_like(log_norm)), jnp.full_like(log_norm, jnp.nan))
    gradients: list[Any] = []
    logs: list[_Logs] = []
    for stage in reversed(stages):
        step = functools.partial(_backward_step, stage.layer, collect, network.mixes_sites, sites)
        state = (carry, stage.matrices)
        if isinstance(stage.kept, _Checkpoints):
            (carry, _), (collected, of_stage) = stage.kept.backward(step, state)
        else:
            (carry, _), (collected, of_stage) = scan_blocks(step, state, stage.kept, reverse=True)
        gradients.insert(0, collected)
        logs.insert(0, of_stage)
    return gradients, logs


_Carry = tuple[tuple[Array, tuple[Array, Array], Array], tuple[Matrix, ...]]


def _backward_step(
    layer: _OwnWeights | _SharedWeights,
    collect: bool,
    mixes: bool,
    top_sites: int,
    carry: _Carry,
    kept: tuple[LayerKey, Any, Array],
) -> tuple[_Carry, tuple]:
    """One block of the backward pass, from its output's gradient to its input's."""
    (delta, log_norm_pair, log_ratio), matrices = carry
    key, saved, log_scale = kept
    below, tap, matrices = layer.backward(matrices, key, saved, delta)

    log_delta_scale = log_norm_pair[0]
    unit, log_row = unit_rows(delta) if mixes else (delta, jnp.zeros_like(log_delta_scale))
    log_norm = log_delta_scale + log_row
    # Of one tap for all sites, their one scale.
    log_length = log_delta_scale[: len(tap)] + log_scale[: len(tap)]
    log_weight_norm = _scales.log_weight_norm(tap, log_length) - math.log(top_sites)
    below, log_step = _scales.at_unit_scale(below, mixes)
    log_row_below = unit_rows(below)[1] if mixes else jnp.zeros_like(log_step)
    logs = _Logs(log_norm, log_ratio, log_weight_norm)
    log_width_ratio = math.log(delta.shape[1] / below.shape[1])
    sites = below.shape[0]
    if sites != delta.shape[0]:
        log_row, log_row_below = map(_scales.log_root_mean_square, (log_row, log_row_below))
    log_ratio = 2 * (log_step + log_row_below - log_row) + log_width_ratio
    log_norm_pair = jax.tree.map(lambda log: _scales.for_sites(log, sites), log_norm_pair)
    carry = ((below, _scales.add(log_norm_pair, log_step), log_ratio), matrices)
    return carry, ((unit, log_norm) if collect else None, logs)


def _backward_samples(network: Network, logs: Sequence[_Logs]) -> list[BackwardSample]:
    """All layers' samples, with an axis of layers in front, by runs of equal sites."""
    widths = network.stage_widths

    def each_layer(by_stage: Sequence[int]) -> Array:
        # No constant of as many numbers as there are layers.
        repeats = [stage.repeats for stage in network.stages]
        parts = zip(repeats, by_stage, strict=True)
        return jnp.concatenate([jnp.full(count, v, logs[0].norm.dtype) for count, v in parts])

    shapes = [stage.block.shapes(n) for stage, n in zip(network.stages, widths[:-1], strict=True)]
    width = each_layer(widths[1:])
    weights = each_layer([sum(n * m for n, m in layer) for layer in shapes])
    samples, first = [], 0
    for _, same_sites in itertools.groupby(logs, lambda one: one.norm.shape[1]):
        joined = jax.tree.map(lambda *v: jnp.concatenate(v), *same_sites)
        layers = slice(first, first + len(joined.norm))
        samples.append(
            BackwardSample(
                log_norm=joined.norm,
                log_ratio=joined.ratio,
                log_weight_norm=joined.weight_norm,
                width=width[layers],
                weights=weights[layers],
            )
        )
        first = layers.stop
    return samples
