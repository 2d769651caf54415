"""The map of two inputs' correlation through a layer."""

import numpy as np
import xarray

from gradflow.figures._drawing import COLOURS, MARKERS, Figure, checked

__all__ = ["correlation_map"]

_FIXED_POINT = COLOURS[1]


def correlation_map(dataset: xarray.Dataset) -> Figure:
    """The correlation of two inputs after a layer over that before it (Poole et al. 2016, fig. 2).

    Parameters
    ----------
    dataset
        From `theory.summary.correlation_map`.

    Raises
    ------
    InputError
        If ``dataset`` is not one of those.
    """
    checked(dataset, ("correlation_map", "correlation_map_slope"), "summary.correlation_map")
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    after, slope = figure.subplots(1, 2)
    c, c_star = dataset.c.values, dataset.attrs["c_star"]
    ends = [c.min(), c.max()]
    after.plot(ends, ends, color="0.4", linewidth=0.8, linestyle="--", label="C(c) = c")
    after.plot(c, dataset.correlation_map, color=COLOURS[0], label="C(c)")
    slope.axhline(1, color="0.4", linewidth=0.8, linestyle="--", label="1")
    slope.plot(c, dataset.correlation_map_slope, color=COLOURS[0], label="C'(c)")
    if np.isfinite(c_star):
        after.plot([c_star], [c_star], MARKERS[0], color=_FIXED_POINT, label=f"c* = {c_star:.4g}")
        slope.axvline(c_star, color=_FIXED_POINT, linewidth=0.8, linestyle=":", label="c*")
    after.set(ylabel="next layer's correlation C(c)", title="the map")
    slope.set(ylabel="slope C'(c)", title="its slope, χ₁ at c = 1")
    for axes in (after, slope):
        axes.set(xlabel="correlation c", xticks=np.linspace(-1, 1, 5))
        axes.legend(fontsize=8)
    of = dataset.attrs
    figure.suptitle(
        f"{of['activation']}, σ_w² = {of['sigma_w2']:g}, σ_b² = {of['sigma_b2']:g}: "
        f"q* = {of['q_star']:.4g}, χ₁ = {of['chi1']:.4g}"
    )
    return figure
