"""Carried means: gradients that a mean over units takes over, against simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import builders, comparison, networks
from gradflow.activations import Activation, relu, softplus, tanh
from gradflow.blocks import GRU, Activate, Chain, Dense, Linear, Residual
from gradflow.comparison import Status
from gradflow.errors import InputError
from gradflow.simulation import monte_carlo
from gradflow.theory import float64, mean_field
from gradflow.theory.finite_width import _carried_means

DEPTH = 30
X = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
negative = Activation("negative", lambda x: -jax.nn.relu(x), (0.0,))


def carrying(width, phi=relu, sigma_w=2**0.5, depth=DEPTH, scale=1.0, sigma_b=None):
    block = Residual(Chain((Linear(width, sigma_w, sigma_b), Activate(phi))), scale)
    return builders.stack(64, [Linear(width), (block, depth)], phi)


@pytest.mark.medium
@pytest.mark.parametrize(("width", "number"), [(100, 150), (1000, 60)])
def test_the_width_explains_what_a_carried_mean_does(width, number):
    """z + relu(W z), He weights, 30 blocks: ×1.41 a block at infinite width.

    Null: the mean squared gradient is the theory's with its shift. 4 standard errors of each of
    the 5 layers that are looked at: false alarms 3e-4. The shift itself is larger than 6 of them.
    No width needs to be simulated beside.
    """
    found = comparison.compare(carrying(width), X, networks=number)
    contrast = found["gradient_variance"]
    rest = contrast.measured - contrast.theory - contrast.shift
    at = slice(0, 21, 5)
    assert (abs(rest) < 4 * contrast.standard_error)[at].all()
    assert contrast.shift[0] > 6 * contrast.standard_error[0]
    assert not found.count(Status.DIFFERS), found.agreement
    assert "the gradient's part along the mean over units" in found.agreement
    assert not found.narrower


def explained_by_the_shift(network, number):
    """Whether layers 1, 6, 11 and 16 are theory's with its shift, and the shift is not nothing.

    To 4 standard errors, and 1/width for each layer above, of what is left out.
    """
    theory = float64.predict(network, X)["log_gradient_variance"]
    shift = float64.correct(network, X).shift["log_gradient_variance"]
    found = monte_carlo.simulate(network, X, networks=number)["gradient_variance"]
    others = np.arange(network.depth)[::-1] / network.widths[-1]
    allowed = 4 * found.log_standard_error + others
    rest = found.log_value - theory - shift
    assert (abs(rest) < allowed)[:16:5].all(), (rest, shift)
    return shift[0] > allowed[0] + 2 * others[0]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("phi", "sigma_w", "sigma_b", "scale"),
    [
        (relu, 1.2, 0.3, 0.7),
        pytest.param(softplus, 1.4, 0.2, 1.0, marks=pytest.mark.slow),
        pytest.param(negative, 1.4, None, 1.0, marks=pytest.mark.slow),
    ],
    ids=["relu with biases", "softplus", "a negative mean"],
)
def test_shifts_of_any_activation_and_biases(phi, sigma_w, sigma_b, scale):
    """Null: as above, but for 1/width for each layer, of what is left out; false alarms 3e-4."""
    assert explained_by_the_shift(carrying(100, phi, sigma_w, 20, scale, sigma_b), 500)


@pytest.mark.parametrize("sigma_w", [1.0, pytest.param(2**0.5, marks=pytest.mark.slow)])
@pytest.mark.medium
def test_highway_layers_with_relu(sigma_w):
    """A GRU without a reset gate, weights of its own each time. Null and false alarms as above."""
    gru = GRU(100, relu, sigma_w=sigma_w, reset_bias=None, update_bias=1.0)
    assert explained_by_the_shift(builders.stack(64, [Linear(100), (gru, 30)], relu), 200)


def test_gradients_times_signals_are_conserved():
    """Euler: Σ δ_i z_i is one number at all layers of a positively homogeneous network.

    So the gradient's part along the signal, in the mean square, is (1/q) of what it is at the top:
    a lower bound of all of it, and above the theory of infinite width from some depth on.
    """
    width = 100
    theory = float64.predict(carrying(width), X)
    shift = float64.correct(carrying(width), X).shift["log_gradient_variance"]
    # E (δ·z)² = n q^L at all layers, of which δ has (δ·z)²/(n q^l) along z; per unit, 1/n of it.
    bound = theory["log_q"][-1] - theory["log_q"] - np.log(width)
    total = theory["log_gradient_variance"] + shift
    known = ~np.isnan(total)
    assert known[:20].all()
    assert (total > bound)[known].all()
    assert bound[0] > theory["log_gradient_variance"][0] + 3


def test_a_mean_of_zero_is_not_carried():
    """Of tanh, what is along the signal grows no faster than the rest: nothing is said."""
    shift = float64.correct(carrying(1000, tanh, 1.0), X).shift
    assert np.isnan(shift["log_gradient_variance"]).all()


def test_only_what_is_known_is_covered():
    assert _carried_means.covers(carrying(10))
    for blocks in (
        [Linear(10), (Dense(relu, 10), 3)],
        [Linear(10), (Residual(Dense(relu, 10)), 3)],
        [Linear(10), networks.Stage(Residual(Chain((Linear(10), Activate(relu)))), 3, tied=True)],
    ):
        network = builders.stack(64, blocks, "relu")
        assert not _carried_means.covers(network)
        with pytest.raises(InputError, match="known for residual blocks past"):
            _carried_means.correct(network, mean_field.input_gram(jnp.asarray(X)))


@pytest.mark.medium
def test_corrections_are_a_pure_function():
    gram = mean_field.input_gram(jnp.asarray(X, float))
    network = carrying(50, depth=3)
    plain = _carried_means.correct(network, gram).shift["log_gradient_norm"]
    compiled = jax.jit(_carried_means.correct)(network, gram).shift["log_gradient_norm"]
    np.testing.assert_allclose(plain, compiled, rtol=1e-5, atol=1e-6)
