"""The note's claims: the numbers that theory knows to many digits."""

import numpy as np
import pytest

from gradflow import activations
from gradflow.errors import InputError
from gradflow.studies import note


def test_unscaled_logistic_networks_are_critical_at_width_103():
    # PITFALLS of quadrature: Gauss-Hermite with 64 nodes sees no critical width at all.
    assert note.critical_width(activations.logistic) == pytest.approx(103.0076, abs=1e-4)


def test_the_logistics_mean_moves_the_critical_variance_from_16_to_103():
    assert note.critical_sigma_w2_of_centred_logistic() == pytest.approx(16)


# As the table prints them, so that half a unit of the last digit is the tolerance.
@pytest.mark.parametrize(
    ("name", "width", "chi"),
    [("logistic", 100, "0.986"), ("logistic", 300, "1.68"), ("logistic", 1000, "3.02")]
    + [("tanh", 100, "5.5"), ("tanh", 300, "9.4"), ("tanh", 1000, "17")],
)
def test_chi_of_unscaled_networks_is_that_of_the_notes_table(name, width, chi):
    found = note._chi_at_fixed_point(activations.get(name), np.array([float(width)]))
    digits = len(chi.partition(".")[2])
    assert found[0] == pytest.approx(float(chi), abs=0.5 * 10**-digits)


def test_bad_input_is_refused_before_anything_runs():
    with pytest.raises(InputError, match="depth is 2; it is a whole number of at least 3"):
        note.run(depth=2)
    with pytest.raises(InputError, match="networks_uniform is 1"):
        note.run(networks_uniform=1)
