"""Quasi-random points of normal variables: Sobol sequences, scrambled as Owen does."""

import functools

import numpy as np

from gradflow.errors import InputError

__all__ = ["normal_points"]

_MAX_SOBOL = 21_201  # dimensions that SciPy has direction numbers for


@functools.lru_cache(maxsize=16)
def normal_points(dimensions: int, replicate: int, points: int) -> np.ndarray:
    """Scrambled Sobol points as normal variables z, then -z, (2 points, dimensions)."""
    from scipy.special import ndtri  # noqa: PLC0415 - SciPy is slow to import
    from scipy.stats import qmc  # noqa: PLC0415

    if dimensions > _MAX_SOBOL:
        raise InputError(
            f"an average is over {dimensions} Gaussian variables; quasi-Monte Carlo has points for "
            f"up to {_MAX_SOBOL}"
        )
    sequence = qmc.Sobol(dimensions, scramble=True, seed=np.random.default_rng(replicate))
    uniform = sequence.random(points)
    z = ndtri(np.clip(uniform, 2.0**-40, 1 - 2.0**-40))
    return np.concatenate([z, -z])
