"""Rules for which checkpoints to keep."""

import dataclasses
import math
from collections.abc import Collection, Mapping

__all__ = ["Retention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Keeps a step if any of these rules keeps it.

    Args:
      keep_last: keep this many of the newest steps, those saved last; None keeps all.
        Also as many with the largest numbers: steps of a branch that was given up stay
        until the new branch overtakes them.
      best: ``(metric, "min" or "max")``: keep the step with the best value of a metric,
        the newest of equals. NaN, infinity and steps without the metric never win. A
        save whose metrics lack it is refused, unless it has none at all. As long as no
        step has it, none is removed.
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
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be at least 1 or None, got {value!r}")
        if self.best is not None and not (
            isinstance(self.best, tuple | list)
            and len(self.best) == 2
            and isinstance(self.best[0], str)
            and self.best[1] in ("min", "max")
        ):
            raise ValueError(
                f'best must be (metric, "min") or (metric, "max"), got {self.best!r}'
            )
        if not isinstance(self.pinned, Collection) or isinstance(self.pinned, str):
            raise ValueError(f"pinned must be a list of steps, got {self.pinned!r}")
        object.__setattr__(self, "pinned", frozenset(self.pinned))

    def keeps(self, steps: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps to keep, given the metrics of each sound step, oldest first."""
        kept = self.ranked(steps)
        kept |= {step for step in steps if step in self.pinned}
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        return kept

    def ranked(self, steps: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Those that are kept for being among the newest, or the best."""
        age = list(steps)
        kept = set(age)
        if self.keep_last is not None:
            kept = {*age[-self.keep_last :], *sorted(age)[-self.keep_last :]}
        if self.best is not None:
            metric, mode = self.best
            sign = 1 if mode == "max" else -1
            ranked = [
                (sign * metrics[metric], place)
                for place, metrics in enumerate(steps.values())
                if math.isfinite(metrics.get(metric, math.nan))
            ]
            kept |= {age[place] for _, place in sorted(ranked)[-1:]}
        return kept
