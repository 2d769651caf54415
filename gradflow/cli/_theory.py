"""Commands of theory alone: theory, critical, phase, spectrum, prescribe."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from gradflow._checks import check_count
from gradflow._files import write_netcdf
from gradflow._tables import digits, table, table_of_values
from gradflow.cli._layers import is_plain, show_layers, some_layers
from gradflow.cli._options import (
    LARGEST_DEVIATION,
    Json,
    Out,
    Seed,
    app,
    check_beside,
    check_depth,
    check_instead,
    check_memory,
    described_by,
    network_options,
    results_folder,
    shape_label,
    variances,
)
from gradflow.cli._output import finite_or_text, show
from gradflow.cli._words import words
from gradflow.errors import InputError

if TYPE_CHECKING:
    from gradflow.activations import Activation

# Bytes that a point takes while it is computed: measured, and rounded up.
_PHASE_POINT, _SPECTRUM_POINT = 40_000, 100_000


@app.command(
    cls=described_by(
        every=True,
        batch=2,
        activation="tanh",
        sigma_w2=1.0,
        sigma_b2=0.0,
        depth=10,
        width=1000,
        tokens=8,
    ),
    epilog="Examples:\n\n"
    "- `gradflow theory --activation tanh --sigma-w2 1.5 --sigma-b2 0.05`\n"
    "- `gradflow theory --activation gelu --sigma-w 1.4 --sigma-b 0.2 --json`\n"
    "- `gradflow theory --activation relu --kind residual --scale depth --norm layer`\n"
    "- `gradflow theory --activation tanh --weights glorot --widths 2,50,50,1 --input coordinates`",
)
def theory(
    context: typer.Context,
    start: Annotated[float, typer.Option(help="q of the first layer.")] = 1.0,
    correlations: Annotated[
        str, typer.Option(help="Where the correlation map is printed: c, with commas between.")
    ] = "-1,-0.5,0,0.5,0.9,0.99,0.999999,1",
    as_json: Json = False,
) -> None:
    """Where signals of infinitely wide networks settle, on which depth scales, and what trains.

    Depth and width are for what depends on them, the first order in 1/width among others. With
    any other option of a network or of its inputs, it is the theory of that network with those
    inputs, layer by layer: of equal layers alone are there fixed points.
    """
    described = network_options(context)
    if not is_plain(context):
        show_layers(context, described, as_json=as_json)
        return
    from gradflow import activations  # noqa: PLC0415  (JAX is slow to import)
    from gradflow.theory import summary  # noqa: PLC0415

    depth = described["depth"]
    by_text = _parse_correlations(correlations)
    check_count("width", described["width"])
    quantities = summary.summarise(
        activations.get(described["activation"]),
        **variances(described),
        start=start,
        correlations=list(by_text.values()),
        depth=check_depth(depth),
        width=described["width"],
    )
    layers = {
        str(number + 1): {name: values[number] for name, values in quantities["layers"].items()}
        for number in range(depth)
    }
    maps = {name: dict(zip(by_text, quantities[name], strict=False)) for name in _MAPS}
    report = _plain_report(quantities | maps | {"layers": layers})

    def parts() -> Iterator[Table | str]:
        yield _table_of_points("fixed points of the length map", report["fixed_points"])
        yield _table_of_quantities(f"from q = {start:g}", report)
        if note := _NOTES.get(report["status"]):
            yield note
        for title, columns in _LAYER_TABLES.items():
            rows = [
                {"layer": number, **{name: report["layers"][number][name] for name in columns}}
                for number in (str(layer + 1) for layer in some_layers(depth))
            ]
            yield _table_of_points(title, rows)

    show(report, parts, as_json=as_json)


@app.command(
    cls=described_by("sigma_b2", "sigma_w2", "sigma_b", "sigma_w", activation="tanh"),
    epilog="Examples:\n\n"
    "- `gradflow critical --activation tanh --sigma-b2 0.05`\n"
    "- `gradflow critical --activation logistic --sigma-w2 200 --json`",
)
def critical(context: typer.Context, as_json: Json = False) -> None:
    """All weights and biases at which gradients neither vanish nor explode, χ₁ = 1.

    Those with this σ_b², which is 0 without either option, or those with this σ_w².
    """
    import jax  # noqa: PLC0415  (JAX is slow to import)

    from gradflow import activations  # noqa: PLC0415
    from gradflow.theory import criticality  # noqa: PLC0415

    described = network_options(context)
    phi = activations.get(described["activation"])
    given = variances(described) or {"sigma_b2": 0.0}
    sigma_w2, sigma_b2 = given.get("sigma_w2"), given.get("sigma_b2")
    with jax.enable_x64(True):
        points = criticality.critical_points(phi, sigma_b2=sigma_b2, sigma_w2=sigma_w2)
        half = criticality.half_stable_points(phi)
        infinite = _at_infinity(phi, sigma_w2, sigma_b2)
    report: dict[str, Any] = {
        "activation": phi.name,
        "universality_class": criticality.universality_class(phi).value,
        "solutions": [_critical_point(point) for point in _present(points)],
        "half_stable": [_plain_report(point) for point in _present(half)],
        "at_infinity": infinite,
    }

    def parts() -> Iterator[Table | str]:
        yield _table_of_points("critical points, χ₁ = 1", report["solutions"])
        if report["half_stable"]:
            yield _table_of_points("half-stable points, χ₁ = χ∥ = 1", report["half_stable"])
        if infinite:
            yield (
                f"where q grows without limit, χ₁ → 1 at σ_w² = {infinite['sigma_w2']:.10g} "
                f"(σ_w = {infinite['sigma_w']:.10g})"
            )
        yield f"universality class: {report['universality_class']}"

    show(report, parts, as_json=as_json)


_Squares = Annotated[
    tuple[float, float] | None,
    typer.Option(help="The same as a range of its square.", show_default=False),
]


@app.command(
    cls=described_by(activation="tanh"),
    epilog="Examples:\n\n"
    "- `gradflow phase --activation tanh`\n"
    "- `gradflow phase --activation gelu --sigma-w 1 2.5 --sigma-b 0 1.5 --points 200`",
)
def phase(
    context: typer.Context,
    sigma_w: Annotated[tuple[float, float], typer.Option(help="σ_w from, to.")] = (0.5, 3.0),
    sigma_b: Annotated[tuple[float, float], typer.Option(help="σ_b from, to.")] = (0.0, 1.0),
    sigma_w2: _Squares = None,
    sigma_b2: _Squares = None,
    points: Annotated[int, typer.Option(help="Points along each side of the grid.")] = 100,
    start: Annotated[float, typer.Option(help="q of the first layer.")] = 1.0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Order, chaos and divergence over σ_w and σ_b, with depth scales and the critical line."""
    from gradflow import activations, figures  # noqa: PLC0415  (JAX is slow to import)
    from gradflow.theory import criticality  # noqa: PLC0415

    phi = activations.get(context.params["activation"])
    check_memory("points", check_count("points", points, 2), points**2 * _PHASE_POINT)
    sigma_w = _deviations(context, "sigma_w", sigma_w, sigma_w2)
    sigma_b = _deviations(context, "sigma_b", sigma_b, sigma_b2)
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
        {
            "sigma_b": float(bias),
            "sigma_w": finite_or_text(weight),
            "q_star": finite_or_text(length),
        }
        for bias, weights, lengths in zip(
            dataset.sigma_b.values,
            dataset.critical_sigma_w.values,
            dataset.critical_q_star.values,
            strict=True,
        )
        for weight, length in zip(weights, lengths, strict=True)
        if math.isfinite(weight)
    ]

    def parts() -> Iterator[Table | str]:
        named = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items() if share)
        yield f"of this plane: {named}"
        yield _table_of_points("critical line, χ₁ = 1", line[:: max(1, len(line) // 10)])

    report = {"activation": phi.name, "shares": shares, "critical_line": line}
    show(report, parts, as_json=as_json, folder=folder, written=written)


def _deviations(
    context: typer.Context,
    name: str,
    deviations: tuple[float, float],
    squares: tuple[float, float] | None,
) -> tuple[float, float]:
    """A range of σ_w or σ_b, which may be given as one of its square."""
    check_instead(context, f"{name}2", name)
    if squares is not None and all(square >= 0 for square in squares):
        deviations = (math.sqrt(squares[0]), math.sqrt(squares[1]))
    low, high = deviations if squares is None else squares
    if not (0 <= low < high and deviations[1] <= LARGEST_DEVIATION):
        raise InputError(
            f"{name if squares is None else f'{name}2'} is from {low:g} to {high:g}; it is from a "
            f"number of 0 or more to a larger one, and {name} is at most {LARGEST_DEVIATION:g}"
        )
    return deviations


@app.command(
    cls=described_by(
        "sigma_w", "sigma_b", activation="tanh", sigma_w2=1.5, sigma_b2=0.05, depth=10
    ),
    epilog="Examples:\n\n"
    "- `gradflow spectrum --activation tanh --sigma-w2 1.76 --sigma-b2 0.05 --depth 10`\n"
    "- `gradflow spectrum --activation relu --sigma-w2 2 --depth 5 --weights orthogonal`\n"
    "- `gradflow spectrum --activation erf --q 0.25 --depth 3 --simulate 20 --width 400`",
)
def spectrum(
    context: typer.Context,
    q: Annotated[
        float | None,
        typer.Option(help="Pre-activations' variance; q* without it.", show_default=False),
    ] = None,
    weights: Annotated[str, typer.Option(help="gaussian or orthogonal.")] = "gaussian",
    points: Annotated[int, typer.Option(help="Places where the density is computed.")] = 1000,
    simulate: Annotated[int, typer.Option(help="Networks for a histogram; 0 for none.")] = 0,
    width: Annotated[int, typer.Option(help="Units a layer of those networks.")] = 300,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show the law of the end-to-end Jacobian's singular values: moments, atoms, edges, density."""
    from gradflow import activations, figures, spectra  # noqa: PLC0415  (JAX is slow to import)

    described = network_options(context)
    phi = activations.get(described["activation"])
    check_memory("points", check_count("points", points, 2), points * _SPECTRUM_POINT)
    check_count("width", width)
    check_count("depth", described["depth"])
    check_beside(context, "width", "simulate")
    for name in ("sigma_b2", "sigma_b"):
        check_instead(context, "q", name)
    if check_count("simulate", simulate, 0):
        # A network's layer Jacobians, and some copies of one, in float64.
        check_memory("width", width, 8 * width**2 * (described["depth"] + 4))
    folder = results_folder(context, "activation", "weights", out=out)
    dataset, report = spectra.run(
        phi,
        **variances(described),
        depth=described["depth"],
        q=q,
        weights=weights,
        points=points,
        networks=simulate,
        width=width,
        seed=seed,
    )
    written = [write_netcdf(dataset, folder / "spectrum.nc")]
    written.append(figures.save(figures.spectrum(dataset), folder / "spectrum.png"))

    def parts() -> Iterator[Table | str]:
        values = {}
        for name, value in report.items():
            if name == "atoms":
                masses = (
                    f"{100 * atom['mass']:.6g} % at s² = {atom['squared_singular_value']:.6g}"
                    for atom in value
                )
                values["atoms"] = ", ".join(masses) or "none"
            elif isinstance(value, list):
                values[words(name)] = ", ".join(map(digits, value))
            else:
                values[words(name)] = digits(value)
        yield table_of_values(dataset.attrs["title"], values)

    show(report, parts, as_json=as_json, folder=folder, written=written)


@app.command(
    cls=described_by("widths", "sigma_b2", "sigma_b", activation="tanh", width=1000, depth=50),
    epilog="Examples:\n\n"
    "- `gradflow prescribe --activation tanh --depth 100`\n"
    "- `gradflow prescribe --activation gelu --widths 784,512,512,512,10 --dtype bfloat16`\n"
    "- `gradflow prescribe --activation softplus --depth 100 --transform dks`",
)
def prescribe(
    context: typer.Context,
    dtype: Annotated[str, typer.Option(help="Float type of training.")] = "float32",
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
    """Find the weights and biases that keep gradients, and show what the usual rules give.

    An input has 64 components, or the first of --widths. Of several critical points, that with
    this σ_b² or this q* is taken.
    """
    from gradflow.theory import prescription  # noqa: PLC0415  (JAX is slow to import)

    described = network_options(context)
    check_beside(context, "target", "transform")
    widths = described.get("widths") or (
        64,
        *[check_count("width", described["width"])] * check_depth(described["depth"]),
    )
    prescribed = prescription.prescribe(
        described["activation"],
        widths,
        dtype=dtype,
        sigma_b2=variances(described).get("sigma_b2"),
        q=q,
        transform=transform,
        target=target,
    )
    expectations = [
        {
            name: value.name.lower() if name == "status" else _plain_or_text(value)
            for name, value in vars(expectation).items()
        }
        for expectation in (prescribed.expected, *prescribed.instead)
    ]
    report = {
        "activation": prescribed.activation.name,
        "universality_class": prescribed.universality_class.value,
        "sigma_w2": prescribed.sigma_w2,
        "sigma_b2": prescribed.sigma_b2,
        "q_star": finite_or_text(prescribed.q_star),
        "chi_par": prescribed.chi_par,
        "weight_sd": list(prescribed.weight_sd),
        "bias_sd": prescribed.bias_sd,
        "input_scale": prescribed.input_scale,
        "transformation": prescribed.transformation and vars(prescribed.transformation),
        "dtype": dtype,
        "expected": expectations[0],
        "instead": expectations[1:],
    }

    def parts() -> Iterator[Table | str]:
        yield _table_of_prescription(report, widths)
        yield _table_of_expectations(expectations)
        yield _advice(prescribed, dtype)

    show(report, parts, as_json=as_json)


def _plain_or_text(value: Any) -> float | str | None:
    return value if isinstance(value, str) else finite_or_text(value)


def _table_of_prescription(report: Mapping[str, Any], widths: tuple[int, ...]) -> Table:
    rows = {
        "universality class": report["universality_class"],
        "σ_w², σ_b²": f"{report['sigma_w2']:.10g}, {report['sigma_b2']:.10g}",
        "q*, χ∥": f"{digits(report['q_star'])}, {report['chi_par']:.6g}",
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
    return table_of_values(f"{report['activation']}, {shape_label(widths)}", rows)


def _table_of_expectations(expectations: list[dict[str, Any]]) -> Table:
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
    made = []
    for label, name in rows.items():
        row = {"": label}
        for expectation in expectations:
            value = expectation[name]
            row[expectation["name"]] = (
                f"{round(value, 12):.4g}"
                if isinstance(value, float)
                else digits(value).replace("_", " ")
            )
        made.append(row)
    return table("what to expect, for inputs of unit mean square", made, text=("",))


def _advice(prescribed: Any, dtype: str) -> str:
    expected = prescribed.expected
    depth = len(prescribed.weight_sd)
    sentence = (
        f"gradients change by ×{expected.gradient_factor:.4g} a layer, "
        f"×{10**expected.log10_gradient:.3g} over {depth} layers"
    )
    if math.isfinite(expected.representable_depth):
        sentence += f"; they leave {dtype} after {expected.representable_depth:.3g} layers"
    if prescribed.q_star == 0:
        sentence += "; lengths decay, like a power of the depth (q* = 0): a σ_b² > 0 keeps them"
    if prescribed.chi_par > 1 + 1e-9:
        sentence += (
            f"; the length is not kept stably (χ∥ = {prescribed.chi_par:.3g} > 1): it leaves q* in "
            f"about {1 / math.log(prescribed.chi_par):.2g} layers"
        )
    return sentence


def _parse_correlations(text: str) -> dict[str, float]:
    """Read correlations as -0.5,0,0.9: the numbers, each by its text."""
    try:
        by_text = {part.strip(): float(part) for part in text.split(",")}
    except ValueError:
        by_text = {}
    if not by_text or not all(abs(c) <= 1 for c in by_text.values()):
        raise InputError(
            f"correlations is {text!r}; it is numbers from -1 to 1 with commas between, as -0.5,0.9"
        )
    return by_text


# The quantities of a report that are at each of the correlations.
_MAPS = ("correlation_map", "correlation_map_slope")
# Sentences on lengths that settle nowhere.
_NOTES = {
    "diverges": "q grows without limit: there is no q*, and chi1, chi_par and what follows from "
    "them are what they tend to (inf: they grow too; -: they tend to nothing, or not visibly)",
    "oscillates": "q goes to and fro about a q* that repels it: nothing settles",
    "out_of_range": "q settles beyond the range of a float",
}

# The quantities that are printed of each layer, as columns that fit on a page.
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


def _plain_report(value: Any) -> Any:
    """The report for JSON: numbers by `finite_or_text`, all else as it is."""
    if isinstance(value, dict):
        return {name: _plain_report(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain_report(one) for one in value]
    return finite_or_text(value) if isinstance(value, float) else value


def _present(points: Any) -> list[dict[str, float]]:
    """The points that exist, each by the names of its fields."""
    rows = np.flatnonzero(np.isfinite(points.sigma_w2))
    return [{name: float(v[row]) for name, v in points._asdict().items()} for row in rows]


def _critical_point(point: Mapping[str, float]) -> dict[str, Any]:
    """A critical point, and in words how correlations approach 1 there."""
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
    """The σ_w² at which χ₁ → 1 as q grows without limit: with this σ_b², or if it is this σ_w²."""
    from gradflow.theory import criticality  # noqa: PLC0415  (JAX is slow to import)

    limit = float(criticality.critical_at_infinity(phi, 1.0 if sigma_b2 is None else sigma_b2))
    wanted = sigma_w2 is None or math.isclose(limit, sigma_w2, rel_tol=1e-12)
    if math.isnan(limit) or not wanted:
        return None
    point = {"q_star": math.inf, "sigma_w2": limit, "sigma_w": math.sqrt(limit)}
    return _plain_report(point)


def _table_of_points(title: str, points: list[dict[str, Any]]) -> Table:
    rows = [{words(name): digits(value) for name, value in point.items()} for point in points]
    return table(title, rows)


def _table_of_quantities(title: str, report: Mapping[str, Any]) -> Table:
    values: dict[str, str] = {}
    for name, value in report.items():
        if name == "representable_depth":
            for dtype, depth in value.items():
                values[f"depth where a gradient leaves {dtype}"] = digits(depth)
        elif name in _MAPS:
            for correlation, one in value.items():
                values[f"{words(name)} at c = {correlation}"] = digits(one)
        elif name == "jacobian":
            for weights, numbers in value.items():
                for key, one in numbers.items():
                    values[f"Jacobian at q*, {weights} weights: {words(key)}"] = digits(one)
        elif name == "finite_width":
            for key, one in value.items():
                values[words(key)] = digits(one)
        elif name not in ("fixed_points", "layers"):
            values[words(name)] = digits(value)
    return table_of_values(title, values)
