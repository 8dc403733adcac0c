"""Run by test_checkpoint.py where there are four devices.

Restores what one device saved in the first directory, with the given hash, and saves in
the second what is sharded.
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_capacity import make_program

from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.trees import is_key, state_hash

source, target, expected = sys.argv[1:]
assert len(jax.devices()) == 4
line = Mesh(np.array(jax.devices()), ("a",))
square = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
replicated = NamedSharding(line, PartitionSpec())


def spread(leaf, mesh=line, axis="a"):
    """Split along its first axis where that goes evenly, else on every device."""
    ways = mesh.shape[axis]
    even = not is_key(leaf) and leaf.ndim and leaf.shape[0] % ways == 0
    spec = PartitionSpec(axis) if even else PartitionSpec()
    return jax.device_put(leaf, NamedSharding(mesh, spec))


program = make_program()
fresh = program.init(jax.random.key(9))
likes = {
    "sharded": jax.tree.map(spread, fresh),
    "replicated": jax.device_put(fresh, replicated),
    "one device": jax.device_put(fresh, jax.devices()[2]),
    "as it comes": fresh,
    "square": jax.tree.map(lambda leaf: spread(leaf, square, "b"), fresh),
}


def restored(directory):
    for name, like in likes.items():
        state = Checkpointer(directory).restore(like).state
        assert state_hash(state) == expected, name
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
            assert a.sharding == b.sharding, (name, a.sharding, b.sharding)
            assert a.committed == b.committed, name
    return state


alone = restored(source)
split = jax.tree.map(spread, alone)
assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(split))
with Checkpointer(target) as checkpoints:
    checkpoints.save(1, split)
restored(target)
# To be donated as any other state: nothing is shared between the devices' copies.
state = Checkpointer(target).restore(likes["replicated"]).state.params
twice = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
for name, doubled in twice(state).items():
    for shard in doubled.addressable_shards:
        np.testing.assert_array_equal(shard.data, 2 * np.asarray(alone.params[name]))
