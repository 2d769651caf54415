"""Any JAX model, read as it is: measured, predicted, and mended.

A model is a program of JAX, whoever wrote its layers: `inspect` reads it, draws its weights again
and again, and puts theory, worked out of the same program, beside what it measures.
"""

from gradflow.inspection._inspecting import inspect
from gradflow.inspection._result import Inspection

__all__ = ["Inspection", "inspect"]
