"""Studies: networks over a grid, described by a file, of any size (`gradflow study FILE`).

description, entries
    The study file: a base network and axes over it; what each of its entries may be.
point
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
report
    A page on the results.
"""

from gradflow.studies import (
    depth_scales,
    description,
    entries,
    execution,
    found,
    gradient_spread,
    merging,
    plan,
    point,
    report,
    results,
    sealed,
    spectra,
    store,
)

__all__ = ["depth_scales", "description", "entries", "execution", "found", "gradient_spread"]
__all__ += ["merging", "plan", "point", "report", "results", "sealed", "spectra", "store"]
