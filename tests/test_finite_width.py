"""Finite width: exact laws against 50-digit arithmetic, first order against simulation."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from gradflow import activations, ensembles
from gradflow.errors import InputError
from gradflow.theory import mean_field
from gradflow.theory.finite_width import exact

FINITE_WIDTH = 1e-10  # the issue asks 1e-8
pytestmark = pytest.mark.usefixtures("x64_only")


def number(text):
    return float(Fraction(text))


@pytest.mark.medium
def test_exact_gains_are_those_of_the_table(load_reference):
    rows = [r for r in load_reference("t6a_finite_width_exact") if "sb2" not in r["inputs"]]
    assert len(rows) == 18
    for row in rows:
        given = row["inputs"]
        name, sigma_w2 = given["network"].split()[0], number(given["network"].split("sw2=")[1])
        widths = given.get("widths") or [given["n"]] * (given["L"] + 1)
        law = exact.gain_moments(name, widths, sigma_w2)
        limit = exact.log_normal(name, widths, sigma_w2)
        names = {
            "P_alive": law.alive,
            "E_log": law.mean_of_log,
            "E_log_given_alive": law.mean_of_log,
            "Var_log": law.variance_of_log,
            "Var_log_given_alive": law.variance_of_log,
            "E_sq": law.mean,
            "E_sq2": law.second_moment,
            "Var_sq": law.variance,
            "lognormal_mean_approx": limit.mean,
            "lognormal_var_approx": limit.variance,
            "hanin_nica_mean_log": limit.mean,
            "hanin_nica_beta": limit.variance,
        }
        for key, value in row["values"].items():
            np.testing.assert_allclose(
                names[key], number(value), rtol=FINITE_WIDTH, err_msg=f"{row['id']} {key}"
            )


def test_exact_lengths_with_biases_are_those_of_the_table(load_reference):
    rows = [r for r in load_reference("t6a_finite_width_exact") if "sb2" in r["inputs"]]
    assert len(rows) == 3
    for row in rows:
        given, expected = row["inputs"], row["values"]
        found = exact.forward_moments(
            given["network"].split()[0],
            *(number(given[name]) for name in ("q1", "sw2", "sb2")),
            width=given["n"],
            depth=given["layers"],
        )
        np.testing.assert_allclose(
            [found.mean[-1], found.mean[-1], found.variance_of_v[-1], found.variance_of_q[-1]],
            [number(expected[k]) for k in ("E_qhat_L", "E_v_L", "Var_v_L", "Var_qhat_L")],
            rtol=FINITE_WIDTH,
        )


def test_the_vertex_is_that_of_the_table(load_reference):
    rows = load_reference("t6b_finite_width_1overn")
    assert len(rows) == 4
    for row in rows:
        given, layers = row["inputs"], row["values"]["layers"]
        found = exact.vertex(
            given["activation"],
            *(number(given[name]) for name in ("q1", "sw2_value", "sb2_value")),
            depth=max(map(int, layers)),
        )
        for layer, expected in layers.items():
            for name in ("K", "V4", "G1"):
                np.testing.assert_allclose(
                    getattr(found, name)[int(layer) - 1],
                    number(expected[name]),
                    rtol=FINITE_WIDTH,
                    atol=1e-13,
                )


def test_direction_gains_are_those_of_the_table(load_reference):
    rows = load_reference("t10_direction")
    assert len(rows) == 5
    for row in rows:
        given, layers = row["inputs"], row["values"]["after_layer_l"]
        found = mean_field.direction_gains(
            activations.get(given["activation"]),
            *(number(given[name]) for name in ("x_sq_over_n", "sw2", "sb2")),
            depth=max(map(int, layers)),
        )
        for layer, expected in layers.items():
            for name in ("q", "parallel", "orthogonal"):
                np.testing.assert_allclose(
                    found[name][int(layer) - 1], number(expected[name]), rtol=1e-10
                )


def test_the_vertex_of_relu_is_exact():
    """Without biases v is a product of independent factors: E v = K, and V4 grows as 5 (l - 1)."""
    found = exact.vertex("relu", 1.3, 2.0, depth=6)
    np.testing.assert_allclose(found.K, 1.3, rtol=1e-12)
    np.testing.assert_allclose(found.V4, 1.3**2 * 5 * np.arange(6), rtol=1e-12)
    np.testing.assert_allclose(found.G1, 0, atol=1e-12)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "sigma_w2", "sigma_b2"),
    [("tanh", 1.5, 0.1), pytest.param("gelu", 1.5, 0.3, marks=pytest.mark.slow)],
)
def test_simulated_chains_have_the_variance_and_the_shift(name, sigma_w2, sigma_b2):
    """The exact chain of v, 400 000 times, at widths 60 and 120, 5 layers.

    Null: n Var v → V4 and n (E v - K) → G1 like 1/n, so that twice the wider less the narrower is
    the limit up to 1/n². Both are tested to five standard errors plus 2 % for 1/n²; a
    false-alarm rate of 1e-5 with a seed that is fixed.
    """
    phi = {"tanh": np.tanh, "gelu": lambda z: z * scipy.special.ndtr(z)}[name]
    q1, depth, count, rng = 1.0, 5, 400_000, np.random.default_rng(0)

    def chain(n):
        v = np.full(count, q1, np.float32)
        for _ in range(depth - 1):
            total, deviation = np.zeros_like(v), np.sqrt(v)
            for _ in range(n):
                total += phi(deviation * rng.standard_normal(count, np.float32)) ** 2
            v = np.float32(sigma_b2) + np.float32(sigma_w2 / n) * total
        return v.astype(np.float64)

    limit = exact.vertex(name, q1, sigma_w2, sigma_b2, depth=depth)
    found = []
    for n in (60, 120):
        v = chain(n)
        variance = v.var()
        kurtosis = np.mean((v - v.mean()) ** 4) / variance**2
        found.append(
            (
                n * (v.mean() - float(limit.K[-1])),
                n * math.sqrt(variance / count),
                n * variance,
                n * variance * math.sqrt((kurtosis - 1) / count),
            )
        )
    (shift_a, s_a, var_a, e_a), (shift_b, s_b, var_b, e_b) = found
    g1, v4 = float(limit.G1[-1]), float(limit.V4[-1])
    assert abs(2 * shift_b - shift_a - g1) < 5 * math.hypot(2 * s_b, s_a) + 0.02 * abs(g1)
    assert abs(2 * var_b - var_a - v4) < 5 * math.hypot(2 * e_b, e_a) + 0.02 * v4


def test_one_layer_has_the_variance_of_its_weights_kurtosis():
    """Var ‖W u‖² = (2 + κ Σ u_i⁴)/n: 0.8/n of uniform weights and a one-hot input."""
    for kurtosis, fourth in ((-1.2, 1.0), (-1.2, 0.02), (-2.0, 1.0), (3.0, 0.5), (0.0, 1.0)):
        found = exact.forward_moments(
            "linear", 1.0, 1.0, width=50, depth=1, kurtosis=kurtosis, input_fourth=fourth
        )
        np.testing.assert_allclose(
            found.variance_of_q[0], (2 + kurtosis * fourth) / 50, rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("weights", ["uniform", "signs"])
@pytest.mark.parametrize("dense", [False, True], ids=["one-hot", "dense"])
def test_weights_that_are_not_gaussian_have_their_kurtosis_term(activation, weights, dense):
    """Three layers of 7 units, 100 000 networks, 9 inputs, σ_b² = 0 and 0.2, each weight drawn.

    Null: the means of q̂ and of (q̂ - E q̂)² are the exact ones. Tested to 5 standard errors each,
    in 96 tests in all: a false-alarm rate of 6e-5, with fixed seeds. The test can fail:
    without the term the variance of layer 1 at a one-hot input is 2/0.8 too large.
    """
    rng = np.random.default_rng(20 + dense)
    count, inputs, n, w2 = 100_000, 9, 7, 1.7
    u = np.sign(rng.standard_normal(inputs)) if dense else 3 * np.eye(inputs)[0]  # |u|² = 9
    kurtosis = {"uniform": -1.2, "signs": -2.0}[weights]
    phi = {"linear": lambda z: z, "relu": lambda z: np.maximum(z, 0)}[activation]
    for b2 in (0.0, 0.2):
        h = np.broadcast_to(u, (count, inputs))
        measured = []
        for _ in range(3):
            shape = (count, n, h.shape[1])
            w = np.sqrt(3) * rng.uniform(-1, 1, shape)
            w = w if weights == "uniform" else np.sign(w)
            z = np.sqrt(w2 / shape[2]) * np.einsum("knm,km->kn", w, h)
            z += np.sqrt(b2) * rng.standard_normal(z.shape)
            measured.append((z**2).mean(axis=1))
            h = phi(z)
        found = exact.forward_moments(
            activation,
            w2 + b2,
            w2,
            b2,
            width=n,
            depth=3,
            kurtosis=kurtosis,
            input_fourth=1 / inputs if dense else 1.0,
        )
        for layer, q in enumerate(measured):
            mean = float(found.mean[layer])
            squares = (q - mean) ** 2
            for values, known in ((q, mean), (squares, float(found.variance_of_q[layer]))):
                error = values.std() / math.sqrt(count)
                assert abs(values.mean() - known) < 5 * error + 1e-12, (b2, layer)


def test_gains_have_the_kurtosis_term_too():
    """Plain moments are those of the lengths, of equal widths; there is no law of the logarithm."""
    n, depth, w2 = 6, 4, 1.3
    options = {"kurtosis": -1.2, "input_fourth": 0.4}
    gain = exact.gain_moments("relu", [n] * (depth + 1), w2, **options)
    # v of a layer above is σ_w²/n times ‖h‖², and so has its moments.
    length = exact.forward_moments("relu", w2, w2, width=n, depth=depth + 1, **options)
    mean, second = length.mean[-1], length.variance_of_v[-1] + length.mean[-1] ** 2
    np.testing.assert_allclose(gain.mean * w2, mean, rtol=1e-12)
    np.testing.assert_allclose(gain.second_moment * w2**2, second, rtol=1e-12)
    assert np.isnan(gain.mean_of_log)
    gaussian = exact.gain_moments("relu", [n] * (depth + 1), w2, input_fourth=0.4)
    assert np.isfinite(gaussian.mean_of_log)


def test_means_of_any_activation_move_with_the_kurtosis():
    """Layer 2 of tanh, from an input of 20 entries of one size: E v = K + (κ term)/20.

    3 million pre-activations of uniform weights. Null: the shift is the first order; tested to 5
    standard errors (a false-alarm rate of 6e-7), and a tenth of it for the next order. It is 8
    standard errors at least.
    """
    inputs, count, q = 20, 3_000_000, 1.5
    rng = np.random.default_rng(3)
    z = np.zeros(count)
    for _ in range(inputs):
        z += np.sqrt(3 * q / inputs) * rng.uniform(-1, 1, count)
    squares = np.tanh(z) ** 2
    found = exact.vertex("tanh", q, 1.0, depth=2, kurtosis=-1.2)
    plain = exact.vertex("tanh", q, 1.0, depth=2)
    shift = float(found.G1[1] - plain.G1[1]) / inputs
    error = squares.std() / math.sqrt(count)
    assert abs(shift) > 8 * error
    assert abs(squares.mean() - float(plain.K[1]) - shift) < 5 * error + 0.1 * abs(shift)


@pytest.mark.parametrize("name", ["uniform", "truncated_normal", "gaussian"])
def test_the_kurtosis_of_distributions_is_that_of_what_they_draw(name, key):
    """A million entries; to 6 standard errors of the fourth moment (of variance below 96)."""
    distribution = ensembles.DISTRIBUTIONS[name]
    drawn = np.asarray(distribution.draw(key, (1000, 1000), jnp.float32), float)
    assert abs(np.mean(drawn**4) - 3 - distribution.kurtosis) < 6 * np.std(drawn**4) / 1000


def test_deep_networks_leave_the_range_of_a_float_in_logarithms_alone():
    found = exact.gain_moments("relu", [16] * 3001, 4.0)
    np.testing.assert_allclose(found.log_mean, 3000 * math.log(2), rtol=1e-12)
    assert np.isinf(found.mean)
    assert 0 < found.alive < 1
    # A linear network of one unit: log χ²_1 has variance π²/2.
    one = exact.gain_moments("linear", [1, 1], 1.0)
    np.testing.assert_allclose(one.variance_of_log, math.pi**2 / 2, rtol=1e-12)


def test_a_leaky_slope_has_plain_moments_alone():
    found = exact.gain_moments(activations.leaky_relu(0.5), [8, 8], 1.6)
    np.testing.assert_allclose(found.mean, 1, rtol=1e-12)
    assert np.isnan(found.mean_of_log)
    assert found.alive == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact.gain_moments("tanh", [4, 4]), "activation is 'tanh'"),
        (lambda: exact.gain_moments("relu", [4]), "at least one layer"),
        (lambda: exact.gain_moments("relu", [4, 0]), "width is 0"),
        (lambda: exact.gain_moments("relu", [4, 4], -1.0), "sigma_w2 is -1.0"),
        (lambda: exact.gain_moments("relu", [4, 4], kurtosis=-2.5), "kurtosis is -2.5"),
        (lambda: exact.gain_moments("relu", [4, 4], input_fourth=0.1), "input_fourth is 0.1"),
        (lambda: exact.vertex("tanh", 1.0, 1.0, depth=0), "depth is 0"),
        (lambda: exact.vertex("tanh", -1.0, 1.0, depth=2), "q1 is -1.0"),
        (
            lambda: exact.forward_moments("relu", 1.0, 2.0, -0.1, width=3, depth=2),
            "sigma_b2 is -0.1",
        ),
    ],
)
def test_bad_input_is_said(call, message):
    with pytest.raises(InputError, match=message):
        call()
