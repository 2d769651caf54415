"""Gradients through weights whose mean is not 0, in a chain of dense layers.

W = W̃ + (μ_w/n) 11ᵀ takes a mean over units by itself: going down, with r = n'/n the widths' ratio,

    δ_j = φ'(z_j) (ε_j + c),    ε_j ~ N(0, σ_w² r g'),    c = μ_w r d',

g' the mean square and d' the mean over units of the gradient above. Over networks d' is random:
√D' ξ with ξ normal, D' = 1/n' at the top. With g' = a' + b' ξ²,

    g = E[φ'²] (σ_w² r (a' + b' ξ²) + (μ_w r)² D' ξ²),
    D = K + (E[g] - K)/n,    K = (E[φ'] μ_w r)² D',

and d has the correlation ρ = √(K/D) with ξ, which is 1 up to 1/n where μ_w² is large beside 1; of
g as a function of the new ξ the mean is kept. For μ_w of order 1 it is the usual χ up to a share
of 1/n; for μ_w of order √n and more, as of weights of a fixed mean, both terms count, and
E log ‖δ‖² is not the logarithm of the mean square at any width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow import activations, gaussian
from gradflow.activations import Activation
from gradflow.blocks import Dense, Linear
from gradflow.kernels import Kernel, Shifted
from gradflow.networks import Network
from gradflow.statistics import BackwardLimit
from gradflow.theory._loops import map_layers

__all__ = ["down_about_means", "has_means", "is_chain", "settled"]

# The share of a second moment that the fluctuation of a mean over units may be: above it, the mean
# is no number but a random one.
_MOST_FLUCTUATION = 0.1


def has_means(network: Network) -> bool:
    """Whether some weights have a mean."""
    blocks = (block for stage in network.stages for block in stage.block.nested)
    return any(getattr(block, "mu_w", None) is not None for block in blocks)


def is_chain(network: Network) -> bool:
    """Whether all blocks are dense layers."""
    return all(isinstance(stage.block, Dense | Linear) for stage in network.stages)


def _numbers(network: Network, name: str, like: Array) -> Float[Array, "layers 1"]:
    """A scale of each layer, 0 where it has none."""
    values = [getattr(stage.block, name) for stage in network.stages]
    each = jnp.stack([jnp.asarray(0 if v is None else v, like.dtype) for v in values])
    repeats = np.array([stage.repeats for stage in network.stages])
    return jnp.repeat(each, repeats, total_repeat_length=network.depth)[:, None]


def _activation(network: Network, number: int) -> Activation:
    block = network.stages[number].block
    return block.activation if isinstance(block, Dense) else activations.linear


def _moment(kernel: Kernel, phi: Activation, name: str) -> Float[Array, " sites"]:
    """A moment of φ(z) or of its slope, of signals that are Gaussian, about means or not."""
    q, law = jnp.diagonal(kernel.covariance), kernel.distribution
    if phi == activations.linear:
        return {"phi": kernel.mean, "phi2": q}.get(name, jnp.ones_like(q))
    if isinstance(law, Shifted):
        v = jnp.diagonal(law.gaussian_part(kernel.covariance))
        found = gaussian.shifted_moment(phi, name, law.shifts, law.chances, v)
    else:
        found = gaussian.moment(phi, name, q)
    at_zero = (phi if name.startswith("phi") else phi.derivative)(jnp.zeros_like(q))
    return jnp.where(q == 0, at_zero**2 if name.endswith("2") else at_zero, found)


def _moments(network: Network, entering: list[Kernel], name: str) -> Float[Array, "layers sites"]:
    """A moment at every block's input; NaN beyond the range of averages but for homogeneous φ."""
    every = []
    for number, kernels in enumerate(entering):
        phi = _activation(network, number)

        def at(kernel: Kernel, phi: Activation = phi) -> Array:
            found = _moment(kernel, phi, name)
            power = {"phi": 1.0, "phi2": 2.0}.get(name, 0.0)
            beyond = jnp.nan if not phi.homogeneous else jnp.exp(power * kernel.log_scale)
            return jnp.where(kernel.log_scale == 0, found, found * beyond)

        every.append(map_layers(at, kernels))
    return jnp.concatenate(every)


def settled(network: Network, entering: list[Kernel], log_q: Float[Array, "layers sites"]) -> Array:
    """Whether each layer's signals are known: (layers,), of those and all below.

    Where E[h] is small beside √(Var h/n), a mean over units is another number in each network.
    """
    mean, square = (_moments(network, entering, name) for name in ("phi", "phi2"))
    n_in = jnp.asarray(np.array(network.widths[:-1], float), mean.dtype)[:, None]
    noise = _numbers(network, "mu_w", mean) ** 2 * jnp.maximum(square - mean**2, 0) / n_in
    small = jnp.all(noise <= _MOST_FLUCTUATION * jnp.exp(log_q), axis=1)
    # Inputs are given: their means are what they are.
    return jnp.cumprod(small.at[0].set(True)).astype(bool)


def down_about_means(network: Network, entering: list[Kernel]) -> BackwardLimit:
    """The limit of the gradient at every layer."""
    names = ("dphi2", "dphi", "phi2")
    p, m, square = (_moments(network, entering, name) for name in names)
    widths = np.array(network.widths[1:], float)
    ratio = jnp.asarray(widths[1:] / widths[:-1], p.dtype)[:, None]
    below = jnp.asarray(widths[:-1], p.dtype)[:, None]
    sigma2 = _numbers(network, "sigma_w", p)[1:] ** 2 * ratio
    mu2 = (_numbers(network, "mu_w", p)[1:] * ratio) ** 2
    xi, chance = gaussian.nodes(jnp.ones((), p.dtype))
    xi = jnp.where(chance > 0, xi, 1)  # a panel without width has nodes at 0

    def over_xi(values: Float[Array, "nodes sites"]) -> Float[Array, " sites"]:
        return jnp.matmul(chance, values, precision="highest")

    def size(a: Array, b: Array) -> Float[Array, "nodes sites"]:
        return a[None] + b[None] * jnp.square(xi)[:, None]

    def step(carry: tuple[Array, ...], layer: tuple[Array, ...]) -> tuple[Any, Any]:
        (a, b, d2, log), (p, m, sigma2, mu2, n) = carry, layer
        now_a, now_b = p * sigma2 * a, p * (sigma2 * b + mu2 * d2)
        total, kept = now_a + now_b, m**2 * mu2 * d2
        now_d2 = kept + jnp.maximum(total - kept, 0) / n
        rho2 = kept / jnp.where(now_d2 > 0, now_d2, 1)
        now = (now_a + (1 - rho2) * now_b, rho2 * now_b, now_d2)
        chi = over_xi(size(now_a, now_b) / size(a, b))
        some = jnp.where(total > 0, total, 1)
        spread = over_xi(jnp.log(size(now_a / some, now_b / some)))
        log = log + jnp.log(total)
        out = (log, jnp.log(chi), jnp.where(total > 0, spread, 0))
        return (*(x / some for x in now), log), out

    one = jnp.ones_like(p[0])
    top = (one, 0 * one, one / widths[-1], 0 * one)
    layers = (p[1:], m[1:], sigma2, mu2, below)
    log, log_chi, spread = jax.lax.scan(step, top, layers, reverse=True)[1]
    log_variance = jnp.concatenate([log, 0 * one[None]])
    log_weight = jax.nn.logsumexp(log_variance + jnp.log(square), axis=1)
    return BackwardLimit(
        log_variance,
        jnp.concatenate([log_chi, jnp.full_like(one[None], jnp.nan)]),
        log_weight - 2 * np.log(p.shape[1]),
        jnp.asarray(widths, p.dtype),
        log_spread=jnp.concatenate([spread, 0 * one[None]]),
    )
