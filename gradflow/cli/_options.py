"""Options of commands: those that describe a network, those that all have, and their checks.

A command of the class `described_by` has options of `gradflow._schema`, which it reads as
`network_options`: their names, help and kinds are the schema's, the defaults the command's own.
"""

import functools
import hashlib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from typer.core import TyperCommand

from gradflow._checks import LARGEST_COUNT, check_count, check_number
from gradflow._files import writable_file as writable_file
from gradflow._files import writable_folder as writable_folder
from gradflow.errors import InputError

app = typer.Typer(
    name="gradflow",
    help="Will the gradients of this network vanish or explode? Theory beside simulation.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

# Bytes that a layer takes of any width: its place in a network, its theory, its statistics.
_LAYER = 1 << 14
# Characters of a folder's name that is made of options.
_LONGEST_NAME = 120
LARGEST_DEVIATION = 1e150
# Names that options of the schema have beside their own.
_OTHER_NAMES = {"batch": ("--inputs",), "kind": ("--network",)}
# What commands draw of a kind of networks, in place of their own defaults.
_DEFAULTS_OF_KINDS = {"transformer": {"width": 128, "depth": 6}}
# The width from which on the inputs of commands are images, unless others are asked for.
_WIDTH_OF_IMAGES = 64

Out = Annotated[
    str | None,
    typer.Option(help="Folder for results and figures.", show_default=False, metavar="FOLDER"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]
Seed = Annotated[
    int, typer.Option(help="Seed of everything that is random.", min=-(2**63), max=2**63 - 1)
]


def described_by(
    *others: str, every: bool = False, batch: int | None = None, **defaults: Any
) -> type[TyperCommand]:
    """Make the class of a command with options that describe a network.

    They are made when the command is used: `gradflow._schema` imports JAX, which is slow.

    Parameters
    ----------
    others
        Options without a default.
    every
        Whether it has every option of the schema, or those that are named here alone.
    batch
        How many inputs go through each network by default, of a command that has the options of
        inputs (`chosen_inputs`).
    defaults
        The command's own default of options, by name.
    """

    class Command(TyperCommand):
        @functools.cached_property
        def _described(self) -> list[Any]:
            from gradflow import _schema  # noqa: PLC0415  (JAX is slow to import)

            known = {**_schema.options(), **_schema.input_options()}
            names = dict.fromkeys((*defaults, *others, *(_schema.options() if every else ())))
            own = dict.fromkeys(_schema.input_options() if batch else ()) | {"batch": batch}
            values = {n: defaults.get(n) for n in names} | (own if batch else {})
            return _as_parameters({known[name]: value for name, value in values.items()})

        def get_params(self, ctx: Any) -> list[Any]:
            """The command's own parameters, and before them those that describe a network."""
            return [*self._described, *super().get_params(ctx)]

        def invoke(self, ctx: Any) -> Any:
            """Call the command with its own parameters; `network_options` has the others."""
            own = {parameter.name for parameter in self.params}
            values = {name: value for name, value in ctx.params.items() if name in own}
            return ctx.invoke(self.callback, **values)

    return Command


def _as_parameters(defaults: Mapping[Any, Any]) -> list[Any]:
    """Options of the schema as the command line's parameters, each with its default."""
    kinds = {int: int, float: float, bool: bool}

    def parameter(option: Any, default: Any) -> inspect.Parameter:
        kind = str if option.or_names else kinds.get(option.value_type, str)
        name = f"--{option.name.replace('_', '-')}"
        info = typer.Option(
            *_OTHER_NAMES.get(option.name, ()),
            name if option.default is not True else f"{name}/--no-{name.removeprefix('--')}",
            help=option.help,
            metavar="N,N,…" if option.value_type is list else None,
            show_default=default is not None,
        )
        if kind is bool and option.default is not True:
            default = bool(default)
        annotation: Any = kind if default is not None else kind | None
        return inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[annotation, info],
        )

    return as_options([parameter(option, default) for option, default in defaults.items()])


def as_options(parameters: Sequence[inspect.Parameter]) -> list[Any]:
    """The command line's options that typer makes of a function's parameters."""

    def carrier(**_: Any) -> None:
        """Only its signature is read."""

    carrier.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    carrier.__annotations__ = {one.name: one.annotation for one in parameters}
    holder = typer.Typer(add_completion=False)
    holder.command()(carrier)
    return list(typer.main.get_command(holder).params)


def network_options(context: typer.Context) -> dict[str, Any]:
    """The options that describe a network, given or by default, as `schema.network` takes them.

    Of ways to write one thing, as ``--weights`` and ``--sigma-w``, that on the command line takes
    the place of the others' defaults.

    Raises
    ------
    InputError
        If two ways are given.
    """
    from gradflow import _schema  # noqa: PLC0415  (JAX is slow to import)

    options, own = _schema.options(), {one.name for one in context.command.params}
    kind = options["kind"].check("kind", context.params.get("kind") or options["kind"].default)

    params = dict(context.params)
    for name, value in _DEFAULTS_OF_KINDS.get(kind, {}).items():
        if name in params and not is_given(context, name):
            params[name] = value

    def is_meant(name: str) -> bool:
        """Whether an option is given, or has a default, which is of this kind of networks."""
        value = params[name]
        of_kind = kind in options[name].kinds and value is not None and value is not False
        # A kind of networks may have another default than that of all.
        usual = _schema.default(name, kind) == _schema.default(name, options["kind"].default)
        return is_given(context, name) or (of_kind and usual)

    values = {
        name: _parsed(options[name], value)
        for name, value in params.items()
        if name in options and name not in own and is_meant(name)
    }
    for ways in _schema.ALTERNATIVES:
        given = [way for way in ways if way not in own and is_given(context, way)]
        if len(given) > 1:
            check_instead(context, given[-1], given[0])
        for way in ways if given else ():
            if way not in given:
                values.pop(way, None)
    return values


def variances(described: Mapping[str, Any]) -> dict[str, Any]:
    """``sigma_w2`` and ``sigma_b2`` of a description that has them, or their roots.

    Raises
    ------
    InputError
        If a standard deviation is below 0, or its square is beyond a float's range.
    """
    found = {name: described[name] for name in ("sigma_w2", "sigma_b2") if name in described}
    for name in ("sigma_w", "sigma_b"):
        if name in described:
            check_number(name, described[name])
            check_deviation(name, described[name])
            found[f"{name}2"] = described[name] ** 2
    return found


class Inputs(NamedTuple):
    """Inputs, shape (inputs, components), and what they are: in words, and by option."""

    rows: np.ndarray
    record: dict[str, Any]


def chosen_inputs(context: typer.Context, described: dict[str, Any]) -> Inputs:
    """The inputs that a command's options ask for, of the width of a network's description.

    Where the description has no width of inputs, it gets that which the inputs have of themselves.
    Without options they are images of digits, and random directions where those would be squeezed
    into too few components.

    Raises
    ------
    InputError
        As `data.inputs` does, and if the description is not whole.
    """
    from gradflow import _input_rows, _schema, data  # noqa: PLC0415  (JAX is slow to import)

    _schema.arguments_of(described)  # which says what is missing of it
    own = {n: v for n in _schema.input_options() if (v := context.params[n]) is not None}
    width, shape = _schema.input_shape(described)
    own["tokens"] = tokens = _schema.tokens(described)
    if tokens > 1:
        if not (is_given(context, "input") or is_given(context, "data")):
            own["input"] = "cosines"
        if not is_given(context, "batch"):
            own["batch"] = 1
    elif not any(is_given(context, name) for name in own if name != "batch"):
        wide = width is None or width >= _WIDTH_OF_IMAGES
        fits = shape in ((), _input_rows.IMAGE_SHAPES["digits"])
        own["input"] = "digits" if wide and fits else "sphere"
    kind = _input_rows.kind_of(own.get("input"), own.get("data"))
    if width is None:
        natural = _input_rows.natural_width(kind)
        width = check_count("width", described["width"]) if natural is None else natural // tokens
    if "width" in described:
        described["input_width"] = width
    there = _input_rows.most(kind, check_count("input_width", width))
    if there is not None and not is_given(context, "batch"):
        own["batch"] = min(own["batch"], there)
    rows = data.inputs(width, **own)
    record = {"inputs": _input_rows.described(kind, rows), **own}
    rows = _input_rows.sites(kind, rows, shape)
    if _input_rows.is_file(kind):
        record["data_sha256"] = _input_rows.digest(kind)
    return Inputs(rows, record)


def _parsed(option: Any, value: Any) -> Any:
    """A value as the schema has it: lists and numbers from text."""
    if option.name == "widths":
        return parse_widths(value)
    if option.value_type is list:
        try:
            numbers: Any = [int(part) for part in value.split(",")]
        except ValueError:
            numbers = value
        return option.check(option.name, numbers)
    if option.or_names:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def is_given(context: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def check_instead(context: typer.Context, option: str, other: str) -> None:
    """Raise if an option was given beside another one, whose place it takes."""
    if is_given(context, option) and is_given(context, other):
        one, two = (_given(context, name) for name in (option, other))
        raise InputError(f"{one} and {two}; the first takes the other's place: give one of them")


def check_beside(context: typer.Context, option: str, other: str) -> None:
    """Raise if an option was given that means nothing without another one, which was not."""
    if is_given(context, option) and not is_given(context, other):
        raise InputError(
            f"{_given(context, option)}, which means nothing without --{other}; give both"
        )


def _given(context: typer.Context, option: str) -> str:
    """An option and its value in words, under the name that the command line has for it."""
    parameter = next(p for p in context.command.get_params(context) if p.name == option)
    value = context.params[option]
    text = str(value) if isinstance(value, Path) else value
    return f"{parameter.opts[0].removeprefix('--').replace('-', '_')} is {text!r}"


def check_memory(name: str, value: int, needed: int) -> None:
    """Raise if an argument asks for more memory, in bytes, than is free."""
    from gradflow.simulation import _memory  # noqa: PLC0415  (JAX is slow to import)

    free = _memory.available()
    if needed > free:
        raise InputError(
            f"{name} is {value}, which needs {needed / 2**30:.3g} GiB and {free / 2**30:.3g} GiB "
            "are free; use fewer"
        )


def check_deviation(name: str, value: float) -> None:
    """Raise if the square of a standard deviation is beyond a float's range."""
    if LARGEST_DEVIATION < value < math.inf:
        raise InputError(f"{name} is {value}; it is at most {LARGEST_DEVIATION:g}")


def check_depth(depth: int) -> int:
    """Check that a depth is at least 1, and that the numbers of its layers fit into memory."""
    check_memory("depth", check_count("depth", depth), depth * _LAYER)
    return depth


def parse_widths(text: str) -> tuple[int, ...]:
    """Read widths as 784,300,100,10."""
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if len(widths) < 2 or min(widths) < 1 or max(widths) > LARGEST_COUNT:
        raise InputError(
            f"widths is {text!r}; it is the input's width and each layer's, whole numbers of at "
            f"least 1 and at most {LARGEST_COUNT} with commas between, as 784,300,100,10"
        )
    return widths


def shape_label(widths: tuple[int, ...]) -> str:
    """Widths in a few words."""
    if len(set(widths[1:])) == 1 and len(widths) > 4:
        return f"width{widths[1]}-depth{len(widths) - 1}"
    return "-".join(map(str, widths)) if len(widths) <= 8 else f"{len(widths) - 1}-layers"


def file_name(name: str) -> str:
    """A name without the characters that some file systems refuse."""
    kept = "".join(
        c if c.isascii() and (c.isalnum() or c in "-_.") else "-"
        for c in name.replace("(", "").replace(")", "")
    )
    return "-".join(part for part in kept.split("-") if part).lower()


def given_folder(out: str | None, otherwise: Path) -> Path:
    """The folder of ``--out``, or another one without it."""
    if out is not None and not out.strip():
        raise InputError(f"out is {out!r}; it is the name of a folder, new or not")
    return otherwise if out is None else Path(out)


def results_folder(context: typer.Context, *first: str, out: str | None) -> Path:
    """The folder for results, which can be written to: results/COMMAND/… without ``out``.

    Its name has all options that are not their defaults, so that no two different
    commands share one.

    Parameters
    ----------
    context
        The command's.
    first
        Options whose values come first, without their names, defaults or not.
    out
        The value of ``--out``.
    """
    values = {
        parameter.name: context.params[parameter.name]
        for parameter in context.command.get_params(context)
        if parameter.name in context.params
        and (parameter.name in first or context.params[parameter.name] != parameter.default)
    }
    leading = [values.pop(name) for name in first]
    others = {n: v for n, v in values.items() if v is not None and n not in ("out", "as_json")}
    default = Path("results") / str(context.command.name) / options_name(leading, others)
    return writable_folder(given_folder(out, default))


def options_name(first: Sequence[Any], others: Mapping[str, Any]) -> str:
    """A folder's name that no other values have, as ``tanh-glorot-depth=20``.

    It ends with a digest where a value has characters that stand between values in such a name, or
    that not all file systems tell apart.
    """
    values = [*map(_as_text, (*first, *others.values()))]
    words = [*values[: len(first)], *map("=".join, zip(others, values[len(first) :], strict=True))]
    name = "-".join(words)
    if all(re.fullmatch("[a-z0-9_.,]+", value) for value in values) and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(repr(words).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{file_name(name)[:_LONGEST_NAME]}-{digest}"


def _as_text(value: Any) -> str:
    return ",".join(map(_as_text, value)) if isinstance(value, list | tuple) else str(value)
