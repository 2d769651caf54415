"""The command line: one file a family of commands, on the modules of the same subjects.

Options that describe a network are those of `schema` (`_options`); tables, sentences and JSON are
made in one place (`_output`).
"""

import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

import gradflow
from gradflow import _cache_folder, _imports
from gradflow.cli import (  # each adds its commands
    _attending,  # noqa: F401
    _comparing,  # noqa: F401
    _correlating,  # noqa: F401
    _inspecting,  # noqa: F401
    _noting,  # noqa: F401
    _process,
    _studying,  # noqa: F401
    _theory,  # noqa: F401
    _training,  # noqa: F401
)
from gradflow.cli._options import Json, app
from gradflow.cli._output import print_json
from gradflow.errors import InputError, printable

__all__ = ["app", "main"]

_OUT_OF_MEMORY = "out of memory; use fewer inputs, a smaller width or depth, or sampler matrix_free"
_NOT_KNOWN_TO_JAX = ("Unable to initialize backend", "for environment", "for JAX flag")


@app.command(name="list")
def _list_names(as_json: Json = False) -> None:
    """Every activation, weight ensemble and statistic, by name."""
    names = _cache_folder.kept("names", _names)
    if as_json:
        print_json(names)
        return
    for kind, those in names.items():
        typer.echo(f"{kind}:")
        lines = those.items() if isinstance(those, dict) else ((name, "") for name in those)
        for name, label in lines:
            typer.echo(f"  {name:<26}{label}".rstrip())


def _names() -> dict[str, Any]:
    from gradflow import activations, ensembles, statistics  # noqa: PLC0415  (which import JAX)

    return {
        "activations": [a.name for a in activations.ALL],
        "activation_aliases": activations.ALIASES,
        "weights": [e.name for e in ensembles.ALL],
        "weight_aliases": {name: e.name for name, e in ensembles.ALIASES.items()},
        "distributions": sorted(ensembles.DISTRIBUTIONS),
        "samplers": ["auto", "dense", "matrix_free"],
        "statistics": {s.name: s.label for s in statistics.ALL},
    }


def main() -> None:
    """Run the command line: exit code 0, 2 for bad input, 130 when interrupted."""
    _process.prepare()
    with _process.ended_soon() as last_message:
        code = _run()
        if code == 130:
            _process.say(_process.INTERRUPTED)
            last_message.set()
        sys.exit(code)


def _run() -> int:
    try:
        with _imports.allowed(True):  # for what stands in the command itself
            code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        _fail(str(error))
    except typer.TyperException as error:
        reason = " ".join(error.format_message().split())
        _fail(printable(f"{reason} (given: {' '.join(sys.argv[1:])})"))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except MemoryError:
        _fail(_OUT_OF_MEMORY)
    except OSError as error:
        _fail_of_system(error)
    except (RuntimeError, ValueError) as error:
        _fail_of_jax(error)
    return code or 0


def _fail_of_system(error: OSError) -> NoReturn:
    """Say what the system refuses: mostly standard output that cannot be written to."""
    if isinstance(error, BrokenPipeError):  # whoever read it has read enough
        _process.discard_output()
        sys.exit(128 + signal.SIGPIPE)
    reason = (error.strerror or str(error)).lower()
    if error.filename is not None:
        _fail(printable(f"cannot use {str(error.filename)!r}: {reason}"))
    _process.discard_output()
    _fail(f"standard output cannot be written to: {reason}")


def _fail_of_jax(error: RuntimeError | ValueError) -> NoReturn:
    """Say what JAX has no memory for, or does not know in its environment; raise all else."""
    if "RESOURCE_EXHAUSTED" in str(error):
        _fail(_OUT_OF_MEMORY)
    if any(words in str(error) for words in _NOT_KNOWN_TO_JAX):
        _fail(printable(str(error)))
    raise error


def _fail(message: str) -> NoReturn:
    _process.say(f"gradflow: {message}")
    sys.exit(2)


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
