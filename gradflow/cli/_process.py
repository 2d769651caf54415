"""The process that a command runs in: its streams, its signals, and what its environment asks."""

import hashlib
import logging
import os
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

__all__ = ["GRACE", "INTERRUPTED", "discard_output", "ended_soon", "prepare", "say"]

# What somebody may have set to find mistakes in a program of their own, and why it is not for ours.
_NOT_FOR_US = {
    "JAX_DEBUG_NANS": "NaN is an answer here",
    "JAX_DEBUG_INFS": "infinity is an answer here",
    "JAX_DISABLE_JIT": "all programs are compiled here",
    "JAX_TRANSFER_GUARD": "inputs and results are NumPy's here",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": "inputs are NumPy's here",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": "results are NumPy's here",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": "networks are shared among devices here",
    "JAX_NUMPY_DTYPE_PROMOTION": "integers and floats are mixed here",
    "JAX_NUMPY_RANK_PROMOTION": "arrays of different ranks are mixed here",
}
_OFF = ("", "0", "f", "false", "n", "no", "off", "allow", "standard")
_TO_STOP = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "gradflow: interrupted"
# Seconds from Ctrl-C to the end of the process, whatever it is in.
GRACE = 3.0


def prepare() -> None:
    """Make the process fit for a command, before JAX is imported and reads the environment."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # letters that its encoding has not are escaped
            stream.reconfigure(errors="backslashreplace")
    # XLA's own log has nothing for a user: what goes wrong is raised.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    warnings.filterwarnings("ignore", "Cache value for key")
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.ERROR)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # warns without a home folder
    for name, reason in _NOT_FOR_US.items():
        value = os.environ.pop(name, "")
        if value.lower() not in _OFF:
            say(f"gradflow: {name}={value} is left out: {reason}")
    _keep_compiled()


def say(text: str) -> None:
    """Print a line on standard error; where that cannot be written to, nothing."""
    with suppress(OSError):
        typer.echo(text, err=True)


def discard_output() -> None:
    """Let nothing more go to standard output, which could not be written to: not at exit either."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def ended_soon() -> Iterator[threading.Event]:
    """End the process at the latest some seconds after a signal that stops it.

    Python tells a program of a signal between two of its own steps, and compiling is one that may
    take half a minute; at its end it waits for threads, which may compile too. Files are written
    whole or not at all, so that nothing is lost.

    Yields
    ------
    threading.Event
        To be set after the last message: the process then ends at once.
    """
    last_message = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield last_message
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while (number := os.read(reading, 1)) and number[0] not in _TO_STOP:
            pass
        if number:
            if not last_message.wait(GRACE):
                say(INTERRUPTED)
            os._exit(130)
        os.close(reading)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield last_message
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)  # which ends the watching thread


def _keep_compiled() -> None:
    """Let JAX keep what it compiled between commands: compiling is most of a command's time.

    In a folder of gradflow's own, without JAX's environment variable for it. Programs are for one
    kind of processor; a home folder may be shared by several.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradflow"
            folder /= hashlib.sha256(_processor().encode()).hexdigest()[:16]
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or none to write to
            return
        if not os.access(folder, os.W_OK):
            return
        for name, value in {
            "JAX_COMPILATION_CACHE_DIR": str(folder),
            "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 30),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
        }.items():
            os.environ.setdefault(name, value)
    if os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE", "-1") != "-1":
        _mend(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))


def _mend(folder: Path) -> None:
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
