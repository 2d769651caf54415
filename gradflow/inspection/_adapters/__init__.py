"""Adapters: one file for each library of models, which says what its models are.

A file of this folder has a function ``adapt(model, inputs, kwargs) -> Model | None``: None where
the model is not of its library. It imports the library only if the model's class comes from it.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from gradflow.errors import InputError
from gradflow.inspection._adapters import _calls
from gradflow.inspection._reading.model import Model

__all__ = ["ALLOWED", "adapt", "adapted", "check_numbers"]

ALLOWED = (
    "it is a module of Flax, Equinox, Keras on JAX or PyTorch, a pair of functions (init, apply), "
    "as Haiku's are, a Network, or a function of nothing, of a key, or of rngs that returns one"
)


def adapt(
    model: Any, apply: Callable | None, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> Model:
    """A model of any library as two pure functions.

    Parameters
    ----------
    model
        A module of Flax (linen or NNX), Equinox, Keras or PyTorch; a module with its weights or
        state; a function of Haiku, transformed or not; a pair ``(init, apply)`` or
        ``(parameters, apply)``; a `Network`; or a function or class that makes one of these from
        nothing, a key, or rngs.
    apply
        With ``init`` or parameters as ``model``, the function of them.
    inputs
        The arrays that the model is applied to.
    kwargs
        The user's own keyword arguments of that call.

    Raises
    ------
    InputError
        If ``model`` is none of these, has no parameters, cannot be applied to the inputs, or has
        weights that are not numbers.
    """
    found = adapted(model if apply is None else (model, apply), inputs, kwargs)
    if found is None:
        raise InputError(f"model is an object of {_kind(model)}; {ALLOWED}")
    if found.given is not None:
        check_numbers(found.name, found.given)
    return dataclasses.replace(
        found,
        apply=_calls.with_axes(found.apply),
        init=None if found.init is None else _calls.with_axes(found.init),
    )


def adapted(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:
    """The model by the first adapter that knows it, or None."""
    found = (adapter(model, inputs, kwargs) for adapter in _adapters())
    return next(filter(None, found), None)


def check_numbers(name: str, weights: PyTree) -> None:
    """Raise `InputError` if a leaf of a model's weights is NaN or infinite somewhere."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights[0]):
        array = np.asarray(leaf)
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            raise InputError(
                f"{name}{jax.tree_util.keystr(path)} has {bad} values of {array.size} that are NaN "
                "or infinite; all are finite"
            )


@functools.cache
def _adapters() -> tuple[Callable[..., Model | None], ...]:
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return tuple(importlib.import_module(f"{__name__}.{name}").adapt for name in names)


def _kind(model: Any) -> str:
    kind = type(model)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
