"""Rotary positions: pairs of a query's or key's units turned by an angle times the token's number.

Su et al. 2021, arXiv:2104.09864, eqs. 14 and 15: θ_j = 10000^(-2j/d_k), of units j and j + d_k/2,
which Llama pairs. Scores of a query at a and a key at b have the covariance of those without
positions times g((a-b) - (c-d)), g(Δ) the mean of cos θ_j Δ.
"""

import numpy as np

__all__ = ["alignment", "angles", "turns"]

_BASE = 10_000.0
_ROUNDING = 1e-13


def angles(width: int) -> np.ndarray:
    """The angle θ of each pair of units, (width/2,)."""
    return _BASE ** (-np.arange(0, width, 2) / width)


def alignment(width: int, tokens: int) -> np.ndarray:
    """g(a-b), (tokens, tokens): what is left of q · k where both had one direction."""
    by = np.subtract.outer(np.arange(tokens), np.arange(tokens))
    return np.cos(np.multiply.outer(by, angles(width))).mean(axis=-1)


def turns(width: int, tokens: int) -> np.ndarray:
    """Functions u of a token's distance, u(a-c), with Σ u(Δ) u(Δ') = g(Δ - Δ').

    Shape (modes, tokens, tokens). Each is even or odd, and they are as few as can be: many angles
    are too small to tell.
    """
    apart = np.arange(1 - tokens, tokens)
    by = np.multiply.outer(angles(width), apart)
    modes = []
    for waves in (np.cos(by), np.sin(by)):
        values, vectors = np.linalg.eigh(waves.T @ waves / len(by))
        kept = values > _ROUNDING
        modes.append(np.sqrt(values[kept])[:, None] * vectors.T[kept])
    index = np.subtract.outer(np.arange(tokens), np.arange(tokens)) + tokens - 1
    return np.concatenate(modes)[:, index]
