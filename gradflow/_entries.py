"""Checks of what a file or a command says: a function of an entry's path and value for each kind.

A check takes the path of an entry, as ``network.width``, and its value, and returns the value as
the program uses it. What is wrong is an `InputError` of one sentence that begins with the path.
A check may stand in a signature, as ``width: Annotated[int, Whole()]``, where `schema` reads it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gradflow._checks import unknown_name
from gradflow.errors import InputError

__all__ = ["Beside", "Check", "LookedUp", "Number", "OneOf", "Whole", "Wholes", "Widths"]
__all__ += ["check_entries"]
__all__ += ["check_known", "clipped", "finite", "flag", "path_of", "positive", "probability"]
__all__ += ["scale", "share", "shown", "table", "text"]

# Above what any file can mean, and far below what would fill the memory before it is refused.
_MOST_UNITS = 10**9
_LONGEST_LIST = 100_000
# More changes of width would take minutes to compile.
_MOST_CHANGES = 1000

Check = Callable[[str, object], Any]


def path_of(table: str, key: str) -> str:
    """The path of an entry of a table; its key is quoted where TOML would quote it."""
    plain = key.replace("-", "_").isidentifier() and key.isascii() and len(key) <= 60
    last = key if plain else shown(key)
    return f"{table}.{last}" if table else last


def shown(value: object) -> str:
    """A value as a sentence shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def clipped(text: str, most: int = 60) -> str:
    """The beginning of a text."""
    return text if len(text) <= most else f"{text[:most]}…"


def check_known(path: str, table: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Raise `InputError` if a table has an entry that is not allowed."""
    for key in table:
        if key not in allowed:
            where = f"{path_of(path, key)}: "
            raise InputError(f"{where}{unknown_name('entry', clipped(key), allowed)}")


def check_entries(
    path: str, table: Mapping[str, Any], checks: Mapping[str, Check]
) -> dict[str, Any]:
    """The entries of a table, each converted by its check."""
    check_known(path, table, checks)
    return {key: checks[key](f"{path}.{key}", value) for key, value in table.items()}


def table(name: str, file: Mapping[str, Any]) -> Mapping[str, Any]:
    """A table of the file, empty where the file has none."""
    table = file.get(name, {})
    if not isinstance(table, Mapping):
        raise InputError(f"{name} is {shown(table)}; it is a table, [{name}]")
    return table


def text(path: str, value: object) -> str:
    """Check text."""
    if not isinstance(value, str):
        raise InputError(f"{path} is {shown(value)}; it is text in quotes")
    return value


def flag(path: str, value: object) -> bool:
    """Check true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{path} is {shown(value)}; it is true or false")
    return value


@dataclasses.dataclass(frozen=True)
class Whole:
    """Checks a whole number in a range."""

    most: int = _MOST_UNITS
    least: int = 1

    def __call__(self, path: str, value: object) -> int:
        """The value, if it is a whole number in the range; else `InputError`."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and self.least <= value <= self.most):  # type: ignore[operator]
            raise InputError(
                f"{path} is {shown(value)}; it is a whole number from {self.least} to {self.most}"
            )
        return value  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Wholes:
    """Checks a list of whole numbers of at least 1, which is ``what`` in words."""

    what: str
    least: int = 0

    def __call__(self, path: str, value: object) -> list[int]:
        """The list, if it is one of whole numbers; else `InputError`."""
        if not isinstance(value, list) or not self.least <= len(value) <= _LONGEST_LIST:
            raise InputError(f"{path} is {shown(value)}; it is {self.what}")
        return [Whole()(f"{path}[{number}]", one) for number, one in enumerate(value)]


class Widths:
    """Checks the widths of a network, as a file has them."""

    def __call__(self, path: str, value: object) -> list[int]:
        """The widths, if they are a list of two or more; else `InputError`."""
        widths = Wholes("the input's width and every layer's, as [784, 100]", 2)(path, value)
        changes = sum(below != above for below, above in itertools.pairwise(widths))
        if changes > _MOST_CHANGES:
            raise InputError(
                f"{path} changes {changes} times; it has at most {_MOST_CHANGES} changes of "
                "width, each of which is compiled by itself"
            )
        return widths


@dataclasses.dataclass(frozen=True)
class Number:
    """Checks a finite number that fits; ``allowed`` says in words which do."""

    allowed: str
    fits: Callable[[float], bool] = dataclasses.field(default=lambda _: True, repr=False)

    def __call__(self, path: str, value: object) -> float:
        """The number, if it is finite and fits; else `InputError`."""
        wrong = InputError(f"{path} is {shown(value)}; it is {self.allowed}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong
        try:
            number = float(value)
        except OverflowError as error:
            raise wrong from error
        if not math.isfinite(number) or not self.fits(number):
            raise wrong
        return number + 0.0  # -0.0 is 0.0


# Beyond 1e15 a float32 has no room for the square.
scale = Number("a number from 0 to 1e15", lambda v: 0 <= v <= 1e15)
positive = Number("a number above 0, at most 1e15", lambda v: 0 < v <= 1e15)
probability = Number("a number above 0, at most 1", lambda v: 0 < v <= 1)
share = Number("a number from 0 to 1", lambda v: 0 <= v <= 1)
finite = Number("a finite number")


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Checks one of some names; ``what`` says what they are names of.

    With ``otherwise``, what is no text is checked by that.
    """

    what: str
    names: tuple[str, ...]
    otherwise: Check | None = None

    def __call__(self, path: str, value: object) -> Any:
        """The name, if it is one of them, or what `otherwise` makes of the value."""
        if not isinstance(value, str):
            if self.otherwise is not None:
                return self.otherwise(path, value)
            listed = ", ".join(sorted(self.names))
            raise InputError(f"{path} is {shown(value)}; it is one of {listed}")
        if value not in self.names:
            raise InputError(f"{path}: {unknown_name(self.what, clipped(value), self.names)}")
        return value


@dataclasses.dataclass(frozen=True)
class LookedUp:
    """Checks a name that a function knows, or raises `InputError` for."""

    get: Callable[[str], object]

    def __call__(self, path: str, value: object) -> str:
        """The name, if the function knows it; else `InputError`."""
        name = text(path, value)
        try:
            self.get(name)
        except InputError as error:
            raise InputError(f"{path}: {clipped(str(error), 400)}") from error
        return name


@dataclasses.dataclass(frozen=True)
class Beside:
    """Marks a parameter that means nothing without another one, by that one's name."""

    option: str
