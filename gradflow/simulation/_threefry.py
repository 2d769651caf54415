"""Random numbers from the threefry cipher, fast on CPUs.

`fused` draws JAX's default random numbers, bit for bit, in a form that is faster for large arrays.
JAX lowers threefry on CPUs as a loop over its rounds, each a pass through memory. Written out as 20
rounds of elementwise arithmetic, it is one pass, which is faster for arrays the size of a weight
matrix and beyond (for those that fit into a core's cache, JAX's own is). The bits are those of
``jax_threefry_partitionable``, JAX's default since 0.5.

`normal` draws standard normals, other ones than JAX's, from the same cipher: both samplers spend
most of their time on these. A number costs a quarter of one of JAX's and a third of one of
`fused`'s. All 20 rounds are kept, for their margin: the paper finds no fault from 13 on.

Reference: Salmon, Moraes, Dror & Shaw 2011, 'Parallel random numbers: as easy as 1, 2, 3', SC'11.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

__all__ = ["fused", "normal"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_GROUPS = 5  # of four rounds each


@functools.partial(jax.jit, inline=True)
def _threefry(
    key: UInt32[Array, "2 ..."], high: UInt32[Array, "..."], low: UInt32[Array, "..."]
) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds: encrypt the counter (high, low) with the key."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = high + schedule[0], low + schedule[1]
    for group in range(_GROUPS):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = x ^ y
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def _count(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Encrypt 0, 1, 2, … in the given shape."""
    size = math.prod(shape)
    if size >= 1 << 32:
        raise ValueError(f"shape {shape} asks for {size} random numbers at once; 2^32 is too many")
    low = jax.lax.iota(jnp.uint32, size).reshape(shape)
    return _threefry(key, jnp.zeros_like(low), low)


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    high, low = _count(key, shape)
    if bit_width == 64:
        return (high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)
    dtype = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bit_width]
    return (high ^ low).astype(dtype)


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.stack(_count(key, shape), axis=-1)


def _fold_in(key: Array, data: ArrayLike) -> Array:
    low = jnp.asarray(data, jnp.uint32)
    return jnp.stack(_threefry(key, jnp.zeros_like(low), low))


def _seed(seed: Array) -> Array:
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


_FUSED = define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="gradflow_threefry2x32",
    tag="gft",
)


def fused(key: Array) -> Array:
    """Return the key, or keys, whose numbers are the same, drawn so; of another kind as it is."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # an old-style raw key
    if str(jax.random.key_impl(key)) != "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_FUSED)


# Minimax polynomials, highest power first: ln(1+m)/m for m in [√½-1, √2-1], relative error 3e-8;
# cos(πt/2) and sin(πt/2)/t as functions of t² for t in [-½, ½], 3e-8 and 3e-9.
_LOG = (
    0.08722355216741562,
    -0.14366842806339264,
    0.14952266216278076,
    -0.16562393307685852,
    0.19956833124160767,
    -0.25002074241638184,
    0.3333418667316437,
    -0.49999988079071045,
    1.0,
)
_COS = (-0.02039858140051365, 0.25359493494033813, -1.233696699142456, 1.0)
_SIN = (-0.00460165785625577, 0.07968003302812576, -0.6459634900093079, 1.5707963705062866)
_ROOT_HALF = np.float32(0.5**0.5).view(np.int32)
_SIGN = np.uint32(1 << 31)


def normal(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
    *,
    first_pair: ArrayLike = 0,
) -> Float[Array, "..."]:
    """Draw standard normals, not those of `jax.random.normal` but several times as fast.

    JAX encrypts one counter for each number, xors the two words that come out and inverts the error
    function. Here both words are used: they make two independent normals (Box & Muller 1958),

        √(-2 ln u) cos θ  and  √(-2 ln u) sin θ,  u uniform in (0, 1), θ in [0, 2π),

    which halves the encryption and shares the logarithm. u has 31 bits, so that the tails are right
    to 6.6 standard deviations (those of `jax.random.normal`, from 23 bits, end at 5.4). Each number
    is that of its place in the flattened array, on every platform; other dtypes than float32, and
    keys that are not threefry's, are drawn by `jax.random.normal`.

    Parameters
    ----------
    key
        A key, or a batch of one under vmap.
    shape
        The shape of the result.
    dtype
        Its dtype.
    first_pair
        To draw a part of a longer array, from number 2·first_pair of it on; only where `drawn_here`
        says so.
    """
    key = fused(key)
    if not drawn_here(key, dtype):
        return jax.random.normal(key, shape, dtype)
    size = math.prod(shape)
    if size > 1 << 32:
        raise ValueError(f"shape {shape} asks for {size} random numbers at once; 2^32 is the most")
    words = jax.random.key_data(key)
    first = jnp.asarray(first_pair, jnp.uint32)
    if jax.default_backend() == "cpu":
        drawn = _pairs(-(-size // 2))(words[None], first[None]).reshape(-1)
        return (drawn[:size] if size % 2 else drawn).reshape(shape)
    number = jax.lax.iota(jnp.uint32, size)
    return _normals(words, first + (number >> np.uint32(1)), number & np.uint32(1)).reshape(shape)


def drawn_here(key: PRNGKeyArray, dtype: DTypeLike) -> bool:
    """Whether `normal` draws numbers of its own for this kind of key and dtype, and not JAX's."""
    ours = jnp.dtype(dtype) == jnp.float32
    return ours and str(jax.random.key_impl(fused(key))) == str(_FUSED)


@functools.cache
def _pairs(pairs: int) -> Callable[[Array, Array], Array]:
    """Return the function that draws pairs of normals on a CPU: (keys, 2) -> (keys, pairs, 2).

    Its second argument, (keys,), is the number of the first pair.

    The compiler unrolls a loop of two and finds that both turns encrypt the same, but only where
    the loop over a pair is the innermost: in an array of this shape that nothing else is fused
    with. Only control flow keeps the compiler from fusing; hence a branch that is always taken
    (an even number is not 1). A fusion across it would be 7 times as slow.
    """

    def draw(keys: Array, firsts: Array) -> Array:
        pair = jax.lax.broadcasted_iota(jnp.uint32, (1, pairs, 2), 1) + firsts[:, None, None]
        second = jax.lax.broadcasted_iota(jnp.uint32, (1, pairs, 2), 2)
        return _normals(keys.T[..., None, None], pair, second)

    def nothing(keys: Array, firsts: Array) -> Array:
        del firsts
        return jnp.zeros((len(keys), pairs, 2), jnp.float32)

    @jax.custom_batching.custom_vmap
    def call(keys: Array, firsts: Array) -> Array:
        return jax.lax.cond(keys[0, 0] * np.uint32(2) != 1, draw, nothing, keys, firsts)

    @call.def_vmap
    def _(axis_size, in_batched, keys, firsts):  # type: ignore[no-untyped-def]
        # A cond over a batch of predicates would become a select, which hides nothing.
        if not in_batched[0]:
            keys = jnp.broadcast_to(keys, (axis_size, *keys.shape))
        if not in_batched[1]:
            firsts = jnp.broadcast_to(firsts, (axis_size, *firsts.shape))
        drawn = call(keys.reshape(-1, 2), firsts.reshape(-1))
        return drawn.reshape(axis_size, -1, pairs, 2), True

    return call


def _normals(words: Array, pair: Array, second: Array) -> Array:
    """Return the first or second normal of a pair, which share a counter, an angle and a radius."""
    x, y = _threefry(words, jnp.zeros_like(pair), pair)
    u = _to_float(x >> np.uint32(1)) * np.float32(2**-31) + np.float32(2**-32)
    # θ = (t + ½) π/2 in the quadrant that the signs say: √2 cos θ, sin θ = cos(tπ/2) ∓ sin(tπ/2).
    t = _to_float(y & np.uint32((1 << 30) - 1)) * np.float32(2**-30) - np.float32(0.5)
    cos, sin = _horner(_COS, t * t), t * _horner(_SIN, t * t)
    z = jnp.sqrt(-_log(u)) * (cos + _flip(sin, second << np.uint32(31)))
    return _flip(z, y << second)


def _to_float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.int32).astype(jnp.float32)


def _flip(x: Array, sign: Array) -> Array:
    """Change the sign of x where the first bit of ``sign`` is set."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ (sign & _SIGN)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _log(x: Array) -> Array:
    """Return ln x for normal x > 0, from x = 2^e (1 + m)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) - _ROOT_HALF
    mantissa = (bits & np.int32((1 << 23) - 1)) + _ROOT_HALF
    m = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - np.float32(1)
    exponent = (bits >> np.int32(23)).astype(jnp.float32)
    return exponent * np.float32(math.log(2)) + m * _horner(_LOG, m)


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    value = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + np.float32(coefficient)
    return value
