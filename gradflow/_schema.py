"""A network as named options: what there are, what each may be, and the network that they make.

    schema.network({"activation": "relu", "weights": "he", "width": 100, "depth": 10})

is the one description of a network for Python, study files and the command line. The options are
the parameters of the builders in `KINDS`, read from their signatures: what an option may be is the
annotation, with a check of `_entries` as metadata where the type does not say it all; its default
is the parameter's; and its help is the first sentence of its entry in the builder's docstring.
So a parameter that is added to a builder is at once an entry of study files, an axis of theirs and
an option of ``gradflow compare``. Beside the parameters stand other ways to write them, as
``sigma_w2`` for ``weights`` of variance σ_w²/fan_in: the arguments of the functions in `_WRITTEN`.
"""

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

from gradflow import _entries, builders, data, ensembles
from gradflow._checks import check_number
from gradflow._entries import Beside, Check, OneOf, Whole, Wholes, positive, scale
from gradflow.ensembles import Ensemble
from gradflow.errors import InputError
from gradflow.networks import Network

__all__ = [
    "ALTERNATIVES",
    "KINDS",
    "NONE",
    "Option",
    "arguments_of",
    "check_together",
    "default",
    "input_options",
    "input_shape",
    "is_idle",
    "missing",
    "network",
]
__all__ += ["options", "read_options", "tokens"]

# What `kind` may be: by name, the builder of such networks.
KINDS: dict[str, Callable[..., Network]] = {
    "mlp": builders.mlp,
    "residual": builders.residual,
    "convolutional": builders.convolutional,
    "recurrent": builders.recurrent,
    "transformer": builders.transformer,
}
# The text of files and commands for a builder's None, where its other values are names.
NONE = "none"
# A builder's parameters that describe no network.
_NOT_OPTIONS = ("name",)
# Of each of these, one is given at most: the ways to write one thing, the builders' own first.
ALTERNATIVES = (
    ("weights", "sigma_w", "sigma_w2"),
    ("sigma_b", "sigma_b2"),
    ("width", "widths"),
    ("depth", "widths"),
    ("input_width", "widths"),
)


@dataclasses.dataclass(frozen=True)
class Option:
    """One named option of a description.

    Attributes
    ----------
    name
        In study files, and in Python; the command line writes hyphens for its underscores.
    help
        One sentence.
    value_type
        The type of its values: int, float, str, bool, or list (of whole numbers). A float varies
        within one compiled program, all else makes another.
    or_names
        Whether names may stand in the place of numbers, as ``"depth"`` for a `scale`.
    check
        Checks a value, by the path of its entry, and converts it.
    default
        Where it is not given; `inspect.Parameter.empty` where it must be.
    kinds
        The kinds of networks that have it.
    beside
        The option without which it means nothing, if there is one.
    """

    name: str
    help: str
    value_type: type
    or_names: bool
    check: Check
    default: Any
    kinds: tuple[str, ...] = ()
    beside: str | None = None


def options() -> Mapping[str, Option]:
    """Every option that describes a network, by name."""
    return _options(tuple(KINDS.items()))


@functools.lru_cache(maxsize=8)
def _options(kinds: tuple[tuple[str, Callable[..., Network]], ...]) -> Mapping[str, Option]:
    names = tuple(name for name, _ in kinds)
    kind = f"The architecture, {', '.join(names[:-1])} or {names[-1]}."
    known = {"kind": Option("kind", kind, str, False, OneOf("kind", names), names[0], names)}
    for name, builder in kinds:
        parameters = inspect.signature(builder).parameters
        for function in (builder, *(w for p, w in _WRITTEN.items() if p in parameters)):
            for own in read_options(function).values():
                first = known.setdefault(own.name, own)
                of = dict.fromkeys((*first.kinds, name))
                known[own.name] = dataclasses.replace(
                    first, kinds=tuple(of), check=_either(first.check, own.check)
                )
    return types.MappingProxyType(known)


def _either(first: Check, other: Check) -> Check:
    """The check of an option that kinds of networks have different names for."""
    if not (isinstance(first, OneOf) and isinstance(other, OneOf)):
        return first
    names = tuple(dict.fromkeys((*first.names, *other.names)))
    return dataclasses.replace(first, names=names)


@functools.cache
def input_options() -> Mapping[str, Option]:
    """Every option that describes a network's inputs, by name: the arguments of `data.inputs`."""
    found = read_options(data.inputs)
    of_networks = ("width", "tokens")
    return types.MappingProxyType({n: found[n] for n in found if n not in of_networks})


def read_options(function: Callable[..., Any]) -> dict[str, Option]:
    """Read the parameters of a function as options, by name, in their order.

    Each parameter has an annotation, and an entry in the docstring's section 'Parameters'.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    helps = _parameter_help(inspect.getdoc(function) or "")
    return {
        name: _as_option(name, hints[name], parameter.default, helps.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in _NOT_OPTIONS
    }


def _as_option(name: str, hint: Any, default: Any, help: str) -> Option:
    """Make an option of a parameter's annotation, default and help."""
    kinds, metadata = _flattened(hint)
    numbers = [kind for kind in (bool, float, int) if kind in kinds]
    if numbers:
        values: type = numbers[0]
    else:
        values = list if any(typing.get_origin(kind) is Sequence for kind in kinds) else str
    check = next((one for one in metadata if callable(one)), None) or _CHECKS[values]
    if isinstance(check, OneOf) and default is None:
        check = dataclasses.replace(check, names=(*check.names, NONE))
    return Option(
        name,
        help,
        values,
        or_names=bool(numbers) and str in kinds,
        check=check,
        default=default,
        beside=next((one.option for one in metadata if isinstance(one, Beside)), None),
    )


# The check of a parameter whose annotation has none.
_CHECKS: dict[type, Check] = {
    bool: _entries.flag,
    int: Whole(),
    float: _entries.scale,
    str: _entries.text,
    list: Wholes("a list of whole numbers"),
}


def _flattened(hint: Any) -> tuple[list[Any], list[Any]]:
    """The types that an annotation allows, and the metadata that it has anywhere."""
    if typing.get_origin(hint) is Annotated:
        inner, *metadata = typing.get_args(hint)
        kinds, more = _flattened(inner)
        return kinds, [*metadata, *more]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [_flattened(part) for part in typing.get_args(hint)]
        return [k for kinds, _ in parts for k in kinds], [m for _, more in parts for m in more]
    return [hint], []


def _parameter_help(docstring: str) -> dict[str, str]:
    """The first sentence of every entry of a docstring's Parameters, by the parameter's name."""
    _, _, after = docstring.partition("Parameters\n----------\n")
    section = re.split(r"\n\n\w+\n-+\n", after)[0]
    helps: dict[str, str] = {}
    for names, text in re.findall(r"^(\S.*)\n((?:[ ]{4}.*\n?|\n)+)", section, re.MULTILINE):
        plain = " ".join(text.replace("``", "").replace("`", "").split())
        sentence = re.split(r"(?<=\.) (?=[A-Z])", plain)[0]
        helps |= dict.fromkeys(re.split(r",\s*", names), sentence)
    return helps


def check_together(given: Mapping[str, str], kinds: Collection[str]) -> None:
    """Raise `InputError` if options do not go together.

    Parameters
    ----------
    given
        Where each option that is given stands, by its name: its path in a file.
    kinds
        The kinds of the networks: several, where ``kind`` is an axis.
    """
    known = options()
    for names in ALTERNATIVES:
        those = [given[name] for name in names if name in given]
        if len(those) > 1:
            raise InputError(f"{those[1]} takes the place of {those[0]}; give one of them")
    for name in given:
        own = known[name].kinds
        if not set(own) & set(kinds):
            raise InputError(f"{given[name]} is of networks of kind {own[0]!r}; leave it out")
    if "widths" in given and not set(kinds) <= set(known["widths"].kinds):
        raise InputError(
            f"{given['widths']} is of networks of kind 'mlp'; give the other kinds' own instead"
        )
    for name in given:
        beside = known[name].beside
        if beside is not None and beside not in given and _without(beside, kinds):
            raise InputError(
                f"{given[name]} goes with {beside}, and there is none; give {beside} too"
            )


def _without(option: str, kinds: Collection[str]) -> bool:
    """Whether networks of these kinds are without an option that is not given."""
    return all(default(option, kind) in (None, NONE) for kind in kinds)


def default(option: str, kind: str) -> Any:
    """The default of an option of networks of a kind, None where there is none."""
    parameter = inspect.signature(KINDS[kind]).parameters.get(option)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def missing(given: Collection[str], kinds: Collection[str]) -> tuple[str, ...]:
    """The ways to write the first parameter that must be given and is not, or ()."""
    for kind in kinds:
        required = [
            own
            for name, parameter in inspect.signature(KINDS[kind]).parameters.items()
            if parameter.default is parameter.empty
            for own in (_required_of(_WRITTEN[name]) if name in _WRITTEN else [name])
        ]
        for name in required:
            if name == "input_width":  # as wide as the layers without it
                continue
            ways = next((those for those in ALTERNATIVES if those[0] == name), (name,))
            if not any(way in given for way in ways):
                return ways
    return ()


def _required_of(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]


def input_shape(description: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """The number of components that a description gives an input, None if none; and its shape.

    The shape is that of an image's positions and channels; () where an input is a vector.
    """
    if "channels" in description and "shape" in description:
        shape = (*description["shape"], description["channels"][0])
        return math.prod(shape), shape
    if "widths" in description:
        return int(description["widths"][0]), ()
    return description.get("input_width"), ()


def tokens(description: Mapping[str, Any]) -> int:
    """How many tokens an input has, 1 where it has none."""
    of_kind = description.get("kind", "mlp") in options()["tokens"].kinds
    return description.get("tokens", 1) if of_kind else 1


def is_idle(name: str, description: Mapping[str, Any]) -> bool:
    """Whether an option makes no difference to the network of a whole description."""
    option, kind = options().get(name), description.get("kind", "mlp")
    if option is None:
        return False
    if kind not in option.kinds:
        return True
    beside = option.beside
    return beside is not None and description.get(beside, default(beside, kind)) in (None, NONE)


def network(description: Mapping[str, Any]) -> Network:
    """Make the network that options describe.

    Parameters
    ----------
    description
        Options by name, as `options` lists them; of kind ``"mlp"`` without one. The input is as
        wide as the layers without an ``input_width``.

    Raises
    ------
    InputError
        If an option is unknown, they do not go together, one is missing, or has no such value.
    """
    kind, arguments = arguments_of(description)
    return KINDS[kind](**arguments)


def arguments_of(description: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of the network that options describe, and the arguments of its builder.

    Raises
    ------
    InputError
        As `network` does, but for what the builder itself refuses.
    """
    given = {name: value for name, value in description.items() if value is not None}
    _entries.check_known("", given, options())
    kind = options()["kind"].check("kind", given.pop("kind", "mlp"))
    check_together(dict(zip(given, given, strict=True)), [kind])
    if ways := missing(given, [kind]):
        raise InputError(f"{ways[0]} is missing; give {' or '.join(ways)}")
    given = {
        name: None if value == NONE and options()[name].default is None else value
        for name, value in given.items()
    }
    if "widths" not in given and "width" in given:
        given.setdefault("input_width", given["width"])
    parameters = inspect.signature(KINDS[kind]).parameters
    arguments = {name: value for name, value in given.items() if name in parameters}
    for name, write in _WRITTEN.items():
        own = {n: given[n] for n in inspect.signature(write).parameters if n in given}
        if name in parameters and set(own) - {name}:
            arguments[name] = write(**own)
    return kind, arguments


def _equal_layers(
    width: int, depth: Annotated[int, Whole(100_000)], input_width: int | None = None
) -> list[int]:
    """The widths of an input and of equal layers.

    Parameters
    ----------
    width
        Units a layer.
    depth
        Layers.
    input_width
        Components of an input; as many as a layer has units without it.
    """
    return [width if input_width is None else input_width, *[width] * depth]


def _scaled_weights(
    weights: Ensemble | str | Callable[..., Any] = "glorot",
    sigma_w: Annotated[float, positive] | None = None,
    sigma_w2: Annotated[float, positive] | None = None,
    distribution: Annotated[str, OneOf("distribution", tuple(ensembles.DISTRIBUTIONS))]
    | None = None,
) -> Ensemble | list[Ensemble]:
    """An ensemble, one for each layer, or weights of variance σ_w²/fan_in, from any distribution.

    Parameters
    ----------
    sigma_w
        σ_w: weights of variance σ_w²/fan_in, instead of an ensemble's.
    sigma_w2
        σ_w²: weights of variance σ_w²/fan_in, instead of an ensemble's.
    distribution
        Draw the weights from another distribution: gaussian, uniform, orthogonal, …
    """
    if sigma_w2 is not None:
        check_number("sigma_w2", sigma_w2, positive=True)
        sigma_w = math.sqrt(sigma_w2)
    each = ensembles.by_layer(weights) if sigma_w is None else [ensembles.fan_in(sigma_w)]
    if distribution is not None:
        each = [ensemble.drawn_from(distribution) for ensemble in each]
    return list(each) if len(each) > 1 else each[0]


def _bias_deviation(sigma_b2: Annotated[float, scale]) -> float:
    """The standard deviation of biases.

    Parameters
    ----------
    sigma_b2
        σ_b²: the variance of the biases.
    """
    check_number("sigma_b2", sigma_b2)
    return math.sqrt(sigma_b2)


# Parameters of builders that may be written in other ways: what makes each of other options.
_WRITTEN: dict[str, Callable[..., Any]] = {
    "widths": _equal_layers,
    "weights": _scaled_weights,
    "sigma_b": _bias_deviation,
}
