"""Attention over exchangeable tokens: every pair of tokens has one correlation ρ, without a mask.

Tokens then stay exchangeable, and all is exact at infinite width, of infinitely many heads and an
infinite key width, at any number of tokens T. A token's scores are independent, N(0, v), up to a
constant; v = κ q s, s = q (1 - ρ), κ = σ_q² σ_k², ov = σ_v² σ_o². With the averages P, C, R and R×
of `gradflow.gaussian.softmax_rows` at c = ρ,

    q' = ov (q ρ + s P),  s' = ov s (P - C),

and second moments of a tangent, d of one token and o of two, become the sum of

    value path:  ov (o + (d - o) P),  ov (o + (d - o) C)
    score path:  ov κ R (d s² + q s (d - o)),  ov κ R× (o s² + q ρ s (d - o)).

A gradient's second moments over tokens go down by the transpose. Rows of A sum to 1, so the value
path keeps the part of a gradient that all tokens have in common, times ov.

Any network, inputs and masks: `mean_field.predict`, of networks with `blocks.Attention`.

References: Hron et al. 2020, arXiv:2006.10540 (the limit); Noci et al. 2022, arXiv:2206.03126, and
Dong et al. 2021, arXiv:2103.03404 (rank collapse); Cowsik et al. 2024, arXiv:2403.02579
(exchangeable tokens).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow import activations, gaussian
from gradflow._checks import check_count, check_scale, is_traced, unknown_name
from gradflow.activations import Activation, ActivationLike
from gradflow.errors import InputError
from gradflow.gaussian import _pairs
from gradflow.gaussian._quadrature import dot

__all__ = ["FeedForward", "heads", "initial_scores", "large_tokens", "layer", "pre_norm_growth"]
__all__ += ["random_energy_walk", "walk"]

_NORMS = ("none", "peri", "post", "pre")
# 1 - ρ below which the branch's own is an integral, and no difference of two large numbers.
_APART = 1e-3


class _Heads(NamedTuple):
    """Averages over heads of two rows A, A' of attention weights; M = diag(A) - A Aᵀ."""

    P: Float[Array, "..."]  # E Σ_b A_b²
    C: Float[Array, "..."]  # E Σ_b A_b A'_b
    gap: Float[Array, "..."]  # P - C, with all its digits
    R: Float[Array, "..."]  # E tr M²
    R_cross: Float[Array, "..."]  # E tr M M'
    entropy: Float[Array, "..."]  # E[-Σ_b A_b ln A_b], in nats
    largest: Float[Array, "..."]  # E max_b A_b


def heads(
    tokens: int, variance: ArrayLike, correlation: ArrayLike = 0.0, *, key_width: int | None = None
) -> _Heads:
    """The averages over attention heads that close the theory, the entropy, and the largest weight.

    A pure function, differentiable in v and c.

    Parameters
    ----------
    tokens
        T.
    variance
        v of a row's scores, from 0 to `gaussian.LARGEST_SCORE_VARIANCE`, of any shape.
    correlation
        c of two rows' scores, from -1/(T - 1) to 1.
    key_width
        d_k of two tokens' heads at a finite key width: v is then that at infinite width, and a
        head's own is v χ²/d_k, of d_k degrees of freedom. Infinite without it.

    Raises
    ------
    InputError
        If a number is out of range; if there is a ``key_width`` for other than two tokens, whose
        scores are not independent.
    """
    apart = _apart(tokens, correlation)
    if key_width is None:
        rows = gaussian.softmax_rows(tokens, variance, apart)
        entropy = gaussian.softmax_entropy(tokens, variance)
        return _Heads(*rows, entropy, gaussian.softmax_largest(tokens, variance))
    if tokens != 2:
        raise InputError(
            f"key_width is given with {tokens} tokens; its averages are known of 2, and of others "
            "by blocks.Attention(finite_key_width=True)"
        )
    shares, weights = _chi_squared(check_count("key_width", key_width))
    largest = gaussian.LARGEST_SCORE_VARIANCE / shares[-1]
    if not is_traced(variance) and np.any(np.asarray(variance) > largest):
        raise InputError(
            f"variance is {np.max(np.asarray(variance)):g}; with key_width {key_width} it is at "
            f"most {largest:.4g}"
        )
    each = heads(
        tokens, jnp.asarray(variance)[..., None] * shares, jnp.asarray(correlation)[..., None]
    )
    return _Heads(*(jnp.sum(weights * x, axis=-1) for x in each))


def _chi_squared(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of χ²/d, and their probabilities: the trapezoidal rule of its logarithm."""
    part, root = 66 / degrees, math.sqrt(132 / degrees)  # density beyond: exp(-33) of its peak
    low, high = -part - 1.5 * root, math.log1p(part + root)
    step = min(0.33, 0.66 * math.sqrt(2 / degrees))
    x = np.linspace(low, high, 1 + math.ceil((high - low) / step))
    log_density = degrees / 2 * (x - np.expm1(x))
    density = np.exp(log_density - log_density.max())
    return np.exp(x), density / density.sum()


class _LargeTokens(NamedTuple):
    """What many tokens' theories say of one row of attention; limits, not values."""

    critical_variance: Float[Array, "..."]  # 2 ln T
    annealed: Float[Array, "..."]  # P ≈ exp(v)/T
    frozen: Float[Array, "..."]  # P ≈ (1 - √(2 ln T/v))₊
    entropy: Float[Array, "..."]  # ln T - v/2


def large_tokens(tokens: int, variance: ArrayLike) -> _LargeTokens:
    """The limits of `heads` for T → ∞: below v = 2 ln T, and frozen above it.

    What they are worth: at T = 1024 and v = 4, P is 0.0285 and exp(v)/T is 0.0533; at v = 16, above
    the critical variance of 13.9, P is 0.2725 and its frozen limit 0.0692, and the entropy is 2.35
    nats, where its limit is below 0. They come true as powers of 1/ln T.

    Parameters
    ----------
    tokens
        T.
    variance
        v, of any shape.

    Raises
    ------
    InputError
        If a number is out of range.

    References
    ----------
    Derrida 1981, Phys. Rev. B 24, 2613 (the random energy model); Giorlandino & Goldt 2025,
    arXiv:2505.24333 (it in attention); Kedia et al. 2024, arXiv:2403.09635 (exp(v)/T).
    """
    tokens = check_count("tokens", tokens)
    check_scale("variance", variance)
    v = jnp.asarray(variance, jnp.result_type(variance, 0.0))
    critical = 2 * math.log(tokens)
    share = jnp.sqrt(critical / jnp.maximum(v, jnp.finfo(v.dtype).tiny))
    return _LargeTokens(
        jnp.full_like(v, critical),
        jnp.exp(v) / tokens,
        jnp.maximum(1 - share, 0),
        math.log(tokens) - v / 2,
    )


class _InitialScores(NamedTuple):
    """Scores of tokens of unit second moment, at initialisation."""

    sigma_q2: Float[Array, "..."]  # d std²
    kappa: Float[Array, "..."]  # σ_q² σ_k², which is v of uncorrelated tokens
    entropy_drop: Float[Array, "..."]  # v/2 nats, of many tokens
    tokens_where_frozen: Float[Array, "..."]  # exp(v/2): fewer tokens than these are frozen


def initial_scores(width: int, weight_sd: ArrayLike) -> _InitialScores:
    """The variance of scores of one width and one standard deviation of W_Q and W_K.

    Parameters
    ----------
    width
        d, the tokens' width.
    weight_sd
        The standard deviation of a weight: 0.02 for GPT-2; of Xavier's rule on W_Q, W_K and W_V in
        one matrix √(2/(4 d)), which makes κ 1/4 instead of 1.

    Raises
    ------
    InputError
        If a number is out of range.
    """
    width = check_count("width", width)
    check_scale("weight_sd", weight_sd)
    sigma_q2 = width * jnp.asarray(weight_sd, jnp.result_type(weight_sd, 0.0)) ** 2
    return _InitialScores(sigma_q2, sigma_q2**2, sigma_q2**2 / 2, jnp.exp(sigma_q2**2 / 2))


class _Layer(NamedTuple):
    """One attention layer of exchangeable tokens, and a gradient independent over its tokens."""

    variance: Float[Array, ""]  # v of the scores
    q: Float[Array, ""]
    off_diagonal: Float[Array, ""]  # q ρ
    spread: Float[Array, ""]  # q (1 - ρ), with all its digits
    value: Float[Array, ""]  # the gradient's second moment below, by the value path
    value_cross: Float[Array, ""]  # and of two tokens
    score: Float[Array, ""]  # the same by the score path
    score_cross: Float[Array, ""]


def layer(
    tokens: int,
    q: ArrayLike,
    correlation: ArrayLike = 0.0,
    *,
    kappa: ArrayLike = 1.0,
    ov: ArrayLike = 1.0,
) -> _Layer:
    """One attention layer, without skip and norm: its tokens, and a gradient's two paths.

    The gradient above has a second moment of 1 and is independent over tokens. Where ρ is near 1,
    s' ≈ ov κ (T - 1)/T² s³: without skips ranks collapse as a cube, layer by layer. At κ = 0, as of
    a scale of 1/d_k, A = 1/T.

    Parameters
    ----------
    tokens
        T.
    q, correlation
        Of the tokens, ρ from -1/(T - 1) to 1; scalars.
    kappa, ov
        σ_q² σ_k² and σ_v² σ_o²: of Var W_Q = σ_q²/d, … and Var W_O = σ_o²/(H d_v).

    Raises
    ------
    InputError
        If a number is out of range.
    """
    for name, value in (("q", q), ("kappa", kappa), ("ov", ov)):
        check_scale(name, value)
    q, ov, kappa = (jnp.asarray(x, jnp.result_type(float)) for x in (q, ov, kappa))
    _check_scores(kappa * q * q * _apart(tokens, correlation))
    state = _State(q, q * _apart(tokens, correlation))
    after, value, score = _attend(tokens, state, kappa, ov)
    cross = max(tokens - 1, 1)
    return _Layer(
        kappa * q * state.spread,
        after.q,
        after.q - after.spread,
        after.spread,
        value[0, 0],
        value[0, 1] / cross,
        score[0, 0],
        score[0, 1] / cross,
    )


class FeedForward(NamedTuple):
    """A sublayer W₂ φ(W₁ x), of Var W₁ = σ₁²/d and Var W₂ = σ₂²/n."""

    activation: ActivationLike = "relu"
    sigma_1: float = math.sqrt(2)
    sigma_2: float = 1.0


class _Walk(NamedTuple):
    """Exchangeable tokens after 0 … L sublayers, and a gradient relative to that at the top."""

    q: Float[Array, " ends"]
    correlation: Float[Array, " ends"]
    apart: Float[Array, " ends"]  # 1 - ρ, with all its digits
    variance: Float[Array, " sublayers"]  # v of a sublayer's scores; NaN of a feed-forward one
    log_gradient_variance: Float[Array, " ends"]
    gradient_correlation: Float[Array, " ends"]  # of two tokens
    common_share: Float[Array, " ends"]  # 1ᵀΛ1/(T tr Λ), from 1/T where independent up to 1


def walk(
    tokens: int,
    sublayers: int,
    *,
    norm: str = "pre",
    kappa: ArrayLike = 1.0,
    ov: ArrayLike = 1.0,
    feed_forward: FeedForward | None = FeedForward(),  # noqa: B008 (immutable)
    branch: ArrayLike = 1.0,
    stream: ArrayLike = 1.0,
    q: ArrayLike = 1.0,
    correlation: ArrayLike = 0.0,
) -> _Walk:
    """Exchangeable tokens through the sublayers of a transformer, and a gradient back down.

    With N of RMSNorm or LayerNorm, one of x' = λ x + α f(N x) (``"pre"``), N(λ x + α f(x))
    (``"post"``), λ x + α N(f(N x)) (``"peri"``) and λ x + α f(x) (``"none"``). The gradient at the
    top is independent over tokens.

    Parameters
    ----------
    tokens, sublayers
        T and L. Attention is the first sublayer, and the feed-forward sublayer every second one.
    norm
        Where the norm is, as above.
    kappa, ov
        σ_q² σ_k² and σ_v² σ_o².
    feed_forward
        None: all sublayers are attention.
    branch, stream
        α and λ, one number or one a sublayer; a stream of 0 is no skip.
    q, correlation
        Of the first sublayer's tokens; scalars.

    Raises
    ------
    InputError
        If an argument is out of range or not known. Where v passes
        `gaussian.LARGEST_SCORE_VARIANCE` on the way, all above it is NaN.
    """
    if norm not in _NORMS:
        raise unknown_name("norm", norm, _NORMS)
    tokens, sublayers = check_count("tokens", tokens), check_count("sublayers", sublayers)
    for name, value in (("kappa", kappa), ("ov", ov), ("branch", branch), ("q", q)):
        check_scale(name, value)
    check_scale("stream", stream)
    dtype = jnp.result_type(float)
    phi, gains = None, jnp.zeros(2, dtype)
    if feed_forward is not None:
        phi = activations.get(feed_forward.activation)
        gains = jnp.stack([jnp.asarray(x, dtype) ** 2 for x in feed_forward[1:]])
    # Of an odd number of sublayers the last pair's second one is left out.
    pairs = -(-sublayers // 2)
    scales = [_by_sublayer(n, x, sublayers) for n, x in (("branch", branch), ("stream", stream))]
    start = jnp.asarray(q, dtype), jnp.asarray(q * _apart(tokens, correlation), dtype)
    numbers = (*(jnp.asarray(x, dtype) for x in (tokens, kappa, ov)), gains)
    return _walk((sublayers, pairs, norm, phi), _State(*start), numbers, *scales)


def _by_sublayer(name: str, value: ArrayLike, sublayers: int) -> Array:
    """A number for each sublayer, of an even number of them."""
    array = jnp.asarray(value, jnp.result_type(float))
    if array.shape not in ((), (sublayers,)):
        raise InputError(
            f"{name} has shape {array.shape}; it is one number, or one for each of {sublayers} "
            "sublayers"
        )
    return jnp.pad(jnp.broadcast_to(array, (sublayers,)), (0, sublayers % 2))


class _State(NamedTuple):
    """Exchangeable tokens: q, and q (1 - ρ)."""

    q: Float[Array, ""]
    spread: Float[Array, ""]


def _apart(tokens: int, correlation: ArrayLike) -> Array:
    """The difference 1 - ρ."""
    least = -1 / max(check_count("tokens", tokens) - 1, 1)
    if not is_traced(correlation):
        given = np.asarray(correlation)
        if not np.all((given >= least * (1 + 1e-6)) & (given <= 1)):
            raise InputError(
                f"correlation is {correlation}; that of {tokens} exchangeable tokens is from "
                f"{least:.6g} to 1"
            )
    return 1 - jnp.asarray(correlation, jnp.result_type(float))


def _check_scores(variance: Array) -> None:
    largest = gaussian.LARGEST_SCORE_VARIANCE
    if not is_traced(variance) and bool(jnp.any(variance > largest)):
        raise InputError(
            f"the variance of scores, kappa q² (1 - correlation), is {float(variance):g}; it is at "
            f"most {largest:g}"
        )


def _attend(
    tokens: int | Array, state: _State, kappa: Array, ov: Array
) -> tuple[_State, Float[Array, "2 2"], Float[Array, "2 2"]]:
    """Tokens after attention, and matrices of the value and the score path on (d, o)."""
    q, s = state
    rows = gaussian.softmax_rows(tokens, kappa * q * s, s / jnp.where(q > 0, q, 1))
    after = _State(ov * (q - s + s * rows.P), ov * s * rows.gap)
    value = ov * jnp.stack([_row(rows.P, 1 - rows.P), _row(rows.C, 1 - rows.C)])
    own, cross = ov * kappa * rows.R * s, ov * kappa * rows.R_cross * s
    score = jnp.stack([_row(own * (s + q), -own * q), _row(cross * (q - s), cross * (2 * s - q))])
    return after, value, score


def _row(d: Array, o: Array) -> Array:
    return jnp.stack([d, o])


def _feed(phi: Activation, gains: Array, state: _State) -> tuple[_State, Float[Array, "2 2"]]:
    """Tokens after a feed-forward sublayer, and the matrix of its tangents."""
    q, s = state.q * gains[0], state.spread * gains[0]
    safe = jnp.where(q > 0, q, 1)
    apart = s / safe
    own = gaussian.moment(phi, "phi2", safe)
    both, slope = _pairs.equal_pair(phi, safe, 1 - apart)

    def integral() -> Array:
        """The variance times the integral of E[φ'(u) φ'(v)] over correlations from c to 1."""
        x, weight = np.polynomial.legendre.leggauss(8)
        x, weight = (x + 1) / 2, weight / 2
        slopes = [_pairs.equal_pair(phi, safe, 1 - apart * each**2)[1] for each in x]
        return safe * apart * dot(jnp.stack(slopes), jnp.asarray(2 * x * weight, q.dtype))

    gap = jax.lax.cond(apart > _APART, lambda: own - both, integral)
    slopes = jnp.stack([gaussian.moment(phi, "dphi2", safe), slope])
    after = _State(gains[1] * own, gains[1] * gap)
    return after, gains[0] * gains[1] * jnp.diag(slopes)


@functools.partial(jax.jit, static_argnums=0)
def _walk(
    structure: tuple[int, int, str, Activation | None],
    start: _State,
    numbers: tuple[Array, Array, Array, Array],
    branch: Array,
    stream: Array,
) -> _Walk:
    sublayers, pairs, norm, phi = structure
    tokens, kappa, ov, gains = numbers

    def attend(state: _State) -> tuple[_State, Array]:
        after, value, score = _attend(tokens, state, kappa, ov)
        return after, value + score

    second = attend if phi is None else functools.partial(_feed, phi, gains)

    def pair(state: _State, scales: tuple[Array, Array]) -> tuple[_State, tuple]:
        kept = []
        for number, f in enumerate((attend, second)):
            after, tangent = _sublayer(norm, f, state, scales[0][number], scales[1][number])
            scored = state if norm in ("none", "post") else _normalised(state)
            v = kappa * scored.q * scored.spread if f is attend else jnp.full_like(kappa, jnp.nan)
            kept.append((after, tangent, v))
            state = after
        return state, jax.tree.map(lambda *x: jnp.stack(x), *kept)

    by_pair = (branch.reshape(pairs, 2), stream.reshape(pairs, 2))
    _, kept = jax.lax.scan(pair, start, by_pair)
    after, tangents, variance = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[:sublayers], kept
    )
    q, spread = (jnp.concatenate([a[None], b]) for a, b in zip(start, after, strict=True))
    log_own, cross = _down(tokens, tangents)
    return _Walk(
        q,
        1 - spread / q,
        spread / q,
        variance,
        log_own,
        cross,
        (1 + (tokens - 1) * cross) / tokens,
    )


def _normalised(state: _State) -> _State:
    return _State(jnp.ones_like(state.q), state.spread / state.q)


def _sublayer(norm: str, f, state: _State, alpha: Array, lam: Array) -> tuple[_State, Array]:  # type: ignore[no-untyped-def]
    """Tokens after a sublayer with its skip and norms, and the matrix of its tangents."""
    inner, divisor = state, jnp.ones_like(state.q)
    if norm in ("pre", "peri"):
        inner, divisor = _normalised(state), state.q
    after, tangent = f(inner)
    if norm == "peri":
        divisor *= after.q
        after = _normalised(after)
    joined = _State(*(lam**2 * x + alpha**2 * y for x, y in zip(state, after, strict=True)))
    tangent = lam**2 * jnp.eye(2, dtype=tangent.dtype) + alpha**2 * tangent / divisor
    if norm == "post":
        return _normalised(joined), tangent / joined.q
    return joined, tangent


def _down(tokens: Array, tangents: Float[Array, "sublayers 2 2"]) -> tuple[Array, Array]:
    """A gradient's log second moment and its correlation over tokens, at 0 … L sublayers."""

    def step(state: tuple[Array, Array], tangent: Array) -> tuple[tuple, tuple]:
        log_own, cross = state
        weights = jnp.stack([jnp.ones_like(cross), (tokens - 1) * cross])
        own, others = dot(weights, tangent)
        after = log_own + jnp.log(own), others / (own * jnp.maximum(tokens - 1, 1))
        return after, state

    zero = jnp.zeros((), tangents.dtype)
    below, above = jax.lax.scan(step, (zero, zero), tangents, reverse=True)
    log_own, cross = (jnp.append(a, b) for a, b in zip(below, above, strict=True))
    return log_own, cross


class _Growth(NamedTuple):
    """The stream of a pre-norm network whose branches are of degree 1, after 0 … L sublayers."""

    q: Float[Array, " ends"]
    gradient: Float[Array, " ends"]  # mean squared gradients relative to those at the top


def pre_norm_growth(
    sublayers: int, branch: ArrayLike = 1.0, q: ArrayLike = 1.0, *, scaled: bool = False
) -> _Growth:
    """q_l = q_0 + g l of a pre-norm stream, and its gradients, q_L/q_l: nothing normalises it.

    A branch of degree 1, as a feed-forward sublayer of ReLU, has χ = g/q of the normalised stream,
    so that gradients grow by 1 + g/q = q'/q in each sublayer.

    Parameters
    ----------
    sublayers
        L.
    branch
        g, the second moment that a branch adds.
    q
        q_0.
    scaled
        Whether the l-th norm is multiplied by 1/√l (LayerNorm scaling): q_l = q_0 + g H_l.

    Raises
    ------
    InputError
        If a number is out of range.

    References
    ----------
    Xiong et al. 2020, arXiv:2002.04745; Sun et al. 2025, arXiv:2502.05795 (LayerNorm scaling).
    """
    sublayers = check_count("sublayers", sublayers)
    check_scale("branch", branch)
    check_scale("q", q, positive=True)
    numbers = jnp.arange(1, sublayers + 1, dtype=jnp.result_type(float))
    added = jnp.cumsum(branch / numbers if scaled else branch * jnp.ones_like(numbers))
    lengths = jnp.concatenate([jnp.zeros(1, added.dtype), added]) + q
    return _Growth(lengths, lengths[-1] / lengths)


def random_energy_walk(
    beta: ArrayLike,
    layers: int,
    *,
    correlation: ArrayLike,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    branches: tuple[float, float] = (1.0, 1.0),
) -> Float[Array, " ends"]:
    """The correlation of tokens after 0 … L layers of a post-norm transformer, in a limit T → ∞.

    With v = β² q (q - p) ln T, p = q ρ, an attention sublayer has q' = p + (q - p) (1 - β_c/β)₊ and
    p' = p, β_c² = 2/(q (q - p)). A feed-forward sublayer of ReLU follows, of two matrices of equal
    variances, with biases. `walk` is for any number of tokens.

    Parameters
    ----------
    beta
        β, above 0.
    layers
        Of both sublayers each.
    correlation
        ρ of the first layer's tokens, whose q is 1.
    sigma_w2, sigma_b2
        σ_w² and σ_b² of the feed-forward sublayers.
    branches
        α of the attention and of the feed-forward sublayers.

    Raises
    ------
    InputError
        If a number is out of range.

    References
    ----------
    Giorlandino & Goldt 2025, arXiv:2505.24333.
    """
    check_scale("beta", beta, positive=True)
    for name, value in (("sigma_w2", sigma_w2), ("sigma_b2", sigma_b2), ("branches", branches)):
        check_scale(name, value)
    dtype = jnp.result_type(float)
    attention, feed = (jnp.asarray(alpha, dtype) ** 2 for alpha in branches)
    weights, biases = (jnp.asarray(x, dtype) for x in (sigma_w2, sigma_b2))

    def step(p: Array, _: None) -> tuple[Array, Array]:
        critical = jnp.sqrt(2 / jnp.maximum(1 - p, jnp.finfo(p.dtype).tiny))
        q = p + (1 - p) * jnp.maximum(1 - critical / beta, 0)
        p = (p + attention * p) / (1 + attention * q)
        within = weights + biases, weights * p + biases
        both = _pairs.equal_pair(activations.relu, within[0], within[1] / within[0])[0]
        q, cross = (weights * x + biases for x in (within[0] / 2, both))
        p = (p + feed * cross) / (1 + feed * q)
        return p, p

    start = 1 - _apart(2, correlation)
    _, after = jax.lax.scan(step, start, None, length=check_count("layers", layers))
    return jnp.concatenate([start[None], after])
