"""How a program is compiled: well, or soon where that takes less time than compiling it well.

And one that is traced in float64 and called from any thread, as theory beside a simulation is.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTreeDef

__all__ = ["Float64Program", "options"]

# CPU seconds of a run below which it does not pay to compile well, measured: a program of a walk
# through a network compiles in 3.5 s, in 2.3 s without XLA's newer way to generate code for
# elementwise loops, and is slower then by a tenth to a third; in 1 s without optimisations, and
# slower by a factor of 5.
_SHORT, _SHORTEST = 3.0, 0.25


def options(seconds: float, *, computes_twice: bool = False) -> dict[str, str | bool]:
    """Return the compiler's options for a program that will run for this many CPU seconds in all.

    The results differ by rounding at most. Off CPUs there is nothing to choose.

    Parameters
    ----------
    seconds
        How long it will run, on one core.
    computes_twice
        Whether it computes things again that must come out as they did before, to the last bit, as
        a walk down a network does those of the walk up. Without optimisations they may not.
    """
    if jax.default_backend() != "cpu":
        return {}
    # Without it XLA leaves half of a wide vector unit unused, where there is one: what matters for
    # random numbers, which are arithmetic and nothing else (a fifth of matrix_free's time).
    chosen: dict[str, str | bool] = {"xla_cpu_prefer_vector_width": "512"}
    if seconds < _SHORT and _known("xla_cpu_use_fusion_emitters"):
        chosen["xla_cpu_use_fusion_emitters"] = False
    if seconds < _SHORTEST and not computes_twice:
        chosen["xla_backend_optimization_level"] = "0"
    return chosen


@functools.cache
def _known(option: str) -> bool:
    """Whether this version's compiler has an option that can be switched off."""
    nothing = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), jnp.float32))
    try:
        nothing.compile({option: False})
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Float64Program:
    """A function that was traced in float64, whatever JAX's x64 setting; of NumPy arrays.

    It is compiled when it is first called. It traces nothing then, and so can be called in a thread
    beside another that has x64 off. `jax.jit` cannot: where two threads that differ in it hand JAX
    one NumPy array at once, both get what one of them asked for (JAX 0.10, one time in two: float32
    for float64, or the reverse).

    Attributes
    ----------
    result
        The shapes of what it returns.
    """

    @classmethod
    def of(
        cls, function: Callable, arguments: tuple, seconds: float, **static: Hashable
    ) -> "Float64Program":
        """Return the function's program for arguments like these, which will run for ``seconds``.

        The same one if it is asked for again.
        """
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple(np.shape(leaf) for leaf in leaves)
        return cls._traced(function, structure, shapes, seconds, tuple(static.items()))

    @classmethod
    @functools.lru_cache(maxsize=32)
    def _traced(
        cls,
        function: Callable,
        structure: PyTreeDef,
        shapes: tuple[tuple[int, ...], ...],
        seconds: float,
        static: tuple[tuple[str, Hashable], ...],
    ) -> "Float64Program":
        leaves = [jax.ShapeDtypeStruct(shape, np.float64) for shape in shapes]
        with jax.enable_x64(True):
            jitted = jax.jit(functools.partial(function, **dict(static)))
            return cls(jitted.lower(*jax.tree.unflatten(structure, leaves)), seconds)

    def __init__(self, lowered: jax.stages.Lowered, seconds: float) -> None:
        self.result = lowered.out_info
        self._lowered, self._options = lowered, options(seconds)

    @functools.cached_property
    def _compiled(self) -> jax.stages.Compiled:
        return self._lowered.compile(self._options)

    def compile(self) -> None:
        """Compile it now, and not when it is first called."""
        self._compiled  # noqa: B018  (a property that is kept)

    def __call__(self, *arguments: Any) -> Any:
        """Return the function's result as NumPy arrays."""
        arguments = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), arguments)
        with jax.enable_x64(True), jax.no_tracing(True):
            return jax.tree.map(np.asarray, self._compiled(*arguments))
