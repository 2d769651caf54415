"""How lengths and correlations approach a marginal fixed point: as a power of the layer's number.

Where a map has slope 1 at its fixed point x*, x - x* → A l^-p after l layers, with an exponent p
and an amplitude A that the map's next term gives; NaN where no power describes it.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from gradflow._roots import rounding
from gradflow.activations import Activation
from gradflow.theory._correlations import correlation_curvature
from gradflow.theory._moment_table import Limit, Table, over_grid

__all__ = ["approach_of_correlation", "approach_of_length"]


def approach_of_length(
    activation: Activation,
    table: Table,
    q: Array,
    sigma_w2: Array,
    *,
    at_zero: Bool[Array, "*grid"],
    elsewhere: Bool[Array, "*grid"],
) -> tuple[Array, Array]:
    """Return p and A of |q - q*| → A l^-p, where χ∥ = 1 at q* = 0 or elsewhere."""
    # V(q) = q + V''(q*) (q - q*)²/2; the table has V'.
    curvature = sigma_w2 * over_grid(
        jax.grad(lambda q: table.at(q).gain), jnp.where(elsewhere, q, 1)
    )
    # V(q) = q - b q^{3/2} - a q² about 0, from the derivatives of φ on either side of it.
    beside = jnp.asarray([1e-30, -1e-30], q.dtype)
    first, second = activation.derivative(beside), activation.second_derivative(beside)
    third = jax.jvp(activation.second_derivative, (beside,), (jnp.ones_like(beside),))[1]
    sides = first * second * jnp.asarray([1.0, -1.0], q.dtype)
    b = -sigma_w2 * jnp.sum(sides) * math.sqrt(2 / math.pi)
    bent = jnp.abs(jnp.sum(sides)) > 1e-6 * jnp.sum(first**2)
    a = -1.5 * sigma_w2 * jnp.sum(second**2 / 4 + first * third / 3)

    amplitude = jnp.select(
        [at_zero & bent, at_zero & (a > 0), elsewhere],
        [4 / jnp.where(bent, b, 1) ** 2, 1 / jnp.where(a > 0, a, 1), 2 / jnp.abs(curvature)],
        jnp.nan,
    )
    amplitude = jnp.where(jnp.isinf(amplitude), jnp.nan, amplitude)
    exponent = jnp.where(at_zero & bent, 2, 1)
    return jnp.where(jnp.isnan(amplitude), jnp.nan, exponent), amplitude


def approach_of_correlation(
    activation: Activation,
    table: Table,
    q: Array,
    sigma_w2: Array,
    chi1: Array,
    chi_c: Array,
    *,
    diverges: Bool[Array, "*grid"],
    near_zero: Bool[Array, "*grid"],
    unknown: Bool[Array, "*grid"],
) -> tuple[Array, Array]:
    """Return p and A of 1 - c → A l^-p, where χ_c = 1.

    Where q diverges, φ(x) = a± x with its slopes at infinity; ``near_zero``, where q goes to 0
    exponentially or stays as it is, with those at 0; where ``unknown``, NaN.
    """
    slow = jnp.abs(chi_c - 1) <= rounding(q.dtype)

    def of_sides(limit: Limit) -> Array:
        """4/b² of φ(x) = a± x, which is the same at every length."""
        power = jnp.where(limit.bent, limit.power, 1)
        b = math.sqrt(2) / (3 * math.pi) * (limit.above - limit.below) ** 2 / power
        return jnp.where(limit.bent, 4 / jnp.where(limit.bent, b, 1) ** 2, jnp.nan)

    def approach() -> tuple[Array, Array]:
        power, a = correlation_curvature(activation, q, sigma_w2)
        amplitude = (1 / (a * (power - 1))) ** (1 / (power - 1))
        far = of_sides(table.infinity)
        critical = jnp.abs(chi1 - 1) <= rounding(q.dtype)
        # Where q grows like l, biases take 1/l of δ away in each layer; the rest of φ may too.
        linear = jnp.where(activation.homogeneous, far / 4, jnp.nan)
        diverging = jnp.where(critical, linear, far)
        amplitude = jnp.select(
            [diverges, near_zero, unknown],
            [diverging, jnp.broadcast_to(of_sides(table.zero), q.shape), jnp.nan],
            amplitude,
        )
        usable = slow & jnp.isfinite(amplitude)
        exponent = jnp.where(usable, jnp.where(diverges | near_zero, 2, 1 / (power - 1)), jnp.nan)
        return exponent, jnp.where(usable, amplitude, jnp.nan)

    blank = jnp.full_like(q, jnp.nan)
    # Few points are critical, most often none.
    return jax.lax.cond(jnp.any(slow), approach, lambda: (blank, blank))
