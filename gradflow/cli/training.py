"""The command that trains networks: one experiment of `experiments`, by its name."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from typer.core import TyperCommand

from gradflow._checks import check_count
from gradflow.cli._options import (
    Json,
    Out,
    Seed,
    app,
    given_folder,
    options_name,
    writable_folder,
)
from gradflow.cli._output import make_console, print_json, show_progress, write_netcdf
from gradflow.cli._process import say
from gradflow.errors import InputError


class _WithExperiments(TyperCommand):
    """Lists the experiments in its help: JAX, which they import, is slow to import."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from gradflow import experiments  # noqa: PLC0415

        lines = "\n".join(f"- `{one.name}`: {one.summary}" for one in experiments.ALL.values())
        self.epilog = f"Experiments:\n\n{lines}\n\n{self.epilog}"
        super().format_help(ctx, formatter)


def _numbers(name: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """Return the numbers of 1,2,4."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{name} is {text!r}; it is {what}, several with commas between") from None


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
    activation: Annotated[
        str | None, typer.Option(help="φ, by name, in place of the experiment's.", metavar="NAME")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="The weights' ensemble, by name.", metavar="NAME")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Units a hidden layer.")] = None,
    depth: Annotated[int | None, typer.Option(help="Hidden layers.")] = None,
    depths: Annotated[
        str | None, typer.Option(help="Several depths, as 1,2,4.", metavar="N,N,…")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, mnist, shapeset, or a path to .npz.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="How many of Shapeset to draw.")] = None,
    times: Annotated[int | None, typer.Option(help="Steps of the recurrent network.")] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            help="Of the optimiser; of several, with commas between, the best on validation data "
            "is reported.",
            metavar="RATE,…",
        ),
    ] = None,
    optimiser: Annotated[str | None, typer.Option(help="sgd, momentum, adam, …")] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Gradient clipping, as global-norm:1.", metavar="NAME:NUMBER"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="How many updates.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images an update.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Variance of noise in gradients at first; it decays.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="The norm that gradients are clipped to.")
    ] = None,
    networks: Annotated[
        int | None, typer.Option(help="How many random networks of each kind.")
    ] = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train networks on images, in one of the experiments on how layers learn.

    Sizes are the experiment's own without options: the least that shows its effect in about a
    minute or two. Options that an experiment has no use for are refused.
    A run that is interrupted goes on where it was when the same command is given again.
    """
    from gradflow import (
        experiments,  # noqa: PLC0415
        figures,  # noqa: PLC0415  (JAX is slow to import)
    )

    chosen = experiments.get(experiment)
    ours = ("experiment", "out", "as_json")
    given = {n: v for n, v in context.params.items() if v is not None and n not in ours}
    if "learning_rate" in given:
        rates = _numbers("learning_rate", given.pop("learning_rate"), float)
        several = "learning_rates" in chosen.options
        if not several and len(rates) > 1:
            raise InputError(
                f"experiment {experiment!r} takes one learning_rate, and {rates} are given"
            )
        given |= {"learning_rates": rates} if several else {"learning_rate": rates[0]}
    for name in given:
        if name not in chosen.options:
            known = ", ".join(
                _flag(one.removesuffix("s") if one == "learning_rates" else one)
                for one in chosen.options
                if one in context.params or one == "learning_rates"
            )
            raise InputError(
                f"experiment {experiment!r} has no use for {_flag(name)}; it takes {known}"
            )
    for name, value in given.items():
        if isinstance(value, int) and name != "seed":
            check_count(name, value)
    if "depths" in given:
        given["depths"] = [
            check_count("depth", depth) for depth in _numbers("depths", given["depths"], int)
        ]
    others = {n: v for n, v in given.items() if _as_default(v) != _as_default(chosen.options[n])}
    label = options_name([chosen.name], others)
    folder = writable_folder(given_folder(out, Path("results") / "train" / label))
    unfinished = folder / f"unfinished-{chosen.name}"
    with _resumable(folder), show_progress("updates") as report:
        dataset = chosen.run(**given, save=unfinished, progress=report)
    written = [
        write_netcdf(dataset, folder / f"{chosen.name}.nc"),
        figures.save(chosen.figure(dataset), folder / f"{chosen.name}.png"),
    ]
    shutil.rmtree(unfinished, ignore_errors=True)
    table, findings = chosen.table(dataset), chosen.findings(dataset)
    if as_json:
        print_json(
            {
                "experiment": chosen.name,
                "rows": table.rows,
                "findings": findings,
                "files": [str(path) for path in written],
            }
        )
        return
    console = make_console()
    console.print(_printed(table.title, table.rows))
    for note in table.notes:
        console.print(note)
    console.print()
    for finding in findings:
        console.print(f"- {finding}")
    console.print(f"trained   in {dataset.attrs['seconds']:.1f} s, without compiling")
    console.print(f"written   to {folder}: {', '.join(path.name for path in written)}")


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say what to do after an interruption."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"gradflow: saved in {folder}; the same command goes on from there")
        raise


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_default(value: Any) -> Any:
    """Return an option as an experiment's defaults are written: several values are a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _printed(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(rows[0]):
        table.add_column(column.replace(", ", "\n"), justify="right" if index else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3g}"
    return str(value)
