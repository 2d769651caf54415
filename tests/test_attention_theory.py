"""Attention over exchangeable tokens, against table 12, other integrals, limits and sum rules."""

import functools
import json
import math
from fractions import Fraction

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import gaussian
from gradflow.errors import InputError
from gradflow.theory import attention

PROMISED = 1e-11  # what is measured is below 1e-14, and 1e-12 at 100 000 tokens
SINGLE = 1e-4

FAMILIES = {}


@pytest.fixture(autouse=True)
def _float64_or_float32(request):
    """Skip what has float64's tolerances where x64 is off; the tests about float32 stay."""
    if "float32" not in request.node.name:
        request.getfixturevalue("x64_only")


def answers(*families):
    """Register the function from a row's inputs to its values, for families of table 12."""

    def register(function):
        FAMILIES.update(dict.fromkeys(families, function))
        return function

    return register


@answers("head_averages", "one_row", "head_averages_finite_key")
def _heads(tokens, v, c="0", d_k=None):
    tokens, v, c = int(tokens), _number(v), _number(c)
    head = attention.heads(tokens, v, c, key_width=d_k and int(d_k))
    limits = attention.large_tokens(tokens, v)
    return head._asdict() | {
        "Rx": head.R_cross,
        "annealed_exp_v_over_T": limits.annealed,
        "frozen_1_minus_sqrt_2lnT_over_v": limits.frozen,
        "entropy_lnT_minus_half_v": limits.entropy,
    }


@answers("uniform_attention")
def _uniform(tokens, rho, ov, q):
    tokens, rho, ov, q = int(tokens), _number(rho), _number(ov), _number(q)
    one = attention.layer(tokens, q, rho, kappa=0.0, ov=ov)
    return {
        "q": one.q,
        "off_diagonal": one.off_diagonal,
        "gradient": one.value + one.score,
        "gradient_off_diagonal": one.value_cross + one.score_cross,
        "gradient_common_mode": one.value + (tokens - 1) * one.value_cross,
        "R": gaussian.softmax_rows(tokens, 0.0).R,
    }


@answers("stack_two_tokens")
def _stack(tokens, norm, sublayers, rho0, q0, kappa, ov, ffn):
    sublayers = int(sublayers)
    walk = attention.walk(
        int(tokens),
        sublayers,
        norm=norm,
        kappa=_number(kappa),
        ov=_number(ov),
        feed_forward=None if ffn == "none" else attention.FeedForward(),
        q=_number(q0),
        correlation=_number(rho0),
    )
    return {
        "after": {
            str(n): {"q": walk.q[n], "correlation": walk.correlation[n]}
            for n in range(sublayers + 1)
        },
        "log_gradient_variance_at_input": walk.log_gradient_variance[0],
        "gradient_correlation_at_input": walk.gradient_correlation[0],
    }


@answers("pre_norm_growth")
def _growth(branch_second_moment, sublayers, q0):
    ask = functools.partial(
        attention.pre_norm_growth, int(sublayers), _number(branch_second_moment), _number(q0)
    )
    plain = ask()
    return {
        "q": plain.q[-1],
        "gradient_growth": plain.gradient[0],
        "q_layernorm_scaling": ask(scaled=True).q[-1],
    }


@answers("initial_scores")
def _initial(d, std, **_):
    scores = attention.initial_scores(int(d), _number(std))
    return {
        "sigma_q2": scores.sigma_q2,
        "v": scores.kappa,
        "entropy_drop_half_v": scores.entropy_drop,
        "tokens_where_frozen": scores.tokens_where_frozen,
    }


@answers("rem_post_norm")
def _random_energy(beta, p0, sigma_w2, sigma_b2, alpha_attention, alpha_mlp, **_):
    after = attention.random_energy_walk(
        _number(beta),
        20,
        correlation=_number(p0),
        sigma_w2=_number(sigma_w2),
        sigma_b2=_number(sigma_b2),
        branches=(_number(alpha_attention), _number(alpha_mlp)),
    )
    return {
        "beta_c_at_start": math.sqrt(2 / (1 - _number(p0))),
        "correlation_after": {str(n): after[n] for n in range(21)},
    }


def _number(text):
    return float(Fraction(text))


def compare(found, expected, where):
    for name, value in expected.items():
        if isinstance(value, dict):
            compare(found[name], value, f"{where}, {name}")
        else:
            np.testing.assert_allclose(
                float(found[name]), float(value), rtol=PROMISED, err_msg=f"{where}: {name}"
            )


# Of a finite key width there is a row of scores for each of 50 variances.
_SLOW = "head_averages_finite_key"


@pytest.mark.medium
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] * (f == _SLOW)) for f in FAMILIES],
)
def test_table_12(family, load_reference):
    rows = [row for row in load_reference("t12_attention") if row["inputs"]["family"] == family]
    assert rows
    for row in rows:
        given = {name: value for name, value in row["inputs"].items() if name != "family"}
        given = {"tokens": given.pop("T"), **given} if "T" in given else given
        given.pop("name", None)
        compare(FAMILIES[family](**given), row["values"], row["id"])


@pytest.mark.parametrize("number", range(5))
def test_two_tokens_of_table_12(number, load_reference):
    """Their second moments are equal in three of the rows."""
    row = load_reference("t12_attention")[number]
    given, expected = row["inputs"], {k: float(v) for k, v in row["values"].items()}
    if given["S11"] != given["S22"]:
        pytest.skip("tokens are not exchangeable")
    q, both = _number(given["S11"]), _number(given["S12"])
    one = attention.layer(2, q, both / q, kappa=_number(given["kappa"]), ov=_number(given["ov"]))
    found = {
        "S11": one.q,
        "S22": one.q,
        "S12": one.off_diagonal,
        "value_11": one.value,
        "value_12": one.value_cross,
        "value_22": one.value,
        "score_11": one.score,
        "score_12": one.score_cross,
        "score_22": one.score,
    }
    compare(found, expected, row["id"])


# P, E tr M² and the entropy by Laplace integrals in 30 digits (mpmath), from other formulas.
INDEPENDENT = [
    (2, 0.01, 0.50247534784861075507, 0.24754279619981740152, 0.69066572526873075727),
    (10, 0.5, 0.14755042442600006692, 0.11077334061261849358, 2.0954849939672715932),
    (100, 2.0, 0.053147858543392521908, 0.040743531369680177152, 3.6838613347668576413),
    (1000, 30.0, 0.43644660758937156662, 0.093160959927643054332, 1.4996893358716004617),
    (100000, 1.0, 2.7180746759961614341e-05, 2.7177470586657140566e-05, 11.012944054550718868),
]


@pytest.mark.medium
@pytest.mark.parametrize(("tokens", "v", "p", "r", "entropy"), INDEPENDENT)
def test_one_row_in_30_digits(tokens, v, p, r, entropy):
    rows = gaussian.softmax_rows(tokens, v, 0.5)
    found = {"P": rows.P, "R": rows.R, "entropy": gaussian.softmax_entropy(tokens, v)}
    compare(found, {"P": p, "R": r, "entropy": entropy}, (tokens, v))


@pytest.mark.parametrize("v", [0.3, 3.0])
def test_the_largest_of_two_weights(v):
    """It is (1 + E tanh|u/2|)/2, with u ~ N(0, 2 v) the difference of two scores."""
    x, weight = np.polynomial.legendre.leggauss(200)
    u = 6.5 * (x + 1)
    density = 13 * weight / 2 * np.exp(-(u**2) / 2) / math.sqrt(math.pi / 2)
    expected = (1 + density @ np.tanh(u * math.sqrt(2 * v) / 2)) / 2
    np.testing.assert_allclose(gaussian.softmax_largest(2, v), expected, rtol=PROMISED)


def test_weights_without_scores_are_uniform():
    rows = gaussian.softmax_rows(7, 0.0, 0.4)
    found = (*rows, gaussian.softmax_entropy(7, 0.0), gaussian.softmax_largest(7, 0.0))
    expected = (1 / 7, 1 / 7, 0, 6 / 49, 6 / 49, math.log(7), 1 / 7)
    np.testing.assert_allclose(found, expected, rtol=PROMISED)


def test_one_token_has_all_the_weight():
    rows = gaussian.softmax_rows(1, 3.0, 0.4)
    found = (*rows, gaussian.softmax_entropy(1, 3.0), gaussian.softmax_largest(1, 3.0))
    np.testing.assert_allclose(found, [1, 1, 0, 0, 0, 0, 1], rtol=PROMISED, atol=1e-14)


def test_independent_rows_meet_as_at_random_and_equal_ones_as_one():
    apart = gaussian.softmax_rows(5, 1.0, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(apart.C, [apart.P[0], 1 / 5], rtol=PROMISED)
    np.testing.assert_allclose(apart.R_cross[0], apart.R[0], rtol=PROMISED)
    assert apart.gap[0] == 0


@pytest.mark.parametrize(("v", "apart"), [(1e-40, 0.3), (1e-8, 1e-8), (0.1, 1e-15)])
def test_a_small_gap_has_all_its_digits(v, apart):
    """P - C tends to v (1 - c) E tr M²."""
    rows = gaussian.softmax_rows(8, v, apart)
    np.testing.assert_allclose(rows.gap, v * apart * rows.R, rtol=PROMISED)


@pytest.mark.slow
@pytest.mark.parametrize(("v", "apart"), [(0.0, 0.3), (1.0, 0.0), (1.0, 0.2), (1.0, 1.25)])
def test_the_slope_in_the_correlation_is_the_jacobians(v, apart):
    """Price's theorem: ∂C/∂c = v E tr M M', up to the ends c = 1 and c = -1/(T - 1)."""
    slopes = jax.jacrev(gaussian.softmax_rows, (1, 2))(5, v, apart)
    rows = gaussian.softmax_rows(5, v, apart)
    np.testing.assert_allclose(-slopes.C[1], v * rows.R_cross, rtol=PROMISED, atol=1e-300)
    np.testing.assert_allclose(slopes.gap[1], v * rows.R_cross, rtol=PROMISED, atol=1e-300)
    at_0 = jax.jacfwd(gaussian.softmax_rows, 1)(5, 0.0, apart)
    np.testing.assert_allclose(at_0.P, 4 / 25, rtol=PROMISED)
    np.testing.assert_allclose(at_0.gap, apart * 4 / 25, rtol=PROMISED, atol=1e-300)


@pytest.mark.slow
@pytest.mark.parametrize("f", [gaussian.softmax_entropy, gaussian.softmax_largest])
def test_slopes_in_the_variance_are_those_of_differences(f):
    h = 1e-4
    of_differences = (f(20, 1 + h) - f(20, 1 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(f, 1)(20, 1.0), of_differences, rtol=1e-7)


def test_averages_of_float32():
    rows = gaussian.softmax_rows(8, jnp.float32(1.0), jnp.float32(0.7))
    expected = (0.2323134472323708826, 0.15214058506153691336)
    np.testing.assert_allclose((rows.P, rows.C), expected, rtol=SINGLE)
    if not jax.config.jax_enable_x64:
        assert rows.P.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gaussian.softmax_rows(0, 1.0), "tokens is 0"),
        (lambda: gaussian.softmax_rows(3, -1.0), "variance is -1.0"),
        (lambda: gaussian.softmax_rows(3, 1e5), "variance is 100000"),
        (lambda: gaussian.softmax_rows(3, 1.0, 1.6), "apart is 1.6"),
        (lambda: gaussian.softmax_entropy(3, math.nan), "variance is nan"),
        (lambda: attention.heads(3, 1.0, -0.6), "correlation is -0.6"),
        (lambda: attention.heads(3, 1.0, key_width=4), "key_width is given with 3 tokens"),
        (lambda: attention.heads(2, 500.0, key_width=1), "variance is 500"),
        (lambda: attention.layer(3, 1.0, kappa=1e9), "variance of scores"),
        (lambda: attention.walk(3, 4, norm="batch"), "unknown norm 'batch'"),
        (lambda: attention.walk(3, 4, branch=np.ones(2)), "branch has shape"),
        (lambda: attention.pre_norm_growth(3, q=0.0), "q is 0"),
        (lambda: attention.initial_scores(8, -0.1), "weight_sd is -0.1"),
        (lambda: attention.random_energy_walk(0.0, 3, correlation=0, sigma_w2=1), "beta is 0"),
    ],
)
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_ranks_collapse_as_a_cube():
    """Dong et al. 2021, sharp: s' = ov κ (T - 1)/T² s³ to first order."""
    spreads = np.array([float(attention.layer(8, 1.0, 1 - s).spread) for s in (1e-2, 1e-4)])
    np.testing.assert_allclose(spreads, 7 / 64 * np.array([1e-6, 1e-12]), rtol=1e-2)
    np.testing.assert_allclose(attention.layer(8, 1.0, 0.5).spread, 0.0148904294671190, rtol=1e-12)


def test_the_common_part_of_a_gradient_is_kept_by_values_and_not_made_by_scores():
    one = attention.layer(6, 1.3, 0.2, kappa=2.0, ov=0.7)
    np.testing.assert_allclose(one.value + 5 * one.value_cross, 0.7, rtol=PROMISED)
    np.testing.assert_allclose(one.score + 5 * one.score_cross, 0.7 * 2 * _own(one), rtol=PROMISED)


def _own(one):
    """What the score path's queries give a token: R s²."""
    return gaussian.softmax_rows(6, one.variance, 0.8).R * (1.3 * 0.8) ** 2


def test_post_norm_halves_twice_what_tells_tokens_apart():
    """Attention by 1/(1 + ov), He's ReLU sublayer by 2/2 of its own: 1/4 in two layers of both."""
    walk = attention.walk(8, 120, norm="post", correlation=0.2)
    by_two_layers = walk.apart[100] / walk.apart[96]
    np.testing.assert_allclose(by_two_layers, 1 / 4, rtol=1e-4)
    assert 0 < walk.apart[-1] < 1e-16


def gradients(*arguments, at, **options):
    walk = attention.walk(*arguments, **options)
    return [float(np.exp(walk.log_gradient_variance[n])) for n in at]


# Section 4's theory, computed independently and confirmed by simulation.
def test_depth_without_skips():
    walk = attention.walk(8, 2, norm="none", stream=0.0, correlation=0.2, feed_forward=None)
    np.testing.assert_allclose(walk.q[1], 0.3699, atol=5e-5)
    np.testing.assert_allclose(walk.q[1] * walk.correlation[1], 0.3118, atol=5e-5)


@pytest.mark.medium
def test_depth_with_norms():
    pre = attention.walk(8, 24, correlation=0.2)
    np.testing.assert_allclose(pre.q[jnp.array([24, 12])], [21.62, 10.74], atol=5e-3)
    off_diagonal = (pre.q * pre.correlation)[jnp.array([24, 12])]
    np.testing.assert_allclose(off_diagonal, [17.76, 7.953], rtol=3e-4)
    np.testing.assert_allclose(gradients(8, 24, correlation=0.2, at=(12, 0)), [1.585, 15.06], 4e-4)
    attention_only = gradients(8, 24, correlation=0.2, feed_forward=None, at=(0,))
    np.testing.assert_allclose(attention_only, [13.99], atol=5e-3)
    post = attention.walk(8, 24, norm="post", correlation=0.2)
    np.testing.assert_allclose(post.correlation[jnp.array([4, 20])], [0.6675, 0.99854], atol=5e-5)
    post = gradients(8, 24, norm="post", correlation=0.2, at=(4, 20))
    np.testing.assert_allclose(post, [0.1840, 0.3441], atol=5e-5)
    post = gradients(16, 24, norm="post", kappa=4.0, correlation=0.2, at=(0, 8))
    np.testing.assert_allclose(post, [0.4720, 0.1044], atol=5e-5)


# What people ask, and the number to answer with: each by one call, or three lines.
def test_post_norm_with_xavier_makes_tokens_alike():
    """pytorch#55270: 20 sublayers on, ρ = 0.9985; most of a gradient is common to all tokens."""
    walk = attention.walk(8, 24, norm="post", correlation=0.2)
    np.testing.assert_allclose(walk.correlation[20], 0.9985, atol=5e-5)
    assert walk.common_share[0] > 0.5 > walk.common_share[-1] == 1 / 8


def test_one_packed_matrix_of_queries_keys_and_values_divides_kappa_by_4():
    """pytorch#166378: Xavier's variance of it is 2/(4 d), and not 1/d."""
    packed, apart = (attention.initial_scores(512, math.sqrt(x / 512)).kappa for x in (2 / 4, 1.0))
    np.testing.assert_allclose([packed, apart], [1 / 4, 1], rtol=PROMISED)


@pytest.mark.medium
def test_gpt2_without_its_scaling():
    """transformers#47458: gradients of embeddings, against the top: 98.6 with it, else 3544."""

    def gradient(tokens, scaling, q):
        sigma2 = 768 * 0.02**2
        feed_forward = attention.FeedForward(
            "gelu", math.sqrt(sigma2), math.sqrt(4 * sigma2 / scaling)
        )
        ov = sigma2**2 / scaling
        return gradients(
            tokens, 24, kappa=sigma2**2, ov=ov, feed_forward=feed_forward, q=q, at=(0,)
        )[0]

    cases = [(32, 24.0, 8e-4), (1024, 24.0, 8e-4), (32, 1.0, 8e-4), (1024, 1.0, 8e-4)]
    found = [gradient(*case) for case in (*cases, (32, 24.0, 1.0))]
    np.testing.assert_allclose(found, [98.6, 79.6, 3544, 2095, 1.07], rtol=2e-3)


def test_pre_norm_never_normalises_the_stream():
    """minGPT#134: gradients grow by q_L/q_0."""
    growth = attention.pre_norm_growth(24)
    np.testing.assert_allclose((growth.q[-1], growth.gradient[0]), (25, 25), rtol=PROMISED)


def test_branches_of_0_pass_gradients_as_they_are():
    """modded-nanogpt#10: χ = 1 with projections of 0."""
    walk = attention.walk(8, 24, branch=0.0)
    np.testing.assert_array_equal(walk.log_gradient_variance, np.zeros(25))


@pytest.mark.parametrize(("v", "bits"), [(256.0, 0.428), (1.0, 6.298)])
def test_entropy_of_normalised_queries_and_keys_with_a_scale_of_1(v, bits):
    """transformers#45676: they measured 0.433 and 6.300 bits, of 128 tokens."""
    entropy = gaussian.softmax_entropy(128, v) / math.log(2)
    np.testing.assert_allclose(entropy, bits, atol=5e-4)


def test_a_scale_of_the_whole_width_divides_variances_by_the_heads():
    """vit-pytorch#65: d^-1/2 for d_k^-1/2, with 8 heads; NTK4A#3: 1/d_k, of 64, of free weights."""
    plain, whole, linear = (
        attention.layer(16, 1.0, kappa=k).variance for k in (1.0, 1.0 / 8, 1.0 / 64)
    )
    np.testing.assert_allclose([whole / plain, linear / plain], [1 / 8, 1 / 64], rtol=PROMISED)
    without = attention.layer(16, 1.0, kappa=0.0)
    assert without.score == 0
    np.testing.assert_allclose(without.value, 1 / 16, rtol=PROMISED)


def test_what_foretells_no_spike_but_tells_growth():
    """OLMo#560: v of every sublayer, q_0/q_L and a gradient's growth."""
    walk = attention.walk(8, 24, correlation=0.2)
    assert np.all(np.diff(walk.variance[::2]) < 0)
    assert np.all(np.isnan(walk.variance[1::2]))
    np.testing.assert_allclose(walk.q[0] / walk.q[-1], 1 / 21.62, rtol=1e-3)


@pytest.mark.medium
def test_the_command_answers_in_tables_and_in_json(tmp_path):
    done = commands.run("attention", "--tokens", "128", "--kappa", "256", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "entropy, in bits" in done.stdout
    assert "0.42765" in done.stdout
    options = ["--tokens", "8", "--correlation", "0.2", "--norm", "post", "--sublayers", "24"]
    done = commands.run("attention", *options, "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    np.testing.assert_allclose(report["layer"]["q"], 0.3698981465, rtol=1e-9)
    assert len(report["sublayers"]) == 25
    np.testing.assert_allclose(report["sublayers"][20]["correlation"], 0.99854446, rtol=1e-8)
    np.testing.assert_allclose(report["sublayers"][20]["gradient_variance"], 0.34411064, rtol=1e-7)
    assert report["sublayers"][0]["variance"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--norm", "post"], "means nothing without --sublayers"),
        (["--kappa", "-1"], "kappa is -1.0; it is a finite number, 0 or more"),
        (["--kappa", "1e9"], "it is at most 1024"),
        (["--tokens", "0"], "tokens is 0; it is a whole number of at least 1"),
        (["--tokens", "8", "--correlation", "-0.5"], "correlation is -0.5; that of 8 exchangeable"),
        (["--sublayers", "4", "--norm", "batch"], "unknown norm 'batch'"),
        (["--sublayers", "-1"], "sublayers is -1"),
    ],
)
def test_wrong_options_are_one_sentence(options, says, tmp_path):
    done = commands.run("attention", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
