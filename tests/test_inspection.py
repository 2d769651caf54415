"""What an inspection says: verdict, differences, tables, files; and what is refused."""

import json
import math
import sys

import commands
import inspections
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import gradflow
from gradflow._differences import Status
from gradflow.errors import InputError
from gradflow.inspection import _adapters
from gradflow.inspection._measuring.births import Born
from gradflow.inspection._places import Places
from gradflow.inspection._reading.model import Model


def test_the_verdict_has_the_factor_between_layers_that_are_alike_and_their_names():
    """-0.9 a layer in log ‖∂C/∂z‖: ×e^-0.9 = 0.407, over 9 layers ×e^-8.1 = 0.00030."""
    found = inspections.found(inspections.dense(10))
    assert found.verdict.kind == "vanishing"
    assert found.verdict.factor == pytest.approx(math.exp(-0.9), rel=1e-2)
    assert found.verdict.factor_theory == pytest.approx(math.exp(-0.9), rel=1e-12)
    sentence = found.verdict.sentence
    assert sentence.startswith("gradients vanish ×0.40")
    assert "from MLP/Dense_9 down to MLP/Dense_0, ×0.0003 over 9 layers" in sentence
    assert repr(found).startswith(sentence)
    assert str(found).startswith(sentence[:100])


@pytest.mark.parametrize(
    ("slope", "kind", "words"),
    [
        (0.5, "exploding", "gradients explode ×1.65 a layer (theory ×1.65)"),
        (0.01, "critical", "gradients keep their size"),
        (-200.0, "vanishing", "×1e-782 over 9 layers"),
    ],
)
def test_verdicts(slope, kind, words):
    verdict = inspections.found(inspections.dense(10), slope=slope).verdict
    assert verdict.kind == kind
    assert words in verdict.sentence


def sound_norms(found):
    return found.estimates["log_gradient_norm"].value


def test_layers_that_gradients_go_around_are_left_out_of_the_verdict():
    """As blocks whose last scale begins at 0: 6 layers of 8 have none."""
    sound = inspections.found(inspections.residual(3))
    norms = np.tile(sound_norms(sound), (20, 1))
    norms[:, 1:7] = -np.inf
    values = {key: np.tile(one.value, (20, 1)) for key, one in sound.estimates.items()}
    values |= {"log_gradient_norm": norms, "log_gradient_variance": 2 * norms}
    verdict = inspections.found(inspections.residual(3), values=values).verdict
    assert verdict.kind == "vanishing"
    assert verdict.factor == pytest.approx(math.exp(-0.9), rel=1e-2)
    assert "6 of 8 layers, as " in verdict.sentence
    assert "have no gradient at step 0" in verdict.sentence


def test_dead_networks_and_numbers_that_are_not_finite_come_first():
    sound = inspections.found(inspections.dense(10))
    norms = np.tile(sound.estimates["log_gradient_norm"].value, (20, 1))
    norms[:5, 0] = -np.inf
    values = {
        key: np.tile(estimate.value, (20, 1)) for key, estimate in sound.estimates.items()
    } | {"log_gradient_norm": norms}
    some_sites = inspections.found(inspections.dense(10), values=values).verdict
    assert some_sites.kind == "vanishing"  # a pooled site without a gradient is no dead network
    values["log_gradient_variance"] = np.where(np.isinf(norms), norms, 2 * sound_norms(sound))
    verdict = inspections.found(inspections.dense(10), values=values).verdict
    assert verdict.kind == "dead"
    assert verdict.dead == 0.25
    assert verdict.sentence.startswith("dead: 5 of 20 networks have no gradient at MLP/Dense_0")
    born = Born("NaN", "forward", "exp", "MLP/Exp_3", "MLP/Dense_3", 2)
    verdict = inspections.found(inspections.dense(10), born=born).verdict
    assert verdict.sentence.startswith("not finite: first NaN in `MLP/Exp_3` (exp), after MLP/Den")


def test_layers_in_branches_are_told_from_those_that_every_signal_passes():
    places = inspections.found(inspections.residual(3)).places
    assert places.on_trunk.tolist() == [True, *[False] * 6, True]
    assert places.depth.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert places.comparable().tolist() == [1, 3, 5]  # the first product of each block
    assert places.shapes[1] == (4, 32)
    two = inspections.read_model(inspections.dense(2), 8)
    assert Places.of(*two).comparable().tolist() == [0, 1]


def test_a_difference_is_one_of_the_width_or_it_differs():
    """Null: values of N(theory, 0.01²/20); shifts of 0.3 and 3 in log q, beside Σ 1/8 over 1, 10.

    Of 10 · 11 comparisons 1 % show a false alarm anywhere: the threshold is that of all of them.
    """
    plain = inspections.found(inspections.dense(10))
    assert not sum((c.status == Status.DIFFERS).sum() for c in plain.by_statistic.values())
    values = {
        key: np.asarray(estimate.log_value if key.startswith("log_") else estimate.value)
        for key, estimate in plain.estimates.items()
    }
    values["log_gradient_norm"] = plain.estimates["log_gradient_norm"].value
    values["log_q"] = (
        values["log_q"] + np.where(np.arange(10) == 9, 0.3, 0) + 3 * (np.arange(10) == 0)
    )
    draw = np.random.default_rng(1)
    measured = {key: v + 0.01 * draw.normal(size=(20, 10)) for key, v in values.items()}
    found = inspections.found(inspections.dense(10), values=measured)
    assert found["q"].status[[0, 9]].tolist() == [Status.DIFFERS, Status.FINITE_WIDTH]
    assert found["q"].z[0] > 100
    assert "most q at MLP/Dense_0" in found.agreement
    assert "sum of 1/width" in found.agreement
    assert "8 to 8 units" in found.agreement


def test_where_theory_ends_is_said_and_nothing_is_compared_there():
    found = inspections.found(inspections.dense(10), known=0.5)
    assert found.theory_ends == (
        "theory reaches 5 of 10 layers; theory ends at MLP/Custom_2: `sort` over units"
    )
    assert (found["q"].status[5:] == Status.NOT_COMPARED).all()
    assert (found["q"].status[:5] == Status.AGREES).all()
    single = inspections.found(inspections.dense(4), networks=1)
    assert single.agreement == "nothing is compared: one network has no standard error"


@pytest.mark.medium
def test_files_have_everything_and_the_page_needs_no_other(tmp_path):
    found = inspections.found(inspections.residual(3))
    written = {path.name for path in found.save(tmp_path / "new")}
    assert written == {
        *("results.nc", "report.html", "inspected-layers.png", "inspected-parameters.png")
    }
    dataset = xarray.load_dataset(tmp_path / "new" / "results.nc")
    assert dataset.attrs["verdict"] == found.verdict.sentence
    np.testing.assert_array_equal(dataset.q_z, found["q"].z)
    assert dataset.layer_name.values.tolist() == list(found.places.names)
    assert dataset.parameter.values[:2].tolist() == ["['in']", "['up_0']"]  # in order of use
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "src=" not in page
    assert page.count("<svg") == 2
    assert "down_2" in page


def test_very_many_layers_have_a_table_and_figures_that_can_be_read():
    found = inspections.found(inspections.dense(300), networks=3)
    _, rows = found.rows()
    assert len(rows) == 40
    assert (rows[0][0], rows[-1][0]) == ("MLP/Dense_0", "MLP/Dense_299")
    figure = found.figures()["inspected_layers"]
    assert len(figure.axes[-1].get_xticks()) <= 40


def two_layers():
    def init(key):
        a, b = jax.random.split(key)
        return {"a": jax.random.normal(a, (5, 30)) / 5**0.5, "b": jax.random.normal(b, (30, 3))}

    def apply(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    return init, apply


@pytest.mark.medium
def test_given_weights_with_a_loss_have_the_gradients_of_that_loss():
    init, apply = two_layers()
    parameters = init(jax.random.key(3))
    x, y = np.ones((4, 5), np.float32), np.zeros((4, 3), np.float32)

    def loss(out, target):
        return jnp.mean((out - target) ** 2)

    found = gradflow.inspect(init, apply, x, loss=loss, targets=y, parameters=parameters)
    gradients = jax.grad(lambda p: loss(apply(p, x), y))(parameters)
    expected = [np.log(np.linalg.norm(gradients[n])) for n in ("a", "b")]
    assert found.leaves.names == ("['a']", "['b']")
    np.testing.assert_allclose(list(found.log_gradient_norms.values()), expected, rtol=1e-5)
    sizes = [np.log(np.linalg.norm(parameters[n])) for n in ("a", "b")]
    np.testing.assert_allclose(found.leaves.log_relative, np.subtract(expected, sizes), rtol=1e-5)
    z = x @ np.asarray(parameters["a"])
    assert found.estimates["log_q"].value[0] == pytest.approx(np.mean(z**2), rel=1e-5)
    assert found.networks == 1
    assert np.isnan(found["q"].z).all()


def test_a_model_with_weights_and_a_law_says_which_were_measured(monkeypatch):
    """As one of Keras: drawn anew, and said; its own with ``parameters=model``."""
    own = {"a": jnp.ones((5, 30)), "b": jnp.ones((30, 3))}
    init, apply = two_layers()
    model = Model("net", lambda key: (init(key), ()), lambda p, s, k, x: apply(p, x), (own, ()))  # noqa: ARG005
    monkeypatch.setattr(_adapters, "adapt", lambda *_: model)
    x = np.ones((2, 5))
    drawn = gradflow.inspect(model, x, networks=2, cure=False)
    assert "its weights drawn anew (with parameters=model its own are measured)" in repr(drawn)
    found = gradflow.inspect(model, x, parameters=model, cure=False)
    assert found.networks == 1
    assert found.estimates["log_q"].value[0] == pytest.approx(25)
    assert "drawn anew" not in repr(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": None}, "inputs is None; it is an array"),
        ({"inputs": "x"}, "inputs has dtype"),
        ({"inputs": np.full((2, 5), np.nan)}, "inputs has values that are not finite"),
        ({"inputs": (np.ones((2, 5)), np.ones((0, 5)))}, r"inputs\[1\] has shape \(0, 5\)"),
        ({"networks": 0}, "networks is 0; it is"),
        ({"loss": 3}, "loss is 3; it is a function"),
        ({"targets": np.ones(2)}, "targets is given and loss is None"),
        ({"loss": lambda out: out}, "loss returns an array of shape"),
        ({"loss": lambda out: out.nothing}, "loss cannot be|loss"),
        ({"parameters": {"a": np.ones((5, 30))}}, r"parameters\['b'\] has shape none"),
        (
            {"parameters": {"a": np.full((5, 30), np.nan), "b": np.ones((30, 3))}},
            "NaN or infinite",
        ),
        ({"inputs": np.ones((2, 4))}, r"inputs is float\d\d \(2, 4\); model cannot be applied"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_calls_are_one_sentence_each(arguments, message):
    init, apply = two_layers()
    given = {"inputs": np.ones((2, 5)), "networks": 2} | arguments
    with pytest.raises(InputError, match=message) as caught:
        gradflow.inspect(init, apply, given.pop("inputs"), **given)
    assert "\n" not in str(caught.value)


@pytest.fixture
def module(tmp_path):
    """A module of a user's own, which prints; its name."""
    (tmp_path / "own_model.py").write_text(
        "import jax\nimport jax.numpy as jnp\nprint('loading')\n"
        "def init(key):\n    return jax.random.normal(key, (5, 5))\n"
        "def apply(w, x):\n    return jnp.tanh(jnp.tanh(x @ w) @ w)\n"
        "net = (init, apply)\nnumber = 3\n"
        "def loss(out, target):\n    return jnp.mean((out - target) ** 2)\n"
    )
    (tmp_path / "broken_model.py").write_text("raise SystemExit(3)\n")
    yield "own_model"
    for name in ("own_model", "broken_model"):
        sys.modules.pop(name, None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


@pytest.mark.medium
def test_the_command_prints_json_alone_and_writes_files(tmp_path, module):
    np.savez(tmp_path / "batch.npz", x=np.ones((4, 5)), target=np.zeros((4, 5)))
    done = commands.run(
        *("inspect", f"{module}:net", "--data", "batch.npz", "--loss", f"{module}:loss"),
        *("--networks", "3", "--json", "--out", "made"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["networks"] == 3
    assert len(found["layers"]["log_q"]) == 2
    assert len(found["parameters"]["log_relative_gradient"]) == 1
    assert "loading" in done.stderr
    assert "3 networks done" in done.stderr
    assert (tmp_path / "made" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_model:net"], "give the shape of each input"),
        (["own_model:net", "--input", "4,x"], "input is '4,x'; it is a shape, as 32,784"),
        (["own_model:net", "--input", "4,0"], "sizes are whole numbers of at least 1"),
        (["own_model:net", "--input", "4,5:int<0"], "the first int that is too large is from 1"),
        (["own_model:net", "--input", "4,5:float<3"], "input is '4,5:float<3'; it is a shape"),
        (["own_model:net", "--input", "4,5:complex64"], "of the dtypes float, float16"),
        (["own_model:net", "--input", "4,5", "--networks", "0"], "networks is 0"),
        (["own_model:net", "--data", "none.npz"], "cannot be read: No such file"),
        (["own_model:net", "--data", "own_model.py"], "is not an .npy or .npz file"),
        (["own_model:net", "--input", "4,6"], "model cannot be applied to it"),
        (["own_model:none", "--input", "4,5"], "'own_model' has no 'none'"),
        (["own_model:number", "--input", "4,5"], "model is an object of int"),
        (["own_model", "--input", "4,5"], "it is module:function"),
        (["broken_model:net", "--input", "4,5"], "importing 'broken_model' raised SystemExit"),
        (["own_model:net", "--input", "4,5", "--loss", "own_model:number"], "loss is 'own_model"),
    ],
)
@pytest.mark.usefixtures("module")
def test_wrong_commands_are_one_sentence_each(tmp_path, arguments, message):
    done = commands.run("inspect", *arguments, "--out", "made", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not done.stdout
