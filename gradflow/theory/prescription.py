"""The inverse problem: the weights and biases that keep a given network's signals alive.

`prescribe` takes φ, the widths and a float type, and returns the critical σ_w² and σ_b² (χ₁ = 1),
the scale of the inputs that starts the length at its fixed point, and expectations: the factor of
the gradient a layer and from end to end, depth scales, and the depth at which gradients leave a
float's range; beside it, the same for Glorot's, He's and LeCun's rules. Optionally φ itself is
transformed (DKS, TAT) so that the critical weights have the variance 1/fan_in.

By default the activation's universality class (Roberts, Yaida & Hanin 2022, ch. 5) chooses the
critical point: for a scale-invariant φ, and where K* = 0, that with σ_b = 0; for a half-stable φ
the half-stable point; otherwise a stable one with σ_b = 0.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow import activations, builders, ensembles
from gradflow._checks import check_count, check_scale
from gradflow._programs import program
from gradflow.activations import Activation, ActivationLike
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.theory import criticality, fixed_points, mean_field, transformations
from gradflow.theory._correlations import correlation_fixed_point
from gradflow.theory._depth_scales import depth_scale
from gradflow.theory.criticality import UniversalityClass
from gradflow.theory.fixed_points import Status
from gradflow.theory.transformations import Transformation

__all__ = ["Expectation", "Prescription", "WidthScaling", "mu_parametrisation", "prescribe"]

# Variance rules that a prescription is compared with.
_RULES = ("glorot", "he", "lecun")


@dataclass(frozen=True)
class Expectation:
    """Signals and gradients of one network, in theory, for inputs of unit mean square.

    Attributes
    ----------
    name
        The ensemble's name.
    sigma_w2, sigma_b2
        Those of the longest run of equal layers: σ_w²/fan_in is the weights' variance.
    status
        The fate of the length in infinitely many such layers; a `fixed_points.Status`.
    q_star, chi1, xi_c, xi_grad
        At the length's fixed point; NaN if there is none. Depth scales in layers.
    gradient_factor
        The factor of the gradient's norm ‖∂C/∂z‖ going down one layer: the geometric mean over
        this network's layers, with their transient.
    log10_gradient
        log₁₀ of its factor from the top to the bottom layer.
    q_top
        q of the top layer.
    trainable_depth
        The lesser of 6 ξ_c and 6 |ξ_∇|, in layers (Schoenholz et al. 2017); inf at criticality.
    representable_depth
        The depth, in layers, at which a gradient leaves the float type's range, at the network's
        own factor; inf where that is 1, to rounding.
    """

    name: str
    sigma_w2: float
    sigma_b2: float
    status: Status
    q_star: float
    chi1: float
    xi_c: float
    xi_grad: float
    gradient_factor: float
    log10_gradient: float
    q_top: float
    trainable_depth: float
    representable_depth: float


@dataclass(frozen=True)
class Prescription:
    """Scales to initialise a network with, and expectations of it.

    Attributes
    ----------
    activation
        φ, transformed if `prescribe` was given a ``transform``.
    transformation
        The four numbers of the transformation, or None.
    universality_class
        Of φ before a transformation.
    sigma_w2, sigma_b2, q_star
        The critical point; q_star is NaN where every length is critical.
    chi_par
        χ∥ at q*: below 1 the fixed point of the length is stable.
    weight_sd, bias_sd
        Standard deviation of each layer's weights, (layers,), and of all biases.
    input_scale
        The factor for inputs of unit mean square with which the first layer has q*; 1 where every
        length is critical, or q* = 0.
    expected
        Expectations of this network.
    instead
        Those of the same network with Glorot's, He's and LeCun's weights, no biases, and φ before a
        transformation.
    """

    activation: Activation
    transformation: Transformation | None
    universality_class: UniversalityClass
    sigma_w2: float
    sigma_b2: float
    q_star: float
    chi_par: float
    weight_sd: tuple[float, ...]
    bias_sd: float
    input_scale: float
    expected: Expectation
    instead: tuple[Expectation, ...]


def prescribe(
    activation: ActivationLike,
    widths: Sequence[int],
    *,
    dtype: str = "float32",
    sigma_b2: float | None = None,
    q: float | None = None,
    transform: str | None = None,
    target: float | None = None,
) -> Prescription:
    """Return the scales that make a fully connected network critical, and expectations of it.

    Parameters
    ----------
    activation
        φ, by name or as an `Activation`.
    widths
        (n_0, n_1, …, n_L): the input's width, then every layer's.
    dtype
        The float type that training runs in, by name.
    sigma_b2, q
        σ_b² or q* of the critical point; at most one of them.
    transform
        ``"dks"`` or ``"tat"``: transform φ for this depth, so that with σ_w = 1 and σ_b = 0 lengths
        stay at 1 and correlations below 1. ReLU and leaky ReLUs take ``"tat"``, which sets their
        slope.
    target
        The transform's parameter: ζ > 1 of DKS (1.5), τ > 0 of TAT (0.3), 0 < η < 1 of TAT for
        ReLU (0.9).

    Returns
    -------
    Prescription
        Computed in float64.

    Raises
    ------
    InputError
        If an argument is out of range, or there is no such critical point.

    References
    ----------
    Poole et al. 2016, arXiv:1606.05340; Schoenholz et al. 2017, arXiv:1611.01232; Roberts, Yaida &
    Hanin 2022, ch. 5; Zhang, Botev & Martens 2022, arXiv:2203.08120 (DKS, TAT).
    """
    phi = activations.get(activation)
    shape = builders.mlp(widths, phi).widths  # checks them
    depth = len(shape) - 1
    fixed_points.representable_depth(0.5, dtype)  # checks it
    if sigma_b2 is not None and q is not None:
        raise InputError(f"sigma_b2 is {sigma_b2!r} and q is {q!r}; give one of them at most")
    if target is not None and transform is None:
        raise InputError(f"target is {target!r}, and there is no transform that it is for")
    if transform is not None and (sigma_b2 is not None or q is not None):
        raise InputError(
            f"transform is {transform!r}, which sets q* = 1 and sigma_b2 = 0; give neither"
        )
    with jax.enable_x64(True):
        kind = criticality.universality_class(phi)
        if transform is None:
            transformed, transformation = phi, None
            point = _critical_point(phi, kind, sigma_b2, q)
        else:
            transformed, transformation = transformations.by_name(transform, phi, depth, target)
            point = _Point(1.0, 0.0, 1.0, 1.0)
        weight_sd, bias_sd = math.sqrt(point.sigma_w2), math.sqrt(point.sigma_b2)
        q_star = point.q_star if point.q_star > 0 else None  # NaN where every q is critical
        scale = 1.0 if q_star is None else math.sqrt((q_star - point.sigma_b2) / point.sigma_w2)
        network = builders.mlp(shape, transformed, ensembles.fan_in(weight_sd), sigma_b=bias_sd)
        return Prescription(
            activation=transformed,
            transformation=transformation,
            universality_class=kind,
            **point._asdict(),
            weight_sd=tuple(math.sqrt(point.sigma_w2 / fan_in) for fan_in in shape[:-1]),
            bias_sd=bias_sd,
            input_scale=scale,
            expected=_expect(network, "critical", dtype, input_scale=scale, q_star=q_star),
            instead=tuple(_expect(builders.mlp(shape, phi, rule), rule, dtype) for rule in _RULES),
        )


class _Point(NamedTuple):
    sigma_w2: float
    sigma_b2: float
    q_star: float
    chi_par: float


def _critical_point(
    phi: Activation, kind: UniversalityClass, sigma_b2: float | None, q: float | None
) -> _Point:
    """Return the critical point with this q* or σ_b², or that of the universality class."""
    if q is not None:
        check_scale("q", q)
        points = criticality.critical_line(phi, q) if q > 0 else None
        if points is None or np.isnan(points.sigma_w2[0]):
            raise InputError(
                f"q is {q!r}; activation {phi.name!r} has no critical point there with "
                "sigma_b2 >= 0; ask for another q > 0"
            )
        index = 0
    elif sigma_b2 is None and kind is UniversalityClass.HALF_STABLE:
        half = criticality.half_stable_points(phi)
        return _Point(float(half.sigma_w2[0]), float(half.sigma_b2[0]), float(half.q_star[0]), 1.0)
    else:
        bias = 0.0 if sigma_b2 is None else sigma_b2
        points = criticality.critical_points(phi, sigma_b2=bias)
        present = np.flatnonzero(np.isfinite(points.sigma_w2))
        if not present.size:
            raise InputError(
                f"sigma_b2 is {bias!r}, with which activation {phi.name!r} has no critical "
                "point; ask for another sigma_b2, or for transform 'dks' or 'tat'"
            )
        # The stable point of least q*, if any is stable.
        stable = present[np.asarray(points.chi_par)[present] <= 1 + 1e-9]
        index = int((stable if stable.size else present)[0])
    return _Point(*(float(np.asarray(getattr(points, field))[index]) for field in _Point._fields))


@dataclass(frozen=True)
class WidthScaling:
    """Width-dependent factors of one layer in μP, the maximal-update parametrisation.

    Attributes
    ----------
    role
        "input", "hidden" or "output".
    variance
        Of a weight at initialisation; biases start at 0.
    sgd_rate, adam_rate
        Factors of the learning rate.
    """

    role: str
    variance: float
    sgd_rate: float
    adam_rate: float


def mu_parametrisation(widths: Sequence[int]) -> tuple[WidthScaling, ...]:
    """Return each layer's scales in μP, under which networks of any width learn features alike.

    ``builders.mlp(widths, φ, "lecun", last="mup_output")`` has these variances. Biases of the input
    and of hidden layers have the input layer's learning rates.

    Parameters
    ----------
    widths
        (n_0, n_1, …, n_L): the input's width, then every layer's; L >= 2.

    Returns
    -------
    tuple
        One `WidthScaling` a layer.

    Raises
    ------
    InputError
        If a width is not a whole number of at least 1, or there are fewer than two layers.

    References
    ----------
    Yang & Hu 2021, arXiv:2011.14522; the table is that of Yang et al. 2022, arXiv:2203.03466,
    table 3.
    """
    shape = [check_count("width", width) for width in widths]
    if len(shape) < 3:
        raise InputError(
            f"widths is {tuple(widths)!r}; it needs an input, a hidden layer and an output"
        )
    first, *hidden, top = itertools.pairwise(shape)
    return (
        WidthScaling("input", 1 / first[0], float(first[1]), 1.0),
        *(WidthScaling("hidden", 1 / n, 1.0, 1 / n) for n, _ in hidden),
        WidthScaling("output", 1 / top[0] ** 2, 1 / top[0], 1 / top[0]),
    )


def _expect(
    network: Network,
    name: str,
    dtype: str,
    *,
    input_scale: float = 1.0,
    q_star: float | None = None,
) -> Expectation:
    """Return expectations of a network of `builders.mlp`, for inputs of mean square input_scale².

    Without ``q_star`` the fixed point of the length is solved for. With it, it is taken as known: a
    marginal fixed point, χ∥ = 1, appears or disappears by a rounding of σ_w.
    """
    longest = max(network.stages[1:] or network.stages, key=lambda stage: stage.repeats).block
    w2 = float(longest.sigma_w) ** 2  # type: ignore[attr-defined]
    b2 = float(longest.sigma_b or 0.0) ** 2  # type: ignore[attr-defined]
    ends = _ends(network.as_arrays(jnp.float64), input_scale**2)
    log_q, log_gradient = map(np.asarray, ends)
    phi = network.activation
    if q_star is None:
        analysis = fixed_points.analyse(phi, w2, b2, start=math.exp(float(log_q[0])))
        status, length = Status(int(analysis.status)), float(analysis.q_star)
        chi1, xi_c, xi_grad = map(float, (analysis.chi1, analysis.xi_c, analysis.xi_grad))
    else:
        status, length = Status.CONVERGES, q_star
        chi1, xi_c, xi_grad = map(float, _at_length(phi, q_star, w2, b2))
    trainable = fixed_points.trainable_depth(np.minimum(xi_c, abs(xi_grad)))
    per_layer = math.exp(float(log_gradient) / max(network.depth - 1, 1))
    return Expectation(
        name=name,
        sigma_w2=w2,
        sigma_b2=b2,
        status=status,
        q_star=length,
        chi1=chi1,
        xi_c=xi_c,
        xi_grad=xi_grad,
        gradient_factor=per_layer,
        log10_gradient=float(log_gradient) / math.log(10),
        q_top=math.exp(float(log_q[-1])),
        trainable_depth=float(trainable),
        representable_depth=float(fixed_points.representable_depth(per_layer**2, dtype)),
    )


@program("activation")
def _at_length(
    activation: Activation, q: ArrayLike, sigma_w2: ArrayLike, sigma_b2: ArrayLike
) -> tuple[Array, Array, Array]:
    """Return χ₁, ξ_c and ξ_∇ at a fixed point q of the length."""
    q, sigma_w2, sigma_b2 = map(jnp.asarray, (q, sigma_w2, sigma_b2))
    chi1 = mean_field.chi(activation, q, sigma_w2)
    chi_c = correlation_fixed_point(activation, q, sigma_w2, sigma_b2, chi1)[1]
    return chi1, depth_scale(chi_c), depth_scale(chi1)


@program()
def _ends(network: Network, square: ArrayLike) -> tuple[Float[Array, " layers"], Array]:
    """Return log q, and the log of the gradient's norm at the bottom, relative to the top."""
    predicted = mean_field.predict(network, jnp.asarray(square).reshape(1, 1))
    log_norm = jnp.asarray(predicted.values["log_gradient_norm"])
    return jnp.asarray(predicted.values["log_q"]), log_norm[0] - log_norm[-1]
