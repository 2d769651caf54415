"""Statistics: what is reported for each layer; how it is measured, predicted and corrected.

One `Statistic` has three readings: the measurement in a random network, the prediction at infinite
width, and the correction, what finite width does to it. So comparing the first two is subtraction,
and all have one name and one axis label. To add a statistic, write one assignment in this file.

A quantity that is positive by nature and may leave the range of a float (a gradient's variance at
depth 1000) is carried as its natural logarithm from start to end, under the name ``log_<name>``.
All are averaged over the sites (the inputs of the batch); over units first, where there are units.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, polygamma
from jaxtyping import Array, Float

from gradflow import gaussian
from gradflow._checks import check_instance
from gradflow._first_order import FirstOrder, diagonal, outer
from gradflow._layers import BackwardLimit, BackwardSample, ForwardLimit, ForwardSample, exp
from gradflow.errors import InputError

__all__ = ["ALL", "BackwardLimit", "BackwardSample", "FirstOrder"]
__all__ += ["ForwardLimit", "ForwardSample", "Statistic"]

# The shift of a mean over networks and the variance between them, each of shape (layers,).
_Correction = tuple[Float[Array, " layers"], Float[Array, " layers"]]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A quantity per layer: its name, axis label, and three readings.

    Attributes
    ----------
    name
        The field's name for it, the same in theory, simulation and files.
    label
        Axis label, with its unit where it has one.
    measure
        A function of a `ForwardSample` or `BackwardSample`, one layer of a random network, to a
        scalar (a logarithm if ``log``).
    predict
        A function of a `ForwardLimit` or `BackwardLimit`, the layer at infinite width, to a scalar
        (a logarithm if ``log``). Without it theory says nothing of the statistic.
    correct
        A function of a `FirstOrder`, all layers of networks of finite width, to the shift of the
        mean over networks and the variance between networks, each of shape (layers,), to first
        order in 1/width; of the logarithm if ``log``. Without it that effect is not known.
    backward
        Whether it is read in the backward pass.
    log
        Whether it is carried as its natural logarithm.
    sites
        How many inputs it needs.
    fraction
        Whether it is a fraction of units, whose standard error has a binomial floor.
    """

    name: str
    label: str
    measure: Callable[..., Array]
    predict: Callable[..., Array] | None = None
    correct: Callable[[FirstOrder], _Correction] | None = None
    backward: bool = False
    log: bool = False
    sites: int = 1
    fraction: bool = False

    def __post_init__(self) -> None:
        check_instance("name", self.name, str, "a word, as 'q'")
        for name in ("measure", "predict", "correct"):
            reading = getattr(self, name)
            if not callable(reading) and (name == "measure" or reading is not None):
                raise InputError(f"{name} is {reading!r}; it is a function of a layer")

    @property
    def key(self) -> str:
        """Its name in a result of `propagate` or `predict`: with ``log_`` where it is a log."""
        return f"log_{self.name}" if self.log else self.name

    @property
    def logarithmic(self) -> bool:
        """Whether its values are natural logarithms, by choice (``log``) or by definition."""
        return self.log or self.name.startswith("log_")


def _log_mean_exp(x: Float[Array, " sites"]) -> Array:
    return jax.nn.logsumexp(x) - jnp.log(jnp.asarray(x.shape[0], x.dtype))


def _log_mean_square(rows: Float[Array, "sites n"], log_norm: Float[Array, " sites"]) -> Array:
    return _log_mean_exp(2 * log_norm) - math.log(rows.shape[1])


def _log_variance(rows: Float[Array, "sites n"], log_norm: Float[Array, " sites"]) -> Array:
    return _log_mean_exp(jnp.log(jnp.var(rows, axis=1)) + 2 * log_norm)


def _mean(x: Float[Array, "sites n"], log_scale: Float[Array, " sites"]) -> Array:
    return jnp.mean(jnp.mean(x, axis=1) * jnp.exp(log_scale))


def _correlation(covariance: Float[Array, "sites sites"]) -> Array:
    """Mean over the pairs of inputs of k_ab / √(k_aa k_bb)."""
    a, b = jnp.triu_indices(covariance.shape[0], 1)
    length = jnp.sqrt(jnp.diagonal(covariance))
    return jnp.mean(covariance[a, b] / (length[a] * length[b]))


def _mean_cosine(rows: Float[Array, "sites n"]) -> Array:
    """Mean cosine over the pairs of unit rows: |Σ_a u_a|² without its diagonal, over their number.

    In sites · n operations, where all pairs would take sites times as many.
    """
    sites = rows.shape[0]
    pairs = jnp.sum(jnp.square(jnp.sum(rows, axis=0))) - jnp.sum(jnp.square(rows))
    return pairs / (sites * (sites - 1) or math.nan)  # one site alone has no pair


def _over_sites(name: str, limit: ForwardLimit) -> Float[Array, " sites"]:
    """A moment of φ(z), or the ``"saturation"``, for each site; NaN where z is not Gaussian."""
    phi, q, saturation = limit.activation, jnp.diagonal(limit.covariance), name == "saturation"
    if limit.about is None and saturation:
        averages = gaussian.saturation(phi, q, limit.saturation_threshold)
    elif limit.about is None:
        averages = gaussian.moment(phi, name, q)
    else:
        law = (limit.about.shifts, limit.about.chances)
        v = jnp.diagonal(limit.about.gaussian_part(limit.covariance))
        averages = (
            gaussian.shifted_saturation(phi, limit.saturation_threshold, *law, v)
            if saturation
            else gaussian.shifted_moment(phi, name, *law, v)
        )
    if saturation:  # of a signal that is 0, as behind weights of 0
        flat = jnp.abs(phi.derivative(jnp.zeros_like(q))) < phi.saturated_slope(
            limit.saturation_threshold
        )
        averages = jnp.where(q == 0, flat, averages)
    return jnp.where(limit.gaussian, averages, jnp.nan)


def _mean_over_sites(shift: Array, covariance: Array) -> _Correction:
    """The correction of a mean over sites, from those of each site."""
    return shift.mean(1), covariance.mean((1, 2))


def _log_mean_over_sites(value: Array, shift: Array, covariance: Array) -> _Correction:
    """The correction of the logarithm of a mean over sites of ``value``, (layers, sites)."""
    total = value.sum(1)
    return shift.sum(1) / total, covariance.sum((1, 2)) / total**2


def _correct_activation_mean(finite: FirstOrder) -> _Correction:
    scale = jnp.exp(finite.layers.log_scale)
    mean = finite.mean_over_units(finite.layers.averages.mean, "shifted")
    return _mean_over_sites(mean.shift * scale, mean.covariance * outer(scale, scale))


def _length_covariance(finite: FirstOrder) -> Float[Array, "layers sites sites"]:
    """The covariance between networks of the mean square of the pre-activations."""
    return finite.v.covariance + 2 * finite.layers.covariance**2 / finite.layers.width[:, :, None]


def _correct_preactivation_mean(finite: FirstOrder) -> _Correction:
    scale = jnp.exp(finite.layers.log_scale)
    covariance = finite.layers.covariance / finite.layers.width[:, :, None] * outer(scale, scale)
    return _mean_over_sites(jnp.zeros_like(scale), covariance)


def _correct_activation_variance(finite: FirstOrder) -> _Correction:
    averages, width = finite.layers.averages, finite.layers.width
    mean, variance = averages.mean.value, averages.variance
    square = variance.value + mean**2
    product = averages.product("shifted", "shifted")
    mean_a, mean_b = mean[:, :, None], mean[:, None, :]
    # E[(c_a - m_a)² (c_b - m_b)²] of c = φ - φ(0)
    fourth = (
        averages.product("shifted2", "shifted2")
        - 2 * mean_b * averages.product("shifted2", "shifted")
        - 2 * mean_a * averages.product("shifted", "shifted2")
        + 4 * mean_a * mean_b * product
        + mean_b**2 * square[:, :, None]
        + mean_a**2 * square[:, None, :]
        - 3 * (mean_a * mean_b) ** 2
    )
    return _log_mean_over_sites(
        variance.value,
        variance.shift(finite.v) - variance.value / width,
        (fourth - outer(variance.value, variance.value)) / width[:, :, None]
        + outer(variance.first, variance.first) * finite.v.covariance,
    )


def _correct_correlation(finite: FirstOrder) -> _Correction:
    """The correction of the mean cosine; its variance is known of a single pair."""
    if finite.pairs is None:
        unknown = jnp.full_like(finite.layers.width[:, 0], jnp.nan)
        return unknown, unknown

    def cosine(moments: Array) -> Array:
        return moments[2] / jnp.sqrt(moments[0] * moments[1])

    moments = finite.pairs.moments
    gradient = jax.vmap(jax.vmap(jax.grad(cosine)))(moments)
    hessian = jax.vmap(jax.vmap(jax.hessian(cosine)))(moments)
    q_a, q_b, c = jnp.moveaxis(moments, -1, 0)
    # Of means over n units of z_a², z_b² and z_a z_b (Wick).
    spread = jnp.stack(
        [2 * q_a**2, 2 * c**2, 2 * q_a * c]
        + [2 * c**2, 2 * q_b**2, 2 * q_b * c]
        + [2 * q_a * c, 2 * q_b * c, q_a * q_b + c**2],
        -1,
    ).reshape(*c.shape, 3, 3)
    covariance = finite.pairs.covariance + spread / finite.layers.width[..., None, None]
    shift = (gradient * finite.pairs.shift).sum(-1) + (hessian * covariance).sum((-2, -1)) / 2
    variance = jnp.einsum("lpi,lpij,lpj->lp", gradient, covariance, gradient)
    one_pair = c.shape[1] == 1
    return shift.mean(1), jnp.where(one_pair, jnp.maximum(variance.mean(1), 0), jnp.nan)


def _correct_chi(finite: FirstOrder) -> _Correction:
    chi = jnp.exp(finite.layers.backward.log_ratio[:-1])
    shift, variance = _mean_over_sites(
        chi * finite.gradient.chi_shift, outer(chi, chi) * finite.gradient.chi_covariance
    )
    top = jnp.full_like(finite.layers.width[:1, 0], jnp.nan)
    return jnp.concatenate([shift, top]), jnp.concatenate([variance, top])


def _of_each_site(finite: FirstOrder) -> Float[Array, "1 sites sites"]:
    """1 for a site with itself and 0 for two: the top gradients of two sites are independent."""
    covariance = finite.layers.covariance
    return jnp.eye(covariance.shape[1], dtype=covariance.dtype)[None]


def _correct_gradient_variance(finite: FirstOrder) -> _Correction:
    # Gradients of different inputs: their shares of the sum of squares.
    share = jax.nn.softmax(finite.layers.backward.log_variance, axis=1)
    top = 2 * _of_each_site(finite) / finite.layers.width[-1, 0]
    covariance = finite.gradient.covariance + top
    return (share * finite.gradient.shift).sum(1), (outer(share, share) * covariance).sum((1, 2))


def _correct_log_gradient_norm(finite: FirstOrder) -> _Correction:
    half = finite.layers.width[-1, 0] / 2  # ‖δ^L‖² is χ² of n_L degrees of freedom
    covariance = finite.gradient.covariance
    shift = finite.gradient.shift - diagonal(covariance) / 2 + digamma(half) - jnp.log(half)
    top = _of_each_site(finite) * polygamma(1, half)
    return shift.mean(1) / 2, (covariance + top).mean((1, 2)) / 4


def _correct_weight_gradient_variance(finite: FirstOrder) -> _Correction:
    layers, v, gradient = finite.layers, finite.v, finite.gradient
    of_weights = layers.q - layers.sigma_b2  # σ_w² |h|²/n of the layer below
    share = jax.nn.softmax(layers.backward.log_variance + jnp.log(of_weights), axis=1)
    per_length = outer(1 / of_weights, 1 / of_weights)
    each = _of_each_site(finite)
    mixed = v.covariance * gradient.by_v[:, None, :] / of_weights[:, :, None]
    biases = jnp.sqrt(outer(layers.sigma_b2, layers.sigma_b2))
    cosine2 = (layers.covariance - biases) ** 2 * per_length
    covariance = (
        gradient.covariance
        + 2 * each / layers.width[-1, 0]
        + v.covariance * per_length
        + mixed
        + jnp.swapaxes(mixed, 1, 2)
        + jnp.where(each == 1, 0, 2 * cosine2 * gradient.overlap)
    )
    of_length = (v.shift + gradient.by_v * diagonal(v.covariance)) / of_weights
    shift = share * (gradient.shift + of_length)
    return shift.sum(1), (outer(share, share) * covariance).sum((1, 2))


q = Statistic(
    "q",
    "second moment of pre-activations q",
    measure=lambda s: _log_mean_square(*s.directions),
    predict=lambda limit: _log_mean_exp(
        jnp.log(jnp.diagonal(limit.covariance)) + 2 * limit.log_scale
    ),
    correct=lambda finite: _log_mean_over_sites(
        finite.layers.q, finite.v.shift, _length_covariance(finite)
    ),
    log=True,
)
preactivation_mean = Statistic(
    "preactivation_mean",
    "mean of pre-activations",
    measure=lambda s: _mean(s.preactivation, s.log_scale),
    predict=lambda limit: jnp.mean(limit.mean * jnp.exp(limit.log_scale)),
    correct=_correct_preactivation_mean,
)
preactivation_variance = Statistic(
    "preactivation_variance",
    "variance of pre-activations over units",
    measure=lambda s: _log_variance(*s.directions),
    predict=lambda limit: _log_mean_exp(
        jnp.log(jnp.diagonal(limit.covariance) - limit.mean**2) + 2 * limit.log_scale
    ),
    correct=lambda finite: _log_mean_over_sites(
        finite.layers.q,
        finite.v.shift - finite.layers.q / finite.layers.width,
        _length_covariance(finite),
    ),
    log=True,
)
activation_mean = Statistic(
    "activation_mean",
    "mean of activations",
    measure=lambda s: _mean(s.activation, s.log_scale),
    predict=lambda limit: jnp.mean(
        _over_sites("phi", limit) * jnp.exp(gaussian.growth(limit.activation, limit.log_scale)[0])
    ),
    correct=_correct_activation_mean,
)
activation_variance = Statistic(
    "activation_variance",
    "variance of activations over units",
    measure=lambda s: _log_variance(*s.outputs),
    predict=lambda limit: _log_mean_exp(
        jnp.log(jnp.where(jnp.diagonal(limit.covariance) == 0, 0, _over_sites("variance", limit)))
        + 2 * gaussian.growth(limit.activation, limit.log_scale)[2]
    ),
    correct=_correct_activation_variance,
    log=True,
)
saturation = Statistic(
    "saturation",
    "fraction of saturated units, |φ'| far below max|φ'|",
    measure=lambda s: jnp.mean(jnp.abs(s.slope) < s.saturated_slope),
    predict=lambda limit: jnp.mean(_over_sites("saturation", limit)),
    correct=lambda finite: _mean_over_sites(
        *finite.mean_over_units(finite.layers.averages.saturation, "saturated")
    ),
    fraction=True,
)
correlation = Statistic(
    "correlation",
    "correlation c of two inputs' pre-activations",
    measure=lambda s: _mean_cosine(s.directions[0]),
    predict=lambda limit: _correlation(limit.covariance),
    correct=_correct_correlation,
    sites=2,
)
chi = Statistic(
    "chi",
    "χ, factor of the mean squared gradient going down one layer",
    measure=lambda s: jnp.mean(exp(s.log_ratio)),
    predict=lambda limit: jnp.mean(exp(limit.log_ratio)),
    correct=_correct_chi,
    backward=True,
)
gradient_variance = Statistic(
    "gradient_variance",
    "mean square of ∂C/∂z over units",
    measure=lambda s: _log_mean_exp(2 * s.log_norm) - jnp.log(s.width),
    predict=lambda limit: _log_mean_exp(limit.log_variance),
    correct=_correct_gradient_variance,
    backward=True,
    log=True,
)
log_gradient_norm = Statistic(
    "log_gradient_norm",
    "log ‖∂C/∂z‖, natural logarithm",
    measure=lambda s: jnp.mean(s.log_norm),
    predict=lambda limit: (
        jnp.mean(
            limit.log_variance
            + jnp.log(limit.width)
            + (0 if limit.log_spread is None else limit.log_spread)
        )
        / 2
    ),
    correct=_correct_log_gradient_norm,
    backward=True,
)
weight_gradient_variance = Statistic(
    "weight_gradient_variance",
    "mean square of ∂C/∂W over weights",
    measure=lambda s: 2 * s.log_weight_norm - jnp.log(jnp.where(s.weights > 0, s.weights, jnp.nan)),
    predict=lambda limit: limit.log_weight_variance,
    correct=_correct_weight_gradient_variance,
    backward=True,
    log=True,
)

ALL = tuple(value for value in list(vars().values()) if isinstance(value, Statistic))
