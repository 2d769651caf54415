"""Checks of arguments, for every public function: each raises `InputError` with one sentence.

Nothing here imports JAX at import time, because the command line checks its options before JAX
starts.
"""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np

from gradflow.errors import InputError

LARGEST_COUNT = 2**31 - 1  # JAX counts in integers of 32 bits
_LONGEST = 60


def shown(value: Any) -> str:
    """A value for an error message: arrays by shape and dtype, others by their repr, cut short."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def unknown_name(what: str, value: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not in a list, with the nearest name that is.

    Parameters
    ----------
    what
        The kind of thing that has the name, as ``"activation"``.
    value
        The name that was given.
    allowed
        All names that are known.
    """
    names = sorted(allowed)
    nearest = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    suggestion = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return InputError(f"unknown {what} {value!r}{suggestion}; it is one of {', '.join(names)}")


def check_instance(name: str, value: Any, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise `InputError` unless the value is an instance of ``kinds``, in words ``what``."""
    if not isinstance(value, kinds):
        raise InputError(f"{name} is {shown(value)}; it is {what}")


def check_progress(progress: Any) -> None:
    """Raise `InputError` unless ``progress`` is None or callable."""
    if progress is not None and not callable(progress):
        raise InputError(
            f"progress is {shown(progress)}; it is a function of (how many are done, of how many)"
        )


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """The value as an int, if it is a whole number from ``minimum`` to `LARGEST_COUNT`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise InputError(f"{name} is {value!r}; it is a whole number of at least {minimum}")
    if int(value) > LARGEST_COUNT:
        raise InputError(f"{name} is {value!r}; it is a whole number of at most {LARGEST_COUNT}")
    return int(value)


def check_sequence(name: str, value: Any, what: str) -> tuple[Any, ...]:
    """The entries of a sequence, in words ``what``; text is no sequence here."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {value!r}; it is {what}")
    return tuple(value)


def is_number(value: Any) -> bool:
    """Whether a value is one real number, finite or not, of Python, NumPy or JAX."""
    if not (isinstance(value, Real) or hasattr(value, "dtype")):
        return False
    array = np.asarray(value)
    return array.shape == () and _is_real(array)


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Raise `InputError` unless the value is one finite number, at least 0 or above 0.

    A traced value passes: it is known only when the program runs.
    """
    if is_traced(value):
        return
    if not is_number(value) or not 0 <= value < math.inf or (positive and value == 0):
        allowed = "a finite number above 0" if positive else "a finite number of at least 0"
        raise InputError(f"{name} is {value!r}; it is {allowed}")


def check_scale(name: str, value: Any, *, positive: bool = False) -> None:
    """Raise `InputError` unless all of an array's values are finite, and at least 0 or above 0.

    A traced array passes: its values are known only when the program runs.
    """
    if is_traced(value):
        return
    array = np.asarray(value)
    allowed = "a finite number above 0" if positive else "a finite number, 0 or more"
    if not _is_real(array):
        raise InputError(f"{name} is {value!r}; it is {allowed}")
    bad = array[~(np.isfinite(array) & ((array > 0) if positive else (array >= 0)))]
    if bad.size:
        raise InputError(f"{name} is {bad.flat[0]}; it is {allowed}")


def is_traced(value: Any) -> bool:
    """Whether a value is traced by JAX, and so is known only when the program runs."""
    import jax  # noqa: PLC0415

    return isinstance(value, jax.core.Tracer)


def _is_real(array: np.ndarray) -> bool:
    """Whether an array has real numbers: integers, booleans, and floats, bfloat16 among them."""
    return array.dtype.kind in "fiub" or "float" in array.dtype.name
