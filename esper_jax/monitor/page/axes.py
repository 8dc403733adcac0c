"""Scales, axes and curves."""

import dataclasses
import math
from collections.abc import Sequence

from esper_jax.markup import number

__all__ = ["Scale", "across", "curve", "scale_of", "steps", "thinned"]

WIDTH, HEIGHT = 1000, 100
"""Of the inside of a panel, in its own units; the page stretches them."""

MOST_POINTS = 500
"""Pairs of points that a curve is drawn with."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Where values lie in a panel, from its bottom (0) to its top (1)."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies; what is outside lies on the edge."""
        low, high = self._moved(self.low), self._moved(self.high)
        if self.log and value <= 0:
            return 0.0
        return min(1.0, max(0.0, (self._moved(value) - low) / (high - low)))

    def marks(self) -> list[tuple[float, str]]:
        """Round values in its range, with their words."""
        if not self.log:
            return [(v, number(v)) for v in steps(self.low, self.high, 5)]
        first, last = math.floor(math.log10(self.low)), math.log10(self.high)
        few = last - first < 3
        every = max(1, math.ceil((last - first) / 5))
        values = [
            digit * 10.0**power
            for power in range(first, int(last // 1) + 1, every)
            for digit in ((1, 2, 5) if few else (1,))
        ]
        return [(v, number(v)) for v in values if self.low <= v <= self.high]

    def _moved(self, value: float) -> float:
        return math.log10(value) if self.log else value


def scale_of(values: Sequence[float]) -> Scale:
    """A scale for values; logarithmic where they spread over more than a hundredfold.

    Args:
      values: finite numbers; may be none.
    """
    if not values:
        return Scale(0.0, 1.0)
    low, high = min(values), max(values)
    if low > 0 and high > 100 * low:
        return Scale(low / 1.2, min(high, 1e307) * 1.2, log=True)
    room = (high / 20 - low / 20) or abs(high) / 10 or 1.0
    return Scale(max(low - room, -1e308), min(high + room, 1e308))


def steps(low: float, high: float, most: int) -> list[float]:
    """At most about ``most`` round numbers from ``low`` to ``high``."""
    rough = max(high / most - low / most, 1e-300)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next((f * unit for f in (1, 2, 5, 10) if f * unit >= rough), 10 * unit)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def across(tick: float, last: int) -> float:
    """Where a tick lies from the left (0) to the right (100), in percent."""
    return round(100 * min(max(tick, 0), last) / last, 3)


def thinned(
    points: Sequence[tuple[int, float | None]], most: int = MOST_POINTS
) -> list[tuple[int, float | None]]:
    """A curve with fewer points: of each part the lowest and the highest.

    Args:
      points: by tick; None where nothing finite was measured.
      most: number of parts.
    """
    if len(points) <= 2 * most:
        return list(points)
    size = -(-len(points) // most)
    kept: list[tuple[int, float | None]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        known = [p for p in part if p[1] is not None]
        chosen = known and [min(known, key=_value), max(known, key=_value)]
        gap = [p for p in part if p[1] is None][:1]
        kept += sorted({*chosen, *gap}, key=lambda p: p[0])
    return kept


def _value(point: tuple[int, float | None]) -> float:
    return point[1] if point[1] is not None else 0.0


def curve(
    points: Sequence[tuple[int, float | None]], scale: Scale, last: int, style: str
) -> str:
    """A curve as an SVG path, broken where nothing was measured."""
    words, pen = [], "M"
    for tick, value in thinned(points):
        if value is None:
            pen = "M"
            continue
        x, y = WIDTH * across(tick, last) / 100, HEIGHT * (1 - scale.place(value))
        words.append(f"{pen}{x:g} {y:.2f}")
        if pen == "M":
            words.append("h.01")  # a point on its own shows, too
        pen = "L"
    return f'<path class="{style}" d="{"".join(words)}"/>' if words else ""
