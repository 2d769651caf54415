"""Comparison: theory beside measurement, how far apart in standard errors, and what it means.

A difference is *significant* when its z-score is beyond what 1 % of all comparisons of this size
would show by chance anywhere (Bonferroni, Student's t). A significant difference from the
infinite-width theory need not be an error: networks are finite. For Gaussian weights theory says
what that does, to first order in 1/width (`theory.finite_width.first_order`), and the difference
must be that. Where it does not say, the effect's shrinking as 1/width is tested: the same network
is simulated at a quarter of its width, where it must be four times as large. If it is not, half of
the width tells whether it goes as a/width + b/width²: a batch that is not small beside the width
needs b, and orthogonal weights may have no a.
"""

import dataclasses
import enum
import html
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import numpy as np
import scipy.stats
import xarray
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from gradflow import statistics
from gradflow._arguments import as_key
from gradflow._checks import check_instance
from gradflow._compilation import Float64Program
from gradflow.errors import InputError
from gradflow.estimation import Estimate
from gradflow.float_ranges import FloatRange, float_ranges
from gradflow.networks import Network, as_inputs, check_network, checked_inputs, divide_widths
from gradflow.simulation.monte_carlo import Progress, Simulation, simulate
from gradflow.statistics import Prediction, Statistic
from gradflow.theory import _densities, mean_field
from gradflow.theory.finite_width import carried_means
from gradflow.theory.finite_width.first_order import (
    Corrections,
    Layers,
    correct,
    correct_from,
    covers,
    prepare,
)
from gradflow.verdict import Verdict, judge, layers_ahead

__all__ = [
    "Comparison",
    "Contrast",
    "Status",
    "Verdict",
    "compare",
    "compare_results",
    "compile_theory",
]
__all__ += ["correct_float64", "differences", "explained", "log_chi_beyond", "predict_float64"]
__all__ += ["theory_float64"]

# How much narrower the networks are that tell a finite-width effect from an error, and how many
# more of them are drawn: their statistics spread more, and they cost less. The second is needed
# where the first does not tell.
_NARROWER = (4, 2)
# How much wider the networks are that tell it where all are narrow, and how narrow those are; then
# expansions in 1/width do not converge, and there is no fewer.
_WIDER, _NARROW = 8, 64
# By how much a difference must have shrunk there, if it has not gone.
_SHRUNK = 4
# Σ 1/width over the layers, and a width, from which on it may be that no first order tells.
_EXPANDS, _WIDE = 0.2, 16
# A share of a value, below which its first order in 1/width is small.
_SMALL = 0.2
# Where sites mix, effects go like their number beside the width: far above it is this many times.
_MANY = 16
# The chance that a comparison of correct theory with simulation shows any significant difference.
FALSE_ALARM_RATE = 0.01
# Rounding of the simulation's float type that a measurement may carry, in units of its epsilon.
_ROUNDING = 8
# What is left by rounding of differences of averages in float64.
_ROUNDING_FLOAT64 = 1e-13
# A relative change of χ in a layer below which it is taken as settled; algebraic approaches, a/l²,
# get there after 1e5 layers.
_SETTLED = 1e-10


# Beyond so many standard errors a threshold leaves next to nothing that could differ: below about
# 7 networks, Student's t has hardly a degree of freedom.
_TELLING = 10.0
# What the verdict is about.
_SAID = (statistics.log_gradient_norm, statistics.saturation)


class Status(enum.IntEnum):
    """What became of one comparison; the value is what files hold."""

    NOT_COMPARED = -1
    AGREES = 0
    FINITE_WIDTH = 1
    DIFFERS = 2


class Contrast(eqx.Module):
    """One statistic, theory beside measurement; every array of shape (layers,).

    ``theory``, ``measured`` and ``standard_error`` are natural logarithms (and the error that of
    the logarithm) where the statistic is carried as one; ``relative_difference`` is measured/theory
    - 1 either way, and NaN where the theory is below the standard error. ``shift`` is the
    difference that the network's width makes, by theory, to first order in 1/width, in the unit of
    ``theory``; NaN where theory does not say. ``deviation`` and ``theory_deviation`` are the
    standard deviations over networks in that unit.
    """

    theory: np.ndarray
    measured: np.ndarray
    standard_error: np.ndarray
    z: np.ndarray
    relative_difference: np.ndarray
    status: np.ndarray
    shift: np.ndarray
    deviation: np.ndarray
    theory_deviation: np.ndarray
    logarithmic: bool = eqx.field(static=True, default=False)

    def foreseen(self, threshold: float) -> np.ndarray:
        """Whether the difference is the one that the width makes by theory.

        Within its standard error or, where 1/width² terms still show, to a third of it.
        """
        with np.errstate(invalid="ignore"):  # both may be -inf, the logarithm of 0
            difference = self.measured - self.theory
            rest = np.abs(difference - self.shift)
        return (rest < threshold * self.standard_error) | (rest < np.abs(difference) / 3)

    def expands(self, threshold: float) -> bool:
        """Whether the width's first order is known and small wherever the difference is large."""
        large = np.abs(self.z) >= threshold
        with np.errstate(divide="ignore", invalid="ignore"):  # of what is 0, nothing is small
            size = np.abs(self.shift) / (1 if self.logarithmic else np.abs(self.theory))
        return bool(np.all(size[large] < _SMALL))


class Comparison(eqx.Module):
    """Theory beside measurement, for every statistic and layer.

    Attributes
    ----------
    contrasts
        By the statistic's key.
    theory, simulation
        What was compared.
    corrections
        What theory says of this width, if it does.
    narrower
        The simulations at a quarter and at half of the width, if they were needed.
    wider
        The simulation at eight times the width, if it was.
    threshold
        The z-score beyond which a difference is significant.
    verdict
        What it means for the gradient.
    """

    contrasts: dict[str, Contrast]
    theory: Prediction
    simulation: Simulation
    corrections: Corrections | None
    narrower: tuple[Simulation, ...]
    wider: Simulation | None
    threshold: float = eqx.field(static=True)
    verdict: Verdict = eqx.field(static=True)

    def __getitem__(self, name: str) -> Contrast:
        """Return a statistic's contrast, by its name or its key."""
        return self.contrasts[statistics.key_of(name, self.contrasts)]

    def count(self, status: Status) -> int:
        """Return how many comparisons, over statistics and layers, ended so."""
        return int(sum((c.status == status).sum() for c in self.contrasts.values()))

    @property
    def agreement(self) -> str:
        """One sentence on how theory and simulation agree."""
        agrees, finite, differs = (
            self.count(s) for s in (Status.AGREES, Status.FINITE_WIDTH, Status.DIFFERS)
        )
        total, network = agrees + finite + differs, self.simulation.network
        networks = self.simulation.networks
        if self.simulation.networks == 1:
            return "nothing is compared: one network has no standard error"
        sentence = f"{agrees} of {total} values agree within |z| < {self.threshold:.1f}"
        if self.threshold > _TELLING:
            sentence = (
                f"{networks} networks cannot tell: a value would have to be {self.threshold:.0f} "
                f"standard errors off to show, and {agrees} of {total} are not; draw 10 or more"
            )
        if finite:
            foreseen = sum(
                int(((c.status == Status.FINITE_WIDTH) & c.foreseen(self.threshold)).sum())
                for c in self.contrasts.values()
            )
            shrinks = []
            if self.narrower:
                shrinks.append(f"are {_NARROWER[0]} times as large at 1/{_NARROWER[0]} of it")
            if len(self.narrower) > 1:
                shrinks.append(f"are seen at 1/{_NARROWER[1]} of it too to go to 0 with the width")
            if self.wider is not None:
                shrinks.append(f"go, or shrink {_SHRUNK}-fold, at {_WIDER} times the width")
            term = None if self.corrections is None else self.corrections.term
            by_theory = f"theory says of this width{f' ({term})' if term else ''}"
            how = [
                (foreseen, f"that are what {by_theory}"),
                (finite - foreseen, f"that {', or '.join(shrinks)}"),
            ]
            said = " and ".join(f"{count} {words}" for count, words in how if count)
            sentence += f"; finite-width effects: {said}"
        if differs:
            worst, contrast = max(self.contrasts.items(), key=lambda item: _worst(item[1]))
            layer = int(np.argmax(np.where(contrast.status == Status.DIFFERS, abs(contrast.z), -1)))
            sentence += (
                f"; {differs} {'differs' if differs == 1 else 'differ'}"
                f"{self._beside_the_width()}, most "
                f"{statistics.named()[worst].name} at layer "
                f"{layer + 1} (z = {contrast.z[layer]:.1f}, "
                f"{100 * contrast.relative_difference[layer]:+.2g} %)"
            )
            sites, width = self.simulation.sites, min(network.widths[1:])
            if network.mixes_sites and width < _MANY * sites:
                sentence += (
                    f"; {sites} sites mix, and a width of {width} is not far above their number, "
                    "as the theory's is"
                )
            if network.tied and self.theory.missing is None:
                steps = max(stage.repeats for stage in network.stages if stage.tied)
                sentence += (
                    "; the theory is of weights drawn anew at each step: shared ones meet it where "
                    f"the width is far above steps² = {steps**2}"
                )
        if self.theory.missing is not None:
            sentence += f"; {self.theory.missing}"
        return sentence

    @property
    def float_ranges(self) -> dict[str, dict[str, dict[str, FloatRange]]]:
        """In which layer each float type over- and underflows, in ``theory`` and ``simulation``.

        By float type, then ``signals``, ``gradients`` and ``weight_gradients``: see
        `gradflow.float_ranges`. What is simulated is the typical network's.
        """
        simulation = self.simulation
        measured = {
            s.key: simulation[s.key].log_value if s.log else simulation[s.key].value
            for s in simulation.statistics
        }
        network = simulation.network
        return {
            "theory": float_ranges(network, self.theory.values),
            "simulation": float_ranges(
                network,
                measured,
                overflowed=simulation.overflowed > simulation.networks / 2,
                dtype=simulation.dtype,
            ),
        }

    def __repr__(self) -> str:
        """Return the verdict, the agreement, and what was simulated, in three lines."""
        return f"{self.verdict.sentence}\nagreement: {self.agreement}\n{self.simulation!r}"

    def _repr_html_(self) -> str:
        """Return the same for a notebook, with the first, middle and last layer's values."""
        verdict, *rest = map(html.escape, repr(self).split("\n"))
        depth = self.simulation.network.depth
        rows = []
        for key, contrast in self.contrasts.items():
            for layer in sorted({0, (depth - 1) // 2, depth - 1}):
                cells = (contrast.theory, contrast.measured, contrast.standard_error, contrast.z)
                numbers = "".join(f"<td>{values[layer]:.4g}</td>" for values in cells)
                rows.append(f"<tr><th>{key}</th><td>{layer + 1}</td>{numbers}</tr>")
        head = "".join(f"<th>{h}</th>" for h in ("", "layer", "theory", "measured", "s.e.", "z"))
        return (
            f"<p><b>{verdict}</b></p><p>{'<br>'.join(rest)}</p>"
            f"<table><tr>{head}</tr>{''.join(rows)}</table>"
        )

    def _beside_the_width(self) -> str:
        """Return what is known of whether the width makes the differences that are left."""
        network = self.simulation.network
        if not self.narrower and self.wider is None and self.corrections is None:
            return ""
        over, narrowest = sum(1 / n for n in network.widths[1:]), min(network.widths[1:])
        if over > _EXPANDS or narrowest < _WIDE or self.verdict.dead:
            return (
                f" (depth/width, Σ 1/n, is {over:.2g} and the least width {narrowest}: it may be "
                "the width, beyond its first order)"
            )
        if self.corrections is None:
            return ", not as 1/width does"
        if not all(c.expands(self.threshold) for c in self.contrasts.values()):
            return " (where the first order in 1/width is not small: it may be the width)"
        return " and the width does not explain it"

    def to_xarray(self) -> xarray.Dataset:
        """Return everything, labelled: what the simulation's has, and beside it theory's.

        Each statistic ``<name>(layer)`` has ``<name>_theory``, ``<name>_z``,
        ``<name>_standard_deviation_theory`` and the rest of its contrast; the names are those of
        the results of studies and of training.
        """
        dataset = self.simulation.to_xarray()
        for name, theory in statistics.with_names(self.theory.values).items():
            dataset[f"{name}_theory"] = ("layer", np.asarray(theory))
        known = {statistic.key: statistic for statistic in self.simulation.statistics}
        for key, contrast in self.contrasts.items():
            statistic, name = known[key], known[key].name
            deviation = contrast.theory_deviation
            if statistic.log:
                with np.errstate(over="ignore", invalid="ignore"):
                    deviation = deviation * np.exp(contrast.theory + contrast.shift)
            dataset[f"{name}_standard_deviation_theory"] = ("layer", deviation)
            dataset[f"{name}_z"] = ("layer", contrast.z)
            dataset[f"{name}_relative_difference"] = ("layer", contrast.relative_difference)
            dataset[f"{name}_finite_width_shift"] = ("layer", contrast.shift)
            dataset[f"{name}_status"] = (
                "layer",
                contrast.status,
                {s.name.lower(): int(s) for s in Status},
            )
        ranges = {
            source: {of: {name: vars(r) for name, r in each.items()} for of, each in found.items()}
            for source, found in self.float_ranges.items()
        }
        return statistics.labelled(dataset).assign_attrs(
            verdict=self.verdict.sentence,
            verdict_kind=self.verdict.kind,
            float_ranges=json.dumps(ranges),
            agreement=self.agreement,
            z_threshold=self.threshold,
        )


def compare_results(
    theory: Prediction,
    simulation: Simulation,
    *,
    corrections: Corrections | None = None,
    narrower: Sequence[tuple[Simulation, Prediction]] = (),
    wider: tuple[Simulation, Prediction] | None = None,
    log_chi_beyond: float | None = None,
) -> Comparison:
    """Put theory beside measurement.

    Parameters
    ----------
    theory
        From `theory.mean_field.predict`, for the network and inputs that were simulated.
    simulation
        From `simulation.monte_carlo.simulate`.
    corrections
        From `theory.finite_width.first_order.correct`, to tell finite-width effects from errors.
    narrower
        Simulation and theory at a quarter of the width (`networks.divide_widths`), and at half of
        it, to do so where the corrections do not; without any of them every significant difference
        is reported as an error.
    wider
        The same at eight times the width, of a narrow network.
    log_chi_beyond
        log χ far above the top (`theory.mean_field.asymptotic_log_chi`), for the verdict; the top
        layers' is used without it.

    Raises
    ------
    InputError
        If the theory and the simulation are of different depths, or what the verdict is about was
        not measured.
    """
    check_instance("theory", theory, Prediction, "what theory.mean_field.predict returns")
    check_instance(
        "simulation", simulation, Simulation, "what simulation.monte_carlo.simulate returns"
    )
    depth = simulation.network.depth
    lengths = {len(v) for v in theory.values.values()}
    if lengths != {depth}:
        raise InputError(
            f"theory has {lengths.pop()} layers and simulation has {depth}; they must be of the "
            "same network"
        )
    known = {statistic.key: statistic for statistic in simulation.statistics}
    missing = {s.key for s in _SAID} - known.keys()
    if missing:
        raise InputError(
            f"simulation has no {min(missing)}, which the verdict is about; simulate with "
            "wanted=statistics.ALL, or with it among others"
        )
    # Theory may say nothing of what users measure.
    raw = {key: _differences(key, theory, simulation) for key in known if key in theory.values}
    compared = sum(int(np.isfinite(z).sum()) for *_, z in raw.values())
    threshold = _threshold(simulation.networks, compared)
    contrasts = {}
    for key, (predicted, measured, error, z) in raw.items():
        statistic, estimate = known[key], simulation.estimates[key]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            difference = measured - predicted
            relative = (
                np.expm1(difference)
                if statistic.logarithmic
                # Of what is below its own standard error there is no relative difference.
                else np.where(np.abs(predicted) > error, difference / np.abs(predicted), np.nan)
            )
        own_error = estimate.log_standard_error if statistic.log else estimate.standard_error
        unknown = np.full(depth, np.nan)
        # What is below the rounding of the simulation's floats is none.
        noise = _ROUNDING * float(np.finfo(simulation.dtype).eps)
        relative = np.where(np.abs(relative) < noise, 0.0, relative)
        contrast = Contrast(
            theory=predicted,
            measured=measured,
            standard_error=error,
            z=z,
            relative_difference=relative,
            status=np.where(np.abs(z) < threshold, Status.AGREES, Status.DIFFERS),
            logarithmic=statistic.logarithmic,
            shift=_without_rounding(corrections.shift[key], predicted) if corrections else unknown,
            deviation=own_error * np.sqrt(estimate.count),
            theory_deviation=(
                np.asarray(corrections.standard_deviation[key]) if corrections else unknown
            ),
        )
        explained = contrast.foreseen(threshold)
        if narrower:
            at_widths = [(difference, error)]
            for narrow_simulation, narrow_theory in narrower:
                below, above, narrow_error, _ = _differences(key, narrow_theory, narrow_simulation)
                with np.errstate(invalid="ignore"):
                    at_widths.append((above - below, narrow_error))
            explained = explained | _shrinks_with_the_width(at_widths, threshold)
        if wider is not None:
            below, above, wide_error, _ = _differences(key, wider[1], wider[0])
            with np.errstate(invalid="ignore"):
                rest = np.abs(above - below)
                explained = explained | (rest < threshold * wide_error)
                explained = explained | (rest < np.abs(difference) / _SHRUNK)
        status = contrast.status
        status = np.where((status == Status.DIFFERS) & explained, Status.FINITE_WIDTH, status)
        status = np.where(np.isnan(z), Status.NOT_COMPARED, status).astype(np.int8)
        contrasts[key] = dataclasses.replace(contrast, status=status)
    return Comparison(
        contrasts=contrasts,
        theory=theory,
        simulation=simulation,
        corrections=corrections,
        narrower=tuple(simulation for simulation, _ in narrower),
        wider=None if wider is None else wider[0],
        threshold=threshold,
        verdict=judge(theory, simulation, log_chi_beyond),
    )


def compare(
    network: Network,
    inputs: ArrayLike,
    *,
    key: PRNGKeyArray | int = 0,
    networks: int = 1000,
    sampler: str = "auto",
    histograms: bool = False,
    explain: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Simulate a network, predict it in float64, and compare: the whole answer in one call.

    Parameters
    ----------
    network, inputs, key, networks, sampler, histograms, progress
        As for `simulation.monte_carlo.simulate`.
    explain
        Work out what the network's width does, by theory where it knows; where it does not, and
        differences are significant, by simulating at a quarter of the width.

    Raises
    ------
    InputError
        As `simulation.monte_carlo.simulate` does.
    """
    key = as_key(key)
    checked = as_inputs(inputs, network)
    # Beside the simulation: both spend most of their time in the compiler, on one core each.
    work_out, further_up = _theory(network, inputs, explain), _further_up(network)

    def theories() -> tuple[Prediction, Corrections | None, float]:
        theory, corrections = work_out()
        return theory, corrections, further_up(theory)

    with ThreadPoolExecutor(1) as pool:
        predicted = pool.submit(theories)
        simulation = simulate(
            network,
            checked,
            key=key,
            networks=networks,
            sampler=sampler,
            histograms=histograms,
            progress=progress,
        )
    theory, corrections, beyond = predicted.result()
    if histograms:
        simulation = with_densities(simulation, inputs)
    comparison = compare_results(theory, simulation, corrections=corrections, log_chi_beyond=beyond)
    return explained(comparison, inputs, key=key, sampler=sampler) if explain else comparison


def explained(
    comparison: Comparison, inputs: ArrayLike, *, key: PRNGKeyArray | int, sampler: str = "auto"
) -> Comparison:
    """Return a comparison whose differences were looked for at other widths, if there are any.

    Parameters
    ----------
    comparison
        Of a network with its inputs, as `compare` returns it.
    inputs, key, sampler
        Those of its simulation. The key is not the narrower networks' own.
    """
    check_instance("comparison", comparison, Comparison, "what compare returns")
    key = as_key(key)
    theory, simulation = comparison.theory, comparison.simulation
    network = simulation.network
    narrower: list[tuple[Simulation, Prediction]] = []
    for number, factor in enumerate(_NARROWER):
        if not comparison.count(Status.DIFFERS) or min(network.widths[1:]) < _NARROWER[0]:
            break
        narrow = divide_widths(network, factor)
        measured = simulate(
            narrow,
            inputs,
            # Another key: the simulations must be independent to be extrapolated.
            key=jax.random.fold_in(key, (1 << 31) + number),
            networks=factor * simulation.networks,
            sampler=sampler,
        )
        narrower.append((measured, mean_field.at_widths(theory, network, narrow)))
        found = compare_results(
            theory, simulation, corrections=comparison.corrections, narrower=narrower
        )
        # What the gradient does was said with χ further up.
        comparison = dataclasses.replace(found, verdict=comparison.verdict)
    if comparison.count(Status.DIFFERS) and max(network.widths[1:]) <= _NARROW:
        wide = divide_widths(network, Fraction(1, _WIDER))
        measured = simulate(
            wide,
            inputs,
            key=jax.random.fold_in(key, (1 << 31) + len(_NARROWER)),
            networks=simulation.networks,
            sampler=sampler,
        )
        found = compare_results(
            theory,
            simulation,
            corrections=comparison.corrections,
            narrower=narrower,
            wider=(measured, mean_field.at_widths(theory, network, wide)),
        )
        comparison = dataclasses.replace(found, verdict=comparison.verdict)
    return comparison


def theory_float64(
    network: Network, inputs: ArrayLike, *, finite_width: bool = True
) -> tuple[Prediction, Corrections | None]:
    """Return what `predict_float64` and `correct_float64` do, which share most of their work.

    Without ``finite_width`` the second is None.
    """
    return _theory(network, inputs, finite_width)()


def compile_theory(network: Network, inputs: ArrayLike, *, finite_width: bool = True) -> None:
    """Compile what `theory_float64` takes for networks of this structure, if it is not yet."""
    for program in _programs(*_arguments(network, inputs), finite_width):
        program.compile()


def log_chi_beyond(network: Network, theory: Prediction) -> float:
    """Return log χ where the network would be with many more layers, for `compare_results`."""
    check_network(network)
    check_instance("theory", theory, Prediction, "what theory.mean_field.predict returns")
    return _further_up(network)(theory)


def _theory(
    network: Network, inputs: ArrayLike, explain: bool
) -> Callable[[], tuple[Prediction, Corrections | None]]:
    """Return a function of the theory and, to explain differences, corrections.

    Everything is traced here, and nothing in the function, so that another thread can call it.
    """
    arguments = _arguments(network, inputs)
    laws, *correction = _programs(*arguments, explain)

    def run() -> tuple[Prediction, Corrections | None]:
        found = laws(*arguments)
        if isinstance(found, Prediction):
            return found, None
        theory, known = found
        return theory, correction[0](known) if correction else known

    return run


def _programs(
    network: Network, gram: np.ndarray, mean: np.ndarray, explain: bool
) -> list[Float64Program]:
    """Return the program of the theory and, where it has one and it is asked for, of corrections.

    The first then also returns what the second takes.
    """
    if explain and carried_means.covers(network):
        return [_prepared(_predict_and_correct, network, gram, mean)]
    if not (explain and covers(network)):
        return [_prepared(mean_field.predict, network, gram, mean)]
    laws = _prepared(_predict_and_prepare, network, gram, mean)
    return [laws, _prepared(correct_from, laws.result[1], depth=network.depth)]


def _predict_and_prepare(
    network: Network, gram: ArrayLike, mean: ArrayLike
) -> tuple[Prediction, Layers]:
    laws = mean_field.laws(network, gram, mean)
    return mean_field.predict_from(*laws), prepare(network, *laws)


def _predict_and_correct(
    network: Network, gram: ArrayLike, mean: ArrayLike
) -> tuple[Prediction, Corrections]:
    laws = mean_field.laws(network, gram, mean)
    return mean_field.predict_from(*laws), carried_means.correct_from(network, *laws)


def predict_float64(network: Network, inputs: ArrayLike) -> Prediction:
    """Return `theory.mean_field.predict` in float64, whatever JAX's x64 setting; NumPy arrays."""
    arguments = _arguments(network, inputs)
    return _prepared(mean_field.predict, *arguments)(*arguments)


def correct_float64(network: Network, inputs: ArrayLike) -> Corrections | None:
    """First-order corrections in float64, as NumPy arrays; None where there are none.

    Of networks that carry a mean along, `theory.finite_width.carried_means.correct`.
    """
    arguments = _arguments(network, inputs)[:2]
    if carried_means.covers(network):
        return _prepared(carried_means.correct, *arguments)(*arguments)
    return _prepared(correct, *arguments)(*arguments) if covers(network) else None


def with_densities(simulation: Simulation, inputs: ArrayLike) -> Simulation:
    """Return a simulation of these inputs whose histograms have their ``theory``."""
    arguments = _arguments(simulation.network, inputs)
    forward, backward = _prepared(mean_field.laws, *arguments)(*arguments)
    found = _densities.predicted(simulation.network, forward, backward, simulation.histograms)
    return dataclasses.replace(simulation, histograms=found)


def _arguments(network: Network, inputs: ArrayLike) -> tuple[Network, np.ndarray, np.ndarray]:
    """Return what theory is a function of: no name, and of the inputs their moments.

    By NumPy: JAX would trace.
    """
    x = np.asarray(checked_inputs(inputs, network), np.float64)
    return dataclasses.replace(network, name=""), x @ x.T / x.shape[1], x.mean(axis=1)


# How long the theory takes for each layer, in seconds: 2 ms with closed forms, 13 ms without.
_SECONDS_A_LAYER = 0.005


def _prepared(
    function: Callable, *arguments: Any, depth: int | None = None, **static: int
) -> Float64Program:
    """Return the program of a function of a network, or of one of this depth."""
    seconds = _SECONDS_A_LAYER * (arguments[0].depth if depth is None else depth)
    return Float64Program.of(function, arguments, seconds, **static)


def _further_up(network: Network) -> Callable[[Prediction], float]:
    """Return a function of the theory: log χ where the network would be with many more layers."""
    if network.mixes_sites:
        # The top gradient, independent for each input, is no gradient of a layer below BatchNorm:
        # the next layer's χ is the first that is like all others, of the longest stage.
        longest = max(range(len(network.stages)), key=lambda n: (network.stages[n].repeats, n))
        last = sum(stage.repeats for stage in network.stages[: longest + 1])
        return lambda theory: math.log(theory.values["chi"][max(last - 3, 0)])
    beyond = layers_ahead(network.depth)
    log_chi = _prepared(mean_field.asymptotic_log_chi, network, 0.0, beyond=beyond)

    def further_up(theory: Prediction) -> float:
        chi = np.asarray(theory.values["chi"])
        if network.depth > 2 and abs(chi[-2] / chi[-3] - 1) < _SETTLED and len(network.stages) < 3:
            return math.log(chi[-2])
        return float(log_chi(network, theory.values["log_q"][-1]))

    return further_up


def _differences(
    key: str, theory: Prediction, simulation: Simulation
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return theory, measurement, its standard error and z; logarithms where they are kept."""
    predicted = np.asarray(theory.values[key], np.float64)
    network = simulation.network
    units = np.array(network.sites(simulation.sites)) * np.array(network.widths[1:])
    measured, error, z = differences(
        statistics.named()[key],
        predicted,
        simulation.estimates[key],
        simulation.networks * units,
        simulation.dtype,
    )
    return predicted, measured, error, np.where(_underflows(key, theory, simulation), np.nan, z)


def _underflows(key: str, theory: Prediction, simulation: Simulation) -> np.ndarray:
    """Whether a value was measured of signals, or squares of them, that the floats do not hold."""
    network, statistic = simulation.network, statistics.named()[key]
    if network.homogeneous_beyond[0] or "log_q" not in theory.values:
        return np.zeros(network.depth, bool)
    log_q = np.asarray(theory.values["log_q"], np.float64)
    tiny = math.log(float(np.finfo(simulation.dtype).tiny))
    if statistic is statistics.weight_gradient_variance:  # of the squares of what enters a layer
        return np.append(False, log_q[:-1] < tiny)
    return (log_q / 2 < tiny) & (not statistic.backward)


def differences(
    statistic: Statistic, predicted: np.ndarray, estimate: Estimate, units: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what was measured, its standard error and z; logarithms where they are kept.

    Parameters
    ----------
    statistic
        What is compared.
    predicted, estimate
        Theory in the unit that the statistic is kept in, and measurement, of one shape.
    units
        How many units were seen in all networks: a fraction of them has a binomial error at least.
    dtype
        The simulation's, whose rounding a measurement may carry.
    """
    if statistic.log:
        measured, error = estimate.log_value, estimate.log_standard_error
    else:
        measured, error = estimate.value, estimate.standard_error
    if statistic.fraction:
        variance = np.clip(predicted * (1 - predicted), 0, None)
        error = np.maximum(error, np.sqrt(variance / np.maximum(units, 1)))
    epsilon = float(np.finfo(dtype).eps)
    # Of a logarithm, the rounding of what it is of, and its own.
    rounding = _ROUNDING * epsilon * (np.abs(predicted) + statistic.logarithmic)
    rounding += float(np.finfo(dtype).tiny)
    with np.errstate(invalid="ignore"):
        z = (measured - predicted) / np.hypot(error, rounding)
    # What has left the float's range is counted and said (the verdict), and not compared; nor are
    # the networks whose signals have not yet, which are the smaller ones.
    chosen = (estimate.excluded > 0) & (not statistic.backward)
    z = np.where(np.isfinite(measured) & ~chosen, z, np.nan)
    return measured, error, z


def _without_rounding(shift: ArrayLike, of: np.ndarray) -> np.ndarray:
    """Return a shift computed in float64; 0 where it is but rounding of what is shifted."""
    shift = np.asarray(shift)
    return np.where(np.abs(shift) < _ROUNDING_FLOAT64 * np.fmax(np.abs(of), 1.0), 0.0, shift)


def _threshold(networks: int, comparisons: int) -> float:
    tail = FALSE_ALARM_RATE / (2 * max(comparisons, 1))
    return float(scipy.stats.t.isf(tail, max(networks - 1, 1)))


def _shrinks_with_the_width(
    at_widths: Sequence[tuple[np.ndarray, np.ndarray]], threshold: float
) -> np.ndarray:
    """Whether a difference d, with its error, at this width and `_NARROWER` ones, goes to 0.

    As a/width its limit at infinite width is (4 d - d_quarter)/3, and as a/width + b/width² it is
    (8 d - 6 d_half + d_quarter)/3: one must vanish within its standard error or, where higher terms
    still show, to a third of d. And d must have grown beyond twice itself at a quarter, which an
    error that does not depend on the width does not.
    """
    difference, quarter = at_widths[0][0], at_widths[1][0]
    vanishes = np.zeros(difference.shape, bool)
    for shares in ((4, -1), (8, 1, -6))[: len(at_widths) - 1]:
        parts = list(zip(shares, at_widths, strict=False))
        with np.errstate(invalid="ignore"):  # of what has left the float's range
            limit = sum((share * d for share, (d, _) in parts), np.zeros(())) / 3
        error = np.sqrt(sum(((share * e) ** 2 for share, (_, e) in parts), np.zeros(()))) / 3
        vanishes |= (np.abs(limit) < threshold * error) | (np.abs(limit) < np.abs(difference) / 3)
    with np.errstate(invalid="ignore"):
        grew = quarter * np.sign(difference) > 2 * np.abs(difference)
    return vanishes & grew


def _worst(contrast: Contrast) -> float:
    differs = contrast.status == Status.DIFFERS
    return float(np.max(np.abs(contrast.z), where=differs, initial=0.0))
