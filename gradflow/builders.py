"""Builders: networks of the usual architectures, and of any blocks."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from gradflow import _entries, activations, ensembles
from gradflow._arguments import as_real
from gradflow._builder_options import (
    Bias,
    Count,
    Depth,
    Deviation,
    Epsilon,
    NormGroups,
    Phi,
    Weights,
    WeightsByLayer,
)
from gradflow._checks import (
    check_count,
    check_sequence,
    is_number,
    unknown_name,
)
from gradflow._convolutional import POOLS, convolutional
from gradflow._entries import Beside, OneOf, Whole, Widths
from gradflow._layer_parts import as_dense, as_stage, chain, linear, scaled
from gradflow._transformers import transformer
from gradflow.activations import Activation
from gradflow.blocks import (
    AbstractBlock,
    Activate,
    BatchNorm,
    Chain,
    Drive,
    Dropout,
    GroupNorm,
    LayerNorm,
    Residual,
    RMSNorm,
)
from gradflow.ensembles import Ensemble
from gradflow.errors import InputError
from gradflow.networks import Network, Stage

__all__ = [
    "NORMS",
    "POOLS",
    "SCALES",
    "as_sites",
    "convolutional",
    "mlp",
    "recurrent",
    "residual",
    "stack",
    "transformer",
]

# What `norm` may be in `mlp` and `residual`.
NORMS: dict[str, Callable[..., AbstractBlock]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "batch": BatchNorm,
    "group": GroupNorm,
}
# What `scale` may be in `residual`, beside a number.
SCALES = ("depth", "zero", "fixup")
_NORM_POSITIONS = ("pre", "post")

# Kinds of parameters that no other builder has, see `_builder_options`.
_Norm = Annotated[str, OneOf("norm", tuple(NORMS))]
_NormPosition = Annotated[str, OneOf("norm_position", _NORM_POSITIONS), Beside("norm")]
_KeepRate = Annotated[float | int, _entries.probability]
_BranchScale = Annotated[float | int | str, OneOf("scale", SCALES, _entries.scale)]


def mlp(
    widths: Annotated[Sequence[int], Widths()],
    activation: Phi = "tanh",
    weights: WeightsByLayer = "glorot",
    *,
    last: Weights | None = None,
    sigma_b: Deviation | None = None,
    bias: Bias | None = None,
    norm: _Norm | None = None,
    norm_position: _NormPosition = "pre",
    norm_groups: NormGroups = 1,
    epsilon: Epsilon | None = None,
    keep_rate: _KeepRate | None = None,
    name: str | None = None,
) -> Network:
    """A fully connected network: z^1 = W^1 x + b^1, z^l = W^l φ(z^{l-1}) + b^l.

    Parameters
    ----------
    widths
        The input's width n_0, then every layer's: n_0, n_1, …, n_L; L >= 1.
    activation
        φ, by name; `gradflow list` has all. Or an `Activation`, or any elementwise JAX callable.
    weights
        The ensemble of the weights, as `ensembles.get` reads it: he, glorot*5/3, normal(0.02), …
        Or an `Ensemble`, or any function of `jax.nn.initializers`; or a list of one for each layer,
        in text with commas between them.
    last
        The ensemble of the top layer's weights, where it is another one, as mup_output for μP.
    sigma_b
        σ_b, the standard deviation of the biases, in the units of z; without it there are none.
    bias
        A number that all biases are, or that their mean is; or torch, for biases U[±1/√fan_in].
        Without it and ``sigma_b``, biases are those of the weights' framework, if any.
    norm
        A normalisation of every layer's input: layer, rms, batch or group.
    norm_position
        Whether it stands before the activation, pre, W φ(norm(z)) + b, or after it, post,
        W norm(φ(z)) + b.
    norm_groups
        How many groups of units the norm group has; see `blocks.GroupNorm`.
    epsilon
        What is added to a normalisation's variance, as 1e-5 in PyTorch; nothing without it.
    keep_rate
        Dropout: the probability to keep a unit of what W multiplies.
    name
        For tables and files; made of the other arguments without it.

    Returns
    -------
    Network
        With a layer for each width but the first.

    Raises
    ------
    InputError
        If a width is not a whole number of at least 1, there are fewer than two, σ_b is not a
        finite number of at least 0, ``keep_rate`` is not above 0 and at most 1, or a name is
        unknown; or ensembles are not as many as layers.
    """
    needs = "the input's width and every layer's, as [64, 100, 10]"
    widths = [check_count("width", w) for w in check_sequence("widths", widths, needs)]
    if len(widths) < 2:
        raise InputError(f"widths is {tuple(widths)!r}; it needs an input and at least one layer")
    phi = activations.get(activation)
    each = ensembles.by_layer(weights, len(widths) - 1)
    called = ", ".join(e.name for e in (each if len(set(each)) > 1 else each[:1]))
    each = each if last is None else (*each[:-1], ensembles.get(last))
    normalisation = _normalisation(norm, norm_position, norm_groups, epsilon)
    before = _before_weights(phi, normalisation, norm_position, keep_rate)
    stages = _dense_stages(widths, each, before, (sigma_b, bias))
    kind = _kind(norm, norm_position, epsilon, keep_rate)
    if last is not None:
        kind = f", last layer {each[-1].name}{kind}"
    return Network(stages, widths[0], phi, name or f"{phi.name}, {called}{kind}")


def residual(
    input_width: Count,
    width: Count,
    depth: Depth,
    activation: Phi = "tanh",
    weights: Weights = "glorot",
    *,
    scale: _BranchScale = 1.0,
    layers: Annotated[int, Whole(100)] = 1,
    hidden: Count | None = None,
    weights_first: bool = False,
    sigma_b: Deviation | None = None,
    bias: Bias | None = None,
    norm: _Norm | None = None,
    norm_position: _NormPosition = "pre",
    norm_groups: NormGroups = 1,
    epsilon: Epsilon | None = None,
    keep_rate: _KeepRate | None = None,
    name: str | None = None,
) -> Network:
    """A residual network: z^1 = W x + b, then ``depth`` times z^{l+1} = z^l + α f(z^l).

    Parameters
    ----------
    input_width, width, depth
        The input's width, that of the stream z, and the number of blocks.
    activation, weights, sigma_b, bias, keep_rate, name
        As for `mlp`, of every layer; dropout in the branches alone.
    scale
        α: a number, depth for 1/√depth, zero for 0 (ReZero, SkipInit), or fixup. The last of them
        is α = 1 where the last of a branch's m weight matrices is 0 and the others are multiplied
        by depth^(-1/(2m-2)), without biases (Zhang, Dauphin & Ma 2019, arXiv:1901.09321).
    layers
        The number of a branch's weight matrices, each after an activation: f(z) = W φ(z) + b.
    hidden
        The width between a branch's layers; that of the stream without it.
    weights_first
        Whether a branch begins with one more weight matrix, as a transformer's. For ``layers=1``,
        f(z) = V φ(W z + b) + a ('full residual', Yang & Schoenholz 2017).
    norm_groups, epsilon
        As for `mlp`.
    norm, norm_position
        As for `mlp`, but at the branch's start, z + α f(norm(z)), or of the sum, norm(z + α f(z)).

    Returns
    -------
    Network
        With depth + 1 layers: the first, and the blocks.

    Raises
    ------
    InputError
        If a number is not in its range, as for `mlp`, α is not a finite number of at least 0, a
        name is unknown, or Fixup is to have biases.
    """
    input_width, width = check_count("input_width", input_width), check_count("width", width)
    depth, layers = check_count("depth", depth), check_count("layers", layers)
    hidden = width if hidden is None else check_count("hidden", hidden)
    phi, ensemble = activations.get(activation), ensembles.get(weights)
    alpha = _scale(scale, depth, sigma_b=sigma_b, bias=bias)
    layer = linear(ensemble, 0.0 if scale == "fixup" else sigma_b, bias)
    normalisation = _normalisation(norm, norm_position, norm_groups, epsilon)
    ends = [width, *[hidden] * (layers - 1 + weights_first), width]
    gains = _fixup_gains(len(ends) - 1, depth) if scale == "fixup" else [1.0] * (len(ends) - 1)
    parts: list[AbstractBlock] = list(normalisation if norm_position == "pre" else ())
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(ends)):
        activates = number > 0 or not weights_first
        before = _before_weights(phi, (), "pre", keep_rate) if activates else ()
        parts.append(as_dense(before, scaled(layer(fan_in, fan_out), gains[number])))
    block: AbstractBlock = Residual(chain(parts), alpha)
    if norm_position == "post":
        block = chain([block, *normalisation])
    kind = f"residual{_kind(norm, norm_position, epsilon, keep_rate)}"
    stages = (Stage(layer(input_width, width)), Stage(block, depth))
    return Network(stages, input_width, phi, name or f"{phi.name}, {ensemble.name}, {kind}")


def as_sites(images: Float[ArrayLike, "inputs *shape channels"]) -> Float[Array, "sites channels"]:
    """Images as the inputs of a convolutional network.

    Parameters
    ----------
    images
        Shape (inputs, positions, channels) or (inputs, rows, columns, channels).

    Returns
    -------
    array
        Shape (inputs · positions, channels): an input's positions one after the other, row by row.

    Raises
    ------
    InputError
        If there is no spatial axis.
    """
    images = jnp.asarray(as_real("images", images))
    if images.ndim < 3:
        raise InputError(
            f"images has shape {images.shape}; it is (inputs, positions, channels) or (inputs, "
            "rows, columns, channels)"
        )
    return images.reshape(-1, images.shape[-1])


def recurrent(
    input_width: Count,
    width: Count,
    steps: Depth,
    activation: Phi = "tanh",
    weights: Weights = "glorot",
    *,
    sigma_b: Deviation | None = None,
    bias: Bias | None = None,
    sigma_u: Deviation | None = None,
    alike: Annotated[float | int, _entries.share, Beside("sigma_u")] = 1.0,
    tied: bool = True,
    name: str | None = None,
) -> Network:
    """A recurrent network: z^0 = U x, then ``steps`` times z^t = W φ(z^{t-1}) + b + u^t.

    Layer 1 is z^0, and layer t + 1 is time t; gradients go down as in backpropagation through time
    (Hochreiter 1991; Bengio, Simard & Frasconi 1994). At every layer the gradient is with respect
    to that step's signal alone, and the weights' gradient is that step's term of ∂C/∂W, the sum
    over the steps. Terms of different steps are orthogonal at infinite width, so that the mean
    square of ∂C/∂W is the sum of theirs.

    *Shared weights.* The theory is that of weights drawn anew at each step, and has the same limit:
    at infinite width W φ(z^s) and W φ(z^t) are Gaussian, and the law at one time does not see how
    they are correlated, nor what b adds to that; gradients meet weights that are as good as
    independent (Chen, Pennington & Schoenholz 2018, arXiv:1806.05394; Yang 2019, arXiv:1902.04760;
    Yang 2020, arXiv:2006.14548). The way there is longer. Effects of the width grow like t²/n, not
    t/n: the eigenvectors of W are those of W^t, so that products grow by themselves; without a
    nonlinearity E ‖W^t z‖² = ‖z‖² (1 + t⁴/(12 n²) + …), measured, where independent weights keep
    the mean. Driven tanh units at σ_w = 1 (``sigma_u=0.1``), over 200 steps: log ‖∂C/∂z^0‖ is above
    the theory's -9 to -11 by 4.2 ± 0.2 for 250 units, 1.6 ± 0.2 for 1000, 0.42 ± 0.06 for 4000 and
    0.06 ± 0.03 for 16 000.

    Parameters
    ----------
    input_width, width
        n_0, and the number of units n.
    steps
        The number of steps, at each of which W acts.
    activation, weights, sigma_b, bias
        As for `mlp`; b is shared by all steps. U has entries of variance 1/n_0; with weights torch
        and keras, U, W and b are those of their recurrent layers.
    sigma_u, alike
        The standard deviation of the input u^t = U' x^t, which is drawn anew at each step, and its
        correlation between two inputs of the network, see `blocks.Drive`; without it there is none.
    tied
        Whether all steps have the same W and b; ``False`` makes them layers.
    name
        For tables and files; made of the other arguments without it.

    Returns
    -------
    Network
        With steps + 1 layers, of which the steps share their weights if ``tied``.

    Raises
    ------
    InputError
        If a width or a count is not a whole number of at least 1, a scale is not a finite number of
        at least 0, ``alike`` is not from 0 to 1, or a name is unknown.
    """
    width, steps = check_count("width", width), check_count("steps", steps)
    phi, ensemble = activations.get(activation), ensembles.get(weights)
    input_width = check_count("input_width", input_width)
    on_input, each_step = ensemble.recurrent or (ensembles.fan_in(1.0), ensemble)
    first = linear(on_input, 0.0, None)(input_width, width)
    block = as_dense((Activate(phi),), linear(each_step, sigma_b, bias)(width, width))
    if sigma_u is not None:
        block = Chain((block, Drive(sigma_u, alike)))
    return Network(
        stages=(Stage(as_dense((), first)), Stage(block, steps, tied=tied)),
        input_width=input_width,
        activation=phi,
        name=name or f"{phi.name}, {ensemble.name}, {'recurrent' if tied else 'recurrent, untied'}",
    )


def stack(
    input_width: int,
    blocks: Sequence[AbstractBlock | tuple[AbstractBlock, int] | Stage],
    activation: Phi = "tanh",
    *,
    name: str = "network",
) -> Network:
    """A network of any blocks, each one layer, of pairs (block, how many times), or stages.

    Parameters
    ----------
    input_width
        n_0. The first block gets the input itself; `Linear` is one that takes it as it is.
    blocks
        From the input up.
    activation
        The φ that activations and saturation are reported for.
    name
        For tables and files.

    Returns
    -------
    Network
        With a layer for each block and each of its repeats.

    Raises
    ------
    InputError
        If there is no block, a count is not a whole number of at least 1, or widths do not fit.
    """
    blocks = check_sequence("blocks", blocks, "a sequence of blocks, from the input up")
    if not blocks:
        raise InputError("blocks is empty; a network has at least one")
    stages = tuple(map(as_stage, blocks))
    phi = activations.get(activation)
    return Network(stages, check_count("input_width", input_width), phi, name)


def _dense_stages(
    widths: Sequence[int],
    each: Sequence[Ensemble],
    before: tuple[AbstractBlock, ...],
    biases: tuple[float | int | None, float | int | str | None],
) -> tuple[Stage, ...]:
    """Dense layers, equal ones after each other as one stage."""
    # The input passes through no activation, so the first layer is a stage of its own.
    layers = [
        (below == 0, each[below], fan_in, fan_out)
        for below, (fan_in, fan_out) in enumerate(itertools.pairwise(widths))
    ]
    return tuple(
        Stage(
            as_dense(() if first else before, linear(drawn, *biases)(fan_in, fan_out)),
            repeats=len(list(equal)),
        )
        for (first, drawn, fan_in, fan_out), equal in itertools.groupby(layers)
    )


def _before_weights(
    phi: Activation,
    normalisation: tuple[AbstractBlock, ...],
    norm_position: str,
    keep_rate: float | None,
) -> tuple[AbstractBlock, ...]:
    """The blocks that a signal passes before weights: activation, normalisation, dropout."""
    activate = (Activate(phi),)
    ordered = (*normalisation, *activate) if norm_position == "pre" else (*activate, *normalisation)
    return ordered if keep_rate is None else (*ordered, Dropout(keep_rate))


def _normalisation(
    norm: str | None, norm_position: str, norm_groups: int, epsilon: float | None
) -> tuple[AbstractBlock, ...]:
    if norm_position not in _NORM_POSITIONS:
        raise unknown_name("norm_position", norm_position, _NORM_POSITIONS)
    check_count("norm_groups", norm_groups)
    if norm is None:
        return ()
    if not isinstance(norm, str) or norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    own = {"groups": norm_groups} if norm == "group" else {}
    return (NORMS[norm](epsilon=epsilon, **own),)


def _scale(scale: float | str, depth: int, **biases: float | int | str | None) -> float:
    """α as a number; biases are refused beside Fixup."""
    for name, value in biases.items():
        if scale == "fixup" and value:
            raise InputError(f"{name} is {value!r}; the biases of scale 'fixup' start at 0")
    if isinstance(scale, str):
        if scale not in SCALES:
            raise unknown_name("scale", scale, SCALES)
        return {"depth": depth**-0.5, "zero": 0.0, "fixup": 1.0}[scale]
    if not (is_number(scale) and 0 <= scale < math.inf):
        raise InputError(
            f"scale is {scale!r}; it is a finite number of at least 0, or one of "
            f"{', '.join(map(repr, SCALES))}"
        )
    return scale


def _fixup_gains(layers: int, depth: int) -> list[float]:
    """Fixup's factor of each of a branch's weight matrices."""
    inner = depth ** (-1 / (2 * layers - 2)) if layers > 1 else 1.0
    return [*[inner] * (layers - 1), 0.0]


def _kind(
    norm: str | None, norm_position: str, epsilon: float | None, keep_rate: float | None
) -> str:
    normed = "" if norm is None else f", {norm_position}-{norm}norm"
    normed += "" if norm is None or epsilon is None else f" with epsilon {epsilon:g}"
    return normed if keep_rate is None else f"{normed}, dropout keeping {keep_rate:g}"
