"""Samplers: how a product with a random weight matrix is drawn.

A sampler is one function ``multiply(key, x, tap, …)`` that returns x Wᵀ for a random W of shape
(n_out, n_in), with a rule for pulling a gradient Δ back to Δ W. There are two, and `given`, which
draws nothing: for networks that have been trained.

`dense` draws every weight. This is how anybody would do it, and it works for every ensemble.

`matrix_free` never draws W, and is *exact* all the same, for independent Gaussian and for
Haar-orthogonal weights: it multiplies by a matrix that is decided only as far as products need it
(`gradflow.simulation._matrices`), once in the forward and once in the backward pass. A layer costs
O(n sites²) instead of O(n²), with the same joint law of all activations and gradients. That law is
of *one* pull-back of all sites together: the backward rule may be applied once for each application
of the forward one. A second pull-back through the same weights would have to remember the first
one's product, as `gradflow.simulation.jacobians` does, and `gradflow.simulation.propagation` where
the time steps of a stage share their weights: T steps take 2T products of each matrix, at a cost of
O(n T² sites²) without the weights and of O(n² T sites) with them.

In all, ``tap`` is a (sites, sites) array of zeros whose cotangent is *defined* as
(Δ Δᵀ) ∘ (x xᵀ): the sum of its entries is ‖Δᵀ x‖_F², the squared norm of ∂C/∂W. That is how a
weight gradient is measured without the weights. Where W is a part of a larger matrix whose other
entries are zero, ``full_input`` is what the larger matrix multiplies, and it replaces x in this.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow._checks import unknown_name
from gradflow.ensembles import Distribution
from gradflow.networks import Network
from gradflow.simulation import _matrices
from gradflow.simulation._matrices import Matrix

__all__ = ["SAMPLERS", "choose", "dense", "given", "matrix_free", "seconds", "with_mean"]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def dense(
    key: PRNGKeyArray,
    x: Float[Array, "sites n_in"],
    tap: Float[Array, "sites sites"],
    *,
    sigma_w: ScalarLike,
    width: int,
    distribution: Distribution,
    mu_w: ScalarLike | None = None,
    full_input: Float[Array, "sites n_all"] | None = None,
) -> Float[Array, "sites width"]:
    """Return x Wᵀ with W drawn: any law, entries of mean μ_w/n_in and variance σ_w²/n_in."""
    matrix = _matrices.redrawn(key, (width, x.shape[1]), distribution, x.dtype)
    return _scaled(matrix, sigma_w, mu_w, x, tap, full_input)


def matrix_free(
    key: PRNGKeyArray,
    x: Float[Array, "sites n_in"],
    tap: Float[Array, "sites sites"],
    *,
    sigma_w: ScalarLike,
    width: int,
    distribution: Distribution,
    mu_w: ScalarLike | None = None,
    full_input: Float[Array, "sites n_all"] | None = None,
) -> Float[Array, "sites width"]:
    """Return x Wᵀ in law, exactly, without W: entries of mean μ_w/n_in and variance σ_w²/n_in.

    Raises
    ------
    InputError
        If the distribution is neither of independent Gaussian entries nor Haar-orthogonal.
    """
    matrix = _matrices.deferred(key, (width, x.shape[1]), distribution, x.dtype)
    return _scaled(matrix, sigma_w, mu_w, x, tap, full_input)


def given(weights: Sequence[Float[Array, "_ _"]]) -> Callable[..., Array]:
    """Return the sampler whose products are with these matrices, one after the other."""
    remaining = iter(weights)

    def multiply(
        key: PRNGKeyArray,  # noqa: ARG001
        x: Float[Array, "sites n_in"],
        tap: Float[Array, "sites sites"],
        *,
        full_input: Float[Array, "sites n_all"] | None = None,
        **law: Any,  # noqa: ARG001
    ) -> Float[Array, "sites n_out"]:
        return _tapped(_matmul(x, next(remaining).T), x if full_input is None else full_input, tap)

    return multiply


@jax.custom_vjp
def _product(matrix: Matrix, x: Array) -> Array:
    return matrix.times(x)[0]


def _product_forward(matrix: Matrix, x: Array) -> tuple[Array, tuple[Matrix]]:
    out, matrix = matrix.times(x)
    return out, (matrix,)


def _product_backward(residual: tuple[Matrix], delta: Array) -> tuple[None, Array]:
    (matrix,) = residual
    return None, matrix.T.times(delta)[0]


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _tapped(out: Array, x: Array, tap: Array) -> Array:  # noqa: ARG001
    return out


def _tapped_forward(out: Array, x: Array, tap: Array) -> tuple[Array, Array]:  # noqa: ARG001
    return out, x


def _tapped_backward(x: Array, delta: Array) -> tuple[Array, None, Array]:
    return delta, None, _matmul(delta, delta.T) * _matmul(x, x.T)


_tapped.defvjp(_tapped_forward, _tapped_backward)


def _scaled(
    matrix: Matrix,
    sigma_w: ScalarLike,
    mu_w: ScalarLike | None,
    x: Array,
    tap: Array,
    full_input: Array | None,
) -> Array:
    """Scale a product with entries of variance 1; the tap is that of the scaled weights.

    It is put behind the scale, so that weights of scale 0 have a gradient, as they do.
    """
    scale = jnp.asarray(sigma_w, x.dtype) / x.shape[1] ** 0.5
    out = with_mean(scale * _product(matrix, x), x, mu_w)
    return _tapped(out, x if full_input is None else full_input, tap)


def with_mean(
    product: Float[Array, "sites n"], x: Float[Array, "sites n_in"], mu_w: ScalarLike | None
) -> Float[Array, "sites n"]:
    """The product with weights of mean 0, and that with their mean μ_w/n_in, if there is one."""
    if mu_w is None:
        return product
    return product + jnp.asarray(mu_w, x.dtype) * jnp.mean(x, axis=-1, keepdims=True)


SAMPLERS: dict[str, Callable[..., Array]] = {"dense": dense, "matrix_free": matrix_free}


# Nanoseconds on one core of a CPU, measured: for drawing an entry in both passes and multiplying
# one input by it; for a unit in matrix_free's operations, of each pair of inputs and of each input.
_DRAWN, _MULTIPLIED = 2.5, 0.06
_PER_PAIR, _PER_INPUT = 0.7, 6.0
# Of weights that time steps share: for reading an entry at a step, both ways, and multiplying an
# input by it; and for the operations of matrix_free on a unit of each pair of products.
_READ, _READ_BY_INPUT, _PER_REMEMBERED = 2.0, 1.0, 10.0


def choose(name: str, network: Network, sites: int = 1) -> tuple[str, str]:
    """Return the sampler's name and the reason for it; ``"auto"`` is decided by law and cost.

    Where the law leaves both, a layer of n units costs ``dense`` n² random numbers and products
    with each input, and ``matrix_free`` n products of each pair of inputs: it is the slower one for
    more than about n/8 of them.

    Parameters
    ----------
    name
        ``"dense"``, ``"matrix_free"`` or ``"auto"``.
    network
        The law of the network.
    sites
        The number of inputs, or of tangents and cotangents, that each matrix multiplies.

    Raises
    ------
    InputError
        If the name is unknown, or ``matrix_free`` cannot draw the weights.
    """
    if name == "auto":
        if not network.rotation_invariant:
            return "dense", "weights neither Gaussian nor orthogonal, so that each must be drawn"
        if not network.iid_gaussian and not network.tied:
            return "matrix_free", "orthogonal weights: exact without drawing them"
        drawn, free = seconds("dense", network, sites), seconds("matrix_free", network, sites)
        if drawn < free:
            return "dense", (
                f"with {sites} inputs, drawing all weights takes {drawn / free:.2g} of the "
                "operations of drawing none"
            )
        kind = "Gaussian" if network.iid_gaussian else "orthogonal"
        return "matrix_free", (
            f"{kind} weights: exact without drawing them, in {free / drawn:.2g} of the operations"
        )
    if not isinstance(name, str) or name not in SAMPLERS:
        raise unknown_name("sampler", name, [*SAMPLERS, "auto"])
    if name == "matrix_free" and not network.rotation_invariant:
        laws = (d for s in network.stages for d in s.block.distributions)
        raise _matrices.not_invariant(next(law for law in laws if not law.rotation_invariant))
    return name, "as asked"


def seconds(name: str, network: Network, sites: int) -> float:
    """Estimate how long a sampler takes for one network, in seconds on one core of a CPU.

    Layers that share their weights multiply by the same matrices: ``dense`` draws them once, and
    ``matrix_free`` compares each vector with all before.
    """
    total, first, every = 0.0, 0, network.shapes
    for stage in network.stages:
        layers = every[first : first + stage.repeats]
        first += stage.repeats
        shapes = np.array([shape for layer in layers for shape in layer], float).reshape(-1, 2)
        products, units = float(np.sum(np.prod(shapes, axis=1))), float(np.sum(shapes)) / 2
        if stage.tied and name == "matrix_free":
            total += units * _PER_REMEMBERED * stage.repeats * sites**2
        elif stage.tied:
            drawn = _DRAWN / (2 * stage.repeats)
            total += products * (drawn + _READ + _READ_BY_INPUT * sites)
        elif name == "matrix_free":
            total += units * (_PER_INPUT * sites + _PER_PAIR * sites**2)
        else:
            total += products * (_DRAWN + _MULTIPLIED * sites)
    return 1e-9 * total
