"""Theory and exact simulation of vanishing and exploding gradients.

Will the gradients of this network vanish or explode? It is answered twice, by
theory and by exact simulation of many random networks at once, and the two are compared. Each
module is a subject; each imports only from those above it:

errors             input that cannot be used, in one sentence
norms              norms as logarithms, which no float's range ends
activations        what a unit does: φ, its kinks, closed forms
gaussian           expectations under a Gaussian, in one and two dimensions
ensembles          how weights are drawn: a distribution times a variance rule
kernels            the state of an infinitely wide layer: second moments of signals and of tangents
blocks             the repeating unit, read twice: one network, infinite width
networks           a random network as data: stages of equal blocks
builders           networks of the usual architectures: mlp, residual, convolutional, recurrent
schema             a network as named options: for Python, study files and the command line
statistics         what is reported: its name, how it is measured, how it is predicted
float_ranges       in which layer signals and gradients leave float16, bfloat16, float32, float64
estimation         means, standard errors and histograms over networks
roots              roots of a function of one variable, differentiable
theory             one value a layer, no sampling
simulation         the same statistics, measured in many random networks at once
verdict            what becomes of the gradients, in words and as a factor a layer
comparison         theory beside measurement: z-scores and a verdict
training           weights as parameters; layers along training, many networks at once
data               real inputs, with labels: what networks are trained on
figures            one function a figure
spectra            singular values of end-to-end Jacobians, theory beside simulation
remedies           a sick network, and each way to tackle it beside it
experiments        networks in training: what the paper showed, and what came after it
studies            networks over a grid that a file describes, of any size
note               the study of the note that the project began with
cli                the command ``gradflow``
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a module on first use: ``import gradflow; gradflow.theory.mean_field``."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"gradflow.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"gradflow.{name}":
            raise
        raise AttributeError(f"module 'gradflow' has no attribute {name!r}") from error
