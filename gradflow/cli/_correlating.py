"""The command correlation: the map of two inputs' correlation, with its figure."""

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from gradflow._checks import check_count
from gradflow._files import write_netcdf
from gradflow._tables import digits, table
from gradflow.cli._options import (
    Json,
    Out,
    app,
    check_memory,
    described_by,
    network_options,
    results_folder,
    variances,
)
from gradflow.cli._output import finite_or_text, show

# Bytes that a correlation takes while it is computed, rounded up.
_POINT = 10_000


@app.command(
    cls=described_by(activation="tanh", sigma_w2=1.5, sigma_b2=0.05),
    epilog="Examples:\n\n"
    "- `gradflow correlation --activation tanh --sigma-w2 2 --sigma-b2 0.05`\n"
    "- `gradflow correlation --activation 'sin(30)' --sigma-w2 0.004 --sigma-b2 0.01`",
)
def correlation(
    context: typer.Context,
    start: Annotated[float, typer.Option(help="q of the first layer.")] = 1.0,
    points: Annotated[int, typer.Option(help="Correlations from -1 to 1.")] = 201,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Draw the next layer's correlation of two inputs over their correlation, at q*."""
    from gradflow import figures  # noqa: PLC0415  (JAX is slow to import)
    from gradflow.theory import summary  # noqa: PLC0415

    described = network_options(context)
    folder = results_folder(context, "activation", out=out)
    check_memory("points", check_count("points", points, 2), points * _POINT)
    dataset = summary.correlation_map(
        described["activation"],
        **variances(described),
        c=np.linspace(-1, 1, points),
        start=start,
    )
    written = [
        write_netcdf(dataset, folder / "correlation.nc"),
        figures.save(figures.correlation_map(dataset), folder / "correlation.png"),
    ]
    report: dict[str, Any] = {
        name: finite_or_text(value) if isinstance(value, float) else value
        for name, value in dataset.attrs.items()
    }
    maps = {name: dataset[name].values for name in ("correlation_map", "correlation_map_slope")}
    report |= {"c": dataset.c.values.tolist()} | {n: v.tolist() for n, v in maps.items()}

    def parts() -> Iterator[Table | str]:
        shown = np.unique(np.linspace(0, points - 1, 11).round().astype(int))
        rows = [
            {
                "c": digits(float(dataset.c[i])),
                "C(c)": digits(float(maps["correlation_map"][i])),
                "C'(c)": digits(float(maps["correlation_map_slope"][i])),
            }
            for i in shown
        ]
        yield table("the next layer's correlation, and its slope", rows)
        yield "q* = {q_star:.6g}, c* = {c_star:.6g}, χ₁ = {chi1:.6g}".format(**dataset.attrs)

    show(report, parts, as_json=as_json, folder=folder, written=written)
