"""Output of commands: tables, sentences and JSON on the terminal, files, and progress.

A command has a report, plain data, which is what ``--json`` prints. For readers its parts are
tables, made by `gradflow._tables` of rows of text, and sentences.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gradflow._files import write_text
from gradflow._tables import PAGE, PlainConsole
from gradflow.cli._process import say

if TYPE_CHECKING:
    pass

# Columns of text that a table needs at least.
_LEAST_WIDTH = 60


def show(
    report: Mapping[str, Any],
    parts: Callable[[], Iterable[Table | str]],
    *,
    as_json: bool,
    folder: Path | None = None,
    written: Sequence[Path] = (),
) -> None:
    """Print what a command has to say.

    Parameters
    ----------
    report
        What ``--json`` prints, beside the files.
    parts
        Makes the tables and sentences for readers.
    as_json
        Whether to print JSON.
    folder, written
        The files that were written, and their folder.
    """
    if as_json:
        files = {"files": [str(path) for path in written]} if written else {}
        print_json({**report, **files})
        return
    console = make_console()
    for part in parts():
        console.print(part)
    if written:
        console.print(f"written   to {folder}: {', '.join(path.name for path in written)}")


def finite_or_text(value: Any) -> float | str | None:
    """A number for JSON; 'inf' or '-inf' where it diverges, None where there is none."""
    plain = float(value)
    return None if math.isnan(plain) else plain if math.isfinite(plain) else str(plain)


def write_json(summary: Mapping[str, Any], path: Path) -> Path:
    """Write JSON, whole or not at all."""
    return write_text(_dumps(summary), path)


def make_console() -> Console:
    """The terminal, or a page where there is none.

    One that is narrow breaks lines by itself: rich would cut numbers.
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return PlainConsole(
        width=max(Console().width, _LEAST_WIDTH) if terminal else PAGE,
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
