"""What GPUs and TPUs would run, lowered here: no call of the host, and products at full precision.

The programs are those of an accelerator (where there is a choice, JAX says "gpu" here), down to
StableHLO; that they run, and how fast, needs a device.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gradflow import builders, statistics, training
from gradflow.simulation import _programs, jacobians, singular_values
from gradflow.theory import mean_field

NETWORKS = {
    "gaussian": builders.mlp([6, *[8] * 3], "tanh", "glorot", sigma_b=0.1),
    "orthogonal": builders.mlp([6, *[8] * 3], "relu", "orthogonal"),
    "batch_norm": builders.mlp([6, *[8] * 3], "relu", "he", norm="batch"),
    "recurrent": builders.recurrent(6, 8, 5, "tanh", "glorot"),
    "convolutional": builders.convolutional((4, 4), [1, 3, 3], "tanh", "he", dense=[9]),
}


def simulation(network, sampler):
    positions = int(np.prod([stage.block.pool_factor for stage in network.stages]))
    x = jnp.ones((4 * positions, network.input_width), jnp.float32)
    return functools.partial(
        _programs._run.trace,
        _programs.RandomNetworks.of(network, x, jax.random.key(0)),
        jnp.zeros(2, jnp.int32),
        jnp.arange(2, dtype=jnp.int32),
        sampler=sampler,
        measured=statistics.ALL,
        keep=(True, False),
        block=2,
        mesh=Mesh(np.array(jax.devices()[:1]), ("networks",)),
    )


def gradient_of_a_network():
    network = NETWORKS["gaussian"]
    weights = training.initial_weights(network, jax.random.key(0))

    def cost(weights):
        return jnp.sum(training.outputs(network, weights, jnp.ones((2, 6))))

    return functools.partial(jax.jit(jax.grad(cost)).trace, weights)


def jacobian_products():
    def products(key):
        network, x = NETWORKS["gaussian"], jnp.ones((1, 6))
        pushed = jacobians.draw(network, x, key, sampler="matrix_free").times(jnp.ones((1, 1, 6)))
        pulled = pushed.jacobian.transpose_times(pushed.direction)
        factors = jacobians.layer_jacobians(network, x[0], key)
        return pulled.direction, singular_values.log_singular_values(factors).log

    return functools.partial(jax.jit(products).trace, jax.random.key(0))


def theory():
    predict = jax.jit(mean_field.predict)
    return functools.partial(predict.trace, NETWORKS["gaussian"], jnp.eye(2))


def end_to_end_singular_values():
    network, x = builders.mlp([6, *[6] * 3], "tanh", "glorot"), jnp.ones((1, 6))
    of_key = jax.jit(jax.vmap(lambda key: singular_values.end_to_end(network, x, key)))
    return functools.partial(of_key.trace, jax.random.split(jax.random.key(0), 2))


PROGRAMS = {
    **{f"dense {name}": functools.partial(simulation, n, "dense") for name, n in NETWORKS.items()},
    **{
        f"matrix_free {name}": functools.partial(simulation, network, "matrix_free")
        for name, network in NETWORKS.items()
    },
    "training": gradient_of_a_network,
    "jacobians": jacobian_products,
    "spectra": end_to_end_singular_values,
    "theory": theory,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_accelerators_are_lowered_without_the_host(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = PROGRAMS[name]()()
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "callback" not in text
        products = re.findall(r"stablehlo\.dot_general.*", text)
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    # The theory of these networks is of no matrix products; all others have some.
    assert products or name == "theory"


def test_a_callback_and_a_product_of_less_precision_would_be_seen():
    def program(x):
        jax.debug.print("{}", x[0, 0])
        return x @ x

    text = jax.jit(program).lower(jnp.eye(2)).as_text()
    assert "callback" in text
    assert "HIGHEST" not in text
