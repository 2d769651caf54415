"""The Jacobian of one random network, as an operator and layer by layer; norms as logarithms.

The derivative of a stretch of layers, ∂z^m/∂z^l, is never multiplied out: `Jacobian` pushes
tangents up (J v) and pulls cotangents down (Jᵀ u), layer by layer, each at length 1 beside the
logarithm of the length it had. It is of one random network, whichever sampler draws it. With
``matrix_free`` each weight matrix is decided only as far as products need it: the next vector may
depend on earlier products, as in Golub-Kahan's algorithm, and each product comes
with the Jacobian that remembers it, which makes the next one.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow import _compilation
from gradflow._arguments import as_key, as_numbers, as_real
from gradflow._checks import check_count, check_instance
from gradflow._inputs import as_inputs
from gradflow.blocks import AbstractBlock
from gradflow.errors import InputError
from gradflow.networks import Network, Stage, check_network
from gradflow.simulation import _linearisation
from gradflow.simulation._layers import (
    LayerKey,
    LayerWeights,
    check_weights,
    layer_keys,
    scan_blocks,
)
from gradflow.simulation._linearisation import MatrixSampler, Point, matrix_sampler
from gradflow.simulation._matrices import Matrix
from gradflow.simulation._scales import at_length_one

__all__ = ["Jacobian", "LogEstimate", "draw", "layer_jacobians", "log_frobenius_norm"]
__all__ += ["log_traces"]


class _Product(NamedTuple):
    """J v, or Jᵀ u, of k vectors, and the Jacobian that remembers these products."""

    direction: Float[Array, "k sites n"]  # of length 1 over sites and units; 0 where J v = 0
    log_norm: Float[Array, " k"]  # natural logarithm of the length; -inf where J v = 0
    jacobian: "Jacobian"


class _Layers(eqx.Module):
    """Equal blocks of one network, linearised: arrays have a leading axis of layers.

    Where layers are held apart, it is a single one, without that axis.
    """

    block: AbstractBlock  # always without it
    point: Point
    matrices: tuple[Matrix, ...]


class Jacobian(eqx.Module):
    """∂z^m/∂z^l of one random network, all inputs at once, l < m.

    A tangent or cotangent is an array (sites, n): a change of every input's signal. Several are
    pushed or pulled together, (k, sites, n).
    """

    layers: tuple[_Layers, ...]
    apart: bool = eqx.field(static=True, default=False)

    @property
    def dtype(self) -> jnp.dtype:
        """Of signals, tangents and cotangents."""
        return self.layers[0].point.signal.dtype

    @property
    def tangent_shape(self) -> tuple[int, ...]:
        """(sites, n_l)."""
        return self.layers[0].point.signal.shape[-2:]

    @property
    def cotangent_shape(self) -> tuple[int, ...]:
        """(sites, n_m)."""
        last = self.layers[-1]
        sites, width = last.point.signal.shape[-2:]
        return int(sites // last.block.pool_factor), last.block.width_after(width)

    def with_places(self, more: int) -> "Jacobian":
        """Return the Jacobian with places for ``more`` tangents and cotangents each in addition."""

        def larger(layers: _Layers) -> _Layers:
            products = zip(layers.matrices, layers.point.products, strict=True)
            matrices = tuple(m.with_places(more * product.shape[-2]) for m, product in products)
            return dataclasses.replace(layers, matrices=matrices)

        return dataclasses.replace(self, layers=tuple(map(larger, self.layers)))

    def times(self, tangents: Float[Array, "k sites n_in"]) -> _Product:
        """Return J v for each tangent v.

        Raises
        ------
        InputError
            If the shape does not fit, or a matrix has no place left for the products.
        """
        return self._walk(
            "tangents", tangents, self.tangent_shape, _linearisation.jvp, reverse=False
        )

    def transpose_times(self, cotangents: Float[Array, "k sites n_out"]) -> _Product:
        """Return Jᵀ u for each cotangent u.

        Raises
        ------
        InputError
            If the shape does not fit, or a matrix has no place left for the products.
        """
        return self._walk(
            "cotangents", cotangents, self.cotangent_shape, _linearisation.vjp, reverse=True
        )

    def _walk(
        self, name: str, vectors: Array, shape: tuple[int, ...], multiply: Callable, reverse: bool
    ) -> _Product:
        """Multiply vectors by each layer's Jacobian, or its transpose, one layer after another."""
        vectors = jnp.asarray(as_numbers(name, vectors))
        if vectors.ndim != 3 or vectors.shape[1:] != shape:
            raise InputError(
                f"{name} has shape {vectors.shape}; it is (how many, {shape[0]} inputs, "
                f"{shape[1]} units) for this Jacobian"
            )
        vectors = vectors.astype(self.dtype)
        carry, done = at_length_one(vectors, jnp.zeros(len(vectors), vectors.dtype)), []
        for layers in self.layers[::-1] if reverse else self.layers:
            if self.apart:
                carry, matrices = _in_place()(
                    multiply, layers.block, carry, layers.point, layers.matrices
                )
            else:
                step = functools.partial(_through_layer, multiply, layers.block)
                carry, matrices = scan_blocks(
                    lambda carry, layer, step=step: step(carry, *layer),
                    carry,
                    (layers.point, layers.matrices),
                    reverse=reverse,
                )
            done.append(_Layers(layers.block, layers.point, matrices))
        return _Product(*carry, Jacobian(tuple(done[::-1] if reverse else done), self.apart))


def _through_layer(
    multiply: Callable,
    block: AbstractBlock,
    carry: tuple[Array, Array],
    point: Point,
    matrices: tuple[Matrix, ...],
) -> tuple[tuple[Array, Array], tuple[Matrix, ...]]:
    """Push or pull vectors through one layer; keep them at length 1 and add to their logarithms."""
    v, log_norm = carry
    v, matrices, *_ = multiply(block, point, matrices, v)
    return at_length_one(v, log_norm), matrices


@functools.cache
def _in_place() -> Callable:
    """Compile `_through_layer` so that the matrices' memory is reused, with the new products."""
    # Of wide layers, which wait for memory and not for arithmetic; and new for each size.
    options = _compilation.options(1.0)
    return jax.jit(
        _through_layer, static_argnums=0, donate_argnames="matrices", compiler_options=options
    )


def draw(
    network: Network,
    inputs: Float[Array, "sites n_0"],
    key: PRNGKeyArray | int,
    *,
    sampler: str = "auto",
    weights: Sequence[LayerWeights] | None = None,
    below: int = 0,
    above: int | None = None,
    tangents: int = 1,
    cotangents: int = 1,
    apart: bool = False,
) -> Jacobian:
    """Draw one random network and linearise it at these inputs.

    A pure function of the key: jit it, vmap it. With ``sampler="dense"`` it is the network that
    `propagation.propagate` draws from this key, and all its weights are held.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (sites, n_0): where it is linearised, all inputs at once.
    key
        The network's key.
    sampler
        ``"dense"``, ``"matrix_free"``, or ``"auto"``: matrix_free where the law allows it.
    weights
        The network's weights and biases, of `training.initial_weights` or trained, where they are
        not to be drawn; the sampler is not used then.
    below, above
        The stretch: ∂z^above/∂z^below, with z^0 the input; the whole network without them.
    tangents, cotangents
        How many will be pushed up and pulled down, all together; ``matrix_free`` keeps places for
        their products, n_in + n_out numbers a layer for each.
    apart
        Hold every layer by itself, and put each product beside the earlier ones without copying
        them: for layers so wide that this matters, and not inside a traced program. A Jacobian that
        has been multiplied by is then used up; only the one that came with the product is left.

    Returns
    -------
    Jacobian
        For the next product use the one that comes with each product.

    Raises
    ------
    InputError
        If the sampler cannot draw the weights, there is no such stretch, or the inputs or weights
        do not fit the network.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    if weights is not None:
        check_weights(network, weights)
        sampler = "dense"
    below, above = _checked_stretch(network, below, above)
    places = 1 + check_count("tangents", tangents, 0), check_count("cotangents", cotangents, 0)
    make = matrix_sampler(sampler, network, places)
    keys = jax.random.split(key, network.depth + 1)[1:]
    signal, layers, first = inputs, [], 0
    for stage, of_stage in _keys_and_matrices(network, keys, weights):
        # Layers below the stretch are walked for their signal alone.
        for start, stop in _cut(first, stage.repeats, below, above, apart):
            numbers = start - first if apart else slice(start - first, stop - first)
            some = jax.tree.map(lambda leaf, numbers=numbers: leaf[numbers], of_stage)
            if apart:
                signal, (point, matrices) = _linearised_apart(stage.block, make, signal, some)
            else:
                step = functools.partial(_linearised, stage.block, make)
                signal, (point, matrices) = scan_blocks(step, signal, some)
            if start >= below:
                layers.append(_Layers(stage.block, point, matrices))
        first += stage.repeats
    return Jacobian(tuple(layers), apart)


def _checked_stretch(network: Network, below: int, above: int | None) -> tuple[int, int]:
    """Return the first and last layer of a stretch, l and m of ∂z^m/∂z^l."""
    above = network.depth if above is None else above
    below, above = check_count("below", below, 0), check_count("above", above)
    if not below < above <= network.depth:
        raise InputError(
            f"below is {below} and above is {above}; it takes 0 <= below < above <= "
            f"{network.depth}, the network's depth"
        )
    return below, above


def _keys_and_matrices(
    network: Network, keys: Array, weights: Sequence[LayerWeights] | None
) -> list[tuple[Stage, LayerKey]]:
    """Keys by stage, as `layer_keys` has them, with given matrices at each step of a tied stage."""
    by_stage = layer_keys(network, keys, weights)
    if weights is None:
        return by_stage
    pairs = []
    for (stage, key), given in zip(by_stage, weights, strict=True):
        if stage.tied and key.weights is not None:
            steps = stage.repeats
            matrices = tuple(jnp.broadcast_to(m, (steps, *m.shape)) for m in given.matrices)
            key = key._replace(weights=key.weights._replace(matrices=matrices))
        pairs.append((stage, key))
    return pairs


def _linearised(
    block: AbstractBlock, sampler: MatrixSampler, signal: Array, key: LayerKey
) -> tuple[Array, tuple[Point, tuple[Matrix, ...]]]:
    """Return a block's output; where it is linearised, and its matrices."""
    after = _linearisation.linearise(block, sampler, key, signal)
    return after.out, (after.point, after.matrices)


_linearised_apart = jax.jit(_linearised, static_argnums=1)


def _cut(first: int, count: int, below: int, above: int, apart: bool) -> list[tuple[int, int]]:
    """Cut layers first … first + count - 1, numbered from 0, at ``below``; end at ``above``."""
    last = min(first + count, above)
    cut = min(max(below, first), last)
    ends = range(first, last + 1) if apart else (first, cut, last)
    return [(a, b) for a, b in itertools.pairwise(ends) if a < b]


def layer_jacobians(
    network: Network, x: Float[Array, " n_in"], key: PRNGKeyArray | int
) -> list[Float[Array, "..."]]:
    """Return ∂z^1/∂x, ∂z^2/∂z^1, …, ∂z^L/∂z^{L-1} of the network that this key draws.

    A pure function, of the network that `propagation.propagate` draws with ``sampler="dense"``. All
    layers' weights are held at once: Σ n_l n_{l-1} numbers.

    Parameters
    ----------
    network
        The law of the network.
    x
        Shape (n_0,): where it is linearised.
    key
        The network's key.

    Returns
    -------
    list
        One array (n_l, n_{l-1}) for each layer.

    Raises
    ------
    InputError
        If a layer has no Jacobian for one input alone, as under BatchNorm.
    """
    check_network(network)
    x = jnp.asarray(as_real("x", x))
    if x.shape != (network.input_width,):
        raise InputError(
            f"x has shape {x.shape}; it is ({network.input_width},), one input of this network"
        )
    nested = (block for stage in network.stages for block in stage.block.nested)
    mixing = [type(block).__name__ for block in nested if block.mixes_sites]
    if mixing:
        raise InputError(
            f"layer_jacobians is of one input alone, and {mixing[-1]} in this network makes its "
            "signal depend on others; use jacobians.draw, which takes all sites at once"
        )
    jacobian = draw(network, x[None], key, sampler="dense", tangents=0, cotangents=0)
    factors: list[Array] = []
    for layers in jacobian.layers:

        def rows(layer: tuple, block: AbstractBlock = layers.block) -> Array:
            point, matrices = layer
            n_out = block.width_after(point.signal.shape[1])
            basis = jnp.eye(n_out, dtype=point.signal.dtype)[:, None]
            return _linearisation.vjp(block, point, matrices, basis)[0]

        factors += [*jax.lax.map(rows, (layers.point, layers.matrices))[:, :, 0]]
    return factors


def log_frobenius_norm(jacobian: Jacobian) -> Float[Array, ""]:
    """Return log ‖J‖_F, exactly: all of its columns are made, n_l tangents.

    Raises
    ------
    InputError
        If the Jacobian was drawn ``matrix_free`` with places for fewer tangents.
    """
    check_instance("jacobian", jacobian, Jacobian, "a Jacobian, as jacobians.draw returns it")
    sites, n_in = jacobian.tangent_shape
    basis = jnp.eye(sites * n_in, dtype=jacobian.dtype).reshape(-1, sites, n_in)
    return jax.nn.logsumexp(2 * jacobian.times(basis).log_norm) / 2


class LogEstimate(NamedTuple):
    """Natural logarithms of a mean over random probes, and of its standard error."""

    log: Float[Array, "..."]
    log_standard_error: Float[Array, "..."]  # NaN with one probe

    @classmethod
    def of(cls, logs: Float[Array, "probes ..."]) -> "LogEstimate":
        """Return the estimate from the logarithms of independent values."""
        count = logs.shape[0]
        log = jax.nn.logsumexp(logs, axis=0) - math.log(count)
        relative = jnp.exp(logs - jnp.where(jnp.isfinite(log), log, 0)[None]) - 1
        spread = jnp.sqrt(jnp.sum(relative**2, axis=0) / (count * (count - 1) or math.nan))
        return cls(log, log + jnp.log(spread))


def log_traces(
    jacobian: Jacobian, key: PRNGKeyArray | int, *, powers: int = 1, probes: int = 16
) -> LogEstimate:
    """Estimate log tr (J Jᵀ)^k for k = 1 … powers by Hutchinson's method; ‖J‖_F² is the first.

    With v uniform on the sphere of radius √N in N dimensions, E vᵀ (Jᵀ J)^k v is the trace; it is
    the squared norm of v after k alternating products with J and Jᵀ. For all powers exactly,
    see `singular_values.LogSingularValues.log_trace`.

    Parameters
    ----------
    jacobian
        Drawn ``matrix_free``, it needs places for ⌈powers/2⌉ probes as tangents and ⌊powers/2⌋ as
        cotangents.
    key
        Of the probes.
    powers, probes
        How many, at least 1; without a second probe the standard error is not known.

    Returns
    -------
    LogEstimate
        Arrays of shape (powers,). The error is that of the probes, for this one network.
    """
    check_instance("jacobian", jacobian, Jacobian, "a Jacobian, as jacobians.draw returns it")
    powers, probes = check_count("powers", powers), check_count("probes", probes)
    sites, n_in = jacobian.tangent_shape
    v = jax.random.normal(as_key(key), (probes, sites, n_in), jacobian.dtype)
    v, _ = at_length_one(v, jnp.zeros(probes, v.dtype))
    log = jnp.full(probes, math.log(sites * n_in) / 2, v.dtype)
    logs = []
    for power in range(powers):
        apply = jacobian.transpose_times if power % 2 else jacobian.times
        v, more, jacobian = apply(v)
        log += more
        logs.append(2 * log)
    return LogEstimate.of(jnp.stack(logs, axis=1))
