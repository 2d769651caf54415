"""Laws of the leaves of parameters: what theory takes for weights."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import Program

__all__ = ["NETWORKS", "Law", "laws", "of_draws"]

# Networks that a law is measured from, and draws of a leaf that has many entries.
NETWORKS, _ENTRIES = 8, 1 << 16
# A mean within so many of its standard errors is taken as 0.
_SIGMAS = 5.0


@dataclasses.dataclass(frozen=True)
class Law:
    """The law of a leaf's entries, which are independent.

    Attributes
    ----------
    mean, variance
        Of an entry.
    standard_error
        Of ``variance``; 0 where it is exact.
    gaussian
        Whether entries are known to be Gaussian.
    values
        The leaf itself where it is the same in all networks; else None.
    """

    mean: float
    variance: float
    standard_error: float = 0.0
    gaussian: bool = False
    values: np.ndarray | None = None


def laws(
    model: Model, program: Program, key: PRNGKeyArray, *, networks: int = NETWORKS
) -> dict[int, Law]:
    """The law of each leaf of the parameters, by its number in the program.

    From networks drawn by ``init``; of a model with given weights alone from these. What is equal
    in all draws is known; a leaf of given weights is if all its entries are equal.
    """
    if model.init is None:
        assert model.given is not None
        leaves = [np.asarray(leaf)[None] for leaf in jax.tree.leaves(model.given[0])]
    else:
        drawn = model.draw(jax.random.split(key, networks))[0]
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(drawn)]
    return {
        number: of_draws(leaf)
        for number, leaf in zip(program.arguments["parameters"], leaves, strict=True)
    }


def of_draws(draws: np.ndarray | Sequence[np.ndarray]) -> Law:
    """The law of a leaf that was drawn several times, or once; the first axis is that of draws."""
    x = np.asarray(draws)
    alike = (x == x[:1]).all() if len(x) > 1 else x.size == 0 or (x == x.flat[0]).all()
    if alike or not np.issubdtype(x.dtype, np.floating):
        return Law(0.0, 0.0, values=np.asarray(x[0], np.float64))
    each = max(1, _ENTRIES // len(x))
    step = -(-x[0].size // each)
    x = x.reshape(len(x), -1)[:, ::step].astype(np.float64)
    mean, count = float(x.mean()), x.size
    deviation = float(x.std())
    if abs(mean) < _SIGMAS * deviation / count**0.5:
        mean = 0.0
    square = (x - mean) ** 2
    variance = float(square.mean())
    return Law(mean, variance, float(square.std() / count**0.5))
