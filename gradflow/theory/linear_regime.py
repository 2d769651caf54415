"""The linear regime of Glorot & Bengio 2010: variances when φ(z) ≈ φ'(0) z at every unit.

With weights of mean 0, W^l of shape (n_l, n_{l-1}), the expected second moments are *exact* for a
linear network of any widths. In our indices, z^l = W^l h^{l-1} and δ^l = ∂C/∂z^l,

    forward           Var z^l      = Var x · Π_{k<=l} n_{k-1} Var W^k · s²^(l-1)      (eq. 5)
    backward          Var δ^l      = Var δ^L · Π_{k>l} n_k Var W^k · s²^(L-l)         (eq. 6)
    weight gradient   Var ∂C/∂W^l  = Var h^{l-1} · Var δ^l                            (eqs. 3, 7)

with s = φ'(0), which the paper takes as 1 (eq. 4). Keeping the first constant asks for
n_{l-1} Var W^l = 1 (eq. 10), the second for n_l Var W^l = 1 (eq. 11); Var W = 2/(n_{l-1}+n_l), the
'normalized' ensemble, is the compromise (eq. 12). The products are derived here, not transcribed:
as printed, (6) and (7) disagree on an index.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradflow import ensembles
from gradflow._checks import check_count, check_sequence
from gradflow.ensembles import Ensemble
from gradflow.errors import InputError
from gradflow.predictions import Prediction

__all__ = ["predict", "variances", "weight_variances"]


def weight_variances(widths: Sequence[int], weights: Ensemble | str) -> np.ndarray:
    """Var W^l for l = 1…L, shape (layers,), for widths (n_0, …, n_L).

    Raises
    ------
    InputError
        If a width is not a whole number of at least 1, or the ensemble is unknown.
    """
    needs = "the input's width and every layer's"
    widths = [check_count("width", n) for n in check_sequence("widths", widths, needs)]
    ensemble = ensembles.get(weights)
    if ensemble.mean is not None or ensemble.distribution.structured:
        raise InputError(f"weights is {ensemble.name!r}; the linear regime is of weights of mean 0")
    return np.array([ensemble.variance(m, n) for m, n in zip(widths[:-1], widths[1:], strict=True)])


def variances(
    widths: Sequence[int],
    weight_variance: ArrayLike,
    *,
    input_variance: ArrayLike = 1.0,
    top_variance: ArrayLike = 1.0,
    slope: ArrayLike = 1.0,
) -> Prediction:
    """The variances of a linear network, forward and backward (eqs. 5-7).

    A pure function of its numbers (jit, vmap and grad through it); ``widths`` is static.

    Parameters
    ----------
    widths
        (n_0, …, n_L).
    weight_variance
        Var W^l, shape (layers,).
    input_variance
        Mean square of an input's components, E[x²].
    top_variance
        Var δ^L, of a component of the gradient at the top layer.
    slope
        s = φ'(0), dimensionless.

    Returns
    -------
    Prediction
        q (Var z^l), gradient_variance and weight_gradient_variance, each of shape (layers,).

    Raises
    ------
    InputError
        If there is not one weight variance for each layer.
    """
    weight_variance = jnp.asarray(weight_variance)
    if weight_variance.shape != (len(widths) - 1,):
        raise InputError(
            f"weight_variance has shape {weight_variance.shape}; widths {tuple(widths)!r} have "
            f"{len(widths) - 1} layers, so it is of shape ({len(widths) - 1},)"
        )
    n = jnp.asarray(widths, weight_variance.dtype)
    log_s2 = 2 * jnp.log(jnp.asarray(slope, weight_variance.dtype))
    log_up = jnp.log(n[:-1] * weight_variance)
    log_down = jnp.log(n[1:] * weight_variance)
    layers_below = jnp.arange(weight_variance.shape[0], dtype=weight_variance.dtype)
    layers_above = layers_below[::-1]

    log_q = jnp.cumsum(log_up) + layers_below * log_s2 + jnp.log(input_variance)
    from_above = jnp.cumsum(log_down[::-1])[::-1] - log_down
    log_gradient = from_above + layers_above * log_s2 + jnp.log(top_variance)
    log_h_below = jnp.concatenate([jnp.log(input_variance) * jnp.ones(1), log_q[:-1] + log_s2])
    return Prediction(
        {
            "log_q": log_q,
            "log_gradient_variance": log_gradient,
            "log_weight_gradient_variance": log_h_below + log_gradient,
        }
    )


def predict(widths: Sequence[int], weights: Ensemble | str) -> Prediction:
    """The paper's variances (φ' ≈ 1, unit input and top) for an ensemble and any widths.

    Raises
    ------
    InputError
        If a width or the ensemble is not allowed.
    """
    return variances(widths, weight_variances(widths, weights))
