"""All of the theory at one σ_w² and σ_b², as plain numbers by name."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from gradflow import activations, gaussian
from gradflow._arguments import as_numbers
from gradflow._checks import check_count, check_scale, check_sequence, shown
from gradflow._programs import program
from gradflow.activations import Activation, ActivationLike
from gradflow.errors import InputError
from gradflow.theory import criticality, fixed_points, mean_field
from gradflow.theory import spectrum as spectra
from gradflow.theory.finite_width import exact

if TYPE_CHECKING:
    import xarray

__all__ = ["LABELS", "correlation_map", "summarise"]

# The words for each quantity in tables, by its name.
LABELS = fixed_points.LABELS | {
    "activation": "activation",
    "sigma_w2": "σ_w²",
    "sigma_b2": "σ_b²",
    "depth": "layers",
    "width": "units a layer",
    "start": "q of the first layer",
    "q": "q",
    "q_star_from_1": "q* that q = 1 goes to",
    "phase": "phase",
    "stable": "stable",
    "marginal": "marginal",
    "half_stable": "half-stable",
    "slope_second_moment": "E φ'²",
    "slope_fourth_moment": "E φ'⁴",
    "correlation_map": "next layer's correlation",
    "correlation_map_slope": "slope of the correlation map",
    "universality_class": "universality class",
    "six_xi_c": "trainable depth by correlations, 6 ξ_c (layers)",
    "six_abs_xi_grad": "trainable depth by gradients, 6 |ξ_∇| (layers)",
    "representable_depth": "depth where a gradient leaves",
    "mean_squared_singular_value": "mean of s²",
    "squared_singular_value_variance": "variance of s²",
    "squared_singular_value_relative_variance": "variance of s² / (mean of s²)²",
    "activation_mean": "mean of activations",
    "activation_second_moment": "second moment of activations",
    "chi": "χ",
    "jacobian_norm": "‖J‖²_F/n from layer 1",
    "log_jacobian_norm": "its natural logarithm",
    "gain_parallel": "along the input",
    "gain_orthogonal": "orthogonal to it",
    "gain_ratio": "ratio",
    "K": "q",
    "V4": "n × its variance over networks (V₄)",
    "G1": "n × shift of its mean (G₁)",
    "V4_over_K2": "V₄/q²",
    "q_mean": "mean of q, last layer",
    "q_variance": "variance of q over networks, last layer",
    "conditional_variance_variance": "variance over networks of E[q | layers below]",
    "alive": "share of networks with a live unit in every layer",
    "gain_mean": "mean of the gain ‖J u‖²",
    "gain_second_moment": "second moment of the gain",
    "gain_variance": "variance of the gain",
    "log_gain_mean": "mean of log gain, of networks that live",
    "log_gain_variance": "variance of log gain, of networks that live",
    "log_normal_mean": "mean of log gain, log-normal limit",
    "log_normal_variance": "variance of log gain, log-normal limit",
}

# The one entry of `fixed_points` where every length is a fixed point.
_EVERY_LENGTH: dict[str, Any] = {
    "q_star": math.nan,
    "chi1": 1.0,
    "chi_par": 1.0,
    "xi_q": math.inf,
    "xi_grad": math.inf,
    "q_error": 0.0,
    "stable": None,
    "marginal": True,
    "half_stable": False,
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def summarise(
    activation: ActivationLike,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    *,
    start: float = 1.0,
    correlations: Sequence[float] = (),
    depth: int = 10,
    width: int = 1000,
) -> dict[str, Any]:
    """Return fixed points, depth scales, phase, correlation map, layers, Jacobian, finite width.

    Parameters
    ----------
    activation, sigma_w2, sigma_b2
        φ, σ_w² and σ_b², both >= 0.
    start
        q of the first layer, > 0.
    correlations
        Correlations c at which the correlation map is evaluated, each from -1 to 1.
    depth, width
        The numbers of layers, and of units in each, both >= 1.

    Returns
    -------
    dict
        Numbers and names; q*, χ and ξ by the names of `fixed_points.Analysis`. ``fixed_points`` is
        a list, ``q_star_from_1`` the fixed point that q = 1 tends to.
        ``correlation_map`` and ``correlation_map_slope`` are lists, one number for each of
        ``correlations``, empty without a q*; ``slope_second_moment`` and
        ``slope_fourth_moment`` are E φ'² and E φ'⁴ at q*. ``layers`` is a dict of arrays of shape
        (depth,), from the first layer on: q, moments, χ, the Jacobian's norm, gains of tangents
        along the input and orthogonal to it, and the first order in 1/n of the length
        (`finite_width.Vertex`). ``jacobian`` is at q*, for Gaussian and orthogonal weights;
        ``finite_width`` is exact, and empty where no law is known.

    Raises
    ------
    InputError
        If an argument is out of range.
    """
    activation = activations.get(activation)
    depth, width = check_count("depth", depth), check_count("width", width)
    correlations = check_sequence("correlations", correlations, "correlations, each from -1 to 1")
    c = np.asarray(as_numbers("correlations", correlations), np.float64)
    if not np.all(np.abs(c) <= 1):
        raise InputError(f"correlations is {list(correlations)}; each is from -1 to 1")
    gaussian.check(activation)
    check_scale("start", start, positive=True)
    check_scale("sigma_w2", sigma_w2)
    check_scale("sigma_b2", sigma_b2)
    with jax.enable_x64(True):
        found = _numbers(activation, sigma_w2, sigma_b2, start, c, depth=depth)
        numbers = jax.tree.map(np.asarray, found)
        analysis, from_one = (jax.tree.map(lambda x, i=i: x[i], numbers.of_starts) for i in (0, 1))
        diverges = from_one.status == fixed_points.Status.DIVERGES
        values = analysis._asdict()
        del values["status"]
        return {
            "activation": activation.name,
            "sigma_w2": sigma_w2,
            "sigma_b2": sigma_b2,
            "fixed_points": _fixed_points(numbers.points, int(analysis.status)),
            "q_star_from_1": math.inf if diverges else float(from_one.q_star),
            "start": start,
            "status": fixed_points.Status(int(analysis.status)).name.lower(),
            "phase": criticality.Phase(int(numbers.phase)).name.lower(),
            **{name: float(value) for name, value in values.items()},
            **_at_fixed_point(numbers.at_fixed_point, float(analysis.q_star), sigma_w2),
            "universality_class": criticality.universality_class(activation).value,
            "six_xi_c": float(numbers.trainable[0]),
            "six_abs_xi_grad": float(numbers.trainable[1]),
            "representable_depth": {
                dtype: float(numbers.representable[i]) for i, dtype in enumerate(_DTYPES)
            },
            "depth": depth,
            "width": width,
            "layers": _layers(numbers.profiles, start, sigma_w2, sigma_b2, depth),
            "finite_width": _finite_width(activation, start, sigma_w2, sigma_b2, depth, width),
        }


class _Numbers(NamedTuple):
    """What the theory says of one point: the results of one program."""

    points: fixed_points.LengthFixedPoints
    of_starts: fixed_points.Analysis  # from the start, and from 1
    phase: Array
    trainable: list[Array]  # 6 ξ_c and 6 |ξ_∇|
    representable: list[Array]  # of each dtype
    at_fixed_point: "_AtLength"
    profiles: "_Profiles"


@program("activation", "depth")
def _numbers(
    activation: Activation,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike,
    start: ArrayLike,
    c: ArrayLike,
    *,
    depth: int,
) -> _Numbers:
    w2, b2, q1, c = (jnp.asarray(x, float) for x in (sigma_w2, sigma_b2, start, c))
    starts = jnp.stack([q1, jnp.ones_like(q1)])
    points, of_starts = fixed_points.length_and_analyses(activation, w2, b2, starts)
    analysis = jax.tree.map(lambda x: x[0], of_starts)
    q = jnp.where(analysis.q_star > 0, analysis.q_star, 1)
    return _Numbers(
        points=points,
        of_starts=of_starts,
        phase=criticality.phase(analysis),
        trainable=[fixed_points.trainable_depth(x) for x in (analysis.xi_c, analysis.xi_grad)],
        representable=[fixed_points.representable_depth(analysis.chi1, t) for t in _DTYPES],
        at_fixed_point=_at_length(activation, q, w2, b2, c, depth=depth),
        profiles=_profiles(activation, q1, w2, b2, depth=depth),
    )


class _AtLength(NamedTuple):
    """Slope moments, correlation maps and Jacobian of a network whose layers all have length q."""

    slope_moments: Array  # E φ'² and E φ'⁴
    maps: dict[str, Array]
    jacobian: dict[str, tuple[Array, Array]]


@program("activation", "depth")
def _at_length(
    activation: Activation,
    q: ArrayLike,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike,
    c: ArrayLike,
    *,
    depth: int,
) -> _AtLength:
    q, sigma_w2, sigma_b2, c = map(jnp.asarray, (q, sigma_w2, sigma_b2, c))
    law = spectra.slope_law(activation, q)
    return _AtLength(
        jnp.stack([jnp.sum(law.weights * law.values**k) for k in (1, 2)]),
        _maps(activation, q, sigma_w2, sigma_b2, c),
        {
            weights: spectra.mean_and_variance(law, sigma_w2, depth, weights)
            for weights in ("gaussian", "orthogonal")
        },
    )


class _Profiles(NamedTuple):
    """Lengths, gains of tangents and vertices of each layer, all of shape (layers,)."""

    profile: dict[str, Array]
    gains: dict[str, Array]
    vertex: exact.Vertex


@program("activation", "depth")
def _profiles(
    activation: Activation, q1: ArrayLike, sigma_w2: ArrayLike, sigma_b2: ArrayLike, *, depth: int
) -> _Profiles:
    q1, sigma_w2, sigma_b2 = map(jnp.asarray, (q1, sigma_w2, sigma_b2))
    scales = sigma_w2, sigma_b2
    length = jnp.maximum((q1 - sigma_b2) / sigma_w2, jnp.finfo(q1.dtype).tiny)
    return _Profiles(
        mean_field.profile(activation, q1, *scales, depth=depth),
        mean_field.direction_gains(activation, length, *scales, depth=depth),
        exact.vertex(activation, q1, *scales, depth=depth),
    )


def _fixed_point(points: fixed_points.LengthFixedPoints, index: int) -> dict[str, Any]:
    """Return one of a length map's fixed points, with its stability as three booleans."""
    kind = fixed_points.Stability(int(points.stability[index]))
    values = points._asdict()
    del values["stability"]
    of = fixed_points.Stability
    return {
        **{name: float(value[index]) for name, value in values.items()},
        "stable": kind in (of.STABLE, of.MARGINAL, of.HALF_STABLE),
        "marginal": kind in (of.MARGINAL, of.MARGINAL_UNSTABLE),
        "half_stable": kind is of.HALF_STABLE,
    }


def _fixed_points(points: fixed_points.LengthFixedPoints, status: int) -> list[dict[str, Any]]:
    if status == fixed_points.Status.NEUTRAL:
        return [_EVERY_LENGTH]
    kinds = np.asarray(points.stability)
    present = np.flatnonzero(kinds != fixed_points.Stability.ABSENT)
    return [_fixed_point(points, int(index)) for index in present]


def _at_fixed_point(numbers: _AtLength, q: float, sigma_w2: float) -> dict[str, Any]:
    """Return E φ'² and E φ'⁴, C and C', and the Jacobian's moments at q*; empty without it."""
    if not q > 0:
        moments = dict.fromkeys(("slope_second_moment", "slope_fourth_moment"), math.nan)
        return {**moments, "correlation_map": [], "correlation_map_slope": [], "jacobian": {}}
    second, fourth = map(float, numbers.slope_moments)
    return {
        "slope_second_moment": second,
        "slope_fourth_moment": fourth,
        **{name: values.tolist() for name, values in numbers.maps.items()},
        "jacobian": {
            weights: {
                "mean_squared_singular_value": float(mean),
                "squared_singular_value_variance": float(mean**2 * relative),
                "squared_singular_value_relative_variance": float(relative),
            }
            for weights, (mean, relative) in numbers.jacobian.items()
            if sigma_w2 > 0
        },
    }


@program("activation")
def _maps(
    activation: Activation, q: ArrayLike, sigma_w2: ArrayLike, sigma_b2: ArrayLike, c: ArrayLike
) -> dict[str, Array]:
    q, sigma_w2, sigma_b2, c = map(jnp.asarray, (q, sigma_w2, sigma_b2, c))
    values, slopes = (
        jax.vmap(lambda c, of=of: of(activation, q * jnp.array([[1.0, c], [c, 1.0]]))[0, 1])(c)
        for of in (gaussian.kernel, gaussian.derivative_kernel)
    )
    return {
        "correlation_map": (sigma_w2 * values + sigma_b2) / q,
        "correlation_map_slope": sigma_w2 * slopes,
    }


def correlation_map(
    activation: ActivationLike,
    sigma_w2: float,
    sigma_b2: float = 0.0,
    c: Sequence[float | int] | np.ndarray | None = None,
    *,
    start: float = 1.0,
) -> "xarray.Dataset":
    """The next layer's correlation C(c) of two inputs at q*, and its slope C'(c), in float64.

    C(c) = (σ_w² E[φ(u) φ(v)] + σ_b²)/q*, with u and v of variance q* and covariance c q* (Poole
    et al. 2016, arXiv:1606.05340, eq. 5); `gradflow.figures.correlation_map` draws it.

    Parameters
    ----------
    activation, sigma_w2, sigma_b2
        φ, σ_w² and σ_b², both >= 0.
    c
        Correlations from -1 to 1; 201 evenly spaced ones by default.
    start
        q of the first layer, > 0, which settles at q*.

    Returns
    -------
    xarray.Dataset
        ``correlation_map`` and ``correlation_map_slope`` over ``c``, with the attributes
        ``activation``, ``sigma_w2``, ``sigma_b2``, ``q_star``, ``c_star`` and ``chi1``, which is
        C'(1).

    Raises
    ------
    InputError
        If an argument is out of range, or the length settles at no q* > 0.
    """
    import xarray  # noqa: PLC0415  (slow to import)

    activation = activations.get(activation)
    given = np.linspace(-1, 1, 201) if c is None else np.asarray(as_numbers("c", c), np.float64)
    if given.ndim != 1 or not given.size or not np.all(np.abs(given) <= 1):
        raise InputError(f"c is {shown(c)}; it is a list of correlations, each from -1 to 1")
    with jax.enable_x64(True):
        found = fixed_points.analyse(activation, sigma_w2, sigma_b2, start=start)
        q = float(found.q_star)
        if not 0 < q < math.inf:
            status = fixed_points.Status(int(found.status)).name.lower().replace("_", " ")
            raise InputError(
                f"sigma_w2 is {sigma_w2:g} and sigma_b2 is {sigma_b2:g}, where the length of "
                f"{activation.name} settles at no q* > 0 ({status}); the map is that at a q*"
            )
        maps = jax.tree.map(np.asarray, _maps(activation, q, sigma_w2, sigma_b2, given))
    return xarray.Dataset(
        {name: ("c", values, {"long_name": LABELS[name]}) for name, values in maps.items()},
        coords={"c": ("c", given, {"long_name": "correlation of two inputs"})},
        attrs={
            "activation": activation.name,
            "sigma_w2": float(sigma_w2),
            "sigma_b2": float(sigma_b2),
            "q_star": q,
            "c_star": float(found.c_star),
            "chi1": float(found.chi1),
        },
    )


def _layers(
    profiles: _Profiles, start: float, sigma_w2: float, sigma_b2: float, depth: int
) -> dict[str, Any]:
    profile, gains, vertex = jax.tree.map(np.asarray, profiles)
    if not sigma_w2 * start > sigma_w2 * sigma_b2:  # no input has this q in layer 1
        gains = {name: np.full(depth, math.nan) for name in gains}
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return {
            "q": profile["q"],
            "activation_mean": profile["activation_mean"],
            "activation_second_moment": profile["activation_second_moment"],
            "chi": profile["chi"],
            "log_jacobian_norm": profile["log_jacobian_norm"],
            "jacobian_norm": np.exp(profile["log_jacobian_norm"]),
            "gain_parallel": gains["parallel"],
            "gain_orthogonal": gains["orthogonal"],
            "gain_ratio": gains["parallel"] / gains["orthogonal"],
            **vertex._asdict(),
            "V4_over_K2": vertex.V4 / vertex.K**2,
        }


def _finite_width(
    activation: Activation, start: float, sigma_w2: float, sigma_b2: float, depth: int, width: int
) -> dict[str, float]:
    """Return exact moments of the last layer's length, and of the gain ‖J u‖² without biases.

    Moments of the gain's logarithm are over networks with a nonzero gain, a fraction ``alive``.
    """
    if not (activation.homogeneous and sigma_w2 > 0):
        return {}
    length = exact.forward_moments(activation, start, sigma_w2, sigma_b2, width=width, depth=depth)
    widths = [width] * (depth + 1)
    law = exact.gain_moments(activation, widths, sigma_w2)
    limit = exact.log_normal(activation, widths, sigma_w2)
    moments = {
        "q_mean": length.mean[-1],
        "q_variance": length.variance_of_q[-1],
        "conditional_variance_variance": length.variance_of_v[-1],
        "alive": law.alive,
        "gain_mean": law.mean,
        "gain_second_moment": law.second_moment,
        "gain_variance": law.variance,
        "log_gain_mean": law.mean_of_log,
        "log_gain_variance": law.variance_of_log,
        "log_normal_mean": limit.mean,
        "log_normal_variance": limit.variance,
    }
    return {name: float(value) for name, value in moments.items()}
