"""A few singular values of a Jacobian that is only multiplied by: Golub-Kahan bidiagonalisation.

Lanczos' method for JᵀJ without forming it. From a random v_1,

    J v_k = α_k u_k + β_{k-1} u_{k-1},    Jᵀ u_k = α_k v_k + β_k v_{k+1},

every vector orthogonalised against all before. Either sampler multiplies by J.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gradflow._arguments import as_real
from gradflow._checks import check_count, check_instance
from gradflow._norms import unit_rows
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import jacobians
from gradflow.simulation._matrices import orthonormal_rows
from gradflow.simulation.jacobians import Jacobian

__all__ = ["Bidiagonal", "ExtremeSingularValues", "bidiagonalise", "extreme"]


class ExtremeSingularValues(NamedTuple):
    """The largest and smallest singular values of a Jacobian, as natural logarithms.

    Attributes
    ----------
    log_largest
        Shape (leading,), descending.
    log_smallest
        Shape (trailing,), ascending, of those that are not 0.
    error_largest, error_smallest
        Estimated errors of these logarithms: with θ the approximation and r its residual, the
        smaller of r/θ and, for one at a distance d from the next approximation, r²/(d θ).
    steps
        K, of the bidiagonalisation.
    converged
        Whether all errors are within the tolerance.
    sampler
        Which one was used.
    """

    log_largest: np.ndarray
    log_smallest: np.ndarray
    error_largest: np.ndarray
    error_smallest: np.ndarray
    steps: int
    converged: bool
    sampler: str


class Bidiagonal(NamedTuple):
    """A Jacobian after k steps of Golub-Kahan: J V = U B up to a rest, exp(log_unit) times.

    B is upper bidiagonal, (k, k + 1), with α_1 … α_k on its diagonal and β_1 … β_k beside it. A
    singular value of B with right vector q is one of J to within α_{k+1} |q_{k+1}|.
    """

    alpha: Float[Array, " places"]
    beta: Float[Array, " places"]
    log_unit: Float[Array, ""]  # natural logarithm of the unit of both; α_1 is 1 in it
    left: Float[Array, "places m"]  # rows u_1, …, u_{k+1}
    right: Float[Array, "places n"]  # rows v_1, …, v_{k+1}
    steps: Int[Array, ""]  # k; there are places for a limited number of them
    jacobian: Jacobian  # which remembers all products

    def with_places(self, more: int) -> "Bidiagonal":
        """Return the same k steps with places for ``more`` others."""
        alpha, beta = (jnp.pad(values, (0, more)) for values in (self.alpha, self.beta))
        left, right = (jnp.pad(rows, ((0, more), (0, 0))) for rows in (self.left, self.right))
        jacobian = self.jacobian.with_places(more)
        return Bidiagonal(alpha, beta, self.log_unit, left, right, self.steps, jacobian)


def bidiagonalise(jacobian: Jacobian, start: Float[Array, " n"], steps: int) -> Bidiagonal:
    """Bidiagonalise a Jacobian: ``steps`` products with J and Jᵀ each, beside a first with J.

    A pure function: jit it, vmap it over networks. With ``matrix_free`` the law of all that it
    returns is exact, because the matrices remember. Once all directions are used up, later values
    are 0.

    Parameters
    ----------
    jacobian
        With places for steps + 1 tangents and ``steps`` cotangents.
    start
        v_1, shape (sites · n_l,), of any length.
    steps
        At least 1.

    References
    ----------
    Golub & Kahan 1965, SIAM J. Numer. Anal. Ser. B 2, 205; every vector is orthogonalised against
    all before it.
    """
    check_instance("jacobian", jacobian, Jacobian, "a Jacobian, as jacobians.draw returns it")
    start, units = jnp.asarray(as_real("start", start)), math.prod(jacobian.tangent_shape)
    if start.shape != (units,):
        raise InputError(f"start has shape {start.shape}; it is ({units},) for this Jacobian")
    steps = check_count("steps", steps)
    return _advanced(_first_product(jacobian, start).with_places(steps), steps)


def _first_product(jacobian: Jacobian, start: Array) -> Bidiagonal:
    """Make the first product, J v_1 = α_1 u_1, with no places for more."""
    v = unit_rows(start[None].astype(jacobian.dtype))[0]
    first = jacobian.times(v.reshape(1, *jacobian.tangent_shape))
    some = jnp.isfinite(first.log_norm)
    return Bidiagonal(
        alpha=some.astype(v.dtype),
        beta=jnp.zeros(1, v.dtype),
        log_unit=jnp.where(some, first.log_norm, 0)[0],
        left=first.direction.reshape(1, -1),
        right=v,
        steps=jnp.asarray(0),
        jacobian=first.jacobian,
    )


def _advanced(state: Bidiagonal, steps: int) -> Bidiagonal:
    """Take ``steps`` more steps."""
    if state.jacobian.apart:
        for _ in range(steps):
            state = _step(state)
        return state
    return jax.lax.scan(lambda state, _: (_step(state), None), state, None, length=steps)[0]


def _step(state: Bidiagonal) -> Bidiagonal:
    k, jacobian = state.steps, state.jacobian
    back = jacobian.transpose_times(state.left[k].reshape(1, *jacobian.cotangent_shape))
    v, right, beta = _rest(back.direction, back.log_norm - state.log_unit, state.right, k + 1)
    forth = back.jacobian.times(v.reshape(1, *jacobian.tangent_shape))
    _, left, alpha = _rest(forth.direction, forth.log_norm - state.log_unit, state.left, k + 1)
    return Bidiagonal(
        alpha=state.alpha.at[k + 1].set(alpha),
        beta=state.beta.at[k].set(beta),
        log_unit=state.log_unit,
        left=left,
        right=right,
        steps=k + 1,
        jacobian=forth.jacobian,
    )


@functools.partial(jax.jit, donate_argnames="known")
def _rest(
    direction: Array, log_length: Array, known: Array, index: Array
) -> tuple[Array, Array, Array]:
    """Orthogonalise a vector against known rows, and make it row ``index`` of them, at length 1.

    Returns that row, all rows, and the length that it had.
    """
    row = jnp.exp(log_length)[:, None] * direction.reshape(1, -1)
    unit = orthonormal_rows(row, known)
    length = jnp.sum(unit * row)
    return unit, jax.lax.dynamic_update_slice_in_dim(known, unit, index, 0), length


# Steps from one estimate of the errors to the next, and places for steps: as many more each time,
# or half as many as there are. Empty places take as much time as used ones, and more places new
# programs.
_STEPS_AT_ONCE = 8
_MORE_PLACES = 32
# Bytes of one layer's products, beyond which copying them costs more than a program for each layer.
_WORTH_HOLDING_APART = 1 << 22


class Linearised(NamedTuple):
    """Which layers of which network are linearised, and how their matrices are held."""

    sampler: str
    below: int
    above: int | None
    apart: bool  # as for `jacobians.draw`


class Wanted(NamedTuple):
    """How many of the largest and smallest, and the error at which they have converged."""

    leading: int
    trailing: int
    tolerance: float


def extreme(
    network: Network,
    inputs: Float[Array, "sites n_0"],
    key: Array,
    layers: Linearised,
    wanted: Wanted,
    most_steps: int,
    memory: int,
) -> ExtremeSingularValues:
    """Take steps until the wanted values converge, ``most_steps`` are taken or memory is used up.

    Raises
    ------
    InputError
        If ``memory``, in bytes, does not hold what the first steps need.
    """
    numbers = network.as_arrays(inputs.dtype)
    places = min(most_steps, max(_MORE_PLACES, 2 * (wanted.leading + wanted.trailing)))
    needed = _bytes(network, inputs, layers.sampler, places)
    if needed > memory:
        raise InputError(
            f"{places} steps with sampler {layers.sampler!r} need {needed / 2**30:.3g} GiB and "
            f"{memory / 2**30:.3g} GiB are free; use a smaller width or depth, or fewer most_steps"
        )
    widest = max(network.widths)
    dense = layers.sampler == "dense"
    layer_numbers = widest**2 if dense else 4 * places * inputs.shape[0] * widest
    layers = layers._replace(apart=layer_numbers * inputs.dtype.itemsize > _WORTH_HOLDING_APART)
    start, with_places, advance = (
        (_start, Bidiagonal.with_places, _advanced) if layers.apart else _COMPILED
    )
    state = start(numbers, inputs, key, layers, places)
    state, steps = advance(state, min(_STEPS_AT_ONCE, places)), min(_STEPS_AT_ONCE, places)
    values = _extremes(state, wanted, layers.sampler)
    while not values.converged and values.steps == steps:
        if steps == places:
            more = min(max(_MORE_PLACES, places // 2), most_steps - steps)
            if not more or _bytes(network, inputs, layers.sampler, places + more) > memory:
                break
            state, places = with_places(state, more), places + more
        more = min(_STEPS_AT_ONCE, places - steps)
        state, steps = advance(state, more), steps + more
        values = _extremes(state, wanted, layers.sampler)
    return values


def _bytes(network: Network, inputs: Array, sampler: str, places: int) -> int:
    """Return a bound on the memory for this many steps, while more places are made."""
    weights = sum(n * m for n, m in itertools.pairwise(network.widths))
    products = 4 * (places + 1) * inputs.shape[0] * sum(network.widths)
    return 2 * inputs.dtype.itemsize * (weights if sampler == "dense" else products)


def _start(
    network: Network, inputs: Array, key: Array, layers: Linearised, places: int
) -> Bidiagonal:
    jacobian = jacobians.draw(network, inputs, key, cotangents=0, **layers._asdict())
    # The first of the network's keys is of the gradient that starts at the top, not needed here.
    start_key = jax.random.split(key, network.depth + 1)[0]
    start = jax.random.normal(start_key, (math.prod(jacobian.tangent_shape),), inputs.dtype)
    return _first_product(jacobian, start).with_places(places)


# As whole programs; layers that are held apart have one each.
_COMPILED = (
    jax.jit(_start, static_argnums=(3, 4)),
    jax.jit(Bidiagonal.with_places, static_argnums=1),
    jax.jit(_advanced, static_argnums=1, donate_argnums=0),
)


def _extremes(state: Bidiagonal, wanted: Wanted, sampler: str) -> ExtremeSingularValues:
    """Compute the singular values of B with their errors, on the host and in float64."""
    leading, trailing, tolerance = wanted
    alpha, beta = np.asarray(state.alpha, np.float64), np.asarray(state.beta, np.float64)
    made, log_unit = int(state.steps), float(state.log_unit)
    steps = int(np.count_nonzero(alpha[:made]))  # fewer where directions were used up
    rounding = float(jnp.finfo(state.left.dtype).eps)
    b = np.zeros((steps, steps + 1))
    b[np.arange(steps), np.arange(steps)] = alpha[:steps]
    b[np.arange(steps), np.arange(steps) + 1] = beta[:steps]
    _, theta, q = np.linalg.svd(b) if steps else (None, np.zeros(0), np.zeros((1, 1)))
    residual = alpha[steps] * np.abs(q[:steps, -1])
    distance = np.full(steps, np.inf)
    if steps > 1:
        gaps = -np.diff(theta)
        distance[:-1] = gaps
        distance[1:] = np.minimum(distance[1:], gaps)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.minimum(residual, residual**2 / distance)
        relative = (np.nan_to_num(error, nan=np.inf) + rounding * theta.max(initial=0)) / theta
        log = np.log(theta) + log_unit
    last = slice(None, -trailing - 1, -1) if trailing else slice(0, 0)
    chosen = np.concatenate([relative[:leading], relative[last]])
    enough = steps >= leading + trailing or steps < made
    return ExtremeSingularValues(
        log_largest=log[:leading],
        log_smallest=log[last],
        error_largest=relative[:leading],
        error_smallest=relative[last],
        steps=steps,
        converged=bool(enough and np.all(chosen <= tolerance)),
        sampler=sampler,
    )
