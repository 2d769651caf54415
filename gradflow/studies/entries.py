"""The entries of a study file: what each may be, by its name.

A check is a function of an entry's path and its value, and returns what that means; what is wrong
is an `InputError` of one sentence that begins with the path.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gradflow import activations, builders, ensembles
from gradflow._checks import unknown_name
from gradflow.errors import InputError

__all__ = ["AXES", "COUNTS", "INPUTS", "MLP_ONLY", "MOST_NETWORKS", "NETWORK", "NO_NORM"]
__all__ += ["NUMBERS", "RESIDUAL_ONLY", "SCALES", "Check", "clipped", "count", "fields", "finite"]
__all__ += [
    "flag",
    "how_many",
    "known",
    "label",
    "looked_up",
    "name",
    "number",
    "positive",
    "scale",
]
__all__ += ["scale", "seed", "shown", "table", "text", "under"]

# Above what any file can mean, and far below what would fill the memory before it is refused.
MOST_NETWORKS = 2**31 - 1  # numbers of networks are int32
_MOST_UNITS = 10**9
_MOST_CHANGES = 1000

Check = Callable[[str, object], Any]


def under(path: str, key: str) -> str:
    """Return the path of an entry of a table; quoted, where TOML would quote its key."""
    plain = key.replace("-", "_").isidentifier() and key.isascii() and len(key) <= 60
    last = key if plain else shown(key)
    return f"{path}.{last}" if path else last


def shown(value: object) -> str:
    """Return a value as a sentence shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def known(path: str, table: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Raise `InputError` if a table has an entry that is not allowed."""
    for key in table:
        if key not in allowed:
            where = f"{under(path, key)}: "
            raise InputError(f"{where}{unknown_name('entry', clipped(key), allowed)}")


def clipped(text: str, most: int = 60) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= most else f"{text[:most]}…"


def table(name: str, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a table of the file, empty without it."""
    table = found.get(name, {})
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


def count(most: int = _MOST_UNITS, least: int = 1) -> Check:
    """Return the check of a whole number in a range."""

    def check(path: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(
                f"{path} is {shown(value)}; it is a whole number from {least} to {most}"
            )
        return value

    return check


def number(
    allowed: str, fits: Callable[[float], bool] = lambda _: True
) -> Callable[[str, object], float]:
    """Return the check of a finite number that fits."""

    def check(path: str, value: object) -> float:
        wrong = InputError(f"{path} is {shown(value)}; it is {allowed}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong
        try:
            number = float(value)
        except OverflowError as error:
            raise wrong from error
        if not math.isfinite(number) or not fits(number):
            raise wrong
        return number + 0.0  # -0.0 is 0.0

    return check


def name(what: str, allowed: Iterable[str]) -> Check:
    """Return the check of one of some names, which says what it is a name of."""
    names = tuple(allowed)

    def check(path: str, value: object) -> str:
        if not isinstance(value, str):
            raise InputError(f"{path} is {shown(value)}; it is one of {', '.join(sorted(names))}")
        if value not in names:
            raise InputError(f"{path}: {unknown_name(what, clipped(value), names)}")
        return value

    return check


def looked_up(get: Callable[[str], object]) -> Check:
    """Return the check of a name that a function knows, or raises `InputError`."""

    def check(path: str, value: object) -> str:
        name = text(path, value)
        try:
            get(name)
        except InputError as error:
            raise InputError(f"{path}: {clipped(str(error), 400)}") from error
        return name

    return check


# Beyond these a float32 has no room for their squares.
scale = number("a number from 0 to 1e15", lambda v: 0 <= v <= 1e15)
positive = number("a number above 0, at most 1e15", lambda v: 0 < v <= 1e15)
finite = number("a finite number")
_share = number("a number above 0, at most 1", lambda v: 0 < v <= 1)


def _branch_scale(path: str, value: object) -> float | str:
    if isinstance(value, str):
        return str(name("scale", builders.SCALES)(path, value))
    return scale(path, value)


def _widths(path: str, value: object) -> list[int]:
    if not isinstance(value, list) or not 2 <= len(value) <= 100_000:
        raise InputError(
            f"{path} is {shown(value)}; it is the input's width and every layer's, as [784, 100]"
        )
    found = [count()(f"{path}[{place}]", width) for place, width in enumerate(value)]
    changes = sum(below != above for below, above in itertools.pairwise(found))
    if changes > _MOST_CHANGES:
        raise InputError(
            f"{path} changes {changes} times; it has at most {_MOST_CHANGES} changes of width, "
            "each of which is compiled by itself"
        )
    return found


NO_NORM = "none"

# What stands in [network]: by field, what it may be.
NETWORK: dict[str, Check] = {
    "kind": name("kind", ("mlp", "residual")),
    "activation": looked_up(activations.get),
    "weights": looked_up(ensembles.get),
    "sigma_w": positive,
    "sigma_w2": positive,
    "distribution": name("distribution", ensembles.DISTRIBUTIONS),
    "last": looked_up(ensembles.get),
    "sigma_b": scale,
    "sigma_b2": scale,
    "width": count(),
    "depth": count(100_000),
    "input_width": count(),
    "widths": _widths,
    "norm": name("norm", (*builders.NORMS, NO_NORM)),
    "norm_position": name("norm_position", ("pre", "post")),
    "keep_rate": _share,
    "scale": _branch_scale,
    "layers": count(100),
    "hidden": count(),
    "weights_first": flag,
}
RESIDUAL_ONLY = ("scale", "layers", "hidden", "weights_first")
MLP_ONLY = ("widths", "last")

# What stands in [inputs].
INPUTS: dict[str, Check] = {
    "batch": count(10_000),
    "mean_square": scale,
    "correlation": number("a number from -1 to 1", lambda v: -1 <= v <= 1),
    "data": name("data", ("digits",)),
}
# A key has 32 bits where JAX has no 64-bit integers.
seed = count(2**32 - 1, 0)
how_many = count(MOST_NETWORKS)
# What an axis may go over: all of these but a list.
AXES: dict[str, Check] = {**NETWORK, **INPUTS, "seed": seed, "networks": how_many}
del AXES["widths"]
SCALES = ("sigma_w", "sigma_w2", "sigma_b", "sigma_b2", "mean_square", "correlation")
NUMBERS = (*SCALES, "keep_rate", "scale")
COUNTS = ("width", "depth", "input_width", "hidden", "layers", "batch", "seed", "networks")


def label(field: str) -> str:
    """Return what results call a field, where a statistic has its name."""
    return f"input_{field}" if field == "correlation" else field


def fields(path: str, table: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return what the entries of a table mean, each by its check."""
    known(path, table, checks)
    return {key: checks[key](f"{path}.{key}", value) for key, value in table.items()}
