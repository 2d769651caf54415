"""A Flax CNN of ten convolutions with normal(0.02): sick, said why, mended, trains.

python scripts/inspect/flax_cnn.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import gradflow

DEPTH, CHANNELS = 10, 8


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(DEPTH):
            small = nn.initializers.normal(0.02)
            x = jnp.tanh(nn.Conv(CHANNELS, (3, 3), use_bias=False, kernel_init=small)(x))
        return x.mean(axis=(1, 2))


def loss(variables, x, y):
    logits = CNN().apply(variables, x)
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=-1))


@jax.jit
def trained(variables, x, y):
    """The loss after 100 steps of gradient descent."""

    def step(_, variables):
        gradients = jax.grad(loss)(variables, x, y)
        return jax.tree.map(lambda w, g: w - 0.2 * g, variables, gradients)

    return loss(jax.lax.fori_loop(0, 100, step, variables), x, y)


def main():
    x = jax.random.normal(jax.random.key(0), (8, 5, 5, CHANNELS), jnp.float32)
    y = jax.nn.one_hot(jnp.arange(8), CHANNELS)
    variables = CNN().init(jax.random.key(1), x)
    result = gradflow.inspect(CNN(), x, networks=10)
    print(result.verdict.sentence)
    mended = {"params": gradflow.mended(variables["params"], result)}
    losses = [float(loss(variables, x, y))]
    losses += [float(trained(v, x, y)) for v in (variables, mended)]
    print(f"loss {losses[0]:.3f} at the start; trained {losses[1]:.3f}, mended {losses[2]:.3f}")
    return result, losses


if __name__ == "__main__":
    main()
