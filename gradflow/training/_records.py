"""What is recorded of a network in training, and when.

On monitored inputs it is what `simulation.propagation.propagate` measures when it is given the
weights of that step: there is one implementation.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from gradflow import statistics
from gradflow._roots import bisect
from gradflow.networks import Network
from gradflow.simulation import jacobians, propagation, singular_values
from gradflow.statistics import Statistic
from gradflow.training._parameters import Weights, outputs


class Data(NamedTuple):
    """Samples, with an axis of positions where a network's first sites are those."""

    inputs: Float[Array, "samples *positions n_in"]
    labels: Int[Array, " samples"]


def _percentile_98(values: Float[Array, "sites n"]) -> Float[Array, ""]:
    """The least number that 98 % of the values do not exceed, to rounding.

    By bisection: sorting takes a CPU fifty times as long.
    """

    def enough(limit: Array) -> Array:
        return jnp.mean((values <= limit).astype(values.dtype)) >= 0.98

    return bisect(enough, jnp.min(values), jnp.max(values), steps=26)[1]


activation_percentile_98 = Statistic(
    "activation_percentile_98",
    "98th percentile of activations over units and inputs",
    measure=lambda s: _percentile_98(s.activation * jnp.exp(s.log_scale)[:, None]),
    predict=lambda _: jnp.full((), jnp.nan),
)
RECORDED = (*statistics.ALL, activation_percentile_98)


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """What is recorded along training: when, of which inputs, and which quantities.

    Loss, error, movement and update ratios are recorded always.

    Attributes
    ----------
    steps
        The steps to record, the last one among them. Without it 0, the last one and some between,
        ever further apart: as many, up to 25, as take an eighth of the time of training by a rough
        estimate, and at least one.
    monitor
        (inputs, labels) that everything is measured on; 300 of the data without it.
    wanted
        The statistics to record.
    histograms
        Bins of the distribution of activations at each layer; none is recorded if 0.
    singular_values
        How many of the largest singular values of ∂z^L/∂x at the first monitored input to record.
    """

    steps: Sequence[int] | None = None
    monitor: tuple[ArrayLike, ArrayLike] | None = None
    wanted: Sequence[Statistic] = RECORDED
    histograms: int = 0
    singular_values: int = 0


# Labels of what is recorded of each layer beside statistics.
_OF_LAYERS = {
    "update_ratio": "‖ΔW‖/‖W‖, of the update that the step makes",
    "movement": "‖W - W₀‖/‖W₀‖, relative movement since the start",
    "log_batch_gradient_norm": "natural logarithm of ‖∂C/∂W‖ of the step's batch",
    "log_clipped_gradient_norm": "natural logarithm of ‖∂C/∂W‖ of the step's batch, clipped",
    "activation_low": "where the first bin of activations begins",
    "activation_high": "where the last bin of activations ends",
}
# And of each network, on the monitored inputs, and on those for validation.
_OF_NETWORKS = {
    "loss": "cross-entropy, natural logarithm",
    "error": "fraction of wrong classes",
    "validation_loss": "cross-entropy of validation data, natural logarithm",
    "validation_error": "fraction of wrong classes in validation data",
}
# And of records with axes of their own, after those of networks and steps: axes and label.
_WITH_AXES: dict[str, tuple[tuple[str, ...], str]] = {
    "activation_histogram": (("layer", "bin"), "density of activations"),
    "log_singular_values": (
        ("singular_value",),
        "natural logarithm of the singular values of ∂z^L/∂x at the first monitored input",
    ),
}
# These, and what follows from them, by name.
LABELS = _OF_LAYERS | _OF_NETWORKS | {name: label for name, (_, label) in _WITH_AXES.items()}
LABELS |= {
    "speed_spread": "largest over smallest ‖ΔW‖/‖W‖ of the layers",
    "first_nonfinite": "first step whose cost is not finite, -1 for none",
    "nonfinite_layer": "layer where that came from, -1 for none",
    "diverged": "first recorded step at which the network has diverged, -1 for none",
}


def axes(name: str) -> tuple[str, ...]:
    """The axes of a record of this name, after those of networks and steps."""
    if name in _OF_NETWORKS:
        return ()
    return _WITH_AXES[name][0] if name in _WITH_AXES else ("layer",)


def cross_entropy(
    logits: Float[Array, "samples classes"], labels: Int[Array, " samples"]
) -> Float[Array, " samples"]:
    """Minus log softmax(z)_label of each sample."""
    at_label = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - at_label


def sites(inputs: Array) -> Array:
    """The sites of samples: their positions, where they have any, else the samples."""
    return inputs.reshape(-1, inputs.shape[-1])


def loss_and_error(
    logits: Float[Array, "samples classes"], labels: Int[Array, " samples"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean cross-entropy and the fraction of wrong classes, 1 where the loss is not finite."""
    loss = jnp.mean(cross_entropy(logits, labels))
    wrong = jnp.argmax(logits, axis=1) != labels
    return loss, jnp.mean(jnp.where(jnp.isfinite(loss), wrong, True).astype(logits.dtype))


def monitored(
    network: Network, weights: Weights, key: Array, monitor: Data, wanted: Sequence[Statistic]
) -> dict[str, Array]:
    """The statistics of these weights on the monitored inputs, loss and error among them.

    Gradients are of each input's own cost.
    """
    logits: list[Array] = []

    def at_the_top(z: Array) -> Array:
        logits.append(z)
        return jax.grad(lambda z: jnp.sum(cross_entropy(z, monitor.labels)))(z)

    measured = propagation.propagate(
        network, sites(monitor.inputs), key, weights=weights, cotangent=at_the_top, wanted=wanted
    )
    loss, error = loss_and_error(logits[0], monitor.labels)
    return measured | {"loss": loss, "error": error}


def activation_histograms(
    network: Network, weights: Weights, key: Array, monitor: Data, bins: int
) -> dict[str, Array]:
    """The distribution of activations over units and monitored inputs, at each layer.

    As a density in equal bins from ``activation_low`` to ``activation_high``: the bounds of φ, or
    the range of the values where φ has none. NaN where values are not finite.
    """
    signals = propagation.signals(network, sites(monitor.inputs), key, weights=weights)
    phi, bounds = network.activation, network.activation.bounds

    def of_layer(parts: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        z, log_scale = parts
        values = phi(z * jnp.exp(log_scale)[:, None]).ravel()
        if bounds is None:
            low, high = jnp.min(values), jnp.max(values)
        else:
            low, high = (jnp.asarray(bound, values.dtype) for bound in bounds)
        width = (high - low) / bins
        index = jnp.floor((values - low) / jnp.where(width > 0, width, 1))
        index = jnp.clip(jnp.nan_to_num(index), 0, bins - 1).astype(jnp.int32)
        counts = jnp.zeros(bins, values.dtype).at[index].add(1)
        # Where all values are equal the density is infinite.
        density = counts / (len(values) * width)
        return jnp.where(jnp.all(jnp.isfinite(values)), density, jnp.nan), low, high

    each = [
        jax.lax.map(of_layer, stage)
        for stage in zip(signals.preactivation, signals.log_scale, strict=True)
    ]
    names = ("activation_histogram", "activation_low", "activation_high")
    return dict(zip(names, map(jnp.concatenate, zip(*each, strict=True)), strict=True))


def leading_singular_values(
    network: Network, weights: Weights, key: Array, monitor: Data, count: int
) -> dict[str, Array]:
    """Logarithms of the largest singular values of ∂z^L/∂x at the first monitored input."""
    first = sites(monitor.inputs[:1])
    jacobian = jacobians.draw(network, first, key, weights=weights)
    return {"log_singular_values": singular_values.of_jacobian(jacobian).log[:count]}


def validated(network: Network, weights: Weights, key: Array, data: Data) -> dict[str, Array]:
    """Loss and error on validation data."""
    logits = outputs(network, weights, sites(data.inputs), key)
    loss, error = loss_and_error(logits, data.labels)
    return {"validation_loss": loss, "validation_error": error}
