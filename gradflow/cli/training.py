"""The command that trains networks and shows how fast each layer learns: train."""

import contextlib
import functools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from gradflow.cli.shared import (
    Depth,
    Json,
    Out,
    Seed,
    app,
    at_least,
    check_depth,
    file_name,
    make_console,
    print_json,
    show_progress,
    writable_folder,
    write_netcdf,
)
from gradflow.errors import InputError

# Images of the test set that everything is measured on, as the paper does (section 3).
_MONITORED = 300
# Where a run is kept while it goes on, in the folder of its results.
_UNFINISHED = "unfinished"
# The note's networks: which of them learn, and in which layers.
_OF_THE_NOTE = (
    ("logistic", "unscaled"),
    ("logistic", "glorot"),
    ("tanh", "unscaled"),
    ("tanh", "glorot"),
    ("relu", "he"),
)


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow train`\n"
    "- `gradflow train --activation tanh --weights orthogonal --depth 50 --learning-rate 0.03`\n"
    "- `gradflow train --data shapeset --depth 5 --steps 20000`\n"
    "- `gradflow train --activation relu --weights he --optimiser adam "
    "--learning-rate 0.01,0.001 --json`\n"
    "- `gradflow train --activation tanh --weights unscaled --clip global-norm:1`"
)
def train(
    activation: Annotated[
        str | None,
        typer.Option(help="φ, by name; the networks of the study note without it.", metavar="NAME"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="The ensemble, by name: glorot without it.", metavar="NAME")
    ] = None,
    width: Annotated[int, typer.Option(help="Units a hidden layer.")] = 100,
    depth: Depth = 10,
    dataset_name: Annotated[
        str,
        typer.Option(
            "--data", help="digits, mnist, shapeset, or a path to .npz.", metavar="NAME|PATH"
        ),
    ] = "digits",
    learning_rate: Annotated[
        str,
        typer.Option(
            help="Of the optimiser; of several, with commas between, the best on validation data "
            "is reported.",
            metavar="RATE,…",
        ),
    ] = "0.1",
    optimiser: Annotated[
        str,
        typer.Option(
            help="sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw or lion.", metavar="NAME"
        ),
    ] = "sgd",
    clip: Annotated[
        str | None,
        typer.Option(
            help="Clip gradients: value:1, norm:1 (each matrix's), global-norm:1, adaptive:0.01.",
            metavar="NAME:THRESHOLD",
        ),
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Variance of noise in gradients at first; it decays.")
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="How many updates.")] = 5000,
    batch: Annotated[int, typer.Option(help="Images an update.")] = 10,
    networks: Annotated[int, typer.Option(help="How many random networks of each kind.")] = 4,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train on images: how far each layer moves, beside its gradient by theory.

    A run that is interrupted goes on where it was when the same command is given again.
    """
    from gradflow import data, figures, training  # noqa: PLC0415  (JAX is slow to import)
    from gradflow import networks as nets  # noqa: PLC0415

    rates = _rates(learning_rate)
    chosen_optimiser = training.optimiser(optimiser)
    if noise:
        chosen_optimiser = training.with_noise(chosen_optimiser, noise)
    clipping = None if clip is None else training.clipping(clip)
    width_, depth_ = at_least("width", width), check_depth(depth)
    at_least("networks", networks)
    dataset = data.load(dataset_name)
    parts = data.split(dataset, key=seed).standardised()
    seen = parts.test[:_MONITORED]
    # The layers of this depth, and the one that makes logits of the last of them.
    shape = (dataset.inputs.shape[1], *[width_] * depth_, dataset.classes)
    chosen = (
        _OF_THE_NOTE
        if activation is None and weights is None
        else ((activation or "tanh", weights or "glorot"),)
    )
    laws = [nets.mlp(shape, phi, ensemble) for phi, ensemble in chosen]
    label = "note" if len(laws) > 1 else laws[0].name
    label = f"{label}-width{width_}-depth{depth_}-seed{seed}"
    folder = writable_folder(out or Path("results") / "train" / file_name(label))

    found: dict[str, Any] = {}
    with _resumable(folder), show_progress("updates") as report:
        for law in laws:
            found[law.name] = training.train(
                law,
                parts.train.inputs,
                parts.train.labels,
                monitor=(seen.inputs, seen.labels),
                validation=(parts.validation.inputs, parts.validation.labels),
                steps=steps,
                batch=batch,
                learning_rate=rates,
                seeds=networks,
                key=seed,
                optimiser=chosen_optimiser,
                clip=clipping,
                save=folder / _UNFINISHED,
                progress=functools.partial(report, law.name),
            )
    how = {"seed": seed, "optimiser": optimiser, "clip": clip or "none", "noise": noise}
    datasets = {name: result.to_xarray().assign_attrs(how) for name, result in found.items()}
    written = [
        write_netcdf(dataset, folder / f"{file_name(name)}.nc")
        for name, dataset in datasets.items()
    ]
    best = {name: int(result.best_rate()[0]) for name, result in found.items()}
    shown = {name: dataset.isel(learning_rate=[best[name]]) for name, dataset in datasets.items()}
    written.append(figures.save(figures.learning(shown), folder / "learning.png"))
    for result in found.values():
        shutil.rmtree(result.saved, ignore_errors=True)
    with contextlib.suppress(OSError):  # other runs may be there
        (folder / _UNFINISHED).rmdir()
    rows = {name: _row(result, best[name]) for name, result in found.items()}
    if as_json:
        print_json({"networks": rows, "files": [str(path) for path in written]})
        return
    console = make_console()
    title = (
        f"{depth_} layers of {width_} and one of {dataset.classes}, {dataset_name}, "
        f"{steps} steps of {batch}"
    )
    console.print(_table(f"{title}, {_in_words(optimiser, clip, noise)}", rows))
    if len(rates) > 1:
        console.print(
            f"rate      with the least error of {len(parts.validation)} validation images, of "
            f"{', '.join(f'{rate:g}' for rate in rates)}"
        )
    console.print(
        "moved     ‖W - W₀‖/‖W₀‖ at the end, geometric mean over networks whose weights are finite"
    )
    console.print(
        "gradient  r.m.s. ∂C/∂z of layer 1 over that of the last hidden layer, before training"
    )
    console.print(f"error     of {len(seen)} images of the test set, after the last step")
    console.print(
        "diverged  the loss is not finite, or above guessing with a layer moved 10 times its norm"
    )
    seconds = sum(result.seconds for result in found.values())
    count = steps * networks * len(found) * len(rates)
    console.print(f"trained   {count} updates in {seconds:.1f} s")
    console.print(f"written   to {folder}: {', '.join(path.name for path in written)}")


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say what to do after an interruption."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"gradflow: saved in {folder}; the same command goes on from there", err=True)
        raise


def _rates(text: str) -> list[float]:
    """Return the numbers of 0.1,0.01."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"learning_rate is {text!r}; it is one number above 0 or several with commas between, "
            "as 0.1,0.01"
        ) from error


def _in_words(optimiser: str, clip: str | None, noise: float) -> str:
    clipped = "" if clip is None else f", clipped by {clip}"
    return f"{optimiser}{clipped}" + (f", noise {noise:g}" if noise else "")


def _row(result: Any, rate: int) -> dict[str, Any]:
    """Return one network's numbers at one of its learning rates: lists are by layer."""
    log_moved = np.full(result.networks[0].depth, math.nan)
    moved = result["movement"][0, rate, :, -1].astype(np.float64)
    finite = np.isfinite(moved).all(axis=1)
    with np.errstate(divide="ignore"):
        if finite.any():
            log_moved = np.log10(moved[finite]).mean(axis=0)
    # Of one layer there is nothing to compare.
    log_start = result["log_gradient_variance"][0, rate, :, 0].astype(np.float64).mean(axis=0)
    theory = result.theory()["log_gradient_variance"]
    gradient, by_theory = (math.exp((v[0] - v[-2]) / 2) for v in (log_start, theory))
    diverged = result.diverged[0, rate]
    return {
        "learning_rate": float(result.learning_rates[rate]),
        "moved": (10**log_moved).tolist(),
        "gradient_ratio": gradient,
        "gradient_ratio_theory": by_theory,
        "speed_spread": result.speed_spread[0, rate, :, 0].tolist(),
        "loss": result["loss"][0, rate, :, -1].tolist(),
        "error": result["error"][0, rate, :, -1].tolist(),
        "validation_error": result["validation_error"][0, rate, :, -1].tolist(),
        "diverged": int(np.count_nonzero(diverged >= 0)),
        "networks": len(diverged),
    }


def _table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("network")
    table.add_column("rate", justify="right", no_wrap=True)
    hidden = len(next(iter(rows.values()))["moved"]) - 1
    layers = sorted({0, (hidden - 1) // 2, hidden - 1, hidden})
    for column in ("gradient\nmeasured", "gradient\ntheory"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in layers:
        table.add_column(f"moved\nlayer {layer + 1}", justify="right", no_wrap=True)
    for column in ("error\nmean", "error\nleast", "error\nmost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("diverged", justify="right", no_wrap=True)
    for name, row in rows.items():
        error = np.asarray(row["error"])
        table.add_row(
            name,
            f"{row['learning_rate']:g}",
            f"{row['gradient_ratio']:.3g}",
            f"{row['gradient_ratio_theory']:.3g}",
            *("-" if math.isnan(row["moved"][k]) else f"{row['moved'][k]:.2g}" for k in layers),
            *(f"{100 * v:.1f} %" for v in (error.mean(), error.min(), error.max())),
            f"{row['diverged']} of {row['networks']}",
        )
    return table
