"""The writers of a run: looked at before it begins, opened when it trains."""

import dataclasses
import importlib.util

import jax

from esper_jax.growth.state import TrainState
from esper_jax.monitor.config import NEEDED, MonitorConfig
from esper_jax.monitor.monitor import Monitor
from esper_jax.monitor.prometheus import Prometheus, why_not_listen
from esper_jax.monitor.protocol import Writer
from esper_jax.monitor.writers import JsonLines, TensorBoard, WeightsAndBiases
from esper_jax.run.config import ConfigError, RunConfig
from esper_jax.run.folder import RunError
from esper_jax.run.session import Session

__all__ = ["check_writers", "open_monitor"]

PATIENCE = 5.0
"""Seconds that the end of a run waits for its writers."""


def check_writers(run: RunConfig) -> None:
    """Refuses writers that cannot work here. Process 0 alone has them.

    Raises:
      ConfigError: naming what is not installed, or where nobody can listen.
    """
    if jax.process_index():
        return
    config = _allowed(run)
    for name in config.writers:
        module, install = NEEDED[name] or ("json", "")
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"monitor.writers: {name!r} needs {module}, which is not installed: "
                f"pip install '{install}', or leave it out"
            )
    if "prometheus" in config.writers:
        why = why_not_listen(config.address, config.port)
        if why:
            raise ConfigError(_cannot_listen(config, why))


def _allowed(run: RunConfig) -> MonitorConfig:
    """The monitor of a run, without writers where a feature forbids them."""
    if run.features.performance_monitoring:
        return run.monitor
    return dataclasses.replace(run.monitor, writers=())


def _cannot_listen(config: MonitorConfig, why: str) -> str:
    return (
        "monitor.port, monitor.address: expected a free port of this machine, got "
        f"{config.port} at {config.address!r} ({why}). Choose another, or 0 for any "
        "port that is free"
    )


def open_monitor(session: Session, state: TrainState) -> tuple[Monitor, list[str]]:
    """The monitor of a run that goes on from a state, and lines that tell of it.

    Raises:
      RunError: if a writer cannot be opened.
    """
    config = _allowed(session.config)
    writers: list[Writer] = []
    told = []
    if not jax.process_index():
        for name in config.writers:
            try:
                writer = _opened(name, session, int(state.step))
            except (OSError, ImportError) as error:
                for other in writers:
                    other.close()
                if name == "prometheus":
                    raise RunError(_cannot_listen(config, str(error))) from None
                raise RunError(
                    f"the writer {name} of monitor.writers cannot begin: {error}. Mend "
                    "that, or leave it out"
                ) from None
            writers.append(writer)
            if isinstance(writer, Prometheus):
                told.append(f"metrics are at {writer.url}")
    monitor = Monitor(
        writers,
        lifecycle_config=session.program.gates,
        patience=PATIENCE,
        after=int(state.step),
    )
    return monitor, told


def _opened(name: str, session: Session, step: int) -> Writer:
    folder, config = session.folder, session.config.monitor
    match name:
        case "jsonl":
            return JsonLines(folder.metrics, after=step)
        case "tensorboard":
            return TensorBoard(folder.tensorboard, after=step)
        case "prometheus":
            return Prometheus(config.port, config.address)
        case "wandb":
            return WeightsAndBiases(
                project=config.project,
                dir=str(folder.path),
                id=session.record.id,
                name=folder.path.name,
                resume="allow",
            )
    raise AssertionError(name)  # the config refuses it
