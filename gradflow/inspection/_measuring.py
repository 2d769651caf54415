"""Measure a model: every statistic at each layer, over many draws of its weights or for given ones.

Without a loss the cotangent of each output is δ ~ N(0, 1), independent for each of its elements, as
at the top of gradflow's own networks: ∂C/∂z of each site is that of its own cost, and ∂C/∂W that of
the mean over the sites at the top. With a loss all gradients are those of the loss.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from gradflow import statistics
from gradflow._programs import Float64Program
from gradflow.errors import InputError
from gradflow.inspection import _scaled
from gradflow.inspection._births import Born, also, born_above, born_below
from gradflow.inspection._drawing import drawing
from gradflow.inspection._layers import Layer
from gradflow.inspection._model import Model
from gradflow.inspection._programs import top_sites
from gradflow.inspection._reading import Program
from gradflow.inspection._scaled import Scaled
from gradflow.inspection._segments import is_float, work
from gradflow.inspection._sites import site_axes
from gradflow.inspection._walking import Walk
from gradflow.simulation import _memory, _threefry
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

# Arrays of a segment's size that are alive at once while it is pulled back.
_WORKING_COPIES = 3
# Evaluations of a program that a walk up and down amounts to.
_PASSES = 4
# Logarithms by which sites' gradients may differ at one scale; float32 ends at 87.
_LOGS_APART = 60.0
# Chunks that networks are cut into at least, so that progress shows.
_CHUNKS = 2


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
    parameters: tuple[Any, Any] | None = None,
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
        ``(parameters, state)`` that are given and not drawn; then there is one network.
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
    if parameters is not None:
        _check_arrays(program, "parameters", parameters[0])
    networks = networks if parameters is None else 1
    several = tuple(devices or jax.devices())
    run = _Run(model, program, layers, inputs, key, targets, parameters, several, networks)
    chunk, done = run.chunk(), 0
    parts = []
    if progress:
        progress(0, networks)
    while done < networks:
        count = min(chunk, networks - done)
        parts.append(run.measured(np.arange(done, done + chunk), count))
        done += count
        if progress:
            progress(done, networks)
    whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return run.result(whole)


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
        if is_float(aval) and not bool(jnp.all(jnp.isfinite(leaf))):
            what = "NaN" if bool(jnp.any(jnp.isnan(leaf))) else "infinite numbers"
            raise InputError(f"{which} has {what} in it; all of its numbers are finite")


@dataclasses.dataclass
class _Run:
    """Chunks of networks: drawn, walked up and down, and read on the host."""

    model: Model
    program: Program
    layers: Sequence[Layer]
    inputs: tuple[Any, ...]
    key: PRNGKeyArray
    targets: tuple[Any, ...]
    parameters: tuple[Any, Any] | None
    devices: tuple[jax.Device, ...]
    networks: int
    born: Born | None = None

    @functools.cached_property
    def walk(self) -> Walk:
        forward = tuple(s for s in STATISTICS if not s.backward)
        seconds = _PASSES * self.networks * work(self.program)
        return Walk(self.program, self.layers, forward, seconds=seconds)

    @functools.cached_property
    def _draw(self) -> Callable[[Array], tuple[Any, Any]]:
        return drawing(self.model, self.networks)

    def chunk(self) -> int:
        """How many networks are walked at once: as many as memory holds."""
        count, networks = len(self.devices), self.networks
        avals = self.program.avals
        kept = {i for s in self.walk.segments for i in s.outputs}
        kept.update(self.program.arguments["parameters"])
        largest = max(
            sum(_bytes(avals[i]) for e in s.equations for i in e.outputs)
            for s in self.walk.segments
        )
        needed = 2 * sum(_bytes(avals[i]) for i in kept) + _WORKING_COPIES * largest
        most = max(1, _memory.available() // 2 // max(1, needed))
        chunk = min(-(-networks // min(_CHUNKS, networks)), most * count)
        return -(-chunk // count) * count if self.parameters is None else 1

    def measured(self, numbers: np.ndarray, count: int) -> dict[str, Any]:
        """What the first ``count`` networks of a chunk have, on the host: (networks, …) each."""
        mesh = Mesh(np.array(self.devices), ("networks",))
        keys = _network_keys(self.key, jnp.asarray(numbers))
        if len(numbers) % len(self.devices) == 0:
            keys = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("networks")))
        parameters, state = (
            self._draw(keys[:, 0])
            if self.parameters is None
            else jax.tree.map(lambda x: jnp.asarray(x)[None], self.parameters)
        )
        arguments = self._arguments(parameters, state, keys[:, 1])
        host = self._walked(arguments, keys[:, 2], count)
        if not self.walk.axes and _sites_apart(host["gradients"].values()):
            axes = site_axes(self.walk, arguments)
            if axes:
                self.walk = dataclasses.replace(self.walk, axes=axes)
                host = self._walked(arguments, keys[:, 2], count)
        self.born = also(self.born, host.pop("born"))
        weights = self.program.arguments["parameters"]
        sizes = {i: _log_mean_square(arguments[i]) for i in weights if _is_floating(arguments[i])}
        return jax.tree.map(lambda x: x[:count], host | {"sizes": jax.device_get(sizes)})

    def _walked(self, arguments: dict[int, Any], keys: Array, count: int) -> dict[str, Any]:
        """What is measured going up and coming down, and where the first NaN comes from."""
        up = self.walk.up(arguments)
        born = born_above(self.walk, up, count)
        down = self.walk.down(up.values, self._top(keys))
        host = jax.device_get({"up": up.statistics, **down._asdict()})
        finite = host.pop("finite")
        born = born or born_below(self.walk, arguments, lambda: self._top(keys), finite, count)
        for name in ("gradients", "weights", "parameters"):  # sums of two floats
            host[name] = {i: x.astype(np.float64).sum(1) for i, x in host[name].items()}
        return host | {"born": born}

    def _arguments(self, parameters: Any, state: Any, keys: Array) -> dict[int, Any]:
        arguments: dict[int, Any] = {}
        trees = {"parameters": parameters, "state": state, "key": keys}
        trees |= {"inputs": self.inputs, "targets": self.targets}
        for name, numbers in self.program.arguments.items():
            leaves = jax.tree.leaves(trees[name])
            arguments.update(zip(numbers, leaves, strict=True))
        for i in self.program.arguments.get("key", ()):
            if not jnp.issubdtype(self.program.avals[i].dtype, jax.dtypes.prng_key):
                arguments[i] = jax.random.key_data(arguments[i])
        return arguments

    def _top(self, keys: Array) -> dict[int, Scaled]:
        """The cotangents of the outputs: random ones, or 1 of a loss."""
        top: dict[int, list[Scaled]] = {}
        given = "targets" in self.program.arguments
        for place, i in enumerate(self.program.outputs):
            if i in self.walk.differentiable:
                aval = self.program.avals[i]
                axis = self.walk.axes.get(i)
                part = _cotangents(keys, place, aval.shape, aval.dtype, axis, given)
                top.setdefault(i, []).append(part)
        return {i: _sum(parts, self.walk.axes.get(i)) for i, parts in top.items()}

    # On the host ---------------------------------------------------------------------------------

    def result(self, whole: dict[str, Any]) -> Measured:
        """All statistics, from what the chunks have."""
        layers, avals, networks = self.layers, self.program.avals, self.networks
        born = self.born
        if born and born.direction == "forward" and not born.layer and born.networks == networks:
            raise InputError(
                f"{self.model.name} is not finite from its first layer on, in any network: {born}"
            )
        shapes = tuple(avals[layer.preactivation].shape for layer in layers)
        widths = tuple(
            math.prod(shape[i] for i in layer.units)
            for shape, layer in zip(shapes, layers, strict=True)
        )
        sites = tuple(math.prod(s) // max(1, w) for s, w in zip(shapes, widths, strict=True))
        forward = [s for s in STATISTICS if not s.backward]
        up = np.stack([whole["up"][i] for i in range(len(layers))], axis=1).astype(np.float64)
        values = {s.key: up[..., n] for n, s in enumerate(forward)}
        below = self._samples(whole, widths, sites)
        values |= _backward_values(below, [s for s in STATISTICS if s.backward], networks)
        return Measured(
            values=values,
            parameters=self._of_parameters(whole),
            layers=tuple(layers),
            networks=networks,
            widths=widths,
            sites=sites,
            shapes=shapes,
            born=born,
            ends=self._ends(),
        )

    def _samples(
        self, whole: dict[str, Any], widths: Sequence[int], sites: Sequence[int]
    ) -> list[dict[str, np.ndarray]]:
        """The fields of each layer's `BackwardSample`, with an axis of networks in front."""
        networks = self.networks
        unknown = np.full((networks, 1), np.nan)
        norms = [whole["gradients"].get(i, np.repeat(unknown, n, 1)) for i, n in enumerate(sites)]
        squares = [2 * x - math.log(w) for x, w in zip(norms, widths, strict=True)]
        top = math.log(top_sites(self.program, list(self.layers)))
        samples = []
        for i, layer in enumerate(self.layers):
            ratio = np.full((networks, sites[i]), np.nan)
            if layer.above is not None and sites[layer.above] == sites[i]:
                ratio = squares[i] - squares[layer.above]
            elif layer.above is not None:
                means = [_log_mean_exp(squares[j]) for j in (i, layer.above)]
                ratio = np.broadcast_to((means[0] - means[1])[:, None], ratio.shape)
            weight = whole["weights"].get(i, unknown[:, 0]) - top
            count = math.prod(self.program.avals[layer.weights].shape)
            samples.append({
                "log_norm": norms[i],
                "log_ratio": ratio,
                "log_weight_norm": weight,
                "width": np.full(networks, float(widths[i])),
                "weights": np.full(networks, float(count)),
            })  # fmt: skip
        return samples

    def _of_parameters(self, whole: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
        top = math.log(top_sites(self.program, list(self.layers)))
        of_leaf: dict[int, list[np.ndarray]] = {}
        for i, log in whole["parameters"].items():
            of_leaf.setdefault(self.walk.leaves[i], []).append(2 * (log - top))
        found = {}
        for i, size in whole["sizes"].items():
            count = math.prod(self.program.avals[i].shape)
            squares = of_leaf.get(i)
            gradient = np.full(self.networks, np.nan)
            if squares and count:
                with np.errstate(invalid="ignore"):  # infinite ones
                    gradient = np.logaddexp.reduce(squares) - math.log(count)
            found[self.program.names[i]] = {
                "log_mean_square": size.astype(np.float64),
                "log_gradient_mean_square": gradient,
            }
        return found

    def _ends(self) -> str:
        if not self.walk.ends:
            return ""
        equation = self.program.equations[self.walk.ends[0]]
        return (
            f"gradients end at the `while` loop in {equation.path or self.model.name}: JAX has no "
            "reverse derivative of it; write it with `jax.lax.scan`, or `jax.lax.fori_loop` with "
            "fixed bounds"
        )


def _backward_values(
    samples: list[dict[str, np.ndarray]], wanted: list[Statistic], networks: int
) -> dict[str, np.ndarray]:
    """The backward statistics, (networks, layers) each, in float64, by runs of equal sites."""
    values = {s.key: np.full((networks, len(samples)), np.nan) for s in wanted}
    by_sites: dict[int, list[int]] = {}
    for layer, sample in enumerate(samples):
        by_sites.setdefault(sample["log_norm"].shape[1], []).append(layer)
    for places in by_sites.values():
        stack = jax.tree.map(lambda *x: np.stack(x, 1), *(samples[i] for i in places))
        program = Float64Program(_read_backward, (stack,), 0.1, wanted=tuple(wanted))
        for statistic, value in zip(wanted, program(stack), strict=True):
            values[statistic.key][:, places] = value
    return values


def _read_backward(samples: dict[str, Array], wanted: tuple[Statistic, ...]) -> list[Array]:
    def one(fields: dict[str, Array]) -> list[Array]:
        sample = BackwardSample(**fields)
        return [jnp.asarray(s.measure(sample)) for s in wanted]

    return jax.vmap(jax.vmap(one))(samples)


def _sites_apart(logs: Iterable[np.ndarray]) -> bool:
    """Whether gradients of some sites are so much smaller than others' that floats may lose them.

    ``logs`` are (networks, sites) each.
    """
    for log in logs:
        largest = log.max(1, keepdims=True)
        if ((log < largest - _LOGS_APART) & np.isfinite(largest)).any():
            return True
    return False


def _log_mean_exp(x: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(x, axis=1) - math.log(x.shape[1])


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)


def _is_floating(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


@jax.jit
def _network_keys(key: PRNGKeyArray, numbers: Array) -> Array:
    """Of each network three keys: for its weights, its dropout, and its cotangents."""
    fused = _threefry.fused(key)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(fused, i), 3))(numbers)
    impl = jax.random.key_impl(key)
    return jax.random.wrap_key_data(jax.random.key_data(keys), impl=impl)


@jax.jit
@jax.vmap
def _log_mean_square(x: Array) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    peak = jnp.max(jnp.abs(wide), initial=0)
    scale = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    return jnp.log(jnp.mean(jnp.square(wide / scale))) + 2 * jnp.log(scale)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _cotangents(
    keys: Array,
    place: Array | int,
    shape: tuple[int, ...],
    dtype: Any,
    axis: int | None,
    ones: bool,
) -> Scaled:
    def one(key: PRNGKeyArray) -> Scaled:
        key = jax.random.fold_in(_threefry.fused(key), place)
        random = jax.random.normal(key, shape, dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        log = jnp.zeros(1 if axis is None else shape[axis], wide)
        return _scaled.normalised(jnp.ones_like(random) if ones else random, log, log, axis)

    return jax.vmap(one)(keys)


def _sum(parts: list[Scaled], axis: int | None) -> Scaled:
    if len(parts) == 1:
        return parts[0]
    return jax.vmap(lambda parts: _scaled.added(parts, axis))(parts)
