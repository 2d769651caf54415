"""Networks: a random network as data, stages of equal blocks.

A `Network` is an immutable pytree. Its numbers (σ_w, σ_b) are leaves, so that one compiled program
serves a grid of them by `jax.vmap`; its structure (widths, depth, activation) is static. A stage is
one block repeated; a walk through it is a `jax.lax.scan`, so that compile time does not grow with
depth. Layers whose shape differs, as in Glorot & Bengio's 1024-1000-…-9, are stages of their own.
"""

import dataclasses
import itertools
import math
import operator
from fractions import Fraction
from numbers import Rational
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gradflow import activations
from gradflow._checks import check_instance, is_number, is_traced
from gradflow.activations import Activation
from gradflow.blocks import (
    AbstractBlock,
    Chain,
    UnitVariance,
)
from gradflow.ensembles import gaussian
from gradflow.errors import InputError

__all__ = ["Network", "Stage", "check_network", "divide_widths", "unit_variance", "with_biases"]


class Stage(eqx.Module):
    """One block, repeated: with independent weights each time or, ``tied``, with the same ones.

    A tied stage is one layer over time: its weights and biases are drawn once, and other random
    numbers (a dropout mask, an input) at every step. The theory is that of untied weights, which
    has the same limit (see `recurrent`) unless a unit's signal goes on beside the weights, as in a
    GRU, an LSTM and a Residual: then there is none step by step (`theory.shared_weights`).
    """

    block: AbstractBlock
    repeats: int = eqx.field(static=True, default=1)
    tied: bool = eqx.field(static=True, default=False)


class Network(eqx.Module):
    """The law of a random network; no weights.

    Attributes
    ----------
    stages
        In order from the input up. The first block of a network made by `mlp` takes the input
        itself, z^1 = W^1 x + b^1.
    input_width
        n_0, the number of components of an input.
    activation
        The φ that activations h^l = φ(z^l) and saturation are reported for.
    name
        A short description for tables, messages and files.
    saturation_threshold
        A unit counts as saturated where |φ'| is below this fraction of its maximum. By default it
        is that of a logistic whose output is below 0.01 or above 0.99: σ' < 0.01 · 0.99.
    """

    stages: tuple[Stage, ...]
    input_width: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True, converter=activations.get)
    name: str = eqx.field(static=True, default="network")
    saturation_threshold: float = eqx.field(static=True, default=4 * 0.01 * 0.99)

    def __check_init__(self) -> None:
        if not (is_number(self.saturation_threshold) and 0 < self.saturation_threshold <= 1):
            raise InputError(
                f"saturation_threshold is {self.saturation_threshold!r}; it is a fraction in (0, 1]"
            )
        for stage, (below, above) in zip(
            self.stages, itertools.pairwise(self.stage_widths), strict=True
        ):
            if stage.repeats > 1 and below != above:
                raise InputError(
                    f"a block is repeated {stage.repeats} times, takes {below} units and hands on "
                    f"{above}; a repeated block hands on as many units as it takes"
                )
            if stage.repeats > 1 and stage.block.pool_factor != 1:
                raise InputError(
                    f"a block is repeated {stage.repeats} times and makes one site of "
                    f"{stage.block.pool_factor}; a repeated block hands on as many sites as it "
                    "takes"
                )

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """n_0, and the width after each stage; layers of one stage are equally wide."""
        widths = [self.input_width]
        for stage in self.stages:
            widths.append(stage.block.width_after(widths[-1]))
        return tuple(widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """(n_0, n_1, …, n_L), of the signals that layers hand on."""
        hidden = (
            itertools.repeat(width, stage.repeats)
            for stage, width in zip(self.stages, self.stage_widths[1:], strict=True)
        )
        return (self.input_width, *itertools.chain.from_iterable(hidden))

    @property
    def shapes(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each layer, the shapes (n_out, n_in) of its random matrices."""
        each = (
            itertools.repeat(stage.block.shapes(width), stage.repeats)
            for stage, width in zip(self.stages, self.stage_widths[:-1], strict=True)
        )
        return tuple(itertools.chain.from_iterable(each))

    @property
    def mixes_sites(self) -> bool:
        """Whether a site's signal depends on other sites: on other inputs, or other positions."""
        return any(stage.block.mixes_sites for stage in self.stages)

    @property
    def positions(self) -> int:
        """The least number of sites that an input has: its positions, where layers merge them."""
        factors = itertools.accumulate(
            (Fraction(stage.block.pool_factor) for stage in self.stages), operator.mul
        )
        return math.lcm(*(factor.numerator for factor in factors))

    def sites(self, first: int) -> tuple[int, ...]:
        """Return the number of sites that each layer hands on, with ``first`` in the input."""
        counts: list[int] = []
        for stage in self.stages:
            first = int(first // stage.block.pool_factor)
            counts += stage.repeats * [first]
        return tuple(counts)

    @property
    def depth(self) -> int:
        """L, the number of layers (of blocks)."""
        return sum(stage.repeats for stage in self.stages)

    @property
    def tied(self) -> bool:
        """Whether some layers share their weights."""
        return any(stage.tied and stage.repeats > 1 for stage in self.stages)

    @property
    def homogeneous(self) -> bool:
        """Whether the network maps a·x to a·z for every a > 0 (no biases, φ homogeneous).

        The activations that are reported too: signals may then be kept at length 1 beside a
        logarithm.
        """
        blocks = all(stage.block.homogeneous for stage in self.stages)
        return blocks and self.activation.homogeneous

    @property
    def homogeneous_beyond(self) -> tuple[bool, bool]:
        """Whether the network is homogeneous for small enough signals, and for large enough ones.

        It is where φ is linear in the limit: tanh for small signals, GELU for both.
        """
        if self.homogeneous:
            return True, True

        def at(end: int) -> bool:
            def linear(phi: Activation) -> bool:
                if phi.homogeneous:
                    return True
                value, slope = phi.powers[end]
                known = not (is_traced(value) or is_traced(slope))
                return bool(known and abs(value - 1) + abs(slope) < 1e-9)

            blocks = all(stage.block.homogeneous_if(linear) for stage in self.stages)
            return blocks and linear(self.activation)

        return at(0), at(1)

    @property
    def iid_gaussian(self) -> bool:
        """Whether every random matrix has independent Gaussian entries."""
        return all(d.iid_gaussian for stage in self.stages for d in stage.block.distributions)

    @property
    def centred(self) -> bool:
        """Whether weights and biases have mean 0, and biases are Gaussian: so are all signals then.

        Not, too, where the weights' law is none of independent entries or orthogonal matrices.
        """

        def is_centred(block: Any) -> bool:
            means = [getattr(block, name, None) for name in ("mu_w", "mu_b")]
            law = getattr(block, "bias_distribution", gaussian)
            structured = any(law.structured for law in block.distributions)
            return means == [None, None] and law.iid_gaussian and not structured

        return all(is_centred(block) for stage in self.stages for block in stage.block.nested)

    @property
    def rotation_invariant(self) -> bool:
        """Whether rotations leave the law of every random matrix as it is."""
        laws = (law for stage in self.stages for law in stage.block.distributions)
        return all(law.rotation_invariant for law in laws)

    def as_arrays(self, dtype: DTypeLike) -> "Network":
        """Return the network as a compiled program takes it: scales as arrays, and no name.

        Two networks that differ in their scales and their name alone then share one program.
        """
        return jax.tree.map(
            lambda leaf: (jnp if is_traced(leaf) else np).asarray(leaf, dtype), self.unnamed()
        )

    def unnamed(self) -> "Network":
        """Return the network without its name, which no program depends on."""
        return dataclasses.replace(self, name="")


def with_biases(network: Network) -> Network:
    """Return the network with biases that start at 0 in each layer without biases: for training."""
    check_network(network)

    def with_bias(block: Any) -> Any:
        if getattr(block, "sigma_b", 0.0) is None:
            return dataclasses.replace(block, sigma_b=0.0)
        return block

    layers = jax.tree.map(with_bias, network.stages, is_leaf=lambda b: hasattr(b, "sigma_b"))
    return dataclasses.replace(network, stages=layers)


def unit_variance(network: Network) -> Network:
    """Return the network with the weights of every layer divided as LSUV does.

    Behind each block that is one layer of weights (`Linear`, `Dense`, `Convolution`), wherever it
    is nested, stands a `UnitVariance`; a `GRU` or `LSTM` stays as it is. LSUV starts from
    orthonormal weights, ``ensembles.fan_in(1.0, "orthogonal")``, and no biases; the scale of the
    weights does not matter then.

    Raises
    ------
    InputError
        If layers share their weights: there is no scale for each.

    References
    ----------
    Mishkin & Matas 2016, arXiv:1511.06422, algorithm 1.
    """
    _check_lsuv(network)

    def is_layer(block: object) -> bool:
        return isinstance(block, AbstractBlock) and block.is_layer

    def followed(block: Any) -> object:
        return Chain((block, UnitVariance())) if is_layer(block) else block

    stages = jax.tree.map(followed, network.stages, is_leaf=is_layer)
    return dataclasses.replace(network, stages=stages, name=f"{network.name}, LSUV")


def _check_lsuv(network: Network) -> None:
    """Raise `InputError` if layers share their weights, or their means are not 0."""
    check_network(network)
    if network.tied:
        raise InputError(
            f"network is {network.name!r}, whose steps share their weights; LSUV has a scale for "
            "each layer's own"
        )
    if not network.centred:
        raise InputError(
            f"network is {network.name!r}, of weights or biases with a mean; LSUV starts from "
            "weights of mean 0"
        )


def divide_widths(network: Network, factor: int | Fraction) -> Network:
    """Return the network with every layer's width divided by ``factor``, σ_w and σ_b kept.

    The narrower network has the same infinite-width limit for the same inputs, and finite-width
    effects ``factor`` times as large, which tells such an effect from an error. The input keeps its
    width. A factor of 1/8 makes every layer eight times as wide.

    Raises
    ------
    InputError
        If a layer would have no unit left, or the factor is no fraction above 0.
    """
    check_network(network)
    if not isinstance(factor, Rational) or isinstance(factor, bool) or factor <= 0:
        raise InputError(f"factor is {factor!r}; it is a whole number or a Fraction, above 0")
    if min(network.widths[1:]) < factor:
        raise InputError(
            f"widths {network.widths!r} cannot be divided by {factor}: a layer would be empty"
        )

    stages = tuple(
        dataclasses.replace(stage, block=stage.block.divide_widths(factor))
        for stage in network.stages
    )
    return dataclasses.replace(network, stages=stages)


def check_network(network: Any) -> None:
    """Raise `InputError` unless it is a network."""
    check_instance(
        "network", network, Network, "a Network, as builders.mlp([64, 100, 10]) makes one"
    )
