"""Theory in float64, whatever JAX's x64 setting: of a network and its inputs, as NumPy arrays.

Each function here is compiled once for networks of one structure.
"""

from collections.abc import Mapping

from jax.typing import ArrayLike

from gradflow._checks import check_instance
from gradflow.estimation import Histogram
from gradflow.networks import Network, check_network
from gradflow.predictions import Corrections, Prediction
from gradflow.theory import _densities
from gradflow.theory._programs import arguments_of, prepare, prepare_asymptotic_log_chi, program
from gradflow.theory.finite_width import _carried_means, first_order

__all__ = ["asymptotic_log_chi", "correct", "densities", "predict", "predict_and_correct"]


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
    return prepare(network, inputs, finite_width=False)().prediction


def correct(network: Network, inputs: ArrayLike) -> Corrections | None:
    """The effect of the network's width on every statistic, in float64; None where it is not known.

    By `finite_width._carried_means.correct` for networks that carry a mean over units along, else
    by `finite_width.first_order.correct`.

    Parameters
    ----------
    network, inputs
        As for `predict`.

    Raises
    ------
    InputError
        If the inputs are not of the network's width.
    """
    arguments = arguments_of(network, inputs)[:2]
    for theory in (_carried_means, first_order):
        if theory.covers(network):
            return program(theory.correct, *arguments)(*arguments)
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
    theory = prepare(network, inputs, finite_width=finite_width)()
    return theory.prediction, theory.corrections


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
    units = prepare(network, inputs, finite_width=False)().units
    return _densities.predicted(network, units, histograms)


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
