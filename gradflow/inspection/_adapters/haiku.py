"""Haiku: a function that uses its modules. What `hk.transform` returns is a pair of functions."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gradflow.inspection._adapters import _calls, functions, maker
from gradflow.inspection._model import Model


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:
    """The model of a function of the inputs in whose module Haiku is used."""
    haiku: Any = sys.modules.get("haiku")
    names = getattr(model, "__globals__", {}).values()
    if haiku is None or not any(map(_of_haiku, names)) or maker.maker_of(model) is not None:
        return None
    named, mode = _calls.in_training(model, kwargs)
    found = functions.adapt(haiku.transform_with_state(model), inputs, named)
    return None if found is None else dataclasses.replace(found, name=model.__name__, mode=mode)


def _of_haiku(value: Any) -> bool:
    """Whether it is Haiku itself, or from it."""
    name = getattr(value, "__module__", None) or getattr(value, "__name__", None)
    return isinstance(name, str) and name.partition(".")[0] == "haiku"
