"""The direction of imports, and what importing gradflow does to JAX: nothing."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradflow

PACKAGE = Path(__file__).parents[1] / "gradflow"

# Two answers are worth comparing only if neither knows the other.
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


def subject(module):
    """The package or module directly in gradflow; '' is gradflow itself."""
    return module.split(".")[0]


def subjects():
    """The subjects that gradflow's own docstring lists, in its order."""
    docstring = ast.get_docstring(ast.parse(FILES[""].read_text(encoding="utf-8")))
    return re.findall(r"^(\w+) {2,}\S", docstring, re.MULTILINE)


def graph(sources):
    """Modules, and those that each imports; not what it imports from its own package's face."""
    return {module: set(imported(source)) for module, source in sources.items()}


def complaints(sources):
    """What is wrong with the imports of modules with these sources."""
    modules = graph(sources)
    across = {}
    for module, targets in modules.items():
        across.setdefault(subject(module), set()).update(map(subject, targets))
    found = [
        f"{module!r} imports {target!r}"
        for module, targets in modules.items()
        for target in targets
        if (subject(module), subject(target)) in FORBIDDEN
    ]
    for of, edges in (("modules", modules), ("subjects", across)):
        edges = {a: targets - {a} for a, targets in edges.items()}
        try:
            graphlib.TopologicalSorter(edges).prepare()
        except graphlib.CycleError as error:
            found.append(f"{of} import each other: {' <- '.join(error.args[1])}")
    listed = subjects()
    found += [
        f"{a!r} imports {b!r}, which gradflow's docstring lists below it"
        for a, targets in across.items()
        for b in targets
        if a in listed and b in listed and listed.index(b) > listed.index(a)
    ]
    return found


SOURCES = {module: file.read_text(encoding="utf-8") for module, file in FILES.items()}


def test_imports_run_one_way():
    assert not complaints(SOURCES)


def test_the_docstring_lists_each_public_subject_once():
    public = {subject(module) for module in FILES if not module.startswith("_")} - {""}
    assert sorted(subjects()) == sorted(public)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("simulation._samplers", "from gradflow.theory import mean_field"),
        ("simulation._samplers", "def f():\n    import gradflow.theory.mean_field as m"),
        ("theory.mean_field", "from gradflow.simulation._samplers import SAMPLERS"),
        ("theory.mean_field", "from gradflow import simulation"),
        ("activations", "from gradflow import errors, networks"),
        ("networks", "from gradflow.builders import mlp"),
        ("theory.fixed_points", "from gradflow.theory import criticality"),
        ("_arguments", "from gradflow import comparison"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert complaints(SOURCES | {module: SOURCES[module] + "\n" + source})


def test_a_right_import_is_not_complained_of():
    source = "import gradflow.errors\nfrom gradflow.theory import linear_regime, mean_field"
    assert not complaints(SOURCES | {"comparison": SOURCES["comparison"] + "\n" + source})


@pytest.mark.medium
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


FACE = ast.parse(FILES[""].read_text(encoding="utf-8"))


def test_type_checkers_and_programs_import_the_public_names_from_the_same_modules():
    for_type_checkers = {
        alias.name: node.module.removeprefix("gradflow.")
        for node in ast.walk(FACE)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("gradflow.")
        for alias in node.names
    }
    assert for_type_checkers == gradflow._MODULES


def test_dir_has_the_public_names_and_subjects_alone():
    assert set(dir(gradflow)) == {*gradflow.__all__, *subjects(), "__version__"}
    assert not set(gradflow.__all__) & set(subjects())


@pytest.mark.parametrize("name", gradflow.__all__)
def test_a_public_name_is_documented(name):
    value = getattr(gradflow, name)
    sections = re.findall(r"^(\w+)\n-+$", inspect.getdoc(value), re.MULTILINE)
    assert not undocumented(value, sections)
    if inspect.isfunction(value):  # a negative control
        assert undocumented(value, [s for s in sections if s != "Returns"])


def undocumented(value, sections):
    """The sections that a docstring lacks."""
    needed = ["Parameters", "Returns"] if inspect.isfunction(value) else []
    return [section for section in needed if section not in sections]


def test_a_name_that_there_is_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        gradflow.nonsense  # noqa: B018
    assert not hasattr(gradflow, "_nonsense")


def test_importing_gradflow_imports_nothing_large():
    large = "assert not {'jax', 'numpy', 'xarray'} & set(sys.modules)"
    program = f"import sys, gradflow\ndir(gradflow)\n{large}"
    subprocess.run([sys.executable, "-c", program], check=True)
