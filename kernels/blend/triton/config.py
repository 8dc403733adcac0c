"""Chooses block sizes: the tuned ones, or by a rule where there are none."""

import dataclasses
from typing import Any

from esper_jax.kernels.blend.static import Static
from esper_jax.kernels.blend.triton.blocks import Blocks, Config, power_of_two
from esper_jax.kernels.blend.triton.tuned import PACKED, TUNED

__all__ = ["choose"]

_NARROW_WIDTH = 4
_NARROW_HIDDEN = 8


def choose(s: Static, rows: int, device: str) -> Config:
    """The block sizes of a call: tuned ones if there are any, else the rule's.

    Args:
      s: what is fixed while tracing.
      rows: ``N``, rows of the flattened batch. No tile is taller than it needs.
      device: kind of the device, as JAX names it.
    """
    narrow = s.width <= _NARROW_WIDTH and s.hidden <= _NARROW_HIDDEN
    config = _narrow() if narrow else _matrix(s.width, s.hidden, s.dtype)
    key = (device, s.dtype, s.width, s.hidden)
    tuned: dict[str, Any] = dict(TUNED.get(key, {}))
    config = dataclasses.replace(config, **tuned)
    least = 1 if narrow else 16
    sampled = rows
    if s.statistics_rows is not None:
        sampled = min(rows, s.statistics_rows)
    across = max(16, power_of_two(s.layout.features))
    return Config(
        narrow=narrow,
        forward=config.forward.cut(rows, least),
        backward=config.backward.cut(rows, least),
        input=config.input.cut(rows, least),
        statistics=dataclasses.replace(
            config.statistics.cut(sampled, 1),
            across=min(config.statistics.across, across),
        ),
        packed=device.startswith(PACKED),
    )


_STATISTICS = Blocks(rows=4, across=512, programs=264, warps=4)


def _narrow() -> Config:
    forward = Blocks(rows=8, across=32, programs=1024, warps=1)
    backward = Blocks(rows=2, across=128, programs=512, warps=8)
    return Config(
        narrow=True,
        forward=forward,
        backward=backward,
        input=forward,
        statistics=_STATISTICS,
    )


def _matrix(width: int, hidden: int, dtype: str) -> Config:
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
        narrow=False,
        forward=forward,
        backward=backward,
        input=forward,
        statistics=_STATISTICS,
    )
