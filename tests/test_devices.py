"""One result, however many devices or processes share the networks."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from gradflow import builders
from gradflow.errors import InputError
from gradflow.simulation import monte_carlo

# Run with: file to write, number of devices, processes, which one this is, and a port.
PROGRAM = """
import sys
import jax
import numpy as np
out, devices, processes, process, port = sys.argv[1], *map(int, sys.argv[2:])
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
from gradflow import builders, ensembles, statistics, training
from gradflow.simulation import _programs, monte_carlo
assert len(jax.devices()) == devices * processes
network = builders.mlp([12, *[16] * 4], "tanh", "glorot", sigma_b=0.1)
x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 12)
found = {}
for sampler in ("dense", "matrix_free"):
    result = monte_carlo.simulate(network, x, networks=37, sampler=sampler, keep_samples=True)
    found |= {f"{sampler}/{name}": value for name, value in result.samples.items()}
    found |= {f"{sampler}/mean/{n}": e.value for n, e in result.estimates.items()}
square = builders.mlp([12] * 4, "relu", "he", sigma_b=0.1)
law = _programs.RandomNetworks.of(square, jax.numpy.asarray(x[:1]), jax.random.key(1))
chunk, which = 12, np.zeros(12, np.int32)
how = {"measured": (statistics.q,), "sampler": "dense", "keep": (False, False), "block": 2}
run = _programs.compiled(law, chunk, tuple(jax.devices()), 1.0, spectrum=True, **how)
_, logs = run(law, which, np.arange(chunk, dtype=np.int32))
found["spectra"] = np.exp(_programs.to_host(logs))
if processes == 1:
    x = np.sin(np.arange(240, dtype=np.float32)).reshape(20, 12)
    wanted = (statistics.q, statistics.weight_gradient_variance)
    laws = [builders.mlp([12, 16, 16, 3], "tanh", ensembles.fan_in(s)) for s in (0.5, 1.5)]
    record = training.Recording([0, 12], wanted=wanted)
    how = {"steps": 12, "batch": 4, "seeds": 2, "record": record}
    result = training.train(laws, x, np.arange(20) % 3, **how)
    found |= {f"training/{name}": value for name, value in result.values.items()}
np.savez(out, **found)
"""


def results(folder, devices=1, processes=1):
    """What each of the processes found."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    soon = os.environ.get("XLA_FLAGS", "")  # as other tests' programs are compiled
    flags = f"{soon} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    files = [folder / f"{devices}-{processes}-{process}.npz" for process in range(processes)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (file, devices, processes, process, port))],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, file in enumerate(files)
    ]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return [dict(np.load(file)) for file in files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return results(tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize(
    ("devices", "processes"),
    [
        pytest.param(3, 1, marks=pytest.mark.medium),
        pytest.param(2, 2, marks=pytest.mark.slow),
    ],
)
def test_devices_and_processes_change_nothing_but_the_rounding(tmp_path, alone, devices, processes):
    for found in results(tmp_path, devices, processes):
        assert set(found) == {n for n in alone if processes == 1 or "training" not in n}
        for name, value in found.items():
            np.testing.assert_allclose(value, alone[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_no_device_is_refused():
    x = np.ones((1, 3), np.float32)
    with pytest.raises(InputError, match="devices is empty"):
        monte_carlo.simulate(builders.mlp([3, 3]), x, networks=2, devices=[])
