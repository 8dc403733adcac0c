"""Arrays as integers of the same bits: small ones as words, floats that may be NaN."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_bits", "from_bits", "from_words", "to_words", "words_of"]


def as_bits(x: Any) -> Any:
    """Floats as unsigned integers of the same bits; anything else as it is.

    NaN stands for what was not measured. As integers such arrays pass through a user's
    jitted functions under ``jax_debug_nans``, which looks at all floats.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return _view(x, f"uint{8 * x.dtype.itemsize}")


def from_bits(x: Any, dtype: Any) -> Any:
    """Inverse of `as_bits`. Takes shapes, and what is of ``dtype`` already, as well."""
    return x if x.dtype == dtype else _view(x, dtype)


def words_of(dtypes: Sequence[Any]) -> int:
    """Number of words that `to_words` makes of fields of these dtypes."""
    return len(_shared(dtypes))


def to_words(fields: Sequence[Any]) -> list[Any]:
    """Arrays of one shape as uint32 arrays of that shape.

    A word holds one field of four bytes, two of two or four of one.

    Args:
      fields: all of NumPy, or all of JAX.

    Raises:
      ValueError: if a field does not have 1, 2 or 4 bytes.
    """
    words = []
    for places in _shared([field.dtype for field in fields]):
        word: Any = None
        for index, shift in places:
            bits = _view(fields[index], f"uint{8 * fields[index].dtype.itemsize}")
            part = bits.astype(np.uint32) << np.uint32(shift)
            word = part if word is None else word | part
        words.append(word)
    return words


def from_words(words: Sequence[Any], dtypes: Sequence[Any]) -> list[Any]:
    """Inverse of `to_words`.

    Args:
      words: as `to_words` returned them.
      dtypes: of the fields.
    """
    fields: list[Any] = [None] * len(dtypes)
    for word, places in zip(words, _shared(dtypes), strict=True):
        for index, shift in places:
            size = 8 * np.dtype(dtypes[index]).itemsize
            bits = (word >> np.uint32(shift)).astype(f"uint{size}")
            fields[index] = _view(bits, dtypes[index])
    return fields


def _shared(dtypes: Sequence[Any]) -> list[list[tuple[int, int]]]:
    """The fields of each word: index, and by how many bits it is shifted."""
    sizes = [np.dtype(dtype).itemsize for dtype in dtypes]
    if not set(sizes) <= {1, 2, 4}:
        raise ValueError(f"fields must have 1, 2 or 4 bytes; got {list(dtypes)}")
    words = []
    for size in (4, 2, 1):
        of = [index for index, own in enumerate(sizes) if own == size]
        for first in range(0, len(of), 4 // size):
            members = of[first : first + 4 // size]
            words.append([(index, 8 * size * n) for n, index in enumerate(members)])
    return words


def _view(array: Any, dtype: Any) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, dtype)
    if not isinstance(array, jax.Array):
        return np.asarray(array).view(dtype)
    with jax.debug_nans(False):
        return jax.lax.bitcast_convert_type(array, dtype)
