"""The command for the study of the note that the project began with."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from gradflow._checks import check_count
from gradflow._files import write_netcdf
from gradflow._tables import table
from gradflow.cli._comparing import comparison_as_json, first_middle_last
from gradflow.cli._options import (
    Json,
    Out,
    Seed,
    app,
    check_depth,
    file_name,
    given_folder,
    shape_label,
)
from gradflow.cli._output import show, write_json
from gradflow.cli._running import run

if TYPE_CHECKING:
    import xarray


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow note`\n"
    "- `gradflow note --depth 50 --networks 5000 --out results/deep`\n"
    "- `gradflow note --width 100 --depth 10 --networks 200 --out results/small --json`\n"
    "- `gradflow report results/note`"
)
def note(
    width: Annotated[int, typer.Option(help="Units a layer.")] = 1000,
    depth: Annotated[int, typer.Option(help="Layers.")] = 30,
    networks: Annotated[int, typer.Option(help="Networks of each Gaussian setting.")] = 1000,
    uniform_networks: Annotated[int, typer.Option(help="Networks of each uniform setting.")] = 50,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Ask whether what is said of vanishing and exploding gradients is true: the main job.

    Eleven settings, from the logistic sigmoid with N(0, 1) weights to what is said to mend it, on
    images of handwritten digits; then each claim of the note that this project began with. The
    options are numbers in the study file `scripts/paper.toml`, which is kept in the --out.

    After an interruption the same command resumes; with more networks it adds those. With any
    other change it takes another --out.
    """
    from gradflow import _note as note_study  # noqa: PLC0415  (JAX is slow to import)

    check_count("networks", networks, 2)
    check_count("uniform_networks", uniform_networks, 2)
    check_depth(depth)
    folder = given_folder(out, Path("results") / "note")
    described = note_study.study(
        width=width,
        depth=depth,
        networks_gaussian=networks,
        networks_uniform=uniform_networks,
        seed=seed,
    )
    run(described, folder)
    findings = note_study.findings(folder)
    datasets = {
        setting.name: comparison.to_xarray().assign_attrs(seed=seed)
        for setting, comparison in findings.comparisons.items()
    }
    written = [
        write_netcdf(dataset, folder / f"{file_name(name)}.nc")
        for name, dataset in datasets.items()
    ]
    written += _figures(findings, datasets, folder)
    report = {
        "settings": {
            setting.name: comparison_as_json(comparison, datasets[setting.name])
            for setting, comparison in findings.comparisons.items()
        },
        "claims": [vars(claim) for claim in findings.claims],
        "critical_width": findings.sweep.critical_width,
        "files": [str(path) for path in written],
    }
    written.append(write_json(report, folder / "study.json"))

    def parts() -> Iterator[Table | str]:
        yield _table_of_settings(findings)
        for setting, comparison in findings.comparisons.items():
            yield f"{setting.name}: {comparison.agreement}"
        yield _table_of_claims(findings)
        yield _table_of_widths(findings)

    show(report, parts, as_json=as_json, folder=folder, written=written)


def _figures(findings: Any, datasets: "dict[str, xarray.Dataset]", folder: Path) -> list[Path]:
    from gradflow import figures  # noqa: PLC0415

    panels: dict[str, dict[str, xarray.Dataset]] = {}
    for setting in findings.comparisons:
        panels.setdefault(setting.activation, {})[setting.note] = datasets[setting.name]
    paper = {
        f"tanh, five layers of 1000, {weights} weights": {"simulation": simulation.to_xarray()}
        for weights, simulation in findings.paper.items()
    }
    sweep = findings.sweep
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


def _table_of_settings(findings: Any) -> Table:
    first = next(iter(findings.comparisons.values())).simulation
    layers = first_middle_last(first.network.depth)
    rows: list[dict[str, str] | None] = []
    for setting, comparison in findings.comparisons.items():
        verdict, simulation, theory = comparison.verdict, comparison.simulation, comparison.theory
        since = verdict.saturated_from
        measured = _cells(
            simulation["q"].value, simulation["saturation"].value, verdict.factor, layers
        )
        predicted = _cells(theory["q"], theory["saturation"], verdict.factor_theory, layers)
        rows += [
            {
                "setting": setting.name,
                "": f"{simulation.networks} networks",
                **measured,
                "verdict": verdict.kind,
            },
            {
                "": "theory",
                **predicted,
                "verdict": "" if since is None else f"saturated from layer {since}",
            },
            None,
        ]
    return table(
        f"{shape_label(first.network.widths)}, two images of handwritten digits; "
        "q is the forward variance, gradient its factor going down a layer",
        rows,
        text=("setting", "", "verdict"),
    )


def _cells(q: Any, saturation: Any, factor: float, layers: list[int]) -> dict[str, str]:
    """The numbers of a setting by column: of some layers, and the gradient's factor a layer."""
    ends = (layers[0], layers[-1])
    return (
        {f"q\nlayer {layer + 1}": f"{float(q[layer]):.3g}" for layer in layers}
        | {f"saturated\nlayer {n + 1}": f"{100 * float(saturation[n]):.1f} %" for n in ends}
        | {"gradient\na layer": f"×{factor:.3g}"}
    )


def _table_of_claims(findings: Any) -> Table:
    rows: list[dict[str, str] | None] = []
    for claim in findings.claims:
        row = {"the note says": claim.claim, "verdict": claim.verdict, "found": claim.found}
        rows += [row, None]
    return table(
        "What the note claims, and what was found at initialisation",
        rows,
        text=("the note says", "verdict", "found"),
        ratios={"the note says": 3, "verdict": 2, "found": 6},
    )


def _table_of_widths(findings: Any) -> Table:
    rows = [
        {
            "activation": name,
            "width": str(width),
            "measured ± s.e.": f"{chi:.3f} ± {error:.3f}",
            "theory": f"{theory:.3f}",
        }
        for name, points in findings.sweep.points.items()
        for width, chi, error, theory in zip(*points, findings.sweep.theory[name], strict=True)
    ]
    return table(
        "χ of un-scaled N(0,1) networks; logistic ones are critical at width "
        f"{findings.sweep.critical_width:.2f}",
        rows,
        text=("activation",),
    )
