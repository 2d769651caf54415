"""How long until the first answer? Each command and function in a process of its own.

    python benchmarks/first_answer.py                    every row: some ten minutes
    python benchmarks/first_answer.py theory compare     these rows
    python benchmarks/first_answer.py --repeats 5 --json

Cold is the first process with an empty folder of kept programs; warm is the median of later
processes, each with other numbers. Both are also given in units of ``python -c "import jax"``, the
median of several in the same run, beside the goal: the wall's time on a machine that does nothing
else, CPU seconds on a busy one. A command's time is its process's, with figures and files
written; a function's is that of its first call, after imports.

The peers are what one would write instead, in a process of their own too: SciPy's ``quad`` and
``brentq`` for theory, NumPy on a grid, a loop in PyTorch over networks (left out where it is not
installed). They answer less: q* and χ₁, or the norms of signals and gradients.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__)


class Row(NamedTuple):
    """A row of the table: a command or a program, ``{n}`` in it a number of each process."""

    ask: str
    # Ratios to `import jax`: warm, and cold.
    goals: tuple[float | None, float | None]
    peer: str | None = None


COMMANDS = {
    "theory": Row("theory --sigma-w2 1.{n} --sigma-b2 0.05", (3, 8), "scipy_point"),
    "critical": Row("critical --sigma-b2 0.0{n}", (3, 8), "scipy_critical"),
    "prescribe": Row("prescribe --depth 10{n}", (3, 8)),
    "phase": Row("phase --sigma-w 0.5 3.{n} --out {out}", (4, 10), "numpy_phase"),
    "spectrum": Row("spectrum --sigma-w2 1.{n} --out {out}", (4, 10)),
    "compare": Row(
        "compare --width 200 --depth 10 --networks 1000 --seed {n} --out {out}",
        (5, 12),
        "pytorch_loop",
    ),
    "remedies": Row("remedies --seed {n} --out {out}", (60, 100)),
    "help": Row("--help", (0.8, None)),
    "list": Row("list", (0.8, None)),
}

# Imports, then the call whose time is taken.
FUNCTIONS = {
    "analyse": Row(
        "import gradflow as gf; tanh = gf.activations.tanh; ask = gf.analyse\n"
        "answer = ask(tanh, 1.{n}, 0.05)",
        (1.5, 6),
        "scipy_point",
    ),
    "predict": Row(
        "import numpy as np; import gradflow as gf; ask = gf.predict\n"
        "network = gf.mlp([64, *[200] * 10], 'tanh', gf.ensembles.fan_in(1.{n}))\n"
        "answer = ask(network, np.ones((1, 64)))",
        (1.5, 6),
    ),
    "simulate": Row(
        "import numpy as np; import gradflow as gf; ask = gf.simulate\n"
        "network = gf.mlp([64, *[200] * 10], 'tanh', gf.ensembles.fan_in(1.{n}))\n"
        "answer = ask(network, np.ones((1, 64)), networks=1000)",
        (1.5, 6),
        "pytorch_loop",
    ),
}

# In one process, warm: how long the second un-jitted call takes, of a network of another σ_w, and
# its run alone; and gradients beside the forward call.
WITHIN = """
import json, time, jax, numpy as np, gradflow as gf
from gradflow.theory import mean_field
tanh, gram = gf.activations.tanh, np.ones((1, 1))

def least(function, *arguments):
    times = []
    for _ in range({repeats}):
        begun = time.process_time()
        jax.block_until_ready(function(*arguments))
        times.append(time.process_time() - begun)
    return min(times)

def network(sigma_w):
    return gf.mlp([64, *[200] * 10], "tanh", gf.ensembles.fan_in(sigma_w))

found = {{}}
mean_field.predict(network(1.1), gram)
other = network(1.3)
found["predict, of another σ_w"] = least(mean_field.predict, other, gram)
jitted = jax.jit(lambda: mean_field.predict(other, gram))
jitted()
found["predict, its run"] = least(jitted)
jax.config.update("jax_enable_x64", True)
for name in ("q_star", "chi1", "xi_c"):
    def value(sigma_w2, sigma_b2, name=name):
        return getattr(gf.analyse(tanh, sigma_w2, sigma_b2), name)

    both = jax.value_and_grad(value, argnums=(0, 1))
    value(1.5, 0.1)
    begun = time.process_time()
    jax.block_until_ready(both(1.5, 0.1))
    found[f"value_and_grad of {{name}}, first"] = time.process_time() - begun
    found[f"{{name}}"] = least(value, 1.6, 0.1)
    found[f"value_and_grad of {{name}}"] = least(both, 1.6, 0.1)
print(json.dumps(found))
"""


# What one would write instead ---------------------------------------------------------------------


def _moments(q):
    """E tanh² and E tanh'² at a second moment q."""
    from scipy.integrate import quad

    def mean(function):
        root = math.sqrt(q)

        def weighted(z):
            return function(root * z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

        return quad(weighted, -12, 12, epsrel=1e-12)[0]

    return mean(lambda x: math.tanh(x) ** 2), mean(lambda x: (1 - math.tanh(x) ** 2) ** 2)


def scipy_point(sigma_w2=1.5, sigma_b2=0.05):
    from scipy.optimize import brentq

    q = brentq(lambda q: sigma_w2 * _moments(q)[0] + sigma_b2 - q, 1e-9, 4, xtol=1e-13)
    return q, sigma_w2 * _moments(q)[1]


def scipy_critical(sigma_b2=0.05):
    from scipy.optimize import brentq

    return brentq(lambda sigma_w2: scipy_point(sigma_w2, sigma_b2)[1] - 1, 1, 4, xtol=1e-10)


def numpy_phase(points=100):
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    sigma_w2 = np.linspace(0.5, 3, points) ** 2
    sigma_b2 = np.linspace(0, 1, points)[:, None] ** 2
    q = np.ones((points, points))
    for _ in range(300):
        squares = np.tanh(np.sqrt(q)[..., None] * nodes) ** 2 @ weights / math.sqrt(2 * math.pi)
        q = sigma_w2 * squares + sigma_b2
    slopes = 1 - np.tanh(np.sqrt(q)[..., None] * nodes) ** 2
    return sigma_w2 * (slopes**2 @ weights) / math.sqrt(2 * math.pi)


def pytorch_loop(networks=1000, width=200, depth=10):
    import torch

    x, found = torch.ones(1, 64), []
    for _ in range(networks):
        layers = []
        for n_in in (64, *[width] * (depth - 1)):
            layers.append(torch.nn.Linear(n_in, width, bias=False))
            torch.nn.init.xavier_normal_(layers[-1].weight)
        h, signals = x, []
        for layer in layers:
            signals.append(layer(h))
            h = torch.tanh(signals[-1])
        gradients = torch.autograd.grad(signals[-1], signals, torch.randn(1, width))
        found.append(
            [[z.square().mean() for z in signals], [g.norm().log() for g in gradients]],
        )
    values = torch.tensor(found)
    return values.mean(0), values.std(0) / math.sqrt(networks)


PEERS = {p.__name__: p for p in (scipy_point, scipy_critical, numpy_phase, pytorch_loop)}


# Measuring ----------------------------------------------------------------------------------------

COMMAND = "from gradflow.cli import main; main()"
TIMED = """
import time, json
{imports}
begun = time.perf_counter(), time.process_time()
{call}
print(json.dumps([time.perf_counter() - begun[0], time.process_time() - begun[1]]))
"""


def run(arguments, folder, **environment):
    """Seconds of the wall and of CPU, and peak memory, of a process; and the last line printed."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=out,
            stderr=errors,
            cwd=folder,
            env={**os.environ, **environment},
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{errors.read()[-2000:]}")
        out.seek(0)
        last = out.read().splitlines()[-1:]
    used_cpu = used.ru_utime + used.ru_stime
    return {"wall": wall, "cpu": used_cpu, "memory_gib": used.ru_maxrss / 2**20}, "".join(last)


def median(runs):
    return {name: statistics.median(each[name] for each in runs) for name in runs[0]}


def ours(row, turn, folder, cache):
    """One process of a row: a command's time is its own, a function's that of its first call."""
    ask = row.ask.replace("{n}", str(turn + 1))
    if "\n" not in ask:
        words = [str(folder / f"out {turn}") if word == "{out}" else word for word in ask.split()]
        return run(["-c", COMMAND, *words], folder, GRADFLOW_CACHE=cache)[0]
    imports, call = ask.split("\n", 1)
    code = TIMED.format(imports=imports, call=call)
    measured, text = run(["-c", code], folder, GRADFLOW_CACHE=cache)
    wall, cpu = json.loads(text)
    return measured | {"wall": wall, "cpu": cpu}


def peer(name, folder):
    """The time of a peer's process; None where what it needs is not installed."""
    if name == "pytorch_loop" and importlib.util.find_spec("torch") is None:
        return None
    return run([str(HERE), "--peer", name], folder)[0]


def measure(row, repeats):
    """A row's cold process and the median of the warm ones, and the median of its peer's."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cache = str(folder / "cache")
        cold, *warm = (ours(row, turn, folder, cache) for turn in range(repeats + 1))
        others = [peer(row.peer, folder) for _ in range(repeats)] if row.peer else [None]
    found = {"cold": cold, "warm": median(warm), "goals": row.goals}
    return found | ({"peer": median(others)} if others[0] else {})


def within(repeats):
    """Seconds of CPU of each kind of call within one process."""
    with tempfile.TemporaryDirectory() as folder:
        code = WITHIN.format(repeats=repeats)
        return json.loads(run(["-c", code], folder, GRADFLOW_CACHE=folder)[1])


def line(name, found, unit):
    text = f"{name:<12}"
    for when, goal in zip(("warm", "cold"), found["goals"], strict=True):
        wall, cpu = (found[when][kind] / unit[kind] for kind in ("wall", "cpu"))
        at_most = f"<= {goal:g}" if goal else ""
        text += f"{found[when]['wall']:>9.2f} s{wall:>7.1f} x{cpu:>7.1f} x{at_most:>7}"
    text += f"{found['warm']['memory_gib']:>8.2f}"
    if "peer" in found:
        other = found["peer"]
        text += f"{other['wall']:>9.2f} s{other['wall'] / unit['wall']:>7.1f} x"
        text += f"{other['cpu'] / unit['cpu']:>7.1f} x{other['memory_gib']:>8.2f}"
    return text


def main(arguments=None):
    rows = COMMANDS | FUNCTIONS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)}, within")
    parser.add_argument("--repeats", type=int, default=3, help="warm processes of each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - {*rows, "within"}:
        parser.error(f"there is no row {', '.join(unknown)}")
    if options.peer:
        print(PEERS[options.peer]())
        return None
    chosen = options.rows or [*rows, "within"]
    unit = median([run(["-c", "import jax"], None)[0] for _ in range(options.repeats)])
    report = {"import jax": unit, "rows": {}}
    if not options.json:
        print(f"import jax: {unit['wall']:.2f} s, {unit['cpu']:.2f} s of CPU")
        print(f"{'':<12}{'warm, × import jax: wall, CPU':^36}{'cold':^36}{'GiB':>8}  its peer")
    for name in chosen:
        if name in rows:
            report["rows"][name] = found = measure(rows[name], options.repeats)
            text = line(name, found, unit)
        else:
            report["within"] = found = within(options.repeats)
            text = "\n".join(f"{what:<40}{1e3 * s:>10.1f} ms" for what, s in found.items())
        if not options.json:
            print(text, flush=True)
    if options.json:
        print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
