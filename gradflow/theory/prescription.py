"""The inverse problem: the weights and biases that keep a given network's signals alive.

`prescribe` takes φ, the widths and a float type, and returns the critical σ_w² and σ_b² (χ₁ = 1),
the scale of the inputs that starts the length at its fixed point, and what to expect: the factor of
the gradient a layer and from end to end, depth scales, and how deep a float's range reaches; beside
it, what Glorot's, He's and LeCun's rules give for the same network. On request φ itself is
transformed (DKS, TAT) so that the critical weights are those of variance 1/fan_in.

Which critical point, where none is asked for, is a matter of the activation's universality class
(Roberts, Yaida & Hanin 2022, ch. 5): for a scale-invariant φ, and where K* = 0, that with σ_b = 0;
a half-stable φ's own point; else a stable one with σ_b = 0.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow import activations, builders, ensembles
from gradflow._checks import check_count, check_scale
from gradflow.activations import Activation
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.theory import criticality, fixed_points, mean_field, transformations
from gradflow.theory.criticality import UniversalityClass
from gradflow.theory.fixed_points import Status
from gradflow.theory.transformations import Transformation

__all__ = ["Expectation", "Prescription", "WidthScaling", "expect", "mu_parametrisation"]
__all__ += ["prescribe"]

# What else people would use, and are shown what it gives.
_RULES = ("glorot", "he", "lecun")


@dataclass(frozen=True)
class Expectation:
    """What becomes of signals and gradients in one network, in theory.

    Attributes
    ----------
    name
        Of the ensemble.
    sigma_w2, sigma_b2
        Of its longest run of equal layers: σ_w²/fan_in is the weights' variance.
    status
        Where the length goes, in such layers without end; a `fixed_points.Status`.
    q_star, chi1, xi_c, xi_grad
        There; NaN if it does not settle. Depth scales in layers.
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
        Where a gradient leaves the float type, in layers, at the network's own factor; inf where it
        is 1, to rounding.
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
    """What to initialise with, and what to expect of it.

    Attributes
    ----------
    activation
        φ, transformed if that was asked for.
    transformation
        The four numbers of the transformation, or None.
    universality_class
        Of φ, which decides what criticality means for it.
    sigma_w2, sigma_b2, q_star
        The critical point; q_star is NaN where every length is critical.
    chi_par
        χ∥ there: below 1 the length is kept stably.
    weight_sd, bias_sd
        Standard deviation of each layer's weights, (layers,), and of all biases.
    input_scale
        What to multiply inputs of unit mean square with, so that the first layer has q*; 1 where
        every length is critical, or q* = 0.
    expected
        Of this network.
    instead
        Of the same network with Glorot's, He's and LeCun's weights, no biases, φ as it was.
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
    activation: Activation | str,
    widths: Sequence[int],
    *,
    dtype: str = "float32",
    sigma_b2: float | None = None,
    q: float | None = None,
    transform: str | None = None,
    target: float | None = None,
) -> Prescription:
    """Return the scales that make a fully connected network critical, and what to expect.

    Parameters
    ----------
    activation
        φ, by name or as an `Activation`.
    widths
        (n_0, n_1, …, n_L): the input's width, then every layer's.
    dtype
        The float type that training runs in, for the depth where gradients leave it.
    sigma_b2, q
        Ask for the critical point with this σ_b², or with this length q*; at most one of them.
    transform
        ``"dks"`` or ``"tat"``: transform φ for this depth, so that σ_w = 1 and σ_b = 0 keep
        lengths at 1 and correlations apart. ReLU and its leaky kin take ``"tat"``: their slope.
    target
        The transform's own: ζ > 1 of DKS (1.5), τ > 0 of TAT (0.3), 0 < η < 1 of TAT for ReLU
        (0.9).

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
    with jax.enable_x64(True):
        kind = criticality.universality_class(phi)
        transformed, transformation = phi, None
        if transform is None:
            w2, b2, q_star, chi_par = _critical_point(phi, kind, sigma_b2, q)
        else:
            if sigma_b2 is not None or q is not None:
                raise InputError(
                    f"transform is {transform!r}, which sets q* = 1 and sigma_b2 = 0; give neither"
                )
            transformed, transformation = transformations.by_name(transform, phi, depth, target)
            w2, b2, q_star, chi_par = 1.0, 0.0, 1.0, 1.0
        scale = 1.0
        if q_star > 0 and not math.isnan(q_star):
            scale = math.sqrt((q_star - b2) / w2)
        critical = builders.mlp(
            shape, transformed, ensembles.fan_in(math.sqrt(w2)), sigma_b=math.sqrt(b2)
        )
        kept = q_star if q_star > 0 else None
        expected = expect(critical, "critical", dtype=dtype, input_scale=scale, kept=kept)
        instead = tuple(
            expect(builders.mlp(shape, phi, rule), rule, dtype=dtype) for rule in _RULES
        )
    return Prescription(
        activation=transformed,
        transformation=transformation,
        universality_class=kind,
        sigma_w2=w2,
        sigma_b2=b2,
        q_star=q_star,
        chi_par=chi_par,
        weight_sd=tuple(math.sqrt(w2 / fan_in) for fan_in in shape[:-1]),
        bias_sd=math.sqrt(b2),
        input_scale=scale,
        expected=expected,
        instead=instead,
    )


def _critical_point(
    phi: Activation, kind: UniversalityClass, sigma_b2: float | None, q: float | None
) -> tuple[float, float, float, float]:
    """Return σ_w², σ_b², q* and χ∥ of the critical point to take."""
    if q is not None:
        check_scale("q", q)
        point = criticality.critical_line(phi, q) if q > 0 else None
        if point is None or np.isnan(point.sigma_w2[0]):
            raise InputError(
                f"q is {q!r}; activation {phi.name!r} has no critical point there with "
                "sigma_b2 >= 0; ask for another q > 0"
            )
        found, place = point, 0
    elif sigma_b2 is None and kind is UniversalityClass.HALF_STABLE:
        half = criticality.half_stable_points(phi)
        return float(half.sigma_w2[0]), float(half.sigma_b2[0]), float(half.q_star[0]), 1.0
    else:
        wanted = 0.0 if sigma_b2 is None else sigma_b2
        found = criticality.critical_points(phi, sigma_b2=wanted)
        there = np.flatnonzero(np.isfinite(found.sigma_w2))
        if not there.size:
            raise InputError(
                f"sigma_b2 is {wanted!r}, with which activation {phi.name!r} has no critical "
                "point; ask for another sigma_b2, or for transform 'dks' or 'tat'"
            )
        # The lowest of the stable ones, if any is.
        stable = there[np.asarray(found.chi_par)[there] <= 1 + 1e-9]
        place = int((stable if stable.size else there)[0])
    sigma_w2, bias, length, chi_par = (
        float(value[place])
        for value in (found.sigma_w2, found.sigma_b2, found.q_star, found.chi_par)
    )
    return sigma_w2, bias, length, chi_par


@dataclass(frozen=True)
class WidthScaling:
    """How one layer's numbers go with its width in μP; factors that do not are left out.

    Attributes
    ----------
    role
        "input", "hidden" or "output".
    variance
        Of a weight at the start; biases start at 0.
    sgd_rate, adam_rate
        What the learning rate is multiplied by.
    """

    role: str
    variance: float
    sgd_rate: float
    adam_rate: float


def mu_parametrisation(widths: Sequence[int]) -> tuple[WidthScaling, ...]:
    """Return each layer's scales under which networks of any width learn features alike.

    ``builders.mlp(widths, φ, "lecun", last="mup_output")`` starts like this. Biases of the input
    and of hidden layers have the input layer's learning rates.

    Parameters
    ----------
    widths
        (n_0, n_1, …, n_L): the input's width, then every layer's; L >= 2.

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


def expect(
    network: Network,
    name: str = "",
    *,
    dtype: str = "float32",
    input_scale: float = 1.0,
    kept: float | None = None,
) -> Expectation:
    """Return what becomes of a network's signals, for inputs of unit mean square.

    Parameters
    ----------
    network
        A fully connected network of the library's `builders.mlp`.
    name
        What to call it; the network's own name without it.
    dtype
        The float type that gradients are to stay in.
    input_scale
        What the inputs are multiplied with.
    kept
        The length that the layers keep, if it is known; it is looked for without it. A marginal
        fixed point, χ∥ = 1, is there or not by a rounding of σ_w.

    Raises
    ------
    InputError
        If ``dtype`` is no float type.
    """
    with jax.enable_x64(True):
        longest = max(network.stages[1:] or network.stages, key=lambda stage: stage.repeats).block
        w2 = float(longest.sigma_w) ** 2  # type: ignore[attr-defined]
        b2 = float(longest.sigma_b or 0.0) ** 2  # type: ignore[attr-defined]
        log_q, log_gradient = _ends(
            network.as_arrays(jnp.float64), jnp.full((1, 1), input_scale**2)
        )
        start = math.exp(float(log_q[0]))
        phi = network.activation
        if kept is None:
            settled = fixed_points.analyse(phi, w2, b2, start=start)
            status = Status(int(settled.status))
            q_star, chi1, xi_c = settled.q_star, settled.chi1, settled.xi_c
        else:
            status, q_star = Status.CONVERGES, jnp.asarray(kept)
            chi1 = mean_field.chi(phi, jnp.asarray(kept), w2)
            xi_c = fixed_points.depth_scale(fixed_points.correlation(phi, kept, w2, b2)[1])
        xi_grad = fixed_points.depth_scale(jnp.asarray(chi1))
        trainable = fixed_points.trainable_depth(jnp.minimum(xi_c, jnp.abs(xi_grad)))
        per_layer = math.exp(float(log_gradient) / max(network.depth - 1, 1))
        return Expectation(
            name=name or network.name,
            sigma_w2=w2,
            sigma_b2=b2,
            status=status,
            q_star=float(q_star),
            chi1=float(chi1),
            xi_c=float(xi_c),
            xi_grad=float(xi_grad),
            gradient_factor=per_layer,
            log10_gradient=float(log_gradient) / math.log(10),
            q_top=math.exp(float(log_q[-1])),
            trainable_depth=float(trainable),
            representable_depth=float(fixed_points.representable_depth(per_layer**2, dtype)),
        )


@jax.jit
def _ends(network: Network, gram: Float[Array, "1 1"]) -> tuple[Float[Array, " layers"], Array]:
    """Return log q, and the log of the gradient's norm at the bottom, relative to the top."""
    predicted = mean_field.predict(network, gram)
    log_norm = jnp.asarray(predicted.values["log_gradient_norm"])
    return jnp.asarray(predicted.values["log_q"]), log_norm[0] - log_norm[-1]
