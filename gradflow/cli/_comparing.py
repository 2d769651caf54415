"""Commands that put theory beside simulation, of one network or of all remedies for it."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from gradflow._checks import check_count
from gradflow._files import write_netcdf
from gradflow._tables import number, percent, table
from gradflow.cli._options import (
    Json,
    Out,
    Seed,
    app,
    check_depth,
    check_deviation,
    chosen_inputs,
    described_by,
    file_name,
    is_given,
    network_options,
    results_folder,
    shape_label,
)
from gradflow.cli._output import show, show_progress, write_json

if TYPE_CHECKING:
    import xarray


@app.command(
    cls=described_by(
        every=True, batch=2, activation="tanh", weights="glorot", width=1000, depth=50, tokens=8
    ),
    epilog="Examples:\n\n"
    "- `gradflow compare --activation tanh --weights glorot --width 1000 --depth 50`\n"
    "- `gradflow compare --activation relu --weights he --widths 784,300,100,10 --networks 5000`\n"
    "- `gradflow compare --activation erf --sigma-w 1.2 --sigma-b 0.1 --json`\n"
    "- `gradflow compare --kind residual --scale depth --norm layer --width 200`\n"
    "- `gradflow compare --activation relu --weights he --widths 2,50,50,1 --input coordinates`\n"
    "- `gradflow compare --data inputs.csv --inputs 4 --mean-square 1`\n"
    "- `gradflow compare --correlation 0.9 --width 200`",
)
def compare(
    context: typer.Context,
    networks: Annotated[int, typer.Option(help="How many random networks.")] = 1000,
    sampler: Annotated[str, typer.Option(help="dense, matrix_free, or auto.")] = "auto",
    saturation_threshold: Annotated[
        float,
        typer.Option(help="A unit is saturated where |φ'| is below this share of its largest."),
    ] = 4 * 0.01 * 0.99,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """One family of networks: theory beside simulation, as a table, figures and a netCDF file.

    Inputs are images of digits, of 64 pixels or resized to another width; of fewer than 64
    components, random directions; and others with --input, --data, --mean-square or --correlation.
    """
    from gradflow import _schema, comparison  # noqa: PLC0415  (JAX is slow to import)

    described = network_options(context)
    check_count("width", context.params["width"])
    check_depth(context.params["depth"])
    check_count("networks", networks)
    check_deviation("sigma_b", context.params["sigma_b"] or 0.0)
    inputs = chosen_inputs(context, described)
    network = dataclasses.replace(
        _schema.network(described), saturation_threshold=saturation_threshold
    )
    named = [name for name in ("activation", "weights") if name in described]
    folder = results_folder(context, *named, out=out)

    with show_progress() as report:
        result = comparison.compare(
            network,
            inputs.rows,
            key=seed,
            networks=networks,
            sampler=sampler,
            histograms=True,
            progress=lambda done, total: report(network.name, done, total),
        )
    dataset = result.to_xarray().assign_attrs(seed=seed, **inputs.record)
    written = [write_netcdf(dataset, folder / "results.nc")]
    written += _figures(network.name, dataset, folder)

    def parts() -> Iterator[Table | str]:
        simulation = result.simulation
        yield _table_of_statistics(result)
        yield f"verdict   {result.verdict.sentence}"
        yield f"agreement {result.agreement}"
        yield f"inputs    {inputs.record['inputs']}"
        for line in _float_ranges(result):
            yield f"range     {line}"
        yield (
            f"sampler   {simulation.sampler}: {simulation.reason}; {simulation.networks} networks "
            f"in {simulation.seconds:.2f} s, after {simulation.compile_seconds:.1f} s of compiling"
        )

    summary = comparison_as_json(result, dataset) | {"inputs": inputs.record}
    show(summary, parts, as_json=as_json, folder=folder, written=written)


def _figures(name: str, dataset: "xarray.Dataset", folder: Path) -> list[Path]:
    from gradflow import figures  # noqa: PLC0415  (matplotlib is slow to import)

    family = {name: {"all inputs": dataset}}
    return [
        figures.save(draw(family), folder / f"{figure.replace('_', '-')}.png")
        for figure, draw in figures.OF_COMPARISONS.items()
    ]


@app.command(
    cls=described_by(
        *("kind", "sigma_w", "sigma_w2", "distribution", "sigma_b2", "input_width"),
        *("last", "norm", "norm_position", "keep_rate"),
        *("heads", "key_width", "key_heads", "kappa", "ov", "score_scale", "qk_norm", "positions"),
        *("causal", "ffn_width", "ffn_weights", "gated", "scale", "embedding"),
        batch=4,
        activation="logistic",
        weights="unscaled",
        sigma_b=None,
        width=200,
        depth=30,
        tokens=8,
    ),
    epilog="Examples:\n\n"
    "- `gradflow remedies`\n"
    "- `gradflow remedies --network transformer --norm-position post --depth 24`\n"
    "- `gradflow remedies --activation relu --weights glorot --depth 50`\n"
    "- `gradflow remedies --activation tanh --sigma-w 2 --norm layer --width 100 --json`\n"
    "- `gradflow remedies --activation tanh --data inputs.npy --inputs 8`",
)
def remedies(
    context: typer.Context,
    networks: Annotated[int, typer.Option(help="How many random networks of each.")] = 200,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """How to tackle vanishing or exploding gradients: a sick network, and every remedy beside it.

    Each remedy's theory and simulation at the start of training, ranked by the depth that trains.
    An input has as many components as a layer has units, unless --input, --data or --input-width
    says otherwise. A transformer is PyTorch's without other options: ReLU, its weights, post-LN.
    """
    from gradflow import _schema, figures  # noqa: PLC0415  (JAX is slow to import)
    from gradflow import remedies as remedies_of  # noqa: PLC0415

    described = network_options(context)
    kind = described.get("kind", "mlp")
    check_count("networks", networks, 2)
    if kind == "mlp":
        check_count("inputs", context.params["batch"], 4)
    else:
        usual = {"activation": "relu", "norm_position": "post"}
        if not described.keys() & {"weights", "sigma_w", "sigma_w2"}:
            usual["weights"] = "torch"
        described = usual | described
    check_depth(check_count("depth", described["depth"], 3))
    check_deviation("sigma_b", context.params["sigma_b"] or 0.0)
    check_count("width", described["width"], 2)
    if not (is_given(context, "input") or is_given(context, "data")):
        described.setdefault("input_width", described["width"])
    inputs = chosen_inputs(context, described)
    _, sick = _schema.arguments_of(described)
    sick |= {name: described[name] for name in ("width", "depth")}
    sick = {name: v for name, v in sick.items() if name not in ("widths", "input_width")}
    folder = results_folder(
        context, *(name for name in ("activation", "weights") if name in described), out=out
    )
    with show_progress() as report:
        ranked = remedies_of.run(
            **sick,
            kind=kind,
            inputs=inputs.rows,
            networks_each=networks,
            seed=seed,
            progress=report,
        )
    outcomes = (ranked.sick, *ranked.outcomes)
    datasets = {o.remedy.name: o.comparison.to_xarray() for o in outcomes}
    written = [
        write_netcdf(
            dataset.assign_attrs(seed=seed, **inputs.record), folder / f"{file_name(name)}.nc"
        )
        for name, dataset in datasets.items()
    ]
    written.append(figures.save(figures.remedies(datasets), folder / "remedies.png"))
    summary = {
        "inputs": inputs.record,
        "remedies": [_outcome_as_json(outcome) for outcome in outcomes],
        "not_applicable": ranked.not_applicable,
    }
    written.append(write_json(summary, folder / "remedies.json"))

    def parts() -> Iterator[Table | str]:
        network = ranked.sick.network
        yield _table_of_remedies(f"{network.name}: {shape_label(network.widths)}", outcomes)
        yield f"inputs    {inputs.record['inputs']}"
        for name, reason in ranked.not_applicable.items():
            yield f"left out  {name}: {reason}"
        yield (
            "noted     gradient clipping bounds the step, not the disparity between layers: it "
            "changes none of these numbers"
        )
        yield (
            "noted     μP is for learning rates that suit every width, and does nothing about depth"
        )

    show(summary, parts, as_json=as_json, folder=folder, written=written)


def _outcome_as_json(outcome: Any) -> dict[str, Any]:
    remedy, comparison = outcome.remedy, outcome.comparison
    numbers = {
        name: value
        for name, value in vars(outcome).items()
        if name not in ("remedy", "network", "comparison")
    }
    return {
        "remedy": remedy.name,
        "network": outcome.network.name,
        "verdict": comparison.verdict.kind,
        **{
            n: v if math.isfinite(v) else None if math.isnan(v) else str(v)
            for n, v in numbers.items()
        },
        "agreement": comparison.agreement,
        "cost": remedy.cost,
        "caveat": remedy.caveat,
    }


def _table_of_remedies(title: str, outcomes: Sequence[Any]) -> Table:
    rows: list[dict[str, str] | None] = []
    for o in outcomes:
        condition = o.log10_condition_number
        theory = {
            "remedy": o.remedy.name,
            "": "theory",
            "gradient\na layer": f"×{o.gradient_theory:.4g}",
            "variance\na layer": f"×{o.variance_theory:.4g}",
            "correlation\nat the top": f"{o.correlation_theory:.3f}",
            "trains to\ndepth": f"{o.trainable_depth:.0f}",
            "condition\nlog₁₀": "",
            "costs; caveat": f"costs {o.remedy.cost}" if o.remedy.cost else "",
        }
        measured = {
            "": "measured",
            "gradient\na layer": f"×{o.gradient:.4g}",
            "variance\na layer": f"×{o.variance:.4g}",
            "correlation\nat the top": f"{o.correlation:.3f}",
            "condition\nlog₁₀": "-" if math.isnan(condition) else f"{condition:.1f}",
            "costs; caveat": o.remedy.caveat,
        }
        rows += [theory, measured, None]
    return table(
        f"{title}; the remedies that train deepest first",
        rows,
        text=("remedy", "", "costs; caveat"),
        ratios={"remedy": 3, "costs; caveat": 4},
    )


def _float_ranges(result: Any) -> list[str]:
    """For each float type, the layers in which signals and gradients leave its range."""
    from gradflow import _float_ranges  # noqa: PLC0415

    ranges = result.float_ranges
    return [
        f"{of}: {_float_ranges.sentence(ranges['theory'], ranges['simulation'], of)}"
        for of in _float_ranges.DTYPES
    ]


def _table_of_statistics(result: Any) -> Table:
    from gradflow._labels import BY_KEY  # noqa: PLC0415
    from gradflow.comparison import Status  # noqa: PLC0415

    words = {
        Status.NOT_COMPARED: "",
        Status.AGREES: "agrees",
        Status.FINITE_WIDTH: "finite width",
        Status.DIFFERS: "differs",
    }
    rows: list[dict[str, str] | None] = []
    for key, contrast in result.by_statistic.items():
        statistic = BY_KEY[key]
        estimate = result.simulation.estimates[key]
        # Where it is kept as a logarithm, so are these: no float may hold the number.
        log = statistic.log
        for layer in first_middle_last(len(contrast.theory)):
            if math.isnan(estimate.value[layer]):  # the top layer's χ
                continue
            error, z = contrast.standard_error[layer], contrast.z[layer]
            if log and error > 0:  # relative
                error = contrast.measured[layer] + math.log(error)
            elif log:
                error = math.nan if math.isnan(error) else -math.inf
            spread, of_theory = contrast.deviation[layer], contrast.theory_deviation[layer]
            measured = number(contrast.measured[layer], 4, log=log)
            row = {
                "statistic": statistic.name,
                "layer": str(layer + 1),
                "theory": number(contrast.theory[layer], 4, log=log),
                "measured ± s.e.": f"{measured} ± {number(error, 1, log=log)}",
                "z": "" if math.isnan(z) else f"{z:+.1f}",
                "difference": percent(contrast.relative_difference[layer]),
                "of this width": percent(_relative(contrast, layer, statistic.logarithmic)),
                "spread (theory)": f"{number(spread)} ({number(of_theory)})",
                "": words[Status(int(contrast.status[layer]))],
            }
            rows.append(row)
        rows.append(None)
    network = result.simulation.network
    title = f"{network.name}: {shape_label(network.widths)}, {result.simulation.networks} networks"
    return table(title, rows, text=("statistic", ""))


def _relative(contrast: Any, layer: int, logarithmic: bool) -> float:
    """The shift of the mean that the width makes, relative to theory."""
    shift, theory = float(contrast.shift[layer]), abs(float(contrast.theory[layer]))
    if logarithmic:
        return math.expm1(shift)
    return shift / theory if theory > contrast.standard_error[layer] else math.nan


def first_middle_last(depth: int) -> list[int]:
    """The indices of the first, the middle and the last of so many layers."""
    return sorted({0, (depth - 1) // 2, depth - 1})


def comparison_as_json(result: Any, dataset: "xarray.Dataset") -> dict[str, Any]:
    """A comparison and its labelled data as JSON has them."""
    verdict = result.verdict
    return {
        "network": result.simulation.network.name,
        "widths": list(result.simulation.network.widths),
        "networks": result.simulation.networks,
        "sampler": result.simulation.sampler,
        "verdict": vars(verdict),
        "float_ranges": json.loads(dataset.attrs["float_ranges"]),
        "agreement": result.agreement,
        "layers": {
            name: values.values.tolist()
            for name, values in dataset.data_vars.items()
            if values.dims == ("layer",)
        },
        "attributes": {name: np.asarray(value).tolist() for name, value in dataset.attrs.items()},
    }
