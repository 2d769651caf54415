"""Activations: a function φ, where it is not smooth, and its Gaussian averages in closed form.

To add one, assign one `Activation` at module level: `ALL`, `get`, and the shared law tests find it.
Derivatives are never written here: φ' and φ'' come from JAX. Where JAX loses digits (1 - tanh² and
1 - sigmoid vanish in the tails) the function itself is written so that it does not: simulation and
theory differentiate the same function.

Closed forms are optional: for x ~ N(0, q), or for (u, v) Gaussian with variances q_u, q_v and
covariance k. They are written so that nothing cancels for q from 0 to 1e4; a form that would is
left to the quadrature of `gradflow.gaussian`. Those that take more than a line, with their sources,
are in `gradflow._closed_forms`.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf as _erf
from jaxtyping import Array, Float, ScalarLike

from gradflow import _closed_forms
from gradflow._checks import check_sequence, is_number, unknown_name
from gradflow._closed_forms import Moment, PairMoment, Values
from gradflow._roots import bisect
from gradflow.errors import InputError

__all__ = ["ALL", "Activation", "custom", "get", "leaky_relu"]

_Elementwise: TypeAlias = Callable[[Array], Array]


@dataclass(frozen=True)
class Activation:
    """An elementwise function φ, its kinks, and the closed forms of its Gaussian averages.

    Hashable and compared by name, function and kinks: usable as a static field of an equinox module
    and as a static argument of `jax.jit`.

    Attributes
    ----------
    name
        The name that `get` finds it by.
    function
        φ, elementwise, written in JAX.
    kinks
        Points where φ or one of its derivatives is not smooth; quadrature panels end there.
    homogeneous
        Whether φ(a·x) = a·φ(x) for every a > 0.
    moments
        Closed forms in q of some of `gradflow.gaussian.Moments`, by field name, or of "variance".
    kernel, derivative_kernel
        Closed forms of E[φ(u) φ(v)] and E[φ'(u) φ'(v)] in (q_u, q_v, k).
    """

    name: str
    function: _Elementwise
    kinks: tuple[float, ...] = ()
    homogeneous: bool = False
    moments: Mapping[str, Moment] = field(default_factory=dict, compare=False, repr=False)
    kernel: PairMoment | None = field(default=None, compare=False, repr=False)
    derivative_kernel: PairMoment | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"function is {self.function!r}; it is an elementwise function")

    def __call__(self, x: Values) -> Float[Array, "..."]:
        """Return φ(x)."""
        return self.function(jnp.asarray(x))

    def derivative(self, x: Values) -> Float[Array, "..."]:
        """Return φ'(x); at a kink, the value that JAX's rule for φ gives."""
        x = jnp.asarray(x)
        return jax.jvp(self.function, (x,), (jnp.ones_like(x),))[1]

    def second_derivative(self, x: Values) -> Float[Array, "..."]:
        """Return φ''(x) away from kinks, without the delta functions of `slope_jumps`."""
        x = jnp.asarray(x)
        return jax.jvp(self.derivative, (x,), (jnp.ones_like(x),))[1]

    @property
    def slope_jumps(self) -> tuple[tuple[float, float | Array], ...]:
        """The pairs (kink, φ'(kink+) - φ'(kink-)) where φ' jumps, so that φ'' holds a delta.

        Where φ has parameters that are being traced, all kinks, with traced jumps that may be 0.
        """
        if self._known_slope_jumps is not None:
            return self._known_slope_jumps
        points = jnp.asarray(self.kinks)
        finfo = jnp.finfo(points.dtype)
        step = jnp.maximum(4 * finfo.eps * jnp.abs(points), 4 * finfo.tiny)
        jumps = self.derivative(points + step) - self.derivative(points - step)
        return tuple(zip(self.kinks, jumps, strict=True))

    @functools.cached_property
    def _known_slope_jumps(self) -> tuple[tuple[float, float], ...] | None:
        """The `slope_jumps`, or None if parameters are traced, because tracers must not be kept."""
        if not self.kinks:
            return ()
        # A step as small as the number format allows, and not subnormal: XLA flushes those to 0.
        points = np.asarray(self.kinks)
        step = np.maximum(4 * np.finfo(float).eps * np.abs(points), 1e-200)
        with _concrete():
            above, below = (
                _compiled_derivative(self, jnp.asarray(x)) for x in (points + step, points - step)
            )
        if isinstance(above, jax.core.Tracer):
            return None
        jumps = np.asarray(above) - np.asarray(below)
        return tuple(
            (float(k), float(j)) for k, j in zip(points, jumps, strict=True) if abs(j) > 1e-12
        )

    @functools.cached_property
    def max_slope(self) -> float:
        """The supremum of |φ'|, over |x| <= 2^20; one-sided at kinks."""
        x, slope = self._scan
        best = float(np.max(np.abs(slope)))
        centre, width = float(x[np.argmax(np.abs(slope))]), 2.0**-5
        for _ in range(4):  # zoom in on the largest of the grid; an extremum is flat
            near = np.linspace(centre - width, centre + width, 401)
            slopes = np.abs(_slopes(self, near))
            best = max(best, float(slopes.max()))
            centre, width = float(near[slopes.argmax()]), width / 100
        return best

    @functools.cached_property
    def _scan(self) -> tuple[np.ndarray, np.ndarray]:
        """Points that resolve φ', and φ' there."""
        half = np.concatenate(
            [np.arange(0, 16, 2.0**-9), np.arange(16, 2048, 2.0**-5), 2 ** np.linspace(11, 20, 999)]
        )
        kinks = np.asarray(self.kinks)
        beside = 1e-12 * np.maximum(1, np.abs(kinks))
        x = np.unique(np.concatenate([-half, half, kinks - beside, kinks + beside]))
        return x, _slopes(self, x)

    @functools.cached_property
    def bounds(self) -> tuple[float, float] | None:
        """The least and largest value of φ, or None if it is unbounded.

        φ is taken for bounded if no value beyond |x| = 16 is outside the range of those up to there
        by more than a tenth of that range.
        """
        x = np.concatenate([self._scan[0], [-1e30, 1e30]])
        with _concrete():
            values = np.asarray(_compiled(self, jnp.asarray(x)))
        near = values[np.abs(x) <= 16]
        low, high = float(values.min()), float(values.max())
        beyond = max(near.min() - low, high - near.max())
        return (low, high) if beyond <= 0.1 * (near.max() - near.min()) else None

    @property
    def powers(self) -> tuple["_Powers", "_Powers"]:
        """The powers of |x| that φ and its slope are proportional to, near 0 and far from it.

        Parameters of φ that are being traced are traced through.
        """
        return self._known_powers or self._traced_powers()

    @functools.cached_property
    def _known_powers(self) -> tuple["_Powers", "_Powers"] | None:
        """The `powers`, or None if parameters are traced, because tracers must not be kept."""
        with _concrete():
            both = _compiled_powers(self)
        if isinstance(both[0].value, jax.core.Tracer):
            return None
        at_zero, beyond = (_Powers(*map(float, powers)) for powers in both)
        if np.isnan(beyond.value) and self.bounds is not None:
            beyond = beyond._replace(value=0.0)
        return at_zero, beyond

    def _traced_powers(self) -> tuple["_Powers", "_Powers"]:
        def power(f: _Elementwise, x: Array, of_zero: float) -> Array:
            sizes = jnp.hypot(f(x), f(-x))
            powers = jnp.log(sizes[1:] / sizes[:-1]) / math.log(2)
            alike = jnp.abs(powers[0] - powers[1]) < jnp.sqrt(jnp.finfo(powers.dtype).eps)
            return jnp.where(jnp.all(sizes == 0), of_zero, jnp.where(alike, powers[1], jnp.nan))

        def powers(x: Array, slope_of_zero: float) -> "_Powers":
            return _Powers(power(self, x, 1.0), power(self.derivative, x, slope_of_zero))

        small, large = (jnp.asarray(_PROBES * size) for size in (_SMALL, 1 / _SMALL))
        beyond = powers(large, -math.inf)
        # Where φ' decays, E[φ'²] is that near 0, ∫ φ'² dx/√(2πq).
        return powers(small, 0.0), beyond._replace(slope=jnp.maximum(beyond.slope, -0.5))

    def saturated_intervals(self, threshold: float) -> np.ndarray:
        """Find the intervals in which |φ'(x)| < threshold · max|φ'|.

        Parameters
        ----------
        threshold
            A fraction of the largest slope, in (0, 1].

        Returns
        -------
        numpy.ndarray
            Shape (intervals, 2): disjoint, ascending; the ends may be ±inf. Features of φ' narrower
            than 2^-5 (2^-9 for |x| < 16) can be missed, and those beyond |x| = 2048 where φ'
            oscillates; a point where |φ'| only touches the threshold is no end.

        Raises
        ------
        InputError
            If the threshold is not in (0, 1].
        """
        if not 0 < threshold <= 1:
            raise InputError(f"threshold is {threshold!r}; it is a fraction in (0, 1]")
        return _saturated_intervals(self, float(threshold))


class _Powers(NamedTuple):
    """The powers of |x| that φ and φ' are proportional to, at 0 or at ±∞; NaN where there is none.

    At ±∞ the slope's power is that of q in E[φ'²], x ~ N(0, q), and so not below -1/2.
    """

    value: ScalarLike
    slope: ScalarLike


# The |x| at which powers are computed: far below and above those that averages depend on.
_SMALL = 1e-18
_PROBES = np.array([1.0, 2.0, 4.0])


@functools.lru_cache(maxsize=256)
def _saturated_intervals(activation: Activation, threshold: float) -> np.ndarray:
    level = threshold * activation.max_slope
    x, slope = activation._scan
    # |φ'| crosses the level where φ' - level or φ' + level changes sign. Searching for both finds
    # the interval around a zero of φ' even where it is narrower than a step of the grid.
    ends = np.concatenate([_roots(activation, x, slope, s * level) for s in (1, -1)])
    kinks = np.asarray(activation.kinks)
    for kink in kinks:
        ends[np.abs(ends - kink) < 1e-11 * max(1, abs(kink))] = kink
    ends = np.unique(np.concatenate([ends, kinks]))
    edges = np.concatenate([[-np.inf], ends, [np.inf]])
    inside = np.clip(edges, 2 * min(x[0], *ends, 0), 2 * max(x[-1], *ends, 0))
    below = np.abs(_slopes(activation, (inside[1:] + inside[:-1]) / 2)) < level
    # Runs of pieces below the level are one interval each.
    change = np.diff(np.concatenate([[0], below.astype(int), [0]]))
    intervals = np.stack([edges[change == 1], edges[change == -1]], axis=1)
    intervals.flags.writeable = False  # cached, so shared by all callers
    return intervals


def _roots(activation: Activation, x: np.ndarray, slope: np.ndarray, level: float) -> np.ndarray:
    """Return the solutions of φ'(x) = level between points of a grid."""
    above = slope > level
    (left,) = np.nonzero(above[1:] != above[:-1])
    if not left.size:
        return x[left]
    # Of one size, as a program is compiled for each.
    parts = -(-left.size // _EVALUATED)
    low, high, start = (
        np.resize(end, (parts, _EVALUATED)) for end in (x[left], x[left + 1], above[left])
    )
    with _concrete():
        brackets = zip(low, high, start, strict=True)
        roots = [np.asarray(_compiled_bisection(activation, level, *each)) for each in brackets]
        return np.concatenate(roots)[: left.size]


@contextmanager
def _concrete() -> Iterator[None]:
    """Evaluate at once and in float64, also while a caller's function is being traced."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        yield


_compiled = jax.jit(Activation.__call__, static_argnums=0)
_compiled_derivative = jax.jit(Activation.derivative, static_argnums=0)
_compiled_powers = jax.jit(Activation._traced_powers, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _compiled_bisection(
    activation: Activation, level: Array, low: Array, high: Array, above: Array
) -> Array:
    """Return the roots of φ' - level in brackets; whether it is ``above`` 0 at their lower ends."""
    ends = bisect(lambda x: (activation.derivative(x) > level) != above, low, high, steps=60)
    return (ends[0] + ends[1]) / 2


# Points at which a slope is evaluated in one call.
_EVALUATED = 4096


def _slopes(activation: Activation, x: np.ndarray) -> np.ndarray:
    """Return φ'(x) as known numbers in float64."""
    # Of one size, as a program is compiled for each.
    parts = -(-x.size // _EVALUATED)
    padded = np.resize(np.asarray(x, float), (parts, _EVALUATED))
    with _concrete():
        slopes = [np.asarray(_compiled_derivative(activation, jnp.asarray(p))) for p in padded]
    return np.concatenate(slopes)[: x.size].reshape(x.shape)


def custom(
    function: _Elementwise, *, kinks: Iterable[float] = (), name: str | None = None
) -> Activation:
    """Return an `Activation` of any elementwise function written in JAX.

    Parameters
    ----------
    function
        φ: takes an array and returns one of the same shape.
    kinks
        Points where φ or a derivative of it is not smooth. Averages lose digits if one is missing.
    name
        Its name in results; the function's own by default.

    Raises
    ------
    InputError
        If the function is not elementwise, not finite, or not differentiable by JAX.
    """
    name = name or str(getattr(function, "__name__", "custom"))
    probes = np.array([-2.7, -1.1, -0.3, 0.4, 1.3, 2.9])
    wrapped = Activation(name, function, _kinks(kinks))
    problem = f"activation {name!r} must be an elementwise function written in JAX, but it"
    try:
        with _concrete():
            x = jnp.asarray(probes)
            value, slope = wrapped(x), wrapped.derivative(x)
            single = [wrapped(probe) for probe in x]
    except Exception as error:
        raise InputError(f"{problem} raised {type(error).__name__} on an array") from error
    if jnp.shape(value) != probes.shape or any(jnp.shape(s) != () for s in single):
        raise InputError(f"{problem} changed the shape of its argument")
    if any(isinstance(v, jax.core.Tracer) for v in (value, slope, *single)):
        return wrapped  # its parameters are being differentiated, or mapped over
    if not np.allclose(value, np.asarray(single), rtol=1e-5, atol=1e-7, equal_nan=True):
        raise InputError(f"{problem} mixed the entries of its argument")
    if not (np.isfinite(value).all() and np.isfinite(slope).all()):
        raise InputError(f"{problem} or its derivative was not finite on {probes.tolist()}")
    return wrapped


def _kinks(kinks: Any) -> tuple[float, ...]:
    sequence = check_sequence("kinks", kinks, "numbers, where φ is not smooth, as (0.0,)")
    try:
        return tuple(float(kink) for kink in sequence)
    except (TypeError, ValueError) as error:
        raise InputError(f"kinks is {kinks!r}; it is numbers, where φ is not smooth") from error


def get(activation: Activation | str | _Elementwise) -> Activation:
    """Return the activation of this name, in any case, or a callable as an `Activation`.

    ``"sigmoid"`` is `logistic`; ``"leaky_relu(0.2)"`` gives its slope, and so does
    ``"leaky_relu_0.2"``, which a shell takes without quotes.

    Raises
    ------
    InputError
        If there is no such name, or the callable is not fit (see `custom`).
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        written = activation.strip().lower()
        parsed = re.fullmatch(r"(leaky_relu)_(\d*\.?\d+)", written) or re.fullmatch(
            r"(\w+)(?:\(([-+.\de]+)\))?", written
        )
        name, argument = parsed.groups() if parsed else (activation, None)
        if name == "leaky_relu":
            try:
                return leaky_relu(float(argument)) if argument else leaky_relu()
            except ValueError:
                raise InputError(
                    f"{activation!r} has no number between its brackets; write leaky_relu(0.2)"
                ) from None
        if name in _BY_NAME and argument is None:
            return _BY_NAME[name]
        raise unknown_name("activation", activation, (*_BY_NAME, "leaky_relu"))
    if callable(activation):
        return custom(activation)
    raise InputError(f"activation is {activation!r}; it is a name or an elementwise function")


def _piecewise_linear(name: str, function: _Elementwise, a: float) -> Activation:
    """Slope 1 for x > 0 and a for x < 0: φ = (1+a)/2 x + (1-a)/2 |x|."""
    odd, even = ((1 + a) / 2) ** 2, ((1 - a) / 2) ** 2

    def kernel(q_u: Array, q_v: Array, k: Array) -> Array:
        # E|u||v| = (2/π)(√(q_u q_v - k²) + k (π/2 - angle)); Cho & Saul 2009, order 1.
        root = jnp.sqrt(_closed_forms.gram_determinant(q_u, q_v, k))
        angle = _closed_forms.angle(q_u, q_v, k)
        return odd * k + even * (2 * (root - k * angle) / math.pi + k)

    def derivative_kernel(q_u: Array, q_v: Array, k: Array) -> Array:
        return odd + even * (1 - 2 * _closed_forms.angle(q_u, q_v, k) / math.pi)

    return Activation(
        name,
        function,
        kinks=() if a == 1 else (0.0,),
        homogeneous=True,
        moments={
            "phi": lambda q: (1 - a) * jnp.sqrt(q / (2 * math.pi)),
            "phi2": lambda q: (1 + a**2) / 2 * q,
            "phi4": lambda q: (1 + a**4) / 2 * 3 * q**2,
            "dphi": lambda q: (1 + a) / 2,  # noqa: ARG005
            "dphi2": lambda q: (1 + a**2) / 2,  # noqa: ARG005
            "dphi4": lambda q: (1 + a**4) / 2,  # noqa: ARG005
            "x_phi": lambda q: (1 + a) / 2 * q,
            "x_phi_dphi": lambda q: (1 + a**2) / 2 * q,
            "phi_ddphi": lambda q: 0.0,  # noqa: ARG005
            "phi2_dphi2": lambda q: (1 + a**4) / 2 * q,
            "ddphi2": lambda q: 0.0 if a == 1 else math.inf,  # noqa: ARG005
            "variance": lambda q: ((1 + a**2) / 2 - (1 - a) ** 2 / (2 * math.pi)) * q,
        },
        kernel=kernel,
        derivative_kernel=derivative_kernel,
    )


# Functions that JAX differentiates with a loss of digits -----------------------------------------


@jax.custom_jvp
def _logistic(x: Array) -> Array:
    return jax.nn.sigmoid(x)


@jax.custom_jvp
def _logistic_slope(x: Array) -> Array:
    # s(x) s(-x), where s (1 - s) is 0 for x > 17 in float32.
    return _logistic(x) * _logistic(-x)


@jax.custom_jvp
def _tanh(x: Array) -> Array:
    return jnp.tanh(x)


# s' = s(x) s(-x), (s')' = -s' tanh(x/2), tanh' = 4 s'(2x), where 1 - tanh² is 0 for |x| > 9 in
# float32. The rules are written with each other, so every order of derivative keeps its digits.
_logistic.defjvps(lambda x_dot, _, x: _logistic_slope(x) * x_dot)
_logistic_slope.defjvps(lambda x_dot, slope, x: -slope * _tanh(x / 2) * x_dot)
_tanh.defjvps(lambda x_dot, _, x: 4 * _logistic_slope(2 * x) * x_dot)


def _gelu_tanh(x: Array) -> Array:
    # (1 + tanh y)/2 = s(2y)
    return x * _logistic(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


# The activations ---------------------------------------------------------------------------------

linear = replace(
    _piecewise_linear("linear", lambda x: x, 1.0),
    kernel=lambda q_u, q_v, k: k,  # noqa: ARG005
    derivative_kernel=lambda q_u, q_v, k: 1.0,  # noqa: ARG005
)
relu = _piecewise_linear("relu", jax.nn.relu, 0.0)


def leaky_relu(slope: float = 0.01) -> Activation:
    """Return max(x, 0) + slope · min(x, 0).

    Raises
    ------
    InputError
        If the slope is not finite.
    """
    if not (is_number(slope) and math.isfinite(slope)):
        raise InputError(f"the slope of leaky_relu is {slope!r}; it is a finite number")
    return _leaky_relu(float(slope))


@functools.cache  # equal slopes give one object, so that jit caches do not miss
def _leaky_relu(slope: float) -> Activation:
    name = f"leaky_relu({slope!r})"
    return _piecewise_linear(name, lambda x: jax.nn.leaky_relu(x, slope), slope)


elu = Activation("elu", jax.nn.elu, kinks=(0.0,))
selu = Activation("selu", jax.nn.selu, kinks=(0.0,))
gelu = Activation(
    "gelu",
    functools.partial(jax.nn.gelu, approximate=False),
    moments={
        "phi": lambda q: q * jax.lax.rsqrt(2 * math.pi * (1 + q)),
        "phi2": _closed_forms.gelu_phi2,
        "dphi": lambda q: 0.5,  # noqa: ARG005
        "dphi2": _closed_forms.gelu_dphi2,
        "x_phi": lambda q: q / 2,
        "x_phi_dphi": _closed_forms.gelu_x_phi_dphi,
    },
    kernel=_closed_forms.gelu_kernel,
    derivative_kernel=_closed_forms.gelu_derivative_kernel,
)
gelu_tanh = Activation("gelu_tanh", _gelu_tanh)
silu = Activation("silu", lambda x: x * _logistic(x))
softplus = Activation("softplus", jax.nn.softplus)
mish = Activation("mish", lambda x: x * _tanh(jax.nn.softplus(x)))
tanh = Activation("tanh", _tanh)
logistic = Activation("logistic", _logistic)
sigmoid = logistic
hard_tanh = Activation(
    "hard_tanh",
    jax.nn.hard_tanh,
    kinks=(-1.0, 1.0),
    moments=dict.fromkeys(("dphi", "dphi2", "dphi4"), _closed_forms.hard_tanh_inside),
)
softsign = Activation("softsign", jax.nn.soft_sign, kinks=(0.0,))
erf = Activation(
    "erf",
    _erf,
    moments={
        "phi": lambda q: 0.0,  # noqa: ARG005
        "phi2": lambda q: 2 / math.pi * jnp.arctan(2 * q * jax.lax.rsqrt(1 + 4 * q)),
        "dphi": lambda q: 2 * jax.lax.rsqrt(math.pi * (1 + 2 * q)),
        "dphi2": lambda q: 4 / math.pi * jax.lax.rsqrt(1 + 4 * q),
        "dphi4": lambda q: 16 / math.pi**2 * jax.lax.rsqrt(1 + 8 * q),
        "x_phi": lambda q: 2 * q * jax.lax.rsqrt(math.pi * (1 + 2 * q)),
        "x_phi_dphi": lambda q: 4 / math.pi * q / (1 + 2 * q) * jax.lax.rsqrt(1 + 4 * q),
        "phi_ddphi": lambda q: -8 / math.pi * q / (1 + 2 * q) * jax.lax.rsqrt(1 + 4 * q),
        "phi2_dphi2": lambda q: (
            8
            / math.pi**2
            * jax.lax.rsqrt(1 + 4 * q)
            * jnp.arctan(2 * q * jax.lax.rsqrt((1 + 4 * q) * (1 + 8 * q)))
        ),
        "ddphi2": lambda q: 16 / math.pi * q * jax.lax.rsqrt(1 + 4 * q) / (1 + 4 * q),
    },
    kernel=_closed_forms.erf_kernel,
    derivative_kernel=_closed_forms.erf_derivative_kernel,
)
sin = Activation(
    "sin",
    jnp.sin,
    moments={
        "phi": lambda q: 0.0,  # noqa: ARG005
        "phi2": _closed_forms.sin2,
        "phi4": _closed_forms.sin4,
        "dphi": lambda q: jnp.exp(-q / 2),
        "dphi2": _closed_forms.cos2,
        "dphi4": _closed_forms.cos4,
        "x_phi": lambda q: q * jnp.exp(-q / 2),
        "x_phi_dphi": lambda q: q * jnp.exp(-2 * q),
        "phi_ddphi": lambda q: -_closed_forms.sin2(q),
        "phi2_dphi2": _closed_forms.sin2_cos2,
        "ddphi2": _closed_forms.sin2,
        "variance": _closed_forms.sin2,
    },
    kernel=_closed_forms.sin_sin,
    derivative_kernel=_closed_forms.cos_cos,
)
cos = Activation(
    "cos",
    jnp.cos,
    moments={
        "phi": lambda q: jnp.exp(-q / 2),
        "phi2": _closed_forms.cos2,
        "phi4": _closed_forms.cos4,
        "dphi": lambda q: 0.0,  # noqa: ARG005
        "dphi2": _closed_forms.sin2,
        "dphi4": _closed_forms.sin4,
        "x_phi": lambda q: 0.0,  # noqa: ARG005
        "x_phi_dphi": lambda q: -q * jnp.exp(-2 * q),
        "phi_ddphi": lambda q: -_closed_forms.cos2(q),
        "phi2_dphi2": _closed_forms.sin2_cos2,
        "ddphi2": _closed_forms.cos2,
        "variance": lambda q: jnp.expm1(-q) ** 2 / 2,
    },
    kernel=_closed_forms.cos_cos,
    derivative_kernel=_closed_forms.sin_sin,
)

_BY_NAME = {name: value for name, value in list(vars().items()) if isinstance(value, Activation)}

ALL = (*dict.fromkeys(_BY_NAME.values()), leaky_relu())
