"""Averages over heads of a program's own key width, by queries and keys that are drawn.

The stretch of the program from queries and keys to the weights of attention is run on draws, and
its transpose on draws of the weights' gradient, G_ab = Σ_u δ_au v_bu over the units of a head,
which has the second moments width · Λ ⊗ V. So turned queries (rotary positions), capped scores and
weights that are no softmax have theory too, to the accuracy of so many heads.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.blocks import _heads
from gradflow.inspection._reading.program import Equation
from gradflow.inspection._theory import forcing
from gradflow.inspection._theory.heads import Lengths
from gradflow.inspection._theory.recorded import Step, in_float64
from gradflow.inspection._theory.sums import NoRule, Sum, independent
from gradflow.inspection._theory.values import Recorded, Signal

__all__ = ["Drawn"]

# Numbers in the scores of draws that are run at once, and the least number of heads.
_CHUNK, _HEADS = 1 << 19, 2048
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class _Law(NamedTuple):
    """Of a random array the root of its second moments over sites, and its means."""

    root: Any
    mean: Any


class _Form(NamedTuple):
    """Of a random array its shape, and which of its axes are units."""

    shape: tuple[int, ...]
    units: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Its axes, units first."""
        return (*self.units, *(i for i in range(len(self.shape)) if i not in self.units))

    @property
    def width(self) -> int:
        """The number of units."""
        return math.prod(self.shape[i] for i in self.units)

    def from_rows(self, rows: Any) -> Any:
        """The array of (units, sites)."""
        lengths = [self.shape[i] for i in self.order]
        return jnp.transpose(rows.reshape(lengths), np.argsort(self.order).tolist())

    def rows(self, array: Any) -> Any:
        """(units, sites) of the array."""
        return jnp.transpose(array, self.order).reshape(self.width, -1)


class _Run:
    """The program from queries and keys to weights by head, input and token; hashable."""

    def __init__(self, equation: Equation, operands: Sequence[Recorded], weigh: Any) -> None:
        self.equation, self.operands, self.weigh = equation, operands, weigh
        self.leaves = [step for operand in operands for step in operand.sources]
        signals: list[Signal] = [s for o in operands for s in o.sources.values()]
        self.forms = tuple(_Form(s.shape, s.units) for s in signals)
        names: dict[Step, int] = {leaf: n for n, leaf in enumerate(self.leaves)}
        self.key = (
            equation.signature, *(operand.step.key(names) for operand in operands),
            weigh.key, self.forms,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Run) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __call__(self, *arrays: Any) -> Any:
        """The weights, (heads, inputs, tokens that ask, tokens that are asked)."""
        drawn = dict(zip(self.leaves, arrays, strict=True))
        operands = [operand.step.evaluate(drawn) for operand in self.operands]
        (scores,) = in_float64(self.equation, *operands)
        return self.weigh.arranged(self.weigh.step.evaluate({self.weigh.leaf: scores}))


class Drawn:
    """Averages over heads whose queries and keys are drawn.

    Parameters
    ----------
    equation, operands
        The product that scores are, and its two operands.
    asking
        Which of the two are queries.
    weigh
        What makes weights of scores.
    second_values
        Second moments of values by input and token.
    width
        How many units of the outputs a head has.

    Raises
    ------
    NoRule
        If queries or keys are not Gaussian, or not independent of each other.
    """

    def __init__(
        self,
        equation: Equation,
        operands: Sequence[Recorded],
        asking: int,
        weigh: Any,
        second_values: np.ndarray,
        width: float,
    ) -> None:
        self.signals: list[Signal] = [s for o in operands for s in o.sources.values()]
        if not all(signal.sum.gaussian for signal in self.signals):
            raise NoRule("queries or keys that are not Gaussian over units")
        for one, other in itertools.combinations(self.signals, 2):
            if not independent(one.sum.fields, other.sum.fields):
                raise NoRule("parts of queries or keys that are not independent")
        self.run = _Run(equation, operands, weigh)
        sides = [side for side, o in enumerate(operands) for _ in o.sources]
        self.signs = tuple(-1.0 if side == asking else 1.0 for side in sides)
        self.values, self.width = second_values, width
        with jax.enable_x64(True):
            self.laws = [
                _Law(_root(forcing.covariance(s.sum, s.sum)), forcing.mean(s.sum))
                for s in self.signals
            ]

    def covariance(self) -> np.ndarray:
        """E[A V Aᵀ]."""
        with jax.enable_x64(True):
            lengths = self.run.weigh.lengths
            made = _covariance(self.laws, self.values, self.run, self.signs, lengths)
        return np.asarray(made)

    def down(self, gradient: np.ndarray) -> tuple[list[tuple[Sum, np.ndarray]], np.ndarray]:
        """Second moments of gradients at queries and keys, and by the places of values."""
        with jax.enable_x64(True):
            roots = _root(self.width * gradient), _root(self.values)
            lengths = self.run.weigh.lengths
            below, of_values = _pulled(
                self.laws, gradient, roots, self.run, self.signs, lengths
            )  # fmt: skip
        sums = [signal.sum for signal in self.signals]
        return list(zip(sums, map(np.asarray, below), strict=True)), np.asarray(of_values)


@jax.jit
def _root(covariance: Any) -> Any:
    return _heads.root(jnp.asarray(covariance))


def _plan(run: _Run, lengths: Lengths) -> tuple[int, int]:
    """How many networks' heads are run at once, and how often."""
    heads = run.weigh.heads
    scores = heads * lengths.inputs * lengths.queries * lengths.inputs * lengths.keys
    half = max(1, _CHUNK // scores // 2)
    return half, -(-_HEADS // (2 * half * heads))


def _drawn(key: Any, laws: Sequence[_Law], run: _Run, half: int) -> list[Any]:
    """Random arrays of networks, (half, units, sites) each."""
    keys = jax.random.split(key, len(laws))
    return [
        jax.random.normal(k, (half, form.width, len(law.mean)), jnp.float32) @ law.root.T
        for k, law, form in zip(keys, laws, run.forms, strict=True)
    ]


def _both_signs(rows: Sequence[Any], laws: Sequence[_Law], run: _Run, signs: Any) -> list[Any]:
    """The arrays of networks, and of these whose queries have a minus."""
    mirrored = (jnp.concatenate([x, s * x]) for x, s in zip(rows, signs, strict=True))
    return [
        jax.vmap(form.from_rows)(x + law.mean[None, None])
        for x, form, law in zip(mirrored, run.forms, laws, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _covariance(
    laws: Sequence[_Law], values: Any, run: _Run, signs: tuple[float, ...], lengths: Lengths
) -> Any:
    half, times = _plan(run, lengths)
    by_input = values.reshape(lengths.inputs, lengths.keys, lengths.inputs, lengths.keys)
    sites = lengths.inputs * lengths.queries

    def add(total: Any, number: Any) -> tuple[Any, None]:
        rows = _drawn(jax.random.fold_in(jax.random.key(0), number), laws, run, half)
        a = jax.vmap(run)(*_both_signs(rows, laws, run, signs))
        a = a.reshape(-1, *lengths)
        mixed = _einsum("hiab,ibjd->hiajd", a, by_input)
        out = _einsum("hiajd,hjcd->iajc", mixed, a)
        return total + out.reshape(sites, sites), None

    total, _ = jax.lax.scan(add, jnp.zeros((sites, sites)), jnp.arange(times))
    return (total + total.T) / (4 * half * run.weigh.heads * times)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _pulled(
    laws: Sequence[_Law],
    gradient: Any,
    roots: tuple[Any, Any],
    run: _Run,
    signs: tuple[float, ...],
    lengths: Lengths,
) -> tuple[list[Any], Any]:
    half, times = _plan(run, lengths)
    inputs, asking, asked = lengths
    at_outputs = gradient.reshape(inputs, asking, inputs, asking)
    left = roots[0].reshape(inputs, asking, -1)
    right = roots[1].reshape(inputs, asked, -1)

    def pulled(key: Any, *arrays: Any) -> Any:
        """Of one network the weights, and the second moments of gradients at its arrays."""
        a, pull = jax.vjp(run, *arrays)
        shape = (run.weigh.heads, inputs * asking, inputs * asked)
        draws = jax.random.normal(key, shape, jnp.float32)
        cotangent = _einsum("iax,hxy,iby->hiab", left, draws, right)
        rows = [form.rows(g) for form, g in zip(run.forms, pull(cotangent), strict=True)]
        return a, [_einsum("us,ut->st", x, x) / len(x) for x in rows]

    def add(total: Any, number: Any) -> tuple[Any, None]:
        of_arrays, of_gradients = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
        arrays = _both_signs(_drawn(of_arrays, laws, run, half), laws, run, signs)
        a, below = jax.vmap(pulled)(jax.random.split(of_gradients, 2 * half), *arrays)
        a = a.reshape(-1, *lengths)
        moved = _einsum("hiab,iajc->hibjc", a, at_outputs)
        out = _einsum("hibjc,hjcd->ibjd", moved, a).reshape(inputs * asked, inputs * asked)
        below = [x.sum(0) for x in below]
        return jax.tree.map(jnp.add, total, (below, out)), None

    start = [jnp.zeros_like(law.root) for law in laws], jnp.zeros((inputs * asked,) * 2)
    (below, values), _ = jax.lax.scan(add, start, jnp.arange(times))
    networks = 2 * half * times
    return [x / networks for x in below], values / (networks * run.weigh.heads)
