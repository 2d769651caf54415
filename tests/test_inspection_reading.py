"""Programs that are read compute what the function computes, and know their layers by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.errors import InputError
from gradflow.inspection._reading import program as _reading
from gradflow.inspection._reading.layers import layers
from gradflow.inspection._reading.program import Program, label, read

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
W = jnp.linspace(-0.5, 0.7, 9).reshape(3, 3)
STACK = jnp.stack([W, W.T, 2 * W])


def values_of(program: Program, *arguments):
    """What the program returns for the arguments, pytrees in their order."""
    numbers = [n for group in program.arguments.values() for n in group]
    values = program.run(dict(zip(numbers, jax.tree.leaves(arguments), strict=True)))
    return [values[n] for n in program.outputs]


@jax.custom_vjp
def sign_with_slope(x):
    return jnp.sign(x)


sign_with_slope.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * (jnp.abs(x) < 1),))


def calls(p, x):
    return jax.jit(lambda x: jax.checkpoint(lambda y: jax.nn.gelu(y @ p))(x))(x)


def loop_over_weights(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), jnp.sum(c)), x, p)


def loop_backwards(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c[0]), x, p, reverse=True)


def loop_with_counter(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c @ p) * i, x)


def loop_of_loops(p, x):
    def inner(c, w):
        return jax.lax.scan(lambda c, t: (c * t + jnp.tanh(c @ w), None), c, jnp.arange(2.0))

    return jax.lax.scan(inner, x, p)


def known_branch(p, x):
    mask = jnp.tril(jnp.ones((4, 4)))
    return jax.lax.cond(mask[0, 1] > 0, lambda y: 3 * y, lambda y: mask @ y, x @ p)


def unknown_branch(p, x):
    return jax.lax.cond(jnp.sum(x) > 0, lambda y: 3 * y, jnp.sin, x @ p)


def unknown_length(p, x):
    return jax.lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: y @ p + 1, x)


def own_derivative(p, x):
    return sign_with_slope(jax.nn.relu(x @ p) - 0.1)


def mapped(p, x):
    return jax.vmap(lambda row: jax.nn.softmax(row @ p))(x)


def functions_of_elements(p, x):
    h = x @ p
    summed = jnp.zeros_like(h).at[jnp.array([1, 1, 0, 3])].add(h)
    product = jax.lax.reduce(h, jnp.ones((), h.dtype), lambda a, b: a * b, (0,))
    return jax.ops.segment_max(summed, jnp.array([0, 1, 0, 1]), 2), product


PROGRAMS = {
    f.__name__: (f, STACK if f in (loop_over_weights, loop_backwards, loop_of_loops) else W)
    for f in (calls, loop_over_weights, loop_backwards, loop_with_counter, loop_of_loops)
    + (known_branch, unknown_branch, unknown_length, own_derivative, mapped, functions_of_elements)
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_computes_what_its_function_computes(name):
    function, p = PROGRAMS[name]
    program = read(function, parameters=p, inputs=X)
    for got, expected in zip(
        values_of(program, p, X), jax.tree.leaves(function(p, X)), strict=True
    ):
        # Another compiled program: a few roundings of the numbers that are summed.
        rounding = 8 * np.finfo(np.float32).eps
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=rounding, atol=rounding * largest)
    names = {equation.primitive for equation in program.equations}
    assert not names & {"jit", "pjit", "scan", "checkpoint", "remat2", "closed_call"}


def test_a_programs_derivative_is_the_functions_own():
    program = read(own_derivative, parameters=W, inputs=X)
    got = jax.grad(lambda p: jnp.sum(values_of(program, p, X)[0]))(W)
    np.testing.assert_allclose(got, jax.grad(lambda p: jnp.sum(own_derivative(p, X)))(W))
    assert float(jnp.abs(got).max()) > 0  # that of `sign` is 0


def test_what_no_argument_changes_is_computed_once_and_what_no_output_needs_is_left_out():
    program = read(known_branch, parameters=W, inputs=X)
    assert {e.primitive for e in program.equations} == {"dot_general"}  # mask @ (x @ W), both

    def idle(p, x):
        jnp.linalg.norm(jnp.sin(x) @ p)
        return x + jnp.arange(3.0)[None]

    assert [e.primitive for e in read(idle, parameters=W, inputs=X).equations] == ["add"]


def test_equal_layers_have_equal_signatures_and_others_have_not():
    def network(p, x):
        for _ in range(3):
            x = jax.nn.relu(x @ p)
        return sign_with_slope(jnp.transpose(x) @ x)

    relus = [
        e.signature
        for e in read(network, parameters=W, inputs=X).equations
        if e.primitive.startswith("custom_")
    ]
    assert relus[0] == relus[1] == relus[2] != relus[3]
    assert "0x" not in str(relus)


def test_a_loop_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(_reading, "_MAX_EQUATIONS", 5)
    with pytest.raises(InputError, match="more than 5 equations, its loops unrolled; inspect it"):
        read(loop_with_counter, parameters=W, inputs=X)


def test_names_are_those_that_users_gave():
    assert label("jit(main)/Net/vmap(jvp(Dense_0))") == "main/Net/Dense_0"
    assert label("Net/pow(x/2)/transpose(jvp(Block))") == "Net/pow(x/2)/Block"


def named(p, x):
    with jax.named_scope("Net"):
        for i, layer in enumerate(p["layers"]):
            with jax.named_scope(f"Dense_{i}"):
                x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    return x


def unnamed(p, x):
    for layer in p["layers"]:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    return x


@pytest.mark.parametrize(
    ("function", "names"),
    [(named, ["Net/Dense_0", "Net/Dense_1"]), (unnamed, ["layers[0]", "layers[1]"])],
)
def test_layers_are_named_by_modules_or_by_their_weights(function, names):
    p = {"layers": [{"kernel": W, "bias": W[:1]}] * 2}
    program = read(function, parameters=p, inputs=X)
    found = layers(program)
    assert [layer.name for layer in found] == names
    for layer in found:
        assert (layer.kind, layer.units, layer.fan_in) == ("dense", (1,), 3)
        assert program.equations[layer.equation].outputs == (layer.product,)
        z = program.equations[program.producers()[layer.preactivation]]
        assert z.primitive == "add"
    assert found[1].signal == found[0].activation
    assert found[1].activation == program.outputs[0]
    assert [program.names[layer.parameter] for layer in found] == [
        "['layers'][0]['kernel']",
        "['layers'][1]['kernel']",
    ]


def test_a_loops_steps_are_layers():
    found = layers(read(loop_over_weights, parameters={"w": STACK}["w"], inputs=X))
    assert [layer.name for layer in found] == ["dense[0]", "dense[1]", "dense[2]"]


def test_axes_of_units_are_found_for_heads_images_and_tokens():
    def network(p, tokens):
        x = p["table"][tokens]  # (2, 5, 6)
        x = jnp.einsum("bti,iho->bhto", x, p["heads"])  # (2, 3, 5, 4)
        x = jnp.moveaxis(x, 2, 3).reshape(2, 12, 5)
        return jax.lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NCW", "WIO", "NWC")
        )

    p = {
        "table": jnp.ones((7, 6)),
        "heads": jnp.ones((6, 3, 4)),
        "kernel": jnp.ones((3, 12, 8)),
    }
    program = read(network, parameters=p, inputs=jnp.zeros((2, 5), int))
    embedding, heads, convolution = layers(program)
    assert (embedding.kind, embedding.units) == ("embedding", (2,))
    assert heads.fan_in == 6
    shape = program.avals[heads.preactivation].shape
    assert sorted(shape[axis] for axis in heads.units) == [3, 4]
    assert (convolution.kind, convolution.units, convolution.fan_in) == ("convolution", (2,), 36)


def test_phi_is_what_elementwise_functions_make_of_z_alone():
    def network(p, x):
        z = x @ p
        centred = z - jnp.mean(z, axis=1, keepdims=True)
        y = (x @ p.T) / jnp.sqrt(jnp.mean(z**2, axis=1, keepdims=True)) + centred
        return jnp.tanh(jax.nn.silu(y @ p) + 1) @ p

    first, second, third, last = layers(read(network, parameters=W, inputs=X))
    assert first.activation == first.preactivation  # z² is summed: a statistic, not a φ
    assert second.activation == second.preactivation
    assert third.activation == last.signal
    assert last.activation == last.preactivation
