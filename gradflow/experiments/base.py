"""What an experiment is, and what experiments share: data, and networks of several kinds trained.

An experiment is a function with the sizes as keyword arguments, from which comes a labelled
`xarray.Dataset`, and three functions of that dataset: a table, findings in plain sentences, and a
figure. So a dataset that was written and read again has the same table, findings and figure.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray
from matplotlib.figure import Figure

from gradflow import data, training
from gradflow._checks import check_count
from gradflow.data import Dataset, Split
from gradflow.networks import Network

__all__ = ["Experiment", "Table"]

# Called as (what is trained, updates done, updates in all).
Progress = Callable[[str, int, int], None]

# Images of the test set that everything is measured on, as the paper does (section 3).
MONITORED = 300


class Table(NamedTuple):
    """Rows of numbers and words by column, and notes on what the columns are."""

    title: str
    rows: list[dict[str, Any]]
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment: how it is run, and what is said of its dataset.

    Attributes
    ----------
    name
        On the command line.
    run
        Trains, and returns what was recorded; its docstring's first line says what it shows.
    table, findings, figure
        Of such a dataset.
    """

    name: str
    run: Callable[..., xarray.Dataset]
    table: Callable[[xarray.Dataset], Table]
    findings: Callable[[xarray.Dataset], list[str]]
    figure: Callable[[xarray.Dataset], Figure]

    @property
    def summary(self) -> str:
        """What it shows, in a line."""
        return inspect.getdoc(self.run).partition("\n")[0]  # type: ignore[union-attr]

    @property
    def options(self) -> dict[str, Any]:
        """Its keyword arguments and their defaults."""
        parameters = inspect.signature(self.run).parameters
        return {
            name: p.default for name, p in parameters.items() if name not in ("progress", "save")
        }


def divided(dataset: Dataset | str, seed: int) -> Split:
    """Return a dataset, or the one of this name, as training, validation and test sets."""
    found = data.load(dataset) if isinstance(dataset, str) else dataset
    return data.split(found, key=seed)


def shape(parts: Split, width: int, depth: int) -> tuple[int, ...]:
    """Return the widths of a network with so many hidden layers, and one that makes logits."""
    width, depth = check_count("width", width), check_count("depth", depth)
    train = parts.train
    return (train.inputs.shape[1], *[width] * depth, train.classes)


def train_each(
    laws: Mapping[Any, Network],
    parts: Split,
    *,
    networks: int,
    seed: int,
    learning_rates: Sequence[float],
    along: str = "network",
    monitored: int = MONITORED,
    progress: Progress | None = None,
    own: Mapping[Any, Mapping[str, Any]] | None = None,
    **how: Any,
) -> xarray.Dataset:
    """Train networks of each of these laws, and return what was recorded along a new axis.

    Parameters
    ----------
    laws
        By name, or whatever they are told apart by; they may differ in anything, and what is of
        layers that one does not have is NaN.
    parts
        Trained on the first, monitored on the test set.
    networks
        How many random networks of each.
    learning_rates
        Those to try: what is returned of each law is of the one that is best on validation data.
    along
        What to call the axis.
    monitored
        Of how many images of the test set, at most.
    own, how
        Further arguments of `training.train`: of one law, by its name, and of all.
    """
    check_count("networks", networks)
    rates = list(learning_rates)
    train, seen, held_out = parts.train, parts.test[:monitored], parts.validation
    found = []
    for name, law in laws.items():
        result = training.train(
            law,
            train.inputs,
            train.labels,
            monitor=(seen.inputs, seen.labels),
            validation=(held_out.inputs, held_out.labels) if len(rates) > 1 else None,
            learning_rate=rates,
            seeds=networks,
            key=seed,
            progress=named(progress, str(name) if along == "network" else f"{along} {name}"),
            **how,
            **(own or {}).get(name, {}),
        )
        best = int(result.best_rate()[0]) if len(rates) > 1 else 0
        one = result.to_xarray().isel(network=0, learning_rate=best, drop=False)
        found.append(one.drop_vars("network").expand_dims({along: [name]}))
    together = xarray.concat(
        found, along, join="outer", data_vars="all", coords="all", combine_attrs="drop_conflicts"
    )
    return together.assign_attrs(
        width=found[-1].attrs["widths"][1],
        depth=max(law.depth for law in laws.values()) - 1,
        classes=train.classes,
        learning_rates=rates,
        seed=seed,
        steps=int(together.step[-1]),
        seconds=math.fsum(one.attrs["seconds"] for one in found),
        compile_seconds=math.fsum(one.attrs["compile_seconds"] for one in found),
    )


def named(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """Return progress of what has this name."""
    return functools.partial(progress, name) if progress else None


def recorded_steps(steps: int, count: int) -> list[int]:
    """Return so many steps, evenly from 0 to the last one."""
    steps = check_count("steps", steps)
    return sorted({round(steps * k / count) for k in range(count + 1)})


def spread_steps(steps: int, count: int) -> list[int]:
    """Return at most so many steps, ever further apart, from 0 to the last one."""
    steps = check_count("steps", steps)
    return sorted({round(step) - 1 for step in np.geomspace(1, steps + 1, count).tolist()})


def geometric_mean(values: xarray.DataArray, over: str = "seed") -> xarray.DataArray:
    """Return the geometric mean over networks whose values are finite in all layers."""
    with np.errstate(divide="ignore"):
        logs = xarray.ufuncs.log(values)
    usable = logs < np.inf  # a network that has not moved is -inf
    if "layer" in values.dims:
        usable = usable.all("layer")
    return np.exp(logs.where(usable).mean(over))


def recipe(dataset: xarray.Dataset) -> str:
    """Return the sizes of networks and of their training in a few words."""
    attrs = dataset.attrs
    return (
        f"layers of {attrs['width']} and one of {attrs['classes']}, {attrs['steps']} steps of "
        f"{attrs['batch']}, {dataset.sizes['seed']} networks of each"
    )


def percent(values: xarray.DataArray, over: str = "seed") -> str:
    """Return mean ± standard deviation over networks, in per cent."""
    deviation = f" ± {100 * float(values.std(over, ddof=1)):.1f}" if values.sizes[over] > 1 else ""
    return f"{100 * float(values.mean(over)):.1f}{deviation} %"


def ranges(layers: np.ndarray) -> str:
    """Return the numbers of layers in a few words: layer 3, layers 1 to 3 and 7."""
    parts: list[list[int]] = []
    for number in layers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = [f"{p[0]} to {p[-1]}" if len(p) > 1 else str(p[0]) for p in parts]
    if not words:
        return "no layer"
    listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"layer{'s' if len(layers) > 1 else ''} {listed}"
