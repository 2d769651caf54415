"""Functions of several Gaussian variables as expressions: where they factorise, where they bend.

A function of independent z_1 … z_d is expanded into a sum of products of *pieces*, each of which
depends on variables that no other piece of its product has: σ(f) c + σ(i) tanh(g) is two products
of two pieces of one variable each. The average of a product is then that of its pieces.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow.inspection._reading.program import Equation, Program, read

__all__ = ["Function", "Term", "expanded", "functions", "product", "switches"]

# A sum of products with more terms is left as it is, one piece.
_MAX_TERMS = 12
_SUMS = {"add": 1.0, "add_any": 1.0, "sub": -1.0}
_CASTS = ("convert_element_type", "copy", "reduce_precision")
# Primitives that are not smooth where a difference of their operands is 0, or the operand itself.
_COMPARISONS = frozenset({"max", "min", "gt", "ge", "lt", "le", "eq", "ne"})
_AT_ZERO = frozenset({"abs", "sign"})


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of scalars, all numbers; equal ones are compiled once.

    Attributes
    ----------
    key
        What it computes, hashable.
    expression
        A number of a value of the program, a float, or ``(operator, *expressions)``.
    variables
        Which of the program's variables it depends on.
    program
        Its arguments are ``variables`` and ``known``.
    """

    key: Any
    expression: Any
    variables: tuple[int, ...]
    program: Program = dataclasses.field(compare=False, repr=False)

    def __call__(self, variables: Sequence[Any], known: Sequence[Any] = ()) -> Array:
        """Its value, for one scalar for each of *its* variables; traceable."""
        numbers = self.program.arguments["variables"]
        given = {numbers[i]: z for i, z in zip(self.variables, variables, strict=True)}
        given |= dict(zip(self.program.arguments["known"], known, strict=True))
        return _Evaluation(self.program, given).of(self.expression)

    def over(self, variables: tuple[int, ...]) -> "Function":
        """The same function of more variables."""
        return dataclasses.replace(self, variables=variables)


# A product: pieces by the groups of variables that they depend on, none of which two share.
Term = dict[frozenset[int], Function]


def functions(
    f: Callable[..., Any], variables: int, known: int = 0
) -> tuple[tuple[Function, ...], bool]:
    """The outputs of f(z_1, …, z_d, known_1, …), read, and whether it makes a tuple of them.

    Parameters
    ----------
    f
        Traceable by JAX, of scalars to a scalar, or to a tuple of scalars.
    variables, known
        The numbers of its Gaussian variables, and of the arguments behind them.
    """
    scalar = jax.ShapeDtypeStruct((), np.float64)
    several = False

    def flat(variables: Sequence[Any], known: Sequence[Any]) -> Any:
        nonlocal several
        out = f(*variables, *known)
        several = isinstance(out, (tuple, list))
        return out

    with jax.enable_x64(True):
        program = read(flat, variables=(scalar,) * variables, known=(scalar,) * known)
    program = _inlined(program)
    constants = tuple(
        (i, value.dtype.str, value.tobytes()) for i, value in sorted(program.constants.items())
    )
    key = (
        tuple((e.signature, e.inputs, e.outputs) for e in program.equations),
        constants, program.outputs, variables, known,
    )  # fmt: skip
    over = tuple(range(variables))
    return tuple(Function(key, output, over, program) for output in program.outputs), several


def _inlined(program: Program) -> Program:
    """The program with the definitions of functions that have their own derivatives put in line."""
    equations: list[Equation] = []
    constants = {i: np.asarray(value) for i, value in program.constants.items()}
    fresh = itertools.count(len(program.avals))

    def add(part: Program, names: dict[int, int]) -> None:
        for equation in part.equations:
            inputs = tuple(names[i] for i in equation.inputs)
            inner = equation.inner
            if inner is None:
                names |= {i: next(fresh) for i in equation.outputs if i not in names}
                outputs = tuple(names[i] for i in equation.outputs)
                equations.append(dataclasses.replace(equation, inputs=inputs, outputs=outputs))
                continue
            own = dict(zip(inner.arguments["inputs"], inputs, strict=True))
            for i, value in inner.constants.items():
                own[i] = next(fresh)
                constants[own[i]] = np.asarray(value)
            add(inner, own)
            names.update(zip(equation.outputs, (own[i] for i in inner.outputs), strict=True))

    renamed = {i: i for i in (*program.constants, *itertools.chain(*program.arguments.values()))}
    add(program, renamed)
    outputs = tuple(renamed[i] for i in program.outputs)
    return dataclasses.replace(program, constants=constants, equations=equations, outputs=outputs)


def product(*functions: Function) -> Function:
    """The product of functions of one program."""
    variables = sorted(set().union(*(f.variables for f in functions)))
    first = functions[0]
    expression: Any = functools.reduce(lambda a, b: ("*", a, b), (f.expression for f in functions))
    return dataclasses.replace(first, expression=expression, variables=tuple(variables))


class _Evaluation:
    """Values of a program for some arguments, computed where they are asked for."""

    def __init__(self, program: Program, given: dict[int, Any]) -> None:
        self.program, self.values = program, {**program.constants, **given}
        self.producers = program.producers()

    def of(self, expression: Any) -> Any:
        if isinstance(expression, tuple):
            operands = [self.of(e) for e in expression[1:]]
            if expression[0] == "1/":
                return 1 / operands[0]
            return functools.reduce(jnp.add if expression[0] == "+" else jnp.multiply, operands)
        if isinstance(expression, float):
            return expression
        if expression not in self.values:
            equation = self.program.equations[self.producers[expression]]
            inputs = [self.of(i) for i in equation.inputs]
            outputs = _float64(equation, inputs)
            self.values.update(zip(equation.outputs, outputs, strict=True))
        return self.values[expression]


def _float64(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """An equation's outputs, without its rounding to fewer digits."""
    if equation.primitive in _CASTS:
        wanted = equation.params.get("new_dtype", np.float64)
        if jnp.issubdtype(wanted, jnp.floating):
            return (jnp.asarray(inputs[0], jnp.float64),)
    return equation.evaluate(*inputs)


def _dependence(program: Program) -> dict[int, frozenset[int]]:
    """Of each value the variables that it depends on."""
    found = {v: frozenset((i,)) for i, v in enumerate(program.arguments["variables"])}
    for equation in program.equations:
        all_of = frozenset().union(*(found.get(i, frozenset()) for i in equation.inputs))
        found.update(dict.fromkeys(equation.outputs, all_of))
    return found


def expanded(f: Function, groups: Sequence[int]) -> list[Term]:
    """A function as a sum of products of pieces of independent groups of variables.

    Parameters
    ----------
    f
        The function.
    groups
        Of each variable the number of its group; groups are independent of each other.
    """
    return _Expansion(f, groups).of(f.expression)


class _Expansion:
    def __init__(self, f: Function, groups: Sequence[int]) -> None:
        self.f, self.depends, self.groups = f, _dependence(f.program), groups
        self.producers = f.program.producers()

    def piece(self, expression: Any, value: int | None) -> Term:
        """One piece, of the variables of a value of the program."""
        variables = self.depends.get(value, frozenset()) if value is not None else frozenset()
        made = dataclasses.replace(
            self.f, expression=expression, variables=tuple(sorted(variables))
        )
        return {frozenset(self.groups[v] for v in variables): made}

    def of(self, value: int) -> list[Term]:
        """The terms of a value of the program."""
        term = self.piece(value, value)
        (groups,) = term
        if len(groups) < 2 or value not in self.producers:
            return [term]
        found = self.rule(self.f.program.equations[self.producers[value]])
        return [term] if found is None or len(found) > _MAX_TERMS else _collected(found)

    def rule(self, equation: Any) -> list[Term] | None:
        """The terms of an equation's output, or None where it is no sum or product."""
        name, inputs = equation.primitive, equation.inputs
        if name in _SUMS:
            left, right = map(self.of, inputs)
            return left + [self.times(self.number(_SUMS[name]), t) for t in right]
        if name == "neg":
            return [self.times(self.number(-1.0), t) for t in self.of(inputs[0])]
        if name in _CASTS:
            return self.of(inputs[0])
        if name == "mul":
            return self.all_products(*map(self.of, inputs))
        if name == "square" or (name == "integer_pow" and equation.params["y"] == 2):
            terms = self.of(inputs[0])
            return self.all_products(terms, terms)
        if name == "div":
            inverse = self.piece(("1/", inputs[1]), inputs[1])
            return self.all_products(self.of(inputs[0]), [inverse])
        return None

    def number(self, value: float) -> Term:
        return {} if value == 1 else self.piece(value, None)

    def all_products(self, left: list[Term], right: list[Term]) -> list[Term] | None:
        if len(left) * len(right) > _MAX_TERMS:
            return None
        return [self.times(a, b) for a in left for b in right]

    def times(self, left: Term, right: Term) -> Term:
        """The product of two, pieces of common variables joined."""
        pieces = dict(left)
        for groups, piece in right.items():
            together = [g for g in pieces if g & groups or g == groups]
            joined = product(*(pieces.pop(g) for g in together), piece)
            pieces[groups.union(*together)] = joined
        return pieces


def _collected(terms: list[Term]) -> list[Term]:
    """The same sum, terms that are one piece of the same groups added up."""
    single: dict[frozenset[int], Function] = {}
    rest = []
    for term in terms:
        # A number in front of one piece belongs to it.
        groups = max(term, key=len, default=frozenset[int]())
        if len(term) - (frozenset() in term and bool(groups)) > 1:
            rest.append(term)
            continue
        piece = product(*term.values())
        if groups in single:
            piece = _added(single[groups], piece)
        single[groups] = piece
    return [{groups: piece} for groups, piece in single.items()] + rest


def _added(left: Function, right: Function) -> Function:
    variables = tuple(sorted({*left.variables, *right.variables}))
    expression = ("+", left.expression, right.expression)
    return dataclasses.replace(left, expression=expression, variables=variables)


def switches(f: Function) -> list[tuple[frozenset[int], Function]]:
    """Functions whose zeros are where f or its slope may jump, each with its variables."""
    depends, found = _dependence(f.program), []
    for equation in f.program.equations:
        if equation.primitive == "clamp":
            low, x, high = equation.inputs
            ends: list[Any] = [("+", x, ("*", -1.0, end)) for end in (low, high)]
        elif equation.primitive in _COMPARISONS:
            a, b = equation.inputs
            ends = [("+", a, ("*", -1.0, b))]
        elif equation.primitive in _AT_ZERO:
            ends = [equation.inputs[0]]
        else:
            continue
        variables = frozenset().union(*(depends.get(i, frozenset()) for i in equation.inputs))
        if variables:
            own = tuple(sorted(variables))
            found += [
                (variables, dataclasses.replace(f, expression=end, variables=own)) for end in ends
            ]
    return found
