"""Benchmarks run; how fast is not for tests."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_networks_per_second_compares_every_contender(capsys, monkeypatch):
    arguments = ["--width", "8", "--depth", "3", "--seconds", "0.01", "--json"]
    benchmark = load("networks_per_second")
    monkeypatch.setitem(benchmark.GROW, "inputs", [1, 8])
    monkeypatch.setattr(benchmark, "TILES", (2, 1 << 10))
    report = benchmark.main([*arguments, "--grow", "inputs"])
    assert [size["inputs"] for size in report["sizes"]] == [1, 8]
    for size in report["sizes"]:
        assert {"gradflow, matrix_free", "gradflow, dense", "NumPy, dense"} <= set(size["rows"])
        assert all(row["networks_per_second"] > 0 for row in size["rows"].values())
        assert all(rate > 0 for rate in size["limits"]["normals"].values())
    assert "times_fastest_peer" in capsys.readouterr().out


@pytest.mark.slow
def test_size_and_depth_reports_its_cases():
    rows = load("size_and_depth").main(["--quick"])
    assert all(row["warm_seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_leading_singular_values_compares_every_contender():
    (size,) = load("leading_singular_values").main(["--quick"])["sizes"]
    wanted = {"gradflow, matrix_free", "gradflow, dense", "NumPy, product and SVD"}
    assert wanted <= set(size["rows"])
    assert all(row["warm_seconds"] > 0 for row in size["rows"].values())


@pytest.mark.slow
def test_theory_agrees_with_its_peers():
    rows = load("theory").main(["--quick"])
    assert all(row["largest_difference"] < 1e-9 for row in rows)


@pytest.mark.slow
def test_attention_agrees_with_its_peer():
    assert load("attention").main(["--quick"])["largest_difference"] < 1e-9


@pytest.mark.slow
def test_training_compares_every_contender():
    size = ["--size", "2x8x10", "--steps", "20", "--networks", "4", "--repeats", "1", "--json"]
    (found,) = load("training").main(size)["sizes"].values()
    assert found["recording"] > -1
    rows = found["rows"]
    assert {"gradflow", "gradflow, recording"} <= set(rows)
    assert all(row["microseconds_a_step"] > 0 for row in rows.values())


@pytest.mark.slow
def test_studies_are_shared_in_every_way():
    (found,) = load("studies").main(["--quick"]).values()
    assert len(found["scaling"]) == 4
    assert all(row["networks_per_second"] > 0 for row in found["scaling"])
    assert found["costs"]["bytes kept"] > 0


def test_first_answer_sets_a_process_beside_importing_jax():
    report = load("first_answer").main(["help", "--repeats", "1", "--json"])
    assert report["import jax"]["wall"] > 0
    found = report["rows"]["help"]
    assert 0 < found["warm"]["cpu"] < 10 * report["import jax"]["cpu"]
    assert found["cold"]["memory_gib"] > 0


@pytest.mark.medium
def test_architectures_are_set_beside_their_peers():
    report = load("architectures").main(["--quick", "--json"])
    rates = [
        row["networks_per_second"] for rows in report["cases"].values() for row in rows.values()
    ]
    assert len(rates) >= 2
    assert all(rate > 0 for rate in rates)


@pytest.mark.slow
def test_watch_compares_every_optimiser():
    size = ["--size", "2x8x4", "--steps", "20", "--every", "5", "--repeats", "1", "--json"]
    (rows,) = load("watch").main(size)["sizes"].values()
    assert set(rows) == {"sgd", "adam"}
    assert all(row["cost"] > -1 for row in rows.values())
