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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from gradflow._checks import shown
from gradflow.activations import Activation
from gradflow.errors import InputError
from gradflow.inspection._laws import Law
from gradflow.inspection._layers import Layer
from gradflow.inspection._measuring import measure
from gradflow.inspection._model import Model
from gradflow.inspection._reading import Program
from gradflow.inspection._walk import Predicted, predict
from gradflow.theory.criticality import critical_points

__all__ = ["Cure", "Trial", "find", "mended"]

# Networks that a change of scales is tried on.
_NETWORKS = 3
# Gradients are well if no layer's norm differs from the top's by more than this factor.
_WELL = math.log(10.0)
# A cure leaves at most this share of the logarithm, and of units that are saturated.
_HELPS, _SATURATED = 0.5, 0.5
# Factors nearer to 1 are not given.
_NOTABLE = math.log(1.02)
# Variances that differ by fewer standard errors are of one law.
_SIGMAS = 5.0
# Scales that are searched, as logarithms, and how often.
_WIDEST, _STEPS, _SWEEPS = 6.0, 14, 6
# What residual branches may leave where no scale but 0 leaves nothing.
_LEFT = math.log(2.0)
_MOST_GROUPS = 6


@dataclasses.dataclass(frozen=True)
class Trial:
    """What weights of some scale do, measured on the model.

    Attributes
    ----------
    name
        Of the scale.
    gradient
        Natural logarithm of the gradient's norm at the first layer over that at the last.
    spread
        Natural logarithm of the largest over the smallest norm of the layers' gradients.
    signal
        Natural logarithm of the root mean square of the last layer's pre-activations over that of
        the first's.
    saturated
        The largest share of saturated units of a layer; NaN where no activation saturates.
    """

    name: str
    gradient: float
    spread: float
    signal: float
    saturated: float


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


@dataclasses.dataclass(frozen=True)
class _Profile:
    """Logarithms of the norm of the gradient and of the rms of z at each layer; saturated share."""

    gradients: np.ndarray
    signals: np.ndarray
    saturated: np.ndarray

    @classmethod
    def of(cls, values: Mapping[str, np.ndarray], sites: Sequence[int]) -> "_Profile":
        def mean(key: str) -> np.ndarray:
            rows = np.atleast_2d(np.asarray(values[key], np.float64))
            return np.where(np.isnan(rows).all(axis=0), np.nan, _nanmean(rows))

        # Of all sites together: a layer of fewer sites has no less gradient for it.
        gradients = mean("log_gradient_norm") + np.log(np.asarray(sites, np.float64)) / 2
        return cls(gradients, mean("log_q") / 2, mean("saturation"))

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.gradients).all() and np.isfinite(self.signals).all())

    @property
    def end_to_end(self) -> float:
        return float(self.gradients[0] - self.gradients[-1])

    @property
    def worst(self) -> float:
        """The largest logarithm of a layer's gradient over the top's; inf where one is 0 or NaN."""
        if not np.isfinite(self.gradients).all():
            return math.inf
        return float(np.abs(self.gradients - self.gradients[-1]).max())

    def trial(self, name: str) -> Trial:
        spread = float(np.ptp(self.gradients)) if self.known else math.inf
        saturated = self.saturated[np.isfinite(self.saturated)]
        return Trial(
            name,
            self.end_to_end,
            spread,
            float(self.signals[-1] - self.signals[0]),
            float(saturated.max()) if saturated.size else math.nan,
        )


# Logarithms of factors, by the number of the leaf of the parameters.
_Scales = dict[int, float]


@dataclasses.dataclass
class _Patient:
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
        drawn = self.model.draw(jax.random.split(self.key, _NETWORKS))
        return [jax.tree.map(lambda x, i=i: x[i], drawn) for i in range(_NETWORKS)]

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

    def measured(
        self, change: _Scales | Callable[[PyTree, PyTree], PyTree], networks: int = _NETWORKS
    ) -> _Profile:
        """The profile of the model with its weights scaled, or changed by a function of them."""
        parts: list[Mapping[str, np.ndarray]] = []
        sites: Sequence[int] = ()
        for parameters, state in self.draws[:networks]:
            if callable(change):
                changed = change(parameters, state)
            else:
                changed = self.scaled(parameters, change)
            found = measure(
                self.model, self.program, self.layers, self.inputs, self.key,
                targets=self.targets, parameters=(changed, state),
            )  # fmt: skip
            parts.append(found.values)
            sites = found.sites
        keys = ("log_gradient_norm", "log_q", "saturation")
        return _Profile.of({k: np.concatenate([p[k] for p in parts]) for k in keys}, sites)

    def theory(self, scales: _Scales) -> _Profile:
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
            state=jax.tree.leaves(self.draws[0][1]),
        )  # fmt: skip
        return _Profile.of(predicted.values, self.sites)

    @property
    def sites(self) -> list[int]:
        shapes = [self.program.avals[layer.preactivation].shape for layer in self.layers]
        return [
            math.prod(n for i, n in enumerate(shape) if i not in layer.units)
            for shape, layer in zip(shapes, self.layers, strict=True)
        ]

    @functools.cached_property
    def profile(self) -> Callable[[_Scales], _Profile]:
        """The profile at any scales: by theory where it reaches, else measured in one network."""
        theory = _Profile.of(self.predicted.values, self.sites)
        return self.theory if theory.known else functools.partial(self.measured, networks=1)

    def scaled(self, parameters: PyTree, scales: _Scales) -> PyTree:
        leaves, tree = jax.tree.flatten(parameters)
        numbers = self.program.arguments["parameters"]
        return jax.tree.unflatten(
            tree,
            [
                _times(leaf, math.exp(scales[i])) if i in scales else leaf
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
        names = [re.sub(r"\d+", "#", self.program.names[i]) for i in (one, other)]
        shapes = [self.program.avals[i].shape for i in (one, other)]
        laws = [self.laws[i] for i in (one, other)]
        error = _SIGMAS * math.hypot(*(law.standard_error for law in laws))
        apart = abs(laws[0].variance - laws[1].variance)
        return (
            names[0] == names[1]
            and shapes[0] == shapes[1]
            and apart <= max(error, _NOTABLE * laws[0].variance)
        )


def find(
    model: Model,
    program: Program,
    layers: Sequence[Layer],
    inputs: tuple[Any, ...],
    key: PRNGKeyArray,
    *,
    laws: Mapping[int, Law],
    predicted: Predicted,
    targets: tuple[Any, ...] = (),
    given: tuple[PyTree, PyTree] | None = None,
) -> Cure:
    """The cause of what a model's gradients do from end to end, and the cure.

    Parameters
    ----------
    model, program, layers, inputs, key
        As `measure` takes them.
    laws, predicted
        Of the leaves of the parameters, and what `predict` made of them.
    targets
        Of a loss behind the outputs.
    given
        ``(parameters, state)`` at hand; without it a few networks are drawn.
    """
    patient = _Patient(model, program, layers, inputs, key, laws, predicted, targets, given)
    now = patient.measured({})
    before = now.trial("as it is")
    if now.worst <= _WELL:
        return Cure("", {}, "Gradients keep their size; nothing is to be mended.", before)
    alternatives = tuple(_alternatives(patient))
    best, saturated = None, math.nan
    for name, scales in _candidates(patient):
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
        f"from the last layer to the first, instead of {_factor(before.gradient)}.",
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
            _times(leaf, factors[name]) if (name := jax.tree_util.keystr(path)) in factors else leaf
        ),
        parameters,
    )


# Candidates --------------------------------------------------------------------------------------


def _candidates(patient: _Patient) -> Iterator[tuple[str, _Scales]]:
    """Scales that may mend the model, as logarithms of factors, by name; computed when asked."""
    for name, make in (("critical point", _critical), ("χ = 1", _balanced), ("group", _of_group)):
        scales = {i: log for i, log in make(patient).items() if abs(log) > _NOTABLE}
        yield name, _needed(patient, scales)


def _critical(patient: _Patient) -> _Scales:
    """Every weight at the critical point of the activation below it, its biases being 0."""
    below = {layer.above: place for place, layer in enumerate(patient.layers)}
    scales: _Scales = {}
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


def _balanced(patient: _Patient) -> _Scales:
    """χ = 1 at every layer that one layer follows: each weight's scale by the layer below it."""
    scales = dict.fromkeys(patient.leaves, 0.0)
    for _ in range(_SWEEPS):
        profile, off = patient.profile(scales), 0.0
        for place, layer in enumerate(patient.layers):
            if layer.above is None:
                continue
            leaf = patient.layers[layer.above].parameter
            log = profile.gradients[place] - profile.gradients[layer.above]
            if leaf in scales and math.isfinite(log):
                scales[leaf] -= float(log)
                off = max(off, abs(log))
        if off < _NOTABLE:
            break
    return scales


def _of_group(patient: _Patient) -> _Scales:
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
    target = 0.0 if end * now < 0 else math.copysign(_LEFT, now)
    if not (end - target) * now < 0:
        return {}
    for _ in range(_STEPS):
        middle = (good + bad) / 2
        if (change(group, middle) - target) * now > 0:
            bad = middle
        else:
            good = middle
    return dict.fromkeys(group, good)


def _needed(patient: _Patient, scales: _Scales) -> _Scales:
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


def _alternatives(patient: _Patient) -> Iterator[Trial]:
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


def _lsuv(patient: _Patient, parameters: PyTree, state: PyTree) -> PyTree:
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
    scales: _Scales = {}
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


def _orthogonal(patient: _Patient, parameters: PyTree, state: PyTree) -> PyTree:
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


def _what(patient: _Patient, now: _Profile, alike: bool = True) -> str:
    """What gradients do, from the last layer to the first: a layer, if layers are alike."""
    first, last = patient.layers[0].name, patient.layers[-1].name
    if not np.isfinite(now.gradients).all():
        return "Gradients of some layers are 0 or not finite"
    depth = max(1, len(patient.layers) - 1)
    if abs(now.end_to_end) < now.worst / 2:
        place = int(np.abs(now.gradients - now.gradients[-1]).argmax())
        return (
            f"The gradient's norm at {patient.layers[place].name} is "
            f"{_factor(now.gradients[place] - now.gradients[-1])} that at {last}"
        )
    word = "vanish" if now.end_to_end < 0 else "explode"
    factor = f"{_factor(now.end_to_end / depth)} a layer" if alike else _factor(now.end_to_end)
    return f"Gradients {word}, {factor} from {last} down to {first}"


def _cause(patient: _Patient, now: _Profile, scales: _Scales) -> str:
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
    return (
        f"{_what(patient, now, alike=len(group) > 1)}; the cause is the scale of {which} "
        f"(σ_w² {before:.3g} where {after:.3g} keeps them): multiply by "
        f"{'' if same else 'about '}{math.exp(log):.3g}."
    )


def _no_cure(patient: _Patient, saturated: float) -> str:
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


def _times(leaf: Array, factor: float) -> Array:
    return leaf * jnp.asarray(factor, leaf.dtype)


def _nanmean(rows: np.ndarray) -> np.ndarray:
    known = ~np.isnan(rows)
    return np.where(known, rows, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
