"""Kinds of the builders' parameters; the metadata checks what a file or a command says of them.

`_schema` reads the annotations of the builders' signatures.
"""

from collections.abc import Callable
from typing import Annotated, Any

from jaxtyping import Array

from gradflow import _entries, activations, ensembles
from gradflow._entries import Beside, LookedUp, OneOf, Whole
from gradflow._layer_parts import BIASES
from gradflow.activations import Activation
from gradflow.ensembles import Ensemble

__all__ = ["Bias", "Count", "Depth", "Deviation", "Epsilon", "NormGroups", "Phi", "Weights"]
__all__ += ["WeightsByLayer"]

Count = Annotated[int, Whole()]
Depth = Annotated[int, Whole(100_000)]
Phi = Annotated[Activation | str | Callable[..., Array], LookedUp(activations.get)]
Weights = Annotated[Ensemble | str | Callable[..., Array], LookedUp(ensembles.get)]
WeightsByLayer = Annotated[
    Ensemble | str | Callable[..., Array] | list[Any], LookedUp(ensembles.by_layer)
]
Deviation = Annotated[float | int, _entries.scale]
Bias = Annotated[float | int | str, OneOf("bias", BIASES, _entries.finite)]
NormGroups = Annotated[int, Whole(), Beside("norm")]
Epsilon = Annotated[float | int, _entries.scale, Beside("norm")]
