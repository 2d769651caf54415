"""Networks: data, of any widths."""

import jax
import pytest

from gradflow import ensembles, networks
from gradflow.errors import InputError


def test_equal_layers_are_one_stage():
    network = networks.mlp([1024, *[1000] * 5, 9])
    assert network.widths == (1024, 1000, 1000, 1000, 1000, 1000, 9)
    assert [s.repeats for s in network.stages] == [1, 4, 1]
    assert network.depth == 6


def test_the_first_layer_takes_the_input_itself():
    first, second = networks.mlp([50, 50, 50], "relu").stages
    assert (first.block.activation.name, second.block.activation.name) == ("linear", "relu")


def test_scales_are_leaves_and_structure_is_not():
    a, b = networks.mlp([9] * 4, "tanh", "glorot"), networks.mlp([9] * 4, "tanh", "he")
    assert jax.tree.leaves(a) == [1.0, 1.0]
    arrays = [jax.tree.structure(n.as_arrays(float)) for n in (a, b)]
    assert arrays[0] == arrays[1]
    assert jax.tree.leaves(b) == [pytest.approx(2**0.5)] * 2


def test_rectangular_scales_follow_the_variance_rule():
    stages = networks.mlp([784, 300, 10], "tanh", "glorot").stages
    assert stages[0].block.sigma_w ** 2 == pytest.approx(784 * 2 / 1084)
    assert stages[1].block.sigma_w ** 2 == pytest.approx(300 * 2 / 310)


def test_narrowed_networks_keep_their_scales_and_their_input():
    network = networks.mlp([64, 100, 100, 20], "tanh", "unscaled", sigma_b=0.3)
    narrow = networks.narrowed(network, 4)
    assert narrow.widths == (64, 25, 25, 5)
    assert jax.tree.leaves(narrow) == jax.tree.leaves(network)
    with pytest.raises(InputError, match="a layer would be empty"):
        networks.narrowed(network, 30)


def test_homogeneous_networks_are_recognised():
    assert networks.mlp([5] * 3, "relu", "he").homogeneous
    assert not networks.mlp([5] * 3, "relu", "he", sigma_b=0.1).homogeneous
    assert not networks.mlp([5] * 3, "tanh").homogeneous
    assert networks.mlp([5] * 3, "relu", sigma_b=0.0).homogeneous


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
        networks.mlp(*arguments)


def test_a_bias_scale_that_is_not_finite_is_refused():
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(InputError, match="sigma_b is"):
            networks.mlp([5, 5], sigma_b=bad)
    assert ensembles.fan_in(1.0).name == "fan_in(1)"
