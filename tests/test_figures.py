"""Figures: labelled, theory as lines, simulation as points with error bars."""

import functools

import inspections
import jax
import numpy as np
import pytest
import xarray
from matplotlib.container import ErrorbarContainer

from gradflow import activations, builders, comparison, figures, spectra
from gradflow.errors import InputError
from gradflow.theory import criticality, summary

# They have no simulation.
THEORY_ALONE = {"phase_diagram", "correlation_map"}


@pytest.fixture(scope="module")
def dataset():
    x = np.asarray(jax.random.normal(jax.random.key(4), (2, 12), np.float32))
    network = builders.mlp([12, *[30] * 6], "tanh", "standard")
    return comparison.compare(network, x, networks=10, histograms=True).to_xarray()


def study():
    """A spectrum's results, of two kinds of weights at three depths."""
    dims = ("distribution", "depth", "singular_value_bin")
    theory = np.exp(-np.arange(24.0).reshape(2, 3, 4) / 6)
    theory[0, 0, 0] = 0  # has no place on a logarithmic axis
    return xarray.Dataset(
        {
            "singular_value_density": (dims, 1.1 * theory),
            "singular_value_density_standard_error": (dims, 0.1 * theory),
            "singular_value_density_theory": (dims, theory),
        },
        coords={
            "distribution": ["gaussian", "orthogonal"],
            "depth": [1, 2, 3],
            "singular_value_bin": [0.5, 1.5, 2.5, 3.5],
        },
    )


def test_spectra_are_told_apart_by_the_axis_of_words_and_theory_has_the_bins_edges():
    figure = figures.spectra(study())
    assert [axes.get_title() for axes in figure.axes] == ["depth 1", "depth 2", "depth 3"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["distribution gaussian", "distribution orthogonal"]
    step = figure.axes[1].patches[1].get_data()
    np.testing.assert_allclose(step.edges, [0, 1, 2, 3, 4])
    np.testing.assert_allclose(step.values, study().singular_value_density_theory[1, 1])
    alone = figures.spectra(study().isel(distribution=0, drop=True))
    assert [axes.get_title() for axes in alone.axes] == ["all points"]


def drawn(dataset):
    """Every figure of random networks by name; those of any comparison are found."""
    family = {"tanh": {"standard": dataset, "again": dataset}}
    at = np.array([10.0, 100.0])
    return {
        **{name: draw(family) for name, draw in figures.OF_COMPARISONS.items()},
        **inspections.found(inspections.residual()).figures(),
        "chi_against_width": figures.chi_against_width(
            {"tanh": (at, at / 50)}, {"tanh": (at, at / 50, at / 1000)}, 50.0
        ),
        "remedies": figures.remedies({"the sick network": dataset, "a remedy": dataset}),
        "phase_diagram": figures.phase_diagram(
            criticality.phase_diagram(activations.relu, np.linspace(1, 2, 5), np.linspace(0, 1, 4))
        ),
        "correlation_map": figures.correlation_map(
            summary.correlation_map("relu", 1.5, 0.1, [-1, 0, 1])
        ),
        "spectra": figures.spectra(study()),
        "spectrum": figures.spectrum(
            spectra.run(
                activations.hard_tanh,
                1.0476,
                q=0.25,
                depth=4,
                weights="orthogonal",
                points=50,
                networks=3,
                width=20,
            )[0]
        ),
    }


@pytest.mark.medium
def test_every_figure_has_labels_a_legend_and_points_with_error_bars(dataset, tmp_path):
    made = drawn(dataset)
    in_training = set(figures._training.__all__)  # drawn by test_experiments
    assert set(made) == set(figures.__all__) - in_training - {
        *("Figure", "OF_COMPARISONS", "OF_INSPECTIONS", "save")
    }
    for name, figure in made.items():
        for axes in (a for a in figure.axes if a.get_visible() and a.get_label() != "<colorbar>"):
            assert axes.get_title(), name
            assert axes.get_legend() or figure.legends, name
            assert name in THEORY_ALONE or any(
                isinstance(c, ErrorbarContainer) for c in axes.containers
            ), name
        assert any(a.get_xlabel() for a in figure.axes), name
        assert any(a.get_ylabel() for a in figure.axes), name
        assert figures.save(figure, tmp_path / f"{name}.png").stat().st_size > 10_000


def test_histograms_of_one_family_have_a_panel_each(dataset):
    both = figures.activation_histograms({"tanh": {"standard": dataset, "again": dataset}})
    assert [axes.get_title() for axes in both.axes] == ["tanh, standard", "tanh, again"]
    one = figures.activation_histograms({"tanh": {"standard": dataset}})
    assert [axes.get_title() for axes in one.axes] == ["tanh"]


def test_theory_is_a_line_and_simulation_is_not(dataset):
    axes = figures.gradient_norm({"tanh": {"standard": dataset}}).axes[0]
    theory, points = axes.lines[0], axes.containers[0].lines[0]
    assert theory.get_linestyle() == "-"
    assert points.get_linestyle() == "None"
    norm = dataset.log_gradient_norm_theory
    expected = (norm - norm[-1]) / np.log(10)
    np.testing.assert_allclose(theory.get_ydata(), expected)


def test_results_without_histograms_and_folders_that_are_not_there_are_refused(dataset, tmp_path):
    bare = dataset.drop_vars([v for v in dataset if "histogram" in v])
    with pytest.raises(InputError, match="results of 'tanh' have no gradient histograms"):
        figures.gradient_histograms({"tanh": {"standard": bare}})
    with pytest.raises(InputError, match="in a folder that is not there"):
        figures.save(figures.gradient_norm({"tanh": {"x": dataset}}), tmp_path / "no" / "x.png")


def test_a_notebook_shows_a_figure_without_pyplot(dataset):
    figure = figures.gradient_norm({"tanh": {"standard": dataset}})
    assert figure._repr_png_().startswith(b"\x89PNG")


@functools.cache
def phases(activation, sigma_w=(0.5, 3.0), sigma_b=(0, 1), points=24):
    return criticality.phase_diagram(
        activation, np.linspace(*sigma_w, points), np.linspace(*sigma_b, points)
    )


@pytest.mark.medium
@pytest.mark.parametrize(
    ("activation", "sigma_w", "sigma_b"),
    [
        ("tanh", (0.5, 3.0), (0, 1)),
        pytest.param("tanh", (0.9, 1.1), (0, 0.02), marks=pytest.mark.slow),
        pytest.param("gelu", (0.5, 3.0), (0, 1), marks=pytest.mark.slow),
    ],
)
def test_nothing_in_a_phase_diagram_overlaps(activation, sigma_w, sigma_b):
    figure = figures.phase_diagram(phases(activations.get(activation), sigma_w, sigma_b))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    for axes in figure.axes[:3]:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert boxes
        assert not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert all(
            axes.get_window_extent().padded(1).containsx(x) for b in boxes for x in b.intervalx
        )


@pytest.mark.slow
def test_a_critical_line_of_a_fixed_point_that_is_not_reached_is_told_apart():
    """GELU at small biases: signals from q = 1 diverge before χ₁ = 1 at the point in between."""
    figure = figures.phase_diagram(phases(activations.gelu))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["critical line, χ₁ = 1", names[1]]
    assert names[1].startswith("χ₁ = 1 at another fixed point")
    dotted, solid = figure.axes[0].lines[:2]
    low, high = solid.get_ydata() < 0.1, solid.get_ydata() > 0.4
    assert np.isfinite(dotted.get_xdata()[low]).all()
    assert np.isnan(solid.get_xdata()[low]).all()
    assert np.isfinite(solid.get_xdata()[high]).all()
    tanh = figures.phase_diagram(phases(activations.tanh))
    assert "another" not in str([t.get_text() for t in tanh.legends[0].get_texts()])
