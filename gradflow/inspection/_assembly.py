"""An inspection from its parts: estimates over networks, theory beside them, and the verdict."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradflow._differences import (
    Differences,
    StatisticComparison,
    Status,
    compare_statistic,
    differences,
    significance_threshold,
)
from gradflow.estimation import Estimate
from gradflow.inspection import _wording
from gradflow.inspection._cure import Cure
from gradflow.inspection._leaves import Leaves, relative_theory
from gradflow.inspection._places import Places
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import Program
from gradflow.inspection._result import Inspection
from gradflow.inspection._wording import BY_KEY
from gradflow.predictions import Prediction

__all__ = ["assemble"]

_Leaf = Mapping[str, np.ndarray]


def assemble(
    model: Model,
    program: Program,
    layers: Sequence[Layer],
    measured: Any,
    predicted: Any,
    cure: Cure | None,
) -> Inspection:
    """Put theory beside measurement.

    Parameters
    ----------
    model, program, layers
        What was inspected.
    measured, predicted
        What was measured in its networks, and the theory of its program.
    cure
        Why its gradients vanish or explode, and what mends them; None where it was not looked for.
    """
    places = Places.of(program, layers)
    estimates = {
        key: Estimate.of(values, log=BY_KEY[key].log) for key, values in measured.values.items()
    }
    nothing = np.full(len(places), np.nan)
    values: dict[str, Any] = {
        key: np.asarray(predicted.values.get(key, nothing), float) for key in estimates
    }
    leaves = Leaves.of(_in_order(program, measured.parameters), _sizes(program))
    compared, threshold = _compare(
        places, estimates, values, networks=measured.networks, dtype=_dtype(program, layers)
    )
    weight, relative, _ = leaves.at(places.parameters)
    with np.errstate(invalid="ignore"):
        without = np.isneginf(measured.values["log_gradient_variance"]).mean(axis=0)
    verdict = _wording.judge(
        places,
        estimates,
        values,
        (relative, relative_theory(values, weight)),
        without=without,
        born=measured.born,
        why=_why(cure),
    )
    return Inspection(
        verdict=verdict,
        name=model.name,
        mode=", ".join(filter(None, (model.mode, _own_or_drawn(model, measured.networks)))),
        places=places,
        estimates=estimates,
        theory=Prediction(
            values=values, why_missing=_why_missing(values["log_q"], predicted.reasons)
        ),
        by_statistic=compared,
        leaves=leaves,
        networks=measured.networks,
        threshold=threshold,
        born=measured.born,
        gradients_end=measured.ends,
        cure=cure,
    )


def _own_or_drawn(model: Model, networks: int) -> str:
    """What is to be said of a model that holds weights and has a law of them."""
    if model.given is None or model.init is None or networks == 1:
        return ""
    return "its weights drawn anew (with parameters=model its own are measured)"


def _why(cure: Cure | None) -> str:
    """The cause and what mends it, as a part of a sentence; empty where all is well."""
    if cure is None or not cure.cause:
        return ""
    return (cure.cause.partition("; ")[2] if cure.factors else cure.effect).rstrip(".")


def _why_missing(log_q: np.ndarray, reasons: Sequence[str]) -> str | None:
    """Why theory does not know the first layer that it does not know; None if it knows all."""
    unknown = [reason for reason, value in zip(reasons, log_q, strict=True) if np.isnan(value)]
    return next(filter(None, (*unknown, *reasons)), None)


def _in_order(program: Program, leaves: Mapping[str, _Leaf]) -> dict[str, _Leaf]:
    """The leaves of the parameters in the order in which the program uses them."""
    consumers = program.consumers()
    used = {
        program.names[number]: min(consumers.get(number, [len(program.equations)]))
        for number in program.arguments["parameters"]
    }
    return dict(sorted(leaves.items(), key=lambda item: used.get(item[0], len(used))))


def _sizes(program: Program) -> dict[str, int]:
    """How many elements each leaf of the parameters has."""
    numbers = program.arguments["parameters"]
    return {program.names[i]: math.prod(program.avals[i].shape) for i in numbers}


def _dtype(program: Program, layers: Sequence[Layer]) -> str:
    """The float type of the fewest digits that a pre-activation has."""
    found = {np.dtype(program.avals[layer.preactivation].dtype) for layer in layers}
    return str(max(found, key=lambda dtype: float(jnp.finfo(dtype).eps)))


def _compare(
    places: Places,
    estimates: Mapping[str, Estimate],
    theory: Mapping[str, np.ndarray],
    *,
    networks: int,
    dtype: str,
) -> tuple[dict[str, StatisticComparison], float]:
    """Every statistic compared, by key, and the threshold of significance."""
    units = networks * places.sites * places.width
    found = {
        key: Differences(
            theory[key],
            *differences(BY_KEY[key], theory[key], estimate, units, dtype),
        )
        for key, estimate in estimates.items()
    }
    threshold = significance_threshold(
        networks, sum(int(np.isfinite(here.z).sum()) for here in found.values())
    )
    size = np.exp(np.asarray(estimates["log_q"].log_value) / 2)
    compared = {}
    for key, here in found.items():
        statistic = BY_KEY[key]
        one = compare_statistic(statistic, here, estimates[key], dtype, None, threshold)
        beyond = np.abs(here.difference) - _of_the_width(key, places, here.theory, size)
        with np.errstate(invalid="ignore", divide="ignore"):  # of no difference, or no error
            small = beyond <= threshold * np.abs(here.difference / here.z)
        status = np.where((one.status == Status.DIFFERS) & small, Status.FINITE_WIDTH, one.status)
        status = np.where(np.isnan(here.z), Status.NOT_COMPARED, status).astype(np.int8)
        compared[key] = dataclasses.replace(one, status=status)
    return compared, threshold


def _of_the_width(key: str, places: Places, theory: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The size of an effect of the width: Σ 1/width over the layers passed, in a value's unit."""
    terms = places.expansion()
    statistic = BY_KEY[key]
    if statistic.backward:
        terms = np.full_like(terms, terms.max(initial=0.0))
    if statistic.logarithmic or statistic.fraction or statistic.sites > 1:
        return terms
    return terms * (size if key.endswith("_mean") else np.abs(theory))
