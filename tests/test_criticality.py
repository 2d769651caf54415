"""Critical points against 50-digit arithmetic, and against the analysis of the points found."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import activations
from gradflow.errors import InputError
from gradflow.theory import criticality, fixed_points, mean_field
from gradflow.theory.criticality import Phase, UniversalityClass

CRITICAL = 1e-9
pytestmark = pytest.mark.usefixtures("x64_only")


def get(name):
    slope = name.removeprefix("leaky_relu_")
    return activations.get(name) if slope == name else activations.leaky_relu(float(slope))


# The others take the same paths through the code.
QUICK = {"tanh", "hard_tanh", "gelu", "relu"}
TABLE = {"tanh", "erf", "hard_tanh", "softsign", "gelu", "silu", "logistic", "selu", "elu", "mish"}
TABLE |= {"softplus", "relu", "leaky_relu_0.01"}


@pytest.mark.parametrize(
    "activation",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(TABLE)],
)
def test_table_3(activation, load_reference):
    phi, checked = get(activation), 0
    for row in load_reference("t3_edge_of_chaos"):
        if "point" in row["inputs"] or row["inputs"]["activation"] != activation:
            continue
        found = criticality.critical_points(phi, sigma_b2=float(row["inputs"]["sb2"]))
        truths = row["values"]["solutions"]
        assert int(np.isfinite(found.sigma_w2).sum()) == len(truths), row["id"]
        for place, truth in enumerate(truths):
            names = {"q_star": "q_star", "sw2": "sigma_w2", "chi_par": "chi_par", "xi_q": "xi_q"}
            for theirs, ours in names.items():
                value = float(getattr(found, ours)[place])
                if truth[theirs] is None:
                    assert np.isnan(value), row["id"]
                else:
                    assert value == pytest.approx(float(truth[theirs]), rel=CRITICAL), row["id"]
            curvature = truth["curvature"]
            if curvature:
                exponent = float(Fraction(curvature["exponent"]))
                assert float(found.exponent[place]) == exponent
                assert float(found.coefficient[place]) == pytest.approx(
                    float(curvature["coeff"]), rel=CRITICAL
                )
            checked += 1
    assert checked or activation == "softplus"


@pytest.mark.medium
def test_table_3_half_stable_and_smallest(load_reference):
    rows = [row for row in load_reference("t3_edge_of_chaos") if "point" in row["inputs"]]
    assert rows
    for row in rows:
        phi, truth = get(row["inputs"]["activation"]), row["values"]
        if "K_star" in truth:
            found = criticality.half_stable_points(phi)
            value = (found.q_star[0], found.sigma_w2[0], found.sigma_b2[0])
            expected = (truth["K_star"], truth["sw2"], truth["sb2"])
        else:
            found = criticality.critical_points(phi, sigma_b2=0.0)
            value, expected = (found.q_star[0], found.sigma_w2[0]), (truth["q_star"], truth["sw2"])
        np.testing.assert_allclose(value, [float(x) for x in expected], rtol=CRITICAL)


@pytest.mark.medium
def test_published_half_stable_points():
    """Roberts, Yaida & Hanin 2022, section 5.3.4; a misprint of SWISH's C_b circulates."""
    silu, gelu = (
        criticality.half_stable_points(activations.get(name)) for name in ("silu", "gelu")
    )
    assert float(silu.sigma_w2[0]) == pytest.approx(1.98800468, abs=5e-9)
    assert float(silu.sigma_b2[0]) == pytest.approx(0.55514317, abs=5e-9)
    assert float(gelu.sigma_b2[0]) == pytest.approx(0.17292239, abs=5e-9)


@pytest.mark.parametrize(
    ("q", "sigma_w2", "sigma_b2"),
    [
        (1 / 16, 1.1153806244, 0.0002368768),
        (0.5, 1.6879751206, 0.0380412011),
        (2.0, 2.8611624000, 0.5122649476),
    ],
)
def test_published_critical_line_of_tanh(q, sigma_w2, sigma_b2):
    line = criticality.critical_line(activations.tanh, q)
    assert float(line.sigma_w2[0]) == pytest.approx(sigma_w2, abs=1e-10)
    assert float(line.sigma_b2[0]) == pytest.approx(sigma_b2, abs=1e-10)


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(a, marks=() if a.name in QUICK else pytest.mark.slow, id=a.name)
        for a in activations.ALL
    ],
)
def test_what_is_called_critical_is(activation):
    found = criticality.critical_points(activation, sigma_b2=0.03)
    for q, sigma_w2 in zip(found.q_star, found.sigma_w2, strict=True):
        if np.isnan(q):
            continue
        assert float(mean_field.chi(activation, q, sigma_w2)) == pytest.approx(1, abs=1e-12)
        assert float(mean_field.length_map(activation, q, sigma_w2, 0.03)) == pytest.approx(
            float(q), rel=1e-12
        )
        again = criticality.critical_points(activation, sigma_w2=sigma_w2)
        close = np.abs(np.asarray(again.q_star) / float(q) - 1) < 1e-7
        assert close.sum() == 1
        assert float(again.sigma_b2[close][0]) == pytest.approx(0.03, rel=1e-6)


@pytest.mark.parametrize(
    ("activation", "sigma_b2", "layers"), [("erf", 0.05, 4000), ("hard_tanh", 0.1, 400)]
)
def test_correlations_approach_1_as_the_coefficient_says(activation, sigma_b2, layers):
    phi = activations.get(activation)
    found = criticality.critical_points(phi, sigma_b2=sigma_b2)
    q, sigma_w2 = found.q_star[0], found.sigma_w2[0]

    def step(_, c):
        pair = q * (jnp.eye(2) * (1 - c) + c)
        return mean_field.correlation_map(phi, pair, sigma_w2, sigma_b2)[0, 1] / q

    distance = 1 - float(jax.lax.fori_loop(0, layers, step, jnp.zeros(())))
    coefficient = float(found.coefficient[0])
    asymptote = {2.0: 1 / (coefficient * layers), 1.5: 4 / (coefficient * layers) ** 2}
    # The corrections are of relative order log(l)/l, with a constant of a few tens here.
    assert distance == pytest.approx(asymptote[float(found.exponent[0])], rel=0.15)


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        ("relu", UniversalityClass.SCALE_INVARIANT),
        ("linear", UniversalityClass.SCALE_INVARIANT),
        ("tanh", UniversalityClass.K_STAR_ZERO),
        ("sin", UniversalityClass.K_STAR_ZERO),
        ("hard_tanh", UniversalityClass.K_STAR_ZERO),
        pytest.param("gelu", UniversalityClass.HALF_STABLE, marks=pytest.mark.medium),
        pytest.param("silu", UniversalityClass.HALF_STABLE, marks=pytest.mark.medium),
        pytest.param("softplus", UniversalityClass.NONE, marks=pytest.mark.medium),
        ("logistic", UniversalityClass.NONE),
    ],
)
def test_universality_classes(activation, kind):
    """As in Roberts, Yaida & Hanin 2022, chapter 5."""
    assert criticality.universality_class(activations.get(activation)) is kind


@pytest.mark.medium
def test_phases_meet_at_the_critical_line():
    found = criticality.critical_points(activations.tanh, sigma_b2=np.array([0.01, 0.3]))
    critical = np.asarray(found.sigma_w2[:, 0])
    sides = critical[:, None] * np.array([0.999, 1.001])
    analysis = fixed_points.analyse(activations.tanh, sides, np.array([[0.01], [0.3]]))
    assert criticality.phase(analysis).tolist() == [[Phase.ORDERED, Phase.CHAOTIC]] * 2


@pytest.mark.medium
def test_phases_of_a_homogeneous_activation():
    """Gradients have a factor though q settles nowhere: σ_w²/2, with biases or without."""
    scales = np.array([1.9, 2.0, 2.1])
    for sigma_b2 in (0.0, 0.1):
        relu = fixed_points.analyse(activations.relu, scales, sigma_b2)
        assert criticality.phase(relu).tolist() == [Phase.ORDERED, Phase.CRITICAL, Phase.DIVERGENT]
        np.testing.assert_allclose(relu.chi1, scales / 2, rtol=1e-14)


@pytest.mark.parametrize(
    ("activation", "sigma_b2", "sigma_w2"),
    [
        ("relu", 0.1, 2.0),
        ("relu", 0.0, np.nan),  # every q is kept, and in `critical_points`
        pytest.param("softplus", 0.0, 2.0, marks=pytest.mark.medium),
        pytest.param("gelu", 0.1, 2.0, marks=pytest.mark.medium),
        ("tanh", 0.1, np.nan),  # its lengths are bounded
    ],
)
def test_where_lengths_grow_without_limit_the_line_goes_on(activation, sigma_b2, sigma_w2):
    phi = activations.get(activation)
    found = float(criticality.critical_at_infinity(phi, sigma_b2))
    np.testing.assert_allclose(found, sigma_w2, rtol=1e-12)
    if np.isfinite(found):
        chi1 = fixed_points.analyse(phi, found, sigma_b2, start=1e30).chi1
        assert float(chi1) == pytest.approx(1, abs=1e-12)


def test_derivatives_are_central_differences():
    def sigma_w2(sigma_b2):
        return criticality.critical_points(activations.tanh, sigma_b2=sigma_b2).sigma_w2[0]

    step = 1e-5
    difference = float(sigma_w2(0.05 + step) - sigma_w2(0.05 - step)) / (2 * step)
    assert float(jax.grad(sigma_w2)(0.05)) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({}, "none is given; give one of them"),
        ({"sigma_b2": 0.1, "sigma_w2": 1.0}, "both are given"),
        ({"sigma_b2": -0.1}, "sigma_b2 is -0.1; it is a finite number, 0 or more"),
    ],
)
def test_bad_input(scales, message):
    with pytest.raises(InputError, match=message):
        criticality.critical_points(activations.tanh, **scales)


@pytest.mark.slow
@pytest.mark.usefixtures("x64_only")
def test_the_phase_diagram_is_the_analysis_of_each_point_and_the_line_lies_between_phases():
    sigma_w, sigma_b = np.linspace(0.5, 3, 12), np.array([0.0, 0.3, 0.8])
    found = criticality.phase_diagram(activations.erf, sigma_w, sigma_b)
    assert found.xi_c.dims == ("sigma_b", "sigma_w")
    one = fixed_points.analyse(activations.erf, sigma_w[7] ** 2, sigma_b[2] ** 2)
    for name, value in one._asdict().items():
        np.testing.assert_allclose(found[name][2, 7], value, rtol=1e-9)
    line = found.critical_sigma_w.values[:, 0]
    ordered = found.phase.values == criticality.Phase.ORDERED
    np.testing.assert_array_equal(ordered, sigma_w[None, :] < line[:, None])


@pytest.mark.medium
def test_the_phase_diagram_of_relu_has_no_hole():
    """More than half of it was grey."""
    sigma_w, sigma_b = np.linspace(0.5, 3, 4), np.array([0.0, 0.3, 0.8])
    found = criticality.phase_diagram(activations.relu, sigma_w, sigma_b)
    scales = np.broadcast_to(found.sigma_w.values**2 / 2, found.chi1.shape)
    np.testing.assert_allclose(found.chi1, scales, rtol=1e-12)
    assert np.isfinite(found.xi_grad).all()
    line = np.nanmin(found.critical_sigma_w.values, axis=1)
    np.testing.assert_allclose(line, np.sqrt(2), rtol=1e-12)
    assert np.isinf(found.critical_q_star.values[1:]).any(axis=1).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("sigma_w", "sigma_b", "message"),
    [([-1.0], [0.0], "sigma_w is -1.0"), ([1.0], [np.inf], "sigma_b is inf"), (1.0, [0.0], "row")],
)
def test_bad_axes_of_a_phase_diagram_are_said(sigma_w, sigma_b, message):
    with pytest.raises(InputError, match=message):
        criticality.phase_diagram(activations.tanh, sigma_w, sigma_b)


@pytest.mark.slow
def test_critical_points_of_activations_with_parameters_are_known_by_hand():
    """Of x² for x > 0: q = 3q/4 + σ_b²; of sin(30 x): σ_w² = 1/450 and q = 1/900 + σ_b²."""
    squared = criticality.critical_points("squared_relu", sigma_b2=0.03)
    assert (squared.q_star[0], squared.sigma_w2[0]) == pytest.approx((0.12, 1 / 0.24), rel=1e-10)
    assert np.isnan(criticality.critical_points("squared_relu", sigma_b2=0.0).q_star).all()
    wave = criticality.critical_points("sin(30)", sigma_b2=0.03)
    assert wave.q_star[0] == pytest.approx(0.03 + 1 / 900, rel=1e-10)
    assert wave.sigma_w2[0] == pytest.approx(1 / 450, rel=1e-10)
    plain = criticality.critical_points("tanh", sigma_b2=0.03)
    scaled = criticality.critical_points("tanh(1.7159)", sigma_b2=0.03)
    assert scaled.q_star[0] == pytest.approx(float(plain.q_star[0]), rel=1e-10)
    assert scaled.sigma_w2[0] == pytest.approx(float(plain.sigma_w2[0]) / 1.7159**2, rel=1e-10)
