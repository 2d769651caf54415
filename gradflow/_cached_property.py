"""A property that is computed once for each object, and kept."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["cached_property"]

_Value = TypeVar("_Value")


class cached_property(functools.cached_property[_Value]):  # noqa: N801  (named as Python's)
    """Python's, without the lock that it holds over all objects of a class up to Python 3.11.

    A value that is traced or compiled waits for other threads that trace, and they may wait for
    such a lock without end. Two threads may both compute a value here.
    """

    def __init__(self, function: Callable[[Any], _Value]) -> None:
        """Keep the values of this method."""
        super().__init__(function)
        self.lock = contextlib.nullcontext()
