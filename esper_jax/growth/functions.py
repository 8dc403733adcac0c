"""Growth as pure functions of arrays by name.

`Growth` is their face for Flax NNX, `growth.dictionaries` the one for pure JAX and Flax
Linen. Names are those of `ModelParts`: ``layer/bed/seeds/steps``.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from esper_jax.blueprints import aims
from esper_jax.groups import flat_slots
from esper_jax.growth.births import births, born_in, collected_by, starting
from esper_jax.growth.measure import asked_for_worth
from esper_jax.growth.outside import Outside, outside_for
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.recipe import Recipe, check_measured, policy_for, what_is_read
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import Arrays, GrowthState
from esper_jax.growth.tick import Seen, advance
from esper_jax.growth.update import BankGradients, Learned, update_banks
from esper_jax.growth.watch import StepGradients, start_monitor, watch
from esper_jax.growth.worth import Measure, read_measured, worth_of
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState, slot_coefficients
from esper_jax.optim import PerSlot, per_slot
from esper_jax.policy.interface import Policy, PolicyFactory
from esper_jax.policy.memory import warn_of_fallback

__all__ = [
    "MEASURE_EVERY",
    "Remembered",
    "Sums",
    "check_loss",
    "check_untraced",
    "recipe_for",
    "start",
    "start_with",
    "tick",
    "update",
]

MEASURE_EVERY = 8
"""Default number of steps of which one measures the host's gradients."""


class Sums(NamedTuple):
    """Sums over the steps since the last tick, by group.

    They are in few arrays here and not in the layers' seeds, which take them over at
    the next tick.
    """

    calls: dict[str, Int[Array, " L"]]
    """Calls of each layer that ``update`` knows of."""
    gains: dict[str, Float[Array, "L K"]]
    """See `SeedState.gain`."""
    errors: dict[str, UInt[Array, "L K"]]
    """See `SeedState.errors`."""


class Remembered(NamedTuple):
    """What growth remembers beside the model, which holds seeds, banks and probes."""

    growth: GrowthState
    moments: dict[str, Any]
    """State of the bank's optimizer, by group: of its ``L * K`` slots."""
    sums: Sums


def recipe_for(
    parts: ModelParts,
    values: Arrays,
    optimizer: optax.GradientTransformation | PerSlot,
    gates: LifecycleConfig | None,
    policy: Policy | PolicyFactory,
    measuring: tuple[Collection[str] | None, int],
) -> Recipe:
    """What a model is grown by.

    Args:
      parts: the model.
      values: of its variables, by name.
      optimizer: for the banks.
      gates: minimum ages and gates; None for the defaults.
      policy: a policy, or what makes one.
      measuring: which costly signals are measured, None for those that are read, and at
        how many steps.

    Raises:
      TypeError, ValueError: as `Growth` says.
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, PerSlot | optax.GradientTransformation):
        raise TypeError(
            "optimizer must be an optax optimizer for the blueprints, or a PerSlot; "
            f"got {optimizer!r:.60}"
        )
    gates = gates or LifecycleConfig()
    chosen = policy_for(parts, gates, policy)
    read = what_is_read(chosen, parts.strategies(values))
    return Recipe(
        parts=parts,
        bank_optimizer=(
            optimizer if isinstance(optimizer, PerSlot) else per_slot(optimizer)
        ),
        gates=gates,
        policy=chosen,
        maker=None if isinstance(policy, Policy) else policy,
        measured=check_measured(*measuring, read),
        measure_every=measuring[1],
    )


@jax.debug_nans(False)  # NaN is what was not measured
def start(recipe: Recipe, values: Arrays, key: Key[Array, ""]) -> Remembered:
    """What growth remembers before the first step.

    Args:
      recipe: what the model is grown by.
      values: of its variables, by name.
      key: draws newborn blueprints and the policy's choices.
    """
    parts = recipe.parts
    params = {name: values[name] for name in parts.host_params()}
    policy, newborn = jax.random.split(key)
    state = GrowthState(
        step=jnp.zeros((), jnp.int32),
        ticks=jnp.zeros((), jnp.int32),
        rng=newborn,
        memory=recipe.policy.init(parts.shapes(), policy),
        monitor=start_monitor(recipe, params),
    )
    return start_with(recipe, values, state)


def start_with(recipe: Recipe, values: Arrays, growth: GrowthState) -> Remembered:
    """What growth remembers beside a given state, where no slot has learned yet.

    Args:
      recipe: what the model is grown by.
      values: of its variables, by name.
      growth: of these layers, with any number of slots.
    """
    parts = recipe.parts
    banks = parts.groups.join(parts.take_beds(values, "bank"))
    seeds = parts.groups.join(parts.take_beds(values, "seeds"))
    moments = {
        name: recipe.bank_optimizer.init(flat_slots(bank))
        for name, bank in banks.items()
    }
    sums = Sums(
        calls={key: jnp.zeros_like(s.steps) for key, s in seeds.items()},
        gains={key: jnp.zeros_like(s.gain) for key, s in seeds.items()},
        errors={key: jnp.zeros_like(s.errors) for key, s in seeds.items()},
    )
    return Remembered(growth, moments, sums)


def check_loss(loss: Any) -> None:
    """Refuses a training loss that is no single number.

    Raises:
      ValueError: naming its shape.
    """
    if loss is not None and jnp.shape(loss) != ():
        raise ValueError(
            f"loss must be a single number, got shape {jnp.shape(loss)}; take the mean "
            "over the rows"
        )


def check_untraced(call: str, what: str, values: Arrays) -> None:
    """Refuses what runs on the host while something is being traced.

    Raises:
      ValueError: naming the ``call``, and ``what`` the values are of.
    """
    if any(isinstance(value, jax.core.Tracer) for value in values.values()):
        raise ValueError(
            f"{call} must be called between steps, outside of jax.jit and nnx.jit, "
            f"since it runs on the host; got {what} being traced"
        )


@jax.debug_nans(False)
def update(
    recipe: Recipe,
    remembered: Remembered,
    values: Arrays,
    given: Arrays,
    loss: Float[Array, ""] | None,
) -> tuple[Remembered, Arrays]:
    """Lets the blueprints learn from one step's gradients.

    Args:
      recipe: what the model is grown by.
      remembered: before the step.
      values: of the model's variables after the forward pass.
      given: gradients of banks, probes, and of the host's parameters as far as known.
      loss: of the step, or None.

    Returns:
      What is remembered now, and the new values of the banks.
    """
    state, moments, sums = remembered
    parts = recipe.parts
    seeds = parts.take_beds(values, "seeds")
    banks, bank_grads = (parts.take_beds(x, "bank") for x in (values, given))
    calls = parts.groups.join({path: s.steps for path, s in seeds.items()})
    new_calls = {key: calls[key] - before for key, before in sums.calls.items()}
    learned = update_banks(
        recipe,
        seeds,
        Learned(banks, sums.gains, sums.errors, moments),
        BankGradients(bank_grads, parts.take_beds(given, "probe"), new_calls),
        step=state.step,
        value=jnp.float32(jnp.nan) if loss is None else loss,
    )
    host = {name: given[name] for name in parts.host_params() if name in given}
    monitor = watch(recipe, state.monitor, StepGradients(host, bank_grads, seeds), loss)
    state = dataclasses.replace(state, step=state.step + 1, monitor=monitor)
    sums = Sums(calls, learned.gains, learned.errors)
    new = Remembered(state, learned.moments, sums)
    return new, parts.put_beds("bank", learned.banks)


def tick(
    recipe: Recipe,
    remembered: Remembered,
    values: Arrays,
    measure: Measure,
    commands: Outside | Mapping[str, Commands] | None = None,
) -> tuple[Remembered, Arrays, TickReport]:
    """Measures, decides and carries out what was decided. Runs on the host.

    Groups are put together and taken apart on the host, too: on a device, that would
    compile for each layer.

    Args:
      recipe: what the model is grown by.
      remembered: after the steps since the last tick.
      values: of the model's variables.
      measure: called once; then for the seeds on probation, `worth.AT_ONCE` of them in
        one call where it can be vmapped, else one by one.
      commands: what is asked from outside, by layer, beside what the policy asks.

    Returns:
      What is remembered now, the values of the variables that changed, and the report
      as host arrays.

    Raises:
      TypeError, ValueError: if the commands do not fit the layers.
    """
    outside = None
    if commands is not None:
        seeds = {n: shape.num_seeds for n, shape in recipe.parts.shapes().items()}
        outside = outside_for(commands, seeds)
    checks: bool = jax.config.jax_debug_nans  # type: ignore[attr-defined]

    def measured(probes: Mapping[str, Any]) -> Any:
        with jax.debug_nans(checks):  # as the user asked for
            return measure(probes)

    with jax.debug_nans(False):
        return _tick(recipe, remembered, values, measured, outside)


def _tick(
    recipe: Recipe,
    remembered: Remembered,
    values: Arrays,
    measure: Measure,
    outside: Outside | None,
) -> tuple[Remembered, Arrays, TickReport]:
    parts, groups = recipe.parts, recipe.parts.groups
    loss, score = read_measured(measure({}))
    seeds, sums = jax.device_get((parts.take_beds(values, "seeds"), remembered.sums))
    before = {
        key: dataclasses.replace(s, gain=sums.gains[key], errors=sums.errors[key])
        for key, s in groups.join(seeds).items()
    }
    asked = groups.part(jax.device_get(_asked(recipe, before)))
    worth = worth_of(recipe, asked, measure, loss)
    seen = Seen(
        jnp.float32(loss),
        jnp.float32(score),
        groups.join(worth),
        jnp.ones((), bool),
        _what_was_collected(recipe, before, values),
    )
    drifts = parts.host_params() if recipe.wants("drift") else ()
    host = {name: values[name] for name in drifts}
    state, after, birth, report = _advance(
        recipe, remembered.growth, before, host, seen, outside
    )
    after, report = jax.device_get((after, report))
    warn_of_fallback(report.reason, report.tick)
    new, moments = parts.put_beds("seeds", groups.part(after)), remembered.moments
    if _changes_banks(recipe, before, after):
        banks = groups.join(jax.device_get(parts.take_beds(values, "bank")))
        banks, moments = _births(recipe, (before, after), banks, moments, birth)
        new |= parts.put_beds("bank", groups.part(jax.device_get(banks)))
    zeros = jax.tree.map(jnp.zeros_like, remembered.sums)
    layers = groups.split(report.layers)
    if recipe.folds and any(
        np.any(s.stage == Stage.FOSSILIZED) for s in after.values()
    ):
        banks = parts.take({**values, **new}, "bank")
        weights = {name: values[name] for name in recipe.fold_weights}
        folded = _fold(recipe, groups.split(after), banks, weights, layers)
        seeds, layers = jax.device_get((folded[0], folded[2]))
        new |= parts.joined("seeds", seeds) | folded[1]
    report = report.replace(layers=layers)
    return Remembered(state, moments, zeros), _placed(new, values), report


_advance = jax.jit(advance, static_argnums=0)
_births = jax.jit(births, static_argnums=0)
_starting = jax.jit(starting, static_argnums=0)
_collected = jax.jit(collected_by, static_argnums=0)
_fold = jax.jit(Recipe.folded, static_argnums=0)


def _what_was_collected(
    recipe: Recipe, seeds: dict[str, SeedState], values: Arrays
) -> dict[str, Any]:
    """What each layer's newborn parts collected; NaN where nothing was."""
    parts = recipe.parts
    newborn = any(np.any(s.stage == Stage.GERMINATED) for s in seeds.values())
    if newborn and any(map(aims, parts.kinds.values())):
        banks = jax.device_get(parts.take_beds(values, "bank"))
        collected = _collected(recipe, seeds, parts.groups.join(banks))
        return jax.device_get(collected)
    return {key: np.full(len(s.stage), np.nan, np.float32) for key, s in seeds.items()}


def _changes_banks(
    recipe: Recipe, before: dict[str, SeedState], after: dict[str, SeedState]
) -> bool:
    """Whether something was born, or got its direction."""
    if any(np.any(born_in(before[key], after[key])) for key in before):
        return True
    if not any(map(aims, recipe.parts.kinds.values())):
        return False
    starts = jax.device_get(_starting(recipe, before, after))
    return any(np.any(which) for which in starts.values())


def _placed(new: Arrays, old: Arrays) -> Arrays:
    """Arrays of the host on the devices of those that they replace."""

    def place(array: Any, like: Any) -> Array:
        if getattr(like, "committed", False):
            return jax.device_put(array, like.sharding)
        return jnp.asarray(array)

    return {name: place(array, old[name]) for name, array in new.items()}


@functools.partial(jax.jit, static_argnums=0)
def _asked(
    recipe: Recipe, seeds: dict[str, SeedState]
) -> dict[str, tuple[Float[Array, "L K"], Bool[Array, "L K"]]]:
    """Alpha of each slot, and whether its seed is asked for its worth, by group."""

    def of(layer: SeedState) -> tuple[Float[Array, " K"], Bool[Array, " K"]]:
        return slot_coefficients(layer)[0], asked_for_worth(layer, recipe.gates)

    return {key: jax.vmap(of)(layers) for key, layers in seeds.items()}
