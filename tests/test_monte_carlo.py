"""Many networks: the same whatever the chunks, and as the exact finite-width laws say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import builders, statistics
from gradflow.errors import InputError
from gradflow.simulation import _memory, monte_carlo

X = np.asarray(jax.random.normal(jax.random.key(4), (2, 12), jnp.float32))


@pytest.mark.medium
@pytest.mark.parametrize("sampler", ["dense", "matrix_free"])
def test_results_do_not_depend_on_the_chunks(sampler):
    network = builders.mlp([12, *[16] * 4], "tanh", "glorot")
    reference = None
    for block in (1, 7, 64):
        found = monte_carlo.simulate(
            network, X, networks=45, sampler=sampler, block=block, keep_samples=True
        )
        if reference is None:
            reference = found
        for name, value in found.samples.items():
            np.testing.assert_allclose(value, reference.samples[name], rtol=2e-4, atol=2e-5)


@pytest.mark.medium
def test_more_networks_extend_and_do_not_replace():
    network = builders.mlp([12, 16, 16], "relu", "he")
    few, more = (
        monte_carlo.simulate(network, X, networks=n, keep_samples=True).samples for n in (10, 30)
    )
    np.testing.assert_allclose(few["log_q"], more["log_q"][:10], rtol=1e-5)


def test_the_seed_decides_everything():
    network = builders.mlp([12, 16, 16], "tanh")
    a, b, c = (monte_carlo.simulate(network, X, networks=5, key=k)["q"].value for k in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).all()


# Reference table 6a, exact finite-width laws of ‖J u‖² for linear and ReLU networks, against 20 000
# networks. Null: the stated mean and variance; |z| < 4.5 for each, false-alarm rate 7e-6 a value.
NETWORKS = 20_000
Z = 4.5
WANTED = (statistics.q, statistics.activation_mean, statistics.activation_variance)


# The larger rows take minutes and follow the same law.
@pytest.mark.slow
@pytest.mark.usefixtures("simulations_compiled_well")
def test_log_moments_are_those_of_table_6a(load_reference):
    checked = 0
    for row in load_reference("t6a_finite_width_exact"):
        inputs, truth = row["inputs"], row["values"]
        if "E_log" not in truth and "E_log_given_alive" not in truth:
            continue
        widths = inputs.get("widths") or [inputs["n"]] * (inputs["L"] + 1)
        if len(widths) * max(widths) > 6000:
            continue
        linear = inputs["network"].startswith("linear")
        network = builders.mlp(widths, "linear" if linear else "relu", "lecun" if linear else "he")
        x = np.ones((1, widths[0]), np.float32)
        found = monte_carlo.simulate(
            network, x, networks=NETWORKS, key=11, keep_samples=True, wanted=WANTED
        )
        # The table's ReLU networks end with the activation: h^L = φ(z^L).
        if linear:
            log_ratio = found.samples["log_q"][:, -1] + np.log(widths[-1] / widths[0])
        else:
            variance, mean = (
                found.samples[k][:, -1] for k in ("log_activation_variance", "activation_mean")
            )
            square = np.exp(variance.astype(np.float64)) + mean.astype(np.float64) ** 2
            log_ratio = np.log(square[square > 0]) + np.log(widths[-1] / widths[0])
        mean = float(truth.get("E_log_given_alive", truth.get("E_log")))
        var = float(truth.get("Var_log_given_alive", truth.get("Var_log")))
        n = len(log_ratio)
        assert abs(log_ratio.mean() - mean) < Z * np.sqrt(var / n), row["id"]
        fourth = np.mean((log_ratio - mean) ** 4)
        assert abs(log_ratio.var() - var) < Z * np.sqrt((fourth - var**2) / n), row["id"]
        checked += 1
    assert checked >= 6


@pytest.mark.medium
def test_histograms_are_of_the_networks_that_were_simulated():
    network = builders.mlp([12, 300, 300], "tanh", "glorot")
    found = monte_carlo.simulate(network, X, networks=6, histograms=True)
    z = found.histograms["preactivation"]
    middle = (z.edges[:, 1:] + z.edges[:, :-1]) / 2
    second = (z.density * middle**2 * np.diff(z.edges)).sum(axis=1)
    np.testing.assert_allclose(second, found["q"].value, rtol=0.02)  # bins are 1/80 of the range
    assert set(found.histograms) == {"preactivation", "activation", "gradient"}


@pytest.mark.medium
def test_results_are_labelled():
    dataset = monte_carlo.simulate(
        builders.mlp([12, 16, 16]), X, networks=4, histograms=True
    ).to_xarray()
    assert dataset.attrs["sampler"] == "matrix_free"
    assert {"q", "q_standard_error", "log_q", "gradient_histogram_density"} <= set(dataset)
    assert dataset.q.attrs["long_name"]


def test_progress_starts_at_zero_and_ends_at_all():
    seen = []
    monte_carlo.simulate(
        builders.mlp([12, 16]), X, networks=33, block=4, progress=lambda *a: seen.append(a)
    )
    assert seen[0] == (0, 33)
    assert seen[-1] == (33, 33)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": X[:, :5]}, r"inputs has shape \(2, 5\); it is \(inputs, 12\)"),
        ({"inputs": X[0]}, r"inputs has shape \(12,\)"),
        ({"inputs": np.full((1, 12), np.nan, np.float32)}, "values that are not finite"),
        ({"networks": 0}, "networks is 0; it is a whole number of at least 1"),
        ({"sampler": "dens"}, "did you mean 'dense'"),
        ({"memory_budget": 1000}, r"needs .* GiB with sampler 'matrix_free' and .* GiB are free"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    arguments = {"inputs": X, "networks": 2} | arguments
    inputs = arguments.pop("inputs")
    with pytest.raises(InputError, match=message):
        monte_carlo.simulate(builders.mlp([12, 16]), inputs, **arguments)


def test_no_sampler_is_recommended_that_cannot_help():
    """Uniform weights are never matrix_free, and what is matrix_free already stays so."""
    for weights, sampler in (("standard", "dense"), ("glorot", "matrix_free")):
        network = builders.mlp([500, 500], "tanh", weights)
        with pytest.raises(InputError, match=r"smaller width or depth, or fewer inputs$"):
            _memory.plan(network, 2, sampler, 10, budget=1000)
    with pytest.raises(InputError, match="or sampler 'matrix_free'$"):
        _memory.plan(builders.mlp([500, 500]), 2, "dense", 10, budget=1000)


def test_a_call_hands_back_what_fits_however_many_networks_there_are():
    chunk = monte_carlo._chunk_size(10**12, block=64, workers=2, values=700)
    assert chunk % 64 == 0
    assert chunk * 700 <= monte_carlo._CHUNK_VALUES
    assert monte_carlo._chunk_size(1000, block=64, workers=2, values=700) == 128


def test_memory_plans_fit_their_budget():
    network = builders.mlp([1000] * 31)
    for budget in (10**6, 10**8, 10**10):
        plan = _memory.plan(network, 2, "matrix_free", 1000, budget=budget)
        assert plan.bytes_needed <= budget
        assert plan.block >= 1
    assert _memory.plan(network, 2, "matrix_free", 1000, budget=10**10).keep


def test_deep_networks_fit_by_checkpoints():
    """Signals of 10 000 layers are 80 MB: where they do not fit, 200 layers' are kept."""
    network = builders.mlp([1000] * 10_001)
    for sampler in ("dense", "matrix_free"):
        roomy, tight = (
            _memory.plan(network, 2, sampler, 1000, budget=b) for b in (10**9, 5 * 10**7)
        )
        assert not roomy.checkpoint
        assert tight.checkpoint
        assert tight.bytes_needed <= 5 * 10**7
        with pytest.raises(InputError, match="one network of widths 1000-1000"):
            _memory.plan(network, 2, sampler, 1000, budget=10**6)


@pytest.mark.medium
def test_a_small_budget_changes_nothing_but_the_rounding():
    """Of 400 layers, 40 are kept in 1/3 of the memory; checkpoints are what then fits."""
    network = builders.mlp([12, *[16] * 400], "tanh", "glorot")
    budget = _memory.bytes_per_network(network, 2, "matrix_free") * 3 // 2
    assert _memory.plan(network, 2, "matrix_free", 5, budget=budget).checkpoint
    tight, roomy = (
        monte_carlo.simulate(network, X, networks=5, memory_budget=b, keep_samples=True)
        for b in (budget, None)
    )
    for name, value in tight.samples.items():
        np.testing.assert_allclose(value, roomy.samples[name], rtol=2e-3, atol=2e-4)


def test_only_the_top_layer_has_no_chi():
    """Whatever the compiler makes of so many layers at once."""
    found = monte_carlo.simulate(
        builders.mlp([12, *[16] * 400], "tanh", "glorot"), X, networks=5, keep_samples=True
    ).samples["chi"]
    assert np.isnan(found[:, -1]).all()
    assert (found[:, :-1] > 0).all()


def test_one_compiled_program_serves_every_scale(monkeypatch):
    """Networks that differ in σ_w alone must not compile again."""
    traced = []
    original = monte_carlo.propagation.propagate
    monkeypatch.setattr(
        monte_carlo.propagation, "propagate", lambda *a, **k: traced.append(1) or original(*a, **k)
    )
    for sigma in ("glorot", "he", "unscaled"):
        network = builders.mlp([12, 21, 21, 21], "tanh", sigma)
        monte_carlo.simulate(network, X, networks=3)
    assert len(traced) == 1
