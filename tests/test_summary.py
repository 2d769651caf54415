"""The theory's summary at one point, against the numbers of the reference tables."""

import fractions

import numpy as np
import pytest

from gradflow import activations
from gradflow.cli._words import words
from gradflow.errors import InputError
from gradflow.theory import fixed_points, summary

pytestmark = pytest.mark.usefixtures("x64_only")


# The tables' names for what is reported.
LAYERS = {
    "act_mean": "activation_mean",
    "act_meansq": "activation_second_moment",
    "chi_l": "chi",
    "mean_sq_jac": "jacobian_norm",
    "log_mean_sq_jac": "log_jacobian_norm",
    "parallel": "gain_parallel",
    "orthogonal": "gain_orthogonal",
    "ratio": "gain_ratio",
}
FINITE_WIDTH = {
    "E_qhat_L": "q_mean",
    "Var_qhat_L": "q_variance",
    "E_v_L": "q_mean",
    "Var_v_L": "conditional_variance_variance",
    "P_alive": "alive",
    "E_sq": "gain_mean",
    "E_sq2": "gain_second_moment",
    "Var_sq": "gain_variance",
    "E_log": "log_gain_mean",
    "Var_log": "log_gain_variance",
    "E_log_given_alive": "log_gain_mean",
    "Var_log_given_alive": "log_gain_variance",
    "hanin_nica_mean_log": "log_normal_mean",
    "hanin_nica_beta": "log_normal_variance",
    "lognormal_mean_approx": "log_normal_mean",
    "lognormal_var_approx": "log_normal_variance",
}
JACOBIAN = {
    "mean_sq_sv": "mean_squared_singular_value",
    "var_sq_sv": "squared_singular_value_variance",
    "var_over_mean2": "squared_singular_value_relative_variance",
}


def number(text):
    return float(fractions.Fraction(text))


@pytest.mark.slow
def test_layers_are_those_of_tables_6b_10_and_11(load_reference):
    tables = {"t6b_finite_width_1overn": "layers", "t11_depth_profiles": "layers"}
    tables["t10_direction"] = "after_layer_l"
    depth, checked = 100, 0  # one depth: one program for each activation
    for table, place in tables.items():
        for row in load_reference(table):
            inputs, layers = row["inputs"], row["values"][place]
            w2, b2 = (number(inputs.get(f"{s}_value", inputs[s])) for s in ("sw2", "sb2"))
            start = inputs.get("q1")
            start = number(start) if start else w2 * number(inputs["x_sq_over_n"]) + b2
            assert max(map(int, layers)) <= depth
            phi = activations.get(inputs["activation"])
            found = summary._layers(
                # alone: the rest takes the time
                summary._profiles(phi, start, w2, b2, depth=depth),
                start,
                w2,
                b2,
                depth,
            )
            for layer, values in layers.items():
                for name, value in values.items():
                    measured = found[LAYERS.get(name, name)][int(layer) - 1]
                    wanted = pytest.approx(float(value), rel=1e-8, abs=1e-12)
                    assert measured == wanted, (row["id"], layer, name)
                    checked += 1
    assert checked > 200


@pytest.mark.slow
def test_finite_width_is_that_of_table_6a(load_reference):
    checked = 0
    for row in load_reference("t6a_finite_width_exact"):
        inputs, values = row["inputs"], row["values"]
        if "widths" in inputs:
            continue
        network = inputs["network"]
        phi = activations.get("relu" if "relu" in network else "linear")
        w2 = number(inputs.get("sw2", network.split("sw2=")[-1]))
        found = summary._finite_width(
            phi,
            number(inputs.get("q1", "1")),
            w2,
            number(inputs.get("sb2", "0")),
            int(inputs.get("L", inputs.get("layers"))),
            int(inputs["n"]),
        )
        for name, value in values.items():
            if value is not None:
                wanted = pytest.approx(float(value), rel=1e-8, abs=1e-12)
                assert found[FINITE_WIDTH[name]] == wanted, (row["id"], name)
                checked += 1
    assert checked > 50


@pytest.mark.slow
def test_the_jacobian_is_that_of_table_5(load_reference):
    checked = 0
    for row in load_reference("t5_jacobian"):
        inputs, values = row["inputs"], row["values"]
        if "var_sq_sv" not in values or inputs["activation"] in ("relu", "linear"):
            continue  # theirs is at any q
        phi, w2 = activations.get(inputs["activation"]), number(inputs["sw2"])
        depth, q = int(inputs["L"]), number(inputs["q"])
        if depth not in (10, 20):
            continue  # `test_spectrum` has every depth; each is a program
        scales = w2, number(inputs["sb2"])
        q = float(fixed_points.analyse(phi, *scales, start=q).q_star)
        if q != pytest.approx(number(inputs["q"]), rel=1e-6):
            continue  # the row's q is no fixed point
        found = summary._at_fixed_point(
            # alone, as above
            summary._at_length(phi, q, *scales, np.zeros(0), depth=depth),
            q,
            scales[0],
        )
        for name, ours in JACOBIAN.items():
            of = found["jacobian"][inputs["ensemble"]][ours]
            assert of == pytest.approx(number(values[name]), rel=1e-8), row["id"]
        assert (found["slope_second_moment"], found["slope_fourth_moment"]) == pytest.approx(
            (number(values["mu1"]), number(values["mu2"])), rel=1e-9
        )
        checked += 1
    assert checked > 5


@pytest.mark.medium
def test_where_no_input_has_the_first_length_no_direction_is_along_it():
    found = summary.summarise(activations.tanh, 1.0, 0.5, start=0.25, depth=3)["layers"]
    assert np.isnan(found["gain_parallel"]).all()
    assert np.isfinite(found["chi"]).all()


def test_the_correlation_map_of_relu_is_that_of_cho_and_saul():
    c = np.array([-1.0, -0.3, 0.0, 0.8, 1.0])
    found = summary.correlation_map("relu", 1.5, 0.1, c)
    beyond = np.pi - np.arccos(c)
    expected = 1.5 / (2 * np.pi) * (np.sqrt(1 - c**2) + beyond * c) + 0.1 / 0.4
    np.testing.assert_allclose(found.correlation_map, expected, rtol=1e-12)
    np.testing.assert_allclose(found.correlation_map_slope, 1.5 * beyond / (2 * np.pi), rtol=1e-12)
    assert found.attrs["q_star"] == pytest.approx(0.4, rel=1e-12)
    assert found.attrs["c_star"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("relu", 2.0, 0.5), "settles at no q"),
        (("relu", 1.5, 0.1, [0.5, 1.5]), "c is"),
        (("relu", 1.5, 0.1, []), "c is"),
    ],
)
def test_a_correlation_map_that_there_is_not_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        summary.correlation_map(*arguments)


def test_a_correlation_beyond_1_is_refused():
    with pytest.raises(InputError, match="correlations"):
        summary.summarise(activations.tanh, 1.0, correlations=[0.5, 1.5])


@pytest.mark.medium
def test_every_name_that_is_printed_has_words():
    found = summary.summarise(activations.relu, 1.5, correlations=[0.5], depth=2, width=20)
    names = {*found, *found["layers"], *found["finite_width"], *found["jacobian"]}
    names -= {"fixed_points", "layers", "finite_width", "jacobian"}
    for one in (*found["fixed_points"], *found["jacobian"].values()):
        names |= set(one)
    for name in names - {"gaussian", "orthogonal"}:
        assert words(name)
    assert not {"sw2", "sb2", "mu1", "act_meansq", "E_qhat_L", "Var_sq", "P_alive"} & names
