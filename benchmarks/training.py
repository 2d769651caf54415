"""How fast do many networks train, and what does recording cost? gradflow beside PyTorch.

Every contender does the same job: networks of one kind (tanh, Glorot), each from weights of its
own, take plain gradient steps on minibatches of the digits, with softmax and biases. All run warm,
one after another in this process, several times in turn, and the shortest time counts; compile time
is apart. The peer is a plain PyTorch loop, network after network (``torch.optim.SGD``), on as many
threads as is faster, 1 or all. It is left out with a word where it is not installed
(``pip install gradflow[bench]``).

gradflow records nothing along the way but loss and error at the end; and, as a contender of its
own, all that it records by default, at the steps that it chooses, on 300 images.

    python benchmarks/training.py                          four sizes: a minute or two
    python benchmarks/training.py --size 5x100x10          5 layers of 100, batches of 10
    python benchmarks/training.py --size 5x1000x10 --steps 200 --networks 2 --json
"""

import argparse
import importlib.util
import json
import os
import time

import jax
import numpy as np

from gradflow import builders, data, training

# Depth, width, batch; and how many steps of how many networks take some seconds.
SIZES = {
    "5x100x10": (5000, 8),
    "10x64x10": (5000, 8),
    "10x128x64": (1000, 8),
    "5x1000x10": (500, 2),
}
RECORDING = "gradflow, recording"
PEER = "PyTorch, a loop"


def digits():
    return data.digits(), data.labelled_digits().labels


def gradflow(widths, batch, steps, count, **how):
    network = builders.mlp(widths, "tanh", "glorot")
    x, y = digits()
    result = training.train(
        network, x, y, steps=steps, batch=batch, learning_rate=0.01, seeds=count, **how
    )
    return {
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "loss": float(result["loss"][..., -1].mean()),
    }


def pytorch(widths, batch, steps, count, threads):
    import torch

    torch.set_num_threads(threads)
    x, y = digits()
    x, y = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y, np.int64))

    def one(seed, steps):
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

    one(0, min(steps, 10))
    begun = time.perf_counter()
    losses = [one(seed, steps) for seed in range(count)]
    return {"seconds": time.perf_counter() - begun, "loss": float(np.mean(losses))}


def contenders():
    """Functions of (widths, batch, steps, networks) by name that train so many networks."""
    rows = {
        "gradflow": lambda *size: gradflow(*size, record=training.Recording([size[2]], wanted=())),
        RECORDING: gradflow,
    }
    if importlib.util.find_spec("torch"):
        threads = {1, os.cpu_count() or 1}

        def peer(widths, batch, steps, count):
            # A loop in Python takes as long for each network and step: a few of them say how long.
            few, some = min(count, 2), min(steps, 1000)
            tried = [pytorch(widths, batch, some, few, n) for n in threads]
            row = min(tried, key=lambda row: row["seconds"])
            return row | {"seconds": row["seconds"] * count / few * steps / some}

        rows[PEER] = peer
    return rows


def compare(size, steps, count, repeats):
    """Each contender's shortest time of several in turn."""
    depth, width, batch = map(int, size.split("x"))
    widths = (64, *[width] * depth, 10)
    rows = {}
    for turn in range(repeats + 1):
        for name, run in contenders().items():
            if turn == 0 and name == PEER:
                continue  # it has nothing to compile
            row = run(widths, batch, steps, count)
            row["microseconds_a_step"] = 1e6 * row["seconds"] / (steps * count)
            if turn == 0:
                rows[name] = row | {"all": []}
                continue
            known = rows.setdefault(name, row | {"all": []})
            known["all"].append(row["microseconds_a_step"])
            known["microseconds_a_step"] = min(known["all"])
    report = {"steps": steps, "networks": count, "rows": rows}
    plain = rows["gradflow"]["microseconds_a_step"]
    # Of runs that followed each other, so that what disturbs one disturbs the other.
    pairs = zip(rows[RECORDING]["all"], rows["gradflow"]["all"], strict=True)
    report["recording"] = float(np.median([slow / fast for slow, fast in pairs])) - 1
    if PEER in rows:
        report["times_pytorch"] = rows[PEER]["microseconds_a_step"] / plain
    return report


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", action="append", help="layers x width x batch, as 5x100x10; four without it"
    )
    parser.add_argument("--steps", type=int, help="as many as take some seconds without it")
    parser.add_argument("--networks", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    sizes = {}
    for size in options.size or SIZES:
        steps, count = SIZES.get(size, (1000, 8))
        sizes[size] = compare(
            size, options.steps or steps, options.networks or count, options.repeats
        )
        if not options.json:
            print(_line(size, sizes[size]), flush=True)
    report = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "sizes": sizes}
    if options.json:
        print(json.dumps(report, indent=1))
    return report


def _line(size, report):
    rows = report["rows"]
    text = f"{size:<10}{rows['gradflow']['microseconds_a_step']:>9.1f} µs a step and network"
    if PEER in rows:
        text += (
            f", PyTorch {rows[PEER]['microseconds_a_step']:.0f}: {report['times_pytorch']:.1f} x"
        )
    else:
        text += ", PyTorch is not installed"
    return f"{text}; recording costs {100 * report['recording']:.0f} %"


if __name__ == "__main__":
    main()
