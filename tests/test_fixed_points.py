"""Fixed points of the length and correlation maps, against 50-digit arithmetic and iteration."""

import functools
import warnings
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import SLOPES
from laws import scales as slope_scales

from gradflow import activations, gaussian
from gradflow.errors import InputError
from gradflow.theory import _correlations, _depth_scales, fixed_points, mean_field
from gradflow.theory.fixed_points import Stability, Status

FIXED_POINT, DEPTH_SCALE = 1e-9, 1e-8  # what is asked of float64
# The larger q* of SiLU at σ_w² = 2, σ_b² = 0.01, by 30 digits of mpmath's quadrature.
SILU_FAR_OUT = 68889.0191080699758563648027092
ATTRACTS = {Stability.STABLE, Stability.MARGINAL, Stability.HALF_STABLE}
pytestmark = pytest.mark.usefixtures("x64_only")
# Where φ has a traced parameter, its integrals are a part of every run: worth their optimisation.
optimised = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "1"})


def each(activation, sigma_w2, sigma_b2, start=1.0):
    """`fixed_points.analyse` of one point after the other: one program for a whole table."""
    points = zip(*np.broadcast_arrays(sigma_w2, sigma_b2, start), strict=True)
    found = [fixed_points.analyse(activation, w, b, start=q) for w, b, q in points]
    return fixed_points.Analysis(*map(np.array, zip(*found, strict=True)))


def scales(row):
    inputs = row["inputs"]
    return tuple(float(Fraction(inputs[name])) for name in ("sw2", "sb2"))


class TestTable2:
    """Reference table 2: all fixed points of the length map."""

    @pytest.mark.medium
    def test_fixed_points(self, load_reference):
        checked = 0
        for row in load_reference("t2_fixed_points"):
            phi = activations.get(row["inputs"]["activation"])
            found = fixed_points.length(phi, *scales(row))
            # A q* of null stands for every q.
            truths = [t for t in row["values"]["fixed_points"] if t["q_star"] is not None]
            assert int((found.stability != Stability.ABSENT).sum()) == len(truths), row["id"]
            for place, truth in enumerate(truths):
                stability = Stability(int(found.stability[place]))
                assert (stability in ATTRACTS) == truth["stable"], row["id"]
                if truth.get("marginal"):
                    marginal = (Stability.MARGINAL, Stability.MARGINAL_UNSTABLE)
                    assert stability in marginal, row["id"]
                for name in ("q_star", "chi1", "chi_par", "xi_q", "xi_grad"):
                    limit = DEPTH_SCALE if name.startswith("xi") else FIXED_POINT
                    value = float(getattr(found, name)[place])
                    assert value == pytest.approx(float(truth[name]), rel=limit), (row["id"], name)
                checked += 1
        assert checked > 100

    @pytest.mark.medium
    @pytest.mark.parametrize(
        "activation",
        [
            pytest.param(name, marks=() if name in ("tanh", "relu", "gelu") else pytest.mark.slow)
            for name in (
                *("tanh", "relu", "gelu", "erf", "hard_tanh"),
                *("logistic", "selu", "silu", "softsign"),
            )
        ],
    )
    def test_attractors(self, activation, load_reference):
        rows = [
            row
            for row in load_reference("t2_fixed_points")
            if row["inputs"]["activation"] == activation
        ]
        sigma_w2, sigma_b2 = np.array([scales(row) for row in rows]).T
        found = each(activations.get(activation), sigma_w2, sigma_b2)
        truth = np.array([float(row["values"]["attractor_from_q0_1"]) for row in rows])
        diverges = found.status == Status.DIVERGES
        assert (diverges == np.isinf(truth)).all()
        assert np.isnan(found.q_star[diverges]).all()
        np.testing.assert_allclose(found.q_star[~diverges], truth[~diverges], rtol=FIXED_POINT)


@pytest.mark.slow
def test_table_4_and_table_9_correlations_and_depth_scales(load_reference):
    checked = 0
    for row in load_reference("t4_correlation") + load_reference("t9_trainable_depth"):
        if "xi_c" not in row["values"] or "kind" in row["inputs"]:
            continue
        phi = activations.get(row["inputs"]["activation"])
        start = float(row["inputs"].get("q_star_given", 1))
        found = fixed_points.analyse(phi, *scales(row), start=start)
        for name in ("q_star", "chi1", "chi_par", "c_star", "chi_c", "xi_q", "xi_c", "xi_grad"):
            if name not in row["values"]:
                continue
            limit = DEPTH_SCALE if name.startswith("xi") else FIXED_POINT
            truth = float(row["values"][name])
            value = float(getattr(found, name))
            assert value == pytest.approx(truth, rel=limit, abs=1e-15), (row["id"], name)
        if "six_xi_c" in row["values"]:
            assert float(fixed_points.trainable_depth(found.xi_c)) == pytest.approx(
                float(row["values"]["six_xi_c"]), rel=DEPTH_SCALE
            )
        checked += 1
    assert checked > 25


@pytest.mark.parametrize(
    ("sigma_w2", "xi_c"), [(1.0, 3.626976), (1.551020, 20.19875), (1.734694, 176.61)]
)
def test_published_depth_scales(sigma_w2, xi_c):
    """Tanh at σ_b² = 0.05; near criticality iterated maps of others were 30 % off."""
    found = fixed_points.analyse(activations.tanh, sigma_w2, 0.05)
    assert float(found.xi_c) == pytest.approx(xi_c, rel=1e-4)


class TestStatus:
    @pytest.mark.parametrize(
        ("activation", "sigma_w2", "sigma_b2", "status"),
        [
            ("tanh", 1.5, 0.05, Status.CONVERGES),
            ("tanh", 0.9, 0.0, Status.COLLAPSES),
            ("tanh", 1.0, 0.0, Status.COLLAPSES_ALGEBRAICALLY),
            ("hard_tanh", 1.0, 0.0, Status.COLLAPSES_ALGEBRAICALLY),
            ("relu", 2.0, 0.0, Status.NEUTRAL),
            ("relu", 2.0, 0.1, Status.DIVERGES),
            ("gelu", 4.0, 0.0, Status.DIVERGES),
            pytest.param("cos", 30.0, 0.0, Status.CONVERGES, marks=pytest.mark.medium),
            pytest.param("cos", 0.0, 0.3, Status.CONVERGES, marks=pytest.mark.medium),
            # q* = 2e-20, 2e-48 and 2e13: neither 0 nor infinite.
            ("tanh", 0.5, 1e-20, Status.CONVERGES),
            ("tanh", 0.5, 1e-48, Status.CONVERGES),
            ("relu", 1.0, 1e13, Status.CONVERGES),
            ("relu", 1.0, 1e307, Status.OUT_OF_RANGE),  # beyond a float64's range
        ],
    )
    def test_of_each_kind(self, activation, sigma_w2, sigma_b2, status):
        found = fixed_points.analyse(activations.get(activation), sigma_w2, sigma_b2)
        assert found.status == status
        known = status not in (Status.DIVERGES, Status.OUT_OF_RANGE)
        assert np.isfinite(found.q_star) == known

    @pytest.mark.medium
    def test_half_stable_points_are_one_and_not_two_or_none(self):
        """At GELU's, V(q) - q touches 0 from below, with a stable fixed point just before it."""
        sigma_w2, sigma_b2 = 1.983058257437547, 0.17292239075606735  # table 3
        shifts = (-1e-8, 0.0, 1e-8)
        found = [fixed_points.length(activations.gelu, sigma_w2, sigma_b2 + s) for s in shifts]
        kinds = [[Stability(int(s)) for s in one.stability if s] for one in found]
        assert kinds == [
            [Stability.STABLE],
            [Stability.STABLE, Stability.HALF_STABLE],
            [Stability.STABLE, Stability.UNSTABLE, Stability.STABLE],
        ]
        assert float(found[1].q_star[1]) == pytest.approx(3.56155281280883, rel=1e-9)
        settled = each(activations.gelu, sigma_w2, sigma_b2, start=[1.0, 9.0])
        assert settled.status.tolist() == [Status.CONVERGES, Status.ALGEBRAIC]
        np.testing.assert_allclose(settled.q_star, found[1].q_star[:2], rtol=1e-12)

    def test_neutral_lengths_stay_where_they_start(self):
        found = fixed_points.analyse(activations.relu, 2.0, 0.0, start=0.3)
        assert float(found.q_star) == 0.3
        assert (found.chi1, found.c_star, found.xi_c) == (1, 1, np.inf)


class TestWithoutAFixedPoint:
    """Where q grows without limit, or vanishes, χ₁ is what σ_w² E[φ'²] tends to."""

    @pytest.mark.parametrize(
        ("activation", "sigma_w2", "chi1"),
        [
            ("relu", 3.0, 1.5),
            pytest.param("softplus", 3.0, 1.5, marks=pytest.mark.medium),
            ("silu", 4.0, 2.0),
            pytest.param(
                lambda x: x + jnp.sin(x), 3.0, 4.5, marks=pytest.mark.medium
            ),  # no slope far out; E[(1 + cos x)²] → 3/2
            pytest.param(lambda x: x**2, 3.0, np.inf, marks=pytest.mark.medium),
            pytest.param(jnp.exp, 3.0, np.inf, marks=pytest.mark.medium),
        ],
        ids=["relu", "softplus", "silu", "x + sin x", "x²", "exp"],
    )
    def test_gradients_have_a_factor(self, activation, sigma_w2, chi1):
        found = fixed_points.analyse(activations.get(activation), sigma_w2, 0.1)
        assert found.status == Status.DIVERGES
        assert np.isnan(found.q_star)
        assert float(found.chi1) == pytest.approx(chi1, rel=1e-8)

    def test_it_is_that_of_the_layers_far_up(self):
        """Iterated to q = 1e13 and more, where E[φ'²] of SiLU is 1/2 + 3e-8."""
        found = fixed_points.analyse(activations.silu, 4.0, 0.1)
        way = mean_field.profile(activations.silu, jnp.asarray(1.0), 4.0, 0.1, depth=60)
        assert float(way["q"][-1]) > 1e13
        assert float(way["chi"][-1]) == pytest.approx(float(found.chi1), rel=1e-6)

    def test_correlations_tend_to_1_as_the_amplitude_says(self):
        """ReLU, exactly, with δ = 1 - c: at σ_w² = 2 biases add δ/l a layer to what is lost."""
        for sigma_w2, layers in ((2.0, 20_000), (2.4, 4000)):
            found = fixed_points.analyse(activations.relu, sigma_w2, 0.1)
            assert (found.c_star, found.c_exponent) == (1, 2)
            b, delta, inverse_q = 2 * 2**0.5 / (3 * np.pi), 0.3, 1.0
            for _ in range(layers):
                grown = sigma_w2 / 2 + 0.1 * inverse_q
                inverse_q /= grown
                delta = sigma_w2 / 2 * (delta - b * delta**1.5) / grown
            # Corrections are of relative order log(l)/l.
            assert delta * layers**2 == pytest.approx(float(found.c_amplitude), rel=0.15)

    @pytest.mark.medium
    def test_correlations_are_kept_where_both_slopes_are_one(self):
        """Linear networks keep c; c* = 1 was given."""
        for scale in (0.5, 1.0, 1.5):
            found = fixed_points.analyse(activations.linear, scale)
            assert np.isnan(found.c_star)
            assert found.chi_c == 1


def test_a_length_far_out_has_its_digits_and_its_error():
    """SiLU at σ_w² = 2: E[φ²] = q/2 - (π²/3)/√(2πq) + …, from 30 digits of mpmath's quadrature."""
    found = fixed_points.length(activations.silu, 2.0, 0.01)
    off = abs(float(found.q_star[1]) - SILU_FAR_OUT)
    assert off < 1e-11 * SILU_FAR_OUT
    assert off <= float(found.q_error[1]) < 1e-8 * SILU_FAR_OUT


@pytest.mark.parametrize(
    ("name", "sigma_w2", "sigma_b2", "sign"), [("cos", 1.7272, 30.0, -1), ("sin", 30.7862, 0.0, 1)]
)
@pytest.mark.medium
def test_a_slope_that_falls_off_exponentially_keeps_its_digits(name, sigma_w2, sigma_b2, sign):
    """V'(q*) = ±σ_w² exp(-2q*), down to 1e-27."""
    found = fixed_points.analyse(activations.get(name), sigma_w2, sigma_b2)
    slope = sign * sigma_w2 * np.exp(-2 * float(found.q_star))
    assert float(found.chi_par) == pytest.approx(slope, rel=FIXED_POINT, abs=0)
    assert float(found.xi_q) == pytest.approx(-1 / np.log(abs(slope)), rel=DEPTH_SCALE)


# Small enough for the length of what grows faster than x, as squared_relu, to settle.
START = 0.25
# The others take the same paths through the code.
QUICK = {"hard_tanh", "gelu"}


@pytest.mark.medium
@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(a, marks=() if a.name in QUICK else pytest.mark.slow, id=a.name)
        for a in activations.ALL
    ],
)
def test_they_are_what_iterating_the_maps_tends_to(activation):
    """In the ordered and the chaotic phase, for every activation."""
    sigma_w2, sigma_b2 = np.array([0.6, 1.4, 5.0]), np.array([0.2, 0.1, 0.05])
    found = each(activation, sigma_w2, sigma_b2, start=START)
    settled = (found.status == Status.CONVERGES) & (found.chi_par < 0.97)
    assert settled.any()
    found = fixed_points.Analysis(*(values[settled] for values in found))
    given = sigma_w2[settled], sigma_b2[settled], found.q_star, found.c_star
    iterated = np.array([maps(activation, *one) for one in zip(*given, strict=True)])
    np.testing.assert_allclose(found.q_star, iterated[:, 0], rtol=1e-11)
    np.testing.assert_allclose(iterated[:, 1], found.c_star, rtol=0, atol=1e-12)
    np.testing.assert_allclose(iterated[:, 2], found.chi_c, rtol=1e-10)
    assert (found.chi_c < 1).all()


@pytest.mark.medium
@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(a, marks=() if a.name in QUICK else pytest.mark.slow, id=a.name)
        for a in activations.ALL
    ],
)
def test_they_are_where_the_slopes_put_them(activation):
    """σ_w² and σ_b² from q* and χ₁, in the ordered phase, at the edge of chaos and in chaos."""
    for phase, slope in SLOPES.items():
        q, sigma_w2, sigma_b2, settles = slope_scales(activation, phase)
        if not settles:
            continue
        found = fixed_points.analyse(activation, sigma_w2, sigma_b2, start=q)
        assert float(found.q_star) == pytest.approx(q, rel=1e-9), phase
        assert float(found.chi1) == pytest.approx(slope, rel=1e-9), phase
        mapped = maps(activation, sigma_w2, sigma_b2, q, found.c_star)[1]
        if not np.isnan(found.c_star):  # of linear networks, which keep it
            assert float(mapped) == pytest.approx(float(found.c_star), abs=1e-8), phase
            assert (found.c_star < 1) == (phase == "chaotic"), phase


@functools.partial(jax.jit, static_argnums=0)
def maps(activation, sigma_w2, sigma_b2, length, c):
    """What the length map is iterated to from `START`, and the correlation map, its slope at c."""

    def step(_, q):
        return mean_field.length_map(activation, q, sigma_w2, sigma_b2)

    pair = length * (c + (1 - c) * jnp.eye(2))
    mapped = mean_field.correlation_map(activation, pair, sigma_w2, sigma_b2)
    slope = sigma_w2 * gaussian.derivative_kernel(activation, pair)
    q = jax.lax.fori_loop(0, 1200, step, START * jnp.ones_like(length))
    return q, mapped[0, 1] / length, slope[0, 1]


@pytest.mark.parametrize(
    ("activation", "sigma_w2", "sigma_b2"),
    [
        # 512 terms of the series do not suffice: kinks or large q, just inside the chaotic phase.
        (activations.hard_tanh, 1.2635, 0.1),
        (activations.logistic, 103.2, 0.0),
        (activations.selu, 1.02, 0.05),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
@pytest.mark.slow
def test_correlations_close_to_1_are_found_in_two_dimensions(activation, sigma_w2, sigma_b2):
    found = fixed_points.analyse(activation, sigma_w2, sigma_b2)
    q, c = float(found.q_star), float(found.c_star)
    assert 0.5 < c < 1

    @jax.jit
    def excess(c):
        pair = q * jnp.array([[1, c], [c, 1]])
        return mean_field.correlation_map(activation, pair, sigma_w2, sigma_b2)[0, 1] / q - c

    away = 1e-3 * (1 - c)
    assert excess(c - away) > 0 > excess(c + away)


@pytest.mark.slow
def test_derivatives_are_central_differences():
    """By σ_w², σ_b² and a parameter of φ, in the ordered and the chaotic phase."""

    def values(arguments):
        sigma_w2, sigma_b2, gain = arguments
        phi = activations.custom(lambda x: jnp.tanh(gain * x), name="tanh(gain x)")
        return jnp.stack(fixed_points.analyse(phi, sigma_w2, sigma_b2)[1:9])  # q_star … xi_grad

    forward = optimised(jax.jacfwd(values))
    backward = optimised(lambda at, weights: jax.vjp(values, at)[1](weights)[0])
    value, step = optimised(values), 1e-5
    for sigma_w2 in (1.4, 2.6):
        at = np.array([sigma_w2, 0.05, 1.1])
        exact = forward(at)
        for place in range(3):
            shift = step * np.eye(3)[place]
            difference = (value(at + shift) - value(at - shift)) / (2 * step)
            np.testing.assert_allclose(
                exact[:, place], difference, rtol=1e-6, atol=1e-8, err_msg=f"{sigma_w2}, {place}"
            )
        # One sum of them all, with weights that make them equally large.
        sizes = np.abs(exact).max(axis=1)
        weights = np.random.default_rng(0).normal(size=len(exact)) / np.where(sizes > 0, sizes, 1)
        np.testing.assert_allclose(
            backward(at, weights), weights @ exact, rtol=1e-9, err_msg=f"{sigma_w2}"
        )


@pytest.mark.slow
def test_a_parameter_at_a_kink_is_differentiated():
    """How much φ' jumps at 0 is traced then, whether it jumps or not: leaky_relu and elu."""

    def values(a, elu):
        def function(x):
            below = jnp.minimum(x, 0)
            return jnp.where(x > 0, x, a * jnp.where(elu, jnp.expm1(below), below))

        phi = activations.custom(function, kinks=(0.0,), name="bent")
        found = fixed_points.analyse(phi, 1.0, 0.1)
        return jnp.stack([found.q_star, found.chi1, found.xi_c])

    at, step = 0.8, 1e-5
    value, slope = optimised(values), optimised(jax.jacfwd(values))
    for elu in (False, True):
        difference = (value(at + step, elu) - value(at - step, elu)) / (2 * step)
        np.testing.assert_allclose(slope(at, elu), difference, rtol=1e-6, err_msg=f"elu: {elu}")


@pytest.mark.slow
def test_a_derivative_that_is_not_known_is_nan():
    @jax.jit
    @jax.grad
    def slope(sigma_w2):
        return fixed_points.analyse(activations.hard_tanh, sigma_w2, 0.1).xi_c

    assert np.isfinite(slope(1.5))
    assert np.isnan(slope(1.2635))


@pytest.mark.slow
def test_grids_vmap_and_scalars_agree():
    sigma_w2 = np.linspace(0.5, 9, 6)
    sigma_b2 = np.stack([0 * sigma_w2, 0 * sigma_w2 + 0.05, 0.05 * sigma_w2])
    grid = fixed_points.analyse(activations.tanh, sigma_w2, sigma_b2)
    assert grid.q_star.shape == (3, 6)
    scalars = each(activations.tanh, sigma_w2, 0.05)
    mapped = jax.jit(jax.vmap(lambda w: fixed_points.analyse(activations.tanh, w, 0.05)))(
        jnp.asarray(sigma_w2)
    )
    gains = jax.vmap(
        lambda gain: fixed_points.analyse(
            activations.custom(lambda x: jnp.tanh(gain * x)), 1.0, 0.05
        )
    )(jnp.sqrt(sigma_w2))
    for name in ("q_star", "c_star", "xi_c"):
        np.testing.assert_allclose(getattr(mapped, name), getattr(grid, name)[1], rtol=1e-12)
        np.testing.assert_allclose(getattr(scalars, name), getattr(grid, name)[1], rtol=1e-12)
    # tanh(a x) at (1, σ_b²) is tanh at (a², a² σ_b²).
    np.testing.assert_allclose(gains.c_star, grid.c_star[2], rtol=1e-9)


@pytest.mark.slow
def test_float32_is_right_to_its_digits():
    sigma_w2 = np.array([0.5, 1.0, 1.4, 2.5, 6.0])
    wide = each(activations.tanh, sigma_w2, 0.05)
    with jax.enable_x64(False):
        narrow = fixed_points.analyse(activations.tanh, sigma_w2, 0.05)
    for name in ("q_star", "chi1", "chi_par", "c_star", "xi_c", "xi_grad"):
        assert getattr(narrow, name).dtype == jnp.float32
        np.testing.assert_allclose(getattr(narrow, name), getattr(wide, name), rtol=1e-5)


class TestRepresentableDepth:
    def test_is_where_a_product_leaves_the_range(self):
        chi = np.array([0.0557, 0.5, 3.02])
        depth = np.asarray(fixed_points.representable_depth(chi, "float32"))
        sizes = chi ** (np.array([depth - 1, depth + 1]) / 2)
        tiny, largest = (float(getattr(np.finfo(np.float32), n)) for n in ("tiny", "max"))
        assert (sizes[0, :2] > tiny).all()
        assert (sizes[1, :2] < tiny).all()
        assert sizes[0, 2] < largest < sizes[1, 2]

    def test_has_no_limit_at_criticality(self):
        assert fixed_points.representable_depth(1.0) == np.inf

    def test_of_an_unknown_type(self):
        with pytest.raises(InputError, match="float32"):
            fixed_points.representable_depth(0.5, "flaot32")


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((-1.0,), "sigma_w2 is -1.0; it is a finite number, 0 or more"),
            ((1.0, np.nan), "sigma_b2 is nan"),
            ((np.array([1.0, np.inf]),), "sigma_w2 is inf"),
        ],
    )
    def test_scales(self, arguments, message):
        for function in (fixed_points.length, fixed_points.analyse):
            with pytest.raises(InputError, match=message):
                function(activations.tanh, *arguments)

    @pytest.mark.parametrize("start", [0.0, -1.0, np.nan])
    def test_a_start_that_is_no_length(self, start):
        """q = 0 was answered as if it stayed there, also where V(0) > 0."""
        with pytest.raises(InputError, match="start is .*; it is a finite number above 0"):
            fixed_points.analyse(activations.tanh, 1.5, 0.05, start=start)

    def test_a_callable_without_moments(self):
        phi = activations.custom(lambda x: jnp.exp(x**2), name="bump")
        with pytest.raises(InputError, match="'bump' has no finite"):
            fixed_points.analyse(phi, 1.0)

    def test_a_missing_kink_where_the_slope_changes_its_sign_alone_is_noticed(self):
        phi = activations.custom(lambda x: jnp.abs(x - 0.3), name="shifted")
        with pytest.warns(UserWarning, match="name all its kinks"):
            fixed_points.length(phi, 0.5, 0.1)

    @pytest.mark.slow
    def test_missing_kinks_are_noticed(self):
        def clip(x):
            return jnp.clip(x, -0.7, 0.7)

        with pytest.warns(UserWarning, match="name all its kinks"):
            fixed_points.analyse(activations.custom(clip), 2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            named = activations.custom(clip, kinks=(-0.7, 0.7))
            found = fixed_points.analyse(named, 2.0, 0.05)
        # clip(0.7 x)/0.7 is hard_tanh: one network in other units.
        same = fixed_points.analyse(activations.hard_tanh, 2.0, 0.05 / 0.49)
        assert float(found.c_star) == pytest.approx(float(same.c_star), rel=1e-11)


@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize("above", [0, 1, 3, 20])
def test_the_correlation_of_a_critical_network_is_1_to_rounding(above):
    # q and σ_w² of tanh with σ_b² = 0.05 and χ₁ = 1, moved by as many units in the last place.
    q = jnp.asarray(0.5700478816407633 * (1 + above * 2.3e-16))
    sigma_w2, sigma_b2 = jnp.asarray(1.7609546396067386), jnp.asarray(0.05)
    chi1 = mean_field.chi(activations.tanh, q, sigma_w2)
    c_star, chi_c = _correlations.correlation_fixed_point(
        activations.tanh, q, sigma_w2, sigma_b2, chi1
    )
    np.testing.assert_allclose(c_star, 1, rtol=3e-14)
    assert jnp.isinf(_depth_scales.depth_scale(chi_c))
