"""Figures: each public function makes one `Figure` from labelled results.

Theory is drawn as lines, measurements as points with error bars (two standard errors of the mean
over networks). Figures are made without pyplot, so that no global state changes; notebooks show
them, and `save` writes them to files.

by_layer
    Comparisons by layer, and histograms: ``gradflow compare`` draws all of them.
remedy
    Remedies beside the network that they are meant to mend.
phases
    Where gradients vanish and where they explode: over (σ_w, σ_b), and over the width.
correlations
    The map of two inputs' correlation through a layer.
jacobian
    Spectra of end-to-end Jacobians.
inspection
    Models of users' own that were inspected: gradients by layer, and by leaf of the parameters.
training
    Networks in training: the experiments' figures.
"""

from gradflow.figures import (
    _correlations,
    _inspection,
    _training,
    by_layer,
    jacobian,
    phases,
    remedy,
)
from gradflow.figures._correlations import *
from gradflow.figures._drawing import Figure, save
from gradflow.figures._inspection import *
from gradflow.figures._training import *
from gradflow.figures.by_layer import *
from gradflow.figures.jacobian import *
from gradflow.figures.phases import *
from gradflow.figures.remedy import *

__all__ = ["OF_COMPARISONS", "OF_INSPECTIONS", "Figure", "save"]
__all__ += [*by_layer.__all__, *phases.__all__, *remedy.__all__]
__all__ += [*jacobian.__all__, *_training.__all__, *_correlations.__all__, *_inspection.__all__]

# The figures that any comparison has, by name.
OF_COMPARISONS = {name: getattr(by_layer, name) for name in by_layer.__all__}
# The figures of an inspection, by name.
OF_INSPECTIONS = {name: getattr(_inspection, name) for name in _inspection.__all__}
