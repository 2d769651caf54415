"""Inputs: real images, standardised, of any width."""

import numpy as np
import pytest

from gradflow import data
from gradflow.errors import InputError


def test_digits_are_standardised_by_pixel():
    images = data.digits()
    assert images.shape == (1797, 64)
    constant = images.std(axis=0) == 0
    np.testing.assert_allclose(images.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(images[:, ~constant].std(axis=0), 1, rtol=1e-5)
    assert constant.sum() == 3  # corners that no digit reaches


@pytest.mark.parametrize("width", [10, 64, 100, 784, 1024])
def test_resized_inputs_keep_their_mean_squares(width):
    images = data.digits()[:5]
    found = data.resized(images, width)
    assert found.shape == (5, width)
    np.testing.assert_allclose((found**2).mean(axis=1), (images**2).mean(axis=1), rtol=1e-5)


def test_resizing_to_the_same_width_changes_nothing():
    np.testing.assert_allclose(data.resized(data.digits()[:3], 64), data.digits()[:3], rtol=1e-6)


def test_magnified_inputs_keep_their_products():
    images = data.digits()[:4]
    gram, wide = (v @ v.T / v.shape[1] for v in (images, data.resized(images, 640)))
    np.testing.assert_allclose(wide, gram, rtol=1e-4, atol=1e-5)


def test_bad_widths_are_refused():
    with pytest.raises(InputError, match="width is 0"):
        data.resized(data.digits()[:2], 0)
    with pytest.raises(InputError, match="nothing but zeros"):
        data.resized(data.digits()[:2], 1)  # the first pixel is always blank
