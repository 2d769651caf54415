"""Statistics by name and key: which are asked for, where results keep them, and axis labels."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gradflow._checks import check_instance, unknown_name
from gradflow._layers import exp
from gradflow.errors import InputError, UnknownName
from gradflow.statistics import ALL, Statistic

if TYPE_CHECKING:
    import xarray

__all__ = ["BY_KEY", "Values", "checked", "key_of", "labelled", "layers", "with_names"]

# Every statistic by its key in results.
BY_KEY = {statistic.key: statistic for statistic in ALL}


def key_of(name: str, known: Iterable[str]) -> str:
    """The key under which a statistic is kept: its name, or ``log_`` and its name.

    Raises
    ------
    UnknownName
        If neither is known.
    """
    for key in (name, f"log_{name}"):
        if key in known:
            return key
    raise UnknownName(str(unknown_name("quantity", name, known)))


class Values(dict[str, Any]):
    """Arrays by a statistic's key, that also answer to its name: a pytree, and a dict of the keys.

    A quantity that is kept as a natural logarithm, under ``log_<name>``, is computed when it is
    looked up by its name; it may leave the float's range.
    """

    def __missing__(self, name: str) -> Any:
        return exp(self[key_of(name, self.keys())])

    def __contains__(self, name: object) -> bool:
        return any(map(super().__contains__, (name, f"log_{name}")))

    def get(self, name: str, default: Any = None) -> Any:
        """The values under this key or name, or the default."""
        try:
            return self[name]
        except UnknownName:
            return default


def _flatten(values: Values) -> tuple[list[tuple[jax.tree_util.DictKey, Any]], tuple[str, ...]]:
    return [(jax.tree_util.DictKey(key), value) for key, value in values.items()], tuple(values)


jax.tree_util.register_pytree_with_keys(
    Values, _flatten, lambda keys, leaves: Values(zip(keys, leaves, strict=True))
)


def layers(depth: int) -> np.ndarray:
    """The layer numbers 1 … depth."""
    return np.arange(1, depth + 1)


def with_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by key and, for each logarithm, the quantity itself by its name."""
    logs = {s.name: exp(np.asarray(values[s.key])) for s in ALL if s.log and s.key in values}
    return {**logs, **values}


def labelled(
    dataset: "xarray.Dataset", known: Iterable[Statistic] | None = None
) -> "xarray.Dataset":
    """Give every variable that is named after a statistic (of `ALL`) its label."""
    for statistic in ALL if known is None else known:
        names = {statistic.name: statistic.label}
        if statistic.log:
            names[statistic.key] = f"natural logarithm of {statistic.label}"
        for name, label in names.items():
            for variable, words in ((name, label), (f"{name}_theory", f"{label}, by theory")):
                if variable in dataset:
                    dataset[variable].attrs["long_name"] = words
    return dataset


def checked(wanted: Any) -> tuple[Statistic, ...]:
    """The statistics to measure, as a tuple.

    Raises
    ------
    InputError
        If one is no `Statistic`, or two have the same name.
    """
    statistics = tuple(wanted) if isinstance(wanted, Iterable) else (wanted,)
    for statistic in statistics:
        check_instance(
            "wanted", statistic, Statistic, "Statistics, as statistics.ALL or (statistics.q,)"
        )
    names = [statistic.name for statistic in statistics]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"wanted has {name!r} twice; each statistic has a name of its own")
    return statistics
