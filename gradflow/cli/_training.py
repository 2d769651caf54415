"""The command that trains networks: one experiment of `experiments`, by its name."""

import contextlib
import functools
import inspect
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from gradflow._files import write_netcdf
from gradflow._tables import table
from gradflow.cli._options import (
    Json,
    Out,
    app,
    as_options,
    given_folder,
    options_name,
    writable_folder,
)
from gradflow.cli._output import show, show_progress
from gradflow.cli._process import say
from gradflow.errors import InputError

if TYPE_CHECKING:
    from gradflow.experiments import Experiment
    from gradflow.experiments._recipe import Option


class _WithExperiments(TyperCommand):
    """The command with the options of all experiments, in ``context.obj`` by name, and their list.

    They are read when the command is used: experiments import JAX, which is slow to import.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        first = [one for one in own if one.name == "experiment"]
        return first + _parameters() + [one for one in own if one.name != "experiment"]

    def invoke(self, ctx: Any) -> Any:
        ctx.obj = {one.name: ctx.params.pop(one.name) for one in _parameters()}
        return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from gradflow import experiments  # noqa: PLC0415

        lines = "\n".join(f"- `{one.name}`: {one.summary}" for one in experiments.ALL.values())
        self.epilog = f"Experiments:\n\n{lines}\n\n{self.epilog}"
        super().format_help(ctx, formatter)


@functools.cache
def _parameters() -> list[Any]:
    """The command line's options of all experiments together."""
    from gradflow import experiments  # noqa: PLC0415

    options: dict[str, list[Option]] = {}
    for experiment in experiments.ALL.values():
        for name, option in experiment.options.items():
            options.setdefault(name, []).append(option)
    return as_options([_parameter(name, alike) for name, alike in options.items()])


def _parameter(name: str, options: "list[Option]") -> inspect.Parameter:
    """One option of several experiments, as an argument that typer makes an option of.

    Several numbers are a text with commas between; several names are given one by one.
    """
    several, kind = any(option.several for option in options), options[0].type
    annotation: Any = kind | None
    if several:
        annotation = list[str] | None if kind is str else str | None
    metavar = None if kind is not str and not several else "NAME" if kind is str else "NUMBER,…"
    limits: dict[str, Any] = {"min": -(2**63), "max": 2**63 - 1} if name == "seed" else {}
    option = typer.Option(help=options[0].help, metavar=metavar, **limits)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation, option],
    )


@app.command(
    cls=_WithExperiments,
    epilog="Examples:\n\n"
    "- `gradflow train`\n"
    "- `gradflow train saturation --depths 4,5 --steps 60000`\n"
    "- `gradflow train table-1 --width 1000 --steps 30000 --images 140000`\n"
    "- `gradflow train layers --activation tanh --weights glorot_orthogonal --depth 50 "
    "--learning-rate 0.03`\n"
    "- `gradflow train layers --activation relu --weights he --optimiser adam "
    "--learning-rate 0.001 --json`",
)
def train(
    context: typer.Context,
    experiment: Annotated[str, typer.Argument(help="Which one; they are listed below.")] = "layers",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train networks on images, in one of the experiments on how layers learn.

    Sizes are the experiment's own without options: the least that shows its effect in about a
    minute or two. Options that an experiment has no use for are refused.
    A run that is interrupted resumes where it was when the same command is given again.
    """
    from gradflow import (
        experiments,  # noqa: PLC0415
        figures,  # noqa: PLC0415  (JAX is slow to import)
    )

    chosen = experiments.get(experiment)
    options = _options(chosen, context.obj)
    others = {n: v for n, v in options.items() if v != chosen.options[n].default}
    label = options_name([chosen.name], others)
    folder = writable_folder(given_folder(out, Path("results") / "train" / label))
    unfinished = folder / f"unfinished-{chosen.name}"
    with _resumable(folder), show_progress("updates") as report:
        dataset = chosen.run(**options, save=unfinished, progress=report)
    written = [
        write_netcdf(dataset, folder / f"{chosen.name}.nc"),
        figures.save(chosen.figure(dataset), folder / f"{chosen.name}.png"),
    ]
    shutil.rmtree(unfinished, ignore_errors=True)
    printed, findings = chosen.table(dataset), chosen.findings(dataset)
    summary = {"experiment": chosen.name, "rows": printed.rows, "findings": findings}

    def parts() -> Iterator[Table | str]:
        yield _as_text(printed.title, printed.rows)
        yield from printed.notes
        yield ""
        yield from (f"- {finding}" for finding in findings)
        yield f"trained   in {dataset.attrs['seconds']:.1f} s, without compiling"

    show(summary, parts, as_json=as_json, folder=folder, written=written)


def _options(experiment: "Experiment", written: Mapping[str, Any]) -> dict[str, Any]:
    """The options on the command line as values that the experiment takes."""
    options = {}
    for name, value in written.items():
        if value is None or value in ((), []):
            continue
        option = experiment.options.get(name)
        if isinstance(value, str) and option is not None and option.type is not str:
            value = _numbers(name, value, option.type)
            if not option.several and len(value) == 1:
                (value,) = value
        options[name] = tuple(value) if isinstance(value, list | tuple) else value
    experiment.check(options, lambda name: f"--{name.replace('_', '-')}")
    return options


def _numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """The numbers of 1,2,4."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{name} is {text!r}; it is {what}, several with commas between") from None


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say what to do after an interruption."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"gradflow: saved in {folder}; the same command resumes from there")
        raise


def _as_text(title: str, rows: list[dict[str, Any]]) -> Table:
    """An experiment's table; its columns' names are broken at commas."""
    texts = [{k.replace(", ", "\n"): _cell(value) for k, value in row.items()} for row in rows]
    return table(title, texts, text=list(texts[0])[:1])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3g}"
    return str(value)
