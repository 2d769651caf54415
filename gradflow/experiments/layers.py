"""The study note's story in training: which layers learn, in which networks.

Of a step of gradient descent, theory gives the relative size in every layer. With
∂C/∂W^l = δ^l (h^{l-1})ᵀ of one input, and ‖W^l‖² = n_l σ_l²,

    ‖ΔW^l‖² / ‖W^l‖² ∝ n_{l-1} E[(δ^l)²] E[(h^{l-1})²] / σ_l²,

where E[(δ^l)²] falls by χ a layer and E[(h^{l-1})²] = q^l/σ_l². Several inputs add up to more where
their gradients are alike, by the same factor in every layer as long as all inputs are alike there.
"""

import math
from typing import Annotated, Any

import numpy as np
import xarray

from gradflow import builders, ensembles, training
from gradflow.experiments import _wording
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import learning
from gradflow.training import Recording

# The note's networks.
_OF_THE_NOTE = (
    ("logistic", "unscaled"),
    ("logistic", "glorot"),
    ("logistic", "standard"),
    ("tanh", "unscaled"),
    ("tanh", "glorot"),
    ("relu", "he"),
)
# Steps to record, ever further apart.
_RECORDS = 25
# The largest factor between a movement and theory that counts as agreement.
_NEAR = 3.0
# A relative change of a float32 by less than this is lost to rounding.
_ROUNDING = 2.0**-24


def _train(
    recipe: Recipe,
    *,
    activation: Annotated[str | None, "φ, by name."] = None,
    weights: Annotated[str | None, "The weights' ensemble, by name."] = None,
    optimiser: Annotated[str, "The optimiser: sgd, momentum, adam, …"] = "sgd",
    clip: Annotated[str | None, "Gradient clipping and its threshold, as global-norm:1."] = None,
    noise: Annotated[float, "Variance of noise in gradients at first; it decays."] = 0.0,
) -> xarray.Dataset:
    """Show how far each layer of the study note's networks moves, beside its gradient by theory.

    Data are standardised by pixel. With an activation or weights there is one kind of networks, in
    place of the note's. Optimisers are `training.OPTIMISERS`, clippings `training.CLIPPINGS`.

    Returns
    -------
    xarray.Dataset
        What `training.Training.to_xarray` has, over (network, seed, step, layer); and
        ``speed_theory``, over (network, layer).
    """
    rule = training.optimiser(optimiser)
    if noise:
        rule = training.with_noise(rule, noise)
    clipping = None if clip is None else training.clipping(clip)
    parts = recipe.split().standardised()
    widths = recipe.widths(parts)
    kinds: tuple[tuple[str, str], ...] = _OF_THE_NOTE
    if activation is not None or weights is not None:
        kinds = ((activation or "tanh", weights or "glorot"),)
    laws = [builders.mlp(widths, *kind) for kind in kinds]
    dataset = recipe.train(
        {law.name: law for law in laws},
        parts,
        record=Recording(recipe.spreading_steps(_RECORDS)),
        optimiser=rule,
        clip=clipping,
    )
    sigma = np.array(
        [
            [ensembles.get(weights).sigma_w(n, m) for n, m in zip(widths, widths[1:], strict=False)]
            for _, weights in kinds
        ]
    )
    log_square = dataset.log_gradient_variance_theory + dataset.log_q_theory
    log_square = log_square + np.log(widths[:-1]) - 4 * np.log(sigma)
    of_last = log_square.sel(layer=recipe.depth)
    dataset["speed_theory"] = np.exp((log_square - of_last) / 2).assign_attrs(
        long_name="‖ΔW‖/‖W‖ of a step by theory, relative to the last hidden layer's"
    )
    return dataset.assign_attrs(optimiser=optimiser, clip=clip or "none", noise=noise)


def _table(dataset: xarray.Dataset) -> Table:
    """The gradient, the movement of layers, and the error of each kind of networks."""
    hidden = dataset.sizes["layer"] - 1
    rows = []
    for name in dataset.network.values:
        one = dataset.sel(network=name)
        end = one.isel(step=-1)
        moved = _wording.geometric_mean(end.movement)
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
        row |= _wording.error_columns(end.error)
        row["diverged"] = int((one.diverged >= 0).sum())
        rows.append(row)
    return Table(
        f"{hidden} {_wording.sizes(dataset)}, {_steps_in_words(dataset.attrs)}",
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


def _findings(dataset: xarray.Dataset) -> list[str]:
    """The movement of layers of each kind of networks, and its distance from theory at step 0."""
    hidden = dataset.sizes["layer"] - 1
    sentences = []
    for name in dataset.network.values:
        one = dataset.sel(network=name)
        end = one.isel(step=-1)
        diverged = int((one.diverged >= 0).sum())
        moved = _wording.geometric_mean(end.movement).sel(layer=slice(1, hidden))
        low, high = int(moved.idxmin()), int(moved.idxmax())
        sentences.append(
            f"{name}: of the hidden layers, layer {low} moves least, {float(moved.min()):.2g} of "
            f"its norm, and layer {high} most, {float(moved.max()):.2g}; error "
            f"{_wording.percent(end.error)}"
            + (f"; {diverged} of {one.sizes['seed']} networks diverge" if diverged else "")
        )
        plain = dataset.attrs["optimiser"] == "sgd" and dataset.attrs["clip"] == "none"
        if plain and np.isfinite(one.speed_theory).all():
            sentences.append(_beside_theory(str(name), one))
    return sentences


def _beside_theory(name: str, one: xarray.Dataset) -> str:
    """The distance of the layers' first update and last movement from theory."""
    hidden = slice(1, one.sizes["layer"] - 1)
    theory = one.speed_theory.sel(layer=hidden)
    ratios = []
    for what in (one.update_ratio.isel(step=0), one.movement.isel(step=-1)):
        mean = _wording.geometric_mean(what).sel(layer=hidden)
        ratios.append(mean / mean.isel(layer=-1) / theory)
    first, last = ratios
    away = float(np.exp(np.abs(np.log(first)).max()))
    far = np.abs(np.log(last)) > math.log(_NEAR)
    near, beyond = (last.layer.values[mask.values] for mask in (~far, far))
    sentence = (
        f"{name}: the first update's relative size, layer by layer against the last hidden "
        f"layer's, is within a factor {away:.2g} of theory; the movement at the end is within a "
        f"factor {_NEAR:g} of it in {_wording.ranges(near)}"
    )
    if beyond.size:
        factors = ", ".join(f"{float(last.sel(layer=layer)):.2g}" for layer in beyond)
        sentence += f" and not in {_wording.ranges(beyond)} (×{factors})"
    update = _wording.geometric_mean(one.update_ratio.isel(step=0))
    rounded = update.layer.values[(update < _ROUNDING).values]
    if rounded.size:
        sentence += (
            f"; in {_wording.ranges(rounded)} an update is less than float32 resolves, "
            "so that its weights move by rounding or not at all"
        )
    return sentence


EXPERIMENT = Experiment(
    "layers",
    Recipe(width=100, depth=10, steps=5000, batch=10, learning_rate=(0.1,)),
    _train,
    _table,
    _findings,
    learning,
)
