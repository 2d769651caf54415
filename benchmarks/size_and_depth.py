"""How large, how deep? Time, memory and compile time of one network as its width and depth grow.

    python benchmarks/size_and_depth.py           width to 10^6, depth to 10^4
    python benchmarks/size_and_depth.py --quick

Every case runs in a process of its own, so that its peak memory is its own; the first time is with
compiling, the second is warm.
"""

import argparse
import json
import resource
import subprocess
import sys

import numpy as np

CASES = (
    (1_000, 100),
    (10_000, 100),
    (100_000, 100),
    (1_000_000, 100),
    (1_000, 10),
    (1_000, 10_000),
)
QUICK = ((100, 10), (100, 1_000))


def one(width, depth):
    from gradflow import builders
    from gradflow.simulation import monte_carlo

    network = builders.mlp([width] * (depth + 1), "tanh", "glorot")
    x = np.ones((1, width), np.float32)
    first = monte_carlo.simulate(network, x, networks=1)
    warm = min((monte_carlo.simulate(network, x, networks=1) for _ in range(3)), key=_seconds)
    return {
        "width": width,
        "depth": depth,
        "compile_seconds": first.compile_seconds,
        "warm_seconds": warm.seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _seconds(simulation):
    return simulation.seconds


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", nargs=2, type=int, help="width and depth; JSON out")
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(one(*options.case)))
        return []
    rows = []
    print(f"{'width':>10}{'depth':>8}{'compile, s':>12}{'warm, s':>10}{'peak GiB':>10}", flush=True)
    for width, depth in QUICK if options.quick else CASES:
        command = [sys.executable, __file__, "--case", str(width), str(depth)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(row)
        print(
            f"{width:>10}{depth:>8}{row['compile_seconds']:>12.2f}{row['warm_seconds']:>10.3f}"
            f"{row['peak_memory_gib']:>10.2f}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
