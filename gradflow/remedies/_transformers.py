"""The remedies for transformers: what each changes of norms, scales, scores and weights."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow import builders
from gradflow.blocks import AbstractBlock, Chain, Residual
from gradflow.errors import InputError
from gradflow.kernels import Kernel
from gradflow.networks import Network, Stage
from gradflow.remedies._table import Remedy
from gradflow.theory import mean_field

__all__ = ["ALL", "SickTransformer"]


@dataclasses.dataclass(frozen=True)
class SickTransformer:
    """A transformer, and those of its size that remedies make of it.

    Attributes
    ----------
    options
        The arguments of `builders.transformer`, by name.
    inputs
        Shape (inputs · tokens, components): what a remedy that is fitted to data sees.
    """

    options: Mapping[str, Any]
    inputs: np.ndarray

    def made(self, **changes: Any) -> Network:
        """The network with these options changed."""
        return builders.transformer(**{**self.options, **changes})

    def changed(self, **changes: Any) -> Network | None:
        """The same, or None if it has them as it is."""
        known = {"norm": "layer", "norm_position": "pre", "scale": 1.0} | dict(self.options)
        return None if known | changes == known else self.made(**changes)


def _edit(**changes: Any) -> Callable[[Any], Network | None]:
    return lambda sick: sick.changed(**changes)


def _admin(sick: Any) -> Network:
    """Post-LN with LN(ω_i x + f_i(x)), ω_i² = ω_{i-1}² + Var f_{i-1}, profiled by theory.

    With ω_1 = 1 (Liu et al. 2020, arXiv:2004.08249; its authors' transformer_layer.py takes the
    square root of Var(ω x) + Var f): ω_i² is the pre-LN stream's second moment before branch i.
    """
    pre = sick.made(norm_position="pre", scale=1.0, outputs=None)
    layers = [stage.block for stage in pre.stages[1:] for _ in range(stage.repeats)]
    with jax.enable_x64(True):
        stream = np.asarray(mean_field.predict(pre, mean_field.input_gram(sick.inputs))["q"], float)
    squares = []
    for layer, before, after in zip(layers, stream[:-1], stream[1:], strict=True):
        _, *second = _sublayers(layer)
        squares += [before, *(after - _second_moment(one) for one in second)]
    remaining = iter([1.0, *(math.sqrt(square) for square in squares[1:])])
    post = sick.made(norm_position="post", scale=1.0)
    stages = [post.stages[0]]
    for stage in post.stages[1:]:
        if not any(isinstance(block, Residual) for block in stage.block.nested):
            stages.append(stage)
            continue
        for _ in range(stage.repeats):
            stages.append(Stage(_with_skips(stage.block, remaining)))
    return dataclasses.replace(post, stages=tuple(stages), name=f"{post.name}, Admin")


def _sublayers(block: AbstractBlock) -> list[Residual]:
    return [one for one in block.nested if isinstance(one, Residual)]


def _second_moment(residual: Residual) -> float:
    """That of a branch whose tokens act alone, of signals of any length: it begins with a norm."""
    with jax.enable_x64(True):
        return float(residual.branch.kernel(Kernel.of(jnp.ones((1, 1)))).plain().covariance[0, 0])


def _with_skips(block: AbstractBlock, omegas: Iterator[float]) -> AbstractBlock:
    """The layer with the next number as the factor of the stream at each of its branches."""
    if isinstance(block, Residual):
        return dataclasses.replace(block, skip_scale=next(omegas))
    if isinstance(block, Chain):
        return Chain(tuple(_with_skips(part, omegas) for part in block.parts))
    return block


def _shaped(_: Any) -> Network:
    raise InputError(
        "its scores shrink as the width grows, so that at infinite width heads are the identity; "
        "what is left is of the order of depth/width, an SDE (Noci et al. 2023, arXiv:2306.17759)"
    )


_STREAM = "the stream's variance grows, so later branches matter less"
_TOGETHER = "tokens become alike, and gradients fall to what they have in common"

# To add a remedy, write a row.
ALL = (
    Remedy("pre-LN", "norms", _edit(norm_position="pre"), "none", _STREAM),
    Remedy("post-LN", "norms", _edit(norm_position="post"), "none", _TOGETHER),
    Remedy(
        "norm of branches alone (Swin v2)",
        "norms",
        _edit(norm_position="branch"),
        "none",
        "the stream grows by 1 a branch, whatever the weights",
    ),
    Remedy(
        "sandwich norms (CogView)",
        "norms",
        _edit(norm_position="sandwich"),
        "a second norm a branch",
        "the stream grows by 1 a branch, whatever the weights",
    ),
    Remedy(
        "Peri-LN",
        "norms",
        _edit(norm_position="peri"),
        "a second norm a branch, and one of the embedding",
        "the stream grows by 1 a branch, whatever the weights",
    ),
    Remedy(
        "Mix-LN, the lowest quarter post",
        "norms",
        _edit(norm_position="mix"),
        "none",
        "the post-LN layers still make tokens alike",
    ),
    Remedy(
        "LayerNorm scaling, pre-LN norms by 1/√l",
        "norms",
        _edit(norm_position="pre", scale="layer"),
        "none",
        "the stream still grows, like log l; later layers act on small signals",
    ),
    Remedy(
        "DyT in place of pre-LN",
        "norms",
        _edit(norm="dyt", norm_position="pre"),
        "a parameter in place of a mean and a variance",
        "tanh saturates as the stream grows",
    ),
    Remedy(
        "DeepNorm",
        "scales",
        _edit(norm_position="post", scale="deepnorm"),
        "a product with a number a branch",
        "each branch adds little: the network is shallower than it looks",
    ),
    Remedy(
        "Admin",
        "scales",
        _admin,
        "a profile of one batch; a parameter a unit and branch",
        "forward it is pre-LN with its stream normed: later branches matter less",
    ),
    Remedy(
        "T-Fixup",
        "scales",
        _edit(norm=None, scale="t_fixup"),
        "no norms",
        "bounds the first update, not signals of other weights",
    ),
    Remedy(
        "Fixup",
        "scales",
        _edit(norm=None, scale="fixup", sigma_b=0.0),
        "no norms",
        "the network is the identity until its last matrices have grown",
    ),
    Remedy(
        "ReZero",
        "scales",
        _edit(norm=None, scale="zero"),
        "a parameter a branch, no norms",
        "no matrix has a gradient at step 0, only the scales",
    ),
    Remedy(
        "projections of branches start at 0, pre-LN",
        "scales",
        _edit(norm_position="pre", scale="zero_output"),
        "none",
        "only W_O and W_2 have a gradient at step 0",
    ),
    Remedy(
        "LayerScale, pre-LN",
        "scales",
        _edit(norm_position="pre", scale="layerscale"),
        "a parameter a unit and branch",
        "the network is nearly the identity until its scales have grown",
    ),
    Remedy(
        "GPT-2's 1/√(2L), pre-LN",
        "scales",
        _edit(norm_position="pre", scale="gpt2"),
        "none",
        "what it does depends on the embedding's scale: the stream grows by 1 in all",
    ),
    Remedy(
        "depth-μP: branches by 1/√L, scores by 1/d_k, pre-LN",
        "scales",
        _edit(norm_position="pre", scale="depth", score_scale="linear"),
        "none",
        "heads are means over all tokens at first",
    ),
    Remedy(
        "σReparam",
        "weights",
        _edit(weights="spectral"),
        "a step of power iteration a matrix, every step",
        "scores and branches start small: κ = 1/16",
    ),
    Remedy(
        "QK-norm",
        "scores",
        _edit(qk_norm="rms"),
        "two norms a head",
        "bounds scores, whatever the weights; the stream is as before",
    ),
    Remedy(
        "nGPT",
        "norms",
        _edit(norm="rms", norm_position="ngpt", qk_norm="rms", weights="lecun"),
        "norms of all weights, every step",
        "steps on the sphere are 0.05 at first: nearly the identity",
    ),
    Remedy("shaped attention", "scores", _shaped, "none", "made for one ratio of depth to width"),
)
