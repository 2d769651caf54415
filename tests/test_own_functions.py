"""An activation of one's own by module:function, and that text alone imports nothing."""

import itertools
import sys

import jax.numpy as jnp
import pytest

from gradflow import _imports, activations, studies
from gradflow.errors import InputError

MODULE = """
import jax
import jax.numpy as jnp
import numpy as np

wave = lambda x: x + jnp.sin(3 * x)
plain = jax.nn.relu
total = jnp.sum
host = np.tanh
number = 3
"""
STUDY = """
[network]
activation = "{}:wave"
weights = "he"
width = 8
depth = 2

[sampling]
networks = 2
"""
_numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the current directory that nothing has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_activations_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 +")
    return name


def test_a_function_is_found_in_the_current_directory(module):
    with _imports.allowed(True):
        phi = activations.get(f"{module}:wave")
        assert activations.get(f"{module}:plain") is activations.relu
    assert phi.name == f"{module}:wave"
    assert float(phi(1.0)) == pytest.approx(float(1 + jnp.sin(3.0)))
    assert activations.get(phi.name) is phi  # what was imported needs no leave again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere_at_all:f", "there is no module 'nowhere_at_all'"),
        ("broken:f", "importing 'broken' raised SyntaxError"),
        ("{}:nothing", "has no 'nothing'"),
        ("{}:number", "which is 3; it is a function"),
        ("{}:total", "changed the shape"),
        ("{}:host", "must be an elementwise function written in JAX"),
        ("{}:", "it is module:function"),
        ("../x:f", "it is module:function"),
    ],
)
def test_what_is_no_activation_is_refused_in_one_sentence(module, text, message):
    with _imports.allowed(True), pytest.raises(InputError, match=message) as caught:
        activations.get(text.format(module))
    assert "\n" not in str(caught.value)


def test_text_imports_nothing_unless_that_is_allowed(module):
    with pytest.raises(InputError, match="nothing is imported here"):
        activations.get(f"{module}:wave")
    with _imports.allowed(True), pytest.raises(InputError, match=r"network.activation: .*--allow"):
        studies.parse(STUDY.format(module))
    stored = studies.parse(STUDY.format(module), allow_imports=None)
    assert module not in sys.modules
    network = next(iter(stored.points())).network
    with pytest.raises(InputError, match="nothing is imported here"):
        network()
    study = studies.parse(STUDY.format(module), allow_imports=True)
    assert next(iter(study.points())).network().activation.name == f"{module}:wave"
