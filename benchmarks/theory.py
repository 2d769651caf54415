"""How fast is the theory? Fixed points on a grid and a spectrum, beside SciPy and NumPy.

    python benchmarks/theory.py            a grid of 100×100, a density at 1000 points
    python benchmarks/theory.py --quick

The peers are what one would write instead: for each point `scipy.integrate.quad` and `dblquad`
inside `scipy.optimize.brentq`; for each λ a continuation with Newton's method in NumPy. They run
at a few points, and their time is per point. Times are those of warm runs, until the results are
there; the first run, with compiling, is timed separately.
"""

import argparse
import json
import math
import time

import jax
import numpy as np
import scipy.integrate
import scipy.optimize


def timed(function, repeats=3):
    start = time.perf_counter()
    jax.block_until_ready(function())
    first = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return result, first, min(times)


# Fixed points -------------------------------------------------------------------------------------


def scipy_analysis(sigma_w2, sigma_b2):
    """q*, χ₁, χ∥, c* and χ_c of tanh, for σ_w² of order 1, where these quadratures converge."""

    def average(f, q):
        root = math.sqrt(q)
        density = 1 / math.sqrt(2 * math.pi)
        return scipy.integrate.quad(
            lambda z: f(root * z) * math.exp(-z * z / 2) * density, -12, 12, epsrel=1e-12
        )[0]

    def slope(x):
        return 1 - math.tanh(x) ** 2

    def excess(q):
        return sigma_w2 * average(lambda x: math.tanh(x) ** 2, q) + sigma_b2 - q

    q = scipy.optimize.brentq(excess, 1e-9, sigma_w2 + sigma_b2 + 1, xtol=1e-13)
    chi1 = sigma_w2 * average(lambda x: slope(x) ** 2, q)
    chi_par = sigma_w2 * average(lambda x: x * math.tanh(x) * slope(x), q) / q
    if chi1 <= 1:
        return q, chi1, chi_par, 1.0, chi1

    def pair(f, c):
        root, rest = math.sqrt(q), math.sqrt(1 - c * c)
        return scipy.integrate.dblquad(
            lambda y, z: (
                f(root * z)
                * f(root * (c * z + rest * y))
                * math.exp(-(y * y + z * z) / 2)
                / (2 * math.pi)
            ),
            *(-9, 9, -9, 9),
            epsabs=1e-11,
            epsrel=1e-11,
        )[0]

    c = scipy.optimize.brentq(
        lambda c: (sigma_w2 * pair(math.tanh, c) + sigma_b2) / q - c, 0, 1 - 1e-4, xtol=1e-10
    )
    return q, chi1, chi_par, c, sigma_w2 * pair(slope, c)


def fixed_points(side, peer_points):
    from gradflow import activations
    from gradflow.theory.fixed_points import analyse

    sigma_w2 = np.linspace(0.5, 3, side) ** 2
    sigma_b2 = np.linspace(0, 1, side)[:, None] ** 2
    _, first, warm = timed(lambda: analyse(activations.tanh, sigma_w2, sigma_b2))
    start = time.perf_counter()
    peer = [scipy_analysis(*point) for point in peer_points]
    peer_seconds = (time.perf_counter() - start) / len(peer_points)
    ours = analyse(activations.tanh, *np.array(peer_points).T)
    ours = np.stack([ours.q_star, ours.chi1, ours.chi_par, ours.c_star, ours.chi_c], axis=1)
    return {
        "what": f"tanh, fixed points on a {side}×{side} grid",
        "first_seconds": first,
        "warm_seconds": warm,
        "seconds_a_point": warm / side**2,
        "peer": "SciPy quad, dblquad and brentq",
        "peer_seconds_a_point": peer_seconds,
        "times_peer": peer_seconds / (warm / side**2),
        "largest_difference": float(np.max(np.abs(ours / np.array(peer) - 1))),
    }


# A spectrum's density -----------------------------------------------------------------------------


def numpy_density(at, slopes2, weights, sigma_w2, depth):
    """Density at one λ, Gaussian weights: from λ + i·huge down to the axis, by Newton."""
    heights = np.append(np.geomspace(1e3 * (1 + at), 1e-10 * at, 80), 0.0)
    mean = np.sum(weights * slopes2)
    v = np.log(sigma_w2**depth * mean ** (depth - 1) / (at + 1j * heights[0]))
    for height in heights:
        log_lambda = np.log(at + 1j * height)
        for _ in range(20):
            scaled = np.exp(v) * slopes2
            parts = weights / (1 - scaled)
            z, one_z = np.sum(scaled * parts), np.sum(parts)
            dz = np.sum(scaled * parts / (1 - scaled))
            value = depth * (v - math.log(sigma_w2) - np.log(one_z)) + log_lambda
            value += (depth - 1) * (np.log(one_z) - np.log(z))
            slope = depth * (1 - dz / one_z) + (depth - 1) * dz * (1 / one_z - 1 / z)
            v = v - value / slope
            if abs(value / slope) < 1e-13:
                break
    return -z.imag / (math.pi * at)


def density(count, peer_count):
    from gradflow.theory import spectral_density, spectrum

    depth, sigma_w2, q = 10, 1.76095464, 0.57004788
    law = spectrum.slope_law("tanh", q)
    top = float(spectrum.support(law, sigma_w2, depth).upper)
    at = np.linspace(0, top, count + 2)[1:-1]
    result, first, warm = timed(lambda: spectral_density.density(law, sigma_w2, depth, at=at))
    chosen = np.linspace(0, count - 1, peer_count).astype(int)
    nodes = np.asarray(law.values), np.asarray(law.weights)
    start = time.perf_counter()
    peer = [numpy_density(x, *nodes, sigma_w2, depth) for x in at[chosen]]
    peer_seconds = (time.perf_counter() - start) / peer_count
    return {
        "what": f"tanh, density of a Jacobian of {depth} Gaussian layers at {count} points",
        "first_seconds": first,
        "warm_seconds": warm,
        "seconds_a_point": warm / count,
        "peer": "NumPy, Newton continuation, a loop",
        "peer_seconds_a_point": peer_seconds,
        "times_peer": peer_seconds / (warm / count),
        "largest_difference": float(
            np.max(np.abs(np.asarray(result.of_eigenvalues)[chosen] / np.array(peer) - 1))
        ),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    ordered, chaotic = [(1.2, 0.3), (1.0, 0.05)], [(4.0, 0.3), (6.0, 0.1)]
    with jax.enable_x64(True):
        if options.quick:
            rows = [fixed_points(4, ordered[:1]), density(10, 2)]
        else:
            rows = [fixed_points(100, ordered + chaotic), density(1000, 20)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return rows
    for row in rows:
        print(
            f"{row['what']}: {row['warm_seconds']:.2f} s warm, {row['first_seconds']:.1f} s with "
            f"compiling; {row['times_peer']:.0f} times as fast a point as {row['peer']} "
            f"({row['peer_seconds_a_point']:.3g} s), largest relative difference "
            f"{row['largest_difference']:.1e}"
        )
    return rows


if __name__ == "__main__":
    main()
