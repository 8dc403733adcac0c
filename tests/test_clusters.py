"""``--distributed`` without addresses, where a scheduler's variables tell them.

The schedulers are not here; their variables are, as their documentation has them, for
two processes of this machine.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIRST_PORT = 65535 - 2**12 + 1
"""JAX takes a port from here on, by the number of the job."""

PROGRAM = """
import json, signal

before = signal.getsignal(signal.SIGTERM)
from esper_jax.run.devices import join
join(None, None, None)
import jax
from esper_jax.parallel.processes import exchange
print(json.dumps({
    "index": jax.process_index(),
    "count": jax.process_count(),
    "devices": [len(jax.devices()), len(jax.local_devices())],
    "heard": exchange(f"process {jax.process_index()}"),
    "handler": signal.getsignal(signal.SIGTERM) == before,
}))
"""


def free_job():
    """A number of a job whose port is free."""
    for job in range(os.getpid() % 2**12, 2**12 + os.getpid() % 2**12):
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", FIRST_PORT + job % 2**12))
            except OSError:
                continue
            return job
    raise AssertionError("no port is free")


def slurm(job, index):
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_STEP_NUM_NODES": "1",
    }


def open_mpi(job, index):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }


@pytest.mark.parametrize("variables", [slurm, open_mpi])
def test_two_processes_find_each_other_by_the_scheduler(variables):
    job = free_job()
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")
    sides = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": flags,
                **variables(job, index),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        said = [side.communicate(timeout=120) for side in sides]
    finally:
        for side in sides:
            side.kill()
            side.wait()
    assert [side.returncode for side in sides] == [0, 0], said
    for index, (out, _) in enumerate(said):
        [line] = [line for line in out.splitlines() if line.startswith("{")]
        assert json.loads(line) == {
            "index": index,
            "count": 2,
            "devices": [2, 1],
            "heard": ["process 0", "process 1"],
            "handler": True,
        }
