"""What a learned policy reads of each place: numbers near 1, each with its own flag.

What was not measured is 0 with the flag 0. Losses and worths are read in units of the
present loss, parameters in units of a blueprint's mean cost, so that they mean the same
in any model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from esper_jax.groups import Groups
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NUM_STAGES
from esper_jax.lifecycle.state import SeedState, coefficients
from esper_jax.policy.places import by_seed

__all__ = ["FEATURES", "SIGNALS", "Course", "Places", "features", "of_blueprints"]

_OF_SEEDS = (
    "age",
    "alpha",
    "health",
    "worth",
    "mean_worth",
    "gain",
    "gradient_ratio",
    "chunk_gradient",
    "error_rate",
    "cost",
)
_OF_MODEL = (
    "plateau",
    "budget_left",
    "budget_share",
    "run_done",
    "loss",
    "loss_change",
    "accuracy",
    "stability",
)
SIGNALS = ("stage", *_OF_SEEDS, *_OF_MODEL)
"""Names of what is read. All but ``stage``, which is one flag for each stage, are a
number and the flag that it was measured."""
FEATURES: dict[str, slice] = {
    "stage": slice(0, NUM_STAGES),
    **{
        name: slice(NUM_STAGES + 2 * i, NUM_STAGES + 2 * i + 2)
        for i, name in enumerate(SIGNALS[1:])
    },
}
"""Which columns each of `SIGNALS` is. Weights of 0 there make a policy blind to it."""


class Course(NamedTuple):
    """How a run goes, as a policy has followed it; each of shape ()."""

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    first_loss: Float[Array, ""]
    """The first finite one."""
    loss_mean: Float[Array, ""]
    """Running mean before this tick; NaN at the first."""
    stale: Int[Array, ""]
    """Ticks without a better loss."""
    done: Float[Array, ""]
    """Share of the run; NaN where its length is not known."""
    budget: Float[Array, ""]
    """Most parameters that living seeds may have; infinity for no limit."""


class Places(NamedTuple):
    """All places, one after the other: everything of shape (P,) but for ``price``."""

    stage: Int[Array, " P"]
    blueprint: Int[Array, " P"]
    lives: Bool[Array, " P"]
    price: Float[np.ndarray, "P N"]
    """Parameters of each blueprint on each place; infinity where there is none."""
    cost: Float[Array, " P"]
    """Parameters of a living seed; 0 of any other."""
    unit: float
    """Mean price."""

    @classmethod
    def of(
        cls,
        groups: Groups,
        seeds: Mapping[str, SeedState],
        costs: Mapping[str, Int[np.ndarray, "N S"]],
    ) -> "Places":
        """The places of all layers, in their order.

        Args:
          groups: of the layers.
          seeds: by group, stacked.
          costs: parameters of each blueprint on each chunk, by group.
        """
        most = max(len(cost) for cost in costs.values())
        of = groups.names()
        price = np.concatenate([_padded(costs[of[n]], most) for n in groups.order])
        kind = groups.flat({n: s.blueprint for n, s in seeds.items()})
        kind = jnp.clip(kind.astype(jnp.int32), 0, most - 1)
        lives = groups.flat({n: s.slot_of_seed >= 0 for n, s in seeds.items()})
        own = jnp.asarray(price, jnp.float32)[np.arange(len(price)), kind]
        return cls(
            stage=groups.flat({n: s.stage for n, s in seeds.items()}),
            blueprint=kind,
            lives=lives,
            price=price,
            cost=jnp.where(lives, own, 0.0),
            unit=max(1.0, float(price[np.isfinite(price)].mean())),
        )


def _padded(costs: Int[np.ndarray, "N S"], most: int) -> Float[np.ndarray, "S M"]:
    return np.pad(
        costs.T.astype(float),
        ((0, 0), (0, most - len(costs))),
        constant_values=np.inf,
    )


def features(
    groups: Groups,
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    places: Places,
    course: Course,
) -> Float[Array, "P F"]:
    """What is read of each place, all finite.

    Args:
      groups: of the layers.
      seeds: by group, stacked.
      signals: of this tick, the same.
      places: of all layers.
      course: of the run.
    """

    def of_seeds(read: Any) -> Float[Array, " P"]:
        return groups.flat({n: read(n).astype(jnp.float32) for n in seeds})

    def signal(name: str) -> Float[Array, " P"]:
        return of_seeds(lambda n: by_seed(getattr(signals[n], name), seeds[n]))

    scale = jnp.maximum(jnp.abs(course.loss), 1e-6)
    gradient = signal("chunk_gradient")
    usual = jnp.nanmean(jnp.where(jnp.isfinite(gradient), gradient, jnp.nan))
    left = course.budget - jnp.sum(places.cost)
    numbers = {
        "age": jnp.log1p(of_seeds(lambda n: seeds[n].epochs_in_stage)) / 3,
        "alpha": of_seeds(lambda n: coefficients(seeds[n])[0]),
        "health": of_seeds(lambda n: seeds[n].health),
        "worth": _compressed(30 * signal("worth") / scale),
        "mean_worth": _compressed(30 * signal("mean_worth") / scale),
        "gain": _compressed(30 * signal("gain") / scale),
        "gradient_ratio": _log(signal("gradient_ratio")),
        "chunk_gradient": _log(gradient / usual),
        "error_rate": signal("error_rate"),
        "cost": jnp.where(places.lives, _log(places.cost / places.unit), jnp.nan),
        "plateau": jnp.log1p(course.stale.astype(jnp.float32)) / 2,
        # What is infinite is not measured: there is no budget.
        "budget_left": _compressed(left / places.unit),
        "budget_share": left / jnp.where(course.budget > 0, course.budget, jnp.nan),
        "run_done": course.done,
        "loss": _log(course.loss / course.first_loss),
        "loss_change": 10 * _log(course.loss / course.loss_mean),
        "accuracy": course.accuracy,
        "stability": signal("stability"),
    }
    stages = [(places.stage == s).astype(jnp.float32) for s in range(NUM_STAGES)]
    pairs = [_flagged(numbers[name], places.stage.shape) for name in SIGNALS[1:]]
    return jnp.stack([*stages, *(x for pair in pairs for x in pair)], axis=1)


def of_blueprints(
    places: Places, mean_worth: Float[Array, " P"], scale: Float[Array, ""]
) -> Float[Array, "P N 4"]:
    """What is read of each blueprint on each place, all finite.

    Its price; what its living seeds are worth in the mean, and whether any is; and its
    share of the living seeds.

    Args:
      places: of all layers.
      mean_worth: of each place's seed; NaN where it was not measured.
      scale: the present loss.
    """
    kinds = np.arange(places.price.shape[1])
    mine = places.lives[:, None] & (places.blueprint[:, None] == kinds[None])
    known = mine & jnp.isfinite(mean_worth)[:, None]
    count = jnp.sum(known, axis=0)
    worth = jnp.sum(jnp.where(known, mean_worth[:, None], 0.0), axis=0)
    counted = jnp.maximum(count, 1).astype(worth.dtype)
    worth = worth / counted / jnp.maximum(jnp.abs(scale), 1e-6)
    worth, measured = _flagged(_compressed(30 * worth), count.shape)
    seen = (count > 0).astype(jnp.float32) * measured
    share = jnp.mean(mine.astype(jnp.float32), axis=0)
    price = np.where(np.isfinite(places.price), places.price, places.unit)
    price = np.clip(np.log(np.maximum(price, 1) / places.unit), -_MOST, _MOST)
    common = jnp.stack([worth * seen, seen, share], axis=-1)
    common = jnp.broadcast_to(common, (*price.shape, 3))
    first = jnp.asarray(price, jnp.float32)[..., None]
    return jnp.concatenate([first, common], axis=-1)


_MOST = 4.0
"""Largest number that is read."""


def _flagged(x: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A number within limits, 0 where it was not measured, and whether it was."""
    x = jnp.broadcast_to(x, shape)
    known = jnp.isfinite(x)
    return jnp.clip(jnp.where(known, x, 0.0), -_MOST, _MOST), known.astype(jnp.float32)


def _compressed(x: Array) -> Array:
    """``log(1 + |x|)`` with the sign of ``x``."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def _log(x: Array) -> Array:
    """A logarithm of what is not below 0; NaN where it was not measured."""
    return jnp.log(jnp.maximum(x, 1e-6))
