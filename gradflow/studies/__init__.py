"""Studies: many networks with a question.

note
    The question that the project exists for: does Glorot & Bengio's variance theory say what random
    networks do, and is what is said of vanishing and exploding gradients true?
jacobian_spectrum
    The singular values of the end-to-end Jacobian, in theory and of real networks.
remedies
    How to tackle them: a sick network, and every remedy beside it.
point
    Everything that the theory says at one σ_w² and σ_b².
"""

from gradflow.studies import jacobian_spectrum, note, point, remedies

__all__ = ["jacobian_spectrum", "note", "point", "remedies"]
