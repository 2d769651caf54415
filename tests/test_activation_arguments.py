"""Every public function that takes an activation takes its name, or a function of JAX, as well.

They are found by their signatures, in every public module.
"""

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow
from gradflow import activations, blocks, gaussian, networks
from gradflow.errors import InputError
from gradflow.theory import fixed_points, mean_field, transformations


def public_modules():
    for module in pkgutil.walk_packages(gradflow.__path__, "gradflow."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            yield importlib.import_module(module.name)


def takes_an_activation(value):
    """Whether a function, or the class of a block or a network, has an activation as parameter."""
    is_input = inspect.isclass(value) and issubclass(value, blocks.AbstractBlock | networks.Network)
    if not (inspect.isfunction(inspect.unwrap(value)) or is_input):
        return False
    return any(
        p.name == "activation" and "Activation" in str(p.annotation)
        for p in inspect.signature(value).parameters.values()
    )


TAKE_ONE = {
    value: f"{value.__module__}.{value.__name__}"
    for module in public_modules()
    for value in (getattr(module, name) for name in getattr(module, "__all__", ()))
    if callable(value) and takes_an_activation(value) and value is not activations.get
}


# What else they need, by name; 1 is one layer, unit, or input.
ONE = jnp.ones(())
VALUES = {
    "blocks": (blocks.Dense(),),
    "chances": jnp.ones((2, 1)),
    "channels": (1, 1),
    "covariance": jnp.eye(2),
    "k": jnp.eye(2),
    "log_scale": ONE,
    "method": "dks",
    "name": "phi2",
    "names": ("phi2",),
    "q": ONE,
    "q1": ONE,
    "shape": (1,),
    "shifts": jnp.zeros((2, 1)),
    "sigma_b": np.ones(1),
    "sigma_w": np.ones(1),
    "sigma_w2": 1.0,
    "stages": (),
    "threshold": 0.1,
    "transformation": transformations.Transformation(),
    "variance": jnp.ones(2),
    "weights": "glorot",
    "widths": (1, 1),
}


def called_with(function, activation):
    """Call a function with an activation, and with `VALUES` for all else that it needs."""
    given = {
        p.name: VALUES.get(p.name, 1)
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    }
    return function(**given | {"activation": activation})


def test_they_are_found():
    assert {gaussian.moment, fixed_points.analyse, blocks.Dense, networks.Network} <= set(TAKE_ONE)
    assert len(TAKE_ONE) > 40


@pytest.mark.parametrize("function", TAKE_ONE, ids=TAKE_ONE.values())
def test_each_looks_names_and_functions_up(function):
    with pytest.raises(InputError, match="did you mean 'swish'"):
        called_with(function, "swich")
    with pytest.raises(InputError, match="changed the shape"):
        called_with(function, jnp.sum)


@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize("way", ["ReLU", jax.nn.relu], ids=["name", "function"])
def test_names_and_functions_give_what_the_activation_gives(way):
    q, k = np.array([0.5, 2.0]), jnp.array([[1.0, 0.3], [0.3, 1.0]])
    assert gaussian.moment(way, "ddphi2", q)[0] == np.inf  # only where kinks are known
    np.testing.assert_array_equal(gaussian.kernel(way, k), gaussian.kernel(activations.relu, k))
    assert float(mean_field.chi(way, ONE, 2.0)) == 1.0
    assert blocks.Dense(way) == blocks.Dense(activations.relu)


@pytest.mark.medium
@pytest.mark.usefixtures("x64_only")
def test_a_fixed_point_of_a_plain_function_is_that_of_the_activation():
    by_function = fixed_points.analyse(jnp.tanh, 1.5, 0.05)
    assert float(by_function.chi1) == float(fixed_points.analyse("tanh", 1.5, 0.05).chi1)
    assert float(by_function.q_star) == pytest.approx(0.42968, abs=5e-2)
