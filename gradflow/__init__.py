"""Theory and exact simulation of vanishing and exploding gradients.

Will the gradients of this network vanish or explode? It is answered twice, by
theory and by exact simulation of many random networks at once, and the two are compared. Each
module is a subject; each imports only from those above it:

files              files that are written whole or not at all
arguments          what callers give: inputs, keys and seeds, converted and checked
norms              norms as logarithms, which no float's range ends
activations        what a unit does: φ, its kinks, closed forms
gaussian           expectations under a Gaussian, in one and two dimensions
ensembles          how weights are drawn: a distribution times a variance rule
batch              averages over a batch after BatchNorm
gram               what the theory knows of a layer: second moments of signals and of tangents
cells              the law of an LSTM's cells, which second moments do not give
blocks             the repeating unit, read twice: one network, infinite width
networks           a random network as data: stages of equal blocks
statistics         what is reported: its name, how it is measured, how it is predicted
theory             linear_regime (Glorot & Bengio 2010), mean_field, fixed_points, criticality,
                   architectures, spectrum, finite_width, corrections, carried_means,
                   shared_weights, transformations, prescription
estimation         means, standard errors and histograms over networks
simulation         matrices and samplers (dense, matrix_free), propagation, jacobians,
                   singular_values, monte_carlo
comparison         theory beside measurement: z-scores and a verdict
training           weights as parameters; layers along training, many networks at once
shapeset           images of shapes, endless and drawn by key
data               real inputs, with labels: what networks are trained on
figures            one function a figure
studies            jacobian_spectrum, remedies; what study files need: entries, grid_point,
                   description, plan, store, spectra, depth_scales, gradient_spread, results,
                   execution, merging, report; note (the study that the project began with)
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
