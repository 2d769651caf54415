"""Compiling programs: how well, and where what was compiled is kept for other processes.

A program is compiled with fewer optimisations where it runs for less time than they take. Programs
and what they compile to are kept in one folder: JAX's compilation cache where there is one, else a
folder of gradflow's own, for gradflow's programs alone.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from gradflow import _cache_folder

__all__ = ["cache_folder", "caching", "options"]

# CPU seconds of a run below which optimisations cost more than they save. Measured: the program of
# a forward and backward pass compiles in 3.5 s; without XLA's newer code for elementwise loops in
# 2.3 s, to run slower by a tenth to a third; without optimisations in 1 s, to run 5 times slower.
_SHORT, _SHORTEST = 3.0, 0.25


def options(seconds: float, *, computes_twice: bool = False) -> dict[str, str | bool]:
    """The compiler's options for a program, by how long it will run.

    Results differ by rounding at most.

    Parameters
    ----------
    seconds
        How long all runs of the program will take, in seconds of one core.
    computes_twice
        Whether the program computes values again that must be the same to the last bit, as a
        backward pass does those of the forward pass. Without optimisations they may differ.

    Returns
    -------
    dict
        Options for `jax.stages.Lowered.compile`; none on accelerators.
    """
    if jax.default_backend() != "cpu":
        return {}
    # XLA's default leaves half of a wide vector unit unused. This matters for random numbers, which
    # are arithmetic and nothing else (a fifth of matrix_free's time).
    chosen: dict[str, str | bool] = {"xla_cpu_prefer_vector_width": "512"}
    if seconds < _SHORT and jax.__version_info__ < (0, 11):  # later ones know no other way
        chosen["xla_cpu_use_fusion_emitters"] = False
    if seconds < _SHORTEST and not computes_twice:
        chosen["xla_backend_optimization_level"] = "0"
    return chosen


@functools.cache
def _own_folder() -> Path | None:
    folder = _cache_folder.usable()
    if folder is not None:
        _cache_folder.mend(folder)
    return folder


def _setting(name: str) -> Any:
    """The value of one of JAX's settings, which its own types don't know."""
    return getattr(jax.config, name)


def cache_folder() -> Path | None:
    """The folder that programs are kept in, JAX's or gradflow's own; None where none are kept."""
    if not _setting("jax_enable_compilation_cache"):
        return None
    configured = _setting("jax_compilation_cache_dir")
    return Path(configured) if configured else _own_folder()


class _OwnCache:
    """JAX's compilation cache in gradflow's own folder, while gradflow compiles and no longer."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._before: dict[str, Any] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users and not _setting("jax_compilation_cache_dir"):
                folder = cache_folder()
                if folder is not None:
                    ours = {"jax_compilation_cache_dir": str(folder), **_cache_folder.SETTINGS}
                    self._before = {name: _setting(name) for name in ours}
                    self._set(ours)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._before:
                    self._set(self._before)
                    self._before = {}
                    compilation_cache.reset_cache()

    def _set(self, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            jax.config.update(name, value)


# Within it, what is compiled is kept for other processes. Several threads may be within.
caching = _OwnCache()
