"""The note's claims: the numbers that theory knows to many digits."""

import functools
import json
import shutil

import commands
import numpy as np
import pytest

from gradflow import _note, activations, comparison
from gradflow.errors import InputError
from gradflow.studies import _study_file


def test_unscaled_logistic_networks_are_critical_at_width_103():
    # PITFALLS of quadrature: Gauss-Hermite with 64 nodes sees no critical width at all.
    assert _note.critical_width(activations.logistic) == pytest.approx(103.0076, abs=1e-4)


def test_the_logistics_mean_moves_the_critical_variance_from_16_to_103():
    assert _note.critical_sigma_w2_of_centred_logistic() == pytest.approx(16)


# As the table prints them, so that half a unit of the last digit is the tolerance.
@pytest.mark.parametrize(
    ("name", "width", "chi"),
    [("logistic", 100, "0.986"), ("logistic", 300, "1.68"), ("logistic", 1000, "3.02")]
    + [("tanh", 100, "5.5"), ("tanh", 300, "9.4"), ("tanh", 1000, "17")],
)
def test_chi_of_unscaled_networks_is_that_of_the_notes_table(name, width, chi):
    found = _note._chi_at_fixed_point(activations.get(name), np.array([float(width)]))
    digits = len(chi.partition(".")[2])
    assert found[0] == pytest.approx(float(chi), abs=0.5 * 10**-digits)


def test_the_study_is_that_of_its_file_with_other_numbers():
    assert _note.study().text == _note.FILE.read_text(encoding="utf-8")
    study = _note.study(width=20, depth=4, networks_gaussian=7, networks_uniform=3, seed=5)
    assert study == _study_file.parse(study.text)
    points = list(study.points())
    assert [p.networks for p in points] == [7, 7, 7, 3, 3, 7, 7, 7, 7, 7, 7]
    assert [p.network().widths for p in points] == [(20,) * 5] * 11
    assert study.sampling.seed == 5
    assert points[0].settings["data"] == "digits"


def test_bad_input_is_refused_before_anything_runs():
    with pytest.raises(InputError, match="depth is 2; it is a whole number of at least 3"):
        _note.study(depth=2)
    with pytest.raises(InputError, match="networks_uniform is 1"):
        _note.study(networks_uniform=1)
    with pytest.raises(InputError, match="seed is -1; it is a whole number from 0"):
        _note.study(seed=-1)


SMALL = ["--width", "30", "--depth", "3", "--networks", "40", "--uniform-networks", "10"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small one that the command has run: what it printed, and its folder.

    So are the paper's own networks, which are drawn anew whenever findings are made.
    """
    folder = tmp_path_factory.mktemp("note")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_note, "_PAPER_WIDTH", 100)
        done = commands.run("note", *SMALL, cwd=folder)
        assert done.returncode == 0, done.stderr
        yield done, folder / "results" / "note"


@pytest.mark.slow
def test_comparisons_are_those_of_confront_with_the_points_key(finished):
    """To the rounding of another order of networks, for Gaussian weights and for others."""
    _, folder = finished
    study = _note.study(width=30, depth=3, networks_gaussian=40, networks_uniform=10)
    found = _note.findings(folder).comparisons
    assert [setting.name for setting in found][::5] == [
        "logistic, N(0,1)",
        "tanh, Glorot",
        "linear, Glorot",
    ]
    for number in (0, 4):
        point, ours = study.point(number), list(found.values())[number]
        theirs = comparison.compare(
            point.network(),
            point.inputs().astype(np.float32),
            key=point.key,
            networks=point.networks,
        )
        assert ours.verdict.sentence == theirs.verdict.sentence
        assert ours.agreement == theirs.agreement
        ours, theirs = ours.to_xarray(), theirs.to_xarray()
        assert set(ours) == set(theirs)
        for name in ours:
            if name.endswith("_z"):  # differences of what is nearly the same
                continue
            # And of what is 0, as the width's effect on a mean of 1/2, the rounding alone.
            scale = 1e-5 * float(np.abs(theirs[name]).max()) + 1e-12
            np.testing.assert_allclose(
                ours[name], theirs[name], rtol=2e-3, atol=scale, err_msg=f"{number} {name}"
            )


@pytest.mark.slow
def test_what_was_found_is_found_again(finished):
    _, folder = finished
    first, second = (_note.findings(folder) for _ in range(2))
    assert first.claims == second.claims
    assert len(first.claims) == 7


@pytest.mark.slow
def test_the_command_answers_the_note(finished, tmp_path):
    done, folder = finished
    for word in ("logistic, N(0,1)", "selu, LeCun", "the note says", "critical at width 103.01"):
        assert word in done.stdout
    results = tmp_path / "results" / "note"
    shutil.copytree(folder, results)
    assert len(list(results.glob("*.nc"))) == 12
    assert len(list(results.glob("*.png"))) == 6
    found = json.loads((results / "study.json").read_text())
    assert len(found["claims"]) == 7
    assert found["settings"]["logistic, Glorot"]["verdict"]["kind"] == "vanishing"

    # Again it draws nothing, and says the same; with more networks it draws those.
    run = functools.partial(commands.run, cwd=tmp_path)
    again = run("note", *SMALL)
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    assert json.loads((results / "study.json").read_text()) == found
    assert "networks" not in again.stderr
    shown = run("show", "results/note", "--json")
    assert json.loads(shown.stdout)["networks"] == 9 * 40 + 2 * 10
    assert run("report", "results/note").returncode == 0
    more = run("note", *SMALL, "--uniform-networks", "15", "--json")
    assert json.loads(more.stdout)["settings"]["tanh, Glorot (uniform)"]["networks"] == 15

    # Anything else is not the same study: nothing is overwritten.
    other = run("note", "--depth", "5")
    assert other.returncode == 2
    assert "base.depth was 3, is 5; " in other.stderr
    assert other.stderr.endswith("for anything else give another --out\n")
