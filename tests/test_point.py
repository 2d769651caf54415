"""One point's report, under the names of the reference tables and with their numbers."""

import fractions

import numpy as np
import pytest

from gradflow import activations
from gradflow.errors import InputError
from gradflow.studies import point

pytestmark = pytest.mark.usefixtures("x64_only")


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
            found = point.run(
                activations.get(inputs["activation"]), w2, b2, start=start, depth=depth
            )["layers"]
            for layer, values in layers.items():
                for name, value in values.items():
                    measured = found[name][int(layer) - 1]
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
        found = point.run(
            phi,
            w2,
            number(inputs.get("sb2", "0")),
            start=number(inputs.get("q1", "1")),
            depth=int(inputs.get("L", inputs.get("layers"))),
            width=int(inputs["n"]),
        )["finite_width"]
        for name, value in values.items():
            if value is not None:
                wanted = pytest.approx(float(value), rel=1e-8, abs=1e-12)
                assert found[name] == wanted, (row["id"], name)
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
        found = point.run(phi, w2, number(inputs["sb2"]), start=q, depth=depth)
        if found["q_star"] != pytest.approx(q, rel=1e-6):
            continue  # the row's q is no fixed point
        for name in ("mean_sq_sv", "var_sq_sv", "var_over_mean2"):
            of = found["jacobian"][inputs["ensemble"]][name]
            assert of == pytest.approx(number(values[name]), rel=1e-8), row["id"]
        assert (found["mu1"], found["mu2"]) == pytest.approx(
            (number(values["mu1"]), number(values["mu2"])), rel=1e-9
        )
        checked += 1
    assert checked > 5


def test_where_no_input_has_the_first_length_no_direction_is_along_it():
    found = point.run(activations.tanh, 1.0, 0.5, start=0.25, depth=3)["layers"]
    assert np.isnan(found["parallel"]).all()
    assert np.isfinite(found["chi_l"]).all()


def test_a_correlation_beyond_1_is_refused():
    with pytest.raises(InputError, match="correlations"):
        point.run(activations.tanh, 1.0, correlations=[0.5, 1.5])
