"""Chunks of networks: drawn, walked up and down, and what was measured brought to the host."""

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

from gradflow.errors import InputError
from gradflow.inspection._measuring import scaled
from gradflow.inspection._measuring.births import (
    Born,
    also,
    born_above,
    born_below,
    without_derivative,
)
from gradflow.inspection._measuring.drawing import drawing
from gradflow.inspection._measuring.scaled import Scaled
from gradflow.inspection._measuring.segments import compiled, work
from gradflow.inspection._measuring.sites import site_axes
from gradflow.inspection._measuring.walk import Walk
from gradflow.inspection._reading.layers import Layer
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.program import Program
from gradflow.simulation import _memory, _threefry
from gradflow.statistics import Statistic

__all__ = ["Chunks"]

# Arrays of a segment's size that are alive at once while it is pulled back.
_WORKING_COPIES = 3
# Bytes that all networks' derivatives by the weights of convolutions in groups may take at once.
_GROUPED = 1 << 29
# Evaluations of a program that a walk up and down amounts to.
_PASSES = 4
# Logarithms by which sites' gradients may differ at one scale; float32 ends at 87.
_LOGS_APART = 60.0
# Chunks that networks are cut into at least, so that progress shows; one where they are quick.
_CHUNKS, _SECONDS_A_CHUNK = 4, 3.0


@dataclasses.dataclass
class Chunks:
    """The networks that are measured, a chunk of them at a time.

    Attributes
    ----------
    model, program, layers, inputs, key, targets, parameters, networks
        As in `measure`.
    wanted
        The forward statistics.
    devices
        Those that share each chunk.
    born
        Where the first NaN came from in the chunks so far.
    """

    model: Model
    program: Program
    layers: Sequence[Layer]
    inputs: tuple[Any, ...]
    key: PRNGKeyArray
    targets: tuple[Any, ...]
    parameters: Sequence[tuple[Any, Any]]
    devices: tuple[jax.Device, ...]
    networks: int
    wanted: tuple[Statistic, ...]
    born: Born | None = None

    @functools.cached_property
    def walk(self) -> Walk:
        """The walk up and down the program."""
        seconds = _PASSES * self.networks * work(self.program)
        return Walk(self.program, self.layers, self.wanted, seconds=seconds)

    @functools.cached_property
    def _draw(self) -> Callable[[Array], tuple[Any, Any]]:
        return drawing(self.model, self.networks)

    def size(self) -> int:
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
        available = _memory.available() // 2
        most = max(1, min(available // max(1, needed), _grouped(self.program, available)))
        chunks = 1 if self.walk.seconds < _SECONDS_A_CHUNK else min(_CHUNKS, networks)
        chunk = min(-(-networks // chunks), most * count)
        return chunk if self.parameters else -(-chunk // count) * count

    def measured(self, numbers: np.ndarray, count: int) -> dict[str, Any]:
        """What the first ``count`` networks of a chunk have, on the host: (networks, …) each."""
        mesh = Mesh(np.array(self.devices), ("networks",))
        keys = _network_keys(self.key, jnp.asarray(numbers))
        if len(numbers) % len(self.devices) == 0:
            keys = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("networks")))
        parameters, state = self._given(numbers) if self.parameters else self._draw(keys[:, 0])
        arguments = self._arguments(parameters, state, keys[:, 1])
        host = self._walked(arguments, keys[:, 2], count)
        if not self.walk.axes and _sites_apart(host["gradients"].values()):
            axes = site_axes(self.walk, arguments)
            if axes:
                self.walk = dataclasses.replace(self.walk, axes=axes)
                host = self._walked(arguments, keys[:, 2], count)
        self.born = also(self.born, host.pop("born"))
        weights = self.program.arguments["parameters"]
        log_size = compiled("log size", _log_mean_square, 0, 0, self.walk.seconds)
        sizes = {i: log_size(arguments[i]) for i in weights if _is_floating(arguments[i])}
        sizes = jax.device_get(sizes)
        for i, log in sizes.items():
            if not (log < np.inf).all():
                raise InputError(
                    f"parameters{self.program.names[i]} that {self.model.name} draws are not all "
                    "finite; its initialiser gives NaN or infinite numbers"
                )
        return jax.tree.map(lambda x: x[:count], host | {"sizes": sizes})

    def _given(self, numbers: np.ndarray) -> tuple[Any, Any]:
        """Parameters and state of these networks; of numbers beyond the last, its own."""
        some = [self.parameters[min(i, len(self.parameters) - 1)] for i in numbers]
        return jax.tree.map(_stacked, *some)

    def _walked(self, arguments: dict[int, Any], keys: Array, count: int) -> dict[str, Any]:
        """What is measured going up and coming down, and where the first NaN comes from."""
        up = self.walk.up(arguments)
        born = born_above(self.walk, up, count)
        try:
            down = self.walk.down(up.values, self._top(keys))
        except (NotImplementedError, TypeError, ValueError) as error:
            equation = without_derivative(self.walk)
            if equation is None:
                raise
            raise InputError(
                f"JAX has no reverse derivative of `{equation.primitive}` in "
                f"{equation.path or self.model.name}; give it one with `jax.custom_vjp`"
            ) from error
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


def _sites_apart(logs: Iterable[np.ndarray]) -> bool:
    """Whether gradients of some sites are so much smaller than others' that floats may lose them.

    ``logs`` are (networks, sites) each.
    """
    for log in logs:
        largest = log.max(1, keepdims=True)
        if ((log < largest - _LOGS_APART) & np.isfinite(largest)).any():
            return True
    return False


def _stacked(*arrays: Any) -> Any:
    if jnp.issubdtype(getattr(arrays[0], "dtype", float), jax.dtypes.prng_key):
        return jnp.stack(arrays)
    return np.stack([np.asarray(array) for array in arrays])


def _grouped(program: Program, available: int) -> int:
    """How many networks memory holds of the derivative by the weights of convolutions in groups.

    On a CPU, XLA makes all groups of all networks one product: its memory is quadratic in these.
    """
    most = available
    for equation in program.equations:
        groups = equation.params.get("feature_group_count", 1)
        if equation.primitive == "conv_general_dilated" and groups > 1:
            weights = program.avals[equation.inputs[1]]
            of_one = 2 * groups * _bytes(weights)
            most = min(most, math.isqrt(min(available, _GROUPED) // of_one))
    return most


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
        return scaled.normalised(jnp.ones_like(random) if ones else random, log, log, axis)

    return jax.vmap(one)(keys)


def _sum(parts: list[Scaled], axis: int | None) -> Scaled:
    if len(parts) == 1:
        return parts[0]
    return jax.vmap(lambda parts: scaled.added(parts, axis))(parts)
