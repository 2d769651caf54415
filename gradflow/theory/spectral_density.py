"""The density of the singular values of a wide network's end-to-end Jacobian.

The equation (*) of `_jacobian_law` is solved by continuation: on the negative real axis u is real
and unique. From there λ = |λ| e^{iθ} is turned, θ from π to 0, with Newton's method at each step: u
stays in the lower half-plane, where all logarithms are principal, and no step can end on another
sheet.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow._checks import check_scale
from gradflow._programs import program
from gradflow.errors import InputError
from gradflow.theory._jacobian_law import Layers, SlopeLaw, as_layers, on_negative_axis

__all__ = ["Density", "density"]


class Density(NamedTuple):
    """The density of the continuous part of the law, at given λ; `spectrum.support` has the atoms.

    Attributes
    ----------
    of_eigenvalues
        ρ(λ), of the squared singular values.
    of_singular_values
        ρ(s) = 2 s ρ(λ), at s = √λ.
    error
        Estimated relative error of either: the residual of (*) times the response of z.

    All are NaN where (*) was not solved: for orthogonal networks whose φ' goes to 0, far down the
    lower tail (λ below 1e-10 of the largest), the nodes of the slope law are too far apart.
    """

    of_eigenvalues: Float[Array, "*points"]
    of_singular_values: Float[Array, "*points"]
    error: Float[Array, "*points"]


def density(
    law: SlopeLaw,
    sigma_w2: ArrayLike,
    depth: int,
    weights: str = "gaussian",
    *,
    at: Float[ArrayLike, "*points"],
) -> Density:
    """Return the density of the squared singular values λ, and of the singular values, at λ.

    Parameters
    ----------
    law, sigma_w2, depth, weights
        As for `spectrum.mean_and_variance`.
    at
        Values λ > 0, of any shape; λ = s² for a singular value s.

    Returns
    -------
    Density
        Each field of the shape of ``at``.

    Raises
    ------
    InputError
        If an argument is out of range; for one layer with orthogonal weights, which has the law of
        σ_w² φ'² itself and needs no solving.
    """
    layers = as_layers(law, sigma_w2, depth, weights)
    check_scale("at", at)
    if layers.depth == 1 and not layers.gaussian:
        raise InputError(
            "depth is 1 and weights are orthogonal: λ is σ_w² φ'(z)² then, whose law is "
            "slope_law's; ask for a depth of at least 2 or for gaussian weights"
        )
    at = jnp.asarray(at, law.values.dtype)
    rho, error = _density(layers, at)
    return Density(rho, 2 * jnp.sqrt(at) * rho, error)


_STEPS = 16  # of θ, from π to 0
_CORRECTIONS = 3  # iterations of Newton's method at each θ
_FINAL = 30  # the most iterations at θ = 0
_SOLVED = 1e-6  # the largest residual of a solution


@program(seconds=1.0)
def _density(layers: Layers, at: Array) -> tuple[Array, Array]:
    """Return ρ(λ) and its estimated relative error at λ > 0, of any shape."""
    dtype = layers.law.values.dtype
    # Finer towards θ = 0, where the edges of the support are near.
    angles = math.pi * np.linspace(1, 0, _STEPS + 1) ** 1.5

    def improve(v: Array, log_lambda: Array) -> tuple[Array, Array, Array]:
        """Newton's method, v = log u in the lower half-plane: v, the last change, d log λ/dv."""
        z, one_z, dz = layers.psi(jnp.exp(v))
        slope = layers.slope(z, one_z, dz)
        value = layers.log_of_one_over(v, jnp.log(z), jnp.log(one_z)) + log_lambda
        new = v - value / slope
        return jax.lax.complex(new.real, jnp.clip(new.imag, -math.pi, 0.0)), value / slope, slope

    on_the_axis = _on_the_negative_axis(layers, jnp.log(at.reshape(-1)))

    def one(log_size: Array, log_s: Array) -> tuple[Array, Array]:
        v = jax.lax.complex(log_s, jnp.asarray(-math.pi, dtype))
        slope = improve(v, jax.lax.complex(log_size, jnp.asarray(math.pi, dtype)))[2]

        def turn(state: tuple[Array, Array], angles: Array) -> tuple[tuple[Array, Array], None]:
            v, slope = state
            before, angle = angles
            v = v - 1j * (angle - before) / slope
            for _ in range(_CORRECTIONS):
                v, _, slope = improve(v, jax.lax.complex(log_size, angle))
            return (v, slope), None

        pairs = jnp.asarray(np.stack([angles[:-1], angles[1:]], axis=1), dtype)
        (v, _), _ = jax.lax.scan(turn, (v, slope), pairs)

        def busy(state: tuple[Array, Array, Array]) -> Array:
            _, change, count = state
            return (change > 4 * jnp.finfo(dtype).eps) & (count < _FINAL)

        def correct(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            v, _, count = state
            new = improve(v, log_size + 0j)[0]
            return new, jnp.abs(new - v), count + 1

        start = (v, jnp.ones((), dtype), jnp.zeros((), int))
        v, change, _ = jax.lax.while_loop(busy, correct, start)
        residual = jnp.abs(improve(v, log_size + 0j)[1]) + change
        z, _, dz = layers.psi(jnp.exp(v))
        height = jnp.maximum(-z.imag, 0)
        solved = residual < _SOLVED
        error = jnp.where(height > 0, jnp.abs(dz) * residual / jnp.where(height > 0, height, 1), 0)
        rho = jnp.where(solved, height / (math.pi * jnp.exp(log_size)), jnp.nan)
        return rho, jnp.where(solved, error, jnp.nan)

    rho, error = jax.vmap(one)(jnp.log(at.reshape(-1)), on_the_axis)
    return rho.reshape(at.shape), error.reshape(at.shape)


def _on_the_negative_axis(layers: Layers, log_t: Float[Array, " points"]) -> Array:
    """Return log s at log t on the negative axis, to some hundredths; it decreases with t."""
    furthest = math.log(jnp.finfo(log_t.dtype).max) / 2.5
    log_s = jnp.linspace(-furthest, furthest, math.ceil(8 * furthest), dtype=log_t.dtype)
    tabulated = jax.vmap(lambda x: on_negative_axis(layers, x)[0])(log_s)
    return jnp.interp(-log_t, -tabulated, log_s)
