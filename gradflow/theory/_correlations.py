"""The correlation map's fixed point c*: by a power series, and by quadrature where that is short.

C(c) = (σ_w² E[φ(u) φ(v)] + σ_b²)/q, at a length q that the length map keeps, is a power series in c
with coefficients >= 0, those of φ in Hermite polynomials, so it has at most one fixed point in
[0, 1) besides c = 1: one where χ₁ > 1, none elsewhere (Poole et al. 2016, arXiv:1606.05340).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from gradflow import gaussian
from gradflow._programs import program
from gradflow._roots import Valued, implicit, newton, rounding
from gradflow.activations import Activation
from gradflow.gaussian import _pairs

__all__ = ["correlation_curvature", "correlation_fixed_point"]

_TERMS = 512
# Derivatives of c* and χ_c come from the series alone, and are NaN where terms left out matter by
# more than this.
_LOST = 1e-7


@program("activation")
def correlation_fixed_point(
    activation: Activation, q: Array, sigma_w2: Array, sigma_b2: Array, chi1: Array
) -> tuple[Float[Array, "*grid"], Float[Array, "*grid"]]:
    """Return c*, the stable fixed point in [0, 1], and χ_c = C'(c*), at every point of a grid.

    Parameters
    ----------
    activation
        φ; static under jit.
    q
        The length, > 0, a fixed point of the length map: σ_w² E[φ²] + σ_b² = q.
    sigma_w2, sigma_b2
        σ_w² and σ_b², >= 0, of q's shape.
    chi1
        σ_w² E[φ'²] at q.

    Returns
    -------
    c_star, chi_c
        Of q's shape; c* = 1 and χ_c = χ₁ where χ₁ <= 1. Their derivatives are NaN at a few points
        where those are not known: φ with kinks, and 1 - c* below 0.02 or so.
    """
    # Where χ₁ - 1 is rounding, so is 1 - c*, and the two roots cannot be distinguished.
    chaotic = chi1 - 1 > rounding(q.dtype)
    weight = jnp.where(chaotic, sigma_w2 / q, 1)

    c_star, chi_c, slope = _series_fixed_points(activation, q, weight, sigma_b2 / q, chaotic)
    # The contribution of omitted terms to χ₁, each times c^(k-1), bounds their contribution to χ_c.
    left_out = jnp.maximum(chi1 - slope, 0) * c_star**_TERMS
    tolerance = 50 * float(jnp.finfo(q.dtype).eps)
    insufficient = chaotic & (left_out > tolerance * jnp.maximum(chi1 - 1, tolerance))
    better = _by_quadrature(
        activation,
        *jax.lax.stop_gradient((insufficient, c_star, chi_c, q, weight, sigma_b2 / q)),
    )
    # The series still has the derivative, unless it has lost that too.
    lost = chaotic & (left_out > _LOST * (chi1 - 1))
    c_star, chi_c = (
        _without_derivative(lost, jnp.where(insufficient, x + jax.lax.stop_gradient(y - x), x))
        for x, y in zip((c_star, chi_c), better, strict=True)
    )
    return jnp.where(chaotic, c_star, 1), jnp.where(chaotic, chi_c, chi1)


def correlation_curvature(
    activation: Activation, q: Float[Array, "*grid"], sigma_w2: Float[Array, "*grid"]
) -> tuple[float, Float[Array, "*grid"]]:
    """Return p and a of C(1 - δ) = 1 - χ₁ δ + a δ^p: p is 3/2 where φ' jumps, 2 elsewhere.

    `criticality` has the derivation; it holds for any χ₁.
    """
    if not activation.slope_jumps:
        return 2.0, sigma_w2 * q * gaussian.moment(activation, "ddphi2", q) / 2
    jumps = sum(
        jump**2 * jnp.exp(-(kink**2) / (2 * q)) for kink, jump in activation.slope_jumps
    ) / jnp.sqrt(2 * math.pi * q)
    return 1.5, 2 / 3 * sigma_w2 * jnp.sqrt(q / math.pi) * jumps


@jax.custom_jvp
def _without_derivative(where: Array, x: Array) -> Array:
    """Return x, with a derivative of NaN ``where`` it is not known."""
    del where
    return x


@_without_derivative.defjvp
def _without_derivative_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    (where, x), (_, x_dot) = primals, tangents
    return x, x_dot * jnp.where(where, jnp.nan, 1)


def _series_fixed_points(
    activation: Activation, q: Array, weight: Array, bias: Array, chaotic: Array
) -> tuple[Array, Array, Array]:
    """Return the c* < 1 of C(c) = weight Σ a_k² c^k + bias, C'(c*), and C'(1), from ``_TERMS``.

    There is one in the chaotic phase alone; elsewhere only C'(1) has a meaning.
    """
    # Terms first, points last: one step along a series is one pass over neighbours in memory.
    coefficients = jax.vmap(
        lambda q: gaussian.hermite_coefficients(activation, q, _TERMS), out_axes=-1
    )(q.reshape(-1))
    powers = coefficients**2 * weight.reshape(1, -1)
    points = jax.vmap(_series_fixed_point, in_axes=(-1, 0, 0))(
        powers, bias.reshape(-1), chaotic.reshape(-1)
    )
    return jax.tree.map(lambda leaf: leaf.reshape(q.shape), points)


def _series_fixed_point(
    power: Float[Array, " terms"], bias: Float[Array, ""], chaotic: Bool[Array, ""]
) -> tuple[Array, Array, Array]:
    held = jax.lax.stop_gradient(power)
    left_out = jnp.maximum(1 - jax.lax.stop_gradient(bias) - jnp.sum(held), 0)

    # S_j = Σ_{k>j} power_k, summed from the small end, with all terms beyond the last.
    _, beyond = jax.lax.scan(
        lambda tail, term: (tail + term, tail + term), left_out, held[1:], reverse=True, unroll=16
    )

    def excess(c: Array) -> Valued:
        """(1 - C(c))/(1 - c) - 1 = Σ_j c^j S_j - 1: convex, increasing, the root 1 divided out."""
        return *_polynomial(beyond, c, offset=-1.0), jnp.ones_like(c)

    zero = jnp.zeros_like(bias)
    one = jnp.ones_like(bias)
    # All points of a grid iterate until the last one is done, so one without a root must not start.
    needed = chaotic & (beyond[0] - 1 <= -rounding(bias.dtype))
    # A convex function: from the right, Newton's method never oversteps.
    root = newton(excess, zero, jnp.where(needed, one, zero), sign=-one, start=one)
    root = jnp.where(needed, root, zero)

    def equation(theta: tuple[Array, Array], c: Array) -> Array:
        power, bias = theta
        return _polynomial(power, c, offset=bias)[0] - c

    c_star = implicit(equation, (power, bias), root)
    slopes = power[1:] * jnp.arange(1, _TERMS, dtype=bias.dtype)
    return c_star, _polynomial(slopes, c_star)[0], jnp.sum(slopes)


def _polynomial(
    coefficients: Array, x: Array, offset: ArrayLike = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return offset + Σ_k coefficients_k x^k, and its derivative by x."""

    def horner(total: tuple[Array, Array], coefficient: Array) -> tuple[tuple[Array, Array], None]:
        value, slope = total
        return (value * x + coefficient, slope * x + value), None

    start = (jnp.zeros_like(x), jnp.zeros_like(x))
    (value, slope), _ = jax.lax.scan(horner, start, coefficients, reverse=True, unroll=16)
    return value + offset, slope


def _by_quadrature(activation: Activation, *grids: Array) -> tuple[Array, Array]:
    """Solve for c* with quadrature in two dimensions, at the few points that need it.

    ``grids`` are where that is, and c*, C'(c*), q, σ_w²/q and σ_b²/q; the result is c* and C'(c*).
    """
    # Traced numbers that φ closes over must be arguments of a function with its own vmap rule.
    program = jax.make_jaxpr(activation.function)(jnp.zeros((), grids[1].dtype))
    traced = [isinstance(c, jax.core.Tracer) for c in program.consts]
    parameters = tuple(c for c, is_traced in zip(program.consts, traced, strict=True) if is_traced)

    def with_parameters(parameters: Sequence[Array]) -> Activation:
        if not parameters:
            return activation
        given = iter(parameters)
        consts = [
            next(given) if is_traced else c
            for c, is_traced in zip(program.consts, traced, strict=True)
        ]

        def function(x: Array) -> Array:
            return jax.core.eval_jaxpr(program.jaxpr, consts, x)[0]

        return dataclasses.replace(activation, function=jnp.vectorize(function))

    @jax.custom_batching.custom_vmap
    def everywhere(grids: tuple[Array, ...], parameters: Sequence[Array]) -> tuple[Array, Array]:
        solve = functools.partial(_correlation_by_quadrature, with_parameters(parameters))
        flat = tuple(grid.reshape(-1) for grid in grids)
        # Not a vmap: a batch of conditions would compute both sides of each.
        c, chi_c = jax.lax.cond(
            jnp.any(flat[0]), lambda: jax.lax.map(solve, flat), lambda: (flat[1], flat[2])
        )
        return c.reshape(grids[1].shape), chi_c.reshape(grids[1].shape)

    @everywhere.def_vmap
    def _everywhere_batched(axis_size, in_batched, grids, parameters):  # type: ignore[no-untyped-def]
        grids, parameters = (
            tuple(
                x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
                for x, batched in zip(side, flags, strict=True)
            )
            for side, flags in zip((grids, parameters), in_batched, strict=True)
        )
        if any(in_batched[1]):
            return jax.lax.map(lambda both: everywhere(*both), (grids, parameters)), (True, True)
        return everywhere(grids, tuple(p[0] for p in parameters)), (True, True)

    return everywhere(grids, tuple(jax.lax.stop_gradient(p) for p in parameters))


def _correlation_by_quadrature(
    activation: Activation, point: tuple[Array, ...]
) -> tuple[Array, Array]:
    needed, c, chi_c, q, weight, bias = point

    def solved() -> tuple[Array, Array]:
        def excess(c: Array) -> Valued:
            value, slope = _pairs.equal_pair(activation, q, c)
            return weight * value + bias - c, weight * q * slope - 1, jnp.ones_like(c)

        # The series' c is a little too large; c = 1 is a root, but not the one that is wanted.
        start = jnp.where(c < 1, c, c / 2)
        c_star = newton(excess, jnp.zeros_like(c), c, sign=jnp.ones_like(c), start=start)
        return c_star, weight * q * _pairs.equal_pair(activation, q, c_star)[1]

    return jax.lax.cond(needed, solved, lambda: (c, chi_c))
