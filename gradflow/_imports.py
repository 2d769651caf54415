"""Functions of somebody's own module, by text as ``module:function``, where importing is allowed.

Importing runs the module. So text alone imports nothing unless who asks for it says so: the command
line for its own arguments, and who reads a study file for what stands in it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradflow._checks import shown
from gradflow.errors import InputError

__all__ = ["allowed", "function_at", "object_at"]

_is_allowed: bool | None = False


@contextmanager
def allowed(yes: bool | None) -> Iterator[None]:
    """Whether `object_at` imports, until the end of a ``with`` statement.

    With None it neither imports nor refuses.
    """
    global _is_allowed  # noqa: PLW0603  (of the process: threads of a study share it)
    before, _is_allowed = _is_allowed, yes
    try:
        yield
    finally:
        _is_allowed = before


def object_at(text: str, name: str) -> Any:
    """What a text as ``package.module:function`` names; None where it is only named.

    The current directory is searched first, as by ``python -m``.

    Parameters
    ----------
    text
        The module and the name in it.
    name
        The argument that it is for.

    Raises
    ------
    InputError
        If importing is not allowed, the module is not found or cannot be imported, or it has
        nothing of this name.
    """
    module, _, inner = (part.strip() for part in text.partition(":"))
    given = f"{name} is {shown(text)}"
    if _is_allowed is None:
        return None
    if not _is_allowed:
        raise InputError(
            f"{given}, a function to import, and nothing is imported here; --allow-imports lets a "
            "study file import, and in Python the function itself is given"
        )
    if not all(part.isidentifier() for part in (*module.split("."), *inner.split("."))):
        raise InputError(f"{given}; it is module:function, as my_module:my_function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{given}, and there is no module {error.name!r}") from error
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{given}, and importing {module!r} raised {type(error).__name__}: {reason[:200]}"
        ) from error
    for part in inner.split("."):
        if not hasattr(value, part):
            raise InputError(f"{given}, and {module!r} has no {inner!r}")
        value = getattr(value, part)
    return value


def function_at(text: str, name: str = "activation") -> Callable[..., Any] | None:
    """The function that a text as ``package.module:function`` names; None where it is only named.

    Raises
    ------
    InputError
        As `object_at` does, or if it is no function.
    """
    value = object_at(text, name)
    if value is not None and not callable(value):
        raise InputError(f"{name} is {shown(text)}, which is {shown(value)}; it is a function")
    return value
