"""Schoenholz et al. 2017 (arXiv:1611.01232): networks train up to a depth of about 6 ξ_c.

ξ_c is the depth scale on which two inputs' correlation comes to its limit: after several ξ_c the
signals of different inputs are alike. On the critical line, where χ₁ = 1, ξ_c is infinite.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
import xarray

from gradflow import activations, builders, ensembles, training
from gradflow._checks import check_count
from gradflow.activations import Activation
from gradflow.experiments import _wording
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import trainability_map
from gradflow.theory import criticality, fixed_points
from gradflow.training import Recording

_SIGMA_W2 = (1.0, 1.25, 1.5, 1.76, 2.0, 2.5, 3.0, 4.0)
# Networks train up to so many ξ_c (Schoenholz et al. 2017, section 5).
_RULE = 6.0
# Points of the curve of ξ_c.
_POINTS = 201


def _train(
    recipe: Recipe,
    *,
    activation: Annotated[str, "φ, by name."] = "tanh",
    sigma_w2: Annotated[Sequence[float], "Weights' variance times their fan-in."] = _SIGMA_W2,
    sigma_b2: Annotated[float, "The biases' variance."] = 0.05,
) -> xarray.Dataset:
    """Map how deep networks train over σ_w², beside 6 ξ_c by theory (Schoenholz et al. 2017).

    The data's values are scaled to between -1/2 and 1/2.

    Returns
    -------
    xarray.Dataset
        ``accuracy`` over (depth, sigma_w2, seed); ``xi_c`` and ``xi_grad`` in layers at these σ_w²,
        and ``xi_c_curve`` over (curve_sigma_w2,); attribute ``critical_sigma_w2``.
    """
    check_count("networks", recipe.networks)
    parts = recipe.split().rescaled(-0.5, 0.5)
    phi, depths = activations.get(activation), list(recipe.depths or ())
    accuracy, seconds = [], 0.0
    for depth in depths:
        widths = recipe.widths(parts, depth)
        result = training.train(
            [
                builders.mlp(widths, phi, ensembles.fan_in(value**0.5), sigma_b=sigma_b2**0.5)
                for value in sigma_w2
            ],
            parts.train.inputs,
            parts.train.labels,
            steps=recipe.steps,
            batch=recipe.batch,
            learning_rate=recipe.learning_rates,
            seeds=recipe.networks,
            key=recipe.seed,
            record=Recording([recipe.steps], (parts.test.inputs, parts.test.labels), ()),
            save=recipe.save,
            progress=recipe.progress_of(f"depth {depth}"),
        )
        accuracy.append(1 - result["error"][:, 0, :, -1])
        seconds += result.seconds
    return xarray.Dataset(
        {"accuracy": (("depth", "sigma_w2", "seed"), np.stack(accuracy))},
        coords={"depth": depths, "seed": np.arange(recipe.networks)},
        attrs={
            "activation": phi.name,
            "sigma_b2": sigma_b2,
            "learning_rate": recipe.learning_rates[0],
            "width": recipe.width,
            "classes": parts.train.classes,
            "batch": recipe.batch,
            "steps": recipe.steps,
            "seed": recipe.seed,
            "seconds": seconds,
        },
    ).merge(_theory(phi, sigma_w2, sigma_b2), combine_attrs="no_conflicts")


def _theory(phi: Activation, sigma_w2: Sequence[float], sigma_b2: float) -> xarray.Dataset:
    """Depth scales at these σ_w², a curve of ξ_c over them, and the critical points."""
    curve = np.linspace(min(sigma_w2), max(sigma_w2), _POINTS)
    with jax.enable_x64(True):
        scales = fixed_points.analyse(phi, np.asarray(sigma_w2, float), sigma_b2)
        along = fixed_points.analyse(phi, curve, sigma_b2)
        critical = np.asarray(criticality.critical_points(phi, sigma_b2=sigma_b2).sigma_w2)
    return xarray.Dataset(
        {
            "xi_c": ("sigma_w2", np.asarray(scales.xi_c)),
            "xi_grad": ("sigma_w2", np.asarray(scales.xi_grad)),
            "xi_c_curve": ("curve_sigma_w2", np.asarray(along.xi_c)),
        },
        coords={"sigma_w2": list(sigma_w2), "curve_sigma_w2": curve},
        attrs={"critical_sigma_w2": critical[np.isfinite(critical)]},
    )


def _trained_depths(dataset: xarray.Dataset) -> xarray.DataArray:
    """The depth at which accuracy is halfway between the best and guessing, by σ_w².

    Where accuracy, on average over networks, falls below halfway for good; interpolated between
    depths on a logarithmic scale. 0 where even the least depth is below, inf where all are above.
    """
    mean = dataset.accuracy.mean("seed")
    guessing = 1 / dataset.attrs["classes"]
    half = (float(mean.max()) + guessing) / 2
    depth = np.log(dataset.depth.values)
    depths = []
    for column in mean.transpose("sigma_w2", "depth").values:
        (above,) = np.nonzero(column >= half)
        if not above.size:
            depths.append(0.0)
        elif above[-1] == len(depth) - 1:
            depths.append(np.inf)
        else:
            i = above[-1]
            part = (column[i] - half) / (column[i] - column[i + 1])
            depths.append(float(np.exp(depth[i] + part * (depth[i + 1] - depth[i]))))
    return xarray.DataArray(depths, {"sigma_w2": dataset.sigma_w2}, name="trained_depth")


def _table(dataset: xarray.Dataset) -> Table:
    """Accuracy by σ_w² and depth, and the depth that trains in units of ξ_c."""
    limits = _trained_depths(dataset)
    rows = []
    for value in dataset.sigma_w2.values:
        one = dataset.sel(sigma_w2=value)
        row: dict[str, Any] = {"σ_w²": float(value), "ξ_c": float(one.xi_c)}
        for depth in dataset.depth.values:
            row[f"accuracy, depth {depth}"] = float(one.accuracy.sel(depth=depth).mean())
        limit = float(limits.sel(sigma_w2=value))
        row["half accuracy, at depth"] = limit
        row["half accuracy, in ξ_c"] = limit / float(one.xi_c)
        rows.append(row)
    return Table(
        f"{dataset.attrs['activation']}, σ_b² = {dataset.attrs['sigma_b2']:g}, "
        f"{_wording.sizes(dataset)}, learning rate {dataset.attrs['learning_rate']:g}",
        rows,
        (
            "ξ_c       theory's depth scale of correlations, in layers",
            "half      accuracy halfway between the best of all and guessing; 0: at no depth, inf: "
            "at all depths",
        ),
    )


def _findings(dataset: xarray.Dataset) -> list[str]:
    """The best σ_w² beside the critical line, and the depths that train beside ξ_c."""
    deepest = dataset.accuracy.sel(depth=dataset.depth.max()).mean("seed")
    best = float(deepest.idxmax())
    critical = np.atleast_1d(dataset.attrs["critical_sigma_w2"])
    line = ", ".join(f"{value:.3g}" for value in critical) or "nowhere"
    sentences = [
        f"of the deepest networks ({int(dataset.depth.max())} layers) those at σ_w² = {best:g} "
        f"train best, to an accuracy of {float(deepest.max()):.2f}; theory's critical line is at "
        f"{line}"
    ]
    limits = _trained_depths(dataset)
    within = _RULE * dataset.xi_c <= float(dataset.depth.max())
    ratio = (limits / dataset.xi_c).where(within & np.isfinite(limits) & (limits > 0), drop=True)
    if ratio.size:
        sentences.append(
            f"accuracy falls to halfway at {float(ratio.min()):.1f} to {float(ratio.max()):.1f} "
            f"ξ_c, median {float(ratio.median()):.1f}, where {_RULE:g} ξ_c is within these depths "
            f"(σ_w² = {_listed(ratio.sigma_w2)})"
        )
    beyond = limits.where(~within & np.isfinite(dataset.xi_c), drop=True)
    if beyond.size:
        reached = float(beyond.min())
        depths = f"{reached:.0f} layers" if np.isfinite(reached) else "all these depths"
        sentences.append(
            f"where {_RULE:g} ξ_c is beyond them (σ_w² = {_listed(beyond.sigma_w2)}) networks "
            f"train at least to {depths}"
        )
    return sentences


def _listed(values: xarray.DataArray) -> str:
    return ", ".join(f"{value:g}" for value in values.values)


EXPERIMENT = Experiment(
    "trainability",
    Recipe(width=100, depths=(5, 10, 20, 40, 80), steps=200, batch=64, learning_rate=0.01),
    _train,
    _table,
    _findings,
    trainability_map,
)
