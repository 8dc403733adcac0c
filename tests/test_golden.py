"""Every row of the golden data against the public vectorised functions, in batches.

The data came from a scalar oracle that was written apart from this code. Another file
of the same form is compared with ``pytest tests/test_golden.py --golden FILE``.
"""

import copy
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax import lifecycle
from esper_jax.chunks import ChunkLayout
from esper_jax.lifecycle import grafting
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.grafting import GraftConfig, Strategy
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import LEGAL, LIVING, Outcome, Stage
from esper_jax.lifecycle.state import init_seeds

GOLDEN = pathlib.Path(__file__).parent / "golden" / "lifecycle.json"
SECTIONS = ("defaults", "legal", "transitions", "grafts", "chunks")


def wrong_defaults(golden: dict[str, Any]) -> list[str]:
    """Defaults of `LifecycleConfig` that differ."""
    config = dataclasses.asdict(LifecycleConfig())
    config["min_epochs"] = {stage.name: config["min_epochs"][stage] for stage in Stage}
    expected = golden["defaults"]
    return [
        f"{name}: expected {value}, got {config.get(name)}"
        for name, value in expected.items()
        if config.get(name) != value
    ]


def wrong_legal(golden: dict[str, Any]) -> list[str]:
    """Stages whose legal targets differ."""
    ours = {source.name: {t.name for t in targets} for source, targets in LEGAL.items()}
    rows = golden["legal"]
    missing = [f"{name} is not in the data" for name in ours.keys() - rows.keys()]
    return missing + [
        f"{source}: expected {targets}, got {ours.get(source)}"
        for source, targets in rows.items()
        if ours.get(source) != set(targets)
    ]


def wrong_transitions(golden: dict[str, Any]) -> list[str]:
    """Rows whose outcome differs: one call for each value of ``max_epochs``."""
    wrong = []
    for limit in sorted({row["max_epochs"] for row in golden["transitions"]}):
        rows = [row for row in golden["transitions"] if row["max_epochs"] == limit]
        config = LifecycleConfig(max_epochs=limit)
        for row, outcome in zip(rows, _outcomes(rows, config), strict=True):
            if outcome != Outcome[row["outcome"]]:
                wrong.append(f"{row}: got {Outcome(outcome).name}")
    return wrong


def _outcomes(rows: list[dict[str, Any]], config: LifecycleConfig) -> np.ndarray:
    n = len(rows)
    source = np.array([Stage[row["source"]] for row in rows], np.int8)
    target = np.array([Stage[row["target"]] for row in rows], np.int8)
    owned = np.where(LIVING[source], np.arange(n, dtype=np.int32), -1)
    state = dataclasses.replace(
        init_seeds(n, n),
        stage=jnp.asarray(source),
        epochs_in_stage=jnp.asarray([row["epochs"] for row in rows], jnp.uint16),
        error_count=jnp.asarray([row["error_count"] for row in rows], jnp.uint8),
        slot_of_seed=jnp.asarray(owned),
        seed_of_slot=jnp.asarray(owned),
    )
    nothing = jnp.full((n,), -1, jnp.int8)
    commands = Commands(target=jnp.asarray(target), blueprint=nothing, strategy=nothing)
    signals = Signals.unmeasured(
        **{
            name: _column([row["metrics"].get(_read(name, row)) for row in rows])
            for name in ("reconstruction_loss", "worth", "mean_worth", "stability")
        },
        error_rate=_column([row["metrics"].get("error_rate") for row in rows]),
    )
    signals = jax.tree.map(lambda x: jnp.broadcast_to(x, (n,)), signals)
    run = jax.jit(lifecycle.transition, static_argnums=3)
    after, outcome = run(state, commands, signals, config)
    accepted = np.asarray(outcome) == Outcome.OK
    np.testing.assert_array_equal(after.stage, np.where(accepted, target, source))
    return np.asarray(outcome)


def _read(name: str, row: dict[str, Any]) -> str:
    """The original's name of a signal; it had two for the stability, by gate."""
    last_gate = row["target"] == Stage.FOSSILIZED.name
    return {
        "worth": "performance_delta",
        "mean_worth": "total_improvement",
        "stability": "final_stability" if last_gate else "stability_score",
    }.get(name, name)


def _column(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], np.float32)


def wrong_grafts(golden: dict[str, Any]) -> list[str]:
    """Ramps whose alpha is off by more than 1e-5 at any epoch, all run at once."""
    rows = golden["grafts"]
    expected, got = _alphas(rows)
    bad = ~(np.abs(got - expected) <= 1e-5) & ~np.isnan(expected)
    return [
        f"graft {i} ({rows[i]['strategy']}), epoch {t}: expected {expected[t, i]}, "
        f"got {got[t, i]}"
        for t, i in np.argwhere(bad)
    ]


def _alphas(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Expected and computed alpha[epoch, row]; expected is NaN past a row's end."""
    n, epochs = len(rows), max(len(row["steps"]) for row in rows)
    config = GraftConfig(
        **{
            name: np.array([r["config"][name] for r in rows])
            for name in _settings(rows)
        }
    )
    strategy = jnp.asarray([Strategy[row["strategy"].upper()] for row in rows])
    expected = np.full((epochs, n), np.nan)
    measured = {f.name: np.full((epochs, n), np.nan) for f in _FIELDS}
    for i, row in enumerate(rows):
        for t, step in enumerate(row["steps"]):
            expected[t, i] = step["alpha"]
            for name, value in step["signals"].items():
                ours = {"performance_delta": "worth"}.get(name, name)
                measured[ours][t, i] = np.nan if value is None else value
    signals = Signals(**{k: jnp.asarray(v, jnp.float32) for k, v in measured.items()})

    @jax.jit
    def run(memory: Any, signals: Signals) -> jax.Array:
        def epoch(memory: Any, xs: Any) -> Any:
            t, s = xs
            later = jnp.full((n,), t, jnp.uint16)
            memory = grafting.update(memory, strategy, s, later, config)
            return memory, memory.alpha

        memory = grafting.begin(memory, jnp.ones(n, bool), config)
        rest = jax.tree.map(lambda x: x[1:], signals)
        _, alphas = jax.lax.scan(epoch, memory, (jnp.arange(1, epochs), rest))
        return jnp.concatenate([memory.alpha[None], alphas])

    return expected, np.asarray(run(init_seeds(n, n).graft, signals))


_FIELDS = dataclasses.fields(Signals)


def _settings(rows: list[dict[str, Any]]) -> list[str]:
    names = {f.name for f in dataclasses.fields(GraftConfig)}
    unknown = {name for row in rows for name in row["config"]} - names
    assert not unknown, f"the data names unknown graft settings: {unknown}"
    return [n for n in names if all(n in row["config"] for row in rows)]


def wrong_chunks(golden: dict[str, Any]) -> list[str]:
    """Layouts that differ; their owners and columns are checked against them too."""
    wrong = []
    for row in golden["chunks"]:
        layout = ChunkLayout(row["features"], row["num_seeds"])
        starts, sizes = np.array(row["starts"]), np.array(row["sizes"])
        owners = np.repeat(np.arange(sizes.size), sizes)
        same = (
            np.array_equal(layout.starts, starts)
            and np.array_equal(layout.sizes, sizes)
            and np.array_equal(layout.owners, owners)
        )
        if not same:
            wrong.append(
                f"{row['features']} features over {row['num_seeds']} seeds: got starts "
                f"{layout.starts.tolist()}, sizes {layout.sizes.tolist()}"
            )
    return wrong


WRONG: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "defaults": wrong_defaults,
    "legal": wrong_legal,
    "transitions": wrong_transitions,
    "grafts": wrong_grafts,
    "chunks": wrong_chunks,
}


@functools.cache
def _load(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _load(request.config.getoption("--golden"))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_agrees(golden: dict[str, Any], section: str) -> None:
    assert golden[section], f"the data has no {section}"
    wrong = WRONG[section](golden)
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])


def _spoil_defaults(golden: dict[str, Any], _: float) -> None:
    golden["defaults"]["min_stability"] += 0.01


def _spoil_legal(golden: dict[str, Any], _: float) -> None:
    golden["legal"]["FOSSILIZED"].append("DORMANT")


def _spoil_transition(golden: dict[str, Any], place: float) -> None:
    row = golden["transitions"][int(place * (len(golden["transitions"]) - 1))]
    row["outcome"] = "GATE" if row["outcome"] != "GATE" else "OK"


def _spoil_graft(golden: dict[str, Any], place: float) -> None:
    steps = golden["grafts"][int(place * (len(golden["grafts"]) - 1))]["steps"]
    steps[int(place * (len(steps) - 1))]["alpha"] += 1e-4


def _spoil_chunk(golden: dict[str, Any], place: float) -> None:
    row = golden["chunks"][int(place * (len(golden["chunks"]) - 1))]
    row["starts"][-1] += 1


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("section", "spoil"),
    [
        ("defaults", _spoil_defaults),
        ("legal", _spoil_legal),
        ("transitions", _spoil_transition),
        ("grafts", _spoil_graft),
        ("chunks", _spoil_chunk),
    ],
)
def test_one_wrong_row_is_found(
    section: str, spoil: Callable[..., None], place: float
) -> None:
    golden = copy.deepcopy(_load(GOLDEN))
    spoil(golden, place)
    assert len(WRONG[section](golden)) == 1
