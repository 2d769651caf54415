"""Figures of a model that was inspected, each of `Inspection.to_xarray()`.

Layers stand in order of data flow, by their names; at most so many names are written as can be
read.
"""

import numpy as np
import xarray
from matplotlib.axes import Axes

from gradflow.figures._drawing import (
    COLOURS,
    ERRORS,
    LEAST_SPAN,
    LN10,
    MARKERS,
    POINTS,
    Figure,
    at_least,
    checked,
    spread,
)

__all__ = ["inspected_layers", "inspected_parameters"]

# The most names along an axis, the most characters of one, and the most bars.
_MOST_NAMES, _LONGEST, _MOST_BARS = 40, 36, 60
_PANELS = {
    "log_gradient_norm": ("gradient", "log₁₀ ‖∂C/∂z‖"),
    "log_relative_weight_gradient": ("weight gradient", "log₁₀ ‖∂C/∂W‖/‖W‖"),
}


def inspected_layers(dataset: xarray.Dataset) -> Figure:
    """The gradient's norm, and that of the weights relative to the weights, by layer.

    Layers that not every signal passes, as those in a residual branch, have a marker of their own.

    Parameters
    ----------
    dataset
        What `Inspection.to_xarray` returns.

    Raises
    ------
    InputError
        If the dataset is no such one.
    """
    checked(dataset, ["on_trunk", "layer_name", *_PANELS], "Inspection.to_xarray")
    count = dataset.sizes["layer"]
    figure = Figure(figsize=(min(12.0, 5.0 + 0.12 * count), 6.2), layout="constrained")
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    trunk = dataset.on_trunk.values.astype(bool)
    for axes, (key, (title, label)) in zip(panels, _PANELS.items(), strict=True):
        if trunk.any():
            _draw(axes, dataset, key, trunk, 0, "on every way from inputs to outputs")
        if not trunk.all():
            _draw(axes, dataset, key, ~trunk, 1, "in a branch")
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(label, fontsize=9)
        axes.set_ylim(*at_least(axes.get_ylim(), LEAST_SPAN))
        axes.margins(x=0.02)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    _name_ticks(panels[-1], dataset.layer.values, dataset.layer_name.values)
    panels[-1].set_xlabel("layer, from the inputs to the outputs", fontsize=9)
    single = dataset.attrs.get("networks") == 1
    points = "the weights at hand" if single else f"measured, ±{ERRORS} s.e."
    figure.suptitle(f"points: {points}; lines: theory of infinite width", fontsize=9)
    return figure


def inspected_parameters(dataset: xarray.Dataset) -> Figure:
    """A bar for each leaf of the parameters: the gradient's norm relative to the leaf's, log₁₀.

    Bars start at the median of all, so that what learns faster or slower than the rest stands out.

    Parameters
    ----------
    dataset
        As for `inspected_layers`.
    """
    checked(dataset, ["log_relative_gradient"], "Inspection.to_xarray")
    known = dataset.isel(parameter=np.isfinite(dataset.log_relative_gradient.values))
    count = known.sizes["parameter"]
    shown = known.isel(parameter=list(spread(np.arange(count), _MOST_BARS)) if count else [])
    values = shown.log_relative_gradient.values / LN10
    errors = shown.log_relative_gradient_standard_error.values / LN10
    places = np.arange(len(values))
    middle = float(np.median(values)) if len(values) else 0.0
    figure = Figure(figsize=(7.5, 1.4 + 0.19 * max(len(values), 3)), layout="constrained")
    axes = figure.subplots()
    for side, colour, name in (
        (values <= middle, COLOURS[0], "at the median or below"),
        (values > middle, COLOURS[1], "above it"),
    ):
        axes.barh(
            places[side],
            (values - middle)[side],
            left=middle,
            xerr=np.where(np.isfinite(errors), ERRORS * errors, 0.0)[side],
            color=colour,
            error_kw={"elinewidth": 0.8, "ecolor": "0.2"},
            height=0.7,
            label=name,
        )
    axes.set_yticks(places, [_short(str(n)) for n in shown.parameter.values], fontsize=7)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(*at_least(axes.get_xlim(), LEAST_SPAN))
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("gradient of each leaf, relative to its size", fontsize=10)
    axes.set_xlabel(f"log₁₀ ‖∂C/∂W‖/‖W‖, from the median of all, ±{ERRORS} s.e.", fontsize=9)
    some = f", {len(values)} of {count}" if len(values) < count else ""
    zeros = dataset.sizes["parameter"] - count
    left_out = f"; {zeros} of value 0 left out" if zeros else ""
    axes.set_ylabel(f"leaf of the parameters{some}{left_out}", fontsize=9)
    return figure


def _draw(
    axes: Axes, dataset: xarray.Dataset, key: str, chosen: np.ndarray, index: int, name: str
) -> None:
    """Theory of the chosen layers as a line, and what was measured as points."""
    there = dataset.isel(layer=chosen)
    layer, colour = there.layer.values, COLOURS[index]
    theory, measured, error = (
        there[f"{key}{suffix}"].values / LN10 for suffix in ("_theory", "", "_standard_error")
    )
    axes.plot(layer, np.where(np.isfinite(theory), theory, np.nan), color=colour, linewidth=1.3)
    small = {} if dataset.sizes["layer"] <= _MOST_NAMES else {"markersize": 2.5, "capsize": 0}
    axes.errorbar(
        layer,
        np.where(np.isfinite(measured), measured, np.nan),
        yerr=ERRORS * error,
        fmt=MARKERS[index],
        color=colour,
        label=name,
        **{**POINTS, **small},
    )


def _name_ticks(axes: Axes, layer: np.ndarray, names: np.ndarray) -> None:
    """The layers' numbers and names along an axis, as many as can be read."""
    at = range(0, len(layer), -(-len(layer) // _MOST_NAMES))
    axes.set_xticks(
        [layer[i] for i in at],
        [f"{_short(str(names[i]))}  {layer[i]}" for i in at],
        rotation=90,
        fontsize=7,
    )


def _short(name: str) -> str:
    """A name without its middle, where it is long."""
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[: half - 1]}…{name[-half:]}"
