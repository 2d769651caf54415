"""Statistics: what is reported for each layer, how it is measured and how it is predicted.

One `Statistic` pairs the measurement in a random network with the prediction at infinite width, so
that comparing the two is subtraction, and gives both one name and one axis label. To add one, write
one assignment in this file.

A quantity that is positive by nature and may leave the range of a float (a gradient's variance at
depth 1000) is carried as its natural logarithm from start to end, under the name ``log_<name>``.
All are averaged over the sites (the inputs of the batch); over units first, where there are units.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray
from jaxtyping import Array, Bool, Float

from gradflow import gaussian
from gradflow._checks import check_instance, unknown_name
from gradflow.activations import Activation
from gradflow.errors import InputError, UnknownName
from gradflow.norms import unit_rows

__all__ = ["ALL", "SATURATION_THRESHOLD", "BackwardLaw", "BackwardSample", "ForwardLaw"]
__all__ += ["ForwardSample", "Prediction", "Statistic", "Values", "checked"]
__all__ += ["key_of", "named"]

# A unit counts as saturated when its slope is below this fraction of the activation's largest
# slope. For the logistic that is an output below 0.01 or above 0.99: σ' < 0.01 · 0.99.
SATURATION_THRESHOLD = 4 * 0.01 * 0.99


class ForwardSample(eqx.Module):
    """One layer of one random network, on the way up; true signals are exp(log_scale) times."""

    preactivation: Float[Array, "sites n"]
    activation: Float[Array, "sites n"]
    slope: Float[Array, "sites n"]
    log_scale: Float[Array, " sites"]
    max_slope: float = eqx.field(static=True)

    @functools.cached_property
    def directions(self) -> tuple[Float[Array, "sites n"], Float[Array, " sites"]]:
        """The pre-activations at length 1, and the logarithms of their true lengths."""
        rows, log_norm = unit_rows(self.preactivation)
        return rows, log_norm + self.log_scale

    @functools.cached_property
    def outputs(self) -> tuple[Float[Array, "sites n"], Float[Array, " sites"]]:
        """The same of the activations."""
        rows, log_norm = unit_rows(self.activation)
        return rows, log_norm + self.log_scale


class ForwardLaw(eqx.Module):
    """One layer at infinite width, on the way up.

    Attributes
    ----------
    covariance, mean, log_scale
        Second moments and means over units of what the layer hands on, at exp(-log_scale) times
        its signals' size; the scale is 0 unless second moments are beyond `gaussian.log_limits`.
    gaussian
        Whether it is known to be Gaussian over units; otherwise averages of φ of it are NaN.
    """

    covariance: Float[Array, "*layers sites sites"]
    mean: Float[Array, "*layers sites"]
    log_scale: Float[Array, "*layers sites"]
    gaussian: Bool[Array, "*layers"]
    activation: Activation = eqx.field(static=True)


class BackwardSample(eqx.Module):
    """The gradient δ = ∂C/∂z at a layer, or all, of one random network, per input, as logs.

    ``log_ratio`` is log (‖δ^l‖²/n_l) - log (‖δ^{l+1}‖²/n_{l+1}); NaN at the top layer.
    ``log_weight_norm`` is log ‖∂C/∂W‖_F of the layer's ``weights``, all matrices together, C the
    mean cost over the inputs; ``width`` is n_l.
    """

    log_norm: Float[Array, "*layers sites"]
    log_ratio: Float[Array, "*layers sites"]
    log_weight_norm: Float[Array, "*layers"]
    width: Float[Array, "*layers"]
    weights: Float[Array, "*layers"]


class BackwardLaw(eqx.Module):
    """The gradient at one layer at infinite width, per input, as logs.

    ``log_variance`` is of one component of δ; ``log_ratio`` is log χ, NaN at the top layer.
    ``missing`` says why there is no theory of some layers' signals and gradients, if so.
    """

    log_variance: Float[Array, "*layers sites"]
    log_ratio: Float[Array, "*layers sites"]
    log_weight_variance: Float[Array, "*layers"]
    width: Float[Array, "*layers"]
    missing: str | None = eqx.field(static=True, default=None)


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A quantity per layer: its name, axis label, and two readings.

    Attributes
    ----------
    name
        The field's name for it, the same in theory, simulation and files.
    label
        Axis label, with its unit where it has one.
    measure, predict
        From a sample of one layer, and from its law, to a scalar (a logarithm if ``log``). A
        statistic without ``predict`` is measured, and theory says nothing of it.
    backward
        Whether it is read on the way down.
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
    backward: bool = False
    log: bool = False
    sites: int = 1
    fraction: bool = False

    def __post_init__(self) -> None:
        check_instance("name", self.name, str, "a word, as 'q'")
        for name, reading in (("measure", self.measure), ("predict", self.predict)):
            if not callable(reading) and (name == "measure" or reading is not None):
                raise InputError(f"{name} is {reading!r}; it is a function of a layer")

    @property
    def key(self) -> str:
        """Its name in a result of `propagate` or `predict`: with ``log_`` where it is a log."""
        return f"log_{self.name}" if self.log else self.name

    @property
    def logarithmic(self) -> bool:
        """Whether what is carried is a natural logarithm, by choice or by definition."""
        return self.log or self.name.startswith("log_")


def _exp(x: Array | np.ndarray) -> Array | np.ndarray:
    """Return exp(x), of NumPy's float64 as float64, whatever JAX's x64 setting."""
    if isinstance(x, np.ndarray):
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(x))
    # Of a NaN that the compiler knows of, XLA's exp in float32 is any number (on CPUs, JAX 0.10).
    return jnp.where(jnp.isnan(x), x, jnp.exp(x))


def _log_mean_exp(x: Float[Array, " sites"]) -> Array:
    return jax.nn.logsumexp(x) - jnp.log(jnp.asarray(x.shape[0], x.dtype))


def _log_mean_square(rows: Float[Array, "sites n"], log_norm: Float[Array, " sites"]) -> Array:
    return _log_mean_exp(2 * log_norm) - math.log(rows.shape[1])


def _log_variance(rows: Float[Array, "sites n"], log_norm: Float[Array, " sites"]) -> Array:
    return _log_mean_exp(jnp.log(jnp.var(rows, axis=1)) + 2 * log_norm)


def _mean(x: Float[Array, "sites n"], log_scale: Float[Array, " sites"]) -> Array:
    return jnp.mean(jnp.mean(x, axis=1) * jnp.exp(log_scale))


def _correlation(gram: Float[Array, "sites sites"]) -> Array:
    """Mean over the pairs of inputs of k_ab / √(k_aa k_bb)."""
    a, b = jnp.triu_indices(gram.shape[0], 1)
    length = jnp.sqrt(jnp.diagonal(gram))
    return jnp.mean(gram[a, b] / (length[a] * length[b]))


def _mean_cosine(rows: Float[Array, "sites n"]) -> Array:
    """Return the mean over the pairs of unit rows of their cosine: |Σ_a u_a|² without its diagonal.

    In sites · n operations, where all pairs would take sites times as many.
    """
    sites = rows.shape[0]
    pairs = jnp.sum(jnp.square(jnp.sum(rows, axis=0))) - jnp.sum(jnp.square(rows))
    return pairs / (sites * (sites - 1) or math.nan)  # one site alone has no pair


def _over_sites(f: Callable[[Array], Array], law: ForwardLaw) -> Array:
    """Return what f(q) is on average over Gaussian pre-activations of variance q, of each site."""
    found = jax.vmap(f)(jnp.diagonal(law.covariance))
    return jnp.where(law.gaussian, found, jnp.nan)


def _saturated_slope(sample: ForwardSample) -> float:
    """Return the slope below which a unit is saturated, in the floats' range."""
    largest = float(jnp.finfo(sample.slope.dtype).max)
    return min(SATURATION_THRESHOLD * sample.max_slope, largest)


q = Statistic(
    "q",
    "second moment of pre-activations q",
    measure=lambda s: _log_mean_square(*s.directions),
    predict=lambda law: _log_mean_exp(jnp.log(jnp.diagonal(law.covariance)) + 2 * law.log_scale),
    log=True,
)
preactivation_mean = Statistic(
    "preactivation_mean",
    "mean of pre-activations",
    measure=lambda s: _mean(s.preactivation, s.log_scale),
    predict=lambda law: jnp.mean(law.mean * jnp.exp(law.log_scale)),
)
preactivation_variance = Statistic(
    "preactivation_variance",
    "variance of pre-activations over units",
    measure=lambda s: _log_variance(*s.directions),
    predict=lambda law: _log_mean_exp(
        jnp.log(jnp.diagonal(law.covariance) - law.mean**2) + 2 * law.log_scale
    ),
    log=True,
)
activation_mean = Statistic(
    "activation_mean",
    "mean of activations",
    measure=lambda s: _mean(s.activation, s.log_scale),
    predict=lambda law: jnp.mean(
        _over_sites(lambda v: gaussian.moment(law.activation, "phi", v), law)
        * jnp.exp(gaussian.growth(law.activation, law.log_scale)[0])
    ),
)
activation_variance = Statistic(
    "activation_variance",
    "variance of activations over units",
    measure=lambda s: _log_variance(*s.outputs),
    predict=lambda law: _log_mean_exp(
        jnp.log(
            _over_sites(
                lambda v: jnp.where(v == 0, 0, gaussian.moment(law.activation, "variance", v)), law
            )
        )
        + 2 * gaussian.growth(law.activation, law.log_scale)[2]
    ),
    log=True,
)
saturation = Statistic(
    "saturation",
    f"fraction of units with |φ'| < {SATURATION_THRESHOLD:.3g} max|φ'|",
    measure=lambda s: jnp.mean(jnp.abs(s.slope) < _saturated_slope(s)),
    predict=lambda law: jnp.mean(
        _over_sites(lambda v: gaussian.saturation(law.activation, v, SATURATION_THRESHOLD), law)
    ),
    fraction=True,
)
correlation = Statistic(
    "correlation",
    "correlation c of two inputs' pre-activations",
    measure=lambda s: _mean_cosine(s.directions[0]),
    predict=lambda law: _correlation(law.covariance),
    sites=2,
)
chi = Statistic(
    "chi",
    "χ, factor of the mean squared gradient going down one layer",
    measure=lambda s: jnp.mean(_exp(s.log_ratio)),
    predict=lambda law: jnp.mean(_exp(law.log_ratio)),
    backward=True,
)
gradient_variance = Statistic(
    "gradient_variance",
    "mean square of ∂C/∂z over units",
    measure=lambda s: _log_mean_exp(2 * s.log_norm) - jnp.log(s.width),
    predict=lambda law: _log_mean_exp(law.log_variance),
    backward=True,
    log=True,
)
log_gradient_norm = Statistic(
    "log_gradient_norm",
    "log ‖∂C/∂z‖, natural logarithm",
    measure=lambda s: jnp.mean(s.log_norm),
    predict=lambda law: jnp.mean(law.log_variance + jnp.log(law.width)) / 2,
    backward=True,
)
weight_gradient_variance = Statistic(
    "weight_gradient_variance",
    "mean square of ∂C/∂W over weights",
    measure=lambda s: 2 * s.log_weight_norm - jnp.log(jnp.where(s.weights > 0, s.weights, jnp.nan)),
    predict=lambda law: law.log_weight_variance,
    backward=True,
    log=True,
)

ALL = tuple(value for value in list(vars().values()) if isinstance(value, Statistic))


def key_of(name: str, known: Iterable[str]) -> str:
    """Return the key under which a statistic is kept: its name, or ``log_`` and its name.

    Raises
    ------
    UnknownName
        If neither is known.
    """
    for key in (name, f"log_{name}"):
        if key in known:
            return key
    raise UnknownName(str(unknown_name("quantity", name, known)))


class Values(dict[str, Any]):
    """Arrays by a statistic's key, that also answer to its name: a pytree, and a dict of the keys.

    Of what is kept as a natural logarithm, under ``log_<name>``, the quantity itself is made when
    it is asked for by its name; it may leave the float's range.
    """

    def __missing__(self, name: str) -> Any:
        return _exp(self[key_of(name, self.keys())])

    def __contains__(self, name: object) -> bool:
        return any(map(super().__contains__, (name, f"log_{name}")))

    def get(self, name: str, default: Any = None) -> Any:
        """Return the values of this key or name, or the default."""
        try:
            return self[name]
        except UnknownName:
            return default


def _flatten(values: Values) -> tuple[list[tuple[jax.tree_util.DictKey, Any]], tuple[str, ...]]:
    return [(jax.tree_util.DictKey(key), value) for key, value in values.items()], tuple(values)


jax.tree_util.register_pytree_with_keys(
    Values, _flatten, lambda keys, leaves: Values(zip(keys, leaves, strict=True))
)


class Prediction(eqx.Module):
    """Theory's value of each statistic at each layer: a pytree of arrays of shape (layers,).

    Attributes
    ----------
    values
        By key: positive quantities as natural logarithms, under ``log_<name>``.
    missing
        One sentence that says why there is no number of some layers (NaN), or None.
    """

    values: dict[str, Array | np.ndarray] = eqx.field(converter=Values)
    missing: str | None = eqx.field(static=True, default=None)

    def __getitem__(self, name: str) -> Array | np.ndarray:
        """Return a statistic by its key, or by its name: then in its own unit, no logarithm."""
        return self.values[name]

    def __repr__(self) -> str:
        """Return what there is, in one line."""
        shape = jnp.shape(next(iter(self.values.values()), jnp.zeros(0)))
        return f"theory of shape {shape}, the last axis that of layers: {', '.join(self.values)}"

    def to_xarray(self) -> xarray.Dataset:
        """Return the labelled values: every quantity by name and, where it has one, its log."""
        return labelled(
            xarray.Dataset(
                {name: ("layer", np.asarray(v)) for name, v in with_names(self.values).items()},
                coords={"layer": layers(len(next(iter(self.values.values()))))},
            )
        )


def layers(depth: int) -> np.ndarray:
    """Return the layer numbers 1 … depth."""
    return np.arange(1, depth + 1)


def with_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by key, and with each log key the quantity itself by its name."""
    logs = {s.name: _exp(np.asarray(values[s.key])) for s in ALL if s.log and s.key in values}
    return {**logs, **values}


def labelled(dataset: xarray.Dataset, known: Iterable[Statistic] | None = None) -> xarray.Dataset:
    """Give every variable that is named after a statistic (of `ALL`) its label."""
    for statistic in ALL if known is None else known:
        names = {statistic.name: statistic.label}
        if statistic.log:
            names[statistic.key] = f"natural logarithm of {statistic.label}"
        for name, label in names.items():
            for variable, words in ((name, label), (f"{name}_theory", f"{label}, by theory")):
                if variable in dataset:
                    dataset[variable].attrs["long_name"] = words
    return dataset


def checked(wanted: Any) -> tuple[Statistic, ...]:
    """Return the statistics to measure.

    Raises
    ------
    InputError
        If one is none, or two have one name.
    """
    found = tuple(wanted) if isinstance(wanted, Iterable) else (wanted,)
    for statistic in found:
        check_instance(
            "wanted", statistic, Statistic, "Statistics, as statistics.ALL or (statistics.q,)"
        )
    names = [statistic.name for statistic in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"wanted has {name!r} twice; each statistic has a name of its own")
    return found


def named() -> dict[str, Statistic]:
    """Return every statistic by its key in results."""
    return {statistic.key: statistic for statistic in ALL}
