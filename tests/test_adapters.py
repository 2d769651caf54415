"""Models of every library as two functions: names, laws of weights, and the library's own outputs.

Each library has a network of two dense layers and a convolutional one with BatchNorm and dropout.
"""

import dataclasses
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow
from gradflow import builders, networks
from gradflow._arguments import from_seed
from gradflow.errors import InputError
from gradflow.inspection import _adapters, _tracing

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it once, when it is imported

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
WIDTH = 64


@pytest.fixture(autouse=True)
def _as_libraries_have_it():
    """Libraries promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def rows():
    return jax.random.normal(from_seed(1), (4, WIDTH))


def images():
    return jax.random.normal(from_seed(2), (4, 6, 6, 2))


@dataclasses.dataclass(frozen=True)
class Library:
    """What a library's models are, and what it says of them itself."""

    mlp: Callable  # of no argument, the law of two dense layers of LeCun's or Glorot's variance
    kernel: str  # the path of its first kernel
    variance: float  # of the kernel
    leaves: int
    cnn: Callable  # of the rate of dropout: (model, its outputs for `images` in training)
    mode: str  # what is chosen for the CNN


def linen():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(WIDTH)(x))
            return nn.Dense(3)(x)

    class CNN(nn.Module):
        rate: float

        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(4, (3, 3), strides=(2, 2))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.Dropout(self.rate, deterministic=not train)(x)
            return nn.Dense(3)(x.reshape(len(x), -1))

    def cnn(rate):
        module = CNN(rate)
        variables = module.init(from_seed(3), images())
        own = module.apply(
            variables, images(), True, rngs={"dropout": from_seed(4)}, mutable=["batch_stats"]
        )
        return (module, variables), own[0]

    return Library(Net, "['Dense_0']['kernel']", 1 / WIDTH, 4, cnn, "train=True")


def nnx():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, *, rngs):
            self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.last = nnx.Linear(WIDTH, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    class CNN(nnx.Module):
        def __init__(self, rate, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(rate, rngs=rngs)
            self.head = nnx.Linear(36, 3, rngs=rngs)

        def __call__(self, x):
            x = self.dropout(nnx.relu(self.norm(self.conv(x))))
            return self.head(x.reshape(len(x), -1))

    def cnn(rate):
        model = CNN(rate, nnx.Rngs(3))
        own = nnx.clone(model)(images())
        model.eval()
        return model, own

    return Library(lambda: Net, "['first']['kernel']", 1 / WIDTH, 4, cnn, "model.train()")


def equinox():
    class CNN(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout
        head: eqx.nn.Linear

        def __init__(self, rate, key):
            self.conv = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=key)
            self.norm = eqx.nn.BatchNorm(4, axis_name="examples", mode="batch")
            self.dropout = eqx.nn.Dropout(rate)
            self.head = eqx.nn.Linear(36, 3, key=key)

        def __call__(self, x, state, key):
            x, state = self.norm(self.conv(jnp.moveaxis(x, -1, 0)), state)
            return self.head(self.dropout(jax.nn.relu(x), key=key).ravel()), state

    def make(key):
        return eqx.nn.MLP(WIDTH, 3, WIDTH, 1, key=key)

    def cnn(rate):
        model, state = eqx.nn.make_with_state(CNN)(rate, from_seed(3))
        keys = jax.random.split(from_seed(4), 4)
        each = jax.vmap(model, in_axes=(0, None, 0), out_axes=(0, None), axis_name="examples")
        own, _ = each(images(), state, keys)
        return (eqx.nn.inference_mode(model), state), own

    mode = "vmapped over the batch, inference=False"
    return Library(lambda: make, ".layers[0].weight", 1 / (3 * WIDTH), 4, cnn, mode)


def haiku():
    import haiku as hk

    def cnn(rate):
        def net(x, is_training):
            x = hk.Conv2D(4, 3, stride=2)(x)
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training))
            x = hk.dropout(hk.next_rng_key(), rate, x) if is_training else x
            return hk.Linear(3)(x.reshape(len(x), -1))

        pure = hk.transform_with_state(net)
        weights = pure.init(from_seed(0), images(), True)
        own, _ = pure.apply(*weights, from_seed(4), images(), True)
        return net, own

    def net(x):
        x = jax.nn.relu(hk.Linear(WIDTH)(x))
        return hk.Linear(3)(x)

    def mlp():
        return hk.without_apply_rng(hk.transform(net))

    # A normal law of variance 1/n without what is beyond two deviations: 0.7737 of it is left.
    return Library(mlp, "['linear']['w']", 0.7737 / WIDTH, 4, cnn, "is_training=True")


def keras():
    import keras

    def mlp():
        layers = [keras.layers.Dense(WIDTH, "relu", name="first"), keras.layers.Dense(3)]
        return keras.Sequential([keras.Input((WIDTH,)), *layers], name="net")

    def cnn(rate):
        layers = [
            keras.layers.Conv2D(4, 3, strides=2, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(rate),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
        model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
        values = [[v.value for v in model.trainable_variables]]
        values += [[v.value for v in model.non_trainable_variables]]
        return model, model.stateless_call(*values, images(), training=True)[0]

    return Library(mlp, "['net/first/kernel']", 1 / WIDTH, 4, cnn, "training=True")


LIBRARIES = {f.__name__: f for f in (linen, nnx, equinox, haiku, keras)}


@functools.cache
def library(name):
    pytest.importorskip({"linen": "flax", "nnx": "flax"}.get(name, name))
    return LIBRARIES[name]()


def adapt(model, *inputs, apply=None, **kwargs):
    return _adapters.adapt(model, apply, inputs, kwargs)


@pytest.mark.parametrize("name", LIBRARIES)
def test_weights_have_the_library_s_names_and_law(name):
    """Null: the law's variance. 4 networks of 64² entries; |z| < 5, one alarm in two million.

    The variance of a mean of squares is below 2 σ⁴/n for these laws, of less kurtosis than 3.
    """
    own = library(name)
    model = adapt(own.mlp(), rows())
    program = _tracing.trace(model, (rows(),))
    names = [program.names[i] for i in program.arguments["parameters"]]
    assert own.kernel in names
    assert len(names) == own.leaves
    parameters, state = model.draw(jax.random.split(from_seed(5), 4))
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    kernel = next(leaf for path, leaf in leaves if jax.tree_util.keystr(path) == own.kernel)
    assert kernel.shape == (4, WIDTH, WIDTH)
    assert np.unique(kernel).size > 0.99 * kernel.size
    z = (np.mean(np.square(kernel)) / own.variance - 1) / np.sqrt(2 / kernel.size)
    assert abs(z) < 5
    keys = jax.random.split(from_seed(6), 4)
    many = jax.vmap(model.apply, (0, 0, 0, None))(parameters, state, keys, rows())
    one = model.apply(*jax.tree.map(lambda leaf: leaf[2], (parameters, state)), keys[2], rows())
    np.testing.assert_allclose(many[2], one, rtol=1e-4, atol=1e-6)
    assert many.shape == (4, 4, 3)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_network_with_batch_norm_and_dropout_is_applied_as_the_library_trains_it(name):
    own = library(name)
    model, expected = own.cnn(0.0)
    found = adapt(model, images())
    assert found.mode == own.mode
    weights = found.given if found.given is not None else found.init(from_seed(0))
    outputs = found.apply(*weights, from_seed(7), images())
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    found = adapt(own.cnn(0.5)[0], images())
    weights = weights if found.given is None else found.given
    dropped = jax.vmap(found.apply, (None, None, 0, None))(
        *weights, jax.random.split(from_seed(8), 2), images()
    )
    assert not np.allclose(dropped[0], dropped[1])


def dense(key, n_in=WIDTH):
    return {"w": jax.random.normal(key, (n_in, 3)) / n_in**0.5, "b": jnp.zeros(3)}


def affine(parameters, x):
    return jnp.tanh(x @ parameters["w"] + parameters["b"])


def stax(rng, input_shape):
    return (*input_shape[:-1], 3), dense(rng, input_shape[-1])


class Affine(eqx.Module):
    """A layer of one example; its weights are of a key."""

    w: jax.Array
    units: int

    def __init__(self, key):
        self.w = dense(key)["w"]
        self.units = 3

    def __call__(self, x):
        return jnp.tanh(x @ self.w).reshape(self.units)


def stateful(params, state, rng, x, scale=1.0):
    return scale * jax.random.bernoulli(rng, 0.5, x.shape) @ params["w"], state + 1


PAIRS = {
    "init(key)": ((dense, affine), affine),
    "init(key, x)": ((lambda key, x: dense(key, x.shape[-1]), affine), affine),
    "init(*arguments)": ((lambda *a: dense(a[0], a[1].shape[-1]), affine), affine),
    "stax": ((stax, lambda p, x, **_: affine(p, x)), affine),
    "a key before the inputs": (
        (dense, lambda p, rng, x: x @ p["w"] + jax.random.key_data(rng)[0] * 0.0),
        lambda p, x: x @ p["w"],
    ),
    "a key by name": (
        (dense, lambda p, x, *, key: x @ p["w"] + jax.random.key_data(key)[0] * 0.0),
        lambda p, x: x @ p["w"],
    ),
    "others than floats": (
        (
            lambda key: dense(key) | {"shift": jnp.int32(1), "gain": 2.0},
            lambda p, x: p["gain"] * x @ p["w"] + p["shift"],
        ),
        lambda p, x: 2.0 * x @ p["w"] + 1,
    ),
    "inputs by name alone": (
        (lambda key, inputs: dense(key, inputs.shape[-1]), lambda p, *, inputs: affine(p, inputs)),
        affine,
    ),
    "a key whose name ends so": (
        (dense, lambda p, x, z_rng: x @ p["w"] + jax.random.key_data(z_rng)[0] * 0.0),
        lambda p, x: x @ p["w"],
    ),
    "an input with the name of a key": ((dense, lambda p, key: affine(p, key)), affine),
    "the mean over devices": (
        (dense, lambda p, x: affine(p, x) - jax.lax.pmean(affine(p, x[:1]), "batch")),
        lambda p, x: affine(p, x) - affine(p, x[:1]),
    ),
    "a maker of parts": (functools.partial(Affine), lambda p, x: jnp.tanh(x @ p["w"])),
    "a maker of nothing": (lambda: (dense, affine), affine),
    "a maker of a key": (lambda key: Affine(key), lambda p, x: jnp.tanh(x @ p["w"])),
    "a class": (Affine, lambda p, x: jnp.tanh(x @ p["w"])),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_functions_of_every_kind_are_the_model_that_they_are(kind):
    pair, expected = PAIRS[kind]
    model = adapt(pair, rows())
    parameters, state = model.init(from_seed(0))
    outputs = model.apply(parameters, state, from_seed(1), rows())
    np.testing.assert_allclose(outputs, expected(dense(from_seed(0)), rows()), rtol=1e-5)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(parameters))


def test_a_tree_of_arrays_is_an_input():
    """Several inputs by name, whole numbers among them, and a key: of one argument each."""
    found = gradflow.inspect(
        lambda key: dense(key),
        lambda p, batch, dropped: (
            affine(p, batch["x"][batch["at"]]) * jax.random.bernoulli(dropped, 0.5, (2, 3))
        ),
        ({"x": rows(), "at": np.array([3, 0])}, jax.random.key(0)),
        networks=2,
        cure=False,
    )
    w = np.asarray(found.places.shapes)
    assert w.tolist() == [[2, 3]]
    assert np.isfinite(found.theory.values["log_q"]).all()


def test_a_pair_with_a_state_and_a_key_gives_its_outputs_alone():
    model = adapt(lambda key: (dense(key), jnp.zeros(())), rows(), apply=stateful, scale=2.0)
    parameters, state = model.init(from_seed(0))
    apply = functools.partial(model.apply, parameters, state)
    one, other = apply(from_seed(1), rows()), apply(from_seed(2), rows())
    assert one.shape == (4, 3)
    assert not np.allclose(one, other)
    np.testing.assert_allclose(one, stateful(parameters, 0, from_seed(1), rows(), 2.0)[0])


def test_an_init_that_needs_the_value_of_its_key_is_called_key_by_key():
    def init(key):
        seed = int(jax.random.bits(key))
        return {"w": np.random.default_rng(seed).normal(size=(WIDTH, 3)), "b": np.zeros(3)}

    model = adapt(init, rows(), apply=affine)
    assert not model.traceable
    drawn, _ = model.draw(jax.random.split(from_seed(0), 2))
    assert drawn["w"].shape == (2, WIDTH, 3)
    assert not np.allclose(*drawn["w"])
    assert adapt((dense, affine), rows()).traceable


def test_given_weights_are_a_model_without_a_law():
    weights = dense(from_seed(0))
    for model in (adapt(weights, rows(), apply=affine), adapt(Affine(from_seed(0)), rows())):
        assert model.init is None
        np.testing.assert_array_equal(jax.tree.leaves(model.given)[-1], weights["w"])
        with pytest.raises(ValueError, match="no law"):
            model.draw(from_seed(0))


def test_a_model_of_one_example_is_mapped_over_a_batch_that_is_as_long_as_its_inputs_are_wide():
    """Applied to the whole of a square batch it would have a result too, of the wrong axis."""
    layer = eqx.nn.Linear(4, 4, key=from_seed(0))
    model = adapt(layer, jnp.eye(4))
    outputs = model.apply(*model.given, from_seed(0), jnp.eye(4))
    np.testing.assert_allclose(outputs, layer.weight.T + layer.bias, rtol=1e-6)


def test_a_network_of_gradflow_comes_through_the_same_door():
    network = networks.with_biases(builders.mlp([8, 8, 8, 8], "tanh"))
    inputs = jax.random.normal(from_seed(1), (2, 8))
    model = adapt(network, inputs)
    parameters, state = model.init(from_seed(0))
    signal = inputs
    matrices = [w for stage in parameters for m in stage.matrices for w in m]
    for layer, w in enumerate(matrices):
        signal = (jnp.tanh(signal) if layer else signal) @ w.T
    outputs = model.apply(parameters, state, from_seed(1), inputs)
    np.testing.assert_allclose(outputs, signal, rtol=1e-5)
    assert len(matrices) == network.depth
    program = _tracing.trace(model, (inputs,))
    assert sum(e.primitive == "dot_general" for e in program.equations) == network.depth


def untraceable(parameters, x):
    return x if x.sum() > 0 else x @ parameters["w"]


def not_a_number(key):
    return dense(key) | {"b": jnp.full(3, jnp.nan)}


def fake(module):
    """An object whose class says that it is of this module."""
    return type("Net", (), {"__module__": module})()


BAD = {
    "no parameters": (lambda: (lambda _: {}, lambda _, x: x), "has no parameters; it is a model"),
    "untraceable": (
        lambda: (dense, untraceable),
        r"untraceable cannot be traced: Tracer\w+ at test_adapters.py, line \d+: .*; it is made of",
    ),
    "shapes": (
        lambda: (lambda key: dense(key, 5), affine),
        r"inputs is float\d\d \(4, 64\); affine cannot be applied to it: \w+ at test_adapters.py, "
        r"line \d+: ",
    ),
    "shapes of one example": (
        lambda: eqx.nn.Linear(5, 3, key=from_seed(0)),
        r"inputs is float\d\d \(4, 64\); Linear cannot be applied to it: ",
    ),
    "too few arguments": (lambda: (dense, lambda p: p["w"]), "it takes 0 inputs, not 1"),
    "NaN": (
        lambda: (not_a_number(from_seed(0)), affine),
        r"affine\['b'\] has 3 values of 3 that are NaN or infinite; all are finite",
    ),
    "no inputs": (lambda: (dense, lambda p, _: p["w"]), "do not depend on inputs"),
    "a maker that fails": (lambda: lambda: 1 / 0, r"fails: ZeroDivisionError at test_adapters.py"),
    "a maker of something else": (lambda: lambda: 3, r"makes an object of int; it is a module of"),
    "something else": (lambda: {"w": 1}, "model is an object of dict; it is a module of Flax"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_model_is_refused_in_one_sentence(kind):
    make, sentence = BAD[kind]
    with pytest.raises(InputError, match=sentence) as error:
        _tracing.trace(adapt(make(), rows()), (rows(),))
    assert "\n" not in str(error.value)


def test_keras_on_another_backend_is_refused(monkeypatch):
    backend = types.SimpleNamespace(backend=lambda: "tensorflow")
    monkeypatch.setitem(sys.modules, "keras", types.SimpleNamespace(config=backend))
    with pytest.raises(InputError, match=r"Keras is tensorflow; it is JAX, with KERAS_BACKEND=jax"):
        adapt(fake("keras.src.models.model"), rows())


def test_pytorch_that_torchax_does_not_know_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.13.0"))
    monkeypatch.setitem(sys.modules, "torchax", None)
    with pytest.raises(
        InputError, match=r"torchax, which cannot be imported beside PyTorch 2.13.0"
    ):
        adapt(fake("torch.nn.modules.linear"), rows())


def test_pytorch_is_read_through_torchax():
    """Where it is installed; the tests' own environment has it not, for its size."""
    if importlib.util.find_spec("torchax") is None:
        pytest.skip("needs torchax")
    import torch

    def make():
        layers = torch.nn.Linear(WIDTH, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)
        return torch.nn.Sequential(*layers)

    module = make()
    x = np.asarray(rows(), np.float32)
    model = adapt(module, x)
    outputs = model.apply(*model.given, from_seed(0), jnp.asarray(x))
    np.testing.assert_allclose(outputs, module(torch.tensor(x)).detach(), rtol=1e-4, atol=1e-6)
    assert set(model.given[0]) == {f"{i}.{name}" for i in range(3) for name in ("weight", "bias")}
    drawn, _ = adapt(make, x).draw(jax.random.split(from_seed(0), 2))
    assert not np.allclose(*drawn["0.weight"])
    # PyTorch's law is uniform, of variance 1/(3n).
    np.testing.assert_allclose(np.var(drawn["0.weight"]), 1 / (3 * WIDTH), rtol=0.2)
    paths = {e.path for e in _tracing.trace(model, (x,)).equations if e.primitive == "dot_general"}
    assert {path.split("/")[1] for path in paths} == {"0", "2"}
