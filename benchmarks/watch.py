"""What does `gradflow.watch` cost a training, as a ratio of CPU times of one run?

Each model trains twice, by its optimiser and by `gradflow.watch` of it, in one compiled loop over
minibatches of random inputs. Both are warm and run in turn, several times; the cost is the median
over the pairs that followed each other.

    python benchmarks/watch.py                    three sizes, every 100 steps: half a minute
    python benchmarks/watch.py --every 10 --json
    python benchmarks/watch.py --size 6x256x128   6 layers of 256, batches of 128
"""

import argparse
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradflow

# Depth, width, batch; and how many steps take about half a second on two cores.
SIZES = {"5x128x32": 1500, "20x128x128": 200, "4x1000x128": 30}
OPTIMISERS = {"sgd": optax.sgd(1e-3), "adam": optax.adam(1e-4)}


def parameters(depth, width):
    keys = jax.random.split(jax.random.key(0), depth)
    return [
        {"w": jax.random.normal(key, (width, width)) / np.sqrt(width), "b": jnp.zeros((1, width))}
        for key in keys
    ]


def cost(p, x):
    for layer in p[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ p[-1]["w"] + p[-1]["b"] - 1) ** 2)


def runner(optimiser, steps, batch, width):
    """A compiled training of so many steps."""

    @jax.jit
    def run(p, state):
        def step(carry, key):
            p, state = carry
            value, gradients = jax.value_and_grad(cost)(p, jax.random.normal(key, (batch, width)))
            updates, state = optimiser.update(gradients, state, p)
            return (optax.apply_updates(p, updates), state), value

        return jax.lax.scan(step, (p, state), jax.random.split(jax.random.key(1), steps))

    return run


def compare(size, steps, every, repeats):
    """Microseconds a step without and with a record, by optimiser; and the cost, a fraction."""
    depth, width, batch = map(int, size.split("x"))
    p, rows = parameters(depth, width), {}
    for name, optimiser in OPTIMISERS.items():
        kinds = {"plain": optimiser, "watched": gradflow.watch(optimiser, every)}
        runs = {kind: (runner(of, steps, batch, width), of.init(p)) for kind, of in kinds.items()}
        times = {kind: [] for kind in runs}
        for turn in range(repeats + 1):
            for kind, (run, state) in runs.items():
                begun = time.process_time()
                jax.block_until_ready(run(p, state))
                if turn:  # the first one compiles
                    times[kind].append(1e6 * (time.process_time() - begun) / steps)
        pairs = zip(times["watched"], times["plain"], strict=True)
        rows[name] = {kind: min(all_of) for kind, all_of in times.items()}
        rows[name]["cost"] = float(np.median([slow / fast for slow, fast in pairs])) - 1
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", action="append", help="layers x width x batch, as 5x128x32")
    parser.add_argument("--every", type=int, default=100, help="steps between records")
    parser.add_argument("--steps", type=int, help="as many as take half a second without it")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    sizes = {}
    for size in options.size or SIZES:
        steps = options.steps or SIZES.get(size, 300)
        sizes[size] = compare(size, steps, options.every, options.repeats)
        if not options.json:
            for name, row in sizes[size].items():
                print(
                    f"{size:<12}{name:<6}{row['plain']:>9.1f} µs a step; a record every "
                    f"{options.every} costs {100 * row['cost']:.1f} %",
                    flush=True,
                )
    report = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "sizes": sizes}
    if options.json:
        print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
