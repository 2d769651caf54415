"""Examples of models that are sick: said why, mended, and then they train."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "scripts" / "inspect"


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("own_loop", "jax"),
        ("equinox_mlp", "equinox"),
        ("flax_cnn", "flax"),
        ("keras_model", "keras"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of libraries
def test_a_sick_model_trains_once_it_is_mended(name, library, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip(library)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    result, (start, sick, mended) = example.main()
    assert result.verdict.kind == "vanishing"
    assert "the cause is the scale of" in result.verdict.sentence
    assert len(result.factors) == example.DEPTH
    assert sick > 0.99 * start  # it does not learn
    assert mended < 0.9 * start
