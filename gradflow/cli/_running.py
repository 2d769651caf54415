"""How a study runs in a command: its progress, interruptions, and other processes that join it."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gradflow.cli._process import GRACE, say
from gradflow.errors import InputError

# Seconds between two lines of progress, where there is no terminal.
_LINE_EVERY = 10.0


def run(study: Any, folder: Path, share: Any = None) -> int:
    """Run a study, or a share of it, into a folder, with progress; exit if it is interrupted.

    Returns
    -------
    int
        The number of networks in the folder.
    """
    import jax  # noqa: PLC0415

    from gradflow.studies import _execution  # noqa: PLC0415
    from gradflow.studies._plan import WHOLE  # noqa: PLC0415

    with _interruptible() as stop, _progress() as report:
        outcome = _execution.run(study, folder, share=share or WHOLE, progress=report, stop=stop)
    if jax.process_index() == 0 and not outcome.finished:
        say(f"gradflow: {str(folder)!r} holds {outcome.networks} networks")
        raise typer.Exit(130)
    return outcome.networks


@contextmanager
def distributed(
    auto: bool, coordinator: str | None, processes: int, process: int
) -> Iterator[None]:
    """Join the other processes with ``--distributed`` or ``--coordinator``."""
    import jax  # noqa: PLC0415

    if not auto and coordinator is None:
        yield
        return
    try:
        if coordinator is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the processes do not find each other ({reason}); give --coordinator HOST:PORT, "
            "--processes and --process to each"
        ) from error
    try:
        yield
    finally:
        jax.distributed.shutdown()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let SIGINT and SIGTERM request a stop; the second signal stops at once."""
    stopping = False

    def request_stop(*_: object) -> None:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True
        say(
            f"finishing the chunk, for {GRACE:g} s at most; press again to stop at once; "
            "the same command resumes from there"
        )

    before = {
        number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """Report steps on standard error: a bar on a terminal, else a line now and then."""
    first: dict[str, tuple[float, int]] = {}

    def rate(step: Any) -> float:
        """How many a second, since the first step of these."""
        now = time.perf_counter()
        start, done = first.setdefault(step.what, (now, step.done))
        return (step.done - done) / (now - start) if now > start else float("nan")

    def state(step: Any) -> str:
        each = rate(step)
        parts = [f"{each:.3g} {step.what}/s"] if each > 0 else []
        if step.statistic:
            parts.append(f"|z| up to {step.largest_z:.2g} ({step.statistic})")
        return ", ".join(parts)

    if not sys.stderr.isatty():
        last: dict[str, float] = {}

        def line(step: Any) -> None:
            now, text = time.perf_counter(), state(step)
            if step.done < step.total and now - last.get(step.what, -_LINE_EVERY) < _LINE_EVERY:
                return
            last[step.what] = now
            each = rate(step)
            left = f", {duration((step.total - step.done) / each)} left" if each > 0 else ""
            say(f"{step.done} of {step.total} {step.what}{left}{', ' if text else ''}{text}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def bar(step: Any) -> None:
            if step.what not in tasks:
                tasks[step.what] = bars.add_task(step.what, total=step.total, state="")
            task = tasks[step.what]
            bars.update(task, completed=step.done, total=step.total, state=state(step))

        yield bar


def duration(seconds: float) -> str:
    """A duration in words, as ``12 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
