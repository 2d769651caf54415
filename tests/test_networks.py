"""Networks: data, of any widths."""

import jax
import pytest

from gradflow import builders, ensembles, networks
from gradflow.blocks import Dense, UnitVariance
from gradflow.errors import InputError


def test_equal_layers_are_one_stage():
    network = builders.mlp([1024, *[1000] * 5, 9])
    assert network.widths == (1024, 1000, 1000, 1000, 1000, 1000, 9)
    assert [s.repeats for s in network.stages] == [1, 4, 1]
    assert network.depth == 6


def test_the_first_layer_takes_the_input_itself():
    first, second = builders.mlp([50, 50, 50], "relu").stages
    assert (first.block.activation.name, second.block.activation.name) == ("linear", "relu")


def test_scales_are_leaves_and_structure_is_not():
    a, b = builders.mlp([9] * 4, "tanh", "glorot"), builders.mlp([9] * 4, "tanh", "he")
    assert jax.tree.leaves(a) == [1.0, 1.0]
    arrays = [jax.tree.structure(n.as_arrays(float)) for n in (a, b)]
    assert arrays[0] == arrays[1]
    assert jax.tree.leaves(b) == [pytest.approx(2**0.5)] * 2


def test_rectangular_scales_follow_the_variance_rule():
    stages = builders.mlp([784, 300, 10], "tanh", "glorot").stages
    assert stages[0].block.sigma_w ** 2 == pytest.approx(784 * 2 / 1084)
    assert stages[1].block.sigma_w ** 2 == pytest.approx(300 * 2 / 310)


def test_narrowed_networks_keep_their_scales_and_their_input():
    network = builders.mlp([64, 100, 100, 20], "tanh", "unscaled", sigma_b=0.3)
    narrow = networks.divide_widths(network, 4)
    assert narrow.widths == (64, 25, 25, 5)
    assert jax.tree.leaves(narrow) == jax.tree.leaves(network)
    with pytest.raises(InputError, match="a layer would be empty"):
        networks.divide_widths(network, 30)


def test_fixup_scales_a_branch_by_its_depth_and_starts_its_last_layer_at_zero():
    network = builders.residual(9, 30, 16, "relu", "he", scale="fixup", layers=3)
    first, branches = network.stages
    assert first.block.sigma_w == pytest.approx(2**0.5)
    scales = [part.sigma_w for part in branches.block.branch.parts]
    # 16^(-1/4) = 1/2, of m = 3 layers.
    assert scales == [pytest.approx(2**0.5 / 2)] * 2 + [0.0]
    assert branches.block.scale == 1
    assert networks.divide_widths(network, 3).stages[1].block.branch.parts[2].sigma_w == 0
    alone = builders.residual(9, 30, 16, "relu", "he", scale="fixup").stages[1].block
    assert alone.branch.sigma_w == 0
    with pytest.raises(InputError, match="sigma_b is 0.1; the biases of scale 'fixup' start at 0"):
        builders.residual(9, 30, 4, scale="fixup", sigma_b=0.1)


def test_the_top_layer_may_have_weights_of_its_own():
    network = builders.mlp([16, 25, 25, 25], "relu", "lecun", last="mup_output")
    assert [s.repeats for s in network.stages] == [1, 1, 1]
    assert jax.tree.leaves(network) == [1.0, 1.0, pytest.approx(1 / 5)]
    assert "mup_output" in network.name
    only = builders.mlp([16, 25], "relu", "lecun", last="mup_output")
    assert jax.tree.leaves(only) == [pytest.approx(1 / 4)]
    with pytest.raises(InputError, match="did you mean 'mup_output'"):
        builders.mlp([4, 4], last="mup_outputs")


def test_every_layer_gets_unit_variance_wherever_it_is_nested():
    network = networks.unit_variance(builders.residual(9, 20, 3, "tanh", layers=2))
    assert network.mixes_sites
    (first, _), branch = network.stages[0].block.parts, network.stages[1].block.branch
    assert first == builders.residual(9, 20, 3, "tanh").stages[0].block
    assert [type(part) for layer in branch.parts for part in layer.parts] == [
        Dense,
        UnitVariance,
    ] * 2
    assert network.shapes == builders.residual(9, 20, 3, "tanh", layers=2).shapes


def test_homogeneous_networks_are_recognised():
    assert builders.mlp([5] * 3, "relu", "he").homogeneous
    assert not builders.mlp([5] * 3, "relu", "he", sigma_b=0.1).homogeneous
    assert not builders.mlp([5] * 3, "tanh").homogeneous
    assert builders.mlp([5] * 3, "relu", sigma_b=0.0).homogeneous


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5, 0],), "width is 0; it is a whole number of at least 1"),
        (([5],), "needs an input and at least one layer"),
        (([5, 5], "tanhh"), "unknown activation 'tanhh' .did you mean 'tanh'"),
        (([5, 5], "tanh", "glorott"), "unknown weights 'glorott' .did you mean 'glorot'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(InputError, match=message):
        builders.mlp(*arguments)


def test_a_bias_scale_that_is_not_finite_is_refused():
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(InputError, match="sigma_b is"):
            builders.mlp([5, 5], sigma_b=bad)
    assert ensembles.fan_in(1.0).name == "fan_in(1)"
