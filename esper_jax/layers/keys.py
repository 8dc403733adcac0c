"""The random key of a layer that is made, or what to give in its place."""

from typing import Any

from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Key

__all__ = ["TRACED", "key_of"]

TRACED = (
    "inside of jax.jit, nnx.jit and other transforms, only what was made there or came "
    "as an argument can be changed. Make layers growable between steps; or, to make "
    "the model itself inside, make model and rngs there as well"
)
"""What to do about a `TraceContextError`."""


def key_of(rngs: Any) -> Key[Array, ""]:
    """The next key ``params`` of random streams.

    Raises:
      TypeError: if they are none, or have neither ``params`` nor a default.
      ValueError: if they are of outside of what is being traced.
    """
    if not isinstance(rngs, nnx.Rngs) or not hasattr(rngs, "params"):
        raise TypeError(
            "rngs must be nnx.Rngs with a key for params, such as nnx.Rngs(0); got "
            f"{_shown(rngs)}"
        )
    try:
        return rngs.params()
    except TraceContextError as error:
        raise ValueError(
            f"rngs are of outside of what is being traced: {TRACED}"
        ) from error


def _shown(rngs: Any) -> str:
    if isinstance(rngs, nnx.Rngs):
        return f"nnx.Rngs with {', '.join(map(repr, rngs)) or 'none'}"
    return f"{rngs!r:.60}"
