"""Curves that fit into a line of text, however long a run is."""

import itertools
import math

__all__ = ["BLOCKS", "PLAIN", "Curve"]

BLOCKS = "▁▂▃▄▅▆▇█!"
"""Levels from the lowest to the highest, and what is not finite."""

PLAIN = "_.-=+*#@!"
"""The same in ASCII."""


class Curve:
    """The course of a number, in bounded memory.

    Each point is the mean of as many values as are needed for the whole course to fit.

    Args:
      room: points to keep, at most; even.
    """

    def __init__(self, room: int = 256) -> None:
        self._room = room
        self._points: list[float] = []
        self._each = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Adds a value; one that is not finite makes its point so."""
        self._open.append(float(value))
        if len(self._open) < self._each:
            return
        self._points.append(_mean(self._open))
        self._open = []
        if len(self._points) == self._room:
            self._points = _merged(self._points, self._room // 2)
            self._each *= 2

    def line(self, width: int, marks: str = BLOCKS) -> str:
        """The course from left to right, scaled from its lowest to its highest value.

        Args:
          width: characters, at most.
          marks: levels from low to high, and last what is not finite.
        """
        points = [*self._points, *([_mean(self._open)] if self._open else [])]
        points = _merged(points, width)
        finite = [p for p in points if math.isfinite(p)]
        low, high = min(finite, default=0.0), max(finite, default=0.0)
        levels, wrong = marks[:-1], marks[-1]
        span = high - low

        def level(value: float) -> int:
            if not 0 < span < math.inf:
                return 0
            return round((value - low) / span * (len(levels) - 1))

        return "".join(levels[level(p)] if math.isfinite(p) else wrong for p in points)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _merged(points: list[float], most: int) -> list[float]:
    """Means of neighbours, so that there are no more than ``most`` points."""
    count = len(points)
    if count <= most:
        return points
    ends = [count * i // most for i in range(most + 1)]
    return [_mean(points[a:b]) for a, b in itertools.pairwise(ends)]
