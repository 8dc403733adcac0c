"""What a loss may return, and the default loss of classification.

Shapes are static, so they are checked while JAX traces the loss: in every step, tick
and evaluation, under `jax.jit` too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from esper_jax.train.batches import DataError

__all__ = ["Result", "classification", "common_rows", "read_loss", "read_objective"]


class Result(NamedTuple):
    """Loss and score of one batch."""

    loss: Float[Array, "*N"]
    """One number for each row, or a single one for the batch."""
    score: Float[Array, "*M"]
    """The like; NaN if there is none."""
    weight: Float[Array, ""] | None
    """How much the batch counts beside others; None for the number of its rows."""
    aux: Any = None
    """What was returned beside the loss, as it came."""


def classification(
    logits: Float[Array, "*B N"], labels: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Softmax cross-entropy in nats, and whether the largest logit is the label's.

    A label outside of 0 to N - 1 gives NaN. `build` refuses it before that wherever it
    can see the values: `jax.jit` traces have none.

    Raises:
      DataError: if ``labels`` are no integers, or not one for each row (or token) of
        the logits.
    """
    shape, dtype = jnp.shape(labels), jnp.result_type(labels)
    rows, classes = logits.shape[:-1], logits.shape[-1:]
    if not classes:
        raise ValueError(
            "outputs must be logits with the classes on the last axis for the loss "
            "classification; got a single number. Give build another loss="
        )
    if shape != rows or not jnp.issubdtype(dtype, jnp.integer):
        raise DataError(
            f"labels must be integers of shape {rows}, one class for each row of the "
            f"outputs {logits.shape}; got {dtype} of shape {shape}. "
            + _advice(shape, rows, classes, dtype)
        )
    loss = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32),
        # Below 0 an index would count from the end; beyond the end it gives NaN.
        jnp.where(labels < 0, classes[0], labels),
    )
    return loss, (jnp.argmax(logits, -1) == labels).astype(jnp.float32)


def _advice(
    shape: tuple[int, ...], rows: tuple[int, ...], classes: tuple[int, ...], dtype: Any
) -> str:
    """What to do about labels of a shape or dtype that does not fit."""
    if shape == (*rows, *classes) and classes != (1,):
        return "Turn one-hot labels into classes with argmax(-1)"
    if shape == (*rows, 1):
        return "Take the last axis away with labels[..., 0]"
    if shape == rows:
        return f"Cast them with astype(int), or give build another loss= for {dtype}"
    return "Give one label for each, or give build another loss="


def common_rows(tree: Any) -> int | None:
    """Rows of a pytree of arrays: the length of the first axis that all share."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    return lengths.pop()[0] if len(lengths) == 1 and lengths != {()} else None


def read_loss(result: Any, rows: int | None) -> Result:
    """What ``loss(outputs, y)`` returned, checked.

    Args:
      result: ``loss`` or ``(loss, score)``. Each is one number a row, several a row
        (pixels, tokens), whose mean is taken, or a single number.
      rows: of the batch; None if it has no such number.

    Raises:
      ValueError: if it is something else.
    """
    pair = result if isinstance(result, tuple) else (result, None)
    if len(pair) != 2 or not jax.tree_util.all_leaves([pair[0]]):
        raise ValueError(
            "loss must return the loss, or the tuple (loss, score), each one number a "
            f"row or a single one; got {_described(result)}. To return other values, "
            "give build objective=f, where f(model, batch) returns (loss, aux)"
        )
    return _checked("loss", pair[0], pair[1], None, rows)._replace(aux=pair[1])


def read_objective(result: Any, rows: int | None) -> Result:
    """What ``objective(model, batch)`` returned, checked.

    Args:
      result: ``loss`` or ``(loss, aux)``. Of ``aux``, a mapping's ``"score"`` and
        ``"weight"`` are read.
      rows: of the batch; None if it has no such number.

    Raises:
      ValueError: if it is something else.
    """
    pair = result if isinstance(result, tuple) else (result, None)
    if len(pair) != 2 or not jax.tree_util.all_leaves([pair[0]]):
        raise ValueError(
            "objective must return the loss, or the tuple (loss, aux), where the loss "
            f"is one number a row or a single one; got {_described(result)}"
        )
    aux = pair[1] if isinstance(pair[1], dict) else {}
    weight = aux.get("weight")
    if weight is not None:
        weight = jnp.asarray(weight, jnp.float32)
        if weight.ndim or jnp.ndim(pair[0]):
            raise ValueError(
                "objective's weight must be a single number beside a loss that is a "
                f"single number; got shapes {weight.shape} and {jnp.shape(pair[0])}. "
                "Return the weighted mean as the loss, and the sum of the weights"
            )
    found = _checked("objective", pair[0], aux.get("score"), weight, rows)
    return found._replace(aux=pair[1])


def _checked(
    name: str, loss: Any, score: Any, weight: Array | None, rows: int | None
) -> Result:
    loss = jnp.asarray(loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"{name} must return a loss of floating point; got {loss.dtype}, which has "
            "no gradient"
        )
    loss = _by_row(f"{name} must return a loss", loss, rows)
    if score is None:
        # From the loss, so that it varies over devices as the loss does.
        return Result(loss, jnp.full_like(loss, jnp.nan) + 0 * loss, weight)
    if not jax.tree_util.all_leaves([score]):
        raise ValueError(
            f"{name} must return a score of one number a row, or a single number; got "
            f"{_described(score)}"
        )
    score = jnp.asarray(score)
    if not jnp.issubdtype(score.dtype, jnp.floating):
        score = score.astype(jnp.float32)
    return Result(loss, _by_row(f"{name} must return a score", score, rows), weight)


def _by_row(name: str, value: Array, rows: int | None) -> Array:
    """The mean of each row, or the single number of the batch.

    Args:
      name: how an error message begins: who must return what.
      value: loss or score.
      rows: of the batch; None if it has no such number.
    """
    if value.ndim and rows is not None and value.shape[0] != rows:
        raise ValueError(
            f"{name} with the {rows} rows of the batch on its first axis, or a single "
            f"number; got shape {value.shape}. Reshape it to ({rows}, ...) or take its "
            "mean"
        )
    if value.size == 0:
        raise ValueError(f"{name} of at least one number; got shape {value.shape}")
    return (
        jnp.mean(value, axis=tuple(range(1, value.ndim))) if value.ndim > 1 else value
    )


def _described(result: Any) -> str:
    """A value's type, and the shapes in it, in a few words."""
    shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(result)[:4])
    length = f" of {len(result)}" if isinstance(result, tuple | list | dict) else ""
    return f"a {type(result).__name__}{length} with shapes {shapes or 'none'}"
