"""Shared weights: gated steps that all have one set of weights, at infinite width.

A unit of a GRU or LSTM adds up what drives it, and what drives it is correlated over the steps, so
that no law of a single step closes. The law of a unit over *all* steps does. At infinite width what
a random matrix gives to different units is independent, and to one unit a Gaussian process over the
steps, W x_t with covariance σ_w² E[x_s x_t]; biases are constant in time. Going down, Wᵀ a_t is
another one, of covariance σ_w² E[a_s a_t], independent of the first. So units are drawn one by
one, each with its series, and averages over them give the next step's covariance: a network of so
many units without any weights, and without the effects of its width (dynamic mean-field theory).

Averages are over a finite number of units, and have a standard error beside them. Networks of n
units differ by a share of about steps²/n, and their typical gradient is below the mean square: by
0.2 to 0.5 in log ‖δ‖ for PyTorch's LSTM of 128 units after 50 steps.

References: Sompolinsky & Zippelius 1982, Phys. Rev. B 25, 6860 (the method); Yang 2020,
arXiv:2006.14548 (Wᵀ as good as independent of W); Gilboa et al. 2019, arXiv:1901.08987 (gated units
with weights drawn anew, which this replaces).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from gradflow._checks import check_count, check_scale
from gradflow.blocks import GRU, LSTM, AbstractBlock
from gradflow.errors import InputError

__all__ = ["Steps", "predict_steps"]


class Steps(NamedTuple):
    """Second moments after each number of steps, 0 … T: natural logarithms, (T + 1,), and errors.

    ``log_q`` is of the second moment of the state, ``log_gradient_variance`` of that of the
    gradient by it, relative to the last state's.
    """

    log_q: np.ndarray
    log_gradient_variance: np.ndarray
    log_q_standard_error: np.ndarray
    log_gradient_variance_standard_error: np.ndarray


def predict_steps(
    block: AbstractBlock, steps: int, q: float = 0.0, *, units: int = 4000, draws: int = 8
) -> Steps:
    """The second moments of states and gradients over time, of one input.

    Parameters
    ----------
    block
        The `GRU` or `LSTM` that is applied again and again; its own number of units does not count.
    steps
        T, how often.
    q
        The second moment of the state before the first step, Gaussian.
    units, draws
        How many units are drawn, and how often, for the standard error.

    Raises
    ------
    InputError
        If the block is of another kind, its weights' rows sum to 0, or a number is out of range.

    Returns
    -------
    Steps
        Each array of shape (steps + 1,).
    """
    if not isinstance(block, GRU | LSTM):
        raise InputError(f"block is a {type(block).__name__}; it is a GRU or an LSTM")
    if block.distribution.centred or block.distribution.structured:
        raise InputError(
            f"distribution is {block.distribution.name!r}; here weights are independent"
        )
    check_scale("q", q)
    for name, count in (("steps", steps), ("units", units)):
        check_count(name, count)
    if check_count("draws", draws) < 2:
        raise InputError(f"draws is {draws}; a standard error needs at least 2")
    with jax.enable_x64(True):
        block = dataclasses.replace(block, units=units)
        keys = jax.random.split(jax.random.key(0), draws)
        populations = jax.jit(
            lambda keys: jax.lax.map(
                lambda key: _population(block, steps, q, block.width_in, key), keys
            )
        )(keys)
        moments = [np.asarray(population) for population in populations]
    means = [moment.mean(axis=0) for moment in moments]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = [
            moment.std(axis=0, ddof=1) / draws**0.5 / mean
            for moment, mean in zip(moments, means, strict=True)
        ]
        return Steps(*(np.log(m) for m in means), *errors)


class _Process(NamedTuple):
    """The products of a random matrix with vectors, over time: a Gaussian process for each unit.

    ``given`` are the vectors so far and ``factor`` the Cholesky factor of the products' covariance.
    """

    given: Array  # (steps, units)
    factor: Array  # (steps, steps), lower triangular; 1 on the diagonal of steps to come
    noise: Array  # (steps, units)

    @classmethod
    def initial_carry(cls, key: PRNGKeyArray, steps: int, units: int) -> "_Process":
        noise = jax.random.normal(key, (steps, units))
        return cls(jnp.zeros_like(noise), jnp.eye(steps), noise)

    def product(self, x: Array, step: Array, variance: Array) -> tuple["_Process", Array]:
        """The process with one more step, and W x."""
        given = self.given.at[step].set(x)
        row = variance * jnp.mean(given * x[None], axis=1)  # 0 for steps to come
        own, row = row[step], row.at[step].set(0)
        past = jax.scipy.linalg.solve_triangular(self.factor, row, lower=True)
        new = past.at[step].set(jnp.sqrt(jnp.maximum(own - jnp.dot(past, past), 0)))
        # A step that adds nothing new still needs a factor that can be solved.
        kept = new.at[step].max(1e-12 * jnp.sqrt(own) + 1e-150)
        return _Process(given, self.factor.at[step].set(kept), self.noise), new @ self.noise


class _Multiply:
    """A block's products with random matrices, given or drawn; their inputs are recorded."""

    def __init__(self, step: Array, products: Sequence[Array] | None, processes: list) -> None:
        self.step, self.products, self.processes = step, products, processes
        self.inputs: list[Array] = []
        self.drawn: list[Array] = []

    def __call__(self, key: Any, x: Array, *, sigma_w: Any, **_: Any) -> Array:  # noqa: ARG002
        number = len(self.inputs)
        self.inputs.append(x[0])
        if self.products is not None:
            return self.products[number][None]
        process, product = self.processes[number].product(
            x[0], self.step, jnp.square(jnp.asarray(sigma_w, x.dtype))
        )
        self.processes[number] = process
        self.drawn.append(product)
        return product[None]


def _population(
    block: GRU | LSTM, steps: int, q: float, width: int, key: PRNGKeyArray
) -> tuple[Array, Array]:
    """Second moments of states and gradients, (steps + 1,), by one draw of the units."""
    state_key, top_key, key, *keys = jax.random.split(key, 3 + 2 * block.n_weights)
    up_keys, down_keys = keys[: block.n_weights], keys[block.n_weights :]
    numbers = jnp.arange(steps)
    start = jnp.sqrt(jnp.asarray(q, float)) * jax.random.normal(state_key, (width,))

    def up(carry: tuple[Array, list], step: Array) -> tuple[tuple[Array, list], tuple]:
        state, processes = carry
        multiply = _Multiply(step, None, list(processes))
        after = block.apply(state[None], multiply, key)[0]
        return (after, multiply.processes), (state, multiply.drawn)

    processes = [_Process.initial_carry(k, steps, block.units) for k in up_keys]
    (last, _), (states, products) = jax.lax.scan(up, (start, processes), numbers)

    def down(carry: tuple[Array, list], layer: tuple) -> tuple[tuple[Array, list], Array]:
        (gradient, processes), (step, state, products) = carry, layer

        def forward(state: Array, products: list) -> tuple[Array, list]:
            multiply = _Multiply(step, products, [])
            return block.apply(state[None], multiply, key)[0], multiply.inputs

        (_, inputs), pull = jax.vjp(forward, state, products)
        by_inputs, processes = [jnp.zeros_like(x) for x in inputs], list(processes)
        variance = jnp.square(jnp.asarray(block.sigma_w, state.dtype))
        for number in reversed(range(block.n_weights)):
            by_product = pull((gradient, by_inputs))[1][number]
            processes[number], by_inputs[number] = processes[number].product(
                by_product, steps - 1 - step, variance
            )
        below = pull((gradient, by_inputs))[0]
        return (below, processes), jnp.mean(below**2)

    top = jax.random.normal(top_key, (width,))
    processes = [_Process.initial_carry(k, steps, block.units) for k in down_keys]
    _, gradients = jax.lax.scan(down, (top, processes), (numbers, states, products), reverse=True)
    lengths = jnp.append(jnp.mean(states**2, axis=1), jnp.mean(last**2))
    return lengths, jnp.append(gradients, 1.0)
