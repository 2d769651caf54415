"""The limits that keep the package readable: sizes of files and functions, public names."""

import ast
import functools
import inspect
from collections import Counter
from pathlib import Path

import pytest

import gradflow

PACKAGE = Path(__file__).parents[1] / "gradflow"
MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 80
MOST_ARGUMENTS = 10
# 200, and 15 for transformers and the layers that everyday networks have: each is a block or its
# theory, a subject of its own that no other name could take.
MOST_PUBLIC_NAMES = 215

SOURCES = {
    str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8")
    for file in sorted(PACKAGE.rglob("*.py"))
}


def long_files(sources):
    return {file for file, text in sources.items() if text.count("\n") > MOST_LINES_OF_A_FILE}


def functions(sources):
    """Every function, nested ones and methods too, with its file."""
    for file, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file, node


def long_functions(sources):
    return {
        f"{file}: {node.name}"
        for file, node in functions(sources)
        if node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    }


@functools.cache
def face():
    """The public face: functions in `gradflow.__all__`, and commands, of many options."""
    from gradflow import cli

    functions = [getattr(gradflow, name) for name in gradflow.__all__]
    functions += [command.callback for command in cli.app.registered_commands]
    return {
        f"{Path(inspect.getsourcefile(f)).relative_to(PACKAGE)}: {f.__name__}"
        for f in map(inspect.unwrap, functions)
        if inspect.isfunction(f)
    }


def functions_of_many_arguments(sources):
    many = set()
    for file, node in functions(sources):
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if len(arguments) > MOST_ARGUMENTS:
            many.add(f"{file}: {node.name}")
    return many - face()


def public_names(sources):
    """Functions and classes of modules without an underscore in their path.

    Constants are not counted: most are the tables' rows (activations, ensembles, statistics).
    """
    for file, text in sources.items():
        if any(part.startswith("_") and part != "__init__.py" for part in Path(file).parts):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield f"{file}: {node.name}"


def too_many_public_names(sources):
    """The names, if there are too many; in the order of the files that have most of them."""
    names = set(public_names(sources))
    return names if len(names) > MOST_PUBLIC_NAMES else set()


LIMITS = [long_files, long_functions, functions_of_many_arguments, too_many_public_names]


@pytest.mark.parametrize("beyond", LIMITS)
def test_nothing_is_beyond_its_limit(beyond):
    names = beyond(SOURCES)
    assert not names, Counter(name.split(":")[0] for name in names).most_common()


@pytest.mark.parametrize(
    ("beyond", "source"),
    [
        (long_files, "x = 0\n" * (MOST_LINES_OF_A_FILE + 1)),
        (long_functions, "class A:\n  def f(self):\n" + "    x = 0\n" * MOST_LINES_OF_A_FUNCTION),
        (functions_of_many_arguments, "def f(a, b, /, c, d, e, f, *, g, h, i, j, k):\n  pass"),
        (
            too_many_public_names,
            "def f(): ...\n" + "\n".join(f"class C{n}: ..." for n in range(MOST_PUBLIC_NAMES)),
        ),
    ],
)
def test_what_is_beyond_a_limit_is_found(beyond, source):
    assert beyond({"new.py": source})
    assert not beyond({"new.py": "def f(a):\n    return a\n"})


def test_functions_of_the_public_face_may_have_many_arguments():
    file = next(iter(face())).split(":")[0]
    names = [name for name in face() if name.startswith(f"{file}: ")]
    arguments = ", ".join("abcdefghijk")
    source = "".join(f"def {n.split()[1]}({arguments}):\n  pass\n" for n in (*names, "x: private"))
    assert functions_of_many_arguments({file: source}) == {f"{file}: private"}
