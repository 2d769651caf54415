"""One walk up and one walk down a program, for many networks: its statistics and gradients.

The walk down takes each segment's cotangents at unit scale, beside the logarithms of their scales,
and pulls each back by itself: those of two values may lie further apart than a float reaches.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gradflow.inspection._measuring.pulling import Pull, Pulled, log_norm
from gradflow.inspection._measuring.scaled import Scaled
from gradflow.inspection._measuring.segments import (
    Segment,
    Stretch,
    compiled,
    cut,
    ends_gradient,
    is_float,
    rows,
    stretch,
)
from gradflow.inspection._reading.elementwise import Elementwise, elementwise
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.program import Program
from gradflow.statistics import ForwardSample, Statistic

__all__ = ["Down", "Up", "Walk"]


class Up(NamedTuple):
    """What a walk up finds: every value that a segment hands on, and what was measured."""

    values: dict[int, Any]
    statistics: dict[int, Array]  # by layer, (networks, statistics)
    finite: list[Array]  # by segment, (networks, outputs)


class Down(NamedTuple):
    """What a walk down finds, as logarithms, each a sum of two floats along axis 1.

    Attributes
    ----------
    gradients
        By layer: log ‖∂C/∂z‖ of each site, (networks, 2, sites).
    weights
        By layer: log ‖∂C/∂W‖ of this use of its weights, (networks, 2).
    parameters
        By leaf, or step of a leaf: log ‖∂C/∂θ‖, (networks, 2).
    finite
        By segment, from the last: whether its inputs' cotangents are finite, (networks, inputs).
    """

    gradients: dict[int, Array]
    weights: dict[int, Array]
    parameters: dict[int, Array]
    finite: dict[int, Array]


@dataclasses.dataclass
class Walk:
    """The segments of a program, and how they are walked.

    Attributes
    ----------
    program, layers
        What is walked.
    wanted
        The forward statistics.
    axes
        Of each value whose sites do not mix the axis of the batch, along which every site's
        cotangent has a scale of its own.
    seconds
        How long it will take for all networks, on one core, roughly.
    """

    program: Program
    layers: Sequence[Layer]
    wanted: tuple[Statistic, ...]
    axes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    seconds: float = 1.0

    @functools.cached_property
    def segments(self) -> list[Segment]:
        """The program's, in order."""
        return cut(self.program, self.layers)

    @functools.cached_property
    def _stretches(self) -> list[Stretch]:
        return [stretch(self.program, s.equations, s.inputs) for s in self.segments]

    @functools.cached_property
    def _packed(self) -> list[Any]:
        return [jax.device_put(local.packed) for local in self._stretches]

    @functools.cached_property
    def _varying(self) -> frozenset[int]:
        """Values that are not the same in every network."""
        names = ("parameters", "state", "key")
        own = [i for name in names for i in self.program.arguments.get(name, ())]
        return self.program.depends_on(own)

    @functools.cached_property
    def _readings(self) -> list[Elementwise]:
        producers = self.program.producers()
        return [elementwise(self.program, layer, producers) for layer in self.layers]

    @functools.cached_property
    def ends(self) -> list[int]:
        """Places of the `while` loops that a gradient would have to go through."""
        trained = self.program.depends_on(self.program.arguments["parameters"])
        return [
            place
            for place, equation in enumerate(self.program.equations)
            if equation.primitive in ("while", "cond")
            and ends_gradient(equation)
            and any(i in trained and is_float(self.program.avals[i]) for i in equation.inputs)
        ]

    @functools.cached_property
    def differentiable(self) -> frozenset[int]:
        """Floats that depend on the parameters and whose gradients are known."""
        program = self.program
        blocked = {i for place in self.ends for i in program.equations[place].inputs}
        for equation in reversed(program.equations):
            if not blocked.isdisjoint(equation.outputs):
                blocked.update(equation.inputs)
        trained = program.depends_on(program.arguments["parameters"]) - blocked
        return frozenset(i for i in trained if is_float(program.avals[i]))

    @functools.cached_property
    def leaves(self) -> dict[int, int]:
        """Leaves of the parameters and, where a loop takes one apart, its steps: of which leaf."""
        found = {i: i for i in self.program.arguments["parameters"]}
        consumers = self.program.consumers()
        for equation in self.program.equations:
            if equation.primitive == "unstack" and equation.inputs[0] in found:
                leaf = equation.inputs[0]
                if len(consumers[leaf]) == 1 and found[leaf] == leaf:
                    found.update(dict.fromkeys(equation.outputs, leaf))
                    del found[leaf]
        return found

    @functools.cached_property
    def _first_use(self) -> dict[int, int]:
        """The segment that takes each value first: the last that a walk down comes to."""
        first: dict[int, int] = {}
        for number, segment in enumerate(self.segments):
            for value in segment.inputs:
                first.setdefault(value, number)
        return first

    # Up ------------------------------------------------------------------------------------------

    def up(self, arguments: Mapping[int, Any]) -> Up:
        """Every value that segments hand on, the statistics of each layer, and what is finite."""
        values: dict[int, Any] = {**self._constants, **arguments}
        each = next(values[i] for i in arguments if i in self._varying)  # an axis of networks
        statistics: dict[int, Array] = {}
        finite: list[Array] = []
        for number, segment in enumerate(self.segments):
            program = self._up_programs[number]
            entering = [values[i] for i in segment.inputs]
            outputs, rows_of, flags = program(entering, self._packed[number], each)
            values.update(zip(segment.outputs, outputs, strict=True))
            statistics.update(zip(segment.layers, rows_of, strict=True))
            finite.append(flags)
        return Up(values, statistics, finite)

    @functools.cached_property
    def _constants(self) -> dict[int, Any]:
        used = {i for segment in self.segments for i in (*segment.inputs, *segment.outputs)}
        used.update(self.program.outputs)
        return {i: jax.device_put(v) for i, v in self.program.constants.items() if i in used}

    @functools.cached_property
    def _up_programs(self) -> list[Any]:
        return [
            self._up_program(*pair) for pair in zip(self.segments, self._stretches, strict=True)
        ]

    def _up_program(self, segment: Segment, local: Stretch) -> Any:
        names = [local.names[i] for i in segment.outputs]
        readings = [
            (local.names[self.layers[i].preactivation], self.layers[i].units, self._readings[i])
            for i in segment.layers
        ]
        varying = [i in self._varying for i in segment.outputs]
        checked = [
            n for n, i, v in zip(names, segment.outputs, varying, strict=True)
            if v and is_float(self.program.avals[i])
        ]  # fmt: skip
        in_axes = ([0 if i in self._varying else None for i in segment.inputs], None, 0)
        out_axes = ([0 if v else None for v in varying], 0, 0)
        key: Any = ("up", local.key, tuple(names), tuple(checked), self.wanted)
        key += tuple((name, units, reading.key) for name, units, reading in readings)
        wanted = self.wanted

        def up(values: list[Any], packed: Any, each: Any) -> tuple[list[Any], list[Array], Array]:
            del each
            env = local.run(values, packed)
            read = [_measured(env[name], units, piece, wanted) for name, units, piece in readings]
            finite = [jnp.all(jnp.isfinite(env[name])) for name in checked]
            flags = jnp.stack(finite) if finite else jnp.ones(0, bool)
            return [env[name] for name in names], read, flags

        return compiled(key, up, in_axes, out_axes, self.seconds)

    def of_network(self, values: Mapping[int, Any], value: int, network: int) -> Any:
        """A value of one network."""
        return values[value][network] if value in self._varying else values[value]

    # Down ----------------------------------------------------------------------------------------

    def down(self, values: dict[int, Any], top: Mapping[int, Scaled]) -> Down:
        """Gradients from the cotangents of the outputs, by number; ``values`` is used up."""
        found = Down({}, {}, {}, {})
        cotangents = dict(top)
        for _ in self.descend(values, cotangents, found):
            pass
        for value in self.leaves.keys() & cotangents.keys():
            found.parameters[value] = _log_norms(cotangents[value])
        return found

    def descend(
        self, values: dict[int, Any], cotangents: dict[int, Scaled], found: Down
    ) -> Iterator[int]:
        """Walk down, segment by segment: the number of each, before its cotangents are pulled."""
        for number in range(len(self.segments) - 1, -1, -1):
            yield number
            segment = self.segments[number]
            given = [i for i in segment.outputs if i in cotangents]
            plan = self._down_program(number, given, cotangents)
            if plan is not None:
                program, result, sums = plan
                out = program(
                    [values[i] for i in segment.inputs],
                    self._packed[number],
                    [cotangents[i] for i in given],
                    [cotangents[i] for i in sums],
                )
                cotangents.update(zip(result.kept, out.kept, strict=True))
                found.parameters.update(zip(result.leaves, out.leaves, strict=True))
                found.gradients.update(zip(result.layers, out.layers, strict=True))
                found.weights.update(zip(result.products, out.products, strict=True))
                found.finite[number] = out.finite
                for value in result.leaves:
                    cotangents.pop(value, None)
            for value in segment.outputs:
                cotangents.pop(value, None)
                values.pop(value, None)

    def _down_program(
        self, number: int, given: list[int], cotangents: Mapping[int, Any]
    ) -> "tuple[Any, Pulled, list[int]] | None":
        """The program that pulls the given cotangents back, what it returns, and what it adds to.

        None where nothing below is trained.
        """
        segment = self.segments[number]
        sums = tuple(i for i in segment.inputs if i in cotangents)
        key = (number, tuple(given), sums)
        plans = self._plans
        if key not in plans:
            plans[key] = self._plan(*key)
        return plans[key]

    @functools.cached_property
    def _plans(self) -> dict[Any, Any]:
        return {}

    def _plan(
        self, number: int, given: tuple[int, ...], sums: tuple[int, ...]
    ) -> "tuple[Any, Pulled, list[int]] | None":
        segment, local = self.segments[number], self._stretches[number]
        apart = segment.equations[0].primitive == "unstack"
        if not given or (apart and segment.outputs[0] in self.leaves):
            return None
        floats = frozenset(n for v, n in local.names.items() if is_float(self.program.avals[v]))
        reached = {local.names[i]: local.sources(local.names[i], floats) for i in given}
        names, places = (frozenset().union(*each) for each in zip(*reached.values(), strict=True))
        wanted = [i for i in segment.inputs if i in self.differentiable and local.names[i] in names]
        leaves = [i for i in wanted if i in self.leaves and self._first_use[i] == number]
        kept = [i for i in wanted if i not in leaves]
        added = [i for i in sums if i in wanted]
        made = {i: p for p, step in enumerate(local.steps) for i in step.equation.outputs}
        products = [i for i in segment.products if made[self.layers[i].product] in places]
        at_z = [i for i in segment.layers if self.layers[i].preactivation in given]
        pull = Pull(
            local=local,
            given=tuple(local.names[i] for i in given),
            sums=tuple(local.names[i] for i in added),
            kept=tuple(local.names[i] for i in kept),
            leaves=tuple(local.names[i] for i in leaves),
            taps=tuple(self._tap(local, i, made[self.layers[i].product]) for i in products),
            reads=tuple(
                (local.names[self.layers[i].preactivation], self.layers[i].units) for i in at_z
            ),
            reached=tuple((n, frozenset(a), frozenset(b)) for n, (a, b) in reached.items()),
            axes=tuple(
                (local.names[i], self.axes[i])
                for i in (*segment.inputs, *segment.outputs)
                if i in self.axes
            ),
        )
        in_axes = ([0 if i in self._varying else None for i in segment.inputs], None, 0, 0)
        function = pull.apart if apart else pull.back
        program = compiled(("down", apart, pull.key), function, in_axes, 0, self.seconds)
        return program, Pulled(kept, leaves, at_z, products, ()), added

    def _tap(self, local: Stretch, layer: int, place: int) -> tuple[int, int, Any]:
        """The place of a layer's product, which operand its weights are, their shape and dtype."""
        weights = self.layers[layer].weights
        return place, local.steps[place].equation.inputs.index(weights), self.program.avals[weights]


@jax.jit
@jax.vmap
def _log_norms(part: Scaled) -> Array:
    return log_norm([part])


def _measured(
    z: Array, units: tuple[int, ...], piece: Elementwise, wanted: tuple[Statistic, ...]
) -> Array:
    """The forward statistics of a layer, from its pre-activation; NaN of too few sites."""
    phi, slope = piece.with_slope(z)
    of_units = rows(z, units)
    sample = ForwardSample(
        preactivation=of_units,
        activation=rows(phi, units),
        slope=rows(slope, units),
        log_scale=jnp.zeros(len(of_units), of_units.dtype),
        saturated_slope=piece.saturated_slope,
    )
    enough = [s.sites <= len(of_units) for s in wanted]
    values = [
        jnp.asarray(s.measure(sample), of_units.dtype) if e else jnp.nan
        for s, e in zip(wanted, enough, strict=True)
    ]
    return jnp.stack([jnp.asarray(v, of_units.dtype) for v in values])
