"""Gaussian averages against 50-digit tables, closed forms, limits, and each other."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations, gaussian
from gradflow.activations import ALL, Activation, get
from gradflow.errors import InputError
from gradflow.gaussian import _pairs, _quadrature

# What is promised; what is measured is below 1e-12.
PROMISED = 1e-10
# A value that is a difference of numbers of order 1 has no relative accuracy; float64's eps.
ROUNDING = 1e-15
# float32's eps is 6e-8; sums over 900 nodes and exp of rounded arguments cost a factor of 30.
SINGLE = 2e-6
# Central differences of step 1e-5 relative: 1e-10 truncation, 1e-11 rounding, and q-dependence.
DIFFERENCE = 1e-8
SMALLEST_IN_DOUBLE = 1e-30
GRID = np.asarray([1e-8, 1e-4, 0.03, 0.7, 4.0, 50.0, 1e3, 1e4])

TABLES = Path(__file__).parent / "reference"
IN_TABLE = dict(
    zip(
        ("m1", "m2", "m4", "d1", "d2", "d4", "xf", "xffp", "ffpp", "f2d2", "dd2"),
        gaussian.Moments._fields,
        strict=True,
    )
)
each = pytest.mark.parametrize("phi", ALL, ids=lambda a: a.name)
# A quadrature over the plane takes a second to compile. These are like others that are not slow.
_LIKE_OTHERS = ("elu", "gelu_tanh", "silu", "softplus", "mish", "logistic", "leaky_relu(0.01)")
_LIKE_OTHERS += ("celu", "log_sigmoid", "hard_sigmoid", "hard_swish", "relu6")
_PARAMETERS = [
    pytest.param(a, marks=[pytest.mark.slow] * (a.name in _LIKE_OTHERS), id=a.name) for a in ALL
]
each_kernel = pytest.mark.parametrize("phi", _PARAMETERS)
each_closed_kernel = pytest.mark.parametrize(
    "phi", [p for p in _PARAMETERS if p.values[0].kernel is not None]
)
# Compiling a derivative of a quadrature takes a second: one of each kind of function.
some = pytest.mark.parametrize("name", ["relu", "hard_tanh", "softsign", "tanh"])


@pytest.fixture(autouse=True)
def _float64_or_float32(request):
    """Skip what has float64's tolerances where x64 is off; the tests about float32 stay."""
    if "float32" not in request.node.name:
        request.getfixturevalue("x64_only")


def rows(table: str) -> list[dict]:
    return json.loads((TABLES / f"{table}.json").read_text())["rows"]


def named(name: str) -> Activation:
    family, _, slope = name.rpartition("_")
    return get(f"leaky_relu({slope})" if family == "leaky_relu" else name)


def without_closed_forms(phi: Activation) -> Activation:
    if not phi.moments and phi.kernel is None:
        return phi
    return dataclasses.replace(
        phi,
        name=f"{phi.name} by quadrature",
        homogeneous=False,
        moments={},
        kernel=None,
        derivative_kernel=None,
    )


OSCILLATE = ("sin", "cos", "snake")


def resolved(phi: Activation) -> np.ndarray:
    """Return which of GRID quadrature can follow φ at: not where it oscillates within √q."""
    largest = 10 if phi.name in OSCILLATE else np.inf
    return largest > GRID


# Those of other activations, by the script that the table describes.
MOMENTS = rows("t1_moments") + rows("t1_more_moments")
IN_TABLES = np.asarray(sorted({float(r["inputs"]["q"]) for r in MOMENTS}))


@functools.cache
def moments_at(phi: Activation, slightly_off: bool = False) -> list[gaussian.Moments]:
    """Return the moments at GRID, at the table's q, and at 0, compiled once."""
    factor = 1.001 if slightly_off else 1.0
    found = gaussian.moments(phi, np.concatenate([GRID, IN_TABLES, [0.0]]) * factor)
    at = np.cumsum([GRID.size, IN_TABLES.size])
    return [gaussian.Moments(*part) for part in np.split(np.asarray(found), at, axis=1)]


def pair(q_a: float, q_b: float, c: float) -> np.ndarray:
    k = c * math.sqrt(q_a * q_b)
    return np.asarray([[q_a, k], [k, q_b]])


REPLICAS = [(q, q, 1.0) for q in (1e-6, 0.5, 40.0)]
EDGES = [(0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (2.0, 2.0, -1.0), (1.0, 3.0, 1.0)]
GENERAL = (0.6, 1.4, 0.7)
PAIRS = [*REPLICAS, *EDGES, GENERAL, (0.2, 6.0, 0.0), (0.2, 6.0, 0.5)]
STEP = 1e-5
DIRECTIONS = np.asarray([[[1.0, 0], [0, 0]], [[0, 0], [0, 1.0]], [[0, 1.0], [1.0, 0]]])


@functools.cache
def kernels_at(phi: Activation) -> dict[str, dict]:
    """Return kernels, derivative kernels and Jacobians at PAIRS, compiled once."""
    near = [pair(*GENERAL) + s * STEP * d for d in DIRECTIONS for s in (-1, 1)]
    k = jnp.asarray(np.stack([pair(*p) for p in PAIRS] + near))
    f, df = (functools.partial(g, phi) for g in (gaussian.kernel, gaussian.derivative_kernel))
    basis = jnp.eye(4).reshape(4, 2, 2)

    @jax.jit
    @jax.vmap
    def all_at(k):
        value, jacobian = jax.vmap(lambda t: jax.jvp(f, (k,), (t,)), out_axes=(None, -1))(basis)
        return value, df(k), jacobian.reshape(2, 2, 2, 2)

    found = [np.asarray(v) for v in all_at(k)]
    near = found[0][len(PAIRS) :]
    return {
        **{
            key: dict(zip(PAIRS, v, strict=False))
            for key, v in zip(("kernel", "slope", "jacobian"), found, strict=True)
        },
        "near": (near[1::2] - near[::2]) / (2 * STEP),
    }


def along(jacobian: np.ndarray, direction: np.ndarray) -> np.ndarray:
    return np.einsum("abcd,cd->ab", jacobian, direction)


# Moments of one pre-activation


@pytest.mark.parametrize("name", dict.fromkeys(r["inputs"]["activation"] for r in MOMENTS))
def test_moments_are_those_of_the_table(name):
    mine = {float(r["inputs"]["q"]): r for r in MOMENTS if r["inputs"]["activation"] == name}
    _, found, _ = moments_at(named(name))
    _, wrong, _ = moments_at(named(name), slightly_off=True)
    for key, moment in IN_TABLE.items():
        values = [mine[q]["values"][key] for q in IN_TABLES]
        truth = np.asarray([math.inf if v is None else float(v) for v in values])
        # selu's mean at q = 1 is 0 by design, and 6e-51 in the table.
        truth = np.where(np.abs(truth) < SMALLEST_IN_DOUBLE, 0, truth)
        error = np.abs(getattr(found, moment)[np.isfinite(truth)] - truth[np.isfinite(truth)])
        assert (np.isinf(getattr(found, moment)) == np.isinf(truth)).all()
        truth = truth[np.isfinite(truth)]
        assert (error <= np.where(truth == 0, ROUNDING, PROMISED * np.abs(truth))).all(), key
        if key in ("m2", "xffp"):  # a table that cannot tell q from 1.001 q would prove nothing
            assert not np.allclose(getattr(wrong, moment), truth, rtol=PROMISED, atol=0)


def test_the_table_holds_every_activation():
    assert {named(r["inputs"]["activation"]) for r in MOMENTS} >= set(ALL)


@pytest.mark.parametrize("phi", [a for a in ALL if a.moments], ids=lambda a: a.name)
def test_closed_forms_of_moments_agree_with_quadrature(phi):
    use = resolved(phi)
    found, quadrature = moments_at(phi)[0], moments_at(without_closed_forms(phi))[0]
    for name in phi.moments.keys() - {"variance"}:
        np.testing.assert_allclose(
            getattr(found, name)[use], getattr(quadrature, name)[use], rtol=PROMISED, err_msg=name
        )


def test_a_wrong_closed_form_would_be_seen():
    wrong = dataclasses.replace(activations.erf, moments={"phi2": lambda q: 1.0001 * q / (1 + q)})
    right = moments_at(without_closed_forms(activations.erf))[0].phi2
    assert (np.abs(gaussian.moment(wrong, "phi2", GRID) / right - 1) > 1e4 * PROMISED).all()


@each
def test_moments_obey_integration_by_parts(phi):
    # E[xφ] = q E[φ'] and E[xφφ'] = q (E[φ'²] + E[φφ'']), the delta functions of φ'' included.
    use = resolved(phi)
    m = gaussian.Moments(*(v[use] for v in moments_at(without_closed_forms(phi))[0]))
    q = GRID[use]
    np.testing.assert_allclose(m.x_phi, q * m.dphi, rtol=PROMISED, atol=ROUNDING)
    size = q * m.dphi2  # the two parts cancel at large q
    parts = 1 + m.phi_ddphi / m.dphi2
    np.testing.assert_allclose(m.x_phi_dphi / size, parts, atol=PROMISED)
    if phi.name == "hard_tanh":
        no_deltas = 1 + 0 * q  # φ'' is 0 but for its delta functions
        assert (np.abs(m.x_phi_dphi / size - no_deltas) > 0.1)[3:].all()


@pytest.mark.parametrize(
    "name", ["linear", "relu", "leaky_relu(0.2)", "sin", "cos", "tanh", "mish"]
)
def test_variance_is_second_moment_minus_squared_mean_where_that_does_not_cancel(name):
    m = gaussian.moments(get(name), 2.0)
    truth = m.phi2 - m.phi**2
    np.testing.assert_allclose(gaussian.moment(get(name), "variance", 2.0), truth, rtol=PROMISED)


def test_the_variance_of_a_function_with_an_offset_keeps_its_digits():
    # softplus at small q: φ = log 2 + x/2 + x²/8, so the variance is q/4 + q²/32.
    q = 1e-10
    near = pytest.approx(q / 4, rel=1e-9, abs=0)
    assert float(gaussian.moment(activations.softplus, "variance", q)) == near
    second, first = (gaussian.moment(activations.softplus, n, q) for n in ("phi2", "phi"))
    assert float(second - first**2) != near


@each
def test_moments_at_zero_variance_are_finite_values_at_zero(phi):
    m = gaussian.Moments(*(v[0] for v in moments_at(phi)[2]))
    for name in ("phi", "phi2", "phi4", "x_phi", "x_phi_dphi"):
        power = {"phi": 1, "phi2": 2, "phi4": 4}.get(name)
        truth = float(phi(0.0)) ** power if power else 0.0
        np.testing.assert_allclose(getattr(m, name), truth, rtol=4 * ROUNDING, atol=ROUNDING)
    sides = np.asarray([phi.derivative(s * 1e-9) for s in (-1, 1)])
    np.testing.assert_allclose(m.dphi2, np.mean(sides**2), rtol=1e-7, atol=ROUNDING)
    assert not np.isnan(m).any()


@some
def test_moments_are_differentiable_in_q(name):
    # d/dq E[φ²] = E[xφφ']/q, also where φ² has a kink; d/dq E[φ'²] by differences, with its jumps.
    phi, q = get(name), jnp.asarray([0.05, 0.7, 4.0])
    length, chi, along_x = (
        functools.partial(gaussian.moment, phi, n) for n in ("phi2", "dphi2", "x_phi_dphi")
    )
    for_length, for_chi = jax.jit(
        jax.vmap(lambda v: (jax.grad(length)(v), jax.grad(chi)(v))),
    )(q)
    np.testing.assert_allclose(for_length, along_x(q) / q, rtol=PROMISED, atol=ROUNDING)
    h = 1e-5 * q
    limit = (chi(q + h) - chi(q - h)) / (2 * h)
    np.testing.assert_allclose(for_chi, limit, rtol=1e-7, atol=DIFFERENCE)


def test_differentiating_the_nodes_instead_of_the_density_would_miss_the_jumps():
    def moving(q):
        z = jnp.linspace(-9, 9, 4001)
        weight = jnp.exp(-(z**2) / 2) / jnp.sum(jnp.exp(-(z**2) / 2))
        return activations.hard_tanh.derivative(jnp.sqrt(q) * z) ** 2 @ weight

    assert float(jax.grad(moving)(1.0)) == 0
    slope = jax.grad(lambda q: gaussian.moment(activations.hard_tanh, "dphi2", q))(1.0)
    assert float(slope) == pytest.approx(-math.exp(-0.5) / math.sqrt(2 * math.pi), rel=1e-12)


def test_expectations_are_twice_differentiable_across_a_kink():
    def absolute(q):
        return gaussian.expectation(jnp.abs, q)

    q, scale = 0.8, math.sqrt(2 / math.pi)
    first = jax.grad(absolute)
    for f, expected in [
        (absolute, scale * q**0.5),
        (first, scale / 2 * q**-0.5),
        (jax.grad(first), -scale / 4 * q**-1.5),
    ]:
        assert float(jax.jit(f)(q)) == pytest.approx(expected, rel=PROMISED)


def test_the_probability_of_a_half_line_has_its_derivatives():
    def above_one(q):
        return gaussian.expectation(lambda x: (x > 1).astype(x.dtype), q, kinks=(1.0,))

    def exact(q):
        return jax.scipy.special.erfc(jax.lax.rsqrt(2 * q)) / 2

    for f, g in [(above_one, exact), (jax.grad(above_one), jax.grad(exact))]:
        assert float(f(0.8)) == pytest.approx(float(g(0.8)), rel=PROMISED)
    second = jax.grad(jax.grad(above_one))(0.8)
    assert float(second) == pytest.approx(float(jax.grad(jax.grad(exact))(0.8)), rel=PROMISED)
    no_kink = gaussian.expectation(lambda x: (x > 1.1).astype(x.dtype), 0.8)
    assert float(no_kink) != pytest.approx(float(exact(0.8 / 1.21)), rel=1e-4)


def test_parameters_in_the_function_are_differentiated_through_it():
    slope = jax.grad(lambda a: gaussian.expectation(lambda x: jnp.exp(-a * x**2), 1.0))(0.5)
    assert float(slope) == pytest.approx(-(2.0**-1.5), rel=PROMISED)


def test_several_functions_are_averaged_in_one_pass_for_many_variances():
    q = jnp.asarray([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]])
    found = gaussian.expectation(lambda x: jnp.stack([x**2, x**4]), q)
    np.testing.assert_allclose(found, jnp.stack([q, 3 * q**2]), rtol=1e-14)


@pytest.mark.parametrize(
    ("f", "kinks", "q", "exact"),
    [
        (jnp.abs, (), 3.0, math.sqrt(6 / math.pi)),
        (lambda x: jnp.cos(x), (), 20.0, math.exp(-10)),
        (lambda x: jnp.cos(x), (), 400.0, math.exp(-200)),  # not resolved, and said to be
        (lambda x: (x > 0.3) * 1.0, (), 1.0, math.erfc(0.3 / math.sqrt(2)) / 2),  # kink not given
        (lambda x: (x > 0.3) * 1.0, (0.3,), 1.0, math.erfc(0.3 / math.sqrt(2)) / 2),
        (lambda x: jnp.exp(-(x**2)), (), 1e4, 1 / math.sqrt(1 + 2e4)),
    ],
)
def test_the_error_estimate_bounds_the_error(f, kinks, q, exact):
    value, error = gaussian.expectation_with_error(f, q, kinks=kinks)
    assert abs(float(value) - exact) <= float(error)
    if kinks or q < 5:
        assert float(error) < 0.1 * abs(float(value))


def test_the_error_estimate_is_small_where_the_rule_converges():
    value, error = gaussian.expectation_with_error(lambda x: jnp.tanh(x) ** 2, GRID)
    assert (error <= PROMISED * value).all()


@pytest.mark.parametrize("deviation", [1e-3, 0.7, 40.0])
@pytest.mark.parametrize("mean", [-2.5, 0.0, 0.001, 3.0])
def test_shifted_expectations_and_their_derivatives_follow_a_kink(mean, deviation):
    """E max(x, 0) = m P(x > 0) + s² p(0); by m it is P(x > 0), and by m again p(0)."""
    m, s = jnp.asarray(mean), jnp.asarray(deviation)
    density = math.exp(-((mean / deviation) ** 2) / 2) / math.sqrt(2 * math.pi)
    above = math.erfc(-mean / deviation / math.sqrt(2)) / 2
    exact = mean * above + deviation * density

    def average(f):
        return lambda m: _quadrature.shifted_expectation(f, m, s, kinks=(0.0,))

    scale = abs(mean) + deviation
    np.testing.assert_allclose(average(jax.nn.relu)(m), exact, rtol=1e-13, atol=1e-15 * scale)
    np.testing.assert_allclose(jax.grad(average(jax.nn.relu))(m), above, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(
        jax.grad(average(lambda x: (x > 0).astype(x.dtype)))(m),
        density / deviation,
        rtol=1e-12,
        atol=1e-15 / deviation,
    )


@some
@pytest.mark.parametrize("q", [0.03, 4.0, 1e3])
def test_a_shifted_expectation_without_shift_is_an_expectation(name, q):
    phi = get(name)
    found = _quadrature.shifted_expectation(
        lambda x: phi(x) ** 2, jnp.asarray(0.0), jnp.sqrt(q), kinks=phi.kinks
    )
    np.testing.assert_allclose(found, gaussian.moment(phi, "phi2", q), rtol=1e-13)


@pytest.mark.parametrize("name", ["hard_tanh", "selu", "cos"])
def test_float32_in_gives_float32_out(name):
    phi = get(name)
    q = np.asarray([1e-6, 0.1, 1.0, 100.0], np.float32)
    m = gaussian.moments(phi, q)
    with jax.enable_x64(True):
        exact = gaussian.moments(phi, q.astype(float))
    for field, value in m._asdict().items():
        assert value.dtype == jnp.float32, field
        np.testing.assert_allclose(value, getattr(exact, field), rtol=SINGLE, atol=SINGLE)
    assert gaussian.saturation(phi, q, 0.1).dtype == jnp.float32


@pytest.mark.parametrize("name", ["relu", "softsign"])
def test_kernels_in_float32_give_float32_out(name):
    phi, k = get(name), np.asarray([[1.0, 0.4], [0.4, 2.0]], np.float32)
    for f in (gaussian.kernel, gaussian.derivative_kernel):
        found = f(phi, jnp.asarray(k))
        assert found.dtype == jnp.float32
        with jax.enable_x64(True):
            exact = f(phi, jnp.asarray(k, float))
        np.testing.assert_allclose(found, exact, rtol=SINGLE)


def test_without_float64_nothing_asks_for_it_in_float32():
    with jax.enable_x64(False):
        q = jnp.asarray(0.5)
        assert gaussian.moment(activations.tanh, "phi2", q).dtype == jnp.float32
        assert gaussian.kernel(activations.tanh, q + jnp.zeros((2, 2))).dtype == jnp.float32
        assert gaussian.saturation(activations.sin, q, 0.1).dtype == jnp.float32


@pytest.mark.parametrize("name", ["tanh", "hard_tanh"])
def test_jit_and_vmap_change_nothing(name):
    phi, q = get(name), jnp.asarray([0.1, 1.0, 30.0])
    chi = functools.partial(gaussian.moment, phi, "dphi2")
    loop = jnp.stack([chi(v) for v in q])
    for values in (chi(q), jax.vmap(chi)(q), jax.jit(jax.vmap(chi))(q)):
        np.testing.assert_allclose(values, loop, rtol=1e-14)


def test_a_moment_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"'phi3'.*did you mean 'phi"):
        gaussian.moment(activations.tanh, "phi3", 1.0)


# Saturation


@each
def test_saturation_is_the_fraction_of_a_sample(phi):
    n, q, threshold = 400_000, 3.0, 0.2
    x = math.sqrt(q) * jax.random.normal(jax.random.key(1), n)
    fraction = float(jnp.mean(jnp.abs(phi.derivative(x)) < phi.saturated_slope(threshold)))
    found = float(gaussian.saturation(phi, q, threshold))
    # Five standard errors of a fixed draw: a false alarm would be one in 10⁶, once and for all.
    assert abs(found - fraction) <= 5 * math.sqrt(max(found * (1 - found), 1 / n) / n)
    if phi.name == "tanh":
        other = float(gaussian.saturation(phi, 1.1 * q, threshold))
        assert abs(other - fraction) > 5 * math.sqrt(other * (1 - other) / n)


def test_saturation_of_the_logistic_is_exact_far_into_the_tail():
    q, t = jnp.asarray([1e-2, 0.1, 1.0, 482.0]), 0.05
    # s(1 - s) < t/4 beyond the x with tanh²(x/2) = 1 - t
    end = 2 * math.atanh(math.sqrt(1 - t))
    truth = [math.erfc(end / math.sqrt(2 * v)) for v in q.tolist()]
    np.testing.assert_allclose(gaussian.saturation(activations.logistic, q, t), truth, rtol=1e-9)
    assert truth[0] < 1e-300 < truth[1]


@some
def test_saturation_is_differentiable_and_safe_at_zero(name):
    f = functools.partial(gaussian.saturation, get(name), threshold=0.2)
    q = jnp.asarray([0.0, 1e-12, 0.5, 2.0, 100.0])
    slope = jax.jit(jax.vmap(jax.grad(f)))(q)
    h = 1e-5 * q[2:]
    np.testing.assert_allclose(
        slope[2:], (f(q[2:] + h) - f(q[2:] - h)) / (2 * h), rtol=1e-6, atol=1e-9
    )
    assert np.isfinite(slope).all()
    assert (f(q) >= 0).all()
    assert (f(q) <= 1).all()


# Kernels


@pytest.mark.parametrize(
    "row", [r for r in rows("t4_correlation") if "C" in r["values"]], ids=lambda r: r["id"]
)
def test_kernels_are_those_of_the_table(row):
    inputs, values = row["inputs"], row["values"]
    phi, q = named(inputs["activation"]), float(values["q_star"])
    numerator, _, denominator = inputs["sw2"].partition("/")
    sw2, sb2 = float(numerator) / float(denominator or 1), float(inputs["sb2"])
    for text, c_next in values["C"].items():
        k = jnp.asarray(pair(q, q, float(text)))
        found = (sw2 * gaussian.kernel(phi, k)[0, 1] + sb2) / q
        assert float(found) == pytest.approx(float(c_next), rel=PROMISED, abs=ROUNDING)
        slope = sw2 * gaussian.derivative_kernel(phi, k)[0, 1]
        assert float(slope) == pytest.approx(float(values["dC_dc"][text]), rel=PROMISED, abs=1e-13)
    assert float(found) != pytest.approx(float(values["C"]["0"]), rel=1e-3)


@pytest.mark.medium
@each_closed_kernel
def test_closed_kernels_agree_with_quadrature(phi):
    # Powers of 4, so that at c = 1 no rounding of k is in q_a q_b - k²: its root is what counts.
    qs = (2.0**-20, 0.25, 4.0) if phi.name in OSCILLATE else (2.0**-20, 0.25, 64.0)
    cs = (-1.0, -0.999999, -0.6, 0.0, 0.3, 0.99, 1 - 1e-9, 1.0)
    k = jnp.asarray(np.stack([pair(a, b, c) for a in qs for b in qs for c in cs]))

    @functools.partial(jax.jit, static_argnums=0)
    def both(phi, k):
        return jax.vmap(lambda k: jnp.stack([f(phi, k) for f in kernels]))(k)

    kernels = (gaussian.kernel, gaussian.derivative_kernel)
    found, quadrature = both(phi, k), both(without_closed_forms(phi), k)
    size = jnp.sqrt(found[..., 0, 0] * found[..., 1, 1])
    assert (jnp.abs(found - quadrature)[..., 0, 1] <= PROMISED * size).all()
    assert (jnp.abs(found[1:] - quadrature[:-1])[..., 0, 1] > PROMISED * size[1:]).mean() > 0.5 or (
        phi.name == "linear"
    )


@each_kernel
def test_a_coincident_pair_has_the_moments_of_one_input(phi):
    found = kernels_at(phi)
    for p in REPLICAS:
        second, slope = (gaussian.moment(phi, n, p[0]) for n in ("phi2", "dphi2"))
        np.testing.assert_allclose(found["kernel"][p], np.full((2, 2), second), rtol=4 * ROUNDING)
        np.testing.assert_allclose(found["slope"][p], np.full((2, 2), slope), rtol=4 * ROUNDING)


@each_kernel
def test_opposite_inputs_average_a_function_against_its_mirror_image(phi):
    mirror = gaussian.expectation(lambda x: phi(x) * phi(-x), 2.0, kinks=phi.kinks)
    found = kernels_at(phi)["kernel"][2.0, 2.0, -1.0][0, 1]
    np.testing.assert_allclose(found, mirror, rtol=PROMISED, atol=ROUNDING)


@each_kernel
def test_independent_inputs_have_the_product_of_the_means(phi):
    q = jnp.asarray([0.2, 6.0])
    for key, name in [("kernel", "phi"), ("slope", "dphi")]:
        product = jnp.prod(gaussian.moment(phi, name, q))
        found = kernels_at(phi)[key]
        np.testing.assert_allclose(
            found[0.2, 6.0, 0.0][0, 1], product, rtol=PROMISED, atol=ROUNDING
        )
        correlated = found[0.2, 6.0, 0.5][0, 1]
        mean, square = (gaussian.moment(phi, of, q[0]) for of in ("dphi", "dphi2"))
        straight = square - mean**2 < 1e-9  # as hard_sigmoid is where q is small
        assert (key == "slope" and straight) or abs(correlated - product) > 1e-5


@each_kernel
def test_an_input_of_zero_variance_is_a_constant(phi):
    product = phi(0.0) * gaussian.moment(phi, "phi", 1.0)
    found = kernels_at(phi)["kernel"][0.0, 1.0, 0.0][0, 1]
    np.testing.assert_allclose(found, product, rtol=PROMISED, atol=ROUNDING)


@pytest.mark.parametrize("name", ["relu", "softsign"])
def test_a_kernel_is_symmetric_positive_and_reads_the_upper_triangle(name):
    phi = get(name)
    x = np.asarray([[1.0, 2.0, -1.0], [0.9, 2.1, -1.2], [-0.3, 0.1, 2.0]])
    k = jnp.asarray(x @ x.T)
    out = gaussian.kernel(phi, k)
    np.testing.assert_array_equal(out, out.T)
    assert np.linalg.eigvalsh(out).min() >= -1e-13 * float(jnp.trace(out))
    np.testing.assert_array_equal(gaussian.kernel(phi, jnp.triu(k)), out)


@each
def test_one_input_costs_no_quadrature_over_a_plane(phi):
    size = {n: str(jax.make_jaxpr(lambda k: gaussian.kernel(phi, k))(jnp.eye(n))) for n in (1, 2)}
    assert "scan" not in size[1]
    assert ("scan" in size[2]) == (phi.kernel is None)


# Price's theorem


@each_kernel
def test_the_derivative_by_the_covariance_of_replicas_is_the_mean_squared_slope(phi):
    for p in REPLICAS:
        found = along(kernels_at(phi)["jacobian"][p], DIRECTIONS[2])
        slope = gaussian.moment(phi, "dphi2", p[0])
        np.testing.assert_allclose(found, slope * DIRECTIONS[2], rtol=4 * ROUNDING)


def test_differentiating_the_closed_form_instead_would_give_nan_at_replicas():
    one = jnp.asarray(1.0)
    by_k = jax.grad(lambda k: activations.relu.kernel(one, one, k))(one)
    assert math.isnan(by_k) or float(by_k) != pytest.approx(0.5)


@each_kernel
def test_the_derivative_of_a_kernel_is_the_limit_of_differences(phi):
    found = kernels_at(phi)
    for direction, limit in zip(DIRECTIONS, found["near"], strict=True):
        slope = along(found["jacobian"][GENERAL], direction)
        np.testing.assert_allclose(slope, limit, atol=DIFFERENCE)
        elsewhere = along(found["jacobian"][0.2, 6.0, 0.5], direction)
        least = 1e4 * DIFFERENCE * min(1, phi.max_slope**2)
        assert phi.homogeneous or np.abs(elsewhere - limit).max() > least


@each_kernel
def test_moving_all_inputs_together_moves_the_kernel_as_its_diagonal(phi):
    for p in REPLICAS[1:]:
        found = along(kernels_at(phi)["jacobian"][p], np.ones((2, 2)))
        slope = gaussian.moment(phi, "x_phi_dphi", p[0]) / p[0]
        np.testing.assert_allclose(found, np.full((2, 2), slope), rtol=1e-12, atol=ROUNDING)


@each_kernel
def test_the_derivative_of_a_kernel_is_finite_at_zero_and_along_a_line(phi):
    for p in EDGES:
        assert np.isfinite(kernels_at(phi)["jacobian"][p]).all()
    at_zero = along(kernels_at(phi)["jacobian"][0.0, 0.0, 0.0], np.eye(2))
    _, _, m = moments_at(phi)
    np.testing.assert_allclose(np.diagonal(at_zero), [(m.dphi2 + m.phi_ddphi)[0]] * 2, rtol=1e-12)


@pytest.mark.parametrize("name", ["relu", "hard_tanh", "erf"])
def test_derivatives_jit_vmap_and_reverse_mode_compose(name):
    phi, f = get(name), lambda k: gaussian.kernel(get(name), k)[0, 1]
    ks = jnp.asarray(np.stack([pair(*p) for p in (GENERAL, (0.2, 6.0, 0.5))]))
    loop = np.stack([jax.grad(f)(k) for k in ks])
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(f)))(ks), loop, rtol=1e-13)
    forward = [kernels_at(phi)["jacobian"][p][0, 1] for p in (GENERAL, (0.2, 6.0, 0.5))]
    np.testing.assert_allclose(loop, forward, rtol=1e-13)
    slope = [kernels_at(phi)["slope"][p][0, 1] for p in (GENERAL, (0.2, 6.0, 0.5))]
    np.testing.assert_allclose(loop[:, 0, 1], slope, rtol=1e-12)


@pytest.mark.parametrize("name", ["softsign", "erf", "sin"])
def test_the_derivative_kernel_of_a_continuous_slope_is_differentiable(name):
    f = functools.partial(gaussian.derivative_kernel, get(name))
    k, t = jnp.asarray(pair(*GENERAL)), jnp.asarray([[0.3, 1.0], [1.0, -0.4]])
    _, out = jax.jvp(f, (k,), (t,))
    limit = (f(k + STEP * t) - f(k - STEP * t)) / (2 * STEP)
    np.testing.assert_allclose(out, limit, atol=DIFFERENCE)


def test_derivatives_that_would_be_wrong_are_refused():
    k = jnp.asarray(pair(1.0, 1.0, 0.5))
    with pytest.raises(InputError, match="φ' jumps"):
        jax.jacfwd(functools.partial(gaussian.derivative_kernel, activations.relu))(k)
    with pytest.raises(InputError, match="twice"):
        jax.hessian(lambda k: gaussian.kernel(activations.tanh, k)[0, 1])(k)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian.moment(activations.tanh, "phi2", jnp.asarray(-1.0)), "q is -1.0"),
        (lambda: gaussian.expectation(jnp.sin, jnp.asarray(jnp.nan)), "q is nan"),
        (lambda: gaussian.saturation(activations.tanh, jnp.asarray(-1.0), 0.1), "q is -1.0"),
        (
            lambda: gaussian.kernel(activations.tanh, jnp.array([[1.0, 1.5], [1.5, 1.0]])),
            "covariance 1.5 between inputs 0 and 1",
        ),
        (
            lambda: gaussian.derivative_kernel(activations.tanh, -jnp.eye(2)),
            "diagonal of k is -1.0",
        ),
        (
            lambda: _pairs.equal_pair(activations.tanh, jnp.asarray(1.0), jnp.asarray(-1.5)),
            "c is -1.5; a correlation is from -1 to 1",
        ),
    ],
)
def test_what_is_no_variance_or_correlation_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
