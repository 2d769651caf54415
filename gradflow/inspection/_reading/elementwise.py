"""The elementwise function φ from a layer's pre-activation to its activation, and its slope."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow.inspection._measuring.segments import Stretch, stretch
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.program import Program

__all__ = ["Elementwise", "elementwise"]

# As `Network.saturation_threshold`: the share of max|φ'| below which a unit is saturated.
_THRESHOLD = 4 * 0.01 * 0.99
# Where max|φ'| is looked for: densely near 0, and up to where a slope that grows is seen to.
_NEAR, _FAR, _POINTS = 20.0, 1e4, 8001


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """A function φ of a layer's pre-activation, element by element; the identity without steps."""

    shape: tuple[int, ...]
    dtype: Any
    steps: Stretch | None = None
    output: int = 0

    @property
    def key(self) -> Any:
        """Equal for functions that compute the same."""
        return self.steps and (
            self.steps.key,
            self.output,
            *(numbers.tobytes() for numbers in self.steps.packed),
        )

    def with_slope(self, z: Array) -> tuple[Array, Array]:
        """φ(z) and φ'(z), for an array of the layer's shape; traceable."""
        if self.steps is None:
            return z, jnp.ones_like(z)
        run = self.steps.run
        return jax.jvp(lambda z: run([z])[self.output], (z,), (jnp.ones_like(z),))

    @property
    def saturated_slope(self) -> float:
        """The |φ'| below which a unit is saturated; 0 of an unbounded one, and of the identity."""
        if self.steps is None:
            return 0.0
        if self.key not in _SLOPES:
            _SLOPES[self.key] = _THRESHOLD * self._largest_slope()
        return _SLOPES[self.key]

    def _largest_slope(self) -> float:
        """max|φ'|, seen on a grid; 0 where it is infinite."""
        size = math.prod(self.shape)
        if size == 0:
            return 0.0
        near = np.linspace(-_NEAR, _NEAR, _POINTS)
        far = np.geomspace(_NEAR, _FAR, _POINTS // 20)
        points = np.concatenate([near, far, -far])
        count = -(-len(points) // size)
        filled = np.resize(points, (count, *self.shape)).astype(self.dtype)
        with jax.ensure_compile_time_eval():
            slopes = jax.jit(jax.vmap(lambda z: self.with_slope(z)[1]))(filled)
            slopes = np.abs(np.asarray(slopes, np.float64)).reshape(-1)
        points = filled.astype(np.float64).reshape(-1)
        here = slopes[np.abs(points) <= _NEAR]
        largest, beyond = float(np.max(here)), float(np.max(slopes))
        bounded = math.isfinite(beyond) and beyond <= 1.01 * largest
        return largest if bounded else 0.0


_SLOPES: dict[Any, float] = {}


def elementwise(program: Program, layer: Layer, producers: dict[int, int]) -> Elementwise:
    """φ of a layer; ``producers`` are the program's."""
    z, aval = layer.preactivation, program.avals[layer.preactivation]
    if layer.activation == z:
        return Elementwise(aval.shape, aval.dtype)
    needed: set[int] = set()
    pending = [layer.activation]
    while pending:
        value = pending.pop()
        place = producers.get(value)
        if value != z and place is not None and place not in needed:
            needed.add(place)
            pending += program.equations[place].inputs
    steps = stretch(program, [program.equations[place] for place in sorted(needed)], [z])
    return Elementwise(aval.shape, aval.dtype, steps, steps.names[layer.activation])
