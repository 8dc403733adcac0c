"""A static twin of a grown run: what the same parameters are worth without growth."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from esper_jax.data import Dataset
from esper_jax.policy.config import ControllerConfig
from esper_jax.run.config import RunConfig
from esper_jax.train.scan import scan_fit

__all__ = ["train_static", "twin"]


def twin(config: RunConfig, data: Dataset, parameters: int) -> RunConfig:
    """The config of a run with a wider host, of at least so many parameters, in which
    nothing grows: its layers are widened alike."""
    inputs = data.train[0].shape[-1]
    hidden = config.model.hidden
    for step in itertools.count():
        widths = tuple(w + round(step * w / max(hidden)) for w in hidden)
        sizes = [inputs, *widths, data.num_classes]
        if sum((a + 1) * b for a, b in itertools.pairwise(sizes)) >= parameters:
            break
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hidden=widths),
        growth=dataclasses.replace(
            config.growth, num_seeds=1, capacity=1, blueprints=("noop",)
        ),
        controller=ControllerConfig(enabled=False),
    )


def train_static(
    config: RunConfig, data: Dataset, parameters: int, build_run: Any
) -> dict[str, Any]:
    """Trains the twin of a run on the same rows in the same order.

    Args:
      config: of the grown run.
      data: its data.
      parameters: that the twin has at least.
      build_run: `run.build_run`.

    Returns:
      ``widths``, ``parameters``, ``accuracy`` and ``loss`` on test data, and
      ``history``: held-out accuracy after each tick.
    """
    static = twin(config, data, parameters)
    program = build_run(static, data)
    train, held_out, test = jax.tree.map(
        jnp.asarray, (data.train, data.held_out, data.test)
    )
    run = jax.jit(
        functools.partial(
            scan_fit,
            program,
            data=train,
            held_out=held_out,
            ticks=static.train.ticks,
            batch_size=static.train.batch_size,
            seed=static.seed,
        ),
        donate_argnums=0,
    )
    state, report = run(program.init(jax.random.key(static.seed)))
    loss, accuracy = program.evaluate(state, test)
    return {
        "widths": list(static.model.hidden),
        "parameters": sum(int(p.size) for p in state.params.values()),
        "accuracy": float(accuracy),
        "loss": float(loss),
        "history": [float(a) for a in report.ticks.accuracy],
    }
