"""Averages on the devices: the same as those of `Estimate.of`, wherever the pieces are cut."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradflow.estimation import Estimate
from gradflow.studies import _averages
from gradflow.studies._averages import Averages

LOGS = (False, True, True)


def drawn(networks):
    """Two statistics and a logarithm far from 0, with all that is no number, and failures."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(4, networks, 3)).astype(np.float32)
    values[0] = 1e30 * values[0] + 3
    values[2] = 1e3 * values[2] - 1e4
    for bad in (np.nan, np.inf, -np.inf):
        values[:3][rng.random((3, networks, 3)) < 0.05] = bad
    values[1, :7], values[2, :7, 0] = -np.inf, np.nan
    values[3] = rng.random((networks, 3)) < 0.2
    return values


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "counts",
    [[7, 200, 64, 1, 65], [1] * 9, [300], [5, 5, 5, 5]],
    ids=lambda counts: str(counts[:3]),
)
def test_averages_are_those_of_the_values(monkeypatch, counts, devices, on_host):
    monkeypatch.setattr(_averages, "_VALUES_ON_HOST", 1 << 30 if on_host else 0)
    counts = np.array(counts)
    total = int(counts.sum())
    size = devices * -(-(total + 3) // devices)  # some beyond the last, which do not count
    values = drawn(size)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("networks",))
    there = jax.device_put(values, NamedSharding(mesh, PartitionSpec(None, "networks")))
    averages = Averages.of(LOGS, counts, len(counts), 3)
    found, failures = averages(there, counts)
    again, _ = averages(there, counts)
    ends = np.cumsum(counts)
    for point, (first, last) in enumerate(zip(ends - counts, ends, strict=True)):
        np.testing.assert_array_equal(
            failures[point], [np.count_nonzero(values[3, first:last], axis=0)]
        )
        for n, log in enumerate(LOGS):
            with np.errstate(over="ignore"):
                whole = Estimate.of(values[n, first:last], log=log)
            for name in ("count", "excluded", "mean", "squares", "log_unit"):
                ours, theirs = getattr(found, name)[point, n], getattr(whole, name)
                np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-300, err_msg=name)
                np.testing.assert_array_equal(ours, getattr(again, name)[point, n])
