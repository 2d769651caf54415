"""What a function and its constants are, as text that is the same in every process.

A program that is stored on disk is found again by it. What has no such text, as a function of
somebody's own program, is refused: its programs live as long as the process.
"""

import dataclasses
import enum
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax.tree_util import PyTreeDef, default_registry

from gradflow._cache_folder import code

__all__ = [
    "NotStorableError",
    "closes_over_tracer",
    "identity",
    "source",
    "tree_from_plain",
    "tree_to_plain",
]

# Packages whose functions are known by their names: what these do depends on the version alone.
_KNOWN_PACKAGES = ("gradflow", "jax", "jaxlib", "numpy", "equinox", "optax", "builtins")
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class NotStorableError(Exception):
    """A value that has no name and no content that another process would know."""


@functools.cache
def source() -> str:
    """A digest of gradflow's source code and of the versions of what it computes with."""
    versions = (sys.version, jax.__version__, jaxlib.version.__version__, np.__version__)
    everything = (code(), *versions, importlib.metadata.version("equinox"))
    return hashlib.sha256(repr(everything).encode()).hexdigest()


def identity(value: Any) -> str:
    """The text of a function, a constant, or a pytree's structure.

    Raises
    ------
    NotStorableError
        If another process could not know what it is.
    """
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({_joined(value)})"
    if isinstance(value, (set, frozenset)):
        return f"set({','.join(sorted(map(identity, value)))})"
    if isinstance(value, dict):
        return f"dict({_joined(part for item in value.items() for part in item)})"
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"array({value.dtype},{value.shape},{content})"
    if isinstance(value, np.dtype):
        return f"dtype({value.name})"
    if isinstance(value, PyTreeDef):
        node = value.node_data()
        return f"node({_joined(node)})[{_joined(value.children())}]" if node else "leaf"
    if value is type(None):
        return "NoneType"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return f"{_name(type(value))}({_joined(fields)})"
    if isinstance(value, functools.partial):
        return f"partial({_joined((value.func, value.args, value.keywords))})"
    if isinstance(value, MethodType):
        return f"method({_joined((value.__func__, value.__self__))})"
    return _of_code(value)


def _joined(values: Iterable[Any]) -> str:
    return ",".join(map(identity, values))


def _name(value: Any) -> str:
    """The module and the name under which another process finds the same object."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str)):
        raise NotStorableError(repr(value))
    if module.partition(".")[0] not in _KNOWN_PACKAGES or _at(module, name) is not value:
        raise NotStorableError(repr(value))
    return f"{module}:{name}"


def _at(module: str, name: str) -> Any:
    """The object of this name, or None."""
    return functools.reduce(
        lambda value, part: getattr(value, part, None), name.split("."), sys.modules.get(module)
    )


def _of_code(value: Any) -> str:
    """The text of a function: by name, or by name with what it closes over."""
    try:
        return _name(value)
    except NotStorableError:
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None and not isinstance(value, FunctionType):
            return f"{type(value).__name__}({identity(wrapped)})"
    if not isinstance(value, FunctionType):
        return _name_of_constant(value)
    if value.__globals__["__name__"].startswith("jaxtyping."):  # it checks shapes, in tests
        return identity(inspect.unwrap(value))
    if value.__module__.partition(".")[0] not in _KNOWN_PACKAGES:
        raise NotStorableError(repr(value))
    closed_over = [cell.cell_contents for cell in value.__closure__ or ()]
    defaults = value.__defaults__, value.__kwdefaults__
    line = value.__code__.co_firstlineno
    return f"{value.__module__}:{value.__qualname__}:{line}({_joined((closed_over, defaults))})"


def closes_over_tracer(value: Any) -> bool:
    """Whether a constant has a parameter that is traced, as an activation may have."""
    parts: Iterable[Any] = ()
    if isinstance(value, jax.core.Tracer):
        return True
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    elif isinstance(value, (tuple, list)):
        parts = value
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, PyTreeDef):
        parts = (value.node_data(), value.children())
    elif isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        parts = (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        parts = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = [part for part in parts if part is not value]
    elif hasattr(value, "__wrapped__"):
        parts = (value.__wrapped__,)
    return any(map(closes_over_tracer, parts))


def tree_to_plain(tree: PyTreeDef) -> Any:
    """The structure of a pytree as lists, numbers and texts that JSON can hold.

    Raises
    ------
    NotStorableError
        If a node has a constant that is no number, text or object of gradflow's with a name.
    """
    node = tree.node_data()
    if node is None:
        return None
    if node[0] is type(None):
        return []
    return [_name(node[0]), _to_plain(node[1]), [tree_to_plain(c) for c in tree.children()]]


def tree_from_plain(plain: Any) -> PyTreeDef:
    """The inverse of `tree_to_plain`."""
    if plain is None:
        return jax.tree.structure(0)
    if not plain:
        return jax.tree.structure(None)
    name, constants, children = plain
    node = (_found(name), _from_plain(constants))
    parts = [tree_from_plain(child) for child in children]
    return PyTreeDef.from_node_data_and_children(default_registry, node, parts)


def _to_plain(value: Any) -> Any:
    if isinstance(value, (type(None), bool, int, float, str)) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_to_plain(part) for part in value]}
    return {"name": _name(value) if isinstance(value, type) else _name_of_constant(value)}


def _name_of_constant(value: Any) -> str:
    """The name of a constant of one of gradflow's modules, or of the module of its class."""
    own = type(value).__module__
    ours = (name for name in list(sys.modules) if name.partition(".")[0] == "gradflow")
    for module in (own, *ours) if own.partition(".")[0] in _KNOWN_PACKAGES else ():
        for name, known in vars(sys.modules[module]).items():
            if known is value:
                return f"{module}:{name}"
    raise NotStorableError(repr(value))


def _from_plain(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "name":
        return _found(value)
    sequence: Callable = {"tuple": tuple, "list": list}[kind]
    return sequence(_from_plain(part) for part in value)


def _found(name: str) -> Any:
    module, _, inner = name.partition(":")
    importlib.import_module(module)
    return _at(module, inner)
