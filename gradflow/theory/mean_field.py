"""Mean-field theory: the infinite-width law of every statistic, layer by layer.

Forward, the second moments K of the pre-activations follow the blocks' kernel maps,
K^l = σ_w² E[φ(u) φ(v)] + σ_b² for a dense layer (Poole et al. 2016, arXiv:1606.05340). Backward,
one component of δ^l = ∂C/∂z^l has the variance g^l with

    g^l = χ^l g^{l+1},    χ^l = (n_{l+1}/n_l) T^{l+1},

where T is what the block does to the second moment of a tangent, σ_w² E[φ'²] for a dense layer
(Schoenholz et al. 2017, arXiv:1611.01232, eq. 7), and the ratio of widths turns the sum over fan_in
into the backward sum over fan_out (Glorot & Bengio 2010, eq. 6). Where a block mixes the sites
(BatchNorm, convolution), tangents' and gradients' second moments over sites are matrices, S and Λ,
and Λ goes down by the transpose of the linear map S -> T[S]. Where tangents depend on the signals
(an LSTM's cells), it is the transpose of what becomes of all that is known of them. The top is
δ^L ~ N(0, I), independent for each site, and C the mean cost over them. Backward weights are as
good as independent of forward ones at infinite width.

Scales that are negative or not finite raise `InputError`, where they are known before the program
runs (outside jit).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from gradflow import activations, gaussian, statistics
from gradflow._arguments import as_real
from gradflow._checks import check_count, check_scale, is_traced
from gradflow.activations import Activation
from gradflow.blocks import GRU, LSTM, AbstractBlock, Dense
from gradflow.errors import InputError
from gradflow.kernels import Kernel, multiply_kernel
from gradflow.networks import Network, Stage, check_network
from gradflow.statistics import BackwardLaw, ForwardLaw, Prediction

__all__ = [
    "asymptotic_log_chi",
    "at_widths",
    "chi",
    "correlation_map",
    "direction_gains",
    "gain",
    "input_gram",
    "laws",
    "length_map",
    "log_gain",
    "predict",
    "predict_from",
    "profile",
    "scan_layers",
]

# Layers whose quadratures, of about 100 kB each for every average, are in memory together.
_LAYERS_AT_ONCE = 1000
# Layers, and steps of a gradient, after which laws that remember tangents are taken as settled.
_TURNS = 300


# Of inputs' products, relative, in units of their dtype's epsilon.
_ROUNDING = 1 << 10

Share = Float[np.ndarray, " weights"]
# Of a tangent's second moments, and of what the signals' law knows of it beyond them, or None.
_Cotangent = tuple[Array, Any]


def input_gram(inputs: Num[ArrayLike, "sites n_in"]) -> Float[Array, "sites sites"]:
    """Return (1/n_0) x_a · x_b, all that the theory needs to know of its inputs.

    Parameters
    ----------
    inputs
        Shape (sites, n_0). Integers (pixels, say) become floats before they are multiplied.

    Raises
    ------
    InputError
        If they are no such array of finite real numbers, or their squares leave the float's range.
    """
    array = as_real("inputs", inputs, whole=float)
    if array.ndim != 2:
        raise InputError(f"inputs has shape {array.shape}; it is (inputs, n_0)")
    x = jnp.asarray(array)
    gram = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) / x.shape[1]
    if not is_traced(gram):
        square = np.diagonal(gram)
        if not (np.isfinite(square).all() and square[np.asarray(x).any(axis=1)].all()):
            raise InputError(
                f"inputs has a row whose mean square is beyond {gram.dtype}'s range; scale them, "
                "turn JAX's x64 mode on, or use comparison.predict_float64"
            )
    return gram


def length_map(
    activation: Activation,
    q: Float[Array, ""],
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
) -> Float[Array, ""]:
    """Return V(q) = σ_w² E[φ(√q Z)²] + σ_b², the next layer's q (Poole et al. 2016, eq. 3)."""
    activation = activations.get(activation)
    check_scale("sigma_w2", sigma_w2)
    check_scale("sigma_b2", sigma_b2)
    return jnp.asarray(sigma_w2 * gaussian.moment(activation, "phi2", q) + sigma_b2)


def chi(activation: Activation, q: Float[Array, ""], sigma_w2: ArrayLike) -> Float[Array, ""]:
    """Return χ(q) = σ_w² E[φ'(√q Z)²] (Schoenholz et al. 2017, eq. 7); χ₁ at q = q*."""
    activation = activations.get(activation)
    check_scale("sigma_w2", sigma_w2)
    return jnp.asarray(sigma_w2 * gaussian.moment(activation, "dphi2", q))


def correlation_map(
    activation: Activation,
    covariance: Float[Array, "sites sites"],
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
) -> Float[Array, "sites sites"]:
    """Return σ_w² E[φ(u_a) φ(u_b)] + σ_b² for every pair (Poole et al. 2016, eq. 5)."""
    activation = activations.get(activation)
    check_scale("sigma_w2", sigma_w2)
    check_scale("sigma_b2", sigma_b2)
    return jnp.asarray(sigma_w2 * gaussian.kernel(activation, covariance) + sigma_b2)


def profile(
    activation: Activation,
    q1: Float[Array, ""],
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    *,
    depth: int,
) -> dict[str, Float[Array, " layers"]]:
    """Return one input's way through ``depth`` layers of equal width, from a given q of layer 1.

    Returns
    -------
    dict
        ``q``, ``log_q``, ``activation_mean``, ``activation_second_moment``, ``chi`` (χ^l = σ_w²
        E[φ'(z^l)²]), and ``log_jacobian_norm``, the log of the mean squared gain of a random
        direction through layers 1 to l, log Π_{k<=l} χ^k; each of shape (depth,).
    """
    activation = activations.get(activation)
    check_scale("q1", q1)
    check_scale("sigma_w2", sigma_w2)
    check_scale("sigma_b2", sigma_b2)
    check_count("depth", depth)

    block = Dense(activation, 1, jnp.sqrt(jnp.asarray(sigma_w2)), jnp.sqrt(jnp.asarray(sigma_b2)))

    def step(z: Kernel, _: None) -> tuple[Kernel, tuple[Array, ...]]:
        h, after = z.through(activation).plain(), block.kernel(z)
        log_q = jnp.log(jnp.diagonal(z.covariance)) + 2 * z.log_scale
        found = log_q, h.mean, jnp.diagonal(h.covariance), log_gain(block, z)
        return after.as_carry(z.law), tuple(x[0] for x in found)

    q1 = jnp.asarray(q1, jnp.result_type(q1, block.sigma_w, 0.0))
    begin = Kernel.of(q1[None, None])
    _, (log_q, mean, second, log_chi) = jax.lax.scan(
        step, begin.as_carry(begin.law), None, length=depth
    )
    return {
        "q": jnp.exp(log_q),
        "log_q": log_q,
        "activation_mean": mean,
        "activation_second_moment": second,
        "chi": jnp.exp(log_chi),
        "log_jacobian_norm": jnp.cumsum(log_chi),
    }


def direction_gains(
    activation: Activation,
    x_sq_over_n: ArrayLike,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    *,
    depth: int,
) -> dict[str, Float[Array, " layers"]]:
    """Return how the Jacobian scales a tangent along the input, and one orthogonal to it.

    A tangent along x is no generic direction: it stays correlated with the signal, and a saturating
    φ shrinks it much more (tanh at q = 1: by 0.23 in one layer, squared, beside a random one). A
    finite difference along x measures this number, and not χ.

    Parameters
    ----------
    activation
        φ.
    x_sq_over_n
        |x|²/n_0 > 0.
    sigma_w2, sigma_b2
        σ_w² and σ_b², >= 0.
    depth
        L >= 1: layers of equal width.

    Returns
    -------
    dict
        ``q`` of each layer's pre-activations, and ``parallel`` and ``orthogonal``, the squared
        gains ‖J u‖² of unit tangents u up to and with each layer's φ; each of shape (depth,).
    """
    activation = activations.get(activation)
    check_scale("x_sq_over_n", x_sq_over_n, positive=True)
    check_scale("sigma_w2", sigma_w2)
    check_scale("sigma_b2", sigma_b2)
    w2, b2 = jnp.asarray(sigma_w2), jnp.asarray(sigma_b2)
    start = jnp.asarray(x_sq_over_n, jnp.result_type(x_sq_over_n, w2, b2, 0.0))

    def step(
        state: tuple[Array, Array, Array, Array], _: None
    ) -> tuple[tuple[Array, Array, Array, Array], tuple[Array, ...]]:
        # Second moments of the signal h, of h with its tangent, and of the tangent.
        signal, mixed, along, across = state
        q, r, w = w2 * signal + b2, w2 * mixed, w2 * along
        stretched = gaussian.expectation(
            lambda x: (x * activation.derivative(x)) ** 2, q, kinks=activation.kinks
        )
        m = gaussian.some_moments(activation, ("phi2", "dphi2", "x_phi_dphi"), q)
        share = r / q  # of z in its tangent
        along = share**2 * stretched + (w - share * r) * m["dphi2"]
        across = w2 * across * m["dphi2"]
        return (m["phi2"], share * m["x_phi_dphi"], along, across), (q, along, across)

    one = jnp.ones_like(start)
    _, (q, parallel, orthogonal) = jax.lax.scan(
        step, (start, jnp.sqrt(start), one, one), None, length=check_count("depth", depth)
    )
    return {"q": q, "parallel": parallel, "orthogonal": orthogonal}


def predict(
    network: Network,
    gram: Float[ArrayLike, "sites sites"],
    mean: Float[ArrayLike, " sites"] | None = None,
) -> Prediction:
    """Return every statistic's infinite-width value at every layer.

    A pure function: jit it, vmap it over the network's σ_w and σ_b, differentiate it. It follows
    the dtype of ``gram``.

    Parameters
    ----------
    network
        The law of the network.
    gram
        Shape (sites, sites), (1/n_0) x_a · x_b; see `input_gram`.
    mean
        Shape (sites,): the mean over its components of each input, for a first layer that sees it
        (LayerNorm, weights that are standardised); 0 without it. A first layer that begins with a φ
        takes the inputs as Gaussian over their components, of mean 0.

    Returns
    -------
    Prediction
        Each statistic of `gradflow.statistics`, shape (layers,). ``chi`` is NaN at the top layer,
        which has none above it. ``correlation`` needs two inputs. Where a layer hands on signals
        that are not Gaussian over units, statistics of φ of them are NaN. Where steps that share
        their weights carry a unit's signal on beside them (GRU, LSTM, Residual), nothing is known
        step by step of the signals after the first and of the gradients below the last: NaN, and
        ``missing`` says why. `theory.shared_weights` has the theory of a GRU or LSTM.

    Raises
    ------
    InputError
        If the theory does not know what a block makes of its signals; the message says why.

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), Schoenholz et al. 2017 (arXiv:1611.01232).
    """
    return predict_from(*laws(network, gram, mean))


def predict_from(forward: Sequence[ForwardLaw], backward: Sequence[BackwardLaw]) -> Prediction:
    """Return what `predict` does, from what `laws` returns."""
    sites = forward[0].mean.shape[-1]
    wanted = [(s, s.predict) for s in statistics.ALL if s.predict and s.sites <= sites]
    return Prediction(
        {
            s.key: jnp.concatenate(
                [_each_layer(predict, run) for run in (backward if s.backward else forward)]
            )
            for s, predict in wanted
        },
        missing=backward[0].missing,
    )


def laws(
    network: Network,
    gram: Float[ArrayLike, "sites sites"],
    mean: Float[ArrayLike, " sites"] | None = None,
) -> tuple[list[ForwardLaw], list[BackwardLaw]]:
    """Return the laws of all layers' signals and gradients; the arguments are those of `predict`.

    One for every run of layers with equally many sites: one, unless a layer merges positions.

    Raises
    ------
    InputError
        As `predict` does.
    """
    begin = Kernel.of(*_checked_gram(network, gram, mean))
    entering, leaving, forward, missing = _up(network, begin)
    if network.mixes_sites:
        backward = _down_together(network, entering, forward[-1].mean.shape[-1])
    elif any(gram.law.has_memory for gram in leaving):
        backward = [_down_in_turn(network, entering, leaving)]
    else:
        backward = [_down(network, entering)]
    return forward, [dataclasses.replace(law, missing=missing) for law in backward]


def _checked_gram(network: Network, gram: Any, mean: Any) -> tuple[Array, Array | None]:
    """Return the inputs' products and means as arrays, or raise `InputError`."""
    check_network(network)
    found = as_real("gram", gram, whole=float)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise InputError(
            f"gram has shape {found.shape}; it is (inputs, inputs), as "
            "mean_field.input_gram(inputs) returns it"
        )
    gram = jnp.asarray(found)
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
    means = jnp.asarray(as_real("mean", mean), gram.dtype)
    if means.shape != gram.shape[:1]:
        raise InputError(f"mean has shape {means.shape}; it is ({len(gram)},), one for each input")
    return gram, means


def _each_layer(f: Callable[[Any], Any], layers: Any) -> Any:
    """Return f of every layer: at once or, where their quadratures would fill memory, in turn."""
    few = len(jax.tree.leaves(layers)[0]) <= _LAYERS_AT_ONCE
    return jax.vmap(f)(layers) if few else jax.lax.map(f, layers)


def _up(
    network: Network, state: Kernel
) -> tuple[list[Kernel], list[Kernel], list[ForwardLaw], str | None]:
    """Return what enters each stage's blocks, what leaves it, and every layer's law.

    Laws are by runs of equal sites. The last result says why there is none of some layers.
    """
    missing = None
    entering: list[Kernel] = []
    leaving: list[Kernel] = []
    found: list[ForwardLaw] = []

    def law(grams: Kernel, gaussian: bool) -> ForwardLaw:
        known = jnp.full(len(grams.mean), gaussian)
        return ForwardLaw(grams.covariance, grams.mean, grams.log_scale, known, network.activation)

    for stage in network.stages:
        carries = _carries_what_it_is_driven_by(stage, state)
        state, stage_entering = _through(stage.block, state, stage.repeats)
        handed_on = jax.tree.map(lambda x: x[1:], stage_entering)
        if carries:
            missing = missing or _missing(stage)
            first = jax.tree.map(lambda x: x[:1], handed_on)
            state, stage_entering, rest = (
                jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grams)
                for grams in (state, stage_entering, jax.tree.map(lambda x: x[1:], handed_on))
            )
            handed_on = jax.tree.map(lambda *v: jnp.concatenate(v), first, rest)
        entering.append(stage_entering)
        leaving.append(state)
        known = state.gaussian
        if stage.repeats > 1:
            found.append(law(handed_on, known))
        found.append(law(jax.tree.map(lambda x: x[None], state), known))
    return entering, leaving, _joined(found), missing


def _carries_what_it_is_driven_by(stage: Stage, state: Kernel) -> bool:
    """Whether steps share their weights, and a unit's signal goes on to the next beside them.

    What the weights add to the unit is then correlated over the steps, and so with its signal.
    """
    if not stage.tied or stage.repeats < 2 or not stage.block.n_weights:
        return False
    found: list[bool] = []

    def step(state: Kernel) -> Array:
        state = state.renewed()
        after = stage.block.kernel(state)
        found.append(after.may_depend_on(state))
        return after.mean

    jax.eval_shape(step, state)
    return found[0]


def _missing(stage: Stage) -> str:
    name = type(stage.block).__name__
    sentence = (
        f"no theory goes step by step through {stage.repeats} steps of {name} with shared weights: "
        "what drives a unit is correlated over the steps and with the signal that it carries on"
    )
    known = isinstance(stage.block, GRU | LSTM)
    return sentence + ("; see theory.shared_weights.predict_steps" if known else "")


def _through(block: AbstractBlock, state: Kernel, repeats: int) -> tuple[Kernel, Kernel]:
    """Return what leaves equal blocks, and what enters each of them."""
    # What a loop carries must not be known better at its start than at its end.
    law = jax.eval_shape(block.kernel, state).law if repeats > 1 else state.law
    state = state.as_carry(law)
    law = state.law

    def step(state: Kernel, _: None) -> tuple[Kernel, Kernel]:
        after = block.kernel(state)
        return after.as_carry(law if repeats > 1 else after.law), state

    return scan_layers(step, state, None, length=repeats)


def _joined(laws: Sequence[Any]) -> list[Any]:
    """Join the laws of layers that follow each other, where they have equally many sites."""
    runs = itertools.groupby(laws, lambda law: jax.tree.leaves(law)[0].shape[1])
    return [jax.tree.map(lambda *v: jnp.concatenate(v), *run) for _, run in runs]


def scan_layers(step: Callable, carry: Any, xs: Any, length: int, reverse: bool = False) -> Any:
    """`jax.lax.scan`, but a single step may change the carry's structure."""
    if length != 1:
        return jax.lax.scan(step, carry, xs, length=length, reverse=reverse)
    carry, y = step(carry, jax.tree.map(lambda leaf: leaf[0], xs))
    return carry, jax.tree.map(lambda leaf: leaf[None], y)


def _down(network: Network, entering: Sequence[Kernel]) -> BackwardLaw:
    """Return the law of the gradient at every layer, where every site has its own.

    Each layer's factor is found by itself, and their products are taken.
    """
    log_chi, by_weights = [], []
    shares = _shares(network)
    for stage, stage_entering, share in zip(network.stages, entering, shares, strict=True):

        def pull(
            layer: Kernel, block: AbstractBlock = stage.block, share: Share = share
        ) -> tuple[Array, Array]:
            return _gains(block, share, layer)

        factor, weight_gain = _each_layer(pull, stage_entering)
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
    return BackwardLaw(
        log_variance,
        jnp.concatenate([above, jnp.full_like(top, jnp.nan)]),
        log_weight - 2 * math.log(sites),
        jnp.asarray(np.array(network.widths[1:]), above.dtype),
    )


def _down_together(network: Network, entering: Sequence[Kernel], sites: int) -> list[BackwardLaw]:
    """Return the law of the gradient at every layer, where sites mix, by runs of equal sites.

    The gradient's second moments over sites, Λ, go down as a matrix: at trace 1, beside a log.
    There are ``sites`` at the top.
    """
    dtype = entering[0].mean.dtype
    ratios = _log_width_ratios(network, dtype)
    carry = (jnp.eye(sites, dtype=dtype) / sites, jnp.asarray(math.log(sites), dtype))
    found: list[tuple[Array, Array, Array]] = []
    widths = np.array(network.widths[1:])
    last = network.depth
    for stage, stage_entering, share in reversed(
        list(zip(network.stages, entering, _shares(network), strict=True))
    ):

        def step(
            carry: tuple[Array, Array],
            layer: tuple[Kernel, Array],
            block: AbstractBlock = stage.block,
            share: Share = share,
        ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            (second, log), (gram, ratio) = carry, layer
            below, log_factor, log_weight = _pull_back(block, share, gram, second)
            size = jnp.trace(below)
            values = jnp.log(jnp.diagonal(second)) + log, log_weight + log
            return (below / size, log + log_factor + jnp.log(size) + ratio), values

        first = last - stage.repeats
        parts = (stage_entering, ratios[first:last])
        carry, values = scan_layers(step, carry, parts, length=stage.repeats, reverse=True)
        found.insert(0, (*values, jnp.asarray(widths[first:last], dtype)))
        last = first
    runs: list[BackwardLaw] = []
    for every, log_weight, width in reversed(_joined(found)):
        top = jnp.full_like(every[:1], jnp.nan)
        if runs:  # the layer above has another number of sites: by means over them
            change = _log_mean(every[-1]) - _log_mean(runs[0].log_variance[0])
            top = jnp.broadcast_to(change, top.shape)
        ratio = jnp.concatenate([every[:-1] - every[1:], top])
        runs.insert(0, BackwardLaw(every, ratio, log_weight - 2 * math.log(sites), width))
    return runs


def _down_in_turn(
    network: Network, entering: Sequence[Kernel], leaving: Sequence[Kernel]
) -> BackwardLaw:
    """Return the law of the gradient at every layer, where a law has tangents of its own.

    The gradient goes down as the cotangent of all that is known of a tangent: at variance 1, beside
    a log, for each site.
    """
    sites = len(leaving[-1].mean)
    one = jnp.ones(sites, leaving[-1].mean.dtype)
    ratios = _log_width_ratios(network, one.dtype)
    carry = ((one, None), jnp.zeros_like(one))  # δ^L ~ N(0, I)
    found: list[tuple[Array, Array, Array]] = []
    last = network.depth
    for stage, stage_entering, left, share in reversed(
        list(zip(network.stages, entering, leaving, _shares(network), strict=True))
    ):

        def step(
            carry: tuple[_Cotangent, Array],
            layer: tuple[Kernel, Array],
            block: AbstractBlock = stage.block,
            share: Share = share,
        ) -> tuple[tuple[_Cotangent, Array], tuple[Array, Array, Array]]:
            (above, log), (gram, ratio) = carry, layer
            below, log_weight = _pull_all_back(block, share, gram, above)
            size = _variance(gram, below)
            below = jax.tree.map(lambda x: jax.vmap(jnp.divide)(x, size), below)
            gained = jnp.log(size) + ratio
            return (below, log + gained), (log, gained, log_weight + log)

        gradient, log = carry
        carry = (_as_left(left, gradient), log)
        first = last - stage.repeats
        parts = (stage_entering, ratios[first:last])
        carry, values = scan_layers(step, carry, parts, length=stage.repeats, reverse=True)
        found.insert(0, values)
        last = first
    log_variance, gained, log_weight = (jnp.concatenate(v) for v in zip(*found, strict=True))
    return BackwardLaw(
        log_variance,
        jnp.concatenate([gained[1:], jnp.full_like(log_variance[:1], jnp.nan)]),
        jax.nn.logsumexp(log_weight, axis=1) - 2 * math.log(sites),
        jnp.asarray(np.array(network.widths[1:]), one.dtype),
    )


def _variance(gram: Kernel, gradient: _Cotangent) -> Float[Array, " sites"]:
    """Return the mean square over units of a gradient: its factor of a tangent that is alike."""
    plain, own = gradient
    if own is None:
        return plain
    _, pull = jax.vjp(gram.law.independent, jnp.ones_like(plain))
    return plain + pull(own)[0]


def _as_left(left: Kernel, gradient: _Cotangent) -> _Cotangent:
    """Return the gradient of what the layer above took, as that of what the one below left."""
    plain, own = gradient
    if not left.law.has_memory:
        # The layer above took it as a tangent that is independent of the signals.
        return (plain, None) if own is None else (jnp.ones_like(plain), None)
    if own is None:
        own = jax.tree.map(jnp.zeros_like, left.law.independent(plain))
    return plain, own


def _log_mean(log: Float[Array, " sites"]) -> Float[Array, ""]:
    return jax.nn.logsumexp(log) - math.log(log.shape[0])


def _log_width_ratios(network: Network, dtype: DTypeLike) -> Array:
    widths = np.array(network.widths)
    return jnp.asarray(np.log(widths[1:] / widths[:-1]), dtype)


def _shares(network: Network) -> list[Share]:
    """Return, for each stage, what a matrix's gradient counts for in the mean square of all.

    With g the variance of the gradient that a block gets from above, on n units, the squared norm
    of ∂C/∂W is fan_in · n · g times the cotangent of its tap; it is divided by how many weights
    the block has.
    """
    found = []
    for stage, (below, above) in zip(
        network.stages, itertools.pairwise(network.stage_widths), strict=True
    ):
        shapes = stage.block.shapes(below)
        fan_ins = np.array([fan_in for _, fan_in in shapes], float)
        found.append(above * fan_ins / sum(n * m for n, m in shapes) if shapes else fan_ins)
    return found


def _gains(block: AbstractBlock, share: Share, entering: Kernel) -> tuple[Array, Array]:
    """Return the logarithms of `_pull_back` of ones where sites do not mix, each site by itself.

    So nothing is averaged over pairs of sites.
    """

    def alone(q: Array, mean: Array, log_scale: Array) -> tuple[Array, Array]:
        one = Kernel.of(q[None, None], mean[None], law=entering.law, log_scale=log_scale[None])
        factor, log_factor, weights = _pull_back(block, share, one, jnp.ones_like(one.mean))
        return jnp.log(factor[0]) + log_factor, weights

    return jax.vmap(alone)(jnp.diagonal(entering.covariance), entering.mean, entering.log_scale)


def _pull_back(
    block: AbstractBlock, share: Share, entering: Kernel, above: Float[Array, "..."]
) -> tuple[Array, Array, Array]:
    """Take second moments of a gradient down one block; also the log of the variance of ∂C/∂W.

    The transpose of what the block does to a tangent's second moments, which have the same shape:
    (sites,), or (sites, sites) where sites mix. They are exp of the second result times the first.
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
    # Sites that are here together have their scales, and so taps' units, in common.
    return below, 2 * largest, _log_weighted(share, by_weights, units[:, 0]) + 2 * largest


def _pull_all_back(
    block: AbstractBlock, share: Share, entering: Kernel, above: _Cotangent
) -> tuple[_Cotangent, Float[Array, " sites"]]:
    """Do what `_pull_back` does, with all that is known of a tangent, for each site.

    There is no scale beside the first result.
    """
    plain = above[0]
    taps = jnp.zeros((block.n_weights, *plain.shape), plain.dtype)
    zero = jnp.zeros_like(plain)

    def out(tangents: _Cotangent, taps: Array) -> tuple[_Cotangent, Array]:
        after, units = _tapped(block, entering.with_tangents(tangents), taps)
        return after.plain().tangents, units

    _, pull, units = jax.vjp(out, (zero, entering.law.independent(zero)), taps, has_aux=True)
    below, by_weights = pull(above)
    return below, _log_weighted(share, by_weights, units) * jnp.ones_like(plain)


def _tapped(
    block: AbstractBlock, entering: Kernel, taps: Array
) -> tuple[Kernel, Float[Array, "weights sites"]]:
    """Return what is known after the block; its weights' tangents are the taps, one after one.

    The second result are the taps' units: exp of twice them is what a tap of 1 stands for.
    """
    remaining, units = iter(taps), []
    together = entering.tangent is not None and entering.tangent.ndim == 2

    def multiply(gram: Kernel, *, full_input: Kernel | None = None, **law: Any) -> Kernel:
        full_input = gram if full_input is None else full_input
        if together:
            gram, full_input = gram.common(), full_input.common()
        out = multiply_kernel(gram, tap=next(remaining), full_input=full_input, **law)
        units.append(full_input.log_scale - out.log_tangent_scale)
        return out

    after = block.kernel(entering, multiply)
    nothing = jnp.zeros((0, len(entering.mean)), entering.mean.dtype)
    return after, jnp.stack(units) if units else nothing


def _log_weighted(
    share: Share, by_weights: Float[Array, "weights ..."], units: Float[Array, "weights ..."]
) -> Array:
    """Return the log of the variance of ∂C/∂W over all matrices; a block without any has none: NaN.

    ``units`` are the logarithms of the taps' units, for each matrix or each of its sites.
    """
    if not len(by_weights):
        return jnp.full((), jnp.nan, by_weights.dtype)
    shares = jnp.asarray(share, by_weights.dtype)
    largest = jnp.max(units, axis=0, keepdims=True)
    parts = by_weights * jnp.exp(2 * (units - largest))
    return jnp.log(jnp.sum(jax.vmap(jnp.multiply)(shares, parts), axis=0)) + 2 * largest[0]


def gain(block: AbstractBlock, entering: Kernel) -> Float[Array, " sites"]:
    """Return each input's factor of mean squared gradients of one block, at equal widths."""
    return jnp.exp(log_gain(block, entering))


def log_gain(block: AbstractBlock, entering: Kernel) -> Float[Array, " sites"]:
    """Return the natural logarithms of what `gain` returns."""
    return _gains(block, np.zeros(block.n_weights), entering)[0]


def at_widths(prediction: Prediction, network: Network, other: Network) -> Prediction:
    """Return what `predict` gives for a network that differs in its widths alone.

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
    return Prediction(values, prediction.missing)


def asymptotic_log_chi(network: Network, log_q: Float[Array, ""], beyond: int) -> Float[Array, ""]:
    """Return log χ where one input would be after ``beyond`` more layers of the longest stage.

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
    if _carries_what_it_is_driven_by(stage, begin):
        return jnp.full_like(log_scale[0], jnp.nan)
    if not jax.eval_shape(block.kernel, begin).law.has_memory:
        return log_gain(block, _through(block, begin, beyond)[0])[0]
    state, _ = _through(block, begin, min(beyond, _TURNS))
    # Of gradients that have settled too: the largest eigenvalue of what a layer does to them.
    zero = jnp.zeros_like(state.mean)
    none, unravel = ravel_pytree((zero, state.law.independent(zero)))

    def out(tangents: Array) -> Array:
        return ravel_pytree(block.kernel(state.with_tangents(unravel(tangents))).tangents)[0]

    step = jax.jacfwd(out)(none)

    def turn(v: Array, _: None) -> tuple[Array, Array]:
        v = jnp.matmul(step, v, precision=jax.lax.Precision.HIGHEST)
        size = jnp.linalg.norm(v)
        return v / size, size

    start = ravel_pytree((zero + 1, state.law.independent(zero + 1)))[0]
    return jnp.log(jax.lax.scan(turn, start, None, length=_TURNS)[1][-1])
