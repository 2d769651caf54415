"""One network, forward and backward: against plain JAX, and at depths where plain JAX fails."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from gradflow import activations, builders, comparison, ensembles, gaussian, networks, statistics
from gradflow.blocks import Dense, Linear, Residual
from gradflow.errors import InputError
from gradflow.simulation import _threefry, monte_carlo, propagation
from gradflow.theory import float64, mean_field

WIDTHS = (6, 10, 10, 10, 4)
# float32 arithmetic through four layers, done in another order.
ROUNDING = 2e-4
predict = jax.jit(mean_field.predict)
propagate = jax.jit(propagation.propagate, static_argnames=("sampler", "keep", "checkpoint"))


def by_hand(network, x, key):
    """The dense sampler's own network, rebuilt with explicit weights and plain reverse mode."""
    top_key, *layer_keys = jax.random.split(key, network.depth + 1)
    weights, biases = [], []
    sizes = list(zip(network.widths[1:], network.widths[:-1], strict=True))
    stages = [s for s in network.stages for _ in range(s.repeats)]
    for layer, ((n, m), stage) in enumerate(zip(sizes, stages, strict=True)):
        w_key, b_key = jax.random.split(layer_keys[layer])
        weights.append(stage.block.sigma_w / m**0.5 * _threefry.normal(w_key, (n, m), x.dtype))
        biases.append(stage.block.sigma_b * jax.random.normal(b_key, (1, n), x.dtype))
    top = jax.random.normal(top_key, (x.shape[0], sizes[-1][0]), x.dtype)

    def cost(weights, shifts):
        h, zs = x, []
        for w, b, shift in zip(weights, biases, shifts, strict=True):
            z = h @ w.T + b + shift
            zs.append(z)
            h = jnp.tanh(z)
        return jnp.sum(top * z), zs

    shifts = [jnp.zeros((x.shape[0], n), x.dtype) for n, _ in sizes]
    (by_weights, deltas), zs = jax.grad(cost, argnums=(0, 1), has_aux=True)(weights, shifts)
    return zs, deltas, [g / x.shape[0] for g in by_weights]


@pytest.fixture(scope="module")
def case():
    network = builders.mlp(WIDTHS, "tanh", ensembles.fan_in(1.4), sigma_b=0.5)
    x = jax.random.normal(jax.random.key(1), (3, WIDTHS[0]), jnp.float32)
    return network, x, jax.random.key(2)


@pytest.mark.medium
def test_statistics_are_those_of_plain_reverse_mode(case):
    found = propagate(*case, sampler="dense")
    zs, deltas, by_weights = by_hand(*case)
    for layer, (z, delta, g) in enumerate(zip(zs, deltas, by_weights, strict=True)):
        gram = z @ z.T
        length = jnp.sqrt(jnp.diagonal(gram))
        cosines = gram / jnp.outer(length, length)
        square = jnp.mean(delta**2, axis=1)
        expected = {
            "log_q": jnp.log(jnp.mean(z**2)),
            "preactivation_mean": jnp.mean(z),
            "log_preactivation_variance": jnp.log(jnp.mean(jnp.var(z, axis=1))),
            "activation_mean": jnp.mean(jnp.tanh(z)),
            "log_activation_variance": jnp.log(jnp.mean(jnp.var(jnp.tanh(z), axis=1))),
            "saturation": jnp.mean(1 - jnp.tanh(z) ** 2 < 0.0396),
            "correlation": (cosines.sum() - 3) / 6,
            "log_gradient_variance": jnp.log(jnp.mean(square)),
            "log_gradient_norm": jnp.mean(jnp.log(jnp.linalg.norm(delta, axis=1))),
            "log_weight_gradient_variance": jnp.log(jnp.mean(g**2)),
        }
        if layer + 1 < len(zs):
            above = jnp.mean(deltas[layer + 1] ** 2, axis=1)
            expected["chi"] = jnp.mean(square / above)
        for name, value in expected.items():
            np.testing.assert_allclose(
                found[name][layer], value, rtol=ROUNDING, atol=ROUNDING, err_msg=f"{name} {layer}"
            )
    assert set(found) == {s.key for s in statistics.ALL}


@pytest.mark.parametrize("sampler", ["dense", pytest.param("matrix_free", marks=pytest.mark.slow)])
def test_kept_linearisations_give_the_same_numbers(case, sampler):
    kept = propagate(*case, sampler=sampler, keep=True)
    drawn_again = propagate(*case, sampler=sampler, keep=False)
    for name, value in kept.items():
        np.testing.assert_allclose(value, drawn_again[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", ["dense", "matrix_free"])
@pytest.mark.parametrize(  # relu: rescaled on the way up
    "activation", ["tanh", "relu"]
)
@pytest.mark.slow
def test_checkpoints_give_the_same_numbers(sampler, activation):
    """Stages of 1, 11 = 3·3 + 2 and 4 = 2·2 layers."""
    widths = [5, *[12] * 12, *[9] * 5]
    network = builders.mlp(widths, activation, "he")
    case = network, jax.random.normal(jax.random.key(2), (3, 5)), jax.random.key(1)
    kept = propagate(*case, sampler=sampler)
    walked_again = propagate(*case, sampler=sampler, checkpoint=True)
    assert set(kept) == set(walked_again)
    for name, value in kept.items():
        assert value.shape == (17,)
        np.testing.assert_allclose(value, walked_again[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.medium
def test_signals_are_those_that_the_statistics_measure(case):
    found = propagate(*case, sampler="matrix_free")
    drawn = propagation.signals(*case, sampler="matrix_free")
    z = np.concatenate([np.mean(np.asarray(s) ** 2, axis=(1, 2)) for s in drawn.preactivation])
    np.testing.assert_allclose(np.log(z), found["log_q"], rtol=1e-4, atol=1e-5)
    logs = np.concatenate([np.mean(np.asarray(s), axis=1) for s in drawn.log_gradient_norm])
    np.testing.assert_allclose(logs, found["log_gradient_norm"], rtol=1e-4, atol=1e-5)
    for gradient in drawn.gradient:
        np.testing.assert_allclose(np.linalg.norm(gradient, axis=2), 1, rtol=1e-5)


def test_propagation_composes_with_jit_vmap_and_grad(case):
    network, x, key = case

    def q_of(scale):
        scaled = jax.tree.map(lambda leaf: scale * leaf, network)
        return propagation.propagate(scaled, x, key, wanted=(statistics.q,))["log_q"][0]

    value, slope = jax.jit(jax.vmap(jax.value_and_grad(q_of)))(jnp.array([0.5, 1.0]))
    # Layer 1 without its activation is proportional to the scale: q to its square.
    np.testing.assert_allclose(slope, [4.0, 2.0], rtol=1e-3)
    np.testing.assert_allclose(value[1] - value[0], np.log(4), rtol=1e-4)


@pytest.mark.medium
@pytest.mark.parametrize("weights", ["glorot", pytest.param("he", marks=pytest.mark.slow)])
def test_relu_networks_are_right_at_depth_10_000(weights):
    """Reference table 6a's law: given survival, each layer's log gain has a known mean.

    Glorot's signals fall to 2^-10000 of the input, far below any float. Null: the mean over 40
    networks of a sum of 9999 independent log gains; |z| < 4.5, false-alarm rate 7e-6 each.
    """
    n, depth = 64, 10_000
    found = monte_carlo.simulate(
        builders.mlp([n] * (depth + 1), "relu", weights),
        np.ones((1, n), np.float32),
        networks=40,
        key=3,
    )
    alive = np.arange(1, n + 1)
    chance = np.exp(
        scipy.special.gammaln(n + 1)
        - scipy.special.gammaln(alive + 1)
        - scipy.special.gammaln(n - alive + 1)
        - n * np.log(2)
    )
    gain = (2.0 if weights == "he" else 1.0) / n
    mean_log = chance @ (scipy.special.digamma(alive / 2) + np.log(2) + np.log(gain))
    for name, layer in (("log_q", -1), ("log_gradient_norm", 0)):
        values = found.estimates[name]
        samples_mean = values.log_value[layer] if name == "log_q" else values.value[layer]
        if name == "log_q":
            # The mean of q is dominated by rare networks: only its order can be checked.
            assert abs(samples_mean / (mean_log * depth) - 1) < 0.35 or weights == "he"
            continue
        expected = mean_log * (depth - 1) / 2 + np.log(n) / 2
        error = values.standard_error[layer]
        assert abs(samples_mean - expected) < 4.5 * error
    assert not found.overflowed.any()


@pytest.mark.medium
def test_logistic_gradients_are_right_at_depth_10_000():
    """Theory says χ = 0.0557 a layer; the product of 9999 of them is 1e-12500."""
    n, depth = 256, 10_000
    found = monte_carlo.simulate(
        builders.mlp([n] * (depth + 1), "logistic", "glorot"),
        np.ones((1, n), np.float32),
        networks=4,
        key=3,
        wanted=(statistics.log_gradient_norm, statistics.chi),
    )
    change = found["log_gradient_norm"].value[0] - found["log_gradient_norm"].value[-1]
    assert change / (depth - 1) == pytest.approx(np.log(0.0557) / 2, rel=5e-3)


def test_a_dead_network_has_a_gradient_of_zero_and_no_nan():
    network = builders.mlp([2] * 30, "relu", "he")
    found = monte_carlo.simulate(network, np.ones((1, 2), np.float32), networks=50, key=1)
    norm = found["log_gradient_norm"]
    assert norm.excluded[0] > 0
    assert np.isfinite(found["gradient_variance"].value).all()
    assert found["gradient_variance"].count[0] == 50


def test_an_overflow_is_counted_at_its_layer_and_not_averaged():
    network = builders.mlp([50] * 61, lambda z: z * 2.0, "unscaled", sigma_b=0.1)
    found = monte_carlo.simulate(network, np.ones((1, 50), np.float32), networks=8, key=1)
    first = int(np.argmax(found.overflowed > 0))
    assert 0 < first < 60
    assert (found.overflowed[first + 5 :] == 8).all()
    assert found["q"].count[first + 5] == 0
    assert np.isfinite(found["q"].value[:first]).all()


def test_signals_below_any_float_are_followed_and_leave_the_gradient_right():
    """tanh with standard weights falls by √3 a layer: below float32 from about layer 160 on."""
    n, depth = 100, 300
    network = builders.mlp([n] * (depth + 1), "tanh", ensembles.fan_in(3**-0.5))
    found = monte_carlo.simulate(network, np.ones((1, n), np.float32), networks=8, key=1)
    assert not found.vanished.any()
    for start, end in ((100, 120), (200, 299)):
        fall = found["q"].log_value[end] - found["q"].log_value[start]
        assert fall / (end - start) == pytest.approx(-np.log(3), rel=0.05)
    change = found["log_gradient_norm"].value[100] - found["log_gradient_norm"].value[-1]
    assert change / (depth - 101) == pytest.approx(-np.log(3) / 2, rel=0.05)


def test_an_underflow_is_counted():
    """Of z |z|, which squares what is small, nothing is left in a float32 after seven layers."""
    network = builders.mlp([50] * 11, lambda z: 0.5 * z * jnp.abs(z), ensembles.fan_in(1.0))
    found = monte_carlo.simulate(network, np.ones((1, 50), np.float32), networks=8, key=1)
    first = int(np.argmax(found.vanished > 0))
    assert 3 < first < 10
    assert (found.vanished[first + 2 :] == 8).all()


def test_the_program_does_not_grow_with_depth():
    """What is compiled, and so the time it takes, is the same at depth 10 and at 10 000."""

    def program(depth):
        network = builders.mlp([8] * (depth + 1), "tanh").as_arrays(jnp.float32)
        run = jax.jit(propagation.propagate, static_argnames="sampler")
        lowered = run.lower(network, jnp.ones((1, 8)), jax.random.key(0), sampler="matrix_free")
        return len(lowered.as_text())

    assert program(10_000) < 1.02 * program(10)


@pytest.mark.parametrize("sampler", ["dense", "matrix_free"])
def test_weights_that_start_at_zero_have_a_gradient_and_pass_none_on(sampler):
    """∂C/∂W = δ hᵀ above, of which nothing depends on W; 0 below, as a logarithm -inf."""
    x = jax.random.normal(jax.random.key(2), (1, 20))
    layers = [Linear(30), Dense(units=30), Dense(units=25, sigma_w=0.0)]
    network = builders.stack(20, layers)
    found = propagate(network, x, jax.random.key(1), sampler=sampler)
    predicted = predict(network, mean_field.input_gram(x))
    for values in (found, predicted):
        for name in ("gradient_variance", "weight_gradient_variance"):
            assert np.isneginf(values[f"log_{name}"][:2]).all()
        assert np.isneginf(values["log_q"][2])
        assert values["chi"][1] == 0
    h2 = np.exp(found["log_activation_variance"][1]) + found["activation_mean"][1] ** 2
    product = found["log_gradient_variance"][2] + np.log(h2)
    np.testing.assert_allclose(found["log_weight_gradient_variance"][2], product, rtol=1e-4)
    moment = gaussian.moment(activations.tanh, "phi2", jnp.asarray(predicted["q"][1]))
    np.testing.assert_allclose(
        predicted["log_weight_gradient_variance"][2], np.log(moment), rtol=1e-4
    )


@pytest.mark.medium
@pytest.mark.parametrize("sampler", ["dense", "matrix_free"])
def test_lsuv_gives_every_product_unit_variance(sampler):
    """The scales that it returns, put into the network that the same key draws."""
    x, key = 3 * jax.random.normal(jax.random.key(2), (5, 8)), jax.random.key(1)
    widths = (8, 12, 12, 12, 9)
    network = builders.mlp(widths, "logistic", ensembles.fan_in(2.0, "orthogonal"))
    found = propagation.lsuv(network, x, key, sampler=sampler)
    assert [scales.shape for scales in found] == [(1, 1), (2, 1), (1, 1)]
    scales = np.concatenate(found)[:, 0]
    blocks = [s.block for s in network.stages for _ in range(s.repeats)]
    scaled = [
        dataclasses.replace(block, sigma_w=scale)
        for block, scale in zip(blocks, scales, strict=True)
    ]
    for blocks_of, far in ((scaled, False), (blocks, True)):
        z = propagation.signals(builders.stack(8, blocks_of), x, key, sampler=sampler)
        spread = np.array([np.std(one) for stage in z.preactivation for one in stage])
        assert (np.abs(spread - 1) > 1e-4).all() == far
        assert (np.abs(spread - 1) < 1e-4).all() != far


def test_lsuv_scales_every_matrix_of_a_block():
    network = builders.residual(6, 10, 4, "relu", layers=2, weights_first=True)
    found = propagation.lsuv(network, jnp.ones((2, 6)), jax.random.key(0))
    assert [scales.shape for scales in found] == [(1, 1), (4, 3)]
    assert all((np.asarray(scales) > 0).all() for scales in found)


def test_lsuv_names_the_layer_that_gets_nothing():
    nothing = Dense(activations.get(lambda x: 0 * x), 8)
    network = builders.stack(6, [Linear(8), (Residual(nothing), 2)])
    for given, layer in ((jnp.ones((2, 6)), 2), (jnp.zeros((2, 6)), 1)):
        with pytest.raises(InputError, match=f"product of layer {layer} has no variance"):
            propagation.lsuv(network, given, jax.random.key(0))
    scales = jax.jit(lambda x: propagation.lsuv(network, x, jax.random.key(0)))(jnp.ones((2, 6)))
    assert np.isinf(scales[1][0])


def test_lsuv_is_for_layers_of_their_own_weights():
    network = builders.recurrent(6, 8, 3)
    for ask in (
        lambda: propagation.lsuv(network, jnp.ones((2, 6)), jax.random.key(0)),
        lambda: networks.unit_variance(network),
    ):
        with pytest.raises(InputError, match="whose steps share their weights"):
            ask()


def test_chi_is_nan_at_the_top_of_many_inputs_too():
    # XLA makes a number of exp(NaN) where it sums over many sites.
    network = builders.mlp((64, *[100] * 5, 10), "tanh", "glorot")
    x = jax.random.normal(jax.random.key(1), (300, 64), jnp.float32)
    run = jax.jit(lambda x: propagation.propagate(network, x, jax.random.key(0))["chi"])
    assert np.isnan(run(x)[-1])
    assert np.all(np.isfinite(run(x)[:-1]))


@pytest.mark.parametrize("sampler", ["dense", "matrix_free"])
@pytest.mark.parametrize(("phi", "sizes"), [("tanh", (1e-9, 1e-30)), ("gelu", (1e9, 1e30))])
def test_signals_beyond_a_float_keep_their_scale_apart(phi, sizes, sampler, key):
    """Where φ is linear on each side, an input's size is a scale, and no more: same weights."""
    network = builders.mlp([8, *[20] * 30], phi, ensembles.fan_in(sizes[0] ** 0.2))
    x = jax.random.normal(key, (2, 8), jnp.float32)
    one, other = (propagate(network, size * x, key, sampler=sampler) for size in sizes)
    shift = 2 * math.log(sizes[1] / sizes[0])
    assert abs(float(other["log_q"][-1])) > 150, "no float32"
    for name in ("log_q", "log_activation_variance", "log_weight_gradient_variance"):
        np.testing.assert_allclose(other[name] - one[name], shift, rtol=1e-4)
    for name in ("correlation", "log_gradient_norm", "saturation"):
        np.testing.assert_allclose(other[name], one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.medium
def test_what_is_a_logarithm_answers_to_its_name_too_everywhere(key):
    network, x = builders.mlp([4, 5, 5]), jnp.ones((2, 4))
    found = jax.jit(lambda x: propagation.propagate(network, x, key))(x)
    predicted = predict(network, x @ x.T / 4)
    simulated = monte_carlo.simulate(network, x, networks=3, keep_samples=True)
    for values in (found, predicted.values, simulated.samples):
        # Compiled and not, exp may differ in its last bit.
        np.testing.assert_allclose(values["q"], jnp.exp(values["log_q"]), rtol=1e-6)
        np.testing.assert_array_equal(values.get("q"), values["q"])
        assert "q" in values
        assert "p" not in values
        assert "q" not in list(values)  # a dict of keys alone, else
        assert values.get("p") is None
    assert simulated["q"] is simulated["log_q"]
    batched = jax.vmap(lambda x: propagation.propagate(network, x, key))(jnp.ones((3, 2, 4)))
    assert batched["gradient_variance"].shape == (3, 2)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["propagate", "predict", "simulate", "samples", "compare"])
def test_a_quantity_that_is_not_there_is_a_sentence(kind, key):
    network, x = builders.mlp([4, 5, 5]), jnp.ones((2, 4))
    simulated = monte_carlo.simulate(network, x, networks=3, keep_samples=True)
    found = {
        "propagate": lambda: propagation.propagate(network, x, key),
        "predict": lambda: mean_field.predict(network, x @ x.T / 4),
        "simulate": lambda: simulated,
        "samples": lambda: simulated.samples,
        "compare": lambda: comparison.compare_results(float64.predict(network, x), simulated),
    }[kind]()
    with pytest.raises(InputError, match=r"^unknown quantity 'ch' \(did you mean 'chi'\?\)"):
        found["ch"]


def test_inputs_that_a_float_does_not_hold_are_refused():
    network, x = builders.mlp([4, 5, 5]), np.ones((2, 4), np.float32)
    x[1] *= 1e-38
    with pytest.raises(InputError, match=r"largest value is 1e-38, of which float32 does not hold"):
        monte_carlo.simulate(network, x, networks=2)
    x[1] *= 0
    assert np.isfinite(monte_carlo.simulate(network, x, networks=2)["q"].value).all()


def test_the_saturation_threshold_is_the_networks():
    network = builders.mlp([6, 300, 300], "tanh", ensembles.fan_in(2.0))
    other = dataclasses.replace(network, saturation_threshold=0.6)
    x = jax.random.normal(jax.random.key(0), (1, 6))
    shares = [
        (
            float(propagation.propagate(n, x, 0)["saturation"][0]),
            float(float64.predict(n, x)["saturation"][0]),
        )
        for n in (network, other)
    ]
    z = jax.random.normal(jax.random.key(1), 100_000) * jnp.sqrt(4 * jnp.mean(x**2))
    for (measured, predicted), threshold in zip(shares, (0.0396, 0.6), strict=True):
        share = float(jnp.mean(1 - jnp.tanh(z) ** 2 < threshold))
        # Five standard errors of 100 000 draws, and of 300 units.
        assert abs(predicted - share) < 5 * math.sqrt(share * (1 - share) / 100_000)
        assert abs(measured - predicted) < 5 * math.sqrt(share * (1 - share) / 300)
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(InputError, match="saturation_threshold is"):
            dataclasses.replace(network, saturation_threshold=wrong)
