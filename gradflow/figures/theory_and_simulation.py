"""What theory says of random networks beside what was simulated: lines and points."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import ndimage

from gradflow.errors import InputError
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
    style,
)

__all__ = [
    "activation_histograms",
    "activation_variance",
    "chi_against_width",
    "gradient_histograms",
    "gradient_norm",
    "phase_diagram",
    "remedies",
    "saturation",
    "spectra",
    "spectrum",
]

_LINE = COLOURS[1]  # a critical line's
_MOST_LINEAR = 50  # ratio of the highest to the lowest histogram that a linear axis shows
# Signals that an axis has no numbers for: beyond exp of this, or its inverse.
_LARGEST_LOG = 230.0

Families = Mapping[str, Mapping[str, xarray.Dataset]]


def activation_variance(results: Families) -> Figure:
    """Variance of activations over units, by layer (Glorot & Bengio 2010, eq. 5).

    Parameters
    ----------
    results
        For each panel's title, the results to show in it by name: `Comparison.to_xarray()`.
    """
    return _by_layer(results, "log_activation_variance", 1 / LN10, "log₁₀ variance of activations")


def gradient_norm(results: Families) -> Figure:
    """Norm of ∂C/∂z in the typical network, by layer, relative to theory's at the top, as log₁₀.

    Parameters
    ----------
    results
        As for `activation_variance`.
    """
    key = "log_gradient_norm"
    _check_families(results, key)
    relative = {
        title: {name: _relative(dataset, key, -1) for name, dataset in family.items()}
        for title, family in results.items()
    }
    return _by_layer(relative, key, 1 / LN10, "log₁₀ gradient norm ‖∂C/∂z‖ (top = 0)")


def _relative(dataset: xarray.Dataset, key: str, layer: int) -> xarray.Dataset:
    """Return results with a logarithm relative to theory's in the layer of this place."""
    at_origin = dataset[f"{key}_theory"].isel(layer=layer, drop=True)
    return dataset.assign({k: dataset[k] - at_origin for k in (key, f"{key}_theory")})


def saturation(results: Families) -> Figure:
    """Fraction of saturated units, by layer.

    Parameters
    ----------
    results
        As for `activation_variance`.
    """
    return _by_layer(results, "saturation", 1.0, "fraction of units saturated", (-0.03, 1.03))


def remedies(results: Mapping[str, xarray.Dataset]) -> Figure:
    """Gradients and signals by layer, each remedy's in a panel beside the sick network's, in grey.

    Parameters
    ----------
    results
        By title, the sick network's first: `Comparison.to_xarray()`.
    """
    _check_results(results, ("log_gradient_norm_theory", "log_q_theory"))
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
            _draw(axes, _relative(dataset, key, origin), key, unit / LN10, name, index)
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


def activation_histograms(results: Mapping[str, xarray.Dataset]) -> Figure:
    """Normalised histograms of activations at several layers (Glorot & Bengio 2010, figure 6).

    Parameters
    ----------
    results
        By title, one panel each, results that hold histograms.
    """
    return _histograms(results, "activation", "activation h = φ(z)")


def gradient_histograms(results: Mapping[str, xarray.Dataset]) -> Figure:
    """Normalised histograms of back-propagated gradients at several layers (the same, figure 7).

    Parameters
    ----------
    results
        By title, one panel each, results that hold histograms.
    """
    return _histograms(results, "gradient", "back-propagated gradient ∂C/∂z (top layer: N(0, 1))")


def chi_against_width(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    points: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    critical_width: float,
) -> Figure:
    """χ of networks with un-scaled N(0, 1) weights, against their width.

    Parameters
    ----------
    curves
        By name, (widths, χ) of the theory.
    points
        By name, (widths, χ, standard error) of the simulation.
    critical_width
        Where the logistic's χ crosses 1.
    """
    for name, value in (("curves", curves), ("points", points)):
        if not isinstance(value, Mapping) or not value:
            raise InputError(f"{name} is {value!r}; it is {{name: arrays}}, with at least one")
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, (widths, chi)) in enumerate(curves.items()):
        axes.plot(widths, chi, color=COLOURS[index], label=f"{name}, theory (fixed point)")
        if name in points:
            at, measured, error = points[name]
            axes.errorbar(
                at,
                measured,
                yerr=ERRORS * error,
                fmt=MARKERS[index],
                color=COLOURS[index],
                markersize=5,
                capsize=3,
                linestyle="none",
                label=f"{name}, simulation (±2 s.e.)",
            )
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
    axes.axvline(critical_width, color="0.4", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"logistic: χ = 1 at width {critical_width:.1f}",
        (critical_width, 1),
        xytext=(6, -14),
        textcoords="offset points",
        fontsize=8,
        color="0.25",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="width n (units a layer)",
        ylabel="χ, factor of the mean squared gradient a layer",
        title="Un-scaled N(0, 1) weights: gradients vanish below χ = 1, explode above",
    )
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def phase_diagram(dataset: xarray.Dataset) -> Figure:
    """Depth scales and lengths over (σ_w, σ_b), with the critical line (Schoenholz et al. 2017).

    Parameters
    ----------
    dataset
        From `theory.criticality.phase_diagram`.
    """
    checked(dataset, ("xi_c", "phase"), "criticality.phase_diagram")
    layers = {
        "correlations: ξ_c, in layers": np.abs(dataset.xi_c),
        "gradients: |ξ_∇|, in layers": np.abs(dataset.xi_grad),
        "length: q*": dataset.q_star,
    }
    lines = [(b, _is_reached(dataset, b)) for b in dataset.critical_sigma_w.values.T]
    figure = Figure(figsize=(13.2, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, (title, values) in zip(panels, layers.items(), strict=True):
        finite = values.values[np.isfinite(values.values) & (values.values > 0)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.1, 1.0)
        # Depth scales are infinite on the line: the colours end where they tell little more.
        low, high = (max(low, 0.5), min(high, 1000.0)) if "layers" in title else (low, high)
        image = axes.pcolormesh(
            dataset.sigma_w,
            dataset.sigma_b,
            # What is infinite has the last colour: it is a depth scale like any other.
            values.clip(max=high).where(values > 0),
            norm=LogNorm(low, max(high, 1.001 * low), clip=True),
            cmap="viridis",
            shading="nearest",
        )
        figure.colorbar(image, ax=axes, extend="max" if "layers" in title else "neither")
        axes.set_facecolor("0.75")
        for branch, reached in lines:
            there = np.where(reached, branch, np.nan)
            axes.plot(branch, dataset.sigma_b, color=_LINE, linewidth=1.2, linestyle=":")
            axes.plot(there, dataset.sigma_b, color=_LINE, linewidth=1.8)
        axes.set(
            title=title,
            xlabel="σ_w (weights: variance σ_w²/fan_in)",
            xlim=(dataset.sigma_w.min(), dataset.sigma_w.max()),
            ylim=(dataset.sigma_b.min(), dataset.sigma_b.max()),
        )
        axes.title.set_fontsize(10)
        _name_phases(axes, dataset)
    panels[0].set_ylabel("σ_b (standard deviation of biases)")
    keys: list[Artist] = [Patch(color="0.75", label="no fixed point, or q* = 0")]
    if any((np.isfinite(branch) & ~reached).any() for branch, reached in lines):
        label = f"χ₁ = 1 at another fixed point than q goes to from {dataset.attrs['start']:g}"
        keys.insert(0, Line2D([], [], color=_LINE, linestyle=":", label=label))
    if any(reached.any() for _, reached in lines):
        keys.insert(0, Line2D([], [], color=_LINE, label="critical line, χ₁ = 1"))
    # Below the panels: in any of them it would hide a part of the plane.
    figure.legend(handles=keys, fontsize=8, loc="outside lower center", ncols=len(keys))
    figure.suptitle(
        f"{dataset.attrs['activation']}: theory at infinite width, from q = "
        f"{dataset.attrs['start']:g}",
        fontsize=10,
    )
    return figure


def _is_reached(dataset: xarray.Dataset, branch: np.ndarray) -> np.ndarray:
    """Return where gradients begin to explode across a critical line: of the q* that is reached.

    Where the length has several fixed points, the line may be of one that it does not go to.
    """
    ordered = dataset.phase.values == dataset.phase.attrs["ordered"]
    rows, columns = np.arange(len(branch)), np.searchsorted(dataset.sigma_w, branch)
    left, right = (np.clip(columns + n, 0, ordered.shape[1] - 1) for n in (-2, 1))
    return np.isfinite(branch) & (ordered[rows, left] != ordered[rows, right])


def _name_phases(axes: Axes, dataset: xarray.Dataset) -> None:
    """Write the name of each phase where there is most room for it in its part of the plane."""
    names = {"ordered": "ordered:\nvanishing", "chaotic": "chaotic:\nexploding"}
    names["divergent"] = "q diverges:\nexploding"
    for phase, text in names.items():
        there = np.pad(dataset.phase.values == dataset.phase.attrs[phase], 1)
        # In halves of a name's height and width, which are these shares of the panel's.
        steps = np.divide(1, dataset.phase.shape) / (0.07, 0.12)
        room = ndimage.distance_transform_edt(there, sampling=steps)[1:-1, 1:-1]
        if room.max() < 1:
            continue
        best = np.argwhere(room > 0.98 * room.max())
        row, column = best[len(best) // 2]
        axes.text(
            dataset.sigma_w.values[column],
            dataset.sigma_b.values[row],
            text,
            ha="center",
            va="center",
            fontsize=9,
            color="black",
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 2},
        )


# Panels of `spectra`, and the most columns of them.
_MOST_PANELS, _MOST_COLUMNS = 15, 5


def spectra(dataset: xarray.Dataset) -> Figure:
    """Density of singular values of the Jacobian at a study's points: theory as steps, by bin.

    One axis of the study is told by colour: one that is no number, as the weights' distribution, or
    else the last of few values; a panel for each place along the others, or some of them.

    Parameters
    ----------
    dataset
        A study's results, with ``singular_value_density``.
    """
    checked(dataset, ("singular_value_density", "singular_value_density_theory"), "a study")
    density = dataset.singular_value_density
    *over, bins = map(str, density.dims)
    told = _told_by_colour(dataset, over)
    others = [axis for axis in over if axis != told]
    places = [
        dict(zip(others, where, strict=True))
        for where in np.ndindex(*(dataset.sizes[axis] for axis in others))
    ]
    columns = dataset.sizes[others[-1]] if others else 1
    if len(places) > _MOST_PANELS or columns > _MOST_COLUMNS:
        places, columns = [places[n] for n in spread(np.arange(len(places)), _MOST_PANELS)], 3
    columns = min(columns, len(places))
    rows = -(-len(places) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.4 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    centre = dataset[bins].to_numpy()
    half = (centre[1] - centre[0]) / 2 if centre.size > 1 else centre[0]
    edges = np.append(centre - half, centre[-1] + half)
    for axes, place in zip(grid, places, strict=False):
        there = dataset.isel(place)
        for index in range(dataset.sizes[told] if told else 1):
            one = there.isel({told: index}) if told else there
            name = _place_name(dataset, {told: index}) if told else "all points"
            _draw_density(axes, one, edges, name, index)
        axes.set_title(_place_name(dataset, place), fontsize=8)
        axes.set(yscale="log", xlim=(edges[0], edges[-1]))
    for axes in grid[len(places) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("density", fontsize=9)
    for axes in grid[max(0, len(places) - columns) : len(places)]:
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


def _told_by_colour(dataset: xarray.Dataset, axes: Sequence[str]) -> str | None:
    """Return the axis whose values have colours, if one has few enough."""
    few = [axis for axis in axes if dataset.sizes[axis] <= len(COLOURS)]
    words = [axis for axis in few if not np.issubdtype(dataset[axis].dtype, np.number)]
    return words[0] if words else few[-1] if few else None


def _place_name(dataset: xarray.Dataset, place: Mapping[str, int]) -> str:
    """Return the fields' values at a place, in lines of two."""
    said = []
    for axis, index in place.items():
        fields = [str(c) for c in dataset.coords if dataset[c].dims == (axis,)]
        for field in [f for f in fields if f != axis] or [axis]:
            value = dataset[field].to_numpy()[index]
            said.append(f"{field} {value:.4g}" if isinstance(value, float) else f"{field} {value}")
    return "\n".join(", ".join(said[n : n + 2]) for n in range(0, len(said), 2)) or "all points"


def _draw_density(
    axes: Axes, dataset: xarray.Dataset, edges: np.ndarray, name: str, index: int
) -> None:
    measured = dataset.singular_value_density.to_numpy()
    theory = dataset.singular_value_density_theory.to_numpy()
    colour = COLOURS[index % len(COLOURS)]
    # What is 0 has no place on a logarithmic axis.
    axes.stairs(np.where(theory > 0, theory, np.nan), edges, baseline=None, color=colour)
    axes.errorbar(
        (edges[1:] + edges[:-1]) / 2,
        np.where(measured > 0, measured, np.nan),
        yerr=ERRORS * dataset.singular_value_density_standard_error.to_numpy(),
        label=name,
        **{**style(index), **POINTS, "markersize": 3},
    )
    seen = measured[measured > 0]
    if seen.size:
        low, high = axes.get_ylim() if index else (np.inf, 0.0)
        axes.set_ylim(min(low, seen.min() / 2), max(high, 2 * seen.max()))


def spectrum(dataset: xarray.Dataset) -> Figure:
    """Density of the singular values of the Jacobian, with atoms and, if there, simulated ones.

    Parameters
    ----------
    dataset
        As `gradflow spectrum` writes it (`spectra.run`).
    """
    checked(dataset, ("singular_value_density_theory",), "jacobian_spectrum.run")
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


def _check_families(results: Any, key: str) -> None:
    """Raise `InputError` unless they are families of results that have the quantity."""
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
            variables = (key, f"{key}_theory", f"{key}_standard_error")
            checked(dataset, variables, "Comparison.to_xarray", f"results[{title!r}][{name!r}]")


def _check_results(results: Any, variables: Iterable[str]) -> None:
    """Raise `InputError` unless they are results by title that have these variables."""
    if not isinstance(results, Mapping) or isinstance(results, xarray.Dataset) or not results:
        raise InputError(
            f"results is a {type(results).__name__}; it is {{title: Dataset}}, with at least one"
        )
    for title, dataset in results.items():
        checked(dataset, variables, "Comparison.to_xarray", f"results[{title!r}]")


def _by_layer(
    results: Families, key: str, unit: float, label: str, limits: tuple[float, float] | None = None
) -> Figure:
    _check_families(results, key)
    panels = [(title, family) for title, family in results.items() if family]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.0 * columns + 0.6, 3.1 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, family) in zip(grid, panels, strict=False):
        for index, (name, dataset) in enumerate(family.items()):
            _draw(axes, dataset, key, unit, name, index)
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


def _draw(
    axes: Axes, dataset: xarray.Dataset, key: str, unit: float, name: str, index: int
) -> None:
    layer = dataset.layer.values
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    theory = dataset[f"{key}_theory"].values * unit
    measured = dataset[key].values * unit
    error = dataset[f"{key}_standard_error"].values * unit
    axes.plot(layer, np.where(np.isfinite(theory), theory, np.nan), color=colour, linewidth=1.3)
    # No more points than can be told apart, staggered so that series do not hide one another.
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


def _histograms(results: Mapping[str, xarray.Dataset], signal: str, label: str) -> Figure:
    _check_results(results, ())
    missing = [title for title, ds in results.items() if f"{signal}_histogram_density" not in ds]
    if missing:
        raise InputError(f"results {missing[0]!r} hold no {signal} histograms; simulate with them")
    figure = Figure(figsize=(6.2, 2.9 * len(results) + 0.5), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False, sharex=True).ravel()
    for axes, (title, dataset) in zip(panels, results.items(), strict=True):
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
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("density", fontsize=9)
        if peaks and max(peaks) > _MOST_LINEAR * min(peaks):
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    panels[-1].set_xlabel(label, fontsize=9)
    known = any(f"{signal}_histogram_theory" in dataset for dataset in results.values())
    lines = "; lines: theory" if known else ""
    figure.suptitle(f"points: simulation, mean over networks, bars ±2 s.e.{lines}", fontsize=9)
    return figure
