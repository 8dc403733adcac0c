"""The devices that a run trains on, and the processes that hold them."""

import logging
import signal

import jax
import numpy as np

from esper_jax.data import Dataset
from esper_jax.run.config import ConfigError, RunConfig
from esper_jax.run.own import one_batch
from esper_jax.train.batches import is_iterable
from esper_jax.train.mesh import over_mesh
from esper_jax.train.program import Program

__all__ = ["AXIS", "join", "mesh_of", "over"]

AXIS = "devices"
"""The mapped axis that the rows are divided along."""

_log = logging.getLogger(__name__)


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the processes of one run; before anything is computed, in the main thread.

    The handler of SIGTERM stays what it was.

    Args:
      coordinator: ``host:port`` of process 0. Without it, JAX asks Slurm, Open MPI or
        Kubernetes.
      num_processes: how many there are.
      process_id: of this one, from 0.

    Raises:
      ConfigError: if they are not found, or do not come together.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ConfigError(
            "--distributed: expected --coordinator, --num-processes and --process-id "
            "together, or none of them under Slurm, Open MPI or Kubernetes"
        )
    number = signal.SIGTERM
    handler = signal.getsignal(number)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
        # JAX has taken it for its preemption service, unseen by Python.
        signal.signal(number, handler)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: the processes could not be joined: {error}. Outside of "
            "Slurm, Open MPI and Kubernetes give --coordinator HOST:PORT, "
            "--num-processes N and --process-id I"
        ) from None


def mesh_of(
    config: RunConfig, data: Dataset, asked: int | None
) -> jax.sharding.Mesh | None:
    """The devices to train on: None for a single one.

    Each has an equal part of the rows of a batch, of the held-out and of the test data.

    Args:
      config: of the run.
      data: of the run.
      asked: devices of each process; by default all, or as many as divide the rows,
        and one on CPUs, which share their cores.

    Raises:
      ConfigError: if there are not so many devices, or they do not divide the rows.
    """
    local, processes = jax.local_devices(), jax.process_count()
    if asked is not None and not 1 <= asked <= len(local):
        raise ConfigError(
            f"--devices: expected from 1 to {len(local)}, the devices of this process; "
            f"got {asked}"
        )
    rows = _rows(config, data)
    most = len(local) if local[0].platform != "cpu" else 1
    count = asked or next(
        (n for n in range(most, 1, -1) if not _odd(rows, n * processes)), 1
    )
    odd = _odd(rows, count * processes)
    if odd:
        raise ConfigError(
            f"--devices: {count * processes} devices must divide the rows of a batch, "
            f"of the held-out and of the test data; got {odd}. Change "
            "train.batch_size or the data, or take fewer devices"
        )
    if asked is None and count < most:
        _log.warning(
            "trains on %d of %d devices: more do not divide %s",
            count,
            most,
            _odd(rows, most * processes),
        )
    if count * processes == 1:
        return None
    chosen = [
        device
        for process in range(processes)
        for device in sorted(jax.devices(), key=lambda d: d.id)
        if device.process_index == process
    ]
    held = np.array(chosen).reshape(processes, -1)[:, :count].reshape(-1)
    return jax.sharding.Mesh(held, (AXIS,))


def over(program: Program, mesh: jax.sharding.Mesh | None) -> Program:
    """The program over the devices of a mesh, if there is one."""
    return program if mesh is None else over_mesh(program, mesh)


def _rows(config: RunConfig, data: Dataset) -> dict[str, int]:
    """Rows that the devices divide, by what has them."""
    rows = {}
    for part in ("train", "held_out", "test"):
        whole = getattr(data, part)
        batches = is_iterable(whole)
        batch = one_batch(part, whole, config.train.batch_size) if batches else whole
        leaves = jax.tree.leaves(batch)
        name = f"a batch of {part}" if batches else part
        rows[name] = np.shape(leaves[0])[0] if leaves and np.ndim(leaves[0]) else 1
    if "train" in rows:  # arrays are cut into batches
        del rows["train"]
        rows["train.batch_size"] = config.train.batch_size
    return rows


def _odd(rows: dict[str, int], devices: int) -> str:
    """What a number of devices does not divide, in words."""
    return ", ".join(f"{name} ({n})" for name, n in rows.items() if n % devices)
