"""The process that a command runs in: its streams, its signals, and what its environment asks."""

import atexit
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from gradflow import _cache_folder

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
    # Imports and programs are a million objects that stay: a seventh of a short command's time went
    # into looking for those that do not.
    gc.set_threshold(50_000, 20, 20)
    # At the end nothing is looked for: that took as long as importing JAX.
    atexit.register(gc.freeze)
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
    """Let JAX keep what it compiles between commands, unless the environment says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = _cache_folder.usable()
        if folder is None:
            return
        settings = {"jax_compilation_cache_dir": folder, **_cache_folder.SETTINGS}
        for name, value in settings.items():
            os.environ.setdefault(name.upper(), str(value))
    if os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE", "-1") != "-1":
        _cache_folder.mend(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
