"""The command line: a thin face on `comparison`, `studies`, `theory` and `figures`."""

import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer

import gradflow
from gradflow.cli import simulating, studying, theory, training
from gradflow.cli.shared import Json, app, print_json
from gradflow.errors import InputError

__all__ = ["app", "main", "simulating", "studying", "theory", "training"]

_OUT_OF_MEMORY = "out of memory; use fewer inputs, a smaller width or depth, or sampler matrix_free"


@app.command(name="list")
def list_names(as_json: Json = False) -> None:
    """Every activation, weight ensemble and statistic, by name."""
    from gradflow import activations, ensembles, statistics  # noqa: PLC0415

    names = {
        "activations": [a.name for a in activations.ALL],
        "weights": [e.name for e in ensembles.ALL],
        "distributions": sorted(ensembles.DISTRIBUTIONS),
        "samplers": ["auto", "dense", "matrix_free"],
        "statistics": {s.name: s.label for s in statistics.ALL},
    }
    if as_json:
        print_json(names)
        return
    for kind, those in names.items():
        typer.echo(f"{kind}:")
        lines = those.items() if isinstance(those, dict) else ((name, "") for name in those)
        for name, label in lines:
            typer.echo(f"  {name:<26}{label}".rstrip())


def main() -> None:
    """Run the command line: exit code 0, 2 for bad input, 130 when interrupted."""
    _keep_compiled()
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.TyperException as error:
        given = " ".join(sys.argv[1:])
        _fail(f"{' '.join(error.format_message().split())} (given: {given})")
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", code=130)
    except MemoryError:
        _fail(_OUT_OF_MEMORY)
    except RuntimeError as error:  # JAX's
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(_OUT_OF_MEMORY)
    else:
        sys.exit(code or 0)


def _keep_compiled() -> None:
    """Let JAX keep what it compiled between commands: compiling is most of a command's time.

    Where the user has not said where, by JAX's own environment variable, and before JAX reads it.
    Programs are for one kind of processor; a home folder may be shared by several.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradflow"
        folder /= hashlib.sha256(_processor().encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none to write to
        return
    if os.access(folder, os.W_OK):
        for name, value in {
            "JAX_COMPILATION_CACHE_DIR": str(folder),
            "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 30),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
        }.items():
            os.environ.setdefault(name, value)


def _processor() -> str:
    """Return what tells this machine's processor from others that programs may not run on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return platform.machine() + next((x for x in lines if x.startswith(("flags", "Feat"))), "")


def _fail(message: str, code: int = 2) -> None:
    typer.echo(f"gradflow: {message}", err=True)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"gradflow {gradflow.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
