"""Averages of every layer that corrections to first order in 1/n are made of: by quadrature."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow import gaussian
from gradflow._first_order import (
    FUNCTIONS,
    PAIR_FUNCTIONS,
    SECOND_DERIVATIVES,
    Averages,
    FiniteLayers,
    Series,
    diagonal,
)
from gradflow.activations import Activation
from gradflow.blocks import Dense
from gradflow.gaussian import _pairs, _quadrature
from gradflow.networks import Network, check_network
from gradflow.statistics import BackwardLimit, ForwardLimit

__all__ = ["count_pairs", "covers", "finite_layers"]

# Averages over two inputs' pre-activations to compute, one for each pair and layer: some 10 s.
_MOST_PAIRS = 4000
# Nodes of each of their panels, for 1e-8 of what the width does.
_PAIR_NODES = 8
# Ends of intervals where φ saturates; sin has thousands.
_MOST_ENDS = 16


def finite_layers(
    network: Network, forward: Sequence[ForwardLimit], backward: Sequence[BackwardLimit]
) -> FiniteLayers:
    """The layers of a network that first-order corrections start from: what depends on φ.

    Parameters
    ----------
    network
        One that `first_order.covers`.
    forward, backward
        Its infinite-width limits.
    """
    (signals,), (gradients,) = forward, backward  # dense layers have equally many sites
    k = signals.covariance
    # Beyond the range of averages φ is linear on each side, or there is no answer; the chain is
    # then that of the rescaled signals, whose σ_w and σ_b make up for the change of scale.
    scale = signals.log_scale
    growth = gaussian.growth(network.activation, scale)[0]
    log_input_scale = jnp.concatenate([jnp.zeros_like(scale[:1]), growth[:-1]])
    log_input_scale = jnp.where(growth == scale, log_input_scale, jnp.nan)

    def each_layer(name: str) -> Array:
        scales = [getattr(stage.block, name) for stage in network.stages]
        squares = [jnp.square(jnp.asarray(0 if x is None else x, k.dtype)) for x in scales]
        repeats = np.array([stage.repeats for stage in network.stages])
        return jnp.repeat(jnp.stack(squares), repeats, total_repeat_length=network.depth)[:, None]

    return FiniteLayers(
        sigma_w2=each_layer("sigma_w") * jnp.exp(2 * (log_input_scale - scale)),
        sigma_b2=each_layer("sigma_b") * jnp.exp(-2 * scale),
        width=jnp.asarray(np.array(network.widths[1:], float), k.dtype)[:, None],
        covariance=k,
        log_scale=scale,
        backward=gradients,
        averages=_averages(network.activation, network.saturation_threshold, k),
    )


def _averages(activation: Activation, threshold: float, k: Array) -> Averages:
    q, sites = diagonal(k), k.shape[1]
    flat = np.asarray(activation.saturated_intervals(threshold))
    level = activation.saturated_slope(threshold)
    ends = flat[np.isfinite(flat)].tolist()
    few = len(ends) <= _MOST_ENDS
    kinks = tuple({*activation.kinks, *(ends if few else ())})

    def functions(x: Array) -> Array:
        phi, slope = activation(x), activation.derivative(x)
        # About φ(0), so that no large constant is squared and subtracted.
        shifted = phi - activation(jnp.zeros_like(x))
        saturated = jnp.abs(slope) < level
        saturated = jnp.where(saturated, 1.0, 0.0) if few else jnp.full_like(x, jnp.nan)
        rows = (shifted, shifted**2, phi**2, slope**2, slope, x * slope, saturated)
        return jnp.stack(rows)

    def pair_functions(x: Array) -> Array:
        phi, bend = activation(x), activation.second_derivative(x)
        return jnp.stack([*functions(x), phi, phi**3, bend, x * bend, x**2 * bend])

    def alone(x: Array) -> Array:
        values = functions(x)
        once = values[:4, None] * jnp.stack([jnp.ones_like(x), x**2, x**4])[None]
        both = values[:, None] * values[None, :]
        return jnp.concatenate([v.reshape(-1, *x.shape) for v in (once, both)])

    # One layer after another: an average's 90 000 values need not all be stored.
    averages = jnp.moveaxis(
        jax.lax.map(lambda layer: gaussian.expectation(alone, layer, kinks=kinks), q), 1, 0
    )
    mean, square, phi2, dphi2 = (Series.of_powers(averages[i : i + 3], q) for i in range(0, 12, 3))
    own = jnp.moveaxis(
        averages[12:].reshape(len(FUNCTIONS), len(FUNCTIONS), *q.shape), (0, 1), (2, 3)
    )
    a, b = np.triu_indices(sites, 1)
    pairs = None
    if 0 < a.size * len(k) <= _MOST_PAIRS:
        of_pairs = (q[:, a], q[:, b], k[:, a, b])
        pairs = _pairs.pair_expectation(pair_functions, *of_pairs, kinks=kinks, order=_PAIR_NODES)
        pairs = jnp.moveaxis(pairs, (0, 1), (2, 3))
        if activation.slope_jumps:
            bent = functools.partial(_with_deltas, activation, pair_functions, kinks)
            pairs = jax.vmap(jax.vmap(bent))(pairs, *of_pairs)
    return Averages(
        phi2=phi2,
        dphi2=dphi2,
        mean=mean,
        variance=square.less_square_of(mean),
        saturation=Series.of(lambda v: gaussian.saturation(activation, v, threshold), q),
        alone=own,
        pairs=pairs,
    )


def _with_deltas(
    activation: Activation,
    functions: Callable[[Array], Array],
    kinks: tuple[float, ...],
    smooth: Array,
    q_u: Array,
    q_v: Array,
    k: Array,
) -> Array:
    """A pair's averages, (functions, functions), with the deltas of φ'' at its jumps."""
    kink, jump = (jnp.asarray(v, k.dtype) for v in zip(*activation.slope_jumps, strict=True))
    powers = jump[None] * jnp.stack([jnp.ones_like(kink), kink, kink**2])  # of SECOND_DERIVATIVES
    tiny = jnp.finfo(k.dtype).tiny
    bent = slice(PAIR_FUNCTIONS.index(SECOND_DERIVATIVES[0]), None)

    def density(x: Array, mean: Array, variance: Array) -> Array:
        return jnp.exp(-((x - mean) ** 2) / (2 * variance)) / jnp.sqrt(2 * math.pi * variance)

    def given(q: Array, other: Array) -> tuple[Array, Array]:
        """p(kink) E[f | kink] for each kink, and p(kink, other's kink)."""
        rest = jnp.maximum(other - k**2 / q, tiny)
        means = k / q * kink
        averages = jax.vmap(
            lambda m: _quadrature.shifted_expectation(functions, m, jnp.sqrt(rest), kinks=kinks)
        )(means)
        here = density(kink, jnp.zeros_like(kink), q)[:, None]
        return here * averages, here * density(kink[None, :], means[:, None], rest)

    by_u, both = given(q_u, q_v)
    by_v, _ = given(q_v, q_u)
    rows, columns = powers @ by_u, powers @ by_v
    total = smooth.at[bent].add(rows).at[:, bent].add(columns.T)
    return total.at[bent, bent].add(powers @ both @ powers.T)


def count_pairs(sites: int, network: Network) -> int:
    """The number of pairs of inputs in all layers that averages are computed over."""
    every = math.comb(sites, 2) * network.depth
    return every if every <= _MOST_PAIRS else 0


def covers(network: Network) -> bool:
    """Whether `correct` has an answer: dense layers, each with Gaussian weights of its own."""
    check_network(network)
    first, *rest = [s.block for s in network.stages for _ in range(min(s.repeats, 2))]
    return (
        network.iid_gaussian
        and network.centred
        and not network.tied
        and isinstance(first, Dense)
        and all(isinstance(b, Dense) and b.activation == network.activation for b in rest)
    )
