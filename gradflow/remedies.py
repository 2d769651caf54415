"""How to tackle vanishing and exploding gradients: a sick network, and every remedy beside it.

Each remedy is the sick network with one thing changed (the weights, the activation, a
normalisation, a path past the layers), or with what is usually changed together. What is compared
is the start of training; what bounds a step, as gradient clipping does, changes none of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow import activations, builders, data, ensembles, gaussian, networks
from gradflow._arguments import from_seed
from gradflow._checks import check_count
from gradflow.activations import Activation
from gradflow.blocks import GRU, AbstractBlock, Activate, Chain, Gated, Linear, Maxout
from gradflow.comparison import Comparison, compare
from gradflow.ensembles import Ensemble
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.predictions import Prediction
from gradflow.simulation import jacobians, singular_values
from gradflow.theory import prescription, transformations

__all__ = ["Outcome", "Remedies", "Remedy", "proposals", "run"]

# A pair of signals or gradients that are apart by a factor e^6 are told apart no more: 6 ξ
# (Schoenholz et al. 2017, arXiv:1611.01232, section 5).
_TRAINABLE = 6.0
# Of the networks whose Jacobian is multiplied out, and how many of them.
_CONDITION_WIDTH, _CONDITION_NETWORKS = 100, 5
# LeCun, Bottou, Orr & Müller 1998, 'Efficient BackProp', section 4.4.
_LECUN_TANH = Activation("1.7159 tanh(2z/3)", lambda z: 1.7159 * jnp.tanh(2 * z / 3))
# A highway network's carry gate (Srivastava et al. 2015, arXiv:1505.00387, section 2.2).
_CARRIED = 2.0
# A change of c of this size in the top layers, or less, is rounding.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One way to tackle it.

    Attributes
    ----------
    name
        In a few words.
    network
        The law of the networks that it makes of the sick one.
    cost
        What it costs beside the layers' own products.
    caveat
        What it does not do.
    """

    name: str
    network: Network
    cost: str
    caveat: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a remedy does, in theory and measured.

    Attributes
    ----------
    remedy
        It.
    comparison
        Theory beside simulation.
    gradient, gradient_theory
        The factor of the gradient's norm ‖∂C/∂z‖ going down one layer, geometric mean: the
        verdict's.
    variance, variance_theory
        The factor of the mean square q of a layer's signal going up one layer, geometric mean.
    correlation, correlation_theory
        Of two inputs' signals in the top layer.
    trainable_depth
        In layers: 6 times the lesser of the depth scales of the gradient (over the whole network)
        and of the correlation (where it approaches its limit, in the top layers); inf if neither
        changes.
    log10_condition_number
        Of the end-to-end Jacobian of one input, without the first and last layer's change of width;
        inf where units are dead. Median over some networks of the width, 100 at most. NaN where one
        input alone has none (BatchNorm, LSUV).
    parameters, multiplications
        Weights and biases, and products of one input's way up, relative to the sick network.
    """

    remedy: Remedy
    comparison: Comparison
    gradient: float
    gradient_theory: float
    variance: float
    variance_theory: float
    correlation: float
    correlation_theory: float
    trainable_depth: float
    log10_condition_number: float
    parameters: float
    multiplications: float


@dataclasses.dataclass(frozen=True)
class Remedies:
    """The sick network's outcome, and the remedies', those that train deepest first.

    ``not_applicable`` are remedies that there are none of for this network, with the reason.
    """

    sick: Outcome
    outcomes: tuple[Outcome, ...]
    not_applicable: dict[str, str]


RemediesProgress = Callable[[str, int, int], None]


def run(
    activation: Activation | str = "logistic",
    weights: Ensemble | str = "unscaled",
    *,
    sigma_b: float | None = None,
    width: int = 200,
    depth: int = 30,
    inputs: int = 8,
    networks_each: int = 200,
    seed: int = 0,
    progress: RemediesProgress | None = None,
) -> Remedies:
    """Confront theory and simulation for a sick network and for every remedy, and rank them.

    Parameters
    ----------
    activation, weights, sigma_b
        Of the sick network; the note's, the logistic with N(0, 1) weights, without them.
    width, depth
        Units a layer, and layers; as many inputs as units (an image's pixels, repeated).
    inputs
        How many digit images go through each network: at least 4, the least batch that BatchNorm's
        theory has an answer for.
    networks_each
        How many networks to draw for each remedy, at least 2.
    seed
        Of everything that is random.
    progress
        Called with (remedy, networks done, networks in all).

    Raises
    ------
    InputError
        If a number is out of range or a name is unknown.
    """
    width, depth = check_count("width", width, 2), check_count("depth", depth, 3)
    check_count("networks_each", networks_each, 2)
    images = data.digits()[: check_count("inputs", inputs, 4)]
    if len(images) < inputs:
        raise InputError(f"inputs is {inputs}; there are {len(images)} digit images")
    x = jnp.asarray(data.resized(images, width))
    found, missing = proposals(activation, weights, width, depth, sigma_b=sigma_b)
    key = from_seed(seed)
    size = _size(found[0].network)

    def one(index: int) -> Outcome:
        remedy = found[index]
        comparison = compare(
            remedy.network,
            x,
            key=jax.random.fold_in(key, index),
            networks=networks_each,
            progress=progress and (lambda done, total: progress(remedy.name, done, total)),
        )
        condition = _log10_condition_number(remedy.network, x[0], jax.random.fold_in(key, index))
        return _outcome(remedy, comparison, condition, size)

    # Two at a time: while one compiles, which uses a single core, the other runs.
    with ThreadPoolExecutor(2) as pool:
        sick, *outcomes = pool.map(one, range(len(found)))
    ranked = sorted(outcomes, key=lambda o: (-o.trainable_depth, abs(math.log(o.gradient_theory))))
    return Remedies(sick, tuple(ranked), missing)


def proposals(
    activation: Activation | str,
    weights: Ensemble | str,
    width: int,
    depth: int,
    *,
    sigma_b: float | None = None,
) -> tuple[list[Remedy], dict[str, str]]:
    """Return the sick network and all remedies, and why others do not apply.

    Parameters
    ----------
    activation, weights, sigma_b, width, depth
        As for `run`.

    Raises
    ------
    InputError
        If a number is out of range or a name is unknown.
    """
    phi, ensemble = activations.get(activation), ensembles.get(weights)
    shape = [width] * (depth + 1)
    sick = builders.mlp(shape, phi, ensemble, sigma_b=sigma_b)
    found = [Remedy("as it is", sick, "", "")]
    missing: dict[str, str] = {}
    of = _Proposer(phi, ensemble, shape, sigma_b)
    for name, make, cost, caveat in of.all():
        try:
            found.append(Remedy(name, make(), cost, caveat))
        except InputError as error:
            missing[name] = str(error)
    return found, missing


_Proposal = tuple[str, Callable[[], Network], str, str]


@dataclasses.dataclass(frozen=True)
class _Proposer:
    """Makes each remedy of one sick network."""

    phi: Activation
    weights: Ensemble
    shape: Sequence[int]
    sigma_b: float | None

    def all(self) -> Iterator[_Proposal]:
        yield from self._weights()
        yield from self._activations()
        yield from self._normalisations()
        yield from self._residuals()

    def _weights(self) -> Iterator[_Proposal]:
        plain = functools.partial(builders.mlp, self.shape, self.phi)

        yield (
            "Glorot weights",
            functools.partial(plain, "glorot"),
            "none",
            "derived for φ'(0) = 1 and φ(0) = 0; the logistic's slope is 1/4",
        )
        yield "He weights", functools.partial(plain, "he"), "none", "derived for ReLU"
        yield (
            "critical weights and biases",
            functools.partial(self._critical, None),
            "none",
            "holds at the start of training; two inputs' correlation still tends to 1",
        )
        yield (
            "critical, orthogonal weights",
            functools.partial(self._critical, "orthogonal"),
            "a QR factorisation a layer, once",
            "singular values stay together only where units are nearly linear",
        )
        yield (
            "LSUV",
            self._unit_variance,
            "a batch's way up, once",
            "fixes lengths at the start; gradients still go by φ",
        )
        yield (
            "scaled weight standardisation",
            self._standardised,
            "mean and variance of each unit's weights, every step",
            "its gain is derived for q = 1",
        )

    def _critical(self, distribution: str | None, phi: Activation | None = None) -> Network:
        phi = phi or self.phi
        found = prescription.prescribe(phi, self.shape)
        if not math.isfinite(found.sigma_w2):
            raise InputError(f"activation {phi.name!r} has no critical point")
        ensemble = ensembles.fan_in(math.sqrt(found.sigma_w2))
        if distribution is not None:
            ensemble = ensemble.drawn_from(distribution)
        return builders.mlp(self.shape, phi, ensemble, sigma_b=found.bias_sd)

    def _centred(self) -> Network:
        phi, at_zero = self.phi, float(self.phi(0.0))
        if at_zero == 0:
            raise InputError(f"activation {phi.name!r} is 0 at 0 as it is")
        name = f"{phi.name} - {at_zero:.3g}"
        return self._critical(None, Activation(name, lambda z: phi(z) - at_zero, phi.kinks))

    def _unit_variance(self) -> Network:
        orthonormal = ensembles.fan_in(1.0, "orthogonal")
        return networks.unit_variance(builders.mlp(self.shape, self.phi, orthonormal))

    def _standardised(self) -> Network:
        with jax.enable_x64(True):
            m = gaussian.some_moments(self.phi, ("phi", "phi2"), jnp.ones(()))
            variance = float(m["phi2"] - m["phi"] ** 2)
        ensemble = ensembles.fan_in(variance**-0.5).drawn_from("standardised")
        return builders.mlp(self.shape, self.phi, ensemble)

    def _activations(self) -> Iterator[_Proposal]:
        yield (
            "centred activation φ(z) - φ(0), critical weights",
            self._centred,
            "none",
            "gradients still shrink, as a power of the depth",
        )
        for other, rule, caveat in (
            ("tanh", "glorot", "gradients still shrink, as a power of the depth"),
            ("relu", "he", "all inputs become alike: their correlation tends to 1; units die"),
            ("selu", "lecun", "lengths settle at 1, but gradients grow: χ = 1.07"),
            (_LECUN_TANH, "lecun", "made for signals of variance 1"),
        ):
            phi = activations.get(other)
            if phi != self.phi:
                yield (
                    f"{phi.name}, {rule.capitalize() if rule != 'lecun' else 'LeCun'} weights",
                    functools.partial(builders.mlp, self.shape, phi, rule),
                    "none",
                    caveat,
                )
        yield (
            "deep kernel shaping (DKS)",
            functools.partial(self._transformed, "dks"),
            "four numbers an activation",
            "made for this depth",
        )
        yield (
            "tailored activation (TAT)",
            functools.partial(self._transformed, "tat"),
            "four numbers an activation",
            "made for this depth",
        )

        width = self.shape[1]
        gate = Chain((Linear(width), Activate(activations.logistic)))
        for name, block, caveat in (
            (
                "maxout of two, LeCun weights",
                Maxout(Linear(width)),
                "all inputs become alike: their correlation tends to 1",
            ),
            (
                "gated linear units (GLU), LeCun weights",
                Gated(Linear(width), gate),
                "a gate half open halves signals and gradients; gain 2 mends only small ones",
            ),
        ):
            yield (
                name,
                functools.partial(self._instead, block),
                "twice the weights and products",
                caveat,
            )

    def _transformed(self, kind: str) -> Network:
        return transformations.applied(builders.mlp(self.shape, self.phi, "lecun"), kind)

    def _instead(self, block: AbstractBlock) -> Network:
        """Return the network of these blocks, which have weights of variance 1/fan_in."""
        first, blocks = Linear(self.shape[1]), len(self.shape) - 2
        return builders.stack(self.shape[0], [first, (block, blocks)], "linear")

    def _normalisations(self) -> Iterator[_Proposal]:
        plain = functools.partial(
            builders.mlp, self.shape, self.phi, self.weights, sigma_b=self.sigma_b
        )
        for norm, name, cost, caveat in (
            (
                "batch",
                "BatchNorm",
                "mean and variance over the batch; two parameters a unit",
                "gradients explode with depth; examples of a batch depend on one another",
            ),
            (
                "layer",
                "LayerNorm",
                "mean and variance over units; two parameters a unit",
                "fixes lengths; gradients still go by φ",
            ),
            (
                "rms",
                "RMSNorm",
                "mean square over units; a parameter a unit",
                "fixes lengths; gradients still go by φ",
            ),
        ):
            yield (
                f"{name} before φ",
                functools.partial(plain, norm=norm),
                cost,
                caveat,
            )

    def _residuals(self) -> Iterator[_Proposal]:
        width, blocks = self.shape[1], len(self.shape) - 2

        def residual(**options: Any) -> Callable[[], Network]:
            options = {"weights": self.weights, "sigma_b": self.sigma_b} | options
            return functools.partial(
                builders.residual, self.shape[0], width, blocks, self.phi, **options
            )

        yield (
            "residual",
            residual(),
            "an addition a layer",
            "without scaling, signals and gradients grow with every block",
        )
        yield (
            "residual, branches scaled by 1/√L",
            residual(scale="depth"),
            "an addition a layer",
            "each branch adds little: the network is shallower than it looks",
        )
        yield (
            "residual, branches start at 0 (ReZero)",
            residual(scale="zero"),
            "an addition and a parameter a layer",
            "the network is the identity until its scales have grown",
        )
        yield (
            "residual, last of two layers at 0 (Fixup)",
            residual(scale="fixup", layers=2, sigma_b=None),
            "a second product a layer; biases and a scale of one number each",
            "the network is the identity until its last layers have grown",
        )
        yield (
            "pre-LN residual, 1/√L, LeCun weights",
            residual(scale="depth", norm="layer", weights="lecun", sigma_b=None),
            "an addition and a LayerNorm a layer",
            "the stream's variance grows, so later branches matter less",
        )
        yield (
            "post-LN residual, LeCun weights",
            residual(norm="layer", norm_position="post", weights="lecun", sigma_b=None),
            "an addition and a LayerNorm a layer",
            "every block divides the path past it, and gradients with it",
        )
        carry = GRU(width, self.phi, reset_bias=None, update_bias=_CARRIED)
        yield (
            f"highway, carry bias {_CARRIED:g}, LeCun weights",
            functools.partial(self._instead, carry),
            "twice the weights and products",
            "a gate that is nearly open lets little of a layer through",
        )


def _outcome(
    remedy: Remedy, comparison: Comparison, condition: float, size: tuple[int, int]
) -> Outcome:
    theory, simulation = comparison.theory, comparison.simulation
    depth = remedy.network.depth
    parameters, multiplications = _size(remedy.network)
    return Outcome(
        remedy=remedy,
        comparison=comparison,
        gradient=comparison.verdict.factor,
        gradient_theory=comparison.verdict.factor_theory,
        variance=_a_layer(comparison["q"].measured),
        variance_theory=_a_layer(comparison["q"].theory),
        correlation=float(simulation["correlation"].value[depth - 1]),
        correlation_theory=float(np.asarray(theory["correlation"])[-1]),
        trainable_depth=trainable_depth(theory, comparison.verdict.factor_theory),
        log10_condition_number=condition,
        parameters=parameters / size[0],
        multiplications=multiplications / size[1],
    )


def _a_layer(log: np.ndarray) -> float:
    """Return the geometric mean of a quantity's factor going up one layer."""
    return float(np.exp((log[-1] - log[0]) / (len(log) - 1)))


def trainable_depth(theory: Prediction, gradient_factor: float) -> float:
    """Return 6 times the lesser depth scale of gradients and of correlations, in layers."""
    rates = [2 * abs(math.log(gradient_factor))]
    steps = np.abs(np.diff(np.asarray(theory["correlation"])[-3:]))
    if steps[0] > _ROUNDING and steps[1] > _ROUNDING:
        rates.append(abs(math.log(steps[1] / steps[0])))
    fastest = max(rates)
    return _TRAINABLE / fastest if fastest > _ROUNDING else math.inf


def _size(network: Network) -> tuple[int, int]:
    """Return how many weights and biases there are, and how many products a way up takes."""
    weights = sum(n_out * n_in for layer in network.shapes for n_out, n_in in layer)
    units = sum(n_out for layer in network.shapes for n_out, _ in layer)
    return weights + units, weights


def _log10_condition_number(network: Network, x: jax.Array, key: jax.Array) -> float:
    if network.mixes_sites:
        return math.nan
    factor = max(1, max(network.widths) // _CONDITION_WIDTH)
    narrow = networks.divide_widths(network, factor) if factor > 1 else network
    keys = jax.random.split(key, _CONDITION_NETWORKS)
    logs = _log_condition_numbers(narrow.as_arrays(x.dtype), x, keys)
    return float(np.median(np.asarray(logs))) / math.log(10)


@jax.jit
def _log_condition_numbers(network: Network, x: jax.Array, keys: jax.Array) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        # Without the first layer, which goes from the inputs' width to the layers'.
        factors = jacobians.layer_jacobians(network, x, key)[1:]
        return singular_values.log_singular_values(factors).log_condition_number

    return jax.lax.map(one, keys)
