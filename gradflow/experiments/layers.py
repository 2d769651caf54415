"""The study note's story in training: which layers of which networks learn.

Of a step of gradient descent, theory gives the relative size in every layer. With
∂C/∂W^l = δ^l (h^{l-1})ᵀ of one input, and ‖W^l‖² = n_l σ_l²,

    ‖ΔW^l‖² / ‖W^l‖² ∝ n_{l-1} E[(δ^l)²] E[(h^{l-1})²] / σ_l²,

where E[(δ^l)²] falls by χ a layer and E[(h^{l-1})²] = q^l/σ_l². Several inputs add up to more where
their gradients are alike, by the same factor in every layer as long as all inputs are alike there.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from gradflow import builders, ensembles, training
from gradflow.data import Dataset
from gradflow.experiments import base
from gradflow.experiments.base import Experiment, Progress, Table
from gradflow.figures import learning

__all__ = ["EXPERIMENT", "OF_THE_NOTE", "run"]

# The note's networks.
OF_THE_NOTE = (
    ("logistic", "unscaled"),
    ("logistic", "glorot"),
    ("logistic", "standard"),
    ("tanh", "unscaled"),
    ("tanh", "glorot"),
    ("relu", "he"),
)
# Steps to record, ever further apart.
_RECORDS = 25
# How near a movement is to be to theory to be called predicted.
_NEAR = 3.0
# A change of a float32 by less than this, relative to it, is rounded away or up.
_ROUNDING = 2.0**-24


def run(
    *,
    activation: str | None = None,
    weights: str | None = None,
    data: Dataset | str = "digits",
    width: int = 100,
    depth: int = 10,
    steps: int = 5000,
    batch: int = 10,
    learning_rates: Sequence[float] = (0.1,),
    optimiser: str = "sgd",
    clip: str | None = None,
    noise: float = 0.0,
    networks: int = 4,
    seed: int = 0,
    save: Path | None = None,
    progress: Progress | None = None,
) -> xarray.Dataset:
    """Show how far each layer of the study note's networks moves, beside its gradient by theory.

    Parameters
    ----------
    activation, weights
        Of one kind of networks, by name; those of the note without them.
    data
        A dataset or its name; standardised by pixel.
    width, depth
        Units a hidden layer, and hidden layers.
    steps, batch
        How many updates, each of so many images.
    learning_rates
        Those to try; each kind has the one that is best on validation data.
    optimiser
        One of `training.OPTIMISERS`.
    clip
        How gradients are clipped, as ``global-norm:1``: one of `training.CLIPPINGS` and a
        threshold; not at all without it.
    noise
        Variance of noise in gradients at first; it decays.
    networks
        How many random networks of each kind.
    seed
        Of everything that is random.
    save
        A folder for what it takes to go on after an interruption; not saved without it.
    progress
        Called with (kind, updates done, updates in all).

    Returns
    -------
    xarray.Dataset
        What `training.Training.to_xarray` has, over (network, seed, step, layer); and
        ``speed_theory``, over (network, layer).
    """
    rule = training.optimiser(optimiser)
    if noise:
        rule = training.with_noise(rule, noise)
    held = None if clip is None else training.clipping(clip)
    parts = base.divided(data, seed).standardised()
    widths = base.shape(parts, width, depth)
    chosen: tuple[tuple[str, str], ...] = OF_THE_NOTE
    if activation is not None or weights is not None:
        chosen = ((activation or "tanh", weights or "glorot"),)
    laws = [builders.mlp(widths, *kind) for kind in chosen]
    found = base.train_each(
        {law.name: law for law in laws},
        parts,
        networks=networks,
        seed=seed,
        save=save,
        progress=progress,
        steps=steps,
        batch=batch,
        learning_rates=learning_rates,
        record=base.spread_steps(steps, _RECORDS),
        optimiser=rule,
        clip=held,
    )
    sigma = np.array(
        [
            [ensembles.get(weights).sigma_w(n, m) for n, m in zip(widths, widths[1:], strict=False)]
            for _, weights in chosen
        ]
    )
    log_square = found.log_gradient_variance_theory + found.log_q_theory
    log_square = log_square + np.log(widths[:-1]) - 4 * np.log(sigma)
    found["speed_theory"] = np.exp((log_square - log_square.sel(layer=depth)) / 2).assign_attrs(
        long_name="‖ΔW‖/‖W‖ of a step by theory, relative to the last hidden layer's"
    )
    return found.assign_attrs(optimiser=optimiser, clip=clip or "none", noise=noise)


def table(dataset: xarray.Dataset) -> Table:
    """Return, for each kind of networks, its gradient, its layers' movement, and its error."""
    hidden = dataset.sizes["layer"] - 1
    rows = []
    for name in dataset.network.values:
        one = dataset.sel(network=name)
        end = one.isel(step=-1)
        moved = base.geometric_mean(end.movement)
        row: dict[str, Any] = {"network": str(name), "rate": float(one.learning_rate)}
        log_start = one.log_gradient_variance.isel(step=0).mean("seed")
        for column, v in (
            ("gradient", log_start.values),
            ("theory", one.log_gradient_variance_theory.values),
        ):
            # Of one layer there is nothing to compare.
            row[column] = math.exp((v[0] - v[-2]) / 2)
        for layer in sorted({1, (hidden + 1) // 2, hidden, hidden + 1}):
            row[f"moved, layer {layer}"] = float(moved.sel(layer=layer))
        for column, value in (
            ("error, %", end.error.mean()),
            ("least", end.error.min()),
            ("most", end.error.max()),
        ):
            row[column] = 100 * float(value)
        row["diverged"] = int((one.diverged >= 0).sum())
        rows.append(row)
    return Table(
        f"{hidden} {base.recipe(dataset)}, {_steps_in_words(dataset.attrs)}",
        rows,
        (
            "gradient  r.m.s. ∂C/∂z of layer 1 over that of the last hidden layer, before training",
            "moved     ‖W - W₀‖/‖W₀‖ at the end, geometric mean over networks that are finite",
            f"error     of {dataset.attrs['monitored']} images of the test set: mean, least, most",
            "diverged  networks whose loss is not finite, or above guessing with a layer moved 10 "
            "times its norm",
        ),
    )


def _steps_in_words(attrs: dict[Any, Any]) -> str:
    clipped = "" if attrs["clip"] == "none" else f", clipped by {attrs['clip']}"
    return f"{attrs['optimiser']}{clipped}" + (
        f", noise {attrs['noise']:g}" if attrs["noise"] else ""
    )


def findings(dataset: xarray.Dataset) -> list[str]:
    """Return what each kind of networks does, and how near theory at step 0 is to it."""
    hidden = dataset.sizes["layer"] - 1
    found = []
    for name in dataset.network.values:
        one = dataset.sel(network=name)
        end = one.isel(step=-1)
        diverged = int((one.diverged >= 0).sum())
        moved = base.geometric_mean(end.movement).sel(layer=slice(1, hidden))
        low, high = int(moved.idxmin()), int(moved.idxmax())
        found.append(
            f"{name}: of the hidden layers, layer {low} moves least, {float(moved.min()):.2g} of "
            f"its norm, and layer {high} most, {float(moved.max()):.2g}; error "
            f"{base.percent(end.error)}"
            + (f"; {diverged} of {one.sizes['seed']} networks diverge" if diverged else "")
        )
        plain = dataset.attrs["optimiser"] == "sgd" and dataset.attrs["clip"] == "none"
        if plain and np.isfinite(one.speed_theory).all():
            found.append(_beside_theory(str(name), one))
    return found


def _beside_theory(name: str, one: xarray.Dataset) -> str:
    """Return how near the layers' first update and last movement are to theory."""
    hidden = slice(1, one.sizes["layer"] - 1)
    theory = one.speed_theory.sel(layer=hidden)
    ratios = []
    for what in (one.update_ratio.isel(step=0), one.movement.isel(step=-1)):
        mean = base.geometric_mean(what).sel(layer=hidden)
        ratios.append(mean / mean.isel(layer=-1) / theory)
    first, last = ratios
    away = float(np.exp(np.abs(np.log(first)).max()))
    far = np.abs(np.log(last)) > math.log(_NEAR)
    near, beyond = (last.layer.values[mask.values] for mask in (~far, far))
    sentence = (
        f"{name}: the first update's relative size, layer by layer against the last hidden "
        f"layer's, is within a factor {away:.2g} of theory; the movement at the end is within a "
        f"factor {_NEAR:g} of it in {base.ranges(near)}"
    )
    if beyond.size:
        factors = ", ".join(f"{float(last.sel(layer=layer)):.2g}" for layer in beyond)
        sentence += f" and not in {base.ranges(beyond)} (×{factors})"
    update = base.geometric_mean(one.update_ratio.isel(step=0))
    rounded = update.layer.values[(update < _ROUNDING).values]
    if rounded.size:
        sentence += (
            f"; in {base.ranges(rounded)} an update is less than float32 resolves, "
            "so that its weights move by rounding or not at all"
        )
    return sentence


EXPERIMENT = Experiment("layers", run, table, findings, learning)
