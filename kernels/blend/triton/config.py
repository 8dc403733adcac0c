"""Chooses block sizes: the tuned ones, or by a rule where there are none."""

import dataclasses
from typing import Any

from esper_jax.kernels.blend.static import Static
from esper_jax.kernels.blend.triton.blocks import Blocks, Config, power_of_two
from esper_jax.kernels.blend.triton.tuned import PACKED, TUNED

__all__ = ["choose", "of_groups"]

_NARROW_WIDTH = 4
_NARROW_HIDDEN = 8
_GROUP = {"float32": (32, 64)}
_GROUP_IN_HALF = (64, 128)
"""Columns and hidden units of a group at most: those of a chunk of 64 features."""


def choose(s: Static, rows: int, device: str) -> Config:
    """The block sizes of a call: tuned ones if there are any, else the rule's.

    Args:
      s: what is fixed while tracing.
      rows: ``N``, rows of the flattened batch. No tile is taller than it needs.
      device: kind of the device, as JAX names it.
    """
    narrow = s.width <= _NARROW_WIDTH and s.hidden <= _NARROW_HIDDEN
    return of_groups(s, rows, device) if narrow else _config(s, rows, device, 0)


def of_groups(s: Static, rows: int, device: str) -> Config:
    """As `choose`, for chunks that share tiles whatever their width.

    Raises:
      ValueError: if not even two of them fit a tile.
    """
    columns, units = _GROUP.get(s.dtype, _GROUP_IN_HALF)
    group = min(columns // s.width, units // s.hidden)
    if group < 2:
        raise ValueError(
            f"chunks of {s.width} features and {s.hidden} hidden units cannot share "
            f"tiles of {columns} and {units}"
        )
    # Tiles begin where many bytes can be read at once.
    group -= group % 8 if group > 8 else 0
    return _config(s, rows, device, min(group, s.layout.num_seeds))


def _config(s: Static, rows: int, device: str, group: int) -> Config:
    width, hidden = s.width * max(1, group), s.hidden * max(1, group)
    config = _rule(width, hidden, s.dtype)
    key = (device, s.dtype, width, hidden)
    tuned: dict[str, Any] = dict(TUNED.get(key, {}))
    config = dataclasses.replace(config, **tuned)
    sampled = rows
    if s.statistics_rows is not None:
        sampled = min(rows, s.statistics_rows)
    across = max(16, power_of_two(s.layout.features))
    return Config(
        group=group,
        forward=config.forward.cut(rows, 16),
        backward=config.backward.cut(rows, 16),
        input=config.input.cut(rows, 16),
        statistics=dataclasses.replace(
            config.statistics.cut(sampled, 1),
            across=min(config.statistics.across, across),
        ),
        packed=device.startswith(PACKED),
    )


_STATISTICS = Blocks(rows=4, across=512, programs=264, warps=4)


def _rule(width: int, hidden: int, dtype: str) -> Config:
    columns = max(16, power_of_two(width))
    units = max(16, power_of_two(hidden))
    wide = columns >= 128 or dtype == "float32"
    warps = 8 if columns * min(units, 128) >= 8192 else 4
    tile = 64 if not wide else 32
    if columns >= 256:
        tile = min(tile, 32 if dtype != "float32" else 16)
    in_registers = 8192 if dtype != "float32" else 4096
    forward = Blocks(
        rows=tile,
        across=min(units, max(16, in_registers // columns), 128),
        programs=264,
        warps=4 if tile == 64 else warps,
        stages=3,
    )
    backward = Blocks(
        # Two sums as large as the weights stay in registers: taller tiles would spill.
        rows=min(tile, 32),
        across=min(units, max(16, in_registers // columns)),
        programs=132,
        warps=warps,
        stages=3,
    )
    return Config(
        forward=forward,
        backward=backward,
        input=forward,
        statistics=_STATISTICS,
    )
