"""Float ranges: the layers are those where NumPy's own floats leave their range."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from gradflow import builders, comparison
from gradflow._float_ranges import DTYPES, NOWHERE, UNKNOWN, FloatRange, float_ranges, sentence

WIDTH = 256
TYPES = {name: getattr(ml_dtypes, name, None) or getattr(np, name) for name in DTYPES[:3]}
TYPES["bfloat16"] = ml_dtypes.bfloat16


def first_layers(sigma_w, depth):
    """Where a linear network's signals are infinite, and all 0, when kept in each float type.

    Computed in float64 at every layer, and cast: the types' range alone is what is asked for.
    """
    rng = np.random.default_rng(0)
    z, found = rng.standard_normal(WIDTH), {name: {} for name in TYPES}
    for layer in range(1, depth + 1):
        z = sigma_w / np.sqrt(WIDTH) * rng.standard_normal((WIDTH, WIDTH)) @ z
        for name, dtype in TYPES.items():
            with np.errstate(over="ignore"):
                cast = z.astype(dtype).astype(float)
            if np.isinf(cast).any():
                found[name].setdefault("overflow", layer)
            if not cast.any():
                found[name].setdefault("zero", layer)
            if np.sqrt(np.mean(z**2)) < float(ml_dtypes.finfo(dtype).smallest_normal):
                found[name].setdefault("underflow", layer)
    return found


@pytest.mark.parametrize(("sigma_w", "depth"), [(1.5, 240), (0.5, 160), (16.0, 40)])
def test_signals_leave_each_type_where_numpys_do(sigma_w, depth):
    """One network fluctuates by 1/√width a layer in log q: a layer or two of it at ×1.5."""
    network = builders.mlp([WIDTH] * (depth + 1), "linear", "lecun")
    theory = {"log_q": 2 * np.log(sigma_w) * np.arange(1, depth + 1)}
    ours, numpys = float_ranges(network, theory), first_layers(sigma_w, depth)
    for name in TYPES:
        for what in ("overflow", "underflow", "zero"):
            layer, expected = getattr(ours[name]["signals"], what), numpys[name].get(what, NOWHERE)
            assert (layer == NOWHERE) == (expected == NOWHERE), (name, what)
            if layer != NOWHERE:
                assert abs(layer - expected) <= 3, (name, what)
    assert ours["float64"]["signals"] == FloatRange(NOWHERE, NOWHERE, NOWHERE)


def test_gradients_are_asked_for_going_down_and_weights_by_their_product():
    network = builders.mlp([WIDTH] * 101, "linear", "lecun")
    up = np.log(0.5) * np.arange(100, 0, -1)  # log rms of gradients, relative to the top
    theory = {
        "log_gradient_norm": up + np.log(0.5) + np.log(WIDTH) / 2 + np.log(2) * 2,
        "log_weight_gradient_variance": np.full(100, 2 * np.log(1e-9)),
    }
    found = float_ranges(network, theory)["float16"]
    # 2^-14 is the smallest normal float16; layer 100 has 2^0, the layers below half as much each.
    assert found["gradients"].underflow == 100 - 15
    assert found["weight_gradients"].zero == 100
    assert str(found["weight_gradients"]) == "underflow first in layer 100 (all 0 in layer 100)"
    assert "signals" not in found


def test_what_a_simulation_in_float32_does_not_hold_is_unknown_of_wider_types():
    network = builders.mlp([WIDTH] * 4, "tanh", "lecun", sigma_b=1e-60)  # no scale is free
    measured = {"log_q": np.array([0.0, -80.0, -np.inf])}
    found = float_ranges(network, measured, dtype="float32")
    assert found["float16"]["signals"] == FloatRange(NOWHERE, 2, 2)
    assert found["float32"]["signals"] == FloatRange(NOWHERE, 3, 3)
    assert found["float64"]["signals"] == FloatRange(NOWHERE, UNKNOWN, UNKNOWN)
    lost = {"log_q": np.array([0.0, 80.0, np.nan])}
    over = float_ranges(network, lost, dtype="float32", overflowed=np.array([False, False, True]))
    assert over["float16"]["signals"].overflow == 2
    assert over["float32"]["signals"].overflow == 3
    assert over["float64"]["signals"].overflow == UNKNOWN


def test_sentences_name_theory_where_it_differs_and_nowhere_once():
    fine = {"float32": {"signals": FloatRange(NOWHERE, NOWHERE, NOWHERE)}}
    ends = {"float32": {"signals": FloatRange(7, NOWHERE, NOWHERE)}}
    assert sentence(fine, fine, "float32") == NOWHERE
    assert sentence(fine, ends, "float32") == "signals: overflow first in layer 7 (theory: nowhere)"


@pytest.mark.slow
def test_theory_and_simulation_answer_alike_in_results_and_files():
    network = builders.mlp([64, *[64] * 60], "linear", "unscaled")
    found = comparison.compare(network, np.ones((1, 64), np.float32), networks=30, explain=False)
    # q grows by 64 a layer, from 64: rms 8^l. 65504 is 8^5.33, and the largest unit 2.9 times more.
    assert found.float_ranges["theory"]["float16"]["signals"].overflow == 5
    for of in DTYPES:
        for name, theory in found.float_ranges["theory"][of].items():
            measured = dataclasses.astuple(found.float_ranges["simulation"][of][name])
            for one, other in zip(measured, dataclasses.astuple(theory), strict=True):
                assert one == other or abs(one - other) <= 1
    kept = json.loads(found.to_xarray().attrs["float_ranges"])
    assert kept["theory"]["float16"]["signals"]["overflow"] == 5
