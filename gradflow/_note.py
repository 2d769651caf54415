"""The main job: the claims of a study note on vanishing and exploding gradients, put to the test.

The note says that with the logistic sigmoid and N(0, 1) weights the variance grows from layer to
layer until the top layers saturate, that the logistic's mean of 0.5 makes it worse, and that a
saturated unit leaves no gradient for the layers below. Each claim is put to many random networks on
real images (handwritten digits) and to the theory, beside the settings that are said to be better.

The networks are those of a study file, `FILE`, which `execution.run` draws like any other:

    execution.run(note.study(), folder)
    findings = note.findings(folder)
"""

import dataclasses
import functools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from gradflow import activations, builders, data
from gradflow._arguments import from_seed
from gradflow._checks import check_count
from gradflow.activations import Activation
from gradflow.comparison import Comparison, compare_results, explain_differences
from gradflow.errors import InputError
from gradflow.estimation import Estimate
from gradflow.predictions import Corrections, Prediction
from gradflow.simulation.monte_carlo import Simulation, simulate
from gradflow.statistics import Statistic
from gradflow.statistics import chi as chi_statistic
from gradflow.studies import _plan, _results, _study_file
from gradflow.studies._plan import Program
from gradflow.studies._point import Point
from gradflow.studies._store import Store
from gradflow.studies._study import Study
from gradflow.theory import float64, mean_field
from gradflow.theory.finite_width import _layers

pass

__all__ = ["FILE", "Claim", "Findings", "Setting", "WidthSweep", "critical_width", "findings"]
__all__ += ["study"]

# The study file; `scripts/paper.toml` is the same.
FILE = Path(__file__).with_name("_note.toml")
# The note's names of the weights.
_NOTES = {
    "unscaled": "N(0,1)",
    "standard": "standard (uniform)",
    "normalized": "Glorot (uniform)",
    "glorot": "Glorot",
    "he": "He",
    "lecun": "LeCun",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One family of networks of the study."""

    activation: str
    weights: str

    @property
    def note(self) -> str:
        """The note's name of its weights."""
        return _NOTES[self.weights]

    @property
    def name(self) -> str:
        """The setting's name in tables and files."""
        return f"{self.activation}, {self.note}"


# The widths at which χ of un-scaled N(0, 1) networks is also measured.
_SWEEP_WIDTHS = (30, 103)
_SWEEP_DEPTH = 10
_SWEEP_NETWORKS = 400
# The networks of the paper's figures 6 and 7.
_PAPER_WIDTH, _PAPER_DEPTH, _PAPER_IMAGES, _PAPER_NETWORKS = 1000, 5, 10, 20
# Layers after which q is taken as its fixed point. A saturated length map forgets its start within
# a few (its slope is below 0.03 for logistic units from width 100 on).
_ITERATIONS = 200


@dataclasses.dataclass(frozen=True)
class Claim:
    """A proposition of the note, whether it holds, and the numbers that say so."""

    claim: str
    verdict: str
    found: str


@dataclasses.dataclass(frozen=True)
class WidthSweep:
    """χ of un-scaled N(0, 1) networks against width, by activation.

    Attributes
    ----------
    curves
        (widths, χ at the fixed point), theory.
    points
        (widths, χ halfway up, standard error), simulation.
    theory
        The theory's χ at the points' widths.
    critical_width
        Where the logistic's χ is 1.
    """

    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    points: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    theory: dict[str, np.ndarray]
    critical_width: float


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results of the study.

    Attributes
    ----------
    comparisons
        Theory beside simulation, for each setting.
    sweep
        χ against width.
    paper
        Five layers of 1000 tanh units with standard and with normalized weights, and histograms:
        the networks of Glorot & Bengio's figures 6 and 7.
    claims
        The note's propositions.
    """

    comparisons: dict[Setting, Comparison]
    sweep: WidthSweep
    paper: dict[str, Simulation]
    claims: tuple[Claim, ...]


def study(
    *,
    width: int = 1000,
    depth: int = 30,
    networks_gaussian: int = 1000,
    networks_uniform: int = 50,
    seed: int = 0,
) -> Study:
    """The study of `FILE` with other numbers in it, also in its text.

    Parameters
    ----------
    width, depth
        Of the networks: ``width`` inputs (an image's pixels, repeated), then ``depth`` layers.
    networks_gaussian, networks_uniform
        How many to draw for each setting: uniform weights must be drawn one by one, and are slow.
    seed
        Of everything that is random, from 0 to 2³² - 1.

    Raises
    ------
    InputError
        If a number is not a whole one in its range: of width and networks at least 2, of depth 3.
    """
    width, depth = check_count("width", width, 2), check_count("depth", depth, 3)
    check_count("networks_gaussian", networks_gaussian, 2)
    check_count("networks_uniform", networks_uniform, 2)
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed is {seed}; it is a whole number from 0 to {(1 << 32) - 1}")
    text = FILE.read_text(encoding="utf-8")
    counts = [
        networks_gaussian if point.network().iid_gaussian else networks_uniform
        for point in _study_file.parse(text).points()
    ]
    for field, value in {
        "width": width,
        "depth": depth,
        "input_width": width,
        "networks": counts,
        "seed": seed,
    }.items():
        text = re.sub(rf"(?m)^{field} = (\d+|\[.*\])", f"{field} = {value}", text)
    return _study_file.parse(text)


def findings(folder: Path) -> Findings:
    """Test the note's claims on the results of a finished run of `study`.

    The sweep over width and the paper's own networks are drawn here, each time the same ones.

    Raises
    ------
    InputError
        If the folder holds no study.
    """
    store = Store.of(folder)
    width, seed = store.study.base["width"], store.study.base["seed"]
    key, settings = from_seed(seed), len(store.study)
    known = _known(store)
    # Several at a time: while one compiles, which uses a single core, another runs.
    with ThreadPoolExecutor(2) as pool:
        paper = pool.submit(_paper_networks, jax.random.fold_in(key, settings))
        narrower = pool.submit(_narrower_chi, jax.random.fold_in(key, settings + 1), width)
        comparisons = dict(pool.map(_comparison, (known[number] for number in sorted(known))))
    sweep = _sweep(comparisons, narrower.result())
    return Findings(comparisons, sweep, paper.result(), _claims(comparisons, sweep))


@dataclasses.dataclass(frozen=True)
class _Known:
    """A point's measurements and theory in the store; arrays of shape (statistics, layers)."""

    point: Point
    statistics: tuple[Statistic, ...]
    estimates: Estimate
    failures: np.ndarray
    theory: dict[str, np.ndarray]
    program: Program
    dtype: str

    def by_key(self, values: np.ndarray) -> dict[str, jax.Array | np.ndarray]:
        """The rows of an array, each by the key of its statistic."""
        return dict(zip((s.key for s in self.statistics), values, strict=True))

    def simulation(self) -> Simulation:
        """The measurements as those of `simulate`, without the seconds that they took."""
        overflowed, vanished = self.failures
        counts = self.estimates.count + self.estimates.excluded
        return Simulation(
            estimates={
                s.key: jax.tree.map(lambda leaf, row=row: leaf[row], self.estimates)
                for row, s in enumerate(self.statistics)
            },
            histograms={},
            samples={},
            overflowed=overflowed,
            vanished=vanished,
            network=self.point.network(),
            statistics=self.statistics,
            sites=self.program.sites,
            networks=int(counts.max()),
            sampler=self.program.sampler,
            reason=self.program.reason,
            dtype=self.dtype,
            seconds=math.nan,
            compile_seconds=math.nan,
        )


def _known(store: Store) -> dict[int, _Known]:
    """The measurements and theory of all points in the store, by the points' numbers."""
    study, known = store.study, {}
    for program in _plan.programs(study):
        total = store.rounds.measurements(program.names)
        if total is None:
            continue
        theory = _results.theory_of(program, store, total)
        for row, number in enumerate(program.numbers.tolist()):
            known[number] = _Known(
                point=study.point(number),
                statistics=tuple(study.statistics),
                estimates=jax.tree.map(lambda leaf, row=row: leaf[row], total.estimates),
                failures=total.failures[row],
                theory={name: values[row] for name, values in theory.items()},
                program=program,
                dtype=study.sampling.dtype,
            )
    return known


def _comparison(known: _Known) -> tuple[Setting, Comparison]:
    """A setting, and its comparison as of `comparison.compare`."""
    point, simulation = known.point, known.simulation()
    theory = Prediction(known.by_key(known.theory["predicted"]))
    of_this_width = None
    if _layers.covers(simulation.network):
        shift, deviation = (known.by_key(known.theory[name]) for name in ("shift", "deviation"))
        of_this_width = Corrections(shift, deviation)
    compared = compare_results(
        theory,
        simulation,
        corrections=of_this_width,
        asymptotic_log_chi=float64.asymptotic_log_chi(simulation.network, theory),
    )
    inputs = point.inputs().astype(known.dtype)
    setting = Setting(point.settings["activation"], point.settings["weights"])
    return setting, explain_differences(compared, inputs, key=point.key)


def _paper_networks(key: jax.Array) -> dict[str, Simulation]:
    inputs = jnp.asarray(data.inputs(_PAPER_WIDTH, input="digits", batch=_PAPER_IMAGES))

    def simulated(weights: str) -> Simulation:
        network = builders.mlp([_PAPER_WIDTH] * (_PAPER_DEPTH + 1), "tanh", weights)
        simulation = simulate(
            network, inputs, key=key, networks=_PAPER_NETWORKS, wanted=(), histograms=True
        )
        with_theory = float64.densities(network, inputs, simulation.histograms)
        return dataclasses.replace(simulation, histograms=with_theory)

    return {weights: simulated(weights) for weights in ("standard", "normalized")}


def critical_width(activation: Activation) -> float:
    """The width at which un-scaled N(0, 1) weights make χ = 1 at the fixed point q*.

    Width is σ_w² = n Var W here, and continuous. Solved in float64 to 1e-12.

    Raises
    ------
    ValueError
        If χ does not cross 1 between widths 2 and 1e5.
    """

    def excess(log_width: float) -> float:
        return math.log(_chi_at_fixed_point(activation, np.array([math.exp(log_width)]))[0])

    return math.exp(scipy.optimize.brentq(excess, math.log(2), math.log(1e5), xtol=1e-13))


def _chi_at_fixed_point(activation: Activation, sigma_w2: np.ndarray) -> np.ndarray:
    """χ at the q that the length map tends to, in float64, for σ_w² well away from criticality."""
    return _at_fixed_point(activation, sigma_w2)[1]


def _at_fixed_point(activation: Activation, sigma_w2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The q that the length map tends to, and χ there."""
    with jax.enable_x64(True):
        q, chi = _iterated(activation, jnp.asarray(sigma_w2, jnp.float64))
        return np.asarray(q), np.asarray(chi)


@functools.partial(jax.jit, static_argnums=0)
def _iterated(activation: Activation, sigma_w2: jax.Array) -> tuple[jax.Array, jax.Array]:
    def one(sigma_w2: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = jax.lax.fori_loop(
            0,
            _ITERATIONS,
            lambda _, q: mean_field.length_map(activation, q, sigma_w2),
            sigma_w2 * mean_field.length_map(activation, sigma_w2, 1.0),
        )
        return q, mean_field.chi(activation, q, sigma_w2)

    return jax.vmap(one)(sigma_w2)


def _narrower_chi(key: jax.Array, width: int) -> dict[int, Estimate]:
    """χ of logistic networks with N(0, 1) weights, of the widths below the study's own."""
    return {
        n: simulate(
            builders.mlp([n] * (_SWEEP_DEPTH + 1), "logistic", "unscaled"),
            jnp.asarray(data.inputs(n, input="digits")),
            key=jax.random.fold_in(key, n),
            networks=_SWEEP_NETWORKS,
            wanted=(chi_statistic,),
        )["chi"]
        for n in _SWEEP_WIDTHS
        if n < width
    }


def _sweep(comparisons: dict[Setting, Comparison], narrower: dict[int, Estimate]) -> WidthSweep:
    """χ against width: the study's own networks, and narrower logistic ones."""
    widths = np.geomspace(10, 3000, 60)
    curves, points, theory = {}, {}, {}
    for setting, comparison in comparisons.items():
        if setting.weights != "unscaled":
            continue
        phi, own = activations.get(setting.activation), comparison.simulation
        measured = {own.network.widths[1]: own["chi"]}
        if setting.activation == "logistic":
            measured = narrower | measured
        # One layer, halfway: layers of one network are not independent.
        middle = [(len(m.value) // 2, m) for m in measured.values()]
        points[phi.name] = (
            np.array(list(measured)),
            np.array([m.value[layer] for layer, m in middle]),
            np.array([m.standard_error[layer] for layer, m in middle]),
        )
        # In one array: each length of it is a program to compile.
        chi = _chi_at_fixed_point(phi, np.concatenate([widths, points[phi.name][0]]))
        curves[phi.name], theory[phi.name] = (widths, chi[: len(widths)]), chi[len(widths) :]
    return WidthSweep(curves, points, theory, critical_width(activations.logistic))


def _claims(comparisons: dict[Setting, Comparison], sweep: WidthSweep) -> tuple[Claim, ...]:
    """Each of the note's propositions beside the numbers of theory and simulation."""
    by_name = {setting.name: comparison for setting, comparison in comparisons.items()}
    return (
        *_claims_on_signals(by_name, sweep),
        *_claims_on_gradients(by_name, sweep),
        _claim_on_speeds(by_name),
    )


def _claims_on_signals(by_name: dict[str, Comparison], sweep: WidthSweep) -> tuple[Claim, ...]:
    unscaled, tanh = by_name["logistic, N(0,1)"], by_name["tanh, N(0,1)"]
    input_square = float(np.mean(data.digits()[:2] ** 2))
    variance = [_value(unscaled, "preactivation_variance", i) for i in (0, 1, -1)]
    outputs = [_value(unscaled, "activation_variance", i) for i in (0, -1)]
    saturated = [100 * _value(unscaled, "saturation", i) for i in (0, -1)]
    grows = variance[1] > variance[0]
    with_correlation = [_value(c, "correlation", -1) for c in (unscaled, tanh)]
    centred = critical_sigma_w2_of_centred_logistic()
    return (
        Claim(
            "Each layer's outputs have a much larger variance than its inputs (logistic, N(0,1))",
            "imprecise",
            f"true of pre-activations at layer 1 (mean square {input_square:.2f} of the input -> "
            f"variance {variance[0]:.3g}), false of outputs: {outputs[0]:.3f} at layer 1, "
            f"{outputs[1]:.3f} at the top; they cannot exceed 1/4",
        ),
        Claim(
            "The variance keeps increasing until the top layers saturate",
            "true" if grows else "false at initialisation",
            f"variance of pre-activations {variance[0]:.3g} -> {variance[1]:.3g} -> "
            f"{variance[2]:.3g} at layers 1, 2 and last; saturated units {saturated[0]:.0f} % at "
            f"layer 1, {saturated[1]:.0f} % at the last: every layer is, from the first on",
        ),
        Claim(
            "The logistic's mean of 0.5 makes it worse, tanh (mean 0) is slightly better",
            "true of information, false of gradients",
            f"two images' correlation at the last layer: logistic {with_correlation[0]:.2f} (their "
            f"difference is lost; c = 1/2 + asin(c)/π of a step function gives 0.79), "
            f"tanh {with_correlation[1]:.2f}; the mean moves the critical "
            f"n Var W from {centred:.0f} (logistic - 1/2) to {sweep.critical_width:.1f}; but tanh "
            f"explodes faster: ×{tanh.verdict.factor:.3g} a layer against "
            f"×{unscaled.verdict.factor:.3g}",
        ),
    )


def _claims_on_gradients(by_name: dict[str, Comparison], sweep: WidthSweep) -> tuple[Claim, ...]:
    unscaled, glorot = by_name["logistic, N(0,1)"], by_name["logistic, Glorot"]
    tanh = by_name["tanh, N(0,1)"]
    width = unscaled.simulation.network.widths[1]
    (critical_q,), _ = _at_fixed_point(activations.logistic, np.array([sweep.critical_width]))
    # n Var W of the paper's standard weights is 1/3.
    _, (standard_chi,) = _at_fixed_point(activations.logistic, np.array([1 / 3]))
    return (
        Claim(
            "A saturated unit's derivative is close to 0, so nothing is left for the lower layers",
            _nothing_left(unscaled),
            f"at width {width} few units are left unsaturated, but each passes its gradient "
            f"through weights of size 1: ×{unscaled.verdict.factor:.3g} a layer "
            f"(√χ = {_chi_root(unscaled):.3g} at the fixed point); χ crosses 1 at width "
            f"{sweep.critical_width:.1f} (q* = {critical_q:.2f}): narrower N(0,1) networks vanish "
            "slightly, wider ones explode",
        ),
        Claim(
            "Vanishing: the lower layers hardly change",
            "true, for scaled weights" if glorot.verdict.kind == "vanishing" else "not found",
            f"logistic with Glorot weights: ×{glorot.verdict.factor:.3g} a layer (theory "
            f"√χ = {_chi_root(glorot):.3g}); with the "
            f"paper's standard U[±1/√n] theory says ×{math.sqrt(standard_chi):.3g}",
        ),
        Claim(
            "Exploding: gradients grow on the way down",
            "true" if tanh.verdict.kind == "exploding" else "not found",
            f"tanh with N(0,1) weights: ×{tanh.verdict.factor:.3g} a layer (theory "
            f"×{tanh.verdict.factor_theory:.3g})",
        ),
    )


def _claim_on_speeds(by_name: dict[str, Comparison]) -> Claim:
    speeds = {name: _speed_spread(c) for name, c in by_name.items()}
    slowest = max(speeds, key=lambda name: speeds[name])
    weight_spread = _speed_spread(by_name["tanh, Glorot (uniform)"])
    weights_vanish = by_name["tanh, standard (uniform)"]
    return Claim(
        "Layers learn at widely different speeds",
        "true of some settings, not of zero-mean activations with scaled weights",
        f"largest over smallest r.m.s. of ∂C/∂W relative to the weights' own, over layers 2 to "
        f"last: {speeds[slowest]:.2g} ({slowest}), {weight_spread:.2f} (tanh, Glorot uniform: "
        f"eq. 14, weight gradients alike in all layers), {_speed_spread(weights_vanish):.2g} "
        f"(tanh, standard: alike too, and all vanish, to {_weight_gradient(weights_vanish):.0e}"
        " of the top's ∂C/∂z: the ratio of layers detects nothing)",
    )


def _value(comparison: Comparison, name: str, layer: int) -> float:
    """The measured value of a statistic at a layer."""
    return float(comparison.simulation[name].value[layer])


def _chi_root(comparison: Comparison) -> float:
    """The theory's factor of the gradient's norm a layer, √χ, at the highest layer that has one."""
    return math.sqrt(float(np.asarray(comparison.theory["chi"])[-2]))


def critical_sigma_w2_of_centred_logistic() -> float:
    """The critical n Var W of φ(z) = σ(z) - 1/2: q* is 0, so it is 1/φ'(0)² = 16."""
    return float(1 / activations.logistic.derivative(jnp.zeros(())) ** 2)


def _nothing_left(unscaled: Comparison) -> str:
    return {
        "exploding": "false at initialisation",
        "critical": "false at initialisation, at this width",
        "vanishing": "true at this width, though not because of it",
    }[unscaled.verdict.kind]


def _weight_gradient(comparison: Comparison) -> float:
    """R.m.s. of ∂C/∂W halfway up, for a top gradient of mean square 1."""
    values = comparison.simulation.estimates["log_weight_gradient_variance"].log_value
    return math.exp(values[len(values) // 2] / 2)


def _speed_spread(comparison: Comparison) -> float:
    """Largest over smallest r.m.s. weight gradient over layers 2…L, whose weights are alike."""
    log_square = comparison.simulation.estimates["log_weight_gradient_variance"].log_value[1:]
    return float(np.exp((log_square.max() - log_square.min()) / 2))
