"""Measure a model: every statistic at each layer, over many draws of its weights or for given ones.

Without a loss the cotangent of each output is δ ~ N(0, 1), independent for each of its elements, as
at the top of gradflow's own networks: ∂C/∂z of each site is that of its own cost, and ∂C/∂W that of
the mean over the sites at the top. With a loss all gradients are those of the loss.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from gradflow import _compilation, statistics
from gradflow._programs import Float64Program
from gradflow.errors import InputError
from gradflow.inspection._measuring.births import Born
from gradflow.inspection._measuring.chunks import Chunks
from gradflow.inspection._measuring.segments import is_float
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.of_model import top_sites
from gradflow.inspection._reading.program import Program
from gradflow.statistics import BackwardSample, Statistic

__all__ = ["STATISTICS", "Measured", "dead", "measure"]

dead = Statistic(
    "dead",
    "fraction of dead units, φ' = 0 or φ constant at all sites",
    measure=lambda s: jnp.mean(
        jnp.all(s.slope == 0, axis=0)
        | ((s.activation.shape[0] > 1) & (jnp.ptp(s.activation, axis=0) == 0))
    ),
    fraction=True,
)
# All that is measured at a layer.
STATISTICS = (*statistics.ALL, dead)
_FORWARD = tuple(s for s in STATISTICS if not s.backward)
_BACKWARD = tuple(s for s in STATISTICS if s.backward)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Attributes
    ----------
    values
        Each statistic of `STATISTICS` by its key, float64 (networks, layers); NaN where there is
        none: of one site, of the identity, or where no gradient comes.
    parameters
        By the path of each leaf of the parameters, float64 (networks,): ``log_mean_square`` of the
        weights and ``log_gradient_mean_square`` of ∂C/∂θ, natural logarithms.
    layers
        The layers.
    networks
        How many; 1 of given weights.
    widths, sites, shapes
        Of each layer its units, its sites, and the shape of its pre-activation.
    born
        Where the first NaN or infinite number came from, or None.
    ends
        One sentence on where gradients end and how to have them, or empty.
    """

    values: dict[str, np.ndarray]
    parameters: dict[str, dict[str, np.ndarray]]
    layers: tuple[Layer, ...]
    networks: int
    widths: tuple[int, ...]
    sites: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    born: Born | None = None
    ends: str = ""


def measure(
    model: Model,
    program: Program,
    layers: Sequence[Layer],
    inputs: tuple[Any, ...],
    key: PRNGKeyArray,
    *,
    networks: int = 100,
    targets: tuple[Any, ...] = (),
    parameters: Sequence[tuple[Any, Any]] = (),
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Measure a model's layers and parameters.

    Parameters
    ----------
    model, program, layers
        The model, its program (`program_of`) and its layers.
    inputs
        The model's arguments, those that the program was read with.
    key
        Network number i has ``fold_in(key, i)``: its weights, its dropout, its cotangents.
    networks
        How many draws.
    targets
        The arguments of a loss behind the outputs, if the program has one.
    parameters
        ``(parameters, state)`` of each network, where they are given and not drawn.
    devices
        Those that share the networks; all of JAX's without it.
    progress
        Called with (networks done, networks in all).

    Raises
    ------
    InputError
        If the model has no layers, does not depend on its inputs, or parameters or the first
        layer's signals are not finite.
    """
    _check(model, program, layers)
    _check_arrays(program, "inputs", inputs)
    _check_arrays(program, "targets", targets)
    for own, _ in parameters:
        _check_arrays(program, "parameters", own)
    networks = len(parameters) or networks
    several = tuple(devices or jax.devices())
    chunks = Chunks(
        model, program, layers, inputs, key, targets, parameters, several, networks, _FORWARD
    )
    size, done = chunks.size(), 0
    parts = []
    if progress:
        progress(0, networks)
    with _compilation.caching():
        while done < networks:
            count = min(size, networks - done)
            parts.append(chunks.measured(np.arange(done, done + size), count))
            done += count
            if progress:
                progress(done, networks)
    whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return _result(chunks, whole)


def _check(model: Model, program: Program, layers: Sequence[Layer]) -> None:
    if not layers:
        raise InputError(
            f"{model.name} has no product of parameters with a signal; what is inspected has layers"
        )
    if program.depends_on(program.arguments["inputs"]).isdisjoint(program.outputs):
        raise InputError(f"{model.name} does not depend on its inputs; its outputs are computed "
                         "from parameters alone")  # fmt: skip
    if not any(is_float(program.avals[i]) for i in program.outputs):
        raise InputError(f"{model.name} returns no floating-point array; gradients need one")


def _check_arrays(program: Program, name: str, tree: Any) -> None:
    """Raise `InputError` unless arrays are of the program's shapes, and finite."""
    leaves, numbers = jax.tree.leaves(tree), program.arguments.get(name, ())
    if len(leaves) != len(numbers):
        raise InputError(f"{name} are {len(leaves)} arrays; the model was read with {len(numbers)}")
    for leaf, number in zip(leaves, numbers, strict=True):
        which = f"{name}{program.names[number]}"
        aval = program.avals[number]
        if jnp.shape(leaf) != aval.shape:
            raise InputError(
                f"{which} is of shape {jnp.shape(leaf)}; the model was read with {aval.shape}"
            )
        if is_float(aval) and not np.isfinite(wide := np.asarray(leaf, np.float64)).all():
            what = "NaN" if np.isnan(wide).any() else "infinite numbers"
            raise InputError(f"{which} has {what} in it; all of its numbers are finite")


def _result(chunks: Chunks, whole: dict[str, Any]) -> Measured:
    """All statistics, from what the chunks have."""
    layers, avals, networks = chunks.layers, chunks.program.avals, chunks.networks
    born = chunks.born
    if born and born.direction == "forward" and not born.layer and born.networks == networks:
        raise InputError(
            f"{chunks.model.name} is not finite from its first layer on, in any network: {born}"
        )
    shapes = tuple(avals[layer.preactivation].shape for layer in layers)
    widths = tuple(
        math.prod(shape[i] for i in layer.units)
        for shape, layer in zip(shapes, layers, strict=True)
    )
    sites = tuple(math.prod(s) // max(1, w) for s, w in zip(shapes, widths, strict=True))
    up = np.stack([whole["up"][i] for i in range(len(layers))], axis=1).astype(np.float64)
    values = {s.key: up[..., n] for n, s in enumerate(_FORWARD)}
    below = _samples(chunks, whole, widths, sites)
    values |= _backward_values(below, networks)
    return Measured(
        values=values,
        parameters=_of_parameters(chunks, whole),
        layers=tuple(layers),
        networks=networks,
        widths=widths,
        sites=sites,
        shapes=shapes,
        born=born,
        ends=_ends(chunks),
    )


def _samples(
    chunks: Chunks, whole: dict[str, Any], widths: Sequence[int], sites: Sequence[int]
) -> list[dict[str, np.ndarray]]:
    """The fields of each layer's `BackwardSample`, with an axis of networks in front."""
    networks = chunks.networks
    unknown = np.full((networks, 1), np.nan)
    norms = [whole["gradients"].get(i, np.repeat(unknown, n, 1)) for i, n in enumerate(sites)]
    squares = [2 * x - math.log(w) for x, w in zip(norms, widths, strict=True)]
    top = math.log(top_sites(chunks.program, list(chunks.layers)))
    samples = []
    for i, layer in enumerate(chunks.layers):
        ratio = np.full((networks, sites[i]), np.nan)
        with np.errstate(invalid="ignore"):  # of two gradients that are 0
            if layer.above is not None and sites[layer.above] == sites[i]:
                ratio = squares[i] - squares[layer.above]
            elif layer.above is not None:
                means = [_log_mean_exp(squares[j]) for j in (i, layer.above)]
                ratio = np.broadcast_to((means[0] - means[1])[:, None], ratio.shape)
        weight = whole["weights"].get(i, unknown[:, 0]) - top
        count = math.prod(chunks.program.avals[layer.weights].shape)
        samples.append({
            "log_norm": norms[i],
            "log_ratio": ratio,
            "log_weight_norm": weight,
            "width": np.full(networks, float(widths[i])),
            "weights": np.full(networks, float(count)),
        })  # fmt: skip
    return samples


def _of_parameters(chunks: Chunks, whole: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    top = math.log(top_sites(chunks.program, list(chunks.layers)))
    of_leaf: dict[int, list[np.ndarray]] = {}
    for i, log in whole["parameters"].items():
        of_leaf.setdefault(chunks.walk.leaves[i], []).append(2 * (log - top))
    found = {}
    for i, size in whole["sizes"].items():
        count = math.prod(chunks.program.avals[i].shape)
        squares = of_leaf.get(i)
        gradient = np.full(chunks.networks, np.nan)
        if squares and count:
            with np.errstate(invalid="ignore"):  # infinite ones
                gradient = np.logaddexp.reduce(squares) - math.log(count)
        found[chunks.program.names[i]] = {
            "log_mean_square": size.astype(np.float64),
            "log_gradient_mean_square": gradient,
        }
    return found


def _ends(chunks: Chunks) -> str:
    if not chunks.walk.ends:
        return ""
    equation = chunks.program.equations[chunks.walk.ends[0]]
    return (
        f"gradients end at the `while` loop in {equation.path or chunks.model.name}: JAX has no "
        "reverse derivative of it; write it with `jax.lax.scan`, or `jax.lax.fori_loop` with "
        "fixed bounds"
    )


def _backward_values(samples: list[dict[str, np.ndarray]], networks: int) -> dict[str, np.ndarray]:
    """The backward statistics, (networks, layers) each, in float64, by runs of equal sites."""
    values = {s.key: np.full((networks, len(samples)), np.nan) for s in _BACKWARD}
    by_sites: dict[int, list[int]] = {}
    for layer, sample in enumerate(samples):
        by_sites.setdefault(sample["log_norm"].shape[1], []).append(layer)
    for places in by_sites.values():
        stack = jax.tree.map(lambda *x: np.stack(x, 1), *(samples[i] for i in places))
        program = Float64Program(_read_backward, (stack,), 0.1, wanted=_BACKWARD)
        for statistic, value in zip(_BACKWARD, program(stack), strict=True):
            values[statistic.key][:, places] = value
    return values


def _read_backward(samples: dict[str, Array], wanted: tuple[Statistic, ...]) -> list[Array]:
    def one(fields: dict[str, Array]) -> list[Array]:
        sample = BackwardSample(**fields)
        return [jnp.asarray(s.measure(sample)) for s in wanted]

    return jax.vmap(jax.vmap(one))(samples)


def _log_mean_exp(x: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(x, axis=1) - math.log(x.shape[1])
