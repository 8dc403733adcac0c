"""Functions of a whole state: hash it, copy it, find its random keys."""

import hashlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["copy_state", "is_key", "state_hash"]

_State = TypeVar("_State")


def copy_state(state: _State) -> _State:
    """A copy that shares no arrays with ``state``: donating one keeps the other."""
    return _copy(state)


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def state_hash(state: Any) -> str:
    """SHA-256 over every leaf of the state: path, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if is_key(leaf):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
