"""A model and a training loop of one's own: sick, said why, mended, trains.

python scripts/inspect/own_loop.py
"""

import jax
import jax.numpy as jnp

import gradflow

DEPTH, WIDTH = 20, 64


def init(key):
    keys = jax.random.split(key, DEPTH)
    return [jax.random.uniform(k, (WIDTH, WIDTH), minval=-0.05, maxval=0.05) for k in keys]


def apply(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def loss(weights, x, y):
    return jnp.mean((apply(weights, x) - y) ** 2)


@jax.jit
def trained(weights, x, y):
    """The loss after 100 steps of gradient descent."""

    def step(_, weights):
        gradients = jax.grad(loss)(weights, x, y)
        return [w - 2.0 * g for w, g in zip(weights, gradients, strict=True)]

    return loss(jax.lax.fori_loop(0, 100, step, weights), x, y)


def main():
    x = jax.random.normal(jax.random.key(0), (16, WIDTH), jnp.float32)
    y = 0.5 * jnp.sign(x)
    weights = init(jax.random.key(1))
    result = gradflow.inspect(init, apply, x, networks=10)
    print(result.verdict.sentence)
    mended = gradflow.mended(weights, result)
    losses = [
        float(loss(weights, x, y)),
        float(trained(weights, x, y)),
        float(trained(mended, x, y)),
    ]
    print(f"loss {losses[0]:.3f} at the start; trained {losses[1]:.3f}, mended {losses[2]:.3f}")
    return result, losses


if __name__ == "__main__":
    main()
