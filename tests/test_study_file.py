"""Study files: what they mean, and that whatever is wrong in one is said in one sentence."""

import random
import re
import sys

import jax
import numpy as np
import pytest

from gradflow import cli, data
from gradflow.errors import InputError
from gradflow.studies import _plan, _study_file
from gradflow.studies._point import Family, Point

GOOD = """
title = "Order and chaos"
[network]
activation = "tanh"
width = 30
depth = 6
[[axes]]
sigma_w2 = { from = 0.5, to = 2.5, points = 3 }
[[axes]]
sigma_b2 = [0.0, 0.1]
norm = ["none", "layer"]
[inputs]
batch = 2
correlation = 0.5
[sampling]
networks = 50
seed = 7
[histograms]
log_gradient_norm = { from = -5, to = 5, bins = 20 }
"""
RESIDUAL = """
[network]
kind = "residual"
activation = "relu"
weights = "he"
scale = "depth"
layers = 2
width = 20
depth = 5
input_width = 8
keep_rate = 0.9
[[axes]]
seed = { from = 0, to = 3, points = 4 }
[inputs]
data = "digits"
[sampling]
target = { q = 0.05, log_gradient_norm = 0.1 }
round = 10
most = 40
dtype = "float64"
[statistics]
measure = ["q", "log_gradient_norm"]
[theory]
finite_width = false
"""
ALONG = GOOD.replace("networks = 50\n", "").replace(
    'norm = ["none", "layer"]', 'norm = ["none", "layer"]\nnetworks = [50, 20]'
)


def test_a_grid_is_the_product_of_its_axes():
    study = _study_file.parse(GOOD)
    assert study.shape == (3, 2)
    points = list(study.points())
    assert [p.index for p in points] == [(i, j) for i in range(3) for j in range(2)]
    last = points[-1].settings
    assert (last["sigma_w2"], last["sigma_b2"], last["norm"]) == (2.5, 0.1, "layer")
    network = points[-1].network()
    assert network.widths == (30,) * 7
    assert network.stages[0].block.sigma_w == pytest.approx(2.5**0.5)
    assert network.stages[0].block.sigma_b == pytest.approx(0.1**0.5)
    found = _plan.programs(study)
    assert [len(g.names) for g in found] == [3, 3]  # normalised or not; with σ_b of 0 or not


def test_numbers_alone_make_no_new_program():
    """σ_b = 0 beside others, and a range of widths: one program, and three."""
    plain = GOOD.replace('["none", "layer"]', '["none", "none"]')
    assert len(_plan.programs(_study_file.parse(plain))) == 1
    wider = GOOD.replace("width = 30\n", "").replace(
        "[inputs]", "[[axes]]\nwidth = [10, 20, 30]\n[inputs]"
    )
    assert len(_plan.programs(_study_file.parse(wider))) == 6


def test_inputs_have_the_correlation_and_the_length_that_are_asked_for():
    for batch, correlation, length in ((2, 0.5, 1.0), (3, -0.5, 2.0), (4, 1.0, 0.3)):
        text = GOOD.replace("batch = 2", f"batch = {batch}\nmean_square = {length}")
        text = text.replace("correlation = 0.5", f"correlation = {correlation}")
        x = _study_file.parse(text).point(0).inputs()
        gram = np.where(np.eye(batch) == 1, 1.0, correlation) * length
        np.testing.assert_allclose(x @ x.T / 30, gram, atol=1e-12)
        assert np.abs(x).min() < np.abs(x).max() < 10 * length**0.5  # none sparse


def test_a_point_is_known_by_its_settings_alone():
    """Whatever other points there are, and however its settings are written."""
    names = {p.settings["sigma_w2"]: p.name for p in _study_file.parse(GOOD).points()}
    finer = GOOD.replace("points = 3", "points = 5").replace(
        "correlation = 0.5", "correlation = 5e-1"
    )
    again = {p.settings["sigma_w2"]: p.name for p in _study_file.parse(finer).points()}
    assert all(again[value] == name for value, name in names.items())
    other = _study_file.parse(GOOD.replace("seed = 7", "seed = 8")).point(0)
    assert other.name not in names.values()
    assert other.key != _study_file.parse(GOOD).point(0).key


def test_a_residual_network_with_data_and_a_target():
    study = _study_file.parse(RESIDUAL.replace("input_width = 8\n", ""))
    network = study.point(3).network()
    assert network.widths == (64, *[20] * 6)
    assert network.stages[1].block.scale == pytest.approx(5**-0.5)
    assert study.point(3).inputs().shape == (1, 64)
    assert study.sampling.target == {"q": 0.05, "log_gradient_norm": 0.1}
    assert [p.settings["seed"] for p in study.points()] == [0, 1, 2, 3]


def test_images_are_resized_to_the_inputs_width():
    for width in (8, 64, 100):
        text = RESIDUAL.replace("input_width = 8", f"input_width = {width}")
        point = _study_file.parse(text.replace('"digits"', '"digits"\nbatch = 2')).point(0)
        assert point.network().input_width == width
        expected = data.inputs(width, input="digits", batch=2)
        np.testing.assert_array_equal(point.inputs(), expected)
    with pytest.raises(InputError, match="the point .*: width is 1; .* nothing but zeros"):
        _plan.programs(_study_file.parse(RESIDUAL.replace("input_width = 8", "input_width = 1")))


def test_networks_along_an_axis_are_how_many_points_have_and_nothing_else():
    """The points are those of the study without, and the plan has each one's own number."""
    study, plain = _study_file.parse(ALONG), _study_file.parse(GOOD)
    assert [p.networks for p in study.points()] == [50, 20] * 3
    assert [p.name for p in study.points()] == [p.name for p in plain.points()]
    assert [axis.name for axis in study.axes] == [axis.name for axis in plain.axes]
    made = _plan.make(study, _plan.programs(study))
    assert made.networks == 3 * (50 + 20)
    counts = {
        n: c for t in made.tasks for n, c in zip(t.names.tolist(), t.count.tolist(), strict=True)
    }
    assert counts == {p.name: p.networks for p in study.points()}


def test_a_point_that_is_there_twice_has_the_most_networks_that_are_asked():
    """Where a norm stands does not matter where there is none."""
    text = GOOD.replace('norm = ["none", "layer"]', "").replace("networks = 50", "")
    text = text.replace(
        "[inputs]",
        '[[axes]]\nnorm = ["none", "none"]\nnorm_position = ["pre", "post"]\n'
        "networks = [30, 40]\n[inputs]",
    )
    (group,) = _plan.programs(_study_file.parse(text))
    assert group.networks.tolist() == [40] * 6


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "the study file is not TOML"),
        ("[[axes]]\n" * 3 + "x = " + "[" * 10_000, "the study file is not TOML"),
        (changed("title", "titel"), r"titel: unknown entry 'titel' \(did you mean 'title'\?\)"),
        (changed("tanh", "tahn"), r"network.activation: unknown activation 'tahn' \(did you mean"),
        (changed("width = 30", "widht = 30"), "network.widht: unknown entry 'widht' "),
        (changed("width = 30", "width = 0"), "network.width is 0; it is a whole number from 1"),
        (changed("width = 30", "width = 30.0"), "network.width is 30.0; it is a whole number"),
        (changed("width = 30\n", ""), "network.width is missing; give one of width, widths"),
        (changed("depth = 6", "depth = true"), "network.depth is True; it is a whole number"),
        (
            changed("0.0, 0.1", "0.0, -0.1"),
            r"axes\[1\].sigma_b2\[1\] is -0.1; it is a number from 0",
        ),
        (changed("0.0, 0.1", "0.0, nan"), r"axes\[1\].sigma_b2\[1\] is nan"),
        (changed("0.0, 0.1", "0.0, 1" + "0" * 400), r"axes\[1\].sigma_b2\[1\] is 1000"),
        (changed("0.0, 0.1", ""), r"axes\[1\].sigma_b2 is \[\]; it is a list of values"),
        (changed("0.0, 0.1", "0.0"), r"axes\[1\] has values of several lengths"),
        (changed('"none", "layer"', '"none", "leyer"'), r"axes\[1\].norm\[1\]: unknown norm"),
        (changed("points = 3", "points = 1"), r"axes\[0\].sigma_w2.points is 1"),
        (changed("points = 3", "point = 3"), r"axes\[0\].sigma_w2.point: unknown entry 'point'"),
        (changed("points = 3", 'points = 3, spacing = "log"'), "unknown spacing 'log'"),
        (changed("points = 3", "points = 900000"), "axes have 1800000 points in all; a study has"),
        (
            changed("[0.0, 0.1]", "[0.0, 0.0]\nkeep_rate = [1.0, 1.0]").replace(
                'norm = ["none", "layer"]', ""
            ),
            "twice",
        ),
        (
            changed("[inputs]", "[[axes]]\nwidth = [1]\n[inputs]"),
            r"axes\[2\].width also stands at network.width",
        ),
        (changed("[[axes]]", "[axes]"), "the study file is not TOML"),
        (changed("[inputs]", "[[axes]]\n[inputs]"), r"axes\[2\] is {}; it is a table"),
        (changed("seed = 7", "seed = -1"), "sampling.seed is -1; it is a whole number from 0"),
        (changed("networks = 50", "networks = 1e3"), "sampling.networks is 1000.0"),
        (
            changed("networks = 50", "target = { q = 0 }"),
            "sampling.target.q is 0; it is a number above",
        ),
        (
            changed("networks = 50", "target = { p = 1 }"),
            "sampling.target.p: unknown statistic 'p'",
        ),
        (changed("networks = 50", "round = 3"), "sampling.round goes with a target"),
        (changed("networks = 50", ""), "sampling.networks is missing; give it, there or along an"),
        (
            changed("sigma_b2 =", "networks = [1, 2]\nsigma_b2 ="),
            r"axes\[1\].networks also stands at sampling.networks; it has one place",
        ),
        (
            ALONG.replace("sigma_w2 =", "networks = [1, 2, 3]\nsigma_w2 ="),
            r"axes\[1\].networks also stands at axes\[0\].networks; it has one place",
        ),
        (
            ALONG.replace("seed = 7", "target = { q = 0.1 }"),
            r"axes\[1\].networks takes the place of sampling.target",
        ),
        (ALONG.replace("[50, 20]", "[50]"), r"axes\[1\] has values of several lengths \(sigma_b2"),
        (ALONG.replace("[50, 20]", "[50, 0]"), r"axes\[1\].networks\[1\] is 0; it is a whole"),
        (ALONG.replace("[50, 20]", "[50, 2.5]"), r"axes\[1\].networks\[1\] is 2.5; it is a whole"),
        (
            ALONG.replace("[0.0, 0.1]", "[0.1, 0.1]").replace('"layer"', '"none"'),
            r"axes\[1\] has \(0.1, 'none'\) twice",
        ),
        (
            changed("networks = 50", "").replace(
                "[inputs]", "[[axes]]\nnetworks = [1, 2]\n[inputs]"
            ),
            r"axes\[2\] has networks alone; give a field",
        ),
        (changed("batch = 2", "batch = 1"), "inputs.correlation is between inputs"),
        (changed("= 0.5\n[sam", "= -1.5\n[sam"), "inputs.correlation is -1.5"),
        (changed("bins = 20", "bins = 0"), "histograms.log_gradient_norm.bins is 0"),
        (changed("to = 5", "to = -5"), "histograms.log_gradient_norm.to is -5.0; it is above"),
        (changed("log_gradient_norm =", "log_gradient_nrom ="), "did you mean 'log_gradient_norm'"),
        (
            changed('"tanh"', '"tanh"\nscale = 1.0'),
            "network.scale is of networks of kind 'residual'",
        ),
        (
            changed('"tanh"', '"tanh"\nweights = "he"'),
            r"axes\[0\].sigma_w2 takes the place of network.w",
        ),
        (changed('"tanh"', '"tanh"\nnorm_position = "post"'), None),
        (
            changed('"tanh"', '"tanh"\nwidths = [3, 4]'),
            "network.widths takes the place of network.wid",
        ),
        (changed("[histograms]", '[statistics]\nmeasure = ["q"]\n[histograms]'), "is not measured"),
        (
            changed("[histograms]", "[theory]\nfinite_width = 1\n[histograms]"),
            "theory.finite_width is 1",
        ),
        (changed("title", '"a\\u001b\\nb" = 1\ntitle'), r"'a\\x1b\\nb': unknown entry"),
        (
            changed("= 0.5\n[sam", "= -1.0\n[sam").replace("batch = 2", "batch = 3"),
            "it is at least -0.5",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_path(text, message):
    if message is None:
        _study_file.parse(text)
        return
    with pytest.raises(InputError, match=message) as error:
        _study_file.parse(text)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 800


ODD = (
    "0",
    "-1",
    "1e400",
    "nan",
    "true",
    '"tanh"',
    "[]",
    "{}",
    "[1, 2]",
    '"\\n"',
    "1979-05-27",
    "1" * 30,
)
ODD += ("0.5", "3", '""', "{ from = 1, to = 2, points = 2 }", "[[1]]", '["relu", "tanh"]', "9" * 9)


def mutated(text, draw):
    """A good file with one to three things changed."""
    for _ in range(draw.randint(1, 3)):
        kind = draw.randrange(6)
        lines = text.splitlines()
        place = draw.randrange(len(text)) if text else 0
        if kind == 0:  # a character is lost
            text = text[:place] + text[place + 1 :]
        elif kind == 1:  # or is another
            text = text[:place] + draw.choice("aZ09.-_=[]{}\"',\n\t \0é#") + text[place + 1 :]
        elif kind == 2 and lines:  # a line is lost
            del lines[draw.randrange(len(lines))]
            text = "\n".join(lines)
        elif kind == 3 and lines:  # or is there twice, somewhere else
            lines.insert(draw.randrange(len(lines)), draw.choice(lines))
            text = "\n".join(lines)
        elif kind == 4:  # a value is something else
            values = list(re.finditer(r"= *([^,}\n]+)", text))
            if values:
                value = draw.choice(values)
                text = text[: value.start(1)] + draw.choice(ODD) + text[value.end(1) :]
        else:  # a name is that of something else
            words = list(re.finditer(r"[a-z_0-9]+", text))
            if len(words) > 1:
                one, other = draw.choice(words), draw.choice(words)
                text = text[: one.start()] + other.group() + text[one.end() :]
    return text


def valid(text):
    try:
        study = _study_file.parse(text)
        _plan.make(study, _plan.programs(study))
    except InputError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_500_mutations_are_valid_or_one_sentence_and_nothing_is_written(
    tmp_path, monkeypatch, capsys
):
    """Of three files, drawn with a fixed seed; each refused one at the command line as well."""
    draw = random.Random(0)
    file, out = tmp_path / "study.toml", tmp_path / "out"
    refused = 0
    for number in range(500):
        text = mutated((GOOD, RESIDUAL, ALONG)[number % 3], draw)
        if valid(text):
            continue
        refused += 1
        file.write_bytes(text.encode())
        monkeypatch.setattr(sys, "argv", ["gradflow", "study", str(file), "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert (stop.value.code, said.out) == (2, ""), text
        assert said.err.startswith("gradflow: "), text
        assert len(said.err.splitlines()) == 1, text
        assert not out.exists(), text
    assert 200 < refused < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"\xff\xfe", "not text in UTF-8"), (b"x" * (1 << 25), "16 MiB")],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, message):
    file = tmp_path / "study.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        _study_file.load(file)


GRID = """
[network]
kind = "residual"
activation = "tanh"
width = 12
depth = 3
[[axes]]
sigma_w2 = [0.5, 1.0, 2.0]
[[axes]]
sigma_b2 = [0.1, 0.2]
[[axes]]
scale = [0.3, 0.5]
keep_rate = [0.9, 1.0]
[[axes]]
mean_square = [0.5, 2.0]
[sampling]
networks = 1
"""


@pytest.mark.parametrize("joint", [False, True])
def test_points_made_together_are_those_made_one_by_one(monkeypatch, joint):
    points = list(_study_file.parse(GRID).points())
    if joint:  # σ_w decided by two fields together
        own = Point.network

        def network(point):
            factor = 1 + point.settings["sigma_b2"] * point.settings["scale"]
            return jax.tree.map(lambda leaf: leaf * factor, own(point))

        monkeypatch.setattr(Point, "network", network)
    family = Family(points[0])
    for some in (points[:5], points[5:]):
        networks, inputs = family(some)
        for row, point in enumerate(some):
            alone = jax.tree.leaves(point.network())
            assert alone == [leaf[row] for leaf in jax.tree.leaves(networks)]
            np.testing.assert_array_equal(inputs[row], point.inputs())
