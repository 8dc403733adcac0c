"""What is found where today's programs run beside those of a baseline."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from esper_jax.rollout.baseline.timing import Ratio

__all__ = ["Comparison", "Figures", "Part", "judged"]

_VERSION = 1
"""Of `Comparison.to_dict`."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures of one program.

    Args:
      median: seconds of a call.
      p95: the same that 95% of calls do not exceed.
      p99: the same for 99%.
      clock: ``device`` or ``wall``; see `timing.Times`.
      compile_seconds: that XLA took, without any cache.
      memory: bytes that the compiled program needs at once.
    """

    median: float
    p95: float
    p99: float
    clock: str
    compile_seconds: float
    memory: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that is judged.

    Args:
      name: ``step``, ``tick``, ``step memory`` or ``tick memory``.
      baseline: seconds or bytes of the baseline, measured now.
      now: of today's program.
      ratio: of now over the baseline, with its interval.
      verdict: ``regression``, ``within tolerance``, ``better`` or ``not decided``.
    """

    name: str
    baseline: float
    now: float
    ratio: Ratio
    verdict: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Today's programs beside those of a baseline.

    Args:
      tolerance: by which today's may be worse.
      parts: what is judged.
      same: whether the programs are the same to the letter, by name.
      baseline: figures of the saved programs, measured now, by name.
      now: figures of today's.
      changes: keys of the config that differ, with both values.
      unlike: settings that differ from when the baseline was saved; both values.
    """

    tolerance: float
    parts: tuple[Part, ...]
    same: Mapping[str, bool]
    baseline: Mapping[str, Figures]
    now: Mapping[str, Figures]
    changes: Mapping[str, tuple[Any, Any]]
    unlike: Mapping[str, tuple[str, str]]

    @property
    def regressed(self) -> bool:
        """Whether something is worse by more than the tolerance, beyond doubt."""
        return any(part.verdict == "regression" for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        table = dataclasses.asdict(self)
        for part in table["parts"]:
            ratio = Ratio(*part["ratio"])
            part["ratio"] = ratio.value
            ends = (ratio.low, ratio.high)
            part["interval"] = [x if math.isfinite(x) else None for x in ends]
        return {"version": _VERSION, "regressed": self.regressed, **table}


def judged(
    name: str, old: float, new: float, ratio: Ratio, tolerance: float, same: bool
) -> Part:
    """A part with its verdict.

    Args:
      name: of the part.
      old: figure of the baseline.
      new: of today.
      ratio: of both, with its interval.
      tolerance: see `compare`.
      same: whether the program is the same to the letter, so that it cannot be worse.
    """
    most = 1 + tolerance
    if same:
        verdict = "within tolerance"
    elif ratio.low > most:
        verdict = "regression"
    elif ratio.high < 1 / most:
        verdict = "better"
    elif ratio.high <= most:
        verdict = "within tolerance"
    else:
        verdict = "not decided"
    return Part(name, old, new, ratio, verdict)
