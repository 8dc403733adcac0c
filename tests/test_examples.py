"""The examples run, and show what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_growth_without_flax(capsys):
    lines = run("pure.py", capsys)
    before, after = (float(lines[i].split()[-1]) for i in (9, -1))
    assert lines[-1].startswith("FOSSILIZED    alpha 1.0")
    assert after < before / 4


LOOPS = ["own_loop.py", "pure_jax.py", "linen_loop.py"]


@pytest.mark.parametrize("name", [*LOOPS, "frozen_host.py", "pure.py"])
def test_examples_of_own_loops_are_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", LOOPS)
def test_growth_beside_a_loop_of_ones_own(name, capsys):
    seeds, accuracy = run(name, capsys)
    assert "FOSSILIZED" in seeds
    assert float(accuracy.split()[-1]) > 0.9


@pytest.mark.slow
def test_a_frozen_host_adapts(capsys):
    stages, accuracy = run("frozen_host.py", capsys)
    assert "[7, 7]" in stages
    assert float(accuracy.split()[-1]) > 0.6


@pytest.mark.slow
def test_a_frozen_host_tries_parts_everywhere(capsys, monkeypatch, tmp_path):
    picture = tmp_path / "worth.png"
    monkeypatch.setattr("sys.argv", ["adapt.py", str(picture)])
    *layers, before, after = run("adapt.py", capsys)
    assert [line.split(":")[0] for line in layers] == [
        "layers/0",
        "layers/2",
        "layers/4",
    ]
    assert float(before.split()[-1]) < 0.2
    assert float(after.split()[-1]) > 0.95
    assert picture.stat().st_size > 5000


@pytest.mark.slow
def test_an_existing_model(capsys):
    lines = run("existing_model.py", capsys)
    assert len(lines) == 7


@pytest.mark.slow
def test_several_devices(capsys):
    [line] = run("several_devices.py", capsys)
    assert line.startswith("4 devices, one state")


@pytest.mark.slow
def test_a_run_goes_on_without_its_remote_policy(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["remote_policy.py"])
    *told, births, accuracy = run("remote_policy.py", capsys)
    who = [line.partition(": ")[2] for line in told]
    assert who == [
        "its own policy decides",
        "the remote policy decides",
        "the other process is killed",
        "its own policy decides",
    ]
    assert told[-1].startswith("tick 15:")
    assert births.count(": 0") == 0
    assert float(accuracy.split()[-1]) > 0.9
