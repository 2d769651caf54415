"""Words for the names of results in tables; JSON and files have the names."""

__all__ = ["words"]

# Names that the commands add to those of `theory.summary`.
_WORDS = {
    "sigma_w": "σ_w",
    "sigma_b": "σ_b",
    "weights": "weights",
    "layer": "layer",
    "q_stable": "q* is stable",
    "exponent": "next power of 1 - c in the correlation map",
    "coefficient": "its coefficient",
    "one_minus_c": "1 - c after l layers",
    "mean_singular_value": "mean of s",
    "squared_singular_value_moments": "moments of s², first to sixth",
    "squared_singular_value_lower_edge": "least s² of the continuous part",
    "squared_singular_value_upper_edge": "largest s² of the continuous part",
    "singular_value_upper_edge": "largest s of the continuous part",
}


def words(name: str) -> str:
    """The words for a quantity, by its name in results."""
    from gradflow.theory import summary  # noqa: PLC0415  (JAX is slow to import)

    return (summary.LABELS | _WORDS)[name]
