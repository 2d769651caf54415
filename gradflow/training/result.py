"""What became of networks in training: recorded along the way, labelled, theory beside it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import xarray
from jaxtyping import Array, Float

from gradflow import statistics
from gradflow._compilation import Float64Program
from gradflow._labels import Values, key_of, labelled, layers
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.theory import mean_field
from gradflow.training import parameters, records
from gradflow.training.loop import State
from gradflow.training.parameters import Weights

__all__ = ["Training"]

# A layer that has moved this many times its norm, in a network that is worse than guessing.
_MOVED = 10.0
# How long the theory of some hundred inputs takes for each layer, in seconds.
_SECONDS_A_LAYER = 0.05


class Training(eqx.Module):
    """What became of networks in training.

    Attributes
    ----------
    values
        By key, shape (networks, learning_rates, seeds, steps) and for layers' (…, layers).

        *Of layers, on the monitored inputs*: each statistic. Gradients are of each input's own
        cost, and weight gradients of the mean cost.

        *Of layers, in the step that follows*, all of a layer's matrices together:
        ``update_ratio``, ``log_batch_gradient_norm`` and, where gradients are clipped,
        ``log_clipped_gradient_norm``; and ``movement``, since the start.

        *Histograms*, where they were asked for: ``activation_histogram`` (…, layers, bins), the
        density of activations in equal bins between ``activation_low`` and ``activation_high``.

        *Of networks*: ``log_singular_values`` (…, k), where they were asked for; ``loss`` and
        ``error`` on the monitored inputs, ``validation_loss`` and ``validation_error`` where there
        were data for it.
    steps
        The recorded ones; 0 is before the first.
    first_nonfinite, nonfinite_layer
        Shape (networks, learning_rates, seeds): the first step whose batch had a cost that is not
        finite, and the layer, from 1, where that came from: the lowest whose signal left the
        float's range on its way up or, if weights were not finite, the highest whose gradient had
        left it on its way down in the step before. -1 where there is none.
    networks, learning_rates, seeds
        The grid.
    batch, samples, monitored, classes
        How many inputs a step, in all, and monitored; how many classes.
    state
        The networks after the last step, flattened to one axis; None unless it was asked for.
    saved
        The folder where the run was saved, if it was; whoever has no more use for it removes it.
    """

    values: dict[str, np.ndarray] = eqx.field(converter=Values)
    steps: np.ndarray
    first_nonfinite: np.ndarray
    nonfinite_layer: np.ndarray
    networks: tuple[Network, ...]
    learning_rates: np.ndarray
    monitor: np.ndarray
    state: State | None
    saved: Path | None = eqx.field(static=True)
    seeds: int = eqx.field(static=True)
    batch: int = eqx.field(static=True)
    samples: int = eqx.field(static=True)
    seconds: float = eqx.field(static=True)
    compile_seconds: float = eqx.field(static=True)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return what was recorded by its key or, in its own unit, by its name."""
        key = key_of(name, self.values.keys())
        value = self.values[key]
        return value if key == name else np.exp(value.astype(np.float64))

    def weights(self, network: int = 0, learning_rate: int = 0, seed: int = 0) -> Weights:
        """Return the weights after the last step of one network, by its place in the grid.

        Raises
        ------
        InputError
            If they were not kept.
        """
        if self.state is None:
            raise InputError("weights were not kept; train with keep_state=True")
        at = np.ravel_multi_index((network, learning_rate, seed), self.first_nonfinite.shape)
        found = jax.tree.map(lambda m: m[at], self.state.weights)
        return parameters.together(self.networks[network], found)

    @property
    def diverged(self) -> np.ndarray:
        """The first recorded step at which a network has diverged; -1 where it has not.

        That is: its loss is not finite, or some layer has moved 10 times its norm and the loss is
        above that of guessing, log(classes). Bounded units keep a network that explodes finite.
        """
        classes = self.networks[0].widths[-1]
        loss = self.values["loss"]
        with np.errstate(invalid="ignore"):
            far = np.any(self.values["movement"] > _MOVED, axis=-1) & (loss > math.log(classes))
        gone = far | ~np.isfinite(loss)
        return np.where(gone.any(axis=-1), self.steps[gone.argmax(axis=-1)], -1)

    @property
    def speed_spread(self) -> np.ndarray:
        """How differently fast layers learn: the largest ‖ΔW‖/‖W‖ of a layer over the smallest.

        Shape (networks, learning_rates, seeds, steps); infinite where some layer does not move, NaN
        where weights are not finite.
        """
        with_weights = [len(shapes) > 0 for shapes in self.networks[0].shapes]
        ratio = self.values["update_ratio"][..., with_weights].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return ratio.max(axis=-1) / ratio.min(axis=-1)

    def best_rate(self) -> np.ndarray:
        """Return the index of the best learning rate of each network, shape (networks,).

        That is the one with the least validation error at the last recorded step, on average over
        seeds, and of equal ones that with the least validation loss. In a network that has met what
        is not finite every class is wrong.

        Raises
        ------
        InputError
            If there were no validation data.
        """
        if "validation_error" not in self.values:
            raise InputError(
                "there is no best learning rate without validation data; train with "
                "validation=(inputs, labels)"
            )
        loss = self.values["validation_loss"][..., -1].astype(np.float64)
        finite = (self.first_nonfinite < 0) & np.isfinite(loss)
        error = np.where(finite, self.values["validation_error"][..., -1], 1.0)
        loss = np.where(finite, loss, np.inf)
        # By the last key first.
        return np.lexsort((loss.mean(axis=-1), error.mean(axis=-1)), axis=-1)[:, 0]

    def theory(self, network: int = 0) -> dict[str, np.ndarray]:
        """Return what theory says of one of the networks at step 0, by key, float64, (layers,).

        Of the mean over monitored inputs. A gradient's size is the cost's, and theory says how it
        changes from layer to layer: it has the measured mean at the top. What depends on pairs of
        inputs is NaN, and everything is where a network's signals do, as under BatchNorm.
        """
        found = _predicted(self.networks[network], self.monitor)
        at_start = {
            key: np.mean(self.values[key][network, :, :, 0, -1], dtype=np.float64)
            for key in ("log_gradient_variance", "log_gradient_norm")
            if key in self.values
        }
        for key, top in at_start.items():
            found[key] = found[key] - found[key][-1] + top
        return found

    def to_xarray(self) -> xarray.Dataset:
        """Return what was recorded, labelled, and theory at step 0 as ``<name>_theory``."""
        of_networks = ("network", "learning_rate", "seed")
        known = {s.key: s for s in records.RECORDED}
        found: dict[str, Any] = {}
        for key, value in self.values.items():
            dims = (*of_networks, "step", *records.axes(key))
            found[key] = (dims, value)
            if key in known and known[key].log:
                with np.errstate(over="ignore"):
                    found[known[key].name] = (dims, np.exp(value.astype(np.float64)))
        found |= {
            "first_nonfinite": (of_networks, self.first_nonfinite),
            "nonfinite_layer": (of_networks, self.nonfinite_layer),
            "diverged": (of_networks, self.diverged),
            "speed_spread": ((*of_networks, "step"), self.speed_spread),
        }
        theories = [self.theory(number) for number in range(len(self.networks))]
        for key in theories[0].keys() & self.values.keys():
            value = np.stack([theory[key] for theory in theories])
            found[f"{key}_theory"] = (("network", "layer"), value)
            if known[key].log:
                with np.errstate(over="ignore"):
                    found[f"{known[key].name}_theory"] = (("network", "layer"), np.exp(value))
        dataset = xarray.Dataset(
            found,
            coords={
                "network": [network.name for network in self.networks],
                "learning_rate": self.learning_rates,
                "seed": np.arange(self.seeds),
                "step": self.steps,
                "layer": layers(self.networks[0].depth),
            },
        )
        labels = {s.key: s.label for s in records.RECORDED if not s.log} | records.LABELS
        for name, label in labels.items():
            if name in dataset:
                dataset[name].attrs["long_name"] = label
        return labelled(dataset).assign_attrs(
            widths=list(self.networks[0].widths),
            batch=self.batch,
            samples=self.samples,
            monitored=len(self.monitor),
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
            jax=jax.__version__,
            device=jax.devices()[0].device_kind,
        )


def _predicted(network: Network, monitor: np.ndarray) -> dict[str, np.ndarray]:
    """Return theory's mean over inputs, each by itself, in float64."""
    known = {s.key: s for s in statistics.ALL}
    if network.mixes_sites:
        return {key: np.full(network.depth, np.nan) for key in known}
    unnamed = dataclasses.replace(network, name="")
    q = np.mean(np.square(monitor.astype(np.float64)), axis=1)
    arguments = (unnamed, q)
    found = Float64Program.of(_of_each, arguments, _SECONDS_A_LAYER * network.depth)(*arguments)
    pairs = ("correlation", "log_weight_gradient_variance")
    values = {}
    for key in known:
        if key in pairs or key not in found:
            values[key] = np.full(network.depth, np.nan)
        elif known[key].log:
            values[key] = np.logaddexp.reduce(found[key], axis=0) - math.log(len(q))
        else:
            values[key] = found[key].mean(axis=0)
    return values


def _of_each(network: Network, q: Float[Array, " sites"]) -> dict[str, Any]:
    """Return what theory predicts for inputs of these mean squares, each by itself."""
    return jax.vmap(lambda q: mean_field.predict(network, q.reshape(1, 1)).values)(q)
