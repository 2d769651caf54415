"""Histograms made of samples of networks."""

from collections.abc import Sequence

import numpy as np

from gradflow.estimation import Histogram

__all__ = ["histogram"]


def histogram(
    values: Sequence[np.ndarray], log_scales: Sequence[np.ndarray], *, bins: int = 80
) -> Histogram:
    """The histogram of signals of several networks, at every layer.

    Parameters
    ----------
    values
        For each layer, shape (networks, sites, width).
    log_scales
        For each layer, shape (networks, sites): the true signals are exp(log_scale) times these.
    bins
        The number of bins, which are symmetric about 0 and reach the largest value.
    """
    edges, density, error, units = [], [], [], []
    for value, log_scale in zip(values, log_scales, strict=True):
        log_scale = np.asarray(log_scale, np.float64)
        finite = log_scale[np.isfinite(log_scale)]
        unit = float(finite.max()) if finite.size else 0.0
        scale = np.exp(np.where(np.isfinite(log_scale), log_scale, -np.inf) - unit)
        true = (np.asarray(value, np.float64) * scale[..., None]).reshape(len(value), -1)
        reach = float(np.max(np.abs(true), where=np.isfinite(true), initial=0.0)) or 1.0
        edge = reach * np.linspace(-1, 1, bins + 1)  # the middle edge is exactly 0
        counts = np.stack([np.histogram(network, edge)[0] for network in true])
        each = counts / (true.shape[1] * (edge[1] - edge[0]))
        edges.append(edge)
        density.append(each.mean(axis=0))
        spread = each.std(axis=0, ddof=1) if len(each) > 1 else np.full(bins, np.nan)
        error.append(spread / np.sqrt(len(each)))
        units.append(unit)
    return Histogram(
        edges=np.stack(edges),
        density=np.stack(density),
        standard_error=np.stack(error),
        log_unit=np.array(units),
        networks=len(values[0]),
    )
