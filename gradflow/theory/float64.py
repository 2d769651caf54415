"""Theory in float64, whatever JAX's x64 setting: of a network and its inputs, as NumPy arrays.

Each function here is compiled once for networks of one structure. Nothing in the compiled programs
traces, so that theory may be worked out in one thread while another simulates.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from gradflow._checks import check_instance
from gradflow._compilation import Float64Program
from gradflow._first_order import FiniteLayers
from gradflow.estimation import Histogram
from gradflow.networks import Network, check_network, checked_inputs
from gradflow.predictions import Corrections, Prediction
from gradflow.theory import _densities, mean_field
from gradflow.theory._limits import limits, prediction
from gradflow.theory.finite_width import carried_means, first_order
from gradflow.theory.finite_width._layers import finite_layers

__all__ = ["asymptotic_log_chi", "compile_programs", "correct", "densities", "layers_ahead"]
__all__ += ["predict", "predict_and_correct", "prepare", "prepare_asymptotic_log_chi"]

# Seconds that the theory takes for each layer: 2 ms with closed forms, 13 ms without.
_SECONDS_A_LAYER = 0.005
# χ is looked at this many times the depth further up, because χ may tend to 1 only as 1 - a/l.
_LOOK_AHEAD = 64
_MOST_LAYERS_AHEAD = 20_000
# A relative change of χ in a layer below which it is taken as settled; algebraic approaches, a/l²,
# get there after 1e5 layers.
_SETTLED = 1e-10


def predict(network: Network, inputs: ArrayLike) -> Prediction:
    """Every statistic's infinite-width value at every layer, by `mean_field.predict` in float64.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (sites, n_0).

    Returns
    -------
    Prediction
        NumPy arrays of shape (layers,), by statistic key.

    Raises
    ------
    InputError
        If the inputs are not of the network's width, or the theory does not know a block.
    """
    arguments = _arguments(network, inputs)
    return _program(mean_field.predict, *arguments)(*arguments)


def correct(network: Network, inputs: ArrayLike) -> Corrections | None:
    """The effect of the network's width on every statistic, in float64; None where it is not known.

    By `finite_width.carried_means.correct` for networks that carry a mean over units along, else by
    `finite_width.first_order.correct`.

    Parameters
    ----------
    network, inputs
        As for `predict`.

    Raises
    ------
    InputError
        If the inputs are not of the network's width.
    """
    arguments = _arguments(network, inputs)[:2]
    for theory in (carried_means, first_order):
        if theory.covers(network):
            return _program(theory.correct, *arguments)(*arguments)
    return None


def predict_and_correct(
    network: Network, inputs: ArrayLike, *, finite_width: bool = True
) -> tuple[Prediction, Corrections | None]:
    """The results of `predict` and `correct`, which share most of their work.

    Parameters
    ----------
    network, inputs
        As for `predict`.
    finite_width
        Whether corrections are wanted; without it the second result is None.

    Raises
    ------
    InputError
        As `predict` does.
    """
    return prepare(network, inputs, finite_width=finite_width)()


def prepare(
    network: Network, inputs: ArrayLike, *, finite_width: bool = True
) -> Callable[[], tuple[Prediction, Corrections | None]]:
    """Trace `predict_and_correct` now: a function without arguments that any thread may call."""
    arguments = _arguments(network, inputs)
    predicts, *corrects = _programs(*arguments, finite_width)

    def run() -> tuple[Prediction, Corrections | None]:
        result = predicts(*arguments)
        if isinstance(result, Prediction):
            return result, None
        predicted, more = result
        return predicted, corrects[0](more) if corrects else more

    return run


def compile_programs(network: Network, inputs: ArrayLike, *, finite_width: bool = True) -> None:
    """Compile `predict_and_correct` for networks of this structure, unless it is compiled already.

    Parameters
    ----------
    network, inputs, finite_width
        As for `predict_and_correct`.
    """
    for program in _programs(*_arguments(network, inputs), finite_width):
        program.compile()


def densities(
    network: Network, inputs: ArrayLike, histograms: Mapping[str, Histogram]
) -> dict[str, Histogram]:
    """Histograms of these inputs' signals, each with its density at infinite width, ``theory``.

    Parameters
    ----------
    network, inputs
        As for `predict`.
    histograms
        By the name of the signal, as a simulation has them.
    """
    arguments = _arguments(network, inputs)
    forward, backward = _program(limits, *arguments)(*arguments)
    return _densities.predicted(network, forward, backward, histograms)


def asymptotic_log_chi(network: Network, theory: Prediction) -> float:
    """Log χ where the network would be with many more layers, for `verdict.judge`.

    Parameters
    ----------
    network
        The law of the network.
    theory
        Its prediction: where the further layers begin.
    """
    check_network(network)
    check_instance("theory", theory, Prediction, "what theory.mean_field.predict returns")
    return prepare_asymptotic_log_chi(network)(theory)


def prepare_asymptotic_log_chi(network: Network) -> Callable[[Prediction], float]:
    """Trace `asymptotic_log_chi` now: a function of the prediction that any thread may call."""
    if network.mixes_sites:
        # The top gradient, independent for each input, is no gradient of a layer below BatchNorm:
        # the next layer's χ is the first that is like all others, of the longest stage.
        longest = max(range(len(network.stages)), key=lambda n: (network.stages[n].repeats, n))
        last = sum(stage.repeats for stage in network.stages[: longest + 1])
        return lambda theory: math.log(theory.values["chi"][max(last - 3, 0)])
    beyond = layers_ahead(network.depth)
    log_chi = _program(mean_field.asymptotic_log_chi, network, 0.0, beyond=beyond)

    def further_up(theory: Prediction) -> float:
        chi = np.asarray(theory.values["chi"])
        if network.depth > 2 and abs(chi[-2] / chi[-3] - 1) < _SETTLED and len(network.stages) < 3:
            return math.log(chi[-2])
        return float(log_chi(network, theory.values["log_q"][-1]))

    return further_up


def layers_ahead(depth: int) -> int:
    """The number of layers above a network of this depth after which its χ is looked at."""
    return min(_LOOK_AHEAD * depth, _MOST_LAYERS_AHEAD)


def _arguments(network: Network, inputs: ArrayLike) -> tuple[Network, np.ndarray, np.ndarray]:
    """The arguments of the theory: a network without a name, and its inputs' moments.

    By NumPy, as JAX would trace.
    """
    x = np.asarray(checked_inputs(inputs, network), np.float64)
    return dataclasses.replace(network, name=""), x @ x.T / x.shape[1], x.mean(axis=1)


def _programs(
    network: Network, gram: np.ndarray, mean: np.ndarray, finite_width: bool
) -> list[Float64Program]:
    """The program of the prediction and, where it is a second one, that of the corrections.

    The first then also returns the second one's argument.
    """
    arguments = (network, gram, mean)
    if finite_width and carried_means.covers(network):
        return [_program(_predict_and_correct_carried_means, *arguments)]
    if not (finite_width and first_order.covers(network)):
        return [_program(mean_field.predict, *arguments)]
    predicts = _program(_predict_and_prepare, *arguments)
    layers = predicts.result[1]
    return [predicts, _program(first_order.correct_layers, layers, depth=network.depth)]


def _predict_and_prepare(
    network: Network, gram: ArrayLike, mean: ArrayLike
) -> tuple[Prediction, FiniteLayers]:
    both = limits(network, gram, mean)
    return prediction(*both), finite_layers(network, *both)


def _predict_and_correct_carried_means(
    network: Network, gram: ArrayLike, mean: ArrayLike
) -> tuple[Prediction, Corrections]:
    both = limits(network, gram, mean)
    return prediction(*both), carried_means.correct_limits(network, *both)


def _program(
    function: Callable, *arguments: Any, depth: int | None = None, **static: int
) -> Float64Program:
    """The program of a function of a network, or of layers of this depth."""
    seconds = _SECONDS_A_LAYER * (arguments[0].depth if depth is None else depth)
    return Float64Program.of(function, arguments, seconds, **static)
