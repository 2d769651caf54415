"""Theory and exact simulation of vanishing and exploding gradients.

Will the gradients of this network vanish or explode? Theory answers, simulation of many random
networks at once answers, and the two answers are compared. The names that most programs need are
here (`gradflow.__all__`), and each subject is a module, which imports only from those above it:

errors             errors that bad input raises, of one sentence each
activations        activation functions: φ, its kinks, closed forms of its Gaussian means
gaussian           expectations under a Gaussian, in one and two dimensions
ensembles          laws of random weights: a distribution times a variance rule
kernels            the state of an infinitely wide layer: second moments of signals and of tangents
blocks             layers, each defined once for one random network and for infinite width
networks           a random network as data: stages of equal blocks
builders           networks of the usual architectures: mlp, residual, transformer, …
statistics         the quantities of each layer: names, measurement, prediction, correction
predictions        theory's values of every statistic, and the effect of finite width on them
estimation         means, standard errors and histograms over networks
theory             predictions for wide networks, layer by layer, without sampling
simulation         the same statistics, measured in many random networks at once
verdict            whether gradients vanish or explode, in words and as a factor a layer
comparison         theory beside simulation: z-scores and a verdict
training           many networks in training, with the statistics of every layer along the way
data               inputs that are made, read or real, and real ones with labels, to train on
figures            one function a figure
spectra            singular values of end-to-end Jacobians, theory beside simulation
remedies           a network whose gradients vanish or explode, beside each remedy for it
inspection         any JAX model, read as it is: measured, predicted and mended
experiments        published experiments on training, repeated
studies            large grids of networks, described by a file
cli                the command ``gradflow``
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradflow.activations import Activation as Activation
    from gradflow.builders import as_sites as as_sites
    from gradflow.builders import convolutional as convolutional
    from gradflow.builders import mlp as mlp
    from gradflow.builders import recurrent as recurrent
    from gradflow.builders import residual as residual
    from gradflow.builders import stack as stack
    from gradflow.builders import transformer as transformer
    from gradflow.comparison import Comparison as Comparison
    from gradflow.comparison import compare as compare
    from gradflow.ensembles import Ensemble as Ensemble
    from gradflow.errors import InputError as InputError
    from gradflow.inspection import Inspection as Inspection
    from gradflow.inspection import inspect as inspect
    from gradflow.inspection._cure import mended as mended
    from gradflow.inspection.watch import watch as watch
    from gradflow.networks import Network as Network
    from gradflow.networks import Stage as Stage
    from gradflow.simulation.monte_carlo import simulate as simulate
    from gradflow.simulation.propagation import propagate as propagate
    from gradflow.simulation.singular_values import (
        extreme_singular_values as extreme_singular_values,
    )
    from gradflow.simulation.singular_values import log_singular_values as log_singular_values
    from gradflow.statistics import Statistic as Statistic
    from gradflow.theory.criticality import critical_points as critical_points
    from gradflow.theory.criticality import phase_diagram as phase_diagram
    from gradflow.theory.fixed_points import analyse as analyse
    from gradflow.theory.float64 import predict as predict
    from gradflow.theory.prescription import prescribe as prescribe
    from gradflow.training.train import train as train

__version__ = "0.1.0"

# The module that each public name is imported from, on first use; the imports above are for type
# checkers.
_MODULES = {
    "Activation": "activations",
    "Comparison": "comparison",
    "Ensemble": "ensembles",
    "InputError": "errors",
    "Inspection": "inspection",
    "Network": "networks",
    "Stage": "networks",
    "Statistic": "statistics",
    "analyse": "theory.fixed_points",
    "as_sites": "builders",
    "compare": "comparison",
    "convolutional": "builders",
    "critical_points": "theory.criticality",
    "extreme_singular_values": "simulation.singular_values",
    "log_singular_values": "simulation.singular_values",
    "inspect": "inspection",
    "mended": "inspection._cure",
    "mlp": "builders",
    "phase_diagram": "theory.criticality",
    "predict": "theory.float64",
    "prescribe": "theory.prescription",
    "propagate": "simulation.propagation",
    "recurrent": "builders",
    "residual": "builders",
    "simulate": "simulation.monte_carlo",
    "stack": "builders",
    "train": "training.train",
    "transformer": "builders",
    "watch": "inspection.watch",
}
__all__ = list(_MODULES)


def _subjects() -> list[str]:
    """The public modules of the package."""
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


def __dir__() -> list[str]:
    return sorted([*__all__, *_subjects(), "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name or a subject on first use: ``import gradflow; gradflow.theory``."""
    if name in _MODULES:
        value = getattr(importlib.import_module(f"gradflow.{_MODULES[name]}"), name)
        globals()[name] = value  # found without this function from now on
        return value
    if name in _subjects():
        return importlib.import_module(f"gradflow.{name}")
    raise AttributeError(f"module 'gradflow' has no attribute {name!r}")
