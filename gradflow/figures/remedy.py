"""The figure of remedies beside the network that they are meant to mend."""

from collections.abc import Mapping

import xarray
from matplotlib.lines import Line2D

from gradflow.errors import InputError
from gradflow.figures._drawing import (
    LEAST_SPAN,
    LN10,
    Figure,
    at_least,
    checked,
    draw_by_layer,
    relative,
)

__all__ = ["remedies"]


def remedies(results: Mapping[str, xarray.Dataset]) -> Figure:
    """Gradients and signals by layer, with each remedy and, in grey, without.

    Parameters
    ----------
    results
        ``{title of a panel: Comparison.to_xarray()}``: first the network that ails, then the same
        with one remedy each.

    Raises
    ------
    InputError
        If results are not of this form.
    """
    if not isinstance(results, Mapping) or isinstance(results, xarray.Dataset) or not results:
        raise InputError(
            f"results is a {type(results).__name__}; it is {{title: Dataset}}, with at least one"
        )
    needed = ("log_gradient_norm_theory", "log_q_theory")
    for title, dataset in results.items():
        checked(dataset, needed, "Comparison.to_xarray", f"results[{title!r}]")
    columns = 4
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.3 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    sick = next(iter(results.values()))
    lines = {
        "gradient norm ‖∂C/∂z‖, relative to the top": ("log_gradient_norm", 1.0, -1),
        "r.m.s. signal z, relative to layer 1": ("log_q", 0.5, 0),
    }
    for axes, (title, dataset) in zip(grid, results.items(), strict=False):
        for index, (name, (key, unit, origin)) in enumerate(lines.items()):
            at_origin = {"layer": origin}
            if dataset is not sick:
                grey = sick[f"{key}_theory"]
                axes.plot(
                    sick.layer,
                    (grey - grey.isel(at_origin)) * (unit / LN10),
                    color="0.75",
                    linestyle=("-", "--")[index],
                )
            draw_by_layer(axes, relative(dataset, key, origin), key, unit / LN10, name, index)
        axes.set_title(title, fontsize=8.5)
        axes.tick_params(labelsize=7.5)
        axes.set_ylim(*at_least(axes.get_ylim(), LEAST_SPAN))
    for axes in grid[len(results) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(results) - columns) : len(results)]:
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("layer (1 is next to the input)", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid[::columns]:
        axes.set_ylabel("log₁₀", fontsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.75"))
    figure.legend(
        handles,
        [*labels, "the network as it is (theory)"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8.5,
    )
    figure.suptitle("lines: theory (infinite width); points: simulation, ±2 s.e.", fontsize=9)
    return figure
