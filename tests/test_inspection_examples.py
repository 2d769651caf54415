"""Examples of models that are sick: said why, mended, and then they train."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "scripts" / "inspect"


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_loop_of_ones_own_trains_once_its_weights_are_mended():
    spec = importlib.util.spec_from_file_location("own_loop", FOLDER / "own_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    result, (start, sick, mended) = example.main()
    assert result.verdict.kind == "vanishing"
    assert "the cause is the scale of" in result.verdict.sentence
    assert len(result.factors) == example.DEPTH
    assert sick > 0.99 * start  # it does not learn
    assert mended < 0.9 * start
