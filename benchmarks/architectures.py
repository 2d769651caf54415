"""How many random networks a second with convolutions, with BatchNorm, or of many inputs?

    python benchmarks/architectures.py            three kinds, a minute
    python benchmarks/architectures.py --quick --json

Forward and backward: q and log ‖δ‖ at every layer, of networks that gradflow draws with the sampler
that it chooses, beside a PyTorch loop over networks (``torch.nn`` modules, drawn by
``torch.nn.init``, and ``torch.autograd.grad``). Warm, the best of three; PyTorch is left out where
it is not installed.
"""

import argparse
import importlib.util
import json
import os
import time

import jax
import numpy as np

from gradflow import builders
from gradflow.simulation import monte_carlo
from gradflow.statistics import log_gradient_norm, q

# Name: kind, units or channels a layer, depth, inputs.
CASES = {
    "convolutions, 3×3 on 8×8, 32 channels, depth 10": ("convolution", 32, 10, 4),
    "BatchNorm, width 256, depth 20, 64 inputs": ("batch_norm", 256, 20, 64),
    "dense, width 256, depth 20, 64 inputs": ("dense", 256, 20, 64),
}
QUICK = {"convolutions": ("convolution", 4, 2, 2), "BatchNorm": ("batch_norm", 8, 2, 8)}
SIDE = 8


def network(kind, width, depth):
    if kind == "convolution":
        return builders.convolutional([SIDE, SIDE], [1, *[width] * depth], "tanh", "glorot")
    norm = "batch" if kind == "batch_norm" else None
    return builders.mlp([width] * (depth + 1), "tanh", "glorot", norm=norm)


def gradflow(kind, width, depth, inputs, details):
    rng = np.random.default_rng(0)
    if kind == "convolution":
        x = builders.as_sites(rng.standard_normal((inputs, SIDE, SIDE, 1), np.float32))
    else:
        x = rng.standard_normal((inputs, width), np.float32)
    law = network(kind, width, depth)

    def run(count):
        found = monte_carlo.simulate(law, x, networks=count, wanted=(q, log_gradient_norm))
        details["sampler"] = found.sampler

    return run


def pytorch(kind, width, depth, inputs, details):
    import torch

    skip_init = torch.nn.utils.skip_init  # so that weights are drawn once
    nn, first = torch.nn, 1 if kind == "convolution" else width
    shape = (inputs, first, SIDE, SIDE) if kind == "convolution" else (inputs, width)
    x = torch.randn(shape)

    def linear(n_in):
        if kind == "convolution":
            how = {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "bias": False}
            made = skip_init(nn.Conv2d, n_in, width, **how)
        else:
            made = skip_init(nn.Linear, n_in, width, bias=False)
        nn.init.xavier_normal_(made.weight)
        return made

    norm = nn.BatchNorm1d(width, affine=False) if kind == "batch_norm" else nn.Identity()

    def one():
        h, signals = x, []
        for layer in [linear(n) for n in (first, *[width] * (depth - 1))]:
            signals.append(layer(h))
            h = torch.tanh(norm(signals[-1]))
        gradients = torch.autograd.grad(signals[-1], signals, torch.randn_like(signals[-1]))
        squares = [z.detach().square().mean() for z in signals]
        return torch.stack(squares), torch.stack([g.norm().log() for g in gradients])

    def run(count, threads):
        torch.set_num_threads(threads)
        return [one() for _ in range(count)]

    # On as many threads as is faster, 1 or all.
    tried = {n: rate(lambda count, n=n: run(count, n), 0.1) for n in {1, os.cpu_count() or 1}}
    threads = details["threads"] = max(tried, key=tried.get)
    return lambda count: run(count, threads)


def rate(run, seconds):
    """Networks a second, warm."""
    count = 1
    while True:
        run(count)
        begun = time.perf_counter()
        run(count)
        elapsed = time.perf_counter() - begun
        if elapsed >= seconds:
            break
        count = max(2 * count, int(count * seconds / max(elapsed, 1e-6)))
    for _ in range(2):
        begun = time.perf_counter()
        run(count)
        elapsed = min(elapsed, time.perf_counter() - begun)
    return count / elapsed


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    contenders = {"gradflow": gradflow}
    if importlib.util.find_spec("torch"):
        contenders["PyTorch, a loop"] = pytorch
    report = {"device": jax.devices()[0].device_kind, "cases": {}}
    for name, case in (QUICK if options.quick else CASES).items():
        rows = report["cases"][name] = {}
        for contender, make in contenders.items():
            details = {}
            speed = rate(make(*case, details), 0.01 if options.quick else options.seconds)
            rows[contender] = {"networks_per_second": speed} | details
        if not options.json:
            peer = rows.get("PyTorch, a loop")
            ours = rows["gradflow"]["networks_per_second"]
            times = f", {ours / peer['networks_per_second']:.1f} times PyTorch" if peer else ""
            print(
                f"{name}: {ours:.4g} networks/s ({rows['gradflow']['sampler']}){times}", flush=True
            )
    if options.json:
        print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
