"""What is asked from outside at a tick, beside what the policy asks.

It is carried out by the same `lifecycle.transition`, before what the policy asks, so
that nothing from outside can do what the lifecycle forbids.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from esper_jax import lifecycle
from esper_jax.groups import Groups
from esper_jax.growth.reports import By
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Outcome, Stage
from esper_jax.lifecycle.state import SeedState

__all__ = ["Granted", "Outside", "grant", "nothing_asked", "outside_for", "yielding"]


@struct.dataclass
class Outside:
    """What is asked from outside at one tick, by layer.

    Arrays of fixed shape: no request compiles anything.
    """

    commands: dict[str, Commands]
    atomic: dict[str, Bool[Array, "*S"]]
    """Whether a seed's request is one of those that are carried out all or none."""
    germination: Bool[Array, ""]
    """Whether what the policy asks to germinate is heard."""
    policy: Bool[Array, ""] | bool = True
    """Whether the policy is heard at all."""

    def by_group(self, groups: Groups) -> "Outside":
        """The same with the layers of a group stacked along a leading axis."""
        return Outside(
            commands=groups.stack(self.commands),
            atomic=groups.stack(self.atomic),
            germination=self.germination,
            policy=self.policy,
        )


class Granted(NamedTuple):
    """What became of what was asked from outside, by group."""

    seeds: dict[str, SeedState]
    outcome: dict[str, Int[Array, "L S"]]


def nothing_asked(
    num_seeds: Mapping[str, int], germination: bool = True, policy: bool = True
) -> Outside:
    """Asks for nothing, in arrays of the host.

    Args:
      num_seeds: seeds of each layer, by name.
      germination: whether what the policy asks to germinate is heard.
      policy: whether it is heard at all.
    """

    heard: Any = np.asarray(germination)
    at_all: Any = np.asarray(policy)
    loose: Any = {name: np.zeros(seeds, bool) for name, seeds in num_seeds.items()}

    def nothing(seeds: int) -> Any:
        return np.full(seeds, NO_REQUEST, np.int8)

    return Outside(
        commands={
            name: Commands(target=nothing(s), blueprint=nothing(s), strategy=nothing(s))
            for name, s in num_seeds.items()
        },
        atomic=loose,
        germination=heard,
        policy=at_all,
    )


def outside_for(
    asked: Outside | Mapping[str, Commands], num_seeds: Mapping[str, int]
) -> Outside:
    """What is asked, checked, for all layers.

    Args:
      asked: commands by layer, as `commands_for` makes them, for some of the layers; or
        all that can be asked.
      num_seeds: seeds of each layer, by name.

    Raises:
      TypeError: if it is neither.
      ValueError: if there is no such layer, or it has another number of seeds.
    """
    nothing = nothing_asked(num_seeds)
    if isinstance(asked, Mapping):
        _check_layers(asked, num_seeds)
        asked = dataclasses.replace(nothing, commands={**nothing.commands, **asked})
    if not isinstance(asked, Outside):
        raise TypeError(
            "commands must be Commands by layer, such as {'layers/0': commands_for(4, "
            f"{{2: Stage.CULLED}})}}, or an Outside; got {type(asked).__name__}"
        )
    for given in (asked.commands, asked.atomic):
        if given.keys() != nothing.commands.keys():
            _check_layers(given, num_seeds)
            lacks = next(name for name in num_seeds if name not in given)
            raise ValueError(f"commands must be of all layers; {lacks!r} is missing")
    for name, seeds in num_seeds.items():
        columns = {**vars(asked.commands[name]), "atomic": asked.atomic[name]}
        for field, column in columns.items():
            if np.shape(column) != (seeds,):
                raise ValueError(
                    f"commands[{name!r}].{field} must have one entry for each of the "
                    f"{seeds} seeds; got shape {np.shape(column)}. commands_for("
                    f"{seeds}, ...) builds and checks them"
                )
    # One shape and dtype each, whatever was given.
    return jax.tree.map(lambda like, x: np.asarray(x, like.dtype), nothing, asked)


def _check_layers(given: Mapping[str, Any], num_seeds: Mapping[str, int]) -> None:
    for name, commands in given.items():
        if name not in num_seeds:
            raise ValueError(
                f"commands: there is no layer {name!r}; the layers that can grow are "
                f"{', '.join(map(repr, num_seeds))}"
            )
        if not isinstance(commands, Commands | np.ndarray | jax.Array):
            raise TypeError(
                f"commands[{name!r}] must be Commands, as commands_for makes them; got "
                f"{type(commands).__name__}"
            )


def grant(
    gates: LifecycleConfig,
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    outside: Outside,
) -> Granted:
    """Carries out or refuses what is asked from outside.

    If one of the requests that are atomic is refused, all of them are, and everything
    else is decided as if they had not been made.

    Args:
      gates: minimum ages and gates.
      seeds: by group, aged by this tick.
      signals: by group.
      outside: by group.
    """

    def tried(commands: Mapping[str, Commands]) -> Granted:
        def of_layer(state: SeedState, asked: Commands, measured: Signals) -> Any:
            return lifecycle.transition(state, asked, measured, gates)

        moved = {
            key: jax.vmap(of_layer)(seeds[key], commands[key], signals[key])
            for key in seeds
        }
        return Granted(
            {key: after for key, (after, _) in moved.items()},
            {key: outcome for key, (_, outcome) in moved.items()},
        )

    first = tried(outside.commands)
    refused = {
        key: outside.atomic[key] & (outcome > Outcome.OK)
        for key, outcome in first.outcome.items()
    }
    broken = jnp.any(jnp.stack([jnp.any(of) for of in refused.values()]))
    dropped = {key: of & broken for key, of in outside.atomic.items()}
    second = tried(
        {
            key: jax.tree.map(
                lambda x, gone=dropped[key]: jnp.where(gone, jnp.int8(NO_REQUEST), x),
                commands,
            )
            for key, commands in outside.commands.items()
        }
    )
    outcome = {
        key: jnp.where(
            dropped[key] & (outside.commands[key].target != NO_REQUEST),
            jnp.where(refused[key], first.outcome[key], jnp.int8(Outcome.BATCH)),
            second.outcome[key],
        )
        for key in seeds
    }
    return Granted(second.seeds, outcome)


def yielding(
    policy: Commands,
    outside: Commands,
    germination: Bool[Array, ""],
    heard: Bool[Array, ""] | bool = True,
) -> tuple[Commands, Int[Array, "*S"], Bool[Array, ""]]:
    """What is left of the policy's requests where the outside asks for the same seeds.

    Args:
      policy: what the policy asks of one layer, or of a group.
      outside: what is asked from outside.
      germination: whether the policy may germinate.
      heard: whether it is heard at all.

    Returns:
      What is left, who asked (`By`, int8), and whether a germination was not heard.
    """
    moved = outside.target != NO_REQUEST
    styled = moved | (outside.strategy != NO_REQUEST)
    births = policy.target == Stage.GERMINATED
    unheard = births & ~(germination & heard)
    dropped = unheard | ~jnp.asarray(heard)
    left = Commands(
        target=jnp.where(moved | dropped, NO_REQUEST, policy.target),
        blueprint=jnp.where(moved | dropped, NO_REQUEST, policy.blueprint),
        strategy=jnp.where(styled | dropped, NO_REQUEST, policy.strategy),
    )

    def against(field: str) -> Array:
        wish, other = getattr(policy, field), getattr(outside, field)
        asked = (wish != NO_REQUEST) & (other != NO_REQUEST)
        return asked & (wish != other) & ~dropped

    # A move that the policy asked for is its own, even if another strategy is set.
    theirs = moved | (styled & (left.target == NO_REQUEST))
    overruled = against("target") | against("strategy")
    by = jnp.select(
        [theirs & overruled, theirs],
        [jnp.int8(By.OVERRULING), jnp.int8(By.OUTSIDE)],
        jnp.int8(By.POLICY),
    )
    return left, by, jnp.any(unheard)
