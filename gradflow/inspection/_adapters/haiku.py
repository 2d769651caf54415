"""Haiku: a function that uses its modules. What `hk.transform` returns is a pair of functions."""

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gradflow.inspection._adapters import _calls, functions, maker
from gradflow.inspection._reading.model import Model


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:
    """The model of a function of the inputs whose module, or outer function, uses Haiku."""
    haiku: Any = sys.modules.get("haiku")
    if haiku is None or not inspect.isfunction(model) or maker.maker_of(model) is not None:
        return None
    if not any(map(_of_haiku, (*model.__globals__.values(), *_enclosed(model)))):
        return None
    named, mode = _calls.in_training(model, kwargs)
    found = functions.adapt(haiku.transform_with_state(model), inputs, named)
    return None if found is None else dataclasses.replace(found, name=model.__name__, mode=mode)


def _enclosed(function: Callable) -> Iterator[Any]:
    """The values of the variables that a function has of those around it."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it has no value yet
            yield cell.cell_contents


def _of_haiku(value: Any) -> bool:
    """Whether it is Haiku itself, or from it, or a class derived from one of its classes."""
    values = value.__mro__ if isinstance(value, type) else (value,)
    names = (getattr(v, "__module__", None) or getattr(v, "__name__", None) for v in values)
    return any(isinstance(name, str) and name.partition(".")[0] == "haiku" for name in names)
