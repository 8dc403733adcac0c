"""What a run shows to people: writers, words, a live view, a picture."""

from pathlib import Path

from esper_jax.monitor.monitor import Monitor
from esper_jax.monitor.prometheus import Prometheus
from esper_jax.monitor.protocol import Record, Writer
from esper_jax.monitor.series import SERIES, Series
from esper_jax.monitor.writers import JsonLines, TensorBoard, WeightsAndBiases

__all__ = [
    "DASHBOARDS",
    "SERIES",
    "JsonLines",
    "Monitor",
    "Prometheus",
    "Record",
    "Series",
    "TensorBoard",
    "WeightsAndBiases",
    "Writer",
]

DASHBOARDS = Path(__file__).parent / "dashboards"
"""Holds ``grafana.json`` and the alert rules ``alerts.yml`` for Prometheus."""
