"""Moments of an activation φ(x), x ~ N(0, q), and their limits at small and large q.

A closed form where the activation has one, quadrature otherwise; the caller cannot tell which.
"""

import functools
import math
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc
from jax.typing import DTypeLike
from jaxtyping import Array, Float, ScalarLike

from gradflow import activations
from gradflow._checks import check_scale, is_traced, unknown_name
from gradflow._closed_forms import Values
from gradflow._programs import program
from gradflow.activations import Activation, ActivationLike
from gradflow.errors import InputError
from gradflow.gaussian._quadrature import (
    Z_MAX,
    expectation,
    expectation_with_error,
    over_entries,
    smallest_variance,
)

__all__ = ["Moments", "check", "growth", "log_limits", "moment", "moments", "saturation"]
__all__ += ["some_moments"]


class Moments(NamedTuple):
    """Averages over x ~ N(0, q); derivatives of φ are with respect to its argument.

    Each has q's shape. In the notation of the reference table: m1, m2, m4, d1, d2, d4, xf, xffp,
    ffpp, f2d2, dd2. φ'' is that of distributions: at a jump of φ' it is a delta function, which
    counts in ``phi_ddphi`` and makes ``ddphi2`` infinite.
    """

    phi: Float[Array, "..."]  # E[φ]
    phi2: Float[Array, "..."]  # E[φ²]
    phi4: Float[Array, "..."]  # E[φ⁴]
    dphi: Float[Array, "..."]  # E[φ']
    dphi2: Float[Array, "..."]  # E[φ'²]
    dphi4: Float[Array, "..."]  # E[φ'⁴]
    x_phi: Float[Array, "..."]  # E[x φ] = q E[φ']
    x_phi_dphi: Float[Array, "..."]  # E[x φ φ'] = q d/dq E[φ²]
    phi_ddphi: Float[Array, "..."]  # E[φ φ'']
    phi2_dphi2: Float[Array, "..."]  # E[φ² φ'²]
    ddphi2: Float[Array, "..."]  # E[φ''²]


_INTEGRANDS: dict[str, Callable[[Activation, Array], Array]] = {
    "phi": lambda a, x: a(x),
    "phi2": lambda a, x: a(x) ** 2,
    "phi4": lambda a, x: a(x) ** 4,
    "dphi": lambda a, x: a.derivative(x),
    "dphi2": lambda a, x: a.derivative(x) ** 2,
    "dphi4": lambda a, x: a.derivative(x) ** 4,
    "x_phi": lambda a, x: x * a(x),
    "x_phi_dphi": lambda a, x: x * a(x) * a.derivative(x),
    "phi_ddphi": lambda a, x: a(x) * a.second_derivative(x),
    "phi2_dphi2": lambda a, x: (a(x) * a.derivative(x)) ** 2,
    "ddphi2": lambda a, x: a.second_derivative(x) ** 2,
}


def moments(activation: ActivationLike, q: Values) -> Moments:
    """All `Moments` of an activation for pre-activations of variance q.

    Parameters
    ----------
    activation
        φ.
    q
        The variance, >= 0, of any shape.

    Returns
    -------
    Moments
        Each of q's shape and dtype.

    Raises
    ------
    InputError
        If q is negative or not finite (seen outside jit only).
    """
    activation = activations.get(activation)
    check_scale("q", q)
    return Moments(**some_moments(activation, Moments._fields, q))


def moment(activation: ActivationLike, name: str, q: Values) -> Float[Array, "..."]:
    """One moment of an activation for pre-activations of variance q.

    Parameters
    ----------
    activation
        φ.
    name
        A field of `Moments`, or ``"variance"``: E[φ²] - E[φ]², without its cancellation.
    q
        The variance, >= 0, of any shape.

    Returns
    -------
    Array
        Of q's shape and dtype.

    Raises
    ------
    InputError
        If there is no such moment, or q is negative or not finite (seen outside jit only).
    """
    activation = activations.get(activation)
    check_scale("q", q)
    if name == "variance":
        return _variance(activation, q)
    if name not in _INTEGRANDS:
        raise unknown_name("moment", name, (*_INTEGRANDS, "variance"))
    return some_moments(activation, (name,), q)[name]


@functools.partial(jax.jit, static_argnums=0)
def _variance(activation: Activation, q: Values) -> Float[Array, "..."]:
    """Var φ(x), x ~ N(0, q), of q's shape."""
    if "variance" in activation.moments:
        return _closed(activation.moments["variance"], q)

    def powers(x: Array) -> Array:
        # About φ(0), so that no large constant is squared and subtracted.
        centred = activation(x) - activation(jnp.zeros_like(x))
        return jnp.stack([centred, centred**2])

    mean, square = expectation(powers, q, kinks=activation.kinks)
    return square - mean**2


def _closed(form: Callable[[Array], Array | float], q: Values) -> Array:
    return over_entries(q, lambda v: jnp.asarray(form(v), v.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def some_moments(activation: ActivationLike, names: tuple[str, ...], q: Values) -> dict[str, Array]:
    """Return some of the `Moments`, by name, each of q's shape.

    Closed forms, and one pass of quadrature for all the rest: cheaper than one `moment` at a time.

    Parameters
    ----------
    activation
        φ; static under jit.
    names
        Fields of `Moments`.
    q
        The variance, >= 0, of any shape.
    """
    activation = activations.get(activation)
    values = {n: _closed(activation.moments[n], q) for n in names if n in activation.moments}
    jumps = [jump for _, jump in activation.slope_jumps]
    known = not any(is_traced(jump) for jump in jumps)
    if "ddphi2" in names and jumps and known:
        values["ddphi2"] = _closed(lambda v: math.inf, q)  # noqa: ARG005
    rest = [n for n in names if n not in values]
    if rest:
        integrals = expectation(
            lambda x: jnp.stack([_INTEGRANDS[n](activation, x) for n in rest]),
            q,
            kinks=activation.kinks,
        )
        values |= dict(zip(rest, integrals, strict=True))
        if "phi_ddphi" in rest:
            values["phi_ddphi"] += over_entries(q, functools.partial(_delta_terms, activation))
        if "ddphi2" in rest and not known:
            jumping = jnp.any(jnp.abs(jnp.stack(jumps)) > 1e-12)
            values["ddphi2"] = jnp.where(jumping, jnp.inf, values["ddphi2"])
    return values


def _delta_terms(activation: Activation, q: Array) -> Array:
    """Σ_k jump_k φ(k) p_q(k), the part of E[φ φ''] at the jumps of φ'."""
    total = jnp.zeros_like(q)
    for kink, jump in activation.slope_jumps:
        height = jump * activation(jnp.asarray(kink, q.dtype))
        # exp(-900) is 0: the floor keeps q = 0 from 0/0, for kinks elsewhere than at 0. At 0, φ(0)
        # times an infinite density is infinite, unless φ(0) = 0.
        floor = max(kink**2 / 1800, smallest_variance(q))
        safe = jnp.maximum(q, floor)
        total += height * jnp.exp(-(kink**2) / (2 * safe)) * jax.lax.rsqrt(2 * math.pi * safe)
    return total


# Those of gradflow are known to have them.
_checked: weakref.WeakSet[Activation] = weakref.WeakSet(activations.ALL)


def check(activation: ActivationLike) -> None:
    """Raise or warn if an activation has no Gaussian averages, or undeclared kinks.

    Averages are taken at a standard deviation of 1/frequency, where every activation in use has
    most of its features, and once for each; one whose parameters are traced is not checked.

    Parameters
    ----------
    activation
        φ.

    Raises
    ------
    InputError
        If E[φ²] or E[φ'²] is not finite.

    Warns
    -----
    UserWarning
        If E[φ²], E[φ'²] or E[φ'] is uncertain by more than 1e-8 of its value: φ has kinks that
        are not among its ``kinks``.
    """
    activation = activations.get(activation)
    if activation in _checked:
        return
    with jax.enable_x64(True):
        values, errors, tails = _estimates(activation)
    if isinstance(values, jax.core.Tracer):
        return
    # The mean slope is compared with its root mean square, and its tails are those of its square.
    sizes, tail_sizes = np.array(values), np.append(np.asarray(tails), 0)
    sizes[2] = np.sqrt(sizes[1])
    for name, value, error, tail in zip(
        ("E[φ²]", "E[φ'²]", "E[φ']"), sizes, np.asarray(errors), tail_sizes, strict=True
    ):
        if not np.isfinite(value) or tail > 1e-9 * value:
            raise InputError(
                f"activation {activation.name!r} has no finite {name} under a Gaussian; it is a "
                "function that grows more slowly than exp(x²/4)"
            )
        if error > 1e-8 * value:
            warnings.warn(
                f"{name} of activation {activation.name!r} is uncertain by {error / value:.1g} of "
                "its value: name all its kinks, where it or its derivative is not smooth",
                stacklevel=3,
            )
    _checked.add(activation)


@program("activation")
def _estimates(activation: Activation) -> tuple[Array, Array, Array]:
    """E[φ²], E[φ'²] and E[φ'] where φ varies, their errors, and the tails of the first two."""

    def squares(x: Array) -> Array:
        return jnp.stack([activation(x), activation.derivative(x)]) ** 2

    def averages(x: Array) -> Array:
        # The slope too: where it changes its sign alone, as that of |x - 1|, its square is smooth.
        return jnp.concatenate([squares(x), activation.derivative(x)[None]])

    scale = 1 / activation.frequency
    edge = (Z_MAX - 2.0) * scale

    def outermost(x: Array) -> Array:
        return jnp.where(jnp.abs(x) > edge, squares(x), 0)

    q = jnp.asarray(scale**2)
    tails = expectation(outermost, q, kinks=(*activation.kinks, edge))
    return *expectation_with_error(averages, q, kinks=activation.kinks), tails


def log_limits(dtype: DTypeLike) -> tuple[float, float]:
    """Natural logarithms of the least and largest variance q at which averages are integrated.

    Between them q² is in the dtype's range. Beyond, φ is taken as the power of |x| that it tends to
    (`growth`), with a relative error of the square root of the least variance.
    """
    end = math.log(1e36 if dtype == jnp.float64 else 1e14)
    return -end, end


def growth(
    activation: ActivationLike, log_scale: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Factors by which averages over x ~ N(0, q) change where q is beyond `log_limits`.

    Parameters
    ----------
    activation
        φ.
    log_scale
        s, with q = exp(2 s) times the limit: 0 within the limits, below 0 below the lower one.

    Returns
    -------
    tuple
        The logarithms of the factors of √E[φ²], of √E[φ'²], and of the standard deviation of φ(x),
        each of ``log_scale``'s shape; NaN where φ is no power of |x| (as sin at ±∞).
    """
    activation = activations.get(activation)
    if activation.homogeneous:
        return log_scale, jnp.zeros_like(log_scale), log_scale
    at_zero, beyond = activation.powers

    def factor(small: ScalarLike, large: ScalarLike) -> Array:
        power = jnp.where(log_scale < 0, small, large).astype(log_scale.dtype)
        return jnp.where(log_scale == 0, 0, power * log_scale)

    return (
        factor(at_zero.value, beyond.value),
        factor(at_zero.slope, beyond.slope),
        # About φ(0), φ is the integral of its slope.
        factor(at_zero.slope + 1, beyond.value),
    )


def saturation(activation: ActivationLike, q: Values, threshold: float) -> Float[Array, "..."]:
    """P(|φ'(x)| < threshold · max|φ'|), x ~ N(0, q): the fraction of saturated units.

    Parameters
    ----------
    activation
        φ.
    q
        The variance, >= 0, of any shape; differentiable.
    threshold
        A fraction of the largest slope, in (0, 1]; a Python number.

    Returns
    -------
    Array
        A probability, of q's shape.

    Raises
    ------
    InputError
        If the threshold is not in (0, 1].
    """
    activation = activations.get(activation)
    intervals = activation.saturated_intervals(threshold)
    # On |x|, each interval is at most two; erfc then keeps its digits far out in the tail.
    low = np.concatenate([np.maximum(intervals[:, 0], 0), np.maximum(-intervals[:, 1], 0)])
    high = np.concatenate([np.maximum(intervals[:, 1], 0), np.maximum(-intervals[:, 0], 0)])
    low, high = low[low < high], high[low < high]
    return over_entries(q, lambda v: jnp.sum(_tail(low, v) - _tail(high, v)))


def _tail(x: np.ndarray, q: Array) -> Array:
    """P(y > x), y ~ N(0, q), for x >= 0."""
    finite = np.where(np.isinf(x), 0.0, x)
    # erfc(30) is 0; the floor on q keeps its derivative from being 0·inf.
    floor = jnp.asarray(np.maximum(finite**2 / 1800, 1e-25), q.dtype)
    scaled = jnp.asarray(finite, q.dtype) * jax.lax.rsqrt(2 * jnp.maximum(q, floor))
    return jnp.where(np.isinf(x), 0, erfc(scaled) / 2)
