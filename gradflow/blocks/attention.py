"""Attention: every token's output is a mean over tokens, weighted by the softmax of its scores.

Sites are tokens: signals have shape (inputs · tokens, units), an input's tokens one after the
other, as positions in `gradflow.blocks.convolution`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow import ensembles
from gradflow._checks import check_count, check_number, is_number, shown, unknown_name
from gradflow._norms import inverse_or_zero
from gradflow.blocks import _exact_heads, _heads, _rotary
from gradflow.blocks._heads import Averages, Moments
from gradflow.blocks.base import AbstractBlock, Multiply, add_bias
from gradflow.blocks.normalisation import LayerNorm, RMSNorm
from gradflow.ensembles import Distribution
from gradflow.errors import InputError, NoTheory
from gradflow.kernels import Kernel, Unknown, multiply_kernel

__all__ = ["Attention"]

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

_SCALES = ("sqrt", "linear")
_POSITIONS = ("rotary", "alibi")
_NORMS = {"rms": RMSNorm, "layer": LayerNorm}


def _as_mask(mask: Any) -> Any:
    """A mask as the block holds it: a name, or a tuple of tuples of bool, one for each token."""
    if mask is None or isinstance(mask, str) or not isinstance(mask, Sequence | np.ndarray):
        return mask
    try:
        rows = np.asarray(mask)
    except ValueError:  # rows of unequal lengths
        return tuple(mask)
    if rows.ndim == 1:  # of columns: what all tokens see
        rows = np.broadcast_to(rows, (len(rows), len(rows)))
    return tuple(tuple(bool(seen) for seen in row) for row in rows) if rows.ndim == 2 else mask


class Attention(AbstractBlock):
    """z'_a = W_O concat_h(Σ_b A_ab W_V z_b), A_ab = softmax_b(q_a · k_b/√d_k) in each head h.

    (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.) Queries q = W_Q z and keys k = W_K z have
    Var W_Q = σ_q²/n and Var W_K = σ_k²/n, values Var W_V = σ_v²/n, and Var W_O = σ_o²/(H d_v).
    There is no activation before it.

    At infinite width, of infinitely many heads and an infinite key width too, scores are Gaussian,
    Cov(s_ab, s_cd) = κ Σ_ac Σ_bd with κ = σ_q² σ_k², and so are outputs (Hron et al. 2020,
    arXiv:2006.10540). With M_a = diag(A_a) - A_a A_aᵀ second moments Σ, and D of a tangent, become

        Σ' = σ_v² σ_o² E[A Σ Aᵀ],
        D' = σ_v² σ_o² (E[A D Aᵀ] + κ D_ac E tr[M_a Σ M_c Σ] + κ Σ_ac E tr[M_a D M_c Σ]).

    They are exact for two tokens, and for tokens that are exchangeable; else by fixed heads, with
    the standard error `average_error`.

    Attributes
    ----------
    tokens, heads, units
        T; H; and the width that it hands on.
    key_width, value_width
        d_k, units/heads by default; and d_v, d_k by default.
    key_heads
        The number of heads of keys and values, which heads of queries share; H by default.
    sigma_q, sigma_k, sigma_v, sigma_o, bias_q, bias_k, bias_v, bias_o
        The scales σ of weights, and standard deviations of biases; None is without.
    scale
        ``"sqrt"``, 1/√d_k, ``"linear"``, 1/d_k (of which scores of free W_Q and W_K are 0 at
        infinite width), or a number that q · k is multiplied by.
    tied
        Whether W_K = W_Q; ``sigma_k`` then does not count.
    finite_key_width
        Whether the theory is of scores of the block's key width; of heads there are infinitely many
        all the same.
    mask
        Which tokens are seen: ``"causal"``, those up to the token itself; a True or False for each,
        as of padding; or a row of these for each token that looks.
    positions
        ``"rotary"``, units j and j + d_k/2 of queries and keys turned by the angle of the token's
        number times 10000^(-2j/d_k) (Su et al. 2021, arXiv:2104.09864); or ``"alibi"``, scores less
        the distance times 2^(-8h/H) (Press et al. 2022, arXiv:2108.12409).
    qk_norm, gain_q, gain_k
        ``"rms"`` or ``"layer"``: each head's queries and keys normalised to γ_q and γ_k.
    distribution
        The law of all weights.
    """

    tokens: int = eqx.field(static=True, default=3)
    heads: int = eqx.field(static=True, default=8)
    units: int = eqx.field(static=True, default=100)
    key_width: int | None = eqx.field(static=True, default=None)
    value_width: int | None = eqx.field(static=True, default=None)
    key_heads: int | None = eqx.field(static=True, default=None)
    sigma_q: ScalarLike = 1.0
    sigma_k: ScalarLike = 1.0
    sigma_v: ScalarLike = 1.0
    sigma_o: ScalarLike = 1.0
    bias_q: ScalarLike | None = None
    bias_k: ScalarLike | None = None
    bias_v: ScalarLike | None = None
    bias_o: ScalarLike | None = None
    scale: str | float = eqx.field(static=True, default="sqrt")
    tied: bool = eqx.field(static=True, default=False)
    finite_key_width: bool = eqx.field(static=True, default=False)
    mask: Any = eqx.field(static=True, default=None, converter=_as_mask)
    positions: str | None = eqx.field(static=True, default=None)
    qk_norm: str | None = eqx.field(static=True, default=None)
    gain_q: ScalarLike = 1.0
    gain_k: ScalarLike = 1.0
    distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)

    def __check_init__(self) -> None:
        for name in ("tokens", "heads", "units"):
            check_count(name, getattr(self, name))
        for name in ("key_width", "value_width", "key_heads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.heads % self._groups:
            raise InputError(
                f"key_heads is {self.key_heads}; it divides the number of heads, {self.heads}"
            )
        if self.tied and self._groups < self.heads:
            raise InputError("tied is True beside key_heads; tied heads have keys of their own")
        for name, allowed in (("positions", _POSITIONS), ("qk_norm", _NORMS)):
            if getattr(self, name) is not None and getattr(self, name) not in allowed:
                raise unknown_name(name, getattr(self, name), allowed)
        if is_number(self.scale):
            check_number("scale", self.scale, positive=True)
        elif self.scale not in _SCALES:
            raise InputError(f"scale is {self.scale!r}; it is 'sqrt', 'linear' or a number above 0")
        if self.positions == "rotary" and self._widths[0] % 2:
            raise InputError(
                f"key_width is {self._widths[0]}; rotary positions turn pairs of units, of an even "
                "number"
            )
        self._check_mask()

    def _check_mask(self) -> None:
        if self.mask in (None, "causal"):
            return
        rows = self.mask if isinstance(self.mask, tuple) else ()
        fits = all(isinstance(row, tuple) and len(row) == self.tokens for row in rows)
        if not fits or len(rows) != self.tokens:
            raise InputError(
                f"mask is {shown(self.mask)}; it is None, 'causal', or says with True which tokens "
                f"are seen: {self.tokens} of them, or {self.tokens} rows of these"
            )
        if not all(map(any, rows)):
            raise InputError("mask hides all tokens from one; each token sees one or more")

    @property
    def _widths(self) -> tuple[int, int]:
        """The widths of keys and of values, d_k and d_v."""
        keys = self.key_width or max(1, self.units // self.heads)
        return keys, self.value_width or keys

    @property
    def _groups(self) -> int:
        """The number of heads of keys and values."""
        return self.key_heads or self.heads

    @property
    def _factor(self) -> float:
        """What q · k is multiplied by."""
        power = {"sqrt": -0.5, "linear": -1}
        return self._widths[0] ** power[self.scale] if isinstance(self.scale, str) else self.scale

    @property
    def _laws(self) -> tuple[tuple[ScalarLike, ScalarLike | None, int], ...]:
        """For W_Q, W_K, W_V and W_O: σ, the bias' σ, and the number of units."""
        (d_k, d_v), groups = self._widths, self._groups
        return (
            (self.sigma_q, self.bias_q, self.heads * d_k),
            (self.sigma_k, self.bias_k, groups * d_k),
            (self.sigma_v, self.bias_v, groups * d_v),
            (self.sigma_o, self.bias_o, self.units),
        )

    @property
    def _seen(self) -> np.ndarray:
        """Which tokens, in columns, a token sees, in a row."""
        every = np.ones((self.tokens, self.tokens), bool)
        if self.mask is None:
            return every
        return np.tril(every) if self.mask == "causal" else np.array(self.mask)

    @property
    def _offsets(self) -> np.ndarray:
        """What is added to scores, (H or 1, tokens, tokens): -inf where nothing is seen."""
        slopes = np.zeros(1)
        if self.positions == "alibi":
            slopes = 2.0 ** (-8 * np.arange(1, self.heads + 1) / self.heads)
        apart = np.abs(np.subtract.outer(np.arange(self.tokens), np.arange(self.tokens)))
        return np.where(self._seen, -slopes[:, None, None] * apart, -np.inf)

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n_out"]:
        """Return the outputs of all heads times W_O."""
        weights = self.weights(signal, multiply, key)
        inputs, groups = len(weights), self._groups
        values = self._product(2, signal, multiply, key).reshape(inputs, self.tokens, groups, -1)
        by_group = weights.reshape(inputs, groups, -1, self.tokens, self.tokens)
        out = _einsum("ighab,ibgv->iaghv", by_group, values)
        return self._product(3, out.reshape(len(signal), -1), multiply, key)

    def weights(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "inputs heads tokens tokens"]:
        """Return the attention weights A of every head that `apply` has with the same arguments.

        Only W_Q and W_K are multiplied by, which are the first of the block.
        """
        self._count_inputs(len(signal))
        keys = [jax.random.fold_in(key, number) for number in (0, 1)]
        products = [multiply(keys[0], signal, **self._law(0))]
        if not self.tied:
            products += [multiply(keys[1], signal, **self._law(1))]

        def by_head(
            own: PRNGKeyArray, x: Array, bias: ScalarLike | None, gain: ScalarLike
        ) -> Array:
            return self._by_head(add_bias(jax.random.fold_in(own, 1), x, multiply, bias), gain)

        q = by_head(keys[0], products[0], self.bias_q, self.gain_q)
        k = by_head(keys[1], products[-1], self.bias_k, self.gain_k)
        by_group = q.reshape(*k.shape[:3], -1, q.shape[-1])
        scores = self._factor * _einsum("iaghk,ibgk->ighab", by_group, k)
        scores = scores.reshape(len(q), self.heads, self.tokens, self.tokens)
        return _heads.softmax(scores, jnp.asarray(self._offsets, scores.dtype)[None])

    def _by_head(
        self, x: Float[Array, "sites n"], gain: ScalarLike
    ) -> Float[Array, "inputs tokens heads width"]:
        """Queries or keys of each head, normalised and turned."""
        width = self._widths[0]
        rows = x.reshape(-1, width)
        if self.qk_norm is not None:
            rows = _NORMS[self.qk_norm](gain).apply(rows, multiply_kernel, jax.random.key(0))
        by_head = rows.reshape(len(x) // self.tokens, self.tokens, -1, width)
        if self.positions != "rotary":
            return by_head
        angles = np.outer(np.arange(self.tokens), _rotary.angles(width))[None, :, None]
        cos, sin = (jnp.asarray(f(angles), x.dtype) for f in (np.cos, np.sin))
        u, v = jnp.split(by_head, 2, axis=-1)
        return jnp.concatenate([u * cos - v * sin, u * sin + v * cos], axis=-1)

    def _product(
        self, number: int, x: Float[Array, "sites n"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n_out"]:
        """The product with W_V or W_O, by its number, and its bias."""
        key = jax.random.fold_in(key, number)
        out = multiply(key, x, **self._law(number))
        return add_bias(jax.random.fold_in(key, 1), out, multiply, self._laws[number][1])

    def _law(self, number: int) -> dict[str, Any]:
        """The law of a matrix, by its number, as a ``multiply`` takes it."""
        sigma, _, width = self._laws[number]
        return {"sigma_w": sigma, "width": width, "distribution": self.distribution}

    def _count_inputs(self, sites: int) -> int:
        """The number of inputs whose tokens these sites are.

        Raises
        ------
        InputError
            If it is no whole number.
        """
        if sites % self.tokens:
            raise InputError(
                f"the signal has {sites} sites, and tokens is {self.tokens}; sites are inputs "
                f"times tokens, a multiple of {self.tokens}"
            )
        return sites // self.tokens

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return the second moments σ_v² σ_o² E[A Σ Aᵀ], and those of a tangent.

        Raises
        ------
        NoTheory
            If scores have no limit, or one that the theory does not know; the sentence says why.
        """
        values, averages = self._averages(kernel, multiply)
        nothing = jnp.zeros_like(values.mean)
        out = values.derived(averages.covariance, nothing, averages.tangent, Unknown())
        return multiply(out, **self._law(3)).with_bias(self.bias_o)

    def average_error(self, kernel: Kernel) -> Float[Array, "sites sites"]:
        """Return the standard error that averages over heads leave in the covariance of `kernel`.

        Heads are fixed; other ones would give values this far away. It is 0 where averages are
        integrals.
        """
        values, averages = self._averages(kernel, multiply_kernel)
        return jnp.exp(2 * values.log_scale[0]) * self.sigma_o**2 * averages.error

    def spread_between_networks(self, kernel: Kernel) -> Float[Array, "sites sites"]:
        """Return the standard deviation of the layer's second moments over networks, of H heads.

        Each network has the mean over its heads of σ_v² σ_o² A Σ Aᵀ, if all other widths are
        infinite: its mean is `kernel`'s at any H. By fixed heads, to a percent or so.

        Raises
        ------
        NoTheory
            If heads are not independent and of one law, or as `kernel` does.
        """
        if self.positions == "alibi" or (self.finite_key_width and self._groups < self.heads):
            raise NoTheory(
                "heads with slopes of their own, or that share keys of a finite width, are not "
                "independent and of one law; the spread between networks is known of such heads"
            )
        values, averages = self._averages(kernel, multiply_kernel, integrals=False)
        scale = jnp.exp(2 * values.log_scale[0]) * self.sigma_o**2
        return scale * averages.spread / math.sqrt(self.heads)

    def _averages(
        self, kernel: Kernel, multiply: Multiply, *, integrals: bool = True
    ) -> tuple[Kernel, Averages]:
        """The kernel of the values, and the averages over heads at its scales.

        Without ``integrals`` they are over fixed heads even where they have these.
        """
        self._count_inputs(len(kernel.mean))
        kernel = kernel.common()
        products = [multiply(kernel, **self._law(n)) for n in ((0, 2) if self.tied else (0, 1, 2))]
        biases = (self.bias_q, self.bias_k, self.bias_v)
        several = zip((products[0], products[-2], products[-1]), biases, strict=True)
        *before, v = (x.with_bias(bias).common() for x, bias in several)
        q, k = before
        if self.qk_norm is not None:
            norm = _NORMS[self.qk_norm]
            q, k = (norm(g).kernel(x) for x, g in ((q, self.gain_q), (k, self.gain_k)))
        if self.tokens == 1 or (self.scale == "linear" and not self.finite_key_width):
            scores = jnp.zeros_like(v.covariance)
            if self.tied:
                # What queries and keys have in common, a mean over their units.
                sizes = (_size(q) * inverse_or_zero(_size(before[0])))[:, None]
                sizes = sizes * (_size(k) * inverse_or_zero(_size(before[1])))[None]
                scores = sizes * products[0].plain().covariance
            return v, self._averages_of(scores, v)
        if self._why_no_theory is not None:
            raise NoTheory(self._why_no_theory)
        exact = integrals and self.positions is None and not self.finite_key_width
        return v, self._averages_over(*self._moments(q.common(), k.common(), v), exact=exact)

    def _averages_of(self, scores: Float[Array, "sites sites"], values: Kernel) -> Averages:
        """The averages where scores are given; what changes them is 1/d_k of a tangent."""
        inputs = len(scores) // self.tokens
        by_input = scores.reshape(inputs, self.tokens, inputs, self.tokens)
        own = _einsum("itiu->itu", by_input)
        if self.positions == "rotary":
            own *= jnp.asarray(_rotary.alignment(self._widths[0], self.tokens)[None], own.dtype)
        offsets = jnp.asarray(self._offsets, own.dtype)
        weights = _heads.softmax(own[None], offsets[:, None])
        tangent = values.tangent
        if tangent is not None:
            tangent = _heads.average_of_given(weights, tangent)
        covariance = _heads.average_of_given(weights, values.covariance)
        nothing = jnp.zeros_like(scores)
        return Averages(covariance, tangent, nothing, nothing)

    def _moments(self, q: Kernel, k: Kernel, v: Kernel) -> tuple[Moments, Moments | None]:
        """Second moments of scores' factors, and of values at their scale; of tangents too."""
        square = self._factor**2 * self._widths[0]
        q_scale, k_scale = (square * jnp.exp(2 * q.log_scale[0]), jnp.exp(2 * k.log_scale[0]))
        moments = Moments(q_scale * q.covariance, k_scale * k.covariance, v.covariance)
        if q.tangent is None or k.tangent is None or v.tangent is None:
            return moments, None
        # A change of scores, which have no scale, moves values at theirs.
        to_values = v.log_scale[0] - v.log_tangent_scale[0]
        q_scale, k_scale = (jnp.exp(2 * (x.log_tangent_scale[0] + to_values)) for x in (q, k))
        return moments, Moments(square * q_scale * q.tangent, k_scale * k.tangent, v.tangent)

    def _averages_over(
        self, moments: Moments, tangents: Moments | None, *, exact: bool
    ) -> Averages:
        """The averages over random scores: integrals where ``exact`` lets it, else fixed heads."""
        seen = self._seen
        if exact and self.tokens == 2:
            return _exact_heads.of_two_tokens(moments, tangents, seen)
        turns = None
        if self.positions == "rotary":
            turns = _rotary.turns(self._widths[0], self.tokens)
        width = self._widths[0] if self.finite_key_width else None

        def over_heads(moments: Moments, tangents: Moments | None) -> Averages:
            offsets = jnp.asarray(self._offsets, moments.values.dtype)
            return _heads.average(moments, tangents, offsets, width, turns)

        if not exact or not seen.all():
            return over_heads(moments, tangents)
        alike = _exact_heads.are_alike(moments, self.tokens)
        of_alike = functools.partial(_exact_heads.of_tokens_alike, tokens=self.tokens)
        return jax.lax.cond(alike, of_alike, over_heads, moments, tangents)

    @property
    def _why_no_theory(self) -> str | None:
        """Why the theory does not know the law of scores, if it does not."""
        if self.tied:
            return (
                "tied queries and keys have scores that grow like √d_k where a token meets itself, "
                "and no limit, unless they are divided by d_k (scale='linear')"
            )
        if self.finite_key_width and self.positions == "rotary":
            return "rotary positions are known to the theory at infinite key width alone"
        if self.finite_key_width and self.qk_norm is not None:
            return "normalised queries and keys are known to the theory at infinite key width alone"
        return None

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: no, scores are quadratic in the signal."""
        return False

    @property
    def mixes_sites(self) -> bool:
        """Whether it mixes sites: yes, the tokens of an input."""
        return True

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """The laws of W_Q, W_K (unless tied), W_V and W_O."""
        return (self.distribution,) * (3 if self.tied else 4)

    def width_after(self, n_in: int) -> int:  # noqa: ARG002
        """Return the number of units."""
        return self.units

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shapes of W_Q, W_K (unless tied), W_V and W_O."""
        *inner, outer = (law[2] for law in self._laws)
        if self.tied:
            del inner[1]
        return (*((width, n_in) for width in inner), (outer, self.heads * self._widths[1]))

    def divide_widths(self, factor: int | Fraction) -> "Attention":
        """Return the block with its units, heads and their widths divided by ``factor``.

        Heads of ALiBi stay, as do key widths that scores' law depends on.
        """
        d_k, d_v = (max(1, width // factor) for width in self._widths)
        if self.finite_key_width or self.positions == "rotary":
            d_k = self._widths[0]
        shared, groups = self.heads // self._groups, max(1, self._groups // factor)
        if self.positions == "alibi":
            groups = self._groups
        changes: dict[str, Any] = {
            "units": self.units // factor,
            "heads": groups * shared,
            "key_width": d_k,
            "value_width": d_v,
            "key_heads": None if self.key_heads is None else groups,
        }
        if not isinstance(self.scale, str):
            changes["scale"] = self.scale * math.sqrt(self._widths[0] / d_k)
        return dataclasses.replace(self, **changes)


def _size(kernel: Kernel) -> Float[Array, " sites"]:
    """The root mean square of each site's signal."""
    return jnp.sqrt(jnp.diagonal(kernel.plain().covariance))
