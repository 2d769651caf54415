"""Remedies for transformers: what each changes, what theory says of it, and that it is ranked."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import comparison, data, remedies
from gradflow.blocks import Attention, LayerNorm, Residual
from gradflow.errors import InputError
from gradflow.remedies import _transformers
from gradflow.theory import mean_field

DEPTH, WIDTH = 2, 16
SICK = {"kind": "transformer", "tokens": 2, "heads": 4, "norm_position": "post"}


@functools.cache
def proposals():
    x = data.inputs(WIDTH, tokens=2, correlation=0.2)
    with jax.enable_x64(True):
        found, missing = remedies.proposals("relu", "torch", WIDTH, DEPTH, inputs=x, **SICK)
    return {remedy.name: network for remedy, network in found}, missing


@functools.cache
def predicted(name):
    with jax.enable_x64(True):
        gram = jnp.asarray([[1, 0.2], [0.2, 1]])
        found = mean_field.predict(proposals()[0][name], gram)
        return {key: np.asarray(found[key]) for key in ("q", "correlation", "gradient_variance")}


@pytest.mark.medium
def test_every_remedy_is_a_transformer_of_the_same_size():
    networks, missing = proposals()
    assert set(missing) == {"shaped attention"}
    assert "depth/width" in missing["shaped attention"]
    # Post-LN is what the sick network is.
    assert len(networks) == len(_transformers.ALL) - 1
    for name, network in networks.items():
        assert network.widths == (WIDTH,) * (DEPTH + 2), name
        assert network.shapes == networks["as it is"].shapes, name
    assert all(r.cost and r.caveat and r.changes for r in _transformers.ALL)


@pytest.mark.medium
def test_branches_that_start_at_0_leave_the_gradient_as_it_is():
    for name in ("ReZero", "Fixup"):
        np.testing.assert_allclose(predicted(name)["gradient_variance"], 1, rtol=1e-12)
    np.testing.assert_allclose(predicted("ReZero")["q"], 1, rtol=1e-12)


@pytest.mark.medium
def test_norms_of_branches_make_the_stream_grow_by_1_a_branch():
    for name in ("sandwich norms (CogView)", "norm of branches alone (Swin v2)"):
        q = predicted(name)["q"]
        np.testing.assert_allclose(q, 1 + 2 * np.arange(DEPTH + 1), rtol=1e-10)


@pytest.mark.slow
def test_admin_is_pre_ln_whose_stream_is_normed():
    """ω_i² is the pre-LN stream's second moment, so that directions are pre-LN's, exactly.

    Then its gradient is the pre-LN one times q_l/q_L, but for the norm of the first layer's sum.
    """
    admin, pre = predicted("Admin"), predicted("pre-LN")
    np.testing.assert_allclose(admin["correlation"], pre["correlation"], rtol=1e-10)
    np.testing.assert_allclose(admin["q"], 1, rtol=1e-10)
    expected = pre["gradient_variance"] * pre["q"] / pre["q"][-1]
    np.testing.assert_allclose(admin["gradient_variance"], expected, rtol=1e-10)


@pytest.mark.medium
def test_each_remedy_edits_what_it_is_named_after():
    networks, _ = proposals()

    def parts(name, kind):
        stages = networks[name].stages
        return [b for stage in stages for b in stage.block.nested if isinstance(b, kind)]

    assert not parts("T-Fixup", LayerNorm)
    assert [block.qk_norm for block in parts("QK-norm", Attention)] == ["rms"]
    (scores,) = parts("σReparam", Attention)
    assert scores.sigma_q**2 * scores.sigma_k**2 == pytest.approx(1 / 16)
    assert {r.skip_scale for r in parts("DeepNorm", Residual)} == {(2 * DEPTH) ** 0.25}
    omegas = [r.skip_scale for r in parts("Admin", Residual)]
    assert omegas[0] == 1
    assert omegas == sorted(omegas)
    assert [norm.gain for norm in parts("LayerNorm scaling, pre-LN norms by 1/√l", LayerNorm)] == (
        pytest.approx([1, 1, *[math.sqrt(1 / 2)] * 2])
    )


def test_what_is_wrong_is_one_sentence():
    with pytest.raises(InputError, match="unknown kind 'rnn'"):
        remedies.proposals("relu", "torch", WIDTH, DEPTH, kind="rnn")
    with pytest.raises(InputError, match="tokens is None; it is a whole number of at least 1"):
        remedies.proposals("relu", "torch", WIDTH, DEPTH, kind="transformer")


@pytest.mark.slow
def test_remedies_for_transformers_are_simulated_and_ranked(monkeypatch):
    """Whether theory and simulation agree is tested elsewhere: here, that they are beside it."""
    monkeypatch.setattr(remedies, "compare", functools.partial(comparison.compare, explain=False))
    few = ("pre-LN", "ReZero", "shaped attention")
    table = tuple(remedy for remedy in _transformers.ALL if remedy.name in few)
    monkeypatch.setattr(_transformers, "ALL", table)
    found = remedies.run("relu", "torch", width=32, depth=3, networks_each=40, **SICK)
    assert [outcome.remedy.name for outcome in found.outcomes] == ["ReZero", "pre-LN"]
    assert set(found.not_applicable) == {"shaped attention"}
    pre = found.outcomes[1]
    assert pre.parameters == 1
    assert math.log(pre.gradient / pre.gradient_theory) == pytest.approx(0, abs=0.05)
