"""The command attention: heads, one layer and depth, of exchangeable tokens."""

import math
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from gradflow._checks import check_count
from gradflow._tables import digits, table, table_of_values
from gradflow.cli._layers import some_layers
from gradflow.cli._options import Json, app, check_beside
from gradflow.cli._output import finite_or_text, show

# What is asked of each sublayer beside the tokens that it ends with, and its words.
_COLUMNS = {
    "q": "q",
    "correlation": "ρ",
    "variance": "v",
    "gradient_variance": "gradient/top",
    "gradient_correlation": "its ρ",
    "common_share": "common share",
}


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow attention --tokens 128 --kappa 256`\n"
    "- `gradflow attention --tokens 8 --correlation 0.2 --sublayers 24 --norm post`\n"
    "- `gradflow attention --tokens 32 --kappa 0.0944 --ov 0.0039 --q 0.0008 --sublayers 24 "
    "--activation gelu --sigma-1 0.554 --sigma-2 0.226`"
)
def attention(
    context: typer.Context,
    tokens: Annotated[int, typer.Option(help="Tokens of an input, T.")] = 128,
    kappa: Annotated[float, typer.Option(help="σ_q² σ_k²: d Var W_Q times d Var W_K.")] = 1.0,
    ov: Annotated[float, typer.Option(help="σ_v² σ_o², of values and W_O.")] = 1.0,
    q: Annotated[float, typer.Option(help="Second moment of the tokens.")] = 1.0,
    correlation: Annotated[float, typer.Option(help="ρ of any two tokens.")] = 0.0,
    sublayers: Annotated[int, typer.Option(help="Sublayers of a transformer; 0: one layer.")] = 0,
    norm: Annotated[str, typer.Option(help="pre, post, peri or none.")] = "pre",
    activation: Annotated[
        str, typer.Option(help="Of every second sublayer; none: all are attention.")
    ] = "relu",
    sigma_1: Annotated[float, typer.Option(help="√(d Var W₁) of those.")] = math.sqrt(2),
    sigma_2: Annotated[float, typer.Option(help="√(n Var W₂).")] = 1.0,
    branch: Annotated[float, typer.Option(help="α that branches are multiplied by.")] = 1.0,
    as_json: Json = False,
) -> None:
    """What attention does at initialisation to tokens that all have one correlation.

    The law of attention weights; one layer's tokens and gradient, by the paths through values and
    through scores; and a transformer's, sublayer by sublayer. Exact at infinite width for any
    number of tokens.
    """
    import jax  # noqa: PLC0415  (JAX is slow to import)

    from gradflow.theory import attention as theory  # noqa: PLC0415

    for name in ("norm", "activation", "sigma_1", "sigma_2", "branch"):
        check_beside(context, name, "sublayers")
    feed_forward = None
    if activation != "none":
        feed_forward = theory.FeedForward(activation, sigma_1, sigma_2)
    by_layer: list[dict[str, Any]] = []
    with jax.enable_x64(True):
        one = theory.layer(tokens, q, correlation, kappa=kappa, ov=ov)
        head = theory.heads(tokens, one.variance, correlation)
        limits = theory.large_tokens(tokens, one.variance)
        if check_count("sublayers", sublayers, 0):
            walk = theory.walk(
                tokens,
                sublayers,
                norm=norm,
                kappa=kappa,
                ov=ov,
                feed_forward=feed_forward,
                branch=branch,
                q=q,
                correlation=correlation,
            )
            values = {**walk._asdict(), "variance": np.append(np.nan, walk.variance)}
            with np.errstate(over="ignore"):
                values["gradient_variance"] = np.exp(values["log_gradient_variance"])
            by_layer = [
                {"after": number, **{n: finite_or_text(v[number]) for n, v in values.items()}}
                for number in range(sublayers + 1)
            ]
    report: dict[str, Any] = {
        part: {name: finite_or_text(value) for name, value in of._asdict().items()}
        for part, of in (("heads", head), ("layer", one), ("large_tokens", limits))
    }
    report["heads"]["entropy_bits"] = float(head.entropy) / math.log(2)
    report["sublayers"] = by_layer

    def parts() -> Iterator[Table | str]:
        yield table_of_values(f"attention over {tokens} tokens", _of_heads(report))
        yield table_of_values("one layer, without skip and norm", _of_layer(report["layer"]))
        if by_layer:
            shown = (0, *(number + 1 for number in some_layers(sublayers)))
            columns = {"after": "after", **_COLUMNS}
            rows = [
                {words: digits(by_layer[number][name]) for name, words in columns.items()}
                for number in shown
            ]
            yield table(f"{norm}-norm sublayers, gradient from the top", rows)

    show(report, parts, as_json=as_json)


def _of_heads(report: dict[str, Any]) -> dict[str, str]:
    heads, limits = report["heads"], report["large_tokens"]
    values = {
        "variance v of a row's scores": report["layer"]["variance"],
        "2 ln T, where many tokens freeze": limits["critical_variance"],
        "P = E Σ A²": heads["P"],
        "C = E Σ A A', of two rows": heads["C"],
        "entropy, in nats": heads["entropy"],
        "entropy, in bits": heads["entropy_bits"],
        "largest weight": heads["largest"],
    }
    return {words: digits(value) for words, value in values.items()}


def _of_layer(layer: dict[str, Any]) -> dict[str, str]:
    q, off = layer["q"], layer["off_diagonal"]
    values = {
        "q'": q,
        "ρ'": off / q if q else None,
        "gradient by values": layer["value"],
        "gradient by scores": layer["score"],
        "gradient of two tokens by values": layer["value_cross"],
        "gradient of two tokens by scores": layer["score_cross"],
    }
    return {words: digits(value) for words, value in values.items()}
