"""Bad input, said in one sentence: what was given, what is allowed, and the nearest right word."""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np

__all__ = ["InputError", "UnknownName", "check_count", "check_number", "check_scale"]
__all__ += ["check_sequence", "is_number", "is_traced", "printable", "unknown_name"]

LARGEST_COUNT = 2**31 - 1
# Characters of a message: what was given may be a file's whole content.
_LONGEST = 1200


def printable(text: str, longest: int = _LONGEST) -> str:
    """Return text for one line of a terminal.

    Control characters, newlines and what else cannot be seen are escaped, and the middle of a long
    text is left out: what a file says must neither drive a terminal nor look like our own words.
    """
    if len(text) > longest:
        kept = longest // 2
        left_out = f" [{len(text) - 2 * kept} characters] "
        text = f"{text[:kept]}{left_out}{text[-kept:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(ValueError):
    """The caller's input cannot be used. The message is one sentence that says what can."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnknownName(InputError, KeyError):
    """A result was asked for what it does not hold: a mapping's KeyError, with a sentence."""

    __str__ = Exception.__str__


def unknown_name(what: str, value: object, allowed: Iterable[str]) -> InputError:
    """Return the error for a name that is not in a list, with the nearest one that is."""
    names = sorted(allowed)
    nearest = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    suggestion = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return InputError(f"unknown {what} {value!r}{suggestion}; it is one of {', '.join(names)}")


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return ``value`` as an int of at least ``minimum``, or raise `InputError`.

    It is at most what an integer of 32 bits holds, as JAX's are.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise InputError(f"{name} is {value!r}; it is a whole number of at least {minimum}")
    if int(value) > LARGEST_COUNT:
        raise InputError(f"{name} is {value!r}; it is a whole number of at most {LARGEST_COUNT}")
    return int(value)


def check_sequence(name: str, value: Any, what: str) -> tuple[Any, ...]:
    """Return a sequence's entries, or raise `InputError`: it is ``what`` in words."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {value!r}; it is {what}")
    return tuple(value)


def is_number(value: Any) -> bool:
    """Whether it is one real number, finite or not, of Python, NumPy or JAX."""
    found = np.asarray(value) if isinstance(value, Real) or hasattr(value, "dtype") else None
    return found is not None and found.shape == () and _is_real(found)


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Raise `InputError` unless the value is one finite number, at least 0 or above it."""
    if is_traced(value):
        return
    if not is_number(value) or not 0 <= value < math.inf or (positive and value == 0):
        allowed = "a finite number above 0" if positive else "a finite number of at least 0"
        raise InputError(f"{name} is {value!r}; it is {allowed}")


def is_traced(value: Any) -> bool:
    """Whether a value is known only when a program runs, so that it cannot be checked before."""
    import jax  # noqa: PLC0415  (slow to import, and the command line asks before it needs it)

    return isinstance(value, jax.core.Tracer)


def check_scale(name: str, value: Any, *, positive: bool = False) -> None:
    """Raise `InputError` unless all values are finite and at least 0, or above it.

    Tracers are not looked at.
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


def _is_real(array: np.ndarray) -> bool:
    """Whether it is of real numbers; float types that JAX brings along, as bfloat16, are."""
    return array.dtype.kind in "fiub" or "float" in array.dtype.name
