"""What an experiment is: a recipe, a function that trains by it, and what is said of its results.

A `Recipe` holds the options that experiments share, with each experiment's own defaults; options of
one experiment alone are keyword arguments of its function. `Experiment.options` has both kinds,
which the command line reads. From an experiment comes a labelled `xarray.Dataset`; its table,
findings in plain sentences and figure are functions of that dataset, so that a dataset that was
written and read again has the same ones.
"""

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import xarray
from matplotlib.figure import Figure

from gradflow import data as datasets
from gradflow import training
from gradflow._checks import check_count
from gradflow.data import Dataset, Split
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.training import Recording

__all__ = ["Experiment", "Option", "Recipe", "Table"]

# Images of the test set that everything is measured on, as the paper does (Glorot & Bengio 2010,
# section 3).
_MONITORED = 300


class Table(NamedTuple):
    """Rows of numbers and words by column, and notes on what the columns are."""

    title: str
    rows: list[dict[str, Any]]
    notes: Sequence[str] = ()


class Option(NamedTuple):
    """An option of an experiment: its default, the type of one value, and its help.

    An option whose default is a tuple takes several values.
    """

    default: Any
    type: type
    help: str

    @property
    def several(self) -> bool:
        """Whether the option takes several values."""
        return isinstance(self.default, tuple)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options that experiments share; an experiment does not take those that are None.

    Attributes
    ----------
    save
        A folder for the state of training, from which an interrupted run resumes; not saved
        without it.
    progress
        Called with (name of the networks in training, updates done, updates in all).
    """

    data: Annotated[Dataset | str, "Images: digits, mnist, shapeset, or a path to .npz."] = "digits"
    images: Annotated[int | None, "Images of Shapeset to draw, in all three sets together."] = None
    width: Annotated[int, "Units a hidden layer."] = 100
    depth: Annotated[int | None, "Hidden layers."] = None
    depths: Annotated[Sequence[int] | None, "Several numbers of hidden layers, as 1,2,4."] = None
    steps: Annotated[int, "Updates of the weights."] = 1000
    batch: Annotated[int, "Images an update."] = 10
    learning_rate: Annotated[
        float | Sequence[float],
        "Of the optimiser; of several, the best on validation data is reported.",
    ] = 0.1
    networks: Annotated[int, "Random networks of each kind."] = 4
    seed: Annotated[int, "Seed of everything that is random."] = 0
    save: Path | None = None
    progress: Callable[[str, int, int], None] | None = None

    @property
    def learning_rates(self) -> list[float]:
        """The learning rates, one or several, as a list."""
        rates = self.learning_rate
        return list(rates) if isinstance(rates, Sequence) else [rates]

    def split(self) -> Split:
        """The data as training, validation and test sets."""
        if self.images is not None and isinstance(self.data, str) and self.data == "shapeset":
            dataset = datasets.shapes(self.images, self.seed)
        else:
            dataset = datasets.load(self.data) if isinstance(self.data, str) else self.data
        return datasets.split(dataset, key=self.seed)

    def widths(self, parts: Split, depth: int | None = None) -> tuple[int, ...]:
        """The widths of inputs, of hidden layers (the recipe's depth, or this one) and classes."""
        width = check_count("width", self.width)
        depth = check_count("depth", self.depth if depth is None else depth)
        return (parts.train.inputs.shape[1], *[width] * depth, parts.train.classes)

    def even_steps(self, count: int) -> list[int]:
        """Step 0 and ``count`` more, evenly up to the last one; fewer where there are fewer."""
        steps = check_count("steps", self.steps)
        return sorted({round(steps * k / count) for k in range(count + 1)})

    def spreading_steps(self, count: int) -> list[int]:
        """At most ``count`` steps, ever further apart, from 0 to the last one."""
        steps = check_count("steps", self.steps)
        return sorted({round(step) - 1 for step in np.geomspace(1, steps + 1, count).tolist()})

    def progress_of(self, name: str) -> Callable[[int, int], None] | None:
        """The progress of networks of this name, as `training.train` reports it."""
        return functools.partial(self.progress, name) if self.progress else None

    def train(
        self,
        networks: Mapping[Any, Network],
        parts: Split,
        *,
        record: Recording,
        along: str = "network",
        monitored: int = _MONITORED,
        own: Mapping[Any, Mapping[str, Any]] | None = None,
        **shared: Any,
    ) -> xarray.Dataset:
        """Train networks of each kind by this recipe; what is recorded has a new axis of kinds.

        Parameters
        ----------
        networks
            Each kind's law by its label on that axis. Laws may differ in anything; what is of
            layers that a network does not have is NaN.
        parts
            Networks are trained on the first set. Of several learning rates, each kind has the one
            that is best on validation data.
        record
            When to record, and what; on images of the test set, at most ``monitored``.
        along
            The name of the axis.
        own, shared
            Further arguments of `training.train`, of one kind by its label, and of all kinds.
        """
        check_count("networks", self.networks)
        rates = self.learning_rates
        train, test, validation = parts.train, parts.test[:monitored], parts.validation
        results = []
        for label, network in networks.items():
            result = training.train(
                network,
                train.inputs,
                train.labels,
                steps=self.steps,
                batch=self.batch,
                learning_rate=rates,
                seeds=self.networks,
                key=self.seed,
                validation=(validation.inputs, validation.labels) if len(rates) > 1 else None,
                record=dataclasses.replace(record, monitor=(test.inputs, test.labels)),
                save=self.save,
                progress=self.progress_of(str(label) if along == "network" else f"{along} {label}"),
                **shared,
                **(own or {}).get(label, {}),
            )
            best = int(result.best_rate()[0]) if len(rates) > 1 else 0
            one = result.to_xarray().isel(network=0, learning_rate=best, drop=False)
            results.append(one.drop_vars("network").expand_dims({along: [label]}))
        together = xarray.concat(
            results,
            along,
            join="outer",
            data_vars="all",
            coords="all",
            combine_attrs="drop_conflicts",
        )
        return together.assign_attrs(
            width=results[-1].attrs["widths"][1],
            depth=max(network.depth for network in networks.values()) - 1,
            classes=train.classes,
            learning_rates=rates,
            seed=self.seed,
            steps=int(together.step[-1]),
            seconds=math.fsum(one.attrs["seconds"] for one in results),
            compile_seconds=math.fsum(one.attrs["compile_seconds"] for one in results),
        )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment: how networks are trained, and what is said of its dataset.

    Attributes
    ----------
    name
        On the command line.
    recipe
        The shared options, with this experiment's defaults.
    train
        From a recipe, and keyword arguments annotated as `Recipe`'s fields, to what was recorded;
        its docstring's first line says what the experiment shows.
    table, findings, figure
        Of such a dataset.
    """

    name: str
    recipe: Recipe
    train: Callable[..., xarray.Dataset]
    table: Callable[[xarray.Dataset], Table]
    findings: Callable[[xarray.Dataset], list[str]]
    figure: Callable[[xarray.Dataset], Figure]

    @property
    def summary(self) -> str:
        """What the experiment shows, in a line."""
        return inspect.getdoc(self.train).partition("\n")[0]  # type: ignore[union-attr]

    @functools.cached_property
    def options(self) -> dict[str, Option]:
        """The experiment's options by name: those of its recipe, and its own."""
        shared = {
            name: _option(hint, getattr(self.recipe, name))
            for name, hint in typing.get_type_hints(Recipe, include_extras=True).items()
            if name not in ("save", "progress") and getattr(self.recipe, name) is not None
        }
        hints = typing.get_type_hints(self.train, include_extras=True)
        own = inspect.signature(self.train).parameters.values()  # of wrapped functions too
        return shared | {
            p.name: _option(hints[p.name], p.default) for p in own if p.kind is p.KEYWORD_ONLY
        }

    def run(
        self,
        *,
        save: Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        **options: Any,
    ) -> xarray.Dataset:
        """Train the experiment's networks.

        Parameters
        ----------
        save, progress
            As in `Recipe`.
        options
            Any of `options`, in place of their defaults.

        Returns
        -------
        xarray.Dataset
            What was recorded, labelled, for `table`, `findings` and `figure`.

        Raises
        ------
        InputError
            If the experiment has no such option, or a value cannot be used.
        """
        self.check(options)
        fields = {field.name for field in dataclasses.fields(Recipe)}
        shared = {name: options.pop(name) for name in fields & options.keys()}
        recipe = dataclasses.replace(self.recipe, **shared, save=save, progress=progress)
        return self.train(recipe, **options)

    def check(
        self, options: Mapping[str, Any], written: Callable[[str], str] = lambda name: name
    ) -> None:
        """Check that the experiment takes these options, and that counts are counts.

        Parameters
        ----------
        options
            Values by name.
        written
            How the reader writes an option's name, for messages.

        Raises
        ------
        InputError
            If an option is unknown, takes one value and gets several, or is no count.
        """
        for name, value in options.items():
            if name not in self.options:
                raise InputError(
                    f"experiment {self.name!r} has no use for {written(name)}; it takes "
                    + ", ".join(map(written, self.options))
                )
            values = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
            if len(values) > 1 and not self.options[name].several:
                raise InputError(
                    f"experiment {self.name!r} takes one {name}, and {list(values)} are given"
                )
            if self.options[name].type is int and name != "seed":
                for one in values:
                    check_count(name.removesuffix("s") if self.options[name].several else name, one)


def _option(hint: Any, default: Any) -> Option:
    """The option of a field or an argument that is annotated with a type and its help."""
    annotated, help_ = typing.get_args(hint)
    alternatives = typing.get_args(annotated) or (annotated,)
    types = [one for kind in alternatives for one in (typing.get_args(kind) or (kind,))]
    return Option(default, next(one for one in types if one in (int, float, str)), help_)
