"""Laws of the leaves of parameters: what theory takes for weights."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import Program, read
from gradflow.inspection._theory.initialisers import law_of
from gradflow.inspection._theory.values import Law

__all__ = ["NETWORKS", "laws", "of_draws"]

# Networks that a law is measured from, and draws of a leaf that has many entries.
NETWORKS, _ENTRIES = 8, 1 << 16
# A mean within so many of its standard errors is taken as 0.
_SIGMAS = 5.0


def laws(
    model: Model,
    program: Program,
    key: PRNGKeyArray,
    *,
    draw: Callable[[PRNGKeyArray], tuple[PyTree, PyTree]] | None = None,
) -> dict[int, Law]:
    """The law of each leaf of the parameters, by its number in the program.

    From the program of ``init`` where it tells the law, else from networks drawn by ``draw``
    (``model.draw`` without it); of a model with given weights alone from these. What is equal in
    all draws is known; a leaf of given weights is if all its entries are equal.
    """
    numbers = program.arguments["parameters"]
    if model.init is None:
        assert model.given is not None
        leaves = [np.asarray(leaf)[None] for leaf in jax.tree.leaves(model.given[0])]
        return dict(zip(numbers, map(of_draws, leaves), strict=True))
    found: list[Law | None] = [None] * len(numbers)
    if model.traceable:
        drawing = read(model.init, key=jax.random.key(0))
        found = [law_of(drawing, leaf) for leaf in drawing.outputs[: len(numbers)]]
    if None in found:
        drawn = (draw or model.draw)(jax.random.split(key, NETWORKS))[0]
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(drawn)]
        found = [law or of_draws(leaf) for law, leaf in zip(found, leaves, strict=True)]
    return {n: law for n, law in zip(numbers, found, strict=True) if law is not None}


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
