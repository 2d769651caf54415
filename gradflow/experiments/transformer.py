"""Norms before and after branches in training, with and without a warm-up of the learning rate.

Xiong et al. 2020 (arXiv:2002.04745): post-LN transformers need a warm-up, as the gradients of
their upper layers are large at first, and pre-LN ones do not. With depth, the gradient of post-LN
falls to what tokens have in common, and that of pre-LN grows like a power.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import optax
import xarray

from gradflow import builders, statistics, training
from gradflow._checks import check_count
from gradflow.data import Dataset
from gradflow.experiments import _wording
from gradflow.experiments._recipe import Experiment, Recipe, Table
from gradflow.figures import transformers as figure
from gradflow.networks import Network
from gradflow.theory import float64
from gradflow.training import Recording

_RECORDS = 20
# Pixels along a side of a patch, and images whose gradients are measured by themselves.
_PATCH, _MEASURED, _TESTED = 2, 8, 300
# Norms' positions, and whether the learning rate is warmed up, by name.
_KINDS: Mapping[str, tuple[str, bool]] = {
    "post-LN": ("post", False),
    "post-LN, warm-up": ("post", True),
    "pre-LN": ("pre", False),
    "pre-LN, warm-up": ("pre", True),
}


def _train(
    recipe: Recipe,
    *,
    heads: Annotated[int, "Heads of attention."] = 4,
    warmup: Annotated[float, "The share of steps over which the learning rate grows."] = 0.2,
) -> xarray.Dataset:
    """Train transformers with norms before and after branches, with and without warm-up, by depth.

    An image is cut into patches, an input's tokens; each has its pixels, standardised, and a
    one-hot vector of its position. Networks are encoders of ReLU and Xavier weights, with Adam.

    Returns
    -------
    xarray.Dataset
        ``error`` of test images over (depth, network, learning_rate, seed, step); ``gradient``, the
        norm of ∂C/∂z at the start relative to the top layer of the stream, over (depth, network,
        seed, layer), and ``gradient_theory`` without seeds.
    """
    check_count("networks", recipe.networks)
    parts = recipe.split().standardised()
    train, test = parts.train, parts.test
    tokens = _patches(train)
    steps = check_count("steps", recipe.steps)
    each, seconds = [], 0.0
    for depth in recipe.depths or ():
        of_depth: list[xarray.Dataset] = []
        theories: dict[str, np.ndarray] = {}
        for name, (position, warmed) in _KINDS.items():
            network = _network(tokens, train.classes, recipe.width, depth, heads, position)
            result = training.train(
                network,
                _rows(tokens),
                train.labels,
                steps=steps,
                batch=recipe.batch,
                learning_rate=recipe.learning_rates,
                optimiser=functools.partial(_adam, round(warmup * steps) if warmed else 0),
                seeds=recipe.networks,
                key=recipe.seed,
                validation=(_rows(_patches(test[:_TESTED])), test.labels[:_TESTED]),
                record=Recording(
                    recipe.even_steps(_RECORDS),
                    (_rows(_patches(test[:_MEASURED])), test.labels[:_MEASURED]),
                    (statistics.log_gradient_norm,),
                ),
                save=recipe.save,
                progress=recipe.progress_of(f"{name}, {depth} layers"),
            )
            if position not in theories:
                theories[position] = _theory(network, _patches(test[:1])[0])
            of_depth.append(_described(result, theories[position]).assign_coords(network=name))
            seconds += result.seconds
        each.append(xarray.concat(of_depth, "network").assign_coords(depth=depth))
    return xarray.concat(each, "depth", join="outer").assign_attrs(
        width=recipe.width,
        tokens=tokens.shape[1],
        heads=heads,
        warmup=warmup,
        classes=train.classes,
        batch=recipe.batch,
        steps=steps,
        seed=recipe.seed,
        seconds=seconds,
    )


def _network(
    tokens: np.ndarray, classes: int, width: int, depth: int, heads: int, position: str
) -> Network:
    """An encoder of these tokens, whose read-out is of their mean."""
    return builders.transformer(
        tokens.shape[1],
        width,
        depth,
        "relu",
        "glorot",
        heads=heads,
        norm_position=position,
        input_width=tokens.shape[2],
        outputs=classes,
        pool="mean",
    )


def _adam(warmup: int, rate: Any) -> optax.GradientTransformation:
    """Adam whose learning rate grows in proportion to the step over so many of them."""
    return optax.adam(lambda count: rate * jnp.minimum(1.0, (count + 1) / max(warmup, 1)))


def _patches(images: Dataset) -> np.ndarray:
    """Shape (images, tokens, components): a patch's pixels, and its position as a unit vector."""
    rows, columns = images.shape
    count, size = len(images), _PATCH
    cut = images.inputs.reshape(count, rows // size, size, columns // size, size)
    pixels = cut.swapaxes(2, 3).reshape(count, -1, size * size)
    # As long as standardised pixels are on average.
    position = np.broadcast_to(size * np.eye(pixels.shape[1]), (count, *[pixels.shape[1]] * 2))
    return np.concatenate([pixels, position], axis=2).astype(np.float32)


def _rows(tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(len(tokens), -1)


def _theory(network: Network, image: np.ndarray) -> np.ndarray:
    """The logarithm of ‖∂C/∂z‖ by layer of the stream, for one image."""
    return np.asarray(float64.predict(network, image)["log_gradient_norm"], float)[:-1]


def _described(result: Any, theory: np.ndarray) -> xarray.Dataset:
    """Errors along training, and gradients at the start by layer beside theory's of an image."""
    log = result["log_gradient_norm"][0, 0, :, 0, :-1].astype(float)
    return xarray.Dataset(
        {
            "error": (("learning_rate", "seed", "step"), result["validation_error"][0]),
            "gradient": (("seed", "layer"), np.exp(log - log[:, -1:])),
            "gradient_theory": ("layer", np.exp(theory - theory[-1])),
        },
        coords={
            "learning_rate": result.learning_rates,
            "seed": np.arange(result.seeds),
            "step": result.steps,
            "layer": np.arange(log.shape[1]),
        },
    )


def _table(dataset: xarray.Dataset) -> Table:
    """Test errors at the end by depth and learning rate, and gradients at the start."""
    rows = []
    for depth in dataset.depth.values:
        for name in dataset.network.values:
            one = dataset.sel(depth=depth, network=name)
            row: dict[str, Any] = {"layers": int(depth), "network": str(name)}
            for rate in dataset.learning_rate.values:
                row[f"error, %, rate {rate:g}"] = 100 * float(
                    one.error.sel(learning_rate=rate).isel(step=-1).mean()
                )
            row["gradient, bottom over top"] = float(_at_bottom(one.gradient))
            row["theory"] = float(one.gradient_theory.isel(layer=0))
            rows.append(row)
    attrs = dataset.attrs
    return Table(
        f"{attrs['tokens']} tokens, width {attrs['width']}, {attrs['heads']} heads; "
        f"{attrs['steps']} steps of {attrs['batch']}, {dataset.sizes['seed']} networks of each",
        rows,
        (
            "gradient  ‖∂C/∂z‖ at the start, of the embedding over the top layer of the stream",
            f"warm-up   of the learning rate, over {attrs['warmup']:.0%} of the steps",
        ),
    )


def _at_bottom(gradient: xarray.DataArray) -> xarray.DataArray:
    return _wording.geometric_mean(gradient.isel(layer=0))


def _findings(dataset: xarray.Dataset) -> list[str]:
    """What depth does to each kind, what a warm-up helps, and gradients beside theory."""
    final = dataset.error.isel(step=-1).mean("seed")
    sentences = []
    for depth in dataset.depth.values:
        best = final.sel(depth=depth).min("learning_rate")
        largest = final.sel(depth=depth, learning_rate=dataset.learning_rate.max())
        listed = ", ".join(
            f"{name} {100 * float(best.sel(network=name)):.1f} % "
            f"({100 * float(largest.sel(network=name)):.1f} %)"
            for name in dataset.network.values
        )
        sentences.append(
            f"{int(depth)} layers: test error at the best learning rate, and at the largest, "
            f"{float(dataset.learning_rate.max()):g}: {listed}"
        )
    deepest = dataset.sel(depth=dataset.depth.max())
    for name in ("post-LN", "pre-LN"):
        one = deepest.sel(network=name)
        sentences.append(
            f"{name}, {int(dataset.depth.max())} layers, at the start: ‖∂C/∂z‖ of the embedding is "
            f"{float(_at_bottom(one.gradient)):.3g} of that at the top of the stream, "
            f"{float(one.gradient_theory.isel(layer=0)):.3g} by theory"
        )
    return sentences


EXPERIMENT = Experiment(
    "transformer",
    Recipe(
        width=32, depths=(2, 6, 12), steps=300, batch=32, learning_rate=(1e-3, 1e-2), networks=2
    ),
    _train,
    _table,
    _findings,
    figure,
)
