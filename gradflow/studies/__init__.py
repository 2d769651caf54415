"""Studies: many networks with a question.

note
    The question that the project exists for: does Glorot & Bengio's variance theory say what random
    networks do, and is what is said of vanishing and exploding gradients true?
jacobian_spectrum
    The singular values of the end-to-end Jacobian, in theory and of real networks.
"""

from gradflow.studies import jacobian_spectrum, note

__all__ = ["jacobian_spectrum", "note"]
