"""The last ten transitions of each seed, packed into three words."""

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, UInt

__all__ = ["HISTORY", "History", "pack_history", "push_history", "unpack_history"]

HISTORY = 10
"""Number of past transitions that a seed remembers."""


@struct.dataclass
class History:
    """The last ten transitions of each seed, one byte each, the newest in the lowest.

    An entry is ``source << 4 | target``. 0 means none, since DORMANT to DORMANT is no
    transition. Shifting words is several times faster than shifting a (S, 10) array.
    """

    newest: UInt[Array, "*S"]
    """Entries 0 to 3, uint32."""
    middle: UInt[Array, "*S"]
    """Entries 4 to 7, uint32."""
    oldest: UInt[Array, "*S"]
    """Entries 8 and 9, uint16."""


def push_history(history: History, entry: UInt[Array, "*S"]) -> History:
    """``history`` with a new entry (uint8[S]) and without its oldest one."""
    return History(
        newest=history.newest << 8 | entry.astype(jnp.uint32),
        middle=history.middle << 8 | history.newest >> 24,
        oldest=history.oldest << 8 | (history.middle >> 24).astype(jnp.uint16),
    )


def pack_history(entries: UInt[np.ndarray, "*S 10"]) -> History:
    """Packs entries, newest first, into words. Runs on the host."""
    shifts = (8 * np.arange(HISTORY) % 32).astype(np.uint32)
    shifted = np.asarray(entries, np.uint32) << shifts
    newest, middle, oldest = (
        np.bitwise_or.reduce(shifted[..., i : i + 4], axis=-1) for i in (0, 4, 8)
    )
    return History(newest=newest, middle=middle, oldest=oldest.astype(np.uint16))


def unpack_history(history: History) -> UInt[np.ndarray, "*S 10"]:
    """Unpacks words into entries, newest first, uint8. Runs on the host."""
    words = (history.newest, history.middle, history.oldest)
    entries = [np.asarray(words[i // 4]) >> 8 * (i % 4) & 0xFF for i in range(HISTORY)]
    return np.stack(entries, axis=-1).astype(np.uint8)
