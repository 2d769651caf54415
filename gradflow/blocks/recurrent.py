"""What happens in a time step beside a layer: an input that is new at every step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow.blocks.base import AbstractBlock, Multiply, each_step
from gradflow.errors import InputError, check_scale, is_traced
from gradflow.gram import Gram, Unknown, multiply_gram

__all__ = ["Drive"]


class Drive(AbstractBlock):
    """z + u, u ~ N(0, σ_u²) for each unit, drawn anew at every layer or time step.

    It is U x_t with Gaussian weights U, Var U = σ_u²/fan_in, that all steps may share: for inputs
    of unit second moment that have no correlation over time, U x_t is independent at each step. The
    series that two sites are driven by have the correlation ``alike``: 1 is one series for all.
    """

    sigma_u: ScalarLike = 1.0
    alike: ScalarLike = 1.0

    def __check_init__(self) -> None:
        check_scale("sigma_u", self.sigma_u)
        alike = np.asarray(1.0 if is_traced(self.alike) else self.alike)
        if not np.all((alike >= 0) & (alike <= 1)):
            raise InputError(f"alike is {self.alike}; a correlation of inputs is from 0 to 1")

    def apply(
        self, signal: Float[Array, "sites n"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n"]:
        """Return z + u."""
        common_key, own_key = jax.random.split(each_step(key, multiply))
        sigma, alike = (jnp.asarray(x, signal.dtype) for x in (self.sigma_u, self.alike))
        common = jax.random.normal(common_key, (1, signal.shape[1]), signal.dtype)
        own = jax.random.normal(own_key, signal.shape, signal.dtype)
        return signal + sigma * (jnp.sqrt(alike) * common + jnp.sqrt(1 - alike) * own)

    def kernel(self, gram: Gram, multiply: Multiply = multiply_gram) -> Gram:  # noqa: ARG002
        """Return the second moments with those of u, σ_u² and σ_u² ``alike``, added."""
        own = jnp.eye(len(gram.mean), dtype=gram.mean.dtype)
        more = self.sigma_u**2 * (self.alike + (1 - self.alike) * own)
        law = gram.law if gram.gaussian else Unknown()
        return dataclasses.replace(gram, covariance=gram.covariance + more, law=law)

    @property
    def homogeneous(self) -> bool:
        """It is not."""
        return False
