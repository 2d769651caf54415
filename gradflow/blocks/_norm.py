"""What normalisations have in common."""

import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from gradflow._checks import check_scale
from gradflow._norms import normalised_rows
from gradflow.blocks.base import AbstractBlock
from gradflow.kernels import Kernel

__all__ = ["AbstractNorm"]


class AbstractNorm(AbstractBlock):
    """γ times a signal that is divided by a root mean square over units, with ε in the root."""

    gain: ScalarLike = 1.0
    epsilon: ScalarLike | None = None

    def __check_init__(self) -> None:
        if self.epsilon is not None:
            check_scale("epsilon", self.epsilon)

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: no, the result's length is not the signal's."""
        return False

    def _normalised(self, rows: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
        return jnp.asarray(self.gain, rows.dtype) * normalised_rows(rows, self.epsilon)

    def _normalised_kernel(self, kernel: Kernel) -> Kernel:
        # Of a batch-normalised signal this leaves the moments alone: its law scales as a whole.
        return kernel.normalised(jnp.diagonal(kernel.covariance), self.epsilon).scaled(self.gain)
