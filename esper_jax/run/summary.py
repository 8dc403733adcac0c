"""What a run leaves behind when it has ended."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from esper_jax.blueprints import living_parameters, param_counts
from esper_jax.data import Dataset
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.state import coefficients
from esper_jax.monitor import plot
from esper_jax.monitor.words import why
from esper_jax.parallel.processes import together
from esper_jax.run.compare import train_static
from esper_jax.run.folder import RunError, finite_or_none, read_lines, write_json
from esper_jax.run.session import Session
from esper_jax.train.batches import is_iterable, stack
from esper_jax.train.program import Program
from esper_jax.trees import state_hash

__all__ = ["conclude", "test_result"]


def conclude(
    session: Session, state: TrainState, lost: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the summary, and beside it what ``compare`` asks for.

    Args:
      session: of the run.
      state: that it ended with.
      lost: what the monitor's writers lost, by writer.

    Raises:
      RunError: if that fails; in all processes.
    """
    summary = _summary(session, state)
    if lost:
        summary["monitor_lost"] = dict(lost)
    if session.config.compare.static:
        parameters = summary["host_params"] + summary["grown_params"]
        summary["static"] = train_static(session.config, session.data, parameters)
    together(lambda: _write(session, summary), RunError)
    return summary


def _write(session: Session, summary: dict[str, Any]) -> None:
    folder = session.folder
    if session.config.compare.plot and not jax.process_index():
        plot.accuracy(
            folder.picture,
            read_lines(folder.ticks),
            summary["events"],
            summary.get("static"),
            note="; ".join(session.missing),
        )
    write_json(folder.summary, summary)


def _summary(session: Session, state: TrainState) -> dict[str, Any]:
    program, log = session.program, session.log
    loss, accuracy = test_result(program, state, session.data)
    lost = {"incomplete": list(session.missing)} if session.missing else {}
    return lost | {
        "final_accuracy": accuracy,
        "final_loss": loss,
        "state_hash": state_hash(state),
        "host_params": _host_params(session, state),
        "grown_params": _grown_params(program, state),
        "recompiles": program.recompiles(),
        "rollbacks": log.rollbacks,
        "controller": why(int(state.memory.reason)),
        "events": log.events,
    }


def _host_params(session: Session, state: TrainState) -> int:
    """Parameters of the host, frozen ones too."""
    params: Any = state.params
    if session.config.train.frozen:
        params = nnx.to_pure_dict(nnx.state(session.program.model(state), nnx.Param))
    return sum(int(np.size(p)) for p in jax.tree.leaves(params))


def _grown_params(program: Program, state: TrainState) -> int:
    """Parameters of the blueprints that count in the output."""
    total = 0
    for name, seeds in state.seeds.items():
        costs = param_counts(program.kinds[name], program.layouts[name].sizes)
        alpha, _ = coefficients(seeds)
        own = living_parameters(costs, seeds.blueprint, alpha != 0)
        total += int(np.asarray(own).sum())
    return total


def test_result(
    program: Program, state: TrainState, data: Dataset
) -> tuple[float | None, float | None]:
    """Loss and accuracy on the test data, as JSON can hold them."""
    test = data.test
    if is_iterable(test):
        test = stack("test", test, program.check)
    loss, accuracy = program.evaluate(state, program.place("test", test, True))
    return finite_or_none(loss), finite_or_none(accuracy)
