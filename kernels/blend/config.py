"""Block sizes of the blend kernels: a tuned table, and a rule where it has no entry."""

import dataclasses
from typing import Any

__all__ = ["TUNED", "Blocks", "Config", "choose", "power_of_two"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one kernel cuts its work.

    Args:
      rows: rows of a tile, a power of two; at least 16 where the tile enters a dot.
      across: columns of a tile of statistics, hidden units of a tile of a blueprint,
        or slots of a tile of narrow chunks; a power of two.
      programs: how many programs share the work, about as many as the device holds at
        once: more where there are more slots or tiles of columns than that.
      warps: warps of a program.
      stages: depth of software pipelining.
    """

    rows: int
    across: int
    programs: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "across", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        for name in ("programs", "stages"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def cut(self, rows: int, least: int) -> "Blocks":
        """The same for a batch of ``rows``, with tiles no taller than it needs."""
        return dataclasses.replace(
            self, rows=min(self.rows, max(least, power_of_two(rows)))
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
      packed: whether the device has an instruction for tanh in bfloat16, as of compute
        capability 9.0.
    """

    narrow: bool
    forward: Blocks
    backward: Blocks
    input: Blocks
    statistics: Blocks
    packed: bool = False


_H100 = "NVIDIA H100 80GB HBM3"

TUNED: dict[tuple[str, str, int, int], dict[str, Blocks]] = {
    (_H100, "bfloat16", 64, 128): {
        "forward": Blocks(rows=64, across=128, programs=264, warps=4, stages=4),
        "backward": Blocks(rows=32, across=128, programs=132, warps=8, stages=4),
    },
    (_H100, "bfloat16", 128, 256): {
        "forward": Blocks(rows=64, across=64, programs=264, warps=4, stages=3),
        "backward": Blocks(rows=64, across=32, programs=264, warps=4, stages=3),
        "input": Blocks(rows=128, across=64, programs=264, warps=8, stages=3),
    },
}
"""Measured blocks, by device kind, dtype, chunk width and hidden width: the fields of
`Config` that differ from the rule's. ``benchmarks/blend.py --tune`` finds them."""

_PACKED = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")
"""How the names of devices begin on which two activations an instruction are taken."""

_NARROW_WIDTH = 4
_NARROW_HIDDEN = 8


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


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
      statistics_rows: rows that statistics are taken over, at most; all if None.

    Returns:
      The tuned blocks where there are some, else the rule's; cut to the batch.
    """
    narrow = width <= _NARROW_WIDTH and hidden <= _NARROW_HIDDEN
    config = _narrow() if narrow else _matrix(width, hidden, dtype)
    tuned: dict[str, Any] = dict(TUNED.get((device, dtype, width, hidden), {}))
    config = dataclasses.replace(config, **tuned)
    least = 1 if narrow else 16
    sampled = rows if statistics_rows is None else min(rows, statistics_rows)
    return Config(
        narrow=narrow,
        forward=config.forward.cut(rows, least),
        backward=config.backward.cut(rows, least),
        input=config.input.cut(rows, least),
        statistics=dataclasses.replace(
            config.statistics.cut(sampled, 1),
            across=min(config.statistics.across, max(16, power_of_two(features))),
        ),
        packed=device.startswith(_PACKED),
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
        # Two sums as large as the weights stay in registers; taller tiles would spill.
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
