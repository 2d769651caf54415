"""Commands that simulate networks and put theory beside them: compare, study."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import xarray
from rich import box
from rich.table import Table

from gradflow import builders
from gradflow._checks import check_count
from gradflow._labels import BY_KEY
from gradflow.cli import studying
from gradflow.cli._shared import (
    Depth,
    Json,
    Out,
    Phi,
    Seed,
    app,
    check_beside,
    check_depth,
    check_deviation,
    check_instead,
    file_name,
    given_folder,
    is_given,
    make_console,
    parse_widths,
    print_json,
    results_folder,
    shape_label,
    show_progress,
    write_json,
    write_netcdf,
)
from gradflow.errors import InputError

# Above it, and below its inverse, a natural logarithm is not that of a float.
_LARGEST_LOG = 700.0


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow compare --activation tanh --weights glorot --width 1000 --depth 50`\n"
    "- `gradflow compare --activation relu --weights he --widths 784,300,100,10 --networks 5000`\n"
    "- `gradflow compare --activation erf --sigma-w 1.2 --sigma-b 0.1 --json`"
)
def compare(
    context: typer.Context,
    activation: Phi = "tanh",
    weights: Annotated[str, typer.Option(help="The ensemble, by name.")] = "glorot",
    distribution: Annotated[
        str | None,
        typer.Option(help="Draw the weights from another law: gaussian, uniform, orthogonal, …"),
    ] = None,
    sigma_w: Annotated[
        float | None, typer.Option(help="Weights of variance σ_w²/fan_in, instead of --weights.")
    ] = None,
    sigma_b: Annotated[float, typer.Option(help="Standard deviation of the biases.")] = 0.0,
    width: Annotated[int, typer.Option(help="Units a layer, above 64 inputs.")] = 1000,
    depth: Depth = 50,
    widths: Annotated[
        str | None,
        typer.Option(help="Input and every layer, as 784,300,100,10, instead of width and depth."),
    ] = None,
    networks: Annotated[int, typer.Option(help="How many random networks.")] = 1000,
    inputs: Annotated[int, typer.Option(help="How many digit images go through each.")] = 2,
    sampler: Annotated[str, typer.Option(help="dense, matrix_free, or auto.")] = "auto",
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """One family of networks: theory beside simulation, as a table, figures and a netCDF file."""
    from gradflow import comparison, data, ensembles  # noqa: PLC0415  (JAX is slow to import)

    pass  # noqa: PLC0415

    check_instead(context, "sigma_w", "weights")
    for option in ("width", "depth"):
        check_instead(context, "widths", option)
    shape = parse_widths(widths) if widths is not None else None
    width_, depth_ = check_count("width", width), check_depth(depth)
    check_count("networks", networks)
    check_deviation("sigma_b", sigma_b)
    images = data.digits()[: check_count("inputs", inputs)]
    if len(images) < inputs:
        raise InputError(f"inputs is {inputs}; there are {len(images)} digit images")
    shape = shape or (images.shape[1], *[width_] * depth_)
    ensemble = ensembles.get(weights) if sigma_w is None else ensembles.fan_in(sigma_w)
    if distribution is not None:
        ensemble = ensemble.drawn_from(distribution)
    network = builders.mlp(shape, activation, ensemble, sigma_b=sigma_b)
    named = ("activation", "weights") if sigma_w is None else ("activation",)
    folder = results_folder(context, *named, out=out)

    with show_progress() as report:
        result = comparison.compare(
            network,
            data.resized(images, shape[0]),
            key=seed,
            networks=networks,
            sampler=sampler,
            histograms=True,
            progress=lambda done, total: report(network.name, done, total),
        )
    dataset = result.to_xarray().assign_attrs(seed=seed)
    written = [write_netcdf(dataset, folder / "results.nc")]
    written += _figures_of_one(network.name, dataset, folder)
    if as_json:
        print_json({**_as_json(result, dataset), "files": [str(path) for path in written]})
        return
    console = make_console()
    simulation = result.simulation
    console.print(_table_of_one(result))
    console.print(f"verdict   {result.verdict.sentence}")
    console.print(f"agreement {result.agreement}")
    for line in _said_of_ranges(result):
        console.print(f"range     {line}")
    console.print(
        f"sampler   {simulation.sampler}: {simulation.reason}; {simulation.networks} networks in "
        f"{simulation.seconds:.2f} s, after {simulation.compile_seconds:.1f} s of compiling"
    )
    console.print(f"written   to {folder}: {', '.join(path.name for path in written)}")


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow study`\n"
    "- `gradflow study scripts/phase-diagram.toml --out results/phase-diagram`\n"
    "- `gradflow study --depth 50 --networks 5000 --out results/deep`\n"
    "- `gradflow study --width 100 --depth 10 --networks 200 --out results/small --json`\n"
    "- `gradflow report results/study`"
)
def study(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="A study file (TOML) instead.", show_default=False)
    ] = None,
    width: Annotated[int, typer.Option(help="Units a layer.")] = 1000,
    depth: Depth = 30,
    networks: Annotated[int, typer.Option(help="Networks of each Gaussian setting.")] = 1000,
    uniform_networks: Annotated[int, typer.Option(help="Networks of each uniform setting.")] = 50,
    seed: Seed = 0,
    out: Out = None,
    auto: Annotated[
        bool, typer.Option("--distributed", help="FILE: join the processes of SLURM or a cloud.")
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="FILE: HOST:PORT of the first process, to join others.")
    ] = None,
    processes: Annotated[int, typer.Option(help="How many processes there are.")] = 1,
    process: Annotated[int, typer.Option(help="Which of them this is, from 0 on.")] = 0,
    share: Annotated[
        str | None,
        typer.Option(help="FILE: draw a part, as 2/8; `gradflow merge` puts all together."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask whether what is said of vanishing and exploding gradients is true: the main job.

    Eleven settings, from the logistic sigmoid with N(0, 1) weights to what is said to mend it, on
    images of handwritten digits; then each claim of the note that this project began with. The
    options are numbers in the study file that this is, which is kept in the --out.

    With a FILE, what that describes: a grid of networks, as many as there is time for.

    Either may be interrupted in any way, and the same command goes on; with more networks it adds
    those. With any other change it takes another --out.
    """
    if file is not None:
        for option in ("width", "depth", "networks", "uniform_networks", "seed"):
            check_instead(context, option, "file")
        check_instead(context, "coordinator", "auto")
        check_beside(context, "processes", "coordinator")
        check_beside(context, "process", "coordinator")
        if not 0 <= process < check_count("processes", processes):
            raise InputError(
                f"process is {process} and processes is {processes}; it is from 0 to one less"
            )
        with studying.distributed(auto, coordinator, processes, process):
            studying.run_file(file, given_folder(out, Path("results") / file.stem), share, as_json)
        return
    for option in ("auto", "coordinator", "processes", "process", "share"):
        if is_given(context, option):
            name = {"auto": "distributed"}.get(option, option)
            raise InputError(
                f"--{name} goes with a study file; the main job is `gradflow study "
                "scripts/paper.toml`, without its claims and figures"
            )
    from gradflow import note  # noqa: PLC0415  (JAX is slow to import)

    check_count("networks", networks, 2)
    check_count("uniform_networks", uniform_networks, 2)
    check_depth(depth)
    folder = given_folder(out, Path("results") / "study")
    described = note.study(
        width=width,
        depth=depth,
        networks_gaussian=networks,
        networks_uniform=uniform_networks,
        seed=seed,
    )
    studying.run(described, folder)
    found = note.findings(folder)
    datasets = {
        setting.name: comparison.to_xarray().assign_attrs(seed=seed)
        for setting, comparison in found.comparisons.items()
    }
    written = [
        write_netcdf(dataset, folder / f"{file_name(name)}.nc")
        for name, dataset in datasets.items()
    ]
    written += _figures_of_study(found, datasets, folder)
    summary = {
        "settings": {
            setting.name: _as_json(comparison, datasets[setting.name])
            for setting, comparison in found.comparisons.items()
        },
        "claims": [vars(claim) for claim in found.claims],
        "critical_width": found.sweep.critical_width,
        "files": [str(path) for path in written],
    }
    written.append(write_json(summary, folder / "study.json"))
    if as_json:
        print_json(summary)
        return
    console = make_console()
    console.print(_table_of_study(found))
    for setting, comparison in found.comparisons.items():
        console.print(f"{setting.name}: {comparison.agreement}", highlight=False)
    console.print(_table_of_claims(found))
    console.print(_table_of_widths(found))
    console.print(f"written to {folder}: {', '.join(path.name for path in written)}")


def _figures_of_one(name: str, dataset: xarray.Dataset, folder: Path) -> list[Path]:
    from gradflow import figures  # noqa: PLC0415  (matplotlib is slow to import)

    family = {name: {"all inputs": dataset}}
    return [
        figures.save(draw(family), folder / f"{figure.replace('_', '-')}.png")
        for figure, draw in figures.OF_COMPARISONS.items()
    ]


def _figures_of_study(found: Any, datasets: dict[str, xarray.Dataset], folder: Path) -> list[Path]:
    from gradflow import figures  # noqa: PLC0415

    panels: dict[str, dict[str, xarray.Dataset]] = {}
    for setting in found.comparisons:
        panels.setdefault(setting.activation, {})[setting.note] = datasets[setting.name]
    paper = {
        f"tanh, five layers of 1000, {weights} weights": {"simulation": simulation.to_xarray()}
        for weights, simulation in found.paper.items()
    }
    sweep = found.sweep
    drawn = {
        "activation-variance": figures.activation_variance(panels),
        "gradient-norm": figures.gradient_norm(panels),
        "saturation": figures.saturation(panels),
        "paper-figure-6-activations": figures.activation_histograms(paper),
        "paper-figure-7-gradients": figures.gradient_histograms(paper),
        "chi-against-width": figures.chi_against_width(
            sweep.curves, sweep.points, sweep.critical_width
        ),
    }
    return [figures.save(figure, folder / f"{file}.png") for file, figure in drawn.items()]


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow remedies`\n"
    "- `gradflow remedies --activation relu --weights glorot --depth 50`\n"
    "- `gradflow remedies --activation tanh --weights unscaled --width 100 --json`"
)
def remedies(
    context: typer.Context,
    activation: Phi = "logistic",
    weights: Annotated[str, typer.Option(help="The ensemble, by name.")] = "unscaled",
    sigma_b: Annotated[float, typer.Option(help="Standard deviation of the biases.")] = 0.0,
    width: Annotated[int, typer.Option(help="Units a layer.")] = 200,
    depth: Depth = 30,
    networks: Annotated[int, typer.Option(help="How many random networks of each.")] = 200,
    inputs: Annotated[int, typer.Option(help="How many digit images go through each.")] = 4,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """How to tackle vanishing or exploding gradients: a sick network, and every remedy beside it.

    Each remedy's theory and simulation at the start of training, ranked by the depth that trains.
    """
    from gradflow import figures  # noqa: PLC0415  (JAX is slow to import)
    from gradflow import remedies as study_of_remedies  # noqa: PLC0415

    check_count("networks", networks, 2)
    check_count("inputs", inputs, 4)
    check_depth(check_count("depth", depth, 3))
    check_deviation("sigma_b", sigma_b)
    check_count("width", width, 2)
    folder = results_folder(context, "activation", "weights", out=out)
    with show_progress() as report:
        found = study_of_remedies.run(
            activation,
            weights,
            sigma_b=sigma_b,
            width=width,
            depth=depth,
            inputs=inputs,
            networks_each=networks,
            seed=seed,
            progress=report,
        )
    outcomes = (found.sick, *found.outcomes)
    datasets = {o.remedy.name: o.comparison.to_xarray() for o in outcomes}
    written = [
        write_netcdf(dataset.assign_attrs(seed=seed), folder / f"{file_name(name)}.nc")
        for name, dataset in datasets.items()
    ]
    written.append(figures.save(figures.remedies(datasets), folder / "remedies.png"))
    summary = [_outcome_as_json(outcome) for outcome in outcomes]
    report_ = {"remedies": summary, "not_applicable": found.not_applicable}
    written.append(write_json(report_, folder / "remedies.json"))
    if as_json:
        print_json({**report_, "files": [str(path) for path in written]})
        return
    console = make_console()
    network = found.sick.remedy.network
    console.print(_table_of_remedies(f"{network.name}: {shape_label(network.widths)}", outcomes))
    for name, reason in found.not_applicable.items():
        console.print(f"left out  {name}: {reason}")
    console.print(
        "noted     gradient clipping bounds the step, not the disparity between layers: it changes "
        "none of these numbers"
    )
    console.print(
        "noted     μP is for learning rates that suit every width, and does nothing about depth"
    )
    console.print(f"written   to {folder}: {', '.join(path.name for path in written)}")


def _outcome_as_json(outcome: Any) -> dict[str, Any]:
    remedy, comparison = outcome.remedy, outcome.comparison
    numbers = {
        name: value for name, value in vars(outcome).items() if name not in ("remedy", "comparison")
    }
    return {
        "remedy": remedy.name,
        "network": remedy.network.name,
        "verdict": comparison.verdict.kind,
        **{
            n: v if math.isfinite(v) else None if math.isnan(v) else str(v)
            for n, v in numbers.items()
        },
        "agreement": comparison.agreement,
        "cost": remedy.cost,
        "caveat": remedy.caveat,
    }


def _table_of_remedies(title: str, outcomes: Any) -> Table:
    table = Table(
        title=f"{title}; the remedies that train deepest first",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("remedy", ratio=3)
    table.add_column("")
    for column in ("gradient\na layer", "variance\na layer", "correlation\nat the top"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("trains to\ndepth", "condition\nlog₁₀"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("costs; caveat", ratio=4)
    for o in outcomes:
        table.add_row(
            o.remedy.name,
            "theory",
            f"×{o.gradient_theory:.4g}",
            f"×{o.variance_theory:.4g}",
            f"{o.correlation_theory:.3f}",
            f"{o.trainable_depth:.0f}",
            "",
            f"costs {o.remedy.cost}" if o.remedy.cost else "",
        )
        table.add_row(
            "",
            "measured",
            f"×{o.gradient:.4g}",
            f"×{o.variance:.4g}",
            f"{o.correlation:.3f}",
            "",
            "-" if math.isnan(o.log10_condition_number) else f"{o.log10_condition_number:.1f}",
            o.remedy.caveat,
            end_section=True,
        )
    return table


def _said_of_ranges(result: Any) -> list[str]:
    """Return, for each float type, in which layers signals and gradients leave its range."""
    from gradflow import float_ranges  # noqa: PLC0415

    found = result.float_ranges
    return [
        f"{of}: {float_ranges.sentence(found['theory'], found['simulation'], of)}"
        for of in float_ranges.DTYPES
    ]


def _table_of_one(result: Any) -> Table:
    from gradflow.comparison import Status  # noqa: PLC0415

    network = result.simulation.network
    of = f"{result.simulation.networks} networks"
    table = Table(
        title=f"{network.name}: {shape_label(network.widths)}, {of}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    columns = ("statistic", "layer", "theory", "measured ± s.e.", "z", "difference")
    for column in (*columns, "of this width", "spread (theory)", ""):
        left = column in ("statistic", "")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    words = {
        Status.NOT_COMPARED: "",
        Status.AGREES: "agrees",
        Status.FINITE_WIDTH: "finite width",
        Status.DIFFERS: "differs",
    }
    for key, contrast in result.by_statistic.items():
        name, logarithmic = BY_KEY[key].name, BY_KEY[key].logarithmic
        estimate = result.simulation.estimates[key]
        # Where it is kept as a logarithm, so are these: no float may hold the number.
        kept_as_log = BY_KEY[key].log
        for layer in _first_middle_last(len(contrast.theory)):
            if math.isnan(estimate.value[layer]):  # the top layer's χ
                continue
            error, z = contrast.standard_error[layer], contrast.z[layer]
            if kept_as_log and error > 0:  # relative
                error = contrast.measured[layer] + math.log(error)
            elif kept_as_log:
                error = math.nan if math.isnan(error) else -math.inf
            spread, of_theory = contrast.deviation[layer], contrast.theory_deviation[layer]
            table.add_row(
                name,
                str(layer + 1),
                _number(contrast.theory[layer], 4, log=kept_as_log),
                f"{_number(contrast.measured[layer], 4, log=kept_as_log)} ± "
                f"{_number(error, 1, log=kept_as_log)}",
                "" if math.isnan(z) else f"{z:+.1f}",
                _percent(contrast.relative_difference[layer]),
                _percent(_relative(contrast, layer, logarithmic)),
                f"{_number(spread)} ({_number(of_theory)})",
                words[Status(int(contrast.status[layer]))],
            )
        table.add_section()
    return table


def _relative(contrast: Any, layer: int, logarithmic: bool) -> float:
    shift, theory = float(contrast.shift[layer]), abs(float(contrast.theory[layer]))
    if logarithmic:
        return math.expm1(shift)
    return shift / theory if theory > contrast.standard_error[layer] else math.nan


def _number(value: float, digits: int = 2, *, log: bool = False) -> str:
    """Return a number, or that of this natural logarithm, in so many digits."""
    if math.isnan(value):
        return "-"
    if not log:
        return f"{value:.{digits}g}"
    if math.isinf(value) or abs(value) < _LARGEST_LOG:
        return f"{math.exp(value):.{digits}g}"
    whole, rest = divmod(value / math.log(10), 1)
    # Rounding may make 10 of the digits; `e` knows.
    digits_of, _, carried = f"{10**rest:.{digits - 1}e}".partition("e")
    return f"{digits_of}e{int(whole) + int(carried):+d}"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:+.2g} %"


def _first_middle_last(depth: int) -> list[int]:
    return sorted({0, (depth - 1) // 2, depth - 1})


def _table_of_study(found: Any) -> Table:
    first = next(iter(found.comparisons.values())).simulation
    layers = _first_middle_last(first.network.depth)
    table = Table(
        title=f"{shape_label(first.network.widths)}, two images of handwritten digits; "
        "q is the forward variance, gradient its factor going down a layer",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    # Where a terminal is narrow, words are broken, and no number is cut.
    table.add_column("setting")
    table.add_column("")
    for layer in layers:
        table.add_column(f"q\nlayer {layer + 1}", justify="right", no_wrap=True)
    for layer in (layers[0], layers[-1]):
        table.add_column(f"saturated\nlayer {layer + 1}", justify="right", no_wrap=True)
    table.add_column("gradient\na layer", justify="right", no_wrap=True)
    table.add_column("verdict")
    for setting, comparison in found.comparisons.items():
        verdict, simulation, theory = comparison.verdict, comparison.simulation, comparison.theory
        since = verdict.saturated_from
        table.add_row(
            setting.name,
            f"{simulation.networks} networks",
            *_cells(simulation["q"].value, simulation["saturation"].value, verdict.factor, layers),
            verdict.kind,
        )
        table.add_row(
            "",
            "theory",
            *_cells(theory["q"], theory["saturation"], verdict.factor_theory, layers),
            "" if since is None else f"saturated from layer {since}",
            end_section=True,
        )
    return table


def _cells(q: Any, saturation: Any, factor: float, layers: list[int]) -> list[str]:
    return [
        *(f"{float(q[layer]):.3g}" for layer in layers),
        *(f"{100 * float(saturation[layer]):.1f} %" for layer in (layers[0], layers[-1])),
        f"×{factor:.3g}",
    ]


def _table_of_claims(found: Any) -> Table:
    table = Table(
        title="What the note claims, and what was found at initialisation",
        show_lines=True,
        expand=True,
    )
    table.add_column("the note says", ratio=3)
    table.add_column("it is", ratio=2)
    table.add_column("found", ratio=6)
    for claim in found.claims:
        table.add_row(claim.claim, claim.verdict, claim.found)
    return table


def _table_of_widths(found: Any) -> Table:
    table = Table(
        title="χ of un-scaled N(0,1) networks; logistic ones are critical at width "
        f"{found.sweep.critical_width:.2f}"
    )
    for column in ("activation", "width", "measured ± s.e.", "theory"):
        table.add_column(column, justify="left" if column == "activation" else "right")
    for name, points in found.sweep.points.items():
        for width, chi, error, theory in zip(*points, found.sweep.theory[name], strict=True):
            table.add_row(name, str(width), f"{chi:.3f} ± {error:.3f}", f"{theory:.3f}")
    return table


def _as_json(result: Any, dataset: xarray.Dataset) -> dict[str, Any]:
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
