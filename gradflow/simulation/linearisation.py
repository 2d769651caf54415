"""A block as questions to its random matrices, and what their answers make of it.

How a block is linearised. Its random matrices enter through ``multiply`` alone. With what they
answered at z put in, block(z, answers) has ordinary derivatives, and the matrices are linear: the
tangent of an answer is the matrix times the tangent of what it was asked. So a push is `jax.jvp`
with one question to each matrix, in the order of their use, and a pull is `jax.vjp` with one
question to each transpose, in the reverse order. Every question comes back with a matrix that
remembers it, which the next one is put to: by the same layer, or by the next one if they share it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gradflow.blocks import AbstractBlock
from gradflow.ensembles import Distribution
from gradflow.networks import Stage
from gradflow.simulation import _matrices
from gradflow.simulation._matrices import Matrix

__all__ = [
    "Applied",
    "Law",
    "LayerKey",
    "LayerWeights",
    "Maker",
    "ask",
    "blockwise",
    "with_products",
]
__all__ += ["laws", "made", "pull", "push", "stage_keys"]


class LayerWeights(NamedTuple):
    """The parameters of a layer, or with an axis of layers in front, in the order of their use."""

    matrices: tuple[Float[Array, "*layers n_out n_in"], ...]  # W itself, σ_w/√n_in and all
    biases: tuple[Float[Array, "*layers 1 n_out"], ...]


class LayerKey(NamedTuple):
    """What a layer draws from: the key of its weights and biases and, if it is tied, its step.

    Or does not, where its weights are given: then the key is for what is no parameter.
    """

    key: Array  # one, or with an axis of layers
    step: Int[Array, "*layers"] | None = None
    given: LayerWeights | None = None  # of a tied layer, the biases only


def stage_keys(stage: Stage, keys: Array, given: LayerWeights | None = None) -> LayerKey:
    """Return what each layer of a stage draws from, with an axis of layers.

    ``keys`` is one for each layer; a tied stage has the first one's weights at all of its steps.
    Those that are ``given`` have an axis of layers unless the stage is tied.
    """
    if not stage.tied:
        return LayerKey(keys, given=given)

    def at_each_step(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (stage.repeats, *leaf.shape))

    biases = None if given is None else LayerWeights((), jax.tree.map(at_each_step, given.biases))
    return LayerKey(at_each_step(keys[0]), jnp.arange(stage.repeats), biases)


class Maker(NamedTuple):
    """How a sampler makes a random matrix: a function that can be told from others."""

    sampler: str
    places: tuple[int, int] | None

    def __call__(self, *law: Any) -> Matrix:
        """Return the matrix of this key, shape, distribution and dtype."""
        if self.sampler == "dense":
            return _matrices.drawn(*law)
        return _matrices.deferred(*law, places=self.places)


class _Multiply:
    """What a block multiplies with: an answer to each question, biases, the time step it is."""

    def __init__(self, answer: Callable[..., Array], key: LayerKey) -> None:
        self.answer, self.step = answer, key.step
        biases = None if key.given is None else iter(key.given.biases)
        self.bias: Callable | None = None if biases is None else lambda _: next(biases)

    def __call__(self, key: PRNGKeyArray, x: Array, **law: Any) -> Array:
        return self.answer(key, x, **law)


def blockwise(
    block: AbstractBlock, key: LayerKey, signal: Float[Array, "sites n_in"], answer: Callable
) -> Float[Array, "sites_out n_out"]:
    """Apply a block whose random matrices answer so, with the biases that are given, if any."""
    return block.apply(signal, _Multiply(answer, key), key.key)


def _scaled(key: LayerKey, sigma_w: Any, x: Array) -> Array:
    """Return what a matrix is asked: weights that are given have their scale already."""
    if key.given is not None:
        return x
    return jnp.asarray(sigma_w, x.dtype) / x.shape[-1] ** 0.5 * x


class Law(NamedTuple):
    """How a random matrix is drawn, and what it is then multiplied by, but for 1/√n_in."""

    key: PRNGKeyArray
    shape: tuple[int, int]  # n_out, n_in
    distribution: Distribution
    dtype: jnp.dtype
    sigma_w: Any


def laws(
    block: AbstractBlock, key: LayerKey, signal: Float[Array, "sites n_in"]
) -> tuple[tuple[Law, ...], tuple[Array, ...]]:
    """Return the laws of the block's random matrices, in the order of their use, and its biases.

    By applying it to a signal of this shape, whose values do not matter.
    """
    found: list[Law] = []
    biases: list[Array] = []

    def multiply(
        key: PRNGKeyArray,
        x: Array,
        *,
        sigma_w: Any,
        width: int,
        distribution: Distribution,
        full_input: Array | None = None,
    ) -> Array:
        del full_input
        found.append(Law(key, (width, x.shape[1]), distribution, x.dtype, sigma_w))
        return jnp.zeros((x.shape[0], width), x.dtype)

    recorder = _Multiply(multiply, key)
    given = recorder.bias

    def bias(draw: Callable[[], Array]) -> Array:
        biases.append(draw() if given is None else given(draw))
        return biases[-1]

    recorder.bias = bias
    block.apply(signal, recorder, key.key)
    return tuple(found), tuple(biases)


def made(
    block: AbstractBlock, make: Maker, key: LayerKey, signal: Float[Array, "sites n_in"]
) -> tuple[Matrix, ...]:
    """Return the random matrices that the block multiplies with, not asked yet."""
    return tuple(
        make(law.key, law.shape, law.distribution, law.dtype) for law in laws(block, key, signal)[0]
    )


class Applied(NamedTuple):
    """A block that has asked its matrices."""

    out: Float[Array, "sites n_out"]
    answers: tuple[Float[Array, "sites _"], ...]
    questions: tuple[Float[Array, "sites _"], ...]  # the x of W x, or all that W is part of sees
    matrices: tuple[Matrix, ...]


def ask(
    block: AbstractBlock,
    key: LayerKey,
    signal: Float[Array, "sites n_in"],
    known: tuple[Matrix, ...],
) -> Applied:
    """Apply a block with these random matrices."""
    answers: list[Array] = []
    questions: list[Array] = []
    remembered: list[Matrix] = []

    def multiply(
        _: PRNGKeyArray, x: Array, *, sigma_w: Any, full_input: Array | None = None, **law: Any
    ) -> Array:
        del law
        answer, matrix = known[len(answers)].times(_scaled(key, sigma_w, x))
        answers.append(answer)
        questions.append(x if full_input is None else full_input)
        remembered.append(matrix)
        return answer

    out = blockwise(block, key, signal, multiply)
    return Applied(out, tuple(answers), tuple(questions), tuple(remembered))


def with_products(
    block: AbstractBlock, key: LayerKey, signal: Array, answers: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """Apply the block with these answers of its matrices; return its output and what they got."""
    given, asked = iter(answers), []

    def multiply(_: PRNGKeyArray, x: Array, *, sigma_w: Any, **law: Any) -> Array:
        del law
        asked.append(_scaled(key, sigma_w, x))
        return next(given)

    return blockwise(block, key, signal, multiply), tuple(asked)


def _ask(matrix: Matrix, x: Array) -> tuple[Array, Matrix]:
    """Ask one matrix for every site of several vectors, (k, sites, n), jointly."""
    answer, matrix = matrix.times(x.reshape(-1, x.shape[-1]))
    return answer.reshape(*x.shape[:-1], -1), matrix


def push(
    function: Callable, signal: Array, answers: tuple, asked: tuple[Matrix, ...], tangents: Array
) -> tuple[Array, tuple[Matrix, ...]]:
    """Return what a `with_products` block makes of tangents, (k, sites, n), and its matrices."""

    def derivative(tangent: Array, changes: tuple[Array, ...]) -> tuple:
        return jax.jvp(function, (signal, answers), (tangent, changes))[1]

    changes = [jnp.zeros((len(tangents), *answer.shape), answer.dtype) for answer in answers]
    remembered: list[Matrix] = []
    for index, matrix in enumerate(asked):
        inside = jax.vmap(derivative)(tangents, tuple(changes))[1][index]
        changes[index], matrix = _ask(matrix, inside)
        remembered.append(matrix)
    return jax.vmap(derivative)(tangents, tuple(changes))[0], tuple(remembered)


def pull(
    function: Callable, signal: Array, answers: tuple, asked: tuple[Matrix, ...], cotangents: Array
) -> tuple[Array, tuple[Matrix, ...], tuple[Array, ...]]:
    """Return what a `with_products` block makes of cotangents, (k, sites, n), and its matrices.

    And ∂C/∂(W x) of each matrix, (k, sites, units).
    """
    (_, inside), back = jax.vjp(function, signal, answers)
    pulled = [jnp.zeros((len(cotangents), *x.shape), x.dtype) for x in inside]
    remembered: list[Matrix] = []
    for index in reversed(range(len(asked))):
        changes = jax.vmap(back)((cotangents, tuple(pulled)))[1][index]
        pulled[index], matrix = _ask(asked[index].T, changes)
        remembered.insert(0, matrix.T)
    below, deltas = jax.vmap(back)((cotangents, tuple(pulled)))
    return below, tuple(remembered), deltas
