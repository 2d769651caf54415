"""Where layers stand in a program: their sizes, how deep they are, and which all signals pass."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.program import Program

__all__ = ["Places"]


@dataclasses.dataclass(frozen=True)
class Places:
    """The layers' names, sizes and places; every array has the shape (layers,).

    Attributes
    ----------
    names, kinds, parameters
        Of each layer its name, its kind and the path of its weights' leaf.
    shapes
        Of each pre-activation.
    width, sites
        How many units a pre-activation has, and how many sites: its other elements over units.
    fan_in
        How many terms each unit sums.
    depth
        How many layers the longest way from an input to it passes, with itself.
    on_trunk
        Whether every way from the inputs to the outputs passes it; others are in a branch.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    width: np.ndarray
    sites: np.ndarray
    fan_in: np.ndarray
    depth: np.ndarray
    on_trunk: np.ndarray

    @classmethod
    def of(cls, program: Program, layers: Sequence[Layer]) -> "Places":
        """The places of a program's layers."""
        shapes = tuple(tuple(program.avals[layer.preactivation].shape) for layer in layers)
        width = [math.prod(s[i] for i in one.units) for s, one in zip(shapes, layers, strict=True)]
        sites = [math.prod(s) // max(n, 1) for s, n in zip(shapes, width, strict=True)]
        depth, trunk = _ways(program, layers)
        return cls(
            names=tuple(layer.name for layer in layers),
            kinds=tuple(layer.kind for layer in layers),
            parameters=tuple(program.names.get(layer.parameter, "") for layer in layers),
            shapes=shapes,
            width=np.array(width, int),
            sites=np.array(sites, int),
            fan_in=np.array([layer.fan_in for layer in layers], int),
            depth=depth,
            on_trunk=trunk,
        )

    def __len__(self) -> int:
        return len(self.names)

    def comparable(self, among: np.ndarray | None = None) -> np.ndarray:
        """The numbers of the layers whose gradients are told apart by depth alone.

        They are of one kind, size and place: the most that there are, if they are many enough; else
        all layers but the last, whose cotangent is given. ``among`` are those to choose from.
        """
        kinds = list(
            zip(self.kinds, self.width, self.sites, self.fan_in, self.on_trunk, strict=True)
        )
        all_ = range(len(self)) if among is None else [int(i) for i in among]
        most = max((kinds[i] for i in all_), key=[kinds[i] for i in all_].count)
        alike = np.array([i for i in all_ if kinds[i] == most], int)
        if len(alike) >= max(3, len(all_) / 4) and np.ptp(self.depth[alike]):
            return alike
        return np.array(all_[: len(all_) - (len(all_) > 2)], int)

    def expansion(self) -> np.ndarray:
        """Σ 1/width over the layers on the longest way to each layer, itself among them.

        It is of what comes from below; gradients have passed every layer: its largest value.
        """
        least = np.full(int(self.depth.max(initial=0)) + 1, np.inf)
        np.minimum.at(least, self.depth, self.width)
        terms = np.where(np.isfinite(least), 1 / least, 0.0)
        return np.cumsum(terms)[self.depth]


def _ways(program: Program, layers: Sequence[Layer]) -> tuple[np.ndarray, np.ndarray]:
    """Of each layer its depth, and whether all ways from inputs to outputs pass it."""
    of_product = {layer.product: i for i, layer in enumerate(layers)}
    sources = program.arguments.get("inputs", ())
    depth: dict[int, int] = dict.fromkeys(sources, 0)
    passed: dict[int, int] = dict.fromkeys(sources, 0)  # sets of layers, as bits
    found = np.zeros(len(layers), int)
    for equation in program.equations:
        known = [i for i in equation.inputs if i in depth]
        if not known:
            continue
        deep, common = max(depth[i] for i in known), passed[known[0]]
        for i in known[1:]:
            common &= passed[i]
        for out in equation.outputs:
            layer = of_product.get(out)
            depth[out] = deep + (layer is not None)
            passed[out] = common if layer is None else common | 1 << layer
            if layer is not None:
                found[layer] = depth[out]
    ends = [passed[i] for i in program.outputs if i in passed]
    through = ends[0] if ends else 0
    for end in ends[1:]:
        through &= end
    return found, np.array([bool(through >> i & 1) for i in range(len(layers))], bool)
