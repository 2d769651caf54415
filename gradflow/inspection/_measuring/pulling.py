"""The pull-back of a segment: from cotangents of what leaves it to those of what enters.

Of one network. Each cotangent is at unit scale beside the logarithm of its scale, and each is
pulled back by itself.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gradflow._norms import unit_rows
from gradflow.inspection._measuring import scaled
from gradflow.inspection._measuring.scaled import Scaled
from gradflow.inspection._measuring.segments import Stretch, rows

__all__ = ["Pull", "Pulled", "log_norm"]


class Pulled(NamedTuple):
    """What a program of a walk down returns, or the numbers that it is of."""

    kept: Any  # cotangents of inputs
    leaves: Any  # log norms of those of the parameters' leaves that are whole
    layers: Any
    products: Any
    finite: Any


@dataclasses.dataclass(frozen=True)
class Pull:
    """The pull-back of a segment, by its own names of values."""

    local: Stretch
    given: tuple[int, ...]  # outputs that have cotangents
    sums: tuple[int, ...]  # inputs that have one already, to be added to
    kept: tuple[int, ...]  # inputs whose cotangents go on
    leaves: tuple[int, ...]  # inputs whose cotangents are complete, and only measured
    taps: tuple[tuple[int, int, Any], ...]  # place, operand, shape of each product's weights
    reads: tuple[tuple[int, tuple[int, ...]], ...]  # pre-activations, with their units
    reached: tuple[tuple[int, frozenset[int], frozenset[int]], ...]
    axes: tuple[tuple[int, int], ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What it computes: all but the names that the program has for it."""
        others = (self.given, self.sums, self.kept, self.leaves, self.reads, self.axes)
        taps = tuple((p, o, aval.shape, str(aval.dtype)) for p, o, aval in self.taps)
        return (self.local.key, *others, taps)

    def back(
        self, values: list[Array], packed: Any, given: list[Scaled], sums: list[Scaled]
    ) -> Pulled:
        """Pull each output's cotangent back, and add what comes to each input."""
        axes = dict(self.axes)
        parts: dict[Any, list[Scaled]] = {name: [] for name in (*self.kept, *self.leaves)}
        for name, total in zip(self.sums, sums, strict=True):
            if name in parts:
                parts[name].append(total)
        tapped: dict[int, list[Scaled]] = {place: [] for place, _, _ in self.taps}
        reached = {name: pair for name, *pair in self.reached}
        for output, cotangent in zip(self.given, given, strict=True):
            names, places = reached[output]
            inputs = [name for name in (*self.kept, *self.leaves) if name in names]
            taps = [tap for tap in self.taps if tap[0] in places]
            of_sites = [name for name in inputs if output in axes and name in axes]
            if of_sites:
                grads, _ = self._vjp((values, packed), output, of_sites, [], cotangent.unit)
                for name, grad in grads.items():
                    parts[name].append(Scaled(grad, cotangent.high, cotangent.low))
            others = [name for name in inputs if name not in of_sites]
            if others or taps:
                unit, high, low = scaled.relative(cotangent, axes.get(output))
                grads, weights = self._vjp((values, packed), output, others, taps, unit)
                for name, grad in grads.items():
                    parts[name].append(Scaled(grad, high, low))
                for place, grad in weights.items():
                    tapped[place].append(Scaled(grad, high, low))
        kept = [scaled.added(parts[name], axes.get(name)) for name in self.kept]
        leaves = [log_norm(parts[name]) for name in self.leaves]
        products = [log_norm(tapped[place]) for place, _, _ in self.taps]
        finite = [jnp.all(jnp.isfinite(part.unit)) for part in kept]
        finite += [log[0] < jnp.inf for log in leaves]  # false of NaN too
        flags = jnp.stack(finite) if finite else jnp.ones(0, bool)
        return Pulled(kept, leaves, self._rows(given), products, flags)

    def _vjp(
        self,
        entering: tuple[list[Array], Any],
        output: int,
        inputs: list[int],
        taps: list[tuple[int, int, Any]],
        unit: Array,
    ) -> tuple[dict[int, Array], dict[int, Array]]:
        """The pull-back of one output's cotangent to inputs, and to the weights of products."""
        values, packed = entering

        def value(some: dict[int, Array], tapped: dict[int, Array]) -> Array:
            inner = [some.get(name, v) for name, v in enumerate(values)]
            at = {place: (operand, tapped[place]) for place, operand, _ in taps}
            return self.local.run(inner, packed, at)[output]

        some = {name: values[name] for name in inputs}
        zeros = {place: jnp.zeros(aval.shape, aval.dtype) for place, _, aval in taps}
        return jax.vjp(value, some, zeros)[1](unit)

    def _rows(self, given: list[Scaled]) -> list[Array]:
        """The log norms over units at each pre-activation, (2, sites) each."""
        axes, out = dict(self.axes), []
        cotangents = dict(zip(self.given, given, strict=True))
        for name, units in self.reads:
            part = cotangents[name]
            norm = unit_rows(rows(part.unit, units))[1]
            high, low = (
                rows(jnp.broadcast_to(log, part.unit.shape), units)[:, 0]
                for log in scaled.spread(part, axes.get(name))
            )
            out.append(jnp.stack(scaled.plus(high, low, norm)))
        return out

    def apart(
        self, values: list[Array], packed: Any, given: list[Scaled], sums: list[Scaled]
    ) -> Pulled:
        """Of an array that a loop takes apart: the cotangents of the steps, put together."""
        del values, packed
        name = self.kept[0]
        steps = dict(zip(self.given, given, strict=True))
        whole = scaled.stacked(
            [steps.get(out) for out in self.local.steps[0].outs], dict(self.axes).get(name)
        )
        parts = [whole, *sums]
        kept = scaled.added(parts, dict(self.axes).get(name))
        return Pulled([kept], [], [], [], jnp.all(jnp.isfinite(kept.unit))[None])


def log_norm(parts: list[Scaled]) -> Array:
    """The log norm of a sum of arrays, as a sum of two floats, (2,)."""
    return jnp.stack(scaled.log_norm(scaled.added(parts, None)))[:, 0]
