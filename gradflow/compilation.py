"""How a program is compiled: well, or soon where that takes less time than compiling it well."""

import functools

import jax
import jax.numpy as jnp

__all__ = ["options"]

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
