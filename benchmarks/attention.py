"""How fast is attention's theory? A transformer of exchangeable tokens, beside a NumPy script.

    python benchmarks/attention.py            200 sublayers, 100 of attention, of 64 tokens
    python benchmarks/attention.py --quick

The peer is what one would write: the averages over rows of softmax as Laplace integrals over one
and two variables, with a score's shared and own parts on grids, and the maps over depth. It runs
a few layers, and its time is per layer. Times are of CPU, of this process, and warm.
"""

import argparse
import json
import math
import time

import jax
import numpy as np


def timed(function, repeats=3):
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        result = jax.block_until_ready(function())
        times.append(time.process_time() - start)
    return result, times[0], min(times[1:])


def numpy_rows(tokens, v, c):
    """P, C, R and R× by the trapezoidal rule, for c away from 0 and 1."""
    deviation, step = math.sqrt(v), 0.125
    y = np.arange(-(9 * deviation + math.log(tokens) + 36), 9 * deviation + 5, step)
    shared, own = math.sqrt(c * v), math.sqrt((1 - c) * v)

    def normal(size):
        z = np.linspace(-9.2, 9.2, max(64, int(18.4 * size / 0.15)) | 1)
        weight = np.exp(-z * z / 2)
        return size * z, weight / weight.sum()

    def g(u):
        powers, t = [], np.exp(np.minimum(u, 700))
        for k in range(5):
            powers.append(np.exp(k * u - t))
        return powers

    s, weight = normal(deviation)
    phi = [x @ weight for x in g(y[:, None] + s)]
    power = phi[0] ** (tokens - 1)
    p = tokens * step * np.sum(phi[2] * power)
    third = tokens * step * np.sum(phi[3] * power)
    fourth = np.sum(tokens * phi[4] * power)
    fourth += tokens * (tokens - 1) * np.sum(phi[2] ** 2 * phi[0] ** (tokens - 2))
    a, weight_a = normal(shared)
    b, weight_b = normal(own)
    h = [x @ weight_b for x in g(y[:, None, None] + a[:, None] + b)[:3]]

    def psi(j, k):
        return (h[j] * weight_a) @ h[k].T

    both = psi(0, 0)
    power = both ** (tokens - 1)
    cross = tokens * step**2 * np.sum(psi(1, 1) * power)
    mixed = tokens * step**2 * np.sum(psi(1, 2) * power)
    square = tokens * np.sum(psi(2, 2) * power)
    square += tokens * (tokens - 1) * np.sum(psi(1, 1) ** 2 * both ** (tokens - 2))
    return p, cross, p - third + step * fourth / 6, cross - 2 * mixed + step**2 * square


def numpy_walk(tokens, sublayers, correlation):
    """q and the off-diagonal of a pre-norm stream of attention and ReLU sublayers of He's rule."""
    q, o = 1.0, correlation
    for number in range(sublayers):
        c = o / q
        if number % 2:
            q, o = q + 1, o + (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi
        else:
            p, cross, *_ = numpy_rows(tokens, 1 - c, c)
            q, o = q + c + (1 - c) * p, o + c + (1 - c) * cross
    return q, o


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    from gradflow.theory import attention

    tokens, sublayers, few = 64, 20 if options.quick else 200, 4
    _, first, warm = timed(lambda: attention.walk(tokens, sublayers, correlation=0.2))
    ours = attention.walk(tokens, few, correlation=0.2)
    (q, o), _, peer = timed(lambda: numpy_walk(tokens, few, 0.2), 1)
    peer /= few
    row = {
        "what": f"pre-norm, {sublayers} sublayers of {tokens} tokens",
        "first_seconds": first,
        "warm_seconds": warm,
        "seconds_a_sublayer": warm / sublayers,
        "peer": "NumPy, integrals on grids, without gradients",
        "peer_seconds_a_sublayer": peer,
        "times_peer": peer / (warm / sublayers),
        "largest_difference": float(
            max(abs(ours.q[-1] / q - 1), abs(ours.q[-1] * ours.correlation[-1] / o - 1))
        ),
    }
    if options.json:
        print(json.dumps(row, indent=1))
        return row
    for name, value in row.items():
        print(f"{name:<26}{value:.4g}" if isinstance(value, float) else f"{name:<26}{value}")
    return row


if __name__ == "__main__":
    main()
