"""Wrong command lines, some of those that `attacks/arguments.py` draws: one sentence each.

GRADFLOW_TEST_ATTACKS=all tries ten times as many.
"""

import os

import pytest
from attacks import arguments

pytestmark = pytest.mark.usefixtures("unchecked")

# Where commands begin to compute: what gets so far was not wrong, or is told so by what the other
# tests are about. (The script `attacks/arguments.py` lets them compute.)
SEEDS = range(40 if os.environ.get("GRADFLOW_TEST_ATTACKS") == "all" else 4)
BEGINNINGS = (
    "gradflow.comparison.compare",
    "gradflow.studies._execution.run",
    "gradflow.spectra.run",
    "gradflow.theory.summary.summarise",
    "gradflow.theory.float64.predict_and_correct",
    "gradflow.remedies.run",
    "gradflow.theory.criticality.critical_points",
    "gradflow.theory.criticality.phase_diagram",
    "gradflow.theory.prescription.prescribe",
    "gradflow.training.train",
)


@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_calls_are_one_sentence_each(seed, monkeypatch):
    def begin(*_, **__):
        raise arguments.Computes

    for name in BEGINNINGS:
        monkeypatch.setattr(name, begin)
    assert not list(arguments.attack(seed, 40))


def test_a_command_that_fails_otherwise_is_found(tmp_path, monkeypatch):
    def broken(**_):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr("gradflow.cli._theory._parse_correlations", broken)
    code, _, err = arguments.run(["theory"], tmp_path)
    assert arguments.complaint(code, err) == "exit code traceback"
    assert (
        arguments.complaint(2, "gradflow: x is PosixPath('y'); it is z\n") == "a word of Python's"
    )
    assert arguments.complaint(2, "gradflow: a\nmore\n") == "1 sentences, or not at the end"
    assert arguments.complaint(2, "gradflow: a\x1b[31m\n") == "control characters, or too long"
    assert arguments.complaint(3, "") == "exit code 3"
    assert not arguments.complaint(2, "a: compiling\ngradflow: x is y; it is z\n")
