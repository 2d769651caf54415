"""Cause and cure of what a model's gradients do, on models whose answer is known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow
from gradflow import InputError
from gradflow.inspection._cure import find
from gradflow.inspection._measuring.measure import measure
from gradflow.inspection._reading.layers import layers
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.of_model import program_of
from gradflow.inspection._rescaling import Patient
from gradflow.inspection._theory.values import Law
from gradflow.inspection._theory.walk import predict

KEY = jax.random.key(3)


def mlp(widths, phi, variance):
    """A plain MLP, Gaussian weights of ``variance(layer, fan_in)``, no biases; and its laws."""
    shapes = list(zip(widths[:-1], widths[1:], strict=True))
    variances = [variance(place, shape[0]) for place, shape in enumerate(shapes)]

    def init(key):
        keys = jax.random.split(key, len(shapes))
        parts = zip(keys, shapes, variances, strict=True)
        return [{"w": jax.random.normal(k, s) * v**0.5} for k, s, v in parts], ()

    def apply(p, state, key, x):
        del state, key
        for layer in p[:-1]:
            x = phi(x @ layer["w"])
        return x @ p[-1]["w"]

    return Model("MLP", init, apply), [Law(0.0, v, gaussian=True) for v in variances]


def residual(depth, width, scale):
    """x + scale·W₂ relu(W₁ x), W₁ of He; W₂ of LeCun."""
    variances = [2 / width, scale**2 / width] * depth

    def init(key):
        keys = jax.random.split(key, 2 * depth)
        drawn = [jax.random.normal(k, (width,) * 2) for k in keys]
        return [
            {"w1": a * (2 / width) ** 0.5, "w2": b * scale / width**0.5}
            for a, b in zip(drawn[::2], drawn[1::2], strict=True)
        ], ()

    def apply(p, state, key, x):
        del state, key
        for layer in p:
            x = x + jax.nn.relu(x @ layer["w1"]) @ layer["w2"]
        return x

    return Model("residual", init, apply), [Law(0.0, v, gaussian=True) for v in variances]


def normalised(depth, width):
    """A norm behind every product, whose weights' scale has no effect; σ_w² is far too small."""
    model, laws = mlp([width] * (depth + 1), jnp.tanh, lambda _, n: 1e-4 / n)

    def apply(p, state, key, x):
        del state, key
        for layer in p[:-1]:
            z = x @ layer["w"]
            x = jnp.tanh(z / jnp.sqrt(jnp.mean(z**2, axis=1, keepdims=True)))
        return x @ p[-1]["w"]

    return dataclasses.replace(model, apply=apply), laws


def cured(model, laws, width):
    x = jax.random.normal(KEY, (2, width))
    program = program_of(model, (x,))
    found = layers(program)
    by_leaf = dict(zip(program.arguments["parameters"], laws, strict=True))
    theory = predict(program, found, by_leaf, [x], state=[])
    measured = measure(model, program, found, (x,), KEY, networks=3)
    return find(Patient(model, program, found, (x,), KEY, by_leaf, theory), measured)


@pytest.mark.slow
def test_small_weights_of_tanh_are_multiplied_to_the_critical_point():
    width, variance = 40, 0.05**2 / 3  # that of uniform(-0.05, 0.05)
    cure = cured(*mlp([width] * 21, jnp.tanh, lambda _, __: variance), width)
    expected = 1 / math.sqrt(width * variance)
    assert cure.factors == pytest.approx({f"[{i}]['w']": expected for i in range(20)}, rel=1e-6)
    assert "vanish" in cure.cause
    assert "[0]['w'] and 19 like it (σ_w² 0.0333 where 1 keeps them): multiply by 5.48" in (
        cure.cause
    )
    assert cure.before.gradient < -30
    assert abs(cure.after.gradient) < 4 < abs(cure.before.gradient)
    by_name = {trial.name: trial for trial in cure.alternatives}
    assert set(by_name) == {"LeCun", "He", "Glorot", "LSUV", "orthogonal"}
    assert by_name["LeCun"].gradient == pytest.approx(cure.after.gradient, abs=1e-3)
    assert by_name["LSUV"].signal == pytest.approx(0, abs=0.05)  # what LSUV makes equal


@pytest.mark.slow
def test_relu_at_lecun_is_multiplied_by_the_root_of_two():
    cure = cured(*mlp([40] * 11, jax.nn.relu, lambda _, n: 1 / n), 40)
    # The first layer's inputs are no rectified signals: its scale is right.
    assert cure.factors == pytest.approx({f"[{i}]['w']": 2**0.5 for i in range(1, 10)}, rel=1e-6)
    assert "a layer" in cure.cause


@pytest.mark.slow
def test_one_bad_layer_among_good_ones_is_named():
    bad = 4
    model = mlp([40] * 11, jax.nn.relu, lambda i, n: (2e-4 if i == bad else 2 if i else 1) / n)
    cure = cured(*model, 40)
    assert cure.factors == pytest.approx({f"[{bad}]['w']": 100.0}, rel=1e-6)
    assert f"the cause is the scale of [{bad}]['w'] (σ_w² 0.0002 where 2 keeps them)" in cure.cause


@pytest.mark.slow
def test_branches_that_explode_are_made_smaller():
    cure = cured(*residual(12, 40, 2.0), 40)
    assert set(cure.factors) == {f"[{i}]['w2']" for i in range(12)} or set(cure.factors) == {
        f"[{i}]['w1']" for i in range(12)
    }
    (factor,) = set(cure.factors.values())
    # A block multiplies mean squares by 1 + 4 s²: 11 of them leave a norm's factor of 2.
    assert factor == pytest.approx(math.sqrt((4 ** (1 / 11) - 1) / 4), rel=0.15)
    assert "explode" in cure.cause
    assert 0 < cure.after.gradient < 0.3 * cure.before.gradient


@pytest.mark.slow
def test_no_scale_helps_a_sigmoid_and_it_is_said():
    cure = cured(*mlp([40] * 9, jax.nn.sigmoid, lambda _, n: 1 / n), 40)
    assert cure.factors == {}
    assert cure.after is None
    assert "no scale of its weights is the cause" in cure.cause
    assert "where gradients would keep their size logistic is saturated in" in cure.effect


@pytest.mark.slow
def test_narrowing_layers_keep_the_gradients_norm():
    widths = [40, 40, 36, 32, 28, 24, 20, 16, 12]
    cure = cured(*mlp(widths, jax.nn.relu, lambda _, n: 0.2 / n), 40)
    gains = {f"[{i}]['w']": (2 if i else 1) / 0.2 for i in range(8)}
    assert cure.factors == pytest.approx({k: v**0.5 for k, v in gains.items()}, rel=1e-6)
    assert abs(cure.after.gradient) < 0.25 * abs(cure.before.gradient)


@pytest.mark.slow
def test_a_small_layer_before_a_norm_is_not_taken_for_the_cause():
    """The second product alone is sick; the first, of small z, has large gradients by its norm."""
    factors = (0.1, 1.0, 0.02, 1.0, 1.0)
    model, laws = mlp([50] * 6, jnp.tanh, lambda place, n: factors[place] ** 2 / n)

    def apply(p, state, key, x):
        del state, key
        z = x @ p[0]["w"]
        x = jnp.tanh(0.1 * z / jnp.sqrt(jnp.mean(z**2, axis=1, keepdims=True)))
        for layer in p[1:-1]:
            x = jnp.tanh(x @ layer["w"])
        return x @ p[-1]["w"]

    cure = cured(dataclasses.replace(model, apply=apply), laws, 50)
    assert "[2]['w'] (" in cure.cause
    assert cure.factors["[2]['w']"] == pytest.approx(50, rel=0.1)
    assert "[0]['w']" not in cure.factors
    assert cure.factors.get("[1]['w']", 1.0) == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_weights_before_a_norm_get_no_factor():
    cure = cured(*normalised(6, 40), 40)
    assert cure.factors == {}
    assert cure.before == pytest.approx(cure.before)
    assert abs(cure.before.gradient) < 3  # though σ_w² is 1e-4


@dataclasses.dataclass
class Result:
    factors: dict


def test_mended_multiplies_the_leaves_and_changes_nothing_in_place():
    p = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(2), "n": jnp.arange(3)}
    new = gradflow.mended(p, Result({"['a']": 3.0}))
    assert new["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["a"], 3.0)
    assert new["b"] is p["b"]
    assert new["n"] is p["n"]
    np.testing.assert_array_equal(p["a"], 1.0)


@pytest.mark.parametrize(
    ("parameters", "factors", "sentence"),
    [
        ({"a": np.ones(2)}, {"['b']": 2.0}, r"parameters has no array of floats at \['b'\]"),
        ({"b": np.arange(2)}, {"['b']": 2.0}, r"parameters has no array of floats at \['b'\]"),
        ({"b": None}, {"['b']": 2.0}, r"parameters has no array of floats at \['b'\]"),
        ({"b": np.ones(2)}, None, "result is .*; it is what gradflow.inspect made"),
    ],
)
def test_a_wrong_tree_is_one_sentence(parameters, factors, sentence):
    with pytest.raises(InputError, match=sentence):
        gradflow.mended(parameters, Result(factors))
