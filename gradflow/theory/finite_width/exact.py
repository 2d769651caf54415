"""Finite width: how networks of n units a layer differ from the limit, and from one another.

For one input, exactly: given the layer's conditional variance v, its pre-activations are
independent N(0, v), and the next layer's is

    v' = σ_b² + (σ_w²/n) Σ_i φ(√v g_i)²,    g_i ~ N(0, 1).

For φ that is homogeneous of degree 1 and σ_b = 0, v'/v has a law of its own in every layer, and so
has the gain of any fixed direction u, ‖J u‖² (Hanin & Nica 2018, arXiv:1812.05994): the exact laws
below, and their log-normal limit. For any φ, the variance of v and the shift of its mean follow to
first order in 1/n: the four-point vertex and the next-to-leading metric of Roberts, Yaida & Hanin
2022, 'The Principles of Deep Learning Theory', ch. 4.

Weights that are not Gaussian, but independent, symmetric and of excess kurtosis κ, have units whose
fourth cumulant, given the layer below, is

    κ₄ = κ (σ_w²/n)² Σ_i h_i⁴,

so that Var ‖W u‖² is (2 + κ Σ u_i⁴)/n for one layer: 0.8/n for uniform weights and a one-hot input,
for κ = -6/5, and 2/n for a dense one of many entries. Means and variances of homogeneous φ follow
exactly, as only fourth moments enter; for any φ, E[f(z)] moves by κ₄/6 times its second derivative
by v, to first order in 1/n.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, gammaln, polygamma
from jaxtyping import Array, ArrayLike, Float

from gradflow import activations, gaussian
from gradflow._checks import check_count, check_scale, check_sequence, is_traced
from gradflow.activations import Activation, ActivationLike
from gradflow.errors import InputError

__all__ = [
    "ForwardMoments",
    "GainMoments",
    "LogNormal",
    "Vertex",
    "forward_moments",
    "gain_moments",
]
__all__ += ["log_normal", "vertex"]

_Three: TypeAlias = tuple[Array, Array, Array]
_Four: TypeAlias = tuple[Array, Array, Array, Array]


class GainMoments(NamedTuple):
    """Exact moments of the gain ‖h^L‖²/‖x‖² = ‖J u‖², over random networks.

    The plain moments count networks whose units are all dead as 0; those of the logarithm are given
    that some unit lives in every layer. Plain moments may leave the float's range: their logarithms
    do not.
    """

    mean: Float[Array, ""]
    second_moment: Float[Array, ""]
    variance: Float[Array, ""]
    log_mean: Float[Array, ""]
    log_second_moment: Float[Array, ""]
    alive: Float[Array, ""]  # probability
    mean_of_log: Float[Array, ""]
    variance_of_log: Float[Array, ""]


class LogNormal(NamedTuple):
    """The limit of the law of log ‖J u‖², width and depth large together: N(mean, variance)."""

    mean: Float[Array, ""]
    variance: Float[Array, ""]  # β


class ForwardMoments(NamedTuple):
    """Of each layer, shape (layers,): the conditional variance v, and q̂ = (1/n) Σ_i z_i²."""

    mean: Float[Array, " layers"]  # of both
    variance_of_v: Float[Array, " layers"]
    variance_of_q: Float[Array, " layers"]


class Vertex(NamedTuple):
    """First order in 1/n, shape (layers,): v has mean K + G1/n + O(1/n²) and variance V4/n."""

    K: Float[Array, " layers"]
    V4: Float[Array, " layers"]
    G1: Float[Array, " layers"]


def _check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    checked = tuple(
        check_count("width", width)
        for width in check_sequence("widths", widths, "the input's width and every layer's")
    )
    if len(checked) < 2:
        raise InputError(f"widths is {checked!r}; it needs an input and at least one layer")
    return checked


def _homogeneous(activation: ActivationLike) -> tuple[Activation, Array, Array]:
    """φ, E[φ(g)²] and E[φ(g)⁴]."""
    phi = activations.get(activation)
    if not phi.homogeneous:
        raise InputError(
            f"activation is {phi.name!r}; the law is exact for linear, relu and leaky_relu alone; "
            "use vertex"
        )
    one = jnp.ones(())
    return phi, gaussian.moment(phi, "phi2", one), gaussian.moment(phi, "phi4", one)


def gain_moments(
    activation: ActivationLike,
    widths: Sequence[int],
    sigma_w2: ArrayLike = 1.0,
    *,
    kurtosis: ArrayLike = 0.0,
    input_fourth: ArrayLike | None = None,
) -> GainMoments:
    """Exact moments of the squared gain of a network without biases.

    Parameters
    ----------
    activation
        φ, homogeneous: linear, relu, or leaky_relu, whose moments of the logarithm are NaN (they
        have no closed form).
    widths
        (n_0, n_1, …, n_L): the input's width, then every layer's.
    sigma_w2
        σ_w² > 0: weights of variance σ_w²/fan_in.
    kurtosis
        κ, the excess kurtosis of weights that are independent and symmetric: 0 for Gaussian ones,
        -6/5 for uniform ones (`ensembles.Distribution` has it).
    input_fourth
        Σ u_i⁴ of the input u of length 1: from 1/n_0, if all entries are of one size (the default),
        to 1 if one is all there is. It matters where κ is not 0.

    Returns
    -------
    GainMoments
        Each a scalar. Where κ is not 0, plain moments alone: the others are NaN.

    Raises
    ------
    InputError
        If an argument is out of range.

    References
    ----------
    Hanin & Nica 2018, arXiv:1812.05994, section 2. A layer multiplies by σ_w²/n_in times a χ² of as
    many degrees of freedom as it has live units: n, or Binomial(n, 1/2) for ReLU.
    """
    phi, second, fourth = _homogeneous(activation)
    widths = _check_widths(widths)
    log_scale = _log_scale(sigma_w2)
    n_in, n = (jnp.asarray(w, second.dtype) for w in (widths[:-1], widths[1:]))
    log_means = jnp.sum(log_scale + jnp.log(n / n_in) + jnp.log(second))
    kurtosis, share = _fourth_cumulant(kurtosis, input_fourth, widths[0], 1 / widths[0])

    def step(share: Array, n: Array) -> tuple[Array, Array]:
        """Follow E Σ h_i⁴/E ‖h‖⁴; return how much more E ‖h‖⁴ grows than (E ‖h‖²)²."""
        of_units = fourth / second**2 * (1 + kurtosis * share / 3)
        return of_units / (of_units + n - 1), jnp.log1p((of_units - 1) / n)

    _, excess = jax.lax.scan(step, jnp.broadcast_to(share, jnp.shape(kurtosis + share)), n)
    log_excess = jnp.sum(excess)
    gaussian_alone = jnp.where(kurtosis == 0, 0.0, jnp.nan)
    distinct, counts = np.unique(widths[1:], return_counts=True)
    alive, mean, variance = (jnp.zeros(()) for _ in range(3))
    for width, count in zip(distinct.tolist(), counts.tolist(), strict=True):
        logs = _log_of_chi_squared(phi, width)
        alive, mean, variance = (
            total + count * one for total, one in zip((alive, mean, variance), logs, strict=True)
        )
    return GainMoments(
        mean=jnp.exp(log_means),
        second_moment=jnp.exp(2 * log_means + log_excess),
        variance=jnp.exp(2 * log_means) * jnp.expm1(log_excess),
        log_mean=log_means,
        log_second_moment=2 * log_means + log_excess,
        alive=jnp.exp(alive) + gaussian_alone,
        mean_of_log=mean + jnp.sum(log_scale - jnp.log(n_in)) + gaussian_alone,
        variance_of_log=variance + gaussian_alone,
    )


def _fourth_cumulant(
    kurtosis: ArrayLike, input_fourth: ArrayLike | None, inputs: int, least: float
) -> tuple[Array, Array]:
    """κ and Σ u_i⁴ of the input, checked; by default, that of equal entries."""
    fourth = 1 / inputs if input_fourth is None else input_fourth
    for name, value, low, high in (
        ("kurtosis", kurtosis, -2.0, np.inf),  # that of ±1 with equal probability is the least
        ("input_fourth", fourth, least * (1 - 1e-6), 1 + 1e-6),
    ):
        if not is_traced(value) and not low <= float(np.asarray(value)) <= high:
            allowed = f"from {low:.6g} to {high:.6g}" if high < np.inf else f"at least {low:g}"
            raise InputError(f"{name} is {value!r}; it is a number, {allowed}")
    dtype = jnp.result_type(kurtosis, fourth, 0.0)
    return jnp.asarray(kurtosis, dtype), jnp.asarray(fourth, dtype)


def _log_scale(sigma_w2: ArrayLike) -> Array:
    check_scale("sigma_w2", sigma_w2)
    if not isinstance(sigma_w2, jax.core.Tracer) and not np.all(np.asarray(sigma_w2) > 0):
        raise InputError(f"sigma_w2 is {sigma_w2!r}; it is a finite number above 0")
    return jnp.log(jnp.asarray(sigma_w2, jnp.result_type(sigma_w2, 0.0)))


def _log_of_chi_squared(phi: Activation, n: int) -> tuple[Array, Array, Array]:
    """Log P(alive), and mean and variance, given that, of log Σ φ(g_i)² over n units."""
    sides = np.array([float(phi(jnp.asarray(x))) for x in (1.0, -1.0)]) ** 2
    if np.ptp(sides) == 0:  # linear
        half = jnp.asarray(n / 2.0)
        return jnp.zeros(()), digamma(half) + jnp.log(2.0 * sides[0]), polygamma(1, half)
    if sides.min() > 0:
        return jnp.zeros(()), jnp.asarray(jnp.nan), jnp.asarray(jnp.nan)
    live = jnp.arange(1, n + 1, dtype=jnp.zeros(()).dtype)
    log_weight = gammaln(n + 1.0) - gammaln(live + 1) - gammaln(n - live + 1) - n * np.log(2.0)
    log_alive = jnp.log1p(-(2.0**-n))
    weight = jnp.exp(log_weight - log_alive)
    # About the typical one, so that nothing large is squared and subtracted.
    log = digamma(live / 2) - digamma(jnp.asarray(max(n / 4.0, 0.5)))
    mean = jnp.sum(weight * log)
    variance = jnp.sum(weight * (log - mean) ** 2) + jnp.sum(weight * polygamma(1, live / 2))
    middle = digamma(jnp.asarray(max(n / 4.0, 0.5))) + jnp.log(2.0 * sides.max())
    return log_alive, mean + middle, variance


def log_normal(
    activation: ActivationLike, widths: Sequence[int], sigma_w2: ArrayLike = 1.0
) -> LogNormal:
    """The log-normal limit of `gain_moments`: log m - β/2 and β = Σ_l c/n_l.

    m is the mean gain and c = E φ⁴/(E φ²)² - 1: 2 for linear networks, 5 for ReLU.

    Parameters
    ----------
    activation, widths, sigma_w2
        As for `gain_moments`.

    Raises
    ------
    InputError
        If an argument is out of range.

    References
    ----------
    Hanin & Nica 2018, arXiv:1812.05994, theorem 1.
    """
    _, second, fourth = _homogeneous(activation)
    widths = _check_widths(widths)
    log_scale = _log_scale(sigma_w2)
    n_in, n = (jnp.asarray(w, second.dtype) for w in (widths[:-1], widths[1:]))
    beta = jnp.sum((fourth / second**2 - 1) / n)
    return LogNormal(jnp.sum(log_scale + jnp.log(n / n_in) + jnp.log(second)) - beta / 2, beta)


def forward_moments(
    activation: ActivationLike,
    q1: ArrayLike,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    *,
    width: int,
    depth: int,
    kurtosis: ArrayLike = 0.0,
    input_fourth: ArrayLike | None = None,
) -> ForwardMoments:
    """Exact means and variances of the length of one input, biases or not.

    Parameters
    ----------
    activation
        φ, homogeneous: linear, relu or leaky_relu.
    q1
        v of layer 1, > 0: σ_w² |x|²/n_0 + σ_b².
    sigma_w2, sigma_b2
        σ_w² and σ_b², >= 0.
    width, depth
        Units a layer, and layers.
    kurtosis, input_fourth
        As for `gain_moments`; biases are Gaussian. The default input is as wide as a layer.

    Raises
    ------
    InputError
        If an argument is out of range.
    """
    _, second, fourth = _homogeneous(activation)
    n = check_count("width", width)
    q1, w2, b2 = _scalars(q1=q1, sigma_w2=sigma_w2, sigma_b2=sigma_b2)
    given = _fourth_cumulant(kurtosis, input_fourth, n, 0.0)
    kurtosis, share = (x.astype(q1.dtype) for x in given)
    noise = (fourth - second**2) / n

    def step(state: _Three, _: None) -> tuple[_Three, _Three]:
        mean, variance, cumulant = state  # the last is E κ₄
        of_units = fourth / n * cumulant / 3
        after = w2**2 * (variance * (second**2 + noise) + mean**2 * noise + of_units)
        fourths = fourth / n * (variance + mean**2 + cumulant / 3)  # E Σ h_i⁴/n²
        return (b2 + w2 * second * mean, after, kurtosis * w2**2 * fourths), state

    depth = check_count("depth", depth)
    start = (q1, jnp.zeros_like(q1), kurtosis * (q1 - b2) ** 2 * share)
    _, (mean, variance, cumulant) = jax.lax.scan(step, start, None, length=depth)
    of_mean = (2 * (variance + mean**2) + cumulant) / n
    return ForwardMoments(mean, variance, variance + of_mean)


def vertex(
    activation: ActivationLike,
    q1: ArrayLike,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    *,
    depth: int,
    kurtosis: ArrayLike = 0.0,
    input_fourth: ArrayLike = 1.0,
) -> Vertex:
    """The length's infinite-width value, variance and shift to first order in 1/n.

    Parameters
    ----------
    activation
        φ.
    q1
        q of layer 1, > 0.
    sigma_w2, sigma_b2
        σ_w² and σ_b², >= 0.
    depth
        L >= 1: layers of equal width.
    kurtosis
        κ, the weights' excess kurtosis: see `gain_moments`. It moves means to first order, not V4.
    input_fourth
        n Σ u_i⁴ of the input u of length 1, which is to be of order 1: 1 where all n_0 = n entries
        are of one size, 3 for Gaussian ones. (Of a sparse one units are not Gaussian at any width.)

    Returns
    -------
    Vertex
        K, V4 and G1 at layers 1 to L. q̂ = (1/n) Σ z² has the mean of v and the variance
        (V4 + 2 K²)/n. Good as long as V4/(n K²) is much less than 1.

    Raises
    ------
    InputError
        If an argument is out of range.

    References
    ----------
    Roberts, Yaida & Hanin 2022, sections 4.3 (K, V4) and 4.5 (G1).
    """
    phi = activations.get(activation)
    gaussian.check(phi)
    depth = check_count("depth", depth)
    q1, w2, b2 = _scalars(q1=q1, sigma_w2=sigma_w2, sigma_b2=sigma_b2)

    def second_moment(q: Array) -> Array:
        return gaussian.moment(phi, "phi2", q)

    kurtosis = jnp.asarray(kurtosis, q1.dtype)

    def step(state: _Four, _: None) -> tuple[_Four, _Three]:
        q, v4, g1, cumulant = state  # the last is n κ₄
        g, first, second = (
            second_moment(q),
            jax.grad(second_moment)(q),
            jax.grad(jax.grad(second_moment))(q),
        )
        fourth = gaussian.moment(phi, "phi4", q)
        new = (
            b2 + w2 * g,
            w2**2 * (fourth - g**2 + first**2 * v4),
            w2 * (first * g1 + second * (v4 / 2 + cumulant / 6)),
            kurtosis * w2**2 * fourth,
        )
        return new, (q, v4, g1)

    of_input = kurtosis * (q1 - b2) ** 2 * jnp.asarray(input_fourth, q1.dtype)
    start = (q1, jnp.zeros_like(q1), jnp.zeros_like(q1), of_input)
    _, layers = jax.lax.scan(step, start, None, length=depth)
    return Vertex(*layers)


def _scalars(**values: ArrayLike) -> list[Array]:
    for name, value in values.items():
        check_scale(name, value)
    dtype = jnp.result_type(*values.values(), 0.0)
    return [jnp.asarray(value, dtype) for value in values.values()]
