"""Read a function of JAX as a straight program: equations in order, with the names of its modules.

`jax.make_jaxpr` makes a program of whatever wrote it. Calls (`jit`, `remat`, …) are put in line,
`scan` is unrolled, so that its steps are layers like all others, and what depends on no argument is
computed here, once. What has no meaning in line stays one equation: `while`, `cond` whose predicate
is not known, and functions with a derivative of their own (`custom_jvp`, `custom_vjp`), unless they
hold a product, which `custom_jvp` may.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array

from gradflow.errors import InputError

__all__ = ["Equation", "Program", "definition", "label", "on_host", "read"]

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot"})
_MAX_EQUATIONS = 200_000
# Names that JAX adds to the stack of names and that no user wrote.
_WRAPPER = re.compile(
    r"(?:p?jit|[pv]map|jvp|transpose|linearize|checkpoint|remat(?:ted_computation)?)\((.*)\)"
)


@dataclasses.dataclass(frozen=True)
class Equation:
    """One step of a program: outputs = primitive(inputs).

    Attributes
    ----------
    primitive
        The name of JAX's primitive; ``"stack"`` and ``"unstack"`` put together and take apart the
        arrays that a loop had as one, along axis 0.
    inputs, outputs
        Numbers of values, keys of `Program.avals`.
    params
        The primitive's parameters.
    path
        The modules that it is part of, outermost first, as ``"Net/Dense_3"``; empty if unnamed.
    calls
        The functions that it was written in, outermost first, as ``("gelu",)``.
    inner
        Of a function with its own derivative: its definition, else None.
    """

    primitive: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    path: str = ""
    calls: tuple[str, ...] = ()
    inner: "Program | None" = dataclasses.field(default=None, repr=False)
    _primitive: Any = dataclasses.field(default=None, repr=False)

    def evaluate(self, *values: Any) -> tuple[Any, ...]:
        """Its outputs for the given inputs, by JAX itself; traceable."""
        if self._primitive is None and self.primitive == "stack":
            return (jnp.stack(values),)
        if self._primitive is None and self.primitive == "unstack":
            return tuple(values[0][i] for i in range(len(self.outputs)))
        out = self._primitive.bind(*values, **self._primitive.get_bind_params(dict(self.params)))
        return tuple(out) if self._primitive.multiple_results else (out,)

    @property
    def signature(self) -> tuple[Any, ...]:
        """The primitive and its parameters: equal ones compute the same thing."""
        return self.primitive, _text(self.params), len(self.inputs), len(self.outputs)


@dataclasses.dataclass
class Program:
    """A straight program: what it takes, its equations in order of data flow, what it returns.

    Attributes
    ----------
    avals
        Of each value its shape and dtype, `jax.ShapeDtypeStruct`, by number.
    constants
        Values that are known, in every network the same: NumPy arrays, and keys.
    arguments
        The numbers of its arguments by name: ``"parameters"``, ``"state"``, ``"key"``,
        ``"inputs"``, each in the order of `jax.tree.leaves`.
    names
        Of each argument the path of its leaf, as ``"['params']['Dense_0']['kernel']"``.
    equations
        In order.
    outputs
        The numbers of what it returns, in the order of `jax.tree.leaves`.
    """

    avals: dict[int, jax.ShapeDtypeStruct]
    constants: dict[int, Any]
    arguments: dict[str, tuple[int, ...]]
    names: dict[int, str]
    equations: list[Equation]
    outputs: tuple[int, ...]

    def consumers(self) -> dict[int, list[int]]:
        """Of each value the places of the equations that take it."""
        found: dict[int, list[int]] = {}
        for place, equation in enumerate(self.equations):
            for value in dict.fromkeys(equation.inputs):
                found.setdefault(value, []).append(place)
        return found

    def producers(self) -> dict[int, int]:
        """Of each value the place of the equation that makes it."""
        return {v: place for place, eqn in enumerate(self.equations) for v in eqn.outputs}

    def depends_on(self, values: Iterable[int]) -> frozenset[int]:
        """All values that are computed from these, and these."""
        found = set(values)
        for equation in self.equations:
            if not found.isdisjoint(equation.inputs):
                found.update(equation.outputs)
        return frozenset(found)

    def run(self, arguments: Mapping[int, Any]) -> dict[int, Any]:
        """Every value for the given arguments, equation by equation; traceable."""
        values: dict[int, Any] = {**self.constants, **arguments}
        for equation in self.equations:
            out = equation.evaluate(*(values[i] for i in equation.inputs))
            values.update(zip(equation.outputs, out, strict=True))
        return values


def read(function: Callable[..., Any], **arguments: Any) -> Program:
    """The program of a function of the named arguments, pytrees of arrays or of their shapes.

    Parameters
    ----------
    function
        It takes the arguments in the order given, and returns a pytree of arrays.
    arguments
        In their order; `jax.ShapeDtypeStruct` serves.

    Raises
    ------
    InputError
        If loops make it longer than 200 000 equations.
    """
    closed = jax.make_jaxpr(function)(*arguments.values())
    reader = _Reader()
    by_name, names, flat = {}, {}, []
    for name, tree in arguments.items():
        numbers = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            number = reader.new(
                leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
            )
            numbers.append(number)
            names[number] = jax.tree_util.keystr(path)
        by_name[name] = tuple(numbers)
        flat += numbers
    reader.variable = set(flat)
    outputs = reader.inline(closed, flat, "", ())
    program = Program(
        reader.avals, reader.constants, by_name, names, reader.equations, tuple(outputs)
    )
    return _needed(program)


def label(path: str) -> str:
    """A path of modules without what JAX adds to it."""
    parts = []
    for part in re.split(r"/(?![^(]*\))", path):  # a slash in parentheses is of a module's name
        while match := _WRAPPER.fullmatch(part):
            part = match[1]
        if part:
            parts.append(part)
    return "/".join(parts)


def _text(value: Any) -> str:
    """A text of parameters that is the same for the same computation: no addresses in it."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={_text(value[name])}" for name in sorted(value))
    if (jaxpr := _jaxpr_of(value)) is not None:
        source = getattr(jaxpr.debug_info, "func_src_info", "")
        return f"{source}:{jaxpr}"
    if isinstance(value, (tuple, list)):
        return f"({','.join(map(_text, value))})"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.tolist()}"
    return re.sub(r" at 0x[0-9a-f]+|id=\d+", "", str(value))


def _jaxpr_of(value: Any) -> Any:
    """The open jaxpr of a parameter that is one, closed or not; else None."""
    if isinstance(value, core.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, core.Jaxpr) else None


def _inner_jaxpr(params: Mapping[str, Any]) -> Any:
    """The only program among an equation's parameters, or None."""
    found = [p for p in params.values() if isinstance(p, (core.ClosedJaxpr, core.Jaxpr))]
    return found[0] if len(found) == 1 else None


def _is_of_operands(inner: Any, eqn: Any) -> bool:
    """Whether a program is called with an equation's operands, and is no function of elements."""
    jaxpr = _jaxpr_of(inner)
    pairs = (jaxpr.invars, eqn.invars), (jaxpr.outvars, eqn.outvars)
    kinds = [[[(v.aval.shape, v.aval.dtype) for v in some] for some in pair] for pair in pairs]
    return all(own == outer for own, outer in kinds)


def _holds_product(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _PRODUCTS
        or any(map(_holds_product, filter(None, map(_jaxpr_of, _flat(eqn.params.values())))))
        for eqn in _jaxpr_of(jaxpr).eqns
    )


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value


class _Reader:
    """Numbers for values, and the equations so far."""

    def __init__(self) -> None:
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}
        self.constants: dict[int, Any] = {}
        self.equations: list[Equation] = []
        self.variable: set[int] = set()  # what depends on an argument

    def new(self, aval: Any) -> int:
        number = len(self.avals)
        self.avals[number] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return number

    def constant(self, value: Any) -> int:
        number = self.new(jax.typeof(value))
        self.constants[number] = on_host(value)
        return number

    def inline(
        self, closed: Any, arguments: Sequence[int], path: str, calls: tuple[str, ...]
    ) -> list[int]:
        """Put a jaxpr in line; the numbers of its outputs."""
        jaxpr = _jaxpr_of(closed)
        consts = [self.constant(c) for c in getattr(closed, "consts", ())]
        variables = [*jaxpr.constvars, *jaxpr.invars] if jaxpr.constvars else list(jaxpr.invars)
        env = dict(zip(variables, [*consts, *arguments], strict=True))

        def number(atom: Any) -> int:
            return self.constant(_as_array(atom)) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inner = _joined(path, str(eqn.source_info.name_stack))
            out = self.equation(eqn, [number(atom) for atom in eqn.invars], inner, calls)
            env.update(zip(eqn.outvars, out, strict=True))
            if len(self.equations) > _MAX_EQUATIONS:
                raise InputError(
                    f"the model has more than {_MAX_EQUATIONS} equations, its loops unrolled; "
                    "inspect it with fewer steps"
                )
        return [number(atom) for atom in jaxpr.outvars]

    def equation(
        self, eqn: Any, inputs: list[int], path: str, calls: tuple[str, ...]
    ) -> Sequence[int]:
        """Read one equation; the numbers of its outputs."""
        name, inner = eqn.primitive.name, _inner_jaxpr(eqn.params)
        own_derivative = name.startswith(("custom_jvp", "custom_vjp"))
        named = (*calls, _name_of(eqn.params, inner)) if inner is not None else calls
        if name == "scan":
            return self.scan(eqn, inputs, path, calls)
        if name == "cond" and inputs[0] not in self.variable and inputs[0] in self.constants:
            branches = eqn.params["branches"]
            chosen = int(np.clip(self.constants[inputs[0]], 0, len(branches) - 1))
            return self.inline(branches[chosen], inputs[1:], path, calls)
        called = inner is not None and not own_derivative and _is_of_operands(inner, eqn)
        if called or (name.startswith("custom_jvp") and _holds_product(inner)):
            return self.inline(inner, inputs, path, named)
        known = definition(inner) if own_derivative and inner is not None else None
        return self.step(
            name, inputs, [v.aval for v in eqn.outvars], eqn.params, path, named, known,
            eqn.primitive,
        )  # fmt: skip

    def step(
        self,
        name: str,
        inputs: Sequence[int],
        avals: Sequence[Any],
        params: Mapping[str, Any],
        path: str,
        calls: tuple[str, ...],
        inner: Program | None = None,
        primitive: Any = None,
    ) -> tuple[int, ...]:
        outputs = tuple(self.new(aval) for aval in avals)
        equation = Equation(
            name, tuple(inputs), outputs, params, label(path), tuple(filter(None, calls)), inner,
            primitive,
        )  # fmt: skip
        if self.variable.isdisjoint(inputs) and not name.startswith("random_"):
            with jax.ensure_compile_time_eval():
                values = equation.evaluate(*(self.constants[i] for i in inputs))
            self.constants.update(zip(outputs, map(on_host, values), strict=True))
        else:
            self.variable.update(outputs)
            self.equations.append(equation)
        return outputs

    def scan(
        self, eqn: Any, inputs: Sequence[int], path: str, calls: tuple[str, ...]
    ) -> Sequence[int]:
        """Unroll a loop: its carry goes from step to step, its stacked inputs are taken apart."""
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        inner = _jaxpr_of(body)
        if inner.constvars:  # of an open jaxpr; a closed one has its constants beside it
            inner = inner.replace(constvars=(), invars=[*inner.constvars, *inner.invars])
        ranks = [v.aval.ndim for v in inner.invars]
        stacked = _trailing(eqn.invars, ranks)
        carried = len(eqn.outvars) - _trailing(eqn.outvars, [v.aval.ndim for v in inner.outvars])
        consts = list(inputs[: len(inputs) - carried - stacked])
        carry = list(inputs[len(consts) : len(consts) + carried])
        xs = [self.unstack(x, length, path, calls) for x in inputs[len(consts) + carried :]]
        order = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        ys: list[list[int]] = [[] for _ in eqn.outvars[carried:]]
        for i in order:
            out = self.inline(
                body, [*consts, *carry, *(x[i] for x in xs)], _joined(path, f"[{i}]"), calls
            )
            carry = out[:carried]
            for collected, y in zip(ys, out[carried:], strict=True):
                collected.append(y)
        if eqn.params["reverse"]:
            ys = [y[::-1] for y in ys]
        avals = [v.aval for v in eqn.outvars[carried:]]
        stacks = [
            self.step("stack", y, [aval], {}, path, calls)[0] if y else self.constant(_empty(aval))
            for y, aval in zip(ys, avals, strict=True)
        ]
        return [*carry, *stacks]

    def unstack(
        self, value: int, length: int, path: str, calls: tuple[str, ...]
    ) -> tuple[int, ...]:
        whole = self.avals[value]
        part = jax.ShapeDtypeStruct(whole.shape[1:], whole.dtype)
        return self.step("unstack", [value], [part] * length, {}, path, calls)


def _trailing(variables: Sequence[Any], ranks: Sequence[int]) -> int:
    """How many of the last variables have one axis more than the loop's body sees."""
    pairs = zip(reversed(variables), reversed(ranks), strict=True)
    count = 0
    for variable, rank in pairs:
        if variable.aval.ndim != rank + 1:
            break
        count += 1
    return count


def _as_array(literal: Any) -> np.ndarray:
    return np.asarray(literal.val, literal.aval.dtype)


def on_host(value: Any) -> Any:
    """A NumPy array; a key, which is none, as it is."""
    return value if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else np.asarray(value)


def _empty(aval: Any) -> Array:
    return jnp.zeros(aval.shape, aval.dtype)


def _joined(outer: str, inner: str) -> str:
    return f"{outer}/{inner}" if outer and inner else outer or inner


def _name_of(params: Mapping[str, Any], inner: Any) -> str:
    """The name of the function that an equation calls; empty for unnamed ones."""
    name = str(params.get("name") or _jaxpr_of(inner).debug_info.func_name)
    return "" if name.startswith("<") else name


def definition(inner: Any) -> Program:
    """The program of a function inside another: its own derivative's, or a branch's."""
    reader = _Reader()
    jaxpr = _jaxpr_of(inner)
    numbers = [reader.new(v.aval) for v in jaxpr.invars]
    reader.variable = set(numbers)
    outputs = reader.inline(inner, numbers, "", ())
    return Program(
        reader.avals, reader.constants, {"inputs": tuple(numbers)}, {}, reader.equations,
        tuple(outputs),
    )  # fmt: skip


def _needed(program: Program) -> Program:
    """The program without what its outputs do not need."""
    needed, kept = set(program.outputs), []
    for equation in reversed(program.equations):
        if not needed.isdisjoint(equation.outputs):
            kept.append(equation)
            needed.update(equation.inputs)
    constants = {i: value for i, value in program.constants.items() if i in needed}
    return dataclasses.replace(program, equations=kept[::-1], constants=constants)
