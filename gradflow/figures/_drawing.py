"""What figures share: colours, points with error bars, and how one is saved.

Colours are those of Okabe & Ito, told apart by every kind of colour vision; series also differ in
their markers.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import xarray
from matplotlib.axes import Axes

from gradflow._files import complete
from gradflow.errors import InputError
from gradflow.estimation import Estimate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ERRORS = 2  # error bars, in standard errors
LEAST_SPAN = 0.5  # of an axis, in decades, so that noise about a constant looks like one
# How what is measured is drawn.
POINTS: dict[str, Any] = {
    "markersize": 4,
    "markerfacecolor": "white",
    "capsize": 2,
    "linestyle": "none",
}
LN10 = float(np.log(10))


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows without pyplot, which figures are made without."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def save(figure: matplotlib.figure.Figure, path: Path) -> Path:
    """Write the figure, whole or not at all, and return where.

    As its name's ending says; as a PNG, of 130 dots an inch, if it has none.

    Raises
    ------
    InputError
        If the file cannot be written, or its ending says nothing.
    """
    if not isinstance(figure, matplotlib.figure.Figure):
        raise InputError(f"figure is {figure!r}; it is a Figure, as the functions of figures make")
    kind = path.suffix.removeprefix(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"file is {str(path)!r}; its ending is one of {', '.join(known)}")
    with complete(path) as beside:
        figure.savefig(beside, format=kind, dpi=130)
    return path


def checked(dataset: Any, variables: Iterable[str], of: str, name: str = "dataset") -> None:
    """Raise `InputError` unless it is a dataset that has these variables, as ``of`` returns it."""
    if not isinstance(dataset, xarray.Dataset):
        raise InputError(f"{name} is a {type(dataset).__name__}; it is a Dataset, as {of} returns")
    for variable in variables:
        if variable not in dataset:
            raise InputError(f"{name} has no {variable}; it is a Dataset, as {of} returns")


def at_least(limits: tuple[float, float], span: float) -> tuple[float, float]:
    """Return an axis's limits, apart by at least so much."""
    low, high = limits
    missing = max(0.0, span - (high - low)) / 2
    return low - missing, high + missing


def spread(values: np.ndarray, most: int = 5) -> Sequence[int]:
    """Return at most so many of the whole numbers, from the first to the last."""
    picked = np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))
    return [int(values[i]) for i in picked]


def style(index: int) -> dict[str, Any]:
    """Return the marker and the colour of a figure's series of this number."""
    return {"fmt": MARKERS[index % len(MARKERS)], "color": COLOURS[index % len(COLOURS)]}


def points(
    axes: Axes, x: np.ndarray, values: np.ndarray, name: str | None, index: int, **options: Any
) -> None:
    """Draw means over networks of values, (networks, len(x)), of what is finite, ± 2 s.e."""
    estimate = Estimate.of(values)
    axes.errorbar(
        x,
        estimate.value,
        yerr=ERRORS * estimate.standard_error,
        label=name,
        **{**style(index), **POINTS, **options},
    )
