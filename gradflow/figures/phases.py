"""Where gradients vanish and where they explode: over (σ_w, σ_b), and over the width."""

from collections.abc import Mapping

import numpy as np
import xarray
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradflow.errors import InputError
from gradflow.figures._drawing import COLOURS, ERRORS, MARKERS, Figure, checked

__all__ = ["chi_against_width", "phase_diagram"]

_LINE = COLOURS[1]  # a critical line's


def phase_diagram(dataset: xarray.Dataset) -> Figure:
    """Depth scales and lengths over (σ_w, σ_b), with the critical line (Schoenholz et al. 2017).

    Parameters
    ----------
    dataset
        From `theory.criticality.phase_diagram`.

    Raises
    ------
    InputError
        If ``dataset`` is not one of those.
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
        # Depth scales are infinite on the critical line: the colours end at 1000 layers.
        low, high = (max(low, 0.5), min(high, 1000.0)) if "layers" in title else (low, high)
        image = axes.pcolormesh(
            dataset.sigma_w,
            dataset.sigma_b,
            # An infinite depth scale has the last colour.
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
    """Whether signals settle at the fixed point to which a critical line belongs, by σ_b.

    Where q has several fixed points, the line may belong to one that signals do not go to: the
    phase is then the same on both sides of the line.
    """
    ordered = dataset.phase.values == dataset.phase.attrs["ordered"]
    rows, columns = np.arange(len(branch)), np.searchsorted(dataset.sigma_w, branch)
    left, right = (np.clip(columns + n, 0, ordered.shape[1] - 1) for n in (-2, 1))
    return np.isfinite(branch) & (ordered[rows, left] != ordered[rows, right])


def _name_phases(axes: Axes, dataset: xarray.Dataset) -> None:
    """Write the name of each phase where its part of the plane has most room."""
    names = {"ordered": "ordered:\nvanishing", "chaotic": "chaotic:\nexploding"}
    names["divergent"] = "q diverges:\nexploding"
    for phase, text in names.items():
        there = dataset.phase.values == dataset.phase.attrs[phase]
        # A grid of some hundred points a side is fine enough.
        thin = tuple(slice(None, None, -(-n // 100)) for n in there.shape)
        # Distances in halves of a name's height and width, which are these shares of the panel's.
        room = _room(there[thin], np.divide(1, there[thin].shape) / (0.07, 0.12))
        if room.max() < 1:
            continue
        best = np.argwhere(room > 0.98 * room.max())
        row, column = best[len(best) // 2] * [part.step for part in thin]
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


def _room(there: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The distance of each point of a grid to the nearest that is not there, or is off the grid."""
    squared = np.where(np.pad(there, 1), np.inf, 0.0)
    for step in reversed(steps):  # the nearest along one axis, and then along the other
        apart = step * np.subtract.outer(*[np.arange(squared.shape[1])] * 2)
        squared = np.min(squared[:, None] + apart**2, axis=2).T
    return np.sqrt(squared)[1:-1, 1:-1]


def chi_against_width(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    points: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    critical_width: float,
) -> Figure:
    """χ of networks with unscaled N(0, 1) weights, against their width.

    Parameters
    ----------
    curves
        Theory, ``{activation: (widths, χ)}``.
    points
        Simulation, ``{activation: (widths, χ, standard errors)}``.
    critical_width
        The width at which the logistic sigmoid's χ crosses 1.

    Raises
    ------
    InputError
        If one of them is no such mapping, or is empty.
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
