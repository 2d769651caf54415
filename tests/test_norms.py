"""Norms at the ends of a float's range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow._norms import unit_rows


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1.0, 1e25, 1e38])
def test_rows_have_length_one_and_the_log_of_the_length_they_had(scale):
    x = np.array([[0.3, -0.4, 0.0], [1.0, 2.0, 2.0]]) * scale
    rows, log = jax.jit(unit_rows)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(rows, [[0.6, -0.8, 0], [1 / 3, 2 / 3, 2 / 3]], rtol=1e-5)
    np.testing.assert_allclose(log, np.log(scale) + np.log([0.5, 3.0]), rtol=1e-5, atol=1e-6)


def test_a_plain_norm_fails_there():
    plain = jax.jit(lambda x: jnp.linalg.norm(x, axis=1))
    for scale, wrong in ((1e-25, 0.0), (1e25, np.inf)):
        assert plain(jnp.full((1, 3), scale, jnp.float32))[0] == wrong


def test_zeros_stay_and_what_is_not_finite_is_seen():
    rows, log = jax.jit(unit_rows)(jnp.array([[0.0, 0.0], [jnp.inf, 1.0], [jnp.nan, 1.0]]))
    np.testing.assert_array_equal(rows[0], [0, 0])
    assert log[0] == -jnp.inf
    assert not np.isfinite(rows[1:]).any(axis=1).all()
    assert not np.isfinite(log).any()
