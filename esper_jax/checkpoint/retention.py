"""Rules for which checkpoints to keep."""

import dataclasses
import math
from collections.abc import Collection, Mapping

__all__ = ["Retention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Keeps a step if any of these rules keeps it.

    Args:
      keep_last: keep this many of the newest steps; None keeps all.
      best: ``(metric, "min" or "max")``: keep the step with the best value of a metric,
        the newest of equals. NaN, infinity and steps without the metric never win.
      every: keep steps whose number is a multiple of this.
      pinned: steps to keep always.

    Raises:
      ValueError: if a number is out of its range or ``best`` is of another form.
    """

    keep_last: int | None = 5
    best: tuple[str, str] | None = None
    every: int | None = None
    pinned: Collection[int] = ()

    def __post_init__(self) -> None:
        for name in ("keep_last", "every"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        if self.best is not None and (
            len(self.best) != 2 or self.best[1] not in ("min", "max")
        ):
            raise ValueError(
                f'best must be (metric, "min") or (metric, "max"), got {self.best!r}'
            )
        object.__setattr__(self, "pinned", frozenset(self.pinned))

    def keeps(self, steps: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps to keep, given the metrics of each sound step."""
        newest = sorted(steps, reverse=True)
        kept = set(newest if self.keep_last is None else newest[: self.keep_last])
        kept |= {step for step in steps if step in self.pinned}
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        if self.best is not None:
            metric, mode = self.best
            sign = 1 if mode == "max" else -1
            ranked = [
                (sign * metrics[metric], step)
                for step, metrics in steps.items()
                if math.isfinite(metrics.get(metric, math.nan))
            ]
            kept |= {step for _, step in sorted(ranked)[-1:]}
        return kept
