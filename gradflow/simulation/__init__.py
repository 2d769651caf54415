"""Simulation: the same statistics, measured in many random networks at once.

propagation
    One random network, forward and backward, and its statistics.
jacobians
    One network's Jacobian, as an operator and layer by layer.
partial_norms
    Norms of the Jacobians between all pairs of layers.
singular_values
    All singular values, as logarithms, or the first and last few; Lyapunov exponents.
monte_carlo
    Many networks: chunks, devices, estimates with standard errors.
"""

from gradflow.simulation import (
    jacobians,
    monte_carlo,
    partial_norms,
    propagation,
    singular_values,
)

__all__ = [
    "jacobians",
    "monte_carlo",
    "partial_norms",
    "propagation",
    "singular_values",
]
