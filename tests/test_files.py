"""Files that come piece by piece are as if they had been written at once."""

import numpy as np
import pytest
import xarray

from gradflow import files


@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 6, 7), tuple(range(8))])
def test_slabs_are_one_dataset(tmp_path, cuts):
    draw = np.random.default_rng(0)
    dataset = xarray.Dataset(
        {
            "values": (("x", "y", "layer"), draw.normal(size=(7, 3, 4))),
            "counts": (("x", "y"), draw.integers(0, 9, (7, 3))),
            "depths": ("layer", np.arange(4.0)),
        },
        coords={
            "x": np.linspace(0, 1, 7),
            "seed": ("x", np.arange(7)),
            "y": ["a", "bb", "ccc"],
            "layer": np.arange(1, 5),
        },
        attrs={"title": "slabs", "study": "a = 1\n" * 100},
    )
    slabs = (dataset.isel(x=slice(*ends)) for ends in zip(cuts, cuts[1:], strict=False))
    files.write_netcdf_slabs(slabs, "x", tmp_path / "whole.nc")
    found = xarray.load_dataset(tmp_path / "whole.nc")
    xarray.testing.assert_equal(found, dataset)
    assert found.attrs == dataset.attrs
    assert [path.name for path in tmp_path.iterdir()] == ["whole.nc"]
