"""The process of a command: streams that refuse, settings of JAX, signals, the compile cache."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from gradflow import _cache_folder
from gradflow.cli import _process

MAIN = "from gradflow.cli import main; main()"


def python(code, *arguments, environment=None, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["list"], ["--help"]])
def test_an_output_that_is_full_is_one_sentence(arguments):
    with open("/dev/full", "w") as full:
        done = python(MAIN, *arguments, stdout=full)
    said = "gradflow: standard output cannot be written to: no space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_names_are_listed_without_jax_from_the_second_time_on(tmp_path):
    code = f"import sys\ntry:\n  {MAIN.replace('; ', chr(10) + '  ')}\n"
    code += "finally:\n  print('jax' in sys.modules)"
    there = {"GRADFLOW_CACHE": str(tmp_path)}
    said = [
        python(code, "list", environment=there, stdout=subprocess.PIPE).stdout.splitlines()
        for _ in range(2)
    ]
    assert said[0][:-1] == said[1][:-1]
    assert [lines[-1] for lines in said] == ["True", "False"]
    assert "  swish                     silu" in said[0]
    (file,) = tmp_path.rglob("names.json")
    of_other_code = file.read_text(encoding="utf-8").replace("swish", "swoosh")
    file.write_text(of_other_code.replace('"code": "', '"code": "0'), encoding="utf-8")
    third = python(code, "list", environment=there, stdout=subprocess.PIPE).stdout.splitlines()
    assert third == said[0]


@pytest.mark.medium
def test_streams_that_are_closed_or_have_no_such_letters_are_no_reason_to_fail():
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "20"}, {"COLUMNS": "1"}):
        done = python(MAIN, "phase", "--help", environment=environment, stdout=subprocess.DEVNULL)
        assert done.returncode == 0, (environment, done.stderr)
    closed = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" list >&- 2>&-', sys.executable, MAIN], check=False, timeout=300
    )
    assert closed.returncode == 0


@pytest.mark.slow
def test_what_finds_mistakes_in_other_programs_is_left_out(tmp_path):
    set_ = {
        "JAX_DEBUG_NANS": "1",
        "JAX_DISABLE_JIT": "1",
        "JAX_TRANSFER_GUARD": "disallow",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DEBUG_INFS": "0",
    }
    small = ["--width", "9", "--depth", "2", "--networks", "3", "--json"]
    done = python(
        MAIN, "compare", *small, environment=set_, stdout=subprocess.DEVNULL, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    left_out = [line.split("=")[0] for line in done.stderr.splitlines() if "is left out" in line]
    assert left_out == [f"gradflow: {name}" for name in set_ if name != "JAX_DEBUG_INFS"]


@pytest.mark.parametrize("setting", ["JAX_ENABLE_X64=maybe", "JAX_PLATFORMS=nonsense"])
def test_settings_that_jax_does_not_know_are_one_sentence(setting):
    name, _, value = setting.partition("=")
    done = python(MAIN, "critical", environment={name: value}, stdout=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr.startswith("gradflow: ")
    assert value in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_program_that_heeds_no_signal_is_ended():
    """As a compiler; one that has a handler which does nothing is the same to Python."""
    code = (
        "import os, signal, threading, time; from gradflow.cli import _process as process\n"
        "process.GRACE = 0.2\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "with process.ended_soon():\n"
        "    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    [time.sleep(1) for _ in range(60)]\n"
    )
    begun = time.monotonic()
    done = python(code)
    assert (done.returncode, done.stderr) == (130, "gradflow: interrupted\n")
    assert time.monotonic() - begun < 30


def test_a_process_that_is_not_interrupted_goes_on_after_it():
    code = (
        "import time; from gradflow.cli import _process as process\n"
        "process.GRACE = 0.1\n"
        "with process.ended_soon(): pass\n"
        "time.sleep(0.5); raise SystemExit(7)\n"
    )
    assert python(code).returncode == 7


def kept(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_COMPILATION_CACHE_MAX_SIZE": "1000"}


@pytest.mark.parametrize("place", ["our own", "the user's"])
def test_programs_that_were_half_kept_are_taken_away(tmp_path, monkeypatch, place):
    """JAX keeps nothing more as soon as one has no time of its last use."""
    environment = kept(tmp_path / "user", "a-cache", "a-atime", "b-cache", "c-atime", "other")
    folder = tmp_path / "user"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        if place == "our own":
            monkeypatch.delenv(name)
    if place == "our own":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(_cache_folder, "_processor", str)
        _process.prepare()  # makes the folder
        (ours,) = (tmp_path / "gradflow").iterdir()
        for name in os.listdir(folder):
            (ours / name).touch()
        folder = ours
    _process.prepare()
    there = set(os.listdir(folder)) - {".lockfile"}
    assert there == {"a-cache", "a-atime", "c-atime", "other"}


def test_what_another_process_is_keeping_is_left_alone(tmp_path, monkeypatch):
    for name, value in kept(tmp_path / "user", "b-cache").items():
        monkeypatch.setenv(name, value)
    with FileLock(tmp_path / "user" / ".lockfile"):
        _process.prepare()
    assert "b-cache" in os.listdir(tmp_path / "user")


def test_a_cache_without_times_is_whole(tmp_path, monkeypatch):
    """Where its size has no limit JAX writes none."""
    environment = kept(tmp_path / "user", "b-cache")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment["JAX_COMPILATION_CACHE_DIR"])
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    _process.prepare()
    assert os.listdir(tmp_path / "user") == ["b-cache"]
