"""Why gradients vanish or explode, and by what to multiply which weights: tried before it is said.

A *profile* is what a change of scales does: the size of gradients and signals at every layer, by
theory where it reaches every layer, else measured in a few networks. Candidates for the cure are
the critical point of each layer's activation, χ = 1 layer by layer, and one scale for the group of
equal weights that the end-to-end factor depends on most. The first that helps when it is measured
on the model is the cure, and the group of weights that it changes most is the cause.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from gradflow._checks import shown
from gradflow.activations import Activation
from gradflow.errors import InputError
from gradflow.inspection._measuring.measure import Measured
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import Program
from gradflow.inspection._rescaling import Patient, Profile, Scales, Trial, times
from gradflow.inspection._theory.values import Law
from gradflow.inspection._theory.walk import Predicted
from gradflow.simulation.monte_carlo import Progress
from gradflow.theory.criticality import critical_points

__all__ = ["Cure", "find", "mended"]

# Gradients are well if no layer's norm differs from the top's by more than this factor.
_WELL = math.log(10.0)
# A cure leaves at most this share of the logarithm, and of units that are saturated.
_HELPS, _SATURATED = 0.5, 0.3
# Factors nearer to 1 are not given.
_NOTABLE = math.log(1.02)
# Scales that are searched, as logarithms, and how often.
_WIDEST, _STEPS, _SWEEPS = 6.0, 14, 6
# What residual branches may leave where no scale but 0 leaves nothing.
_LEFT = math.log(2.0)
_MOST_GROUPS = 6
# Known initialisations, and candidates for the cure.
_TRIALS = 5 + 3


@dataclasses.dataclass(frozen=True)
class Cure:
    """The cause of what gradients do, and what mends it.

    Attributes
    ----------
    cause
        One sentence; empty where gradients keep their size.
    factors
        By what to multiply which leaf of the parameters, by path; empty where nothing helps or
        nothing is to be mended.
    effect
        One sentence on what the factors do, measured, or why there are none.
    before, after
        The model as it is, and with the factors.
    alternatives
        The same for known initialisations: LSUV, LeCun, He, Glorot, orthogonal.
    """

    cause: str
    factors: dict[str, float]
    effect: str
    before: Trial
    after: Trial | None = None
    alternatives: tuple[Trial, ...] = ()


def find(
    model: Model,
    program: Program,
    layers: Sequence[Layer],
    inputs: tuple[Any, ...],
    key: PRNGKeyArray,
    *,
    laws: Mapping[int, Law],
    predicted: Predicted,
    measured: Measured,
    targets: tuple[Any, ...] = (),
    given: tuple[PyTree, PyTree] | None = None,
    progress: Progress | None = None,
) -> Cure:
    """The cause of what a model's gradients do from end to end, and the cure.

    Parameters
    ----------
    model, program, layers, inputs, key
        As `measure` takes them.
    laws, predicted, measured
        Of the leaves of the parameters, what `predict` made of them, and what `measure` found.
    targets
        Of a loss behind the outputs.
    given
        ``(parameters, state)`` at hand; without it a few networks are drawn.
    progress
        Called with (trials done, trials in all).
    """
    patient = Patient(model, program, layers, inputs, key, laws, predicted, targets, given)
    now = patient.of_values(measured.values)
    before = now.trial("as it is")
    if now.worst <= _WELL:
        return Cure("", {}, "Gradients keep their size; nothing is to be mended.", before)
    said = progress or (lambda _done, _total: None)
    known = []
    said(0, _TRIALS)
    for trial in _alternatives(patient):
        known.append(trial)
        said(len(known), _TRIALS)
    alternatives, best, saturated = tuple(known), None, math.nan
    for done, (name, scales) in enumerate(_candidates(patient), len(known)):
        said(done, _TRIALS)
        if not scales:
            continue
        after = patient.measured(scales)
        trial = after.trial(name)
        well = after.worst < _HELPS * now.worst
        if well and not trial.saturated > max(_SATURATED, before.saturated + 0.1):
            best = scales, trial
            break
        if well:
            saturated = trial.saturated
    said(_TRIALS, _TRIALS)
    if best is None:
        return Cure(
            f"{_what(patient, now)}, and no scale of its weights is the cause.",
            {},
            _no_cure(patient, saturated),
            before,
            alternatives=alternatives,
        )
    scales, trial = best
    factors = {program.names[i]: math.exp(log) for i, log in scales.items()}
    return Cure(
        _cause(patient, now, scales),
        factors,
        f"Measured with these factors, the gradient's norm changes by {_factor(trial.gradient)} "
        f"from the last layer to the first like it, instead of {_factor(before.gradient)}.",
        before,
        trial,
        alternatives,
    )


def mended(parameters: PyTree, result: Any) -> PyTree:
    """Parameters with the factors that mend their gradients; nothing is changed in place.

    Parameters
    ----------
    parameters
        A pytree as the inspected model has it, or the model where it is one.
    result
        The `Inspection` of the model.

    Returns
    -------
    PyTree
        The same tree, with new arrays in place of those that have a factor.

    Raises
    ------
    InputError
        If a leaf that has a factor is missing, or is no array of floats.
    """
    factors = getattr(result, "factors", None)
    if not isinstance(factors, Mapping):
        raise InputError(f"result is {shown(result)}; it is what gradflow.inspect made")
    found = jax.tree_util.tree_flatten_with_path(parameters)[0]
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in found}
    for name in factors:
        if not jnp.issubdtype(getattr(leaves.get(name), "dtype", None) or bool, jnp.floating):
            raise InputError(
                f"parameters has no array of floats at {name}; it has the tree of those that were "
                "inspected"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            times(leaf, factors[name]) if (name := jax.tree_util.keystr(path)) in factors else leaf
        ),
        parameters,
    )


# Candidates --------------------------------------------------------------------------------------


def _candidates(patient: Patient) -> Iterator[tuple[str, Scales]]:
    """Scales that may mend the model, as logarithms of factors, by name; computed when asked."""
    for name, make in (("critical point", _critical), ("χ = 1", _balanced), ("group", _of_group)):
        scales = {i: log for i, log in make(patient).items() if abs(log) > _NOTABLE}
        yield name, _needed(patient, scales)


def _critical(patient: Patient) -> Scales:
    """Every weight at the critical point of the activation below it, its biases being 0."""
    below = {layer.above: place for place, layer in enumerate(patient.layers)}
    scales: Scales = {}
    for place, layer in enumerate(patient.layers):
        if layer.parameter not in patient.leaves:
            return {}
        sigma_w2 = 1.0
        if place in below:
            phi = patient.predicted.activations[below[place]]
            if phi is None:
                return {}
            sigma_w2 = _critical_scale(phi)
        elif place > 0:
            return {}  # what it multiplies is no chain's end
        now = patient.gain(layer.parameter)
        if math.isnan(sigma_w2) or not now > 0:
            return {}
        scales[layer.parameter] = math.log(sigma_w2 / now) / 2
    return scales


@functools.lru_cache(maxsize=64)
def _critical_scale(phi: Activation) -> float:
    """σ_w² at which χ = 1 with biases of 0; NaN where there is none."""
    if phi.name == "linear":
        return 1.0
    return float(critical_points(phi, sigma_b2=0.0).sigma_w2[0])


def _balanced(patient: Patient) -> Scales:
    """χ = 1 at every layer that one layer follows: each weight's scale by the layer below it.

    Not behind a norm, which makes the gradient large where z is small.
    """
    scales = dict.fromkeys(patient.leaves, 0.0)
    for _ in range(_SWEEPS):
        profile, off = patient.profile(scales), 0.0
        for place, layer in enumerate(patient.layers):
            if layer.above is None or patient.normalised[place]:
                continue
            leaf = patient.layers[layer.above].parameter
            log = profile.gradients[place] - profile.gradients[layer.above]
            if leaf in scales and math.isfinite(log):
                scales[leaf] -= float(log)
                off = max(off, abs(log))
        if off < _NOTABLE:
            break
    return scales


def _of_group(patient: Patient) -> Scales:
    """One factor for the group of leaves on which the end-to-end factor depends most."""
    groups = patient.groups[:_MOST_GROUPS]
    now = patient.profile({}).end_to_end
    if not groups or not math.isfinite(now):
        return {}

    def change(group: tuple[int, ...], log: float) -> float:
        return patient.profile(dict.fromkeys(group, log)).end_to_end

    slopes = [change(group, 0.1) - now for group in groups]
    strongest = int(np.nanargmax(np.abs(slopes))) if np.isfinite(slopes).any() else 0
    if not abs(slopes[strongest]) > 1e-3:
        return {}
    group = groups[strongest]
    # The scale moves towards where the factor is 1; where only 0 has that, to where little is left.
    down = now * slopes[strongest] > 0
    good, bad = (-_WIDEST if down else _WIDEST), 0.0
    end = change(group, good)
    # What is measured of branches of scale 0 is 0 to rounding, of either sign.
    target = 0.0 if end * now < 0 and abs(end) > _LEFT else math.copysign(_LEFT, now)
    if not (end - target) * now < 0:
        return {}
    for _ in range(_STEPS):
        middle = (good + bad) / 2
        if (change(group, middle) - target) * now > 0:
            bad = middle
        else:
            good = middle
    return dict.fromkeys(group, good)


def _needed(patient: Patient, scales: Scales) -> Scales:
    """The scales without those of groups that change nothing, as of weights before a norm."""
    groups = [group for group in patient.groups if scales.keys() & set(group)]
    if not 1 < len(groups) <= _MOST_GROUPS:
        return scales
    whole, kept = patient.profile(scales).gradients, dict(scales)
    for group in groups:
        less = {i: log for i, log in kept.items() if i not in group}
        if np.allclose(patient.profile(less).gradients, whole, atol=1e-3, rtol=0):
            kept = less
    return kept


# Known initialisations ---------------------------------------------------------------------------


def _alternatives(patient: Patient) -> Iterator[Trial]:
    """What known initialisations would do, each measured."""
    rules: dict[str, Callable[[int, int], float]] = {
        "LeCun": lambda fan_in, _: 1 / fan_in,
        "He": lambda fan_in, _: 2 / fan_in,
        "Glorot": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    }
    for name, rule in rules.items():
        scales = {}
        for leaf in patient.leaves:
            layer, law = patient.layer_of(leaf), patient.laws[leaf]
            fan_out = math.prod(patient.program.avals[leaf].shape) // layer.fan_in
            if law.variance > 0:
                scales[leaf] = math.log(rule(layer.fan_in, max(1, fan_out)) / law.variance) / 2
        yield patient.measured(scales).trial(name)
    yield patient.measured(functools.partial(_lsuv, patient)).trial("LSUV")
    yield patient.measured(functools.partial(_orthogonal, patient)).trial("orthogonal")


def _lsuv(patient: Patient, parameters: PyTree, state: PyTree) -> PyTree:
    """Each layer's product at variance one, in the order of data flow (Mishkin & Matas 2016)."""
    program = patient.program
    arguments: dict[int, Any] = {}
    trees = {
        "parameters": parameters, "state": state, "key": patient.key,
        "inputs": patient.inputs, "targets": patient.targets,
    }  # fmt: skip
    for name, numbers in program.arguments.items():
        arguments.update(zip(numbers, jax.tree.leaves(trees[name]), strict=True))
    products = {layer.product: layer for layer in patient.layers}
    values: dict[int, Any] = {**program.constants, **arguments}
    scales: Scales = {}
    for equation in program.equations:
        out = equation.evaluate(*(values[i] for i in equation.inputs))
        layer = products.get(equation.outputs[0])
        if layer is not None and layer.parameter in patient.leaves:
            deviation = float(jnp.std(out[0].astype(jnp.float32)))
            log = -math.log(deviation) if 0 < deviation < math.inf else 0.0
            log = scales.setdefault(layer.parameter, log)  # one factor where weights are tied
            out = (out[0] * jnp.asarray(math.exp(log), out[0].dtype),)
        values.update(zip(equation.outputs, out, strict=True))
    return patient.scaled(parameters, scales)


def _orthogonal(patient: Patient, parameters: PyTree, state: PyTree) -> PyTree:
    """Weights drawn anew, orthogonal."""
    del state
    leaves, tree = jax.tree.flatten(parameters)
    make, chosen = jax.nn.initializers.orthogonal(), set(patient.leaves)
    out = [
        make(jax.random.fold_in(patient.key, i), leaf.shape, leaf.dtype)
        if i in chosen and leaf.ndim > 1
        else leaf
        for i, leaf in zip(patient.program.arguments["parameters"], leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, out)


# Sentences ---------------------------------------------------------------------------------------


def _what(patient: Patient, now: Profile, alike: bool = True) -> str:
    """What gradients do, from the last layer to the first: a layer, if layers are alike."""
    if not np.isfinite(now.gradients).all():
        return "Gradients of some layers are 0 or not finite"
    places = now.alike[0]
    if abs(now.end_to_end) < now.worst / 2:
        where, log = now.furthest
        return (
            f"The gradient's norm at {patient.layers[where].name} is {_factor(log)} that of the "
            "last layer like it"
        )
    word = "vanish" if now.end_to_end < 0 else "explode"
    steps = len(places) - 1
    factor = f"{_factor(now.end_to_end / steps)} a layer" if alike else _factor(now.end_to_end)
    first, last = (patient.layers[places[i]].name for i in (0, -1))
    return f"Gradients {word}, {factor} from {last} down to {first}"


def _cause(patient: Patient, now: Profile, scales: Scales) -> str:
    """The sentence on the group of weights that the cure changes most."""
    parts = [[i for i in group if i in scales] for group in patient.groups]
    group = max(parts, key=lambda part: sum(abs(scales[i]) for i in part))
    name = patient.program.names[group[0]]
    gains = [patient.gain(i) for i in group]
    logs = [scales[i] for i in group]
    before = float(np.exp(np.mean(np.log(gains))))
    log = float(np.mean(logs))
    after = before * math.exp(2 * log)
    which = name if len(group) == 1 else f"{name} and {len(group) - 1} like it"
    same = np.ptp(logs) < _NOTABLE
    what = _what(patient, now, alike=len(group) > 1)
    return (
        f"{what}; the cause is the scale of {which} (σ_w² {before:.3g} where {after:.3g} keeps "
        f"them): multiply by {'' if same else 'about '}{math.exp(log):.3g}."
    )


def _no_cure(patient: Patient, saturated: float) -> str:
    """Why no factors are given, and what helps instead."""
    names = {phi.name for phi in patient.predicted.activations if phi is not None} - {"linear"}
    phi = f"{', '.join(sorted(names))} is" if names else "activations are"
    instead = (
        "another activation (tanh keeps gradients at σ_w² = 1, relu at 2), normalisation, or "
        "residual branches do"
    )
    if not math.isnan(saturated):
        return (
            f"No scale of the weights helps: where gradients would keep their size {phi} saturated "
            f"in {100 * saturated:.0f} % of units; {instead}."
        )
    return f"No scale of the weights that was tried helps; {instead}."


def _factor(log: float) -> str:
    """A factor as ×0.41, also beyond the floats' range."""
    if not math.isfinite(log):
        return f"×{math.exp(log):g}" if log < 0 else f"×{log:g}"
    exponent = math.floor(log / math.log(10))
    if -3 <= exponent < 4:
        return f"×{math.exp(log):.3g}"
    return f"×{math.exp(log - exponent * math.log(10)):.1f}e{exponent}"
