"""`SeedBed`: a Flax NNX module that watches an activation and grows seeds in it."""

from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from esper_jax.blueprints import Blueprint, aiming, aims, bound, init_bank, resolve
from esper_jax.blueprints.ranks import warn_of_ranks
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend import (
    blend,
    check_implementation,
    check_sharding,
    check_statistics_rows,
    tapped,
)
from esper_jax.kernels.blend.static import Slots
from esper_jax.layers.keys import key_of
from esper_jax.layers.shown import LayerSeeds, html_of, seeds_in
from esper_jax.layers.variables import (
    BlueprintParam,
    GraftProbe,
    SeedTree,
    VariableTree,
)
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import Incubation
from esper_jax.lifecycle.state import init_seeds, slot_coefficients
from esper_jax.parallel import collectives

__all__ = [
    "DEFAULT_CAPACITY",
    "DEFAULT_STATISTICS_ROWS",
    "SeedBed",
    "check_incubation",
    "stack_of",
]

DEFAULT_CAPACITY = 8
"""Default number of slots. A layer with fewer seeds gets one slot per seed."""


DEFAULT_STATISTICS_ROWS = 256
"""Most rows of a batch that a layer measures, by default.

For a chunk of 16 features, 256 rows are 4,096 activations per call, and a tick sums
many calls. If the activations were independent, the standard error of a call's mean
would be 1.6% of their standard deviation."""


class SeedBed(nnx.Module):
    """Watches the chunks of an activation and grows blueprints in them.

    `ChunkedLayer` is a base layer followed by a `SeedBed`. Use a bare `SeedBed` on an
    activation that no single layer produces.

    In training mode a call adds statistics to ``seeds``. Inside raw JAX transforms
    (`jax.vmap`, `jax.lax.scan`, `jax.checkpoint`, `jax.jit`, `jax.grad`, ...) that are
    called in the model, the variables cannot be written, and the call leaves statistics
    out. The seeds still act and learn, but if all calls are such, they have no health
    and no reconstruction loss, and gates that read these refuse: `TRAINING` to
    `GRAFTING` among them. NNX's own transforms (`nnx.vmap`, `nnx.scan`, `nnx.remat`,
    `nnx.jit`, `nnx.grad`, ...) carry the variables, and statistics with them.

    Forward-mode derivatives (`jax.jvp`, `jax.jacfwd`, `jax.hessian`, `jax.linearize`)
    work in evaluation mode with plain JAX; `blend` says what they are.

    Args:
      features: width of the last axis.
      num_seeds: number of chunks that the features are cut into, one seed each.
      capacity: number of slots of the bank, which is how many seeds can live at once.
        From 1 to ``num_seeds``; by default the smaller of ``num_seeds`` and
        `DEFAULT_CAPACITY`.
      blueprints: what may grow: names, `Dense`, `Custom` or `Adapter`. A seed's
        blueprint id is an index into this sequence. A rank (`lora`, `low_rank`) above
        the widths that it lies between gives a warning.
      strategy: grafting strategy that each seed starts with.
      incubation: what a seed in TRAINING learns from: ``"task"``, ``"bounded"`` (the
        same with a pull that keeps its correction as small as the activation), or
        ``"reconstruction"``.
      statistics_rows: most rows that a call measures; None measures all. In a flattened
        batch of ``N`` rows, a call measures every ``ceil(N / statistics_rows)``-th row,
        starting with the first. A batch of at most ``statistics_rows`` rows is measured
        whole. If the stride shares a factor with the inner axes, so that it would
        always meet the same positions, a larger stride takes slightly fewer rows. On
        several devices, each device measures its share; these are the same rows as on
        one device if the stride divides the number of rows per device.
      implementation: passed to `blend`.
      deterministic: if True, a call collects no statistics, and forward-mode
        derivatives work. `nnx.Module.eval` and ``train`` switch it.
      axis_name: name of the mapped axis (`pmap`, `shard_map`) that divides the rows
        among devices, if there is one. Statistics then cover the rows of all devices.
      sharding: layout of the activation over a mesh, for use in plain `jax.jit`; see
        `blend`.
      inputs: width of the ``x`` that calls get, or number of its ids, for blueprints
        that read the layer's input.
      rngs: its key ``params`` draws the first bank.

    Raises:
      TypeError, ValueError: if an argument does not fit; the message names it.
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
        inputs: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.layout = ChunkLayout(features, num_seeds)
        self.blueprints = bound(resolve(blueprints), inputs)
        check_incubation(incubation, self.blueprints)
        self.incubation = incubation
        check_statistics_rows(statistics_rows)
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
        self.seeds = SeedTree(init_seeds(num_seeds, capacity, strategy))
        self.bank = VariableTree(
            BlueprintParam,
            init_bank(
                key_of(rngs), capacity, self.blueprints, self.layout.width, features
            ),
        )
        self.probe = GraftProbe(jnp.zeros(capacity, jnp.float32))
        warn_of_ranks(self.blueprints, self.layout.width, features)

    def __call__(
        self,
        y: Float[Array, "*B F"],
        bias: Float[Array, " F"] | None = None,
        x: Any = None,
        hook: Any = None,
    ) -> Float[Array, "*B F"]:
        """``y + bias`` with the living seeds blended in, of y's shape and dtype.

        Args:
          y: the activation.
          bias: a vector that belongs to it.
          x: input of the layer, for blueprints that read it; as for `blend`.
          hook: what `tapped` returned with ``x``, if anything.
        """
        seeds = self.seeds.get_value()
        # Inside raw JAX transforms (jax.vmap, lax.scan, ...) nothing can be written.
        records = not self.deterministic and self.seeds.writable
        slots = self._slots()
        out, statistics, reconstruction = blend(
            y,
            self.bank.get_value(),
            slots.alpha,
            slots.beta,
            slots.blueprint,
            slots.seed_of_slot,
            layout=self.layout,
            blueprints=self.blueprints,
            incubation=self.incubation,
            statistics_rows=self._rows() if records else 0,
            implementation=self.implementation,
            sharding=self.sharding,
            forward_mode=self.deterministic,
            bias=bias,
            x=x if self.reads_input else None,
            hook=hook,
        )
        if records:
            statistics = collectives.total(statistics, self.axis_name)
            reconstruction = collectives.mean(reconstruction, self.axis_name)
            self.seeds.record(seeds, statistics, reconstruction)
        return out

    def tapped(self, x: Any) -> tuple[Any, Any]:
        """The layer's input as its base layer should get it, and the hook of a call.

        Cheaper gradients on a GPU, where blueprints read the input; not needed.
        """
        if not self.reads_input or self.deterministic or self.sharding is not None:
            return x, None
        return tapped(
            x,
            self.bank.get_value(),
            self._slots(),
            layout=self.layout,
            blueprints=self.blueprints,
            incubation=self.incubation,
            implementation=self.implementation,
        )

    def _slots(self) -> Slots:
        """Coefficients, kinds and owners of the slots."""
        seeds = self.seeds.get_value()
        alpha, beta, blueprint = slot_coefficients(seeds)
        if aims(self.blueprints):
            beta = jnp.where(aiming(seeds, self.blueprints), 1.0, beta)
        return Slots(
            alpha + self.probe.get_value(), beta, blueprint, seeds.seed_of_slot
        )

    @property
    def reads_input(self) -> bool:
        """Whether a blueprint reads the layer's input."""
        return any(b.reads == "input" for b in self.blueprints)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Lets `nnx.view` switch the collection of statistics off and on."""
        if deterministic is not None:
            self.deterministic = deterministic

    def shown(self) -> list[LayerSeeds]:
        """The seeds as notebooks show them; one entry for each layer of a stack."""
        names = [blueprint.name for blueprint in self.blueprints]
        return seeds_in("", self.seeds.get_value(), names)

    def _repr_html_(self) -> str:
        return html_of(self.shown())

    def _rows(self) -> int | None:
        """Rows that this call measures on this device."""
        if self.axis_name is None or not self.statistics_rows:
            return self.statistics_rows
        return max(1, self.statistics_rows // collectives.axis_size(self.axis_name))


def check_incubation(incubation: str, blueprints: tuple[Blueprint, ...]) -> None:
    """Refuses what seeds cannot learn from.

    Raises:
      ValueError: if it is no `Incubation`, or does not suit the blueprints.
    """
    if incubation not in get_args(Incubation):
        raise ValueError(
            f"incubation must be one of {get_args(Incubation)}, got {incubation!r}"
        )
    if incubation != "task" and aims(blueprints):
        raise ValueError(
            "incubation must be 'task' for blueprints with start='gradient', whose "
            f"direction is that of the task's loss; got {incubation!r}"
        )


def stack_of(bed: SeedBed, name: str) -> tuple[int, ...]:
    """Leading axes of the variables of a stack of layers; () for a single layer.

    Args:
      bed: the bed of the layer or of the stack.
      name: name of the bed, for the error message.

    Raises:
      ValueError: if the variables hold no values, or are not stacked along their first
        axes.
    """
    seeds = bed.seeds.get_value()
    if isinstance(seeds.stage, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{name}: the model must hold arrays, and this layer holds shapes only, as "
            "nnx.eval_shape makes them. Make the model itself, or give it values with "
            "nnx.update(model, state)"
        )
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
