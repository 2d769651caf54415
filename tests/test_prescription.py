"""Prescriptions: what they promise is what the theory of the prescribed network says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations, builders, comparison, ensembles, gaussian
from gradflow.errors import InputError
from gradflow.theory.criticality import UniversalityClass
from gradflow.theory.fixed_points import Status
from gradflow.theory.prescription import mu_parametrisation, prescribe

WIDTHS = (30, *[100] * 12)


@pytest.mark.medium
@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize(
    ("name", "kind", "arguments"),
    [
        pytest.param(
            "tanh", UniversalityClass.K_STAR_ZERO, {"sigma_b2": 0.05}, marks=pytest.mark.slow
        ),
        pytest.param("gelu", UniversalityClass.HALF_STABLE, {}, marks=pytest.mark.slow),
        ("logistic", UniversalityClass.NONE, {}),
        pytest.param(
            "hard_tanh", UniversalityClass.K_STAR_ZERO, {"q": 1.0}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_length_and_the_gradient_are_kept(name, kind, arguments):
    found = prescribe(name, WIDTHS, **arguments)
    phi = activations.get(name)
    assert found.universality_class is kind
    q = found.q_star
    np.testing.assert_allclose(found.sigma_w2 * gaussian.moment(phi, "dphi2", q), 1, rtol=1e-11)
    np.testing.assert_allclose(
        found.sigma_w2 * gaussian.moment(phi, "phi2", q) + found.sigma_b2, q, rtol=1e-11
    )
    # Unit inputs times the scale have it from the first layer on, and so has the last.
    first = found.weight_sd[0] ** 2 * WIDTHS[0] * found.input_scale**2 + found.bias_sd**2
    np.testing.assert_allclose([first, found.expected.q_top], q, rtol=1e-9)
    np.testing.assert_allclose(found.expected.gradient_factor, 1, rtol=1e-10)
    assert found.expected.representable_depth > 1e10
    assert math.isinf(found.expected.trainable_depth)


@pytest.mark.medium
@pytest.mark.usefixtures("x64_only")
def test_relu_is_critical_at_any_length_and_the_usual_rules_are_shown():
    found = prescribe("relu", WIDTHS, dtype="bfloat16")
    assert found.sigma_w2 == 2
    assert math.isnan(found.q_star)
    by_name = {e.name: e for e in found.instead}
    assert set(by_name) == {"glorot", "he", "lecun"}
    assert by_name["he"].status is Status.NEUTRAL
    np.testing.assert_allclose(by_name["he"].gradient_factor, 1, rtol=1e-12)
    # χ = 1/2, so a gradient halves in two layers; the smallest normal bfloat16 is 2^-126.
    lecun = by_name["lecun"]
    np.testing.assert_allclose(lecun.gradient_factor, 0.5**0.5, rtol=1e-12)
    np.testing.assert_allclose(lecun.log10_gradient, -11 / 2 * math.log10(2), rtol=1e-12)
    np.testing.assert_allclose(lecun.representable_depth, 252, rtol=1e-12)
    np.testing.assert_allclose(lecun.trainable_depth, 6 / math.log(2), rtol=1e-12)


@pytest.mark.usefixtures("x64_only")
@pytest.mark.slow
def test_gradients_of_a_network_that_narrows_stay_in_the_float():
    """They keep their norm; a mean over ever fewer units would leave float32 in 75 layers."""
    found = prescribe("relu", (784, 300, 100, 10))
    np.testing.assert_allclose(found.expected.gradient_factor, 1, rtol=1e-12)
    assert math.isinf(found.expected.representable_depth)
    np.testing.assert_allclose(found.instead[2].gradient_factor, 0.5**0.5, rtol=1e-12)  # LeCun's


@pytest.mark.usefixtures("x64_only")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "transform", "target", "chi1"),
    [
        ("tanh", "tat", None, 1.0),
        ("relu", "tat", 0.8, 1.0),
        ("softplus", "dks", 1.3, 1.3 ** (1 / 12)),
    ],
)
def test_transformed_activations_keep_unit_lengths_with_unit_weights(name, transform, target, chi1):
    found = prescribe(name, WIDTHS, transform=transform, target=target)
    assert (found.sigma_w2, found.sigma_b2, found.q_star) == (1, 0, 1)
    np.testing.assert_allclose(found.expected.q_top, 1, rtol=1e-8)
    np.testing.assert_allclose(found.expected.chi1, chi1, rtol=1e-8)
    np.testing.assert_allclose(found.expected.gradient_factor, chi1**0.5, rtol=1e-6)


@pytest.mark.usefixtures("x64_only")
@pytest.mark.slow
def test_a_simulation_finds_what_was_promised():
    """Null: the theory holds. 400 networks of width 200, all layers' statistics at 1 % together."""
    widths = (64, *[200] * 10)
    found = prescribe("tanh", widths, sigma_b2=0.1)
    network = builders.mlp(
        widths, "tanh", ensembles.fan_in(math.sqrt(found.sigma_w2)), sigma_b=found.bias_sd
    )
    x = np.asarray(jax.random.normal(jax.random.key(3), (1, 64)))
    x = x * found.input_scale / np.sqrt(np.mean(x**2))
    result = comparison.compare(network, x, networks=400)
    assert result.count(comparison.Status.DIFFERS) == 0
    assert result.verdict.kind == "critical"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_b2": 0.1, "q": 1.0}, "sigma_b2 is 0.1 and q is 1.0"),
        ({"sigma_b2": -0.1}, "sigma_b2 is -0.1"),
        ({"q": 0.0}, "q is 0.0"),
        ({"q": -1.0}, "q is -1.0"),
        ({"dtype": "float31"}, "unknown dtype 'float31'"),
        ({"transform": "dsk"}, "did you mean 'dks'"),
        ({"transform": "tat", "q": 1.0}, "sets q"),
        ({"target": 1.0}, "there is no transform"),
        ({"transform": "dks", "target": 0.5}, "zeta is 0.5"),
        ({"widths": (10,)}, "at least one layer"),
        ({"widths": (10, 0)}, "width is 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_said(arguments, message):
    with pytest.raises(InputError, match=message):
        prescribe("tanh", arguments.pop("widths", WIDTHS), **arguments)


@pytest.mark.slow
def test_an_activation_without_a_critical_point_is_said():
    with pytest.raises(InputError, match="'softplus' has no critical point"):
        prescribe("softplus", WIDTHS)


def test_the_table_of_mu_parametrisation():
    first, hidden, top = mu_parametrisation((16, 100, 50, 4))
    assert (first.role, hidden.role, top.role) == ("input", "hidden", "output")
    for layer, (variance, sgd, adam) in (
        (first, (1 / 16, 100, 1)),
        (hidden, (1 / 100, 1, 1 / 100)),
        (top, (1 / 2500, 1 / 50, 1 / 50)),
    ):
        assert (layer.variance, layer.sgd_rate, layer.adam_rate) == pytest.approx(
            (variance, sgd, adam)
        )
    network = builders.mlp((16, 100, 50, 4), "relu", "lecun", last="mup_output")
    shapes = [layer[0] for layer in network.shapes]
    scales = [stage.block.sigma_w for stage in network.stages]
    variances = [s**2 / n_in for s, (_, n_in) in zip(scales, shapes, strict=True)]
    assert variances == pytest.approx([first.variance, hidden.variance, top.variance])
    with pytest.raises(InputError, match="it needs an input, a hidden layer and an output"):
        mu_parametrisation((16, 4))


@functools.cache
def changes_in_a_step(width):
    """Root mean square changes of three layers' pre-activations in one training step.

    By the rule, and whether the scales are the table's; of the same networks.
    """
    widths = (8, width, width, 1)
    table = mu_parametrisation(widths)
    x = jax.random.normal(jax.random.key(9), (8,))
    ways = [(rule, scaled) for rule in ("sgd", "adam") for scaled in (True, False)]
    variances = np.array([[layer.variance for layer in table]] * len(ways))
    variances[[not scaled for _, scaled in ways], -1] = 1 / width
    rates = [
        [getattr(layer, f"{rule}_rate") if scaled else 1.0 for layer in table]
        for rule, scaled in ways
    ]
    signs = np.array([rule == "adam" for rule, _ in ways])

    def forward(weights):
        z, h = [], x
        for w in weights:
            z.append(w @ h)
            h = jnp.tanh(z[-1])
        return z

    def one(key):
        keys = jax.random.split(key, 3)
        shapes = zip(widths[1:], widths[:-1], strict=True)
        drawn = [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]

        def one_way(variances, rates, sign):
            weights = [jnp.sqrt(v) * w for v, w in zip(variances, drawn, strict=True)]
            step = jax.grad(lambda w: (forward(w)[-1][0] - 1) ** 2)(weights)
            new = [
                w - 1e-3 * rate * jnp.where(sign, jnp.sign(g), g)
                for w, rate, g in zip(weights, rates, step, strict=True)
            ]
            pairs = zip(forward(new), forward(weights), strict=True)
            return jnp.stack([jnp.mean((a - b) ** 2) for a, b in pairs])

        return jax.lax.map(lambda way: one_way(*way), (variances, np.array(rates), signs))

    keys = jax.random.split(jax.random.key(0), 64)
    squares = jax.jit(lambda keys: jnp.mean(jax.lax.map(one, keys), axis=0))(keys)
    return dict(zip(ways, np.sqrt(squares), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_features_move_as_far_at_every_width(rule):
    """One step at widths 64 and 1024; Adam's first is the gradient's sign.

    Means over 64 networks; what is left of the ratio is finite width and chance, at a fixed key.
    Without the table some layer's differs by a power of the widths' ratio, 4 at the least.
    """
    ratios = {
        scaled: changes_in_a_step(1024)[rule, scaled] / changes_in_a_step(64)[rule, scaled]
        for scaled in (True, False)
    }
    np.testing.assert_allclose(np.log(ratios[True]), 0, atol=np.log(1.5))
    assert np.abs(np.log(ratios[False])).max() > np.log(3)
