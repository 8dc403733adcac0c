"""Metrics by name: any number that a run writes into its folder.

=================================  ==================================================
``final_loss``, ``rollbacks``      a key of ``summary.json``, those inside of others
                                   after a dot (``static.accuracy``); a list counts
``ticks:loss``                     a key of ``ticks.jsonl``, at the last tick
``metrics:esper_blended_seeds``    a series of ``metrics.jsonl``, at the last tick
``metrics:esper_seeds/TRAINING``   with a label, the value of one label
``ticks:loss:min``                 another summary of all ticks, one of `HOW`
=================================  ==================================================
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.monitor.series import SERIES
from esper_jax.run.config import ConfigError, RunConfig
from esper_jax.run.folder import RunFolder, read_json, read_lines
from esper_jax.train.faults import Fault

__all__ = ["HOW", "Metric", "parse_metric", "read_metric"]

HOW: Mapping[str, Callable[[np.ndarray], Any]] = {
    "last": lambda values: values[-1],
    "first": lambda values: values[0],
    "min": np.min,
    "max": np.max,
    "mean": np.mean,
    "median": np.median,
    "sum": np.sum,
}
"""What one number is made of the values of all ticks."""

_SUMMARY = (
    "final_accuracy",
    "final_loss",
    "host_params",
    "grown_params",
    "recompiles",
    "rollbacks",
    "events",
)
_STATIC = ("static.accuracy", "static.loss", "static.parameters")
_TICKS = ("train_loss", "loss", "accuracy")
_LABELS = {series.name: series.label for series in SERIES}

_KNOWN: Mapping[str, Any] = {
    "stage": Stage,
    "to": Stage,
    "outcome": Outcome,
    "fault": Fault,
}
"""Labels whose values have names. ``metrics.jsonl`` leaves out those that are 0."""


class Metric(NamedTuple):
    """Where a metric stands in the folder of a run."""

    name: str
    """As it was asked for."""
    file: str
    """``summary``, ``ticks`` or ``metrics``: of `RunFolder`."""
    path: tuple[str, ...]
    """Keys, from the outermost on."""
    how: str
    """One of `HOW`."""
    absent: float
    """What it is where its key is left out."""


def parse_metric(name: str, configs: Sequence[RunConfig]) -> Metric:
    """Finds out what a name means, before any run.

    Args:
      name: as the module's table has it.
      configs: of the runs that are to write it.

    Raises:
      ConfigError: if no run writes it, or one of these will not.
    """
    where, colon, rest = name.partition(":")
    if not colon:
        _among(name, name, (*_SUMMARY, *_STATIC))
        if name in _STATIC and not all(c.compare.static for c in configs):
            raise ConfigError(
                f"--metric {name}: expected compare.static = true in both configs"
            )
        return Metric(name, "summary", tuple(name.split(".")), "last", math.nan)
    _among(name, where, ("ticks", "metrics"))
    key, _, how = rest.partition(":")
    how = how or "last"
    _among(name, how, HOW)
    series, slash, label = key.partition("/")
    if where == "ticks":
        _among(name, key, _TICKS)
        return Metric(name, where, (key,), how, math.nan)
    _among(name, series, _LABELS)
    kind = _LABELS[series]
    if bool(kind) != bool(slash and label):
        form = f"metrics:{series}" + (f"/{kind.upper()}" if kind else "")
        raise ConfigError(f"--metric {name}: expected the form {form}")
    if not all(
        "jsonl" in c.monitor.writers and c.features.performance_monitoring
        for c in configs
    ):
        raise ConfigError(
            f"--metric {name}: expected 'jsonl' in monitor.writers of both configs, "
            "which writes metrics.jsonl, and features.performance_monitoring on"
        )
    if not label:
        return Metric(name, where, (series,), how, math.nan)
    if kind in _KNOWN:
        _among(name, label, [code.name for code in _KNOWN[kind]])
    absent = 0.0 if kind in _KNOWN else math.nan
    return Metric(name, where, (series, label), how, absent)


def read_metric(metric: Metric, folder: RunFolder) -> float:
    """The metric of a run that has ended; NaN if it is not finite or not measured.

    Ticks before the first with a value do not count (no time was measured before the
    first); one without a value after it makes the metric NaN.

    Raises:
      RunError: if a file is damaged.
    """
    if metric.file == "summary":
        value = _at(read_json(folder.summary), metric)
        return _number(len(value) if isinstance(value, list) else value)
    lines = read_lines(getattr(folder, metric.file))
    values = [_number(_at(line, metric)) for line in lines]
    known = [number for number, value in enumerate(values) if not math.isnan(value)]
    if not known:
        return math.nan
    return float(HOW[metric.how](np.array(values[known[0] :])))


def _at(table: Any, metric: Metric) -> Any:
    """What stands at the metric's path."""
    for depth, key in enumerate(metric.path):
        if not isinstance(table, Mapping):
            return None
        # A run writes a series in every line, or not at all.
        table = table.get(key, metric.absent if depth else None)
    return table


def _number(value: Any) -> float:
    """A number of JSON; NaN where there is none, or it is not finite."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return math.nan


def _among(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ConfigError(
            f"--metric {name:.80}: expected one of {', '.join(choices)}; got "
            f"{value!r:.80}"
        )
