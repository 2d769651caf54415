"""Attention: every token's output is a mean over tokens, weighted by the softmax of its scores.

Sites are tokens: signals have shape (inputs · tokens, units), an input's tokens one after the
other, as positions in `gradflow.blocks.convolution`.
"""

import dataclasses
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
from gradflow._checks import check_count, shown
from gradflow.blocks import _heads
from gradflow.blocks.base import AbstractBlock, Multiply, add_bias
from gradflow.ensembles import Distribution
from gradflow.errors import InputError
from gradflow.kernels import Kernel, Unknown, multiply_kernel

__all__ = ["Attention"]


def _as_mask(mask: Any) -> Any:
    """A mask as the block holds it: a name, or a tuple of tuples of bool, one for each token."""
    if mask is None or isinstance(mask, str) or not isinstance(mask, Sequence | np.ndarray):
        return mask
    rows = np.asarray(mask)
    if rows.ndim == 1:  # of columns: what all tokens see
        rows = np.broadcast_to(rows, (len(rows), len(rows)))
    return tuple(tuple(bool(seen) for seen in row) for row in rows) if rows.ndim == 2 else mask


class Attention(AbstractBlock):
    """z'_a = W_O concat_h(Σ_b A^h_ab W_V^h z_b), A^h_ab = softmax_b(q_a · k_b/√d_k), multi-head.

    (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.) With q = W_Q z and k = W_K z, and
    Var W_Q = σ_q²/n, W_K and W_V alike, Var W_O = σ_o²/(H d_v). No activation is before it.

    At infinite width, with infinitely many heads of infinite key width, scores are Gaussian, with
    Cov(s_ab, s_cd) = σ_q² σ_k² k_ac k_bd, and outputs too (Hron et al. 2020, arXiv:2006.10540):

        k' = σ_v² σ_o² E[A k Aᵀ].
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
    mask: Any = eqx.field(static=True, default=None, converter=_as_mask)
    distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)

    def __check_init__(self) -> None:
        for name in ("tokens", "heads", "units"):
            check_count(name, getattr(self, name))
        for name in ("key_width", "value_width", "key_heads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.key_heads is not None and self.heads % self.key_heads:
            raise InputError(
                f"key_heads is {self.key_heads}; it divides the number of heads, {self.heads}"
            )
        seen = self.mask if isinstance(self.mask, tuple) else ((True,) * self.tokens,) * self.tokens
        if (self.mask not in (None, "causal") and seen is not self.mask) or (
            [len(row) for row in seen] != [self.tokens] * self.tokens
        ):
            raise InputError(
                f"mask is {shown(self.mask)}; it is None, 'causal', or says with True which tokens "
                f"are seen: {self.tokens} of them, or a row of {self.tokens} for each token"
            )
        if not all(any(row) for row in seen):
            raise InputError("mask hides all tokens from a token; it leaves each token one to see")

    @property
    def _widths(self) -> tuple[int, int]:
        """The widths of keys and of values, d_k and d_v."""
        keys = self.key_width or max(1, self.units // self.heads)
        return keys, self.value_width or keys

    @property
    def _seen(self) -> np.ndarray:
        """Which tokens, in columns, a token sees, in a row."""
        all_seen = np.ones((self.tokens, self.tokens), bool)
        if self.mask is None:
            return all_seen
        return np.tril(all_seen) if self.mask == "causal" else np.array(self.mask)

    @property
    def _groups(self) -> int:
        """The number of heads of keys and values."""
        return self.key_heads or self.heads

    def apply(
        self, signal: Float[Array, "sites n_in"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n_out"]:
        """Return the outputs of all heads times W_O."""
        inputs = self._count_inputs(signal.shape[0])
        keys = jax.random.split(key, 4)
        (d_k, d_v), groups = self._widths, self._groups

        def product(key: PRNGKeyArray, x: Array, law: tuple[Any, Any, int]) -> Array:
            sigma, bias, width = law
            weights_key, bias_key = jax.random.split(key)
            out = multiply(
                weights_key, x, sigma_w=sigma, width=width, distribution=self.distribution
            )
            return add_bias(bias_key, out, multiply, bias)

        def by_heads(x: Array, heads: int) -> Array:
            """(inputs, tokens, key heads, heads of each, width)."""
            return x.reshape(inputs, self.tokens, groups, heads // groups, -1)

        laws = self._laws
        q = by_heads(product(keys[0], signal, laws[0]), self.heads)
        k = by_heads(product(keys[1], signal, laws[1]), groups)[:, :, :, 0]
        v = by_heads(product(keys[2], signal, laws[2]), groups)[:, :, :, 0]
        scores = jnp.einsum("iaghk,ibgk->ighab", q, k, precision="highest") / math.sqrt(d_k)
        scores = jnp.where(self._seen[None, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("ighab,ibgv->iaghv", weights, v, precision="highest")
        return product(keys[3], out.reshape(-1, self.heads * d_v), laws[3])

    @property
    def _laws(self) -> tuple[tuple[Any, Any, int], ...]:
        """For W_Q, W_K, W_V and W_O: σ, the bias' σ, and the number of units."""
        (d_k, d_v), groups = self._widths, self._groups
        return (
            (self.sigma_q, self.bias_q, self.heads * d_k),
            (self.sigma_k, self.bias_k, groups * d_k),
            (self.sigma_v, self.bias_v, groups * d_v),
            (self.sigma_o, self.bias_o, self.units),
        )

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return σ_v² σ_o² E[A k Aᵀ], and the biases'."""
        self._count_inputs(len(kernel.mean))
        kernel = kernel.common()

        def product(kernel: Kernel, law: tuple[Any, Any, int]) -> Kernel:
            sigma, bias, width = law
            out = multiply(kernel, sigma_w=sigma, width=width, distribution=self.distribution)
            return out.with_bias(bias)

        q, k, v = (product(kernel, law).plain() for law in self._laws[:3])
        moments = _heads.Moments(q.covariance, k.covariance, v.covariance)
        tangents = None
        if q.tangent is not None and k.tangent is not None and v.tangent is not None:
            tangents = _heads.Moments(q.tangent, k.tangent, v.tangent)
        covariance, tangent = _heads.average(moments, tangents, jnp.asarray(self._seen))
        heads = v.derived(covariance, jnp.zeros_like(v.mean), tangent, Unknown())
        return product(heads, self._laws[3])

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
        """The laws of W_Q, W_K, W_V and W_O."""
        return (self.distribution,) * 4

    def width_after(self, n_in: int) -> int:  # noqa: ARG002
        """Return the number of units."""
        return self.units

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shapes of W_Q, W_K, W_V and W_O."""
        fans = (n_in, n_in, n_in, self.heads * self._widths[1])
        return tuple((law[2], fan_in) for law, fan_in in zip(self._laws, fans, strict=True))

    def divide_widths(self, factor: int | Fraction) -> "Attention":
        """Return the block with its units, heads and their widths divided by ``factor``."""
        d_k, d_v = (max(1, width // factor) for width in self._widths)
        groups = max(1, self._groups // factor)
        changes: dict[str, Any] = {
            "units": self.units // factor,
            "heads": groups * (self.heads // self._groups),
            "key_width": d_k,
            "value_width": d_v,
            "key_heads": None if self.key_heads is None else groups,
        }
        return dataclasses.replace(self, **changes)
