"""One model inspected: adapted, read, measured, predicted, and all put together."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from gradflow._arguments import as_key
from gradflow._checks import check_count, check_progress, shown
from gradflow._input_rows import numbers
from gradflow.errors import InputError
from gradflow.inspection import _adapters
from gradflow.inspection._adapters import _calls
from gradflow.inspection._assembly import assemble
from gradflow.inspection._cure import find
from gradflow.inspection._measuring.drawing import drawing
from gradflow.inspection._measuring.measure import measure
from gradflow.inspection._reading.layers import Layer, layers
from gradflow.inspection._reading.model import Model
from gradflow.inspection._reading.of_model import program_of
from gradflow.inspection._reading.program import Program
from gradflow.inspection._rescaling import Patient
from gradflow.inspection._result import Inspection
from gradflow.inspection._theory.laws import NETWORKS, laws
from gradflow.inspection._theory.values import Law
from gradflow.inspection._theory.walk import Predicted, predict
from gradflow.inspection._tracing import trace, weight_shapes
from gradflow.simulation.monte_carlo import Progress

__all__ = ["begin", "inspect"]

# The fold of the key that laws of weights are drawn with: no network's number.
_FOR_LAWS = (1 << 31) - 1


def inspect(
    model: Any,
    apply: Any = None,
    inputs: Any = None,
    *,
    key: PRNGKeyArray | int = 0,
    networks: int = 50,
    loss: Callable[..., Array] | None = None,
    targets: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    parameters: PyTree = None,
    cure: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """Read a model as it is: where its gradients vanish or explode, why, and what mends it.

    Parameters
    ----------
    model
        A module of Flax (linen or NNX), Equinox, Haiku or Keras on JAX, a `Network`, or a function
        that makes one of these from nothing, a key, or rngs; or a function ``init(key)``.
    apply
        With ``init``, a function ``apply(parameters, *inputs)``. Where ``model`` is whole, the
        inputs may stand here: ``inspect(model, inputs)``.
    inputs
        What the model is applied to: an array, or a tuple of arrays; each may be a tree of arrays,
        as a dictionary.
    key
        A JAX key, or a seed.
    networks
        How many times weights are drawn; a model that holds its weights and has no law of them is
        measured once, without standard errors.
    loss
        A function ``loss(outputs, *targets)`` to a scalar. Without it the gradient at each output
        is random, N(0, 1) in each element.
    targets
        An array, or a tuple of arrays, for the loss.
    kwargs
        Keyword arguments of the model's call.
    parameters
        Weights at hand, as ``init(key)`` makes them, to be measured in place of drawn ones; of a
        model of Keras, whose weights are drawn anew else, the model itself for its own.
    cure
        Whether to look for the cause and the cure, which takes about as long again.
    progress
        Called as (networks done, networks in all).

    Returns
    -------
    Inspection
        A verdict; every statistic at every layer, measured and by theory; each gradient's size.

    Raises
    ------
    InputError
        If the model is of no kind that is known, has no parameters or no layers, cannot be traced
        or applied to the inputs, or does not depend on them; if weights or inputs are not finite;
        or if the loss is no scalar.
    """
    first, cured = begin(
        model, apply, inputs,
        key=key, networks=networks, loss=loss, targets=targets, kwargs=kwargs,
        parameters=parameters, progress=progress,
    )  # fmt: skip
    return cured() if cure else first


def begin(
    model: Any,
    apply: Any = None,
    inputs: Any = None,
    *,
    key: PRNGKeyArray | int = 0,
    networks: int = 50,
    loss: Callable[..., Array] | None = None,
    targets: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    parameters: PyTree = None,
    progress: Progress | None = None,
) -> tuple[Inspection, Callable[..., Inspection]]:
    """An inspection without the cure, as of `inspect`, and a function that gives it with the cure.

    The function takes ``progress``, called as (trials done, trials in all).
    """
    if inputs is None and apply is not None and not callable(apply):
        apply, inputs = None, apply
    arrays = _arrays("inputs", inputs)
    behind = () if targets is None else _arrays("targets", targets)
    key, networks = as_key(key), check_count("networks", networks)
    check_progress(progress)
    if loss is not None and not callable(loss):
        raise InputError(f"loss is {shown(loss)}; it is a function of the model's outputs")
    if behind and loss is None:
        raise InputError("targets is given and loss is None; a loss takes the targets")
    adapted = _adapters.adapt(model, apply, arrays, dict(kwargs or {}))
    program = _program(adapted, arrays, loss, behind)
    if parameters is model and adapted.given is not None:
        parameters = adapted.given[0]
    found, given = layers(program), _given(adapted, parameters, arrays, key)
    with ThreadPoolExecutor(1) as pool:  # both spend much of their time in the compiler
        theory = pool.submit(_theory, adapted, program, found, arrays, behind, key, given)
        measured = measure(
            adapted, program, found, arrays, key,
            networks=networks, targets=behind, progress=progress,
            parameters=() if given is None else [given],
        )  # fmt: skip
        of_weights, predicted = theory.result()
    put_together = functools.partial(assemble, adapted, program, found, measured, predicted)

    def cured(progress: Progress | None = None) -> Inspection:
        patient = Patient(
            adapted, program, found, arrays, key, of_weights, predicted, behind, given
        )
        return put_together(find(patient, measured, progress))

    return put_together(None), cured


def _theory(
    model: Model,
    program: Program,
    found: Sequence[Layer],
    inputs: Sequence[Any],
    targets: Sequence[Any],
    key: PRNGKeyArray,
    given: tuple[PyTree, PyTree] | None,
) -> tuple[Mapping[int, Law], Predicted]:
    """The laws of weights, drawn or at hand, and the theory of the program."""
    if given is not None:
        model = dataclasses.replace(model, init=None, given=given)
    apart = jax.random.fold_in(key, _FOR_LAWS)
    draw, state = drawing(model, NETWORKS), None
    if given is not None:
        state = given[1]
    elif program.arguments["state"]:  # as many networks as `laws` draws: nothing more to compile
        state = jax.tree.map(lambda leaf: leaf[0], draw(jax.random.split(apart, NETWORKS))[1])
    of_weights = laws(model, program, apart, draw=draw)
    return of_weights, predict(
        program, found, of_weights, jax.tree.leaves(inputs),
        state=jax.tree.leaves(state), targets=jax.tree.leaves(targets),
    )  # fmt: skip


def _arrays(name: str, value: Any) -> tuple[Any, ...]:
    """One array or tree of arrays, or a tuple of them, as a tuple."""
    several = type(value) is tuple  # a named one is a tree
    values = value if several else (value,)
    if value is None or not values:
        raise InputError(f"{name} is {shown(value)}; it is an array, or a tuple of arrays")
    return tuple(
        _tree(f"{name}[{place}]" if several else name, one) for place, one in enumerate(values)
    )


def _tree(name: str, value: Any) -> Any:
    """An array, or a tree of them as it is: a list of numbers is an array."""
    leaves, structure = jax.tree.flatten(value)
    if jax.tree_util.treedef_is_leaf(structure) or not any(hasattr(x, "shape") for x in leaves):
        return _array(name, value)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _array(f"{name}{jax.tree_util.keystr(path)}", leaf), value
    )


def _array(name: str, value: Any) -> Array:
    array = value if isinstance(value, jax.Array) else numbers(name, value)
    if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(np.asarray(array)).all():
        raise InputError(f"{name} has values that are not finite; every one is a finite number")
    if not array.size:
        raise InputError(f"{name} has shape {array.shape}; it has at least one number")
    return jnp.asarray(array)


def _program(
    model: Model, inputs: Sequence[Any], loss: Callable[..., Array] | None, targets: tuple
) -> Program:
    """The model's program, with the loss behind it if there is one."""
    program = trace(model, inputs)
    if loss is None:
        return program
    try:
        return program_of(model, tuple(inputs), loss=loss, targets=targets)
    except InputError:
        raise
    except Exception as error:  # whatever the loss raises
        raise _calls.failure("loss", targets, error) from error


def _given(
    model: Model, parameters: PyTree, inputs: Sequence[Any], key: PRNGKeyArray
) -> tuple[PyTree, PyTree] | None:
    """The weights to measure, with the state; None where weights are drawn."""
    if parameters is None:
        return model.given if model.init is None else None
    shapes, _ = weight_shapes(model, inputs)
    here, there = (
        {jax.tree_util.keystr(p): np.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (shapes, parameters)
    )
    if here != there:
        wrong = min(set(here.items()) ^ set(there.items()))[0]
        raise InputError(
            f"parameters{wrong} has shape {there.get(wrong, 'none: it is missing')}, and "
            f"{model.name} has {here.get(wrong, 'no such leaf')}; they are of one structure"
        )
    leaves = zip(jax.tree.leaves(parameters), jax.tree.leaves(shapes), strict=True)
    own = jax.tree.unflatten(
        jax.tree.structure(shapes), [jnp.asarray(leaf, shape.dtype) for leaf, shape in leaves]
    )
    _adapters.check_numbers(model.name, (own, None))
    if model.given is not None:
        return own, model.given[1]
    assert model.init is not None
    return own, model.init(key)[1]
