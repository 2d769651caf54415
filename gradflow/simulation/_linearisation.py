"""A block linearised at a signal: products with its Jacobian and with the transpose.

A block multiplies by its weight matrices through ``multiply`` alone. With the products W x of its
forward pass as arguments, block(z, products) has ordinary derivatives, and the tangent of a product
is the matrix times the tangent of x. So a Jacobian-vector product is `jax.jvp` of that function
with one product by each matrix, in the order of their use, and a vector-Jacobian product is
`jax.vjp` with one product by each transpose, in the reverse order. Each product comes with a matrix
that remembers it, and that makes the next one: in the same layer, or in the next if they share it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow.blocks import AbstractBlock
from gradflow.ensembles import Distribution
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.simulation import _matrices, _samplers
from gradflow.simulation._layers import LayerKey
from gradflow.simulation._matrices import Drawn, Matrix

__all__ = ["Forward", "MatrixSampler", "Point", "WeightSpec", "apply_block", "forward", "jvp"]
__all__ += ["linearise", "matrix_sampler", "vjp", "weight_matrices", "weight_specs"]


class _Multiply:
    """The ``multiply`` of a block: its products, its biases if they are given, its time step."""

    def __init__(self, product: Callable[..., Array], key: LayerKey) -> None:
        self.product, self.step = product, key.step
        biases = None if key.weights is None else iter(key.weights.biases)
        self.bias: Callable | None = None if biases is None else lambda _: next(biases)

    def __call__(self, key: PRNGKeyArray, x: Array, **law: Any) -> Array:
        return self.product(key, x, **law)


def apply_block(
    block: AbstractBlock, key: LayerKey, signal: Float[Array, "sites n_in"], product: Callable
) -> Float[Array, "sites_out n_out"]:
    """Apply a block with ``product(key, x, sigma_w=…, …)`` for x Wᵀ, and the biases that are given.

    ``product`` takes the arguments of a block's ``multiply``.
    """
    return block.apply(signal, _Multiply(product, key), key.key)


class WeightSpec(NamedTuple):
    """A weight matrix before it is drawn: σ_w/√n_in times entries of variance 1, and μ_w/n_in."""

    key: PRNGKeyArray
    shape: tuple[int, int]  # n_out, n_in
    distribution: Distribution
    dtype: jnp.dtype
    sigma_w: Any
    mu_w: Any
    rows: int  # of what it multiplies


def weight_specs(
    block: AbstractBlock, key: LayerKey, signal: Float[Array, "sites n_in"]
) -> tuple[tuple[WeightSpec, ...], tuple[Array, ...]]:
    """Return the specifications of the block's weight matrices, in order of use, and its biases.

    The block is applied to a signal of this shape, whose values do not matter.
    """
    specs: list[WeightSpec] = []
    biases: list[Array] = []

    def product(
        key: PRNGKeyArray,
        x: Array,
        *,
        sigma_w: Any,
        width: int,
        distribution: Distribution,
        mu_w: Any = None,
        full_input: Array | None = None,
    ) -> Array:
        del full_input
        rows, n_in = x.shape
        specs.append(WeightSpec(key, (width, n_in), distribution, x.dtype, sigma_w, mu_w, rows))
        return jnp.zeros((rows, width), x.dtype)

    recorder = _Multiply(product, key)
    given = recorder.bias

    def bias(draw: Callable[[], Array]) -> Array:
        biases.append(draw() if given is None else given(draw))
        return biases[-1]

    recorder.bias = bias
    block.apply(signal, recorder, key.key)
    return tuple(specs), tuple(biases)


class MatrixSampler(NamedTuple):
    """How weight matrices are made: hashable, so that it is a static argument."""

    sampler: str
    places: tuple[int, int] | None  # of ``matrix_free``: how many products with W and with Wᵀ

    def __call__(self, spec: WeightSpec) -> Matrix:
        """Make the matrix, with entries of variance 1."""
        law = spec.key, spec.shape, spec.distribution, spec.dtype
        if self.sampler == "dense":
            return _matrices.drawn(*law)
        if self.places is None:
            return _matrices.deferred(*law)
        up, down = self.places
        return _matrices.deferred(*law, places=(up * spec.rows, down * spec.rows))


def matrix_sampler(
    sampler: str, network: Network, places: tuple[int, int] | None = None
) -> MatrixSampler:
    """Return the sampler of a network's layers, each with matrices of its own.

    Raises
    ------
    InputError
        If it is ``matrix_free``, and layers share their weights.
    """
    if not network.tied:
        return MatrixSampler(_samplers.choose(sampler, network)[0], places)
    if sampler == "matrix_free":
        raise InputError(
            f"sampler is 'matrix_free', and the time steps of {network.name!r} share their "
            "weights; a Jacobian of such a network takes sampler 'dense' or 'auto'"
        )
    name = _samplers.choose("dense" if sampler == "auto" else sampler, network)[0]
    return MatrixSampler(name, places)


def weight_matrices(
    block: AbstractBlock,
    sampler: MatrixSampler,
    key: LayerKey,
    signal: Float[Array, "sites n_in"],
) -> tuple[Matrix, ...]:
    """Return the block's weight matrices, in the order of their use, not used yet.

    They are those given with the key, or else new ones.
    """
    if key.weights is not None:
        return tuple(map(Drawn, key.weights.matrices))
    return tuple(sampler(spec) for spec in weight_specs(block, key, signal)[0])


class Point(NamedTuple):
    """Where a block is linearised; of equal blocks, with an axis of layers in front."""

    key: LayerKey
    signal: Float[Array, "*layers sites n_in"]
    products: tuple[Float[Array, "*layers sites _"], ...]  # by its weight matrices, at the signal


class Forward(NamedTuple):
    """A block's forward pass."""

    out: Float[Array, "sites_out n_out"]
    point: Point
    inputs: tuple[Float[Array, "sites _"], ...]  # x of each W x; the full input of a part of W
    matrices: tuple[Matrix, ...]  # which remember the products


def forward(
    block: AbstractBlock,
    key: LayerKey,
    signal: Float[Array, "sites n_in"],
    matrices: tuple[Matrix, ...],
) -> Forward:
    """Apply a block with these weight matrices."""
    products: list[Array] = []
    inputs: list[Array] = []
    used: list[Matrix] = []

    def product(
        _: PRNGKeyArray, x: Array, *, sigma_w: Any, full_input: Array | None = None, **law: Any
    ) -> Array:
        out, matrix = matrices[len(products)].times(_scaled(key, sigma_w, x))
        products.append(out)
        inputs.append(x if full_input is None else full_input)
        used.append(matrix)
        return _with_mean(key, out, x, law)

    out = apply_block(block, key, signal, product)
    return Forward(out, Point(key, signal, tuple(products)), tuple(inputs), tuple(used))


def linearise(
    block: AbstractBlock,
    sampler: MatrixSampler,
    key: LayerKey,
    signal: Float[Array, "sites n_in"],
) -> Forward:
    """Make a block's weight matrices, or take those that are given, and apply it."""
    return forward(block, key, signal, weight_matrices(block, sampler, key, signal))


def _scaled(key: LayerKey, sigma_w: Any, x: Array) -> Array:
    """Scale a vector for a matrix of entries of variance 1; given weights have their scale."""
    if key.weights is not None:
        return x
    return jnp.asarray(sigma_w, x.dtype) / x.shape[-1] ** 0.5 * x


def _with_mean(key: LayerKey, product: Array, x: Array, law: dict[str, Any]) -> Array:
    """Add the product with the mean of the weights, which given weights have in them."""
    return product if key.weights is not None else _samplers.with_mean(product, x, law.get("mu_w"))


def _of_products(block: AbstractBlock, key: LayerKey) -> Callable:
    """Return the function (signal, products) -> (output, what each matrix multiplies)."""

    def function(signal: Array, products: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        remaining, inputs = iter(products), []

        def product(_: PRNGKeyArray, x: Array, *, sigma_w: Any, **law: Any) -> Array:
            inputs.append(_scaled(key, sigma_w, x))
            return _with_mean(key, next(remaining), x, law)

        return apply_block(block, key, signal, product), tuple(inputs)

    return function


def _times(matrix: Matrix, x: Float[Array, "k sites n"]) -> tuple[Array, Matrix]:
    """Multiply every site of several vectors by one matrix, all together."""
    out, matrix = matrix.times(x.reshape(-1, x.shape[-1]))
    return out.reshape(*x.shape[:-1], -1), matrix


def jvp(
    block: AbstractBlock,
    point: Point,
    matrices: tuple[Matrix, ...],
    tangents: Float[Array, "k sites n_in"],
) -> tuple[Float[Array, "k sites_out n_out"], tuple[Matrix, ...]]:
    """Jacobian-vector products: J v of a block for each tangent v.

    Returns
    -------
    tuple
        The tangents of the block's output, and the matrices that remember the products.
    """
    function = _of_products(block, point.key)
    at = (point.signal, point.products)

    def derivative(tangent: Array, of_products: tuple[Array, ...]) -> tuple:
        return jax.jvp(function, at, (tangent, of_products))[1]

    of_products = [jnp.zeros((len(tangents), *out.shape), out.dtype) for out in point.products]
    used: list[Matrix] = []
    for index, matrix in enumerate(matrices):
        of_input = jax.vmap(derivative)(tangents, tuple(of_products))[1][index]
        of_products[index], matrix = _times(matrix, of_input)
        used.append(matrix)
    return jax.vmap(derivative)(tangents, tuple(of_products))[0], tuple(used)


def vjp(
    block: AbstractBlock,
    point: Point,
    matrices: tuple[Matrix, ...],
    cotangents: Float[Array, "k sites_out n_out"],
) -> tuple[Float[Array, "k sites n_in"], tuple[Matrix, ...], tuple[Array, ...]]:
    """Vector-Jacobian products: Jᵀ u of a block for each cotangent u.

    Returns
    -------
    tuple
        The cotangents of the block's signal, the matrices that remember the products, and the
        cotangents of each product W x, (k, sites, units).
    """
    (_, inputs), pull = jax.vjp(_of_products(block, point.key), point.signal, point.products)
    of_inputs = [jnp.zeros((len(cotangents), *x.shape), x.dtype) for x in inputs]
    used: list[Matrix] = []
    for index in reversed(range(len(matrices))):
        of_product = jax.vmap(pull)((cotangents, tuple(of_inputs)))[1][index]
        of_inputs[index], matrix = _times(matrices[index].T, of_product)
        used.insert(0, matrix.T)
    below, of_products = jax.vmap(pull)((cotangents, tuple(of_inputs)))
    return below, tuple(used), of_products
