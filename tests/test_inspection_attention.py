"""Theory of attention that is read: values of an independent table, whoever wrote the attention."""

import functools
import json
import math
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.inspection import _adapters, _inspecting
from gradflow.inspection._reading.layers import layers
from gradflow.inspection._reading.program import read
from gradflow.inspection._theory import walk
from gradflow.inspection._theory.values import Law

HEADS, KEYS, WIDTH = 4, 16, 64
# Second moments of two tokens, and of eight that are exchangeable.
TWO = np.array([[1.0, 0.3], [0.3, 1.0]])
EIGHT = 0.7 * np.eye(8) + 0.3


@functools.cache
def two_tokens(causal=False):
    """Row Σ = TWO, κ = 1 of the table."""
    table = json.loads((Path(__file__).parent / "reference" / "t12_attention.json").read_text())
    family = "two_tokens_causal" if causal else "two_tokens"
    wanted = {"S11": 1, "S22": 1, "S12": Fraction(3, 10), "kappa": 1}
    (row,) = (
        each["values"]
        for each in table["rows"]
        if each["inputs"]["family"] == family
        and all(Fraction(each["inputs"][name]) == value for name, value in wanted.items())
    )
    return {name: float(value) for name, value in row.items()}


def predicted(apply, second, shapes, variances=None):
    """The theory of a function of parameters and tokens of these second moments, one input."""
    parameters = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    tokens = np.linalg.cholesky(second) * math.sqrt(len(second))
    x = jnp.asarray(tokens[None], jnp.float32)
    program = read(apply, parameters=parameters, inputs=x)
    numbers = program.arguments["parameters"]
    variances = variances or [1 / (shape[0] if len(shape) < 3 else WIDTH) for shape in shapes]
    laws = {n: Law(0.0, v, gaussian=True) for n, v in zip(numbers, variances, strict=True)}
    found = walk.predict(program, layers(program), laws, [tokens[None]])
    assert found.ends is None
    assert not any(found.reasons), found.reasons
    return {key: np.exp(found.values[f"log_{key}"]) for key in ("q", "gradient_variance")} | {
        "correlation": found.values["correlation"]
    }


def shapes(tokens=2, keys=WIDTH):
    return [(tokens, WIDTH), (WIDTH, WIDTH), (WIDTH, keys), (WIDTH, keys), (WIDTH, WIDTH)]


def by_head(x, heads=HEADS):
    return x.reshape(*x.shape[:2], heads, KEYS)


def by_einsum(mask=lambda s: s, last=lambda o: o):
    """Attention by einsum, with what is done to its scores."""

    def apply(parameters, x):
        e, *three, o = parameters
        h = x @ e
        q, k, v = (by_head(h @ w) for w in three)
        scores = mask(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(KEYS))
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
        return last(out.reshape(h.shape) @ o)

    return apply


def by_hand(parameters, x):
    """Heads by `vmap`, a softmax that is written out, the scale at the keys."""
    e, *three, o = parameters
    h = x @ e

    def head(q, k, v):
        s = q @ (k / math.sqrt(KEYS)).T
        s = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
        return (s / jnp.sum(s, axis=-1, keepdims=True)) @ v

    q, k, v = (by_head(h @ w) for w in three)
    return jax.vmap(jax.vmap(head, 1, 1))(q, k, v).reshape(h.shape) @ o


def of_jax(parameters, x):
    e, *three, o = parameters
    h = x @ e
    q, k, v = (by_head(h @ w) for w in three)
    return jax.nn.dot_product_attention(q, k, v).reshape(h.shape) @ o


def packed(parameters, x):
    """Queries, keys and values of one product."""
    e, all_of, o = parameters
    h = x @ e
    q, k, v = (by_head(part) for part in jnp.split(h @ all_of, 3, axis=-1))
    return jax.nn.dot_product_attention(q, k, v).reshape(h.shape) @ o


def one_by_one(parameters, x):
    """Heads in a loop, each with a slice of the products."""
    e, *three, o = parameters
    h = x @ e
    products = [h @ w for w in three]
    outs = []
    for n in range(HEADS):
        q, k, v = (z[..., n * KEYS : (n + 1) * KEYS] for z in products)
        a = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / math.sqrt(KEYS), axis=-1)
        outs.append(a @ v)
    return jnp.concatenate(outs, axis=-1) @ o


@pytest.mark.medium
@pytest.mark.parametrize("apply", [by_einsum(), by_hand, of_jax, packed, one_by_one])
def test_two_tokens_have_the_values_of_the_table(apply):
    row = two_tokens()
    own = shapes() if apply is not packed else [(2, WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, WIDTH)]
    found = predicted(apply, TWO, own)
    assert found["q"][-1] == pytest.approx(row["S11"], rel=1e-9)
    assert found["correlation"][-1] == pytest.approx(row["S12"] / row["S11"], rel=1e-9)
    down = found["gradient_variance"]
    assert down[0] == pytest.approx(row["value_11"] + row["score_11"], rel=1e-7)
    if len(down) == 5:
        assert down[3] == pytest.approx(row["value_11"], rel=1e-9)


_SEEN = np.tril(np.ones((2, 2), bool))


@pytest.mark.medium
@pytest.mark.parametrize(
    "mask",
    [
        lambda s: jnp.where(_SEEN[None, None], s, -jnp.inf),
        lambda s: jnp.where(_SEEN[None, None], s, jnp.finfo(s.dtype).min),
        lambda s: s + jnp.where(_SEEN, 0.0, -1e9)[None, None],
    ],
    ids=["infinite", "smallest", "added"],
)
def test_a_causal_mask_is_one_however_it_is_written(mask):
    row = two_tokens(causal=True)
    found = predicted(by_einsum(mask), TWO, shapes())
    assert found["q"][-1] == pytest.approx((row["S11"] + row["S22"]) / 2, rel=1e-9)


@pytest.mark.slow
def test_tokens_that_are_alike_have_the_integrals():
    # TRANSFORMERS' one layer: P, C and R of 8 tokens at v = 0.7, by the one- and two-dimensional
    # integrals of an independent program.
    found = predicted(by_einsum(), EIGHT, shapes(8))
    assert found["q"][-1] == pytest.approx(0.4414, abs=5e-5)
    down = found["gradient_variance"]
    assert down[3] == pytest.approx(0.2020, abs=5e-5)
    assert down[0] == pytest.approx(0.2020 + 0.1564, abs=1e-4)


@pytest.mark.medium
def test_keys_that_heads_share_have_the_gradients_of_all_of_them():
    def grouped(parameters, x):
        e, wq, wk, wv, o = parameters
        h = x @ e
        k, v = (jnp.repeat(by_head(h @ w, HEADS // 2), 2, axis=2) for w in (wk, wv))
        return jax.nn.dot_product_attention(by_head(h @ wq), k, v).reshape(h.shape) @ o

    row, found = two_tokens(), predicted(grouped, TWO, shapes(keys=WIDTH // 2))
    assert found["q"][-1] == pytest.approx(row["S11"], rel=1e-9)
    down = found["gradient_variance"]
    assert down[2] == pytest.approx(2 * row["value_11"], rel=1e-9)
    assert down[0] == pytest.approx(row["value_11"] + row["score_11"], rel=1e-7)


def _turned(x):
    """Rotary positions, halves of the units turned by angles of theirs."""
    angles = np.outer(
        np.arange(x.shape[1]), 10000.0 ** -np.linspace(0, 1, KEYS * 2, endpoint=False)
    )
    cos, sin = (jnp.asarray(f(angles), x.dtype)[None, :, None] for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@pytest.mark.medium
def test_turned_tokens_that_are_the_same_have_scores_still():
    # Identical tokens, T = 8, d_k = 64: P = 0.141 where it would be 1/8 without positions. Values
    # are independent, so that q is P. Of 2048 heads P is known to 0.0005.
    def apply(parameters, x):
        e, own, wq, wk, wv, o = parameters
        h = jnp.broadcast_to((x @ e)[:, :1], (1, 8, WIDTH))
        q, k = (_turned((h @ w).reshape(1, 8, 1, 4 * KEYS)) for w in (wq, wk))
        v = (x @ own @ wv).reshape(1, 8, 1, WIDTH)
        return jax.nn.dot_product_attention(q, k, v).reshape(1, 8, WIDTH) @ o

    square = (WIDTH, WIDTH)
    found = predicted(apply, np.eye(8), [(8, WIDTH), (8, WIDTH), square, square, square, square])
    assert found["q"][-1] == pytest.approx(0.141, abs=3e-3)


@pytest.mark.medium
def test_a_table_read_out_by_its_transpose_has_the_rows_that_are_in_the_signal():
    rows, tokens = 24, np.array([[0, 1, 0, 5]])

    def apply(parameters, inputs):
        (table,) = parameters
        return (2 * table[inputs]) @ table.T

    program = read(
        apply, parameters=[jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)], inputs=tokens
    )
    laws = {program.arguments["parameters"][0]: Law(0.0, 1 / WIDTH, gaussian=True)}
    found = walk.predict(program, layers(program), laws, [tokens])
    assert not any(found.reasons)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, rows, WIDTH)) / math.sqrt(WIDTH)
    q = ((2 * x[:, tokens[0]] @ x.transpose(0, 2, 1)) ** 2).mean(axis=(1, 2))
    # Null: the theory, and 2/width of what the rows add; a false alarm in 10^5. Without them: 0.06.
    error = 4.4 * q.std() / math.sqrt(len(q)) + 2 / WIDTH * 4 / rows
    assert np.exp(found.values["log_q"][-1]) == pytest.approx(q.mean(), abs=error)


def _linen():
    import flax.linen as nn  # noqa: PLC0415

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(WIDTH, use_bias=False)(x)
            return nn.MultiHeadDotProductAttention(num_heads=HEADS)(h, h)

    return Attention()


def _equinox():
    import equinox as eqx  # noqa: PLC0415

    class Attention(eqx.Module):
        first: eqx.nn.Linear
        attention: eqx.nn.MultiheadAttention

        def __init__(self, key):
            one, two = jax.random.split(key)
            self.first = eqx.nn.Linear(8, WIDTH, use_bias=False, key=one)
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=two)

        def __call__(self, x):
            h = jax.vmap(self.first)(x)
            return self.attention(h, h, h)

    return Attention


@pytest.mark.medium
@pytest.mark.parametrize(("library", "make"), [("flax", _linen), ("equinox", _equinox)])
def test_attention_of_a_library_is_read_to_the_end(library, make):
    pytest.importorskip(library)
    x = (jax.random.normal(jax.random.key(0), (2, 5, 8)),)
    model = _adapters.adapt(make(), None, x, {})
    program = _inspecting._program(model, x, None, ())
    found = layers(program)
    _, theory = _inspecting._theory(model, program, found, x, (), jax.random.key(1), None)
    assert len(found) == 5
    assert theory.ends is None
    assert np.isfinite(theory.values["log_q"]).all()
    assert np.isfinite(theory.values["log_weight_gradient_variance"]).all()
