"""Figures: one public function a figure, from labelled results to a matplotlib `Figure`.

Theory is drawn as lines, what is measured as points with error bars (two standard errors of the
mean over networks). Figures are made without pyplot, so that nothing global changes.

theory_and_simulation
    Of random networks: by layer, histograms, phase diagram, spectrum.
training
    Of networks in training: the experiments' figures.
drawing
    What they share.
"""

from gradflow.figures._drawing import save
from gradflow.figures.theory_and_simulation import *
from gradflow.figures.theory_and_simulation import __all__ as _of_random_networks
from gradflow.figures.training import *
from gradflow.figures.training import __all__ as _of_training

__all__ = ["save", *_of_random_networks, *_of_training]
