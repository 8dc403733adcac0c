"""What the Triton kernels know of a call while they are traced."""

import dataclasses
import functools
from collections.abc import Callable

from jaxtyping import Array

from esper_jax.blueprints import Dense
from esper_jax.kernels.blend import activations
from esper_jax.kernels.blend.static import Static
from esper_jax.kernels.blend.triton.blocks import Config, power_of_two
from esper_jax.kernels.blend.triton.instructions import DOUBLE, FAST, packed_double

__all__ = ["TritonStatic"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonStatic(Static):
    """`Static` with the block sizes of the Triton kernels."""

    config: Config

    @property
    def columns(self) -> int:
        """Columns of a tile that holds one chunk; a dot takes no fewer than 16."""
        return max(16, power_of_two(self.layout.width))

    @property
    def group_columns(self) -> int:
        """Columns of a tile that holds the chunks of a group."""
        return max(16, power_of_two(self.config.group * self.layout.width))

    @property
    def group_units(self) -> int:
        """Hidden units of such a tile."""
        return max(16, power_of_two(self.config.group * self.hidden))

    @property
    def own_statistics(self) -> bool:
        """Whether the forward kernel takes the living chunks' statistics."""
        return self.statistics_rows is None and not self.config.narrow

    @property
    def samples(self) -> bool:
        """Whether the last launch takes statistics of a sample of the rows."""
        return bool(self.statistics_rows) and not self.config.narrow

    @property
    def fast(self) -> bool:
        """Whether approximate instructions of the GPU are good enough."""
        return self.dtype != "float32" and not self.interpret

    @property
    def double(self) -> Callable[[Array], Array] | None:
        """Twice the activation, if tracing knows which and it is cheaper than once."""
        names = {
            b.activation
            for b in self.blueprints
            if isinstance(b, Dense) and b.expansion > 0
        }
        if not self.fast or len(names) != 1 or min(names) not in DOUBLE:
            return None
        if self.config.packed:
            return functools.partial(packed_double, min(names), dtype=self.dtype)
        return DOUBLE[min(names)]

    def activate(self, kind: Array, x: Array) -> tuple[Array, Array]:
        """Value and derivative of the activation that ``kind`` has.

        Args:
          kind: index of the blueprint, traced: a scalar, or one for each column.
          x: what enters the activation, float32.
        """
        functions = FAST if self.fast else activations.EXACT
        return activations.activate(self.blueprints, kind, x, functions)
