"""Experiments on training: each runs, and what it says is what its numbers say."""

from pathlib import Path

import jax
import numpy as np
import pytest
import xarray
from matplotlib.container import ErrorbarContainer

from gradflow import data, experiments
from gradflow.errors import InputError

# Sizes that take seconds, of the options that an experiment has.
TINY = {
    "data": "digits",
    "width": 8,
    "depth": 2,
    "depths": (1, 2),
    "steps": 20,
    "batch": 16,
    "networks": 2,
    "seed": 1,
    "activation": "tanh",
    "weights": "glorot",
    "heads": 2,
}
# Figures of these have no points in their maps.
MAPS = {"trainability"}


def tiny(option, name):
    """A value that takes seconds: of several the first and the last, of numbers a small one."""
    if name in TINY:
        return TINY[name]
    if option.several:
        return (option.default[0], option.default[-1])
    return min(option.default, 3) if option.type is int else option.default


# Most take some seconds to compile.
@pytest.fixture(
    scope="module",
    params=[
        name if name == "gradients" else pytest.param(name, marks=pytest.mark.slow)
        for name in experiments.ALL
    ],
)
def ran(request):
    experiment = experiments.get(request.param)
    calls = []
    options = {name: tiny(option, name) for name, option in experiment.options.items()}
    dataset = experiment.run(progress=lambda *given: calls.append(given), **options)
    return experiment, dataset, calls


@pytest.mark.medium
def test_a_dataset_has_labels_a_table_findings_and_a_figure(ran, tmp_path):
    experiment, dataset, calls = ran
    assert dataset.sizes["seed"] == 2
    assert dataset.attrs["seed"] == 1
    assert calls[0][1] == 0
    assert all(done <= total for _, done, total in calls)
    # It is the same when it was written and read again.
    dataset.to_netcdf(tmp_path / "made.nc", engine="scipy")
    again = xarray.load_dataset(tmp_path / "made.nc", engine="scipy")
    table = experiment.table(again)
    assert len({tuple(row) for row in table.rows}) == 1  # the same columns in all rows
    assert experiment.findings(again) == experiment.findings(dataset)
    assert all(len(sentence) > 20 for sentence in experiment.findings(dataset))
    figure = experiment.figure(again)
    for axes in (a for a in figure.axes if a.get_visible() and a.get_label() != "<colorbar>"):
        assert axes.get_title()
        assert axes.get_legend() or figure.legends
        assert experiment.name in MAPS or any(
            isinstance(c, ErrorbarContainer) for c in axes.containers
        )
    assert any(a.get_xlabel() for a in figure.axes)
    assert any(a.get_ylabel() for a in figure.axes)


def test_every_experiment_is_found_and_says_what_it_shows():
    folder = Path(experiments.__file__).parent
    public = {file.stem for file in folder.glob("[!_]*.py")} - {"recipe"}
    assert {name.replace("-", "_") for name in experiments.ALL} == public
    for name, experiment in experiments.ALL.items():
        assert experiment.name == name
        assert 20 < len(experiment.summary) < 100
        assert all(len(option.help) > 5 for option in experiment.options.values())
    with pytest.raises(InputError, match="did you mean 'layers'"):
        experiments.get("layer")


def test_options_that_an_experiment_does_not_take_are_refused():
    for options, sentence in (
        ({"depth": 3}, "'saturation' has no use for depth; it takes data, width, depths, steps"),
        ({"learning_rate": (0.1, 0.2)}, "'saturation' takes one learning_rate"),
        ({"depths": (1, 0)}, "depth is 0"),
        ({"steps": 0}, "steps is 0"),
    ):
        with pytest.raises(InputError, match=sentence):
            experiments.get("saturation").run(**options)


# What findings say, of numbers made up.


def of(name, variables, attrs=(), **coords):
    """Return a dataset as the experiment has it, with what findings look at."""
    shared = {"width": 8, "classes": 10, "batch": 10, "steps": 100, "monitored": 300}
    dataset = xarray.Dataset(variables, coords).assign_attrs(shared, **dict(attrs))
    return experiments.get(name).findings(dataset)


def test_layers_that_follow_theory_are_told_from_those_that_do_not():
    layer = np.arange(1, 5)
    theory = np.array([[0.01, 0.1, 1.0, 5.0]])
    movement = theory[:, None, None] * np.array([8.0, 2.0, 1.0, 1.0]) * 0.1
    dims = ("network", "seed", "step", "layer")
    variables = {
        "speed_theory": (("network", "layer"), theory),
        "movement": (dims, np.repeat(movement, 2, axis=1)),
        "update_ratio": (dims, np.repeat(1e-6 * theory[:, None, None], 2, axis=1)),
        "error": (("network", "seed", "step"), np.full((1, 2, 1), 0.25)),
        "diverged": (("network", "seed"), [[-1, 0]]),
    }
    coords = {"network": ["a"], "layer": layer, "step": [100], "seed": [0, 1]}
    first, second = of("layers", variables, {"optimiser": "sgd", "clip": "none"}, **coords)
    assert "layer 1 moves least, 0.008" in first
    assert "layer 3 most, 0.1" in first
    assert "25.0 ± 0.0 %; 1 of 2 networks diverge" in first
    assert "first update's" in second
    assert "within a factor 1 of theory" in second
    assert "in layers 2 to 3 and not in layer 1 (×8)" in second
    assert "in layer 1 an update is less than float32 resolves" in second
    assert len(of("layers", variables, {"optimiser": "adam"}, **coords)) == 1


def test_a_top_layer_that_saturates_and_a_network_that_escapes_are_found():
    step, seed = [0, 100, 200], [0, 1]
    top = np.array([[[0.5, 0.3, 0.3]] * 2, [[0.5, 0.01, 0.2], [0.5, 0.02, 0.02]]])
    mean = np.full((2, 2, 3, 3), 0.5)
    mean[0, :, :, 0], mean[1, :, :, 1] = top
    variables = {
        "activation_mean": (("depth", "seed", "step", "layer"), mean),
        "steps_to_half": (("depth", "seed"), [[100.0, 100.0], [200.0, np.nan]]),
    }
    coords = {"depth": [1, 2], "seed": seed, "step": step, "layer": [1, 2, 3]}
    shallow, deep = of("saturation", variables, {"steps": 200}, **coords)
    assert "depth 1: the top hidden layer does not saturate" in shallow
    assert "2 of 2 networks come below an error of 50 %" in shallow
    assert "depth 2: the top hidden layer saturates at 0" in deep
    assert "1 of 2 networks come below an error of 50 %, at step 200 to 200" in deep
    variables["steps_to_half"] = (("depth", "seed"), np.full((2, 2), np.nan))
    assert "no network comes below" in of("saturation", variables, {"steps": 200}, **coords)[0]


def test_layers_are_ordered_by_when_they_saturate():
    top = np.array([[[[0.5, 0.5, 0.5], [0.6, 0.96, 0.5], [0.97, 0.99, 0.5]]] * 2])
    found = of(
        "percentiles",
        {"activation_percentile_98": (("network", "seed", "step", "layer"), top)},
        network=["tanh"],
        seed=[0, 1],
        step=[0, 10, 20],
        layer=[1, 2, 3],
    )
    assert "in the order 2 (step 10), 1 (step 20); at the end" in found[0]
    flat = {"activation_percentile_98": (("network", "seed", "step", "layer"), top[:, :, :1])}
    coords = {"network": ["tanh"], "seed": [0, 1], "step": [0], "layer": [1, 2, 3]}
    assert "no layer saturates" in of("percentiles", flat, **coords)[0]


def test_gradients_that_drift_apart_are_found():
    log = np.zeros((2, 2, 2, 4))
    log[0, :, 1, 1] = 2 * np.log(5)
    log[1] += 2 * np.log(3)
    found = of(
        "gradients",
        {"log_weight_gradient_variance": (("network", "seed", "step", "layer"), log)},
        network=["tanh", "tanh N"],
        seed=[0, 1],
        step=[0, 10],
        layer=[1, 2, 3, 4],
    )
    assert "1 at the start, at most 5 (step 10), 5 ± 0 at the end" in found[0]
    assert "tanh N's weight gradients are 3 times tanh's" in found[2]
    assert "the layers of tanh are further apart: on average ×5 against ×1" in found[3]


def test_a_ranking_is_told_from_the_papers():
    names = ["sigmoid", "tanh", "tanh N"]
    end = np.array([0.83, 0.7, 0.5])[:, None] + np.array([0.0, 0.02])
    error = np.stack([np.full_like(end, 0.85), end], axis=2)
    variables = {
        "error": (("network", "seed", "step"), error),
        "paper": ("network", [82.61, 27.15, 15.60]),
    }
    coords = {"network": names, "seed": [0, 1], "step": [0, 10]}
    found = of("table-1", variables, **coords)
    assert "tanh N, tanh, sigmoid; the same as the paper's" in found[0]
    assert "tanh errs 20.0 ± 1.4 points more than tanh N" in found[1]
    assert "sigmoid has learnt next to nothing: 84.0 %" in found[-1]
    other = variables | {"paper": ("network", [1.0, 2.0, 3.0])}
    assert "not the same as the paper's: sigmoid" in of("table-1", other, **coords)[0]


def test_depths_that_train_are_beside_the_depth_scale():
    depth, sigma = [4, 16, 64], [1.0, 1.8, 3.0]
    accuracy = np.array([[0.5, 0.9, 0.1], [0.1, 0.9, 0.1], [0.1, 0.9, 0.1]])[..., None]
    variables = {
        "accuracy": (("depth", "sigma_w2", "seed"), np.repeat(accuracy, 2, axis=2)),
        "xi_c": ("sigma_w2", [1.0, 400.0, 5.0]),
    }
    coords = {"depth": depth, "sigma_w2": sigma, "seed": [0, 1]}
    attrs = {"critical_sigma_w2": [1.76]}
    found = of("trainability", variables, attrs, **coords)
    assert "those at σ_w² = 1.8 train best, to an accuracy of 0.90" in found[0]
    assert "critical line is at 1.76" in found[0]
    # Halfway (0.5) is exactly at depth 4; at σ_w² = 3 no depth trains.
    assert "halfway at 4.0 to 4.0 ξ_c, median 4.0, where 6 ξ_c is within these depths" in found[1]
    assert "(σ_w² = 1)" in found[1]
    assert "(σ_w² = 1.8) networks train at least to all these depths" in found[2]


def test_orthogonal_weights_are_told_from_gaussian_ones():
    log = np.log(np.array([[1.0, 1.0, 1.0], [10.0, 1e-3, 1e-9]]))
    taken = np.array([[[2.0, 2.0], [4.0, 4.0]], [[8.0, 8.0], [50.0, np.nan]]])
    first, second, third, fourth = of(
        "isometry",
        {
            "error": (("network", "seed", "step"), np.array([[[0.1]] * 2, [[0.6]] * 2])),
            "log_singular_value": (("network", "seed", "k"), np.stack([log, log], axis=1)),
            "log_singular_value_theory": (("network", "k"), log),
            "steps_to_close": (("network", "depth", "seed"), taken),
        },
        {"linear_steps": 100},
        network=["orthogonal", "gaussian"],
        seed=[0, 1],
        step=[100],
        depth=[2, 50],
    )
    assert "orthogonal: error 10.0 ± 0.0 % after 100 steps; median singular value 1 " in first
    assert "gaussian: error 60.0 ± 0.0 %" in second
    assert "median singular value 0.001 at the start (theory 0.001)" in second
    assert "90 % of the gap is closed in 2 at depth 2, 4 at depth 50 steps" in third
    assert "8 at depth 2 steps; not by all networks in 100 steps at depth 50" in fourth


def test_contenders_are_sorted_by_what_they_learn():
    error = np.array([0.9, 0.02, 0.3])[:, None, None] + np.zeros((3, 2, 1))
    found = of(
        "league",
        {"error": (("network", "seed", "step"), error)},
        network=["a", "b", "c"],
        seed=[0, 1],
        step=[100],
    )
    assert [sentence.rpartition(": ")[2] for sentence in found] == [
        "b (2.0 %)",
        "c (30.0 %)",
        "a (90.0 %)",
    ]


def test_clipping_helps_against_spikes_and_leaves_layers_as_far_apart():
    error = np.zeros((1, 2, 2, 2)) + np.array([[[[0.1], [0.8]], [[0.2], [0.1]]]])
    norm = np.ones((1, 2, 2, 2, 5))
    norm[..., 4] = 30.0
    dims = ("network", "clipped", "learning_rate", "seed")
    variables = {name: (dims, error) for name in ("error", "validation_error")}
    variables |= {
        name: ((*dims, "step"), value)
        for name, value in (
            ("gradient_norm", norm),
            ("disparity", 1000 * np.ones_like(norm)),
            ("clipped_disparity", 1000 * np.ones_like(norm)),
        )
    }
    helps, spikes, layers = of(
        "clipping",
        variables,
        {"threshold": 2.0},
        network=["a"],
        clipped=[False, True],
        learning_rate=[0.1, 1.0],
        seed=[0, 1],
        step=range(5),
    )
    assert "helps most at a learning rate of 1, from an error of 80.0 ± 0.0 % to 10.0 " in helps
    assert "at the best rate of each it is 10.0 % (0.1) and 10.0 % (1)" in helps
    assert "20.0 % of gradients are more than 10 times the typical one, the largest 30" in spikes
    assert "20 % of steps are clipped" in spikes
    assert "1e+03 times the smallest before clipping, and 1e+03 times after" in layers


def test_pixels_are_scaled_as_the_training_set_says():
    x = np.arange(20.0).reshape(10, 2)
    parts = data.split(data.from_arrays(x, np.arange(10) % 2), validation=2, test=2)
    low, high = parts.train.inputs.min(), parts.train.inputs.max()
    scaled = parts.rescaled(-1.0, 1.0)
    np.testing.assert_allclose(
        scaled.test.inputs, 2 * (parts.test.inputs - low) / (high - low) - 1, rtol=1e-6
    )
    assert scaled.train.inputs.min() == -1
    assert scaled.train.inputs.max() == 1
    with pytest.raises(InputError, match="low is 1.0 and high is 1.0"):
        parts.rescaled(1.0, 1.0)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="made for a CPU's time")
def test_a_deep_logistic_networks_top_layer_saturates_and_a_shallow_ones_does_not():
    """Figure 2 of 2010. At depth 1 and 4, four networks of each, which do not come near."""
    dataset = experiments.get("saturation").run(depths=(1, 4), steps=3000)
    top = [dataset.activation_mean.sel(depth=d, layer=d).min("step").values for d in (1, 4)]
    assert np.all(top[0] > 0.1)
    assert np.all(top[1] < 0.03)
    assert np.all(dataset.steps_to_half.sel(depth=1) <= 1000)
    assert np.all(np.isnan(dataset.steps_to_half.sel(depth=4)))
