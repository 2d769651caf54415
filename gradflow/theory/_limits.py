"""The infinite-width limits of all layers: the forward pass, and with `_backward` both."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float

from gradflow import statistics
from gradflow._arguments import as_real
from gradflow._checks import is_traced
from gradflow.blocks import GRU, LSTM, AbstractBlock
from gradflow.errors import InputError, NoTheory
from gradflow.kernels import Gaussian, Kernel, Shifted
from gradflow.networks import Network, Stage, check_network
from gradflow.predictions import Prediction
from gradflow.statistics import BackwardLimit, ForwardLimit
from gradflow.theory._about_means import down_about_means, has_means, is_chain, settled
from gradflow.theory._backward import backward_limits, log_gain
from gradflow.theory._loops import joined, map_layers, scan_layers

__all__ = [
    "asymptotic_log_chi",
    "SECONDS_A_LAYER",
    "at_widths",
    "checked_gram",
    "has_correlated_steps",
    "limits",
    "prediction",
    "unknown",
    "through_blocks",
]

# Seconds that the theory takes for each layer: 2 ms with closed forms, 13 ms without.
SECONDS_A_LAYER = 0.005
# Of inputs' products, relative, in units of their dtype's epsilon.
_ROUNDING = 1 << 10

# Layers, and steps of a gradient, after which blocks with memory are taken as settled.
_SETTLED_AFTER = 300


def limits(
    network: Network,
    gram: Float[ArrayLike, "sites sites"],
    mean: Float[ArrayLike, " sites"] | None = None,
) -> tuple[list[ForwardLimit], list[BackwardLimit]]:
    """The infinite-width limits of all layers' signals and gradients.

    One for every run of layers with equally many sites: one, unless a layer merges positions. The
    arguments are those of `mean_field.predict`.

    Raises
    ------
    InputError
        As `mean_field.predict` does.
    """
    check_network(network)
    about_means = has_means(network)
    if about_means and not is_chain(network):
        raise NoTheory(
            "weights have a mean that is not 0; the theory of these is of dense layers alone"
        )
    begin = Kernel.of(*checked_gram(gram, mean))
    entering, leaving, forward, why_missing = _forward(network, begin)
    if about_means:
        return _known_about_means(network, entering, forward[0])
    backward = backward_limits(network, entering, leaving)
    return forward, [dataclasses.replace(limit, why_missing=why_missing) for limit in backward]


def _known_about_means(
    network: Network, entering: list[Kernel], forward: ForwardLimit
) -> tuple[list[ForwardLimit], list[BackwardLimit]]:
    """The limits of layers whose weights have means, NaN from where a mean is not settled."""
    q = jnp.diagonal(forward.covariance, axis1=1, axis2=2)
    known = settled(network, entering, jnp.log(q) + 2 * forward.log_scale)
    backward = down_about_means(network, entering)
    reach = jnp.where(known, 1, jnp.nan), jnp.where(known[-1], 1, jnp.nan)

    def within(limit: ForwardLimit | BackwardLimit, reach: Array) -> Any:
        floats = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), limit)
        return jax.tree.map(
            lambda x, real: x * reach.reshape(-1, *[1] * (x.ndim - 1)) if real else x, limit, floats
        )

    return [within(forward, reach[0])], [within(backward, reach[1])]


def prediction(forward: Sequence[ForwardLimit], backward: Sequence[BackwardLimit]) -> Prediction:
    """Every statistic's value at every layer, from the `limits`."""
    sites = forward[0].mean.shape[-1]
    wanted = [(s, s.predict) for s in statistics.ALL if s.predict and s.sites <= sites]
    return Prediction(
        {
            s.key: jnp.concatenate(
                [map_layers(predict, run) for run in (backward if s.backward else forward)]
            )
            for s, predict in wanted
        },
        why_missing=backward[0].why_missing,
    )


def unknown(network: Network, sites: int, why: str) -> Prediction:
    """The prediction of a network that no theory knows: NaN of every statistic, and the reason."""
    none = np.full(network.depth, np.nan)
    wanted = [s.key for s in statistics.ALL if s.predict and s.sites <= sites]
    return Prediction(dict.fromkeys(wanted, none), why_missing=why)


def checked_gram(gram: Any, mean: Any) -> tuple[Array, Array | None]:
    """The inputs' Gram matrix and means as arrays, or raise `InputError`."""
    matrix = as_real("gram", gram, whole=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(
            f"gram has shape {matrix.shape}; it is (inputs, inputs), as "
            "mean_field.input_gram(inputs) returns it"
        )
    gram = jnp.asarray(matrix) if is_traced(matrix) else jax.device_put(matrix)
    if not is_traced(gram):
        known = np.asarray(gram, np.float64)
        size, rounding = np.diagonal(known), _ROUNDING * float(jnp.finfo(gram.dtype).eps)
        most = np.sqrt(np.abs(np.outer(size, size))) * (1 + rounding)
        if not (np.all(size >= 0) and np.all(np.abs(known) <= most)):
            raise InputError(
                "gram is no matrix of inputs' products: some |x_a · x_b| is above |x_a| |x_b|; it "
                "is what mean_field.input_gram(inputs) returns"
            )
        if np.any(np.abs(known - known.T) > rounding * most):
            raise InputError(
                "gram is not symmetric; it is what mean_field.input_gram(inputs) returns"
            )
    if mean is None:
        return gram, None
    means = as_real("mean", mean)
    if is_traced(means):
        means = jnp.asarray(means, gram.dtype)
    else:
        means = jax.device_put(np.asarray(means, gram.dtype))
    if means.shape != gram.shape[:1]:
        raise InputError(f"mean has shape {means.shape}; it is ({len(gram)},), one for each input")
    return gram, means


def _forward(
    network: Network, state: Kernel
) -> tuple[list[Kernel], list[Kernel], list[ForwardLimit], str | None]:
    """The kernels that enter each stage's blocks and the one that leaves it; every layer's limit.

    Limits are by runs of equally many sites. The last result says why some layers have none.
    """
    why_missing = None
    entering: list[Kernel] = []
    leaving: list[Kernel] = []
    runs: list[Kernel] = []

    for stage in network.stages:
        correlated = has_correlated_steps(stage, state)
        state, stage_entering = through_blocks(stage.block, state, stage.repeats)
        outputs = jax.tree.map(lambda x: x[1:], stage_entering)
        if correlated:
            why_missing = why_missing or _why_missing(stage)
            first = jax.tree.map(lambda x: x[:1], outputs)
            state, stage_entering, rest = (
                jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), kernels)
                for kernels in (state, stage_entering, jax.tree.map(lambda x: x[1:], outputs))
            )
            outputs = jax.tree.map(lambda *v: jnp.concatenate(v), first, rest)
        entering.append(stage_entering)
        leaving.append(state)
        if stage.repeats > 1:
            runs.append(outputs)
        runs.append(jax.tree.map(lambda x: x[None], state))
    return entering, leaving, joined(_forward_limits(network, runs)), why_missing


def _forward_limits(network: Network, runs: Sequence[Kernel]) -> list[ForwardLimit]:
    """The limits of layers that kernels describe, each with an axis of layers in front."""
    laws = [kernels.distribution for kernels in runs]
    values = max((law.shifts.shape[-1] for law in laws if isinstance(law, Shifted)), default=0)

    def about(kernels: Kernel) -> Shifted | None:
        law = kernels.distribution
        if not values:
            return None
        if not isinstance(law, Shifted):
            law = jax.vmap(Shifted.at)(jnp.zeros_like(kernels.mean))
        return jax.vmap(lambda law: law.with_values(values))(law)

    return [
        ForwardLimit(
            kernels.covariance,
            kernels.mean,
            kernels.log_scale,
            jnp.full(len(kernels.mean), isinstance(law, Gaussian | Shifted)),
            network.activation,
            network.saturation_threshold,
            about(kernels),
        )
        for kernels, law in zip(runs, laws, strict=True)
    ]


def has_correlated_steps(stage: Stage, state: Kernel) -> bool:
    """Whether steps share their weights, and a unit's signal goes on to the next beside them.

    What the weights add to the unit is then correlated over the steps, and so with its signal.
    """
    if not stage.tied or stage.repeats < 2 or not stage.block.n_weights:
        return False
    depends: list[bool] = []

    def step(state: Kernel) -> Array:
        state = state.renewed()
        after = stage.block.kernel(state)
        depends.append(after.may_depend_on(state))
        return after.mean

    jax.eval_shape(step, state)
    return depends[0]


def _why_missing(stage: Stage) -> str:
    name = type(stage.block).__name__
    sentence = (
        f"no theory goes step by step through {stage.repeats} steps of {name} with shared weights: "
        "what drives a unit is correlated over the steps and with the signal that it carries on"
    )
    known = isinstance(stage.block, GRU | LSTM)
    return sentence + ("; see theory.shared_weights.predict_steps" if known else "")


def through_blocks(block: AbstractBlock, state: Kernel, repeats: int) -> tuple[Kernel, Kernel]:
    """The kernel that leaves equal blocks, and those that enter each of them, all in one."""
    # A loop's carry has one structure: at its start nothing more is known than at its end.
    distribution = (
        jax.eval_shape(block.kernel, state).distribution if repeats > 1 else state.distribution
    )
    state = state.as_carry(distribution)
    distribution = state.distribution

    def step(state: Kernel, _: None) -> tuple[Kernel, Kernel]:
        after = block.kernel(state)
        return after.as_carry(distribution if repeats > 1 else after.distribution), state

    return scan_layers(step, state, None, length=repeats)


def at_widths(prediction: Prediction, network: Network, other: Network) -> Prediction:
    """The result of `predict` for a network that differs in its widths alone.

    Scales and inputs being equal, so is everything going up; going down, g^l is proportional to
    n_L/n_l, and nothing needs to be computed again.

    Parameters
    ----------
    prediction, network
        A network and its prediction.
    other
        One of the same depth, activation, σ_w and σ_b, as `networks.divide_widths` makes.
    """
    widths, others = (np.log(np.array(n.widths[1:])) for n in (network, other))
    shift = (others[-1] - others) - (widths[-1] - widths)
    changes = {
        "log_gradient_variance": shift,
        "log_weight_gradient_variance": shift,
        "log_gradient_norm": (shift + others - widths) / 2,
    }
    values = {
        key: np.asarray(value) + changes.get(key, 0.0) for key, value in prediction.values.items()
    }
    values["chi"] = values["chi"] * np.exp(np.append(-np.diff(shift), 0.0))
    return Prediction(values, prediction.why_missing)


def asymptotic_log_chi(network: Network, log_q: Float[Array, ""], beyond: int) -> Float[Array, ""]:
    """Log χ where one input would be after ``beyond`` more layers of the longest stage.

    Parameters
    ----------
    network
        The law of the network.
    log_q
        Where it starts: the logarithm of the top layer's second moment.
    beyond
        How many layers further.
    """
    # The first block's input has no activation: it is none to be repeated, if there is another.
    stage = max(network.stages[1:] or network.stages, key=lambda stage: stage.repeats)
    block = stage.block
    log_scale = jnp.asarray(log_q, float)[None] / 2
    begin = Kernel.of(jnp.ones_like(log_scale)[None], log_scale=log_scale).in_range()
    if has_correlated_steps(stage, begin):
        return jnp.full_like(log_scale[0], jnp.nan)
    if not jax.eval_shape(block.kernel, begin).distribution.has_memory:
        return log_gain(block, through_blocks(block, begin, beyond)[0])[0]
    state, _ = through_blocks(block, begin, min(beyond, _SETTLED_AFTER))
    # Of gradients that have settled too: the largest eigenvalue of what a layer does to them.
    zero = jnp.zeros_like(state.mean)
    none, unravel = ravel_pytree((zero, state.distribution.memory_of_independent(zero)))

    def out(tangents: Array) -> Array:
        return ravel_pytree(block.kernel(state.with_tangents(unravel(tangents))).tangents)[0]

    step = jax.jacfwd(out)(none)

    def turn(v: Array, _: None) -> tuple[Array, Array]:
        v = jnp.matmul(step, v, precision=jax.lax.Precision.HIGHEST)
        size = jnp.linalg.norm(v)
        return v / size, size

    start = ravel_pytree((zero + 1, state.distribution.memory_of_independent(zero + 1)))[0]
    return jnp.log(jax.lax.scan(turn, start, None, length=_SETTLED_AFTER)[1][-1])
