"""Parts of networks that the builders share: layers of weights and biases, chains, checks."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from gradflow import activations, ensembles
from gradflow._checks import check_count, check_instance, check_number, is_number, unknown_name
from gradflow.activations import Activation
from gradflow.blocks import AbstractBlock, Activate, Chain, Dense, Linear
from gradflow.ensembles import Ensemble
from gradflow.errors import InputError
from gradflow.networks import Stage

__all__ = ["BIASES", "as_dense", "as_stage", "chain", "fields", "linear", "scaled"]

# What `bias` may be, beside a number.
BIASES = ("torch",)


def linear(
    ensemble: Ensemble,
    sigma_b: float | int | None,
    bias: float | int | str | None,
) -> Callable[[int, int], Linear]:
    """A function (fan_in, fan_out) that makes a layer of weights and biases.

    Parameters
    ----------
    ensemble
        Of the weights, and of the biases where these are not given.
    sigma_b, bias
        As for `builders.mlp`.
    """
    if sigma_b is not None:
        check_number("sigma_b", sigma_b)
    law = ensemble.bias if sigma_b is None and bias is None else None
    if isinstance(bias, str):
        if bias not in BIASES:
            raise unknown_name("bias", bias, BIASES)
        if sigma_b:
            raise InputError(f"bias is {bias!r} and sigma_b {sigma_b!r}; give one of them")
        law, bias = ensembles.torch.bias, None
    elif bias is not None and not (is_number(bias) and math.isfinite(bias)):
        raise InputError(f"bias is {bias!r}; it is a finite number, or one of {BIASES}")

    def make(fan_in: int, fan_out: int) -> Linear:
        return Linear(
            fan_out,
            ensemble.sigma_w(fan_in, fan_out),
            (sigma_b or None) if law is None else math.sqrt(law.variance(fan_in, fan_out)),
            ensemble.distribution,
            ensemble.mu_w(fan_in, fan_out),
            bias or None,
            ensembles.gaussian if law is None else law.distribution,
        )

    return make


def scaled(layer: Linear, gain: float) -> Linear:
    """A layer with its weights multiplied by a number, and the same biases."""
    mean = None if layer.mu_w is None else gain * layer.mu_w
    return dataclasses.replace(layer, sigma_w=gain * layer.sigma_w, mu_w=mean)


def as_dense(before: tuple[AbstractBlock, ...], linear: Linear) -> AbstractBlock:
    """Blocks and weights as one block; `Dense` if there is an activation only."""
    phi = activations.linear
    if len(before) == 1 and isinstance(before[0], Activate):
        phi, before = before[0].activation, ()
    if before:
        return Chain((*before, linear))
    return Dense(phi, **fields(linear))


def fields(linear: Linear) -> dict[str, Any]:
    """A layer's fields, which `Dense` and `Convolution` have too."""
    return {field.name: getattr(linear, field.name) for field in dataclasses.fields(linear)}


def chain(parts: Sequence[AbstractBlock]) -> AbstractBlock:
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def as_stage(one: AbstractBlock | tuple[AbstractBlock, int] | Stage) -> Stage:
    """One entry of `builders.stack` as a stage."""
    if isinstance(one, Stage):
        return one
    block, repeats = one if isinstance(one, tuple) and len(one) == 2 else (one, 1)
    check_instance(
        "an entry of blocks", block, AbstractBlock, "a block, a pair (block, how often) or a Stage"
    )
    _check_block(block)
    return Stage(block, check_count("repeats", repeats))


def _check_block(block: AbstractBlock) -> None:
    """Raise `InputError` unless a block's parts are what they are named after."""
    kinds = {
        "activation": (Activation, "an Activation, as activations.get('tanh')"),
        "distribution": (ensembles.Distribution, "a Distribution, as ensembles.gaussian"),
    }
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if field.name in kinds:
            check_instance(f"{type(block).__name__}'s {field.name}", value, *kinds[field.name])
        elif field.name == "units":
            check_count(f"{type(block).__name__}'s units", value)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, AbstractBlock):
                _check_block(part)
