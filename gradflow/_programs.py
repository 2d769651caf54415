"""Programs: functions of arrays, traced and compiled once, and kept for other processes.

Most of the time to a first answer goes into tracing, and JAX's compilation cache saves compiling
alone. So a traced program is kept too, as the bytes of `jax.export`, beside what it compiles to: by
the text of its function, its constants and its arguments' shapes, and by a digest of gradflow's
source code, so that no other code's program is ever found.
"""

import functools
import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.export
import numpy as np
from jaxtyping import PyTreeDef

from gradflow._compilation import cache_folder, caching, options
from gradflow._identity import (
    NotStorableError,
    closes_over_tracer,
    identity,
    source,
    tree_from_plain,
    tree_to_plain,
)

__all__ = ["Float64Program", "forget", "program"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_FOLDER, _SUFFIX = "traced", ".program"
# Traced programs that are kept, of 20 to 200 kB each; the least recently used go first.
_MOST_KEPT = 2000
# Settings of JAX that a traced program depends on.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)


class _Traced:
    """A function of arrays for arguments of these shapes, traced, or found on disk."""

    def __init__(
        self, function: Callable, structure: PyTreeDef, shapes: tuple, seconds: float, twice: bool
    ) -> None:
        """Trace a function whose arguments have this structure, with leaves of these shapes."""
        self._options = functools.partial(options, seconds, computes_twice=twice)
        self._shapes = shapes
        path = _path_of(function, structure, shapes)
        kept = None if path is None else _load(path)
        if kept is None:
            self.structure, exported = _trace(function, structure, shapes, path)
        else:
            self.structure, exported = kept
        self._lowered = jax.jit(exported).lower(*shapes)

    @functools.cached_property
    def compiled(self) -> Callable:
        """The compiled program, of and to leaves."""
        with caching():
            return self._lowered.compile(self._options())

    @property
    def result(self) -> Any:
        """The shapes and dtypes of the result."""
        return jax.tree.unflatten(self.structure, jax.tree.leaves(self._lowered.out_info))


def _trace(
    function: Callable, structure: PyTreeDef, shapes: tuple, path: Path | None
) -> tuple[PyTreeDef, Callable]:
    """The structure of the result, and the program of leaves; kept if there is a path for it."""
    results: list[PyTreeDef] = []

    def of_leaves(*leaves: Any) -> list:
        values, result = jax.tree.flatten(function(*jax.tree.unflatten(structure, leaves)))
        results.append(result)
        return values

    jitted = jax.jit(of_leaves)
    if path is None:
        jax.eval_shape(jitted, *shapes)
        return results[-1], jitted
    exported = jax.export.export(jitted)(*shapes)
    with suppress(NotStorableError):
        _save(path, json.dumps(tree_to_plain(results[-1])).encode(), bytes(exported.serialize()))
    return results[-1], exported.call


def _path_of(function: Callable, structure: PyTreeDef, shapes: tuple) -> Path | None:
    """Where the program is kept; None where it is not."""
    folder = cache_folder()
    if folder is None or jax.process_count() > 1:
        return None
    try:
        text = identity((function, structure))
    except NotStorableError:
        return None
    settings = [getattr(jax.config, name) for name in _SETTINGS]
    everything = repr((source(), jax.default_backend(), settings, shapes, text))
    return folder / _FOLDER / (hashlib.sha256(everything.encode()).hexdigest() + _SUFFIX)


def _save(path: Path, structure: bytes, content: bytes) -> None:
    """Write a program's file, whole or not at all; not at all where that is not possible."""
    body = len(structure).to_bytes(4, "big") + structure + content
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(file.name, path)
        kept = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)
        for old in kept[:-_MOST_KEPT]:
            old.unlink(missing_ok=True)


def _load(path: Path) -> tuple[PyTreeDef, Callable] | None:
    """The structure of a program's result, and the program; None if it is not there, or damaged."""
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    seal, body = content[:32], content[32:]
    if hashlib.sha256(body).digest() != seal:
        return None
    end = 4 + int.from_bytes(body[:4], "big")
    structure = tree_from_plain(json.loads(body[4:end]))
    return structure, jax.export.deserialize(bytearray(body[end:])).call


# The programs of each decorated function.
_all: list[dict[Hashable, _Traced]] = []


def forget() -> None:
    """Drop all programs of this process, as `jax.clear_caches` does those of `jax.jit`."""
    for programs in _all:
        programs.clear()
    Float64Program.of_shapes.cache_clear()


def program(
    *static: str, seconds: float = 0.01, twice: bool = False
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Decorate a function of arrays: called with numbers, it is a compiled program of its own.

    Within another program, and under `jax.grad` and `jax.vmap`, it is a function under `jax.jit`.

    Parameters
    ----------
    *static
        The names of arguments that are constants of the program; they are hashable.
    seconds
        How long a run takes, in seconds of one core; see `_compilation.options`.
    twice
        Whether it computes values again that must be the same to the last bit.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        jitted = jax.jit(function, static_argnames=static)
        signature = inspect.signature(function)
        programs: dict[Hashable, _Traced] = {}
        _all.append(programs)

        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            arguments = signature.bind(*args, **kwargs)
            arguments.apply_defaults()
            given = dict(arguments.arguments)
            constants = {name: given.pop(name) for name in static}
            leaves, structure = jax.tree.flatten((given,))
            if not all(map(_is_here, leaves)):
                return jitted(*args, **kwargs)
            shapes = tuple(map(jax.typeof, leaves))
            settings = tuple(getattr(jax.config, name) for name in _SETTINGS)
            key = (tuple(constants.values()), structure, shapes, settings)
            if (traced := programs.get(key)) is None:
                if closes_over_tracer(constants):
                    return jitted(*args, **kwargs)
                specs = tuple(map(_as_spec, shapes))
                bound = functools.partial(_by_name, function, constants)
                traced = programs[key] = _Traced(bound, structure, specs, seconds, twice)
            values = traced.compiled(*map(_as_array, leaves, shapes))
            return jax.tree.unflatten(traced.structure, values)

        return call

    return decorate


def _by_name(function: Callable, constants: dict[str, Any], given: dict[str, Any]) -> Any:
    """The value of a function for arguments by name."""
    return function(**constants, **given)


def _as_spec(shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, weak_type=shape.weak_type)


def _as_array(leaf: Any, shape: Any) -> Any:
    """A leaf as an array, for which JAX need compile nothing."""
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, shape.dtype)


def _is_here(leaf: Any) -> bool:
    """Whether a leaf is a number or an array with values, on the device that programs run on."""
    if isinstance(leaf, jax.core.Tracer):
        return False
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.sharding.device_set == {jax.devices()[0]}


class Float64Program:
    """A function of NumPy arrays that computes in float64, whatever JAX's x64 setting.

    The function is traced at once and compiled at the first call. A call traces nothing, and so
    may be made in one thread while another has x64 off. `jax.jit` does not allow that: where two
    threads with different settings hand JAX the same NumPy array at once, both get the dtype that
    one of them wants (JAX 0.10, one time in two).

    Attributes
    ----------
    result
        The shapes and dtypes of the function's result.
    """

    @classmethod
    def of(
        cls, function: Callable, arguments: tuple, seconds: float, **static: Hashable
    ) -> "Float64Program":
        """The program of a function for arguments of these shapes, traced once and cached.

        Parameters
        ----------
        function
            A function that JAX can trace.
        arguments
            Arguments with the shapes of those that the program will be called with.
        seconds
            How long a run will take, in seconds of one core.
        **static
            Further arguments, which are constants of the program.
        """
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple(np.shape(leaf) for leaf in leaves)
        return cls.of_shapes(function, structure, shapes, seconds, tuple(static.items()))

    @classmethod
    @functools.lru_cache(maxsize=32)
    def of_shapes(
        cls,
        function: Callable,
        structure: PyTreeDef,
        shapes: tuple[tuple[int, ...], ...],
        seconds: float,
        static: tuple[tuple[str, Hashable], ...],
    ) -> "Float64Program":
        """The program for leaves of these shapes."""
        specs = tuple(jax.ShapeDtypeStruct(shape, np.float64) for shape in shapes)
        bound = functools.partial(function, **dict(static))
        with jax.enable_x64(True):
            return cls(_Traced(bound, structure, specs, seconds, twice=False))

    def __init__(self, traced: _Traced) -> None:
        self._traced, self.result = traced, traced.result

    def compile(self) -> None:
        """Compile the program now, before its first call."""
        self._traced.compiled  # noqa: B018  (a cached property)

    def __call__(self, *arguments: Any) -> Any:
        """The function's result, as NumPy arrays."""
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(arguments)]
        with jax.enable_x64(True), jax.no_tracing(True):
            values = self._traced.compiled(*leaves)
            return jax.tree.unflatten(self._traced.structure, map(np.asarray, values))
