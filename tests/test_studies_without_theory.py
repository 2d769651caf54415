"""Studies of networks that no theory knows: measured, and the reason said."""

import html

import numpy as np
import pytest
import xarray

from gradflow.errors import NoTheory
from gradflow.simulation import monte_carlo
from gradflow.studies import _execution, _report, _study_file
from gradflow.theory import float64

TEXT = """
[network]
activation = "tanh"
weights = "identity"
width = 12
depth = 3
input_width = 12
[[axes]]
sigma_b = [0.1, 0.2]
[sampling]
networks = 20
[statistics]
measure = ["q", "log_gradient_norm"]
"""


@pytest.mark.medium
def test_what_no_theory_knows_is_measured_and_the_reason_said(tmp_path):
    study = _study_file.parse(TEXT)
    point = study.point(1)
    with pytest.raises(NoTheory) as reason:
        float64.predict(point.network(), point.inputs())
    _execution.run(study, tmp_path / "study")
    with xarray.open_dataset(tmp_path / "study" / "results.nc", engine="scipy") as dataset:
        assert dataset.attrs["no_theory"] == str(reason.value)
        assert np.isnan(dataset["q_theory"]).all()
        x = point.inputs().astype(np.float32)
        alone = monte_carlo.simulate(point.network(), x, key=point.key, networks=20)
        np.testing.assert_allclose(dataset["q"][1], alone["q"].value, rtol=1e-5)
        said = html.escape(f"Nothing is compared: {reason.value}.")
        assert said in _report.page(dataset)
