"""One law test for all blocks: what `kernel` says is what `apply` does, in wide networks.

A new block is tested because it is in `blocks.ALL`, and a new distribution because it is in
`ensembles.DISTRIBUTIONS`. `gradflow.comparison` puts theory beside simulation for every statistic
and layer. Null: means are those of infinite width, plus what is four times as large at a quarter
of the width, the limit of which is 0 within its standard error or to a third of the difference.
False alarms: 1 % of cases. Keys are fixed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import compared

from gradflow import activations, blocks, builders, comparison, ensembles, networks
from gradflow.blocks import (
    GRU,
    AbstractBlock,
    Activate,
    Attention,
    Chain,
    Dense,
    Embedding,
    Gated,
    LayerNorm,
    Linear,
    Maxout,
    Residual,
    RMSNorm,
)
from gradflow.comparison import Status

WIDTH, NETWORKS, INPUTS = 200, 500, 40


def differences(network, sites, compare=compared):
    x = np.random.default_rng(0).normal(size=(sites, INPUTS)).astype(np.float32)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    found = compare(network, x, key=3, networks=NETWORKS)
    assert np.isfinite(found.by_statistic["log_gradient_norm"].z).all()
    return found.count(Status.DIFFERS), found.agreement


def in_a_network(block):
    """Return three layers that end in a random matrix each, and are wide; one that merges sites."""
    width = block.width_in or 100
    if isinstance(block, Embedding):  # of the input itself
        first = dataclasses.replace(block, vocabulary=INPUTS, units=WIDTH)
        return builders.stack(INPUTS, [first, (Dense(activations.erf, WIDTH), 2)])
    layer = Chain((block, Linear(width)))
    assert builders.stack(width, [layer]).widths[-1] == width, "as many units as it takes"
    return builders.stack(INPUTS, [Linear(width), (layer, 3 if block.pool_factor == 1 else 1)])


# Those whose tests stand for all: a composition, and a block that mixes inputs.
QUICK = {blocks.Residual: (), blocks.BatchNorm: pytest.mark.medium}


@pytest.mark.medium
@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=QUICK.get(b, pytest.mark.slow)) for b in blocks.ALL],
    ids=lambda block: block.__name__,
)
def test_every_block(block):
    """As it is made without arguments: 100 units; where sites mix, 6, of 3 positions, or all."""
    made = block()
    sites = 6 if made.mixes_sites else 2
    differing, sentence = differences(in_a_network(made), sites, comparison.compare)
    assert not differing, sentence


class TwiceForgotten(AbstractBlock):
    """Multiplies by 1.1, and its kernel does not know."""

    def apply(self, signal, multiply, key):  # noqa: ARG002
        return 1.1 * signal

    def kernel(self, kernel, multiply=None):  # noqa: ARG002
        return kernel

    @property
    def homogeneous(self):
        return True


@pytest.mark.slow
def test_a_wrong_kernel_is_found():
    differing, _ = differences(in_a_network(TwiceForgotten()), 2)
    assert differing > 5


COMPOSITIONS = {
    "pre-norm residual with dropout": (
        lambda: builders.residual(INPUTS, WIDTH, 20, "relu", "he", norm="layer", keep_rate=0.9),
        2,
    ),
    "transformer's branches": (
        lambda: builders.residual(
            INPUTS, WIDTH, 6, "gelu", "he", norm="rms", weights_first=True, hidden=400, sigma_b=0.1
        ),
        2,
    ),
    "post-norm residual": (
        lambda: builders.residual(
            INPUTS, WIDTH, 6, "tanh", "lecun", norm="layer", norm_position="post"
        ),
        2,
    ),
    "residual, 1/√L": (
        lambda: builders.residual(INPUTS, WIDTH, 16, "relu", "he", scale="depth", layers=2),
        2,
    ),
    "Fixup, three layers a branch": (
        lambda: builders.residual(INPUTS, WIDTH, 6, "relu", "he", scale="fixup", layers=3),
        2,
    ),
    "LSUV, orthogonal": (
        lambda: networks.unit_variance(
            builders.mlp([INPUTS, *[WIDTH] * 4], "logistic", ensembles.fan_in(1.0, "orthogonal"))
        ),
        3,
    ),
    "LSUV in a residual branch": (
        lambda: networks.unit_variance(
            builders.residual(INPUTS, WIDTH, 4, "tanh", "lecun", scale=0.5, layers=2)
        ),
        3,
    ),
    "LSUV, convolutions": (
        lambda: networks.unit_variance(
            builders.convolutional((3,), [INPUTS, *[100] * 3], "tanh", "glorot", padding="zeros")
        ),
        6,
    ),
    "highway": (
        lambda: builders.stack(
            INPUTS,
            [Linear(WIDTH), (GRU(WIDTH, activations.relu, 1.4, 0.2, None, update_bias=1.0), 6)],
        ),
        2,
    ),
    "μP, a top layer of its own": (
        lambda: builders.mlp([INPUTS, *[WIDTH] * 4], "relu", "lecun", last="mup_output"),
        2,
    ),
    "gated layers of other activations and biases": (
        lambda: builders.stack(
            INPUTS,
            [
                Linear(WIDTH),
                (
                    Gated(
                        Dense(activations.tanh, WIDTH, 1.5, 0.1),
                        Chain(
                            (Dense(activations.tanh, WIDTH, 1.2, 0.3), Activate(activations.silu))
                        ),
                    ),
                    1,
                ),
                Linear(WIDTH, 1.3),
                Maxout(Linear(WIDTH, 1.2, 0.2)),
                (Residual(Maxout(Linear(WIDTH, 1.2)), 0.5), 3),
                Linear(WIDTH),
            ],
            "linear",
        ),
        2,
    ),
    "BatchNorm ReLU, batch 16": (
        lambda: builders.mlp([INPUTS, *[4 * WIDTH] * 4], "relu", "he", norm="batch"),
        16,
    ),
    "BatchNorm leaky ReLU, batch 5": (
        lambda: builders.mlp([INPUTS, *[4 * WIDTH] * 4], "leaky_relu_0.2", "he", norm="batch"),
        5,
    ),
    "decoder with rotary positions": (
        lambda: builders.stack(
            INPUTS,
            [
                Linear(WIDTH),
                Residual(
                    Chain((LayerNorm(), Attention(3, 16, WIDTH, mask="causal", positions="rotary")))
                ),
                (
                    Chain(
                        (
                            Residual(Chain((LayerNorm(), Attention(3, 16, WIDTH, bias_q=0.5)))),
                            Residual(Chain((LayerNorm(), Linear(400, 1.4), Dense("relu", WIDTH)))),
                            RMSNorm(),
                        )
                    ),
                    2,
                ),
            ],
        ),
        6,
    ),
    "norm after logistic": (
        lambda: builders.mlp(
            [INPUTS, *[WIDTH] * 4],
            "logistic",
            "lecun",
            norm="layer",
            norm_position="post",
            keep_rate=0.8,
        ),
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "sites"), COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_compositions(make, sites):
    differing, sentence = differences(make(), sites)
    assert not differing, sentence


# `test_weights` has those that are structured, of which theory says that it does not know them.
@pytest.mark.slow
@pytest.mark.parametrize(
    "distribution", [name for name, law in ensembles.DISTRIBUTIONS.items() if not law.structured]
)
def test_every_distribution_in_a_residual_branch(distribution):
    """Layers of an even number of units, which Haar-orthogonal corners are cut from."""
    # The input keeps its width, and so would what standardised weights make of it, n_0/(n_0 - 1).
    branch = Dense(activations.relu, 100, 1.2, None, ensembles.DISTRIBUTIONS[distribution])
    block = Residual(Chain((LayerNorm(), branch)), 0.5)
    network = builders.stack(INPUTS, [Linear(100), (block, 4)], "relu")
    differing, sentence = differences(network, 2)
    assert not differing, sentence


def test_signals_are_rescaled_only_where_reported_activations_are_too():
    """Linear layers with a reported tanh: saturation is that of the true signals."""
    network = builders.stack(INPUTS, [Linear(100), Linear(100)], "tanh")
    assert not network.homogeneous
    assert builders.stack(INPUTS, [Linear(100), Linear(100)], "relu").homogeneous


@pytest.mark.parametrize("kind", blocks.ALL, ids=lambda kind: kind.__name__)
def test_a_block_says_whether_it_mixes_sites(kind):
    """By changing one site; a block over positions, which may be a single one, has a shape."""
    block, sites = kind(), 6
    x = np.random.default_rng(0).normal(size=(sites, block.width_in or 100)).astype(np.float32)

    def multiply(key, x, *, width, **law):  # noqa: ARG001
        return x @ jax.random.normal(key, (x.shape[1], width)) / x.shape[1] ** 0.5

    def apply(x):
        return np.asarray(block.apply(jnp.asarray(x), multiply, jax.random.key(0)))

    changed = x.copy()
    changed[1] = -2 * x[1]
    mixes = not np.array_equal(apply(x)[0], apply(changed)[0])
    assert block.mixes_sites == mixes or (block.mixes_sites and hasattr(block, "shape"))
    assert block.mixes_sites or not block.mixes_inputs
