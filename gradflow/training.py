"""Training: the weights of random networks as parameters, and how layers learn.

`initial_weights` are those of the network that `simulation.propagation.propagate` draws with the
dense sampler from the same key; `outputs` is the network with any such weights, an ordinary
function to differentiate. `train` trains many networks at once by minibatches, on the cross-entropy
of softmax(z^L), and records every layer along the way. What is recorded of a layer is what
`propagate` measures when it is given the weights of that step: there is one implementation.

Network number i of a grid point has the key ``fold_in(key, i)``, as in a simulation: before the
first step its statistics are those of the network that a simulation draws. Batches are the data in
an order drawn anew each epoch (samples that fill no batch are left out), the same one for number i
at every grid point. What happens at a step depends on the key and the step's number alone.
"""

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gradflow import compilation, statistics
from gradflow import networks as nets
from gradflow.blocks import UnitVariance
from gradflow.ensembles import Distribution
from gradflow.errors import InputError, check_count, check_scale
from gradflow.networks import Network, Stage
from gradflow.norms import unit_rows
from gradflow.simulation import matrices, memory, monte_carlo, propagation, questions
from gradflow.simulation.monte_carlo import Progress
from gradflow.simulation.propagation import scan_blocks
from gradflow.simulation.questions import LayerKey, LayerWeights
from gradflow.statistics import Statistic
from gradflow.theory import mean_field

__all__ = ["RECORDED", "State", "Training", "Weights", "activation_percentile_98"]
__all__ += ["initial_weights", "outputs", "train"]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# By stage, each array with an axis of layers in front, unless the stage's layers share theirs.
Weights = tuple[LayerWeights, ...]


def initial_weights(network: Network, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Weights:
    """Draw the weights and biases of one random network, as the dense sampler does.

    Biases are parameters where the network has them, and `networks.with_biases` gives it some that
    start at 0.

    Returns
    -------
    tuple
        For each stage, its matrices W, (layers, n_out, n_in), σ_w/√n_in and all, and its biases,
        (layers, 1, n_out); without the axis of layers where they share their weights.
    """
    keys = jax.random.split(key, network.depth + 1)[1:]
    sites = 2 * math.prod(stage.block.merges for stage in network.stages)
    found, first = [], 0
    for stage, n_in in zip(network.stages, network.stage_widths[:-1], strict=True):
        draw = functools.partial(_drawn, stage, jnp.zeros((sites, n_in), dtype))
        of_stage = keys[first : first + stage.repeats]
        # One layer after another, so that a deep stage takes no longer to compile.
        found.append(draw(of_stage[0]) if stage.tied else jax.lax.map(draw, of_stage))
        first += stage.repeats
        sites //= stage.block.merges
    return tuple(found)


def _drawn(stage: Stage, signal: Array, key: Array) -> LayerWeights:
    """Return what a block draws, by applying it once to a signal of this shape."""
    drawn: list[Array] = []
    biases: list[Array] = []

    def multiply(
        key: PRNGKeyArray,
        x: Array,
        *,
        sigma_w: Any,
        width: int,
        distribution: Distribution,
        seen: Array | None = None,
    ) -> Array:
        del seen
        entries = matrices.drawn(key, (width, x.shape[1]), distribution, x.dtype).weights
        drawn.append(jnp.asarray(sigma_w, x.dtype) / x.shape[1] ** 0.5 * entries)
        return jnp.zeros((x.shape[0], width), x.dtype)

    def bias(draw: Callable[[], Array]) -> Array:
        biases.append(draw())
        return biases[-1]

    multiply.bias = bias  # type: ignore[attr-defined]
    stage.block.apply(signal, multiply, key)
    return LayerWeights(tuple(drawn), tuple(biases))


def outputs(
    network: Network,
    weights: Weights,
    inputs: Float[Array, "sites n_in"],
    key: PRNGKeyArray | None = None,
) -> Float[Array, "sites_out n_out"]:
    """Return z^L of the network with these weights: with softmax, its logits.

    A pure function: jit it, vmap it, differentiate it.

    Parameters
    ----------
    network
        Its structure; the scales of its law have no say.
    weights
        Those of `initial_weights`, or trained.
    inputs
        Shape (sites, n_0).
    key
        For what is random and no parameter: masks of dropout, the inputs of a recurrent network.
        With the key of `propagate` they are the same as there.
    """
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, network.depth + 1)[1:]
    signal, first = inputs, 0
    for stage, given in zip(network.stages, weights, strict=True):
        of_stage = questions.stage_keys(stage, keys[first : first + stage.repeats])
        step = functools.partial(_layer, stage, given if stage.tied else None)
        each = None if stage.tied else given
        signal, _ = scan_blocks(step, signal, (of_stage, each))
        first += stage.repeats
    return signal


def _layer(
    stage: Stage,
    shared: LayerWeights | None,
    signal: Array,
    parts: tuple[LayerKey, LayerWeights | None],
) -> tuple[Array, None]:
    key, own = parts
    given = shared if own is None else own
    assert given is not None
    remaining = iter(given.matrices)

    def answer(_: PRNGKeyArray, x: Array, **law: Any) -> Array:
        del law
        return _matmul(x, next(remaining).T)

    key = key._replace(given=LayerWeights((), given.biases))
    return questions.blockwise(stage.block, key, signal, answer), None


def _percentile_98(values: Float[Array, "sites n"]) -> Float[Array, ""]:
    """Return the least number that 98 % of the values do not exceed, to rounding.

    By bisection: to sort them takes a CPU fifty times as long.
    """

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        enough = jnp.mean((values <= middle).astype(values.dtype)) >= 0.98
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    return jax.lax.fori_loop(0, 26, halve, (jnp.min(values), jnp.max(values)))[1]


activation_percentile_98 = Statistic(
    "activation_percentile_98",
    "98th percentile of activations over units and inputs",
    measure=lambda s: _percentile_98(s.activation * jnp.exp(s.log_scale)[:, None]),
    predict=lambda _: jnp.full((), jnp.nan),
)
RECORDED = (*statistics.ALL, activation_percentile_98)

# What is recorded beside statistics, of each layer: its label.
OF_LAYERS = {
    "update_ratio": "‖ΔW‖/‖W‖, of the update that the step makes",
    "movement": "‖W - W₀‖/‖W₀‖, relative movement since the start",
}
# And of each network, on the monitored inputs.
OF_NETWORKS = {"loss": "cross-entropy, natural logarithm", "error": "fraction of wrong classes"}

# A layer that has moved this many times its norm, in a network that is worse than guessing.
_MOVED = 10.0
# What the paper monitors (Glorot & Bengio 2010, section 3).
_MONITORED = 300
# Stages of no more layers are trained as so many arrays: a loop over slices of one takes a third
# more time, and compiles in a time that does not grow with them.
_FEW_LAYERS = 16
# Copies of a network's weights while it is trained: themselves, their start, gradients, updates,
# two of an optimiser, and two while they are measured.
_COPIES = 8
# On a CPU a few small networks in one vmap take half as long as one after another, and large ones
# twice as long: networks in a block at most, and weights in it, measured at widths 30, 100 and 300.
_IN_A_BLOCK, _WEIGHTS_IN_A_BLOCK = 4, 200_000
_FLOPS_A_SECOND = 1e10  # of one core, with small matrices


class State(NamedTuple):
    """Networks in training, with an axis of them in front: what it takes to go on."""

    step: Int[Array, "*networks"]  # how many there were
    weights: Weights
    start: Weights  # W₀
    optimiser: Any
    first_nonfinite: Int[Array, "*networks"]  # -1 where there is none


class Training(eqx.Module):
    """What became of networks in training.

    Attributes
    ----------
    values
        By key, shape (networks, learning_rates, seeds, steps) and for layers' (…, layers): each
        statistic, ``update_ratio`` and ``movement`` of the layers' matrices, all of a layer
        together; ``loss`` and ``error`` of networks. On the monitored inputs; gradients are of each
        input's own cost, and weight gradients of the mean cost.
    steps
        The recorded ones; 0 is before the first.
    first_nonfinite
        Shape (networks, learning_rates, seeds): the first step whose batch had a cost that is not
        finite; -1 where there is none.
    networks, learning_rates, seeds
        The grid.
    batch, samples, monitored, classes
        How many inputs a step, in all, and monitored; how many classes.
    state
        The networks after the last step, flattened to one axis; None unless it was asked for.
    """

    values: dict[str, np.ndarray]
    steps: np.ndarray
    first_nonfinite: np.ndarray
    networks: tuple[Network, ...]
    learning_rates: np.ndarray
    monitor: np.ndarray
    state: State | None
    seeds: int = eqx.field(static=True)
    batch: int = eqx.field(static=True)
    samples: int = eqx.field(static=True)
    seconds: float = eqx.field(static=True)
    compile_seconds: float = eqx.field(static=True)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return what was recorded by its key or, in its own unit, by its name."""
        if name in self.values:
            return self.values[name]
        return np.exp(self.values[f"log_{name}"].astype(np.float64))

    def weights(self, network: int = 0, learning_rate: int = 0, seed: int = 0) -> Weights:
        """Return the weights after the last step of one network, by its place in the grid.

        Raises
        ------
        InputError
            If they were not kept.
        """
        if self.state is None:
            raise InputError("weights were not kept; train with keep_state=True")
        at = np.ravel_multi_index((network, learning_rate, seed), self.first_nonfinite.shape)
        return _together(self.networks[network], jax.tree.map(lambda m: m[at], self.state.weights))

    @property
    def diverged(self) -> np.ndarray:
        """The first recorded step at which a network has diverged; -1 where it has not.

        That is: its loss is not finite, or some layer has moved 10 times its norm and the loss is
        above that of guessing, log(classes). Bounded units keep a network that explodes finite.
        """
        classes = self.networks[0].widths[-1]
        loss = self.values["loss"]
        with np.errstate(invalid="ignore"):
            far = np.any(self.values["movement"] > _MOVED, axis=-1) & (loss > math.log(classes))
        gone = far | ~np.isfinite(loss)
        return np.where(gone.any(axis=-1), self.steps[gone.argmax(axis=-1)], -1)

    def theory(self, network: int = 0) -> dict[str, np.ndarray]:
        """Return what theory says of one of the networks at step 0, by key, float64, (layers,).

        Of the mean over monitored inputs. A gradient's size is the cost's, and theory says how it
        changes from layer to layer: it has the measured mean at the top. What depends on pairs of
        inputs is NaN, and everything is where a network's signals do, as under BatchNorm.
        """
        found = _predicted(self.networks[network], self.monitor)
        at_start = {
            key: np.mean(self.values[key][network, :, :, 0, -1], dtype=np.float64)
            for key in ("log_gradient_variance", "log_gradient_norm")
            if key in self.values
        }
        for key, top in at_start.items():
            found[key] = found[key] - found[key][-1] + top
        return found

    def to_xarray(self) -> xarray.Dataset:
        """Return what was recorded, labelled, and theory at step 0 as ``<name>_theory``."""
        of_networks = ("network", "learning_rate", "seed")
        known = {s.key: s for s in RECORDED}
        found: dict[str, Any] = {}
        for key, value in self.values.items():
            layered = key not in OF_NETWORKS
            dims = (*of_networks, "step", "layer") if layered else (*of_networks, "step")
            found[key] = (dims, value)
            if key in known and known[key].log:
                with np.errstate(over="ignore"):
                    found[known[key].name] = (dims, np.exp(value.astype(np.float64)))
        found |= {
            "first_nonfinite": (of_networks, self.first_nonfinite),
            "diverged": (of_networks, self.diverged),
        }
        theories = [self.theory(number) for number in range(len(self.networks))]
        for key in theories[0].keys() & self.values.keys():
            value = np.stack([theory[key] for theory in theories])
            found[f"{key}_theory"] = (("network", "layer"), value)
            if known[key].log:
                with np.errstate(over="ignore"):
                    found[f"{known[key].name}_theory"] = (("network", "layer"), np.exp(value))
        dataset = xarray.Dataset(
            found,
            coords={
                "network": [network.name for network in self.networks],
                "learning_rate": self.learning_rates,
                "seed": np.arange(self.seeds),
                "step": self.steps,
                "layer": statistics.layers(self.networks[0].depth),
            },
        )
        labels = {**OF_LAYERS, **OF_NETWORKS, **{s.key: s.label for s in RECORDED if not s.log}}
        for name, label in labels.items():
            if name in dataset:
                dataset[name].attrs["long_name"] = label
        return statistics.labelled(dataset).assign_attrs(
            widths=list(self.networks[0].widths),
            batch=self.batch,
            samples=self.samples,
            monitored=len(self.monitor),
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
            jax=jax.__version__,
            device=jax.devices()[0].device_kind,
        )


def train(
    networks: Network | Sequence[Network],
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    steps: int = 1000,
    batch: int = 10,
    learning_rate: float | Sequence[float] = 0.1,
    seeds: int = 1,
    key: PRNGKeyArray | int = 0,
    optimiser: Callable[[Any], optax.GradientTransformation] = optax.sgd,
    record: Sequence[int] | None = None,
    monitor: tuple[ArrayLike, ArrayLike] | None = None,
    wanted: Sequence[Statistic] = RECORDED,
    biases: bool = True,
    keep_state: bool = False,
    state: State | None = None,
    block: int | None = None,
    memory_budget: int | None = None,
    progress: Progress | None = None,
) -> Training:
    """Train networks × learning rates × seeds, each by itself, in one compiled program.

    Parameters
    ----------
    networks
        One law or several that differ in numbers alone (σ_w, σ_b, branch scales), as
        ``[mlp(widths, "tanh", fan_in(s)) for s in …]``; the last layer's units are the classes.
    inputs
        Shape (samples, features): the features are n_0, or for convolutions n_0 of each position.
        Their dtype is that of training.
    labels
        Shape (samples,): whole numbers from 0.
    steps, batch
        How many updates, in all, each of so many inputs.
    learning_rate
        One or several: what ``optimiser`` is called with.
    seeds
        How many random networks at each point of the grid.
    key
        A JAX key, or an integer seed.
    optimiser
        From a learning rate, which is traced, to an optax optimiser: ``optax.adam``, or for a
        schedule ``lambda rate: optax.sgd(optax.cosine_decay_schedule(rate, 1000))``.
    record
        The steps to record; 0, ``steps`` and some between, ever further apart, without it.
    monitor
        (inputs, labels) that everything is measured on; 300 of the data without it.
    wanted
        The statistics to record.
    biases
        Whether layers without biases get some that start at 0 (as the paper's do).
    keep_state
        Also return the networks as they are after the last step.
    state
        Go on from this one, of the same call with fewer ``steps``; record what comes after those.
    block
        How many networks one vmap holds; chosen from the device and its free memory without it: on
        a CPU a few, and blocks are trained one after the other on each of its cores.
    memory_budget
        Bytes to stay within; the device's free memory without it.
    progress
        Called with (networks done, networks in all).

    Raises
    ------
    InputError
        If data do not fit the network or are not finite, a label is no class, a learning rate is
        not above 0, the batch is larger than the data, or a number is not a whole one of at least
        1. A network that diverges raises nothing; see `Training.diverged`.
    """
    laws = (networks,) if isinstance(networks, Network) else tuple(networks)
    laws = _checked_laws(tuple(map(nets.with_biases, laws)) if biases else laws)
    steps, seeds = check_count("steps", steps), check_count("seeds", seeds)
    rates = np.atleast_1d(np.asarray(learning_rate, np.float64))
    check_scale("learning_rate", rates, positive=True)
    data = _checked_data("", inputs, labels, laws[0])
    samples, batch = len(data.labels), check_count("batch", batch)
    if batch > samples:
        raise InputError(f"batch is {batch}, and there are {samples} samples; use at most as many")
    chosen = np.arange(min(_MONITORED, samples)) * samples // min(_MONITORED, samples)
    seen = (
        _Data(data.inputs[chosen], data.labels[chosen])
        if monitor is None
        else _checked_data("monitor's ", *monitor, laws[0])
    )
    dtype = data.inputs.dtype
    begin = 0 if state is None else int(state.step[0])
    times = _record_steps(record, begin, steps)
    key = jax.random.key(key) if isinstance(key, int) else key

    grid = np.array(list(itertools.product(range(len(laws)), range(len(rates)), range(seeds))))
    arrays = [law.as_arrays(dtype) for law in laws]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves)[grid[:, 0]], *arrays)
    each = (stacked, jnp.asarray(rates, dtype)[grid[:, 1]], jnp.asarray(grid[:, 2]), state)
    wanted = tuple(s for s in wanted if s.sites <= len(seen.labels))
    job = _Job(optimiser, batch, wanted, keep_state)

    count = len(grid)
    workers, block = _plan(laws[0], len(seen.labels), count, block, memory_budget, dtype.itemsize)
    calls = max(1, min(8, count // (workers * block)))  # of each worker, so that progress shows
    chunk = block * -(-count // (workers * block * calls))
    begun = time.perf_counter()
    if progress:
        progress(0, count)

    def part(first: int) -> Any:
        numbers = np.minimum(np.arange(first, first + chunk), count - 1)
        return jax.tree.map(lambda leaf: leaf[numbers], each)

    spans = jnp.asarray(np.stack([np.append(begin, times[:-1]), times], axis=1), jnp.int32)
    shared = (key, data, seen, spans)
    weights = sum(n * m for layer in laws[0].shapes for n, m in layer)
    seconds = 6 * weights * batch * steps * count / _FLOPS_A_SECOND
    program = _run.lower(part(0), *shared, job=job, block=block).compile(
        compilation.options(seconds)
    )
    compiled = time.perf_counter()
    parts = []
    for done, found in monte_carlo.in_order(
        lambda first: jax.device_get(program(part(first), *shared)), count, chunk, workers
    ):
        parts.append(found)
        if progress:
            progress(done, count)
    finished = time.perf_counter()

    records, last = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    shape = (len(laws), len(rates), seeds)
    return Training(
        values={k: v.reshape(*shape, *v.shape[1:]) for k, v in records.items()},
        steps=times,
        first_nonfinite=last.first_nonfinite.reshape(shape),
        networks=laws,
        learning_rates=rates,
        monitor=np.asarray(seen.inputs),
        state=last if keep_state else None,
        seeds=seeds,
        batch=batch,
        samples=samples,
        seconds=finished - compiled,
        compile_seconds=compiled - begun,
    )


class _Data(NamedTuple):
    """Samples, with an axis of positions where a network's first sites are those."""

    inputs: Float[Array, "samples *positions n_in"]
    labels: Int[Array, " samples"]


class _Job(NamedTuple):
    """What a training program is compiled for."""

    optimiser: Callable[[Any], optax.GradientTransformation]
    batch: int
    wanted: tuple[Statistic, ...]
    keep_state: bool


def _checked_laws(laws: tuple[Network, ...]) -> tuple[Network, ...]:
    if not laws:
        raise InputError("networks is empty; it takes at least one")
    kinds = [jax.tree.structure(law.as_arrays(jnp.float32)) for law in laws]
    for law, kind in zip(laws, kinds, strict=True):
        if kind != kinds[0]:  # type: ignore[operator]
            raise InputError(
                f"networks {laws[0].name!r} and {law.name!r} differ in more than numbers (widths, "
                "depth, activation, blocks, biases); train them in calls of their own"
            )
    blocks = jax.tree.leaves(laws[0].stages, is_leaf=lambda b: isinstance(b, UnitVariance))
    if any(isinstance(block, UnitVariance) for block in blocks):
        raise InputError(
            "a UnitVariance block says how LSUV starts weights, and is no layer to train; train a "
            "network without it, with the σ_w of simulation.propagation.lsuv"
        )
    return laws


def _checked_data(whose: str, inputs: ArrayLike, labels: ArrayLike, network: Network) -> _Data:
    found, classes = np.asarray(inputs), np.asarray(labels)
    positions = math.prod(stage.block.merges for stage in network.stages)
    width, units = network.input_width, network.widths[-1]
    if found.ndim != 2 or not len(found) or found.shape[1] != positions * width:
        of_positions = f" ({positions} positions of {width})" if positions > 1 else ""
        raise InputError(
            f"{whose}inputs has shape {found.shape}; it is (samples, {positions * width})"
            f"{of_positions} for this network, with at least one sample"
        )
    if not np.issubdtype(found.dtype, np.floating):
        found = found.astype(np.float32)
    if not np.all(np.isfinite(found)):
        bad = np.argwhere(~np.isfinite(found))[0]
        raise InputError(
            f"{whose}inputs[{bad[0]}, {bad[1]}] is {found[tuple(bad)]}; every value must be a "
            "finite number"
        )
    if classes.shape != found.shape[:1] or not np.issubdtype(classes.dtype, np.integer):
        raise InputError(
            f"{whose}labels is of {classes.dtype} and shape {classes.shape}; it is a whole number "
            f"for each of {len(found)} samples"
        )
    outside = classes[(classes < 0) | (classes >= units)]
    if outside.size:
        raise InputError(
            f"{whose}labels has {outside[0]}; the network's last layer has {units} units, so that "
            f"labels are from 0 to {units - 1}"
        )
    if positions > 1:
        found = found.reshape(len(found), positions, width)
    return _Data(jnp.asarray(found), jnp.asarray(classes, jnp.int32))


def _record_steps(record: Sequence[int] | None, begin: int, steps: int) -> np.ndarray:
    if record is None:
        known = np.unique(np.round(np.geomspace(1, steps + 1, 25)).astype(np.int32) - 1)
        return known[known >= begin]
    times = np.unique([check_count("record", step, 0) for step in record]).astype(np.int32)
    if not times.size or times[0] < begin or times[-1] != steps:
        raise InputError(
            f"record is {record!r}; it is some of the steps {begin} to {steps}, the last among them"
        )
    return times


def _plan(
    network: Network, sites: int, count: int, block: int | None, budget: int | None, itemsize: int
) -> tuple[int, int]:
    """Return how many programs run at a time, and how many networks of each are in one vmap."""
    on_cpu = jax.default_backend() == "cpu"
    free = memory.available() if budget is None else budget
    weights = sum(n * m for layer in network.shapes for n, m in layer) + sum(network.widths)
    needed = _COPIES * weights * itemsize
    needed += memory.bytes_per_network(network, sites, "dense", itemsize=itemsize)
    if needed > free:
        raise InputError(
            f"one network of {weights} weights, monitored on {sites} inputs, needs "
            f"{needed / 2**30:.3g} GiB in training and {free / 2**30:.3g} GiB are free; use a "
            "smaller network, or fewer monitored inputs"
        )
    fitting = max(1, free // (2 * needed))
    cores = min(os.cpu_count() or 1, 8) if on_cpu else 1
    if block is None:
        few = min(_IN_A_BLOCK, _WEIGHTS_IN_A_BLOCK // weights, -(-count // cores))
        block = max(1, min(few, fitting)) if on_cpu else min(count, fitting)
    block = min(check_count("block", block), count)
    workers = max(1, min(cores, fitting // block, -(-count // block)))
    return workers, block


def _predicted(network: Network, monitor: np.ndarray) -> dict[str, np.ndarray]:
    """Return theory's mean over inputs, each by itself, in float64."""
    known = {s.key: s for s in statistics.ALL}
    if network.mixes_sites:
        return {key: np.full(network.depth, np.nan) for key in known}
    q = np.mean(np.square(monitor.astype(np.float64)), axis=1)

    def of_one(q: Array) -> Any:
        return mean_field.predict(network, q.reshape(1, 1)).values

    with jax.enable_x64(True):
        found = jax.device_get(jax.jit(jax.vmap(of_one))(q))
    pairs = ("correlation", "log_weight_gradient_variance")
    values = {}
    for key in known:
        if key in pairs or key not in found:
            values[key] = np.full(network.depth, np.nan)
        elif known[key].log:
            values[key] = np.logaddexp.reduce(found[key], axis=0) - math.log(len(q))
        else:
            values[key] = found[key].mean(axis=0)
    return values


def _cross_entropy(
    logits: Float[Array, "samples classes"], labels: Int[Array, " samples"]
) -> Float[Array, " samples"]:
    """Return -log softmax(z)_label of each sample."""
    at_label = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - at_label


def _sites(inputs: Array) -> Array:
    """Return the sites of samples: their positions, where they have some."""
    return inputs.reshape(-1, inputs.shape[-1])


@functools.partial(jax.jit, static_argnames=("job", "block"))
def _run(
    each: tuple[Network, Array, Array, State | None],
    key: Array,
    data: _Data,
    seen: _Data,
    spans: Array,
    job: _Job,
    block: int,
) -> tuple[dict[str, Array], State]:
    """Train a chunk of networks; return their records and, if asked, states."""

    def one(each: tuple[Network, Array, Array, State | None]) -> tuple[dict[str, Array], State]:
        network, rate, number, state = each
        own = jax.random.fold_in(key, number)
        return _train_one(network, own, rate, state, data, seen, spans, job)

    if len(each[1]) == block:
        return jax.vmap(one)(each)
    return jax.lax.map(one, each, batch_size=block if block > 1 else None)


def _train_one(
    network: Network,
    key: Array,
    rate: Array,
    state: State | None,
    data: _Data,
    seen: _Data,
    spans: Array,
    job: _Job,
) -> tuple[dict[str, Array], State]:
    optimiser = job.optimiser(rate)
    lean = _lean(network)
    # None of the keys that layers have: those are the first depth + 1.
    order_key, noise_key = jax.random.split(jax.random.fold_in(key, network.depth + 1))
    epoch_steps = len(data.labels) // job.batch

    def gradient(weights: Weights, step: Array, order: Array) -> tuple[Array, Weights]:
        at = (step % epoch_steps) * job.batch
        chosen = jax.lax.dynamic_slice(order, (at,), (job.batch,))
        inputs, labels = _sites(data.inputs[chosen]), data.labels[chosen]
        noise = jax.random.fold_in(noise_key, step)

        def cost(weights: Weights) -> Array:
            return jnp.mean(_cross_entropy(outputs(lean, weights, inputs, noise), labels))

        return jax.value_and_grad(cost)(weights)

    def epoch_order(epoch: Array) -> Array:
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(data.labels))
        return order.astype(jnp.int32)

    def advance(state: State, first: Array, stop: Array) -> State:
        def epoch(number: Array, state: State) -> State:
            order = epoch_order(number)

            def update(step: Array, state: State) -> State:
                cost, by_weights = gradient(state.weights, step, order)
                change, kept = optimiser.update(by_weights, state.optimiser, state.weights)
                is_first = (state.first_nonfinite < 0) & ~jnp.isfinite(cost)
                return State(
                    step + 1,
                    optax.apply_updates(state.weights, change),
                    state.start,
                    kept,
                    jnp.where(is_first, step, state.first_nonfinite),
                )

            within = (jnp.maximum(first, number * epoch_steps), (number + 1) * epoch_steps)
            return jax.lax.fori_loop(within[0], jnp.minimum(stop, within[1]), update, state)

        return jax.lax.fori_loop(first // epoch_steps, (stop - 1) // epoch_steps + 1, epoch, state)

    def record(state: State, step: Array) -> dict[str, Array]:
        _, by_weights = gradient(state.weights, step, epoch_order(step // epoch_steps))
        change, _ = optimiser.update(by_weights, state.optimiser, state.weights)
        moved = jax.tree.map(jnp.subtract, state.weights, state.start)
        ratios = {
            "update_ratio": _norms(lean, change) / _norms(lean, state.weights),
            "movement": _norms(lean, moved) / _norms(lean, state.start),
        }
        return ratios | _monitored(
            network, _together(network, state.weights), key, seen, job.wanted
        )

    def span(state: Any, ends: Array) -> tuple[State, dict[str, Array]]:
        state = advance(state, ends[0], ends[1])
        return state, record(state, ends[1])

    if state is None:
        weights = _apart(network, initial_weights(network, key, data.inputs.dtype))
        never = jnp.full((), -1, spans.dtype)
        state = State(spans[0, 0], weights, weights, optimiser.init(weights), never)
    last, records = jax.lax.scan(span, state, spans)
    empty = State(last.step, (), (), (), last.first_nonfinite)
    return records, last if job.keep_state else empty


def _monitored(
    network: Network, weights: Weights, key: Array, seen: _Data, wanted: tuple[Statistic, ...]
) -> dict[str, Array]:
    """Return the statistics of these weights on the monitored inputs."""
    inputs = _sites(seen.inputs)

    def at_the_top(logits: Array) -> Array:
        return jax.grad(lambda z: jnp.sum(_cross_entropy(z, seen.labels)))(logits)

    found = propagation.propagate(
        network, inputs, key, weights=weights, cotangent=at_the_top, wanted=wanted
    )
    logits = outputs(network, weights, inputs, key)
    wrong = jnp.argmax(logits, axis=1) != seen.labels
    loss = jnp.mean(_cross_entropy(logits, seen.labels))
    # A comparison with NaN is false, and no class is right.
    error = jnp.mean(jnp.where(jnp.isfinite(loss), wrong, True).astype(logits.dtype))
    return found | {"loss": loss, "error": error}


def _norms(network: Network, weights: Weights) -> Float[Array, " layers"]:
    """Return ‖W‖_F of each layer, all of its matrices together; biases are apart."""
    found, dtype = [], jax.tree.leaves(weights)[0].dtype
    for stage, given in zip(network.stages, weights, strict=True):
        rows = [m[None] if stage.tied else m for m in given.matrices]
        each = [jnp.exp(unit_rows(m.reshape(len(m), -1))[1]) for m in rows]
        norm = jnp.linalg.norm(jnp.stack(each), axis=0) if each else jnp.zeros(stage.repeats, dtype)
        found.append(jnp.broadcast_to(norm, (stage.repeats,)))
    return jnp.concatenate(found)


def _few(stage: Stage) -> bool:
    return not stage.tied and stage.repeats <= _FEW_LAYERS


def _lean(network: Network) -> Network:
    """Return the network with stages of few layers as so many stages of one."""
    each = [
        stage.repeats * [Stage(stage.block)] if _few(stage) else [stage] for stage in network.stages
    ]
    return dataclasses.replace(network, stages=tuple(itertools.chain.from_iterable(each)))


def _apart(network: Network, weights: Weights) -> Weights:
    """Return a network's weights as those of its `_lean` one."""
    found: list[LayerWeights] = []
    for stage, given in zip(network.stages, weights, strict=True):
        for layer in range(stage.repeats) if _few(stage) else [slice(None)]:
            at = slice(layer, layer + 1) if isinstance(layer, int) else layer
            found.append(given if stage.tied else jax.tree.map(lambda m, at=at: m[at], given))
    return tuple(found)


def _together(network: Network, weights: Weights) -> Weights:
    """Return the weights of a `_lean` network as the network's own."""
    rest = iter(weights)
    return tuple(
        jax.tree.map(lambda *m: jnp.concatenate(m), *itertools.islice(rest, stage.repeats))
        if _few(stage)
        else next(rest)
        for stage in network.stages
    )
