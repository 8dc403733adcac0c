"""The static twin of a grown run: what the same parameters give without growth."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from esper_jax.data import Dataset
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.trial_config import TrialConfig
from esper_jax.run.build import build_run
from esper_jax.run.config import RunConfig
from esper_jax.train.scan import scan_fit

__all__ = ["train_static", "twin"]


def twin(config: RunConfig, data: Dataset, parameters: int) -> RunConfig:
    """The config of a run with a wider host in which nothing grows.

    Widens all hidden layers in proportion, by the smallest step that gives the host at
    least ``parameters`` parameters.
    """
    inputs = data.train[0].shape[-1]
    hidden, classes = config.model.hidden, data.num_classes
    assert classes is not None  # as the built-in model needs them
    for step in itertools.count():
        widths = tuple(w + round(step * w / max(hidden)) for w in hidden)
        if _mlp_parameters([inputs, *widths, classes]) >= parameters:
            break
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hidden=widths),
        growth=dataclasses.replace(
            config.growth, num_seeds=1, capacity=1, blueprints=("noop",)
        ),
        policy="heuristic",
        trial=TrialConfig(),
        controller=ControllerConfig(enabled=False),
    )


def _mlp_parameters(sizes: Sequence[int]) -> int:
    """Weights and biases of an MLP with these widths, input and output included."""
    return sum((a + 1) * b for a, b in itertools.pairwise(sizes))


def train_static(config: RunConfig, data: Dataset, parameters: int) -> dict[str, Any]:
    """Trains the twin of a run on the same rows in the same order.

    Args:
      config: of the grown run.
      data: of the grown run.
      parameters: the twin gets at least as many.

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
