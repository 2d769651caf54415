"""Attention: what it computes, reference table 12, and the theory's averages over random heads."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from laws import smallest_p_value

from gradflow import builders, statistics
from gradflow.blocks import (
    Attention,
    Chain,
    Dense,
    Linear,
    Residual,
    RMSNorm,
    _exact_heads,
    _heads,
    _rotary,
)
from gradflow.blocks._heads import Moments
from gradflow.errors import InputError, NoTheory
from gradflow.kernels import Kernel
from gradflow.simulation import monte_carlo
from gradflow.theory import float64, mean_field

TABLE = 1e-9
ROUNDING = 2e-5 if jnp.zeros(()).dtype == jnp.float32 else 1e-11


def rows_of(load_reference, family):
    rows = [row for row in load_reference("t12_attention") if row["inputs"]["family"] == family]
    assert rows
    for row in rows:
        given = {
            name: float(Fraction(x)) for name, x in row["inputs"].items() if x[:1] in "-0123456789"
        }
        yield row["inputs"] | given, row["values"]


def two_tokens(given):
    return jnp.array([[given["S11"], given["S12"]], [given["S12"], given["S22"]]])


def scaled(tokens, given, **options):
    """The block with κ and ov."""
    sigma_q, sigma_v = given.get("kappa", 1.0) ** 0.5, given.get("ov", 1.0) ** 0.5
    return Attention(int(tokens), sigma_q=sigma_q, sigma_v=sigma_v, **options)


def second_moments(block, k):
    return block.kernel(Kernel.of(k)).covariance


def pulled_back(block, k, above):
    """Second moments Λ of a gradient, below the block."""

    def out(tangent):
        return block.kernel(Kernel.of(k, tangent=tangent)).tangent

    below = jax.vjp(out, jnp.zeros_like(k))[1](above)[0]
    return (below + below.T) / 2


def random_gram(sites, seed=0):
    x = np.random.default_rng(seed).normal(size=(sites, 2 * sites))
    return jnp.asarray(x @ x.T / (2 * sites))


def alike(tokens, rho, q=1.0):
    return q * (rho + (1 - rho) * jnp.eye(tokens))


@pytest.mark.usefixtures("x64_only")
class TestTable12:
    def test_two_tokens(self, load_reference):
        def found(given):
            k, block = two_tokens(given), scaled(2, given)
            moments = Moments(given["kappa"] * k, k, given["ov"] * k)

            def value(tangent):
                return _exact_heads.of_two_tokens(
                    moments, Moments(0 * k, 0 * k, tangent), np.ones((2, 2), bool)
                ).tangent

            down = jax.vjp(value, jnp.zeros((2, 2)))[1](jnp.eye(2))[0]
            return second_moments(block, k), pulled_back(block, k, jnp.eye(2)), down

        for given, values in rows_of(load_reference, "two_tokens"):
            k, down, value = found(given)
            for (a, b), name in (((0, 0), "11"), ((0, 1), "12"), ((1, 1), "22")):
                assert float(k[a, b]) == pytest.approx(float(values[f"S{name}"]), rel=TABLE)
                expected = [float(values[f"{path}_{name}"]) for path in ("value", "score")]
                assert float(value[a, b]) == pytest.approx(expected[0], rel=TABLE)
                assert float((down - value)[a, b]) == pytest.approx(expected[1], rel=TABLE)

    def test_two_tokens_of_which_one_sees_itself_alone(self, load_reference):
        for given, values in rows_of(load_reference, "two_tokens_causal"):
            k = second_moments(scaled(2, given, mask="causal"), two_tokens(given))
            for (a, b), name in (((0, 0), "S11"), ((0, 1), "S12"), ((1, 1), "S22")):
                assert float(k[a, b]) == pytest.approx(float(values[name]), rel=TABLE)

    @pytest.mark.medium
    def test_exchangeable_tokens(self, load_reference):
        """q' = q ρ + s P and o' = q ρ + s C; the score path has R and R×."""
        for given, values in rows_of(load_reference, "head_averages"):
            tokens, c = int(given["T"]), given["c"]
            if tokens not in (3, 16):
                continue
            k = alike(tokens, c)
            moments = Moments(given["v"] / (1 - c) * k, k, k)
            assert _exact_heads.are_alike(moments, tokens)
            queries = Moments(jnp.ones_like(k), 0 * k, 0 * k)
            found = jax.jit(_exact_heads.of_tokens_alike, static_argnums=2)(
                moments, queries, tokens
            )
            s = 1 - c
            for name, value in (
                ("P", (found.covariance[0, 0] - c) / s),
                ("C", (found.covariance[0, 1] - c) / s),
                ("R", found.tangent[0, 0] / s**2),
                ("Rx", found.tangent[0, 1] / s**2),
            ):
                assert float(value) == pytest.approx(float(values[name]), rel=TABLE), (given, name)

    @pytest.mark.medium
    def test_a_finite_key_width(self, load_reference):
        """Null: fixed heads are off by their standard error; of 6 numbers, false alarms 4e-4."""
        for given, values in rows_of(load_reference, "head_averages_finite_key"):
            c, width = given["c"], int(given["d_k"])
            kappa = given["v"] / (1 - c)
            block = scaled(2, {"kappa": kappa}, key_width=width, finite_key_width=True)
            kernel = Kernel.of(alike(2, c))
            k, error = second_moments(block, kernel.covariance), block.average_error(kernel)
            for b, name in ((0, "P"), (1, "C")):
                expected = c + (1 - c) * float(values[name])
                assert float(abs(k[0, b] - expected)) < 4 * float(error[0, b]) < 3e-3

    def test_uniform_attention(self, load_reference):
        for given, values in rows_of(load_reference, "uniform_attention"):
            tokens = int(given["T"])
            if tokens > 100:
                continue
            block, k = scaled(tokens, given, scale="linear"), alike(tokens, given["rho"])
            after, down = second_moments(block, k), pulled_back(block, k, jnp.eye(tokens))
            for found, name in (
                (after[0, 0], "q"),
                (after[0, 1], "off_diagonal"),
                (down[0, 0], "gradient"),
                (down[0, 1], "gradient_off_diagonal"),
                (jnp.sum(down) / tokens, "gradient_common_mode"),
            ):
                assert float(found) == pytest.approx(float(values[name]), rel=TABLE)

    def test_uniform_causal_attention(self, load_reference):
        for given, values in rows_of(load_reference, "causal_uniform"):
            tokens = int(given["T"])
            block = scaled(tokens, given, scale="linear", mask="causal")
            k, down = alike(tokens, given["rho"]), jnp.eye(tokens)
            for _ in range(int(given["layers"])):
                k, down = second_moments(block, k), pulled_back(block, k, down)
            for found, name in (
                (k[0, 0], "q_first"),
                (k[-1, -1], "q_last"),
                (k[0, -1], "S_first_last"),
                (jnp.trace(k) / tokens, "q_mean"),
                (down[0, 0], "gradient_first"),
                (down[-1, -1], "gradient_last"),
                (jnp.trace(down), "gradient_trace"),
            ):
                assert float(found) == pytest.approx(float(values[name]), rel=TABLE)

    @pytest.mark.medium
    def test_stacks_of_two_tokens(self, load_reference):
        """Layers of attention and a ReLU network, or of attention alone, with norms."""
        for given, values in rows_of(load_reference, "stack_two_tokens"):
            norm, networks = RMSNorm(), "relu" in given["ffn"]
            sublayers = [scaled(2, given, units=8)]
            if networks:
                sublayers += [Chain((Linear(8, 2**0.5), Dense("relu", 8)))]
            if given["norm"] == "pre":
                parts = [Residual(Chain((norm, branch))) for branch in sublayers]
            else:
                parts = [Chain((Residual(branch), norm)) for branch in sublayers]
            layers = 24 // len(parts)
            # The norm in front leaves inputs of q = 1 as they are.
            network = builders.stack(8, [norm, (Chain(tuple(parts)), layers)])
            found = jax.jit(mean_field.predict)(network, alike(2, given["rho0"]))
            for after, expected in values["after"].items():
                layer, rest = divmod(int(after), len(parts))
                if not rest:
                    for name in ("q", "correlation"):
                        assert float(found[name][layer]) == pytest.approx(
                            float(expected[name]), rel=TABLE
                        )
            assert float(found["log_gradient_variance"][0]) == pytest.approx(
                float(values["log_gradient_variance_at_input"]), rel=1e-8
            )


class TestSumRules:
    def test_rows_of_weights_sum_to_1(self, key):
        x = jax.random.normal(key, (10, 6))
        for options in ({}, {"mask": "causal"}, {"mask": (True, False, True, True, False)}):
            block = Attention(5, 2, 6, **options)
            weights = block.weights(x, drawn_product, key)
            assert weights.shape == (2, 2, 5, 5)
            np.testing.assert_allclose(weights.sum(-1), 1, rtol=ROUNDING)
            assert (np.asarray(weights)[:, :, ~block._seen] == 0).all()

    @pytest.mark.medium
    def test_values_keep_the_gradient_that_tokens_have_in_common(self):
        """1ᵀΛ1, times ov, whatever the tokens' second moments and the mask are."""
        k = random_gram(4)
        moments = Moments(k, k, k)
        for seen in (np.ones((4, 4), bool), np.tril(np.ones((4, 4), bool))):
            offsets = jnp.where(jnp.asarray(seen), 0, -jnp.inf)[None].astype(k.dtype)

            def value(tangent, offsets=offsets):
                return _heads.average(moments, Moments(0 * k, 0 * k, tangent), offsets).tangent

            above = random_gram(4, seed=1)
            down = jax.jit(jax.vjp(value, jnp.zeros_like(k))[1])(above)[0]
            np.testing.assert_allclose(down.sum(), above.sum(), rtol=1e3 * ROUNDING)

    @pytest.mark.medium
    @pytest.mark.usefixtures("x64_only")
    def test_tokens_become_alike_by_the_cube(self):
        """s' = ov κ (T-1)/T² s³ of s = q (1-ρ), as s → 0: at T = 8, s = 1/2 .01489 and .01367."""
        block = Attention(8)
        apart = jax.jit(lambda s: second_moments(block, 1 - s + s * jnp.eye(8)))
        k = apart(0.5)
        assert float(k[0, 0] - k[0, 1]) == pytest.approx(0.01489, abs=5e-6)
        for s in (1e-2, 1e-3):
            k = apart(s)
            assert float(k[0, 0] - k[0, 1]) == pytest.approx(7 / 64 * s**3, rel=2 * s)


class TestFixedHeads:
    @pytest.mark.medium
    def test_they_are_as_exact_as_they_say(self):
        """Beside the integrals. Null: errors of one standard deviation; false alarms 1 %."""
        two = random_gram(4)
        cases = [
            (
                Moments(two, two, two),
                lambda m, t: _exact_heads.of_two_tokens(m, t, np.ones((2, 2), bool)),
                2,
            ),
            (Moments(*[alike(5, 0.3)] * 3), lambda m, t: _exact_heads.of_tokens_alike(m, t, 5), 5),
        ]
        for moments, exact, tokens in cases:
            offsets = jnp.zeros((1, tokens, tokens), two.dtype)
            found = jax.jit(_heads.average)(moments, moments, offsets)
            expected = jax.jit(exact)(moments, moments)
            away = np.asarray((found.covariance - expected.covariance) / found.error)
            several = away[np.triu_indices(len(away))]
            assert np.abs(several).max() < scipy.stats.norm.isf(0.0025 / len(several))
            assert 0 < float(found.error.max()) < 2e-3
            assert not np.asarray(expected.error).any()
            np.testing.assert_allclose(found.tangent, expected.tangent, atol=5e-3)

    @pytest.mark.medium
    def test_heads_of_several_inputs_are_one_law(self):
        """Alike tokens of two inputs that have something in common, beside the integrals."""
        apart = jnp.kron(jnp.diag(jnp.array([1.0, 0.5])), alike(3, 0.4))
        k = apart + 0.2 * jnp.kron(1 - jnp.eye(2), jnp.ones((3, 3)))
        moments, tangents = Moments(k, k, k), Moments(*(random_gram(6, n) for n in range(3)))
        assert _exact_heads.are_alike(moments, 3)
        assert not _exact_heads.are_alike(tangents, 3)
        found = jax.jit(_heads.average)(moments, tangents, jnp.zeros((1, 3, 3), k.dtype))
        expected = _exact_heads.of_tokens_alike(moments, tangents, 3)
        np.testing.assert_allclose(found.covariance, expected.covariance, atol=2e-3)
        np.testing.assert_allclose(found.tangent, expected.tangent, atol=4e-3)

    @pytest.mark.medium
    @pytest.mark.usefixtures("x64_only")
    def test_derivatives_and_both_precisions(self):
        """By σ_q, of a mask with nothing to see: finite, and a difference quotient."""
        k = random_gram(3)

        @jax.jit
        def mean(sigma_q):
            return second_moments(Attention(3, sigma_q=sigma_q, mask="causal"), k).sum()

        slope, step = float(jax.jit(jax.grad(mean))(1.3)), 1e-5
        assert slope == pytest.approx(float(mean(1.3 + step) - mean(1.3 - step)) / 2e-5, rel=1e-6)
        short = second_moments(Attention(3, sigma_q=1.3, mask="causal"), k.astype(jnp.float32))
        assert short.dtype == jnp.float32
        assert float(short.sum()) == pytest.approx(float(mean(1.3)), rel=1e-5)

    @pytest.mark.medium
    def test_rotary_scores_of_identical_tokens(self):
        """They differ all the same: P = .141 for 8 tokens of 64 units a key, and not 1/8."""
        ones = jnp.ones((8, 8))
        path = Moments(0 * ones, 0 * ones, jnp.eye(8))
        turns = _rotary.turns(64, 8)
        offsets = jnp.zeros((1, 8, 8), ones.dtype)
        found = jax.jit(lambda m, t: _heads.average(m, t, offsets, None, turns))
        p = np.diagonal(found(Moments(ones, ones, ones), path).tangent)
        np.testing.assert_allclose(p, 0.1414, atol=3e-4)

    @pytest.mark.medium
    def test_networks_of_few_heads_differ(self):
        """By 0.195 of q' = 0.4777, over √H, at 16 tokens of ρ = 0.3 and κ = 4."""
        block = scaled(16, {"kappa": 4.0}, heads=4)
        spread = jax.jit(block.spread_between_networks)(Kernel.of(alike(16, 0.3)))[0, 0]
        assert float(2 * spread / 0.4777) == pytest.approx(0.195, rel=0.03)

    def test_a_root_of_what_has_none_left(self):
        """Of tokens that are the same: their root has one column."""
        k = jnp.kron(random_gram(2), jnp.ones((2, 2)))
        root = _heads.root(k)
        np.testing.assert_allclose(root @ root.T, k, atol=ROUNDING)
        assert (np.asarray(root)[:, [1, 3]] == 0).all()


def heads_of(block, k, tangent, heads, seed=0):
    """Second moments after each of some random heads, of signals and a tangent; by NumPy."""
    draw, sites, width = np.random.default_rng(seed), len(k), block._widths[0]
    place, own = np.arange(sites) % block.tokens, np.arange(sites) // block.tokens
    roots = [np.linalg.cholesky(x) for x in (k, k, tangent, tangent)]
    x = [root @ draw.normal(size=(heads, sites, width)) for root in roots]
    if block.qk_norm:
        for n in (0, 1):
            size = np.sqrt(np.mean(x[n] ** 2, axis=-1, keepdims=True))
            x[n] /= size
            x[n + 2] = (x[n + 2] - x[n] * np.mean(x[n] * x[n + 2], axis=-1, keepdims=True)) / size
    if block.positions == "rotary":
        turn = np.exp(1j * place[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width))
        turned = [(y[..., : width // 2] + 1j * y[..., width // 2 :]) * turn for y in x]
        x = [np.concatenate([y.real, y.imag], -1) for y in turned]
    q, key, dq, dkey = x
    factor = {"sqrt": width**-0.5, "linear": 1 / width}.get(block.scale, block.scale)
    scores = factor * q @ key.swapaxes(1, 2)
    moved = factor * (dq @ key.swapaxes(1, 2) + q @ dkey.swapaxes(1, 2))
    if block.positions == "alibi":
        slope = 2.0 ** (-8 * (1 + np.arange(heads) % block.heads) / block.heads)
        scores -= slope[:, None, None] * np.abs(np.subtract.outer(place, place))
    seen = (own[:, None] == own[None]) & block._seen[place][:, place]
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    weights /= weights.sum(-1, keepdims=True)
    change = weights * (moved - np.sum(weights * moved, axis=-1, keepdims=True))

    def through(a, k):
        return a @ k @ a.swapaxes(1, 2)

    return through(weights, k), through(weights, tangent) + through(change, k)


# Key widths that are as good as infinite beside 4000 heads, or what the theory is told.
OPTIONS = {
    "several inputs": {"key_width": 256},
    "causal": {"key_width": 256, "mask": "causal"},
    "ALiBi": {"key_width": 256, "heads": 2, "positions": "alibi"},
    "rotary": {"key_width": 256, "positions": "rotary"},
    "normalised": {"key_width": 256, "qk_norm": "rms", "scale": 0.1},
    "3 units a key": {"key_width": 3, "finite_key_width": True, "mask": "causal"},
    "2 units a key, 1/d_k": {"key_width": 2, "finite_key_width": True, "scale": "linear"},
}


@pytest.mark.medium
@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_theory_is_what_random_heads_are(options):
    """Null: 4000 random heads have the theory's means. False alarms: 1 % of all numbers' maxima.

    The theory's own fixed heads add their error, of tangents that of so many random heads.
    """
    block = Attention(3, **options)
    k, tangent = random_gram(6), random_gram(6, seed=1)
    kernel, heads = Kernel.of(k, tangent=tangent), 4000
    found = jax.jit(block.kernel)(kernel)
    error = np.asarray(jax.jit(block.average_error)(kernel))
    drawn = heads_of(block, np.asarray(k), np.asarray(tangent), heads)
    pairs = np.triu_indices(6)
    limit = scipy.stats.norm.isf(0.005 / (2 * len(OPTIONS) * len(pairs[0])))
    for value, several in zip((found.covariance, found.tangent), drawn, strict=True):
        spread = several.std(axis=0) / heads**0.5
        both = np.hypot(spread, error if value is found.covariance else spread / 2**0.5)
        away = (several.mean(axis=0) - np.asarray(value)) / (both + 1e-12)
        assert np.abs(away[pairs]).max() < limit


def drawn_product(key, x, *, sigma_w, width, distribution):
    return x @ drawn_weights(key, x.shape[1], sigma_w, width, distribution).T


def drawn_weights(key, fan_in, sigma_w, width, distribution):
    return sigma_w * distribution.draw(key, (width, fan_in), float) / fan_in**0.5


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": "causal"}, {"key_heads": 2, "scale": 0.3, "value_width": 5}],
    ids=["plain", "causal", "shared keys"],
)
def test_it_is_the_attention_of_jax(options, key):
    """`jax.nn.dot_product_attention` of the same weights, in a head or in all."""
    tokens, heads, width = 5, 4, 3
    block = Attention(tokens, heads, 7, width, sigma_q=1.5, sigma_o=0.7, **options)
    x, matrices = jax.random.normal(key, (2 * tokens, 6)), []

    def multiply(key, x, **law):
        matrices.append(drawn_weights(key, x.shape[1], **law))
        return x @ matrices[-1].T

    out = block.apply(x, multiply, key)
    assert tuple(m.shape for m in matrices) == block.shapes(6)
    q, k, v = (
        (x @ m.T).reshape(2, tokens, -1, d)
        for m, d in zip(matrices, (width, width, block.value_width or width), strict=False)
    )
    # It takes values as wide as keys.
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, 5)])
    q, k = (jnp.pad(y, [(0, 0)] * 3 + [(0, v.shape[-1] - width)]) for y in (q, k))
    expected = jax.nn.dot_product_attention(
        q, k, v, scale=block._factor, is_causal=block.mask == "causal"
    )[..., :-5]
    expected = expected.reshape(2 * tokens, -1) @ matrices[3].T
    np.testing.assert_allclose(out, expected, atol=2e-6)  # its softmax is of float32


def test_positions_and_norms_are_of_queries_and_keys(key):
    """Rotary scores depend on distances, norms take lengths away, and a key's bias goes away."""
    same = jnp.broadcast_to(jax.random.normal(key, (1, 6)), (4, 6))
    rotary = Attention(4, 2, 8, positions="rotary").weights(same, drawn_product, key)[0]
    logs = np.log(np.asarray(rotary))
    scores = logs - np.diagonal(logs, axis1=1, axis2=2)[..., None]
    np.testing.assert_allclose(scores[:, 0, 1], scores[:, 2, 3], rtol=1e3 * ROUNDING)
    assert np.abs(scores[:, 0, 1] - scores[:, 1, 0]).min() > 1e-3

    x = jax.random.normal(key, (4, 6))
    norm = Attention(4, 2, 8, qk_norm="layer")
    weights = [norm.weights(by * x, drawn_product, key) for by in (1, 5)]
    np.testing.assert_allclose(*weights, rtol=1e3 * ROUNDING)
    plain, biased = (Attention(4, 2, 8, bias_k=b) for b in (None, 2.0))
    weights = [block.weights(x, drawn_product, key) for block in (plain, biased)]
    np.testing.assert_allclose(*weights, rtol=1e3 * ROUNDING)
    tied = Attention(4, 1, 8, tied=True)
    scores = np.log(np.asarray(tied.weights(x, drawn_product, key)[0, 0]))
    scores -= scores.mean(axis=1, keepdims=True)  # of q · k, less a number for each row
    centred = scores - scores.mean(axis=0, keepdims=True)
    np.testing.assert_allclose(centred, centred.T, atol=1e2 * ROUNDING)
    assert len(tied.distributions) == len(tied.shapes(6)) == 3


def test_tied_queries_and_keys_over_their_width():
    """A = softmax(σ_q² Σ), one for all heads, and nothing moves it."""
    k = random_gram(3)
    block = Attention(3, tied=True, scale="linear", sigma_q=1.5)
    weights = jax.nn.softmax(1.5**2 * k, axis=-1)
    np.testing.assert_allclose(
        second_moments(block, k), weights @ k @ weights.T, rtol=1e2 * ROUNDING
    )
    np.testing.assert_allclose(
        pulled_back(block, k, jnp.eye(3)), weights.T @ weights, rtol=1e2 * ROUNDING
    )


def test_biases():
    """Of values and outputs they are common to tokens; of queries, they make scores larger."""
    k = random_gram(2)
    plain = second_moments(Attention(2), k)
    biased = second_moments(Attention(2, bias_v=0.5, bias_o=0.3, sigma_o=2.0, bias_k=4.0), k)
    np.testing.assert_allclose(biased, 4 * (plain + 0.25) + 0.09, rtol=1e2 * ROUNDING)
    asked = second_moments(Attention(2, bias_q=1.0), k)
    moments = Moments(k + 1, k, k)
    expected = _exact_heads.of_two_tokens(moments, None, np.ones((2, 2), bool)).covariance
    np.testing.assert_allclose(asked, expected, rtol=1e2 * ROUNDING)


def test_gradients_behind_a_mask(key):
    """None is NaN, the last token's output moves all, and the first one's itself alone."""
    block, x = Attention(3, 2, 8, mask="causal"), jax.random.normal(key, (3, 6))

    def output(x, token):
        return block.apply(x, drawn_product, key)[token].sum()

    for token in (0, 2):
        slope = np.abs(np.asarray(jax.grad(output)(x, token))).sum(axis=1)
        np.testing.assert_array_equal(slope > 0, np.arange(3) <= token)


# After so many sublayers, of 24: q or the correlation, and the gradient's variance.
STACKS = {
    "pre": {12: ("q", 10.74, 1.585), 24: ("q", 21.62, 1.0), 0: ("q", 1.0, 15.06)},
    "post": {4: ("correlation", 0.6675, 0.1840), 20: ("correlation", 0.99854, 0.3441)},
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64_only")
@pytest.mark.parametrize("position", STACKS)
def test_transformers_of_24_sublayers(position):
    """8 tokens of ρ = 0.2, 32 heads, ReLU networks: theory's numbers, and 10 networks of 512 units.

    Null: networks have the theory's means. False alarms: 1 %, shared by 10 numbers.
    """
    width, tokens, norm = 512, 8, RMSNorm()
    branches = (
        Attention(tokens, 32, width),
        Chain((Linear(4 * width, 2**0.5), Dense("relu", width))),
    )
    if position == "pre":
        layers = [Residual(Chain((norm, branch))) for branch in branches]
    else:
        layers = [Chain((Residual(branch), norm)) for branch in branches]
    network = builders.stack(width, [norm, (Chain(tuple(layers)), 12)])
    random = np.random.default_rng(0).normal(size=(width, tokens))
    x = np.linalg.cholesky(alike(tokens, 0.2)) @ np.linalg.qr(random)[0].T * width**0.5
    theory = float64.predict(network, x)
    found = monte_carlo.simulate(network, x.astype(np.float32), key=1, networks=10)
    for sublayers, (name, value, gradient) in STACKS[position].items():
        layer = sublayers // 2
        for statistic, expected in ((name, value), ("gradient_variance", gradient)):
            digits = 5e-6 if value == 0.99854 and statistic == name else 5e-4
            assert float(theory[statistic][layer]) == pytest.approx(expected, rel=digits)
            measured = found[statistic]
            away = float(measured.value[layer]) - expected
            limit = scipy.stats.t.isf(0.005 / 10, 9) * float(measured.standard_error[layer])
            assert abs(away) <= limit + 1e-5 * expected


@pytest.mark.slow
def test_both_samplers_draw_one_law():
    """Two layers of attention over 3 tokens of 2 inputs, in 6 units. False alarms: 0.1 %."""
    block = Chain((Attention(3, 2, 6, sigma_q=1.5, bias_q=0.3, bias_o=0.2), Dense("tanh", 6)))
    network = builders.stack(2, [Linear(6), (block, 2)])
    x = jax.random.normal(jax.random.key(5), (6, 2))
    wanted = (statistics.q, statistics.log_gradient_norm, statistics.weight_gradient_variance)

    def features(sampler, key):
        found = monte_carlo.simulate(
            network, x, key=key, networks=6000, sampler=sampler, wanted=wanted, keep_samples=True
        ).samples
        return np.concatenate([values[:, [0, 2]] for values in found.values()], axis=1)

    a, b = features("dense", 1), features("matrix_free", 2)
    assert smallest_p_value(a, b) > 1e-3
    # A negative control: 2 % more weight.
    assert smallest_p_value(a, b + 0.04) < 1e-3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(0), "tokens is 0; it is a whole number of at least 1"),
        (lambda: Attention(3, 8, key_heads=3), "key_heads is 3; it divides the number of heads, 8"),
        (lambda: Attention(3, tied=True, key_heads=2), "tied is True beside key_heads"),
        (lambda: Attention(3, scale="root"), "scale is 'root'; it is 'sqrt', 'linear' or a number"),
        (lambda: Attention(3, scale=0.0), "scale is 0.0; it is a finite number above 0"),
        (lambda: Attention(3, mask="future"), "mask is 'future'; it is None, 'causal', or says"),
        (lambda: Attention(3, mask=(True, False)), "3 of them, or 3 rows of these"),
        (lambda: Attention(3, mask=((True, True), (True,))), "3 of them, or 3 rows of these"),
        (lambda: Attention(2, mask=((True, True), (False, False))), "mask hides all tokens from"),
        (lambda: Attention(3, positions="sinusoidal"), "unknown positions 'sinusoidal'"),
        (lambda: Attention(3, qk_norm="l2"), "unknown qk_norm 'l2'; it is one of layer, rms"),
        (lambda: Attention(3, key_width=3, positions="rotary"), "key_width is 3; rotary positions"),
        (
            lambda: Attention(3).kernel(Kernel.of(jnp.eye(4))),
            "the signal has 4 sites, and tokens is 3; sites are inputs times tokens",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tied": True}, "grow like √d_k where a token meets itself"),
        (
            {"finite_key_width": True, "positions": "rotary", "key_width": 4},
            "rotary positions are known to the theory at infinite key width alone",
        ),
        ({"finite_key_width": True, "qk_norm": "rms"}, "normalised queries and keys are known"),
    ],
)
def test_what_no_theory_knows_says_why(options, reason):
    with pytest.raises(NoTheory, match=reason):
        Attention(3, **options).kernel(Kernel.of(jnp.eye(3)))


def test_narrower_and_wider_blocks_have_one_limit():
    block = Attention(3, 8, 64, scale=0.5, key_heads=4)
    narrow, wide = block.divide_widths(4), block.divide_widths(Fraction(1, 2))
    assert (narrow.units, narrow.heads, narrow.key_heads) == (16, 2, 1)
    assert (wide.units, wide.heads, wide.key_heads, wide.key_width) == (128, 16, 8, 16)
    for other in (narrow, wide):
        expected = block._factor**2 * block._widths[0]
        assert other._factor**2 * other._widths[0] == pytest.approx(expected)
    assert Attention(3, 8, 64, positions="alibi").divide_widths(4).heads == 8
    assert Attention(3, 8, 64, finite_key_width=True).divide_widths(4).key_width == 8
