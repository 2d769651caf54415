"""The folder in which programs are kept between processes. Importing this module starts no JAX."""

import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradflow._files import complete
from gradflow.errors import InputError

__all__ = ["SETTINGS", "code", "kept", "mend", "usable"]

# JAX's settings for the folder: its size in bytes, and what is worth keeping.
SETTINGS = {
    "jax_compilation_cache_max_size": 1 << 30,
    "jax_persistent_cache_min_compile_time_secs": 0.02,
}
_OFF = ("0", "off", "no", "false")


def usable() -> Path | None:
    """The folder, made if it is new; None where there is no home or none that can be written to.

    ``GRADFLOW_CACHE`` in the environment is another folder, or ``off``. Compiled programs are for
    one kind of processor; a home folder may be shared by several.
    """
    chosen = os.environ.get("GRADFLOW_CACHE", "")
    if chosen.lower() in _OFF:
        return None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(chosen or Path(home) / "gradflow")
        folder /= hashlib.sha256(_processor().encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


@functools.cache
def code() -> str:
    """A digest of gradflow's source code."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def kept(name: str, make: Callable[[], Any]) -> Any:
    """A value that gradflow's code alone decides, of what JSON knows: made once, and then read."""
    folder = usable()
    if folder is None:
        return make()
    path = folder / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["code"] == code():
            return found["value"]
    value = make()
    with suppress(InputError), complete(path) as file:
        file.write_text(json.dumps({"code": code(), "value": value}), encoding="utf-8")
    return value


def mend(folder: Path) -> None:
    """Take away what a process was killed in the middle of keeping.

    JAX writes a program, and then a file with the time of its last use, which it reads of all
    programs whenever it keeps one more: where one has none, nothing is kept ever again.
    """
    with suppress(OSError):
        there = set(os.listdir(folder))
        programs = (name.removesuffix("-cache") for name in there if name.endswith("-cache"))
        broken = [name for name in programs if f"{name}-atime" not in there]
        if not broken:
            return
        from filelock import FileLock  # noqa: PLC0415  (hardly ever needed)

        # JAX's own lock: another process may be about to write the time. (A timeout is an OSError.)
        with FileLock(folder / ".lockfile", timeout=1):
            for name in broken:
                if not (folder / f"{name}-atime").exists():
                    (folder / f"{name}-cache").unlink(missing_ok=True)


def _processor() -> str:
    """The kind of this machine's processor: programs may not run on another kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return platform.machine() + next((x for x in lines if x.startswith(("flags", "Feat"))), "")
