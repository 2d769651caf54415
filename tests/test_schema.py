"""One description of a network: what a builder takes is what files and commands can say."""

import dataclasses
import sys
from typing import Annotated

import pytest

from gradflow import _schema, builders, cli, comparison
from gradflow._entries import Number
from gradflow.errors import InputError
from gradflow.networks import Network
from gradflow.studies import _study_file

SHAPE = {"width": 20, "depth": 4}


def damped(
    input_width: int,
    width: int,
    depth: int,
    activation: str = "tanh",
    weights: str = "glorot",
    *,
    damping: Annotated[float, Number("a number from 0 to 1", lambda v: 0 <= v <= 1)] = 1.0,
    flat: bool = False,
    sigma_b: float | None = None,
    norm: str | None = None,
    name: str | None = None,
) -> Network:
    """A residual network whose branch is scaled by an option that gradflow does not know.

    Parameters
    ----------
    damping
        The branch's factor. It is 1 without it.
    flat
        Whether it is called flat.
    """
    made = builders.residual(
        input_width, width, depth, activation, weights, scale=damping, sigma_b=sigma_b, norm=norm
    )
    return dataclasses.replace(made, name=name or f"damped by {damping:g}{', flat' * flat}")


@pytest.fixture
def with_damped(monkeypatch):
    monkeypatch.setitem(_schema.KINDS, "residual", damped)


@pytest.mark.parametrize(
    ("description", "network"),
    [
        (SHAPE | {"activation": "relu", "weights": "he"}, builders.mlp([20] * 5, "relu", "he")),
        (
            SHAPE | {"input_width": 7, "sigma_b2": 0.25, "norm": "layer", "norm_position": "post"},
            builders.mlp([7, *[20] * 4], sigma_b=0.5, norm="layer", norm_position="post"),
        ),
        ({"widths": [9, 8, 7], "last": "he"}, builders.mlp([9, 8, 7], last="he")),
        (
            SHAPE | {"kind": "residual", "scale": "depth", "layers": 2, "keep_rate": 0.5},
            builders.residual(20, 20, 4, scale="depth", layers=2, keep_rate=0.5),
        ),
        (SHAPE | {"norm": "none", "sigma_b": None}, builders.mlp([20] * 5)),
        (
            {"kind": "recurrent", "width": 9, "steps": 3, "weights": "lecun", "tied": False},
            builders.recurrent(9, 9, 3, weights="lecun", tied=False),
        ),
        (
            {"kind": "convolutional", "shape": [4, 4], "channels": [1, 3], "delta": True},
            builders.convolutional([4, 4], [1, 3], delta=True),
        ),
    ],
)
def test_a_description_makes_the_network_of_its_builder(description, network):
    assert _schema.network(description).name == network.name
    assert _schema.network(description).widths == network.widths
    assert _schema.network(description).stages == network.stages


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"width": 3}, "depth is missing; give depth or widths"),
        (SHAPE | {"kind": "resnet"}, "kind: unknown kind 'resnet'"),
        (SHAPE | {"widht": 3}, r"widht: unknown entry 'widht' \(did you mean 'width'\?\)"),
        (SHAPE | {"widths": [3, 4]}, "widths takes the place of width; give one of them"),
        (SHAPE | {"sigma_w": 1.0, "weights": "he"}, "sigma_w takes the place of weights"),
        (SHAPE | {"hidden": 3}, "hidden is of networks of kind 'residual'; leave it out"),
        (SHAPE | {"norm_position": "pre"}, "norm_position goes with norm, and there is none"),
        (SHAPE | {"sigma_w2": -1.0}, "sigma_w2 is -1.0; it is a finite number above 0"),
        (SHAPE | {"sigma_b2": float("nan")}, "sigma_b2 is nan; it is a finite number of at least"),
    ],
)
def test_what_is_wrong_is_one_sentence(description, message):
    with pytest.raises(InputError, match=message):
        _schema.network(description)


def test_every_option_has_a_sentence_of_help_and_a_check():
    for option in _schema.options().values():
        assert option.help[0].isprintable(), option.name
        assert "As for" not in option.help, option.name
        assert callable(option.check)


FILE = """
[network]
kind = "residual"
activation = "tanh"
weights = "glorot"
width = 20
depth = 4
flat = true
[[axes]]
damping = { from = 0.0, to = 1.0, points = 3 }
[sampling]
networks = 2
"""


@pytest.mark.usefixtures("with_damped")
def test_a_builders_parameter_is_an_entry_and_an_axis_of_a_study_file():
    study = _study_file.parse(FILE)
    names = [point.network().name for point in study.points()]
    assert names == [f"damped by {damping}, flat" for damping in ("0", "0.5", "1")]
    # A number varies within one program, but for 0 beside others.
    structures = [point.structure for point in study.points()]
    assert structures[1] == structures[2]
    with pytest.raises(InputError, match="network.flat is 1; it is true or false"):
        _study_file.parse(FILE.replace("true", "1"))
    with pytest.raises(InputError, match=r"axes\[0\].damping.to is 2.0; it is a number from 0 to"):
        _study_file.parse(FILE.replace("to = 1.0", "to = 2.0"))
    with pytest.raises(InputError, match="network.layers: unknown entry 'layers'"):
        _study_file.parse(FILE.replace("flat = true", "layers = 2"))


@pytest.mark.usefixtures("with_damped", "unchecked")
def test_a_builders_parameter_is_an_option_of_the_command_line(monkeypatch, capsys, tmp_path):
    def stop(network, *_, **__):
        raise InputError(network.name)

    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["gradflow", "compare", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        return "".join(capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "compare", stop)
    assert "The branch's factor." in " ".join(said("--help").replace("│", " ").split())
    assert "damped by 0.25" in said("--kind", "residual", "--damping", "0.25", "--depth", "3")
    assert "damped by 1, flat" in said("--kind", "residual", "--flat", "--depth", "3")
    assert "damping is of networks of kind 'residual'" in said("--damping", "0.25")
