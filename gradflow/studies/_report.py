"""The report of a study: one page of HTML without other files, from its labelled results."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.stats
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow import figures, statistics
from gradflow._pages import facts, figure_part, number, page_of, safe, table
from gradflow.figures import _study
from gradflow.figures._drawing import COLOURS, MARKERS
from gradflow.figures._study import MOST_Z
from gradflow.studies import _results
from gradflow.verdict import word

__all__ = ["page"]

# The most points in a figure by layer; the statistics that have such a figure.
_SHOWN = len(MARKERS)
_BY_LAYER = ("q", "correlation", "saturation", "chi", "log_gradient_norm")
_WORST = 12
# The most rows in the table of gradients, and labelled rows in a figure with a row for each point.
_MOST_ROWS, _LABELLED = 400, 40
_OF_SPECTRA = (
    "Density of all singular values s of J = D^L W^L … D^1 W^1, the Jacobian of the top layer's "
    "activations by the input; zeros and values beyond the axis are counted and not shown. "
    "Gaussian networks of width n differ from theory by O(1/n); zeros, and with them the bin "
    "beside, by O(n^(-1/2)): a network has as many as the layer with most units of slope 0."
)


def page(dataset: xarray.Dataset) -> str:
    """Return the report of a study's labelled results, as one page of HTML.

    Parameters
    ----------
    dataset
        The results that `results.open_results` or `results.assemble` return.
    """
    title = dataset.attrs["title"] or "A study without a title"
    rows = [_results.agreement(dataset, name) for name in _results.compared(dataset)]
    compared = [row for row in rows if row["statistic"] in _names(dataset)]
    parts = [
        f"<h1>{safe(title)}</h1>",
        f"<p class=question>{safe(dataset.attrs['question'])}</p>",
        f"<p>{_method()}</p>",
        _facts(dataset),
        "<h2>Theory against measurement</h2>",
        f"<p>{safe(_verdict(compared, dataset.attrs.get('no_theory')))}</p>",
        _agreement_table(rows),
        *_gradient_table(dataset),
        *(figure_part(figure, caption) for figure, caption in _figures(dataset)),
        "<h2>Where they disagree most</h2>",
        _worst_table(dataset),
        "<h2>How to make it again</h2>",
        _reproduction(dataset),
    ]
    return page_of(title, parts)


def _names(dataset: xarray.Dataset) -> list[str]:
    return list(dataset.attrs["statistics"].split())


def _axes(dataset: xarray.Dataset) -> list[str]:
    return list(dataset.attrs["axes"].split())


def _method() -> str:
    return (
        "Random networks are drawn, the inputs are sent up through each and gradients down, and "
        "every statistic is averaged over networks; theory is that of infinite width, in float64, "
        "and z is the difference of the two in standard errors of the mean over networks."
    )


def _facts(dataset: xarray.Dataset) -> str:
    axes = _axes(dataset)
    drawn = json.loads(dataset.attrs["drawn_with"])
    of = {
        "grid": " × ".join(f"{axis} ({dataset.sizes[axis]})" for axis in axes) or "one point",
        "networks": f"{dataset.attrs['networks']:.0f} in all, in {dataset.attrs['dtype']}",
        "layers": str(dataset.sizes["layer"]),
        "drawn": _samplers(json.loads(dataset.attrs["samplers"])),
        "with": "; ".join(
            f"gradflow {d['gradflow']}, JAX {d['jax']}, {d['devices']} × {d['device']}"
            for d in drawn
        ),
    }
    return facts(of)


def _samplers(reasons: Sequence[str]) -> str:
    """Return the samplers, each 'name: reason'; of more than two, the names alone."""
    if len(reasons) <= 2:
        return "; ".join(reasons)
    return ", ".join(dict.fromkeys(reason.partition(":")[0] for reason in reasons))


def _verdict(rows: Sequence[dict[str, Any]], unknown: str | None) -> str:
    total = sum(row["values"] for row in rows)
    if not total:
        return f"Nothing is compared: {unknown or 'there is no standard error, or no theory'}."
    within = sum(row["within"] * row["values"] for row in rows if row["values"]) / total
    # Of values that theory is right about, Student's t aside.
    expected = 1 - 2 * scipy.stats.norm.sf(_results.LARGE)
    sentence = (
        f"{100 * within:.4g} % of {total} values are within {_results.LARGE:g} standard errors of "
        f"the theory of infinite width ({100 * expected:.4g} % would be where theory is exact)"
    )
    known = [row for row in rows if not math.isnan(row["within_finite_width"])]
    if known:
        count = sum(row["known_finite_width"] for row in known)
        share = sum(row["within_finite_width"] * row["known_finite_width"] for row in known) / count
        sentence += (
            f"; {100 * share:.4g} % of {count} are when theory's first order in 1/width is added"
        )
    return f"{sentence}."


def _agreement_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("statistic", "values", f"|z| < {_results.LARGE:g}", "with the width's effect")
    return table(
        (*head, "largest |z|"),
        [
            (
                row["statistic"],
                str(row["values"]),
                _percent(row["within"]),
                _percent(row["within_finite_width"]),
                number(row["largest_z"]),
            )
            for row in rows
        ],
    )


def _gradient_table(dataset: xarray.Dataset) -> list[str]:
    """Return a table of the changes of ‖∂C/∂z‖ at each point of a grid of not too many points."""
    if "log_gradient_norm" not in _names(dataset) or not _axes(dataset):
        return []
    # Layers first; layers beyond the depth of a point are NaN.
    norms = [dataset[f"log_gradient_norm{kind}"] for kind in ("", "_theory")]
    measured, predicted = (v.transpose("layer", ...).to_numpy() for v in norms)
    rows = []
    for index in itertools.islice(np.ndindex(measured.shape[1:]), _MOST_ROWS + 1):
        at = (slice(None), *index)
        factors = [_change(values[at]) for values in (measured, predicted)]
        change, steps = factors[0]
        axes = [d for d in norms[0].dims if d != "layer"]
        where = _study.where(dataset, dict(zip(axes, index, strict=True)))
        factors_shown = [f"×{math.exp(c / max(n, 1)):.4g}" if n else "–" for c, n in factors]
        rows.append(
            (where, *factors_shown, f"×{math.exp(change):.3g}" if steps else "–", word(change))
        )
    if len(rows) > _MOST_ROWS:
        return []
    about = (
        "The norm ‖∂C/∂z‖ of the typical network, going down: its factor a layer, and from the top "
        "layer to layer 1; here a change of less than twofold over all layers is 'critical'."
    )
    head = ("where", "a layer, measured", "theory", "over all layers", "gradients")
    return ["<h2>What becomes of the gradient</h2>", f"<p>{about}</p>", table(head, rows, (0, 4))]


def _change(log_norm: np.ndarray) -> tuple[float, int]:
    """Return the change of log ‖∂C/∂z‖ from the top layer to the first, and the layers between."""
    known = log_norm[np.isfinite(log_norm)]
    whole = known.size > 1 and bool(np.isfinite(log_norm[0]))
    return (float(known[0] - known[-1]), known.size - 1) if whole else (math.nan, 0)


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.4g} %"


def _worst_table(dataset: xarray.Dataset) -> str:
    rows = []
    for name in _names(dataset):
        plain = dataset[f"{name}_z"]
        z = dataset.get(f"{name}_finite_width_z", plain)
        z = z if bool(np.isfinite(z).any()) else plain
        sizes = np.abs(np.nan_to_num(z.to_numpy(), nan=0.0)).ravel()
        for flat in np.argsort(-sizes, kind="stable")[:_WORST]:
            index = dict(zip(z.dims, map(int, np.unravel_index(flat, z.shape)), strict=True))
            there = dataset.isel(index)
            where = _study.where(dataset, index)
            values = (float(there[name]), float(there[f"{name}_theory"]), float(there[f"{name}_z"]))
            rows.append((sizes[flat], name, where, *values, float(z.to_numpy().ravel()[flat])))
    rows.sort(key=lambda row: -row[0])
    return (
        "<p>By their distance in standard errors from theory, with the first order in 1/width "
        "where it is known.</p>"
    ) + table(
        ("statistic", "where", "measured", "theory", "z", "z with the width"),
        [(name, where, *map(number, values)) for _, name, where, *values in rows[:_WORST]],
        texts=(0, 1),
    )


def _reproduction(dataset: xarray.Dataset) -> str:
    return (
        "<p>With this file as <code>study.toml</code>, and the versions above, "
        "<code>gradflow study study.toml --out DIR</code> draws the same networks: "
        f"{safe(dataset.attrs['key'])}.</p><pre>{safe(dataset.attrs['study'])}</pre>"
    )


def _figures(dataset: xarray.Dataset) -> Iterator[tuple[Figure, str]]:
    # An axis of several fields is labelled by numbers that mean nothing.
    plane = [
        axis
        for axis in _axes(dataset)
        if dataset.sizes[axis] > 3
        and np.issubdtype(dataset[axis].dtype, np.number)
        and not any(c.dims == (axis,) and c.name != axis for c in dataset.coords.values())
    ]
    made = []
    if len(plane) >= 2:
        rest = {axis: dataset.sizes[axis] // 2 for axis in _axes(dataset) if axis not in plane[:2]}
        there = dataset.isel(rest)
        at = _study.where(dataset, rest)
        for name in _names(dataset):
            if name in _BY_LAYER:
                yield _map(there, name, plane[0], plane[1], at)
        made.append(_study.depth_scale_maps(there, plane[0], plane[1], at))
    else:
        few = math.prod(dataset.sizes[axis] for axis in _axes(dataset)) <= _SHOWN
        draw = _lines if few else _rows
        for name in _names(dataset):
            if name in _BY_LAYER:
                yield draw(dataset, name)
        made += [_study.depth_scale_lines(dataset, axis) for axis in plane]
        made.append(_study.spread(dataset))
    yield from filter(None, made)
    if "singular_value_density" in dataset:
        yield figures.spectra(dataset), _OF_SPECTRA
    yield _distribution(dataset)


def _with_theory(dataset: xarray.Dataset, name: str) -> tuple[xarray.DataArray, ...]:
    """Return a statistic measured, its error and theory, as a logarithm where it has one."""
    key = f"log_{name}" if f"log_{name}" in dataset else name
    return dataset[key], dataset[f"{key}_standard_error"], dataset[f"{key}_theory"]


def _label(name: str) -> str:
    known = {statistic.name: statistic for statistic in statistics.ALL}[name]
    return f"log {known.label}" if known.log else known.label


def _map(dataset: xarray.Dataset, name: str, x: str, y: str, at: str) -> tuple[Figure, str]:
    """Draw measurement, theory and z over two axes, where they have passed all layers.

    That is the first layer for gradients, and the top one for signals.
    """
    layer = 0 if name in ("chi", "log_gradient_norm") else -1
    there = dataset.isel(layer=layer)
    measured, _, predicted = (v.transpose(y, x) for v in _with_theory(there, name))
    panels = [("measured", measured), ("theory", predicted)]
    panels.append(("z, difference in standard errors", there[f"{name}_z"].transpose(y, x)))
    corrected = f"{name}_finite_width_z"
    if corrected in dataset and bool(np.isfinite(there[corrected]).any()):
        panels.append(("z with the width's effect", there[corrected].transpose(y, x)))
    both = np.concatenate([measured.to_numpy().ravel(), predicted.to_numpy().ravel()])
    both = both[np.isfinite(both)]
    limits = (both.min(), both.max()) if both.size else (0.0, 1.0)
    figure = Figure(figsize=(3.4 * len(panels), 3.2), layout="constrained")
    for axes, (title, values) in zip(
        np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True
    ):
        is_z = title.startswith("z")
        low, high = (-MOST_Z, MOST_Z) if is_z else limits
        colours = "RdBu_r" if is_z else "viridis"
        image = _study.image(axes, values, vmin=low, vmax=high, cmap=colours)
        figure.colorbar(image, ax=axes, extend="both" if is_z else "neither")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x)
    figure.axes[0].set_ylabel(y)
    at_layer = int(dataset.layer[layer])
    where = f"; {at}" if at else ""
    return figure, f"{_label(name)} at layer {at_layer}, over {x} and {y}{where}."


def _lines(dataset: xarray.Dataset, name: str) -> tuple[Figure, str]:
    """Draw a statistic by layer at some points: theory as lines, measurement with error bars."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    measured, error, predicted = _with_theory(dataset, name)
    shape = measured.shape[:-1]
    count = math.prod(shape)
    chosen = np.unique(np.linspace(0, count - 1, min(count, _SHOWN)).round().astype(int))
    for place, flat in enumerate(chosen):
        index = dict(zip(measured.dims, map(int, np.unravel_index(flat, shape)), strict=False))
        label = _study.where(dataset, index)
        there = (measured.isel(index), error.isel(index), predicted.isel(index))
        _points(axes, there, place, label)
    axes.set_xlabel("layer")
    axes.set_ylabel(_label(name))
    if shape:
        axes.legend(fontsize=8)
    some = f", at {len(chosen)} of {count} points" if len(chosen) < count else ""
    return figure, (
        f"{_label(name)} by layer{some}: theory as lines, measurement as points with two standard "
        "errors."
    )


def _rows(dataset: xarray.Dataset, name: str) -> tuple[Figure, str]:
    """Draw a statistic at every point of a grid, a row each, by layer: measured, theory and z."""
    measured, _, predicted = _with_theory(dataset, name)
    axes_ = [str(axis) for axis in measured.dims if axis != "layer"]
    panels = {"measured": measured, "theory": predicted, "z": dataset[f"{name}_z"]}
    flat = {
        title: values.transpose(*axes_, "layer").to_numpy().reshape(-1, measured.sizes["layer"])
        for title, values in panels.items()
    }
    count = len(flat["z"])
    both = np.concatenate([flat["measured"].ravel(), flat["theory"].ravel()])
    both = both[np.isfinite(both)]
    limits = (both.min(), both.max()) if both.size else (0.0, 1.0)
    figure = Figure(figsize=(10.2, 1.2 + 0.16 * min(count, _LABELLED)), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, 3, sharey=True), flat.items(), strict=True):
        rows = xarray.DataArray(
            values, {"point": np.arange(count), "layer": measured.layer}, ("point", "layer")
        )
        low, high = (-MOST_Z, MOST_Z) if title == "z" else limits
        colours = "RdBu_r" if title == "z" else "viridis"
        drawn = _study.image(axes, rows, vmin=low, vmax=high, cmap=colours)
        figure.colorbar(drawn, ax=axes, extend="both" if title == "z" else "neither")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer")
    shown = np.unique(np.linspace(0, count - 1, min(count, _LABELLED)).round().astype(int))
    shape = [dataset.sizes[axis] for axis in axes_]
    labels = [
        _study.where(dataset, dict(zip(axes_, map(int, np.unravel_index(n, shape)), strict=True)))
        for n in shown
    ]
    figure.axes[0].set_yticks(shown, labels, fontsize=6)
    figure.axes[0].invert_yaxis()
    return figure, f"{_label(name)} by layer, at each of {count} points, a row each."


def _points(axes: Axes, values: tuple[xarray.DataArray, ...], index: int, label: str) -> None:
    measured, error, predicted = values
    colour = COLOURS[index % len(COLOURS)]
    axes.plot(predicted.layer, predicted, color=colour, linewidth=1.2)
    every = slice(None, None, max(1, measured.sizes["layer"] // 20))
    axes.errorbar(
        measured.layer[every],
        measured[every],
        2 * error[every],
        color=colour,
        marker=MARKERS[index],
        markersize=4,
        markerfacecolor="white",
        linestyle="none",
        capsize=2,
        label=label,
    )


def _distribution(dataset: xarray.Dataset) -> tuple[Figure, str]:
    """Draw the distribution of all z, beside a normal distribution's density."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(-2 * MOST_Z, 2 * MOST_Z, 61)
    kinds = {"z": "infinite width", "finite_width_z": "with the width's effect"}
    for (suffix, label), colour in zip(kinds.items(), COLOURS, strict=False):
        by_statistic = [
            dataset[f"{n}_{suffix}"].to_numpy().ravel()
            for n in _names(dataset)
            if f"{n}_{suffix}" in dataset
        ]
        z = np.concatenate(by_statistic) if by_statistic else np.zeros(0)
        z = np.clip(z[np.isfinite(z)], edges[0], edges[-1])
        if z.size:
            axes.hist(z, edges.tolist(), density=True, histtype="step", color=colour, label=label)
    at = np.linspace(edges[0], edges[-1], 400)
    axes.plot(at, scipy.stats.norm.pdf(at), color="0.4", linewidth=1, label="by chance: N(0, 1)")
    axes.set(xlabel="z", ylabel="density", yscale="log", ylim=(1e-5, 1))
    axes.legend(fontsize=8)
    return figure, (
        "z of all statistics, points and layers; the end bins have all beyond the axis. Values "
        "of one network are not independent of each other."
    )
