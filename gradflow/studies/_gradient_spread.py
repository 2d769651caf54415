"""The variance over networks of the log squared gradient, which depth over width decides.

log ‖∂C/∂z^l‖² of a random network is that of the top gradient plus the logarithm of the squared
gain ‖Jᵀ u‖² of the layers above, u a random direction. Its variance over networks grows with every
layer passed by about a constant over that layer's width, so that it is a function of

    Σ_{k=l}^{L-1} 1/n_k,        (L - l)/n at one width

(Hanin & Nica 2020, arXiv:1909.05989): the constant is 2 for linear networks, 5 for ReLU; for other
activations it follows from `theory.finite_width.first_order`.

The top gradient is N(0, I) at each input. Its length is independent of its direction, so that the
variance of its logarithm, ψ'(n_L/2), is known and subtracted.
"""

import jax
import numpy as np
import scipy.special

from gradflow.estimation import Estimate
from gradflow.networks import Network
from gradflow.theory.finite_width import _layers, exact

__all__ = ["LABELS", "NAME", "spread"]

NAME = "gradient_spread"
LABELS = {
    NAME: "variance over networks of log ‖Jᵀu‖², J from the layer to the top",
    "depth_over_width": "Σ 1/n over the layers that a gradient has passed",
}


def spread(
    network: Network, sites: int, log_norm: Estimate, deviation: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the variance over networks of log ‖Jᵀu‖² at every layer, beside theory.

    Parameters
    ----------
    network, sites
        A network of the points' program, and how many inputs each has, over which the logarithm is
        averaged.
    log_norm
        The statistic ``log_gradient_norm``, shape (points, layers). Networks whose gradient is 0
        are left out of it.
    deviation
        Its standard deviation over networks to first order in 1/width, of the same shape; NaN where
        there is no theory.

    Returns
    -------
    dict
        Arrays of shape (points, layers): ``gradient_spread``, the variance; ``_standard_error``,
        as if the logarithm were normal (its excess kurtosis is of order 1/n, and falls with every
        layer passed); ``_first_order`` in 1/width; ``_theory``, the exact variance over networks
        whose gradient is not 0 where it is known (one input, linear or ReLU, Gaussian weights, no
        biases), and else first order; ``_z``; and ``depth_over_width``. Empty for networks that mix
        sites, as the length of the top gradient is then no common factor of all sites'.
    """
    if network.mixes_sites:
        return {}
    widths = np.array(network.widths[1:], float)
    top = scipy.special.polygamma(1, widths[-1] / 2) / sites
    whole = 4 * log_norm.standard_deviation**2
    error = whole * np.sqrt(2 / np.maximum(log_norm.count - 1, 1))
    first_order = 4 * deviation**2 - top
    theory = np.where(np.isnan(known := _exact(network, sites)), first_order, known)
    arrays = {
        NAME: whole - top,
        f"{NAME}_standard_error": error,
        f"{NAME}_first_order": first_order,
        f"{NAME}_theory": theory,
        f"{NAME}_z": (whole - top - theory) / error,
        "depth_over_width": np.broadcast_to(_passed(1 / widths), whole.shape),
    }
    return {name: np.broadcast_to(values, whole.shape) for name, values in arrays.items()}


def _passed(by_layer: np.ndarray) -> np.ndarray:
    """Return Σ_{k=l}^{L-1} of a term of each layer k, for every l."""
    return np.append(np.cumsum(by_layer[-2::-1])[::-1], 0.0)


def _exact(network: Network, sites: int) -> np.ndarray:
    """Return the variance by `exact.gain_moments`, (layers,); NaN where there is no exact law."""
    widths = np.array(network.widths[1:])
    if sites > 1 or not (_layers.covers(network) and network.homogeneous):
        return np.full(widths.shape, np.nan)
    with jax.enable_x64(True):
        law = {
            int(n): exact.gain_moments(network.activation, (int(n), int(n))).variance_of_log
            for n in np.unique(widths)
        }
    return _passed(np.array([float(law[int(n)]) for n in widths]))
