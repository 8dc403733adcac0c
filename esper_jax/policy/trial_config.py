"""Numbers of a trial, and the ages and gates that it is used with."""

import dataclasses
import math
import numbers
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from esper_jax.lifecycle.grafting import GraftConfig
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage

__all__ = ["TrialConfig", "check_gates", "trial_lives"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Numbers of a trial; hashable unless the budget is an array.

    Args:
      judge: what decides which parts are kept. ``"worth"``: the loss without each,
        after ``ticks``. ``"gradient"``: of newborns with ``start="gradient"``, the
        squared norm of the gradient of the layer's kernel, divided by how many parts
        the layer has with it. ``"random"``: nothing, of newborns; for comparison.
      ticks: how long parts count and learn together before they are judged by worth,
        or before those that are judged already settle.
      budget: most parameters that are kept; -1 for no limit. An integer scalar array
        may be traced, so that one program serves several budgets.
      rent: what ``judge`` measures that a part must have for each of its parameters to
        be kept; for worth, in units of the held-out loss. What offers nothing, or
        less, is not kept either; with minus infinity, the best are, whatever they
        offer, as far as the budget goes. The gates of `trial_lives` still remove what
        is worth less than 0 then; ``trial_lives(cull_delta=-math.inf,
        min_improvement=-math.inf)`` does not.
      blueprint: index of the blueprint that is tried.
      share: of the places that are tried, drawn at random; above 0, at most 1.

    Raises:
      ValueError: naming the field that is out of its range.
    """

    judge: Literal["worth", "gradient", "random"] = "worth"
    ticks: int = 8
    budget: int | Int[Array, ""] = -1
    rent: float = 0.0
    blueprint: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        judges = get_args(type(self).__annotations__["judge"])
        if self.judge not in judges:
            raise ValueError(f"judge must be one of {judges}, got {self.judge!r}")
        for name, least in (("ticks", 1), ("budget", -1), ("blueprint", 0)):
            value = getattr(self, name)
            if name == "budget" and _is_whole_array(value):
                continue
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not whole or not least <= value < 2**31:
                raise ValueError(
                    f"{name} must be an int from {least} to {2**31 - 1}, got {value!r}"
                )
            object.__setattr__(self, name, int(value))
        for name in ("rent", "share"):
            if not isinstance(value := getattr(self, name), numbers.Real):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not (0 <= self.rent < math.inf or self.rent == -math.inf):
            raise ValueError(
                "rent must be finite and at least 0, or minus infinity; got "
                f"{self.rent!r}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share!r}")


def _is_whole_array(value: Any) -> bool:
    """Whether it is an integer scalar of JAX's, perhaps traced."""
    return (
        isinstance(value, jax.Array)
        and not value.shape
        and jnp.issubdtype(value.dtype, jnp.integer)
    )


def trial_lives(*, tuning: int = 100, **fields: Any) -> LifecycleConfig:
    """Ages and gates that leave the judging to a trial.

    Parts count in full from the start, and no gate asks for more than a worth that is
    not below 0: what is worth less is culled, and nothing waits in EVALUATING, where
    it would not learn.

    Args:
      tuning: ticks for which what is kept learns on before it becomes a fossil.
      **fields: of `LifecycleConfig`, to be other than that.
    """
    ages = [0] * len(Stage)
    ages[Stage.FINE_TUNING] = tuning
    lenient = {
        "min_epochs": tuple(ages),
        "reconstruction_threshold": math.inf,
        "min_worth": -math.inf,
        "min_stability": -math.inf,
        "min_final_stability": -math.inf,
        "cull_delta": 0.0,
        "min_improvement": 0.0,
        "worth_window": 1,
        "grafting": GraftConfig(ramp_duration=1, min_alpha=1.0),
    }
    return LifecycleConfig(**{**lenient, **fields})


def check_gates(gates: LifecycleConfig) -> None:
    """Refuses gates that were left as they are: parts would not count in any trial.

    Raises:
      ValueError: saying which to give.
    """
    usual, threshold = LifecycleConfig(), gates.reconstruction_threshold
    as_usual = (
        isinstance(threshold, float) and threshold == usual.reconstruction_threshold
    )
    if as_usual and gates.min_epochs == usual.min_epochs:
        raise ValueError(
            "policy: a trial needs gates that let parts through at once, and has the "
            "defaults, made for long incubation. Give "
            "lifecycle_config=policy.trial_lives()"
        )
