"""The law of the squared singular values λ of a deep Jacobian as one equation, by free probability.

J = D^L W^L … D^1 W^1, with D^l = diag φ'(z^l). At infinite width the matrices are free of each
other, and the law of the eigenvalues λ = s² of J Jᵀ follows from that of one layer's φ'(z)²,
z ~ N(0, q) (Pennington, Schoenholz & Ganguli 2017, arXiv:1711.04735; 2018, arXiv:1802.09979). With

    ψ(u) = E[u d/(1 - u d)],   d = φ'(z)²,

of one layer, and γ = 1 for Gaussian, 0 for Haar-orthogonal weights, z = ψ(u) and

    1/λ = (u/σ_w²)^L ((1 + z)/z)^(L-1) (1 + z)^(-γL)                                          (*)

give z = λ G(λ) - 1, G the Stieltjes transform of the law of λ, whose density is -Im z/(π λ). In
logarithms, no product of L factors is formed.

The law of d is a set of atoms where φ is straight (ReLU: 0 and 1), and quadrature nodes elsewhere.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow._checks import check_count, check_instance, check_scale, unknown_name
from gradflow.errors import InputError

__all__ = ["WEIGHTS", "Layers", "SlopeLaw", "as_layers", "check", "on_negative_axis"]

WEIGHTS = ("gaussian", "orthogonal")


class SlopeLaw(eqx.Module):
    """The law of d = φ'(z)², z ~ N(0, q): weighted points.

    Attributes
    ----------
    values, weights
        Shape (points,); the weights add up to 1.
    atoms
        The number of atoms, which come first; the other points are nodes of a continuous part.
    """

    values: Float[Array, " points"]
    weights: Float[Array, " points"]
    atoms: int = eqx.field(static=True)


class Layers(eqx.Module):
    """L layers of one slope law: all of (*) but λ."""

    law: SlopeLaw
    log_sigma_w2: Float[Array, ""]
    depth: int = eqx.field(static=True)
    gaussian: int = eqx.field(static=True)  # γ

    def log_of_one_over(self, log_u: Array, log_z: Array, log_1z: Array) -> Array:
        """Return the logarithm of the right side of (*), from those of u, z and 1 + z."""
        each = log_u - self.log_sigma_w2
        return self.depth * (each - self.gaussian * log_1z) + (self.depth - 1) * (log_1z - log_z)

    def slope(self, z: Array, one_z: Array, dz: Array) -> Array:
        """Return the derivative of `log_of_one_over` by log u, from dz = dz/dlog u."""
        each = 1 - self.gaussian * dz / one_z
        return self.depth * each + (self.depth - 1) * dz * (1 / one_z - 1 / z)

    def psi(self, u: Array) -> tuple[Array, Array, Array]:
        """Return z = ψ(u), 1 + z without cancellation, and dz/dlog u, each of u's shape."""

        def terms(value: Array, weight: Array) -> tuple[Array, Array, Array]:
            scaled = u * value
            pole = 1 / (1 - scaled)
            part = weight * pole
            return scaled * part, part, scaled * part * pole

        nodes = self.law.values, self.law.weights
        if jax.default_backend() != "cpu":
            z, one_z, dz = (jnp.sum(t) for t in terms(*nodes))
            return z, one_z, dz

        # A loop over nodes, and all points at once, so that a CPU's vector units work on points.
        def add(sums: tuple[Array, ...], node: tuple[Array, Array]) -> tuple[tuple, None]:
            return tuple(s + t for s, t in zip(sums, terms(*node), strict=True)), None

        (z, one_z, dz), _ = jax.lax.scan(add, (jnp.zeros_like(u),) * 3, nodes, unroll=4)
        return z, one_z, dz


def check(sigma_w2: ArrayLike, depth: int, weights: str) -> None:
    """Raise `InputError` if σ_w², the depth or the kind of weights is out of range."""
    check_scale("sigma_w2", sigma_w2)
    if not isinstance(sigma_w2, jax.core.Tracer) and not np.all(np.asarray(sigma_w2) > 0):
        raise InputError(f"sigma_w2 is {sigma_w2!r}; it is a finite number above 0")
    check_count("depth", depth)
    if weights not in WEIGHTS:
        raise unknown_name("weights", weights, WEIGHTS)


def as_layers(law: SlopeLaw, sigma_w2: ArrayLike, depth: int, weights: str) -> Layers:
    """Check the arguments of a spectrum and put them together."""
    check_instance("law", law, SlopeLaw, "what slope_law returns")
    check(sigma_w2, depth, weights)
    log = jnp.log(jnp.asarray(sigma_w2, law.values.dtype))
    return Layers(law, log, depth, int(weights == "gaussian"))


def on_negative_axis(layers: Layers, log_s: Array) -> tuple[Array, Array, Array]:
    """Return log t, its slope by log s, and -z in (0, 1), where λ = -t and u = -s are negative."""
    z, one_z, dz = layers.psi(-jnp.exp(log_s))
    log_t = -layers.log_of_one_over(log_s, jnp.log(-z), jnp.log(one_z))
    return log_t, -layers.slope(z, one_z, dz), -z
