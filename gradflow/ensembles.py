"""Weight ensembles: how the weights of a layer are drawn, a distribution times a variance rule.

A `Distribution` draws entries of mean 0 and variance 1; a variance rule is a function of
(fan_in, fan_out) that gives the variance of a layer's weights. Layer l has W of shape
(n_l, n_{l-1}), so that fan_in = n_{l-1} and fan_out = n_l. To add an ensemble, write one assignment
``name = Ensemble("name", distribution, rule)`` in this file.

=====================  =====================  =========================================
name                   variance of a weight   source
=====================  =====================  =========================================
``standard``           1 / (3 fan_in)         Glorot & Bengio 2010, eq. 1: U[±1/√fan_in]
``glorot``             2 / (fan_in+fan_out)   Glorot & Bengio 2010, eq. 12
``normalized``         2 / (fan_in+fan_out)   the same, eq. 16: U[±√6/√(fan_in+fan_out)]
``lecun``              1 / fan_in             LeCun, Bottou, Orr & Müller 1998
``he``                 2 / fan_in             He et al. 2015 (arXiv:1502.01852), eq. 10
``he_fan_out``         2 / fan_out            the same, eq. 14
``orthogonal``         1 / max(fans)          Saxe et al. 2014: WᵀW = I or WWᵀ = I, Haar
``mup_output``         1 / fan_in²            μP's top layer: Yang et al. 2022 (arXiv:2203.03466)
``unscaled``           1                      the N(0, 1) that the 2010 paper is cited against
``fan_in(σ_w)``        σ_w² / fan_in          the mean-field literature (Poole et al. 2016)
=====================  =====================  =========================================
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow._arguments import as_key, from_seed
from gradflow._checks import check_count, check_instance, check_number, check_sequence, unknown_name
from gradflow.errors import InputError

__all__ = ["ALL", "Distribution", "Ensemble", "fan_in", "from_initializer", "get"]

_VarianceRule = Callable[[int, int], float]


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A law of random matrices whose entries have mean 0 and variance 1.

    Attributes
    ----------
    name
        Its name in results and messages.
    draw
        ``draw(key, (n_out, n_in), dtype)`` returns the matrix.
    iid_gaussian
        Whether the entries are independent Gaussians.
    haar
        Whether it is a Haar-orthogonal matrix, or a corner of one with all rows or all columns.
    centred
        Whether every row sums to 0, so that a mean over units is not passed on.
    kurtosis
        E[w⁴] - 3 of independent entries, which finite widths depend on; None if it is not known.
    """

    name: str
    draw: Callable[..., Array]
    iid_gaussian: bool = False
    haar: bool = False
    centred: bool = False
    kurtosis: float | None = None

    @property
    def rotation_invariant(self) -> bool:
        """Whether rotations leave the law as it is: the sampler ``matrix_free`` needs that."""
        return self.iid_gaussian or self.haar


def _draw_uniform(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    half_width = math.sqrt(3.0)
    return jax.random.uniform(key, shape, dtype, -half_width, half_width)


# A normal cut at ±2 standard deviations has this standard deviation, not 1 (PITFALLS of every
# library's truncated initialiser); dividing by it makes the realised variance the stated one.
_TRUNCATED_SD = 0.87962566103423978
# By parts, E[x⁴] = 3 E[x²] - 16 p and E[x²] = 1 - 4 p before the division, p its density at 2.
_TRUNCATED_KURTOSIS = (7 * _TRUNCATED_SD**2 - 4) / _TRUNCATED_SD**4 - 3


def _draw_truncated_normal(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) / _TRUNCATED_SD


def _draw_orthogonal(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    def draw(key: PRNGKeyArray) -> Array:
        # Haar (the sign-corrected QR); orthonormal rows or columns have entries of variance
        # 1/max(shape).
        return jax.random.orthogonal(key, shape[0], m=shape[1], dtype=dtype) * math.sqrt(max(shape))

    if jax.default_backend() == "cpu":
        # Under vmap one after another: jaxlib waits forever where a program factorises as many
        # batches of matrices at once as the machine has cores (0.10, on two).
        draw = jax.custom_batching.sequential_vmap(draw)
    return draw(key)


def _draw_standardised(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    weights = jax.random.normal(key, shape, dtype)
    weights -= jnp.mean(weights, axis=1, keepdims=True)
    return weights / jnp.std(weights, axis=1, keepdims=True)


gaussian = Distribution("gaussian", jax.random.normal, iid_gaussian=True, kurtosis=0.0)
uniform = Distribution("uniform", _draw_uniform, kurtosis=-1.2)
truncated_normal = Distribution(
    "truncated_normal", _draw_truncated_normal, kurtosis=_TRUNCATED_KURTOSIS
)
orthogonal = Distribution("orthogonal", _draw_orthogonal, haar=True)
# Scaled weight standardisation (Brock, De & Smith 2021, arXiv:2101.08692, eq. 1): each row has mean
# 0 and variance 1. It takes two columns at least. Of signals that sum to 0, n_in units have their
# second moments multiplied by n_in/(n_in - 1), which is not 1 for a narrow input.
standardised = Distribution("standardised", _draw_standardised, centred=True)

DISTRIBUTIONS = {d.name: d for d in list(vars().values()) if isinstance(d, Distribution)}


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """A distribution times a variance rule.

    Attributes
    ----------
    name
        Its name in results and on the command line.
    distribution
        The law of the entries at unit variance.
    variance
        ``variance(fan_in, fan_out)``: the variance of one weight. It is the realised one.
    """

    name: str
    distribution: Distribution
    variance: _VarianceRule

    def sigma_w(self, fan_in: int, fan_out: int) -> float:
        """Return σ_w = √(fan_in · Var W), the scale in mean-field units (dimensionless)."""
        fans = check_count("fan_in", fan_in), check_count("fan_out", fan_out)
        return math.sqrt(fans[0] * self.variance(*fans))

    def half_width(self, fan_in: int, fan_out: int) -> float:
        """Return the half-width a of the uniform law U[-a, a] that has this variance."""
        fans = check_count("fan_in", fan_in), check_count("fan_out", fan_out)
        return math.sqrt(3.0 * self.variance(*fans))

    def with_gain(self, gain: float) -> "Ensemble":
        """Return the ensemble with every weight multiplied by ``gain`` (PyTorch's 'gain')."""
        check_number("gain", gain, positive=True)
        rule = self.variance
        return Ensemble(
            f"{self.name}*{gain:g}", self.distribution, lambda m, n: gain**2 * rule(m, n)
        )

    def drawn_from(self, distribution: Distribution | str) -> "Ensemble":
        """Return the same variance rule with the weights drawn from another distribution."""
        if isinstance(distribution, str):
            if distribution not in DISTRIBUTIONS:
                raise unknown_name("distribution", distribution, DISTRIBUTIONS)
            distribution = DISTRIBUTIONS[distribution]
        check_instance(
            "distribution", distribution, Distribution, "a Distribution, or the name of one"
        )
        if distribution == self.distribution:
            return self
        return Ensemble(f"{self.name}:{distribution.name}", distribution, self.variance)

    def sample(
        self, key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "n_out n_in"]:
        """Draw the weights of one layer, shape (n_out, n_in)."""
        sizes = check_sequence("shape", shape, "(n_out, n_in)")
        if len(sizes) != 2:
            raise InputError(f"shape is {shape!r}; it is (n_out, n_in)")
        n_out, n_in = (check_count("a length in shape", length) for length in sizes)
        key = as_key(key)
        scale = math.sqrt(self.variance(n_in, n_out))
        return self.distribution.draw(key, shape, dtype) * jnp.asarray(scale, dtype)


def _glorot(fan_in: int, fan_out: int) -> float:
    return 2.0 / (fan_in + fan_out)


def _standard(fan_in: int, fan_out: int) -> float:  # noqa: ARG001
    return 1.0 / (3.0 * fan_in)


def _lecun(fan_in: int, fan_out: int) -> float:  # noqa: ARG001
    return 1.0 / fan_in


def _he(fan_in: int, fan_out: int) -> float:  # noqa: ARG001
    return 2.0 / fan_in


def _he_fan_out(fan_in: int, fan_out: int) -> float:  # noqa: ARG001
    return 2.0 / fan_out


def _mup_output(fan_in: int, fan_out: int) -> float:  # noqa: ARG001
    return 1.0 / fan_in**2


def _semi_orthogonal(fan_in: int, fan_out: int) -> float:
    return 1.0 / max(fan_in, fan_out)


def _unscaled(fan_in: int, fan_out: int) -> float:  # noqa: ARG001
    return 1.0


standard = Ensemble("standard", uniform, _standard)
normalized = Ensemble("normalized", uniform, _glorot)
glorot = Ensemble("glorot", gaussian, _glorot)
glorot_uniform = Ensemble("glorot_uniform", uniform, _glorot)
glorot_truncated_normal = Ensemble("glorot_truncated_normal", truncated_normal, _glorot)
glorot_orthogonal = Ensemble("glorot_orthogonal", orthogonal, _glorot)
lecun = Ensemble("lecun", gaussian, _lecun)
lecun_uniform = Ensemble("lecun_uniform", uniform, _lecun)
lecun_truncated_normal = Ensemble("lecun_truncated_normal", truncated_normal, _lecun)
he = Ensemble("he", gaussian, _he)
he_uniform = Ensemble("he_uniform", uniform, _he)
he_truncated_normal = Ensemble("he_truncated_normal", truncated_normal, _he)
he_orthogonal = Ensemble("he_orthogonal", orthogonal, _he)
he_fan_out = Ensemble("he_fan_out", gaussian, _he_fan_out)
he_fan_out_uniform = Ensemble("he_fan_out_uniform", uniform, _he_fan_out)
# As the `orthogonal` of JAX and PyTorch; the plain name is the distribution's.
semi_orthogonal = Ensemble("orthogonal", orthogonal, _semi_orthogonal)
mup_output = Ensemble("mup_output", gaussian, _mup_output)
unscaled = Ensemble("unscaled", gaussian, _unscaled)


def fan_in(sigma_w: float = 1.0, distribution: Distribution | str = gaussian) -> Ensemble:
    """Return the mean-field ensemble Var W = σ_w² / fan_in.

    Parameters
    ----------
    sigma_w
        σ_w, dimensionless, finite and above 0.
    distribution
        The law of the entries.

    Raises
    ------
    InputError
        If ``sigma_w`` is not a finite number above 0, or the distribution is unknown.
    """
    check_number("sigma_w", sigma_w, positive=True)
    if not (0 < sigma_w < math.inf and 1e-300 < sigma_w * sigma_w < math.inf):
        raise InputError(
            f"sigma_w is {sigma_w!r}; it is a finite number above 0, of which a float can hold the "
            "square"
        )
    named = Ensemble(f"fan_in({sigma_w:g})", gaussian, lambda m, n: sigma_w**2 / m)  # noqa: ARG005
    return named.drawn_from(distribution)


# The entries from which `from_initializer` measures a variance: its relative error is √(2/N) = 5e-4
# for Gaussian entries.
_MEASURED_ENTRIES = 8_000_000


def from_initializer(
    initializer: Callable[..., Array],
    *,
    variance: _VarianceRule | None = None,
    name: str | None = None,
) -> Ensemble:
    """Return the ensemble of any `jax.nn.initializers` function.

    Parameters
    ----------
    initializer
        ``initializer(key, (fan_in, fan_out), dtype)``, JAX's convention, mean 0.
    variance
        ``variance(fan_in, fan_out)``, the variance of one weight. Without it, it is measured, once
        for each shape, on 8 million entries (relative error about 5e-4) at a fixed key.
    name
        The name of the ensemble; the function's own by default.

    Raises
    ------
    InputError
        If it cannot draw a matrix, or draws one whose mean is not 0 or whose variance is 0.
    """
    if not callable(initializer):
        raise InputError(
            f"initializer is {initializer!r}; it is a function (key, (fan_in, fan_out), dtype)"
        )
    called = str(name or getattr(initializer, "__name__", "initializer"))

    @functools.cache
    def measured(fan_in: int, fan_out: int) -> float:
        mean, square = _measure(initializer, called, fan_in, fan_out)
        spread = math.sqrt(square)
        # Five standard errors of the mean of independent entries.
        if not square > 0 or abs(mean) > 5 * spread / math.sqrt(_MEASURED_ENTRIES):
            raise InputError(
                f"initializer {called!r} draws weights of mean {mean:.3g} and standard deviation "
                f"{spread:.3g}; an ensemble has mean 0 and a variance above 0"
            )
        return square

    rule = variance or measured

    def draw(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        n_out, n_in = shape
        weights = initializer(key, (n_in, n_out), dtype)
        return weights.T / jnp.asarray(math.sqrt(rule(n_in, n_out)), dtype)

    return Ensemble(called, Distribution(called, draw), rule)


def _measure(
    initializer: Callable[..., Array], name: str, fan_in: int, fan_out: int
) -> tuple[float, float]:
    """Return the mean and the mean square of at least `_MEASURED_ENTRIES` of its entries."""
    repeats = -(-_MEASURED_ENTRIES // (fan_in * fan_out))

    def one(key: PRNGKeyArray) -> tuple[Array, Array]:
        weights = initializer(key, (fan_in, fan_out), jnp.float32)
        return jnp.mean(weights), jnp.mean(weights**2)

    try:
        with jax.ensure_compile_time_eval():
            means, squares = jax.lax.map(one, jax.random.split(from_seed(0), repeats))
            # Here, where it is known also while a program that draws is traced.
            return float(jnp.mean(means)), float(jnp.mean(squares))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"initializer {name!r} cannot draw a ({fan_in}, {fan_out}) matrix: "
            f"{str(error).splitlines()[0]}"
        ) from error


ALL = tuple(value for value in list(vars().values()) if isinstance(value, Ensemble))


def get(ensemble: "Ensemble | str | Callable[..., Array]") -> Ensemble:
    """Return an ensemble by name, or from a `jax.nn.initializers` function, or unchanged.

    Raises
    ------
    InputError
        If no ensemble has that name; the message has the nearest one.
    """
    if isinstance(ensemble, Ensemble):
        return ensemble
    if callable(ensemble):
        return from_initializer(ensemble)
    known = {e.name: e for e in ALL} | {"xavier": glorot, "kaiming": he}
    name = str(ensemble).lower()
    if name not in known:
        raise unknown_name("weights", ensemble, known)
    return known[name]
