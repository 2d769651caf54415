"""Mean-field theory: the infinite-width limit of every statistic, layer by layer.

Forward, the second moments K of the pre-activations follow the blocks' kernel maps,
K^l = σ_w² E[φ(u) φ(v)] + σ_b² for a dense layer (Poole et al. 2016, arXiv:1606.05340). Backward,
one component of δ^l = ∂C/∂z^l has the variance g^l with

    g^l = χ^l g^{l+1},    χ^l = (n_{l+1}/n_l) T^{l+1},

where T is what the block does to the second moment of a tangent, σ_w² E[φ'²] for a dense layer
(Schoenholz et al. 2017, arXiv:1611.01232, eq. 7), and the ratio of widths turns the sum over fan_in
into the backward sum over fan_out (Glorot & Bengio 2010, eq. 6). Where a block mixes the sites
(BatchNorm, convolution), tangents' and gradients' second moments over sites are matrices, S and Λ,
and Λ goes down by the transpose of the linear map S -> T[S]. Where tangents depend on the signals
(an LSTM's cells), it is the transpose of what becomes of all that is known of them. The top is
δ^L ~ N(0, I), independent for each site, and C the mean cost over them. Backward weights are as
good as independent of forward ones at infinite width.

Scales that are negative or not finite raise `InputError`, where they are known before the program
runs (outside jit).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Num

from gradflow import activations, gaussian
from gradflow._arguments import as_real
from gradflow._checks import check_count, check_scale, is_traced
from gradflow._programs import program
from gradflow.activations import ActivationLike
from gradflow.blocks import Dense
from gradflow.errors import InputError
from gradflow.kernels import Kernel
from gradflow.networks import Network, check_network
from gradflow.predictions import Prediction
from gradflow.theory._backward import log_gain
from gradflow.theory._limits import SECONDS_A_LAYER, checked_gram, limits, prediction

__all__ = [
    "chi",
    "correlation_map",
    "direction_gains",
    "input_gram",
    "length_map",
    "predict",
    "profile",
]


def input_gram(inputs: Num[ArrayLike, "sites n_in"]) -> Float[Array, "sites sites"]:
    """The inputs' Gram matrix (1/n_0) x_a · x_b, on which the theory depends.

    Parameters
    ----------
    inputs
        Shape (sites, n_0). Integers (pixels, say) become floats before they are multiplied.

    Raises
    ------
    InputError
        If they are no such array of finite real numbers, or their squares leave the float's range.
    """
    array = as_real("inputs", inputs, whole=float)
    if array.ndim != 2:
        raise InputError(f"inputs has shape {array.shape}; it is (inputs, n_0)")
    x = jnp.asarray(array)
    gram = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) / x.shape[1]
    if not is_traced(gram):
        square = np.diagonal(gram)
        if not (np.isfinite(square).all() and square[np.asarray(x).any(axis=1)].all()):
            raise InputError(
                f"inputs has a row whose mean square is beyond {gram.dtype}'s range; scale them, "
                "turn JAX's x64 mode on, or use theory.float64.predict"
            )
    return gram


def length_map(
    activation: ActivationLike,
    q: Float[Array, ""],
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
) -> Float[Array, ""]:
    """V(q) = σ_w² E[φ(√q Z)²] + σ_b², the next layer's q (Poole et al. 2016, eq. 3)."""
    activation = activations.get(activation)
    check_scale("sigma_w2", sigma_w2)
    check_scale("sigma_b2", sigma_b2)
    return jnp.asarray(sigma_w2 * gaussian.moment(activation, "phi2", q) + sigma_b2)


def chi(activation: ActivationLike, q: Float[Array, ""], sigma_w2: ArrayLike) -> Float[Array, ""]:
    """χ(q) = σ_w² E[φ'(√q Z)²] (Schoenholz et al. 2017, eq. 7); χ₁ at q = q*."""
    activation = activations.get(activation)
    check_scale("sigma_w2", sigma_w2)
    return jnp.asarray(sigma_w2 * gaussian.moment(activation, "dphi2", q))


def correlation_map(
    activation: ActivationLike,
    covariance: Float[Array, "sites sites"],
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
) -> Float[Array, "sites sites"]:
    """σ_w² E[φ(u_a) φ(u_b)] + σ_b² for every pair (Poole et al. 2016, eq. 5)."""
    activation = activations.get(activation)
    check_scale("sigma_w2", sigma_w2)
    check_scale("sigma_b2", sigma_b2)
    return jnp.asarray(sigma_w2 * gaussian.kernel(activation, covariance) + sigma_b2)


def profile(
    activation: ActivationLike,
    q1: Float[Array, ""],
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    *,
    depth: int,
) -> dict[str, Float[Array, " layers"]]:
    """One input's signals through ``depth`` layers of equal width, from a given q of layer 1.

    Parameters
    ----------
    activation
        φ.
    q1
        Second moment of the pre-activations of layer 1, >= 0.
    sigma_w2, sigma_b2
        σ_w² and σ_b², >= 0.
    depth
        L >= 1.

    Returns
    -------
    dict
        ``q``, ``log_q``, ``activation_mean``, ``activation_second_moment``, ``chi`` (χ^l = σ_w²
        E[φ'(z^l)²]), and ``log_jacobian_norm``, the log of the mean squared gain of a random
        direction through layers 1 to l, log Π_{k<=l} χ^k; each of shape (depth,).
    """
    activation = activations.get(activation)
    check_scale("q1", q1)
    check_scale("sigma_w2", sigma_w2)
    check_scale("sigma_b2", sigma_b2)
    check_count("depth", depth)

    block = Dense(activation, 1, jnp.sqrt(jnp.asarray(sigma_w2)), jnp.sqrt(jnp.asarray(sigma_b2)))

    def step(z: Kernel, _: None) -> tuple[Kernel, tuple[Array, ...]]:
        h, after = z.through(activation).plain(), block.kernel(z)
        log_q = jnp.log(jnp.diagonal(z.covariance)) + 2 * z.log_scale
        values = log_q, h.mean, jnp.diagonal(h.covariance), log_gain(block, z)
        return after.as_carry(z.distribution), tuple(x[0] for x in values)

    q1 = jnp.asarray(q1, jnp.result_type(q1, block.sigma_w, 0.0))
    begin = Kernel.of(q1[None, None])
    _, (log_q, mean, second, log_chi) = jax.lax.scan(
        step, begin.as_carry(begin.distribution), None, length=depth
    )
    return {
        "q": jnp.exp(log_q),
        "log_q": log_q,
        "activation_mean": mean,
        "activation_second_moment": second,
        "chi": jnp.exp(log_chi),
        "log_jacobian_norm": jnp.cumsum(log_chi),
    }


def direction_gains(
    activation: ActivationLike,
    x_sq_over_n: ArrayLike,
    sigma_w2: ArrayLike,
    sigma_b2: ArrayLike = 0.0,
    *,
    depth: int,
) -> dict[str, Float[Array, " layers"]]:
    """Squared gains of the Jacobian for a tangent along the input, and for one orthogonal to it.

    A tangent along x is no generic direction: it stays correlated with the signal, and a saturating
    φ shrinks it much more (tanh at q = 1: by 0.23 in one layer, squared, beside a random one). A
    finite difference along x measures this number, and not χ.

    Parameters
    ----------
    activation
        φ.
    x_sq_over_n
        |x|²/n_0 > 0.
    sigma_w2, sigma_b2
        σ_w² and σ_b², >= 0.
    depth
        L >= 1: layers of equal width.

    Returns
    -------
    dict
        ``q`` of each layer's pre-activations, and ``parallel`` and ``orthogonal``, the squared
        gains ‖J u‖² of unit tangents u up to and with each layer's φ; each of shape (depth,).
    """
    activation = activations.get(activation)
    check_scale("x_sq_over_n", x_sq_over_n, positive=True)
    check_scale("sigma_w2", sigma_w2)
    check_scale("sigma_b2", sigma_b2)
    w2, b2 = jnp.asarray(sigma_w2), jnp.asarray(sigma_b2)
    start = jnp.asarray(x_sq_over_n, jnp.result_type(x_sq_over_n, w2, b2, 0.0))

    def step(
        state: tuple[Array, Array, Array, Array], _: None
    ) -> tuple[tuple[Array, Array, Array, Array], tuple[Array, ...]]:
        # Second moments of the signal h, of h with its tangent, and of the tangent.
        signal, mixed, along, across = state
        q, r, w = w2 * signal + b2, w2 * mixed, w2 * along
        stretched = gaussian.expectation(
            lambda x: (x * activation.derivative(x)) ** 2, q, kinks=activation.kinks
        )
        m = gaussian.some_moments(activation, ("phi2", "dphi2", "x_phi_dphi"), q)
        share = r / q  # of z in its tangent
        along = share**2 * stretched + (w - share * r) * m["dphi2"]
        across = w2 * across * m["dphi2"]
        return (m["phi2"], share * m["x_phi_dphi"], along, across), (q, along, across)

    one = jnp.ones_like(start)
    _, (q, parallel, orthogonal) = jax.lax.scan(
        step, (start, jnp.sqrt(start), one, one), None, length=check_count("depth", depth)
    )
    return {"q": q, "parallel": parallel, "orthogonal": orthogonal}


def predict(
    network: Network,
    gram: Float[ArrayLike, "sites sites"],
    mean: Float[ArrayLike, " sites"] | None = None,
) -> Prediction:
    """Every statistic's infinite-width value at every layer.

    A pure function: jit it, vmap it over the network's σ_w and σ_b, differentiate it. It follows
    the dtype of ``gram``.

    Parameters
    ----------
    network
        The law of the network.
    gram
        Shape (sites, sites), (1/n_0) x_a · x_b; see `input_gram`.
    mean
        Shape (sites,): the mean over its components of each input, for a first layer that sees it
        (LayerNorm, weights that are standardised); 0 without it. A first layer that begins with a φ
        takes the inputs as Gaussian over their components, of mean 0.

    Returns
    -------
    Prediction
        Each statistic of `gradflow.statistics`, shape (layers,). ``chi`` is NaN at the top layer,
        which has none above it. ``correlation`` needs two inputs. Where a layer's signals
        are not Gaussian over units, statistics of φ of them are NaN. Where steps that share
        their weights carry a unit's signal on beside them (GRU, LSTM, Residual), nothing is known
        step by step of the signals after the first and of the gradients below the last: NaN, and
        ``why_missing`` says why. `theory.shared_weights` has the theory of a GRU or LSTM.

    Raises
    ------
    InputError
        If the theory does not know what a block makes of its signals; the message says why.

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), Schoenholz et al. 2017 (arXiv:1611.01232).
    """
    check_network(network)
    return _predict(network.unnamed(), *checked_gram(gram, mean))


@program(seconds=lambda network, *_: SECONDS_A_LAYER * network.depth)
def _predict(network: Network, gram: Array, mean: Array | None) -> Prediction:
    return prediction(*limits(network, gram, mean))
