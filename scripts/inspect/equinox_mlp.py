"""An Equinox MLP of 60 layers with uniform(-0.05, 0.05): sick, said why, mended, trains.

python scripts/inspect/equinox_mlp.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import gradflow

DEPTH, WIDTH = 60, 32


class DeepMLP(eqx.Module):
    layers: list

    def __init__(self, key):
        def layer(key):
            made = eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=key)
            weight = jax.random.uniform(key, (WIDTH, WIDTH), minval=-0.05, maxval=0.05)
            return eqx.tree_at(lambda m: m.weight, made, weight)

        self.layers = [layer(k) for k in jax.random.split(key, DEPTH)]

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


@eqx.filter_jit
def trained(model, x, y):
    """The loss after 100 steps of gradient descent."""

    def step(_, model):
        gradients = eqx.filter_grad(loss)(model, x, y)
        return jax.tree.map(lambda w, g: w - 0.5 * g, model, gradients)

    return loss(jax.lax.fori_loop(0, 100, step, model), x, y)


def main():
    x = jax.random.normal(jax.random.key(0), (8, WIDTH), jnp.float32)
    y = 0.5 * jnp.sign(x)
    model = DeepMLP(jax.random.key(1))
    result = gradflow.inspect(DeepMLP, x, networks=10)
    print(result.verdict.sentence)
    mended = gradflow.mended(model, result)
    losses = [float(f(m, x, y)) for f, m in ((loss, model), (trained, model), (trained, mended))]
    print(f"loss {losses[0]:.3f} at the start; trained {losses[1]:.3f}, mended {losses[2]:.3f}")
    return result, losses


if __name__ == "__main__":
    main()
