"""Gradients and signals of a model at other scales of its weights, by theory or measured."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from gradflow import _compilation
from gradflow.inspection._measuring.drawing import drawing
from gradflow.inspection._measuring.measure import measure
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import Program
from gradflow.inspection._theory.values import Law
from gradflow.inspection._theory.walk import Predicted, predict

__all__ = ["Patient", "Profile", "Scales", "Trial", "times"]

# Networks that a change of scales is tried on.
_NETWORKS = 3
# Variances that differ by fewer standard errors, or by less than this share, are of one law.
_SIGMAS, _SHARE = 5.0, 0.02


@dataclasses.dataclass(frozen=True)
class Trial:
    """What weights of some scale do, measured on the model.

    Attributes
    ----------
    name
        Of the scale.
    gradient
        Natural logarithm of the gradient's norm at the first layer over that at the last, of the
        layers alike that are most.
    spread
        Natural logarithm of the largest over the smallest norm of the gradients of layers alike.
    signal
        Natural logarithm of the root mean square of the last one's pre-activations over that of
        the first one's.
    saturated
        The largest share of saturated units of a layer; NaN where no activation saturates.
    """

    name: str
    gradient: float
    spread: float
    signal: float
    saturated: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Logarithms of the norm of the gradient and of the rms of z at each layer; saturated share.

    The gradient at a layer that a norm follows is in units of 1 / rms z: its size alone says how
    small z is, and no scale of the weights changes anything else.
    ``alike`` are the places of layers of one kind, the largest kind first: gradients are compared
    between such, as those in a residual branch and those behind it are of different size.
    """

    gradients: np.ndarray
    signals: np.ndarray
    saturated: np.ndarray
    alike: tuple[tuple[int, ...], ...]

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.gradients).all() and np.isfinite(self.signals).all())

    @property
    def end_to_end(self) -> float:
        """From the last layer of the largest kind to the first."""
        return float(self.gradients[self.alike[0][0]] - self.gradients[self.alike[0][-1]])

    @property
    def furthest(self) -> tuple[int, float]:
        """The layer whose gradient differs most from the last of its kind, and the logarithm."""
        logs = [
            (place, float(self.gradients[place] - self.gradients[places[-1]]))
            for places in self.alike
            for place in places
        ]
        return max(logs, key=lambda pair: abs(pair[1]))

    @property
    def worst(self) -> float:
        """The largest such logarithm; inf where a gradient is 0 or not known."""
        return abs(self.furthest[1]) if np.isfinite(self.gradients).all() else math.inf

    def trial(self, name: str) -> Trial:
        spread = (
            max(float(np.ptp(self.gradients[list(places)])) for places in self.alike)
            if np.isfinite(self.gradients).all()
            else math.inf
        )
        saturated = self.saturated[np.isfinite(self.saturated)]
        return Trial(
            name,
            self.end_to_end,
            spread,
            float(self.signals[self.alike[0][-1]] - self.signals[self.alike[0][0]]),
            float(saturated.max()) if saturated.size else math.nan,
        )


# Logarithms of factors, by the number of the leaf of the parameters.
Scales = dict[int, float]


@dataclasses.dataclass
class Patient:
    """A model, what is known of it, and its profile at other scales of its weights."""

    model: Model
    program: Program
    layers: Sequence[Layer]
    inputs: tuple[Any, ...]
    key: PRNGKeyArray
    laws: Mapping[int, Law]
    predicted: Predicted
    targets: tuple[Any, ...] = ()
    given: tuple[PyTree, PyTree] | None = None

    @functools.cached_property
    def draws(self) -> list[tuple[PyTree, PyTree]]:
        """Parameters and state of a few networks; those at hand alone where there are any."""
        given = self.given or (self.model.given if self.model.init is None else None)
        if given is not None:
            return [given]
        with _compilation.caching():
            drawn = drawing(self.model, _NETWORKS)(jax.random.split(self.key, _NETWORKS))
        leaves, tree = jax.tree.flatten(drawn)
        keys = jax.dtypes.prng_key  # which NumPy does not know
        leaves = [x if jnp.issubdtype(x.dtype, keys) else np.asarray(x) for x in leaves]
        return [jax.tree.unflatten(tree, [x[i] for x in leaves]) for i in range(_NETWORKS)]

    @property
    def leaves(self) -> list[int]:
        """The random leaves that layers multiply by, each once."""
        numbers = dict.fromkeys(layer.parameter for layer in self.layers)
        return [i for i in numbers if i in self.laws and self.laws[i].values is None]

    def layer_of(self, leaf: int) -> Layer:
        return next(layer for layer in self.layers if layer.parameter == leaf)

    def gain(self, leaf: int) -> float:
        """σ_w² = fan_in · variance of a leaf, the variance as the mean over its group."""
        group = next(group for group in self.groups if leaf in group)
        variance = float(np.mean([self.laws[i].variance for i in group]))
        return self.layer_of(leaf).fan_in * variance

    def measured(self, change: Scales | Callable[[PyTree, PyTree], PyTree]) -> Profile:
        """The profile of the model with its weights scaled, or changed by a function of them."""
        if not callable(change):
            key = frozenset((i, round(log, 6)) for i, log in change.items())
            if key not in self._known:
                self._known[key] = self.measured(functools.partial(self._scaled, change))
            return self._known[key]
        changed = [(change(parameters, state), state) for parameters, state in self.draws]
        found = measure(
            self.model, self.program, self.layers, self.inputs, self.key,
            targets=self.targets, parameters=changed,
        )  # fmt: skip
        return self.of_values(found.values)

    @functools.cached_property
    def _known(self) -> dict[frozenset[tuple[int, float]], Profile]:
        """What was measured of scales: in square layers those of LeCun are those of Glorot."""
        return {}

    def _scaled(self, scales: Scales, parameters: PyTree, state: PyTree) -> PyTree:
        del state
        return self.scaled(parameters, scales)

    def theory(self, scales: Scales) -> Profile:
        """The profile at infinite width; not `known` where theory ends."""
        changed = dict(self.laws)
        for leaf, log in scales.items():
            law, factor = changed[leaf], math.exp(log)
            changed[leaf] = dataclasses.replace(
                law,
                mean=law.mean * factor,
                variance=law.variance * factor**2,
                standard_error=law.standard_error * factor**2,
            )
        predicted = predict(
            self.program, self.layers, changed, jax.tree.leaves(self.inputs),
            state=jax.tree.leaves(self.draws[0][1]), targets=jax.tree.leaves(self.targets),
        )  # fmt: skip
        return self.of_values(predicted.values)

    def of_values(self, values: Mapping[str, np.ndarray]) -> Profile:
        """The profile of statistics that were measured, or predicted."""

        def mean(key: str) -> np.ndarray:
            rows = np.atleast_2d(np.asarray(values[key], np.float64))
            known = ~np.isnan(rows)
            total = np.where(known, rows, 0).sum(axis=0)
            return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)

        # Of all sites together: a layer of fewer sites has no less gradient for it.
        gradients, signals = mean("log_gradient_norm") + np.log(self._sites) / 2, mean("log_q") / 2
        # A norm divides by z's own size, and so multiplies the gradient by its inverse.
        gradients = gradients + np.where(self.normalised, signals, 0.0)
        return Profile(gradients, signals, mean("saturation"), self._alike_places)

    @functools.cached_property
    def normalised(self) -> np.ndarray:
        """Whether the layer's signal is divided by its own size before the layer above."""
        return np.array(
            [
                layer.above is not None and self._divides(layer, self.layers[layer.above])
                for layer in self.layers
            ]
        )

    def _divides(self, layer: Layer, above: Layer) -> bool:
        """Whether a root of sums over the layer's signal is taken on the way to that above."""
        made, sums = {layer.preactivation}, set[int]()
        for equation in self.program.equations[layer.equation + 1 : above.equation]:
            summed = not sums.isdisjoint(equation.inputs)
            if summed and equation.primitive in ("rsqrt", "sqrt"):
                return True
            if not made.isdisjoint(equation.inputs):
                made.update(equation.outputs)
                if summed or equation.primitive.startswith("reduce_sum"):
                    sums.update(equation.outputs)
        return False

    @functools.cached_property
    def _sites(self) -> np.ndarray:
        shapes = [self.program.avals[layer.preactivation].shape for layer in self.layers]
        return np.array(
            [
                math.prod(n for i, n in enumerate(shape) if i not in layer.units)
                for shape, layer in zip(shapes, self.layers, strict=True)
            ],
            np.float64,
        )

    @functools.cached_property
    def _alike_places(self) -> tuple[tuple[int, ...], ...]:
        """Layers by the kind of their weights; without it where no two are of one kind.

        Those that a norm follows are apart.
        """
        kinds: dict[tuple[str, bool], list[int]] = {}
        for place, layer in enumerate(self.layers):
            normalised = bool(self.normalised[place])
            kinds.setdefault((self._kind(layer.parameter), normalised), []).append(place)
        several = [tuple(places) for places in kinds.values() if len(places) > 1]
        if not several:
            parts = np.flatnonzero(~self.normalised), np.flatnonzero(self.normalised)
            several = [tuple(part.tolist()) for part in parts if part.size]
        return tuple(sorted(several, key=len, reverse=True))

    def _kind(self, leaf: int) -> str:
        """The path of a leaf without its numbers; of several the last one stays, as in a block.

        ``dense`` and ``dense_1`` are of one kind: the first of several often has no number.
        """
        name = self.program.names.get(leaf, "")
        numbers = re.findall(r"\d+", name)
        return re.sub(r"_?\d+", "", name, count=max(1, len(numbers) - 1))

    @functools.cached_property
    def profile(self) -> Callable[[Scales], Profile]:
        """The profile at any scales: by theory where it reaches, else measured."""
        theory = self.of_values(self.predicted.values)
        return self.theory if theory.known else self.measured

    def scaled(self, parameters: PyTree, scales: Scales) -> PyTree:
        leaves, tree = jax.tree.flatten(parameters)
        numbers = self.program.arguments["parameters"]
        return jax.tree.unflatten(
            tree,
            [
                times(leaf, math.exp(scales[i])) if i in scales else leaf
                for i, leaf in zip(numbers, leaves, strict=True)
            ],
        )

    @functools.cached_property
    def groups(self) -> list[tuple[int, ...]]:
        """Leaves of one kind of module, one shape and one law; the largest groups first."""
        found: list[list[int]] = []
        for leaf in self.leaves:
            for group in found:
                if self._alike(leaf, group[0]):
                    group.append(leaf)
                    break
            else:
                found.append([leaf])
        return [tuple(group) for group in sorted(found, key=len, reverse=True)]

    def _alike(self, one: int, other: int) -> bool:
        shapes = [self.program.avals[i].shape for i in (one, other)]
        laws = [self.laws[i] for i in (one, other)]
        error = _SIGMAS * math.hypot(*(law.standard_error for law in laws))
        apart = abs(laws[0].variance - laws[1].variance)
        return (
            self._kind(one) == self._kind(other)
            and shapes[0] == shapes[1]
            and apart <= max(error, _SHARE * laws[0].variance)
        )


def times(leaf: Any, factor: float) -> Any:
    """A leaf times a factor, in its own dtype."""
    return leaf * np.asarray(factor, leaf.dtype)
