"""Arguments that become JAX's or NumPy's: keys and arrays, converted and checked once.

Within a program that is traced (under `jax.jit`, `jax.vmap`, `jax.grad`) the shapes and dtypes of
arguments are known and checked; their values are not.
"""

import math
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from gradflow._checks import is_traced, shown
from gradflow.errors import InputError

# The generator of every key that is made from a seed, whatever JAX's default is: a seed draws the
# same networks everywhere.
PRNG = "threefry2x32"
_SEEDS = 1 << 63


def from_seed(seed: Any) -> PRNGKeyArray:
    """The key of a seed: the upper and the lower half of its 64 bits are threefry's two words.

    For seeds from 0 to 2³² - 1 it is ``jax.random.key(seed, impl="threefry2x32")``, which ignores
    the upper half of other seeds where JAX's x64 mode is off.

    Raises
    ------
    InputError
        If the seed is no whole number from -2⁶³ to 2⁶³ - 1.
    """
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not (whole and -_SEEDS <= seed < _SEEDS):
        raise InputError(
            f"seed is {shown(seed)}; it is a whole number from -{_SEEDS} to {_SEEDS - 1}"
        )
    bits = int(seed) % (2 * _SEEDS)
    words = np.array([bits >> 32, bits & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jax.device_put(words), impl=PRNG)


def as_key(key: Any, name: str = "key") -> PRNGKeyArray:
    """One JAX key, from a key of any kind (new style or raw) or from a seed (`from_seed`).

    Raises
    ------
    InputError
        If ``key`` is neither.
    """
    if isinstance(key, Integral):
        return from_seed(key)
    kind: Any = getattr(key, "dtype", None)
    shape = getattr(key, "shape", None)
    if isinstance(key, jax.Array) and jnp.issubdtype(kind, jax.dtypes.prng_key) and shape == ():
        return key
    if isinstance(key, jax.Array | np.ndarray) and kind == np.uint32 and shape == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key), impl=PRNG)  # an old-style raw key
    raise InputError(
        f"{name} is {shown(key)}; it is one JAX key, as jax.random.key(0) makes it, or a whole "
        "number as a seed"
    )


def all_finite(array: Array | np.ndarray) -> bool:
    """Whether all values of an array are finite; traced values are taken to be."""
    if is_traced(array):
        return True
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return bool(np.isfinite(np.asarray(array)).all())
    with jax.ensure_compile_time_eval():  # a known array is looked at while a program is traced
        return bool(jnp.isfinite(array).all())


def as_numbers(name: str, value: Any, whole: DTypeLike = np.float32) -> Array | np.ndarray:
    """An array of floats, JAX's if ``value`` is, else NumPy's.

    Integers and booleans are converted to the dtype ``whole`` at once, before arithmetic can wrap
    them around.

    Raises
    ------
    InputError
        If ``value`` is no array of real numbers.
    """
    array = value
    if not isinstance(array, jax.Array):
        try:
            array = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} is {shown(value)}; it is an array of numbers") from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise InputError(f"{name} has dtype {array.dtype}; it is an array of real numbers")
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise InputError(f"{name} is {shown(value)}; it is an array of numbers")
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(whole)


def as_grids(**given: Any) -> tuple[Any, ...]:
    """Arguments as floats of one dtype and one shape, JAX's if one of them is, else NumPy's.

    Raises
    ------
    InputError
        If they do not broadcast to one shape, or are empty.
    """
    values = [np.asarray(v) if isinstance(v, list | tuple) else v for v in given.values()]
    dtype = jnp.promote_types(jnp.result_type(*values), jnp.result_type(0.0))
    xp: Any = jnp if any(isinstance(value, jax.Array) for value in values) else np
    shapes = " and ".join(f"{name} has shape {np.shape(v)}" for name, v in given.items())
    try:
        grids = xp.broadcast_arrays(*(xp.asarray(value, dtype) for value in values))
    except ValueError as error:
        raise InputError(f"{shapes}; they are of shapes that broadcast to one") from error
    if not grids[0].size:
        raise InputError(f"{shapes}; each is one number or more")
    return tuple(grids)


def as_real(name: str, value: Any, whole: DTypeLike = np.float32) -> Array | np.ndarray:
    """`as_numbers`, of at least one number, all of them finite where values are known.

    Raises
    ------
    InputError
        If ``value`` is no array of real numbers, is empty, or has a value that is not finite.
    """
    array = as_numbers(name, value, whole)
    if not math.prod(array.shape):
        raise InputError(f"{name} has shape {array.shape}; it has at least one number")
    if not all_finite(array):
        raise InputError(f"{name} has values that are not finite; every one is a finite number")
    return array
