"""The report of an inspection: one page of HTML without other files."""

from typing import Any

from gradflow._pages import facts, figure_part, page_of, safe, table

__all__ = ["page"]

_CAPTIONS = {
    "inspected_layers": (
        "The norm ‖∂C/∂z‖ of the gradient at each layer, and that of the weights' gradient "
        "relative to the weights: points with two standard errors over networks; theory as lines."
    ),
    "inspected_parameters": (
        "‖∂C/∂W‖/‖W‖ of each leaf of the parameters: by how much one step of a common learning "
        "rate moves it, beside the others."
    ),
}
_ABOUT = (
    "q: second moment of pre-activations; flat/dead: units where the slope of φ is far below its "
    "largest, and where it is 0 for all inputs; c: correlation of two inputs; z: the largest "
    "difference of theory and measurement in the row, in standard errors. Beside what was measured "
    "stands theory, of infinite width."
)


def page(inspection: Any) -> str:
    """The report of an `Inspection`, as one page of HTML."""
    drawn = inspection.networks
    head, rows = inspection.rows()
    return page_of(
        inspection.name,
        [
            f"<h1>{safe(inspection.name)}</h1>",
            f"<p class=question>{safe(inspection.verdict.sentence)}</p>",
            facts(
                {
                    "networks": f"{drawn} drawn" if drawn > 1 else "the weights at hand",
                    "layers": f"{len(inspection.places)}",
                    "mode": inspection.mode or "-",
                    "agreement": inspection.agreement,
                    "theory": inspection.theory_ends,
                    "remedies": inspection.remedies or "none needed",
                }
            ),
            *(
                figure_part(figure, _CAPTIONS[name])
                for name, figure in inspection.figures().items()
            ),
            "<h2>Layers</h2>",
            f"<p>{safe(_ABOUT)}</p>",
            table(head, rows),
            "<h2>Parameters</h2>",
            table(("leaf", "log₁₀ ‖∂C/∂W‖/‖W‖ ± s.e.", "multiply by"), inspection.leaf_rows()),
        ],
    )
