"""The theory of a program: abstract values upwards, gradients' second moments downwards.

Upwards each equation has its rule (`rules`). Downwards a gradient is known by its second moments
over sites, Λ, at each field that a product made: fresh weights are independent of what they
multiply, so that the gradients which a sum h gets from several products add,
Λ_h = variance · units · Σ_o P_oᵀ Λ P_o, and at a field below it is Σ E[D_s D_t] Λ_h, D the slope of
h by the field. Means over units are constants to gradients: their part is 1/width.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradflow import _programs, activations, gaussian, statistics
from gradflow._unit_distributions import Shifted
from gradflow.activations import Activation
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.of_model import top_sites
from gradflow.inspection._reading.program import Program
from gradflow.inspection._theory import forcing, rules, tops
from gradflow.inspection._theory.activations import activation_of
from gradflow.inspection._theory.building import lifted
from gradflow.inspection._theory.gradients import (
    Gradient,
    Matrix,
    coupled,
    dense,
    sum_of,
    weighted,
)
from gradflow.inspection._theory.reaching import Reach
from gradflow.inspection._theory.sums import Field, Leaf, NoRule, Sum, apart, down
from gradflow.inspection._theory.values import Known, Law, Noise, Signal, Unknown, Value, Weights
from gradflow.inspection._theory.windows import OverSites
from gradflow.networks import Network
from gradflow.statistics import BackwardLimit, ForwardLimit

__all__ = ["Predicted", "predict"]

_CASTS = ("convert_element_type", "copy", "copy_p", "reduce_precision")
_AT_ONCE = 1 << 22  # second moments, of all layers whose statistics are read together
_STATISTICS = tuple((s, s.predict) for s in statistics.ALL if s.predict is not None)


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The infinite-width theory of a program's layers.

    Attributes
    ----------
    values
        Of each statistic, by key, shape (layers,); NaN where it is not known.
    reasons
        Of each layer why something of it is not known, or its gradient is 0; empty of all others.
    ends
        Where and why theory first ends; None where it does not.
    activations
        Of each layer φ, where it is one function of z that is Gaussian; else None.
    """

    values: dict[str, np.ndarray]
    reasons: tuple[str, ...]
    ends: str | None
    activations: tuple[Activation | None, ...] = ()


def predict(
    program: Program,
    layers: Sequence[Layer],
    laws: Mapping[int, Law],
    inputs: Sequence[Any],
    *,
    state: Sequence[Any] | None = None,
    targets: Sequence[Any] = (),
) -> Predicted:
    """Every statistic of every layer at infinite width, as far as the rules reach.

    Parameters
    ----------
    program, layers
        The program, and its layers.
    laws
        Of each leaf of the parameters, by number.
    inputs, state, targets
        The leaves of these arguments, which are known.
    """
    known = {"inputs": inputs, "state": state or (), "targets": targets}
    values = _upwards(program, laws, known)
    ends = next((v.reason for v in values.values() if isinstance(v, Unknown)), None)
    gradients, why = _downwards(program, layers, values)
    forward = [_forward_limit(values, layer) for layer in layers]
    reach = Reach(program, values)
    backward = [
        why.get(n) or _backward_limit(reach, values, layers, n, gradients)
        for n in range(len(layers))
    ]
    out = {s.key: np.full(len(layers), np.nan) for s, _ in _STATISTICS}
    for limits in (forward, backward):
        _evaluate(out, limits)
    for n, layer in enumerate(layers):
        # Theory's units may be along another axis than the layer's own, as where tokens are mixed;
        # then means over all of both are known, and what tells sites apart is not.
        z = values[layer.preactivation]
        if isinstance(z, Signal) and z.units != layer.units:
            out[statistics.correlation.key][n] = out[statistics.chi.key][n] = np.nan
    _leave_out_mixed(out, layers, values, gradients)
    reasons = tuple(
        up if isinstance(up, str) else down if isinstance(down, str) else down.why
        for up, down in zip(forward, backward, strict=True)
    )
    phis = tuple(
        up.activation if isinstance(up, _Limit) and up.arrays["gaussian"] else None
        for up in forward
    )
    return Predicted(out, reasons, ends, phis)


# Upwards -----------------------------------------------------------------------------------------


def _upwards(
    program: Program, laws: Mapping[int, Law], given: Mapping[str, Sequence[Any]]
) -> dict[int, Value]:
    """The abstract value of every number of the program."""
    values: dict[int, Value] = {
        i: Known(_array(v), literal=True) for i, v in program.constants.items()
    }
    for name, numbers in program.arguments.items():
        if name in given and len(given[name]) == len(numbers):
            arrays = [_array(v) for v in given[name]]
            for i, array in zip(numbers, arrays, strict=True):
                kind = program.avals[i].dtype
                values[i] = Known(
                    array.astype(kind) if jnp.issubdtype(kind, jnp.integer) else array
                )
        elif name == "parameters":
            values.update((i, _parameter(program, i, laws)) for i in numbers)
        elif name == "key":
            keys = (Noise(tuple(program.avals[i].shape), frozenset(), None, -1) for i in numbers)
            values.update(zip(numbers, keys, strict=True))
        else:
            values.update((i, Unknown(f"theory ends at what depends on {name}")) for i in numbers)
    products: dict[Any, list[Field]] = {}
    for equation in program.equations:
        shapes = [tuple(program.avals[i].shape) for i in equation.outputs]
        entering = [values[i] for i in equation.inputs]
        out = [
            _traced(value, (equation.signature, place))
            for place, value in enumerate(rules.apply(equation, entering, shapes))
        ]
        out = [_with_ties(value, products, equation.path) for value in out]
        values.update(zip(equation.outputs, out, strict=True))
    return values


def _traced(value: Value, step: tuple[Any, ...]) -> Value:
    """Weights with what was done to their leaf, by which it is seen whether two are the same."""
    if not isinstance(value, Weights) or step[0][0] in _CASTS:
        return value
    return dataclasses.replace(value, tie=(*value.tie, step))


def _with_ties(value: Value, products: dict[Any, list[Field]], path: str) -> Value:
    """What a product made, tied to what products with the same weights made before."""
    if not isinstance(value, Signal):
        return value
    for field in value.sum.parts:
        if not isinstance(field, Field) or field.product is None or not field.tie:
            continue
        others = products.setdefault(field.tie[0], [])
        if field in others:
            continue
        for other in others:
            if other.tie == field.tie:
                field.tie_to(other)
            elif (known := _of_rows_taken(field, other)) is not None:
                field.covariance = field.covariance + known
            elif not apart(field.tie, other.tie):
                return Unknown(
                    f"theory ends at {path or 'the model'}: weights are used in two ways, as those "
                    "of a layer and of its transpose are"
                )
        others.append(field)
    return value


def _of_rows_taken(read_out: Field, table: Field) -> np.ndarray | None:
    """What a table's rows that are in the signal add to its product with the whole table.

    Units of a read-out x Eᵀ are rows of E. Those that x has a part of, M_as E_s, have means of
    width · variance · M, and all others none: their second moments over units are (width ·
    variance)²/rows · M S Mᵀ, S_st 1 for equal rows. None where it is no such product.
    """
    above, below = read_out.product, table.product
    if above is None or below is None or above.source is None or len(above.maps) != 1:
        return None
    lookup = below.source is None and below.rows is None and not below.maps
    whole = above.weights == below.weights == above.fan_in * above.units
    if not lookup or not whole or below.units != above.fan_in:
        return None
    map_ = above.source.parts.get(table)
    if any(part is not table and table in part.fields for part in above.source.parts):
        return None
    if map_ is None:
        return np.zeros_like(read_out.covariance)
    at = above.maps[0] @ map_
    size = above.fan_in**2 * above.variance * below.variance / above.units
    return np.asarray(size * (at @ below.gram @ at.T))


def _array(value: Any) -> Any:
    if jnp.issubdtype(jnp.asarray(value).dtype, jax.dtypes.prng_key):
        return value
    array = np.asarray(value)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _parameter(program: Program, number: int, laws: Mapping[int, Law]) -> Value:
    law, shape = laws[number], tuple(program.avals[number].shape)
    if law.values is not None:
        return Known(np.broadcast_to(law.values, shape))
    error = law.standard_error / law.variance if law.variance else 0.0
    axes = frozenset(i for i, n in enumerate(shape) if n > 1)
    return Weights(shape, axes, law.mean, law.variance, error, law.gaussian, (Leaf(),))


# Downwards ---------------------------------------------------------------------------------------


def _downwards(
    program: Program, layers: Sequence[Layer], values: Mapping[int, Value]
) -> tuple[dict[Field, Gradient], dict[int, str]]:
    """The gradient at each field, and of layers where it is not known why."""
    why: dict[int, str] = {}
    found: dict[Field, Gradient] = {}
    pending: list[tuple[int, Field]] = []
    for output in dict.fromkeys(program.outputs):
        value = values[output]
        reason = ""
        if isinstance(value, Signal):
            at = Gradient.independent(value.sum.sites)
            reason = _ended(_spread, found, pending, value.sum, at)
        elif jnp.issubdtype(program.avals[output].dtype, jnp.floating):
            reason = _ended(_from_top, found, pending, program, values, output)
        if reason and not isinstance(value, Signal):
            reason = value.reason if isinstance(value, Unknown) else reason
        if reason:
            why.update((n, reason) for n in _below(program, layers, output))
    while pending:
        _, field = heapq.heappop(pending)
        reason = _ended(_further, found, pending, field)
        if reason:
            name = next((layer.name for layer in layers if field in _own(values, layer)), "")
            reason = f"{reason}, below {name}" if name else reason
            below = _ancestors(_sources(field))
            why.update(
                (n, reason)
                for n, layer in enumerate(layers)
                if not below.isdisjoint(_own(values, layer))
            )
    return found, why


def _from_top(
    found: dict[Field, Gradient],
    pending: list[tuple[int, Field]],
    program: Program,
    values: Mapping[int, Value],
    output: int,
) -> None:
    """Add the gradient of an output that is no signal, as of a softmax over units, or of a loss."""
    for sum_, matrix in tops.gradients(program, values, output, forcing.joint):
        _spread(found, pending, sum_, Gradient.of(matrix, 0.0))


def _ended(step: Callable[..., None], *arguments: Any) -> str:
    """Take a step of the gradients; why theory ends where there is no rule, or where one fails."""
    try:
        step(*arguments)
    except NoRule as reason:
        return f"theory of gradients ends: {reason}"
    except Exception as fault:  # noqa: BLE001 (a fault of theory's; measurement goes on)
        return f"theory of gradients fails: {type(fault).__name__}, {fault}"
    return ""


def _further(found: dict[Field, Gradient], pending: list[tuple[int, Field]], field: Field) -> None:
    """Add what a field's gradient gives the fields that it comes from."""
    product, gradient = field.product, found[field]
    if field.origin is not None:
        origin = field.origin
        matrix = origin.share * sum(map_.T @ gradient.matrix @ map_ for map_ in origin.maps)
        kind, which, *_ = field.tie[-1]
        of = which if kind == "units" else kind
        ties = frozenset((tie, (*units, of)) for tie, units in gradient.ties)
        _add(found, pending, origin.field, Gradient.of(matrix, gradient.log, ties))
    if field.mixture is not None:
        for sum_, matrix in field.mixture.down(dense(gradient.matrix)):
            below = Gradient.of(matrix, gradient.log, gradient.ties)
            _spread(found, pending, sum_, below)
    if product is None or product.source is None:
        return
    ties = frozenset({(field.tie, ())} if field.tied else ())
    below = Gradient.of(product.down(gradient.matrix), gradient.log, ties)
    _spread(found, pending, product.source, below)


def _sources(field: Field) -> frozenset[Field]:
    """The fields that one comes from: of its product's signal, or of which it is some units."""
    if field.origin is not None:
        return frozenset((field.origin.field,))
    if field.mixture is not None:
        return frozenset[Field]().union(*(sum_.fields for sum_ in field.mixture.sums))
    source = None if field.product is None else field.product.source
    return frozenset() if source is None else source.fields


def _ancestors(fields: frozenset[Field]) -> set[Field]:
    """These fields, and all that they come from."""
    seen: set[Field] = set()
    pending = list(fields)
    while pending:
        field = pending.pop()
        if field not in seen:
            seen.add(field)
            pending += _sources(field)
    return seen


def _spread(
    found: dict[Field, Gradient], pending: list[tuple[int, Field]], sum_: Sum, at: Gradient
) -> None:
    """Add what a sum's gradient gives the fields below it; raises `NoRule` where not known."""
    own: dict[Field, Matrix]
    try:
        own, of_variables = _by_rules(sum_, at.matrix)
    except NoRule as reason:
        own, of_variables = {**forcing.pulled(sum_, dense(at.matrix), reason)}, []
    for below, variable in of_variables:
        _spread(found, pending, variable, Gradient.of(below, at.log, at.ties))
    for field, matrix in own.items():
        _add(found, pending, field, Gradient.of(matrix, at.log, at.ties))


def _by_rules(sum_: Sum, at: Matrix) -> tuple[dict[Field, Matrix], list[tuple[Matrix, Sum]]]:
    """What a sum's gradient gives its fields, and variables of its parts that are sums."""
    own: dict[Field, Matrix] = {}

    def add(one: Sum, inner: Matrix, other: Sum) -> None:
        for field in one.parts:
            if field in other.parts:
                assert isinstance(field, Field)
                below = down(one.parts[field], inner, other.parts[field])
                below = below if one is other else below + below.T
                own[field] = sum_of(own[field], below) if field in own else below

    for batch, map_ in forcing.normalised(sum_):
        add(batch.x, batch.pulled(down(map_, dense(at), map_)), batch.x)
    of_variables = [
        (weighted(down(map_, at, map_), term, term), variable)
        for term, map_, variable in forcing.multiples(sum_)
    ]
    terms = forcing.terms(sum_)
    for i, (one, left, of_one) in enumerate(terms):
        for other, right, of_other in terms[: i + 1]:
            if of_one.fields.isdisjoint(of_other.fields):
                continue
            inner = weighted(down(left, at, right), one, other)
            if one is not other and of_one is of_other:
                inner, of_one = inner + inner.T, of_other
            add(of_one, inner, of_other)
    return own, of_variables


def _add(
    found: dict[Field, Gradient], pending: list[tuple[int, Field]], field: Field, new: Gradient
) -> None:
    if field in found:
        found[field] = found[field].plus(new)
    else:
        found[field] = new
        heapq.heappush(pending, (-field.serial, field))


def _below(program: Program, layers: Sequence[Layer], value: int) -> list[int]:
    """The layers that a value depends on."""
    producers, pending, seen = program.producers(), [value], set()
    while pending:
        number = pending.pop()
        if number in producers and number not in seen:
            seen.add(number)
            pending += program.equations[producers[number]].inputs
    return [n for n, layer in enumerate(layers) if layer.product in seen]


# Statistics --------------------------------------------------------------------------------------


def _forward_limit(values: Mapping[int, Value], layer: Layer) -> "_Limit | str":
    """The limit of a layer's signals, or the reason why there is none."""
    z = values[layer.preactivation]
    if not isinstance(z, Signal):
        return z.reason if isinstance(z, Unknown) else "not random"
    try:
        second, mean = forcing.second_moments(z.sum), forcing.mean(z.sum)
    except NoRule as reason:
        return f"theory ends at {layer.name}: {reason}"
    except Exception as fault:  # noqa: BLE001 (a fault of theory's; measurement goes on)
        return f"theory fails at {layer.name}: {type(fault).__name__}, {fault}"
    q = np.diagonal(second)
    low, high = gaussian.log_limits(np.dtype(np.float64))
    with np.errstate(divide="ignore"):
        log_q = np.log(q)
    scale = np.where(q > 0, (np.minimum(log_q - low, 0) + np.maximum(log_q - high, 0)) / 2, 0)
    by = np.exp(-scale)
    phi = _activation(values[layer.activation], z)
    arrays = {
        "covariance": second * np.outer(by, by),
        "mean": mean * by,
        "log_scale": scale,
        "gaussian": np.asarray(z.sum.gaussian and phi is not None),
    }
    return _Limit(arrays, phi or activations.linear, about=bool(mean.any()))


class _Limit(NamedTuple):
    """A limit's arrays, and what is static: of a gradient no activation."""

    arrays: dict[str, np.ndarray]
    activation: Activation | None = None
    about: bool = False
    why: str = ""  # where a gradient is 0

    def limit(self, arrays: Any) -> ForwardLimit | BackwardLimit:
        """The limit with these arrays."""
        if self.activation is None:
            return BackwardLimit(**arrays)
        about = Shifted.at(arrays["mean"]) if self.about else None
        return ForwardLimit(
            activation=self.activation,
            saturation_threshold=Network.saturation_threshold,
            about=about,
            **arrays,
        )


def _activation(value: Value, z: Signal) -> Activation | None:
    """The function φ of a layer's activations φ(z), None where it is none."""
    if not isinstance(value, Signal):
        return None
    if value.sum is z.sum:
        return activations.linear
    variables: list[Sum] = []
    numbers: list[np.ndarray] = []
    node = lifted(value.sum, variables, numbers)
    base, a, b = z.sum.affine
    if variables != [base] or a != 1 or b or any(np.ptp(x) for x in numbers):
        return None
    return activation_of(node, tuple(float(x[0]) for x in numbers))


def _backward_limit(
    reach: Reach,
    values: Mapping[int, Value],
    layers: Sequence[Layer],
    place: int,
    gradients: Mapping[Field, Gradient],
) -> _Limit | str:
    """The limit of the gradient at a layer, or the reason why there is none."""
    layer = layers[place]
    own = _own(values, layer)
    if not own:
        value = values[layer.product]
        return value.reason if isinstance(value, Unknown) else "not random"
    program, why, gradient = reach.program, "", gradients.get(own[0])
    products = [field.product for field in own if field.product is not None]
    if gradient is None or math.isinf(gradient.log):
        zero, why = reach.why_none(layer)
        if gradient is None and not zero:
            return why
        why = why if zero else "no gradient at step 0, where all slopes above it are 0"
        gradient = Gradient.independent(len(own[0].covariance), -math.inf)
    top = top_sites(program, list(layers))
    with np.errstate(divide="ignore"):
        log_variance = gradient.log_variance
        weight = sum(gradient.with_second(p.gram) * p.units for p in products)
        weight /= sum(p.weights for p in products)
        log_weight = float(np.log(weight)) + gradient.log - 2 * math.log(top)
    above = layer.above
    ratio = np.full_like(log_variance, np.nan)
    if above is not None:
        next_fields = _own(values, layers[above])
        upper = gradients.get(next_fields[0]) if next_fields else None
        if upper is not None and not math.isinf(upper.log):
            log_upper = upper.log_variance
            if log_upper.shape == log_variance.shape:
                ratio = log_variance - log_upper
            else:
                ratio[:] = _log_mean(log_variance) - _log_mean(log_upper)
    return _Limit(
        {
            "log_variance": log_variance,
            "log_ratio": ratio,
            "log_weight_variance": np.asarray(log_weight),
            "width": np.asarray(float(_width(program, layer))),
        },
        why=why,
    )


def _width(program: Program, layer: Layer) -> int:
    """The units of a layer."""
    shape = program.avals[layer.preactivation].shape
    return math.prod(shape[axis] for axis in layer.units)


def _own(values: Mapping[int, Value], layer: Layer) -> list[Field]:
    """The fields that a layer's product made: one for each group of the units that it summed."""
    value = values[layer.product]
    parts = list(value.sum.parts) if isinstance(value, Signal) else []
    fields = [p for p in parts if isinstance(p, Field) and p.product is not None]
    return fields if len(fields) == len(parts) else []


def _log_mean(log: np.ndarray) -> float:
    return float(np.logaddexp.reduce(log) - math.log(len(log)))


def _leave_out_mixed(
    out: dict[str, np.ndarray],
    layers: Sequence[Layer],
    values: Mapping[int, Value],
    gradients: Mapping[Field, Gradient],
) -> None:
    """What pairs of sites tell that the same weights mix for all units, as a mixer's tokens.

    That these pairs are uncorrelated is right on average only. How far one network is from it
    enters correlations, and gradients of weights that these sites share, at second order, which no
    width makes small.
    """
    fields = [_own(values, layer) for layer in layers]
    mixing = {f for own in fields for f in own if isinstance(f.product, OverSites)}
    for n, own in enumerate(fields):
        if mixing.isdisjoint(own) and not mixing.isdisjoint(_ancestors(frozenset(own))):
            out[statistics.correlation.key][n] = np.nan
            if any(coupled(gradients[f].matrix) for f in own if f in gradients):
                out[statistics.weight_gradient_variance.key][n] = np.nan


def _evaluate(out: dict[str, np.ndarray], limits: "Sequence[_Limit | str]") -> None:
    """Fill in the statistics of layers, those of one structure together."""
    groups: dict[Any, list[int]] = {}
    for n, limit in enumerate(limits):
        if not isinstance(limit, str):
            shapes = tuple(x.shape for x in limit.arrays.values())
            groups.setdefault((limit.activation, limit.about, shapes), []).append(n)
    chunks = [
        (static, places[i : i + most])
        for (*static, shapes), places in groups.items()
        for most in [max(1, _AT_ONCE // max(map(math.prod, shapes)))]
        for i in range(0, len(places), most)
    ]
    for static, places in chunks:
        many = np.resize(places, 1 << (len(places) - 1).bit_length())
        rows = [limits[n] for n in many]
        names = rows[0].arrays
        stacked = {name: np.stack([row.arrays[name] for row in rows]) for name in names}
        with jax.enable_x64(True):
            for key, values in _read(stacked, *static).items():
                out[key][places] = np.asarray(values)[: len(places)]


@_programs.program("activation", "about", seconds=0.1)
def _read(arrays: dict[str, Any], activation: Activation | None, about: bool) -> dict[str, Any]:
    one = _Limit({}, activation, about)
    backward = activation is None
    sites = math.inf if backward else arrays["mean"].shape[-1]
    return {
        s.key: jax.vmap(lambda x, predict=predict: predict(one.limit(x)))(arrays)
        for s, predict in _STATISTICS
        if s.backward is backward and s.sites <= sites
    }
