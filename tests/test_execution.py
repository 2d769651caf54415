"""Studies are run: the same networks whatever the chunks, and the same bits however interrupted."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray

from gradflow import comparison
from gradflow.errors import InputError
from gradflow.estimation import Estimate
from gradflow.simulation import _programs, monte_carlo
from gradflow.studies import _execution, _plan, _results, _runner, _study_file
from gradflow.studies._measurements import Measurements, merged
from gradflow.studies._plan import Share
from gradflow.studies._store import Store
from gradflow.theory import float64

TEXT = """
title = "a small study"
[network]
activation = "tanh"
width = 12
depth = 4
input_width = 10
[[axes]]
sigma_w2 = [0.5, 1.0, 2.0]
[[axes]]
sigma_b2 = [0.0, 0.1]
[sampling]
networks = 20
[histograms]
log_gradient_norm = { from = -2, to = 2, bins = 8 }
"""
TARGET = TEXT.replace("networks = 20", "target = { q = 0.08 }\nround = 15\nmost = 60")


pytestmark = pytest.mark.usefixtures("small_chunks")


def run(folder, text=TEXT, **how):
    return _execution.run(_study_file.parse(text), folder, **how)


def files(folder):
    """Everything in a store but the lock and the times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.jsonl", "lock")
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory, small_chunks):  # noqa: ARG001
    """The study run in one go."""
    folder = tmp_path_factory.mktemp("reference") / "study"
    outcome = run(folder)
    assert (outcome.finished, outcome.networks, outcome.rounds) == (True, 120, 1)
    return folder


@pytest.mark.medium
def test_points_are_those_of_simulate_and_of_theory(reference):
    """Estimates, theory and z, point by point, to the rounding of another order of networks."""
    study = _study_file.parse(TEXT)
    dataset = xarray.load_dataset(reference / "results.nc")
    for number in (0, 3, 5):
        point = study.point(number)
        inputs = point.inputs().astype(np.float32)
        found = monte_carlo.simulate(point.network(), inputs, key=point.key, networks=20)
        compared = comparison.compare_results(float64.predict(point.network(), inputs), found)
        here = dataset.isel(sigma_w2=point.index[0], sigma_b2=point.index[1])
        for statistic in study.statistics:
            name, estimate = statistic.name, found.estimates[statistic.key]
            contrast = compared.by_statistic[statistic.key]
            for ours, theirs in (
                (here[name], estimate.value),
                (here[f"{name}_standard_error"], estimate.standard_error),
                (here[f"{statistic.key}_theory"], contrast.theory),
                (here[f"{name}_networks"], estimate.count),
            ):
                np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(here[f"{name}_z"], contrast.z, rtol=0.02, atol=0.02)
        correction = float64.correct(point.network(), point.inputs())
        np.testing.assert_allclose(
            here.chi_finite_width_shift, correction.shift["chi"], rtol=1e-9, atol=1e-12
        )
        spread = correction.standard_deviation
        for deviation, expected in (
            (here.chi_standard_deviation_theory, spread["chi"]),
            (here.q_standard_deviation_theory, spread["log_q"] * np.exp(here.log_q_theory)),
        ):
            np.testing.assert_allclose(deviation, expected, rtol=1e-9, atol=1e-12)


def test_results_are_labelled_and_say_where_they_are_from(reference):
    dataset = xarray.load_dataset(reference / "results.nc")
    assert dataset.q.dims == ("sigma_w2", "sigma_b2", "layer")
    assert dataset.q.attrs["long_name"] == "second moment of pre-activations q"
    first = dataset.sel(sigma_w2=2.0, sigma_b2=0.1, method="nearest")
    np.testing.assert_allclose(first.weight_variance, [2 / 10, *[2 / 12] * 3])
    counts = first.log_gradient_norm_histogram.sum("log_gradient_norm_bin")
    counts += first.log_gradient_norm_histogram_below + first.log_gradient_norm_histogram_above
    np.testing.assert_array_equal(counts, 20)
    assert _study_file.parse(dataset.attrs["study"]) == _study_file.parse(TEXT)
    (drawn,) = json.loads(dataset.attrs["drawn_with"])
    assert drawn["jax"] == jax.__version__
    assert dataset.attrs["dtype"] == "float32"


def test_few_files_are_left(reference):
    """120 networks, in 15 chunks of 8: three files of three were merged, and so were they."""
    names = [path.stem for path in sorted((reference / "chunks").iterdir())]
    spans = [tuple(int(n) for n in name.split("-")[2:]) for name in names]
    assert spans == [(0, 8), (9, 11), (12, 14)]


def test_stopped_after_some_chunks_it_ends_in_the_same_bits(reference, tmp_path):
    networks = []
    for _ in range(4):
        outcome = run(tmp_path / "study", stop=lambda: True)
        assert not outcome.finished
        assert outcome.results is None
        networks.append(outcome.networks)
    assert networks == [0, 8, 16, 24]  # theory first
    assert run(tmp_path / "study").finished
    assert files(tmp_path / "study") == files(reference)


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.medium
@pytest.mark.parametrize(
    "operation",
    ["fsync", *(pytest.param(name, marks=pytest.mark.slow) for name in ("replace", "unlink"))],
)
def test_ended_at_any_file_operation_it_goes_on_to_the_same_bits(
    reference, tmp_path, monkeypatch, operation
):
    """Before one after the other; the networks are those of the reference, to draw none again."""
    _without_drawing(monkeypatch, reference)
    where = os if operation == "fsync" else Path
    real = getattr(where, operation)
    crashes, finished = 0, False
    while not finished:
        left = 1 + crashes % 7

        def counted(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            return real(*arguments, **options)

        monkeypatch.setattr(where, operation, counted)
        try:
            finished = run(tmp_path / "study").finished
        except Crash:
            crashes += 1
        finally:
            monkeypatch.setattr(where, operation, real)
    assert crashes > 3
    assert files(tmp_path / "study") == files(reference)


def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(reference, tmp_path, monkeypatch):
    _without_drawing(monkeypatch, reference)
    real, written = Path.write_bytes, []

    def full(path, content):
        written.append(path)
        if len(written) > 12:
            real(path, content[:10])
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="the disk of '.*' is full .*; what is finished is kept"):
        run(tmp_path / "study")
    monkeypatch.setattr(Path, "write_bytes", real)
    assert Store.of(tmp_path / "study").rounds.networks()
    run(tmp_path / "study")
    assert files(tmp_path / "study") == files(reference)


def _without_drawing(monkeypatch, reference):
    """Let chunks have what they had: of the program's values, kept in this process."""
    if not VALUES:
        real = _programs.compiled

        def noting(*arguments, **options):
            program = real(*arguments, **options)

            def call(laws, which, numbers):
                found = program(laws, which, numbers)
                VALUES[_of(laws, which, numbers)] = found
                return found

            return call

        with monkeypatch.context() as patch:
            patch.setattr(_programs, "compiled", noting)
            run(reference.parent / "noted")
    monkeypatch.setattr(_programs, "compiled", lambda *_, **__: lambda *chunk: VALUES[_of(*chunk)])


VALUES: dict[bytes, tuple[jax.Array, ...]] = {}


def _of(laws, which, numbers):
    words = np.asarray(jax.random.key_data(laws.key))
    return words.tobytes() + which.tobytes() + numbers.tobytes()


def test_other_chunks_change_nothing_but_the_rounding(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(_plan, "_CHUNK_VALUES", 10_000)
    run(tmp_path / "study")
    same(tmp_path / "study", reference)


def same(one, other):
    """Whether two studies found the same but for rounding."""
    ours, theirs = (xarray.load_dataset(folder / "results.nc") for folder in (one, other))
    assert set(ours) == set(theirs)
    for name in ours:
        if name.endswith("_z"):  # differences of what is nearly the same
            continue
        sizes = np.abs(theirs[name])
        scale = 1e-5 * float(sizes.where(np.isfinite(sizes)).max())  # a ξ in theory is infinite
        np.testing.assert_allclose(ours[name], theirs[name], rtol=5e-4, atol=scale, err_msg=name)


@pytest.mark.medium
def test_points_and_networks_may_be_added_and_nothing_else(tmp_path):
    larger = TEXT.replace("[0.5, 1.0, 2.0]", "[0.5, 0.7, 1.0, 2.0]").replace("= 20", "= 25")
    run(tmp_path / "whole", larger)
    run(tmp_path / "grown", stop=lambda: True)  # which is not even finished
    outcome = run(tmp_path / "grown", larger)
    assert (outcome.networks, outcome.rounds) == (200, 2)
    same(tmp_path / "grown", tmp_path / "whole")
    before = files(tmp_path / "grown")
    for text, message in (
        (TEXT, "2 of 8 points are gone"),
        (larger.replace("= 25", "= 24"), "sampling.networks was 25, is 24"),
        (larger.replace("depth = 4", "depth = 5"), "base.depth was 4, is 5"),
        (larger.replace("bins = 8", "bins = 9"), "histograms.log_gradient_norm.bins was 8, is 9"),
        (larger.replace("networks", 'dtype = "float64"\nnetworks'), "was 'float32', is 'float64'"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "grown", text)
    assert files(tmp_path / "grown") == before
    run(tmp_path / "grown", larger.replace("a small study", "another title"))
    assert xarray.load_dataset(tmp_path / "grown" / "results.nc").attrs["title"] == "another title"


@pytest.mark.slow
def test_networks_along_an_axis_may_be_added_and_not_taken_away(tmp_path):
    """Points have their own numbers; more of some is another round, fewer of one is refused."""

    def text(first, second):
        along = f"sigma_b2 = [0.0, 0.1]\nnetworks = [{first}, {second}]"
        return TEXT.replace("networks = 20\n", "").replace("sigma_b2 = [0.0, 0.1]", along)

    networks = xarray.load_dataset(run_whole(tmp_path / "whole", text(20, 35))).q_networks
    np.testing.assert_array_equal(networks.max("layer"), [[20, 35]] * 3)
    assert networks.dims == ("sigma_w2", "sigma_b2", "layer")
    while not run(tmp_path / "stopped", text(20, 35), stop=lambda: True).finished:
        pass
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")

    run(tmp_path / "grown", text(20, 10))
    outcome = run(tmp_path / "grown", text(20, 35))
    assert (outcome.networks, outcome.rounds) == (3 * (20 + 35), 2)
    same(tmp_path / "grown", tmp_path / "whole")
    before = files(tmp_path / "grown")
    for refused, message in (
        (text(20, 34), "sigma_b2 = 0.1 was 35, is 34; 2 more points have fewer; only points"),
        (TEXT, "networks at sigma_w2 = 0.5, sigma_b2 = 0.1 was 35, is 20"),
        (text(20, 35).replace("depth = 4", "depth = 5"), "base.depth was 4, is 5"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "grown", refused)
    assert files(tmp_path / "grown") == before
    outcome = run(tmp_path / "grown", TEXT.replace("= 20", "= 35"))  # along no axis any more
    assert outcome.networks == 6 * 35


def run_whole(folder, text):
    outcome = run(folder, text)
    assert (outcome.finished, outcome.rounds) == (True, 1)
    return outcome.results


@pytest.mark.medium
def test_the_next_program_is_compiled_while_one_draws_and_no_bit_is_another(tmp_path, monkeypatch):
    text = TEXT.replace('activation = "tanh"\n', "").replace(
        "sigma_b2 = [0.0, 0.1]", 'activation = ["tanh", "relu", "linear"]'
    )
    begun = {name: threading.Event() for name in ("compile", "compile_theory")}
    for name, event in begun.items():
        real = getattr(_runner.TaskRunner, name)

        def noted(runner, real=real, event=event):
            if runner.program.network.activation.name == "relu":
                event.set()
            real(runner)

        monkeypatch.setattr(_runner.TaskRunner, name, noted)

    def wait_for_the_next(step):
        # The first chunks are those of the tanh networks.
        if step.what == "networks":
            assert all(event.wait(timeout=300) for event in begun.values())

    run(tmp_path / "ahead", text, progress=wait_for_the_next)
    for name in begun:
        monkeypatch.setattr(_runner.TaskRunner, name, lambda _: None)
    run(tmp_path / "in turn", text)
    assert files(tmp_path / "ahead") == files(tmp_path / "in turn")


@pytest.mark.medium
def test_a_target_is_met_in_rounds_that_an_interruption_does_not_change(tmp_path):
    """Points whose q varies more have more networks; none has more than it may."""
    run(tmp_path / "whole", TARGET)
    while not run(tmp_path / "stopped", TARGET, stop=iter([False] * 5 + [True]).__next__).finished:
        pass
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    dataset = xarray.load_dataset(tmp_path / "whole" / "results.nc")
    networks = dataset.q_networks.max("layer").to_numpy()
    error = dataset.log_q_standard_error.max("layer").to_numpy()
    assert set(np.unique(networks)) <= {15, 30, 45, 60}
    assert len(np.unique(networks)) > 1
    assert ((error <= 0.08) | (networks == 60)).all()


def test_one_process_at_a_time_and_no_folder_of_something_else(tmp_path):
    study = _study_file.parse(TEXT)
    with (
        Store(tmp_path / "study", study).locked(),
        pytest.raises(InputError, match="another process writes its study"),
        Store(tmp_path / "study", study).locked(),
    ):
        pass
    with Store(tmp_path / "study", study).locked():
        pass
    (tmp_path / "note.txt").touch()
    with (
        pytest.raises(InputError, match="holds something that is no study"),
        Store(tmp_path, study).locked(),
    ):
        pass
    with pytest.raises(InputError, match="which holds no study"):
        Store.of(tmp_path)


@pytest.mark.medium
def test_shares_of_hosts_that_do_not_meet_are_merged_to_the_whole(reference, tmp_path):
    """Three shares, one of them in two goes; then networks and a point more, on the whole."""
    folders = [tmp_path / f"share-{place}" for place in range(3)]
    for place, folder in enumerate(folders):
        outcome = run(folder, share=Share(place, 3), stop=lambda: True)
        assert not outcome.finished
        outcome = run(folder, share=Share(place, 3))
        assert (outcome.finished, outcome.networks) == (True, 6 * Share(place, 3).size(20))
    # Each has the theory of its own points alone.
    known = [xarray.load_dataset(folder / _results.FILE).q_theory[..., 0] for folder in folders]
    np.testing.assert_array_equal(sum(np.isfinite(one).astype(int) for one in known), 1)

    written = _execution.merge(folders[::-1], tmp_path / "whole")
    assert written == tmp_path / "whole" / _results.FILE
    same(tmp_path / "whole", reference)
    _execution.merge(folders, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "whole")

    text = TEXT.replace("networks = 20", "networks = 25").replace("2.0]", "2.0, 3.0]")
    outcome = run(tmp_path / "whole", text)
    assert (outcome.finished, outcome.networks) == (True, 8 * 25)
    run(tmp_path / "at-once", text)
    same(tmp_path / "whole", tmp_path / "at-once")


@pytest.mark.medium
@pytest.mark.parametrize(
    "axes",
    [
        "sigma_w2 last",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sigma_w2 first", "a seed")),
    ],
)
def test_results_that_are_put_together_in_parts_are_the_same(tmp_path, monkeypatch, axes):
    text = TEXT.replace("[[axes]]", '[[axes]]\nactivation = ["tanh", "relu"]\n[[axes]]', 1).replace(
        'activation = "tanh"', "", 1
    )
    if axes == "sigma_w2 first":
        text = TEXT
    elif axes == "a seed":
        text = text.replace("sigma_b2 = [0.0, 0.1]", "seed = { from = 5, to = 9, points = 5 }")
    study = _study_file.parse(text)
    run(tmp_path / "study", text)
    found = xarray.load_dataset(tmp_path / "study" / _results.FILE)
    assert _plan.result_parts(study, 4)[0] == ""

    monkeypatch.setattr(_plan, "_PART_BYTES", 1)
    along, parts = _plan.result_parts(study, 4)
    assert (along, len(parts)) == (("seed", 5) if axes == "a seed" else ("sigma_w2", 3))
    with Store(tmp_path / "study", study).locked() as store:
        _results.write(store, _plan.programs(study))
    again = xarray.load_dataset(tmp_path / "study" / _results.FILE)
    assert again.q.dims[0] == along
    xarray.testing.assert_equal(again.transpose(*found.q.dims, ...), found)
    assert again.attrs == found.attrs
    for name in found.variables:
        assert again[name].attrs == found[name].attrs


def test_seeds_of_32_bits_are_coordinates(tmp_path):
    axis = "seed = [0, 4_000_000_000]"
    run(tmp_path / "study", TEXT.replace("sigma_b2 = [0.0, 0.1]", axis))
    found = xarray.load_dataset(tmp_path / "study" / _results.FILE)
    assert found.seed.values.tolist() == [0, 4_000_000_000]


@pytest.mark.slow
def test_what_is_no_set_of_shares_is_not_merged(reference, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(first, share=Share(0, 2))
    run(second, share=Share(1, 2), stop=lambda: True)
    out = tmp_path / "whole"
    with pytest.raises(InputError, match=r"second' is not finished: .* --share 2/2` resumes it"):
        _execution.merge([first, second], out)
    with pytest.raises(InputError, match="of 2 shares 2 is missing"):
        _execution.merge([first], out)
    with pytest.raises(InputError, match="both hold share 1/2; each goes in once"):
        _execution.merge([first, first], out)
    with pytest.raises(InputError, match="holds a whole study and no share"):
        _execution.merge([reference], out)
    other = tmp_path / "other"
    run(other, TEXT.replace("width = 12", "width = 13"), share=Share(1, 2), stop=lambda: True)
    with pytest.raises(InputError, match=r"of another study than .*base.width was 12, is 13"):
        _execution.merge([first, other], out)
    assert not out.exists()
    with pytest.raises(InputError, match="holds share 1/2; give --share 1/2, or another folder"):
        run(first, share=Share(1, 2))
    run(second, share=Share(1, 2))
    with pytest.raises(InputError, match="first', which holds something; give a new folder"):
        _execution.merge([first, second], first)
    with pytest.raises(InputError, match=r"share is 1/2, and the study has a sampling.target"):
        run(tmp_path / "target", TARGET, share=Share(0, 2))


def estimated(values):
    """Of values (networks, 2, layers), the second logarithms; with an axis of one point."""
    each = [Estimate.of(values[:, n], log=bool(n)) for n in range(2)]
    return jax.tree.map(lambda *leaves: np.stack(leaves)[None], *each)


def test_what_is_merged_is_as_if_it_had_been_estimated_together():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(30, 2, 5))
    values[3, 0, 1] = np.nan
    study = _study_file.parse(TEXT)
    parts = []
    for first, last in ((0, 7), (7, 9), (9, 30)):
        estimate = estimated(values[first:last])
        failures = np.full((1, 2, 5), last - first)
        parts.append(Measurements(np.array([4], np.uint64), estimate, failures, {}))
    whole = estimated(values)
    other = Measurements(np.array([9], np.uint64), whole, np.zeros((1, 2, 5), np.int64), {})
    found = merged([parts[0], other, *parts[1:]])
    np.testing.assert_array_equal(found.names, [4, 9])
    np.testing.assert_array_equal(found.failures[:, 0, 0], [30, 0])
    for row in (0, 1):
        for name in ("value", "standard_error", "count", "log_value"):
            ours = getattr(jax.tree.map(lambda leaf, r=row: leaf[r], found.estimates), name)
            theirs = getattr(jax.tree.map(lambda leaf: leaf[0], whole), name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, err_msg=name)
    assert study.sampling.networks == 20


# In processes of their own, as users run it.

COMMAND = [sys.executable, "-c", "from gradflow.cli import main; main()", "study"]
KILLS = int(os.environ.get("GRADFLOW_TEST_KILLS", "4"))


def begin(file, out, *more, flags=""):
    """A study of a file, compiled as users have it without other flags."""
    return subprocess.Popen(
        [*COMMAND, str(file), "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags},
    )


def wait(process):
    out, said = process.communicate(timeout=600)
    return process.returncode, out, said


@pytest.fixture(scope="module")
def long_study(tmp_path_factory):
    """A file of a study of some chunks, and its store, run in one go."""
    folder = tmp_path_factory.mktemp("long")
    # More chunks than kills: each run finishes one before it is killed.
    count = f"networks = {50_000 * max(1, KILLS // 3)}"
    text = TEXT.replace("networks = 20", count).replace("depth = 4", "depth = 20")
    (folder / "study.toml").write_text(text)
    code, out, said = wait(begin(folder / "study.toml", folder / "whole"))
    assert code == 0, said
    assert "a small study" in out
    assert "networks/s" in said
    return folder


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_in_the_same_bits(long_study, tmp_path):
    """GRADFLOW_TEST_KILLS=100 for as many: 15 minutes."""
    draw, killed = random.Random(0), 0
    while killed < KILLS:
        process = begin(long_study / "study.toml", tmp_path / "study")
        log = tmp_path / "study" / "log.jsonl"
        before = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 300
        # A random while after it has begun to draw: half of what is before is imports.
        while not (log.exists() and log.stat().st_size > before) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the study was finished before"
        killed += 1
    code, _, said = wait(begin(long_study / "study.toml", tmp_path / "study"))
    assert code == 0, said
    assert files(tmp_path / "study") == files(long_study / "whole")


@pytest.mark.slow
def test_an_interruption_ends_a_study_soon_and_says_how_to_go_on(long_study, tmp_path):
    process = begin(long_study / "study.toml", tmp_path / "study")
    while not list(tmp_path.glob("study/theory/*.npz")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    code, _, said = wait(process)
    assert code == 130, said
    assert time.monotonic() - asked < 10  # 3 s, whatever compiles; 23 s without that
    assert "the same command resumes from there" in said
    assert said.splitlines()[-1] == "gradflow: interrupted"
    assert "Traceback" not in said


@pytest.mark.slow
def test_devices_and_processes_change_nothing_but_the_rounding(tmp_path):
    soon = os.environ.get("XLA_FLAGS", "")  # as other tests' programs are compiled
    file = tmp_path / "study.toml"
    file.write_text(TEXT.replace("networks = 20", "networks = 2000"))
    for devices in (1, 8):
        out = tmp_path / f"{devices} devices"
        code, _, said = wait(
            begin(file, out, flags=f"{soon} --xla_force_host_platform_device_count={devices}")
        )
        assert code == 0, said
        same(out, tmp_path / "1 devices")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    among = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process")
    both = [
        begin(file, tmp_path / "processes", *among, str(process), flags=soon)
        for process in range(2)
    ]
    for process in both:
        code, _, said = wait(process)
        assert code == 0, said
    same(tmp_path / "processes", tmp_path / "1 devices")
