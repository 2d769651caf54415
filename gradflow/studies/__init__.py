"""Studies: many networks with a question.

jacobian_spectrum
    The singular values of the end-to-end Jacobian, in theory and of real networks.
remedies
    How to tackle them: a sick network, and every remedy beside it.
point
    Everything that the theory says at one σ_w² and σ_b².

Networks in training:

experiments
    What the paper showed, and what came after it.

Studies that a file describes, of any size (`gradflow study FILE`):

description, entries
    The study file: a base network and axes over it; what each of its entries may be.
grid_point
    A place in its grid: the networks' law, the inputs and the key.
plan
    Which programs it takes, in which chunks, and how long.
store, found, sealed
    The folder that holds what is finished, whatever happens to the process; what networks of some
    points did; files that tell their own damage.
spectra
    Singular values of the end-to-end Jacobian, counted, beside theory.
depth_scales, gradient_spread
    What is made of the statistics: ξ of gradients, lengths and correlations; how networks differ.
results
    All of it with labels, theory beside it.
execution, merging
    Running it; shares of it put together.
report, report_figures
    A page on what it found.
note
    The one that the project exists for (`gradflow study`): does Glorot & Bengio's variance theory
    say what random networks do, and is what is said of vanishing and exploding gradients true?
"""

from gradflow.studies import (
    depth_scales,
    description,
    entries,
    execution,
    experiments,
    found,
    gradient_spread,
    grid_point,
    jacobian_spectrum,
    merging,
    note,
    plan,
    point,
    remedies,
    report,
    report_figures,
    results,
    sealed,
    spectra,
    store,
)

__all__ = ["depth_scales", "description", "entries", "execution", "experiments", "found"]
__all__ += ["gradient_spread", "grid_point", "jacobian_spectrum", "merging", "note", "plan"]
__all__ += ["point", "remedies", "report", "report_figures", "results", "sealed", "spectra"]
__all__ += ["store"]
