"""Simulation: the same statistics, measured in many random networks at once.

matrices
    Random matrices that answer W x and Wᵀ y: drawn, or decided only as far as they are asked.
samplers
    How a product with a random matrix is drawn: ``dense``, ``matrix_free``.
propagation
    One random network, forward and backward, and its statistics.
jacobians
    One network's Jacobian, as an operator and layer by layer.
singular_values
    All of them, as logarithms, or the first and last few; Lyapunov exponents.
monte_carlo
    Many networks: chunks, devices, estimates with standard errors.
"""

from gradflow.simulation import (
    jacobians,
    matrices,
    monte_carlo,
    propagation,
    samplers,
    singular_values,
)

__all__ = ["jacobians", "matrices", "monte_carlo", "propagation", "samplers", "singular_values"]
