"""The table of remedies: what each changes, how its network is made, its cost, and its limits."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradflow import activations, builders, ensembles, gaussian, networks
from gradflow.activations import Activation
from gradflow.blocks import (
    GRU,
    AbstractBlock,
    Activate,
    Chain,
    Dense,
    Gated,
    Linear,
    Maxout,
)
from gradflow.ensembles import Ensemble
from gradflow.errors import InputError
from gradflow.networks import Network, Stage
from gradflow.theory import prescription, transformations

__all__ = ["ALL", "Remedy", "SickNetwork"]

# LeCun, Bottou, Orr & Müller 1998, 'Efficient BackProp', section 4.4.
_LECUN_TANH = Activation("1.7159 tanh(2z/3)", lambda z: 1.7159 * jnp.tanh(2 * z / 3))
# A highway network's carry gate (Srivastava et al. 2015, arXiv:1505.00387, section 2.2).
_CARRIED = 2.0


@dataclasses.dataclass(frozen=True)
class SickNetwork:
    """A fully connected network, and the networks of its size that remedies make of it.

    Attributes
    ----------
    activation, weights, sigma_b
        φ, the ensemble, and the standard deviation of the biases; as of `builders.mlp`.
    width, depth
        Units a layer, and layers.
    inputs
        Components of an input; as many as units without it.
    classes
        Units of one more layer that makes logits of the last; there is none without it.
    options
        Others of `builders.mlp`: norm, norm_position, keep_rate and last. Remedies keep what they
        do not change of them, and do not apply where they cannot.
    """

    activation: Activation
    weights: Ensemble
    width: int
    depth: int
    sigma_b: float | None = None
    inputs: int | None = None
    classes: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of inputs and of each layer."""
        first = self.width if self.inputs is None else self.inputs
        last = () if self.classes is None else (self.classes,)
        return (first, *[self.width] * self.depth, *last)

    def mlp(
        self,
        weights: Ensemble | str | None = None,
        activation: Activation | str | None = None,
        **options: Any,
    ) -> Network:
        """The network itself; with weights of another ensemble, another activation, or options."""
        options = {**self.options, **options}
        if weights is None:
            options.setdefault("sigma_b", self.sigma_b)
        activation = self.activation if activation is None else activation
        weights = self.weights if weights is None else weights
        return builders.mlp(self.widths, activation, weights, **options)

    def residual(self, **options: Any) -> Network:
        """A residual network, with these options of `builders.residual`."""
        self.check_plain(allowed=("norm", "norm_position", "keep_rate"))
        own = {"weights": self.weights, "sigma_b": self.sigma_b, **self.options}
        options = own | options
        body = builders.residual(
            self.widths[0], self.width, self.depth - 1, self.activation, **options
        )
        return self._with_logits(body)

    def of_blocks(self, block: AbstractBlock) -> Network:
        """A network of these blocks, which have weights of variance 1/fan_in."""
        self.check_plain()
        first = Linear(self.width)
        return self._with_logits(
            builders.stack(self.widths[0], [first, (block, self.depth - 1)], "linear")
        )

    def normed(self, norm: str) -> Network | None:
        """The network with this normalisation before φ; None if it has it already."""
        known = {"norm_position": "pre"} | dict(self.options)
        own = {"norm": norm, "norm_position": "pre"}
        return None if known | own == known else self.mlp(**own)

    def check_plain(self, allowed: Sequence[str] = ()) -> None:
        """Raise `InputError` if the network has other options than those that are allowed."""
        for name, value in self.options.items():
            if name not in allowed:
                raise InputError(f"it is of networks without {name}, which is {value!r}")

    def _with_logits(self, body: Network) -> Network:
        if self.classes is None:
            return body
        top = Stage(Dense(self.activation, self.classes))
        return dataclasses.replace(body, stages=(*body.stages, top))


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One way to tackle vanishing or exploding gradients.

    Attributes
    ----------
    name
        In a few words.
    changes
        What of the network it changes: its weights, activation, blocks, normalisation or paths.
    make
        From the sick network to the one that the remedy makes of it; None if that is the same
        network. Raises InputError with the reason if the remedy does not apply.
    cost
        What it costs beside the layers' own products.
    caveat
        What it does not do.
    league
        The networks of the experiment `league` that it is tried on there by default.
    label
        Its name in that league; ``name`` without it.
    """

    name: str
    changes: str
    make: Callable[[SickNetwork], Network | None]
    cost: str
    caveat: str
    league: tuple[str, ...] = ()
    label: str = ""


def _critical(
    sick: SickNetwork, distribution: str | None = None, phi: Activation | None = None
) -> Network:
    """Weights and biases at the critical point of φ."""
    sick.check_plain()
    phi = phi or sick.activation
    prescribed = prescription.prescribe(phi, sick.widths)
    if not math.isfinite(prescribed.sigma_w2):
        raise InputError(f"activation {phi.name!r} has no critical point")
    ensemble = ensembles.fan_in(math.sqrt(prescribed.sigma_w2))
    if distribution is not None:
        ensemble = ensemble.drawn_from(distribution)
    return sick.mlp(ensemble, phi, sigma_b=prescribed.bias_sd)


def _centred(sick: SickNetwork) -> Network:
    phi, at_zero = sick.activation, float(sick.activation(0.0))
    if at_zero == 0:
        raise InputError(f"activation {phi.name!r} is 0 at 0 as it is")
    name = f"{phi.name} - {at_zero:.3g}"
    return _critical(sick, phi=Activation(name, lambda z: phi(z) - at_zero, phi.kinks))


def _standardised(sick: SickNetwork) -> Network:
    with jax.enable_x64(True):
        m = gaussian.some_moments(sick.activation, ("phi", "phi2"), jnp.ones(()))
        variance = float(m["phi2"] - m["phi"] ** 2)
    return sick.mlp(ensembles.fan_in(variance**-0.5).drawn_from("standardised"))


def _other(activation: Activation, weights: str) -> Callable[[SickNetwork], Network | None]:
    """The network with this activation, unless it has it already."""
    return lambda sick: None if activation == sick.activation else sick.mlp(weights, activation)


def _gated(sick: SickNetwork) -> Network:
    gate = Chain((Linear(sick.width), Activate(activations.logistic)))
    return sick.of_blocks(Gated(Linear(sick.width), gate))


# The sick network beside its remedies.
AS_IT_IS = Remedy("as it is", "nothing", lambda sick: sick.mlp(), "", "")

# To add a remedy, write a row: it appears in `gradflow remedies`, and in the league for each of the
# league's networks that the row names.
ALL = (
    Remedy(
        "Glorot weights",
        "weights",
        lambda sick: sick.mlp("glorot"),
        "none",
        "derived for φ'(0) = 1 and φ(0) = 0; the logistic's slope is 1/4",
    ),
    Remedy("He weights", "weights", lambda sick: sick.mlp("he"), "none", "derived for ReLU"),
    Remedy(
        "critical weights and biases",
        "weights",
        _critical,
        "none",
        "holds at the start of training; two inputs' correlation still tends to 1",
    ),
    Remedy(
        "critical, orthogonal weights",
        "weights",
        lambda sick: _critical(sick, "orthogonal"),
        "a QR factorisation a layer, once",
        "singular values stay together only where units are nearly linear",
    ),
    Remedy(
        "LSUV",
        "weights",
        lambda sick: networks.unit_variance(sick.mlp(ensembles.fan_in(1.0, "orthogonal"))),
        "a batch's way up, once",
        "fixes lengths at the start; gradients still go by φ",
    ),
    Remedy(
        "scaled weight standardisation",
        "weights",
        _standardised,
        "mean and variance of each unit's weights, every step",
        "its gain is derived for q = 1",
    ),
    Remedy(
        "centred activation φ(z) - φ(0), critical weights",
        "activation",
        _centred,
        "none",
        "gradients still shrink, as a power of the depth",
    ),
    Remedy(
        "tanh, Glorot weights",
        "activation",
        _other(activations.tanh, "glorot"),
        "none",
        "gradients still shrink, as a power of the depth",
    ),
    Remedy(
        "relu, He weights",
        "activation",
        _other(activations.relu, "he"),
        "none",
        "all inputs become alike: their correlation tends to 1; units die",
    ),
    Remedy(
        "selu, LeCun weights",
        "activation",
        _other(activations.selu, "lecun"),
        "none",
        "lengths settle at 1, but gradients grow: χ = 1.07",
    ),
    Remedy(
        f"{_LECUN_TANH.name}, LeCun weights",
        "activation",
        _other(_LECUN_TANH, "lecun"),
        "none",
        "made for signals of variance 1",
    ),
    Remedy(
        "deep kernel shaping (DKS)",
        "activation",
        lambda sick: transformations.applied(sick.mlp("lecun"), "dks"),
        "four numbers an activation",
        "made for this depth",
    ),
    Remedy(
        "tailored activation (TAT)",
        "activation",
        lambda sick: transformations.applied(sick.mlp("lecun"), "tat"),
        "four numbers an activation",
        "made for this depth",
    ),
    Remedy(
        "maxout of two, LeCun weights",
        "blocks",
        lambda sick: sick.of_blocks(Maxout(Linear(sick.width))),
        "twice the weights and products",
        "all inputs become alike: their correlation tends to 1",
    ),
    Remedy(
        "gated linear units (GLU), LeCun weights",
        "blocks",
        _gated,
        "twice the weights and products",
        "a gate half open halves signals and gradients; gain 2 mends only small ones",
    ),
    Remedy(
        "BatchNorm before φ",
        "normalisation",
        lambda sick: sick.normed("batch"),
        "mean and variance over the batch; two parameters a unit",
        "gradients explode with depth; examples of a batch depend on one another",
        league=("logistic, Glorot", "tanh, Glorot", "ReLU, He"),
        label="BatchNorm",
    ),
    Remedy(
        "LayerNorm before φ",
        "normalisation",
        lambda sick: sick.normed("layer"),
        "mean and variance over units; two parameters a unit",
        "fixes lengths; gradients still go by φ",
        league=("ReLU, He",),
        label="LayerNorm",
    ),
    Remedy(
        "RMSNorm before φ",
        "normalisation",
        lambda sick: sick.normed("rms"),
        "mean square over units; a parameter a unit",
        "fixes lengths; gradients still go by φ",
    ),
    Remedy(
        "residual",
        "paths",
        lambda sick: sick.residual(),
        "an addition a layer",
        "without scaling, signals and gradients grow with every block",
        league=("ReLU, He",),
    ),
    Remedy(
        "residual, branches scaled by 1/√L",
        "paths",
        lambda sick: sick.residual(scale="depth"),
        "an addition a layer",
        "each branch adds little: the network is shallower than it looks",
        league=("ReLU, He",),
        label="residual/√L",
    ),
    Remedy(
        "residual, branches start at 0 (ReZero)",
        "paths",
        lambda sick: sick.residual(scale="zero"),
        "an addition and a parameter a layer",
        "the network is the identity until its scales have grown",
        league=("ReLU, He",),
        label="ReZero",
    ),
    Remedy(
        "residual, last of two layers at 0 (Fixup)",
        "paths",
        lambda sick: sick.residual(scale="fixup", layers=2, sigma_b=None),
        "a second product a layer; biases and a scale of one number each",
        "the network is the identity until its last layers have grown",
    ),
    Remedy(
        "pre-LN residual, 1/√L, LeCun weights",
        "paths",
        lambda sick: sick.residual(
            scale="depth", norm="layer", norm_position="pre", weights="lecun", sigma_b=None
        ),
        "an addition and a LayerNorm a layer",
        "the stream's variance grows, so later branches matter less",
    ),
    Remedy(
        "post-LN residual, LeCun weights",
        "paths",
        lambda sick: sick.residual(
            norm="layer", norm_position="post", weights="lecun", sigma_b=None
        ),
        "an addition and a LayerNorm a layer",
        "every block divides the path past it, and gradients with it",
    ),
    Remedy(
        f"highway, carry bias {_CARRIED:g}, LeCun weights",
        "paths",
        lambda sick: sick.of_blocks(
            GRU(sick.width, sick.activation, reset_bias=None, update_bias=_CARRIED)
        ),
        "twice the weights and products",
        "a gate that is nearly open lets little of a layer through",
    ),
)
