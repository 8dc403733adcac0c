"""Ranks that the widths of a layer cannot use."""

import warnings
from collections.abc import Sequence

from esper_jax.blueprints.kinds import Adapter, Blueprint, Custom

__all__ = ["warn_of_ranks"]


def warn_of_ranks(blueprints: Sequence[Blueprint], width: int, features: int) -> None:
    """Warns of blueprints of two matrices whose rank is above their widths.

    They are not refused, since a checkpoint restores only into the ranks that it was
    made with.

    Args:
      blueprints: of a layer, bound to its input.
      width: of its widest chunk.
      features: of the layer.
    """
    for blueprint in blueprints:
        if isinstance(blueprint, Custom):
            continue
        if blueprint.bias or blueprint.activation != "identity":
            continue  # hidden units, of which more than the width are of use
        if isinstance(blueprint, Adapter):
            rank, written = blueprint.hidden, features
            read = blueprint.width_read(features)
        else:
            rank, read, written = blueprint.hidden(width), width, width
        if rank > (most := min(read, written)):
            warnings.warn(
                f"blueprints: {blueprint.name!r} has rank {rank}, and maps {read} to "
                f"{written} features, for which rank {most} is enough: the rest adds "
                f"nothing, and counts as {(rank - most) * (read + written)} of its "
                f"{rank * (read + written)} parameters. Choose a rank of at most "
                f"{most}, unless a checkpoint that is to be restored has this one",
                stacklevel=3,
            )
