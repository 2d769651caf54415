"""Norms of partial Jacobians ∂z^m/∂z^l of one random network, for all pairs of layers."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow._arguments import as_key
from gradflow._checks import check_count
from gradflow._inputs import as_inputs
from gradflow._norms import unit_rows
from gradflow.blocks import AbstractBlock
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import _linearisation
from gradflow.simulation._factors import checked_factors
from gradflow.simulation._layers import layer_keys, scan_blocks
from gradflow.simulation._linearisation import MatrixSampler, matrix_sampler
from gradflow.simulation._scales import at_length_one
from gradflow.simulation.jacobians import LogEstimate

__all__ = ["log_partial_norms", "sampled_partial_norms"]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def log_partial_norms(factors: list[Float[Array, "..."]]) -> Float[Array, "l m"]:
    """Compute log (1/n_m) ‖∂z^m/∂z^l‖_F² for all pairs of layers, exactly.

    The averaged partial Jacobian norms of Doshi, He & Gromov 2023 (arXiv:2111.12143), here of
    pre-activations: their mean over networks is the product of χ between l and m at infinite width.

    Parameters
    ----------
    factors
        ∂z^1/∂z^0, ∂z^2/∂z^1, …, of any shapes that fit (`jacobians.layer_jacobians`).

    Returns
    -------
    array
        Shape (L + 1, L + 1), by l and m, both from 0; 0 where m = l, NaN where m < l.

    Raises
    ------
    InputError
        If there is no factor, or shapes do not fit.
    """
    factors = checked_factors(factors)
    widths = [factors[0].shape[1], *(factor.shape[0] for factor in factors)]
    depth, n = len(factors), max(widths)
    # Padded with zeros, all products have one shape, and their norms are the same.
    stack = jnp.stack(
        [jnp.pad(a, ((0, n - a.shape[0]), (0, n - a.shape[1]))) for a in map(jnp.asarray, factors)]
    )
    units = jnp.arange(n)[None] < jnp.asarray(widths)[:, None]
    starts = jnp.eye(n, dtype=stack.dtype)[None] * units[:, :, None].astype(stack.dtype)

    def layer(state: tuple[Array, Array], parts: tuple[Array, Array]) -> tuple[tuple, Array]:
        products, logs = state
        factor, m = parts
        rows, more = unit_rows(_matmul(factor, products).reshape(depth + 1, -1))
        below = jnp.arange(depth + 1) < m
        products = jnp.where(below[:, None, None], rows.reshape(products.shape), starts)
        logs = jnp.where(below, logs + more, 0)
        return (products, logs), logs

    begin = (starts, jnp.zeros(depth + 1, stack.dtype))
    _, logs = jax.lax.scan(layer, begin, (stack, jnp.arange(1, depth + 1)))
    return _by_pair(2 * logs.T - jnp.log(jnp.asarray(widths[1:], stack.dtype))[None], 0.0)


def sampled_partial_norms(
    network: Network,
    inputs: Float[Array, "sites n_0"],
    key: PRNGKeyArray | int,
    *,
    probes: int = 1,
    sampler: str = "auto",
) -> LogEstimate:
    """Estimate `log_partial_norms` of one random network, with random tangents from every layer.

    One forward pass. With ``matrix_free``, no weights and O(n (L probes)²) operations a layer.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (sites, n_0); the norm is that of all inputs at once, over sites · n_m.
    key
        The network's key, which the probes are drawn from too.
    probes
        Random tangents from each layer, at least 1.
    sampler
        ``"dense"``, ``"matrix_free"``, or ``"auto"``.

    Returns
    -------
    LogEstimate
        Arrays of shape (L + 1, L + 1), by l and m; the logarithms are of the mean over probes. The
        error is that of the probes, for this one network.

    Raises
    ------
    InputError
        If a layer merges sites, as a mean over positions does, or the sampler is unknown.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    if any(stage.block.pool_factor != 1 for stage in network.stages):
        raise InputError(
            "sampled_partial_norms is of layers with equally many sites, and a layer of this "
            "network merges positions; use it for the convolutions alone"
        )
    probes = check_count("probes", probes)
    walk = _Walk(matrix_sampler(sampler, network), probes, network.depth)
    keys = jax.random.split(key, network.depth + 1)
    start_keys = jax.random.split(keys[0], network.depth + 1)
    numbers = jnp.arange(network.depth + 1)
    none = jnp.zeros((network.depth + 1, probes, *inputs.shape), inputs.dtype)
    logs = jnp.full(none.shape[:2], -jnp.inf)
    state = (inputs, *walk.started(none, logs, numbers[0], start_keys[0]))
    norms, first = [], 1
    for stage, of_stage in layer_keys(network, keys[1:]):
        stop = first + stage.repeats
        layers = (of_stage, start_keys[first:stop], numbers[first:stop])
        state, reached = scan_blocks(functools.partial(walk.layer, stage.block), state, layers)
        norms.append(reached)
        first = stop
    estimate = LogEstimate.of(jnp.concatenate(norms).transpose(2, 1, 0))
    return LogEstimate(
        *(_by_pair(one, at) for one, at in zip(estimate, (0.0, -math.inf), strict=True))
    )


class _Walk(NamedTuple):
    """Tangents from every layer, (layers + 1, probes, sites, n), pushed up layer by layer."""

    sampler: MatrixSampler
    probes: int
    depth: int

    def started(self, v: Array, log: Array, layer: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        """Put in the tangents that start at this layer; return all, and logarithms of lengths."""
        fresh = jax.random.normal(key, (1, *v.shape[1:]), v.dtype)
        unit, _ = at_length_one(fresh[0], jnp.zeros(self.probes, v.dtype))
        here = jnp.arange(self.depth + 1) == layer
        radius = math.log(math.prod(v.shape[2:])) / 2
        return (
            jnp.where(here[:, None, None, None], unit[None], v),
            jnp.where(here[:, None], radius, log),
        )

    def layer(self, block: AbstractBlock, state: tuple, layer: tuple) -> tuple[tuple, Array]:
        """Push all tangents through one layer; the logarithms of (1/n) ‖J v‖² beside."""
        signal, v, log = state
        key, start_key, number = layer
        sites = len(signal)
        out, point, _, matrices = _linearisation.linearise(block, self.sampler, key, signal)
        pushed, _ = _linearisation.jvp(block, point, matrices, v.reshape(-1, sites, v.shape[-1]))
        unit, log = at_length_one(pushed, log.reshape(-1))
        width = out.shape[1]
        unit, log = unit.reshape(*v.shape[:-1], width), log.reshape(v.shape[:2])
        reached = 2 * log - math.log(sites * width)
        return (out, *self.started(unit, log, number, start_key)), reached


def _by_pair(values: Array, at_coincidence: float) -> Array:
    """Turn (l, m - 1) into (l, m), with NaN below the diagonal."""
    values = jnp.concatenate([values[:, :1], values], axis=1)
    l, m = jnp.indices(values.shape)  # noqa: E741
    return jnp.where(m > l, values, jnp.where(m == l, at_coincidence, jnp.nan))
