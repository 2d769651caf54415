"""Many networks at once: a grid of laws, learning rates and seeds, trained by minibatches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from gradflow._checks import check_count, check_progress
from gradflow.networks import Network
from gradflow.simulation.monte_carlo import Progress
from gradflow.training import _checks, _execution
from gradflow.training._execution import Grid, Resources
from gradflow.training._loop import State
from gradflow.training._records import Recording
from gradflow.training.result import Training

__all__ = ["train"]


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
    clip: optax.GradientTransformation | None = None,
    biases: bool = True,
    record: Recording | None = None,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    keep_state: bool = False,
    state: State | None = None,
    save: str | Path | None = None,
    progress: Progress | None = None,
    block: int | None = None,
    memory_budget: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Training:
    """Train networks × learning rates × seeds, each by itself, in one compiled program.

    Parameters
    ----------
    networks
        One law or several that differ in numbers alone; the last layer's units are the classes.
    inputs, labels
        Shapes (samples, features) and (samples,): labels are whole numbers from 0.
    steps, batch
        Updates of each network in all, and inputs of each update.
    learning_rate, optimiser
        One rate or several, from which ``optimiser`` makes an optax optimiser (it may be traced).
    seeds, key
        Random networks at each point of the grid; a JAX key, or an integer seed.
    clip
        Transforms a gradient first, as one matrix (n_in, n_out) and one vector of biases a layer.
    biases
        Whether layers without biases get biases that start at 0 (as the paper's have).
    record
        What is recorded, and when; without it `Recording`'s defaults.
    validation
        (inputs, labels) that the best learning rate is chosen by.
    keep_state, state
        Whether the result keeps its last state; such a state, to resume with more ``steps``.
    save, progress
        A folder to save the run in, from which the same call resumes after an interruption; and a
        function of (updates done, updates in all), first called with 0 before compilation.
    block, memory_budget, devices
        Networks in one vmap, bytes of each device, and the devices: without them all that is there.

    Returns
    -------
    Training
        The records, with axes (networks, learning rates, seeds, steps) in front.

    Raises
    ------
    InputError
        If data do not fit the networks, or an argument is out of range; not for divergence.
    """
    laws = _checks.checked_networks(networks, biases)
    grid = Grid(laws, _checks.checked_rates(learning_rate), check_count("seeds", seeds))
    steps = check_count("steps", steps)
    record = _checks.checked_recording(record, laws[0])
    shared = _checks.checked_shared(laws[0], key, (inputs, labels), record.monitor, validation)
    settings = _checks.checked_settings(optimiser, clip, batch, record, shared)
    times = _checks.checked_steps(record.steps, state, steps, settings.batch, shared)
    resources = Resources.checked(block, memory_budget, devices)
    check_progress(progress)
    trained = _execution.train(grid, shared, settings, times, state, resources, save, progress)
    return Training.of(grid, shared, settings, times, trained, keep_state)
