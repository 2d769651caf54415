"""Float ranges: in which layer signals and gradients overflow or underflow, in each float type.

A signal or gradient is known by the root mean square of its units, as a logarithm, which has no
range to leave. Its largest unit of n is taken as that of n Gaussian ones, √(2 log n) times as
large; of a weight's gradient, a product δ_i h_j, as the product of the two. So

- it *overflows* where the largest unit is above the type's largest number,
- it *underflows* where the root mean square is below the smallest normal number: digits are lost,
  and many devices make it 0,
- it *is zero* where the largest unit rounds to 0, of subnormal numbers too.

Each is the first such layer in the direction of the pass: going up for signals z and φ(z), going
down for ∂C/∂z and ∂C/∂W. Gradients are relative to a ∂C/∂z of size 1 at the top; a cost that is
scaled (as by loss scaling) moves them by its logarithm. What a layer does between these, such as a
normalisation's squares, is not looked at.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow.networks import Network

__all__ = ["DTYPES", "NOWHERE", "UNKNOWN", "FloatRange", "float_ranges", "sentence"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
NOWHERE, UNKNOWN = "nowhere", "unknown"
# What is asked of, and whether its pass goes down.
_DOWNWARDS = {"signals": False, "gradients": True, "weight_gradients": True}


@dataclasses.dataclass(frozen=True)
class FloatRange:
    """Where one quantity leaves one float type's range; each a layer, ``nowhere`` or ``unknown``.

    Attributes
    ----------
    overflow, underflow, zero
        The first layer of the pass where it does: see the module.
    """

    overflow: int | str
    underflow: int | str
    zero: int | str

    def __str__(self) -> str:
        """Return it in words."""
        if self.overflow == self.underflow:  # nowhere or unknown, both
            return str(self.overflow)
        said = []
        if isinstance(self.overflow, int):
            said.append(f"overflow first in layer {self.overflow}")
        if isinstance(self.underflow, int):
            zero = f" (all 0 in layer {self.zero})" if isinstance(self.zero, int) else ""
            said.append(f"underflow first in layer {self.underflow}{zero}")
        return ", ".join(said) or UNKNOWN


def float_ranges(
    network: Network,
    values: Mapping[str, np.ndarray | Array],
    *,
    dtype: str | None = None,
    overflowed: np.ndarray | None = None,
) -> dict[str, dict[str, FloatRange]]:
    """Return where signals, gradients and weights' gradients leave each float type's range.

    Parameters
    ----------
    network
        What the values are of.
    values
        Natural logarithms by statistic key, shape (layers,), as in a `Prediction`: ``log_q``,
        ``log_gradient_norm`` and ``log_weight_gradient_variance``; of what is not there, the answer
        is left out. ``log_activation_variance`` and ``activation_mean`` are added to the signals.
    dtype
        The float type in which signals were simulated; none of theory. What has left its range is
        known to have left a smaller type's, and unknown of a larger one's.
    overflowed
        Shape (layers,): whether these signals were not finite.

    Returns
    -------
    dict
        By float type, then ``signals``, ``gradients`` and ``weight_gradients``.
    """
    n = np.array(network.widths, float)
    # log of how much the largest unit exceeds the root mean square.
    peaks = 0.5 * np.log(np.maximum(2 * np.log(np.maximum(n, 1.0)), 1.0))
    known: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    if "log_q" in values:
        rms = np.asarray(values["log_q"], np.float64) / 2
        known["signals"] = (rms, np.fmax(rms, _log_activation(values, rms)), peaks[1:])
    if "log_gradient_norm" in values:
        rms = np.asarray(values["log_gradient_norm"], np.float64) - np.log(n[1:]) / 2
        known["gradients"] = (rms, rms, peaks[1:])
    if "log_weight_gradient_variance" in values:
        rms = np.asarray(values["log_weight_gradient_variance"], np.float64) / 2
        rms = np.where([bool(shapes) for shapes in network.shapes], rms, 0.0)  # of no weights
        known["weight_gradients"] = (rms, rms, peaks[1:] + peaks[:-1])

    found: dict[str, dict[str, FloatRange]] = {}
    for of in DTYPES:
        limits = jnp.finfo(of)
        largest, normal = math.log(float(limits.max)), math.log(float(limits.smallest_normal))
        least = math.log(float(limits.smallest_subnormal)) - math.log(2)
        found[of] = {}
        for name, (low, high, peak) in known.items():
            over = _is_above(high + peak, largest)
            under, zero = _is_above(-low, -normal), _is_above(-(low + peak), -least)
            if name == "signals" and dtype is not None:
                own = jnp.finfo(dtype)
                # Where φ is linear for them, signals are followed further than the type goes.
                small, large = network.homogeneous_beyond
                if overflowed is not None and not large:
                    known_to = largest <= math.log(float(own.max))
                    over = np.where(overflowed, 1.0 if known_to else np.nan, over)
                floor = math.log(float(own.smallest_normal))
                if normal < floor and not small:
                    under = np.where(low < floor, np.nan, under)
                if least < floor and of != dtype and not small:
                    zero = np.where(low < floor, np.nan, zero)
            downwards = _DOWNWARDS[name]
            found[of][name] = FloatRange(
                overflow=_first(over, downwards),
                underflow=_first(under, downwards),
                zero=_first(zero, downwards),
            )
    return found


def _log_activation(values: Mapping[str, np.ndarray | Array], otherwise: np.ndarray) -> np.ndarray:
    """Return the log of the activations' root mean square."""
    if not {"log_activation_variance", "activation_mean"} <= set(values):
        return otherwise
    log_variance = np.asarray(values["log_activation_variance"], np.float64)
    with np.errstate(divide="ignore"):
        log_mean = np.log(np.abs(np.asarray(values["activation_mean"], np.float64)))
    return np.fmax(log_variance / 2, log_mean)


def _is_above(log: np.ndarray, limit: float) -> np.ndarray:
    """Return 1 or 0; NaN where it is not known."""
    return np.where(np.isnan(log), np.nan, log > limit)


def _first(reached: np.ndarray, downwards: bool) -> int | str:
    """Return the first layer in the direction of the pass; what comes after it does not count."""
    layers = np.arange(1, len(reached) + 1)
    if downwards:
        layers, reached = layers[::-1], reached[::-1]
    stops = np.flatnonzero(reached != 0)  # 1 or NaN
    if not stops.size:
        return NOWHERE
    return UNKNOWN if np.isnan(reached[stops[0]]) else int(layers[stops[0]])


def sentence(
    theory: Mapping[str, Mapping[str, FloatRange]],
    measured: Mapping[str, Mapping[str, FloatRange]],
    dtype: str,
) -> str:
    """Return one float type's answer in words: what was measured, and theory where it differs."""
    parts = []
    everything = [*theory[dtype].values(), *measured[dtype].values()]
    if all(str(of) == NOWHERE for of in everything):
        return NOWHERE
    for name, of in measured[dtype].items():
        predicted = theory[dtype].get(name)
        differs = predicted is not None and predicted != of
        said = f"{name.replace('_', ' ')}: {of}{f' (theory: {predicted})' if differs else ''}"
        parts.append(said)
    return "; ".join(parts)
