"""The builder of convolutional networks."""

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from gradflow import activations, ensembles
from gradflow._builder_options import Bias, Deviation, Epsilon, NormGroups, Phi, Weights
from gradflow._checks import check_count, check_sequence, unknown_name
from gradflow._entries import Beside, OneOf, Whole, Wholes
from gradflow._layer_parts import as_dense, chain, fields, linear
from gradflow.activations import Activation
from gradflow.blocks import (
    AbstractBlock,
    Activate,
    AveragePool,
    BatchNorm,
    Chain,
    Convolution,
    Flatten,
    GlobalMean,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Linear,
    MaxPool,
    RMSNorm,
)
from gradflow.errors import InputError
from gradflow.networks import Network, Stage

__all__ = ["POOLS", "convolutional"]

# What `pool` may be.
POOLS: dict[str, Callable[[tuple[int, ...]], AbstractBlock]] = {
    "mean": GlobalMean,
    "flatten": Flatten,
}
# What `norm` may be; of the positions that there are.
_NORMS: dict[str, Callable[[Any, float | None, int], AbstractBlock]] = {
    "layer": lambda _, epsilon, __: LayerNorm(epsilon=epsilon),
    "rms": lambda _, epsilon, __: RMSNorm(epsilon=epsilon),
    "batch": lambda _, epsilon, __: BatchNorm(epsilon=epsilon),
    "group": lambda shape, epsilon, groups: GroupNorm(epsilon=epsilon, groups=groups, shape=shape),
    "instance": lambda shape, epsilon, _: InstanceNorm(epsilon=epsilon, shape=shape),
}
# How positions become fewer.
_DOWNSAMPLINGS = ("stride", "max", "average")
_PADDINGS = ("circular", "zeros", "valid")


def convolutional(
    shape: Annotated[Sequence[int], Wholes("an input's rows and columns, as [8, 8]", 1)],
    channels: Annotated[Sequence[int], Wholes("the input's channels and every layer's", 2)],
    activation: Phi = "tanh",
    weights: Weights = "glorot",
    *,
    size: int | Sequence[int] = 3,
    strides: Sequence[int] = (),
    downsample: Annotated[str, OneOf("downsample", _DOWNSAMPLINGS), Beside("strides")] = "stride",
    dilation: Annotated[int, Whole()] = 1,
    groups: Annotated[int | str, OneOf("groups", ("depthwise",), Whole())] = 1,
    padding: Annotated[str, OneOf("padding", _PADDINGS)] = "circular",
    delta: bool = False,
    sigma_b: Deviation | None = None,
    bias: Bias | None = None,
    norm: Annotated[str, OneOf("norm", tuple(_NORMS))] | None = None,
    norm_groups: NormGroups = 1,
    epsilon: Epsilon | None = None,
    dense: Sequence[int] = (),
    pool: Annotated[str, OneOf("pool", tuple(POOLS))] = "mean",
    name: str | None = None,
) -> Network:
    """Convolutions, z^1 = W^1 * x + b^1, z^l = W^l * φ(z^{l-1}) + b^l, then dense layers.

    Inputs are those of `as_sites`: every position of every input is a site.

    Parameters
    ----------
    shape
        The lengths of an input's spatial axes: (n,) or (rows, columns).
    channels
        (c_0, c_1, …): the input's, then every convolution's, at least one.
    activation, sigma_b, bias, name
        As for `mlp`.
    weights
        As for `mlp`; a filter of k elements has fan_in k c_{l-1}, c_{l-1} being its own group's
        channels where there are groups, and fan_out k c_l.
    size
        The filter's length along every axis, or along each; see `blocks.Patches` for even ones.
    strides
        The stride of each convolution, along all axes, as [1, 2, 1]; 1 without it.
    downsample
        How a stride of 2 or more is made: stride, of the filter; or max or average, pooling of
        φ(z^{l-1}) before the convolution, of windows as large as the stride.
    dilation
        How far apart a filter's elements are.
    groups
        How many groups of channels each convolution but the first has; or depthwise, a
        filter for each channel, and then a matrix over channels (Chollet 2017, arXiv:1610.02357).
    padding
        What is beyond the edge: circular, the other end; zeros; or valid, filters inside alone.
    delta
        Whether filters are zero but for their centre, which has fan_in c_{l-1} and fan_out c_l;
        with orthogonal weights, delta-orthogonal (Xiao et al. 2018, arXiv:1806.05393, algorithm 1).
    norm
        A normalisation before φ of every convolution but the first: layer or rms, of channels at
        each position; batch; group, of channels and positions; or instance, of positions.
    norm_groups, epsilon
        As for `mlp`.
    dense
        The widths of the dense layers after the convolutions; none without it.
    pool
        The first dense layer's input, of the convolutions' activations: ``"mean"``, that over
        positions, or ``"flatten"``, all of them.

    Returns
    -------
    Network
        With a layer for each convolution and each dense layer.

    Raises
    ------
    InputError
        If a number is not in its range, as for `mlp`, there is no convolution, a filter is longer
        than its axis, strides are not as many, groups do not divide channels, or a name is unknown.
    """
    return _Plan(types.SimpleNamespace(**locals())).network()


class _Plan:
    """The parts of a convolutional network, from the arguments of its builder."""

    def __init__(self, of: Any) -> None:
        needs = "the input's channels and every layer's"
        self.channels = _counts("channels", of.channels, "a number of channels", needs)
        needs = "the widths of the dense layers on top"
        self.dense = _counts("dense", of.dense, "a width in dense", needs)
        if len(self.channels) < 2:
            raise InputError(
                f"channels is {tuple(self.channels)!r}; it has the input's and those of one layer "
                "at least"
            )
        self.strides = _strides(of.strides, len(self.channels) - 1)
        check_count("norm_groups", of.norm_groups)
        names = {"pool": POOLS, "downsample": _DOWNSAMPLINGS, "padding": _PADDINGS}
        if of.norm is not None:
            names["norm"] = _NORMS
        for what, known in names.items():
            value = getattr(of, what)
            if not isinstance(value, str) or value not in known:
                raise unknown_name(what, value, known)
        self.of = of
        self.phi, self.ensemble = activations.get(of.activation), ensembles.get(of.weights)
        self.layer = linear(self.ensemble, of.sigma_b, of.bias)
        of_filter = ("padding", "dilation", "delta")
        self.filter = {name: getattr(of, name) for name in of_filter} | {"size": _tuple(of.size)}

    def network(self) -> Network:
        """The convolutions, equal ones after each other as one stage; then dense layers."""
        shape = _tuple(self.of.shape)
        made: list[tuple[Any, AbstractBlock]] = []
        pairs = itertools.pairwise(self.channels)
        for number, (pair, stride) in enumerate(zip(pairs, self.strides, strict=True)):
            before = shape
            block, shape = self.blocks(shape, *pair, stride, number == 0)
            made.append(((number == 0, pair, number if shape != before else before), block))
        stages = []
        for _, equal in itertools.groupby(made, lambda each: each[0]):
            blocks = [block for _, block in equal]
            stages.append(Stage(blocks[0], len(blocks)))
        if self.dense:
            pooled = (Activate(self.phi), POOLS[self.of.pool](shape))
            stages += _dense_stages(pooled, self.channels[-1], self.dense, self.layer)
        kind = "delta convolutions" if self.of.delta else "convolutions"
        kind = f"{kind}, {self.of.norm}norm" if self.of.norm else kind
        name = self.of.name or f"{self.phi.name}, {self.ensemble.name}, {kind}"
        return Network(tuple(stages), self.channels[0], self.phi, name)

    def blocks(
        self, shape: Any, fan_in: int, fan_out: int, stride: int, first: bool
    ) -> tuple[AbstractBlock, tuple[int, ...]]:
        """A convolution of signals of this shape, with what is before it; the shape after it."""
        phi = activations.linear if first else self.phi
        before: list[AbstractBlock] = []
        if self.of.norm is not None and not first:
            before.append(_NORMS[self.of.norm](shape, self.of.epsilon, self.of.norm_groups))
        if stride > 1 and self.of.downsample != "stride":
            mean = AveragePool(shape, stride)
            if self.of.downsample == "max":
                before.append(MaxPool(shape, stride, activation=phi))
            else:
                before += [mean] if first else [Activate(phi), mean]
            phi, shape, stride = activations.linear, mean.out_shape, 1
        groups = 1 if first else self.of.groups
        if groups == "depthwise":
            own = self._convolution(phi, shape, (fan_in, fan_in), stride, groups)
            parts = [*before, own, self.layer(fan_in, fan_out)]
        else:
            own = self._convolution(phi, shape, (fan_in, fan_out), stride, groups)
            parts = [*before, own]
        return chain(parts), own.patches.out_shape

    def _convolution(
        self, phi: Activation, shape: Any, channels: tuple[int, int], stride: int, groups: int | str
    ) -> Convolution:
        plain = Convolution(phi, shape, stride=stride, **self.filter)
        each = 1 if plain.delta else plain.patches.elements
        of_group = channels[0] if isinstance(groups, str) else groups
        fan_in = max(each * channels[0] // of_group, 1)
        own = fields(self.layer(fan_in, each * channels[1])) | {"units": channels[1]}
        return Convolution(phi, shape, stride=stride, groups=groups, **self.filter, **own)


def _strides(strides: Sequence[int], convolutions: int) -> list[int]:
    """The stride of each convolution."""
    found = _counts("strides", strides, "a stride", "the stride of each convolution, as [1, 2]")
    if found and len(found) != convolutions:
        raise InputError(
            f"strides is {tuple(found)!r}; it has one for each of {convolutions} convolutions"
        )
    return found or [1] * convolutions


def _dense_stages(
    before: tuple[Activate, AbstractBlock],
    width: int,
    dense: Sequence[int],
    layer: Callable[[int, int], Linear],
) -> list[Stage]:
    """Dense layers of these widths on a signal of a width, after an activation and a pooling."""
    fan_in = Chain(before).width_after(width)
    stages = [Stage(Chain((*before, layer(fan_in, dense[0]))))]
    for pair, equal in itertools.groupby(itertools.pairwise(dense)):
        stages.append(Stage(as_dense(before[:1], layer(*pair)), len(list(equal))))
    return stages


def _counts(name: str, values: Sequence[int], each: str, needs: str) -> list[int]:
    """Check a sequence of whole numbers of at least 1."""
    return [check_count(each, value) for value in check_sequence(name, values, needs)]


def _tuple(lengths: Any) -> Any:
    # The block that gets it refuses what is no sequence.
    return tuple(lengths) if isinstance(lengths, Sequence) else lengths
