"""Arguments of public functions: each is converted and checked here, once, before it is used.

What a program that is traced (under `jax.jit`, `jax.vmap`, `jax.grad`) knows of its arguments is
their shape and dtype: that is checked there too, and their values are not.
"""

import math
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from gradflow.errors import InputError, is_traced

__all__ = ["PRNG", "all_finite", "as_key", "as_numbers", "as_real", "check_instance", "from_seed"]
__all__ += ["check_progress", "shown"]

# The kind of every key that is made of a seed, whatever JAX's default is: a seed draws the same
# networks everywhere.
PRNG = "threefry2x32"
_SEEDS = 1 << 63
_LONGEST = 60


def shown(value: Any) -> str:
    """Return a value as a sentence has it: arrays by shape and dtype, what is long cut."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:
        text = repr(value)
    except ValueError:  # of integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def check_instance(name: str, value: Any, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise `InputError` unless the value is of one of these kinds, which are ``what`` in words."""
    if not isinstance(value, kinds):
        raise InputError(f"{name} is {shown(value)}; it is {what}")


def check_progress(progress: Any) -> None:
    """Raise `InputError` unless it is None, or can be called."""
    if progress is not None and not callable(progress):
        raise InputError(
            f"progress is {shown(progress)}; it is a function of (how many are done, of how many)"
        )


def from_seed(seed: Any) -> PRNGKeyArray:
    """Return the key of a seed: of its 64 bits the upper half and the lower, as threefry's words.

    For seeds from 0 to 2³² - 1 it is ``jax.random.key(seed, impl="threefry2x32")``. That loses
    the upper half of others where JAX's x64 mode is off.

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
    return jax.random.wrap_key_data(jnp.asarray(words), impl=PRNG)


def as_key(key: Any, name: str = "key") -> PRNGKeyArray:
    """Return one JAX key, of a key of any kind or of a seed (`from_seed`).

    Raises
    ------
    InputError
        If it is neither.
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
    """Whether all values are finite; those that are not known yet are taken to be."""
    if is_traced(array):
        return True
    if not isinstance(array, jax.Array):
        return bool(np.isfinite(array).all())
    with jax.ensure_compile_time_eval():  # also while a program is traced that this is known to
        return bool(jnp.isfinite(array).all())


def as_numbers(name: str, value: Any, whole: DTypeLike = np.float32) -> Array | np.ndarray:
    """Return an array of floats: integers and booleans become ``whole``, before anything wraps.

    What is no JAX array becomes one of NumPy.

    Raises
    ------
    InputError
        If it is no array of real numbers.
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


def as_real(name: str, value: Any, whole: DTypeLike = np.float32) -> Array | np.ndarray:
    """Return `as_numbers` of at least one finite number.

    Raises
    ------
    InputError
        If it is no array of real numbers, is empty or, where that is known, has a value that is
        not finite.
    """
    array = as_numbers(name, value, whole)
    if not math.prod(array.shape):
        raise InputError(f"{name} has shape {array.shape}; it has at least one number")
    if not all_finite(array):
        raise InputError(f"{name} has values that are not finite; every one is a finite number")
    return array
