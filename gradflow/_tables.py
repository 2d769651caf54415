"""Tables of text: rows by column, numbers as text, and the terminal that they are printed on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradflow.errors import printable

__all__ = ["PAGE", "PlainConsole", "digits", "number", "percent", "table", "table_of_values"]

# Columns of text of a table where there is no terminal.
PAGE = 132
# Characters of a line: more is a file's mistake.
_LONGEST_LINE = 10_000
# The logarithms between which a natural logarithm is that of a float.
_LARGEST_LOG = 700.0


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


class PlainConsole(Console):
    """A terminal that texts do not drive, whatever file they are from: no markup, no escapes."""

    def __init__(self, width: int, file: Any = None) -> None:
        super().__init__(
            width=width, file=file, highlight=False, markup=False, emoji=False, soft_wrap=False
        )

    def render_str(self, text: str, **options: Any) -> Text:
        lines = (printable(line, _LONGEST_LINE) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options)
