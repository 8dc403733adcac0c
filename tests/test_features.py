"""What features take from a model and from a run, and how a run keeps its own."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_controller import FREE, seeds
from test_harvest import X, grow, net, same_bits

from esper_jax import ChunkedLayer, make_growable
from esper_jax.blueprints import lora
from esper_jax.cli import main
from esper_jax.data import DATASETS
from esper_jax.groups import Groups
from esper_jax.layers.bed import SeedBed
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.interface import LayerShape, Setting
from esper_jax.policy.memory import Reason
from esper_jax.rollout import (
    Features,
    Flag,
    FlagError,
    FlagFile,
    apply_features,
    policy_under,
)
from esper_jax.rollout.opening import with_features
from esper_jax.run.build import build_run
from esper_jax.run.changes import check_resumable
from esper_jax.run.config import ConfigError, load_config, parse_config, to_dict
from esper_jax.run.folder import RunFolder, read_config
from esper_jax.run.run import restore_run

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.toml"


def test_the_defaults_take_nothing():
    model = net()
    model.layer.enabled = False  # the user's own choice
    model.layer.bed.implementation = ("xla",)
    before = nnx.state(model)
    layer, bed = dict(vars(model.layer)), dict(vars(model.layer.bed))
    apply_features(model, Features())
    assert vars(model.layer) == layer
    assert vars(model.layer.bed) == bed
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_each_feature_takes_one_thing_from_a_model():
    model = net(("residual_mlp",))
    apply_features(model, Features(fused_kernels=False))
    assert model.layer.bed.implementation == "xla"
    apply_features(model, Features(incubation=False))
    assert model.layer.bed.incubation == "reconstruction"
    assert model.layer.enabled
    base = nnx.jit(nnx.Sequential(model.layer.base, nnx.relu, model.head))(X)
    grow(model.layer.bed, {0: ("residual_mlp", Stage.FOSSILIZED)})
    apply_features(model, Features(chunked_layers=False))
    assert not model.layer.enabled
    same_bits(nnx.jit(model)(X), base)


def test_a_strategy_is_given_to_seeds_that_are_not_grafted_yet():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(6, 11, rngs=rngs))
    options = {"capacity": 4, "strategy": Strategy.ADAPTIVE, "rngs": rngs}
    make_growable(model, nnx.Linear, 6, **options)
    [layer] = [n for _, n in nnx.iter_graph(model) if isinstance(n, ChunkedLayer)]
    stages = (Stage.GRAFTING, Stage.TRAINING, Stage.FOSSILIZED, Stage.EVALUATING)
    grow(layer.bed, {i: ("residual_mlp", stage) for i, stage in enumerate(stages)})
    apply_features(model, Features(grafting_strategies="momentum"))
    kept, new = Strategy.ADAPTIVE, Strategy.MOMENTUM
    strategies = layer.bed.seeds.get_value().strategy
    assert strategies.dtype == np.int8
    assert list(strategies) == [kept, new, kept, kept, new, new]


def test_a_model_that_cannot_be_so_is_refused_before_it_is_changed():
    bare = nnx.Dict(layer=net().layer, bed=SeedBed(8, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="chunked_layers must be on for 'bed', a Seed"):
        apply_features(bare, Features(chunked_layers=False, fused_kernels=False))
    model = net((lora(start="gradient"),))
    with pytest.raises(ValueError, match=r"incubation must be on for 'layer/bed': inc"):
        apply_features(model, Features(incubation=False, fused_kernels=False))
    for layer in (bare.layer, model.layer):
        assert layer.enabled
        assert layer.bed.implementation is None
    with pytest.raises(ValueError, match="grafting_strategies must be one of linear"):
        Features(grafting_strategies="steep")


@pytest.mark.parametrize(
    ("features", "germinates", "moves"),
    [
        (Features(), True, True),
        (Features(growth=False), False, True),
        (Features(chunked_layers=False), False, False),
    ],
)
def test_the_policy_is_that_of_the_features(features, germinates, moves):
    """Of a layer with a dead chunk and a seed whose time in TRAINING is over."""
    shape = LayerShape(num_seeds=4, capacity=2, costs=np.full((1, 4), 10))
    config = ControllerConfig(when="period", period=1, training_limit=1, max_training=2)
    policy = policy_under(features, config)(Setting(layers={"a": shape}, gates=FREE))
    [key] = Groups.alone(("a",)).of
    old = seeds(health=[0.1] * 4, seed_0="TRAINING")
    old = dataclasses.replace(old, epochs_in_stage=old.epochs_in_stage + 9)
    given = {key: jax.tree.map(lambda leaf: leaf[None], old)}
    signals = {key: Signals.unmeasured(held_out_loss=1.0)}
    signals = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], signals)
    memory = policy.init({"a": shape}, jax.random.key(0))
    asked, decide = set(), jax.jit(policy.decide)  # one compile
    for _ in range(3):
        commands, memory = decide(given, signals, memory)
        asked |= set(commands[key].target.flatten().tolist())
    assert (Stage.GERMINATED in asked) is germinates
    assert (Stage.CULLED in asked) is moves
    disabled = Reason.DISABLED in memory.reason.flatten().tolist()
    assert disabled is not germinates


def test_a_run_reads_its_features_from_its_config():
    config = parse_config({"features": {"growth": False, "incubation": False}})
    assert config.features == Features(growth=False, incubation=False)
    assert parse_config(to_dict(config)) == config
    for table, message in (
        ({"growth": 1}, "features.growth: expected bool, got 1"),
        ({"grwth": True}, "features.grwth: unknown key; expected one of chunked"),
        ({"grafting_strategies": "x"}, "features.grafting_strategies must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({"features": table})
    config = load_config(SMOKE, ["features.chunked_layers=false"])
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, factory=f"{__name__}:bare")
    )
    config = dataclasses.replace(config, growth=type(config.growth)())
    with pytest.raises(ConfigError, match=r"features.chunked_layers must be on for 'b"):
        build_run(config, DATASETS["digits"](0))


def bare(rngs):
    """A model for a config that holds a bed without a layer."""
    return nnx.Dict(bed=SeedBed(8, 2, rngs=rngs))


def test_what_may_differ_when_a_run_goes_on():
    began = load_config(SMOKE)
    now = load_config(
        SMOKE,
        ["features.performance_monitoring=false", "features.ab_testing=false"],
    )
    assert check_resumable(now, began) == []
    now = load_config(SMOKE, ["features.growth=false"])
    with pytest.raises(ConfigError, match=r"features.growth: expected True.*got False"):
        check_resumable(now, began)
    found = check_resumable(now, began, ["features.growth"])
    assert found == [("features.growth", True, False)]
    with pytest.raises(ConfigError, match="the saved state has the form"):
        check_resumable(began, began, ["features.grafting_strategies"])


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command line in a folder of its own; returns status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["esper-jax", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code
        found = capsys.readouterr()
        return status, found.out, found.err

    return run


SMALL = (
    "model.hidden=[4]",
    "growth.num_seeds=2",
    "growth.capacity=1",
    'growth.blueprints=["affine"]',
    "train.batch_size=512",
    "governor.enabled=false",
)
FLAGS = """\
[chunked_layers]      # m7 is number 46 by SHA-256
rollout_percentage = 20
[performance_monitoring]
[grafting_strategies]
enabled = true
value = "adaptive"
"""


def test_a_run_keeps_the_features_that_it_began_with(
    command, tmp_path, monkeypatch, caplog
):
    file = FlagFile(tmp_path / "features.toml")
    file.path.write_text(FLAGS)
    train = ["train", SMOKE, "--out", "r", "--features", "features.toml"]
    train += ["--model-id", "m7", "--set", *SMALL]
    status, out, errors = command(*train, "train.ticks=2", "--profile", 1)
    assert status == 0, errors
    assert out.startswith(
        "features of m7: chunked_layers off, performance_monitoring off, "
        "grafting_strategies adaptive\n"
    )
    assert "--profile: no step is recorded" in errors
    folder = RunFolder(tmp_path / "r")
    assert not folder.metrics.exists()
    assert not folder.profile.exists()
    began = Features(
        chunked_layers=False,
        performance_monitoring=False,
        grafting_strategies="adaptive",
    )
    assert read_config(folder).features == began
    assert not folder.events.read_text()
    with_seeds = restore_run(folder)[2].state
    [strategies] = [state.strategy for state in with_seeds.seeds.values()]
    assert set(strategies.tolist()) == {Strategy.ADAPTIVE}

    # Without flags the run goes on as it began, without a word.
    config = load_config(SMOKE, SMALL)
    silent = with_features(config, folder, None, "m7", resume=True)
    assert silent.features == began
    assert not caplog.messages
    monkeypatch.setenv("ESPER_FEATURE_CHUNKED_LAYERS", "on")
    assert with_features(config, folder, None, "m7", resume=True) == silent
    assert "features.chunked_layers stays False, as the run began" in caplog.text
    monkeypatch.delenv("ESPER_FEATURE_CHUNKED_LAYERS")

    # With other flags too, but for what may change.
    file.roll_out("chunked_layers", 100)
    file.change("performance_monitoring", enabled=True)
    go_on = [*train, "train.ticks=3", "--resume", "--allow-change"]
    status, out, errors = command(*go_on, "features.chunked_layers")
    assert status == 0, errors
    assert "features of m7: performance_monitoring off, grafting" in out
    assert errors.splitlines() == [
        "esper-jax: features.performance_monitoring stays False, as the run began; it "
        "would be True now. To take that, add --allow-change "
        "features.performance_monitoring"
    ]
    now = dataclasses.replace(began, chunked_layers=True)
    assert read_config(folder).features == now
    [change] = json.loads(folder.record.read_text())["changes"]
    assert change == {
        "key": "features.chunked_layers",
        "from": False,
        "to": True,
        "tick": 2,
    }


def test_the_environment_gives_a_run_features_without_a_file(monkeypatch, caplog):
    folder, config = RunFolder(Path("nowhere")), load_config(SMOKE)
    monkeypatch.setenv("ESPER_FEATURE_GROWTH", "off")
    monkeypatch.setenv("ESPER_FEATURE_GROWHT", "off")
    found = with_features(config, folder, None, "r")
    assert found == dataclasses.replace(config, features=Features(growth=False))
    [said] = caplog.messages
    assert said.startswith("ESPER_FEATURE_GROWHT overrides nothing: there is no such")
    monkeypatch.setenv("ESPER_FEATURE_GROWTH", "so")
    with pytest.raises(FlagError, match="ESPER_FEATURE_GROWTH must be 1 or 0"):
        with_features(config, folder, None, "r")


def test_flags_are_listed_and_changed_by_commands(command, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "features.toml"
    path.write_text(FLAGS + "[own]\n")
    assert command("flags", "rollout", "chunked_layers", 50) == (
        0,
        "chunked_layers: on for 50% of model ids (was: on for 20% of model ids)\n",
        "",
    )
    status, out, _ = command("flags", "set", "growth", "on", "blocklist=['m7']")
    assert (status, out) == (
        0,
        "growth: on for all, off for m7 (was: not in the file)\n",
    )
    monkeypatch.setenv("ESPER_FEATURE_INCUBATION", "0")
    status, out, _ = command("flags", "list", "--model-id", "m7")
    assert status == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()}
    assert lines == {
        "chunked_layers": "on for 50% of model ids m7: on (SPLIT)",
        "performance_monitoring": "off m7: off (DISABLED)",
        "grafting_strategies": "'adaptive' on for all m7: on (STATIC)",
        "own": "off (a flag of your own) m7: off (DISABLED)",
        "growth": "on for all, off for m7 m7: off (TARGETING_MATCH)",
        "fused_kernels": "not in the file: as the code has it m7: on (DEFAULT)",
        "incubation": "not in the file: as the code has it "
        "ESPER_FEATURE_INCUBATION makes it off",
        "ab_testing": "not in the file: as the code has it m7: on (DEFAULT)",
    }
    assert command("flags", "set", "own", "off")[:2] == (0, "own: off (was: off)\n")
    command("flags", "set", "chunked_layers", "off")
    assert FlagFile(path).read()["chunked_layers"] == Flag()
    assert "# m7 is number 46 by SHA-256" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flags"], "Expected one of {list, set, rollout}"),
        (["flags", "rollout", "growth", "ten"], "PERCENT"),
        (["flags", "rollout", "own", "101"], "from 0 (no model) to 100"),
        (["flags", "rollout", "own", "-1"], "got -1"),
        (["flags", "rollout", "owns", "5"], "has no flag 'owns' (did you mean own?)"),
        (["flags", "set", "own"], "expected on, off or KEY=VALUE after the name"),
        (["flags", "set", "own", "5"], "esper-jax flags rollout NAME PERCENT"),
        (["flags", "set", "own", "enable=true"], "own.enable: unknown key (did you m"),
        (["flags", "set", "own", "allowlist=m7"], 'a list of model ids such as ["a",'),
        (
            ["flags", "list", "--file", "no.toml"],
            "no.toml: there is no such file of fl",
        ),
        (["train", SMOKE, "--features", "no.toml"], "no.toml: there is no such file"),
        (["train", SMOKE, "--model-id", "m7"], "--model-id: expected --features FILE"),
    ],
)
def test_wrong_input_is_refused_in_words(arguments, message, command, tmp_path):
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "features.toml"
    path.write_text("[own]\n")
    status, _, errors = command(*arguments)
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    assert path.read_text() == "[own]\n"
    assert [p.name for p in tmp_path.iterdir()] == ["configs"]
