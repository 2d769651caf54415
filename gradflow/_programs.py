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
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.export
import numpy as np
from jaxtyping import PyTreeDef

from gradflow._cached_property import cached_property
from gradflow._compilation import cache_folder, caching, options
from gradflow._identity import (
    NotStorableError,
    closes_over_tracer,
    identity,
    source,
    tree_from_plain,
    tree_to_plain,
)

__all__ = ["Float64Program", "Program", "forget", "program"]

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


class Program:
    """A function of arrays for arguments of these shapes: traced, or found on disk, and compiled.

    Attributes
    ----------
    result
        The shapes and dtypes of the function's result.
    """

    @classmethod
    def of(
        cls,
        function: Callable,
        arguments: tuple,
        seconds: float,
        /,
        *,
        twice: bool = False,
        **constants: Any,
    ) -> "Program":
        """The program of a function for arguments of these shapes, traced once and cached.

        Parameters
        ----------
        function
            A function that JAX can trace.
        arguments
            Arguments with the shapes of those that the program will be called with.
        seconds
            How long all runs will take, in seconds of one core; see `_compilation.options`.
        twice
            Whether it computes values again that must be the same to the last bit.
        **constants
            Further arguments, by name, which are constants of the program.
        """
        leaves, structure = jax.tree.flatten(arguments)
        compiler = tuple(options(seconds, computes_twice=twice).items())
        named, shapes = tuple(constants.items()), tuple(map(jax.typeof, leaves))
        # In turn: what one thread has traced, others need not.
        with _lock:
            return _programs(function, named, structure, shapes, compiler, _settings())

    def __init__(
        self, function: Callable, structure: PyTreeDef, shapes: tuple, compiler: dict[str, Any]
    ) -> None:
        """Trace a function whose arguments have this structure, with leaves of these shapes."""
        self._compiler, self._lock, self._shapes = compiler, threading.Lock(), shapes
        path = _path_of(function, structure, shapes)
        kept = None if path is None else _load(path)
        self._structure, traced = kept or _trace(function, structure, shapes, path)
        self._lowered = jax.jit(traced).lower(*shapes)
        self.result = jax.tree.unflatten(self._structure, jax.tree.leaves(self._lowered.out_info))

    @cached_property
    def _compiled(self) -> Callable:
        """The compiled program, of and to leaves."""
        with caching():
            return self._lowered.compile(self._compiler)

    def compile(self) -> None:
        """Compile the program now, before its first call."""
        with self._lock:
            self._compiled  # noqa: B018  (a cached property)

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        self.compile()
        values = self._compiled(*map(_as_array, jax.tree.leaves(arguments), self._shapes))
        return jax.tree.unflatten(self._structure, values)


_lock = threading.RLock()
source()  # now, and not when the first program is traced: files may be edited while a process runs


def _settings() -> tuple:
    return tuple(getattr(jax.config, name) for name in _SETTINGS)


@functools.lru_cache(maxsize=512)
def _programs(
    function: Callable,
    constants: tuple[tuple[str, Hashable], ...],
    structure: PyTreeDef,
    shapes: tuple,
    compiler: tuple[tuple[str, Any], ...],
    settings: tuple,  # noqa: ARG001  (what was traced depends on them)
) -> Program:
    if closes_over_tracer((constants, structure)):
        raise _TracedConstantError
    specs = tuple(map(_as_spec, shapes))
    bound = functools.partial(function, **dict(constants))
    return Program(bound, structure, specs, dict(compiler))


class _TracedConstantError(Exception):
    """A constant of a program is being traced, as an activation's parameter may be."""


def forget() -> None:
    """Drop all programs of this process, as `jax.clear_caches` does those of `jax.jit`."""
    _programs.cache_clear()


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
    everything = repr((source(), jax.default_backend(), _settings(), shapes, text))
    return folder / _FOLDER / (hashlib.sha256(everything.encode()).hexdigest() + _SUFFIX)


def _save(path: Path, structure: bytes, content: bytes) -> None:
    """Write a program's file, whole or not at all; not at all where that is not possible."""
    body = len(structure).to_bytes(4, "big") + structure + content
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(file.name, path)
        _discard_oldest(path.parent)


@functools.cache  # once a process: a folder of thousands of files takes some milliseconds to list
def _discard_oldest(folder: Path) -> None:
    kept = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
    for old in kept[:-_MOST_KEPT]:
        old.unlink(missing_ok=True)


def _load(path: Path) -> tuple[PyTreeDef, Callable] | None:
    """The structure of a program's result, and the program; None if it is not there, or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    with suppress(OSError):  # a folder to read from alone
        os.utime(path)
    seal, body = content[:32], content[32:]
    if hashlib.sha256(body).digest() != seal:
        return None
    end = 4 + int.from_bytes(body[:4], "big")
    structure = tree_from_plain(json.loads(body[4:end]))
    return structure, jax.export.deserialize(bytearray(body[end:])).call


def program(
    *static: str, seconds: float | Callable[..., float] = 0.01, twice: bool = False
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Decorate a function of arrays: called with numbers, it is a compiled program of its own.

    Within another program, and under `jax.grad` and `jax.vmap`, it is a function under `jax.jit`.

    Parameters
    ----------
    *static
        The names of arguments that are constants of the program; they are hashable.
    seconds
        How long a run takes, in seconds of one core, or a function of the arguments that says it;
        see `_compilation.options`.
    twice
        Whether it computes values again that must be the same to the last bit.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        jitted = jax.jit(function, static_argnames=static)
        signature = inspect.signature(function)

        def by_name(given: dict[str, Any], /, **constants: Any) -> Any:
            return cast(Callable, function)(**given, **constants)

        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            arguments = signature.bind(*args, **kwargs)
            arguments.apply_defaults()
            given = dict(arguments.arguments)
            constants = {name: given.pop(name) for name in static}
            if all(map(_is_here, jax.tree.leaves(given))):
                with suppress(_TracedConstantError):
                    time = seconds(*args, **kwargs) if callable(seconds) else seconds
                    compiled = Program.of(by_name, (given,), time, twice=twice, **constants)
                    return compiled(given)
            return jitted(*args, **kwargs)

        return call

    return decorate


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

    def __init__(
        self, function: Callable, arguments: tuple, seconds: float, /, **constants: Any
    ) -> None:
        """Trace a function; the arguments are as for `Program.of`."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), float), arguments)
        with jax.enable_x64(True):
            self._program = Program.of(function, shapes, seconds, **constants)
        self.result, self.compile = self._program.result, self._program.compile

    def __call__(self, *arguments: Any) -> Any:
        """The function's result, as NumPy arrays."""
        numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), arguments)
        with jax.enable_x64(True), jax.no_tracing(True):
            return jax.tree.map(np.asarray, self._program(*numbers))
