"""The examples run, and show what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_growth_without_flax(capsys):
    assert len((EXAMPLES / "pure.py").read_text().splitlines()) <= 60
    lines = run("pure.py", capsys)
    before, after = (float(lines[i].split()[-1]) for i in (9, -1))
    assert lines[-1].startswith("FOSSILIZED    alpha 1.0")
    assert after < before / 4


@pytest.mark.slow
def test_an_existing_model(capsys):
    lines = run("existing_model.py", capsys)
    assert len(lines) == 7


@pytest.mark.slow
def test_several_devices(capsys):
    [line] = run("several_devices.py", capsys)
    assert line.startswith("4 devices, one state")
