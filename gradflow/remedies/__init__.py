"""How to tackle vanishing and exploding gradients: a sick network, and every remedy beside it.

Each remedy, a row of `table.ALL`, is the sick network with one thing changed (the weights, the
activation, a normalisation, a path past the layers), or several that are usually changed together.
Networks are compared at the start of training, where bounds on a step, such as gradient clipping,
change nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from gradflow import activations, data, ensembles, networks
from gradflow._arguments import as_real, from_seed
from gradflow._checks import check_count, unknown_name
from gradflow._programs import program
from gradflow.activations import ActivationLike
from gradflow.comparison import Comparison, compare
from gradflow.ensembles import Ensemble
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.predictions import Prediction
from gradflow.remedies import _transformers
from gradflow.remedies._table import ALL, AS_IT_IS, Remedy, SickNetwork
from gradflow.simulation import jacobians, singular_values

__all__ = ["ALL", "Outcome", "Remedies", "Remedy", "SickNetwork", "proposals", "run"]

# What remedies there are for: layers of weights, and transformers.
_KINDS = ("mlp", "transformer")
# What an `mlp` may have beside its weights and activation.
_OPTIONS = ("norm", "norm_position", "keep_rate", "last")

# Networks train up to a depth of 6 ξ (Schoenholz et al. 2017, arXiv:1611.01232, section 5).
_TRAINABLE = 6.0
# The width of networks whose end-to-end Jacobian is decomposed, and their number.
_CONDITION_WIDTH, _CONDITION_NETWORKS = 100, 5
# A change of the correlation in the top layers of this size, or less, is rounding.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a remedy does, in theory and measured.

    Attributes
    ----------
    remedy
        The remedy.
    network
        The network that it makes of the sick one.
    comparison
        Theory beside simulation.
    gradient, gradient_theory
        The factor of the gradient's norm ‖∂C/∂z‖ going down one layer, geometric mean: the
        verdict's.
    variance, variance_theory
        The factor of the mean square q of a layer's signal going up one layer, geometric mean.
    correlation, correlation_theory
        Of two inputs' signals in the top layer.
    trainable_depth
        In layers: 6 times the lesser of the depth scales of the gradient (over the whole network)
        and of the correlation (where it approaches its limit, in the top layers); inf if neither
        changes.
    log10_condition_number
        Of the end-to-end Jacobian of one input, without the first and last layer's change of width;
        inf where units are dead. Median over some networks of the width, 100 at most. NaN where one
        input alone has none (BatchNorm, LSUV).
    parameters, multiplications
        Weights and biases, and products of one input's forward pass, relative to the sick network.
    """

    remedy: Remedy
    network: Network
    comparison: Comparison
    gradient: float
    gradient_theory: float
    variance: float
    variance_theory: float
    correlation: float
    correlation_theory: float
    trainable_depth: float
    log10_condition_number: float
    parameters: float
    multiplications: float


@dataclasses.dataclass(frozen=True)
class Remedies:
    """The sick network's outcome, and the remedies', those that train deepest first.

    ``not_applicable`` are the names of remedies that do not apply to this network, with the reason.
    """

    sick: Outcome
    outcomes: tuple[Outcome, ...]
    not_applicable: dict[str, str]


_Progress = Callable[[str, int, int], None]


def run(
    activation: ActivationLike = "logistic",
    weights: Ensemble | str = "unscaled",
    *,
    sigma_b: float | None = None,
    kind: str = "mlp",
    width: int = 200,
    depth: int = 30,
    inputs: int | ArrayLike | None = None,
    networks_each: int = 200,
    seed: int = 0,
    progress: _Progress | None = None,
    **options: Any,
) -> Remedies:
    """Compare theory and simulation for a sick network and for every remedy, and rank remedies.

    Parameters
    ----------
    activation, weights, sigma_b
        Of the sick network; the note's, the logistic with N(0, 1) weights, without them.
    kind
        What it is: mlp, or transformer.
    width, depth
        Units a layer, and layers.
    inputs
        Those that go through each network, shape (inputs, components), or how many digit images,
        resized to as many components as units: at least 4, the least batch that BatchNorm's theory
        has an answer for; 8 without it. Of a transformer, shape (inputs · tokens, components), or
        how many inputs of uncorrelated tokens; 1 without it.
    networks_each
        How many networks to draw for each remedy, at least 2.
    seed
        Of everything that is random.
    progress
        Called with (remedy, networks done, networks in all).
    options
        Others of the sick network, by their names in `builders.mlp`: norm, norm_position,
        keep_rate, last; or in `builders.transformer`, any of them.

    Raises
    ------
    InputError
        If a number is out of range or a name is unknown.
    """
    width, depth = check_count("width", width, 2), check_count("depth", depth, 3)
    check_count("networks_each", networks_each, 2)
    x = _inputs(inputs, width, options.get("tokens", 1))
    if x.ndim != 2 or len(x) < (4 if kind == "mlp" else 1):
        raise InputError(f"inputs has shape {x.shape}; it is (inputs, components), at least 4")
    options |= {"sigma_b": sigma_b, "kind": kind, "inputs": x}
    proposed, missing = proposals(activation, weights, width, depth, **options)
    key = from_seed(seed)
    size = _size(proposed[0][1])

    def outcome(index: int) -> Outcome:
        remedy, network = proposed[index]
        comparison = compare(
            network,
            x,
            key=jax.random.fold_in(key, index),
            networks=networks_each,
            progress=progress and (lambda done, total: progress(remedy.name, done, total)),
        )
        condition = _log10_condition_number(
            network, jnp.asarray(x[0]), jax.random.fold_in(key, index)
        )
        return _outcome(remedy, network, comparison, condition, size)

    # Two at a time: while one compiles, which uses a single core, the other runs.
    with ThreadPoolExecutor(2) as pool:
        sick, *outcomes = pool.map(outcome, range(len(proposed)))
    ranked = sorted(outcomes, key=lambda o: (-o.trainable_depth, abs(math.log(o.gradient_theory))))
    return Remedies(sick, tuple(ranked), missing)


def _inputs(inputs: int | ArrayLike | None, width: int, tokens: int) -> np.ndarray:
    """The inputs that are given, or so many that are made."""
    least, usual, made = (4, 8, "digits") if tokens == 1 else (1, 1, "cosines")
    inputs = usual if inputs is None else inputs
    if isinstance(inputs, Integral | bool):
        batch = check_count("inputs", inputs, least)
        return data.inputs(width, input=made, batch=batch, tokens=tokens)
    return np.asarray(as_real("inputs", inputs))


def proposals(
    activation: ActivationLike,
    weights: Ensemble | str,
    width: int,
    depth: int,
    *,
    kind: str = "mlp",
    sigma_b: float | None = None,
    inputs: np.ndarray | None = None,
    **options: Any,
) -> tuple[list[tuple[Remedy, Network]], dict[str, str]]:
    """The sick network and the networks of all remedies, and why other remedies do not apply.

    Parameters
    ----------
    activation, weights, sigma_b, kind, width, depth, options
        As for `run`.
    inputs
        Shape (inputs, components), of as many components as a layer has units without it.

    Raises
    ------
    InputError
        If a number is out of range or a name is unknown.
    """
    phi, ensemble = activations.get(activation), ensembles.get(weights)
    if kind not in _KINDS:
        raise unknown_name("kind", kind, _KINDS)
    components = None if inputs is None else inputs.shape[1]
    sick: Any
    if kind == "mlp":
        for name in options:
            if name not in _OPTIONS:
                raise unknown_name("option", name, _OPTIONS)
        table: Sequence[Remedy] = ALL
        sick = SickNetwork(phi, ensemble, width, depth, sigma_b, components, options=options)
        as_it_is = sick.mlp()
    else:
        table, tokens = _transformers.ALL, check_count("tokens", options.get("tokens"))
        own = {"activation": phi, "weights": ensemble, "width": width, "depth": depth}
        own |= {"sigma_b": sigma_b, "input_width": components, **options}
        x = data.inputs(width, tokens=tokens) if inputs is None else inputs
        sick = _transformers.SickTransformer(own, x)
        as_it_is = sick.made()
    applicable = [(AS_IT_IS, as_it_is)]
    missing: dict[str, str] = {}
    for remedy in table:
        try:
            network = remedy.make(sick)
        except InputError as error:
            missing[remedy.name] = str(error)
        else:
            if network is not None:
                applicable.append((remedy, network))
    return applicable, missing


def _outcome(
    remedy: Remedy,
    network: Network,
    comparison: Comparison,
    condition: float,
    size: tuple[int, int],
) -> Outcome:
    theory, simulation = comparison.theory, comparison.simulation
    parameters, multiplications = _size(network)
    return Outcome(
        remedy=remedy,
        network=network,
        comparison=comparison,
        gradient=comparison.verdict.factor,
        gradient_theory=comparison.verdict.factor_theory,
        variance=_a_layer(comparison["q"].measured),
        variance_theory=_a_layer(comparison["q"].theory),
        correlation=float(simulation["correlation"].value[network.depth - 1]),
        correlation_theory=float(np.asarray(theory["correlation"])[-1]),
        trainable_depth=_trainable_depth(theory, comparison.verdict.factor_theory),
        log10_condition_number=condition,
        parameters=parameters / size[0],
        multiplications=multiplications / size[1],
    )


def _a_layer(log: np.ndarray) -> float:
    """The geometric mean of a quantity's factor going up one layer, from its logarithms."""
    return float(np.exp((log[-1] - log[0]) / (len(log) - 1)))


def _trainable_depth(theory: Prediction, gradient_factor: float) -> float:
    """The smaller depth scale of gradients and of correlations times 6, in layers."""
    rates = [2 * abs(math.log(gradient_factor))]
    steps = np.abs(np.diff(np.asarray(theory["correlation"])[-3:]))
    if steps[0] > _ROUNDING and steps[1] > _ROUNDING:
        rates.append(abs(math.log(steps[1] / steps[0])))
    fastest = max(rates)
    return _TRAINABLE / fastest if fastest > _ROUNDING else math.inf


def _size(network: Network) -> tuple[int, int]:
    """The numbers of weights and biases, and of products of one input's forward pass."""
    weights = sum(n_out * n_in for layer in network.shapes for n_out, n_in in layer)
    units = sum(n_out for layer in network.shapes for n_out, _ in layer)
    return weights + units, weights


def _log10_condition_number(network: Network, x: jax.Array, key: jax.Array) -> float:
    if network.mixes_sites:
        return math.nan
    factor = max(1, max(network.widths) // _CONDITION_WIDTH)
    narrow = networks.divide_widths(network, factor) if factor > 1 else network
    keys = jax.random.split(key, _CONDITION_NETWORKS)
    logs = _log_condition_numbers(narrow.as_arrays(x.dtype), x, keys)
    return float(np.median(np.asarray(logs))) / math.log(10)


@program(seconds=1.0, twice=True)
def _log_condition_numbers(network: Network, x: jax.Array, keys: jax.Array) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        # Without the first layer, which goes from the inputs' width to the layers'.
        factors = jacobians.layer_jacobians(network, x, key)[1:]
        return singular_values.log_singular_values(factors).log_condition_number

    return jax.lax.map(one, keys)
