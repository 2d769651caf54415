"""Figures of comparisons, by layer: ``gradflow compare`` draws every public function of this file.

Each takes comparisons, ``{title of a panel: {name in its legend: Comparison.to_xarray()}}``, and
returns a `Figure`. A new figure is one more function here.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray
from matplotlib.axes import Axes

from gradflow.errors import InputError
from gradflow.figures._drawing import (
    COLOURS,
    ERRORS,
    LEAST_SPAN,
    LN10,
    MARKERS,
    Figure,
    at_least,
    checked,
    draw_by_layer,
    relative,
    spread,
)

_MOST_LINEAR = 50  # ratio of the highest to the lowest histogram that a linear axis shows
# Signals larger than exp of this, or smaller than its inverse, are beyond an axis's numbers.
_LARGEST_LOG = 230.0

__all__ = [
    "activation_histograms",
    "activation_variance",
    "gradient_histograms",
    "gradient_norm",
    "saturation",
]

_Comparisons = Mapping[str, Mapping[str, xarray.Dataset]]


def activation_variance(results: _Comparisons) -> Figure:
    """Variance of activations over units, by layer (Glorot & Bengio 2010, eq. 5).

    Parameters
    ----------
    results
        ``{title of a panel: {name in its legend: Comparison.to_xarray()}}``.

    Raises
    ------
    InputError
        If results are not of this form, or lack the quantity.
    """
    return _by_layer(results, "log_activation_variance", 1 / LN10, "log₁₀ variance of activations")


def gradient_norm(results: _Comparisons) -> Figure:
    """log₁₀ of the typical norm of ∂C/∂z, by layer, relative to theory's at the top layer.

    Parameters
    ----------
    results
        As for `activation_variance`.
    """
    key = "log_gradient_norm"
    _check(results, key, f"{key}_theory")
    shifted = {
        title: {name: relative(dataset, key, -1) for name, dataset in family.items()}
        for title, family in results.items()
    }
    return _by_layer(shifted, key, 1 / LN10, "log₁₀ gradient norm ‖∂C/∂z‖ (top = 0)")


def saturation(results: _Comparisons) -> Figure:
    """Fraction of saturated units, by layer: |φ'(z)| is below 4 % of its maximum.

    Parameters
    ----------
    results
        As for `activation_variance`.
    """
    return _by_layer(results, "saturation", 1.0, "fraction of units saturated", (-0.03, 1.03))


def activation_histograms(results: _Comparisons) -> Figure:
    """Normalised histograms of activations at several layers (Glorot & Bengio 2010, figure 6).

    Parameters
    ----------
    results
        As for `activation_variance`, simulated with ``histograms=True``; those of a simulation
        alone, `Simulation.to_xarray()`, have no theory. Each has a panel of its own.
    """
    return _histograms(results, "activation", "activation h = φ(z)")


def gradient_histograms(results: _Comparisons) -> Figure:
    """Normalised histograms of ∂C/∂z at several layers (Glorot & Bengio 2010, figure 7).

    Parameters
    ----------
    results
        As for `activation_histograms`.
    """
    return _histograms(results, "gradient", "back-propagated gradient ∂C/∂z (top layer: N(0, 1))")


def _by_layer(
    results: _Comparisons,
    key: str,
    unit: float,
    label: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    _check(results, key, f"{key}_theory", f"{key}_standard_error")
    panels = [(title, family) for title, family in results.items() if family]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.0 * columns + 0.6, 3.1 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, family) in zip(grid, panels, strict=False):
        for index, (name, dataset) in enumerate(family.items()):
            draw_by_layer(axes, dataset, key, unit, name, index)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer (1 is next to the input)", fontsize=9)
        axes.margins(x=0.03)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(*(limits or at_least(axes.get_ylim(), LEAST_SPAN)))
        axes.legend(frameon=False, fontsize=7.5)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel(label, fontsize=9)
    figure.suptitle("lines: theory (infinite width); points: simulation, ±2 s.e.", fontsize=9)
    return figure


def _histograms(results: _Comparisons, signal: str, label: str) -> Figure:
    _check(results)
    datasets = {
        title if len(family) == 1 else f"{title}, {name}": dataset
        for title, family in results.items()
        for name, dataset in family.items()
    }
    for title, dataset in datasets.items():
        if f"{signal}_histogram_density" not in dataset:
            raise InputError(
                f"results of {title!r} have no {signal} histograms; simulate with histograms=True"
            )
    figure = Figure(figsize=(6.2, 2.9 * len(datasets) + 0.5), layout="constrained")
    panels = figure.subplots(len(datasets), 1, squeeze=False, sharex=True).ravel()
    for axes, (title, dataset) in zip(panels, datasets.items(), strict=True):
        _draw_histograms(axes, dataset, signal)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("density", fontsize=9)
        axes.legend(frameon=False, fontsize=8)
    panels[-1].set_xlabel(label, fontsize=9)
    known = any(f"{signal}_histogram_theory" in dataset for dataset in datasets.values())
    lines = "; lines: theory" if known else ""
    figure.suptitle(f"points: simulation, mean over networks, bars ±2 s.e.{lines}", fontsize=9)
    return figure


def _draw_histograms(axes: Axes, dataset: xarray.Dataset, signal: str) -> None:
    """Draw the histograms of at most five layers, with theory's densities where they are known."""
    peaks: list[float] = []
    for index, layer in enumerate(spread(dataset.layer.values)):
        at = dataset.sel(layer=layer)
        log_unit = at[f"{signal}_histogram_log_unit"].item()
        if abs(log_unit) > _LARGEST_LOG:
            size = f"of size 1e{log_unit / math.log(10):+.0f}"
            axes.plot([], [], " ", label=f"layer {layer}: {size}")
            continue
        unit = np.exp(log_unit)
        edges = at[f"{signal}_histogram_edges"].values * unit
        density = at[f"{signal}_histogram_density"].values / unit
        error = at[f"{signal}_histogram_standard_error"].values / unit
        middle = (edges[1:] + edges[:-1]) / 2
        if f"{signal}_histogram_theory" in at:
            theory = at[f"{signal}_histogram_theory"].values / unit
            axes.plot(middle, theory, color=COLOURS[index % len(COLOURS)], linewidth=0.9)
        axes.errorbar(
            middle,
            density,
            yerr=ERRORS * error,
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            markersize=2.5,
            elinewidth=0.7,
            linestyle="none",
            label=f"layer {layer}",
        )
        peaks.append(density.max())
    if peaks and max(peaks) > _MOST_LINEAR * min(peaks):
        axes.set_yscale("log")


def _check(results: Any, *variables: str) -> None:
    """Raise `InputError` unless ``results`` are datasets by title and name with these variables."""
    if not isinstance(results, Mapping) or not results or isinstance(results, xarray.Dataset):
        raise InputError(
            f"results is a {type(results).__name__}; it is {{title: {{name: Dataset}}}}, with at "
            "least one title"
        )
    for title, family in results.items():
        if not isinstance(family, Mapping) or isinstance(family, xarray.Dataset):
            raise InputError(
                f"results[{title!r}] is a {type(family).__name__}; it is {{name: Dataset}}, the "
                "results that share a panel"
            )
        for name, dataset in family.items():
            checked(dataset, variables, "Comparison.to_xarray", f"results[{title!r}][{name!r}]")
