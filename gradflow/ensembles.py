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
``torch``              1 / (3 fan_in)         PyTorch's layers, whose biases are U[±1/√fan_in] too
``keras``              2 / (fan_in+fan_out)   Keras' layers: uniform; orthogonal between time steps
``spectral``           1/(√fan_in+√fan_out)²  σReparam's W/‖W‖₂ (arXiv:2303.06296), when wide
``zero``, ``constant``, ``identity``          weights that are not random
=====================  =====================  =========================================

`get` reads the names of this table, those that frameworks use, and more: weights of a fixed
standard deviation, ``normal(0.02)`` or the number alone, and ``uniform(-0.05, 0.05)``; all of them
times a gain, ``glorot*5/3``, or from another distribution, ``he:orthogonal``. It reads the name of
every ensemble that it makes, as one of the same law.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow._arguments import as_key
from gradflow._checks import (
    check_count,
    check_instance,
    check_number,
    check_sequence,
    is_number,
    is_traced,
    unknown_name,
)
from gradflow._initializers import PROBE, Measured, measure, probe
from gradflow._weight_names import Function, Reader, as_text, split
from gradflow.errors import InputError

__all__ = ["ALIASES", "ALL", "Distribution", "Ensemble", "by_layer", "fan_in"]
__all__ += ["from_initializer", "get"]

_Rule = Callable[[int, int], float]


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
    structured
        Whether entries are neither independent nor a part of an orthogonal matrix, nor of mean 0,
        so that no theory knows the products: the identity, an initialiser of one's own with a mean.
    """

    name: str
    draw: Callable[..., Array]
    iid_gaussian: bool = False
    haar: bool = False
    centred: bool = False
    kurtosis: float | None = None
    structured: bool = False

    @property
    def rotation_invariant(self) -> bool:
        """Whether rotations leave the law as it is: the sampler ``matrix_free`` needs that."""
        return self.iid_gaussian or self.haar


def _draw_uniform(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    half_width = math.sqrt(3.0)
    return jax.random.uniform(key, shape, dtype, -half_width, half_width)


def _draw_triangular(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    half_width = math.sqrt(1.5)
    both = jax.random.uniform(key, (2, *shape), dtype, -half_width, half_width)
    return both[0] + both[1]


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


def _draw_identity(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:  # noqa: ARG001
    return jnp.eye(*shape, dtype=dtype) * math.sqrt(max(shape))


gaussian = Distribution("gaussian", jax.random.normal, iid_gaussian=True, kurtosis=0.0)
uniform = Distribution("uniform", _draw_uniform, kurtosis=-1.2)
truncated_normal = Distribution(
    "truncated_normal", _draw_truncated_normal, kurtosis=_TRUNCATED_KURTOSIS
)
# Of the sum of two independent uniform numbers: at unit variance each is U[±√(3/2)].
triangular = Distribution("triangular", _draw_triangular, kurtosis=-0.6)
orthogonal = Distribution("orthogonal", _draw_orthogonal, haar=True)
# Scaled weight standardisation (Brock, De & Smith 2021, arXiv:2101.08692, eq. 1): each row has mean
# 0 and variance 1. It takes two columns at least. Of signals that sum to 0, n_in units have their
# second moments multiplied by n_in/(n_in - 1), which is not 1 for a narrow input.
standardised = Distribution("standardised", _draw_standardised, centred=True)
# Ones on the diagonal and zeros beside it, at a mean square of 1.
identity_matrix = Distribution("identity_matrix", _draw_identity, structured=True)

DISTRIBUTIONS = {d.name: d for d in list(vars().values()) if isinstance(d, Distribution)}


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """A distribution times a variance rule, about a mean.

    Attributes
    ----------
    name
        Its name in results and on the command line, which `get` reads.
    distribution
        The law of the entries at unit variance.
    variance
        ``variance(fan_in, fan_out)``: the variance of one weight. It is the realised one. Of a
        ``structured`` distribution, its mean square.
    mean
        ``mean(fan_in, fan_out)``: the mean of one weight; None where it is 0.
    bias
        The ensemble that the biases beside such weights are drawn from, by the weights' fans, where
        a framework's layers have some; None for none.
    recurrent
        What a framework's recurrent layers have instead: the ensembles of the weights on the input,
        and of those from step to step; None where all are of this one.
    attention
        The same of its attention: of W_Q, W_K and W_V, by the fans of the one matrix that they are
        together, and of W_O.
    """

    name: str
    distribution: Distribution
    variance: _Rule
    mean: _Rule | None = None
    bias: "Ensemble | None" = None
    recurrent: "tuple[Ensemble, Ensemble] | None" = None
    attention: "tuple[Ensemble, Ensemble] | None" = None

    def sigma_w(self, fan_in: int, fan_out: int) -> Any:
        """Return σ_w = √(fan_in · Var W), the scale in mean-field units (dimensionless)."""
        fans = check_count("fan_in", fan_in), check_count("fan_out", fan_out)
        square: Any = fans[0] * self.variance(*fans)
        root: Any = jnp.sqrt if is_traced(square) else math.sqrt
        return root(square)

    def mu_w(self, fan_in: int, fan_out: int) -> float | None:
        """Return μ_w = fan_in · E[W], the gain of a mean over units; None where it is 0."""
        fans = check_count("fan_in", fan_in), check_count("fan_out", fan_out)
        return None if self.mean is None else fans[0] * self.mean(*fans)

    def half_width(self, fan_in: int, fan_out: int) -> float:
        """Return the half-width a of the uniform law U[-a, a] that has this variance."""
        fans = check_count("fan_in", fan_in), check_count("fan_out", fan_out)
        return math.sqrt(3.0 * self.variance(*fans))

    def with_gain(self, gain: float) -> "Ensemble":
        """Return the ensemble with every weight multiplied by ``gain`` (PyTorch's 'gain').

        Biases are as before.
        """
        check_number("gain", gain, positive=True)
        rule, mean = self.variance, self.mean
        return dataclasses.replace(
            self,
            name=f"{self.name}*{as_text(gain)}",
            variance=lambda m, n: gain**2 * rule(m, n),
            mean=None if mean is None else lambda m, n: gain * mean(m, n),
            recurrent=_each(self.recurrent, lambda ensemble: ensemble.with_gain(gain)),
            attention=_each(self.attention, lambda ensemble: ensemble.with_gain(gain)),
        )

    def drawn_from(self, distribution: Distribution | str) -> "Ensemble":
        """Return the same mean and variance with the weights drawn from another distribution."""
        if isinstance(distribution, str):
            if distribution not in DISTRIBUTIONS:
                raise unknown_name("distribution", distribution, DISTRIBUTIONS)
            distribution = DISTRIBUTIONS[distribution]
        check_instance(
            "distribution", distribution, Distribution, "a Distribution, or the name of one"
        )
        if distribution == self.distribution:
            return self
        return dataclasses.replace(
            self,
            name=f"{self.name}:{distribution.name}",
            distribution=distribution,
            recurrent=_each(self.recurrent, lambda ensemble: ensemble.drawn_from(distribution)),
            attention=_each(self.attention, lambda ensemble: ensemble.drawn_from(distribution)),
        )

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
        weights = self.distribution.draw(key, shape, dtype) * jnp.asarray(scale, dtype)
        return (
            weights if self.mean is None else weights + jnp.asarray(self.mean(n_in, n_out), dtype)
        )


def _each(ensembles: Any, change: Callable[[Ensemble], Ensemble]) -> Any:
    return ensembles and tuple(map(change, ensembles))


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


def _spectral(fan_in: int, fan_out: int) -> float:
    return 1.0 / (math.sqrt(fan_in) + math.sqrt(fan_out)) ** 2


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
# The largest singular value of N(0, 1) entries tends to √fan_in + √fan_out (Bai & Yin 1993).
spectral = Ensemble("spectral", gaussian, _spectral)
unscaled = Ensemble("unscaled", gaussian, _unscaled)
zero = Ensemble("zero", gaussian, lambda m, n: 0.0)  # noqa: ARG005
identity = Ensemble("identity", identity_matrix, _semi_orthogonal)
# torch.nn.Linear and Conv2d. In an RNN all weights and both biases have the hidden units' fan; in
# MultiheadAttention in_proj_weight is Xavier's, out_proj a Linear's, and all biases are 0.
torch = Ensemble(
    "torch",
    uniform,
    _standard,
    bias=standard,
    recurrent=(
        Ensemble("torch", uniform, lambda m, n: 1.0 / (3.0 * n)),  # noqa: ARG005
        Ensemble(
            "torch",
            uniform,
            _standard,
            bias=Ensemble("torch", triangular, lambda m, n: 2.0 / (3.0 * m)),  # noqa: ARG005
        ),
    ),
    attention=(glorot_uniform, standard),
)
# Dense and Conv2D; orthogonal from step to step of a SimpleRNN. Biases start at 0.
keras = Ensemble("keras", uniform, _glorot, recurrent=(glorot_uniform, semi_orthogonal))


def fan_in(sigma_w: Any = 1.0, distribution: Distribution | str = gaussian) -> Ensemble:
    """Return the mean-field ensemble Var W = σ_w² / fan_in.

    Parameters
    ----------
    sigma_w
        σ_w, a dimensionless number, finite and above 0; it may be traced by JAX.
    distribution
        The law of the entries.

    Raises
    ------
    InputError
        If ``sigma_w`` is not a finite number above 0, or the distribution is unknown.
    """
    check_number("sigma_w", sigma_w, positive=True)
    if is_traced(sigma_w):
        return Ensemble("fan_in", gaussian, lambda m, n: sigma_w**2 / m).drawn_from(distribution)  # noqa: ARG005
    if not (0 < sigma_w < math.inf and 1e-300 < sigma_w * sigma_w < math.inf):
        raise InputError(
            f"sigma_w is {sigma_w!r}; it is a finite number above 0, of which a float can hold the "
            "square"
        )
    named = Ensemble(f"fan_in({as_text(sigma_w)})", gaussian, lambda m, n: sigma_w**2 / m)  # noqa: ARG005
    return named.drawn_from(distribution)


def from_initializer(
    initializer: Callable[..., Array],
    *,
    variance: _Rule | None = None,
    name: str | None = None,
) -> Ensemble:
    """Return the ensemble of any `jax.nn.initializers` function.

    Weights whose mean is not 0 are independent about one mean, or else of a law that no theory
    knows, as the identity: by the means of some 1000 matrices of shape (12, 8).

    Parameters
    ----------
    initializer
        ``initializer(key, (fan_in, fan_out), dtype)``, JAX's convention.
    variance
        ``variance(fan_in, fan_out)``, the variance of one weight, whose mean is then 0. Without it,
        both are measured, once for each shape, on 8 million entries (relative error about 5e-4) at
        a fixed key.
    name
        The name of the ensemble; the function's own by default.

    Raises
    ------
    InputError
        If it cannot draw a matrix, or a mean is 0 for one shape and not for another.
    """
    if not callable(initializer):
        raise InputError(
            f"initializer is {initializer!r}; it is a function (key, (fan_in, fan_out), dtype)"
        )
    called = str(name or getattr(initializer, "__name__", "initializer"))
    return _from_initializer(initializer, variance, called)


@functools.lru_cache(maxsize=64)
def _from_initializer(
    initializer: Callable[..., Array], variance: _Rule | None, called: str
) -> Ensemble:
    structured, centred = False, True
    if variance is None:
        probed = probe(initializer, called)
        structured, centred = probed.structured, probed.centred

    @functools.cache
    def measured(fan_in: int, fan_out: int) -> Measured:
        found = measure(initializer, called, (fan_in, fan_out))
        if centred and not found.centred:
            raise InputError(
                f"initializer {called!r} draws weights of mean {found.mean:.3g} and standard "
                f"deviation {math.sqrt(found.variance):.3g} for {fan_in} inputs and {fan_out} "
                f"units, and of mean 0 for {PROBE[0]} and {PROBE[1]}; it is one law for all"
            )
        return found

    def measured_variance(fan_in: int, fan_out: int) -> float:
        found = measured(fan_in, fan_out)
        return found.square if centred or structured else found.variance

    def measured_mean(fan_in: int, fan_out: int) -> float:
        return measured(fan_in, fan_out).mean

    rule = variance or measured_variance
    mean = None if centred or structured else measured_mean

    def draw(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        n_out, n_in = shape
        weights = initializer(key, (n_in, n_out), dtype).T
        scale = math.sqrt(rule(n_in, n_out))
        if mean is not None:
            weights -= jnp.asarray(mean(n_in, n_out), dtype)
        return weights / jnp.asarray(scale, dtype) if scale else jnp.zeros_like(weights)

    return Ensemble(called, Distribution(called, draw, structured=structured), rule, mean)


ALL = tuple(value for value in list(vars().values()) if isinstance(value, Ensemble))


# Other names: of frameworks, where Keras' and JAX's glorot_normal, he_normal and lecun_normal are
# truncated, and PyTorch's xavier_normal and kaiming_normal are not; and of arrays.
ALIASES = {
    "xavier": glorot,
    "xavier_normal": glorot,
    "xavier_uniform": glorot_uniform,
    "glorot_normal": glorot_truncated_normal,
    "kaiming": he,
    "kaiming_normal": he,
    "kaiming_uniform": he_uniform,
    "he_normal": he_truncated_normal,
    "lecun_normal": lecun_truncated_normal,
    "pytorch": torch,
    "tensorflow": keras,
    "zeros": zero,
    "eye": identity,
    "randn": unscaled,
}


def _about(name: str, distribution: Distribution, deviation: float, mean: float = 0.0) -> Ensemble:
    """Weights of a fixed standard deviation and mean, whatever the fans."""
    about = None if mean == 0 else lambda m, n: mean  # noqa: ARG005
    return Ensemble(name, distribution, lambda m, n: deviation**2, about)  # noqa: ARG005


def _normal(*numbers: float) -> Ensemble:
    name = f"normal({','.join(map(as_text, numbers))})"
    mean, deviation = numbers if len(numbers) == 2 else (0.0, *numbers)
    check_number(f"the standard deviation in {name}", deviation)
    return _about(name, gaussian, deviation, mean)


def _uniform(low: float, high: float) -> Ensemble:
    name = f"uniform({as_text(low)},{as_text(high)})"
    if not low < high:
        raise InputError(f"weights are {name}; the first number is below the second")
    return _about(name, uniform, (high - low) / math.sqrt(12.0), (low + high) / 2)


def _truncated(deviation: float) -> Ensemble:
    name = f"truncated_normal({as_text(deviation)})"
    check_number(f"the standard deviation in {name}", deviation)
    return _about(name, truncated_normal, deviation * _TRUNCATED_SD)


def _constant(value: float) -> Ensemble:
    return _about(f"constant({as_text(value)})", gaussian, 0.0, value)


# Names that take numbers.
_FUNCTIONS: dict[str, Function] = {
    "normal": ((1, 2), _normal),
    "uniform": ((2,), _uniform),
    "truncated_normal": ((1,), _truncated),
    "truncated": ((1,), _truncated),
    "constant": ((1,), _constant),
    "fan_in": ((1,), fan_in),
}


@functools.lru_cache(maxsize=1024)
def _read(text: str) -> Ensemble:
    return Reader(text, {e.name: e for e in ALL} | ALIASES, _FUNCTIONS).read()


def get(ensemble: Any) -> Ensemble:
    """The ensemble of a name, a number or a `jax.nn.initializers` function, or itself.

    Parameters
    ----------
    ensemble
        A name of `ALL`, or of a framework (xavier_uniform, kaiming_normal, …). Or weights of a
        fixed standard deviation: a number, ``normal(0.02)``, ``normal(mean, 0.02)``,
        ``uniform(-0.05, 0.05)``, ``truncated_normal(0.02)`` (a normal of that deviation cut at two
        of them, as Keras' and TensorFlow's: what is realised is 0.88 of it), ``constant(0.1)``. Or
        any of them times a gain, ``glorot*5/3``, ``he*sqrt(2)``, or from another distribution,
        ``he:uniform``; ``fan_in(1.5)`` is the function's. An `Ensemble` is returned as it is.

    Raises
    ------
    InputError
        If nothing has that name; the message has the nearest one.
    """
    if isinstance(ensemble, Ensemble):
        return ensemble
    if callable(ensemble):
        return from_initializer(ensemble)
    if is_number(ensemble) and not isinstance(ensemble, bool):
        return _normal(float(ensemble))
    if not isinstance(ensemble, str):
        raise unknown_name("weights", ensemble, (e.name for e in ALL))
    return _read(ensemble)


def by_layer(weights: Any, layers: int | None = None) -> tuple[Ensemble, ...]:
    """The ensembles of layers, from the input up.

    Parameters
    ----------
    weights
        What `get` takes, for all layers; or one for each, as a sequence or as text with commas
        between them, ``he,he,normal(0.01)``.
    layers
        How many layers there are; without it, as many ensembles as are given.

    Raises
    ------
    InputError
        If there are several ensembles and not one for each layer, or `get` does not know one.
    """
    if isinstance(weights, str):
        parts: Sequence[Any] = split(weights)
    else:
        parts = weights if isinstance(weights, list | tuple) else [weights]
    found = tuple(map(get, parts))
    if layers is None or len(found) == layers:
        return found
    if len(found) != 1:
        raise InputError(
            f"weights are {len(found)} ensembles, and there are {layers} layers; give one for all, "
            "or one for each"
        )
    return found * layers
