"""The layers of a program: its products with weights, in order of data flow, by their names."""

import collections
import dataclasses
import math
import re

import numpy as np

from gradflow.inspection._reading.program import Equation, Program

__all__ = ["ELEMENTWISE", "SHAPES", "Layer", "layers", "of_weights"]

# Primitives that treat each element alone.
ELEMENTWISE = frozenset({
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh",
    "custom_jvp_call", "custom_vjp_call", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or",
    "polygamma", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
})  # fmt: skip
# Primitives that move elements and change none.
SHAPES = frozenset({"broadcast_in_dim", "expand_dims", "reshape", "rev", "squeeze", "transpose"})
_CASTS = frozenset({"convert_element_type", "copy", "reduce_precision"})


@dataclasses.dataclass(frozen=True)
class Layer:
    """A product with weights, with its biases.

    Attributes
    ----------
    name
        The path of its module; of an unnamed one that of its weights.
    kind
        ``"dense"``, ``"convolution"`` or ``"embedding"``.
    equation
        The place of the product in `Program.equations`.
    signal, weights
        The numbers of its operands; ``signal`` are indices for an embedding.
    product, preactivation
        The numbers of W h, and of z = W h + b (the same where there is no bias).
    activation
        The number of φ(z), where elementwise functions of z alone follow; else that of z.
    units
        The axes of z that are units; all others are sites.
    fan_in
        How many terms each unit sums; 1 for an embedding.
    parameter
        The number of the leaf of the parameters that its weights come from; of several, the first.
    above
        The place, in the list of layers, of the one that takes all of its signal through a chain:
        nothing else does, and on the way no other layer's signal is added to it or multiplies it.
        None where there is no such layer.
    """

    name: str
    kind: str
    equation: int
    signal: int
    weights: int
    product: int
    preactivation: int
    activation: int
    units: tuple[int, ...]
    fan_in: int
    parameter: int
    above: int | None = None


def of_weights(program: Program) -> frozenset[int]:
    """Values that depend on parameters and on no input, state or key: weights, however made."""
    others = [
        i for name, numbers in program.arguments.items() if name != "parameters" for i in numbers
    ]
    return program.depends_on(program.arguments["parameters"]) - program.depends_on(others)


def layers(program: Program) -> list[Layer]:
    """The layers of a program, in order of data flow, each with a name of its own."""
    weights, consumers = of_weights(program), program.consumers()
    producers = program.producers()
    found = []
    for place, equation in enumerate(program.equations):
        operands = _operands(program, equation, weights)
        if operands is None:
            continue
        kind, signal, weight, units, fan_in = operands
        product = equation.outputs[0]
        z, units = _with_bias(program, consumers, weights, product, units)
        parameter = _leaf(program, producers, weight)
        found.append(
            Layer(
                name=equation.path,
                kind=kind,
                equation=place,
                signal=signal,
                weights=weight,
                product=product,
                preactivation=z,
                activation=_after(program, consumers, z),
                units=units,
                fan_in=fan_in,
                parameter=parameter,
            )
        )
    return _with_above(program, _named(program, found))


def _operands(
    program: Program, equation: Equation, weights: frozenset[int]
) -> tuple[str, int, int, tuple[int, ...], int] | None:
    """Kind, signal, weights, axes of units and fan_in of a product with weights; else None."""
    if equation.primitive == "dot_general":
        (left_sum, right_sum), (left_batch, _) = equation.params["dimension_numbers"]
        left, right = equation.inputs
        if (left in weights) == (right in weights):
            return None
        shapes = program.avals[left].shape, program.avals[right].shape
        batch = len(left_batch)
        free_left = len(shapes[0]) - batch - len(left_sum)
        free_right = len(shapes[1]) - batch - len(right_sum)
        fan_in = math.prod(shapes[0][i] for i in left_sum)
        if right in weights:
            units = tuple(range(batch + free_left, batch + free_left + free_right))
            return "dense", left, right, units, fan_in
        return "dense", right, left, tuple(range(batch, batch + free_left)), fan_in
    if equation.primitive == "conv_general_dilated":
        signal, weight = equation.inputs
        if weight not in weights or signal in weights:
            return None
        numbers = equation.params["dimension_numbers"]
        shape = program.avals[weight].shape
        fan_in = math.prod(shape) // shape[numbers.rhs_spec[0]]
        return "convolution", signal, weight, (numbers.out_spec[1],), fan_in
    if equation.primitive == "gather":
        table, indices = equation.inputs[:2]
        if table not in weights or indices in weights:
            return None
        units = tuple(equation.params["dimension_numbers"].offset_dims)
        return "embedding", indices, table, units, 1
    return None


def _with_bias(
    program: Program,
    consumers: dict[int, list[int]],
    weights: frozenset[int],
    value: int,
    units: tuple[int, ...],
) -> tuple[int, tuple[int, ...]]:
    """The pre-activation W h + b and its axes of units, from the product on."""
    while len(places := consumers.get(value, [])) == 1:
        equation = program.equations[places[0]]
        others = [i for i in equation.inputs if i != value]
        out = equation.outputs[0]
        bias = equation.primitive in ("add", "add_any") and others and others[0] in weights
        if bias or equation.primitive in _CASTS:
            value = out
        elif equation.primitive in SHAPES:
            moved = _moved(program, equation, units)
            if moved is None:
                break
            # Only on the way to a bias, as after a product over several axes.
            z, z_units = _with_bias(program, consumers, weights, out, moved)
            return (z, z_units) if z != out else (value, units)
        else:
            break
    return value, units


def _moved(program: Program, equation: Equation, units: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of units after elements are moved; None where units and sites are mixed."""
    if equation.primitive == "transpose":
        order = list(equation.params["permutation"])
        return tuple(sorted(order.index(i) for i in units))
    if equation.primitive == "broadcast_in_dim":
        return tuple(equation.params["broadcast_dimensions"][i] for i in units)
    # Which axes vary with units is seen on an array that holds, for each element, its unit.
    before = program.avals[equation.inputs[0]].shape
    marks = np.indices(before, sparse=True)
    if not before or math.prod(before) == 0:
        return None
    unit = sum((marks[i] + 1) * 7919**n for n, i in enumerate(units)) + np.zeros(before, np.int64)
    (after,) = equation.evaluate(unit.astype(np.int32))
    after = np.asarray(after)
    axes = tuple(i for i in range(after.ndim) if (np.diff(after, axis=i) != 0).any())
    sites = math.prod(n for i, n in enumerate(after.shape) if i not in axes)
    same = sites == math.prod(n for i, n in enumerate(before) if i not in units)
    return axes if same else None


def _after(program: Program, consumers: dict[int, list[int]], z: int) -> int:
    """The last value that elementwise functions make of z alone: φ(z), or z where none is."""
    made = {z}
    for equation in program.equations:
        if equation.primitive in (ELEMENTWISE | {"broadcast_in_dim"}) and made.intersection(
            equation.inputs
        ):
            alone = all(i in made or i in program.constants for i in equation.inputs)
            shape = program.avals[z].shape
            if alone and all(program.avals[i].shape == shape for i in equation.outputs):
                made.update(equation.outputs)
    outside = {
        value: places
        for value in made
        if (places := [p for p in consumers.get(value, []) if made.isdisjoint(
            program.equations[p].outputs)]) or value in program.outputs
    }  # fmt: skip
    # Where z itself goes on, what is only summed is a statistic of it, as of a norm.
    used_outside = [
        value
        for value, places in outside.items()
        if value != z
        and not (z in outside and places and all(_reduces(program.equations[p]) for p in places))
    ]
    return used_outside[0] if len(used_outside) == 1 else z


def _reduces(equation: Equation) -> bool:
    return equation.primitive.startswith("reduce_") and equation.primitive != "reduce_precision"


def _leaf(program: Program, producers: dict[int, int], weights: int) -> int:
    """The first leaf of the parameters that a value is computed from."""
    leaves, pending, seen = set(program.arguments["parameters"]), [weights], set()
    while pending:
        value = pending.pop(0)
        if value in leaves:
            return value
        if value in producers and value not in seen:
            seen.add(value)
            pending += program.equations[producers[value]].inputs
    return weights


def _with_above(program: Program, found: list[Layer]) -> list[Layer]:
    """The layers, each with the place of the only one above it, if it is a chain to there."""
    products = {layer.product: place for place, layer in enumerate(found)}
    below: dict[int, frozenset[int]] = {}  # of each value the layers it is made of, nearest ones
    takers: list[set[int]] = [set() for _ in found]
    branched: set[int] = set()
    for equation in program.equations:
        parts = frozenset[int]().union(*(below.get(i, frozenset()) for i in equation.inputs))
        layer = products.get(equation.outputs[0])
        if len(parts) > 1:
            branched |= parts
        if layer is not None:
            for part in parts:
                takers[part].add(layer)
            parts = frozenset({layer})
        if parts:
            below.update(dict.fromkeys(equation.outputs, parts))
    for value in program.outputs:
        branched |= below.get(value, frozenset())
    return [
        dataclasses.replace(layer, above=next(iter(taking)))
        if len(taking) == 1 and place not in branched
        else layer
        for place, (layer, taking) in enumerate(zip(found, takers, strict=True))
    ]


def _named(program: Program, found: list[Layer]) -> list[Layer]:
    """The layers by their modules' paths, by their weights' where those do not tell them apart."""
    leaves: dict[str, set[int]] = {}
    for layer in found:
        leaves.setdefault(layer.name, set()).add(layer.parameter)

    def name(layer: Layer) -> str:
        if re.search("[A-Za-z]", layer.name) and len(leaves[layer.name]) == 1:
            return layer.name
        leaf = program.names.get(layer.parameter, "")
        step = "".join(re.findall(r"\[\d+\]", layer.name))
        return (_module(leaf) or leaf or layer.kind) + step

    return _distinct([dataclasses.replace(layer, name=name(layer)) for layer in found])


def _module(leaf: str) -> str:
    """The path of a leaf's module: `layers[0]` of `.layers[0].weight`."""
    parts = re.findall(r"\.\w+|\[[^\]]*\]", leaf.removesuffix(".value"))
    if parts and not re.fullmatch(r"\[\d+\]", parts[-1]):
        parts.pop()
    return re.sub(r"\['([^']*)'\]", r"/\1", "".join(parts)).strip("./")


def _distinct(found: list[Layer]) -> list[Layer]:
    """The layers, with a number behind the names that several have."""
    total = collections.Counter(layer.name for layer in found)
    count: collections.Counter[str] = collections.Counter()
    out = []
    for layer in found:
        name = layer.name
        number, count[name] = count[name], count[name] + 1
        out.append(
            dataclasses.replace(layer, name=name if total[name] == 1 else f"{name}[{number}]")
        )
    return out
