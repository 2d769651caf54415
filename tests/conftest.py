"""What every test runs under: shapes checked at run time, x64 on, no rank promotion by accident."""

import collections
import dataclasses
import functools
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import matplotlib
import pytest

# Most programs run for an instant here, so compile them soon rather than well: in less than half
# the time. XLA_FLAGS in the environment are used instead, and empty ones are as users have it:
# .ci/run sets them so for fast tests under Python 3.13.
_SOON = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"  # the other core runs other tests
)
if jax.__version_info__ < (0, 11):  # later ones know no other way to generate loops
    _SOON += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _SOON)  # read when JAX first compiles, in processes of tests too

# Before anything imports gradflow. In tests only: users do not pay for it. It takes a tenth of the
# tests' time; .ci/run leaves it out where it runs tests a second time.
if os.environ.get("GRADFLOW_TEST_SHAPES", "1") != "0":
    jaxtyping.install_import_hook("gradflow", "beartype.beartype")

X64 = os.environ.get("GRADFLOW_TEST_X64", "1") != "0"
jax.config.update("jax_enable_x64", X64)
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("Agg")

# Most of the tests' time goes into compiling: all workers, and the commands that tests run, share
# what they compiled, in this run and in the next one. One folder for all, as JAX's keys hold its
# path; no programs that compile as soon as they are written.
_COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"

# Python looks for garbage by how many objects are new, of which tracing makes many and leaves
# little; a full collection takes a third of a second, for what was imported alone.
gc.set_threshold(20_000, 20, 20)

REFERENCE = Path(__file__).parent / "reference"

# Medium tests of these are run once by .ci/run and not again in float32, where they would tell
# nothing else: what they check is logic on the host, files, drawings and commands, or theory, which
# is float64's in both runs, beside simulations whose own tests are run twice.
_ONCE = {
    *("test_attacks", "test_cli", "test_execution", "test_experiments", "test_figures"),
    *("test_remedies", "test_report", "test_spectra", "test_studies_without_theory"),
    *("test_transformer_remedies", "test_verdict"),
}
# About how many seconds a test takes, by its marker.
_SECONDS = {"slow": 5.0, "medium": 2.0}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is run once; the dearest modules come first, and no worker is idle at the end."""
    seconds = collections.Counter[Path]()
    for item in items:
        if item.path.stem in _ONCE:
            item.add_marker("once")
        marked = (_SECONDS[name] for name in _SECONDS if item.get_closest_marker(name))
        seconds[item.path] += next(marked, 0.2)
    items.sort(key=lambda item: (-seconds[item.path], item.path))


def pytest_collection_finish() -> None:
    """Leave what was imported out of all collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def key() -> jax.Array:
    """The one key of all tests; derive others by `jax.random.fold_in` or `split`."""
    return jax.random.key(0)


@pytest.fixture(scope="session", autouse=True)
def _keep_no_traces() -> Iterator[None]:
    """Keep no traced programs, but where a test has a cache of its own, and by tests' processes.

    Exporting them takes a seventh of a fresh run; and what a test has patched is not for others.
    """
    from gradflow import _programs

    folder = _programs.cache_folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _programs, "cache_folder", lambda: None if folder() == _COMPILED else folder()
        )
        yield


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    """Drop what tests compiled before it is too much for the process.

    Each program that XLA compiles for a CPU holds memory maps. Linux allows a process 65530 of
    them; all tests together need more, some modules alone, and XLA's answer is a segmentation
    fault. Their list takes some hundredths of a second to read, and a test of an instant adds few.
    """
    begun = time.perf_counter()
    yield
    if time.perf_counter() - begun > 0.2 and _memory_maps() > 40_000:
        from gradflow._programs import forget

        forget()
        jax.clear_caches()


def _memory_maps() -> int:
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux, no such limit
        return 0


@pytest.fixture
def x64_only() -> None:
    """Skip the test where GRADFLOW_TEST_X64=0: it needs float64."""
    if not X64:
        pytest.skip("needs float64, and GRADFLOW_TEST_X64=0")


@pytest.fixture
def simulations_compiled_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimise simulations' programs, in tests that run them for seconds: 5 times as fast."""
    if os.environ["XLA_FLAGS"] == _SOON:
        from gradflow import _programs

        options = _programs.options

        def optimised(seconds: float, *, computes_twice: bool = False) -> dict[str, str | bool]:
            chosen = options(seconds, computes_twice=computes_twice)
            return chosen | ({"xla_backend_optimization_level": "1"} if computes_twice else {})

        monkeypatch.setattr(_programs, "options", optimised)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test as users run gradflow, without the hook above.

    For what is said to bad input, or where the same few shapes would be checked for a long time.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def small_chunks() -> Iterator[None]:
    """Let a study have chunks of 8 networks, whose files are merged three by three."""
    from gradflow.simulation import _memory
    from gradflow.studies import _plan, _rounds

    plan = _memory.plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan, "_CHUNK_SECONDS", 0.0)
        patch.setattr(_plan, "_CHUNK_VALUES", 1)
        patch.setattr(_rounds, "_MERGED_FILES", 3)
        patch.setattr(_memory, "plan", lambda *a, **k: dataclasses.replace(plan(*a, **k), block=8))
        yield


@pytest.fixture(scope="session")
def load_reference() -> Callable[[str], list[dict[str, Any]]]:
    """Return a function from a table's name to its rows, numbers as decimal strings."""
    return _rows


@functools.cache
def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))["rows"]
