"""The digits, with rows that a file says are bad: data as they change under a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from esper_jax.data import Dataset
from esper_jax.data import digits as sound

__all__ = ["digits"]


def digits(*, name: str, file: str, seed: int = 0) -> Dataset:
    """The digits; ``data.factory`` of the runs whose data go bad.

    Args:
      name: what the config says beside the factory; of no use here.
      file: JSON of ``part`` (``train`` or ``held_out``), ``fault``, ``row``; without
        it the data are sound.
      seed: draws the split.
    """
    data = sound(seed)
    if not Path(file).exists():
        return data
    bad = json.loads(Path(file).read_text())
    x, y = (np.array(a) for a in getattr(data, bad["part"]))
    return data._replace(**{bad["part"]: _damaged(x, y, bad["fault"], bad["row"])})


def _damaged(x: Any, y: Any, fault: str, row: int) -> tuple[Any, Any]:
    if fault in ("nan", "inf"):
        x[row, row % x.shape[1]] = float(fault)
    elif fault in ("-1", "10", "2000000000"):
        y[row] = int(fault)
    elif fault == "float":
        y = y.astype(np.float32)
    elif fault == "fewer":
        y = y[:-1]
    elif fault == "column":
        y = y[:, None]
    else:
        raise ValueError(f"fault must be one of those above, got {fault!r}")
    return x, y
