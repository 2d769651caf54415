"""How fast do many networks train? gradflow beside what one would write.

Every contender does the same job: networks of one kind (tanh, Glorot), each from weights of its
own, take plain gradient steps on minibatches of the digits, with softmax and biases. Nothing is
recorded along the way, and all run warm, one after another in this process; compile time is apart.
The peer is a plain PyTorch loop, network after network (``torch.optim.SGD``), on as many threads as
is faster, 1 or all. It is left out with a word where it is not installed
(``pip install gradflow[bench]``).

    python benchmarks/training.py                          5 layers of 100, batches of 10
    python benchmarks/training.py --width 1000 --steps 200
    python benchmarks/training.py --json
"""

import argparse
import importlib.util
import json
import os
import time

import jax
import numpy as np

from gradflow import data, networks, training


def digits():
    return data.digits(), data.labelled_digits().labels


def gradflow(widths, batch, steps, count, block):
    network = networks.mlp(widths, "tanh", "glorot")
    x, y = digits()
    result = training.train(
        network,
        x,
        y,
        steps=steps,
        batch=batch,
        learning_rate=0.01,
        seeds=count,
        record=[steps],
        wanted=(),
        block=block,
    )
    return {
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "loss": float(result["loss"].mean()),
    }


def pytorch(widths, batch, steps, count, threads):
    import torch

    torch.set_num_threads(threads)
    x, y = digits()
    x, y = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y))

    def one(seed):
        torch.manual_seed(seed)
        layers = []
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            linear = torch.nn.Linear(n_in, n_out)
            torch.nn.init.xavier_normal_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
            layers += [linear, torch.nn.Tanh()]
        model = torch.nn.Sequential(*layers[:-1])
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        cost = torch.nn.CrossEntropyLoss()
        for step in range(steps):
            at = step % (len(x) // batch)
            if at == 0:
                order = torch.randperm(len(x))
            chosen = order[at * batch : (at + 1) * batch]
            optimiser.zero_grad()
            cost(model(x[chosen]), y[chosen]).backward()
            optimiser.step()
        with torch.no_grad():
            return float(cost(model(x), y))

    one(0)
    begun = time.perf_counter()
    losses = [one(seed) for seed in range(count)]
    return {"seconds": time.perf_counter() - begun, "loss": float(np.mean(losses))}


def contenders(widths, batch, steps, count):
    rows = {}
    # As it chooses; and one network after another in each program.
    for block in (None, 1):
        name = "gradflow" if block is None else "gradflow, blocks of 1"
        rows[name] = gradflow(widths, batch, steps, count, block)
    if importlib.util.find_spec("torch"):
        # A loop in Python takes as long for each network: a few of them say how long.
        few = min(count, 2)
        tried = [pytorch(widths, batch, steps, few, n) for n in {1, os.cpu_count() or 1}]
        row = min(tried, key=lambda row: row["seconds"])
        rows["PyTorch, a loop"] = row | {"seconds": row["seconds"] * count / few}
    for row in rows.values():
        row["microseconds_a_step"] = 1e6 * row["seconds"] / (steps * count)
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--depth", type=int, default=5, help="hidden layers")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--networks", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    widths = (64, *[given.width] * given.depth, 10)
    rows = contenders(widths, given.batch, given.steps, given.networks)
    report = {**vars(given), "device": jax.devices()[0].device_kind, "rows": rows}
    peer = rows.get("PyTorch, a loop")
    if given.json:
        print(json.dumps(report, indent=1))
        return report
    for name, row in rows.items():
        times = f", {peer['seconds'] / row['seconds']:.1f} times PyTorch" if peer else ""
        print(f"{name:<24}{row['microseconds_a_step']:>9.1f} µs a step and network{times}")
    if peer is None:
        print("PyTorch is not installed")
    return report


if __name__ == "__main__":
    main()
