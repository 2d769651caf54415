"""PyTorch, through torchax: a module with its weights. A function that makes one is their law."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray, PyTree

from gradflow.errors import InputError
from gradflow.inspection._adapters import _calls
from gradflow.inspection._reading.model import Model


def adapt(model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Model | None:  # noqa: ARG001
    """The model of a `torch.nn.Module`; None for anything else."""
    if not _calls.comes_from(model, "torch.nn"):
        return None
    import torch  # noqa: PLC0415

    try:
        import torchax  # noqa: PLC0415
    except Exception as error:  # with a PyTorch that it does not know it raises anything
        raise InputError(
            "model is a module of PyTorch, read through torchax, which cannot be imported beside "
            f"PyTorch {torch.__version__} ({type(error).__name__}: {error}); "
            "torchax 0.0.13 can beside PyTorch 2.9"
        ) from error
    environment = torchax.default_env()
    module = copy.deepcopy(model).cpu().train()
    for name, part in module.named_modules():
        part.forward = _scoped(name.rpartition(".")[2] or type(module).__name__, part.forward)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    given = environment.t2j_copy((trained, {**frozen, **dict(module.named_buffers())}))

    def apply(parameters: PyTree, state: PyTree, key: PRNGKeyArray, *values: Any) -> Any:
        weights, arguments = environment.j2t_iso(({**parameters, **state}, values))
        with environment.override_property(prng=key), environment:
            outputs = torch.func.functional_call(module, weights, arguments, dict(kwargs))
        return environment.t2j_iso(outputs)

    return Model(type(model).__name__, None, apply, given, mode="model.train()")


def seeded(make: Callable[[], Any]) -> Callable[[PRNGKeyArray], Any]:
    """A maker of a module as a function of a key, which is the seed of PyTorch's generator."""

    def make_from(key: PRNGKeyArray) -> Any:
        import torch  # noqa: PLC0415

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(jax.random.bits(key, dtype="uint32")))
            return make()

    return make_from


def _scoped(name: str, forward: Callable) -> Callable:
    """A module's function whose equations have its name."""

    def named(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(name):
            return forward(*args, **kwargs)

    return named
