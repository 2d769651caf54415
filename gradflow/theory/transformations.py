"""Activations transformed so that a deep network stays trainable: DKS and TAT.

An activation φ is replaced by

    φ̂(x) = output_scale · (φ(input_scale · x + input_shift) + output_shift),

and weights are given σ_w = 1, biases σ_b = 0. Of one layer, at unit inputs, z ~ N(0, 1) and (u, v)
a pair of correlation c, the maps of squared lengths and of correlations are

    Q(q) = E[φ̂(√q z)²],    C(c) = E[φ̂(u) φ̂(v)] / Q(1),

so that Q'(1) = E[z φ̂ φ̂'], C(0) = E[φ̂]²/Q(1), C'(1) = E[φ̂'²]/Q(1), C''(1) = E[φ̂''²]/Q(1). Both
methods keep lengths, Q(1) = 1, stably, Q'(1) = 1, and keep the C map of the whole network, which is
C_f = C∘C∘…∘C for ``depth`` equal layers, from degenerating:

    DKS                 C_f(0) = 0,  C_f'(1) = ζ     each layer: C(0) = 0,  C'(1) = ζ^(1/depth)
    TAT, smooth φ       C_f'(1) = 1, C_f''(1) = τ    each layer: C'(1) = 1, C''(1) = τ/depth
    TAT, leaky ReLU     C_f'(1) = 1, C_f(0) = η      by the slope for x < 0

(slopes of a composition multiply; where all are 1, curvatures add). Each method has as many
conditions as φ̂ has parameters. For an architecture that is no chain, derive the conditions on each
layer's C map, and pass those with depth 1.

References: Martens et al. 2021, arXiv:2110.01765 (DKS); Zhang, Botev & Martens 2022,
arXiv:2203.08120 (TAT); Brock et al. 2021, arXiv:2101.08692 (`normalising_gain`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow import activations, gaussian
from gradflow._checks import check_count, unknown_name
from gradflow._programs import program
from gradflow._roots import bisect
from gradflow.activations import Activation, ActivationLike
from gradflow.blocks import Dense
from gradflow.errors import InputError
from gradflow.gaussian import _quadrature
from gradflow.networks import Network, Stage

__all__ = ["LocalMaps", "Transformation", "applied", "apply", "by_name", "deep_kernel_shaping"]
__all__ += ["local_maps", "normalising_gain", "tailored", "tailored_leaky_relu"]


@dataclasses.dataclass(frozen=True)
class Transformation:
    """The four numbers of φ̂(x) = output_scale · (φ(input_scale · x + input_shift) + output_shift).

    The input is scaled before it is shifted, the output shifted before it is scaled.
    """

    input_scale: float = 1.0
    input_shift: float = 0.0
    output_scale: float = 1.0
    output_shift: float = 0.0


class LocalMaps(NamedTuple):
    """Values and slopes of Q and C at their ends, for one layer of σ_w = 1 and σ_b = 0.

    Each is a scalar; see the module's opening lines.
    """

    q: Float[Array, ""]  # Q(1)
    q_slope: Float[Array, ""]  # Q'(1)
    c_zero: Float[Array, ""]  # C(0)
    c_slope: Float[Array, ""]  # C'(1)
    c_curvature: Float[Array, ""]  # C''(1); infinite if φ' jumps


def local_maps(activation: ActivationLike) -> LocalMaps:
    """Return the `LocalMaps` of an activation, transformed or not.

    Parameters
    ----------
    activation
        φ, by name or as an `Activation`.

    Returns
    -------
    LocalMaps
        Scalars of JAX's default float type.

    Raises
    ------
    InputError
        If there is no such activation.
    """
    m = gaussian.moments(activations.get(activation), 1.0)
    return LocalMaps(m.phi2, m.x_phi_dphi, m.phi**2 / m.phi2, m.dphi2 / m.phi2, m.ddphi2 / m.phi2)


def apply(activation: ActivationLike, transformation: Transformation) -> Activation:
    """Return φ̂ as an `Activation`, with its kinks.

    Without shifts, φ̂ has φ's closed kernels. In a number format of relative precision ε, φ̂ has an
    absolute error of about ε · output_scale · |output_shift|.

    Parameters
    ----------
    activation
        φ, by name or as an `Activation`.
    transformation
        The four numbers of φ̂.

    Returns
    -------
    Activation
        Equal arguments give one object.

    Raises
    ------
    InputError
        If there is no such activation, or the input scale is not above 0.
    """
    if not transformation.input_scale > 0:
        raise InputError(f"input_scale is {transformation.input_scale!r}; it is a number above 0")
    return _apply(activations.get(activation), transformation)


@functools.cache  # equal arguments give one object, so that jit caches do not miss
def _apply(phi: Activation, t: Transformation) -> Activation:
    def transformed(x: Array) -> Array:
        return t.output_scale * (phi(t.input_scale * x + t.input_shift) + t.output_shift)

    if t.input_shift or t.output_shift:
        argument = f"{t.input_scale:.4g}*x{t.input_shift:+.4g}"
        name = f"{t.output_scale:.4g}*({phi.name}({argument}){t.output_shift:+.4g})"
        kinks = tuple((kink - t.input_shift) / t.input_scale for kink in phi.kinks)
        return Activation(name, transformed, kinks)
    name = f"{t.output_scale:.4g}*{phi.name}({t.input_scale:.4g}*x)"
    return phi.scaled(t.output_scale, t.input_scale, name)


def normalising_gain(activation: ActivationLike) -> float:
    """Return γ = 1/√Var φ(z), z ~ N(0, 1), with which γ·φ has a variance of 1.

    PyTorch's gains are other numbers: 5/3 for tanh and 3/4 for SELU, where γ is 1.593 and 1.

    Parameters
    ----------
    activation
        φ, by name or as an `Activation`.

    Returns
    -------
    float
        γ, computed in float64.

    Raises
    ------
    InputError
        If there is no such activation, or it is constant.

    References
    ----------
    Brock et al. 2021, arXiv:2101.08692.
    """
    phi = activations.get(activation)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        variance = float(gaussian.moment(phi, "variance", 1.0))
    if not variance > 0:
        raise InputError(f"activation {phi.name!r} has variance {variance!r}; it must be above 0")
    return variance**-0.5


def applied(network: Network, method: str = "tat", target: float | None = None) -> Network:
    """Return a fully connected network with φ transformed for its depth, σ_w = 1, and no biases.

    Weights keep their distribution. Inputs need a mean square of 1.

    Parameters
    ----------
    network
        Of `builders.mlp`, without normalisation and dropout: `Dense` layers of one φ.
    method, target
        As for `by_name`.

    Returns
    -------
    Network
        Of the same widths and depth.

    Raises
    ------
    InputError
        If the network has other layers, or there is no such transformation.
    """
    first, *rest = ((stage.block, stage.repeats) for stage in network.stages)
    kinds = [b.activation if isinstance(b, Dense) else None for b, _ in (first, *rest)]
    if not rest or kinds != [activations.linear, *[network.activation] * len(rest)]:
        raise InputError(
            f"network {network.name!r} is no chain of Dense layers of one activation, which "
            f"method {method!r} is for; transform the activation of another by `by_name`"
        )
    phi, _ = by_name(method, network.activation, sum(repeats for _, repeats in rest), target)
    stages = tuple(
        Stage(Dense(each, block.units, 1.0, None, block.distribution), repeats)
        for (block, repeats), each in zip(
            (first, *rest), (activations.linear, *[phi] * len(rest)), strict=True
        )
        if isinstance(block, Dense)
    )
    return Network(stages, network.input_width, phi, f"{network.name}, {method.upper()}")


def by_name(
    method: str, activation: ActivationLike, depth: int, target: float | None = None
) -> tuple[Activation, Transformation | None]:
    """Return φ̂ of a method, and its transformation; None where φ̂ is another leaky ReLU.

    Parameters
    ----------
    method
        ``"dks"``, `deep_kernel_shaping`, or ``"tat"``, `tailored`, which for ReLU and leaky ReLUs
        is `tailored_leaky_relu`.
    activation, depth
        φ, and the number of nonlinear layers, one after another.
    target
        The method's parameter: ζ > 1 of DKS (1.5), τ > 0 of TAT (0.3), 0 < η < 1 of TAT for ReLU
        (0.9).

    Returns
    -------
    activation, transformation
        φ̂, and its four numbers.

    Raises
    ------
    InputError
        If the method is unknown, an argument is out of range, or there is no such transformation.
    """
    phi = activations.get(activation)
    methods = {"dks": deep_kernel_shaping, "tat": tailored}
    if method not in methods:
        raise unknown_name("transform", method, methods)
    given = () if target is None else (target,)
    if method == "tat" and phi.homogeneous:
        return tailored_leaky_relu(depth, *given), None
    transformation = methods[method](phi, depth, *given)
    return apply(phi, transformation), transformation


# Leaky ReLU ---------------------------------------------------------------------------------------


def tailored_leaky_relu(depth: int, eta: float = 0.9) -> Activation:
    """Return TAT's leaky ReLU, √(2/(1+α²)) · leaky_relu(α), whose α in [0, 1) gives C_f(0) = η.

    Parameters
    ----------
    depth
        The number of nonlinear layers, one after another.
    eta
        The correlation, in (0, 1), at which inputs that were uncorrelated leave the network.

    Returns
    -------
    Activation
        Positively homogeneous, with its closed kernels.

    Raises
    ------
    InputError
        If the depth or η is out of range, or η is more than ReLU, α = 0, reaches at that depth.

    References
    ----------
    Zhang, Botev & Martens 2022, arXiv:2203.08120.
    """
    depth = check_count("depth", depth)
    if not 0 < eta < 1:
        raise InputError(f"eta is {eta!r}; it is a correlation in (0, 1)")
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        slope, largest = map(float, _leaky_relu_slope(jnp.asarray(eta), depth))
    if eta > largest:
        raise InputError(
            f"eta is {eta!r}; leaky ReLUs of depth {depth} reach at most {largest:.6g}, as ReLUs"
        )
    scale = math.sqrt(2 / (1 + slope**2))
    return apply(activations.leaky_relu(slope), Transformation(output_scale=scale))


@program()
def _leaky_relu_slope(eta: Array, depth: Array | int) -> tuple[Array, Array]:
    """Return the slope α in [0, 1] at which C_f(0) = η, and C_f(0) of ReLUs, the largest."""

    def correlation(slope: Array) -> Array:
        """C_f(0), from Cho & Saul's arc-cosine kernel as C(c) - c, which α scales."""
        bend = (1 - slope) ** 2 / (math.pi * (1 + slope**2))

        def layer(_: Array, c: Array) -> Array:
            return jnp.minimum(c + bend * (jnp.sqrt(1 - c**2) - c * jnp.arccos(c)), 1)

        return jax.lax.fori_loop(0, depth, layer, jnp.zeros_like(slope))

    zero = jnp.zeros_like(eta)
    low, high = bisect(lambda slope: correlation(slope) < eta, zero, zero + 1, steps=60)
    return (low + high) / 2, correlation(zero)


# Any other activation -----------------------------------------------------------------------------
#
# Two parameters follow from the conditions that are linear in φ̂, and the other two, the input's
# scale a and shift b, are found by Newton's method. Write y(z) = φ(az + b) = m + sz + r(z), with
# m = E[y], s = E[zy] = E[y'] and r the part that is not linear, E[r] = E[zr] = E[r'] = 0. As the
# network gets deeper, φ̂ gets nearer to linear, and differences such as C'(1) - 1 must be had from
# r, or they cancel. With φ̂ = g(y - m) + μ, that is output_scale = g and μ = E[φ̂],
#
#     Q(1)      = g² (s² + E[r²]) + μ²,
#     C'(1)     = g² (s² + E[r'²]) / Q(1),
#     C''(1)    = g² E[r''²] / Q(1),
#     Q'(1)     = g² (s² + s E[z²r'] + E[z r r']) + g μ E[z r'].
#
# DKS has μ = 0, so g² = 1/(s² + E[r²]); TAT has g² = 1/(s² + E[r'²]), so μ² = g² (E[r'²] - E[r²]),
# which is never negative (Poincaré's inequality), and either root may serve.


class _Nonlinearity(NamedTuple):
    """The averages in the comment above, for one (a, b)."""

    m: Array
    s: Array
    r2: Array  # E[r²]
    dr2: Array  # E[r'²]
    ddr2: Array  # E[r''²], without the delta functions where φ' jumps
    z_dr: Array  # E[z r']
    stretch: Array  # s E[z²r'] + E[z r r']


class _Trial(NamedTuple):
    """A method's equations at one (a, b), and the output's scale and shift that follow."""

    residual: Array  # (2,), zero at a solution; elsewhere of order 1, at any depth
    output_scale: Array
    output_shift: Array


_Method: TypeAlias = Callable[[_Nonlinearity, Array, Array], _Trial]


def _nonlinearity(activation: Activation, a: Array, b: Array) -> _Nonlinearity:
    average = functools.partial(
        _quadrature.shifted_expectation, mean=b, deviation=a, kinks=activation.kinks
    )
    y0 = activation(b)  # so that no large constant is carried along

    def linear_part(x: Array) -> Array:
        y = activation(x) - y0
        return jnp.stack([y, y * (x - b) / a])

    mean, s = average(linear_part)

    def rest(x: Array) -> Array:
        z = (x - b) / a
        r = activation(x) - y0 - mean - s * z
        dr = a * activation.derivative(x) - s
        ddr = a**2 * activation.second_derivative(x)
        return jnp.stack([r**2, dr**2, ddr**2, z * dr, s * z**2 * dr + z * r * dr])

    return _Nonlinearity(y0 + mean, s, *average(rest))


def _dks(n: _Nonlinearity, target: Array, sign: Array) -> _Trial:  # noqa: ARG001
    """C'(1) - 1 is the target; μ is 0, without a sign."""
    g2 = 1 / (n.s**2 + n.r2)
    slope = g2 * (n.dr2 - n.r2)
    q_slope = g2 * (n.stretch - n.r2)
    residual = jnp.stack([jnp.log(slope / target), q_slope / slope])
    return _Trial(residual, jnp.sqrt(g2), -n.m)


def _tat(n: _Nonlinearity, target: Array, sign: Array) -> _Trial:
    """C''(1) is the target; the sign is that of μ."""
    g2 = 1 / (n.s**2 + n.dr2)
    mu_over_g = sign * jnp.sqrt(n.dr2 - n.r2)
    curvature = g2 * n.ddr2
    q_slope = g2 * (n.stretch - n.dr2 + mu_over_g * n.z_dr)
    residual = jnp.stack([jnp.log(curvature / target), q_slope / curvature])
    return _Trial(residual, jnp.sqrt(g2), mu_over_g - n.m)


def deep_kernel_shaping(
    activation: ActivationLike, depth: int, zeta: float = 1.5
) -> Transformation:
    """Return the transformation of Deep Kernel Shaping: Q(1) = Q'(1) = 1, C_f(0) = 0, C_f'(1) = ζ.

    Of several solutions, the one whose input shift is nearest to 0; of two at ±, the positive.

    Parameters
    ----------
    activation
        φ: not homogeneous, as ReLU is (a scale of its input is one of its output, which leaves
        three parameters for four conditions), and with a scale of order 1 in x.
    depth
        The number of nonlinear layers, one after another.
    zeta
        ζ > 1, the slope of the network's C map at 1. Only a linear network has 1.

    Returns
    -------
    Transformation
        For `apply`; computed in float64.

    Raises
    ------
    InputError
        If an argument is out of range, or no start of the solver converges.

    References
    ----------
    Martens et al. 2021, arXiv:2110.01765.
    """
    phi, depth = activations.get(activation), check_count("depth", depth)
    if not 1 < zeta < math.inf:
        raise InputError(f"zeta is {zeta!r}; it is a finite number above 1")
    if phi.homogeneous:
        raise InputError(
            f"activation {phi.name!r} is homogeneous, so deep kernel shaping's conditions cannot "
            "all be met; use tailored_leaky_relu"
        )
    solution = _solve(_dks, phi, math.expm1(math.log(zeta) / depth), signs=(0.0,))
    if solution is None:
        raise InputError(
            f"no transformation of activation {phi.name!r} was found for zeta {zeta!r} at depth "
            f"{depth}; another activation, zeta or depth may have one"
        )
    return solution


def tailored(activation: ActivationLike, depth: int, tau: float = 0.3) -> Transformation:
    """Return TAT's transformation of a smooth φ: Q(1) = Q'(1) = C_f'(1) = 1, C_f''(1) = τ.

    Of several solutions, the one whose input shift is nearest to 0; of two at ±, the positive.

    Parameters
    ----------
    activation
        φ: without jumps of φ', which make C''(1) infinite, and with a scale of order 1 in x.
    depth
        The number of nonlinear layers, one after another.
    tau
        τ > 0, the curvature of the network's C map at 1.

    Returns
    -------
    Transformation
        For `apply`; computed in float64.

    Raises
    ------
    InputError
        If an argument is out of range, φ' jumps, or no start of the solver converges.

    References
    ----------
    Zhang, Botev & Martens 2022, arXiv:2203.08120.
    """
    phi, depth = activations.get(activation), check_count("depth", depth)
    if not 0 < tau < math.inf:
        raise InputError(f"tau is {tau!r}; it is a finite number above 0")
    if phi.slope_jumps:
        raise InputError(
            f"activation {phi.name!r} has a slope that jumps, so its C map has no curvature at 1; "
            "use a smooth activation, or tailored_leaky_relu"
        )
    solution = _solve(_tat, phi, tau / depth, signs=(-1.0, 1.0))
    if solution is None:
        raise InputError(
            f"no transformation of activation {phi.name!r} was found for tau {tau!r} at depth "
            f"{depth}; another activation, tau or depth may have one"
        )
    return solution


_STEPS = 40  # of Newton's method; near a solution five are enough
_LARGEST = np.array([1.0, 0.5])  # step in log a and in b
_CONVERGED = 1e-7  # residual, relative to the target; at depth 1e6, rounding alone leaves 1e-8
_SAME = 1e-6  # shifts nearer than this are one solution


def _solve(
    method: _Method, activation: Activation, target: float, signs: tuple[float, ...]
) -> Transformation | None:
    """Return the solution whose input shift is nearest to 0, or None if no start converges.

    ``signs`` are the possible signs of μ.
    """
    starts = np.array([(*point, sign) for point in _starts(activation, target) for sign in signs])
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        x = jnp.asarray(starts)
        ends = _newton(method, activation, jnp.asarray(target), x[:, :2], x[:, 2])
        points, trials = jax.tree.map(np.asarray, ends)
    # The residual of a start that diverged is NaN, which compares as not converged.
    converged = np.max(np.abs(trials.residual), axis=1) < _CONVERGED
    if not converged.any():
        return None
    distance = np.where(converged, np.abs(points[:, 1]), np.inf)
    nearest = distance < np.min(distance) + _SAME  # with its mirror image, if φ is odd or even
    best = np.argmax(np.where(nearest, points[:, 1], -np.inf))
    log_a, b = points[best]
    return Transformation(
        input_scale=math.exp(log_a),
        input_shift=float(b),
        output_scale=float(trials.output_scale[best]),
        output_shift=float(trials.output_shift[best]),
    )


def _starts(activation: Activation, target: float) -> Iterator[tuple[float, float]]:
    """Yield pairs (log a, b) to start from.

    Near linear, C'(1) - 1 and C''(1) are about (a φ''/φ')², from which a is estimated. In b,
    solutions are at some point of φ, or within some a of a kink, however small a is.
    """
    a = math.sqrt(target)
    near_kinks = (kink + a * np.arange(-9, 10) for kink in activation.kinks)
    for b in np.concatenate([np.arange(-6, 6.5, 0.5), *near_kinks]):
        yield math.log(a) - 1, float(b)
        yield math.log(a) + 0.5, float(b)


@program("method", "activation", seconds=1.0)
def _newton(
    method: _Method,
    activation: Activation,
    target: Array,
    starts: Float[Array, "starts 2"],
    sign: Float[Array, " starts"],
) -> tuple[Float[Array, "starts 2"], _Trial]:
    """Run Newton's method in (log a, b) from each start; return its ends, and the trials there."""

    def trial(point: Array, sign: Array) -> tuple[Array, _Trial]:
        at = method(_nonlinearity(activation, jnp.exp(point[0]), point[1]), target, sign)
        return at.residual, at

    def step(point: Array, _: None, sign: Array) -> tuple[Array, tuple[Array, _Trial]]:
        jacobian, at = jax.jacfwd(trial, has_aux=True)(point, sign)
        move = -jnp.linalg.solve(jacobian, at.residual)
        move /= jnp.maximum(1, jnp.max(jnp.abs(move) / _LARGEST))
        return point + move, (point, at)

    def one(start: Array, sign: Array) -> tuple[Array, _Trial]:
        _, visited = jax.lax.scan(functools.partial(step, sign=sign), start, None, length=_STEPS)
        return jax.tree.map(lambda v: v[-1], visited)

    return jax.vmap(one)(starts, sign)
