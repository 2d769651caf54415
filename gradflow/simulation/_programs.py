"""Compiled programs that draw and measure a chunk of random networks, on one device or several.

Network number i has the key ``fold_in(key, i)``. A program takes σ_w and σ_b as arguments, so that
it serves all networks of one structure; a chunk's networks are shared among the devices, of all
processes where `jax.distributed` has been initialised.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from gradflow import _compilation
from gradflow._programs import Program
from gradflow.networks import Network
from gradflow.simulation import _threefry, propagation, singular_values
from gradflow.statistics import Statistic

__all__ = ["OVERFLOWED", "VANISHED", "RandomNetworks", "compiled", "in_order", "on_devices"]
__all__ += ["own_networks", "own_part", "to_host"]

# The axis of a mesh of devices.
_NETWORKS = "networks"


def on_devices(mesh: Mesh, spec: PartitionSpec, value: Array | np.ndarray) -> Array:
    """Return the array on a mesh, which may reach into other processes that have the same one."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        words = on_devices(mesh, spec, jax.random.key_data(value))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(value))
    array = np.asarray(value)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


class RandomNetworks(eqx.Module):
    """Laws of random networks of one structure, with the inputs and the key of each.

    Attributes
    ----------
    network
        Its scales are arrays with a leading axis of laws (`Network.as_arrays`).
    inputs
        Shape (laws, sites, n_0).
    key
        Shape (laws,). Network i of a law has ``fold_in(key, i)``.
    """

    network: Network
    inputs: Array | np.ndarray
    key: Array

    @classmethod
    def of(cls, network: Network, inputs: Array, key: PRNGKeyArray) -> "RandomNetworks":
        """Return the networks of a single law."""
        numbers = network.as_arrays(inputs.dtype), inputs, jax.random.key_data(key)
        # By NumPy, as JAX would compile.
        laws, rows, words = jax.tree.map(lambda leaf: np.asarray(leaf)[None], numbers)
        impl = jax.random.key_impl(key)
        return cls(laws, rows, jax.random.wrap_key_data(jax.device_put(words), impl=impl))


def compiled(
    networks: RandomNetworks,
    chunk: int,
    devices: tuple[jax.Device, ...],
    seconds: float,
    *,
    measured: tuple[Statistic, ...],
    sampler: str,
    keep: tuple[bool, bool],
    block: int,
    spectrum: bool = False,
) -> Callable[[RandomNetworks, np.ndarray, np.ndarray], tuple[Array, ...]]:
    """Compile the function from random networks and a chunk of their numbers to their statistics.

    It takes as many laws as ``networks`` has, of the same structure, and for each of ``chunk``
    networks the index of its law, and its number; both are int32. It returns the statistics, shape
    (statistics, chunk, layers), on the devices, each of which has its own stretch of the networks.

    Parameters
    ----------
    networks
        The structure, the dtype and how many laws one call takes.
    chunk
        How many networks a call draws; a multiple of the number of devices.
    devices
        The devices that share them.
    seconds
        How long all calls will take, on one core.
    measured
        The statistics.
    sampler
        ``"dense"`` or ``"matrix_free"``.
    keep
        ``keep`` and ``checkpoint`` of `propagation.propagate`.
    block
        How many networks one vmap holds.
    spectrum
        Whether `singular_values.end_to_end` of the same networks is returned too, shape (chunk, k);
        with the sampler ``"dense"`` and one input.
    """
    mesh = Mesh(np.array(devices), (_NETWORKS,))
    whole, each = PartitionSpec(), PartitionSpec(_NETWORKS)
    put = functools.partial(on_devices, mesh)
    constants: dict[str, Any] = {"sampler": sampler, "measured": measured, "keep": keep}
    constants |= {"block": block, "spectrum": spectrum}
    zeros = np.zeros(chunk, np.int32)

    def arguments(
        networks: RandomNetworks, which: np.ndarray, numbers: np.ndarray
    ) -> tuple[RandomNetworks, Array, Array]:
        shared = jax.tree.map(functools.partial(put, whole), networks)
        return shared, put(each, which), put(each, numbers)

    program: Callable
    if devices == (jax.devices()[0],):
        program = Program.of(_run, (networks, zeros, zeros), seconds, twice=True, **constants)
        program.compile()
    else:
        lowered = _run.lower(*arguments(networks, zeros, zeros), mesh=mesh, **constants)
        program = lowered.compile(_compilation.options(seconds, computes_twice=True))

    return lambda *given: program(*arguments(*given))


def to_host(values: Array) -> np.ndarray:
    """The values of a chunk on the host: those of all processes."""
    if not values.is_fully_addressable:
        values = multihost_utils.process_allgather(values, tiled=True)
    return np.asarray(values)


def own_networks(chunk: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the indices in a chunk, ascending, of those that this process's devices draw."""
    own = [device.process_index == jax.process_index() for device in devices]
    return np.flatnonzero(np.repeat(own, chunk // len(devices)))


def own_part(array: Array, axis: int) -> np.ndarray:
    """The part of this process's devices of an array that is shared among devices along an axis."""
    if array.is_fully_addressable:
        return np.asarray(array)
    parts = sorted(array.addressable_shards, key=lambda part: part.index[axis].start)
    return np.concatenate([part.data for part in parts], axis=axis)


_STATIC = ("sampler", "measured", "keep", "block", "spectrum", "mesh")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _run(
    networks: RandomNetworks,
    which: Array,
    numbers: Array,
    sampler: str,
    measured: tuple[Statistic, ...],
    keep: tuple[bool, bool],
    block: int,
    spectrum: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Array, ...]:
    """Measure the statistics of one chunk of random networks, (statistics, chunk, layers).

    With ``spectrum`` also log singular values, (chunk, k).
    """

    def on_one_device(networks: RandomNetworks, which: Array, numbers: Array) -> tuple[Array, ...]:
        several = networks.inputs.shape[0] > 1

        def one(which: Array, number: Array) -> tuple[Array, ...]:
            law = jax.tree.map(lambda leaf: leaf[which if several else 0], networks)
            # Here, where the key is an argument: of a constant one, JAX 0.12 may compile without
            # end.
            key = jax.random.fold_in(_threefry.fused(law.key), number)
            values = propagation.propagate(
                law.network,
                law.inputs,
                key,
                sampler=sampler,
                wanted=measured,
                keep=keep[0],
                checkpoint=keep[1],
            )
            rows = jnp.stack([values[s.key] for s in measured])
            if not spectrum:
                return (rows,)
            return rows, singular_values.end_to_end(law.network, law.inputs, key)

        values, *logs = (
            jax.vmap(one)(which, numbers)
            if len(numbers) == block
            else jax.lax.map(lambda pair: one(*pair), (which, numbers), batch_size=block)
        )
        return values.swapaxes(0, 1), *logs

    if mesh is None or mesh.size == 1:
        return on_one_device(networks, which, numbers)
    everywhere, each = PartitionSpec(), PartitionSpec(_NETWORKS)
    shared = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(everywhere, each, each),
        out_specs=(PartitionSpec(None, _NETWORKS), *[each] * spectrum),
        check_vma=False,
    )
    return shared(networks, which, numbers)


# Whether a layer's signal left the float's range: measured like a statistic, not reported as one.
OVERFLOWED = Statistic(
    "overflowed",
    "signal is not finite",
    measure=lambda s: ~jnp.all(jnp.isfinite(s.preactivation)),
    predict=lambda _: jnp.zeros(()),
)
VANISHED = Statistic(
    "vanished",
    "signal is zero",
    measure=lambda s: jnp.all(s.preactivation == 0),
    predict=lambda _: jnp.zeros(()),
)


def in_order(call: Callable, networks: int, chunk: int, workers: int) -> Iterator[tuple[int, Any]]:
    """Run the chunks, several at a time, and yield their results in order.

    ``call`` takes a chunk's first number. Yielded are the number of networks that are done, and
    the result for those just added.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[tuple[int, Future]] = collections.deque()
        starts = iter(range(0, networks, chunk))
        try:
            while True:
                for first in starts:
                    waiting.append((first, pool.submit(call, first)))
                    if len(waiting) > workers:
                        break
                if not waiting:
                    return
                first, future = waiting.popleft()
                yield min(first + chunk, networks), future.result()
        finally:
            for _, future in waiting:
                future.cancel()
