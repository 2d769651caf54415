"""Float ranges: the layers in which signals and gradients overflow or underflow, by float type.

The size of a signal or gradient is the logarithm of the root mean square over its units, which
itself never overflows. The largest of n units is taken to be √(2 log n) times as large, as of n
Gaussian ones; the largest entry of a weight gradient, a product δ_i h_j, is the product of the two
largest units. A quantity

- *overflows* where its largest unit is above the type's largest number,
- *underflows* where its root mean square is below the smallest normal number: digits are lost, and
  many devices make it 0,
- *is zero* where its largest unit rounds to 0 even among subnormal numbers.

The layer is the first in the direction of the pass: upwards for the signals z and φ(z), downwards
for ∂C/∂z and ∂C/∂W. Gradients are relative to a ∂C/∂z of size 1 at the top; a scaled cost (loss
scaling) shifts their logarithms. Intermediate values within a layer, such as the squares of a
normalisation, are not considered.
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
# The quantities, and whether their pass goes down.
_DOWNWARDS = {"signals": False, "gradients": True, "weight_gradients": True}


@dataclasses.dataclass(frozen=True)
class FloatRange:
    """The layers in which one quantity leaves the range of one float type.

    Attributes
    ----------
    overflow, underflow, zero
        The first layer of the pass where the quantity overflows, underflows or is zero, as the
        module says; ``"nowhere"`` if there is none, ``"unknown"`` if that is not known.
    """

    overflow: int | str
    underflow: int | str
    zero: int | str

    def __str__(self) -> str:
        """The layers in words: 'overflow first in layer 30'."""
        if self.overflow == self.underflow:  # both nowhere, or both unknown
            return str(self.overflow)
        parts = []
        if isinstance(self.overflow, int):
            parts.append(f"overflow first in layer {self.overflow}")
        if isinstance(self.underflow, int):
            zero = f" (all 0 in layer {self.zero})" if isinstance(self.zero, int) else ""
            parts.append(f"underflow first in layer {self.underflow}{zero}")
        return ", ".join(parts) or UNKNOWN


def float_ranges(
    network: Network,
    values: Mapping[str, np.ndarray | Array],
    *,
    dtype: str | None = None,
    overflowed: np.ndarray | None = None,
) -> dict[str, dict[str, FloatRange]]:
    """The layers in which signals, gradients and weight gradients leave each float type's range.

    Parameters
    ----------
    network
        The network that the values belong to.
    values
        Arrays of shape (layers,) by statistic key, as in a `Prediction`, natural logarithms:
        ``log_q`` for signals, ``log_gradient_norm`` for gradients and
        ``log_weight_gradient_variance`` for weight gradients; a quantity without values is left
        out. Signals also take ``log_activation_variance`` and ``activation_mean`` into account.
    dtype
        The float type in which signals were simulated; None for theory. A signal that left its
        range has left the range of smaller types too; for larger types the answer is unknown.
    overflowed
        Shape (layers,): whether signals of the simulation were not finite.

    Returns
    -------
    dict
        `FloatRange` by float type (`DTYPES`), then by quantity: ``"signals"``, ``"gradients"``,
        ``"weight_gradients"``.
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
        rms = np.where(
            [bool(shapes) for shapes in network.shapes], rms, 0.0
        )  # layers without weights
        known["weight_gradients"] = (rms, rms, peaks[1:] + peaks[:-1])

    ranges: dict[str, dict[str, FloatRange]] = {}
    for float_type in DTYPES:
        limits = jnp.finfo(float_type)
        largest, normal = math.log(float(limits.max)), math.log(float(limits.smallest_normal))
        least = math.log(float(limits.smallest_subnormal)) - math.log(2)
        ranges[float_type] = {}
        for name, (low, high, peak) in known.items():
            over = _is_above(high + peak, largest)
            under, zero = _is_above(-low, -normal), _is_above(-(low + peak), -least)
            if name == "signals" and dtype is not None:
                own = jnp.finfo(dtype)
                # Small or large signals are simulated beyond the type's range where φ is a power.
                small, large = network.homogeneous_beyond
                if overflowed is not None and not large:
                    known_to = largest <= math.log(float(own.max))
                    over = np.where(overflowed, 1.0 if known_to else np.nan, over)
                floor = math.log(float(own.smallest_normal))
                if normal < floor and not small:
                    under = np.where(low < floor, np.nan, under)
                if least < floor and float_type != dtype and not small:
                    zero = np.where(low < floor, np.nan, zero)
            downwards = _DOWNWARDS[name]
            ranges[float_type][name] = FloatRange(
                overflow=_first(over, downwards),
                underflow=_first(under, downwards),
                zero=_first(zero, downwards),
            )
    return ranges


def _log_activation(values: Mapping[str, np.ndarray | Array], otherwise: np.ndarray) -> np.ndarray:
    """The logarithm of the activations' root mean square, or ``otherwise`` where it is unknown."""
    if not {"log_activation_variance", "activation_mean"} <= set(values):
        return otherwise
    log_variance = np.asarray(values["log_activation_variance"], np.float64)
    with np.errstate(divide="ignore"):
        log_mean = np.log(np.abs(np.asarray(values["activation_mean"], np.float64)))
    return np.fmax(log_variance / 2, log_mean)


def _is_above(log: np.ndarray, limit: float) -> np.ndarray:
    """1 where a logarithm is above a limit, 0 where it is not, NaN where it is unknown."""
    return np.where(np.isnan(log), np.nan, log > limit)


def _first(reached: np.ndarray, downwards: bool) -> int | str:
    """The first layer in the direction of the pass with a 1; unknown if a NaN comes first."""
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
    """One float type's ranges in words: as measured, and by theory where that differs.

    Parameters
    ----------
    theory, measured
        As `float_ranges` returns them.
    dtype
        The float type, one of `DTYPES`.
    """
    both = [*theory[dtype].values(), *measured[dtype].values()]
    if all(str(layers) == NOWHERE for layers in both):
        return NOWHERE
    parts = []
    for name, layers in measured[dtype].items():
        predicted = theory[dtype].get(name)
        differs = predicted is not None and predicted != layers
        parts.append(
            f"{name.replace('_', ' ')}: {layers}{f' (theory: {predicted})' if differs else ''}"
        )
    return "; ".join(parts)
