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

import functools
import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, polygamma
from jaxtyping import Array, ArrayLike, Float

from gradflow import gaussian, statistics
from gradflow.activations import Activation
from gradflow.blocks import Dense
from gradflow.errors import InputError
from gradflow.gaussian import _pairs, _quadrature
from gradflow.networks import Network, check_network
from gradflow.statistics import BackwardLaw, ForwardLaw
from gradflow.theory import mean_field

__all__ = ["Corrections", "Layers", "correct", "correct_from", "covers", "prepare"]

# Averages over two inputs' pre-activations to compute, one for each pair and layer: some 10 s.
_MOST_PAIRS = 4000
# Ends of intervals where φ saturates; sin has thousands.
_MOST_ENDS = 16
# Functions of a pre-activation that are averaged, alone and in pairs.
_NAMES = ("shifted", "shifted2", "phi2", "dphi2", "dphi", "x_dphi", "saturated")
_BENT = ("ddphi", "x_ddphi", "x2_ddphi")  # φ'' with its delta functions, times powers of x
_PAIR_NAMES = (*_NAMES, "phi", "phi3", *_BENT)


class Corrections(eqx.Module):
    """First order in 1/n, by statistic key, each of shape (layers,).

    Attributes
    ----------
    shift
        To be added to what `mean_field.predict` returns; that of a logarithm where it is one.
    standard_deviation
        Over networks; of a statistic that is carried as a logarithm, as a share of its mean.
    term
        What the shift is of, where it is one effect by name and not all of order 1/n.
    """

    shift: dict[str, Array | np.ndarray]
    standard_deviation: dict[str, Array | np.ndarray]
    term: str | None = eqx.field(static=True, default=None)


def covers(network: Network) -> bool:
    """Whether `correct` has an answer: dense layers, each with Gaussian weights of its own."""
    check_network(network)
    first, *rest = [s.block for s in network.stages for _ in range(min(s.repeats, 2))]
    return (
        network.iid_gaussian
        and not network.tied
        and isinstance(first, Dense)
        and all(isinstance(b, Dense) and b.activation == network.activation for b in rest)
    )


def correct(network: Network, gram: Float[ArrayLike, "sites sites"]) -> Corrections:
    """Return the shift of every statistic's mean, and its spread between networks.

    A pure function; float64 is needed (differences of averages). Good to a relative depth/width.

    Parameters
    ----------
    network
        Dense layers with independent Gaussian weights.
    gram
        As for `mean_field.predict`.

    Returns
    -------
    Corrections
        NaN where it has no answer: where there are more than 4000 pairs of inputs times layers,
        ``correlation``, and every spread; the spread of ``correlation`` if there are more than two
        inputs, and of saturation where φ' oscillates.

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
    return correct_from(prepare(network, *mean_field.laws(network, gram)))


def prepare(
    network: Network, forward: Sequence[ForwardLaw], backward: Sequence[BackwardLaw]
) -> "Layers":
    """Return all that `correct_from` needs to know: the part that depends on the activation.

    Parameters
    ----------
    network
        One that `covers` says yes to.
    forward, backward
        From `mean_field.laws`.
    """
    (up,), (down,) = forward, backward  # dense layers have equally many sites
    k = up.covariance
    # Beyond the range of averages φ is linear on each side, or there is no answer; the chain is
    # then that of the rescaled signals, whose σ_w and σ_b make up for the change of scale.
    scale = up.log_scale
    handed_on = gaussian.growth(network.activation, scale)[0]
    taken = jnp.concatenate([jnp.zeros_like(scale[:1]), handed_on[:-1]])
    taken = jnp.where(handed_on == scale, taken, jnp.nan)

    def each_layer(name: str) -> Array:
        scales = [getattr(stage.block, name) for stage in network.stages]
        squares = [jnp.square(jnp.asarray(0 if x is None else x, k.dtype)) for x in scales]
        repeats = np.array([stage.repeats for stage in network.stages])
        return jnp.repeat(jnp.stack(squares), repeats, total_repeat_length=network.depth)[:, None]

    return Layers(
        sigma_w2=each_layer("sigma_w") * jnp.exp(2 * (taken - scale)),
        sigma_b2=each_layer("sigma_b") * jnp.exp(-2 * scale),
        width=jnp.asarray(np.array(network.widths[1:], float), k.dtype)[:, None],
        covariance=k,
        log_scale=scale,
        backward=down,
        averages=_averages(network.activation, k),
    )


def correct_from(layers: "Layers") -> Corrections:
    """Return what `correct` does, from what `prepare` returns; a program for all activations."""
    depth, sites = layers.q.shape
    up = _up(layers)
    shift, variance = {}, {}
    for name, found in _statistics(layers, up, _down(layers, up)).items():
        shift[name], variance[name] = found
    if layers.averages.pairs is not None:
        shift["correlation"], variance["correlation"] = _correlation(layers, _cosine(layers, up))
    undefined = jnp.full(depth, jnp.nan, layers.q.dtype)
    wanted = {s.key: s for s in statistics.ALL if s.sites <= sites}
    deviation = {
        key: jnp.sqrt(jnp.expm1(variance[key]) if s.log else variance[key])
        for key, s in wanted.items()
        if key in variance
    }
    return Corrections(
        {key: shift.get(key, undefined) for key in wanted},
        {key: deviation.get(key, undefined) for key in wanted},
    )


class _Averages(eqx.Module):
    """Averages over one layer's pre-activations, and of pairs; (layers, sites, …)."""

    phi2: "_Series"
    dphi2: "_Series"
    mean: "_Series"  # of φ - φ(0)
    variance: "_Series"
    saturation: "_Series"
    alone: Array  # (layers, sites, functions, functions), E[f(z_a) g(z_a)] of _NAMES
    pairs: Array | None  # (layers, pairs, functions, functions), E[f(z_a) g(z_b)] of _PAIR_NAMES

    def own(self, first: str, second: str) -> Array:
        """Return E[f(z_a) g(z_a)], (layers, sites)."""
        return self.alone[..., _NAMES.index(first), _NAMES.index(second)]

    def pair(self, first: str, second: str) -> Array:
        """Return E[f(z_a) g(z_b)] of the pairs a < b, (layers, pairs)."""
        assert self.pairs is not None
        return self.pairs[..., _PAIR_NAMES.index(first), _PAIR_NAMES.index(second)]

    def product(self, first: str, second: str) -> Array:
        """Return E[f(z_a) g(z_b)], (layers, sites, sites); NaN where pairs are too many."""
        own = self.own(first, second)
        sites = own.shape[1]
        parts = [own, jnp.full_like(own[:, :1], jnp.nan)]
        place = np.full((sites, sites), sites)
        np.fill_diagonal(place, np.arange(sites))
        if self.pairs is not None:
            parts += [self.pair(first, second), self.pair(second, first)]
            a, b = np.triu_indices(sites, 1)
            place[a, b] = sites + 1 + np.arange(a.size)
            place[b, a] = sites + 1 + a.size + np.arange(a.size)
        return jnp.concatenate(parts, axis=1)[:, place]


class Layers(eqx.Module):
    """What is known of each layer: its scales, its width, the laws and averages at infinite width.

    ``sigma_w2`` and ``sigma_b2`` are of shape (layers, sites), ``width`` of shape (layers, 1);
    ``covariance`` is that of the pre-activations, (layers, sites, sites). They and the averages are
    of the pre-activations times exp(-``log_scale``), (layers, sites).
    """

    sigma_w2: Array
    sigma_b2: Array
    width: Array
    covariance: Array
    log_scale: Array
    backward: BackwardLaw
    averages: _Averages

    @property
    def q(self) -> Array:
        """The pre-activations' second moments, (layers, sites)."""
        return _diagonal(self.covariance)


class _Series(eqx.Module):
    """A function of q with two derivatives, at every layer's and site's q."""

    value: Array
    first: Array
    second: Array

    @classmethod
    def of(cls, f: Callable[[Array], Array], q: Array) -> "_Series":
        ladder = (f, jax.grad(f), jax.grad(jax.grad(f)))
        return cls(*(jax.vmap(jax.vmap(g))(q) for g in ladder))

    @classmethod
    def of_powers(cls, powers: Array, q: Array) -> "_Series":
        """Return it from E[f], E[f x²], E[f x⁴]: the density is differentiated, and not f."""
        value, second, fourth = powers
        first = (second / q - value) / (2 * q)
        return cls(value, first, (fourth / q**2 - 6 * second / q + 3 * value) / (4 * q**2))

    def less_square_of(self, mean: "_Series") -> "_Series":
        """Return the variance, self being the second moment."""
        return _Series(
            self.value - mean.value**2,
            self.first - 2 * mean.value * mean.first,
            self.second - 2 * (mean.first**2 + mean.value * mean.second),
        )

    def moved(self, up: "_Up") -> Array:
        """Return the shift of its mean, by that of v and by the variance of v."""
        return self.first * up.shift + self.second * _diagonal(up.covariance) / 2


class _Up(eqx.Module):
    """The conditional variances v of all sites: shift of the mean, and covariance."""

    shift: Array  # (layers, sites)
    covariance: Array  # (layers, sites, sites)


class _Down(eqx.Module):
    """The logarithm of the gradient's squared norm: of its mean, the shift; its covariance.

    Without what δ^L itself adds. ``by_v`` is the derivative by v^l, ``overlap`` the mean square of
    the cosine between two inputs' gradients; ``factor`` and ``factor_covariance`` are of χ alone.
    """

    shift: Array
    covariance: Array
    by_v: Array
    overlap: Array
    factor: Array
    factor_covariance: Array


def _diagonal(x: Array) -> Array:
    return jnp.diagonal(x, axis1=1, axis2=2)


def _averages(activation: Activation, k: Array) -> _Averages:
    q, sites = _diagonal(k), k.shape[1]
    flat = np.asarray(activation.saturated_intervals(statistics.SATURATION_THRESHOLD))
    ends = flat[np.isfinite(flat)].tolist()
    few = len(ends) <= _MOST_ENDS
    kinks = tuple({*activation.kinks, *(ends if few else ())})

    def functions(x: Array) -> Array:
        phi, slope = activation(x), activation.derivative(x)
        # About φ(0), so that no large constant is squared and subtracted.
        shifted = phi - activation(jnp.zeros_like(x))
        saturated = jnp.abs(slope) < statistics.SATURATION_THRESHOLD * activation.max_slope
        saturated = jnp.where(saturated, 1.0, 0.0) if few else jnp.full_like(x, jnp.nan)
        rows = (shifted, shifted**2, phi**2, slope**2, slope, x * slope, saturated)
        return jnp.stack(rows)

    def pair_functions(x: Array) -> Array:
        phi, bend = activation(x), activation.second_derivative(x)
        return jnp.stack([*functions(x), phi, phi**3, bend, x * bend, x**2 * bend])

    def alone(x: Array) -> Array:
        found = functions(x)
        once = found[:4, None] * jnp.stack([jnp.ones_like(x), x**2, x**4])[None]
        both = found[:, None] * found[None, :]
        return jnp.concatenate([v.reshape(-1, *x.shape) for v in (once, both)])

    # One layer after another: an average's 90 000 values need not all be stored.
    averages = jnp.moveaxis(
        jax.lax.map(lambda layer: gaussian.expectation(alone, layer, kinks=kinks), q), 1, 0
    )
    mean, square, phi2, dphi2 = (_Series.of_powers(averages[i : i + 3], q) for i in range(0, 12, 3))
    own = jnp.moveaxis(averages[12:].reshape(len(_NAMES), len(_NAMES), *q.shape), (0, 1), (2, 3))
    a, b = np.triu_indices(sites, 1)
    pairs = None
    if 0 < a.size * len(k) <= _MOST_PAIRS:
        of_pairs = (q[:, a], q[:, b], k[:, a, b])
        pairs = _pairs.pair_expectation(pair_functions, *of_pairs, kinks=kinks)
        pairs = jnp.moveaxis(pairs, (0, 1), (2, 3))
        if activation.slope_jumps:
            bent = functools.partial(_with_deltas, activation, pair_functions, kinks)
            pairs = jax.vmap(jax.vmap(bent))(pairs, *of_pairs)
    return _Averages(
        phi2=phi2,
        dphi2=dphi2,
        mean=mean,
        variance=square.less_square_of(mean),
        saturation=_Series.of(
            lambda v: gaussian.saturation(activation, v, statistics.SATURATION_THRESHOLD), q
        ),
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
    """Return a pair's averages, (functions, functions), with the deltas of φ'' at its jumps."""
    kink, jump = (jnp.asarray(v, k.dtype) for v in zip(*activation.slope_jumps, strict=True))
    powers = jump[None] * jnp.stack([jnp.ones_like(kink), kink, kink**2])  # of _BENT
    tiny = jnp.finfo(k.dtype).tiny
    bent = slice(_PAIR_NAMES.index(_BENT[0]), None)

    def density(x: Array, mean: Array, variance: Array) -> Array:
        return jnp.exp(-((x - mean) ** 2) / (2 * variance)) / jnp.sqrt(2 * math.pi * variance)

    def given(q: Array, other: Array) -> tuple[Array, Array]:
        """Return p(kink) E[f | kink] for each kink, and p(kink, other's kink)."""
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


def _up(layers: Layers) -> _Up:
    w2, n, k = layers.sigma_w2, layers.width, layers.covariance
    f = layers.averages.phi2
    noise = (
        _outer(w2[1:], w2[1:])
        * (layers.averages.product("phi2", "phi2") - _outer(f.value, f.value))[:-1]
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
    last, found = jax.lax.scan(step, start, (noise, by_v, bend))
    return _Up(*(jnp.concatenate([x, y[None]]) for x, y in zip(found, last, strict=True)))


def _outer(x: Array, y: Array) -> Array:
    return x[:, :, None] * y[:, None, :]


class _Cosine(eqx.Module):
    """The conditional covariance c of a pair of inputs, a < b: (layers, pairs, …)."""

    moments: Array  # v_a, v_b and c
    shift: Array  # of their means
    covariance: Array  # (layers, pairs, 3, 3)


def _cosine(layers: Layers, up: _Up) -> _Cosine:
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
    nothing, lengths = jnp.zeros_like(c), averages.phi2.first
    jacobian = jnp.stack(
        [lengths[:, a], nothing, nothing, nothing, lengths[:, b], nothing, by_a, by_b, slope], -1
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
        turned = jacobian @ covariance @ jnp.swapaxes(jacobian, -1, -2)
        return w2[:, :, None] * w2[:, None, :] * (turned + noise / n), covariance

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

    rows = (jacobian[:-1, :, 2], curved[:-1], up.shift[:-1, a], up.shift[:-1, b])
    last, shift = jax.lax.scan(move, nothing[0], (w2[1:, :, 2], *rows))
    shift = jnp.concatenate([shift, last[None]])
    return _Cosine(moments, jnp.stack([up.shift[:, a], up.shift[:, b], shift], -1), covariance)


def _correlation(layers: Layers, cosine: _Cosine) -> tuple[Array, Array]:
    """Return the shift and variance of the mean cosine, (layers,); the variance of one pair's."""

    def of(moments: Array) -> Array:
        return moments[2] / jnp.sqrt(moments[0] * moments[1])

    gradient = jax.vmap(jax.vmap(jax.grad(of)))(cosine.moments)
    hessian = jax.vmap(jax.vmap(jax.hessian(of)))(cosine.moments)
    q_a, q_b, c = jnp.moveaxis(cosine.moments, -1, 0)
    # Of means over n units of z_a², z_b² and z_a z_b (Wick).
    spread = jnp.stack(
        [2 * q_a**2, 2 * c**2, 2 * q_a * c]
        + [2 * c**2, 2 * q_b**2, 2 * q_b * c]
        + [2 * q_a * c, 2 * q_b * c, q_a * q_b + c**2],
        -1,
    ).reshape(*c.shape, 3, 3)
    covariance = cosine.covariance + spread / layers.width[..., None, None]
    shift = (gradient * cosine.shift).sum(-1) + (hessian * covariance).sum((-2, -1)) / 2
    variance = jnp.einsum("lpi,lpij,lpj->lp", gradient, covariance, gradient)
    alone = c.shape[1] == 1
    return shift.mean(1), jnp.where(alone, jnp.maximum(variance.mean(1), 0), jnp.nan)


def _from_above(step: Callable, top: Array, layers: tuple[Array, ...]) -> Array:
    """Return x with x^L = top and x^l = step(x^{l+1}, layer l), (layers, …)."""

    def down(above: Array, layer: tuple[Array, ...]) -> tuple[Array, Array]:
        below = step(above, *layer)
        return below, below

    _, found = jax.lax.scan(down, top, layers, reverse=True)
    return jnp.concatenate([found, top[None]])


def _sum_above(x: Array) -> Array:
    """Return Σ_{k >= l} x^k for layers l = 1 … L, from the steps k = 1 … L - 1."""
    top = jnp.zeros((1, *x.shape[1:]), x.dtype)
    return jnp.concatenate([jnp.cumsum(x[::-1], axis=0)[::-1], top])


def _down(layers: Layers, up: _Up) -> _Down:
    """Follow a tangent up from each layer; everything by its logarithm, so that χ is divided out.

    Its squared norm w, its overlap r with the signal, and v fluctuate. To first order
    δlog w' = δlog w + y δv + noise, with y = ∂log χ/∂v, and log E w gains (∂²w'/∂r²) r²/2 too.
    """
    k, averages = layers.covariance, layers.averages
    w2, n, q = layers.sigma_w2[1:], layers.width[:-1], layers.q[:-1]
    f, x = (jax.tree.map(lambda v: v[:-1], tree) for tree in (averages.phi2, averages.dphi2))
    v = up.covariance[:-1]
    each = jnp.eye(k.shape[1], dtype=k.dtype)[None]
    by_v = w2 * f.first
    y = x.first / x.value
    # Means over units: noise of log w, of v with log w, and of r² by w.
    shares = averages.product("dphi2", "dphi2")[:-1] / _outer(x.value, x.value)
    noise_w = ((1 + 2 * each) * shares - 1) / n[:, :, None]
    noise_vw = (
        averages.product("phi2", "dphi2")[:-1] / x.value[:, None, :] - f.value[:, :, None]
    ) * (w2 / n)[:, :, None]
    noise_r = w2 * averages.own("phi2", "dphi2")[:-1] / (n * x.value)
    # How what happens at layer l to v, and to r², reaches log w at the top.
    nothing = jnp.zeros_like(k[0, 0])
    reach_v = _from_above(lambda above, y, a: y + a * above, nothing, (y, by_v))
    bend = averages.own("x_dphi", "x_dphi")[:-1] / (q**2 * x.value) - 1 / q
    reach_r = _from_above(
        lambda above, u, a: u + a * above, nothing, (bend, by_v**2 / (w2 * x.value))
    )
    through_v = (_outer(by_v, y) * v + noise_vw) * reach_v[1:, :, None]
    factor_covariance = _outer(y, y) * v + noise_w
    factor = y * up.shift[:-1] + x.second / x.value * _diagonal(v) / 2 + noise_r * reach_r[1:]
    overlap = _from_above(
        lambda above, c, noise: c * above + noise,
        jnp.ones_like(k[0]) / layers.width[-1, 0],
        (
            averages.product("dphi", "dphi")[:-1] ** 2 / _outer(x.value, x.value),
            shares / n[:, :, None],
        ),
    )
    return _Down(
        shift=_sum_above(factor + _diagonal(through_v)),
        covariance=_sum_above(factor_covariance + through_v + jnp.swapaxes(through_v, 1, 2)),
        by_v=reach_v,
        overlap=overlap,
        factor=factor,
        factor_covariance=factor_covariance,
    )


def _statistics(layers: Layers, up: _Up, down: _Down) -> dict[str, tuple[Array, Array]]:
    """Return each statistic's shift and variance, (layers,); of its logarithm if it is kept so."""
    b2, n, k, q = layers.sigma_b2, layers.width, layers.covariance, layers.q
    averages, backward, sites = layers.averages, layers.backward, q.shape[1]
    scale = jnp.exp(layers.log_scale)
    scales = _outer(scale, scale)
    pair_n = n[:, :, None]
    each = jnp.eye(sites, dtype=k.dtype)[None]
    v = up.covariance

    def mean_of(shift: Array, covariance: Array) -> tuple[Array, Array]:
        return shift.mean(1), covariance.mean((1, 2))

    def log_mean_of(value: Array, shift: Array, covariance: Array) -> tuple[Array, Array]:
        total = value.sum(1)
        return shift.sum(1) / total, covariance.sum((1, 2)) / total**2

    def along_v(series: _Series) -> Array:
        return _outer(series.first, series.first) * v

    length = v + 2 * k**2 / pair_n
    mean = averages.mean.value
    square = averages.variance.value + mean**2
    product = averages.product("shifted", "shifted")
    mean_a, mean_b = mean[:, :, None], mean[:, None, :]
    # E[(c_a - m_a)² (c_b - m_b)²] of c = φ - φ(0)
    fourth = (
        averages.product("shifted2", "shifted2")
        - 2 * mean_b * averages.product("shifted2", "shifted")
        - 2 * mean_a * averages.product("shifted", "shifted2")
        + 4 * mean_a * mean_b * product
        + mean_b**2 * square[:, :, None]
        + mean_a**2 * square[:, None, :]
        - 3 * (mean_a * mean_b) ** 2
    )
    variance = averages.variance
    saturated = averages.saturation
    chi = jnp.exp(backward.log_ratio[:-1])
    undefined = jnp.full_like(k[:1, 0, 0], jnp.nan)
    top = 2 * each / n[-1, 0]
    # Gradients of different inputs: their shares of the sum of squares.
    share = jax.nn.softmax(backward.log_variance, axis=1)
    of_weights = q - b2  # σ_w² |h|²/n of the layer below
    share_weights = jax.nn.softmax(backward.log_variance + jnp.log(of_weights), axis=1)
    per_length = _outer(1 / of_weights, 1 / of_weights)
    mixed = v * down.by_v[:, None, :] / of_weights[:, :, None]
    cosine2 = (k - jnp.sqrt(_outer(b2, b2))) ** 2 * per_length
    weights_covariance = (
        down.covariance
        + top
        + v * per_length
        + mixed
        + jnp.swapaxes(mixed, 1, 2)
        + jnp.where(each == 1, 0, 2 * cosine2 * down.overlap)
    )
    n_top = n[-1, 0] / 2
    log_square = down.shift - _diagonal(down.covariance) / 2 + digamma(n_top) - jnp.log(n_top)
    factor_shift, factor_variance = mean_of(
        chi * down.factor, _outer(chi, chi) * down.factor_covariance
    )
    return {
        "log_q": log_mean_of(q, up.shift, length),
        "preactivation_mean": mean_of(jnp.zeros_like(q), k / pair_n * scales),
        "log_preactivation_variance": log_mean_of(q, up.shift - q / n, length),
        "activation_mean": mean_of(
            averages.mean.moved(up) * scale,
            ((product - _outer(mean, mean)) / pair_n + along_v(averages.mean)) * scales,
        ),
        "log_activation_variance": log_mean_of(
            variance.value,
            variance.moved(up) - variance.value / n,
            (fourth - _outer(variance.value, variance.value)) / pair_n + along_v(variance),
        ),
        "saturation": mean_of(
            saturated.moved(up),
            (averages.product("saturated", "saturated") - _outer(saturated.value, saturated.value))
            / pair_n
            + along_v(saturated),
        ),
        "chi": (
            jnp.concatenate([factor_shift, undefined]),
            jnp.concatenate([factor_variance, undefined]),
        ),
        "log_gradient_variance": (
            (share * down.shift).sum(1),
            (_outer(share, share) * (down.covariance + top)).sum((1, 2)),
        ),
        "log_gradient_norm": (
            log_square.mean(1) / 2,
            (down.covariance + each * polygamma(1, n_top)).mean((1, 2)) / 4,
        ),
        "log_weight_gradient_variance": (
            (share_weights * (down.shift + (up.shift + down.by_v * _diagonal(v)) / of_weights)).sum(
                1
            ),
            (_outer(share_weights, share_weights) * weights_covariance).sum((1, 2)),
        ),
    }
