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

description
    The study file: a base network and axes over it, checked.
plan
    Which programs it takes, in which chunks, and how long.
store
    The folder that holds what is finished, whatever happens to the process.
spectra
    Singular values of the end-to-end Jacobian, counted, beside theory.
results
    All of it with labels, theory beside it.
execution
    Running it.
report
    A page on what it found.
note
    The one that the project exists for (`gradflow study`): does Glorot & Bengio's variance theory
    say what random networks do, and is what is said of vanishing and exploding gradients true?
"""

from gradflow.studies import (
    description,
    execution,
    experiments,
    jacobian_spectrum,
    note,
    plan,
    point,
    remedies,
    report,
    results,
    spectra,
    store,
)

__all__ = ["description", "execution", "experiments", "jacobian_spectrum", "note", "plan", "point"]
__all__ += ["remedies", "report", "results", "spectra", "store"]
