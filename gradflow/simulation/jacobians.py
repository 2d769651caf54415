"""The Jacobian of one random network, as an operator and layer by layer; norms as logarithms.

The derivative of a stretch of layers, ∂z^m/∂z^l, is never multiplied out: `Jacobian` pushes
tangents up (J v) and pulls cotangents down (Jᵀ u), layer by layer, each at length 1 beside the
logarithm of the length it had. It holds one random network, whichever sampler draws it. With
``matrix_free`` each weight matrix is decided only as far as it has been asked
(`gradflow.simulation.matrices`): questions may follow from answers, as in Golub-Kahan's algorithm,
and the network must be carried from one question to the next. `gradflow.simulation.linearisation`
says how a block is linearised.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gradflow import _compilation
from gradflow._arguments import as_key, as_numbers, as_real
from gradflow._checks import check_count, check_instance, check_sequence
from gradflow.blocks import AbstractBlock
from gradflow.errors import InputError
from gradflow.networks import Network, as_inputs, check_network
from gradflow.norms import unit_rows
from gradflow.simulation import linearisation, samplers
from gradflow.simulation._matrices import Drawn, Matrix
from gradflow.simulation.linearisation import LayerKey, LayerWeights, Maker
from gradflow.simulation.propagation import check_weights, scan_blocks

__all__ = [
    "EndToEnd",
    "Jacobian",
    "LogEstimate",
    "Product",
    "chosen_sampler",
    "draw",
    "end_to_end",
    "layer_jacobians",
    "log_frobenius_norm",
    "log_partial_norms",
    "log_traces",
    "sampled_partial_norms",
]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Product(NamedTuple):
    """What a Jacobian, or its transpose, makes of vectors, and the Jacobian that remembers it."""

    direction: Float[Array, "k sites n"]  # of length 1 over sites and units; 0 where J v = 0
    log_norm: Float[Array, " k"]  # natural logarithm of the length; -inf where J v = 0
    jacobian: "Jacobian"


class _Layers(eqx.Module):
    """Equal blocks of one network, linearised: arrays have a leading axis of layers.

    Where layers are held apart, it is a single one, without that axis.
    """

    block: AbstractBlock  # always without it
    key: LayerKey
    signal: Float[Array, "*layers sites n_in"]
    answers: tuple[Array, ...]  # what each random matrix answered on the way up
    matrices: tuple[Matrix, ...]

    def parts(self) -> tuple:
        """Return what differs from layer to layer."""
        return self.key, self.signal, self.answers, self.matrices


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
        return self.layers[0].signal.dtype

    @property
    def tangent_shape(self) -> tuple[int, ...]:
        """(sites, n_l)."""
        return self.layers[0].signal.shape[-2:]

    @property
    def cotangent_shape(self) -> tuple[int, ...]:
        """(sites, n_m)."""
        last = self.layers[-1]
        sites, width = last.signal.shape[-2:]
        return sites // last.block.pool_factor, last.block.width_after(width)

    def with_places(self, more: int) -> "Jacobian":
        """Return it with places for as many tangents, and as many cotangents, more."""
        each = more * self.tangent_shape[0]
        return jax.tree.map(
            lambda leaf: leaf.with_places(each) if isinstance(leaf, Matrix) else leaf,
            self,
            is_leaf=lambda leaf: isinstance(leaf, Matrix),
        )

    def times(self, tangents: Float[Array, "k sites n_in"]) -> Product:
        """Return J v for each tangent v.

        Raises
        ------
        InputError
            If the shape does not fit, or a matrix has no place left for the answers.
        """
        return self._walk(
            "tangents", tangents, self.tangent_shape, linearisation.push, reverse=False
        )

    def transpose_times(self, cotangents: Float[Array, "k sites n_out"]) -> Product:
        """Return Jᵀ u for each cotangent u.

        Raises
        ------
        InputError
            If the shape does not fit, or a matrix has no place left for the answers.
        """
        return self._walk(
            "cotangents", cotangents, self.cotangent_shape, linearisation.pull, reverse=True
        )

    def _walk(
        self, name: str, vectors: Array, shape: tuple[int, ...], through: Callable, reverse: bool
    ) -> Product:
        vectors = jnp.asarray(as_numbers(name, vectors))
        if vectors.ndim != 3 or vectors.shape[1:] != shape:
            raise InputError(
                f"{name} has shape {vectors.shape}; it is (how many, {shape[0]} inputs, "
                f"{shape[1]} units) for this Jacobian"
            )
        vectors = vectors.astype(self.dtype)
        carry, done = _at_length_one(vectors, jnp.zeros(len(vectors), vectors.dtype)), []
        for layers in self.layers[::-1] if reverse else self.layers:
            if self.apart:
                carry, asked = _in_place()(through, layers.block, carry, *layers.parts())
            else:
                step = functools.partial(_through, through, layers.block)
                carry, asked = scan_blocks(
                    lambda carry, parts, step=step: step(carry, *parts),
                    carry,
                    layers.parts(),
                    reverse=reverse,
                )
            done.append(eqx.tree_at(lambda one: one.matrices, layers, asked))
        return Product(*carry, Jacobian(tuple(done[::-1] if reverse else done), self.apart))


def _through(
    through: Callable,
    block: AbstractBlock,
    carry: tuple[Array, Array],
    key: LayerKey,
    signal: Array,
    answers: tuple[Array, ...],
    asked: tuple[Matrix, ...],
) -> tuple[tuple[Array, Array], tuple[Matrix, ...]]:
    """Push or pull vectors through one layer; keep them at length 1 and add to their logarithms."""
    v, log_norm = carry
    v, asked, *_ = through(
        functools.partial(linearisation.with_products, block, key), signal, answers, asked, v
    )
    return _at_length_one(v, log_norm), asked


@functools.cache
def _in_place() -> Callable:
    """Return `_through` with the places of the matrices reused for what they come to know."""
    # Of wide layers, which wait for memory and not for arithmetic; and new for each size.
    options = _compilation.options(1.0)
    return jax.jit(_through, static_argnums=0, donate_argnames="asked", compiler_options=options)


def _at_length_one(v: Array, log_norm: Array) -> tuple[Array, Array]:
    rows, more = unit_rows(v.reshape(len(v), -1))
    return rows.reshape(v.shape), log_norm + more


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
        not to be drawn; the sampler has no say then.
    below, above
        The stretch: ∂z^above/∂z^below, with z^0 the input; the whole network without them.
    tangents, cotangents
        How many will be pushed up and pulled down, all together; ``matrix_free`` keeps places for
        their answers, n_in + n_out numbers a layer for each.
    apart
        Hold every layer by itself, and put each answer into its place without copying what is
        there: for layers so wide that this matters, and not inside a traced program. A Jacobian
        that has been asked is then used up; only the one that came with the answer is left.

    Returns
    -------
    Jacobian
        Use the one that comes with each answer for the next question.

    Raises
    ------
    InputError
        If the sampler cannot draw the weights, there is no such stretch, or the inputs do not fit.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    if weights is not None:
        check_weights(network, weights)
    above = network.depth if above is None else above
    below, above = check_count("below", below, 0), check_count("above", above)
    if not below < above <= network.depth:
        raise InputError(
            f"below is {below} and above is {above}; it takes 0 <= below < above <= "
            f"{network.depth}, the network's depth"
        )
    sites = inputs.shape[0]
    places = (
        sites * (1 + check_count("tangents", tangents, 0)),
        sites * check_count("cotangents", cotangents, 0),
    )
    make = Maker(chosen_sampler("dense" if weights is not None else sampler, network), places)
    keys = jax.random.split(key, network.depth + 1)[1:]
    signal, layers, first = inputs, [], 0
    each_given = [None] * len(network.stages) if weights is None else weights
    for stage, given in zip(network.stages, each_given, strict=True):
        layer_keys = linearisation.stage_keys(stage, keys[first : first + stage.repeats], given)
        if stage.tied and given is not None and layer_keys.given is not None:
            # Biases are at each step already; here the matrices are too.
            steps = stage.repeats
            shared = tuple(jnp.broadcast_to(m, (steps, *m.shape)) for m in given.matrices)
            layer_keys = layer_keys._replace(given=layer_keys.given._replace(matrices=shared))
        # Layers below the stretch are walked for their signal alone.
        for start, stop in _within(first, stage.repeats, below, above, apart):
            if apart:
                layer_key = jax.tree.map(lambda leaf, at=start - first: leaf[at], layer_keys)
                signal, parts = _linearised_apart(stage.block, make, signal, layer_key)
            else:
                linearise = functools.partial(_linearised, stage.block, make)
                within = slice(start - first, stop - first)
                some = jax.tree.map(lambda leaf, within=within: leaf[within], layer_keys)
                signal, parts = scan_blocks(linearise, signal, some)
            if start >= below:
                layers.append(_Layers(stage.block, *parts))
        first += stage.repeats
    return Jacobian(tuple(layers), apart)


def _linearised(
    block: AbstractBlock, make: Maker, signal: Array, key: LayerKey
) -> tuple[Array, tuple[LayerKey, Array, tuple[Array, ...], tuple[Matrix, ...]]]:
    """Apply a block; return its output, and its key, input, and matrices with their answers."""
    if key.given is None:
        known = linearisation.made(block, make, key, signal)
    else:
        known = tuple(map(Drawn, key.given.matrices))
    asked = linearisation.ask(block, key, signal, known)
    return asked.out, (key, signal, asked.answers, asked.matrices)


def chosen_sampler(sampler: str, network: Network) -> str:
    """Return the sampler that draws these layers, each with matrices of its own.

    Raises
    ------
    InputError
        If it is ``matrix_free``, and layers share their weights.
    """
    if not network.tied:
        return samplers.choose(sampler, network)[0]
    if sampler == "matrix_free":
        raise InputError(
            f"sampler is 'matrix_free', and the time steps of {network.name!r} share their "
            "weights; a Jacobian of such a network takes sampler 'dense' or 'auto'"
        )
    return samplers.choose("dense" if sampler == "auto" else sampler, network)[0]


_linearised_apart = jax.jit(_linearised, static_argnums=1)


def _within(first: int, count: int, below: int, above: int, apart: bool) -> list[tuple[int, int]]:
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
    if network.mixes_sites:
        raise InputError(
            "layer_jacobians is of one input alone, and this network's BatchNorm, UnitVariance or "
            "convolution makes its signal depend on others; use jacobians.draw, which takes all "
            "sites at once"
        )
    jacobian = draw(network, x[None], key, sampler="dense", tangents=0, cotangents=0)
    found: list[Array] = []
    for layers in jacobian.layers:

        def rows(parts: tuple, block: AbstractBlock = layers.block) -> Array:
            key, signal, answers, asked = parts
            n_out = block.width_after(signal.shape[1])
            basis = jnp.eye(n_out, dtype=signal.dtype)[:, None]
            return linearisation.pull(
                functools.partial(linearisation.with_products, block, key),
                signal,
                answers,
                asked,
                basis,
            )[0]

        found += [*jax.lax.map(rows, layers.parts())[:, :, 0]]
    return found


def checked_factors(factors: Any) -> list[Array]:
    """Return matrices to be multiplied, the first factor first.

    Raises
    ------
    InputError
        If there is none, they are no matrices of real numbers, or shapes do not fit.
    """
    if not hasattr(factors, "shape"):
        what = "matrices, the first layer's first, as layer_jacobians returns them"
        factors = check_sequence("factors", factors, what)
    if (hasattr(factors, "shape") and not factors.shape) or not len(factors):
        raise InputError("factors is empty; it needs at least one matrix")
    found = [jnp.asarray(as_numbers("factors", factor)) for factor in factors]
    shapes = [factor.shape for factor in found]
    if any(len(shape) != 2 for shape in shapes):
        raise InputError(f"factors has shapes {shapes}; each is (rows, columns)")
    for below, above in itertools.pairwise(shapes):
        if above[1] != below[0]:
            raise InputError(
                f"factors has a matrix {above} after one {below}; each has as many columns as the "
                "one before has rows"
            )
    return found


class EndToEnd(NamedTuple):
    """J = D^L W^L … D^1 W^1 = ∂h^L/∂x of one random network, h^L = φ(z^L); its transpose is kept.

    Attributes
    ----------
    transposed
        Shape (n_0, n_L), at a Frobenius norm of 1; 0 where J is.
    log_scale
        Natural logarithm of what it is to be multiplied by; -inf where J is 0.
    alive
        The fewest units of a layer, and of the input, of slope φ' other than 0: J's rank.
    """

    transposed: Float[Array, "n_in n_out"]
    log_scale: Float[Array, ""]
    alive: Int[Array, ""]


def end_to_end(
    network: Network, inputs: Float[Array, "sites n_0"], key: PRNGKeyArray | int
) -> EndToEnd:
    """Return the end-to-end Jacobian of the network that `propagation.propagate` draws densely.

    A pure function: jit it, vmap it. One walk up, with the input's n_0 directions beside the
    signal: each layer's weights are drawn, multiplied by and forgotten. Both signal (where that
    changes no slope) and Jacobian are kept at length 1, so that no depth leaves a float's range.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (1, n_0): one input.
    key
        The network's key.

    Raises
    ------
    InputError
        If there are several inputs.
    """
    inputs, key = as_inputs(inputs, network), as_key(key)
    if inputs.shape[0] != 1:
        raise InputError(f"inputs has {inputs.shape[0]} rows; an end-to-end Jacobian is at one")
    make = Maker("dense", None)
    slope = network.activation.derivative

    def layer(
        state: tuple[Array, Array, Array, Array], key: LayerKey, block: AbstractBlock
    ) -> tuple[tuple[Array, Array, Array, Array], None]:
        signal, v, log, alive = state
        out, (_, _, answers, asked) = _linearised(block, make, signal, key)
        function = functools.partial(linearisation.with_products, block, key)
        v, _ = linearisation.push(function, signal, answers, asked, v)
        v, log = _together_at_length_one(v, log)
        if network.homogeneous:
            out = unit_rows(out)[0] * out.shape[1] ** 0.5
        return (out, v, log, jnp.minimum(alive, jnp.count_nonzero(slope(out)))), None

    n = network.input_width
    v, log = jnp.eye(n, dtype=inputs.dtype)[:, None], jnp.zeros((), inputs.dtype)
    state, first = (inputs, v, log, jnp.asarray(n)), 0
    keys = jax.random.split(key, network.depth + 1)[1:]
    for stage in network.stages:
        of_stage = linearisation.stage_keys(stage, keys[first : first + stage.repeats])
        state, _ = scan_blocks(functools.partial(layer, block=stage.block), state, of_stage)
        first += stage.repeats
    signal, v, log, alive = state
    v, log = _together_at_length_one(v * slope(signal)[None], log)
    return EndToEnd(v[:, 0], log, alive)


def _together_at_length_one(v: Array, log: Array) -> tuple[Array, Array]:
    """Return vectors at one scale, their squares adding up to 1, and add it to a logarithm."""
    row, more = unit_rows(v.reshape(1, -1))
    return row.reshape(v.shape), log + more[0]


def log_frobenius_norm(jacobian: Jacobian) -> Float[Array, ""]:
    """Return log ‖J‖_F, exactly: all of its columns are made, n_l tangents.

    Raises
    ------
    InputError
        If the Jacobian was drawn ``matrix_free`` with places for fewer tangents.
    """
    check_instance("jacobian", jacobian, Jacobian, "what jacobians.draw returns")
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
    the squared norm of what k alternating products with J and Jᵀ make of v. For all powers exactly,
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
    check_instance("jacobian", jacobian, Jacobian, "what jacobians.draw returns")
    powers, probes = check_count("powers", powers), check_count("probes", probes)
    sites, n_in = jacobian.tangent_shape
    v = jax.random.normal(as_key(key), (probes, sites, n_in), jacobian.dtype)
    v, _ = _at_length_one(v, jnp.zeros(probes, v.dtype))
    log = jnp.full(probes, math.log(sites * n_in) / 2, v.dtype)
    logs = []
    for power in range(powers):
        apply = jacobian.transpose_times if power % 2 else jacobian.times
        v, more, jacobian = apply(v)
        log += more
        logs.append(2 * log)
    return LogEstimate.of(jnp.stack(logs, axis=1))


def log_partial_norms(factors: list[Float[Array, "..."]]) -> Float[Array, "l m"]:
    """Return log (1/n_m) ‖∂z^m/∂z^l‖_F² for all pairs of layers, exactly.

    The averaged partial Jacobian norms of Doshi, He & Gromov 2023 (arXiv:2111.12143), here of
    pre-activations: their mean over networks is the product of χ between l and m at infinite width.

    Parameters
    ----------
    factors
        ∂z^1/∂z^0, ∂z^2/∂z^1, …, of any shapes that fit (`layer_jacobians`).

    Returns
    -------
    array
        Shape (L + 1, L + 1), by l and m, both from 0; 0 where m = l, NaN where m < l.
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

    One walk up. With ``matrix_free``, no weights and O(n (L probes)²) operations a layer.

    Parameters
    ----------
    network
        The law of the network.
    inputs
        Shape (sites, n_0); the norm is that of all of them at once, over sites · n_m.
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
    if any(stage.block.pool_factor > 1 for stage in network.stages):
        raise InputError(
            "sampled_partial_norms is of layers with equally many sites, and a layer of this "
            "network merges positions; use it for the convolutions alone"
        )
    probes = check_count("probes", probes)
    make, sites = Maker(chosen_sampler(sampler, network), None), inputs.shape[0]
    keys = jax.random.split(key, network.depth + 1)
    start_keys = jax.random.split(keys[0], network.depth + 1)
    starts = jnp.arange(network.depth + 1)

    def begun(v: Array, log: Array, layer: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        fresh = jax.random.normal(key, (1, *v.shape[1:]), v.dtype)
        unit, _ = _at_length_one(fresh[0], jnp.zeros(probes, v.dtype))
        here = starts == layer
        radius = math.log(sites * v.shape[-1]) / 2
        return (
            jnp.where(here[:, None, None, None], unit[None], v),
            jnp.where(here[:, None], radius, log),
        )

    def layer(state: tuple, parts: tuple, block: AbstractBlock) -> tuple[tuple, Array]:
        signal, v, log = state
        key, start_key, number = parts
        out, (_, _, answers, asked) = _linearised(block, make, signal, key)
        function = functools.partial(linearisation.with_products, block, key)
        pushed, _ = linearisation.push(
            function, signal, answers, asked, v.reshape(-1, sites, v.shape[-1])
        )
        unit, log = _at_length_one(pushed, log.reshape(-1))
        width = out.shape[1]
        unit, log = unit.reshape(*v.shape[:-1], width), log.reshape(v.shape[:2])
        reached = 2 * log - math.log(sites * width)
        return (out, *begun(unit, log, number, start_key)), reached

    none = jnp.zeros((network.depth + 1, probes, sites, network.input_width), inputs.dtype)
    state = (inputs, *begun(none, jnp.full(none.shape[:2], -jnp.inf), starts[0], start_keys[0]))
    norms, first = [], 1
    for stage in network.stages:
        stop = first + stage.repeats
        layer_keys = linearisation.stage_keys(stage, keys[first:stop])
        parts = (layer_keys, start_keys[first:stop], starts[first:stop])
        state, reached = scan_blocks(functools.partial(layer, block=stage.block), state, parts)
        norms.append(reached)
        first = stop
    found = LogEstimate.of(jnp.concatenate(norms).transpose(2, 1, 0))
    return LogEstimate(
        *(_by_pair(one, at) for one, at in zip(found, (0.0, -math.inf), strict=True))
    )


def _by_pair(values: Array, at_coincidence: float) -> Array:
    """Turn (l, m - 1) into (l, m), with NaN below the diagonal."""
    values = jnp.concatenate([values[:, :1], values], axis=1)
    l, m = jnp.indices(values.shape)  # noqa: E741
    return jnp.where(m > l, values, jnp.where(m == l, at_coincidence, jnp.nan))
