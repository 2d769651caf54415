"""What a program makes of the scores of attention's heads, and averages where that is a softmax."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.blocks import _exact_heads, _heads
from gradflow.blocks._heads import Moments
from gradflow.inspection._theory.recorded import UNITS, Step
from gradflow.inspection._theory.values import Recorded

__all__ = ["Lengths", "Softmax", "Weighing", "covariance_of", "pulled", "softmax_of"]

# What two ways to compute the same weights may differ by.
_SAME = 1e-6


class Lengths(NamedTuple):
    """How many inputs there are, and of each the tokens that ask and those that are asked."""

    inputs: int
    queries: int
    keys: int


class Weighing:
    """What the program makes of scores: equal ones are compiled once.

    A function of the scores of one network, (heads, inputs, tokens that ask, tokens that are
    asked), to weights of this shape.
    """

    def __init__(
        self,
        weights: Recorded,
        leaf: Step,
        scores: tuple[tuple[int, ...], Any],
        layout: Any,
        heads: int,
        lengths: Lengths,
    ) -> None:
        self.step, self.leaf, self.heads, self.lengths = weights.step, leaf, heads, lengths
        self.shape, atoms = scores
        self.before = _order(atoms, layout)
        self.after = [atom for own in weights.axes for atom in own]
        self.back = _order(self.after, layout)
        self.before_lengths = [atoms[i][1] for i in self.before]
        key = self.step.key({leaf: 0}), self.shape, tuple(self.before), tuple(self.back), lengths
        self.key = (*key, tuple(self.after))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weighing) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __call__(self, scores: Any) -> Any:
        """The weights of scores."""
        array = scores.reshape(self.before_lengths)
        array = jnp.transpose(array, np.argsort(self.before).tolist()).reshape(self.shape)
        return self.arranged(self.step.evaluate({self.leaf: array}))

    def arranged(self, weights: Any) -> Any:
        """Weights as the program has them, by heads, inputs and tokens."""
        array = weights.reshape([n for _, n in self.after])
        return jnp.transpose(array, self.back).reshape(self.heads, *self.lengths)


def _order(atoms: Sequence[tuple[Any, int]], layout: Any) -> list[int]:
    """The places of atoms in the order heads, then as in the layout."""
    units = [i for i, (label, _) in enumerate(atoms) if label == UNITS]
    return [*units, *(list(atoms).index(atom) for atom in layout)]


class Softmax(NamedTuple):
    """Weights that are softmax(slope · score + offset) over tokens.

    Attributes
    ----------
    slopes
        Of each input and token that asks, (sites,): 0 where its scores change nothing.
    offsets
        (heads, inputs, tokens that ask, tokens that are asked), -inf where nothing is seen; of
        fewer heads or inputs, one of each, where these are alike.
    """

    slopes: np.ndarray
    offsets: np.ndarray


def softmax_of(weigh: Weighing, size: float) -> Softmax | None:
    """Weights as a softmax of scores of about this size; None where they are none."""
    rng = np.random.default_rng(0)
    draws = size * rng.standard_normal((2, weigh.heads, *weigh.lengths))
    with jax.enable_x64(True), np.errstate(divide="ignore", invalid="ignore"):
        start, *weights = (
            np.asarray(_weights(s, weigh)) for s in (np.zeros_like(draws[0]), *draws)
        )
        if not (start >= 0).all() or np.abs(start.sum(-1) - 1).max() > _SAME:
            return None
        offsets = np.log(start)
        slopes = _slopes(draws[0], np.log(weights[0]) - offsets)
        if slopes is None:
            return None
        for scores, found in zip(draws, weights, strict=True):
            expected = np.exp(slopes[..., None] * scores + offsets)
            expected /= expected.sum(-1, keepdims=True)
            if not np.abs(found - expected).max() < _SAME:
                return None
    for axis in (0, 1):
        first = np.take(offsets, [0], axis)
        if np.array_equal(offsets, np.broadcast_to(first, offsets.shape)):
            offsets = first
    return Softmax(slopes.reshape(-1), offsets)


def _slopes(scores: np.ndarray, logs: np.ndarray) -> np.ndarray | None:
    """By how much logarithms of weights rise with scores, (inputs, tokens), alike in all heads."""
    seen = np.isfinite(logs)
    count = np.maximum(seen.sum(-1, keepdims=True), 1)
    x, y = (np.where(seen, a, 0) for a in (scores, logs))
    x, y = (np.where(seen, a - a.sum(-1, keepdims=True) / count, 0) for a in (x, y))
    square = (x**2).sum(-1)
    alone = count[..., 0] < 2
    slopes = np.where(alone, 0, (x * y).sum(-1) / np.where(alone, 1, square))
    if np.ptp(slopes, axis=0).max() > _SAME * np.abs(slopes).max():
        return None
    return slopes[0]


@functools.partial(jax.jit, static_argnums=1)
def _weights(scores: Any, weigh: Weighing) -> Any:
    return weigh(scores)


# Averages ----------------------------------------------------------------------------------------


def covariance_of(moments: Any, softmax: Softmax, lengths: Lengths) -> np.ndarray:
    """E[A V Aᵀ] by input and token that asks, of tokens that are asked."""
    square, asking = _square(lengths)
    with jax.enable_x64(True):
        padded = _padded(moments, square, lengths)
        offsets = _padded_offsets(softmax.offsets, lengths)
        made = np.asarray(_covariance(padded, offsets))
    return made[np.ix_(asking, asking)]


def pulled(gradient: np.ndarray, moments: Any, softmax: Softmax, lengths: Lengths) -> Any:
    """The transpose of a tangent's map: gradients' second moments, from those at the outputs."""
    square, asking = _square(lengths)
    with jax.enable_x64(True):
        padded = _padded(moments, square, lengths)
        whole = np.zeros((len(padded.queries),) * 2)
        whole[np.ix_(asking, asking)] = gradient
        below = _pulled(whole, padded, _padded_offsets(softmax.offsets, lengths))
    asked = _places_of(lengths.inputs, lengths.keys, square)
    places = (asking, asked, asked)
    return Moments(*(np.asarray(x)[np.ix_(p, p)] for x, p in zip(below, places, strict=True)))


def _square(lengths: Lengths) -> tuple[int, np.ndarray]:
    """As many tokens as there are on either side, and the places of those that ask."""
    square = max(lengths.queries, lengths.keys)
    return square, _places_of(lengths.inputs, lengths.queries, square)


def _places_of(inputs: int, tokens: int, square: int) -> np.ndarray:
    return (np.arange(inputs)[:, None] * square + np.arange(tokens)).reshape(-1)


def _padded(moments: Any, square: int, lengths: Lengths) -> Any:
    """Second moments with tokens of 0 behind those of each input, to so many."""
    out = []
    for k, tokens in zip(moments, (lengths.queries, lengths.keys, lengths.keys), strict=True):
        whole = np.zeros((lengths.inputs * square,) * 2)
        places = _places_of(lengths.inputs, tokens, square)
        whole[np.ix_(places, places)] = k
        out.append(whole)
    return Moments(*map(jnp.asarray, out))


def _padded_offsets(offsets: np.ndarray, lengths: Lengths) -> np.ndarray:
    square = max(lengths.queries, lengths.keys)
    out = np.full((*offsets.shape[:2], square, square), -np.inf)
    out[..., : lengths.queries, : lengths.keys] = offsets
    out[..., lengths.queries :, : lengths.keys] = 0.0
    return out


def _averages(moments: Moments, tangents: Moments | None, offsets: Any, exact: Any) -> Any:
    """The averages: integrals of two tokens, and of tokens alike; else over fixed heads."""
    if exact == "alike":
        return _exact_heads.of_tokens_alike(moments, tangents, offsets.shape[-1])
    if exact:
        return _exact_heads.of_two_tokens(moments, tangents, np.array(exact))
    return _heads.average(moments, tangents, offsets)


def _exact(moments: Moments, offsets: np.ndarray) -> Any:
    """Of two tokens which see which; ``"alike"`` of more that are; None without an integral."""
    if offsets.shape[:2] != (1, 1):
        return None
    seen = np.isfinite(offsets[0, 0])
    plain = [np.ptp(row[mask]) < _SAME for row, mask in zip(offsets[0, 0], seen, strict=True)]
    tokens = len(seen)
    if not all(plain) or tokens < 2:
        return None
    if tokens == 2:
        return tuple(tuple(bool(x) for x in row) for row in seen)
    return "alike" if seen.all() and bool(_exact_heads.are_alike(moments, tokens)) else None


def _covariance(moments: Moments, offsets: np.ndarray) -> Any:
    return _covariance_program(moments, offsets, _exact(moments, offsets))


def _pulled(gradient: np.ndarray, moments: Moments, offsets: np.ndarray) -> Any:
    return _pulled_program(gradient, moments, offsets, _exact(moments, offsets))


@functools.partial(jax.jit, static_argnums=2)
def _covariance_program(moments: Moments, offsets: Any, exact: Any) -> Any:
    return _averages(moments, None, offsets, exact).covariance


@functools.partial(jax.jit, static_argnums=3)
def _pulled_program(gradient: Any, moments: Moments, offsets: Any, exact: Any) -> Any:
    def tangent(tangents: Moments) -> Any:
        return _averages(moments, tangents, offsets, exact).tangent

    _, pull = jax.vjp(tangent, jax.tree.map(jnp.zeros_like, moments))
    return jax.tree.map(lambda x: (x + x.T) / 2, pull(gradient)[0])
