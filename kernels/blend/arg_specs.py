"""Named shapes of blend's arguments, for tests, tuning and benchmarks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.blueprints import Blueprint, Dense, init_bank, registered, resolve
from esper_jax.chunks import ChunkLayout
from esper_jax.lifecycle.stages import Incubation

__all__ = ["ARG_SPECS", "KINDS", "ArgSpec"]

KINDS: tuple[str, ...] = tuple(
    name for name, kind in registered().items() if isinstance(kind, Dense)
)
"""Every registered blueprint of the built-in form."""

_COEFFICIENTS = ((0.0, 1.0), (0.6, 1.0), (1.0, 0.0), (1.0, 1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """A realistic shape.

    Args:
      name: its name.
      rows: rows of the flattened batch.
      features: width of the layer's output.
      num_seeds: chunks.
      capacity: slots; a slot for each seed if None.
      blueprints: what may grow.
      dtype: of the activation.
      incubation: as for `blend`.
      statistics_rows: as for `blend`.
      bias: whether ``y`` comes without its bias, float32, which comes apart.
    """

    name: str
    rows: int
    features: int
    num_seeds: int
    capacity: int | None = None
    blueprints: tuple[str | Blueprint, ...] = ("residual_mlp",)
    dtype: str = "bfloat16"
    incubation: Incubation = "task"
    statistics_rows: int | None = None
    bias: bool = False

    @property
    def layout(self) -> ChunkLayout:
        """How the features are cut."""
        return ChunkLayout(self.features, self.num_seeds)

    @property
    def slots(self) -> int:
        """``K``."""
        return self.num_seeds if self.capacity is None else self.capacity

    @property
    def options(self) -> dict[str, Any]:
        """The static arguments of `blend`."""
        return {
            "layout": self.layout,
            "blueprints": resolve(self.blueprints),
            "incubation": self.incubation,
            "statistics_rows": self.statistics_rows,
        }

    def small(self, rows: int = 21, seeds: int = 4) -> "ArgSpec":
        """The same chunk widths over few rows and seeds, for interpret mode."""
        base, wider = divmod(self.features, self.num_seeds)
        seeds = min(seeds, self.num_seeds)
        return dataclasses.replace(
            self,
            rows=min(rows, self.rows),
            features=base * seeds + (1 if wider else 0),
            num_seeds=seeds,
            capacity=min(self.slots, seeds),
            statistics_rows=self.statistics_rows and min(5, self.statistics_rows),
        )

    def arrays(
        self, seed: int, *, living: float = 1.0, mixed: bool = False
    ) -> dict[str, Any]:
        """Random array arguments of `blend`.

        Args:
          seed: of the random numbers.
          living: share of the slots that live; the others are free.
          mixed: whether slots are in all stages and hold all blueprints.

        Returns:
          ``y``, ``bank``, ``alpha``, ``beta``, ``blueprint`` and ``seed_of_slot``; and
          ``bias``, if there is one.
        """
        rng = np.random.default_rng(seed)
        blueprints, slots = resolve(self.blueprints), self.slots
        width = self.layout.width
        bank = jax.eval_shape(
            lambda: init_bank(
                jax.random.key(0), slots, blueprints, width, self.layout.features
            )
        )
        bank = jax.tree.map(
            lambda leaf: jnp.asarray(
                rng.normal(size=leaf.shape, scale=width**-0.5), jnp.float32
            ),
            bank,
        )
        owners = rng.permutation(self.num_seeds)[:slots].astype(np.int32)
        alive = rng.permutation(slots) < round(living * slots)
        pairs = np.full((slots, 2), (0.6, 1.0), np.float32)
        kinds = np.zeros(slots, np.int32)
        if mixed:
            turn = rng.integers(len(_COEFFICIENTS))
            order = (np.arange(slots) + turn) % len(_COEFFICIENTS)
            pairs = np.asarray(_COEFFICIENTS, np.float32)[order]
            kinds = rng.permutation(slots).astype(np.int32) % len(blueprints)
        pairs[~alive] = 0.0
        owners[~alive] = -1
        if mixed and slots > 2:
            pairs[0] = 0.0  # Dead, and owns a seed.
            owners[1], pairs[1] = -1, (0.7, 1.0)  # Free, whatever stands there.
        y = rng.normal(size=(self.rows, self.features)).astype(np.float32)
        bias = {}
        if self.bias:
            value = rng.normal(size=self.features, scale=0.5)
            # Numbers that y's dtype holds, so that float32 counts the same zeros.
            bias["bias"] = jnp.asarray(value, self.dtype).astype(jnp.float32)
        return {
            "y": jnp.asarray(y, self.dtype),
            "bank": bank,
            "alpha": jnp.asarray(pairs[:, 0]),
            "beta": jnp.asarray(pairs[:, 1]),
            "blueprint": jnp.asarray(kinds),
            "seed_of_slot": jnp.asarray(owners),
            **bias,
        }


def _widths() -> list[ArgSpec]:
    return [
        ArgSpec(
            name=f"width_{width}", rows=8192, features=4096, num_seeds=4096 // width
        )
        for width in (2, 4, 8, 16, 32, 64, 128, 256, 512)
    ]


ARG_SPECS: dict[str, ArgSpec] = {
    spec.name: spec
    for spec in [
        *_widths(),
        ArgSpec(name="small_batch", rows=32, features=2048, num_seeds=1000),
        ArgSpec(
            name="default_capacity",
            rows=8192,
            features=4096,
            num_seeds=64,
            capacity=8,
            statistics_rows=256,
        ),
        ArgSpec(
            name="every_kind",
            rows=8192,
            features=4096,
            num_seeds=64,
            blueprints=KINDS,
        ),
        ArgSpec(
            name="uneven",
            rows=1000,
            features=1000,
            num_seeds=37,
            capacity=16,
            blueprints=KINDS,
        ),
        ArgSpec(
            name="uneven_narrow",
            rows=999,
            features=1000,
            num_seeds=400,
            blueprints=KINDS,
        ),
        ArgSpec(
            name="float32",
            rows=4096,
            features=1024,
            num_seeds=16,
            blueprints=KINDS,
            dtype="float32",
        ),
        ArgSpec(
            name="float16",
            rows=4096,
            features=1024,
            num_seeds=16,
            blueprints=KINDS,
            dtype="float16",
        ),
        ArgSpec(
            name="reconstruction",
            rows=4096,
            features=1024,
            num_seeds=16,
            blueprints=KINDS,
            incubation="reconstruction",
        ),
        ArgSpec(
            name="wide_reconstruction",
            rows=2048,
            features=1024,
            num_seeds=4,
            incubation="reconstruction",
        ),
        ArgSpec(
            name="bias",
            rows=16384,
            features=3072,
            num_seeds=48,
            capacity=8,
            statistics_rows=256,
            bias=True,
        ),
        ArgSpec(
            name="bias_uneven",
            rows=1000,
            features=1000,
            num_seeds=37,
            capacity=16,
            blueprints=KINDS,
            bias=True,
        ),
        ArgSpec(
            name="bias_wide",
            rows=2048,
            features=1024,
            num_seeds=4,
            bias=True,
        ),
        ArgSpec(
            name="bias_narrow",
            rows=999,
            features=1000,
            num_seeds=400,
            blueprints=KINDS,
            bias=True,
        ),
    ]
}
"""Shapes by name."""
