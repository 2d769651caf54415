"""Singular values of end-to-end Jacobians: densities, theory beside simulation."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray
from matplotlib.axes import Axes

from gradflow.figures._drawing import (
    COLOURS,
    ERRORS,
    MARKERS,
    POINTS,
    Figure,
    checked,
    spread,
    style,
)

__all__ = ["spectra", "spectrum"]

_MOST_PANELS, _MOST_COLUMNS = 15, 5  # of `spectra`


def spectrum(dataset: xarray.Dataset) -> Figure:
    """Density and atoms of the singular values of one family's end-to-end Jacobian.

    Parameters
    ----------
    dataset
        The results of `gradflow.spectra.run`, which ``gradflow spectrum`` writes; simulated values
        are shown if there are any.

    Raises
    ------
    InputError
        If ``dataset`` is not one of those.
    """
    checked(dataset, ("singular_value_density_theory",), "spectra.run")
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    s = dataset.singular_value.values
    density = dataset.singular_value_density_theory.values
    axes.plot(s, density, color=COLOURS[0], linewidth=1.5, label="theory (infinite width)")
    shown = density[s > 0.02 * s.max()]
    top = 1.4 * np.nanmax(shown, initial=0.1)
    if "singular_value_density" in dataset:
        axes.errorbar(
            dataset.singular_value_bin,
            dataset.singular_value_density,
            yerr=ERRORS * dataset.singular_value_density_standard_error,
            fmt=MARKERS[0],
            color=COLOURS[1],
            label=f"simulation, {dataset.attrs['networks']} networks of width "
            f"{dataset.attrs['width']} (±2 s.e.)",
            **POINTS,
        )
    for place, mass in zip(dataset.atom.values, dataset.atom_mass.values, strict=True):
        label = f"atom: {100 * mass:.1f} % of all, at s = {place:.3g}"
        axes.axvline(place, ymax=0.9, color="0.3", linestyle="--", linewidth=1.2, label=label)
    axes.set(
        xlabel="singular value s of the Jacobian J",
        ylabel="density (without atoms)",
        title=dataset.attrs["title"],
        ylim=(0, top),
        xlim=(-0.02 * s.max(), None),
    )
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=8.5, loc="upper center")
    return figure


def spectra(dataset: xarray.Dataset) -> Figure:
    """Densities of singular values of the Jacobians at a study's points: theory as steps, by bin.

    One axis of the study has the colours: an axis of words, as the weights' distribution, or else
    the last axis that has few values. Each combination of the other axes' values has a panel; of
    many combinations, 15 are shown.

    Parameters
    ----------
    dataset
        A study's results, with ``singular_value_density``.

    Raises
    ------
    InputError
        If ``dataset`` has no singular values.
    """
    checked(dataset, ("singular_value_density", "singular_value_density_theory"), "a study")
    density = dataset.singular_value_density
    *over, bins = map(str, density.dims)
    coloured = _coloured_axis(dataset, over)
    others = [axis for axis in over if axis != coloured]
    panels = [
        dict(zip(others, indices, strict=True))
        for indices in np.ndindex(*(dataset.sizes[axis] for axis in others))
    ]
    columns = dataset.sizes[others[-1]] if others else 1
    if len(panels) > _MOST_PANELS or columns > _MOST_COLUMNS:
        panels, columns = [panels[n] for n in spread(np.arange(len(panels)), _MOST_PANELS)], 3
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.4 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    centre = dataset[bins].to_numpy()
    half = (centre[1] - centre[0]) / 2 if centre.size > 1 else centre[0]
    edges = np.append(centre - half, centre[-1] + half)
    for axes, indices in zip(grid, panels, strict=False):
        there = dataset.isel(indices)
        for index in range(dataset.sizes[coloured] if coloured else 1):
            one = there.isel({coloured: index}) if coloured else there
            name = _title(dataset, {coloured: index}) if coloured else "all points"
            _draw_density(axes, one, edges, name, index)
        axes.set_title(_title(dataset, indices), fontsize=8)
        axes.set(yscale="log", xlim=(edges[0], edges[-1]))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("density", fontsize=9)
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("singular value s of J", fontsize=9)
        axes.tick_params(labelbottom=True)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
        title="lines: theory (infinite width), mean over each bin; points: simulation, ±2 s.e.",
    )
    return figure


def _coloured_axis(dataset: xarray.Dataset, axes: Sequence[str]) -> str | None:
    """The axis whose values have colours, if one has few enough."""
    few = [axis for axis in axes if dataset.sizes[axis] <= len(COLOURS)]
    words = [axis for axis in few if not np.issubdtype(dataset[axis].dtype, np.number)]
    return words[0] if words else few[-1] if few else None


def _title(dataset: xarray.Dataset, indices: Mapping[str, int]) -> str:
    """The values of a study's fields at these indices of its axes, two in a line."""
    labels = []
    for axis, index in indices.items():
        fields = [str(c) for c in dataset.coords if dataset[c].dims == (axis,)]
        for field in [f for f in fields if f != axis] or [axis]:
            value = dataset[field].to_numpy()[index]
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            labels.append(f"{field} {text}")
    lines = [", ".join(labels[n : n + 2]) for n in range(0, len(labels), 2)]
    return "\n".join(lines) or "all points"


def _draw_density(
    axes: Axes, dataset: xarray.Dataset, edges: np.ndarray, name: str, index: int
) -> None:
    measured = dataset.singular_value_density.to_numpy()
    theory = dataset.singular_value_density_theory.to_numpy()
    colour = COLOURS[index % len(COLOURS)]
    # A density of 0 is not on a logarithmic axis.
    axes.stairs(np.where(theory > 0, theory, np.nan), edges, baseline=None, color=colour)
    axes.errorbar(
        (edges[1:] + edges[:-1]) / 2,
        np.where(measured > 0, measured, np.nan),
        yerr=ERRORS * dataset.singular_value_density_standard_error.to_numpy(),
        label=name,
        **{**style(index), **POINTS, "markersize": 3},
    )
    positive = measured[measured > 0]
    if positive.size:
        low, high = axes.get_ylim() if index else (np.inf, 0.0)
        axes.set_ylim(min(low, positive.min() / 2), max(high, 2 * positive.max()))
