"""Small models and what might have been found of them, made up: gradients that fall as told."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from gradflow import statistics
from gradflow.inspection._assembly import assemble
from gradflow.inspection._cure import Cure, Trial
from gradflow.inspection._reading.layers import layers
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import read


def residual(blocks=3, width=16, branch=32):
    """A residual network of two products a block, between two layers of its own."""

    def init(key):
        keys = iter(jax.random.split(key, 2 * blocks + 2))
        shapes = {"in": (8, width), "out": (width, 2)}
        for i in range(blocks):
            shapes |= {f"up_{i}": (width, branch), f"down_{i}": (branch, width)}
        return {n: jax.random.normal(next(keys), s) / s[0] ** 0.5 for n, s in shapes.items()}, {}

    def apply(p, _state, _key, x):
        h = x @ p["in"]
        for i in range(blocks):
            with jax.named_scope(f"ResNet/Block_{i}"):
                h = h + jnp.tanh(h @ p[f"up_{i}"]) @ p[f"down_{i}"]
        return h @ p["out"]

    return Model("ResNet", init, apply)


def dense(depth=10, width=8):
    """Equal layers of tanh, one above the other, all with biases of 0."""

    def init(key):
        keys = jax.random.split(key, depth)
        return [
            {"w": jax.random.normal(k, (width, width)), "b": jnp.zeros(width)} for k in keys
        ], {}

    def apply(p, _state, _key, x):
        for i, layer in enumerate(p):
            with jax.named_scope(f"MLP/Dense_{i}"):
                x = jnp.tanh(x @ layer["w"] + layer["b"][None])
        return x

    return Model("MLP", init, apply)


def read_model(model, inputs):
    """A model's program, and its layers."""
    parameters, state = jax.eval_shape(model.init, jax.random.key(0))
    program = read(
        lambda parameters, state, key, inputs: model.apply(parameters, state, key, *inputs),
        parameters=parameters,
        state=state,
        key=jax.random.key(0),
        inputs=(jax.ShapeDtypeStruct((4, inputs), jnp.float32),),
    )
    return program, layers(program)


WELL = Cure("", {}, "", Trial("as it is", 0.0, 0.0, 0.0, 0.0))


def found(model, inputs=8, *, slope=-0.9, networks=20, seed=0, known=1.0, cure=WELL, **measured):
    """An inspection in which log ‖∂C/∂z‖ changes by ``slope`` a layer going down; theory agrees."""
    program, of_program = read_model(model, inputs)
    count = len(of_program)
    draw = np.random.default_rng(seed)
    up = count - 1.0 - np.arange(count)
    exact = {
        "log_gradient_norm": slope * up,
        "log_gradient_variance": 2 * slope * up,
        "log_weight_gradient_variance": 2 * slope * up - 3,
        "correlation": np.full(count, 0.5),
        "saturation": np.full(count, 0.1),
        "chi": np.full(count, np.exp(2 * slope)),
    }
    theory = {s.key: exact.get(s.key, np.zeros(count)) for s in statistics.ALL}
    noise = {key: 0.01 * draw.normal(size=(networks, count)) for key in theory}
    why = "theory ends at MLP/Custom_2: `sort` over units"
    reaches = np.where(np.arange(count) < known * count, 0.0, np.nan)
    numbers = {layer.parameter: i for i, layer in enumerate(of_program)}
    leaves = {}
    for number in program.arguments["parameters"]:
        of_weights = number in numbers
        gradient = 2 * slope * up[numbers.get(number, 0)] - 3
        leaves[program.names[number]] = {
            "log_mean_square": np.full(networks, -2.0 if of_weights else -np.inf),
            "log_gradient_mean_square": gradient + 0.02 * draw.normal(size=networks),
        }
    values = {key: value + noise[key] for key, value in theory.items()}
    return assemble(
        model,
        program,
        of_program,
        types.SimpleNamespace(
            **{"values": values, "parameters": leaves, "networks": networks}
            | {"born": None, "ends": ""}
            | measured
        ),
        types.SimpleNamespace(
            values={key: value + reaches for key, value in theory.items()},
            reasons=tuple("" if np.isfinite(x) else why for x in reaches),
        ),
        cure,
    )
