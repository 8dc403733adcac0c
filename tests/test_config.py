"""Configs: what is accepted, and how the rest is refused."""

from pathlib import Path

import pytest

from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.run.config import ConfigError, load_config, parse_config, to_dict

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(
    p for p in FOLDER.glob("*.toml") if p.name not in ("features.toml", "policy.toml")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path):
    config = load_config(path)
    assert parse_config(to_dict(config)) == config


def test_an_empty_config_is_the_default():
    assert parse_config({}).lifecycle == LifecycleConfig()


def test_min_epochs_is_a_table_of_stages():
    config = parse_config({"lifecycle": {"min_epochs": {"TRAINING": 7}}})
    assert config.lifecycle.min_epochs[Stage.TRAINING] == 7
    assert config.lifecycle.min_epochs[Stage.GRAFTING] == 50


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ({"trian": {}}, ["trian", "unknown key", "train"]),
        ({"train": {"tics": 3}}, ["train.tics", "unknown key", "ticks"]),
        ({"train": {"ticks": "many"}}, ["train.ticks", "expected int", "'many'"]),
        ({"train": {"ticks": True}}, ["train.ticks", "expected int", "True"]),
        ({"train": {"ticks": 1.5}}, ["train.ticks", "expected int", "1.5"]),
        ({"train": {"ticks": 0}}, ["train.ticks", "at least 1", "0"]),
        ({"train": {"learning_rate": -1}}, ["train.learning_rate", "above 0", "-1"]),
        ({"train": {"learning_rate": float("nan")}}, ["train.learning_rate", "nan"]),
        ({"train": 3}, ["train", "expected a table", "3"]),
        ({"checkpoint": {"keep_best": "f1"}}, ["keep_best", "loss, accuracy", "f1"]),
        ({"checkpoint": {"keep_every": -1}}, ["checkpoint.keep_every", "at least 0"]),
        ({"model": {"hidden": 3}}, ["model.hidden", "expected a list of int", "3"]),
        ({"model": {"hidden": [3, "x"]}}, ["model.hidden[1]", "expected int", "'x'"]),
        ({"model": {"hidden": []}}, ["model.hidden", "at least one"]),
        ({"model": {"hidden": [8, 0]}}, ["model.hidden", "at least 1", "0"]),
        ({"model": {"activation": "sine"}}, ["model.activation", "relu", "sine"]),
        ({"data": {"name": "mnist2"}}, ["data.name", "digits", "mnist2"]),
        ({"growth": {"capacity": 0}}, ["growth.capacity", "from 1", "0"]),
        ({"growth": {"capacity": 9}}, ["growth.capacity", "num_seeds (4)", "9"]),
        (
            {"growth": {"num_seeds": 65}},
            ["growth.num_seeds", "narrowest layer", "64", "65"],
        ),
        (
            {"growth": {"blueprints": ["tree"]}},
            ["growth.blueprints", "tree", "residual_mlp"],
        ),
        ({"growth": {"blueprints": []}}, ["growth", "blueprints", "1 to 127"]),
        ({"growth": {"strategy": "hope"}}, ["growth.strategy", "linear", "hope"]),
        ({"growth": {"incubation": "egg"}}, ["growth.incubation", "task", "egg"]),
        ({"lifecycle": {"min_epochs": 3}}, ["lifecycle.min_epochs", "table", "3"]),
        (
            {"lifecycle": {"min_epochs": {"SLEEPING": 3}}},
            ["lifecycle.min_epochs.SLEEPING", "unknown stage", "DORMANT"],
        ),
        (
            {"lifecycle": {"min_epochs": {"TRAINING": -1}}},
            ["lifecycle.min_epochs[TRAINING]", "0 to 65535", "-1"],
        ),
        (
            {"lifecycle": {"grafting": {"max_alpha": 2.0}}},
            ["lifecycle.grafting.max_alpha", "1", "2.0"],
        ),
        ({"controller": {"patience": 0}}, ["controller.patience", "at least 1", "0"]),
        ({"controller": {"blueprint": 1}}, ["controller.blueprint", "0 to 0", "1"]),
        ({"checkpoint": {"keep": 0}}, ["checkpoint.keep", "at least 1", "0"]),
        ({"seed": -1}, ["seed", "at least 0", "-1"]),
        ({"seed": 2**32}, ["seed", "below 2**32", "4294967296"]),
        (
            {"controller": {"training_limit": 70000}},
            ["controller.training_limit", "at most 65535", "70000"],
        ),
        (
            {"controller": {"patience": 10**10}},
            ["controller.patience", "at most", "10000000000"],
        ),
        (
            {"lifecycle": {"cull_error_count": 300}},
            ["lifecycle.cull_error_count", "0 to 255", "300"],
        ),
        (
            {"lifecycle": {"grafting": {"stability_window": 100000}}},
            ["lifecycle.grafting.stability_window", "65535", "100000"],
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else "-".join(value[:1]),
)
def test_refusals_name_the_key_and_what_was_expected(table, parts):
    with pytest.raises(ConfigError) as error:
        parse_config(table)
    for part in parts:
        assert part in str(error.value)


def test_overrides(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[train]\nticks = 5\n")
    config = load_config(
        path,
        ["train.ticks=7", "model.hidden=[8, 9]", "model.activation=tanh", "seed=3"],
    )
    assert config.train.ticks == 7
    assert config.model.hidden == (8, 9)
    assert config.model.activation == "tanh"
    assert config.seed == 3


@pytest.mark.parametrize("override", ["train.ticks", "=3", "train..ticks=3"])
def test_an_override_that_is_none(tmp_path, override):
    path = tmp_path / "c.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match="key=value"):
        load_config(path, [override])


def test_an_override_through_a_value(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("seed = 1\n")
    with pytest.raises(ConfigError, match="seed is a value, not a table"):
        load_config(path, ["seed.deep=3"])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")
    path = tmp_path / "c.toml"
    path.write_text("seed = = 3")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(path)


def test_a_byte_order_mark_is_no_part_of_the_config(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b"seed = 7\n")
    assert load_config(path).seed == 7
