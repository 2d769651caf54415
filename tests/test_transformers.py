"""Transformers: what their builder makes of names, of rules for their start, and of torch."""

import math

import numpy as np
import pytest

from gradflow import builders, data
from gradflow._transformers import RULES
from gradflow.blocks import Attention, Gated, GlobalMean, LayerNorm, Residual
from gradflow.errors import InputError

# One stack of N layers: DeepNorm's α and β (Wang et al. 2022, arXiv:2203.00555), T-Fixup's of an
# encoder and a decoder (Huang et al. 2020), GPT-2's 1/√(2N); by an independent program.
PUBLISHED = {
    6: (1.861209718204, 0.379917842825, 0.428091879845, 0.368893973233, 0.288675134595),
    12: (2.213363839400, 0.319471552123, 0.359980927160, 0.310201619700, 0.204124145232),
    100: (3.760603093086, 0.188030154654, 0.211872603231, 0.182574185835, 0.070710678119),
    1000: (6.687403049764, 0.105737126344, 0.119144720472, 0.102669009608, 0.022360679775),
}


def small(**options):
    return builders.transformer(3, 16, 8, "relu", heads=4, **options)


def attention(network):
    (found,) = (b for b in network.stages[1].block.nested if isinstance(b, Attention))
    return found


@pytest.mark.parametrize("depth", PUBLISHED)
def test_rules_are_the_published_ones(depth):
    alpha, beta, encoder, decoder, gpt2 = PUBLISHED[depth]
    deepnorm = RULES["deepnorm"](depth, False)
    assert deepnorm.skip == pytest.approx(alpha, rel=1e-11)
    assert deepnorm[3:7] == pytest.approx([beta] * 4, rel=1e-11)
    assert (deepnorm.query_key, deepnorm.branch) == (1, 1)
    for causal, gain in ((False, encoder), (True, decoder)):
        t_fixup = RULES["t_fixup"](depth, causal)
        assert t_fixup[3:7] == pytest.approx([gain] * 4, rel=1e-11)
        assert t_fixup.embedding == pytest.approx(decoder, rel=1e-11)
    assert RULES["gpt2"](depth, True).output == pytest.approx(gpt2, rel=1e-11)
    assert RULES["depth"](depth, False).branch == pytest.approx(depth**-0.5)


def test_rules_multiply_the_matrices_that_they_name():
    plain = attention(small())
    rule = attention(small(scale="gpt2"))
    assert rule.sigma_o == pytest.approx(plain.sigma_o / 4)
    assert (rule.sigma_q, rule.sigma_k, rule.sigma_v) == (1, 1, 1)
    fixup = small(scale="fixup")
    branches = [b.branch for b in fixup.stages[1].block.nested if isinstance(b, Residual)]
    _, heads = branches[0].parts
    _, first, second = branches[1].parts
    scores = 16 ** (-1 / 6)
    assert (heads.sigma_q, heads.sigma_k, heads.sigma_v) == pytest.approx((scores,) * 3)
    assert (heads.sigma_o, second.sigma_w, first.sigma_w) == (0, 0, 0.25)


def test_scores_and_values_have_the_scales_that_are_asked_for():
    block = attention(small(kappa=4.0, ov=0.5))
    assert block.sigma_q**2 * block.sigma_k**2 == pytest.approx(4)
    assert block.sigma_v**2 * block.sigma_o**2 == pytest.approx(0.5)


def test_weights_of_torch_are_those_of_its_attention():
    """in_proj_weight is Xavier's, of shape (3 d, d): Var W_Q = 2/(4 d), κ = 1/4 and σ_v² = 1/2.

    out_proj is a Linear's, 1/(3 d); biases are 0 there, and U[±1/√fan_in] elsewhere.
    """
    network = small(weights="torch")
    block = attention(network)
    assert block.sigma_q**2 * block.sigma_k**2 == pytest.approx(1 / 4)
    assert block.sigma_v**2 == pytest.approx(1 / 2)
    assert block.sigma_o**2 == pytest.approx(1 / 3)
    assert (block.bias_q, block.bias_o, block.distribution.name) == (0, 0, "uniform")
    first = network.stages[1].block.nested[-2]
    assert first.sigma_b == pytest.approx((3 * 16) ** -0.5)


@pytest.mark.parametrize(
    ("position", "norms", "first"),
    [("pre", 2, 0), ("post", 2, 0), ("branch", 2, 0), ("sandwich", 4, 0), ("peri", 4, 1)]
    + [("ngpt", 4, 1)],
)
def test_norms_are_at_their_places(position, norms, first):
    embedding, layers = small(norm_position=position).stages
    counts = [
        sum(isinstance(b, LayerNorm) for b in stage.block.nested) for stage in (embedding, layers)
    ]
    assert counts == [first, norms]
    assert layers.repeats == 8


def test_layers_that_differ_are_stages_of_their_own():
    mixed = small(norm_position="mix").stages
    assert [stage.repeats for stage in mixed] == [1, 2, 6]
    scaled = small(scale="layer").stages
    norms = [next(b for b in s.block.nested if isinstance(b, LayerNorm)) for s in scaled[1:]]
    assert [norm.gain for norm in norms] == pytest.approx([n**-0.5 for n in range(1, 9)])


def test_readouts_and_feed_forward_networks():
    network = small(outputs=5, pool="mean", gated=True, ffn_width=24, ffn_weights="he,lecun,0.02")
    assert network.widths == (16, *[16] * 9, 5)
    assert network.sites(6) == (6, *[6] * 8, 2)
    gated = next(b for b in network.stages[1].block.nested if isinstance(b, Gated))
    assert gated.value.sigma_w == pytest.approx(math.sqrt(2))
    assert gated.value.units == gated.gate.parts[0].units == 24
    norm, mean, read = network.stages[-1].block.parts
    assert isinstance(norm, LayerNorm)
    assert isinstance(mean, GlobalMean)
    tied = small(input_width=40, outputs=40, readout="tied", embedding="0.02", norm_position="post")
    assert tied.stages[-1].block.sigma_w == pytest.approx(0.02 * 4)
    assert small(ffn_width=0).shapes[1] == ((16, 16),) * 4
    assert read.units == 5


def test_tokens_are_rows_and_images_are_cut_into_them():
    rows = data.inputs(16, batch=2, tokens=3, correlation=0.3)
    gram = rows @ rows.T / 16
    np.testing.assert_allclose(gram, 0.3 + 0.7 * np.eye(6), atol=1e-14)
    images = data.inputs(4, input="digits", batch=2, tokens=16)
    np.testing.assert_array_equal(images, data.inputs(64, input="digits", batch=2).reshape(-1, 4))
    drawn = data.inputs(5, input="tokens", batch=4, tokens=50)
    assert drawn.shape == (200, 5)
    assert (np.sort(drawn) == [0, 0, 0, 0, 1]).all()
    # 200 draws, of the null that ids are uniform: χ² of 4 degrees of freedom is below 18.5 with a
    # chance of 0.999; the bits are fixed.
    assert ((drawn.sum(0) - 40) ** 2 / 40).sum() < 18.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "post"}, "norm is 'post', which is a norm_position"),
        ({"norm": "layr"}, "unknown norm 'layr'"),
        ({"norm_position": "under"}, "unknown norm_position 'under'"),
        ({"scale": "deepnorm"}, "scale is 'deepnorm', which is made for norm_position 'post'"),
        ({"scale": "t_fixup"}, "scale is 't_fixup', which is made for no norm"),
        ({"scale": "admin"}, "unknown scale 'admin'"),
        ({"scale": -1.0}, "scale is -1.0; it is a finite number of at least 0"),
        ({"kappa": -1.0}, "kappa is -1.0; it is a finite number of at least 0"),
        ({"heads": 3}, "width is 16 and heads 3; heads divide the width"),
        ({"weights": "normal(1,0.1)"}, "those of attention have mean 0"),
        ({"ffn_width": -1}, "ffn_width is -1"),
        ({"outputs": 0}, "outputs is 0"),
        ({"outputs": 2, "pool": "max"}, "unknown pool 'max'"),
        ({"outputs": 2, "readout": "shared"}, "unknown readout 'shared'"),
        ({"ffn_weights": "he,he,he"}, "weights are 3 ensembles, and there are 2 layers"),
    ],
)
def test_what_is_wrong_is_one_sentence(options, message):
    with pytest.raises(InputError, match=message):
        builders.transformer(**{"tokens": 3, "width": 16, "depth": 8, "heads": 4} | options)
