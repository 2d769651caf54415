"""Damaged stores and mutated study files: one sentence, or what there was without the damage.

GRADFLOW_TEST_ATTACKS=all tries every damage to every file of a store, in some minutes.
"""

import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray
from attacks import stores, study_files

from gradflow import cli
from gradflow.errors import InputError
from gradflow.simulation import _programs
from gradflow.studies import _execution, _plan, _results, _study_file
from gradflow.studies._plan import Share
from gradflow.studies._store import Store

TEXT = """
title = "a small study"
[network]
activation = "tanh"
width = 12
depth = 4
input_width = 10
[[axes]]
sigma_w2 = [0.5, 2.0]
[sampling]
networks = 28
[statistics]
measure = ["q", "log_gradient_norm"]
[theory]
depth_scales = false
"""
LARGER = TEXT.replace("[0.5, 2.0]", "[0.5, 1.0, 2.0]").replace("= 28", "= 36")
OTHER = TEXT.replace("width = 12", "width = 11").replace("[sampling]", "[sampling]\nseed = 3")
pytestmark = pytest.mark.usefixtures("unchecked")
EVERY = os.environ.get("GRADFLOW_TEST_ATTACKS") == "all"


@pytest.fixture(scope="module", autouse=True)
def _remember_what_is_drawn(small_chunks):  # noqa: ARG001
    """Let chunks that were drawn before have what they had, so that they take no time."""
    real, values = _programs.compiled, {}

    def compiled(network, size, *arguments, **options):
        program = None

        def call(laws, which, numbers):
            nonlocal program
            leaves = [laws.inputs, which, numbers, jax.random.key_data(laws.key)]
            leaves += jax.tree.leaves(laws.network)
            of = (size, *(np.asarray(leaf).tobytes() for leaf in leaves))
            if of not in values:
                program = program or real(network, size, *arguments, **options)
                values[of] = program(laws, which, numbers)
            return values[of]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_programs, "compiled", compiled)
        yield


def run(folder, text=LARGER, **how):
    return _execution.run(_study_file.parse(text), folder, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that was interrupted, grew and is finished: two rounds, of which one is not whole."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    answers = iter([False] * 5 + [True])
    assert not run(folder, TEXT, stop=answers.__next__).finished
    assert run(folder).rounds == 2
    assert len(list((folder / "chunks").iterdir())) > 3
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another study, finished: of other networks, in as many files or so."""
    folder = tmp_path_factory.mktemp("other") / "study"
    answers = iter([False] * 5 + [True])
    run(folder, OTHER, stop=answers.__next__)
    run(folder, OTHER.replace("= 28", "= 36"))
    return folder


def contents(folder):
    """Everything in a store but the lock and the times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.jsonl", "lock")
    }


def sentence_of(function, *arguments, **options):
    """Return the sentence that a call ends with, if it does."""
    try:
        function(*arguments, **options)
    except InputError as error:
        return str(error)
    return ""


def command(*arguments):
    return sentence_of(cli.app, [str(argument) for argument in arguments], standalone_mode=False)


def read_in_all_ways(folder, tmp_path):
    """Return what every command that reads a store says: a sentence, or nothing."""
    table = tmp_path / "table.csv"
    table.unlink(missing_ok=True)
    said = {
        "show": command("show", folder),
        "show --json": command("show", folder, "--json"),
        "export": command("export", folder, "--csv", table),
        "report": command("report", folder, "--out", tmp_path / "page.html"),
        "merge": command("merge", folder, folder, "--out", tmp_path / "merged"),
    }
    return said, table.read_bytes() if table.exists() else b""


@pytest.mark.slow
def test_whatever_is_damaged_is_one_sentence_and_is_made_again(
    whole, other, tmp_path, monkeypatch, capsys
):
    """Every command that reads it names the file; going on gives the same store again."""
    monkeypatch.setattr("gradflow.studies._report.page", lambda _: "")
    said, table = read_in_all_ways(whole, tmp_path)
    assert [name for name in said if said[name]] == ["merge"]
    assert "holds a whole study" in said["merge"]
    before, elsewhere = contents(whole), contents(other)
    shown = capsys.readouterr().out
    faults = []
    for attack in stores.attacks(whole) if EVERY else stores.sample(whole, 30):
        folder = copied(whole, tmp_path / "damaged")
        if not attack.put_to(folder, other):
            continue
        sentences, found = read_in_all_ways(folder, tmp_path)
        out = capsys.readouterr().out.replace(str(folder), str(whole))
        if attack.file == "log.jsonl":  # of which nothing depends
            if sentences | {"merge": ""} != said | {"merge": ""} or (found, out) != (table, shown):
                faults.append(f"{attack}: it is missed")
        else:
            name = attack.file.replace("-copy", "")
            for command, sentence in sentences.items():
                if sentence.count("\n") or name not in sentence.replace("-copy", ""):
                    faults.append(f"{attack}: {command} says {sentence!r}")
        if not run(folder).finished or contents(folder) != before:
            faults.append(f"{attack}: another store is made of it")
        if contents(other) != elsewhere:
            faults.append(f"{attack}: it is written through a link")
    assert not faults, "\n".join(faults)


def copied(folder, to):
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


@pytest.mark.medium
def test_an_interrupted_store_that_is_damaged_ends_in_the_same_bits(whole, other, tmp_path):
    """In its first round: what is damaged is as if it had never been drawn."""
    interrupted = tmp_path / "interrupted"
    run(interrupted, TEXT, stop=iter([False] * 5 + [True]).__next__)
    drawn = sum(Store.of(interrupted).rounds.networks().values())
    for attack in stores.attacks(interrupted) if EVERY else stores.sample(interrupted, 12):
        folder = copied(interrupted, tmp_path / "damaged")
        attack.put_to(folder, other)
        said = sentence_of(Store.of, folder)
        if said:
            assert attack.file.replace("-copy", "") in said.replace("-copy", "")
        else:
            assert sum(Store.of(folder).rounds.networks().values()) <= drawn
        run(folder, TEXT, stop=iter([False] * 2 + [True]).__next__)
        run(folder)
        same(folder, whole)
    shutil.rmtree(tmp_path / "damaged")


def same(one, other):
    """Whether two stores have the same results but for the rounding of other rounds."""
    ours, theirs = (xarray.load_dataset(folder / _results.FILE) for folder in (one, other))
    for name in ("q", "q_networks", "log_q_theory", "gradient_norm_networks"):
        if name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("gone", [("chunks", "results.nc"), ("theory",), ("rounds",), ("chunks",)])
def test_a_store_of_which_folders_are_gone_does_not_pass_for_whole(whole, tmp_path, gone):
    """Chunks and theory are made again; without rounds nobody knows of what chunks are."""
    folder = copied(whole, tmp_path / "damaged")
    for name in gone:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, sentence in read_in_all_ways(folder, tmp_path)[0].items():
        assert re.search(rf"{gone[0]}/.* (is|are) .*missing.*; ", sentence), (name, sentence)
    if gone == ("rounds",):
        with pytest.raises(InputError, match=r"rounds/0000.npz' and its copy .* another --out"):
            run(folder)
        return
    assert run(folder).finished
    assert contents(folder) == contents(whole)


def test_files_that_nobody_wrote_are_not_trusted_and_no_other_is_lost_for_them(whole, tmp_path):
    folder = copied(whole, tmp_path / "damaged")
    strays = stores.strays(folder)
    assert run(folder).finished
    assert contents(folder).items() >= contents(whole).items()
    left = {path for path in strays if path.exists()}
    assert {path.name for path in left} >= {"notes.npz", "old.npz"}  # they are somebody's
    for path in left:
        path.unlink()
    assert contents(folder) == contents(whole)
    run(folder)
    stores.strays(folder)
    said, _ = read_in_all_ways(folder, tmp_path)
    assert all(
        "-0000000000-0000009999.npz' is damaged or of another study" in s for s in said.values()
    )


def test_a_study_file_that_is_changed_in_the_store_is_another_study(whole, tmp_path):
    folder = copied(whole, tmp_path / "changed")
    path = folder / "study.toml"
    path.write_text(LARGER.replace("depth = 4", "depth = 5"))
    with pytest.raises(InputError, match="study.toml' is not the file that the study was last run"):
        Store.of(folder)
    with pytest.raises(InputError, match="base.depth was 4, is 5"):
        _execution.run(_study_file.load(path), folder)


def test_shares_that_are_damaged_are_not_merged(other, tmp_path):
    folders = [tmp_path / f"share-{place}" for place in range(2)]
    for place, folder in enumerate(folders):
        run(folder, TEXT, share=Share(place, 2))
    for attack in stores.sample(folders[1], 12, seed=1):
        folder = copied(folders[1], tmp_path / "damaged")
        if attack.file == "log.jsonl" or not attack.put_to(folder, other):
            continue
        with pytest.raises(InputError, match="damaged") as caught:
            _execution.merge([folders[0], folder], tmp_path / "merged")
        assert str(caught.value).count("\n") == 0
        assert not (tmp_path / "merged").exists()
    _execution.merge(folders, tmp_path / "merged")


@pytest.mark.medium
def test_a_share_of_fewer_networks_than_shares_is_finished_and_merges(tmp_path):
    """Two networks a point in three shares: the third has none, and no theory either."""
    text = TEXT.replace("networks = 28", "networks = 2")
    folders = [tmp_path / f"share-{place}" for place in range(3)]
    for place, folder in enumerate(folders):
        outcome = run(folder, text, share=Share(place, 3))
        assert (outcome.finished, outcome.networks) == (True, 2 * (place < 2))
        assert not any(read_in_all_ways(folder, tmp_path)[0][name] for name in ("show", "export"))
    empty = xarray.load_dataset(folders[2] / _results.FILE)
    assert empty.attrs["networks"] == 0
    assert not empty.q_networks.any()
    assert np.isnan(empty.q).all()
    _execution.merge(folders, tmp_path / "merged")
    run(tmp_path / "whole", text)
    same(tmp_path / "merged", tmp_path / "whole")


def test_a_running_study_can_be_read(tmp_path):
    """At every step: by one that opens it then, and by one that did so before files were merged."""
    folder, before = tmp_path / "study", [(None, 0)]

    def networks_in(reader):
        found = _results.assemble(reader)
        assert found.attrs["networks"] == found.q_networks.isel(layer=0).sum()
        return found.attrs["networks"]

    def look(step):
        done = step.done if step.what == "networks" else 0
        earlier, had = before[max(0, len(before) - 4)]
        before.append((Store.of(folder), done))
        assert networks_in(before[-1][0]) == done
        if earlier is not None:
            assert networks_in(earlier) in (had, done)

    run(folder, TEXT, progress=look)
    assert before[-1][1] == 56


def test_a_folder_that_is_removed_while_a_study_runs_is_a_sentence(tmp_path):
    for name in ("", "chunks", "theory", "rounds"):
        folder = tmp_path / "study"
        shutil.rmtree(folder, ignore_errors=True)

        def remove(step, path=folder / name):
            if step.what == "networks":
                shutil.rmtree(path, ignore_errors=True)

        # What was only to be read later is noticed then.
        said = sentence_of(run, folder, TEXT, progress=remove) or sentence_of(Store.of, folder)
        assert str(folder) in said
        assert "\n" not in said


def test_networks_of_studies_do_not_depend_on_jaxs_default_cipher():
    point = _study_file.parse(TEXT).point(0)
    words = np.asarray(jax.random.key_data(point.key))
    with jax.default_prng_impl("rbg"):
        key = _study_file.parse(TEXT).point(0).key
        assert str(jax.random.key_impl(key)) == "threefry2x32"
        np.testing.assert_array_equal(jax.random.key_data(key), words)


FILE = LARGER.replace("[sampling]", "[inputs]\nbatch = 2\ncorrelation = 0.5\n[sampling]").replace(
    "[theory]", "[histograms]\nq = { from = 0, to = 4, bins = 20 }\n[theory]"
)


def test_a_mutated_study_file_means_something_or_is_one_sentence():
    """And a short one; GRADFLOW_TEST_ATTACKS=all for 2000."""
    refused, count = 0, 2000 if EVERY else 200
    for seed in range(count):
        text = study_files.mutated(FILE, seed)
        try:
            study = _study_file.parse(text)
            if len(study) < 1000:
                _plan.programs(study)
        except InputError as error:
            refused += 1
            said = str(error)
            if "\n" in said or len(said) > 1000:
                pytest.fail(f"seed {seed}: {said[:2000]!r}")
    assert count // 4 < refused < count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a." * 50_000 + "b = 1", "a key of more than 100 parts"),
        (f"x = {{ {'a . ' * 50_000} b = 1 }}", "a key of more than 100 parts"),
        (FILE.replace("width = 12", f"width = {'9' * 4000}"), r"network.width is 9{76,80}…"),
        (FILE.replace("[0.5, 1.0, 2.0]", f"{[*range(1, 50_000), 1]}"), "has .1.0,. twice"),
        (
            FILE.replace("width = 12", "").replace(
                "[inputs]", "[[axes]]\nwidth = { from = 10, to = 30009, points = 30000 }\n[inputs]"
            ),
            "more than 10000 structures",
        ),
        (
            FILE.replace(
                "width = 12\ndepth = 4\ninput_width = 10", f"widths = {[*range(2, 5000)]}"
            ),
            "widths changes 4997 times",
        ),
    ],
)
def test_what_would_take_hours_to_plan_is_refused_at_once(text, message):
    with pytest.raises(InputError, match=message):
        _plan.programs(_study_file.parse(text))


def test_a_correlation_is_an_axis_beside_the_statistic_of_its_name(tmp_path):
    text = TEXT.replace("sigma_w2 = [0.5, 2.0]", "correlation = [0.0, 0.5]")
    text = text.replace("width = 12", "width = 12\nsigma_w2 = 1.5").replace(
        "[sampling]", "[inputs]\nbatch = 2\n[sampling]"
    )
    text = text.replace('"log_gradient_norm"', '"correlation"').replace("= 28", "= 8")
    assert run(tmp_path / "study", text).finished
    found = xarray.load_dataset(tmp_path / "study" / _results.FILE)
    assert found.correlation.dims == ("input_correlation", "layer")
    np.testing.assert_array_equal(found.input_correlation, [0, 0.5])
    said, _ = read_in_all_ways(tmp_path / "study", tmp_path)
    assert not any(said[name] for name in ("show", "show --json", "export"))
