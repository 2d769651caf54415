"""One random network, forward and backward, and its statistics at every layer.

The way up is a scan over each stage's equal blocks that keeps what enters them; the way down is the
reverse scan, which linearises one block at a time with `jax.vjp`. Where memory does not hold what
enters every block, only what enters every √L-th is kept, and a stretch in between is walked up
again before it is walked down. Nothing leaves a float's range on
the way down: the gradient of each input is kept as a unit vector and the logarithm of its norm. The
way up is kept likewise where the network is positively homogeneous and the scale therefore free,
or where signals are so small or large that it is so for them.

The gradient starts at the top as δ^L ~ N(0, I), independent for each site: it is that of
C = u · z^L with a random u, so that nothing is assumed of a cost. For ∂C/∂W it is the mean over the
sites at the top. Where sites mix, all share one scale, going up and going down.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow import statistics
from gradflow._arguments import as_key
from gradflow._checks import check_sequence, is_traced
from gradflow._labels import Values, checked
from gradflow.blocks import AbstractBlock
from gradflow.errors import InputError
from gradflow.networks import Network, Stage, as_inputs, check_lsuv
from gradflow.norms import unit_rows
from gradflow.simulation import linearisation, samplers
from gradflow.simulation._matrices import Drawn, Matrix
from gradflow.simulation.linearisation import LayerKey, LayerWeights, Maker, stage_keys
from gradflow.simulation.samplers import SAMPLERS, Sampler
from gradflow.statistics import BackwardSample, ForwardSample, Statistic

__all__ = ["Signals", "kept_signals", "lsuv", "propagate", "scan_blocks", "signals"]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Signals(NamedTuple):
    """Every unit's signals in one random network, for histograms: true ones are exp(log) times.

    Attributes
    ----------
    preactivation
        One array (layers, sites, width) for each stage.
    log_scale
        One array (layers, sites) for each stage, of the pre-activations.
    gradient
        ∂C/∂z, one array (layers, sites, width) for each stage; each row of unit norm.
    log_gradient_norm
        One array (layers, sites) for each stage.
    """

    preactivation: list[Array]
    log_scale: list[Array]
    gradient: list[Array]
    log_gradient_norm: list[Array]


def propagate(
    network: Network,
    inputs: Float[Array, "sites n_in"],
    key: PRNGKeyArray | int,
    *,
    sampler: str = "dense",
    weights: Sequence[LayerWeights] | None = None,
    cotangent: Callable[[Array], Array] | None = None,
    wanted: Sequence[Statistic] = statistics.ALL,
    keep: bool = False,
    checkpoint: bool = False,
) -> Values:
    """Draw one network and return its statistics at every layer.

    A pure function: jit it, vmap it over keys, inputs, or the network's σ_w and σ_b.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (sites, n_0): the batch, all of it sent through the same weights.
    key
        The network's key.
    sampler
        ``"dense"``, ``"matrix_free"`` or ``"auto"``; see `gradflow.simulation.samplers`.
    weights
        The network's weights and biases, of `training.initial_weights` or trained, where they are
        not to be drawn; the sampler has no say then, and the key draws what is no parameter.
    cotangent
        What takes z^L, (sites, n_L), to δ^L = ∂C/∂z^L of each site's own cost; δ^L ~ N(0, I)
        without it.
    wanted
        The statistics to measure; those that need more inputs than there are, are left out.
    keep
        Keep each layer's linearisation on the way up, instead of making it again on the way down:
        faster with ``matrix_free``, more memory, the same numbers.
    checkpoint
        Keep what enters every √L-th layer, and walk up twice: the memory of 2√L layers' signals
        instead of L, a third more time, the same numbers. Without ``keep``. Stages that share their
        weights keep all of their signals either way, and no linearisation.

    Returns
    -------
    Values
        Each statistic by its key, shape (layers,), the same as `theory.mean_field.predict` returns;
        what is carried as a logarithm answers to its name too, as ``q`` beside ``log_q``.
        ``chi`` is NaN at the top layer. Of weights that time steps share, the gradient at a layer
        is that step's contribution: ∂C/∂W is the sum over the steps. A signal that leaves the
        float's range makes its statistics infinite or NaN from that layer on.

    Raises
    ------
    InputError
        If the inputs do not fit the network or are not finite, the key or a statistic is none, or
        the sampler cannot draw the weights.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    wanted = [s for s in checked(wanted) if s.sites <= inputs.shape[0]]
    if cotangent is not None and not callable(cotangent):
        raise InputError(f"cotangent is {cotangent!r}; it is a function from z^L to ∂C/∂z^L")
    policy = _Keep(linearisations=keep, signals=not checkpoint)
    given = _Given(weights, cotangent)
    return _walk(network, inputs, key, sampler, wanted, policy, given=given)[0]


def signals(
    network: Network,
    inputs: Float[Array, "sites n_in"],
    key: PRNGKeyArray | int,
    *,
    sampler: str = "dense",
    weights: Sequence[LayerWeights] | None = None,
) -> Signals:
    """Draw the network that `propagate` draws from this key, and return its units' signals.

    Or those of one with these weights, as for `propagate`.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    given = _Given(weights)
    collected = _walk(network, inputs, key, sampler, (), _Keep(), collect=True, given=given)[1]
    (z, log_scale), (gradient, log_norm) = (zip(*side, strict=True) for side in collected)
    return Signals(list(z), list(log_scale), list(gradient), list(log_norm))


def lsuv(
    network: Network,
    inputs: Float[Array, "sites n_in"],
    key: PRNGKeyArray | int,
    *,
    sampler: str = "dense",
) -> list[Float[Array, "layers weights"]]:
    """Return the σ_w that give each random matrix's product variance 1 over units and inputs.

    Layer-sequential unit variance: from the input up, each matrix of the network that `propagate`
    draws from this key is divided by the standard deviation of what it hands on. A product is
    linear in the matrix, so that one division is exact for its batch; the algorithm's repetitions
    are for batches that differ. The law of networks that are so started is
    `networks.unit_variance`.

    Returns
    -------
    list
        One array (layers, weights) for each stage: σ_w by layer, and by random matrix in it. In a
        program that is traced it is infinite where the product has no variance.

    Raises
    ------
    InputError
        If a product has no variance, as that of a signal of zeros, and so no scale gives it any, or
        if layers share their weights.

    References
    ----------
    Mishkin & Matas 2016, arXiv:1511.06422, algorithm 1.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    check_lsuv(network)
    multiply_by_one = SAMPLERS[samplers.choose(sampler, network, len(inputs))[0]]
    tap = jnp.zeros((inputs.shape[0],) * 2, inputs.dtype)

    def up(signal: Array, key: PRNGKeyArray, block: AbstractBlock) -> tuple[Array, Array]:
        scales: list[Array] = []

        def multiply(key: PRNGKeyArray, x: Array, *, sigma_w: Any, **law: Any) -> Array:
            del sigma_w
            out = multiply_by_one(key, x, tap, sigma_w=1.0, **law)
            scales.append(1 / jnp.std(out))
            return scales[-1] * out

        signal = block.apply(signal, multiply, key)
        return signal, jnp.stack(scales) if scales else jnp.zeros(0, signal.dtype)

    keys = jax.random.split(key, network.depth + 1)[1:]
    signal, found, first = inputs, [], 0
    for stage in network.stages:
        step = functools.partial(up, block=stage.block)
        signal, scales = scan_blocks(step, signal, keys[first : first + stage.repeats])
        _check_scales(scales, first)
        found.append(scales)
        first += stage.repeats
    return found


def _check_scales(scales: Float[Array, "layers weights"], below: int) -> None:
    """Raise `InputError` where one is infinite, of a stage that has so many layers below it."""
    infinite = not is_traced(scales) and np.isinf(scales)
    if np.any(infinite):
        layer, matrix = np.argwhere(infinite)[0]
        which = f" with its random matrix {matrix + 1}" if scales.shape[1] > 1 else ""
        raise InputError(
            f"the product of layer {below + layer + 1}{which} has no variance over units and "
            "inputs, and so no scale gives it variance 1; what enters it is 0 for these inputs, or "
            "it is one number alone"
        )


def check_weights(network: Network, weights: Any) -> None:
    """Raise `InputError` unless the weights are of networks of this law."""
    found = check_sequence(
        "weights", weights, "a network's weights by stage, as training.initial_weights draws them"
    )
    shapes, first = network.shapes, 0
    known = []
    for stage in network.stages:
        layers = () if stage.tied else (stage.repeats,)
        known.append([(*layers, *shape) for shape in shapes[first]])
        first += stage.repeats
    given = [[tuple(m.shape) for m in getattr(stage, "matrices", ())] for stage in found]
    # A delta-orthogonal filter has one place of those that its declared matrix has.
    pairs = zip(itertools.chain(*given), itertools.chain(*known), strict=False)
    fit = [len(stage) for stage in given] == [len(stage) for stage in known] and all(
        one[:-1] == other[:-1] and one[-1] and other[-1] % one[-1] == 0 for one, other in pairs
    )
    if not fit:
        raise InputError(
            f"weights has matrices of shapes {given} by stage; for this network they are {known}"
        )


class _Keep(NamedTuple):
    """What is kept on the way up for the way down."""

    linearisations: bool = False
    signals: bool = True  # of every layer


class _Given(NamedTuple):
    """What is given and not drawn."""

    weights: Sequence[LayerWeights] | None = None  # by stage
    cotangent: Callable[[Array], Array] | None = None


_NOTHING_GIVEN = _Given()


def _walk(
    network: Network,
    inputs: Array,
    key: PRNGKeyArray,
    sampler: str,
    wanted: Sequence[Statistic],
    keep: _Keep,
    *,
    collect: bool = False,
    given: _Given = _NOTHING_GIVEN,
) -> tuple[Values, tuple[list, list]]:
    """Walk up and down; return the statistics and, if asked, every stage's signals both ways."""
    if given.weights is not None:
        check_weights(network, given.weights)
    else:
        sampler = samplers.choose(sampler, network, len(inputs))[0]
    forward = [s for s in wanted if not s.backward]
    backward = [s for s in wanted if s.backward]
    sites = inputs.shape[0]
    keys = jax.random.split(key, network.depth + 1)
    top_key, layer_keys = keys[0], keys[1:]
    max_slope = network.activation.max_slope

    def measure(signal: Array, log_scale: Array) -> Array:
        sample = ForwardSample(
            preactivation=signal,
            activation=network.activation(signal),
            slope=network.activation.derivative(signal),
            log_scale=log_scale,
            max_slope=max_slope,
        )
        return _row([s.measure(sample) for s in forward], signal.dtype)

    pieces = _stretches(network, keep, given.weights)
    signal, log_scale = inputs, jnp.zeros(sites, inputs.dtype)
    free = _free_sizes(network, inputs.dtype)
    signal, log_scale = _in_range(signal, log_scale, free, network.mixes_sites)
    walkers: list[_Apart | _Shared] = []
    memories: list[tuple[Matrix, ...]] = []
    kept, ups, measured, first = [], [], [], 0
    for stage, stretch, weights in pieces:
        of_stage = stage_keys(stage, layer_keys[first : first + stage.repeats], weights)
        walker = _walker(stage, sampler, network.mixes_sites, keep.linearisations)
        up = functools.partial(
            _up,
            walker,
            rescale=network.homogeneous,
            free=free,
            mixes=network.mixes_sites,
            collect=collect,
        )
        state, (stage_kept, stage_up, rows) = _through_stretches(
            functools.partial(up, measure=measure),
            functools.partial(up, measure=lambda *_: ()),
            (signal, log_scale, _nothing_asked(stage, sampler, of_stage, signal, weights)),
            of_stage,
            stretch,
        )
        signal, log_scale, memory = state
        first += stage.repeats
        walkers.append(walker)
        memories.append(memory)
        kept.append(stage_kept)
        ups.append(stage_up)
        measured.append(rows)

    if given.cotangent is None:
        delta = jax.random.normal(top_key, signal.shape, inputs.dtype)
    else:
        top = signal * jnp.exp(log_scale)[:, None]
        delta = given.cotangent(top)
        if jnp.shape(delta) != top.shape:
            raise InputError(
                f"cotangent returns shape {jnp.shape(delta)}; it is that of z^L, {top.shape}"
            )
    delta, log_norm = _at_unit_scale(delta, network.mixes_sites)
    carry = (delta, (log_norm, jnp.zeros_like(log_norm)), jnp.full_like(log_norm, jnp.nan))
    downs: list[Any] = []
    logs: list[_Logs] = []
    for walker, memory, kept_below in reversed(list(zip(walkers, memories, kept, strict=True))):
        step = functools.partial(_down, walker, collect, network.mixes_sites, len(signal))
        if isinstance(kept_below, _Walked):
            (carry, _), (down, stage_logs) = kept_below.down(step, (carry, memory))
        else:
            (carry, _), (down, stage_logs) = scan_blocks(
                step, (carry, memory), kept_below, reverse=True
            )
        downs.insert(0, down)
        logs.insert(0, stage_logs)

    rows = [
        jax.vmap(lambda s: _row([b.measure(s) for b in backward], inputs.dtype))(sample)
        for sample in _backward_samples(network, logs)
    ]
    values = jnp.concatenate([jnp.concatenate(measured), jnp.concatenate(rows)], axis=1)
    keys_of = (s.key for s in (*forward, *backward))
    return Values(zip(keys_of, values.T, strict=True)), (ups, downs)


def _row(values: Sequence[Array], dtype: DTypeLike) -> Array:
    """Return one layer's statistics as one array: fewer arrays take less time to compile."""
    numbers = [jnp.asarray(v, dtype) for v in values]
    for number in numbers:
        if number.shape != ():
            raise InputError(
                f"a statistic measures an array of shape {number.shape} at a layer; it is one "
                "number, as a mean over units and inputs"
            )
    return jnp.stack(numbers) if numbers else jnp.zeros(0, dtype)


class _Logs(NamedTuple):
    """What is measured on the way down, of one block or, with an axis of layers, of all.

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


def _backward_samples(network: Network, logs: Sequence[_Logs]) -> list[BackwardSample]:
    """Return all layers' samples, with an axis of layers in front, by runs of equal sites."""
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
    for _, run in itertools.groupby(logs, lambda one: one.norm.shape[1]):
        joined = jax.tree.map(lambda *v: jnp.concatenate(v), *run)
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


def kept_signals(layers: int) -> tuple[int, int, int]:
    """Return how equal layers are cut for checkpoints: stretches, layers in each, layers left."""
    stretch = math.isqrt(layers)
    return layers // stretch, stretch, layers % stretch


def _stretches(
    network: Network, keep: _Keep, weights: Sequence[LayerWeights] | None
) -> list[tuple[Stage, int, LayerWeights | None]]:
    """Return the stages, each with the length of the stretches it is walked in again, or 1.

    And with its weights, if they are given.

    A stage that is no whole number of stretches is cut in two; one that shares its weights is not
    walked in again, for its matrices would be asked twice.
    """
    pieces = []
    given = [None] * len(network.stages) if weights is None else weights
    for stage, of_stage in zip(network.stages, given, strict=True):
        if stage.tied:
            pieces.append((stage, 1, of_stage))
            continue
        _, stretch, rest = (0, 1, 0) if keep.signals else kept_signals(stage.repeats)
        cut = stage.repeats - rest
        below, above = (
            jax.tree.map(lambda leaf, part=part: leaf[part], of_stage)
            for part in (slice(cut), slice(cut, None))
        )
        pieces.append((Stage(stage.block, cut), stretch, below))
        if rest:
            pieces.append((Stage(stage.block, rest), 1, above))
    return pieces


class _Walked(NamedTuple):
    """A stage of which only what enters each stretch is kept, and how to walk up one again."""

    again: Callable
    entering: Any
    keys: LayerKey  # (stretches, layers in each)

    def down(self, step: Callable, carry: Any) -> tuple[Any, Any]:
        """Walk down, one stretch after the other, each after it was walked up again."""

        def stretch(carry: Any, parts: tuple[Any, LayerKey]) -> tuple[Any, Any]:
            _, (kept, _, _) = jax.lax.scan(self.again, *parts)
            return jax.lax.scan(step, carry, kept, reverse=True)

        parts = (self.entering, self.keys)
        carry, out = jax.lax.scan(stretch, carry, parts, reverse=True)
        return carry, _joined(out)


def _through_stretches(
    up: Callable, again: Callable, state: Any, keys: LayerKey, stretch: int
) -> tuple[Any, tuple[Any, Any, Any]]:
    """Scan a stage on the way up; keep what its blocks, or its stretches of blocks, need."""
    if stretch == 1:
        return scan_blocks(up, state, keys)
    keys = jax.tree.map(lambda leaf: leaf.reshape(-1, stretch, *leaf.shape[1:]), keys)

    def through(state: Any, keys: LayerKey) -> tuple[Any, Any]:
        last, (_, _, measured) = jax.lax.scan(up, state, keys)
        return last, (state, measured)

    # A first layer, which changes the signal's shape, is a stage of its own.
    state, (entering, measured) = jax.lax.scan(through, state, keys)
    return state, (_Walked(again, entering, keys), None, _joined(measured))


def _joined(stacked: Any) -> Any:
    """Make one axis of layers out of those of stretches and of layers in them."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacked)


def scan_blocks(step: Callable, carry: Any, xs: Any, reverse: bool = False) -> tuple[Any, Any]:
    """`jax.lax.scan`, but a single step may change the carry's shape, as a first layer does."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, xs, reverse=reverse)
    carry, y = step(carry, jax.tree.map(lambda leaf: leaf[0], xs))
    return carry, jax.tree.map(lambda leaf: leaf[None], y)


def _linearise(
    block: AbstractBlock,
    sampler: Sampler,
    mixes: bool,
    key: LayerKey,
    signal: Float[Array, "sites n_in"],
) -> tuple[Float[Array, "sites_out n_out"], Callable[[Array], tuple[Array, Array]]]:
    """Apply the block with the weights of this key; return the result and its pull-back.

    Or with those that are given with it. The pull-back takes ∂C/∂z^l to ∂C/∂z^{l-1} and to the
    (sites, sites) array whose sum is the squared norm of the weight gradient, summed over the
    block's weights. Where sites mix it is that sum, (1, 1): no site has a scale of its own, and a
    block may have matrices of fewer sites.
    """
    pairs = (1, 1) if mixes else (signal.shape[0],) * 2

    def apply(signal: Array, taps: Array) -> Array:
        remaining = iter(taps)
        times = sampler if key.given is None else samplers.given(key.given.matrices)

        def multiply(weights_key: PRNGKeyArray, x: Array, **law: Any) -> Array:
            tap = jnp.broadcast_to(next(remaining), (x.shape[0], x.shape[0]))
            return times(weights_key, x, tap, **law)

        return linearisation.blockwise(block, key, signal, multiply)

    taps = jnp.zeros((block.n_weights, *pairs), signal.dtype)
    out, pull = jax.vjp(apply, signal, taps)
    return out, jax.tree_util.Partial(_summed_taps, pull)


def _summed_taps(pull: Callable, delta: Array) -> tuple[Array, Array]:
    below, taps = pull(delta)
    return below, taps.sum(axis=0)


class _Apart(NamedTuple):
    """Walks layers with weights of their own, which are drawn or decided for each."""

    block: AbstractBlock
    sampler: Sampler
    mixes: bool
    keep: bool

    def up(self, memory: tuple, key: LayerKey, signal: Array) -> tuple[Array, Any, tuple]:
        """Return the next signal, what it takes to pull gradients back, and nothing to remember."""
        out, pull = _linearise(self.block, self.sampler, self.mixes, key, signal)
        return out, pull if self.keep else signal, memory

    def down(
        self, memory: tuple, key: LayerKey, saved: Any, delta: Array
    ) -> tuple[Array, Array, tuple]:
        """Return the gradient below, and `_linearise`'s array of the weights' gradient."""
        pull = saved
        if not callable(saved):
            pull = _linearise(self.block, self.sampler, self.mixes, key, saved)[1]
        return *pull(delta), memory


class _Shared(NamedTuple):
    """Walks the steps of a stage with the same weights, which remember what they were asked."""

    block: AbstractBlock
    mixes: bool

    def up(
        self, memory: tuple[Matrix, ...], key: LayerKey, signal: Array
    ) -> tuple[Array, Any, tuple[Matrix, ...]]:
        """Return the next signal, what it takes to pull gradients back, and the matrices."""
        asked = linearisation.ask(self.block, key, signal, memory)
        grams = tuple(_matmul(x, x.T) for x in asked.questions)
        return asked.out, (signal, asked.answers, grams), asked.matrices

    def down(
        self, memory: tuple[Matrix, ...], key: LayerKey, saved: Any, delta: Array
    ) -> tuple[Array, Array, tuple[Matrix, ...]]:
        """Return what `_Apart.down` does, of this step alone, and the matrices."""
        signal, answers, grams = saved
        with_products = functools.partial(linearisation.with_products, self.block, key)
        below, memory, deltas = linearisation.pull(
            with_products, signal, answers, memory, delta[None]
        )
        sites = 1 if self.mixes else len(signal)
        tap = jnp.zeros((sites, sites), signal.dtype)
        for gram, (at_answer,) in zip(grams, deltas, strict=True):
            products = _matmul(at_answer, at_answer.T) * gram
            tap += jnp.sum(products) if self.mixes else products
        return below[0], tap, memory


def _walker(stage: Stage, sampler: str, mixes: bool, keep: bool) -> _Apart | _Shared:
    if stage.tied:
        return _Shared(stage.block, mixes)
    return _Apart(stage.block, SAMPLERS[sampler], mixes, keep)


def _nothing_asked(
    stage: Stage, sampler: str, keys: LayerKey, signal: Array, weights: LayerWeights | None
) -> tuple[Matrix, ...]:
    """Return the matrices that all steps of a tied stage share."""
    if not stage.tied:
        return ()
    if weights is not None:
        return tuple(map(Drawn, weights.matrices))
    places = stage.repeats * len(signal)
    first = jax.tree.map(lambda leaf: leaf[0], keys)
    return linearisation.made(stage.block, Maker(sampler, (places, places)), first, signal)


def _up(
    walker: _Apart | _Shared,
    state: tuple[Array, Array, tuple[Matrix, ...]],
    key: LayerKey,
    *,
    measure: Callable,
    rescale: bool,
    free: tuple[float, float],
    mixes: bool,
    collect: bool,
) -> tuple[tuple[Array, Array, tuple[Matrix, ...]], tuple]:
    """One block on the way up. Keeps its pull-back, or what it takes to make that again."""
    signal, log_scale, memory = state
    out, saved, memory = walker.up(memory, key, signal)
    kept = (key, saved, log_scale)
    log_scale = _for_sites(log_scale, out.shape[0])
    if rescale:
        rows, log_norm = _at_unit_scale(out, mixes)
        root = (out.size if mixes else out.shape[1]) ** 0.5
        out, log_scale = root * rows, log_scale + log_norm - math.log(root)
    else:
        out, log_scale = _in_range(out, log_scale, free, mixes)
    found = (out, log_scale) if collect else None
    return (out, log_scale, memory), (kept, found, measure(out, log_scale))


# Signals smaller than this, or larger than its inverse, meet an activation that is as good as what
# it tends to: of GELU, x/2 (1 + 0.8 x).
_SIZES = {"float32": 1e-10, "float64": 1e-18}


def _free_sizes(network: Network, dtype: DTypeLike) -> tuple[float, float]:
    """Return the logarithms of the sizes between which the network's signals are kept as they are.

    The others are kept there, beside a logarithm.
    """
    small, large = network.homogeneous_beyond
    end = -math.log(_SIZES.get(jnp.dtype(dtype).name, 1e-10))
    return -end if small else -math.inf, end if large else math.inf


def _in_range(
    signal: Array, log_scale: Array, free: tuple[float, float], mixes: bool
) -> tuple[Array, Array]:
    """Return a signal between the `_free_sizes`, and the logarithm of what it is to be times."""
    if not any(map(math.isfinite, free)):
        return signal, log_scale
    root = (signal.size if mixes else signal.shape[1]) ** 0.5
    log = _at_unit_scale(signal, mixes)[1] - math.log(root) + log_scale
    # Signals of zeros stay.
    beyond = jnp.where(jnp.isfinite(log), log - jnp.clip(log, *free), 0)
    return signal * jnp.exp(log_scale - beyond)[:, None], beyond


_Carry = tuple[tuple[Array, tuple[Array, Array], Array], tuple[Matrix, ...]]


def _down(
    walker: _Apart | _Shared,
    collect: bool,
    mixes: bool,
    sites_above: int,
    carry: _Carry,
    kept: tuple[LayerKey, Any, Array],
) -> tuple[_Carry, tuple]:
    """One block on the way down, from its output's gradient to its input's."""
    (delta, log_norm_pair, log_ratio), memory = carry
    key, saved, log_scale = kept
    below, tap, memory = walker.down(memory, key, saved, delta)

    log_scale_down = log_norm_pair[0]
    unit, log_row = unit_rows(delta) if mixes else (delta, jnp.zeros_like(log_scale_down))
    log_norm = log_scale_down + log_row
    # Of one tap for all sites, their one scale.
    log_length = log_scale_down[: len(tap)] + log_scale[: len(tap)]
    log_weight_norm = _log_weight_norm(tap, log_length) - math.log(sites_above)
    below, log_step = _at_unit_scale(below, mixes)
    log_row_below = unit_rows(below)[1] if mixes else jnp.zeros_like(log_step)
    logs = _Logs(log_norm, log_ratio, log_weight_norm)
    log_width_ratio = math.log(delta.shape[1] / below.shape[1])
    sites = below.shape[0]
    if sites != delta.shape[0]:
        log_row, log_row_below = (
            _log_root_mean_square(log_row),
            _log_root_mean_square(log_row_below),
        )
    log_ratio = 2 * (log_step + log_row_below - log_row) + log_width_ratio
    log_norm_pair = jax.tree.map(lambda log: _for_sites(log, sites), log_norm_pair)
    carry = ((below, _add(log_norm_pair, log_step), log_ratio), memory)
    return carry, ((unit, log_norm) if collect else None, logs)


def _for_sites(log: Float[Array, " others"], sites: int) -> Float[Array, " sites"]:
    """Return logarithms for so many sites; where their number changes, sites mix and have one."""
    return log if log.shape[0] == sites else jnp.broadcast_to(log[:1], (sites,))


def _log_root_mean_square(log: Float[Array, " sites"]) -> Float[Array, ""]:
    return (jax.nn.logsumexp(2 * log) - math.log(log.shape[0])) / 2


def _at_unit_scale(delta: Array, mixes: bool) -> tuple[Array, Array]:
    """Return signals at a scale of 1, and the logarithm, (sites,), of what they are divided by.

    Each site has its own; where sites mix there must be one for all of them.
    """
    if not mixes:
        return unit_rows(delta)
    unit, log = unit_rows(delta.reshape(1, -1))
    return unit.reshape(delta.shape), jnp.broadcast_to(log, delta.shape[:1])


def _add(total: tuple[Array, Array], term: Array) -> tuple[Array, Array]:
    """Add with the rounding error carried along (Knuth's two-sum): 10 000 logs lose nothing."""
    high, low = total
    term = low + term
    new = high + term
    part = new - high
    error = (high - (new - part)) + (term - part)
    return new, jnp.where(jnp.isfinite(new), error, 0)


def _log_weight_norm(tap: Array, log_length: Array) -> Array:
    """Return log ‖Σ_a δ_a x_aᵀ‖_F from the unit rows' Kernel products and their logs."""
    largest = jnp.max(log_length)
    finite = jnp.where(jnp.isfinite(largest), largest, 0)
    weight = jnp.exp(log_length - finite)
    square = jnp.sum(tap * jnp.outer(weight, weight))
    # Rounding can leave a sum of cancelling terms a hair below zero.
    return jnp.log(jnp.maximum(square, 0)) / 2 + finite
