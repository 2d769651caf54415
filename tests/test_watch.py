"""A record of the user's own training: what it holds, where it works, what it says."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow
from gradflow import InputError
from gradflow.inspection.watch import Record


def parameters(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 2)
    return {
        "first": {"w": jax.random.normal(keys[0], (3, 4), dtype), "b": jnp.zeros(4, dtype)},
        "last": {"w": jax.random.normal(keys[1], (4, 1), dtype)},
    }


def cost(p, x):
    h = jnp.tanh(x @ p["first"]["w"] + p["first"]["b"][None])
    return jnp.mean((h @ p["last"]["w"] - 1) ** 2)


X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
NAMES = ["['first']['b']", "['first']['w']", "['last']['w']"]


def train(optimiser, steps, p=None):
    """Parameters at each step, gradients, updates; and the last state."""
    p = parameters() if p is None else p
    state = optimiser.init(p)

    def step(carry, _):
        p, state = carry
        gradients = jax.grad(cost)(p, X.astype(p["last"]["w"].dtype))
        updates, state = optimiser.update(gradients, state, p)
        return (optax.apply_updates(p, updates), state), (p, gradients, updates)

    (_, state), history = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), None, steps))(p, state)
    return history, state


def log_norms(tree):
    """By path, NumPy's own norms in float64 along the first axis."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    rows = {path: np.asarray(leaf, np.float64).reshape(len(leaf), -1) for path, leaf in flat}
    with np.errstate(divide="ignore"):  # biases begin at 0
        return {
            jax.tree_util.keystr(path): np.log(np.linalg.norm(row, axis=1))
            for path, row in rows.items()
        }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_record_has_the_norms_of_each_leaf_at_every_kth_step(dtype):
    optimiser = gradflow.watch(optax.adam(0.01), every=3)
    history, state = train(optimiser, 10, parameters(dtype))
    plain, _ = train(optax.adam(0.01), 10, parameters(dtype))
    # Updates are the optimiser's own, but for the rounding of another compiled program.
    for ours, own in zip(jax.tree.leaves(history), jax.tree.leaves(plain), strict=True):
        ours, own, eps = np.asarray(ours, float), np.asarray(own, float), jnp.finfo(dtype).eps
        assert np.abs(ours - own).max() <= 4 * float(eps) * np.abs(own).max()
    dataset = Record.of(state).to_xarray()
    assert list(dataset.step.values) == [0, 3, 6, 9]
    assert list(dataset.parameter.values) == NAMES
    assert dataset.attrs == {"steps": 10, "every": 3, "stride": 3}
    for kind, tree in zip(("parameter", "gradient", "update"), history, strict=True):
        for name, expected in log_norms(tree).items():
            found = dataset[f"log_{kind}_norm"].sel(parameter=name)
            np.testing.assert_allclose(found, expected[::3], rtol=1e-5, atol=1e-6)
    ratio = np.exp(dataset.log_update_norm - dataset.log_parameter_norm)
    np.testing.assert_allclose(dataset.update_ratio, ratio)
    assert np.isinf(dataset.update_ratio.sel(parameter=NAMES[0], step=0))  # biases begin at 0
    assert not dataset.nonfinite.any()
    assert (dataset.first_nonfinite == -1).all()


def test_norms_are_right_to_the_ends_of_the_range():
    for size in (1.3e-38, 3e-30, 1.0, 2e37):
        record = Record.begin({"w": jnp.zeros(4)}, every=1)
        leaf = {"w": jnp.full(4, size, jnp.float32)}
        record = record.observe(leaf, leaf, leaf)
        np.testing.assert_allclose(record.log_norms[0], math.log(size) + math.log(2), rtol=2e-6)
    zero = {"w": jnp.zeros(4)}
    assert (record.observe(zero, zero, zero).log_norms[1] == -np.inf).all()


def test_a_full_record_drops_every_second_step_and_spans_all_of_the_training():
    """Against a list: what is kept are the multiples of the stride."""
    one = {"w": jnp.ones(1)}
    record = Record.begin(one, every=2)
    rows = record.log_norms.shape[0]

    @jax.jit
    def run(record, steps):
        def body(i, record):
            leaf = {"w": jnp.exp(i.astype(jnp.float32) / 100)[None]}
            return record.observe(one, leaf, one)

        return jax.lax.fori_loop(0, steps, body, record)

    for steps, stride in ((2 * rows - 2, 2), (2 * rows - 1, 4), (4 * rows, 8), (9 * rows, 16)):
        dataset = run(record, steps).to_xarray()
        assert dataset.attrs["stride"] == stride
        assert list(dataset.step.values) == list(range(0, steps, stride))
        np.testing.assert_allclose(
            dataset.log_gradient_norm[:, 0], dataset.step / 100, rtol=1e-5, atol=1e-6
        )


def test_a_record_is_at_most_a_megabyte_however_many_leaves():
    for count in (1, 100, 3000, 10_416):
        record = Record.begin([np.zeros(1, np.float32)] * count)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(record)) <= 1.05e6
        assert record.log_norms.shape[0] % 2 == 0


def test_vmap_gives_every_network_a_record_of_its_own():
    optimiser = gradflow.watch(optax.sgd(0.1), every=2)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), parameters())
    states = jax.vmap(optimiser.init)(several)

    @jax.jit
    @jax.vmap
    def step(p, state):
        return optimiser.update(jax.grad(cost)(p, X), state, p)[1]

    for _ in range(3):
        states = step(several, states)
    dataset = Record.of(states).to_xarray()
    assert dict(dataset.sizes) == {"network": 2, "step": 2, "parameter": 3}
    for i in range(2):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], several)
        (alone,) = log_norms(jax.tree.map(lambda g: g[None], jax.grad(cost)(p, X)))[NAMES[2]]
        np.testing.assert_allclose(dataset.log_gradient_norm[i, :, 2], alone, rtol=1e-5)


def test_sharded_weights_are_recorded_where_they_are():
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    p = {"w": jax.device_put(jnp.arange(4.0 * len(devices)) + 1, sharding)}
    record = jax.jit(Record.observe)(Record.begin(p), p, p, p)
    np.testing.assert_allclose(record.log_norms[0, 0], np.log(np.linalg.norm(np.asarray(p["w"]))))


@pytest.mark.parametrize(
    ("where", "seen"),
    [((slice(None), 2), 7), ((1, slice(None)), 7), ((1, 2), 10)],  # one entry: when recorded
)
def test_the_first_step_that_is_not_finite_is_said(where, seen):
    good = jax.tree.map(jnp.ones_like, parameters())
    record = Record.begin(good, every=10)
    bad = eqx.tree_at(lambda p: p["first"]["w"], good, good["first"]["w"].at[where].set(jnp.inf))
    for step in range(12):
        record = record.observe(good, bad if step >= 7 else good, good)
    dataset = record.to_xarray()
    assert list(dataset.first_nonfinite.values) == [-1, seen, -1]
    assert dataset.nonfinite.values.tolist() == [[False] * 3, [False, True, False]]
    assert record.sentences() == (
        f"The gradient of ['first']['w'] is not finite first at step {seen}.",
    )


def scaled(record, *factors):
    """A record after steps with the last weights' gradients times a factor each."""
    p = parameters()
    ones = jax.tree.map(jnp.ones_like, p)
    for factor in factors:
        record = record.observe(p, {**ones, "last": {"w": ones["last"]["w"] * factor}}, ones)
    return record


def test_a_gradient_that_leaves_the_start_is_said_with_its_step():
    begun = Record.begin(parameters(), every=1)
    assert scaled(begun, 1, 1e-2, 0.1).sentences() == ()
    assert scaled(begun, 1, 1e-5, 1, 1e-4, 2e-5).sentences() == (
        "The gradient of ['last']['w'] is below 1/1000 of the start's, since step 3: 2e-05 of it "
        "at step 4.",
    )
    (rose,) = scaled(begun, 1, 3e4).sentences()
    assert "above 1000 times the start's, since step 1: 3e+04" in rose
    assert len(scaled(begun, 1, 1e-2, 0.09).sentences(factor=10.0)) == 1
    (zero,) = scaled(begun, 0, 0).sentences()
    assert zero == "The gradient of ['last']['w'] is 0 at every recorded step."


class Inspected:
    """What an inspection found, its loss being e^2 times as large as that of the training."""

    log_gradient_norms = {f"['params']{name}": 2.0 + math.log(4) / 2 for name in NAMES}


def test_a_gradient_is_compared_with_what_an_inspection_found():
    p = {
        "first": {"w": jnp.ones(4), "b": jnp.ones(4)},
        "last": {"w": jnp.full(4, 1e-4)},
    }
    record = Record.begin(p, every=1).observe(p, p, p)
    assert record.sentences() == ()
    assert record.sentences(Inspected()) == (
        "The gradient of ['last']['w'] is below 1/1000 of what the inspection found at the start, "
        "since step 0: 0.0001 of it at step 0.",
    )


def test_gradients_that_all_fall_have_one_sentence():
    p = parameters()
    record = Record.begin(p, every=1)
    for factor in (1.0, 1e-4, 1e-6):
        record = record.observe(p, jax.tree.map(lambda leaf, f=factor: leaf * 0 + f, p), p)
    assert record.sentences() == (
        "All 3 gradients are below 1/1000 of the start's, since step 1: 1e-06 to 1e-06 of it at "
        "step 2.",
    )


def test_weights_that_grow_are_said():
    p = jax.tree.map(jnp.ones_like, parameters())
    larger = {**p, "last": {"w": p["last"]["w"] * 50}}
    record = Record.begin(p, every=1).observe(p, p, p).observe(larger, p, p)
    assert record.sentences() == ("['last']['w'] has 50 times the norm of the start at step 1.",)


def test_the_record_is_found_in_any_state():
    optimiser = optax.chain(optax.clip(1.0), gradflow.watch(optax.adam(1e-3)))
    state = optimiser.init(parameters())
    assert Record.of((state, 0)).names == tuple(NAMES)


def test_equinox_modules_are_pytrees():
    model = eqx.nn.MLP(3, 1, 4, 2, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_inexact_array)
    record = Record.begin(arrays)
    assert record.names[0] == ".layers[0].weight"
    assert (record.observe(arrays, arrays, arrays).log_norms[0, 0, :] != 0).all()
    # A model as a whole has functions among its leaves; they are left out.
    assert Record.begin(model).names == record.names


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda _: gradflow.watch("adam"), "optimiser is 'adam'; it is a GradientTransformation"),
        (lambda _: gradflow.watch(optax.sgd(1.0), every=0), "every is 0; it is a whole number"),
        (lambda _: Record.begin({"n": jnp.arange(3)}), "parameters has no array of floats"),
        (lambda _: Record.begin([np.zeros(1)] * 10_417), "has 10417 arrays of floats; it has at m"),
        (lambda p: Record.begin(p).observe(p, {}, p), r"gradients has no array of floats at \['fi"),
        (
            lambda p: Record.begin(p).observe(p, p, jax.tree.map(jnp.transpose, p)),
            r"updates has an array of shape \(4, 3\)",
        ),
        (lambda p: Record.of(optax.adam(1.0).init(p)), "state has 0 records"),
        (lambda p: Record.begin(p).sentences(factor=1.0), "factor is 1.0; it is a number above 1"),
        (lambda p: Record.begin(p).sentences(3), "inspection is 3; it is what gradflow.inspect"),
        (lambda _: Record.begin([np.ones(1)]).sentences(Inspected()), "has no gradient of"),
        (lambda p: jax.jit(lambda r: len(r.sentences()))(Record.begin(p)), "is being traced"),
        (
            lambda p: gradflow.watch(optax.sgd(1.0)).update(
                p, gradflow.watch(optax.sgd(1.0)).init(p)
            ),
            "parameters is None; a watched optimiser's update takes",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(parameters())
