"""Gradients at the last signals of a program, where behind them units meet: a softmax, a loss.

Nothing random is behind these signals but themselves, and they have so many units as the program
has; so they are drawn, and the program's own derivative is taken of each draw.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.inspection._reading.program import Equation, Program
from gradflow.inspection._theory.sampling import Covariance, fields_drawn, of_draws
from gradflow.inspection._theory.sums import NoRule, Sum
from gradflow.inspection._theory.values import Known, Signal, Value

__all__ = ["gradients"]

# Draws of all signals together, their elements at most, and the fewest that are an answer.
_MOST, _ELEMENTS, _FEWEST = 1 << 11, 1 << 22, 1 << 6


def gradients(
    program: Program, values: Mapping[int, Value], output: int, covariance: Covariance
) -> list[tuple[Sum, np.ndarray]]:
    """The signals that an output is a function of, and second moments of its gradient by each.

    Parameters
    ----------
    program, values
        The program, and the abstract value of each of its numbers.
    output
        One of its outputs, with a random cotangent, N(0, 1) in each element; of one number it is as
        if it were 1.
    covariance
        Of two fields, None where they are independent.

    Raises
    ------
    NoRule
        If weights or random numbers are behind the signals, or signals are not independent.
    """
    ends, steps = _behind(program, values, output)
    signals = [values[i] for i in ends]
    assert all(isinstance(s, Signal) for s in signals)
    taken: set[Any] = set()
    for s in signals:
        assert isinstance(s, Signal)
        if not taken.isdisjoint(s.sum.fields):
            raise NoRule("several functions of one signal")
        taken |= s.sum.fields
    sizes = [int(np.prod(program.avals[i].shape)) for i in (*ends, output)]
    count = min(_MOST, _ELEMENTS // max(sizes))
    if count < _FEWEST:
        raise NoRule("signals of too many elements to draw")
    drawn = [_arrays(s, count, covariance) for s in signals if isinstance(s, Signal)]
    shape = program.avals[output].shape
    cotangents = np.random.default_rng(2).standard_normal((count, *shape))
    known = {i: v.value for i, v in values.items() if isinstance(v, Known)}

    def of(arrays: Sequence[Any]) -> Any:
        env = {**known, **dict(zip(ends, arrays, strict=True))}
        for equation in steps:
            out = equation.evaluate(*(_as(program, i, env[i]) for i in equation.inputs))
            env.update(zip(equation.outputs, out, strict=True))
        return _as(program, output, env[output])

    def pull(arrays: Sequence[Any], cotangent: Any) -> Any:
        out, back = jax.vjp(of, [_as(program, i, x) for i, x in zip(ends, arrays, strict=True)])
        return back(cotangent.astype(out.dtype) if shape else jnp.ones((), out.dtype))[0]

    pulled = jax.jit(jax.vmap(pull))(drawn, cotangents)
    return [
        (s.sum, _second_moments(s, np.asarray(x, np.float64)))
        for s, x in zip(signals, pulled, strict=True)
        if isinstance(s, Signal)
    ]


def _behind(
    program: Program, values: Mapping[int, Value], output: int
) -> tuple[list[int], list[Equation]]:
    """The last signals before an output, and the equations from these to it."""
    producers = program.producers()
    # A mean over units is known to theory, and of signals all the same.
    random = program.depends_on([i for i, v in values.items() if not isinstance(v, Known)])
    ends: list[int] = []
    places: set[int] = set()
    pending, seen = [output], set()
    while pending:
        number = pending.pop()
        value = values[number]
        if number in seen:
            continue
        seen.add(number)
        if isinstance(value, Signal):
            ends.append(number)
        elif number in producers and number in random:
            places.add(producers[number])
            pending += program.equations[producers[number]].inputs
        elif not isinstance(value, Known):
            raise NoRule("weights or random numbers behind the last signals")
    if not ends:
        raise NoRule("no signal before an output")
    return ends, [program.equations[i] for i in sorted(places)]


def _as(program: Program, number: int, value: Any) -> Any:
    """A value in the program's own type."""
    dtype = program.avals[number].dtype
    return value if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.asarray(value, dtype)


def _arrays(signal: Signal, count: int, covariance: Covariance) -> np.ndarray:
    """Draws of a signal with all its units, (count, *its shape)."""
    draws = fields_drawn(signal.sum, covariance, count * signal.width)
    flat = of_draws(signal.sum, draws).reshape(*signal.site_shape, count, -1)
    flat = np.moveaxis(flat, -2, 0)
    shape = [signal.shape[i] for i in signal.units]
    moved = flat.reshape(count, *signal.site_shape, *shape)
    return np.moveaxis(moved, range(-len(shape), 0), [i + 1 for i in signal.units])


def _second_moments(signal: Signal, gradient: np.ndarray) -> np.ndarray:
    """Over all units of all draws, (sites, sites)."""
    moved = np.moveaxis(gradient, [i + 1 for i in signal.units], range(-len(signal.units), 0))
    rows: Any = moved.reshape(len(gradient), signal.sum.sites, -1)
    rows = np.moveaxis(rows, 1, 0).reshape(signal.sum.sites, -1)
    return np.asarray(rows @ rows.T / rows.shape[1])
