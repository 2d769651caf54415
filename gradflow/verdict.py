"""Verdict: what happens to the gradient of a network on its way down, in a word and a sentence.

It is about what *arrives*: the norm ‖∂C/∂z^l‖ of the gradient at a layer, over all its units and
positions, and ‖∂C/∂W^l‖ relative to ‖W^l‖. A layer that is narrower than the one below has as much
more in each unit, so that mean squares over units (``gradient_variance``, χ) jump with the width
though no more or less arrives; those are in the tables, and no verdict is about them. At equal
widths the two are the same.

The word is about the layers that are alike, the *hidden* ones: an output layer of another law (of
another shape with Glorot's rule, say) is said separately, and so is layer 1, whose weights act on
the inputs, as an embedding's do.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from gradflow import statistics
from gradflow.blocks import AbstractBlock
from gradflow.networks import Network, Stage
from gradflow.predictions import Prediction
from gradflow.simulation.monte_carlo import Simulation
from gradflow.theory import _programs

__all__ = ["Verdict", "judge", "word"]

# χ may tend to 1 only as 1 - a/l, so that it is evaluated far above the top, l layers up
# (`layers_ahead`). The network is critical if |log χ| l is below this there: it is a where
# χ tends to 1 (1 or 2 for smooth activations), and grows with l where χ has any other limit.
_CRITICAL = 4.0
# Where layers are of different laws, there is no further up; then it is critical if the gradient's
# norm changes by less than this factor from end to end. A measured change must differ from theory's
# by as much, and be significant, to be judged in its place.
_ALIKE = 2.0
# What would change them by less in so many layers is none in a network of fewer.
_FEW_LAYERS = 50
_SIGNIFICANT = 4.0
# Factors of an output layer, of layer 1 or of weights that differ by less are not spoken of.
_NOTABLE = math.log(1.1)
# Units beyond this share saturated, of an activation that saturates on both sides: 'saturated'.
_SATURATED = 0.5
# A share of networks without any gradient from which on that is the verdict.
_DEAD = 0.1


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What happens to the gradient, in a word, numbers and a sentence.

    Attributes
    ----------
    kind
        ``vanishing``, ``exploding`` or ``critical``: by whether the norm ‖∂C/∂z‖, deep down layers
        that are alike, shrinks, grows, or keeps its order; by how it changes over these layers
        where they are not alike, or where it goes the other way in them. As measured where the
        width makes another of it than theory says, or theory has no answer. ``dead`` where a tenth
        of the networks, or more, have no gradient at layer 1; ``undefined`` where there is one
        layer, or nothing is known.
    factor, factor_theory
        By how much ‖∂C/∂z‖ changes going down one layer: geometric mean over the hidden layers, of
        the typical network that has a gradient and at infinite width; NaN with one layer.
    output_factor, output_factor_theory
        By how much it changes going down through the output layer, if that layer differs from those
        below in its block or its scales; else NaN.
    weight_factor, weight_factor_theory
        By how much ‖∂C/∂W‖/‖W‖ changes going down one layer: from the top hidden layer to layer 2;
        NaN where there are no two such layers, or layers share their weights.
    input_factor, input_factor_theory
        By how much it changes from layer 2 to layer 1, whose weights act on the inputs.
    dead
        The share of networks without a gradient at layer 1, for one of the inputs at least.
    saturated_from
        The first layer with more than half of its units saturated, or None.
    sentence
        All of it in words.
    """

    kind: str
    factor: float
    factor_theory: float
    output_factor: float
    output_factor_theory: float
    weight_factor: float
    weight_factor_theory: float
    input_factor: float
    input_factor_theory: float
    dead: float
    saturated_from: int | None
    sentence: str

    def __repr__(self) -> str:
        """The sentence."""
        return self.sentence


def _hidden_layers(network: Network) -> int:
    """The number of layers that the verdict is about: all, or all but an output layer that differs.

    The output layer differs where its block is of another kind, or has other scales, than that of
    the layer below; another width alone is no difference.
    """
    below, top = network.stages[-2:] if len(network.stages) > 1 else [network.stages[-1]] * 2
    apart = network.depth > 2 and top.repeats == 1 and not _alike_stages(below, top)
    # The layer below must be no first one, which has no activation before it.
    return network.depth - (apart and len(network.stages) > 2)


def _alike_stages(one: Stage, other: Stage) -> bool:
    """Whether two stages' blocks are of one kind and have the same scales, whatever their widths.

    Then they do the same to signals and gradients at infinite width.
    """
    scales = [[np.asarray(x) for x in jax.tree.leaves(stage.block)] for stage in (one, other)]
    kinds = [[*map(type, stage.block.nested)] for stage in (one, other)]
    alike = kinds[0] == kinds[1] and len(scales[0]) == len(scales[1])
    return alike and all(np.allclose(a, b, 1e-12, 0) for a, b in zip(*scales, strict=True))


def _log_gradient_norms(
    network: Network, values: dict[str, Array | np.ndarray], sites: int
) -> np.ndarray:
    """Log ‖∂C/∂z^l‖ of an input, (layers,), over all its positions.

    A layer that merges positions changes their number; ``sites`` is that of the network's input.
    """
    positions = np.log(np.array(network.sites(sites), float)) / 2
    return np.asarray(values["log_gradient_norm"], np.float64) + positions - positions[-1]


def _log_relative_weight_gradients(
    network: Network, log_variance: np.ndarray, sites: int
) -> np.ndarray:
    """Log (‖∂C/∂W^l‖ / ‖W^l‖), all matrices of a layer together.

    Parameters
    ----------
    network
        It gives ‖W‖ at the start.
    log_variance
        Shape (layers,), ``log_weight_gradient_variance``.
    sites
        How many inputs there are.

    Returns
    -------
    np.ndarray
        Shape (layers,); NaN where a layer has no weights, where layers share them, or where their
        scale is not the law's (LSUV).
    """
    log_sizes: list[float] = []
    counts = [sites, *network.sites(sites)]
    first = 0
    for stage, width in zip(network.stages, network.stage_widths, strict=False):
        shapes = stage.block.shapes(width)
        size = math.nan
        rescaled = any(block.rescales_weights for block in stage.block.nested)
        if shapes and not stage.tied and not rescaled:
            squares = [float(s) ** 2 for s in _scales(stage.block, width, counts[first])]
            size = sum(n * s for (n, _), s in zip(shapes, squares, strict=True))
        weights = sum(n * m for n, m in shapes)
        log_sizes += stage.repeats * [math.log(weights) - math.log(size) if size > 0 else math.nan]
        first += stage.repeats
    return (np.asarray(log_variance, np.float64) + np.array(log_sizes)) / 2


def _scales(block: AbstractBlock, width: int, sites: int) -> list[float]:
    """√(n_in E[W²]) of each random matrix of a block, in the order of its products."""
    squares: list[Any] = []

    def multiply(
        _: PRNGKeyArray, x: Array, *, sigma_w: Any, width: int, mu_w: Any = 0.0, **__: Any
    ) -> Array:
        squares.append(sigma_w**2 + mu_w**2 / x.shape[1])  # nothing is drawn
        return jnp.zeros((x.shape[0], width), x.dtype)

    jax.eval_shape(
        lambda key, x: block.apply(x, multiply, key),
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct((sites, width), jnp.float32),
    )
    return [math.nan if isinstance(s, jax.core.Tracer) else float(s) ** 0.5 for s in squares]


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Changes of logarithms going down: measured, by theory; and the measured one's error."""

    measured: float
    theory: float
    error: float = math.nan

    @classmethod
    def between(cls, low: int, high: int, *logs: np.ndarray) -> "_Changes":
        """The changes from layer number ``high`` down to ``low``, numbered from 0."""
        with np.errstate(invalid="ignore"):  # of weights without gradients, both are -inf
            return cls(*(float(values[low] - values[high]) for values in logs))

    def a_layer(self, steps: int) -> tuple[float, float]:
        """The factors by which norms change in each of so many steps: measured, and by theory."""
        return _exp(self.measured / max(steps, 1)), _exp(self.theory / max(steps, 1))


_NO_CHANGE = _Changes(math.nan, math.nan)


def judge(theory: Prediction, simulation: Simulation, asymptotic_log_chi: float | None) -> Verdict:
    """The verdict on a network, from theory and simulation.

    Parameters
    ----------
    theory, simulation
        Of one network; both have ``log_gradient_norm``.
    asymptotic_log_chi
        log χ far above the top, without a change of width, or None: the top hidden layers' then.
    """
    network, sites = simulation.network, simulation.sites
    top = _hidden_layers(network)
    norm = simulation.estimates["log_gradient_norm"]
    predicted = _log_gradient_norms(network, theory.values, sites)
    measured = _log_gradient_norms(network, {"log_gradient_norm": norm.value}, sites)
    change = _Changes.between(0, top - 1, measured, predicted)
    change = dataclasses.replace(change, error=float(norm.standard_error[0]))
    output = _NO_CHANGE
    if top < network.depth:
        output = _Changes.between(top - 1, top, measured, predicted)
    weights, of_inputs = _of_weights(theory, simulation, top)

    dead = _dead(simulation)
    kind, notes = _kind(network, change, asymptotic_log_chi, predicted[:top])
    parts = [_hidden_sentence(kind, change, top, network.depth, output), *notes]
    if not math.isnan(output.measured) and abs(output.measured) > _NOTABLE:
        here, there = output.a_layer(1)
        parts.append(f"the output layer alone ×{here:.3g} (theory ×{there:.3g})")
    parts += _weights_sentences(weights, of_inputs, top)
    saturated_from = _saturated_from(simulation)
    if saturated_from is not None:
        share = simulation.estimates["saturation"].value[saturated_from - 1]
        parts.append(f"saturated from layer {saturated_from} ({100 * share:.0f} % of units)")
    if dead >= _DEAD:
        parts.insert(0, f"dead: {_dead_sentence(simulation, dead)}")
        parts[1] = f"in those that have one {parts[1].removeprefix(kind).lstrip(' :')}"
        kind = "dead"
    elif dead:
        parts.append(_dead_sentence(simulation, dead))
    blocked = _blocked(network, predicted)
    if blocked:
        kind, parts = "dead", [f"dead: {blocked}"]
    for what, networks in (("overflow", simulation.overflowed), ("are 0 in", simulation.vanished)):
        if networks.any() and not blocked:
            parts.append(
                f"signals {what} {simulation.dtype} from layer "
                f"{int(np.argmax(networks > 0)) + 1} on, in {int(networks.max())} of "
                f"{simulation.networks} networks"
            )
    factor, factor_theory = change.a_layer(top - 1) if network.depth > 1 else (math.nan, math.nan)
    output_factor, output_factor_theory = output.a_layer(1)
    weight_factor, weight_factor_theory = weights.a_layer(top - 2)
    input_factor, input_factor_theory = of_inputs.a_layer(1)
    return Verdict(
        kind=kind,
        factor=factor,
        factor_theory=factor_theory,
        output_factor=output_factor,
        output_factor_theory=output_factor_theory,
        weight_factor=weight_factor,
        weight_factor_theory=weight_factor_theory,
        input_factor=input_factor,
        input_factor_theory=input_factor_theory,
        dead=dead,
        saturated_from=saturated_from,
        sentence="; ".join(parts),
    )


def _blocked(network: Network, predicted: np.ndarray) -> str:
    """Words for a layer that passes no gradient on in any network, if there is one; else ""."""
    through = np.isneginf(predicted[:-1]) & np.isfinite(predicted[1:])
    if not through.any():
        return ""
    layer = int(np.argmax(through)) + 2
    ends = np.cumsum([stage.repeats for stage in network.stages])
    block = network.stages[int(np.searchsorted(ends, layer))].block
    zero = any(
        getattr(b, "sigma_w", 1.0) == 0 and getattr(b, "mu_w", None) is None for b in block.nested
    )
    why = f"the weights of layer {layer} are 0" if zero else f"layer {layer} passes none on"
    return f"{why}: no gradient below it at step 0"


def _kind(
    network: Network, change: _Changes, asymptotic_log_chi: float | None, predicted: np.ndarray
) -> tuple[str, list[str]]:
    """The word for the hidden layers, and notes on it for the sentence."""
    if network.depth == 1:
        return "undefined", []
    if math.isnan(change.theory):
        if math.isnan(change.measured):
            return "undefined", []
        return word(change.measured), []
    log_chi, depth = asymptotic_log_chi, network.depth
    layers_up = depth + _programs.layers_ahead(depth)
    if log_chi is None and len(predicted) > 1:
        log_chi, layers_up = 2 * float(predicted[-2] - predicted[-1]), depth
    kind, notes = word(change.theory), []
    if log_chi is not None and math.isfinite(log_chi) and _alike(network):
        steps = max(len(predicted) - 1, _FEW_LAYERS)
        if abs(log_chi) * layers_up < _CRITICAL:
            kind = "critical"
        elif log_chi * change.theory < 0:  # what arrives counts, and the other is said
            notes.append(f"×{_exp(log_chi / 2):.3g} a layer further up")
        elif kind != "critical" or abs(log_chi) / 2 * steps > math.log(_ALIKE):
            kind = _direction(log_chi)
    beside = change.measured - change.theory
    margin = math.log(_ALIKE) + _SIGNIFICANT * change.error
    if abs(beside) > margin and word(change.measured) != kind:
        notes.insert(0, f"{kind} at infinite width")
        kind = word(change.measured)
    return kind, notes


def _alike(network: Network) -> bool:
    """Whether most hidden layers that the gradient passes are of one law."""
    count = _hidden_layers(network)
    stages = network.stages[1:] or network.stages
    if count < network.depth:
        stages = stages[:-1]
    longest = max(stages, key=lambda stage: stage.repeats)
    alike = sum(stage.repeats for stage in stages if _alike_stages(stage, longest))
    return alike >= count / 2 or longest.repeats >= max(2, count / 2)


def _direction(log: float) -> str:
    return "exploding" if log > 0 else "vanishing"


def word(change: float) -> str:
    """``critical``, ``exploding`` or ``vanishing``, by a change of log ‖∂C/∂z‖ going down alone."""
    return "critical" if abs(change) < math.log(_ALIKE) else _direction(change)


def _hidden_sentence(kind: str, change: _Changes, top: int, depth: int, output: _Changes) -> str:
    if depth == 1:
        return f"{kind}: one layer has no gradient factor"
    here, there = change.a_layer(top - 1)
    of_theory = "theory has no answer" if math.isnan(change.theory) else f"theory ×{there:.3g}"
    if math.isnan(change.measured):
        known = "" if math.isnan(change.theory) else " a layer"
        return f"{kind}: no network's gradient reached layer 1 ({of_theory}{known})"
    over = f", ×{_exp(change.measured):.2g} over {top} layers" if top > 2 else ""
    which = "" if math.isnan(output.theory) else ", below the output layer"
    return f"{kind} ×{here:.3g} a layer ({of_theory}){over} in the norm of ∂C/∂z{which}"


def _of_weights(theory: Prediction, simulation: Simulation, top: int) -> tuple[_Changes, _Changes]:
    """Changes of ‖∂C/∂W‖/‖W‖ from the top hidden layer to layer 2, and from layer 2 to layer 1."""
    key, network = statistics.weight_gradient_variance.key, simulation.network
    if key not in simulation.estimates or key not in theory.values or network.depth < 2:
        return _NO_CHANGE, _NO_CHANGE
    measured, predicted = (
        _log_relative_weight_gradients(network, np.asarray(log), simulation.sites)
        for log in (simulation.estimates[key].log_value, theory.values[key])
    )
    hidden = _Changes.between(1, top - 1, measured, predicted) if top > 2 else _NO_CHANGE
    return hidden, _Changes.between(0, 1, measured, predicted)


def _weights_sentences(weights: _Changes, of_inputs: _Changes, top: int) -> list[str]:
    said = []
    if math.isfinite(weights.measured):
        here, there = weights.a_layer(top - 2)
        known = f" (theory ×{there:.3g})" if math.isfinite(weights.theory) else ""
        said.append(f"of ∂C/∂W relative to W ×{here:.3g} a layer{known}")
    if math.isfinite(of_inputs.measured) and abs(of_inputs.measured) > _NOTABLE:
        said.append(f"layer 1, on the inputs, ×{_exp(of_inputs.measured):.3g} of layer 2's")
    return [", ".join(said)] if said else []


def _dead(simulation: Simulation) -> float:
    """The share of networks whose gradient at layer 1 is 0 for one input at least.

    The mean of log ‖∂C/∂z‖ is without them; that of ‖∂C/∂z‖² is with them, and without those that
    are not finite.
    """
    norm = simulation.estimates["log_gradient_norm"]
    variance = simulation.estimates.get("log_gradient_variance")
    finite = (
        simulation.networks - int(simulation.overflowed.max())
        if variance is None
        else int(variance.count[0])
    )
    return max(0, finite - int(norm.count[0])) / simulation.networks


def _dead_sentence(simulation: Simulation, dead: float) -> str:
    some = " for one input or more" if simulation.sites > 1 else ""
    count = round(dead * simulation.networks)
    share = f" ({100 * dead:.0f} %)" if dead >= _DEAD else ""
    return f"{count} of {simulation.networks} networks{share} have no gradient at layer 1{some}"


def _saturated_from(simulation: Simulation) -> int | None:
    # A rectifier is flat on one side by design; saturation is to be flat on both.
    phi = simulation.network.activation
    if "saturation" not in simulation.estimates:
        return None
    flat = phi.saturated_intervals(simulation.network.saturation_threshold)
    two_sided = np.isneginf(flat).any() and np.isposinf(flat).any()
    above = simulation.estimates["saturation"].value > _SATURATED
    return int(np.argmax(above)) + 1 if two_sided and above.any() else None


def _exp(log: float) -> float:
    """exp, and inf beyond float64's range."""
    return math.inf if log > 709 else math.exp(log)
