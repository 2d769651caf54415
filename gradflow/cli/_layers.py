"""The theory of any network, layer by layer, as the command `theory` prints it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import typer
from rich.table import Table

from gradflow._checks import check_count
from gradflow._tables import number, percent, table
from gradflow.cli._options import check_depth, chosen_inputs, is_given, shape_label
from gradflow.cli._output import finite_or_text, show
from gradflow.errors import InputError

# Options of networks that `theory` answers by fixed points; any other makes it go layer by layer.
_PLAIN = ("activation", "sigma_w", "sigma_w2", "sigma_b", "sigma_b2", "depth", "width")
# The columns of the tables by layer, few enough to fit on a page.
_TABLES = {
    "signals": ("q", "activation_mean", "activation_variance", "saturation", "correlation"),
    "gradients": ("chi", "gradient_variance", "log_gradient_norm", "weight_gradient_variance"),
}
_WIDTH = "of this width"


def is_plain(context: typer.Context) -> bool:
    """Whether only options of equal layers are given, each a weight matrix and φ."""
    own = {one.name for one in context.command.params}
    return not any(is_given(context, n) for n in context.params if n not in (*own, *_PLAIN))


def show_layers(context: typer.Context, described: dict[str, Any], *, as_json: bool) -> None:
    """Print the theory of a described network with its inputs at every layer.

    Raises
    ------
    InputError
        If there is no such network, or it has no such inputs.
    """
    from gradflow import _schema  # noqa: PLC0415  (JAX is slow to import)
    from gradflow.theory import float64  # noqa: PLC0415

    for name in ("start", "correlations"):
        if is_given(context, name):
            raise InputError(
                f"{name} is {context.params[name]!r}; it is of equal layers alone, and this "
                "network's signals begin with its inputs: give those, as --mean-square"
            )
    if not is_given(context, "sigma_b2"):  # weights may have biases of their own
        described.pop("sigma_b2", None)
    if "depth" in described:
        check_count("width", described["width"])
        check_depth(described["depth"])
    inputs = chosen_inputs(context, described)
    network = _schema.network(described)
    prediction, corrections = float64.predict_and_correct(network, inputs.rows)
    values = _by_name(prediction, corrections)
    report = {
        "network": network.name,
        "widths": list(network.widths),
        "inputs": inputs.record,
        "why_missing": prediction.why_missing,
        "layers": {
            str(layer + 1): {name: finite_or_text(v[layer]) for name, v in values.items()}
            for layer in range(network.depth)
        },
    }

    def parts() -> Iterator[Table | str]:
        for title, names in _TABLES.items():
            shown = [name for name in names if name in values]
            rows = [_row(values, layer, shown) for layer in some_layers(network.depth)]
            yield table(f"{network.name}, {shape_label(network.widths)}: {title}", rows)
        yield f"inputs    {inputs.record['inputs']}"
        # Over all positions of an input, which a layer may merge.
        positions = np.log(network.sites(len(inputs.rows))) / 2
        yield f"gradients {_change(values['log_gradient_norm'] + positions)}"
        if prediction.why_missing is not None:
            yield f"missing   {prediction.why_missing}"

    show(report, parts, as_json=as_json)


def _by_name(prediction: Any, corrections: Any) -> dict[str, np.ndarray]:
    """Values by the names that results have, and shifts that the width makes, where known."""
    from gradflow import statistics  # noqa: PLC0415  (JAX is slow to import)
    from gradflow._labels import with_names  # noqa: PLC0415

    values = {name: np.asarray(v) for name, v in with_names(prediction.values).items()}
    for one in statistics.ALL if corrections is not None else ():
        if one.key in corrections.shift:
            values[f"{one.name}_finite_width_shift"] = np.asarray(corrections.shift[one.key])
    return values


def _row(values: Mapping[str, np.ndarray], layer: int, names: list[str]) -> dict[str, str]:
    """A layer's numbers by column, the shift of a mean that the width makes beside them."""
    row = {"layer": str(layer + 1)}
    for name in names:
        log = values.get(f"log_{name}")
        row[name] = number((values[name] if log is None else log)[layer], 6, log=log is not None)
        shift = values.get(f"{name}_finite_width_shift")
        if log is not None and shift is not None:
            row[f"{name},\n{_WIDTH}"] = percent(math.expm1(float(shift[layer])))
    return row


def _change(logs: np.ndarray) -> str:
    """How ‖∂C/∂z‖ changes on its way down, in words."""
    steps, change = len(logs) - 1, float(logs[0] - logs[-1])
    if not steps or math.isnan(change):
        return "their change going down is not known" if steps else "one layer has no factor"
    return (
        f"×{number(change / steps, 4, log=True)} a layer, ×{number(change, 4, log=True)} over "
        f"{steps + 1} layers in the norm of ∂C/∂z"
    )


def some_layers(depth: int) -> list[int]:
    """Indices of the first layers, ever fewer of the others, and of the last."""
    round_ones = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return sorted({*(n - 1 for n in round_ones if n <= depth), depth - 1})
