"""Pages of HTML without other files: figures are SVG in the page itself; there is no script.

Nor is there an address that a browser would open. Every text is escaped.
"""

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["facts", "figure_part", "number", "page_of", "safe", "table"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; margin: 0 auto; padding: 1rem;
  max-width: 62rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.question { font-size: 1.1rem; color: #444; white-space: pre-line; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom-color: #888; vertical-align: bottom; }
th.text, td.text { text-align: left; }
td { white-space: nowrap; }
td.text { white-space: normal; }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; max-width: var(--width); display: block;
  min-width: min(var(--width), 36rem); }
figcaption { font-size: .875rem; color: #444; }
pre { background: #f4f4f4; padding: .75rem; overflow-x: auto; font-size: .8125rem; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; }
  pre { white-space: pre-wrap; } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def page_of(title: str, parts: Sequence[str]) -> str:
    """A whole page, of a title and of parts in HTML."""
    return _PAGE.format(title=safe(title), style=_STYLE, body="\n".join(parts))


def safe(text: object) -> str:
    """A text, escaped."""
    return html.escape(str(text), quote=True)


def number(value: Any) -> str:
    """A number to four digits, or a text as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def facts(of: Mapping[str, str]) -> str:
    """A table of two columns: names, and what they are."""
    lines = (f"<tr><th class=text>{safe(k)}<td class=text>{safe(v)}" for k, v in of.items())
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """A table of texts; columns numbered in ``texts`` are of words, and stand to the left."""

    def cells(tag: str, row: Sequence[str]) -> str:
        classes = (" class=text" if column in texts else "" for column in range(len(row)))
        return "".join(f"<{tag}{c}>{safe(cell)}" for c, cell in zip(classes, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}" for row in rows)
    return f"<div class=wide><table><tr>{cells('th', head)}{body}</table></div>"


def figure_part(figure: Figure, caption: str) -> str:
    """A figure as part of a page: SVG without prolog and date, its identifiers its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": caption, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    width = f"{figure.get_figwidth():g}in"
    return (
        f'<figure style="--width: {width}"><div class=wide>{svg[svg.index("<svg") :]}</div>'
        f"<figcaption>{safe(caption)}</figcaption></figure>"
    )
