"""What the commands share: their options, checks of input, files, progress and JSON."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import xarray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from gradflow._checks import LARGEST_COUNT, check_count
from gradflow._files import complete
from gradflow._files import writable_file as writable_file
from gradflow._files import writable_folder as writable_folder
from gradflow.cli._process import say
from gradflow.errors import InputError, printable

app = typer.Typer(
    name="gradflow",
    help="Will the gradients of this network vanish or explode? Theory beside simulation.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

# Bytes that a layer takes of any width: its place in a network, its theory, its statistics.
_LAYER = 1 << 14
# Characters of a folder's name that is made of options.
_LONGEST_NAME = 120
# Characters of a line: more is a file's mistake.
_LONGEST_LINE = 10_000
LARGEST_DEVIATION = 1e150
# What a table needs where there is no terminal to ask.
_WIDTH_WITHOUT_TERMINAL, _LEAST_WIDTH = 132, 60

Out = Annotated[
    str | None,
    typer.Option(help="Folder for results and figures.", show_default=False, metavar="FOLDER"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]
Seed = Annotated[
    int, typer.Option(help="Seed of everything that is random.", min=-(2**63), max=2**63 - 1)
]
Depth = Annotated[int, typer.Option(help="Layers.")]
Phi = Annotated[str, typer.Option("--activation", help="φ, by name; `gradflow list` has all.")]


def is_given(context: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def check_instead(context: typer.Context, option: str, other: str) -> None:
    """Raise if an option was given beside another one, whose place it takes."""
    if is_given(context, option) and is_given(context, other):
        one, two = (_given(context, name) for name in (option, other))
        raise InputError(f"{one} and {two}; the first takes the other's place: give one of them")


def check_beside(context: typer.Context, option: str, other: str) -> None:
    """Raise if an option was given that means nothing without another one, which was not."""
    if is_given(context, option) and not is_given(context, other):
        raise InputError(
            f"{_given(context, option)}, which means nothing without --{other}; give both"
        )


def _given(context: typer.Context, option: str) -> str:
    """Return an option and its value in words, under the name that the command line has for it."""
    parameter = next(p for p in context.command.params if p.name == option)
    value = context.params[option]
    text = str(value) if isinstance(value, Path) else value
    return f"{parameter.opts[0].removeprefix('--').replace('-', '_')} is {text!r}"


def check_memory(name: str, value: int, needed: int) -> None:
    """Raise if an argument asks for more memory, in bytes, than is free."""
    from gradflow.simulation import _memory  # noqa: PLC0415  (JAX is slow to import)

    free = _memory.available()
    if needed > free:
        raise InputError(
            f"{name} is {value}, which needs {needed / 2**30:.3g} GiB and {free / 2**30:.3g} GiB "
            "are free; use fewer"
        )


def check_deviation(name: str, value: float) -> None:
    """Raise if a standard deviation has no variance that is a float; what else it is not, later."""
    if LARGEST_DEVIATION < value < math.inf:
        raise InputError(f"{name} is {value}; it is at most {LARGEST_DEVIATION:g}")


def check_depth(depth: int) -> int:
    """Return the depth, if it is at least 1 and its layers' numbers fit into memory."""
    check_memory("depth", check_count("depth", depth), depth * _LAYER)
    return depth


def parse_widths(text: str) -> tuple[int, ...]:
    """Return the numbers of 784,300,100,10."""
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if len(widths) < 2 or min(widths) < 1 or max(widths) > LARGEST_COUNT:
        raise InputError(
            f"widths is {text!r}; it is the input's width and each layer's, whole numbers of at "
            f"least 1 and at most {LARGEST_COUNT} with commas between, as 784,300,100,10"
        )
    return widths


def shape_label(widths: tuple[int, ...]) -> str:
    """Return widths in a few words."""
    if len(set(widths[1:])) == 1 and len(widths) > 4:
        return f"width{widths[1]}-depth{len(widths) - 1}"
    return "-".join(map(str, widths)) if len(widths) <= 8 else f"{len(widths) - 1}-layers"


def file_name(name: str) -> str:
    """Return a name with what no file system minds."""
    kept = "".join(
        c if c.isascii() and (c.isalnum() or c in "-_.") else "-"
        for c in name.replace("(", "").replace(")", "")
    )
    return "-".join(part for part in kept.split("-") if part).lower()


def given_folder(out: str | None, otherwise: Path) -> Path:
    """Return the folder that was asked for, or another one if none was."""
    if out is not None and not out.strip():
        raise InputError(f"out is {out!r}; it is the name of a folder, new or not")
    return otherwise if out is None else Path(out)


def results_folder(context: typer.Context, *first: str, out: str | None) -> Path:
    """Return the folder for results, which can be written to: results/COMMAND/… without ``out``.

    Its name has all options that are not their defaults, so that no two commands that ask for
    different things share one.

    Parameters
    ----------
    context
        The command's.
    first
        Options whose values come first, without their names, defaults or not.
    out
        What was asked for.
    """
    values = {
        parameter.name: context.params[parameter.name]
        for parameter in context.command.params
        if parameter.name in context.params
        and (parameter.name in first or context.params[parameter.name] != parameter.default)
    }
    leading = [values.pop(name) for name in first]
    others = {n: v for n, v in values.items() if v is not None and n not in ("out", "as_json")}
    place = Path("results") / str(context.command.name) / options_name(leading, others)
    return writable_folder(given_folder(out, place))


def options_name(first: Sequence[Any], others: Mapping[str, Any]) -> str:
    """Return a folder's name that no other values have.

    As ``tanh-glorot-depth=20``, and with a digest where a value holds what such a name has between
    values, or what not all file systems tell apart.
    """
    values = [*map(_as_text, (*first, *others.values()))]
    words = [*values[: len(first)], *map("=".join, zip(others, values[len(first) :], strict=True))]
    name = "-".join(words)
    if all(re.fullmatch("[a-z0-9_.,]+", value) for value in values) and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(repr(words).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{file_name(name)[:_LONGEST_NAME]}-{digest}"


def _as_text(value: Any) -> str:
    return ",".join(map(_as_text, value)) if isinstance(value, list | tuple) else str(value)


def write_netcdf(dataset: xarray.Dataset, path: Path) -> Path:
    """Write the dataset, whole or not at all.

    As netCDF 3, which every reader knows, and which takes a tenth of the time of netCDF 4 (HDF5).
    It has no integers of 64 bits: a seed that needs them is written as text.
    """
    large = {
        k: str(v) for k, v in dataset.attrs.items() if isinstance(v, int) and abs(v) >= 1 << 31
    }
    with complete(path) as beside:
        dataset.assign_attrs(large).to_netcdf(beside, engine="scipy")
    return path


def write_json(summary: Mapping[str, Any], path: Path) -> Path:
    """Write JSON, whole or not at all."""
    return write_text(_dumps(summary), path)


def write_text(text: str, path: Path) -> Path:
    """Write text, whole or not at all."""
    with complete(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


class _Console(Console):
    """A terminal that texts do not drive, whatever file they are from: no markup, no escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        lines = (printable(line, _LONGEST_LINE) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options)


def make_console() -> Console:
    """Return the terminal, or a page where there is none.

    One that is narrow breaks lines by itself: rich would cut numbers.
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return _Console(
        width=max(Console().width, _LEAST_WIDTH) if terminal else _WIDTH_WITHOUT_TERMINAL,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )


@contextmanager
def show_progress(unit: str = "networks") -> Iterator[Callable[[str, int, int], None]]:
    """Report progress on standard error: bars on a terminal, else a line for each thing done."""
    if not sys.stderr.isatty():
        compiling: set[str] = set()

        def line(name: str, done: int, total: int) -> None:
            if done == 0 and name not in compiling:
                compiling.add(name)
                say(f"{name}: compiling")
            elif done == total:
                say(f"{name}: {done} {unit} done")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def bar(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, state="compiling")
            bars.update(tasks[name], completed=done, total=total, state="" if done else "compiling")

        yield bar


def _dumps(value: Any) -> str:
    text = json.dumps(_without_nan(value), ensure_ascii=False, indent=1, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    typer.echo(_dumps(value))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value
