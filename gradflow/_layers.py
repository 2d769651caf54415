"""Layers, as statistics read them: of one random network, and of the infinite-width limit."""

import functools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gradflow._norms import unit_rows
from gradflow._unit_distributions import Shifted
from gradflow.activations import Activation

__all__ = ["BackwardLimit", "BackwardSample", "ForwardLimit", "ForwardSample", "exp"]


class ForwardSample(eqx.Module):
    """One layer of one random network in the forward pass.

    The network's own signals are exp(log_scale) times those given here.
    """

    preactivation: Float[Array, "sites n"]
    activation: Float[Array, "sites n"]
    slope: Float[Array, "sites n"]
    log_scale: Float[Array, " sites"]
    saturated_slope: float = eqx.field(static=True)  # the |φ'| below which a unit is saturated

    @functools.cached_property
    def directions(self) -> tuple[Float[Array, "sites n"], Float[Array, " sites"]]:
        """The pre-activations at length 1, and the logarithms of their true lengths."""
        rows, log_norm = unit_rows(self.preactivation)
        return rows, log_norm + self.log_scale

    @functools.cached_property
    def outputs(self) -> tuple[Float[Array, "sites n"], Float[Array, " sites"]]:
        """The activations at length 1, and the logarithms of their true lengths."""
        rows, log_norm = unit_rows(self.activation)
        return rows, log_norm + self.log_scale


class ForwardLimit(eqx.Module):
    """The infinite-width limit of a layer's signals, or of all layers'.

    Attributes
    ----------
    covariance, mean, log_scale
        Second moments and means over units of the pre-activations times exp(-log_scale); the scale
        is 0 unless second moments are beyond `gaussian.log_limits`.
    gaussian
        Whether signals are known to be Gaussian over units; otherwise averages of φ are NaN.
    saturation_threshold
        The network's.
    about
        The means that units draw, and that signals are Gaussian about; None where they are 0.
    """

    covariance: Float[Array, "*layers sites sites"]
    mean: Float[Array, "*layers sites"]
    log_scale: Float[Array, "*layers sites"]
    gaussian: Bool[Array, "*layers"]
    activation: Activation = eqx.field(static=True)
    saturation_threshold: float = eqx.field(static=True)
    about: Shifted | None = None


class BackwardSample(eqx.Module):
    """The gradient δ = ∂C/∂z at a layer, or all, of one random network, per input, as logs.

    ``log_ratio`` is log (‖δ^l‖²/n_l) - log (‖δ^{l+1}‖²/n_{l+1}); NaN at the top layer.
    ``log_weight_norm`` is log ‖∂C/∂W‖_F of the layer's ``weights``, all matrices together, C the
    mean cost over the inputs; ``width`` is n_l.
    """

    log_norm: Float[Array | np.ndarray, "*layers sites"]
    log_ratio: Float[Array | np.ndarray, "*layers sites"]
    log_weight_norm: Float[Array | np.ndarray, "*layers"]
    width: Float[Array | np.ndarray, "*layers"]
    weights: Float[Array | np.ndarray, "*layers"]


class BackwardLimit(eqx.Module):
    """The infinite-width limit of the gradient ∂C/∂z at a layer, or at all, per input, as logs.

    ``log_variance`` is of one component of δ; ``log_ratio`` is log χ, NaN at the top layer.
    ``log_spread`` is E log ‖δ‖² less log E ‖δ‖², over networks, where it is not 0 at any width.
    ``why_missing`` says why there is no theory of some layers' signals and gradients, if so.
    """

    log_variance: Float[Array, "*layers sites"]
    log_ratio: Float[Array, "*layers sites"]
    log_weight_variance: Float[Array, "*layers"]
    width: Float[Array, "*layers"]
    why_missing: str | None = eqx.field(static=True, default=None)
    log_spread: Float[Array, "*layers sites"] | None = None


def exp(x: Array | np.ndarray) -> Array | np.ndarray:
    """exp(x) as a NumPy array of a NumPy array, whatever JAX's x64 setting, and else as JAX's."""
    if isinstance(x, np.ndarray):
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(x))
    # Of a NaN that the compiler knows of, XLA's exp in float32 is any number (on CPUs, JAX 0.10).
    return jnp.where(jnp.isnan(x), x, jnp.exp(x))
