"""The commands of docs/rollout.md run as they stand there, and print what it shows."""

import re
import runpy
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest
from openfeature import api

from esper_jax.cli import main
from esper_jax.rollout import bucket
from esper_jax.rollout.canary import canary
from esper_jax.rollout.canary.observations import read_from
from esper_jax.rollout.provider import FlagFileProvider

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "rollout.md").read_text()


def steps():
    """Each block of commands of the walk, and the block of output behind it."""
    walk = PAGE.split("## A rollout, step by step")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```\n\n```text\n(.*?)```", walk, re.DOTALL)


def matches(shown, said):
    """Whether output is as shown, where ``...`` stands for anything, lines too."""
    pattern = re.escape(shown.strip()).replace(re.escape("..."), "(?s:.*?)")
    return re.fullmatch(pattern, said.strip())


class Clock:
    """Time as the canary sees it."""

    def __init__(self):
        self.ahead = 0.0

    def time(self):
        return time.time() + self.ahead


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a line of the page; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "examples"):
        shutil.copytree(ROOT / folder, folder)

    def run(line):
        program, *arguments = shlex.split(line, comments=True)
        expected = int((re.findall(r"# exit status (\d+)", line) or [0])[0])
        status = 0
        if program == "python":
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            assert program == "esper-jax"
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            try:
                main()
            except SystemExit as ended:
                status = ended.code
        said = capsys.readouterr()
        assert (status, said.err) == (expected, ""), line
        return said.out

    return run


def test_the_walk_goes_as_it_is_told(run, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(canary, "time", clock)
    blocks = steps()
    assert len(blocks) == PAGE.split("\n## ")[1].count("```bash") == 9
    percents = []
    for number, (commands, shown) in enumerate(blocks):
        # The page says when the hour is over; from the second rollout on it always is.
        waits = number == 3 or number >= 6
        said = ""
        for line in commands.splitlines():
            if waits and "canary step" in line:
                clock.ahead += 3600
            said += run(line)
        assert matches(shown, said), f"{shown}\nis not\n{said}"
        percents += re.findall(r"chunked_layers at (\d+)%: (\w+)", said)
    assert percents == [
        ("1", "hold"),
        ("10", "advance"),
        ("0", "roll"),
        ("10", "advance"),
        ("25", "advance"),
        ("25", "hold"),
        ("50", "advance"),
        ("100", "advance"),
        ("100", "finish"),
    ]


@pytest.mark.parametrize(
    ("fault", "trigger"), [("wrong", "accuracy"), ("raising", "error"), ("nan", "nan")]
)
def test_the_other_faults_of_the_example_are_rolled_back_too(fault, trigger, run):
    run("esper-jax flags rollout chunked_layers 9")
    run("esper-jax canary start chunked_layers c --percents 10 100")
    run(f"python examples/rollout_traffic.py 6000 c/observations.jsonl --fault {fault}")
    assert f": roll back: {trigger}" in run("esper-jax canary step c # exit status 1")


def test_the_service_of_the_page_records_what_the_flag_says(run):
    """Its code, with a provider of the same file."""
    names = {}
    [code] = re.findall(r"```python\n(import time.*?)```", PAGE, re.DOTALL)
    exec(code, names)

    def answer(request, new):
        if new and request % 2:
            raise ValueError("a broken version")

    run("esper-jax flags rollout chunked_layers 50")
    Path("canary").mkdir()
    requests = [(f"model-{number}", number) for number in range(40)]
    api.set_provider_and_wait(FlagFileProvider("configs/features.toml"))
    try:
        names["serve"](requests, answer)
    finally:
        api.clear_providers()
    seen, _ = read_from(Path("canary/observations.jsonl"), 0)
    for (model_id, number), row in zip(requests, seen, strict=True):
        new = bucket(model_id) < 50
        assert row["arm"] == ("candidate" if new else "baseline")
        assert row["error"] == bool(new and number % 2)
        assert row["latency"] >= 0
    assert {row["arm"] for row in seen} == {"candidate", "baseline"}


def test_the_page_names_every_option_of_a_plan():
    for name in canary.Plan.__dataclass_fields__:
        option = f"--{name}".replace("_", "-")
        assert re.search(rf"{option}\b", PAGE), option
