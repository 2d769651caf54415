"""A Keras model of 20 dense layers with RandomUniform(-0.05, 0.05): sick, said why, mended, trains.

python scripts/inspect/keras_model.py
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported

import jax
import jax.numpy as jnp
import keras

import gradflow

DEPTH, WIDTH = 20, 64


def make_model():
    small = keras.initializers.RandomUniform(-0.05, 0.05)
    stack = [
        keras.layers.Dense(WIDTH, activation="tanh", use_bias=False, kernel_initializer=small)
        for _ in range(DEPTH)
    ]
    return keras.Sequential([keras.Input((WIDTH,)), *stack])


def trained(model, x, y):
    """The loss at the start, and that after 100 steps."""
    model.compile(keras.optimizers.SGD(2.0), "mse")
    start = model.evaluate(x, y, verbose=0)
    model.fit(x, y, batch_size=len(x), epochs=100, verbose=0)
    return start, model.evaluate(x, y, verbose=0)


def main():
    x = jax.random.normal(jax.random.key(0), (16, WIDTH), jnp.float32)
    y = 0.5 * jnp.sign(x)
    keras.utils.set_random_seed(1)
    model = make_model()
    result = gradflow.inspect(model, x, networks=10)
    print(result.verdict.sentence)
    weights = gradflow.mended({v.path: v.value for v in model.trainable_variables}, result)
    start, sick = trained(model, x, y)
    for variable in model.trainable_variables:
        variable.assign(weights[variable.path])
    _, mended = trained(model, x, y)
    print(f"loss {start:.3f} at the start; trained {sick:.3f}, mended {mended:.3f}")
    return result, (start, sick, mended)


if __name__ == "__main__":
    main()
