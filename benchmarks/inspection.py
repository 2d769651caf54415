"""How long does `gradflow.inspect` take, does it grow with depth, and what does AnyInit say?

    python benchmarks/inspection.py                  all three: some minutes
    python benchmarks/inspection.py first --repeats 3
    python benchmarks/inspection.py depth peers --json numbers.json

``first`` is a process that inspects an MLP of 50 tanh layers of width 128 (50 networks) and prints
the table: cold, with an empty folder of kept programs, and warm, in units of ``import jax``.
``depth`` is the seconds in XLA's compiler, and the CPU seconds, of one inspection (3 networks) of
300 sigmoid layers beside those of 30, in processes that keep no programs; the goal is a ratio of
compiling of at most 2.
``peers`` asks gradflow and AnyInit (the extra ``bench``) about eleven Flax models with the
weights that AnyInit draws. Each predicts second moments of layers, gradflow of pre-activations and
AnyInit of activations, and is compared with its own measurement in 30 draws: the worst relative
error over layers, beside the largest standard error of gradflow's measurement (AnyInit's is of the
same order). Gradients' (norms, relative) and correlations' errors are gradflow's; AnyInit
predicts neither.
"""

import argparse
import functools
import json
import math
import tempfile
import time
import warnings

import numpy as np
from first_answer import median, run

DRAWS = 30

STACK = """
import time, json, jax, jax.numpy as jnp, gradflow
compiling = []
def listen(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
        compiling.append(seconds)
jax.monitoring.register_event_duration_secs_listener(listen)
def init(key):
    return [jax.random.normal(k, ({width}, {width})) * {scale} / {width}**0.5
            for k in jax.random.split(key, {depth})]
def apply(weights, x):
    for w in weights:
        x = {phi}(x @ w)
    return x
x = jax.random.normal(jax.random.key({n}), (4, {width}), jnp.float32)
result = gradflow.inspect(init, apply, x, networks={networks})
"""
FIRST = STACK + "print(result)"
DEPTH = STACK + "print(json.dumps([sum(compiling), len(compiling)]))"


def first(repeats):
    """Seconds to the table, cold and warm, and of `import jax`."""
    unit = median([run(["-c", "import jax"], None)[0] for _ in range(repeats)])
    code = functools.partial(
        FIRST.format, depth=50, width=128, networks=50, phi="jnp.tanh", scale=1.1
    )
    with tempfile.TemporaryDirectory() as folder:
        cold, *warm = (
            run(["-c", code(n=n)], folder, GRADFLOW_CACHE=f"{folder}/cache")[0]
            for n in range(repeats + 1)
        )
    found = {"cold": cold, "warm": median(warm)}
    print(f"import jax: {unit['wall']:.2f} s, {unit['cpu']:.2f} s of CPU")
    for name, one in found.items():
        wall, cpu = (one[kind] / unit[kind] for kind in ("wall", "cpu"))
        print(
            f"50 layers, {name}: {one['wall']:.1f} s ({wall:.1f} × import jax), "
            f"{one['cpu']:.1f} s of CPU ({cpu:.1f} ×)",
            flush=True,
        )
    return {"import jax": unit, **found}


def depth(repeats):
    """Seconds of compiling, programs and CPU seconds of one inspection, by depth."""
    found = {}
    for layers in (30, 300):
        code = DEPTH.format(
            depth=layers, width=64, networks=3, phi="jax.nn.sigmoid", scale=1.0, n=0
        )
        runs = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                used, text = run(["-c", code], folder, GRADFLOW_CACHE=f"{folder}/cache")
            compiling, programs = json.loads(text)
            runs.append({"compiling": compiling, "programs": programs, **used})
        found[layers] = median(runs)
        print(
            f"{layers} layers: {found[layers]['compiling']:.1f} s of compiling "
            f"({found[layers]['programs']} programs), {found[layers]['cpu']:.1f} s of CPU",
            flush=True,
        )
    for kind in ("compiling", "cpu"):
        print(f"ratio, {kind}: {found[300][kind] / found[30][kind]:.2f}")
    return found


# Models -------------------------------------------------------------------------------------------


def models():
    """Flax modules and inputs, by name."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    class MLP(nn.Module):
        phi: object
        norm: bool = False

        @nn.compact
        def __call__(self, x):
            for _ in range(8):
                x = nn.Dense(128)(x)
                x = self.phi(nn.LayerNorm()(x) if self.norm else x)
            return nn.Dense(10)(x)

    class Residual(nn.Module):
        norm: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(128)(x)
            for _ in range(6):
                h = nn.Dense(128)(nn.LayerNorm()(x) if self.norm else x)
                x = x + nn.Dense(128)(nn.relu(h))
            return nn.Dense(10)(x)

    class GLU(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(5):
                x = nn.Dense(128)(x) * nn.sigmoid(nn.Dense(128)(x))
            return nn.Dense(10)(x)

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            for channels, stride in ((32, 1), (32, 2), (64, 1), (64, 2)):
                x = nn.relu(nn.Conv(channels, (3, 3), strides=stride)(x))
            return nn.Dense(10)(x.mean(axis=(1, 2)))

    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            for units in (256, 128, 64, 128, 256):
                x = jnp.tanh(nn.Dense(units)(x))
            return nn.Dense(128)(x)

    rows = jax.random.normal(jax.random.key(0), (16, 128))
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 16))
    made = {f"MLP, {phi.__name__}": MLP(phi) for phi in (nn.relu, nn.tanh, nn.gelu, nn.sigmoid)}
    made["MLP, x + sin² x"] = MLP(lambda x: x + jnp.sin(x) ** 2)
    made |= {"post-LN, silu": MLP(nn.silu, norm=True), "residual": Residual(norm=False)}
    made |= {"pre-LN residual": Residual(norm=True), "GLU": GLU(), "autoencoder": Autoencoder()}
    inputs = dict.fromkeys(made, rows)
    return {name: (made[name], inputs[name]) for name in made} | {"CNN, strides": (CNN(), images)}


def by_anyinit(model, x):
    """Its layers' scales, worst error of second moments, what it warns of, and CPU seconds."""
    import anyinit
    import jax

    own = model.init(jax.random.key(1), x)
    begun = time.process_time()
    reports = [
        anyinit.initialize(model, "analytic", x, params=own, seed=seed) for seed in range(DRAWS)
    ]
    seconds = (time.process_time() - begun) / DRAWS
    scales = {layer.name: layer.scale for layer in reports[0].layers if layer.scale is not None}
    errors, unknown = [], 0
    for rows in zip(*(report.layers for report in reports), strict=True):
        if rows[0].predicted is None or rows[0].measured is None:
            unknown += 1
        else:
            errors.append(abs(rows[0].predicted / np.mean([r.measured for r in rows]) - 1))
    return scales, {
        "variance": max(errors, default=math.nan),
        "unknown": unknown + len(reports[0].unscaled),
        "layers": len(reports[0].layers),
        "seconds": seconds,
    }


def by_gradflow(model, x, scales):
    """Worst errors of q, of gradients' norms and of correlations, layers out of reach, seconds."""
    import jax

    import gradflow

    own = model.init(jax.random.key(1), x)["params"]

    def init(key):
        def drawn(path, leaf):
            names = [part.key for part in path]
            scale = scales.get("/".join(names[:-1])) if names[-1] == "kernel" else None
            if scale is None:
                return leaf
            number = sum(ord(c) * 31**i for i, c in enumerate(jax.tree_util.keystr(path)))
            return scale * jax.random.normal(
                jax.random.fold_in(key, number % 2**31), leaf.shape, leaf.dtype
            )

        return jax.tree_util.tree_map_with_path(drawn, own)

    begun = time.process_time()
    with jax.numpy_rank_promotion("allow"):
        result = gradflow.inspect(
            init, lambda p, x: model.apply({"params": p}, x), x, networks=DRAWS
        )
    seconds = time.process_time() - begun

    def worst(key, difference):
        estimate = result.estimates[key]
        measured = estimate.log_value if key.startswith("log_") else estimate.value
        apart = difference(result.theory[key], np.asarray(measured))
        known = np.isfinite(apart)
        return float(np.max(np.abs(apart[known]))) if known.any() else math.nan

    gradient = "log_gradient_variance"
    reached = np.isfinite(result.theory["log_q"])
    return {
        "variance": worst("log_q", lambda theory, measured: np.expm1(theory - measured)),
        "noise": float(np.nanmax(result.estimates["log_q"].log_standard_error)),
        "gradient": worst(gradient, lambda theory, measured: np.expm1((theory - measured) / 2)),
        "correlation": worst("correlation", lambda theory, measured: theory - measured),
        "unknown": int((~reached).sum()),
        "unknown gradients": int((~np.isfinite(result.theory[gradient])).sum()),
        "layers": len(reached),
        "seconds": seconds,
    }


def peers(_):
    """What both say of each model."""
    warnings.simplefilter("ignore")
    found = {}
    print(
        f"{'':<18}{'gradflow: q':>12}{'± noise':>9}{'gradient':>10}{'corr.':>8}"
        f"{'unknown':>10}{'CPU s':>8}"
        f"{'AnyInit: E φ²':>16}{'unknown':>9}{'CPU s':>8}"
    )
    for name, (model, x) in models().items():
        scales, theirs = by_anyinit(model, x)
        ours = by_gradflow(model, x, scales)
        found[name] = {"gradflow": ours, "AnyInit": theirs}
        unknown = f"{ours['unknown']}, {ours['unknown gradients']}/{ours['layers']}"
        print(
            f"{name:<18}{100 * ours['variance']:>10.1f} %{100 * ours['noise']:>7.1f} %"
            f"{100 * ours['gradient']:>8.1f} %{ours['correlation']:>8.3f}"
            f"{unknown:>10}{ours['seconds']:>8.1f}"
            f"{100 * theirs['variance']:>14.1f} %"
            f"{theirs['unknown']:>6}/{theirs['layers']}{theirs['seconds']:>8.2f}",
            flush=True,
        )
    return found


PARTS = {"first": first, "depth": depth, "peers": peers}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=1, help="processes of each kind")
    parser.add_argument("--json", metavar="FILE", help="keep the numbers in a file")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(unknown)}")
    report = {part: PARTS[part](options.repeats) for part in options.parts or PARTS}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
    return report


if __name__ == "__main__":
    main()
