"""Gradients, weights and updates of every leaf of the parameters, along the user's own training.

Around an optax optimiser, ``optimiser = gradflow.watch(optax.adam(1e-3), every=100)``, and after
training ``record = Record.of(opt_state)``. In a step without optax, inside `jax.jit`,

    record = Record.begin(parameters, every=100)
    record = record.observe(parameters, gradients, updates)     # once a step

Either way ``record.to_xarray()`` and ``record.sentences()``.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from gradflow._checks import check_count, check_instance, check_number, shown
from gradflow.errors import InputError

if TYPE_CHECKING:
    import xarray

__all__ = ["Record", "watch"]

# Bytes that a record may take, those that it takes where they are enough for the fewest steps, as
# every step copies it, and the most and fewest steps that it keeps.
_MOST_BYTES, _USUAL_BYTES = 1_000_000, 128_000
_MOST_ROWS, _FEWEST_ROWS = 256, 8
# What is kept of each leaf at a recorded step, as natural logarithms of norms.
_KEPT = ("gradient", "parameter", "update")
# Leaves that have a sentence of their own; of more, how many others.
_MOST_SENTENCES = 12
# How many times the norm of the start is said of a leaf itself.
_GROWN = 10.0


class Record(eqx.Module):
    """What is recorded of a training along its steps: one array, of 128 kB, or 1 MB at most.

    It spans all of the training: when it is full every second recorded step is dropped, and from
    then on half as many are recorded. Steps are counted from 0, and norms are those before the
    step's update. Under `jax.vmap` every array has an axis of networks in front, and the norms are
    computed at every step, recorded or not.

    Attributes
    ----------
    names
        The leaves' paths, by `jax.tree_util.keystr`; leaves that are not floats are left out.
    every
        The steps from one recorded step to the next that were asked for.
    """

    _packed: Int[Array, "*networks numbers"]
    names: tuple[str, ...] = eqx.field(static=True)
    every: int = eqx.field(static=True)

    @property
    def step(self) -> Int[Array, "*networks"]:
        """How many steps there were."""
        return self._packed[..., 0]

    @property
    def stride(self) -> Int[Array, "*networks"]:
        """Steps from one recorded step to the next."""
        return self._packed[..., 1]

    @property
    def first_nonfinite(self) -> Int[Array, "*networks parameters"]:
        """The first step at which a leaf's gradient was seen not to be finite; -1 of the others.

        At recorded steps all of it is looked at, at others the first row and column of each leaf,
        and all where these are not finite: what is not finite spreads along rows and columns, and
        to all that is computed a step later.
        """
        return self._packed[..., 2 : 2 + len(self.names)]

    @property
    def log_norms(self) -> Float[Array, "*networks rows parameters 3"]:
        """Natural logarithms of norms at the recorded steps: of gradients, leaves and updates.

        -inf where all is 0, NaN where something is not finite.
        """
        logs = _as_floats(self._packed[..., 2 + len(self.names) :])
        return logs.reshape(*logs.shape[:-1], -1, len(self.names), len(_KEPT))

    @classmethod
    def begin(cls, parameters: PyTree, every: int = 100) -> "Record":
        """An empty record of these parameters.

        Parameters
        ----------
        parameters
            A pytree of arrays, of which training changes the floats.
        every
            Steps from one recorded step to the next.

        Raises
        ------
        InputError
            If there is no leaf of floats, or there are more than 10 416, or ``every`` is no count.
        """
        every = check_count("every", every)
        names = tuple(_leaves(parameters))
        if not names:
            raise InputError("parameters has no array of floats; it is a pytree with at least one")
        bytes_a_row = 4 * len(_KEPT) * len(names)
        if _MOST_BYTES // bytes_a_row < _FEWEST_ROWS:
            most = _MOST_BYTES // (4 * len(_KEPT) * _FEWEST_ROWS)
            raise InputError(
                f"parameters has {len(names)} arrays of floats; it has at most {most}, of which a "
                f"record of 1 MB has room for {_FEWEST_ROWS} steps"
            )
        rows = min(_MOST_ROWS, max(_FEWEST_ROWS, _USUAL_BYTES // bytes_a_row // 2 * 2))
        log_norms = np.full(rows * len(names) * len(_KEPT), np.nan, np.float32)
        parts = ([0, every], np.full(len(names), -1), log_norms.view(np.int32))
        return cls(jnp.asarray(np.concatenate(parts), jnp.int32), names, every)

    @classmethod
    def of(cls, state: PyTree) -> "Record":
        """The record in the state of an optimiser, however deep `watch` stands in it.

        Raises
        ------
        InputError
            If there is none or more than one.
        """

        def is_record(node: Any) -> bool:
            return isinstance(node, cls)

        found = [node for node in jax.tree.leaves(state, is_leaf=is_record) if is_record(node)]
        if len(found) != 1:
            raise InputError(
                f"state has {len(found)} records; it is the state of an optimiser with one "
                "gradflow.watch around it"
            )
        # Flax NNX wraps every array of a state.
        return jax.tree.map(
            lambda leaf: getattr(leaf, "value", leaf),
            found[0],
            is_leaf=lambda node: hasattr(node, "value") and not is_record(node),
        )

    def observe(self, parameters: PyTree, gradients: PyTree, updates: PyTree) -> "Record":
        """The record after one more step of training.

        Parameters
        ----------
        parameters
            Those before the update.
        gradients
            A tree of the same paths.
        updates
            What is added to the parameters, the same.

        Raises
        ------
        InputError
            If a leaf of the record is missing in a tree, or has another shape there.

        Notes
        -----
        Where weights are overwritten in place (`jax.lax.scan`, donated arguments) it costs a copy
        of them, unless their update depends on the record, as that of `watch` does.
        """
        return self._observe(parameters, gradients, lambda: updates)

    def _observe(
        self, parameters: PyTree, gradients: PyTree, updates: Callable[[], PyTree]
    ) -> "Record":
        """`observe`, where only recorded steps compute the updates."""
        p, g = self._named("parameters", parameters), self._named("gradients", gradients)
        _check_shapes(self.names, p, "gradients", g)

        def looked_at(packed: Array) -> Array:
            u = self._named("updates", updates())
            _check_shapes(self.names, p, "updates", u)
            return Record(packed, self.names, self.every)._with((g, p, u))

        at = self.step % self.stride == 0
        packed = jax.lax.cond(at | ~_seem_finite(g), looked_at, lambda packed: packed, self._packed)
        return Record(packed.at[0].add(1), self.names, self.every)

    def _with(self, leaves: tuple[list[Array], ...]) -> Array:
        """The numbers with this step, if it is a recorded one, and whether gradients are finite.

        When the record is full every second of its steps is dropped.
        """
        step, stride, log_norms = self.step, self.stride, self.log_norms
        row = jnp.stack([jnp.stack([_log_norm(leaf) for leaf in kind]) for kind in leaves], axis=-1)
        known = self.first_nonfinite
        first = jnp.where((known < 0) & jnp.isnan(row[:, 0]), step, known)
        at = step // stride
        row = jnp.where(step % stride == 0, row, log_norms[at])
        log_norms = log_norms.at[at].set(row)
        full = at == len(log_norms) - 1
        half = jnp.concatenate([log_norms[::2], jnp.full_like(log_norms[::2], jnp.nan)])
        stride, log_norms = jnp.where(full, 2 * stride, stride), jnp.where(full, half, log_norms)
        return jnp.concatenate([jnp.stack([step, stride]), first, _as_ints(log_norms.reshape(-1))])

    def _named(self, argument: str, tree: PyTree) -> list[Array]:
        """The leaves of a tree that the record has, in its order."""
        leaves = _leaves(tree)
        for name in self.names:
            if name not in leaves:
                raise InputError(
                    f"{argument} has no array of floats at {name}; it has one at each path of the "
                    "parameters that the record began with"
                )
        return [leaves[name] for name in self.names]

    def to_xarray(self) -> "xarray.Dataset":
        """The record as a labelled dataset, over ``step`` and ``parameter``.

        ``log_gradient_norm``, ``log_parameter_norm``, ``log_update_norm`` (natural logarithms),
        ``update_ratio`` (‖Δw‖/‖w‖), ``nonfinite`` (whether one of the three was not finite), and
        ``first_nonfinite`` over ``parameter``. With an axis ``network`` in front where the training
        was under `jax.vmap`.

        Raises
        ------
        InputError
            If there is more than one axis of networks, or the record is still being traced.
        """
        import xarray  # noqa: PLC0415

        steps, log_norms = self._rows()
        dims = ("network",)[: log_norms.ndim - 3] + ("step", "parameter")
        logs = {name: log_norms[..., i] for i, name in enumerate(_KEPT)}
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = np.exp(logs["update"] - logs["parameter"])
        dataset = xarray.Dataset(
            {f"log_{name}_norm": (dims, value) for name, value in logs.items()}
            | {
                "update_ratio": (dims, ratio),
                "nonfinite": (dims, np.isnan(log_norms).any(axis=-1)),
                "first_nonfinite": (
                    (*dims[:-2], "parameter"),
                    np.asarray(self.first_nonfinite),
                ),
            },
            {"step": steps, "parameter": list(self.names)},
            {
                "steps": int(np.max(self.step)),
                "every": self.every,
                "stride": int(np.max(self.stride)),
            },
        )
        for name, label in _LABELS.items():
            dataset[name].attrs["long_name"] = label
        return dataset

    def sentences(self, inspection: Any = None, *, factor: float = 1000.0) -> tuple[str, ...]:
        """What left the start, a sentence each: gradients, weights, and what is not finite.

        A gradient's norm is said if it is beyond the factor at the last recorded step; a weight's
        if it is above 10 times that of the first.

        Parameters
        ----------
        inspection
            What gradients are compared with: those of an `Inspection` of the model, up to one
            factor for all, as its loss is another. Without it those of the first recorded step, and
            where that was 0, of the first at which it was not.
        factor
            How many times smaller or larger is said; above 1.

        Returns
        -------
        tuple of str
            None of them where all is as it was.

        Raises
        ------
        InputError
            If the factor is no number above 1, the inspection is of another model, or the record
            is being traced.
        """
        check_number("factor", factor, positive=True)
        if factor <= 1:
            raise InputError(f"factor is {factor}; it is a number above 1")
        expected = None if inspection is None else _expected(inspection, self.names)
        steps, log_norms = self._rows()
        first = np.asarray(self.first_nonfinite)
        if log_norms.ndim == 3:
            return _sentences(self.names, steps, log_norms, first, expected, factor)
        return tuple(
            f"Network {i}: {sentence}"
            for i, (logs, of_one) in enumerate(zip(log_norms, first, strict=True))
            for sentence in _sentences(self.names, steps, logs, of_one, expected, factor)
        )

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The recorded steps, and the logarithms of norms at them."""
        if isinstance(self.step, jax.core.Tracer):
            raise InputError("the record is being traced; it is read outside of jit, vmap and scan")
        if self.step.ndim > 1:
            raise InputError(
                f"the record has axes {self.step.shape} of networks; it has one at most, and "
                "jax.tree.map takes one of its entries out"
            )
        # All networks of one vmap are at the same step.
        step, stride = int(np.max(self.step)), int(np.max(self.stride))
        steps = np.arange(0, step, stride)
        return steps, np.asarray(self.log_norms)[..., : len(steps), :, :]


class _Watched(eqx.Module):
    """The state of an optimiser, and the record beside it."""

    inner: PyTree
    record: Record


def watch(optimiser: Any, every: int = 100) -> optax.GradientTransformationExtraArgs:
    """An optimiser that records gradients, weights and its updates along the training.

    Updates are the optimiser's own. Recording is part of its update, so it works inside `jax.jit`,
    `jax.lax.scan` and `jax.vmap`, and with weights that are sharded; between the recorded steps
    it only looks whether gradients are finite.

    Parameters
    ----------
    optimiser
        An `optax.GradientTransformation`, the whole chain: what it is given are the gradients, what
        it returns the updates.
    every
        Steps from one recorded step to the next; twice as many each time that the record is full,
        after at most 256.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its ``update`` needs the parameters. Its state has the optimiser's as ``inner``, and the
        record, which `gradflow.inspection.watch.Record.of` finds in it.

    Raises
    ------
    InputError
        If the optimiser is none, ``every`` is no count, or ``update`` is given no parameters.
    """
    check_instance(
        "optimiser", optimiser, optax.GradientTransformation, "a GradientTransformation of optax"
    )
    every = check_count("every", every)
    optimiser = optax.with_extra_args_support(optimiser)

    def init(parameters: PyTree) -> _Watched:
        return _Watched(optimiser.init(parameters), Record.begin(parameters, every))

    def update(
        gradients: PyTree, state: _Watched, parameters: PyTree = None, **extra: Any
    ) -> tuple[PyTree, _Watched]:
        if parameters is None:
            raise InputError(
                "parameters is None; a watched optimiser's update takes gradients, state, and the "
                "parameters"
            )

        def updates(gradients: PyTree) -> tuple[PyTree, PyTree]:
            return optimiser.update(gradients, state.inner, parameters, **extra)

        # The update is computed twice at recorded steps, so that others need not keep it.
        record = state.record._observe(parameters, gradients, lambda: updates(gradients)[0])
        # And after the record: what it reads would else be copied before it is overwritten.
        after = record.stride > 0  # always, which XLA cannot know
        updated, inner = updates(
            jax.tree.map(
                lambda g: jnp.where(after, g, 0) if eqx.is_inexact_array(g) else g, gradients
            )
        )
        return updated, _Watched(inner, record)

    return optax.GradientTransformationExtraArgs(init, update)


_LABELS = {
    "log_gradient_norm": "natural logarithm of the norm of the gradient",
    "log_parameter_norm": "natural logarithm of the norm of the parameter",
    "log_update_norm": "natural logarithm of the norm of the update",
    "update_ratio": "norm of the update over that of the parameter",
    "nonfinite": "whether gradient, parameter or update is not finite",
    "first_nonfinite": "first step whose gradient was seen not to be finite, -1 for none",
}


def _leaves(tree: PyTree) -> dict[str, Any]:
    """The arrays of floats of a tree that are not empty, by path.

    Flax NNX has them as the ``value`` of a variable in one tree, and as they are in the other.
    """
    return {
        jax.tree_util.keystr(path).removesuffix(".value"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if eqx.is_inexact_array(leaf) and leaf.size
    }


def _check_shapes(
    names: tuple[str, ...], parameters: list[Array], argument: str, tree: list[Array]
) -> None:
    for name, parameter, leaf in zip(names, parameters, tree, strict=True):
        if leaf.shape != parameter.shape:
            raise InputError(
                f"{argument} has {shown(leaf)} at {name}; its shape there is that of the "
                f"parameter, {parameter.shape}"
            )


def _log_norm(leaf: Array) -> Array:
    """The natural logarithm of a norm, for whatever the leaf's range holds; NaN if not finite.

    Over all axes as they are: to flatten a sharded array would move it.
    """
    size = jnp.abs(leaf)
    size = size.astype(jnp.promote_types(size.dtype, jnp.float32))
    peak = jnp.max(size)
    # In two halves: the reciprocal of the largest floats is flushed to 0.
    half = 1 / jnp.sqrt(jnp.where(peak == 0, 1, peak))
    log = jnp.log(jnp.sum((size * half * half) ** 2)) / 2 - 2 * jnp.log(half)
    return jnp.where(jnp.isfinite(peak), log, jnp.nan).astype(jnp.float32)


def _seem_finite(leaves: list[Array]) -> Array:
    """Whether the first rows and columns of all leaves are finite: all takes too long.

    As one sum, as every reduction of its own takes a microsecond.
    """
    parts = []
    for leaf in map(jnp.atleast_1d, leaves):
        parts += [leaf[(0,) * (leaf.ndim - 1)], leaf[..., :1].reshape(-1)]
    return jnp.isfinite(sum(jnp.sum(0 * part) for part in parts))


def _as_ints(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _as_floats(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def _expected(inspection: Any, names: tuple[str, ...]) -> np.ndarray:
    """The logarithms of norms of gradients at the start that an inspection measured, by leaf.

    A path may be the end of the other: what is trained may be a part of what was inspected.
    """
    known = getattr(inspection, "log_gradient_norms", None)
    if not isinstance(known, Mapping):
        raise InputError(f"inspection is {shown(inspection)}; it is what gradflow.inspect made")
    found = []
    for name in names:
        same = [one for one in known if one == name] or [
            one for one in known if one.endswith(name) or name.endswith(one)
        ]
        found.append(known[same[0]] if len(same) == 1 else math.nan)
    if not np.isfinite(found).any():
        raise InputError(
            f"inspection has no gradient of {names[0]} or another leaf of the record; it is of the "
            "model that is trained"
        )
    return np.array(found)


def _sentences(
    names: tuple[str, ...],
    steps: np.ndarray,
    log_norms: np.ndarray,
    first_nonfinite: np.ndarray,
    expected: np.ndarray | None,
    factor: float,
) -> tuple[str, ...]:
    """The sentences of one network."""
    said = []
    if (first_nonfinite >= 0).any():
        step = first_nonfinite[first_nonfinite >= 0].min()
        at = [name for name, n in zip(names, first_nonfinite, strict=True) if n == step]
        said.append(f"{_listed('The gradient of', at)} is not finite first at step {step}.")
    if not len(steps):
        return tuple(said)
    gradients, parameters = (log_norms[..., i].astype(np.float64) for i in (0, 1))
    reference, start = _first(gradients), "the start's"
    if expected is not None:
        shift = np.nanmedian(np.where(np.isfinite(reference), reference - expected, np.nan))
        reference = np.where(np.isfinite(expected), expected + shift, reference)
        start = "what the inspection found at the start"
    with np.errstate(invalid="ignore"):
        relative = gradients - reference
        grown = parameters[-1] - _first(parameters)
    for sign, words in ((-1, "below 1/{:g} of"), (1, "above {:g} times")):
        beyond = sign * relative > math.log(factor)
        said += _departures(names, steps, beyond, relative[-1], words.format(factor) + " " + start)
    never = np.all(gradients == -np.inf, axis=0)
    if never.any():
        at = [name for name, yes in zip(names, never, strict=True) if yes]
        said.append(f"{_listed('The gradient of', at)} is 0 at every recorded step.")
    for name, log in zip(names, grown, strict=True):
        if log > math.log(_GROWN):
            said.append(
                f"{name} has {_number(log)} times the norm of the start at step {steps[-1]}."
            )
    return tuple(said)


def _first(logs: np.ndarray) -> np.ndarray:
    """The first finite logarithm of each column; NaN where there is none."""
    finite = np.isfinite(logs)
    found = np.take_along_axis(logs, finite.argmax(axis=0)[None], axis=0)[0]
    return np.where(finite.any(axis=0), found, np.nan)


def _departures(
    names: tuple[str, ...], steps: np.ndarray, beyond: np.ndarray, log: np.ndarray, words: str
) -> list[str]:
    """Of the gradients that are beyond at the last step, since when, and how far at the end."""
    leaving = np.flatnonzero(beyond[-1])
    since = steps[len(steps) - np.cumprod(beyond[::-1], axis=0).sum(axis=0).clip(min=1)]
    if len(leaving) > 1 and len(leaving) == len(names):
        low, high = _number(log.min()), _number(log.max())
        return [
            f"All {len(names)} gradients are {words}, since step {since.max()}: {low} to {high} of "
            f"it at step {steps[-1]}."
        ]
    said = [
        f"The gradient of {names[i]} is {words}, since step {since[i]}: {_number(log[i])} of it at "
        f"step {steps[-1]}."
        for i in leaving[:_MOST_SENTENCES]
    ]
    if len(leaving) > _MOST_SENTENCES:
        said.append(f"So are those of {len(leaving) - _MOST_SENTENCES} others.")
    return said


def _listed(words: str, names: list[str]) -> str:
    """The first of the names, and how many others."""
    others = f", as of {len(names) - 1} others," if len(names) > 1 else ""
    return f"{words} {names[0]}{others}"


def _number(log: float) -> str:
    """e^log, also beyond the floats' range."""
    if not math.isfinite(log) or abs(log) < 700:
        return f"{math.exp(log):.2g}"
    exponent = math.floor(log / math.log(10))
    return f"{math.exp(log - exponent * math.log(10)):.1f}e{exponent}"
