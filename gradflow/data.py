"""Real inputs, standardised: what is sent through the random networks."""

import functools

import numpy as np

from gradflow.errors import InputError, check_count

__all__ = ["digits", "resized", "standardised"]


def standardised(values: np.ndarray) -> np.ndarray:
    """Return each column of (samples, features) with mean 0 and variance 1; constant ones are 0."""
    spread = values.std(axis=0)
    return np.where(spread > 0, (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1), 0)


@functools.cache
def digits() -> np.ndarray:
    """Return scikit-learn's bundled handwritten digits, standardised by pixel.

    Returns
    -------
    numpy.ndarray
        Shape (1797, 64), float32, read-only; the first ten show 0 to 9. Source: E. Alpaydin and
        C. Kaynak, 'Optical Recognition of Handwritten Digits', UCI repository, 1998.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  (slow to import, seldom needed)

    images = standardised(load_digits().data).astype(np.float32)
    images.setflags(write=False)
    return images


def resized(inputs: np.ndarray, width: int) -> np.ndarray:
    """Return inputs with ``width`` components: each repeated, or some left out, evenly.

    The mean square of each input stays what it was, which with the inputs' products is all that
    matters at infinite width; so networks of any input width can be fed with the same images.

    Raises
    ------
    InputError
        If ``width`` is not a whole number of at least 1, or leaves an input nothing but zeros.
    """
    width = check_count("width", width)
    found = inputs[:, np.arange(width) * inputs.shape[1] // width]
    length, wanted = ((v**2).mean(axis=1, keepdims=True) for v in (found, inputs))
    if not (length > 0).all():
        raise InputError(f"width is {width}; of these inputs it leaves nothing but zeros")
    return (found * np.sqrt(wanted / length)).astype(inputs.dtype)
