"""Studies measure spectra of Jacobians: of which networks, of the same ones, beside theory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import xarray

from gradflow import training
from gradflow.errors import InputError
from gradflow.simulation import _memory, _programs, propagation, singular_values
from gradflow.studies import _execution, _plan, _rounds, _spectra, _study_file
from gradflow.studies._point import Point
from gradflow.studies._study import HistogramRange
from gradflow.theory import _spectral_shares, spectrum

end_to_end = jax.jit(singular_values.end_to_end)
propagate = jax.jit(propagation.propagate)  # with the dense sampler
TEXT = """
[network]
activation = "tanh"
sigma_w2 = 1.5
sigma_b2 = 0.1
width = 12
depth = 3
[[axes]]
distribution = ["gaussian", "orthogonal"]
[sampling]
networks = 20
[spectrum]
from = 0
to = 2
bins = 8
"""


def changed(*pairs):
    text = TEXT
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(("to = 2\n", "")), r"spectrum.to is missing; a histogram has from, to and bins"),
        (changed(("to = 2", "to = 0")), r"spectrum.to is 0.0; it is above spectrum.from, 0.0"),
        (changed(("from = 0", "from = -1")), r"spectrum.from is -1.0; singular values are 0 or"),
        (changed(("bins = 8", "bins = 0")), r"spectrum.bins is 0; it is a whole number"),
        (changed(("bins = 8", "bin = 8")), r"spectrum.bin: unknown entry 'bin'"),
        (
            changed(("width = 12", 'width = 12\nkind = "residual"')),
            r"network.kind is 'residual' so",
        ),
        (changed(("width = 12", 'width = 12\nnorm = "layer"')), r"network.norm is 'layer' somewh"),
        (
            changed(("[sampling]", '[[axes]]\nnorm = ["none", "rms"]\n[sampling]')),
            r"axes\[1\].norm is 'rms' somewhere; with \[spectrum\] it is 'none'",
        ),
        (
            changed(("width = 12", "width = 12\nkeep_rate = 0.9")),
            r"network.keep_rate does not go with",
        ),
        (changed(("width = 12", 'width = 12\nlast = "lecun"')), r"network.last does not go with"),
        (changed(("[sampling]", "[inputs]\nbatch = 2\n[sampling]")), r"inputs.batch is 2 somewhe"),
        (
            changed(("width = 12\ndepth = 3", "widths = [12, 12, 9]")),
            r"network.widths has several widths; with \[spectrum\] input and layers are as wide",
        ),
        (
            changed(("width = 12", "width = 12\ninput_width = 9")),
            r"network.input_width makes inputs of width 9; with \[spectrum\] they are as wide",
        ),
        (
            changed(("[sampling]", '[inputs]\ndata = "digits"\n[sampling]')),
            r"inputs.data makes inputs of width 64; with \[spectrum\] they are as wide",
        ),
        (
            changed(("networks = 20", 'networks = 20\nsampler = "matrix_free"')),
            r"sampling.sampler is 'matrix_free'; \[spectrum\] takes all weights",
        ),
    ],
)
def test_a_spectrum_is_of_plain_networks_and_others_are_refused_in_a_sentence(text, message):
    with pytest.raises(InputError, match=rf"^{message}"):
        _study_file.parse(text)


def test_plain_networks_are_not_refused_and_what_they_take_is_known():
    with_spectrum = _study_file.parse(TEXT)
    without = _study_file.parse(TEXT[: TEXT.index("[spectrum]")])
    assert with_spectrum.spectrum == HistogramRange(0.0, 2.0, 8)
    assert "spectrum" not in without.fixed()  # stores of before are still those of their files
    (program, other), (plain, _) = (_plan.programs(s) for s in (with_spectrum, without))
    assert program.sampler == other.sampler == "dense"
    assert _plan.programs(without)[1].sampler == "matrix_free"
    assert program.seconds > 2 * plain.seconds
    assert other.seconds > program.seconds  # orthogonal weights are factorised
    assert _plan.row_bytes(with_spectrum, 3) - _plan.row_bytes(without, 3) == 8 * 4 * (8 + 7)
    for more in ("data = 'digits'", "mean_square = 0.5"):
        width = 64 if "data" in more else 12
        text = changed(("width = 12", f"width = {width}"), ("[sampl", f"[inputs]\n{more}\n[sampl"))
        assert _study_file.parse(text).spectrum


def run(folder, text=TEXT, **how):
    return _execution.run(_study_file.parse(text), folder, **how)


def whole_jacobian(network, x, key):
    """D^L W^L … D^1 W^1 in float64, of the weights that training starts from."""
    weights = training.initial_weights(network, key)
    h, jacobian = np.asarray(x[0], float), np.eye(x.shape[1])
    slope, phi = network.activation.derivative, network.activation
    z = []
    for stage in weights:
        matrices, biases = stage.matrices[0], stage.biases
        for layer in range(len(matrices)):
            w = np.asarray(matrices[layer], float)
            z.append(w @ h + (np.asarray(biases[0][layer, 0], float) if biases else 0))
            with jax.enable_x64(True):
                h, d = np.asarray(phi(z[-1])), np.asarray(slope(z[-1]))
            jacobian = d[:, None] * (w @ jacobian)
    return jacobian, np.array(z)


@pytest.mark.parametrize("activation", ["tanh", "relu", "linear"])
@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
def test_singular_values_are_those_of_the_network_that_is_propagated(activation, weights):
    text = changed(('"tanh"', f'"{activation}"'), ('"gaussian", "orthogonal"', f'"{weights}"'))
    point = _study_file.parse(text).point(0)
    network, x = point.network(), jnp.asarray(point.inputs(), jnp.float32)
    single = network.as_arrays(np.float32)
    for number in range(5):
        key = jax.random.fold_in(point.key, number)
        jacobian, z = whole_jacobian(network, x, key)
        found = np.exp(np.asarray(end_to_end(single, x, key), float))
        expected = np.linalg.svd(jacobian, compute_uv=False)
        np.testing.assert_allclose(found, expected, atol=3e-6 * expected[0])
        # Those of ReLU that are 0 are 0, and counted by the layer with fewest units that are on.
        alive = int((network.activation.derivative(z) != 0).sum(axis=1).min())
        assert np.count_nonzero(found) == alive
        drawn = propagate(single, x, key)
        np.testing.assert_allclose(np.exp(drawn["log_q"]), (z**2).mean(axis=1), rtol=1e-5)


def test_signals_and_jacobians_leave_a_floats_range_and_their_slopes_do_not():
    """ReLU, 400 layers of σ_w² = 0.5: signals of 1e-120, and singular values of which log s is."""
    text = changed(('"tanh"', '"relu"'), ("1.5", "0.5"), ("depth = 3", "depth = 400"))
    text = text.replace("width = 12", "width = 40").replace("sigma_b2 = 0.1\n", "")
    point = _study_file.parse(text).point(1)
    key = jax.random.fold_in(point.key, 0)
    network, x = point.network(), jnp.asarray(point.inputs(), jnp.float32)
    found = np.asarray(end_to_end(network.as_arrays(np.float32), x, key))
    scaled = point.settings | {"sigma_w2": 2.0}
    usual = Point(point.index, scaled, point.networks).network()
    expected = np.asarray(end_to_end(usual.as_arrays(np.float32), x, key))
    assert np.isfinite(expected[0])
    np.testing.assert_allclose(found[0], expected[0] - 400 * np.log(2), rtol=1e-4)
    assert np.isneginf(found).sum() == np.isneginf(expected).sum() > 0


def test_networks_without_a_finite_jacobian_are_left_out_and_zeros_are_in_no_bin():
    bins = HistogramRange(0.0, 1.0, 4)
    logs = np.log([[0.1, 0.3, 1.0, 2.0], [0.1, 0.1, 0.1, 0.1]])
    logs = np.vstack([logs, [np.nan] * 4, [-1e4, -np.inf, -np.inf, 0.5]])
    found = _spectra.counted(logs, np.array([0, 0, 0, 1]), bins)
    np.testing.assert_array_equal(found["networks"], [2, 1])
    np.testing.assert_array_equal(found["counts"][0], [0, 0, 5, 1, 0, 1, 1])
    np.testing.assert_array_equal(found["squares"][0], [0, 0, 17, 1, 0, 1, 1])
    # What is far below any float is no zero.
    np.testing.assert_array_equal(found["counts"][1], [2, 0, 1, 0, 0, 0, 1])
    np.testing.assert_allclose(found["sums"][0, 0], (0.01 + 0.09 + 1 + 4) / 4 + 0.01)
    np.testing.assert_allclose(found["sums"][0, 2], 2.1)


@pytest.fixture
def _small_chunks(monkeypatch):
    """So that a small study has some, and merges them."""
    monkeypatch.setattr(_plan, "_CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(_rounds, "_MERGED_FILES", 2)
    real = _memory.plan
    monkeypatch.setattr(
        _memory, "plan", lambda *a, **k: dataclasses.replace(real(*a, **k), block=4)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_small_chunks")
def test_interrupted_it_ends_in_the_same_bits_and_other_chunks_change_the_rounding(
    tmp_path, monkeypatch
):
    run(tmp_path / "whole")
    while not run(tmp_path / "stopped", stop=lambda: True).finished:
        pass
    ours, theirs = (
        {p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*.n*")) if p.is_file()}
        for f in (tmp_path / "stopped", tmp_path / "whole")
    )
    # Of two groups: two of chunks, one of theory; the round and its copy; the results.
    assert len(ours) == 9
    assert ours == theirs
    monkeypatch.setattr(_plan, "_CHUNK_SECONDS", 100.0)
    run(tmp_path / "chunks")
    one, other = (xarray.load_dataset(tmp_path / n / "results.nc") for n in ("whole", "chunks"))
    for name in one:
        if "singular" in str(name):
            scale = 1e-5 * float(np.abs(other[name]).max())
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=scale, err_msg=name)
    # Points are those of the networks, drawn one by one.
    point = _study_file.parse(TEXT).point(0)
    keys = [jax.random.fold_in(point.key, n) for n in range(20)]
    network, x = point.network(), jnp.asarray(point.inputs(), jnp.float32)
    s = np.exp([singular_values.end_to_end(network, x, key) for key in keys])
    shares = [np.histogram(row, np.linspace(0, 2, 9), density=False)[0] / 12 for row in s]
    there = one.isel(distribution=0)
    np.testing.assert_allclose(there.singular_value_density, np.mean(shares, axis=0) / 0.25)
    np.testing.assert_allclose(
        there.singular_value_density_standard_error,
        np.std(shares, axis=0, ddof=1) / 0.25 / np.sqrt(20),
        atol=1e-12,
    )
    np.testing.assert_allclose(
        there.mean_squared_singular_value_standard_error,
        scipy.stats.sem((s**2).mean(axis=1)),
        rtol=1e-4,
    )


LINEAR = changed(
    ('"tanh"', '"linear"'),
    ("sigma_w2 = 1.5", "sigma_w2 = 1.1"),
    ("sigma_b2 = 0.1\n", ""),
    ("width = 12", "width = 100"),
    ("networks = 20", "networks = 300"),
    ("bins = 8", "bins = 20"),
    ("to = 2", "to = 3"),
)


@pytest.mark.medium
def test_linear_networks_have_the_spectrum_of_the_theory(tmp_path):
    """Gaussian, 3 layers of width 100, 300 networks; and orthogonal: one singular value, σ_w³.

    Null: in each bin the share of singular values is that of theory, but for a finite width's 0.02
    of a bin, and four standard errors; normal theory's false-alarm rate for 20 bins is 1.3e-3.
    Theory of 2 or 4 layers, or of σ_w² of 1.0, is not accepted.
    """
    run(tmp_path, LINEAR)
    dataset = xarray.load_dataset(tmp_path / "results.nc")
    gaussian, orthogonal = (dataset.isel(distribution=n) for n in (0, 1))
    edges = np.linspace(0, 3, 21)

    def fits(law):
        theory = np.asarray(law.inside) / 0.15
        allowed = 4 * gaussian.singular_value_density_standard_error + 0.02 * theory + 1e-3
        return bool((np.abs(gaussian.singular_value_density - theory) < allowed).all())

    with jax.enable_x64(True):
        laws = {
            (depth, sigma_w2): _spectral_shares.shares(
                spectrum.slope_law("linear", 1.0), sigma_w2, depth, edges=edges
            )
            for depth, sigma_w2 in ((3, 1.1), (2, 1.1), (4, 1.1), (3, 1.0))
        }
    assert [fits(law) for law in laws.values()] == [True, False, False, False]
    np.testing.assert_allclose(
        gaussian.singular_value_density_theory, np.asarray(laws[3, 1.1].inside) / 0.15, atol=1e-9
    )
    # Relative variance L, and s_max² = σ_w^2L (L + 1)^(L + 1)/L^L.
    np.testing.assert_allclose(gaussian.squared_singular_value_relative_variance_theory, 3)
    np.testing.assert_allclose(gaussian.squared_singular_value_relative_variance, 3, rtol=0.05)
    largest = np.sqrt(1.1**3 * 4**4 / 3**3)
    np.testing.assert_allclose(gaussian.largest_singular_value_theory, largest, rtol=1e-9)
    np.testing.assert_allclose(gaussian.largest_singular_value, largest, rtol=0.06)
    assert abs(gaussian.mean_squared_singular_value_z) < 4

    share = orthogonal.singular_value_density * 0.15
    there = int(np.digitize(1.1**1.5, edges)) - 1
    np.testing.assert_array_equal(share, np.arange(20) == there)
    np.testing.assert_allclose(orthogonal.singular_value_density_theory * 0.15, share, atol=1e-12)
    np.testing.assert_array_equal(orthogonal.singular_value_density_z, 0)
    np.testing.assert_allclose(orthogonal.mean_squared_singular_value, 1.1**3, rtol=1e-5)
    np.testing.assert_allclose(orthogonal.largest_singular_value, 1.1**1.5, rtol=1e-5)
    assert abs(orthogonal.mean_squared_singular_value_z) < 4


@pytest.mark.medium
def test_theory_is_offered_where_q_stays_put_and_zeros_are_an_atom():
    bins = HistogramRange(0.0, 2.0, 8)
    for text, known in (
        (TEXT, False),  # q goes from 1.6 to 0.6
        (changed(('"tanh"', '"relu"')), True),  # whose slopes do not depend on q
    ):
        network = _study_file.parse(text).point(0).network()
        log_q = np.log([1.6, 1.0, 0.7])
        law = _spectra.theory(network, log_q, bins)
        assert np.isfinite(law["shares"]).all() == known
        if known:
            np.testing.assert_allclose(law["shares"].sum(), 1, rtol=1e-12)
            np.testing.assert_allclose(law["shares"][0], 0.5)
        settled = _spectra.theory(network, np.log([0.601, 0.6, 0.599]), bins)
        assert np.isfinite(settled["shares"]).all()


@pytest.mark.slow
def test_an_atom_at_an_edge_is_not_compared(tmp_path):
    """Of orthogonal linear networks with σ_w = 1 rounding decides on which side of 1 they are."""
    text = LINEAR.replace("= 1.1", "= 1.0").replace("= 300", "= 3").replace("= 100", "= 10")
    run(tmp_path, text.replace("bins = 20", "bins = 6"))
    z = xarray.load_dataset(tmp_path / "results.nc").singular_value_density_z
    np.testing.assert_array_equal(np.isnan(z.isel(distribution=1)), [0, 1, 1, 0, 0, 0])


def test_the_program_returns_them_beside_the_statistics():
    point = _study_file.parse(TEXT).point(1)
    x = jnp.asarray(point.inputs(), jnp.float32)
    laws = _programs.RandomNetworks.of(point.network(), x, point.key)
    how = {"measured": (_programs.VANISHED,), "sampler": "dense", "keep": (False, False)}
    run = _programs.compiled(laws, 4, tuple(jax.devices()), 1.0, block=2, spectrum=True, **how)
    _, found = run(laws, np.zeros(4, np.int32), np.arange(4, dtype=np.int32))
    assert found.shape == (4, 12)
    key = jax.random.fold_in(point.key, 3)
    expected = singular_values.end_to_end(point.network(), x, key)
    np.testing.assert_allclose(found[3], expected, atol=1e-4)
