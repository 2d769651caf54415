"""Embeddings: a row of numbers for each token of a vocabulary, and for each place in a text."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow import ensembles
from gradflow._checks import check_count
from gradflow.blocks._positions import count_inputs
from gradflow.blocks.base import AbstractBlock, Multiply
from gradflow.ensembles import Distribution
from gradflow.errors import InputError
from gradflow.kernels import Kernel, multiply_kernel

__all__ = ["Embedding"]


class Embedding(AbstractBlock):
    """E x + P_t: the row of a table for each token, and one for its place t in the input.

    The signal is one-hot, as `jax.nn.one_hot(ids, vocabulary)` has it, of inputs of ``tokens``
    tokens one after the other. Entries of E are N(0, ``sigma``²), those of P N(0,
    ``sigma_positions``²), and there is no P without it: 0.02 and 0.01 in GPT-2. So equal tokens
    have second moments of σ², distinct ones 0, and equal places σ_p² more; of other signals x,
    σ² Σ_i x_i² (a mixture of tokens).
    """

    units: int = eqx.field(static=True, default=100)
    vocabulary: int = eqx.field(static=True, default=100)
    tokens: int = eqx.field(static=True, default=3)
    sigma: ScalarLike = 1.0
    sigma_positions: ScalarLike | None = None
    distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)

    def __check_init__(self) -> None:
        for name in ("units", "vocabulary", "tokens"):
            check_count(name, getattr(self, name))

    def apply(
        self, signal: Float[Array, "sites vocabulary"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites units"]:
        """Return E x, and P of each site's place."""
        keys = jax.random.split(key)
        scale = self._scale(self.sigma, self.vocabulary)
        rows = multiply(keys[0], signal, sigma_w=scale, **self._law)
        if self.sigma_positions is None:
            return rows
        inputs = count_inputs(len(signal), (self.tokens,))
        places = multiply(
            keys[1],
            jnp.eye(self.tokens, dtype=signal.dtype),
            sigma_w=self._scale(self.sigma_positions, self.tokens),
            **self._law,
        )
        return rows + jnp.tile(places, (inputs, 1))

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return σ² V times the second moments, and σ_p² for sites of one place."""
        rows = multiply(kernel, sigma_w=self._scale(self.sigma, self.vocabulary), **self._law)
        if self.sigma_positions is None:
            return rows
        inputs = count_inputs(len(kernel.mean), (self.tokens,))
        same = jnp.tile(jnp.eye(self.tokens, dtype=kernel.mean.dtype), (inputs, inputs))
        tangent = None if kernel.tangent is None else jnp.zeros_like(kernel.tangent)
        places = Kernel.of(same / self.tokens, tangent=tangent)
        scale = self._scale(self.sigma_positions, self.tokens)
        return rows.plus(multiply(places, sigma_w=scale, **self._law))

    @staticmethod
    def _scale(sigma: ScalarLike, rows: int) -> ScalarLike:
        """σ_w of a matrix from so many inputs whose entries have the deviation σ."""
        return sigma * math.sqrt(rows)

    @property
    def _law(self) -> dict[str, Any]:
        return {"width": self.units, "distribution": self.distribution}

    @property
    def homogeneous(self) -> bool:
        """Whether there is nothing for places."""
        return self.sigma_positions is None

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """The law of E, and of P if there is one."""
        return (self.distribution,) * (1 if self.sigma_positions is None else 2)

    @property
    def is_layer(self) -> bool:
        """Whether its output is a product with its only random matrix: without places."""
        return self.sigma_positions is None

    @property
    def mixes_sites(self) -> bool:
        """Whether sites have something in common, the row of their place."""
        return self.sigma_positions is not None

    @property
    def width_in(self) -> int:
        """The number of tokens that there are."""
        return self.vocabulary

    def width_after(self, n_in: int) -> int:
        """Return the number of units.

        Raises
        ------
        InputError
            If the signal is not of the vocabulary's width.
        """
        if n_in != self.vocabulary:
            raise InputError(
                f"an Embedding of {self.vocabulary} tokens gets {n_in} units; its signal is "
                "one-hot, as wide as the vocabulary"
            )
        return self.units

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:  # noqa: ARG002
        """Return the shape of E, and of P if there is one."""
        rows = (self.vocabulary, self.tokens)[: len(self.distributions)]
        return tuple((self.units, n) for n in rows)

    def divide_widths(self, factor: int | Fraction) -> "Embedding":
        """Return the block with its units divided by ``factor``, and its scales kept."""
        return dataclasses.replace(self, units=int(self.units // factor))
