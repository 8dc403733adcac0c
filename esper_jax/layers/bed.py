"""`SeedBed`: a Flax NNX module that watches an activation and lets it grow."""

from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from esper_jax.blueprints import Blueprint, init_bank, resolve
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend import blend, check_implementation, check_sharding
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import Incubation
from esper_jax.lifecycle.state import init_seeds, record, slot_coefficients
from esper_jax.parallel import collectives

__all__ = [
    "DEFAULT_CAPACITY",
    "DEFAULT_STATISTICS_ROWS",
    "BlueprintParam",
    "GraftProbe",
    "SeedBed",
    "SeedVariable",
    "stack_of",
]

DEFAULT_CAPACITY = 8
"""Slots of a layer that is not told how many it should have (or one a seed)."""


DEFAULT_STATISTICS_ROWS = 256
"""Rows of a batch that a layer measures at most, if it is not told how many.

Of a chunk of 16 features that is 4,096 activations a call, and a tick sums many calls.
Were they independent, a call's mean would be off by 1.6% of their deviation."""


class BlueprintParam(nnx.Param):
    """The bank: parameters of the blueprints. To be optimized with `optim.per_slot`."""


class SeedVariable(nnx.Variable):
    """Holds the layer's `SeedState`."""


class GraftProbe(nnx.Variable):
    """Added to each slot's alpha; always 0 while training.

    The loss's gradient with respect to it is the one with respect to alpha. Set to
    ``-alpha`` of one slot, it gives the loss without that seed: a counterfactual.
    """


nnx.register_variable_name("bank", BlueprintParam)
nnx.register_variable_name("seeds", SeedVariable)
nnx.register_variable_name("probe", GraftProbe)


class SeedBed(nnx.Module):
    """Watches the chunks of an activation and lets blueprints grow in them.

    The part of `ChunkedLayer` that follows the base layer; usable by itself wherever
    there is an activation and no layer.

    Args:
      features: width of the last axis.
      num_seeds: chunks that the features are cut into, one seed each.
      capacity: seeds that can live at once, the slots of the bank; from 1 to
        ``num_seeds``, by default the lesser of that and `DEFAULT_CAPACITY`.
      blueprints: what may grow: names, `Dense` or `Custom`. A seed's blueprint id is
        the index into them.
      strategy: grafting strategy that each seed starts with.
      incubation: what a seed in TRAINING learns from: ``"task"`` or
        ``"reconstruction"``.
      statistics_rows: rows that a call measures, at most; all if None. They are spread
        evenly over the flattened batch of ``N`` rows, every
        ``ceil(N / statistics_rows)``-th from the first, so that no part of it is left
        out; batches that are no larger are measured whole. (A little fewer where the
        stride would have a factor in common with inner axes, and so always meet the
        same positions.) On several devices each takes its share; they are the rows of
        one device where the stride divides the rows of each.
      implementation: of `blend`.
      deterministic: if True, a call collects no statistics. `nnx.Module.eval` and
        ``train`` switch it.
      axis_name: where the rows are divided among devices along a mapped axis (`pmap`,
        `shard_map`): its name. Statistics are then those of all rows.
      sharding: how the activation is laid out over a mesh, in plain `jax.jit`; see
        `blend`.
      rngs: key ``params`` draws the first bank.

    Raises:
      TypeError, ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        features: int,
        num_seeds: int,
        *,
        capacity: int | None = None,
        blueprints: Sequence[str | Blueprint] = ("residual_mlp",),
        strategy: Strategy = Strategy.LINEAR,
        incubation: Incubation = "task",
        statistics_rows: int | None = DEFAULT_STATISTICS_ROWS,
        implementation: str | Sequence[str] | None = None,
        deterministic: bool = False,
        axis_name: str | None = None,
        sharding: NamedSharding | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.layout = ChunkLayout(features, num_seeds)
        self.blueprints = resolve(blueprints)
        if incubation not in get_args(Incubation):
            raise ValueError(
                f"incubation must be one of {get_args(Incubation)}, got {incubation!r}"
            )
        self.incubation = incubation
        if statistics_rows is not None and not statistics_rows >= 0:
            raise ValueError(
                f"statistics_rows must be at least 0, or None for all rows; got "
                f"{statistics_rows!r}"
            )
        self.statistics_rows = statistics_rows
        check_implementation(implementation)
        self.implementation = implementation
        self.deterministic = deterministic
        self.axis_name = axis_name
        check_sharding(sharding)
        self.sharding = sharding
        if strategy not in list(Strategy):
            raise ValueError(f"strategy must be a Strategy, got {strategy!r}")
        if capacity is None:
            capacity = min(DEFAULT_CAPACITY, num_seeds)
        self.seeds = SeedVariable(init_seeds(num_seeds, capacity, strategy))
        self.bank = BlueprintParam(
            init_bank(
                rngs.params(), capacity, self.blueprints, self.layout.width, features
            )
        )
        self.probe = GraftProbe(jnp.zeros(capacity, jnp.float32))

    def __call__(self, y: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        """``y`` with the living seeds blended in, of the same shape and dtype."""
        seeds = self.seeds.get_value()
        alpha, beta, blueprint = slot_coefficients(seeds)
        out, statistics, reconstruction = blend(
            y,
            self.bank.get_value(),
            alpha + self.probe.get_value(),
            beta,
            blueprint,
            seeds.seed_of_slot,
            layout=self.layout,
            blueprints=self.blueprints,
            incubation=self.incubation,
            statistics_rows=self._rows(),
            implementation=self.implementation,
            sharding=self.sharding,
        )
        if not self.deterministic:
            statistics = collectives.total(statistics, self.axis_name)
            reconstruction = collectives.mean(reconstruction, self.axis_name)
            self.seeds.set_value(record(seeds, statistics, reconstruction))
        return out

    def _rows(self) -> int | None:
        """Rows that this call measures on this device."""
        if self.deterministic:
            return 0  # what nobody records costs nothing
        if self.axis_name is None or not self.statistics_rows:
            return self.statistics_rows
        return max(1, self.statistics_rows // collectives.axis_size(self.axis_name))


def stack_of(bed: SeedBed, name: str) -> tuple[int, ...]:
    """Leading axes of the variables of a stack of layers; () for a single one.

    Raises:
      ValueError: with ``name``, if they are not stacked along their first axes.
    """
    seeds = bed.seeds.get_value()
    stack = seeds.stage.shape[:-1]
    others = jax.tree.leaves((bed.bank.get_value(), bed.probe.get_value()))
    shapes = [leaf.shape for leaf in others if leaf.shape[: len(stack)] != stack]
    if shapes or seeds.num_seeds != bed.layout.num_seeds:
        raise ValueError(
            f"{name}: the variables of a stack must be stacked along their first axes, "
            "as nnx.scan and nnx.vmap do by default; the stages of "
            f"{bed.layout.num_seeds} seeds have shape {seeds.stage.shape}"
            + "".join(f", another variable has {shape}" for shape in shapes[:1])
        )
    return stack
