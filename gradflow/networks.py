"""Networks: a random network as data, stages of equal blocks.

A `Network` is an immutable pytree. Its numbers (σ_w, σ_b) are leaves, so that one compiled program
serves a grid of them by `jax.vmap`; its structure (widths, depth, activation) is static. A stage is
one block repeated; a walk through it is a `jax.lax.scan`, so that compile time does not grow with
depth. Layers whose shape differs, as in Glorot & Bengio's 1024-1000-…-9, are stages of their own.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Rational
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from gradflow import activations, ensembles
from gradflow.activations import Activation
from gradflow.arguments import all_finite, as_real, check_instance
from gradflow.blocks import (
    AbstractBlock,
    AbstractLayer,
    Activate,
    BatchNorm,
    Chain,
    Convolution,
    Dense,
    Drive,
    Dropout,
    Flatten,
    GlobalMean,
    LayerNorm,
    Linear,
    Patches,
    Residual,
    RMSNorm,
    UnitVariance,
)
from gradflow.ensembles import Ensemble
from gradflow.errors import (
    InputError,
    check_count,
    check_number,
    check_sequence,
    is_number,
    is_traced,
    unknown_name,
)

__all__ = ["Network", "Stage", "as_inputs", "as_sites", "check_network", "checked_inputs"]
__all__ += ["convolutional", "mlp", "narrowed", "recurrent", "residual", "stack", "unit_variance"]
__all__ += ["with_biases"]


class Stage(eqx.Module):
    """One block, repeated: with independent weights each time or, ``tied``, with the same ones.

    A tied stage is one layer over time: its weights and biases are drawn once, and what is not a
    parameter (a dropout mask, an input) at every step. The theory is that of untied weights, which
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
    """

    stages: tuple[Stage, ...]
    input_width: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)
    name: str = eqx.field(static=True, default="network")

    def __check_init__(self) -> None:
        for stage, (below, above) in zip(
            self.stages, itertools.pairwise(self.stage_widths), strict=True
        ):
            if stage.repeats > 1 and below != above:
                raise InputError(
                    f"a block is repeated {stage.repeats} times, takes {below} units and hands on "
                    f"{above}; what is repeated hands on as many as it takes"
                )
            if stage.repeats > 1 and stage.block.merges > 1:
                raise InputError(
                    f"a block is repeated {stage.repeats} times and makes one site of "
                    f"{stage.block.merges}; what is repeated hands on as many as it takes"
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
        """Whether a site's signal depends on others: BatchNorm's batch, a filter's positions."""
        return any(stage.block.mixes_sites for stage in self.stages)

    def sites(self, first: int) -> tuple[int, ...]:
        """Return how many sites each layer hands on, of so many in the input."""
        counts: list[int] = []
        for stage in self.stages:
            first //= stage.block.merges
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

        And so its reported activations: signals may then be kept at length 1 beside a logarithm.
        """
        blocks = all(stage.block.homogeneous for stage in self.stages)
        return blocks and self.activation.homogeneous

    @property
    def homogeneous_beyond(self) -> tuple[bool, bool]:
        """Whether it is so for signals that are small or large enough, as a linear φ makes it.

        Such a network of tanh is homogeneous for small signals, one of GELU for both.
        """
        if self.homogeneous:
            return True, True

        def at(end: int) -> bool:
            def linear(phi: Activation) -> bool:
                value, slope = phi.powers[end]
                known = not (is_traced(value) or is_traced(slope))
                return phi.homogeneous or bool(known and abs(value - 1) + abs(slope) < 1e-9)

            blocks = all(stage.block.homogeneous_if(linear) for stage in self.stages)
            return blocks and linear(self.activation)

        return at(0), at(1)

    @property
    def iid_gaussian(self) -> bool:
        """Whether every random matrix has independent Gaussian entries."""
        return all(d.iid_gaussian for stage in self.stages for d in stage.block.distributions)

    @property
    def rotation_invariant(self) -> bool:
        """Whether rotations leave the law of every random matrix as it is."""
        laws = (law for stage in self.stages for law in stage.block.distributions)
        return all(law.rotation_invariant for law in laws)

    def as_arrays(self, dtype: DTypeLike) -> "Network":
        """Return the network as a compiled program takes it: scales as arrays, and no name.

        Two networks that differ in their scales and their name alone then share one program.
        """
        unnamed = dataclasses.replace(self, name="")
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), unnamed)


# What `norm` may be in `mlp` and `residual`.
NORMS: dict[str, Callable[[], AbstractBlock]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "batch": BatchNorm,
}
# What `scale` may be in `residual`, beside a number.
SCALES = ("depth", "zero", "fixup")
# What `pool` may be in `convolutional`.
POOLS: dict[str, Callable[[tuple[int, ...]], AbstractBlock]] = {
    "mean": GlobalMean,
    "flatten": Flatten,
}
_PLACES = ("pre", "post")


def mlp(
    widths: Sequence[int],
    activation: Activation | str | Callable[..., Array] = "tanh",
    weights: Ensemble | str | Callable[..., Array] = "glorot",
    *,
    last: Ensemble | str | Callable[..., Array] | None = None,
    sigma_b: float | int | None = None,
    norm: str | None = None,
    place: str = "pre",
    keep: float | int | None = None,
    name: str | None = None,
) -> Network:
    """Return a fully connected network: z^1 = W^1 x + b^1, z^l = W^l φ(z^{l-1}) + b^l.

    Parameters
    ----------
    widths
        (n_0, n_1, …, n_L): the input's width, then every layer's; L >= 1.
    activation
        φ, by name, as an `Activation`, or any elementwise JAX callable.
    weights
        The ensemble, by name, as an `Ensemble`, or any `jax.nn.initializers` function.
    last
        That of the top layer, where it is another: ``"mup_output"`` for μP.
    sigma_b
        σ_b, the standard deviation of the biases (in the units of z); none without it.
    norm, place
        A normalisation, ``"layer"``, ``"rms"`` or ``"batch"``, before the activation (``"pre"``,
        W φ(norm(z)) + b) or after it (``"post"``, W norm(φ(z)) + b); none without it.
    keep
        Dropout: the probability to keep a unit of what W multiplies; none without it.
    name
        What to call it; made from the other arguments without it.

    Raises
    ------
    InputError
        If a width is not a whole number of at least 1, there are fewer than two, σ_b is not a
        finite number of at least 0, ``keep`` is not above 0 and at most 1, or a name is unknown.
    """
    needs = "the input's width and every layer's, as [64, 100, 10]"
    widths = [check_count("width", w) for w in check_sequence("widths", widths, needs)]
    if len(widths) < 2:
        raise InputError(f"widths is {tuple(widths)!r}; it needs an input and at least one layer")
    phi, ensemble = activations.get(activation), ensembles.get(weights)
    top = ensemble if last is None else ensembles.get(last)
    before = _before_weights(phi, norm, place, keep)
    # The input passes through no activation, so the first layer is a stage of its own.
    layers = [
        (below == 0, top if below == len(widths) - 2 else ensemble, fan_in, fan_out)
        for below, (fan_in, fan_out) in enumerate(itertools.pairwise(widths))
    ]
    stages = tuple(
        Stage(
            _as_dense(() if first else before, _linear(drawn, sigma_b)(fan_in, fan_out)),
            repeats=len(list(equal)),
        )
        for (first, drawn, fan_in, fan_out), equal in itertools.groupby(layers)
    )
    kind = _kind(norm, place, keep)
    if last is not None:
        kind = f", last layer {top.name}{kind}"
    return Network(
        stages=stages,
        input_width=widths[0],
        activation=phi,
        name=name or f"{phi.name}, {ensemble.name}{kind}",
    )


def residual(
    input_width: int,
    width: int,
    depth: int,
    activation: Activation | str | Callable[..., Array] = "tanh",
    weights: Ensemble | str | Callable[..., Array] = "glorot",
    *,
    scale: float | int | str = 1.0,
    layers: int = 1,
    hidden: int | None = None,
    weights_first: bool = False,
    sigma_b: float | int | None = None,
    norm: str | None = None,
    place: str = "pre",
    keep: float | int | None = None,
    name: str | None = None,
) -> Network:
    """Return a residual network: z^1 = W x + b, then ``depth`` times z^{l+1} = z^l + α f(z^l).

    Parameters
    ----------
    input_width, width, depth
        The input's width, that of the stream z, and how many blocks there are.
    activation, weights, sigma_b
        As for `mlp`, of every layer.
    scale
        α: a number, ``"depth"`` for 1/√depth, or ``"zero"`` for 0 (ReZero, SkipInit: branches start
        without effect). ``"fixup"`` is α = 1 where the last of a branch's m random matrices is 0
        and the others are multiplied by depth^(-1/(2m-2)) (Zhang, Dauphin & Ma 2019,
        arXiv:1901.09321, section 3; its biases start at 0, as does its classifier, which is none of
        these layers).
    layers
        How many random matrices a branch has, each after an activation: f(z) = W φ(z) + b for one.
    hidden
        The width between a branch's layers; that of the stream without it.
    weights_first
        Whether a branch begins with one more random matrix, as a transformer's does:
        f(z) = V φ(W z + b) + a for ``layers=1`` ('full residual', Yang & Schoenholz 2017).
    norm, place
        A normalisation at the branch's start (``"pre"``, z + α f(norm(z))) or of the sum
        (``"post"``, norm(z + α f(z))): ``"layer"``, ``"rms"`` or
        ``"batch"``; none without it.
    keep
        Dropout in the branch: the probability to keep a unit after each activation.
    name
        What to call it; made from the other arguments without it.

    Raises
    ------
    InputError
        If a width or a count is not a whole number of at least 1, α or σ_b is not a finite number
        of at least 0, ``keep`` is not above 0 and at most 1, a name is unknown, or Fixup is to have
        biases.
    """
    input_width, width = check_count("input_width", input_width), check_count("width", width)
    depth, layers = check_count("depth", depth), check_count("layers", layers)
    hidden = width if hidden is None else check_count("hidden", hidden)
    phi, ensemble = activations.get(activation), ensembles.get(weights)
    linear = _linear(ensemble, sigma_b)
    alpha = _scale(scale, depth)
    if scale == "fixup" and sigma_b:
        raise InputError(f"sigma_b is {sigma_b!r}; the biases of scale 'fixup' start at 0")
    normalisation = _normalisation(norm, place)
    ends = [width, *[hidden] * (layers - 1 + weights_first), width]
    gains = _fixup_gains(len(ends) - 1, depth) if scale == "fixup" else [1.0] * (len(ends) - 1)
    parts: list[AbstractBlock] = []
    if place == "pre":
        parts += normalisation
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(ends)):
        activates = number > 0 or not weights_first
        before = _before_weights(phi, None, "pre", keep) if activates else ()
        layer = linear(fan_in, fan_out)
        layer = dataclasses.replace(layer, sigma_w=gains[number] * layer.sigma_w)
        parts.append(_as_dense(before, layer))
    block: AbstractBlock = Residual(_chain(parts), alpha)
    if place == "post":
        block = _chain([block, *normalisation])
    return Network(
        stages=(Stage(linear(input_width, width)), Stage(block, depth)),
        input_width=input_width,
        activation=phi,
        name=name or f"{phi.name}, {ensemble.name}, residual{_kind(norm, place, keep)}",
    )


def convolutional(
    shape: Sequence[int],
    channels: Sequence[int],
    activation: Activation | str | Callable[..., Array] = "tanh",
    weights: Ensemble | str | Callable[..., Array] = "glorot",
    *,
    size: int | Sequence[int] = 3,
    padding: str = "circular",
    delta: bool = False,
    sigma_b: float | int | None = None,
    dense: Sequence[int] = (),
    pool: str = "mean",
    name: str | None = None,
) -> Network:
    """Return convolutions, z^1 = W^1 * x + b^1, z^l = W^l * φ(z^{l-1}) + b^l, then dense layers.

    Its inputs are those of `as_sites`: every position of every input is a site.

    Parameters
    ----------
    shape
        The lengths of an input's spatial axes, which every convolution keeps: (n,) or (rows,
        columns).
    channels
        (c_0, c_1, …): the input's, then every convolution's, at least one.
    activation, sigma_b
        As for `mlp`.
    weights
        As for `mlp`; a filter of k elements has fan_in k c_{l-1} and fan_out k c_l.
    size
        The filter's length along every axis, or along each; see `blocks.Patches` for even ones.
    padding
        What is beyond the edge: ``"circular"``, the other end, or ``"zeros"``.
    delta
        Whether filters are zero but for their centre, which has fan_in c_{l-1} and fan_out c_l;
        with orthogonal weights it is the delta-orthogonal initialisation.
    dense
        The widths of the dense layers after the convolutions; none without it.
    pool
        What the first of them gets of the convolutions' activations: ``"mean"``, that over
        positions, or ``"flatten"``, all of them.
    name
        What to call it; made from the other arguments without it.

    Raises
    ------
    InputError
        If a length or a width is not a whole number of at least 1, there is no convolution, a
        filter is longer than what it is for, σ_b is not a finite number of at least 0, or a name
        is unknown.

    References
    ----------
    Xiao et al. 2018, arXiv:1806.05393; algorithm 1 for delta-orthogonal.
    """
    channels = [
        check_count("a number of channels", count)
        for count in check_sequence("channels", channels, "the input's channels and every layer's")
    ]
    dense = [
        check_count("a width in dense", width)
        for width in check_sequence("dense", dense, "the widths of the dense layers on top")
    ]
    if len(channels) < 2:
        raise InputError(
            f"channels is {tuple(channels)!r}; it has the input's and those of one layer at least"
        )
    if pool not in POOLS:
        raise unknown_name("pool", pool, POOLS)
    phi, ensemble = activations.get(activation), ensembles.get(weights)
    linear = _linear(ensemble, sigma_b)
    patches = Patches(_tuple(shape), _tuple(size), padding)
    each = 1 if delta else patches.elements

    def convolution(phi: Activation, fan_in: int, fan_out: int) -> AbstractBlock:
        scaled = linear(each * fan_in, each * fan_out)
        return Convolution(
            phi,
            patches.shape,
            patches.size,
            padding,
            fan_out,
            scaled.sigma_w,
            scaled.sigma_b,
            scaled.distribution,
            delta,
        )

    layers = [(n == 0, *pair) for n, pair in enumerate(itertools.pairwise(channels))]
    stages = [
        Stage(convolution(activations.linear if first else phi, *pair), len(list(equal)))
        for (first, *pair), equal in itertools.groupby(layers)
    ]
    if dense:
        pooled = Chain((Activate(phi), POOLS[pool](patches.shape)))
        fan_in = pooled.width_after(channels[-1])
        stages.append(Stage(Chain((*pooled.parts, linear(fan_in, dense[0])))))
    for pair, equal in itertools.groupby(itertools.pairwise(dense)):
        stages.append(Stage(_as_dense((Activate(phi),), linear(*pair)), len(list(equal))))
    kind = "delta convolutions" if delta else "convolutions"
    return Network(
        stages=tuple(stages),
        input_width=channels[0],
        activation=phi,
        name=name or f"{phi.name}, {ensemble.name}, {kind}",
    )


def _tuple(lengths: Any) -> Any:
    # What is no sequence is told of by the block that gets it.
    return tuple(lengths) if isinstance(lengths, Sequence) else lengths


def as_sites(images: Float[ArrayLike, "inputs *shape channels"]) -> Float[Array, "sites channels"]:
    """Return images, (inputs, …, channels), as the inputs of a convolutional network.

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


def check_network(network: Any) -> None:
    """Raise `InputError` unless it is a network."""
    check_instance(
        "network", network, Network, "a Network, as networks.mlp([64, 100, 10]) makes one"
    )


def checked_inputs(inputs: Any, network: Any) -> Array | np.ndarray:
    """Return a batch of a network's inputs as an array of floats, shape (sites, n_0).

    Integers become float32, whatever their size; floats stay what they are.

    Raises
    ------
    InputError
        If the network is none, or inputs are not of this shape, not real or not finite.
    """
    check_network(network)
    array = as_real("inputs", inputs)
    if array.ndim != 2 or array.shape[1] != network.input_width:
        raise InputError(
            f"inputs has shape {array.shape}; it is (inputs, {network.input_width}) for this "
            "network"
        )
    positions = math.prod(stage.block.merges for stage in network.stages)
    if len(array) % positions:
        raise InputError(
            f"inputs has {len(array)} rows; for this network each input is {positions} of them, "
            "its positions one after the other (networks.as_sites)"
        )
    return array


def as_inputs(inputs: Any, network: Any) -> Array:
    """Return `checked_inputs` as JAX holds them.

    Raises
    ------
    InputError
        As `checked_inputs`, or if they are beyond the range of JAX's float type, or below it.
    """
    array = checked_inputs(inputs, network)
    with np.errstate(over="ignore"):  # it is looked for
        found = jnp.asarray(array)
    if not all_finite(found):
        raise InputError(
            f"inputs has values beyond {found.dtype}'s range; turn JAX's x64 mode on, or scale them"
        )
    if is_traced(found):
        return found
    # Below its smallest normal number a float has few digits, and XLA takes it for 0.
    least = float(jnp.finfo(found.dtype).smallest_normal / jnp.finfo(found.dtype).eps)
    size = np.max(np.abs(np.asarray(array)), axis=None if network.mixes_sites else 1)
    faint = np.atleast_1d(size)[(size > 0) & (size < least)]
    if faint.size:
        raise InputError(
            f"inputs has one whose largest value is {faint.min():.3g}, of which {found.dtype} does "
            f"not hold all digits; it is 0 or at least {least:.1g}: scale it"
        )
    return found


def recurrent(
    input_width: int,
    width: int,
    steps: int,
    activation: Activation | str | Callable[..., Array] = "tanh",
    weights: Ensemble | str | Callable[..., Array] = "glorot",
    *,
    sigma_b: float | int | None = None,
    sigma_u: float | int | None = None,
    alike: float | int = 1.0,
    tied: bool = True,
    name: str | None = None,
) -> Network:
    """Return a recurrent network: z^0 = U x, then ``steps`` times z^t = W φ(z^{t-1}) + b + u^t.

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
        How often W acts.
    activation, weights, sigma_b
        As for `mlp`; σ_b that of b, which all steps share. U has entries of variance 1/n_0.
    sigma_u, alike
        Of the input u^t = U' x^t at each step, drawn anew: see `blocks.Drive`; none without it.
    tied
        Whether all steps have the same W and b; ``False`` makes them layers.
    name
        What to call it; made from the other arguments without it.

    Raises
    ------
    InputError
        If a width or a count is not a whole number of at least 1, a scale is not a finite number of
        at least 0, ``alike`` is not from 0 to 1, or a name is unknown.
    """
    width, steps = check_count("width", width), check_count("steps", steps)
    phi, ensemble = activations.get(activation), ensembles.get(weights)
    linear = _linear(ensemble, sigma_b)(width, width)
    block = _as_dense((Activate(phi),), linear)
    if sigma_u is not None:
        block = Chain((block, Drive(sigma_u, alike)))
    return Network(
        stages=(Stage(_as_dense((), Linear(width))), Stage(block, steps, tied=tied)),
        input_width=check_count("input_width", input_width),
        activation=phi,
        name=name or f"{phi.name}, {ensemble.name}, {'recurrent' if tied else 'recurrent, untied'}",
    )


def stack(
    input_width: int,
    blocks: Sequence[AbstractBlock | tuple[AbstractBlock, int] | Stage],
    activation: Activation | str | Callable[..., Array] = "tanh",
    *,
    name: str = "network",
) -> Network:
    """Return a network of any blocks, each one layer, of pairs (block, how many times), or stages.

    Parameters
    ----------
    input_width
        n_0. The first block gets the input itself; `Linear` is one that takes it as it is.
    blocks
        From the input up.
    activation
        The φ that activations and saturation are reported for.
    name
        What to call it.

    Raises
    ------
    InputError
        If there is no block, a count is not a whole number of at least 1, or widths do not fit.
    """
    blocks = check_sequence("blocks", blocks, "a sequence of blocks, from the input up")
    if not blocks:
        raise InputError("blocks is empty; a network has at least one")
    stages = tuple(map(_as_stage, blocks))
    phi = activations.get(activation)
    return Network(stages, check_count("input_width", input_width), phi, name)


def _as_stage(one: AbstractBlock | tuple[AbstractBlock, int] | Stage) -> Stage:
    if isinstance(one, Stage):
        return one
    block, repeats = one if isinstance(one, tuple) and len(one) == 2 else (one, 1)
    check_instance(
        "an entry of blocks", block, AbstractBlock, "a block, a pair (block, how often) or a Stage"
    )
    _check_block(block)
    return Stage(block, check_count("repeats", repeats))


def _check_block(block: AbstractBlock) -> None:
    """Raise `InputError` unless a block's parts are what they are named after."""
    kinds = {
        "activation": (Activation, "an Activation, as activations.get('tanh')"),
        "distribution": (ensembles.Distribution, "a Distribution, as ensembles.gaussian"),
    }
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if field.name in kinds:
            check_instance(f"{type(block).__name__}'s {field.name}", value, *kinds[field.name])
        elif field.name == "units":
            check_count(f"{type(block).__name__}'s units", value)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, AbstractBlock):
                _check_block(part)


def _linear(ensemble: Ensemble, sigma_b: float | None) -> Callable[[int, int], Linear]:
    """Return what makes a layer of weights and biases from (fan_in, fan_out)."""
    if sigma_b is not None:
        check_number("sigma_b", sigma_b)

    def make(fan_in: int, fan_out: int) -> Linear:
        scale = ensemble.sigma_w(fan_in, fan_out)
        return Linear(fan_out, scale, sigma_b or None, ensemble.distribution)

    return make


def _before_weights(
    phi: Activation, norm: str | None, place: str, keep: float | None
) -> tuple[AbstractBlock, ...]:
    """Return what a signal passes before weights: activation, normalisation, dropout."""
    normalisation = _normalisation(norm, place)
    activate = (Activate(phi),)
    ordered = (*normalisation, *activate) if place == "pre" else (*activate, *normalisation)
    return ordered if keep is None else (*ordered, Dropout(keep))


def _normalisation(norm: str | None, place: str) -> tuple[AbstractBlock, ...]:
    if place not in _PLACES:
        raise unknown_name("place", place, _PLACES)
    if norm is None:
        return ()
    if not isinstance(norm, str) or norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    return (NORMS[norm](),)


def _as_dense(before: tuple[AbstractBlock, ...], linear: Linear) -> AbstractBlock:
    """Return one block of these; `Dense` if there is an activation only."""
    phi = activations.linear
    if len(before) == 1 and isinstance(before[0], Activate):
        phi, before = before[0].activation, ()
    if before:
        return Chain((*before, linear))
    return Dense(phi, linear.units, linear.sigma_w, linear.sigma_b, linear.distribution)


def _chain(parts: Sequence[AbstractBlock]) -> AbstractBlock:
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def _scale(scale: float | str, depth: int) -> float:
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
    """Return what Fixup multiplies each of a branch's random matrices by."""
    inner = depth ** (-1 / (2 * layers - 2)) if layers > 1 else 1.0
    return [*[inner] * (layers - 1), 0.0]


def _kind(norm: str | None, place: str, keep: float | None) -> str:
    normed = "" if norm is None else f", {place}-{norm}norm"
    return normed if keep is None else f"{normed}, dropout keeping {keep:g}"


def with_biases(network: Network) -> Network:
    """Return the network with biases that start at 0 wherever a layer has none: for training."""
    check_network(network)

    def with_bias(block: Any) -> Any:
        if getattr(block, "sigma_b", 0.0) is None:
            return dataclasses.replace(block, sigma_b=0.0)
        return block

    layers = jax.tree.map(with_bias, network.stages, is_leaf=lambda b: hasattr(b, "sigma_b"))
    return dataclasses.replace(network, stages=layers)


def unit_variance(network: Network) -> Network:
    """Return the network with the weights of every layer divided as LSUV does.

    Behind each `Linear`, `Dense` and `Convolution` block, wherever it is nested, stands a
    `UnitVariance`; a `GRU` or `LSTM` stays as it is. LSUV starts from orthonormal weights,
    ``ensembles.fan_in(1.0, "orthogonal")``, and no biases; what scale these have does not matter
    then.

    Raises
    ------
    InputError
        If layers share their weights: there is no scale for each.

    References
    ----------
    Mishkin & Matas 2016, arXiv:1511.06422, algorithm 1.
    """
    check_lsuv(network)
    layers = (Linear, AbstractLayer)

    def followed(block: object) -> object:
        return Chain((block, UnitVariance())) if isinstance(block, layers) else block

    stages = jax.tree.map(followed, network.stages, is_leaf=lambda b: isinstance(b, layers))
    return dataclasses.replace(network, stages=stages, name=f"{network.name}, LSUV")


def check_lsuv(network: Network) -> None:
    """Raise `InputError` if layers share their weights: LSUV has a scale for each."""
    check_network(network)
    if network.tied:
        raise InputError(
            f"network is {network.name!r}, whose steps share their weights; LSUV has a scale for "
            "each layer's own"
        )


def narrowed(network: Network, factor: int | Fraction) -> Network:
    """Return the network with every layer's width divided by ``factor``, σ_w and σ_b kept.

    It has the same infinite-width limit for the same inputs, and finite-width effects ``factor``
    times as large: what tells such an effect from an error. The input keeps its width. A factor of
    1/8 makes every layer eight times as wide.

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
        dataclasses.replace(stage, block=stage.block.narrowed(factor)) for stage in network.stages
    )
    return dataclasses.replace(network, stages=stages)
