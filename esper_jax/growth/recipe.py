"""What a model is grown by: all that is fixed before the first step."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Self

import numpy as np
from jaxtyping import Int

from esper_jax.blueprints import Bank
from esper_jax.growth.folds import Fold, Folded, fold_fossils
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.reports import LayerReport
from esper_jax.growth.state import Arrays
from esper_jax.lifecycle.grafting import READS, Strategy
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.state import SeedState
from esper_jax.optim import PerSlot
from esper_jax.policy.interface import (
    SAMPLED,
    Policy,
    PolicyFactory,
    Setting,
    check_reads,
    made,
)

__all__ = [
    "Recipe",
    "check_known",
    "check_measured",
    "check_trained",
    "policy_for",
    "what_is_read",
]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """The fixed part of growth; pure functions of arrays are closed over it.

    Hashable by identity, so that it can be a static argument.

    Args:
      parts: the model, taken apart.
      bank_optimizer: of the banks, slot by slot.
      gates: minimum ages and gates of the lifecycle.
      policy: what asks for transitions.
      maker: what made the policy, for other groups; None if it was given as it is.
      folds: which fossils are folded into the weights of their layers, by layer.
      measured: which of the signals `policy.interface.SAMPLED` are measured; the others
        are NaN.
      measure_every: they are measured at every so many steps, beginning with the first
        after a tick.
    """

    parts: ModelParts
    bank_optimizer: PerSlot
    gates: LifecycleConfig
    policy: Policy
    maker: PolicyFactory | None = None
    folds: Mapping[str, Fold] = dataclasses.field(default_factory=dict)
    measured: frozenset[str] = SAMPLED
    measure_every: int = 1

    def costs(self) -> dict[str, Int[np.ndarray, "N S"]]:
        """Parameters of each blueprint on each chunk, by group."""
        shapes = self.parts.shapes()
        return {
            key: shapes[group.layers[0]].costs
            for key, group in self.parts.groups.of.items()
        }

    def for_slots(self, seeds: Mapping[str, SeedState]) -> Self:
        """The recipe for as many slots as the seeds of the layers have."""
        return self.for_capacity({name: s.capacity for name, s in seeds.items()})

    def for_capacity(self, slots: Mapping[str, int]) -> Self:
        """The recipe for a number of slots of each layer.

        `grow_capacity` may give layers of one group different numbers of slots. They
        are groups apart then, and the policy is made anew if it was made for groups.

        Args:
          slots: by layer.
        """
        groups = self.parts.groups.apart(slots)
        if groups is self.parts.groups:
            return self
        beds = {
            name: dataclasses.replace(bed, capacity=slots[name])
            for name, bed in self.parts.beds.items()
        }
        parts = dataclasses.replace(self.parts, beds=beds, groups=groups)
        policy = policy_for(parts, self.gates, self.maker or self.policy)
        return dataclasses.replace(self, parts=parts, policy=policy)

    @property
    def fold_weights(self) -> list[str]:
        """Names of the variables that fossils may be folded into."""
        return [name for fold in self.folds.values() for name in fold.weights]

    def fold(
        self,
        seeds: Mapping[str, SeedState],
        banks: Mapping[str, Bank],
        weights: Arrays,
    ) -> Folded:
        """Folds the fossils that can be; see `fold_fossils`."""
        return fold_fossils(self.parts, self.folds, seeds, banks, weights)

    def folded(
        self,
        seeds: Mapping[str, SeedState],
        banks: Mapping[str, Bank],
        values: Arrays,
        reports: Mapping[str, LayerReport],
    ) -> tuple[dict[str, SeedState], Arrays, dict[str, LayerReport]]:
        """What folding fossils changes: seeds and reports by layer, weights by name.

        Args:
          seeds: of each layer, after a tick.
          banks: of each layer.
          values: of the model's variables, by name.
          reports: of the tick, by layer.
        """
        weights = {name: values[name] for name in self.fold_weights}
        found = self.fold(seeds, banks, weights)
        told = {
            name: reports[name].with_folded(which)
            for name, which in found.which.items()
        }
        return {**seeds, **found.seeds}, found.weights, {**reports, **told}

    def wants(self, *signals: str) -> bool:
        """Whether one of the signals is measured."""
        return not self.measured.isdisjoint(signals)


def policy_for(
    parts: ModelParts, gates: LifecycleConfig, policy: Policy | PolicyFactory
) -> Policy:
    """The policy for a model.

    Args:
      parts: the model.
      gates: minimum ages and gates of the lifecycle.
      policy: a policy, or what makes one.

    Raises:
      TypeError: if it is neither.
      ValueError: by what makes it, if it does not suit the model.
    """
    setting = Setting(layers=parts.shapes(), gates=gates, groups=parts.groups)
    return made(policy, setting)


def check_trained(
    parts: ModelParts, policy: Policy, strategies: Collection[Strategy]
) -> Policy:
    """Refuses a policy that reads gradients which no layer that can grow has.

    Also the norm of all the host's gradients, and a strategy that waits for it, where
    the host is frozen. A policy that does not declare what it reads is trusted.

    Args:
      parts: the model.
      policy: its policy.
      strategies: those that the seeds have.

    Returns:
      The policy.

    Raises:
      ValueError: naming the signals.
    """
    if read := _without_weights(parts, policy.reads or ()):
        raise ValueError(
            f"the policy reads {' and '.join(sorted(read))}, gradients of the weights "
            "that write a growable layer's output, and of these wrt trains none: "
            "nothing would ever germinate. Choose where='health', 'round_robin' or "
            "'random', or let wrt match weights of those layers"
        )
    if parts.trained:
        return policy
    if "grad_norm" in (policy.reads or ()):
        raise ValueError(
            "the policy reads grad_norm, the norm of the host's gradients, and a "
            "frozen host has none: no ramp would be chosen by it. Choose how='fixed', "
            "or let wrt match what trains"
        )
    if Strategy.GRAD_NORM_GATED in strategies:
        raise ValueError(
            "strategy GRAD_NORM_GATED waits for the norm of the host's gradients, and "
            "a frozen host has none: nothing would ever count. Choose another "
            "strategy, or let wrt match what trains"
        )
    return policy


def check_known(parts: ModelParts, measured: Collection[str] | None) -> None:
    """Refuses to measure gradients which no layer that can grow has.

    Args:
      parts: the model.
      measured: the signals that were asked for; None for what is read.

    Raises:
      ValueError: naming the signals.
    """
    if unknown := _without_weights(parts, measured or ()):
        names = " and ".join(sorted(unknown))
        raise ValueError(
            f"measure must not hold {names}: gradients of the weights that write a "
            "growable layer's output, of which wrt trains none, so nothing could be "
            "measured. Leave it out (grad_norm and drift of a frozen host are 0), or "
            "let wrt match weights of those layers"
        )


def _without_weights(parts: ModelParts, signals: Collection[str]) -> frozenset[str]:
    """Those of the signals that nothing can be measured of, as no such weight trains.

    A weight that writes the output of a layer that can grow.
    """
    read = frozenset(signals) & {"chunk_gradient", "gradient_ratio"}
    return frozenset() if any(map(parts.trains_output, parts.beds)) else read


def what_is_read(policy: Policy, strategies: Collection[Strategy]) -> frozenset[str]:
    """The costly signals that a policy and grafting strategies read.

    A policy that does not declare what it reads may ask for any strategy.

    Args:
      policy: a policy.
      strategies: those that the seeds have.
    """
    if policy.reads is None:
        return SAMPLED
    return policy.reads.union(*(READS[strategy] for strategy in strategies))


def check_measured(
    measured: Collection[str] | None, every: int, read: frozenset[str]
) -> frozenset[str]:
    """The signals to measure: those asked for, by default those that are read.

    Args:
      measured: what is asked for; None for what is read.
      every: at how many steps.
      read: as `what_is_read` returns it.

    Raises:
      ValueError: if something is read that is not measured, a name is none of
        `SAMPLED`, or ``every`` is below 1.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"measure_every must be an int of at least 1, got {every!r}")
    if measured is None:
        return read
    check_reads("measure", measured)
    missing = sorted(read - set(measured))
    if missing:
        raise ValueError(
            f"measure must hold {', '.join(missing)}: the policy or a grafting "
            f"strategy reads it; got {sorted(measured)}. Add it, or leave measure out"
        )
    return frozenset(measured)
