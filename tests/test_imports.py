"""The direction of imports, and what importing gradflow does to JAX: nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gradflow"

# Each module imports only from those above it. A package stands below its own modules, and
# `gradflow` itself, which has the version, directly above the one that may want it.
ORDER = (
    "errors",
    "arguments",
    "files",
    "compilation",
    "norms",
    "activations",
    "gaussian",
    "ensembles",
    "batch",
    "gram",
    "cells",
    "blocks.base",
    "blocks.dense",
    "blocks.convolution",
    "blocks.composition",
    "blocks.normalisation",
    "blocks.batch_norm",
    "blocks.dropout",
    "blocks.gating",
    "blocks.recurrent",
    "blocks",
    "networks",
    "statistics",
    "float_ranges",
    "estimation",
    "theory.linear_regime",
    "theory.mean_field",
    "theory.densities",
    "theory.roots",
    "theory.moment_table",
    "theory.fixed_points",
    "theory.architectures",
    "theory.criticality",
    "theory.finite_width",
    "theory.corrections",
    "theory.carried_means",
    "theory.shared_weights",
    "theory.spectrum",
    "theory.transformations",
    "theory.prescription",
    "theory",
    "simulation.threefry",
    "simulation.matrices",
    "simulation.questions",
    "simulation.samplers",
    "simulation.propagation",
    "simulation.memory",
    "simulation.jacobians",
    "simulation.singular_values",
    "simulation.monte_carlo",
    "simulation",
    "verdict",
    "comparison",
    "training.parameters",
    "training.records",
    "training.loop",
    "training.result",
    "training.checks",
    "training.optimisers",
    "training.saved",
    "training.grid",
    "training",
    "shapeset",
    "data",
    "figures.drawing",
    "figures.theory_and_simulation",
    "figures.training",
    "figures",
    "studies.jacobian_spectrum",
    "studies.point",
    "studies.remedies",
    "studies.experiments.base",
    "studies.experiments.layers",
    "studies.experiments.saturation",
    "studies.experiments.kinds",
    "studies.experiments.percentiles",
    "studies.experiments.gradients",
    "studies.experiments.table_1",
    "studies.experiments.trainability",
    "studies.experiments.isometry",
    "studies.experiments.league",
    "studies.experiments.methods",
    "studies.experiments.clipping",
    "studies.experiments",
    "studies.entries",
    "studies.grid_point",
    "studies.description",
    "studies.spectra",
    "studies.plan",
    "studies.found",
    "studies.sealed",
    "studies.store",
    "studies.depth_scales",
    "studies.gradient_spread",
    "studies.results",
    "studies.execution",
    "studies.merging",
    "studies.report_figures",
    "studies.report",
    "studies.note",
    "studies",
    "",
    "cli.process",
    "cli.shared",
    "cli.words",
    "cli.studying",
    "cli.simulating",
    "cli.theory",
    "cli.training",
    "cli",
)
# Whatever the order: two answers are worth comparing only if neither knows the other.
FORBIDDEN = {("simulation", "theory"), ("theory", "simulation")}


def module_name(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(source):
    """Names of gradflow's modules that the source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; write it from gradflow down"
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [d if d.removeprefix("gradflow.") in FILES else node.module for d in deeper]
        else:
            continue
        yield from (n.removeprefix("gradflow").removeprefix(".") for n in names if is_ours(n))


def is_ours(name):
    return name.split(".")[0] == "gradflow"


def complaints(module, source):
    if module not in ORDER:
        return [f"{module!r} is not in ORDER"]
    above = ORDER[: ORDER.index(module)]
    return [
        f"{module!r} imports {target!r}"
        for target in imported(source)
        if target not in above or (module.split(".")[0], target.split(".")[0]) in FORBIDDEN
    ]


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_from_those_above_it(module):
    assert not complaints(module, FILES[module].read_text(encoding="utf-8"))


def test_the_order_lists_each_module_once_and_none_that_is_gone():
    assert sorted(ORDER) == sorted(FILES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("simulation.samplers", "from gradflow.theory import mean_field"),
        ("simulation.samplers", "def f():\n    import gradflow.theory.mean_field as m"),
        ("theory.mean_field", "from gradflow.simulation.samplers import SAMPLERS"),
        ("theory.mean_field", "from gradflow import simulation"),
        ("activations", "from gradflow import errors, networks"),
        ("networks", "import gradflow"),
        ("networks", "from gradflow.networks import mlp"),
        ("utils", ""),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert complaints(module, source)


def test_a_right_import_is_not_complained_of():
    source = "import jax, gradflow.errors\nfrom gradflow.theory import linear_regime, mean_field"
    assert not complaints("comparison", source)


def test_importing_all_of_gradflow_changes_no_setting_of_jax_and_does_not_start_it():
    """`jax.distributed.initialize` and `fork` must come before JAX looks for its devices."""
    started = "assert jax._src.xla_bridge.backends_are_initialized()"
    lines = [
        "import jax",
        "before = dict(jax.config.values)",
        *(f"import gradflow.{name}".rstrip(".") for name in FILES),
        "changed = {k for k, v in before.items() if jax.config.values[k] != v}",
        "assert not changed, changed",
        started.replace("assert", "assert not"),
        "jax.random.key(0)",
        started,
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
