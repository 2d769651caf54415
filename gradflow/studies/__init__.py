"""Studies: random networks over a grid that a file describes, in any number, beside theory.

    study = studies.load(Path("study.toml"))
    outcome = studies.run(study, folder)            # `gradflow study FILE --out FOLDER`
    with studies.open_results(outcome.results) as dataset:
        page = studies.report(dataset)

Words that have one meaning throughout:

study        what a study file says: a base network, axes, and how many networks a point has
axis         one dimension of the grid: fields of the file that vary along it together
point        one combination of the axes' values: a law of networks, its inputs and its key
share        one host's part of the networks of every point; the shares are merged into the whole
program      one compiled program, and the points whose networks it draws
round        the networks that are drawn between two decisions on how many each point needs
task         the networks that a round draws with one program
chunk        a stretch of a task that is drawn, written and, after an interruption, resumed at once;
             or the theory of some of its points
measurements what was measured in networks of some points, as estimates that can be merged
store        the folder with all that is finished
results      the labelled file that is made of the measurements and of theory at the end

Private: running and merging (`_execution`); the folder (`_store`); the labelled results
(`_results`); a study and its points as data (`_study`, `_point`); study files
(`_study_file`); which programs draw it in which
chunks (`_plan`); drawing one task (`_runner`); the files of rounds and chunks and their checksums
(`_rounds`, `_measurements`, `_sealed`); and what is derived from statistics: `_depth_scales`,
`_gradient_spread`, `_spectra`.
"""

from gradflow.studies._execution import merge, run
from gradflow.studies._plan import Share
from gradflow.studies._report import page as report
from gradflow.studies._results import open_results
from gradflow.studies._store import Store
from gradflow.studies._study import Study
from gradflow.studies._study_file import load, parse

__all__ = ["Share", "Store", "Study", "load", "merge", "open_results", "parse"]
__all__ += ["report", "run"]
