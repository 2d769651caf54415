"""The ten largest singular values of a deep network's Jacobian, and what users write for them.

    python benchmarks/leading_singular_values.py                widths 256 to 4096, depth 20
    python benchmarks/leading_singular_values.py --largest      width 100 000 too, gradflow alone
    python benchmarks/leading_singular_values.py --quick --json

Each contender draws a network and finds them, to a relative error of 1e-3 of each; matfree, which
has no such criterion, makes as many steps as gradflow did. Peers are left out where they would draw
more than 2 GiB of weights, and matfree where it is not installed (`pip install .[bench]`). Times
are of the second network; the first one's is with compiling.
"""

import argparse
import importlib.util
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

LEADING, DEPTH = 10, 20
MOST_WEIGHTS = 2 << 30  # bytes


def of_gradflow(width, sampler, details):
    from gradflow import builders
    from gradflow.simulation import singular_values

    network = builders.mlp([width] * (DEPTH + 1), "tanh", "glorot")
    x = jnp.ones((1, width), jnp.float32)

    def one(seed):
        values = singular_values.extreme_singular_values(
            network, x, jax.random.key(seed), leading=LEADING, sampler=sampler
        )
        details["steps"] = values.steps
        return values.log_largest

    return one


def of_matfree(width, steps):
    from matfree import decomp, eig

    def up(weights, signal):
        first, rest = weights[0], weights[1:]
        return jax.lax.scan(lambda z, w: (w @ jnp.tanh(z), None), first @ signal, rest)[0]

    svd = eig.svd_partial(decomp.bidiag(steps))

    @jax.jit
    def compute(key):
        keys = jax.random.split(key)
        weights = jax.random.normal(keys[0], (DEPTH, width, width)) / width**0.5
        _, jvp = jax.linearize(lambda signal: up(weights, signal), jnp.ones(width))
        start = jax.random.normal(keys[1], (width,))
        return jnp.log(svd(jvp, start / jnp.linalg.norm(start))[1][:LEADING])

    return lambda seed: compute(jax.random.key(seed))


def of_numpy(width):
    def one(seed):
        generator = np.random.default_rng(seed)
        signal, jacobian = np.ones(width, np.float32), None
        for layer in range(DEPTH):
            w = generator.standard_normal((width, width), np.float32) / np.float32(width**0.5)
            if layer:
                jacobian = w @ ((1 - np.tanh(signal) ** 2)[:, None] * jacobian)
                signal = w @ np.tanh(signal)
            else:
                jacobian, signal = w, w @ signal
        return np.log(np.linalg.svd(jacobian, compute_uv=False)[:LEADING])

    return one


def timed(one, repeats):
    begun = time.perf_counter()
    jax.block_until_ready(one(0))
    first = time.perf_counter() - begun
    warm = []
    for seed in range(1, repeats + 1):
        begun = time.perf_counter()
        values = np.asarray(jax.block_until_ready(one(seed)))
        warm.append(time.perf_counter() - begun)
    return {"first_seconds": first, "warm_seconds": min(warm), "log_largest": float(values[0])}


def at_width(width, repeats):
    details, rows = {}, {}
    rows["gradflow, matrix_free"] = timed(of_gradflow(width, "matrix_free", details), repeats)
    if 4 * DEPTH * width**2 <= MOST_WEIGHTS:
        rows["gradflow, dense"] = timed(of_gradflow(width, "dense", {}), repeats)
        if importlib.util.find_spec("matfree"):
            rows["matfree, dense"] = timed(of_matfree(width, details["steps"]), repeats)
        rows["NumPy, product and SVD"] = timed(of_numpy(width), repeats)
    return {"width": width, "depth": DEPTH, "steps": details["steps"], "rows": rows}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--largest", action="store_true", help="width 100 000 too")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    widths = [64] if options.quick else [256, 1024, 4096]
    sizes = []
    print(f"{'':28}{'first, s':>10}{'warm, s':>10}{'× matrix_free':>15}{'log s_1':>9}", flush=True)
    for width in [*widths, *([100_000] if options.largest else [])]:
        size = at_width(width, 1 if width >= 4096 else options.repeats)
        sizes.append(size)
        print(f"width {width}, depth {DEPTH}, {size['steps']} steps", flush=True)
        best = size["rows"]["gradflow, matrix_free"]["warm_seconds"]
        for name, row in size["rows"].items():
            print(
                f"  {name:<26}{row['first_seconds']:>10.2f}{row['warm_seconds']:>10.3f}"
                f"{row['warm_seconds'] / best:>15.1f}{row['log_largest']:>9.3f}",
                flush=True,
            )
    report = {"leading": LEADING, "jax": jax.__version__, "sizes": sizes}
    if options.json:
        print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
