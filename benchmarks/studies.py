"""How well does a study share its work? Cores, processes and shares, and what each chunk costs.

    python benchmarks/studies.py            two kinds of networks, about five minutes
    python benchmarks/studies.py --quick

Every run is a `gradflow study` in processes of its own, on a given number of cores. A rate leaves
out the first two chunks, which compile; an efficiency is the rate of each core over the rate of one
core alone. The second table is of one run in this process: the time to draw a chunk, and the time
and bytes of its steps on the host.
"""

import argparse
import collections
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = """
[network]
activation = "tanh"
width = {width}
depth = {depth}
[[axes]]
sigma_w2 = {{ from = 0.5, to = 2.0, points = 4 }}
[sampling]
networks = {networks}
[statistics]
measure = ["q", "chi", "gradient_variance", "log_gradient_norm"]
"""
KINDS = {
    "width 1000, depth 50": {"width": 1000, "depth": 50, "networks": 20_000},
    "width 30, depth 20": {"width": 30, "depth": 20, "networks": 500_000},
}
QUICK = {"width 30, depth 5": {"width": 30, "depth": 5, "networks": 5_000}}
# The most values that a chunk has of quick studies: several chunks for each process.
_QUICK_VALUES = 1 << 16
# The first chunks, which compile; two may be drawn at a time.
_COMPILING = 2
COMMAND = """
import os
os.sched_setaffinity(0, {cores})
from gradflow.cli import _process, main
if {chunk_values}:
    _process.prepare()
    from gradflow.studies import _plan
    _plan._CHUNK_VALUES = {chunk_values}
main()
"""


def rate(folders):
    """Networks drawn a second, of stores that were written side by side."""
    from gradflow.studies._store import Store

    total = 0.0
    for folder in folders:
        task = Store.of(folder).rounds.tasks(0)[0]
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        seconds = [line["seconds"] for line in lines if line.get("chunk", 0) >= _COMPILING]
        total += (task.networks - _COMPILING * task.chunk_size) / sum(seconds)
    return total


def started(file, out, cores, chunk_values, *more):
    program = COMMAND.format(cores=cores, chunk_values=chunk_values)
    return subprocess.Popen(
        [sys.executable, "-c", program, "study", file, "--out", out, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def runs(cores):
    """Yield each way to run a study: its name, its processes' options and cores, its stores."""
    several = len(cores)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    yield "1 process, 1 core", [((), cores[:1])], 1, False
    yield f"1 process, {several} cores", [((), cores)], several, False
    among = ("--coordinator", address, "--processes", str(several), "--process")
    yield (
        f"{several} processes, a core each",
        [((*among, str(n)), [core]) for n, core in enumerate(cores)],
        several,
        False,
    )
    yield (
        f"{several} shares, a core each",
        [(("--share", f"{n + 1}/{several}"), [core]) for n, core in enumerate(cores)],
        several,
        True,
    )


def scaling(kind, folder, chunk_values):
    cores = sorted(os.sched_getaffinity(0))[:2]
    file = folder / "study.toml"
    file.write_text(TEXT.format(**kind))
    rows, alone = [], None
    for name, processes, count, apart in runs(cores):
        outs = [
            folder / f"{name} {n if apart else 0}".replace(",", "") for n in range(len(processes))
        ]
        start = time.perf_counter()
        running = [
            started(str(file), str(out), those, chunk_values, *options)
            for out, (options, those) in zip(outs, processes, strict=True)
        ]
        if any(process.wait() for process in running):
            raise SystemExit(f"{name} failed")
        wall = time.perf_counter() - start
        speed = rate(dict.fromkeys(outs))
        alone = alone or speed
        row = {"run": name, "networks_per_second": speed, "efficiency": speed / alone / count}
        rows.append(row | {"wall_seconds": wall})
        print(
            f"{name:<30}{speed:>12.0f}{100 * row['efficiency']:>11.0f} %{wall:>10.1f}", flush=True
        )
    return rows


def costs(kind, folder, chunk_values):
    """The mean seconds of each step of a chunk, and the bytes that it copies and stores."""
    import jax

    from gradflow.studies import _averages, _execution, _plan, _runner, _store, _study_file

    spent = collections.defaultdict(list)

    def timed(name, function):
        def run(*arguments, **options):
            start = time.perf_counter()
            result = jax.block_until_ready(function(*arguments, **options))
            spent[name].append(time.perf_counter() - start)
            if name == "average":
                seconds = spent[name][-1]
                spent["values averaged a second"].append(arguments[2].size / seconds)
                spent["bytes kept"].append(result.nbytes)
            if name == "merge pieces":
                spent["bytes handed back"].append(sum(a.nbytes for a in arguments[0]))
            return result

        return run

    compiled = _runner._programs.compiled
    patched = [
        (_runner._programs, "compiled", lambda *a, **k: timed("draw", compiled(*a, **k))),
        (_runner.TaskRunner, "measurements", timed("average", _runner.TaskRunner.measurements)),
        (_averages, "_merged", timed("merge pieces", _averages._merged)),
        (_store.Store, "add", timed("write and merge", _store.Store.add)),
        (
            _runner.TaskRunner,
            "theory",
            timed("theory of all points", _runner.TaskRunner.theory),
        ),
        (_plan, "_CHUNK_VALUES", chunk_values or _plan._CHUNK_VALUES),
    ]
    before = [getattr(owner, name) for owner, name, _ in patched]
    try:
        for owner, name, new in patched:
            setattr(owner, name, new)
        study = _study_file.parse(TEXT.format(**kind))
        _execution.run(study, folder / "costs")
    finally:
        for (owner, name, _), old in zip(patched, before, strict=True):
            setattr(owner, name, old)
    task = _store.Store.of(folder / "costs").rounds.tasks(0)[0]
    sizes = {"networks a chunk": task.chunk_size, "chunks": task.chunks}
    return sizes | {name: sum(values) / len(values) for name, values in spent.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    report = {}
    for name, kind in (QUICK if options.quick else KINDS).items():
        print(f"\n{name}\n{'':<30}{'networks/s':>12}{'efficiency':>13}{'wall, s':>10}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            values = _QUICK_VALUES if options.quick else None
            rows = scaling(kind, Path(folder), values)
            each = costs(kind, Path(folder), values)
        for step, value in each.items():
            print(f"{step:<30}{value:>12.4g}")
        report[name] = {"scaling": rows, "costs": each}
    return report


if __name__ == "__main__":
    main()
