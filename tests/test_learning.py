"""The training of learned policies: tasks, runs side by side, and evolution."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.commands.reading import Report
from esper_jax.learning import (
    EvolutionConfig,
    Family,
    PolicyConfig,
    evolution,
    train_policy,
)
from esper_jax.learning.config import load_policy_config
from esper_jax.learning.episodes import host_parameters
from esper_jax.learning.report import read_training
from esper_jax.learning.tasks import changed, draw_tasks, load_digits_task
from esper_jax.learning.train import Trainer, curves_of
from esper_jax.policy.learned_file import read_policy
from esper_jax.run.config import ConfigError
from esper_jax.run.folder import RunError

TINY = PolicyConfig(
    families=(
        Family(
            hidden=(4,),
            num_seeds=2,
            blueprints=("residual_mlp",),
            ticks=4,
            steps=1,
            batch=32,
            held_out=32,
            test=64,
        ),
    ),
    evolution=EvolutionConfig(
        generations=2,
        population=20,
        tasks=2,
        sigma=0.2,
        learning_rate=0.2,
        rent=4.0,
        every=1,
    ),
)
"""Rent is so high that the best is not to grow, which a policy at first does."""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_small_training_raises_its_reward_and_goes_on_as_if_never_stopped(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    policy = train_policy(TINY, tmp_path, command="esper-jax x", tell=said.append)
    rows = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["generation"] for row in rows] == [1, 2]
    assert len(said) == 3
    longer = dataclasses.replace(TINY.evolution, generations=16)
    train_policy(
        dataclasses.replace(TINY, evolution=longer), tmp_path, tell=said.append
    )
    rows = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert "goes on after generation 2" in said
    assert [row["generation"] for row in rows] == list(range(1, 17))
    gain = np.array([row["gain"] for row in rows])
    births = np.array([row["births"] for row in rows])
    assert gain[:3].mean() < -0.1
    assert gain[-3:].mean() > gain[:3].mean() + 0.1, gain
    assert births[-3:].mean() < births[0]
    for row in rows:
        assert row["gain"] == pytest.approx(row["reward"] - row["baseline"], abs=1e-5)
    lines = curves_of(tmp_path)
    assert lines[0] == "16 generations"
    first, last = lines[2].split()[1], lines[2].split()[-1]
    assert float(first) == pytest.approx(gain[0], abs=1e-4)
    assert float(last) == pytest.approx(gain[-1], abs=1e-4)
    with pytest.raises(RunError, match="holds no training"):
        curves_of(tmp_path / "other")
    _check_report(tmp_path)
    found = read_policy(policy)
    assert found.made_by["generations"] == 16
    assert found.made_by["config"]["evolution"]["rent"] == 4.0
    with pytest.raises(RunError, match="another config"):
        train_policy(dataclasses.replace(TINY, seed=1), tmp_path)
    with pytest.raises(ConfigError, match="minutes must be above 0, got nan"):
        train_policy(TINY, tmp_path, minutes=float("nan"))
    with pytest.raises(ValueError, match=r"at most 1797, .* got 1800"):
        Family(steps=10, batch=104, held_out=248, test=512)
    other = dataclasses.replace(TINY, evolution=longer)
    for name, content, message in (
        ("state.safetensors", b"\0" * 9, "state.safetensors is damaged"),
        ("config.json", b'{"seed": 0}', "holds something else than the training"),
        ("config.json", b"{", "config.json is damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=message):
            train_policy(other, tmp_path)


def test_ranks_lead_to_the_best_numbers() -> None:
    """On a bowl, whatever the scale of its scores."""
    config = EvolutionConfig(
        population=32, sigma=0.1, learning_rate=0.1, weight_decay=0.0
    )
    state = evolution.begin({"x": jnp.zeros(3), "y": jnp.zeros(())}, config)

    @jax.jit
    def generation(state: Any, key: Any) -> Any:
        many, noise = evolution.candidates(state, key, config)
        away = jnp.sum((many["x"] - 1) ** 2, axis=1) + (many["y"] + 1) ** 2
        scores = jnp.stack([1e3 * -away, 7 - 0.5 * away], axis=1)
        return evolution.improved(state, noise, evolution.fitness(scores)[:-1], config)

    for key in jax.random.split(jax.random.key(0), 80):
        state = generation(state, key)
    np.testing.assert_allclose(state.mean["x"], 1, atol=0.15)
    np.testing.assert_allclose(state.mean["y"], -1, atol=0.15)
    ranks = evolution.fitness(jnp.array([[1.0], [jnp.nan], [2.0], [1.0]]))
    assert np.argmax(ranks) == 2
    assert ranks[0] == ranks[3] == ranks[1]  # what is not finite is the lowest


def test_tasks_change_as_they_say() -> None:
    family = TINY.families[0]
    tasks = draw_tasks(jax.random.key(0), family, load_digits_task(), 24)
    assert tasks.train[0].shape == (24, family.rows, 64)
    assert set(np.asarray(tasks.change)) == {0, 1, 2}
    assert np.isfinite(tasks.test[0]).all()
    labels = [len(np.unique(y)) for y in np.asarray(tasks.test[1])]
    assert min(labels) >= 2
    assert max(labels) == 10
    for i, kind in enumerate(np.asarray(tasks.change)[:8]):
        task = jax.tree.map(lambda x, i=i: x[i], tasks)
        at = int(task.change_at)
        before, after = (changed(task, task.test, jnp.asarray(t)) for t in (at - 1, at))
        np.testing.assert_array_equal(before[0], task.test[0])
        np.testing.assert_array_equal(before[1], task.test[1])
        assert np.array_equal(after[0], before[0]) == (kind != 2)
        assert np.array_equal(after[1], before[1]) == (kind != 1)


def test_a_config_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[[families]]\nhidden = [8]\n[evolution]\npopulation = 6\n")
    config = load_policy_config(path, ["evolution.tasks=3", "seed=5"])
    assert (config.seed, config.evolution.tasks) == (5, 3)
    assert config.families == (Family(hidden=(8,)),)
    assert host_parameters(config.families[0]) == 64 * 8 + 8 + 8 * 10 + 10
    for text, message in (
        ("[[families]]\nhidden = [2]", "families\\[0\\].hidden must hold widths"),
        ("[evolution]\npopulation = 5", "evolution.population must be even"),
        ("[evolution]\nsigma = 0", "evolution.sigma must be above 0"),
        ("families = []", "families must hold at least one"),
        ("[[families]]\nhost = 'cnn'", "host must be 'mlp' or 'conv'"),
        ("speed = 1", "speed: unknown key"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_policy_config(path)
    shipped = load_policy_config(Path(__file__).parents[1] / "configs/policy.toml")
    assert len(shipped.families) == 2


@pytest.mark.slow
def test_a_generation_can_be_repeated_bit_for_bit() -> None:
    trainer = Trainer(TINY)
    before = trainer.state
    first = trainer.generation()
    after, trainer.state = trainer.state, before
    assert trainer.generation() == first
    jax.tree.map(np.testing.assert_array_equal, trainer.state, after)


def _check_report(out: Path) -> None:
    """A page of the curves, by the command; what is damaged is told."""
    metrics = out / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"generation": 17, "rew')  # killed while it wrote
    assert Report(dir=out).act() == 0
    page = (out / "report.html").read_text()
    assert 'aria-label="Gain by generation. policy less nothing' in page
    assert "at generation 16, from" in page
    assert "evolution.rent" in page
    assert "tick" not in page[page.index("<main") : page.index('<section id="config"')]
    metrics.write_text(f"broken\n{whole}")
    with pytest.raises(RunError, match=r"metrics.jsonl, line 1 is damaged"):
        read_training(out)
    metrics.write_text(whole)
