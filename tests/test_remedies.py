"""Remedies: what is proposed, what is said of it, and that theory and simulation agree on it."""

import functools
import math

import numpy as np
import pytest

from gradflow import builders, comparison, figures, remedies
from gradflow.errors import InputError
from gradflow.predictions import Prediction


@pytest.mark.slow
def test_every_remedy_has_a_network_as_deep_as_the_sick_one():
    found, missing = remedies.proposals("logistic", "unscaled", 20, 6)
    assert found[0][1] == builders.mlp([20] * 7, "logistic", "unscaled")
    assert not missing
    assert len({remedy.name for remedy, _ in found}) == len(found) == len(remedies.ALL) + 1
    for remedy, network in found:
        assert network.widths == (20,) * 7, remedy.name
    by_name = {remedy.name: network for remedy, network in found}
    assert by_name["LSUV"].mixes_sites
    fixup = by_name["residual, last of two layers at 0 (Fixup)"]
    assert fixup.stages[1].block.branch.parts[1].sigma_w == 0
    assert {"maxout of two, LeCun weights", "gated linear units (GLU), LeCun weights"} <= set(
        by_name
    )
    assert all(remedy.cost and remedy.caveat and remedy.changes for remedy in remedies.ALL)


@pytest.mark.medium
def test_a_remedy_that_there_is_none_of_is_left_out_with_the_reason():
    found, missing = remedies.proposals("relu", "he", 20, 6)
    assert "homogeneous" in missing["deep kernel shaping (DKS)"]
    assert "relu, He weights" not in {remedy.name for remedy, _ in found}


@pytest.mark.parametrize(
    ("factor", "correlations", "depth"),
    [
        (math.exp(-0.5), [0.5, 0.5, 0.5], 6.0),  # χ = 1/e a layer
        (1.0, [0.4, 0.2, 0.1], 6 / math.log(2)),  # c halves its distance
        (math.exp(0.5), [0.4, 0.2, 0.1], 6.0),  # the faster one counts
        (1.0, [0.3, 0.3, 0.3], math.inf),
    ],
)
def test_trainable_depth_is_six_depth_scales(factor, correlations, depth):
    theory = Prediction({"correlation": np.array([0.9, *correlations])})
    assert remedies._trainable_depth(theory, factor) == pytest.approx(depth)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"depth": 2}, "depth is 2"), ({"inputs": 3}, "inputs is 3"), ({"width": 1}, "width is 1")],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        remedies.run(**arguments)


@pytest.mark.slow
def test_remedies_are_ranked_and_theory_and_simulation_agree(monkeypatch):
    """Whether every block meets its theory, by standard errors, is tested by their law test.

    So is what the width explains of a difference: it is not asked for here, at other widths.
    """
    compare = functools.partial(comparison.compare, explain=False)
    monkeypatch.setattr(remedies, "compare", compare)
    width, depth = 60, 6
    found = remedies.run("tanh", "unscaled", width=width, depth=depth, networks_each=100, inputs=4)
    outcomes = (found.sick, *found.outcomes)
    assert found.sick.gradient_theory > 1.5  # exploding: σ_w² = 60
    depths = [outcome.trainable_depth for outcome in found.outcomes]
    assert depths == sorted(depths, reverse=True)
    by_name = {outcome.remedy.name: outcome for outcome in outcomes}
    zero = by_name["residual, branches start at 0 (ReZero)"]
    fixup = by_name["residual, last of two layers at 0 (Fixup)"]
    for start in (zero, fixup):
        assert (start.gradient_theory, start.trainable_depth) == (1, math.inf)
    assert by_name["LSUV"].variance_theory == pytest.approx(1)
    assert (fixup.multiplications, fixup.parameters) == pytest.approx((11 / 6, 11 / 6), rel=0.01)
    assert zero.log10_condition_number == pytest.approx(0, abs=1e-4)
    for name, outcome in by_name.items():
        # What a width of 60 shifts, in a typical network: 0.12 far into chaos (the sick one), 0.09
        # where a batch of 4 couples or residual branches add up, 0.03 else.
        for measured, theory in (
            (outcome.gradient, outcome.gradient_theory),
            (outcome.variance, outcome.variance_theory),
        ):
            assert math.log(measured) == pytest.approx(math.log(theory), abs=0.2), name
    glorot = by_name["Glorot weights"]
    assert (glorot.parameters, glorot.multiplications) == (1, 1)
    drawn = figures.remedies({name: o.comparison.to_xarray() for name, o in by_name.items()})
    titles = [axes.get_title() for axes in drawn.axes if axes.get_visible()]
    assert titles == list(by_name)
    assert all(axes.containers and axes.lines for axes in drawn.axes if axes.get_visible())
