"""Time steps of recurrent networks: an input that is new at every step, and gated units."""

import abc
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from gradflow import activations, ensembles
from gradflow._checks import check_scale, is_traced
from gradflow.activations import Activation
from gradflow.blocks._cells import Cells
from gradflow.blocks.base import AbstractBlock, Multiply, each_step
from gradflow.blocks.dense import Linear
from gradflow.ensembles import Distribution
from gradflow.errors import InputError
from gradflow.kernels import Kernel, Unknown, multiply_kernel

__all__ = ["GRU", "LSTM", "Drive"]


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

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:  # noqa: ARG002
        """Return the second moments with those of u, σ_u² and σ_u² ``alike``, added."""
        own = jnp.eye(len(kernel.mean), dtype=kernel.mean.dtype)
        more = self.sigma_u**2 * (self.alike + (1 - self.alike) * own)
        return kernel.shifted(jnp.asarray(more))

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: no, the input does not scale with the signal."""
        return False


class _GatedStep(AbstractBlock):
    """A step of gates and a candidate, ``_count`` in all, each a function of a ``_layer``."""

    @property
    @abc.abstractmethod
    def _count(self) -> int:
        """The number of gates, with the candidate."""

    @property
    @abc.abstractmethod
    def _layer(self) -> Linear:
        """The layer whose output is the argument of each."""

    @property
    def homogeneous(self) -> bool:
        """Whether it is homogeneous: no, gates depend on the signal's length."""
        return False

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """The laws of its random matrices, in the order of the formula's gates and candidate."""
        return self._layer.distributions * self._count

    def divide_widths(self, factor: int | Fraction) -> "_GatedStep":
        """Return the block with its units divided by ``factor``, and its scales kept."""
        fewer: dict[str, Any] = {"units": self._layer.units // factor}
        return dataclasses.replace(self, **fewer)


class GRU(_GatedStep):
    """h' = u ⊙ h + (1 - u) ⊙ φ(W (r ⊙ h) + b): gated units (Cho et al. 2014, arXiv:1406.1078).

    With gates r = σ(W_r h + b_r) and u = σ(W_u h + b_u), σ the logistic. All weights have variance
    σ_w²/fan_in; biases are N(μ, σ_b²), μ_r and μ_u for the gates and 0 for the candidate. An input
    enters through ``drive``. Its signal is the state h, which is not Gaussian over units.
    ``reset_bias=None`` is without W_r, r = 1. A stack of such steps, each with weights of its own,
    is a highway network with the carry gate u, whose bias is best positive (Srivastava, Greff &
    Schmidhuber 2015, arXiv:1505.00387).

    At infinite width, gates and candidate of a step are independent of a unit's state and of each
    other, if weights are drawn anew at every step, and second moments close,

        k' = E[u_a u_b] k + E[(1-u_a)(1-u_b)] E[φ_a φ_b],    and of a tangent, with means 0,
        t' = E[u²] t + E[(1-u)²] E[φ'²] σ_w² (E[r²] + σ_w² E[r'²] k) t + σ_w² E[u'²] (k + E[φ²]) t

    (Gilboa et al. 2019, arXiv:1901.08987; Chen, Pennington & Schoenholz 2018, arXiv:1806.05394).
    Where all steps share their weights and biases this is not the limit, at any width: a unit's
    candidate and gates are correlated over time, and so with its state, in which they add up. Of
    such a network `theory.mean_field.predict` has the first step, `theory.shared_weights` has all.
    """

    units: int = eqx.field(static=True, default=100)
    activation: Activation = eqx.field(
        static=True, converter=activations.get, default=activations.tanh
    )
    sigma_w: ScalarLike = 1.0
    sigma_b: ScalarLike | None = None
    reset_bias: ScalarLike | None = 0.0
    update_bias: ScalarLike = 0.0
    drive: Drive | None = None
    distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)

    @property
    def _count(self) -> int:
        return 2 if self.reset_bias is None else 3

    @property
    def _layer(self) -> Linear:
        return Linear(self.units, self.sigma_w, self.sigma_b, self.distribution)

    def apply(
        self, signal: Float[Array, "sites n"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n"]:
        """Return the next state."""

        def layer(x: Array, key: PRNGKeyArray) -> Array:
            return _driven(self._layer, self.drive, x, multiply, key)

        keys = jax.random.split(key, 3)
        kept = signal
        if self.reset_bias is not None:
            kept = _gate(self.reset_bias)(layer(signal, keys[0])) * signal
        update = _gate(self.update_bias)(layer(signal, keys[1]))
        candidate = self.activation(layer(kept, keys[2]))
        return update * signal + (1 - update) * candidate

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return the second moments of the next state, and those of its tangent."""

        def layer(kernel: Kernel) -> Kernel:
            z = self._layer.kernel(kernel, multiply)
            return z if self.drive is None else self.drive.kernel(z)

        entering = kernel = kernel.plain()
        if self.reset_bias is not None:
            entering = layer(kernel).through(_gate(self.reset_bias)).times(kernel)
        update = layer(kernel).through(_gate(self.update_bias))
        candidate = layer(entering).through(self.activation)
        # c + u d, d = h - c: the tangent is u ḣ + (1 - u) ċ + u̇ d.
        u, m, k = update.mean[:, None], kernel.mean[:, None], candidate.covariance
        kept = update.covariance
        renewed = 1 - u - u.T + kept
        across = (u - kept) * m * candidate.mean[None]
        covariance = kept * kernel.covariance + renewed * k + across + across.T
        mean = update.mean * kernel.mean + (1 - update.mean) * candidate.mean
        tangent = None
        if kernel.tangent is not None:
            own = _like(kernel.tangent)
            means = m * candidate.mean[None]
            apart = kernel.covariance + k - means - means.T
            assert update.tangent is not None and candidate.tangent is not None  # noqa: PT018
            tangent = own(kept) * kernel.tangent + own(renewed) * candidate.tangent
            tangent = tangent + own(apart) * update.tangent
        return Kernel(covariance, mean, tangent, Unknown())

    @property
    def width_in(self) -> int:
        """The number of units, the width of the state."""
        return self.units

    def width_after(self, n_in: int) -> int:
        """Return the number of units.

        Raises
        ------
        InputError
            If ``n_in`` is another number.
        """
        if n_in != self.units:
            raise InputError(
                f"a GRU of {self.units} units gets {n_in}; its state before and after a step has "
                "as many units as it has, so put a Linear block before it"
            )
        return n_in

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:
        """Return the shapes of W_r, W_u and W."""
        return ((self.units, n_in),) * self._count


class LSTM(_GatedStep):
    """c' = f ⊙ c + i ⊙ g, h' = o ⊙ tanh(c'): long short-term memory with forget gates.

    With f = σ(W_f h + b_f), i and o alike, σ the logistic, and g = tanh(W_g h + b_g). All weights
    have variance σ_w²/fan_in; biases are N(μ, σ_b²), with a mean μ for each gate and 0 for g. There
    are no connections from the cells to the gates. An input enters through ``drive``. Its signal is
    the state, (c, h) side by side, twice as wide as its number of units.

    At infinite width, if weights are drawn anew at every step, the gates of a step are independent
    of a unit's cell and of each other. Second moments do not close: `blocks._cells` carries the
    law of the cells over units, and of a tangent with them,

        E[h_a' h_b'] = E[o_a o_b] E[tanh(c_a') tanh(c_b')],    ċ' = f ċ + c ḟ + g i̇ + i ġ.

    Where all steps share their weights and biases this is not the limit, at any width, as for
    `GRU`: of such a network `theory.mean_field.predict` has the first step, and
    `theory.shared_weights` all steps. There is no theory of a network that mixes inputs' gradients
    in another block (BatchNorm, convolutions).

    References: Hochreiter & Schmidhuber 1997, Neural Computation 9, 1735; Gers, Schmidhuber &
    Cummins 2000, Neural Computation 12, 2451 (the forget gate); Jozefowicz, Zaremba & Sutskever
    2015, ICML (μ_f = 1); Gilboa et al. 2019, arXiv:1901.08987 (mean-field theory).
    """

    units: int = eqx.field(static=True, default=100)
    sigma_w: ScalarLike = 1.0
    sigma_b: ScalarLike | None = None
    forget_bias: ScalarLike = 1.0
    input_bias: ScalarLike = 0.0
    output_bias: ScalarLike = 0.0
    drive: Drive | None = None
    distribution: Distribution = eqx.field(static=True, default=ensembles.gaussian)

    @property
    def _count(self) -> int:
        return 4

    @property
    def _layer(self) -> Linear:
        return Linear(self.units, self.sigma_w, self.sigma_b, self.distribution)

    def apply(
        self, signal: Float[Array, "sites n"], multiply: Multiply, key: PRNGKeyArray
    ) -> Float[Array, "sites n"]:
        """Return the next state."""
        cell, hidden = jnp.split(signal, 2, axis=1)

        def layer(key: PRNGKeyArray) -> Array:
            return _driven(self._layer, self.drive, hidden, multiply, key)

        keys = jax.random.split(key, 4)
        forget = _gate(self.forget_bias)(layer(keys[0]))
        entry = _gate(self.input_bias)(layer(keys[1]))
        candidate = jnp.tanh(layer(keys[2]))
        output = _gate(self.output_bias)(layer(keys[3]))
        cell = forget * cell + entry * candidate
        return jnp.concatenate([cell, output * jnp.tanh(cell)], axis=1)

    def kernel(self, kernel: Kernel, multiply: Multiply = multiply_kernel) -> Kernel:
        """Return the kernel of the next state, with the law of its cells and of their tangent.

        Raises
        ------
        InputError
            If the signal is neither Gaussian nor a state, or sites mix and gradients are wanted.
        """
        law = Cells.of(kernel.plain())
        own = None if law.memory is None else law.memory.hidden
        hidden = Kernel(law.hidden, jnp.zeros_like(kernel.mean), own, Unknown())

        def layer() -> Kernel:
            z = self._layer.kernel(hidden, multiply)
            return z if self.drive is None else self.drive.kernel(z)

        forget, entry, candidate, output = (layer() for _ in range(4))
        opened = output.through(_gate(self.output_bias))
        biases = (self.forget_bias, self.input_bias)
        return law.stepped(forget, entry, candidate, opened, biases).kernel()

    @property
    def width_in(self) -> int:
        """Twice the number of units, the width of the state."""
        return 2 * self.units

    def width_after(self, n_in: int) -> int:
        """Return twice the number of units, the width of the state.

        Raises
        ------
        InputError
            If ``n_in`` is another number.
        """
        if n_in != 2 * self.units:
            raise InputError(
                f"an LSTM of {self.units} units gets {n_in}; its state, c and h, before and after "
                f"a step is {2 * self.units}, so put a Linear block of as many before it"
            )
        return n_in

    def shapes(self, n_in: int) -> tuple[tuple[int, int], ...]:  # noqa: ARG002
        """Return the shapes of W_f, W_i, W_g and W_o."""
        return ((self.units, self.units),) * self._count


def _driven(
    linear: Linear, drive: Drive | None, x: Array, multiply: Multiply, key: PRNGKeyArray
) -> Array:
    """Return W x + b, with the input of this time step."""
    weights_key, drive_key = jax.random.split(key)
    z = linear.apply(x, multiply, weights_key)
    return z if drive is None else drive.apply(z, multiply, drive_key)


def _gate(bias: ScalarLike) -> Activation:
    """Return the logistic of x + bias."""

    def gate(x: Array) -> Array:
        return activations.logistic(x + jnp.asarray(bias, x.dtype))

    return Activation("gate", gate)


def _like(tangent: Array) -> Callable[[Array], Array]:
    """Return the function from all sites' second moments to those that the tangent has.

    These are all, or each site's with itself.
    """
    return jnp.diagonal if tangent.ndim == 1 else lambda k: k
