"""Block sizes of the blend kernels: a tuned table, and a rule where it has no entry."""

import dataclasses
from typing import Any

__all__ = ["TUNED", "Blocks", "Config", "choose", "power_of_two"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one kernel cuts its work.

    Args:
      rows: rows of a tile, a power of two; at least 16 where the tile enters a dot.
      span: rows that a program walks over, a multiple of ``rows``.
      across: columns of a tile of statistics, hidden units of a tile of a blueprint,
        or slots of a tile of narrow chunks; a power of two.
      warps: warps of a program.
      stages: depth of software pipelining.
    """

    rows: int
    span: int
    across: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "across", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.span < 1 or self.span % self.rows:
            raise ValueError(
                f"span must be a multiple of rows ({self.rows}), got {self.span}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Blocks of each kernel.

    Args:
      narrow: whether slots share tiles and a chunk's features are looped over, rather
        than multiplied as matrices.
      forward: of the forward kernel.
      backward: of the kernel of the parameters' gradients.
      input: of the kernel of the input's gradient, which runs by itself where one tile
        of ``backward`` does not hold all hidden units.
      statistics: of the kernel of the dormant chunks' statistics.
    """

    narrow: bool
    forward: Blocks
    backward: Blocks
    input: Blocks
    statistics: Blocks


TUNED: dict[tuple[str, str, int, int], dict[str, Any]] = {}
"""Measured blocks, by device kind, dtype, chunk width and hidden width: the fields of
`Config` that differ from the rule's. ``benchmarks/blend.py --tune`` finds them."""

_MAX_PARTS = 64
"""Row blocks of a launch: bounds the memory of partial sums."""
_NARROW_WIDTH = 4
_NARROW_HIDDEN = 8


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def _span(total: int, rows: int, least: int, parts: int = _MAX_PARTS) -> int:
    """Rows a program walks over, so that there are at most ``parts`` programs."""
    span = max(least, -(-total // parts))
    return rows * -(-min(span, max(total, 1)) // rows)


def choose(
    rows: int,
    features: int,
    width: int,
    hidden: int,
    dtype: str,
    device: str,
    statistics_rows: int | None = None,
) -> Config:
    """The blocks for a shape.

    Args:
      rows: ``N``, rows of the flattened batch.
      features: ``F``.
      width: ``C``, of the widest chunk.
      hidden: ``H``, of the widest blueprint.
      dtype: name of the dtype of ``y``.
      device: kind of the device, as JAX names it.
      statistics_rows: rows that statistics are taken over; all if None.

    Returns:
      The tuned blocks where there are some, cut to the batch, else the rule's.
    """
    narrow = width <= _NARROW_WIDTH and hidden <= _NARROW_HIDDEN
    config = _narrow(rows) if narrow else _matrix(rows, width, hidden, dtype)
    columns = min(512, max(16, power_of_two(features)))
    sampled = rows if statistics_rows is None else max(1, min(rows, statistics_rows))
    tile = min(8, power_of_two(sampled))
    config = dataclasses.replace(
        config,
        statistics=Blocks(
            rows=tile, span=_span(sampled, tile, 4 * tile), across=columns, warps=4
        ),
    )
    tuned = TUNED.get((device, dtype, width, hidden), {})
    return dataclasses.replace(config, **tuned)


def _narrow(rows: int) -> Config:
    tile = min(8, power_of_two(rows))
    one = min(2, power_of_two(rows))
    forward = Blocks(rows=tile, span=_span(rows, tile, 32), across=128, warps=4)
    backward = Blocks(rows=one, span=_span(rows, one, 64), across=128, warps=8)
    return Config(
        narrow=True,
        forward=forward,
        backward=backward,
        input=forward,
        statistics=forward,
    )


def _matrix(rows: int, width: int, hidden: int, dtype: str) -> Config:
    columns = max(16, power_of_two(width))
    units = max(16, power_of_two(hidden))
    least = max(16, power_of_two(rows))
    wide = columns >= 128 or dtype == "float32"
    warps = 8 if columns * min(units, 128) >= 8192 else 4
    tile = min(64 if not wide else 32, least)
    if columns >= 256:
        tile = min(tile, 32 if dtype != "float32" else 16)
    in_registers = 8192 if dtype != "float32" else 4096
    forward = Blocks(
        rows=tile,
        span=_span(rows, tile, 128),
        across=min(units, max(16, in_registers // columns), 128),
        warps=warps,
    )
    # Two sums as large as the weights stay in registers; taller tiles would spill.
    short = min(tile, 32)
    backward = Blocks(
        rows=short,
        # Partial sums of all the weights leave each program: few programs, long walks.
        span=_span(rows, short, 512, parts=16),
        across=min(units, max(16, in_registers // columns)),
        warps=warps,
    )
    return Config(
        narrow=False,
        forward=forward,
        backward=backward,
        input=forward,
        statistics=forward,
    )
