"""One side of a program of two processes; test_processes.py runs both.

Arguments: port, index, what to do, directory. Prints one JSON object.
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esper_jax.checkpoint import CheckpointError, Retention, step_folder
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.checkpoint.host_leaves import to_host
from esper_jax.checkpoint.manifest import digest
from esper_jax.parallel.replicas import check_replicas
from esper_jax.train.loop import fit
from esper_jax.train.mesh import over_mesh

port, index, action, directory = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
mesh = Mesh(np.array(jax.devices()), ("d",))
ME = jax.process_index()


def everywhere(array, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def make(value):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3) + value
    key = everywhere(np.asarray(jax.random.key_data(jax.random.key(value))))
    return {
        "split": everywhere(rows, "d"),
        "copied": everywhere(-rows),
        "own": jnp.full(3, value, jnp.bfloat16),
        "rng": jax.jit(jax.random.wrap_key_data)(key),
        "step": value,
    }


def digests(state):
    return {name: digest(leaf.array) for name, leaf in to_host(state).items()}


def said(work):
    try:
        work()
    except (CheckpointError, ValueError) as error:
        return str(error)
    return ""


def whole_life():
    """Saves, restores, damages, falls back, refuses: both sides say the same."""
    found = {}
    with Checkpointer(directory, retention=Retention(keep_last=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make(step), metrics={"loss": 1.0})
        back = checkpoints.restore(make(0))
        found["newest"] = back.step, digests(back.state) == digests(make(3))
        found["shardings"] = [
            str(a.sharding) == str(b.sharding)
            for a, b in zip(*map(jax.tree.leaves, (back.state, make(0))), strict=True)
            if isinstance(a, jax.Array)
        ]
        found["steps"] = checkpoints.steps()
        # Anything that goes wrong in one of them is raised in both.
        found["differs"] = said(
            lambda: checkpoints.save(4, {**make(4), "own": jnp.full(3, float(ME))})
        )
        found["config"] = said(
            lambda: checkpoints.save(4, make(4), config={1} if ME else None)
        )
        found["wide"] = said(
            lambda: checkpoints.restore({**make(0), "step": jnp.ones(2)})
        )
        write = step_folder.write

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        step_folder.write = full  # fails in process 0: the other one never writes
        checkpoints.save(5, make(5))
        found["failed"] = said(checkpoints.wait)
        step_folder.write = write
        found["locked"] = said(lambda: Checkpointer(directory).acquire())
        if ME == 0:
            (checkpoints.directory / "3" / "manifest.json").unlink()
        checkpoints.wait()
        back = checkpoints.restore(make(0))
        found["fallback"] = back.step, back.damaged
        found["hash"] = digests(back.state)
    print(json.dumps(found))


def die():
    """One side is gone in the middle of a save: process 0, or the other."""
    checkpoints = Checkpointer(directory)
    checkpoints.save(1, make(1))
    checkpoints.wait()
    write = step_folder.write

    def half(folder, leaves, header):
        write(folder, leaves, header)
        os._exit(9)  # all is written, and not yet renamed

    if action == "die0":
        step_folder.write = half
    checkpoints.save(2, make(2))
    if action == "die1" and ME == 1:
        os._exit(9)
    if ME == 0:
        checkpoints._join()
    os._exit(0)  # not waiting for who is gone


def resume():
    with Checkpointer(directory) as checkpoints:
        back = checkpoints.restore(make(0))
        checkpoints.save(7, back.state)
    print(json.dumps({"step": back.step, "hash": digests(back.state)}))


def train():
    """Both sides grow one model, each on its half of the rows, and save it."""
    import test_parallel as single

    program = over_mesh(single.make("d", debug=True), mesh)
    stages = []
    with Checkpointer(directory) as checkpoints:
        state = fit(
            program,
            program.init(jax.random.key(0)),
            single.TRAIN,
            single.HELD_OUT,
            ticks=single.TICKS,
            batch_size=single.BATCH,
            on_tick=lambda _, r: stages.append(r.layers["layers/0"].stage.tolist()),
        )
        check_replicas(state)
        checkpoints.save(int(state.step), state)
        checkpoints.wait()
        back = checkpoints.restore(program.init(jax.random.key(1)))
    apart = jax.device_put(float(ME), jax.local_devices()[0])
    print(
        json.dumps(
            {
                "stages": stages,
                "hash": digests(state),
                "restored": digests(back.state) == digests(state),
                "apart": said(lambda: check_replicas({"x": apart})),
            }
        )
    )


{"life": whole_life, "die0": die, "die1": die, "resume": resume, "train": train}[
    action
]()
