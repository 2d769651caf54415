"""Finite width: what wide layers' limits leave out.

exact
    Exact laws of one input's length and gain, linear and ReLU; the length's 1/n corrections.
first_order
    First order in 1/n of every statistic: the shift of its mean, its spread between networks.
"""

from gradflow.theory.finite_width import exact, first_order

__all__ = ["exact", "first_order"]
