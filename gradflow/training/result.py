"""The result of training: what was recorded along the way, labelled, with theory beside it."""

import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import xarray
from jaxtyping import Array, Float

from gradflow import statistics
from gradflow._labels import Values, key_of, labelled, layers
from gradflow._programs import Float64Program
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.theory import mean_field
from gradflow.training import _parameters, _records
from gradflow.training._execution import Grid, Trained
from gradflow.training._loop import Settings, Shared, State
from gradflow.training._parameters import Weights

__all__ = ["Training"]

# A layer that has moved this many times its norm, in a network that is worse than guessing.
_MOVED = 10.0
# How long the theory of some hundred inputs takes for each layer, in seconds.
_SECONDS_A_LAYER = 0.05


class Training(eqx.Module):
    """The result of training many networks.

    Attributes
    ----------
    values
        By key, shape (networks, learning_rates, seeds, steps) and for layers' (…, layers).

        *Of layers, on the monitored inputs*: each statistic. Gradients are of each input's own
        cost, and weight gradients of the mean cost.

        *Of layers, in the step that follows*, all of a layer's matrices together:
        ``update_ratio``, ``log_batch_gradient_norm`` and, where gradients are clipped,
        ``log_clipped_gradient_norm``; and ``movement``, since the start.

        *Histograms*, where requested: ``activation_histogram`` (…, layers, bins), the
        density of activations in equal bins between ``activation_low`` and ``activation_high``.

        *Of networks*: ``log_singular_values`` (…, k), where requested; ``loss`` and
        ``error`` on the monitored inputs, ``validation_loss`` and ``validation_error`` where there
        were data for it.
    steps
        The recorded ones; 0 is before the first.
    first_nonfinite, nonfinite_layer
        Shape (networks, learning_rates, seeds): the first step whose batch had a cost that is not
        finite, and the layer, from 1, of its origin: the lowest whose signal left the float's range
        in the forward pass or, if weights were not finite, the highest whose gradient left it in
        the backward pass of the step before. -1 where there is none.
    networks, learning_rates, seeds
        The grid.
    batch, samples, monitored, classes
        Numbers of inputs, each step, in all, and monitored; number of classes.
    state
        The networks after the last step, flattened to one axis; None unless requested.
    saved
        The folder where the run was saved, if it was; it stays until somebody removes it.
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

    @classmethod
    def of(
        cls,
        grid: Grid,
        shared: Shared,
        settings: Settings,
        steps: np.ndarray,
        trained: Trained,
        keep_state: bool,
    ) -> "Training":
        """The result of training a grid of networks, with axes of its laws, rates and seeds."""
        last = trained.state
        return cls(
            values={k: v.reshape(*grid.shape, *v.shape[1:]) for k, v in trained.values.items()},
            steps=steps,
            first_nonfinite=np.asarray(last.first_nonfinite).reshape(grid.shape),
            nonfinite_layer=np.asarray(last.nonfinite_layer).reshape(grid.shape),
            networks=grid.laws,
            learning_rates=grid.rates,
            monitor=np.asarray(shared.monitor.inputs),
            state=last if keep_state else None,
            saved=trained.saved,
            seeds=grid.seeds,
            batch=settings.batch,
            samples=len(shared.data.labels),
            seconds=trained.seconds,
            compile_seconds=trained.compile_seconds,
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """A record by its key or, in its own unit, by its name."""
        key = key_of(name, self.values.keys())
        value = self.values[key]
        return value if key == name else np.exp(value.astype(np.float64))

    def weights(self, network: int = 0, learning_rate: int = 0, seed: int = 0) -> Weights:
        """The weights of one network of the grid after the last step.

        Raises
        ------
        InputError
            If they were not kept.
        """
        if self.state is None:
            raise InputError("weights were not kept; train with keep_state=True")
        at = np.ravel_multi_index((network, learning_rate, seed), self.first_nonfinite.shape)
        weights = jax.tree.map(lambda m: m[at], self.state.weights)
        return _parameters.together(self.networks[network], weights)

    @property
    def diverged(self) -> np.ndarray:
        """The first recorded step at which a network has diverged; -1 where it has not.

        A network has diverged when its loss is not finite, or when some layer has moved 10 times
        its norm and the loss is above that of guessing, log(classes): with bounded units an
        exploding network stays finite. Shape (networks, learning_rates, seeds).
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
        """The index of the best learning rate of each network, shape (networks,).

        The best one has the least validation error at the last recorded step, on average over
        seeds, and of equal errors the least validation loss. A network with numbers that are not
        finite counts as wrong on every sample.

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
        """Theory's predictions for one of the networks at step 0, by key, float64, (layers,).

        They are of the mean over monitored inputs. Theory gives the ratio of gradients from layer
        to layer; at the top they have the measured mean, which depends on the cost. Quantities of
        pairs of inputs are NaN, and all are NaN where signals depend on other inputs, as under
        BatchNorm.
        """
        predicted = _predicted(self.networks[network], self.monitor)
        at_start = {
            key: np.mean(self.values[key][network, :, :, 0, -1], dtype=np.float64)
            for key in ("log_gradient_variance", "log_gradient_norm")
            if key in self.values
        }
        for key, top in at_start.items():
            predicted[key] = predicted[key] - predicted[key][-1] + top
        return predicted

    def to_xarray(self) -> xarray.Dataset:
        """All records, labelled, and theory at step 0 as ``<name>_theory``."""
        of_networks = ("network", "learning_rate", "seed")
        known = {s.key: s for s in _records.RECORDED}
        variables: dict[str, Any] = {}
        for key, value in self.values.items():
            dims = (*of_networks, "step", *_records.axes(key))
            variables[key] = (dims, value)
            if key in known and known[key].log:
                with np.errstate(over="ignore"):
                    variables[known[key].name] = (dims, np.exp(value.astype(np.float64)))
        variables |= {
            "first_nonfinite": (of_networks, self.first_nonfinite),
            "nonfinite_layer": (of_networks, self.nonfinite_layer),
            "diverged": (of_networks, self.diverged),
            "speed_spread": ((*of_networks, "step"), self.speed_spread),
        }
        theories = [self.theory(number) for number in range(len(self.networks))]
        for key in theories[0].keys() & self.values.keys():
            value = np.stack([theory[key] for theory in theories])
            variables[f"{key}_theory"] = (("network", "layer"), value)
            if known[key].log:
                with np.errstate(over="ignore"):
                    variables[f"{known[key].name}_theory"] = (("network", "layer"), np.exp(value))
        dataset = xarray.Dataset(
            variables,
            coords={
                "network": [network.name for network in self.networks],
                "learning_rate": self.learning_rates,
                "seed": np.arange(self.seeds),
                "step": self.steps,
                "layer": layers(self.networks[0].depth),
            },
        )
        labels = {s.key: s.label for s in _records.RECORDED if not s.log} | _records.LABELS
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
    """Theory's mean over inputs, each by itself, in float64."""
    known = {s.key: s for s in statistics.ALL}
    if network.mixes_sites:
        return {key: np.full(network.depth, np.nan) for key in known}
    unnamed = network.unnamed()
    q = np.mean(np.square(monitor.astype(np.float64)), axis=1)
    arguments = (unnamed, q)
    of_each = Float64Program(_of_each, arguments, _SECONDS_A_LAYER * network.depth)(*arguments)
    pairs = ("correlation", "log_weight_gradient_variance")
    values = {}
    for key in known:
        if key in pairs or key not in of_each:
            values[key] = np.full(network.depth, np.nan)
        elif known[key].log:
            values[key] = np.logaddexp.reduce(of_each[key], axis=0) - math.log(len(q))
        else:
            values[key] = of_each[key].mean(axis=0)
    return values


def _of_each(network: Network, q: Float[Array, " sites"]) -> dict[str, Any]:
    """Theory's predictions for inputs of these mean squares, each by itself."""
    return jax.vmap(lambda q: mean_field.predict(network, q.reshape(1, 1)).values)(q)
