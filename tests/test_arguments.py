"""What callers give is converted once, at the door, or refused in a sentence."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import _arguments, _inputs, builders
from gradflow.errors import InputError

NETWORK = builders.mlp([2, 3])
SEEDS = (0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1)


def words(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.parametrize("x64", [False, True])
def test_a_seed_of_32_bits_is_the_key_that_jax_makes_of_it(x64):
    for seed in SEEDS:
        with jax.enable_x64(x64):
            expected = jax.random.key(seed, impl="threefry2x32")
            found = _arguments.as_key(seed)
        assert words(found) == words(expected) == (0, seed)
        assert str(jax.random.key_impl(found)) == "threefry2x32"


@pytest.mark.parametrize("x64", [False, True])
def test_all_64_bits_of_a_seed_count(x64):
    seeds = [*SEEDS, *(s + 2**32 for s in SEEDS), 2**63 - 1, -1, -(2**32), -(2**63)]
    with jax.enable_x64(x64):
        assert len({words(_arguments.from_seed(seed)) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize(
    "seed", [2**63, -(2**63) - 1, 10**5000, True, 1.0, "1", None], ids=lambda _: ""
)
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(InputError, match=r"^seed is .*; it is a whole number from -"):
        _arguments.from_seed(seed)


def test_keys_of_every_kind_are_one_key():
    key = jax.random.key(3)
    assert _arguments.as_key(key) is key
    for same in (
        3,
        np.int64(3),
        np.uint8(3),
        jax.random.key_data(key),
        np.array([0, 3], np.uint32),
    ):
        assert words(_arguments.as_key(same)) == words(key)
    assert jax.jit(lambda k: jax.random.key_data(_arguments.as_key(k)))(key).tolist() == [0, 3]


@pytest.mark.medium
def test_jaxs_default_kind_of_key_has_no_say():
    code = (
        "import numpy as np; from gradflow import builders; "
        "from gradflow.simulation import monte_carlo\n"
        "network, x = builders.mlp([3, 4, 4]), np.ones((1, 3))\n"
        "for key in (0, 7):\n"
        "    found = monte_carlo.simulate(network, x, key=key, networks=2)\n"
        "    print(found['q'].value.tolist())"
    )
    printed = []
    for impl in ("threefry2x32", "rbg"):
        environment = os.environ | {"JAX_DEFAULT_PRNG_IMPL": impl}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        printed.append(done.stdout)
    assert printed[0] == printed[1] != ""


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int64", "bool"])
def test_integers_become_floats_before_they_are_multiplied_or_wrap(dtype):
    whole = np.array([[255, 3], [1 << 40, 7]]) if dtype == "int64" else np.array([[200, 3], [1, 7]])
    whole = whole.astype(dtype)
    found = _inputs.as_inputs(whole, NETWORK)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(found), whole.astype(np.float32))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (np.ones((1, 3)), r"has shape \(1, 3\); it is \(inputs, 2\) for this network"),
        (np.ones(2), r"has shape \(2,\); it is \(inputs, 2\)"),
        (np.ones((0, 2)), r"has shape \(0, 2\); it has at least one number"),
        ([], "it has at least one number"),
        (np.ones((1, 2)) * 1j, "has dtype complex128; it is an array of real numbers"),
        ([[1.0, np.nan]], "has values that are not finite"),
        ([[1.0, np.inf]], "has values that are not finite"),
        ([[1.0, 2.0], [3.0]], "it is an array of numbers"),
        ("abc", "is 'abc'; it is an array of numbers"),
        (None, "is None; it is an array of numbers"),
        ({"x": 1}, "it is an array of numbers"),
        ([[10**400, 1]], "it is an array of numbers"),
        (np.array([["1", "2"]]), "it is an array of numbers"),
    ],
)
def test_what_is_no_batch_of_inputs_is_refused(inputs, sentence):
    with pytest.raises(InputError, match=f"^inputs .*{sentence}"):
        _inputs.as_inputs(inputs, NETWORK)


def test_inputs_beyond_the_float_that_jax_holds_are_refused():
    with jax.enable_x64(False), pytest.raises(InputError, match="beyond float32's range"):
        _inputs.as_inputs(np.full((1, 2), 1e300), NETWORK)


def test_shapes_and_dtypes_are_checked_in_a_traced_program_and_values_are_not():
    jax.jit(lambda x: _inputs.as_inputs(x, NETWORK))(jnp.full((1, 2), jnp.nan))
    with pytest.raises(InputError, match="has shape"):
        jax.jit(lambda x: _inputs.as_inputs(x, NETWORK))(jnp.ones((1, 3)))
