"""Averages over a Gaussian pair (u, v): E[φ(u) φ(v)], its derivatives, and its Hermite series.

`kernel` is E[φ φ] and `derivative_kernel` E[φ' φ']: orders 0 and 1 of one function, which Price's
theorem makes the derivative of each other. With (u, v) of covariance k,

    ∂/∂k E[f(u) g(v)] = E[f'(u) g'(v)],      ∂/∂q_u E[f(u) g(v)] = E[f''(u) g(v)]/2,

and Gaussian integration by parts turns the second, which f'' makes a delta function at a kink,
into (E[u f'(u) g(v)] - k E[f'(u) g'(v)]) / (2 q_u).

References: Price 1958, IRE Trans. Inf. Theory 4, 69; Cho & Saul 2009 (the arc-cosine kernels).
"""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow import activations
from gradflow._checks import check_scale, is_traced
from gradflow._closed_forms import PairMoment, gram_determinant
from gradflow.activations import Activation, ActivationLike
from gradflow.errors import InputError
from gradflow.gaussian._moments import moment, some_moments
from gradflow.gaussian._quadrature import (
    NODES,
    PAIR_NODES,
    PAIR_STEPS,
    Z_MAX,
    dot,
    normal_rule,
    panel_ends,
    panels,
    smallest_variance,
)

__all__ = ["DERIVATIVES", "derivative_kernel", "equal_pair", "hermite_coefficients"]
__all__ += ["integrate_pair", "kernel", "pair_expectation"]

DERIVATIVES = (Activation.__call__, Activation.derivative, Activation.second_derivative)
_DIAGONAL = ("phi2", "dphi2")
_FAR = 1e6  # out of sight, in units of a standard deviation


def kernel(
    activation: ActivationLike, k: Float[Array, "sites sites"]
) -> Float[Array, "sites sites"]:
    """E[φ(u_a) φ(u_b)], u ~ N(0, k): the kernel of one layer.

    Its derivative is Price's theorem: at a pair of coincident inputs, k = [[q, q], [q, q]],
    ∂/∂k_01 is E[φ'²], whether or not φ has kinks. Entry (a, b) of the result depends on k_aa, k_bb
    and, of the two equal entries k_ab and k_ba, on k_ab alone.

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
    activation = activations.get(activation)
    _check_covariance(k)
    return _kernel(activation, 0, k)


def _check_covariance(k: Array) -> None:
    if is_traced(k):
        return
    covariance = np.asarray(k, np.float64)
    check_scale("the diagonal of k", np.diagonal(covariance))
    root = np.sqrt(np.diagonal(covariance))
    limit = np.outer(root, root) * (1 + float(jnp.finfo(k.dtype).eps) ** 0.5)
    beyond = np.argwhere(~(np.abs(np.triu(covariance, 1)) <= limit))
    if beyond.size:
        a, b = map(int, beyond[0])
        raise InputError(
            f"k has covariance {covariance[a, b]:g} between inputs {a} and {b}, of variances "
            f"{covariance[a, a]:g} and {covariance[b, b]:g}; a correlation is from -1 to 1"
        )


def equal_pair(
    activation: Activation, q: Float[Array, ""], c: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """E[φ(u) φ(v)] and E[φ'(u) φ'(v)] of a pair of equal variances, in one pass.

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
    value, _, _, slope = _averages_and_slopes(activation, 0, q, q, k)
    return value[0], slope[0]


def derivative_kernel(
    activation: ActivationLike, k: Float[Array, "sites sites"]
) -> Float[Array, "sites sites"]:
    """E[φ'(u_a) φ'(u_b)], u ~ N(0, k): the kernel of a layer's slopes.

    Parameters
    ----------
    activation
        φ.
    k
        Shape (sites, sites): a covariance, as for `kernel`.

    Returns
    -------
    Array
        Shape (sites, sites), of k's dtype.

    Raises
    ------
    InputError
        If k is no covariance: a negative variance, a correlation beyond ±1 (outside jit only).
        When differentiated, if φ' jumps: the derivative is then infinite at coincident inputs.
    """
    activation = activations.get(activation)
    _check_covariance(k)
    return _kernel(activation, 1, k)


def pair_expectation(
    f: Callable[[Array], Array],
    q_u: Array,
    q_v: Array,
    k: Array,
    *,
    kinks: Iterable[float] = (),
    order: int = PAIR_NODES,
) -> Float[Array, "..."]:
    """E[f_i(u) f_j(v)] for all i and j of a vector of functions, (u, v) Gaussian.

    Not differentiable: the nodes follow the arguments.

    Parameters
    ----------
    f
        In JAX, (n,) -> (functions, n), each with a scale of order 1 and polynomial growth.
    q_u, q_v, k
        The variances and the covariance, of one shape.
    kinks
        Points where some f or a derivative of it is not smooth.
    order
        Nodes of a panel, of which there are some 30 in u and 20 in v.

    Returns
    -------
    Array
        Two axes for i and j, then the arguments'; of their dtype.
    """

    def one(pair: tuple[Array, Array, Array]) -> Array:
        return integrate_pair(f, *pair, tuple(kinks), order=order)

    flat = jax.lax.map(one, tuple(jnp.ravel(x) for x in (q_u, q_v, k)))
    return jnp.moveaxis(flat.reshape(*jnp.shape(k), *flat.shape[1:]), (-2, -1), (0, 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _kernel(activation: Activation, order: int, k: Array) -> Array:
    """E[φ⁽ⁿ⁾(u_a) φ⁽ⁿ⁾(u_b)] for n = order."""
    q = jnp.diagonal(k)
    diagonal = moment(activation, _DIAGONAL[order], q)
    a, b = np.triu_indices(k.shape[0], 1)
    if not a.size:
        return jnp.diag(diagonal)
    # An input and its replica have one average, that of the diagonal, to the last digit.
    values = _averages(activation, order, q[a], q[b], k[a, b])
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
        apart = _averages_and_slopes(activation, order, q[a], q[b], k[a, b])
        # An input and its replica have the derivatives of the diagonal: by_qa + by_qb + by_kab is
        # that of a diagonal entry.
        by_own = (along_diagonal - across) / 2
        together = (diagonal[a], by_own[a], by_own[a], across[a])
        coincident = _coincident(q[a], q[b], k[a, b])
        value, by_qa, by_qb, by_kab = (
            jnp.where(coincident, v, w) for v, w in zip(together, apart, strict=True)
        )
        out = out.at[a, b].set(value).at[b, a].set(value)
        by_k = by_k.at[a, b].set(by_kab).at[b, a].set(by_kab)
        by_q = by_q.at[a, b].set(by_qa).at[b, a].set(by_qb)
    along = by_q * q_dot[:, None]
    return out, by_k * k_dot + along + along.T


def _coincident(q_u: Array, q_v: Array, k: Array) -> Array:
    return (q_u == q_v) & (k == q_u)


def _diagonal(activation: Activation, order: int, q: Array) -> tuple[Array, Array, Array]:
    """E[φ⁽ⁿ⁾²], its derivative by q, E[x φ⁽ⁿ⁾ φ⁽ⁿ⁺¹⁾]/q, and E[φ⁽ⁿ⁺¹⁾²]."""
    if order == 1:
        value = functools.partial(moment, activation, "dphi2")
        return value(q), jax.vmap(jax.grad(value))(q), moment(activation, "ddphi2", q)
    m = some_moments(activation, ("phi2", "dphi2", "x_phi_dphi", "phi_ddphi"), q)
    # At small q, E[x φ φ'] is a difference of nearly equal terms: integrate by parts instead.
    tiny = q < 1e-8
    along = jnp.where(tiny, m["dphi2"] + m["phi_ddphi"], m["x_phi_dphi"] / jnp.where(tiny, 1, q))
    return m["phi2"], along, m["dphi2"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _averages(activation: Activation, order: int, q_u: Array, q_v: Array, k: Array) -> Array:
    """E[φ⁽ⁿ⁾(u) φ⁽ⁿ⁾(v)] of many pairs; all arguments (pairs,)."""
    closed = _closed_kernel(activation, order)
    if closed is not None:
        return jnp.broadcast_to(jnp.asarray(closed(q_u, q_v, k), k.dtype), k.shape)
    f = functools.partial(DERIVATIVES[order], activation)

    def one(pair: tuple[Array, Array, Array]) -> Array:
        return integrate_pair(lambda x: f(x)[None], *pair, activation.kinks)[0, 0]

    # One pair after another: a pair's 2e5 points are parallel enough, and need not all be stored.
    return jax.lax.map(one, (q_u, q_v, k))


def _closed_kernel(activation: Activation, order: int) -> PairMoment | None:
    return (activation.kernel, activation.derivative_kernel)[order]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _averages_and_slopes(
    activation: Activation, order: int, q_u: Array, q_v: Array, k: Array
) -> tuple[Array, Array, Array, Array]:
    """`_averages` and its derivatives by q_u, q_v and k, each of shape (pairs,)."""
    closed = _closed_kernel(activation, order)
    if closed is not None and not activation.slope_jumps:
        slopes = jax.grad(lambda *pair: jnp.asarray(closed(*pair), k.dtype), (0, 1, 2))
        by_qu, by_qv, by_k = jax.vmap(slopes)(q_u, q_v, k)
        by_k = _averages(activation, 1, q_u, q_v, k) if order == 0 else by_k
        return _averages(activation, order, q_u, q_v, k), by_qu, by_qv, by_k
    if activation.homogeneous and order == 0:  # x φ'(x) = φ(x)
        by_k = _averages(activation, 1, q_u, q_v, k)
        value = u_side = v_side = _averages(activation, 0, q_u, q_v, k)
    else:
        f = functools.partial(DERIVATIVES[order], activation)
        df = functools.partial(DERIVATIVES[order + 1], activation)

        def one(pair: tuple[Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            average = integrate_pair(
                lambda x: jnp.stack([f(x), df(x), x * df(x)]), *pair, activation.kinks
            )
            return average[0, 0], average[1, 1], average[2, 0], average[0, 2]

        value, by_k, u_side, v_side = jax.lax.map(one, (q_u, q_v, k))
    smallest = smallest_variance(k)
    by_qu = (u_side - k * by_k) / (2 * jnp.maximum(q_u, smallest))
    by_qv = (v_side - k * by_k) / (2 * jnp.maximum(q_v, smallest))
    return value, by_qu, by_qv, by_k


@_averages_and_slopes.defjvp
def _averages_and_slopes_jvp(activation, *_):  # type: ignore[no-untyped-def]
    # The quadrature's nodes follow its arguments, so differentiating it would be silently wrong.
    raise InputError(
        f"a kernel of {activation.name} is differentiated twice; differentiate derivative_kernel"
    )


def integrate_pair(
    f: Callable[[Array], Array],
    q_u: Array,
    q_v: Array,
    k: Array,
    kinks: tuple[float, ...],
    means: tuple[Array, Array] | None = None,
    order: int = PAIR_NODES,
) -> Array:
    """Return the matrix E[f_i(u) f_j(v)] of a vector of functions f: (n,) -> (rows, n).

    Means are 0 unless they are given.

    The outer average is over the variable of the larger variance, x; the inner one over the other,
    y, given x, whose mean is slope·x, with |slope| <= 1, and whose deviation is s. As a function of
    x the inner average is f smoothed over s/slope, so panels in x end around the points where the
    mean crosses a kink, and the digits are kept as the correlation goes to ±1.
    """
    smallest = smallest_variance(k)
    larger = jnp.maximum(jnp.maximum(q_u, q_v), smallest)
    smaller = jnp.minimum(q_u, q_v)
    outer_mean = inner_mean = jnp.zeros_like(k)
    if means is not None:
        outer_mean = jnp.where(q_u >= q_v, means[0], means[1])
        inner_mean = jnp.where(q_u >= q_v, means[1], means[0])
    root, limit = jnp.sqrt(larger), jnp.sqrt(smaller / larger)
    slope = jnp.clip(k / larger, -limit, limit)
    deviation = jnp.sqrt(gram_determinant(larger, smaller, k) / larger)
    kink_points = jnp.asarray(sorted({*kinks, 0.0}), k.dtype)
    points = jnp.asarray(panel_ends(kinks), k.dtype)
    steps = jnp.asarray(PAIR_STEPS, k.dtype)

    def given(x: Array) -> Array:
        mean = inner_mean + slope * x
        z, weight = normal_rule((points - mean) / jnp.maximum(deviation, smallest), order)
        return dot(f(mean + deviation * z), weight)

    steep = jnp.where(jnp.abs(slope * root) < smallest, smallest, slope * root)
    crossing = jnp.clip((kink_points - inner_mean) / steep, -_FAR, _FAR)
    spread = jnp.minimum(deviation / jnp.abs(steep), _FAR)
    around = crossing[:, None] + spread * steps[None, :]
    ends = jnp.concatenate([(points - outer_mean) / root, around.reshape(-1)])
    z, weight = normal_rule(ends, order)
    x = root * z
    average = dot(f(outer_mean + x), weight[:, None] * jax.vmap(given)(x))
    return jnp.where(q_u >= q_v, average, average.T)


def hermite_coefficients(
    activation: ActivationLike, q: Float[Array, ""], terms: int
) -> Float[Array, " terms"]:
    """Hermite coefficients a_k = E[φ(√q Z) he_k(Z)], Z ~ N(0, 1), k = 0 … terms - 1.

    he_k are the Hermite polynomials with E[he_j he_k] = δ_jk, so that a pair of correlation c and
    equal variances has E[φ(u) φ(v)] = Σ_k a_k² c^k (Mehler), and Σ_k a_k² = E[φ²].

    Parameters
    ----------
    activation
        φ.
    q
        The variance, > 0, a scalar.
    terms
        Their number, up to about 1000. Where φ has no kinks but at 0, the nodes do not depend on q,
        and a vmap over q becomes one matrix product.
    """
    activation = activations.get(activation)
    scales = [0.0, *2.0 ** np.arange(-12, 1), *range(2, Z_MAX + 1)]
    edges = jnp.asarray(scales, q.dtype)
    away = np.setdiff1d(np.abs(activation.kinks), 0)
    if away.size:
        moving = jnp.minimum(jnp.asarray(away, q.dtype) / jnp.sqrt(q), Z_MAX)
        edges = jnp.sort(jnp.concatenate([edges, jax.lax.stop_gradient(moving)]))
    z, width = panels(edges, NODES)
    weight = width * jnp.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    def next_two(pair: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], tuple]:
        even, odd = pair
        above = (z * odd - jnp.sqrt(k) * even) / jnp.sqrt(k + 1)
        return (above, (z * above - jnp.sqrt(k + 1) * odd) / jnp.sqrt(k + 2)), pair

    steps = jnp.arange(1, terms + 1, 2, dtype=q.dtype)
    _, (even, odd) = jax.lax.scan(next_two, (jnp.ones_like(z), z), steps)
    plus, minus = activation(z * jnp.sqrt(q)), activation(-z * jnp.sqrt(q))
    a = jnp.stack(
        [dot(even, weight * (plus + minus)), dot(odd, weight * (plus - minus))], axis=-1
    ).reshape(-1)
    return a[:terms]
