"""The compiled programs of training: start networks, take steps, and record statistics.

Each is a function of networks with an axis in front. On a CPU these are cut into blocks that are
trained one after the other; within a block, networks are in one vmap. Loops over steps are outside
of it, so that a rare event, the first cost that is not finite, is a branch and costs nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from gradflow.networks import Network
from gradflow.statistics import Statistic
from gradflow.training import _parameters, _records
from gradflow.training._parameters import Weights
from gradflow.training._records import Data

# The axis of a mesh of devices that networks are divided along.
NETWORKS = "networks"


class State(NamedTuple):
    """Networks in training, with an axis of networks in front: all that resuming needs."""

    step: Int[Array, "*networks"]  # updates done
    weights: Weights
    start: Weights  # W₀
    clip: Any  # of optax
    optimiser: Any  # of optax
    first_nonfinite: Int[Array, "*networks"]  # the step; -1 where there is none
    nonfinite_layer: Int[Array, "*networks"]  # from 1; -1 where there is none


class PerNetwork(NamedTuple):
    """Arguments that differ from network to network, with an axis of networks in front."""

    network: Network
    rate: Array | np.ndarray
    number: Array | np.ndarray  # of the seed


class Shared(NamedTuple):
    """Arguments that all networks share."""

    key: Array
    data: Data
    monitor: Data
    validation: Data | None


class Settings(NamedTuple):
    """The static arguments of the compiled programs."""

    optimiser: Callable[[Any], optax.GradientTransformation]
    clip: optax.GradientTransformation | None
    batch: int
    wanted: tuple[Statistic, ...]
    bins: int  # of histograms; none if 0
    singular_values: int
    block: int = 1  # networks in one vmap
    mesh: Mesh | None = None  # of devices that networks are divided among


def _by_block(function: Callable, settings: Settings, networks: tuple, shared: tuple) -> Any:
    """Call a function of (vmap, networks, shared) with a block of networks at a time.

    Every array in ``networks`` has an axis of networks in front, divided among the devices. For a
    block of one network the function gets arrays without that axis, and a vmap that does nothing.
    """

    def one_block(networks: tuple, shared: tuple) -> Any:
        if settings.block > 1:
            return function(jax.vmap, networks, shared)
        alone = jax.tree.map(lambda leaf: leaf[0], networks)
        return jax.tree.map(lambda leaf: leaf[None], function(lambda f: f, alone, shared))

    def on_one_device(networks: tuple, shared: tuple) -> Any:
        if jax.tree.leaves(networks)[0].shape[0] == settings.block:
            return one_block(networks, shared)
        cut = jax.tree.map(lambda leaf: leaf.reshape(-1, settings.block, *leaf.shape[1:]), networks)
        blocks = jax.lax.map(lambda networks: one_block(networks, shared), cut)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), blocks)

    assert settings.mesh is not None
    if settings.mesh.size == 1:
        return on_one_device(networks, shared)
    each = PartitionSpec(NETWORKS)
    on_all_devices = jax.shard_map(
        on_one_device,
        mesh=settings.mesh,
        in_specs=(each, PartitionSpec()),
        out_specs=each,
        check_vma=False,
    )
    return on_all_devices(networks, shared)


# Signalling NaNs, which arithmetic does not make, by the size of a number in bytes.
_NEVER = {4: (jnp.uint32, 0x7FABCDEF), 8: (jnp.uint64, 0x7FF4_BCDE_F012_3456)}


def _all_known(gradient: Weights, state: State) -> Weights:
    """The same gradient, no entry of which XLA uses before all weights have been read.

    All weights have been read once the gradient of the lowest layer and whether numbers were finite
    are known; then weights may be written in place. XLA does not see that of itself, and copies all
    of them at every step: a fifth of the time at width 1000. So every entry has a factor of 1 that
    looks as if it depended on those two.
    """
    lowest = jax.tree.leaves(gradient)[0].ravel()[0]
    if lowest.dtype.itemsize not in _NEVER:
        return gradient
    kind, never = _NEVER[lowest.dtype.itemsize]
    is_never = jax.lax.bitcast_convert_type(lowest, kind) == jnp.asarray(never, kind)
    is_never &= state.nonfinite_layer >= 0
    one = jnp.where(is_never, 2, 1).astype(lowest.dtype)
    return jax.tree.map(lambda g: g * one, gradient)


class _Trained:
    """One network in training: its random numbers, gradients, updates and records."""

    def __init__(self, each: PerNetwork, shared: Shared, settings: Settings) -> None:
        self.network, self.shared, self.settings = each.network, shared, settings
        self.lean = _parameters.lean(each.network)
        self.key = jax.random.fold_in(shared.key, each.number)
        # None of the keys that layers have: those are the first depth + 1.
        rest = jax.random.fold_in(self.key, each.network.depth + 1)
        self.order_key, self.noise_key, self.optimiser_key = jax.random.split(rest, 3)
        self.optimiser = settings.optimiser(each.rate)
        self.epoch_steps = len(shared.data.labels) // settings.batch

    def begin(self) -> State:
        drawn = _parameters.initial_weights(self.network, self.key, self.shared.data.inputs.dtype)
        weights = _parameters.apart(self.network, drawn)
        clip = self.settings.clip
        return State(
            step=jnp.zeros((), jnp.int32),
            weights=weights,
            start=weights,
            clip=() if clip is None else clip.init(self._as_tensors(weights)),
            optimiser=self._with_own_noise(self.optimiser.init(weights)),
            first_nonfinite=jnp.full((), -1, jnp.int32),
            nonfinite_layer=jnp.full((), -1, jnp.int32),
        )

    def _with_own_noise(self, state: Any) -> Any:
        """The optimiser's state with this network's own keys in place of one key for all."""
        own = jax.random.bits(self.optimiser_key)

        def with_own(leaf: Any) -> Any:
            is_key = jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)
            return jax.random.fold_in(leaf, own) if is_key else leaf

        return jax.tree.map(with_own, state)

    def order(self, epoch: Array) -> Array:
        """The samples' indices in the order of this epoch."""
        key = jax.random.fold_in(self.order_key, epoch)
        return jax.random.permutation(key, len(self.shared.data.labels)).astype(jnp.int32)

    def batch(self, step: Array, order: Array) -> tuple[Array, Array, Array]:
        """The inputs and labels of a step, and the key of its random numbers."""
        at = (step % self.epoch_steps) * self.settings.batch
        chosen = jax.lax.dynamic_slice(order, (at,), (self.settings.batch,))
        data = self.shared.data
        noise = jax.random.fold_in(self.noise_key, step)
        return _records.sites(data.inputs[chosen]), data.labels[chosen], noise

    def gradient(self, step: Array, order: Array, weights: Weights) -> tuple[Array, Weights]:
        """The cost of a step's batch and its gradient."""
        inputs, labels, noise = self.batch(step, order)

        def cost(weights: Weights) -> Array:
            logits = _parameters.outputs(self.lean, weights, inputs, noise)
            return jnp.mean(_records.cross_entropy(logits, labels))

        return jax.value_and_grad(cost)(weights)

    def clipped(self, gradient: Weights, state: State) -> tuple[Weights, Any]:
        """The gradient that the optimiser gets, and the new state of the clipping."""
        if self.settings.clip is None:
            return gradient, state.clip
        tensors, kept = self.settings.clip.update(
            self._as_tensors(gradient), state.clip, self._as_tensors(state.weights)
        )
        return _parameters.from_tensors(self.lean, tensors), kept

    def _as_tensors(self, weights: Weights) -> list:
        return _parameters.as_tensors(self.lean, weights)

    def updated(self, state: State, gradient: Weights) -> State:
        clipped, clip = self.clipped(_all_known(gradient, state), state)
        change, kept = self.optimiser.update(clipped, state.optimiser, state.weights)
        weights = optax.apply_updates(state.weights, change)
        return state._replace(step=state.step + 1, weights=weights, clip=clip, optimiser=kept)

    def not_finite_at(self, step: Array, order: Array, weights: Weights) -> Array:
        """The layer, from 1, at which this step's batch first met a number that is not finite.

        The highest layer with such weights: the last gradient overflowed there in its backward
        pass. Where there is none, the lowest layer with such a signal in the forward pass.
        """
        inputs, _, noise = self.batch(step, order)
        norms = _parameters.log_norms(self.lean, weights)
        broken = jnp.isnan(norms) | (norms == jnp.inf)
        signal = ~_parameters.finite_layers(self.lean, weights, inputs, noise)
        depth = len(norms)
        highest = depth - jnp.argmax(broken[::-1])
        lowest = jnp.where(jnp.any(signal), jnp.argmax(signal) + 1, depth)
        return jnp.where(jnp.any(broken), highest, lowest).astype(jnp.int32)

    def record(self, step: Array, state: State) -> dict[str, Array]:
        order = self.order(step // self.epoch_steps)
        _, gradient = self.gradient(step, order, state.weights)
        clipped, _ = self.clipped(gradient, state)
        change, _ = self.optimiser.update(clipped, state.optimiser, state.weights)
        moved = jax.tree.map(jnp.subtract, state.weights, state.start)
        norms = functools.partial(_parameters.log_norms, self.lean)
        recorded = {
            "update_ratio": jnp.exp(norms(change)) / jnp.exp(norms(state.weights)),
            "movement": jnp.exp(norms(moved)) / jnp.exp(norms(state.start)),
            "log_batch_gradient_norm": norms(gradient),
        }
        if self.settings.clip is not None:
            recorded["log_clipped_gradient_norm"] = norms(clipped)
        weights = _parameters.together(self.network, state.weights)
        monitored = (self.network, weights, self.key, self.shared.monitor)
        recorded |= _records.monitored(*monitored, self.settings.wanted)
        if self.settings.bins:
            recorded |= _records.activation_histograms(*monitored, self.settings.bins)
        if self.settings.singular_values:
            recorded |= _records.leading_singular_values(*monitored, self.settings.singular_values)
        if self.shared.validation is not None:
            recorded |= _records.validated(
                self.lean, state.weights, self.key, self.shared.validation
            )
        return recorded


@functools.partial(jax.jit, static_argnames="settings")
def begin(each: PerNetwork, shared: Shared, settings: Settings) -> State:
    """The networks before their first step."""

    def of_block(vmap: Callable, networks: tuple[PerNetwork], shared: Shared) -> State:
        return vmap(lambda each: _Trained(each, shared, settings).begin())(*networks)

    return _by_block(of_block, settings, (each,), shared)


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")
def advance(
    each: PerNetwork, state: State, shared: Shared, first: Array, stop: Array, settings: Settings
) -> State:
    """Take the steps from number ``first`` up to, and without, number ``stop``."""
    epoch_steps = len(shared.data.labels) // settings.batch

    def of_block(vmap: Callable, networks: tuple[PerNetwork, State], operands: tuple) -> State:
        (each, state), (shared, first, stop) = networks, operands

        def every(method: Callable, *axes: Any) -> Any:
            """A method's results of every network in the block."""
            return vmap(lambda each, *axes: method(_Trained(each, shared, settings), *axes))(
                each, *axes
            )

        def epoch(number: Array, state: State) -> State:
            order = every(lambda one: one.order(number))

            def update(step: Array, state: State) -> State:
                weights = state.weights
                cost, gradient = every(lambda one, *axes: one.gradient(step, *axes), order, weights)
                is_first = (state.first_nonfinite < 0) & ~jnp.isfinite(cost)

                def layers() -> Array:
                    layer = every(lambda one, *axes: one.not_finite_at(step, *axes), order, weights)
                    return jnp.where(is_first, layer, state.nonfinite_layer)

                layer = jax.lax.cond(jnp.any(is_first), layers, lambda: state.nonfinite_layer)
                state = state._replace(
                    first_nonfinite=jnp.where(is_first, step, state.first_nonfinite),
                    nonfinite_layer=layer,
                )
                return every(lambda one, *axes: one.updated(*axes), state, gradient)

            begun, ended = number * epoch_steps, (number + 1) * epoch_steps
            within = jnp.maximum(first, begun), jnp.minimum(stop, ended)
            return jax.lax.fori_loop(*within, update, state)

        return jax.lax.fori_loop(first // epoch_steps, (stop - 1) // epoch_steps + 1, epoch, state)

    return _by_block(of_block, settings, (each, state), (shared, first, stop))


@functools.partial(jax.jit, static_argnames="settings")
def measure(
    each: PerNetwork, state: State, shared: Shared, step: Array, settings: Settings
) -> dict[str, Array]:
    """The records of the networks after so many steps."""

    def of_block(
        vmap: Callable, networks: tuple[PerNetwork, State], operands: tuple
    ) -> dict[str, Array]:
        shared, step = operands

        def one(each: PerNetwork, state: State) -> dict[str, Array]:
            return _Trained(each, shared, settings).record(step, state)

        return vmap(one)(*networks)

    return _by_block(of_block, settings, (each, state), (shared, step))
