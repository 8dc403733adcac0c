"""The loop of training: generations, a line of each, and saves that can be resumed."""

import concurrent.futures
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esper_jax.learning import evolution
from esper_jax.learning.config import EvolutionConfig, PolicyConfig
from esper_jax.learning.episodes import Episodes, Player, growing_nothing, plays
from esper_jax.learning.evolution import Evolution
from esper_jax.learning.report import read_config, read_training
from esper_jax.learning.tasks import draw_tasks, load_digits_task
from esper_jax.monitor.curves import Curve
from esper_jax.policy import network
from esper_jax.policy.learned_file import (
    NUM_FEATURES,
    safetensors_numpy,
    write_policy,
)
from esper_jax.run.folder import RunError
from esper_jax.run.references import ConfigError

__all__ = ["Trainer", "curves_of", "train_policy"]


class Trainer:
    """The generations of a config.

    Args:
      config: what to train on, and how.
      player: makes a policy of a candidate's numbers; by default a network.
      numbers: to begin with; by default random weights.
      nothing: from numbers to those under which nothing grows.
    """

    def __init__(
        self,
        config: PolicyConfig,
        player: Player = plays,
        numbers: Any = None,
        nothing: Callable[[Any], Any] = growing_nothing,
    ) -> None:
        self.config = config
        if numbers is None:
            key = jax.random.key(config.seed)
            numbers = network.init_weights(key, NUM_FEATURES)
        self.state = evolution.begin(numbers, config.evolution)
        self._digits = jax.tree.map(jnp.asarray, load_digits_task())
        self._nothing = nothing
        self._episodes = [Episodes(f, player, numbers) for f in config.families]
        self._candidates = jax.jit(self._drawn)
        self._improved = jax.jit(
            lambda s, n, r: evolution.improved(s, n, r, config.evolution)
        )
        self._runs: list[Any] = []

    def compile(self) -> None:
        """Compiles the families' programs, side by side."""
        key = jax.random.key(0)
        args = [self._drawn_for(i, key) for i in range(len(self._episodes))]
        many, _ = self._candidates(self.state, key)
        traced = [
            jax.jit(_rated_by(episodes, self.config.evolution)).lower(many, tasks)
            for episodes, tasks in zip(self._episodes, args, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            self._runs = list(pool.map(lambda t: t.compile(), traced))

    def generation(self) -> dict[str, float]:
        """Goes through a generation; returns what to write down of it."""
        if not self._runs:
            self.compile()
        number = int(self.state.generation)
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        first, *others = jax.random.split(key, 1 + len(self._episodes))
        many, noise = self._candidates(self.state, first)
        found = [
            run(many, self._drawn_for(i, k))
            for i, (run, k) in enumerate(zip(self._runs, others, strict=True))
        ]
        scores = np.concatenate([np.asarray(score) for score, _ in found], axis=1)
        ranks = evolution.fitness(jnp.asarray(scores[:-2]))
        self.state = self._improved(self.state, noise, ranks)
        mine, none = scores[-2], scores[-1]
        told = np.concatenate([np.asarray(more) for _, more in found], axis=2)
        gain = mine - none
        return {
            "generation": number + 1,
            "reward": float(mine.mean()),
            "baseline": float(none.mean()),
            "gain": float(gain.mean()),
            "gain_error": float(gain.std() / np.sqrt(max(1, gain.size - 1))),
            "population": float(np.nanmean(scores[:-2]) - none.mean()),
            "births": float(told[0, -2].mean()),
            "parameters": float(told[1, -2].mean()),
        }

    def _drawn(self, state: Evolution, key: Array) -> tuple[Any, Any]:
        """Candidates with one more in which nothing grows, spread over the devices."""
        many, noise = evolution.candidates(state, key, self.config.evolution)
        none = self._nothing(state.mean)
        many = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), many, none)
        return jax.lax.with_sharding_constraint(many, _divided(many)), noise

    def _drawn_for(self, family: int, key: Array) -> Any:
        config = self.config
        draw = _draw(config.families[family], config.evolution.tasks)
        return draw(key, self._digits)


def _draw(family: Any, count: int) -> Any:
    if (family, count) not in _DRAWS:
        _DRAWS[family, count] = jax.jit(
            lambda key, digits: draw_tasks(key, family, digits, count)
        )
    return _DRAWS[family, count]


_DRAWS: dict[Any, Any] = {}


def _divided(many: Any) -> jax.sharding.NamedSharding:
    """Candidates divided among all devices, if their number allows it."""
    devices = jax.devices()
    count = len(jax.tree.leaves(many)[0])
    devices = devices if count % len(devices) == 0 else devices[:1]
    mesh = jax.sharding.Mesh(np.asarray(devices), ("candidates",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("candidates"))


def _rated_by(
    episodes: Episodes, config: EvolutionConfig
) -> Callable[[Any, Any], tuple[Array, Array]]:
    """From candidates and tasks to scores (M, T), and births and parameters (2, M, T).

    The score is the accuracy at the end, less the rent of what lives.
    """

    def rated(many: Any, tasks: Any) -> tuple[Array, Array]:
        result = episodes(many, tasks)
        score = result.accuracy - config.rent * result.parameters
        births = result.births.astype(jnp.float32)
        return score, jnp.stack([births, result.parameters])

    return rated


def train_policy(
    config: PolicyConfig,
    out: Path,
    *,
    minutes: float = float("inf"),
    command: str = "",
    tell: Callable[[str], None] = print,
) -> Path:
    """Trains a policy, or goes on with its training.

    The folder gets ``config.json``, ``metrics.jsonl`` with a line of each generation,
    ``state.safetensors`` to go on from, and ``policy.safetensors``.

    Args:
      config: what to train on, and how. Of a folder that was begun, only
        ``evolution.generations`` and ``evolution.every`` may differ.
      out: the folder.
      minutes: after which no further generation begins; compiling counts.
      command: what the policy's file says made it.
      tell: is given a line of each generation.

    Returns:
      The policy's file.

    Raises:
      ConfigError: if ``minutes`` is not above 0.
      PolicyFileError: if safetensors is not installed.
      RunError: if the folder holds the training of another config, or is damaged; if
        no generation began in time.
    """
    begun = time.monotonic()
    safetensors_numpy()  # before hours of training
    if not minutes > 0:
        raise ConfigError(f"minutes must be above 0, got {minutes!r}")
    out.mkdir(parents=True, exist_ok=True)
    _same_config(config, out)
    trainer = Trainer(config)
    kept, policy = out / "state.safetensors", out / "policy.safetensors"
    if kept.exists():
        trainer.state = _read_state(kept, trainer.state)
        tell(f"goes on after generation {int(trainer.state.generation)}")
    _forget_after(out, int(trainer.state.generation))

    def save() -> None:
        _write_state(kept, trainer.state)
        done = int(trainer.state.generation)
        write_policy(
            policy,
            jax.device_get(trainer.state.mean),
            command=command,
            seed=config.seed,
            generations=done,
            config=dataclasses.asdict(config),
            jax=jax.__version__,
            device=jax.devices()[0].device_kind,
        )

    trainer.compile()
    tell(f"compiled after {time.monotonic() - begun:.0f} s")
    while int(trainer.state.generation) < config.evolution.generations:
        if time.monotonic() - begun > 60 * minutes:
            tell(f"stops after {minutes:g} minutes")
            break
        start = time.monotonic()
        row = trainer.generation()
        row["seconds"] = time.monotonic() - start
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        tell(_line(row))
        if row["generation"] % config.evolution.every == 0:
            save()
    if not int(trainer.state.generation):
        raise RunError(
            f"{out}: no generation began within {minutes:g} minutes, which compiling "
            "took; give --minutes more"
        )
    save()
    return policy


def curves_of(out: Path, width: int = 60) -> list[str]:
    """The course of a training in lines of text, each with its first and last mean.

    Args:
      out: its folder.
      width: of a curve, in characters.

    Raises:
      RunError: if the folder holds no training, or a damaged one.
    """
    rows, _ = read_training(out)
    lines = [f"{len(rows)} generations"]
    for name in ("reward", "gain", "births", "parameters"):
        values, curve = [float(row.get(name, np.nan)) for row in rows], Curve()
        for value in values:
            curve.add(value)
        few = max(1, len(values) // 10)
        ends = values[:few], values[-few:]
        first, last = (float(np.mean(v)) if v else np.nan for v in ends)
        lines.append(f"{name:10} {first:8.4f} {curve.line(width)} {last:.4f}")
    return lines


def _line(row: dict[str, float]) -> str:
    return (
        f"generation {row['generation']:4.0f}  reward {row['reward']:.4f}  gain "
        f"{100 * row['gain']:+.2f} +- {100 * row['gain_error']:.2f} points  births "
        f"{row['births']:.1f}  parameters {row['parameters']:.2f}  "
        f"{row['seconds']:.1f} s"
    )


def _same_config(config: PolicyConfig, out: Path) -> None:
    path = out / "config.json"
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        before = read_config(out)
        if not isinstance(before.get("evolution"), dict):
            raise RunError(
                f"{out} holds something else than the training of a policy, by its "
                f"{path.name}; name another folder"
            )
        for key in ("generations", "every"):
            before["evolution"][key] = now["evolution"][key]
        if before != now:
            raise RunError(
                f"{out} holds the training of a policy by another config; expected "
                "the same but for evolution.generations and every. Name another folder"
            )
    _replace(path, json.dumps(now, indent=1).encode())


def _forget_after(out: Path, generation: int) -> None:
    """Drops the lines of generations that were not saved."""
    metrics = out / "metrics.jsonl"
    if metrics.exists():
        rows, _ = read_training(out)
        kept = [row for row in rows if row.get("generation", 0) <= generation]
        lines = (f"{json.dumps(row)}\n" for row in kept)
        _replace(metrics, "".join(lines).encode())


def _write_state(path: Path, state: Evolution) -> None:
    leaves = jax.tree.leaves(jax.device_get(state))
    save = safetensors_numpy().save
    _replace(path, save({f"{i:04}": np.asarray(x) for i, x in enumerate(leaves)}))


def _read_state(path: Path, like: Evolution) -> Evolution:
    try:
        found = safetensors_numpy().load(path.read_bytes())
    except Exception as error:  # whatever the parser says of bytes that are none
        raise RunError(
            f"{path} is damaged: {error}; restore it, or begin anew"
        ) from None
    leaves = [jnp.asarray(found[name]) for name in sorted(found)]
    shapes = [leaf.shape for leaf in leaves]
    expected = [leaf.shape for leaf in jax.tree.leaves(like)]
    if shapes != expected:
        raise RunError(
            f"{path} is that of another version: expected arrays of shapes {expected}, "
            f"got {shapes}; begin anew in another folder"
        )
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _replace(path: Path, data: bytes) -> None:
    """Writes a file in one go."""
    before = path.with_name(f".{path.name}.new")
    before.write_bytes(data)
    os.replace(before, path)
