"""Measured statistics and gradients of models against plain scripts with taps, and at depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow
from gradflow.errors import InputError
from gradflow.inspection._measuring import segments as _segments
from gradflow.inspection._measuring.chunks import Chunks
from gradflow.inspection._measuring.measure import measure
from gradflow.inspection._reading.layers import layers
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.of_model import program_of

KEY = jax.random.key(7)
X = jax.random.normal(jax.random.key(1), (6, 5))


def normal(key, *shape, scale=1.0):
    return scale * jax.random.normal(key, shape) / shape[-2] ** 0.5


def model_of(init, apply):
    """A model of two plain functions without state; ``apply`` takes parameters and inputs."""

    def of_all(p, state, key, *inputs):
        del state, key
        return apply(p, *inputs)

    return Model("net", lambda key: (init(key), ()), of_all)


def measured(init, apply, *inputs, loss=None, networks=2, given=False, model=None):
    model = model or model_of(init, apply)
    program = program_of(model, inputs, loss=loss)
    parameters = [(init(KEY), ())] if given else []
    return measure(
        model, program, layers(program), inputs, KEY, networks=networks, parameters=parameters
    )


def log_mean_square(x):
    return np.log(np.mean(np.square(np.asarray(x, np.float64))))


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def against_taps(result, taps, weights, rows):
    """Compare with gradients at the pre-activations, and of each use of the weights."""
    gradients = [np.asarray(rows(g), np.float64) for g in taps]
    squares = [np.mean(g**2, axis=1) for g in gradients]
    norms = [np.mean(np.log(np.linalg.norm(g, axis=1))) for g in gradients]
    close(result.values["log_gradient_variance"][0], [np.log(s.mean()) for s in squares])
    close(result.values["log_gradient_norm"][0], norms)
    close(result.values["log_weight_gradient_variance"][0], [log_mean_square(w) for w in weights])
    return squares


def test_a_dense_net_has_the_statistics_of_a_plain_script():
    sizes = [5, 7, 9, 4]

    def init(key):
        keys = jax.random.split(key, 3)
        return [
            {"w": normal(k, a, b, scale=1.5), "b": normal(k, 1, b, scale=0.1)}
            for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def apply(p, x, taps=None, uses=None):
        zs = []
        for i, layer in enumerate(p):
            z = x @ (layer["w"] + (uses[i] if uses else 0)) + layer["b"] + (taps[i] if taps else 0)
            zs.append(z)
            x = jnp.tanh(z) if i < 2 else z
        return (x, zs) if taps else x

    def loss(y):
        return jnp.mean((y - 1) ** 2)

    p = init(KEY)
    taps, uses = [jnp.zeros((6, n)) for n in sizes[1:]], [jnp.zeros_like(q["w"]) for q in p]
    grads = jax.grad(lambda *a: loss(apply(a[2], X, *a[:2])[0]), (0, 1, 2))(taps, uses, p)
    zs = apply(p, X, taps, uses)[1]

    result = measured(init, apply, X, loss=loss, given=True)
    squares = against_taps(result, *grads[:2], rows=lambda g: g)
    chi = [np.mean(a / b) for a, b in zip(squares, squares[1:], strict=False)]
    close(result.values["chi"][0], [*chi, np.nan])
    close(result.values["log_q"][0], [log_mean_square(z) for z in zs])
    saturated = [np.mean(1 - np.tanh(z) ** 2 < 4 * 0.01 * 0.99) for z in zs[:2]]
    close(result.values["saturation"][0], [*saturated, 0])
    centred = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in map(np.asarray, zs)]
    pairs = np.triu_indices(6, 1)
    close(result.values["correlation"][0], [(u @ u.T)[pairs].mean() for u in centred])
    found = [leaf["log_gradient_mean_square"][0] for leaf in result.parameters.values()]
    close(found, [log_mean_square(g) for g in jax.tree.leaves(grads[2])])
    assert [layer.above for layer in result.layers] == [1, 2, None]
    assert result.born is None


@pytest.mark.medium
def test_random_dense_nets_have_the_statistics_of_simulate():
    """Means over 300 networks each lie within 4.2 standard errors, in 51 comparisons.

    Where both laws are one, one key in 700 has a larger one.
    """
    widths, networks = [6, 30, 30, 30, 20, 20], 300
    inputs = jax.random.normal(KEY, (4, 6))

    def init(key):
        keys = jax.random.split(key, 5)
        return [normal(k, a, b) for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)]

    def apply(p, x):
        for w in p[:-1]:
            x = jnp.tanh(x @ w)
        return x @ p[-1]

    network = gradflow.mlp(widths, "tanh", "lecun")
    theirs = gradflow.simulate(network, inputs, key=1, networks=networks, sampler="dense")
    ours = measured(init, apply, inputs, networks=networks)
    of_top = {"activation_mean", "log_activation_variance", "saturation", "chi"}  # φ is not there
    for statistic in theirs.statistics:
        value, estimate = ours.values[statistic.key], theirs[statistic.key]
        value = (np.exp(value) if statistic.log else value)[
            :, : 4 if statistic.key in of_top else 5
        ]
        error = np.hypot(value.std(0) / networks**0.5, estimate.standard_error[: value.shape[1]])
        z = (value.mean(0) - estimate.value[: value.shape[1]]) / np.maximum(error, 1e-12)
        assert np.abs(z).max() < 4.2, statistic.key


def test_a_residual_convolutional_net_has_the_gradients_of_taps():
    x = jax.random.normal(KEY, (2, 6, 6, 3))
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

    def init(key):
        keys = jax.random.split(key, 3)
        convs = [0.3 * jax.random.normal(k, (3, 3, 3, 3)) for k in keys[:2]]
        return [*convs, normal(keys[2], 3, 4)]

    def apply(p, x, taps=None, uses=None):
        taps, uses = taps or [0, 0, 0], uses or [0, 0, 0]
        z = conv(x, p[0] + uses[0]) + taps[0]
        h = z + jax.nn.gelu(conv(jax.nn.relu(z), p[1] + uses[1]) + taps[1])
        return jnp.mean(h, (1, 2)) @ (p[2] + uses[2]) + taps[2]

    u = jax.random.normal(KEY, (2, 4))

    def loss(y):
        return jnp.sum(u * y)

    p = init(KEY)
    taps = [jnp.zeros((2, 6, 6, 3)), jnp.zeros((2, 6, 6, 3)), jnp.zeros((2, 4))]
    uses = [jnp.zeros_like(w) for w in p]
    grads = jax.grad(lambda *a: loss(apply(p, x, *a)), (0, 1))(taps, uses)
    result = measured(init, apply, x, loss=loss, given=True)
    against_taps(result, *grads, rows=lambda g: g.reshape(-1, g.shape[-1]))
    assert result.sites == (72, 72, 2)
    assert [layer.above for layer in result.layers] == [None, None, None]


def gru(p, xs):
    def step(h, x):
        r = jax.nn.sigmoid(x @ p["xr"] + h @ p["hr"])
        u = jax.nn.sigmoid(x @ p["xu"] + h @ p["hu"])
        n = jnp.tanh(x @ p["xn"] + (r * h) @ p["hn"])
        h = (1 - u) * n + u * h
        return h, h

    return jax.lax.scan(step, jnp.zeros((6, 4)), xs)[1]


def init_gru(key):
    names = ("hn", "hr", "hu", "xn", "xr", "xu")
    keys = jax.random.split(key, 6)
    return {n: normal(k, 4 if n[0] == "h" else 5, 4) for n, k in zip(names, keys, strict=True)}


def stacked(loop):
    """A net of stacked weights: a scan over them, or over twice them, or a Python loop."""

    def apply(p, x):
        if loop == "python":
            for i in range(4):
                x = jnp.tanh(x @ p["w"][i])
            return x
        weights = 2 * p["w"] if loop == "of doubles" else p["w"]
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

    return lambda key: {"w": normal(key, 4, 5, 5)}, apply, X


@pytest.mark.parametrize(
    "net",
    [
        (init_gru, gru, jnp.stack([X, -X, 2 * X])),
        stacked("scan"),
        stacked("of doubles"),
        stacked("python"),
    ],
    ids=["gru", "scan", "scan of doubles", "python loop"],
)
def test_weights_of_loops_have_the_gradients_of_all_their_uses(net):
    init, apply, x = net

    def loss(y):
        return jnp.sum(jnp.sin(3 * y))

    grads = jax.grad(lambda p: loss(apply(p, x)))(init(KEY))
    result = measured(init, apply, x, loss=loss, given=True)
    found = [leaf["log_gradient_mean_square"][0] for leaf in result.parameters.values()]
    close(found, [log_mean_square(g) for g in jax.tree.leaves(grads)])


def deep_sigmoid(depth, width=12):
    def init(key):
        keys = jax.random.split(key, depth)
        return [normal(k, width, width).astype("float32") for k in keys]

    def apply(p, x):
        for w in p:
            x = jax.nn.sigmoid(x @ w)
        return x

    return init, apply, jax.random.normal(KEY, (4, width), "float32")


@pytest.mark.medium
def test_the_gradient_at_the_bottom_of_300_sigmoid_layers_is_that_of_float64():
    init, apply, x = deep_sigmoid(300)
    result = measured(init, apply, x, loss=lambda y: jnp.sum(y[:, :3]), given=True)
    weights = [np.asarray(w, np.float64) for w in init(KEY)]
    signals = [np.asarray(x, np.float64)]
    for w in weights:
        signals.append(1 / (1 + np.exp(-signals[-1] @ w)))
    delta, log = np.zeros((4, 12)), np.zeros(4)
    delta[:, :3] = 1
    for i in range(299, -1, -1):
        delta = delta * signals[i + 1] * (1 - signals[i + 1])
        size = np.linalg.norm(delta, axis=1)
        delta, log = delta / size[:, None], log + np.log(size)
        close(result.values["log_gradient_norm"][0, i], log.mean(), 1e-4)
        largest = log.max()
        use = signals[i].T @ (delta * np.exp(log - largest)[:, None])
        expected = log_mean_square(use) + 2 * largest
        close(result.values["log_weight_gradient_variance"][0, i], expected, 1e-4)
        delta = delta @ weights[i].T
    assert log.mean() < -400  # beyond float32


def test_equal_layers_are_one_program():
    def programs(depth):
        init, apply, x = deep_sigmoid(depth)
        program = program_of(model_of(init, apply), (x,))
        segments = _segments.cut(program, layers(program))
        return {_segments.stretch(program, s.equations, s.inputs).key for s in segments}

    assert programs(5) == programs(12)


@pytest.mark.parametrize("bottom", ["above", "below"])
def test_paths_side_by_side_have_scales_of_their_own(bottom):
    """One path's gradients leave float32's range, the other's do not."""

    def init(key):
        return {"small": normal(key, 40, 5, 5, scale=1e-3), "plain": normal(key, 40, 5, 5)}

    def apply(p, x):
        a = b = x
        for i in range(40):
            a, b = jnp.sin(a @ p["small"][i]), b @ p["plain"][i]
            a = a * 1e3  # signals keep their size: only slopes of the first are small
            a = jax.lax.stop_gradient(a) + 1e-3 * (a - jax.lax.stop_gradient(a))
        return (a, b) if bottom == "above" else (b, a)

    result = measured(init, apply, X, networks=1)
    logs = result.values["log_gradient_norm"][0]
    small = [i for i, layer in enumerate(result.layers) if "small" in layer.name]
    plain = [i for i, layer in enumerate(result.layers) if "plain" in layer.name]
    assert np.isfinite(logs).all()
    assert logs[small].min() < -200
    assert np.abs(logs[plain]).max() < 20


def test_sites_that_do_not_mix_have_scales_of_their_own():
    """Slopes of half the sites are 1e-3 at each of 40 layers, by a factor that their input says."""

    def init(key):
        return [normal(k, 5, 5).astype("float32") for k in jax.random.split(key, 40)]

    def apply(p, x):
        size = jnp.where(x[:, :1] > 0, 1.0, 1e-3).astype("float32")
        for w in p:
            z = x @ w
            x = size * z + jax.lax.stop_gradient(z - size * z)
        return x

    x = X.at[:, 0].set(jnp.array([1, -1, 1, -1, 1, -1])).astype("float32")
    result = measured(init, apply, x, loss=jnp.sum, given=True)
    weights = [np.asarray(w, np.float64) for w in init(KEY)]
    logs = np.log(np.where(np.asarray(x[:, :1]) > 0, 1.0, 1e-3)).ravel()
    delta = np.ones((6, 5))
    for i in range(39, -1, -1):
        expected = np.log(np.linalg.norm(delta, axis=1)) + (40 - i) * logs
        close(result.values["log_gradient_norm"][0, i], expected.mean(), 1e-4)
        delta = delta @ weights[i].T
    assert expected.min() < expected.max() - 200


def test_where_the_first_nan_comes_from_is_said():
    def init(key):
        return {"a": normal(key, 5, 8), "b": normal(key, 8, 3)}

    forward = measured(init, lambda p, x: jnp.sqrt(x @ p["a"]) @ p["b"], X).born
    assert (forward.primitive, forward.layer, forward.networks) == ("sqrt", "['a']", 2)
    assert str(forward) == "first NaN in `sqrt`, after ['a'], forward, in 2 networks"
    overflow = measured(init, lambda p, x: jnp.exp(9999 * jnp.abs(x @ p["a"])) @ p["b"], X).born
    assert (overflow.kind, overflow.primitive) == ("infinite number", "exp")

    def length_of_zeros(p, x):
        h = 0 * (x @ p["a"])
        return (h + jnp.sqrt(jnp.sum(h**2, -1, keepdims=True))) @ p["b"]

    backward = measured(init, length_of_zeros, X).born
    assert (backward.direction, backward.primitive) == ("backward", "sqrt")


@pytest.mark.parametrize("where", ["alone", "in a branch"])
def test_gradients_end_at_a_while_loop_and_the_rest_is_measured(where):
    def init(key):
        return {"a": normal(key, 5, 8), "b": normal(key, 8, 3)}

    def halved(h):
        return jax.lax.while_loop(lambda h: jnp.sum(h**2) > 1, lambda h: h / 2, h)

    def apply(p, x):
        h = x @ p["a"]
        if where == "alone":
            h = h + halved(h)
        else:
            h = h + jax.lax.cond(jnp.sum(h) > 0, halved, jnp.tanh, h)
        return h @ p["b"]

    result = measured(init, apply, X)
    assert "gradients end at the `while` loop" in result.ends
    assert np.isnan(result.values["log_gradient_norm"][:, 0]).all()  # the path around it is a part
    assert np.isfinite(result.values["log_gradient_norm"][:, 1]).all()
    assert np.isfinite(result.values["log_q"]).all()
    assert np.isnan(result.parameters["['a']"]["log_gradient_mean_square"]).all()


def test_embeddings_low_precision_several_inputs_and_integer_outputs():
    def init(key):
        return {"e": normal(key, 11, 8), "w": normal(key, 8, 4).astype(jnp.bfloat16)}

    def apply(p, i, x):
        h = jnp.take(p["e"], i, axis=0).astype(jnp.bfloat16) * x.astype(jnp.bfloat16)
        y = jax.nn.relu(h) @ p["w"]
        return jnp.argmax(y, -1), y

    inputs = jnp.arange(6), jax.random.normal(KEY, (6, 8))
    result = measured(init, apply, *inputs, networks=3)
    assert [layer.kind for layer in result.layers] == ["embedding", "dense"]
    assert all(np.isfinite(v[:, 0]).all() for k, v in result.values.items() if k != "chi")
    top = result.values["log_gradient_variance"][:, 1]
    assert np.abs(top).max() < 1.5  # of 24 numbers N(0, 1)
    weights = result.values["log_weight_gradient_variance"][:, 1]
    close(weights, np.log(1 / 2 / 11 / 6), 1.5)  # E h² / sites, as of a mean over 6 of them


def test_dropout_and_state_belong_to_each_network():
    def init(key):
        return {"w": normal(key, 5, 5)}, {"scale": jax.random.uniform(key)}

    def apply(p, s, key, x):
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        return (x * mask) @ (0 * p["w"] + 1) * s["scale"]

    model = Model("net", init, apply)
    result = measured(init, apply, X, networks=4, model=model)
    assert len(np.unique(result.values["log_q"])) == 4


ONE = {"w": jnp.ones((5, 5))}


@pytest.mark.parametrize(
    ("apply", "loss", "given", "words"),
    [
        (lambda p, x: p["w"] + x[:1], None, ONE, "net has no product of parameters with a signal"),
        (lambda p, x: x @ p["w"], lambda y: y[0], ONE, "loss returns an array of shape"),
        (lambda p, x: jnp.argmax(x @ p["w"], -1), None, ONE, "no floating-point array"),
        (lambda p, x: x @ p["w"], None, {"w": ONE["w"] * jnp.nan}, r"parameters\['w'\] has NaN"),
        (
            lambda p, x: jax.pure_callback(np.sin, X, x @ p["w"], vmap_method="expand_dims"),
            None,
            ONE,
            "no reverse derivative of `pure_callback` in net",
        ),
        (lambda p, x: jnp.sqrt(-(x**2) - 1) @ p["w"], None, ONE, "not finite from its first layer"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(apply, loss, given, words):
    def init(key):
        del key
        return given

    with pytest.raises(InputError, match=words):
        measured(init, apply, X, loss=loss, given=True)


def test_parameters_that_are_drawn_as_nan_are_named():
    def init(key):
        return {"w": normal(key, 5, 5), "v": jnp.sqrt(normal(key, 5, 5))}

    with pytest.raises(InputError, match=r"parameters\['v'\] that net draws are not all finite"):
        measured(init, lambda p, x: x @ p["w"] @ p["v"], X)


def test_convolutions_in_groups_are_walked_by_a_few_networks_at_once():
    """XLA's derivative by weights of 60 networks of 256 groups and 25 taps would take 47 GB."""

    def apply(p, _state, _key, x):
        names, groups = ("NHWC", "HWIO", "NHWC"), 256
        return jax.lax.conv_general_dilated(
            x, p, (1, 1), "SAME", dimension_numbers=names, feature_group_count=groups
        )

    model = Model("Depthwise", lambda key: (jax.random.normal(key, (5, 5, 1, 256)), ()), apply)
    x = jnp.ones((1, 6, 6, 256))
    program = program_of(model, (x,))
    chunks = Chunks(
        model, program, layers(program), (x,), jax.random.key(0), (), (),
        tuple(jax.devices()[:1]), 60, (),
    )  # fmt: skip
    assert 8 * 25 * (256 * chunks.size()) ** 2 < 1 << 30
