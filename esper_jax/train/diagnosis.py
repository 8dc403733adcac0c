"""What is said about a tick that broke, read from state and data on the host."""

from typing import Any

import jax
import numpy as np

from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.train.batches import Batches
from esper_jax.train.faults import Fault, GovernorConfig, first_wrong, infinite_leaves

__all__ = ["bad_rows", "explain_fault", "explain_loss"]


def explain_fault(
    fault: Fault,
    state: TrainState,
    report: TickReport,
    config: GovernorConfig,
    num_classes: int | None,
    infinite: frozenset[str],
) -> str:
    """The fault in words, with its numbers; reads the state on the host."""
    train, held_out = float(report.train_loss), float(report.loss)
    if fault == Fault.TRAIN_LOSS:
        return f"the train loss is {train:g}"
    if fault == Fault.GRADIENTS:
        return "the host's gradient is not finite"
    if fault == Fault.VALUES:
        return first_wrong(state, infinite) or "a value is not finite"
    if fault == Fault.HELD_OUT_LOSS:
        return f"the held-out loss is {held_out:g}"
    if fault == Fault.JUMP:
        median = np.nanmedian(np.asarray(state.governor.losses), axis=0)
        return (
            f"the loss jumped by more than {config.deviations:g} deviations: "
            f"train {train:.4g} (median {median[0]:.4g}), "
            f"held-out {held_out:.4g} (median {median[1]:.4g})"
        )
    best = np.asarray(state.governor.best)
    return (
        f"the loss fell back to chance, ln {num_classes}: "
        f"train {train:.4g} (lowest {best[0]:.4g}), "
        f"held-out {held_out:.4g} (lowest {best[1]:.4g})"
    )


def explain_loss(
    state: TrainState, report: TickReport, data: Any, held_out: Any
) -> str:
    """What is known about a loss that is not finite; reads the state on the host.

    Args:
      state: after the tick.
      report: of the tick.
      data: arrays that were trained on; None for an iterable of batches.
      held_out: what the held-out loss is measured on.
    """
    losses = {"train": float(report.train_loss), "held-out": float(report.loss)}
    found = [f"the {k} loss is {v:g}" for k, v in losses.items() if not np.isfinite(v)]
    grad_norm = next(iter(report.layers.values())).signals.grad_norm
    if not np.isfinite(grad_norm):
        found.append("the host's gradient is not finite")
    wrong = first_wrong(state, infinite_leaves(state))
    if wrong:
        found.append(wrong)
    rows = bad_rows(data, "training") + bad_rows(held_out, "held-out")
    return ", ".join(found) + rows


def bad_rows(data: Any, name: str) -> str:
    """Says which rows of arrays training cannot use, if any.

    Those hold values that are not finite in the precision that JAX computes with, or
    a label below 0.

    Args:
      data: arrays, rows first; `Batches`, whose rows have lost their numbers; or None.
      name: of the data.
    """
    leaves = [leaf for leaf in jax.tree.leaves(data) if np.ndim(leaf)]
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        return ""
    kinds = [("NaN or infinity", leaves, _overflows)]
    if isinstance(data, tuple) and len(data) == 2:
        kinds.append(("labels below 0", jax.tree.leaves(data[1]), _negative))
    said = ""
    for kind, arrays, wrong in kinds:
        flags = [wrong(np.asarray(leaf)) for leaf in arrays]
        bad = sorted({int(row) for flag in flags for row in np.flatnonzero(flag)})
        if bad and isinstance(data, Batches):
            said += f". The {name} data holds {kind} in some batches: remove them"
        elif bad:
            said += f". The {name} data holds {kind} in {len(bad)} rows, the "
            said += f"first is row {bad[0]}: remove them"
    return said


def _overflows(leaf: np.ndarray) -> np.ndarray:
    """Rows of an array that hold NaN or infinity once they are on a device."""
    if not np.issubdtype(leaf.dtype, np.inexact):
        return np.zeros(len(leaf), bool)
    with np.errstate(over="ignore"):
        leaf = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
    return np.asarray(~np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1))


def _negative(leaf: np.ndarray) -> np.ndarray:
    """Rows of an array of whole numbers that hold one below 0."""
    if not np.issubdtype(leaf.dtype, np.signedinteger):
        return np.zeros(len(leaf), bool)
    return np.asarray((leaf.reshape(len(leaf), -1) < 0).any(axis=1))
