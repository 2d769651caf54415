"""Compiling programs: with fewer optimisations where a program runs for less time than they take.

Also programs in float64 that may be called from any thread, as theory beside a simulation is.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTreeDef

# CPU seconds of a run below which optimisations cost more than they save. Measured: the program of
# a forward and backward pass compiles in 3.5 s; without XLA's newer code for elementwise loops in
# 2.3 s, to run slower by a tenth to a third; without optimisations in 1 s, to run 5 times slower.
_SHORT, _SHORTEST = 3.0, 0.25


def options(seconds: float, *, computes_twice: bool = False) -> dict[str, str | bool]:
    """The compiler's options for a program, by how long it will run.

    Results differ by rounding at most.

    Parameters
    ----------
    seconds
        How long all runs of the program will take, in seconds of one core.
    computes_twice
        Whether the program computes values again that must be the same to the last bit, as a
        backward pass does those of the forward pass. Without optimisations they may differ.

    Returns
    -------
    dict
        Options for `jax.stages.Lowered.compile`; none on accelerators.
    """
    if jax.default_backend() != "cpu":
        return {}
    # XLA's default leaves half of a wide vector unit unused. This matters for random numbers, which
    # are arithmetic and nothing else (a fifth of matrix_free's time).
    chosen: dict[str, str | bool] = {"xla_cpu_prefer_vector_width": "512"}
    if seconds < _SHORT and _known("xla_cpu_use_fusion_emitters"):
        chosen["xla_cpu_use_fusion_emitters"] = False
    if seconds < _SHORTEST and not computes_twice:
        chosen["xla_backend_optimization_level"] = "0"
    return chosen


@functools.cache
def _known(option: str) -> bool:
    """Whether this version of XLA has an option that can be switched off."""
    nothing = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), jnp.float32))
    try:
        nothing.compile({option: False})
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Float64Program:
    """A function of NumPy arrays that computes in float64, whatever JAX's x64 setting.

    The function is traced at once and compiled at the first call. A call traces nothing, and so
    may be made in one thread while another has x64 off. `jax.jit` does not allow that: where two
    threads with different settings hand JAX the same NumPy array at once, both get the dtype that
    one of them wants (JAX 0.10, one time in two).

    Attributes
    ----------
    result
        The shapes and dtypes of the function's result.
    """

    @classmethod
    def of(
        cls, function: Callable, arguments: tuple, seconds: float, **static: Hashable
    ) -> "Float64Program":
        """The program of a function for arguments of these shapes, traced once and cached.

        Parameters
        ----------
        function
            A function that JAX can trace.
        arguments
            Arguments with the shapes of those that the program will be called with.
        seconds
            How long a run will take, in seconds of one core.
        **static
            Further arguments, which are constants of the program.
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
        """Compile the program now, before its first call."""
        self._compiled  # noqa: B018  (a cached property)

    def __call__(self, *arguments: Any) -> Any:
        """The function's result, as NumPy arrays."""
        arguments = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), arguments)
        with jax.enable_x64(True), jax.no_tracing(True):
            return jax.tree.map(np.asarray, self._compiled(*arguments))
