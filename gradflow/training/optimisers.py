"""Optimisers and clippings by name: optax's, each as a function of its learning rate or threshold.

To add one, write it into the table. `train` takes any other as well.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from gradflow._arguments import from_seed
from gradflow._checks import check_scale, unknown_name
from gradflow.errors import InputError

__all__ = ["CLIPPINGS", "OPTIMISERS", "clipping", "optimiser", "with_noise"]

_Optimiser = Callable[[Any], optax.GradientTransformation]

OPTIMISERS: dict[str, _Optimiser] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "nesterov": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adagrad": optax.adagrad,
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
}


def _clip_by_norm(threshold: float) -> optax.GradientTransformation:
    """Scale each tensor's gradient down to this norm, if it is above it."""

    def clipped(gradient: Array) -> Array:
        norm = jnp.linalg.norm(gradient)
        return gradient * jnp.where(norm > threshold, threshold / norm, 1)

    return optax.stateless(lambda gradients, _: jax.tree.map(clipped, gradients))


# By value (each entry), by the norm of each layer's matrix, by the norm of all gradients together
# (Pascanu et al. 2013), and each unit's by the norm of its weights (Brock et al. 2021).
CLIPPINGS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "value": optax.clip,
    "norm": _clip_by_norm,
    "global-norm": optax.clip_by_global_norm,
    "adaptive": optax.adaptive_grad_clip,
}


def optimiser(name: str) -> _Optimiser:
    """The optimiser of this name, a function of the learning rate.

    Raises
    ------
    InputError
        If there is none.
    """
    if name not in OPTIMISERS:
        raise unknown_name("optimiser", name, OPTIMISERS)
    return OPTIMISERS[name]


def clipping(text: str) -> optax.GradientTransformation:
    """The clipping of this name and threshold: ``value:1.0``, ``global-norm:1``, ``adaptive:0.01``.

    Raises
    ------
    InputError
        If there is none of this name, or its threshold is not a number above 0.
    """
    name, colon, threshold = text.partition(":")
    if name not in CLIPPINGS:
        raise unknown_name("clipping", name, CLIPPINGS)
    try:
        number = float(threshold)
    except ValueError:
        number = math.nan
    if not (colon and math.isfinite(number) and number > 0):
        raise InputError(
            f"clip is {text!r}; it is a name and a threshold above 0 with a colon between, as "
            f"{name}:1.0"
        )
    return CLIPPINGS[name](number)


def with_noise(optimiser: _Optimiser, variance: float, decay: float = 0.55) -> _Optimiser:
    """The optimiser with noise N(0, variance/(1 + t)^decay) added to gradients first, at step t.

    Each network draws its own noise.

    References
    ----------
    Neelakantan et al. 2015, arXiv:1511.06807.

    Raises
    ------
    InputError
        If a number is not finite and at least 0.
    """
    check_scale("variance", variance)
    check_scale("decay", decay)

    def noisy(rate: Any) -> optax.GradientTransformation:
        # The key is made here and not before: making one starts JAX, which importing must not.
        return optax.chain(optax.add_noise(variance, decay, from_seed(0)), optimiser(rate))

    return noisy
