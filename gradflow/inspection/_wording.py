"""Sentences on a model that was inspected: the verdict, how theory agrees, and where it ends."""

import math
from collections.abc import Mapping

import numpy as np

from gradflow._differences import StatisticComparison, Status
from gradflow.estimation import Estimate
from gradflow.inspection._measuring.births import Born
from gradflow.inspection._measuring.measure import STATISTICS
from gradflow.inspection._places import Places
from gradflow.verdict import Verdict, word

__all__ = ["BY_KEY", "agreement", "judge"]

# Every statistic of an inspection by its key.
BY_KEY = {statistic.key: statistic for statistic in STATISTICS}

_VERBS = {
    "vanishing": "gradients vanish",
    "exploding": "gradients explode",
    "critical": "gradients keep their size",
}
# A share of networks without any gradient from which on that is the verdict.
_DEAD = 0.1
# A rectifier is flat for half of its units by design: beyond this share, of any φ.
_FLAT = 0.9
# Beyond so many standard errors a threshold leaves next to nothing that could differ.
_TELLING = 10.0


def judge(
    places: Places,
    estimates: Mapping[str, Estimate],
    theory: Mapping[str, np.ndarray],
    relative: tuple[np.ndarray, np.ndarray],
    *,
    without: np.ndarray,
    born: Born | None = None,
    why: str = "",
) -> Verdict:
    """The verdict on a model, about the norm ‖∂C/∂z‖ that arrives at layers that are alike.

    Parameters
    ----------
    places
        The layers'.
    estimates, theory
        By key; both have ``log_gradient_norm``, theory's NaN where it is not known.
    relative
        log ‖∂C/∂W‖/‖W‖ of each layer, (layers,): measured, and by theory.
    without
        The share of networks without any gradient at each layer, (layers,).
    born
        Where the first value that is not finite comes from, or None.
    why
        The cause and what mends it, in words, or empty.
    """
    alike, none = places.comparable(), np.flatnonzero(without == 1)
    if len(none) and without[np.argmin(places.depth)] < 1:  # it goes around them
        alike = places.comparable(np.flatnonzero(without < 1))
    bottom, top = (int(alike[end(places.depth[alike])]) for end in (np.argmin, np.argmax))
    steps = int(places.depth[top] - places.depth[bottom])
    here, there = (
        _change(values, bottom, top)
        for values in (
            _norms(
                places,
                {k: one.log_value if BY_KEY[k].log else one.value for k, one in estimates.items()},
                (bottom, top),
            ),
            _norms(places, theory, (bottom, top)),
        )
    )
    weights = [_change(values, bottom, top) for values in relative]
    norm = estimates["log_gradient_norm"]
    total = int(norm.count[bottom] + norm.excluded[bottom])
    dead = float(without[bottom])
    kind = _kind(steps, here, dead, born)
    parts = [_first(kind, places, (bottom, top), here, there)]
    if kind == "dead":
        dying = f"{round(dead * total)} of {total} networks have no gradient"
        others = [parts[0]] if math.isfinite(here) else []
        parts = [f"dead: {dying} at {places.names[bottom]}", *others]
    if born is not None:
        parts = [f"not finite: {born}", *(parts if math.isfinite(here) else [])]
    # Where layers that are alike keep gradients, what others lose is among the remedies.
    parts += [why] if why and kind != "critical" else []
    if len(none) and dead < 1:
        parts.append(f"{len(none)} of {len(places)} layers, as {places.names[none[0]]}, have no "
                     "gradient at step 0")  # fmt: skip
    flat = _flat_from(estimates)
    if flat is not None:
        share = estimates["saturation"].value[flat]
        parts.append(f"{100 * share:.0f} % of the units of {places.names[flat]} are flat")
    return Verdict(
        kind=kind,
        factor=_a_layer(here, steps),
        factor_theory=_a_layer(there, steps),
        output_factor=math.nan,
        output_factor_theory=math.nan,
        weight_factor=_a_layer(weights[0], steps),
        weight_factor_theory=_a_layer(weights[1], steps),
        input_factor=math.nan,
        input_factor_theory=math.nan,
        dead=dead,
        saturated_from=None if flat is None else flat + 1,
        sentence="; ".join(parts),
    )


def _norms(places: Places, values: Mapping[str, np.ndarray], ends: tuple[int, int]) -> np.ndarray:
    """The log of ‖∂C/∂z‖ over all sites: its mean, or its mean square's where sites have none.

    Pooling passes no gradient to most sites.
    """
    nothing = np.full(len(places), np.nan)
    norms = values.get("log_gradient_norm", nothing)
    if not np.isfinite(norms[list(ends)]).all():
        norms = (values.get("log_gradient_variance", nothing) + np.log(places.width)) / 2
    return np.asarray(norms + np.log(np.maximum(places.sites, 1)) / 2)


def _kind(steps: int, change: float, dead: float, born: Born | None) -> str:
    if dead >= _DEAD and born is None:
        return "dead"
    return "undefined" if steps == 0 or math.isnan(change) else word(change)


def _first(kind: str, places: Places, ends: tuple[int, int], change: float, theory: float) -> str:
    """What becomes of the gradient between two layers, in words."""
    bottom, top = ends
    steps = int(places.depth[top] - places.depth[bottom])
    if steps == 0:
        return f"undefined: {places.names[top]} alone has no gradient factor"
    if math.isnan(change):
        return f"undefined: no gradient was measured from {places.names[top]} down"
    known = "no theory" if math.isnan(theory) else f"theory ×{_a_layer(theory, steps):.3g}"
    over = f", ×{_text(change)} over {steps} layers" if steps > 1 else ""
    verb = _VERBS[kind if kind in _VERBS else word(change)]
    ends_at = f"from {places.names[top]} down to {places.names[bottom]}"
    return (
        f"{verb} ×{_a_layer(change, steps):.3g} a layer ({known}) {ends_at}{over}, in the norm of "
        "∂C/∂z"
    )


def _change(values: np.ndarray, low: int, high: int) -> float:
    with np.errstate(invalid="ignore"):  # of weights without gradients, both are -inf
        return float(values[low] - values[high])


def _a_layer(change: float, steps: int) -> float:
    change /= max(steps, 1)
    return math.inf if change > 709 else math.exp(change) if steps else math.nan


def _text(log: float) -> str:
    """The number of this natural logarithm, beyond a float's range too."""
    if math.isinf(log) or abs(log) < 700:
        return f"{math.exp(log):.2g}"
    return f"1e{log / math.log(10):+.0f}"


def _flat_from(estimates: Mapping[str, Estimate]) -> int | None:
    """The first layer with nearly all of its units flat, or None."""
    if "saturation" not in estimates:
        return None
    above = estimates["saturation"].value > _FLAT
    return int(np.argmax(above)) if above.any() else None


def agreement(
    places: Places, compared: Mapping[str, StatisticComparison], networks: int, threshold: float
) -> str:
    """One sentence on how theory and measurement agree."""
    if networks == 1:
        return "nothing is compared: one network has no standard error"
    status = {s: sum(int((c.status == s).sum()) for c in compared.values()) for s in Status}
    agrees, finite = status[Status.AGREES], status[Status.FINITE_WIDTH]
    differs = status[Status.DIFFERS]
    total = agrees + finite + differs
    if not total:
        return "nothing is compared: theory says nothing of these layers"
    sentence = f"{agrees} of {total} values agree within |z| < {threshold:.1f}"
    if threshold > _TELLING:
        sentence = (
            f"{networks} networks cannot tell: a value would have to be {threshold:.0f} standard "
            f"errors off to show, and {agrees} of {total} are not; draw 10 or more"
        )
    widths = f"{places.width.min()} to {places.width.max()} units a layer"
    if finite:
        sentence += (
            f"; {finite} are off by no more than the sum of 1/width over the layers, which theory, "
            f"of infinite width, leaves out ({widths})"
        )
    if differs:
        key, one = max(compared.items(), key=lambda item: _worst(item[1]))
        layer = int(np.argmax(np.where(one.status == Status.DIFFERS, np.abs(one.z), -1)))
        sentence += (
            f"; {differs} {'differs' if differs == 1 else 'differ'} by more, most "
            f"{BY_KEY[key].name} at {places.names[layer]} (z = {one.z[layer]:.1f}, "
            f"{100 * one.relative_difference[layer]:+.2g} %)"
        )
    return sentence


def _worst(one: StatisticComparison) -> float:
    return float(np.max(np.abs(one.z), where=one.status == Status.DIFFERS, initial=0.0))
