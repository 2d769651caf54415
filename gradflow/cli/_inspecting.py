"""The command that inspects a model of the user's own: its gradients, measured and by theory."""

import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from gradflow import _imports
from gradflow._checks import LARGEST_COUNT, check_count
from gradflow.cli._options import Json, Out, Seed, app, check_memory, results_folder
from gradflow.cli._output import finite_or_text, show, show_progress
from gradflow.errors import InputError

if TYPE_CHECKING:
    from gradflow.inspection import Inspection

_SPEC = re.compile(r"(?P<shape>\d+(?:,\d+)*)(?::(?P<dtype>\w+))?(?:<(?P<bound>\d+))?")
_INTEGERS = ("int", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
_FLOATS = ("float", "float16", "bfloat16", "float32", "float64")
_ALLOWED = (
    "it is a shape, as 32,784, and maybe a dtype and, of whole numbers, the first one too large, "
    "as 32,20:int<1000"
)
# What `int` and `float` are, and the bound of whole numbers without one.
_PLAIN = {"int": "int32", "float": "float32"}
_BOUND = 2


@app.command(
    name="inspect",
    epilog="Examples:\n\n"
    "- `gradflow inspect my_package.models:make_model --input 32,784`\n"
    "- `gradflow inspect my_model:Transformer --input '8,64:int<1000' --networks 20 --json`\n"
    "- `gradflow inspect my_model:net --data batch.npz --loss my_model:loss --out results/net`",
)
def inspect_model(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="module:name of the model, or of what makes it from nothing, a key or rngs.",
            show_default=False,
        ),
    ],
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE[:DTYPE][<N]",
            help="An input, drawn: floats from N(0, 1), ints below N. Once for each input.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Inputs from a file instead: .npy, or .npz, in order; those named target… go to "
            "the loss.",
            metavar="FILE",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="module:function of the outputs, and of the targets in --data, if any."),
    ] = None,
    networks: Annotated[int, typer.Option(help="How many re-initialisations.")] = 50,
    cure: Annotated[
        bool,
        typer.Option(help="Whether to look for the cause and the cure, behind the table."),
    ] = True,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """A model of your own, as it is: where its gradients vanish or explode, and why.

    Its module is imported, from the current directory first. It may be a module of Flax, Equinox,
    Haiku or Keras on JAX, or a pair of functions (init, apply).
    """
    check_count("networks", networks)
    if (shapes is None) == (data is None):
        raise InputError(
            f"input is {shapes!r} and data is {data!r}; give the shape of each input, as "
            "--input 32,784, or a file of inputs"
        )
    drawn = [_drawn(text) for text in shapes or ()]
    os.environ.setdefault("KERAS_BACKEND", "jax")  # which Keras reads when it is imported
    with _quiet():
        described = _imports.object_at(model, "model")
        function = None if loss is None else _imports.function_at(loss, "loss")
    inputs, targets = _read(data) if data is not None else (_draw(drawn, seed), ())
    if targets and function is None:
        raise InputError(f"data is {data!r}, which has targets, and loss is None; give both")
    folder = results_folder(context, "model", out=out)

    from gradflow.inspection import _inspecting  # noqa: PLC0415  (JAX is slow to import)

    with show_progress() as report, _quiet():
        result, cured = _inspecting.begin(
            described,
            inputs=inputs,
            key=seed,
            networks=networks,
            loss=function,
            targets=targets or None,
            progress=lambda done, total: report(model, done, total),
        )
    # The cure and figures take longer than the table, which is what is waited for.
    if not as_json:
        show({}, lambda: _parts(result), as_json=False)
    if cure:
        with show_progress("trials") as report, _quiet():
            result = cured(lambda done, total: report("cure", done, total))
    if not as_json and result.cause:
        show({}, lambda: _cure_parts(result), as_json=False)
    show(
        _as_json(result) if as_json else {},
        lambda: iter(()),
        as_json=as_json,
        folder=folder,
        written=result.save(folder),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """What a user's module prints goes to standard error: standard output is for results."""
    with redirect_stdout(sys.stderr or io.StringIO()):
        yield


def _parts(result: "Inspection") -> Iterator[Table | str]:
    yield f"verdict   {result.verdict.sentence}"
    yield result.table()
    yield f"agreement {result.agreement}"
    yield f"theory    {result.theory_ends}"
    if result.mode:
        yield f"noted     {result.name} is applied with {result.mode}"


def _cure_parts(result: "Inspection") -> Iterator[str]:
    yield f"cause     {result.cause}"
    yield f"remedies  {result.remedies}"


def _as_json(result: "Inspection") -> dict[str, Any]:
    """An inspection and its labelled data as JSON has them."""
    dataset = result.to_xarray()
    by_axis: dict[str, dict[str, Any]] = {"layer": {}, "parameter": {}}
    for name, values in dataset.variables.items():
        by_axis[str(values.dims[0])][str(name)] = values.values.tolist()
    verdict = {
        name: finite_or_text(value) if isinstance(value, float) else value
        for name, value in vars(result.verdict).items()
    }
    return {
        "model": result.name,
        "networks": result.networks,
        "verdict": verdict,
        "cause": result.cause,
        "remedies": result.remedies,
        "factors": dict(result.factors),
        "agreement": result.agreement,
        "theory": result.theory_ends,
        "layers": by_axis["layer"],
        "parameters": by_axis["parameter"],
    }


def _drawn(text: str) -> Callable[[np.random.Generator], np.ndarray]:
    """What draws the input that a text as ``32,20:int<1000`` describes."""
    given = f"input is {text!r}"
    match = _SPEC.fullmatch(text.replace(" ", ""))
    if match is None:
        raise InputError(f"{given}; {_ALLOWED}")
    shape = tuple(map(int, match["shape"].split(",")))
    if min(shape) < 1 or math.prod(shape) > LARGEST_COUNT:
        raise InputError(f"{given}; its sizes are whole numbers of at least 1 that fit into memory")
    check_memory("input", math.prod(shape), 16 * math.prod(shape))
    dtype = match["dtype"] or ("float" if match["bound"] is None else "int")
    if dtype in _INTEGERS:
        bound = _BOUND if match["bound"] is None else int(match["bound"])
        most = np.iinfo(_PLAIN.get(dtype, dtype)).max
        if not 1 <= bound <= most:
            raise InputError(f"{given}; the first {dtype} that is too large is from 1 to {most}")
        return lambda draw: draw.integers(bound, size=shape).astype(_PLAIN.get(dtype, dtype))
    if dtype not in _FLOATS or match["bound"] is not None:
        raise InputError(f"{given}; {_ALLOWED}, of the dtypes {', '.join(_FLOATS + _INTEGERS)}")

    def normal(draw: np.random.Generator) -> np.ndarray:
        import jax.numpy as jnp  # noqa: PLC0415  (slow to import; it knows bfloat16)

        return draw.normal(size=shape).astype(jnp.dtype(_PLAIN.get(dtype, dtype)))

    return normal


def _draw(
    drawn: Sequence[Callable[[np.random.Generator], np.ndarray]], seed: int
) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(seed % (1 << 64))
    return tuple(one(draw) for one in drawn)


def _read(path: str) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Inputs and targets from a file: those of an .npz file in their order, by name."""
    from gradflow import _input_rows  # noqa: PLC0415  (JAX is slow to import)

    content = _input_rows.content("data", path)
    try:
        file: Any = np.load(io.BytesIO(content), allow_pickle=False)
        arrays: Mapping[str, np.ndarray] = (
            {"inputs": file} if isinstance(file, np.ndarray) else {n: file[n] for n in file.files}
        )
    except Exception as error:  # there is hardly one that a damaged file cannot cause
        raise InputError(
            f"data is {path!r}, which is not an .npy or .npz file of plain numbers, or is damaged"
        ) from error
    found = {name: _input_rows.numbers(f"data {path!r}", array) for name, array in arrays.items()}
    targets = tuple(array for name, array in found.items() if name.startswith("target"))
    inputs = tuple(array for name, array in found.items() if not name.startswith("target"))
    if not inputs:
        raise InputError(f"data is {path!r}, which has no inputs; it has one array of them or more")
    return inputs, targets
