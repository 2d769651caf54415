"""Rules of structure: convolutions, pooling, units side by side, masks, noise, moved elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from gradflow import activations
from gradflow.gaussian import _batch
from gradflow.inspection._reading.layers import layers
from gradflow.inspection._reading.program import read
from gradflow.inspection._theory import forcing, gradients, large_batches, rules, walk
from gradflow.inspection._theory.sums import Product
from gradflow.inspection._theory.values import Known, Law, Signal, Unknown

WIDTH, NETWORKS = 64, 150
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
SERIES = RNG.normal(size=(2, 5, 4)).astype(np.float32)
TOKENS = np.array([[0, 1, 2, 1], [3, 1, 0, 0]], np.int32)
RELU = jax.nn.relu


def program_of(f, shapes, x):
    parameters = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in shapes]
    return read(
        lambda parameters, key, inputs: f(parameters, key, inputs),
        parameters=parameters,
        key=jax.random.key(0),
        inputs=jnp.asarray(x),
    )


def upwards(program, shapes, x):
    numbers = program.arguments["parameters"]
    laws = {n: Law(0.0, v, gaussian=True) for n, (_, v) in zip(numbers, shapes, strict=True)}
    return walk._upwards(program, laws, {"inputs": [np.asarray(x)]})


def theory(program, found, values):
    """Second moments of each layer's signals and gradients at its sites."""
    ends = [v.reason for v in values.values() if isinstance(v, Unknown)]
    assert not ends, ends[0]
    at, why = walk._downwards(program, found, values)
    assert not why
    out = []
    for layer in found:
        own = walk._own(values, layer)[0]
        up = np.diagonal(forcing.second_moments(values[layer.product].sum))
        down = np.exp(at[own].log_variance)
        out.append((up, down))
    return out


def sampled(program, found, shapes, x):
    """The same of random networks, each: (networks, sites) twice a layer."""

    def second(a, units):
        a = jnp.moveaxis(a, units, range(-len(units), 0))
        return jnp.mean(a**2, axis=tuple(range(-len(units), 0))).reshape(-1)

    def draw(key, shape):
        return jax.random.normal(key, shape, jnp.float32)

    def one(key):
        keys = jax.random.split(key, len(shapes) + 2)
        drawn = [draw(k, s) * v**0.5 for k, (s, v) in zip(keys, shapes, strict=False)]
        given = {
            **dict(zip(program.arguments["parameters"], drawn, strict=True)),
            program.arguments["key"][0]: keys[-1],
            program.arguments["inputs"][0]: x,
        }
        place = {layer.product: n for n, layer in enumerate(found)}

        def run(shifts):
            values, zs = {**program.constants, **given}, [None] * len(found)
            for equation in program.equations:
                outputs = equation.evaluate(*(values[i] for i in equation.inputs))
                for number, value in zip(equation.outputs, outputs, strict=True):
                    if number in place:
                        zs[place[number]] = value = value + shifts[place[number]]
                    values[number] = value
            return values[program.outputs[0]], zs

        zero = [jnp.zeros(program.avals[layer.product].shape, jnp.float32) for layer in found]
        out, pull, zs = jax.vjp(run, zero, has_aux=True)
        (by_z,) = pull(draw(keys[-2], out.shape))
        return [
            (second(z, layer.units), second(d, layer.units))
            for z, d, layer in zip(zs, by_z, found, strict=True)
        ]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), NETWORKS))


def conv(x, w, strides=(1, 1), padding="SAME", **more):
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **more
    )


def kernel(size, n_in, n_out):
    return (size, size, n_in, n_out), 1.5 / (size * size * n_in)


def dense(n_in, n_out):
    return (n_in, n_out), 1.5 / n_in


def strides_and_dilation(p, key, x):
    del key
    h = RELU(conv(x, p[0]))
    h = RELU(conv(h, p[1], (2, 2)))
    h = RELU(
        jax.lax.conv_transpose(h, p[2], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    return conv(h, p[3], rhs_dilation=(2, 2))


def residual_of_positions(p, key, x):
    del key
    h = conv(x, p[0])
    h = h + conv(jnp.tanh(conv(RELU(h), p[1])), p[2])
    h = RELU(conv(jnp.tanh(h) * jax.nn.sigmoid(conv(h, p[3])), p[4], (2, 2)))
    return h.mean((1, 2)) @ p[5]


def groups_of_channels(p, key, x):
    del key
    h = conv(RELU(conv(x, p[0])), p[1], feature_group_count=WIDTH)  # depthwise: not Gaussian
    return RELU(conv(RELU(conv(h, p[2])), p[3], feature_group_count=2)).mean((1, 2)) @ p[4]


def units_side_by_side(p, key, x):
    del key
    h = jnp.concatenate([RELU(conv(x, p[0])), jnp.tanh(conv(x, p[1]))], axis=-1)
    value, gate = jnp.split(conv(2 * h, p[2]), 2, axis=-1)
    return conv(value * jax.nn.sigmoid(gate), p[3])


def flattened_and_back(p, key, x):
    del key
    h = RELU(conv(x, p[0])).reshape(2, -1) @ p[1]
    return conv(RELU(h).reshape(2, 2, 2, WIDTH), p[2])


def dropped(p, key, x):
    h = jnp.tanh(x @ p[0])
    h = jnp.where(jax.random.bernoulli(key, 0.7, h.shape), h / 0.7, 0.0)
    return RELU(h @ p[1]) @ p[2]


def pooled_and_dropped(p, key, x):
    h = RELU(conv(x, p[0])).mean((1, 2))
    return jnp.where(jax.random.bernoulli(key, 0.7, h.shape), h / 0.7, 0.0) @ p[1]


def embedded(p, key, x):
    del key
    return RELU(p[0][x] @ p[1]).sum(1) @ p[2]


def moved_sites(p, key, x):
    del key
    h = jnp.tanh(x @ p[0])
    h = jnp.cumsum(jnp.concatenate([h, h[:, ::-1][:, :2]], axis=1), axis=1)
    h = jnp.where((jnp.arange(7) < 5)[None, :, None], h, h[:, :1])
    return RELU(h @ p[1])[:, 1:-1:2] @ p[2]


def tokens_mixed(p, key, x):
    del key
    h = jnp.swapaxes(x @ p[0], 1, 2)
    h = h + jax.nn.gelu(h @ p[1]) @ p[2]
    return jnp.swapaxes(h, 1, 2) @ p[3]


def numbers_beside_signals(p, key, x):
    del key
    h = x @ p[0] + CODES
    h = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-5) + CODES
    h = h + jnp.tanh(h @ p[1]) @ p[2]
    return jnp.tanh(h @ p[3])


def positions_averaged(p, key, x):
    del key
    h = RELU(conv(x, p[0]))
    h = jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return RELU(conv(h, p[1])).mean((1, 2)) @ p[2]


def over_the_batch(h):
    h = h - h.mean((0, 1, 2), keepdims=True)
    return h * jax.lax.rsqrt((h * h).mean((0, 1, 2), keepdims=True) + 1e-5)


def residual_behind_batch_norm(p, key, x):
    """As in a ResNet: what is normalised is added to what was, and rectified: drawn by theory."""
    del key
    h = RELU(over_the_batch(conv(x, p[0])))
    for w in p[1:3]:
        h = RELU(h + over_the_batch(conv(h, w)))
    return h.mean((1, 2)) @ p[3]


W = WIDTH
CODES = RNG.normal(size=(5, W)).astype(np.float32) + 0.5  # as of positions
PROGRAMS = {
    strides_and_dilation: (
        [kernel(3, 3, W), kernel(3, W, W), kernel(3, W, W), kernel(2, W, W)], IMAGES
    ),
    groups_of_channels: (
        [kernel(3, 3, W), kernel(3, 1, W), kernel(1, W, W), kernel(3, W // 2, W), dense(W, W)],
        IMAGES,
    ),
    units_side_by_side: (
        [kernel(3, 3, W), kernel(3, 3, W // 2), kernel(3, W + W // 2, 2 * W), kernel(1, W, W)],
        IMAGES,
    ),
    flattened_and_back: ([kernel(3, 3, W), dense(16 * W, 4 * W), kernel(2, W, W)], IMAGES),
    dropped: ([dense(4, W), dense(W, W), dense(W, W)], SERIES[0]),
    pooled_and_dropped: ([kernel(3, 3, W), dense(W, W)], IMAGES),
    embedded: ([((5, W), 1.0), dense(W, W), dense(W, W)], TOKENS),
    moved_sites: ([dense(4, W), dense(W, W), dense(W, W)], SERIES),
    numbers_beside_signals: (
        [dense(4, W), dense(W, W), dense(W, W), dense(W, W)], SERIES[0]
    ),
    positions_averaged: ([kernel(3, 3, W), kernel(3, W, W), dense(W, W)], IMAGES),
    residual_behind_batch_norm: (
        [kernel(3, 3, W), kernel(3, W, W), kernel(3, W, W), dense(W, W)], IMAGES
    ),
}  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
def test_signals_and_gradients_are_those_of_random_networks(f):
    """Second moments of z and of the gradient at each site, beside 150 networks of width 64.

    Null: the theory is right but for a share of 4/width. Each of at most 200 numbers is then within
    4.5 standard errors of that: a false alarm in 0.002 of all keys, and the keys are fixed.
    """
    shapes, x = PROGRAMS[f]
    program = program_of(f, shapes, x)
    found = layers(program)
    limits = theory(program, found, upwards(program, shapes, x))
    draws = sampled(program, found, shapes, x)
    for layer, limit, drawn in zip(found, limits, draws, strict=True):
        for expected, values in zip(limit, map(np.asarray, drawn), strict=True):
            error = values.std(axis=0) / NETWORKS**0.5
            off = abs(values.mean(axis=0) - expected) - 4 / WIDTH * expected
            assert (off <= 4.5 * error).all(), layer.name


@pytest.mark.medium
def test_a_product_over_sites_has_the_second_moments_of_random_networks():
    """As above; the layer's own units are the mixed sites, and sites here are inputs."""
    shapes = [dense(20, W), ((32, 40), 1 / 32), ((40, 32), 1 / 40), dense(W, W)]
    x = np.random.default_rng(1).normal(size=(2, 32, 20)).astype(np.float32)
    program = program_of(tokens_mixed, shapes, x)
    found = layers(program)
    values = upwards(program, shapes, x)
    at, why = walk._downwards(program, found, values)
    assert not why
    draws = sampled(program, found, shapes, x)
    for layer, (up, down) in zip(found, draws, strict=True):
        own = walk._own(values, layer)[0]
        both = (
            np.diagonal(own.covariance),
            np.exp(at[own].log_variance),
        )
        for expected, drawn in zip(both, (up, down), strict=True):
            mean = np.asarray(drawn).mean(axis=1)
            assert (
                abs(mean.mean() / expected.mean() - 1)
                < 4.5 * mean.std() / expected.mean() / (NETWORKS**0.5) + 4 / 32
            )


def predicted(f, shapes, x):
    program = program_of(f, shapes, x)
    found = layers(program)
    numbers = program.arguments["parameters"]
    laws = {n: Law(0.0, v, gaussian=True) for n, (_, v) in zip(numbers, shapes, strict=True)}
    return walk.predict(program, found, laws, [np.asarray(x)])


def tokens_averaged(p, key, x):
    del key
    h = jnp.swapaxes(x @ p[0], 1, 2)
    h = jnp.swapaxes(h + jax.nn.gelu(h @ p[1]) @ p[2], 1, 2)
    return jax.nn.gelu(h @ p[3]).mean(1) @ p[4]


@pytest.mark.medium
def test_what_pairs_of_mixed_tokens_tell_is_left_out():
    """Of gradients that pass a mean over tokens, and of what tokens have in common behind a mix.

    As if pairs were uncorrelated, the gradient of the fourth weights comes out 0.71 times that of
    100 networks of 32 tokens, 0.56 of 128 tokens, at any width; that at the first layer 0.87 times.
    """
    shapes = [dense(20, W), ((32, 40), 1 / 32), ((40, 32), 1 / 40), dense(W, W), dense(W, W)]
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 32, 20)).astype(np.float32)
    theory = predicted(tokens_averaged, shapes, x)
    known = {key: list(np.isfinite(value)) for key, value in theory.values.items()}
    assert known["log_q"] == [True] * 5
    assert known["log_gradient_variance"] == [False, False, True, True, True]
    assert known["log_weight_gradient_variance"] == [False, False, True, False, True]
    assert known["correlation"] == [True, False, False, False, False]
    assert "at which gradients are correlated" in theory.reasons[0]
    alike = 1 + 0.1 * rng.normal(size=(2, 32, 20)).astype(np.float32)
    theory = predicted(tokens_averaged, shapes, alike)
    assert "32 sites that are too much alike" in theory.ends
    assert np.isnan(theory.values["log_q"][1])


def gates_in_two_steps(p, key, x):
    del key
    h = x @ p[0]
    for _ in range(2):
        a, b = jnp.split(h @ p[1], 2, axis=1)
        h = 0.5 * h + jnp.tanh(a) + jnp.tanh(b)
    return h @ p[2]


def test_gradients_that_meet_through_the_same_weights_end_theory_below():
    shapes = [dense(4, W), dense(W, 2 * W), dense(W, W)]
    theory = predicted(gates_in_two_steps, shapes, SERIES[0])
    assert np.isfinite(theory.values["log_q"]).all()
    known = np.isfinite(theory.values["log_gradient_variance"])
    assert list(known) == [False, True, True, True]
    assert "through the same weights" in theory.reasons[0]


def test_gradients_that_fail_stop_nothing(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("of nothing")

    monkeypatch.setattr(Product, "down", broken)
    theory = predicted(dropped, *PROGRAMS[dropped])
    known = np.isfinite(theory.values["log_gradient_variance"])
    assert list(known) == [False, False, True]
    assert "ZeroDivisionError, of nothing" in theory.reasons[0]


@pytest.mark.medium
def test_the_largest_of_a_window_is_averaged_within_its_error():
    """Max pooling of four ReLUs: q of the next layer, beside 150 networks; null as above."""

    def f(p, key, x):
        del key
        h = RELU(conv(x, p[0]))
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        return conv(h, p[1])

    shapes = [kernel(3, 3, W), kernel(1, W, W)]
    x = IMAGES[:, :3, :3]
    program = program_of(f, shapes, x)
    found = layers(program)
    values = upwards(program, shapes, x)
    expected = np.diagonal(forcing.second_moments(values[found[1].product].sum))
    drawn = np.asarray(sampled(program, found, shapes, x)[1][0])
    error = drawn.std(axis=0) / NETWORKS**0.5
    assert (abs(drawn.mean(axis=0) - expected) < 4.5 * error).all()


LINEAR = {
    "pad": lambda h: jnp.pad(h, ((0, 0), (1, 2), (0, 0))),
    "slice": lambda h: h[:, 1:4:2],
    "dynamic slice": lambda h: jax.lax.dynamic_slice(h, (0, 2, 0), (2, 2, h.shape[2])),
    "take": lambda h: h[:, jnp.array([3, 0, 3])],
    "flip": lambda h: h[:, ::-1],
    "cumsum": lambda h: jnp.cumsum(h, axis=1),
    "reversed cumsum": lambda h: jax.lax.cumsum(h, axis=1, reverse=True),
    "side by side": lambda h: jnp.concatenate([h, 2 * h[:, :2]], axis=1),
    "stack": lambda h: jnp.stack([h[:, 0], h[:, 3]], axis=1),
    "scan": lambda h: jax.lax.scan(lambda c, x: (c + x, c), h[:, 0], jnp.swapaxes(h, 0, 1))[1],
    "mask": lambda h: jnp.where((jnp.arange(5) % 2 == 0)[None, :, None], h, 0.5 * h),
    "window": lambda h: jax.lax.reduce_window(
        h, 0.0, jax.lax.add, (1, 2, 1), (1, 2, 1), "SAME"
    ),
    "axes": lambda h: h.reshape(10, 1, -1).transpose(1, 0, 2)[0].reshape(5, 2, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_in_sites_is_exact(name):
    """M K Mᵀ, by the function itself on as many units as sites, which have the covariance K."""
    sites = SERIES.shape[0] * SERIES.shape[1]
    shapes = [((4, sites), 0.25)]
    program = program_of(lambda p, _, x: LINEAR[name](x @ p[0]), shapes, SERIES)
    value = upwards(program, shapes, SERIES)[program.outputs[0]]
    assert isinstance(value, Signal)
    rows = SERIES.reshape(sites, -1).astype(np.float64)
    k = rows @ rows.T / 4
    eigenvalues, vectors = np.linalg.eigh(k)
    units = vectors * np.sqrt(np.maximum(eigenvalues, 0))
    with jax.enable_x64(True):
        out = np.asarray(LINEAR[name](jnp.asarray(units.reshape(*SERIES.shape[:2], sites))))
    out = out.reshape(-1, sites)
    np.testing.assert_allclose(forcing.second_moments(value.sum), out @ out.T, atol=1e-12)


def test_random_numbers_keep_their_law_until_they_meet_a_signal():
    """A mask of Bernoulli(0.3): its mean and variance to 1e-4, the step between its values."""

    def f(p, key, x):
        return (x @ p[0]) * jax.random.bernoulli(key, 0.3, (5, 8)).astype(jnp.float32)

    shapes = [((4, 8), 1.0)]
    program = program_of(f, shapes, SERIES[0])
    value = upwards(program, shapes, SERIES[0])[program.outputs[0]]
    k = SERIES[0].astype(np.float64) @ SERIES[0].T.astype(np.float64)
    mask = np.full((5, 5), 0.09) + 0.21 * np.eye(5)
    np.testing.assert_allclose(forcing.second_moments(value.sum), mask * k, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda p, _, x: jnp.sort(x @ p[0], axis=-1), "no rule for `sort`"),
        (lambda p, _, x: jnp.cumsum(x @ p[0], axis=1), "`cumsum`, over units"),
        (lambda p, _, x: (x @ p[0]).max(1), "`reduce_max`, over units"),
        (
            lambda p, _, x: (x @ p[0] + jnp.concatenate([x, x], 1)) * jnp.arange(8.0)[None],
            "several arrays of numbers that differ between units",
        ),
        (
            lambda p, _, x: jnp.tanh(x @ p[0] + jnp.concatenate([x, x], 1)) @ p[0].T,
            "not Gaussian",
        ),
    ],
)
def test_theory_ends_where_there_is_no_rule(f, reason):
    shapes = [((4, 8), 1.0)]
    program = program_of(f, shapes, SERIES[0])
    value = upwards(program, shapes, SERIES[0])[program.outputs[0]]
    assert isinstance(value, Unknown)
    assert reason in value.reason
    assert not isinstance(value, Known)


def test_a_rule_that_fails_ends_the_theory_and_stops_nothing(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("of nothing")

    monkeypatch.setitem(rules.RULES, "tanh", broken)
    shapes = [((4, 8), 1.0)]
    program = program_of(lambda p, _, x: jnp.tanh(x @ p[0]), shapes, SERIES[0])
    value = upwards(program, shapes, SERIES[0])[program.outputs[0]]
    assert value.reason == (
        "theory ends at the model: `tanh`, whose rule fails: ZeroDivisionError, of nothing"
    )


@pytest.mark.medium
def test_gradients_of_few_pairs_of_sites_are_those_of_all_pairs(monkeypatch):
    shapes = [kernel(3, 3, WIDTH), *[kernel(3, WIDTH, WIDTH)] * 4, dense(WIDTH, 8)]
    program = program_of(residual_of_positions, shapes, IMAGES)
    found = layers(program)
    of_all = theory(program, found, upwards(program, shapes, IMAGES))
    monkeypatch.setattr(gradients, "_MANY", 1)
    monkeypatch.setattr(gradients, "_MOST", 1.0)
    values = upwards(program, shapes, IMAGES)
    of_few = theory(program, found, values)
    for few, every in zip(of_few, of_all, strict=True):
        np.testing.assert_allclose(few, every, rtol=1e-9)
    at, _ = walk._downwards(program, found, values)
    assert isinstance(at[walk._own(values, found[0])[0]].matrix, sparse.sparray)


@pytest.mark.medium
@pytest.mark.parametrize("length", [0.0, 0.3], ids=["independent", "alike"])
def test_a_large_batch_is_normalised_as_any_other(length):
    batch = 40
    place = np.linspace(0, 1, batch)
    smooth = np.exp(-(((place[:, None] - place) / (length or 1e-9)) ** 2)) + 1e-3 * np.eye(batch)
    rows = RNG.normal(size=(batch, 300))
    k = smooth + rows @ rows.T / 300
    gradient = (rows @ rows.T) ** 2
    with jax.enable_x64(True):
        whole = jnp.asarray(k)
        second, mean, _ = _batch.averages(activations.relu, whole, None)
        _, pull = jax.vjp(lambda s: _batch.averages(activations.relu, whole, s)[2], 0 * whole)
        below = np.asarray(pull(jnp.asarray(gradient))[0])
        found = large_batches.averages(activations.relu, k)
        np.testing.assert_allclose(found[0], second, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found[1], mean, rtol=1e-7)
        found = large_batches.pulled(activations.relu, k, gradient)
    np.testing.assert_allclose(found, (below + below.T) / 2, rtol=0, atol=1e-9 * abs(below).max())
