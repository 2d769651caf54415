"""Where the first NaN or infinite number comes from: the equation, its module, the layer before."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.inspection._measuring.scaled import Scaled
from gradflow.inspection._measuring.segments import Segment, ends_gradient, is_float
from gradflow.inspection._measuring.walk import Down, Up, Walk
from gradflow.inspection._reading.program import Equation

__all__ = ["Born", "also", "born_above", "born_below", "without_derivative"]


@dataclasses.dataclass(frozen=True)
class Born:
    """The first NaN or infinite number of a walk.

    Attributes
    ----------
    kind
        ``"NaN"`` or ``"infinite number"``.
    direction
        ``"forward"`` or ``"backward"``.
    primitive, path
        The equation that made it, and its module; empty where it has none.
    layer
        The name of the layer before it, in order of data flow; empty before the first.
    networks
        In how many networks there is any.
    """

    kind: str
    direction: str
    primitive: str
    path: str
    layer: str
    networks: int

    def __str__(self) -> str:
        """One sentence."""
        where = f"`{self.path}` ({self.primitive})" if self.path else f"`{self.primitive}`"
        after = f", after {self.layer}" if self.layer else ""
        return (
            f"first {self.kind} in {where}{after}, {self.direction}, in {self.networks} "
            f"{'network' if self.networks == 1 else 'networks'}"
        )


def also(born: Born | None, more: Born | None) -> Born | None:
    """What was found in some networks, with how many of others have any."""
    if born is None or more is None:
        return born or more
    return dataclasses.replace(born, networks=born.networks + more.networks)


def born_above(walk: Walk, up: Up, count: int) -> Born | None:
    """The first of a walk up, in the first ``count`` networks; None where all is finite."""
    finite = [flags[:count] for flags in jax.device_get(up.finite)]
    bad = [number for number, flags in enumerate(finite) if not flags.all()]
    if not bad:
        return None
    segment = walk.segments[bad[0]]
    network = int(np.flatnonzero(~finite[bad[0]].all(1))[0])
    values = {i: walk.of_network(up.values, i, network) for i in segment.inputs}
    values = {**walk.program.constants, **values}
    _evaluate(segment.equations, values)
    made = [
        (equation, [values[i] for i in equation.inputs], [values[i] for i in equation.outputs])
        for equation in segment.equations
    ]
    return _first(walk, made, "forward", _any(finite))


def born_below(
    walk: Walk,
    arguments: Mapping[int, Any],
    top: Callable[[], dict[int, Scaled]],
    finite: dict[int, Any],
    count: int,
) -> Born | None:
    """The first of a walk down, by whether each segment's cotangents are finite, (networks, …)."""
    finite = {number: finite[number][:count] for number in sorted(finite, reverse=True)}
    bad = [number for number, flags in finite.items() if not flags.all()]
    if not bad:
        return None
    segment = walk.segments[bad[0]]
    network = int(np.flatnonzero(~finite[bad[0]].all(1))[0])
    values, cotangents = walk.up(arguments).values, top()
    for number in walk.descend(values, cotangents, Down({}, {}, {}, {})):
        if number == bad[0]:
            break
    given = {i: cotangents[i] for i in segment.outputs if i in cotangents}
    high = max(float(part.high[network].max()) for part in given.values())
    arrays = {
        i: part.unit[network] * np.exp(min(0.0, float(part.high[network].max()) - high))
        for i, part in given.items()
    }
    values = {i: walk.of_network(values, i, network) for i in segment.inputs}
    values = {**walk.program.constants, **values}
    _evaluate(segment.equations, values)
    made = list(_pulled(segment, values, arrays))
    return _first(walk, made, "backward", _any(finite.values()))


def _any(finite: Iterable[np.ndarray]) -> int:
    """How many networks have a number that is not finite."""
    return int(np.sum(~np.stack([flags.all(1) for flags in finite]).all(0)))


def without_derivative(walk: Walk) -> Equation | None:
    """The first equation, from the last, that JAX has no reverse derivative of."""
    avals = walk.program.avals
    for equation in reversed(walk.program.equations):
        own = [n for n, i in enumerate(equation.inputs) if i in walk.differentiable]
        if not own or ends_gradient(equation):
            continue

        def pulled(inputs: list[Any], e: Any = equation, own: Any = own) -> Any:
            def outputs(some: list[Any]) -> Any:
                known = dict(zip(own, some, strict=True))
                out = e.evaluate(*(known.get(n, x) for n, x in enumerate(inputs)))
                return [o for o in out if is_float(o)]

            out, pull = jax.vjp(outputs, [inputs[n] for n in own])
            return pull(out)

        try:
            jax.eval_shape(pulled, [avals[i] for i in equation.inputs])
        except (NotImplementedError, TypeError, ValueError):
            return equation
    return None


def _evaluate(equations: Sequence[Equation], values: dict[int, Any]) -> None:
    for equation in equations:
        out = equation.evaluate(*(values[i] for i in equation.inputs))
        values.update(zip(equation.outputs, out, strict=True))


def _pulled(segment: Segment, values: dict[int, Any], cotangents: dict[int, Any]) -> Any:
    """Of each equation, from the last: it, the cotangents of its outputs, and of its inputs."""
    for equation in reversed(segment.equations):
        given = [cotangents.get(i) for i in equation.outputs]
        floats = [n for n, i in enumerate(equation.inputs) if is_float(values[i])]
        if all(g is None for g in given) or not floats or ends_gradient(equation):
            continue
        inputs = [values[i] for i in equation.inputs]

        def outputs(some: list[Any], e: Any = equation, x: Any = inputs, f: Any = floats) -> Any:
            known = dict(zip(f, some, strict=True))
            out = e.evaluate(*(known.get(n, v) for n, v in enumerate(x)))
            return [o for o in out if is_float(o)]

        out, pull = jax.vjp(outputs, [inputs[n] for n in floats])
        of_floats = [g for g, i in zip(given, equation.outputs, strict=True) if is_float(values[i])]
        filled = [
            jnp.zeros_like(o) if g is None else jnp.asarray(g, o.dtype)
            for o, g in zip(out, of_floats, strict=True)
        ]
        (pulled,) = pull(filled)
        yield equation, filled, pulled
        for n, part in zip(floats, pulled, strict=True):
            value = equation.inputs[n]
            cotangents[value] = cotangents[value] + part if value in cotangents else part


def _first(walk: Walk, made: list[tuple[Any, list, list]], direction: str, networks: int) -> Born:
    """The equation that made a number that is not finite of finite ones, or NaN of none."""

    def has(arrays: list[Any], test: Callable) -> bool:
        return any(bool(jnp.any(test(x))) for x in arrays if is_float(x))

    def not_finite(x: Any) -> Any:
        return ~jnp.isfinite(x)

    for test in (not_finite, jnp.isnan):
        for equation, before, after in made:
            if has(after, test) and not has(before, test):
                kind = "NaN" if has(after, jnp.isnan) else "infinite number"
                layer = _layer_before(walk, equation)
                return Born(kind, direction, equation.primitive, equation.path, layer, networks)
    last = made[-1][0]
    layer = _layer_before(walk, last)
    return Born("NaN", direction, last.primitive, last.path, layer, networks)


def _layer_before(walk: Walk, equation: Equation) -> str:
    """The name of the last layer that an equation's inputs come from."""
    names = {layer.preactivation: layer.name for layer in walk.layers}
    producers = walk.program.producers()
    found: dict[int, str] = {}
    pending, seen = list(equation.inputs), set()
    while pending:
        value = pending.pop()
        if value in names:
            found[producers[value]] = names[value]
        elif value in producers and value not in seen:
            seen.add(value)
            pending += walk.program.equations[producers[value]].inputs
    return found[max(found)] if found else ""
