"""Dropout: units are set to 0 at random."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow._checks import check_scale, is_traced
from gradflow.blocks.base import AbstractBlock, Multiply, each_step
from gradflow.errors import InputError
from gradflow.kernels import Kernel, Unknown, multiply_kernel

__all__ = ["Dropout"]


class Dropout(AbstractBlock):
    """Each unit of each input is kept with probability p, and then divided by p; otherwise it is 0.

    Two inputs meet different masks, a tangent and a gradient that of their input: E[z_a²] and the
    tangent's E[u_a²] are divided by p, E[z_a z_b] is not (Schoenholz et al. 2017, arXiv:1611.01232,
    section 4). So even two equal inputs come apart, c* < 1.
    """

    keep_rate: ScalarLike = 0.9

    def __check_init__(self) -> None:
        check_scale("keep_rate", self.keep_rate)
        keep_rate = np.asarray(1.0 if is_traced(self.keep_rate) else self.keep_rate)
        if not np.all((keep_rate > 0) & (keep_rate <= 1)):
            raise InputError(
                f"keep_rate is {self.keep_rate}; a probability to keep is above 0, at most 1"
            )

    def apply(
        self,
        signal: Float[Array, "sites n"],
        multiply: Multiply,
        key: PRNGKeyArray,
    ) -> Float[Array, "sites n"]:
        """Return the signals with units set to 0."""
        keep_rate = jnp.asarray(self.keep_rate, signal.dtype)
        key = each_step(key, multiply)
        mask = jax.random.uniform(key, signal.shape, signal.dtype) < keep_rate
        return jnp.where(mask, signal / keep_rate, 0)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return the second moments, those of each input with itself divided by p."""
        more = 1 / self.keep_rate - 1

        def own(k: Array) -> Array:
            return jnp.asarray(more * (k if k.ndim == 1 else jnp.diag(jnp.diagonal(k))))

        # z m/p = z + z (m/p - 1), of which the mask m makes the second uncorrelated with anything.
        tangent = None if kernel.tangent is None else own(kernel.tangent)
        return kernel.with_noise(own(kernel.covariance), tangent, Unknown())

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: yes, as masks do not depend on the signal."""
        return True
