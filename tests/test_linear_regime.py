"""Glorot & Bengio's linear regime against exact rationals (reference table 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import ensembles
from gradflow.errors import InputError
from gradflow.theory import linear_regime

# The table's names for ensembles; 'he_linear' is He's variance on a linear network.
NAMES = {"standard": "standard", "normalized": "normalized", "lecun": "lecun", "he_linear": "he"}
# float64 rounding of products of up to ten factors.
EXACT = 1e-13


def rows(load_reference):
    return [r for r in load_reference("t7_glorot") if "init" in r["inputs"]]


def numbers(values):
    return np.array([float(v) for v in values])


def test_variances_are_those_of_table_7(load_reference, x64_only):
    del x64_only
    checked = 0
    for row in rows(load_reference):
        widths, name = row["inputs"]["widths"], NAMES[row["inputs"]["init"]]
        found, truth = linear_regime.predict(widths, name), row["values"]
        ensemble = ensembles.get(name)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        for value, expected in (
            (linear_regime.weight_variances(widths, name), truth["var_W"]),
            ([ensemble.half_width(*p) for p in pairs], truth["uniform_halfwidth"]),
            (found["q"], truth["forward_var_ratio_z1_to_zL"]),
            (found["gradient_variance"], truth["backward_var_ratio_dz1_to_dzL"]),
            (found["weight_gradient_variance"], truth["weight_grad_var_ratio_W1_to_WL"]),
        ):
            np.testing.assert_allclose(value, numbers(expected), rtol=EXACT)
            checked += 1
    assert checked == 60


def test_normalized_is_the_compromise_between_forward_and_backward():
    """Eqs. 10-12: 2/(m+n) is the harmonic mean of 1/m and 1/n, what each direction asks for."""
    m, n = 300, 100
    assert ensembles.normalized.variance(m, n) == pytest.approx(2 / (m + n))
    assert 1 / m < ensembles.normalized.variance(m, n) < 1 / n


def test_equal_widths_give_every_layer_the_same_weight_gradient():
    """Eq. 14: whatever the variance, while the states' gradients vanish."""
    found = linear_regime.predict([50] * 9, "standard")
    spread = np.ptp(np.asarray(found.values["log_weight_gradient_variance"])[:-1])
    assert spread < 1e-5
    assert found["gradient_variance"][0] < 1e-3


def test_slope_scales_both_directions():
    widths = [10, 20, 30]
    variance = linear_regime.weight_variances(widths, "lecun")
    half = linear_regime.variances(widths, jnp.asarray(variance), slope=0.5)
    one = linear_regime.variances(widths, jnp.asarray(variance))
    np.testing.assert_allclose(half["q"] / one["q"], [1, 0.25], rtol=1e-6)
    np.testing.assert_allclose(
        half["gradient_variance"] / one["gradient_variance"], [0.25, 1], rtol=1e-6
    )


def test_variances_jit_and_differentiate():
    widths = (4, 4, 4)

    def top(variance):
        return linear_regime.variances(widths, variance).values["log_q"][-1]

    gradient = jax.jit(jax.grad(top))(jnp.full(2, 0.5))
    np.testing.assert_allclose(gradient, [2, 2], rtol=1e-6)  # d log Π v / dv = 1/v


def test_a_wrong_number_of_variances_is_refused():
    with pytest.raises(InputError, match=r"weight_variance has shape \(3,\)"):
        linear_regime.variances([4, 4, 4], jnp.ones(3))
    with pytest.raises(InputError, match="width is 0"):
        linear_regime.predict([4, 0], "glorot")
