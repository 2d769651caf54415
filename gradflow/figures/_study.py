"""Figures of a study's report on quantities derived from its statistics: depth scales, the spread.

Each function returns a figure and its caption, or None where results have nothing to show.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from gradflow.figures._drawing import COLOURS, ERRORS, MARKERS, POINTS
from gradflow.theory._depth_scales import DEPTH_SCALES

__all__ = [
    "MOST_Z",
    "coordinates_at",
    "depth_scale_lines",
    "depth_scale_maps",
    "image",
    "spread",
    "where",
]

# Larger |z| have the colours of the ends of a map.
MOST_Z = 6.0
# The most series in a figure; letters in an inch of its legend, and in the room of a marker.
_MOST_SERIES, _LETTERS, _HANDLE = 12, 14, 8
# The share of points above which a depth scale is drawn: on a critical line alone it is not.
_FEW = 0.2
# The factor by which a logarithmic axis goes beyond the largest measured value.
_HEADROOM = 3
_SYMBOLS = {"grad": "|ξ_∇|", "q": "ξ_q", "c": "ξ_c"}
_OF_SPREAD = ("standard_error", "first_order", "theory")
# Points that differ in these fields alone are one series, at several depth/width.
_SIZES = ("width", "depth", "input_width")


def depth_scale_maps(
    dataset: xarray.Dataset, x: str, y: str, at: str = ""
) -> tuple[Figure, str] | None:
    """Depth scales over two axes: measured, theory's, and how far the rates 1/ξ are apart.

    Parameters
    ----------
    dataset
        A study's results, with no axes but these two.
    x, y
        The axes.
    at
        Where on the study's other axes the results are, in words.
    """
    scales = _measured(dataset)
    if not scales:
        return None
    figure = Figure(figsize=(10.2, 3 * len(scales) + 0.2), layout="constrained")
    grid = figure.subplots(len(scales), 3, sharex=True, sharey=True, squeeze=False)
    for row, scale in zip(grid, scales, strict=True):
        measured, predicted, z = (
            dataset[name].transpose(y, x)
            for name in (f"xi_{scale}", f"xi_{scale}_theory", f"rate_{scale}_z")
        )
        norm = LogNorm(float(np.abs(measured).min()), float(np.abs(measured).max()))
        titles = (f"{_SYMBOLS[scale]} measured", f"{_SYMBOLS[scale]}, theory")
        for axes, values, title in zip(row, (measured, predicted), titles, strict=False):
            drawn = image(axes, abs(values), cmap="viridis", norm=norm)
            bar = figure.colorbar(drawn, ax=axes, extend="both", label="layers", format="%g")
            bar.locator = LogLocator(subs=(1, 2, 5))
            bar.minorticks_off()
            axes.set_title(title, fontsize=10)
        drawn = image(row[2], z, cmap="RdBu_r", vmin=-MOST_Z, vmax=MOST_Z)
        figure.colorbar(drawn, ax=row[2], extend="both", label="standard errors")
        row[2].set_title(f"z of 1/{_SYMBOLS[scale].strip('|')}", fontsize=10)
        row[0].set_ylabel(y)
        for axes in row:
            _critical_line(axes, dataset, x, y)
    for axes in grid[-1]:
        axes.set_xlabel(x)
    return figure, (
        f"{_which(scales)} over {x} and {y}{f', {at}' if at else ''}. Theory is that of the fixed "
        "point; z compares the rates 1/ξ (rate_… in the table), estimated alike from the networks "
        "and from theory's curve. The line is where χ₁ = 1 in theory; grey is where there is no "
        f"depth scale, or {_UNKNOWN}"
    )


_UNKNOWN = (
    "none that this depth and so many networks show: lengths settle within a layer or two, or "
    "correlations are at their noise."
)


def _measured(dataset: xarray.Dataset) -> list[str]:
    """Return the depth scales that are known at two points at least, and not at a few alone."""
    known = (scale for scale in DEPTH_SCALES if f"xi_{scale}" in dataset)
    shares = {scale: np.isfinite(dataset[f"xi_{scale}"]) for scale in known}
    return [s for s, share in shares.items() if share.sum() > 1 and share.mean() > _FEW]


def _which(scales: Sequence[str]) -> str:
    listed = [f"{_SYMBOLS[scale]} of {DEPTH_SCALES[scale]}" for scale in scales]
    return f"Depth scales {', '.join(listed)},"


def image(axes: Axes, values: xarray.DataArray, **how: Any) -> Any:
    """Draw values over two axes, (y, x), as a map that is grey where there are none."""
    y, x = values.dims
    axes.set_facecolor("0.75")
    return axes.pcolormesh(values[x], values[y], values, shading="nearest", rasterized=True, **how)


def _critical_line(axes: Axes, dataset: xarray.Dataset, x: str, y: str) -> None:
    """Draw where theory's χ₁ is 1."""
    if "xi_grad_theory" in dataset:
        rate = (1 / dataset.xi_grad_theory).transpose(y, x)
        if rate.min() < 0 < rate.max():
            axes.contour(rate[x], rate[y], rate, [0.0], colors="black", linewidths=1)


def depth_scale_lines(dataset: xarray.Dataset, x: str) -> tuple[Figure, str] | None:
    """Depth scales along one axis: theory as lines, measurement as points with error bars.

    Parameters
    ----------
    dataset
        A study's results.
    x
        The axis; others make a series each, of which the first twelve are shown.
    """
    scales = _measured(dataset)
    if not scales:
        return None
    figure = Figure(figsize=(max(3.4 * len(scales), 5), 3.8), layout="constrained")
    panels = figure.subplots(1, len(scales), squeeze=False)[0]
    for axes, scale in zip(panels, scales, strict=True):
        names = (f"xi_{scale}", f"xi_{scale}_standard_error", f"xi_{scale}_theory")
        for index, (label, there) in enumerate(_series(dataset, (x,))):
            measured, error, predicted = (there[name] for name in names)
            alike = 1 / there[f"rate_{scale}_theory"].where(np.isfinite(measured))
            style = _style(index)
            for values, line in ((predicted.where(np.isfinite(predicted)), "-"), (alike, ":")):
                axes.plot(there[x], abs(values), line, color=style["color"], linewidth=1.2)
            bars = ERRORS * error
            axes.errorbar(there[x], abs(measured), bars, label=label, **style, **POINTS)
        # Theory's ξ is infinite at a critical point, and very large next to one.
        largest = float(abs(dataset[f"xi_{scale}"]).max())
        axes.set(yscale="log", xlabel=x, ylabel=f"{_SYMBOLS[scale]}, layers")
        axes.set_ylim(top=min(axes.get_ylim()[1], _HEADROOM * largest))
    if panels[0].get_legend_handles_labels()[1] != [""]:
        panels[0].legend(fontsize=8)
    return figure, (
        f"{_which(scales)} along {x}: theory's as lines, of the fixed point and, dotted, estimated "
        "from theory's curve as from the networks, at the same layers; as points with two standard "
        f"errors what is measured. Elsewhere there is {_UNKNOWN}"
    )


def _series(dataset: xarray.Dataset, along: Sequence[str]) -> Iterator[tuple[str, xarray.Dataset]]:
    """Yield a label and the results for each combination of the axes that are not in ``along``."""
    axes = [axis for axis in dataset.attrs["axes"].split() if axis not in along]
    indices = itertools.product(*(range(dataset.sizes[axis]) for axis in axes))
    for index in itertools.islice(indices, _MOST_SERIES):
        here = dict(zip(axes, index, strict=True))
        yield where(dataset, here), dataset.isel(here)


def _style(index: int) -> dict[str, Any]:
    """Return a colour and a marker; no two of the first 49 are alike in both."""
    count = len(COLOURS)
    return {
        "color": COLOURS[index % count],
        "marker": MARKERS[(index + index // count) % len(MARKERS)],
    }


def spread(dataset: xarray.Dataset) -> tuple[Figure, str] | None:
    """The spread of gradients over networks, against depth over width (Hanin & Nica 2020).

    Parameters
    ----------
    dataset
        A study's results. Points that differ in width or depth alone are one series.
    """
    name = "gradient_spread"
    if name not in dataset or not np.isfinite(dataset[name]).any():
        return None
    known = bool(np.isfinite(dataset[f"{name}_first_order"]).any())
    figure = Figure(figsize=(10.2 if known else 5, 4.6), layout="constrained")
    panels = figure.subplots(1, 3 if known else 1, squeeze=False)[0]
    for index, (label, there) in enumerate(_series(dataset, _SIZES)):
        axes = [axis for axis in there[name].dims if axis != "layer"]
        indices = itertools.product(*(range(there.sizes[axis]) for axis in axes))
        for number, point in enumerate(indices):
            here = there.isel(dict(zip(axes, point, strict=True)))
            _spread_of_one(panels, here, _style(index), (number, 1.05 ** (index % 7 - 3)), label)
            label = ""
    labels = {
        "variance over networks of log ‖Jᵀu‖²": "log",
        "variance / theory's slope": "log",
        "variance / first order in 1/width": "linear",
    }
    for axes, (label, scale) in zip(panels, labels.items(), strict=False):
        axes.set(xscale="log", yscale=scale, xlabel="depth/width, Σ 1/n", ylabel=label)
    handles, names = panels[0].get_legend_handles_labels()
    if names:
        longest = max(map(len, names)) + _HANDLE
        columns = max(1, min(5, int(_LETTERS * figure.get_figwidth()) // longest))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8)
    if known:
        panels[1].axline((0.1, 0.1), (1, 1), color="0.4", linewidth=1, zorder=0)
        panels[2].axhline(1, color="0.4", linewidth=1, zorder=0)
    return figure, _about_spread(dataset, known)


def _spread_of_one(
    panels: np.ndarray,
    here: xarray.Dataset,
    style: dict[str, Any],
    order: tuple[int, float],
    label: str,
) -> None:
    """Draw one point: theory at every layer, measurement at distances 1, 2, 4, … from the top.

    ``order`` is its number in its series, and the factor that moves it aside in the last panel.
    """
    name, (number, shift) = "gradient_spread", order
    keys = ("depth_over_width", name, *(f"{name}_{k}" for k in _OF_SPREAD))
    passed = (here["depth_over_width"] > 0).to_numpy()  # not the top layer, nor NaN above it
    x, y, error, first_order, theory = (here[key].to_numpy()[passed][::-1] for key in keys)
    shown = np.unique(np.append(2 ** np.arange(int(np.log2(x.size)) + 1), x.size)) - 1
    slope = first_order / x
    size = {**POINTS, "markersize": 2.5 + 0.7 * min(number, 5), "capsize": 0}
    for axes, unit in zip(panels, (np.ones_like(x), slope, first_order), strict=False):
        at = x[shown] * (shift if unit is first_order else 1)
        bars = ERRORS * error[shown] / unit[shown]
        axes.errorbar(at, y[shown] / unit[shown], bars, label=label, **style, **size)
    panels[0].plot(x, theory, color=style["color"], linewidth=0.8)
    if len(panels) > 1 and not np.allclose(theory, first_order, equal_nan=True):
        panels[2].plot(x, theory / first_order, color=style["color"], linewidth=0.8)


def _about_spread(dataset: xarray.Dataset, known: bool) -> str:
    counts = dataset.log_gradient_norm_networks
    drawn, living = (float(c.sum()) for c in (counts.max("layer"), counts.min("layer")))
    caption = (
        "How far networks of one point differ (gradient_spread in the table): the variance over "
        "networks of the log of the squared gradient at a layer, beside the top's, against depth "
        "over width, which is the sum of 1/width over the layers it has passed. Points are 1, 2, "
        "4, … layers below the top, with two standard errors (as if the logarithm were normal), "
        "the wider the network the larger; those of one network are not independent."
    )
    if living < drawn:
        left_out = f"{drawn - living:.0f} of {drawn:.0f} networks"
        caption += f" {left_out}, whose gradient is 0, are left out."
    if known:
        caption += (
            " Lines are theory: exact for linear and ReLU networks, else to first order in "
            "1/width. Divided by the slope of that order, all would be on the diagonal; divided by "
            "that order, at 1: the rest is of higher order in 1/width, or in depth/width. There "
            "a line is the exact law where it is known, and series are moved apart a little."
        )
    return caption


def where(dataset: xarray.Dataset, index: Mapping[Any, int]) -> str:
    """Return indices along some axes in words: each axis's name and its value there.

    An axis with several fields has the name and value of the first field whose values all differ.
    """
    return ", ".join(f"{k} {_shown(v)}" for k, v in coordinates_at(dataset, index).items())


def coordinates_at(dataset: xarray.Dataset, indices: Mapping[Any, int]) -> dict[str, Any]:
    """Each axis's coordinate at an index along it: its name and its value there."""
    coordinates = {}
    for axis, index in indices.items():
        along = [c for c in dataset.coords.values() if c.dims == (axis,) and c.name != axis]
        distinct = [c for c in along if len(set(c.values.tolist())) == c.size]
        coordinate = distinct[0] if distinct else dataset[axis]
        coordinates[str(coordinate.name)] = coordinate[index].item()
    return coordinates


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
