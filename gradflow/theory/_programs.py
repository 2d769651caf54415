"""Programs of the theory, traced in float64: compiled once for networks of one structure.

Tracing and calling are apart, so that theory may be worked out in one thread while another
simulates: a traced program traces nothing when it is called.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from gradflow._first_order import FiniteLayers
from gradflow._inputs import checked_inputs
from gradflow._programs import Float64Program
from gradflow.errors import NoTheory
from gradflow.networks import Network
from gradflow.predictions import Corrections, Prediction
from gradflow.theory import _limits
from gradflow.theory._densities import UnitLimits
from gradflow.theory._limits import SECONDS_A_LAYER, limits, prediction
from gradflow.theory.finite_width import _carried_means, _layers, first_order
from gradflow.theory.finite_width._layers import finite_layers

__all__ = ["PreparedNetworks", "Theory", "arguments_of", "layers_ahead", "prepare"]
__all__ += ["prepare_asymptotic_log_chi", "program", "why_unknown"]

# Seconds that the averages take over a pair of inputs in a layer.
_SECONDS_A_PAIR = 0.0026
# χ is looked at this many times the depth further up, because χ may tend to 1 only as 1 - a/l.
_LOOK_AHEAD = 64
_MOST_LAYERS_AHEAD = 20_000
# A relative change of χ in a layer below which it is taken as settled; algebraic approaches, a/l²,
# get there after 1e5 layers.
_SETTLED = 1e-10


class Theory(NamedTuple):
    """What theory says of a network.

    Attributes
    ----------
    prediction
        The infinite-width limit of every statistic.
    units
        The limits that single units' signals have; None if layers differ in their sites.
    corrections
        What the width does; None where it is not known, or not wanted.
    """

    prediction: Prediction
    units: UnitLimits | None
    corrections: Corrections | None


def prepare(
    network: Network, inputs: ArrayLike, *, finite_width: bool = True
) -> Callable[[], Theory]:
    """Trace the theory of a network: a function without arguments, for any thread."""
    arguments = arguments_of(network, inputs)
    return functools.partial(_run, _programs(arguments[0], arguments, finite_width), arguments)


def why_unknown(network: Network, inputs: ArrayLike) -> str | None:
    """Why no theory knows a network, in a sentence; None if one does."""
    try:
        jax.eval_shape(limits, *arguments_of(network, inputs))
    except NoTheory as error:
        return str(error)
    return None


class PreparedNetworks:
    """The theory of many networks of one structure, ``together`` at a time."""

    # Networks that a call takes, and the most pairs of inputs that they have in all.
    _NETWORKS, _PAIRS = 64, 256
    # Of a call's networks, those that are worked out side by side: their numbers fit into a cache.
    _SIDE_BY_SIDE = 8

    def __init__(
        self, network: Network, inputs: ArrayLike, most: int, *, finite_width: bool = True
    ) -> None:
        """Trace the programs for networks of the structure of this one, with as many inputs.

        There will be ``most`` of them.
        """
        arguments = arguments_of(network, inputs)
        sites = len(arguments[1])
        allowed = max(1, self._PAIRS // (sites * (sites + 1) // 2))
        each = min(self._SIDE_BY_SIDE, allowed, most)
        self.together = each * min(allowed // each, self._NETWORKS // each, -(-most // each))
        several = jax.tree.map(lambda leaf: np.stack([leaf] * self.together), arguments)
        self._programs = _programs(arguments[0], several, finite_width, each, most)

    def compile(self) -> None:
        """Compile the programs now, before the first call."""
        for each in self._programs:
            each.compile()

    def __call__(self, networks: Network, inputs: np.ndarray) -> Theory:
        """The theory of at most ``together`` networks, with a leading axis of them.

        Parameters
        ----------
        networks
            A network whose scales are arrays with that axis.
        inputs
            Shape (networks, sites, n_0), float64.
        """
        gram = inputs @ inputs.swapaxes(1, 2) / inputs.shape[2]
        arguments = networks, gram, inputs.mean(axis=2)
        filled = np.minimum(np.arange(self.together), len(inputs) - 1)
        results = _run(self._programs, jax.tree.map(lambda leaf: leaf[filled], arguments))
        return jax.tree.map(lambda leaf: leaf[: len(inputs)], results)


def prepare_asymptotic_log_chi(network: Network) -> Callable[[Prediction], float]:
    """Trace `float64.asymptotic_log_chi`: a function of the prediction, for any thread."""
    if network.mixes_sites:
        # The top gradient, independent for each input, is no gradient of a layer below BatchNorm:
        # the next layer's χ is the first that is like all others, of the longest stage.
        longest = max(range(len(network.stages)), key=lambda n: (network.stages[n].repeats, n))
        last = sum(stage.repeats for stage in network.stages[: longest + 1])
        return lambda theory: math.log(theory.values["chi"][max(last - 3, 0)])
    beyond = layers_ahead(network.depth)
    log_chi = program(_limits.asymptotic_log_chi, network, 0.0, beyond=beyond)

    def further_up(theory: Prediction) -> float:
        chi = np.asarray(theory.values["chi"])
        if network.depth > 2 and abs(chi[-2] / chi[-3] - 1) < _SETTLED and len(network.stages) < 3:
            return math.log(chi[-2])
        return float(log_chi(network, theory.values["log_q"][-1]))

    return further_up


def layers_ahead(depth: int) -> int:
    """The number of layers above a network of this depth after which its χ is looked at."""
    return min(_LOOK_AHEAD * depth, _MOST_LAYERS_AHEAD)


def arguments_of(network: Network, inputs: ArrayLike) -> tuple[Network, np.ndarray, np.ndarray]:
    """The arguments of the theory: a network without a name, and its inputs' moments.

    By NumPy, as JAX would trace.
    """
    x = np.asarray(checked_inputs(inputs, network), np.float64)
    return network.unnamed(), x @ x.T / x.shape[1], x.mean(axis=1)


def _run(programs: Sequence[Float64Program], arguments: tuple) -> Theory:
    """The results of `_programs` for their arguments."""
    predicted, units, more = programs[0](*arguments)
    return Theory(predicted, units, programs[1](more) if len(programs) > 1 else more)


def _programs(
    network: Network, arguments: tuple, finite_width: bool, each: int = 0, most: int = 1
) -> list[Float64Program]:
    """The program of the prediction and, where it is a second one, that of the corrections.

    The first then also returns the second one's argument. With ``each``, all arguments have a
    leading axis of networks like this one; so many are worked out side by side, ``most`` in all.
    """

    def of(function: Callable, *arguments: Any, pairs: int = 0) -> Float64Program:
        if each:
            function = functools.partial(_of_each, function, each)
        return program(function, *arguments, depth=most * network.depth, pairs=most * pairs)

    if finite_width and _carried_means.covers(network):
        return [of(_predict_and_correct_carried_means, *arguments)]
    if not (finite_width and _layers.covers(network)):
        return [of(_predict, *arguments)]
    pairs = _layers.count_pairs(arguments[1].shape[-1], network)
    predicts = of(_predict_and_prepare, *arguments, pairs=pairs)
    return [predicts, of(first_order.correct_layers, predicts.result[2])]


def _of_each(function: Callable, side_by_side: int, *arguments: Any) -> Any:
    """The results of a function for each of the networks along a leading axis."""
    return jax.lax.map(lambda one: function(*one), arguments, batch_size=side_by_side)


def _predict(network: Network, gram: ArrayLike, mean: ArrayLike) -> Theory:
    both = limits(network, gram, mean)
    return Theory(prediction(*both), UnitLimits.of(*both), None)


def _predict_and_prepare(
    network: Network, gram: ArrayLike, mean: ArrayLike
) -> tuple[Prediction, UnitLimits | None, FiniteLayers]:
    both = limits(network, gram, mean)
    return prediction(*both), UnitLimits.of(*both), finite_layers(network, *both)


def _predict_and_correct_carried_means(
    network: Network, gram: ArrayLike, mean: ArrayLike
) -> Theory:
    both = limits(network, gram, mean)
    corrections = _carried_means.correct_limits(network, *both)
    return Theory(prediction(*both), UnitLimits.of(*both), corrections)


def program(
    function: Callable, *arguments: Any, depth: int | None = None, pairs: int = 0, **static: int
) -> Float64Program:
    """The program of a function of a network, or of layers of this depth.

    It averages over so many pairs of inputs in all layers together.
    """
    layers = arguments[0].depth if depth is None else depth
    seconds = SECONDS_A_LAYER * layers + _SECONDS_A_PAIR * pairs
    return Float64Program(function, arguments, seconds, **static)
