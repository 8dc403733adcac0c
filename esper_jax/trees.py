"""Functions of a whole state: hash it, copy it, find its keys, hide its NaNs."""

import hashlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_bits", "copy_state", "from_bits", "is_key", "state_hash"]

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


def as_bits(x: Any) -> Any:
    """Floats as unsigned integers of the same bits; anything else as it is.

    NaN stands for what was not measured. As integers such arrays pass through a user's
    jitted functions under ``jax_debug_nans``, which looks at all floats.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return _cast(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))


def from_bits(x: Any, dtype: Any) -> Any:
    """Inverse of `as_bits`. Takes shapes, and what is of ``dtype`` already, as well."""
    return x if x.dtype == dtype else _cast(x, np.dtype(dtype))


def _cast(x: Any, dtype: np.dtype) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype)
    if isinstance(x, np.ndarray):
        return x.view(dtype)
    with jax.debug_nans(False):
        return jax.lax.bitcast_convert_type(x, dtype)


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
