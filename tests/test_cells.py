"""The law of an LSTM's cells: against what is exact, and against a population of units."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from gradflow import activations, builders, gaussian
from gradflow.activations import Activation
from gradflow.blocks import LSTM, Activate, BatchNorm, Chain, Drive, Linear
from gradflow.blocks._cells import Cells
from gradflow.errors import InputError
from gradflow.kernels import Kernel
from gradflow.theory import _limits, architectures, mean_field

# Of what is interpolated, as `cells` says, relative; for arguments of gates with K up to 25 here.
INTERPOLATED = 1e-4
# What orders of operations differ by, in float32.
ROUNDING = 1e-4
START = [[1.0, 0.5], [0.5, 0.8]]
STEPS = 6
# Of one structure, and so compiled once.
CASES = {
    "plain": LSTM(1, 1.0, 0.1, 0.0, 0.0, 0.0, Drive(0.0, 0.5)),
    "usual": LSTM(1, 1.3, 0.3, 1.0, 0.0, 0.0, Drive(0.0, 0.5)),
    "remembers": LSTM(1, 1.3, 0.3, 3.0, 0.0, 0.0, Drive(0.0, 0.5)),
    "driven": LSTM(1, 2.5, 0.3, 1.0, 0.5, -1.0, Drive(0.7, 0.5)),
    "saturated": LSTM(1, 5.0, 0.5, 2.0, 0.0, 0.0, Drive(0.0, 0.5)),
}


def with_independent_tangent(gram):
    """The state with a tangent of second moments 1 that is independent of it."""
    one = jnp.ones_like(gram.mean)
    law = Cells.of(gram)
    return dataclasses.replace(
        gram, tangent=one, distribution=law.with_memory(law.memory_of_independent(one))
    )


@jax.jit
def step(block, state):
    return block.kernel(state)


def walked(block, state=None, steps=STEPS):
    """What is known of the state before and after each step, with a tangent of 1 at the start."""
    block = jax.tree.map(jnp.asarray, block)
    states = [with_independent_tangent(Kernel.of(jnp.asarray(START)) if state is None else state)]
    for _ in range(steps):
        states.append(step(block, states[-1]))
    return states


def gate(bias):
    return Activation("gate", lambda x: activations.logistic(x + jnp.asarray(bias, x.dtype)))


@jax.jit
def exact_step(block, before):
    """E[c_a' c_b'] = E[f f] E[c c] + E[i i] E[g g], and the same of the tangent."""
    law = Cells.of(before)
    z = block.drive.kernel(block._layer.kernel(Kernel.of(law.hidden)))
    k, q = z.covariance, jnp.diagonal(z.covariance)
    f, i, g = gate(block.forget_bias), gate(block.input_bias), activations.tanh
    ff, ii, gg = (gaussian.kernel(phi, k) for phi in (f, i, g))
    df, di, dg = (gaussian.moment(phi, "dphi2", q) for phi in (f, i, g))
    cells = law.second_moments(law.cells)
    gates = df * jnp.diagonal(cells) + di * jnp.diagonal(gg) + jnp.diagonal(ii) * dg
    tangent = jnp.diagonal(ff) * jnp.sum(law.memory.cells, axis=1)
    return ff * cells + ii * gg, tangent + block.sigma_w**2 * law.memory.hidden * gates


@pytest.mark.medium
def test_second_moments_of_cells_are_exact():
    """As they are known from each step to the next; a control steps with another bias."""
    for name, block in CASES.items():
        states = walked(block)
        block = jax.tree.map(jnp.asarray, block)
        for before, after in itertools.pairwise(states):
            cells, tangent = exact_step(block, before)
            scale = jnp.sqrt(jnp.outer(jnp.diagonal(cells), jnp.diagonal(cells)))
            found = after.distribution.second_moments(after.distribution.cells)
            assert jnp.max(jnp.abs(found - cells) / scale) < INTERPOLATED, name
            moved = jnp.sum(after.distribution.memory.cells, axis=1)
            assert jnp.max(jnp.abs(moved / tangent - 1)) < INTERPOLATED, name
        other = step(
            dataclasses.replace(block, forget_bias=block.forget_bias - 0.1), before
        ).distribution
        assert jnp.max(jnp.abs(other.second_moments(other.cells) / cells - 1)) > INTERPOLATED


def test_cells_begin_gaussian():
    for scale in (0.0, 0.1, 1.0, 4.0):
        k = scale * jnp.asarray(START)
        law = Cells.of(Kernel.of(k))
        for phi in (activations.tanh, activations.linear):
            expected = gaussian.kernel(phi, k)
            found = law.second_moments(phi(law.cells))
            np.testing.assert_allclose(found, expected, INTERPOLATED, INTERPOLATED)


POPULATIONS, UNITS = 30, 40_000


def population(block, rng):
    """Log second moments, correlation and tangent of a state's units, drawn at infinite width.

    A unit's gates are Gaussian with second moments of all units' h, and independent of its past.
    """
    root = np.linalg.cholesky(START)
    c, h = rng.normal(size=(2, UNITS, 2)) @ root.T
    tangent, of_h = np.ones((UNITS, 2)), np.ones(2)
    logistic, w2 = scipy.special.expit, block.sigma_w**2
    found = []
    for _ in range(STEPS):
        k = w2 * h.T @ h / UNITS + block.sigma_b**2
        k += block.drive.sigma_u**2 * (block.drive.alike + (1 - block.drive.alike) * np.eye(2))
        z_f, z_i, z_g, z_o = rng.normal(size=(4, UNITS, 2)) @ np.linalg.cholesky(k).T
        f, i = logistic(z_f + block.forget_bias), logistic(z_i + block.input_bias)
        g, o = np.tanh(z_g), logistic(z_o + block.output_bias)
        by_gates = (c * f * (1 - f)) ** 2 + (g * i * (1 - i)) ** 2 + (i * (1 - g**2)) ** 2
        tangent = f**2 * tangent + w2 * of_h * by_gates
        c = f * c + i * g
        squashed = np.tanh(c)
        h = o * squashed
        through_cell = (o * (1 - squashed**2)) ** 2 * tangent
        of_h = np.mean(through_cell + w2 * of_h * (squashed * o * (1 - o)) ** 2, axis=0)
        both = (c.T @ c + h.T @ h) / (2 * UNITS)
        moved = (tangent.mean(axis=0) + of_h) / 2
        found.append([*np.log(np.diagonal(both)), both[0, 1], *np.log(moved)])
    return found


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "usual" else pytest.mark.slow) for n in CASES]
)
def test_law_is_that_of_a_population(name):
    """Means over populations of units that are drawn by NumPy; a control has no input bias.

    Null: their means are the theory's; 30 populations, t with 29 degrees of freedom; false alarms
    1 % of a case, over 30 numbers (Bonferroni).
    """
    block = CASES[name]
    rng = np.random.default_rng(1)
    drawn = np.array([population(block, rng) for _ in range(POPULATIONS)])
    mean, error = drawn.mean(axis=0), drawn.std(axis=0, ddof=1) / POPULATIONS**0.5
    threshold = scipy.stats.t.isf(0.005 / mean.size, POPULATIONS - 1)

    def z_scores(block):
        expected = [
            [*jnp.log(jnp.diagonal(s.covariance)), s.covariance[0, 1], *jnp.log(s.tangent)]
            for s in walked(block)[1:]
        ]
        return np.abs(mean - np.array(expected)) / error

    assert np.max(z_scores(block)) < threshold
    assert np.max(z_scores(dataclasses.replace(block, input_bias=block.input_bias - 0.05))) > 10


def predicted(*stages, start=START):
    return jax.jit(mean_field.predict)(builders.stack(4, stages), jnp.asarray(start)).values


@pytest.mark.medium
def test_gradients_are_the_transpose_of_tangents():
    """From the top to layer 1 a gradient changes as a tangent from there to the top."""
    block = CASES["usual"]
    first = walked(block, steps=1)[-1]
    growth = walked(block, first, STEPS - 1)[-1].tangent
    found = predicted((dataclasses.replace(block, units=2), STEPS))["log_gradient_variance"]
    # The top's gradient has variance 1.
    assert float(found[0]) == pytest.approx(float(jnp.log(jnp.mean(growth))), abs=ROUNDING)
    assert abs(float(found[-1])) < ROUNDING


@pytest.mark.slow
def test_stages_do_not_matter():
    """A walk is the same in one stage or in more; and through other blocks above and below."""
    block = dataclasses.replace(CASES["usual"], units=2)
    ends = Linear(4, 1.2)
    one = predicted(ends, (block, 5), ends, (Linear(4), 2))
    more = predicted((ends, 1), (block, 1), (block, 3), block, ends, Linear(4), Linear(4))
    for name, value in one.items():
        np.testing.assert_allclose(value, more[name], ROUNDING, ROUNDING, err_msg=name)
    chained = predicted(ends, (Chain((block, Chain((block,)))), 2), Chain((block, ends)))
    assert float(chained["log_q"][2]) == pytest.approx(float(one["log_q"][4]), abs=ROUNDING)


@pytest.mark.medium
def test_signals_that_vanish_are_followed():
    """Without biases, where they are small, f, i and o are constant and tanh is linear.

    At μ_f = -1, E[c²] and E[h²] then follow a linear map, until about 1e-30, which counts as
    nothing. Nothing remains nothing.
    """
    block = LSTM(2, 1.0, None, -1.0)
    q = np.asarray(predicted((block, 30))["log_q"])
    f = 1 / (1 + np.e)
    # (E c², E h²) -> f² E c² + E h²/4, and a quarter of it.
    assert np.diff(q)[-10:] == pytest.approx(np.log(f**2 + 1 / 16), abs=1e-4)
    assert q[-1] < -50
    nothing = predicted((block, 4), start=np.zeros((2, 2)))
    assert (np.asarray(nothing["log_q"]) < -60).all()
    assert np.isfinite(nothing["log_gradient_norm"]).all()


@pytest.mark.slow
def test_chi_of_a_settled_state_is_found():
    block = dataclasses.replace(CASES["usual"], units=2)
    network = builders.stack(4, [Linear(4), (block, 60)])
    chi = jax.jit(mean_field.predict)(network, jnp.asarray([[1.0]]))["chi"]
    found = jax.jit(functools.partial(_limits.asymptotic_log_chi, beyond=300))(
        network, jnp.asarray(1.0)
    )
    assert float(found) == pytest.approx(float(jnp.log(chi[40])), abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: builders.stack(4, [LSTM(4)]),
            "an LSTM of 4 units gets 4; its state",
        ),
        (
            lambda: predicted(Linear(4), Activate(), LSTM(2)),
            "an LSTM gets a signal that is neither Gaussian over units nor an LSTM's state",
        ),
        (
            lambda: predicted(Linear(4), Chain((BatchNorm(), Linear(4))), LSTM(2), start=np.eye(4)),
            "an LSTM is in a network with a block that mixes inputs' gradients",
        ),
        (lambda: predicted(LSTM(2), Activate()), "acts on a signal that is not Gaussian"),
        (lambda: architectures.walk(LSTM(2), 1.0, 3), "block hands on an LSTM's state"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_has_no_theory_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()
