"""What figures share: colours, markers, points with error bars, and writing to a file.

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
LEAST_SPAN = 0.5  # of an axis, in decades, so that noise about a constant looks like a constant
# The look of measured points.
POINTS: dict[str, Any] = {
    "markersize": 4,
    "markerfacecolor": "white",
    "capsize": 2,
    "linestyle": "none",
}
LN10 = float(np.log(10))


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure made without pyplot, which notebooks show by themselves."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def save(figure: matplotlib.figure.Figure, path: Path) -> Path:
    """Write a figure to a file, whole or not at all.

    Parameters
    ----------
    figure
        A matplotlib figure, as the functions of `gradflow.figures` make.
    path
        The file. The ending of its name is the format (``.png``, ``.svg``, ``.pdf``, …); without
        an ending it is a PNG. Bitmaps have 130 dots an inch.

    Returns
    -------
    Path
        The file, as given.

    Raises
    ------
    InputError
        If the file cannot be written, or its ending is no format that matplotlib knows.
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
    """Raise `InputError` unless ``dataset`` has these variables, as what ``of`` returns does."""
    if not isinstance(dataset, xarray.Dataset):
        raise InputError(f"{name} is a {type(dataset).__name__}; it is a Dataset, as {of} returns")
    for variable in variables:
        if variable not in dataset:
            raise InputError(f"{name} has no {variable}; it is a Dataset, as {of} returns")


def at_least(limits: tuple[float, float], span: float) -> tuple[float, float]:
    """The limits of an axis, moved apart to at least ``span`` about their middle."""
    low, high = limits
    missing = max(0.0, span - (high - low)) / 2
    return low - missing, high + missing


def spread(values: np.ndarray, most: int = 5) -> Sequence[int]:
    """At most ``most`` of the whole numbers, evenly chosen from the first to the last."""
    chosen = np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))
    return [int(values[i]) for i in chosen]


def style(index: int) -> dict[str, Any]:
    """The marker and the colour of a figure's series with this index."""
    return {"fmt": MARKERS[index % len(MARKERS)], "color": COLOURS[index % len(COLOURS)]}


def points(
    axes: Axes, x: np.ndarray, values: np.ndarray, name: str | None, index: int, **options: Any
) -> None:
    """Draw the mean over networks of each x, ± 2 standard errors.

    Parameters
    ----------
    axes
        The panel.
    x
        Positions, ``(points,)``.
    values
        Measurements, ``(networks, points)``; those that are not finite are left out.
    name
        The series' name in the legend.
    index
        The series' index, which has its marker and colour.
    **options
        Matplotlib's, in place of `POINTS` and `style`.
    """
    estimate = Estimate.of(values)
    axes.errorbar(
        x,
        estimate.value,
        yerr=ERRORS * estimate.standard_error,
        label=name,
        **{**style(index), **POINTS, **options},
    )


def relative(dataset: xarray.Dataset, key: str, layer: int) -> xarray.Dataset:
    """A comparison with the logarithm ``key`` relative to theory's value at one layer index."""
    at_origin = dataset[f"{key}_theory"].isel(layer=layer, drop=True)
    return dataset.assign({k: dataset[k] - at_origin for k in (key, f"{key}_theory")})


def draw_by_layer(
    axes: Axes, dataset: xarray.Dataset, key: str, unit: float, name: str, index: int
) -> None:
    """Draw a quantity of a comparison by layer: theory as a line, measurement as points.

    Parameters
    ----------
    axes
        The panel.
    dataset
        The comparison, with ``key``, ``<key>_theory`` and ``<key>_standard_error``.
    key
        The quantity's name.
    unit
        A factor of its values.
    name
        The series' name in the legend.
    index
        The series' index, which has its marker and colour.
    """
    layer = dataset.layer.values
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    theory = dataset[f"{key}_theory"].values * unit
    measured = dataset[key].values * unit
    error = dataset[f"{key}_standard_error"].values * unit
    axes.plot(layer, np.where(np.isfinite(theory), theory, np.nan), color=colour, linewidth=1.3)
    # At most about 15 points, staggered so that series do not hide one another.
    step = max(1, len(layer) // 15)
    shown = slice((index * step) // 3 % step, None, step)
    axes.errorbar(
        layer[shown],
        np.where(np.isfinite(measured), measured, np.nan)[shown],
        yerr=ERRORS * error[shown],
        fmt=marker,
        color=colour,
        label=name,
        **POINTS,
    )
