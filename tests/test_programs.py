"""Programs that are kept between processes: found again, never the wrong one, never in the way."""

import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gradflow import (
    _cache_folder,
    _compilation,
    _programs,
    activations,
    builders,
    ensembles,
    statistics,
)
from gradflow._cached_property import cached_property
from gradflow._identity import NotStorableError, identity, tree_from_plain, tree_to_plain
from gradflow.theory.fixed_points import Analysis


def traced_count(function):
    """A function and a list that grows by one each time that it is traced."""
    traces = []

    @functools.wraps(function)
    def counted(*args, **kwargs):
        traces.append(1)
        return function(*args, **kwargs)

    return counted, traces


def _doubled(x, factor):
    return {"y": factor * x, "pair": (x + 1, None)}


@pytest.fixture
def cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def program_of(monkeypatch):
    """A program of `_doubled` as a new process has it, and the number of times it was traced."""
    counted, traces = traced_count(_doubled)
    # A function of a test has no text, as one of gradflow's has.
    monkeypatch.setattr(_programs, "identity", lambda _: "text")
    return _programs.program("factor")(counted), traces


def test_a_program_is_traced_once_for_all_processes(cache, monkeypatch):
    first, traces = program_of(monkeypatch)
    assert float(first(jnp.array(3.0), 2)["y"]) == 6
    assert len(traces) == 1
    assert len(list((cache / "traced").iterdir())) == 1
    again, traces = program_of(monkeypatch)
    result = again(jnp.array(4.0), 2)
    assert (float(result["y"]), float(result["pair"][0]), result["pair"][1]) == (8, 5, None)
    assert not traces
    again(jnp.arange(3.0), 2)  # another shape is another program
    assert len(traces) == 1


def test_a_damaged_file_is_made_again(cache, monkeypatch):
    program, _ = program_of(monkeypatch)
    program(jnp.array(3.0), 2)
    (file,) = (cache / "traced").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again, traces = program_of(monkeypatch)
    assert float(again(jnp.array(3.0), 2)["y"]) == 6
    assert len(traces) == 1
    assert file.read_bytes() != content


@pytest.mark.usefixtures("cache")
def test_other_source_code_is_another_program(monkeypatch):
    program, _ = program_of(monkeypatch)
    program(jnp.array(3.0), 2)
    monkeypatch.setattr(_programs, "source", lambda: "edited")
    again, traces = program_of(monkeypatch)
    again(jnp.array(3.0), 2)
    assert len(traces) == 1


def test_a_function_of_somebody_else_is_not_kept(cache):
    program = _programs.program("phi")(lambda x, phi: phi(x))
    assert float(program(jnp.array(2.0), lambda x: x * x)) == 4
    assert float(program(jnp.array(2.0), lambda x: x + 5)) == 7
    assert not (cache / "traced").exists()


def test_programs_are_functions_within_others():
    program = _programs.program("factor")(lambda x, factor: factor * x**2)
    assert float(jax.grad(program)(3.0, 2)) == 12
    np.testing.assert_array_equal(jax.vmap(lambda x: program(x, 1))(jnp.arange(3.0)), [0, 1, 4])
    assert float(jax.jit(lambda x: program(x, 3))(2.0)) == 12


def test_constants_that_are_traced_are_seen():
    program = _programs.program("phi")(lambda x, phi: phi(x))

    def scaled(slope):
        return program(jnp.array(3.0), lambda x: slope * x)

    assert float(jax.grad(scaled)(2.0)) == 3


@pytest.mark.usefixtures("x64_only")
def test_dtypes_are_those_of_jax():
    program = _programs.program()(lambda x: x + jnp.ones((), x.dtype))
    assert program(1.0).dtype == jnp.float64
    assert program(np.float32(1)).dtype == jnp.float32
    with jax.enable_x64(False):
        assert program(1.0).dtype == jnp.float32


def test_all_that_gradflow_names_has_a_text():
    values = (*activations.ALL, *ensembles.ALL, *statistics.ALL)
    texts = [identity(value) for value in values]
    assert len(set(texts)) == len(texts)
    assert identity(activations.leaky_relu(0.1)) != identity(activations.leaky_relu(0.2))


def test_what_another_process_cannot_know_has_none():
    assert identity(functools.partial(dict, a=1)) != identity(functools.partial(dict, a=2))
    for value in (lambda x: x, activations.custom(lambda x: x), object()):
        with pytest.raises(NotStorableError):
            identity(value)


def test_structures_survive_json():
    trees = (
        builders.mlp([3, 4, 4, 2], "tanh", "he", norm="layer"),
        Analysis(*range(15)),
        {"b": (1, [2, None]), "a": ()},
    )
    for tree in trees:
        structure = jax.tree.structure(tree)
        assert tree_from_plain(json.loads(json.dumps(tree_to_plain(structure)))) == structure


@pytest.mark.usefixtures("cache")
def test_the_cache_is_gradflow_s_own_and_for_its_programs_alone(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(_compilation, "_own_folder", lambda: own)
    monkeypatch.setitem(_cache_folder.SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x + 1)(1.0).block_until_ready()
    assert not list(own.iterdir())
    with _compilation.caching(), _compilation.caching():
        jax.jit(lambda x: x * 3).lower(1.0).compile()
    assert any(file.name.endswith("-cache") for file in own.iterdir())
    assert jax.config.jax_compilation_cache_dir is None
    kept = set(own.iterdir())
    jax.jit(lambda x: x * 5)(1.0).block_until_ready()
    assert set(own.iterdir()) == kept


def test_the_folder_is_chosen_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADFLOW_CACHE", str(tmp_path / "here"))
    assert _cache_folder.usable().parent == tmp_path / "here"
    monkeypatch.setenv("GRADFLOW_CACHE", "off")
    assert _cache_folder.usable() is None


def test_a_constant_may_have_any_name():
    program = _programs.program("given", "function")(
        lambda x, given, function: x + given * function
    )
    assert float(program(jnp.array(1.0), 2, function=3)) == 7


def test_a_kept_property_of_one_object_does_not_wait_for_anothers():
    """As Python 3.11's does: two threads that each trace, and need one, would wait for ever."""
    begun, kept = threading.Event(), threading.Event()

    class Kept:
        def __init__(self, waits):
            self.waits = waits

        @cached_property
        def value(self):
            if not self.waits:
                return True
            begun.set()
            return kept.wait(timeout=10)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: Kept(waits=True).value)
        assert begun.wait(timeout=10)
        assert Kept(waits=False).value
        kept.set()
        assert waiting.result()
