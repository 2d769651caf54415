"""Gaussian averages of activations: E[f(x)], x ~ N(0, q), and E[φ(u) φ(v)] for a Gaussian pair.

An activation's closed form where it has one, quadrature otherwise; the caller cannot tell which.
Everything is differentiable in q and in a pair's covariance, also where φ has kinks.

References: Poole et al. 2016, arXiv:1606.05340 (the averages of mean-field theory); Price 1958,
IRE Trans. Inf. Theory 4, 69 (their derivatives); Cho & Saul 2009 (the arc-cosine kernels).
"""

from gradflow.gaussian._moments import (
    Moments,
    check,
    growth,
    log_limits,
    moment,
    moments,
    saturation,
    some_moments,
)
from gradflow.gaussian._pairs import derivative_kernel, hermite_coefficients, kernel
from gradflow.gaussian._quadrature import expectation, expectation_with_error, nodes
from gradflow.gaussian._shifted import shifted_kernel, shifted_moment, shifted_saturation
from gradflow.gaussian._softmax import (
    LARGEST_SCORE_VARIANCE,
    SoftmaxRows,
    softmax_entropy,
    softmax_largest,
    softmax_rows,
)

__all__ = ["Moments", "check", "derivative_kernel", "expectation", "expectation_with_error"]
__all__ += ["growth", "hermite_coefficients", "kernel", "log_limits", "moment", "moments"]
__all__ += ["nodes", "saturation", "shifted_kernel", "shifted_moment", "shifted_saturation"]
__all__ += ["some_moments"]
__all__ += ["LARGEST_SCORE_VARIANCE", "SoftmaxRows", "softmax_entropy", "softmax_largest"]
__all__ += ["softmax_rows"]
