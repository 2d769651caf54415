"""Transformed activations against their defining conditions, and against published parameters."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from gradflow import activations, builders, gaussian
from gradflow.activations import ALL
from gradflow.errors import InputError
from gradflow.theory import mean_field, transformations
from gradflow.theory.transformations import Transformation

# Of the conditions, each of order 1, in float64; what is measured is below 1e-14.
CONDITION = 1e-12
# The published parameters come of targets that were met to 1e-8.
PUBLISHED = 1e-7
# A float32 activation that subtracts nearly equal numbers and multiplies the rest by 20.
SINGLE = 2e-5
predict = jax.jit(mean_field.predict)

# a φ(b x + c) + d of it has three parameters and not four, as φ(b x) = b² φ(x) for b > 0.
_WITHOUT = ("squared_relu",)
# Compiling the solver takes a second or two: of most activations in slow tests.
_KINDS = ("softplus", "tanh")
each = pytest.mark.parametrize(
    "phi",
    [
        pytest.param(a, marks=[pytest.mark.slow] * (a.name not in _KINDS), id=a.name)
        for a in ALL
        if not a.slope_jumps and not a.homogeneous and a.name not in _WITHOUT
    ],
)
depths = pytest.mark.parametrize("depth", [1, 3, 100, 10_000])


def conditions(phi, transformation):
    """E[φ̂], Q(1), Q'(1), C'(1), C''(1) by the quadrature of all other theory."""
    phi_hat = transformations.apply(phi, transformation)

    def averaged(z):
        y, dy = phi_hat(z), phi_hat.derivative(z)
        return jnp.stack([y, y**2, z * y * dy, dy**2, phi_hat.second_derivative(z) ** 2])

    with jax.enable_x64(True):
        return np.asarray(gaussian.expectation(averaged, 1.0, kinks=phi_hat.kinks))


@each
@depths
def test_deep_kernel_shaping_meets_its_conditions(phi, depth):
    zeta = 1.2 if depth == 1 else 1.5  # some activations cannot bend more within one layer
    found = transformations.deep_kernel_shaping(phi, depth, zeta)
    mean, q, q_slope, c_slope, _ = conditions(phi, found)
    np.testing.assert_allclose([mean, q, q_slope], [0, 1, 1], atol=CONDITION)
    np.testing.assert_allclose(c_slope**depth, zeta, rtol=depth * CONDITION)


@each
@depths
def test_tailored_meets_its_conditions(phi, depth):
    found = transformations.tailored(phi, depth, 0.3)
    _, q, q_slope, c_slope, c_curvature = conditions(phi, found)
    np.testing.assert_allclose([q, q_slope, c_slope], 1, atol=CONDITION)
    np.testing.assert_allclose(depth * c_curvature, 0.3, rtol=CONDITION)


@pytest.mark.slow
def test_deep_kernel_shaping_follows_a_slope_that_jumps():
    """SELU bends by its kink and by its exponential; Newton's method must see both."""
    found = transformations.deep_kernel_shaping("selu", 20, 1.5)
    mean, q, q_slope, c_slope, _ = conditions(activations.selu, found)
    np.testing.assert_allclose([mean, q, q_slope], [0, 1, 1], atol=CONDITION)
    np.testing.assert_allclose(c_slope**20, 1.5, rtol=20 * CONDITION)


def test_an_untransformed_activation_does_not_meet_them():
    _, q, q_slope, c_slope, _ = conditions(activations.tanh, Transformation())
    assert max(abs(q - 1), abs(q_slope - 1), abs(c_slope - 1)) > 0.1


def test_the_conditions_are_met_in_a_million_layers():
    found = transformations.tailored("tanh", 1_000_000, 0.3)
    _, q, q_slope, c_slope, c_curvature = conditions(activations.tanh, found)
    np.testing.assert_allclose([q, q_slope, c_slope], 1, atol=CONDITION)
    np.testing.assert_allclose(1e6 * c_curvature, 0.3, rtol=1e-7)


def test_parameters_approach_those_of_an_infinitely_deep_network():
    """To leading order in a, DKS needs φ''²/2 + φ'φ''' = 0 at b: for tanh, tanh b = 1/2."""
    found = transformations.deep_kernel_shaping("tanh", 100_000, 1.5)
    assert found.input_shift == pytest.approx(math.atanh(0.5), abs=1e-4)
    # C'(1) - 1 = (a φ''/φ')²/2, and φ''/φ' = -2 tanh b = -1.
    assert found.input_scale == pytest.approx(math.sqrt(2 * math.log(1.5) / 1e5), rel=1e-4)


def test_the_shift_is_the_nearest_to_zero_and_positive_of_two():
    """Tanh has TAT solutions with shifts ±0.52 and ±1.09 at depth 100; an odd φ has no 0."""
    found = transformations.tailored("tanh", 100, 0.3)
    assert 0.5 < found.input_shift < 0.6
    mirrored = dataclasses.replace(
        found, input_shift=-found.input_shift, output_shift=-found.output_shift
    )
    np.testing.assert_allclose(
        conditions(activations.tanh, mirrored)[1:], conditions(activations.tanh, found)[1:]
    )


# Published parameters -----------------------------------------------------------------------------


def residual_network(layer, x):
    """The ResNet of the dks package's tests, read as a composition: ``layer`` is one φ̂ of it.

    Four groups of residual blocks; three layers in a branch, and one in the shortcut of each
    group's first block. Branch and shortcut are weighted by 0.64 and 0.36; one layer ends it.
    """
    for blocks in (3, 4, 23, 3):
        for block in range(blocks):
            shortcut = layer(x) if block == 0 else x
            x = 0.64 * layer(layer(layer(x))) + 0.36 * shortcut
    return layer(x)


def of_one_layer(target, lower, upper, network_value):
    """Solve network_value(local value) = target."""
    return brentq(lambda v: network_value(v) - target, lower, upper, xtol=1e-15, rtol=1e-14)


def local_slope(zeta):
    return of_one_layer(zeta, 1, 2, lambda s: residual_network(lambda x: s * x, 1.0))


def local_curvature(tau):
    return of_one_layer(tau, 0, tau, lambda k: residual_network(lambda x: k + x, 0.0))


def leaky_relu_map(slope, c):
    """C(c) of leaky ReLU, by the closed form of its kernel."""
    kernel = activations.leaky_relu(slope).kernel
    with jax.enable_x64(True):
        one = jnp.asarray(1.0)
        return float(kernel(one, one, jnp.asarray(c)) / kernel(one, one, one))


PUBLISHED_PARAMETERS = [
    # input scale, input shift, output shift, output scale
    (
        "DKS",
        "softplus",
        0.18761008168267976,
        0.40688063442262007,
        -0.9213466151411376,
        8.8786725437,
    ),
    ("DKS", "tanh", 0.07461073057540868, 0.5566915199964182, -0.5034378768692127, 18.0026359644426),
    ("DKS", "gelu", 0.07043253126531114, 0.259489297927707, -0.15815378961903598, 20.2115890231586),
    ("TAT", "softplus", 0.15011489794748328, 0.5374599901127068, -0.996481014465811, 10.5488018788),
    ("TAT", "tanh", 0.0580205218578313, 0.5218639804099805, -0.4796430704354356, 22.3606626176312),
]


@pytest.mark.parametrize(("method", "name", "a", "b", "shift", "scale"), PUBLISHED_PARAMETERS)
def test_published_parameters(method, name, a, b, shift, scale):
    if method == "DKS":
        found = transformations.deep_kernel_shaping(name, 1, local_slope(1.2))
    else:
        found = transformations.tailored(name, 1, local_curvature(0.2))
    expected = Transformation(a, b, scale, shift)
    np.testing.assert_allclose(
        dataclasses.astuple(found), dataclasses.astuple(expected), rtol=PUBLISHED
    )


def test_published_leaky_relu():
    """α = 0.62918… gives that ResNet C_f(0) = 0.75, and is found back from its C(0)."""
    slope, scale = 0.6291800290346146, 1.196996549778802
    carried = residual_network(functools.partial(leaky_relu_map, slope), 0.0)
    assert carried == pytest.approx(0.75, abs=2e-8)
    of_a_layer = leaky_relu_map(slope, 0.0)
    phi = transformations.tailored_leaky_relu(1, of_a_layer)
    with jax.enable_x64(True):
        assert float(phi(jnp.asarray(1.0))) == pytest.approx(scale, rel=1e-12)
        assert float(phi(jnp.asarray(-1.0))) == pytest.approx(-slope * scale, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "above", "below"),
    [
        ("softplus", 0.6923574763139374, -0.4935166367766701),
        ("tanh", 0.6860178437500071, -0.49030275427738146),
        pytest.param("gelu", 0.6922429517529013, -0.49198103131465193, marks=pytest.mark.slow),
    ],
)
def test_published_values(name, above, below):
    """φ̂(±0.6) for τ = 4.5, published as right to 1e-8.

    Of the two solutions of an odd φ, which are -φ̂(-x) of each other, the published one is the
    other here.
    """
    found = transformations.tailored(name, 1, local_curvature(4.5))
    sign = -1 if name == "tanh" else 1
    with jax.enable_x64(True):
        values = sign * transformations.apply(name, found)(sign * jnp.array([0.6, -0.6]))
    np.testing.assert_allclose(values, [above, below], rtol=0, atol=1e-8)


# The network as a whole ---------------------------------------------------------------------------


@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize(("depth", "eta"), [(1, 0.3), (10, 0.1), (30, 0.9), (200, 0.999)])
def test_leaky_relus_carry_uncorrelated_inputs_to_eta(depth, eta):
    phi = transformations.tailored_leaky_relu(depth, eta)
    k = jnp.eye(2)
    for _ in range(depth):
        k = mean_field.correlation_map(phi, k, 1.0)
    np.testing.assert_allclose(k, [[1, eta], [eta, 1]], rtol=CONDITION * depth)


@pytest.mark.usefixtures("x64_only")
def test_a_closed_kernel_that_apply_keeps_is_that_of_quadrature():
    phi = transformations.apply("leaky_relu(0.3)", Transformation(1.7, 0.0, 0.6, 0.0))
    bare = activations.custom(phi.function, kinks=phi.kinks)
    k = jnp.array([[1.1, 0.4], [0.4, 0.8]])
    assert phi.kernel is not None
    assert phi.homogeneous
    for average in (gaussian.kernel, gaussian.derivative_kernel):
        np.testing.assert_allclose(average(phi, k), average(bare, k), rtol=CONDITION)


@pytest.mark.usefixtures("x64_only")
def test_in_mean_field_theory_dks_has_gradients_that_grow_by_zeta():
    depth, zeta = 30, 1.5
    phi = transformations.apply("tanh", transformations.deep_kernel_shaping("tanh", depth, zeta))
    found = mean_field.profile(phi, jnp.asarray(1.0), 1.0, depth=depth)
    np.testing.assert_allclose(found["q"], 1, rtol=CONDITION)
    np.testing.assert_allclose(found["log_jacobian_norm"][-1], math.log(zeta), rtol=1e-10)


@pytest.mark.slow
def test_a_network_takes_a_transformed_activation():
    """One network spec, any activation: at unit inputs TAT has χ = 1 in every layer."""
    phi = transformations.apply("softplus", transformations.tailored("softplus", 4, 0.3))
    network = builders.mlp([50] * 6, phi, "lecun")
    found = predict(network, jnp.eye(1))
    np.testing.assert_allclose(found["q"], 1, atol=SINGLE)
    np.testing.assert_allclose(found["chi"][:-1], 1, atol=SINGLE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [("tanh", "dks"), ("softplus", "tat"), ("relu", "tat")]
)
def test_a_network_is_transformed_for_its_own_depth(name, method):
    network = builders.mlp([50, *[40] * 6, 9], name, "glorot_orthogonal", sigma_b=0.3)
    found = transformations.applied(network, method, {"relu": 0.7}.get(name))
    assert found.widths == network.widths
    assert jax.tree.leaves(found) == [1.0] * 3
    phi, _ = transformations.by_name(method, name, 6, {"relu": 0.7}.get(name))
    assert found.activation == phi
    assert [stage.block.activation for stage in found.stages] == [activations.linear, phi, phi]
    assert not found.iid_gaussian
    q = predict(found, jnp.eye(1))["q"]
    np.testing.assert_allclose(q, 1, atol=SINGLE)


@pytest.mark.parametrize(
    "network",
    [
        builders.mlp([5, 5, 5], norm="layer"),
        builders.mlp([5, 5]),
        builders.residual(5, 5, 3),
    ],
)
def test_other_networks_are_not_transformed(network):
    with pytest.raises(InputError, match="is no chain of Dense layers of one activation"):
        transformations.applied(network)


def test_an_unknown_method_is_said():
    with pytest.raises(InputError, match="unknown transform 'dsk' .did you mean 'dks'"):
        transformations.applied(builders.mlp([5, 5, 5]), "dsk")


def test_local_maps_of_relu_and_of_a_transformed_activation():
    relu = transformations.local_maps("relu")
    np.testing.assert_allclose(relu[:4], [0.5, 0.5, 1 / math.pi, 1], rtol=1e-6)
    assert relu.c_curvature == math.inf
    phi = transformations.apply("tanh", transformations.tailored("tanh", 3, 0.3))
    maps = transformations.local_maps(phi)
    np.testing.assert_allclose(maps[:2] + maps[3:], [1, 1, 1, 0.1], atol=SINGLE)


def test_apply_moves_the_kinks():
    phi = transformations.apply("hard_tanh", Transformation(2.0, 0.5, 3.0, -0.25))
    assert phi.kinks == (-0.75, 0.25)
    assert phi.slope_jumps == ((-0.75, pytest.approx(6.0)), (0.25, pytest.approx(-6.0)))
    np.testing.assert_allclose(phi(jnp.array([-2.0, 0.0, 1.0])), [-3.75, 0.75, 2.25], rtol=1e-6)


def test_equal_arguments_give_one_activation():
    numbers = Transformation(2.0, 0.5, 3.0, -0.25)
    by_name = transformations.apply("tanh", numbers)
    assert by_name is transformations.apply(activations.tanh, dataclasses.replace(numbers))


def test_kinks_of_a_custom_activation_are_followed():
    """ELU of another place: its solution is within a few input scales of the kink."""
    moved = activations.custom(lambda x: jax.nn.elu(x - 1.0), kinks=[1.0], name="moved")
    found = transformations.deep_kernel_shaping(moved, 1000, 1.5)
    assert abs(found.input_shift - 1) < 3 * found.input_scale < 0.1
    mean, q, q_slope, c_slope, _ = conditions(moved, found)
    np.testing.assert_allclose([mean, q, q_slope], [0, 1, 1], atol=CONDITION)
    np.testing.assert_allclose(c_slope**1000, 1.5, rtol=1000 * CONDITION)


# Gains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("relu", 1.7128585504),
        ("gelu", 1.7009262434),
        ("tanh", 1.5925374197),
        ("elu", 1.2708434179),
        ("selu", 1.0),
        ("softsign", 2.3375333631),
        ("linear", 1.0),
    ],
)
def test_normalising_gain(name, gain):
    assert transformations.normalising_gain(name) == pytest.approx(gain, rel=1e-10)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    """What is out of range, and what has no solution, is said in one sentence."""

    @pytest.mark.parametrize("depth", [0, -1, 2.5, True, "3"])
    def test_depth(self, depth):
        for transform in (transformations.deep_kernel_shaping, transformations.tailored):
            with pytest.raises(InputError, match="depth is"):
                transform("tanh", depth)
        with pytest.raises(InputError, match="depth is"):
            transformations.tailored_leaky_relu(depth)

    @pytest.mark.parametrize("zeta", [1.0, 0.9, math.inf, math.nan])
    def test_zeta(self, zeta):
        with pytest.raises(InputError, match=r"zeta is .*; it is a finite number above 1"):
            transformations.deep_kernel_shaping("tanh", 10, zeta)

    @pytest.mark.parametrize("tau", [0.0, -0.1, math.inf, math.nan])
    def test_tau(self, tau):
        with pytest.raises(InputError, match=r"tau is .*; it is a finite number above 0"):
            transformations.tailored("tanh", 10, tau)

    @pytest.mark.parametrize("eta", [0.0, 1.0, -0.1, math.nan])
    def test_eta(self, eta):
        with pytest.raises(InputError, match=r"eta is .*; it is a correlation in \(0, 1\)"):
            transformations.tailored_leaky_relu(10, eta)

    def test_eta_beyond_what_relus_reach(self):
        with pytest.raises(InputError, match="depth 1 reach at most 0.31831"):
            transformations.tailored_leaky_relu(1, 0.9)

    @pytest.mark.parametrize("name", ["linear", "relu", "leaky_relu"])
    def test_homogeneous_activations_have_no_deep_kernel_shaping(self, name):
        with pytest.raises(InputError, match="homogeneous"):
            transformations.deep_kernel_shaping(name, 10)

    @pytest.mark.parametrize("name", ["relu", "leaky_relu", "hard_tanh", "selu"])
    def test_slopes_that_jump_have_no_curvature(self, name):
        with pytest.raises(InputError, match="slope that jumps"):
            transformations.tailored(name, 10)

    def test_no_solution(self):
        """A line cannot bend; softplus, ReLU at most, cannot bend that much in one layer."""
        for name in _WITHOUT:
            with pytest.raises(InputError, match=f"'{name}' was found for zeta 1.5 at depth 10;"):
                transformations.deep_kernel_shaping(name, 10, 1.5)
        with pytest.raises(InputError, match="'linear' was found for tau 0.3 at depth 100;"):
            transformations.tailored("linear", 100, 0.3)
        with pytest.raises(InputError, match="'softplus' was found for zeta 1.5 at depth 1;"):
            transformations.deep_kernel_shaping("softplus", 1, 1.5)

    def test_other_arguments(self):
        with pytest.raises(InputError, match="input_scale is 0.0"):
            transformations.apply("tanh", Transformation(input_scale=0.0))
        with pytest.raises(InputError, match="unknown activation 'tan'"):
            transformations.tailored("tan", 10)
        with pytest.raises(InputError, match="variance 0.0"):
            transformations.normalising_gain(activations.custom(lambda x: 0 * x, name="zero"))
