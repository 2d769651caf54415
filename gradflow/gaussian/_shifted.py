"""Averages over signals about means of their own: z = s + u, u ~ N(0, k), s one of some values.

A unit's s is common to all sites but for its size, s_a at site a: a constant bias; a bias of a law
that is not Gaussian, one of the values of a quadrature rule; or the mean of weights times that of
the signals below. Given s, a layer's pre-activations are those of independent Gaussian weights and
biases (Poole et al. 2016, arXiv:1606.05340, eqs. 3 and 5, with an integral over s outside).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from gradflow import activations
from gradflow.activations import ActivationLike
from gradflow.errors import InputError
from gradflow.gaussian._pairs import DERIVATIVES, integrate_pair
from gradflow.gaussian._quadrature import shifted_expectation, smallest_variance

__all__ = ["shifted_kernel", "shifted_moment", "shifted_saturation"]

_INTEGRANDS = {
    "phi": lambda a, x: a(x),
    "phi2": lambda a, x: a(x) ** 2,
    "dphi": lambda a, x: a.derivative(x),
    "dphi2": lambda a, x: a.derivative(x) ** 2,
    # About φ(0), so that no large constant is squared and subtracted.
    "apart": lambda a, x: a(x) - a(jnp.zeros_like(x)),
    "apart2": lambda a, x: (a(x) - a(jnp.zeros_like(x))) ** 2,
}


def shifted_moment(
    activation: ActivationLike,
    name: str,
    shifts: Float[Array, "*sites values"],
    chances: Float[Array, "*sites values"],
    variance: Float[Array, "*sites"],
) -> Float[Array, "*sites"]:
    """E[φ], E[φ²], E[φ'], E[φ'²] or the variance of φ(s + u), u ~ N(0, variance).

    Parameters
    ----------
    activation
        φ.
    name
        ``"phi"``, ``"phi2"``, ``"dphi"``, ``"dphi2"`` or ``"variance"``.
    shifts, chances
        The values of s, and their probabilities.
    variance
        Of u, >= 0.

    Raises
    ------
    InputError
        If there is no such activation.
    """
    activation = activations.get(activation)
    if name == "variance":
        mean, square = (
            shifted_moment(activation, n, shifts, chances, variance) for n in ("apart", "apart2")
        )
        return square - mean**2
    deviation = jnp.sqrt(jnp.maximum(variance, smallest_variance(variance)))

    def one(shift: Array, deviation: Array) -> Array:
        return shifted_expectation(
            functools.partial(_INTEGRANDS[name], activation),
            shift,
            deviation,
            kinks=activation.kinks,
        )

    flat = jax.vmap(one)(
        shifts.reshape(-1), jnp.broadcast_to(deviation[..., None], shifts.shape).reshape(-1)
    )
    return jnp.sum(chances * flat.reshape(shifts.shape), axis=-1)


def shifted_saturation(
    activation: ActivationLike,
    threshold: float,
    shifts: Float[Array, "*sites values"],
    chances: Float[Array, "*sites values"],
    variance: Float[Array, "*sites"],
) -> Float[Array, "*sites"]:
    """P(|φ'(s + u)| < threshold · max|φ'|), as `saturation` for s = 0.

    Parameters
    ----------
    activation, shifts, chances, variance
        As for `shifted_moment`.
    threshold
        A fraction of the largest slope, in (0, 1].

    Raises
    ------
    InputError
        If there is no such activation, or the threshold is not in (0, 1].
    """
    activation = activations.get(activation)
    intervals = activation.saturated_intervals(threshold)
    deviation = jnp.sqrt(jnp.maximum(variance, smallest_variance(variance)))[..., None]
    total = jnp.zeros_like(shifts)
    for low, high in intervals:
        # On the side where both are tails, so that a difference keeps its digits.
        a, b = ((jnp.asarray(end, shifts.dtype) - shifts) / deviation for end in (low, high))
        total += jnp.where(a > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a))
    return jnp.sum(chances * total, axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def shifted_kernel(
    activation: ActivationLike,
    order: int,
    shifts: Float[Array, "sites values"],
    chances: Float[Array, "sites values"],
    k: Float[Array, "sites sites"],
) -> Float[Array, "sites sites"]:
    """E[φ(s_a + u_a) φ(s_b + u_b)], u ~ N(0, k), for order 0; of φ' for order 1.

    Parameters
    ----------
    activation, shifts, chances
        As for `shifted_moment`; a value has one probability at all sites, of which that of the
        first site of a pair is read.
    order
        0 or 1.
    k
        The covariance of u over sites.

    Raises
    ------
    InputError
        If there is no such activation; when differentiated.
    """
    activation = activations.get(activation)
    q = jnp.diagonal(k)
    name = ("phi2", "dphi2")[order]
    diagonal = shifted_moment(activation, name, shifts, chances, q)
    a, b = np.triu_indices(len(q), 1)
    if not a.size:
        return jnp.diag(diagonal)
    f = functools.partial(DERIVATIVES[order], activation)

    def one(pair: tuple[Array, ...]) -> Array:
        q_u, q_v, k_uv, mean_u, mean_v = pair
        each = lambda x: f(x)[None]  # noqa: E731
        return integrate_pair(each, q_u, q_v, k_uv, activation.kinks, (mean_u, mean_v))[0, 0]

    values = shifts.shape[1]
    of_pairs = [jnp.repeat(x, values) for x in (q[a], q[b], k[a, b])]
    means = [shifts[side].reshape(-1) for side in (a, b)]
    each = jax.lax.map(one, (*of_pairs, *means)).reshape(-1, values)
    pairs = jnp.sum(chances[a] * each, axis=1)
    alike = (q[a] == q[b]) & (k[a, b] == q[a]) & jnp.all(shifts[a] == shifts[b], axis=1)
    pairs = jnp.where(alike, diagonal[a], pairs)
    return jnp.diag(diagonal).at[a, b].set(pairs).at[b, a].set(pairs)


@shifted_kernel.defjvp
def _shifted_kernel_jvp(activation, *_):  # type: ignore[no-untyped-def]
    raise InputError(
        f"a kernel of {activation.name} about means that are not 0 is differentiated; the theory "
        "of biases and weights with a mean has no derivatives in its scales"
    )
