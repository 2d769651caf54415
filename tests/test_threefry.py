"""The fused generator draws JAX's own numbers; `normal` draws others, of the same law."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gradflow.simulation import _threefry

DRAWS = {
    "normal": lambda key: jax.random.normal(key, (7, 3)),
    "uniform": lambda key: jax.random.uniform(key, (5,), jnp.float32, -2, 2),
    "bits": lambda key: jax.random.bits(key, (4, 4)),
    "bytes": lambda key: jax.random.bits(key, (5,), jnp.uint8),
    "truncated_normal": lambda key: jax.random.truncated_normal(key, -2, 2, (9,)),
    "orthogonal": lambda key: jax.random.orthogonal(key, 4),
    "split": lambda key: jax.random.key_data(jax.random.split(key, (2, 3))),
    "fold_in": lambda key: jax.random.key_data(jax.random.fold_in(key, 123_456_789)),
    "of a part": lambda key: jax.random.normal(jax.random.split(jax.random.fold_in(key, 3))[1]),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5])
def test_numbers_are_those_of_jax(name, seed):
    key = jax.random.fold_in(jax.random.key(1), seed)
    draw = DRAWS[name]
    np.testing.assert_array_equal(draw(_threefry.fused(key)), draw(key))


def test_another_key_gives_other_numbers():
    a, b = (DRAWS["normal"](_threefry.fused(jax.random.key(s))) for s in (0, 1))
    assert (a != b).all()


def test_batches_of_keys_draw_as_each_key_does():
    keys = jax.random.split(_threefry.fused(jax.random.key(0)), 5)
    together = jax.jit(jax.vmap(DRAWS["normal"]))(keys)
    np.testing.assert_array_equal(together, [DRAWS["normal"](k) for k in keys])


def test_old_keys_and_other_kinds_are_taken():
    old = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(
        DRAWS["normal"](_threefry.fused(old)), DRAWS["normal"](jax.random.key(3))
    )
    other = jax.random.key(0, impl="rbg")
    assert _threefry.fused(other) is other
    fused = _threefry.fused(jax.random.key(0))
    assert _threefry.fused(fused) is fused


# 10^7 numbers, of which the law tests below each reject a right generator with this probability.
NUMBERS = 10_000_000
FALSE_ALARM_RATE = 1e-3
# Gaussian moments E[z^p], p = 1…16: 0 where p is odd, else (p-1)!!.
MOMENTS = [0 if p % 2 else math.prod(range(1, p, 2)) for p in range(17)]


def normals(seed, size=NUMBERS):
    draw = jax.jit(lambda key: _threefry.normal(key, (size,)))
    return np.asarray(draw(jax.random.key(seed)), np.float64)


def law_p_value(z):
    """The smallest of three p-values, times three; null: z are independent N(0, 1).

    Of Kolmogorov and Smirnov; of the first eight moments; and of the counts beyond 3, 3.5, … 5.5 on
    either side. In the last two each value is taken as Gaussian, or Poisson, and Bonferroni's
    factor is applied.
    """
    n = len(z)
    scores, power = [], np.ones_like(z)
    for p in range(1, 9):
        power *= z
        variance = (MOMENTS[2 * p] - MOMENTS[p] ** 2) / n
        scores.append((np.mean(power) - MOMENTS[p]) / math.sqrt(variance))
    moments = 8 * 2 * scipy.stats.norm.sf(np.abs(scores).max())
    tails = []
    for edge in np.arange(3, 6, 0.5):
        for count in (np.sum(z > edge), np.sum(z < -edge)):
            expected = n * scipy.stats.norm.sf(edge)
            law = scipy.stats.poisson(expected)
            tails.append(2 * min(law.cdf(count), law.sf(count - 1)))
    return 3 * min(scipy.stats.kstest(z, "norm").pvalue, moments, len(tails) * min(tails))


def pairs_p_value(z):
    """Null: each pair, and next pairs, of z are independent: of eight correlations, Bonferroni's.

    Two numbers of a pair share a radius and an angle, so that a wrong one shows in even powers and
    in products.
    """
    n = len(z) // 2
    a, b = z[0::2][: n - 1], z[1::2][: n - 1]
    after = z[2::2][: n - 1]  # of the next pair
    uncorrelated = [(a, b), (a**2, b**2), (a, b**2), (a**2, b), (a**2 - b**2, a * b)]
    uncorrelated += [(a, after), (b, after), (b**2, after**2)]
    scores = [np.corrcoef(u, v)[0, 1] * math.sqrt(n - 1) for u, v in uncorrelated]
    return len(scores) * 2 * scipy.stats.norm.sf(np.abs(scores).max())


@pytest.mark.medium
def test_normals_are_standard_and_independent():
    z = normals(0)
    assert law_p_value(z) > FALSE_ALARM_RATE
    assert pairs_p_value(z) > FALSE_ALARM_RATE


def test_the_law_tests_find_wrong_normals():
    """Already among a tenth as many: one in a hundred too wide, tails cut, some pairs equal."""
    z = normals(0, NUMBERS // 10)
    assert law_p_value(z * 1.01) < FALSE_ALARM_RATE
    assert law_p_value(np.clip(z, -4, 4)) < FALSE_ALARM_RATE
    some = z.copy()
    some[1::2] = np.where(np.arange(len(z) // 2) % 100, some[1::2], some[::2])
    assert pairs_p_value(some) < FALSE_ALARM_RATE


def test_normals_are_those_of_the_formula():
    """Box and Muller's formula in float64 on the encrypted counters, to float32's rounding."""
    key, pairs = jax.random.key(5), 1 << 18
    # Children 0, 1, … of a key are its encrypted counters.
    words = np.asarray(jax.random.key_data(jax.random.split(key, pairs)), np.int64)
    radius = np.sqrt(-2 * np.log((words[:, 0] // 2 + 0.5) / 2**31))
    angle = (words[:, 1] % 2**30 / 2**30) * np.pi / 2
    expected = radius[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    expected *= np.where(np.stack([words[:, 1] >> 31, words[:, 1] >> 30], axis=1) & 1, -1, 1)
    drawn = _threefry.normal(key, (pairs, 2))
    # Where the radius is small, ln of a float32 near 1 has lost digits: an error of 2^-24 / radius.
    np.testing.assert_allclose(drawn, expected, rtol=1e-6, atol=2e-5)
    large = radius > 1
    np.testing.assert_allclose(drawn[large], expected[large], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 2, 3)])
def test_normals_do_not_depend_on_shape_batch_platform_or_kind_of_key(shape, monkeypatch):
    keys = jax.random.split(jax.random.key(3), 4)
    together = jax.jit(jax.vmap(lambda key: _threefry.normal(key, shape)))(keys)
    flat = np.stack([_threefry.normal(key, (64,)) for key in keys])[:, : math.prod(shape)]
    np.testing.assert_allclose(together.reshape(4, -1), flat, rtol=2e-6, atol=1e-6)
    fused = _threefry.normal(_threefry.fused(keys[0]), shape)
    np.testing.assert_array_equal(fused, _threefry.normal(keys[0], shape))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elsewhere = _threefry.normal(keys[0], shape)
    np.testing.assert_allclose(elsewhere, fused, rtol=2e-6, atol=1e-6)


@pytest.mark.usefixtures("x64_only")
def test_other_dtypes_and_keys_are_drawn_by_jax():
    key, other = jax.random.key(1), jax.random.key(1, impl="rbg")
    drawn = _threefry.normal(key, (5,), jnp.float64)
    np.testing.assert_array_equal(drawn, jax.random.normal(key, (5,), jnp.float64))
    np.testing.assert_array_equal(
        _threefry.normal(other, (5,)), jax.random.normal(other, (5,), jnp.float32)
    )


def test_too_many_numbers_are_refused():
    with pytest.raises(ValueError, match="at once"):
        jax.eval_shape(
            lambda key: _threefry.normal(key, (1 << 16, (1 << 16) + 1)), jax.random.key(0)
        )
