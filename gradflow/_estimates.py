"""Estimates and histograms made of samples of networks, and merged."""

from collections.abc import Sequence

import numpy as np

from gradflow._checks import check_sequence
from gradflow.errors import InputError
from gradflow.estimation import Estimate, Histogram

__all__ = ["histogram", "merge"]


def merge(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate from the networks of several, merged in their order.

    Raises
    ------
    InputError
        If ``estimates`` is empty.
    """
    estimates = check_sequence("estimates", estimates, "a sequence of Estimates")
    if not estimates:
        raise InputError("estimates is empty; it needs at least one to merge")
    merged = estimates[0]
    for other in estimates[1:]:
        merged = _merge(merged, other)
    return merged


def _merge(a: Estimate, b: Estimate) -> Estimate:
    both = np.maximum(a.log_unit, b.log_unit)
    log_unit = np.where(a.count == 0, b.log_unit, np.where(b.count == 0, a.log_unit, both))

    def rescaled(e: Estimate) -> tuple[np.ndarray, np.ndarray]:
        scale = np.exp(np.where(e.count > 0, e.log_unit - log_unit, 0.0))
        return np.where(e.count > 0, e.mean, 0.0) * scale, e.squares * scale**2

    (mean_a, squares_a), (mean_b, squares_b) = rescaled(a), rescaled(b)
    count = a.count + b.count
    share = b.count / np.maximum(count, 1)
    gap = mean_b - mean_a
    return Estimate(
        count=count,
        excluded=a.excluded + b.excluded,
        mean=np.where(count > 0, mean_a + gap * share, np.nan),
        squares=squares_a + squares_b + gap**2 * a.count * share,
        log_unit=log_unit,
    )


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
