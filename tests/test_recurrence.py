"""Recurrence: the same weights at every time step, and gated units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import smallest_p_value

from gradflow import comparison, ensembles, networks
from gradflow.blocks import Chain, Dense, Drive, Dropout, Linear
from gradflow.comparison import Status
from gradflow.errors import InputError
from gradflow.networks import Stage
from gradflow.simulation import jacobians, memory, monte_carlo, propagation, samplers, threefry
from gradflow.theory import mean_field

# float32 arithmetic through a dozen steps, done in another order.
ROUNDING = 5e-4
INPUT, WIDTH, STEPS, SITES = 5, 8, 12, 3


def vanilla(**more):
    return networks.recurrent(INPUT, WIDTH, STEPS, "tanh", ensembles.fan_in(1.3), **more)


def unrolled(network, x, key):
    """Backpropagation through time by `jax.grad`, of the dense sampler's weights and inputs."""
    top_key, first_key, tied_key, *_ = jax.random.split(key, network.depth + 1)
    first = threefry.normal(first_key, (WIDTH, INPUT), x.dtype) / INPUT**0.5
    dense_key, drive_key = (jax.random.fold_in(tied_key, i) for i in range(2))
    weights_key, bias_key = jax.random.split(dense_key)
    dense = network.stages[1].block.parts[0]
    weights = dense.sigma_w * threefry.normal(weights_key, (WIDTH, WIDTH), x.dtype) / WIDTH**0.5
    bias = dense.sigma_b * jax.random.normal(bias_key, (1, WIDTH), x.dtype)
    top = jax.random.normal(top_key, (SITES, WIDTH), x.dtype)
    drive = network.stages[1].block.parts[1]

    def cost(weights, shifts):
        zs = [x @ first.T + shifts[0]]
        for step in range(STEPS):
            common, own = jax.random.split(jax.random.fold_in(drive_key, step))
            u = drive.alike**0.5 * jax.random.normal(common, (1, WIDTH), x.dtype)
            u += (1 - drive.alike) ** 0.5 * jax.random.normal(own, (SITES, WIDTH), x.dtype)
            zs.append(
                jnp.tanh(zs[-1]) @ weights[step].T + bias + drive.sigma_u * u + shifts[step + 1]
            )
        return jnp.sum(top * zs[-1]), zs

    # A copy of W at each step, whose gradients are the steps' contributions.
    copies = jnp.stack([weights] * STEPS)
    shifts = jnp.zeros((STEPS + 1, SITES, WIDTH), x.dtype)
    (by_step, deltas), zs = jax.grad(cost, argnums=(0, 1), has_aux=True)(copies, shifts)
    return zs, deltas, by_step / SITES


def test_statistics_are_those_of_backpropagation_through_time():
    network = vanilla(sigma_b=0.4, sigma_u=0.7, alike=0.3)
    x = jax.random.normal(jax.random.key(1), (SITES, INPUT), jnp.float32)
    found = propagation.propagate(network, x, jax.random.key(2))
    zs, deltas, by_step = unrolled(network, x, jax.random.key(2))
    expected = {
        "log_q": [jnp.log(jnp.mean(z**2)) for z in zs],
        "log_gradient_norm": [jnp.mean(jnp.log(jnp.linalg.norm(d, axis=1))) for d in deltas],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=ROUNDING, atol=ROUNDING, err_msg=name)
    squares = jnp.log(jnp.mean(by_step**2, axis=(1, 2)))
    np.testing.assert_allclose(
        found["log_weight_gradient_variance"][1:], squares, rtol=ROUNDING, atol=ROUNDING
    )
