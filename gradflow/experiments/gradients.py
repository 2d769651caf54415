"""Figure 9 of Glorot & Bengio 2010: weight gradients of the layers drift apart, or stay together.

At the start they are alike in all layers, with standard weights (small alike) and with normalised
ones (equation 14; figure 8). What becomes of that in training is not theory.
"""

from typing import Any

import numpy as np
import xarray

from gradflow import statistics
from gradflow.experiments import _glorot_2010, _wording
from gradflow.experiments._glorot_2010 import networks_and_data
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import weight_gradients_in_training
from gradflow.training import Recording

_KINDS = ("tanh", "tanh N")
_RECORDS = 40


def _train(recipe: Recipe) -> xarray.Dataset:
    """Show weight gradients by layer in training, standard and normalised: figure 9 of 2010.

    Returns
    -------
    xarray.Dataset
        ``weight_gradient_variance`` and its logarithm, of the mean cost of the monitored images,
        and gradients' norm, over (network, seed, step, layer).
    """
    networks, parts = networks_and_data(recipe, _KINDS)
    wanted = (
        statistics.q,
        statistics.weight_gradient_variance,
        statistics.log_gradient_norm,
        statistics.gradient_variance,
    )
    record = Recording(recipe.even_steps(_RECORDS), wanted=wanted)
    return recipe.train(networks, parts, record=record)


def _spread(dataset: xarray.Dataset) -> xarray.DataArray:
    """The ratio of the largest s.d. of a hidden layer's weight gradients to the smallest."""
    hidden = dataset.log_weight_gradient_variance.sel(layer=slice(2, dataset.sizes["layer"] - 1))
    return np.exp((hidden.max("layer") - hidden.min("layer")) / 2)


def _table(dataset: xarray.Dataset) -> Table:
    """The layers' weight gradients and their spread, at three steps of training."""
    rows = []
    hidden = dataset.sizes["layer"] - 1
    for name in dataset.network.values:
        one = dataset.sel(network=name)
        for step in (0, *one.step.values[[len(one.step) // 2, -1]]):
            at = one.sel(step=step)
            deviation = np.exp(at.log_weight_gradient_variance.mean("seed") / 2)
            row: dict[str, Any] = {"network": str(name), "step": int(step)}
            row |= {
                f"s.d. of ∂C/∂W, layer {k}": float(deviation.sel(layer=k))
                for k in range(1, hidden + 1)
            }
            row["largest over smallest, layers 2 to last"] = float(_spread(at).mean("seed"))
            row["error, %"] = 100 * float(at.error.mean())
            rows.append(row)
    return Table(
        f"{hidden} {_wording.sizes(dataset)}, learning rate {float(dataset.learning_rate[0]):g}",
        rows,
        (
            "s.d.      over a layer's weights, of the mean cost; geometric mean over networks",
            "N         normalised initialisation; without it, U[±1/√n]",
        ),
    )


def _findings(dataset: xarray.Dataset) -> list[str]:
    """The spread of the layers' gradients at the start, at its largest, and at the end."""
    sentences = []
    log = dataset.log_weight_gradient_variance
    hidden = log.sel(layer=slice(2, dataset.sizes["layer"] - 1))
    for name in dataset.network.values:
        spread = _spread(dataset.sel(network=name))
        most = spread.mean("seed")
        sentences.append(
            f"{name}: s.d. of weight gradients, largest over smallest of hidden layers 2 to last: "
            f"{float(spread.isel(step=0).mean()):.2g} at the start, at most "
            f"{float(most.max()):.2g} (step {int(most.idxmax())}), "
            f"{float(spread.isel(step=-1).mean()):.2g} ± {float(spread.isel(step=-1).std()):.1g} "
            "at the end (± s.d. over networks)"
        )
    first, second = (str(name) for name in dataset.network.values)
    start = hidden.isel(step=0).mean(("seed", "layer"))
    factor = float(np.exp((start.sel(network=second) - start.sel(network=first)) / 2))
    sentences.append(f"at the start {second}'s weight gradients are {factor:.2g} times {first}'s")
    apart = (_spread(dataset).isel(step=slice(1, None))).mean(("seed", "step"))
    wider = first if float(apart.sel(network=first)) > float(apart.sel(network=second)) else second
    sentences.append(
        f"along training the layers of {wider} are further apart: on average ×"
        f"{float(apart.max()):.2g} against ×{float(apart.min()):.2g}"
    )
    return sentences


EXPERIMENT = Experiment(
    "gradients",
    _glorot_2010.RECIPE,
    _train,
    _table,
    _findings,
    weight_gradients_in_training,
)
