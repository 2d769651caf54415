"""Averages of the largest of several jointly Gaussian signals, as max pooling takes.

Of windows A and B, with M_A = max over A of φ(z_i), and tangents of second moments S that are
independent of z, the wanted averages are

    E[M_A M_B],  E[M_A]  and  T[S]_AB = Σ_{i∈A, j∈B} E[1(i is A's largest) φ'(z_i)
                                                       1(j is B's largest) φ'(z_j)] S_ij.

*Two members, no φ*: max(x, y) = u + |v| with u = (x + y)/2 and v = (x - y)/2. Products of u and |v|
have mean 0, so that E[M M'] = E[u u'] + E[|v| |v'|] (Clark 1961, Oper. Res. 9, 145, of one window).

*More members, or a φ*: averages over quasi-random points of the members of each pair of windows,
antithetic, with their second moments made exactly those of z: what is linear in signals, or a
product of two such, has no error, and the rest one of about 3e-4 of the variance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow import activations, gaussian
from gradflow.activations import Activation
from gradflow.errors import NoTheory
from gradflow.gaussian._points import normal_points
from gradflow.gaussian._quadrature import dot

__all__ = ["averages"]

# Antithetic pairs of points for each pair of windows; pairs that are averaged side by side.
_POINTS, _TOGETHER = 1 << 14, 4
# Pairs of windows times the squares of their members, at most.
_MOST = 1 << 22

_absolute = activations.leaky_relu(-1.0)

Square = Float[Array, "sites sites"]


def averages(
    activation: Activation, covariance: Square, tangent: Square | None, members: np.ndarray
) -> tuple[Float[Array, "windows windows"], Float[Array, " windows"], Array | None]:
    """E[M_A M_B], E[M_A] and T[S]; see the module.

    Parameters
    ----------
    activation
        φ.
    covariance
        Of z, of mean 0.
    tangent
        S; without it T[S] is None.
    members
        Shape (windows, members): the sites in each window, and -1 where there is none.

    Raises
    ------
    NoTheory
        If there are too many to average over.
    """
    first = members.max(axis=1, keepdims=True)
    there = members >= 0
    members = np.where(there, members, first)
    if members.shape[1] == 2 and activation == activations.linear:
        return _of_pairs(covariance, tangent, members)
    windows, size = members.shape
    if windows * (windows + 1) // 2 * (2 * size) ** 2 > _MOST:
        raise NoTheory(
            f"max pooling is over {windows} windows of {size} signals; the theory averages over "
            "all pairs of fewer, or of smaller ones"
        )
    return _over_points(activation, covariance, tangent, (members, there))


def _of_pairs(covariance: Square, tangent: Square | None, members: np.ndarray) -> tuple:
    one, other = members.T

    def halves(k: Square) -> tuple[Array, Array]:
        a, b = k[np.ix_(one, one)], k[np.ix_(other, other)]
        c, d = k[np.ix_(one, other)], k[np.ix_(other, one)]
        return (a + b + c + d) / 4, (a + b - c - d) / 4

    u, v = halves(covariance)
    # Of members that are one and the same nothing is left.
    same = jnp.diagonal(v) <= 0
    apart = jnp.where(jnp.diag(same), 1.0, jnp.where(same[:, None] | same[None], 0.0, v))
    none = same[:, None] | same[None]
    second = u + jnp.where(none, 0, gaussian.kernel(_absolute, apart))
    mean = jnp.where(same, 0, gaussian.moment(_absolute, "phi", jnp.diagonal(apart)))
    if tangent is None:
        return second, mean, None
    of_u, of_v = halves(tangent)
    signs = jnp.where(none, 0, gaussian.derivative_kernel(_absolute, apart))
    return second, mean, of_u + signs * of_v


def _over_points(
    activation: Activation,
    covariance: Square,
    tangent: Square | None,
    windows: tuple[np.ndarray, np.ndarray],
) -> tuple:
    """The averages for windows of these members, and which of them are there."""
    members, there = windows
    size, dtype = members.shape[1], covariance.dtype
    points = jnp.asarray(_matched_points(2 * size), dtype)
    one, other = np.triu_indices(len(members))
    both, inside = (np.concatenate([x[one], x[other]], axis=1) for x in windows)
    # A site that both windows have is one variable.
    source = np.argmax(both[:, :, None] == both[:, None, :], axis=2)

    def over_pair(pair: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        at, inside, source = pair
        k = covariance[at][:, at]
        scale = jnp.trace(k)
        small = 2 * jnp.finfo(dtype).eps * jnp.where(scale > 0, scale, 1)
        factor = jnp.linalg.cholesky(k + small * jnp.eye(2 * size, dtype=dtype))
        half = dot(points, factor[source].T)
        x = jnp.concatenate([half, -half])
        h = jnp.where(inside, activation(x), -jnp.inf).reshape(len(x), 2, size)
        largest = jnp.max(h, axis=-1)
        chosen = jax.nn.one_hot(jnp.argmax(h, axis=-1), size, dtype=dtype)
        slopes = chosen * activation.derivative(x).reshape(h.shape)
        shares = dot(slopes[:, 0].T, slopes[:, 1]) / len(x)
        return jnp.mean(largest[:, 0] * largest[:, 1]), jnp.mean(largest[:, 0]), shares

    numbers = (jnp.asarray(both), jnp.asarray(inside), jnp.asarray(source))
    products, means, shares = jax.lax.map(over_pair, numbers, batch_size=_TOGETHER)

    def matrix(of_pairs: Array) -> Array:
        empty = jnp.zeros((len(members),) * 2, dtype)
        return empty.at[one, other].set(of_pairs).at[other, one].set(of_pairs)

    moved = None
    if tangent is not None:
        each = tangent[members[one][:, :, None], members[other][:, None, :]]
        moved = matrix(jnp.sum(shares * each, axis=(1, 2)))
    return matrix(products), jnp.zeros(len(members), dtype).at[one].set(means), moved


@functools.cache
def _matched_points(dimensions: int) -> np.ndarray:
    """Normal numbers, (points, dimensions), that with their negatives have second moments I."""
    z = normal_points(dimensions, 0, _POINTS)[:_POINTS]
    own = np.linalg.cholesky(z.T @ z / _POINTS)
    return np.linalg.solve(own, z.T).T
