"""Averages over random rows of attention: A = softmax(s), s one Gaussian score for each token.

The scores of a row are independent, N(0, v); two rows have the correlation c at each token. With
1/Zⁿ = ∫ tⁿ⁻¹ exp(-t Z) dt/Γ(n) and t = exp(y) the average over all tokens is a power of the average
over one: E Σ A_b² = T ∫ dy E[g₂(y + s)] E[g₀(y + s)]^(T-1), g_k(u) = exp(k u - exp u), and for two
rows it is the same in two variables, with E[g_j(y + s) g_k(y' + s')] = Σ_n cⁿ h_n h_n' of Mehler's
series, a product of matrices. Every integral here is arranged so that all its terms are positive:
no digits are lost where A is nearly uniform, or nearly one token, or where both rows are nearly the
same; and it is the trapezoidal rule of an analytic function, exact to rounding.

Derivatives follow the heat equation, ∂E[f(y + s)]/∂v = E[f''(y + s)]/2, also at v = 0.

References: Noci et al. 2022, arXiv:2206.03126; Hron et al. 2020, arXiv:2006.10540 (the Gaussian
limit of scores).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, ArrayLike, Bool, Float

from gradflow._checks import check_count, check_scale, is_traced
from gradflow.errors import InputError
from gradflow.gaussian._quadrature import dot

__all__ = [
    "LARGEST_SCORE_VARIANCE",
    "SoftmaxRows",
    "rows_are_known",
    "softmax_entropy",
    "softmax_largest",
]
__all__ += ["softmax_rows"]

LARGEST_SCORE_VARIANCE = 1024.0
_Z = 9.2  # the normal density beyond is 4e-19 of its peak
_TAIL = 37.0  # exp(-37) is 1e-16


class _Rule(NamedTuple):
    """How many points there are, for scores of a variance up to ``largest``."""

    largest: float
    rows: int  # values of y
    scores: int  # of a score
    terms: int  # of Mehler's series


_RULES = (
    _Rule(1.25, 128, 88, 128),
    _Rule(4.0, 208, 160, 480),
    _Rule(16.0, 336, 304, 768),
    _Rule(LARGEST_SCORE_VARIANCE, 384, 2400, 2048),
)


class SoftmaxRows(NamedTuple):
    """Averages over two rows A, A' of attention; M = diag(A) - A Aᵀ is softmax's Jacobian."""

    P: Float[Array, "..."]  # E Σ_b A_b²
    C: Float[Array, "..."]  # E Σ_b A_b A'_b
    gap: Float[Array, "..."]  # P - C, with all its digits also where it is small
    R: Float[Array, "..."]  # E tr M²
    R_cross: Float[Array, "..."]  # E tr M M' = (∂C/∂c)/v


def softmax_rows(tokens: int | Array, variance: ArrayLike, apart: ArrayLike = 0.0) -> SoftmaxRows:
    """P, C, P - C, R and R× of rows of attention over T tokens.

    Differentiable in both numbers, to any order, also at v = 0 and c = 1. Exact to about 1e-13 in
    float64 and 1e-5 in float32.

    Parameters
    ----------
    tokens
        T, a whole number of at least 1; it may be traced.
    variance
        v of the scores, from 0 to 1024, of any shape.
    apart
        1 - c, from 0 to T/(T - 1), of a shape that broadcasts with v's. Given as a difference so
        that rows that are nearly the same have one with all its digits.

    Returns
    -------
    SoftmaxRows
        Arrays of the shape that both numbers broadcast to. NaN where a traced number is out of
        range, and where c is too near 1 for so large a v: 1 - c < 0.07 and v > 17, about.

    Raises
    ------
    InputError
        If a number that is known is out of range.
    """
    tokens = _check_tokens(tokens)
    _check_variance(variance)
    check_scale("apart", apart)
    if not is_traced(apart) and not is_traced(tokens):
        most = 2.0 if tokens < 3 else tokens / (tokens - 1)
        if np.any(np.asarray(apart) > most * (1 + 1e-6)):
            raise InputError(
                f"apart is {apart}; 1 - c is from 0 to {most:.6g} with {tokens} tokens"
            )
    return SoftmaxRows(*_over_entries(_two_rows, tokens, variance, apart))


def rows_are_known(variance: Array, apart: Array) -> Bool[Array, "..."]:
    """Whether `softmax_rows` has a number, and not NaN, for traced numbers that are in range."""
    return functools.reduce(jnp.logical_or, _fits_rows(variance, apart))


def softmax_entropy(tokens: int | Array, variance: ArrayLike) -> Float[Array, "..."]:
    """E[-Σ_b A_b ln A_b] in nats, of a row of attention over T tokens.

    Parameters
    ----------
    tokens, variance
        As for `softmax_rows`.

    Raises
    ------
    InputError
        As `softmax_rows` does.
    """
    tokens = _check_tokens(tokens)
    _check_variance(variance)
    return _over_entries(_entropy, tokens, variance)


def softmax_largest(tokens: int | Array, variance: ArrayLike) -> Float[Array, "..."]:
    """E max_b A_b, of a row of attention over T tokens; its derivative is infinite at v = 0.

    Parameters
    ----------
    tokens, variance
        As for `softmax_rows`.

    Raises
    ------
    InputError
        As `softmax_rows` does.
    """
    tokens = _check_tokens(tokens)
    _check_variance(variance)
    return _over_entries(_largest, tokens, jnp.sqrt(variance))


def _check_tokens(tokens: Any) -> Any:
    return tokens if is_traced(tokens) else check_count("tokens", tokens)


def _check_variance(variance: ArrayLike) -> None:
    check_scale("variance", variance)
    if not is_traced(variance) and np.any(np.asarray(variance) > LARGEST_SCORE_VARIANCE):
        raise InputError(
            f"variance is {np.max(np.asarray(variance)):g}; that of scores is at most "
            f"{LARGEST_SCORE_VARIANCE:g} here"
        )


def _over_entries(function: Callable[..., Array], tokens: Any, *given: ArrayLike) -> Array:
    """Apply a function of scalars to every entry of arrays that broadcast; these axes come last."""
    dtype = jnp.promote_types(jnp.result_type(*given), jnp.result_type(0.0))
    arrays = jnp.broadcast_arrays(*(jnp.asarray(x, dtype) for x in given))
    shape, tokens = arrays[0].shape, jnp.asarray(tokens, dtype)
    each = _one_by_one(function, len(given), 0)
    if not shape:
        return each(tokens, *arrays)
    in_axes = (None, *(0 for _ in arrays))
    out = jax.vmap(each, in_axes, out_axes=-1)(tokens, *(x.reshape(-1) for x in arrays))
    return out.reshape(out.shape[:-1] + shape)


@functools.lru_cache(maxsize=64)
def _one_by_one(function: Callable[..., Array], count: int, order: int) -> Callable[..., Array]:
    """A derivative of a function of T and other scalars, compiled once for every T.

    The entries of a batch follow one another: at once, every rule would be computed for each.
    """
    arguments = tuple(range(1, count + 1))
    derivative = function
    for _ in range(order):
        derivative = _stacked_derivative(derivative, arguments)
    each = jax.custom_jvp(jax.custom_batching.sequential_vmap(derivative))

    @each.defjvp
    def _jvp(primals, tangents):  # type: ignore[no-untyped-def]
        slopes = _one_by_one(function, count, order + 1)(*primals)
        return each(*primals), sum(slopes[i - 1] * tangents[i] for i in arguments)

    return jax.jit(each)


def _stacked_derivative(
    function: Callable[..., Array], arguments: tuple[int, ...]
) -> Callable[..., Array]:
    return lambda *given: jnp.stack(jax.jacfwd(function, arguments)(*given))


def _by_rule(function: Callable[[_Rule], Array], fits: list[Array]) -> Array:
    """A function's value by the first rule that fits; NaN if none does."""
    branches: list[Callable[[], Array]] = [functools.partial(function, rule) for rule in _RULES]
    shape = jax.eval_shape(branches[0])
    branches.append(functools.partial(jnp.full, shape.shape, jnp.nan, shape.dtype))
    first = jnp.argmax(jnp.stack([*fits, jnp.ones((), bool)]))
    return jax.lax.switch(first, branches)


def _fits(variance: Array) -> list[Array]:
    """Whether each rule has points enough for scores of this variance."""
    return [(variance >= 0) & (variance <= rule.largest) for rule in _RULES]


def _rows_rule(tokens: Array, variance: Array, count: int) -> tuple[Array, Array]:
    """Values of y and their weights: where the integrands are, whose left tail is exp(y).

    y = x - m exp(-(x - a)/m), so that the tail ends after a few steps of x.
    """
    variance = jax.lax.stop_gradient(variance)
    deviation, log_tokens = jnp.sqrt(variance), jnp.log(tokens)
    low = -(_Z * deviation + _TAIL + log_tokens)
    high = _Z * deviation + 5
    # Beyond two bounds of it 1/Z's own factor is below exp(-45).
    many = jnp.maximum(tokens, 200)
    bound = jnp.minimum(deviation * ndtri(71.2 / many), jnp.log(-jnp.log1p(-90 / many)))
    high = jnp.where(tokens > 200, jnp.minimum(high, bound), high)
    steepness = jnp.maximum(1, deviation / 2)
    frozen = deviation * jnp.sqrt(2 * log_tokens)
    shoulder = -jnp.where(variance < 2 * log_tokens, log_tokens + variance / 2, frozen)  # -E ln Z
    start = shoulder - steepness * jnp.log1p((shoulder - low) / steepness)
    step = (high - start) / (count - 1)
    x = start + step * jnp.arange(count, dtype=variance.dtype)
    tail = jnp.exp(-(x - shoulder) / steepness)
    return x - steepness * tail, step * (1 + tail)


def _scores(count: int, dtype: Any) -> tuple[Array, Array]:
    """Values of a standard normal score, and their weights."""
    z = (2 * _Z / (count - 1)) * (jnp.arange(count, dtype=dtype) - (count - 1) / 2)
    weight = jnp.exp(-(z**2) / 2)
    return z, weight / jnp.sum(weight)


# A function of u is a tuple of the coefficients of 1 - g₀, g₁, g₂, …: so powers of a g₀ near 1 keep
# their digits, and the derivative is one of them too.
_Terms = tuple[float, ...]
_REST, _G1, _G2 = (1.0,), (0.0, 1.0), (0.0, 0.0, 1.0)  # 1 - g₀, g₁, g₂


def _derivative(f: _Terms) -> _Terms:
    """(1 - g₀)' = g₁ and g_k' = k g_k - g_(k+1)."""
    kept = (*(k * a for k, a in enumerate(f)), 0.0)
    passed = (0.0, f[0], *(-a for a in f[1:]))
    return tuple(a + b for a, b in zip(kept, passed, strict=True))


def _exp(u: Array) -> Array:
    return jnp.exp(jnp.minimum(u, 12.0))  # exp(-exp(12)) is 0, and powers of exp(12) are finite


def _values(f: _Terms, u: Array) -> Array:
    t = _exp(u)
    decay = jnp.exp(-t)
    parts = [-a * jnp.expm1(-t) if k == 0 else a * t**k * decay for k, a in enumerate(f) if a]
    return functools.reduce(jnp.add, parts)


def _increments(f: _Terms, y: Array, shift: Array) -> Array:
    """f(y + shift) - f(y), with all its digits also where it is small."""
    near = jnp.clip(shift, -0.5, 0.5)
    t = jnp.exp(jnp.minimum(y, 5.0))  # beyond, g_k < 1e-60
    less = t * jnp.expm1(near)
    decay = jnp.exp(-t)
    parts = [
        (a if k else -a) * t**k * decay * jnp.expm1(k * near - less) for k, a in enumerate(f) if a
    ]
    close = functools.reduce(jnp.add, parts)
    is_close = (jnp.abs(shift) < 0.5) & (y < 5)
    return jnp.where(is_close, close, _values(f, y + shift) - _values(f, y))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _average(f: _Terms, count: int, y: Array, variance: Array) -> Array:
    """E[f(y + s)], s ~ N(0, v)."""
    z, weight = _scores(count, y.dtype)
    return dot(_values(f, y[:, None] + jnp.sqrt(variance) * z[None]), weight)


@_average.defjvp
def _average_jvp(f, count, primals, tangents):  # type: ignore[no-untyped-def]
    y, variance = primals
    slope = _average(_derivative(_derivative(f)), count, y, variance) / 2
    return _average(f, count, y, variance), slope * tangents[1]  # y is no variable of an integral


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pair_average(
    f: _Terms, g: _Terms, polynomials: Array, y: Array, variance: Array, apart: Array
) -> tuple[Array, Array]:
    """E[f(y + s) g(y' + s')] over all y and y', and by how much it is larger where s' = s."""
    terms, scores = polynomials.shape
    z, weight = _scores(scores, y.dtype)
    shift = jnp.sqrt(variance) * z[None]

    def series(f: _Terms) -> Array:
        rest = dot(_increments(f, y[:, None], shift) * jnp.sqrt(weight)[None], polynomials[1:].T)
        return jnp.concatenate([_average(f, scores, y, variance)[:, None], rest], axis=1)

    left = series(f)
    right = left if f == g else series(g)
    shared, lost = _powers(terms, apart)
    return dot(left * shared[None], right.T), dot(left * lost[None], right.T)


@_pair_average.defjvp
def _pair_average_jvp(f, g, primals, tangents):  # type: ignore[no-untyped-def]
    *_, variance, apart = primals
    *_, d_variance, d_apart = tangents
    f1, g1 = _derivative(f), _derivative(g)
    (value, gap), (left, left_gap), (right, right_gap), (both, both_gap) = (
        _pair_average(a, b, *primals)
        for a, b in ((f, g), (_derivative(f1), g), (f, _derivative(g1)), (f1, g1))
    )
    along = (left + right) / 2 + (1 - apart) * both
    gap_along = (left_gap + right_gap) / 2 + both_gap + apart * both
    return (value, gap), (
        along * d_variance - variance * both * d_apart,
        gap_along * d_variance + variance * both * d_apart,
    )


def _hermite_functions(rule: _Rule, dtype: Any) -> Float[Array, "terms scores"]:
    """He_n(z)/√n! times the root of z's weight, by their recurrence."""
    z, weight = _scores(rule.scores, dtype)

    def step(state: tuple[Array, Array], n: Array) -> tuple[tuple[Array, Array], Array]:
        before, now = state
        after = (z * now - jnp.sqrt(n) * before) / jnp.sqrt(n + 1)
        return (now, after), now

    numbers = jnp.arange(rule.terms, dtype=dtype)
    return jax.lax.scan(step, (jnp.zeros_like(z), jnp.sqrt(weight)), numbers)[1]


def _powers(terms: int, apart: Array) -> tuple[Array, Array]:
    """cⁿ and 1 - cⁿ, for n < terms and c = 1 - apart."""
    n = jnp.arange(terms)
    c = 1 - apart
    near = jnp.expm1(n * jnp.log1p(-jnp.minimum(apart, 0.5)))
    power = jnp.where(n == 0, 1, c**n)
    return power, jnp.where(apart < 0.5, -near, 1 - power)


def _two_rows(tokens: Array, variance: Array, apart: Array) -> Array:
    """`SoftmaxRows` as one array."""
    return _by_rule(
        lambda rule: _by_one_rule(tokens, rule, variance, apart), _fits_rows(variance, apart)
    )


def _fits_rows(variance: Array, apart: Array) -> list[Array]:
    """Whether each rule has points and terms enough for two rows."""
    return [
        fit & _converges(rule, variance, jnp.abs(1 - apart))
        for rule, fit in zip(_RULES, _fits(variance), strict=True)
    ]


def _converges(rule: _Rule, variance: Array, c: Array) -> Array:
    """Whether Mehler's series has converged, and rows are near enough for two that are alike.

    The series' terms fall as cⁿ exp(-π √(n/v)), about, and the integrand varies with y - y' over a
    distance of √(1 + (1 - c) v).
    """
    decay = 2.9 * jnp.sqrt(rule.terms / jnp.maximum(variance, 1e-6))
    falls = decay - rule.terms * jnp.log(jnp.maximum(c, 1e-6)) > 32
    step = (2 * _Z * jnp.sqrt(variance) + 12) / rule.rows
    return falls & (step < 0.27 * jnp.sqrt(1 + (1 - c) * variance / 2))


def _by_one_rule(tokens: Array, rule: _Rule, variance: Array, apart: Array) -> Array:
    y, weight = _rows_rule(tokens, variance, rule.rows)
    polynomials = _hermite_functions(rule, y.dtype)
    p1, p2, p0c = (_average(f, rule.scores, y, variance) for f in (_G1, _G2, _REST))
    (both, both_gap), (ones, ones_gap), (mixed, _) = (
        _pair_average(f, g, polynomials, y, variance, apart)
        for f, g in ((_REST, _REST), (_G1, _G1), (_G1, _REST))
    )
    mixed = p1[:, None] - mixed
    # ln E[g₀ g₀'], and by how much that of two equal rows is larger, times T - 1.
    alone = p0c[:, None] + p0c[None] - both
    least = 1 - jnp.finfo(y.dtype).eps
    log0 = jnp.log1p(-jnp.minimum(alone, least))
    ratio = both_gap / jnp.exp(log0)
    near = jnp.log1p(jnp.minimum(ratio, 0.5))
    rise = (tokens - 1) * jnp.where(
        ratio < 0.5, near, jnp.log1p(-jnp.minimum(alone - both_gap, least)) - log0
    )

    def power(less: int) -> Array:
        return jnp.exp((tokens - less) * log0)

    more = jnp.where(
        rise < 1,
        power(1) * jnp.expm1(jnp.minimum(rise, 1)),
        jnp.exp((tokens - 1) * log0 + rise) - power(1),
    )
    pairs = tokens * (tokens - 1)
    cross = 2 * pairs * ones**2 * power(2)
    own_log0 = jnp.log1p(-jnp.minimum(p0c, least))
    own = 2 * p2**2 * jnp.exp((tokens - 2) * own_log0)
    # With two tokens a power of -1 meets a factor of 0.
    cross += pairs * (tokens - 2) * ones * mixed * mixed.T * power(3)
    own += (tokens - 2) * p2 * p1**2 * jnp.exp((tokens - 3) * own_log0)
    sums = [ones * power(1), ones_gap * (power(1) + more) + ones * more, cross]
    c, gap, r_cross = (dot(weight, dot(matrix, weight)) for matrix in sums)
    p = dot(weight, p2 * jnp.exp((tokens - 1) * own_log0))
    r = dot(weight, own) * pairs / 6
    # The gap's series has no powers of c, and where it is slow the gap is no small one.
    gap = jnp.where(_converges(rule, variance, jnp.ones_like(variance)), gap, p - c)
    return jnp.stack([tokens * p, tokens * c, tokens * gap, r, r_cross])


def _entropy_density(u: Array) -> Array:
    """(u + γ) g₀(u) + E₁(eᵘ), which is positive, and like -u eᵘ for u → -∞."""
    t = _exp(u)
    small, large = jnp.minimum(t, 2.5), jnp.maximum(t, 2.5)
    series = jnp.zeros_like(t)
    for k in range(30, 0, -1):  # ∫₀ᵗ (1 - exp(-x))/x dx = t - t²/(2·2!) + …
        series = small * ((-1) ** (k + 1) / (k * math.factorial(k)) + series)
    fraction = large + 61
    for k in range(30, 0, -1):  # E₁(t) exp(t) = 1/(t + 1 - 1/(t + 3 - 4/(t + 5 - …)))
        fraction = large + (2 * k - 1) - k**2 / fraction
    left = series - (u + np.euler_gamma) * _values(_REST, u)
    right = (u + np.euler_gamma + 1 / fraction) * jnp.exp(-t)
    return jnp.where(t < 2.5, left, right)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _entropy_average(count: int, y: Array, variance: Array) -> Array:
    """E[f(y + s)] of `_entropy_density`, f' = -(u + γ) g₁."""
    z, weight = _scores(count, y.dtype)
    return dot(_entropy_density(y[:, None] + jnp.sqrt(variance) * z[None]), weight)


@_entropy_average.defjvp
def _entropy_average_jvp(count, primals, tangents):  # type: ignore[no-untyped-def]
    y, variance = primals
    # f'' = -g₁ - (u + γ) (g₁ - g₂), and E[s F(y + s)] = v E[F'(y + s)].
    f, g = _derivative(_G1), _derivative(_derivative(_G1))
    curvature = -(
        _average(_G1, count, y, variance)
        + (y + np.euler_gamma) * _average(f, count, y, variance)
        + variance * _average(g, count, y, variance)
    )
    return _entropy_average(count, y, variance), curvature / 2 * tangents[1]


def _entropy(tokens: Array, variance: Array) -> Array:
    def by_rule(rule: _Rule) -> Array:
        y, weight = _rows_rule(tokens, variance, rule.rows)
        p1, p0c = (_average(f, rule.scores, y, variance) for f in (_G1, _REST))
        log0 = jnp.log1p(-jnp.minimum(p0c, 1 - jnp.finfo(y.dtype).eps))
        parts = _entropy_average(rule.scores, y, variance) * p1
        return tokens * (tokens - 1) * dot(weight, parts * jnp.exp((tokens - 2) * log0))

    return _by_rule(by_rule, _fits(variance))


def _largest(tokens: Array, deviation: Array) -> Array:
    def by_rule(rule: _Rule) -> Array:
        """T times the average of A_1 where s_1 is the largest score.

        The others are below s_1 and their factors are E[g₀(y + s); s < s_1].
        """
        y, weight = _rows_rule(tokens, deviation**2, rule.rows)
        z, rise = _panels(rule.scores // 2, y.dtype)
        density = jnp.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        u = y[:, None, None] + deviation * z[None]
        lost = _values(_REST, u) * density[None]
        within = dot(lost, rise.T)
        before = jnp.cumsum(within[..., -1:], axis=1) - within[..., -1:]
        below = ndtr(-z)[None] + before + within[..., :-1]
        log0 = jnp.log1p(-jnp.minimum(below, 1 - jnp.finfo(y.dtype).eps))
        first = _values(_G1, u) * density[None] * jnp.exp((tokens - 1) * log0)
        return tokens * dot(weight, jnp.sum(dot(first, rise[-1]), axis=1))

    return _by_rule(by_rule, _fits(deviation**2))


def _panels(count: int, dtype: Any) -> tuple[Array, Array]:
    """Gauss-Legendre points z, (panels, points), and integrals from a panel's beginning.

    The integrals have a row for each point, and one for the panel's end.
    """
    order = 16
    x, _ = np.polynomial.legendre.leggauss(order)
    half = _Z / count
    middle = half * (2 * np.arange(count) + 1) - _Z
    powers = np.polynomial.legendre.legvander(x, order - 1)
    ends = np.concatenate([x, [1.0]])
    integrals = np.stack(
        [
            np.polynomial.legendre.legval(ends, np.polynomial.legendre.legint(row, lbnd=-1))
            for row in np.eye(order)
        ],
        axis=1,
    )
    rise = half * integrals @ np.linalg.inv(powers)
    return jnp.asarray(middle[:, None] + half * x, dtype), jnp.asarray(rise, dtype)
