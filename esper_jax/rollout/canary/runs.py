"""What a run of ``esper-jax train`` tells a canary, from the records in its folder."""

import statistics
from pathlib import Path
from typing import Any

from esper_jax.rollout.canary.plan import CanaryError
from esper_jax.run.folder import RunFolder, read_config, read_json, read_lines
from esper_jax.train.faults import Fault

__all__ = ["arm_of", "observation_of"]

_NOT_FINITE = {
    fault.name
    for fault in (
        Fault.TRAIN_LOSS,
        Fault.GRADIENTS,
        Fault.VALUES,
        Fault.HELD_OUT_LOSS,
    )
}


def arm_of(folder: Path, flag: str) -> str:
    """The arm of a run: ``candidate`` if it began with the feature of a flag.

    Raises:
      RunError: if the folder holds no run.
      CanaryError: if the run's config does not say.
    """
    run = RunFolder(folder)
    read_config(run)
    value = dict(read_json(run.config).get("features", {})).get(flag)
    if value is None:
        raise CanaryError(
            f"{folder}: its config says nothing of {flag}: name the arm that it "
            "belongs to with --arm candidate or --arm baseline"
        )
    return "candidate" if value else "baseline"


def observation_of(folder: Path, arm: str, *, failed: bool = False) -> dict[str, Any]:
    """One observation of a run: a run is one draw of its arm, however many its ticks.

    - ``error``: it failed, or its governor went back;
    - ``nan``: a loss, a gradient or a value was not finite, also in a run that goes on;
    - ``latency``: the median of ``esper_step_seconds`` in ``metrics.jsonl``, without
      the first tick, which compiles;
    - ``accuracy``: on test data, if it is a share.

    Args:
      folder: of the run.
      arm: ``candidate`` or ``baseline``.
      failed: whether a run without a summary has failed; else it still goes on.

    Returns:
      The observation; an empty one of a run that goes on and has no NaN.

    Raises:
      RunError: if the folder holds no run, or its records are damaged.
    """
    run = RunFolder(folder)
    read_config(run)
    ticks = read_lines(run.ticks, {"tick": int})
    rollbacks = read_lines(run.rollbacks, {"number": int})
    over = run.summary.exists()
    found: dict[str, Any] = {"arm": arm, "run": str(folder.expanduser().resolve())}
    if any(
        tick.get(name, 0.0) is None for tick in ticks for name in ("train_loss", "loss")
    ) or any(each.get("fault") in _NOT_FINITE for each in rollbacks):
        found["nan"] = True
    elif not over and not failed:
        return {}
    found["error"] = not over or bool(rollbacks)
    seconds = [
        line["esper_step_seconds"]
        for line in read_lines(run.metrics)[1:]
        if line.get("esper_step_seconds") is not None
    ]
    if seconds:
        found["latency"] = statistics.median(seconds)
    accuracy = read_json(run.summary).get("final_accuracy") if over else None
    if accuracy is not None and 0 <= accuracy <= 1:
        found["accuracy"] = accuracy
    return found
