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
import html
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import equinox as eqx
import jax
import numpy as np
import xarray
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from gradflow import statistics
from gradflow._arguments import as_key
from gradflow._checks import check_instance
from gradflow._differences import (
    Differences,
    StatisticComparison,
    Status,
    at_layers,
    compare_statistic,
    shrinks_with_the_width,
    significance_threshold,
)
from gradflow._float_ranges import FloatRange, float_ranges
from gradflow._inputs import as_inputs
from gradflow._labels import BY_KEY, key_of, labelled, with_names
from gradflow.errors import InputError, NoTheory
from gradflow.networks import Network, divide_widths
from gradflow.predictions import Corrections, Prediction
from gradflow.simulation.monte_carlo import Progress, Simulation, simulate
from gradflow.theory import _densities, _limits, _programs
from gradflow.theory._about_means import has_means
from gradflow.verdict import Verdict, judge

__all__ = ["Comparison", "StatisticComparison", "Status", "Verdict", "compare"]
__all__ += ["compare_results", "explain_differences"]

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
# Where sites mix, effects go like their number beside the width: far above it is this many times.
_MANY = 16


# Beyond so many standard errors a threshold leaves next to nothing that could differ: below about
# 7 networks, Student's t has hardly a degree of freedom.
_TELLING = 10.0
# What the verdict is about.
_OF_VERDICT = (statistics.log_gradient_norm, statistics.saturation)


class Comparison(eqx.Module):
    """Theory beside measurement, for every statistic and layer.

    Attributes
    ----------
    by_statistic
        By the statistic's key.
    theory, simulation
        What was compared.
    corrections
        The effect of the network's width by theory; None where it is not known.
    narrower
        The simulations at a quarter and at half of the width, if they were needed.
    wider
        The simulation at eight times the width, if it was.
    threshold
        The z-score beyond which a difference is significant.
    verdict
        What it means for the gradient.
    """

    by_statistic: dict[str, StatisticComparison]
    theory: Prediction
    simulation: Simulation
    corrections: Corrections | None
    narrower: tuple[Simulation, ...]
    wider: Simulation | None
    threshold: float = eqx.field(static=True)
    verdict: Verdict = eqx.field(static=True)

    def __getitem__(self, name: str) -> StatisticComparison:
        """A statistic's comparison, by its name or its key.

        Raises
        ------
        UnknownName
            If it was not compared.
        """
        return self.by_statistic[key_of(name, self.by_statistic)]

    def count(self, status: Status) -> int:
        """The number of comparisons, over statistics and layers, of this status."""
        return int(sum((c.status == status).sum() for c in self.by_statistic.values()))

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
            by_correction = sum(
                int(
                    ((c.status == Status.FINITE_WIDTH) & c.matches_correction(self.threshold)).sum()
                )
                for c in self.by_statistic.values()
            )
            shrinks = []
            if self.narrower:
                shrinks.append(f"are {_NARROWER[0]} times as large at 1/{_NARROWER[0]} of it")
            if len(self.narrower) > 1:
                shrinks.append(f"are seen at 1/{_NARROWER[1]} of it too to go to 0 with the width")
            if self.wider is not None:
                shrinks.append(f"go, or shrink {_SHRUNK}-fold, at {_WIDER} times the width")
            effect = None if self.corrections is None else self.corrections.effect
            by_theory = f"theory says of this width{f' ({effect})' if effect else ''}"
            how = [
                (by_correction, f"that are what {by_theory}"),
                (finite - by_correction, f"that {', or '.join(shrinks)}"),
            ]
            said = " and ".join(f"{count} {words}" for count, words in how if count)
            sentence += f"; finite-width effects: {said}"
        if differs:
            worst, one = max(self.by_statistic.items(), key=lambda item: _worst(item[1]))
            layer = int(np.argmax(np.where(one.status == Status.DIFFERS, abs(one.z), -1)))
            sentence += (
                f"; {differs} {'differs' if differs == 1 else 'differ'}"
                f"{self._beside_the_width()}, most "
                f"{BY_KEY[worst].name} at layer "
                f"{layer + 1} (z = {one.z[layer]:.1f}, "
                f"{100 * one.relative_difference[layer]:+.2g} %)"
            )
            sites, width = self.simulation.sites, min(network.widths[1:])
            if network.mixes_sites and width < _MANY * sites:
                sentence += (
                    f"; {sites} sites mix, and a width of {width} is not far above their number, "
                    "as the theory's is"
                )
            if network.tied and self.theory.why_missing is None:
                steps = max(stage.repeats for stage in network.stages if stage.tied)
                sentence += (
                    "; the theory is of weights drawn anew at each step: shared ones meet it where "
                    f"the width is far above steps² = {steps**2}"
                )
        if self.theory.why_missing is not None:
            sentence += f"; {self.theory.why_missing}"
        return sentence

    @property
    def float_ranges(self) -> dict[str, dict[str, dict[str, FloatRange]]]:
        """In which layer each float type over- and underflows, in ``theory`` and ``simulation``.

        By float type, then ``signals``, ``gradients`` and ``weight_gradients``: see
        `gradflow._float_ranges`. What is simulated is the typical network's.
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
        """The verdict, the agreement, and what was simulated, in three lines."""
        return f"{self.verdict.sentence}\nagreement: {self.agreement}\n{self.simulation!r}"

    def _repr_html_(self) -> str:
        """The same for a notebook, with the first, middle and last layer's values."""
        verdict, *rest = map(html.escape, repr(self).split("\n"))
        depth = self.simulation.network.depth
        rows = []
        for key, one in self.by_statistic.items():
            for layer in sorted({0, (depth - 1) // 2, depth - 1}):
                cells = (one.theory, one.measured, one.standard_error, one.z)
                numbers = "".join(f"<td>{values[layer]:.4g}</td>" for values in cells)
                rows.append(f"<tr><th>{key}</th><td>{layer + 1}</td>{numbers}</tr>")
        head = "".join(f"<th>{h}</th>" for h in ("", "layer", "theory", "measured", "s.e.", "z"))
        return (
            f"<p><b>{verdict}</b></p><p>{'<br>'.join(rest)}</p>"
            f"<table><tr>{head}</tr>{''.join(rows)}</table>"
        )

    def _beside_the_width(self) -> str:
        """Whether the width may explain the differences that are left, in words."""
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
        if not all(c.expands(self.threshold) for c in self.by_statistic.values()):
            return " (where the first order in 1/width is not small: it may be the width)"
        return " and the width does not explain it"

    def to_xarray(self) -> xarray.Dataset:
        """Return everything, labelled: what the simulation's has, and beside it theory's.

        Each statistic ``<name>(layer)`` has ``<name>_theory``, ``<name>_z``,
        ``<name>_standard_deviation_theory`` and the rest of its comparison; the names are those of
        the results of studies and of training.
        """
        dataset = self.simulation.to_xarray()
        for name, theory in with_names(self.theory.values).items():
            dataset[f"{name}_theory"] = ("layer", np.asarray(theory))
        known = {statistic.key: statistic for statistic in self.simulation.statistics}
        for key, one in self.by_statistic.items():
            statistic, name = known[key], known[key].name
            deviation = one.theory_deviation
            if statistic.log:
                with np.errstate(over="ignore", invalid="ignore"):
                    deviation = deviation * np.exp(one.theory + one.shift)
            dataset[f"{name}_standard_deviation_theory"] = ("layer", deviation)
            dataset[f"{name}_z"] = ("layer", one.z)
            dataset[f"{name}_relative_difference"] = ("layer", one.relative_difference)
            dataset[f"{name}_finite_width_shift"] = ("layer", one.shift)
            dataset[f"{name}_status"] = (
                "layer",
                one.status,
                {s.name.lower(): int(s) for s in Status},
            )
        ranges = {
            source: {of: {name: vars(r) for name, r in each.items()} for of, each in found.items()}
            for source, found in self.float_ranges.items()
        }
        return labelled(dataset).assign_attrs(
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
    asymptotic_log_chi: float | None = None,
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
    asymptotic_log_chi
        log χ far above the top (`theory.float64.asymptotic_log_chi`), for the verdict; the top
        layers' is used without it.

    Raises
    ------
    InputError
        If the theory and the simulation are of different depths, or a statistic that the verdict is
        about was not measured.
    """
    _check_results(theory, simulation)
    # Theory may say nothing of statistics that users define.
    compared = {
        s: at_layers(s.key, theory, simulation)
        for s in simulation.statistics
        if s.key in theory.values
    }
    count = sum(int(np.isfinite(here.z).sum()) for here in compared.values())
    threshold = significance_threshold(simulation.networks, count)
    by_statistic = {}
    for statistic, here in compared.items():
        one = compare_statistic(
            statistic,
            here,
            simulation.estimates[statistic.key],
            simulation.dtype,
            corrections,
            threshold,
        )
        explained = one.matches_correction(threshold) | _explained_by_other_widths(
            here,
            [at_layers(statistic.key, predicted, measured) for measured, predicted in narrower],
            None if wider is None else at_layers(statistic.key, wider[1], wider[0]),
            threshold,
        )
        status = np.where(
            (one.status == Status.DIFFERS) & explained, Status.FINITE_WIDTH, one.status
        )
        status = np.where(np.isnan(here.z), Status.NOT_COMPARED, status).astype(np.int8)
        by_statistic[statistic.key] = dataclasses.replace(one, status=status)
    return Comparison(
        by_statistic=by_statistic,
        theory=theory,
        simulation=simulation,
        corrections=corrections,
        narrower=tuple(measured for measured, _ in narrower),
        wider=None if wider is None else wider[0],
        threshold=threshold,
        verdict=judge(theory, simulation, asymptotic_log_chi),
    )


def _check_results(theory: Prediction, simulation: Simulation) -> None:
    """Check that the two are of one network, and that what the verdict is about was measured."""
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
    absent = {s.key for s in _OF_VERDICT} - {s.key for s in simulation.statistics}
    if absent:
        raise InputError(
            f"simulation has no {min(absent)}, which the verdict is about; simulate with "
            "wanted=statistics.ALL, or with it among others"
        )


def _explained_by_other_widths(
    here: Differences, narrower: Sequence[Differences], wider: Differences | None, threshold: float
) -> np.ndarray:
    """Whether a difference, (layers,), changes with the width as a finite-width effect does."""
    explained = np.zeros(here.z.shape, bool)
    if narrower:
        at_widths = [(at.difference, at.standard_error) for at in (here, *narrower)]
        explained |= shrinks_with_the_width(at_widths, threshold)
    if wider is not None:
        rest = np.abs(wider.difference)
        explained |= rest < threshold * wider.standard_error
        explained |= rest < np.abs(here.difference) / _SHRUNK
    return explained


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
        Work out the effect of the network's width: by theory where it is known; where it is not,
        and differences are significant, by simulating at other widths.

    Returns
    -------
    Comparison
        Every statistic at every layer, and a verdict on the gradient.

    Raises
    ------
    InputError
        As `simulation.monte_carlo.simulate` does.
    """
    key = as_key(key)
    checked = as_inputs(inputs, network)
    # Beside the simulation: both spend most of their time in the compiler, on one core each.
    predict_all = _prediction(network, checked, finite_width=explain)

    with ThreadPoolExecutor(1) as pool:
        predicted = pool.submit(predict_all)
        simulation = simulate(
            network,
            checked,
            key=key,
            networks=networks,
            sampler=sampler,
            histograms=histograms,
            progress=progress,
        )
    theory, asymptotic = predicted.result()
    with_theory = _densities.predicted(network, theory.units, simulation.histograms)
    simulation = dataclasses.replace(simulation, histograms=with_theory)
    comparison = compare_results(
        theory.prediction,
        simulation,
        corrections=theory.corrections,
        asymptotic_log_chi=asymptotic,
    )
    if not explain:
        return comparison
    return explain_differences(comparison, inputs, key=key, sampler=sampler)


_NOT_SETTLED = (
    "weights have a mean, and what it multiplies, a mean over units, is near 0 and another number "
    "in each network: no theory knows the layers above"
)


def _prediction(
    network: Network, inputs: jax.Array, *, finite_width: bool
) -> Callable[[], tuple[_programs.Theory, float | None]]:
    """Trace all that the theory says; nothing but the reason where it does not know the network."""
    try:
        predict = _programs.prepare(network, inputs, finite_width=finite_width)
        if not has_means(network):
            log_chi = _programs.prepare_asymptotic_log_chi(network)
    except NoTheory as error:
        unknown = _limits.unknown(network, len(inputs), f"no theory: {error}")
        return lambda: (_programs.Theory(unknown, None, None), None)

    def predict_all() -> tuple[_programs.Theory, float | None]:
        theory = predict()
        if not has_means(network):
            return theory, log_chi(theory.prediction)
        if not np.isfinite(theory.prediction.values["log_gradient_norm"]).all():
            prediction = dataclasses.replace(theory.prediction, why_missing=_NOT_SETTLED)
            theory = theory._replace(prediction=prediction)
        return theory, None

    return predict_all


def explain_differences(
    comparison: Comparison, inputs: ArrayLike, *, key: PRNGKeyArray | int, sampler: str = "auto"
) -> Comparison:
    """Simulate at other widths, if any difference is left, to tell whether the width explains it.

    Parameters
    ----------
    comparison
        Of a network with its inputs, as `compare` returns it.
    inputs, key, sampler
        Those of its simulation. The networks of other widths have keys of their own.

    Returns
    -------
    Comparison
        The same, with differences that the width explains marked as `Status.FINITE_WIDTH`.

    Raises
    ------
    InputError
        If ``comparison`` is no comparison, or the inputs are not of the network's width.
    """
    check_instance("comparison", comparison, Comparison, "what compare returns")
    key = as_key(key)
    theory, simulation = comparison.theory, comparison.simulation
    network = simulation.network

    def at_width(other: Network, number: int, networks: int) -> tuple:
        """Simulation and theory of the network of another width."""
        measured = simulate(
            other,
            inputs,
            # Another key: the simulations must be independent to be extrapolated.
            key=jax.random.fold_in(key, (1 << 31) + number),
            networks=networks,
            sampler=sampler,
        )
        return measured, _limits.at_widths(theory, network, other)

    def compare_again(wider: tuple[Simulation, Prediction] | None = None) -> Comparison:
        again = compare_results(
            theory, simulation, corrections=comparison.corrections, narrower=narrower, wider=wider
        )
        # The first verdict knows χ further up.
        return dataclasses.replace(again, verdict=comparison.verdict)

    narrower: list[tuple[Simulation, Prediction]] = []
    for number, factor in enumerate(_NARROWER):
        if not comparison.count(Status.DIFFERS) or min(network.widths[1:]) < _NARROWER[0]:
            break
        if (other := _divided(network, factor)) is None:
            break
        narrower.append(at_width(other, number, factor * simulation.networks))
        comparison = compare_again()
    if comparison.count(Status.DIFFERS) and max(network.widths[1:]) <= _NARROW:
        wider = at_width(
            divide_widths(network, Fraction(1, _WIDER)), len(_NARROWER), simulation.networks
        )
        comparison = compare_again(wider)
    return comparison


def _divided(network: Network, factor: int | Fraction) -> Network | None:
    """The network of such widths, if there is one, of which all groups of channels divide them."""
    try:
        return divide_widths(network, factor)
    except InputError:
        return None


def _worst(one: StatisticComparison) -> float:
    differs = one.status == Status.DIFFERS
    return float(np.max(np.abs(one.z), where=differs, initial=0.0))
