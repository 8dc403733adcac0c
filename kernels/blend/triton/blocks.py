"""Block sizes of the Triton kernels, as data."""

import dataclasses

__all__ = ["Blocks", "Config", "power_of_two"]


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one kernel cuts its work.

    Args:
      rows: rows of a tile, a power of two; at least 16 where the tile enters a dot.
      across: a power of two: columns of a tile of statistics, hidden units of a tile of
        a blueprint. Nothing to narrow chunks, whose tiles hold a group.
      programs: number of programs that share the work, about as many as the device
        holds at once. A kernel launches more if there are more slots or tiles of
        columns.
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
        """The same blocks, with tiles no taller than a batch of ``rows`` needs."""
        return dataclasses.replace(
            self, rows=min(self.rows, max(least, power_of_two(rows)))
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Blocks of each kernel.

    Args:
      group: number of neighbouring slots that share a tile; 0 if each has its own.
      forward: forward kernel.
      backward: kernel of the parameters' gradients.
      input: kernel of the input's gradient. It runs by itself if one tile of
        ``backward`` does not hold all hidden units.
      statistics: kernel of the dormant chunks' statistics.
      packed: whether the device has an instruction for tanh in bfloat16, as from
        compute capability 9.0 on.
    """

    forward: Blocks
    backward: Blocks
    input: Blocks
    statistics: Blocks
    group: int = 0
    packed: bool = False

    @property
    def narrow(self) -> bool:
        """Whether slots share tiles."""
        return self.group > 0
