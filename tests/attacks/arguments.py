"""Wrong command lines, drawn from a seed: valid calls with one or two things spoilt.

    python tests/attacks/arguments.py [SEED] [CALLS]

runs so many and prints what any of them does that no command may do; `test_wrong_commands.py` runs
some, as far as to where they begin to compute.
"""

import contextlib
import io
import os
import random
import re
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

from gradflow import cli

# Small enough to run where what was spoilt turns out to be valid.
_SMALL = ["--width", "8", "--depth", "3", "--seed", "0", "--out", "made"]
CALLS = (
    ["list", "--json"],
    ["compare", *_SMALL, "--networks", "4", "--activation", "tanh", "--weights", "glorot"],
    ["compare", "--widths", "8,6,4", "--networks", "4", "--sigma-w", "1.5", "--sigma-b", "0.1"],
    ["compare", *_SMALL, "--networks", "4", "--sampler", "dense", "--distribution", "uniform"],
    ["note", *_SMALL, "--networks", "2", "--uniform-networks", "2"],
    ["compare", *_SMALL, "--kind", "residual", "--scale", "depth", "--norm", "layer"],
    ["compare", *_SMALL, "--input", "normal", "--inputs", "2", "--correlation", "0.5"],
    ["compare", "--data", "own.npy", "--inputs", "2", "--mean-square", "1", "--out", "made"],
    ["theory", "--kind", "recurrent", "--steps", "2", "--width", "8", "--sigma-u", "0.5"],
    ["theory", "--kind", "convolutional", "--shape", "8,8", "--channels", "1,2", "--size", "3"],
    ["study", "study.toml", "--out", "made", "--share", "1/2"],
    ["plan", "study.toml", "--json"],
    ["show", "made"],
    ["report", "made", "--out", "page.html"],
    ["export", "made", "--csv", "a.csv", "--netcdf", "a.nc"],
    ["merge", "a", "b", "--out", "whole"],
    ["remedies", *_SMALL, "--networks", "4", "--inputs", "4", "--sigma-b", "0.1"],
    ["theory", "--activation", "tanh", "--sigma-w2", "1.5", "--sigma-b2", "0.05", "--start", "1"],
    ["theory", "--correlations", "-0.5,0.9", "--depth", "3", "--width", "8", "--json"],
    ["critical", "--activation", "tanh", "--sigma-b2", "0.05"],
    ["critical", "--sigma-w2", "2"],
    ["correlation", "--sigma-w2", "1.5", "--sigma-b2", "0.1", "--points", "3", "--start", "1"],
    ["phase", "--sigma-w", "1", "2", "--sigma-b", "0", "1", "--points", "3", "--start", "1"],
    [
        "spectrum",
        "--sigma-w2",
        "2",
        "--depth",
        "2",
        "--points",
        "9",
        "--simulate",
        "1",
        "--width",
        "8",
    ],
    ["spectrum", "--q", "0.5", "--weights", "orthogonal", "--points", "9", "--out", "made"],
    ["prescribe", "--width", "8", "--depth", "3", "--dtype", "float32", "--sigma-b2", "0.1"],
    ["prescribe", "--widths", "8,8,8", "--transform", "tat", "--target", "0.5"],
    ["train", "layers", "--width", "8", "--depth", "2", "--networks", "1", "--steps", "2"],
    ["train", "saturation", "--depths", "2,3", "--steps", "2", "--images", "40", "--batch", "4"],
    ["train", "layers", "--learning-rate", "0.1", "--clip", "norm:1", "--optimiser", "sgd"],
)
# What stands for a value, of whatever kind it should have been.
_NUMBERS = ("0", "1", "2", "-1", "-2", "1e-300", "1e300", "0.001", "100", "99999999999999999999")
_NUMBERS += ("1.5", "nan", "inf", "-inf", "1e400", "1e-400", "4294967296", "-9223372036854775808")
_NUMBERS += ("1000000", "0x10", "1_0", "9" * 5000, "1,2", "1,,2", "2/1", "0/0", "\u0663")
_NAMES = (
    "",
    " ",
    "-",
    "--",
    "x",
    "tanhh",
    "relu",
    "exp",
    "None",
    "True",
    "[1]",
    ",",
    "[red]",
    "[/x]",
)
_NAMES += ("{}", "%s", "-h", "--json", "--help", "\u03c3", "a\x1b[31mb", "a\nb", "a\rb", "\u202eb")
_NAMES += ("\udcff", "x" * 300, "y" * 100_000, "nan:nan", "norm:0", "value:1e999", "orthogonal")
_PATHS = ("..", ".", "/dev/null", "/dev/full", "/proc/x", "file", "file/x", "a.toml", "study.toml")
_PATHS += ("folder", "loop", "dangling", "~")
VALUES = (*_NUMBERS, *_NAMES, *_PATHS)
_STUDY = """
title = "a study"
[network]
activation = "tanh"
width = 8
depth = 3
[[axes]]
sigma_w2 = [1.0, 1.5]
[inputs]
mean_square = 0.1
[sampling]
networks = 4
"""
# Seconds after which a call that still runs is taken for right.
_LONG = 3.0


class Computes(BaseException):
    """A call runs and runs: it was not wrong."""


def prepare(folder):
    """Make what the values above name."""
    (folder / "study.toml").write_text(_STUDY)
    (folder / "a.toml").write_bytes(b'title = "\xff')
    (folder / "file").touch()
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere/x")


def spoilt(draw):
    """Return a call with something wrong in it, or right by chance."""
    call = list(draw.choice(CALLS))
    for _ in range(draw.choice((1, 1, 1, 2))):
        place = draw.randrange(len(call))
        how = draw.randrange(10)
        if how <= 5:  # a value, mostly by one of its kind
            places = [n for n in range(1, len(call)) if not call[n].startswith("--")]
            place = draw.choice(places or [place])
            kind = _NUMBERS if re.fullmatch(r"[-\d.]+", call[place]) else (*_NAMES, *_PATHS)
            call[place] = draw.choice(kind if how <= 4 else VALUES)
        elif how == 6:  # an argument is lost
            del call[place]
        elif how == 7:  # something more
            call.insert(place + 1, draw.choice(VALUES))
        elif how == 8:  # another command's option
            other = draw.choice(CALLS)
            call += [x for x in draw.sample(other, 1) if x.startswith("--")] + [draw.choice(VALUES)]
        elif call[place]:  # a letter
            letter = draw.randrange(len(call[place]))
            call[place] = call[place][:letter] + draw.choice("qX-=0,.") + call[place][letter + 1 :]
        if not call:
            return ["list"]
    return call


def run(call, folder):
    """Run the command in the folder, in this process; return its exit code, output and errors."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before = os.getcwd()

    def stop(*_):
        raise Computes

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _LONG, 1)  # again: what is raised may be swallowed
    os.chdir(folder)
    try:
        with (
            mock.patch.object(sys, "argv", ["gradflow", *call]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
            except Computes:
                code = 0
            except BaseException:
                code = "traceback"
                traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before)
    for stream in (out, err):
        stream.flush()
    return code, *(stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err))


def complaint(code, err):
    """Return what is wrong with how a command ended, or nothing."""
    lines = err.splitlines()
    said = [line for line in lines if line.startswith("gradflow: ")]
    if code == 0:
        return "" if not said else "it says something is wrong and exits with 0"
    if code != 2:
        return f"exit code {code}"
    if len(said) != 1 or said[0] != lines[-1]:
        return f"{len(said)} sentences, or not at the end"
    if not said[0].isprintable() or len(said[0]) > 1400:
        return "control characters, or too long"
    if any(word in err for word in ("Traceback", "PosixPath", "np.float64", "object at 0x")):
        return "a word of Python's"
    return ""


def attack(seed, calls):
    """Run so many spoilt calls; return those that end as no command may, and how."""
    draw = random.Random(seed)
    for _ in range(calls):
        call = spoilt(draw)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "inside")  # some calls write to ..
            folder.mkdir()
            prepare(folder)
            code, _, err = run(call, folder)
        wrong = complaint(code, err)
        if wrong:
            yield call, wrong, err


if __name__ == "__main__":
    seed, calls = map(int, (*sys.argv[1:], *("0", "100")[len(sys.argv) - 1 :]))
    for call, wrong, err in attack(seed, calls):
        print(ascii(call)[:300], wrong, ascii(err[-700:]), sep="\n  ")
