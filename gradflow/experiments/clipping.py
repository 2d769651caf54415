"""Gradient clipping, where it helps and where it does not (Pascanu, Mikolov & Bengio 2013).

Clipping by the global norm multiplies the gradient of all layers by one number. It bounds a step,
so that a rare gradient that is far too large cannot throw weights away, as in a recurrent network.
It leaves as it was how much larger the gradient of one layer is than that of another: where they
explode with depth, steps that were small already become smaller.
"""

from typing import Annotated, Any

import numpy as np
import optax
import xarray

from gradflow import activations, builders, training
from gradflow._checks import check_count, check_scale
from gradflow.blocks import Dense, Linear
from gradflow.experiments import _wording
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import clipping as figure
from gradflow.networks import Network, Stage
from gradflow.training import Recording, Training

_RECORDS = 100
_RECURRENT, _DEEP = "recurrent", "tanh, N(0,1)"
# A step whose gradient is so many times as long as the typical one.
_SPIKE = 10.0


def _train(
    recipe: Recipe,
    *,
    times: Annotated[int, "Time steps of the recurrent network."] = 20,
    threshold: Annotated[float, "The norm that no gradient is to exceed."] = 1.0,
) -> xarray.Dataset:
    """Clip gradients by their global norm: of a recurrent network, and of an exploding deep one.

    The recurrent network is tanh with weights of variance 1/width; the deep one, of the recipe's
    depth, tanh with N(0, 1) weights. Data are standardised by pixel.

    Returns
    -------
    xarray.Dataset
        ``error`` and ``validation_error`` at the end, over (network, clipped, learning_rate, seed);
        along training, over (…, step): ``gradient_norm`` of all layers together, and
        ``disparity``, the largest over the smallest of the hidden layers' norms, and both after
        clipping, ``clipped_norm`` and ``clipped_disparity``.
    """
    check_scale("threshold", threshold, positive=True)
    check_count("networks", recipe.networks)
    parts = recipe.split().standardised()
    widths = recipe.widths(parts)
    networks = {
        _RECURRENT: _recurrent(widths, check_count("times", times)),
        _DEEP: builders.mlp(widths, "tanh", "unscaled"),
    }
    described, seconds = [], 0.0
    for name, network in networks.items():
        for clipped in (False, True):
            result = training.train(
                network,
                parts.train.inputs,
                parts.train.labels,
                steps=recipe.steps,
                batch=recipe.batch,
                learning_rate=recipe.learning_rates,
                seeds=recipe.networks,
                key=recipe.seed,
                clip=optax.clip_by_global_norm(threshold) if clipped else None,
                validation=(parts.validation.inputs, parts.validation.labels),
                record=Recording(
                    recipe.even_steps(_RECORDS), (parts.test.inputs, parts.test.labels), ()
                ),
                save=recipe.save,
                progress=recipe.progress_of(f"{name}, clipped" if clipped else name),
            )
            one = _described(result, network)
            described.append(one.expand_dims(network=[name], clipped=[clipped]))
            seconds += result.seconds
    together: Any = xarray.combine_by_coords(described)
    return together.assign_attrs(
        threshold=threshold,
        times=times,
        depth=recipe.depth,
        width=recipe.width,
        classes=parts.train.classes,
        batch=recipe.batch,
        steps=recipe.steps,
        seed=recipe.seed,
        seconds=seconds,
    )


def _recurrent(widths: tuple[int, ...], times: int) -> Network:
    """The network z^0 = U x, z^t = W φ(z^{t-1}) for t = 1…times, with logits V φ(z^times)."""
    width = widths[1]
    step = Dense(activations.tanh, width)
    return builders.stack(
        widths[0],
        [Linear(width), Stage(step, times, tied=True), Dense(activations.tanh, widths[-1])],
        name=_RECURRENT,
    )


def _described(result: Training, law: Network) -> xarray.Dataset:
    """Errors over (learning_rate, seed), and gradient norms over (learning_rate, seed, step)."""
    # Layers of one stage that share their weights have one gradient: it counts once.
    firsts: list[int] = []
    layer = 0
    for stage in law.stages:
        firsts += [layer] if stage.tied else range(layer, layer + stage.repeats)
        layer += stage.repeats
    values: dict[str, Any] = {
        name: (("learning_rate", "seed"), result[name][0, :, :, -1])
        for name in ("error", "validation_error")
    }
    along = ("learning_rate", "seed", "step")
    for kind, norm, disparity in (
        ("log_batch_gradient_norm", "gradient_norm", "disparity"),
        ("log_clipped_gradient_norm", "clipped_norm", "clipped_disparity"),
    ):
        # Without clipping, both are the same.
        logs = result.values.get(kind, result.values["log_batch_gradient_norm"])
        log = logs[0][..., firsts].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            values[norm] = along, np.exp(np.logaddexp.reduce(2 * log, axis=-1) / 2)
            hidden = log[..., :-1]
            values[disparity] = along, np.exp(hidden.max(axis=-1) - hidden.min(axis=-1))
    return xarray.Dataset(
        values,
        coords={
            "learning_rate": result.learning_rates,
            "seed": np.arange(result.seeds),
            "step": result.steps,
        },
    )


def _table(dataset: xarray.Dataset) -> Table:
    """Errors by learning rate, with clipping and without."""
    rows = []
    for name in dataset.network.values:
        for clipped in (False, True):
            one = dataset.sel(network=name, clipped=clipped)
            row: dict[str, Any] = {"network": str(name), "clipped": "yes" if clipped else "no"}
            for rate in dataset.learning_rate.values:
                row[f"error, %, rate {rate:g}"] = 100 * float(
                    one.error.sel(learning_rate=rate).mean()
                )
            row["gradient norm, median"] = float(one.gradient_norm.median())
            row["largest"] = float(one.gradient_norm.max())
            row["disparity, median"] = float(one.clipped_disparity.median())
            rows.append(row)
    attrs = dataset.attrs
    return Table(
        f"{attrs['times']} time steps, and {attrs['depth']} {_wording.sizes(dataset)}, clipped to "
        f"a norm of {attrs['threshold']:g}",
        rows,
        (
            "norm       ‖∂C/∂W‖ of all layers, before clipping, at all rates and recorded steps",
            "disparity  largest over smallest ‖∂C/∂W‖ of hidden layers, after clipping",
        ),
    )


def _findings(dataset: xarray.Dataset) -> list[str]:
    """The effect of clipping on errors, on the largest gradients, and on differences of layers."""
    sentences = []
    for name in dataset.network.values:
        both = [dataset.sel(network=name, clipped=clipped) for clipped in (False, True)]
        free, clipped = both
        mean = [one.error.mean("seed") for one in both]
        helped = mean[0] - mean[1]
        rate = float(helped.idxmax())
        verb = "helps most" if float(helped.max()) > 0 else "helps nowhere, and does least harm"
        best = [100 * float(m.sel(learning_rate=_best(d))) for m, d in zip(mean, both, strict=True)]
        sentences.append(
            f"{name}: clipping {verb} at a learning rate of {rate:g}, from an error of "
            f"{_wording.percent(free.error.sel(learning_rate=rate))} to "
            f"{_wording.percent(clipped.error.sel(learning_rate=rate))}; at the best rate of each "
            f"it is {best[0]:.1f} % ({_best(free):g}) and {best[1]:.1f} % ({_best(clipped):g})"
        )
        norm = free.gradient_norm.sel(learning_rate=rate)
        typical = norm.median("step")
        largest = float((norm / typical).max())
        changed = float((clipped.gradient_norm > dataset.attrs["threshold"]).mean())
        spikes = float((norm > _SPIKE * typical).mean())
        sentences.append(
            f"{name}: without clipping, at that rate, {100 * spikes:.1f} % of gradients are more "
            f"than {_SPIKE:g} times the typical one, the largest {largest:.3g}"
            f" times; with it, {100 * changed:.0f} % of steps are clipped"
        )
        sentences.append(
            f"{name}: the largest gradient of a hidden layer is "
            f"{float(clipped.disparity.median()):.3g} times the smallest before clipping, and "
            f"{float(clipped.clipped_disparity.median()):.3g} times after it (median)"
        )
    return sentences


def _best(one: xarray.Dataset) -> float:
    """The learning rate that is best on validation data."""
    return float(one.validation_error.mean("seed").idxmin())


EXPERIMENT = Experiment(
    "clipping",
    Recipe(width=64, depth=10, steps=1000, batch=20, learning_rate=(0.01, 0.03, 0.1, 0.3, 1.0)),
    _train,
    _table,
    _findings,
    figure,
)
