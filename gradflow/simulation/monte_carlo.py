"""Many random networks: drawn in chunks, measured on the device, averaged on the host.

Network number i has the key ``fold_in(key, i)``, so that a result depends on the seed and on how
many networks there are, and not on how they were cut into chunks or shared among devices. One
compiled program serves every chunk, and every network of the same structure whatever its σ_w and
σ_b. A chunk's networks are shared among the devices, of all processes where `jax.distributed` has
been initialised; only the networks' statistics go from one device to another.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from gradflow import _histograms, estimation, statistics
from gradflow._arguments import as_key
from gradflow._checks import check_count, check_progress
from gradflow._inputs import as_inputs
from gradflow._labels import Values, checked, key_of, labelled, layers
from gradflow._programs import Program
from gradflow.errors import InputError
from gradflow.estimation import Estimate, Histogram
from gradflow.networks import Network
from gradflow.simulation import _memory, _programs, _samplers, propagation
from gradflow.simulation._programs import OVERFLOWED, VANISHED, RandomNetworks
from gradflow.statistics import Statistic

if TYPE_CHECKING:
    import xarray

__all__ = ["Progress", "Simulation", "simulate"]

# Called as (networks done, networks in all); the first call, with 0, comes before compilation.
Progress = Callable[[int, int], None]

# Networks are numbered by an int32, and the last chunk has more networks than are wanted.
_MOST_NETWORKS = 1 << 30
# The most values that one call returns.
_CHUNK_VALUES = 1 << 24
# The most values that a layer's histogram is made of, and the most networks they are from.
_HISTOGRAM_VALUES = 1 << 18
_HISTOGRAM_NETWORKS = 64


class Simulation(eqx.Module):
    """Statistics of many random networks of one law.

    Attributes
    ----------
    estimates
        Each statistic's `Estimate` by its key, every array of shape (layers,).
    histograms
        ``preactivation``, ``activation`` and ``gradient``, if they were wanted.
    samples
        Per-network values by key or name, shape (networks, layers), if they were wanted.
    overflowed, vanished
        Shape (layers,): in how many networks the signal going up was not finite, or nothing but
        zeros (a dead network, or an underflow).
    statistics
        The statistics that were measured.
    network, sites, networks, sampler, reason, dtype, seconds, compile_seconds
        The law, the number of sites and of networks, the sampler and why, the float type, and the
        seconds that drawing and compiling took.
    """

    estimates: dict[str, Estimate]
    histograms: dict[str, Histogram]
    samples: dict[str, np.ndarray] = eqx.field(converter=Values)
    overflowed: np.ndarray
    vanished: np.ndarray
    network: Network
    statistics: tuple[Statistic, ...] = eqx.field(static=True)
    sites: int = eqx.field(static=True)
    networks: int = eqx.field(static=True)
    sampler: str = eqx.field(static=True)
    reason: str = eqx.field(static=True)
    dtype: str = eqx.field(static=True)
    seconds: float = eqx.field(static=True)
    compile_seconds: float = eqx.field(static=True)

    def __getitem__(self, name: str) -> Estimate:
        """Return a statistic's estimate, by its name or its key."""
        return self.estimates[key_of(name, self.estimates)]

    def __repr__(self) -> str:
        """Return a description in one line: networks, widths, inputs, sampler, statistics."""
        few = 8
        network, widths = self.network, "-".join(map(str, self.network.widths))
        if len(network.widths) > few:
            widths = f"{network.widths[0]}-{network.widths[1]}-…-{network.widths[-1]}"
        return (
            f"{self.networks} networks {network.name!r}, {widths}, {network.depth} layers, "
            f"{self.sites} {'input' if self.sites == 1 else 'inputs'}, {self.sampler} in "
            f"{self.dtype}: {', '.join(self.estimates)}"
        )

    def to_xarray(self) -> "xarray.Dataset":
        """Return the labelled estimates: mean, standard deviation and error over networks."""
        import xarray  # noqa: PLC0415  (slow to import)

        arrays: dict[str, np.ndarray] = {}
        for statistic in self.statistics:
            name, key = statistic.name, statistic.key
            estimate = self.estimates[key]
            arrays[name] = estimate.value
            arrays[f"{name}_standard_deviation"] = estimate.standard_deviation
            arrays[f"{name}_standard_error"] = estimate.standard_error
            arrays[f"{name}_networks"] = estimate.count
            if statistic.log:
                arrays[key] = estimate.log_value
                arrays[f"{key}_standard_error"] = estimate.log_standard_error
        arrays |= {"overflowed": self.overflowed, "vanished": self.vanished}
        dataset = labelled(
            xarray.Dataset(
                {name: ("layer", value) for name, value in arrays.items()},
                coords={"layer": layers(self.network.depth)},
            ),
            self.statistics,
        )
        for name, histogram in self.histograms.items():
            bins, prefix = f"{name}_bin", f"{name}_histogram"
            dataset[f"{prefix}_edges"] = (("layer", f"{name}_edge"), histogram.edges)
            dataset[f"{prefix}_density"] = (("layer", bins), histogram.density)
            dataset[f"{prefix}_standard_error"] = (("layer", bins), histogram.standard_error)
            if histogram.theory is not None:
                dataset[f"{prefix}_theory"] = (("layer", bins), histogram.theory)
            dataset[f"{prefix}_log_unit"] = ("layer", histogram.log_unit)
        return dataset.assign_attrs(
            network=self.network.name,
            widths=list(self.network.widths),
            networks=self.networks,
            inputs=self.sites,
            sampler=self.sampler,
            sampler_reason=self.reason,
            dtype=self.dtype,
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
            jax=jax.__version__,
            device=jax.devices()[0].device_kind,
        )


def simulate(
    network: Network,
    inputs: ArrayLike,
    *,
    key: PRNGKeyArray | int = 0,
    networks: int = 1000,
    sampler: str = "auto",
    wanted: Sequence[Statistic] = statistics.ALL,
    histograms: bool = False,
    keep_samples: bool = False,
    block: int | None = None,
    memory_budget: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: Progress | None = None,
) -> Simulation:
    """Draw many networks, make a forward and a backward pass, and average the statistics.

    Parameters
    ----------
    network
        The law of the networks.
    inputs
        Shape (sites, n_0), the same for every network; their dtype is the simulation's.
    key
        A JAX key, or an integer seed.
    networks
        How many to draw.
    sampler
        ``"dense"``, ``"matrix_free"``, or ``"auto"``: matrix_free where the law allows it and it
        is the faster one; the choice and its reason are in the result.
    wanted
        The statistics to measure.
    histograms
        Also return histograms of signals and gradients, from the first few of the networks.
    keep_samples
        Also return each network's own values.
    block
        How many networks one vmap holds; without it, chosen from the device and its free memory.
    memory_budget
        Bytes to stay within on each device; without it, its free memory.
    devices
        The devices that share the networks; without it, all of JAX's. Where they belong to several
        processes, every process calls this with the same arguments, and has the whole result.
    progress
        Called with (networks done, networks in all).

    Returns
    -------
    Simulation
        An `Estimate` of each statistic at each layer, by its name.

    Raises
    ------
    InputError
        If the inputs do not fit the network or are not finite, the sampler cannot draw its weights,
        a number is not a whole one of at least 1, there is no device, or not even one network fits
        into memory.
    """
    if check_count("networks", networks) > _MOST_NETWORKS:
        raise InputError(f"networks is {networks}; it is at most {_MOST_NETWORKS}")
    inputs = as_inputs(inputs, network)
    sampler, reason = _samplers.choose(sampler, network, inputs.shape[0])
    key = as_key(key)
    devices = _memory.checked_devices(jax.devices() if devices is None else devices)
    check_progress(progress)
    budget, itemsize = memory_budget, inputs.dtype.itemsize
    plan = _memory.plan(
        network, len(inputs), sampler, networks, budget=budget, itemsize=itemsize, devices=devices
    )
    if block is not None:
        plan = dataclasses.replace(plan, block=check_count("block", block))
    wanted = tuple(s for s in checked(wanted) if s.sites <= inputs.shape[0])
    run = _Run(network, inputs, key, networks, sampler, reason, wanted, plan, devices)
    return run.simulate(histograms, keep_samples, progress)


class _Run(NamedTuple):
    """The networks to draw, the statistics to measure, and the plan of chunks and blocks."""

    network: Network
    inputs: Array
    key: PRNGKeyArray
    networks: int
    sampler: str
    reason: str  # for the sampler
    wanted: tuple[Statistic, ...]
    plan: _memory.Plan
    devices: tuple[jax.Device, ...]

    def simulate(
        self, histograms: bool, keep_samples: bool, progress: Progress | None
    ) -> Simulation:
        """Compile a program, run it for each chunk, and average its statistics."""
        begun = time.perf_counter()
        if progress:
            progress(0, self.networks)
        law, chunk = RandomNetworks.of(self.network, self.inputs, self.key), self._chunk()
        measure = self._compile(law, chunk)
        ready = time.perf_counter()
        of_the_law = np.zeros(chunk, np.int32)

        measured = [s.key for s in self._measured]

        def call(first: int) -> dict[str, np.ndarray]:
            numbers = np.arange(first, first + chunk, dtype=np.int32)
            values = _programs.to_host(measure(law, of_the_law, numbers)[0])
            # The last chunk is padded with networks beyond the last.
            return dict(zip(measured, values[:, : self.networks - first], strict=True))

        parts: dict[str, list[Estimate]] = {s.key: [] for s in self.wanted}
        samples: dict[str, list[np.ndarray]] = {s.key: [] for s in self.wanted if keep_samples}
        overflowed, vanished = np.zeros((2, self.network.depth), np.int64)
        for done, values in _programs.in_order(call, self.networks, chunk, self.plan.workers):
            for statistic in self.wanted:
                value = values[statistic.key]
                parts[statistic.key].append(Estimate.of(value, log=statistic.log))
                if keep_samples:
                    samples[statistic.key].append(value)
            overflowed += np.count_nonzero(values[OVERFLOWED.key], axis=0)
            vanished += np.count_nonzero(values[VANISHED.key], axis=0)
            if progress:
                progress(done, self.networks)
        finished = time.perf_counter()
        return Simulation(
            estimates={name: estimation.merge(part) for name, part in parts.items()},
            histograms=self._histograms() if histograms else {},
            samples={name: np.concatenate(each) for name, each in samples.items()},
            overflowed=overflowed,
            vanished=vanished,
            network=self.network,
            statistics=self.wanted,
            sites=self.inputs.shape[0],
            networks=self.networks,
            sampler=self.sampler,
            reason=self.reason,
            dtype=str(self.inputs.dtype),
            seconds=finished - ready,
            compile_seconds=ready - begun,
        )

    @property
    def _measured(self) -> tuple[Statistic, ...]:
        return (*self.wanted, OVERFLOWED, VANISHED)

    def _chunk(self) -> int:
        values = self.network.depth * (len(self.wanted) + 2)
        together = self.plan.block * len(self.devices)
        return _chunk_size(self.networks, together, self.plan.workers, values)

    def _compile(self, law: RandomNetworks, chunk: int) -> Callable:
        each = _samplers.seconds(self.sampler, self.network, self.inputs.shape[0])
        return _programs.compiled(
            law,
            chunk,
            self.devices,
            self.networks * each,
            measured=self._measured,
            sampler=self.sampler,
            keep=(self.plan.keep, self.plan.checkpoint),
            block=self.plan.block,
        )

    def _histograms(self) -> dict[str, Histogram]:
        """Histograms from the first networks: as many as give each layer enough values."""
        sites, widest = self.inputs.shape[0], max(self.network.widths)
        count = min(
            self.networks, _HISTOGRAM_NETWORKS, math.ceil(_HISTOGRAM_VALUES / (sites * widest))
        )

        network, numbers = self.network.as_arrays(self.inputs.dtype), np.arange(count)
        seconds = count * _samplers.seconds(self.sampler, self.network, sites)
        arguments = network, self.inputs, self.key, numbers
        draw = Program.of(_draw_signals, arguments, seconds, sampler=self.sampler)
        drawn, activations = jax.device_get(draw(*arguments))
        layers = [
            (stage, layer)
            for stage, z in enumerate(drawn.preactivation)
            for layer in range(z.shape[1])
        ]

        def every(stages: list[np.ndarray]) -> list[np.ndarray]:
            return [stages[stage][:, layer] for stage, layer in layers]

        z, log_scale = every(drawn.preactivation), every(drawn.log_scale)
        delta, log_norm = every(drawn.gradient), every(drawn.log_gradient_norm)
        # Signals have a scale beside them only where φ is linear for them.
        return {
            "preactivation": _histograms.histogram(z, log_scale),
            "activation": _histograms.histogram(every(activations), log_scale),
            "gradient": _histograms.histogram(delta, log_norm),
        }


def _chunk_size(networks: int, block: int, workers: int, values: int) -> int:
    """Networks a call: whole blocks, evenly shared, several calls a worker so progress shows.

    So many at most that a call returns no more than `_CHUNK_VALUES`, ``values`` of each network.
    """
    blocks = -(-networks // block)
    calls = min(blocks, workers * max(1, min(8, blocks // (2 * workers))))
    most = max(1, _CHUNK_VALUES // (block * values))
    return block * min(most, -(-blocks // calls))


def _draw_signals(
    network: Network, inputs: Array, key: Array, numbers: Array | np.ndarray, sampler: str
) -> tuple[propagation.Signals, list[Array]]:
    """Every signal of networks number ``numbers``, and φ of their pre-activations.

    Each array has a leading axis of networks.
    """
    signals = jax.lax.map(
        lambda i: propagation.signals(network, inputs, jax.random.fold_in(key, i), sampler=sampler),
        numbers,
    )
    return signals, [network.activation(z) for z in signals.preactivation]
