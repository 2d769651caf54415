"""Singular values counted in bins, and means over networks of such counts."""

import numpy as np

__all__ = ["counts_in_bins", "mean_and_error"]


def counts_in_bins(logs: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count each network's singular values in bins.

    Parameters
    ----------
    logs
        Natural logarithms of the singular values, shape (networks, k); -inf for zeros.
    edges
        Of the bins, ascending, shape (bins + 1,); the last one belongs to the last bin.

    Returns
    -------
    array
        Integers of shape (networks, bins + 3): zeros, those below, in and above the bins.
    """
    with np.errstate(over="ignore", under="ignore"):
        s = np.exp(logs.astype(np.float64))
    column = 1 + np.searchsorted(edges, s, side="right")
    column[s == edges[-1]] = len(edges)
    column[np.isneginf(logs)] = 0
    counts = np.zeros((len(s), len(edges) + 2), np.int64)
    np.add.at(counts, (np.arange(len(s))[:, None], column), 1)
    return counts


def mean_and_error(
    total: np.ndarray, squares: np.ndarray, count: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a mean over networks and its standard error, NaN below two networks.

    Parameters
    ----------
    total, squares
        Sums over networks of values and of their squares, of one shape.
    count
        How many networks there are.
    """
    with np.errstate(all="ignore"):
        mean = total / count
        variance = np.maximum(squares - total * mean, 0) / np.where(count > 1, count - 1, np.nan)
        return mean, np.sqrt(variance / count)
