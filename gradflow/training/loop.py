"""The compiled programs of training: start networks, take steps, and record what they are.

Each is a function of networks with an axis in front. On a CPU these are cut into blocks that are
trained one after the other; within a block, networks are in one vmap. Loops over steps are outside
of it, so that what is rare, the first cost that is not finite, is a branch and costs nothing.
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
from gradflow.training import parameters, records
from gradflow.training.parameters import Weights
from gradflow.training.records import Data

__all__ = ["NETWORKS", "Each", "Given", "Job", "State", "advance", "begin", "measure"]

# The axis of a mesh of devices.
NETWORKS = "networks"


class State(NamedTuple):
    """Networks in training, with an axis of them in front: what it takes to go on."""

    step: Int[Array, "*networks"]  # how many there were
    weights: Weights
    start: Weights  # W₀
    clip: Any
    optimiser: Any
    first_nonfinite: Int[Array, "*networks"]  # the step; -1 where there is none
    nonfinite_layer: Int[Array, "*networks"]  # from 1; -1 where there is none


class Each(NamedTuple):
    """What differs from network to network, with an axis of them in front."""

    network: Network
    rate: Array | np.ndarray
    number: Array | np.ndarray


class Given(NamedTuple):
    """What all networks share."""

    key: Array
    data: Data
    seen: Data
    validation: Data | None


class Job(NamedTuple):
    """What a training program is compiled for."""

    optimiser: Callable[[Any], optax.GradientTransformation]
    clip: optax.GradientTransformation | None
    batch: int
    wanted: tuple[Statistic, ...]
    bins: int  # of histograms; none if 0
    singular_values: int
    block: int
    mesh: Mesh


def _by_block(function: Callable, job: Job, networks: tuple, given: tuple) -> Any:
    """Call a function of (vmap, networks, given) with a block of networks at a time.

    All of ``networks`` has an axis of them in front, shared among the devices. A single network has
    none within the function, and what it calls vmap does nothing.
    """

    def one_block(networks: tuple, given: tuple) -> Any:
        if job.block > 1:
            return function(jax.vmap, networks, given)
        alone = jax.tree.map(lambda leaf: leaf[0], networks)
        return jax.tree.map(lambda leaf: leaf[None], function(lambda f: f, alone, given))

    def on_one_device(networks: tuple, given: tuple) -> Any:
        if jax.tree.leaves(networks)[0].shape[0] == job.block:
            return one_block(networks, given)
        cut = jax.tree.map(lambda leaf: leaf.reshape(-1, job.block, *leaf.shape[1:]), networks)
        found = jax.lax.map(lambda networks: one_block(networks, given), cut)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)

    if job.mesh.size == 1:
        return on_one_device(networks, given)
    each = PartitionSpec(NETWORKS)
    shared = jax.shard_map(
        on_one_device,
        mesh=job.mesh,
        in_specs=(each, PartitionSpec()),
        out_specs=each,
        check_vma=False,
    )
    return shared(networks, given)


# Signalling NaNs, which arithmetic does not make, by the size of a number in bytes.
_NEVER = {4: (jnp.uint32, 0x7FABCDEF), 8: (jnp.uint64, 0x7FF4_BCDE_F012_3456)}


def _all_known(gradient: Weights, state: State) -> Weights:
    """Return the gradient as it is, so that none of it is used before all weights have been read.

    They have when the gradient of the lowest layer is known, and whether numbers were finite; then
    they may be written in place. XLA does not see that of itself, and copies all of them at every
    step: a fifth of the time at width 1000. So every entry has a factor of 1 that looks as if it
    depended on those two.
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
    """One network in training: what its key decides, and its gradient."""

    def __init__(self, each: Each, given: Given, job: Job) -> None:
        self.network, self.given, self.job = each.network, given, job
        self.lean = parameters.lean(each.network)
        self.key = jax.random.fold_in(given.key, each.number)
        # None of the keys that layers have: those are the first depth + 1.
        rest = jax.random.fold_in(self.key, each.network.depth + 1)
        self.order_key, self.noise_key, self.optimiser_key = jax.random.split(rest, 3)
        self.optimiser = job.optimiser(each.rate)
        self.epoch_steps = len(given.data.labels) // job.batch

    def begin(self) -> State:
        drawn = parameters.initial_weights(self.network, self.key, self.given.data.inputs.dtype)
        weights = parameters.apart(self.network, drawn)
        clip = self.job.clip
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
        """Return an optimiser's state with this network's keys in the place of one for all."""
        own = jax.random.bits(self.optimiser_key)

        def with_own(leaf: Any) -> Any:
            is_key = jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)
            return jax.random.fold_in(leaf, own) if is_key else leaf

        return jax.tree.map(with_own, state)

    def order(self, epoch: Array) -> Array:
        """Return the samples in the order of this epoch."""
        key = jax.random.fold_in(self.order_key, epoch)
        return jax.random.permutation(key, len(self.given.data.labels)).astype(jnp.int32)

    def batch(self, step: Array, order: Array) -> tuple[Array, Array, Array]:
        """Return the inputs and labels of a step, and the key of what is random in it."""
        at = (step % self.epoch_steps) * self.job.batch
        chosen = jax.lax.dynamic_slice(order, (at,), (self.job.batch,))
        data = self.given.data
        noise = jax.random.fold_in(self.noise_key, step)
        return records.sites(data.inputs[chosen]), data.labels[chosen], noise

    def gradient(self, step: Array, order: Array, weights: Weights) -> tuple[Array, Weights]:
        """Return the cost of a step's batch and its gradient."""
        inputs, labels, noise = self.batch(step, order)

        def cost(weights: Weights) -> Array:
            logits = parameters.outputs(self.lean, weights, inputs, noise)
            return jnp.mean(records.cross_entropy(logits, labels))

        return jax.value_and_grad(cost)(weights)

    def clipped(self, gradient: Weights, state: State) -> tuple[Weights, Any]:
        """Return the gradient that the optimiser gets, and what the clipping remembers."""
        if self.job.clip is None:
            return gradient, state.clip
        tensors, kept = self.job.clip.update(
            self._as_tensors(gradient), state.clip, self._as_tensors(state.weights)
        )
        return parameters.from_tensors(self.lean, tensors), kept

    def _as_tensors(self, weights: Weights) -> list:
        return parameters.as_tensors(self.lean, weights)

    def updated(self, state: State, gradient: Weights) -> State:
        clipped, clip = self.clipped(_all_known(gradient, state), state)
        change, kept = self.optimiser.update(clipped, state.optimiser, state.weights)
        weights = optax.apply_updates(state.weights, change)
        return state._replace(step=state.step + 1, weights=weights, clip=clip, optimiser=kept)

    def not_finite_at(self, step: Array, order: Array, weights: Weights) -> Array:
        """Return the layer, from 1, at which this step's batch first met what is not finite.

        The highest one with such weights: the last gradient overflowed there on its way down. Or
        else the lowest one with such a signal, on its way up.
        """
        inputs, _, noise = self.batch(step, order)
        norms = parameters.log_norms(self.lean, weights)
        broken = jnp.isnan(norms) | (norms == jnp.inf)
        signal = ~parameters.finite_layers(self.lean, weights, inputs, noise)
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
        norms = functools.partial(parameters.log_norms, self.lean)
        found = {
            "update_ratio": jnp.exp(norms(change)) / jnp.exp(norms(state.weights)),
            "movement": jnp.exp(norms(moved)) / jnp.exp(norms(state.start)),
            "log_batch_gradient_norm": norms(gradient),
        }
        if self.job.clip is not None:
            found["log_clipped_gradient_norm"] = norms(clipped)
        weights = parameters.together(self.network, state.weights)
        seen = (self.network, weights, self.key, self.given.seen)
        found |= records.monitored(*seen, self.job.wanted)
        if self.job.bins:
            found |= records.activation_histograms(*seen, self.job.bins)
        if self.job.singular_values:
            found |= records.leading_singular_values(*seen, self.job.singular_values)
        if self.given.validation is not None:
            found |= records.validated(self.lean, state.weights, self.key, self.given.validation)
        return found


@functools.partial(jax.jit, static_argnames="job")
def begin(each: Each, given: Given, job: Job) -> State:
    """Return the networks before their first step."""

    def of_block(vmap: Callable, networks: tuple[Each], given: Given) -> State:
        return vmap(lambda each: _Trained(each, given, job).begin())(*networks)

    return _by_block(of_block, job, (each,), given)


@functools.partial(jax.jit, static_argnames="job", donate_argnames="state")
def advance(each: Each, state: State, given: Given, first: Array, stop: Array, job: Job) -> State:
    """Take the steps from ``first`` on, until there were ``stop``."""
    epoch_steps = len(given.data.labels) // job.batch

    def of_block(vmap: Callable, networks: tuple[Each, State], shared: tuple) -> State:
        (each, state), (given, first, stop) = networks, shared

        def every(method: Callable, *axes: Any) -> Any:
            """Call a method of each network."""
            return vmap(lambda each, *axes: method(_Trained(each, given, job), *axes))(each, *axes)

        def epoch(number: Array, state: State) -> State:
            order = every(lambda one: one.order(number))

            def update(step: Array, state: State) -> State:
                weights = state.weights
                cost, gradient = every(lambda one, *axes: one.gradient(step, *axes), order, weights)
                is_first = (state.first_nonfinite < 0) & ~jnp.isfinite(cost)

                def layers() -> Array:
                    found = every(lambda one, *axes: one.not_finite_at(step, *axes), order, weights)
                    return jnp.where(is_first, found, state.nonfinite_layer)

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

    return _by_block(of_block, job, (each, state), (given, first, stop))


@functools.partial(jax.jit, static_argnames="job")
def measure(each: Each, state: State, given: Given, step: Array, job: Job) -> dict[str, Array]:
    """Return what is recorded of the networks after so many steps."""

    def of_block(vmap: Callable, networks: tuple[Each, State], shared: tuple) -> dict[str, Array]:
        given, step = shared

        def one(each: Each, state: State) -> dict[str, Array]:
            return _Trained(each, given, job).record(step, state)

        return vmap(one)(*networks)

    return _by_block(of_block, job, (each, state), (given, step))
