"""Carried means: what finite width does to gradients where a mean over units is carried along.

In z' = z + α φ(W z + b), with E[φ] > 0, the mean over units adds up from block to block, and the
signal grows faster than a random tangent does: by 1.70 a block against 1.41 with ReLU and He
weights. A tangent u has a part along the signal and along the mean, of relative weight 1/n where it
starts, that grows as the signal does. It takes over after log n/(2 log g) blocks, g the ratio of
the two rates (13 blocks for n = 100), and infinite-width theory does not have it. With δ = Jᵀδ^L,
δ^L ~ N(0, I), ‖δ^l‖² has the law of ‖J u‖², u ~ N(0, I) at layer l, as in
`theory.finite_width.first_order`.

Of a tangent, c = (ρ, m), ρ = (1/n) z·u and m = (1/n) Σ_i u_i, is what its next moments depend on
beside t = (1/n) ‖u‖². With a = W z + b of variance q_a = σ_w² q + σ_b², and x = σ_w²/q_a, W u is
x ρ a, and an independent part of variance σ_w² (t - x ρ²). So c' = J c + noise, and

    m' = m + α x ρ E[φ'a],
    ρ' = ρ (1 + α x E[z] E[φ'a] + α² x E[φφ'a]) + α m E[φ],
    t' = t + α² σ_w² E[φ'²] (t - x ρ²) + α² x² ρ² E[φ'²a²] + 2 α x ρ m E[φ'a],

a linear map of t and S = E[c cᵀ], T and Q to t, J S Jᵀ + N t to S, where the noise N is 1/n times a
variance over units. At the start S = G/n with the moments G of (z, 1). One walk down, by the map's
transpose, gives ‖δ^l‖² for all l: τ, and Σ for S, and τ + tr(Σ G)/n. What exceeds the
infinite-width value, by a share e, is one random number squared, since one direction grows fastest:
the mean of log ‖δ‖² exceeds it by E log(1 + e ξ²), ξ ~ N(0, 1). In positively homogeneous networks
Σ_i δ_i z_i is the same at every layer (Euler), which is that number.

A highway layer, z' = g z + (1 - g) φ(a), has such a map too. e may be of any size; it is of the
first order in 1/n where the part along the mean starts. Left out is what any network of this width
has (`theory.finite_width.first_order`): a share of about 1/n in every layer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow import activations, gaussian, statistics
from gradflow.activations import Activation
from gradflow.blocks import GRU, AbstractBlock, Activate, Chain, Linear, Residual
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.predictions import Corrections
from gradflow.statistics import BackwardLimit, ForwardLimit
from gradflow.theory._limits import limits

__all__ = ["correct", "correct_limits", "covers"]

_EFFECT = "the gradient's part along the mean over units, which grows as the signal does"

_XI, _CHANCES = np.polynomial.hermite_e.hermegauss(100)
_CHANCES = _CHANCES / _CHANCES.sum()


def covers(network: Network) -> bool:
    """Whether `correct` has an answer.

    That is of residual blocks past `Linear`, then `Activate`, of highway layers (`GRU` without
    W_r), and of `Linear` layers, with independent Gaussian weights.
    """
    first, *rest = [s.block for s in network.stages]
    return (
        network.iid_gaussian
        and network.centred
        and not network.tied
        and not network.mixes_sites
        and isinstance(first, Linear)
        and network.stages[0].repeats == 1
        and all(isinstance(b, Linear) or _carries(b) for b in rest)
        and any(_carries(b) for b in rest)
    )


def correct(network: Network, gram: Float[ArrayLike, "sites sites"]) -> Corrections:
    """The shift of every gradient statistic's mean by the part along the mean over units.

    Parameters
    ----------
    network
        One that `covers`.
    gram
        Shape (sites, sites), (1/n_0) x_a · x_b; see `mean_field.input_gram`.

    Returns
    -------
    Corrections
        NaN for statistics of signals and for every spread; where the mean squared gradient does not
        rise by more than a share of 1/n for each layer above, as other effects of the width are,
        which are not known; and below layers whose signals are beyond the range of averages
        (`gaussian.log_limits`).

    Raises
    ------
    InputError
        If the network is of another kind.
    """
    if not covers(network):
        raise InputError(
            f"network is {network.name!r}; what carried means do is known for residual blocks past "
            "Linear and Activate, highway layers and Linear layers, of independent Gaussian weights"
        )
    return correct_limits(network, *limits(network, gram))


def correct_limits(
    network: Network, forward: Sequence[ForwardLimit], backward: Sequence[BackwardLimit]
) -> Corrections:
    """What `correct` computes, from the network's infinite-width limits, `_limits.limits`."""
    (signals,), (gradients,) = forward, backward  # no layer merges sites
    q = jnp.diagonal(signals.covariance, axis1=1, axis2=2)
    q = jnp.where(signals.log_scale == 0, q, jnp.nan)
    widths = jnp.asarray(np.array(network.widths[1:], float), q.dtype)
    maps, last = [], 0
    for stage in network.stages[1:]:
        at = slice(last, last + stage.repeats)
        of_layers = jax.vmap(jax.vmap(_Map.of, (None, 0, 0)), (None, 0, 0))
        maps.append(of_layers(stage.block, q[at], signals.mean[at]))
        last += stage.repeats
    steps = jax.tree.map(lambda *x: jnp.concatenate(x), *maps)
    ends = _symmetric(q, signals.mean, jnp.ones_like(q))
    weighted = jnp.concatenate([ends[:1], steps.weighted])
    exceeds, exceeds_weights = _walk(steps, ends, weighted, widths)

    typical = _mean_log(exceeds)
    change = _log_mean(gradients.log_variance + _log1p(exceeds)) - _log_mean(gradients.log_variance)
    change_weights = _log_mean(gradients.log_variance + _log1p(exceeds_weights))
    change_weights -= _log_mean(gradients.log_variance)

    def change_of_both(xi: Array) -> Array:
        return (1 + exceeds[:-1] * xi**2) / (1 + exceeds[1:] * xi**2)

    factor = _mean(change_of_both, q.dtype)
    chi = jnp.exp(gradients.log_ratio[:-1]) * (factor - 1)
    undefined = jnp.full(network.depth, jnp.nan, q.dtype)
    shift = {
        "chi": jnp.append(jnp.mean(chi, axis=1), jnp.nan),
        "log_gradient_variance": change,
        "log_gradient_norm": jnp.mean(typical, axis=1) / 2,
        "log_weight_gradient_variance": change_weights,
    }
    # Other effects of the width are shares of about 1/n for each layer above.
    others = jnp.cumsum(1 / widths[::-1])[::-1] - 1 / widths
    large = change > others
    shift = {key: jnp.where(large, value, jnp.nan) for key, value in shift.items()}
    keys = [s.key for s in statistics.ALL if s.sites <= q.shape[1]]
    return Corrections(
        {key: shift.get(key, undefined) for key in keys}, dict.fromkeys(keys, undefined), _EFFECT
    )


class _Map(eqx.Module):
    """A block's maps of t and S; ``weighted`` are moments of (z', 1) weighted by φ'², for ∂C/∂W."""

    gain: Array  # T
    bend: Array  # Q, (2, 2)
    turn: Array  # J
    noise: Array  # N, times n
    weighted: Array

    @classmethod
    def of(cls, block: AbstractBlock, q: Array, mean: Array) -> "_Map":
        """The map of a block whose input has this second moment and this mean over units."""
        if isinstance(block, Residual):
            linear, activate = block.branch.parts
            assert isinstance(linear, Linear) and isinstance(activate, Activate)  # noqa: PT018
            scale = jnp.asarray(block.scale * jnp.ones_like(q))
            return cls._of_residual(linear, activate.activation, scale, q, mean)
        if isinstance(block, GRU):
            return cls._of_highway(block, q, mean)
        assert isinstance(block, Linear)
        s2, q_a = _scales(block, q)
        zero, one = jnp.zeros_like(q), jnp.ones_like(q)
        turn, noise = _matrix(s2, zero, zero, zero), _symmetric(q_a * s2, zero, s2)
        return cls(s2, jnp.zeros_like(turn), turn, noise, _symmetric(q_a, zero, one))

    @classmethod
    def _of_residual(
        cls, linear: Linear, phi: Activation, alpha: Array, q: Array, mean: Array
    ) -> "_Map":
        s2, q_a = _scales(linear, q)
        x = s2 / q_a
        h = _candidate(phi, q_a)
        along = q * h.d2 + 2 * mean * alpha * h.h_d2 + alpha**2 * h.h2_d2  # E[z'² φ'²]
        across = mean * h.d2 + alpha * h.h_d2
        new = alpha**2 * s2
        zero, one = jnp.zeros_like(q), jnp.ones_like(q)
        return cls(
            1 + new * h.d2,
            _symmetric(alpha**2 * (x**2 * h.d2_a2 - h.d2 * s2 * x), alpha * x * h.d_a, zero),
            _matrix(
                1 + alpha * mean * x * h.d_a + alpha**2 * x * h.h_d_a,
                alpha * h.h,
                alpha * x * h.d_a,
                one,
            ),
            _symmetric(alpha**2 * (h.h2 - h.h**2) + new * along, new * across, new * h.d2),
            _symmetric(along / h.d2, across / h.d2, one),
        )

    @classmethod
    def _of_highway(cls, block: GRU, q: Array, mean: Array) -> "_Map":
        """The map of z' = g z + (1 - g) φ(a): u' = g u + (1 - g) φ' ȧ + g' (z - φ) ȧ_g.

        Third and fourth moments of z, which the noise alone takes, are those of a Gaussian z.
        """
        s2, q_a = _scales(block._layer, q)
        x = s2 / q_a
        h = _candidate(block.activation, q_a)
        bias = jnp.asarray(block.update_bias, q.dtype)

        def gates(a: Array) -> Array:
            g = activations.logistic(a + bias)
            f, d = 1 - g, g * (1 - g)
            plain = [g, g**2, g * f, f**2, g**3, g**2 * f, g**4, g**3 * f, (g * f) ** 2]
            kept = [f**2 * g, f**3, f**3 * g, f**4]
            slopes = [d * a, g * d * a, f * d * a, d**2, (d * a) ** 2]
            both = [d**2 * g, d**2 * f, (d * g) ** 2, d**2 * g * f, (d * f) ** 2]
            return jnp.stack([*plain, *kept, *slopes, *both])

        averages = iter(gaussian.expectation(gates, q_a))
        g, g2, gf, f2, g3, g2f, g4, g3f, g2f2 = (next(averages) for _ in range(9))
        f2g, f3, f3g, f4 = (next(averages) for _ in range(4))
        d_a, g_d_a, f_d_a, d2, d2_a2 = (next(averages) for _ in range(5))
        d2_g, d2_f, d2_g2, d2_gf, d2_f2 = (next(averages) for _ in range(5))
        m, k = h.h, h.h2
        apart = q - 2 * mean * m + k  # E[(z - φ)²]
        spread = q - mean**2
        z3, z4 = mean**3 + 3 * mean * spread, mean**4 + 6 * mean**2 * spread + 3 * spread**2
        turn = _matrix(
            g2
            + x * mean * gf * h.d_a
            + x * f2 * h.h_d_a
            + x * (g_d_a * (q - mean * m) + f_d_a * (mean * m - k)),
            gf * m,
            x * ((1 - g) * h.d_a + d_a * (mean - m)),
            g,
        )
        bend_rho = (
            f2 * (x**2 * h.d2_a2 - h.d2 * s2 * x)
            + apart * (x**2 * d2_a2 - d2 * s2 * x)
            + 2 * x * g_d_a
            + 2 * x**2 * f_d_a * (mean * h.d_a - h.h_d_a)
        )
        bend = _symmetric(bend_rho, x * (gf * h.d_a - g_d_a * m), jnp.zeros_like(q))
        carried = _symmetric(
            g4 * q
            + 2 * g3f * mean * m
            + g2f2 * k
            - (g2**2 * q + 2 * g2 * gf * m * mean + (gf * m) ** 2),
            g3 * mean + g2f * m - (g2 * mean + gf * m) * g,
            g2 - g**2,
        )
        of_candidate = _symmetric(
            g2f2 * q * h.d2 + 2 * f3g * mean * h.h_d2 + f4 * h.h2_d2,
            f2g * mean * h.d2 + f3 * h.h_d2,
            f2 * h.d2,
        )
        of_gate = _symmetric(
            d2_g2 * (z4 - 2 * z3 * m + q * k)
            + 2 * d2_gf * (z3 * m - 2 * q * k + mean * h.h3)
            + d2_f2 * (q * k - 2 * mean * h.h3 + h.h4),
            d2_g * (z3 - 2 * q * m + mean * k) + d2_f * (q * m - 2 * mean * k + h.h3),
            d2 * apart,
        )
        by_weights = of_candidate + of_gate
        new = f2 * h.d2 + d2 * apart
        return cls(g2 + s2 * new, bend, turn, carried + s2 * by_weights, by_weights / new)


class _Candidate(NamedTuple):
    """Averages over a ~ N(0, q_a), of powers of h = φ(a), and d = φ'(a)."""

    h: Array
    h2: Array
    h3: Array
    h4: Array
    d_a: Array
    h_d_a: Array
    d2: Array
    d2_a2: Array
    h_d2: Array
    h2_d2: Array


def _candidate(phi: Activation, q_a: Array) -> _Candidate:
    def integrands(a: Array) -> Array:
        h, d = phi(a), phi.derivative(a)
        powers = [h, h**2, h**3, h**4]
        slopes = [d * a, h * d * a, d**2, (d * a) ** 2, h * d**2, (h * d) ** 2]
        return jnp.stack([*powers, *slopes])

    return _Candidate(*gaussian.expectation(integrands, q_a, kinks=phi.kinks))


def _scales(linear: Linear, q: Array) -> tuple[Array, Array]:
    """σ_w², and the second moment of W z + b."""
    s2 = jnp.asarray(jnp.square(linear.sigma_w) * jnp.ones_like(q))
    return s2, s2 * q + (0 if linear.sigma_b is None else jnp.square(linear.sigma_b))


def _walk(steps: _Map, ends: Array, weighted: Array, widths: Array) -> tuple[Array, Array]:
    """The shares by which ‖δ‖² and ‖∂C/∂W‖² of all layers exceed those at infinite width.

    Parameters
    ----------
    steps
        (layers - 1, sites, …), of the blocks above each layer but the last.
    ends, weighted
        (layers, sites, 2, 2): G, and its counterpart for the gradient of the weights below.
    widths
        (layers,).
    """

    def down(carry: tuple[Array, Array], layer: tuple[_Map, Array]) -> tuple[tuple, tuple]:
        (more, sigma), (step, width) = carry, layer
        gain = step.gain[:, None, None]
        turn = step.turn
        after = (1 + more)[:, None, None] * step.bend + jnp.swapaxes(turn, 1, 2) @ sigma @ turn
        more = more + jnp.sum(sigma * step.noise, (1, 2)) / (step.gain * width)
        return (more, after / gain), (more, after / gain)

    top = jnp.zeros_like(ends[0, :, 0, 0]), jnp.zeros_like(ends[0])
    _, below = jax.lax.scan(down, top, (steps, widths[1:]), reverse=True)
    more, sigma = (jnp.concatenate([f, t[None]]) for f, t in zip(below, top, strict=True))
    of_signals, of_weights = (
        more + jnp.sum(sigma * g, (2, 3)) / widths[:, None] for g in (ends, weighted)
    )
    return of_signals, of_weights


def _carries(block: AbstractBlock) -> bool:
    """Whether it is z + α φ(W z + b), or a highway layer."""
    if isinstance(block, GRU):
        return block.reset_bias is None and block.drive is None
    if not (isinstance(block, Residual) and isinstance(block.branch, Chain)):
        return False
    if block.skip_scale is not None:
        return False
    kinds = [type(part) for part in block.branch.parts]
    return kinds == [Linear, Activate]


def _mean_log(exceeds: Array) -> Array:
    """E log(1 + e ξ²), and log(1 + e) where e < 0."""
    mean = _mean(lambda xi: jnp.log1p(jnp.maximum(exceeds, 0) * xi**2), exceeds.dtype)
    return jnp.where(exceeds < 0, _log1p(exceeds), mean)


def _mean(f: Callable[[Array], Array], dtype: jnp.dtype) -> Array:
    """E f(ξ), ξ ~ N(0, 1)."""
    values = jax.vmap(f)(jnp.asarray(_XI, dtype))
    return jnp.tensordot(jnp.asarray(_CHANCES, dtype), values, 1)


def _log1p(exceeds: Array) -> Array:
    return jnp.where(exceeds > -1, jnp.log1p(jnp.maximum(exceeds, -1)), jnp.nan)


def _log_mean(log: Float[Array, "layers sites"]) -> Float[Array, " layers"]:
    return jax.nn.logsumexp(log, axis=1) - jnp.log(jnp.asarray(log.shape[1], log.dtype))


def _matrix(first: Array, across: Array, back: Array, second: Array) -> Array:
    return jnp.stack([jnp.stack([first, across], -1), jnp.stack([back, second], -1)], -2)


def _symmetric(first: Array, across: Array, second: Array) -> Array:
    return _matrix(first, across, across, second)
