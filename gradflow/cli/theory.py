"""Commands of theory alone: theory, critical, phase, spectrum, prescribe."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from gradflow._checks import check_count
from gradflow.cli._shared import (
    LARGEST_DEVIATION,
    Depth,
    Json,
    Out,
    Phi,
    Seed,
    app,
    check_beside,
    check_depth,
    check_instead,
    check_memory,
    make_console,
    parse_widths,
    print_json,
    results_folder,
    shape_label,
    write_netcdf,
)
from gradflow.cli._words import words
from gradflow.errors import InputError

if TYPE_CHECKING:
    from gradflow.activations import Activation

# What a point takes while it is computed, in bytes: measured, and rounded up.
_PHASE_POINT, _SPECTRUM_POINT = 40_000, 100_000


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow theory --activation tanh --sigma-w2 1.5 --sigma-b2 0.05`\n"
    "- `gradflow theory --activation gelu --sigma-w2 2 --sigma-b2 0.05 --json`"
)
def theory(
    activation: Phi = "tanh",
    sigma_w2: Annotated[float, typer.Option(help="σ_w²: weights of variance σ_w²/fan_in.")] = 1.0,
    sigma_b2: Annotated[float, typer.Option(help="σ_b²: the variance of the biases.")] = 0.0,
    start: Annotated[float, typer.Option(help="q of the first layer.")] = 1.0,
    correlations: Annotated[
        str, typer.Option(help="Where the correlation map is printed: c, with commas between.")
    ] = "-1,-0.5,0,0.5,0.9,0.99,0.999999,1",
    depth: Annotated[int, typer.Option(help="Layers, for what depends on them.")] = 10,
    width: Annotated[int, typer.Option(help="Units a layer, for what depends on them.")] = 1000,
    as_json: Json = False,
) -> None:
    """Where signals of infinitely wide networks settle, on which depth scales, and what trains."""
    from gradflow import activations  # noqa: PLC0415  (JAX is slow to import)
    from gradflow.theory import summary  # noqa: PLC0415

    places = _parse_correlations(correlations)
    check_count("width", width)
    found = summary.summarise(
        activations.get(activation),
        sigma_w2,
        sigma_b2,
        start=start,
        correlations=list(places.values()),
        depth=check_depth(depth),
        width=width,
    )
    layers = {
        str(number + 1): {name: values[number] for name, values in found["layers"].items()}
        for number in range(depth)
    }
    maps = {name: dict(zip(places, found[name], strict=False)) for name in _MAPS}
    report = _plain_report(found | maps | {"layers": layers})
    if as_json:
        print_json(report)
        return
    console = make_console()
    console.print(_table_of_points("fixed points of the length map", report["fixed_points"]))
    console.print(_table_of_values(f"from q = {start:g}", report))
    if note := _NOTES.get(report["status"]):
        console.print(note)
    for title, columns in _LAYER_TABLES.items():
        shown = [
            {"layer": number, **{name: report["layers"][number][name] for name in columns}}
            for number in _some_layers(depth)
        ]
        console.print(_table_of_points(title, shown))


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow critical --activation tanh --sigma-b2 0.05`\n"
    "- `gradflow critical --activation logistic --sigma-w2 200 --json`"
)
def critical(
    activation: Phi = "tanh",
    sigma_b2: Annotated[
        float | None, typer.Option(help="All critical points with this σ_b²; 0 if none is given.")
    ] = None,
    sigma_w2: Annotated[
        float | None, typer.Option(help="Or all with this σ_w².", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """All weights and biases at which gradients neither vanish nor explode, χ₁ = 1."""
    import jax  # noqa: PLC0415  (JAX is slow to import)

    from gradflow import activations  # noqa: PLC0415
    from gradflow.theory import criticality  # noqa: PLC0415

    phi = activations.get(activation)
    if sigma_b2 is None and sigma_w2 is None:
        sigma_b2 = 0.0
    with jax.enable_x64(True):
        found = criticality.critical_points(phi, sigma_b2=sigma_b2, sigma_w2=sigma_w2)
        half = criticality.half_stable_points(phi)
        infinite = _at_infinity(phi, sigma_w2, sigma_b2)
    report: dict[str, Any] = {
        "activation": phi.name,
        "universality_class": criticality.universality_class(phi).value,
        "solutions": [_critical_point(point) for point in _present(found)],
        "half_stable": [_plain_report(point) for point in _present(half)],
        "at_infinity": infinite,
    }
    if as_json:
        print_json(report)
        return
    console = make_console()
    console.print(_table_of_points("critical points, χ₁ = 1", report["solutions"]))
    if report["half_stable"]:
        console.print(_table_of_points("half-stable points, χ₁ = χ∥ = 1", report["half_stable"]))
    if infinite:
        console.print(
            f"where q grows without limit, χ₁ → 1 at σ_w² = {infinite['sigma_w2']:.10g} "
            f"(σ_w = {infinite['sigma_w']:.10g})"
        )
    console.print(f"universality class: {report['universality_class']}")


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow phase --activation tanh`\n"
    "- `gradflow phase --activation gelu --sigma-w 1 2.5 --sigma-b 0 1.5 --points 200`"
)
def phase(
    context: typer.Context,
    activation: Phi = "tanh",
    sigma_w: Annotated[tuple[float, float], typer.Option(help="From, to.")] = (0.5, 3.0),
    sigma_b: Annotated[tuple[float, float], typer.Option(help="From, to.")] = (0.0, 1.0),
    points: Annotated[int, typer.Option(help="Points along each side of the grid.")] = 100,
    start: Annotated[float, typer.Option(help="q of the first layer.")] = 1.0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Order, chaos and divergence over σ_w and σ_b, with depth scales and the critical line."""
    from gradflow import activations, figures  # noqa: PLC0415  (JAX is slow to import)
    from gradflow.theory import criticality  # noqa: PLC0415

    phi = activations.get(activation)
    check_memory("points", check_count("points", points, 2), points**2 * _PHASE_POINT)
    for name, (low, high) in {"sigma_w": sigma_w, "sigma_b": sigma_b}.items():
        if not 0 <= low < high <= LARGEST_DEVIATION:
            raise InputError(
                f"{name} is from {low:g} to {high:g}; it is from a number of 0 or more to a larger "
                f"one, of at most {LARGEST_DEVIATION:g}"
            )
    folder = results_folder(context, "activation", out=out)
    dataset = criticality.phase_diagram(
        phi, np.linspace(*sigma_w, points), np.linspace(*sigma_b, points), start=start
    )
    written = [
        write_netcdf(dataset, folder / "phase.nc"),
        figures.save(figures.phase_diagram(dataset), folder / "phase.png"),
    ]
    shares = {
        member.name.lower(): float((dataset.phase == member).mean()) for member in criticality.Phase
    }
    line = [
        {"sigma_b": float(bias), "sigma_w": _plain(weight), "q_star": _plain(length)}
        for bias, weights, lengths in zip(
            dataset.sigma_b.values,
            dataset.critical_sigma_w.values,
            dataset.critical_q_star.values,
            strict=True,
        )
        for weight, length in zip(weights, lengths, strict=True)
        if math.isfinite(weight)
    ]
    if as_json:
        print_json(
            {
                "activation": phi.name,
                "shares": shares,
                "critical_line": line,
                "files": [str(path) for path in written],
            }
        )
        return
    console = make_console()
    said = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items() if share)
    console.print(f"of this plane: {said}")
    every = max(1, len(line) // 10)
    console.print(_table_of_points("critical line, χ₁ = 1", line[::every]))
    console.print(f"written to {folder}: {', '.join(path.name for path in written)}")


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow spectrum --activation tanh --sigma-w2 1.76 --sigma-b2 0.05 --depth 10`\n"
    "- `gradflow spectrum --activation relu --sigma-w2 2 --depth 5 --weights orthogonal`\n"
    "- `gradflow spectrum --activation erf --q 0.25 --depth 3 --simulate 20 --width 400`"
)
def spectrum(
    context: typer.Context,
    activation: Phi = "tanh",
    sigma_w2: Annotated[float, typer.Option(help="σ_w²: weights of variance σ_w²/fan_in.")] = 1.5,
    sigma_b2: Annotated[float, typer.Option(help="σ_b²: the variance of the biases.")] = 0.05,
    q: Annotated[
        float | None,
        typer.Option(help="Pre-activations' variance; q* without it.", show_default=False),
    ] = None,
    depth: Annotated[int, typer.Option(help="Layers.")] = 10,
    weights: Annotated[str, typer.Option(help="gaussian or orthogonal.")] = "gaussian",
    points: Annotated[int, typer.Option(help="Places where the density is computed.")] = 1000,
    simulate: Annotated[int, typer.Option(help="Networks for a histogram; 0 for none.")] = 0,
    width: Annotated[int, typer.Option(help="Units a layer of those networks.")] = 300,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show the law of the end-to-end Jacobian's singular values: moments, atoms, edges, density."""
    from gradflow import (  # noqa: PLC0415  (JAX is slow to import)
        activations,
        figures,
        spectra,  # noqa: PLC0415
    )

    phi = activations.get(activation)
    check_memory("points", check_count("points", points, 2), points * _SPECTRUM_POINT)
    check_count("width", width)
    check_count("depth", depth)
    check_beside(context, "width", "simulate")
    check_instead(context, "q", "sigma_b2")
    if check_count("simulate", simulate, 0):
        # A network's layer Jacobians, and some copies of one, in float64.
        check_memory("width", width, 8 * width**2 * (depth + 4))
    folder = results_folder(context, "activation", "weights", out=out)
    dataset, report = spectra.run(
        phi,
        sigma_w2,
        sigma_b2,
        q=q,
        depth=depth,
        weights=weights,
        points=points,
        networks=simulate,
        width=width,
        seed=seed,
    )
    written = [write_netcdf(dataset, folder / "spectrum.nc")]
    written.append(figures.save(figures.spectrum(dataset), folder / "spectrum.png"))
    if as_json:
        print_json({**report, "files": [str(path) for path in written]})
        return
    console = make_console()
    table = Table(title=dataset.attrs["title"], show_header=False)
    for name, value in report.items():
        if name == "atoms":
            for atom in value:
                place = atom["squared_singular_value"]
                table.add_row("atom", f"{100 * atom['mass']:.6g} % at s² = {place:.6g}")
        elif isinstance(value, list):
            table.add_row(words(name), ", ".join(map(_said, value)))
        else:
            table.add_row(words(name), _said(value))
    console.print(table)
    console.print(f"written to {folder}: {', '.join(path.name for path in written)}")


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow prescribe --activation tanh --depth 100`\n"
    "- `gradflow prescribe --activation gelu --widths 784,512,512,512,10 --dtype bfloat16`\n"
    "- `gradflow prescribe --activation softplus --depth 100 --transform dks`"
)
def prescribe(
    context: typer.Context,
    activation: Phi = "tanh",
    width: Annotated[int, typer.Option(help="Units a layer, above 64 inputs.")] = 1000,
    depth: Depth = 50,
    widths: Annotated[
        str | None,
        typer.Option(help="Input and every layer, as 784,300,100,10, instead of width and depth."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Float type of training.")] = "float32",
    sigma_b2: Annotated[
        float | None, typer.Option(help="The critical point with this σ_b².", show_default=False)
    ] = None,
    q: Annotated[
        float | None, typer.Option(help="The critical point with this q*.", show_default=False)
    ] = None,
    transform: Annotated[
        str | None, typer.Option(help="Transform φ for this depth: dks or tat.", show_default=False)
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="The transform's ζ, τ or η; 1.5, 0.3, 0.9.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the weights and biases that keep gradients, and show what the usual rules give."""
    from gradflow.theory import prescription  # noqa: PLC0415  (JAX is slow to import)

    for option in ("width", "depth"):
        check_instead(context, "widths", option)
    check_beside(context, "target", "transform")
    shape = parse_widths(widths) if widths is not None else None
    shape = shape or (64, *[check_count("width", width)] * check_depth(depth))
    found = prescription.prescribe(
        activation, shape, dtype=dtype, sigma_b2=sigma_b2, q=q, transform=transform, target=target
    )
    expectations = [
        {
            name: value.name.lower() if name == "status" else _plain_or_text(value)
            for name, value in vars(expectation).items()
        }
        for expectation in (found.expected, *found.instead)
    ]
    report = {
        "activation": found.activation.name,
        "universality_class": found.universality_class.value,
        "sigma_w2": found.sigma_w2,
        "sigma_b2": found.sigma_b2,
        "q_star": _plain(found.q_star),
        "chi_par": found.chi_par,
        "weight_sd": list(found.weight_sd),
        "bias_sd": found.bias_sd,
        "input_scale": found.input_scale,
        "transformation": found.transformation and vars(found.transformation),
        "dtype": dtype,
        "expected": expectations[0],
        "instead": expectations[1:],
    }
    if as_json:
        print_json(report)
        return
    console = make_console()
    console.print(_table_of_prescription(report, shape))
    console.print(_table_of_expectations(expectations))
    console.print(_advice(found, dtype))


def _plain_or_text(value: Any) -> float | str | None:
    return value if isinstance(value, str) else _plain(value)


def _table_of_prescription(report: Mapping[str, Any], widths: tuple[int, ...]) -> Table:
    table = Table(title=f"{report['activation']}, {shape_label(widths)}", show_header=False)
    rows = {
        "universality class": report["universality_class"],
        "σ_w², σ_b²": f"{report['sigma_w2']:.10g}, {report['sigma_b2']:.10g}",
        "q*, χ∥": f"{_said(report['q_star'])}, {report['chi_par']:.6g}",
        "multiply unit inputs by": f"{report['input_scale']:.6g}",
        "standard deviation of biases": f"{report['bias_sd']:.6g}",
    }
    runs: list[list[int]] = []
    for layer in range(1, len(widths)):
        if runs and widths[layer - 1] == widths[runs[-1][0] - 1]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    for run in runs:
        layers = f"layer {run[0]}" if len(run) == 1 else f"layers {run[0]} to {run[-1]}"
        rows[f"standard deviation of weights, {layers}"] = f"{report['weight_sd'][run[0] - 1]:.6g}"
    for name, value in (report["transformation"] or {}).items():
        rows[f"φ's {name.replace('_', ' ')}"] = f"{value:.10g}"
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _table_of_expectations(expectations: list[dict[str, Any]]) -> Table:
    table = Table(title="what to expect, for inputs of unit mean square")
    table.add_column("")
    for expectation in expectations:
        table.add_column(expectation["name"], justify="right")
    rows = {
        "σ_w² of equal layers": "sigma_w2",
        "σ_b²": "sigma_b2",
        "the length": "status",
        "q*": "q_star",
        "χ₁": "chi1",
        "ξ_c (layers)": "xi_c",
        "ξ_∇ (layers)": "xi_grad",
        "gradient, factor a layer": "gradient_factor",
        "gradient, log₁₀ from top to bottom": "log10_gradient",
        "q of the top layer": "q_top",
        "trainable depth, 6 ξ (layers)": "trainable_depth",
        "depth where gradients leave the float": "representable_depth",
    }
    for label, name in rows.items():
        values = [expectation[name] for expectation in expectations]
        said = [
            f"{round(v, 12):.4g}" if isinstance(v, float) else _said(v).replace("_", " ")
            for v in values
        ]
        table.add_row(label, *said)
    return table


def _advice(found: Any, dtype: str) -> str:
    expected = found.expected
    depth = len(found.weight_sd)
    sentence = (
        f"gradients change by ×{expected.gradient_factor:.4g} a layer, "
        f"×{10**expected.log10_gradient:.3g} over {depth} layers"
    )
    if math.isfinite(expected.representable_depth):
        sentence += f"; they leave {dtype} after {expected.representable_depth:.3g} layers"
    if found.q_star == 0:
        sentence += "; lengths decay, like a power of the depth (q* = 0): a σ_b² > 0 keeps them"
    if found.chi_par > 1 + 1e-9:
        sentence += (
            f"; the length is not kept stably (χ∥ = {found.chi_par:.3g} > 1): it leaves q* in "
            f"about {1 / math.log(found.chi_par):.2g} layers"
        )
    return sentence


def _parse_correlations(text: str) -> dict[str, float]:
    """Return the numbers of -0.5,0,0.9, each by what was written."""
    try:
        places = {part.strip(): float(part) for part in text.split(",")}
    except ValueError:
        places = {}
    if not places or not all(abs(c) <= 1 for c in places.values()):
        raise InputError(
            f"correlations is {text!r}; it is numbers from -1 to 1 with commas between, as -0.5,0.9"
        )
    return places


# What of a report is at each correlation that was asked for.
_MAPS = ("correlation_map", "correlation_map_slope")
# What is to be said of lengths that settle nowhere.
_NOTES = {
    "diverges": "q grows without limit: there is no q*, and chi1, chi_par and what follows from "
    "them are what they tend to (inf: they grow too; -: they tend to nothing, or not visibly)",
    "oscillates": "q goes to and fro about a q* that repels it: nothing settles",
    "out_of_range": "q settles beyond the range of a float",
}

# What is printed of each layer; columns that fit on a page.
_LAYER_TABLES = {
    "layer by layer": (
        "q",
        "activation_mean",
        "activation_second_moment",
        "chi",
        "jacobian_norm",
        "log_jacobian_norm",
    ),
    "gain of a tangent along the input, and of one orthogonal to it": (
        "gain_parallel",
        "gain_orthogonal",
        "gain_ratio",
    ),
    "first order in 1/n of a unit's variance, given the layers below": (
        "K",
        "V4",
        "G1",
        "V4_over_K2",
    ),
}


def _some_layers(depth: int) -> list[str]:
    """Return the first layers' numbers, ever fewer of the others', and the last's."""
    round_ones = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return [str(number) for number in sorted({*(n for n in round_ones if n <= depth), depth})]


def _plain_report(value: Any) -> Any:
    """Return what is in the report for JSON: numbers by `_plain`, all else as it is."""
    if isinstance(value, dict):
        return {name: _plain_report(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain_report(one) for one in value]
    return _plain(value) if isinstance(value, float) else value


def _present(points: Any) -> list[dict[str, float]]:
    """Return the points that are there, each by the names of the fields."""
    there = np.flatnonzero(np.isfinite(points.sigma_w2))
    return [{name: float(v[place]) for name, v in points._asdict().items()} for place in there]


def _critical_point(point: Mapping[str, float]) -> dict[str, Any]:
    """Return a critical point, and in words how correlations approach 1 there."""
    # At the end of the line, q* = 0, the approach is not defined; ReLU's lengths are neither kept
    # nor lost.
    decay = "1/(coefficient l)" if point["exponent"] == 2 else "4/(coefficient l)²"
    critical_slope = abs(abs(point["chi_par"]) - 1) < 1e-12
    return {
        **_plain_report(dict(point)),
        "sigma_w": math.sqrt(point["sigma_w2"]),
        "q_stable": None if critical_slope else abs(point["chi_par"]) < 1,
        "one_minus_c": decay if math.isfinite(point["coefficient"]) else None,
    }


def _at_infinity(
    phi: "Activation", sigma_w2: float | None, sigma_b2: float | None
) -> dict[str, Any] | None:
    """Return where χ₁ → 1 as q grows without limit: with this σ_b², or with this σ_w²."""
    from gradflow.theory import criticality  # noqa: PLC0415  (JAX is slow to import)

    found = float(criticality.critical_at_infinity(phi, 1.0 if sigma_b2 is None else sigma_b2))
    asked = sigma_w2 is None or math.isclose(found, sigma_w2, rel_tol=1e-12)
    if math.isnan(found) or not asked:
        return None
    point = {"q_star": math.inf, "sigma_w2": found, "sigma_w": math.sqrt(found)}
    return _plain_report(point)


def _plain(value: Any) -> float | str | None:
    """Return a number for JSON; 'inf' or '-inf' where it diverges, None where there is none."""
    number = float(value)
    return None if math.isnan(number) else number if math.isfinite(number) else str(number)


def _said(value: Any) -> str:
    return "-" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)


def _table_of_points(title: str, points: list[dict[str, Any]]) -> Table:
    table = Table(title=title if points else f"{title}: none")
    for name in points[0] if points else ():
        table.add_column(words(name), justify="right")
    for point in points:
        table.add_row(*map(_said, point.values()))
    return table


def _table_of_values(title: str, report: Mapping[str, Any]) -> Table:
    table = Table("quantity", "value", title=title, show_header=False)
    for name, value in report.items():
        if name == "representable_depth":
            for dtype, depth in value.items():
                table.add_row(f"depth where a gradient leaves {dtype}", _said(depth))
        elif name in _MAPS:
            for place, one in value.items():
                table.add_row(f"{words(name)} at c = {place}", _said(one))
        elif name == "jacobian":
            for weights, numbers in value.items():
                for key, one in numbers.items():
                    said = f"Jacobian at q*, {weights} weights: {words(key)}"
                    table.add_row(said, _said(one))
        elif name == "finite_width":
            for key, one in value.items():
                table.add_row(words(key), _said(one))
        elif name not in ("fixed_points", "layers"):
            table.add_row(words(name), _said(value))
    return table
