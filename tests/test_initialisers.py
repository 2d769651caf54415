"""The law of a leaf is read from the program that draws it, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import read
from gradflow.inspection._theory.initialisers import law_of
from gradflow.inspection._theory.laws import laws

SHAPE = (60, 40)
FAN_IN, FAN_OUT = SHAPE
# Of normal draws within two standard deviations, the variance: 1 - 4 φ(2)/(2Φ(2) - 1).
WITHIN_TWO = 0.7737413035499232


def _law(draw, shape=SHAPE):
    program = read(lambda key: draw(key, shape), key=jax.random.key(0))
    return law_of(program, program.outputs[0])


@pytest.mark.parametrize(
    ("draw", "variance", "gaussian"),
    [
        (initializers.normal(0.02), 0.02**2, True),
        (initializers.uniform(0.1), 0.1**2 / 12, False),
        (initializers.glorot_normal(), 2 / (FAN_IN + FAN_OUT), False),  # truncated
        (initializers.glorot_uniform(), 2 / (FAN_IN + FAN_OUT), False),
        (initializers.he_normal(), 2 / FAN_IN, False),
        (initializers.he_uniform(), 2 / FAN_IN, False),
        (initializers.lecun_normal(), 1 / FAN_IN, False),
        (initializers.variance_scaling(3.0, "fan_out", "normal"), 3 / FAN_OUT, True),
        (initializers.truncated_normal(0.3), 0.3**2 * WITHIN_TWO, False),
        (lambda k, s: jax.random.normal(k, s) / s[0] ** 0.5, 1 / FAN_IN, True),
        (lambda k, s: 0.1 * jax.random.laplace(k, s), 2 * 0.1**2, False),
        (lambda k, s: jax.random.normal(k, s[::-1]).T.reshape(-1), 1.0, True),
        (lambda k, s: jax.random.rademacher(k, s, jnp.float32), 1.0, False),
    ],
)
def test_the_law_of_an_initialiser_is_exact(draw, variance, gaussian):
    law = _law(draw)
    assert law is not None
    laplace = variance == 2 * 0.1**2  # of 2^18 bits, the outermost are far out
    assert law.variance == pytest.approx(variance, rel=1e-4 if laplace else 1e-5)
    assert (law.gaussian, law.standard_error) == (gaussian, 0.0)
    assert law.values is None


def test_a_mean_is_part_of_the_law():
    law = _law(lambda k, s: jax.random.uniform(k, s))
    assert law.mean == pytest.approx(0.5, rel=1e-6)
    assert law.variance == pytest.approx(1 / 12, rel=1e-6)
    shifted = _law(lambda k, s: 0.3 + 0.1 * jax.random.normal(k, s))
    assert (shifted.mean, shifted.variance) == (pytest.approx(0.3), pytest.approx(0.01))
    assert shifted.gaussian


def test_what_is_the_same_in_every_network_is_known():
    law = _law(initializers.constant(0.7))
    np.testing.assert_allclose(law.values, np.full(SHAPE, 0.7))


@pytest.mark.parametrize(
    "draw",
    [
        initializers.orthogonal(),  # entries depend on each other
        lambda k, s: jnp.broadcast_to(jax.random.normal(k, s[:1])[:, None], s),
        lambda k, s: jax.random.normal(k, s) * jax.random.uniform(jax.random.fold_in(k, 1), s),
        lambda k, s: jax.random.normal(k, s) * jnp.arange(1.0, s[1] + 1)[None],
        lambda k, s: jnp.cumsum(jax.random.normal(k, s), axis=0),
    ],
)
def test_other_leaves_are_not_taken_for_such(draw):
    assert _law(draw) is None


def test_laws_that_a_program_does_not_tell_are_measured():
    def init(key):
        one, two = jax.random.split(key)
        return {
            "basis": initializers.orthogonal()(one, (40, 40)),
            "kernel": initializers.he_normal()(two, (40, 40)),
            "scale": jnp.ones(40),
        }, {}

    def apply(p, state, key, x):
        del state, key
        return (x @ p["basis"]) @ p["kernel"] * p["scale"][None]

    model = Model("Model", init, apply)
    p, _ = jax.eval_shape(init, jax.random.key(0))
    program = read(lambda p, x: apply(p, {}, None, x), parameters=p, inputs=jnp.zeros((2, 40)))
    found = laws(model, program, jax.random.key(1))
    basis, kernel, scale = (found[n] for n in program.arguments["parameters"])
    assert basis.standard_error > 0
    assert basis.variance == pytest.approx(1 / 40, rel=0.1)
    assert kernel.variance == pytest.approx(2 / 40, rel=1e-5)
    assert kernel.standard_error == 0
    np.testing.assert_array_equal(scale.values, np.ones(40))
