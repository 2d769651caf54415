"""Singular values of the Jacobian of a deep network, as logarithms.

All of them, of a product P = A_L … A_1 of matrices that are at hand (`log_singular_values`). The
product is never formed: its SVD would lose every singular value below eps times the largest.
Instead, in two steps whose errors are relative to each singular value:

* One sweep of QR factorisations, A_l Q_{l-1} = Q_l R_l, leaves P = Q_L (R_L … R_1). The product of
  triangles is kept as rows of length 1 and the logarithms of their lengths: nothing that a row adds
  up is larger than its own scale, whatever the scales of the rows above it.
* One-sided Jacobi rotations make these rows orthogonal; their lengths are the singular values. A
  rotation of rows of lengths 1 and ρ needs ρ only in terms that stay finite as ρ -> 0, where it
  becomes a step of Gram-Schmidt. Its relative error does not depend on how the rows are scaled
  (Demmel & Veselić 1992, SIAM J. Matrix Anal. Appl. 13, 1204), only on how far from parallel they
  are, which after QR is of order 1.

Sweeps of rotations go on until the largest cosine between two rows is at rounding; both are
returned. Singular values that are 0 because units are dead (ReLU) are -inf, and counted. What
remains is eps times the largest condition number of a factor.

The first and last few, of networks too wide for that (`extreme_singular_values`), by Golub-Kahan
bidiagonalisation, which needs products with J and Jᵀ alone.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from gradflow._arguments import as_key, as_real, from_seed
from gradflow._checks import check_count, check_instance, check_number, is_traced
from gradflow._inputs import as_inputs
from gradflow._norms import unit_rows
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import _end_to_end, _lanczos, _memory
from gradflow.simulation._factors import checked_factors
from gradflow.simulation._lanczos import ExtremeSingularValues, bidiagonalise
from gradflow.simulation._linearisation import matrix_sampler
from gradflow.simulation.jacobians import Jacobian

__all__ = [
    "ExtremeSingularValues",
    "LogSingularValues",
    "bidiagonalise",
    "end_to_end",
    "extreme_singular_values",
    "log_singular_values",
    "lyapunov_exponents",
    "of_jacobian",
]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_MOST_SWEEPS = 40


class LogSingularValues(NamedTuple):
    """The singular values of a product of matrices, as natural logarithms."""

    log: Float[Array, " k"]  # descending; -inf for those that are 0
    zeros: Int[Array, ""]  # how many of them are 0, by the dead rows and columns of the factors
    sweeps: Int[Array, ""]  # of rotations, until they converged
    cosine: Float[Array, ""]  # the largest between two rows, when they ended

    def log_trace(self, power: int = 1) -> Float[Array, ""]:
        """Return log tr (J Jᵀ)^power; with power 1 it is log ‖J‖_F²."""
        return jax.nn.logsumexp(2 * check_count("power", power) * self.log, axis=-1)

    @property
    def log_condition_number(self) -> Float[Array, ""]:
        """Log of the largest over the smallest; inf if any is 0."""
        return self.log[..., 0] - self.log[..., -1]

    @property
    def log_effective_rank(self) -> Float[Array, ""]:
        """The entropy of the shares s_i / Σ s (Roy & Vetterli 2007): log k if all are equal."""
        share = jax.nn.log_softmax(self.log, axis=-1)
        return -jnp.sum(jnp.where(jnp.isneginf(share), 0, jnp.exp(share) * share), axis=-1)

    @property
    def log_stable_rank(self) -> Float[Array, ""]:
        """Log ‖J‖_F² / ‖J‖²: log k if all are equal, 0 if one is far above the others."""
        return self.log_trace() - 2 * self.log[..., 0]


class _Product(NamedTuple):
    """A product A_l … A_1 = Q exp(s) M so far: Q orthonormal, rows of M of length 1, by s."""

    basis: Float[Array, "n k"]  # Q
    rows: Float[Array, "k n_0"]  # M
    log_scale: Float[Array, " k"]  # s
    rank: Int[Array, ""]  # at most

    @classmethod
    def empty(cls, n: int, dtype: jnp.dtype) -> "_Product":
        """Return the product of no matrices, the identity.

        In a random basis: the QR factorisation of a matrix of rank r then has its rank in the first
        r rows, also where columns of the first factor are 0.
        """
        basis = jax.random.orthogonal(from_seed(0), n, dtype=dtype)
        return cls(basis, basis.T, jnp.zeros(n, dtype), jnp.asarray(n))

    def times(self, factor: Float[Array, "m n"]) -> tuple["_Product", Float[Array, " k"]]:
        """Return factor · self, and the logarithms of the diagonal of its triangle R."""
        rank = jnp.minimum(jnp.any(factor != 0, 0).sum(), jnp.any(factor != 0, 1).sum())
        basis, triangle = jnp.linalg.qr(_matmul(factor, self.basis))
        log_size = jnp.log(jnp.abs(triangle))
        # Each row by its largest term: whatever the scales, none is lost that matters to it.
        size = log_size + self.log_scale[None, :]
        largest = jnp.max(size, axis=1)
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        weights = jnp.sign(triangle) * jnp.exp(size - largest[:, None])
        rows, log_length = unit_rows(_matmul(weights, self.rows))
        rank = jnp.minimum(self.rank, rank)
        product = _Product(basis, rows, log_length + largest, rank)
        alive = jnp.arange(len(triangle)) < rank
        return product, jnp.where(alive, jnp.diagonal(log_size), -jnp.inf)

    def log_singular_values(self) -> LogSingularValues:
        """Return all singular values; more columns than rows add nothing."""
        k = self.rows.shape[0]
        alive = jnp.arange(k) < self.rank
        log_scale = jnp.where(alive, self.log_scale, -jnp.inf)
        rows = jnp.where(alive[:, None], self.rows, 0)
        log, sweeps, cosine = _orthogonalise(rows, log_scale)
        log = jnp.sort(log, descending=True)
        return LogSingularValues(log, jnp.isneginf(log).sum(), sweeps, cosine)


def log_singular_values(
    factors: Float[ArrayLike, "layers n n"] | Sequence[Float[ArrayLike, "..."]],
) -> LogSingularValues:
    """Return all singular values of A_L … A_1, of any size, without forming the product.

    jit it, vmap it over products. It computes in float64, also for float32 factors; only inside a
    program that is traced without x64 does it compute in float32, right to about 6e-8 times the
    largest condition number of a factor: 1e-3 for 200 Gaussian matrices of width 64.

    Parameters
    ----------
    factors
        A_1 first: shape (layers, n, n), or a sequence of matrices whose shapes fit, as
        `layer_jacobians` returns them.

    Returns
    -------
    LogSingularValues
        ``log`` has the shape (k,), k the smallest of all widths, and the factors' dtype.

    Raises
    ------
    InputError
        If there is no factor, or shapes do not fit.
    """
    runs = _runs(factors)
    values = _in_float64(_log_singular_values, runs)
    return values._replace(log=values.log.astype(runs[0].dtype))


def of_jacobian(jacobian: Jacobian) -> LogSingularValues:
    """Return all singular values of a Jacobian with few outputs, or few inputs.

    Its rows, or its columns if they are fewer, are made one by one, each beside the logarithm of
    its length, and turned orthogonal as above. The largest are right to rounding; those far below
    a direction that all rows have in common are lost in it. A pure function: jit it, vmap it.

    Parameters
    ----------
    jacobian
        Drawn ``matrix_free`` it needs places for as many cotangents as there are outputs, or for as
        many tangents as there are inputs, whichever are fewer.
    """
    check_instance("jacobian", jacobian, Jacobian, "a Jacobian, as jacobians.draw returns it")
    n_in, n_out = math.prod(jacobian.tangent_shape), math.prod(jacobian.cotangent_shape)
    basis = jnp.eye(min(n_in, n_out), dtype=jacobian.dtype)
    if n_out <= n_in:
        rows = jacobian.transpose_times(basis.reshape(-1, *jacobian.cotangent_shape))
    else:
        rows = jacobian.times(basis.reshape(-1, *jacobian.tangent_shape))
    log, sweeps, cosine = _orthogonalise(rows.direction.reshape(len(basis), -1), rows.log_norm)
    log = jnp.sort(log, descending=True)
    return LogSingularValues(log, jnp.isneginf(log).sum(), sweeps, cosine)


def end_to_end(
    network: Network, inputs: Float[Array, "sites n_0"], key: PRNGKeyArray | int
) -> Float[Array, " k"]:
    """Return log s of D^L W^L … D^1 W^1, of the network that `propagation.propagate` draws densely.

    For histograms of many networks: by one SVD of the product, in the inputs' dtype, a hundred
    times as fast as `log_singular_values`. Each s is right to within rounding of the largest.
    The number of those that are 0 is not taken from the SVD: it is that of the units without slope
    in the layer that has most, and all others are above 0, however small. A pure function: jit it,
    vmap it.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (1, n_0): one input.
    key
        The network's key.

    Returns
    -------
    array
        Shape (k,), k = min(n_0, n_L), descending; -inf for those that are 0, and NaN for all where
        the signal or the Jacobian is not finite.

    Raises
    ------
    InputError
        If there are several inputs.
    """
    jacobian = _end_to_end.end_to_end(network, inputs, key)
    finite = jnp.all(jnp.isfinite(jacobian.transposed))
    s = _singular_values()(jnp.where(finite, jacobian.transposed, 0))
    log = jnp.log(jnp.maximum(s, jnp.finfo(s.dtype).tiny)) + jacobian.log_scale
    log = jnp.where(jnp.arange(len(s)) < jacobian.alive, log, -jnp.inf)
    return jnp.where(finite, log, jnp.nan)


def _singular_values() -> Callable[[Array], Array]:
    """Return the function from a matrix to its singular values, descending."""

    def values(matrix: Array) -> Array:
        return jnp.linalg.svd(matrix, compute_uv=False)

    if jax.default_backend() == "cpu":
        # Under vmap one after another, for the reason that `ensembles` has.
        return jax.custom_batching.sequential_vmap(values)
    return values


def lyapunov_exponents(
    factors: Float[ArrayLike, "layers n n"] | Sequence[Float[ArrayLike, "..."]],
) -> Float[Array, "layers k"]:
    """Return the growth rates of volumes up to each layer, whose limit are Lyapunov exponents.

    Row l has (1/l) Σ log |R_ii| over the triangles R of A_1, …, A_l, natural logarithms a layer, in
    the order of the QR factorisation that they come from (Benettin et al. 1980). As l -> ∞ they are
    the limits of (1/l) log s_i, in descending order. jit it, vmap it; dtypes are as in
    `log_singular_values`.

    Parameters
    ----------
    factors
        A_1 first, as for `log_singular_values`.

    Raises
    ------
    InputError
        If there is no factor, or shapes do not fit.
    """
    runs = _runs(factors)
    return _in_float64(_lyapunov_exponents, runs).astype(runs[0].dtype)


def _runs(factors: Any) -> list[Array]:
    """Check the factors, and stack neighbours of one shape, (layers, rows, columns) each."""
    if hasattr(factors, "shape") and len(factors.shape) == 3 and len(factors):
        return [jnp.asarray(as_real("factors", factors))]
    each = checked_factors(factors)
    for factor in each:
        as_real("factors", factor)
    return [jnp.stack(list(run)) for _, run in itertools.groupby(each, lambda m: m.shape)]


def _in_float64(function: Callable, runs: list[Array]) -> Any:
    """Compute in float64, unless it is inside a program that is traced without x64."""
    if is_traced(runs[0]):
        return function(runs)
    with jax.enable_x64(True):
        return function(runs)


@jax.jit
def _log_singular_values(runs: list[Array]) -> LogSingularValues:
    return _multiply_out(runs)[0].log_singular_values()


@jax.jit
def _lyapunov_exponents(runs: list[Array]) -> Array:
    diagonals = _multiply_out(runs)[1]
    k = min(diagonal.shape[1] for diagonal in diagonals)
    logs = jnp.concatenate([diagonal[:, :k] for diagonal in diagonals])
    return jnp.cumsum(logs, axis=0) / jnp.arange(1, len(logs) + 1, dtype=logs.dtype)[:, None]


def _multiply_out(runs: list[Array]) -> tuple[_Product, list[Array]]:
    """Return the product, and for each run the logarithms of its triangles' diagonals."""
    wide = jnp.promote_types(runs[0].dtype, jnp.result_type(float))
    product, diagonals = _Product.empty(runs[0].shape[2], wide), []

    def multiply(product: _Product, factor: Array) -> tuple[_Product, Array]:
        return product.times(factor)

    for run in runs:
        factors = run.astype(wide)
        if run.shape[1] != run.shape[2]:  # the first may change the product's shape, no other does
            product, diagonal = multiply(product, factors[0])
            diagonals.append(diagonal[None])
            factors = factors[1:]
        if len(factors):
            product, diagonal = jax.lax.scan(multiply, product, factors)
            diagonals.append(diagonal)
    return product, diagonals


def _rounds(count: int) -> np.ndarray:
    """Return who meets whom in a round-robin tournament, (count - 1, 2, count/2), count even."""
    players = list(range(count))
    rounds = []
    for _ in range(count - 1):
        rounds.append([players[: count // 2], players[: count // 2 - 1 : -1]])
        players = [players[0], players[-1], *players[1:-1]]
    return np.array(rounds)


def _orthogonalise(rows: Array, log_scale: Array) -> tuple[Array, Array, Array]:
    """Turn rows of length exp(log_scale) orthogonal; return their logs, sweeps, and cosine."""
    k, dtype = rows.shape[0], rows.dtype
    if k == 1:
        return log_scale, jnp.asarray(0), jnp.zeros((), dtype)
    if k % 2:  # one more, of length 0
        rows = jnp.concatenate([rows, jnp.zeros_like(rows[:1])])
        log_scale = jnp.append(log_scale, -jnp.inf)
    rounds = jnp.asarray(_rounds(len(log_scale)))
    enough = 4 * float(jnp.finfo(dtype).eps) * rows.shape[1] ** 0.5

    def meet(state: tuple[Array, Array, Array], pair: Array) -> tuple[tuple, None]:
        rows, log_scale, worst = state
        first, second = pair[0], pair[1]
        swap = log_scale[second] > log_scale[first]
        i, j = jnp.where(swap, second, first), jnp.where(swap, first, second)
        a, b = rows[i], rows[j]
        dead = jnp.isneginf(log_scale[j])
        ratio = jnp.where(dead, 0, jnp.exp(jnp.where(dead, 0, log_scale[j] - log_scale[i])))
        cosine = jnp.sum(a * b, axis=1)
        difference = (1 - ratio) * (1 + ratio)
        below = difference + jnp.sqrt(difference**2 + 4 * (ratio * cosine) ** 2)
        # tan θ / ρ, of the angle by which to turn.
        turn = jnp.where(cosine == 0, 0, 2 * cosine / jnp.where(below == 0, 1, below))
        turn = jnp.where((below == 0) & (cosine != 0), jnp.sign(cosine), turn)
        cos = jax.lax.rsqrt(1 + (ratio * turn) ** 2)[:, None]
        a_new, log_a = unit_rows(cos * (a + (ratio**2 * turn)[:, None] * b))
        b_new, log_b = unit_rows(cos * (b - turn[:, None] * a))
        b_new = jnp.where(dead[:, None], 0, b_new)
        rows = rows.at[i].set(jnp.where(jnp.isneginf(log_a)[:, None], a, a_new)).at[j].set(b_new)
        log_scale = log_scale.at[i].add(jnp.where(jnp.isneginf(log_a), 0, log_a))
        log_scale = log_scale.at[j].add(jnp.where(dead, 0, log_b))
        return (rows, log_scale, jnp.maximum(worst, jnp.max(jnp.abs(cosine)))), None

    def sweep(state: tuple) -> tuple:
        rows, log_scale, _, count = state
        start = (rows, log_scale, jnp.zeros((), dtype))
        (rows, log_scale, worst), _ = jax.lax.scan(meet, start, rounds)
        return rows, log_scale, worst, count + 1

    def unfinished(state: tuple) -> Array:
        return (state[2] > enough) & (state[3] < _MOST_SWEEPS)

    start = (rows, log_scale, jnp.asarray(jnp.inf, dtype), jnp.asarray(0))
    _, log_scale, worst, sweeps = jax.lax.while_loop(unfinished, sweep, start)
    return log_scale[:k], sweeps, worst


def extreme_singular_values(
    network: Network,
    inputs: Float[Array, "sites n_0"],
    key: PRNGKeyArray | int,
    *,
    leading: int = 10,
    trailing: int = 0,
    sampler: str = "auto",
    below: int = 0,
    above: int | None = None,
    tolerance: float = 1e-3,
    most_steps: int = 512,
    memory_budget: int | None = None,
) -> ExtremeSingularValues:
    """Compute the first and last few singular values of one random network's Jacobian.

    By Golub-Kahan bidiagonalisation, without forming J; with ``matrix_free`` without any weights,
    in 4 n numbers a layer and step: ten of width 10⁵ and depth 20 take some gigabytes, where the
    weights would take 800. The smallest converge last, and those below rounding (of the inputs'
    dtype) of the largest never do: `log_singular_values` finds all of narrower networks.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (sites, n_0): where it is linearised, all inputs at once.
    key
        The network's key.
    leading, trailing
        The numbers of largest and of smallest singular values.
    sampler
        ``"dense"``, ``"matrix_free"``, or ``"auto"``: matrix_free where the law allows it.
    below, above
        The stretch of layers, as for `jacobians.draw`.
    tolerance
        The largest estimated error of a logarithm at which the steps end.
    most_steps
        The number of steps at which they end without that.
    memory_budget
        Bytes to stay within; without it, the device's free memory.

    Returns
    -------
    ExtremeSingularValues
        Natural logarithms, (leading,) and (trailing,), with their errors.

    Raises
    ------
    InputError
        If a number is out of range, the sampler cannot draw the weights, the inputs do not fit, or
        the memory does not hold what the first steps need.
    """
    leading, trailing = check_count("leading", leading, 0), check_count("trailing", trailing, 0)
    most_steps = check_count("most_steps", most_steps)
    check_number("tolerance", tolerance, positive=True)
    if memory_budget is not None:
        check_number("memory_budget", memory_budget, positive=True)
    if leading + trailing == 0:
        raise InputError("leading and trailing are 0; at least one is more")
    inputs, key = as_inputs(inputs, network), as_key(key)
    return _lanczos.extreme(
        network,
        inputs,
        key,
        _lanczos.Linearised(matrix_sampler(sampler, network).sampler, below, above, apart=False),
        _lanczos.Wanted(leading, trailing, tolerance),
        most_steps,
        _memory.available() if memory_budget is None else memory_budget,
    )
