"""The class `Activation`: φ, its kinks and closed forms, and what follows from them.

`gradflow.activations` has those that there are, and the class itself for all other modules.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, ScalarLike

from gradflow._cached_property import cached_property
from gradflow._checks import is_number
from gradflow._closed_forms import Moment, PairMoment, Values
from gradflow._programs import program
from gradflow._roots import bisect
from gradflow.errors import InputError

__all__ = ["Activation", "Elementwise", "known_slopes", "known_values"]

Elementwise: TypeAlias = Callable[[Array], Array]
_Numbers: TypeAlias = Array | np.ndarray


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
        Points where φ or one of its derivatives is not smooth, and others that quadrature needs:
        its panels end there.
    homogeneous
        Whether φ(a·x) = a·φ(x) for every a > 0.
    moments
        Closed forms in q of some of `gradflow.gaussian.Moments`, by field name, or of "variance".
    kernel, derivative_kernel
        Closed forms of E[φ(u) φ(v)] and E[φ'(u) φ'(v)] in (q_u, q_v, k).
    frequency
        The inverse of the distance over which φ varies: φ' is searched in steps as much finer.
    """

    name: str
    function: Elementwise
    kinks: tuple[float, ...] = ()
    homogeneous: bool = False
    moments: Mapping[str, Moment] = field(default_factory=dict, compare=False, repr=False)
    kernel: PairMoment | None = field(default=None, compare=False, repr=False)
    derivative_kernel: PairMoment | None = field(default=None, compare=False, repr=False)
    frequency: float = field(default=1.0, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"function is {self.function!r}; it is an elementwise function")

    def __call__(self, x: Values) -> Float[Array, "..."]:
        """Return φ(x)."""
        return self.function(jnp.asarray(x))

    def scaled(self, output: float, argument: float, name: str) -> "Activation":
        """The activation output · φ(argument · x) of this name, with φ's closed forms.

        Parameters
        ----------
        output
            A factor of φ, not 0.
        argument
            A factor of x, > 0.
        name
            Its name.
        """
        # Panels of quadrature end at 0, 1, 2, 4, …: where φ varies over less, also at 1/2, 1/4, ….
        halvings = 0 if self.kernel is not None else math.ceil(math.log2(max(argument, 1)))
        finer = {sign * 2.0**-n for n in range(1, halvings + 1) for sign in (-1, 1)}

        def scaled_moment(form: Moment, powers: tuple[int, int]) -> Moment:
            return lambda q: output ** powers[0] * argument ** powers[1] * form(argument**2 * q)

        def scaled_pair(form: PairMoment | None, factor: float) -> PairMoment | None:
            square = argument**2
            if form is None:
                return None
            return lambda q_u, q_v, k: factor * form(square * q_u, square * q_v, square * k)

        return Activation(
            name,
            lambda x: output * self.function(argument * x),
            kinks=tuple(sorted({*(kink / argument for kink in self.kinks), *finer})),
            homogeneous=self.homogeneous,
            moments={n: scaled_moment(form, _POWERS[n]) for n, form in self.moments.items()},
            kernel=scaled_pair(self.kernel, output**2),
            derivative_kernel=scaled_pair(self.derivative_kernel, (output * argument) ** 2),
            frequency=argument * self.frequency,
        )

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

    @cached_property
    def _known_slope_jumps(self) -> tuple[tuple[float, float], ...] | None:
        """The `slope_jumps`, or None if parameters are traced, because tracers must not be kept."""
        if not self.kinks:
            return ()
        # A step as small as the number format allows, and not subnormal: XLA flushes those to 0.
        points = np.asarray(self.kinks)
        step = np.maximum(4 * np.finfo(float).eps * np.abs(points), 1e-200)
        with jax.enable_x64(True):
            above, below = (_derivatives(self, x) for x in (points + step, points - step))
        if isinstance(above, jax.core.Tracer):
            return None
        jumps = np.asarray(above) - np.asarray(below)
        return tuple(
            (float(k), float(j)) for k, j in zip(points, jumps, strict=True) if abs(j) > 1e-12
        )

    @cached_property
    def max_slope(self) -> float:
        """The supremum of |φ'|; one-sided at kinks.

        Over |x| <= 2^20, but infinite where |φ'| grows as a power of |x|.
        """
        x, slope = self._scan
        if np.argmax(np.abs(slope)) in (0, x.size - 1) and self._known_powers is not None:
            power: Any = self._known_powers[1].slope
            if power > 0:
                return math.inf
        best = float(np.max(np.abs(slope)))
        centre = float(x[np.argmax(np.abs(slope))])
        width = 2.0**-5 / self.frequency
        for _ in range(4):  # zoom in on the largest of the grid; an extremum is flat
            near = np.linspace(centre - width, centre + width, 401)
            slopes = np.abs(known_slopes(self, near))
            best = max(best, float(slopes.max()))
            centre, width = float(near[slopes.argmax()]), width / 100
        return best

    @cached_property
    def _scan(self) -> tuple[np.ndarray, np.ndarray]:
        """Points that resolve φ', and φ' there."""
        half = np.concatenate(
            [np.arange(0, 16, 2.0**-9), np.arange(16, 2048, 2.0**-5), 2 ** np.linspace(11, 20, 999)]
        )
        half /= self.frequency
        kinks = np.asarray(self.kinks)
        beside = 1e-12 * np.maximum(1, np.abs(kinks))
        x = np.unique(np.concatenate([-half, half, kinks - beside, kinks + beside]))
        return x, known_slopes(self, x)

    @cached_property
    def bounds(self) -> tuple[float, float] | None:
        """The least and largest value of φ, or None if it is unbounded.

        φ is taken for bounded if no value beyond |x| = 16/frequency is outside the range of those
        up to there by more than a tenth of that range.
        """
        x = np.concatenate([self._scan[0], [-1e30, 1e30]])
        values = known_values(self, x)
        near = values[np.abs(x) * self.frequency <= 16]
        low, high = float(values.min()), float(values.max())
        beyond = max(near.min() - low, high - near.max())
        return (low, high) if beyond <= 0.1 * (near.max() - near.min()) else None

    @property
    def powers(self) -> tuple["_Powers", "_Powers"]:
        """The powers of |x| that φ and its slope are proportional to, near 0 and far from it.

        Parameters of φ that are being traced are traced through.
        """
        return self._known_powers or _powers(self, _PROBES)

    @cached_property
    def _known_powers(self) -> tuple["_Powers", "_Powers"] | None:
        """The `powers`, or None if parameters are traced, because tracers must not be kept."""
        with jax.enable_x64(True):
            both = _powers(self, _PROBES)
        if isinstance(both[0].value, jax.core.Tracer):
            return None
        at_zero, beyond = (_Powers(*np.asarray(powers).tolist()) for powers in both)
        if np.isnan(beyond.value) and self.bounds is not None:
            beyond = beyond._replace(value=0.0)
        return at_zero, beyond

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
            oscillates, all these divided by the `frequency`; a point where |φ'| only touches the
            threshold is no end. Where |φ'| has no largest value, no unit is saturated.

        Raises
        ------
        InputError
            If the threshold is not in (0, 1].
        """
        level = self.saturated_slope(threshold)
        return _saturated_intervals(self, level) if level else np.empty((0, 2))

    def saturated_slope(self, threshold: float) -> float:
        """The |φ'| below which a unit is saturated: threshold · max|φ'|, or 0 if that is infinite.

        Raises
        ------
        InputError
            If the threshold is not in (0, 1].
        """
        if not (is_number(threshold) and 0 < threshold <= 1):
            raise InputError(f"threshold is {threshold!r}; it is a fraction in (0, 1]")
        return float(threshold) * self.max_slope if math.isfinite(self.max_slope) else 0.0


# The powers of a and b that a moment of a φ(b x) has as factors, beside its variance b² q.
_POWERS = {"phi": (1, 0), "phi2": (2, 0), "phi4": (4, 0), "variance": (2, 0)}
_POWERS |= {"dphi": (1, 1), "dphi2": (2, 2), "dphi4": (4, 4), "ddphi2": (2, 4)}
_POWERS |= {"x_phi": (1, -1), "x_phi_dphi": (2, 0), "phi_ddphi": (2, 2), "phi2_dphi2": (4, 2)}


class _Powers(NamedTuple):
    """The powers of |x| that φ and φ' are proportional to, at 0 or at ±∞; NaN where there is none.

    At ±∞ the slope's power is that of q in E[φ'²], x ~ N(0, q), and so not below -1/2.
    """

    value: ScalarLike
    slope: ScalarLike


# The |x| at which powers are computed: far below and above those that averages depend on.
_PROBES = np.outer([1e-18, 1e18], [1.0, 2.0, 4.0])


@program("activation")
def _powers(activation: Activation, probes: _Numbers) -> tuple[_Powers, _Powers]:
    def power(f: Elementwise, x: Array, of_zero: float) -> Array:
        sizes = jnp.hypot(f(x), f(-x))
        powers = jnp.log(sizes[1:] / sizes[:-1]) / math.log(2)
        alike = jnp.abs(powers[0] - powers[1]) < jnp.sqrt(jnp.finfo(powers.dtype).eps)
        return jnp.where(jnp.all(sizes == 0), of_zero, jnp.where(alike, powers[1], jnp.nan))

    def powers(x: Array, slope_of_zero: float) -> _Powers:
        return _Powers(power(activation, x, 1.0), power(activation.derivative, x, slope_of_zero))

    small, large = probes
    beyond = powers(large, -math.inf)
    # Where φ' decays, E[φ'²] is that near 0, ∫ φ'² dx/√(2πq).
    return powers(small, 0.0), beyond._replace(slope=jnp.maximum(beyond.slope, -0.5))


@functools.lru_cache(maxsize=256)
def _saturated_intervals(activation: Activation, level: float) -> np.ndarray:
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
    below = np.abs(known_slopes(activation, (inside[1:] + inside[:-1]) / 2)) < level
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
    with jax.enable_x64(True):
        brackets = zip(low, high, start, strict=True)
        roots = [np.asarray(_bisection(activation, np.array(level), *each)) for each in brackets]
        return np.concatenate(roots)[: left.size]


@program("activation")
def _values(activation: Activation, x: _Numbers) -> Array:
    return activation(x)


def known_values(activation: Activation, x: np.ndarray) -> np.ndarray:
    """φ(x) as known numbers in float64; one program is compiled for each shape."""
    with jax.enable_x64(True):
        return np.asarray(_values(activation, x))


@program("activation")
def _derivatives(activation: Activation, x: _Numbers) -> Array:
    return activation.derivative(x)


@program("activation")
def _bisection(
    activation: Activation, level: _Numbers, low: _Numbers, high: _Numbers, above: _Numbers
) -> Array:
    """Return the roots of φ' - level in brackets; whether it is ``above`` 0 at their lower ends."""
    ends = jnp.asarray(low), jnp.asarray(high)
    ends = bisect(lambda x: (activation.derivative(x) > level) != above, *ends, steps=60)
    return (ends[0] + ends[1]) / 2


# Points at which a slope is evaluated in one call.
_EVALUATED = 4096


def known_slopes(activation: Activation, x: np.ndarray) -> np.ndarray:
    """φ'(x) as known numbers in float64."""
    # Of one size, as a program is compiled for each.
    parts = -(-x.size // _EVALUATED)
    padded = np.resize(np.asarray(x, float), (parts, _EVALUATED))
    with jax.enable_x64(True):
        slopes = [np.asarray(_derivatives(activation, p)) for p in padded]
    return np.concatenate(slopes)[: x.size].reshape(x.shape)
