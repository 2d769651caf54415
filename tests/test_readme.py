"""The README's Python runs, and its names exist."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import gradflow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("code", PROGRAMS)
def test_python_examples_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    # What a comment beside a print shows, up to each '…', is what is printed.
    shown = re.findall(r"^\s*print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert shown
    for part in "…".join(shown).split("…"):
        assert part.strip() in printed


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_commands_are_those_of_the_command_line():
    from gradflow import cli

    known = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    assert set(re.findall(r"^    gradflow (\w+)", README, re.MULTILINE)) <= known


def names_used(code):
    """Names of gradflow that a program uses, dotted: what it imports, and attributes of that."""
    tree = ast.parse(code)
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            bound |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in bound:
            yield ".".join([bound[node.id], *parts])


def is_public(name):
    """Whether each part of a dotted name is a public name of the part before it."""
    here = gradflow
    for part in name.split(".")[1:]:
        if part.startswith("_") or not hasattr(here, part):
            return False
        value = getattr(here, part)
        if inspect.ismodule(here) and not belongs(here, part, value):
            return False
        here = value
    return True


def belongs(module, name, value):
    """Whether a name is a module's own or one of its parts', and not one that it imports."""
    if inspect.ismodule(value):
        return value.__name__ == f"{module.__name__}.{name}"
    if inspect.isclass(value) or inspect.isroutine(value):
        listed = getattr(module, "__all__", ())
        return name in listed or value.__module__.startswith(module.__name__)
    return True


@pytest.mark.parametrize("code", PROGRAMS)
def test_python_examples_use_public_names_alone(code):
    used = {name for name in names_used(code) if name.split(".")[0] == "gradflow"}
    assert used
    assert not {name for name in used if not is_public(name)}


@pytest.mark.parametrize(
    "code",
    [
        "from gradflow import importlib\nimportlib.reload",
        "import gradflow as gf\ngf.builders._widths",
        "import gradflow\ngradflow.nonsense(3)",
        "from gradflow.builders import np\nnp.ones",
        "from gradflow import builders\nbuilders.dataclasses",
    ],
)
def test_a_private_name_is_found(code):
    assert not all(map(is_public, names_used(code)))


# Each example of CONTRIBUTING.md, and the file that is named before it.
ADDITIONS = re.findall(r"`(gradflow/\S+\.py)`:\n\n((?: {4}.*\n)+)", CONTRIBUTING)


@pytest.mark.parametrize(("file", "example"), ADDITIONS)
def test_examples_of_additions_are_lines_of_their_files_in_order(file, example):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert follow(example, lines)
    assert not follow(f"{example}    a line that is not there\n", lines)


def follow(example, lines):
    """Whether the lines of an example but `...` are among these lines, in order."""
    remaining = iter(lines)
    wanted = [line[4:] for line in example.splitlines() if line.strip() != "..."]
    return all(line in remaining for line in wanted)


def test_every_addition_has_an_example():
    assert len(re.findall(r"^\*\*An? ", CONTRIBUTING, re.MULTILINE)) == len(ADDITIONS)
