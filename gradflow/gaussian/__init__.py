"""Gaussian averages of activations: E[f(x)], x ~ N(0, q), and E[φ(u) φ(v)] for a Gaussian pair.

An activation's closed form where it has one, quadrature otherwise; the caller cannot tell which.

Quadrature is Gauss-Legendre on panels. Gauss-Hermite is not an alternative: with 256 nodes it is
wrong by 23 % for E[φ'²] of hard_tanh at q = 1, and by 55 % for the logistic at q = 482, because
one set of nodes cannot follow both of an integrand's scales: √q, that of the density, and 1, that
of φ. Here panels end at the kinks of φ, at steps in x/√q, and at powers of 2 in x, whatever their
order; their number is fixed, so q may be traced. Panels that coincide have no width and no weight.

References: Poole et al. 2016, arXiv:1606.05340 (the averages of mean-field theory); Price 1958,
IRE Trans. Inf. Theory 4, 69 (their derivatives); Cho & Saul 2009 (the arc-cosine kernels).
"""

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc
from jax.typing import DTypeLike
from jaxtyping import Array, Float, ScalarLike

from gradflow._checks import check_scale, is_traced, unknown_name
from gradflow._closed_forms import PairMoment, Values, gram_determinant
from gradflow.activations import Activation
from gradflow.errors import InputError

__all__ = [
    "Moments",
    "check",
    "derivative_kernel",
    "equal_pair",
    "expectation",
    "expectation_with_error",
    "growth",
    "hermite_coefficients",
    "kernel",
    "log_limits",
    "moment",
    "moments",
    "nodes",
    "pair_expectation",
    "saturation",
    "shifted_expectation",
    "some_moments",
    "variance",
]

_Z_MAX = 13  # the density beyond is 1e-37 of its peak
_SCALES = 2.0 ** np.arange(-6, 13)  # of x, for any φ that varies over a distance of order 1
_NODES, _FEWER_NODES = 20, 14
# A GPU's default for float32 would round every product to 10 bits.
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def expectation(
    f: Callable[[Array], Array], q: Values, *, kinks: Iterable[float] = ()
) -> Float[Array, "..."]:
    """Return E[f(x)], x ~ N(0, q).

    Differentiable in q, to any order, also where f has kinks or jumps: the nodes are held fixed and
    the density is differentiated. A parameter that f closes over is differentiated through f.

    Parameters
    ----------
    f
        Elementwise in JAX, with a scale of order 1 in x and at most polynomial growth. It may
        return axes in front of its argument's, to average several functions in one pass.
    q
        The variance, >= 0, of any shape. At q = 0 the result is (f(0+) + f(0-))/2. The derivative
        in q has an absolute error of about eps · f(0)/q.
    kinks
        Points where f or a derivative of it is not smooth.

    Returns
    -------
    Array
        The axes that f puts in front, then q's; of q's dtype. In float64 the relative error is
        about 1e-15 of √E[f²] for q from 1e-300 to 1e4, growing for f that oscillates within √q.
    """
    kinks = tuple(kinks)
    return _over(q, lambda v: _integrate(f, v, kinks, _NODES)[0])


def expectation_with_error(
    f: Callable[[Array], Array], q: Values, *, kinks: Iterable[float] = ()
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return `expectation` and a bound on its absolute error, as seen by a lower-order rule.

    The bound is the difference of the two rules, with a floor for rounding. It is that of the lower
    rule, so it is pessimistic; it cannot see a feature of f that both rules miss.
    """
    kinks = tuple(kinks)

    def both(v: Array) -> Array:
        fine, size = _integrate(f, v, kinks, _NODES)
        coarse, _ = _integrate(f, v, kinks, _FEWER_NODES)
        rounding = 4 * jnp.finfo(v.dtype).eps * size
        return jnp.stack([fine, jnp.abs(fine - coarse) + rounding])

    value, error = _over(q, both)
    return value, error


def shifted_expectation(
    f: Callable[[Array], Array],
    mean: Float[Array, ""],
    deviation: Float[Array, ""],
    *,
    kinks: Iterable[float] = (),
) -> Float[Array, "..."]:
    """Return E[f(x)], x ~ N(mean, deviation²), for a deviation > 0.

    Differentiable in both, also where f has kinks or jumps: panels follow the kinks, so each node
    stays on its side of them.

    Parameters
    ----------
    f
        As for `expectation`.
    mean, deviation
        Of x; scalars, which may be traced.
    kinks
        Points x where f or a derivative of it is not smooth.

    Returns
    -------
    Array
        The axes that f puts in front of its argument's.
    """
    points = jnp.asarray(_panel_ends(tuple(kinks)), mean.dtype)
    z, weight = _normal_rule((points - mean) / deviation)
    return _dot(f(mean + deviation * z), weight)


def nodes(
    q: Float[Array, ""], *, kinks: Iterable[float] = ()
) -> tuple[Float[Array, " nodes"], Float[Array, " nodes"]]:
    """Return points x, ascending, and weights: E[f(x)] is Σ weight f(x), x ~ N(0, q).

    For an f that is not known yet, or that depends on more than x; `expectation` otherwise.

    Parameters
    ----------
    q
        The variance, > 0, a scalar. Not to be differentiated by.
    kinks
        Points where f or a derivative of it is not smooth.
    """
    root = jnp.sqrt(jax.lax.stop_gradient(q))
    scales = np.concatenate([-_SCALES, _SCALES, list(kinks), [0.0]])
    steps = jnp.arange(-_Z_MAX, _Z_MAX + 1, dtype=root.dtype)
    edges = jnp.clip(jnp.asarray(np.unique(scales), root.dtype) / root, -_Z_MAX, _Z_MAX)
    z, width = _panels(jnp.sort(jnp.concatenate([steps, edges])), _NODES)
    return z * root, width * jnp.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _over(q: Values, function: Callable[[Array], Array]) -> Array:
    """Apply a function of a scalar to every entry of q; q's axes come last."""
    check_scale("q", q)
    q = jnp.asarray(q)
    q = q if jnp.issubdtype(q.dtype, jnp.floating) else q.astype(float)
    if q.ndim == 0:
        return function(q)
    out = jax.vmap(function, out_axes=-1)(q.reshape(-1))
    return out.reshape(out.shape[:-1] + q.shape)


def _integrate(
    f: Callable[[Array], Array], q: Array, kinks: tuple[float, ...], order: int
) -> tuple[Array, Array]:
    """Return E[f(x)] and E|f(x)| for a scalar q."""
    # At q = 0 this gives x ~ 1e-150: f(0) to rounding, but on both sides of a kink. The tangent of
    # q passes unchanged.
    q = q + jax.lax.stop_gradient(jnp.maximum(_smallest(q) - q, 0))
    q0 = jax.lax.stop_gradient(q)
    scales = np.setdiff1d(np.abs([*kinks, *_SCALES]), 0)
    edges = jnp.concatenate(
        [
            jnp.arange(_Z_MAX + 1, dtype=q.dtype),
            jnp.minimum(jnp.asarray(scales, q.dtype) / jnp.sqrt(q0), _Z_MAX),
        ]
    )
    z, width = _panels(jnp.sort(edges), order)
    weight = width * jnp.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    x = z * jnp.sqrt(q0)
    values = f(jnp.concatenate([x, -x, jnp.zeros(1, q.dtype)]))
    # x with -x first, so that an odd f averages to 0 and not to rounding errors.
    folded, at_zero = values[..., : x.size] + values[..., x.size : -1], values[..., -1:]
    # p_q(x)/p_q0(x) - 1: zero, with the right derivatives in q. It acts on f - f(0), which has the
    # same average up to a constant, because E[1] has a derivative of 0 only up to rounding.
    log_ratio = -(z**2) / 2 * (q0 / q - 1) - jnp.log(q / q0) / 2
    tilt = _dot(folded - 2 * at_zero, weight * jnp.expm1(log_ratio))
    size = _dot(jnp.abs(values[..., : x.size]) + jnp.abs(values[..., x.size : -1]), weight)
    return _dot(folded, weight) + tilt, size


def _smallest(q: Array) -> float:
    """Return the variance that none is taken for: its square root's square is no subnormal."""
    return 1e-300 if q.dtype == jnp.float64 else 1e-36


def log_limits(dtype: DTypeLike) -> tuple[float, float]:
    """Return the logarithms of the variances between which averages are computed as they are.

    Their squares are in the dtype's range. Beyond, φ is taken as the power of |x| that it tends to
    (`growth`), which differs from it by the square root of the lower one, in relative terms.
    """
    end = math.log(1e36 if dtype == jnp.float64 else 1e14)
    return -end, end


def growth(
    activation: Activation, log_scale: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Return how averages over x ~ N(0, q) change where q goes beyond `log_limits`.

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


def _panels(edges: Array, order: int) -> tuple[Array, Array]:
    """Return Gauss-Legendre nodes and weights between ascending edges.

    Shapes (..., panels + 1) -> (..., panels · order) twice.
    The nodes are a NumPy constant, so they have all their digits also where the edges are traced.
    """
    nodes, weights = np.polynomial.legendre.leggauss(order)
    half = (edges[..., 1:, None] - edges[..., :-1, None]) / 2
    middle = (edges[..., 1:, None] + edges[..., :-1, None]) / 2
    row = (1,) * edges.ndim + (order,)
    flat = (*edges.shape[:-1], -1)
    x = middle + half * jnp.asarray(nodes.reshape(row), edges.dtype)
    return x.reshape(flat), (half * jnp.asarray(weights.reshape(row), edges.dtype)).reshape(flat)


# Moments of one pre-activation --------------------------------------------------------------------


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


def moments(activation: Activation, q: Values) -> Moments:
    """Return all `Moments` of an activation for pre-activations of variance q, of any shape."""
    check_scale("q", q)
    return Moments(**some_moments(activation, Moments._fields, q))


def moment(activation: Activation, name: str, q: Values) -> Float[Array, "..."]:
    """Return one moment of an activation for pre-activations of variance q.

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
    check_scale("q", q)
    if name == "variance":
        return variance(activation, q)
    if name not in _INTEGRANDS:
        raise unknown_name("moment", name, (*_INTEGRANDS, "variance"))
    return some_moments(activation, (name,), q)[name]


@functools.partial(jax.jit, static_argnums=0)
def variance(activation: Activation, q: Values) -> Float[Array, "..."]:
    """Return Var φ(x), x ~ N(0, q), of q's shape."""
    if "variance" in activation.moments:
        return _closed(activation.moments["variance"], q)

    def powers(x: Array) -> Array:
        # About φ(0), so that no large constant is squared and subtracted.
        centred = activation(x) - activation(jnp.zeros_like(x))
        return jnp.stack([centred, centred**2])

    mean, square = expectation(powers, q, kinks=activation.kinks)
    return square - mean**2


def _closed(form: Callable[[Array], Array | float], q: Values) -> Array:
    return _over(q, lambda v: jnp.asarray(form(v), v.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def some_moments(activation: Activation, names: tuple[str, ...], q: Values) -> dict[str, Array]:
    """Return the `moments` of these names, each of q's shape.

    Closed forms, and one pass of quadrature for all the rest: cheaper than one `moment` at a time.
    """
    found = {n: _closed(activation.moments[n], q) for n in names if n in activation.moments}
    jumps = [jump for _, jump in activation.slope_jumps]
    known = not any(is_traced(jump) for jump in jumps)
    if "ddphi2" in names and jumps and known:
        found["ddphi2"] = _closed(lambda v: math.inf, q)  # noqa: ARG005
    rest = [n for n in names if n not in found]
    if rest:
        values = expectation(
            lambda x: jnp.stack([_INTEGRANDS[n](activation, x) for n in rest]),
            q,
            kinks=activation.kinks,
        )
        found |= dict(zip(rest, values, strict=True))
        if "phi_ddphi" in rest:
            found["phi_ddphi"] += _over(q, functools.partial(_delta_terms, activation))
        if "ddphi2" in rest and not known:
            jumping = jnp.any(jnp.abs(jnp.stack(jumps)) > 1e-12)
            found["ddphi2"] = jnp.where(jumping, jnp.inf, found["ddphi2"])
    return found


def _delta_terms(activation: Activation, q: Array) -> Array:
    """Return Σ_k jump_k φ(k) p_q(k), the part of E[φ φ''] at the jumps of φ'."""
    total = jnp.zeros_like(q)
    for kink, jump in activation.slope_jumps:
        height = jump * activation(jnp.asarray(kink, q.dtype))
        # exp(-900) is 0: the floor keeps q = 0 from 0/0, for kinks elsewhere than at 0. At 0, φ(0)
        # times an infinite density is infinite, unless φ(0) = 0.
        floor = max(kink**2 / 1800, _smallest(q))
        safe = jnp.maximum(q, floor)
        total += height * jnp.exp(-(kink**2) / (2 * safe)) * jax.lax.rsqrt(2 * math.pi * safe)
    return total


_checked: weakref.WeakSet[Activation] = weakref.WeakSet()


def check(activation: Activation) -> None:
    """Warn or raise if a callable cannot be averaged as it is described; look at each one once.

    At variance 1, where every activation in use has most of its features. One whose parameters are
    traced is not looked at.

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
        If they or E[φ'] are uncertain by more than 1e-8 of their value, with the error: kinks are
        missing.
    """
    if activation in _checked:
        return

    def squares(x: Array) -> Array:
        return jnp.stack([activation(x), activation.derivative(x)]) ** 2

    def averages(x: Array) -> Array:
        # The slope too: where it changes its sign alone, as that of |x - 1|, its square is smooth.
        return jnp.concatenate([squares(x), activation.derivative(x)[None]])

    edge = _Z_MAX - 2.0

    def outermost(x: Array) -> Array:
        return jnp.where(jnp.abs(x) > edge, squares(x), 0)

    @jax.jit
    def look(one: Array) -> tuple[Array, Array, Array]:
        tails = expectation(outermost, one, kinks=(*activation.kinks, edge))
        return *expectation_with_error(averages, one, kinks=activation.kinks), tails

    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        values, errors, tails = look(jnp.ones(()))
    if isinstance(values, jax.core.Tracer):
        return
    # The mean slope is compared with its root mean square, and its tails are those of its square.
    found, tail_sizes = np.array(values), np.append(np.asarray(tails), 0)
    found[2] = np.sqrt(found[1])
    for name, value, error, tail in zip(
        ("E[φ²]", "E[φ'²]", "E[φ']"), found, np.asarray(errors), tail_sizes, strict=True
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


def hermite_coefficients(
    activation: Activation, q: Float[Array, ""], terms: int
) -> Float[Array, " terms"]:
    """Return a_k = E[φ(√q Z) he_k(Z)], Z ~ N(0, 1), k = 0 … terms - 1.

    he_k are the Hermite polynomials with E[he_j he_k] = δ_jk, so that a pair of correlation c and
    equal variances has E[φ(u) φ(v)] = Σ_k a_k² c^k (Mehler), and Σ_k a_k² = E[φ²].

    Parameters
    ----------
    activation
        φ.
    q
        The variance, > 0, a scalar.
    terms
        How many, up to about 1000. Where φ has no kinks but at 0, the nodes do not depend on q, and
        a vmap over q becomes one matrix product.
    """
    scales = [0.0, *2.0 ** np.arange(-12, 1), *range(2, _Z_MAX + 1)]
    edges = jnp.asarray(scales, q.dtype)
    away = np.setdiff1d(np.abs(activation.kinks), 0)
    if away.size:
        moving = jnp.minimum(jnp.asarray(away, q.dtype) / jnp.sqrt(q), _Z_MAX)
        edges = jnp.sort(jnp.concatenate([edges, jax.lax.stop_gradient(moving)]))
    z, width = _panels(edges, _NODES)
    weight = width * jnp.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    def next_two(pair: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], tuple]:
        even, odd = pair
        above = (z * odd - jnp.sqrt(k) * even) / jnp.sqrt(k + 1)
        return (above, (z * above - jnp.sqrt(k + 1) * odd) / jnp.sqrt(k + 2)), pair

    steps = jnp.arange(1, terms + 1, 2, dtype=q.dtype)
    _, (even, odd) = jax.lax.scan(next_two, (jnp.ones_like(z), z), steps)
    plus, minus = activation(z * jnp.sqrt(q)), activation(-z * jnp.sqrt(q))
    a = jnp.stack(
        [_dot(even, weight * (plus + minus)), _dot(odd, weight * (plus - minus))], axis=-1
    ).reshape(-1)
    return a[:terms]


def saturation(activation: Activation, q: Values, threshold: float) -> Float[Array, "..."]:
    """Return P(|φ'(x)| < threshold · max|φ'|), x ~ N(0, q).

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
    intervals = activation.saturated_intervals(threshold)
    # On |x|, each interval is at most two; erfc then keeps its digits far out in the tail.
    low = np.concatenate([np.maximum(intervals[:, 0], 0), np.maximum(-intervals[:, 1], 0)])
    high = np.concatenate([np.maximum(intervals[:, 1], 0), np.maximum(-intervals[:, 0], 0)])
    low, high = low[low < high], high[low < high]
    return _over(q, lambda v: jnp.sum(_tail(low, v) - _tail(high, v)))


def _tail(x: np.ndarray, q: Array) -> Array:
    """P(y > x), y ~ N(0, q), for x >= 0."""
    finite = np.where(np.isinf(x), 0.0, x)
    # erfc(30) is 0; the floor on q keeps its derivative from being 0·inf.
    floor = jnp.asarray(np.maximum(finite**2 / 1800, 1e-25), q.dtype)
    scaled = jnp.asarray(finite, q.dtype) * jax.lax.rsqrt(2 * jnp.maximum(q, floor))
    return jnp.where(np.isinf(x), 0, erfc(scaled) / 2)


# Moments of a pair of pre-activations -------------------------------------------------------------
#
# `kernel` is E[φ φ] and `derivative_kernel` E[φ' φ']: orders 0 and 1 of one function, which Price's
# theorem makes the derivative of each other. With (u, v) of covariance k,
#
#   ∂/∂k E[f(u) g(v)] = E[f'(u) g'(v)],      ∂/∂q_u E[f(u) g(v)] = E[f''(u) g(v)]/2,
#
# and Gaussian integration by parts turns the second, which f'' makes a delta function at a kink,
# into (E[u f'(u) g(v)] - k E[f'(u) g'(v)]) / (2 q_u).

_DERIVATIVES = (Activation.__call__, Activation.derivative, Activation.second_derivative)
_DIAGONAL = ("phi2", "dphi2")


def kernel(activation: Activation, k: Float[Array, "sites sites"]) -> Float[Array, "sites sites"]:
    """Return E[φ(u_a) φ(u_b)], u ~ N(0, k).

    Its derivative is Price's theorem: at a pair of coincident inputs, k = [[q, q], [q, q]],
    ∂/∂k_01 is E[φ'²], whether or not φ has kinks. Entry (a, b) of the result depends on k_aa, k_bb
    and, of the two equal entries k_ab and k_ba, on that of its own place.

    Parameters
    ----------
    activation
        φ.
    k
        Shape (sites, sites): a covariance, symmetric and positive semidefinite. Only its upper
        triangle is read. Entries beyond √(k_aa k_bb) by rounding count as that.

    Returns
    -------
    Array
        Shape (sites, sites), of k's dtype. A pair without a closed form costs a quadrature of 1e5
        to 2e5 points, about a millisecond.

    Raises
    ------
    InputError
        If k is no covariance: a negative variance, a correlation beyond ±1 (outside jit only).
    """
    _check_covariance(k)
    return _kernel(activation, 0, k)


def _check_covariance(k: Array) -> None:
    if is_traced(k):
        return
    found = np.asarray(k, np.float64)
    check_scale("the diagonal of k", np.diagonal(found))
    root = np.sqrt(np.diagonal(found))
    limit = np.outer(root, root) * (1 + float(jnp.finfo(k.dtype).eps) ** 0.5)
    beyond = np.argwhere(~(np.abs(np.triu(found, 1)) <= limit))
    if beyond.size:
        a, b = map(int, beyond[0])
        raise InputError(
            f"k has covariance {found[a, b]:g} between inputs {a} and {b}, of variances "
            f"{found[a, a]:g} and {found[b, b]:g}; a correlation is from -1 to 1"
        )


def equal_pair(
    activation: Activation, q: Float[Array, ""], c: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return E[φ(u) φ(v)] and E[φ'(u) φ'(v)] of a pair of equal variances, in one pass.

    Parameters
    ----------
    activation
        φ.
    q, c
        The variance, > 0, and the correlation, in [-1, 1).

    Raises
    ------
    InputError
        If one of them is out of range (seen outside jit only).
    """
    check_scale("q", q)
    if not is_traced(c) and not abs(float(c)) <= 1:
        raise InputError(f"c is {float(c):g}; a correlation is from -1 to 1")
    q, k = q[None], (q * c)[None]
    value, _, _, slope = _pairs_and_slopes(activation, 0, q, q, k)
    return value[0], slope[0]


def derivative_kernel(
    activation: Activation, k: Float[Array, "sites sites"]
) -> Float[Array, "sites sites"]:
    """Return E[φ'(u_a) φ'(u_b)], u ~ N(0, k); see `kernel`.

    Raises
    ------
    InputError
        When differentiated, if φ' jumps: the derivative is then infinite at coincident inputs.
    """
    _check_covariance(k)
    return _kernel(activation, 1, k)


def pair_expectation(
    f: Callable[[Array], Array], q_u: Array, q_v: Array, k: Array, *, kinks: Iterable[float] = ()
) -> Float[Array, "..."]:
    """Return E[f_i(u) f_j(v)] for all i and j of a vector of functions, (u, v) Gaussian.

    Not differentiable: the nodes follow the arguments.

    Parameters
    ----------
    f
        In JAX, (n,) -> (functions, n), each with a scale of order 1 and polynomial growth.
    q_u, q_v, k
        The variances and the covariance, of one shape.
    kinks
        Points where some f or a derivative of it is not smooth.

    Returns
    -------
    Array
        Two axes for i and j, then the arguments'; of their dtype.
    """

    def one(pair: tuple[Array, Array, Array]) -> Array:
        return _integrate_pair(f, *pair, tuple(kinks))

    found = jax.lax.map(one, tuple(jnp.ravel(x) for x in (q_u, q_v, k)))
    return jnp.moveaxis(found.reshape(*jnp.shape(k), *found.shape[1:]), (-2, -1), (0, 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _kernel(activation: Activation, order: int, k: Array) -> Array:
    """E[φ⁽ⁿ⁾(u_a) φ⁽ⁿ⁾(u_b)] for n = order."""
    q = jnp.diagonal(k)
    diagonal = moment(activation, _DIAGONAL[order], q)
    a, b = np.triu_indices(k.shape[0], 1)
    if not a.size:
        return jnp.diag(diagonal)
    # An input and its replica have one average, that of the diagonal, to the last digit.
    values = _pairs(activation, order, q[a], q[b], k[a, b])
    values = jnp.where(_coincident(q[a], q[b], k[a, b]), diagonal[a], values)
    return jnp.diag(diagonal).at[a, b].set(values).at[b, a].set(values)


@_kernel.defjvp
def _kernel_jvp(activation, order, primals, tangents):  # type: ignore[no-untyped-def]
    (k,), (k_dot,) = primals, tangents
    if order == 1 and activation.slope_jumps:
        raise InputError(
            f"derivative_kernel of {activation.name} cannot be differentiated, because φ' jumps"
        )
    q, q_dot = jnp.diagonal(k), jnp.diagonal(k_dot)
    diagonal, along_diagonal, across = _diagonal(activation, order, q)
    out, by_k = jnp.diag(diagonal), jnp.diag(along_diagonal)
    by_q = jnp.zeros_like(k)  # by_q[a, b] = ∂k'_ab/∂k_aa
    a, b = np.triu_indices(k.shape[0], 1)
    if a.size:
        found = _pairs_and_slopes(activation, order, q[a], q[b], k[a, b])
        # ... and so have their derivatives, where by_qa + by_qb + by_kab is that of the diagonal.
        by_own = (along_diagonal - across) / 2
        once = (diagonal[a], by_own[a], by_own[a], across[a])
        coincident = _coincident(q[a], q[b], k[a, b])
        value, by_qa, by_qb, by_kab = (
            jnp.where(coincident, v, w) for v, w in zip(once, found, strict=True)
        )
        out = out.at[a, b].set(value).at[b, a].set(value)
        by_k = by_k.at[a, b].set(by_kab).at[b, a].set(by_kab)
        by_q = by_q.at[a, b].set(by_qa).at[b, a].set(by_qb)
    along = by_q * q_dot[:, None]
    return out, by_k * k_dot + along + along.T


def _coincident(q_u: Array, q_v: Array, k: Array) -> Array:
    return (q_u == q_v) & (k == q_u)


def _diagonal(activation: Activation, order: int, q: Array) -> tuple[Array, Array, Array]:
    """Return E[φ⁽ⁿ⁾²], its derivative by q, E[x φ⁽ⁿ⁾ φ⁽ⁿ⁺¹⁾]/q, and E[φ⁽ⁿ⁺¹⁾²]."""
    if order == 1:
        value = functools.partial(moment, activation, "dphi2")
        return value(q), jax.vmap(jax.grad(value))(q), moment(activation, "ddphi2", q)
    m = some_moments(activation, ("phi2", "dphi2", "x_phi_dphi", "phi_ddphi"), q)
    # At small q, where x φ φ' averages to a difference, the sum that it is by parts.
    tiny = q < 1e-8
    along = jnp.where(tiny, m["dphi2"] + m["phi_ddphi"], m["x_phi_dphi"] / jnp.where(tiny, 1, q))
    return m["phi2"], along, m["dphi2"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pairs(activation: Activation, order: int, q_u: Array, q_v: Array, k: Array) -> Array:
    """E[φ⁽ⁿ⁾(u) φ⁽ⁿ⁾(v)] of many pairs; all arguments (pairs,)."""
    closed = _closed_kernel(activation, order)
    if closed is not None:
        return jnp.broadcast_to(jnp.asarray(closed(q_u, q_v, k), k.dtype), k.shape)
    f = functools.partial(_DERIVATIVES[order], activation)

    def one(pair: tuple[Array, Array, Array]) -> Array:
        return _integrate_pair(lambda x: f(x)[None], *pair, activation.kinks)[0, 0]

    # One pair after another: a pair's 2e5 points are parallel enough, and need not all be stored.
    return jax.lax.map(one, (q_u, q_v, k))


def _closed_kernel(activation: Activation, order: int) -> PairMoment | None:
    return (activation.kernel, activation.derivative_kernel)[order]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _pairs_and_slopes(
    activation: Activation, order: int, q_u: Array, q_v: Array, k: Array
) -> tuple[Array, Array, Array, Array]:
    """Return `_pairs` and its derivatives by q_u, q_v and k, each of shape (pairs,)."""
    closed = _closed_kernel(activation, order)
    if closed is not None and not activation.slope_jumps:
        slopes = jax.grad(lambda *pair: jnp.asarray(closed(*pair), k.dtype), (0, 1, 2))
        by_qu, by_qv, by_k = jax.vmap(slopes)(q_u, q_v, k)
        by_k = _pairs(activation, 1, q_u, q_v, k) if order == 0 else by_k
        return _pairs(activation, order, q_u, q_v, k), by_qu, by_qv, by_k
    if activation.homogeneous and order == 0:  # x φ'(x) = φ(x)
        by_k = _pairs(activation, 1, q_u, q_v, k)
        value = u_side = v_side = _pairs(activation, 0, q_u, q_v, k)
    else:
        f = functools.partial(_DERIVATIVES[order], activation)
        df = functools.partial(_DERIVATIVES[order + 1], activation)

        def one(pair: tuple[Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            average = _integrate_pair(
                lambda x: jnp.stack([f(x), df(x), x * df(x)]), *pair, activation.kinks
            )
            return average[0, 0], average[1, 1], average[2, 0], average[0, 2]

        value, by_k, u_side, v_side = jax.lax.map(one, (q_u, q_v, k))
    smallest = _smallest(k)
    by_qu = (u_side - k * by_k) / (2 * jnp.maximum(q_u, smallest))
    by_qv = (v_side - k * by_k) / (2 * jnp.maximum(q_v, smallest))
    return value, by_qu, by_qv, by_k


@_pairs_and_slopes.defjvp
def _pairs_and_slopes_jvp(activation, *_):  # type: ignore[no-untyped-def]
    # The quadrature's nodes follow its arguments, so differentiating it would be silently wrong.
    raise InputError(
        f"a kernel of {activation.name} is differentiated twice; differentiate derivative_kernel"
    )


_PAIR_NODES = 14
_PAIR_Z = np.arange(-9.0, 10.0, 3.0)  # the density beyond is 1e-18 of its peak
_PAIR_SCALES = np.array([1.0, 2.0, 4.0, 8.0, 32.0, 128.0, 512.0])
_FAR = 1e6  # out of sight, in units of a standard deviation


def _integrate_pair(
    f: Callable[[Array], Array], q_u: Array, q_v: Array, k: Array, kinks: tuple[float, ...]
) -> Array:
    """Return the matrix E[f_i(u) f_j(v)] of a vector of functions f: (n,) -> (rows, n).

    The average over the variable with the larger variance, x, of the average over the other, y,
    given x. The latter's mean is slope·x, with |slope| <= 1, and its deviation s. As a function of
    x it is f smoothed over s/slope, so panels in x end around the places where the mean crosses a
    kink, and the digits are kept as the correlation goes to ±1.
    """
    smallest = _smallest(k)
    larger = jnp.maximum(jnp.maximum(q_u, q_v), smallest)
    smaller = jnp.minimum(q_u, q_v)
    root, limit = jnp.sqrt(larger), jnp.sqrt(smaller / larger)
    slope = jnp.clip(k / larger, -limit, limit)
    deviation = jnp.sqrt(gram_determinant(larger, smaller, k) / larger)
    places = jnp.asarray(sorted({*kinks, 0.0}), k.dtype)
    points = jnp.asarray(_panel_ends(kinks), k.dtype)
    steps = jnp.asarray(_PAIR_Z, k.dtype)

    def given(x: Array) -> Array:
        mean = slope * x
        z, weight = _normal_rule((points - mean) / jnp.maximum(deviation, smallest))
        return _dot(f(mean + deviation * z), weight)

    steep = jnp.where(jnp.abs(slope * root) < smallest, smallest, slope * root)
    crossing = jnp.clip(places / steep, -_FAR, _FAR)
    spread = jnp.minimum(deviation / jnp.abs(steep), _FAR)
    around = crossing[:, None] + spread * steps[None, :]
    z, weight = _normal_rule(jnp.concatenate([points / root, around.reshape(-1)]))
    x = root * z
    average = _dot(f(x), weight[:, None] * jax.vmap(given)(x))
    return jnp.where(q_u >= q_v, average, average.T)


def _panel_ends(kinks: tuple[float, ...]) -> list[float]:
    """Return where panels in x end, wherever the density is: at the kinks and at φ's own scales."""
    return sorted({*kinks, 0.0, *_PAIR_SCALES, *-_PAIR_SCALES})


def _normal_rule(edges: Array) -> tuple[Array, Array]:
    """Return nodes and weights for a standard normal variable, with panels ending at the edges."""
    steps = jnp.asarray(_PAIR_Z, edges.dtype)
    edges = jnp.concatenate([steps, jnp.clip(edges, steps[0], steps[-1])])
    z, width = _panels(jnp.sort(edges), _PAIR_NODES)
    return z, width * jnp.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
