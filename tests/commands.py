"""Commands in this process: starting one takes longer than most of what commands do."""

import contextlib
import io
import subprocess
import sys

import jaxtyping
import pytest

from gradflow import cli


def run(*arguments, cwd):
    """A command's exit code, and what it printed."""
    out, said = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["gradflow", *arguments])
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return subprocess.CompletedProcess(
        arguments, stop.value.code or 0, out.getvalue(), said.getvalue()
    )
