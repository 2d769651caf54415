"""How many random networks a second, forward and backward? gradflow beside what one would write.

Every contender does the same job: draw networks of Gaussian weights (tanh, Glorot), send inputs up
and a random gradient of each down, and report q and log ‖δ‖ at every layer. They run one after
another in this process, warm, with results waited for; compile time is apart. The peers are written
as a good user of each would: PyTorch as a loop over layers without autograd (the gradient is by
hand, which saves it the tape), NumPy with float32 generators, plain JAX as a jitted scan.

Beside them stand the machine's limits, measured in the same run: the most normals a second that any
of these generators draws, a matrix product of the same shapes, and copies in memory; and what share
of them a contender reaches, by what the job needs: n² normals a layer, drawn once, and a product of
all inputs with them each way.

    python benchmarks/networks_per_second.py                      width 1024, depth 50, one input
    python benchmarks/networks_per_second.py --inputs 512 --depth 10
    python benchmarks/networks_per_second.py --grow width         128, 512, 1024, 4096
    python benchmarks/networks_per_second.py --grow depth         or inputs, or networks
    python benchmarks/networks_per_second.py --device gpu --json  or cpu, tpu

PyTorch is left out with a word where it is not installed (``pip install gradflow[bench]``).
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from gradflow import builders
from gradflow.simulation import _memory, _threefry, monte_carlo
from gradflow.statistics import log_gradient_norm, q

WANTED = (q, log_gradient_norm)


def batch(inputs, width):
    return np.random.default_rng(0).standard_normal((inputs, width), np.float32)


def gradflow(width, depth, inputs, sampler, count):
    network = builders.mlp([width] * (depth + 1), "tanh", "glorot")
    x = batch(inputs, width)

    def run():
        return monte_carlo.simulate(network, x, networks=count, sampler=sampler, wanted=WANTED)

    return run


def plain_jax(width, depth, inputs, count):
    """What a good user of JAX writes: draw the weights, scan, map, jit."""
    x = jnp.asarray(batch(inputs, width))

    def one(key):
        weights_key, top_key = jax.random.split(key)
        keys = jax.random.split(weights_key, depth)

        def weights(key):
            return jax.random.normal(key, (width, width), x.dtype) / math.sqrt(width)

        def up(h, key):
            z = h @ weights(key).T
            return jnp.tanh(z), (z, jnp.mean(z**2))

        def down(delta, layer):
            key, z = layer
            below = (delta @ weights(key)) * (1 - jnp.tanh(z) ** 2)
            norm = jnp.linalg.norm(below, axis=1, keepdims=True)
            return below / norm, jnp.log(norm)

        _, (z, square) = jax.lax.scan(up, x, keys)
        top = jax.random.normal(top_key, x.shape, x.dtype)
        _, logs = jax.lax.scan(down, top, (keys[1:], z[:-1]), reverse=True)
        return square, logs

    compiled = jax.jit(lambda keys: jax.lax.map(one, keys))

    def run():
        return jax.block_until_ready(compiled(jax.random.split(jax.random.key(0), count)))

    return run


def numpy(width, depth, inputs, count):
    generator = np.random.default_rng(0)
    scale, x = np.float32(1 / math.sqrt(width)), batch(inputs, width)
    buffers = [np.empty((width, width), np.float32) for _ in range(depth)]

    def one():
        h, zs, square = x, [], []
        for weights in buffers:
            generator.standard_normal(out=weights, dtype=np.float32)
            z = h @ weights.T * scale
            zs.append(z)
            square.append(np.mean(z**2))
            h = np.tanh(z)
        delta, logs = generator.standard_normal(x.shape, np.float32), []
        for weights, z in zip(buffers[:0:-1], zs[-2::-1], strict=True):
            delta = delta @ weights * (1 - np.tanh(z) ** 2)
            norm = np.linalg.norm(delta, axis=1, keepdims=True)
            logs.append(np.log(norm * scale))
            delta = delta / norm
        return square, logs

    return lambda: [one() for _ in range(count)]


def pytorch(width, depth, inputs, count):
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    scale, x = 1 / math.sqrt(width), torch.from_numpy(batch(inputs, width)).to(torch_device())
    # The buffers are allocated once: drawing into them is what is fast in PyTorch.
    buffers = [torch.empty(width, width, device=x.device) for _ in range(depth)]

    @torch.no_grad()
    def one():
        h, zs, square = x, [], []
        for w in buffers:
            z = h @ w.normal_(0.0, scale).t()
            zs.append(z)
            square.append(z.square().mean())
            h = torch.tanh(z)
        delta, logs = torch.randn_like(x), []
        for w, z in zip(buffers[:0:-1], zs[-2::-1], strict=True):
            delta = delta @ w * (1 - torch.tanh(z) ** 2)
            norm = delta.norm(dim=1, keepdim=True)
            logs.append(norm.log())
            delta = delta / norm
        return torch.stack(square).cpu(), torch.cat(logs).cpu()

    return lambda: [one() for _ in range(count)]


def pytorch_vmap(width, depth, inputs, count):
    """The same with `torch.func.vmap` over networks, as many at once as fit into memory."""
    import torch

    scale, x = 1 / math.sqrt(width), torch.from_numpy(batch(inputs, width)).to(torch_device())

    def one(top):
        h, kept, square = x, [], []
        for _ in range(depth):
            w = torch.randn(width, width, device=x.device) * scale
            z = h @ w.t()
            kept.append((w, z))
            square.append(z.square().mean())
            h = torch.tanh(z)
        delta, logs = top, []
        for (w, _), (_, z) in zip(kept[:0:-1], kept[-2::-1], strict=True):
            delta = delta @ w * (1 - torch.tanh(z) ** 2)
            norm = delta.norm(dim=1, keepdim=True)
            logs.append(norm.log())
            delta = delta / norm
        return torch.stack(square), torch.stack(logs)

    mapped = torch.func.vmap(one, randomness="different")

    @torch.no_grad()
    def run():
        return [part.cpu() for part in mapped(torch.randn(count, *x.shape, device=x.device))]

    return run


def torch_device():
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def has_torch():
    return importlib.util.find_spec("torch") is not None


def contenders(width, depth, inputs=1):
    made = {
        "gradflow, matrix_free": functools.partial(gradflow, width, depth, inputs, "matrix_free"),
        "gradflow, dense": functools.partial(gradflow, width, depth, inputs, "dense"),
        "plain JAX, dense": functools.partial(plain_jax, width, depth, inputs),
        "NumPy, dense": functools.partial(numpy, width, depth, inputs),
    }
    if has_torch():
        made["PyTorch, dense loop"] = functools.partial(pytorch, width, depth, inputs)
        made["PyTorch, dense torch.func.vmap"] = functools.partial(
            pytorch_vmap, width, depth, inputs
        )
    return made


def best(run, repeats=3):
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


# Tiles of normals that each core draws, and their size.
TILES = (1 << 8, 1 << 14)


def limits(width, inputs):
    """The machine's own: normals a second, of the fastest generator, FLOP/s, and bytes/s."""
    side_by_side = os.cpu_count() if jax.default_backend() == "cpu" else 1
    shape = (side_by_side, *TILES)
    keys = jax.random.split(jax.random.key(0), shape[:2])
    drawn = {}
    for name, normal in (("gradflow", _threefry.normal), ("JAX", jax.random.normal)):
        # What is drawn is added up, tile by tile, as a layer's products would.
        tiles = jax.jit(
            lambda ks, f=normal: jax.lax.map(lambda k: f(k, shape[2:], jnp.float32).sum(), ks)
        )

        def everywhere(tiles=tiles):
            with ThreadPoolExecutor(side_by_side) as pool:
                list(pool.map(lambda ks: jax.block_until_ready(tiles(ks)), keys))

        drawn[name] = math.prod(shape) / best(everywhere)
    if has_torch():
        import torch

        buffer = torch.empty(1 << 16, device=torch_device())
        drawn["PyTorch"] = 64 * buffer.numel() / best(lambda: [buffer.normal_() for _ in range(64)])
    generator, small = np.random.default_rng(0), np.empty(1 << 16, np.float32)
    fill = functools.partial(generator.standard_normal, out=small, dtype=np.float32)
    drawn["NumPy"] = 16 * small.size / best(lambda: [fill() for _ in range(16)])

    x, w = jnp.asarray(batch(inputs, width)), jnp.asarray(batch(width, width))
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    repeat = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: product(x, w) / width, x))
    flops = 20 * 2 * inputs * width**2 / best(lambda: jax.block_until_ready(repeat(x)))
    large = jnp.zeros(1 << 26, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    bandwidth = 2 * large.nbytes / best(lambda: jax.block_until_ready(copy(large)))
    return {"normals": drawn, "flops": flops, "bytes": bandwidth}


def measure(make, seconds, most):
    """Networks a second, warm: more until a run takes ``seconds``, then the best of three."""
    count, compiling = 1, None
    while True:
        run = make(count)
        begun = time.perf_counter()
        run()
        first = time.perf_counter() - begun
        begun = time.perf_counter()
        run()
        elapsed = time.perf_counter() - begun
        # What the very first run took longer is compiling, for those that compile.
        compiling = max(0.0, first - elapsed) if compiling is None else compiling
        if elapsed >= seconds or count >= most:
            break
        count = min(most, max(2 * count, int(count * seconds / max(elapsed, 1e-6))))
    for _ in range(2):
        begun = time.perf_counter()
        run()
        elapsed = min(elapsed, time.perf_counter() - begun)
    return {
        "networks_per_second": count / elapsed,
        "networks": count,
        "compile_seconds": compiling,
    }


def compare(options, width, depth, inputs, most):
    """All contenders at one size, beside the machine's limits."""
    limit = limits(width, inputs)
    # What torch.func.vmap may hold at once: the weights of every network.
    vmapped = max(1, min(64, _memory.available() // (4 * 4 * depth * width**2)))
    rows = {}
    for name, make in contenders(width, depth, inputs).items():
        row = measure(make, options.seconds, min(most, vmapped) if "vmap" in name else most)
        rate = row["networks_per_second"]
        row["layers_per_second"] = rate * depth
        if "matrix_free" not in name:
            needed = {
                "normals": width**2 * depth,
                "flops": 2 * 2 * inputs * width**2 * depth,
                "bytes": 4 * width**2 * depth,
            }
            fastest = limit | {"normals": max(limit["normals"].values())}
            row["shares"] = {k: rate * needed[k] / fastest[k] for k in needed}
        rows[name] = row
        if options.memory:
            row["peak_memory_gib"] = peak_memory(name, width, depth, inputs)
    peers = [r["networks_per_second"] for n, r in rows.items() if not n.startswith("gradflow")]
    for row in rows.values():
        row["times_fastest_peer"] = row["networks_per_second"] / max(peers)
        if has_torch():
            torch_rate = rows["PyTorch, dense loop"]["networks_per_second"]
            row["times_pytorch_loop"] = row["networks_per_second"] / torch_rate
    return {"width": width, "depth": depth, "inputs": inputs, "limits": limit, "rows": rows}


def peak_memory(name, width, depth, inputs):
    """Of a process that does nothing else, in GiB."""
    size = [str(width), str(depth), str(inputs)]
    process = subprocess.run(
        [sys.executable, __file__, "--one", name, *size], capture_output=True, text=True, check=True
    )
    return float(process.stdout)


def peak_of_this_process():
    """In GiB. ``ru_maxrss`` is no less than what the process that started this one had."""
    try:
        with open("/proc/self/status") as status:
            known = dict(line.split(":", 1) for line in status)
        return int(known["VmHWM"].split()[0]) / 2**20
    except OSError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(report):
    print(f"\nwidth {report['width']} x depth {report['depth']}, {report['inputs']} inputs")
    generators = ", ".join(f"{n} {v / 1e6:.0f}" for n, v in report["limits"]["normals"].items())
    print(
        f"limits: {generators} million normals/s; {report['limits']['flops'] / 1e9:.1f} GFLOP/s; "
        f"{report['limits']['bytes'] / 1e9:.1f} GB/s"
    )
    print(
        f"{'':32}{'networks/s':>11}{'layers/s':>10}{'x fastest peer':>15}{'x torch loop':>13}"
        f"{'normals':>9}{'FLOP/s':>8}{'compile s':>10}{'peak GiB':>9}"
    )
    for name, row in report["rows"].items():
        shares = row.get("shares")
        normals, flops = (
            (f"{shares[k]:.0%}" for k in ("normals", "flops")) if shares else ("-", "-")
        )
        torch_ratio = row.get("times_pytorch_loop")
        peak = row.get("peak_memory_gib")
        print(
            f"{name:32}{row['networks_per_second']:>11.4g}{row['layers_per_second']:>10.4g}"
            f"{row['times_fastest_peer']:>15.3g}{torch_ratio or math.nan:>13.3g}"
            f"{normals:>9}{flops:>8}{row['compile_seconds']:>10.2f}{peak or math.nan:>9.2f}"
        )


GROW = {
    "width": (128, 512, 1024, 4096),
    "depth": (10, 50, 200),
    "inputs": (1, 8, 64, 512),
    "networks": (1, 10, 100, 1000),
}


def sizes(options):
    """The sizes to compare at: (width, depth, inputs, networks at most)."""
    at = {"width": options.width, "depth": options.depth, "inputs": options.inputs}
    at["networks"] = options.networks
    values = GROW[options.grow] if options.grow else [None]
    for value in values:
        size = at | ({options.grow: value} if options.grow else {})
        yield size["width"], size["depth"], size["inputs"], size["networks"]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--inputs", type=int, default=1)
    parser.add_argument("--networks", type=int, default=1 << 16, help="at most, at once")
    parser.add_argument("--grow", choices=GROW, help="compare at several sizes")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each contender")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of each")
    parser.add_argument("--device", choices=["cpu", "gpu", "tpu"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(options.device, options.device))
    if options.one:
        name, *size = options.one
        contenders(*map(int, size))[name](1)()
        print(peak_of_this_process())
        return None

    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": [],
    }
    if has_torch():
        import torch

        report["versions"]["torch"] = torch.__version__
    if not options.json:
        print(f"{report['machine']}; {report['versions']}")
    for size in sizes(options):
        report["sizes"].append(compare(options, *size))
        if not options.json:
            table(report["sizes"][-1])
    if options.json:
        print(json.dumps(report, indent=1))
    elif not has_torch():
        print("PyTorch is not installed here: pip install gradflow[bench]")
    return report


if __name__ == "__main__":
    main()
