"""Output of commands: tables, sentences and JSON on the terminal, files, and progress.

A command has a report, plain data, which is what ``--json`` prints. For readers its parts are
tables, made by `table` or `table_of_values` of rows of text, and sentences; numbers become text by
`number`, `percent` and `digits`.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gradflow._files import complete
from gradflow.cli._process import say
from gradflow.errors import printable

if TYPE_CHECKING:
    import xarray

# Characters of a line: more is a file's mistake.
_LONGEST_LINE = 10_000
# Columns of text that a table needs where there is no terminal, and at least.
_WIDTH_WITHOUT_TERMINAL, _LEAST_WIDTH = 132, 60
# The logarithms between which a natural logarithm is that of a float.
_LARGEST_LOG = 700.0


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


def table(
    title: str,
    rows: Sequence[Mapping[str, str] | None],
    *,
    text: Sequence[str] = (),
    ratios: Mapping[str, int] | None = None,
) -> Table:
    """Make a table of rows of text by column; a row that is None is a rule.

    Parameters
    ----------
    title
        Stands above it.
    rows
        The first has all columns, in their order.
    text
        Columns of words, which may be broken; the others are of numbers, which stand to the right.
    ratios
        Shares of the terminal's width, by column, of a table that takes all of it.
    """
    made = Table(
        title=title if rows else f"{title}: none",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        expand=ratios is not None,
    )
    columns = list(rows[0] or ()) if rows else []
    for name in columns:
        # Where a terminal is narrow, words are broken, and no number is cut.
        words = name in text
        made.add_column(
            name,
            justify="left" if words else "right",
            no_wrap=bool(text) and not words,
            overflow="fold",
            ratio=(ratios or {}).get(name),
        )
    for row in rows:
        if row is None:
            made.add_section()
        else:
            made.add_row(*(row.get(name, "") for name in columns))
    return made


def table_of_values(title: str, values: Mapping[str, str]) -> Table:
    """Make a table of two columns: quantities, and their values as text."""
    made = Table(title=title, show_header=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, value in values.items():
        made.add_row(name, value)
    return made


def digits(value: Any) -> str:
    """A value to ten digits; what there is none of is a dash."""
    return "-" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)


def number(value: float, digits: int = 2, *, log: bool = False) -> str:
    """A number, or that of this natural logarithm, to so many digits."""
    if math.isnan(value):
        return "-"
    if not log:
        return f"{value:.{digits}g}"
    if math.isinf(value) or abs(value) < _LARGEST_LOG:
        return f"{math.exp(value):.{digits}g}"
    whole, rest = divmod(value / math.log(10), 1)
    # Rounding may make 10 of the digits; `e` knows.
    mantissa, _, carried = f"{10**rest:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(whole) + int(carried):+d}"


def percent(share: float) -> str:
    """A share in per cent, with its sign; nothing where there is none."""
    return "" if math.isnan(share) else f"{100 * share:+.2g} %"


def finite_or_text(value: Any) -> float | str | None:
    """A number for JSON; 'inf' or '-inf' where it diverges, None where there is none."""
    plain = float(value)
    return None if math.isnan(plain) else plain if math.isfinite(plain) else str(plain)


def write_netcdf(dataset: "xarray.Dataset", path: Path) -> Path:
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
    """The terminal, or a page where there is none.

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
