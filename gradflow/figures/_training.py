"""Networks in training: the figures of the experiments, one each."""

from typing import Any

import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from gradflow.estimation import Estimate
from gradflow.figures._drawing import COLOURS, ERRORS, LN10, POINTS, Figure, points, spread, style

__all__ = [
    "clipping",
    "error_curves",
    "isometry",
    "league",
    "learning",
    "percentiles_in_training",
    "saturation_in_training",
    "trainability_map",
    "transformers",
    "weight_gradients_in_training",
]

_SMALL = 8.5
_MEASURED = "points: mean over networks, ±2 s.e."


def learning(dataset: xarray.Dataset) -> Figure:
    """Gradients before training and the movement of weights at several steps, by layer.

    Above is the root mean square of ∂C/∂z, with theory scaled to the measurement at the top layer;
    below is ‖W - W₀‖/‖W₀‖, with theory's update of hidden layers scaled to the movement of the last
    of them. Points are means over networks of the logarithm, without networks whose numbers are no
    longer finite.

    Parameters
    ----------
    dataset
        The results of the experiment `layers`.
    """
    columns = dataset.sizes["network"]
    figure = Figure(figsize=(2.5 * columns + 0.8, 5.6), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False, sharey="row", sharex="col")
    for above, below, name in zip(grid[0], grid[1], dataset.network.values, strict=True):
        one = dataset.sel(network=name)
        unit = 1 / (2 * LN10)
        theory = one.log_gradient_variance_theory * unit
        above.plot(one.layer, theory, color=COLOURS[0], linewidth=1.3, label="theory")
        start = one.log_gradient_variance.isel(step=0) * unit
        points(above, one.layer.values, start.values, "step 0", 0)
        moved = [step for step in spread(one.step.values) if step > 0]
        for index, step in enumerate(moved):
            with np.errstate(divide="ignore"):
                log_movement = np.log10(one.movement.sel(step=step).values)
            points(below, one.layer.values, log_movement, f"step {step}", index + 1)
        hidden = one.sel(layer=slice(1, one.sizes["layer"] - 1))
        with np.errstate(divide="ignore"):
            last = np.log10(hidden.movement.isel(step=-1, layer=-1))
        last = last.where(np.isfinite(last)).mean("seed")
        below.plot(
            hidden.layer,
            np.log10(hidden.speed_theory) + last,
            color="0.3",
            linewidth=1.2,
            label="theory's update at step 0, scaled",
        )
        for axes in (above, below):
            axes.set_title(name, fontsize=9.5)
        below.set_xlabel("layer (1 is next to the input)", fontsize=_SMALL)
        below.xaxis.get_major_locator().set_params(integer=True)
    grid[0, 0].set_ylabel("log₁₀ r.m.s. gradient ∂C/∂z", fontsize=_SMALL)
    grid[1, 0].set_ylabel("log₁₀ movement ‖W - W₀‖/‖W₀‖", fontsize=_SMALL)
    grid[0, 0].legend(frameon=False, fontsize=7.5)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8
    )
    figure.suptitle(f"lines: theory (infinite width); {_MEASURED}", fontsize=9)
    return figure


def saturation_in_training(dataset: xarray.Dataset) -> Figure:
    """Mean and spread of activations by layer along training, and errors (2010, figure 2).

    Above is the mean of activations over units and inputs in one network of each depth, with their
    standard deviation over units as bars. Below are the errors of all networks.

    Parameters
    ----------
    dataset
        The results of the experiment `saturation`.
    """
    columns = dataset.sizes["depth"]
    figure = Figure(figsize=(2.7 * columns + 0.8, 5.6), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False, sharey="row", sharex="col")
    for above, below, depth in zip(grid[0], grid[1], dataset.depth.values, strict=True):
        one = dataset.sel(depth=depth)
        network = one.isel(seed=0)
        for layer in range(1, int(depth) + 1):
            every = max(1, one.sizes["step"] // 20)
            shown = network.sel(layer=layer).isel(step=slice(None, None, every))
            above.errorbar(
                shown.step,
                shown.activation_mean,
                yerr=np.sqrt(shown.activation_variance),
                label=f"layer {layer}",
                **style(layer - 1),
                **{**POINTS, "linestyle": "-", "linewidth": 0.7, "elinewidth": 0.5, "capsize": 1},
            )
        for seed in one.seed.values:
            below.plot(one.step, 100 * one.error.sel(seed=seed), color="0.75", linewidth=0.8)
        every = max(1, one.sizes["step"] // 20)
        some = one.isel(step=slice(None, None, every))
        points(below, some.step.values, 100 * some.error.values, "mean over networks, ±2 s.e.", 0)
        above.set_title(f"{depth} hidden layer{'s' if depth > 1 else ''}", fontsize=9.5)
        below.set_title("test error", fontsize=9.5)
        below.set_xlabel("step", fontsize=_SMALL)
        below.set_ylim(0, 100)
        above.set_ylim(-0.05, 1.05)
    grid[0, 0].set_ylabel("activation, one network", fontsize=_SMALL)
    grid[1, 0].set_ylabel("error, %", fontsize=_SMALL)
    longest = max(grid[0], key=lambda axes: len(axes.containers))
    _legend_below(figure, longest)
    grid[1, 0].legend(frameon=False, fontsize=7.5)
    figure.suptitle("above: mean over units and inputs; bars: ± standard deviation", fontsize=9)
    return figure


def error_curves(dataset: xarray.Dataset) -> Figure:
    """Test errors along training, of several kinds of networks (2010, figure 11).

    Parameters
    ----------
    dataset
        The results of the experiment `table_1`, or others with ``error`` by network, seed, step.
    """
    figure = Figure(figsize=(6.8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(dataset.network.values):
        one = dataset.sel(network=name)
        points(
            axes,
            one.step.values,
            100 * one.error.values,
            f"{name} (rate {float(one.learning_rate):g})",
            index,
            linestyle="-",
            linewidth=0.8,
        )
    axes.set(
        xlabel=f"step, of {dataset.attrs['batch']} inputs",
        ylabel="test error, %",
        title=f"{dataset.sizes['layer'] - 1} layers of {dataset.attrs['width']}; {_MEASURED}",
    )
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def weight_gradients_in_training(dataset: xarray.Dataset) -> Figure:
    """S.d. of weight gradients by layer along training (2010, figure 9).

    Parameters
    ----------
    dataset
        The results of the experiment `gradients`.
    """
    columns = dataset.sizes["network"]
    figure = Figure(figsize=(4.2 * columns + 0.6, 4.0), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, dataset.network.values, strict=True):
        _by_step(
            axes,
            dataset.log_weight_gradient_variance.sel(network=name) / (2 * LN10),
        )
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("log₁₀ s.d. of weight gradients ∂C/∂W", fontsize=_SMALL)
    _legend_below(figure, panels[0])
    figure.suptitle(_MEASURED, fontsize=9)
    return figure


def percentiles_in_training(dataset: xarray.Dataset) -> Figure:
    """98th percentile, s.d. and histograms of activations by layer (2010, figures 3, 4 and 10).

    Parameters
    ----------
    dataset
        The results of the experiment `percentiles`.
    """
    columns = dataset.sizes["network"]
    figure = Figure(figsize=(3.8 * columns + 0.6, 8.6), layout="constrained")
    grid = figure.subplots(3, columns, squeeze=False, sharey="row")
    for (above, below, end), name in zip(grid.T, dataset.network.values, strict=True):
        one = dataset.sel(network=name)
        _by_step(above, one.activation_percentile_98)
        _by_step(below, np.sqrt(one.activation_variance))
        above.set_title(name, fontsize=10)
        below.set_title(name, fontsize=10)
        for layer in range(1, one.sizes["layer"]):
            density = one.activation_histogram.sel(layer=layer).transpose("seed", "bin")
            curve = {"linestyle": "-", "linewidth": 0.7, "markersize": 2, "capsize": 0}
            points(end, one.bin.values, density.values, f"layer {layer}", layer - 1, **curve)
        end.set_title(f"{name}, after {int(one.step[-1])} steps", fontsize=10)
        end.set_xlabel("activation", fontsize=_SMALL)
        end.set_yscale("log")
    grid[2, 0].set_ylabel("density", fontsize=_SMALL)
    grid[0, 0].set_ylabel("98th percentile of activations", fontsize=_SMALL)
    grid[1, 0].set_ylabel("s.d. of activations", fontsize=_SMALL)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8
    )
    figure.suptitle(_MEASURED, fontsize=9)
    return figure


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend of one panel below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8
    )


def _by_step(axes: Axes, values: xarray.DataArray) -> None:
    """Draw values over (seed, step, layer) of the hidden layers against the step."""
    for layer in range(1, values.sizes["layer"]):
        one = values.sel(layer=layer).transpose("seed", "step")
        points(
            axes,
            one.step.values,
            one.values,
            f"layer {layer}",
            layer - 1,
            linestyle="-",
            linewidth=0.8,
            markersize=3,
        )
    axes.set_xlabel("step", fontsize=_SMALL)


def trainability_map(dataset: xarray.Dataset) -> Figure:
    """Accuracy over σ_w² and depth, with ξ_c of the theory (Schoenholz et al. 2017, figure 5).

    Parameters
    ----------
    dataset
        The results of the experiment `trainability`.
    """
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    mean = dataset.accuracy.mean("seed")
    # The edges of cells are halfway between values; those of depths on a logarithmic scale.
    image = left.pcolormesh(
        _edges(dataset.sigma_w2.values),
        np.exp(_edges(np.log(dataset.depth.values))),
        mean.transpose("depth", "sigma_w2").values,
        vmin=0,
        vmax=1,
        cmap="viridis",
    )
    figure.colorbar(image, ax=left, label="test accuracy, mean over networks")
    xi = dataset.xi_c_curve.where(dataset.xi_c_curve < 1e4)
    for times, line in ((6, "-"), (4, "--")):
        left.plot(
            dataset.curve_sigma_w2,
            times * xi,
            color="white",
            linestyle=line,
            linewidth=1.6,
            label=f"{times} ξ_c (theory)",
        )
    edges = np.exp(_edges(np.log(dataset.depth.values)))
    left.set(
        yscale="log",
        ylim=(edges[0], edges[-1]),
        xlabel="σ_w² (weights: variance σ_w²/fan_in)",
        ylabel="hidden layers",
        title=f"{dataset.attrs['activation']}, σ_b² = {dataset.attrs['sigma_b2']:g}",
    )
    left.legend(fontsize=8, facecolor="0.35", labelcolor="white", loc="upper right")
    for index, depth in enumerate(dataset.depth.values):
        one = dataset.accuracy.sel(depth=depth).transpose("seed", "sigma_w2")
        points(
            right,
            one.sigma_w2.values,
            one.values,
            f"{depth} layers",
            index,
            linestyle="-",
            linewidth=0.8,
        )
    for value in np.atleast_1d(dataset.attrs["critical_sigma_w2"]):
        right.axvline(value, color="0.4", linestyle=":", label=f"critical, σ_w² = {value:.3g}")
    right.set(xlabel="σ_w²", ylabel="test accuracy", title=_MEASURED, ylim=(0, 1))
    for axes in (left, right):
        axes.title.set_fontsize(10)
    right.legend(frameon=False, fontsize=8)
    return figure


def isometry(dataset: xarray.Dataset) -> Figure:
    """Singular values before training, errors along training, and steps of deep linear networks.

    Parameters
    ----------
    dataset
        The results of the experiment `isometry`.
    """
    figure = Figure(figsize=(13.2, 4.2), layout="constrained")
    spectrum, errors, linear = figure.subplots(1, 3)
    for index, name in enumerate(dataset.network.values):
        one = dataset.sel(network=name)
        spectrum.plot(
            one.k, one.log_singular_value_theory / LN10, color=COLOURS[index], linewidth=1.2
        )
        every = slice(None, None, max(1, one.sizes["k"] // 20))
        values = one.log_singular_value.isel(k=every).transpose("seed", "k") / LN10
        points(spectrum, values.k.values, values.values, str(name), index)
        curve = {"linestyle": "-", "linewidth": 0.8}
        points(errors, one.step.values, 100 * one.error.values, str(name), index, **curve)
        steps = one.steps_to_close.transpose("seed", "depth")
        steps = steps.where(steps.notnull().all("seed"))
        points(linear, steps.depth.values, steps.values, str(name), index, **curve)
    attrs = dataset.attrs
    spectrum.set(
        xlabel="k, from the largest",
        ylabel="log₁₀ singular value of ∂z^L/∂z^1",
        title=f"{attrs['depth']} {attrs['activation']} layers at the start (lines: linear theory)",
    )
    errors.set(xlabel="step", ylabel="test error, %", title=f"the same in training; {_MEASURED}")
    linear.set(
        xscale="log",
        yscale="log",
        xlabel="hidden layers",
        ylabel="steps to close 90 % of the gap",
        title=f"deep linear networks (none: not in {attrs['linear_steps']} steps)",
    )
    linear.set_xticks(dataset.depth.values, [str(depth) for depth in dataset.depth.values])
    for axis in (linear.xaxis, linear.yaxis):
        axis.set_minor_formatter(NullFormatter())
    linear.set_ylim(1, attrs["linear_steps"])
    for axes in (spectrum, errors, linear):
        axes.title.set_fontsize(9.5)
        axes.legend(frameon=False, fontsize=8)
    return figure


def league(dataset: xarray.Dataset) -> Figure:
    """Test errors of all remedies at the end of training, the best on top.

    Parameters
    ----------
    dataset
        The results of the experiment `league`.
    """
    end = 100 * dataset.error.isel(step=-1)
    order = np.argsort(end.mean("seed").values, kind="stable")[::-1]
    figure = Figure(figsize=(7.4, 0.28 * len(order) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    names = []
    for position, index in enumerate(order):
        one = end.isel(network=index)
        estimate = Estimate.of(one.values[:, None])
        axes.plot(one.values, [position] * one.size, "|", color="0.6", markersize=7)
        axes.errorbar(
            estimate.value,
            [position],
            xerr=ERRORS * estimate.standard_error,
            label="mean over networks, ±2 s.e." if not position else None,
            **style(0),
            **POINTS,
        )
        rate = float(dataset.learning_rate.isel(network=index))
        names.append(f"{one.network.item()} (rate {rate:g})")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    attrs = dataset.attrs
    axes.set(
        xlabel="test error, %",
        ylabel="contender, at its best learning rate",
        xlim=(-2, 103),
        title=f"{attrs['depth']} layers of {attrs['width']}, {attrs['steps']} steps of "
        f"{attrs['batch']}",
    )
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def clipping(dataset: xarray.Dataset) -> Figure:
    """Errors by learning rate; norms of gradients, and their ratios between layers, by step.

    Parameters
    ----------
    dataset
        The results of the experiment `clipping`.
    """
    rows = dataset.sizes["network"]
    figure = Figure(figsize=(12.6, 3.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False)
    for (errors, norms, layers), name in zip(grid, dataset.network.values, strict=True):
        both = [dataset.sel(network=name, clipped=clipped) for clipped in (False, True)]
        # The learning rate at which clipping makes the largest difference.
        means = [one.error.mean("seed") for one in both]
        rate = float((means[0] - means[1]).idxmax())
        for index, (one, label) in enumerate(zip(both, ("not clipped", "clipped"), strict=True)):
            error = 100 * one.error.transpose("seed", "learning_rate")
            curve: dict[str, Any] = {"linestyle": "-", "linewidth": 0.8}
            points(errors, one.learning_rate.values, error.values, label, index, **curve)
            at = one.sel(learning_rate=rate)
            for axes, values in ((norms, at.clipped_norm), (layers, at.clipped_disparity)):
                log = np.log10(values.transpose("seed", "step"))
                curve |= {"markersize": 3, "elinewidth": 0.6}
                points(axes, values.step.values, log.values, label, index, **curve)
        errors.set(
            xscale="log",
            xlabel="learning rate",
            ylabel="test error, %",
            ylim=(0, 100),
            title=f"{name}; {_MEASURED}",
        )
        norms.set(
            xlabel="step",
            ylabel="log₁₀ ‖∂C/∂W‖ that the step is made of",
            title=f"{name}, rate {rate:g}",
        )
        layers.set(
            xlabel="step",
            ylabel="log₁₀ largest / smallest ‖∂C/∂W‖ of a hidden layer",
            title=f"{name}, rate {rate:g}",
        )
        for axes in (errors, norms, layers):
            axes.title.set_fontsize(9.5)
            axes.legend(frameon=False, fontsize=8)
    return figure


def _edges(middles: np.ndarray) -> np.ndarray:
    """The edges of cells about these values, halfway between neighbours."""
    if len(middles) == 1:
        return np.array([middles[0] - 0.5, middles[0] + 0.5])
    half = (middles[1:] + middles[:-1]) / 2
    return np.concatenate([[2 * middles[0] - half[0]], half, [2 * middles[-1] - half[-1]]])


def transformers(dataset: xarray.Dataset) -> Figure:
    """Test errors by depth, at each learning rate, and gradients at the start by layer.

    Parameters
    ----------
    dataset
        The results of the experiment `transformer`.
    """
    rates = dataset.learning_rate.values
    figure = Figure(figsize=(4.2 * (len(rates) + 1), 4.0), layout="constrained")
    *errors, starts = figure.subplots(1, len(rates) + 1)
    curve: dict[str, Any] = {"linestyle": "-", "linewidth": 0.8}
    for axes, rate in zip(errors, rates, strict=True):
        final = dataset.error.sel(learning_rate=rate).isel(step=-1)
        for index, name in enumerate(dataset.network.values):
            error = 100 * final.sel(network=name).transpose("seed", "depth")
            points(axes, dataset.depth.values, error.values, str(name), index, **curve)
        axes.set(xlabel="layers", ylabel="test error, %", ylim=(0, 100))
        axes.set_title(f"Adam, learning rate {rate:g}", fontsize=9.5)
        axes.set_xticks(dataset.depth.values)
        axes.legend(frameon=False, fontsize=8)
    depth = int(dataset.depth.max())
    for index, name in ((0, "post-LN"), (2, "pre-LN")):
        one = dataset.sel(depth=depth, network=name)
        log = np.log10(one.gradient.transpose("seed", "layer"))
        theory = np.log10(one.gradient_theory)
        starts.plot(one.layer, theory, color=COLOURS[index], label=f"{name}, theory")
        points(starts, one.layer.values, log.values, f"{name}, measured", index)
    starts.set(xlabel="layer (0: the embedding)", ylabel="log₁₀ ‖∂C/∂z‖ relative to the top layer")
    starts.set_title(f"{depth} layers, at the start", fontsize=9.5)
    starts.legend(frameon=False, fontsize=8)
    figure.suptitle(_MEASURED, fontsize=9.5)
    return figure
