"""Copies a state into arrays in the host's memory, by name, and back onto devices.

The name of a leaf is its keys in the state's tree, of any kind, joined by slashes:
``params/layers/0/base/kernel``, ``seeds/layers/0/graft/alpha``.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.parallel.processes import exchange, together, whole
from esper_jax.trees import is_key

__all__ = [
    "HostLeaf",
    "LeafError",
    "check_equal_in_all",
    "flatten",
    "nest",
    "path_of",
    "place",
    "to_host",
]

_State = TypeVar("_State")


class LeafError(ValueError):
    """Leaves that cannot be saved or do not fit; the message names them."""


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """A leaf of the state in the host's memory."""

    keys: tuple[str, ...]
    """Its path in the state."""
    array: np.ndarray
    """The values; for random keys, their raw data."""
    key_impl: str | None = None
    """For random keys, the name of their generator."""

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
        keys = path_of(path)
        name = "/".join(keys)
        if name in flat:
            raise LeafError(
                f"two leaves of the state are named {name!r}: rename one of them"
            )
        flat[name] = keys, leaf
    return flat


def nest(leaves: Mapping[str, HostLeaf]) -> dict[str, Any]:
    """Nested dictionaries of `HostLeaf`, by their keys."""
    tree: dict[str, Any] = {}
    for leaf in leaves.values():
        *parents, last = leaf.keys or ("",)
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = leaf
    return tree


def to_host(state: Any) -> dict[str, HostLeaf]:
    """Copies all leaves; the state may be donated or changed afterwards.

    A `HostLeaf` in the state is taken as it is. If leaves are spread over several
    processes, all of them must call this (`processes.whole`).

    Raises:
      LeafError: if a leaf is not an array of numbers or random keys.
    """
    plain: dict[str, tuple[tuple[str, ...], Any, str | None]] = {}
    for name, (keys, leaf) in flatten(state).items():
        impl = None
        if is_key(leaf):
            impl, leaf = _impl(leaf), jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array):
            leaf = whole(leaf)
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


def check_equal_in_all(state: Any) -> None:
    """Checks that all processes hold the same state.

    Compares the structure, and the values of leaves that each process holds for itself.
    An array that JAX spreads over several processes is one array already.

    Raises:
      LeafError: in all processes, naming the first leaf that differs.
    """
    if jax.process_count() == 1:
        return
    own = together(
        lambda: {n: _mark(v) for n, (_, v) in flatten(state).items()}, LeafError
    )
    first, *others = map(json.loads, exchange(json.dumps(own)))
    for index, other in enumerate(others, start=1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise LeafError(
                    f"leaf {name} of process {index} is not as process 0 has it: "
                    f"expected {first.get(name, 'none')}, got "
                    f"{other.get(name, 'none')}. Give all processes the same value, or "
                    "one array over all of them"
                )


def _mark(leaf: Any) -> str:
    """Shape, dtype and, for a leaf that only this process holds, a checksum."""
    kind = _kind_of(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return f"{kind} over several processes"
    (host,) = to_host([leaf]).values()
    return f"{kind} with checksum {zlib.crc32(host.array.tobytes()):08x}"


def place(leaves: Mapping[str, HostLeaf], like: _State) -> _State:
    """The leaves in the structure of ``like``, each on the devices of its leaf there.

    Raises:
      LeafError: naming every leaf that is missing or unknown, or has another shape,
        dtype or kind of key.
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
    """Whether numpy may share the leaf's memory, which can be donated later."""
    if not isinstance(leaf, jax.Array):
        return True
    on_cpu = any(device.platform == "cpu" for device in leaf.devices())
    return on_cpu or leaf.sharding.memory_kind != "device"


def path_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path that JAX gives for a leaf, as text."""
    return tuple(map(_key, path))


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise LeafError(f"a state must be of dictionaries, tuples and dataclasses: {key!r}")


def _is_abstract_key(leaf: Any) -> bool:
    """Whether a leaf stands for random keys, by shape and dtype alone."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return False
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _impl(key: Any) -> str:
    """The name of the generator of keys, or of what stands for them."""
    found: list[str] = []

    def look(traced: Any) -> None:  # a shape alone has no generator, its trace has
        found.append(str(jax.random.key_impl(traced)))

    jax.eval_shape(look, key)
    return found[0]


def _kind(array: Any, impl: str | None) -> str:
    kind = f"{np.dtype(array.dtype)}{list(array.shape)}"
    return kind if impl is None else f"{impl} keys of data {kind}"


def _kind_of(leaf: Any) -> str:
    if is_key(leaf) or _is_abstract_key(leaf):
        return _kind(jax.eval_shape(jax.random.key_data, leaf), _impl(leaf))
    return _kind(leaf if hasattr(leaf, "dtype") else np.asarray(leaf), None)


def _placed(array: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray | np.generic):
        return array
    if isinstance(like, bool | int | float | complex):
        return type(like)(array[()])
    if is_key(like):
        data = _on_devices(array, jax.random.key_data(like))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    if _is_abstract_key(like):
        keys = jax.random.wrap_key_data(jnp.array(array), impl=_impl(like))
        sharding = _sharding(like)
        return keys if sharding is None else jax.device_put(keys, sharding)
    return _on_devices(array, like)


def _sharding(like: Any) -> Any:
    """Where a leaf is; None if it names no devices, as `jax.eval_shape` may not."""
    sharding = getattr(like, "sharding", None)
    abstract = isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)
    return None if abstract else sharding


def _on_devices(array: np.ndarray, like: Any) -> jax.Array:
    sharding = _sharding(like)
    # Like a fresh array: on the default device, uncommitted.
    if sharding is None or not getattr(like, "committed", True):
        return jnp.array(array)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])
