"""Flax NNX: a module with its weights. A class or function that makes one is a law (`maker`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray, PyTree

from gradflow.inspection._adapters import _calls
from gradflow.inspection._reading.model import Model


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:  # noqa: ARG001
    """The model of an `nnx.Module`; None for anything else."""
    if not _calls.comes_from(model, "flax.nnx"):
        return None
    from flax import nnx  # noqa: PLC0415

    copy = nnx.clone(model)
    copy.train()
    named, mode = _calls.in_training(copy.__call__, kwargs)
    parts: Any = nnx.split(copy, nnx.Param, nnx.RngKey, ...)
    graph, weights, keys, rest = parts
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), nnx.to_pure_dict(keys))

    def restored(state: Any, values: PyTree) -> Any:
        own = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(own, values)
        return own

    def apply(parameters: PyTree, state: PyTree, key: PRNGKeyArray, *values: Any) -> Any:
        leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
        drawn = [jax.random.split(jax.random.fold_in(key, i), s) for i, s in enumerate(leaves)]
        module = nnx.merge(
            graph,
            restored(weights, parameters),
            restored(keys, jax.tree.unflatten(tree, drawn)),
            restored(rest, state),
            copy=True,
        )
        again = {name: nnx.Rngs(key) for name, v in named.items() if isinstance(v, nnx.Rngs)}
        own, by_name = _calls.bound(
            module.__call__, (), values, key, kwargs={**named, **again}, rngs=nnx.Rngs
        )
        return module(*own, **by_name)

    given = nnx.to_pure_dict(weights), nnx.to_pure_dict(rest)
    switches = ("deterministic", "use_running_average")
    has_modes = any(hasattr(m, s) for _, m in nnx.iter_modules(copy) for s in switches)
    mode = ", ".join(filter(None, ("model.train()" if has_modes else "", mode)))
    return Model(type(model).__name__, None, apply, given, mode=mode)
