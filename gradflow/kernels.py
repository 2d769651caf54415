"""Kernels: second moments of an infinitely wide layer's signals, which theory follows upwards.

A block maps the `Kernel` of its input to that of its output. A kernel holds second moments over
units of the signals and of a *tangent*, a small change of the signals in a generic direction. A
block maps the tangent's second moments linearly (a dense layer multiplies them by σ_w² E[φ'²]),
and its transpose takes the gradient's second moments down: χ. So no block has a backward pass.

*Scale and shape are apart.* Signals are exp(``log_scale``) times what the moments describe, so that
no depth over- or underflows. The scale is 0, and the moments are the signals' own, while second
moments are in the range where averages are computed (`gaussian.log_limits`); beyond it φ is the
power of |x| that it tends to at 0 or at ±∞ (`gaussian.growth`). What that leaves out is 1e-18 of a
signal in float64, 1e-7 in float32.

*Paths that share a part.* A signal is a linear combination of parts that do not correlate: each
product with a random matrix is a new part, whatever it was made of. A sum of two signals adds the
coefficients of the parts that they share, and the second moments of those that they do not. A part
that is a function of others, as φ(z), correlates with them; where both are in a sum, it is refused.
"""

import itertools
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from gradflow import activations, ensembles, gaussian
from gradflow._norms import inverse_or_zero
from gradflow._unit_distributions import Gaussian, Shifted, UnitDistribution, Unknown
from gradflow.activations import ActivationLike
from gradflow.ensembles import Distribution
from gradflow.errors import NoTheory

__all__ = ["Gaussian", "Kernel", "Shifted", "UnitDistribution", "Unknown"]
__all__ += ["multiply_kernel"]

_serial = itertools.count()


class _Origin:
    """What a part of a signal was made of: static, and no reason to compile a program again.

    Attributes
    ----------
    serial
        Its number: what was made later has a larger one.
    made_of
        Serials of the parts that it is a function of, but not a linear one.
    known
        Whether these are all. If not, it may depend on whatever was made before it.
    """

    def __init__(self, made_of: frozenset[int] = frozenset(), *, known: bool = True) -> None:
        self.serial, self.made_of, self.known = next(_serial), made_of, known

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Origin)

    def __hash__(self) -> int:
        return 0

    def may_depend_on(self, other: "_Origin") -> bool:
        """Whether it may correlate with another part, or with what that one was made of."""
        if not self.known and other.serial < self.serial:
            return True
        return other.serial in self.made_of or bool(self.made_of & other.made_of)


class _Share(eqx.Module):
    """A part of a signal: a coefficient for each site, times a signal that is no sum of parts."""

    coefficient: Float[Array, " sites"]
    whole: "Kernel"

    def is_part(self, other: "_Share") -> bool:
        """Whether it is the same part."""
        return self.whole._origin is other.whole._origin

    def correlates(self, other: "_Share") -> bool:
        """Whether it is another part that may yet correlate with it."""
        one, two = self.whole._origin, other.whole._origin
        return one is not two and (one.may_depend_on(two) or two.may_depend_on(one))


class Kernel(eqx.Module):
    """Moments over the units of an infinitely wide layer.

    The constructor takes signals that may depend on any signal made before, so that they cannot be
    added to it; `Kernel.of` is for signals that depend on no other.

    Attributes
    ----------
    covariance
        Shape (sites, sites): second moments E[z_a z_b]; the diagonal is each input's q.
    mean
        Shape (sites,): E[z_a]; 0 after a random matrix, E[φ] after an activation.
    tangent
        Second moments of a tangent u that is independent of the units' signals and of mean 0:
        shape (sites,), E[u_a²], where sites do not mix; (sites, sites), E[u_a u_b], where they do;
        None on a walk that needs no gradients.
    distribution
        That of a unit's signals at all sites.
    log_scale, log_tangent_scale
        Shape (sites,): the signals are exp(log_scale) times what ``covariance`` and ``mean`` say,
        and the tangent exp(log_tangent_scale) times what ``tangent`` says.
    """

    covariance: Float[Array, "sites sites"]
    mean: Float[Array, " sites"]
    tangent: Float[Array, "..."] | None
    distribution: UnitDistribution
    log_scale: Float[Array, " sites"]
    log_tangent_scale: Float[Array, " sites"]
    _shares: tuple[_Share, ...]
    _origin: _Origin = eqx.field(static=True)

    def __init__(
        self,
        covariance: Float[Array, "sites sites"],
        mean: Float[Array, " sites"],
        tangent: Float[Array, "..."] | None = None,
        distribution: UnitDistribution = Gaussian(),  # noqa: B008  (immutable)
        log_scale: Float[Array, " sites"] | None = None,
        log_tangent_scale: Float[Array, " sites"] | None = None,
        *,
        made_of: tuple[tuple[_Share, ...], _Origin] | None = None,
        **_: Any,  # `dataclasses.replace` passes the old moments' parts
    ) -> None:
        self.covariance, self.mean, self.tangent = covariance, mean, tangent
        self.distribution = distribution
        nothing = jnp.zeros_like(mean)
        self.log_scale = nothing if log_scale is None else log_scale
        self.log_tangent_scale = nothing if log_tangent_scale is None else log_tangent_scale
        self._shares, self._origin = made_of or ((), _Origin(known=False))

    @classmethod
    def of(
        cls,
        covariance: Float[Array, "sites sites"],
        mean: Float[Array, " sites"] | None = None,
        **more: Any,
    ) -> "Kernel":
        """The kernel of Gaussian signals with these moments, which depend on no other signals.

        ``more`` are further arguments of the constructor, among them another ``distribution``.
        """
        mean = jnp.zeros_like(jnp.diagonal(covariance)) if mean is None else mean
        return cls(covariance, mean, **more, made_of=((), _Origin()))

    @property
    def tangents(self) -> tuple[Any, Any]:
        """A tangent's second moments, and its memory, `UnitDistribution.memory`."""
        return self.tangent, self.distribution.memory

    def with_tangents(self, tangents: tuple[Any, Any]) -> "Kernel":
        """The signals as a block's input, with these `tangents`, at scale 1."""
        tangent, memory = tangents
        return self._input(
            tangent=tangent,
            distribution=self.distribution.with_memory(memory),
            log_tangent_scale=None,
        )

    @property
    def gaussian(self) -> bool:
        """Whether the signals are known to be Gaussian over units."""
        return isinstance(self.distribution, Gaussian)

    def as_carry(self, ends: UnitDistribution) -> "Kernel":
        """The signals as the input of blocks in a loop that ends in the distribution ``ends``."""
        return self.in_range()._input(distribution=ends.initial_carry(self))

    def derived(
        self,
        covariance: Float[Array, "sites_out sites_out"],
        mean: Float[Array, " sites_out"],
        tangent: Float[Array, "..."] | None,
        distribution: UnitDistribution,
    ) -> "Kernel":
        """The kernel of a function of these signals with the given moments, at their scales.

        Where the function reduces the number of sites, their scales must be equal (`common`).
        """
        scales: tuple[Array, ...] = (self.log_scale, self.log_tangent_scale)
        if len(mean) != len(self.mean):
            scales = tuple(jnp.broadcast_to(scale[0], mean.shape) for scale in scales)
        return Kernel(
            covariance, mean, tangent, distribution, *scales, made_of=((), self._function())
        )

    def through(self, activation: ActivationLike) -> "Kernel":
        """The kernel of φ(z).

        Raises
        ------
        NoTheory
            If the signals' distribution is not known.
        InputError
            If there is no such activation.
        """
        activation = activations.get(activation)
        if activation == activations.linear:
            return self
        z = self.in_range()
        h = z.distribution.through(z, activation)
        # Averages at q = 0 are those of a q that is next to nothing; a signal of zeros is one.
        blank = (jnp.diagonal(z.covariance) == 0) & (activation(jnp.zeros_like(z.mean)) == 0)
        value, slope, _ = gaussian.growth(activation, z.log_scale)
        if h.tangent is not None and h.tangent.ndim == 2:
            # E[φ'²] ∝ 1/√q where φ saturates, and of two sites it is no such power.
            slope = jnp.where((z.log_scale > 0) & (slope <= -z.log_scale / 2), jnp.nan, slope)
        return Kernel(
            jnp.where(blank[:, None] | blank[None], 0, h.covariance),
            jnp.where(blank, 0, h.mean),
            h.tangent,
            h.distribution,
            value,
            z.log_tangent_scale + slope,
            made_of=((), self._function()),
        )

    def scaled(self, factor: Float[Array, "..."] | ScalarLike) -> "Kernel":
        """The kernel of the signals times a factor, a scalar or one for each site."""
        within, log = _split(jnp.asarray(factor * jnp.ones_like(self.mean)))
        tangent = self.tangent
        if tangent is not None:
            tangent = tangent * _each_pair(within, within, tangent)
        shares = tuple(
            _Share(share.coefficient * factor, share.whole) for share in self._as_shares()
        )
        return Kernel(
            self.covariance * jnp.outer(within, within),
            self.mean * within,
            tangent,
            self.distribution.scaled(factor).at_scale(jnp.exp(-log)),
            self.log_scale + log,
            self.log_tangent_scale + log,
            made_of=(shares, _Origin()),
        )

    def centred(self, mean: Float[Array, " sites"] | None = None) -> "Kernel":
        """The kernel of z - E[z], the mean taken over units, or of z less the means given."""
        mean = self.mean if mean is None else mean
        rest = self.mean - mean
        covariance = self.covariance - jnp.outer(self.mean, self.mean) + jnp.outer(rest, rest)
        law = self.distribution.less(mean)
        return self._sum_of(self._as_shares(), covariance, rest, distribution=law)

    def normalised(
        self, variance: Float[Array, "*sites"], epsilon: ScalarLike | None = None
    ) -> "Kernel":
        """The kernel of the signals divided by √(variance + ε); 0 where that is 0.

        ``variance`` is at the scale of ``covariance``: of each site, or of all of them, whose
        scales must then be equal (`common`). ε, if there is one, is the signals' own.
        """
        if epsilon is None:
            return self.scaled(inverse_or_zero(jnp.sqrt(variance))).relative_to(self)
        log_epsilon = jnp.log(jnp.asarray(epsilon, self.mean.dtype)) - 2 * self.log_scale
        log = jnp.log(jnp.where(variance > 0, variance, 1))
        log = jnp.logaddexp(jnp.where(variance > 0, log, -jnp.inf), log_epsilon)
        within = jnp.clip(log, *gaussian.log_limits(log.dtype))
        inverse = jnp.where(jnp.isneginf(log), 0, jnp.exp(-within / 2))
        beyond = jnp.where(jnp.isneginf(log), 0, (log - within) / 2)
        return self.scaled(inverse)._divided(self.log_scale + beyond)

    def relative_to(self, other: "Kernel") -> "Kernel":
        """The kernel of these signals and their tangent divided by the other kernel's scale."""
        return self._divided(other.log_scale)

    def _divided(self, log: Float[Array, " sites"]) -> "Kernel":
        """The kernel of these signals and their tangent divided by exp(log)."""
        over = jnp.exp(-log)
        return self._sum_of(
            tuple(_Share(share.coefficient * over, share.whole) for share in self._as_shares()),
            self.covariance,
            self.mean,
            log_scale=self.log_scale - log,
            log_tangent_scale=self.log_tangent_scale - log,
        )

    def shifted(self, variance: Float[Array, "sites sites"] | ScalarLike) -> "Kernel":
        """The kernel of z + b, b ~ N(0, variance) for each unit, independent of all other signals.

        The variance is one number for a b that the sites share, or the covariance over sites.
        """
        tangent = None if self.tangent is None else jnp.zeros_like(self.tangent)
        covariance = jnp.asarray(variance * jnp.ones_like(self.covariance))
        scale = self.log_tangent_scale
        return self.plus(Kernel.of(covariance, tangent=tangent, log_tangent_scale=scale))

    def with_bias(
        self,
        sigma_b: ScalarLike | None,
        mu_b: ScalarLike | None = None,
        distribution: Distribution = ensembles.gaussian,
    ) -> "Kernel":
        """The kernel of z + b, b of this deviation, mean and law for each unit, if there is one.

        Raises
        ------
        NoTheory
            If the biases are of a law that is neither Gaussian, uniform nor triangular.
        """
        out = self
        if sigma_b is not None and distribution.iid_gaussian:
            out, sigma_b = out.shifted(sigma_b**2), None
        if sigma_b is None and mu_b is None:
            return out
        law = Shifted.of_biases(self.mean, sigma_b, mu_b, distribution)
        bias = Kernel.of(
            jnp.einsum("ak,bk->ab", law.chances * law.shifts, law.shifts, precision="highest"),
            law.mean,
            tangent=None if self.tangent is None else jnp.zeros_like(self.tangent),
            distribution=law,
            log_tangent_scale=self.log_tangent_scale,
        )
        return out.plus(bias)

    def with_noise(
        self,
        covariance: Float[Array, "sites sites"],
        tangent: Float[Array, "..."] | None,
        distribution: UnitDistribution,
    ) -> "Kernel":
        """The kernel of z + n, n of mean 0 and uncorrelated with all others, at z's scales."""
        noise = Kernel.of(
            covariance,
            tangent=tangent,
            distribution=distribution,
            log_scale=self.log_scale,
            log_tangent_scale=self.log_tangent_scale,
        )
        return self.plus(noise)

    def plus(self, other: "Kernel") -> "Kernel":
        """The kernel of the sum with other signals.

        Raises
        ------
        NoTheory
            If they may correlate in a way that is not known.
        """
        shares, others = self._as_shares(), other._as_shares()
        common = [(s, o) for s in shares for o in others if s.is_part(o)]
        if any(s.correlates(o) for s in shares for o in others):
            raise NoTheory(
                "two signals are added of which one is a function of the other, so that they "
                "correlate in a way that the theory does not know; it needs a random matrix "
                "(Linear, Dense) at the end of one of them"
            )
        largest = jnp.maximum(self._log_scale_or_none, other._log_scale_or_none)
        scale = jnp.where(jnp.isneginf(largest), 0, largest)
        tangent_scale = jnp.maximum(self.log_tangent_scale, other.log_tangent_scale)
        one, two = (g._at(scale, tangent_scale) for g in (self, other))
        cross = jnp.outer(one.mean, two.mean)
        tangent = None
        if one.tangent is not None and two.tangent is not None:
            tangent = one.tangent + two.tangent
        for s, o in common:
            whole = s.whole._at(scale, tangent_scale)
            apart = whole.covariance - jnp.outer(whole.mean, whole.mean)
            cross = cross + apart * jnp.outer(s.coefficient, o.coefficient)
            if tangent is not None and whole.tangent is not None:
                both = whole.tangent * _each_pair(s.coefficient, o.coefficient, tangent)
                tangent = tangent + both + (both.T if tangent.ndim == 2 else both)
        total = {share.whole._origin.serial: share for share in shares}
        for share in others:
            serial, coefficient = share.whole._origin.serial, share.coefficient
            if serial in total:
                coefficient = coefficient + total[serial].coefficient
            total[serial] = _Share(coefficient, share.whole)
        distribution = one.distribution.plus(two.distribution)
        return Kernel(
            one.covariance + two.covariance + cross + cross.T,
            one.mean + two.mean,
            tangent,
            distribution,
            scale,
            tangent_scale,
            made_of=(tuple(total.values()), _Origin()),
        )

    def times(self, other: "Kernel") -> "Kernel":
        """The kernel of the product, unit by unit, with signals independent of these.

        Raises
        ------
        NoTheory
            If they are not known to be independent.
        """
        shares, others = self._as_shares(), other._as_shares()
        if any(s.is_part(o) or s.correlates(o) for s in shares for o in others):
            raise NoTheory(
                "two signals are multiplied that are made of the same one, so that they "
                "correlate; the theory needs a random matrix (Linear, Dense) in one of them"
            )
        tangent, scale = None, jnp.zeros_like(self.mean)
        if self.tangent is not None and other.tangent is not None:
            # (u z)' = u' z + u z'; tangents have mean 0, so that the two do not correlate.
            scales = (
                self.log_tangent_scale + other.log_scale,
                other.log_tangent_scale + self.log_scale,
            )
            scale = jnp.maximum(*scales)

            def factor(k: Array, own: Array, like: Array) -> Array:
                rest = jnp.exp(own - scale)
                return (k if like.ndim == 2 else jnp.diagonal(k)) * _each_pair(rest, rest, like)

            tangent = self.tangent * factor(other.covariance, scales[0], self.tangent)
            tangent += other.tangent * factor(self.covariance, scales[1], other.tangent)
        return Kernel(
            self.covariance * other.covariance,
            self.mean * other.mean,
            tangent,
            Unknown(),
            self.log_scale + other.log_scale,
            scale,
            made_of=((), self._function(other)),
        )

    def may_depend_on(self, other: "Kernel") -> bool:
        """Whether a unit's signal may be a function of its other, beside random matrices."""
        pairs = itertools.product(self._as_shares(), other._as_shares())
        return any(s.is_part(o) or s.correlates(o) for s, o in pairs)

    def renewed(self) -> "Kernel":
        """The kernel of signals of the same distribution that are independent of these."""
        return self._input()

    def as_function_of(
        self,
        *others: "Kernel",
        distribution: UnitDistribution = Unknown(),  # noqa: B008  (immutable)
    ) -> "Kernel":
        """The kernel of signals of these moments that are a function of the others."""
        one, *more = others
        return Kernel(
            self.covariance,
            self.mean,
            self.tangent,
            distribution,
            self.log_scale,
            self.log_tangent_scale,
            made_of=((), one._function(*more)),
        )

    def in_range(self) -> "Kernel":
        """The same signals, with the least scales that bring q into the range of averages."""
        if not isinstance(self.distribution, Gaussian | Shifted | Unknown):
            return self
        q = jnp.diagonal(self.covariance)
        log_q = jnp.log(jnp.where(q > 0, q, 1)) + 2 * self.log_scale
        low, high = gaussian.log_limits(q.dtype)
        beyond = jnp.minimum(log_q - low, 0) + jnp.maximum(log_q - high, 0)
        return self._at(jnp.where(q > 0, beyond / 2, 0), self.log_tangent_scale)

    def common(self) -> "Kernel":
        """The same signals with one scale for all sites, the largest of signals that are not 0."""
        largest = jnp.max(self._log_scale_or_none)
        scale = jnp.where(jnp.isneginf(largest), 0, largest)
        tangent_scale = jnp.max(self.log_tangent_scale)
        ones = jnp.ones_like(self.mean)
        return self._at(scale * ones, tangent_scale * ones)

    def plain(self) -> "Kernel":
        """The same signals at scale 1, for computations from moments alone."""
        nothing = jnp.zeros_like(self.mean)
        return self._at(nothing, nothing)

    def _at(self, scale: Array, tangent_scale: Array) -> "Kernel":
        """The same signals at other scales."""
        by, by_tangent = jnp.exp(self.log_scale - scale), self.log_tangent_scale - tangent_scale
        tangent = self.tangent
        if tangent is not None:
            tangent = tangent * _each_pair(jnp.exp(by_tangent), jnp.exp(by_tangent), tangent)
        return self._sum_of(
            self._as_shares(),
            self.covariance * jnp.outer(by, by),
            self.mean * by,
            tangent=tangent,
            distribution=self.distribution.at_scale(by),
            log_scale=scale,
            log_tangent_scale=tangent_scale,
        )

    @property
    def _log_scale_or_none(self) -> Float[Array, " sites"]:
        """The scale, and -inf for signals that are 0."""
        return jnp.where(jnp.diagonal(self.covariance) == 0, -jnp.inf, self.log_scale)

    def _as_shares(self) -> tuple[_Share, ...]:
        return self._shares or (_Share(jnp.ones_like(self.mean), self),)

    def _function(self, *others: "Kernel") -> _Origin:
        """The origin of a function of these signals that is not linear."""
        origins = [s.whole._origin for kernel in (self, *others) for s in kernel._as_shares()]
        made_of = frozenset[int]().union(*(o.made_of | {o.serial} for o in origins))
        return _Origin(made_of, known=all(o.known for o in origins))

    def _sum_of(
        self, shares: tuple[_Share, ...], covariance: Array, mean: Array, **other: Any
    ) -> "Kernel":
        """The sum of these shares, whose moments are given; it has this kernel's other fields."""
        return Kernel(
            covariance,
            mean,
            other.get("tangent", self.tangent),
            other.get("distribution", self.distribution),
            other.get("log_scale", self.log_scale),
            other.get("log_tangent_scale", self.log_tangent_scale),
            made_of=(shares, _Origin()),
        )

    def _input(self, **other: Any) -> "Kernel":
        """The signals as a block's input: as signals that depend on no other."""
        fields = ("tangent", "distribution", "log_scale", "log_tangent_scale")
        more = {name: getattr(self, name) for name in fields} | other
        return Kernel.of(self.covariance, self.mean, **more)


def _each_pair(
    rows: Float[Array, " sites"], columns: Float[Array, " sites"], like: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The products for each site with itself, or for all pairs: of the shape of ``like``."""
    return rows * columns if like.ndim == 1 else jnp.outer(rows, columns)


def _split(factor: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A factor whose square is in a float's range, and the logarithm of the rest."""
    low, high = gaussian.log_limits(factor.dtype)
    size = jnp.abs(factor)
    log = jnp.log(jnp.where(size > 0, size, 1))
    log = jnp.where((log < low) | (log > high), log, 0)
    return jnp.where(log == 0, factor, jnp.sign(factor)), log


def multiply_kernel(
    kernel: Kernel,
    *,
    sigma_w: ScalarLike,
    distribution: Distribution,
    mu_w: ScalarLike | None = None,
    tap: Float[Array, "..."] | None = None,
    full_input: Kernel | None = None,
    **_: object,
) -> Kernel:
    """The kernel of W x: second moments σ_w² E[x_a x_b], Gaussian over units.

    Weights whose rows sum to 0 take x less its mean over units; those of mean μ_w/n_in add μ_w E[x]
    to each unit. Of gradients through these there is no theory yet: NaN.

    ``tap`` is a zero, or one for each site, to differentiate by: the second moment, times fan_in,
    of a small random change of W. A gradient of W x with second moments Λ then has the cotangent
    Σ_ab Λ_ab E[x_a x_b], the variance of a component of ∂C/∂W (Glorot & Bengio 2010, eqs. 3 and 7),
    as in a simulation (`simulation._samplers`). Where W is a part of a larger matrix,
    ``full_input`` is the input of all of it. The tap is in units of
    exp(2 x.log_scale - 2 out.log_tangent_scale), ``out`` being the result.
    """
    if distribution.structured:
        raise NoTheory(
            f"weights are {distribution.name!r}, of which no theory knows the products: it is of "
            "independent entries, about one mean, and of orthogonal matrices"
        )
    passed = kernel.centred() if distribution.centred else kernel
    within, log = _split(jnp.asarray(sigma_w, kernel.mean.dtype))
    scale = jnp.square(within)
    tangent = passed.tangent
    if tangent is not None:
        tangent = scale * tangent
        if tap is not None:
            # Whatever the weights' rows sum to, ∂C/∂W = δ xᵀ.
            k = (kernel if full_input is None else full_input).covariance
            tangent = tangent + tap * (jnp.diagonal(k) if tangent.ndim == 1 else k)
    covariance = scale * passed.covariance
    law: dict[str, Any] = {}
    if mu_w is not None:
        mean = jnp.asarray(mu_w, kernel.mean.dtype) * kernel.mean * jnp.exp(-log)
        law = {"mean": mean, "distribution": Shifted.at(mean)}
        covariance = covariance + jnp.outer(mean, mean)
        tangent = None if tangent is None else jnp.nan * tangent
    return Kernel.of(
        covariance,
        tangent=tangent,
        log_scale=passed.log_scale + log,
        log_tangent_scale=passed.log_tangent_scale + log,
        **law,
    )
