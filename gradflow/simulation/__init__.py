"""Simulation: the same statistics, measured in many random networks at once.

samplers
    How a product with a random matrix is drawn: ``dense``, ``matrix_free``.
linearisation
    A block's products with its random matrices, applied to tangents and cotangents.
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
    linearisation,
    monte_carlo,
    propagation,
    samplers,
    singular_values,
)

__all__ = [
    "jacobians",
    "linearisation",
    "monte_carlo",
    "propagation",
    "samplers",
    "singular_values",
]
