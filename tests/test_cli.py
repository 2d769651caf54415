"""The command line as a user meets it; in a process of its own where that makes a difference."""

import functools
import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
import xarray
from rich.table import Table
from typer.testing import CliRunner

from gradflow import cli, experiments, remedies
from gradflow.cli import _options, _output

COMMANDS = [c.name or c.callback.__name__ for c in cli.app.registered_commands]
SMALL = ["--width", "20", "--depth", "4", "--networks", "8"]


def gradflow(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-c", "from gradflow.cli import main; main()", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def here(tmp_path):
    """Runs a command in this process, in a new folder."""
    return functools.partial(commands.run, cwd=tmp_path)


@pytest.mark.medium
def test_the_saturation_threshold_is_an_option(tmp_path, here):
    """tanh's slope 1 - tanh²(z) is below t where |z| is above artanh √(1-t); z ~ N(0, q)."""
    done = here("compare", *SMALL, "--inputs", "1", "--saturation-threshold", "0.6", "--out", "o")
    assert done.returncode == 0, done.stderr
    dataset = xarray.load_dataset(tmp_path / "o" / "results.nc")
    least = math.atanh(math.sqrt(1 - 0.6))
    expected = [math.erfc(least / math.sqrt(2 * q)) for q in dataset.q_theory.values.tolist()]
    np.testing.assert_allclose(dataset.saturation_theory, expected, rtol=1e-6)


@pytest.mark.medium
def test_compare_prints_a_table_a_verdict_and_what_it_wrote(tmp_path, here):
    done = here("compare", *SMALL, "--out", "made")
    assert done.returncode == 0, done.stderr
    for word in ("statistic", "theory", "log_gradient_norm", "verdict", "agreement", "matrix_free"):
        assert word in done.stdout
    assert "compiling" in done.stderr
    dataset = xarray.load_dataset(tmp_path / "made" / "results.nc")
    assert dataset.q_theory.size == 4
    assert dataset.attrs["seed"] == 0
    assert len(list((tmp_path / "made").glob("*.png"))) == 5


@pytest.mark.slow
def test_one_layer_and_one_network_have_a_table_too(here):
    done = here("compare", "--width", "9", "--depth", "1", "--networks", "1")
    assert done.returncode == 0, done.stderr
    assert "log_gradient_norm" in done.stdout
    assert "nothing is compared: one network" in done.stdout
    assert "nan" not in done.stdout


@pytest.mark.slow
def test_train_prints_a_table_findings_and_writes_a_figure(tmp_path, here):
    small = ["--width", "10", "--depth", "2", "--networks", "2", "--steps", "20"]
    chosen = ["--activation", "erf", "--weights", "he"]
    done = here("train", *small, *chosen, "--out", "made")
    assert done.returncode == 0, done.stderr
    for word in ("erf, he", "moved", "- erf, he: of the hidden layers", "updates done"):
        assert word in done.stdout + done.stderr
    dataset = xarray.load_dataset(tmp_path / "made" / "layers.nc")
    assert dataset.movement.sizes["seed"] == 2
    assert (tmp_path / "made" / "layers.png").stat().st_size > 10_000
    assert not list((tmp_path / "made").glob("unfinished*"))
    how = ["--learning-rate", "1e-6,0.5", "--clip", "norm:1", "--noise", "1e-4"]
    one = here("train", "layers", *small, *chosen, *how, "--json")
    found = json.loads(one.stdout)
    assert found["rows"][0]["rate"] == 0.5
    assert found["experiment"] == "layers"
    assert found["rows"][0]["gradient"] > 0
    assert "erf, he" in found["findings"][0]


@pytest.mark.usefixtures("unchecked")
def test_help_of_train_lists_the_experiments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gradflow", "train", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    for name in experiments.ALL:
        assert name in shown


@pytest.mark.medium
def test_json_is_json_and_nothing_else(tmp_path, here):
    done = here(
        *("compare", "--networks", "8", "--widths", "30,20,10", "--seed", str(1 << 40), "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (file,) = (name for name in found["files"] if name.endswith(".nc"))
    assert xarray.load_dataset(tmp_path / file).attrs["seed"] == str(1 << 40)
    assert found["widths"] == [30, 20, 10]
    assert found["verdict"]["kind"] in ("vanishing", "exploding", "critical")
    assert len(found["layers"]["q_theory"]) == 2
    assert found["layers"]["chi_theory"][-1] is None  # there is no NaN in JSON


def test_list_names_everything(here):
    found = json.loads(here("list", "--json").stdout)
    assert {"tanh", "relu", "logistic"} <= set(found["activations"])
    assert {"glorot", "standard", "unscaled"} <= set(found["weights"])


@pytest.mark.slow
def test_theory_prints_what_it_reports(here):
    arguments = ("theory", "--activation", "tanh", "--sigma-w2", "1.5", "--sigma-b2", "0.05")
    found = json.loads(here(*arguments, "--json").stdout)
    (point,) = found["fixed_points"]
    assert point["q_star"] == pytest.approx(0.418037200533478, rel=1e-9)  # table 2
    assert point["stable"] is True
    assert found["xi_c"] == pytest.approx(15.79099403412, rel=1e-9)
    assert (found["phase"], found["status"]) == ("ordered", "converges")
    assert found["slope_second_moment"] == pytest.approx(point["chi1"] / 1.5, rel=1e-9)
    assert found["universality_class"] == "K* = 0"
    assert found["q_star_from_1"] == point["q_star"]
    # table 4
    assert found["correlation_map"]["-0.5"] == pytest.approx(-0.31053399413058234, rel=1e-9)
    assert found["correlation_map_slope"]["0.9"] == pytest.approx(0.9201092723598791, rel=1e-9)
    assert (found["correlation_map"]["1"], found["correlation_map_slope"]["1"]) == pytest.approx(
        (1, point["chi1"]), rel=1e-9
    )
    text = here(*arguments).stdout
    assert "0.4180372005" in text
    relu = ("theory", "--activation", "relu", "--sigma-w2", "2", "--sigma-b2", "0.1", "--json")
    found = json.loads(here(*relu).stdout)
    assert (found["fixed_points"], found["status"]) == ([], "diverges")
    assert (found["q_star_from_1"], found["correlation_map"]) == ("inf", {})
    assert (found["chi1"], found["xi_grad"], found["xi_c"]) == (1, "inf", "inf")


@pytest.mark.slow
def test_where_every_length_is_kept_theory_has_the_tables_one_fixed_point(here):
    arguments = ("theory", "--activation", "leaky_relu_0.2", "--sigma-w2", str(2 / 1.04))
    found = json.loads(here(*arguments, "--json").stdout)
    (point,) = found["fixed_points"]
    assert (point["q_star"], point["stable"]) == (None, None)
    assert (point["chi1"], point["chi_par"]) == (1, 1)
    assert (point["xi_q"], point["xi_grad"]) == ("inf", "inf")
    assert (found["status"], found["q_star_from_1"]) == ("neutral", 1)


@pytest.mark.slow
def test_critical_prints_what_it_reports(here):
    arguments = ("critical", "--activation", "gelu", "--sigma-b2", "0")
    found = json.loads(here(*arguments, "--json").stdout)
    assert found["universality_class"] == "half-stable"
    assert found["half_stable"][0]["sigma_b2"] == pytest.approx(0.172922390756, rel=1e-9)
    assert found["solutions"][0]["q_star"] == 0
    assert found["solutions"][0]["sigma_w2"] == pytest.approx(4, rel=1e-12)
    assert found["solutions"][0]["xi_q"] == "inf"
    assert found["half_stable"][0]["q_star"] == pytest.approx(3.56155281280883, rel=1e-9)
    assert "half-stable points" in here(*arguments).stdout


@pytest.mark.slow
def test_critical_points_have_what_the_table_has(here):
    arguments = ("critical", "--activation", "mish", "--sigma-b2", "0.01", "--json")
    (point,) = json.loads(here(*arguments).stdout)["solutions"]
    assert point["sigma_w"] == pytest.approx(1.5409748725502057, rel=1e-9)  # table 3
    assert point["q_stable"] is False
    assert point["coefficient"] == pytest.approx(0.0932249672309703, rel=1e-9)
    assert (point["exponent"], point["one_minus_c"]) == (2, "1/(coefficient l)")
    relu = ("critical", "--activation", "relu", "--json")
    (point,) = json.loads(here(*relu).stdout)["solutions"]
    assert (point["q_star"], point["sigma_w2"], point["q_stable"]) == (None, 2, None)
    assert (point["exponent"], point["one_minus_c"]) == (1.5, "4/(coefficient l)²")
    assert point["coefficient"] == pytest.approx(0.3001054387190354, rel=1e-9)
    biased = ("critical", "--activation", "relu", "--sigma-b2", "0.1", "--json")
    found = json.loads(here(*biased).stdout)
    assert (found["solutions"], found["at_infinity"]["q_star"]) == ([], "inf")
    assert found["at_infinity"]["sigma_w2"] == 2


@pytest.mark.slow
def test_spectrum_prints_what_it_reports(tmp_path, here):
    arguments = ("spectrum", "--activation", "relu", "--sigma-w2", "2", "--q", "1", "--depth", "1")
    done = here(*arguments, "--simulate", "2", "--width", "30", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["atoms"] == [{"squared_singular_value": 0, "mass": 0.5}]
    assert found["mean_squared_singular_value"] == pytest.approx(1, rel=1e-12)
    # Half of the rows of a square Gaussian matrix of variance 2/n: Marchenko-Pastur.
    edge = 2 * (1 + 0.5**0.5) ** 2
    assert found["squared_singular_value_upper_edge"] == pytest.approx(edge, rel=1e-9)
    dataset = xarray.load_dataset(tmp_path / found["files"][0])
    assert dataset.singular_value_density_theory.size == 1000
    assert dataset.attrs["networks"] == 2
    text = here(*arguments).stdout
    assert "50 % at s² = 0" in text


@pytest.mark.slow
def test_phase_prints_the_critical_line(tmp_path, here):
    arguments = ("phase", "--points", "5", "--sigma-b", "0.25", "1.25", "--json")
    done = here(*arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first = found["critical_line"][0]
    assert first["sigma_b"] == 0.25
    assert first["sigma_w"] == pytest.approx(1.3515517730690, rel=1e-9)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert (tmp_path / found["files"][1]).stat().st_size > 0


@pytest.mark.slow
def test_prescribe_says_what_to_do_and_what_others_give(here):
    arguments = ("prescribe", "--activation", "relu", "--widths", "64,100,100,10")
    found = json.loads(here(*arguments, "--json").stdout)
    assert found["weight_sd"] == pytest.approx([(2 / 64) ** 0.5, 0.02**0.5, 0.02**0.5])
    assert {e["name"] for e in found["instead"]} == {"glorot", "he", "lecun"}
    text = here(*arguments).stdout
    assert "standard deviation of weights" in text
    assert "gradients change by ×" in text


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_there_with_examples(command, here):
    done = here(*command.split(), "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    if command and command != "list":
        assert "Examples" in done.stdout
        assert f"gradflow {command}" in done.stdout


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--activation", "tanhh"], "did you mean 'tanh'"),
        (["compare", "--weights", "glorott"], "did you mean 'glorot'"),
        (["compare", "--width", "0"], "width is 0; it is a whole number of at least 1"),
        (["compare", "--depth", "-3"], "depth is -3"),
        (["compare", "--depth", "1000000000"], "depth is 1000000000, which needs"),
        (["compare", "--depth", "10000000000"], "depth is 10000000000; it is a whole number of at"),
        (["prescribe", "--depth", "1000000000"], "depth is 1000000000, which needs"),
        (["prescribe", "--widths", "9,9999999999"], "widths is '9,9999999999'; it is the input's"),
        (["note", "--networks", "1"], "networks is 1; it is a whole number of at least 2"),
        (["note", "--uniform-networks", "0"], "uniform_networks is 0"),
        (["compare", "--networks", "0"], "networks is 0"),
        (
            ["compare", "--saturation-threshold", "2"],
            "saturation_threshold is 2.0; it is a",
        ),
        (["compare", "--inputs", "5000"], "there are 1797 digit images"),
        (["compare", "--sigma-w", "nan"], "sigma_w is nan; it is a finite number above 0"),
        (["compare", "--sigma-b", "inf"], "sigma_b is inf"),
        (["compare", "--sigma-b", "1e300"], "sigma_b is 1e+300; it is at most 1e+150"),
        (["compare", "--weights", "he", "--sigma-w", "1"], "sigma_w is 1.0 and weights is 'he'"),
        (["compare", "--widths", "10,x"], "widths is '10,x'"),
        (["compare", "--widths", ""], "widths is ''"),
        (["compare", "--widths", "9,9", "--width", "9"], "widths is '9,9' and width is 9; the fi"),
        (["prescribe", "--widths", "9,9", "--depth", "9"], "widths is '9,9' and depth is 9"),
        (["prescribe", "--target", "1"], "target is 1.0, which means nothing without --transform"),
        (["spectrum", "--width", "9"], "width is 9, which means nothing without --simulate"),
        (["spectrum", "--q", "1", "--sigma-b2", "1"], "q is 1.0 and sigma_b2 is 1.0; the first"),
        (["study", "a/b.toml", "--depth", "3"], "No such option: --depth"),
        (["study", "a.toml", "--process", "3"], "process is 3, which means nothing without --coo"),
        (
            ["study", "a.toml", "--coordinator", "h:1", "--distributed"],
            "coordinator is 'h:1' and distributed is True",
        ),
        (
            ["study", "a.toml", "--coordinator", "h:1", "--processes", "2", "--process", "2"],
            "process is 2 and processes is 2; it is from 0 to one less",
        ),
        (["compare", "--sigma-w", "1e300"], "sigma_w is 1e+300; it is a finite number above 0"),
        (["compare", "--distribution", ""], "unknown distribution ''"),
        (["remedies", "--sigma-b", "1e300"], "sigma_b is 1e+300; it is at most 1e+150"),
        (["compare", "--out", ""], "out is ''; it is the name of a folder, new or not"),
        (["note", "--out", " "], "out is ' '; it is the name of a folder"),
        (["compare", "--out", "x" * 300], "which cannot be written to (file name too long)"),
        (["compare", "--activation", "a\x1b[31m\n\0b"], r"unknown activation 'a\x1b[31m\n\x00b'"),
        (["compare", "--weights", "x" * 100_000], "[9"),
        (["compare", "--seed", "99999999999999999999"], "less than or equal to"),
        (["compare", "--weights", "standard", "--sampler", "matrix_free"], "'uniform'"),
        (["compare", "--sampler", "sparse"], "unknown sampler 'sparse'"),
        (["compare", "--width", "10000000", "--weights", "standard"], "GiB"),
        (["compare", "--out", "/proc/nowhere"], "out is '/proc/nowhere'"),
        (["compare", "--widht", "3"], "--widht"),
        (["compare", "--width", "wide"], "wide"),
        (["note", "--depth", "1"], "depth is 1; it is a whole number of at least 3"),
        (["theory", "--sigma-w2", "-1"], "sigma_w2 is -1.0; it is a finite number, 0 or more"),
        (["theory", "--sigma-b2", "nan"], "sigma_b2 is nan"),
        (["theory", "--correlations", "0.5,-1.5"], "correlations is '0.5,-1.5'; it is numbers"),
        (["theory", "--start", "0"], "start is 0.0; it is a finite number above 0"),
        (["critical", "--activation", "gelo"], "did you mean 'gelu'"),
        (["critical", "--sigma-b2", "0", "--sigma-w2", "1"], "give one of them"),
        (["phase", "--points", "1"], "points is 1; it is a whole number of at least 2"),
        (["phase", "--points", "100000000"], "points is 100000000, which needs"),
        (["spectrum", "--points", "1000000000"], "points is 1000000000, which needs"),
        (
            ["spectrum", "--depth", "9999999999"],
            "depth is 9999999999; it is a whole number",
        ),
        (["spectrum", "--simulate", "9999999999"], "simulate is 9999999999; it is a whole number"),
        (
            ["compare", "--networks", "99999999999999999999"],
            "networks is 99999999999999999999",
        ),
        (["remedies", "--networks", "9999999999"], "of at most 2147483647"),
        (["theory", "--width", "9999999999"], "of at most 2147483647"),
        (["train", "--steps", "9999999999"], "steps is 9999999999; it is a whole number of at mo"),
        (["phase", "--sigma-w", "0", "1e300"], "sigma_w is from 0 to 1e+300; it is from a number"),
        (["phase", "--sigma-w", "3", "1"], "sigma_w is from 3 to 1"),
        (["spectrum", "--depth", "0"], "depth is 0"),
        (["spectrum", "--weights", "haar"], "'haar'"),
        (["spectrum", "--sigma-b2", "-1"], "sigma_b2 is -1.0"),
        (["spectrum", "--q", "-1"], "q is -1.0"),
        (["spectrum", "--simulate", "1", "--width", "1000000"], "width is 1000000, which needs"),
        (["spectrum", "--depth", "100000", "--out", "/proc/nowhere"], "out is '/proc/nowhere'"),
        (["spectrum", "--simulate", "-1"], "simulate is -1"),
        (["prescribe", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["prescribe", "--transform", "tatt"], "did you mean 'tat'"),
        (["prescribe", "--widths", "3"], "widths is '3'"),
        (["remedies", "--inputs", "3"], "inputs is 3; it is a whole number of at least 4"),
        (["remedies", "--weights", "glorott"], "did you mean 'glorot'"),
        (["remedies", "--sigma-b", "-1"], "sigma_b is -1.0"),
        (["train", "--learning-rate", "0"], "learning_rate is 0.0; it is a finite number above 0"),
        (["train", "--learning-rate", "0.1;1"], "learning_rate is '0.1;1'; it is numbers, several"),
        (["train", "--clip", "global_norm:1"], "did you mean 'global-norm'"),
        (["train", "--clip", "value"], "clip is 'value'; it is a name and a threshold"),
        (["train", "--noise", "-1"], "variance is -1.0; it is a finite number, 0 or more"),
        (["train", "--batch", "2000"], "batch is 2000, and there are 1257 samples"),
        (["train", "--data", "digit"], "did you mean 'digits'"),
        (["train", "--data", "none.npz"], "none.npz"),
        (["train", "--optimiser", "adamm"], "did you mean 'adam'"),
        (["train", "--networks", "0"], "networks is 0"),
        (["train", "--width", "1000000"], "GiB in training"),
        (["study", "none.toml"], "none.toml"),
        (["study", "--share", "1/2"], "--share goes with a study file"),
        (["compare", "--kind", "resnet"], "unknown kind 'resnet'"),
        (["compare", "--scale", "0.5"], "scale is of networks of kind 'residual'; leave it out"),
        (["compare", "--norm-position", "post"], "norm_position goes with norm, and there is none"),
        (["compare", "--sigma-w2", "-1"], "sigma_w2 is -1.0; it is a finite number above 0"),
        (["compare", "--kind", "residual", "--scale", "deep"], "unknown scale 'deep'"),
        (["compare", "--kind", "residual", "--widths", "9,9"], "widths is of networks of kind"),
        (["plan", "none.toml"], "no such file"),
        (["show", "nowhere"], "'nowhere', which holds no study"),
        (["report", "nowhere"], "'nowhere', which holds no study"),
        (["export", "nowhere", "--csv", "a.csv"], "'nowhere', which holds no study"),
        (["export", "nowhere"], "no format is given"),
        (["train", "layer"], "unknown experiment 'layer' (did you mean 'layers'?)"),
        (["train", "--depths", "1,2"], "experiment 'layers' has no use for --depths; it takes"),
        (
            ["train", "saturation", "--depths", "1,x"],
            "depths is '1,x'; it is whole numbers, several",
        ),
        (["train", "saturation", "--depths", "0"], "depth is 0"),
        (["studdy"], "studdy"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    """In this process: starting one takes longer than all that it does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradflow", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert message in printed.err
    said = [line for line in printed.err.splitlines() if not line.endswith("compiling")]
    assert len(said) == 1
    assert said[0].startswith("gradflow: ")
    assert len(said[0]) < 1300
    assert said[0].isprintable()
    assert not printed.out


STUDY = """
title = "a\\u001b[31m[red]\\u0000b\\nstudy     finished [/x]"
[network]
activation = "tanh"
weights = "glorot"
width = 8
depth = 3
[sampling]
networks = 4
"""


@pytest.mark.usefixtures("unchecked")
def test_text_of_a_file_does_not_drive_the_terminal(tmp_path, monkeypatch, capsys):
    (tmp_path / "study.toml").write_text(STUDY)
    shown = []
    for options in ([], ["--json"]):
        arguments = ["gradflow", "plan", str(tmp_path / "study.toml"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        shown.append(capsys.readouterr().out)
        assert all(line.isprintable() for line in shown[-1].splitlines())
    first = shown[0].splitlines()[0].rstrip()
    assert first == r"study     a\x1b[31m[red]\x00b study finished [/x]"
    assert json.loads(shown[1])["title"] == "a\x1b[31m[red]\0b\nstudy     finished [/x]"


@pytest.mark.parametrize("columns", ["0", "20", "200"])
def test_a_narrow_terminal_cuts_no_number(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    table = Table("quantity", "value")
    table.add_row("a", "0.12345678901234567890")
    _output.make_console().print(table)
    assert "0.12345678901234567890" in terminal.getvalue()


class Reached(Exception):
    """A command is about to write its results."""


def folder_of(arguments, monkeypatch):
    """Return where a command would write."""

    def stop(folder):
        raise Reached(folder)

    for module in (_options, cli._training):
        monkeypatch.setattr(module, "writable_folder", stop)
    monkeypatch.setattr(sys, "argv", ["gradflow", *arguments])
    with pytest.raises(Reached) as reached:
        cli.main()
    return str(reached.value)


# By command, what goes before, and values that ask for different things, none of them a default.
_NETWORK = {
    "--activation": ["relu", "leaky_relu_0.2"],
    "--depth": ["6", "7"],
    "--seed": ["1", "-1"],
}
OTHERS = {
    "compare": (
        [],
        _NETWORK
        | {
            "--weights": ["he", "orthogonal"],
            "--distribution": ["uniform", "gaussian"],
            "--sigma-b": ["0.5", "0.25", "1e-5"],
            "--width": ["6", "7"],
            "--networks": ["6"],
            "--inputs": ["3"],
            "--sampler": ["dense"],
        },
    ),
    "compare --widths": (["--sigma-w", "2"], {"--widths": ["9,8,7", "9,87", "98,7"]}),
    "compare --sigma-w": ([], {"--sigma-w": ["1.5", "15", "1"]}),
    "remedies": ([], _NETWORK | {"--weights": ["he"], "--sigma-b": ["0.5"], "--inputs": ["5"]}),
    "phase": (
        [],
        {
            "--activation": ["relu"],
            "--sigma-w": ["1 2", "1 2.5"],
            "--sigma-b": ["1 2"],
            "--points": ["6"],
            "--start": ["2"],
        },
    ),
    "correlation": (
        [],
        {
            "--activation": ["relu", "elu(0.5)"],
            "--sigma-w2": ["2", "3"],
            "--sigma-b2": ["0.5"],
            "--points": ["6"],
            "--start": ["2"],
        },
    ),
    "spectrum": (
        ["--simulate", "5"],
        _NETWORK
        | {
            "--sigma-w2": ["2", "3"],
            "--sigma-b2": ["0.5"],
            "--weights": ["orthogonal"],
            "--points": ["6"],
            "--width": ["6"],
        },
    ),
    "spectrum --q": ([], {"--q": ["0.5", "5"], "--simulate": ["5", "6"]}),
    "train": (
        [],
        _NETWORK
        | {
            "--weights": ["he"],
            "--data": ["a-b.npz", "a/b.npz", "A-b.npz", "x" * 300, "y" * 300],
            "--learning-rate": ["0.25", "0.25,0.5", "0.5,0.25"],
            "--clip": ["norm:1", "value:1"],
            "--optimiser": ["adam"],
            "--noise": ["0.1"],
        },
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("which", OTHERS)
def test_no_two_commands_share_a_folder(which, monkeypatch):
    """Every option with other values, alone and beside every other option."""
    command, (before, options) = which.split()[0], OTHERS[which]
    alone = [[name, *value.split()] for name, values in options.items() for value in values]
    firsts = [[name, *values[0].split()] for name, values in options.items()]
    both = [[*one, *other] for one, other in itertools.combinations(firsts, 2)]
    calls = [[], *alone, *both]
    found = [folder_of([command, *before, *call], monkeypatch) for call in calls]
    assert len(set(found)) == len(calls)
    assert all(len(Path(folder).name) < 200 for folder in found)
    # Only what is asked for matters, not how it is written.
    assert folder_of([command, *before, "--json"], monkeypatch) == found[0]


@pytest.mark.usefixtures("unchecked")
def test_a_default_that_is_written_out_is_the_same_command(monkeypatch):
    usual = folder_of(["compare"], monkeypatch)
    assert usual == "results/compare/tanh-glorot"
    assert folder_of(["compare", "--width", "1000", "--depth", "50"], monkeypatch) == usual
    assert folder_of(["train", "--seed", "0"], monkeypatch) == "results/train/layers"


def test_a_mistake_ends_the_process_with_one_sentence(tmp_path):
    done = gradflow("compare", "--activation", "tanhh", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gradflow: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_commands_keep_what_they_compiled_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    (tmp_path / "cache").touch()  # no folder can be made here: nothing is kept, and nothing said
    arguments = ("prescribe", "--activation", "relu", "--widths", "9,9,9", "--json")
    first = gradflow(*arguments, cwd=tmp_path)
    assert (first.returncode, "Warning" in first.stderr) == (0, False)
    (tmp_path / "cache").unlink()
    second = gradflow(*arguments, cwd=tmp_path)
    assert len(list((tmp_path / "cache" / "gradflow").glob("*/*-cache"))) > 3
    third = gradflow(*arguments, cwd=tmp_path)
    found = [json.loads(done.stdout) for done in (first, second, third)]
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # typer calls commands by types of its own
def test_remedies_prints_a_table_and_a_figure(tmp_path, monkeypatch):
    """Of a few remedies; all of them are compared in test_remedies.py."""

    def few(*arguments, **options):
        found, missing = every(*arguments, **options)
        shown = ("as it is", "LayerNorm before φ")
        return [(remedy, n) for remedy, n in found if remedy.name in shown], missing

    every = remedies.proposals
    monkeypatch.setattr(remedies, "proposals", few)
    arguments = ["remedies", "--activation", "relu", "--weights", "glorot", "--depth", "3"]
    arguments += ["--width", "20", "--networks", "10", "--out", str(tmp_path / "made")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    for word in ("as it is", "LayerNorm before φ", "left out  deep kernel shaping", "clipping"):
        assert word in done.output
    found = json.loads((tmp_path / "made" / "remedies.json").read_text())
    assert found["remedies"][0]["remedy"] == "as it is"
    assert (tmp_path / "made" / "remedies.png").stat().st_size > 0
