"""Transformers: residual layers of attention and of a feed-forward network, and how they begin."""

import itertools
import math
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

from gradflow import _entries, activations, ensembles
from gradflow._builder_options import Count, Depth, Deviation, Phi, Weights, WeightsByLayer
from gradflow._checks import check_count, check_number, is_number, unknown_name
from gradflow._entries import Beside, OneOf, Whole
from gradflow._layer_parts import as_dense, chain, linear, scaled
from gradflow.blocks import (
    AbstractBlock,
    Activate,
    Attention,
    Chain,
    Flatten,
    Gated,
    GlobalMean,
    LayerNorm,
    Residual,
    RMSNorm,
)
from gradflow.errors import InputError
from gradflow.networks import Network, Stage

__all__ = ["NORMS", "NORM_POSITIONS", "POOLS", "RULES", "Start", "transformer"]

# tanh(α z) in the place of a norm, α = 1/2 at first (Zhu et al. 2025, arXiv:2503.10622).
_DYT = activations.tanh.scaled(1.0, 0.5, "tanh(z/2)")
# What `norm` may be, of a gain; DyT's is a number behind its tanh, 1 at first.
NORMS: dict[str, Callable[[float], AbstractBlock]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "dyt": lambda gain: Activate(_DYT if gain == 1 else _DYT.scaled(gain, 1.0, f"{gain:g} DyT")),
}
# What `pool` may be before the read-out.
POOLS: dict[str, Callable[[tuple[int, ...]], AbstractBlock]] = {
    "mean": GlobalMean,
    "flatten": Flatten,
}
# What `norm_position` may be: the norms' places, as of (branch's start, branch's end, the sum).
NORM_POSITIONS: dict[str, tuple[bool, bool, bool]] = {
    "pre": (True, False, False),
    "post": (False, False, True),
    "branch": (False, True, False),
    "sandwich": (True, True, False),
    "peri": (True, True, False),
    "mix": (True, False, False),
    "ngpt": (False, True, True),
}
# Mix-LN's share of post-LN layers, the lowest (Li, Yin & Liu 2024, arXiv:2412.13795, section 4).
_MIXED = 4
# nGPT's step on the sphere at first (Loshchilov et al. 2024, arXiv:2410.01131, section 2.6; its
# authors' attn_alpha_init_value).
_NGPT_RATE = 0.05


class Start(NamedTuple):
    """How residual branches begin: factors of the stream, of the branch, of matrices and norms."""

    skip: float = 1.0  # λ of λ z + α f(z)
    branch: float = 1.0  # α
    query_key: float = 1.0  # of W_Q and W_K each, as all that follow
    value: float = 1.0
    output: float = 1.0
    first: float = 1.0  # of the feed-forward network's matrices
    second: float = 1.0
    embedding: float = 1.0
    by_layer: bool = False  # whether the norms of layer l are multiplied by 1/√l


def _but_scores(gain: float, skip: float = 1.0, embedding: float = 1.0) -> Start:
    """All matrices but W_Q and W_K multiplied by a number."""
    four = {"value": gain, "output": gain, "first": gain, "second": gain}
    return Start(skip=skip, embedding=embedding, by_layer=False, **four)


def _fixup(depth: int) -> Start:
    branches, scores = 2 * depth, (2 * depth) ** (-1 / 6)
    first = branches**-0.5
    return Start(query_key=scores, value=scores, output=0.0, first=first, second=0.0)


def _t_fixup(depth: int, causal: bool) -> Start:
    decoder = (9 * depth) ** -0.25
    return _but_scores(decoder if causal else 0.67 * depth**-0.25, embedding=decoder)


# What `scale` may be beside a number: of (depth, whether it is a decoder), how branches begin.
RULES: dict[str, Callable[[int, bool], Start]] = {
    "depth": lambda n, _: Start(branch=n**-0.5),
    "zero": lambda *_: Start(branch=0.0),
    "zero_output": lambda *_: Start(output=0.0, second=0.0),
    "fixup": lambda n, _: _fixup(n),
    "gpt2": lambda n, _: Start(output=(2 * n) ** -0.5, second=(2 * n) ** -0.5),
    "deepnorm": lambda n, _: _but_scores((8 * n) ** -0.25, skip=(2 * n) ** 0.25),
    "t_fixup": _t_fixup,
    "layerscale": lambda n, _: Start(branch=0.1 if n <= 18 else 1e-5 if n <= 24 else 1e-6),
    "layer": lambda *_: Start(by_layer=True),
}
# The places of norms that a rule is made for; None is no norm.
_MADE_FOR: dict[str, tuple[str | None, ...]] = {"deepnorm": ("post",), "t_fixup": (None,)}

_Norm = Annotated[str, OneOf("norm", tuple(NORMS))]
_NormPosition = Annotated[str, OneOf("norm_position", tuple(NORM_POSITIONS)), Beside("norm")]
_Scale = Annotated[float | int | str, OneOf("scale", tuple(RULES), _entries.scale)]
_ScoreScale = Annotated[
    float | int | str, OneOf("score_scale", ("sqrt", "linear"), _entries.positive)
]
_Positions = Annotated[str, OneOf("positions", ("rotary", "alibi"))]
_QKNorm = Annotated[str, OneOf("qk_norm", ("rms", "layer"))]
_Readout = Annotated[str, OneOf("readout", ("free", "tied")), Beside("outputs")]
_Pool = Annotated[str, OneOf("pool", tuple(POOLS)), Beside("outputs")]
_FFNWidth = Annotated[int, Whole(least=0)]


def transformer(
    tokens: Count,
    width: Count,
    depth: Depth,
    activation: Phi = "gelu",
    weights: Weights = "lecun",
    *,
    input_width: Count | None = None,
    heads: Count = 8,
    key_width: Count | None = None,
    key_heads: Count | None = None,
    kappa: Deviation | None = None,
    ov: Deviation | None = None,
    score_scale: _ScoreScale = "sqrt",
    qk_norm: _QKNorm | None = None,
    positions: _Positions | None = None,
    causal: bool = False,
    ffn_width: _FFNWidth | None = None,
    ffn_weights: WeightsByLayer | None = None,
    gated: bool = False,
    norm: _Norm | None = "layer",
    norm_position: _NormPosition = "pre",
    scale: _Scale = 1.0,
    embedding: Weights = "lecun",
    outputs: Count | None = None,
    readout: _Readout = "free",
    pool: _Pool | None = None,
    sigma_b: Deviation | None = None,
    name: str | None = None,
) -> Network:
    """A transformer: an embedding, then ``depth`` layers of attention and a feed-forward network.

    Inputs are those of `as_sites`: a site is a token, an input's tokens one after the other.

    Parameters
    ----------
    tokens
        T, how many tokens an input has.
    width, depth, input_width, activation, weights, sigma_b, name
        As for `residual`: the stream's width d; φ, of the feed-forward network. Of weights torch,
        attention has PyTorch's: W_Q, W_K and W_V of Xavier's variance as one matrix.
    heads, key_width, key_heads, score_scale, qk_norm, positions
        Attention's heads; d_k, d/heads without it; heads of keys and values; sqrt for scores
        q·k/√d_k, linear for q·k/d_k; a norm of queries and keys; rotary or alibi.
    kappa, ov
        κ = σ_q² σ_k² of the scores, and σ_v² σ_o² of values and outputs, instead of the weights'.
    causal
        Whether a token sees those before it alone: a decoder.
    ffn_width, ffn_weights, gated
        The feed-forward network's width, 4 d without it and 0 for no such network; its weights
        where they are others, of W_1 (gated: values, gates) and W_2; and whether it is gated,
        W_2 (V h · φ(W h)), as SwiGLU is with silu.
    norm
        Norms: layer, rms, or dyt, a tanh in their place (`NORMS`).
    norm_position
        Where they are: pre and post; branch, z + norm(f(z)); sandwich, z + norm(f(norm(z))); peri,
        the embedding's too; mix, the lowest quarter post and the others pre; or ngpt.
    scale
        α, the factor of branches, or how they begin: depth for 1/√depth, zero, zero_output, fixup,
        t_fixup, gpt2, deepnorm, layerscale, or layer (`RULES`).
    embedding
        The ensemble of the tokens' embedding.
    outputs, readout, pool
        Units of a read-out, behind a last norm where the stream has none; there is none without it.
        Its weights are free, or tied: of the embedding's variance, but drawn by themselves; it is
        of every token, or of an input's mean or flatten.

    Returns
    -------
    Network
        With a layer for the embedding, each transformer layer, and the read-out.

    Raises
    ------
    InputError
        If a number is not in its range, as for `mlp`, heads do not divide the width, a name is
        unknown, or a rule is not made for norms at these places.
    """
    return _Plan(types.SimpleNamespace(**locals())).network()


class _Plan:
    """The parts of a transformer, from the arguments of its builder."""

    def __init__(self, of: Any) -> None:
        for name in ("tokens", "width", "depth", "heads"):
            check_count(name, getattr(of, name))
        self.of = of
        self.input_width = check_count("input_width", of.input_width or of.width)
        self.phi = activations.get(of.activation)
        self.ensemble, self.embedding = ensembles.get(of.weights), ensembles.get(of.embedding)
        self.position = _norm_position(of.norm, of.norm_position)
        self.start = _start(of.scale, of.depth, of.causal, self.position)
        self.ffn_width = 4 * of.width if of.ffn_width is None else of.ffn_width

    def network(self) -> Network:
        """The network: an embedding, layers, and a read-out where there is one."""
        of, depth = self.of, self.of.depth
        kinds: list[str | None] = []
        if self.position == "mix":
            kinds += ["post"] * (depth // _MIXED)
            kinds += ["pre"] * (depth - len(kinds))
        else:
            kinds += [self.position] * depth
        layers = [
            (kind, 1 / math.sqrt(number) if self.start.by_layer else 1.0)
            for number, kind in enumerate(kinds, 1)
        ]
        stages = [Stage(self._first())]
        stages += [Stage(self._layer(*k), len(list(g))) for k, g in itertools.groupby(layers)]
        if of.outputs is not None:
            stages.append(Stage(self._readout(check_count("outputs", of.outputs))))
        normed = "without norms" if of.norm is None else f"{of.norm_position}-{of.norm}norm"
        kind = f"{'decoder' if of.causal else 'transformer'}, {normed}"
        name = of.name or f"{self.phi.name}, {self.ensemble.name}, {kind}"
        return Network(tuple(stages), self.input_width, self.phi, name)

    def _norm(self, gain: float = 1.0) -> AbstractBlock:
        return NORMS[self.of.norm](gain)

    def _first(self) -> AbstractBlock:
        embed = linear(self.embedding, None, None)(self.input_width, self.of.width)
        embed = scaled(embed, self.start.embedding)
        return chain([embed, *([self._norm()] if self.position in ("peri", "ngpt") else [])])

    def _layer(self, position: str | None, gain: float) -> AbstractBlock:
        """Attention and the feed-forward network, each beside the stream."""
        sublayers: list[list[AbstractBlock]] = [[self._attention()], self._feed_forward()]
        return chain([self._beside(parts, position, gain) for parts in sublayers if parts])

    def _beside(
        self, parts: Sequence[AbstractBlock], position: str | None, gain: float
    ) -> AbstractBlock:
        """These blocks as a branch beside the stream, with norms at their places."""
        at_start, at_end, of_sum = NORM_POSITIONS.get(position or "", (False,) * 3)
        norm = [] if position is None else [self._norm(gain)]
        branch = chain([*norm * at_start, *parts, *norm * at_end])
        skip, alpha = self.start.skip, self.start.branch
        if position == "ngpt":
            alpha = _NGPT_RATE if self.of.scale == 1 else alpha
            skip = 1 - alpha
        return chain([Residual(branch, alpha, skip), *norm * of_sum])

    def _attention(self) -> Attention:
        of, start = self.of, self.start
        key_width = of.key_width or of.width // of.heads
        if of.key_width is None and of.width % of.heads:
            raise InputError(
                f"width is {of.width} and heads {of.heads}; heads divide the width, or key_width "
                "is given"
            )
        inner, outer = self.ensemble.attention or (self.ensemble, self.ensemble)
        if inner.mean is not None or outer.mean is not None:
            raise InputError(f"weights are {self.ensemble.name!r}; those of attention have mean 0")
        key_heads = of.heads if of.key_heads is None else check_count("key_heads", of.key_heads)
        ends = [of.heads * key_width, *[key_heads * key_width] * 2]
        packed = [sum(ends)] * 3 if self.ensemble.attention else ends
        q, k, v = (inner.sigma_w(of.width, fan_out) for fan_out in packed)
        o = outer.sigma_w(ends[0], of.width)
        if of.kappa is not None:
            q = k = _fourth_root("kappa", of.kappa)
        if of.ov is not None:
            v = o = _fourth_root("ov", of.ov)
        bias = of.sigma_b if self.ensemble.bias is None or of.sigma_b is not None else 0.0
        own: dict[str, Any] = dict.fromkeys(("bias_q", "bias_k", "bias_v", "bias_o"), bias)
        own |= {"positions": of.positions, "qk_norm": of.qk_norm}
        own |= {"scale": of.score_scale, "mask": "causal" if of.causal else None}
        own = {k: v for k, v in own.items() if v is not None and v != "sqrt"}
        return Attention(
            of.tokens,
            of.heads,
            of.width,
            key_width,
            key_heads=of.key_heads,
            sigma_q=start.query_key * q,
            sigma_k=start.query_key * k,
            sigma_v=start.value * v,
            sigma_o=start.output * o,
            distribution=inner.distribution,
            **own,
        )

    def _feed_forward(self) -> list[AbstractBlock]:
        of, start = self.of, self.start
        if self.ffn_width == 0:
            return []
        check_count("ffn_width", self.ffn_width)
        given = of.weights if of.ffn_weights is None else of.ffn_weights
        *into, out = (
            linear(ensemble, of.sigma_b, None)
            for ensemble in ensembles.by_layer(given, 3 if of.gated else 2)
        )
        first, *gate = (scaled(make(of.width, self.ffn_width), start.first) for make in into)
        second = scaled(out(self.ffn_width, of.width), start.second)
        if of.gated:
            return [Gated(first, Chain((gate[0], Activate(self.phi)))), second]
        return [first, as_dense((Activate(self.phi),), second)]

    def _readout(self, outputs: int) -> AbstractBlock:
        of = self.of
        if of.readout not in ("free", "tied"):
            raise unknown_name("readout", of.readout, ("free", "tied"))
        if of.pool is not None and of.pool not in POOLS:
            raise unknown_name("pool", of.pool, POOLS)
        before: list[AbstractBlock] = []
        if self.position not in (None, "post", "ngpt"):
            before.append(self._norm())
        if of.pool is not None:
            before.append(POOLS[of.pool]((of.tokens,)))
        fan_in = Chain(tuple(before)).width_after(of.width) if before else of.width
        read, biases = self.ensemble, of.sigma_b
        if of.readout == "tied":
            deviation = math.sqrt(self.embedding.variance(self.input_width, of.width))
            read, biases = ensembles.get(deviation * self.start.embedding), None
        return chain([*before, linear(read, biases, None)(fan_in, outputs)])


def _fourth_root(name: str, value: float) -> float:
    check_number(name, value)
    return value**0.25


def _norm_position(norm: str | None, position: str) -> str | None:
    if position not in NORM_POSITIONS:
        raise unknown_name("norm_position", position, NORM_POSITIONS)
    if norm is None:
        return None
    if not isinstance(norm, str) or norm not in NORMS:
        if norm in NORM_POSITIONS:
            raise InputError(f"norm is {norm!r}, which is a norm_position; norm is its kind, layer")
        raise unknown_name("norm", norm, NORMS)
    return position


def _start(scale: float | str, depth: int, causal: bool, position: str | None) -> Start:
    """How branches begin by a rule, or by a number that multiplies each."""
    if isinstance(scale, str):
        if scale not in RULES:
            raise unknown_name("scale", scale, RULES)
        places = _MADE_FOR.get(scale, (position,))
        if position not in places:
            wanted = "no norm" if places[0] is None else f"norm_position {places[0]!r}"
            raise InputError(f"scale is {scale!r}, which is made for {wanted}; give that too")
        return RULES[scale](depth, causal)
    if not (is_number(scale) and 0 <= scale < math.inf):
        raise InputError(
            f"scale is {scale!r}; it is a finite number of at least 0, or one of "
            f"{', '.join(map(repr, RULES))}"
        )
    return Start(branch=scale)
