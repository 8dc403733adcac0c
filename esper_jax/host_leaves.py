"""A state as arrays in the host's memory by name, and back onto the devices.

A leaf's name is its keys in the state's tree, whatever their kind, joined by slashes:
``params/layers/0/base/kernel``, ``seeds/layers/0/graft/alpha``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.functional import is_key

__all__ = ["HostLeaf", "LeafError", "flatten", "nest", "place", "to_host"]

_State = TypeVar("_State")


class LeafError(ValueError):
    """Leaves that cannot be saved or do not fit; names them."""


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """A leaf of the state in the host's memory."""

    keys: tuple[str, ...]
    """Its path in the state."""
    array: np.ndarray
    """The values; the raw data where the leaf holds random keys."""
    key_impl: str | None = None
    """Name of the generator where the leaf holds random keys."""

    @property
    def kind(self) -> str:
        """Shape and dtype in words, as errors give them."""
        return _kind(self.array, self.key_impl)


def flatten(tree: Any) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Keys and value of every leaf by name, in the order of the tree.

    Raises:
      LeafError: if two leaves have one name.
    """
    flat: dict[str, tuple[tuple[str, ...], Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = tuple(map(_key, path))
        name = "/".join(keys)
        if name in flat:
            raise LeafError(
                f"two leaves of the state are named {name!r}: rename one of them"
            )
        flat[name] = keys, leaf
    return flat


def nest(leaves: Mapping[str, HostLeaf]) -> dict[str, Any]:
    """Plain dictionaries of `HostLeaf`, as their keys say."""
    tree: dict[str, Any] = {}
    for leaf in leaves.values():
        *parents, last = leaf.keys or ("",)
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = leaf
    return tree


def to_host(state: Any) -> dict[str, HostLeaf]:
    """Copies of all leaves; the state may be donated or changed afterwards.

    A `HostLeaf` in the state stays as it is.

    Raises:
      LeafError: if a leaf is not an array of numbers or random keys.
    """
    plain: dict[str, tuple[tuple[str, ...], Any, str | None]] = {}
    for name, (keys, leaf) in flatten(state).items():
        impl = None
        if is_key(leaf):
            impl, leaf = _impl(leaf), jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
        plain[name] = keys, leaf, impl
    host = {}
    for name, (keys, leaf, impl) in plain.items():
        if isinstance(leaf, HostLeaf):
            host[name] = leaf
            continue
        array = np.array(leaf, copy=True if _is_shared(leaf) else None)
        if array.dtype.hasobject or array.dtype.kind in "SUmM":
            raise LeafError(
                f"leaf {name}: expected an array of numbers, got {type(leaf).__name__}"
            )
        host[name] = HostLeaf(keys, array, impl)
    return host


def place(leaves: Mapping[str, HostLeaf], like: _State) -> _State:
    """The leaves in the structure of ``like``, each where its leaf is.

    Raises:
      LeafError: naming every leaf that is missing, too many, or of another shape, dtype
        or kind of key.
    """
    wanted = flatten(like)
    wrong = [
        f"{name}: expected nothing, found {leaf.kind}"
        for name, leaf in leaves.items()
        if name not in wanted
    ]
    for name, (_, target) in wanted.items():
        found = leaves[name].kind if name in leaves else "nothing"
        if found != _kind_of(target):
            wrong.append(f"{name}: expected {_kind_of(target)}, found {found}")
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise LeafError("; ".join(wrong[:10]) + more)
    placed = [_placed(leaves[name].array, leaf) for name, (_, leaf) in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def _is_shared(leaf: Any) -> bool:
    """Whether numpy may look into the leaf's own memory, which can be donated."""
    if not isinstance(leaf, jax.Array):
        return True
    on_cpu = any(device.platform == "cpu" for device in leaf.devices())
    return on_cpu or leaf.sharding.memory_kind != "device"


def _key(key: Any) -> str:
    """One key of a path in a tree."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise LeafError(f"a state must be of dictionaries, tuples and dataclasses: {key!r}")


def _impl(key: Any) -> str:
    return str(jax.random.key_impl(key))


def _kind(array: Any, impl: str | None) -> str:
    kind = f"{np.dtype(array.dtype)}{list(array.shape)}"
    return kind if impl is None else f"{impl} keys of data {kind}"


def _kind_of(leaf: Any) -> str:
    if is_key(leaf):
        return _kind(jax.eval_shape(jax.random.key_data, leaf), _impl(leaf))
    return _kind(leaf if hasattr(leaf, "dtype") else np.asarray(leaf), None)


def _placed(array: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray | np.generic):
        return array
    if isinstance(like, bool | int | float | complex):
        return type(like)(array[()])
    if is_key(like):
        data = _on_devices(array, jax.random.key_data(like).sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    return _on_devices(array, getattr(like, "sharding", None))


def _on_devices(array: np.ndarray, sharding: Any) -> jax.Array:
    # Left uncommitted on the default device, as fresh arrays are there.
    if sharding is None or sharding.device_set == jnp.zeros(()).devices():
        return jnp.array(array)
    return jax.device_put(array, sharding)
