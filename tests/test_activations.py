"""Every activation in `activations.ALL`, found by introspection, obeys the same laws."""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations, gaussian
from gradflow.activations import ALL, Activation, custom, get, leaky_relu
from gradflow.errors import InputError

# Central differences of step h: h² truncation plus eps/h rounding, at h = 6e-6.
DIFFERENCE = 1e-8
# Ends of intervals are found by bisection to the last digits, then amplified by |φ''|⁻¹.
BISECTION = 1e-9
double = pytest.mark.usefixtures("x64_only")
each = pytest.mark.parametrize("phi", ALL, ids=lambda a: a.name)


def away_from_kinks(phi: Activation, low: float = -8, high: float = 8) -> np.ndarray:
    x = np.linspace(low, high, 97) + 0.013
    near = [np.abs(x - k) < 1e-3 for k in phi.kinks]
    return x[~np.any(near, axis=0)] if near else x


def difference(f, x: np.ndarray, h: float = 6e-6) -> np.ndarray:
    return np.asarray(f(jnp.asarray(x + h)) - f(jnp.asarray(x - h))) / (2 * h)


# Derivatives


@double
@each
def test_the_derivative_is_the_limit_of_differences(phi):
    x = away_from_kinks(phi)
    np.testing.assert_allclose(phi.derivative(x), difference(phi, x), atol=DIFFERENCE)


@double
@each
def test_the_second_derivative_is_the_limit_of_differences_of_the_first(phi):
    x = away_from_kinks(phi)
    np.testing.assert_allclose(
        phi.second_derivative(x), difference(phi.derivative, x), atol=DIFFERENCE
    )


@double
@each
def test_differences_across_a_kink_or_of_another_function_are_not_the_derivative(phi):
    x = away_from_kinks(phi)
    wrong = difference(lambda t: phi(t) + 1e-3 * jnp.sin(t), x)
    assert np.abs(phi.derivative(x) - wrong).max() > 100 * DIFFERENCE


@double
@each
def test_away_from_its_kinks_an_activation_is_smooth(phi):
    # A kink that is not declared would show as a second difference of order h, not h².
    grid = np.setdiff1d(np.arange(-64, 65) / 8, phi.kinks)
    h = 1e-4
    slopes = [np.asarray(phi.derivative(jnp.asarray(grid + s * h))) for s in (-1, 0, 1)]
    assert np.abs(slopes[0] - 2 * slopes[1] + slopes[2]).max() < 100 * h**2


def test_an_undeclared_kink_would_be_seen():
    slopes = [float(activations.hard_tanh.derivative(1.0 + s * 1e-4)) for s in (-1, 0, 1)]
    assert abs(slopes[0] - 2 * slopes[1] + slopes[2]) > 0.1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", [(0, 1)]),
        ("leaky_relu(0.2)", [(0, 0.8)]),
        ("hard_tanh", [(-1, 1), (1, -1)]),
        ("selu", [(0, 1.0507009873554804934 * (1 - 1.6732632423543772848))]),
        ("elu", []),
        ("softsign", []),
        ("tanh", []),
    ],
)
def test_jumps_of_the_slope_are_found_where_it_jumps_and_only_there(name, expected):
    np.testing.assert_allclose(
        np.reshape(get(name).slope_jumps, (-1, 2)), np.reshape(expected, (-1, 2)), rtol=1e-14
    )


@each
def test_homogeneity_is_declared_where_it_holds_and_only_there(phi):
    x = jnp.linspace(-3, 3, 13)
    holds = np.allclose(phi(3 * x), 3 * phi(x), atol=1e-12)
    assert holds == phi.homogeneous


@pytest.mark.parametrize("name", ["tanh", "logistic"])
def test_slopes_in_both_tails_keep_their_digits_in_float32(name):
    x = jnp.asarray([-25.0, 25.0], jnp.float32)
    scale = 2 if name == "tanh" else 1
    expected = scale**2 * np.exp(-25.0 * scale)
    np.testing.assert_allclose(get(name).derivative(x), [expected] * 2, rtol=1e-5)
    np.testing.assert_array_equal(jax.vmap(jax.grad(jnp.tanh))(x), 0)  # what JAX alone would give


@each
def test_values_and_derivatives_are_finite_and_keep_float32(phi):
    x = jnp.asarray([-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4], jnp.float32)
    for f in (phi, phi.derivative, phi.second_derivative):
        assert f(x).dtype == jnp.float32
        assert np.isfinite(f(x)).all()


# Saturation


@double
@each
def test_the_largest_slope_is_the_largest_of_a_fine_grid(phi):
    beside = np.asarray(phi.kinks).reshape(-1, 1) + [[-1e-12, 1e-12]]
    far = 2.0 ** np.arange(6, 21)  # a slope may approach its supremum as a power
    parts = [np.linspace(-40, 40, 400_001), beside.reshape(-1), far, -far]
    x = jnp.asarray(np.concatenate(parts))
    largest = float(jnp.abs(phi.derivative(x)).max())
    if phi is activations.squared_relu:  # its slope grows without limit
        largest = math.inf
    assert largest * (1 - 1e-12) <= phi.max_slope <= largest * (1 + 1e-8)


@double
@pytest.mark.parametrize(
    ("phi", "threshold"),
    [*((phi, 0.1) for phi in ALL), *((get(n), t) for n in ("gelu", "sin") for t in (1e-3, 0.7))],
    ids=lambda v: getattr(v, "name", v),
)
def test_intervals_hold_exactly_the_points_where_the_slope_is_small(phi, threshold):
    intervals = phi.saturated_intervals(threshold)
    x = np.linspace(-2000, 2000, 100_003)
    place = np.searchsorted(intervals.reshape(-1), x)
    at_an_end = np.searchsorted(intervals.reshape(-1), x + 1e-6) != place
    x, inside = x[~at_an_end], place[~at_an_end] % 2 == 1
    slope = np.abs(np.asarray(phi.derivative(x)))
    np.testing.assert_array_equal(inside, slope < phi.saturated_slope(threshold))
    if threshold == 0.1 and intervals.size:  # the same points are not right for another threshold
        two_slopes = np.unique(slope.round(12)).size == 2  # as of relu and hard_tanh
        assert two_slopes or (inside != (slope < phi.saturated_slope(1.3 * threshold))).any()


@pytest.mark.parametrize(
    ("name", "threshold", "expected"),
    [
        ("linear", 0.5, np.empty((0, 2))),
        ("relu", 0.5, [[-np.inf, 0]]),
        ("leaky_relu(0.2)", 0.1, np.empty((0, 2))),
        ("leaky_relu(0.2)", 0.3, [[-np.inf, 0]]),
        ("hard_tanh", 0.5, [[-np.inf, -1], [1, np.inf]]),
        ("elu", 0.01, [[-np.inf, math.log(0.01)]]),
        ("selu", 0.01, [[-np.inf, math.log(0.01)]]),
        ("softsign", 1e-6, [[-np.inf, -999], [999, np.inf]]),
        ("tanh", 0.01, [[-np.inf, -math.acosh(10)], [math.acosh(10), np.inf]]),
    ],
)
def test_intervals_have_their_exact_ends(name, threshold, expected):
    np.testing.assert_allclose(
        get(name).saturated_intervals(threshold), expected, rtol=BISECTION, atol=BISECTION
    )


def test_intervals_are_found_while_a_function_is_traced_and_without_float64():
    fresh = custom(lambda x: x / (1 + x**2))

    @jax.jit
    def ends(x):
        return x + jnp.asarray(fresh.saturated_intervals(0.1)[0, 1], x.dtype)

    with jax.enable_x64(False):
        value = ends(jnp.zeros((), jnp.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, fresh.saturated_intervals(0.1)[0, 1], rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, math.nan])
def test_a_threshold_that_is_no_fraction_is_refused(threshold):
    with pytest.raises(InputError, match="fraction"):
        activations.tanh.saturated_intervals(threshold)


# Names


@each
def test_an_activation_is_found_by_its_name_in_any_case(phi):
    assert get(phi.name) is phi
    assert get(phi.name.upper()) is phi
    assert get(phi) is phi


def test_all_holds_every_activation_of_the_module_once():
    inside = {a for a in vars(activations).values() if isinstance(a, Activation)}
    assert set(ALL) == inside | {leaky_relu()}
    assert len(ALL) == len({a.name for a in ALL}) == len(inside) + 1


# As people write them, in PyTorch, Keras and JAX, and the names that results print.
WRITTEN = {
    "swish": "silu",
    "SiLU": "silu",
    "sigmoid": "logistic",
    "identity": "linear",
    "ReLU6": "relu6",
    "HardTanh": "hard_tanh",
    "hard-sigmoid": "hard_sigmoid",
    "Hardswish": "hard_swish",
    "LogSigmoid": "log_sigmoid",
    "soft_sign": "softsign",
    "prelu": "leaky_relu(0.25)",
    "prelu(0.1)": "leaky_relu(0.1)",
    "LeakyReLU(0.2)": "leaky_relu(0.2)",
    "leaky_relu_0.2": "leaky_relu(0.2)",
    "elu_0.5": "elu(0.5)",
    "ELU(1)": "elu",
    "celu( 2 )": "celu(2)",
    "sin(30)": "sin(30)",
    "tanh(1.7159)": "tanh(1.7159)",
    "tanh(1.7159,2/3)": "tanh(1.7159, 0.6666666666666666)",
    "tanh(1, 1)": "tanh",
    "gelu(tanh)": "gelu_tanh",
    "quick_gelu": "silu(1.702)",
    "softplus(100)": "softplus(100)",
}


@pytest.mark.parametrize(("written", "name"), WRITTEN.items())
def test_names_are_read_as_people_write_them_and_print_names_that_are_read_back(written, name):
    assert get(written).name == name
    assert get(name) is get(written)


@pytest.mark.parametrize("family", activations._FAMILIES)
def test_parameters_by_default_make_the_activation_without_them(family):
    parameters = inspect.signature(activations._FAMILIES[family]).parameters
    defaults = [p.default for p in parameters.values()]
    assert get(f"{family}({','.join(map(str, defaults))})") is get(family)
    made, x = activations._FAMILIES[family](*defaults), jnp.linspace(-3, 3, 13)
    np.testing.assert_allclose(made(x), get(family)(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (jnp.tanh, "tanh"),
        (jnp.sin, "sin"),
        (jax.nn.relu, "relu"),
        (jax.nn.swish, "silu"),
        (jax.nn.sigmoid, "logistic"),
        (jax.nn.gelu, "gelu_tanh"),  # JAX's default
        (functools.partial(jax.nn.gelu, approximate=False), "gelu"),
        (jax.nn.leaky_relu, "leaky_relu(0.01)"),
        (jax.nn.hard_silu, "hard_swish"),
    ],
)
def test_functions_of_jax_are_the_activations_that_they_are(function, name):
    phi, x = get(function), jnp.linspace(-7, 7, 29)
    assert phi is get(name)
    np.testing.assert_allclose(phi(x), function(x), rtol=1e-6, atol=1e-6)


# E φ² and E φ'² at q = 0.7, by mpmath; E φ(u) φ(v) at variances 0.6, 1.4 and covariance 0.7, by
# Gauss-Legendre rules of 20 nodes between kinks, in NumPy. E sin 30u sin 30v is 1e-118.
AVERAGES = [
    ("relu6", 0.3499999999994895, 0.49999999999962874, 0.3659847618923137),
    ("hard_sigmoid", 0.2694321271027099, 0.027768439069312555, 0.2692245059645308),
    ("hard_swish", 0.215689799189029, 0.32747636328227864, 0.223860486046016),
    ("leaky_relu(0.25)", 0.371875, 0.53125, 0.3808665065044213),
    ("elu(0.5)", 0.37988825934521847, 0.547782576747139, 0.38153073829894035),
    ("celu(2)", 0.5431788527919531, 0.7857886348038412, 0.5259566204150812),
    ("squared_relu", 0.735, 1.4, 0.9044820741156712),
    ("snake(0.5)", 0.9139223025333764, 1.3767015180291968, 0.9243473478940976),
    ("snake(8)", 0.705859375, 1.5, 0.703906249999996),
    ("log_sigmoid", 0.7861485116810677, 0.28321784956513896, 0.8315877412619077),
    ("tanh(1.7159, 0.6667)", 0.5954831613473548, 0.8891645143021875, 0.5253808817124379),
    ("sin(30)", 0.5, 450.0, 0.0),
    ("silu(1.702)", 0.28030734240981114, 0.4277674957130201, 0.28948594218725526),
    ("softplus(5)", 0.358128737253301, 0.4122115741137871, 0.381808579314471),
]


@double
@pytest.mark.parametrize(("name", "phi2", "dphi2", "pair"), AVERAGES, ids=lambda v: str(v))
def test_averages_are_those_of_the_definition(name, phi2, dphi2, pair):
    phi = get(name)
    found = gaussian.some_moments(phi, ("phi2", "dphi2"), np.array(0.7))
    assert float(found["phi2"]) == pytest.approx(phi2, rel=1e-13)
    assert float(found["dphi2"]) == pytest.approx(dphi2, rel=1e-13)
    kernel = gaussian.kernel(phi, jnp.array([[0.6, 0.7], [0.7, 1.4]]))
    assert float(kernel[0, 1]) == pytest.approx(pair, rel=1e-13, abs=1e-15)


@double
@pytest.mark.parametrize(("name", "a", "b"), [("tanh(2, 10)", 2, 10), ("softplus(100)", 0.01, 100)])
def test_averages_of_a_steep_activation_are_those_of_a_large_variance(name, a, b):
    k = jnp.array([[0.6, 0.7], [0.7, 1.4]])
    steep, plain = get(name), get(name.partition("(")[0])
    found = (
        gaussian.derivative_kernel(steep, k),
        a**2 * b**2 * gaussian.derivative_kernel(plain, b**2 * k),
    )
    np.testing.assert_allclose(*found, rtol=1e-12)
    np.testing.assert_allclose(
        steep.saturated_intervals(0.1), plain.saturated_intervals(0.1) / b, rtol=1e-9
    )


def test_leaky_relu_has_a_default_slope():
    assert get("leaky_relu") is leaky_relu() is leaky_relu(0.01)
    assert float(get("leaky_relu(0.2)")(-1.0)) == pytest.approx(-0.2, rel=1e-6)
    assert get("leaky_relu_0.2") is get("leaky_relu(0.2)")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tanhh", "'tanhh'.*did you mean 'tanh'.*softsign"),
        ("swich", "did you mean 'swish'"),
        ("gelu(2)", "gelu has no parameters"),
        ("leaky_relu(0..1)", r"it is leaky_relu\(slope\), with a number"),
        ("elu(1, 2)", r"it is elu\(alpha\)"),
        ("tanh(1, 1, 1)", r"it is tanh\(a, b\)"),
        ("sin(nan)", r"it is sin\(omega\)"),
        ("celu(0)", "0.01 to 100"),
        ("sin(-30)", "0.01 to 100"),
        ("tanh(0)", "0.01 to 100"),
        ("sign", "slope is 0"),
        ("exponential", "leave a float's range"),
        ("softmax", "mixes units"),
        ("HardShrink", "jumps"),
        ("rrelu", "random"),
        ("Softshrink", "flat around 0"),
    ],
)
def test_what_is_no_activation_is_refused_in_one_sentence(value, message):
    with pytest.raises(InputError, match=message) as caught:
        get(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "function",
    [
        jnp.sum,
        jax.nn.softmax,
        lambda x: x - jnp.mean(x),
        lambda x: jnp.cumsum(jnp.atleast_1d(x)).reshape(jnp.shape(x)),
        lambda x: jnp.log(x),
        np.tanh,
    ],
)
def test_a_function_that_is_not_elementwise_finite_and_jax_is_refused(function):
    with pytest.raises(InputError, match="elementwise"):
        custom(function)


def test_a_callable_becomes_an_activation_of_its_name():
    square = get(jnp.square)
    assert square.name == "square"
    assert float(square.derivative(3.0)) == 6.0
    assert custom(jnp.abs, kinks=(0.0,), name="v").slope_jumps == ((0.0, 2.0),)


def test_activations_are_static_arguments_that_do_not_compile_again():
    traces = []

    @jax.jit
    def scaled(x):
        traces.append(x)
        return x

    f = jax.jit(lambda phi, x: phi(scaled(x)), static_argnums=0)
    for phi in (get("leaky_relu(0.2)"), leaky_relu(0.2), dataclasses.replace(leaky_relu(0.2))):
        f(phi, 1.0)
    assert len(traces) == 1
    assert custom(lambda x: x, name="a") != custom(lambda x: 2 * x, name="a")
