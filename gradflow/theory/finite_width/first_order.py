"""Corrections: what finite width does to every statistic, to first order in 1/n.

A network with independent Gaussian weights is a Markov chain in the second moments of its signals.
Given Σ^l, the covariance of z^l over weights and biases alone, layer l's units are independent, and

    Σ^{l+1} = σ_b² 11ᵀ + (σ_w²/n_l) Σ_i φ(z_i) φ(z_i)ᵀ,      z_i ~ N(0, Σ^l),

is a mean over n_l units. It fluctuates by O(1/√n); through the curvature of the map, fluctuations
move means by O(1/n). The way down is the same chain: J = ∂z^L/∂z^l and Jᵀ have the same singular
values, so that ‖Jᵀδ‖² with δ ~ N(0, I) has the law of ‖J u‖² with u ~ N(0, I), and that is a
tangent (z, ż) that starts at layer l and goes up: f = (φ(z), φ'(z) ż) in place of φ(z). Weights
meet what they act on once, on the way up: none is taken for independent that is not.

Everything is linear in what happens at each layer: effects are summed with the sensitivities of
the top to each layer, which one walk down gives for all l at once. Gradients' moments are summed
as logarithms, which is exact for ReLU and linear networks (their log is a sum over layers) and has
the log-normal limit where depth/width is not small (Hanin & Nica 2018, arXiv:1812.05994).

References: Roberts, Yaida & Hanin 2022, 'The Principles of Deep Learning Theory', ch. 4 (one
input's forward fluctuations) and ch. 9 (gradients'); Hanin & Nica 2020, arXiv:1909.05989.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow import statistics
from gradflow._first_order import (
    FiniteLayers,
    FirstOrder,
    Fluctuation,
    GradientFluctuation,
    PairFluctuation,
    diagonal,
    outer,
)
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.predictions import Corrections
from gradflow.theory._limits import limits
from gradflow.theory.finite_width._layers import covers, finite_layers

__all__ = ["correct", "correct_layers"]


def correct(network: Network, gram: Float[ArrayLike, "sites sites"]) -> Corrections:
    """The shift of every statistic's mean, and its standard deviation between networks.

    A pure function; float64 is needed (differences of averages). Good to a relative depth/width.

    Parameters
    ----------
    network
        Dense layers with independent Gaussian weights.
    gram
        Shape (sites, sites), (1/n_0) x_a · x_b; see `mean_field.input_gram`.

    Returns
    -------
    Corrections
        Each of shape (layers,). NaN are ``correlation`` and every standard deviation where pairs of
        inputs times layers are more than 4000, the standard deviation of ``correlation`` for more
        than two inputs, and that of ``saturation`` where φ' oscillates.

    Raises
    ------
    InputError
        If the network is of another kind.
    """
    if not covers(network):
        raise InputError(
            f"network is {network.name!r}; corrections are known for dense layers with "
            "independent Gaussian weights, which no two of them share"
        )
    return correct_layers(finite_layers(network, *limits(network, gram)))


def correct_layers(layers: FiniteLayers) -> Corrections:
    """What `correct` computes, from the layers' averages: one program for all activations.

    Parameters
    ----------
    layers
        Of `_layers.finite_layers`, which depends on the activation.
    """
    v = _signals(layers)
    pairs = None if layers.averages.pairs is None else _pairs(layers, v)
    finite = FirstOrder(layers, v, _gradients(layers, v), pairs)
    unknown = jnp.full(len(layers.q), jnp.nan, layers.q.dtype)
    shifts: dict[str, Array | np.ndarray] = {}
    deviations: dict[str, Array | np.ndarray] = {}
    for statistic in statistics.ALL:
        if statistic.sites > layers.q.shape[1]:
            continue
        shift, variance = statistic.correct(finite) if statistic.correct else (unknown, unknown)
        shifts[statistic.key] = shift
        deviations[statistic.key] = jnp.sqrt(jnp.expm1(variance) if statistic.log else variance)
    return Corrections(shifts, deviations)


def _signals(layers: FiniteLayers) -> Fluctuation:
    """Follow the conditional variance v of each input up the layers."""
    w2, n, k = layers.sigma_w2, layers.width, layers.covariance
    f = layers.averages.phi2
    noise = (
        outer(w2[1:], w2[1:])
        * (layers.averages.product("phi2", "phi2") - outer(f.value, f.value))[:-1]
        / n[:-1, :, None]
    )
    by_v = w2[1:] * f.first[:-1]
    bend = w2[1:] * f.second[:-1] / 2

    def step(state: tuple[Array, Array], layer: tuple) -> tuple[tuple[Array, Array], tuple]:
        shift, covariance = state
        noise, by_v, bend = layer
        after = (
            by_v * shift + bend * jnp.diagonal(covariance),
            by_v[:, None] * by_v[None, :] * covariance + noise,
        )
        return after, state

    # The input is given: layer 1's v is exact.
    start = (jnp.zeros_like(k[0, 0]), jnp.zeros_like(k[0]))
    last, below = jax.lax.scan(step, start, (noise, by_v, bend))
    return Fluctuation(*(jnp.concatenate([x, y[None]]) for x, y in zip(below, last, strict=True)))


def _pairs(layers: FiniteLayers, v: Fluctuation) -> PairFluctuation:
    """Follow c' = σ_w² κ(v_a, v_b, c) + σ_b² with κ = E[φ(z_a) φ(z_b)], and v_a and v_b beside it.

    The derivatives of κ are averages of those of φ (Price's theorem), of which integration by parts
    leaves no higher ones than φ''.
    """
    n, k = layers.width, layers.covariance
    q, averages = layers.q, layers.averages
    a, b = np.triu_indices(q.shape[1], 1)
    w_a, w_b = layers.sigma_w2[:, a], layers.sigma_w2[:, b]
    w2 = jnp.stack([w_a, w_b, jnp.sqrt(w_a * w_b)], axis=-1)
    moments = jnp.stack([q[:, a], q[:, b], k[:, a, b]], axis=-1)
    q_a, q_b, c = jnp.moveaxis(moments, -1, 0)
    pair = averages.pair

    def first_of(along: Array, across: Array, q: Array) -> Array:
        return (along - c * across) / (2 * q)  # ∂/∂q E[f g] from E[x f' g] and E[f' g']

    slope, bend = pair("dphi", "dphi"), pair("ddphi", "ddphi")
    by_a = first_of(pair("x_dphi", "phi"), slope, q_a)
    by_b = first_of(pair("phi", "x_dphi"), slope, q_b)
    slope_by_a = first_of(pair("x_ddphi", "dphi"), bend, q_a)
    slope_by_b = first_of(pair("dphi", "x_ddphi"), bend, q_b)
    # Of E[x φ' φ], by the same rule: (x φ')' = φ' + x φ''.
    along_a = first_of(
        pair("x_dphi", "phi") + pair("x2_ddphi", "phi"), slope + pair("x_ddphi", "dphi"), q_a
    )
    along_b = first_of(
        pair("phi", "x_dphi") + pair("phi", "x2_ddphi"), slope + pair("dphi", "x_ddphi"), q_b
    )
    by_aa = first_of(along_a, slope_by_a, q_a) - by_a / q_a
    by_bb = first_of(along_b, slope_by_b, q_b) - by_b / q_b
    hessian = jnp.stack(
        [by_aa, bend / 4, slope_by_a, bend / 4, by_bb, slope_by_b, slope_by_a, slope_by_b, bend], -1
    ).reshape(*c.shape, 3, 3)
    zero, lengths = jnp.zeros_like(c), averages.phi2.first
    jacobian = jnp.stack(
        [lengths[:, a], zero, zero, zero, lengths[:, b], zero, by_a, by_b, slope], -1
    ).reshape(*c.shape, 3, 3)
    squares = averages.phi2.value
    means = jnp.stack([squares[:, a], squares[:, b], pair("phi", "phi")], -1)
    own = averages.own("phi2", "phi2")
    both = pair("phi2", "phi2")
    odd_a, odd_b = pair("phi3", "phi"), pair("phi", "phi3")
    seconds = jnp.stack([own[:, a], both, odd_a, both, own[:, b], odd_b, odd_a, odd_b, both], -1)
    noise = seconds.reshape(*c.shape, 3, 3) - means[..., :, None] * means[..., None, :]

    def step(covariance: Array, layer: tuple) -> tuple[Array, Array]:
        w2, n, jacobian, noise = layer
        rotated = jacobian @ covariance @ jnp.swapaxes(jacobian, -1, -2)
        return w2[:, :, None] * w2[:, None, :] * (rotated + noise / n), covariance

    last, covariance = jax.lax.scan(
        step,
        jnp.zeros_like(noise[0]),
        (w2[1:], n[:-1, :, None, None], jacobian[:-1], noise[:-1]),
    )
    covariance = jnp.concatenate([covariance, last[None]])
    curved = (hessian * covariance).sum((-2, -1)) / 2

    def move(shift: Array, layer: tuple) -> tuple[Array, Array]:
        w2, row, curved, shift_a, shift_b = layer
        lengths = row[:, 0] * shift_a + row[:, 1] * shift_b
        return w2 * (lengths + row[:, 2] * shift + curved), shift

    rows = (jacobian[:-1, :, 2], curved[:-1], v.shift[:-1, a], v.shift[:-1, b])
    last, shift = jax.lax.scan(move, zero[0], (w2[1:, :, 2], *rows))
    shift = jnp.concatenate([shift, last[None]])
    return PairFluctuation(
        moments, jnp.stack([v.shift[:, a], v.shift[:, b], shift], -1), covariance
    )


def _from_above(step: Callable, top: Array, layers: tuple[Array, ...]) -> Array:
    """The recursion x^l = step(x^{l+1}, layer l) from x^L = top: all x, (layers, …)."""

    def down(above: Array, layer: tuple[Array, ...]) -> tuple[Array, Array]:
        below = step(above, *layer)
        return below, below

    _, below = jax.lax.scan(down, top, layers, reverse=True)
    return jnp.concatenate([below, top[None]])


def _sum_above(x: Array) -> Array:
    """Σ_{k >= l} x^k for layers l = 1 … L, from the steps k = 1 … L - 1."""
    top = jnp.zeros((1, *x.shape[1:]), x.dtype)
    return jnp.concatenate([jnp.cumsum(x[::-1], axis=0)[::-1], top])


def _gradients(layers: FiniteLayers, conditional: Fluctuation) -> GradientFluctuation:
    """Follow a tangent up from each layer; everything by its logarithm, so that χ is divided out.

    Its squared norm w, its overlap r with the signal, and v fluctuate. To first order
    δlog w' = δlog w + y δv + noise, with y = ∂log χ/∂v, and log E w gains (∂²w'/∂r²) r²/2 too.
    """
    k, averages = layers.covariance, layers.averages
    w2, n, q = layers.sigma_w2[1:], layers.width[:-1], layers.q[:-1]
    f, x = (jax.tree.map(lambda v: v[:-1], tree) for tree in (averages.phi2, averages.dphi2))
    v = conditional.covariance[:-1]
    each = jnp.eye(k.shape[1], dtype=k.dtype)[None]
    by_v = w2 * f.first
    y = x.first / x.value
    # Means over units: noise of log w, of v with log w, and of r² by w.
    shares = averages.product("dphi2", "dphi2")[:-1] / outer(x.value, x.value)
    noise_w = ((1 + 2 * each) * shares - 1) / n[:, :, None]
    noise_vw = (
        averages.product("phi2", "dphi2")[:-1] / x.value[:, None, :] - f.value[:, :, None]
    ) * (w2 / n)[:, :, None]
    noise_r = w2 * averages.own("phi2", "dphi2")[:-1] / (n * x.value)
    # How what happens at layer l to v, and to r², reaches log w at the top.
    zero = jnp.zeros_like(k[0, 0])
    reach_v = _from_above(lambda above, y, a: y + a * above, zero, (y, by_v))
    bend = averages.own("x_dphi", "x_dphi")[:-1] / (q**2 * x.value) - 1 / q
    reach_r = _from_above(lambda above, u, a: u + a * above, zero, (bend, by_v**2 / (w2 * x.value)))
    through_v = (outer(by_v, y) * v + noise_vw) * reach_v[1:, :, None]
    chi_covariance = outer(y, y) * v + noise_w
    chi_shift = (
        y * conditional.shift[:-1] + x.second / x.value * diagonal(v) / 2 + noise_r * reach_r[1:]
    )
    overlap = _from_above(
        lambda above, c, noise: c * above + noise,
        jnp.ones_like(k[0]) / layers.width[-1, 0],
        (
            averages.product("dphi", "dphi")[:-1] ** 2 / outer(x.value, x.value),
            shares / n[:, :, None],
        ),
    )
    return GradientFluctuation(
        shift=_sum_above(chi_shift + diagonal(through_v)),
        covariance=_sum_above(chi_covariance + through_v + jnp.swapaxes(through_v, 1, 2)),
        by_v=reach_v,
        overlap=overlap,
        chi_shift=chi_shift,
        chi_covariance=chi_covariance,
    )
