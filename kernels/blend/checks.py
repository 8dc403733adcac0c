"""What blend refuses, whatever the backend."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from esper_jax.blueprints import Adapter, Bank, Custom, init_bank
from esper_jax.kernels.blend import sharded
from esper_jax.kernels.blend.static import Slots, Static
from esper_jax.lifecycle.stages import Incubation

__all__ = [
    "check_arguments",
    "check_bias",
    "check_input",
    "check_statistics_rows",
    "check_whole_layer",
]

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_statistics_rows(statistics_rows: Any) -> None:
    """Refuses a number of rows that statistics cannot be taken over.

    Raises:
      ValueError: if it is neither None nor an integer of at least 0.
    """
    if statistics_rows is None:
        return
    integer = isinstance(statistics_rows, (int, np.integer))
    if isinstance(statistics_rows, bool) or not integer or statistics_rows < 0:
        raise ValueError(
            f"statistics_rows must be an integer, at least 0, or None for all rows; "
            f"got {statistics_rows!r}"
        )


def check_arguments(
    s: Static, read: tuple[Array, Any], bank: Bank, slots: Slots
) -> None:
    """Refuses arguments of `blend` that do not fit each other.

    Args:
      s: what is fixed while tracing.
      read: ``y`` and ``x``.
      bank: parameters of the blueprints.
      slots: coefficients, kinds and owners.

    Raises:
      ValueError: if a shape or dtype does not fit the layout, or an option is unknown.
    """
    y, x = read
    if y.ndim < 1 or y.shape[-1] != s.layout.features:
        raise ValueError(
            f"y must have {s.layout.features} features on its last axis, as the layout "
            f"says; got shape {y.shape}"
        )
    if s.dtype not in _DTYPES:
        raise ValueError(f"y must be one of {', '.join(_DTYPES)}; got {y.dtype}")
    _check_slots(slots)
    check_input(s, y, x)
    _check_bank(s, bank, slots.seed_of_slot.shape[0])
    if s.incubation not in get_args(Incubation):
        raise ValueError(
            f"incubation must be one of {get_args(Incubation)}, got {s.incubation!r}"
        )
    check_statistics_rows(s.statistics_rows)


def check_bias(s: Static, bias: Any) -> None:
    """Refuses a bias that does not belong to ``y``.

    Raises:
      ValueError: if its shape does not fit the layout, or it is not floating point.
    """
    if bias is None:
        return
    features = s.layout.features
    if bias.shape != (features,) or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"bias must be floating point of shape ({features},), one entry a feature, "
            f"or None; got {bias.dtype} of shape {bias.shape}"
        )


def _check_slots(slots: Slots) -> None:
    shape = slots.seed_of_slot.shape
    if len(shape) != 1:
        raise ValueError(f"seed_of_slot must have shape (K,), got {shape}")
    for name, kind in (
        ("alpha", jnp.floating),
        ("beta", jnp.floating),
        ("blueprint", jnp.integer),
        ("seed_of_slot", jnp.integer),
    ):
        value = getattr(slots, name)
        if value.shape != shape or not jnp.issubdtype(value.dtype, kind):
            raise ValueError(
                f"{name} must be {kind.__name__} of shape {shape}, one entry a slot; "
                f"got {value.dtype} of shape {value.shape}"
            )


def check_input(s: Static, y: Array, x: Any) -> None:
    """Refuses an input of the layer that the blueprints cannot read.

    Raises:
      ValueError: if ``x`` is missing, has another width, or no row for each of ``y``.
    """
    rows = y.shape[:-1]
    for b in s.blueprints:
        if not isinstance(b, Adapter) or b.reads == "layer":
            continue
        if x is None:
            raise ValueError(
                f"x must be given: blueprint {b.name!r} reads the layer's input, of "
                f"shape {(*rows, b.inputs)}, or integer ids of shape {rows}"
            )
        if jnp.issubdtype(x.dtype, jnp.integer):
            fits = x.shape == rows
        else:
            fits = jnp.issubdtype(x.dtype, jnp.floating) and x.shape == (
                *rows,
                b.inputs,
            )
        if not fits:
            raise ValueError(
                f"x must be floating point of shape {(*rows, b.inputs)}, or integer "
                f"ids of shape {rows}, because blueprint {b.name!r} reads the layer's "
                f"input; got {x.dtype} of shape {x.shape}"
            )


def _check_bank(s: Static, bank: Bank, slots: int) -> None:
    expected = jax.eval_shape(
        lambda: init_bank(
            jax.random.key(0), slots, s.blueprints, s.width, s.layout.features
        )
    )
    want = jax.tree_util.tree_leaves_with_path(expected)
    paths = [path for path, _ in want]
    got_paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(bank)]
    if got_paths != paths:
        names = [jax.tree_util.keystr(path) for path in paths]
        raise ValueError(
            "bank must have the leaves that init_bank makes for these blueprints, "
            f"{names}; got {[jax.tree_util.keystr(path) for path in got_paths]}"
        )
    for (path, leaf), got in zip(want, jax.tree.leaves(bank), strict=True):
        name = "bank" + jax.tree_util.keystr(path)
        if got.shape != leaf.shape:
            raise ValueError(
                f"{name} must have shape {leaf.shape} for this number of slots, this "
                f"layout and these blueprints; got {got.shape}"
            )
        if not jnp.issubdtype(got.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {got.dtype}")


def check_whole_layer(s: Static, sharding: NamedSharding, ndim: int) -> None:
    """Refuses a blueprint that reads features which lie on other devices.

    Raises:
      ValueError: if a blueprint reads the whole layer, and the sharding of an array of
        ``ndim`` axes divides its features.
    """
    readers = [
        b.name for b in s.blueprints if isinstance(b, Custom) and b.reads == "layer"
    ]
    writers = [b.name for _, b in s.adapters]
    if writers and sharded.divides_features(sharding, ndim):
        raise ValueError(
            f"sharding: blueprint {writers[0]!r} writes the whole layer, whose "
            f"features {sharding.spec} divides among devices; divide the batch "
            "alone, choose blueprints that write their chunk, or leave sharding out"
        )
    if readers and sharded.divides_features(sharding, ndim):
        raise ValueError(
            f"sharding: blueprint {readers[0]!r} reads the whole layer, whose "
            f"features {sharding.spec} divides among devices; divide the batch "
            "alone, or choose blueprints that read their chunk"
        )
